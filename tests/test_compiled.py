"""What the compiler makes of a decode step's kernels: every rule of runtime/check/compiled.py holds, and nothing is
worse than the committed results for this version of Triton. The rest shows that the rules can be broken."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from runtime.check import compiled, compiled_table
from runtime.check.assembly import Load, sass_loads, waits_in_a_loop
from runtime.check.compiled import GPUS, PUBLISHED, READS, Reads, inspect, load_faults, table
from runtime.cost.launches import chunk_launches, guess_launches, step_launches
from runtime.cost.machine_code import fingerprint, programs, source
from runtime.kernels.chunk_attention import chunk_attention_kernel
from runtime.kernels.group_attention import group_attention_kernel
from runtime.kernels.launch import INTERPRETING, Launch, let_next_kernel_start, wait_for_previous_kernel
from runtime.kernels.rotary import product
from runtime.kernels.store_keys import store_keys_kernel
from runtime.kernels.triton_function import jit, tl
from runtime.model.config import ModelConfig

VERSION = ".".join(triton.__version__.split(".")[:2])
RESULTS = Path(__file__).parents[1] / "bench" / "results" / f"compiled-triton-{VERSION}.json"
pytestmark = pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """Nothing that was compiled before counts."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("arch", "kernel", "shape", "block", "warps"))


# Compiled anew in every run: the newest GPU's, under one version. The measured GPU's are compared for all models.
ANEW = {"3.9": 120}


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=() if arch == ANEW.get(VERSION) else pytest.mark.sweep) for arch in GPUS]
)
def test_every_kernel_keeps_the_rules_and_its_registers(arch):
    """Those alone are compiled that have changed since the results were made."""
    if not RESULTS.exists():
        pytest.skip(f"no committed results for Triton {VERSION}")
    models = [*PUBLISHED] if arch == 90 else ["gemma-3-270m"]
    results = json.loads(RESULTS.read_text())["rows"]
    committed = {identity(row): row for row in results if row["arch"] == arch and {*models} & {*row["models"]}}
    rows = table(models, arch, () if arch == ANEW.get(VERSION) else results)
    for row in rows:
        assert "faults" not in row, row
    assert {identity(row) for row in rows} == committed.keys(), "other launches: make the results and the table anew"
    for row in rows:
        before = committed[identity(row)]
        assert row["registers"] <= before["registers"] and row["programs"] >= before["programs"], (row, before)


def test_what_is_known_is_made_anew_once_code_or_rules_are_others(monkeypatch):
    made = []
    monkeypatch.setattr(compiled, "inspect", lambda launch, arch: made.append(launch) or {"registers": 1})
    monkeypatch.setattr(compiled, "launches", lambda *given: [launch_of()])
    (row,) = table(["gemma-3-1b"], 90)
    assert table(["gemma-3-1b"], 90, [row | {"models": []}]) == [row] and len(made) == 1
    for name, other in (("launches", lambda *given: [launch_of(stride=2)]), ("_rules", lambda: "others")):
        with monkeypatch.context() as changed:
            changed.setattr(compiled, name, other)
            (anew,) = table(["gemma-3-1b"], 90, [row])
        assert anew["code"] != row["code"]
    assert len(made) == 3


KERNEL = """\
from __future__ import annotations

from runtime.kernels.triton_function import jit, tl

@jit
def copy_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(out_ptr + columns, tl.load(x_ptr + columns))
"""


def test_a_kernels_fingerprint_changes_with_all_that_it_is_compiled_from_and_with_nothing_else(tmp_path):
    def taken(text: str = KERNEL, x: str = "x_ptr", block: int = 128, arch: int = 90, **options: Any) -> str:
        path = tmp_path / f"kernel_{len([*tmp_path.iterdir()])}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tensor = torch.empty(128, device="meta")
        arguments = {"out_ptr": tensor, x: tensor, "BLOCK": block}
        launch = Launch(module.copy_kernel.made, (1,), arguments, {"num_warps": 4} | options)
        return fingerprint(launch, GPUTarget("cuda", arch, 32))

    plain = taken()
    assert taken("# A comment.\n\n" + KERNEL.replace("    tl.store", "    # Another.\n    tl.store")) == plain
    others = [
        taken(KERNEL.replace("columns))", "columns) + 1.0)")),
        taken(KERNEL.replace("x_ptr", "weight_ptr"), x="weight_ptr"),  # for its role
        taken(block=64),
        taken(arch=100),
        taken(num_warps=8),
        taken(enable_fp_fusion=False),
    ]
    assert len({plain, *others}) == 1 + len(others)


