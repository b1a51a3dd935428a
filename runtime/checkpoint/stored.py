"""What a checkpoint's tensors can do, whatever they are stored in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from runtime.kernels.cpu.block_formats import Format


class StoredBlocks(Protocol):
    """The blocks of a matrix, which can be read as they are."""

    @property
    def form(self) -> Format: ...
    def copy_into(self, destination: torch.Tensor, progress: Callable[[int], None] | None = None) -> None: ...


class Readable(Protocol):
    """A tensor that can be read. `blocks` is None where it can be read as values only."""

    @property
    def blocks(self) -> StoredBlocks | None: ...
    def copy_into(self, destination: torch.Tensor, progress: Callable[[int], None] | None = None) -> None: ...


class Stored(Readable, Protocol):
    """A tensor of a checkpoint: `StoredTensor` in a safetensors file, `PackedTensor` in several of a container,
    `InPlaceTensor` in a GGUF file, `Parameter` of a model in memory."""

    @property
    def name(self) -> str: ...
    def check(self, shape: tuple[int, ...]) -> None: ...
    def equals(self, other: Any, dtype: torch.dtype) -> bool: ...


class InFile(Protocol):
    """A tensor in one or several files, whose values can be read some rows at a time."""

    @property
    def name(self) -> str: ...
    @property
    def file(self) -> Path: ...
    @property
    def files(self) -> tuple[Path, ...]: ...  # all that it is in
    @property
    def bytes(self) -> int: ...
    def rows(self) -> Iterator[torch.Tensor]: ...
