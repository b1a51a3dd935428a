"""The head of the model: final norm, tied LM head, softcap, and the choice of a token.

    residual = x, or d(x + rms_norm(branch, branch_norm))       the last MLP is added here in Gemma 2 and 3
    logits   = d(rms_norm(residual, norm_weight) @ table^T)
    logits   = d(d(tanh(d(logits / cap))) * cap)                Gemma 2
    scores   = logits, or logits * inverse_temperature + noise  rows that are sampled: see gumbel.py
    token    = argmax(scores), the lowest index on ties; NO_TOKEN where the greatest is a NaN or an infinity. Where
               there is a mask, only over the tokens that it allows: see token_mask.py

A NaN is greater than any number, as in torch.argmax. A NaN or an infinity in the residual makes every logit NaN (an
infinity through the norm), so an overflow anywhere shows here, at no cost.

d is the model's dtype. Logits are rounded to d before the comparison: in bf16 exact ties are common (2 to 3 % of
steps), and the cap, though monotonic, makes more. Bytes moved: the table, [vocab, hidden], once; logits are written
only where the caller wants them.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from runtime.kernels.block import Block
from runtime.kernels.checks import check, check_residual, check_rows, check_weight
from runtime.kernels.gumbel import scores_of, scores_torch
from runtime.kernels.launch import Launcher, let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.linear import linear_torch
from runtime.kernels.matvec import dot_products, groups_of, row_scales, summed_products, weight_pieces
from runtime.kernels.operation import Operation
from runtime.kernels.pieces import norm_pieces
from runtime.kernels.products import launch_product
from runtime.kernels.quantized import Matrix
from runtime.kernels.rms_norm import normed_pieces, residual_pieces, residual_torch, rms_norm_torch
from runtime.kernels.softcap import capped
from runtime.kernels.token_mask import masked_torch, may_come, words_of
from runtime.kernels.triton_function import jit, tl

# Argmax keys of a row, shared by the head's programs: enough that atomics seldom contend, few enough for one program
# to read.
KEY_SLOTS = 64
# Below the key of every logit.
NO_KEY = -(2**63)
# The token of a row whose greatest logit is not finite.
NO_TOKEN = -1


def new_argmax_keys(rows: int, device: torch.device) -> torch.Tensor:
    """The workspace [rows, KEY_SLOTS] int64 of lm_head_argmax, which every launch resets."""
    return torch.full((rows, KEY_SLOTS), NO_KEY, dtype=torch.int64, device=device)


def check_argmax_keys(keys: torch.Tensor | None, rows: int, device: torch.device) -> None:
    """Checks the workspace of `rows` rows.

    Raises:
        TypeError, ValueError: it is missing or too small, or has another dtype, shape, device or stride.
    """
    if keys is None or keys.dim() != 2 or len(keys) < rows:
        given = None if keys is None else tuple(keys.shape)
        raise ValueError(f"argmax_keys: expected new_argmax_keys of at least {rows} rows, got {given}")
    check("argmax_keys", keys, (len(keys), KEY_SLOTS), torch.int64, device)


def logits_torch(normed: torch.Tensor, table: Matrix, softcap: float | None = None) -> torch.Tensor:
    """The logits [1, vocab] of one normalised row [1, hidden]."""
    logits = linear_torch(normed, table)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def lm_head_argmax_torch(op: LmHeadArgmax) -> None:
    """One product per row, so that a row's sums do not depend on its neighbours."""
    normed = rms_norm_torch(residual_torch(op.x, op.branch, op.branch_norm, op.eps), op.norm_weight, op.eps)
    for row in range(len(normed)):
        logits = logits_torch(normed[row : row + 1], op.table, op.softcap)[0]
        if op.logits is not None:
            op.logits[row] = logits
        scores = logits.float() if op.seed is None else scores_of_row(op, row, logits)
        if op.mask is not None:
            scores = masked_torch(scores, op.mask[row])
        # On a CPU argmax returns the first maximum, and runs several times faster on fp32.
        greatest = scores.argmax()
        op.token[row] = torch.where(scores[greatest].isfinite(), greatest, NO_TOKEN)


