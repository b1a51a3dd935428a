"""The criterion: when do tokens count as Hugging Face's?

fp32: tokens equal Hugging Face's. At a mismatch the fp64 logits of the two tokens differ by at most twice Hugging
Face's own largest error, and logit errors are at most four times Hugging Face's.
16 bits: teacher-forced on Hugging Face's text, our error on the margin between the top two tokens has a median and a
99th percentile of at most 1.25 times Hugging Face's, and a maximum of at most twice. Free-running, a first divergence
has an fp64 gap of at most Hugging Face's own largest, unless fp64 prefers our token: then Hugging Face's error is at
least the gap. No more prompts diverge than when Hugging Face is run against itself. Where our operations are Hugging
Face's own, in its order, tokens must be equal.

Every bound is a multiple of an error of Hugging Face's in the same run. The factors are meant for 40 prompts of 64
tokens. With fewer, chance moves a percentile by more than a quarter, so the ratio is bootstrapped and passes unless it
exceeds the factor in 99 of 100 draws.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from packaging.version import Version

from runtime.hugging_face.shared_weights import named_weights
from runtime.kernels.launch import INTERPRETING
from runtime.model.model import Model
from runtime.parity.records import Divergence, Finding, PromptRecord

FULL_PROMPTS, FULL_STEPS = 40, 2560
MARGIN_FACTORS = {"median": 1.25, "p99": 1.25, "max": 2.0}
LOGIT_FACTOR = 4.0
GAP_FACTOR = 2.0
_PERCENTILES = {"median": 50, "p99": 99, "max": 100}


def runs_same_operations(model: Model) -> bool:
    """Whether decoding consists of Hugging Face's own operations in its order, so that 16-bit tokens are equal too."""
    # Before transformers 5.23, fused attention under a mask groups query heads differently.
    masked_groups = model.config.family == "gemma3" and any(
        layer.heads != layer.kv_heads for layer in model.config.layers
    )
    same_order = not masked_groups or Version(importlib.metadata.version("transformers")) >= Version("5.23")
    return model.device.type == "cpu" and model.runtime.eager and not INTERPRETING and same_order


def judge(records: Sequence[PromptRecord], dtype: str, *, same_operations: bool = False) -> list[Finding]:
    """Apply the criterion to some prompts.

    Args:
        records: at least one.
        dtype: the model's, "float32", "bfloat16" or "float16".
        same_operations: what `runs_same_operations` says of the model.
    """
    findings = [_same_model(records), _greedy_rule(records), _forced_is_free(records), _logit_errors(records)]
    if dtype == "float32":
        return [*findings, _gaps("fp32 tokens", records, dtype)]
    findings += [_margin_errors(records, measure) for measure in MARGIN_FACTORS]
    if same_operations:
        exact = sum(record.exact and record.forced == record.theirs for record in records)
        measured = f"{exact} of {len(records)} prompts equal"
        findings.append(Finding(part="equal tokens", passed=exact == len(records), measured=measured, bound="all"))
        return findings
    first = _gaps("first divergences", records, dtype, [True])
    rest = _gaps("later divergences", records, dtype, [False])
    return [*findings, first, rest, _diverging_prompts(records)]


def gap_bound(records: Sequence[PromptRecord], dtype: str, *, first: bool = True) -> tuple[float, str]:
    """The fp64 gap up to which a divergence counts as explained, and what that bound is, in words.

    Args:
        records, dtype: as in `judge`.
        first: whether the divergence is its prompt's first, whose bound is narrower in 16 bits.
    """
    if dtype == "float32" or not first:
        return largest_gap(records), "twice Hugging Face's own largest error"
    own = [variant.gap for record in records for variant in record.variants.values()]
    bound, bound_name = max(own, default=0.0), "Hugging Face's own largest gap"
    if not own or len(records) < FULL_PROMPTS:
        bound, bound_name = max(bound, largest_gap(records) / GAP_FACTOR), "Hugging Face's own largest error"
    return bound, bound_name


