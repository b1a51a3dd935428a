"""What every operation promises: all of the output is written, rows are independent, and a bad argument is refused
before anything is written."""

from __future__ import annotations

import functools
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import runtime.kernels as kernels
from runtime.check.chunk_cases import CASES as CHUNK_CASES
from runtime.check.comparison import assert_as_exact
from runtime.kernels import linear
from runtime.kernels.argmax import new_argmax_keys
from runtime.kernels.attention_splits import AttentionSplits
from runtime.kernels.block import Block
from runtime.kernels.checks import MAX_ROWS
from runtime.kernels.cpu import calls as cpu_calls
from runtime.kernels.launch import Gpu
from runtime.kernels.ops import RecordingOps, TorchOps

HIDDEN, INTERMEDIATE, VOCAB = 84, 51, 77
HEADS, KV_HEADS, HEAD_DIM, SLOTS, POSITIONS = 4, 2, 16, 12, 40
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
CPU = torch.device("cpu")


@dataclass
class Call:
    """An operation with good arguments by name; `outputs` are the tensors it writes, NaN or -1 beforehand."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    outputs: tuple[str, ...]

    def run(self, **changed: Any) -> None:
        self.function(**self.arguments | changed)


def splits(rows: int = 3, heads: int = HEADS, older: int = 3) -> AttentionSplits:
    """A workspace that nothing was written to, of as many splits as there can be."""
    made = AttentionSplits.allocate(rows, older, heads, HEAD_DIM, CPU)
    return AttentionSplits(*(tensor.fill_(torch.nan) for tensor in made))


def make_call(name: str, dtype: torch.dtype = torch.float32, rows: int = 3) -> Call:
    torch.manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    def unwritten(*shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype)

    residual = {"x": values(rows, HIDDEN), "norm_weight": values(HIDDEN), "eps": 1e-6}
    branch = {"branch": values(rows, HIDDEN), "branch_norm": values(HIDDEN)}
    if name == "rms_norm":
        return Call(
            kernels.rms_norm,
            {
                "x": values(rows, HIDDEN),
                "weight": values(HIDDEN),
                "eps": 1e-6,
                "residual": values(rows, HIDDEN),
                "out": unwritten(rows, HIDDEN),
            },
            ("out",),
        )
    if name == "qkv_projection":
        written = {"out": unwritten(rows, QKV), "residual_out": unwritten(rows, HIDDEN)}
        return Call(kernels.qkv_projection, residual | branch | written | {"weight": values(QKV, HIDDEN)}, (*written,))
    if name == "gated_mlp":
        written = {"out": unwritten(rows, INTERMEDIATE), "residual_out": unwritten(rows, HIDDEN)}
        gate_up = values(2 * INTERMEDIATE, HIDDEN)
        return Call(kernels.gated_mlp, residual | branch | written | {"gate_up": gate_up}, (*written,))
    if name == "residual_linear":
        inputs = {"x": values(rows, INTERMEDIATE), "weight": values(HIDDEN, INTERMEDIATE)}
        written = {"out": unwritten(rows, HIDDEN)}
        return Call(kernels.residual_linear, inputs | written | {"residual": values(rows, HIDDEN)}, (*written,))
    if name == "lm_head_argmax":
        written = {"token": torch.full((rows,), -1), "logits": unwritten(rows, VOCAB)}
        rest = {"table": values(VOCAB, HIDDEN), "softcap": 30.0, "argmax_keys": new_argmax_keys(rows, CPU)}
        return Call(kernels.lm_head_argmax, residual | branch | written | rest, (*written,))
    if name == "decode_attention":
        written = {"out": unwritten(rows, HEADS * HEAD_DIM)}
        rest = {
            "k_cache": values(rows, KV_HEADS, SLOTS, HEAD_DIM),
            "v_cache": values(rows, KV_HEADS, SLOTS, HEAD_DIM),
            "qkv": values(rows, QKV),
            "position": torch.arange(5, 5 + rows, dtype=torch.int32),
            "cos": values(POSITIONS, HEAD_DIM // 2),
            "sin": values(POSITIONS, HEAD_DIM // 2),
            "heads": HEADS,
            "scale": 0.2,
            "eps": 1e-6,
            "q_norm": values(HEAD_DIM),
            "k_norm": values(HEAD_DIM),
            "window": SLOTS,
            "splits": splits(rows),
        }
        return Call(kernels.decode_attention, written | rest, (*written,))
    assert name == "advance"
    written = {"x": unwritten(rows, HIDDEN)}
    rest = {
        "token": torch.arange(3, 3 + rows),
        "position": torch.arange(rows, dtype=torch.int32),
        "done": torch.zeros(rows, dtype=torch.bool),
        "emitted": torch.full((4, rows), -1),
        "step": torch.full((rows,), 6),
        "table": values(VOCAB, HIDDEN),
        "stop_ids": torch.tensor([[4, -1]]).repeat(rows, 1),
        "limit": torch.full((rows,), 100, dtype=torch.int32),
        "embed_scale": 9.0,
        "pad": 0,
    }
    return Call(kernels.advance, written | rest, (*written,))


every_operation = pytest.mark.parametrize("name", kernels.__all__)


@every_operation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_every_element_of_the_output_is_written(name, dtype):
    call = make_call(name, dtype)
    call.run()
    for output in call.outputs:
        written = call.arguments[output]
        assert not written.isnan().any() and (written.is_floating_point() or (written >= 0).all()), output


ROW_TENSORS = set("x branch residual_out out residual token logits qkv position done k_cache v_cache splits".split())


def row_of(value: torch.Tensor | AttentionSplits, row: int) -> torch.Tensor | AttentionSplits:
    """One row of a batch, as a view."""
    if isinstance(value, AttentionSplits):
        return AttentionSplits(*(tensor[row : row + 1] for tensor in value))
    return value[row : row + 1]


@pytest.mark.parametrize("name", [name for name in kernels.__all__ if name != "advance"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_row_among_eight_has_the_bits_of_a_row_alone(name, dtype):
    together, alone = make_call(name, dtype, rows=8), make_call(name, dtype, rows=8)
    together.run()
    for row in range(8):
        alone.run(**{key: row_of(alone.arguments[key], row) for key in ROW_TENSORS & alone.arguments.keys()})
    for output in together.outputs:
        assert torch.equal(together.arguments[output], alone.arguments[output]), output


GPU = Gpu("no GPU needed", 90, 132)


def without_data(call: Call) -> dict[str, Any]:
    """A call's arguments on the device "meta"."""

    def moved(value: Any) -> Any:
        if isinstance(value, AttentionSplits):
            return AttentionSplits(*map(moved, value))
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    return {key: moved(value) for key, value in call.arguments.items()}


