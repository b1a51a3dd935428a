"""The parity audit: is this runtime, on this model, device and dtype, token for token what Hugging Face generates?

The prompts are read (audit/prompts.py) and the memory planned (audit/budget.py); both models are loaded, and each
prompt is run on both sides, free and after Hugging Face's own text, with the fp64 oracle as judge (audit/sides.py,
audit/forced.py, oracle.py). The criterion answers (audit/criterion.py); what may not change a token is tried
(audit/invariances.py); faults are planted, which must be refused (audit/power.py). What is done is kept in a journal,
so that an interrupted audit goes on where it stood (audit/journal.py).
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from runtime.checkpoint import sources
from runtime.checkpoint.cache import cache_folder
from runtime.engine.request import whole_number
from runtime.errors import InvalidArgument, OutputError
from runtime.loading import examine, load, read_config
from runtime.model.config import MAX_BATCH
from runtime.model.model import Model
from runtime.model.progress import ProgressBar
from runtime.parity import budget
from runtime.parity.criterion import judge, largest_gap, runs_its_operations, same_weights, summary
from runtime.parity.environment import environment
from runtime.parity.forced import Forced
from runtime.parity.hugging_face import from_folder, hugging_face
from runtime.parity.invariances import Invariances
from runtime.parity.journal import Journal, digest
from runtime.parity.negative_controls import TOKENS, Probe, planted, probe_prompts
from runtime.parity.oracle import Oracle
from runtime.parity.prompts import Prompt, given_prompts, read_ids, read_prompts, suite_prompts
from runtime.parity.records import Check, Fault, Finding, PromptRecord, Record, Report
from runtime.parity.report import write_html, write_json
from runtime.parity.sides import BATCH, CACHES, Sides

SAMPLE = 8  # prompts that the invariances are tried on
SAMPLE_TOKENS = 16
Kind = TypeVar("Kind", bound=Record)


def verify(
    source: str | os.PathLike[str] | None = None,
    *,
    prompts: str | os.PathLike[str] | Sequence[Any] | None = None,
    suite: str | None = None,
    tokens: int = 64,
    device: str = "auto",
    dtype: str = "auto",
    eager: bool = False,
    threads: int | str | None = None,
    oracle: str = "hf",
    base_rate: bool = False,
    json_path: str | os.PathLike[str] | None = None,
    html_path: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Report:
    """Audit a model against Hugging Face's greedy decoding.

    Args:
        source, device, dtype, eager, threads: as `load`.
        prompts: a file, one prompt a line or `.jsonl` with {"prompt": text or ids}; or a list of texts or lists of
            ids. None takes the forty prompts of all suites, or those of them that the checkpoint has room for.
        suite: one suite of ten instead: "short", "code", "multilingual" or "long".
        tokens: of each answer; stop tokens are ignored.
        oracle: which cache Hugging Face decodes with: "hf" (its default, dynamic) or "hf-static".
        base_rate: whether to run Hugging Face against itself on the same prompts too: the other cache, eager attention,
            batches of 8.
        json_path, html_path: where to write the report; the progress of an unfinished audit is kept beside the former,
            else in the cache folder.
        progress: whether to show the memory plan and a progress bar on stderr; None shows them on a terminal.

    Returns:
        The report; its `passed` says whether every token is equal or every difference explained, `print` shows it.

    Raises:
        FileNotFoundError, CheckpointError: as `load`.
        NotEnoughMemory: both models and the oracle do not fit together; nothing has been read.
        ValueError, TypeError: an argument is out of range, or the installed transformers cannot be the oracle.
        OSError: a prompts file cannot be read, or a report not written; the journal is kept.
    """
    tokens = whole_number("tokens", tokens, least=1)
    if oracle not in CACHES:
        raise InvalidArgument(f"oracle: expected one of {', '.join(CACHES)}, got {oracle!r}")
    chosen = _choose(prompts, suite)
    for path in (json_path, html_path):
        _check_writable(path)

    source = sources.default_source() if source is None else source
    folder = sources.locate(source, progress).folder
    ids = read_ids(chosen, folder, str(source))
    if prompts is None:  # of the suites' own prompts, those that the checkpoint has room for
        room = read_config(folder).max_position_embeddings - tokens
        fitting = [index for index, text in enumerate(ids) if len(text) <= room] or range(len(ids))
        chosen, ids = [chosen[index] for index in fitting], [ids[index] for index in fitting]
    limits: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "eager": eager,
        "threads": threads,
        "progress": progress,
    }
    limits |= {"max_seq_len": max(map(len, ids)) + tokens, "max_batch": MAX_BATCH}
    found = examine(source, **limits)
    needed = budget.plan(found, limits["max_seq_len"], tokens)
    if sys.stderr is not None and (sys.stderr.isatty() if progress is None else progress):
        print(f"{found.name}: {needed}", file=sys.stderr)
    budget.check_fits(needed, torch.device(found.runtime.device))

    model = load(source, **limits)
    settings = {**environment(model, folder, oracle), "tokens": tokens, "base_rate": base_rate}
    default = cache_folder() / "verify" / f"{digest([settings, ids])}.jsonl"
    journal = Journal(Path(f"{os.fspath(json_path)}.progress") if json_path else default)
    audit = _Audit(model, str(source), folder, oracle, chosen, ids, tokens, base_rate, settings, journal)
    report = audit.run(progress)
    for path, write in ((json_path, write_json), (html_path, write_html)):
        if path is not None:
            write(report, Path(path), model.tokenizer)
    journal.remove()
    return report


@dataclass(repr=False)
class _Audit:
    """One audit under way."""

    model: Model
    source: str
    folder: Path
    cache: str
    chosen: list[Prompt]
    ids: list[list[int]]
    tokens: int
    base_rate: bool
    settings: dict[str, Any]
    journal: Journal

    def run(self, progress: bool | None) -> Report:
        theirs = from_folder(self.folder, self.model)
        self.sides = Sides(theirs, Oracle(self.model.config, self.model.weights), self.cache)
        self.forced = Forced(self.model)
        weights = same_weights(theirs, self.model)
        with ProgressBar("verifying", len(self.ids) + 12, progress) as bar:
            try:
                records = self._records(bar)
                findings = [weights, *judge(records, self.model.runtime.dtype, its_operations=self._its_operations)]
                in_fp32, faults = self._power(bar)
                checks = self._checks(records, bar)
            except KeyboardInterrupt:
                print(f"\nkept in {self.journal.file}: the same command goes on from there", file=sys.stderr)
                raise
        findings += in_fp32
        answers = [*(found.passed for found in findings), *(check.passed for check in checks)]
        passed = False not in answers and all(fault.refused for fault in faults)
        return Report(
            passed=passed,
            verdict=summary(passed, records, findings, checks, faults),
            environment=self.settings,
            findings=findings,
            checks=checks,
            faults=faults,
            prompts=records,
        )

    @property
    def _its_operations(self) -> bool:
        return runs_its_operations(self.model)

    def _records(self, bar: ProgressBar) -> list[PromptRecord]:
        """Every prompt's record. With a base rate eight prompts at a time, as Hugging Face runs them in a batch."""
        records: list[PromptRecord] = []
        for start in range(0, len(self.ids), BATCH):
            texts = self.ids[start : start + BATCH]
            together = functools.cache(functools.partial(self.sides.together, texts, self.tokens))
            for row, text in enumerate(texts):
                prompt = self.chosen[start + row]
                depends = [prompt.name, prompt.suite, texts if self.base_rate else text]
                make = functools.partial(self._record, prompt, text, row, together)
                records.append(self._once(depends, PromptRecord, make))
                bar.advance(1)
        return records

    def _record(
        self, prompt: Prompt, ids: list[int], row: int, together: Callable[[], list[dict[str, list[int]]]]
    ) -> PromptRecord:
        variants: dict[str, list[int]] = {}
        if self.base_rate:
            variants = self.sides.variants(self.model, ids, self.tokens) | together()[row]
        named = {"name": prompt.name, "suite": prompt.suite}
        return self.sides.record(self.model, self.forced, ids, self.tokens, variants, **named)

    def _checks(self, records: list[PromptRecord], bar: ProgressBar) -> list[Check]:
        count = min(SAMPLE, len(records))
        sample = [records[index * len(records) // count] for index in range(count)]
        tokens = min(self.tokens, SAMPLE_TOKENS)
        invariances = Invariances(
            self.model,
            self.source,
            [record.prompt_ids for record in sample],
            [record.ours[:tokens] for record in sample],
            largest_gap(records),
            self.sides.oracle,
        )
        checks = []
        for name, make in invariances.checks().items():
            checks.append(self._once([name, [record.prompt_ids for record in sample]], Check, make))
            bar.advance(1)
        return checks

    def _power(self, bar: ProgressBar) -> tuple[list[Finding], list[Fault]]:
        """The findings in fp32 beside a 16-bit run, and the planted faults."""
        prompts, tokens = probe_prompts(self.ids, self.model), min(TOKENS, self.tokens)
        probes = [Probe.of(self.model, self.sides, prompts, tokens)]
        findings: list[Finding] = []
        if self.model.runtime.dtype != "float32":
            longest = max(map(len, prompts)) + tokens
            limits: dict[str, Any] = {"device": str(self.model.device), "eager": self.model.runtime.eager}
            wide = load(self.source, dtype="float32", max_seq_len=longest, progress=False, **limits)
            given = _config_of(self.folder) | {"tie_word_embeddings": wide.config.tied}
            theirs = hugging_face(given, wide, self.sides.theirs.generation_config)
            probes.append(Probe.of(wide, Sides(theirs, Oracle(wide.config, wide.weights)), prompts, tokens))
            in_fp32 = (found.model_copy(update={"part": f"in fp32: {found.part}"}) for found in probes[1].findings())
            findings = list(in_fp32)
        faults = planted(probes)
        bar.advance(2)
        return findings, faults

    def _once(self, depends: Any, kind: type[Kind], make: Callable[[], Kind]) -> Kind:
        """A record from the journal, or made and kept there."""
        key = digest([kind.__name__, self.settings, depends])
        known = self.journal.find(key, kind)
        if known is None:
            known = make()
            self.journal.add(key, known)
        return known


def _choose(prompts: Any, suite: str | None) -> list[Prompt]:
    if prompts is not None and suite is not None:
        raise InvalidArgument(f"expected prompts or a suite, got both: {prompts!r} and {suite!r}")
    if prompts is None:
        return suite_prompts(suite)
    return read_prompts(Path(prompts)) if isinstance(prompts, str | os.PathLike) else given_prompts(prompts)


def _config_of(folder: Path) -> dict[str, Any]:
    """The checkpoint's own config of its text decoder, as Hugging Face reads it."""
    import transformers

    return transformers.AutoConfig.from_pretrained(folder).get_text_config().to_dict()


def _check_writable(path: str | os.PathLike[str] | None) -> None:
    """An audit takes long: that its report can be written is found out first."""
    if path is None:
        return
    folder = Path(path).absolute().parent
    if Path(path).is_dir():
        raise OutputError(f"cannot write the report {os.fspath(path)}: it is a folder")
    if not folder.is_dir():
        raise OutputError(f"cannot write the report {os.fspath(path)}: no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write the report {os.fspath(path)}: no permission to write in {folder}")
