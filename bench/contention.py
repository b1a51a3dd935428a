"""Decoding with other processes on the same cores: this runtime beside peers, in alternating runs.

    python -m runtime.bench.contention --busy 0,2 --peer llama.cpp=PYTHON --out bench/results/contention-cpu.json

A busy process computes without waiting. With one per core an engine gets at most half of every core, and its threads
are preempted for milliseconds at a time. Progress goes to stderr; the report, JSON, is written to FILE and its last
line to stdout. Exit codes: 0 done; 1 the parity audit refused this runtime, and nothing was timed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from runtime.bench.command import comma_list, peer
from runtime.bench.compare import ENGINES, OURS, Entry, equal_share, prepare
from runtime.bench.environment import environment
from runtime.bench.measure import LEAST_SEQ_LEN, folder_of, prompt_ids, rotated
from runtime.bench.output import publish
from runtime.cli.arguments import whole
from runtime.loading import resolve
from runtime.text.tokenizer import Tokenizer

REFUSED = 1
BUSY = "while True: pass"
SETTLE_S = 0.5  # until the busy processes are running


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and reports.

    Args:
        arguments: the command line without the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    found = resolve(
        options.model, device="cpu", dtype=options.dtype, max_seq_len=LEAST_SEQ_LEN, threads=options.threads
    )
    folder = folder_of(options.model)
    prompt = prompt_ids(Tokenizer.from_folder(folder, found.config.vocab), found.config.vocab, options.prompt_len)
    size = (options.prompt_len, options.gen_len)
    report: dict[str, Any] = {
        "benchmark": "contention",
        "model": found.name,
        "dtype": found.runtime.dtype,
        "threads": found.runtime.threads,
        "prompt_len": options.prompt_len,
        "gen_len": options.gen_len,
        "autogroup": _autogroup(),
        "environment": environment(torch.device("cpu")).model_dump(mode="json"),
    }
    entries = [Entry(name) for name in options.engines]
    with ExitStack() as stack:
        prepare(entries, found, folder, {size: prompt}, 1, dict(options.peer), stack)
        report["engines"] = {
            entry.name: {"version": entry.version, "status": entry.status, "reason": entry.reason} for entry in entries
        }
        code = REFUSED if any(entry.name == OURS and entry.status != "ok" for entry in entries) else 0
        report["rows"] = [] if code else list(_rows(entries, prompt, options))
    publish(report, options.out)
    return code


def _rows(entries: list[Entry], prompt: list[int], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per engine and number of busy processes. Their order rotates, so that other load on the machine affects
    all alike."""
    size = (options.prompt_len, options.gen_len)
    requests: dict[tuple[str, int], list[Any]] = {}
    for number in range(options.repeat):
        print(f"round {number + 1} of {options.repeat}", file=sys.stderr)
        for count in rotated(options.busy, number):
            with busy_processes(count):
                for entry in rotated(entries, number):
                    request = entry.run(prompt, size[1])
                    if request is not None:
                        requests.setdefault((entry.name, count), []).append(request)
    for (name, count), done in sorted(requests.items(), key=lambda item: item[0][1]):
        speeds = [1 / request.tpot_s for request in done]
        ours = requests.get((OURS, count))
        yield {
            "engine": name,
            "busy_processes": count,
            "decode_tokens_per_s": statistics.median(speeds),
            "samples": speeds,
            "first_token_ms": statistics.median(request.times_s[0] for request in done) * 1e3,
            "equal_tokens": equal_share(done[0].tokens[0], ours[0].tokens[0]) if ours else None,
            "same_tokens_each_time": len({tuple(request.tokens[0]) for request in done}) == 1,
        }
        print(f"{name}, {count} busy: {statistics.median(speeds):.1f} tokens/s", file=sys.stderr)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Runs `count` processes that compute without waiting."""
    started = [subprocess.Popen([sys.executable, "-S", "-c", BUSY]) for _ in range(count)]
    try:
        time.sleep(SETTLE_S if count else 0)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def _autogroup() -> bool:
    """Whether the scheduler shares cores among sessions first (each engine is one) and only then among threads."""
    try:
        return Path("/proc/sys/kernel/sched_autogroup_enabled").read_text().strip() == "1"
    except OSError:
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="NAME", help="folder, .gguf file, hub id or 'demo' (default: the demo)")
    parser.add_argument("--dtype", default="bfloat16", help="float32 or bfloat16 (%(default)s)")
    parser.add_argument("--threads", type=whole(1), metavar="N", help="of every engine (as many as may be kept busy)")
    parser.add_argument("--busy", type=comma_list(whole(0)), default=[0, 2], metavar="N,...", help="processes (0,2)")
    parser.add_argument("--prompt-len", type=whole(1), default=6, metavar="N", help="tokens (%(default)s)")
    parser.add_argument("--gen-len", type=whole(2), default=48, metavar="N", help="tokens (%(default)s)")
    parser.add_argument("--repeat", type=whole(1), default=7, metavar="N", help="runs (%(default)s)")
    parser.add_argument(
        "--engines", type=comma_list(str), default=[OURS, "llama.cpp"], help=f"which of {', '.join(ENGINES)}"
    )
    parser.add_argument(
        "--peer", type=peer, action="append", default=[], metavar="NAME=PYTHON",
        help="the interpreter of the environment that has an engine's packages; may be repeated",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the report")
    return parser


if __name__ == "__main__":
    sys.exit(main())
