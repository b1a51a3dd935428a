"""The environment of an audit: the checkpoint, the code, the versions, the device."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import triton
from torch.version import cuda as cuda_version

import runtime.kernels as kernels
from runtime.cost.info import cpu_name
from runtime.engine.padded_chunk import is_fused
from runtime.hugging_face.shared_weights import attention_of
from runtime.kernels.block import table_hash
from runtime.kernels.launch import gpu_of
from runtime.model.model import Model
from runtime.parity.comparison import CACHE_NAMES


def environment(model: Model, folder: Path, weights: Iterable[Path], cache: str) -> dict[str, Any]:
    """Everything that a reader needs to judge or reproduce the report.

    Args:
        model: the audited model.
        folder: its checkpoint.
        weights: the files that its weights are in.
        cache: which cache Hugging Face uses, "hf" or "hf-static".
    """
    gpu = gpu_of(model.device)
    return {
        "model": model.name,
        "checkpoint_sha256": checkpoint_hash(folder, weights),
        "runtime": importlib.metadata.version("gemma-runtime"),
        "runtime_sha256": code_hash(),
        "transformers": importlib.metadata.version("transformers"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": cuda_version,
        "python": platform.python_version(),
        "device": str(model.device),
        "device_name": gpu.name if gpu else cpu_name(),
        # On a GPU the order of summation depends on its block table or, without an entry, on the multiprocessor count.
        "multiprocessors": gpu.multiprocessors if gpu else None,
        "block_table_sha256": table_hash(gpu),
        "threads": model.runtime.threads,
        "dtype": model.runtime.dtype,
        **({"quantize": model.runtime.quantize} if model.runtime.quantize else {}),
        "eager": model.runtime.eager,
        "fused_prefill": is_fused(model),
        "max_seq_len": model.runtime.max_seq_len,
        "attention": attention_of(model.config),
        "cache": CACHE_NAMES[cache],
    }


def checkpoint_hash(folder: Path, weights: Iterable[Path]) -> str:
    """SHA-256 over the config and the weights of a checkpoint."""
    return _hash([*sorted(folder.glob("*config.json")), *sorted(weights)])


def code_hash() -> str:
    """SHA-256 over the source of this package and its kernels."""
    roots = [Path(__file__).parents[1], *map(Path, kernels.__path__)]
    files = {file for root in roots for pattern in ("**/*.py", "**/*.json") for file in root.glob(pattern)}
    return _hash(sorted(files))


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(f"{file.name}\0"))
        with file.open("rb") as content:
            while block := content.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