def test_a_chunk_of_scores_with_a_cap_keeps_the_rules_where_shared_memory_is_smallest():
    """The smallest model, which every run compiles, has none."""
    config = ModelConfig.from_hf(PUBLISHED["gemma-2-2b"] | {"num_hidden_layers": 1})
    rows = [
        inspect(launch, 86)
        for seq in (128, 1024)
        for launch in chunk_launches(config, "bfloat16", GPUS[86], seq)
        if launch.kernel is chunk_attention_kernel.made
    ]
    assert [(row["block"], row["programs"]) for row in rows] == [("16x32", 2), ("32x32", 1)]
    assert [row.get("faults") for row in rows] == [None, None]


def test_one_program_a_multiprocessor_is_allowed_where_the_table_says_so(monkeypatch):
    config = ModelConfig.from_hf(PUBLISHED["gemma-3-270m"] | {"num_hidden_layers": 1})
    (launch,) = (
        launch
        for launch in chunk_launches(config, "bfloat16", GPUS[86], 1024)
        if launch.kernel is chunk_attention_kernel.made
    )
    assert "faults" not in inspect(launch, 86)
    monkeypatch.setattr(compiled, "FILLS_ALONE", {("chunk_attention_kernel", "32x32"): (89, 120)})
    assert inspect(launch, 86)["faults"] == ["1 programs a multiprocessor, by shared memory"]


def test_the_table_is_made_of_the_committed_results(tmp_path, monkeypatch):
    monkeypatch.chdir(RESULTS.parents[2])
    files = sorted(str(path) for path in Path("bench/results").glob("compiled-triton-*.json"))
    assert files
    table_path = Path("bench/COMPILED.md")
    command = next(line for line in table_path.read_text().splitlines() if "--render" in line)
    assert f"--render {' '.join(files)} --out {table_path}" in command
    assert compiled.main(["--render", *files, "--out", str(tmp_path / "table")]) == 0
    made = (tmp_path / "table").read_text().replace(str(tmp_path / "table"), str(table_path))
    assert made == table_path.read_text()
    # A launch that one version alone has.
    results = [json.loads(Path(file).read_text()) for file in files]
    gone = results[0]["rows"][0]["kernel"]
    results[0]["rows"] = [row for row in results[0]["rows"] if row["kernel"] != gone]
    assert f"## {gone}\n" in compiled_table.render(results, files, str(table_path))


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared_bytes", "expected"),
    [
        (90, 16, 64, 0, (2, "registers")),
        (90, 16, 65, 0, (1, "registers")),  # 72 of 512 threads are more than half of 65536
        (80, 1, 153, 0, (12, "registers")),  # three warps a scheduler, though thirteen would fit all together
        (80, 4, 16, 81 * 1024, (2, "shared memory")),
        (80, 4, 16, 81 * 1024 + 1, (1, "shared memory")),
        (90, 4, 16, 113 * 1024, (2, "shared memory")),
        (80, 32, 32, 0, (2, "registers")),
        (86, 16, 16, 0, (3, "threads")),
        (86, 1, 16, 0, (16, "slots")),
        (89, 1, 16, 0, (24, "slots")),
        (100, 1, 16, 0, (32, "slots")),
        (120, 1, 16, 0, (24, "slots")),
    ],
)
def test_programs_of_a_multiprocessor(arch, warps, registers, shared_bytes, expected):
    assert programs(arch, warps, registers, shared_bytes) == expected


@jit
def dot_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    rows,
    STRIDE: tl.constexpr,
    X_FIRST: tl.constexpr,
    WEIGHT_LATE: tl.constexpr,
    START_LATE: tl.constexpr,
    USE_DEPENDENT_LAUNCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program multiplies a row of weights with one of activations, rightly or not.
    columns = tl.arange(0, BLOCK)
    if not START_LATE:
        let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    if X_FIRST:
        x = tl.load(x_ptr + columns)
    if not WEIGHT_LATE:
        weight = tl.load(weight_ptr + columns * STRIDE)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    if START_LATE:
        let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    if not X_FIRST:
        x = tl.load(x_ptr + columns)
    if WEIGHT_LATE:
        weight = tl.load(weight_ptr + columns * STRIDE)
    tl.store(out_ptr + rows, tl.sum(weight.to(tl.float32) * x.to(tl.float32), axis=0))


