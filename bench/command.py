"""`gemma-runtime bench latency | throughput | rows | kernels | compare | diff | export`.

Rows go to stdout, progress to stderr. Exit codes: 0 done; 1 the parity audit refused a configuration, an answer
in flight is not its request's alone, this runtime's own process in a comparison failed, or `diff` found something
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
from typing import TYPE_CHECKING, Any

from runtime.cli import arguments as shared
from runtime.cli.arguments import STDOUT, Parser, whole
from runtime.cli.output import json_file
from runtime.model.config import MAX_BATCH

if TYPE_CHECKING:
    from runtime.bench.records import AnyRow

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
    from runtime.bench.output import Output
    from runtime.bench.records import Report
    from runtime.model.config import RuntimeConfig
    from runtime.model.placement import resolve_device

    limits = RuntimeConfig(resolve_device(options.device), "float32", 1)
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    report = Report(command=options.name, time=started, environment=environment(torch.device(limits.device)))
    html = None if options.html is None else Path(options.html)
    output = Output(report, _form(options, options.output) or "md", json_file(options.json), html, options.wide)
    code = 0
    try:
        with _sigterm_as_interrupt():
            for row in importlib.import_module(f"runtime.bench.{options.module}").rows(options):
                output.add(row)
                code = code or _code(row)
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        output.close()  # keeps what was measured before an error
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


def _code(row: AnyRow) -> int:
    ours = getattr(row, "engine", "gemma-runtime") == "gemma-runtime"
    return REFUSED if ours and row.status != "ok" else 0


def _diff(options: argparse.Namespace) -> int:
    from runtime.bench.diff import changes, exit_code, render, to_json
    from runtime.bench.output import check_writable
    from runtime.bench.records import Report

    form, file = _form(options, "markdown" if options.markdown else None), json_file(options.json)
    if file is not None:
        check_writable(file)
    a, b = (Report.from_file(path) for path in (options.a, options.b))
    found = list(changes(a, b))
    code = exit_code(a, b, found, options.fail_above)
    if file is not None:
        file.write_text(to_json(a, b, found, code), encoding="utf-8")
    print(to_json(a, b, found, code) if form == "json" else render(a, b, found, markdown=options.markdown), end="")
    return code


def _export(options: argparse.Namespace) -> int:
    from runtime.bench.export import FORMS
    from runtime.bench.output import check_writable
    from runtime.bench.records import Report

    if options.out is not None:
        check_writable(options.out)
    text = FORMS[options.format](Report.from_file(options.report))
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text, encoding="utf-8")
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

    def command(name: str, module: str, purpose: str, *, positional: bool = True) -> Parser:
        added: Parser = commands.add_parser(name, help=purpose, description=purpose, allow_abbrev=False)
        added.set_defaults(run=_measure, name=name, module=module)
        shared.add_name(added, positional)
        shared.add_device(added)
        added.add_argument(
            "--dtype",
            type=comma_list(str),
            default=["auto"],
            metavar="DTYPE,...",
            help="types such as bf16,float32 (default: auto, the checkpoint's own)",
        )
        added.add_argument(
            "--warmup", type=whole(0), default=1, metavar="N", help="runs before those measured (%(default)s)"
        )
        added.add_argument("--repeat", type=whole(1), default=7, metavar="N", help="measured runs (%(default)s)")
        shared.add_json(added, "what is printed; JSON Lines if its name ends in .jsonl")
        added.add_argument("--output", choices=("md", "json", "jsonl", "csv"), help="format on stdout (md)")
        added.add_argument("--wide", action="store_true", help="every column of the table, every note")
        shared.add_html(added)
        return added

    latency = command("latency", "latency", "One request at a time, over a sweep of sizes.")
    throughput = command("throughput", "throughput", "A file of prompts, batch after batch.", positional=False)
    rows = command("rows", "rows", "Requests that come and go, beside a static batch, and while prompts arrive.")
    kernels = command("kernels", "operations", "Each operation beside PyTorch's operation for the same.")
    compare = command("compare", "compare", "This runtime beside others on the same weights, run by run in turn.")

    for added in (latency, compare):
        added.add_argument(
            "--prompt-len", type=comma_list(whole(1)), default=[128], metavar="N,...", help="tokens (128)"
        )
        added.add_argument(
            "--gen-len", type=comma_list(whole(2)), default=[64], metavar="N,...", help="tokens, from 2 (64)"
        )
    for added in (latency, throughput, kernels):
        added.add_argument(
            "--batch-size",
            type=comma_list(whole(1, MAX_BATCH)),
            default=[1],
            metavar="N,...",
            help="rows, 1 to 64 (1)",
        )
    throughput.add_argument(
        "prompts", type=Path, metavar="FILE", help='one prompt a line, or .jsonl with {"prompt": text or ids}'
    )
    throughput.add_argument("--gen-len", type=whole(2), default=64, metavar="N", help="tokens of an answer (64)")
    for option, kind, default, meaning in (
        ("--rows", whole(3, 8), 8, "rows, 3 to 8"),
        ("--prompt-len", whole(1), 128, "tokens of the longest prompt"),
        ("--gen-len", whole(12), 64, "tokens of the longest answer, from 12"),
        ("--arrival-len", whole(1), 500, "tokens of a prompt that arrives while others decode"),
    ):
        rows.add_argument(option, type=kind, default=default, metavar="N", help=f"{meaning} (%(default)s)")
    kernels.add_argument(
        "--context", type=comma_list(whole(1)), default=[512], metavar="N,...", help="tokens that attention reads (512)"
    )
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
    diff.add_argument(
        "--fail-above",
        type=percentage,
        default=0.0,
        metavar="PERCENT",
        help="by how much B may be slower, such as 5%% (0%%)",
    )
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
    export.add_argument("--out", type=Path, metavar="FILE", help="where to (stdout)")


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
