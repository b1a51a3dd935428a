"""A decode step's kernels on a simulated multiprocessor (simulator.py), from the machine code that Triton compiles.

Simulated times are not measurements: ERROR says how far simulated steps were from measured ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from runtime.cost import sass
from runtime.cost.launches import splits_at
from runtime.cost.machine_code import MachineCode, machine_code
from runtime.cost.simulator import Constants, Kind, Program, kernel_us
from runtime.kernels.launch import Launch

# Kernel times cannot tell the clock from L2's latency: these two sets fit an H100's equally well.
FITS = (Constants(), Constants(clock_ghz=1.9, l2=500))
ERROR = (
    "in bfloat16 simulated steps were within 11 % of an H100's, which the constants were fitted to, and 14 % below to "
    "10 % above an H200's, which they were not; products on tensor cores have come out up to 15 % too fast, and steps "
    "of integers 13 to 36 %"
)
_WEIGHTS = ("weight_ptr", "gate_up_ptr", "table_ptr")


def fits(read_gb_s: float, multiprocessors: int) -> list[Constants]:
    """The sets of constants, for a GPU of this bandwidth and size."""
    return [fit._replace(read_gb_s=read_gb_s, multiprocessors=multiprocessors) for fit in FITS]


def simulated_us(launch: Launch, capability: int, context: int, fits: Sequence[Constants]) -> tuple[float, ...]:
    """Microseconds that a kernel adds to a step, by each set of constants.

    Args:
        launch: as `step_launches` records it.
        capability: of the GPU that it is compiled for.
        context: tokens of each row, the one being decoded included.
        fits: the constants.
    """
    name, arguments = launch.kernel.fn.__name__, launch.arguments
    code = machine_code(launch, capability)
    parsed, programs = sass.parse(code.sass), math.prod(launch.grid)
    if "attention" in name:
        _, keys, splits = splits_at(launch, context)
        programs = launch.grid[0] * (1 + splits)
        first = other = _split(parsed, max(1, keys // arguments["BLOCK_KEYS"]), name == "decode_attention_kernel")
    elif name == "combine_splits_kernel":
        first = other = _combined(parsed, math.ceil(splits_at(launch, context)[2] / arguments["FEW_SPLITS"]))
    else:
        trips = arguments.get("rows", 1)
        if "SLICES" in arguments:
            trips = math.ceil(arguments["WIDTH"] / (arguments["SLICES"] * arguments["BLOCK_WIDTH"]))
        first = other = sass.trace(parsed, trips)
        if name.startswith("lm_head"):  # whose first warp also keeps the largest logit
            other = sass.trace(parsed, trips, is_first_warp=False)
    weight_bytes = _weight_bytes(launch)
    return tuple(kernel_us(placed(first, other, code, programs, weight_bytes, fit), fit) for fit in fits)


def _split(code: sass.Code, blocks: int, is_first_peeled: bool) -> sass.Trace:
    """What a warp runs for a split of the older keys, of so many blocks: without the code for the new key alone, and
    without the loop over blocks where the first block is peeled off and is the only one."""
    lines, labels = code.lines, code.labels
    jumps = [(at, labels[to], to, line.is_predicated) for at, line in enumerate(lines) if (to := line.target) in labels]
    start, end = max(((to, at) for at, to, *_ in jumps if to < at), key=lambda loop: loop[1] - loop[0])
    ahead = [(at, to, label) for at, to, label, is_conditional in jumps if is_conditional and at < min(start, to)]
    elses = {at + 1 for at, *_, is_conditional in jumps if not is_conditional}
    # The new key's code is skipped, unless it lies behind the loop or is the other side of a branch.
    skipped = [(to - at, label) for at, to, label in ahead if to < start and to not in elses]
    taken = {max(skipped)[1]} if skipped else set()
    if is_first_peeled and blocks == 1:
        taken.add(max((at, label) for at, to, label in ahead if to > end)[1])
    return sass.trace(code, blocks - 1 if is_first_peeled and blocks > 1 else blocks, taken=taken)


def _combined(code: sass.Code, turns: int) -> sass.Trace:
    """What a warp runs to combine `turns` times FEW_SPLITS splits; the first FEW_SPLITS come before the loop."""
    jumps = [(at, code.labels[line.target], line) for at, line in enumerate(code.lines) if line.target in code.labels]
    start, end = max(((to, at) for at, to, _ in jumps if to < at), key=lambda loop: loop[1] - loop[0])
    past = {line.target or "" for at, to, line in jumps if at < start and to > end and line.is_predicated}
    return sass.trace(code, max(turns - 1, 1), taken=past if turns <= 1 else ())


def placed(
    first: sass.Trace, other: sass.Trace, code: MachineCode, programs: int, weight_bytes: int, constants: Constants
) -> Program:
    """A kernel on one multiprocessor; all its programs together read `weight_bytes` of weights."""
    loads = int(((first[:, 0] == Kind.LOAD_WEIGHT) | (first[:, 0] == Kind.COPY_ASYNC)).sum())
    busiest = math.ceil(programs / constants.multiprocessors)
    share = constants.read_gb_s / constants.multiprocessors / constants.clock_ghz  # bytes a clock
    return Program(
        first,
        other,
        code.warps,
        code.programs,
        busiest,
        weight_bytes / (programs * code.warps * loads) if loads else 0.0,
        share * busiest * constants.multiprocessors / programs,  # the others need less of the bandwidth
    )


def _weight_bytes(launch: Launch) -> int:
    if launch.kernel.fn.__name__ == "advance_kernel":
        return 0
    weights = [launch.arguments[name] for name in (*_WEIGHTS, "scale_ptr") if name in launch.arguments]
    return sum(weight.numel() * weight.element_size() for weight in weights if isinstance(weight, torch.Tensor))
