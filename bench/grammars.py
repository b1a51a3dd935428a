"""What it takes to keep answers to a grammar, on a real vocabulary; beside xgrammar where that is installed.

    python -m runtime.bench.grammars --out bench/results/grammars-cpu.json

For each grammar: the time to compile it and, for each token of a text that follows it, the time to accept the token and
find what may come next (a step), and to mask logits by that. xgrammar gets the same bytes of tokens, one thread, and
allows at most one blank between the parts of a JSON text. No model runs, one thread does all of it, and
times are a core's, so other processes hardly count.

Progress goes to stderr; the report, JSON, is written to FILE and its last line to stdout.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from runtime.bench.environment import environment
from runtime.bench.output import publish
from runtime.cli.arguments import whole
from runtime.loading import resolve
from runtime.sampling.grammar import Grammars, Matcher
from runtime.sampling.response_format import read_response_format
from runtime.text.tokenizer import Tokenizer

COMPILED = 5  # times each grammar is compiled
_PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "student": {"type": "boolean"}},
    "required": ["name", "age", "student"],
    "additionalProperties": False,
}
_WORK = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 80},
        "kind": {"enum": ["book", "film", "song", "game"]},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 5},
        "authors": {"type": "array", "items": {"$ref": "#/$defs/author"}},
        "rating": {"type": "number", "minimum": 0, "maximum": 10},
    },
    "required": ["title", "kind", "tags", "authors", "rating"],
    "additionalProperties": False,
    "$defs": {
        "author": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "born": {"type": "string", "format": "date"},
                "role": {"enum": ["writer", "editor"]},
            },
            "required": ["name", "role"],
            "additionalProperties": False,
        }
    },
}
_NODE = {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#"}}}
_TREE = {"type": "object", "properties": _NODE, "required": list(_NODE), "additionalProperties": False}
_SUM = 'root ::= term (("+" | "-") term)*\nterm ::= factor (("*" | "/") factor)*\nfactor ::= [0-9]+ | "(" root ")"\n'
# A response format and a text that follows it.
GRAMMARS: dict[str, tuple[dict[str, Any], str]] = {
    "small object": (_PERSON, '{"name": "Søren Kierkegaard 雪", "age": 42, "student": false}'),
    "nested object": (
        _WORK,
        '{"title": "The Left Hand of Darkness", "kind": "book", "tags": ["science fiction", "classic"], "authors": '
        '[{"name": "Ursula K. Le Guin", "born": "1929-10-21", "role": "writer"}, {"name": "Terry Carr", "role": '
        '"editor"}], "rating": 9.1}',
    ),
    "any JSON object": (
        {"type": "object"},
        '{"a": [1, 2.5, null, true, {"b": "a longer string with \\"quotes\\"\\n"}], "nested": {"deep": [[], {}]}}',
    ),
    "tree": (_TREE, '{"value": 1, "children": [{"value": -30, "children": [{"value": 4, "children": []}]}]}'),
    "regular expression": (
        {"regex": "[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]T[0-9]{2}:[0-9]{2} [A-Za-z ]{3,40}"},
        "2024-02-29T23:59 a quiet evening by the sea",
    ),
    "recursive grammar": ({"grammar": _SUM}, "12*(3+4*(5-6))-7/(8+9)"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and reports.

    Args:
        arguments: the command line without the program's name; None takes the process's own.

    Returns:
        The exit code, 0.
    """
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    found = resolve(options.model, device="cpu", progress=False)
    tokenizer = found.tokenizer
    if tokenizer is None:
        raise SystemExit(f"{options.model} has no tokenizer")
    libraries: dict[str, Callable[..., dict[str, Any]]] = {"llguidance": _ours}
    if importlib.util.find_spec("xgrammar") is not None:
        libraries["xgrammar"] = _xgrammars
    report: dict[str, Any] = {
        "benchmark": "grammars",
        "model": options.model,
        "vocab": tokenizer.vocab_size,
        "rounds": options.repeat,
        "environment": environment(torch.device("cpu")).model_dump(mode="json"),
    }
    for name, measure in libraries.items():
        report[name] = {"version": importlib.metadata.version(name), **measure(tokenizer, found.config, options.repeat)}
        print(f"{name}: vocabulary {report[name]['vocabulary_s']:.2f} s", file=sys.stderr)
        for grammar, times in report[name]["grammars"].items():
            print(f"  {grammar}: {json.dumps(times)}", file=sys.stderr)
    publish(report, options.out)
    return 0


