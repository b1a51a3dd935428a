"""Integers to floating point, exactly and in few instructions.

An integer u is inserted into the low bits of a float's fraction, which makes it 2^23 + u in fp32 or 1024 + u in fp16,
and 2^23 or 1024 is subtracted. Conversion instructions take a multiprocessor four times as long. Where u is 0 to 15 and
stands for u - 8, the 8 is subtracted too.
"""

from __future__ import annotations

from runtime.kernels.launch import IN_INTERPRETER
from runtime.kernels.triton_function import constexpr, jit, tl

# Four int8 in one register. With their sign bits flipped they are q + 128 = 0 to 255.
BYTES_TO_FP32 = constexpr(
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
BYTES_TO_FP16 = constexpr(
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
BYTES_TO_BF16 = constexpr(
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


# Two words of four nibbles each in one register, as in scaled_matrix.py: a pair of weights of each of four groups.
NIBBLES_TO_BF16 = constexpr(
    """{
    .reg .b32 one, zero, u;
    mov.b32 one, 0x3f803f80;
    mov.b32 zero, 0xc308c308;
    lop3.b32 u, $4, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, u, one, zero;
    shr.u32 u, $4, 4;
    lop3.b32 u, u, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $1, u, one, zero;
    shr.u32 u, $4, 8;
    lop3.b32 u, u, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $2, u, one, zero;
    shr.u32 u, $4, 12;
    lop3.b32 u, u, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $3, u, one, zero;
    }"""
)
# In fp16 the second nibble counts sixteenfold.
NIBBLES_TO_FP16 = constexpr(
    """{
    .reg .b32 sixteenth, zero, least, words, u;
    mov.b32 zero, 0x64086408;
    mov.b32 sixteenth, 0x2c002c00;
    mov.b32 least, 0xd480d480;
    shr.u32 words, $4, 8;
    lop3.b32 u, $4, 0x000f000f, 0x64006400, 0xea;
    sub.f16x2 $0, u, zero;
    lop3.b32 u, $4, 0x00f000f0, 0x64006400, 0xea;
    fma.rn.f16x2 $1, u, sixteenth, least;
    lop3.b32 u, words, 0x000f000f, 0x64006400, 0xea;
    sub.f16x2 $2, u, zero;
    lop3.b32 u, words, 0x00f000f0, 0x64006400, 0xea;
    fma.rn.f16x2 $3, u, sixteenth, least;
    }"""
)
# In fp32 a nibble may stand in any bits of the fraction: 2^23, 2^19, ... + u.
NIBBLES_TO_FP32 = constexpr(
    """{
    .reg .b32 words;
    shr.u32 words, $8, 12;
    lop3.b32 $0, $8, 0x0000000f, 0x4b000000, 0xea;
    lop3.b32 $1, $8, 0x000f0000, 0x43000000, 0xea;
    lop3.b32 $2, $8, 0x000000f0, 0x49000000, 0xea;
    lop3.b32 $3, words, 0x00000f00, 0x47000000, 0xea;
    lop3.b32 $4, $8, 0x00000f00, 0x47000000, 0xea;
    lop3.b32 $5, words, 0x0000f000, 0x45000000, 0xea;
    lop3.b32 $6, $8, 0x0000f000, 0x45000000, 0xea;
    lop3.b32 $7, words, 0x000f0000, 0x43000000, 0xea;
    sub.f32 $0, $0, 0f4b000008;
    sub.f32 $1, $1, 0f43080000;
    sub.f32 $2, $2, 0f49000080;
    sub.f32 $3, $3, 0f47000800;
    sub.f32 $4, $4, 0f47000800;
    sub.f32 $5, $5, 0f45008000;
    sub.f32 $6, $6, 0f45008000;
    sub.f32 $7, $7, 0f43080000;
    }"""
)
# Four fp16 in a number of 64 bits.
HALVES_TO_FP32 = constexpr(
    """{
    .reg .b16 a, b, c, d;
    mov.b64 {a, b, c, d}, $4;
    cvt.f32.f16 $0, a;
    cvt.f32.f16 $1, b;
    cvt.f32.f16 $2, c;
    cvt.f32.f16 $3, d;
    }"""
)


@jit
def widened(weight, dtype: tl.constexpr):
    """Weights in `dtype`, which must hold their values exactly."""
    if weight.dtype != tl.int8 or IN_INTERPRETER:
        return weight.to(dtype)
    elif dtype == tl.float32:
        return tl.inline_asm_elementwise(BYTES_TO_FP32, "=r,=r,=r,=r,r", [weight], tl.float32, is_pure=True, pack=4)
    elif dtype == tl.float16:
        return tl.inline_asm_elementwise(BYTES_TO_FP16, "=r,=r,r", [weight], tl.float16, is_pure=True, pack=4)
    else:
        return tl.inline_asm_elementwise(BYTES_TO_BF16, "=r,=r,r", [weight], tl.bfloat16, is_pure=True, pack=4)


@jit
def widened_groups(words, dtype: tl.constexpr):
    """The weights q - 8 of words of four nibbles, one tensor for each group, in `dtype`."""
    if IN_INTERPRETER:
        return (
            ((words & 15) - 8).to(dtype),
            ((words >> 4 & 15) - 8).to(dtype),
            ((words >> 8 & 15) - 8).to(dtype),
            ((words >> 12 & 15) - 8).to(dtype),
        )
    elif dtype == tl.float32:
        return tl.inline_asm_elementwise(
            NIBBLES_TO_FP32,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [words],
            (tl.float32, tl.float32, tl.float32, tl.float32),
            True,
            2,
        )
    elif dtype == tl.float16:
        return tl.inline_asm_elementwise(
            NIBBLES_TO_FP16, "=&r,=&r,=&r,=&r,r", [words], (tl.float16, tl.float16, tl.float16, tl.float16), True, 2
        )
    else:
        return tl.inline_asm_elementwise(
            NIBBLES_TO_BF16, "=&r,=&r,=&r,=&r,r", [words], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2
        )


@jit
def group_scales(scales):
    """The scales of the four groups in fp32, from 64-bit numbers of four fp16 each."""
    if IN_INTERPRETER:
        return (
            scales.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
            (scales >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
            (scales >> 32).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
            (scales >> 48).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
        )
    else:
        return tl.inline_asm_elementwise(
            HALVES_TO_FP32, "=r,=r,=r,=r,l", [scales], (tl.float32, tl.float32, tl.float32, tl.float32), True, 1
        )


@jit
def row_of_words(table_ptr, scale_ptr, row, columns, WIDTH: tl.constexpr):
    """Columns of a row of int4 (scaled_matrix.py) in fp32."""
    number, group, mask = row * (WIDTH // 128) + columns // 128, columns // 32 % 4, columns < WIDTH
    word = tl.load(table_ptr + number * 32 + columns % 32, mask=mask, other=0)
    scale = (tl.load(scale_ptr + number, mask=mask, other=0) >> 16 * group).to(tl.int16).to(tl.float16, bitcast=True)
    return ((word >> 4 * group & 15) - 8).to(tl.float32) * scale.to(tl.float32)
