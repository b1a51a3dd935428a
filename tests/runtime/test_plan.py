"""The cost sheet of a decode step: nothing read twice, few launches, no wasted last wave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtime.cli.main import main
from runtime.cost.launches import step_launches
from runtime.cost.plan import TARGETS, gather, make_plan
from runtime.model.config import ModelConfig
from runtime.model.published import PUBLISHED

H100 = TARGETS["h100"]


@pytest.mark.parametrize("context", [1, 128, 1024, 4096])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_step_moves_little_more_than_it_must_in_few_launches(name, context):
    plan = gather(name, gpu="h100", context=context)
    config = ModelConfig.from_hf(PUBLISHED[name])
    # Attention's splits are written once and read once, and stay in the L2 cache.
    splits = 2 * sum(cost.launches * cost.bytes_read for cost in plan.kernels if cost.kernel == "combine_splits")
    assert plan.bytes_needed <= plan.bytes_moved <= 1.01 * plan.bytes_needed + splits
    assert splits <= 0.025 * plan.bytes_needed
    assert plan.launches == 6 * len(config.layers) + 2
    for cost in plan.kernels:
        if cost.bytes_read > 5e6 and cost.kernel != "decode_attention":
            # Of one product, 2304 outputs of 2048 columns, an H200 is the fastest with a block that fits less well.
            is_that = (name, cost.kernel, cost.programs) == ("gemma-2-2b", "residual_linear", 2304 // 4)
            assert cost.tail_waste <= (0.13 if is_that else 0.1), cost


def test_the_bytes_of_every_kernel_of_gemma_2b():
    plan = gather("gemma-1.1-2b", gpu="h100", context=128)
    mlp, hidden, vocab, item = 16384, 2048, 256000, 2
    row = hidden * item
    # Weights, then activations: norm weights, the stream, what is written.
    # Of 8 heads, each 256 values and their largest score and total: 16 runs of at most 8 of the 127 old keys, and the
    # new key.
    splits = 17 * 8 * (256 + 2) * 4
    assert [
        (cost.kernel, cost.launches, cost.programs, cost.bytes_read, cost.bytes_written) for cost in plan.kernels
    ] == [
        ("qkv_projection", 18, 640, (2560 + 2) * row, 2560 * item),
        # The old keys and values, qkv, position, cos and sin; the splits, and the new key and value.
        ("decode_attention", 18, 8 * 129, 2 * 127 * 256 * item + 2560 * item + 4 + 256 * item, splits + 1024),
        ("combine_splits", 18, 64, splits + 4, 2048 * item),
        ("residual_linear", 18, 1024, 2048 * row + 2048 * item + row, row),
        ("gated_mlp", 18, 16384, (2 * mlp + 2) * row, mlp * item),
        ("residual_linear", 18, 2048, hidden * mlp * item + mlp * item + row, row),
        ("lm_head", 1, 64000, (vocab + 2) * row + 64 * 8, 64 * 8),
        # The head's keys, position, done, step, stop ids, limit and the embedding; the same but the ids and the limit,
        # the token, a slot of the ring and x.
        ("advance", 1, 1, 64 * 8 + 4 + 1 + 8 + 32 * 8 + 4 + row, 64 * 8 + 4 + 1 + 8 + 8 + 8 + row),
    ]


@pytest.mark.parametrize(("context", "splits"), [(1, 1), (2, 2), (9, 2), (10, 3), (1025, 129), (1026, 66), (4096, 129)])
def test_attention_moves_the_splits_that_a_context_has(context, splits):
    """The new key's, and at most 128 of the older keys, of 8 keys or a multiple."""
    plan = gather("gemma-1.1-2b", gpu="h100", context=context)
    attention, combine = (cost for cost in plan.kernels if cost.kernel in ("decode_attention", "combine_splits"))
    assert attention.bytes_written == splits * 8 * (256 + 2) * 4 + 1024
    assert combine.bytes_read == splits * 8 * (256 + 2) * 4 + 4


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_committed_plans_are_todays(name):
    committed = Path(__file__).parents[2] / "bench" / "results" / f"plan-h100-{name}.json"
    made = json.loads(json.dumps(gather(name, gpu="h100").to_dict()))
    assert json.loads(committed.read_text()) == made, f"gemma-runtime info --plan h100 --model {name} --json"


