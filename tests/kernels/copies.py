"""Every kernel's arithmetic once more, written out in fp32 with its roundings, and what people get wrong in it.

Each copy takes the arguments of its case's kernel and the name of a fault; without one it is right. Its sums run in
another order than the reference's, as a kernel's do.
"""

from __future__ import annotations

import math

import torch

from runtime.kernels import attention_splits
from runtime.kernels.argmax import NO_TOKEN
from runtime.kernels.attention_splits import block_keys, plan_splits
from runtime.kernels.gumbel import scores_torch


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 values rounded to the model's dtype."""
    return x.to(dtype).float()


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight^T in fp32, from products and a sum."""
    return (x.float()[:, None] * weight.float()).sum(-1)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype, fault: str = "") -> torch.Tensor:
    x = x.float()
    scaled = x * torch.rsqrt(x.pow(2).flip(-1).sum(-1, keepdim=True) / x.shape[-1] + eps)
    gain = weight.float() + (fault != "w instead of 1 + w")
    if fault == "Llama's order":
        return rounded(rounded(scaled, dtype) * gain, dtype)
    return scaled * gain if fault == "norm not rounded" else rounded(scaled * gain, dtype)


def with_branch(x, branch, branch_norm, eps, fault=""):
    if branch is None:
        return x.float()
    if fault == "branch not normalised":
        return rounded(x.float() + branch.float(), x.dtype)
    inner = "norm not rounded" if fault == "branch added before it is rounded" else fault
    total = x.float() + norm(branch, branch_norm, eps, x.dtype, inner)
    return total if fault == "residual not rounded" else rounded(total, x.dtype)


def rms_norm(out, x, weight, residual, *, eps, fault=""):
    inner = "norm not rounded" if fault == "residual added before the norm is rounded" else fault
    normed = norm(x, weight, eps, x.dtype, inner)
    out.copy_(normed if residual is None or fault == "residual missing" else residual.float() + normed)


def qkv_projection(out, x, norm_weight, weight, *, eps, branch=None, branch_norm=None, residual_out=None, fault=""):
    total = with_branch(x, branch, branch_norm, eps, fault)
    if residual_out is not None and fault != "new residual not written":
        residual_out.copy_(total)
    if fault == "norm of the old residual":
        total = x.float()
    out.copy_(product(norm(total, norm_weight, eps, x.dtype, fault), weight))


def gelu(x: torch.Tensor, fault: str = "") -> torch.Tensor:
    if fault == "exact GELU":
        return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))
    return x * torch.sigmoid(2 * 0.7978845608028654 * (x + 0.044715 * x**3))


def gated_mlp(out, x, norm_weight, gate_up, *, eps, branch=None, branch_norm=None, residual_out=None, fault=""):
    total = with_branch(x, branch, branch_norm, eps, fault)
    if residual_out is not None:
        residual_out.copy_(total)
    normed, dtype = norm(total, norm_weight, eps, x.dtype, fault), x.dtype
    gate, up = (product(normed, weight) for weight in gate_up.chunk(2))
    if fault != "gate product not rounded":
        gate = rounded(gate, dtype)
    if fault != "up product not rounded":
        up = rounded(up, dtype)
    if fault == "GELU on up":
        gate, up = up, gate
    activated = gelu(gate, fault)
    out.copy_((activated if fault == "activation not rounded" else rounded(activated, dtype)) * up)


def residual_linear(out, x, weight, residual, fault=""):
    y = product(x, weight)
    if residual is not None and fault != "residual missing":
        y = residual.float() + (y if fault == "residual added before rounding" else rounded(y, out.dtype))
    out.copy_(y)


def lm_head_argmax(
    token, logits, x, norm_weight, table, *, eps, softcap, branch=None, branch_norm=None, seed=None, position=None,
    inverse_temperature=None, mask=None, fault="", block=64,
):  # fmt: skip
    normed = norm(with_branch(x, branch, branch_norm, eps, fault), norm_weight, eps, x.dtype, fault)
    unrounded = product(normed, table)
    scores = rounded(unrounded, x.dtype)
    if softcap is not None and fault != "softcap omitted":
        if fault == "softcap not rounded":
            scores = softcap * torch.tanh(scores / softcap)
        else:
            scores = rounded(torch.tanh(rounded(scores / softcap, x.dtype)), x.dtype)
            scores = scores * softcap
    logits.copy_(scores)
    scores = unrounded if fault == "argmax of unrounded logits" else logits.float()
    if seed is not None:
        scores = torch.stack(
            [scores_torch(*row) for row in zip(scores, seed, position, inverse_temperature, strict=True)]
        )
    if mask is not None and fault != "a mask left out":
        bits = (mask[:, :, None] >> torch.arange(32) & 1).flatten(1)[:, : scores.shape[1]]
        is_kept = (bits > 0) | ~(scores < torch.inf) if fault != "a NaN masked away" else bits > 0
        scores = scores.where(is_kept, -torch.inf)
    if fault == "last vocabulary block unmasked":
        scores = torch.nn.functional.pad(scores, (0, -scores.shape[1] % block))
    if fault == "last vocabulary block not looked at":
        scores = scores[:, : scores.shape[1] // block * block]
    if fault == "a NaN skipped":
        scores = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    highest = fault == "tie to the highest index"
    best = scores.shape[1] - 1 - scores.flip(1).argmax(1) if highest else scores.argmax(1)
    finite = scores.gather(1, best[:, None])[:, 0].isfinite()
    token.copy_(best if fault == "what is not finite picked" else torch.where(finite, best, NO_TOKEN))


def rotary(x, cos, sin, dtype, fault=""):
    first, second = x.chunk(2, dim=-1)
    if fault == "interleaved pairs":
        first, second = x[..., ::2], x[..., 1::2]
    if fault == "rotated the wrong way":
        sin = -sin

    def step(value: torch.Tensor) -> torch.Tensor:
        return value if fault == "rotary rounded once" else rounded(value, dtype)

    rotated = step(first * cos) - step(second * sin), step(second * cos) + step(first * sin)
    whole = torch.stack(rotated, -1).flatten(-2) if fault == "interleaved pairs" else torch.cat(rotated, -1)
    return rounded(whole, dtype)


def scores_of(q, k, scale, softcap, dtype, fault=""):
    """Scores [heads, keys] of q [heads, head_dim] and k [heads, keys, head_dim]."""

    def step(value: torch.Tensor) -> torch.Tensor:
        return value if fault == "scores not rounded" else rounded(value, dtype)

    scale = 1.0 if fault == "scale omitted" else scale
    if fault == "scale before the product":
        q, scale = rounded(q * scale, dtype), 1.0
    scores = (k * q[:, None]).sum(-1)
    if softcap is None:
        return rounded(scores * scale, dtype) if fault == "scores rounded" else scores * scale
    if fault == "softcap omitted":
        return step(step(scores) * scale)
    if fault == "cap before scale":
        return step(step(step(torch.tanh(step(step(scores) / softcap))) * softcap) * scale)
    return step(step(torch.tanh(step(step(step(scores) * scale) / softcap))) * softcap)


def over_splits(scores, values, size, dtype, fault=""):
    """Attention [heads, head_dim] of scores [heads, keys], the new key's last, in splits: the new key alone, and runs
    of `size` older ones."""
    older = range(0, scores.shape[1] - 1, max(size, 1))
    runs = [slice(-1, None), *(slice(first, min(first + size, scores.shape[1] - 1)) for first in older)]
    if fault == "a split dropped" and len(runs) > 1:
        runs.pop()
    if fault == "the new key left out" and len(runs) > 1:
        runs.pop(0)
    highest = torch.stack([scores[:, run].amax(1) for run in runs])  # [splits, heads]
    weights = [torch.exp(scores[:, run] - most[:, None]) for run, most in zip(runs, highest, strict=True)]
    total = torch.stack([weight.sum(1) for weight in weights])
    partial = torch.stack(
        [(rounded(weight, dtype)[:, None] @ values[:, run])[:, 0] for run, weight in zip(runs, weights, strict=True)]
    )  # [splits, heads, head_dim]
    if fault == "splits averaged":
        return (partial / total[..., None]).mean(0)
    rescaled = torch.exp(highest - highest.amax(0))
    if fault == "splits combined without rescaling":
        rescaled = torch.ones_like(rescaled)
    return (partial * rescaled[..., None]).sum(0) / (total * rescaled).sum(0)[:, None]


def decode_attention(
    out, k_cache, v_cache, qkv, position, cos, sin, *, heads, scale, eps, window, softcap, fault="", **norms
):
    rows, kv_heads, slots, head_dim = k_cache.shape
    dtype = qkv.dtype
    of_head = torch.arange(heads, device=qkv.device) // (heads // kv_heads)
    if fault == "query heads dealt out in turn":
        of_head = torch.arange(heads, device=qkv.device) % kv_heads
    sees = window and window + {"window one too long": 1, "window one too short": -1}.get(fault, 0)
    for row, at in enumerate(position.tolist()):
        states = qkv[row].float().view(-1, head_dim)
        q, k, v = states.split((heads, kv_heads, kv_heads))
        if norms and fault != "q/k norm missing":
            q, k = (norm(x, norms[name], eps, dtype, fault) for x, name in ((q, "q_norm"), (k, "k_norm")))
        angle = at - 1 if fault == "rotated by the position before" else at
        q, k = (rotary(x, cos[angle].float(), sin[angle].float(), dtype, fault) for x in (q, k))
        slot = (at + (fault == "new key in the wrong slot")) % slots
        if fault != "new key not written":
            k_cache[row, :, slot] = k.to(dtype)
        v_cache[row, :, slot] = v.to(dtype)

        length = at + 1 if window is None else min(at + 1, sees)
        # A block of keys past the last one, as if it were not masked; there is none to read where the cache ends.
        extra = min(32, slots - at - 1) if fault == "last block unmasked" else 0
        positions = torch.arange(at + 1 - length, at + 1 + max(extra, 0), device=qkv.device)
        source = (row + 1) % rows if fault == "a neighbour's cache" else row
        keys, values = (cache[source, :, positions % slots].float()[of_head] for cache in (k_cache, v_cache))
        scores = scores_of(q, keys, scale, softcap, dtype, fault)
        size = plan_splits(at, window, block_keys(dtype), attention_splits.WARP_SPLITS)[1]
        out[row] = over_splits(scores, values, size, dtype, fault).flatten()


def attention_and_projection(
    out, attended, k_cache, v_cache, qkv, position, cos, sin, weight, residual, *, heads, fault="", **options
):
    x = torch.empty_like(attended, dtype=torch.float32 if fault == "attention not rounded" else None)
    decode_attention(x, k_cache, v_cache, qkv, position, cos, sin, heads=heads, fault=fault, **options)
    attended.copy_(x)
    residual_linear(out, x, weight, residual, fault)


def advance(token, x, position, done, emitted, step, table, stop_ids, limit, *, embed_scale, pad, fault=""):
    if fault != "a finished row emits":
        token[done] = pad
    position += 1 if fault == "a finished row moves on" else (~done).to(position.dtype)
    emitted[(int(step[0]) + (fault == "emitted a slot late")) % len(emitted)] = token
    stops = stop_ids[:, :-1] if fault == "a stop token overlooked" else stop_ids
    done |= (token[:, None] == (stops[:1] if fault == "the first row's stop tokens for all" else stops)).any(1)
    if fault != "a row passes its limit":
        done |= position >= limit
    if fault != "a row goes on from nothing":
        done |= token < 0
    step += 1
    scale = x.shape[1] ** 0.5 if fault == "embedding scale not rounded" else embed_scale
    x.copy_(table[token if fault == "the last row for nothing" else token.clamp(min=0)].float() * scale)
