"""Faults planted in the kernels themselves: each is refused by the comparison that the healthy kernel passes."""

from __future__ import annotations

import functools
import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch
from triton.runtime.errors import InterpreterError

from runtime.check.attention_cases import attention_case
from runtime.check.case import Case, Results
from runtime.check.catalogue import CASES, FLOATS
from runtime.check.sequences import assert_bits_of_steps, sequence
from runtime.kernels.attention_splits import planned_splits, split_plan
from runtime.kernels.launch import INTERPRETING
from runtime.kernels.triton_function import TritonFunction, jit, tl

from .forms import FORMS, run_form
from .splits import FEW_SPLITS, limit_splits

pytestmark = [
    pytest.mark.newest_only,  # about the comparisons
    pytest.mark.skipif(not INTERPRETING, reason="takes a kernel apart: TRITON_INTERPRET=1 (tests/test_interpreter.py)"),
]


@jit
def exact_gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@jit
def halves_rounded_once(first, second, cos, sin, dtype: tl.constexpr):
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@jit
def halves_the_wrong_way(first, second, cos, sin, dtype: tl.constexpr):
    return (first * cos + second * sin).to(dtype), (second * cos - first * sin).to(dtype)


@jit
def scores_without_cap(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr, dtype: tl.constexpr):
    return (scores.to(dtype).to(tl.float32) * scale).to(dtype).to(tl.float32)


@jit
def scores_without_roundings(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr, dtype: tl.constexpr):
    scaled = scores * scale / softcap
    return softcap * (2.0 / (1.0 + tl.exp(-2.0 * scaled)) - 1.0)


@jit
def window_one_longer(
    position, window, FEW_SPLITS: tl.constexpr, SPLIT_KEYS: tl.constexpr, MOST_SPLITS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    return planned_splits(position, window + 1, FEW_SPLITS, SPLIT_KEYS, MOST_SPLITS, BLOCK_KEYS)


@jit
def last_split_dropped(
    position, window, FEW_SPLITS: tl.constexpr, SPLIT_KEYS: tl.constexpr, MOST_SPLITS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    older, size, splits = planned_splits(position, window, FEW_SPLITS, SPLIT_KEYS, MOST_SPLITS, BLOCK_KEYS)
    return older, size, splits - 1


@jit
def bits_without_the_sign(logit):
    return logit.to(tl.int32, bitcast=True)


@jit
def key_of_the_last(logits, ids, is_there):
    bits = logits.to(tl.int32, bitcast=True)
    bits = tl.where(is_there, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), -0x80000000)
    greatest = tl.max(bits, axis=0)
    last = tl.max(tl.where(bits == greatest[None, :], ids, -1), axis=0)
    return (greatest.to(tl.int64) << 32) | (0x7FFFFFFF - last).to(tl.int64)


@jit
def bits_that_skip_nan(logit):
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit
def norm_halves_without_mask(weight_ptr, half, HALF_DIM: tl.constexpr, HAS_QK_NORM: tl.constexpr):
    weight1 = 1.0 + tl.load(weight_ptr + half).to(tl.float32)
    return weight1, 1.0 + tl.load(weight_ptr + HALF_DIM + half).to(tl.float32)


@jit
def normed_halves_without_mask(first, second, weight_ptr, half, HALF_DIM: tl.constexpr, eps, dtype: tl.constexpr):
    return first, second * (1.0 + tl.load(weight_ptr + HALF_DIM + half).to(tl.float32))


@jit
def residual_without_mask(
    residual_out_ptr, x_ptr, branch_ptr, branch_norm, row, limit, eps, WIDTH: tl.constexpr, PIECE: tl.constexpr,
    HAS_BRANCH: tl.constexpr, STORE_RESIDUAL: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, PIECE)
    return (tl.where(columns < WIDTH, tl.load(x_ptr + row * WIDTH + columns).to(tl.float32), 0.0),)


ALL, HALF = [*FLOATS], ["fp16", "bf16"]
# The case, the device function, what takes its place, and the dtypes that it shows in.
PLANTED = [
    ("gated_mlp, far below zero", "gelu_tanh", exact_gelu, ALL),
    ("decode_attention gqa, window, window", "rotated_halves", halves_rounded_once, HALF),
    ("decode_attention gqa, window, window", "rotated_halves", halves_the_wrong_way, ALL),
    ("decode_attention softcap, round the ring", "finished_scores", scores_without_cap, ALL),
    ("decode_attention softcap, round the ring", "finished_scores", scores_without_roundings, HALF),
    ("decode_attention window in a longer cache, round the ring", "planned_splits", window_one_longer, ALL),
    ("decode_attention gqa, window, window", "planned_splits", last_split_dropped, ALL),
    ("lm_head_argmax, below zero", "ordered_bits", bits_without_the_sign, ALL),
    ("lm_head_argmax, equal rows", "greatest_key", key_of_the_last, ALL),
    # The interpreter rounds a NaN to bf16 without its sign.
    ("lm_head_argmax, NaN", "ordered_bits", bits_that_skip_nan, ["fp32", "fp16"]),
]


def homes(name: str) -> list[ModuleType]:
    """The modules of kernels that know a function by this name, the one that defines it first."""
    found = [module for module in kernel_modules() if name in vars(module)]
    return sorted(found, key=lambda module: vars(module)[name].__module__ != module.__name__)


def kernel_modules() -> list[ModuleType]:
    return [module for path, module in sys.modules.items() if path.startswith("runtime.kernels.")]


def plant(patch: pytest.MonkeyPatch, name: str, faulty: TritonFunction) -> None:
    values = [value for module in kernel_modules() for value in vars(module).values()]
    for module in homes(name):
        patch.setattr(module, name, faulty)
    for function in {value for value in values if isinstance(value, TritonFunction)}:
        if name in function.made.fn.__globals__:
            patch.setitem(function.made.fn.__globals__, name, faulty.made)


@functools.cache
def assert_accepted(case: str, dtype: torch.dtype, form: str = "", max_rows: int | None = None) -> None:
    """Compares what the healthy kernel makes of a case, once for all faults."""
    torch.manual_seed(0)
    call = CASES[case](dtype)
    call.compare(run_in(call, form) if form else call.run(call.kernel_of(max_rows)))
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("case", "name", "faulty", "dtype", "max_rows"),
    [
        pytest.param(*planted, FLOATS[dtype], max_rows, id=f"{planted[0]}: {planted[2].__name__}, {dtype}, {max_rows}")
        for *planted, dtypes in PLANTED
        for dtype in dtypes
        for max_rows in ([1, 8] if "attention" in planted[0] else [None])
    ],
)
def test_a_fault_in_a_kernel_is_refused(case, name, faulty, dtype, max_rows, monkeypatch):
    assert_accepted(case, dtype, max_rows=max_rows)
    call = CASES[case](dtype)
    plant(monkeypatch, name, faulty)
    given = call.run(call.kernel_of(max_rows))
    with pytest.raises(AssertionError):
        call.compare(given)


