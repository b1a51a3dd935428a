"""What the kernels' tests are run on: every dtype, every case of the catalogue."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from runtime.check.catalogue import CASES, FLOATS, dtypes_of

dtypes = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)


def cases_and_dtypes(names: Iterable[str] = CASES) -> pytest.MarkDecorator:
    """Cases, by default all, in every dtype that they have something to say in."""
    return pytest.mark.parametrize(
        ("case", "dtype"),
        [pytest.param(case, FLOATS[name], id=f"{case}, {name}") for case in names for name in dtypes_of(case)],
    )
