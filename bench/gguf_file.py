"""The model's own GGUF file, for an engine that runs it as it is: its types, and the bytes that a decode step reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from runtime.bench.measure import bytes_per_step
from runtime.checkpoint import sources
from runtime.checkpoint.gguf.file import GgufFile, shards_of
from runtime.checkpoint.gguf.header import is_gguf
from runtime.errors import CheckpointError
from runtime.model.memory_plan import ITEM_BYTES, MemoryPlan

EMBEDDING, HEAD = "token_embd.weight", "output.weight"


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
        ValueError: it is read from something else, or the file is damaged.
        ModuleNotFoundError: the package gguf or the demo model is not installed.
    """
    path = _path_of(sources.default_source() if source is None else source)
    tensors = GgufFile(path).tensors
    matrices = Counter[str]()
    for tensor in tensors.values():
        if len(tensor.shape) > 1:
            matrices[tensor.ggml_type] += tensor.bytes
    unread = tensors[EMBEDDING].bytes if HEAD in tensors and EMBEDDING in tensors else 0
    return OwnFile(
        shards_of(path)[0],
        ", ".join(name for name, _ in matrices.most_common()),
        sum(tensor.bytes for tensor in tensors.values()) - unread,
    )


def _path_of(source: str) -> Path:
    if source == sources.DEMO:
        return sources.demo_file()
    path = Path(source).expanduser()
    if not (path.is_file() and (path.suffix.lower() == ".gguf" or is_gguf(path))):
        raise CheckpointError(f"expected a .gguf file or 'demo', got {source}")
    return path
