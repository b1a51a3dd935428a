"""The state of a decode loop: every tensor that its steps change, allocated once."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from runtime.errors import InvalidArgument
from runtime.families.kv_cache import KVCache
from runtime.kernels.argmax import NO_KEY, new_argmax_keys
from runtime.kernels.attention_splits import AttentionSplits
from runtime.kernels.launch import INTERPRETING
from runtime.kernels.token_mask import ALL_TOKENS, new_token_mask
from runtime.model.generation_config import MAX_STOP_IDS
from runtime.model.layer_config import LayerConfig
from runtime.model.memory_plan import older_splits
from runtime.model.model import Model

EMITTED_RING = 64  # steps that the host may lag behind
BY_ROW = (
    *("token", "position", "done", "stop_ids", "limit", "seed", "inverse_temperature", "mask"),
    *("x", "x_alt"),
    *("qkv", "attended", "branch", "mlp", "argmax_keys"),
)


class Sampling(NamedTuple):
    """What the head draws the tokens of some rows by; see kernels/gumbel.py."""

    seed: torch.Tensor  # [rows] int64
    position: torch.Tensor  # [rows] int32: of each row's last token
    inverse_temperature: torch.Tensor  # [rows] fp32, 0 in a greedy row

    def __repr__(self) -> str:
        return f"Sampling({len(self.seed)} rows, {self.seed.device})"


@dataclass(frozen=True, repr=False)
class DecodeState:
    """Every tensor that decode steps change, allocated once; d is the model's dtype.

    Between steps `x` holds the embedding of `token`, and `position` the number of cached tokens, which is the position
    of `token` in the next step. The other buffers are scratch within a step.
    """

    token: torch.Tensor  # [batch] int64: the last token of each row
    position: torch.Tensor  # [batch] int32
    done: torch.Tensor  # [batch] bool: the row has emitted a stop token or reached its limit
    stop_ids: torch.Tensor  # [batch, MAX_STOP_IDS] int64, padded with -1
    limit: torch.Tensor  # [batch] int32: the position at which the row ends, at most max_seq_len
    seed: torch.Tensor  # [batch] int64: the seed of the row's draws
    inverse_temperature: torch.Tensor  # [batch] fp32: 1 / temperature, 0 in a greedy row
    mask: torch.Tensor  # [batch, words_of(vocab)] int32: which tokens may come next, a bit for each
    x: torch.Tensor  # [batch, hidden] d: the residual
    x_alt: torch.Tensor  # [batch, hidden] d: its second buffer
    qkv: torch.Tensor  # [batch, (heads + 2 * kv_heads) * head_dim] d, of the widest layer; see qkv_of
    attended: torch.Tensor  # [batch, heads * head_dim] d: attention's output, of the widest layer; see attended_of
    splits: AttentionSplits | None  # attention's workspace, of the widest layer; None where no Triton kernel runs
    branch: torch.Tensor  # [batch, hidden] d
    mlp: torch.Tensor  # [batch, intermediate] d
    argmax_keys: torch.Tensor  # [batch, KEY_SLOTS] int64: the head's workspace
    normed: torch.Tensor | None  # [batch, hidden] d: workspace of products; None where no Triton kernel runs
    cache: KVCache
    emitted: torch.Tensor  # [EMITTED_RING, batch] int64: tokens of step s in slot s % EMITTED_RING
    step: torch.Tensor  # [rows of the whole state] int64: steps taken, the same number everywhere
    logits: torch.Tensor | None  # [batch, vocab] d: the step's logits, None unless requested
    embed_scale: float  # sqrt(hidden) rounded to d
    pad: int  # what finished rows emit
    chunk: torch.Tensor  # [3 + longest chunk] int64: row, start, count and ids of the chunk that prefill runs
    max_seq_len: int
    graphs: dict[Any, Any] = field(default_factory=dict)  # captured on these tensors, and on views of their first rows
    rings: dict[int, torch.Tensor] = field(default_factory=dict)  # the views' `emitted`, by their number of rows
    parent: DecodeState | None = None  # the state that this one is a view of

    def __repr__(self) -> str:
        return f"DecodeState({self.batch} rows, {self.cache}, {self.x.dtype}, {self.x.device})"

    # Between two steps Python runs from a cold cache, where each attribute of a tensor costs microseconds.

    @functools.cached_property
    def batch(self) -> int:
        """Number of rows."""
        return self.token.shape[0]

    @functools.cached_property
    def emitted_at(self) -> tuple[torch.Tensor, ...]:
        """The slots of `emitted`, [batch] each."""
        return self.emitted.unbind()

    @functools.cached_property
    def token_array(self) -> np.ndarray[Any, Any]:
        """`token` on a CPU, as an array over its memory."""
        return self.token.numpy()

    def first_token(self) -> list[int]:
        """The first row's last token, once all that is launched has run."""
        return self.token_array[:1].tolist() if self.token.is_cpu else self.token[:1].tolist()

    def qkv_of(self, layer: LayerConfig) -> torch.Tensor:
        """A contiguous view of `qkv` for one layer, [batch, (heads + 2 * kv_heads) * head_dim] of that layer."""
        return _leading(self.qkv, self.batch, sum(layer.qkv_widths))

    def attended_of(self, layer: LayerConfig) -> torch.Tensor:
        """A contiguous view of `attended` for one layer, [batch, heads * head_dim] of that layer."""
        return _leading(self.attended, self.batch, layer.heads * layer.head_dim)

    def splits_of(self, layer: LayerConfig) -> AttentionSplits | None:
        """Contiguous views of `splits` for one layer."""
        if self.splits is None:
            return None
        partial, stats = self.splits
        return AttentionSplits(
            _leading(partial, *partial.shape[:2], layer.heads * layer.head_dim),
            _leading(stats, *stats.shape[:2], 2, layer.heads),
        )

    @property
    def sampling(self) -> Sampling:
        """What a step's tokens are drawn by."""
        return Sampling(self.seed, self.position, self.inverse_temperature)

    def sampling_of(self, row: torch.Tensor, position: torch.Tensor) -> Sampling:
        """What successive tokens of one row are drawn by: row [1] int64, position [n] int32 of the tokens before."""
        rows = row.expand(len(position))
        return Sampling(self.seed[rows], position, self.inverse_temperature[rows])

    def normed_of(self, rows: int) -> torch.Tensor | None:
        """The first rows of `normed`."""
        return None if self.normed is None else self.normed[:rows]

    def first_rows(self, rows: int) -> DecodeState:
        """A view of the first `rows` rows, whose memory it shares but for the ring of emitted tokens, which a host some
        steps behind may still read when another view decodes. Only one view of a state may decode at a time."""
        if rows == self.batch:
            return self
        return dataclasses.replace(
            self,
            **{name: getattr(self, name)[:rows] for name in BY_ROW},
            logits=None if self.logits is None else self.logits[:rows],
            normed=self.normed_of(rows),
            splits=None if self.splits is None else AttentionSplits(*(tensor[:rows] for tensor in self.splits)),
            emitted=self.rings.setdefault(rows, torch.zeros_like(self.emitted[:, :rows]).contiguous()),
            parent=self.parent or self,
        )

    def reset(self, stop_ids: Sequence[int] = ()) -> None:
        """Makes every row ready for a new prompt. The cache need not be cleared: nothing reads what prefill and decode
        have not written.

        Args:
            stop_ids: token ids after which a row is done, at most MAX_STOP_IDS.

        Raises:
            ValueError: too many stop ids.
        """
        self.stop_ids.copy_(_padded(stop_ids))
        self.limit.fill_(self.max_seq_len)
        for tensor in (self.token, self.position, self.done, self.step, self.seed, self.inverse_temperature):
            tensor.zero_()
        self.mask.fill_(ALL_TOKENS)
        self.argmax_keys.fill_(NO_KEY)  # an interrupted request may have left keys

    def set_row(
        self, row: int, stop_ids: Sequence[int], limit: int, seed: int = 0, inverse_temperature: float = 0.0
    ) -> None:
        """Sets up a row for its request. The row stays done, so that no step advances it before prefill has filled it.

        Args:
            row: which.
            stop_ids: as in `reset`.
            limit: the position at which the row ends.
            seed: of its draws, 0 to 2^64 - 1.
            inverse_temperature: 1 / temperature; 0 to pick the greatest logit.
        """
        self.stop_ids[row].copy_(_padded(stop_ids))
        self.limit[row] = limit
        self.seed[row] = seed - (seed >> 63 << 64)  # the same 64 bits
        self.inverse_temperature[row] = inverse_temperature
        self.mask[row] = ALL_TOKENS
        self.position[row] = 0
        self.done[row] = True

    def with_logits(self, vocab: int) -> DecodeState:
        """A view of all rows whose steps also leave their logits, in a buffer of its own."""
        return dataclasses.replace(self, logits=self.x.new_zeros(self.batch, vocab))

    def move_row(self, source: int, target: int, tokens: int) -> None:
        """Copies a row with its first `tokens` cached positions over another one, and leaves it done."""
        self.copy_row(source, target, tokens)
        self.done[source] = True

    def copy_row(self, source: int, target: int, tokens: int) -> None:
        """Copies a row with its first `tokens` cached positions over another one."""
        own = (self.token, self.position, self.done, self.x, self.stop_ids, self.limit)
        for tensor in (*own, self.seed, self.inverse_temperature, self.mask):
            tensor[target] = tensor[source]
        for buffer in (*self.cache.keys, *self.cache.values):
            used = min(tokens, buffer.shape[2])
            buffer[target, :, :used] = buffer[source, :, :used]


