"""The two sides of a comparison and the truth between them, on one text after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from runtime.generation import generate
from runtime.model.model import Model
from runtime.parity.forced import Forced, compare
from runtime.parity.hugging_face import attention_of, greedy, greedy_batch, greedy_logits
from runtime.parity.oracle import Oracle
from runtime.parity.records import PromptRecord, Variant, first_difference

# How Hugging Face's `generate` is told which cache to use; compiling would compare another thing.
CACHES: dict[str, dict[str, Any]] = {
    "hf": {},
    "hf-static": {"cache_implementation": "static", "disable_compile": True},
}
CACHE_NAMES = {"hf": "dynamic cache", "hf-static": "static cache"}
BATCH = 8  # prompts that Hugging Face runs together for the base rate


@dataclass(repr=False)
class Sides:
    """Hugging Face's model and the fp64 one; ours comes with each call, since faults are planted in it."""

    theirs: Any
    oracle: Oracle
    cache: str = "hf"

    def record(
        self,
        model: Model,
        forced: Forced,
        prompt: list[int],
        tokens: int,
        variants: dict[str, list[int]] | None = None,
        **named: str,
    ) -> PromptRecord:
        """Everything about one prompt.

        Args:
            model, forced: our side; `forced` has its decode steps.
            prompt: ids.
            tokens: of the answer.
            variants: what Hugging Face answered when run in other ways.
            named: name and suite of the prompt.
        """
        expected, their_logits = greedy_logits(self.theirs, prompt, tokens, **CACHES[self.cache])
        free = generate(model, prompt, max_new_tokens=tokens, ignore_eos=True).token_ids
        picked, our_logits = forced.run(prompt, expected)
        truth = self.oracle.logits(prompt + expected[:-1], tokens)
        record = compare(prompt, free, expected, picked, our_logits, their_logits, truth, **named)
        found = {name: _variant(run, expected, truth) for name, run in (variants or {}).items()}
        return record.model_copy(update={"variants": found})

    def variants(self, model: Model, prompt: list[int], tokens: int) -> dict[str, list[int]]:
        """Hugging Face's tokens with the other kind of cache and the other implementation of attention."""
        other = next(cache for cache in CACHES if cache != self.cache)
        found = {CACHE_NAMES[other]: greedy(self.theirs, prompt, tokens, **CACHES[other])}
        own = attention_of(model.config)
        if own == "sdpa":  # Gemma 2's softcap is lost in it
            self.theirs.set_attn_implementation("eager")
            try:
                found["eager attention"] = greedy(self.theirs, prompt, tokens, **CACHES[self.cache])
            finally:
                self.theirs.set_attn_implementation(own)
        return found

    def together(self, prompts: Sequence[list[int]], tokens: int) -> list[dict[str, list[int]]]:
        """Hugging Face's tokens of up to eight prompts in one batch, padded on the left."""
        return [{f"batch of {BATCH}": run} for run in greedy_batch(self.theirs, list(prompts), tokens)]


def _variant(run: list[int], expected: list[int], truth: torch.Tensor) -> Variant:
    at = first_difference(run, expected)
    gap = 0.0 if at is None else abs(float(truth[at, run[at]] - truth[at, expected[at]]))
    return Variant(tokens=run, parts_at=at, gap=gap)
