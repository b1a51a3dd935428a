"""Faults that an audit plants in a copy of the model, to show that it would have refused them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from runtime.model.model import Model
from runtime.model.rope import RopeTables


def variant_of(model: Model, **changed: Any) -> Model:
    """The same weights under other limits or with other parts, and with a state of its own."""
    return replace(model, **changed)


def faulty_models(model: Model, longest: int) -> Iterator[tuple[str, Model]]:
    """Copies of a model that share its weights, each with one fault.

    Args:
        model: the healthy one.
        longest: tokens of the longest text that they will see; a window that it does not pass is left alone.
    """
    planted: dict[str, Callable[[Model], Model]] = {
        "w instead of 1 + w in one norm": _wrong_norm,
        "rotary base 1 % too large": _wrong_rotary,
    }
    if any(window is not None and 1 < window < longest for window in model.config.windows):
        planted["window one key short"] = _short_window
    if model.config.final_softcap is not None:
        planted["softcap skipped"] = lambda of: variant_of(of, config=replace(of.config, final_softcap=None))
    for name, plant in planted.items():
        yield name, plant(model)


def _wrong_norm(model: Model) -> Model:
    layers = list(model.weights.layers)
    middle = layers[len(layers) // 2]
    layers[len(layers) // 2] = replace(middle, attention_norm=middle.attention_norm - 1)
    return variant_of(model, weights=replace(model.weights, layers=tuple(layers)))


def _wrong_rotary(model: Model) -> Model:
    ropes = tuple(replace(rope, theta=rope.theta * 1.01) for rope in model.config.rope)
    config = replace(model.config, rope=ropes)
    return variant_of(model, config=config, rope=RopeTables(config, model.runtime))


def _short_window(model: Model) -> Model:
    windows = tuple(None if window is None else window - 1 for window in model.config.windows)
    return variant_of(model, config=replace(model.config, windows=windows))
