"""Converts a GGUF file into a folder in Hugging Face's layout: config, safetensors, tokenizer.

Weights are dequantised and rounded to bfloat16, so that every dtype starts from the same values.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from runtime.checkpoint.cache import HASHES, cache_folder, cached
from runtime.checkpoint.content_hash import content_hash, signature
from runtime.checkpoint.gguf.config import hf_config
from runtime.checkpoint.gguf.file import GgufFile, shards_of
from runtime.checkpoint.gguf.tokenizer import tokenizer_config, tokenizer_json
from runtime.checkpoint.progress import progress_bar
from runtime.errors import CacheError, CheckpointError
from runtime.model.config import ModelConfig
from runtime.model.weights import stored_shapes

_log = logging.getLogger("gemma_runtime")

_BLOCK_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(\w+)\.weight", re.ASCII)
_VISION = ("v.", "mm.")  # a multimodal model's vision tower, which some files hold besides the text decoder
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
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def convert(path: Path, progress: bool | None = None) -> Path:
    """The converted folder of a GGUF file, from the cache or written now.

    Args:
        path: the GGUF file, or any shard of a split one.
        progress: whether to draw a progress bar; None draws it on a terminal only.

    Returns:
        The folder in the cache: config.json, generation_config.json, model.safetensors, tokenizer files.

    Raises:
        CheckpointError: the file cannot be read, is damaged, changes while it is read, is not a Gemma 1, 2 or 3, or has
            tensors of an unsupported type.
        CacheError: the cache cannot be written.
    """
    shards = shards_of(path)
    before = [signature(shard) for shard in shards]
    hashes = [content_hash(shard, cache_folder() / HASHES, progress) for shard in shards]
    content = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def write(folder: Path) -> None:
        _log.info("converting %s into the cache", path)
        write_folder(GgufFile(path), folder, progress)
        if [signature(shard) for shard in shards] != before:
            raise CheckpointError(f"{path} changed while it was being converted")

    readable = re.sub(r"[^\w.-]", "_", shards[0].stem)[:40]
    return cached(f"{readable}-{content[:32]}", write)


def write_folder(file: GgufFile, folder: Path, progress: bool | None = None) -> None:
    """Convert an opened GGUF file into an empty folder.

    Raises:
        CheckpointError: it is not a Gemma 1, 2 or 3 with the tensors of its metadata.
    """
    config = hf_config(file)
    decoder_names = [
        name for name in file.tensors if not (config["model_type"] == "gemma3_text" and name.startswith(_VISION))
    ]
    names = {_hf_name(name, config["model_type"]): name for name in decoder_names}
    layers = len({name.split(".")[2] for name in names if name.startswith("model.layers.")})
    if layers < config["num_hidden_layers"]:  # before listing shapes of missing layers
        raise CheckpointError(
            f"block_count must be {layers}, the layers in {file.path}, got {config['num_hidden_layers']}"
        )
    expected = stored_shapes(ModelConfig.from_hf(config))
    surplus = sorted(names.keys() - expected.keys() - {"lm_head.weight"})
    if surplus:
        raise CheckpointError(f"tensor {names[surplus[0]]!r} is not part of this model: {file.path}")
    for name, shape in expected.items():
        given = file.tensors[names[name]].shape if name in names else None
        if given != shape:
            raise CheckpointError(
                f"tensor {name} must have shape {list(shape)}, got {given and list(given)}: {file.path}"
            )
    metadata = file.metadata
    tokenizer, tokenizer_options = tokenizer_json(metadata), tokenizer_config(metadata)

    size = sum(2 * math.prod(file.tensors[name].shape) for name in decoder_names)
    free = shutil.disk_usage(folder).free
    if free < 1.1 * size:
        raise CacheError(f"{1.1 * size / 1e6:,.0f} MB of disk are needed, {free / 1e6:,.0f} MB are free")
    with progress_bar(f"converting {file.path.name}", size, progress) as bar:
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
    if name in _NAMES:
        return _NAMES[name]
    block = _BLOCK_NAME.fullmatch(name)
    if block is None or block[2] not in _BLOCK_NAMES:
        raise CheckpointError(f"tensor {name!r} is not part of a Gemma model")
    stored = _BLOCK_NAMES[block[2]]
    if model_type == "gemma" and block[2] == "ffn_norm":
        stored = "post_attention_layernorm"
    return f"model.layers.{block[1]}.{stored}.weight"


def _write_safetensors(file: GgufFile, names: Mapping[str, str], path: Path, bar: tqdm) -> None:
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
                # GGUF stores a norm's factor, 1 + weight; Hugging Face stores the weight.
                stored = torch.from_numpy(rows - 1 if is_norm else rows).to(torch.bfloat16)
                if not all(math.isfinite(extreme) for extreme in torch.aminmax(stored)):
                    raise CheckpointError(f"tensor {source} holds a value that bfloat16 cannot: {file.path}")
                output.write(stored.view(torch.int16).numpy().tobytes())
                bar.update(stored.nbytes)
        output.flush()
        os.fsync(output.fileno())
