"""What a quantised model is compared with: the exact values of its blocks, decoded by code other than the runtime's.

Blocks of a GGUF file are decoded by the `gguf` package, blocks quantised at load by the formulas here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from runtime.checkpoint.quantized import quantized_forms
from runtime.checkpoint.quantizing import blocks_of
from runtime.checkpoint.stored import InFile
from runtime.checkpoint.weights import read_weights
from runtime.kernels.cpu.block_formats import Format
from runtime.loading import ResolvedModel
from runtime.model.config import QUANTIZED_TO
from runtime.model.model import Model


@dataclass(frozen=True)
class Values:
    """A tensor's values in fp32 after quantising it to `form`, or as stored where `form` is None."""

    tensor: InFile
    form: Format | None

    blocks = None

    def copy_into(self, destination: torch.Tensor, progress: Callable[[int], None] | None = None) -> None:
        """Read the values into an fp32 tensor of the same shape."""
        flat, start = destination.view(-1), 0
        for rows in self.tensor.rows():
            values = rows if self.form is None else _decoded(blocks_of(rows, self.form), self.form)
            flat[start : start + values.numel()] = values.reshape(-1)
            start += values.numel()


def reference_model(model: Model, resolved: ResolvedModel) -> Model:
    """A copy of a quantised model whose weights are the values of its blocks, in fp32.

    Args:
        model: the quantised model.
        resolved: what it was loaded from; the weights must be on this machine.
    """
    config, quantize = model.config, model.runtime.quantize
    forms = quantized_forms(config, quantize) if quantize in QUANTIZED_TO else dict.fromkeys(resolved.stored)
    values = {name: Values(tensor, forms[name]) for name, tensor in resolved.stored.items() if name in forms}
    weights = read_weights(values, config, model.device, torch.float32)
    return replace(model, weights=weights, runtime=replace(model.runtime, quantize=None, dtype="float32"))


def _decoded(blocks: torch.Tensor, form: Format) -> torch.Tensor:
    """The values [rows, columns] of rows in int8 or Q4_0."""
    if form.is_row:
        scale, q = blocks.split((4, form.columns), dim=1)
        return scale.contiguous().view(torch.float32) * q.contiguous().view(torch.int8)
    scale, nibbles = blocks.view(len(blocks), -1, 18).split((2, 16), dim=2)
    q = torch.cat((nibbles % 16, nibbles // 16), dim=2).float() - 8
    return (scale.contiguous().view(torch.float16).float() * q).view(len(blocks), -1)
