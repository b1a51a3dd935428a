"""Decode steps on a text of the caller's choice, and each side's distance from fp64 at every one of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.engine.decode import stepper
from runtime.engine.prefill import prefill
from runtime.families.state import DecodeState, new_state
from runtime.kernels.advance import embed_reference
from runtime.model.model import Model
from runtime.parity.records import Divergence, PromptRecord


def force(model: Model, state: DecodeState, token: int) -> None:
    """Puts a token of the caller's choice where every row's next step takes it up."""
    state.token.fill_(token)
    state.x.copy_(embed_reference(model.weights.embedding, state.token, state.embed_scale))


class Forced:
    """A model's decode steps, captured where its runs are, with the tokens between them given."""

    def __init__(self, model: Model) -> None:
        self.model, self.state = model, new_state(model, 1, with_logits=True)

    @torch.inference_mode()
    def run(self, prompt: Sequence[int], text: Sequence[int]) -> tuple[list[int], torch.Tensor]:
        """What the model would pick at each step of a text.

        Args:
            prompt: ids for prefill.
            text: n ids, of which each step but the first takes up one: the last is not needed.

        Returns:
            The n tokens picked, and the logits that they were picked from [n, vocab] in the model's dtype.
        """
        state = self.state
        state.reset()
        assert state.logits is not None
        picked, logits = [prefill(self.model, state, 0, prompt).clone()], [state.logits.clone()]
        for token in text[:-1]:
            force(self.model, state, token)
            stepper(self.model, state)()
            picked.append(state.token.clone())
            logits.append(state.logits.clone())
        return torch.cat(picked).tolist(), torch.cat(logits)


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
        free, theirs, forced: n tokens each: ours free-running, Hugging Face's, ours after Hugging Face's.
        our_logits, their_logits, truth: [n, vocab] after Hugging Face's tokens; truth in fp64.
        name, suite: of the prompt.
    """
    margins, errors, largest, divergences = [], ([], []), ([], []), []  # type: ignore[var-annotated]
    for step, true in enumerate(truth):
        best = true.topk(2).indices
        margin = true[best[0]] - true[best[1]]
        margins.append(float(margin))
        for side, logits in enumerate((our_logits[step].double(), their_logits[step].double())):
            errors[side].append(float((logits[best[0]] - logits[best[1]] - margin).abs()))
            largest[side].append(float((logits - true).abs().max()))
        pair = [forced[step], theirs[step]]
        if pair[0] != pair[1]:
            ours, its, exact = (
                tuple(row[step, pair].double().tolist()) for row in (our_logits, their_logits, truth)
            )  # fmt: skip
            divergences.append(
                Divergence(
                    step=step,
                    ours=pair[0],
                    theirs=pair[1],
                    first=not divergences,
                    our_pair=ours,
                    their_pair=its,
                    true_pair=exact,
                    gap=abs(exact[0] - exact[1]),
                )
            )
    return PromptRecord(
        name=name,
        suite=suite,
        prompt_ids=prompt,
        ours=free,
        theirs=theirs,
        forced=forced,
        # On a CPU argmax returns the first maximum; a GPU does not promise which.
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
