"""The GPU campaign: everything that has to be measured on a GPU, in one command that leaves a record.

    python -m runtime.bench.gpu --out DIR [--minutes 9] [--models gemma-1.1-2b,...] [--model DIR_OR_GGUF]
                                [--parts gates,steps,...] [--tests DIR ...] [--compile] [--dry-run]

Its parts, in this order, each with its own JSON file in DIR, which is rewritten after every model so that an
interrupted run keeps what it has measured:

    machine    GPU, driver, clocks, versions; a first reading of the ceiling, bandwidth of copying, an empty launch
    constants  latencies and the clock, which the predictor assumes
    tests      pytest -m gpu, in several processes where pytest-xdist is installed
    gates      for every model: captured equals eager, a row alone equals itself in a batch, fp32 tokens equal Hugging
               Face's; and an audit of the errors in bf16
    kernels    every product at 1 and 8 rows, and attention, beside PyTorch's operations for the same
    steps      captured decode steps over contexts, batches, steps in a graph, with and without dependent launch
    quantized  the same of the first model in int8 and int4, whose gates come with the others
    host_loop  the same through the host's loop, time to first token (by both forms of a chunk), the host's time, peak
               memory
    guesses    steps that check guesses, as speculation waits for them
    peers      Hugging Face's dynamic and static cache on the same weights
    timeline   when each kernel of one step runs
    blocks     a search of block shapes into DIR/blocks.json, with `quantized` those of int8 and int4 too; copy it to
               kernels/blocks/<gpu>.json to use it

The models are the published shapes with random weights made on the device; --model adds a real checkpoint. Times are
medians with their 10th and 90th percentile; bytes are those that a step must read, and a share of the read bandwidth is
relative to a reading directly before. No model is started after --minutes. Exit codes:

    0   done
    1   tests or a gate failed: the run ends there, without speeds
    2   bad arguments, or no GPU
    3   no test or no gate ran (no test folder, none selected, all skipped, no time left): the run ends there too
    4   a part raised an error, recorded in DIR/failures.json; all others were measured

--compile adds torch.compile to kernels and peers, which takes minutes. --dry-run runs every part at toy size on a CPU
in Triton's interpreter, to show that it still runs.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from runtime.bench.constants import constants, launch_costs
from runtime.bench.environment import machine
from runtime.bench.gates import audit, gate
from runtime.bench.parts import timeline
from runtime.bench.products import cases
from runtime.bench.scale import FULL, TOY, Scale
from runtime.bench.speeds import QUANTIZED, guess_steps, host_loop, kernels, peers, quantized_steps, steps
from runtime.bench.tune import write_table
from runtime.check.interpreter import checked_interpreter
from runtime.cli.arguments import some_of
from runtime.kernels.launch import INTERPRETING
from runtime.model.config import ModelConfig
from runtime.model.published import PUBLISHED

SCHEMA = 2
MODELS = "gemma-1.1-2b,gemma-3-270m,gemma-3-1b,gemma-2-2b"
PARTS = "machine constants tests gates kernels steps quantized host_loop guesses peers timeline blocks".split()
TESTS = [Path(__file__).resolve().parents[1] / "tests" / room for room in ("gpu", "kernels")]
TEST_PROCESSES = 8  # most of their time goes into compiling kernels
FAILED, NOTHING_RAN, PART_FAILED = 1, 3, 4
NONE_COLLECTED = 5  # pytest's own exit code


def run_tests(folders: list[Path]) -> dict[str, Any]:
    """The repository's GPU tests in processes of their own: "ran" says whether any ran, "passed" whether those
    passed."""
    absent = next((folder for folder in folders if not folder.is_dir()), None)
    if absent:
        return {"ran": False, "passed": False, "reason": f"no folder {absent}: name it by --tests"}
    with tempfile.TemporaryDirectory() as temporary:
        counted = Path(temporary) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        command += [f"--junit-xml={counted}", *map(str, folders)]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))]
        done = subprocess.run(command, env=os.environ | {"PYTHONSAFEPATH": "1"}, capture_output=True, text=True)
        suites = ElementTree.parse(counted).iter("testsuite") if counted.exists() else ()
        counts = [{name: int(suite.attrib[name]) for name in ("tests", "skipped")} for suite in suites]
    tests, skipped = (sum(count[name] for count in counts) for name in ("tests", "skipped"))
    return {
        "ran": done.returncode not in (0, NONE_COLLECTED) or tests > skipped,
        "passed": done.returncode == 0,
        "exit_code": done.returncode,
        "tests": tests,
        "skipped": skipped,
        "output": (done.stdout + done.stderr).splitlines()[-40:],
    }


class Record:
    """The folder of results: one JSON file for each part."""

    def __init__(self, folder: Path, minutes: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failures.json").unlink(missing_ok=True)
        self.folder = folder
        self.deadline = time.monotonic() + 60 * minutes  # nothing is started after it
        self.machine: dict[str, Any] = {}
        self.failures: list[dict[str, str]] = []

    @contextmanager
    def recorded_failures(self, part: str, name: str = "") -> Iterator[None]:
        """Records an error raised inside, so that the campaign continues."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failures.append({"failed": part, "model": name, "error": f"{type(error).__name__}: {error}"})
            self.write("failures", failures=self.failures)

    def write(self, part: str, **content: Any) -> None:
        """Writes a part's file."""
        whole = {"schema": SCHEMA, "part": part, "machine": self.machine, **content}
        (self.folder / f"{part}.json").write_text(json.dumps(whole, indent=1) + "\n")

    def measure(self, part: str, names: list[str], measure: Callable[[str], Iterable[dict[str, Any]]]) -> list[Any]:
        """Measures a part model by model until time runs out."""
        rows: list[dict[str, Any]] = []
        skipped = []
        for name in names:
            if time.monotonic() > self.deadline:
                skipped.append(name)
                continue
            with self.recorded_failures(part, name):
                for row in measure(name):
                    rows.append(row)
                    print(f"   {part}: " + json.dumps({k: v for k, v in row.items() if k != "kernels"}), flush=True)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            self.write(part, rows=rows, not_measured=skipped)
        self.write(part, rows=rows, not_measured=skipped)
        return rows


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder for the results")
    parser.add_argument(
        "--models", type=some_of(PUBLISHED), default=MODELS, help=f"comma list of {', '.join(PUBLISHED)}"
    )
    parser.add_argument("--model", help="a real checkpoint to measure too: a folder or a .gguf file")
    parser.add_argument("--parts", type=some_of(PARTS), default=",".join(PARTS), help="what to run")
    parser.add_argument(
        "--tests", type=Path, nargs="+", default=TESTS, help="the folders of the repository's GPU tests"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing after this time (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too (slow)")
    parser.add_argument("--dry-run", action="store_true", help="every part at toy size on a CPU")
    args = parser.parse_args(argv)
    names, chosen = args.models, args.parts
    if args.dry_run and not INTERPRETING:
        # Triton reads this when a kernel is imported.
        again = [sys.executable, "-m", "runtime.bench.gpu", *(sys.argv[1:] if argv is None else argv)]
        quiet = {"TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(again, env=os.environ | quiet).returncode
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device is found; this command measures one (--dry-run needs none)")
    scale = TOY if args.dry_run else FULL
    names += [args.model] if args.model else []
    record = Record(args.out, args.minutes)
    # The checked interpreter takes a quarter of the time of the interpreter as it comes.
    with checked_interpreter() if INTERPRETING else nullcontext():
        return campaign(record, scale, names, chosen, tests=args.tests, compiled=args.compile)


def campaign(
    record: Record, scale: Scale, names: list[str], chosen: list[str], *, tests: list[Path], compiled: bool = False
) -> int:
    """Runs the chosen parts in order and returns the exit code."""
    with record.recorded_failures("machine"):
        read = {"read_gb_s": scale.ceiling(scale.device).gb_s()}
        record.machine = machine(scale.device) | read | launch_costs(scale.device)
        record.write("machine")
    if record.failures:
        return PART_FAILED
    print(json.dumps(record.machine, indent=1), flush=True)
    if "constants" in chosen:
        with record.recorded_failures("constants"):
            record.write("constants", **constants(scale.device))
    if "tests" in chosen:
        tested = run_tests(tests)
        record.write("tests", **tested)
        if not (tested["ran"] and tested["passed"]):
            return _stopped("the GPU tests", ran=tested["ran"], why=tested.get("reason"))
    if "gates" in chosen:
        dtypes = ("float32", scale.dtype) if scale.dtype != "float32" else ("float32",)
        sizes = [(dtype, rows) for dtype in dtypes for rows in dict.fromkeys((1, scale.max_batch))]
        quantized = [scale.quantized(to) for to in QUANTIZED] if "quantized" in chosen else []

        def gates(name: str) -> Iterator[dict[str, Any]]:
            yield from (gate(scale, name, *size) for size in sizes)
            for each in quantized if name == names[0] else ():
                yield from (gate(each, name, *size) for size in sizes[: 1 if INTERPRETING else None])

        rows = record.measure("gates", names, gates)
        raised = bool(record.failures)
        record.measure("audits", names, lambda name: [audit(scale, name)])
        if raised or not rows or not all(row["passed"] for row in rows):
            return _stopped("the correctness gates", ran=raised or bool(rows))
    parts: dict[str, Callable[[str], Iterable[dict[str, Any]]]] = {
        "kernels": lambda name: kernels(scale, name, compiled),
        "steps": lambda name: steps(scale, name),
        "quantized": lambda name: quantized_steps(scale, name),
        "host_loop": lambda name: [host_loop(scale, name)],
        "guesses": lambda name: guess_steps(scale, name),
        "peers": lambda name: peers(scale, name, compiled),
        "timeline": lambda name: [timeline(scale, name)],
    }
    for part, measure in parts.items():
        if part in chosen:
            record.measure(part, names[:1] if part == "quantized" else names, measure)
    if "blocks" in chosen and scale.device.type == "cuda":
        with record.recorded_failures("blocks"):
            configs = [ModelConfig.from_hf(scale.hf_config(name)) for name in names]
            kinds = [(config, "") for config in configs]
            kinds += [(configs[0], to) for to in QUANTIZED if "quantized" in chosen]
            found = sorted({case for config, to in kinds for case in cases(config, to)})
            table = record.folder / "blocks.json"
            for line in write_table(found, getattr(torch, scale.dtype), table, os.cpu_count() or 1, record.deadline):
                print(f"   blocks: {line}", flush=True)
    for failure in record.failures:
        print(f"{failure['failed']} {failure['model']} raised {failure['error']}")
    return PART_FAILED if record.failures else 0


def _stopped(what: str, *, ran: bool, why: str | None = None) -> int:
    """Prints why no speed is measured, and returns the exit code."""
    print(f"{what} {'failed' if ran else 'did not run'}{f' ({why})' if why else ''}: no speed is measured")
    return FAILED if ran else NOTHING_RAN


if __name__ == "__main__":
    raise SystemExit(main())
