"""The operations of one decode step, and of a chunk of a prompt on a GPU.

The operations of a step are functions here: each runs its Triton kernel for tensors on a GPU (or under
TRITON_INTERPRET=1), and the same arithmetic in PyTorch elsewhere. In ops.py all operations are methods of a backend.
They know tensors and shapes, never a model.
"""

from runtime.kernels.ops import (
    advance,
    decode_attention,
    gated_mlp,
    lm_head_argmax,
    qkv_projection,
    residual_linear,
    rms_norm,
)

__all__ = [
    "advance",
    "decode_attention",
    "gated_mlp",
    "lm_head_argmax",
    "qkv_projection",
    "residual_linear",
    "rms_norm",
]


def __dir__() -> list[str]:
    return __all__