def launch_of(
    arch: int = 90,
    *,
    stride: int = 1,
    x_first: bool = False,
    weight_late: bool = False,
    start_late: bool = False,
    block: int = 2048,
    **options: Any,
) -> Launch:
    """One launch of dot_kernel."""
    tensor = torch.empty(block * stride, dtype=torch.bfloat16, device="meta")
    arguments = {"out_ptr": torch.empty(8, device="meta"), "x_ptr": tensor, "weight_ptr": tensor, "rows": 3}
    arguments |= {"STRIDE": stride, "X_FIRST": x_first, "WEIGHT_LATE": weight_late, "START_LATE": start_late}
    arguments |= {"USE_DEPENDENT_LAUNCH": arch >= 90, "BLOCK": block}
    return Launch(dot_kernel.made, (1,), arguments, {"num_warps": 4, "enable_fp_fusion": True} | options)


def inspected(arch: int = 90, *, holds_next: bool = False, **given: Any) -> dict[str, Any]:
    """Its row."""
    return inspect(launch_of(arch, **given), arch, Reads(("weight_ptr",), holds_next=holds_next))


@pytest.mark.parametrize("arch", GPUS)
def test_a_right_kernel_has_no_faults(arch):
    assert "faults" not in inspected(arch)


NEWEST = pytest.mark.parametrize("arch", [90, 100, 120])


@NEWEST
@pytest.mark.parametrize("late", [False, True])
def test_a_kernel_that_lets_the_next_start_too_early_is_caught(arch, late):
    faults = inspected(arch, start_late=late, holds_next=True).get("faults", [])
    assert faults == ([] if late else ["lets the next kernel start before its own wait"])


