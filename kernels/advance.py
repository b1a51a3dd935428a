"""What happens between two decode steps: emit the token, test for the end, advance, embed the token.

    token          = pad where the row was done before
    position       = position + 1               where the row was not done before
    done           = done or token in the row's stop_ids or token < 0 or position >= limit
    emitted[step]  = token                      a ring of the last tokens, read by the host
    step           = step + 1
    x              = d(table[max(token, 0)] * embed_scale)

A negative token means none: the head found no finite logit, and the row ends. A row's limit is the position at which it
ends: its last step is the one that reaches it, so a host some steps behind cannot drive it past its cache. embed_scale
is sqrt(hidden) already rounded to d, the model's dtype. All of this state lives on the device. Bytes moved: one row of
the table per row.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F

from runtime.kernels.argmax import KEY_SLOTS, check_argmax_keys, picked
from runtime.kernels.checks import check, check_rows, check_weight
from runtime.kernels.integers import row_of_words
from runtime.kernels.launch import Launcher, let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.operation import Operation
from runtime.kernels.quantized import Matrix
from runtime.kernels.scaled_matrix import ScaledMatrix
from runtime.kernels.triton_function import jit, next_power_of_2, tl


def embed_torch(table: Matrix, ids: torch.Tensor, embed_scale: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The scaled embeddings [..., hidden] of ids [...], in `dtype` or that of the table's values."""
    rows = F.embedding(ids, table) if isinstance(table, torch.Tensor) else table.rows(ids)
    return (rows * embed_scale).to(dtype)


def advance_torch(op: Advance) -> None:
    """The bookkeeping in tensor operations alone: nothing is read back."""
    token, done = op.token, op.done
    token.masked_fill_(done, op.pad)
    op.position.add_(~done)
    done.logical_or_((token[:, None] == op.stop_ids).any(dim=1)).logical_or_(token < 0)
    done.logical_or_(op.position >= op.limit)
    op.emitted.index_copy_(0, op.step[:1] % len(op.emitted), token[None])
    op.step.add_(1)
    op.x.copy_(embed_torch(op.table, token.clamp(min=0), op.embed_scale))


@jit(do_not_specialize=["rows", "pad", "ring", "stop_count"])
def advance_kernel(
    token_ptr,
    x_ptr,
    position_ptr,
    done_ptr,
    emitted_ptr,
    step_ptr,
    argmax_keys_ptr,
    table_ptr,
    scale_ptr,
    stop_ids_ptr,
    limit_ptr,
    rows,
    ring,
    stop_count,
    pad,
    embed_scale,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_ARGMAX_KEYS: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    BLOCK_STEPS: tl.constexpr,
    BLOCK_STOPS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # One program handles one row.
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK_WIDTH)
    stops = tl.arange(0, BLOCK_STOPS)
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    if HAS_ARGMAX_KEYS:
        token = picked(argmax_keys_ptr + row * SLOTS, SLOTS)
    else:
        token = tl.load(token_ptr + row)
    done = tl.load(done_ptr + row) != 0
    token = tl.where(done, pad, token)
    tl.store(token_ptr + row, token)
    position = tl.load(position_ptr + row) + tl.where(done, 0, 1)
    tl.store(position_ptr + row, position)
    stop_ids = tl.load(stop_ids_ptr + row * stop_count + stops, mask=stops < stop_count, other=-1)
    stopped = tl.max(((stop_ids == token) | (token < 0)).to(tl.int32), axis=0) != 0
    tl.store(done_ptr + row, (done | stopped | (position >= tl.load(limit_ptr + row))).to(tl.int8))
    # Every row counts its own steps, so that no program reads what another one changes; the first program also counts
    # the steps of rows that this step leaves out.
    step = tl.load(step_ptr + row)
    tl.store(step_ptr + row, step + 1)
    if row == 0:
        others = tl.arange(0, BLOCK_STEPS)
        tl.store(step_ptr + others, step + 1 + 0 * others, mask=(others >= rows) & (others < STEPS))
    tl.store(emitted_ptr + (step % ring) * rows + row, token)
    if table_ptr.dtype.element_ty == tl.int16:
        embedding = row_of_words(table_ptr, scale_ptr, tl.maximum(token, 0), columns, WIDTH)
    else:
        embedding = tl.load(table_ptr + tl.maximum(token, 0) * WIDTH + columns, mask=columns < WIDTH, other=0.0)
        if scale_ptr is not None:
            embedding = embedding.to(tl.float32) * tl.load(scale_ptr + tl.maximum(token, 0))
    x = (embedding.to(tl.float32) * embed_scale).to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + row * WIDTH + columns, x, mask=columns < WIDTH)