@every_operation
@pytest.mark.parametrize("max_rows", [None, 1, 8, 64])
def test_kernels_take_their_arguments_by_name(name, max_rows):
    """All of them, and no others; a pointer is the field of its name, but for what a product reads of its rows once
    they are normed."""
    ops, arguments = RecordingOps(GPU, max_rows), without_data(make_call(name, torch.bfloat16, rows=max_rows or 3))
    if "norm_weight" in arguments:
        arguments["normed"] = torch.empty_like(arguments["x"])
    getattr(ops, name)(**arguments)
    arguments |= arguments["splits"]._asdict() if "splits" in arguments else {}
    assert ops.launches
    was_normed = False
    for launch in ops.launches:
        assert list(launch.arguments) == list(launch.kernel.arg_names)
        fields = {name: field for name, field in arguments.items() if f"{name}_ptr" in launch.arguments}
        if was_normed and "x" in fields:
            fields["x"] = arguments["normed"]
            fields |= dict.fromkeys({"norm_weight", "branch", "branch_norm", "residual_out"} & fields.keys())
        if launch.kernel.__name__ == "residual_norm_kernel":
            was_normed = True
            if name == "lm_head_argmax":  # which keeps no residual
                assert launch.arguments["residual_out_ptr"] is None
        for field, value in fields.items():
            assert field == "done" or launch.arguments[f"{field}_ptr"] is value, field  # done is passed as a view
    assert was_normed == ("norm_weight" in arguments and max_rows in (8, 64))


@pytest.mark.parametrize("name", kernels.__all__)
def test_a_function_says_which_operation_it_is(name):
    function = getattr(kernels, name)
    assert (function.__name__, function.__qualname__) == (name, name) and pickle.loads(
        pickle.dumps(function)
    ) is function
    assert next(iter(inspect.signature(function).parameters)) in ("out", "token") and "Args:" in function.__doc__


