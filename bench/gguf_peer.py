"""The GGUF file for llama.cpp: the same weights in the same dtype, without a tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from runtime.api import load
from runtime.checkpoint.cache import HASHES, cache_folder, cached
from runtime.checkpoint.content_hash import content_hash
from runtime.checkpoint.gguf.metadata import differing_fields, sizes_of
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
    """Refuses a model that llama.cpp would run as another one.

    Raises:
        ValueError: the message names the fields that llama.cpp would read differently.
    """
    differing = [name for name in differing_fields(config, _metadata(config, "")) if name not in NOT_STORED]
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
    """The model's sizes, and a tokenizer model without a vocabulary."""
    return {"general.name": name, "tokenizer.ggml.model": "no_vocab"} | sizes_of(config)
