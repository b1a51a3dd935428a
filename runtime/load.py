"""From a name to a model that is ready: every cheap check first, then the tokenizer, then the weights."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from runtime import memory, sources
from runtime.checkpoint import Checkpoint, read_json
from runtime.config import ModelConfig, RuntimeConfig
from runtime.errors import InvalidArgument, ModelNotFound
from runtime.progress import ProgressBar
from runtime.rope import RopeTables
from runtime.threads import resolve_threads
from runtime.tokenizer import Tokenizer
from runtime.turn import Turn
from runtime.weights import ModelWeights, check_stored, read_weights


@dataclass
class Model:
    """A loaded decoder with everything that a request needs besides its own state."""

    config: ModelConfig
    runtime: RuntimeConfig
    weights: ModelWeights
    rope: RopeTables
    tokenizer: Tokenizer | None
    name: str
    plan: memory.MemoryPlan
    turn: Turn = field(default_factory=Turn, repr=False)
    state: Any = field(default=None, repr=False)  # the decode state, made by the first request and reused
    graph_pool: Any = field(default=None, repr=False)  # the memory that its CUDA graphs share

    @property
    def device(self) -> torch.device:
        return self.weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embedding.dtype


def load(
    source: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_seq_len: int = 4096,
    max_batch: int = 1,
    steps_per_graph: int = 1,
    eager: bool = False,
    threads: int | str | None = None,
    progress: bool | None = None,
) -> Model:
    """Load a Gemma 1, 2 or 3 checkpoint.

    Args:
        source: a folder in Hugging Face's layout, a hub id, a `.gguf` file, or "demo". None means
            $GEMMA_RUNTIME_MODEL, or "demo" where that is not set.
        device: "cpu", "cuda", "cuda:N", or "auto" (CUDA where there is one).
        dtype: "float32", "bfloat16", "float16", or "auto" (the checkpoint's own).
        max_seq_len: longest prompt plus answer, in tokens, that buffers are made for.
        max_batch: most sequences that decode together, 1 to 8.
        steps_per_graph: decode steps in one launch of a CUDA graph, 1, 4 or 8: more of them leave the host less to do,
            and tokens arrive in bunches. Without effect on a CPU.
        eager: whether to decode by plain steps: without CUDA graphs, and on a CPU by Hugging Face's own operations, bit
            for bit, in place of compiled kernels.
        threads: how many threads compute on a CPU, 1 to 256; prefill and decoding alike, whatever
            torch.set_num_threads says later. None or "auto": as many as PyTorch would use, but no more than the
            process's affinity and its container's CPU quota allow. Tokens do not depend on it.
        progress: whether to draw a progress bar on stderr; None draws it on a terminal only.

    Returns:
        The model, its weights packed on the device.

    Raises:
        FileNotFoundError: nothing is found under `source`.
        CheckpointError: the checkpoint is not one that can be run faithfully; the message names what is wrong.
        NotEnoughMemory: the memory plan does not fit; checked before allocating.
        ValueError, TypeError: an argument is out of range.
    """
    found = examine(
        source,
        device=device,
        dtype=dtype,
        max_seq_len=max_seq_len,
        max_batch=max_batch,
        steps_per_graph=steps_per_graph,
        eager=eager,
        threads=threads,
        progress=progress,
    )
    on = torch.device(found.runtime.device)
    memory.check_fits(found.plan, on)
    tokenizer = Tokenizer.from_folder(found.checkpoint.folder, found.config.vocab)
    total = sum(stored.bytes for stored in found.checkpoint.tensors.values())
    with ProgressBar("loading weights", total, progress) as bar:
        if bar.show:
            print(f"{found.name}: {found.plan}", file=sys.stderr)
        weights = read_weights(found.checkpoint, found.config, on, getattr(torch, found.runtime.dtype), bar.advance)
    rope = RopeTables(found.config, found.runtime)
    return Model(found.config, found.runtime, weights, rope, tokenizer, found.name, found.plan)


@dataclass(frozen=True)
class Examined:
    """What is known of a model before its weights are read."""

    name: str
    checkpoint: Checkpoint
    config: ModelConfig
    runtime: RuntimeConfig
    plan: memory.MemoryPlan


def examine(
    source: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_seq_len: int = 4096,
    max_batch: int = 1,
    steps_per_graph: int = 1,
    eager: bool = False,
    threads: int | str | None = None,
    progress: bool | None = None,
) -> Examined:
    """Do everything that `load` does before it needs memory: find the checkpoint, check it, plan.

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
        max_seq_len,
        max_batch,
        steps_per_graph=steps_per_graph,
        eager=eager,
        threads=resolve_threads(threads),
    )

    folder = sources.resolve(source, progress)
    config = read_config(folder)
    checkpoint = Checkpoint(folder)
    prefix = check_stored(checkpoint, config)
    if dtype == "auto":
        stored = checkpoint.tensors[f"{prefix}embed_tokens.weight"].dtype
        dtype = config.stored_dtype or {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[stored]
    runtime = replace(limits, dtype=dtype)
    if max_seq_len > config.max_position_embeddings:
        raise InvalidArgument(
            f"max_seq_len must be at most the checkpoint's max_position_embeddings ({config.max_position_embeddings}), "
            f"got {max_seq_len}"
        )
    return Examined(str(source), checkpoint, config, runtime, memory.plan(config, runtime))


def read_config(folder: Path) -> ModelConfig:
    """Read the architecture of a checkpoint folder.

    Raises:
        FileNotFoundError: the folder has no config.json.
        CheckpointError: as `ModelConfig.from_hf`.
    """
    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"no config.json in {folder}")
    generation = folder / "generation_config.json"
    return ModelConfig.from_hf(
        read_json(folder / "config.json"), read_json(generation) if generation.is_file() else None
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
