"""Each Triton kernel against its reference: on a GPU, or in Triton's interpreter on a CPU.

The comparisons are those of test_planted_faults.py. References keep their norms in fp32 whatever the input, as Hugging
Face does, in the fp64 truth too; the comparison's floor covers that.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

import runtime.kernels as kernels
from runtime.check.attention_cases import attention_case, pair_case
from runtime.check.case import DEVICE, EPS, random
from runtime.check.catalogue import CASES, WINDOW
from runtime.check.head_cases import head_case
from runtime.check.step_cases import advance_case, norm_case
from runtime.kernels.argmax import NO_KEY, NO_TOKEN, new_argmax_keys
from runtime.kernels.attention_splits import split_plan
from runtime.kernels.block import Block
from runtime.kernels.launch import INTERPRETING
from runtime.kernels.ops import ops_for

from .parameters import cases_and_dtypes, dtypes, marks_of
from .splits import FEW_SPLITS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETING,
        reason="kernels need a GPU, or TRITON_INTERPRET=1 (tests/test_interpreter.py)",
    ),
]


ATTENTION = [name for name in CASES if "attention" in name]
# With the oldest versions every shape on its longest rows; the shortest are below, with the projection.
LONGEST_ROWS = [name for name in ATTENTION if "round the ring" in name or "projection" in name]
# Which of attention's kernels runs: a warp for each query head, or tensor cores for all that share a key head.
models = pytest.mark.parametrize("max_rows", [1, 8], ids=["model of one row", "model of more"])


@cases_and_dtypes([name for name in CASES if name not in ATTENTION])
def test_a_kernel_computes_what_its_reference_does(case, dtype):
    call = CASES[case](dtype)
    call.compare(call.run(call.kernel))


@models
@cases_and_dtypes(ATTENTION, LONGEST_ROWS, {name: ("fp32", "bf16") for name in ATTENTION if name not in LONGEST_ROWS})
def test_attention_computes_what_its_reference_does(case, dtype, max_rows):
    call = CASES[case](dtype)
    call.compare(call.run(call.kernel_of(max_rows)))


@dtypes
@pytest.mark.parametrize(
    "case",
    ["qkv_projection 64x128, branch", "gated_mlp 64x128", "residual_linear 64x128, residual", "lm_head_argmax, branch"],
)
def test_a_model_of_one_row_has_programs_of_its_own(case, dtype):
    call = CASES[case](dtype)
    call.compare(call.run(call.kernel_of(1)))


@pytest.mark.newest_only  # shapes of what other tests compute with the oldest too
@pytest.mark.parametrize(
    ("case", "block"),
    [
        ("qkv_projection 130x200", Block("sum", 1, 256, 4)),
        ("gated_mlp 37x84", Block("sum", 64, 128, 4)),
        ("lm_head_argmax, equal rows", Block("sum", 1, 128, 4)),
        ("lm_head_argmax, equal rows", Block("sum", 8, 128, 4)),
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
    x, table = (random(rows, 32, dtype=torch.float32).to(DEVICE) for rows in (1, 16))
    head = partial(
        kernels.lm_head_argmax, torch.zeros(1, dtype=torch.int64, device=DEVICE), x, table[0], table, eps=EPS
    )
    with pytest.raises(ValueError, match="argmax_keys: expected new_argmax_keys of at least 1 rows, got None"):
        head()


@dtypes
def test_advance_picks_the_tokens_that_the_head_leaves(dtype):
    """Among them one of a row that was done, a stop token and none at all; and the head's workspace is cleared."""
    head, advance = head_case(4, 301, 84, dtype), advance_case(4, 84, dtype)
    head.inputs["x"][3, 0] = torch.nan
    picked = head.run(head.kernel)["token"]
    advance.inputs["token"] = picked
    advance.inputs["stop_ids"][0, 0] = picked[0]
    expected = advance.run(advance.kernel)

    def in_two_launches(**arguments):
        keys = new_argmax_keys(4, arguments["token"].device)
        arguments["token"].fill_(7)
        inputs = {name: value.to(DEVICE) for name, value in head.inputs.items()} | {"token": arguments["token"]}
        ops = ops_for(torch.device(DEVICE))
        ops.lm_head_argmax(**inputs, argmax_keys=keys, leaves_pick=True, eps=EPS)
        assert (arguments["token"] == 7).all() and (keys != NO_KEY).any(dim=1).all()
        ops.advance(**arguments, argmax_keys=keys)
        assert (keys == NO_KEY).all()

    given = advance.run(in_two_launches)
    assert given["done"].tolist() == [True, True, False, True] and picked[3] == NO_TOKEN
    for name, result in given.items():
        assert torch.equal(result, expected[name]), name


