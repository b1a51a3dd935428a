"""The speed of whole decode steps: captured, through the host's loop, and Hugging Face's on the same weights."""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from runtime.bench.gates import start
from runtime.bench.measure import bytes_per_step
from runtime.bench.operations import pairs, times
from runtime.bench.scale import Scale
from runtime.bench.timing import samples_us, seconds, synchronize
from runtime.engine import padded_chunk
from runtime.engine.decode import stepper
from runtime.engine.guess_step import GuessStep
from runtime.engine.prefill import prefill
from runtime.engine.short_chunk import MOST_PICKED
from runtime.families.state import new_state
from runtime.generation import generate
from runtime.hugging_face.shared_weights import hugging_face
from runtime.kernels.launch import INTERPRETING, dependent_launch, gpu_of
from runtime.model.config import MAX_BATCH, QUANTIZED_TO
from runtime.parity.hugging_face import greedy

SWITCH = "GEMMA_RUNTIME_DEPENDENT_LAUNCH"


def kernels(scale: Scale, name: str, compiled: bool) -> Iterator[dict[str, Any]]:
    """Each operation of a step at one row and at the largest batch, each in a model of that many rows, and attention
    over contexts; beside PyTorch's, and torch.compile's if wanted."""
    ceiling = scale.ceiling(scale.device)
    for batch in dict.fromkeys((1, scale.max_batch)):
        model = scale.model(name, max_batch=batch)
        contexts = scale.contexts if batch == 1 else ()
        copies = None if scale.device.type == "cuda" else 2
        for pair in pairs(model, [batch], contexts, copies=copies, compiled=compiled):
            found = times(pair, scale.device, ceiling, 2, scale.kernel_repeats)
            medians = {name: value.p50 for name, value in found.items() if name.endswith("_us")}
            yield (
                {"model": name, "dtype": scale.dtype, "kernel": pair.kernel, "shape": pair.shape}
                | medians
                | {
                    "bandwidth_gb_s": found["achieved_gb_s"],
                    "read_gb_s": found["read_bandwidth_gb_s"],
                    "share_of_read_bandwidth": found["share_of_read_bandwidth"],
                }
            )


