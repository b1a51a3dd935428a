"""One program for every number of rows that a model may have, but for the tile that tensor cores pad them to: Triton
compiles a kernel anew for integers that are 1 or a multiple of 16, and a row must not find another program, with other
bits, alone than among others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from runtime.check.compiled import GPUS
from runtime.cost.launches import guess_launches, step_launches
from runtime.cost.machine_code import source
from runtime.kernels.argmax import new_argmax_keys
from runtime.kernels.launch import INTERPRETING, Launch, Recorder
from runtime.kernels.ops import RecordingOps
from runtime.kernels.triton_function import jit, tl
from runtime.model.config import ModelConfig
from runtime.model.published import PUBLISHED

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")
MOST_ROWS = (1, 8, 64)  # of a model: each has kernels of its own
DTYPES = ("float32", "bfloat16", "float16")
H100, TARGET = GPUS[90], GPUTarget("cuda", 90, 32)


def program(recorded_launch: Launch) -> tuple[str, str, str]:
    """What the compiler is given for a launch: equal where the program is one."""
    code, options = source(recorded_launch, TARGET)
    return recorded_launch.kernel.__name__, code.hash(), str(options)


def programs(launches: list[Launch]) -> list[tuple[str, str, str]]:
    return [program(each) for each in launches]


def launches(config: ModelConfig, dtype: str, most: int, rows: int, max_seq_len: int = 4096) -> list[Launch]:
    """Those of a decode step of some rows in a model of at most so many, of the norm alone and of the head that picks a
    prompt's first token."""

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=getattr(torch, dtype), device="meta")

    x, weight, table = meta(rows, config.hidden), meta(config.hidden), meta(config.vocab, config.hidden)
    token = torch.empty(rows, dtype=torch.int64, device="meta")
    others = RecordingOps(H100, most)
    others.rms_norm(x, x, weight, residual=x, eps=config.rms_norm_eps)
    keys = new_argmax_keys(rows, torch.device("meta"))
    others.lm_head_argmax(token, x, weight, table, eps=config.rms_norm_eps, argmax_keys=keys, normed=x)
    step = step_launches(config, dtype, H100, batch=most, rows=rows, max_seq_len=max_seq_len)
    return step + others.launches


def small(name: str) -> ModelConfig:
    """A published model with few layers: those beyond the first of each kind launch nothing new."""
    return ModelConfig.from_hf(PUBLISHED[name] | {"num_hidden_layers": 6})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_number_of_rows_up_to_eight_runs_the_same_programs(name, dtype):
    config = small(name)
    alone = programs(launches(config, dtype, 8, 1))
    kernels = {kernel for kernel, *_ in alone}
    assert "group_attention_kernel" in kernels and "decode_attention_kernel" not in kernels
    products = {kernel for kernel in kernels if kernel.startswith(("qkv", "gated", "residual_linear", "lm_head"))}
    assert len(products) == 4 and all(("_dot_" in kernel) == (dtype != "float32") for kernel in products)
    for rows in range(2, 9):
        assert programs(launches(config, dtype, 8, rows)) == alone, rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_but_the_tile_of_rows_changes_in_a_model_of_more(name, dtype):
    """Up to 8 rows, to 16, to 32 and to 64, and only in what multiplies on tensor cores."""
    config = small(name)
    tiles = {rows: launches(config, dtype, 64, rows) for tile in ((1, 8), (9, 16), (17, 32), (33, 64)) for rows in tile}
    eight = tiles.pop(8)
    assert programs(tiles.pop(1)) == programs(eight)
    for (rows, first), (_, last) in zip([*tiles.items()][::2], [*tiles.items()][1::2], strict=True):
        assert programs(first) == programs(last), rows
        for launch, before in zip(first, eight, strict=True):
            changed = "_dot_" in launch.kernel.__name__
            assert (program(launch) != program(before)) == changed, launch.kernel.__name__
            launch.arguments["N"] = before.arguments["N"] if changed else None
            assert not changed or program(launch) == program(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_guesses_run_the_programs_of_plain_steps(name, dtype):
    """But for attention's, which both of its launches share, and those that pick tokens and store keys."""
    config = small(name)
    plain, of_guesses = {*programs(launches(config, dtype, 8, 1))}, guess_launches(config, dtype, H100, rows=8)
    own = {program(each) for each in of_guesses} - plain
    assert [kernel for kernel, *_ in sorted(own)] == ["group_attention_kernel", "store_keys_kernel"]
    for rows in range(2, 8):
        assert programs(guess_launches(config, dtype, H100, rows=rows)) == programs(of_guesses), rows
    for each in of_guesses:
        for parameter in each.kernel.params:
            if isinstance(each.arguments[parameter.name], int) and not parameter.is_constexpr:
                assert parameter.do_not_specialize, (each.kernel.__name__, parameter.name)


@pytest.mark.parametrize("most", MOST_ROWS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_length_of_the_cache_runs_the_same_programs(name, most):
    config = small(name)
    expected = {program(each) for each in launches(config, "bfloat16", most, most)}
    for max_seq_len in (1, 16, 17, 4095, 8192):
        found = {program(each) for each in launches(config, "bfloat16", most, most, max_seq_len)}
        assert found == expected, max_seq_len


@pytest.mark.parametrize("most", MOST_ROWS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_no_integer_at_run_time_is_specialised(name, most):
    """Those that a test does not think to change, too."""
    for each in launches(small(name), "bfloat16", most, most):
        for parameter in each.kernel.params:
            if isinstance(each.arguments[parameter.name], int) and not parameter.is_constexpr:
                assert parameter.do_not_specialize, (each.kernel.__name__, parameter.name)


@jit
def careless_kernel(out_ptr, rows, USE_DEPENDENT_LAUNCH: tl.constexpr):
    # One program for 1 row, one for 2 to 8: what the tests above are to find.
    tl.store(out_ptr, rows)


@pytest.mark.parametrize(("rows", "same"), [(1, False), (2, True), (3, True), (8, True), (16, False)])
def test_a_specialised_number_of_rows_is_another_program(rows, same):
    out = torch.empty(8, dtype=torch.int32, device="meta")
    launch = Recorder(H100)
    for count in (5, rows):
        launch(careless_kernel, None, (1,), 4, out_ptr=out, rows=count)
    assert (program(launch.launches[0]) == program(launch.launches[1])) == same


class StandInDriver:
    """A GPU as far as Triton asks about one before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Triton's own launcher would compile; nothing is."""
    found: list[dict[str, Any]] = []

    def hook(**given: Any) -> bool:
        found.append(given["compile"])
        return True

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    monkeypatch.setattr(driver, "_active", StandInDriver())
    return found


def test_the_programs_are_those_of_tritons_own_launcher(compiled):
    of_all = [each for most in MOST_ROWS for each in launches(small("gemma-3-270m"), "bfloat16", most, most)]
    for each in {program(each): each for each in of_all}.values():
        each.kernel.device_caches.clear()
        each.kernel.warmup(**each.arguments, **each.options, grid=each.grid)
        each.kernel.device_caches.clear()  # of a GPU that is not there
        code, options = source(each, TARGET)
        theirs = compiled.pop()
        assert theirs["signature"] == code.signature and theirs["constants"] == code.constants
        assert theirs["configs"] == [code.attrs]
        for option in ("num_warps", "enable_fp_fusion"):
            assert theirs[option] == options[option] == each.options[option]