def is_explained(divergence: Divergence, bound: float, dtype: str) -> bool:
    """Whether a divergence says nothing against us: its gap is within `gap_bound`, or fp64 prefers our token. The
    latter does not count in fp32, where a gap larger than Hugging Face's errors means that the two run different
    models."""
    ours, theirs = divergence.true_pair
    return divergence.gap <= bound or (dtype != "float32" and ours >= theirs)


def largest_gap(records: Sequence[PromptRecord]) -> float:
    """The fp64 gap up to which either of two tokens may be picked: twice Hugging Face's largest error."""
    return GAP_FACTOR * float(_all(records, "their_errors").max())


def same_weights(theirs: Any, model: Model) -> Finding:
    """Whether Hugging Face and this runtime have read the same weights from the checkpoint, bit for bit."""
    stored = theirs.state_dict()
    different, weights = [], named_weights(model)
    for name, ours in weights.items():
        # A multimodal checkpoint keeps its decoder under another prefix.
        their = stored.get(name, stored.get(name.replace("model.", "model.language_model.", 1)))
        if ours is None or their is None or not torch.equal(ours, their):
            different.append(name)
    count = len(weights)
    return Finding(
        part="weights",
        passed=not different,
        measured=f"{count - len(different)} of {count} tensors equal" + (f", not {different[0]}" if different else ""),
        bound="all",
    )


def _same_model(records: Sequence[PromptRecord]) -> Finding:
    """Hugging Face must be about as near to the fp64 logits as we are. If it is not, it runs another model, and bounds
    that are multiples of its errors would allow anything."""
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
        measured=f"{broken} steps whose token is not the first argmax of the logits",
        bound="0",
    )


def _forced_is_free(records: Sequence[PromptRecord]) -> Finding:
    """Up to the first divergence, the free run and the teacher-forced one have read the same text."""
    broken = 0
    for record in records:
        same = len(record.ours) if record.parts_at is None else record.parts_at + 1
        broken += record.ours[:same] != record.forced[:same]
    return Finding(
        part="free and forced runs",
        passed=not broken,
        measured=f"{broken} prompts whose free run differs from the forced one before the first divergence",
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


def _diverging_prompts(records: Sequence[PromptRecord]) -> Finding:
    count = sum(not record.exact for record in records)
    names = list(records[0].variants)
    own = {name: sum(record.variants[name].parts_at is not None for record in records) for name in names}
    most = max(own.values(), default=None)
    judged = most is not None and len(records) >= FULL_PROMPTS
    base_rate = ", ".join(f"{name} {value}" for name, value in own.items())
    return Finding(
        part="diverging prompts",
        passed=count <= most if judged and most is not None else None,
        measured=f"{count} of {len(records)}" + (f"; Hugging Face against itself: {base_rate}" if base_rate else ""),
        bound="Hugging Face's worst pair with itself, with a base rate of 40 prompts" if not judged else str(most),
    )


def _gaps(part: str, records: Sequence[PromptRecord], dtype: str, chosen: Sequence[bool] = (True, False)) -> Finding:
    bound, bound_name = gap_bound(records, dtype, first=True in chosen)
    divergences = [d for record in records for d in record.divergences if d.first in chosen]
    explained, gaps = sum(is_explained(d, bound, dtype) for d in divergences), [d.gap for d in divergences]
    return Finding(
        part=part,
        passed=explained == len(gaps),
        measured=f"{len(gaps)} in {sum(len(r.theirs) for r in records)} steps, {explained} explained"
        + (f", largest fp64 gap {max(gaps):.3g}" if gaps else ""),
        bound=f"{bound:.3g}, {bound_name}",
    )


def _all(records: Sequence[PromptRecord], field: str) -> np.ndarray:
    return np.concatenate([getattr(record, field) for record in records])


def _ratio(ours: np.ndarray, theirs: np.ndarray, measure: str) -> float:
    """Ours over theirs; 0 / 0 is 1, anything else / 0 is infinite, and so is a ratio where ours is not finite."""
    if not np.isfinite(ours).all():
        return float("inf")
    a, b = (float(np.percentile(side, _PERCENTILES[measure])) for side in (ours, theirs))
    return a / b if b else (1.0 if a == b else float("inf"))
