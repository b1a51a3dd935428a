"""Teacher forcing: decode steps on a given text instead of on the tokens that the model picked itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.engine.decode import stepper
from runtime.engine.prefill import prefill
from runtime.families.state import DecodeState, new_state
from runtime.kernels.advance import embed_torch
from runtime.model.model import Model


def force_token(model: Model, state: DecodeState, token: int) -> None:
    """Makes `token` the input of every row's next step."""
    state.token.fill_(token)
    state.x.copy_(embed_torch(model.weights.embedding, state.token, state.embed_scale))


class TeacherForcing:
    """A model's decode steps on given tokens, captured wherever `generate` captures its own."""

    def __init__(self, model: Model) -> None:
        self.model, self.state = model, new_state(model, 1, with_logits=True)

    @torch.inference_mode()
    def run(self, prompt: Sequence[int], text: Sequence[int]) -> tuple[list[int], torch.Tensor]:
        """What the model picks at each step of a given text.

        Args:
            prompt: ids for prefill.
            text: n ids; each step after the prefill reads one, so the last is not read.

        Returns:
            The n tokens picked, and the logits that they were picked from [n, vocab] in the model's dtype.
        """
        state = self.state
        state.reset()
        assert state.logits is not None
        picked, logits = [prefill(self.model, state, 0, prompt).clone()], [state.logits.clone()]
        for token in text[:-1]:
            force_token(self.model, state, token)
            stepper(self.model, state)()
            picked.append(state.token.clone())
            logits.append(state.logits.clone())
        return torch.cat(picked).tolist(), torch.cat(logits)
