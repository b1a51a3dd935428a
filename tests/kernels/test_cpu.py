"""The CPU's compiled kernels, held to their references by the comparisons that the Triton kernels are held to."""

from __future__ import annotations

import importlib
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.check.attention_cases import attention_case, pair_case
from runtime.check.backends import CompiledOps
from runtime.check.case import DEVICE
from runtime.check.catalogue import CASES
from runtime.check.compiled_sequences import SEQUENCES_OF, assert_bits_of_steps
from runtime.check.head_cases import head_case
from runtime.check.step_cases import advance_case, linear_case, projection_case
from runtime.kernels import cpu
from runtime.kernels.cpu import calls as cpu_calls
from runtime.kernels.launch import INTERPRETING

MISSING = cpu_calls.missing(torch.float32)
pytestmark = [
    pytest.mark.skipif(INTERPRETING or DEVICE != "cpu", reason="for tensors on a CPU, outside Triton's interpreter"),
    pytest.mark.skipif(bool(MISSING), reason=f"no compiled kernels here: {MISSING}"),
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
THREADS = (1, 7)  # attention splits its keys only where it has few heads for each
# The norm alone has no compiled form.
NAMES = [name for name in CASES if not name.startswith("rms_norm")]


def compiled(case, threads=None):
    """A case's call on compiled kernels."""
    return case.on(CompiledOps(threads))


def one_block_of_keys():
    """Attention over so few keys that PyTorch's has them in one block as well: its weights are rounded as these are,
    and held to that."""
    case = attention_case(tuple(range(29, 53)), 4, 2, 64, 40, torch.bfloat16)
    case.looser = {}
    return case


@pytest.mark.newest_only  # shapes of what is compared below with the oldest too
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{name}, {of}")
        for name in NAMES
        for of, dtype in DTYPES.items()
        if "16 bits" not in name or dtype.itemsize == 2
    ],
)
def test_a_compiled_kernel_computes_what_its_reference_does(name, dtype):
    case = CASES[name](dtype)
    for threads in THREADS:
        case.compare(case.run(compiled(case, threads)))


POSITIONS = (0, 5, 31, 32, 33, 70, 95, 600)
ROWS = 64
FULL = {
    "qkv_projection": lambda dtype: projection_case("qkv_projection", ROWS, 96, 200, dtype, branched=True),
    "gated_mlp": lambda dtype: projection_case("gated_mlp", ROWS, 96, 84, dtype, branched=True),
    "residual_linear": lambda dtype: linear_case(ROWS, 96, 200, dtype, with_residual=True),
    "lm_head_argmax": lambda dtype: head_case(ROWS, 96, 200, dtype, branched=True, softcap=30.0),
    "advance": lambda dtype: advance_case(ROWS, 84, dtype),
    "attention and its projection": lambda dtype: pair_case(
        attention_case(POSITIONS * 8, 6, 2, 80, 40, dtype, softcap=50.0), 37
    ),
}


@pytest.mark.newest_only  # as what compares compiled kernels with one another below
@dtypes
@pytest.mark.parametrize("kernel", FULL)
def test_a_row_has_the_same_bits_in_every_batch_and_on_any_number_of_threads(kernel, dtype):
    case = FULL[kernel](dtype)
    together = case.run(compiled(case))
    case.assert_right(together)
    counts = (*range(1, 18), 23, 31, 33, 64)  # a panel's rows, and more, are of every number
    for rows in [slice(count) for count in counts] + [slice(row, row + 1) for row in (3, 7, 63)]:
        alone = case.run(compiled(case, threads=(1, 2, 3, 7)[rows.stop % 4]), rows)
        for name, result in alone.items():
            expected = together[name]
            if name != "step":  # one for the whole batch
                expected = expected[:, rows] if name == "emitted" else expected[rows]
            assert torch.equal(result, expected), (name, rows)


def test_attention_takes_as_many_units_as_threads_can_share():
    """Rows times key heads: each is a chunk, of which there are so many."""
    case = attention_case((5,) * ROWS, 32, 32, 16, None, torch.float32)
    case.compare(case.run(compiled(case)))
    one_too_many = attention_case((5,) * ROWS, 33, 33, 16, None, torch.float32)
    with pytest.raises(ValueError, match="expected at most 62 rows of 33 key heads, got 64"):
        one_too_many.run(compiled(one_too_many))


