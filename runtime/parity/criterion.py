"""The criterion: what counts as the same tokens.

fp32: tokens equal Hugging Face's; at a mismatch the two tokens' fp64 logits lie within twice Hugging Face's own
largest error, and no logit is more than four times as wrong as Hugging Face's.
16 bits: after Hugging Face's own text, our error on the margin between the two best tokens has a median and a 99th
percentile of at most 1.25 times Hugging Face's, and a maximum of at most twice; free-running, a first divergence has an
fp64 gap of at most Hugging Face's own largest, and no more prompts diverge than when Hugging Face is run against
itself. Where our operations are Hugging Face's own, in its order, tokens are simply equal.

Every bound is a multiple of an error of Hugging Face's in the same run. The factors are for 40 prompts of 64 tokens.
With fewer, chance moves a percentile by more than a quarter, so there a factor counts as passed when a bootstrap says
so of 99 runs in 100.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from packaging.version import Version

from runtime.kernels.launch import INTERPRETING
from runtime.model.model import Model
from runtime.parity.hugging_face import named_weights
from runtime.parity.records import Check, Fault, Finding, PromptRecord

FULL_PROMPTS, FULL_STEPS = 40, 2560
MARGIN_FACTORS = {"median": 1.25, "p99": 1.25, "max": 2.0}
LOGIT_FACTOR = 4.0
GAP_FACTOR = 2.0
_PERCENTILES = {"median": 50, "p99": 99, "max": 100}


def runs_its_operations(model: Model) -> bool:
    """Whether decoding consists of Hugging Face's own operations in its order, so that 16-bit tokens are equal too."""
    # Before 5.23 fused attention groups query heads under a mask in another way.
    masked_groups = model.config.family == "gemma3" and model.config.heads != model.config.kv_heads
    its_order = not masked_groups or Version(importlib.metadata.version("transformers")) >= Version("5.23")
    return model.device.type == "cpu" and model.runtime.eager and not INTERPRETING and its_order


def judge(records: Sequence[PromptRecord], dtype: str, *, its_operations: bool = False) -> list[Finding]:
    """The criterion's answers for some prompts.

    Args:
        records: at least one.
        dtype: the model's, "float32", "bfloat16" or "float16".
        its_operations: as `runs_its_operations`.
    """
    findings = [_same_model(records), _greedy_rule(records), _forced_is_free(records), _logit_errors(records)]
    if dtype == "float32":
        return [*findings, _gaps("fp32 tokens", records, largest_gap(records))]
    findings += [_margin_errors(records, measure) for measure in MARGIN_FACTORS]
    if its_operations:
        exact = sum(record.exact and record.forced == record.theirs for record in records)
        measured = f"{exact} of {len(records)} prompts equal"
        findings.append(Finding(part="equal tokens", passed=exact == len(records), measured=measured, bound="all"))
        return findings
    return [*findings, *_divergences(records)]


def largest_gap(records: Sequence[PromptRecord]) -> float:
    """The fp64 distance of two tokens up to which either may be picked: twice Hugging Face's largest error."""
    return GAP_FACTOR * float(_all(records, "their_errors").max())


def same_weights(theirs: Any, model: Model) -> Finding:
    """Whether both sides have read the same weights from the checkpoint, bit for bit."""
    stored = theirs.state_dict()
    different = []
    for name, ours in named_weights(model).items():
        # In a multimodal checkpoint the decoder has a prefix of its own.
        its = stored.get(name, stored.get(name.replace("model.", "model.language_model.", 1)))
        if ours is None or its is None or not torch.equal(ours, its):
            different.append(name)
    count = len(named_weights(model))
    return Finding(
        part="weights",
        passed=not different,
        measured=f"{count - len(different)} of {count} tensors equal" + (f", not {different[0]}" if different else ""),
        bound="all",
    )


def summary(
    passed: bool,
    records: Sequence[PromptRecord],
    findings: Sequence[Finding],
    checks: Sequence[Check] = (),
    faults: Sequence[Fault] = (),
) -> str:
    """The verdict in one line."""
    exact, divergences = sum(record.exact for record in records), sum(len(record.divergences) for record in records)
    line = f"{exact} of {len(records)} prompts equal Hugging Face's {len(records[0].ours)} tokens"
    if passed:
        return f"passed: {line}" + (f", {divergences} differences explained" if divergences else "")
    broken = [f"{found.part}: {found.measured} (bound: {found.bound})" for found in findings if found.passed is False]
    broken += [f"{check.name}: {check.detail}" for check in checks if check.passed is False]
    broken += [f"the fault {fault.name!r} was not noticed" for fault in faults if not fault.refused]
    return f"refused: {line}; " + "; ".join(broken)


def _same_model(records: Sequence[PromptRecord]) -> Finding:
    """Hugging Face may not be far from a truth that we are near to: then it does not run the model that we run, and
    bounds made of its errors would allow anything."""
    theirs, ours = (np.median(_all(records, side)) for side in ("their_logit_errors", "our_logit_errors"))
    return Finding(
        part="one model on both sides",
        passed=bool(theirs <= LOGIT_FACTOR * ours),
        measured=f"Hugging Face's median logit error {theirs:.3g}, ours {ours:.3g}",
        bound=f"{LOGIT_FACTOR:g} times ours",
    )


