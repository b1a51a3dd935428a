"""Rows of one sequence on Triton kernels: each has the bits of a decode step at its position, and the cache stays as it
is until it is known how many of them stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runtime.check.attention_cases import empty_splits
from runtime.check.case import DEVICE
from runtime.check.sequences import ROW, SEQUENCES_OF, assert_bits_of_steps, assert_right, kernels, sequence, together
from runtime.kernels.launch import INTERPRETING
from runtime.kernels.ops import ops_for
from runtime.kernels.sequence_attention import SequenceAttention

from .parameters import dtypes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETING,
        reason="kernels need a GPU, or TRITON_INTERPRET=1 (tests/test_interpreter.py)",
    ),
    pytest.mark.usefixtures("few_splits"),
]
sequences = pytest.mark.parametrize("name", SEQUENCES_OF)


@pytest.mark.newest_only  # of rows that are the references with the oldest too
@dtypes
@sequences
def test_rows_of_a_sequence_have_the_bits_of_steps(name, dtype):
    assert_bits_of_steps(sequence(name, dtype))


@sequences
def test_rows_of_a_sequence_are_the_references(name):
    """In every dtype they are the bits of decode_attention, which test_kernels.py compares."""
    assert_right(sequence(name, torch.float32))


def test_padding_changes_no_row_before_it():
    given = sequence("over blocks' ends", torch.bfloat16)
    expected = together(given, 5)
    padded = given._replace(position=torch.minimum(given.position, given.position[4]))
    for result, alone in zip(together(padded), expected, strict=True):
        assert torch.equal(result[:5], alone)


def test_what_the_kernels_cannot_do_is_refused():
    given = sequence("one row", torch.float32)
    out, new = given.out(), given.new()
    operands = (out, given.k_cache, given.v_cache, given.qkv, given.position, *given.tables)
    options = {
        "row": torch.tensor([ROW], device=DEVICE),
        "splits": empty_splits(out, given.options["heads"], given.k_cache.shape[3]),
        **given.options,
    }

    def refused(message: str, max_rows: int = 8, **changed: Any) -> None:
        with pytest.raises(ValueError, match=message):
            ops_for(torch.device(DEVICE), max_rows).sequence_attention(*operands, **options | changed)

    refused("new_keys and new_values: expected both or neither, got one", new_keys=new)
    refused("new_values: expected shape", new_keys=new, new_values=new[:, :, 1:])
    refused("new_keys: expected a tensor for Triton")
    refused("max_rows: expected 2 or more", max_rows=1, new_keys=new, new_values=new)
    assert out.isnan().all() and new.isnan().all()
    many = SequenceAttention(*operands, new_keys=new, new_values=new, **options | {"heads": 17})
    with pytest.raises(ValueError, match="heads: expected at most 16 for a key head, got 17"):
        many.run_triton(kernels()._launch)
