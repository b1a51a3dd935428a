"""Converts a GGUF file into a folder in Hugging Face's layout: config, safetensors, tokenizer.

Weights are dequantised and rounded to bfloat16, so that every dtype starts from the same values; or left out, where
in_place.py reads them from the file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from runtime.checkpoint import safetensors_file
from runtime.checkpoint.cache import HASHES, cache_folder, cached
from runtime.checkpoint.content_hash import content_hash, signature
from runtime.checkpoint.files import read_json, reading
from runtime.checkpoint.gguf.config import hf_config
from runtime.checkpoint.gguf.file import GgufFile, GgufTensor, shards_of
from runtime.checkpoint.gguf.names import decoder_names, is_norm
from runtime.checkpoint.gguf.quick_tokenizer import quick_json
from runtime.checkpoint.gguf.tokenizer import tokenizer_config, tokenizer_json
from runtime.checkpoint.progress import progress_bar
from runtime.checkpoint.stored_tensor import stamp_of
from runtime.errors import CheckpointError

TENSORS = "tensors.json"  # the tensors of a file that is read in place, checked when this was written

_log = logging.getLogger("gemma_runtime")


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

    def write(file: GgufFile, folder: Path) -> None:
        _log.info("converting %s into the cache", path)
        write_folder(file, folder, progress)

    return _from_cache(path, "", write, progress)


def without_weights(path: Path, progress: bool | None = None) -> tuple[GgufFile, Path]:
    """A GGUF file whose weights are read in place, and the folder of everything else, from the cache or written now.

    Args, Raises:
        as `convert`.

    Returns:
        The file, and the folder in the cache: config.json, generation_config.json, tokenizer files, tensors.json.
    """
    shards = shards_of(path)
    # Before their content is hashed: if one changes from here on, its tensors cannot be read.
    with reading(path):
        stamps = [stamp_of(shard) for shard in shards]

    def write(file: GgufFile, folder: Path) -> None:
        config = hf_config(file)
        decoder_names(file, config)
        _write_documents(file, config, folder)
        (folder / TENSORS).write_text(json.dumps(_table(file, shards)))

    folder = _from_cache(path, "-without-weights", write, progress)
    table = read_json(folder / TENSORS)
    known = {
        name: GgufTensor(kind, tuple(shape), offset, size, shards[shard], stamps[shard])
        for name, (kind, shape, offset, size, shard) in table.items()
    }
    return GgufFile(path, known), folder


def _table(file: GgufFile, shards: list[Path]) -> dict[str, list[Any]]:
    """A file's tensors as JSON: type, shape, first byte, bytes, number of the shard."""
    return {
        name: [tensor.ggml_type, tensor.shape, tensor.offset, tensor.bytes, shards.index(tensor.path)]
        for name, tensor in file.tensors.items()
    }


def _from_cache(path: Path, kind: str, write: Callable[[GgufFile, Path], None], progress: bool | None) -> Path:
    """The folder that `write` fills from a file, under the hash of the file's content."""
    shards = shards_of(path)
    before = [signature(shard) for shard in shards]
    hashes = [content_hash(shard, cache_folder() / HASHES, progress) for shard in shards]
    content = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def write_unchanged(folder: Path) -> None:
        write(GgufFile(path), folder)
        if [signature(shard) for shard in shards] != before:
            raise CheckpointError(f"{path} changed while it was being converted")

    readable = re.sub(r"[^\w.-]", "_", shards[0].stem)[:40]
    return cached(f"{readable}-{content[:32]}{kind}", write_unchanged)


def write_folder(file: GgufFile, folder: Path, progress: bool | None = None) -> None:
    """Convert an opened GGUF file into an empty folder.

    Raises:
        CheckpointError: it is not a Gemma 1, 2 or 3 with the tensors of its metadata.
    """
    config = hf_config(file)
    names = decoder_names(file, config)
    _write_documents(file, config, folder)  # first: a tokenizer is refused before the weights are converted
    size = sum(2 * math.prod(file.tensors[name].shape) for name in names.values())
    safetensors_file.check_disk(folder, size)
    with progress_bar(f"converting {file.path.name}", size, progress) as bar:
        _write_safetensors(file, names, folder / "model.safetensors", bar)


def _write_documents(file: GgufFile, config: Mapping[str, Any], folder: Path) -> None:
    """Write config and tokenizer."""
    documents = {
        "config.json": config,
        "generation_config.json": {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "tokenizer_config.json": tokenizer_config(file.metadata),
    }
    texts = {name: json.dumps(content, ensure_ascii=False) for name, content in documents.items()}
    texts["tokenizer.json"] = quick_json(tokenizer_json(file.metadata))
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _write_safetensors(file: GgufFile, names: Mapping[str, str], path: Path, bar: tqdm) -> None:
    """Write every tensor as bfloat16, a few rows at a time."""

    def values() -> Iterator[torch.Tensor]:
        for source in names.values():
            for rows in file.rows(source):
                stored = torch.from_numpy(rows - 1 if is_norm(source) else rows).to(torch.bfloat16)
                if not all(math.isfinite(extreme) for extreme in torch.aminmax(stored)):
                    raise CheckpointError(f"tensor {source} holds a value that bfloat16 cannot: {file.path}")
                yield stored
                bar.update(stored.nbytes)

    safetensors_file.write(
        path, {name: ("BF16", file.tensors[source].shape) for name, source in names.items()}, values()
    )
