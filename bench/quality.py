"""What each format of a model's weights costs in quality: the perplexity of a text, and two tasks of
lm-evaluation-harness.

    python -m runtime.bench.quality --out bench/results/quality-cpu.json

All texts come from Python itself: they are in English, with some code, and part of every Python. The report has the
text's SHA-256, since Python's versions differ.

- Perplexity is measured on the Zen of Python, then the docstrings of the modules in MODULES, in that order, read from
  their source files and separated by an empty line. Its first tokens are cut into windows, each of which begins with
  BOS and is scored alone. Perplexity is e to the mean of -ln p over all tokens but BOS.
- `last_word`: how often the likeliest tokens are the last word of a docstring's paragraph, after the text before it.
- `docstring`: how often the likeliest of four docstrings, by characters (acc_norm), is the one of a function whose
  `def` line is given; the other three are of functions near it in the list.

Both tasks use functions and paragraphs of the whole standard library, evenly spread over them, and are run by the
harness on `runtime.lm_eval` (extra `eval`).

Q8_0 and Q4_0 are the files that `gemma-runtime quantize` writes, read back in their blocks; int8 and int4 are quantised
at load. For a GGUF model, such as the demo, they are made from its own values, and the file itself is "own"; bf16 has
those values rounded.
"""

from __future__ import annotations

import ast
import codecs
import functools
import hashlib
import json
import math
import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import runtime
from runtime.bench.experiment import parser, publish
from runtime.checkpoint import sources
from runtime.cli import quantize
from runtime.model.model import Model

MODULES = ("socketserver", "statistics", "fileinput", "site", "shelve", "cmd", "timeit", "copy", "heapq", "sched", "io")
OWN = "own"
FORMATS: dict[str, dict[str, Any]] = {  # what `load` is given
    "bf16": {"dtype": "bfloat16"},
    OWN: {"quantize": "gguf"},
    "Q8_0": {"quantize": "gguf"},
    "Q4_0": {"quantize": "gguf"},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
}
# Tasks in the harness's terms, without their rows.
TASKS: dict[str, dict[str, Any]] = {
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{before}}",
        "doc_to_target": " {{word}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
    "docstring": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{definition}}\n   ",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc_norm"}],
    },
}
CHOICES = 4
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every format; returns the exit code."""
    sizes = {
        "tokens": (4096, 3, "tokens of the text"),
        "window": (512, 3, "tokens scored at once"),
        "questions": (200, 1, "questions of each task"),
    }
    options = parser(__doc__, None, **sizes).parse_args(arguments)
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }  # before the harness is imported, so that it stays offline
    given = text()
    rows = {"last_word": last_words(options.questions), "docstring": docstrings(options.questions)}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, how in FORMATS.items():
            source = _source(options.model, name, Path(folder))
            if source is not None:
                found[name] = _measured(source, how, given, rows, options.tokens, options.window)
                print(f"{name}: {found[name]}", file=sys.stderr)
    asked = {name: {"questions": len(its), "sha256": _sha256(json.dumps(its))} for name, its in rows.items()}
    publish(
        "quality",
        options,
        {"text": {"modules": MODULES, "sha256": _sha256(given)}, "tasks": asked, "formats": found},
    )
    return 0


def text() -> str:
    """The Zen of Python and the modules' docstrings."""
    library = _library()
    parsed = {name: ast.parse((library / f"{name}.py").read_text(encoding="utf-8")) for name in ("this", *MODULES)}
    zen = next(
        node.value.value
        for node in parsed.pop("this").body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    )
    return "\n\n".join([codecs.decode(str(zen), "rot13"), *(ast.get_docstring(tree) or "" for tree in parsed.values())])


def last_words(most: int) -> list[dict[str, Any]]:
    """Paragraphs of 20 to 60 words, each as the text before its last word, and that word."""
    found: dict[str, str] = {}
    for node in _documented():
        for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
            words = paragraph.split()
            if 20 <= len(words) <= 60 and re.fullmatch(r"[a-z]{3,}\.", words[-1]):
                found[" ".join(words[:-1])] = words[-1][:-1]
    return _spread([{"before": before, "word": word} for before, word in found.items()], most)


