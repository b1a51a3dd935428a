"""The head of the model: final norm, tied LM head, softcap and greedy choice.

    stream = x, or d(x + rms_norm(branch, branch_norm))     the last MLP joins here in Gemma 2 and 3
    logits = d(rms_norm(stream, norm_weight) @ table^T)
    logits = d(d(tanh(d(logits / cap))) * cap)              Gemma 2
    token  = argmax(logits), the lowest index on ties; NO_TOKEN where the greatest is a NaN or an infinity

A NaN is greater than any number, as in torch.argmax. One in the residual stream makes every logit NaN, and an infinity
there does too, through the norm: an overflow anywhere shows here, at no cost.

d is the model's dtype. Logits are rounded to d before the comparison: in bf16 exact ties are common (2 to 3 % of
steps), and the cap, though monotonic, makes more. Bytes moved: the table, [vocab, hidden], once; logits are written
only where the caller wants them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.kernels.block import Block, block_for
from runtime.kernels.checks import check, check_rows, check_stream, check_weight
from runtime.kernels.cpu.calls import capture
from runtime.kernels.launch import launch, let_next_kernel_start, use_kernel, wait_for_previous_kernel
from runtime.kernels.linear_reference import linear_reference
from runtime.kernels.rms_norm import normed_row, rms_norm_reference, stream_reference, stream_row
from runtime.kernels.softcap import tanh

# Where the programs of the head meet: enough places that they seldom queue, few enough for one program to read.
BEST_SLOTS = 64
# Below the key of every logit.
NO_KEY = -(2**63)
# What a row picks whose greatest logit is not finite.
NO_TOKEN = -1


def new_best(rows: int, device: torch.device) -> torch.Tensor:
    """The workspace [rows, BEST_SLOTS] int64 of lm_head_argmax, which every launch leaves as it found it."""
    return torch.full((rows, BEST_SLOTS), NO_KEY, dtype=torch.int64, device=device)


def logits_reference(normed: torch.Tensor, table: torch.Tensor, softcap: float | None = None) -> torch.Tensor:
    """The logits [1, vocab] of one normalised row [1, hidden]."""
    logits = linear_reference(normed, table)
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
        wide = row_logits[0].float()
        best = wide.argmax()
        token[row] = torch.where(wide[best].isfinite(), best, NO_TOKEN)


def top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best tokens of each row, best first; of equal logits the lower index is better, as in greedy decoding, and
    a NaN better than any number.

    Args:
        logits: [rows, vocab], floating point.
        k: 1 to vocab.

    Returns:
        Their ids [rows, k] int64 and logits [rows, k] in the dtype of `logits`.

    Raises:
        ValueError: k is out of range.
    """
    rows, vocab = logits.shape
    if not 1 <= k <= vocab:
        raise ValueError(f"k: expected 1 to {vocab} (the vocabulary), got {k}")
    # The kernels' keys, no two of which are equal: torch.topk alone does not promise the lower index.
    bits = (logits.float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill(logits.isnan(), 0x7FFFFFFF)
    high = bits.to(torch.int64) << 32
    keys = high | (0x7FFFFFFF - torch.arange(vocab, device=logits.device))
    ids = 0x7FFFFFFF - (keys.topk(k).values & 0xFFFFFFFF)
    return ids, logits.gather(1, ids)


@triton.jit
def ordered_key(logit, index):
    """An int64 whose order is that of (logit, lower index first): the float's bits made monotonic in the high half, the
    index counted down in the low half. Its maximum does not depend on the order of comparison. A NaN of either sign is
    above infinity."""
    logit = tl.where(logit == 0.0, 0.0, logit)  # -0.0 equals 0.0
    logit = tl.where(logit == logit, logit, float("nan"))
    bits = logit.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit(do_not_specialize=["rows"])
def lm_head_kernel(
    best_ptr,
    logits_ptr,
    x_ptr,
    norm_weight_ptr,
    table_ptr,
    branch_ptr,
    branch_norm_ptr,
    rows,
    eps,
    softcap,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # One program scores BLOCK_OUTPUTS tokens for every row and enters the best of them in one of the row's slots.
    program = tl.program_id(0)
    ids = program * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    columns = tl.arange(0, BLOCK_WIDTH)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    weight = tl.load(
        table_ptr + ids.to(tl.int64)[:, None] * WIDTH + columns[None, :],
        mask=(ids < VOCAB)[:, None] & (columns < WIDTH)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )  # [BLOCK_OUTPUTS, BLOCK_WIDTH]
    norm_weight = tl.load(norm_weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    branch_norm = norm_weight
    if HAS_BRANCH:
        branch_norm = tl.load(branch_norm_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    for row in range(rows):
        x = stream_row(x_ptr, x_ptr, branch_ptr, branch_norm, row, columns, 0, eps, WIDTH, HAS_BRANCH, False)
        x = normed_row(x, norm_weight, eps, WIDTH, dtype)
        # Rounded to the model's dtype before the comparison: ties that Hugging Face sees must be ties here.
        logit = tl.sum(weight.to(tl.float32) * x[None, :], axis=1).to(dtype)  # [BLOCK_OUTPUTS]
        if HAS_SOFTCAP:
            logit = (logit.to(tl.float32) / softcap).to(dtype)
            logit = tanh(logit.to(tl.float32)).to(dtype)
            logit = (logit.to(tl.float32) * softcap).to(dtype)
        if HAS_LOGITS:
            tl.store(logits_ptr + row * VOCAB + ids, logit, mask=ids < VOCAB)
        key = tl.where(ids < VOCAB, ordered_key(logit.to(tl.float32), ids), -0x8000000000000000)
        # An integer maximum: exact in whatever order the programs arrive.
        tl.atomic_max(best_ptr + row * SLOTS + program % SLOTS, tl.max(key, axis=0), sem="relaxed")


@triton.jit
def pick_kernel(token_ptr, best_ptr, SLOTS: tl.constexpr, USE_DEPENDENT_LAUNCH: tl.constexpr):
    # One program turns the slots of one row into its token and clears them for the next step.
    row = tl.program_id(0)
    slots = best_ptr + row * SLOTS + tl.arange(0, SLOTS)
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    key = tl.max(tl.load(slots), axis=0)
    high = key >> 32  # infinity's is 0x7F800000, and minus infinity's one below what is negated here
    finite = (high >= -0x7F800000) & (high < 0x7F800000)
    tl.store(token_ptr + row, tl.where(finite, 0x7FFFFFFF - (key & 0xFFFFFFFF), -1))
    tl.store(slots, tl.full([SLOTS], -0x8000000000000000, tl.int64))


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
    block: Block | None = None,
) -> None:
    """Picks each row's next token.

    Args:
        token: [rows] int64, written; NO_TOKEN in a row whose greatest logit is a NaN or an infinity.
        x: [rows, hidden], the residual stream, 1 to 8 rows.
        norm_weight: [hidden], the final norm (multiplier 1 + weight).
        table: [vocab, hidden], the head; where it is tied, the embedding table.
        eps: of every norm here.
        softcap: logits become cap * tanh(logits / cap); None for none.
        branch: [rows, hidden], the last branch's output, joining the stream here; or None.
        branch_norm: [hidden], the norm after that branch; given with `branch`.
        logits: [rows, vocab], written if given.
        scratch: the kernel's workspace from `new_best`, of at least as many rows; unused by the reference.
        block: how the kernel is cut, None for this GPU's table; unused by the reference.

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
        if scratch is None or scratch.shape[0] < rows:
            raise ValueError(f"scratch: expected new_best of at least {rows} rows, got {scratch}")
        check("scratch", scratch, (scratch.shape[0], BEST_SLOTS), torch.int64, x.device)
        block = block or block_for("lm_head_argmax", vocab, hidden, x)
        launch(
            lm_head_kernel,
            (triton.cdiv(vocab, block.rows),),
            x.device,
            block.warps,
            scratch,
            logits,
            x,
            norm_weight,
            table,
            branch,
            branch_norm,
            rows,
            eps,
            softcap or 1.0,
            VOCAB=vocab,
            WIDTH=hidden,
            SLOTS=BEST_SLOTS,
            HAS_BRANCH=branch is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_LOGITS=logits is not None,
            BLOCK_OUTPUTS=block.rows,
            BLOCK_WIDTH=block.columns,
        )
        launch(pick_kernel, (rows,), x.device, 1, token, scratch, SLOTS=BEST_SLOTS)
        return
    if capture("lm_head_argmax", token, x, norm_weight, table, branch, branch_norm, logits, eps, softcap):
        return
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
