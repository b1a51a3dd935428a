"""`bench latency`: one request at a time, over a sweep of sizes."""

from __future__ import annotations

import itertools
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import runtime
from runtime.bench.environment import datasheet_gb_s
from runtime.bench.measure import (
    Request,
    audit,
    bytes_per_step,
    figures,
    load_model,
    peak_mb,
    prompt_ids,
    reset_peak,
    rotated,
    run_request,
)
from runtime.bench.parts import step_parts
from runtime.bench.records import Part, Row
from runtime.cost.bandwidth import ReadBandwidth
from runtime.model.model import Model


@dataclass
class Case:
    """One configuration and what was measured of it."""

    batch: int
    prompt_len: int
    gen_len: int
    first_call_s: float = 0.0
    peak_memory_mb: float | None = None
    requests: list[Request] = field(default_factory=list)
    parts: tuple[Part, ...] = ()

    def first_call(self, model: Model) -> None:
        """One request, compilation and capture included, with the memory that it takes."""
        reset_peak(model.device)
        self.first_call_s = self.run(model).times_s[-1]
        self.peak_memory_mb = peak_mb(model.device)

    def run(self, model: Model, ceiling: ReadBandwidth | None = None) -> Request:
        """One request, as `run_request`."""
        ids = prompt_ids(model.tokenizer, model.config.vocab, self.prompt_len)
        return run_request(model, [ids] * self.batch, self.gen_len, ceiling)


def rows(options: Namespace) -> Iterator[Row]:
    """The rows of a sweep, dtype by dtype: the sizes of a dtype alternate, so their rows are complete together.

    Args:
        options: model, device, warmup, repeat; and lists: dtype, prompt_len, gen_len, batch_size.

    Raises:
        KeyboardInterrupt, and any error of a run: re-raised after the rows of finished measurements.
    """
    for dtype in options.dtype:
        yield from _sweep(options, dtype)


def _sweep(options: Namespace, dtype: str) -> Iterator[Row]:
    longest = max(options.prompt_len) + max(options.gen_len)
    model, load_s = load_model(
        options.model, device=options.device, dtype=dtype, longest=longest, batch=max(options.batch_size)
    )
    print(f"{model.name}, {model.runtime.dtype}: loaded, auditing", file=sys.stderr)
    sizes = itertools.product(options.batch_size, options.prompt_len, options.gen_len)
    cases = [Case(*size) for size in sizes]
    for case in cases:  # before the audit, which would compile for them and add its own memory
        case.first_call(model)
    verdict = audit(model)
    blank = [
        Row(
            benchmark="latency",
            engine="gemma-runtime",
            engine_version=runtime.__version__,
            audit=verdict,
            model=model.name,
            dtype=model.runtime.dtype,
            batch_size=case.batch,
            prompt_len=case.prompt_len,
            gen_len=case.gen_len,
            load_s=load_s,
        )
        for case in cases
    ]
    if not verdict.passed:
        yield from (row.refused() for row in blank)
        return
    stopped: BaseException | None = None
    try:
        _measure(model, cases, options.warmup, options.repeat)
        for case in cases:
            case.parts = step_parts(model, case.batch, case.prompt_len + case.gen_len // 2)
    except (Exception, KeyboardInterrupt) as error:  # keeps what was measured before
        stopped = error
    for row, case in zip(blank, cases, strict=True):
        if not case.requests:
            continue
        contexts = [case.prompt_len] * case.batch
        found = figures(
            case.requests,
            [sum(contexts)] * len(case.requests),
            [bytes_per_step(model.plan, contexts, case.gen_len)] * len(case.requests),
            datasheet_gb_s(model.device),
        )
        found |= {"first_call_s": case.first_call_s, "peak_memory_mb": case.peak_memory_mb, "parts": case.parts}
        if len(case.requests) < options.repeat:
            found["reason"] = f"interrupted after {len(case.requests)} of {options.repeat} runs"
        yield row.model_copy(update=found)
    if stopped is not None:
        raise stopped


def _measure(model: Model, cases: Sequence[Case], warmup: int, repeat: int) -> None:
    """Runs the cases alternately, so that other load on the machine affects all of them alike."""
    ceiling = ReadBandwidth(model.device)
    for case in cases:
        for _ in range(warmup):
            case.run(model)
    for number in range(repeat):
        print(f"round {number + 1} of {repeat}", file=sys.stderr)
        for case in rotated(cases, number):
            case.requests.append(case.run(model, ceiling))
