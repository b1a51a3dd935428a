"""The norm, the gate and up projections and their product that open an MLP.

    stream = x, or d(x + rms_norm(branch, branch_norm))     attention joins here in Gemma 2 and 3
    normed = rms_norm(stream, norm_weight)
    gate   = d(normed @ gate_weight^T)      up = d(normed @ up_weight^T)
    out    = d(d(gelu_tanh(gate)) * up)     GELU in fp32, each arrow to d a rounding of Hugging Face's

d is the model's dtype. Bytes moved: gate_up, [2 * intermediate, hidden], once: half of all that a layer reads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from runtime.kernels.launch import check, check_rows, check_stream, check_weight, use_kernel
from runtime.kernels.rms_norm import rms_norm_reference, stream_reference


def gated_mlp_reference(
    out: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    gate_up: torch.Tensor,
    *,
    eps: float,
    branch: torch.Tensor | None = None,
    branch_norm: torch.Tensor | None = None,
    x_out: torch.Tensor | None = None,
) -> None:
    """One gate and one up product per row, so that a row's sums do not depend on its neighbours."""
    stream = stream_reference(x, branch, branch_norm, eps)
    if x_out is not None:
        x_out.copy_(stream)
    normed = rms_norm_reference(stream, norm_weight, eps)
    gate_weight, up_weight = gate_up.chunk(2)
    for row in range(len(x)):
        gate = F.linear(normed[row : row + 1], gate_weight)
        up = F.linear(normed[row : row + 1], up_weight)
        torch.mul(F.gelu(gate, approximate="tanh"), up, out=out[row : row + 1])


def gated_mlp(
    out: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    gate_up: torch.Tensor,
    *,
    eps: float,
    branch: torch.Tensor | None = None,
    branch_norm: torch.Tensor | None = None,
    x_out: torch.Tensor | None = None,
) -> None:
    """Computes the activations between an MLP's two halves.

    Args:
        out: [rows, intermediate], written.
        x: [rows, hidden], the residual stream, 1 to 8 rows.
        norm_weight: [hidden], the norm before the MLP (multiplier 1 + weight).
        gate_up: [2 * intermediate, hidden]: all gate rows, then up.
        eps: of every norm here.
        branch: [rows, hidden], the attention's output, joining the stream here; or None.
        branch_norm: [hidden], the norm after attention; given with `branch`.
        x_out: [rows, hidden], written: the new stream; given with `branch`, and another buffer than x.

    Raises:
        TypeError, ValueError: dtype, shape, device or stride of an argument is not as above.
    """
    rows, hidden = check_rows("x", x)
    check("norm_weight", norm_weight, (hidden,), x.dtype, x.device)
    outputs = check_weight("gate_up", gate_up, hidden, x)
    if outputs % 2:
        raise ValueError(f"gate_up: expected an even number of outputs (gate, then up), got {outputs}")
    check("out", out, (rows, outputs // 2), x.dtype, x.device)
    check_stream(x, branch, branch_norm, x_out)
    if use_kernel(x):
        raise NotImplementedError("gated_mlp has no Triton kernel yet")
    gated_mlp_reference(out, x, norm_weight, gate_up, eps=eps, branch=branch, branch_norm=branch_norm, x_out=x_out)
