"""What a Gemma decoder is made of, read once from Hugging Face's config and validated.

`ModelConfig` is the architecture (fixed by the checkpoint), `RuntimeConfig` the caller's choices (device, dtype,
sequence and batch limits). Nothing outside `ModelConfig.from_hf` reads a Hugging Face field.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one kind of layer.

    `theta` is the base, `kind` one of "default", "linear"; angles are position * theta^(-2i/head_dim) / factor.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a Gemma 1, 2 or 3 text decoder.

    Sizes are element counts. `windows[i]` is the sliding window of layer i in keys (the query itself included), or
    None where the layer attends to everything; `rope[i]` is that layer's rotary embedding. `attention_scale`
    multiplies QK^T. A softcap of None means none.
    """

    family: str  # "gemma", "gemma2" or "gemma3"
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_norm_eps: float
    attention_scale: float
    windows: tuple[int | None, ...]
    rope: tuple[RopeConfig, ...]
    attention_softcap: float | None
    final_softcap: float | None
    max_position_embeddings: int
    bos_token_id: int | None
    pad_token_id: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class RuntimeConfig:
    """The caller's choices, "auto" already resolved: device ("cpu", "cuda", "cuda:1"), dtype ("float32", "bfloat16",
    "float16"), the longest sequence and the largest batch that buffers are made for, prefill chunk in tokens."""

    device: str
    dtype: str
    max_seq_len: int = 4096
    max_batch: int = 1
    prefill_chunk: int = 2048