def _greedy_rule(records: Sequence[PromptRecord]) -> Finding:
    broken = sum(len(record.not_the_largest) for record in records)
    return Finding(
        part="greedy choice",
        passed=not broken,
        measured=f"{broken} steps whose token is not the first of the largest logits",
        bound="0",
    )


def _forced_is_free(records: Sequence[PromptRecord]) -> Finding:
    """Up to the first divergence a free run has the same text before it as the forced one."""
    broken = 0
    for record in records:
        same = len(record.ours) if record.parts_at is None else record.parts_at + 1
        broken += record.ours[:same] != record.forced[:same]
    return Finding(
        part="free and forced runs",
        passed=not broken,
        measured=f"{broken} prompts whose free run is not the forced one up to the first divergence",
        bound="0",
    )


def _logit_errors(records: Sequence[PromptRecord]) -> Finding:
    ours, theirs = _all(records, "our_logit_errors"), _all(records, "their_logit_errors")
    ratios = {measure: _ratio(ours, theirs, measure) for measure in ("median", "max")}
    return Finding(
        part="logit error",
        passed=all(ratio <= LOGIT_FACTOR for ratio in ratios.values()),
        measured=", ".join(f"{measure} {ratio:.2f}" for measure, ratio in ratios.items()) + " times Hugging Face's",
        bound=f"{LOGIT_FACTOR:g} times",
    )


def _margin_errors(records: Sequence[PromptRecord], measure: str) -> Finding:
    ours, theirs = _all(records, "our_errors"), _all(records, "their_errors")
    ratio = counted = _ratio(ours, theirs, measure)
    if len(ours) < FULL_STEPS and measure != "max":
        draws = np.random.default_rng(0).integers(len(ours), size=(1000, len(ours)))
        counted = float(np.percentile([_ratio(ours[draw], theirs[draw], measure) for draw in draws], 1))
    values = [np.percentile(side, _PERCENTILES[measure]) for side in (ours, theirs)]
    allowed = f", at least {counted:.2f} in 99 of 100 draws" if counted != ratio else ""
    return Finding(
        part=f"margin error, {measure}",
        passed=bool(counted <= MARGIN_FACTORS[measure]),
        measured=f"{values[0]:.3g}, Hugging Face's {values[1]:.3g}, ratio {ratio:.2f}{allowed}",
        bound=f"{MARGIN_FACTORS[measure]:g} times",
    )


def _divergences(records: Sequence[PromptRecord]) -> list[Finding]:
    """Free-running in 16 bits, and the disagreements after a first one."""
    own = [variant.gap for record in records for variant in record.variants.values()]
    bound, of = max(own, default=0.0), "Hugging Face's own largest gap"
    if not own or len(records) < FULL_PROMPTS:
        bound, of = max(bound, largest_gap(records) / GAP_FACTOR), "Hugging Face's own largest error"
    first = _gaps("first divergences", records, bound, of, [True])
    rest = _gaps("later divergences", records, largest_gap(records), chosen=[False])
    return [first, rest, _diverging_prompts(records)]


def _diverging_prompts(records: Sequence[PromptRecord]) -> Finding:
    count = sum(not record.exact for record in records)
    names = list(records[0].variants)
    own = {name: sum(record.variants[name].parts_at is not None for record in records) for name in names}
    most = max(own.values(), default=None)
    judged = most is not None and len(records) >= FULL_PROMPTS
    told = ", ".join(f"{name} {value}" for name, value in own.items())
    return Finding(
        part="diverging prompts",
        passed=count <= most if judged and most is not None else None,
        measured=f"{count} of {len(records)}" + (f"; Hugging Face against itself: {told}" if told else ""),
        bound="Hugging Face's worst pair with itself, with a base rate of 40 prompts" if not judged else str(most),
    )


def _gaps(
    part: str,
    records: Sequence[PromptRecord],
    bound: float,
    of: str = "twice Hugging Face's own largest error",
    chosen: Sequence[bool] = (True, False),
) -> Finding:
    found = [d.gap for record in records for d in record.divergences if d.first in chosen]
    explained = sum(gap <= bound for gap in found)
    return Finding(
        part=part,
        passed=explained == len(found),
        measured=f"{len(found)} in {sum(len(r.theirs) for r in records)} steps, {explained} explained"
        + (f", largest fp64 gap {max(found):.3g}" if found else ""),
        bound=f"{bound:.3g}, {of}",
    )


def _all(records: Sequence[PromptRecord], field: str) -> np.ndarray:
    return np.concatenate([getattr(record, field) for record in records])


def _ratio(ours: np.ndarray, theirs: np.ndarray, measure: str) -> float:
    """Ours over theirs; 0 over 0 is 1, a number over 0 infinite, and what is not finite is infinitely wrong."""
    if not np.isfinite(ours).all():
        return float("inf")
    a, b = (float(np.percentile(side, _PERCENTILES[measure])) for side in (ours, theirs))
    return a / b if b else (1.0 if a == b else float("inf"))
