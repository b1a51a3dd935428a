"""The host's share of a token on a GPU: what the engine does for it, measured with a stand-in for the device.

    python -m runtime.bench.host_share [MODEL] [--rows 1,8] [--tokens 1000] [--repeat 9] [--most-us 20] [--out FILE]

The stand-in's steps take no time and its tokens are there at once, so what is left of a token is the host's: choosing
the rows of a step, text, stop test, the caller's stream. CUDA's own calls (launching a graph, copying tokens) are left
out. The device hides all of it while a step takes longer.

Gate: the stream hands out the stand-in's tokens. Exit code: 0 within the limit, 1 not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch

import runtime
from runtime.bench.environment import environment
from runtime.bench.output import publish
from runtime.engine.decode import HOST_LAG, DeviceSteps
from runtime.engine.graph import CapturedGraph
from runtime.engine.scheduler import Scheduler
from runtime.families.state import DecodeState
from runtime.model.model import Model

LIMIT_US = 20.0
PROMPT = "A dog running through the snow is"


class NoGraph(CapturedGraph):
    """A captured graph whose replay does nothing."""

    def replay(self, **rows: int) -> None:
        pass


class StandIn(DeviceSteps):
    """A device as far ahead of the host as a GPU is, whose row `r` emits token (at, r) at its step `at`."""

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
        self._waiting: deque[list[list[int]]] = deque()
        self._at = 0

    def ahead(self, model: Model) -> int:
        return HOST_LAG

    def launch(self, model: Model, state: DecodeState, steps: int, samples: bool = False) -> None:
        if (key := ("decoding", state.batch, steps)) not in state.graphs:
            state.graphs[key] = NoGraph(model)
        super().launch(model, state, steps, samples)

    def readback(self, model: Model, state: DecodeState, requests: int) -> StandIn:
        self._waiting.clear()
        self._at = 0
        return self

    def request(self, tokens: Sequence[torch.Tensor]) -> None:
        self._waiting.append([self._emit(values.shape[0]) for values in tokens])

    def take(self) -> list[list[int]]:
        return self._waiting.popleft()

    def _emit(self, rows: int) -> list[int]:
        self._at += 1
        return [self.token(self._at, row) for row in range(rows)]

    def token(self, at: int, row: int) -> int:
        """An ordinary token of text, mostly."""
        return 1000 + (7919 * at + 31 * row) % (self._vocab - 1000)


def host_us(model: Model, rows: int, tokens: int) -> float:
    """Microseconds of a step of `rows` streams that all are read, after the first."""
    stand_in = StandIn(min(model.config.vocab, 100_000))
    vars(model)["_engine"] = Scheduler(model, stand_in)
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(PROMPT)
    got: list[list[int]] = [[] for _ in range(rows)]
    with runtime.stream(model, [ids] * rows, max_new_tokens=tokens, ignore_eos=True) as pieces:
        for piece in pieces:
            got[piece.index].append(piece.token_ids[0])
            if piece.index == rows - 1 and len(got[-1]) == 2:  # all have begun
                started = time.perf_counter()
        spent = time.perf_counter() - started
    for row, given in enumerate(got):
        expected = [stand_in.token(rows + step, row) for step in range(1, tokens)]
        if given[1:] != expected:
            raise AssertionError(f"row {row}: the stream's tokens are not the stand-in's")
    return spent / (tokens - 2) * 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runtime.bench.host_share", description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="demo", metavar="MODEL")
    parser.add_argument("--rows", default="1,8", help="rows of a step; the limit is for the first (default: 1,8)")
    parser.add_argument("--tokens", type=int, default=1000, help="steps of a measurement (default: 1000)")
    parser.add_argument("--repeat", type=int, default=9, help="measurements, of which the median counts (default: 9)")
    parser.add_argument("--most-us", type=float, default=LIMIT_US, help="the limit, in microseconds (default: 20)")
    parser.add_argument("--out", type=Path, help="a file for the result as JSON")
    options = parser.parse_args(arguments)
    counts = [int(count) for count in options.rows.split(",")]
    model = runtime.load(
        options.model, device="cpu", max_batch=max(counts), max_seq_len=options.tokens + 64, prefix_cache_tokens=0
    )
    figures: dict[str, dict[str, float]] = {}
    for rows in counts:
        samples = [host_us(model, rows, options.tokens) for _ in range(options.repeat)]
        figures[str(rows)] = {"p50_us": statistics.median(samples), "least_us": min(samples), "most_us": max(samples)}
        print(f"{rows} rows: {figures[str(rows)]['p50_us']:.1f} us a step", file=sys.stderr)
    within = figures[str(counts[0])]["p50_us"] <= options.most_us
    result = {
        "model": model.name,
        "steps": options.tokens,
        "host_us_by_rows": figures,
        "limit_us": options.most_us,
        "within_limit": within,
        "environment": environment(torch.device("cpu")).model_dump(mode="json"),
    }
    publish(result, options.out)
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
