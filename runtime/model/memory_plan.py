"""The memory plan: bytes of every large buffer, computed from the configs alone and checked before allocating."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from runtime.errors import NotEnoughMemory
from runtime.kernels.attention_splits import most_splits
from runtime.kernels.token_mask import words_of
from runtime.model.config import MAX_BATCH, ModelConfig, RuntimeConfig
from runtime.model.weights import EMBEDDING, stored_shapes

# Rows of logits besides the batch's: a CPU's heads for guesses, for a prompt's first token and for all of its tokens.
HEADS_ROWS = 8 + 1 + 8
CHOOSING_BYTES = 64  # per token of the vocabulary, to choose from one row's logits in fp32 and int64
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a model needs on its device, and bytes that a decode step reads.

    A step reads `weights_read` once for all its rows: every weight except an untied embedding table, of which it reads
    `embedding_row_bytes` for each row (0 where the table is tied). `scratch` is an upper estimate for a prefill chunk,
    the rotary tables, and a step's attention, masks and logits, which are there once a request needs them; the other
    numbers are exact.
    """

    weights: int
    weights_read: int
    embedding_row_bytes: int
    kv_cache: int
    prefix_cache: int
    scratch: int
    kv_row_bytes: tuple[int, ...]  # by layer: key and value of one position of one sequence
    windows: tuple[int | None, ...]

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.prefix_cache + self.scratch

    def bytes_per_token(self, context: int) -> int:
        """Bytes that one decode step of one sequence must read: the weights once, and the cached keys and values within
        each layer's window.

        Args:
            context: tokens in the cache, the current one included.
        """
        cached = sum(
            row * (context if window is None else min(context, window))
            for row, window in zip(self.kv_row_bytes, self.windows, strict=True)
        )
        return self.weights_read + self.embedding_row_bytes + cached

    def __str__(self) -> str:
        sizes = {"weights": self.weights, "KV cache": self.kv_cache, "prefix cache": self.prefix_cache}
        listed = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in (sizes | {"scratch": self.scratch}).items())
        return f"{listed}, together {self.total / 1e6:,.0f} MB"


def plan(config: ModelConfig, runtime: RuntimeConfig, weight_bytes: Mapping[str, int] = {}) -> MemoryPlan:
    """Compute the memory plan of a model under the caller's limits.

    Args:
        config, runtime: the model and the limits.
        weight_bytes: bytes of each tensor that is not values in the limits' dtype, by stored name.
    """
    item = ITEM_BYTES[runtime.dtype]
    sizes = {name: item * math.prod(shape) for name, shape in stored_shapes(config).items()} | dict(weight_bytes)
    weights = sum(sizes.values())
    embedding_row = 0 if config.tied else sizes[EMBEDDING] // config.vocab
    rows = tuple(2 * layer.kv_heads * layer.head_dim * item for layer in config.layers)
    slots = [layer.slots(runtime.max_seq_len) for layer in config.layers]
    chunk = min(runtime.prefill_chunk, runtime.max_seq_len)
    # The largest prefill chunk: the residual with its fp32 norms, the widest projections, one layer's keys and values
    # (cached, and repeated for every head), and its mask or, where a softcap rules out fused attention, all its scores.
    widest = max(3 * config.intermediate, *(2 * sum(layer.qkv_widths) for layer in config.layers))
    activations = chunk * (config.hidden * (4 * item + 12) + widest * item)
    # On a GPU a chunk after the first may attend to every cache slot, filled or not.
    keys = runtime.max_seq_len + (chunk if chunk < runtime.max_seq_len else 0)
    gathered = 2 * max((layer.heads + layer.kv_heads) * layer.head_dim for layer in config.layers) * keys * item
    heads = max(layer.heads for layer in config.layers)
    scores = chunk * keys * (heads * (2 * item + 4) if config.attention_softcap else 8)
    tables = 2 * 2 * runtime.max_seq_len * max(layer.head_dim for layer in config.layers) * item
    # The splits of a step's attention on a GPU and, where a CPU splits keys, a layer's scores and weights.
    is_on_cpu = torch.device(runtime.device).type == "cpu"
    split = max(layer.heads * (layer.head_dim + 2) for layer in config.layers)
    splits = 0 if is_on_cpu else (1 + older_splits(config, runtime)) * split
    split_scores = 2 * sum(
        heads * count for heads, count in {(layer.heads, layer.slots(runtime.max_seq_len)) for layer in config.layers}
    )
    step = runtime.max_batch * 4 * (splits + split_scores)
    # On a GPU a chunk's product needs a matrix of integers written out as values.
    layers = (2 * config.intermediate, *(sum(layer.qkv_widths) for layer in config.layers))
    values = 0 if is_on_cpu or runtime.quantize is None else max(layers) * config.hidden * item
    logits = (runtime.max_batch + HEADS_ROWS) * config.vocab * item + CHOOSING_BYTES * config.vocab
    masks = runtime.max_batch * 4 * words_of(config.vocab)
    return MemoryPlan(
        weights=weights,
        weights_read=weights - config.vocab * embedding_row,
        embedding_row_bytes=embedding_row,
        kv_cache=runtime.max_batch * sum(row * count for row, count in zip(rows, slots, strict=True)),
        prefix_cache=kept_tokens(config, runtime) * sum(rows),
        scratch=activations + gathered + scores + tables + step + values + logits + masks,
        kv_row_bytes=rows,
        windows=tuple(layer.window for layer in config.layers),
    )


