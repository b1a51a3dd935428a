"""How a checkpoint's tensors are packed in memory: in which matrix, as blocks or as values, in how many bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import torch

from runtime.checkpoint.stored import Readable
from runtime.kernels.cpu.block_formats import Format
from runtime.model.config import ModelConfig
from runtime.model.weights import EMBEDDING, FINAL_NORM, HEAD, Shapes, layer_shapes, packed_shape, stored_shapes

Forms = Mapping[str, Format | None]  # of the blocks that each stored tensor is kept in; None where it is values


@dataclass(frozen=True)
class Run:
    """Neighbouring tensors in a packed matrix, by stored name: in blocks of one format or, where that is None, as
    values."""

    form: Format | None
    shapes: Shapes

    def memory(self, dtype: torch.dtype) -> tuple[int, ...]:
        """Their shape once packed, in bytes; `dtype` is that of values."""
        *rows, columns = packed_shape(self.shapes)
        return (
            *rows,
            columns * dtype.itemsize if self.form is None else columns // self.form.columns * self.form.bytes,
        )


def forms_of(stored: Mapping[str, Readable]) -> Forms:
    """The formats of the blocks that tensors are stored in."""
    return {name: tensor.blocks.form if tensor.blocks else None for name, tensor in stored.items()}


def runs_of(forms: Forms, tensors: Shapes) -> list[Run]:
    """The runs of the tensors that are packed into one matrix: a single run of values, unless all of them have
    blocks."""
    given = [forms[name] for name in tensors]
    chosen = given if all(given) else [None] * len(given)
    by_form = groupby(zip(chosen, tensors.items(), strict=True), key=lambda pair: pair[0])
    return [Run(form, dict(named for _, named in pairs)) for form, pairs in by_form]


def packed_tensors(config: ModelConfig) -> tuple[dict[str, Shapes], list[dict[str, Shapes]]]:
    """The tensors that are packed into each matrix, by stored name: those of the whole model, and for each layer those
    of each field."""
    shapes = stored_shapes(config)
    tables = {name: {name: shapes[name]} for name in (EMBEDDING, FINAL_NORM, HEAD) if name in shapes}
    layers = [
        {
            field: {f"model.layers.{index}.{name}": shape for name, shape in tensors.items()}
            for field, tensors in layer_shapes(config, index).items()
        }
        for index in range(len(config.layers))
    ]
    return tables, layers


def layout(forms: Forms, config: ModelConfig) -> list[Run]:
    """The runs of all that is packed."""
    tables, layers = packed_tensors(config)
    packed = [*tables.values(), *(tensors for layer in layers for tensors in layer.values())]
    return [run for tensors in packed for run in runs_of(forms, tensors)]


def weight_bytes(forms: Forms, config: ModelConfig, dtype: torch.dtype) -> dict[str, int]:
    """What each stored tensor takes in memory, as `read_weights` reads it."""
    return {
        name: math.prod(Run(run.form, {name: shape}).memory(dtype))
        for run in layout(forms, config)
        for name, shape in run.shapes.items()
    }


def matrices_as_values(forms: Forms, config: ModelConfig) -> list[str]:
    """The names of matrices that `read_weights` reads as values: those without blocks, and those packed with them."""
    valued = [run for run in layout(forms, config) if run.form is None]
    return [name for run in valued for name, shape in run.shapes.items() if len(shape) == 2]
