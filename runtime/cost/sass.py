"""From a kernel's machine code, as nvdisasm prints it, to the instructions that one of its warps runs."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from runtime.cost.simulator import Kind

_LABEL = re.compile(r"(\.L_\w+):")
_LINE = re.compile(r"/\*[0-9a-f]+\*/\s+(.*?);\s*/\* 0x[0-9a-f]+ \*/")
_UPPER_HALF = re.compile(r"0x([0-9a-f]{16})")
_BRANCH = re.compile(r"BRA[.A-Z]*\s.*`\((\.L\w+)\)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")

_KINDS: dict[Kind, str] = {
    Kind.FMA: "FFMA FMUL FADD HFMA2 HADD2 HMUL2 FFMA2 FMUL2 FADD2",
    Kind.SLOW: "F2F I2F F2I FRND F2IP POPC BREV FLO MUFU",
    Kind.INTEGER_MULTIPLY: "IMAD IDP",
    Kind.MMA: "HMMA IMMA",
    Kind.LOAD: "LDG LD",
    Kind.LOAD_SHARED: "LDS LDSM",
    Kind.STORE_SHARED: "STS STSM",
    Kind.SHUFFLE: "SHFL REDUX VOTE MATCH",
    Kind.STORE: "STG ST",
    Kind.ATOMIC: "RED REDG ATOM ATOMG",
    Kind.COPY_ASYNC: "LDGSTS",
    Kind.COMMIT: "LDGDEPBAR",
    Kind.WAIT_COPIES: "DEPBAR",
    Kind.BARRIER: "BAR",
    Kind.WAIT_FOR_KERNEL: "ACQBULK",
    Kind.CONSTANT: "LDC ULDC S2R S2UR CS2UR",
    Kind.EXIT: "EXIT",
    Kind.NOTHING: "PREEXIT CCTL UBLKPF NOP BSSY BSYNC WARPSYNC BRA CALL RET YIELD ERRBAR MEMBAR NANOSLEEP",
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_WIDE = {".128": 16, ".64": 8}  # bytes a thread moves
_WIDE_MATRIX = {".4": 16, ".2": 8}


Trace = np.ndarray[Any, Any]  # [instructions, 6]: see simulator.Program


class Line(NamedTuple):
    """One instruction."""

    text: str
    control: int  # stall count, scoreboards: the bits from 41 of its upper half

    @property
    def is_predicated(self) -> bool:
        return self.text.startswith("@")

    @property
    def operation(self) -> str:
        return _PREDICATE.sub("", self.text).split()[0]

    @property
    def target(self) -> str | None:
        """The label that it branches to."""
        found = _BRANCH.search(self.text)
        return found[1] if found else None

    def kind(self) -> Kind:
        name, *_ = self.operation.split(".")
        if name in _KIND_OF:
            # Weights are read once: they go first out of the cache.
            return Kind.LOAD_WEIGHT if _KIND_OF[name] == Kind.LOAD and ".EF" in self.operation else _KIND_OF[name]
        return Kind.UNIFORM if name.startswith("U") and name != "UNPACK" else Kind.ALU

    def size(self) -> int:
        """Bytes that a thread moves; of DEPBAR the commits that may be under way."""
        if self.operation.startswith("DEPBAR"):
            found = re.search(r"SB\d+, 0x([0-9a-f]+)", self.text)
            return int(found[1], 16) if found else 0
        if self.operation.startswith("LDGSTS"):
            return 16
        widths = _WIDE_MATRIX if self.operation.startswith(("LDSM", "STSM")) else _WIDE
        return next((size for suffix, size in widths.items() if suffix in self.operation), 4)


class Code(NamedTuple):
    """A kernel's instructions and where its labels stand among them."""

    lines: list[Line]
    labels: dict[str, int]


def parse(text: str) -> Code:
    """Reads what `nvdisasm -c -hex` prints."""
    lines: list[Line] = []
    labels: dict[str, int] = {}
    printed = iter(text.splitlines())
    for line in printed:
        if found := _LABEL.match(line.strip()):
            labels[found[1]] = len(lines)
        elif found := _LINE.match(line.strip()):
            upper = _UPPER_HALF.search(next(printed))
            assert upper, "nvdisasm prints the upper half of an instruction in the line after it"
            lines.append(Line(found[1].strip(), int(upper[1], 16) >> 41))
    return Code(lines, labels)


def trace(
    code: Code,
    trips: int = 1,
    *,
    inner_trips: int = 1,
    taken: Collection[str] = (),
    skips_loop: bool = False,
    is_first_warp: bool = True,
    exits_after_wait: bool = False,
) -> Trace:
    """The instructions that a warp runs, as `simulator.Program` has them.

    Conditional branches forward are not taken, but around calls of slow paths; conditional exits neither.

    Args:
        code: the kernel's.
        trips: how often its longest loop runs.
        inner_trips: how often loops inside it run each time; others run once.
        taken: labels that conditional branches forward go to.
        skips_loop: whether the compiler has peeled the longest loop's first trip off, so that one trip skips it.
        is_first_warp: whether it is the program's first warp. Others take the uniform branches forward,
        exits_after_wait: or end at a conditional exit behind the wait for the kernel before.
    """
    lines, labels = code
    targets = [labels.get(line.target or "") for line in lines]
    back = {at: to for at, to in enumerate(targets) if to is not None and to <= at and at - to > 2}
    longest = max(back, key=lambda at: at - back[at], default=None)
    skip = None
    if skips_loop and longest is not None:
        over = [
            at
            for at, to in enumerate(targets[: back[longest]])
            if to is not None and to > longest and lines[at].is_predicated
        ]
        if len(over) > 1:
            skip = over[-1] if trips == 1 else None
            trips = max(1, trips - 1)
    done: dict[int, int] = {}  # trips of loops, by where they branch back
    rows: list[tuple[int, ...]] = []
    has_waited, at = False, 0
    while at < len(lines):
        here, line, to = at, lines[at], targets[at]
        at += 1
        kind = line.kind()
        if kind == Kind.EXIT and line.is_predicated and not (exits_after_wait and has_waited):
            kind = Kind.NOTHING
        has_waited |= kind == Kind.WAIT_FOR_KERNEL
        control = line.control
        rows.append((kind, control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63, line.size()))
        if kind == Kind.EXIT:
            break
        if to is None:
            continue
        if here in back:
            is_inner = longest is not None and back[longest] < to and here < longest
            wanted = trips if here == longest else inner_trips if is_inner else 1
            done[here] = done.get(here, 0) + 1
            if done[here] < wanted:
                at = to
            else:
                done[here] = 0
        elif longest is not None and back[longest] < here < longest < to and line.is_predicated:
            if done.get(longest, 0) >= trips - 1:
                at = to
        elif to > here:
            is_always = not line.is_predicated and not re.search(r"BRA[.A-Z]*\s+!?U?P\d", line.text)
            calls = any(passed.operation.startswith("CALL") for passed in lines[here:to])
            leaves = not is_first_warp and "BRA.U" in line.text
            if is_always or calls or here == skip or line.target in taken or leaves:
                at = to
    return np.array(rows, np.int64)
