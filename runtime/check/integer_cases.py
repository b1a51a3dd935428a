"""The calls of products on matrices of integers with scales."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import torch

from runtime.check.case import Case
from runtime.check.catalogue import Make
from runtime.check.head_cases import head_case
from runtime.check.step_cases import advance_case, linear_case, projection_case
from runtime.kernels.scaled_matrix import GROUP, ScaledMatrix

FORMATS = ("int8", "int4")


def of_integers(case: Case, weight: str, form: str) -> Case:
    """A case whose matrix `weight` becomes one of integers and scales, near its values; each a tensor among the
    inputs, so that guards surround both."""
    matrix = near(case.inputs.pop(weight).float(), form)
    own = case.call

    def call(ops: Any, *args: Any, q: torch.Tensor, scale: torch.Tensor, **arguments: Any) -> None:
        # Cases cast what is in floating point for their fp64 truth; int8's scales are fp32.
        scale = scale.float() if scale.is_floating_point() else scale
        own(ops, *args, **arguments, **{weight: ScaledMatrix(q, scale)})

    case.inputs |= {"q": matrix.q, "scale": matrix.scale}
    return type(case)(**{field.name: getattr(case, field.name) for field in fields(case)} | {"call": call})


def near(values: torch.Tensor, form: str) -> ScaledMatrix:
    """A matrix of integers near values [outputs, columns] in fp32."""
    if form == "int8":
        scale = values.abs().amax(1) / 127
        return ScaledMatrix((values / scale[:, None]).round().to(torch.int8), scale)
    groups = values.view(len(values), -1, GROUP)
    d = (groups.abs().amax(2) / 7).half()
    q = (groups / d[..., None]).round().clamp(-8, 7) + 8
    return ScaledMatrix.of_groups(q.to(torch.uint8).view_as(values), d)


def _projection(name: str, weight: str, sizes: tuple[int, int, int], form: str, dtype: torch.dtype) -> Case:
    return of_integers(projection_case(name, *sizes, dtype, branched=name == "qkv_projection"), weight, form)


def _linear(sizes: tuple[int, int, int], form: str, dtype: torch.dtype) -> Case:
    return of_integers(linear_case(*sizes, dtype, with_residual=True), "weight", form)


def _head(sizes: tuple[int, int, int], form: str, dtype: torch.dtype) -> Case:
    return of_integers(head_case(*sizes, dtype, softcap=30.0), "table", form)


def _advance(width: int, form: str, dtype: torch.dtype) -> Case:
    return of_integers(advance_case(4, width, dtype), "table", form)


# Rows, outputs and columns, of which some are no power of two: they come in two pieces. int4 has whole words.
CASES: dict[str, Make] = {
    "qkv_projection 20x128, branch, int8": partial(_projection, "qkv_projection", "weight", (3, 20, 128), "int8"),
    "qkv_projection 20x128, branch, int4": partial(_projection, "qkv_projection", "weight", (3, 20, 128), "int4"),
    "gated_mlp 9x96, int8": partial(_projection, "gated_mlp", "gate_up", (4, 9, 96), "int8"),
    "gated_mlp 9x384, int4": partial(_projection, "gated_mlp", "gate_up", (4, 9, 384), "int4"),
    "residual_linear 18x208, residual, int8": partial(_linear, (3, 18, 208), "int8"),
    "residual_linear 18x640, residual, int4": partial(_linear, (3, 18, 640), "int4"),
    "lm_head_argmax, int8": partial(_head, (2, 37, 96), "int8"),
    "lm_head_argmax, int4": partial(_head, (2, 37, 128), "int4"),
    "advance, int8": partial(_advance, 96, "int8"),
    "advance, int4": partial(_advance, 384, "int4"),
}
