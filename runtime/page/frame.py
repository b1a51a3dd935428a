"""The frame of every page: a template filled in, with everything that comes from outside escaped.

A page is one file: no script, font or request. It follows the reader's light or dark scheme, fits a telephone, and can
be printed.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).parent
# Characters that HTML does not allow, and halves of surrogate pairs (of file names), which UTF-8 does not.
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
WHITESPACE = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍"})


def render(template: Path, **values: Any) -> str:
    """A page: its template extends "frame.html", which takes the title, the verdict and what it holds for.

    Args:
        template: a file; it may import "charts.html" too.
        values: the template's variables. Strings are always escaped.
    """
    page = _environment(template.parent).get_template(template.name).render(values)
    return FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", page)


@functools.cache
def _environment(folder: Path) -> Environment:
    """The templates of a folder and of this one, compiled once."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, HERE]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def shortened(text: str, most: int = 70) -> str:
    """One line to recognise a text by: its beginning and its end, with line breaks as ↵."""
    line = text.translate(WHITESPACE)
    if len(line) <= most:
        return line
    end = most // 3
    return f"{line[: most - end - 3].rstrip()} … {line[-end:].lstrip()}"