@pytest.mark.skipif(bool(cpu_calls.missing(torch.float32)), reason="no compiled kernels here")
@pytest.mark.parametrize("name", [name for name in kernels.__all__ if name != "rms_norm"])
def test_compiled_kernels_take_their_arguments_by_name(name):
    call = make_call(name)
    ((kernel, arguments),) = cpu_calls.captured(lambda ops: getattr(ops, name)(**call.arguments))
    names = kernel.py_func.__code__.co_varnames[2:]
    assert kernel.py_func.__name__ == name
    for parameter, value in zip(names, arguments, strict=False):
        given = call.arguments.get(parameter)
        if isinstance(given, torch.Tensor):
            assert value.ctypes.data == given.data_ptr(), parameter


# Per operation: its row operand, its weight.
OPERANDS = {
    "qkv_projection": ("x", "weight"),
    "gated_mlp": ("x", "gate_up"),
    "residual_linear": ("x", "weight"),
    "lm_head_argmax": ("x", "table"),
    "decode_attention": ("qkv", "cos"),
    "advance": ("x", "table"),
}


def tensors(call: Call) -> dict[str, torch.Tensor]:
    """Every tensor among a call's arguments, those of attention's splits by their own names."""
    found = {name: value for name, value in call.arguments.items() if isinstance(value, torch.Tensor)}
    for value in call.arguments.values():
        found |= value._asdict() if isinstance(value, AttentionSplits) else {}
    return found


def refused(call: Call, error: type[Exception], message: str, **changed: Any) -> None:
    before = {name: value.clone() for name, value in tensors(call).items()}
    with pytest.raises(error, match=message):
        call.run(**changed)
    for name, value in tensors(call).items():
        assert torch.equal(value.nan_to_num(7e7), before[name].nan_to_num(7e7)), f"{name} was written"


@pytest.mark.parametrize("name", OPERANDS)
def test_a_bad_operand_is_refused_before_anything_is_written(name):
    rows_name, weight_name = OPERANDS[name]
    call = make_call(name)
    good, weight = call.arguments[rows_name], call.arguments[weight_name]
    width = good.shape[1]
    refused(call, TypeError, rf"{rows_name}: expected a tensor .* got list", **{rows_name: good.tolist()})
    refused(
        call,
        TypeError,
        rf"{rows_name}: expected a floating-point dtype, got torch.int64",
        **{rows_name: good.nan_to_num().long()},
    )
    refused(
        call,
        ValueError,
        rf"{rows_name}: expected 2 dimensions .* got shape \(3, 1, {width}\)",
        **{rows_name: good[:, None]},
    )
    for rows in (0, MAX_ROWS + 1):
        message = rf"{rows_name}: expected 1 to {MAX_ROWS} rows, got {rows}"
        refused(call, ValueError, message, **{rows_name: torch.zeros(rows, width)})
    refused(call, ValueError, rf"{rows_name}: expected a contiguous tensor", **{rows_name: good.t().contiguous().t()})
    refused(
        call,
        TypeError,
        rf"{weight_name}: expected dtype torch.float32, got torch.float64",
        **{weight_name: weight.double()},
    )
    refused(
        call, ValueError, rf"{weight_name}: expected a contiguous tensor", **{weight_name: weight.t().contiguous().t()}
    )
    refused(call, ValueError, rf"{weight_name}: expected device cpu, got meta", **{weight_name: weight.to("meta")})
    refused(call, ValueError, rf"{weight_name}: expected", **{weight_name: weight[:, 1:].contiguous()})