def rewritten(patch: pytest.MonkeyPatch, folder: Path, name: str, right: str, wrong: str):
    """A function from its module's text with a fault in it."""
    text = Path(homes(name)[0].__file__).read_text()
    start = text.index(f"def {name}(")
    end = text.find("\n\n\n", start)
    own = text[start : end if end >= 0 else None]
    assert own.count(right) == 1, right
    path = folder / "faulty.py"
    path.write_text(text.replace(own, own.replace(right, wrong)))
    spec = importlib.util.spec_from_file_location("faulty", path)
    faulty = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, "faulty", faulty)
    spec.loader.exec_module(faulty)
    return getattr(faulty, name)


# Forms of the product; what rms_norm does is its own.
SUM, LOOP, HELD, ALONE = "sum in pieces", "loop", "held", "rms_norm alone"
PADDED = "sum in a padded block"
NORMED, BRANCHED = "qkv_projection 64x128", "qkv_projection 64x128, branch"
# The case, the forms, the function, what stands in it, what takes its place, and the dtypes that it shows in. The sum
# form norms a row in normed_pieces and adds a branch in residual_pieces, as residual_norm_kernel does ahead of a loop.
IN_FORMS = {
    "w instead of 1 + w": (NORMED, [SUM, LOOP], "normed_pieces", "(1.0 + norm_weight[i])", "norm_weight[i]", ALL),
    "w instead of 1 + w, held": (
        NORMED,
        [HELD],
        "held_products",
        "(1.0 + gain[i].to(tl.float32))",
        "gain[i].to(tl.float32)",
        ALL,
    ),
    "Llama's order": (
        NORMED,
        [SUM, LOOP],
        "normed_pieces",
        "(pieces[i] * inverse * (1.0",
        "((pieces[i] * inverse).to(dtype).to(tl.float32) * (1.0",
        HALF,
    ),
    "Llama's order, held": (
        NORMED,
        [HELD],
        "held_products",
        "x[i].to(tl.float32) * inverse[None, :, None] * (1.0 + gain",
        "(x[i].to(tl.float32) * inverse[None, :, None]).to(dtype).to(tl.float32) * (1.0 + gain",
        HALF,
    ),
    "norm over the block": (
        "gated_mlp 37x84",
        [PADDED, LOOP],
        "normed_pieces",
        "sum_of(squares) / WIDTH",
        "sum_of(squares) / pieces[0].shape[0]",
        ALL,
    ),
    "a piece left out of the sums": (NORMED, [SUM], "sum_of", "total += pieces[i]\n", "pass\n", ALL),
    "a piece left out of the norm, held": (
        NORMED,
        [HELD],
        "sliced_mean_square",
        "squares += pieces[i].to(tl.float32) * pieces[i].to(tl.float32)",
        "pass",
        ALL,
    ),
    "branch not normalised": (
        BRANCHED,
        [SUM, LOOP],
        "residual_pieces",
        "normed_pieces(branch, branch_norm, eps, WIDTH, dtype)",
        "branch",
        ALL,
    ),
    "branch not normalised, held": (
        BRANCHED,
        [HELD],
        "held_products",
        "branch[i].to(tl.float32) * inverse[None, :, None] * (1.0 + branch_gain[i].to(tl.float32))",
        "branch[i].to(tl.float32)",
        ALL,
    ),
    "branch's w instead of 1 + w, held": (
        BRANCHED,
        [HELD],
        "held_products",
        "(1.0 + branch_gain[i].to(tl.float32))",
        "branch_gain[i].to(tl.float32)",
        ALL,
    ),
    "branch added before it is rounded": (
        BRANCHED,
        [SUM, LOOP],
        "residual_pieces",
        "branch_norm, eps, WIDTH, dtype)",
        "branch_norm, eps, WIDTH, tl.float32)",
        HALF,
    ),
    "branch added before it is rounded, held": (
        BRANCHED,
        [HELD],
        "held_products",
        "normed.to(dtype).to(tl.float32)).to(dtype),)",
        "normed).to(dtype),)",
        HALF,
    ),
    "residual not rounded": (
        BRANCHED,
        [SUM, LOOP],
        "residual_pieces",
        "(x[i] + branch[i]).to(dtype).to(tl.float32)",
        "x[i] + branch[i]",
        HALF,
    ),
    "residual not rounded, held": (
        BRANCHED,
        [HELD],
        "held_products",
        "normed.to(dtype).to(tl.float32)).to(dtype),)",
        "normed.to(dtype).to(tl.float32)),)",
        HALF,
    ),
    "norm of the old residual": (BRANCHED, [SUM, LOOP], "residual_pieces", "return residual", "return x", ALL),
    "norm of the old residual, held": (
        BRANCHED,
        [HELD],
        "held_products",
        "        normed_x = ()\n",
        "        normed_x, x = (), ()\n"
        "        for START in tl.static_range(0, WIDTH, PIECE):\n"
        "            k = sliced_columns(START, PIECE, SLICES)\n"
        "            x += (tl.load(x_ptr + row + k, mask=is_there, other=0.0),)\n",
        ALL,
    ),
    "new residual not written": (
        BRANCHED,
        [SUM, LOOP],
        "store_pieces",
        "mask=columns < limit",
        "mask=columns < 0",
        ALL,
    ),
    "new residual not written, held": (BRANCHED, [HELD], "held_products", "mask=n < stored", "mask=n < 0", ALL),
    "w instead of 1 + w, alone": (
        "rms_norm, residual",
        [ALONE],
        "normed_pieces",
        "(1.0 + norm_weight[i])",
        "norm_weight[i]",
        ALL,
    ),
    "Llama's order, alone": (
        "rms_norm, residual",
        [ALONE],
        "normed_pieces",
        "(pieces[i] * inverse * (1.0",
        "((pieces[i] * inverse).to(dtype).to(tl.float32) * (1.0",
        HALF,
    ),
    "a slice left out of a loop": (
        "residual_linear 64x128",
        [LOOP],
        "looped_products",
        "tl.sum(sums, axis=0)",
        "tl.sum(tl.where(s[:, None, None] > 0, sums, 0.0), axis=0)",
        ALL,
    ),
    "a slice left out of what is held": (
        "residual_linear 64x128",
        [HELD],
        "held_products",
        "return tl.sum(sums, axis=0)",
        "return tl.sum(tl.where(tl.arange(0, SLICES)[:, None, None] > 0, sums, 0.0), axis=0)",
        ALL,
    ),
    "a loop's first columns left out": (
        "residual_linear 64x128",
        [LOOP],
        "looped_products",
        "tl.range(0, WIDTH",
        "tl.range(STEP, WIDTH",
        ALL,
    ),
    "a held piece left out": (
        "residual_linear 64x128",
        [HELD],
        "held_products",
        "sums = add_products(sums, weight[i], x[i])",
        "sums = add_products(sums, weight[i], x[0])",
        ALL,
    ),
    "a loop's last columns not masked": (
        "residual_linear 37x84",
        [LOOP],
        "looped_products",
        "mask = column + start < WIDTH",
        "mask = column + start < WIDTH + 2",
        ALL,
    ),
    "rows of a loop not masked": (
        "residual_linear 64x128",
        [LOOP],
        "looped_products",
        "(n < rows)[None, :, None]",
        "(n >= 0)[None, :, None]",
        HALF,
    ),
    "rows that are held not masked": (NORMED, [HELD], "held_products", "n < rows", "n >= 0", HALF),
    "rows of the result not masked": (
        NORMED,
        [LOOP, HELD],
        "qkv_projection_dot_kernel",
        "(n < rows)[None, :]",
        "(n >= 0)[None, :]",
        HALF,
    ),
    "gate and up exchanged": (
        "gated_mlp 64x128",
        [LOOP, HELD],
        "gated_mlp_dot_kernel",
        "gate, up =",
        "up, gate =",
        ALL,
    ),
    "the residual added before rounding": (
        "residual_linear 64x128, residual",
        [SUM, PADDED],
        "residual_linear_kernel",
        "True).to(dtype)",
        "True)",
        HALF,
    ),
    "the residual added before rounding, on tensor cores": (
        "residual_linear 64x128, residual",
        [LOOP, HELD],
        "residual_linear_dot_kernel",
        ").to(dtype)  # [BLOCK",
        ")  # [BLOCK",
        HALF,
    ),
    "logits not rounded": (
        "lm_head_argmax, ties of 16 bits",
        [SUM],
        "lm_head_kernel",
        "summed_products(weight, scales, x, False).to(dtype)",
        "summed_products(weight, scales, x, False)",
        HALF,
    ),
    "logits not rounded, on tensor cores": (
        "lm_head_argmax, ties of 16 bits",
        [LOOP],
        "lm_head_dot_kernel",
        "logits = logits.to(dtype).to(tl.float32)",
        "logits = logits",
        HALF,
    ),
    "tokens past the last compared": (
        "lm_head_argmax, below zero",
        [SUM],
        "lm_head_kernel",
        "is_there = ids < OUTPUTS",
        "is_there = ids >= 0",
        ALL,
    ),
    **{
        what: ("lm_head_argmax, sampled", [SUM, LOOP], name, *texts, HALF)
        for what, name, *texts in (
            (
                "a round of the noise left out",
                "philox_words",
                "tl.static_range(_ROUNDS)",
                "tl.static_range(1, _ROUNDS)",
            ),
            ("noise of the neighbouring id", "philox_words", "ids & 3", "ids & 1"),
            ("a greedy row drawn", "scores_of", "inverse_temperature > 0.0", "inverse_temperature > -1.0"),
            ("noise that forgets the high half of its seed", "philox_words", "(seed >> 32)", "(seed & 0)"),
            (
                "noise that forgets its position",
                "philox_words",
                "zeros_like(c0) + position",
                "zeros_like(c0) + 0 * position",
            ),
            ("noise subtracted", "scores_of", ") - log_of", ") + log_of"),
        )
    },
    "another row's seed": (
        "lm_head_argmax, sampled",
        [SUM],
        "lm_head_kernel",
        "tl.load(seed_ptr + row)",
        "tl.load(seed_ptr)",
        ALL,
    ),
    "another row's position, on tensor cores": (
        "lm_head_argmax, sampled",
        [LOOP],
        "lm_head_dot_kernel",
        "tl.load(position_ptr + n_row)",
        "tl.load(position_ptr + 0 * n_row)",
        HALF,
    ),
    **{
        what: (case, [SUM, LOOP], "may_come", *texts, HALF)
        for what, case, *texts in (
            ("another row's mask", "lm_head_argmax, masked, softcap", "row * WORDS", "0 * row * WORDS"),
            ("another bit of the mask", "lm_head_argmax, masked, softcap", "(ids & 31)", "(ids & 15)"),
            ("a NaN masked away", "lm_head_argmax, NaN, masked", ' | ~(scores < float("inf"))', ""),
        )
    },
    "the workspace not cleared": (
        "lm_head_argmax, equal rows",
        [SUM, LOOP],
        "picked",
        "tl.store(slots, ",
        "tl.ravel(",
        HALF,
    ),
}


