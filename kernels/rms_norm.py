"""Gemma's RMSNorm, with and without a residual add.

    y = d(x * rsqrt(mean(x^2) + eps) * (1 + weight))        in fp32 from x to y, rounded once
    y = d(residual + y)                                     where there is a residual

d is the dtype of x. Llama's norm rounds before the weight instead; that differs in about a third of the elements.
Bytes moved: x once, the residual once, y once; the weight is small and stays in cache.
Source: Gemma3RMSNorm in transformers.
"""

from __future__ import annotations

import torch
from runtime.kernels.launch import check, use_kernel


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The norm of x over its last dimension as Hugging Face computes it, plus the residual if one is given."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = (normed * (1.0 + weight.float())).to(x.dtype)
    return normed if residual is None else residual + normed


def stream_reference(
    x: torch.Tensor, branch: torch.Tensor | None, branch_norm: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """The residual stream after a branch has joined it: x, or d(x + rms_norm(branch)) for Gemma 2 and 3."""
    if branch is None:
        return x
    assert branch_norm is not None
    return rms_norm_reference(branch, branch_norm, eps, residual=x)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalises x over its last dimension.

    Args:
        x: [..., hidden], floating point, contiguous.
        weight: [hidden], as in the checkpoint (the multiplier is 1 + weight).
        eps: added to the mean square.
        residual: [..., hidden] added to the rounded result, or None.
        out: [..., hidden] written to (may be x or residual), or None to allocate.

    Returns:
        `out`, or the new tensor, in the dtype of x.

    Raises:
        TypeError, ValueError: dtype, shape, device or stride of an argument is not as above.
    """
    shape = tuple(x.shape)
    check("x", x, shape, x.dtype, x.device)
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point dtype, got {x.dtype}")
    check("weight", weight, shape[-1:], x.dtype, x.device)
    if residual is not None:
        check("residual", residual, shape, x.dtype, x.device)
    if out is not None:
        check("out", out, shape, x.dtype, x.device)
    if use_kernel(x):
        raise NotImplementedError("rms_norm has no Triton kernel yet")
    normed = rms_norm_reference(x, weight, eps, residual)
    return normed if out is None else out.copy_(normed)
