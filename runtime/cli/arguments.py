"""How the command lines read their arguments: one line for what is wrong, and whole numbers in bounds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

NAME = "gemma-runtime"


class Parser(argparse.ArgumentParser):
    """Complains in one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{NAME}: error: {message} (see {self.prog} --help)\n")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """What turns an argument into a whole number of at least `least` and, if given, at most `most`."""

    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if number < least or (most is not None and number > most):
            bounds = f"at least {least}" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"expected {bounds}, got {number}")
        return number

    return whole_number
