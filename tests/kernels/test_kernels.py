"""Each Triton kernel against its reference: on a GPU, or in Triton's interpreter on a CPU.

The comparisons are those of test_planted_faults.py. References keep their norms in fp32 whatever the input, as Hugging
Face does, in the fp64 truth too; the comparison's floor covers that.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

import runtime.kernels as kernels
from runtime.kernels.argmax import new_argmax_keys
from runtime.kernels.attention_splits import MAX_SPLITS, block_keys
from runtime.kernels.block import Block
from runtime.kernels.launch import INTERPRETING
from runtime.kernels.ops import ops_for

from .attention_cases import attention_case, pair_case
from .cases import DEVICE, EPS, FEW_SPLITS, advance_case, head_case, linear_case, norm_case, projection_case, random
from .catalogue import CASES, WINDOW, cases_and_dtypes, dtypes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETING,
        reason="kernels need a GPU, or TRITON_INTERPRET=1 (tests/test_interpreter.py)",
    ),
]


@cases_and_dtypes()
def test_a_kernel_computes_what_its_reference_does(case, dtype):
    call = CASES[case](dtype)
    call.compare(call.run(call.kernel))


@pytest.mark.parametrize(
    ("case", "block"),
    [
        ("qkv_projection 130x200", Block(1, 256, 4)),
        ("qkv_projection 37x84, branch", Block(16, 128, 4)),
        ("gated_mlp 130x200, branch", Block(4, 256, 8)),
        ("gated_mlp 37x84", Block(64, 128, 4)),
        ("residual_linear, residual", Block(8, 256, 4)),
        ("lm_head_argmax, softcap", Block(8, 128, 4)),
        ("lm_head_argmax, below zero", Block(16, 128, 4)),
        ("lm_head_argmax, equal rows", Block(1, 128, 4)),
        ("lm_head_argmax, equal rows", Block(8, 128, 4)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.rows} rows a program",
)
@dtypes
def test_a_kernel_may_take_other_blocks(case, block, dtype):
    call = CASES[case](dtype)
    call.compare(call.run(call.kernel, block=block))


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_of_either_sign_are_equal(zero):
    table, x = torch.zeros(16, 32, device=DEVICE), torch.ones(1, 32, device=DEVICE)
    table[3:] = zero  # products of either sign of zero
    token, keys = torch.full((1,), -1, device=DEVICE), new_argmax_keys(1, x.device)
    kernels.lm_head_argmax(token, x, torch.zeros(32, device=DEVICE), table, eps=EPS, argmax_keys=keys)
    assert token.item() == 0


def test_a_kernel_refuses_to_run_without_its_workspace():
    x, table = random(1, 32, dtype=torch.float32), random(16, 32, dtype=torch.float32)
    head = partial(
        kernels.lm_head_argmax, torch.zeros(1, dtype=torch.int64, device=DEVICE), x, table[0], table, eps=EPS
    )
    with pytest.raises(ValueError, match="argmax_keys: expected new_argmax_keys of at least 1 rows, got None"):
        head()


@pytest.mark.parametrize("kv_heads", range(1, 9))
def test_attention_with_every_number_of_key_heads(kv_heads):
    group = 16 if kv_heads == 1 else 1 + kv_heads % 3  # 16 query heads a key head are the most
    case = attention_case((33, 7), group * kv_heads, kv_heads, 64, None, torch.bfloat16)
    case.compare(case.run(case.kernel))


@dtypes
def test_attention_where_splits_are_the_most_there_are(dtype):
    case = attention_case((MAX_SPLITS * block_keys(dtype),), 2, 1, 64, None, dtype)
    case.assert_right(case.run(case.kernel))  # these are too few values for their roundings


def full(dtype: torch.dtype) -> int:
    """The keys of FEW_SPLITS of one block."""
    return FEW_SPLITS * block_keys(dtype)


@dtypes
@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("blocks", [1, 3], ids="splits of {} blocks".format)
def test_attention_where_splits_grow(blocks, dtype):
    edge = full(dtype) * blocks
    case = attention_case((edge - 1, edge, edge + 1), 4, 2, 64, None, dtype)
    case.compare(case.run(case.kernel))


# Of the keys before the new one, `edge` fill all splits of one block.
TOGETHER = {
    "one to three splits": lambda edge: ((0, 7, 8, 9), None, {}),
    "full splits": lambda edge: ((edge, edge + 1, 2 * edge + 1), None, {"qk_norm": True}),
    "window": lambda edge: ((WINDOW - 2, WINDOW - 1, WINDOW, 3 * WINDOW + 1), WINDOW, {}),
    "window of splits of one block, cap": lambda edge: (
        (7, edge - 3, edge - 2, 3 * edge),
        edge - 2,
        {"softcap": 50.0, "scale": 20**-0.5, "spread": 2.0},
    ),
    "window of full splits": lambda edge: ((2 * edge, 2 * edge + 1, 5 * edge), 2 * edge + 1, {}),
    "window a key longer than full splits": lambda edge: ((2 * edge + 1, 2 * edge + 2, 5 * edge), 2 * edge + 2, {}),
    "long": lambda edge: ((5 * edge + 3,), None, {}),
}


@dtypes
@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("lengths", TOGETHER.values(), ids=TOGETHER)
def test_attention_and_its_projection_fit_together(lengths, dtype):
    positions, window, options = lengths(full(dtype))
    case = pair_case(attention_case(positions, 4, 2, 48, window, dtype, **options), 37)
    case.compare(case.run(case.kernel))


def positions(dtype: torch.dtype) -> tuple[int, ...]:
    """Of eight rows: no split, parts of a block, and splits of one to three blocks, the last of which is not full."""
    edge, keys = full(dtype), block_keys(dtype)
    return (0, 1, keys, keys + 1, edge - 1, edge, edge + 1, 2 * edge + 3)


EIGHT_ROWS = {
    "rms_norm": lambda dtype: norm_case(8, 84, dtype, with_residual=True),
    "qkv_projection": lambda dtype: projection_case("qkv_projection", 8, 96, 200, dtype, branched=True),
    "gated_mlp": lambda dtype: projection_case("gated_mlp", 8, 96, 200, dtype, branched=True),
    "residual_linear": lambda dtype: linear_case(8, 96, 200, dtype, with_residual=True),
    "lm_head_argmax": lambda dtype: head_case(8, 96, 200, dtype, branched=True, softcap=30.0),
    "advance": lambda dtype: advance_case(8, 84, dtype),
    "decode_attention": lambda dtype: attention_case(positions(dtype), 3, 1, 32, None, dtype, qk_norm=True),
    "attention and its projection": lambda dtype: pair_case(
        attention_case(positions(dtype), 2, 2, 32, WINDOW, dtype, softcap=50.0), 37
    ),
}


@dtypes
@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("kernel", EIGHT_ROWS)
def test_a_row_has_the_same_bits_in_every_batch(kernel, dtype):
    case = EIGHT_ROWS[kernel](dtype)
    together = case.run(case.kernel)
    case.assert_right(together)
    for rows in [slice(count) for count in range(1, 8)] + [slice(row, row + 1) for row in (3, 7)]:
        for name, alone in case.run(case.kernel, rows).items():
            expected = together[name]
            if name != "step":  # one for the whole batch
                expected = expected[:, rows] if name == "emitted" else expected[rows]
            assert torch.equal(alone, expected), (name, rows)


@dtypes
@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window", "options"),
    [
        (4, 1, 80, None, {"qk_norm": True}),
        (6, 2, 48, WINDOW, {"softcap": 50.0, "spread": 2.0}),
        (3, 1, 2, None, {}),
    ],
    ids=["q/k norm", "cap, window, two key heads", "one pair"],
)
def test_a_row_has_the_same_bits_whatever_heads_share_a_program(heads, kv_heads, head_dim, window, options, dtype):
    """A model of one row has a program for each query head, any other one for all that share a key head."""
    edge, keys = full(dtype), block_keys(dtype)
    case = attention_case((keys + 1, edge + 1, 2 * edge + 3), heads, kv_heads, head_dim, window, dtype, **options)
    apart, together = (case.run(partial(case.call, ops_for(torch.device(DEVICE), max_rows))) for max_rows in (1, 8))
    case.assert_right(apart)
    for name, result in together.items():
        assert torch.equal(result, apart[name]), name