def older_splits(config: ModelConfig, runtime: RuntimeConfig) -> int:
    """The most splits that attention on a GPU makes of a row's older keys, in any layer."""
    dtype = getattr(torch, runtime.dtype)
    return max(
        most_splits(layer.slots(runtime.max_seq_len), dtype, runtime.max_batch, layer.heads // layer.kv_heads)
        for layer in config.layers
    )


def rows_that_fit(config: ModelConfig, runtime: RuntimeConfig, weight_bytes: Mapping[str, int] = {}) -> int:
    """The largest max_batch, up to MAX_BATCH, with which everything but the weights takes at most half of the device
    memory that the weights leave free: at least 1, and 1 if the free memory is unknown."""
    free = available_bytes(torch.device(runtime.device)) or 0
    most = 1
    for rows in range(2, MAX_BATCH + 1):
        needed = plan(config, replace(runtime, max_batch=rows), weight_bytes)
        if 2 * (needed.total - needed.weights) > free - needed.weights:
            break
        most = rows
    return most


def kept_tokens(config: ModelConfig, runtime: RuntimeConfig) -> int:
    """How many tokens of earlier prompts are kept, in whole chunks: none if some layer's ring is shorter than a chunk,
    whose first tokens it has lost by the chunk's end."""
    tokens = runtime.max_seq_len if runtime.prefix_cache_tokens is None else runtime.prefix_cache_tokens
    shortest = min(layer.slots(runtime.max_seq_len) for layer in config.layers)
    return tokens - tokens % runtime.tail_chunk if runtime.prefill_chunk <= shortest else 0


def available_bytes(device: torch.device) -> int | None:
    """Bytes free on a device: as CUDA reports, or the smaller of the system's available memory and the rest of the
    cgroup's limit. None where unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [free for free in (_system_free(), _cgroup_free()) if free is not None]
    return min(limits, default=None)


def check_fits(needed: MemoryPlan, device: torch.device) -> None:
    """Refuse a plan that does not fit.

    Raises:
        NotEnoughMemory: the plan is larger than what is free; the message holds the plan.
    """
    free = available_bytes(device)
    if free is not None and needed.total > free:
        raise NotEnoughMemory(
            f"not enough memory on {device}: {needed}, but {free / 1e6:,.0f} MB are free "
            "(a smaller max_seq_len or max_batch shrinks the caches)"
        )


def _system_free(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_free(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The rest of a container's memory limit; page cache that can be dropped counts as free."""
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            allowed, used = (root / limit).read_text().strip(), int((root / usage).read_text())
            stat = dict(line.split() for line in (root / limit).with_name("memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if allowed == "max":
            return None
        droppable = int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))
        return max(0, int(allowed) - used + droppable)
    return None
