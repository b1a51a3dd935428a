"""The one product of rows and a tile of weights, in the forms that every projection and the head use.

    y[row, output] = sum over columns of weight[output, column] * x[row, column]        in fp32

sum     products and sums in fp32 of weights loaded into registers before the wait for the previous kernel, one row
        after another: the fastest for a single row, and the only form for fp32
held    tensor-core products of rows padded to 8 with weights loaded into registers before the wait; the kernel norms
        the rows itself. For small matrices
loop    tensor-core products in a pipelined loop after the wait, over rows that a separate kernel has normed

In the last two the columns are split across the warps, one slice each, and the slices' sums are added in a fixed order;
rows past the last are masked, so that one compiled kernel serves 1 to 8 rows, and others up to 16, 32 and 64 (in the
sum form one serves any number). Which form a shape takes is part of its block (block.py). A row's sums depend on the
form and the block, never on how many rows there are.

Weights may be integers with scales (scaled_matrix.py); the integers are widened in registers to the rows' dtype,
exactly. A scale multiplies, in fp32, the sum of the products that it applies to: those of an output (int8), or of 32
columns (int4; in the sum form, of the eight of them that a thread holds).
"""

from __future__ import annotations

from runtime.kernels.integers import group_scales, widened, widened_groups
from runtime.kernels.launch import IN_INTERPRETER, let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.pieces import piece_columns, sum_of
from runtime.kernels.triton_function import constexpr_function, jit, tl


@jit
def held_packed(weight):
    """The weights unchanged, through a line of assembly that the compiler does not move. Otherwise it widens them to
    fp32 once, ahead of a loop over rows, and needs twice the registers: too many for two programs a multiprocessor."""
    if IN_INTERPRETER:
        return weight
    else:
        PACK: tl.constexpr = 32 // weight.dtype.primitive_bitwidth
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [weight], weight.dtype, is_pure=False, pack=PACK)


@constexpr_function
def groups_of(weights: tl.dtype) -> int:
    """How many groups of columns a word of weights holds (scaled_matrix.py); 1 where weights are not packed in
    words."""
    return 4 if weights == tl.int16 else 1


# The sum form


