"""`bench latency`: one request at a time, over a sweep of sizes."""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Iterator

from runtime.bench.measure import load_model, prompt_ids
from runtime.bench.records import Row
from runtime.bench.sweep import case_of, sweep


def rows(options: Namespace) -> Iterator[Row]:
    """The rows of a sweep, dtype by dtype.

    Args:
        options: model, device, warmup, repeat; and lists: dtype, prompt_len, gen_len, batch_size.
    """
    longest, most = max(options.prompt_len) + max(options.gen_len), max(options.batch_size)
    for dtype in options.dtype:
        model, load_s = load_model(options.model, device=options.device, dtype=dtype, longest=longest, batch=most)
        cases = []
        for batch, length, gen_len in itertools.product(options.batch_size, options.prompt_len, options.gen_len):
            prompt = prompt_ids(model.tokenizer, model.config.vocab, length)
            sizes = {"batch_size": batch, "prompt_len": length, "gen_len": gen_len}
            cases.append(case_of(model, "latency", [[prompt] * batch], load_s, **sizes))
        yield from sweep(model, cases, options.warmup, options.repeat)
