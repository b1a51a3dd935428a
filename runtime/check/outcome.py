"""A check of a kernel, and what came of it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

from runtime.errors import one_line

PASSED, FAILED, ERROR, SKIPPED = "passed", "failed", "error", "skipped"


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        operation: whose kernel it is about.
        name: of its case.
        dtype: the model's, short.
        run: raises AssertionError where a kernel is wrong; returns the largest error as a share of what it may be.
        skip: why it cannot run here; None where it can.
    """

    operation: str
    name: str
    dtype: str
    run: Callable[[], float]
    skip: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a check.

    Attributes:
        operation, name, dtype: the check's.
        status: "passed"; "failed", where a result is wrong; "error", where a kernel could not run; "skipped".
        seconds: that it took.
        share: the largest error as a share of what it may be; None unless it passed.
        message: why it failed or was skipped, in a line; "" where it passed.
        details: a traceback, where a kernel could not run.
    """

    operation: str
    name: str
    dtype: str
    status: str
    seconds: float
    share: float | None = None
    message: str = ""
    details: str = ""

    @property
    def is_bad(self) -> bool:
        return self.status in (FAILED, ERROR)


def outcome_of(check: Check) -> Outcome:
    """Runs a check, on the same random numbers whichever others run."""
    identity = check.operation, check.name, check.dtype
    if check.skip is not None:
        return Outcome(*identity, SKIPPED, 0.0, message=check.skip)
    share, status, message, details = None, PASSED, "", ""
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):  # cases are made on the CPU
        torch.manual_seed(0)
        try:
            share = check.run()
        except AssertionError as error:
            status, message = FAILED, one_line(error)
        except Exception as error:  # a kernel that cannot be compiled, or leaves its arguments
            status, message, details = ERROR, one_line(error), traceback.format_exc()
    return Outcome(*identity, status, time.perf_counter() - started, share, message, details)
