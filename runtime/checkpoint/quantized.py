"""A checkpoint's weights quantised to int8 or int4: written into the cache once, some rows at a time, and read from
there."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from runtime.checkpoint import safetensors_file
from runtime.checkpoint.cache import HASHES, cache_folder, cached
from runtime.checkpoint.containers.packed_tensor import PackedTensor
from runtime.checkpoint.content_hash import content_hash, signature
from runtime.checkpoint.packing import Forms
from runtime.checkpoint.progress import progress_bar
from runtime.checkpoint.quantizing import REVISION, blocks_of
from runtime.checkpoint.safetensors_folder import Checkpoint
from runtime.checkpoint.stored import InFile
from runtime.checkpoint.stored_tensor import StoredTensor
from runtime.errors import CheckpointError
from runtime.kernels.cpu.block_formats import COLUMNS, FORMATS, Format, int8_rows
from runtime.kernels.cpu.block_layout import kept
from runtime.model.config import ModelConfig
from runtime.model.weights import EMBEDDING, HEAD, Shapes, stored_shapes

FILE = "model.safetensors"

_log = logging.getLogger("gemma_runtime")


def quantized_forms(config: ModelConfig, to: str) -> Forms:
    """The format of every stored tensor once quantised: rows of int8 or, for "int4", Q4_0 except for embedding and
    head. Norms stay values, as do matrices of a width that kernels do not take."""

    def form(name: str, shape: tuple[int, ...]) -> Format | None:
        if len(shape) != 2 or shape[1] % COLUMNS:
            return None
        return int8_rows(shape[1]) if to == "int8" or name in (EMBEDDING, HEAD) else FORMATS["Q4_0"]

    return {name: form(name, shape) for name, shape in stored_shapes(config).items()}


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor of a quantised model: bytes of blocks, or values in fp32."""

    tensor: StoredTensor = field(repr=False)
    form: Format | None

    @property
    def blocks(self) -> QuantizedBlocks | None:
        return QuantizedBlocks(self.form, self.tensor) if self.form else None

    @property
    def bytes(self) -> int:
        return self.tensor.bytes

    def copy_into(self, destination: torch.Tensor, progress: Callable[[int], None] | None = None) -> None:
        """As `StoredTensor.copy_into`."""
        self.tensor.copy_into(destination, progress)


@dataclass(frozen=True)
class QuantizedBlocks:
    """A matrix in blocks."""

    form: Format
    tensor: StoredTensor = field(repr=False)

    def copy_into(self, destination: torch.Tensor, progress: Callable[[int], None] | None = None) -> None:
        """As `StoredTensor.copy_into`, for uint8 [rows, bytes of a row]."""
        self.tensor.copy_into(destination, progress)


def quantized(
    stored: Mapping[str, InFile], config: ModelConfig, to: str, progress: bool | None = None
) -> dict[str, QuantizedTensor]:
    """The quantised tensors of a model, from the cache or written now.

    Args:
        stored: the tensors, from `find_stored`.
        config: the architecture.
        to: "int8" or "int4".
        progress: whether to draw progress bars; None draws them on a terminal only.

    Returns:
        Every tensor of the model by its stored name.

    Raises:
        CheckpointError: a value is not finite, or does not fit the format; a file cannot be read, or changes while it
            is being read.
        CacheError: the cache cannot be written.
    """
    forms, shapes = quantized_forms(config, to), stored_shapes(config)
    files = sorted({file for name in shapes for file in stored[name].files})
    before = [signature(file) for file in files]
    hashes = [content_hash(file, cache_folder() / HASHES, progress) for file in files]

    def write(folder: Path) -> None:
        _log.info("quantising %s to %s into the cache", files[0].parent, to)
        _write(folder, {name: stored[name] for name in shapes}, forms, shapes, progress)
        if [signature(file) for file in files] != before:
            raise CheckpointError(f"{files[0].parent} changed while it was being quantised")

    # A container's files do not say how they are to be read: its config does.
    schemes = {repr(tensor.scheme) for tensor in stored.values() if isinstance(tensor, PackedTensor)}
    content = hashlib.sha256("".join((*hashes, *sorted(schemes))).encode()).hexdigest()
    written = Checkpoint(cached(f"{to}-{content[:32]}-r{REVISION}", write)).tensors
    expected = _layout(forms, shapes)
    if {name: (tensor.dtype, tensor.shape) for name, tensor in written.items()} != expected:
        raise CheckpointError(f"{FILE} in the cache has other tensors than the model's: {cache_folder()}")
    return {name: QuantizedTensor(written[name], forms[name]) for name in shapes}


def _layout(forms: Forms, shapes: Shapes) -> safetensors_file.Layout:
    """The dtype and shape that each tensor has in the file."""

    def stored_as(form: Format | None, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        return ("F32", shape) if form is None else ("U8", (shape[0], shape[1] // form.columns * form.bytes))

    return {name: stored_as(forms[name], shape) for name, shape in shapes.items()}


def _write(folder: Path, stored: Mapping[str, InFile], forms: Forms, shapes: Shapes, progress: bool | None) -> None:
    layout = _layout(forms, shapes)
    safetensors_file.check_disk(folder, safetensors_file.size(layout))
    with progress_bar("quantising weights", sum(tensor.bytes for tensor in stored.values()), progress) as bar:

        def rows() -> Iterator[torch.Tensor]:
            for name, tensor in stored.items():
                weights = math.prod(shapes[name])
                for values in tensor.rows():
                    yield _in_form(values, forms[name], tensor)
                    bar.update(tensor.bytes * values.numel() // weights)

        safetensors_file.write(folder / FILE, layout, rows())


def _in_form(values: torch.Tensor, form: Format | None, tensor: InFile) -> torch.Tensor:
    try:
        return values if form is None else torch.from_numpy(kept(blocks_of(values, form).numpy(), form))
    except OverflowError as error:
        raise CheckpointError(
            f"tensor {tensor.name} does not fit {form and form.name}: {error}: {tensor.file}"
        ) from error
