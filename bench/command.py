"""`gemma-runtime bench latency | throughput | rows | kernels | compare | diff | export`.

Rows go to stdout, progress to stderr. Exit codes: 0 done; 1 the parity audit refused a configuration, an answer in
flight differs from its request's alone, this runtime's own process in a comparison failed, or `diff` found something
slower; 2 bad input, or nothing to compare; 130 stopped by Ctrl-C or SIGTERM, after printing its complete rows.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.cli import arguments as shared
from runtime.cli.arguments import STDOUT, Parser, whole
from runtime.cli.output import check_writable, json_file
from runtime.model.config import MAX_BATCH
from runtime.parity import output_file

NAME = "gemma-runtime bench"
REFUSED, INTERRUPTED = 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the command line after `gemma-runtime bench`.

    Returns:
        The exit code.

    Raises:
        ValueError, TypeError, OSError, ImportError: bad input; the command line reports it in one line.
    """
    options = parser().parse_args(arguments)
    return options.run(options)


def _measure(options: argparse.Namespace) -> int:
    import torch

    from runtime.bench.environment import environment
    from runtime.bench.export import FORMS
    from runtime.bench.records import Report
    from runtime.bench.table import markdown
    from runtime.model.config import RuntimeConfig
    from runtime.model.placement import resolve_device

    check_writable(options.json, options.html)
    form, file = _form(options, options.output) or "md", json_file(options.json)
    device = RuntimeConfig(resolve_device(options.device), "float32", 1).device
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    report = Report(command=options.name, time=started, environment=environment(torch.device(device)))
    code = 0
    module, _, function = options.rows_of.partition(":")
    try:
        with _sigterm_as_interrupt():
            for row in getattr(importlib.import_module(f"runtime.bench.{module}"), function)(options):
                report = report.with_rows(*report.all_rows, row)
                if file is not None:
                    output_file.write(file, report.to_json())  # before anything can interrupt the next row
                ours = getattr(row, "engine", "gemma-runtime") == "gemma-runtime"
                code = REFUSED if ours and row.status != "ok" else code
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        if report.all_rows:  # what was measured before an error too
            print(markdown(report, wide=options.wide) if form == "md" else FORMS[form](report), end="", flush=True)
            if options.html is not None:
                output_file.write(Path(options.html), FORMS["html"](report))
    return code


