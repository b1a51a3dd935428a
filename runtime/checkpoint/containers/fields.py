"""The fields of a quantization_config: those that are read, those that must have some value, and those that change
nothing. Any other is refused by name, since it may say how weights are to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.checkpoint.containers.scheme import GROUP
from runtime.model.config_fields import is_integer, refuse, shown


@dataclass(frozen=True)
class Known:
    """The fields of an object.

    Args:
        read: fields that somebody reads.
        fixed: the values that a field may have.
        free: fields that may have any value.
    """

    read: tuple[str, ...]
    fixed: Mapping[str, tuple[Any, ...]]
    free: tuple[str, ...]

    def check(self, where: str, given: Any) -> None:
        """Refuse an object with other fields, or with other values in those that are fixed.

        Args:
            where: its name, for messages.
            given: the object.

        Raises:
            CheckpointError: it has such a field, the first of which is named; or it is no object.
        """
        if not isinstance(given, Mapping):
            refuse(where, "an object", given)
        for name, value in given.items():
            if name in self.fixed:
                only(f"{where}.{name}", self.fixed[name], value)
            elif name not in self.read and name not in self.free:
                refuse(inside(where, name), "absent: it is not known here", value)


def inside(where: str, name: str) -> str:
    """How messages name a field of an object, whatever a file calls it."""
    return f"{where}.{shown(name)[1:-1]}"


def only(name: str, values: Sequence[Any], given: Any) -> Any:
    """A field's value, which must be one of a few.

    Raises:
        CheckpointError: it is another.
    """
    if not any(type(given) is type(value) and given == value for value in values):
        expected = " or ".join(dict.fromkeys(repr(value) for value in values))
        refuse(name, f"{expected} (nothing else is supported)", given)
    return given


def group_of(name: str, given: Any, or_row: bool = False) -> int | None:
    """Columns that share a scale; with `or_row` None for -1, which means all of a row.

    Raises:
        CheckpointError: not a multiple of GROUP.
    """
    if or_row and is_integer(given, -1, -1):
        return None
    if not is_integer(given) or given % GROUP:
        refuse(name, f"a multiple of {GROUP}" + (" or -1" if or_row else ""), given)
    return int(given)