# What a step changes and kernels of it read ahead of their waits.
CHANGED_BY_A_STEP = {"position_ptr", "k_cache_ptr", "v_cache_ptr"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_the_last_step_changed_is_read_early_only_behind_a_kernel_that_held_the_next(name):
    """Else a kernel could start, and read, while the step before still writes."""
    launches = step_launches(ModelConfig.from_hf(PUBLISHED[name]), "bfloat16", GPUS[90])
    step = [READS[launch.kernel.__name__] for launch in launches]
    early = [bool(CHANGED_BY_A_STEP & {*reads.weights, *reads.other}) for reads in step]
    assert any(reads.holds_next for reads in step[: early.index(True)])


def arithmetic(launch: Launch, arch: int) -> Counter[str]:
    """The operations in floating point that a kernel is compiled to, and how often each stands in it: in PTX, since
    SASS has a loop once or twice."""
    target = GPUTarget("cuda", arch, 32)
    code, options = source(launch, target)
    ptx = triton.compile(code, target=target, options=options).asm["ptx"]
    return Counter(
        re.findall(r"^\s*(?:@\S+ )?((?!ld|st|mov|setp|selp)[a-z]\w*\.[\w.]*(?:f16|bf16|f32)[\w.]*)", ptx, re.M)
    )


@pytest.mark.parametrize(
    ("arch", "name", "dtype"),
    [(86, "gemma-3-270m", "bfloat16"), (90, "gemma-2-2b", "bfloat16"), (90, "gemma-3-270m", "float32")],
)
def test_guesses_keep_the_rules_and_have_the_arithmetic_of_plain_steps(arch, name, dtype):
    """In products they run the plain step's programs (test_specialization.py); in attention one of their own, for both
    launches, with the same operations."""
    config = ModelConfig.from_hf(PUBLISHED[name] | {"num_hidden_layers": 1})
    step = step_launches(config, dtype, GPUS[arch], batch=8)
    (plain,) = (launch for launch in step if launch.kernel is group_attention_kernel.made)
    own = [
        launch
        for launch in guess_launches(config, dtype, GPUS[arch], rows=8)
        if launch.kernel in (group_attention_kernel.made, store_keys_kernel.made)
    ]
    assert [launch.arguments.get("first_split") for launch in own] == [0, 1, None]
    faults = [inspect(launch, arch).get("faults") for launch in (plain, *own[1:])]
    assert faults[1] in (None, faults[0]) and faults[2] is None
    target = GPUTarget("cuda", arch, 32)
    codes = [source(launch, target)[0].hash() for launch in own[:2]]
    expected = arithmetic(plain, arch)
    assert codes[0] == codes[1] and arithmetic(own[0], arch) == expected
    assert any(name.startswith("fma.rn.f32") for name in expected) and len(expected) > 8


@NEWEST
def test_an_activation_above_the_wait_is_caught(arch):
    (fault,) = inspected(arch, x_first=True)["faults"]
    assert re.fullmatch(r"loaded before the wait: x_ptr, test_compiled.py:\d+", fault)  # in PTX, in SASS


@NEWEST
def test_weights_behind_the_wait_are_caught(arch):
    assert inspected(arch, weight_late=True)["faults"] == ["weight_ptr is not loaded before the wait"]


def test_a_wait_that_a_program_comes_to_again_is_caught():
    def in_assembly(*lines: str) -> str:
        return "\n".join(f"  /*{at:04x}*/ {line} ;" if line[0] != "." else line for at, line in enumerate(lines))

    once = in_assembly("ACQBULK", ".L_x_0:", "LDG.E.128 R0", "@P0 BRA `(.L_x_0)", "EXIT")
    again = in_assembly(".L_x_0:", "LDG.E.128 R0", "ACQBULK", "@P0 BRA `(.L_x_0)", "EXIT")
    assert not waits_in_a_loop("", once) and waits_in_a_loop("", again)
    ptx = "$L__BB0_1:\n\tgriddepcontrol.wait;\n\t@%p1 bra $L__BB0_1;\n\tret;\n"
    assert waits_in_a_loop(ptx, "") and not waits_in_a_loop(ptx.replace("@%p1 bra $L__BB0_1;", "nop;"), "")


def test_too_many_instructions_for_the_weights_are_caught(monkeypatch):
    launch = next(
        launch
        for launch in step_launches(ModelConfig.from_hf(PUBLISHED["gemma-3-270m"]), "bfloat16", GPUS[90], batch=8)
        if launch.kernel.__name__ == "gated_mlp_dot_kernel"
    )
    row = inspect(launch, 90)
    assert "faults" not in row and row["opcode"] and 0 < row["instructions"] <= compiled.MOST_INSTRUCTIONS
    monkeypatch.setattr(compiled, "MOST_INSTRUCTIONS", row["instructions"] - 1)
    assert inspect(launch, 90)["faults"] == [f"{row['instructions']} instructions for 16 bytes of weights"]


def test_what_the_compiler_of_sass_moves_past_the_wait_is_caught():
    reads, weight, x = Reads(("weight_ptr",)), ("kernel.py", 1), ("kernel.py", 2)
    in_ptx = [Load("weight_ptr", 16, weight, True), Load("x_ptr", 16, x, False)]

    def faults(weight_early: bool, x_early: bool) -> list[str]:
        return load_faults(reads, in_ptx, [Load(None, 16, weight, weight_early), Load(None, 16, x, x_early)], True)

    assert faults(True, False) == []
    assert faults(True, True) == ["loaded before the wait: kernel.py:2"]
    assert faults(False, False) == ["weight_ptr is not loaded before the wait"]


def test_a_load_behind_a_branch_is_before_the_wait_if_a_path_leads_there():
    lines = ["LDG.E.128 R0", "@P0 BRA `(.L_x_1)", "ACQBULK", "LDG.E.64 R0", "EXIT"]
    behind = ["LDG.E R0", "BRA `(.L_x_0)"]
    text = [f"  /*{at:04x}*/ {line} ;" for at, line in enumerate(lines + behind)]
    sass = "\n".join([*text[:2], ".L_x_0:", *text[2:5], ".L_x_1:", *text[5:]])
    assert [(load.bytes, load.early) for load in sass_loads(sass)] == [(16, True), (8, False), (4, True)]


def test_narrow_loads_are_caught():
    assert inspected(stride=3)["faults"] == ["weight_ptr is loaded [2] bytes at once"]


def test_spills_are_caught():
    (fault,) = inspected(block=16384, num_warps=4, maxnreg=32)["faults"]
    assert fault.startswith("spills: ")


def test_a_program_that_fills_a_multiprocessor_is_caught():
    row = inspected(block=65536, num_warps=16)
    assert row["programs"] == 1 and row["faults"] == ["1 programs a multiprocessor, by registers"]


def test_a_load_on_the_line_of_none_is_one_of_those_before_the_wait_or_one_too_many():
    reads, weight, start = Reads(("weight_ptr",)), ("kernel.py", 1), ("launch.py", 9)
    in_sass = [Load(None, 16, weight, True), Load(None, 16, start, True)]
    of_weight, of_x = Load("weight_ptr", 16, weight, True), Load("x_ptr", 16, ("kernel.py", 2), False)
    assert load_faults(reads, [of_weight, of_weight, of_x], in_sass, True) == []
    assert load_faults(reads, [of_weight, of_x], in_sass, True) == ["loaded before the wait: launch.py:9"]


@jit
def rotated_kernel(
    out_ptr, x_ptr, weight_ptr, PINNED: tl.constexpr, USE_DEPENDENT_LAUNCH: tl.constexpr, BLOCK: tl.constexpr
):
    # One program rounds two products and then their difference, as three tensor operations do, or lets them be fused.
    columns = tl.arange(0, BLOCK)
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    weight = tl.load(weight_ptr + columns).to(tl.float32)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    x = tl.load(x_ptr + columns).to(tl.float32)
    y = tl.load(x_ptr + BLOCK + columns).to(tl.float32)
    if PINNED:
        first, second = product(x, weight), product(y, weight)
    else:
        first, second = x * weight, y * weight
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    difference = first.to(dtype).to(tl.float32) - second.to(dtype).to(tl.float32)
    tl.store(out_ptr + columns, difference.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("arch", [80, 90, 120])
def test_a_product_fused_with_a_sum_is_caught(arch, dtype):
    """Found on a GPU, where keys then differed from Hugging Face's in a fifth of their elements."""

    def faults(pinned: bool) -> list[str]:
        x = torch.empty(4096, dtype=dtype, device="meta")
        arguments = {"out_ptr": x, "x_ptr": x, "weight_ptr": x, "PINNED": pinned, "BLOCK": 2048}
        arguments["USE_DEPENDENT_LAUNCH"] = arch >= 90
        options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
        options |= {"launch_pdl": True} if arch >= 90 else {}
        launch = Launch(rotated_kernel.made, (1,), arguments, options)
        return inspect(launch, arch, Reads(("weight_ptr",))).get("faults", [])

    assert faults(True) == []
    if (arch, dtype) != (80, torch.bfloat16):  # which adds in bf16 by multiplying with one, and multiplies in fp32
        (fault,) = faults(False)
        assert "products of 16 bits are fused with a sum" in fault


WORK = re.compile(
    r'tt\.reduce"|tt\.dot|warp_group_dot|arith\.(?:mulf|addf)|tt\.load|async_copy|local_load|arith\.truncf'
)


def work_of(launch: Launch, capability: int) -> list[str]:
    """Every load, product, sum and rounding of a kernel in order, with its layout, as Triton makes them for a GPU."""
    target = GPUTarget("cuda", capability, 32)
    code, options = source(launch, target)
    text = triton.compile(code, target=target, options=options).asm["ttgir"]
    layouts = dict(re.findall(r"(?m)^(#\w+) = (.*)$", text))
    found = []
    for line in text.splitlines():
        if WORK.search(line):
            line = re.sub(r"%[\w#:]+", "%", re.sub(r" loc\(.*\)$", "", line))  # without names and places
            found.append(re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), line).strip())
    return found


@pytest.mark.parametrize("batch", [1, 8])
def test_a_head_that_draws_or_reads_masks_computes_the_logits_of_one_that_does_not(batch):
    """They differ behind the roundings of the logits alone, where the greedy one has nothing but its argmax."""
    config = ModelConfig.from_hf(PUBLISHED["gemma-3-270m"])
    heads = [
        launch
        for kind in ({}, {"samples": True}, {"masks": True})
        for launch in step_launches(config, "bfloat16", GPUS[90], batch=batch, **kind)
        if launch.kernel.__name__.startswith("lm_head")
    ]
    greedy, drawn, masked = (work_of(launch, 90) for launch in heads)
    argmax = 2  # the greatest logit, and the lowest id of those
    assert any("arith.truncf" in line for line in greedy) and 'tt.reduce"' in greedy[-argmax]
    for other, more in ((drawn, 20), (masked, 0)):
        assert other[: len(greedy) - argmax] == greedy[:-argmax]
        assert len(other) > len(greedy) + more
    assert "faults" not in inspect(heads[-1], 90)
