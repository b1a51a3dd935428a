"""GPTQ's weights, as AutoGPTQ and GPTQModel write them.

    w = scales * (q - zero)             zero = qzeros + 1, or in format gptq_v2 qzeros

qweight [columns * bits / 32, rows] int32 packs q along the columns, the first in the lowest bits; qzeros [groups, rows
* bits / 32] packs zeros likewise, along the rows; scales are [groups, rows], g_idx [columns] is each column's group,
which must be column // group_size. A stored zero of 2^bits - 1 in format gptq is refused: some programs read it as
2^bits, others as 0.

Source: AutoGPTQ's nn_modules/qlinear/qlinear_cuda.py (pack, forward), GPTQModel's utils/model.py
(convert_gptq_v1_to_v2_format_module).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from runtime.checkpoint.containers.fields import Known, group_of, only
from runtime.checkpoint.containers.scheme import Layout, Parts, Scheme, Unpacked, refuse
from runtime.checkpoint.stored_tensor import StoredTensor
from runtime.model.config_fields import refuse as refuse_field

V1, V2 = "gptq", "gptq_v2"
# How weights were quantised, and what other programs run them with.
HISTORY = """
    act_group_aware backend batch_size block_name_to_quantize cache_block_outputs damp_percent damp_auto_increment
    dataset device disable_exllama exllama_config failsafe fallback hyb_act lm_head max_input_length meta
    mock_quantization model_file_base_name model_name_or_path gptaq model_seqlen module_name_preceding_first_block
    modules_in_block_to_quantize mse pack_impl pad_token_id parallel_packing static_groups tokenizer true_sequential
    use_cuda_fp16 use_exllama v2 v2_alpha
""".split()
# What would make matrices differ from each other, or be packed differently.
WHOLE: dict[str, tuple[Any, ...]] = {
    "pack_dtype": ("int32", None),
    **dict.fromkeys(("adapter", "dynamic", "rotation"), (None, {}, [])),
}
_KNOWN = Known(
    read=("bits", "group_size", "sym", "checkpoint_format", "format"),
    fixed={
        "quant_method": ("gptq",),
        "method": ("gptq", None),
        "desc_act": (False, None),
        "is_marlin_format": (False, None),
        **WHOLE,
    },
    free=(*HISTORY,),
)


@dataclass(frozen=True)
class Gptq(Scheme):
    """As `Scheme`; `zero_offset` is what is added to a stored zero."""

    zero_offset: int = 1

    container: ClassVar[str] = "gptq"

    @property
    def parts(self) -> tuple[str, ...]:
        return "qweight", "qzeros", "g_idx", "scales"

    def layout(self, rows: int, columns: int) -> Layout:
        groups = self.groups(columns)
        return {
            "qweight": (("I32",), (self.words(columns), rows)),
            "qzeros": (("I32",), (groups, self.words(rows))),
            "g_idx": (("I32",), (columns,)),
            "scales": (self.scale_dtypes, (groups, rows)),
        }

    def shape(self, integers: tuple[int, ...]) -> tuple[int, int]:
        words, rows = integers
        return rows, words * 32 // self.bits

    def unpacked(self, parts: Parts) -> Unpacked:
        stored, (rows, columns) = parts["qweight"].read(), self.shape(parts["qweight"].shape)
        if not torch.equal(
            parts["g_idx"].read().long(), torch.arange(columns, device="cpu") // (self.group or columns)
        ):
            raise refuse(parts["g_idx"], f"must hold each column's number // {self.group or columns}")
        zero = self.integers(parts["qzeros"].read())[:, :rows].T.to(torch.int16)
        check_zeros(self, parts["qzeros"], zero, self.zero_offset)
        scale = parts["scales"].read().T.contiguous()
        return Unpacked(scale, zero + self.zero_offset, lambda some: self.integers(stored[:, some].T))


def check_zeros(scheme: Scheme, tensor: StoredTensor, stored: torch.Tensor, offset: int) -> None:
    """Refuse zeros [rows, groups], as stored, that a scheme's config or blocks rule out."""
    middle = (1 << scheme.bits - 1) - offset
    if scheme.is_symmetric and not (stored == middle).all():
        other = int(stored[stored != middle][0])
        raise refuse(tensor, f"must hold {middle} alone where weights are symmetric, got {other}")
    most = (1 << scheme.bits) - 1 - offset
    if not scheme.is_symmetric and stored.max() > most:
        raise refuse(tensor, f"must hold zeros of at most {most}, got {int(stored.max())}")


def read(given: Mapping[str, Any]) -> Gptq:
    """The scheme of a quantization_config.

    Raises:
        CheckpointError: it is not one whose weights blocks hold exactly; the field is named.
    """
    where = "quantization_config"
    _KNOWN.check(where, given)
    formats = {name: given[name] for name in ("checkpoint_format", "format") if given.get(name) is not None}
    for name, value in formats.items():
        only(f"{where}.{name}", (V1, V2), value)
    if len(set(formats.values())) > 1:
        refuse_field(f"{where}.format", f"{given['checkpoint_format']!r}, as checkpoint_format", given["format"])
    bits, is_symmetric = only(f"{where}.bits", (4, 8), given.get("bits")), given.get("sym", True)
    only(f"{where}.sym", (True, False) if bits == 4 else (True,), is_symmetric)
    offset = 0 if V2 in formats.values() else 1
    return Gptq(bits, group_of(f"{where}.group_size", given.get("group_size"), or_row=True), is_symmetric, offset)
