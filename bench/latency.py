"""`bench latency`: one request at a time, over a sweep of sizes."""

from __future__ import annotations

import itertools
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from runtime.bench.measure import (
    FirstCall,
    Request,
    audit,
    finished,
    first_call,
    load_model,
    own_row,
    prompt_ids,
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
    first: FirstCall = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    parts: tuple[Part, ...] = ()

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
    for case in cases:
        case.first = first_call(model, lambda case=case: case.run(model))
    verdict = audit(model)
    blank = [
        own_row("latency", model, verdict, load_s, case.batch, prompt_len=case.prompt_len, gen_len=case.gen_len)
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
        if case.requests:
            row = finished(row, case.requests, model.plan, model.device, options.repeat)
            yield row.model_copy(update=case.first | {"parts": case.parts})
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
