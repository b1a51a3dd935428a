"""The weights of compressed-tensors, as llm-compressor writes them, where only weights are quantised: the formats
`pack-quantized`, `naive-quantized` and `int-quantized`.

    w = weight_scale * (q - zero)       zero is 2^(bits - 1) where the weights are symmetric

weight_packed [rows, columns * bits / 32] int32 packs q along the columns, the first in the lowest bits, and
weight_zero_point [rows * bits / 32, groups] packs zeros in the same way, along the rows; weight_shape is [rows,
columns]. The other two formats have q - 128 as int8 in `weight`. Scales are [rows, groups]. compressed-tensors itself
computes in the scales' dtype; here the products are taken in fp32.

Source: the package compressed-tensors, compressors/pack_quantized, compressors/naive_quantized (compress, decompress)
and quantization/lifecycle/forward_helpers.py (_dequantize).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from runtime.checkpoint.containers.fields import Known, group_of, inside, only
from runtime.checkpoint.containers.scheme import Layout, Parts, Scheme, Unpacked, refuse
from runtime.model.config_fields import refuse as refuse_field

PACKED, PLAIN = "pack-quantized", ("naive-quantized", "int-quantized")
_OTHERS = {
    "float-quantized": "float8 weights",
    "nvfp4-pack-quantized": "NVFP4 weights",
    "mxfp4-pack-quantized": "MXFP4 weights",
    "mxfp6-pack-quantized": "MXFP6 weights",
    "mxfp8-quantized": "MXFP8 weights",
    "marlin-24": "2:4 sparse weights in Marlin's order",
    "sparse-24-bitmask": "2:4 sparse weights",
    "sparse-bitmask": "sparse weights",
    "mixed-precision": "matrices in several formats",
    "dense": "values",
}
_NONE: tuple[Any, ...] = (None, {}, [])
_KNOWN = Known(
    read=("format", "config_groups", "sparsity_config"),
    fixed={
        "quant_method": ("compressed-tensors",),
        "kv_cache_scheme": _NONE,
        "transform_config": _NONE,
        "moe_sparsity_config": _NONE,
    },
    # What was quantised shows in the tensors.
    free=("ignore", "quantization_status", "global_compression_ratio", "version", "run_compressed"),
)
_KNOWN_OF_GROUP = Known(
    read=("weights", "format"),
    fixed=dict.fromkeys(("input_activations", "output_activations"), _NONE),
    free=("targets",),
)
_KNOWN_OF_WEIGHTS = Known(
    read=("num_bits", "symmetric", "strategy", "group_size"),
    fixed={"type": ("int",), "dynamic": (False, None), "block_structure": (None,)}
    # How columns were ordered while they were quantised; "group" stores them in that order.
    | {"actorder": (None, False, "weight", "static")},
    free=("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
)


@dataclass(frozen=True)
class CompressedTensors(Scheme):
    """As `Scheme`; `is_packed` is whether the format is `pack-quantized`."""

    is_packed: bool = True

    container: ClassVar[str] = "compressed-tensors"

    @property
    def parts(self) -> tuple[str, ...]:
        if not self.is_packed:
            return "weight", "weight_scale"
        return "weight_packed", "weight_shape", "weight_zero_point", "weight_scale"

    def layout(self, rows: int, columns: int) -> Layout:
        groups = self.groups(columns)
        scale = {"weight_scale": (self.scale_dtypes, (rows, groups))}
        if not self.is_packed:
            return {"weight": (("I8",), (rows, columns))} | scale
        zeros = {} if self.is_symmetric else {"weight_zero_point": (("I32",), (self.words(rows), groups))}
        packed = {"weight_packed": (("I32",), (rows, self.words(columns))), "weight_shape": (("I32", "I64"), (2,))}
        return packed | zeros | scale

    def shape(self, integers: tuple[int, ...]) -> tuple[int, int]:
        rows, columns = integers
        return rows, columns * 32 // self.bits if self.is_packed else columns

    def unpacked(self, parts: Parts) -> Unpacked:
        integers = parts[self.parts[0]]
        (rows, columns), scale = self.shape(integers.shape), parts["weight_scale"].read()
        stored, zero = integers.read(), self.symmetric_zeros(rows, columns)
        if not self.is_packed:
            return Unpacked(scale, zero, lambda some: stored[some].view(torch.uint8) ^ 128)
        given = parts["weight_shape"].read().tolist()
        if given != [rows, columns]:
            raise refuse(parts["weight_shape"], f"must hold {[rows, columns]}, got {given}")
        if not self.is_symmetric:
            zero = self.integers(parts["weight_zero_point"].read().T)[:, :rows].T.to(torch.int16)
        return Unpacked(scale, zero, lambda some: self.integers(stored[some]))


def read(given: Mapping[str, Any]) -> CompressedTensors:
    """The scheme of a quantization_config.

    Raises:
        CheckpointError: it is not one whose weights blocks hold exactly; the field is named.
    """
    _KNOWN.check("quantization_config", given)
    format_ = _format(given.get("format"))
    sparsity = given.get("sparsity_config")
    if sparsity not in _NONE and not (isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"):
        refuse_field("quantization_config.sparsity_config", "absent or of format 'dense'", sparsity)
    groups = given.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        refuse_field("quantization_config.config_groups", "one group", groups)
    ((name, group),) = groups.items()
    where = inside("quantization_config.config_groups", name)
    _KNOWN_OF_GROUP.check(where, group)
    if group.get("format") is not None:
        format_ = only(f"{where}.format", (format_,), group["format"])
    where, weights = f"{where}.weights", group.get("weights")
    _KNOWN_OF_WEIGHTS.check(where, weights)
    bits = only(f"{where}.num_bits", (4, 8) if format_ == PACKED else (8,), weights.get("num_bits"))
    is_symmetric = only(f"{where}.symmetric", (True, False), weights.get("symmetric", True))
    if not is_symmetric and (bits == 8 or format_ != PACKED):
        refuse_field(f"{where}.symmetric", "true with 8 bits", is_symmetric)
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("channel" if size == -1 else "group")
    only(f"{where}.strategy", ("group", "channel"), strategy)
    if strategy == "channel":
        only(f"{where}.group_size", (None, -1), size)
    return CompressedTensors(
        bits, None if strategy == "channel" else group_of(f"{where}.group_size", size), is_symmetric, format_ == PACKED
    )


def _format(given: Any) -> str:
    if given in (PACKED, *PLAIN):
        return str(given)
    what = _OTHERS.get(given) if isinstance(given, str) else None
    note = f" ({given} has {what})" if what else ""
    refuse_field("quantization_config.format", f"one of {(PACKED, *PLAIN)}{note}", given)