def _form(options: argparse.Namespace, other: str | None) -> str | None:
    """The format on stdout: JSON for --json without a file, else the one that another option asks for."""
    if options.json != STDOUT:
        return other
    if other not in (None, "json"):
        raise ValueError(f"--json prints JSON, and {other} was asked for too: expected one of them, or --json FILE")
    return "json"


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Handles SIGTERM (a job's time is up) like Ctrl-C, so that finished measurements are kept."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _diff(options: argparse.Namespace) -> int:
    from runtime.bench.diff import difference
    from runtime.bench.records import Report

    check_writable(options.json)
    form, file = _form(options, "markdown" if options.markdown else None), json_file(options.json)
    found = difference(Report.from_file(options.a), Report.from_file(options.b))
    code = found.exit_code(options.fail_above)
    if file is not None:
        output_file.write(file, found.to_json(code))
    print(found.to_json(code) if form == "json" else found.text(markdown=options.markdown), end="")
    return code


def _export(options: argparse.Namespace) -> int:
    from runtime.bench.export import FORMS
    from runtime.bench.records import Report

    check_writable(options.out)
    text = FORMS[options.format](Report.from_file(options.report))
    if options.out is None:
        print(text, end="")
    else:
        output_file.write(Path(options.out), text)
    return 0


def parser() -> Parser:
    """The arguments after `gemma-runtime bench`."""
    bench = Parser(
        prog=NAME, description="Measure speed, with the parity audit and the memory bandwidth beside every number."
    )
    add_to(bench)
    return bench


def add_to(bench: Parser) -> None:
    """Adds the commands to a parser."""
    commands = shared.subcommands(bench)

    def command(name: str, rows_of: str, purpose: str, *, positional: bool = True) -> Parser:
        added: Parser = commands.add_parser(name, help=purpose, description=purpose, allow_abbrev=False)
        added.set_defaults(run=_measure, name=name, rows_of=rows_of)
        shared.add_name(added, positional)
        shared.add_device(added)
        types = "types such as bf16,float32 (default: auto, the checkpoint's own)"
        added.add_argument("--dtype", type=comma_list(str), default=["auto"], metavar="DTYPE,...", help=types)
        number(added, "--warmup", whole(0), 1, "runs before those measured")
        number(added, "--repeat", whole(1), 7, "measured runs")
        shared.add_json(added, "what is printed")
        added.add_argument("--output", choices=("md", "json", "csv"), help="format on stdout (md)")
        added.add_argument("--wide", action="store_true", help="every column of the table, every note")
        shared.add_html(added)
        return added

    def number(to: Parser, option: str, kind: Callable[[str], int], default: int, meaning: str) -> None:
        to.add_argument(option, type=kind, default=default, metavar="N", help=f"{meaning} (%(default)s)")

    def numbers(to: Parser, option: str, kind: Callable[[str], int], default: int, meaning: str) -> None:
        help_ = f"{meaning} ({default})"
        to.add_argument(option, type=comma_list(kind), default=[default], metavar="N,...", help=help_)

    latency = command("latency", "sweep:latency", "One request at a time, over a sweep of sizes.")
    throughput = command("throughput", "sweep:throughput", "A file of prompts, batch after batch.", positional=False)
    rows = command("rows", "rows:rows", "Requests that come and go, beside a static batch, and while prompts arrive.")
    kernels = command("kernels", "operations:rows", "Each operation beside PyTorch's operation for the same.")
    compare = command("compare", "compare:rows", "This runtime beside others on the same weights, run by run in turn.")
    for added in (latency, compare):
        numbers(added, "--prompt-len", whole(1), 128, "tokens")
        numbers(added, "--gen-len", whole(2), 64, "tokens, from 2")
    for added in (latency, throughput, kernels):
        numbers(added, "--batch-size", whole(1, MAX_BATCH), 1, "rows, 1 to 64")
    numbers(kernels, "--context", whole(1), 512, "tokens that attention reads")
    throughput.add_argument(
        "prompts", type=Path, metavar="FILE", help='one prompt a line, or .jsonl with {"prompt": text or ids}'
    )
    number(throughput, "--gen-len", whole(2), 64, "tokens of an answer")
    number(rows, "--rows", whole(3, 8), 8, "rows, 3 to 8")
    number(rows, "--prompt-len", whole(1), 128, "tokens of the longest prompt")
    number(rows, "--gen-len", whole(12), 64, "tokens of the longest answer, from 12")
    number(rows, "--arrival-len", whole(1), 500, "tokens of a prompt that arrives while others decode")
    compare.add_argument(
        "--engines",
        type=comma_list(str),
        metavar="NAME,...",
        help="which of gemma-runtime, gemma-runtime-gguf (the model's own GGUF file as it is), hf-dynamic, hf-static, "
        "hf-compile, llama.cpp, llama.cpp-gguf (likewise), vllm, openvino (all)",
    )
    compare.add_argument(
        "--peer", type=peer, action="append", default=[], metavar="NAME=PYTHON",
        help="the interpreter of the environment that has an engine's packages; may be repeated",
    )  # fmt: skip

    diff = commands.add_parser(
        "diff",
        help="Compare two reports.",
        description="Ratios of medians with 95 % bootstrap intervals. Exit codes: 0 if nothing in B is slower beyond "
        "noise; 1 if the whole interval of a time is above 1 (or what --fail-above allows), or a time is missing from "
        "B; 2 if nothing can be compared.",
    )
    diff.set_defaults(run=_diff)
    for name in ("a", "b"):
        diff.add_argument(name, type=Path, metavar=name.upper(), help="a report written by --json FILE")
    allowed = "by how much B may be slower, such as 5%% (0%%)"
    diff.add_argument("--fail-above", type=percentage, default=0.0, metavar="PERCENT", help=allowed)
    shared.add_json(diff, "what is printed")
    diff.add_argument("--markdown", action="store_true", help="print Markdown, as for a comment on a pull request")

    export = commands.add_parser(
        "export",
        help="Write a finished report in another form.",
        description="Write a finished report in a form that other tools read.",
    )
    export.set_defaults(run=_export)
    export.add_argument("report", type=Path, metavar="REPORT", help="a report written by --json FILE")
    export.add_argument(
        "--format", required=True, choices=("github-action-benchmark", "csv", "html"),
        help="github-action-benchmark: for its tool customSmallerIsBetter",
    )  # fmt: skip
    export.add_argument("--out", metavar="FILE", help="where to (stdout)")


def percentage(text: str) -> float:
    """A share from 0 % to 1,000 %, with or without its sign."""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share <= 10:
        raise argparse.ArgumentTypeError(f"expected a percentage such as 5%, got {text!r}")
    return share


def comma_list(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def items(text: str) -> list[Any]:
        return list(dict.fromkeys(convert(part.strip()) for part in text.split(",")))

    return items


def peer(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    if not name or not python:
        raise argparse.ArgumentTypeError(f"expected NAME=PYTHON, got {text!r}")
    return name, python
