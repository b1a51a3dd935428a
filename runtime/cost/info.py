"""This machine and a model on it: versions, device, memory plan, and how fast decoding could be."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from runtime.cost.bandwidth import read_bandwidth_gb_s
from runtime.kernels.cpu import calls as cpu_calls
from runtime.loading import resolve
from runtime.model import memory_plan
from runtime.model.config import CONTAINERS, FAMILY_NAMES
from runtime.model.threads import torch_threads

_MATRICES: dict[str | None, str] = {  # by `quantize`
    None: "",
    "gguf": ", matrices in GGUF's blocks",
    **{name: f", matrices in {name}'s integers" for name in CONTAINERS},
    "int8": ", matrices in int8",
    "int4": ", matrices in int4, embedding and head in int8",
}
PACKAGES = ("torch", "triton", "numba", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True)
class Ceiling:
    """Bytes read per token at a context, and the tokens per second that the measured bandwidth allows."""

    context: int
    bytes_per_token: int
    tokens_per_s: float


@dataclass(frozen=True)
class Info:
    """What `gemma-runtime info` shows; `print` it, or take `to_dict()` for JSON. Sizes are in bytes."""

    versions: dict[str, str | None]
    device: str
    device_name: str
    threads: int
    steps: str  # what runs decode steps here
    memory_free: int | None
    model: str
    family: str
    layers: int
    hidden: int
    vocab: int
    dtype: str
    quantize: str | None
    max_seq_len: int
    weights: int
    kv_cache: int
    prefix_cache: int
    scratch: int
    read_bandwidth_gb_s: float
    ceilings: tuple[Ceiling, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        installed = ", ".join(f"{name} {version or 'missing'}" for name, version in self.versions.items())
        threads = f", {self.threads} thread{'s' if self.threads > 1 else ''}" if self.device == "cpu" else ""
        total = self.weights + self.kv_cache + self.prefix_cache + self.scratch
        free = "" if self.memory_free is None else f", {_mb(self.memory_free)} free"
        lines = [
            ("versions", installed),
            ("device", f"{self.device}: {self.device_name}{threads}"),
            ("steps", self.steps),
            (
                "model",
                f"{self.model}: {FAMILY_NAMES[self.family]}, {self.layers} layers, hidden {self.hidden}, "
                f"vocabulary {self.vocab:,}, {self.dtype}" + _MATRICES[self.quantize],
            ),
            (
                "memory",
                f"weights {_mb(self.weights)} + KV cache for {self.max_seq_len:,} tokens {_mb(self.kv_cache)} + "
                f"prefix cache {_mb(self.prefix_cache)} + scratch {_mb(self.scratch)} = {_mb(total)}{free}",
            ),
            ("bandwidth", f"{self.read_bandwidth_gb_s:.1f} GB/s, measured reading"),
        ]
        for number, ceiling in enumerate(self.ceilings):
            cost = f"{_mb(ceiling.bytes_per_token)} per token, at most {ceiling.tokens_per_s:,.1f} tokens/s"
            lines.append(("decoding" if number == 0 else "", f"{cost} at context {ceiling.context:,}"))
        return "\n".join(f"{name:<10}  {value}" for name, value in lines)


def gather(
    source: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_seq_len: int | None = None,
    threads: int | str | None = None,
    quantize: str | None = None,
) -> Info:
    """Collect an `Info`. The model's files are checked, its weights are not read; the bandwidth is measured.

    Args, Raises:
        as `load`.
    """
    resolved = resolve(source, device=device, dtype=dtype, max_seq_len=max_seq_len, threads=threads, quantize=quantize)
    torch_device, longest = torch.device(resolved.runtime.device), resolved.runtime.max_seq_len
    free = memory_plan.available_bytes(torch_device)
    with torch_threads(resolved.runtime.threads):
        bandwidth = read_bandwidth_gb_s(torch_device)
    plan = resolved.plan
    ceilings = []
    for context in sorted({1, min(512, longest), longest}):
        cost = plan.bytes_per_token(context)
        ceilings.append(Ceiling(context, cost, bandwidth * 1e9 / cost))
    return Info(
        versions=installed_versions(),
        device=resolved.runtime.device,
        device_name=torch.cuda.get_device_name(torch_device) if torch_device.type == "cuda" else cpu_name(),
        threads=resolved.runtime.threads,
        steps=_steps(torch_device, getattr(torch, resolved.runtime.dtype)),
        memory_free=free,
        model=resolved.name,
        family=resolved.config.family,
        layers=len(resolved.config.layers),
        hidden=resolved.config.hidden,
        vocab=resolved.config.vocab,
        dtype=resolved.runtime.dtype,
        quantize=resolved.runtime.quantize,
        max_seq_len=longest,
        weights=plan.weights,
        kv_cache=plan.kv_cache,
        prefix_cache=plan.prefix_cache,
        scratch=plan.scratch,
        read_bandwidth_gb_s=bandwidth,
        ceilings=tuple(ceilings),
    )


def installed_versions() -> dict[str, str | None]:
    """Installed versions, read without importing the packages; None for one that is missing, and for this package where
    it runs without being installed."""
    return {"gemma-runtime": _version("gemma-runtime"), "python": platform.python_version()} | {
        name: _version(name) for name in PACKAGES
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _steps(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cuda":
        return "Triton kernels in a CUDA graph"
    why = cpu_calls.missing(dtype)
    return f"plain PyTorch, no compiled kernels: {why}" if why else "compiled kernels"


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
