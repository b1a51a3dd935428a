"""The head of the model: final norm, tied LM head, softcap and greedy choice.

    stream = x, or d(x + rms_norm(branch, branch_norm))     the last MLP joins here in Gemma 2 and 3
    logits = d(rms_norm(stream, norm_weight) @ table^T)
    logits = d(d(tanh(d(logits / cap))) * cap)              Gemma 2
    token  = argmax(logits), the lowest index on ties

d is the model's dtype. Logits are rounded to d before the comparison: in bf16 exact ties are common (2 to 3 % of
steps), and the cap, though monotonic, makes more. Bytes moved: the table, [vocab, hidden], once; logits are written
only where the caller wants them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from runtime.kernels.launch import check, check_rows, check_stream, check_weight, use_kernel
from runtime.kernels.rms_norm import rms_norm_reference, stream_reference


def logits_reference(normed: torch.Tensor, table: torch.Tensor, softcap: float | None = None) -> torch.Tensor:
    """The logits [1, vocab] of one normalised row [1, hidden]."""
    logits = F.linear(normed, table)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def lm_head_argmax_reference(
    token: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    table: torch.Tensor,
    *,
    eps: float,
    softcap: float | None = None,
    branch: torch.Tensor | None = None,
    branch_norm: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
) -> None:
    """One product per row, so that a row's sums do not depend on its neighbours."""
    normed = rms_norm_reference(stream_reference(x, branch, branch_norm, eps), norm_weight, eps)
    for row in range(len(x)):
        row_logits = logits_reference(normed[row : row + 1], table, softcap)
        if logits is not None:
            logits[row] = row_logits[0]
        # On a CPU argmax returns the first maximum, and runs several times faster on fp32.
        token[row] = row_logits[0].float().argmax()


def lm_head_argmax(
    token: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    table: torch.Tensor,
    *,
    eps: float,
    softcap: float | None = None,
    branch: torch.Tensor | None = None,
    branch_norm: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
    scratch: torch.Tensor | None = None,
) -> None:
    """Picks each row's next token.

    Args:
        token: [rows] int64, written.
        x: [rows, hidden], the residual stream, 1 to 8 rows.
        norm_weight: [hidden], the final norm (multiplier 1 + weight).
        table: [vocab, hidden], the embedding table.
        eps: of every norm here.
        softcap: logits become cap * tanh(logits / cap); None for none.
        branch: [rows, hidden], the last branch's output, joining the stream here; or None.
        branch_norm: [hidden], the norm after that branch; given with `branch`.
        logits: [rows, vocab], written if given.
        scratch: the kernel's workspace; unused by the reference.

    Raises:
        TypeError, ValueError: dtype, shape, device or stride of an argument is not as above.
    """
    rows, hidden = check_rows("x", x)
    check("token", token, (rows,), torch.int64, x.device)
    check("norm_weight", norm_weight, (hidden,), x.dtype, x.device)
    vocab = check_weight("table", table, hidden, x)
    check_stream(x, branch, branch_norm, None, stored=False)
    if logits is not None:
        check("logits", logits, (rows, vocab), x.dtype, x.device)
    if use_kernel(x):
        raise NotImplementedError("lm_head_argmax has no Triton kernel yet")
    lm_head_argmax_reference(
        token,
        x,
        norm_weight,
        table,
        eps=eps,
        softcap=softcap,
        branch=branch,
        branch_norm=branch_norm,
        logits=logits,
    )
