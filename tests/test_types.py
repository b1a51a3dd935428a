"""What type checkers make of the public names: a right program passes both in strict mode, wrong lines do not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
RIGHT = """
from collections.abc import Sequence
import numpy as np
import torch
import runtime
from runtime import GenerationResult, Inspection, Model, Piece, Report, Stats, Stream, load

model: Model = load("demo", dtype=torch.bfloat16, device=torch.device("cpu"))
again: Model = load("demo", dtype="bf16", device=0)
quantised: Model = load("demo", quantize="gguf")
one: GenerationResult = runtime.generate(model, "A", max_new_tokens=3, stop=["x"])
ids: GenerationResult = runtime.generate(model, [2, 3])
alone: GenerationResult = runtime.generate("A", ignore_eos=True)
guessed: GenerationResult = runtime.generate(model, "A", speculate="prompt")
numbers: Sequence[int] = (1, 2)
tokens: GenerationResult = runtime.generate(numbers)
texts: list[GenerationResult] = runtime.generate(model, ["A", "B"])
several: list[GenerationResult] = runtime.generate(model, "A", n=3, temperature=0.7, top_k=40, top_p=0.95, min_p=0.1)
more: list[GenerationResult] = model.generate(["A", "B"], n=2, temperature=[0.0, 0.7], seed=[None, 3])
biased: GenerationResult = runtime.generate("A", logit_bias={5: -1.0}, repetition_penalty=1.1, min_new_tokens=2)
likely: float = 0.0 if one.logprobs is None else one.logprobs[0].logprob
rows: list[GenerationResult] = runtime.generate(model, [[2, 3], [4]])
mixed: list[GenerationResult] = model.generate(["A", [2, 3]])
batch: list[GenerationResult] = runtime.generate(["A", "B"], max_new_tokens=1)
array: GenerationResult | list[GenerationResult] = runtime.generate(model, np.array([2, 3]))
tensor: GenerationResult | list[GenerationResult] = model.generate(torch.tensor([[2, 3]]))
encoding: GenerationResult | list[GenerationResult] = model.generate({"input_ids": [2], "attention_mask": [1]})
said: str = runtime.generate(model, "A").text
every: list[str] = [result.text for result in texts]
pieces: str = "".join(piece.text for piece in runtime.stream(model, "A"))
messages = [{"role": "user", "content": "A"}]
answer: str = runtime.chat(model, messages).text
answers: list[str] = [one.text for one in runtime.chat(model, messages, n=2, temperature=1.0)]
stats: Stats = model.chat(messages, max_new_tokens=2).stats
distinct: set[GenerationResult] = {one, ids}
read: tuple[int, ...] = one.token_ids
with load() as opened:
    spelled: list[int] = opened.tokenizer.encode("A") if opened.tokenizer else []
    streaming: Stream = opened.stream("A", max_new_tokens=5)
    with streaming as open_pieces:
        first: Piece = next(open_pieces)
    results: list[GenerationResult] = streaming.results
model.close()
try:
    seen: Inspection = runtime.inspect(model, "A", steps=2)
    steps: int = len(model.inspect([2, 3]).steps)
    report: Report = runtime.verify("demo", dtype="fp32")
    passed: bool = report.passed
except runtime.ModelClosed as closed:
    problem: RuntimeError = closed
except runtime.GemmaRuntimeError:
    pass
"""
WRONG = [
    "from runtime import Nonsense",
    "runtime.nonsense",
    "model.nonsense",
    "runtime.generate('A')[0]",
    "runtime.generate(['A', 'B']).text",
    "runtime.generate(load('demo'))",
    "runtime.generate('A', 'B')",
    "runtime.generate('A', max_tokens=3)",
    "runtime.generate('A', speculate='foo')",
    "runtime.generate(3)",
    "runtime.generate('A', top_k='many')",
    "runtime.generate('A', n=2).text",
    "runtime.generate('A', logit_bias=[1])",
    "runtime.generate(model, messages)",
    "runtime.stream(load())",
    "load(max_seq_len='64')",
    "load('demo', 'cpu')",
    "model.generate(['A']).text",
    "model.stream('A').nonsense",
    "one.token_ids.append(1)",
]
LINES = (RIGHT + "\n".join(WRONG) + "\n").splitlines()


def mypy(root: Path) -> list[tuple[int, str]]:
    # Other packages are not looked into: torch alone would take a minute.
    options = ["--strict", "--no-site-packages", "--ignore-missing-imports", "--follow-imports=silent"]
    command = [sys.executable, "-m", "mypy", *options, "--cache-dir", str(root / "cache"), "program.py"]
    environment = os.environ | {"MYPYPATH": str(root / "path")}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    found = re.findall(r"^program\.py:(\d+): (error.*)", done.stdout, re.MULTILINE)
    return [(int(line), message) for line, message in found]


def pyright(root: Path) -> list[tuple[int, str]]:
    (root / "pyrightconfig.json").write_text(
        json.dumps({"include": ["program.py"], "extraPaths": ["path"], "typeCheckingMode": "strict"})
    )
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)["generalDiagnostics"]
    return [(it["range"]["start"]["line"] + 1, it["message"]) for it in found if it["severity"] == "error"]


@pytest.fixture(scope="module", params=[mypy, pyright], ids=lambda checker: checker.__name__)
def checked(request, tmp_path_factory) -> list[str]:
    """Line by line what a checker says of a module with the right program and, after it, each wrong line."""
    pytest.importorskip(request.param.__name__, reason="the extra test installs it")
    root = tmp_path_factory.mktemp("types")
    package = root / "path" / "runtime"  # the package as it installs
    package.mkdir(parents=True)
    for source in (REPOSITORY / "runtime").iterdir():
        (package / source.name).symlink_to(source)
    (package / "kernels").symlink_to(REPOSITORY / "kernels")
    (package / "bench").symlink_to(REPOSITORY / "bench")
    (root / "program.py").write_text("\n".join(LINES) + "\n")
    found = [""] * len(LINES)
    for line, message in request.param(root):
        found[line - 1] += message
    return found


def test_a_right_program_passes(checked):
    wrong = [(line, said) for line, said in zip(LINES, checked[: -len(WRONG)], strict=False) if said]
    assert not wrong


@pytest.mark.parametrize("line", range(len(WRONG)), ids=WRONG)
def test_a_wrong_line_is_found(checked, line):
    assert checked[len(checked) - len(WRONG) + line]
