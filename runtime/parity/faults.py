"""Faults that an audit plants in copies of the model, to show that it would refuse them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from runtime.model.model import Model
from runtime.model.rope import RopeTables
from runtime.parity.block_faults import misread


def faulty_models(model: Model, longest: int) -> Iterator[tuple[str, Model]]:
    """Copies of a model that share its weights, each with one fault.

    Args:
        model: the healthy one.
        longest: tokens of the longest text that they will read; a window is left alone unless it is shorter.
    """
    planted: dict[str, Callable[[Model], Model]] = {
        "w instead of 1 + w in one norm": _wrong_norm,
        "rotary base 1 % too large": _wrong_rotary,
    }
    if any(layer.window is not None and 1 < layer.window < longest for layer in model.config.layers):
        planted["window one key short"] = _short_window
    if model.config.final_softcap is not None:
        planted["softcap skipped"] = lambda model: replace(model, config=replace(model.config, final_softcap=None))
    for name, plant in planted.items():
        yield name, plant(model)
    middle = len(model.weights.layers) // 2
    matrix = model.weights.layers[middle].down
    if not isinstance(matrix, torch.Tensor):
        right = matrix.dequantized()
        for name, values in misread(matrix).items():
            if torch.equal(values, right):  # the fault changes nothing, for instance where all scales are equal
                continue
            layers = list(model.weights.layers)
            layers[middle] = replace(layers[middle], down=values)
            yield f"{name} in one matrix", replace(model, weights=replace(model.weights, layers=tuple(layers)))


def _wrong_norm(model: Model) -> Model:
    layers = list(model.weights.layers)
    middle = layers[len(layers) // 2]
    layers[len(layers) // 2] = replace(middle, attention_norm=middle.attention_norm - 1)
    return replace(model, weights=replace(model.weights, layers=tuple(layers)))


def _wrong_rotary(model: Model) -> Model:
    layers = (replace(layer, rope=replace(layer.rope, theta=layer.rope.theta * 1.01)) for layer in model.config.layers)
    config = replace(model.config, layers=tuple(layers))
    return replace(model, config=config, rope=RopeTables(config, model.runtime))


def _short_window(model: Model) -> Model:
    layers = (
        layer if layer.window is None else replace(layer, window=layer.window - 1) for layer in model.config.layers
    )
    return replace(model, config=replace(model.config, layers=tuple(layers)))