def _ours(tokenizer: Tokenizer, config: Any, rounds: int) -> dict[str, Any]:
    read_response_format({"regex": "a"})  # imports the library
    grammars = Grammars(tokenizer, config.stop_token_ids, keep=1)
    another = _read({"regex": "a"})
    _, vocabulary_s = _timed(grammars.compile, another)
    logits = torch.zeros(tokenizer.vocab_size)
    report: dict[str, Any] = {}
    for name, (response_format, text) in GRAMMARS.items():
        wanted, compiled = _read(response_format), []
        for _ in range(COMPILED):
            grammar, took = _timed(grammars.compile, wanted)
            compiled.append(took)
            grammars.compile(another)  # so that it is not kept
        steps, masks = [], []
        for _ in range(rounds):
            matcher: Matcher = grammar.matcher()
            for token in _ids(tokenizer, text):
                masks.append(_timed(matcher.mask, logits)[1])
                assert logits[token] == 0, f"{name} does not allow {tokenizer.piece(token)!r} in {text}"
                logits.zero_()
                steps.append(_timed(matcher.accept, token)[1])
            assert matcher.may_stop
        report[name] = _times(compiled, steps, masks)
    return {"vocabulary_s": vocabulary_s, "grammars": report}


def _xgrammars(tokenizer: Tokenizer, config: Any, rounds: int) -> dict[str, Any]:
    import xgrammar

    def tokenizer_info() -> Any:
        silent = {*tokenizer.special_ids, *config.stop_token_ids}
        spelled = [
            b"" if token in silent else tokenizer.bytes_of(token) or b"" for token in range(tokenizer.vocab_size)
        ]
        return xgrammar.TokenizerInfo(spelled, xgrammar.VocabType.RAW, stop_token_ids=list(config.stop_token_ids))

    vocabulary, vocabulary_s = _timed(tokenizer_info)
    compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)

    def compile_(wanted: dict[str, Any]) -> Any:
        if "regex" in wanted:
            return compiler.compile_regex(wanted["regex"])
        if "grammar" in wanted:
            return compiler.compile_grammar(wanted["grammar"])
        return compiler.compile_json_schema(json.dumps(wanted), any_whitespace=True, max_whitespace_cnt=1)

    def step(matcher: Any, token: int) -> None:
        assert matcher.accept_token(token)
        matcher.fill_next_token_bitmask(bits, 0)

    logits, bits = torch.zeros(tokenizer.vocab_size), xgrammar.allocate_token_bitmask(1, tokenizer.vocab_size)
    report: dict[str, Any] = {}
    for name, (wanted, text) in GRAMMARS.items():
        compiled, steps, masks = [], [], []
        for _ in range(COMPILED):
            grammar, took = _timed(compile_, wanted)
            compiled.append(took)
        for _ in range(rounds):
            matcher = xgrammar.GrammarMatcher(grammar)
            for token in _ids(tokenizer, text):
                steps.append(_timed(step, matcher, token)[1])
                masks.append(_timed(xgrammar.apply_token_bitmask_inplace, logits, bits[0])[1])
                logits.zero_()
        report[name] = _times(compiled, steps, masks)
    return {"vocabulary_s": vocabulary_s, "grammars": report}


def _read(response_format: Any) -> Any:
    return read_response_format(response_format)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)[1:]  # without the BOS


def _timed(run: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What it returns, and how many seconds a core is busy with it."""
    start = time.process_time()
    result = run(*arguments)
    return result, time.process_time() - start


def _times(compiled: list[float], steps: list[float], masks: list[float]) -> dict[str, Any]:
    return {
        "compile_ms": statistics.median(compiled) * 1e3,
        "step_us": _spread(steps),
        "mask_us": _spread(masks),
    }


def _spread(times: list[float]) -> dict[str, float]:
    """Of seconds, in microseconds."""
    ordered = sorted(times)
    of = {"median": statistics.median(ordered), "p99": ordered[int(0.99 * (len(ordered) - 1))], "max": ordered[-1]}
    return {name: value * 1e6 for name, value in of.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", metavar="NAME", help="whose vocabulary (%(default)s)")
    parser.add_argument("--repeat", type=whole(1), default=20, metavar="N", help="times each text (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
