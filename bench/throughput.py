"""`bench throughput`: a file of prompts, answered batch by batch at full speed."""

from __future__ import annotations

import statistics
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial

from runtime.bench.environment import datasheet_gb_s
from runtime.bench.measure import (
    Request,
    audit,
    bytes_per_step,
    figures,
    first_call,
    folder_of,
    load_model,
    own_row,
    run_request,
)
from runtime.bench.records import Row, Samples
from runtime.cost.bandwidth import ReadBandwidth
from runtime.model.model import Model
from runtime.parity.prompts import read_ids, read_prompts

Prompts = list[list[int]]


def rows(options: Namespace) -> Iterator[Row]:
    """One row per dtype and batch size.

    Args:
        options: model, device, gen_len, warmup and repeat (in passes over the file), prompts (its path); and lists:
            dtype, batch_size.

    Raises:
        KeyboardInterrupt: re-raised; the rows before it are complete.
    """
    # Tokenised before the model is loaded: the longest prompt decides how much memory is needed.
    contents = read_prompts(options.prompts)
    folder = folder_of(options.model)
    prompts = read_ids(contents, folder, str(folder))
    longest = max(map(len, prompts)) + options.gen_len
    for dtype in options.dtype:
        model, load_s = load_model(
            options.model, device=options.device, dtype=dtype, longest=longest, batch=max(options.batch_size)
        )
        first = {
            batch: first_call(
                model,
                partial(run_request, model, prompts[:batch], options.gen_len),
                partial(_pass, model, _batches(prompts, batch)[1:], options.gen_len),
            )
            for batch in options.batch_size
        }
        verdict = audit(model)
        sizes = {"prompt_len": round(statistics.mean(map(len, prompts))), "gen_len": options.gen_len}
        for batch in options.batch_size:
            row = own_row("throughput", model, verdict, load_s, batch, requests=len(prompts), **sizes)
            if verdict.passed:
                yield _measured(row, model, prompts, options).model_copy(update=first[batch])
            else:
                yield row.refused()


def _measured(row: Row, model: Model, prompts: Prompts, options: Namespace) -> Row:
    batches = _batches(prompts, row.batch_size)
    ceiling = ReadBandwidth(model.device)
    for _ in range(options.warmup):
        _pass(model, batches, row.gen_len)
    requests: list[Request] = []
    rates = []  # over the time of all batches, without the readings between them
    for number in range(options.repeat):
        print(f"batches of {row.batch_size}: pass {number + 1} of {options.repeat}", file=sys.stderr)
        done = _pass(model, batches, row.gen_len, ceiling)
        requests += done
        rates.append(len(prompts) * row.gen_len / sum(request.times_s[-1] for request in done))
    lengths = [[len(ids) for ids in batch] for batch in batches]
    found = figures(
        requests,
        [sum(of_batch) for of_batch in lengths] * options.repeat,
        [bytes_per_step(model.plan, of_batch, row.gen_len) for of_batch in lengths] * options.repeat,
        datasheet_gb_s(model.device),
    )
    return row.model_copy(update=found | {"output_tokens_per_s": Samples(values=tuple(rates))})


def _batches(prompts: Prompts, size: int) -> list[Prompts]:
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def _pass(
    model: Model, batches: Sequence[Prompts], gen_len: int, ceiling: ReadBandwidth | None = None
) -> list[Request]:
    return [run_request(model, batch, gen_len, ceiling) for batch in batches]
