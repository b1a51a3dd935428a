"""The GGUF file for llama.cpp: the same weights in the same dtype, without a tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from runtime.api import load
from runtime.checkpoint.cache import HASHES, cache_folder, cached
from runtime.checkpoint.content_hash import content_hash
from runtime.checkpoint.gguf.config import hf_config
from runtime.checkpoint.safetensors_folder import Checkpoint
from runtime.hugging_face.shared_weights import named_weights
from runtime.loading import read_config
from runtime.model.config import ModelConfig
from runtime.model.model import Model

FILE = "model.gguf"
NOT_STORED = {"bos_token_id", "pad_token_id", "stop_token_ids", "stored_dtype"}  # irrelevant to greedy decoding of ids


def gguf_of(folder: Path, dtype: str) -> Path:
    """A checkpoint as a GGUF file in the cache of converted models.

    Args:
        folder: the checkpoint in Hugging Face's layout.
        dtype: of the weights: "float32", "bfloat16" or "float16". Norms are in fp32, as llama.cpp requires.

    Raises:
        ModuleNotFoundError: the package gguf is not installed.
        ValueError: llama.cpp would run another model than this.
        OSError: the cache cannot be written.
    """
    check_expressible(read_config(folder))

    def write(target: Path) -> None:
        write_gguf(load(folder, device="cpu", dtype=dtype, max_seq_len=1, progress=False), target / FILE)

    return cached(f"gguf-{fingerprint(folder)}-{dtype}", write) / FILE


def fingerprint(folder: Path) -> str:
    """The checkpoint's fingerprint: 16 hexadecimal digits over its config and its files' names and contents."""
    stored = sorted({tensor.file for tensor in Checkpoint(folder).tensors.values()})
    contents = [(file.name, content_hash(file, cache_folder() / HASHES, progress=False)) for file in stored]
    return hashlib.sha256(repr(contents).encode() + (folder / "config.json").read_bytes()).hexdigest()[:16]


def check_expressible(config: ModelConfig) -> None:
    """Refuses a model that llama.cpp would run as another one: a GGUF file does not say which layers slide and how
    attention is scaled; its readers infer both from the family and size.

    Raises:
        ValueError: the message names the fields that llama.cpp would read differently.
    """
    file: Any = SimpleNamespace(
        path="its GGUF file",
        metadata={"general.architecture": config.family, **_metadata(config, "")},
        tensors={"token_embd.weight": SimpleNamespace(shape=(config.vocab, config.hidden))},
    )
    read = ModelConfig.from_hf(hf_config(file))
    names = {field.name for field in dataclasses.fields(config)} - NOT_STORED
    differing = sorted(name for name in names if getattr(read, name) != getattr(config, name))
    if differing:
        raise ValueError(f"a GGUF file cannot express this model's {', '.join(differing)}")


def write_gguf(model: Model, path: Path) -> None:
    """Writes a model's weights and sizes as a GGUF file: the inverse of runtime.checkpoint.gguf.conversion.

    Args:
        model: on the CPU.
        path: the file, which is created or overwritten.
    """
    import gguf

    kinds = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
        torch.float16: gguf.GGMLQuantizationType.F16,
    }
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[model.config.family.upper()], len(model.config.layers))
    writer = gguf.GGUFWriter(path, model.config.family)
    adds: dict[type, Any] = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    for key, value in _metadata(model.config, model.name).items():
        adds[type(value)](key, value)
    for hf_name, tensor in named_weights(model).items():
        if tensor is None or hf_name == "lm_head.weight":  # tied: without a head, llama.cpp uses the embedding
            continue
        # GGUF stores what a norm multiplies by, 1 + weight.
        stored = tensor.float() + 1 if tensor.ndim == 1 else tensor.contiguous()
        name = names.get_name(hf_name, try_suffixes=(".weight",))
        assert name is not None, f"gguf has no name for {hf_name}"
        writer.add_tensor(name, stored.view(torch.uint8).numpy(), raw_dtype=kinds[stored.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(config: ModelConfig, name: str) -> dict[str, Any]:
    """The fields that runtime.checkpoint.gguf.config reads, and a tokenizer model without a vocabulary."""
    windows = [layer.window for layer in config.layers if layer.window is not None]
    bases = {layer.window is not None: layer.rope.theta for layer in config.layers}
    first = config.layers[0]
    sizes: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden,
        "block_count": len(config.layers),
        "feed_forward_length": config.intermediate,
        "attention.head_count": first.heads,
        "attention.head_count_kv": first.kv_heads,
        "attention.key_length": first.head_dim,
        "attention.value_length": first.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": bases.get(False),
        "rope.freq_base_swa": bases.get(True) if config.family == "gemma3" else None,
        "attention.sliding_window": windows[0] if windows else None,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
        "vocab_size": config.vocab,
    }
    factors = {layer.rope.factor for layer in config.layers if layer.rope.rope_type == "linear"}
    if factors:
        sizes |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(max(factors))}
    given = {f"{config.family}.{key}": value for key, value in sizes.items() if value is not None}
    return {"general.name": name, "tokenizer.ggml.model": "no_vocab"} | given
