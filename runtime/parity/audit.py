"""One audit: both models, the records of each prompt, the criterion, the checks and the negative controls."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from runtime.api import load
from runtime.checkpoint.progress import progress_bar
from runtime.hugging_face.shared_weights import hugging_face
from runtime.model.generation_config import HONOURED
from runtime.model.model import Model
from runtime.parity.comparison import BATCH, Comparison
from runtime.parity.criterion import judge, largest_gap, runs_same_operations, same_weights
from runtime.parity.hugging_face import from_folder, generation_config_of
from runtime.parity.invariances import Invariances
from runtime.parity.journal import Journal, digest
from runtime.parity.negative_controls import TOKENS, Control, control_prompts, negative_controls
from runtime.parity.oracle import Oracle
from runtime.parity.prompts import Prompt
from runtime.parity.records import Check, Fault, Finding, PromptRecord, Record
from runtime.parity.report import Report, token_texts, verdict
from runtime.parity.teacher_forcing import TeacherForcing
from runtime.sampling.processors import without_processors

SAMPLE = 8  # prompts that the invariances are checked on
SAMPLE_TOKENS = 16
Kind = TypeVar("Kind", bound=Record)


@dataclass(repr=False)
class Audit:
    """One audit, ready to run; `settings` are the environment and arguments that its records depend on."""

    model: Model
    source: str
    folder: Path
    cache: str
    prompts: list[Prompt]
    ids: list[list[int]]
    tokens: int
    base_rate: bool
    settings: dict[str, Any]
    journal: Journal
    reference: Model | None = None  # for a quantised model, a copy with its dequantised values

    def run(self, progress: bool | None) -> Report:
        """Run it; `progress` is as in `verify`, and the journal is kept."""
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if self.reference is None:
            theirs, judged = from_folder(self.folder, self.model), self.model
        else:  # Hugging Face cannot read these blocks: its model gets their values
            tied = {"tie_word_embeddings": self.reference.config.tied}
            generation_config = generation_config_of(self.folder)
            theirs = hugging_face(_config_of(self.folder) | tied, self.reference, generation_config)
            judged = self.reference
        for name in HONOURED:  # both sides without processors: what is compared is the models' own greedy choice
            setattr(theirs.generation_config, name, None)
        self.comparison = Comparison(theirs, Oracle(judged.config, judged.weights), self.cache)
        self.teacher_forcing = TeacherForcing(self.model)
        weights = same_weights(theirs, self.model)
        with progress_bar("verifying", len(self.ids) + 12, progress, "check") as bar:
            try:
                records = self._records(bar)
                same_operations = runs_same_operations(self.model)
                findings = [weights, *judge(records, self.model.runtime.dtype, same_operations=same_operations)]
                in_fp32, faults = self._negative_controls(bar)
                checks = self._checks(records, bar)
            except KeyboardInterrupt:
                if self.journal.file is not None:
                    print(f"\nprogress is in {self.journal.file}: the same command resumes from there", file=sys.stderr)
                raise
        findings += in_fp32
        outcomes = [*(finding.passed for finding in findings), *(check.passed for check in checks)]
        passed = False not in outcomes and all(fault.refused for fault in faults)
        return Report(
            passed=passed,
            verdict=verdict(passed, records, findings, checks, faults),
            environment=self.settings,
            findings=findings,
            checks=checks,
            faults=faults,
            prompts=records,
            time=started,
            texts=token_texts(records, self.model.tokenizer),
        )

    def _records(self, bar: tqdm) -> list[PromptRecord]:
        """Every prompt's record. For the base rate, Hugging Face also runs the prompts in batches of eight."""
        records: list[PromptRecord] = []
        for start in range(0, len(self.ids), BATCH):
            texts = self.ids[start : start + BATCH]
            batched = functools.cache(functools.partial(self.comparison.batch_variants, texts, self.tokens))
            for row, text in enumerate(texts):
                prompt = self.prompts[start + row]
                depends = [prompt.name, prompt.suite, texts if self.base_rate else text]
                make = functools.partial(self._record, prompt, text, row, batched)
                records.append(self._once(depends, PromptRecord, make))
                bar.update(1)
        return records

    def _record(
        self, prompt: Prompt, ids: list[int], row: int, batched: Callable[[], list[dict[str, list[int]]]]
    ) -> PromptRecord:
        variants: dict[str, list[int]] = {}
        if self.base_rate:
            variants = self.comparison.variants(self.model, ids, self.tokens) | batched()[row]
        named = {"name": prompt.name, "suite": prompt.suite}
        return self.comparison.record(self.model, self.teacher_forcing, ids, self.tokens, variants, **named)

    def _checks(self, records: list[PromptRecord], bar: tqdm) -> list[Check]:
        count = min(SAMPLE, len(records))
        sample = [records[index * len(records) // count] for index in range(count)]
        tokens = min(self.tokens, SAMPLE_TOKENS)
        invariances = Invariances(
            self.model,
            self.source,
            [record.prompt_ids for record in sample],
            [record.ours[:tokens] for record in sample],
            largest_gap(records),
            self.comparison.oracle,
        )
        checks = []
        for name, make in invariances.checks().items():
            checks.append(self._once([name, [record.prompt_ids for record in sample]], Check, make))
            bar.update(1)
        return checks

    def _negative_controls(self, bar: tqdm) -> tuple[list[Finding], list[Fault]]:
        """The planted faults and, for a 16-bit model, the criterion's findings in fp32."""
        prompts, tokens = control_prompts(self.ids, self.model), min(TOKENS, self.tokens)
        controls = [Control.on_prompts(self.model, self.comparison, prompts, tokens)]
        findings: list[Finding] = []
        if self.model.runtime.dtype != "float32":
            longest = max(map(len, prompts)) + tokens
            limits: dict[str, Any] = {"device": str(self.model.device), "eager": self.model.runtime.eager}
            in_fp32 = without_processors(
                load(self.source, dtype="float32", max_seq_len=longest, progress=False, **limits)
            )
            config = _config_of(self.folder) | {"tie_word_embeddings": in_fp32.config.tied}
            theirs = hugging_face(config, in_fp32, self.comparison.theirs.generation_config)
            comparison = Comparison(theirs, Oracle(in_fp32.config, in_fp32.weights))
            controls.append(Control.on_prompts(in_fp32, comparison, prompts, tokens))
            findings = [
                finding.model_copy(update={"part": f"in fp32: {finding.part}"}) for finding in controls[1].findings()
            ]
        faults = negative_controls(controls)
        bar.update(2)
        return findings, faults

    def _once(self, depends: Any, kind: type[Kind], make: Callable[[], Kind]) -> Kind:
        """A record from the journal, or a new one that is added to it."""
        key = digest([kind.__name__, self.settings, depends])
        known = self.journal.find(key, kind)
        if known is None:
            known = make()
            self.journal.add(key, known)
        return known


def _config_of(folder: Path) -> dict[str, Any]:
    """The checkpoint's own config of its text decoder, as Hugging Face reads it."""
    import transformers

    return transformers.AutoConfig.from_pretrained(folder).get_text_config().to_dict()
