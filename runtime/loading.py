"""From a name to a model that is ready: every cheap check first, then the tokenizer, then the weights."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint import hub, sources
from runtime.checkpoint.folder_contents import describe
from runtime.checkpoint.safetensors_folder import Checkpoint, StoredTensor, is_file, read_json
from runtime.checkpoint.weights import find_stored, is_tied, read_weights
from runtime.errors import InvalidArgument, ModelNotFound
from runtime.model import memory_plan
from runtime.model.config import DEFAULT_SEQ_LEN, ModelConfig, RuntimeConfig
from runtime.model.model import Model
from runtime.model.progress import ProgressBar
from runtime.model.rope import RopeTables
from runtime.model.threads import let_children_compute, resolve_threads
from runtime.model.weights import EMBEDDING, HEAD, stored_shapes
from runtime.text.tokenizer import Tokenizer


def _load_again(name: str, asked: dict[str, Any]) -> Model:
    return load(name, progress=False, **asked)


def load(
    source: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_seq_len: int | None = None,
    max_batch: int = 1,
    steps_per_graph: int = 1,
    eager: bool = False,
    threads: int | str | None = None,
    progress: bool | None = None,
    revision: str | None = None,
) -> Model:
    """Load a Gemma 1, 2 or 3 checkpoint.

    Args:
        source: a folder in Hugging Face's layout, a hub id (also as "owner/name@revision"), a `.gguf` file, or "demo".
            None means $GEMMA_RUNTIME_MODEL, or "demo" where that is not set.
        device: "cpu", "cuda", "cuda:N", or "auto" (CUDA where there is one).
        dtype: "float32", "bfloat16", "float16", or "auto" (the checkpoint's own).
        max_seq_len: longest prompt plus answer, in tokens, that buffers are made for; None means 4096, or the
            checkpoint's own limit where that is less.
        max_batch: most sequences that decode together, 1 to 8.
        steps_per_graph: decode steps in one launch of a CUDA graph, 1, 4 or 8: more of them leave the host less to do,
            and tokens arrive in bunches. Without effect on a CPU.
        eager: whether to decode by plain steps: without CUDA graphs, and on a CPU by Hugging Face's own operations, bit
            for bit, in place of compiled kernels.
        threads: how many threads compute on a CPU, 1 to 256; prefill and decoding alike, whatever
            torch.set_num_threads says later. None or "auto": as many as PyTorch would use, but no more than the
            process's affinity and its container's CPU quota allow. Tokens do not depend on it.
        progress: whether to draw progress bars on stderr; None draws them on a terminal only.
        revision: a branch, tag or commit of a hub repository.

    Returns:
        The model, its weights packed on the device.

    Raises:
        FileNotFoundError: nothing is found under `source`.
        HubError, AccessDenied: the hub cannot be reached or refuses; the message names its status and reason.
        CheckpointError: the checkpoint is not one that can be run faithfully; the message names what is wrong.
        NotEnoughMemory: the memory plan does not fit; checked before allocating.
        ValueError, TypeError: an argument is out of range.
    """
    found = examine(
        sources.pinned(source, revision),
        device=device,
        dtype=dtype,
        max_seq_len=max_seq_len,
        max_batch=max_batch,
        steps_per_graph=steps_per_graph,
        eager=eager,
        threads=threads,
        progress=progress,
    )
    let_children_compute()
    on = torch.device(found.runtime.device)
    memory_plan.check_fits(found.plan, on)
    tokenizer = Tokenizer.from_folder(found.source.folder, found.config.vocab)
    as_dtype = getattr(torch, found.runtime.dtype)
    stored, config, plan = found.stored, found.config, found.plan
    if stored[EMBEDDING].file.parent != found.source.folder:  # headers alone: now the weights come
        stored = find_stored(Checkpoint(found.source.fetch(progress)), config)
        config = replace(config, tied=is_tied(stored, as_dtype))
        plan = memory_plan.plan(config, found.runtime)
    total = sum(stored[name].bytes for name in stored_shapes(config))
    with ProgressBar("loading weights", total, progress) as bar:
        if bar.show:
            print(f"{found.name}: {plan}", file=sys.stderr)
        weights = read_weights(stored, config, on, as_dtype, bar.advance)
    rope = RopeTables(config, found.runtime)
    return Model(config, found.runtime, weights, rope, tokenizer, found.name, plan)


@dataclass(frozen=True)
class Examined:
    """What is known of a model before its weights are read."""

    name: str
    source: sources.LocalFolder | hub.Snapshot
    stored: dict[str, StoredTensor] = field(repr=False)  # of a hub repository whose weights are missing, headers alone
    config: ModelConfig
    runtime: RuntimeConfig
    plan: memory_plan.MemoryPlan


def examine(
    source: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_seq_len: int | None = None,
    max_batch: int = 1,
    steps_per_graph: int = 1,
    eager: bool = False,
    threads: int | str | None = None,
    progress: bool | None = None,
) -> Examined:
    """Do everything that `load` does before it needs the weights: find the checkpoint, check it, plan.

    Args, Raises:
        as `load`; whether the plan fits is not looked at.
    """
    if source is None:
        source = sources.default_source()
    resolved_device = resolve_device(device)
    # Validates the caller's numbers before anything is downloaded; the dtype may still be the checkpoint's to say.
    limits = RuntimeConfig(
        resolved_device,
        "bfloat16" if dtype == "auto" else dtype,
        DEFAULT_SEQ_LEN if max_seq_len is None else max_seq_len,
        max_batch,
        steps_per_graph=steps_per_graph,
        eager=eager,
        threads=resolve_threads(threads),
    )

    found = sources.locate(source, progress)
    config = read_config(found.folder)
    longest = config.max_position_embeddings
    if max_seq_len is None:
        max_seq_len = min(DEFAULT_SEQ_LEN, longest)
    elif max_seq_len > longest:
        raise InvalidArgument(
            f"max_seq_len must be at most the checkpoint's max_position_embeddings ({longest}), got {max_seq_len}"
        )
    with found.headers() as folder:
        stored = find_stored(Checkpoint(folder), config)
        if dtype == "auto":
            dtypes = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
            dtype = config.stored_dtype or dtypes[stored[EMBEDDING].dtype]
        # Nothing can be said of values that have not been downloaded: a head that is stored counts as one of its own.
        tied = is_tied(stored, getattr(torch, dtype)) if folder == found.folder else HEAD not in stored
    runtime, config = replace(limits, dtype=dtype, max_seq_len=max_seq_len), replace(config, tied=tied)
    return Examined(str(source), found, stored, config, runtime, memory_plan.plan(config, runtime))


def read_config(folder: Path) -> ModelConfig:
    """Read the architecture of a checkpoint folder.

    Raises:
        FileNotFoundError: the folder has no config.json.
        CheckpointError: as `ModelConfig.from_hf`.
    """
    if not is_file(folder / "config.json"):
        raise ModelNotFound(f"no config.json in {folder}: {describe(folder)}")
    generation = folder / "generation_config.json"
    return ModelConfig.from_hf(
        read_json(folder / "config.json"), read_json(generation) if is_file(generation) else None
    )


def resolve_device(device: str) -> str:
    """A device by its own name: "auto" is CUDA where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "meta":
        raise InvalidArgument('device must be "cpu", "cuda" or "cuda:N", got \'meta\'')
    if isinstance(device, str) and device.startswith("cuda"):
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = device.partition(":")[2]
        if not found or (index.isdigit() and int(index) >= found):
            raise InvalidArgument(f"device {device!r} was asked for, but {found or 'no'} CUDA devices are found")
    return device
