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
    Ceiling,
    Request,
    audit,
    bytes_per_step,
    figures,
    load_model,
    peak_mb,
    prompt_ids,
    reset_peak,
    run_request,
    turned,
)
from runtime.bench.parts import step_parts
from runtime.bench.records import Row
from runtime.load import Model


@dataclass
class Case:
    """One configuration and what was measured of it."""

    batch: int
    prompt_len: int
    gen_len: int
    first_call_s: float = 0.0
    requests: list[Request] = field(default_factory=list)
    peak_memory_mb: float | None = None

    def run(self, model: Model) -> Request:
        """One request, with its peak memory."""
        ids = prompt_ids(model.tokenizer, model.config.vocab, self.prompt_len)
        reset_peak(model.device)
        request = run_request(model, [ids] * self.batch, self.gen_len)
        self.peak_memory_mb = max(self.peak_memory_mb or 0.0, peak_mb(model.device) or 0.0) or None
        return request


def rows(options: Namespace) -> Iterator[Row]:
    """The rows of a sweep, dtype after dtype, each as soon as it is complete.

    Args:
        options: model, device, warmup, repeat; and lists: dtype, prompt_len, gen_len, batch_size.

    Raises:
        KeyboardInterrupt: passed on, after the rows of what had been measured.
    """
    for dtype in options.dtype:
        yield from _sweep(options, dtype)


def _sweep(options: Namespace, dtype: str) -> Iterator[Row]:
    longest = max(options.prompt_len) + max(options.gen_len)
    model, load_s = load_model(
        options.model, device=options.device, dtype=dtype, longest=longest, batch=max(options.batch_size)
    )
    print(f"{model.name}, {model.runtime.dtype}: loaded, auditing", file=sys.stderr)
    verdict = audit(model)
    sizes = itertools.product(options.batch_size, options.prompt_len, options.gen_len)
    blank = [
        Row(
            benchmark="latency",
            engine="gemma-runtime",
            engine_version=runtime.__version__,
            audit=verdict,
            model=model.name,
            dtype=model.runtime.dtype,
            batch_size=batch,
            prompt_len=prompt_len,
            gen_len=gen_len,
            load_s=load_s,
        )
        for batch, prompt_len, gen_len in sizes
    ]
    if not verdict.passed:
        yield from (row.refused() for row in blank)
        return
    cases = [Case(row.batch_size, row.prompt_len, row.gen_len) for row in blank]
    ceiling = Ceiling(model.device)
    complete = _measure(model, cases, options.warmup, options.repeat)
    read_gb_s = ceiling.close()
    for row, case in zip(blank, cases, strict=True):
        if not case.requests:
            continue
        contexts = [case.prompt_len] * case.batch
        found = figures(
            case.requests,
            [sum(contexts)] * len(case.requests),
            bytes_per_step(model.plan, contexts, case.gen_len),
            read_gb_s,
            datasheet_gb_s(model.device),
        )
        found |= {"first_call_s": case.first_call_s, "peak_memory_mb": case.peak_memory_mb}
        if complete:
            found["parts"] = step_parts(model, case.batch, case.prompt_len + case.gen_len // 2)
        elif len(case.requests) < options.repeat:
            found["reason"] = f"interrupted after {len(case.requests)} of {options.repeat} runs"
        yield row.model_copy(update=found)
    if not complete:
        raise KeyboardInterrupt


def _measure(model: Model, cases: Sequence[Case], warmup: int, repeat: int) -> bool:
    """Runs the cases in turn, so that what else the machine does meets all of them; False where Ctrl-C ended it."""
    try:
        for case in cases:
            case.first_call_s = case.run(model).times_s[-1]
            for _ in range(warmup):
                case.run(model)
        for number in range(repeat):
            print(f"round {number + 1} of {repeat}", file=sys.stderr)
            for case in turned(cases, number):
                case.requests.append(case.run(model))
    except KeyboardInterrupt:
        return False
    return True