def steps(scale: Scale, name: str) -> Iterator[dict[str, Any]]:
    """Captured decode steps of one model over contexts, batches and steps per graph, with a reading of the ceiling
    directly before each."""
    ceiling = scale.ceiling(scale.device)
    short = scale.contexts[:1]
    cases = [(1, 1, 1, scale.contexts, True), (1, 1, 8, short, True), (1, 1, 1, short, False)]
    cases += [(scale.max_batch, batch, 1, scale.contexts, True) for batch in scale.batches]
    cases += [(MAX_BATCH, batch, 1, short, True) for batch in (1, MAX_BATCH) if scale.device.type == "cuda"]
    model = None
    for max_batch, batch, count, contexts, dependent in cases:
        if model is None or model.runtime.max_batch != max_batch:
            del model
            model = scale.model(name, max_batch=max_batch)
        state = new_state(model, batch)
        start(model, state, 0)
        began = time.perf_counter()
        with nullcontext() if dependent else switched_off(SWITCH):
            step = stepper(model, state, count)
            used = dependent_launch(gpu_of(scale.device))
        capture_s = time.perf_counter() - began
        for context in contexts:
            state.position.fill_(context - 1)
            read_gb_s = ceiling.gb_s()
            samples = [sample / count for sample in samples_us(step, scale.device, max(2, scale.repeats // count))]
            median = statistics.median(samples)
            needed = bytes_per_step(model.plan, [context] * batch, 0)
            yield {
                "model": name,
                "dtype": scale.dtype,
                "quantize": scale.quantize,
                "max_batch": max_batch,
                "batch": batch,
                "context": context,
                "steps_per_graph": count,
                "dependent_launch": used,
                "step_us": median,
                "p10_us": samples[len(samples) // 10],
                "p90_us": samples[len(samples) * 9 // 10],
                "tokens_per_s": batch * 1e6 / median,
                "bytes_per_step": needed,
                "bandwidth_gb_s": needed / median / 1e3,
                "read_gb_s": read_gb_s,
                "share_of_read_bandwidth": needed / median / 1e3 / read_gb_s,
                "warm_up_and_capture_s": capture_s,
            }


# Interpreted, a model takes minutes; one in int4 has an embedding and a head in int8.
QUANTIZED = QUANTIZED_TO[-1:] if INTERPRETING else QUANTIZED_TO


def quantized_steps(scale: Scale, name: str) -> Iterator[dict[str, Any]]:
    """The same steps of a model in int8 and in int4, with activations in fp32, as it is loaded, and in the scale's
    dtype."""
    dtypes = ("float32",) if INTERPRETING else dict.fromkeys(("float32", scale.dtype))
    for to, dtype in itertools.product(QUANTIZED, dtypes):
        yield from steps(dataclasses.replace(scale.quantized(to), dtype=dtype), name)


@contextmanager
def switched_off(name: str) -> Iterator[None]:
    """Sets an environment variable to 0."""
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def host_loop(scale: Scale, name: str) -> dict[str, Any]:
    """A model through the host's loop: what a caller waits for, prefill and readback included."""
    model = scale.model(name)
    state = new_state(model, 1)
    result: dict[str, Any] = {"model": name, "dtype": scale.dtype}
    eager = dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, eager=True))
    for length in scale.prompts:
        prompt = [5 + i % 90 for i in range(length)]
        ways = {"": model, "_pytorch": model, "_eager": eager}
        for way, runs in ways.items():
            fill = partial(prefill, runs, state, 0, prompt)
            with switched_off(padded_chunk.SWITCH) if way == "_pytorch" else nullcontext():
                samples = [seconds(fill, scale.device) for _ in range(scale.rounds + 1)]
            result[f"ttft_{length}{way}_ms"] = statistics.median(samples[1:]) * 1e3
    ids = [5 + i for i in range(scale.prompt)]
    for count in (1, 8):
        served = dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, steps_per_graph=count))
        rates, host = [], []
        for _ in range(scale.rounds):
            answer = generate(served, ids, max_new_tokens=scale.answer, ignore_eos=True, reuse=False)
            rates.append(answer.stats.decode_tokens_per_s or 0.0)
            began = time.perf_counter()
            stepper(served, state, count)()  # returns before the device has finished
            host.append((time.perf_counter() - began) * 1e6 / count)
            synchronize(scale.device)
        result[f"tokens_per_s_{count}_steps_a_graph"] = statistics.median(rates[1:])
        result[f"host_us_per_token_{count}_steps_a_graph"] = statistics.median(host[1:])
    if scale.device.type == "cuda":
        result["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return result


def guess_steps(scale: Scale, name: str) -> Iterator[dict[str, Any]]:
    """Steps that check guesses, beside a plain step of the same model, timed as speculation waits for them: launch,
    device and the tokens' transfer to the host. The guesses are wrong."""
    model = scale.model(name, max_batch=min(MOST_PICKED, scale.max_batch))
    state = new_state(model, model.runtime.max_batch)
    guesses, plain = GuessStep(model, state, state.batch), stepper(model, state.first_rows(1))
    guesses.capture(model)
    for context in dict.fromkeys((scale.contexts[0], scale.contexts[-1])):

        def waited_for(take: Callable[[], Any], context: int = context) -> float:
            samples = []
            for _ in range(scale.repeats + 1):
                state.position[0] = context - 1
                samples.append(1e6 * seconds(take, scale.device))
            return statistics.median(samples[1:])

        start(model, state, context - 1)
        row = {"model": name, "dtype": scale.dtype, "context": context}
        row["plain_step_us"] = waited_for(lambda: (plain(), state.first_token()))
        for rows in guesses.row_counts:
            row[f"step_of_{rows}_rows_us"] = waited_for(partial(guesses.run, model, [0] * (rows - 1)))
        yield row


def peers(scale: Scale, name: str, compiled: bool) -> Iterator[dict[str, Any]]:
    """Hugging Face's decode speed on the same weights: the time of a long answer minus that of a short one."""
    model = scale.model(name, max_seq_len=min(1024, scale.max_seq_len))
    theirs = hugging_face(scale.hf_config(name), model)
    prompt = [5 + i for i in range(scale.prompt)]
    kinds: dict[str, dict[str, Any]] = {
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
    }
    if compiled:
        kinds["static, torch.compile"] = {"cache_implementation": "static"}
    short = max(2, scale.new // 8)
    for kind, extra in kinds.items():
        samples = []
        for _ in range(scale.rounds):
            spent = [
                seconds(partial(greedy, theirs, prompt, count, **extra), scale.device)
                for count in (short, short + scale.new)
            ]
            samples.append(scale.new / (spent[1] - spent[0]))
        yield {
            "model": name,
            "dtype": scale.dtype,
            "cache": kind,
            "tokens_per_s": statistics.median(samples[1:]),
            "samples": samples,
        }
