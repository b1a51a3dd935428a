"""The parity audit: is this runtime, on this model, device and dtype, token for token what Hugging Face generates?

The prompts are read (prompts.py) and the memory is budgeted (budget.py) before a model is loaded. The audit (audit.py)
compares this runtime with Hugging Face on each prompt (comparison.py), free-running and teacher-forced on Hugging
Face's text (teacher_forcing.py), and both with an fp64 oracle (oracle.py). The criterion judges the differences
(criterion.py); the batch size, graph capture and everything else that must not change a token are varied
(invariances.py); planted faults must be refused (negative_controls.py). Finished records are kept in a journal, so that
an interrupted audit resumes (journal.py). The outcome is a report (report.py, html.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from runtime.api import load
from runtime.checkpoint import sources
from runtime.checkpoint.cache import cache_folder
from runtime.checkpoint.progress import is_shown
from runtime.engine.request import whole_number
from runtime.errors import InvalidArgument
from runtime.loading import container_of, resolve
from runtime.model.placement import Device, Dtype, resolve_dtype
from runtime.parity import budget, output_file
from runtime.parity.audit import Audit
from runtime.parity.comparison import CACHES
from runtime.parity.environment import environment
from runtime.parity.html import page
from runtime.parity.journal import Journal, digest
from runtime.parity.prompts import Prompt, given_prompts, read_ids, read_prompts, suite_prompts
from runtime.parity.reference import reference_model
from runtime.parity.report import Report
from runtime.sampling.processors import without_processors

ROWS = 8  # of the largest batch that is compared


def verify(
    source: str | os.PathLike[str] | None = None,
    *,
    prompts: str | os.PathLike[str] | Sequence[Any] | None = None,
    suite: str | None = None,
    tokens: int = 64,
    device: Device = "auto",
    dtype: Dtype = "auto",
    eager: bool = False,
    threads: int | str | None = None,
    quantize: str | None = None,
    oracle: str = "hf",
    base_rate: bool = False,
    json_path: str | os.PathLike[str] | None = None,
    html_path: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Report:
    """Audit a model against Hugging Face's greedy decoding.

    Args:
        source, device, dtype, eager, threads, quantize: as `load`; a quantised model is compared with Hugging Face's on
            the exact values of its blocks, in fp32, decoded by other code.
        prompts: a file, one prompt a line or `.jsonl` with {"prompt": text or ids}; or a list of texts or lists of
            ids. None takes the forty prompts of all suites, except those too long for the checkpoint.
        suite: one suite of ten instead: "short", "code", "multilingual" or "long".
        tokens: length of each answer; stop tokens are ignored.
        oracle: which cache Hugging Face decodes with: "hf" (its default, dynamic) or "hf-static".
        base_rate: whether to also run Hugging Face against itself on the same prompts: the other cache, eager
            attention, batches of 8.
        json_path, html_path: where to write the report. The journal of an unfinished audit is kept in the cache folder.
        progress: whether to show the memory plan and a progress bar on stderr; None shows them on a terminal.

    Returns:
        The report, ready to print; its `passed` says whether every token is equal or every difference explained.

    Raises:
        FileNotFoundError, CheckpointError: as `load`.
        NotEnoughMemory: both models and the oracle do not fit together; no weight has been read.
        ValueError, TypeError: an argument is out of range, or the installed transformers cannot be the oracle.
        OSError: a prompts file cannot be read, or a report cannot be written; the journal is kept.
    """
    tokens = whole_number("tokens", tokens, least=1)
    if oracle not in CACHES:
        raise InvalidArgument(f"oracle: expected one of {', '.join(CACHES)}, got {oracle!r}")
    if quantize is not None and resolve_dtype(dtype) not in ("auto", "float32"):
        raise InvalidArgument(
            f'dtype must be "auto" or "float32" with quantize={quantize!r}, in which quantised models are audited, got '
            f"{dtype!r}"
        )
    chosen = _choose(prompts, suite)
    output_file.check_writable(*(path for path in (json_path, html_path) if path is not None))
    journals = cache_folder() / "verify"

    source = sources.default_source() if source is None else source
    choices: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "eager": eager,
        "threads": threads,
        "progress": progress,
    }
    found = resolve(source, quantize=quantize, **choices)
    folder, quantize = found.source.folder, found.runtime.quantize
    ids = read_ids(chosen, folder, str(source))
    if prompts is None:  # keeps the suites' prompts that fit the checkpoint
        room = found.config.max_position_embeddings - tokens
        fitting = [index for index, text in enumerate(ids) if len(text) <= room] or range(len(ids))
        chosen, ids = [chosen[index] for index in fitting], [ids[index] for index in fitting]
    limits: dict[str, Any] = {
        **choices,
        "quantize": quantize,
        "max_seq_len": max(map(len, ids)) + tokens,
        "max_batch": ROWS,
    }
    resolved = resolve(source, **limits)
    if resolved.runtime.quantize is None and (container := container_of(folder)):
        raise InvalidArgument(
            f'dtype must be "auto" or "float32" and device "cpu" to audit {container}\'s integers, got '
            f"{resolved.runtime.dtype!r} and {resolved.runtime.device!r}"
        )
    needed = budget.plan(resolved, limits["max_seq_len"], tokens)
    if is_shown(progress):
        print(f"{resolved.name}: {needed}", file=sys.stderr)
    budget.check_fits(needed, torch.device(resolved.runtime.device))

    model, reference = without_processors(load(source, **limits)), None
    if model.runtime.quantize is not None:
        resolved = resolve(source, **limits)  # again: its weights may have been downloaded since
        reference = reference_model(model, resolved)
    weights = (
        {file for tensor in resolved.stored.values() for file in tensor.files}
        if reference
        else folder.glob("*.safetensors")
    )
    settings = {**environment(model, folder, weights, oracle), "tokens": tokens, "base_rate": base_rate}
    journal = Journal(journals / f"{digest([settings, ids])}.jsonl")
    audit = Audit(model, str(source), folder, oracle, chosen, ids, tokens, base_rate, settings, journal, reference)
    report = audit.run(progress)
    if json_path is not None:
        output_file.write(Path(json_path), report.to_json())
    if html_path is not None:
        output_file.write(Path(html_path), page(report))
    journal.remove()
    return report


def _choose(prompts: Any, suite: str | None) -> list[Prompt]:
    if prompts is not None and suite is not None:
        raise InvalidArgument(f"expected prompts or a suite, got both: {prompts!r} and {suite!r}")
    if prompts is None:
        return suite_prompts(suite)
    return read_prompts(Path(prompts)) if isinstance(prompts, str | os.PathLike) else given_prompts(prompts)
