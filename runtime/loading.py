"""From a name to a model: every cheap check first, then the tokenizer, then the weights."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from runtime.checkpoint import hub, sources
from runtime.checkpoint.containers.config import scheme_of
from runtime.checkpoint.containers.folder import FolderCheckpoint, FolderTensors
from runtime.checkpoint.containers.packed_tensor import PackedTensor
from runtime.checkpoint.files import is_file, read_json
from runtime.checkpoint.folder_contents import describe
from runtime.checkpoint.gguf.in_place import InPlaceTensor
from runtime.checkpoint.packing import Forms, forms_of, matrices_as_values, weight_bytes
from runtime.checkpoint.progress import progress_bar
from runtime.checkpoint.quantized import QuantizedTensor, quantized, quantized_forms
from runtime.checkpoint.scaled import check_scaled, is_scaled
from runtime.checkpoint.stored_tensor import StoredTensor
from runtime.checkpoint.weights import find_stored, is_tied, read_weights, weights_slab
from runtime.errors import InvalidArgument, ModelNotFound
from runtime.kernels.cpu.block_formats import COLUMNS
from runtime.kernels.cpu.calls import missing, multiply_many_rows
from runtime.kernels.launch import INTERPRETING
from runtime.model import memory_plan
from runtime.model.config import (
    CONTAINERS,
    DEFAULT_SEQ_LEN,
    QUANTIZED_TO,
    ModelConfig,
    RuntimeConfig,
    default_prefill_chunk,
)
from runtime.model.model import Model
from runtime.model.placement import Device, Dtype, resolve_device, resolve_dtype
from runtime.model.rope import RopeTables
from runtime.model.threads import let_children_compute, resolve_threads
from runtime.model.weights import EMBEDDING, HEAD, stored_shapes
from runtime.text.tokenizer import Tokenizer

AnyModel = TypeVar("AnyModel", bound=Model)

_log = logging.getLogger("gemma_runtime")


@dataclass(frozen=True)
class ResolvedModel:
    """What is known of a model before its weights are read."""

    name: str
    source: sources.LocalFolder | hub.Snapshot
    # Headers only where a hub repository's weights are missing.
    stored: FolderTensors | dict[str, InPlaceTensor] = field(repr=False)
    config: ModelConfig
    runtime: RuntimeConfig
    plan: memory_plan.MemoryPlan

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, read on first use; its `has_chat_template` says whether the model can chat.

        Raises:
            CheckpointError: as `Tokenizer.from_folder`.
        """
        return Tokenizer.from_folder(self.source.folder, self.config.vocab)


def resolve(
    source: str | os.PathLike[str] | None = None,
    *,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_seq_len: int | None = None,
    max_batch: int | str = 1,
    threads: int | str | None = None,
    quantize: str | None = None,
    needs_values: bool = False,
    progress: bool | None = None,
    **limits: Any,
) -> ResolvedModel:
    """Do all of loading that needs no weights: find the checkpoint, check it, plan its memory.

    Args:
        source, device, dtype, max_seq_len, max_batch, threads, quantize, progress: as `runtime.load`.
        needs_values: whether a container's integers, or a GGUF file's blocks, must become values.
        limits: the other fields of RuntimeConfig: prefix_cache_tokens, steps_per_graph, eager.

    Raises:
        as `runtime.load`; whether the plan fits is not checked.
    """
    if source is None:
        source = sources.default_source()
    dtype = resolve_dtype(dtype)
    if dtype == "auto" and quantize is not None:
        dtype = "float32"
    if quantize in ("gguf", *CONTAINERS) and INTERPRETING:
        raise InvalidArgument(
            f"quantize must be None or one of {QUANTIZED_TO} under TRITON_INTERPRET=1, got {quantize!r}, whose blocks "
            "no Triton kernel reads"
        )
    # Validates the caller's numbers before anything is downloaded; the dtype may still depend on the checkpoint.
    limits["quantize"] = quantize
    asked = requested(device, "bfloat16" if dtype == "auto" else dtype, max_seq_len, max_batch, threads, **limits)

    location: sources.LocalFolder | hub.Snapshot | None = None
    if dtype == "auto" and not needs_values and (location := _in_own_blocks(source, asked, progress)):
        dtype, quantize = "float32", "gguf"
        asked = _in_blocks(asked, quantize)
    location = location or sources.locate(source, progress, quantize)
    config = read_config(location.folder)
    check_max_seq_len(config, max_seq_len)
    container = container_of(location.folder)
    if quantize in CONTAINERS and quantize != container:
        raise InvalidArgument(f"quantize={quantize!r} takes a folder that is quantised so, got {source}")
    keeps_integers = container is not None and quantize is None and not needs_values and not INTERPRETING
    if keeps_integers and dtype in ("auto", "float32") and asked.device == "cpu":
        dtype, quantize = "float32", container
        asked = _in_blocks(asked, quantize)
    stored: FolderTensors | dict[str, InPlaceTensor]
    with location.headers() as folder:
        if isinstance(location, sources.InPlaceFile):
            stored = find_stored(location.checkpoint, config)
        else:
            stored = find_stored(FolderCheckpoint(folder, in_blocks=quantize in CONTAINERS), config)
        if dtype == "auto":
            dtype = config.stored_dtype or resolve_dtype(stored[EMBEDDING].dtype)
        # Without values there is nothing to compare: until they are downloaded, a stored head counts as untied.
        tied = is_tied(stored, _read_as(dtype, quantize)) if folder == location.folder else HEAD not in stored
    config = replace(config, tied=tied)
    forms = _forms(stored, config, quantize)
    if is_scaled(torch.device(asked.device)):
        check_scaled(forms, config)
    sizes = weight_bytes(forms, config, getattr(torch, dtype))
    runtime = fitted(replace(asked, dtype=dtype), config, max_seq_len, max_batch, sizes)
    plan = memory_plan.plan(config, runtime, sizes)
    if quantize is not None and (valued := matrices_as_values(forms, config)):
        types = sorted({stored[name].dtype for name in valued if forms[name] is None})
        why = f"stored as or packed with {', '.join(types)}"
        if quantize in QUANTIZED_TO:
            why = f"their columns are not a multiple of {COLUMNS}"
        _log.info("%s: %d matrices are kept as values: %s", source, len(valued), why)
    _log.info("%s: %s in %s on %s, %s", source, config.family, dtype, runtime.device, plan)
    return ResolvedModel(str(source), location, stored, config, runtime, plan)


