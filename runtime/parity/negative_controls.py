"""The power to fail, and the fp32 run beside a 16-bit one.

Rounding to 16 bits hides a fault that moves logits by less: a window one key short changes the demo model's by as much
as rounding does. The same code on the same weights in fp32 has errors a thousand times smaller and shows it, so a
16-bit audit runs a few tokens in fp32 too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.generation import generate
from runtime.model.model import Model
from runtime.parity.criterion import judge, runs_its_operations
from runtime.parity.faults import faulty_models
from runtime.parity.forced import Forced, compare
from runtime.parity.hugging_face import greedy_logits
from runtime.parity.records import Fault, Finding, PromptRecord
from runtime.parity.sides import Sides

TOKENS = 16


@dataclass(repr=False)
class Probe:
    """A model, and for a few texts Hugging Face's tokens, its logits and the truth: what any copy of the model, healthy
    or not, is compared with."""

    model: Model
    prompts: list[list[int]]
    answers: list[tuple[list[int], torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, model: Model, sides: Sides, prompts: Sequence[list[int]], tokens: int) -> Probe:
        answers = []
        for prompt in prompts:
            expected, logits = greedy_logits(sides.theirs, prompt, tokens)
            answers.append((expected, logits, sides.oracle.logits(prompt + expected[:-1], tokens)))
        return cls(model, list(prompts), answers)

    def findings(self, model: Model | None = None) -> list[Finding]:
        """The criterion on this model, or on a copy of it."""
        tested = model or self.model
        forced, records = Forced(tested), list[PromptRecord]()
        for prompt, (expected, their_logits, truth) in zip(self.prompts, self.answers, strict=True):
            free = generate(tested, prompt, max_new_tokens=len(expected), ignore_eos=True).token_ids
            picked, logits = forced.run(prompt, expected)
            records.append(compare(prompt, free, expected, picked, logits, their_logits, truth))
        return judge(records, tested.runtime.dtype, its_operations=runs_its_operations(tested))


def probe_prompts(prompts: Sequence[list[int]], model: Model) -> list[list[int]]:
    """The shortest prompt, and the shortest of those that pass the sliding window if any does."""
    windows = [window for window in model.config.windows if window is not None]
    past = [prompt for prompt in prompts if windows and len(prompt) > max(windows)]
    return [min(of, key=len) for of in (prompts, past) if of]


def planted(probes: Sequence[Probe]) -> list[Fault]:
    """Plants each fault in each probe's model; a fault is refused where one of them refuses it."""
    refusals: dict[str, list[str]] = {}
    for probe in probes:
        longest = max(map(len, probe.prompts)) + len(probe.answers[0][0])
        for name, model in faulty_models(probe.model, longest):
            broken = [found.part for found in probe.findings(model) if found.passed is False]
            refusals.setdefault(name, [])
            refusals[name] += [f"{probe.model.runtime.dtype}: {', '.join(broken)}"] if broken else []
    return [
        Fault(name=name, refused=bool(broken), detail="; ".join(broken) or "not refused")
        for name, broken in refusals.items()
    ]
