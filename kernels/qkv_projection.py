"""The norm and the packed QKV projection that open a layer.

    stream = x, or d(x + rms_norm(branch, branch_norm))     the previous MLP joins here in Gemma 2 and 3
    out    = d(rms_norm(stream, norm_weight) @ weight^T)    products accumulated in fp32, rounded once

d is the model's dtype. q/k norm, rotary embedding and the cache write belong to decode_attention, where whole heads are
at hand. Bytes moved: the weight, [(heads + 2 * kv_heads) * head_dim, hidden], once; the rest is a few KB.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from runtime.kernels.launch import check, check_rows, check_stream, check_weight, use_kernel
from runtime.kernels.rms_norm import rms_norm_reference, stream_reference


def qkv_projection_reference(
    out: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    branch: torch.Tensor | None = None,
    branch_norm: torch.Tensor | None = None,
    x_out: torch.Tensor | None = None,
) -> None:
    """One product per row, so that a row's sums do not depend on its neighbours.

    The packed product has the bits of Hugging Face's three separate ones wherever head_dim is a multiple of 8, as in
    every Gemma.
    """
    stream = stream_reference(x, branch, branch_norm, eps)
    if x_out is not None:
        x_out.copy_(stream)
    normed = rms_norm_reference(stream, norm_weight, eps)
    for row in range(len(x)):
        out[row] = F.linear(normed[row : row + 1], weight)[0]


def qkv_projection(
    out: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    branch: torch.Tensor | None = None,
    branch_norm: torch.Tensor | None = None,
    x_out: torch.Tensor | None = None,
) -> None:
    """Projects the normalised residual stream to queries, keys and values.

    Args:
        out: [rows, outputs], written; outputs = (heads + 2 * kv_heads) * head_dim.
        x: [rows, hidden], the residual stream, 1 to 8 rows.
        norm_weight: [hidden], the norm before attention (multiplier 1 + weight).
        weight: [outputs, hidden]: all q rows, then k, then v.
        eps: of every norm here.
        branch: [rows, hidden], the previous branch's output, joining the stream here; or None.
        branch_norm: [hidden], the norm after that branch; given with `branch`.
        x_out: [rows, hidden], written: the new stream; given with `branch`, and another buffer than x.

    Raises:
        TypeError, ValueError: dtype, shape, device or stride of an argument is not as above.
    """
    rows, hidden = check_rows("x", x)
    check("norm_weight", norm_weight, (hidden,), x.dtype, x.device)
    outputs = check_weight("weight", weight, hidden, x)
    check("out", out, (rows, outputs), x.dtype, x.device)
    check_stream(x, branch, branch_norm, x_out)
    if use_kernel(x):
        raise NotImplementedError("qkv_projection has no Triton kernel yet")
    qkv_projection_reference(out, x, norm_weight, weight, eps=eps, branch=branch, branch_norm=branch_norm, x_out=x_out)
