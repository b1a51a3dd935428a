"""The operations of a decode step and of a short chunk of a prompt, fused for CPUs and compiled by numba."""

from runtime.kernels.cpu.decode_attention import decode_attention
from runtime.kernels.cpu.next_token import advance, lm_head_argmax
from runtime.kernels.cpu.projections import gated_mlp, qkv_projection, residual_linear
from runtime.kernels.cpu.sequence_attention import sequence_attention

__all__ = [
    "advance",
    "decode_attention",
    "gated_mlp",
    "lm_head_argmax",
    "qkv_projection",
    "residual_linear",
    "sequence_attention",
]
