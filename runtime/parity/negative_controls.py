"""Negative controls: faults planted in copies of the model, which the criterion must refuse.

Rounding to 16 bits hides faults that move logits by less than the rounding itself: a window one key short changes the
demo model's logits by about as much. The same code on the same weights in fp32 has errors a thousand times smaller and
reveals the fault. So a 16-bit audit also runs a few tokens, and every planted fault, in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.generation import generate
from runtime.model.model import Model
from runtime.parity.comparison import Comparison, compare
from runtime.parity.criterion import judge, runs_same_operations
from runtime.parity.faults import faulty_models
from runtime.parity.hugging_face import greedy_logits
from runtime.parity.records import Fault, Finding, PromptRecord
from runtime.parity.teacher_forcing import TeacherForcing

TOKENS = 16


@dataclass(repr=False)
class Control:
    """A model and, for a few prompts, Hugging Face's tokens and logits and the fp64 logits: what copies of the model,
    healthy or faulty, are judged against."""

    model: Model
    prompts: list[list[int]]
    references: list[tuple[list[int], torch.Tensor, torch.Tensor]]

    @classmethod
    def on_prompts(cls, model: Model, comparison: Comparison, prompts: Sequence[list[int]], tokens: int) -> Control:
        references = []
        for prompt in prompts:
            expected, logits = greedy_logits(comparison.theirs, prompt, tokens)
            references.append((expected, logits, comparison.oracle.logits(prompt + expected[:-1], tokens)))
        return cls(model, list(prompts), references)

    def findings(self, model: Model | None = None) -> list[Finding]:
        """The criterion's findings on the model itself, or on a copy of it."""
        tested = model or self.model
        teacher_forcing, records = TeacherForcing(tested), list[PromptRecord]()
        for prompt, (expected, their_logits, truth) in zip(self.prompts, self.references, strict=True):
            free = list(generate(tested, prompt, max_new_tokens=len(expected), ignore_eos=True).token_ids)
            picked, logits = teacher_forcing.run(prompt, expected)
            records.append(compare(prompt, free, expected, picked, logits, their_logits, truth))
        return judge(records, tested.runtime.dtype, same_operations=runs_same_operations(tested))


def control_prompts(prompts: Sequence[list[int]], model: Model) -> list[list[int]]:
    """The shortest prompt, and the shortest of those longer than the sliding window, if there are any."""
    windows = [layer.window for layer in model.config.layers if layer.window is not None]
    past = [prompt for prompt in prompts if windows and len(prompt) > max(windows)]
    return [min(group, key=len) for group in (prompts, past) if group]


def negative_controls(controls: Sequence[Control]) -> list[Fault]:
    """Plants each fault in a copy of each control's model; a fault counts as refused where one control refuses it."""
    refusals: dict[str, list[str]] = {}
    for control in controls:
        longest = max(map(len, control.prompts)) + len(control.references[0][0])
        for name, model in faulty_models(control.model, longest):
            broken = [finding.part for finding in control.findings(model) if finding.passed is False]
            refusals.setdefault(name, [])
            refusals[name] += [f"{control.model.runtime.dtype}: {', '.join(broken)}"] if broken else []
    return [
        Fault(name=name, refused=bool(broken), detail="; ".join(broken) or "not refused")
        for name, broken in refusals.items()
    ]
