"""The invariances: tokens do not depend on the batch, graph capture, the limits, earlier requests, the process or the
run; drawn tokens depend only on prompt, temperature and seed."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from runtime.api import load
from runtime.engine.speculation import can_speculate
from runtime.generation import generate, stream
from runtime.model import memory_plan
from runtime.model.model import Model
from runtime.model.rope import RopeTables
from runtime.parity.oracle import Oracle
from runtime.parity.records import Check, first_difference
from runtime.sampling.processors import without_processors

BATCHES = (2, 4, 8)
CHUNKS = (16, 100)
REPETITIONS = 100
TEMPERATURE = 0.8  # of drawn answers; the seed is the prompt's number
Answers = list[list[int]]


class Invariances:
    """The checks of one model on some prompts.

    Args:
        model: loaded with room for a batch of 8.
        source: what it was loaded from, for a fresh process; None skips that check.
        prompts: ids.
        expected: the tokens of each prompt alone, all of one length.
        largest_gap: the fp64 gap up to which another choice counts as a tie, in the one check whose 16-bit tokens may
            differ.
        oracle: gives the fp64 logits for that gap.
    """

    def __init__(
        self, model: Model, source: str | None, prompts: Answers, expected: Answers, largest_gap: float, oracle: Oracle
    ) -> None:
        self.model, self.source, self.prompts, self.expected = model, source, prompts, expected
        self.largest_gap, self.oracle, self.tokens = largest_gap, oracle, len(expected[0])
        self._options: Any = {"max_new_tokens": self.tokens, "ignore_eos": True}

    def checks(self) -> dict[str, Callable[[], Check]]:
        """The function that makes each check, by the check's name."""
        runs: dict[str, Callable[[str], Check]] = {f"batch of {size}": self._batch(size) for size in BATCHES}
        runs["captured and eager"] = self._eager
        runs["another max_seq_len"] = self._max_seq_len
        runs |= {f"prefill in chunks of {size}": self._chunks(size) for size in CHUNKS}
        runs["after a stream closed early"] = self._closed_early
        runs[f"{REPETITIONS} repetitions"] = self._repeated
        runs["fresh process"] = self._fresh_process
        runs["drawn, among greedy rows"] = self._drawn_among_greedy
        runs["drawn, in another order of arrival"] = self._drawn_in_reverse
        runs["drawn, with guesses"] = self._drawn_with_guesses
        runs["drawn, captured and eager"] = self._drawn_eager
        return {name: functools.partial(run, name) for name, run in runs.items()}

    def _alone(self, model: Model, prompts: Sequence[list[int]]) -> Answers:
        return [self._answer(model, prompt) for prompt in prompts]

    def _answer(self, model: Model, prompt: Any) -> list[int]:
        return list(generate(model, prompt, **self._options).token_ids)

    def _batch(self, size: int) -> Callable[[str], Check]:
        def run(name: str) -> Check:
            answers: Answers = []
            for start in range(0, len(self.prompts), size):
                rows = [self.prompts[(start + row) % len(self.prompts)] for row in range(size)]
                results = generate(self.model, rows, **self._options)
                answers += [list(result.token_ids) for result in results]
            return self._equal(name, answers)

        return run

    def _eager(self, name: str) -> Check:
        if self.model.device.type != "cuda":
            reason = "nothing is captured on a CPU, where --eager chooses other operations"
            return Check(name=name, passed=None, detail=reason)
        return self._equal(name, self._alone(self._captured_or_not, self.prompts))

    @property
    def _captured_or_not(self) -> Model:
        """The model with eager steps where it has captured ones, or the other way round."""
        return replace(self.model, runtime=replace(self.model.runtime, eager=not self.model.runtime.eager))

    def _max_seq_len(self, name: str) -> Check:
        config, limits = self.model.config, self.model.runtime
        longest = min(2 * limits.max_seq_len, config.max_position_embeddings)
        if longest == limits.max_seq_len:
            return Check(name=name, passed=None, detail=f"the model ends at {longest} tokens")
        limits = replace(limits, max_seq_len=longest, max_batch=1)
        other = replace(self.model, runtime=limits, rope=RopeTables(config, limits))
        return self._equal(name, self._alone(other, self.prompts))

    def _chunks(self, size: int) -> Callable[[str], Check]:
        def run(name: str) -> Check:
            limits = replace(self.model.runtime, prefill_chunk=size, max_batch=1)
            answers = self._alone(replace(self.model, runtime=limits), self.prompts)
            # Chunks of another size are matrix products of another shape, whose 16-bit sums round differently.
            return self._equal(name, answers, ties=self.model.runtime.dtype != "float32")

        return run

    def _closed_early(self, name: str) -> Check:
        answers = []
        for index, prompt in enumerate(self.prompts):
            with stream(self.model, self.prompts[index - 1], **self._options) as pieces:
                for _ in range(min(3, self.tokens)):
                    next(pieces)
            answers.append(self._answer(self.model, prompt))
        return self._equal(name, answers)

    def _repeated(self, name: str) -> Check:
        shortest = min(range(len(self.prompts)), key=lambda index: len(self.prompts[index]))
        answers = {tuple(self._answer(self.model, self.prompts[shortest])) for _ in range(REPETITIONS)}
        same = answers == {tuple(self.expected[shortest])}
        return Check(name=name, passed=same, detail=f"{len(answers)} distinct answer(s) of {self.tokens} tokens")

    def _fresh_process(self, name: str) -> Check:
        free, needed = memory_plan.available_bytes(self.model.device), self.model.plan.total
        if self.source is None or (free is not None and needed > free):
            reason = "the model has no source" if self.source is None else "no memory for another copy of the model"
            return Check(name=name, passed=None, detail=reason)
        job = {
            "source": self.source,
            "limits": asdict(self.model.runtime),
            "prompts": self.prompts,
            "tokens": self.tokens,
        }
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return Check(name=name, passed=False, detail=f"it ended with exit code {done.returncode}: {reason}")
        return self._equal(name, json.loads(done.stdout.splitlines()[-1]))

    def _draws(self, model: Model, **options: Any) -> Answers:
        """The drawn answer to each prompt, run one after the other."""
        options |= self._options | {"temperature": TEMPERATURE}
        answers: list[Any] = [generate(model, ids, **options, seed=number) for number, ids in enumerate(self.prompts)]
        return [list(answer.token_ids) for answer in answers]

    @functools.cached_property
    def _drawn(self) -> Answers:
        return self._draws(self.model)

    def _drawn_among_greedy(self, name: str) -> Check:
        """Drawn and greedy rows alternate in each batch; the greedy ones, too, must equal what they give alone."""
        half = self.model.runtime.max_batch // 2
        answers: Answers = []
        for start in range(0, len(self.prompts), half):
            numbers = range(start, min(start + half, len(self.prompts)))
            sampling: dict[str, Any] = {"temperature": [value for _ in numbers for value in (TEMPERATURE, 0.0)]}
            sampling["seed"] = [value for number in numbers for value in (number, None)]
            rows = [self.prompts[number] for number in numbers for _ in range(2)]
            answers += [list(result.token_ids) for result in generate(self.model, rows, **self._options, **sampling)]
        drawn, greedy = (self._equal(name, answers[at::2], of) for at, of in ((0, self._drawn), (1, self.expected)))
        detail = f"drawn {drawn.detail}, greedy {greedy.detail}"
        return Check(name=name, passed=bool(drawn.passed and greedy.passed), detail=detail)

    def _drawn_in_reverse(self, name: str) -> Check:
        """Prompts arrive in reverse order, each once the one before has its third token."""
        streams = []
        for number in reversed(range(len(self.prompts))):
            pieces = stream(self.model, self.prompts[number], **self._options, temperature=TEMPERATURE, seed=number)
            for _ in range(min(3, self.tokens)):
                next(pieces)
            streams.append(pieces)
        for pieces in streams:
            for _ in pieces:
                pass
        return self._equal(name, [list(pieces.results[0].token_ids) for pieces in reversed(streams)], self._drawn)

    def _drawn_with_guesses(self, name: str) -> Check:
        if not can_speculate(self.model):
            return Check(name=name, passed=None, detail="this model checks no guesses here")
        return self._equal(name, self._draws(self.model, speculate="prompt"), self._drawn)

    def _drawn_eager(self, name: str) -> Check:
        if self.model.device.type != "cuda":
            return self._eager(name)  # skips the check and says why
        return self._equal(name, self._draws(self._captured_or_not), self._drawn)

    def _equal(
        self, name: str, answers: Answers, expected_answers: Answers | None = None, *, ties: bool = False
    ) -> Check:
        """Compares answers with the greedy ones or `expected_answers`; they may cycle through the prompts, in order."""
        truth = self.expected if expected_answers is None else expected_answers
        different, gaps = 0, []
        for index, answer in enumerate(answers):
            prompt, expected = (each[index % len(self.prompts)] for each in (self.prompts, truth))
            at = first_difference(answer, expected)
            if at is not None:
                different += 1
                if ties:
                    true = self.oracle.logits(prompt + expected[:at], 1)[0]
                    gaps.append(abs(float(true[answer[at]] - true[expected[at]])))
        if gaps:
            detail = (
                f"{different} of {len(answers)} differ, largest fp64 gap {max(gaps):.3g} (bound {self.largest_gap:.3g})"
            )
            return Check(name=name, passed=max(gaps) <= self.largest_gap, detail=detail)
        return Check(name=name, passed=not different, detail=f"{len(answers) - different} of {len(answers)} equal")


def answer_request(job: dict[str, Any]) -> Answers:
    """What the fresh process runs: load the model and answer each prompt."""
    limits = job["limits"]
    names = ("device", "dtype", "max_seq_len", "max_batch", "eager", "threads", "quantize")
    options = {name: limits[name] for name in names}
    model = without_processors(load(job["source"], progress=False, **options))
    rows = [generate(model, prompt, max_new_tokens=job["tokens"], ignore_eos=True) for prompt in job["prompts"]]
    return [list(row.token_ids) for row in rows]


if __name__ == "__main__":
    print(json.dumps(answer_request(json.loads(sys.stdin.read()))))
