"""Writes a decoder as a GGUF file in Q8_0 or Q4_0, with its embedding and head in Q8_0, one matrix at a time."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.checkpoint.containers.packed_tensor import PackedTensor
from runtime.checkpoint.gguf.file import GgufFile
from runtime.checkpoint.gguf.in_place import InPlaceTensor
from runtime.checkpoint.gguf.names import file_name
from runtime.checkpoint.progress import progress_bar
from runtime.checkpoint.quantizing import q4_0_of
from runtime.checkpoint.stored_tensor import StoredTensor
from runtime.errors import CheckpointError, GemmaRuntimeError, OutputError
from runtime.kernels.cpu.block_formats import FORMATS
from runtime.model.config import ModelConfig
from runtime.model.config_fields import shown
from runtime.model.weights import EMBEDDING, HEAD, stored_shapes

_LARGEST = 65504 * 127  # the largest weight in Q8_0: 127 times fp16's largest
_FILE_TYPES = {"q8_0": 7, "q4_0": 2}  # llama.cpp's numbers for the type of most of a file
_QUANTIZATION_VERSION = 2  # of ggml's layouts
_MOST = float(np.finfo(np.float32).max)
# GGUF's types of integers in the order in which llama.cpp's converter prefers them: for a number, and for those in a
# list.
_SCALARS = {
    "UINT32": range(2**32),
    "INT32": range(-(2**31), 2**31),
    "INT64": range(-(2**63), 2**63),
    "UINT64": range(2**64),
}
_ITEMS = {name: _SCALARS[name] for name in ("INT32", "UINT32", "INT64", "UINT64")}
# Keys of another file that are not copied into the written one, and prefixes of more such keys.
_NOT_COPIED = {"general.architecture", "general.alignment"}
_NOT_COPIED_PREFIXES = ("split.", "quantize.")
Source = StoredTensor | PackedTensor | InPlaceTensor


def check_new(out: Path) -> None:
    """Refuse an output file that exists, or whose folder does not.

    Raises:
        OutputError: it exists, or its folder does not.
    """
    if os.path.lexists(out):  # a broken link too
        raise OutputError(f"{out} exists: name another file, or remove it")
    if not os.path.isdir(out.absolute().parent):
        raise OutputError(f"cannot write {out}: no folder {out.absolute().parent}")


def copied_metadata(file: GgufFile) -> dict[str, Any]:
    """The metadata of another GGUF file of this model that the written one keeps."""
    vision = tuple(f"{file.metadata['general.architecture']}.{name}." for name in ("vision", "mm"))
    return {
        key: value
        for key, value in file.metadata.items()
        if key not in _NOT_COPIED and not key.startswith((*_NOT_COPIED_PREFIXES, *vision))
    }


def write_quantized(
    out: Path,
    to: str,
    stored: Mapping[str, Source],
    config: ModelConfig,
    metadata: Mapping[str, Any],
    progress: bool | None = None,
) -> None:
    """Write a file, whole or not at all.

    Args:
        out: the file, which must not exist.
        to: "q8_0" or "q4_0".
        stored: the decoder's tensors by Hugging Face's names, from `find_stored`.
        config: its architecture.
        metadata: all keys but those that say how it is quantised.
        progress: whether to draw a progress bar; None draws it on a terminal only.

    Raises:
        CheckpointError: a value is not finite or does not fit; a width is not a multiple of 32; the model has a head of
            its own, and llama.cpp reads none for its family; a file cannot be read.
        OutputError: the file exists or cannot be written.
    """
    if not config.tied and config.family != "gemma3":
        raise CheckpointError(f"llama.cpp reads the embedding as {config.family}'s head, this model has one of its own")
    kinds = {name: _kind(name, shape, to) for name, shape in stored_shapes(config).items()}
    check_new(out)
    needed = sum(_bytes(kind, stored_shapes(config)[name]) for name, kind in kinds.items())
    if (free := shutil.disk_usage(out.absolute().parent).free) < 1.05 * needed:
        raise OutputError(f"cannot write {out}: {needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free")
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")  # its own: others may write the same file
    total = sum(stored[name].bytes for name in kinds)
    try:
        with progress_bar(f"writing {out.name}", total, progress) as bar:
            _write(partial, to, {name: stored[name] for name in kinds}, kinds, config, metadata, bar.update)
        check_new(out)
        partial.rename(out)
    except GemmaRuntimeError:
        raise
    except UnicodeEncodeError as error:
        raise CheckpointError(f"a GGUF file's texts are Unicode, got {shown(error.object)}") from error
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _kind(name: str, shape: tuple[int, ...], to: str) -> str:
    """The type of a tensor in the file."""
    if len(shape) == 1:
        return "F32"
    if shape[1] % FORMATS["Q8_0"].stored_columns:
        raise CheckpointError(f"tensor {name} has rows of {shape[1]} weights, Q8_0 and Q4_0 need a multiple of 32")
    return "Q8_0" if name in (EMBEDDING, HEAD) else to.upper()


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    return math.prod(_stored_shape(kind, shape)) * (4 if kind == "F32" else 1)


def _stored_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file: in bytes of blocks, or in numbers."""
    if kind == "F32":
        return shape
    return (shape[0], shape[1] // FORMATS[kind].stored_columns * FORMATS[kind].stored_bytes)


def _write(
    path: Path,
    to: str,
    stored: Mapping[str, Source],
    kinds: Mapping[str, str],
    config: ModelConfig,
    metadata: Mapping[str, Any],
    progress: Callable[[int], None],
) -> None:
    import gguf

    writer, shapes = gguf.GGUFWriter(path, config.family), stored_shapes(config)
    keys = {"general.file_type": _FILE_TYPES[to], "general.quantization_version": _QUANTIZATION_VERSION}
    for key, value in {**metadata, **keys}.items():
        _add(writer, key, value)
    for name, kind in kinds.items():
        shape = _stored_shape(kind, shapes[name])
        dtype = np.dtype(np.float32 if kind == "F32" else np.uint8)
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(file_name(name, config.family), shape, dtype, _bytes(kind, shapes[name]), number)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, kind in kinds.items():
            writer.write_tensor_data(_data(stored[name], kind, shapes[name]))
            progress(stored[name].bytes)
    finally:
        writer.close()
    with path.open("rb") as written:
        os.fsync(written.fileno())


def _add(writer: Any, key: str, value: Any) -> None:
    from gguf import GGUFValueType

    if not isinstance(value, list):
        writer.add_key_value(key, value, GGUFValueType[_type_of([value], _SCALARS)])
    elif value:  # the package cannot write an empty list
        writer.add_key_value(key, value, GGUFValueType.ARRAY, GGUFValueType[_type_of(value, _ITEMS)])


def _type_of(values: list[Any], integers: Mapping[str, range]) -> str:
    """GGUF's type for values of one kind: of integers the first that can hold them all, of floats fp32, as readers
    expect, if all are in its range."""
    kind = type(values[0])
    if kind is int:
        return next(name for name, numbers in integers.items() if min(values) in numbers and max(values) in numbers)
    if kind is float:
        return "FLOAT32" if all(abs(value) <= _MOST or not math.isfinite(value) for value in values) else "FLOAT64"
    return {str: "STRING", bool: "BOOL"}[kind]


def _data(tensor: Source, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor's data as it is written. Blocks that already have the type stay as they are."""
    if isinstance(tensor, InPlaceTensor) and tensor.dtype == kind and tensor.blocks:
        return np.concatenate(list(tensor.blocks.rows()))
    data = np.empty(_stored_shape(kind, shape), np.float32 if kind == "F32" else np.uint8)
    start = 0
    for rows in _rows(tensor):
        if not all(math.isfinite(extreme) for extreme in torch.aminmax(rows)):
            raise CheckpointError(f"tensor {tensor.name} holds a value that is not finite: {tensor.file}")
        if kind == "F32":
            data[:] = rows.view(-1).numpy()
            break
        data[start : start + len(rows)] = _blocks(rows, kind, tensor)
        start += len(rows)
    return data


def _rows(tensor: Source) -> Iterator[torch.Tensor]:
    """Its values in fp32, as a GGUF file has them: for a norm its factor, 1 + weight."""
    if isinstance(tensor, InPlaceTensor):
        yield from map(torch.from_numpy, tensor.source.rows(tensor.name))
    else:
        for rows in tensor.rows():
            yield rows + 1 if rows.dim() == 1 else rows


def _blocks(rows: torch.Tensor, kind: str, tensor: Source) -> np.ndarray:
    import gguf

    if kind == "Q4_0":
        try:
            return q4_0_of(rows).numpy()
        except OverflowError as error:
            raise CheckpointError(f"tensor {tensor.name} does not fit Q4_0: {error}: {tensor.file}") from error
    if rows.abs().max() > _LARGEST:
        raise CheckpointError(f"tensor {tensor.name} does not fit Q8_0: a weight is beyond {_LARGEST}: {tensor.file}")
    with np.errstate(all="ignore"):  # of weights so small that their scale is 0 in fp16
        blocks: np.ndarray = gguf.quantize(rows.numpy(), gguf.GGMLQuantizationType.Q8_0)
    return blocks
