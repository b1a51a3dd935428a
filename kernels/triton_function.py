"""Functions in Triton's language. Triton is imported only when the first of them is launched or compiled: compiled CPU
kernels and PyTorch do not need it, and the import takes 0.2 s and 75 MB.

Until then they are Python functions that nobody calls. Triton's functions are made from copies of them, whose globals
hold Triton's own objects in place of the stand-ins here.
"""

from __future__ import annotations

import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any, overload


class Deferred(ABC):
    """A stand-in for an object of Triton's in a module of kernels."""

    @property
    @abstractmethod
    def made(self) -> Any:
        """Triton's object, made or imported on the first use."""


class _Imported(Deferred):
    """A module of Triton's, or a member of one."""

    def __init__(self, module: str, name: str | None = None) -> None:
        self._module, self._name = module, name

    @functools.cached_property
    def made(self) -> Any:
        module = importlib.import_module(self._module)
        return module if self._name is None else getattr(module, self._name)


if TYPE_CHECKING:
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
else:
    tl = _Imported("triton.language")
    gdc_launch_dependents = _Imported("triton.language.extra.cuda", "gdc_launch_dependents")
    gdc_wait = _Imported("triton.language.extra.cuda", "gdc_wait")


class constexpr(Deferred):  # as Triton has it
    """A module's constant, for kernels to read."""

    def __init__(self, value: Any) -> None:
        self.value = value

    @functools.cached_property
    def made(self) -> Any:
        return tl.made.constexpr(self.value)


class TritonFunction(Deferred):
    """A kernel, or a function that kernels call.

    Args:
        function: in Triton's language, defined at module level.
        decorator: the name of Triton's decorator for it.
        options: of that decorator.
    """

    def __init__(self, function: Callable[..., Any], decorator: str, options: dict[str, Any]) -> None:
        functools.update_wrapper(self, function)
        self._decorator, self._options = decorator, options

    @functools.cached_property
    def made(self) -> Any:
        import triton

        own: Any = self.__wrapped__  # type: ignore[attr-defined]
        names = {"tl", *own.__code__.co_names}
        known = {name: value for name, value in own.__globals__.items() if name in names}
        known |= {name: value.made for name, value in known.items() if isinstance(value, Deferred)}
        copy = FunctionType(own.__code__, {"tl": tl.made, **known}, own.__name__, own.__defaults__)
        for attribute in ("__module__", "__qualname__", "__doc__", "__annotations__", "__kwdefaults__"):
            setattr(copy, attribute, getattr(own, attribute))
        return getattr(triton, self._decorator)(copy, **self._options)

    def __getitem__(self, grid: Any) -> Any:
        return self.made[grid]

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Calls a constexpr_function on the host.

        Raises:
            TypeError: it is not a constexpr_function.
        """
        function: Any = self.__wrapped__  # type: ignore[attr-defined]
        if self._decorator != "constexpr_function":
            raise TypeError(f"{function.__name__} is launched as {function.__name__}[grid](...), not called")
        return function(*arguments, **named)


@overload
def jit(function: Callable[..., Any]) -> TritonFunction: ...
@overload
def jit(*, do_not_specialize: Sequence[str]) -> Callable[[Callable[..., Any]], TritonFunction]: ...
def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """As `triton.jit`."""
    if function is None:
        return functools.partial(TritonFunction, decorator="jit", options=options)
    return TritonFunction(function, "jit", options)


def constexpr_function(function: Callable[..., Any]) -> TritonFunction:
    """As `triton.constexpr_function`."""
    return TritonFunction(function, "constexpr_function", {})


def cdiv(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)


@constexpr_function
def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below a number of 1 or more."""
    return 1 << (number - 1).bit_length()
