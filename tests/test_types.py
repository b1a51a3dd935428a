"""What a type checker makes of the public names: what is right passes under --strict, what is wrong does not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
RIGHT = """
from collections.abc import Sequence
import runtime
from runtime import GenerationResult, Model, load

model: Model = load("demo")
one: GenerationResult = runtime.generate(model, "A", max_new_tokens=3, stop=["x"])
ids: GenerationResult = runtime.generate(model, [2, 3])
alone: GenerationResult = runtime.generate("A", ignore_eos=True)
numbers: Sequence[int] = (1, 2)
tokens: GenerationResult = runtime.generate(numbers)
texts: list[GenerationResult] = runtime.generate(model, ["A", "B"])
rows: list[GenerationResult] = runtime.generate(model, [[2, 3], [4]])
batch: list[GenerationResult] = runtime.generate(["A", "B"], max_new_tokens=1)
said: str = runtime.generate(model, "A").text
every: list[str] = [result.text for result in texts]
pieces: str = "".join(piece.text for piece in runtime.stream(model, "A"))
answer: str = runtime.chat(model, [{"role": "user", "content": "A"}]).text
try:
    runtime.inspect(model, "A")
except runtime.GemmaRuntimeError:
    pass
"""
WRONG = [
    "from runtime import Nonsense",
    "import runtime; runtime.nonsense",
    "import runtime; runtime.generate('A')[0]",
    "import runtime; runtime.generate(['A', 'B']).text",
    "import runtime; runtime.generate(runtime.load('demo'))",
    "import runtime; runtime.generate('A', 'B')",
    "import runtime; runtime.generate('A', max_tokens=3)",
    "import runtime; runtime.generate(3)",
    "import runtime; runtime.stream(runtime.load())",
]


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> list[str]:
    """Line by line what mypy says of a module with the right program and, after it, each wrong line."""
    mypy = pytest.importorskip("mypy", reason="needs mypy, which the extra test installs").__name__
    root = tmp_path_factory.mktemp("types")
    package = root / "path" / "runtime"  # the package as it installs
    package.mkdir(parents=True)
    for source in (REPOSITORY / "runtime").iterdir():
        (package / source.name).symlink_to(source)
    (package / "kernels").symlink_to(REPOSITORY / "kernels")
    (package / "bench").symlink_to(REPOSITORY / "bench")
    (root / "program.py").write_text(RIGHT + "\n".join(WRONG) + "\n")
    # Other packages are not looked into: torch alone would take a minute.
    options = ["--strict", "--no-site-packages", "--ignore-missing-imports", "--follow-imports=silent"]
    command = [sys.executable, "-m", mypy, *options, "--cache-dir", str(root / "cache"), "program.py"]
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"MYPYPATH": str(package.parent)}, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    found = [""] * len((RIGHT + "\n".join(WRONG)).splitlines())
    for line in done.stdout.splitlines():
        if number := re.match(r"program\.py:(\d+): error", line):
            found[int(number[1]) - 1] += line
    return found


def test_a_right_program_passes(checked):
    assert not any(checked[: -len(WRONG)])


@pytest.mark.parametrize("line", range(len(WRONG)), ids=WRONG)
def test_a_wrong_line_is_found(checked, line):
    assert checked[len(checked) - len(WRONG) + line]
