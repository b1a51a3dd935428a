"""The library that enforces grammars, llguidance; imported only if a grammar is asked for."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import numpy as np

from runtime.errors import InvalidArgument, MissingPackage, one_line

# Without it, where a grammar leaves no choice of text, one token is allowed, even if others spell the same.
_EXACT = '%llguidance {"no_forcing": true}'
# The lines of the grammar that it complains about, and a note that it could say more.
_EXCERPT = re.compile(r"\n +\d+ \| .*|\n<non-verbose/>", re.DOTALL)
# If the grammar was generated here, a place in it tells the caller nothing.
_PLACE = re.compile(r"at \d+\(\d+\): |failed to compile JSON schema: |.*\berror: ", re.DOTALL)
_MAY_OVERLAP = "options of a oneOf may hold at once, which anyOf allows; objects may lack additionalProperties: false"
# It goes on with advice that no caller can take.
_OVERLAP = re.compile(r"oneOf constraints are not supported\..*", re.DOTALL)


def library() -> ModuleType:
    """llguidance.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise MissingPackage(
            "structured output needs llguidance: pip install 'gemma-runtime[structured]'", name="llguidance"
        ) from error
    return llguidance


def first_matcher(tokenizer: Any, lark: str, what: str, *, has_places: bool) -> Any:
    """The library's matcher at the beginning of a text.

    Args:
        tokenizer: the library's.
        lark: the grammar, in the library's kind of Lark.
        what: the caller's argument and what it must be, for messages.
        has_places: whether lines and columns of `lark` are those of the caller's text.

    Raises:
        InvalidArgument: the library refuses the grammar.
    """
    llguidance = library()
    limits = llguidance.LLParserLimits(verbose_errors=False)
    # At the end, so that it decides, and the lines before it keep their numbers.
    matcher = llguidance.LLMatcher(tokenizer, f"{lark}\n{_EXACT}\n", log_level=0, limits=limits)
    if reason := error_of(matcher):
        if not has_places:
            reason = _OVERLAP.sub(_MAY_OVERLAP, _PLACE.sub("", reason))
        raise InvalidArgument(f"{what}: {one_line(reason)}")
    return matcher


def error_of(matcher: Any) -> str:
    """Why a matcher cannot go on, in one line; "" if it can."""
    return one_line(_EXCERPT.sub("", matcher.get_error())) if matcher.is_error() else ""


def allowed_bits(matcher: Any, count: int) -> np.ndarray:
    """Which of the library's `count` tokens may come next: uint8, a bit for each, the lowest first."""
    bits = np.empty((count + 31) // 32 * 4, np.uint8)
    matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)  # writes all of it
    return bits
