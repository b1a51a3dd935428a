"""`bench compare` with other processes on the same cores.

    python -m runtime.bench.contention --busy 2 --engines gemma-runtime,llama.cpp --peer llama.cpp=PYTHON --out A.json

A busy process computes without waiting. With one per core an engine gets at most half of every core, and its threads
are preempted for milliseconds at a time; the read bandwidth before each run is measured beside them too. All other
options, the output and the exit codes are those of `gemma-runtime bench compare`; `bench diff` of reports with --busy 0
and 2 says what the load costs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from runtime.bench import command
from runtime.cli.arguments import whole

BUSY = "while True: pass"
SETTLE_S = 0.5  # until the busy processes are running


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares beside busy processes.

    Args:
        arguments: the command line without the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--busy", type=whole(0), required=True, metavar="N", help="busy processes")
    options, rest = parser.parse_known_args(arguments)
    with busy_processes(options.busy):
        return command.main(["compare", *rest])


@contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Runs `count` processes that compute without waiting."""
    started = [subprocess.Popen([sys.executable, "-S", "-c", BUSY]) for _ in range(count)]
    try:
        time.sleep(SETTLE_S if count else 0)
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
