"""Finds a decoder's tensors in a checkpoint and packs them for the kernels."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from runtime.checkpoint.packing import forms_of, layout, packed_tensors, runs_of
from runtime.checkpoint.scaled import is_scaled, read_scaled
from runtime.checkpoint.stored import Readable, Stored, StoredBlocks
from runtime.errors import CheckpointError
from runtime.kernels.cpu.block_formats import Part
from runtime.kernels.quantized import QuantizedMatrix
from runtime.model.config import ModelConfig
from runtime.model.huge_pages import Slab
from runtime.model.weights import EMBEDDING, FINAL_NORM, HEAD, LayerWeights, ModelWeights, Shapes, stored_shapes

# Prefixes of the decoder's names: none (a bare decoder), "model." (a causal LM), "model.model." (Hugging Face reads it
# too), and "language_model." anywhere (multimodal models, depending on the transformers version).
_PREFIX = re.compile(r"(?:model\.|language_model\.)*")
_VISION = ("vision_tower.", "multi_modal_projector.")
# Buffers that some versions of transformers stored and none reads: they follow from the config.
_BUFFERS = re.compile(r"(?:.*\.)?(?:embed_scale|position_ids|\w*inv_freq|(?:cos|sin)_cached)")
READERS = 2  # threads; reading and rearranging release the GIL, what is between them does not

AnyStored = TypeVar("AnyStored", bound=Stored)


class Tensors(Protocol[AnyStored]):
    """Tensors by name, and where they are, for messages."""

    folder: Path
    tensors: dict[str, AnyStored]


def find_stored(checkpoint: Tensors[AnyStored], config: ModelConfig) -> dict[str, AnyStored]:
    """Find a decoder's tensors in a checkpoint and check names, shapes and dtypes, reading headers only.

    Returns:
        Every tensor by its name in a causal LM, the head included where it is stored. Where the head is tied and only
        it is stored, it is the embedding table too.

    Raises:
        CheckpointError: a tensor is missing, surplus, misshapen, duplicate or of an unsupported dtype; it is named.
            The vision tower of a multimodal checkpoint and buffers that follow from the config are ignored.
    """
    by_name: dict[str, AnyStored] = {}
    multimodal = False
    for name, tensor in checkpoint.tensors.items():
        prefix = _PREFIX.match(name)[0]  # type: ignore[index]
        multimodal |= "language_model." in prefix
        bare = name.removeprefix(prefix)
        name = bare if bare == HEAD or bare.startswith(_VISION) else f"model.{bare}"
        if name in by_name:
            raise CheckpointError(f"{by_name[name].name} and {tensor.name} are the same tensor: {checkpoint.folder}")
        by_name[name] = tensor
    if config.tied and HEAD in by_name and EMBEDDING not in by_name:
        by_name[EMBEDDING] = by_name[HEAD]

    stored_layers = len({name.split(".")[2] for name in by_name if name.startswith("model.layers.")})
    if len(config.layers) > stored_layers:  # checked before that many layers' names are listed
        raise CheckpointError(
            f"the config has {len(config.layers)} layers (num_hidden_layers), but the checkpoint has {stored_layers}: "
            f"{checkpoint.folder}"
        )
    expected = stored_shapes(config)
    missing = [name for name in expected if name not in by_name]
    surplus = [
        tensor.name
        for name, tensor in by_name.items()
        if name not in expected
        and name != HEAD
        and not _BUFFERS.fullmatch(name)
        and not (multimodal and name.startswith(_VISION))
    ]
    for names, what in ((missing, "missing"), (surplus, "not part of this model")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            more += " (tie_word_embeddings is false)" if names[0] == HEAD else ""
            raise CheckpointError(f"tensor {names[0]}{more} is {what}: {checkpoint.folder}")
    if HEAD in by_name:
        expected[HEAD] = expected[EMBEDDING]
    for name, shape in expected.items():
        by_name[name].check(shape)
    return {name: by_name[name] for name in expected}


def is_tied(stored: Mapping[str, Stored], dtype: torch.dtype) -> bool:
    """Whether the head is the embedding table. The stored tensors decide, as in Hugging Face: a head with other values
    is used even where the config says that it is tied.

    Args:
        stored: from `find_stored`.
        dtype: of the model; values are compared after conversion to it.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if HEAD not in stored or stored[HEAD] is stored[EMBEDDING]:
        return True
    return stored[HEAD].equals(stored[EMBEDDING], dtype)


