"""The times of one request and the figures that follow from them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from runtime.engine.result import Stats
from runtime.model.memory_plan import MemoryPlan


class Clock:
    """Starts when a request's model is ready, and ticks with every token.

    Args:
        plan: the bytes that a decode step reads.
        prompt_lengths: tokens in each row's prompt.
    """

    def __init__(self, plan: MemoryPlan, prompt_lengths: Sequence[int]) -> None:
        self._plan = plan
        self._prompt_lengths = prompt_lengths
        self._started = self._first = self._last = 0.0
        self._steps = 0  # decode steps: one fewer than the longest answer's tokens

    def start(self) -> None:
        """The request has the model, and its kernels are compiled."""
        self._started = time.perf_counter()

    def tick(self) -> None:
        """Another token of every row has arrived: the first, from prefill, or a decode step's."""
        self._last = time.perf_counter()
        if self._first:
            self._steps += 1
        else:
            self._first = self._last

    def stats(self, new_tokens: int) -> Stats:
        """The figures so far.

        Args:
            new_tokens: tokens in all answers together, without what rows emitted after their end.
        """
        prompt_tokens = sum(self._prompt_lengths)
        if not self._first:
            return Stats(prompt_tokens, new_tokens)
        ttft_s, decode_s, rows = self._first - self._started, self._last - self._first, len(self._prompt_lengths)
        decoded = new_tokens - rows
        if decoded <= 0:
            return Stats(prompt_tokens, new_tokens, ttft_s)
        step_bytes = self._bytes_per_step()
        return Stats(
            prompt_tokens,
            new_tokens,
            ttft_s,
            decode_s,
            decode_tokens_per_s=decoded / decode_s,
            bytes_per_token=round(step_bytes * self._steps / decoded),
            bandwidth_gb_s=step_bytes * self._steps / decode_s / 1e9,
        )

    def _bytes_per_step(self) -> float:
        """Bytes read by the average step: the weights once, and every row's cache at its average length."""
        lengths = [prompt + (self._steps + 1) // 2 for prompt in self._prompt_lengths]
        caches = sum(self._plan.bytes_per_token(length) - self._plan.weights_read for length in lengths)
        return self._plan.weights_read + caches
