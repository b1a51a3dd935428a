"""A loaded decoder: what is read from disk, nothing that a request changes."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import torch

from runtime.model.config import FAMILY_NAMES, ModelConfig, RuntimeConfig
from runtime.model.memory_plan import MemoryPlan
from runtime.model.rope import RopeTables
from runtime.model.weights import ModelWeights


@dataclass(repr=False, eq=False)
class Model:
    """A loaded decoder with everything that a request needs besides its own state."""

    config: ModelConfig
    runtime: RuntimeConfig
    weights: ModelWeights
    rope: RopeTables
    tokenizer: Any  # runtime.text.tokenizer.Tokenizer, or None
    name: str
    plan: MemoryPlan

    @property
    def engine(self) -> Any:
        """The scheduler of its requests (runtime/engine/scheduler.py), created by the first one; None before."""
        return vars(self).get("_engine")

    @property
    def device(self) -> torch.device:
        return self.weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.final_norm.dtype

    def __repr__(self) -> str:
        return f"<Model {', '.join(f'{what}: {value}' for what, value in self._facts().items())}>"

    def _repr_html_(self) -> str:
        """The same as a table, for a notebook."""
        rows = (f"<tr><th>{what}</th><td>{html.escape(value)}</td></tr>" for what, value in self._facts().items())
        return f"<table>{''.join(rows)}</table>"

    def _facts(self) -> dict[str, str]:
        return {
            "name": repr(self.name),
            "family": FAMILY_NAMES[self.config.family],
            "parameters": f"{self.weights.parameters:,}",
            "dtype": self.runtime.dtype,
            **({"blocks": self.weights.formats or "none"} if self.runtime.quantize else {}),
            "device": str(self.device),
            "max_seq_len": f"{self.runtime.max_seq_len:,}",
            "max_batch": str(self.runtime.max_batch),
        }
