"""The product in every projection's plain PyTorch form.

    out = d(x @ weight^T)

MKL's fp32 product of one row or a few gives other bits where an operand does not start at a multiple of 16 bytes
(seen on an AMD EPYC). A view of a packed matrix starts wherever the view before it ends, and so does a row of a batch:
off the alignment they are copied first. Real models, whose widths are multiples of 64 bytes, have no such view.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from runtime.kernels.quantized import Matrix, QuantizedMatrix
from runtime.kernels.scaled_matrix import ScaledMatrix

ALIGNMENT = 64  # bytes; where PyTorch's allocator puts a tensor on a CPU


def linear_torch(x: torch.Tensor, weight: Matrix) -> torch.Tensor:
    """x [..., columns] times the rows of weight [outputs, columns], each read from where an allocator would put it."""
    if isinstance(weight, ScaledMatrix):  # whose values not every dtype holds: one rounding, of the sum
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(aligned(x.to(wide)), weight.dequantized(wide)).to(x.dtype)
    if isinstance(weight, QuantizedMatrix):
        weight = weight.dequantized()
    return F.linear(aligned(x), aligned(weight))


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or on a CPU a copy at a multiple of ALIGNMENT where it lies elsewhere."""
    return tensor.clone() if tensor.is_cpu and tensor.data_ptr() % ALIGNMENT else tensor
