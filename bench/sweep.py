"""`bench latency` and `bench throughput`: configurations of this runtime in this process, timed in turns."""

from __future__ import annotations

import itertools
import statistics
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import runtime
from runtime.bench.measure import (
    Request,
    audit,
    finished,
    folder_of,
    load_model,
    peak_mb,
    prompt_ids,
    reset_peak,
    rotated,
    run_request,
    types_of,
)
from runtime.bench.parts import step_parts
from runtime.bench.records import Row, Samples
from runtime.cost.bandwidth import ReadBandwidth
from runtime.model.model import Model
from runtime.parity.prompts import read_ids, read_prompts

Prompts = list[list[int]]


def latency(options: Namespace) -> Iterator[Row]:
    """One request at a time, over a sweep of sizes: the rows, dtype by dtype.

    Args:
        options: model, device, warmup, repeat; and lists: dtype, prompt_len, gen_len, batch_size.
    """
    longest, most = max(options.prompt_len) + max(options.gen_len), max(options.batch_size)
    for dtype in options.dtype:
        model, load_s = load_model(options, dtype, longest, most)
        cases = []
        for batch, length, gen_len in itertools.product(options.batch_size, options.prompt_len, options.gen_len):
            prompt = prompt_ids(model.tokenizer, model.config.vocab, length)
            sizes = {"batch_size": batch, "prompt_len": length, "gen_len": gen_len}
            cases.append(Case(_row(model, load_s, benchmark="latency", **sizes), [[prompt] * batch]))
        yield from sweep(model, cases, options)


def throughput(options: Namespace) -> Iterator[Row]:
    """A file of prompts, answered batch by batch at full speed: one row per dtype and batch size.

    Args:
        options: model, device, gen_len, warmup and repeat (in passes over the file), prompts (its path); and lists:
            dtype, batch_size.
    """
    # Tokenised before the model is loaded: the longest prompt decides how much memory is needed.
    contents, folder = read_prompts(options.prompts), folder_of(options.model)
    prompts = read_ids(contents, folder, str(folder))
    longest, most = max(map(len, prompts)) + options.gen_len, max(options.batch_size)
    sizes = {"prompt_len": round(statistics.mean(map(len, prompts))), "gen_len": options.gen_len}
    for dtype in options.dtype:
        model, load_s = load_model(options, dtype, longest, most)
        cases = []
        for batch in options.batch_size:
            row = _row(model, load_s, benchmark="throughput", batch_size=batch, requests=len(prompts), **sizes)
            cases.append(Case(row, [prompts[start : start + batch] for start in range(0, len(prompts), batch)]))
        yield from sweep(model, cases, options)


def _row(model: Model, load_s: float, **fields: Any) -> Row:
    """A configuration of a loaded model, without numbers."""
    return Row(engine_version=runtime.__version__, model=model.name, dtype=types_of(model), load_s=load_s, **fields)


@dataclass
class Case:
    """One configuration and what was measured of it. A pass answers its batches one after the other."""

    row: Row  # without numbers, at first
    batches: list[Prompts]
    passes: list[list[Request]] = field(default_factory=list)

    def run(self, model: Model, ceiling: ReadBandwidth | None = None) -> list[Request]:
        """One pass, each request as `run_request`."""
        return [run_request(model, batch, self.row.gen_len, ceiling) for batch in self.batches]

    def add(self, **fields: Any) -> None:
        self.row = self.row.model_copy(update=fields)

    def finished(self, model: Model, repeat: int) -> Row:
        """The row with its numbers, of `repeat` passes or fewer."""
        requests = [request for done in self.passes for request in done]
        if self.row.benchmark == "throughput":  # tokens over the time of all batches, without the readings between them
            answered = sum(map(len, self.batches)) * self.row.gen_len
            rates = (answered / sum(request.times_s[-1] for request in done) for done in self.passes)
            self.add(output_tokens_per_s=Samples.of(rates))
        return finished(self.row, requests, model.device, len(self.passes), repeat)


def sweep(model: Model, cases: Sequence[Case], options: Namespace) -> Iterator[Row]:
    """The rows of some configurations, complete together.

    Raises:
        KeyboardInterrupt, and any error of a run: re-raised after the rows of finished passes.
    """
    for case in cases:  # before the audit, which would compile for them and add its own memory
        reset_peak(model.device)
        first = case.run(model)[0]
        case.add(first_call_s=first.times_s[-1], peak_memory_mb=peak_mb(model.device))
    verdict = audit(model)
    for case in cases:
        case.add(audit=verdict)
    if not verdict.passed:
        for case in cases:
            case.add(status="refused", reason=verdict.verdict, first_call_s=None, peak_memory_mb=None)
            yield case.row
        return
    try:
        measure(model, cases, options.warmup, options.repeat)
        for case in cases:
            if case.row.benchmark == "latency":
                context = case.row.prompt_len + case.row.gen_len // 2
                case.add(parts=step_parts(model, case.row.batch_size, context))
    finally:  # what was measured before an error or an interrupt too
        yield from (case.finished(model, options.repeat) for case in cases if case.passes)


def measure(model: Model, cases: Sequence[Case], warmup: int, repeat: int) -> None:
    """Runs the cases alternately, so that other load on the machine affects all of them alike."""
    ceiling = ReadBandwidth(model.device)
    for case in cases:
        for _ in range(warmup):
            case.run(model)
    for number in range(repeat):
        print(f"round {number + 1} of {repeat}", file=sys.stderr)
        for case in rotated(cases, number):
            case.passes.append(case.run(model, ceiling))