def run_in(call: Case, form: str) -> Results:
    return call.run(call.kernel) if form == ALONE else run_form(call, FORMS[form])


@pytest.mark.parametrize(
    ("fault", "form", "dtype"),
    [
        pytest.param(fault, form, FLOATS[dtype], id=f"{fault}: {form}, {dtype}")
        for fault, (_, forms, *_, dtypes) in IN_FORMS.items()
        for form in forms
        for dtype in dtypes
        # Tensor cores are for 16 bits; and of those one is enough, since a rounding shows in both.
        if dtype == "bf16" or (dtype == "fp32" and form in (SUM, PADDED, ALONE))
    ],
)
def test_a_fault_written_into_a_form_is_refused(fault, form, dtype, monkeypatch, tmp_path):
    is_outside = fault.endswith("not masked")  # which leaves the arguments
    case, _, *texts, _ = IN_FORMS[fault]
    assert_accepted(case, dtype, form)
    call = CASES[case](dtype)
    plant(monkeypatch, texts[0], rewritten(monkeypatch, tmp_path, *texts))
    with pytest.raises(InterpreterError if is_outside else AssertionError, match="OutOfBounds" if is_outside else None):
        call.compare(run_in(call, form))


OF_THOSE_THERE = 'weight = tl.where(highest > float("-inf"), 1.0, 0.0)'
COMBINED = {
    "splits combined without rescaling": ("weight = tl.exp(highest - most)", OF_THOSE_THERE),
    "the new key combined without rescaling": ("new_weight = tl.exp(new_highest - most)", "new_weight = 1.0"),
    "splits averaged": ("tl.sum(tl.sum(weight * total, axis=1), axis=0)", "tl.sum(tl.sum(weight, axis=1), axis=0)"),
    "the new key left out": ("sums = new_weight * new_partial + tl.sum", "sums = tl.sum"),
    "the new key's weight left out": ("total = new_weight * new_total + ", "total = "),
    "the first older split taken for the new key": ("new + 1, 0, splits", "new, 0, splits"),
}
# Of rows that have more splits than are combined at once.
COMBINED_LATER = {
    "later splits left out": ("range(FEW_SPLITS, splits, FEW_SPLITS)", "range(splits, splits, FEW_SPLITS)"),
    "the last splits left out": ("range(FEW_SPLITS, splits, FEW_SPLITS)", "range(FEW_SPLITS, splits - 1, FEW_SPLITS)"),
    "the first splits taken again": ("new + 1, first, splits", "new + 1, 0, splits"),
    "later splits combined without rescaling": ("weight = tl.exp(highest - raised)", OF_THOSE_THERE),
    "earlier splits not rescaled": ("shrink * sums", "sums"),
    "earlier splits' weights not rescaled": ("shrink * total", "total"),
    "rescaled from the first splits each time": ("most = raised", "pass"),
    "later splits averaged": ("weight * more", "weight"),
}
BY_HEAD = {
    "new key not written": ("tl.store(k_ptr + new_at + half, k1.to(dtype), mask=once)", "pass"),
    "new value not written": ("tl.store(v_ptr + new_at + dim, v1, mask=in_half)", "pass"),
    "new key a slot late": ("(position % slots)", "((position + 1) % slots)"),
    "half of the new key's score": ("q1 * k1 + q2 * k2, axis=2), scale", "q1 * k1, axis=2), scale"),
    "another head's new value": ("(HEADS + KV_HEADS + kv_head)", "(HEADS + KV_HEADS)"),
    "the new key's weight missing": ("stats_at + HEADS, 1.0", "stats_at + HEADS, 0.0"),
    "first key left out": ("begin = position - older +", "begin = position - older + 1 +"),
    "the last block not masked": ("start + ahead < count", "start + ahead >= 0"),
    "an earlier block not rescaled": ("acc1 = acc1 * shrink", "acc1 = acc1"),
    "an earlier block's weights not rescaled": ("total = total * shrink", "total = total"),
    "later blocks not read": ("if start + BLOCK_KEYS < count:", "if start + BLOCK_KEYS < 0:"),
    "a later block reads past the ring": (
        "slot = tl.where(slot < slots, slot, slot - slots)\n                    left",
        "slot = tl.minimum(slot, slots - 1)\n                    left",
    ),
    "query heads dealt out in turn": ("kv_head = head // GROUP", "kv_head = head % KV_HEADS"),
}
BY_GROUP = {
    "new key not written": ("tl.store(k_at + new_at + half[None, :], new_k1, mask=in_half[None, :])", "pass"),
    "new value not written": ("tl.store(v_at + new_at + dim, new_v, mask=dim < HEAD_DIM)", "pass"),
    "new key a slot late": ("(position % slots)", "((position + 1) % slots)"),
    "half of the new key's score": ("scores += tl.sum(q2", "tl.sum(q2"),
    "another head's new value": ("(HEADS + KV_HEADS + kv_head)", "(HEADS + KV_HEADS)"),
    "the new key's value left out": ("acc += new_v", "acc += 0.0 * new_v"),
    "the new key's weight missing": ("total += 1.0", "total += 0.0"),
    "the new key's program reads older ones": ("tl.where(index == 0, end, begin)", "tl.maximum(begin, 0)"),
    "first key left out": ("begin = position - older +", "begin = position - older + 1 +"),
    "the last block not masked": ('tl.where(valid[None, :], scores, float("-inf"))', "scores"),
    "an earlier block not rescaled": ("acc * shrink[:, None]", "acc"),
    "an earlier block's weights not rescaled": ("total = total * shrink", "total = total"),
    "later blocks not read": ("if start + BLOCK_KEYS < end:", "if start + BLOCK_KEYS < 0:"),
    "query heads dealt out in turn": ("heads = kv_head * GROUP + group", "heads = group * KV_HEADS + kv_head"),
}
RING = ("tl.where(slot < slots, slot, slot - slots)", "tl.minimum(slot, slots - 1)")
# By the most rows of a model, which decides between attention's kernels: faults in what they call, and in themselves.
IN_ATTENTION: dict[int, dict[str, tuple[str, str, str]]] = {
    1: {
        **{fault: ("decode_attention_kernel", *texts) for fault, texts in BY_HEAD.items()},
        "a block reads past the ring": ("cached_keys", *RING),
        "a head's norm over its padding": ("rotated_head", "/ HEAD_DIM + eps", "/ (2 * half.shape[2]) + eps"),
        "a head's norm with w": ("norm_halves", "1.0 + weight1", "weight1"),
        "the second half not normed": ("rotated_head", "(second * inverse * weight2)", "second"),
    },
    8: {
        **{fault: ("combine_splits_kernel", *texts) for fault, texts in COMBINED.items()},
        "unused splits combined": ("loaded_splits", "at < splits", "at >= 0"),
        "each head combined with the first one's statistics": ("loaded_splits", "(2 * HEADS) + head", "(2 * HEADS)"),
        **{fault: ("group_attention_kernel", *texts) for fault, texts in BY_GROUP.items()},
        "a block reads past the ring": ("cached_block", "(keys % slots)", "tl.minimum(keys, slots - 1)"),
        "a head's norm over its padding": ("normed_halves", "/ (2 * HALF_DIM)", "/ (2 * half.shape[0])"),
        "a head's norm with w": ("normed_halves", "first_weight = 1.0 +", "first_weight ="),
        "the second half not normed": ("normed_halves", "(second * inverse * second_weight)", "second"),
    },
}


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize(
    ("max_rows", "fault", "dtype"),
    [
        pytest.param(max_rows, fault, FLOATS[of], id=f"{fault or 'none'}, {max_rows}-{of}")
        for max_rows, faults in IN_ATTENTION.items()
        for fault in (None, *faults)
        for of in ("fp32", "bf16")
        if of == "bf16" or not fault  # the comparison in fp32 is the stricter one
    ],
)
def test_a_fault_written_into_attention_is_refused(max_rows, fault, dtype, monkeypatch, tmp_path):
    """And attention without one is not, over splits of one block and of two, in rings that have gone round."""
    keys = split_plan(dtype, max_rows, 2)[1]
    window = FEW_SPLITS * keys + 6
    call = attention_case((2, window + 3, 3 * window - 2), 4, 2, 48, window, dtype, qk_norm=True)
    if fault:
        name, right, wrong = IN_ATTENTION[max_rows][fault]
        plant(monkeypatch, name, rewritten(monkeypatch, tmp_path, name, right, wrong))
    with pytest.raises(AssertionError) if fault else nullcontext():
        call.compare(call.run(call.kernel_of(max_rows)))