def scores_of_row(op: LmHeadArgmax, row: int, logits: torch.Tensor) -> torch.Tensor:
    """The scores [vocab] in fp32 whose argmax is a row's token, given its logits [vocab]."""
    assert op.seed is not None and op.position is not None and op.inverse_temperature is not None
    return scores_torch(logits, op.seed[row], op.position[row], op.inverse_temperature[row])


def top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest logits of each row, descending; ties go to the lower index, as in greedy decoding, and a NaN ranks
    above any number.

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
    # By the kernel's keys, no two of which are equal: torch.topk does not break ties by index.
    bits = (logits.float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill(logits.isnan(), 0x7FFFFFFF)
    high = bits.to(torch.int64) << 32
    keys = high | (0x7FFFFFFF - torch.arange(vocab, device=logits.device))
    ids = 0x7FFFFFFF - (keys.topk(k).values & 0xFFFFFFFF)
    return ids, logits.gather(1, ids)


@jit
def ordered_bits(logit):
    """An int32 whose order is that of the logits: the float's bits made monotonic. A NaN of either sign is above
    infinity."""
    logit = tl.where(logit == 0.0, 0.0, logit)  # -0.0 equals 0.0
    logit = tl.where(logit == logit, logit, float("nan"))
    bits = logit.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit
def greatest_key(logits, ids, is_there):
    """The greatest of the logits [BLOCK_OUTPUTS, N] where `is_there`, as keys [N] int64 that are ordered by logit, then
    lower id first: the logit's ordered bits in the high half, its id counted down in the low half. The maximum of keys
    does not depend on the order of comparison."""
    bits = tl.where(is_there, ordered_bits(logits), -0x80000000)
    greatest = tl.max(bits, axis=0)
    lowest = tl.min(tl.where(bits == greatest[None, :], ids, 0x7FFFFFFF), axis=0)
    return (greatest.to(tl.int64) << 32) | (0x7FFFFFFF - lowest).to(tl.int64)


@jit(do_not_specialize=["rows"])
def lm_head_kernel(
    argmax_keys_ptr,
    logits_ptr,
    x_ptr,
    norm_weight_ptr,
    table_ptr,
    scale_ptr,
    branch_ptr,
    branch_norm_ptr,
    seed_ptr,
    position_ptr,
    inverse_temperature_ptr,
    mask_ptr,
    rows,
    eps,
    softcap,
    OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    HAS_SEED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    IS_ONE_ROW: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # One program scores BLOCK_OUTPUTS tokens for every row and merges the largest key into one of the row's slots.
    program = tl.program_id(0)
    ids = program * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    GROUPS: tl.constexpr = groups_of(table_ptr.dtype.element_ty)
    weight = weight_pieces(table_ptr, ids, ids < OUTPUTS, WIDTH, BLOCK_WIDTH, GROUPS)
    scales = row_scales(scale_ptr, ids, ids < OUTPUTS, WIDTH, BLOCK_WIDTH, GROUPS)
    norm_weight = norm_pieces(norm_weight_ptr, WIDTH, BLOCK_WIDTH, GROUPS)
    branch_norm = norm_weight
    if HAS_BRANCH:
        branch_norm = norm_pieces(branch_norm_ptr, WIDTH, BLOCK_WIDTH, GROUPS)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    for row in range(1 if IS_ONE_ROW else rows):
        x = residual_pieces(
            x_ptr, x_ptr, branch_ptr, branch_norm, row, 0, eps, WIDTH, BLOCK_WIDTH, HAS_BRANCH, False, GROUPS=GROUPS
        )
        x = normed_pieces(x, norm_weight, eps, WIDTH, dtype)
        # Rounded to the model's dtype before the comparison: ties that Hugging Face sees must be ties here.
        logit = summed_products(weight, scales, x, False).to(dtype).to(tl.float32)  # [BLOCK_OUTPUTS]
        if HAS_SOFTCAP:
            logit = capped(logit, softcap, dtype)
        if HAS_LOGITS:
            tl.store(logits_ptr + row * OUTPUTS + ids, logit.to(dtype), mask=ids < OUTPUTS)
        if HAS_SEED:
            seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
            logit = scores_of(logit, ids, position, seed, tl.load(inverse_temperature_ptr + row))
        is_there = ids < OUTPUTS
        if HAS_MASK:
            is_there = may_come(mask_ptr, row, ids, logit, is_there, WORDS)
        key = greatest_key(logit[:, None], ids[:, None], is_there[:, None])
        # An integer maximum: exact in whatever order the programs arrive.
        slot = argmax_keys_ptr + row * SLOTS + program % SLOTS + tl.arange(0, 1)
        tl.atomic_max(slot, key, sem="relaxed")


@jit(do_not_specialize=["rows"])
def lm_head_dot_kernel(
    argmax_keys_ptr,
    logits_ptr,
    x_ptr,
    norm_weight_ptr,
    table_ptr,
    scale_ptr,
    branch_ptr,
    branch_norm_ptr,
    seed_ptr,
    position_ptr,
    inverse_temperature_ptr,
    mask_ptr,
    rows,
    eps,
    softcap,
    OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    HAS_SEED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    IS_HELD: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    N: tl.constexpr,
):
    # One program scores BLOCK_OUTPUTS tokens for all rows, padded to N, and merges the largest key of each into one of
    # the row's slots.
    program = tl.program_id(0)
    ids, n = program * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS), tl.arange(0, N)
    logits = dot_products(
        table_ptr,
        scale_ptr,
        tl.minimum(ids, OUTPUTS - 1),
        x_ptr,
        x_ptr,
        norm_weight_ptr,
        branch_ptr,
        branch_norm_ptr,
        rows,
        eps,
        WIDTH,
        True,
        HAS_BRANCH,
        False,
        "at once",
        USE_DEPENDENT_LAUNCH,
        IS_HELD,
        BLOCK_WIDTH,
        SLICES,
        STAGES,
        N,
    )  # [BLOCK_OUTPUTS, N]
    # Rounded to the model's dtype before the comparison: ties that Hugging Face sees must be ties here.
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    logits = logits.to(dtype).to(tl.float32)
    if HAS_SOFTCAP:
        logits = capped(logits, softcap, dtype)
    if HAS_LOGITS:
        at = logits_ptr + n[None, :].to(tl.int64) * OUTPUTS + ids[:, None]
        tl.store(at, logits.to(dtype), mask=(ids < OUTPUTS)[:, None] & (n < rows)[None, :])
    if HAS_SEED:
        n_row = tl.minimum(n, rows - 1)
        seed, position = tl.load(seed_ptr + n_row)[None, :], tl.load(position_ptr + n_row)[None, :]
        logits = scores_of(logits, ids[:, None], position, seed, tl.load(inverse_temperature_ptr + n_row)[None, :])
    is_there = (ids < OUTPUTS)[:, None]
    if HAS_MASK:
        n_row = tl.minimum(n, rows - 1)[None, :]
        is_there = may_come(mask_ptr, n_row, ids[:, None], logits, is_there, WORDS)
    keys = greatest_key(logits, ids[:, None], is_there)
    # An integer maximum: exact in whatever order the programs arrive.
    tl.atomic_max(argmax_keys_ptr + n * SLOTS + program % SLOTS, keys, mask=n < rows, sem="relaxed")


@jit
def picked(slots_ptr, SLOTS: tl.constexpr):
    """The token of one row's slots, or -1 where the greatest logit is not finite. The slots are cleared for the next
    step."""
    slots = slots_ptr + tl.arange(0, SLOTS)
    key = tl.max(tl.load(slots), axis=0)
    tl.store(slots, tl.full([SLOTS], -0x8000000000000000, tl.int64))
    high = key >> 32  # 0x7F800000 for infinity, -0x7F800001 for minus infinity
    finite = (high >= -0x7F800000) & (high < 0x7F800000)
    return tl.where(finite, 0x7FFFFFFF - (key & 0xFFFFFFFF), -1)


@jit
def pick_kernel(token_ptr, argmax_keys_ptr, SLOTS: tl.constexpr, USE_DEPENDENT_LAUNCH: tl.constexpr):
    # One program turns the slots of one row into its token.
    row = tl.program_id(0)
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    tl.store(token_ptr + row, picked(argmax_keys_ptr + row * SLOTS, SLOTS))


@dataclass(frozen=True, eq=False, repr=False)
class LmHeadArgmax(Operation):
    """Picks each row's next token.

    Args:
        token: [rows] int64, written; NO_TOKEN in a row whose greatest logit is a NaN or an infinity.
        x: [rows, hidden], the residual, 1 to 64 rows.
        norm_weight: [hidden], the final norm (multiplier 1 + weight).
        table: [vocab, hidden], the head; where it is tied, the embedding table.
        logits: [rows, vocab], written if given.
        argmax_keys: workspace from `new_argmax_keys`, of at least as many rows; only Triton needs it.
        branch: [rows, hidden], the last branch's output, which is added to the residual here; or None.
        branch_norm: [hidden], the norm after that branch; given with `branch`.
        seed: [rows] int64, from which each row's noise is derived; None where every row is greedy.
        position: [rows] int32, the positions of the rows' last tokens, from which their noise is derived too; with
            `seed`.
        inverse_temperature: [rows] fp32, 1 / temperature, 0 in a greedy row; with `seed`.
        mask: [rows, words_of(vocab)] int32, which tokens each row may pick; None where all are allowed.
        eps: of every norm here.
        softcap: logits become cap * tanh(logits / cap); None for none.
        block: the form of the product and its block, None for this GPU's table; Triton only.
        normed: a workspace of the shape of x, which a looped product needs.
        leaves_pick: whether Triton stops at argmax_keys and leaves it to the operation advance to pick the tokens.
    """

    name = "lm_head_argmax"

    token: torch.Tensor
    x: torch.Tensor
    norm_weight: torch.Tensor
    table: Matrix
    _: KW_ONLY
    logits: torch.Tensor | None = None
    argmax_keys: torch.Tensor | None = None
    branch: torch.Tensor | None = None
    branch_norm: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    position: torch.Tensor | None = None
    inverse_temperature: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    eps: float
    softcap: float | None = None
    block: Block | None = None
    normed: torch.Tensor | None = None
    leaves_pick: bool = False

    def check(self) -> None:
        rows, hidden = check_rows("x", self.x)
        dtype, device = self.x.dtype, self.x.device
        check("token", self.token, (rows,), torch.int64, device)
        check("norm_weight", self.norm_weight, (hidden,), dtype, device)
        vocab = check_weight("table", self.table, hidden, self.x)
        check_residual(self.x, self.branch, self.branch_norm, None, stored=False)
        if self.logits is not None:
            check("logits", self.logits, (rows, vocab), dtype, device)
        if self.seed is not None:
            check("seed", self.seed, (rows,), torch.int64, device)
            check("position", self.position, (rows,), torch.int32, device)
            check("inverse_temperature", self.inverse_temperature, (rows,), torch.float32, device)
        if self.mask is not None:
            check("mask", self.mask, (rows, words_of(vocab)), torch.int32, device)

    def run_torch(self) -> None:
        lm_head_argmax_torch(self)

    def run_triton(self, launch: Launcher) -> None:
        rows = len(self.x)
        check_argmax_keys(self.argmax_keys, rows, self.x.device)
        launch_product(
            launch,
            self,
            lm_head_kernel,
            lm_head_dot_kernel,
            "table",
            has_norm=True,
            stores_residual=False,
            softcap=self.softcap or 1.0,
            SLOTS=KEY_SLOTS,
            WORDS=words_of(len(self.table)),
        )
        if not self.leaves_pick:
            launch(pick_kernel, self, (rows,), warps=1, SLOTS=KEY_SLOTS)
