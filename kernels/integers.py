"""Integers to floating point, exactly and in few instructions.

An integer is put into the low bits of a number whose last bit counts one, and that number is subtracted: 2^23 + u in
fp32, 1024 + u in fp16. Converting instructions take a multiprocessor four times as long.
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.kernels.launch import IN_INTERPRETER

# Four int8 in one register. With their sign bits flipped they are q + 128 = 0 to 255.
BYTES_TO_FP32: tl.constexpr = tl.constexpr(
    """{
    .reg .b32 u;
    xor.b32 u, $4, 0x80808080;
    prmt.b32 $0, u, 0x4b000000, 0x7540;
    prmt.b32 $1, u, 0x4b000000, 0x7541;
    prmt.b32 $2, u, 0x4b000000, 0x7542;
    prmt.b32 $3, u, 0x4b000000, 0x7543;
    sub.f32 $0, $0, 0f4b000080;
    sub.f32 $1, $1, 0f4b000080;
    sub.f32 $2, $2, 0f4b000080;
    sub.f32 $3, $3, 0f4b000080;
    }"""
)
BYTES_TO_FP16: tl.constexpr = tl.constexpr(
    """{
    .reg .b32 u, zero;
    mov.b32 zero, 0x64806480;
    xor.b32 u, $2, 0x80808080;
    prmt.b32 $0, u, 0x64000000, 0x7170;
    prmt.b32 $1, u, 0x64000000, 0x7372;
    sub.f16x2 $0, $0, zero;
    sub.f16x2 $1, $1, zero;
    }"""
)
# bf16 has room for seven bits: 128 + the low seven, less 128 or, where the sign bit is set, 256.
BYTES_TO_BF16: tl.constexpr = tl.constexpr(
    """{
    .reg .b32 one, low, high, a, b;
    mov.b32 one, 0x3f803f80;
    prmt.b32 low, $2, 0, 0x4140;
    prmt.b32 high, $2, 0, 0x4342;
    lop3.b32 a, low, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 b, low, 0x00800080, 0xc300c300, 0xea;
    fma.rn.bf16x2 $0, a, one, b;
    lop3.b32 a, high, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 b, high, 0x00800080, 0xc300c300, 0xea;
    fma.rn.bf16x2 $1, a, one, b;
    }"""
)


@triton.jit
def widened(weight, dtype: tl.constexpr):
    """Weights in `dtype`, one that holds their values."""
    if weight.dtype != tl.int8 or IN_INTERPRETER:
        return weight.to(dtype)
    elif dtype == tl.float32:
        return tl.inline_asm_elementwise(BYTES_TO_FP32, "=r,=r,=r,=r,r", [weight], tl.float32, is_pure=True, pack=4)
    elif dtype == tl.float16:
        return tl.inline_asm_elementwise(BYTES_TO_FP16, "=r,=r,r", [weight], tl.float16, is_pure=True, pack=4)
    else:
        return tl.inline_asm_elementwise(BYTES_TO_BF16, "=r,=r,r", [weight], tl.bfloat16, is_pure=True, pack=4)
