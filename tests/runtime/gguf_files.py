"""Small random Gemma models as GGUF files, in any type and with any fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, MLP, HEADS, HEAD_DIM, LAYERS = 256, 512, 2, 128, 2
SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>"]
TOKENS = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abc", "  "]
TYPES = [3] * len(SPECIALS) + [6] * 256 + [1] * 4 + [4]
SIZES: dict[str, Any] = {
    "embedding_length": HIDDEN,
    "block_count": LAYERS,
    "feed_forward_length": MLP,
    "attention.head_count": HEADS,
    "attention.head_count_kv": 1,
    "attention.key_length": HEAD_DIM,
    "attention.value_length": HEAD_DIM,
    "context_length": 512,
    "attention.sliding_window": 64,
    "attention.layer_norm_rms_epsilon": 1e-6,
}
# Where a block keeps its fp16 scales; the other bytes may be any.
_SCALES = {
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"), (0,)),
}


def quantised(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random blocks of a type, as bytes (as numbers for F32 and F16)."""
    import gguf

    numbers = rng.normal(0, 0.1, shape).astype(np.float32)
    if kind in ("F32", "F16"):
        return numbers.astype(np.float32 if kind == "F32" else np.float16)
    if kind in ("BF16", "Q8_0", "Q4_0", "Q5_0"):
        return gguf.quantize(numbers, gguf.GGMLQuantizationType[kind])
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, block_bytes), dtype=np.uint8)
    for place in _SCALES.get(kind, ()):
        raw[..., place : place + 2] = np.array([0.01], np.float16).view(np.uint8)
    if kind == "MXFP4":
        raw[..., 0] = 123  # an exponent of two
    elif kind == "NVFP4":
        raw[..., :4] = 24  # four small scales of eight bits
    elif kind == "IQ1_M":
        raw[..., -1] = raw[..., -1] & 15 | 32  # the scale's exponent lies in the last byte
    return raw.reshape(*shape[:-1], -1)


def shapes(family: str = "gemma3", vocab: int = len(TOKENS), layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a small model."""
    block: dict[str, tuple[int, ...]] = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (HEAD_DIM, HIDDEN),
        "attn_v": (HEAD_DIM, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (MLP, HIDDEN),
        "ffn_up": (MLP, HIDDEN),
        "ffn_down": (HIDDEN, MLP),
    }
    if family != "gemma":
        block |= {"post_attention_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,)}
    if family == "gemma3":
        block |= {"attn_q_norm": (HEAD_DIM,), "attn_k_norm": (HEAD_DIM,)}
    named = {"token_embd.weight": (vocab, HIDDEN), "output_norm.weight": (HIDDEN,)}
    return named | {f"blk.{layer}.{name}.weight": shape for layer in range(layers) for name, shape in block.items()}


def write_gguf(
    path: Path,
    family: str = "gemma3",
    kind: str | Mapping[str, str] = "Q8_0",
    *,
    sizes: Mapping[str, Any] = {},
    metadata: Mapping[str, Any] = {},
    tensors: Mapping[str, tuple[int, ...]] = {},
    only: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Write a small model; its norms are F32.

    Args:
        kind: the type of its matrices, or of each by name.
        sizes: keys of the architecture to set, or with None to leave out.
        metadata: other keys, likewise.
        tensors: shapes beside, or in place of, the model's own.
        only: the names of the tensors that are written, all by default.

    Returns:
        The tensors as the `gguf` package dequantises them.
    """
    import gguf

    vocabulary = {"model": "llama", "tokens": TOKENS, "token_type": TYPES, "bos_token_id": 2, "eos_token_id": 1}
    keys = {f"{family}.{name}": value for name, value in (SIZES | dict(sizes)).items()}
    keys |= {f"tokenizer.ggml.{name}": value for name, value in vocabulary.items()} | dict(metadata)
    writer = gguf.GGUFWriter(path, keys.pop("general.architecture", family))
    for key, value in keys.items():
        if value is not None:
            _add(writer, key, value)
    rng = np.random.default_rng(seed)
    values = {}
    for name, shape in (shapes(family) | dict(tensors)).items():
        if only is not None and name not in only:
            continue
        stored = "F32" if len(shape) == 1 else kind if isinstance(kind, str) else kind[name]
        # A norm of many times its input, so that layers matter beside an embedding that is its own head.
        raw = rng.normal(8, 4, shape).astype(np.float32) if len(shape) == 1 else quantised(rng, stored, shape)
        number = gguf.GGMLQuantizationType[stored]
        writer.add_tensor(name, raw, raw_dtype=number)
        values[name] = gguf.dequantize(raw, number).reshape(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def _add(writer: Any, key: str, value: Any) -> None:
    adds = {
        bool: writer.add_bool,
        int: writer.add_uint32 if not isinstance(value, int) or value >= 0 else writer.add_int32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adds[type(value)](key, value)
