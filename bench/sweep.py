"""A sweep: configurations of this runtime in this process, timed in turns."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import runtime
from runtime.bench.measure import Request, audit, bytes_per_step, finished, peak_mb, reset_peak, rotated, run_request
from runtime.bench.parts import step_parts
from runtime.bench.records import Part, Row, Samples
from runtime.cost.bandwidth import ReadBandwidth
from runtime.model.model import Model

Prompts = list[list[int]]


@dataclass
class Case:
    """One configuration and what was measured of it. A pass answers its batches one after the other."""

    row: Row  # without numbers
    batches: list[Prompts]
    first_call: dict[str, float | None] = field(default_factory=dict)
    passes: list[list[Request]] = field(default_factory=list)
    parts: tuple[Part, ...] = ()

    def run(self, model: Model, ceiling: ReadBandwidth | None = None) -> list[Request]:
        """One pass, each request as `run_request`."""
        return [run_request(model, batch, self.row.gen_len, ceiling) for batch in self.batches]

    def run_first(self, model: Model) -> None:
        """One pass, whose first request's time includes compilation and capture, with the memory that it takes."""
        reset_peak(model.device)
        self.first_call = {"first_call_s": self.run(model)[0].times_s[-1], "peak_memory_mb": peak_mb(model.device)}

    def finished(self, model: Model, repeat: int) -> Row:
        """The row with its numbers, of `repeat` passes or fewer."""
        requests = [request for done in self.passes for request in done]
        lengths = [list(map(len, batch)) for batch in self.batches] * len(self.passes)
        step_bytes = [bytes_per_step(model.plan, of_batch, self.row.gen_len) for of_batch in lengths]
        tokens = list(map(sum, lengths))
        row = finished(self.row, requests, tokens, step_bytes, model.device, len(self.passes), repeat)
        more: dict[str, Any] = self.first_call | {"parts": self.parts}
        if row.benchmark == "throughput":  # tokens over the time of all batches, without the readings between them
            answered = sum(map(len, self.batches)) * row.gen_len
            rates = (answered / sum(request.times_s[-1] for request in done) for done in self.passes)
            more["output_tokens_per_s"] = Samples(values=tuple(rates))
        return row.model_copy(update=more)


def case_of(model: Model, benchmark: Any, batches: list[Prompts], load_s: float, **sizes: Any) -> Case:
    """A configuration of a loaded model; sizes are a row's batch_size, prompt_len, gen_len and, of a file, requests."""
    named: dict[str, Any] = {"engine": "gemma-runtime", "engine_version": runtime.__version__, "model": model.name}
    return Case(Row(benchmark=benchmark, dtype=model.runtime.dtype, load_s=load_s, **named, **sizes), batches)


def sweep(model: Model, cases: Sequence[Case], warmup: int, repeat: int) -> Iterator[Row]:
    """The rows of some configurations, complete together.

    Raises:
        KeyboardInterrupt, and any error of a run: re-raised after the rows of finished passes.
    """
    print(f"{model.name}, {model.runtime.dtype}: loaded, auditing", file=sys.stderr)
    for case in cases:  # before the audit, which would compile for them and add its own memory
        case.run_first(model)
    verdict = audit(model)
    for case in cases:
        case.row = case.row.model_copy(update={"audit": verdict})
    if not verdict.passed:
        yield from (case.row.refused() for case in cases)
        return
    stopped: BaseException | None = None
    try:
        measure(model, cases, warmup, repeat)
        for case in cases:
            if case.row.benchmark == "latency":
                context = case.row.prompt_len + case.row.gen_len // 2
                case.parts = step_parts(model, case.row.batch_size, context)
    except (Exception, KeyboardInterrupt) as error:  # keeps what was measured before
        stopped = error
    yield from (case.finished(model, repeat) for case in cases if case.passes)
    if stopped is not None:
        raise stopped


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
