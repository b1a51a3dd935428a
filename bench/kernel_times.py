"""How long single kernels take, beside PyTorch's operations for the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from runtime.bench.gates import start
from runtime.bench.scale import Scale
from runtime.bench.timing import each, time_us
from runtime.bench.tune import Case, cases, operation
from runtime.engine.graph import ops_of
from runtime.families.state import new_state
from runtime.kernels.ops import Ops, ops_for
from runtime.kernels.rms_norm import rms_norm_torch
from runtime.model.config import ModelConfig


def kernel_times(scale: Scale, name: str, read_gb_s: float, compiled: bool) -> Iterator[dict[str, Any]]:
    """Each matrix-vector kernel of a model at one row and at the largest batch, over distinct weights."""
    dtype = getattr(torch, scale.dtype)
    for case in cases(ModelConfig.from_hf(scale.hf_config(name))):
        copies = case.copies(dtype) if scale.device.type == "cuda" else 2
        times = {}
        for rows in (1, scale.max_batch):
            run = partial(operation(case, dtype, copies, rows, scale.device), ops_for(scale.device, rows))
            times[rows] = time_us(partial(each, run, range(copies), None), scale.device) / copies
        made: dict[str, Any] = {"device": scale.device, "dtype": dtype}
        weights = torch.randn(copies, case.outputs * case.matrices, case.width, **made)
        x, norm = torch.randn(1, case.width, **made), torch.randn(case.width, **made)
        plain = partial(pytorch, case, x, norm)
        peers = {"torch_us": plain} | ({"torch_compiled_us": torch.compile(plain)} if compiled else {})
        rate = case.bytes(dtype) / times[1] / 1e3
        yield {
            "model": name,
            "kernel": case.kernel,
            "outputs": case.outputs,
            "width": case.width,
            "time_us": times[1],
            "time_of_rows_us": times,
            "bandwidth_gb_s": rate,
            "share_of_read_bandwidth": rate / read_gb_s,
        } | {peer: time_us(partial(each, run, weights), scale.device) / copies for peer, run in peers.items()}
        del weights


def pytorch(case: Case, x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What a kernel computes, in PyTorch's operations; without what adds branches and combines splits."""
    if case.kernel == "residual_linear":
        return F.linear(x, weight)
    product = F.linear(rms_norm_torch(x, norm, 1e-6), weight)
    if case.kernel == "gated_mlp":
        gate, up = product.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up
    return product.argmax(-1) if case.kernel == "lm_head_argmax" else product


def attention_times(scale: Scale, name: str, read_gb_s: float) -> Iterator[dict[str, Any]]:
    """Attention over the caches of all layers, one after another, per layer."""
    model = scale.model(name)
    config, state = model.config, new_state(model, 1)
    for context in scale.contexts:
        start(model, state, context - 1)
        attend = partial(attention_of_all_layers(model, state), ops_of(model))
        spent = time_us(attend, scale.device) / len(config.layers)
        size = (model.plan.bytes_per_token(context) - model.plan.bytes_per_token(0)) / len(config.layers)
        yield {
            "model": name,
            "kernel": "decode_attention",
            "context": context,
            "time_us": spent,
            "bandwidth_gb_s": size / spent / 1e3,
            "share_of_read_bandwidth": size / spent / 1e3 / read_gb_s,
        }


def attention_of_all_layers(model: Any, state: Any) -> Callable[[Ops], None]:
    """What runs the attention of every layer of a decode step once, on a backend."""
    config = model.config

    def run(ops: Ops) -> None:
        for index, layer in enumerate(model.weights.layers):
            sizes = config.layers[index]
            ops.decode_attention(
                state.attended_of(sizes),
                state.cache.keys[index],
                state.cache.values[index],
                state.qkv_of(sizes),
                state.position,
                *model.rope.for_layer(index),
                heads=sizes.heads,
                scale=config.attention_scale,
                eps=config.rms_norm_eps,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                window=sizes.window,
                softcap=config.attention_softcap,
                splits=state.splits_of(sizes),
            )

    return run
