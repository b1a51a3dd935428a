"""Whether this tree gives the answers of another commit: tokens, texts, bits of logits, compiled kernels.

    python -m runtime.bench.equivalence [--against COMMIT] [--quick] [--models demo,gemma3]

Both trees are copied into a temporary folder. A collector, this file, runs in a process of its own on each, and calls
only what users call: load, generate, inspect. It runs every model in every dtype, with compiled and with plain steps;
small models also with interpreted Triton kernels. The kernels of a step of Gemma 3 270M, compiled for sm_90, are
compared too: their rows of the table, and how often they have each PTX instruction.

Exit code: 0 equal, 1 different or a tree that fails, 3 nothing compared (no such commit, as in a shallow clone or an
exported tree). Where a commit since then has a trailer `Changes-answers: REASON` in its message, differences are
printed and the exit code is 0.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS = {"runtime": "runtime", "kernels": "runtime/kernels", "bench": "runtime/bench"}  # as setup.py has them
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {}),
    "gemma3-untied": ("gemma3", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
}
DTYPES = ("float32", "bfloat16", "float16")
MODES = ("compiled", "eager", "interpreted", "kernels")
Answers = dict[str, list[str]]  # by what was asked, value by value


class Run(NamedTuple):
    """A model that the collector loads, and the dtype and the kind of steps to run it with."""

    name: str
    source: str
    dtype: str
    mode: str


class TreeFailed(Exception):
    """The collector failed on one of the trees."""


def collect(package: str, runs: list[Run]) -> Answers:
    """The answers of the package that this process imports."""
    import runtime

    assert str(runtime.__file__).startswith(package), f"expected {package}, imported {runtime.__file__}"
    found: Answers = {}
    for run in runs:
        limits: dict[str, Any] = {"max_seq_len": 128 if run.name in SMALL else 1024, "max_batch": 3, "threads": 2}
        eager = run.mode == "eager"
        model = runtime.load(run.source, device="cpu", dtype=run.dtype, eager=eager, progress=False, **limits)
        for what, ask_model in questions(runtime, model, run).items():
            key = f"{run.name}, {run.dtype}, {run.mode}, {what}"
            try:
                found |= {f"{key}, {part}": values for part, values in ask_model().items()}
            except runtime.NonFiniteError as error:  # an answer like others: Gemma 3 overflows float16
                found[key] = [type(error).__name__]
    return found


def questions(runtime: Any, model: Any, run: Run) -> dict[str, Callable[[], Answers]]:
    """What a model is asked: prompts short and longer than its window, alone and in a batch of unequal lengths."""

    def generate(prompt: Any, tokens: int) -> Answers:
        results = runtime.generate(model, prompt, max_new_tokens=tokens, ignore_eos=True)
        results = results if isinstance(results, list) else [results]
        rows = {f"row {row}, token": [str(token) for token in result.token_ids] for row, result in enumerate(results)}
        return rows | {"text of row": [result.text for result in results]}

    def inspect(prompt: Any, positions: list[int], steps: int) -> Answers:
        found = runtime.inspect(model, prompt, top_k=499, positions=positions, steps=steps)
        return {
            "best logits and digest of all after prompt token": [logits(at.candidates) for at in found.positions],
            "best logits and probability of step": [
                f"{step.id} by {step.margin.hex()}, {step.runner_up.id} {step.runner_up.logit.hex()}, "
                f"{step.probability.hex()}"
                for step in found.steps
            ],
        }

    short: Any
    long: Any
    if run.name in SMALL:
        draw = random.Random(0)
        short, middle, long = (draw.choices(range(3, 499), k=count) for count in (3, 23, 43))
        if run.mode == "interpreted":  # a step takes seconds
            return {
                "a batch": partial(generate, [short, middle], 2),
                "a look past the window": partial(inspect, middle, [-1], 2),
            }
        return {
            "a short prompt": partial(generate, short, 32),
            "a prompt longer than the window": partial(generate, long, 32),
            "a batch": partial(generate, [short, long, middle], 32),
            "a look": partial(inspect, short, [0, 1, 2], 24),
            "a look past the window": partial(inspect, long, list(range(43)), 8),
        }
    short, code = "The capital of France is", "def fibonacci(n):\n    "
    long = " ".join(str(i * i) for i in range(160))  # one token per digit
    found: dict[str, Callable[[], Answers]] = {
        "a short prompt": partial(generate, short, 16),
        "a prompt longer than the window": partial(generate, long, 16),
        "a look": partial(inspect, code, [-2, -1], 6),
        "a look past the window": partial(inspect, long, [-1], 3),
    }
    if run.mode != "eager":  # whose steps are slow
        found["a batch"] = partial(generate, [short, code, "Ein Hund rennt durch den Schnee, und " * 4], 16)
    return found


def logits(candidates: Any) -> str:
    exact = [f"{candidate.id} {candidate.logit.hex()}" for candidate in candidates]
    return f"{exact[0]}, {exact[1]}, {hashlib.sha256(' '.join(exact).encode()).hexdigest()[:16]}"


def run_tree(package: Path, task: str, *command: str) -> Path:
    """Runs Python on a tree, with caches of its own; returns the folder that it ran in."""
    folder = package.parent / f"{package.name}-{task}"
    folder.mkdir()
    own = ("TRITON_INTERPRET", "NUMBA_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment |= {"PYTHONPATH": str(package), "PYTHONSAFEPATH": "1", "OMP_WAIT_POLICY": "passive"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "triton")}
    environment |= {"TRITON_INTERPRET": "1"} if task == "interpreted" else {}
    started = time.perf_counter()
    ended = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise TreeFailed(f"{package.name}, {task}: exit code {ended.returncode}\n{ended.stdout}{ended.stderr}")
    print(f"{package.name}, {task}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return folder


def ask(package: Path, task: str, runs: list[Run]) -> Answers:
    """What the collector finds in a tree."""
    folder = run_tree(package, task, __file__, "--collect", json.dumps([str(package), runs]))
    return json.loads((folder / "answers.json").read_text())


def compile_kernels(package: Path) -> Answers:
    """Each kernel's row of the compiled table and its instructions, keyed by its place, since names may change."""
    command = ["-m", "runtime.check.compiled", "--models", "gemma-3-270m", "--archs", "90", "--out", "table.json"]
    folder = run_tree(package, "kernels", *command)
    rows = json.loads((folder / "table.json").read_text())["rows"]
    programs = sorted((folder / "triton").rglob("*.ptx"), key=lambda file: file.stat().st_mtime_ns)
    found: Answers = {}
    for place, (row, program) in enumerate(zip(rows, programs, strict=True)):
        counts = Counter(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.:]*)\s.*;$", program.read_text(), re.MULTILINE))
        values = [f"{name} {value}" for name, value in row.items() if name not in ("kernel", "models", "arch")]
        found[f"sm_90, kernel {place}, figure"] = values + [f"{name} {counts[name]}" for name in sorted(counts)]
    return found


