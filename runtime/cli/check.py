"""`gemma-runtime check kernels`: are the kernels right on this machine?"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.cli import arguments
from runtime.cli.exit_codes import CHECK_FAILED, DONE, NOTHING_RAN
from runtime.cli.output import check_writable, print_outcome
from runtime.parity import output_file

if TYPE_CHECKING:
    from runtime.check.outcome import Check
    from runtime.check.report import KernelReport


def add(commands: arguments.Commands) -> None:
    command = arguments.add_group(commands, "check", "Check this installation: its kernels on this machine.")
    kernels = command.add_parser(
        "kernels",
        help="Each operation's kernel against plain PyTorch.",
        description="Each operation's kernel on this machine: as exact as plain PyTorch against fp64 truth, the same "
        "bits in every run and in every batch, ties to the lowest index, nothing written beside its place. Exit codes: "
        "0 all passed; 1 a kernel is wrong; 2 bad input; 3 nothing ran.",
        allow_abbrev=False,
    )
    kernels.set_defaults(run=run)
    arguments.add_device(kernels, ", interpret (Triton's interpreter, no GPU needed)")
    arguments.add_json(kernels, "the table")
    kernels.add_argument("--junit", metavar="FILE", help="write JUnit XML, for CI systems")


def run(options: argparse.Namespace) -> int:
    check_writable(options.json, options.junit)
    if options.device == "interpret" and os.environ.get("TRITON_INTERPRET") != "1":
        _interpret()
    from runtime.check.backends import backend_for
    from runtime.check.run import check_kernels
    from runtime.model.placement import resolve_device

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    auto = "interpret" if interpreted else "auto"
    device = auto if options.device == "auto" else options.device
    backend = backend_for(device if device == "interpret" else resolve_device(device))
    report = check_kernels(backend, progress=_progress())
    return finish(report, options)


def finish(report: KernelReport, options: argparse.Namespace) -> int:
    """Write and print a report as the options `json` and `junit` ask for. Returns the exit code."""
    if options.junit is not None:
        output_file.write(Path(options.junit), report.to_junit())
    print_outcome(report, options.json)
    return DONE if report.passed else CHECK_FAILED if report.ran else NOTHING_RAN


def _interpret() -> None:
    """Restart the same command: kernels are interpreted only if TRITON_INTERPRET=1 is set before they are imported."""
    sys.stdout.flush()
    sys.stderr.flush()
    # One thread: the interpreter's arrays are small. A safe path: no module is imported from the caller's folder.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    os.execve(sys.executable, [sys.executable, "-m", "runtime", *sys.argv[1:]], environment)


def _progress() -> Callable[[Check], None]:
    """Says on stderr which operation is being checked."""
    shown = ""

    def show(check: Check) -> None:
        nonlocal shown
        if check.operation != shown and check.skip is None:
            shown = check.operation
            print(f"checking {shown}", file=sys.stderr, flush=True)

    return show