def test_exp():
    exp = numba_exp()
    x = torch.linspace(-87, 88, 1_000_001)
    given = torch.from_numpy(exp(x.numpy()))
    expected = x.double().exp()
    unit = torch.nextafter(expected.float(), torch.tensor(torch.inf)) - expected.float()
    assert (given - expected).abs().le(unit.double()).all()
    ends = torch.tensor([-torch.inf, -100, 0, 100, torch.inf, torch.nan])
    expected = torch.tensor([0, 0, 1, torch.inf, torch.inf, torch.nan])
    assert torch.equal(torch.from_numpy(exp(ends.numpy())).nan_to_num(-1), expected.nan_to_num(-1))


def numba_exp():
    import numba

    from runtime.kernels.cpu import arithmetic

    @numba.njit
    def every(x):
        out = x.copy()
        for index in range(len(x)):
            out[index] = arithmetic.exp(x[index])
        return out

    return every


def test_the_greatest_is_found_as_integers():
    from runtime.kernels.cpu.next_token import greatest, place_of

    def found(*values):
        values = np.array(values, np.float32)
        highest = greatest(values)
        return highest, place_of(values, highest)

    assert found(-2, 0.0, -0.0, 0.0) == found(-2, -0.0, 0.0) == (0, 1)  # zeros tie
    assert found(-3, -1, -2, -1) == found(-np.inf, -1, -1) == (-1, 1)
    assert found(-1e-45, -1e-44) == (np.float32(-1e-45), 0)
    assert found(1, np.inf, 2) == (np.inf, 1)
    assert found(-np.inf, -np.inf) == (-np.inf, 0)
    for nan in (np.nan, -np.nan):  # the processor makes the latter
        assert np.isnan(found(1, nan, np.inf)[0])
    values = np.random.default_rng(0).standard_normal((200, 37)).astype(np.float32)
    for row in values:
        assert found(*row) == (row.max(), row.argmax())


def test_nothing_runs_while_a_step_is_captured():
    case = CASES["residual_linear 64x128"](torch.float32)

    def only_captured(**arguments):
        calls = cpu_calls.captured(lambda ops: case.call(ops, **arguments))
        assert len(calls) == 1

    assert case.run(only_captured)["out"].isnan().all()


FAULTS = {
    "w for 1 + w": (
        "(np.float32(1.0) + widen(weight[column], weight))",
        "widen(weight[column], weight)",
        "qkv_projection 37x84",
    ),
    "no epsilon": ("np.float32(len(x)) + eps)", "np.float32(len(x)) + eps * 1000)", "small norm"),
    "residual not rounded": (
        "residual[row, column] = rounded(residual[row, column] + added[row, column], x)",
        "residual[row, column] = residual[row, column] + added[row, column]",
        "qkv_projection 130x200, branch",
    ),
    "last columns left out": (
        "value = widen(weight[first + place, column], weight)",
        "value = np.float32(0.0)",
        "residual_linear 37x84",
    ),
    "sigmoid's GELU": (
        "exp(np.float32(-2.0) * inner)",
        "exp(np.float32(-1.702) * gate)",
        "gated_mlp 130x200",
    ),
    "activation not rounded": ("= rounded(activated, like) *", "= activated *", "gated_mlp 130x200"),
    "residual added before the rounding": (
        "narrow(before + rounded(sums[row, place], out), out)",
        "narrow(before + sums[row, place], out)",
        "residual_linear, residual",
    ),
    "logits not rounded": (
        "own_logits[place] = rounded(own_logits[place], x)",
        "own_logits[place] = own_logits[place]",
        "lm_head_argmax, ties of 16 bits",
    ),
    "ties to the highest": (
        "for place in range(len(values)):\n        if",
        "for place in range(len(values) - 1, -1, -1):\n        if",
        "lm_head_argmax, equal rows",
    ),
    "ties to the last chunk": (
        "if logit > max_logit[row] or math.isnan(logit):",
        "if logit >= max_logit[row] or math.isnan(logit):",
        "lm_head_argmax, equal rows",
    ),
    "NaN skipped": (
        "return np.float32(np.nan)",
        "return np.float32(0.0)",
        "lm_head_argmax, NaN",
    ),
    "NaN skipped between chunks": (
        " or math.isnan(logit):",
        ":",
        "lm_head_argmax, NaN",
    ),
    "infinity picked": (
        "if math.isfinite(max_logit[row]) else -1",
        "",
        "lm_head_argmax, overflow",
    ),
    "a row continues without a token": ("token[row] < 0 or ", "", "advance, none picked"),
    "a row passes its limit": (" or position[row] >= limit[row]", "", "advance"),
    "every row stops at the first one's tokens": ("== stop_ids[row, place]", "== stop_ids[0, place]", "advance"),
    "window too short": (
        "count = min(positions[row] + 1, window)",
        "count = min(positions[row] + 1, window - 1)",
        "decode_attention gqa, window, round the ring",
    ),
    "window too short, without splits": (
        "begin = max(0, end - window)",
        "begin = max(0, end - window + 1)",
        "decode_attention gqa, window, round the ring",
    ),
    "every key head takes the first one's new value": (
        "states[row, heads + kv_heads + kv_head :]",
        "states[row, heads + kv_heads :]",
        "decode_attention gqa, window, first block",
    ),
    "a split leaves the cache as it was": (
        "if end == count:",
        "if False:",
        "decode_attention gqa, window, first block",
    ),
    "halves rotated the other way": (
        "rounded(low * c, head) - rounded(high * s, head)",
        "rounded(low * c, head) + rounded(high * s, head)",
        "decode_attention mqa, head_dim 256, first block",
    ),
    "one rounding in the rotary embedding": (
        "rounded(rounded(low * c, head) - rounded(high * s, head), head)",
        "rounded(low * c - high * s, head)",
        "decode_attention mqa, head_dim 256, first block",
    ),
    "no cap": (
        "if softcap is None:\n            scores[key]",
        "if True:\n            scores[key]",
        "decode_attention softcap, window",
    ),
    "weights not rounded": (
        "rounded(scores[key] if softcap is None else scores[key] / total, like)",
        "scores[key] if softcap is None else scores[key] / total",
        "one block of keys",
    ),
    "wrapped end of the ring left out": (
        "start, slot = start + length, 0",
        "start, slot = end, 0",
        "decode_attention gqa, window, round the ring",
    ),
    "all heads weighted as the first": (
        "builder.add(builder.mul(row, keys), start)",
        "builder.add(builder.mul(I64(0), keys), start)",
        "decode_attention gqa, window, round the ring",
    ),
    "a done row continues": ("token[row] = pad", "position[row] += 1", "advance"),
}


