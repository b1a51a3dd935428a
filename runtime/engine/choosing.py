"""An answer's own choice of a token, which replaces the head's pick: for a prompt's first token here, for later tokens
between the two parts of a step (decode.choosing_stepper), and for guessed tokens in guesses.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.engine.answer import Answer
from runtime.engine.first_token import make_ready
from runtime.engine.request import Request
from runtime.families.state import DecodeState
from runtime.kernels.argmax import NO_TOKEN
from runtime.model.model import Model
from runtime.sampling.choice import Choice, draw
from runtime.sampling.grammar import Grammars
from runtime.sampling.params import SamplingParams
from runtime.sampling.processors import Ends, processors_of


def choice_of(
    model: Model, request: Request, sampling: SamplingParams, ids: Sequence[int], stop_ids: Sequence[int]
) -> Choice | None:
    """What chooses an answer's tokens from all logits; None where the head's picks are taken."""
    ends = Ends(ids, request.max_new_tokens, stop_ids)
    processors = processors_of(sampling, model.config.processors, ends, request.logits_processors, model.device)
    grammar = None
    if request.response_format is not None:
        assert model.tokenizer is not None, "checked with the request"
        # One per model; setdefault is atomic, so that threads share it.
        grammars = vars(model).setdefault("_grammars", Grammars(model.tokenizer, model.config.stop_token_ids))
        grammar = grammars.compile(request.response_format)
    if not (processors or grammar or sampling.filters or sampling.logprobs is not None):
        return None
    return Choice(sampling, ids, processors, grammar)


def chosen(answer: Answer, token: int | None, logits: torch.Tensor) -> int:
    """The token that an answer chooses, as `Choice.choose`. A choice that fails ends that answer, with the error."""
    assert answer.choice is not None
    try:
        return answer.choice.choose(token, logits)
    except Exception as error:
        answer.fail(error)
        return NO_TOKEN if token is None else token


@torch.inference_mode()
def choose_first(model: Model, state: DecodeState, row: int, answer: Answer, source: int) -> None:
    """Replaces the first token of a row.

    Args:
        model: the model.
        state: one with logits; of the row, token, position, done and x are written.
        row: the prompt's row, or a copy of it.
        answer: the row's; without a choice of its own it draws or picks by its own sampling parameters.
        source: the row of the prompt, which has the logits.
    """
    assert state.logits is not None
    logits, token = state.logits[source], int(state.token[row])
    if answer.choice:
        token = chosen(answer, token if row == source or token == NO_TOKEN else None, logits)
    elif token != NO_TOKEN:
        token = draw(logits.float(), answer.sampling, len(answer.prompt) - 1)
    at, end, picked = (torch.tensor([n], device=model.device) for n in (row, len(answer.prompt), token))
    make_ready(model, state, at, end, picked, None)
