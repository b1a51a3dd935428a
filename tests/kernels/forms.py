"""The forms of the product, in blocks that are no GPU's: small, so that small matrices have several."""

from __future__ import annotations

import torch

from runtime.check.case import Case, Results
from runtime.kernels.block import Block

# 128 columns are whole pieces and passes of a loop, 84 and 200 are not.
FORMS = {
    "sum in pieces": Block("sum", 16, 64, 2),
    "sum in a padded block": Block("sum", 16, 256, 4),
    "loop": Block("loop", 16, 32, 2, 2),
    "loop in one pass": Block("loop", 32, 64, 4, 3),
    "held": Block("held", 16, 64, 4),
}


def run_form(case: Case, block: Block, rows: slice = slice(None)) -> Results:
    """What a form of a case's kernel makes of some rows."""
    given = {"block": block}
    if "norm_weight" in case.inputs:
        given["normed"] = torch.full_like(case.inputs["x"][rows], torch.nan, device=case.device)
    return case.run(case.kernel, rows, **given)