def keys_of(dtype: torch.dtype, max_rows: int) -> int:
    """Of a block of older keys."""
    return split_plan(dtype, max_rows, 1)[1]


@pytest.mark.newest_only  # shapes of what other tests compute with the oldest too
@models
@pytest.mark.parametrize("kv_heads", range(1, 9))
def test_attention_with_every_number_of_key_heads(kv_heads, max_rows):
    group = 16 if kv_heads == 1 else 1 + kv_heads % 3  # 16 query heads a key head are the most of a tile
    case = attention_case((33, 7), group * kv_heads, kv_heads, 64, None, torch.bfloat16)
    case.compare(case.run(case.kernel_of(max_rows)))


def test_attention_with_more_query_heads_than_a_tile_has():
    case = attention_case((33, 7), 17, 1, 64, None, torch.bfloat16)
    case.compare(case.run(case.kernel_of(8)))


@models
@pytest.mark.parametrize(
    ("heads", "head_dim", "options"), [(3, 2, {}), (3, 48, {"qk_norm": True})], ids=["one pair", "padded, q/k norm"]
)
def test_attention_with_few_dims(heads, head_dim, options, max_rows):
    case = attention_case((33, 7), heads, 1, head_dim, None, torch.bfloat16, **options)
    case.assert_right(case.run(case.kernel_of(max_rows)))


@pytest.mark.newest_only  # shapes of what other tests compute with the oldest too
@models
@dtypes
def test_attention_where_splits_are_the_most_there_are(dtype, max_rows):
    plan, keys = split_plan(dtype, max_rows, 1)
    case = attention_case((plan.few * keys,), 2, 1, 64, None, dtype)
    case.assert_right(case.run(case.kernel_of(max_rows)))  # these are too few values for their roundings


def full(dtype: torch.dtype, max_rows: int) -> int:
    """The keys of FEW_SPLITS of one block."""
    return FEW_SPLITS * keys_of(dtype, max_rows)


@pytest.mark.newest_only  # shapes of what other tests compute with the oldest too
@models
@dtypes
@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("blocks", [1, 3], ids="splits of {} blocks".format)
def test_attention_where_splits_grow(blocks, dtype, max_rows):
    edge = full(dtype, max_rows) * blocks
    case = attention_case((edge - 1, edge, edge + 1), 4, 2, 64, None, dtype)
    case.compare(case.run(case.kernel_of(max_rows)))


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
    "long": lambda edge: ((5 * edge + 3, 6 * edge), None, {}),
}
WITH_OLDEST = ("one to three splits", "full splits", "window of splits of one block, cap")


@models
@dtypes
@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize(
    "lengths", [pytest.param(make, id=name, marks=marks_of(name, WITH_OLDEST)) for name, make in TOGETHER.items()]
)
def test_attention_and_its_projection_fit_together(lengths, dtype, max_rows):
    positions, window, options = lengths(full(dtype, max_rows))
    case = pair_case(attention_case(positions, 4, 2, 48, window, dtype, **options), 37)
    given = case.run(case.kernel_of(max_rows))
    if window is None and max(positions) > 500:
        case.assert_right(given)  # most of the error is that of 16-bit weights, which are not the fused operation's
    else:
        case.compare(given)


def positions(dtype: torch.dtype) -> tuple[int, ...]:
    """Of eight rows: no split, parts of a block, and splits of one to three blocks, the last of which is not full."""
    edge, keys = full(dtype, 8), keys_of(dtype, 8)
    return (0, 1, keys, keys + 1, edge - 1, edge, edge + 1, 2 * edge + 3)


# The products' rows are in test_forms.py.
EIGHT_ROWS = {
    "rms_norm": lambda dtype: norm_case(8, 84, dtype, with_residual=True),
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
    together = case.run(case.kernel_of(8))
    case.assert_right(together)
    counts = (1, 2, 5) if "attention" in kernel and INTERPRETING else range(1, 8)
    for rows in [slice(count) for count in counts] + [slice(row, row + 1) for row in (3, 7)]:
        for name, alone in case.run(case.kernel_of(8), rows).items():
            expected = together[name]
            if name != "step":  # one for the whole batch
                expected = expected[:, rows] if name == "emitted" else expected[rows]
            assert torch.equal(alone, expected), (name, rows)
