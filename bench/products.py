"""The products of a decode step at a model's shapes, which `bench kernels` and the search of blocks run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from runtime.kernels.argmax import new_argmax_keys
from runtime.kernels.block import Block, block_key
from runtime.kernels.ops import Ops
from runtime.kernels.quantized import Matrix
from runtime.kernels.scaled_matrix import GROUP, ScaledMatrix, empty_matrix
from runtime.model.config import ModelConfig

WEIGHT_BYTES = 600e6  # distinct weights in one timed graph, many times the L2
LAUNCHES = 40  # at least, in one timed graph


class Case(NamedTuple):
    """One product at one shape."""

    kernel: str
    outputs: int
    width: int
    has_branch: bool
    integers: str = ""  # "int8" or "int4" where its weights are a ScaledMatrix

    @property
    def matrices(self) -> int:
        return 2 if self.kernel == "gated_mlp" else 1

    @property
    def has_norm(self) -> bool:
        return self.kernel != "residual_linear"

    def bytes(self, dtype: torch.dtype) -> int:
        """The size of its weights, scales included."""
        return self.weights(dtype, torch.device("meta")).nbytes

    def bytes_of_weight(self, dtype: torch.dtype) -> float:
        """The size of one weight, with its share of the scales."""
        return self.bytes(dtype) / (self.outputs * self.matrices * self.width)

    def copies(self, dtype: torch.dtype) -> int:
        """How many copies of the weights keep a timed run from finding them in the L2."""
        return int(max(2, min(LAUNCHES, WEIGHT_BYTES // self.bytes(dtype))))

    def key(self, dtype: torch.dtype, max_rows: int) -> str:
        """The name of this case in a block table."""
        return block_key(self.kernel, self.outputs, self.width, dtype, max_rows, self.integers or None)

    def weights(self, dtype: torch.dtype, device: torch.device) -> Matrix:
        """Random weights, whose products with a row are about as large as the row; integers cover their full range."""
        outputs = self.outputs * self.matrices
        if not self.integers:
            return torch.randn(outputs, self.width, dtype=dtype, device=device) * self.width**-0.5
        matrix = empty_matrix(outputs, self.width, self.integers, device)
        bits = torch.iinfo(matrix.q.dtype)
        matrix.q.random_(bits.min, bits.max + 1)
        if self.integers == "int8":
            matrix.scale.fill_(self.width**-0.5 / 74)  # 74: the standard deviation of its integers
            return matrix
        d = torch.full((outputs, self.width // GROUP), self.width**-0.5 / 4.6, dtype=torch.float16, device=device)
        return ScaledMatrix(matrix.q, d.view(torch.int64))


def cases(config: ModelConfig, quantize: str = "") -> list[Case]:
    """The products of one model's decode step; a quantised model's head is in int8."""
    layer = config.layers[0]
    has_branch = config.family != "gemma"
    return [
        Case("qkv_projection", sum(layer.qkv_widths), config.hidden, has_branch, quantize),
        Case("residual_linear", config.hidden, layer.qkv_widths[0], has_branch, quantize),
        Case("gated_mlp", config.intermediate, config.hidden, has_branch, quantize),
        Case("residual_linear", config.hidden, config.intermediate, has_branch, quantize),
        Case("lm_head_argmax", config.vocab, config.hidden, has_branch, "int8" if quantize else ""),
    ]


def operation(
    case: Case, dtype: torch.dtype, copies: int, rows: int, device: torch.device
) -> Callable[[Ops, int, Block | None], torch.Tensor]:
    """A function that runs the case on a backend, on copy i of its random weights and with a block, and returns its
    output."""
    made: dict[str, Any] = {"dtype": dtype, "device": device}
    weights = [case.weights(dtype, device) for _ in range(copies)]
    x, branch, residual_out, normed = (torch.randn(rows, case.width, **made) for _ in range(4))
    norm = torch.randn(case.width, **made) * 0.1
    residual = None if case.has_branch else torch.randn(rows, case.outputs, **made)
    out = torch.full((rows, 1 if case.kernel == "lm_head_argmax" else case.outputs), float("nan"), **made)
    token, keys = torch.zeros(rows, dtype=torch.int64, device=device), new_argmax_keys(rows, device)
    branched: dict[str, Any] = {"branch": branch, "branch_norm": norm} if case.has_branch else {}
    stored: dict[str, Any] = {"residual_out": residual_out} if case.has_branch else {}
    given: dict[str, Any] = {"eps": 1e-6, "normed": normed, **branched}

    def run(ops: Ops, copy: int, block: Block | None) -> torch.Tensor:
        weight = weights[copy]
        if case.kernel == "qkv_projection":
            ops.qkv_projection(out, x, norm, weight, block=block, **given, **stored)
        elif case.kernel == "gated_mlp":
            ops.gated_mlp(out, x, norm, weight, block=block, **given, **stored)
        elif case.kernel == "residual_linear":
            ops.residual_linear(out, x, weight, residual=residual, block=block)
        else:
            ops.lm_head_argmax(token, x, norm, weight, argmax_keys=keys, block=block, **given)
            return token
        return out

    return run
