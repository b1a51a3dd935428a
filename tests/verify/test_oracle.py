"""The fp64 oracle against an independent forward pass in 80-bit floats, beside Hugging Face in double."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from runtime.parity.oracle import QUERIES, Oracle

FAMILIES = ["gemma", "gemma2", "gemma3"]
LAST = 5


def wide_logits(hf, ids: list[int], embed_scale: float) -> np.ndarray:
    """The logits of all positions, written from the formulas alone on Hugging Face's weights and config, in NumPy's
    longdouble. One query at a time, so that nothing is shared with the oracle but the model."""
    config = hf.config
    state = {name: tensor.double().numpy().astype(np.longdouble) for name, tensor in hf.state_dict().items()}
    gemma3, gemma1 = config.model_type == "gemma3_text", config.model_type == "gemma"
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    scale = np.longdouble(head_dim if gemma1 else config.query_pre_attn_scalar) ** np.longdouble(-0.5)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.longdouble(config.rms_norm_eps)) * (1 + state[name])

    def rope(x, kind):  # [seq, heads, head_dim]
        parameters = config.rope_parameters[kind] if gemma3 else config.rope_parameters
        exponent = np.arange(0, head_dim, 2).astype(np.longdouble) / head_dim
        angle = np.arange(len(x)).astype(np.longdouble)[:, None] / np.longdouble(parameters["rope_theta"]) ** exponent
        angle /= np.longdouble(parameters.get("factor", 1.0) or 1.0)
        cos, sin = (np.concatenate([f(angle)] * 2, axis=1)[:, None] for f in (np.cos, np.sin))
        half = head_dim // 2
        return x * cos + np.concatenate((-x[..., half:], x[..., :half]), axis=-1) * sin

    def gelu(x):
        inner = np.sqrt(2 / np.longdouble(np.pi)) * (x + np.longdouble("0.044715") * x**3)
        return x / 2 * (1 + np.tanh(inner))

    x = state["model.embed_tokens.weight"][ids] * np.longdouble(embed_scale)
    for index in range(config.num_hidden_layers):
        at = f"model.layers.{index}."
        kind = "full_attention" if gemma1 else config.layer_types[index]
        normed = norm(x, at + "input_layernorm.weight")
        q, k, v = (
            (normed @ state[f"{at}self_attn.{part}_proj.weight"].T).reshape(len(ids), -1, head_dim) for part in "qkv"
        )
        if gemma3:
            q, k = norm(q, at + "self_attn.q_norm.weight"), norm(k, at + "self_attn.k_norm.weight")
        q, k = rope(q, kind), rope(k, kind)
        mixed = np.zeros((len(ids), heads, head_dim), np.longdouble)
        for query in range(len(ids)):
            first = max(0, query - config.sliding_window + 1) if kind == "sliding_attention" else 0
            for head in range(heads):
                its = head // (heads // kv_heads)
                scores = (k[first : query + 1, its] @ q[query, head]) * scale
                if config.model_type == "gemma2":
                    scores = np.tanh(scores / config.attn_logit_softcapping) * config.attn_logit_softcapping
                weights = np.exp(scores - scores.max())
                mixed[query, head] = weights / weights.sum() @ v[first : query + 1, its]
        branch = mixed.reshape(len(ids), -1) @ state[at + "self_attn.o_proj.weight"].T
        x = x + (branch if gemma1 else norm(branch, at + "post_attention_layernorm.weight"))
        before = "post_attention_layernorm" if gemma1 else "pre_feedforward_layernorm"
        normed = norm(x, f"{at}{before}.weight")
        inner = gelu(normed @ state[at + "mlp.gate_proj.weight"].T) * (normed @ state[at + "mlp.up_proj.weight"].T)
        branch = inner @ state[at + "mlp.down_proj.weight"].T
        x = x + (branch if gemma1 else norm(branch, at + "post_feedforward_layernorm.weight"))
    logits = norm(x, "model.norm.weight") @ state["lm_head.weight"].T
    cap = getattr(config, "final_logit_softcapping", None)
    return np.tanh(logits / cap) * cap if cap else logits


def error(found: torch.Tensor, wide: np.ndarray) -> float:
    return float(np.abs(found.numpy().astype(np.longdouble) - wide[-len(found) :]).max())


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="needs a longdouble that is wider than a double")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_is_fp64_throughout_and_hugging_face_in_double_is_not(family, dtype, small_pair, random_ids):
    pair, ids = small_pair(family, dtype), random_ids(21)
    scale = torch.tensor(pair.ours.config.hidden**0.5, dtype=dtype).item()
    wide = wide_logits(pair.hf, ids, scale)
    size = float(np.abs(wide).max())
    found = Oracle(pair.ours.config, pair.ours.weights).logits(ids, LAST)
    assert found.dtype == torch.float64
    # 4 layers of a few thousand additions each; fp32 anywhere would leave 1e-7.
    assert error(found, wide) < 1e-12 * max(1.0, size)
    with torch.inference_mode():
        double = copy.deepcopy(pair.hf).double()(torch.tensor([ids])).logits[0, -LAST:]
    assert double.dtype == torch.float64
    assert error(double, wide) > 1e-7


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_in_pieces_give_the_same(family, small_pair, random_ids, monkeypatch):
    pair, ids = small_pair(family), random_ids(53)
    oracle = Oracle(pair.ours.config, pair.ours.weights)
    assert len(ids) < QUERIES
    whole = oracle.logits(ids, 40)
    monkeypatch.setattr("runtime.parity.oracle.QUERIES", 7)
    monkeypatch.setattr("runtime.parity.oracle.VOCAB_SLICE", 100)
    assert (oracle.logits(ids, 40) - whole).abs().max() < 1e-12


@pytest.mark.parametrize("last", [0, 4])
def test_positions_that_are_not_there(last, small_pair):
    pair = small_pair("gemma3")
    with pytest.raises(ValueError, match=f"expected 1 to 3 .*got {last}"):
        Oracle(pair.ours.config, pair.ours.weights).logits([5, 6, 7], last)
