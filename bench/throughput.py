"""`bench throughput`: a file of prompts, answered batch by batch at full speed."""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Iterator

from runtime.bench.measure import folder_of, load_model
from runtime.bench.records import Row
from runtime.bench.sweep import case_of, sweep
from runtime.parity.prompts import read_ids, read_prompts


def rows(options: Namespace) -> Iterator[Row]:
    """One row per dtype and batch size.

    Args:
        options: model, device, gen_len, warmup and repeat (in passes over the file), prompts (its path); and lists:
            dtype, batch_size.
    """
    # Tokenised before the model is loaded: the longest prompt decides how much memory is needed.
    contents = read_prompts(options.prompts)
    folder = folder_of(options.model)
    prompts = read_ids(contents, folder, str(folder))
    longest, most = max(map(len, prompts)) + options.gen_len, max(options.batch_size)
    sizes = {"prompt_len": round(statistics.mean(map(len, prompts))), "gen_len": options.gen_len}
    for dtype in options.dtype:
        model, load_s = load_model(options.model, device=options.device, dtype=dtype, longest=longest, batch=most)
        cases = []
        for batch in options.batch_size:
            batches = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
            given = sizes | {"batch_size": batch, "requests": len(prompts)}
            cases.append(case_of(model, "throughput", batches, load_s, **given))
        yield from sweep(model, cases, options.warmup, options.repeat)
