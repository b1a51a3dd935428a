"""This runtime as an engine: what users call, `runtime.stream`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import runtime
from runtime.bench.measure import audit, peak_mb, reset_peak


class Engine:
    version = runtime.__version__

    def load(self, options: dict[str, Any]) -> None:
        names = ("device", "dtype", "max_seq_len", "threads", "quantize")
        given = {name: options[name] for name in names if name in options}
        self.model = runtime.load(options["source"], progress=False, **given)

    def audit(self) -> dict[str, Any]:
        return audit(self.model).model_dump()

    def run(self, prompt: list[int], new_tokens: int, emit: Callable[[int], None]) -> None:
        for piece in runtime.stream(self.model, prompt, max_new_tokens=new_tokens, ignore_eos=True, reuse=False):
            emit(piece.token_ids[0])

    def reset_peak_memory(self) -> None:
        reset_peak(self.model.device)

    def peak_memory_mb(self) -> float | None:
        return peak_mb(self.model.device)
