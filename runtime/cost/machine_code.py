"""A kernel's machine code: what Triton compiles of a launch for a GPU, no GPU needed."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from runtime.kernels.launch import MULTIPROCESSOR_REGISTERS, Launch


class Limits(NamedTuple):
    """What the programs of one multiprocessor share."""

    shared_bytes: int
    threads: int
    slots: int


# Source: CUDA C++ Programming Guide, technical specifications per compute capability.
LIMITS = {
    80: Limits(164 * 1024, 2048, 32),
    86: Limits(100 * 1024, 1536, 16),
    89: Limits(100 * 1024, 1536, 24),
    90: Limits(228 * 1024, 2048, 32),
    100: Limits(228 * 1024, 2048, 32),
    120: Limits(100 * 1024, 1536, 24),
}
RESERVED_SHARED_BYTES = 1024  # of each program


def tool(*command: str) -> str:
    """What one of the CUDA tools in Triton's wheel prints."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run([folder / command[0], *command[1:]], capture_output=True, text=True, check=True).stdout


def source(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """A launch as its JIT would hand it to the compiler, and the compiler's options."""
    backend = make_backend(target)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, options = bind(**launch.arguments, **launch.options, debug=False)
    packed = launch.kernel._pack_args(backend, dict(launch.options), bound, specialization, options)
    return ASTSource(launch.kernel, *packed[1:]), vars(packed[0])


def fingerprint(launch: Launch, target: GPUTarget) -> str:
    """A hash of all that decides what a launch is compiled to: Triton's version, the GPU, the options, and the code as
    Triton's frontend makes it of the source, wherever in a file that stands."""
    code, options = source(launch, target)
    backend = make_backend(target)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    parsed = backend.parse_options(dict(options))
    functions = backend.get_codegen_implementation(parsed)
    module = code.make_ir(target, parsed, functions, backend.get_module_map(), context)
    options = {name: value for name, value in options.items() if name != "extern_libs"}  # a path
    parts = (triton.__version__, target, options, launch.grid, code.signature, module.str_nodebug())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@contextmanager
def _in_a_file(cubin: bytes) -> Iterator[str]:
    """The path of a file with a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        yield file.name


def disassembled(cubin: bytes, *options: str) -> str:
    """What nvdisasm prints of a compiled kernel. Without analysing branches by a stack, which these GPUs do not have: a
    quarter of its time."""
    with _in_a_file(cubin) as path:
        return tool("nvdisasm", *options, "--no-dataflow", "-c", path)


def resources(cubin: bytes) -> tuple[int, int, int]:
    """A compiled kernel's registers, bytes of stack and of local memory."""
    with _in_a_file(cubin) as path:
        usage = tool("cuobjdump", "--dump-resource-usage", path)
    registers, stack, local = (int(number) for number in re.findall(r"\b(?:REG|STACK|LOCAL):(\d+)", usage))
    return registers, stack, local


def programs(capability: int, warps: int, registers: int, shared_bytes: int) -> tuple[int, str]:
    """Programs that fit a multiprocessor at once, and what allows no more."""
    limits = LIMITS[capability]
    of_a_warp = -(-registers * 32 // 256) * 256
    # A quarter of the registers belongs to each of the four schedulers.
    fitting = {
        "registers": MULTIPROCESSOR_REGISTERS // 4 // of_a_warp * 4 // warps,
        "shared memory": limits.shared_bytes // (-(-shared_bytes // 128) * 128 + RESERVED_SHARED_BYTES),
        "threads": limits.threads // (32 * warps),
        "slots": limits.slots,
    }
    limit = min(fitting, key=lambda name: fitting[name])
    return fitting[limit], limit


class MachineCode(NamedTuple):
    """A kernel compiled for a GPU."""

    sass: str  # as `nvdisasm -c -hex` prints it
    warps: int
    programs: int  # that fit a multiprocessor


_compiled: dict[str, MachineCode] = {}  # by what was compiled


def machine_code(launch: Launch, capability: int) -> MachineCode:
    """Compiles a launch, or takes it from Triton's cache."""
    target = GPUTarget("cuda", capability, 32)
    code, options = source(launch, target)
    key = f"{target} {code.hash()} {options}"
    if key not in _compiled:
        made = triton.compile(code, target=target, options=options)
        sass, (registers, *_) = disassembled(made.asm["cubin"], "-hex"), resources(made.asm["cubin"])
        warps, shared = made.metadata.num_warps, made.metadata.shared
        _compiled[key] = MachineCode(sass, warps, programs(capability, warps, registers, shared)[0])
    return _compiled[key]
