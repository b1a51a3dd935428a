"""A caller's prompt in any of its forms: text, ids, an array or tensor of ids, or what a tokenizer returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from runtime.errors import InvalidArgument, InvalidArgumentType


class IdArray(Protocol):
    """Token ids as a numpy array or a torch tensor: of one dimension, or of two for a batch."""

    @property
    def ndim(self) -> int: ...
    @property
    def dtype(self) -> Any: ...
    def tolist(self) -> Any: ...


Prompt = str | Sequence[int]
Batch = Sequence[str | Sequence[int] | IdArray]
# A prompt or a batch, depending on its dimensions: an array, or transformers' BatchEncoding.
Encoded = IdArray | Mapping[str, Any]

# What tokenizers return besides `input_ids` and `attention_mask`; no token depends on it.
_IGNORED = {"token_type_ids", "special_tokens_mask", "offset_mapping", "length"}


def read_rows(prompt: Any, name: str = "prompt") -> tuple[list[str | list[Any]], bool]:
    """Bring a prompt or a batch into one form; the ids themselves are not checked.

    Args:
        prompt: text or ids, or a batch: a list of those, an array of two dimensions, or a mapping with `input_ids` and
            perhaps an `attention_mask`, whose zeros (padding, on either side) are left out.
        name: what errors call it.

    Returns:
        The rows, each text or a list, and whether it is a batch: one prompt makes one row.

    Raises:
        InvalidArgumentType: it is none of these, or a conversation.
        InvalidArgument: it is empty, an array of other dimensions, or a mask does not fit its ids.
    """
    plain = _plain(prompt, name)
    is_batch = isinstance(plain, list) and bool(plain) and _is_prompt(plain[0])
    rows = plain if is_batch else [plain]
    return [_read_row(row, f"{name}[{index}]" if is_batch else name) for index, row in enumerate(rows)], is_batch


def has_surrogate(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, and so is not valid Unicode."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _read_row(row: Any, name: str) -> str | list[Any]:
    row = _plain(row, name)
    if not isinstance(row, str | list):
        raise InvalidArgumentType(f"{name} must be text or a list of token ids, got {type(row).__name__}")
    if not row:
        raise InvalidArgument(f"{name} is empty: expected some text or at least one token id")
    if isinstance(row, list) and _is_prompt(row[0]):
        _plain(row[0], name)  # a message of a conversation has an error of its own
        raise InvalidArgumentType(f"{name} must hold token ids, got {type(row[0]).__name__}")
    if isinstance(row, str) and has_surrogate(row):
        raise InvalidArgument(f"{name} is not valid Unicode: it holds half of a surrogate pair")
    return row


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str | Sequence | Mapping) or getattr(value, "ndim", 0) > 0


def _plain(value: Any, name: str) -> Any:
    """A prompt or a batch as text or a list; anything else is returned unchanged."""
    if isinstance(value, str):  # numpy's too, which is an array by its attributes
        return str(value)
    if isinstance(value, Mapping):
        return _without_padding(value, name)
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        if value.ndim not in (1, 2):
            raise InvalidArgument(
                f"{name} must have one dimension, or two for a batch, got an array of {value.ndim} dimensions"
            )
        try:
            return value.tolist()
        except Exception as error:  # a tensor without data: sparse, or on the device "meta"
            raise InvalidArgument(f"{name} must hold its values, got {type(value).__name__}: {error}") from error
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return list(value)
    return value


def _without_padding(encoding: Mapping[str, Any], name: str) -> Any:
    """The ids of a tokenizer's output where its attention mask is one."""
    if "role" in encoding:
        raise InvalidArgumentType(f"{name} is a chat message: for a list of messages use runtime.chat(model, messages)")
    surplus = sorted(map(str, encoding.keys() - _IGNORED - {"input_ids", "attention_mask"}))
    if surplus or "input_ids" not in encoding:
        given = ", ".join(surplus) or ", ".join(map(str, encoding)) or "none"
        raise InvalidArgument(f"{name} must hold input_ids and at most an attention_mask, got the keys {given}")
    if isinstance(encoding["input_ids"], str | Mapping):
        raise InvalidArgumentType(f"{name}['input_ids'] must be ids, got {type(encoding['input_ids']).__name__}")
    ids, mask = _plain(encoding["input_ids"], f"{name}['input_ids']"), encoding.get("attention_mask")
    return ids if mask is None else _unmasked(ids, _plain(mask, f"{name}['attention_mask']"), name)


def _unmasked(ids: Any, mask: Any, name: str) -> list[Any]:
    if not isinstance(ids, list) or not isinstance(mask, list) or len(ids) != len(mask):
        raise InvalidArgument(f"{name} must have an attention_mask of the shape of its input_ids")
    if ids and _is_prompt(ids[0]):
        return [
            _unmasked(_plain(row, name), _plain(bits, name), f"{name}[{index}]")
            for index, (row, bits) in enumerate(zip(ids, mask, strict=True))
        ]
    if any(map(_is_prompt, mask)):
        raise InvalidArgument(f"{name} must have an attention_mask of the shape of its input_ids")
    ones = [index for index, bit in enumerate(mask) if bit]
    if any(bit not in (0, 1) for bit in mask) or len(ones) != (ones[-1] - ones[0] + 1 if ones else 0):
        raise InvalidArgument(f"{name} must have an attention_mask with zeros only before and after, got {mask!s:.60}")
    return [ids[index] for index in ones]
