"""`bench throughput`: a file of prompts, answered batch after batch as fast as it goes."""

from __future__ import annotations

import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import runtime
from runtime.audit.prompts import read_prompts
from runtime.bench.environment import datasheet_gb_s
from runtime.bench.measure import (
    Ceiling,
    Request,
    audit,
    bytes_per_step,
    figures,
    folder_of,
    load_model,
    peak_mb,
    reset_peak,
    run_request,
)
from runtime.bench.records import Row, Samples
from runtime.load import Model, read_config
from runtime.request import read_prompt
from runtime.tokenizer import Tokenizer

Prompts = list[list[int]]


def rows(options: Namespace) -> Iterator[Row]:
    """A row for each dtype and batch size.

    Args:
        options: model, device, gen_len, warmup and repeat (in passes over the file), prompts (its path); and lists:
            dtype, batch_size.

    Raises:
        KeyboardInterrupt: passed on; the rows before it are complete.
    """
    # Tokenised before anything is loaded: the longest prompt decides how much memory is needed.
    contents = read_prompts(options.prompts)
    folder = folder_of(options.model)
    config = read_config(folder)
    reader: Any = SimpleNamespace(config=config, name=folder, tokenizer=Tokenizer.from_folder(folder, config.vocab))
    prompts = [read_prompt(reader, prompt.content, prompt.name) for prompt in contents]
    longest = max(map(len, prompts)) + options.gen_len
    for dtype in options.dtype:
        model, load_s = load_model(
            options.model, device=options.device, dtype=dtype, longest=longest, batch=max(options.batch_size)
        )
        verdict = audit(model)
        for batch in options.batch_size:
            row = Row(
                benchmark="throughput",
                engine="gemma-runtime",
                engine_version=runtime.__version__,
                audit=verdict,
                model=model.name,
                dtype=model.runtime.dtype,
                batch_size=batch,
                prompt_len=round(statistics.mean(map(len, prompts))),
                gen_len=options.gen_len,
                requests=len(prompts),
                load_s=load_s,
            )
            yield _measured(row, model, prompts, options) if verdict.passed else row.refused()


def _measured(row: Row, model: Model, prompts: Prompts, options: Namespace) -> Row:
    batches = [prompts[i : i + row.batch_size] for i in range(0, len(prompts), row.batch_size)]
    ceiling = Ceiling(model.device)
    started = time.perf_counter()
    run_request(model, batches[0], row.gen_len)
    first_call_s = time.perf_counter() - started
    for _ in range(options.warmup):
        _pass(model, batches, row.gen_len)
    reset_peak(model.device)
    requests: list[Request] = []
    rates = []
    for number in range(options.repeat):
        print(f"batches of {row.batch_size}: pass {number + 1} of {options.repeat}", file=sys.stderr)
        started = time.perf_counter()
        requests += _pass(model, batches, row.gen_len)
        rates.append(len(prompts) * row.gen_len / (time.perf_counter() - started))
    peak = peak_mb(model.device)
    lengths = [[len(ids) for ids in batch] for batch in batches]
    found = figures(
        requests,
        [sum(of_batch) for of_batch in lengths] * options.repeat,
        round(statistics.mean(bytes_per_step(model.plan, of_batch, row.gen_len) for of_batch in lengths)),
        ceiling.close(),
        datasheet_gb_s(model.device),
    )
    found |= {"first_call_s": first_call_s, "peak_memory_mb": peak, "output_tokens_per_s": Samples(values=tuple(rates))}
    return row.model_copy(update=found)


def _pass(model: Model, batches: Sequence[Prompts], gen_len: int) -> list[Request]:
    return [run_request(model, batch, gen_len) for batch in batches]
