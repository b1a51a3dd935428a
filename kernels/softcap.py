"""The caps on scores and logits, from operations that every GPU and the interpreter have."""

from __future__ import annotations

from runtime.kernels.triton_function import jit, tl


@jit
def tanh(x):
    """tanh in fp32 for any x: a series near zero, where the closed form cancels."""
    magnitude = tl.abs(x)
    decayed = tl.exp(-2.0 * magnitude)
    far = (1.0 - decayed) / (1.0 + decayed)
    s = x * x
    near = magnitude * (1.0 + s * (-0.33333334 + s * (0.13333334 + s * (-0.053968254 + s * 0.021869488))))
    value = tl.where(magnitude < 0.25, near, far)
    return tl.where(x < 0, -value, value)


@jit
def capped(values, softcap, dtype: tl.constexpr):
    """softcap * tanh(values / softcap), fp32 in and out, rounded to the model's dtype after every operation."""
    values = tanh((values / softcap).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    return (values * softcap).to(dtype).to(tl.float32)


@jit
def finished_scores(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr, dtype: tl.constexpr):
    """Scale and cap. Without a cap scores stay in fp32; Gemma 2's eager attention rounds after every operation."""
    if HAS_SOFTCAP:
        return capped((scores.to(dtype).to(tl.float32) * scale).to(dtype).to(tl.float32), softcap, dtype)
    else:
        return scores * scale