def _padded(stop_ids: Sequence[int]) -> torch.Tensor:
    """Stop ids as a row of the state holds them, [MAX_STOP_IDS] int64."""
    if len(stop_ids) > MAX_STOP_IDS:
        raise InvalidArgument(f"stop_ids: expected at most {MAX_STOP_IDS} ids, got {len(stop_ids)}")
    return torch.tensor([*stop_ids, *[-1] * (MAX_STOP_IDS - len(stop_ids))], dtype=torch.int64, device="cpu")


def _leading(buffer: torch.Tensor, *shape: int) -> torch.Tensor:
    """The first elements of a contiguous buffer, as a tensor of this shape: the buffer itself where it has that."""
    return buffer if buffer.shape == shape else buffer.view(-1)[: math.prod(shape)].view(shape)


@torch.inference_mode(False)  # whatever the caller's: requests from other modes change it too
def new_state(model: Model, batch: int, *, stop_ids: Sequence[int] = (), with_logits: bool = False) -> DecodeState:
    """Allocates the state of a decode loop.

    Args:
        model: the model that will run on it.
        batch: rows, 1 to the model's max_batch.
        stop_ids: token ids after which a row is done.
        with_logits: whether each step leaves its logits in `state.logits`.

    Raises:
        ValueError: batch or the number of stop ids is out of range.
    """
    config, limits, embedding = model.config, model.runtime, model.weights.embedding
    if not 1 <= batch <= limits.max_batch:
        raise InvalidArgument(f"batch: expected 1 to {limits.max_batch} (the model's max_batch), got {batch}")
    device, dtype = embedding.device, model.weights.final_norm.dtype
    runs_triton = device.type != "cpu" or INTERPRETING
    heads = max(layer.heads for layer in config.layers)
    head_dim = max(layer.head_dim for layer in config.layers)

    def activation(width: int) -> torch.Tensor:
        return torch.zeros(batch, width, dtype=dtype, device=device)

    def integers(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    state = DecodeState(
        token=integers(batch),
        position=torch.zeros(batch, dtype=torch.int32, device=device),
        done=torch.zeros(batch, dtype=torch.bool, device=device),
        stop_ids=integers(batch, MAX_STOP_IDS),
        limit=torch.zeros(batch, dtype=torch.int32, device=device),
        seed=integers(batch),
        inverse_temperature=torch.zeros(batch, dtype=torch.float32, device=device),
        mask=new_token_mask(batch, config.vocab, device),
        x=activation(config.hidden),
        x_alt=activation(config.hidden),
        qkv=activation(max(sum(layer.qkv_widths) for layer in config.layers)),
        attended=activation(max(layer.heads * layer.head_dim for layer in config.layers)),
        splits=AttentionSplits.allocate(batch, older_splits(config, limits), heads, head_dim, device)
        if runs_triton
        else None,
        branch=activation(config.hidden),
        mlp=activation(config.intermediate),
        argmax_keys=new_argmax_keys(batch, device),
        normed=activation(config.hidden) if runs_triton else None,
        cache=KVCache.allocate(config, batch, limits.max_seq_len, dtype, device),
        emitted=integers(EMITTED_RING, batch),
        step=integers(batch),
        logits=activation(config.vocab) if with_logits else None,
        embed_scale=torch.tensor(config.hidden**0.5, dtype=dtype, device="cpu").item(),
        pad=config.pad_token_id,
        chunk=integers(3 + min(limits.prefill_chunk, limits.max_seq_len)),
        max_seq_len=limits.max_seq_len,
    )
    state.reset(stop_ids)
    return state
