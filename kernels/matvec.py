"""The product of a weight tile and a row of activations, as every matrix-vector kernel computes it.

    y[output] = sum over columns of weight[output, column] * x[column]     in fp32

One order of summation for all of them: a change here changes every kernel's last bits alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.kernels.launch import IN_INTERPRETER


@triton.jit
def matvec(weight, x):
    """The products [BLOCK_OUTPUTS] in fp32 of a tile [BLOCK_OUTPUTS, BLOCK_WIDTH] in the model's dtype and x
    [BLOCK_WIDTH] in fp32."""
    return tl.sum(weight.to(tl.float32) * x[None, :], axis=1)


@triton.jit
def held_packed(weight):
    """The weights as they are, through a line of assembly that stays inside the loop over rows. Otherwise the compiler
    widens them to fp32 once, ahead of the loop, and needs twice the registers: too many for two programs."""
    if IN_INTERPRETER:
        return weight
    else:
        PACK: tl.constexpr = 32 // weight.dtype.primitive_bitwidth
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [weight], weight.dtype, is_pure=False, pack=PACK)
