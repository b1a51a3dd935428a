"""The real shapes of the published checkpoints, with random weights: speed needs the sizes, not the words.

The configs are what each checkpoint's config.json says of its text decoder.
"""

from __future__ import annotations

from typing import Any

import torch

from runtime import memory
from runtime.config import ModelConfig, RuntimeConfig
from runtime.load import Model
from runtime.rope import RopeTables
from runtime.weights import LayerWeights, ModelWeights

SHAPES: dict[str, dict[str, Any]] = {
    "gemma-1.1-2b": {
        "model_type": "gemma",
        "vocab_size": 256000,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
    },
    "gemma-2-2b": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 8192,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "max_position_embeddings": 32768,
    },
    "gemma-3-270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "max_position_embeddings": 32768,
    },
}


def random_model(
    name: str, device: str, dtype: str, *, max_seq_len: int, max_batch: int = 1, seed: int = 0, **overrides: Any
) -> Model:
    """A model of a published shape with random weights, made on the device.

    Args:
        name: one of SHAPES.
        device, dtype, max_seq_len, max_batch: as `runtime.load`.
        seed: of the weights.
        overrides: fields of the config to change, to make it small.

    Returns:
        The model, without a tokenizer. Its branches outweigh the embedding in the stream, so that greedy decoding does
        not repeat one token.
    """
    config = ModelConfig.from_hf(SHAPES[name] | overrides)
    limits = RuntimeConfig(device, dtype, max_seq_len, max_batch)
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int, std: float) -> torch.Tensor:
        # Row by row into the model's dtype: an fp32 copy of a whole table would double the memory.
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        return tensor.normal_(0.0, std, generator=generator)

    hidden, heads, kv_heads, head_dim = config.hidden, config.heads, config.kv_heads, config.head_dim
    has_post_norms, has_qk_norm = config.family != "gemma", config.family == "gemma3"

    def norm(size: int) -> torch.Tensor:
        return random(size, std=0.1)

    layers = tuple(
        LayerWeights(
            attention_norm=norm(hidden),
            qkv=random((heads + 2 * kv_heads) * head_dim, hidden, std=hidden**-0.5),
            q_norm=norm(head_dim) if has_qk_norm else None,
            k_norm=norm(head_dim) if has_qk_norm else None,
            output=random(hidden, heads * head_dim, std=(heads * head_dim) ** -0.5),
            post_attention_norm=norm(hidden) if has_post_norms else None,
            mlp_norm=norm(hidden),
            gate_up=random(2 * config.intermediate, hidden, std=hidden**-0.5),
            down=random(hidden, config.intermediate, std=config.intermediate**-0.5),
            post_mlp_norm=norm(hidden) if has_post_norms else None,
        )
        for _ in range(config.layers)
    )
    weights = ModelWeights(random(config.vocab, hidden, std=0.1 * hidden**-0.5), layers, norm(hidden))
    return Model(config, limits, weights, RopeTables(config, limits), None, name, memory.plan(config, limits))
