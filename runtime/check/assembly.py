"""The global loads in a compiled kernel's PTX and SASS (which pointer, how many bytes, before the wait or not), and
when the kernel lets the next one start.

PTX has a register for every value, so a load's address can be traced to a parameter. SASS cannot be traced, but both
name the source line of each load, which tells the pointers apart there too.
"""

from __future__ import annotations

import re
from typing import NamedTuple

PTX_WAIT, SASS_WAIT = "griddepcontrol.wait", "ACQBULK"
PTX_START, SASS_START = "griddepcontrol.launch_dependents", "PREEXIT"
# nvdisasm's names: v4.b32 is .128, v8.b32 (sm_100) .256.
SASS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
# 1.0, -1.0 and -0.0 in bfloat16 and in float16, and there 1/16, with which a product is exact
NEUTRAL = {0x3F80, 0xBF80, 0x3C00, 0xBC00, 0x8000, 0x2C00}


class Load(NamedTuple):
    """One load from global memory."""

    pointer: str | None  # of the kernel's parameters; None in SASS
    bytes: int  # per thread and instruction
    line: tuple[str, int]  # source file and line
    early: bool  # a program can reach it without passing the wait; False where the kernel has none


class Instruction(NamedTuple):
    text: str
    line: tuple[str, int]
    target: str | None  # of a branch or call
    falls_through: bool


class Code(NamedTuple):
    """The instructions of one kernel and where its labels lead."""

    instructions: list[Instruction]
    labels: dict[str, int]


def before_wait(code: Code, wait: str) -> set[int]:
    """The instructions that can run before the wait; none where there is no wait."""
    return _reached(code, 0, wait) if any(wait in each.text for each in code.instructions) else set()


def _reached(code: Code, start: int, last: str = "\n") -> set[int]:
    """The instructions that some path from the one at `start` leads to, not past those with the text `last`."""
    instructions, labels = code
    seen: set[int] = set()
    open_ends = [start]
    while open_ends:
        at = open_ends.pop()
        while at < len(instructions) and at not in seen:
            seen.add(at)
            instruction = instructions[at]
            if last in instruction.text:
                break
            if instruction.target is not None:
                open_ends.append(labels[instruction.target])
            if not instruction.falls_through:
                break
            at += 1
    return seen


def starts_next_early(ptx: str, sass: str) -> bool:
    """Whether a program can let the next kernel start before its own wait."""
    return any(
        start in code.instructions[at].text
        for code, wait, start in ((_ptx_code(ptx), PTX_WAIT, PTX_START), (_sass_code(sass), SASS_WAIT, SASS_START))
        for at in before_wait(code, wait)
    )


def waits_in_a_loop(ptx: str, sass: str) -> bool:
    """Whether a program can come to its wait a second time: a pipelined loop's loads may move above a wait inside."""
    return any(
        wait in instruction.text and at in _reached(code, at + 1)
        for code, wait in ((_ptx_code(ptx), PTX_WAIT), (_sass_code(sass), SASS_WAIT))
        for at, instruction in enumerate(code.instructions)
    )


def fused_in_16_bits(ptx: str) -> list[str]:
    """The multiply-adds of a kernel's PTX that round a product of 16 bits and a sum of 16 bits only once, where Hugging
    Face's separate operations round twice. A product with 1.0 or -1.0, or a sum with -0.0, is how an older GPU adds or
    multiplies in bfloat16, and rounds once either way."""
    constants = dict(re.findall(r"mov\.b(?:16|32)\s+(%?\w+), (0x\w+|-?\d+)", ptx))

    def is_neutral(operand: str) -> bool:
        value = constants.get(operand, operand)
        return re.fullmatch(r"0x\w+|-?\d+", value) is not None and int(value, 0) & 0xFFFF in NEUTRAL

    fused = re.findall(r"(fma\.rn(?:\.ftz|\.sat|\.relu)*\.b?f16(?:x2)?\s+%\w+, ([^;]+));", ptx)
    return [text for text, operands in fused if not any(map(is_neutral, operands.split(", ")))]


