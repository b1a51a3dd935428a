"""What is checked of every kernel: that it is as exact as its reference, that a second run gives the same bits, that a
row's bits do not depend on other rows, and that nothing is written beside its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from runtime.check import catalogue, chunk_cases, compiled_sequences, integer_cases, sequences
from runtime.check.backends import INTERPRET, Backend, Way
from runtime.check.batches import SMALL, batch_cases, published_sizes
from runtime.check.case import Case, Results
from runtime.check.catalogue import FLOATS, Make, dtypes_of
from runtime.check.comparison import require, same_bits
from runtime.check.outcome import Check

PUBLISHED_MODEL = "gemma-3-270m"
# What the interpreter is given of the cases that take it long: each shape of attention near a window's end, and the
# products in one shape that is no whole number of blocks.
INTERPRETED_POSITIONS = "window"
INTERPRETED_SEQUENCES = ("no older key", "over blocks' ends", "round the ring")


def suite(backend: Backend) -> Iterator[Check]:
    """Every check of the kernels that a backend has; those of a dtype that it lacks are skipped."""
    for check in (*_cases(backend), *_batches(backend), *_sequences(backend)):
        yield replace(check, skip=backend.missing(FLOATS[check.dtype]))


def _cases(backend: Backend) -> Iterator[Check]:
    cases = catalogue.CASES | (integer_cases.CASES | chunk_cases.CASES if backend.is_triton else {})
    for label, make in cases.items():
        for name, way in _ways(backend, label).items():
            for dtype in dtypes_of(label):
                yield _check(f"{label}, {name}", dtype, partial(_computed, backend, make, way))


def _ways(backend: Backend, label: str) -> dict[str, Way]:
    """How a backend runs a case."""
    if not backend.is_triton:
        return {} if label.startswith("rms_norm") else dict(backend.ways)  # compiled as a part of others
    ways = dict(backend.ways)
    attention = label.startswith(("decode_attention", "attention_and_projection"))
    if backend.kind == INTERPRET and label.startswith("decode_attention") and not label.endswith(INTERPRETED_POSITIONS):
        return {}
    # The kernels of a chunk and of these are the same in every model; the products of a model of one row are.
    if (
        label in chunk_cases.CASES
        or label.startswith(("advance", "rms_norm"))
        or (backend.kind == INTERPRET and not attention)
    ):
        del ways["a model of one row"]
    return ways


def _batches(backend: Backend) -> Iterator[Check]:
    interpreted = backend.kind == INTERPRET
    counts = (1, 2, 5) if interpreted else range(1, 8)
    models = {"small": SMALL} | ({} if interpreted else {PUBLISHED_MODEL: published_sizes(PUBLISHED_MODEL)})
    for model, sizes in models.items():
        for operation, make in batch_cases(sizes).items():
            if backend.is_triton or operation != "rms_norm":
                for dtype in FLOATS:
                    label = f"{operation} rows alone and among 8, {model}"
                    yield _check(label, dtype, partial(_independent, backend, make, counts))


def _sequences(backend: Backend) -> Iterator[Check]:
    if not backend.is_triton:
        for name in compiled_sequences.SEQUENCES_OF:
            for dtype in FLOATS:
                run = partial(_no_error, partial(compiled_sequences.assert_bits_of_steps, name))
                yield _check(f"sequence_attention {name}, as steps", dtype, run)
        return
    for name in INTERPRETED_SEQUENCES if backend.kind == INTERPRET else sequences.SEQUENCES_OF:
        for dtype in FLOATS:
            yield _check(f"sequence_attention {name}, as steps", dtype, partial(_as_steps, backend, name))


def _check(label: str, dtype: str, run: Callable[[torch.dtype], float]) -> Check:
    """A check labelled by its operation, then its case."""
    operation, _, name = label.partition(" ")
    return Check(operation.rstrip(","), name, dtype, partial(run, FLOATS[dtype]))


def _computed(backend: Backend, make: Make, way: Way, dtype: torch.dtype) -> float:
    """Whether a case is as exact as its reference, and has the same bits again."""
    case = _on(backend, make(dtype))
    given = case.run(way(case))
    share = case.compare(given)
    if backend.kind != INTERPRET:  # which runs one program after another
        _require_equal(case.run(way(case)), given, "a second run")
    return share


def _independent(backend: Backend, make: Make, counts: Sequence[int], dtype: torch.dtype) -> float:
    """Whether rows have the bits alone, and in smaller batches, that they have among all."""
    case = _on(backend, make(dtype))
    together = case.run(backend.equal[0](case))
    share = case.assert_right(together)
    parts = [slice(count) for count in counts] + [slice(row, row + 1) for row in (3, 7)]
    for index, rows in enumerate(parts):
        alone = case.run(backend.equal[index % len(backend.equal)](case), rows)
        expected = {name: _rows(name, result, rows) for name, result in together.items()}
        _require_equal(alone, expected, f"a batch of rows {rows.start or 0} to {rows.stop - 1}")
    return share


def _as_steps(backend: Backend, name: str, dtype: torch.dtype) -> float:
    """Whether rows of a sequence have the bits of decode steps, and in fp32 are the reference's."""
    given = sequences.sequence(name, dtype, backend.device)
    sequences.assert_bits_of_steps(given)
    # In other dtypes they are those of decode_attention, whose roundings its own cases compare.
    return sequences.assert_right(given) if dtype == torch.float32 else 0.0


def _no_error(check: Callable[[torch.dtype], None], dtype: torch.dtype) -> float:
    """A check of equal bits, whose error is 0."""
    check(dtype)
    return 0.0


def _on(backend: Backend, case: Case) -> Case:
    case.device = backend.device
    return case


def _rows(name: str, result: torch.Tensor, rows: slice) -> torch.Tensor:
    """Some rows of a result of all; `emitted` has them in its second dimension, and there is one step for all."""
    return result if name == "step" else result[:, rows] if name == "emitted" else result[rows]


def _require_equal(given: Results, expected: Results, what: str) -> None:
    for name, result in given.items():
        require(same_bits(result, expected[name]), f"{name}: {what} gives other bits")
