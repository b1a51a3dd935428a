"""AWQ's weights in version gemm, as AutoAWQ writes them.

    w = scales * (q - qzeros)

qweight [columns, rows / 8] int32 packs q along the rows: of eight neighbours the first, third, fifth and seventh are in
the lower half of a word, the lowest bits first, and the others in the upper half; qzeros [groups, rows / 8] packs zeros
in the same way. Scales are [groups, rows].

Source: AutoAWQ's modules/linear/gemm.py (WQLinear_GEMM.from_linear) and utils/packing_utils.py (AWQ_REVERSE_ORDER,
dequantize_gemm).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from runtime.checkpoint.containers.fields import Known, group_of, only
from runtime.checkpoint.containers.gptq import HISTORY, WHOLE, check_zeros
from runtime.checkpoint.containers.scheme import Layout, Parts, Scheme, Unpacked
from runtime.model.config_fields import refuse as refuse_field

PER_WORD = 8
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # in a word, of each of eight neighbours
_VERSIONS = ("version", "format", "checkpoint_format")
_KNOWN = Known(
    read=("bits", "w_bit", "group_size", "q_group_size", "zero_point", *_VERSIONS),
    fixed={"quant_method": ("awq",), "method": ("awq", None), "desc_act": (False, None), **WHOLE},
    free=(
        *HISTORY,
        *"do_fuse fuse_max_seq_len modules_to_fuse modules_to_not_convert ignore sym".split(),
    ),
)


@dataclass(frozen=True)
class Awq(Scheme):
    """As `Scheme`."""

    container: ClassVar[str] = "awq"

    @property
    def parts(self) -> tuple[str, ...]:
        return "qweight", "qzeros", "scales"

    def layout(self, rows: int, columns: int) -> Layout:
        groups = self.groups(columns)
        return {
            "qweight": (("I32",), (columns, self.words(rows))),
            "qzeros": (("I32",), (groups, self.words(rows))),
            "scales": (self.scale_dtypes, (groups, rows)),
        }

    def shape(self, integers: tuple[int, ...]) -> tuple[int, int]:
        columns, words = integers
        return words * PER_WORD, columns

    def unpacked(self, parts: Parts) -> Unpacked:
        stored, zero = parts["qweight"].read(), self._in_order(parts["qzeros"].read()).to(torch.int16)
        check_zeros(self, parts["qzeros"], zero, 0)
        scale = parts["scales"].read().T.contiguous()

        def q(some: slice) -> torch.Tensor:
            start = some.start // PER_WORD
            found = self._in_order(stored[:, start : -(-some.stop // PER_WORD)])
            return found[some.start - start * PER_WORD :][: some.stop - some.start]

        return Unpacked(scale, zero, q)

    def _in_order(self, packed: torch.Tensor) -> torch.Tensor:
        """[n, words] int32 as [words * 8, n] uint8."""
        return self.integers(packed).view(-1, packed.shape[1], PER_WORD)[..., _PLACES].reshape(len(packed), -1).T


def read(given: Mapping[str, Any]) -> Awq:
    """The scheme of a quantization_config.

    Raises:
        CheckpointError: it is not one whose weights blocks hold exactly; the field is named.
    """
    where = "quantization_config"
    _KNOWN.check(where, given)
    for name in _VERSIONS:
        if isinstance(given.get(name), str):
            only(f"{where}.{name}", ("gemm",), given[name].lower())
        elif given.get(name) is not None:
            refuse_field(f"{where}.{name}", "'gemm'", given[name])
    for name in ("bits", "w_bit"):
        only(f"{where}.{name}", (4,), given.get(name, 4))
    names = [name for name in ("group_size", "q_group_size") if name in given]
    sizes = [group_of(f"{where}.{name}", given[name], or_row=True) for name in names] or [128]
    if len(set(sizes)) > 1:
        refuse_field(f"{where}.q_group_size", f"{given['group_size']!r}, as group_size", given["q_group_size"])
    has_zeros = only(f"{where}.zero_point", (True, False), given.get("zero_point", True))
    return Awq(4, sizes[0], not has_zeros)