def weights_slab(stored: Mapping[str, Readable], config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Slab:
    """Memory for the weights that `read_weights` reads with the same arguments."""
    return Slab([run.memory(dtype) for run in layout(forms_of(stored), config)], torch.uint8, device)


def read_weights(
    stored: Mapping[str, Readable],
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int], None] | None = None,
    slab: Slab | None = None,
) -> ModelWeights:
    """Read, convert and pack a checkpoint's weights.

    Args:
        stored: the tensors, from `find_stored` or quantised.
        config: the architecture; `tied` must agree with `is_tied(stored)`.
        device, dtype: of the weights.
        progress: called with the number of stored bytes after each slice.
        slab: from `weights_slab`, unused; None allocates one.

    Returns:
        The packed weights, in one allocation. A matrix is in blocks, or on a GPU integers with scales, if all that it
            is packed from can be read in blocks.

    Raises:
        CheckpointError: a value is not finite, or a file cannot be read.
    """
    tables, layers = packed_tensors(config)
    forms = forms_of(stored)
    room = weights_slab(stored, config, device, dtype) if slab is None else slab
    copies: list[tuple[Readable | StoredBlocks, torch.Tensor]] = []

    def read(tensors: Shapes) -> Any:  # a Matrix; of a norm, a tensor
        parts = []
        if is_scaled(device) and all(forms[name] for name in tensors):
            (run,) = runs_of(forms, tensors)
            return read_scaled(room.take(run.memory(dtype)), run, stored, progress)
        for run in runs_of(forms, tensors):
            memory = room.take(run.memory(dtype))
            packed = memory.view(dtype) if run.form is None else memory
            for name, rows in zip(run.shapes, packed.split([shape[0] for shape in run.shapes.values()]), strict=True):
                source = stored[name] if run.form is None else stored[name].blocks
                assert source is not None, "a run's format is that of its blocks"
                copies.append((source, rows))
            if run.form is None:
                return packed
            parts.append(Part(run.form, memory))
        return QuantizedMatrix(parts)

    embedding = read(tables[EMBEDDING])
    read_layers = tuple(LayerWeights(**{field: read(tensors) for field, tensors in layer.items()}) for layer in layers)
    final_norm = read(tables[FINAL_NORM])
    head = embedding if config.tied else read(tables[HEAD])
    _copy(copies, device, progress)
    return ModelWeights(embedding, read_layers, final_norm, head)


def _copy(
    copies: Sequence[tuple[Readable | StoredBlocks, torch.Tensor]],
    device: torch.device,
    progress: Callable[[int], None] | None,
) -> None:
    """Reads tensors into memory. On a CPU, whose copies wait for nothing else, on several threads, or on this one if
    the system refuses more; the error raised is that of the first tensor that has one."""
    if device.type != "cpu":
        for source, rows in copies:
            source.copy_into(rows, progress)
        return
    lock, is_inference = threading.Lock(), torch.is_inference_mode_enabled()  # inference mode is set per thread
    done: set[int] = set()

    def report(count: int) -> None:
        with lock:
            if progress is not None:
                progress(count)

    def copy(number: int) -> None:
        source, rows = copies[number]
        with torch.inference_mode(is_inference), torch.no_grad():
            source.copy_into(rows, report)
        done.add(number)

    with ThreadPoolExecutor(READERS) as pool:
        results: Iterator[None]
        try:
            results = pool.map(copy, range(len(copies)))
        except RuntimeError:  # a thread could not be started
            pool.shutdown(cancel_futures=True)
            results = map(copy, [number for number in range(len(copies)) if number not in done])
        for _ in results:
            pass
