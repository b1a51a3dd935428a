"""Checking the kernels of this machine, with progress."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

from runtime.check.backends import INTERPRET, Backend
from runtime.check.checks import suite
from runtime.check.outcome import Check, outcome_of
from runtime.check.report import KernelReport, environment


def check_kernels(
    backend: Backend, checks: Iterable[Check] | None = None, progress: Callable[[Check], None] = lambda check: None
) -> KernelReport:
    """Run checks on a backend.

    Args:
        backend: whose kernels they are of.
        checks: what runs; None for all that the backend has kernels for.
        progress: is told of each check before it runs.
    """
    began, started, found = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), time.perf_counter(), []
    with _checked(backend), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")  # the interpreter's, where padding is NaN
        for check in suite(backend) if checks is None else checks:
            progress(check)
            found.append(outcome_of(check))
    return KernelReport(backend.kind, environment(backend), tuple(found), time.perf_counter() - started, began)


def _checked(backend: Backend) -> AbstractContextManager[None]:
    """The interpreter as a check needs it; elsewhere nothing."""
    if backend.kind != INTERPRET:
        return nullcontext()
    from runtime.check.interpreter import checked_interpreter

    return checked_interpreter()
