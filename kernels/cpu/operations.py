"""The operations of a decode step fused for CPUs, compiled by numba: what a decode loop runs there."""

from runtime.kernels.cpu.decode_attention import decode_attention
from runtime.kernels.cpu.next_token import advance, lm_head_argmax
from runtime.kernels.cpu.projections import gated_mlp, qkv_projection, residual_linear

__all__ = ["advance", "decode_attention", "gated_mlp", "lm_head_argmax", "qkv_projection", "residual_linear"]