@dataclass(frozen=True, eq=False, repr=False)
class Advance(Operation):
    """Finishes one decode step and prepares the next.

    Args:
        token: [rows] int64, the tokens just picked, negative for none; overwritten with `pad` in rows that were done.
        x: [rows, hidden], written: the embedding of `token`, 1 to 64 rows.
        position: [rows] int32, advanced in rows that were not done.
        done: [rows] bool, set where the token is a stop token or none, or the position has reached the limit.
        emitted: [ring, rows] int64; slot step % ring is written.
        step: [at least rows] int64, the number of steps taken, the same in every element; advanced.
        table: [vocab, hidden], the embedding table.
        stop_ids: [rows, n] int64, n >= 1, each row's own; -1 means none.
        limit: [rows] int32, the position at which a row ends.
        embed_scale: sqrt(hidden) rounded to the model's dtype.
        pad: the token that finished rows emit.
        argmax_keys: the head's workspace, from which Triton picks the tokens if lm_head_argmax has left that to this
            operation.
    """

    name = "advance"

    token: torch.Tensor
    x: torch.Tensor
    position: torch.Tensor
    done: torch.Tensor
    emitted: torch.Tensor
    step: torch.Tensor
    table: Matrix
    stop_ids: torch.Tensor
    limit: torch.Tensor
    _: KW_ONLY
    embed_scale: float
    pad: int
    argmax_keys: torch.Tensor | None = None

    def check(self) -> None:
        rows, hidden = check_rows("x", self.x)
        device = self.x.device
        check("token", self.token, (rows,), torch.int64, device)
        check("position", self.position, (rows,), torch.int32, device)
        check("done", self.done, (rows,), torch.bool, device)
        check("emitted", self.emitted, (self.emitted.shape[0], rows), torch.int64, device)
        check("step", self.step, (max(rows, len(self.step)),), torch.int64, device)
        check_weight("table", self.table, hidden, self.x)
        check("stop_ids", self.stop_ids, (rows, self.stop_ids.shape[-1]), torch.int64, device)
        check("limit", self.limit, (rows,), torch.int32, device)

    def run_torch(self) -> None:
        advance_torch(self)

    def run_triton(self, launch: Launcher) -> None:
        rows, width = self.x.shape
        if self.argmax_keys is not None:
            check_argmax_keys(self.argmax_keys, rows, self.x.device)
        table, scale = (self.table.q, self.table.scale) if isinstance(self.table, ScaledMatrix) else (self.table, None)
        launch(
            advance_kernel,
            self,
            (rows,),
            warps=4,
            table_ptr=table,
            scale_ptr=scale,
            done_ptr=self.done.view(torch.int8),
            rows=rows,
            ring=len(self.emitted),
            stop_count=self.stop_ids.shape[1],
            WIDTH=width,
            STEPS=len(self.step),
            SLOTS=KEY_SLOTS,
            BLOCK_STEPS=next_power_of_2(len(self.step)),
            BLOCK_STOPS=next_power_of_2(self.stop_ids.shape[1]),
            BLOCK_WIDTH=next_power_of_2(width),
        )
