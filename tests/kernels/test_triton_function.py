"""Functions in Triton's language are Python's until Triton makes its own of them, once, with all that they refer to."""

from __future__ import annotations

import subprocess
import sys

import pytest
import triton

import runtime.kernels.ops  # noqa: F401  # which imports all of them
from runtime.kernels.launch import INTERPRETING, let_next_kernel_start
from runtime.kernels.pieces import piece_columns
from runtime.kernels.triton_function import Deferred, TritonFunction, cdiv, constexpr, jit, next_power_of_2, tl

HALF = constexpr(0.5)
FUNCTIONS = {
    value
    for path, module in sys.modules.items()
    if path.startswith("runtime.kernels.")
    for value in vars(module).values()
    if isinstance(value, TritonFunction)
}


@jit(do_not_specialize=["count"])
def halves_kernel(x_ptr, count, USE_DEPENDENT_LAUNCH: tl.constexpr, SIZE: tl.constexpr = 4):
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    at = tl.arange(0, SIZE)
    tl.store(x_ptr + at, tl.load(x_ptr + at, mask=at < count) * HALF, mask=at < count)


def test_a_kernel_is_made_once_and_knows_what_triton_made_of_others() -> None:
    made = halves_kernel.made
    assert made is halves_kernel.made
    assert isinstance(made, triton.runtime.KernelInterface)
    assert made.fn.__globals__["let_next_kernel_start"] is let_next_kernel_start.made
    assert made.fn.__globals__["HALF"].value == 0.5
    assert made.fn.__globals__["tl"] is triton.language
    assert (made.fn.__module__, made.fn.__qualname__) == (__name__, "halves_kernel")
    assert halves_kernel.__name__ == "halves_kernel"
    assert made.arg_names == ["x_ptr", "count", "USE_DEPENDENT_LAUNCH", "SIZE"]
    if not INTERPRETING:
        assert [parameter.do_not_specialize for parameter in made.params] == [False, True, False, False]
        assert [parameter.is_constexpr for parameter in made.params] == [False, False, True, True]
        assert made.params[3].default == 4


@pytest.mark.parametrize("function", sorted(FUNCTIONS, key=lambda each: each.__name__), ids=lambda each: each.__name__)
def test_no_stand_in_is_left_in_a_kernel(function: TritonFunction) -> None:
    known = function.made.fn.__globals__
    assert not [name for name, value in known.items() if isinstance(value, Deferred)]


def test_the_host_calls_functions_of_constants_and_no_others() -> None:
    assert [next_power_of_2(number) for number in range(1, 200)] == [
        triton.next_power_of_2(number) for number in range(1, 200)
    ]
    assert [cdiv(number, 7) for number in range(30)] == [triton.cdiv(number, 7) for number in range(30)]
    assert piece_columns(2304, 2048, 2048) == 256
    with pytest.raises(TypeError, match=r"halves_kernel is launched as halves_kernel\[grid\]\(\.\.\.\), not called"):
        halves_kernel(None, 1)


def test_importing_kernels_imports_no_triton() -> None:
    code = "import sys, runtime.kernels.ops, runtime.engine.engine; print('triton' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
