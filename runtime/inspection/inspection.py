"""A look inside one request: the modules and their shapes, the prompt as the model sees it, the likeliest tokens at any
position, and greedy decoding step by step.

It runs the same prefill and decode step as `generate`, with one difference: the decode state also keeps the logits.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields

import torch

from runtime.engine import decode
from runtime.engine.non_finite import non_finite
from runtime.engine.prefill import logits, prefill, warm_up
from runtime.engine.prompt import Encoded, Prompt
from runtime.engine.request import check_length, read_prompt, whole_number
from runtime.engine.scheduler import check_open, scheduler_of
from runtime.errors import InvalidArgumentType
from runtime.families.state import DecodeState, new_state
from runtime.inspection.result import Candidate, Inspection, Module, Position, Step, Token
from runtime.kernels.argmax import NO_TOKEN, top_k
from runtime.model.config import ModelConfig
from runtime.model.model import Model


@torch.inference_mode()
def inspect(
    model: Model, prompt: Prompt | Encoded, top_k: int = 5, positions: Sequence[int] | None = None, steps: int = 0
) -> Inspection:
    """Look at a prompt and at the tokens that may follow it.

    Args:
        model: the model.
        prompt: one prompt in any form that `generate` takes.
        top_k: candidates to list at each position.
        positions: indices into the prompt's tokens, negative ones from its end; None means the last and, in a prompt
            of two tokens or more, the one before.
        steps: how many tokens to decode greedily; a stop token ends decoding early.

    Returns:
        The inspection.

    Raises:
        ValueError, TypeError: an argument is out of range; nothing has been changed.
        ModelClosed: the model has been closed.
        NonFiniteError: the logits of an inspected position are not finite.
    """
    if not isinstance(model, Model):
        raise InvalidArgumentType(f"expected a model before the prompt, got {type(model).__name__}")
    check_open(model)
    ids = read_prompt(model, prompt)
    top_k = whole_number("top_k", top_k, least=1, most=model.config.vocab)
    steps = whole_number("steps", steps, least=0)
    check_length(model, "prompt", len(ids), "steps", steps)
    if positions is None:
        positions = (-1, -2)[: len(ids)]
    if not isinstance(positions, (list, tuple, range)):
        raise InvalidArgumentType(f"positions must be a list of indices into the prompt, got {positions!r}")
    indices = [whole_number("a position", at, least=-len(ids), most=len(ids) - 1) % len(ids) for at in positions]

    with scheduler_of(model).alone():
        state = new_state(model, 1, stop_ids=model.config.stop_token_ids, with_logits=True)
        hidden = torch.empty(len(ids), model.config.hidden, dtype=model.dtype, device=model.device)
        warm_up(model, state)
        started = time.perf_counter()
        _check_finite(model, prefill(model, state, 0, ids, hidden_out=hidden), f"after the prompt's {len(ids)} tokens")
        time_ms = (time.perf_counter() - started) * 1e3
        assert state.logits is not None
        rows = logits(model, hidden[indices])
        rows[[at == len(ids) - 1 for at in indices]] = state.logits[0]  # what the first token was picked from
        inspected = [
            Position(at, _text(model, ids[at]), _candidates(model, row, top_k))
            for at, row in zip(indices, rows, strict=True)
        ]
        step = decode.stepper(model, state)
        decoded: list[Step] = []
        while len(decoded) < steps:
            if decoded:
                started = time.perf_counter()
                step()
                _check_finite(model, state.token, f"of step {len(decoded)}")
                time_ms = (time.perf_counter() - started) * 1e3
            decoded.append(_step(model, state, time_ms))
            if state.done.item():
                break

    return Inspection(
        model=model.name,
        family=model.config.family,
        device=str(model.device),
        dtype=model.runtime.dtype,
        parameters=model.weights.parameters,
        layers=_layer_kinds(model.config),
        structure=_structure(model),
        prompt=tuple(Token(token, _text(model, token)) for token in ids),
        logits_shape=(1, len(ids), model.config.vocab),
        positions=tuple(inspected),
        steps=tuple(decoded),
        text=model.tokenizer.decode([step.id for step in decoded]) if model.tokenizer else "",
    )


def _text(model: Model, token: int) -> str:
    return model.tokenizer.piece(token) if model.tokenizer else ""


def _check_finite(model: Model, token: torch.Tensor, which: str) -> None:
    """Waits for a picked token [1] and raises if it came from logits that are not finite."""
    if token.item() == NO_TOKEN:
        raise non_finite(model, which)


def _candidates(model: Model, row: torch.Tensor, count: int) -> tuple[Candidate, ...]:
    """The `count` likeliest tokens of a row of logits [vocab]."""
    ids, values = top_k(row[None], count)
    if not values[0, 0].isfinite():
        raise non_finite(model, "of an inspected position")
    logits, probabilities = row.float()[ids[0]].tolist(), row.float().softmax(0)[ids[0]].tolist()
    return tuple(
        Candidate(rank, token, _text(model, token), logit, probability)
        for rank, (token, logit, probability) in enumerate(
            zip(ids[0].tolist(), logits, probabilities, strict=True), start=1
        )
    )


def _step(model: Model, state: DecodeState, time_ms: float) -> Step:
    assert state.logits is not None
    first, second = _candidates(model, state.logits[0], 2)
    assert first.id == state.token.item(), "the step picks the argmax of its logits"
    return Step(first.id, first.text, first.logit - second.logit, second, first.probability, time_ms)


def _layer_kinds(config: ModelConfig) -> tuple[str, ...]:
    kinds = Counter((layer.window, layer.rope) for layer in config.layers)
    return tuple(
        f"{count} layers "
        + ("that attend to everything" if window is None else f"with a window of {window} tokens")
        + f", rotary base {rope.theta:,.0f}"
        + (f" scaled by {rope.factor:g}" if rope.factor != 1 else "")
        for (window, rope), count in kinds.items()
    )


def _structure(model: Model) -> tuple[Module, ...]:
    config, weights = model.config, model.weights
    first = config.layers[0]
    notes = {
        "qkv": f"{first.heads} query, {first.kv_heads} key and {first.kv_heads} value heads of {first.head_dim}",
        "gate_up": "gate rows, then up rows",
    }
    layer = weights.layers[0]
    named = [(field.name, getattr(layer, field.name)) for field in fields(layer)]
    return (
        Module("embedding", tuple(weights.embedding.shape), "also the LM head" if config.tied else ""),
        *(
            Module(f"layers.*.{name}", tuple(weight.shape), notes.get(name, ""))
            for name, weight in named
            if weight is not None
        ),
        Module("final_norm", tuple(weights.final_norm.shape)),
        *(() if config.tied else (Module("head", tuple(weights.head.shape)),)),
    )
