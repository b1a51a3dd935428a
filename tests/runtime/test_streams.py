"""Every command ends properly whatever its standard streams are, and with one line where something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import runtime

# The commands' own ways to write, without a model: what is tested is what stands around them.
STAND_IN = """
import sys
import runtime
from runtime.cli import chat, generate, streams
from runtime.cli.main import main
def run_generate(options):
    if options.prompt == "bad":
        raise runtime.InvalidArgument("expected \\u00e9,\\n got e")
    if options.prompt == "bug":
        raise KeyError("\\u00e9")
    if options.prompt == "-":
        print(streams.read_stdin())
        return 0
    print("caf\\u00e9 \\u96ea" * 30000)
    print("12 tokens \\u00b7", file=sys.stderr)
    return 0
def run_chat(options):
    for line in streams.stdin_lines():
        print(line, end="")
    return 0
for command, run in ((generate, run_generate), (chat, run_chat)):
    run.__module__, command.run = command.__name__, run
sys.exit(main())
"""
FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


def shell(
    redirected: str, *arguments: str, stdin: bytes = b"", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Runs the stand-in under bash, which redirects its streams."""
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$@" {redirected}', "-", sys.executable, "-c", STAND_IN, *arguments],
        input=stdin,
        env=os.environ | environment,
        capture_output=True,
        check=False,
    )


REDIRECTED = {
    "nothing": ("", "fine", 0),
    "stdout closed": (">&-", "fine", 0),
    "stderr closed": ("2>&-", "fine", 0),
    "stdin closed": ("<&-", "fine", 0),
    "all closed": ("<&- >&- 2>&-", "fine", 0),
    "all closed, bad input": ("<&- >&- 2>&-", "bad", 2),
    "stdin closed and read": ("<&-", "-", 0),
    "stderr closed, bad input": ("2>&-", "bad", 2),
    "stderr full, bad input": ("2>/dev/full", "bad", 2),
    "stderr full, a bug": ("2>/dev/full", "bug", 70),
    "stdout full": (">/dev/full", "fine", 2),
    "both full": (">/dev/full 2>/dev/full", "fine", 2),
    "help, all closed": ("<&- >&- 2>&-", "--help", 0),
    "reader gone": ("| head -c 1", "fine", 141),
    "both readers gone": ("2>&1 | head -c 1", "fine", 141),
}


@pytest.mark.parametrize("case", [pytest.param(name, marks=FULL if "full" in name else ()) for name in REDIRECTED])
def test_a_command_ends_properly(case):
    redirected, prompt, code = REDIRECTED[case]
    done = shell(redirected, "generate", prompt)
    assert done.returncode == code
    for traceback in (b"Traceback", b"Exception ignored"):
        assert traceback not in done.stdout + done.stderr
    assert done.stderr.count(b"\n") <= 1


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("ascii", "caf? ?"), ("latin-1", "caf\xe9 ?"), ("utf-8", "café 雪")],
)
def test_text_is_written_as_far_as_the_encoding_goes(encoding, text):
    done = shell("", "generate", "fine", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout) == (0, (text * 30000 + "\n").encode(encoding))


def test_in_the_c_locale():
    done = shell("", "generate", "fine", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0 and done.stdout.startswith(b"caf") and not done.stderr.count(b"Traceback")


@pytest.mark.parametrize("command", [["generate", "-"], ["chat"]], ids=" ".join)
def test_stdin_is_utf_8_whatever_the_locale(command):
    done = shell("", *command, stdin="café".encode(), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout.strip()) == (0, b"caf?")
    done = shell("", *command, stdin=b"\xff\xfe")
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1) and b"stdin must be UTF-8" in done.stderr


def test_bad_input_is_a_line_and_a_bug_a_traceback():
    done = shell("", "generate", "bad")
    assert (done.returncode, done.stderr.decode()) == (2, "gemma-runtime: error: expected é, got e\n")
    done = shell("", "generate", "bug")
    assert done.returncode == 70
    assert b"please report it\nTraceback" in done.stderr and done.stderr.endswith("KeyError: 'é'\n".encode())


def test_json_holds_any_text_in_ascii(tiny_folder):
    command = [sys.executable, "-m", "runtime", "inspect", "é雪", "--model", str(tiny_folder), "--max-seq-len", "64"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--json"], env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode("ascii"))["prompt"][-1]["text"]


def test_a_program_without_a_console(tiny_folder, monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    model = runtime.load(tiny_folder, device="cpu", max_seq_len=64)
    assert runtime.generate(model, [2, 3], max_new_tokens=2).token_ids
    runtime.load(tiny_folder, device="cpu", max_seq_len=64, progress=True)
