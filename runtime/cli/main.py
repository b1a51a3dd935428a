"""The command line: `gemma-runtime generate | chat | inspect | info | verify | bench`, also `python -m runtime`.

Text goes to stdout, everything about it to stderr. Exit codes: 0 done, 1 an audit that refuses, 2 bad input (one
line on stderr says what was expected and what was given), 70 an error of the program itself (with its traceback), 130
stopped by Ctrl-C, 141 the reader of stdout went away.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import runtime
from runtime.cli import streams
from runtime.cli.arguments import NAME, Parser, whole
from runtime.errors import GemmaRuntimeError, InvalidArgument
from runtime.model.config import MAX_THREADS

if TYPE_CHECKING:
    from runtime.engine.result import GenerationResult
    from runtime.model.model import Model

DIFFERENT = 1  # the audit's answer, where it is no
INTERNAL_ERROR = 70
INTERRUPTED = 130
READER_GONE = 141
_REVISION = "branch, tag or commit of a hub repository (as OWNER/NAME@REV; default: main)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    streams.prepare()
    arguments = sys.argv[1:] if arguments is None else arguments
    is_bench = bool(arguments) and arguments[0] == "bench"  # it has commands, and built-in errors, of its own
    bad_input = (GemmaRuntimeError, OSError, ImportError, *((ValueError, TypeError) if is_bench else ()))
    try:
        try:
            code = _run(arguments, is_bench)
        finally:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the shell's prompt goes on a line of its own
        return INTERRUPTED
    except BrokenPipeError:
        streams.settle(sys.stdout)
        return READER_GONE
    except bad_input as error:
        streams.settle(sys.stdout)
        _complain(" ".join(str(error).split()) or type(error).__name__)
        return 2
    except Exception:
        streams.settle(sys.stdout)
        _complain(f"this is an error of the program itself, please report it\n{traceback.format_exc()}".rstrip())
        return INTERNAL_ERROR
    finally:
        streams.settle(sys.stderr)


def _run(arguments: Sequence[str], is_bench: bool) -> int:
    if is_bench:  # which imports what other commands do without
        from runtime.bench.command import main as bench

        return bench(arguments[1:])
    options = _parser().parse_args(arguments)
    return options.command(options)


def _generate(options: argparse.Namespace) -> int:
    prompt = _read_prompt(options.prompt)
    model = _load(options)
    echo = prompt if sys.stdout.isatty() and options.prompt != "-" else ""
    result, interrupted = _answer(model, prompt, options, echo)
    if options.stats or (sys.stderr.isatty() and not options.json):
        print(result.stats, file=sys.stderr)
    return INTERRUPTED if interrupted else 0


def _chat(options: argparse.Namespace) -> int:
    model = _load(options)
    if model.tokenizer is None:
        raise InvalidArgument(f"chat needs a tokenizer, but {model.name} has none")
    model.tokenizer.apply_chat([{"role": "user", "content": "?"}])  # a model that cannot chat says so now
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        print(f"{model.name}: /reset starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer", file=sys.stderr)
    messages: list[dict[str, str]] = []
    for line in _lines(interactive):
        said = line.strip()
        if said == "/exit":
            break
        if said == "/reset":
            messages = []
        elif said:
            asked = [*messages, {"role": "user", "content": said}]
            try:
                result, interrupted = _answer(model, model.tokenizer.apply_chat(asked), options)
            except InvalidArgument as error:  # the conversation has outgrown max_seq_len
                if not interactive:
                    raise
                _complain(str(error))
                continue
            if interrupted and not interactive:
                return INTERRUPTED
            messages = [*asked, {"role": "assistant", "content": result.text}]
    return 0


def _inspect(options: argparse.Namespace) -> int:
    prompt = _read_prompt(options.prompt)
    seen = runtime.inspect(
        _load(options), prompt, top_k=options.top_k, positions=options.positions, steps=options.steps
    )
    print(_json(seen.to_dict()) if options.json else seen)
    return 0


def _info(options: argparse.Namespace) -> int:
    from runtime.cost import info as machine
    from runtime.cost import plan

    info: plan.Plan | machine.Info
    if not options.plan and (options.batch_size or options.context):
        raise InvalidArgument("--batch-size and --context go with --plan, which was not given")
    if options.plan:
        info = plan.gather(
            _source(options),
            gpu=options.plan,
            dtype=options.dtype,
            batch=options.batch_size or 1,
            context=options.context or 128,
        )
    else:
        info = machine.gather(
            _source(options),
            device=options.device,
            dtype=options.dtype,
            max_seq_len=options.max_seq_len,
            threads=options.threads,
        )
    print(_json(info.to_dict()) if options.json else info)
    return 0


def _verify(options: argparse.Namespace) -> int:
    report = runtime.verify(
        _source(options),
        prompts=options.prompts,
        suite=options.suite,
        tokens=options.tokens,
        device=options.device,
        dtype=options.dtype,
        eager=options.eager,
        threads=options.threads,
        oracle=options.oracle,
        base_rate=options.base_rate,
        json_path=options.json,
        html_path=options.html,
    )
    print(report)
    return 0 if report.passed else DIFFERENT


def _answer(
    model: Model, prompt: str | list[int], options: argparse.Namespace, echo: str = ""
) -> tuple[GenerationResult, bool]:
    """Generate and print. Ctrl-C ends the answer where it stands; the second value says whether it did."""
    streaming, interrupted = not (options.json or options.no_stream), False
    with runtime.stream(model, prompt, max_new_tokens=options.max_new_tokens, stop=options.stop) as pieces:
        try:
            if streaming and echo:
                print(f"\033[2m{echo}\033[0m", end="", flush=True)
            for piece in pieces:
                if streaming:
                    print(piece.text, end="", flush=True)
        except KeyboardInterrupt:
            interrupted = True
    result = pieces.results[0]
    if options.json:
        print(_json({"model": model.name, **result.to_dict()}), flush=True)
    else:
        print("" if streaming else result.text, flush=True)
    return result, interrupted


def _load(options: argparse.Namespace) -> Model:
    return runtime.load(
        options.model,
        device=options.device,
        dtype=options.dtype,
        max_seq_len=options.max_seq_len,
        eager=options.eager,
        revision=options.revision,
        threads=options.threads,
    )


def _source(options: argparse.Namespace) -> Any:
    """The model's name, with the revision where one is given."""
    if options.revision is None:
        return options.model
    from runtime.checkpoint import sources

    return sources.pinned(options.model, options.revision)


