"""A tensor between two guards, which show what was written beside it."""

from __future__ import annotations

import torch

from runtime.check.comparison import require

GUARD_BYTES = 4096  # on each side; more than a tile's width, and a multiple of any alignment that a kernel asks for
PATTERN = 0xA5


class Guarded:
    """A contiguous copy of a tensor, in the middle of a larger buffer on the same device.

    Args:
        value: the tensor; it stays as it is.
    """

    def __init__(self, value: torch.Tensor) -> None:
        size = value.numel() * value.element_size()
        self._buffer = torch.full((2 * GUARD_BYTES + size,), PATTERN, dtype=torch.uint8, device=value.device)
        self._end = GUARD_BYTES + size
        self.tensor = self._buffer[GUARD_BYTES : self._end].view(value.dtype).view(value.shape)
        self.tensor.copy_(value)

    def assert_intact(self, name: str) -> None:
        """Asserts that nothing was written beside the tensor; `name` is what the message calls it."""
        for where, guard in (("before", self._buffer[:GUARD_BYTES]), ("after", self._buffer[self._end :])):
            changed = int((guard != PATTERN).sum())
            require(changed == 0, f"{changed} bytes were written {where} {name}")
