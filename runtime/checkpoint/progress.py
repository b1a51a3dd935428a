"""Progress bars on stderr: tqdm's, in a notebook too."""

from __future__ import annotations

import sys

from tqdm import tqdm


def is_shown(progress: bool | None) -> bool:
    """Whether to write progress to stderr; with None, only if that is a terminal."""
    # A program without a console has no stderr.
    return sys.stderr is not None and (sys.stderr.isatty() if progress is None else progress)


def progress_bar(label: str, total: int | None, progress: bool | None = None, unit: str = "B") -> tqdm:
    """A bar that is cleared when it is closed.

    Args:
        label: what is under way.
        total: how many units there are in all; None if that is not known.
        progress: whether to draw it; None draws it on a terminal only.
        unit: what is counted; bytes ("B") are scaled to kB, MB and GB.
    """
    if not is_shown(progress):
        return tqdm(disable=True)
    from tqdm.auto import tqdm as automatic  # warns in a notebook without ipywidgets

    return automatic(desc=label, total=total, unit=unit, unit_scale=unit == "B", leave=False)
