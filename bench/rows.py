"""`bench rows`: requests that share the engine's rows, beside a static batch, and while prompts arrive."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from runtime.bench.measure import audit, bytes_per_step, ceiling_figures, load_model, types_of
from runtime.bench.records import LEAST_DECODE_RATIO, LEAST_GAPS, InFlightRow, Samples
from runtime.bench.workload import ARRIVAL_TOKENS, REQUESTS_PER_ROW, AnswerDiffers, Round, Workload
from runtime.cost.bandwidth import ReadBandwidth
from runtime.model.model import Model


def rows(options: Namespace) -> Iterator[InFlightRow]:
    """One row per dtype.

    Args:
        options: model, device, rows, prompt_len, gen_len, arrival_len, warmup and repeat in rounds; and a list: dtype.

    Raises:
        KeyboardInterrupt, and any error of a run: re-raised after the row of finished rounds.
    """
    longest = max(options.prompt_len + options.gen_len, options.arrival_len + ARRIVAL_TOKENS)
    for dtype in options.dtype:
        model, load_s = load_model(options, dtype, longest, options.rows)
        verdict = audit(model)
        row = InFlightRow(
            audit=verdict,
            model=model.name,
            dtype=types_of(model),
            rows=options.rows,
            requests=REQUESTS_PER_ROW * options.rows,
            prompt_len=options.prompt_len,
            gen_len=options.gen_len,
            arrival_len=options.arrival_len,
            load_s=load_s,
        )
        if verdict.passed:
            yield from _measured(row, model, options)
        else:
            yield row.model_copy(update={"status": "refused", "reason": verdict.verdict})


def _measured(row: InFlightRow, model: Model, options: Namespace) -> Iterator[InFlightRow]:
    rounds: list[Round] = []
    try:
        work = Workload(model, row, ReadBandwidth(model.device))
        for number in range(max(1, options.warmup)):
            print(f"round before those measured: {number + 1}", file=sys.stderr)
            work.round(number)
        for number in range(options.repeat):
            print(f"round {number + 1} of {options.repeat}", file=sys.stderr)
            rounds.append(work.round(number))
    except AnswerDiffers as difference:
        rounds.clear()
        yield row.model_copy(update={"status": "refused", "reason": str(difference)})
    finally:  # what was measured before an error or an interrupt too
        if rounds:
            found = _figures(work, rounds)
            if len(rounds) < options.repeat:
                found["reason"] = f"interrupted after {len(rounds)} of {options.repeat} rounds"
            yield row.model_copy(update=found)


def _figures(work: Workload, rounds: Sequence[Round]) -> dict[str, Any]:
    """The numbers of a row."""

    def samples(value: Callable[[Round], float]) -> Samples:
        return Samples.of(map(value, rounds))

    decode = samples(lambda found: found.in_flight.decode)
    ratio = samples(lambda found: found.in_flight.decode / found.static.decode)
    gaps = Samples.of(gap for found in rounds for gap in found.arrivals.gaps_ms)
    p99 = gaps.p99 if len(gaps.values) >= LEAST_GAPS else None
    step, budget = samples(lambda found: found.step_ms), samples(lambda found: found.budget_ms)
    limit_ms = 2 * step.p50 + budget.p50
    lengths = [len(job.prompt) for job in work.requests[: work.rows]]
    step_bytes = bytes_per_step(work.model.plan, lengths, round(work.tokens / len(work.requests)))
    ceiling = ceiling_figures(
        [step_bytes * rate / work.rows / 1e9 for rate in decode.values], [found.read_gb_s for found in rounds], None
    )
    return {
        "decode_tokens_per_s": decode,
        "static_decode_tokens_per_s": samples(lambda found: found.static.decode),
        "decode_ratio": ratio,
        "meets_decode_ratio": ratio.p50 >= LEAST_DECODE_RATIO,
        "output_tokens_per_s": samples(lambda found: found.in_flight.output),
        "static_output_tokens_per_s": samples(lambda found: found.static.output),
        "output_ratio": samples(lambda found: found.in_flight.output / found.static.output),
        "inter_token_ms": gaps,
        "inter_token_p99_ms": p99,
        "inter_token_max_ms": max(gaps.values),
        "arrivals": sum(found.arrivals.prompts for found in rounds),
        "step_ms": step,
        "budget_tokens": work.budget_tokens,
        "budget_ms": budget,
        "limit_ms": limit_ms,
        "meets_limit": None if p99 is None else p99 <= limit_ms,
        **ceiling,
    }
