"""The GGUF files that llama.cpp is given: a model's own, as it is; or one of the same weights in the same dtype."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.api import load
from runtime.bench.measure import bytes_per_step
from runtime.checkpoint import sources
from runtime.checkpoint.cache import HASHES, cache_folder, cached
from runtime.checkpoint.content_hash import content_hash
from runtime.checkpoint.gguf.file import GgufFile, shards_of
from runtime.checkpoint.gguf.header import is_gguf
from runtime.checkpoint.gguf.metadata import differing_fields, sizes_of
from runtime.checkpoint.gguf.names import file_name
from runtime.checkpoint.safetensors_folder import Checkpoint
from runtime.errors import CheckpointError
from runtime.hugging_face.shared_weights import named_weights
from runtime.loading import read_config
from runtime.model.config import ModelConfig
from runtime.model.memory_plan import ITEM_BYTES, MemoryPlan
from runtime.model.model import Model

FILE = "model.gguf"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
NOT_STORED = {"bos_token_id", "pad_token_id", "stop_token_ids", "stored_dtype"}  # irrelevant to greedy decoding of ids


@dataclass(frozen=True)
class OwnFile:
    """A GGUF file as it is stored.

    `path` is the file, or the first shard. `types` names the types of its matrices, those with the most bytes first
    ("Q8_0, Q5_0"). A decode step reads `weights_read` bytes of it: every tensor, or all but an embedding table that is
    not the head too.
    """

    path: Path
    types: str
    weights_read: int

    def bytes_per_step(self, plan: MemoryPlan, dtype: str, cache_dtype: str, prompt_len: int, gen_len: int) -> int:
        """Bytes that the middle decode step of an answer must read: these weights once, and the KV cache.

        Args:
            plan, dtype: of this runtime's model in the dtype, whose cache has the same shape.
            cache_dtype: of the cache.
            prompt_len, gen_len: in tokens.
        """
        cached_bytes = bytes_per_step(plan, [prompt_len], gen_len) - plan.weights_read - plan.embedding_row_bytes
        return self.weights_read + cached_bytes * ITEM_BYTES[cache_dtype] // ITEM_BYTES[dtype]


def own_file(source: str | None) -> OwnFile:
    """The GGUF file that a model is read from.

    Raises:
        ValueError: the model is read from something else, or the file is damaged.
        ModuleNotFoundError: the package gguf or the demo model is not installed.
    """
    source = sources.default_source() if source is None else source
    path = sources.demo_file() if source == sources.DEMO else Path(source).expanduser()
    if not (path.is_file() and (path.suffix.lower() == ".gguf" or is_gguf(path))):
        raise CheckpointError(f"expected a .gguf file or 'demo', got {source}")
    tensors = GgufFile(path).tensors
    matrices = Counter[str]()
    for tensor in tensors.values():
        if len(tensor.shape) > 1:
            matrices[tensor.ggml_type] += tensor.bytes
    unread = tensors[EMBEDDING].bytes if HEAD in tensors and EMBEDDING in tensors else 0
    types = ", ".join(name for name, _ in matrices.most_common())
    return OwnFile(shards_of(path)[0], types, sum(tensor.bytes for tensor in tensors.values()) - unread)


def gguf_of(folder: Path, dtype: str) -> Path:
    """A checkpoint as a GGUF file in the cache of converted models, without a tokenizer.

    Args:
        folder: the checkpoint in Hugging Face's layout.
        dtype: of the weights: "float32", "bfloat16" or "float16". Norms are in fp32, as llama.cpp requires.

    Raises:
        ModuleNotFoundError: the package gguf is not installed.
        ValueError: llama.cpp would run it as a different model.
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
    """Refuses a model that llama.cpp would run as a different one.

    Raises:
        ValueError: the message names the fields that llama.cpp would read differently.
    """
    differing = [name for name in differing_fields(config, _metadata(config, "")) if name not in NOT_STORED]
    if differing:
        raise ValueError(f"a GGUF file cannot express this model's {', '.join(differing)}")


def write_gguf(model: Model, path: Path) -> None:
    """Writes a model's weights and sizes as a GGUF file, which is created or overwritten; the model is on the CPU."""
    import gguf

    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    writer = gguf.GGUFWriter(path, model.config.family)
    adds: dict[type, Any] = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    for key, value in _metadata(model.config, model.name).items():
        adds[type(value)](key, value)
    for name, tensor in named_weights(model).items():
        if tensor is None or name == "lm_head.weight":  # tied: without a head, llama.cpp uses the embedding
            continue
        # GGUF stores what a norm multiplies by, 1 + weight.
        stored = tensor.float() + 1 if tensor.ndim == 1 else tensor.contiguous()
        kind = gguf.GGMLQuantizationType[kinds[stored.dtype]]
        writer.add_tensor(file_name(name, model.config.family), stored.view(torch.uint8).numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(config: ModelConfig, name: str) -> dict[str, Any]:
    """The model's sizes, and a tokenizer model without a vocabulary."""
    return {"general.name": name, "tokenizer.ggml.model": "no_vocab"} | sizes_of(config)