def _in_blocks(asked: RuntimeConfig, quantize: str | None) -> RuntimeConfig:
    """The requested config, for matrices on a CPU that turn out to be in blocks."""
    chunk = default_prefill_chunk(asked.device, asked.eager, short=multiply_many_rows())
    return replace(asked, dtype="float32", quantize=quantize, prefill_chunk=chunk)


def _in_own_blocks(
    source: str | os.PathLike[str], asked: RuntimeConfig, progress: bool | None
) -> sources.InPlaceFile | None:
    """The file of a source, if it is a GGUF file whose own blocks compiled kernels can read and take less memory than
    its values in bf16."""
    if asked.device != "cpu" or asked.eager or missing(torch.float32) or not sources.is_gguf_file(source):
        return None
    location = sources.locate(source, progress, "gguf")
    assert isinstance(location, sources.InPlaceFile)
    config = read_config(location.folder)
    stored = find_stored(location.checkpoint, config)
    in_blocks = weight_bytes(forms_of(stored), config, torch.float32)
    in_values = weight_bytes(dict.fromkeys(stored), config, torch.bfloat16)
    return location if sum(in_blocks.values()) < sum(in_values.values()) else None


def requested(
    device: Device, dtype: str, max_seq_len: int | None, max_batch: int | str, threads: int | str | None, **limits: Any
) -> RuntimeConfig:
    """A caller's choices, checked before anything is known of the model: max_seq_len None and max_batch "auto" get
    placeholders, which `fitted` replaces.

    Args, Raises:
        as `resolve`; the dtype is no longer "auto".
    """
    resolved_device = resolve_device(device)
    short = limits.get("quantize") is not None and multiply_many_rows()
    return RuntimeConfig(
        resolved_device,
        dtype,
        DEFAULT_SEQ_LEN if max_seq_len is None else max_seq_len,
        1 if max_batch == "auto" else max_batch,  # type: ignore[arg-type]  # which it checks
        threads=resolve_threads(threads),
        **{"prefill_chunk": default_prefill_chunk(resolved_device, limits.get("eager") is True, short), **limits},
    )


def check_max_seq_len(config: ModelConfig, max_seq_len: int | None) -> None:
    """Refuse a length that the model's positions do not reach.

    Raises:
        ValueError: it is greater than max_position_embeddings.
    """
    longest = config.max_position_embeddings
    if max_seq_len is not None and max_seq_len > longest:
        raise InvalidArgument(
            f"max_seq_len must be at most the checkpoint's max_position_embeddings ({longest}), got {max_seq_len}"
        )


