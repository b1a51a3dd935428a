"""What every operation does first: check its arguments.

Checks run before anything is launched and cost well under a microsecond each when they pass: the messages are put
together only once something is wrong.
"""

from __future__ import annotations

import torch

from runtime.kernels.quantized import Matrix, QuantizedMatrix
from runtime.kernels.scaled_matrix import ScaledMatrix

MAX_ROWS = 64  # of a step
MAX_TOKENS = 65536  # of a chunk of a prompt
MAX_UNITS_ON_CPU = 2048  # rows times key heads, which the compiled attention shares among threads


def check(
    name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Checks that `tensor` is contiguous and has exactly this shape, dtype and device.

    Raises:
        TypeError: not a tensor, or has another dtype.
        ValueError: another shape, device or a stride other than the contiguous one.
    """
    if (
        isinstance(tensor, torch.Tensor)
        and tensor.shape == shape
        and tensor.dtype is dtype
        and tensor.device == device
        and tensor.is_contiguous()
    ):
        return
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {shape}, got {type(tensor).__name__}")
    if tensor.dtype is not dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
    raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()} for shape {shape}")


def check_rows(name: str, tensor: torch.Tensor, most: int = MAX_ROWS) -> tuple[int, int]:
    """Checks a contiguous floating-point [rows, width] with 1 to `most` rows, and returns its two sizes.

    Raises:
        TypeError: not a tensor, or not of a floating-point dtype.
        ValueError: another rank, too many or no rows, or not contiguous.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor [rows, width], got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected 2 dimensions [rows, width], got shape {tuple(tensor.shape)}")
    rows, width = tensor.shape
    if not 1 <= rows <= most:
        raise ValueError(f"{name}: expected 1 to {most} rows, got {rows}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    return rows, width


def check_units(rows: int, kv_heads: int) -> None:
    """Checks that the compiled attention can take this many rows of this many key heads.

    Raises:
        ValueError: they are too many.
    """
    if rows * kv_heads > MAX_UNITS_ON_CPU:
        raise ValueError(
            f"qkv: expected at most {MAX_UNITS_ON_CPU // kv_heads} rows of {kv_heads} key heads, got {rows}"
        )


def check_weight(name: str, tensor: Matrix, width: int, x: torch.Tensor) -> int:
    """Checks a weight matrix [outputs, width] of x's dtype and device, and returns its number of outputs. One in blocks
    has the dtype of its values, fp32; one of integers with scales goes with every dtype."""
    if isinstance(tensor, QuantizedMatrix | ScaledMatrix):
        if isinstance(tensor, QuantizedMatrix) and tensor.dtype is not x.dtype:
            raise TypeError(f"{name}: expected x of dtype {tensor.dtype} with a matrix in blocks, got {x.dtype}")
        if tensor.shape[1] != width or tensor.device != x.device:
            raise ValueError(
                f"{name}: expected a matrix [outputs, {width}] on {x.device}, got {tensor} on {tensor.device}"
            )
        return len(tensor)
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
        given = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"{name}: expected a matrix [outputs, {width}], got {given}")
    outputs = tensor.shape[0]
    check(name, tensor, (outputs, width), x.dtype, x.device)
    return outputs


def check_residual(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    branch_norm: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    *,
    stored: bool = True,
    normed: bool = True,
) -> None:
    """Checks the optional branch that a kernel adds to the residual x: all three given, or none.

    `stored` says whether the kernel writes the new residual at all; residual_out may not be x itself, since every
    program still reads x while one of them stores. `normed` says whether the branch has a norm.
    """
    if branch is None:
        if branch_norm is not None or residual_out is not None:
            raise ValueError("branch_norm and residual_out: expected None without a branch, got a tensor")
        return
    check("branch", branch, tuple(x.shape), x.dtype, x.device)
    if normed:
        check("branch_norm", branch_norm, (x.shape[1],), x.dtype, x.device)
    if stored:
        check("residual_out", residual_out, tuple(x.shape), x.dtype, x.device)
        assert residual_out is not None
        same = residual_out.data_ptr() == x.data_ptr() != 0  # 0 on "meta", where nothing has an address
        if residual_out is x or same:
            raise ValueError("residual_out: expected a buffer other than x, got x itself")


def check_chunk(qkv: torch.Tensor, chunk: torch.Tensor, heads: int, kv_heads: int, head_dim: int) -> None:
    """Checks a chunk's packed queries, keys and values [seq, (heads + 2 * kv_heads) * head_dim], and where it is: row,
    start and count, [3] int64."""
    seq, _ = check_rows("qkv", qkv, MAX_TOKENS)
    if heads % kv_heads:
        raise ValueError(f"heads: expected a multiple of the {kv_heads} key heads, got {heads}")
    check("qkv", qkv, (seq, (heads + 2 * kv_heads) * head_dim), qkv.dtype, qkv.device)
    check("chunk", chunk, (3,), torch.int64, qkv.device)


def check_cache(k_cache: torch.Tensor, v_cache: torch.Tensor, x: torch.Tensor) -> None:
    """Checks keys and values [batch, kv_heads, slots, head_dim] of x's dtype and device."""
    if not isinstance(k_cache, torch.Tensor) or k_cache.dim() != 4:
        given = tuple(k_cache.shape) if isinstance(k_cache, torch.Tensor) else type(k_cache).__name__
        raise ValueError(f"k_cache: expected [batch, kv_heads, slots, head_dim], got {given}")
    check("k_cache", k_cache, tuple(k_cache.shape), x.dtype, x.device)
    check("v_cache", v_cache, tuple(k_cache.shape), x.dtype, x.device)


def check_rotary(
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    head_dim: int,
    x: torch.Tensor,
) -> None:
    """Checks the rotary tables [max_seq_len, head_dim / 2] and the norms [head_dim], both or neither, of queries and
    keys of x's dtype and device."""
    check("cos", cos, (cos.shape[0], head_dim // 2), x.dtype, x.device)
    check("sin", sin, tuple(cos.shape), x.dtype, x.device)
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm: expected both or neither, got one")
    if q_norm is not None:
        check("q_norm", q_norm, (head_dim,), x.dtype, x.device)
        check("k_norm", k_norm, (head_dim,), x.dtype, x.device)
