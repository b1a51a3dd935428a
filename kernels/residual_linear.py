"""The output and down projections that close a branch, with the residual add of Gemma 1.

    out = d(x @ weight^T)                   products accumulated in fp32, rounded once
    out = d(residual + d(x @ weight^T))     where there is a residual: two roundings, as in Hugging Face

d is the model's dtype. Gemma 2 and 3 normalise the branch before it joins the stream, which needs the whole row: the
next kernel does that (its `branch`). Bytes moved: the weight, [hidden, width], once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from runtime.kernels.launch import check, check_rows, check_weight, use_kernel


def residual_linear_reference(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, residual: torch.Tensor | None = None
) -> None:
    """One product per row, so that a row's sums do not depend on its neighbours."""
    for row in range(len(x)):
        product = F.linear(x[row : row + 1], weight)[0]
        if residual is None:
            out[row] = product
        else:
            torch.add(residual[row], product, out=out[row])


def residual_linear(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, residual: torch.Tensor | None = None
) -> None:
    """Projects x back to the width of the residual stream and adds the residual if one is given.

    Args:
        out: [rows, hidden], written; may be `residual`.
        x: [rows, width], 1 to 8 rows.
        weight: [hidden, width].
        residual: [rows, hidden], or None.

    Raises:
        TypeError, ValueError: dtype, shape, device or stride of an argument is not as above.
    """
    rows, width = check_rows("x", x)
    hidden = check_weight("weight", weight, width, x)
    check("out", out, (rows, hidden), x.dtype, x.device)
    if residual is not None:
        check("residual", residual, (rows, hidden), x.dtype, x.device)
    if use_kernel(x):
        raise NotImplementedError("residual_linear has no Triton kernel yet")
    residual_linear_reference(out, x, weight, residual=residual)
