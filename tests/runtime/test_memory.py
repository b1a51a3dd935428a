"""The plan's numbers are those of the real buffers, and a plan that does not fit is refused before allocating."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.api import load
from runtime.cost.launches import model_without_data
from runtime.engine.graph import runs_compiled
from runtime.engine.scheduler import scheduler_of
from runtime.errors import NotEnoughMemory
from runtime.families.kv_cache import KVCache
from runtime.families.state import new_state
from runtime.loading import resolve
from runtime.model import memory_plan
from runtime.model.config import ModelConfig, RuntimeConfig
from runtime.model.published import PUBLISHED

LOAD_MODULE = importlib.import_module("runtime.loading")  # the attribute of that name is the function
Make = Callable[..., tuple[Any, Path]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_the_plan_counts_what_is_allocated(checkpoint: Make, family: str, dtype: str) -> None:
    _, folder = checkpoint(family, **({} if family == "gemma" else {"sliding_window": 7}))
    model = load(folder, device="cpu", dtype=dtype, max_seq_len=50, max_batch=3)
    weights = [model.weights.embedding, model.weights.final_norm]
    for layer in model.weights.layers:
        weights += [tensor for f in fields(layer) if (tensor := getattr(layer, f.name)) is not None]
    assert model.plan.weights == sum(tensor.nbytes for tensor in weights)
    cache = KVCache.allocate(model.config, 3, 50, model.dtype, model.device)
    assert model.plan.kv_cache == sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    parts = model.plan.weights, model.plan.kv_cache, model.plan.prefix_cache, model.plan.scratch
    assert model.plan.total == sum(parts)


def test_the_plan_counts_logits_and_masks(checkpoint: Make) -> None:
    """All that requests of every kind leave allocated, as vocabularies grow."""
    needed = []
    for vocab in (99, 4099):
        _, folder = checkpoint("gemma3", vocab_size=vocab)
        model = load(folder, device="cpu", max_seq_len=50, max_batch=3)
        options = {"max_new_tokens": 9, "prompt_logprobs": 1, "top_p": 0.9, "temperature": 1.0, "speculate": "prompt"}
        model.generate([5, 6, 7, 5, 6, 7], **options)
        scheduler = scheduler_of(model)
        assert scheduler._batch is not None and scheduler.state is not None
        heads = [getattr(graph, "_head", graph) for graph in scheduler.state.graphs.values()]
        logits = [scheduler._batch.rows.with_logits.logits, *(getattr(head, "_logits", None) for head in heads)]
        found = [scheduler.state.mask, *(one for one in logits if one is not None)]
        needed.append((sum(tensor.nbytes for tensor in found), model.plan.scratch))
        assert len(found) == (5 if runs_compiled(model) else 2)
    (less, scratch_of_less), (more, scratch_of_more) = needed
    assert 0 < more - less <= scratch_of_more - scratch_of_less


@pytest.mark.parametrize(("device", "most"), [("cpu", 64), ("cuda", 64)])
def test_auto_takes_the_rows_that_half_the_free_memory_holds(
    device: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig.from_hf(PUBLISHED["gemma-3-1b"])
    limits = RuntimeConfig(device, "bfloat16")
    plans = {rows: memory_plan.plan(config, replace(limits, max_batch=rows)) for rows in (1, 5, most)}
    free = {rows: 2 * needed.total - needed.weights for rows, needed in plans.items()}
    for available, expected in (
        (free[5], 5),
        (free[5] - 1, 4),
        (free[most], most),
        (100 * free[most], most),
        (free[1], 1),
        (0, 1),
        (None, 1),
    ):
        monkeypatch.setattr(memory_plan, "available_bytes", lambda _, available=available: available)
        assert memory_plan.rows_that_fit(config, limits) == expected


@pytest.mark.parametrize(
    ("max_seq_len", "max_batch", "most"),
    [(100, 1, 13), (100, 8, 4), (8192, 1, 128), (8192, 8, 32), (12_000, 1, 188), (32_768, 1, 352), (32_768, 8, 64)],
)
def test_the_workspace_of_attention_is_what_the_longest_row_needs(max_seq_len: int, max_batch: int, most: int) -> None:
    """On a GPU; and the plan has it in its scratch."""
    config = ModelConfig.from_hf(PUBLISHED["gemma-3-1b"])
    limits = RuntimeConfig("meta", "bfloat16", max_seq_len, max_batch)
    state = new_state(model_without_data(config, limits), max_batch)
    assert state.splits is not None and state.splits.partial.shape == (max_batch, 1 + most, 4 * 256)
    on_gpu, on_cpu = (memory_plan.plan(config, replace(limits, device=device)) for device in ("cuda", "cpu"))
    assert on_gpu.scratch - on_cpu.scratch == sum(tensor.nbytes for tensor in state.splits)


def test_auto_is_resolved_before_weights_are_read(checkpoint: Make) -> None:
    _, folder = checkpoint()
    resolved = resolve(folder, device="cpu", max_seq_len=32, max_batch="auto")
    assert resolved.runtime.max_batch == 64 and resolved.plan == memory_plan.plan(resolved.config, resolved.runtime)
    assert load(folder, device="cpu", max_seq_len=32, max_batch="auto").runtime == resolved.runtime


def test_bytes_per_token_honours_windows() -> None:
    config = ModelConfig.from_hf(
        {"model_type": "gemma2", "num_hidden_layers": 4, "sliding_window": 10, "num_key_value_heads": 2, "head_dim": 8}
    )
    plan = memory_plan.plan(config, RuntimeConfig("cpu", "bfloat16"))
    row = 2 * 2 * 8 * 2  # key and value, 2 heads of 8, 2 bytes
    assert plan.bytes_per_token(0) == plan.weights
    assert plan.bytes_per_token(10) == plan.weights + 4 * 10 * row
    assert plan.bytes_per_token(100) == plan.weights + 2 * 10 * row + 2 * 100 * row


def test_the_tied_table_counts_once() -> None:
    plan = memory_plan.plan(
        ModelConfig.from_hf({"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384,
                             "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1}),
        RuntimeConfig("cpu", "bfloat16"),
    )  # fmt: skip
    assert plan.weights == 2 * 2_506_172_416  # gemma-2b's published number of parameters


def test_too_little_memory_prints_the_plan(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = checkpoint()
    monkeypatch.setattr(memory_plan, "available_bytes", lambda _: 1000)
    monkeypatch.setattr(LOAD_MODULE, "read_weights", lambda *_: pytest.fail("read weights"))
    with pytest.raises(
        NotEnoughMemory, match=r"not enough memory on cpu: weights .*KV cache .*scratch .*together"
    ) as caught:
        load(folder, device="cpu", max_seq_len=32)
    assert "\n" not in str(caught.value)


def test_unknown_free_memory_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "available_bytes", lambda _: None)
    config = ModelConfig.from_hf({"model_type": "gemma"})
    memory_plan.check_fits(memory_plan.plan(config, RuntimeConfig("cpu", "float32")), torch.device("cpu"))


def test_available_memory_is_the_least_of_system_and_container(monkeypatch: pytest.MonkeyPatch) -> None:
    for system, container, expected in ((5, 3, 3), (2, 3, 2), (5, None, 5), (None, None, None)):
        monkeypatch.setattr(memory_plan, "_system_free", lambda value=system: value)
        monkeypatch.setattr(memory_plan, "_cgroup_free", lambda value=container: value)
        assert memory_plan.available_bytes(torch.device("cpu")) == expected


def test_reads_meminfo(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    1234 kB\n")
    assert memory_plan._system_free(tmp_path / "meminfo") == 1234 * 1024
    assert memory_plan._system_free(tmp_path / "absent") is None
    assert memory_plan.available_bytes(torch.device("cpu")) != 0


@pytest.mark.parametrize("version", [1, 2])
def test_reads_the_container_limit(tmp_path: Path, version: int) -> None:
    folder = tmp_path / "memory" if version == 1 else tmp_path
    folder.mkdir(exist_ok=True)
    limit, usage = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    )
    (folder / limit).write_text("1000\n")
    (folder / usage).write_text("700\n")
    (folder / "memory.stat").write_text("anon 400\ninactive_file 250\n")
    assert memory_plan._cgroup_free(tmp_path) == 550
    (folder / limit).write_text("max\n")
    assert memory_plan._cgroup_free(tmp_path) is None
    assert memory_plan._cgroup_free(tmp_path / "absent") is None
