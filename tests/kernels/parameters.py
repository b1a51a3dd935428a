"""What the kernels' tests are run on: every dtype, every case of the catalogue."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

import pytest

from runtime.check.catalogue import CASES, FLOATS, dtypes_of

dtypes = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)


def marks_of(name: object, with_oldest: Container[object]) -> tuple[pytest.MarkDecorator, ...]:
    """Those of a parameter, some of which run with the oldest versions too."""
    return () if name in with_oldest else (pytest.mark.newest_only,)


def cases_and_dtypes(
    names: Iterable[str] = CASES, with_oldest: Container[object] = CASES, only: Mapping[str, Container[str]] = {}
) -> pytest.MarkDecorator:
    """Cases, by default all, in every dtype that they have something to say in, or only in some of them."""
    return pytest.mark.parametrize(
        ("case", "dtype"),
        [
            pytest.param(case, FLOATS[name], id=f"{case}, {name}", marks=marks_of(case, with_oldest))
            for case in names
            for name in dtypes_of(case)
            if case not in only or name in only[case]
        ],
    )
