"""How attention splits the keys of a row: by its length alone, in the kernels as in the plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton import cdiv

from runtime.check.attention_cases import attention_case, empty_splits
from runtime.check.case import DEVICE
from runtime.kernels import attention_splits
from runtime.kernels.attention_splits import SplitPlan, most_splits, plan_splits, split_plan
from runtime.kernels.launch import INTERPRETING

from .splits import limit_splits

WARP, GROUP = attention_splits.WARP_SPLITS, attention_splits.GROUP_SPLITS
PLANS = [(WARP, 8), (WARP, 4), (GROUP, 32), (GROUP, 16), (SplitPlan(4, 8, 10), 4), (SplitPlan(4, 6, 10), 4)]
kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETING,
    reason="kernels need a GPU, or TRITON_INTERPRET=1 (tests/test_interpreter.py)",
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
models = pytest.mark.parametrize("max_rows", [1, 8], ids="of a model of {} rows".format)


@pytest.mark.parametrize(("plan", "block"), PLANS)
def test_splits_are_whole_blocks_and_no_more_than_the_most(plan, block):
    most = 0
    longest = 3 * plan.most * plan.keys
    for older in range(0, longest, 1 + longest // 10_000):
        keys, size, splits = plan_splits(older, None, block, plan)
        assert keys == older and size % block == 0
        assert (splits - 1) * size < older <= splits * size or older == splits == 0
        most = max(most, splits)
        assert splits <= most <= plan.most_of(older, block) <= max(plan.few, plan.most)
        if older <= plan.few * plan.keys and plan.keys % block == 0:
            assert most == plan.most_of(older, block)


@pytest.mark.parametrize(
    ("plan", "block", "splits"), [(WARP, 8, 128), (WARP, 4, 128), (GROUP, 32, 32), (GROUP, 16, 32)]
)
def test_rows_of_up_to_8192_keys_are_split_as_those_that_were_measured(plan, block, splits):
    for older in [*range(0, 8193, 3), 8192]:
        size = cdiv(cdiv(older, splits), block) * block
        assert plan_splits(older, None, block, plan)[1] == size
    assert plan_splits(2 * 8192, None, block, plan)[1] == plan.keys < cdiv(2 * 8192, splits)


def rows_of(plan: SplitPlan, keys: int) -> tuple[int, ...]:
    """Lengths about where more splits begin, where there are the most, and where those grow."""
    few, most = plan.few * keys, plan.most * keys
    return few, few + 1, 2 * few + 1, most, most + 1


@kernels
@dtypes
@models
def test_long_rows_have_more_splits_and_are_as_exact(dtype, max_rows, monkeypatch):
    keys = split_plan(dtype, max_rows, 2)[1]
    limit_splits(monkeypatch, 4, keys=keys, most=10)
    plan, _ = split_plan(dtype, max_rows, 2)
    assert [plan_splits(row, None, keys, plan)[2] for row in rows_of(plan, keys)] == [4, 5, 9, 10, 6]
    case = attention_case(rows_of(plan, keys), 4, 2, 32, None, dtype, qk_norm=True)
    case.assert_right(case.run(case.kernel_of(max_rows)))


@kernels
@dtypes
@models
def test_a_row_has_the_same_splits_and_bits_however_long_it_might_become(dtype, max_rows, monkeypatch):
    """In models of two lengths, which have workspaces of their own sizes."""
    keys = split_plan(dtype, max_rows, 2)[1]
    limit_splits(monkeypatch, 4, keys=keys, most=10)
    plan, _ = split_plan(dtype, max_rows, 2)
    rows = rows_of(plan, keys)[:2]
    case = attention_case(rows, 4, 2, 32, None, dtype)
    outs = []
    for longer, most in ((1, 5), (3, 10)):
        made = []

        def call(ops, out, k_cache, v_cache, qkv, position, cos, sin, most=most, made=made, **options):
            assert most == most_splits(len(cos), dtype, max_rows, 2)
            made.append(empty_splits(out, 4, 32, most))
            ops.decode_attention(out, k_cache, v_cache, qkv, position, cos, sin, splits=made[-1], **options)

        given = dict(case.inputs)
        for name in ("cos", "sin"):
            given[name] = given[name].repeat(longer, 1)
        for name in ("k_cache", "v_cache"):
            given[name] = given[name].repeat(1, 1, longer, 1)
        of_length = replace(case, call=call, inputs=given)
        outs.append(of_length.run(of_length.kernel_of(max_rows))["out"])
        found = [int(row.isfinite().all(dim=(1, 2)).sum()) for splits in made for row in splits.stats]
        assert found == [1 + plan_splits(row, None, keys, plan)[2] for row in rows] == [5, 6]
    assert torch.equal(*outs)