@pytest.mark.parametrize("fault", [None, *COMBINED_LATER])
def test_a_fault_in_combining_many_splits_is_refused(fault, monkeypatch, tmp_path):
    """Of rows of five, nine and ten splits, four of which are combined at once."""
    limit_splits(monkeypatch, 4, keys=16, most=10)
    call = attention_case((80, 130, 160), 2, 1, 32, None, torch.float32, spread=2.0)
    if fault:
        texts = COMBINED_LATER[fault]
        plant(monkeypatch, "combine_splits_kernel", rewritten(monkeypatch, tmp_path, "combine_splits_kernel", *texts))
    with pytest.raises(AssertionError) if fault else nullcontext():
        call.compare(call.run(call.kernel_of(8)))


# The function, what stands in it, and what takes its place.
IN_SEQUENCES = {
    "a row sees the key of a later one": ("sequence_block", "(keys - first_new)[", "(keys - first_new + 1)["),
    "stale slots in place of new keys": (
        "group_attention_kernel",
        "first_new = tl.load(position_ptr)",
        "first_new = position",
    ),
    "the first new key left out": ("sequence_block", "(keys >= first_new)", "(keys > first_new)"),
    "another head's new keys": ("group_attention_kernel", "new_keys_ptr + kv_head * HEAD_DIM", "new_keys_ptr"),
    "another sequence": ("group_attention_kernel", "(tl.load(row_ptr) * KV_HEADS", "(tl.load(row_ptr) * 0"),
    "all new keys in one place": ("group_attention_kernel", "row * (KV_HEADS * HEAD_DIM)", "0"),
    "a rejected row stored": ("store_keys_kernel", "place < tl.load(count_ptr)", "place <= tl.load(count_ptr)"),
    "no row stored": ("store_keys_kernel", "place < tl.load(count_ptr)", "place < 0"),
    "stored a slot late": ("store_keys_kernel", "+ place) % slots", "+ place + 1) % slots"),
    "stored for another sequence": ("store_keys_kernel", "tl.load(row_ptr) * kv_heads", "0 * kv_heads"),
    "one head stored": ("store_keys_kernel", "head < kv_heads", "head < 1"),
}