def reached_from(module: str, folder: Path) -> set[str]:
    """A module of the kernels and those that import it, or one of these. Others stay as they are, and compiled; so do
    the threads that there are."""
    sources = {path.stem: path.read_text() for path in folder.glob("*.py") if path.stem not in ("calls", "team")}
    found = {module}
    while True:
        imports = [f"from {cpu.__name__}.{name} import " for name in found]
        more = {name for name, source in sources.items() if any(line in source for line in imports)} - found
        if not more:
            return found
        found |= more


@pytest.mark.newest_only  # about the comparisons, and numba
@pytest.mark.sweep
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_faults_are_refused(fault, monkeypatch, tmp_path):
    """And a copy without one is not: the same comparisons as above, on a copy of the kernels."""
    right, wrong, name = FAULTS[fault] if fault else ("", "", "residual_linear 37x84")
    importlib.import_module(f"{cpu.__name__}.operations")  # so that monkeypatch puts back every module
    folder = tmp_path / "cpu"
    shutil.copytree(cpu.__path__[0], folder, ignore=shutil.ignore_patterns("__pycache__"))
    changed = "vectors"  # which all others import
    if fault:
        (faulty,) = (path for path in folder.glob("*.py") if right in path.read_text())
        faulty.write_text(faulty.read_text().replace(right, wrong))
        changed = faulty.stem
    for module in reached_from(changed, folder):
        monkeypatch.delitem(sys.modules, f"{cpu.__name__}.{module}")
        monkeypatch.delattr(cpu, module)
    monkeypatch.setattr(cpu, "__path__", [str(folder)])
    if name == "small norm":
        case = projection_case("qkv_projection", 3, 64, 128, torch.bfloat16, branched=False)
        case.inputs["x"] *= 1e-3
    else:
        case = one_block_of_keys() if name == "one block of keys" else CASES[name](torch.bfloat16)
    with pytest.raises(AssertionError) if fault else nullcontext():
        for threads in THREADS:
            case.compare(case.run(compiled(case, threads)))


@pytest.mark.newest_only  # about the roundings
def test_weights_are_rounded_where_pytorch_rounds_them():
    case = one_block_of_keys()
    case.compare(case.run(compiled(case)))


@pytest.mark.newest_only
@dtypes
@pytest.mark.parametrize("name", SEQUENCES_OF)
def test_rows_of_a_sequence_have_the_bits_of_steps(name, dtype):
    assert_bits_of_steps(name, dtype)
