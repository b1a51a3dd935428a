"""jinja2's sandbox with limits on time and memory.

Time is checked in every iteration of a loop and at every call. Every string and list counts towards the memory, before
it is created if it could be far larger than its operands. The time of a single operation on data within the limits,
such as sorting or comparing deeply shared lists, is not bounded.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import nodes, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.filters import make_attrgetter
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 2.0  # of this thread's CPU time; a template takes milliseconds
MAX_BYTES = 1 << 27  # of all strings and lists created, at one byte a character and eight an item
MAX_ITEMS = 1 << 18  # of nested lists and mappings turned into text, repeated ones counted each time
MAX_SOURCE = 1 << 20  # characters of a template
MAX_WIDTH = 10_000  # of padding, indentation and lines
MAX_BITS = 1 << 16  # of an integer

_WIDENING = {"batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "tojson", "wordwrap", "zfill"}
# A format whose width or precision is large or an argument.
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\d{5,}|\*)|\{[^{}]*:[^{}]*(\d{5,}|\{)")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates raise SecurityError at the limits above.

    It counts for one rendering at a time, from `start` on.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.start()
        self.concat = self._concat  # type: ignore[method-assign]
        self.finalize = self._shown
        self.globals["lipsum"] = _no_lipsum
        self.filters["sum"] = _sum
        for name, function in list(self.filters.items()):
            self.set_filter(name, function)

    def start(self) -> None:
        """Begin a rendering: reset the time and memory that it may use."""
        self._ends, self._left = time.thread_time() + MAX_SECONDS, MAX_BYTES

    def set_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Add a filter, or replace one."""

        @functools.wraps(function)  # keeps jinja2's attribute for filters that take the environment or context first
        def counted(*args: Any, **options: Any) -> Any:
            takes_more = hasattr(function, "jinja_pass_arg")
            self._before(name, args[takes_more], args[1 + takes_more :], options)
            return self._spend(function(*args, **options))

        self.filters[name] = counted

    def tick(self) -> None:
        """Count an iteration of a loop or a call."""
        if time.thread_time() > self._ends:
            raise SecurityError(f"it has not ended after {MAX_SECONDS:g} seconds")

    def call(__self, __context: Any, __obj: Any, *args: Any, **options: Any) -> Any:
        # jinja2's own parameter names: a template may pass `self=`.
        __self.tick()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        if isinstance(owner := getattr(method, "__self__", None), str):
            __self._before(method.__name__, owner, args, options)
        return __self._spend(super().call(__context, __obj, *args, **options))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            self._before("format", left, (right,), {})
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * right)
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
        elif operator == "*":
            many, times = (left, right) if isinstance(right, int) else (right, left)
            if isinstance(times, int) and isinstance(many, (str, list, tuple)):
                self._check_left(_bytes(many) * times)
        elif isinstance(left, (str, list, tuple)) and isinstance(right, type(left)):
            self._check_left(_bytes(left) + _bytes(right))
        return self._spend(super().call_binop(context, operator, left, right))

    def joined(self, *values: Any) -> str:
        """The result of `~`."""
        return self._concat(str(self._shown(value)) for value in values)

    def sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """The result of `value[start:stop:step]`."""
        self._check_left(_bytes(value))
        return self._spend(value[start:stop:step])

    def _parse(self, source: str, name: Any, filename: Any) -> nodes.Template:
        if len(source) > MAX_SOURCE:
            raise SecurityError(f"it must be at most {MAX_SOURCE} characters long, got {len(source)}")
        return _Counting().visit(super()._parse(source, name, filename))

    def _concat(self, chunks: Iterable[str]) -> str:
        return "".join(map(self._spend, chunks))

    def _before(self, name: str, value: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Check a filter or string method whose result could be far larger than its arguments."""
        arguments = [*args, *options.values()]
        longest = max(map(self._length, (value, *arguments)))
        widest = max((number for number in arguments if isinstance(number, int)), default=0)
        if name in _WIDENING and widest > MAX_WIDTH:
            raise SecurityError(f"{name} must be given at most {MAX_WIDTH}, got {widest}")
        text = value if isinstance(value, str) else ""
        if name == "format":
            if _WIDE_FORMAT.search(text):
                raise SecurityError(f"a format must state its widths, of at most {MAX_WIDTH}, got {text[:80]!r}")
            self._check_left((text.count("%") + text.count("{")) * longest)
        elif name == "indent":
            self._check_left((text.count("\n") + 1) * max(map(_bytes, arguments), default=0))
        elif name == "wordwrap":
            self._check_left(len(text) * max(map(_bytes, arguments), default=0))
        elif name == "replace" and len(arguments) > 1:
            self._check_left(len(str(value)) + str(value).count(str(arguments[0])) * len(str(arguments[1])))
        elif name == "join" and arguments:
            # The separator is a method's owner or a filter's argument. A generator is no longer than a range.
            for pieces, separator in ((value, arguments[0]), (arguments[0], value)):
                if isinstance(separator, str):
                    self._check_left(len(separator) * (len(pieces) if hasattr(pieces, "__len__") else MAX_RANGE))

    def _shown(self, value: Any) -> Any:
        """A value about to be turned into text."""
        self._length(value)
        return value

    def _length(self, value: Any) -> int:
        """Roughly how many characters a value has as text, counted up to the limits."""
        size, items, left = 0, 0, [value]
        while left:
            value = left.pop()
            size += len(value) if isinstance(value, str) else 1
            if isinstance(value, (list, tuple, dict)):
                items += len(value)
                if items > MAX_ITEMS:
                    raise SecurityError(f"it writes lists and mappings of more than {MAX_ITEMS} items")
                left += [*value.keys(), *value.values()] if isinstance(value, dict) else value
            self._check_left(size)
        return size

    def _spend(self, result: Any) -> Any:
        self._check_left(size := _bytes(result))
        self._left -= size
        return result

    def _check_left(self, size: int) -> None:
        if size > self._left:
            raise SecurityError(f"it creates strings and lists of more than {MAX_BYTES} bytes")


class _Counting(NodeTransformer):
    """Adds a tick to every loop, and replaces `~` and slices by their counted forms."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call(node, "tick"), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _call(node, "joined", *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _call(node, "sliced", node.node, *(bound or nodes.Const(None) for bound in bounds))


def _call(node: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Call:
    call = nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None, lineno=node.lineno)
    assert node.environment
    call.set_environment(node.environment)
    return call


def _bytes(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return 8 * len(value) if isinstance(value, (list, tuple, dict)) else 0


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise SecurityError(f"it computes an integer of more than {MAX_BITS} bits")


@pass_environment
def _sum(environment: LimitedEnvironment, items: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    """jinja2's sum, with each addition counted."""
    if isinstance(start, str):
        raise TypeError("sum cannot add texts")
    if attribute is not None:
        items = map(make_attrgetter(environment, attribute), items)
    for item in items:
        environment.tick()
        start = environment.call_binop(None, "+", start, item)
    return start


def _no_lipsum(*args: Any, **options: Any) -> None:
    raise SecurityError("lipsum is random, so that no two renderings are the same")