def fitted(
    requested: RuntimeConfig,
    config: ModelConfig,
    max_seq_len: int | None,
    max_batch: int | str,
    weight_bytes: Mapping[str, int] = {},
) -> RuntimeConfig:
    """The choices for one model: its own limit where no length was given, and as many rows as fit where that was asked
    for."""
    if max_seq_len is None:
        requested = replace(requested, max_seq_len=min(DEFAULT_SEQ_LEN, config.max_position_embeddings))
    if max_batch == "auto":
        return replace(requested, max_batch=memory_plan.rows_that_fit(config, requested, weight_bytes))
    return requested


def read(resolved: ResolvedModel, kind: type[AnyModel], progress: bool | None = None) -> AnyModel:
    """Read a resolved model's tokenizer and weights, downloading the weights where they are missing.

    Args:
        resolved: from `resolve`.
        kind: what to make: Model or a subclass.
        progress: as `runtime.load`.

    Raises:
        as `runtime.load`.
    """
    started = time.perf_counter()
    let_children_compute()
    stored, config, plan = resolved.stored, resolved.config, resolved.plan
    device, dtype = torch.device(resolved.runtime.device), getattr(torch, resolved.runtime.dtype)
    memory_plan.check_fits(plan, device)
    quantize = resolved.runtime.quantize
    is_in_place = isinstance(resolved.source, sources.InPlaceFile)
    is_here = is_in_place or stored[EMBEDDING].file.parent == resolved.source.folder
    slab = weights_slab(stored, config, device, dtype) if is_here and quantize not in QUANTIZED_TO else None
    with slab.cleared_meanwhile() if slab is not None else nullcontext():
        tokenizer = resolved.tokenizer
    if not is_here:  # headers only: download them now
        folder = resolved.source.fetch(progress)
        stored = find_stored(FolderCheckpoint(folder, in_blocks=quantize in CONTAINERS), config)
        config = replace(config, tied=is_tied(stored, _read_as(resolved.runtime.dtype, quantize)))
        sizes = weight_bytes(_forms(stored, config, quantize), config, dtype)
        plan = memory_plan.plan(config, resolved.runtime, sizes)
    readable: Mapping[str, StoredTensor | PackedTensor | InPlaceTensor | QuantizedTensor] = stored
    if quantize in QUANTIZED_TO:
        readable = quantized(stored, config, quantize, progress)
    total = sum(readable[name].bytes for name in stored_shapes(config))
    with progress_bar("loading weights", total, progress) as bar:
        if not bar.disable:
            bar.write(f"{resolved.name}: {plan}", file=sys.stderr)
        weights = read_weights(readable, config, device, dtype, bar.update, slab)
    _return_freed_memory()
    rope = RopeTables(config, resolved.runtime)
    _log.info("%s: loaded in %.1f s", resolved.name, time.perf_counter() - started)
    return kind(config, resolved.runtime, weights, rope, tokenizer, resolved.name, plan)


def _return_freed_memory() -> None:
    """Returns freed memory to the system where the C library (glibc) would keep it: 37 MB after reading the demo."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _read_as(dtype: str, quantize: str | None) -> torch.dtype:
    """The dtype that matrices are read in: fp32 if they are quantised, whatever the activations' dtype."""
    return torch.float32 if quantize else getattr(torch, dtype)


def _forms(
    stored: Mapping[str, StoredTensor | PackedTensor | InPlaceTensor], config: ModelConfig, quantize: str | None
) -> Forms:
    """The format of the blocks that each tensor is kept in."""
    return quantized_forms(config, quantize) if quantize in QUANTIZED_TO else forms_of(stored)


def container_of(folder: Path) -> str | None:
    """One of CONTAINERS where a checkpoint folder has its matrices as integers with scales.

    Raises:
        CheckpointError: as `scheme_of`.
    """
    scheme = scheme_of(read_json(folder / "config.json"))
    return scheme.container if scheme else None


def read_config(folder: Path) -> ModelConfig:
    """Read the architecture of a checkpoint folder.

    Raises:
        FileNotFoundError: the folder has no config.json.
        CheckpointError: as `ModelConfig.from_hf` and `scheme_of`.
    """
    if not is_file(folder / "config.json"):
        raise ModelNotFound(f"no config.json in {folder}: {describe(folder)}")
    generation = folder / "generation_config.json"
    config = read_json(folder / "config.json")
    if scheme_of(config):  # a scheme that can be read; it changes nothing else
        del config["quantization_config"]
    return ModelConfig.from_hf(config, read_json(generation) if is_file(generation) else None)
