"""The timing of a request, and the figures derived from it."""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

import runtime
from runtime.bench.environment import datasheet_gb_s
from runtime.bench.peers.serve import peak_memory_mb, reset_peak_memory
from runtime.bench.records import Audit, Row, Samples
from runtime.bench.shapes import random_model
from runtime.checkpoint import sources
from runtime.cost.bandwidth import ReadBandwidth
from runtime.loading import read_config, resolve
from runtime.model.memory_plan import MemoryPlan
from runtime.model.model import Model
from runtime.model.published import PUBLISHED
from runtime.sampling.processors import without_processors
from runtime.text.tokenizer import Tokenizer

# Room for the audit's prompt that is longer than a sliding window, where the model itself has that much.
LEAST_SEQ_LEN = 1024
TEXT = (
    "The harbour wakes before the town does. Boats come in with the tide, and along the quay people sort the catch by "
    "size and kind while gulls wait on the roofs. By eight the first lorries have left for the markets inland. "
)
UNMEASURED = float("nan")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Request:
    """One timed request."""

    tokens: list[list[int]]  # of each row
    times_s: list[float]  # of each step's arrival after the call
    prompt_tokens: int  # of all rows together
    step_bytes: int  # that its middle decode step must read
    read_gb_s: float = UNMEASURED  # the read bandwidth directly before it, in 10^9 bytes per second

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first: (end to end - TTFT) / (n - 1)."""
        return (self.times_s[-1] - self.times_s[0]) / (len(self.times_s) - 1)


def run_request(
    model: Model, prompts: Sequence[Sequence[int]], new_tokens: int, ceiling: ReadBandwidth | None = None
) -> Request:
    """Times one request as a caller sees it, through `runtime.stream`, with the ceiling measured directly before it if
    there is one. Stop tokens are ignored, and nothing is reused from earlier prompts, which are often the same."""
    read_gb_s = UNMEASURED if ceiling is None else ceiling.gb_s()
    rows: list[list[int]] = [[] for _ in prompts]
    times: list[float] = []
    started = time.perf_counter()
    batch: Any = [list(ids) for ids in prompts]
    with runtime.stream(model, batch, max_new_tokens=new_tokens, ignore_eos=True, reuse=False) as pieces:
        for piece in pieces:
            if piece.index == 0:  # a step's rows arrive together
                times.append(time.perf_counter() - started)
            rows[piece.index].extend(piece.token_ids)
    lengths = list(map(len, batch))
    return Request(rows, times, sum(lengths), bytes_per_step(model.plan, lengths, new_tokens), read_gb_s)


def finished(row: Row, requests: Sequence[Request], device: torch.device, done: int, repeat: int) -> Row:
    """A row with its numbers.

    Args:
        row: the row without numbers.
        requests: at least one, of two or more tokens, timed under the same conditions.
        device: that they ran on.
        done, repeat: the runs that were made and that were asked for.
    """
    gaps = [b - a for request in requests for a, b in itertools.pairwise(request.times_s)]
    mean_bytes = round(statistics.mean(request.step_bytes for request in requests))
    achieved = [request.step_bytes / request.tpot_s / 1e9 for request in requests]
    found = {
        "ttft_ms": Samples.of(request.times_s[0] * 1e3 for request in requests),
        "inter_token_ms": Samples.of(gap * 1e3 for gap in gaps),
        "tpot_ms": Samples.of(request.tpot_s * 1e3 for request in requests),
        "prefill_tokens_per_s": Samples.of(request.prompt_tokens / request.times_s[0] for request in requests),
        "decode_tokens_per_s": Samples.of(len(request.tokens) / request.tpot_s for request in requests),
        "bytes_per_step": mean_bytes,
        "bytes_per_token": round(mean_bytes / statistics.mean(len(request.tokens) for request in requests)),
        **ceiling_figures(achieved, [request.read_gb_s for request in requests], datasheet_gb_s(device)),
    }
    if done < repeat:
        found["reason"] = f"interrupted after {done} of {repeat} runs"
    return row.model_copy(update=found)


def ceiling_figures(achieved: Sequence[float], read: Sequence[float], datasheet_gb_s: float | None) -> dict[str, Any]:
    """What a row says about its ceiling: each round's rate is compared with the reading of that round alone.

    Args:
        achieved, read: one per round, in 10^9 bytes per second.
        datasheet_gb_s: the memory bandwidth in the datasheet, in 10^9 bytes per second.
    """
    median = statistics.median(achieved)
    shares = Samples.of(rate / ceiling for rate, ceiling in zip(achieved, read, strict=True))
    return {
        "achieved_gb_s": median,
        "read_bandwidth_gb_s": statistics.median(read),
        "read_bandwidth_readings_gb_s": Samples.of(read),
        "share_of_read_bandwidth": shares.p50,
        "shares_of_read_bandwidth": shares,
        "share_of_datasheet": median / datasheet_gb_s if datasheet_gb_s else None,
    }


def bytes_per_step(plan: MemoryPlan, prompt_lens: Sequence[int], gen_len: int) -> int:
    """Bytes that the middle decode step of an answer must read: every weight once, and every row's KV cache."""
    contexts = (length + gen_len // 2 for length in prompt_lens)
    return plan.weights_read + sum(plan.bytes_per_token(context) - plan.weights_read for context in contexts)


def types_of(model: Model) -> str:
    """What a row calls a model's dtype: the formats of its blocks, where its matrices are stored in blocks."""
    return model.weights.formats.replace(" + ", ", ") or model.runtime.dtype


def load_model(
    options: Namespace, dtype: str, longest: int, batch: int, *, needs_values: bool = False
) -> tuple[Model, float]:
    """Loads a model for sequences of up to `longest` tokens; returns it and the seconds that loading took.

    Args:
        options: model and device, as `runtime.load`; or the model is a published size such as "gemma-1.1-2b": its shape
            with random weights.
        dtype: as `runtime.load`.
        longest: prompt and answer, in tokens.
        batch: rows.
        needs_values: whether "auto" must give a dtype where `runtime.load` would keep blocks.

    Raises:
        as `runtime.load`.
    """
    source, device = options.model, options.device
    started = time.perf_counter()
    if source in PUBLISHED:
        on = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        kind = "bfloat16" if dtype == "auto" else dtype
        room = min(PUBLISHED[source]["max_position_embeddings"], max(longest, LEAST_SEQ_LEN))
        model = random_model(source, on, kind, max_seq_len=max(longest, room), max_batch=batch)
        model.name = f"{source}, random weights"
    else:
        source = sources.default_source() if source is None else source
        room = min(read_config(sources.locate(source).folder).max_position_embeddings, LEAST_SEQ_LEN)
        limits: dict[str, Any] = {"max_seq_len": max(longest, room), "max_batch": batch, "progress": False}
        if needs_values:
            dtype = resolve(source, device=device, dtype=dtype, needs_values=True, progress=False).runtime.dtype
        model = without_processors(runtime.load(source, device=device, dtype=dtype, **limits))
    load_s = time.perf_counter() - started
    print(f"{model.name}, {types_of(model)}: loaded, auditing", file=sys.stderr)
    return model, load_s


def audit(model: Model) -> Audit:
    """The quick parity audit of a loaded model; what fails it is not timed."""
    from runtime.parity.quick import quick_audit

    found = quick_audit(model)
    gc.collect()
    return Audit(passed=found.passed, verdict=found.verdict)


def reset_peak(device: torch.device) -> None:
    """Resets the peak memory of a device."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak_memory()


def peak_mb(device: torch.device) -> float | None:
    """The peak memory since the reset, in 10^6 bytes: PyTorch's on a GPU, this process's on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else peak_memory_mb()


def prompt_ids(tokenizer: Tokenizer | None, vocab: int, length: int) -> list[int]:
    """A prompt of exactly `length` tokens: repeated plain text or, without a tokenizer, random ids of a fixed seed.

    For speed alone random ids would do, but their continuations are full of near ties, where engines differ by
    rounding.
    """
    if tokenizer is None:
        return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = tokenizer.encode(TEXT)
    first, text = ids[:1], ids[1:]  # at most one BOS
    return (first + text * (length // len(text) + 1))[:length]


def folder_of(source: str | None) -> Path:
    """The checkpoint's folder in Hugging Face's layout."""
    return sources.resolve(sources.default_source() if source is None else source)


def rotated(items: Sequence[Item], by: int) -> list[Item]:
    """The items rotated by `by` places, so that over several rounds none is always first."""
    by %= len(items)
    return [*items[by:], *items[:by]]
