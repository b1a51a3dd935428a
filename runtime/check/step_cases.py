"""The inputs of the operations of a step but for attention and the head."""

from __future__ import annotations

import torch

from runtime.check.case import EPS, Case, random, unwritten
from runtime.kernels.argmax import NO_TOKEN
from runtime.kernels.ops import Ops


def branch(rows: int, width: int, dtype: torch.dtype, branched: bool) -> dict[str, torch.Tensor]:
    """The inputs that a branch adds to a kernel."""
    if not branched:
        return {}
    return {"branch": random(rows, width, dtype=dtype), "branch_norm": random(width, dtype=dtype, scale=0.1)}


def norm_case(rows: int, width: int, dtype: torch.dtype, with_residual: bool) -> Case:
    inputs = {
        "x": random(rows, width, dtype=dtype),
        "weight": random(width, dtype=dtype, scale=0.1),
        "residual": random(rows, width, dtype=dtype) if with_residual else None,
    }
    return Case(Ops.rms_norm, inputs, {"out": (width,)}, rows, dtype, options={"eps": EPS})


def projection_case(name: str, rows: int, outputs: int, width: int, dtype: torch.dtype, branched: bool) -> Case:
    """qkv_projection, or gated_mlp with twice the weights."""
    weight, matrices = {"qkv_projection": ("weight", 1), "gated_mlp": ("gate_up", 2)}[name]
    inputs = {
        "x": random(rows, width, dtype=dtype),
        "norm_weight": random(width, dtype=dtype, scale=0.1),
        weight: random(outputs * matrices, width, dtype=dtype, scale=width**-0.5),
    } | branch(rows, width, dtype, branched)
    shapes = {"out": (outputs,)} | ({"residual_out": (width,)} if branched else {})
    return Case(getattr(Ops, name), inputs, shapes, rows, dtype, options={"eps": EPS})


def linear_case(rows: int, outputs: int, width: int, dtype: torch.dtype, with_residual: bool) -> Case:
    inputs = {
        "x": random(rows, width, dtype=dtype),
        "weight": random(outputs, width, dtype=dtype, scale=width**-0.5),
        "residual": random(rows, outputs, dtype=dtype) if with_residual else None,
    }
    return Case(Ops.residual_linear, inputs, {"out": (outputs,)}, rows, dtype)


def far_below_zero_case(dtype: torch.dtype) -> Case:
    """A gated MLP whose gates lie from -4 to -1: there tanh's GELU and the exact one part by several per cent, and
    1 + tanh cancels."""
    rows, outputs, width = 3, 64, 84
    case = projection_case("gated_mlp", rows, outputs, width, dtype, branched=False)
    x, gate_up = case.inputs["x"], case.inputs["gate_up"]
    case.inputs["norm_weight"].zero_()
    x.copy_(x[:1].sign() * torch.rand(rows, width).to(dtype))
    gates = torch.linspace(-4.6, -1.2, outputs)[:, None]
    gate_up[:outputs] = (gates * x[0].sign().float() / width).to(dtype)
    return case


def advance_of_none(dtype: torch.dtype) -> Case:
    """Rows that picked nothing, one of them done before, where every place for a stop token is taken."""
    case = advance_case(4, 84, dtype)
    case.inputs["token"][:2] = NO_TOKEN
    case.inputs["stop_ids"] = case.inputs["stop_ids"][:, -1:].contiguous()
    case.inputs["limit"] = case.inputs["position"] + 10
    return case


def advance_case(rows: int, width: int, dtype: torch.dtype) -> Case:
    vocab, ring = 301, 4
    token = torch.randint(vocab, (rows,))
    index = torch.arange(rows, dtype=torch.int32)
    position = torch.randint(100, (rows,), dtype=torch.int32)
    own = token.where(index % 4 == 2, -1)  # a stop token of the row alone; another is that of all
    inputs = {
        "token": token,
        "x": unwritten(rows, width, dtype=dtype),
        "position": position,
        "done": index % 3 == 1,
        "emitted": torch.zeros(ring, rows, dtype=torch.int64),
        "step": torch.full((rows + 3,), 6),
        "table": random(vocab, width, dtype=dtype),
        "stop_ids": torch.stack((own, torch.full_like(token, -1), token[-1].expand(rows)), dim=1),
        "limit": position + index % 4,  # reached by every fourth row, from the first on
    }
    written = ("token", "x", "position", "done", "emitted", "step")
    options = {"embed_scale": torch.tensor(width**0.5, dtype=dtype).item(), "pad": 0}
    return Case(Ops.advance, inputs, {}, rows, dtype, written, written, options=options)