def docstrings(most: int) -> list[dict[str, Any]]:
    """Functions' `def` lines, each with the first lines of four docstrings and the place of its own among them."""
    found: dict[str, str] = {}
    for node in _documented():
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            summary = (ast.get_docstring(node) or "").split("\n")[0]
            if 5 <= len(summary.split()) <= 20 and summary not in found.values():
                found[f"def {node.name}({ast.unparse(node.args)}):"] = summary
    summaries = list(found.values())
    rows = []
    for place, (definition, summary) in enumerate(found.items()):
        others = [summaries[(place + step) % len(summaries)] for step in range(1, CHOICES)]
        answer = place % CHOICES
        choices = [f'"""{choice}' for choice in (*others[:answer], summary, *others[answer:])]
        rows.append({"definition": definition, "choices": choices, "answer": answer})
    return _spread(rows, most)


def perplexity(model: Model, windows: Sequence[list[int]]) -> float:
    """The perplexity of windows of ids, each scored from its second token on."""
    total = 0.0
    for window in windows:
        result = runtime.generate(model, window, max_new_tokens=1, prompt_logprobs=1, reuse=False)
        assert result.prompt_logprobs is not None
        total -= sum(scored.logprob for scored in result.prompt_logprobs if scored is not None)
    return math.exp(total / sum(len(window) - 1 for window in windows))


def scores(evaluated: Any, rows: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The metrics of the harness's tasks, with their standard errors: "last_word acc", "last_word acc_stderr", ...

    Args:
        evaluated: a model of the harness.
        rows: the questions of each of TASKS.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        tasks = []
        for name, its in rows.items():
            file = Path(folder, f"{name}.jsonl")
            file.write_text("".join(f"{json.dumps(row)}\n" for row in its), encoding="utf-8")
            files = {"data_files": str(file), "cache_dir": folder}
            data = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "train"}
            tasks.append({"task": name, **data, **TASKS[name]})
        manager = TaskManager(include_defaults=False)  # the harness's own thousands of tasks are not read
        results = lm_eval.simple_evaluate(evaluated, tasks=tasks, task_manager=manager, bootstrap_iters=1000)["results"]
    return {
        f"{name} {metric.removesuffix(',none')}": value
        for name in rows
        for metric, value in results[name].items()
        if metric.endswith(",none")
    }


def _measured(
    source: str, how: dict[str, Any], given: str, rows: dict[str, list[dict[str, Any]]], tokens: int, window: int
) -> dict[str, Any]:
    """One format's perplexity, scores and bytes."""
    from runtime.lm_eval import GemmaRuntimeLM

    evaluated = GemmaRuntimeLM(source, device="cpu", max_length=window, softmax_dtype="float32", **how)
    model = evaluated.model
    with model:
        windows = _windows(model, given, tokens, window)
        return {
            "weight_bytes": model.weights.nbytes,
            "scored": sum(len(ids) - 1 for ids in windows),
            "perplexity": perplexity(model, windows),
            **scores(evaluated, rows),
        }


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


@functools.cache
def _documented() -> list[ast.Module | ast.ClassDef | ast.FunctionDef]:
    """The standard library's modules, in the order of their names, each followed by its classes and functions."""
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in sorted(_library().glob("*.py")))
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)]


def _spread(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most `most` of the rows, evenly spread."""
    count = min(most, len(rows))
    return [rows[place * len(rows) // count] for place in range(count)]


def _windows(model: Model, given: str, tokens: int, size: int) -> list[list[int]]:
    """The first `tokens` ids of a text in windows of `size`, BOS and room for a new token included."""
    bos, *ids = model.tokenizer.encode(given)[:tokens]
    step = size - 2
    return [[bos, *ids[start : start + step]] for start in range(0, len(ids), step)]


def _sha256(given: str) -> str:
    return hashlib.sha256(given.encode()).hexdigest()


def _source(model: str, name: str, folder: Path) -> str | None:
    """What a format is loaded from; None where a model has no blocks of its own."""
    if name == OWN and not sources.is_gguf_file(model):
        return None
    if name not in ("Q8_0", "Q4_0"):
        return model
    quantize.write(model, name.lower(), folder / f"{name}.gguf", progress=False)
    return str(folder / f"{name}.gguf")


if __name__ == "__main__":
    sys.exit(main())
