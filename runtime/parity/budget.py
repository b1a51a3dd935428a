"""The memory that an audit needs, computed and checked before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.errors import NotEnoughMemory
from runtime.loading import ResolvedModel
from runtime.model import memory_plan
from runtime.model.memory_plan import ITEM_BYTES
from runtime.parity.oracle import oracle_bytes


@dataclass(frozen=True)
class Budget:
    """Bytes that an audit needs on the model's device, by purpose."""

    ours: int
    hugging_face: int
    oracle: int
    logits: int
    in_fp32: int

    @property
    def total(self) -> int:
        return self.ours + self.hugging_face + self.oracle + self.logits + self.in_fp32

    def __str__(self) -> str:
        purposes = {
            "this runtime": self.ours,
            "Hugging Face's copy": self.hugging_face,
            "the fp64 oracle, a layer at a time": self.oracle,
            "logits to compare": self.logits,
            "the same weights in fp32": self.in_fp32,
        }
        listed = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in purposes.items() if size)
        return f"{listed}, together {self.total / 1e6:,.0f} MB"


def plan(resolved: ResolvedModel, longest: int, tokens: int) -> Budget:
    """Compute the budget from the configs alone.

    Args:
        resolved: the model.
        longest: tokens of the longest text, answer included.
        tokens: length of an answer.
    """
    config, item = resolved.config, ITEM_BYTES[resolved.runtime.dtype]
    # For a quantised model, Hugging Face's copy holds the dequantised values.
    values = memory_plan.plan(config, resolved.runtime).weights if resolved.runtime.quantize else resolved.plan.weights
    solo = sum(resolved.plan.kv_row_bytes) * longest  # a state of one row, or Hugging Face's dynamic cache
    return Budget(
        ours=resolved.plan.total + 2 * solo,
        hugging_face=values + resolved.plan.kv_cache + resolved.plan.scratch,
        oracle=oracle_bytes(config, longest, tokens),
        logits=tokens * config.vocab * (item + 4 + 8),
        in_fp32=0 if item == 4 else resolved.plan.weights * 4 // item,
    )


def check_fits(budget: Budget, device: torch.device) -> None:
    """Refuse a budget that does not fit.

    Raises:
        NotEnoughMemory: more is needed than is free; the message holds the budget.
    """
    free = memory_plan.available_bytes(device)
    if free is not None and budget.total > free:
        raise NotEnoughMemory(
            f"not enough memory on {device} for an audit: {budget}, but {free / 1e6:,.0f} MB are free "
            "(shorter prompts or fewer --tokens need less)"
        )
