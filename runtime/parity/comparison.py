"""The comparison of this runtime with Hugging Face and the fp64 oracle, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from runtime.generation import generate
from runtime.hugging_face.shared_weights import attention_of
from runtime.model.model import Model
from runtime.parity.hugging_face import greedy, greedy_batch, greedy_logits
from runtime.parity.oracle import Oracle
from runtime.parity.records import Divergence, PromptRecord, Variant, first_difference
from runtime.parity.teacher_forcing import TeacherForcing

# Arguments of Hugging Face's `generate` that choose its cache; with a static one it would compile its operations.
CACHES: dict[str, dict[str, Any]] = {
    "hf": {},
    "hf-static": {"cache_implementation": "static", "disable_compile": True},
}
CACHE_NAMES = {"hf": "dynamic cache", "hf-static": "static cache"}
BATCH = 8  # prompts that Hugging Face runs together for the base rate


@dataclass(repr=False)
class Comparison:
    """Hugging Face's model and the fp64 oracle. Our model is an argument of each call, since faults are planted in
    copies of it."""

    theirs: Any
    oracle: Oracle
    cache: str = "hf"

    def record(
        self,
        model: Model,
        teacher_forcing: TeacherForcing,
        prompt: list[int],
        tokens: int,
        variants: dict[str, list[int]] | None = None,
        **named: str,
    ) -> PromptRecord:
        """Run one prompt in this runtime, in Hugging Face and in fp64.

        Args:
            model, teacher_forcing: our model and its teacher-forced decode steps.
            prompt: ids.
            tokens: length of the answer.
            variants: Hugging Face's answers when run in other ways.
            named: name and suite of the prompt.
        """
        expected, their_logits = greedy_logits(self.theirs, prompt, tokens, **CACHES[self.cache])
        free = list(generate(model, prompt, max_new_tokens=tokens, ignore_eos=True).token_ids)
        picked, our_logits = teacher_forcing.run(prompt, expected)
        truth = self.oracle.logits(prompt + expected[:-1], tokens)
        record = compare(prompt, free, expected, picked, our_logits, their_logits, truth, **named)
        compared = {name: _variant(answer, expected, truth) for name, answer in (variants or {}).items()}
        return record.model_copy(update={"variants": compared})

    def variants(self, model: Model, prompt: list[int], tokens: int) -> dict[str, list[int]]:
        """Hugging Face's tokens with the other kind of cache and the other implementation of attention."""
        other = next(cache for cache in CACHES if cache != self.cache)
        answers = {CACHE_NAMES[other]: greedy(self.theirs, prompt, tokens, **CACHES[other])}
        own = attention_of(model.config)
        if own == "sdpa":  # Gemma 2's reference is eager already
            self.theirs.set_attn_implementation("eager")
            try:
                answers["eager attention"] = greedy(self.theirs, prompt, tokens, **CACHES[self.cache])
            finally:
                self.theirs.set_attn_implementation(own)
        return answers

    def batch_variants(self, prompts: Sequence[list[int]], tokens: int) -> list[dict[str, list[int]]]:
        """Hugging Face's tokens for up to eight prompts in one left-padded batch."""
        return [{f"batch of {BATCH}": answer} for answer in greedy_batch(self.theirs, list(prompts), tokens)]


def _variant(answer: list[int], expected: list[int], truth: torch.Tensor) -> Variant:
    at = first_difference(answer, expected)
    gap = 0.0 if at is None else abs(float(truth[at, answer[at]] - truth[at, expected[at]]))
    return Variant(tokens=answer, parts_at=at, gap=gap)


@torch.inference_mode()
def compare(
    prompt: list[int],
    free: list[int],
    theirs: list[int],
    forced: list[int],
    our_logits: torch.Tensor,
    their_logits: torch.Tensor,
    truth: torch.Tensor,
    *,
    name: str = "",
    suite: str = "",
) -> PromptRecord:
    """One prompt's record.

    Args:
        prompt: its ids.
        free, theirs, forced: n tokens each: ours free-running, Hugging Face's, ours teacher-forced on Hugging Face's.
        our_logits, their_logits, truth: [n, vocab] after Hugging Face's tokens; truth in fp64.
        name, suite: of the prompt.
    """
    margins, errors, largest, divergences = [], ([], []), ([], []), []  # type: ignore[var-annotated]
    for step, true in enumerate(truth):
        top, second = true.topk(2).indices
        margin = true[top] - true[second]
        margins.append(float(margin))
        for side, logits in enumerate((our_logits[step].double(), their_logits[step].double())):
            errors[side].append(float((logits[top] - logits[second] - margin).abs()))
            largest[side].append(float((logits - true).abs().max()))
        pair = [forced[step], theirs[step]]
        if pair[0] != pair[1]:
            our_pair, their_pair, true_pair = (
                tuple(row[step, pair].double().tolist()) for row in (our_logits, their_logits, truth)
            )
            divergences.append(
                Divergence(
                    step=step,
                    ours=pair[0],
                    theirs=pair[1],
                    first=not divergences,
                    our_pair=our_pair,
                    their_pair=their_pair,
                    true_pair=true_pair,
                    gap=abs(true_pair[0] - true_pair[1]),
                )
            )
    return PromptRecord(
        name=name,
        suite=suite,
        prompt_ids=prompt,
        ours=free,
        theirs=theirs,
        forced=forced,
        # On the CPU, since argmax returns the first maximum there; on a GPU it may return any.
        not_the_largest=[
            step for step, row in enumerate(our_logits) if int(row.float().cpu().argmax()) != forced[step]
        ],
        margins=margins,
        our_errors=errors[0],
        their_errors=errors[1],
        our_logit_errors=largest[0],
        their_logit_errors=largest[1],
        divergences=divergences,
    )
