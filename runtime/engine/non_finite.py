"""The error for logits that are not finite: which dtype overflows, and which one to load instead."""

from __future__ import annotations

from runtime.errors import NonFiniteError
from runtime.model.model import Model

_WIDER = {"float16": 'load it with dtype="bfloat16" or "float32"', "bfloat16": 'load it with dtype="float32"'}


def non_finite(model: Model, which: str) -> NonFiniteError:
    """The error that ends a request; `which` names the logits."""
    dtype = model.runtime.dtype
    fix = _WIDER.get(dtype)
    if fix is None:
        return NonFiniteError(
            f"the logits {which} are not finite in {dtype}: {model.name} holds weights that overflow it"
        )
    return NonFiniteError(
        f"the logits {which} are not finite: {model.name} overflows {dtype} here; {fix} (command line: --dtype)"
    )
