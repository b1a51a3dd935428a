"""The quick audit: the criterion on a loaded model and random ids, in seconds. Models that fail are not benchmarked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from runtime.engine.request import whole_number
from runtime.errors import InvalidArgument
from runtime.generation import generate
from runtime.hugging_face.shared_weights import hugging_face
from runtime.model.model import Model
from runtime.parity.comparison import Comparison
from runtime.parity.criterion import judge, runs_same_operations
from runtime.parity.hugging_face import hf_config
from runtime.parity.oracle import Oracle
from runtime.parity.records import Finding
from runtime.parity.report import verdict
from runtime.parity.teacher_forcing import TeacherForcing

WINDOW = 1024  # longer windows are not filled


@dataclass(frozen=True)
class QuickAudit:
    """Whether a loaded model may be trusted with a benchmark: `verdict` is one line, `details` plain values."""

    passed: bool
    verdict: str
    details: dict[str, Any]


def quick_audit(model: Model, *, prompts: int = 2, tokens: int = 16) -> QuickAudit:
    """Audit a loaded model on random ids, in seconds: against Hugging Face's model on the same weights, by the
    criterion of `verify`; and, where the model takes batches, a batch of rows against each row alone.

    Args:
        model: any device and dtype; it needs no tokenizer. Hugging Face's config is derived from the model's, while
            `verify` reads the checkpoint's own.
        prompts: how many, at least 1; every second one is longer than the sliding window, where that is at most 1024
            and fits the model.
        tokens: length of each answer, at least 1.

    Raises:
        ValueError, TypeError: the numbers are out of range, or max_seq_len leaves no room for tokens.
        RuntimeError: this thread has an unfinished stream on the model.
    """
    prompts, tokens = (whole_number(*number, least=1) for number in (("prompts", prompts), ("tokens", tokens)))
    room = model.runtime.max_seq_len - tokens
    if room < 1:
        raise InvalidArgument(f"tokens must leave room in max_seq_len = {model.runtime.max_seq_len}, got {tokens}")
    window = max((w for layer in model.config.layers if (w := layer.window) is not None and w <= WINDOW), default=64)
    lengths = [min(room, (16 + index, window + 8 + index)[index % 2]) for index in range(prompts)]
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(model.config.vocab, (length,), generator=generator).tolist() for length in lengths]

    comparison = Comparison(hugging_face(hf_config(model.config), model), Oracle(model.config, model.weights))
    teacher_forcing = TeacherForcing(model)
    records = [comparison.record(model, teacher_forcing, text, tokens) for text in texts]
    findings = judge(records, model.runtime.dtype, same_operations=runs_same_operations(model))
    rows = min(model.runtime.max_batch, len(texts))
    if rows > 1:
        together = generate(model, texts[:rows], max_new_tokens=tokens, ignore_eos=True)
        same = sum(list(row.token_ids) == record.ours for row, record in zip(together, records, strict=False))
        findings.append(
            Finding(part="rows of a batch", passed=same == rows, measured=f"{same} of {rows} equal alone", bound="all")
        )
    passed = all(finding.passed is not False for finding in findings)
    return QuickAudit(
        passed=passed,
        verdict=verdict(passed, records, findings),
        details={"prompt_lengths": lengths, "findings": [finding.model_dump() for finding in findings]},
    )