def _read_prompt(argument: str) -> str:
    """The prompt itself, or with "-" all of stdin but its last line break, as a shell's $(...) has it."""
    if argument != "-":
        prompt = argument
    else:
        prompt = _text(sys.stdin.buffer.read()).removesuffix("\n")
    if not prompt:
        raise InvalidArgument("the prompt is empty: expected some text")
    return prompt


def _lines(interactive: bool) -> Iterator[str]:
    if not interactive:
        yield from map(_text, sys.stdin.buffer)
        return
    import readline  # noqa: F401 (gives input() its line editing)

    while True:
        try:
            yield input(">>> ")
        except EOFError:
            print()
            return


def _text(line: bytes) -> str:
    """What stdin holds, which is UTF-8 whatever the locale."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"stdin must be UTF-8 text: {error}") from None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=not streams.holds_any_text(sys.stdout))


def _complain(message: str) -> None:
    with contextlib.suppress(OSError):  # the exit code says it too
        print(f"{NAME}: error: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=NAME, description="Greedy decoding of Gemma 1, 2 and 3, token for token what Hugging Face generates."
    )
    parser.add_argument("--version", action="version", version=f"{NAME} {runtime.__version__}")
    commands = parser.add_subparsers(required=True, metavar="generate | chat | inspect | info | verify | bench")
    verify = commands.add_parser(
        "verify",
        help="Audit a model against Hugging Face, token for token.",
        description="Audit a model against Hugging Face's greedy decoding. Exit code 0: every token is equal or every "
        "difference explained; 1: not.",
        allow_abbrev=False,
    )
    verify.set_defaults(command=_verify)
    verify.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder, .gguf file, hub id or 'demo' (default: as --model elsewhere)"
    )
    verify.add_argument("--revision", metavar="REV", help=_REVISION)
    chosen = verify.add_mutually_exclusive_group()
    chosen.add_argument("--prompts", metavar="FILE", help='one prompt a line, or .jsonl with {"prompt": text or ids}')
    chosen.add_argument("--suite", choices=("short", "code", "multilingual", "long"), help="one suite instead of all")
    verify.add_argument("--tokens", type=whole(1), default=64, metavar="N", help="tokens of an answer (%(default)s)")
    verify.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    verify.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    verify.add_argument(
        "--threads", type=whole(1, MAX_THREADS), metavar="N", help="threads on a CPU (as many as may be kept busy)"
    )
    verify.add_argument("--eager", action="store_true", help="audit plain decode steps: no CUDA graphs")
    verify.add_argument(
        "--oracle", choices=("hf", "hf-static"), default="hf", help="Hugging Face's cache (%(default)s)"
    )
    verify.add_argument("--base-rate", action="store_true", help="run Hugging Face against itself too")
    verify.add_argument(
        "--json", metavar="OUT", help="write the report as JSON; an unfinished audit goes on from there"
    )
    verify.add_argument("--html", metavar="OUT", help="write the report as a page")
    commands.add_parser("bench", help="Measure speed: latency, throughput, kernels, peers.", add_help=False)

    def command(name: str, run: Callable[[argparse.Namespace], int], purpose: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=purpose, description=purpose, allow_abbrev=False)
        added.set_defaults(command=run)
        added.add_argument(
            "--model",
            metavar="NAME",
            help="folder, .gguf file, hub id or 'demo' (default: $GEMMA_RUNTIME_MODEL or demo)",
        )
        added.add_argument("--revision", metavar="REV", help=_REVISION)
        added.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
        added.add_argument(
            "--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto, the checkpoint's own)"
        )
        added.add_argument(
            "--threads", type=whole(1, MAX_THREADS), metavar="N", help="threads on a CPU (as many as may be kept busy)"
        )
        added.add_argument(
            "--max-seq-len",
            type=whole(1),
            metavar="N",
            help="prompt plus answer, in tokens (4096, or the checkpoint's own limit where that is less)",
        )
        added.add_argument("--json", action="store_true", help="print JSON")
        return added

    generate = command("generate", _generate, "Continue a text.")
    chat = command("chat", _chat, "Talk with an instruction-tuned model.")
    inspect = command("inspect", _inspect, "Look inside: modules, token ids, best candidates, decoding step by step.")
    info = command("info", _info, "Versions, device, memory plan, and how fast this machine could decode.")

    for added in (generate, chat, inspect):
        added.add_argument(
            "--eager",
            action="store_true",
            help="decode by plain steps: no CUDA graph, and on a CPU Hugging Face's own operations",
        )
    for added in (generate, inspect):
        added.add_argument("prompt", metavar="PROMPT", help="the text; - reads it from stdin")
    for added in (generate, chat):
        added.add_argument(
            "--max-new-tokens", type=whole(0), default=128, metavar="N", help="most tokens to generate (%(default)s)"
        )
        added.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
        added.add_argument("--no-stream", action="store_true", help="print the text when it is complete")
    info.add_argument(
        "--plan",
        nargs="?",
        const="h100",
        metavar="GPU",
        help="the cost sheet of a decode step on a GPU that need not be here: a100, h100 (the default), h200, b200, "
        "rtx-3090, rtx-4090 or rtx-5090; --model may be a published size such as gemma-1.1-2b, which needs no files",
    )
    info.add_argument("--batch-size", type=whole(1), metavar="N", help="rows, with --plan (1)")
    info.add_argument("--context", type=whole(1), metavar="N", help="tokens, with --plan (128)")
    generate.add_argument("--stats", action="store_true", help="print the numbers even where stderr is no terminal")
    inspect.add_argument("--top-k", type=whole(1), default=5, metavar="N", help="candidates to list (%(default)s)")
    inspect.add_argument(
        "--positions", type=int, nargs="+", metavar="I", help="tokens to look at, negative from the end (-1 -2)"
    )
    inspect.add_argument("--steps", type=whole(0), default=0, metavar="N", help="tokens to decode (%(default)s)")
    return parser