@jit
def weight_pieces(weight_ptr, outputs, is_there, WIDTH: tl.constexpr, PIECE: tl.constexpr, GROUPS: tl.constexpr = 1):
    """The weight rows `outputs` [BLOCK_OUTPUTS] in pieces [BLOCK_OUTPUTS, columns / GROUPS], zeros where `is_there` is
    false."""
    at = weight_ptr + outputs.to(tl.int64)[:, None] * (WIDTH // GROUPS)
    pieces = ()
    for START in tl.static_range(0, WIDTH, PIECE):
        columns = START // GROUPS + tl.arange(0, piece_columns(WIDTH, START, PIECE) // GROUPS)
        mask = is_there[:, None] & (columns < WIDTH // GROUPS)[None, :]
        pieces += (tl.load(at + columns[None, :], mask=mask, other=0.0, eviction_policy="evict_first"),)
    return pieces


@jit
def row_scales(scale_ptr, outputs, is_there, WIDTH: tl.constexpr, PIECE: tl.constexpr, GROUPS: tl.constexpr = 1):
    """The scales of the weight rows `outputs`: an empty tuple where weights have none, else [BLOCK_OUTPUTS] or, for
    words, pieces [BLOCK_OUTPUTS, 64-bit numbers of four scales each]."""
    if scale_ptr is None:
        return ()
    elif GROUPS == 1:
        return (tl.load(scale_ptr + outputs, mask=is_there, other=0.0),)
    else:
        NUMBERS: tl.constexpr = WIDTH // (32 * GROUPS)
        at = scale_ptr + outputs.to(tl.int64)[:, None] * NUMBERS
        pieces = ()
        for START in tl.static_range(0, WIDTH, PIECE):
            numbers = START // (32 * GROUPS) + tl.arange(0, piece_columns(WIDTH, START, PIECE) // (32 * GROUPS))
            mask = is_there[:, None] & (numbers < NUMBERS)[None, :]
            pieces += (tl.load(at + numbers[None, :], mask=mask, other=0, eviction_policy="evict_first"),)
        return pieces


@jit
def summed_products(weight, scales, x, STAYS_PACKED: tl.constexpr):
    """The dot products [BLOCK_OUTPUTS] in fp32 of weights with a row in fp32, both in pieces, times the weights' scales
    if there are any. With STAYS_PACKED, or where they are integers, the weights are widened anew for each row."""
    if weight[0].dtype == tl.int16:
        return summed_products_of_words(weight, scales, x)
    else:
        products = ()
        for i in tl.static_range(len(x)):
            piece = weight[i]
            if STAYS_PACKED or piece.dtype == tl.int8:
                piece = held_packed(piece)
            products += (widened(piece, tl.float32) * x[i][None, :],)
        sums = sum_of(products)
        return sums * scales[0] if len(scales) else sums


@jit
def summed_products_of_words(weight, scales, x):
    """The same for words of four groups, each of which has its own piece of x. Eight columns of a group, which a thread
    holds side by side, are summed before they are scaled."""
    sums = ()
    for i in tl.static_range(len(weight)):
        sums += (products_of_words(weight[i], scales[i], x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]),)
    return sum_of(sums)


@jit
def products_of_words(words, scales, x0, x1, x2, x3):
    """The scaled products of one piece, still to be summed: each of [rows, 4 * numbers] is eight columns of every
    group."""
    ROWS: tl.constexpr = words.shape[0]
    NUMBERS: tl.constexpr = words.shape[1] // 32
    groups, of_group = widened_groups(held_packed(words), tl.float32), group_scales(scales)
    x = (x0, x1, x2, x3)
    total = tl.zeros([ROWS, NUMBERS, 4], tl.float32)
    for GROUP in tl.static_range(4):
        products = tl.reshape(groups[GROUP] * x[GROUP][None, :], (ROWS, NUMBERS, 4, 8))
        total += tl.sum(products, axis=3) * of_group[GROUP][:, :, None]
    return tl.reshape(total, (ROWS, NUMBERS * 4))


# The forms on tensor cores


@jit
def add_products(sums, weight, x):
    """sums [SLICES, BLOCK_OUTPUTS, N] plus the products of weights [SLICES, BLOCK_OUTPUTS, columns] and rows
    [SLICES, N, columns]. The interpreter multiplies 16-bit values in fp32."""
    weight = widened(weight, x.dtype)
    if IN_INTERPRETER:
        weight = weight.to(tl.float32)
        x = x.to(tl.float32)
    return tl.dot(weight, tl.trans(x, 0, 2, 1), sums, input_precision="ieee")


@jit
def sliced_columns(START: tl.constexpr, PIECE: tl.constexpr, SLICES: tl.constexpr):
    """The columns of the piece that begins at START, [SLICES, 1, PIECE / SLICES]."""
    SIZE: tl.constexpr = PIECE // SLICES
    return START + tl.arange(0, SLICES)[:, None, None] * SIZE + tl.arange(0, SIZE)[None, None, :]


@jit
def sliced_mean_square(pieces, WIDTH: tl.constexpr):
    """The mean squares [N] of rows in pieces [SLICES, N, columns], in fp32."""
    squares = pieces[0].to(tl.float32) * pieces[0].to(tl.float32)
    for i in tl.static_range(1, len(pieces)):
        squares += pieces[i].to(tl.float32) * pieces[i].to(tl.float32)
    return tl.sum(tl.sum(squares, axis=2), axis=0) / WIDTH


@jit
def held_products(
    weight_ptr,
    weight_rows,
    residual_out_ptr,
    x_ptr,
    norm_weight_ptr,
    branch_ptr,
    branch_norm_ptr,
    rows,
    eps,
    WIDTH: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    STORE_RESIDUAL: tl.constexpr,
    STARTS_NEXT: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    PIECE: tl.constexpr,
    SLICES: tl.constexpr,
    N: tl.constexpr,
):
    """The products [BLOCK_OUTPUTS, N] of weight rows and N rows of x, after the branch is added (HAS_BRANCH) and the
    norm applied (HAS_NORM). PIECE divides WIDTH."""
    n = tl.arange(0, N)[None, :, None]
    row, is_there = n * WIDTH, n < rows
    BLOCK_OUTPUTS: tl.constexpr = weight_rows.shape[0]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if STARTS_NEXT == "at once":
        let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    at = weight_ptr + weight_rows.to(tl.int64)[None, :, None] * WIDTH
    weight, x, branch, gain, branch_gain = (), (), (), (), ()
    for START in tl.static_range(0, WIDTH, PIECE):
        k = sliced_columns(START, PIECE, SLICES)
        weight += (tl.load(at + k, eviction_policy="evict_first"),)  # [SLICES, BLOCK_OUTPUTS, PIECE / SLICES]
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    if STARTS_NEXT == "after the wait":
        let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    for START in tl.static_range(0, WIDTH, PIECE):
        k = sliced_columns(START, PIECE, SLICES)
        # Norm weights are loaded for each row, in the layout of the rows, so that no layout has to be converted.
        of_each = tl.broadcast_to(k, (SLICES, N, k.shape[2]))
        x += (tl.load(x_ptr + row + k, mask=is_there, other=0.0),)  # [SLICES, N, PIECE / SLICES]
        if HAS_BRANCH:
            branch += (tl.load(branch_ptr + row + k, mask=is_there, other=0.0),)
            branch_gain += (tl.load(branch_norm_ptr + of_each),)
        if HAS_NORM:
            gain += (tl.load(norm_weight_ptr + of_each),)
    if HAS_BRANCH:
        inverse = tl.rsqrt(sliced_mean_square(branch, WIDTH) + eps)
        residual = ()
        for i in tl.static_range(len(x)):
            normed = branch[i].to(tl.float32) * inverse[None, :, None] * (1.0 + branch_gain[i].to(tl.float32))
            residual += ((x[i].to(tl.float32) + normed.to(dtype).to(tl.float32)).to(dtype),)
        x = residual
        if STORE_RESIDUAL:
            stored = tl.where(tl.program_id(0) == 0, rows, 0)  # one program keeps the new residual for later kernels
            for i in tl.static_range(len(x)):
                k = sliced_columns(i * PIECE, PIECE, SLICES)
                tl.store(residual_out_ptr + row + k, x[i], mask=n < stored)
    if HAS_NORM:
        inverse = tl.rsqrt(sliced_mean_square(x, WIDTH) + eps)
        normed_x = ()
        for i in tl.static_range(len(x)):
            normed = x[i].to(tl.float32) * inverse[None, :, None] * (1.0 + gain[i].to(tl.float32))
            # Opaque to the compiler, which would otherwise move the norm into the layout of the dot.
            normed_x += (held_packed(normed.to(dtype)),)
        x = normed_x
    sums = tl.zeros([SLICES, BLOCK_OUTPUTS, N], tl.float32)
    for i in tl.static_range(len(x)):
        sums = add_products(sums, weight[i], x[i])
    return tl.sum(sums, axis=0)


@jit
def looped_products(
    weight_ptr,
    weight_rows,
    x_ptr,
    rows,
    WIDTH: tl.constexpr,
    STARTS_NEXT: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    N: tl.constexpr,
):
    """The products [BLOCK_OUTPUTS, N] of weight rows and N rows of x, SLICES * BLOCK_WIDTH columns at a time."""
    s, n, k = tl.arange(0, SLICES), tl.arange(0, N), tl.arange(0, BLOCK_WIDTH)
    BLOCK_OUTPUTS: tl.constexpr = weight_rows.shape[0]
    if STARTS_NEXT == "at once":
        let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    w_row = weight_ptr + weight_rows.to(tl.int64)[None, :, None] * WIDTH
    # Ahead of the loop: the compiler may move a pipelined loop's loads above a wait inside it.
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    if STARTS_NEXT == "after the wait":
        let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    STEP: tl.constexpr = SLICES * BLOCK_WIDTH
    column = s[:, None, None] * BLOCK_WIDTH + k[None, None, :]
    x_row, is_there = x_ptr + n[None, :, None] * WIDTH, (n < rows)[None, :, None]
    sums = tl.zeros([SLICES, BLOCK_OUTPUTS, N], tl.float32)
    for start in tl.range(0, WIDTH, STEP, num_stages=STAGES):
        if WIDTH % STEP == 0:
            weight = tl.load(w_row + column + start, eviction_policy="evict_first")
            x = tl.load(x_row + column + start, mask=is_there, other=0.0)
        else:
            mask = column + start < WIDTH
            weight = tl.load(w_row + column + start, mask=mask, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_row + column + start, mask=is_there & mask, other=0.0)
        sums = add_products(sums, weight, x)
    return tl.sum(sums, axis=0)


@jit
def looped_products_of_words(
    weight_ptr,
    scale_ptr,
    weight_rows,
    x_ptr,
    rows,
    WIDTH: tl.constexpr,
    STARTS_NEXT: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    N: tl.constexpr,
):
    """The same for words of four groups: a product for each group, then its scale. BLOCK_WIDTH is a multiple of 128."""
    s, n, k = tl.arange(0, SLICES)[:, None, None], tl.arange(0, N)[None, :, None], tl.arange(0, 32)[None, None, :]
    BLOCK_OUTPUTS: tl.constexpr = weight_rows.shape[0]
    if STARTS_NEXT == "at once":
        let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    # One 64-bit number of four scales and 32 words cover 128 columns.
    NUMBERS: tl.constexpr = WIDTH // 128
    number = weight_rows.to(tl.int64)[None, :, None] * NUMBERS + s
    w_at, scale_at = weight_ptr + number * 32 + k, scale_ptr + number
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    if STARTS_NEXT == "after the wait":
        let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    STEP: tl.constexpr = SLICES * (BLOCK_WIDTH // 128)
    x_at, is_there = x_ptr + n * WIDTH + s * 128 + k, n < rows
    sums = tl.zeros([SLICES, BLOCK_OUTPUTS, N], tl.float32)
    for start in tl.range(0, NUMBERS, STEP, num_stages=STAGES):
        for FIRST in tl.static_range(0, STEP, SLICES):
            at = start + FIRST
            if NUMBERS % STEP == 0:
                words = tl.load(w_at + at * 32, eviction_policy="evict_first")
                scales = tl.load(scale_at + at, eviction_policy="evict_first")
                x_mask = is_there
            else:
                mask = at + s < NUMBERS
                words = tl.load(w_at + at * 32, mask=mask, other=0, eviction_policy="evict_first")
                scales = tl.load(scale_at + at, mask=mask, other=0, eviction_policy="evict_first")
                x_mask = is_there & mask
            groups, of_group = widened_groups(words, x_ptr.dtype.element_ty), group_scales(scales)
            for GROUP in tl.static_range(4):
                x = tl.load(x_at + at * 128 + GROUP * 32, mask=x_mask, other=0.0)
                products = add_products(tl.zeros_like(sums), groups[GROUP], x)
                sums += products * of_group[GROUP]
    return tl.sum(sums, axis=0)


@jit
def dot_products(
    weight_ptr,
    scale_ptr,
    weight_rows,
    residual_out_ptr,
    x_ptr,
    norm_weight_ptr,
    branch_ptr,
    branch_norm_ptr,
    rows,
    eps,
    WIDTH: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    STORE_RESIDUAL: tl.constexpr,
    STARTS_NEXT: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    IS_HELD: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    N: tl.constexpr,
):
    """The products [BLOCK_OUTPUTS, N] of weight rows and N rows, in the held form or in a loop over rows that are
    already normed, times the weight rows' scales if there are any. STARTS_NEXT says when the next kernel's programs may
    take multiprocessors: "at once", "after the wait" or, where that kernel has so few programs that they must be spread
    evenly, "at the end"."""
    IS_WORDS: tl.constexpr = groups_of(weight_ptr.dtype.element_ty) > 1
    scales = ()
    if scale_ptr is not None and not IS_WORDS:
        scales = (tl.load(scale_ptr + weight_rows),)  # [BLOCK_OUTPUTS]
    if IS_HELD:
        sums = held_products(
            weight_ptr,
            weight_rows,
            residual_out_ptr,
            x_ptr,
            norm_weight_ptr,
            branch_ptr,
            branch_norm_ptr,
            rows,
            eps,
            WIDTH,
            HAS_NORM,
            HAS_BRANCH,
            STORE_RESIDUAL,
            STARTS_NEXT,
            USE_DEPENDENT_LAUNCH,
            BLOCK_WIDTH,
            SLICES,
            N,
        )
    elif IS_WORDS:
        sums = looped_products_of_words(
            weight_ptr,
            scale_ptr,
            weight_rows,
            x_ptr,
            rows,
            WIDTH,
            STARTS_NEXT,
            USE_DEPENDENT_LAUNCH,
            BLOCK_WIDTH,
            SLICES,
            STAGES,
            N,
        )
    else:
        sums = looped_products(
            weight_ptr,
            weight_rows,
            x_ptr,
            rows,
            WIDTH,
            STARTS_NEXT,
            USE_DEPENDENT_LAUNCH,
            BLOCK_WIDTH,
            SLICES,
            STAGES,
            N,
        )
    if STARTS_NEXT == "at the end":
        let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    return sums * scales[0][:, None] if len(scales) else sums
