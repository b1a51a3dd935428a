"""What each format of a model's weights costs in quality: the perplexity of a text.

    python -m runtime.bench.perplexity --out bench/results/perplexity-cpu.json

The text is what Python itself says: the Zen of Python, then the docstrings of the modules in MODULES, in that order,
read from their source files and separated by an empty line. It is in English, with some code, and comes with every
Python; the report has its SHA-256, since Python's versions differ. Its first tokens are cut into windows, each of which
begins with BOS and is scored alone. Perplexity is e to the mean of -ln p over all tokens but BOS.

Q8_0 and Q4_0 are the files that `gemma-runtime quantize` writes, read back in their blocks; int8 and int4 are quantised
at load. A GGUF model, the demo too, is their source as its own values, and is itself "own"; bf16 has those rounded.
"""

from __future__ import annotations

import ast
import codecs
import hashlib
import math
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every format; returns the exit code."""
    sizes = {"tokens": (4096, 3, "tokens of the text"), "window": (512, 3, "tokens scored at once")}
    options = parser(__doc__, None, **sizes).parse_args(arguments)
    given = text()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, how in FORMATS.items():
            source = _source(options.model, name, Path(folder))
            if source is None:
                continue
            with runtime.load(source, device="cpu", max_seq_len=options.window, progress=False, **how) as model:
                windows = _windows(model, given, options.tokens, options.window)
                found[name] = {"perplexity": perplexity(model, windows), "weight_bytes": model.weights.nbytes}
            print(f"{name}: {found[name]['perplexity']:.3f}", file=sys.stderr)
    of_text = {"modules": MODULES, "sha256": hashlib.sha256(given.encode()).hexdigest()}
    scored = sum(len(window) - 1 for window in windows)
    publish("perplexity", options, {"text": of_text, "scored": scored, "formats": found})
    return 0


def text() -> str:
    """The Zen of Python and the modules' docstrings."""
    library = Path(sysconfig.get_paths()["stdlib"])
    parsed = {name: ast.parse((library / f"{name}.py").read_text(encoding="utf-8")) for name in ("this", *MODULES)}
    zen = next(
        node.value.value
        for node in parsed.pop("this").body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    )
    return "\n\n".join([codecs.decode(str(zen), "rot13"), *(ast.get_docstring(tree) or "" for tree in parsed.values())])


def perplexity(model: Model, windows: Sequence[list[int]]) -> float:
    """Of windows of ids, each scored from its second token on."""
    total = 0.0
    for window in windows:
        result = runtime.generate(model, window, max_new_tokens=1, prompt_logprobs=1, reuse=False)
        assert result.prompt_logprobs is not None
        total -= sum(scored.logprob for scored in result.prompt_logprobs if scored is not None)
    return math.exp(total / sum(len(window) - 1 for window in windows))


def _windows(model: Model, given: str, tokens: int, size: int) -> list[list[int]]:
    """The first `tokens` ids of a text in windows of `size`, BOS and room for a new token included."""
    bos, *ids = model.tokenizer.encode(given)[:tokens]
    step = size - 2
    return [[bos, *ids[start : start + step]] for start in range(0, len(ids), step)]


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
