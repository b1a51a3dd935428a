"""A progress bar of one line on stderr."""

from __future__ import annotations

import sys


class ProgressBar:
    """Counts bytes towards a total and redraws its line at every percent.

    Args:
        label: what is going on.
        total: bytes expected in all.
        show: whether to draw; None draws on a terminal only.
    """

    WIDTH = 30

    def __init__(self, label: str, total: int, show: bool | None = None) -> None:
        self.label, self.total = label, max(1, total)
        # A program without a console has no stderr.
        self.show = sys.stderr is not None and (sys.stderr.isatty() if show is None else show)
        self._done, self._percent = 0, -1

    def advance(self, count: int) -> None:
        """Count bytes that are done."""
        self._done += count
        percent = min(100, 100 * self._done // self.total)
        if self.show and percent != self._percent:
            self._percent = percent
            bar = "#" * (self.WIDTH * percent // 100)
            print(f"\r{self.label} [{bar:<{self.WIDTH}}] {percent:3d} %", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.show and self._percent >= 0:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
