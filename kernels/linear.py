"""The product in every projection's plain PyTorch form.

    out = d(x @ weight^T)

MKL's fp32 product of one row or a few gives other bits where an operand does not start at a multiple of 16 bytes (seen
on an AMD EPYC). A view of a packed matrix starts wherever the view before it ends, and so does a row of a batch:
unaligned ones are copied first. Real models, whose widths are multiples of 64 bytes, have no such view.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from runtime.kernels.quantized import Matrix, QuantizedMatrix
from runtime.kernels.scaled_matrix import ScaledMatrix

ALIGNMENT = 64  # bytes; where PyTorch's allocator puts a tensor on a CPU
VALUES = 1 << 22  # of a ScaledMatrix that exist at once
WIDENED_VALUES = 1 << 18  # 1 MB in fp32, which stays in a core's cache until it is read
BLOCK_VALUES = 1 << 20  # of blocks, whose parts cost more to make


def linear_torch(x: torch.Tensor, weight: Matrix) -> torch.Tensor:
    """x [..., columns] times the rows of weight [outputs, columns], both read at the alignment of an allocator's."""
    if isinstance(weight, ScaledMatrix):
        # Not all of its values at once, which take several times its memory.
        parts = weight.split(max(1, VALUES // weight.shape[1]))
        return torch.cat([linear_torch(x, part.dequantized(wide_dtype(x))) for part in parts], dim=-1)
    if isinstance(weight, QuantizedMatrix):
        weight = weight.dequantized()
    wide = torch.promote_types(x.dtype, weight.dtype)  # where x's dtype cannot hold the values: the sum is rounded once
    return F.linear(aligned(x.to(wide)), aligned(weight.to(wide))).to(x.dtype)


def linear_in_fp32(x: torch.Tensor, weight: torch.Tensor | QuantizedMatrix) -> torch.Tensor:
    """What `linear_torch` computes, by a library's fp32 products with some of the weight's values at a time: for a
    matrix in blocks or, on a CPU without instructions for 16-bit products, one in 16 bits. Sums are rounded once. (For
    16 bits PyTorch's own loops take five times as long: Zen 3, 128 tokens.)"""
    is_values = isinstance(weight, torch.Tensor)
    wide, outputs = x.float(), max(1, (WIDENED_VALUES if is_values else BLOCK_VALUES) // weight.shape[1])
    parts = (part.float() if isinstance(part, torch.Tensor) else part.dequantized() for part in weight.split(outputs))
    return torch.cat([F.linear(wide, part).to(x.dtype) for part in parts], dim=-1)


@functools.cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether a library that PyTorch calls multiplies matrices of a dtype on this CPU: fp32 everywhere, bf16 with
    AVX-512 or on ARM, fp16 with AVX512-FP16 or on ARM. Elsewhere PyTorch's own loops do."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype not in supported or supported[dtype]()


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a product of x and a ScaledMatrix is summed and the matrix's values are made: fp32, or
    fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or on a CPU, if it does not start at a multiple of ALIGNMENT, a copy that does."""
    return tensor.clone() if tensor.is_cpu and tensor.data_ptr() % ALIGNMENT else tensor
