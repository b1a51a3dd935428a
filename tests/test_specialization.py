"""One program for every number of rows: Triton compiles a kernel anew for integers that are 1 or a multiple of 16, and
a row must not find another program, with other bits, alone than among others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from runtime.bench.compiled import GPUS
from runtime.cost.launches import step_launches
from runtime.cost.machine_code import source
from runtime.kernels.argmax import new_argmax_keys
from runtime.kernels.launch import INTERPRETING, Launch, Recorder
from runtime.kernels.ops import RecordingOps
from runtime.model.config import ModelConfig
from runtime.model.published import PUBLISHED

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")
ROWS = range(1, 9)
DTYPES = ("float32", "bfloat16", "float16")
H100, TARGET = GPUS[90], GPUTarget("cuda", 90, 32)


def program(recorded_launch: Launch) -> tuple[str, str, str]:
    """What the compiler is given for a launch: equal where the program is one."""
    code, options = source(recorded_launch, TARGET)
    return recorded_launch.kernel.__name__, code.hash(), str(options)


def programs(launches: list[Launch]) -> list[tuple[str, str, str]]:
    return [program(each) for each in launches]


def launches(config: ModelConfig, dtype: str, rows: int, max_seq_len: int = 4096) -> list[Launch]:
    """Those of a decode step, of the norm alone and of the head that picks a prompt's first token."""

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=getattr(torch, dtype), device="meta")

    x, weight, table = meta(rows, config.hidden), meta(config.hidden), meta(config.vocab, config.hidden)
    token = torch.empty(rows, dtype=torch.int64, device="meta")
    others = RecordingOps(H100)
    others.rms_norm(x, x, weight, residual=x, eps=config.rms_norm_eps)
    keys = new_argmax_keys(rows, torch.device("meta"))
    others.lm_head_argmax(token, x, weight, table, eps=config.rms_norm_eps, argmax_keys=keys)
    return step_launches(config, dtype, H100, batch=rows, max_seq_len=max_seq_len) + others.launches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_number_of_rows_runs_the_same_programs(name, dtype):
    # Layers beyond the first of each kind launch nothing new.
    config = ModelConfig.from_hf(PUBLISHED[name] | {"num_hidden_layers": 6})
    alone = programs(launches(config, dtype, 1))
    assert len({kernel for kernel, *_ in alone}) == 9
    for rows in ROWS:
        assert programs(launches(config, dtype, rows)) == alone, rows


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_length_of_the_cache_runs_the_same_programs(name):
    config = ModelConfig.from_hf(PUBLISHED[name] | {"num_hidden_layers": 6})
    expected = {program(each) for each in launches(config, "bfloat16", 1)}
    for max_seq_len in (1, 16, 17, 4095, 8192):
        assert {program(each) for each in launches(config, "bfloat16", 1, max_seq_len)} == expected, max_seq_len


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_integer_at_run_time_is_specialised(name):
    """Those that a test does not think to change, too."""
    for each in launches(ModelConfig.from_hf(PUBLISHED[name] | {"num_hidden_layers": 6}), "bfloat16", 1):
        for parameter in each.kernel.params:
            if isinstance(each.arguments[parameter.name], int) and not parameter.is_constexpr:
                assert parameter.do_not_specialize, (each.kernel.__name__, parameter.name)


@triton.jit
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
    config = ModelConfig.from_hf(PUBLISHED["gemma-3-270m"] | {"num_hidden_layers": 6})
    for each in {program(each): each for each in launches(config, "bfloat16", 1)}.values():
        each.kernel.device_caches.clear()
        each.kernel.warmup(**each.arguments, **each.options, grid=each.grid)
        each.kernel.device_caches.clear()  # of a GPU that is not there
        code, options = source(each, TARGET)
        theirs = compiled.pop()
        assert theirs["signature"] == code.signature and theirs["constants"] == code.constants
        assert theirs["configs"] == [code.attrs]
        for option in ("num_warps", "enable_fp_fusion"):
            assert theirs[option] == options[option] == each.options[option]
