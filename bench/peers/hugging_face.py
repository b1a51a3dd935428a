"""Hugging Face's `generate` as an engine: dynamic cache, static cache, or static with torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from runtime.bench.measure import peak_mb, reset_peak
from runtime.loading import read_config
from runtime.parity.hugging_face import from_folder


class Emitter:
    """A streamer for `generate` that emits each token; its first call is the prompt."""

    def __init__(self, emit: Callable[[int], None]) -> None:
        self._emit = emit
        self._is_prompt = True

    def put(self, ids: torch.Tensor) -> None:
        if not self._is_prompt:
            self._emit(int(ids))
        self._is_prompt = False

    def end(self) -> None:
        pass


class Engine:
    version = transformers.__version__

    def load(self, options: dict[str, Any]) -> None:
        folder = Path(options["folder"])
        dtype, device = getattr(torch, options["dtype"]), torch.device(options["device"])
        asked: Any = SimpleNamespace(config=read_config(folder), dtype=dtype, device=device)
        self.model = from_folder(folder, asked)
        self.extra: dict[str, Any] = {}
        if options["cache"] == "static":
            self.extra["cache_implementation"] = "static"
            self.extra["disable_compile"] = not options["compile"]
        if options["compile"]:
            self.extra["compile_config"] = transformers.CompileConfig()
            # By default `generate` compiles on GPUs only.
            self.extra["compile_config"]._compile_all_devices = True

    def run(self, prompt: list[int], new_tokens: int, emit: Callable[[int], None]) -> None:
        ids = torch.tensor([prompt], device=self.model.device)
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=Emitter(emit),
            **self.extra,
        )

    def reset_peak_memory(self) -> None:
        reset_peak(self.model.device)

    def peak_memory_mb(self) -> float | None:
        return peak_mb(self.model.device)
