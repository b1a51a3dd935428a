"""What happens between two decode steps: emit the token, test for the end, move on, embed the token.

    token          = pad where the row was done before
    done           = done or token in stop_ids or token < 0
    emitted[step]  = token                      a ring of the last tokens, read by the host
    step           = step + 1
    position       = position + 1               where the row was not done before
    x              = d(table[max(token, 0)] * embed_scale)

A negative token stands for none: the head found no finite logit, and the row ends. embed_scale is sqrt(hidden) already
rounded to d, the model's dtype. All of it lives on the device. Bytes moved: one row of the table per row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from runtime.kernels.checks import check, check_rows, check_weight
from runtime.kernels.cpu.calls import capture
from runtime.kernels.launch import launch, let_next_kernel_start, use_kernel, wait_for_previous_kernel


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
    done.logical_or_((token[:, None] == stop_ids).any(dim=1)).logical_or_(token < 0)
    emitted.index_copy_(0, step % len(emitted), token[None])
    step.add_(1)
    x.copy_(embed_reference(table, token.clamp(min=0), embed_scale))


@triton.jit(do_not_specialize=["rows", "pad", "ring", "stop_count"])
def advance_kernel(
    token_ptr,
    x_ptr,
    position_ptr,
    done_ptr,
    emitted_ptr,
    step_ptr,
    table_ptr,
    stop_ids_ptr,
    rows,
    pad,
    ring,
    stop_count,
    embed_scale,
    WIDTH: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    BLOCK_STOPS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # One program does it all, since every row needs the step that it moves on.
    columns = tl.arange(0, BLOCK_WIDTH)
    stops = tl.arange(0, BLOCK_STOPS)
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    stop_ids = tl.load(stop_ids_ptr + stops, mask=stops < stop_count, other=-1)
    step = tl.load(step_ptr)
    for row in range(rows):
        done = tl.load(done_ptr + row) != 0
        token = tl.where(done, pad, tl.load(token_ptr + row))
        tl.store(token_ptr + row, token)
        tl.store(position_ptr + row, tl.load(position_ptr + row) + tl.where(done, 0, 1))
        stopped = tl.max(((stop_ids == token) | (token < 0)).to(tl.int32), axis=0) != 0
        tl.store(done_ptr + row, (done | stopped).to(tl.int8))
        tl.store(emitted_ptr + (step % ring) * rows + row, token)
        embedding = tl.load(table_ptr + tl.maximum(token, 0) * WIDTH + columns, mask=columns < WIDTH, other=0.0).to(
            tl.float32
        )
        x = (embedding * embed_scale).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + row * WIDTH + columns, x, mask=columns < WIDTH)
    tl.store(step_ptr, step + 1)


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
        token: [rows] int64, the tokens just picked, negative for none; overwritten with `pad` in rows that were done.
        x: [rows, hidden], written: the embedding of `token`, 1 to 8 rows.
        position: [rows] int32, advanced in rows that were not done.
        done: [rows] bool, set where the token is a stop token or none.
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
        launch(
            advance_kernel,
            (1,),
            device,
            8,
            token,
            x,
            position,
            done.view(torch.int8),
            emitted,
            step,
            table,
            stop_ids,
            rows,
            pad,
            len(emitted),
            len(stop_ids),
            embed_scale,
            WIDTH=hidden,
            BLOCK_STOPS=triton.next_power_of_2(len(stop_ids)),
            BLOCK_WIDTH=triton.next_power_of_2(hidden),
        )
        return
    if capture("advance", token, x, position, done, emitted, step, table, stop_ids, embed_scale, pad):
        return
    advance_reference(token, x, position, done, emitted, step, table, stop_ids, embed_scale=embed_scale, pad=pad)
