"""The operations of one decode step.

Each launcher runs its Triton kernel on a GPU (or under TRITON_INTERPRET=1), and the same arithmetic in PyTorch, its
reference, elsewhere. They know tensors and shapes, never a model.
"""

from runtime.kernels.advance import advance
from runtime.kernels.argmax import lm_head_argmax
from runtime.kernels.decode_attention import decode_attention
from runtime.kernels.gated_mlp import gated_mlp
from runtime.kernels.output_projection import output_projection
from runtime.kernels.qkv_projection import qkv_projection
from runtime.kernels.residual_linear import residual_linear
from runtime.kernels.rms_norm import rms_norm

__all__ = [
    "advance",
    "decode_attention",
    "gated_mlp",
    "lm_head_argmax",
    "output_projection",
    "qkv_projection",
    "residual_linear",
    "rms_norm",
]
