"""Every plain PyTorch form against the module of transformers that it stands for: the same bits, in fp32 and bf16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from transformers import DynamicCache
from transformers.models.gemma import modeling_gemma
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma3 import modeling_gemma3

from runtime.kernels.advance import embed_torch
from runtime.kernels.argmax import logits_torch
from runtime.kernels.attention import attention_torch
from runtime.kernels.ops import TorchOps
from runtime.kernels.rms_norm import residual_torch, rms_norm_torch
from runtime.kernels.rotary import rotary_torch
from runtime.model.config import RuntimeConfig
from runtime.model.rope import RopeTables

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 1e-6
OPS = TorchOps()
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
MODULES = {"gemma": modeling_gemma, "gemma2": modeling_gemma2, "gemma3": modeling_gemma3}
CLASSES = {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3": "Gemma3"}
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_family = pytest.mark.parametrize("family", MODULES)


def module(family: str, name: str):
    return getattr(MODULES[family], CLASSES[family] + name)


@every_family
@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 640), (1, 9, 84), (1, 3, 5, 33)], ids=str)
def test_rms_norm(family, dtype, shape):
    norm = module(family, "RMSNorm")(shape[-1], eps=EPS)
    torch.nn.init.normal_(norm.weight, 0.5)
    norm, x = norm.to(dtype), torch.randn(shape, dtype=torch.float32).mul(30).to(dtype)
    assert torch.equal(rms_norm_torch(x, norm.weight, EPS), norm(x))
    assert torch.equal(residual_torch(x, -x, norm.weight, EPS), x + norm(-x))


@every_family
@every_dtype
def test_rotary_tables_and_rotation(family, dtype, small_pair):
    pair = small_pair(family, dtype)
    config, rotary = pair.ours.config, pair.hf.model.rotary_emb
    tables = RopeTables(config, RuntimeConfig("cpu", str(dtype).removeprefix("torch."), max_seq_len=400))
    positions = torch.arange(400)[None]
    q, k = torch.randn(1, 3, 400, 24).to(dtype), torch.randn(1, 1, 400, 24).to(dtype)
    for layer in range(len(config.layers)):
        kind = (pair.hf.config.layer_types[layer],) if family == "gemma3" else ()
        cos, sin = rotary(q, positions, *kind)
        ours_cos, ours_sin = tables.for_layer(layer)
        assert torch.equal(torch.cat((ours_cos, ours_cos), dim=-1), cos[0])
        assert torch.equal(torch.cat((ours_sin, ours_sin), dim=-1), sin[0])
        expected = MODULES[family].apply_rotary_pos_emb(q, k, cos, sin)
        assert torch.equal(rotary_torch(q, ours_cos, ours_sin), expected[0])
        assert torch.equal(rotary_torch(k, ours_cos, ours_sin), expected[1])


@every_family
@every_dtype
def test_embedding(family, dtype, small_pair):
    pair, ids = small_pair(family, dtype), torch.tensor([[3, 0, 498]])
    scale = torch.tensor(pair.ours.config.hidden**0.5, dtype=dtype).item()
    assert torch.equal(embed_torch(pair.ours.weights.embedding, ids, scale), pair.hf.model.embed_tokens(ids))


@every_family
@every_dtype
def test_mlp(family, dtype, small_pair):
    pair = small_pair(family, dtype)
    layer, hf_layer = pair.ours.weights.layers[1], pair.hf.model.layers[1]
    pre_norm = hf_layer.post_attention_layernorm if family == "gemma" else hf_layer.pre_feedforward_layernorm
    x = torch.randn(1, 1, 84).to(dtype)
    hidden, out = torch.full((1, 147), torch.nan, dtype=dtype), torch.full((1, 84), torch.nan, dtype=dtype)
    OPS.gated_mlp(hidden, x[0], layer.mlp_norm, layer.gate_up, eps=EPS)
    OPS.residual_linear(out, hidden, layer.down)
    assert torch.equal(out, hf_layer.mlp(pre_norm(x))[0])
    OPS.residual_linear(out, hidden, layer.down, residual=x[0])
    assert torch.equal(out, x[0] + hf_layer.mlp(pre_norm(x))[0])


@every_family
@every_dtype
@pytest.mark.parametrize("start", [1, 14, 15, 16, 40], ids=lambda start: f"after{start}")
def test_decode_attention_layer(family, dtype, start, small_pair):
    """Projections, norms, rotary embedding, cache and attention of four steps, over the edge of the window."""
    if family == "gemma3" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers before 5.23 does not group query heads under a mask")
    pair = small_pair(family, dtype)
    config, weights, hf = pair.ours.config, pair.ours.weights, pair.hf
    cos, sin = pair.ours.rope.for_layer(0)
    sizes, layer, hf_layer = config.layers[0], weights.layers[0], hf.model.layers[0]
    window = sizes.window
    slots = window or 64
    k_cache, v_cache = (torch.full((1, sizes.kv_heads, slots, sizes.head_dim), 1e4, dtype=dtype) for _ in "kv")

    # Fill both caches with the same random history.
    past = DynamicCache(config=hf.config)
    keys, values = (torch.randn(1, sizes.kv_heads, start, sizes.head_dim).to(dtype) for _ in "kv")
    past.update(keys, values, 0)
    kept = torch.arange(max(0, start - slots), start)
    k_cache[:, :, kept % slots], v_cache[:, :, kept % slots] = keys[:, :, kept], values[:, :, kept]

    for at in range(start, start + 4):
        x = torch.randn(1, 1, config.hidden).to(dtype)
        kind = (hf.config.layer_types[0],) if family == "gemma3" else ()
        length = at + 1 if window is None else min(at + 1, window)
        # As transformers' masking decides: none for one query, but a mask of ones once the window is full.
        full = length == window or family == "gemma2"
        mask = torch.ones(1, 1, 1, length, dtype=torch.bool) if full else None
        if family == "gemma2":
            mask = torch.zeros(1, 1, 1, length, dtype=dtype)
        with torch.no_grad():
            expected, _ = hf_layer.self_attn(
                hf_layer.input_layernorm(x),
                position_embeddings=hf.model.rotary_emb(x, torch.tensor([[at]]), *kind),
                attention_mask=mask,
                past_key_values=past,
            )
        qkv, position = torch.empty(1, sum(sizes.qkv_widths), dtype=dtype), torch.tensor([at], dtype=torch.int32)
        OPS.qkv_projection(qkv, x[0], layer.attention_norm, layer.qkv, eps=EPS, widths=sizes.qkv_widths)
        attended = torch.full((1, sizes.heads * sizes.head_dim), torch.nan, dtype=dtype)
        OPS.decode_attention(
            attended, k_cache, v_cache, qkv, position, cos[:64], sin[:64],
            heads=sizes.heads, scale=config.attention_scale, eps=EPS, q_norm=layer.q_norm, k_norm=layer.k_norm,
            window=window, softcap=config.attention_softcap,
        )  # fmt: skip
        out = torch.empty(1, config.hidden, dtype=dtype)
        OPS.residual_linear(out, attended, layer.output)
        assert torch.equal(out, expected[0])


@pytest.mark.parametrize("queries", [1, 2, 13])
@every_dtype
def test_softcapped_attention(dtype, queries, small_pair):
    """Gemma 2's chain of roundings, whose scores reach the cap."""
    hf = small_pair("gemma2", dtype).hf
    q = torch.randn(1, 4, queries, 24).mul(9).to(dtype)
    k, v = torch.randn(1, 2, 13, 24).mul(9).to(dtype), torch.randn(1, 2, 13, 24).to(dtype)
    mask = torch.ones(queries, 13, dtype=torch.bool).tril(13 - queries)[None, None]
    expected, _ = modeling_gemma2.eager_attention_forward(
        hf.model.layers[0].self_attn, q, k, v,
        torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype), scaling=0.21, softcap=50.0,
    )  # fmt: skip
    assert torch.equal(attention_torch(q, k, v, scale=0.21, mask=mask, softcap=50.0), expected.reshape(1, queries, -1))


@every_dtype
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_head(dtype, softcap):
    norm = modeling_gemma2.Gemma2RMSNorm(84, eps=EPS).to(dtype)
    x, table = torch.randn(1, 1, 84).to(dtype), torch.randn(499, 84).mul(3).to(dtype)
    expected = F.linear(norm(x), table)
    if softcap is not None:
        expected = torch.tanh(expected / softcap) * softcap
    assert torch.equal(logits_torch(norm(x)[0], table, softcap), expected[0])
    token, logits = torch.full((1,), -1), torch.full((1, 499), torch.nan, dtype=dtype)
    OPS.lm_head_argmax(token, x[0], norm.weight, table, eps=EPS, softcap=softcap, logits=logits)
    assert torch.equal(logits, expected[0])
    assert token.item() == expected[0].float().argmax().item()


def test_ties_go_to_the_lowest_index():
    """Both rows of the table give one logit, as bf16 rounding often makes them."""
    table = torch.randn(9, 16).bfloat16() * 0.01
    table[3] = table[7] = 1.0
    token = torch.full((1,), -1)
    OPS.lm_head_argmax(token, torch.ones(1, 16).bfloat16(), torch.zeros(16).bfloat16(), table, eps=EPS)
    assert token.item() == 3