def extract(root: Path, commit: str, into: Path) -> str | None:
    """Writes a commit's folders into `into` and returns its short hash; None where there is no such commit."""

    def git(*command: str) -> bytes | None:
        ended = subprocess.run(["git", "-C", str(root), *command], capture_output=True)
        return None if ended.returncode else ended.stdout

    top, found = git("rev-parse", "--show-toplevel"), git("rev-parse", "--verify", "--short", f"{commit}^{{commit}}")
    if top is None or found is None or Path(top.decode().strip()) != root.resolve():
        return None
    into.mkdir()
    subprocess.run(["tar", "-x", "-C", into], input=git("archive", commit, *FOLDERS), check=True)
    return found.decode().strip()


def install(tree: Path, package: Path, compiled: Path) -> Path:
    """Lays a tree out as the installed package, with kernels that are already compiled; those compiled from other
    sources are not used (kernels/cpu/cache.py)."""
    for folder, place in FOLDERS.items():
        shutil.copytree(tree / folder, package / place, ignore=shutil.ignore_patterns("__pycache__"))
    cache = package / "runtime" / "kernels" / "cpu" / "__pycache__"
    cache.mkdir()
    for entry in compiled.glob("*.nbc"):
        shutil.copy(entry, cache)
    return package


def compare(folder: Path, names: list[str], dtypes: list[str], modes: list[str]) -> tuple[Answers, Answers]:
    """The answers of both trees in a folder, two processes at a time."""
    from runtime.bench.small_models import save_small_model

    for name in SMALL.keys() & names:
        save_small_model(SMALL[name][0], folder / name, **SMALL[name][1])
    sources = {name: str(folder / name) if name in SMALL else name for name in names}
    plain = [mode for mode in ("compiled", "eager") if mode in modes]
    runs = [Run(name, sources[name], dtype, mode) for name in names for dtype in dtypes for mode in plain]
    tasks: list[Callable[[Path], Answers]] = [partial(ask, task="answers", runs=runs)] if runs else []
    small = [Run(name, sources[name], dtypes[0], "interpreted") for name in names if name in SMALL]
    if small and "interpreted" in modes:
        tasks.append(partial(ask, task="interpreted", runs=small))
    if "kernels" in modes:
        tasks.append(compile_kernels)
    found: dict[str, Answers] = {"before": {}, "after": {}}
    with ThreadPoolExecutor(2) as pool:
        jobs = [(side, pool.submit(task, folder / side)) for task in tasks for side in found]
        for side, job in jobs:
            found[side] |= job.result()
    return found["before"], found["after"]


