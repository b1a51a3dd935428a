"""The sizes of a campaign: the published shapes on a GPU, or toy sizes that check every part on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from runtime.api import load
from runtime.bench.shapes import random_model
from runtime.checkpoint import sources
from runtime.checkpoint.files import read_json
from runtime.cost.bandwidth import ReadBandwidth, gpu_readers
from runtime.model.model import Model
from runtime.model.published import PUBLISHED

GPU = torch.device("cuda")


@dataclass(frozen=True)
class Scale:
    """Device, dtype and sizes of the measurements, by default those on a GPU."""

    device: torch.device = GPU
    dtype: str = "bfloat16"
    max_seq_len: int = 4352
    prompt: int = 128  # tokens before the first decoded one
    new: int = 64  # tokens decoded to compare them
    contexts: tuple[int, ...] = (128, 512, 1024, 4096)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    prompts: tuple[int, ...] = (128, 512, 2048)  # prompt lengths at which TTFT is measured
    repeats: int = 60  # samples of a captured step
    kernel_repeats: int = 9  # samples of a kernel
    rounds: int = 5  # whole answers, the first of them untimed
    answer: int = 256  # tokens of one
    ceiling: Callable[[torch.device], ReadBandwidth] = ReadBandwidth  # what every speed is compared with
    overrides: dict[str, Any] = field(default_factory=dict)  # fields of every model's config
    quantize: str | None = None  # as `runtime.load`

    @property
    def max_batch(self) -> int:
        """Rows of a model that decodes batches."""
        return max(self.batches)

    def quantized(self, to: str) -> Scale:
        """The same scale for quantised models; toy ones become as wide as int4 requires."""
        widths = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 64} if self.overrides else {}
        return replace(self, quantize=to, overrides=self.overrides | widths)

    def hf_config(self, name: str) -> dict[str, Any]:
        """A model's Hugging Face config: of a published shape at this scale, or of a checkpoint."""
        if name in PUBLISHED:
            return PUBLISHED[name] | self._overrides(name)
        return read_json(sources.locate(name).folder / "config.json")

    def _overrides(self, name: str) -> dict[str, Any]:
        # Only fields that the model has: Hugging Face's cache slides for any config with sliding_window.
        return {key: value for key, value in self.overrides.items() if key in PUBLISHED[name]}

    def model(
        self, name: str, dtype: str | None = None, *, max_batch: int = 1, max_seq_len: int | None = None
    ) -> Model:
        """A published model at this scale with random weights, or the checkpoint at a path."""
        limits: dict[str, Any] = {"max_seq_len": max_seq_len or self.max_seq_len, "max_batch": max_batch}
        limits["quantize"] = self.quantize
        if name in PUBLISHED:
            return random_model(name, str(self.device), dtype or self.dtype, **limits, **self._overrides(name))
        return load(name, device=str(self.device), dtype=dtype or self.dtype, progress=False, **limits)


FULL = Scale()
# fp32, since the interpreter has no native bf16.
TOY = Scale(
    device=torch.device("cpu"),
    dtype="float32",
    max_seq_len=64,
    prompt=8,
    new=6,
    contexts=(8, 40),
    batches=(1, 2),
    prompts=(4, 8),
    repeats=2,
    kernel_repeats=2,
    rounds=2,
    answer=9,
    ceiling=partial(ReadBandwidth, buffer_bytes=1 << 16, readers=partial(gpu_readers, grids=((4, 2048),))),
    overrides={
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 199,
        "sliding_window": 16,
        "max_position_embeddings": 64,
    },
)
