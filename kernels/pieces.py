"""Rows of columns in pieces that are powers of two, as Triton's tensors have to be.

2,304 columns as one tensor are padded to 4,096, and almost half of the lanes are idle; as nine pieces of 256, or as
2,048 and 256, none is.
"""

from __future__ import annotations

from runtime.kernels.triton_function import constexpr_function, jit, next_power_of_2, tl


@constexpr_function
def piece_columns(width: int, start: int, piece: int) -> int:
    """The columns of the piece that begins at `start`: `piece`, or what the last one is padded to."""
    return min(piece, next_power_of_2(width - start))


@jit
def columns_of(START: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """The columns of the piece that begins at START or, where words hold several groups of 32 (scaled_matrix.py), those
    of one group of each word."""
    if GROUPS == 1:
        return START + tl.arange(0, COLUMNS)
    else:
        word = tl.arange(0, COLUMNS // GROUPS)
        return START + word // 32 * (32 * GROUPS) + GROUP * 32 + word % 32


@jit
def row_pieces(row_ptr, WIDTH: tl.constexpr, PIECE: tl.constexpr, GROUPS: tl.constexpr = 1):
    """A row in pieces [columns] in fp32, zeros past WIDTH; with GROUPS > 1 each piece is split into that many [columns
    / GROUPS]."""
    pieces = ()
    for START in tl.static_range(0, WIDTH, PIECE):
        for GROUP in tl.static_range(GROUPS):
            columns = columns_of(START, piece_columns(WIDTH, START, PIECE), GROUP, GROUPS)
            pieces += (tl.load(row_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32),)
    return pieces


@jit
def norm_pieces(weight_ptr, WIDTH: tl.constexpr, PIECE: tl.constexpr, GROUPS: tl.constexpr = 1):
    """The weights of a norm, as `row_pieces`. A function of its own because, unlike a row of activations, they may be
    loaded before the wait, and the check of compiled kernels tells loads apart by their source lines."""
    pieces = ()
    for START in tl.static_range(0, WIDTH, PIECE):
        for GROUP in tl.static_range(GROUPS):
            columns = columns_of(START, piece_columns(WIDTH, START, PIECE), GROUP, GROUPS)
            pieces += (tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32),)
    return pieces


@jit
def store_pieces(row_ptr, pieces, limit, WIDTH: tl.constexpr, PIECE: tl.constexpr, GROUPS: tl.constexpr = 1):
    """Stores the columns below `limit`, at most WIDTH, of a row in pieces as `row_pieces` makes them."""
    for i in tl.static_range(len(pieces)):
        columns = columns_of(i // GROUPS * PIECE, piece_columns(WIDTH, i // GROUPS * PIECE, PIECE), i % GROUPS, GROUPS)
        tl.store(row_ptr + columns, pieces[i].to(row_ptr.dtype.element_ty), mask=columns < limit)


@jit
def sum_of(pieces):
    """The sum over the last axis of all pieces; those that have the shape of the first share one reduction."""
    total = pieces[0]
    for i in tl.static_range(1, len(pieces)):
        if pieces[i].shape == pieces[0].shape:
            total += pieces[i]
    total = tl.sum(total, axis=len(pieces[0].shape) - 1)
    for i in tl.static_range(1, len(pieces)):
        if pieces[i].shape != pieces[0].shape:
            total += tl.sum(pieces[i], axis=len(pieces[0].shape) - 1)
    return total