def differences(before: Answers, after: Answers) -> list[str]:
    """For every answer that differs, the first value that does."""
    lines = []
    for key in before | after:
        a, b = before.get(key, []), after.get(key, [])
        pairs = enumerate(itertools.zip_longest(map(repr, a), map(repr, b), fillvalue="nothing"))
        lines += [f"{key} {at}: was {was}, is {now}" for at, (was, now) in pairs if was != now][:1]
    return lines


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """The command line, for the tree at `root`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="HEAD^", metavar="COMMIT", help="default: %(default)s")
    parser.add_argument("--models", help=f"comma list of {', '.join(SMALL)}, and of what `runtime.load` takes")
    parser.add_argument("--dtypes", help=f"default: {','.join(DTYPES)}")
    parser.add_argument("--modes", help=f"default: {','.join(MODES)}")
    parser.add_argument("--quick", action="store_true", help="by default small models in bfloat16, without Triton")
    parser.add_argument("--collect", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.collect:
        package, runs = json.loads(args.collect)
        Path("answers.json").write_text(json.dumps(collect(package, [Run(*run) for run in runs])))
        return 0
    models = args.models or ",".join(SMALL if args.quick else [*SMALL, "demo"])
    modes = args.modes or ",".join(MODES[:2] if args.quick else MODES)
    dtypes = args.dtypes or ("bfloat16" if args.quick else ",".join(DTYPES))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="equivalence-") as temporary:
        folder = Path(temporary)
        commit = extract(root, args.against, folder / "sources")
        if commit is None:
            print(f"nothing compared: {root} has no commit {args.against}")
            return 3
        compiled = root / "kernels" / "cpu" / "__pycache__"
        install(folder / "sources", folder / "before", compiled)
        install(root, folder / "after", compiled)
        try:
            before, after = compare(folder, models.split(","), dtypes.split(","), modes.split(","))
        except TreeFailed as error:
            print(error)
            return 1
    found, values = differences(before, after), sum(map(len, after.values()))
    # The reasons that commits since then give.
    log = ["git", "-C", str(root), "log", "--format=%(trailers:key=Changes-answers,valueonly)", f"{args.against}..HEAD"]
    accepted = subprocess.run(log, capture_output=True, text=True, check=True).stdout.split("\n")
    accepted = [reason for reason in accepted if reason]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "transformers")}
    for line in found:
        print(line)
    on = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(
        f"{len(after)} answers ({values:,} values) compared with {commit} on {on}, in "
        f"{time.perf_counter() - started:.0f} s: {len(found) or 'none'} differ"
    )
    if found and accepted:
        print(f"the difference is meant: {'; '.join(accepted)}")
    return 3 if not after else 1 if found and not accepted else 0


if __name__ == "__main__":
    sys.exit(main())
