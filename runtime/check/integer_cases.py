"""The calls of products on matrices of integers with scales."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from runtime.check.case import Case
from runtime.check.catalogue import Make
from runtime.check.head_cases import head_case
from runtime.check.step_cases import advance_case, linear_case, projection_case
from runtime.kernels.scaled_matrix import ScaledMatrix


def of_integers(case: Case, weight: str) -> Case:
    """A case whose matrix `weight` becomes one of integers and scales, near its values; each a tensor among the
    inputs, so that guards surround both."""
    values = case.inputs.pop(weight).float()
    scale = values.abs().amax(1) / 127
    own = case.call

    def call(ops: Any, *args: Any, q: torch.Tensor, scale: torch.Tensor, **arguments: Any) -> None:
        own(ops, *args, **arguments, **{weight: ScaledMatrix(q, scale.float())})

    case.inputs |= {"q": (values / scale[:, None]).round().to(torch.int8), "scale": scale}
    return type(case)(**{field.name: getattr(case, field.name) for field in fields(case)} | {"call": call})


# A width in one piece, and widths in two: 96 and 208 columns.
CASES: dict[str, Make] = {
    "qkv_projection 64x128, branch, int8": lambda dtype: of_integers(
        projection_case("qkv_projection", 3, 64, 128, dtype, branched=True), "weight"
    ),
    "gated_mlp 37x96, int8": lambda dtype: of_integers(
        projection_case("gated_mlp", 8, 37, 96, dtype, branched=False), "gate_up"
    ),
    "residual_linear 130x208, residual, int8": lambda dtype: of_integers(
        linear_case(3, 130, 208, dtype, with_residual=True), "weight"
    ),
    "lm_head_argmax, int8": lambda dtype: of_integers(head_case(3, 101, 96, dtype, softcap=30.0), "table"),
    "advance, int8": lambda dtype: of_integers(advance_case(4, 96, dtype), "table"),
}
