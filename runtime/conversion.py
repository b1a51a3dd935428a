"""A GGUF file made a folder in Hugging Face's layout: config, safetensors, tokenizer.

Weights are dequantised and rounded to bfloat16, so that every dtype starts from the same values.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from runtime.cache import cached
from runtime.config import ModelConfig
from runtime.errors import CacheError, CheckpointError
from runtime.gguf_config import hf_config
from runtime.gguf_file import GgufFile
from runtime.gguf_tokenizer import tokenizer_config, tokenizer_json
from runtime.progress import ProgressBar
from runtime.weights import stored_shapes

_SAMPLE_BYTES = 1 << 20

_BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert(path: Path, progress: bool | None = None) -> Path:
    """The converted folder of a GGUF file, made if the cache does not hold it yet.

    Args:
        path: the `.gguf` file.
        progress: whether to draw a progress bar; None draws it on a terminal only.

    Returns:
        The folder in the cache: config.json, generation_config.json, model.safetensors, tokenizer files.

    Raises:
        CheckpointError: the file is damaged, not a Gemma 1, 2 or 3, or of an unsupported type.
        OSError: the file cannot be read or the cache cannot be written.
    """
    return cached(f"{path.stem}-{_fingerprint(path)}", lambda folder: write_folder(GgufFile(path), folder, progress))


def write_folder(file: GgufFile, folder: Path, progress: bool | None = None) -> None:
    """Convert an opened GGUF file into an empty folder.

    Raises:
        CheckpointError: it is not a Gemma 1, 2 or 3 with the tensors its metadata announces.
    """
    config = hf_config(file)
    names = {_hf_name(name, config["model_type"]): name for name in file.tensors}
    expected = stored_shapes(ModelConfig.from_hf(config))
    surplus = sorted(names.keys() - expected.keys() - {"lm_head.weight"})
    if surplus:
        raise CheckpointError(f"tensor {names[surplus[0]]} is not part of this model: {file.path}")
    for name, shape in expected.items():
        given = file.tensors[names[name]].shape if name in names else None
        if given != shape:
            raise CheckpointError(
                f"tensor {name} must have shape {list(shape)}, got {given and list(given)}: {file.path}"
            )
    metadata = file.metadata
    tokenizer, tokenizer_options = tokenizer_json(metadata), tokenizer_config(metadata)

    size = sum(2 * math.prod(tensor.shape) for tensor in file.tensors.values())
    free = shutil.disk_usage(folder).free
    if free < 1.1 * size:
        raise CacheError(f"{1.1 * size / 1e6:,.0f} MB of disk are needed, {free / 1e6:,.0f} MB are free")
    with ProgressBar(f"converting {file.path.name}", size, progress) as bar:
        _write_safetensors(file, names, folder / "model.safetensors", bar)
    documents = {
        "config.json": config,
        "generation_config.json": {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_options,
    }
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _hf_name(name: str, model_type: str) -> str:
    """The Hugging Face name of a GGUF tensor."""
    stem = name.removesuffix(".weight")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.weight"
    layer, _, part = stem.removeprefix("blk.").partition(".")
    if not name.startswith("blk.") or not layer.isdigit() or part not in _BLOCK_NAMES or stem == name:
        raise CheckpointError(f"tensor {name} is not part of a Gemma model")
    stored = _BLOCK_NAMES[part]
    if model_type == "gemma" and part == "ffn_norm":
        stored = "post_attention_layernorm"
    return f"model.layers.{layer}.{stored}.weight"


def _write_safetensors(file: GgufFile, names: Mapping[str, str], path: Path, bar: ProgressBar) -> None:
    """Write every tensor as bfloat16, a few rows at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, source in names.items():
        shape = file.tensors[source].shape
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensor data starts aligned
    with path.open("wb") as output:
        output.write(len(encoded).to_bytes(8, "little") + encoded)
        for source in names.values():
            is_norm = source.endswith("_norm.weight")
            for rows in file.rows(source):
                # GGUF stores what a norm multiplies by, 1 + weight; Hugging Face stores the weight.
                stored = torch.from_numpy(rows - 1 if is_norm else rows).to(torch.bfloat16)
                output.write(stored.view(torch.int16).numpy().tobytes())
                bar.advance(stored.nbytes)
        output.flush()
        os.fsync(output.fileno())


def _fingerprint(path: Path) -> str:
    """Identify a file's content by its size, its time and its ends, without reading gigabytes."""
    stat = path.stat()
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, stat.st_size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
