"""The times of one request and the figures that follow from them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from runtime.engine.result import Stats
from runtime.model.memory_plan import MemoryPlan


class Clock:
    """Starts when a request gets its first rows, and ticks with every step that gives it tokens.

    Args:
        plan: the bytes that a decode step reads.
    """

    def __init__(self, plan: MemoryPlan) -> None:
        self._plan = plan
        self._started = self._first = self._last = 0.0
        self._firsts = 0  # rows that began with the request and have their first token
        self._steps = 0  # decode steps that gave it tokens
        self._step = -1

    def start(self) -> None:
        """The request has a row, and the model's kernels are compiled."""
        self._started = self._started or time.perf_counter()

    def first(self) -> None:
        """A row's first token has arrived, from prefill. Rows that began once others decoded do not count: they had to
        wait."""
        self._last = time.perf_counter()
        if not self._steps:
            self._first = self._last
            self._firsts += 1

    def tick(self, step: int) -> None:
        """A row's next token has arrived from a decode step, which counts once for all rows."""
        self._last = time.perf_counter()
        self._steps += step != self._step
        self._step = step

    def stats(self, lengths: Sequence[tuple[int, int]], cached_tokens: int) -> Stats:
        """The figures so far.

        Args:
            lengths: for each row, the number of tokens of its prompt and of new ones.
            cached_tokens: tokens of the prompts that earlier prompts had left in the cache.
        """
        prompt_tokens, new_tokens = (sum(column) for column in zip(*lengths, strict=True))
        if not self._first:
            return Stats(prompt_tokens, new_tokens)
        ttft_s, decode_s = self._first - self._started, self._last - self._first
        decoded = new_tokens - self._firsts
        if decoded <= 0 or not self._steps:
            return Stats(prompt_tokens, new_tokens, ttft_s, cached_tokens=cached_tokens)
        read = self._bytes(lengths)
        return Stats(
            prompt_tokens,
            new_tokens,
            ttft_s,
            decode_s,
            decode_tokens_per_s=decoded / decode_s,
            bytes_per_token=round(read / decoded),
            bandwidth_gb_s=read / decode_s / 1e9,
            cached_tokens=cached_tokens,
        )

    def _bytes(self, lengths: Sequence[tuple[int, int]]) -> int:
        """Bytes read by the decode steps: the weights once per step, and for each token its row's cache at its average
        length; too many where steps give a row several tokens, and so read the cache less often."""
        weights = self._plan.weights_read
        caches = sum(
            (new - 1) * (self._plan.bytes_per_token(prompt + new // 2) - weights) for prompt, new in lengths if new > 1
        )
        return self._steps * weights + caches
