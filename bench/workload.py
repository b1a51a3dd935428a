"""The requests of `bench rows`, and what one round of them gives.

Every answer, in timed rounds and in the warm-up rounds before them, must equal the one that its request gets alone,
token for token.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import runtime
from runtime.bench.measure import prompt_ids, rotated, run_request
from runtime.bench.records import InFlightRow
from runtime.cost.bandwidth import ReadBandwidth
from runtime.engine.prefill import prefill_budget
from runtime.model.model import Model

REQUESTS_PER_ROW = 4
ARRIVING = 4  # different prompts, which arrive in turn
ARRIVAL_TOKENS = 2  # its first, and one that reads all that prefill has cached


class AnswerDiffers(Exception):
    """An answer differs from the one that its request gets alone."""


class Job(NamedTuple):
    """One request."""

    prompt: list[int]
    new_tokens: int


class Rates(NamedTuple):
    """Tokens/s of all rows: in steps of all rows, and of the whole run."""

    decode: float
    output: float


class Arrivals(NamedTuple):
    """Rows that decode while prompts arrive."""

    gaps_ms: list[float]  # between two tokens of each row, one for every step
    prompts: int  # that arrived


class Round(NamedTuple):
    """One measurement of each kind, taken one after the other."""

    read_gb_s: float  # the read bandwidth directly before the requests in flight
    in_flight: Rates
    static: Rates
    arrivals: Arrivals
    step_ms: float
    budget_ms: float


class Workload:
    """The requests of a round, and the answers that they get alone."""

    def __init__(self, model: Model, row: InFlightRow, ceiling: ReadBandwidth) -> None:
        self.model, self.rows, self._ceiling = model, row.rows, ceiling
        drawn = random.Random(0)
        self.requests = [
            Job(
                self._prompt(drawn.randint(max(1, row.prompt_len // 4), row.prompt_len), shift),
                drawn.randint(row.gen_len // 4, row.gen_len),
            )
            for shift in range(row.requests)
        ]
        # Two rows are left: for a prompt that arrives, and for the one before it with its second token.
        self.running = [self._prompt(row.prompt_len, shift) for shift in range(row.rows - 2)]
        self.arriving = [self._prompt(row.arrival_len, shift) for shift in range(ARRIVING)]
        self.gen_len = row.gen_len
        print("answers of each request alone", file=sys.stderr)
        self._alone: dict[tuple[int, ...], tuple[int, ...]] = {}
        for prompts, new_tokens in (
            (self.arriving, ARRIVAL_TOKENS),
            ([*(job.prompt for job in self.requests), *self.running], row.gen_len),
        ):
            for prompt in prompts:
                result = runtime.generate(model, prompt, max_new_tokens=new_tokens, ignore_eos=True, reuse=False)
                self._alone[tuple(prompt)] = result.token_ids

    def round(self, number: int) -> Round:
        """One measurement of each kind; each round begins with a different one."""
        parts: list[Callable[[], Any]] = [self.in_flight, self.static, self.arrivals, self.step_ms, self.budget_ms]
        found: dict[str, Any] = {}
        for part in rotated(parts, number):
            if part == self.in_flight:
                found["read_gb_s"] = self._ceiling.gb_s()
            found[part.__name__] = part()
        return Round(**found)

    def in_flight(self) -> Rates:
        """All requests at once; each row goes to the next request when its answer ends."""
        began = before = time.perf_counter()
        streams = [self._submit(job.prompt, job.new_tokens) for job in self.requests]
        waiting, running = deque(streams), list[runtime.Stream]()
        full_s = []  # steps of all rows
        while waiting or running:
            for stream in running:  # the first takes a step, which gives all others their tokens too
                next(stream)
            now = time.perf_counter()
            if len(running) == self.rows:  # no row was free for a prompt
                full_s.append(now - before)
            before = now
            running = [stream for stream in running if not stream.finished]
            while waiting and (not running or waiting[0].results[0].token_ids):
                stream = waiting.popleft()
                next(stream)
                for _ in stream.results[0].token_ids[1:]:  # from the steps since its first token
                    next(stream)
                running += [] if stream.finished else [stream]
        spent = time.perf_counter() - began
        for number, (job, stream) in enumerate(zip(self.requests, streams, strict=True)):
            self._check(f"in flight, request {number}", job.prompt, stream.results[0].token_ids, job.new_tokens)
        if not full_s:
            raise ValueError(f"no step had all of {self.rows} rows: expected a longer --gen-len, got {self.gen_len}")
        return Rates(self.rows * len(full_s) / sum(full_s), self.tokens / spent)

    def static(self) -> Rates:
        """The same requests, a group of `rows` at a time, each group as long as its longest answer."""
        decoded, decode_s, spent = 0, 0.0, 0.0
        for start in range(0, len(self.requests), self.rows):
            group = self.requests[start : start + self.rows]
            longest = max(job.new_tokens for job in group)
            times_s = self._batch(f"static batch from request {start}", [job.prompt for job in group], longest)
            decoded += self.rows * (longest - 1)
            decode_s += times_s[-1] - times_s[0]
            spent += times_s[-1]
        return Rates(decoded / decode_s, self.tokens / spent)

    def arrivals(self) -> Arrivals:
        """Rows decode while prompts arrive, each prompt as soon as the one before has its first token."""
        arrived: list[runtime.Stream] = []
        times_s: list[float] = []
        with self._submit(self.running, self.gen_len) as pieces:
            for piece in pieces:
                if piece.index < len(self.running) - 1:  # a step's rows arrive together
                    continue
                times_s.append(time.perf_counter())
                # Not before a step has been taken: until then prompts are run one after the other. Nor after the last.
                if 1 < len(times_s) < self.gen_len and (not arrived or arrived[-1].results[0].token_ids):
                    arrived.append(self._submit(self.arriving[len(arrived) % ARRIVING], ARRIVAL_TOKENS))
        for number, result in enumerate(pieces.results):
            self._check(f"beside arrivals, row {number}", self.running[number], result.token_ids, self.gen_len)
        for number, stream in enumerate(arrived):
            for _ in stream:
                pass
            tokens = stream.results[0].token_ids
            self._check(f"arrival {number}", self.arriving[number % ARRIVING], tokens, ARRIVAL_TOKENS)
        return Arrivals(_gaps_ms(times_s[1:]), len(arrived))

    def step_ms(self) -> float:
        """A step of the same rows where no prompt arrives."""
        return statistics.median(_gaps_ms(self._batch("without arrivals", self.running, self.gen_len)))

    @property
    def budget_tokens(self) -> int:
        """Tokens of an arriving prompt that the engine processes between two steps."""
        return min(prefill_budget(self.model), len(self.arriving[0]))

    def budget_ms(self) -> float:
        """How long that share of the prompt takes where nothing else runs."""
        prompt = self.arriving[0]
        return self._batch("prompt alone", [prompt], 1)[0] * 1e3 * self.budget_tokens / len(prompt)

    @property
    def tokens(self) -> int:
        """The tokens of all requests' answers together."""
        return sum(job.new_tokens for job in self.requests)

    def _prompt(self, length: int, shift: int) -> list[int]:
        """A prompt that begins with a different word for each shift."""
        ids = prompt_ids(self.model.tokenizer, self.model.config.vocab, length + shift)
        return [ids[0], *ids[1 + shift :]][:length]

    def _submit(self, prompt: Any, new_tokens: int) -> runtime.Stream:
        return runtime.Engine(self.model).submit(prompt, max_new_tokens=new_tokens, ignore_eos=True, reuse=False)

    def _batch(self, where: str, prompts: Sequence[list[int]], new_tokens: int) -> list[float]:
        """A static batch; returns each step's arrival in seconds after the call."""
        request = run_request(self.model, prompts, new_tokens)
        for number, (prompt, tokens) in enumerate(zip(prompts, request.tokens, strict=True)):
            self._check(f"{where}, row {number}", prompt, tokens, new_tokens)
        return request.times_s

    def _check(self, where: str, prompt: Sequence[int], tokens: Sequence[int], new_tokens: int) -> None:
        alone = self._alone[tuple(prompt)][:new_tokens]
        for at, (given, expected) in enumerate(itertools.zip_longest(tokens, alone)):
            if given != expected:
                raise AnswerDiffers(f"{where}: token {at} is {given}, but {expected} where its request runs alone")


def _gaps_ms(times_s: Sequence[float]) -> list[float]:
    return [(b - a) * 1e3 for a, b in itertools.pairwise(times_s)]