def test_the_floor_is_the_bytes_at_full_bandwidth_and_the_launches():
    plan = gather("gemma-3-1b", gpu="h100", context=128)
    assert plan.floor_us == pytest.approx(plan.bytes_moved / 3154e3 + 0.75 * plan.launches)
    assert f"{plan.floor_us:,.0f} us" in str(plan) and "158 launches" in str(plan)
    assert json.loads(json.dumps(plan.to_dict()))["kernels"][0]["kernel"] == "qkv_projection"


def test_a_sliding_layer_costs_its_window_and_rows_share_the_weights():
    short, long = (gather("gemma-3-270m", gpu="h100", context=context) for context in (512, 4096))
    grown = {(cost.kernel, cost.bytes_read) for cost in long.kernels}
    grown -= {(cost.kernel, cost.bytes_read) for cost in short.kernels}
    assert sorted(kernel for kernel, _ in grown) == ["combine_splits", "decode_attention"], (
        "only the three full layers' attention grows"
    )
    alone, eight, most = (gather("gemma-3-270m", gpu="h100", batch=batch) for batch in (1, 8, 64))
    # A model of more rows norms those of a looped product in a kernel of its own: in one of eight rows, those of all
    # layers' MLPs or QKV projections and of the head.
    layers = 18
    assert (eight.launches, most.launches) == (alone.launches + layers + 1, alone.launches + 2 * layers + 1)
    assert eight.bytes_moved < 1.1 * alone.bytes_moved
    (normed,) = {(cost.bytes_read, cost.bytes_written) for cost in eight.kernels if cost.kernel == "residual_norm"}
    # The residual and a branch with a norm each; what is normed, and the new residual, which the head does not keep.
    assert normed == (18 * 640 * 2, 16 * 640 * 2)


@pytest.mark.parametrize("target", TARGETS)
def test_dependent_launch_is_for_gpus_that_have_it(target):
    config = ModelConfig.from_hf(PUBLISHED["gemma-3-270m"])
    launches = step_launches(config, "bfloat16", TARGETS[target].gpu)
    has_it = TARGETS[target].gpu.capability >= 90
    assert all(launch.options.get("launch_pdl", False) == has_it for launch in launches)
    assert all(launch.arguments["USE_DEPENDENT_LAUNCH"] == has_it for launch in launches)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gpu": "v100"}, "gpu must be one of a100, h100, .* got 'v100'"),
        ({"batch": 65}, "max_batch must be at most 64, got 65"),
        ({"context": 0}, "context must be 1 to 32768, got 0"),
        ({"context": 32769}, "context must be 1 to 32768, got 32769"),
        ({"dtype": "int8"}, "dtype must be one of .* got 'int8'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        gather("gemma-3-270m", **{"gpu": "h100"} | changed)


def test_the_command_lines_help_names_every_gpu(capsys):
    with pytest.raises(SystemExit):
        main(["info", "--help"])
    help_text = capsys.readouterr().out
    assert all(name in help_text for name in TARGETS)


def test_any_config_can_be_planned():
    config = ModelConfig.from_hf(PUBLISHED["gemma-2-2b"] | {"num_hidden_layers": 2, "hidden_size": 84})
    assert make_plan(config, "small", "float32", H100, batch=3, context=7).launches == 14


@pytest.mark.newest_only
@pytest.mark.parametrize(("quantize", "share"), [("int8", 0.502), ("int4", 0.328)])
@pytest.mark.parametrize("batch", [1, 8])
def test_integers_are_counted_as_they_are(quantize, share, batch):
    """Of int4's columns each 32 take 18 bytes; embedding and head are int8."""
    options = {"gpu": "h100", "dtype": "bfloat16", "batch": batch}
    plan, values = (gather("gemma-1.1-2b", **options, quantize=q) for q in (quantize, None))
    assert plan.dtype == f"{quantize} and bfloat16"
    assert plan.bytes_needed <= plan.bytes_moved <= 1.03 * plan.bytes_needed
    weights = sum(cost.launches * cost.bytes_read for cost in plan.kernels if cost.kernel.startswith("gated_mlp"))
    of_values = sum(cost.launches * cost.bytes_read for cost in values.kernels if cost.kernel.startswith("gated_mlp"))
    assert weights / of_values == pytest.approx({"int8": 0.5, "int4": 9 / 32}[quantize], rel=0.01)
    if batch == 1:
        assert plan.bytes_needed / values.bytes_needed == pytest.approx(share, rel=0.01)