@pytest.mark.parametrize(
    ("name", "changed", "error", "message"),
    [
        ("rms_norm", {"weight": torch.ones(HIDDEN + 1)}, ValueError, r"weight: expected shape \(84,\), got \(85,\)"),
        ("rms_norm", {"out": torch.ones(2, HIDDEN)}, ValueError, "out: expected shape"),
        ("rms_norm", {"x": torch.ones(3, HIDDEN).long()}, TypeError, "x: expected a floating-point dtype"),
        ("qkv_projection", {"out": torch.ones(3, QKV + 1)}, ValueError, "out: expected shape"),
        ("qkv_projection", {"branch_norm": None}, TypeError, "branch_norm: expected a tensor"),
        ("qkv_projection", {"residual_out": None}, TypeError, "residual_out: expected a tensor"),
        ("qkv_projection", {"branch": None}, ValueError, "expected None without a branch"),
        ("gated_mlp", {"gate_up": torch.ones(7, HIDDEN)}, ValueError, "expected an even number of outputs"),
        ("gated_mlp", {"branch": torch.ones(2, HIDDEN)}, ValueError, "branch: expected shape"),
        ("residual_linear", {"residual": torch.ones(3, HIDDEN).half()}, TypeError, "residual: expected dtype"),
        ("lm_head_argmax", {"token": torch.zeros(3, dtype=torch.int32)}, TypeError, "token: expected dtype"),
        ("lm_head_argmax", {"logits": torch.ones(3, VOCAB - 1)}, ValueError, "logits: expected shape"),
        ("lm_head_argmax", {"mask": torch.zeros(3, VOCAB // 32).int()}, ValueError, "mask: expected shape"),
        ("decode_attention", {"k_cache": torch.ones(2, KV_HEADS, SLOTS, HEAD_DIM)}, ValueError, "at least 3"),
        ("decode_attention", {"k_cache": torch.ones(3, KV_HEADS, HEAD_DIM)}, ValueError, "k_cache: expected"),
        ("decode_attention", {"v_cache": torch.ones(3, KV_HEADS, SLOTS + 1, HEAD_DIM)}, ValueError, "v_cache"),
        ("decode_attention", {"window": SLOTS + 1}, ValueError, "expected at least 13 slots, got 12"),
        ("decode_attention", {"window": None}, ValueError, "expected at least 40 slots, got 12"),
        ("decode_attention", {"position": torch.arange(3)}, TypeError, "position: expected dtype torch.int32"),
        ("decode_attention", {"heads": 3}, ValueError, "heads a multiple of kv_heads"),
        ("decode_attention", {"k_norm": None}, ValueError, "q_norm and k_norm: expected both or neither"),
        ("decode_attention", {"sin": torch.ones(POSITIONS - 1, HEAD_DIM // 2)}, ValueError, "sin: expected shape"),
        ("decode_attention", {"out": torch.ones(3, 65)}, ValueError, r"out: expected shape \(3, 64\), got \(3, 65\)"),
        ("decode_attention", {"out": torch.ones(2, 64)}, ValueError, "out: expected shape"),
        ("decode_attention", {"out": torch.ones(3, 64).double()}, TypeError, "out: expected dtype torch.float32"),
        ("decode_attention", {"out": torch.ones(64, 3).t()}, ValueError, "out: expected a contiguous tensor"),
        ("decode_attention", {"out": splits()}, TypeError, "out: expected a tensor .* got AttentionSplits"),
        ("residual_linear", {"residual": torch.ones(3, HIDDEN + 1)}, ValueError, "residual: expected shape"),
        ("advance", {"done": torch.zeros(3)}, TypeError, "done: expected dtype torch.bool"),
        ("advance", {"emitted": torch.zeros(4, 2, dtype=torch.int64)}, ValueError, "emitted: expected shape"),
        ("advance", {"step": torch.zeros(2, dtype=torch.int64)}, ValueError, "step: expected shape"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_together_are_refused(name, changed, error, message):
    refused(make_call(name), error, message, **changed)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (None, TypeError, "splits: expected AttentionSplits, got NoneType"),
        (torch.ones(3, 64), TypeError, "splits: expected AttentionSplits, got Tensor"),
        (splits(2), ValueError, r"splits.partial: expected shape \(3, 4, 64\), got \(2, 4, 64\)"),
        (splits(9), ValueError, "splits.partial: expected shape"),
        (splits(heads=2), ValueError, r"splits.partial: expected shape \(3, 4, 64\), got \(3, 4, 32\)"),
        (splits(older=0), ValueError, r"splits.partial: expected shape \(3, 2, 64\), got \(3, 1, 64\)"),
        (splits()._replace(partial=torch.ones(192)), ValueError, r"splits.partial: expected shape \(3, 2, 64\)"),
        (splits()._replace(partial=splits().partial.half()), TypeError, "splits.partial: expected dtype torch.float32"),
        (splits()._replace(stats=splits(heads=2).stats), ValueError, r"splits.stats: expected shape \(3, 4, 2, 4\)"),
        (splits(older=9)._replace(stats=splits().stats), ValueError, r"splits.stats: expected shape \(3, 10, 2, 4\)"),
        (splits()._replace(stats=splits().stats.half()), TypeError, "splits.stats: expected dtype torch.float32"),
    ],
    ids=str,
)  # fmt: skip
def test_kernels_refuse_attention_without_its_workspace(given, error, message):
    """Of all its kernels, before the first is launched. The plain form and the CPU's do without."""
    call, ops = make_call("decode_attention"), RecordingOps(GPU)
    call.arguments["splits"] = given
    with pytest.raises(error, match=message):
        ops.decode_attention(**without_data(call))
    assert not ops.launches


@pytest.mark.parametrize(
    ("max_rows", "heads", "kernel", "programs", "of_row"),
    [
        (1, HEADS, "decode_attention_kernel", HEADS, 1 + 3),
        (2, HEADS, "group_attention_kernel", 2 * KV_HEADS, 1 + 1),
        (64, HEADS, "group_attention_kernel", 64 * KV_HEADS, 1 + 1),
        (None, HEADS, "group_attention_kernel", 3 * KV_HEADS, 1 + 1),
        (8, 16 * KV_HEADS, "group_attention_kernel", 8 * KV_HEADS, 1 + 1),
        (8, 17 * KV_HEADS, "decode_attention_kernel", 8 * 17 * KV_HEADS, 1 + 3),  # more than a tile has
    ],
)
def test_query_heads_share_a_program_unless_a_model_has_one_row_alone(max_rows, heads, kernel, programs, of_row):
    """Programs for each split that 11 older keys may have: the new key's and, of blocks of 4 or 16, the older ones'."""
    rows = max_rows or 3
    call, ops = make_call("decode_attention", rows=rows), RecordingOps(GPU, max_rows)
    width = (heads + 2 * KV_HEADS) * HEAD_DIM
    given = {"heads": heads, "qkv": torch.zeros(rows, width), "out": torch.zeros(rows, heads * HEAD_DIM)}
    call.arguments |= given | {"splits": splits(rows, heads)}
    ops.decode_attention(**without_data(call))
    attention, combine = ops.launches
    assert attention.kernel.__name__ == kernel
    assert attention.grid == (programs, of_row) and combine.grid == (rows * heads, 1)
    for name in ("row_splits", "FEW_SPLITS", "SPLIT_KEYS", "MOST_SPLITS", "BLOCK_KEYS"):
        assert attention.arguments[name] == combine.arguments[name]


@pytest.mark.parametrize("name", ["qkv_projection", "gated_mlp", "lm_head_argmax"])
def test_rows_have_a_workspace_where_a_kernel_of_its_own_norms_them(name):
    call, ops = make_call(name, torch.bfloat16), RecordingOps(GPU, 8)
    with pytest.raises(TypeError, match=r"normed: expected a tensor of shape \(3, 84\), got NoneType"):
        getattr(ops, name)(**without_data(call))
    assert not ops.launches


def test_rows_that_are_held_are_eight_at_most():
    call, ops = make_call("residual_linear", torch.bfloat16, rows=9), RecordingOps(GPU, 64)
    with pytest.raises(ValueError, match=r"x: expected at most 8 rows for Block\(form='held', .*, got 9"):
        ops.residual_linear(**without_data(call), block=Block("held", 16, 1, 1))
    assert not ops.launches


def test_attention_needs_no_workspace_on_a_cpu():
    call, other = (make_call("decode_attention") for _ in range(2))
    call.run()
    other.run(splits=None)
    assert torch.equal(call.arguments["out"], other.arguments["out"])
    assert all(tensor.isnan().all() for tensor in call.arguments["splits"])


def test_the_new_residual_needs_a_buffer_of_its_own():
    for name in ("qkv_projection", "gated_mlp"):
        call = make_call(name)
        refused(call, ValueError, "residual_out: expected a buffer other than x", residual_out=call.arguments["x"])


def test_a_projection_may_write_over_its_residual():
    call = make_call("residual_linear")
    call.run()
    residual = call.arguments["residual"].clone()
    call.run(out=residual, residual=residual)
    assert torch.equal(residual, call.arguments["out"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_product_in_fp32_is_as_exact_as_the_librarys_in_16_bits(dtype, monkeypatch):
    monkeypatch.setattr(linear, "WIDENED_VALUES", 1 << 12)  # parts of 19 outputs, and a last one of 5
    x, weight = torch.randn(1, 45, 211).to(dtype), torch.randn(5 + 19 * 4, 211).to(dtype)
    product, truth = linear.linear_in_fp32(x, weight), x.double() @ weight.double().T
    assert product.dtype == dtype
    assert_as_exact(product, linear.linear_torch(x, weight), truth)


def test_advance_finishes_rows_and_prepares_the_next_step():
    call = make_call("advance")
    held = call.arguments
    held["done"][2] = True
    held["emitted"].fill_(-1)
    call.run()
    assert held["token"].tolist() == [3, 4, 0]  # row 1 emits the stop token, row 2 was done and pads
    assert held["done"].tolist() == [False, True, True]
    assert held["position"].tolist() == [1, 2, 2]
    assert held["step"].tolist() == [7, 7, 7]
    assert held["emitted"].tolist() == [[-1] * 3, [-1] * 3, [3, 4, 0], [-1] * 3]
    assert torch.equal(held["x"], held["table"][[3, 4, 0]] * 9.0)


ATTENDING = "chunk_attention window in a longer cache"


@pytest.mark.parametrize(
    ("case", "changed", "error", "message"),
    [
        ("residual_norm", {"residual_out": torch.ones(5, 84)}, ValueError, "expected None without a branch"),
        ("residual_norm, branch", {"branch": torch.ones(5, 83)}, ValueError, "branch: expected shape"),
        ("residual_norm, normed branch", {"branch_norm": torch.ones(83)}, ValueError, "branch_norm: expected shape"),
        ("gated_product", {"gate_up": torch.ones(3, 2201)}, ValueError, "an even number of columns"),
        ("gated_product", {"gate_up": torch.ones(3, 2202)}, ValueError, "out: expected shape"),
        ("dequantize 5x384, int4", {"out": torch.ones(5, 383)}, ValueError, "out: expected shape"),
        ("rotate_heads", {"chunk": torch.zeros(3)}, TypeError, "chunk: expected dtype torch.int64"),
        ("rotate_heads", {"q_norm": torch.ones(64)}, ValueError, "q_norm and k_norm: expected both or neither"),
        ("rotate_heads", {"heads": 5}, ValueError, "heads: expected a multiple of the 2 key heads, got 5"),
        ("rotate_heads", {"sin": torch.ones(3, 32)}, ValueError, "sin: expected shape"),
        (ATTENDING, {"out": torch.ones(24, 255)}, ValueError, r"out: expected shape \(24, 256\), got \(24, 255\)"),
        (ATTENDING, {"qkv": torch.ones(24, 511)}, ValueError, "qkv: expected shape"),
        (ATTENDING, {"k_cache": torch.ones(2, 20, 64)}, ValueError, "k_cache: expected .batch, kv_heads, slots"),
        (ATTENDING, {"v_cache": torch.ones(3, 2, 21, 64)}, ValueError, "v_cache: expected shape"),
        (ATTENDING, {"chunk": torch.zeros(4, dtype=torch.int64)}, ValueError, "chunk: expected shape"),
        ("store_chunk", {"qkv": torch.ones(16, 512).half()}, TypeError, "k_cache: expected dtype torch.float16"),
        ("store_chunk", {"heads": 8}, ValueError, "qkv: expected shape"),
    ],
)  # fmt: skip
def test_arguments_of_a_chunk_that_do_not_fit_together_are_refused(case, changed, error, message):
    call = CHUNK_CASES[case](torch.float32)
    with pytest.raises(error, match=message):
        call.run(functools.partial(call.call, TorchOps()), **changed_by(call, changed))


def changed_by(call, changed: dict[str, Any]) -> dict[str, Any]:
    """Takes what is changed out of a case's own arguments."""
    for name in changed:
        call.inputs.pop(name, None)
        call.outputs.pop(name, None)
    return changed