def _ptx_code(ptx: str) -> Code:
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', ptx, re.M))
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    line = ("", 0)
    for text in re.sub(r"//.*", "", ptx).splitlines():
        text = text.strip()
        if found := re.match(r"\.loc\s+(\d+)\s+(\d+)", text):
            line = (files[found[1]], int(found[2]))
        elif found := re.match(r"(\$\w+):", text):
            labels[found[1]] = len(instructions)
        elif found := re.match(r"(@!?%p\d+\s+)?[a-z][\w.:]*(\s.*)?;", text):
            branch = re.match(r"(@!?%p\d+\s+)?bra(?:\.uni)?\s+(\$\w+);", text)
            ends = re.match(r"(bra|ret|exit|trap)\b", text) is not None
            instructions.append(Instruction(text, line, branch[2] if branch else None, not ends))
    return Code(instructions, labels)


def ptx_loads(ptx: str, parameters: list[str]) -> list[Load]:
    """The global loads of a kernel.

    Args:
        ptx: of one kernel.
        parameters: the names of its run-time parameters, in order; empty for one that is no pointer.

    Raises:
        ValueError: an address comes from no pointer, or from several.
    """
    code = _ptx_code(ptx)
    origins: dict[str, set[str]] = {}
    changed = True
    while changed:  # a loop's registers may depend on later ones
        changed = False
        for text, *_ in code.instructions:
            if "ld.global" in text or not (found := re.match(r"(?:@!?%p\d+\s+)?[\w.:]+\s+(%rd\d+)\s*,(.*)", text)):
                continue
            parameter = re.search(r"\[\w+_param_(\d+)\]", found[2])
            index = int(parameter[1]) if parameter else len(parameters)
            came_from = {parameters[index]} - {""} if index < len(parameters) else set()
            for register in re.findall(r"%rd\d+", found[2]):
                came_from |= origins.get(register, set())
            if not came_from <= origins.setdefault(found[1], set()):
                origins[found[1]] |= came_from
                changed = True

    early, loads = before_wait(code, PTX_WAIT), []
    for at, (text, source, *_) in enumerate(code.instructions):
        if found := re.search(r"cp\.async\.c[ag]\.shared\.global\S* \[[^]]*\], \[ *(%rd\d+)[^]]*\], (0x\w+)", text):
            loads.append(Load(_origin(origins, found[1], text), int(found[2], 0), source, at in early))
        found = re.search(r"ld\.global([\w.:]*?)(?:\.v(\d))?\.[bufs](\d+)\s.*\[\s*(%rd\d+)", text)
        if found:
            size = int(found[2] or 1) * int(found[3]) // 8
            loads.append(Load(_origin(origins, found[4], text), size, source, at in early))
    return loads


def _origin(origins: dict[str, set[str]], register: str, text: str) -> str:
    """The pointer that an address comes from."""
    pointers = origins.get(register, set())
    if len(pointers) != 1:
        raise ValueError(f"{text}: expected an address from one pointer, got {sorted(pointers)}")
    return next(iter(pointers))


def _sass_code(sass: str) -> Code:
    """Of what `nvdisasm -g -c` prints of one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    line = ("", 0)
    for text in sass.splitlines():
        if found := re.match(r'\s*//## File "([^"]+)", line (\d+)', text):
            line = (found[1], int(found[2]))
        elif found := re.match(r"\s*([.$][\w$]+):", text):
            labels[found[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*)", text):
            text = found[1]
            jump = re.match(r"(?:@!?U?P\w+ )?(?:BRA|CALL|JMP)\b.*`\(([^)]+)\)", text)
            ends = re.match(r"(BRA|JMP|EXIT|RET)\b", text) is not None
            ends = ends and not re.match(r"BRA(\.\w+)* +!?U?P", text)  # a branch on its operand
            instructions.append(Instruction(text, line, jump[1] if jump else None, not ends))
    return Code(instructions, labels)


def sass_loads(sass: str) -> list[Load]:
    """The global loads in what `nvdisasm -g -c` prints of one kernel; their pointers are not known here."""
    code = _sass_code(sass)
    early, loads = before_wait(code, SASS_WAIT), []
    for at, (text, source, *_) in enumerate(code.instructions):
        if found := re.search(r"\bLDG(?:STS)?((?:\.\w+)*)", text):
            sizes = [SASS_BYTES[part] for part in found[1].split(".") if part in SASS_BYTES]
            loads.append(Load(None, sizes[-1] if sizes else 4, source, at in early))
    return loads
