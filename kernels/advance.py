"""What happens between two decode steps: emit the token, test for the end, move on, embed the token.

    token          = pad where the row was done before
    done           = done or token in stop_ids
    emitted[step]  = token                      a ring of the last tokens, read by the host
    step           = step + 1
    position       = position + 1               where the row was not done before
    x              = d(table[token] * embed_scale)

embed_scale is sqrt(hidden) already rounded to d, the model's dtype. All of it lives on the device. Bytes moved: one row
of the table per row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from runtime.kernels.launch import check, check_rows, check_weight, use_kernel


def embed_reference(table: torch.Tensor, ids: torch.Tensor, embed_scale: float) -> torch.Tensor:
    """The scaled embeddings [..., hidden] of ids [...]."""
    return F.embedding(ids, table) * embed_scale


def advance_reference(
    token: torch.Tensor,
    x: torch.Tensor,
    position: torch.Tensor,
    done: torch.Tensor,
    emitted: torch.Tensor,
    step: torch.Tensor,
    table: torch.Tensor,
    stop_ids: torch.Tensor,
    *,
    embed_scale: float,
    pad: int,
) -> None:
    """The bookkeeping in tensor operations alone: nothing is read back."""
    token.masked_fill_(done, pad)
    position.add_(~done)
    done.logical_or_((token[:, None] == stop_ids).any(dim=1))
    emitted.index_copy_(0, step % len(emitted), token[None])
    step.add_(1)
    x.copy_(embed_reference(table, token, embed_scale))


def advance(
    token: torch.Tensor,
    x: torch.Tensor,
    position: torch.Tensor,
    done: torch.Tensor,
    emitted: torch.Tensor,
    step: torch.Tensor,
    table: torch.Tensor,
    stop_ids: torch.Tensor,
    *,
    embed_scale: float,
    pad: int,
) -> None:
    """Finishes one decode step and prepares the next.

    Args:
        token: [rows] int64, the tokens just picked; overwritten with `pad` in rows that were done.
        x: [rows, hidden], written: the embedding of `token`, 1 to 8 rows.
        position: [rows] int32, advanced in rows that were not done.
        done: [rows] bool, set where the token is a stop token.
        emitted: [ring, rows] int64; slot step % ring is written.
        step: [1] int64, advanced.
        table: [vocab, hidden], the embedding table.
        stop_ids: [n] int64, n >= 1; -1 stands for none.
        embed_scale: sqrt(hidden) rounded to the model's dtype.
        pad: the token that finished rows emit.

    Raises:
        TypeError, ValueError: dtype, shape, device or stride of an argument is not as above.
    """
    rows, hidden = check_rows("x", x)
    device = x.device
    check("token", token, (rows,), torch.int64, device)
    check("position", position, (rows,), torch.int32, device)
    check("done", done, (rows,), torch.bool, device)
    check("emitted", emitted, (emitted.shape[0], rows), torch.int64, device)
    check("step", step, (1,), torch.int64, device)
    check_weight("table", table, hidden, x)
    check("stop_ids", stop_ids, (stop_ids.shape[0],), torch.int64, device)
    if use_kernel(x):
        raise NotImplementedError("advance has no Triton kernel yet")
    advance_reference(token, x, position, done, emitted, step, table, stop_ids, embed_scale=embed_scale, pad=pad)