@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("fault", [None, *IN_SEQUENCES])
def test_a_fault_in_rows_of_a_sequence_is_refused(fault, monkeypatch, tmp_path):
    given = sequence("before the window is full", torch.bfloat16)
    if fault:
        name, *texts = IN_SEQUENCES[fault]
        plant(monkeypatch, name, rewritten(monkeypatch, tmp_path, name, *texts))
    with pytest.raises(AssertionError) if fault else nullcontext():
        assert_bits_of_steps(given)


NORM_OF_HEADS = "decode_attention q/k norm, head_dim 80, window"


@pytest.mark.parametrize(
    ("case", "max_rows", "name", "faulty", "message"),
    [
        (
            NORM_OF_HEADS,
            1,
            "norm_halves",
            norm_halves_without_mask,
            "decode_attention_kernel: load 48 bytes past the end of q_norm_ptr",
        ),
        (
            NORM_OF_HEADS,
            8,
            "normed_halves",
            normed_halves_without_mask,
            "group_attention_kernel: load 48 bytes past the end of q_norm_ptr",
        ),
        (
            "qkv_projection 37x84",
            None,
            "residual_pieces",
            residual_without_mask,
            "qkv_projection_kernel: load 88 bytes past the end of x_ptr",
        ),
    ],
    ids=["norm of heads", "norm of a group's heads", "residual stream"],
)
def test_a_mask_left_out_of_a_kernel_is_caught(case, max_rows, name, faulty, message, monkeypatch):
    call = CASES[case](torch.bfloat16)
    plant(monkeypatch, name, faulty)
    with pytest.raises(InterpreterError, match=message):
        call.run(call.kernel_of(max_rows))
