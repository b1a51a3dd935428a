"""The command line, as a user or a script meets it."""

import argparse
import io
import json
import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module

import pytest

import runtime
from runtime.cli.arguments import load
from runtime.cli.main import main

from .gguf_files import write_gguf

PROMPT = "the dog"
LIMITS = ["--max-seq-len", "128", "--device", "cpu"]
COMMAND = [sys.executable, "-m", "runtime"]


@pytest.fixture
def run(tiny_folder, capsys, monkeypatch):
    """Runs a command in this process on the tiny model: exit code, stdout, stderr."""

    def call(*arguments, stdin=b"", model=tiny_folder):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        command, *rest = arguments
        try:
            code = main([command, "--model", str(model), *LIMITS, *rest])
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def expected(tiny):
    return runtime.generate(tiny, PROMPT, max_new_tokens=20)


def assert_one_line_error(outcome, *parts):
    code, out, err = outcome
    assert code == 2
    assert out == ""
    assert err.startswith("gemma-runtime: error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    "command",
    [
        ["generate", PROMPT, "--max-new-tokens", "2"],
        ["chat", "--max-new-tokens", "2"],
        ["inspect", PROMPT],
        ["info"],
        ["info", "--plan"],
    ],
    ids=" ".join,
)
def test_a_short_checkpoint_needs_no_length(command, tiny_folder, capsys, monkeypatch):
    """Its max_position_embeddings of 256 is under the usual default."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the dog\n")))
    monkeypatch.setattr("runtime.cost.info.read_bandwidth_gb_s", lambda device: 10.0)
    assert main([command[0], "--model", str(tiny_folder), "--device", "cpu", *command[1:]]) == 0


def test_verify_takes_the_prompts_that_a_short_checkpoint_has_room_for(tiny_folder, monkeypatch):
    class Stop(Exception):
        pass

    def load(source, *, max_seq_len, **limits):
        assert 128 < max_seq_len <= 256
        raise Stop

    monkeypatch.setattr(import_module("runtime.parity.verify"), "load", load)
    with pytest.raises(Stop):
        runtime.verify(tiny_folder, device="cpu", progress=False)


@pytest.mark.parametrize(
    "how", [[], ["--no-stream"], ["--speculate", "prompt"]], ids=["streamed", "at once", "speculated"]
)
def test_generate_prints_the_text_and_nothing_else(run, expected, how):
    assert run("generate", PROMPT, "--max-new-tokens", "20", *how) == (0, expected.text + "\n", "")


def test_generate_reads_stdin(run, expected):
    for text in (b"the dog", b"the dog\n"):
        assert run("generate", "-", "--max-new-tokens", "20", stdin=text)[1] == expected.text + "\n"
    two_lines = run("generate", "-", "--max-new-tokens", "20", "--json", stdin=b"the dog\n\n")[1]
    assert json.loads(two_lines)["prompt_token_ids"] == [*expected.prompt_token_ids, 263]


def test_generate_json(run, expected, tiny_folder):
    code, out, err = run("generate", PROMPT, "--max-new-tokens", "20", "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    answer = json.loads(out)
    assert answer["text"] == expected.text
    assert answer["token_ids"] == list(expected.token_ids)
    assert answer["prompt_token_ids"] == list(expected.prompt_token_ids)
    assert answer["finish_reason"] == expected.finish_reason
    assert answer["model"] == str(tiny_folder)
    assert answer["stats"]["new_tokens"] == 20


def test_generate_stops(run, expected):
    first, second = expected.text[5:7], expected.text[10:12]
    cut = min(expected.text.index(first), expected.text.index(second))
    out = run("generate", PROMPT, "--max-new-tokens", "20", "--stop", second, "--stop", first)[1]
    assert out == expected.text[:cut] + "\n"


def test_an_answer_without_text_says_how_to_see_it(run, expected, tiny, tiny_folder, tmp_path):
    """Its one token ends it."""
    folder = shutil.copytree(tiny_folder, tmp_path / "brief")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": expected.token_ids[0]}))
    some = PROMPT, "--max-new-tokens", "9"
    code, out, err = run("generate", *some, model=folder)
    assert (code, out, err.count("\n")) == (0, "\n", 1), err
    assert "--special-tokens" in err
    shown = tiny.tokenizer.decode(expected.token_ids[:1], skip_special_tokens=False)
    assert run("generate", *some, "--special-tokens", model=folder) == (0, shown + "\n", "")
    assert run("generate", *some, "--special-tokens", "--no-stream", model=folder) == (0, shown + "\n", "")
    assert json.loads(run("generate", *some, "--json", model=folder)[1])["text"] == ""


def test_stats_on_request(run):
    code, _, err = run("generate", PROMPT, "--max-new-tokens", "5", "--stats")
    assert code == 0
    assert err.startswith("8 prompt + 5 new tokens · first token ") and "GB/s" in err


def test_no_tokens(run):
    assert run("generate", PROMPT, "--max-new-tokens", "0") == (0, "\n", "")


def test_inspect(run, tiny):
    seen = runtime.inspect(tiny, PROMPT, top_k=3, positions=[-1, -2, 0], steps=4)
    arguments = ["inspect", PROMPT, "--top-k", "3", "--positions", "-1", "-2", "0", "--steps", "4"]
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert "greedy, step by step" in out
    told = json.loads(run(*arguments, "--json")[1])
    assert [step["id"] for step in told["steps"]] == [step.id for step in seen.steps]
    assert [position["index"] for position in told["positions"]] == [7, 6, 0]
    assert [len(position["candidates"]) for position in told["positions"]] == [3, 3, 3]


def test_info_with_a_plan(run, tiny):
    code, out, err = run("info", "--plan")
    assert (code, err) == (0, "")
    assert "H100" in out and f"{6 * len(tiny.config.layers) + 2} launches" in out
    told = json.loads(run("info", "--plan", "a100", "--batch-size", "8", "--context", "200", "--json")[1])
    assert (told["batch"], told["context"], told["multiprocessors"]) == (8, 200, 108)


def test_info(run, tiny, monkeypatch):
    measured = import_module("runtime.cost.info").read_bandwidth_gb_s
    monkeypatch.setattr("runtime.cost.info.read_bandwidth_gb_s", lambda device: measured(device, buffer_bytes=2**24))
    code, out, err = run("info")
    assert (code, err) == (0, "")
    for shown in ("torch", "Gemma 3, 3 layers", "weights", "KV cache", "GB/s", "tokens/s"):
        assert shown in out
    told = json.loads(run("info", "--json")[1])
    assert told["weights"] == tiny.plan.weights
    assert told["versions"]["gemma-runtime"] == runtime.__version__
    for ceiling in told["ceilings"]:
        assert ceiling["bytes_per_token"] == tiny.plan.bytes_per_token(ceiling["context"])
        rate = told["read_bandwidth_gb_s"] * 1e9 / ceiling["bytes_per_token"]
        assert ceiling["tokens_per_s"] == pytest.approx(rate)


def test_chat_through_a_pipe(run, tiny):
    asked, replies = [], []
    for said in ("the dog", "and the snow"):
        asked.append({"role": "user", "content": said})
        replies.append(runtime.chat(tiny, asked, max_new_tokens=10).text)
        asked.append({"role": "assistant", "content": replies[-1]})
    talk = "the dog\n\nand the snow\n/reset\n  the dog  \n/exit\nnever read\n"
    code, out, err = run("chat", "--max-new-tokens", "10", stdin=talk.encode())
    assert (code, err) == (0, "")
    assert out == "".join(reply + "\n" for reply in [*replies, replies[0]])
    code, out, _ = run("chat", "--max-new-tokens", "10", "--json", "--speculate", "prompt", stdin=b"the dog")
    assert code == 0
    assert json.loads(out)["text"] == replies[0]


def test_chat_refuses_a_base_model_before_its_weights_are_read(run, tiny_folder, tmp_path):
    base = shutil.copytree(tiny_folder, tmp_path / "base", ignore=shutil.ignore_patterns("*.jinja", "*.safetensors"))
    outcome = run(
        *("chat", "--stop", "a b", "--max-new-tokens", "5", "--dtype", "float32", "--speculate", "prompt"),
        stdin=b"the dog\n",
        model=base,
    )
    assert_one_line_error(outcome, "no chat template")
    shutil.copy(tiny_folder / "model.safetensors", base)
    command = outcome[2].partition("gemma-runtime generate ")[2]
    assert "--speculate prompt" in command
    code, out, _ = run("generate", *shlex.split(command), stdin=b"the dog", model=base)  # the command that it names
    assert code == 0 and 0 < len(out) <= 6


def test_chat_refuses_a_base_gguf_file_before_it_is_converted(run, tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="needs the demo extra")
    monkeypatch.setattr("runtime.checkpoint.gguf.conversion.convert", lambda *_: pytest.fail("converted"))
    monkeypatch.setattr("runtime.checkpoint.sources.cached", lambda *_: pytest.fail("converted the demo"))
    write_gguf(tmp_path / "base.gguf")
    for model in (tmp_path / "base.gguf", "demo"):
        assert_one_line_error(run("chat", stdin=b"the dog\n", model=model), "no chat template")


def test_a_conversation_that_outgrows_the_model(run):
    code, _, err = run("chat", "--max-new-tokens", "20", stdin=b"the dog\n" * 9)
    assert code == 2
    assert err.count("\n") == 1 and "max_seq_len = 128" in err


BAD_LINES = {
    "empty prompt": (["generate", ""], "prompt is empty"),
    "empty stdin": (["generate", "-"], "prompt is empty"),
    "negative length": (["generate", "A", "--max-new-tokens", "-1"], "expected at least 0, got -1"),
    "length not a number": (["generate", "A", "--max-new-tokens", "ten"], "expected a whole number, got 'ten'"),
    "too long": (["generate", "A", "--max-new-tokens", "127"], "2 + 127 = 129 tokens"),
    "no such guesses": (["generate", "A", "--speculate", "foo"], "invalid choice: 'foo'"),
    "empty stop": (["generate", "A", "--stop", ""], "empty string"),
    "no device": (["generate", "A", "--device", "tpu"], "tpu"),
    "no dtype": (["generate", "A", "--dtype", "int3"], "int3"),
    "max-seq-len of zero": (["generate", "A", "--max-seq-len", "0"], "expected at least 1, got 0"),
    "plan for an unknown GPU": (["info", "--plan", "v100"], "gpu must be one of a100, h100"),
    "plan for 65 rows": (["info", "--plan", "--batch-size", "65"], "max_batch must be at most 64, got 65"),
    "plan past the model": (["info", "--plan", "--context", "257"], "context must be 1 to 256, got 257"),
    "context without a plan": (["info", "--context", "9"], "go with --plan"),
    "max-seq-len past the model": (["info", "--max-seq-len", "4096"], "max_position_embeddings (256), got 4096"),
    "no prompt": (["generate"], "PROMPT"),
    "surplus": (["generate", "A", "B"], "unrecognized arguments: B"),
    "two models": (["chat", "demo"], "MODEL: not allowed with argument --model"),
    "abbreviated option": (["generate", "A", "--max-new", "5"], "unrecognized arguments"),
    "unknown option with a value": (
        ["info", "--plan", "h100", "--model", "gemma-1.1-2b", "--max-batch", "8"],
        "unrecognized arguments: --max-batch (see gemma-runtime info --help)",
    ),
    "unknown option before the prompt": (["generate", "--max-new", "5", "A"], "unrecognized arguments: --max-new ("),
    "no position": (["inspect", "A", "--positions", "9"], "position must be from -2 to 1, got 9"),
    "top-k past the vocabulary": (["inspect", "A", "--top-k", "300"], "from 1 to 299, got 300"),
    "too many steps": (["inspect", "A", "--steps", "127"], "2 + 127 = 129 tokens"),
}


@pytest.mark.parametrize(("arguments", "part"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, part):
    assert_one_line_error(run(*arguments), part)


def test_a_model_that_is_not_there(run, tmp_path):
    assert_one_line_error(run("generate", "A", model=tmp_path / "nothing"), "no model at")


def test_stdin_that_is_no_text(run):
    assert_one_line_error(run("generate", "-", stdin=b"\xff\xfe"), "stdin must be UTF-8")


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["sing"])
    assert exit.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_and_version_import_nothing_slow():
    code = "import sys; from runtime.cli.main import main\ntry: main(['chat', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'numpy', 'prompt_toolkit', 'tqdm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"gemma-runtime {runtime.__version__}\n"


def long_answer(folder, *more):
    limits = ["--max-seq-len", "128", "--max-new-tokens", "60"]
    return ["generate", PROMPT, "--model", str(folder), "--device", "cpu", *limits, *more]


def with_each_step(action):
    """A command like gemma-runtime that also does something, a line of Python, before each decode step."""
    code = f"""
import os, signal, sys, time
from runtime.engine import decode
from runtime.cli.arguments import load
from runtime.cli.main import main
# A shell without job control, as under CI, starts what it puts in the background with this signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
stepper, steps = decode.stepper, []
def acting_stepper(model, state, count, *more):
    step = stepper(model, state, count)
    def act_and_step():
        steps.append(1)
        {action}
        step()
    return act_and_step
decode.stepper = acting_stepper
sys.exit(main())
"""
    return [sys.executable, "-c", code]


SLOWLY = with_each_step("time.sleep(0.05)")
# The first step is one on nothing, which compiles.
INTERRUPTED_IN_STEP_8 = with_each_step("len(steps) == 9 and os.kill(os.getpid(), signal.SIGINT)")


@pytest.mark.newest_only
@pytest.mark.parametrize("how", [[], ["--no-stream"], ["--json"]], ids=["streamed", "at once", "json"])
def test_ctrl_c_keeps_the_text_so_far(tiny, tiny_folder, how):
    so_far = runtime.generate(tiny, PROMPT, max_new_tokens=8)
    done = subprocess.run([*INTERRUPTED_IN_STEP_8, *long_answer(tiny_folder, *how)], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (130, b"")
    if how == ["--json"]:
        answer = json.loads(done.stdout)
        assert (answer["token_ids"], answer["finish_reason"]) == (list(so_far.token_ids), None)
    else:
        assert so_far.text.startswith(done.stdout.decode().removesuffix("\n"))  # but for bytes still undecided
        assert len(done.stdout) >= 4


@pytest.mark.newest_only
def test_an_interrupt_from_outside(tiny_folder):
    process = subprocess.Popen(
        [*SLOWLY, *long_answer(tiny_folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    head = process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    assert head and rest.endswith(b"\n") and rest.count(b"\n") == 1


def test_a_reader_that_goes_away(tiny_folder):
    process = subprocess.Popen([*SLOWLY, *long_answer(tiny_folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(3)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk(tiny_folder):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *long_answer(tiny_folder)], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr == "gemma-runtime: error: [Errno 28] No space left on device\n"


def at_a_terminal(command, typed=()):
    """What a command shows when stdin, stdout and stderr are a terminal: exit code and screen.

    `typed` are pairs: what to wait for, what to type then.
    """
    child, terminal = pty.fork()
    if child == 0:
        os.execv(command[0], command)
    screen, seen, waiting = b"", 0, list(typed)
    while select.select([terminal], [], [], 60)[0]:
        try:
            screen += os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        while waiting and waiting[0][0] in screen[seen:]:
            until, keys = waiting.pop(0)
            seen = screen.index(until, seen) + len(until)
            time.sleep(0.3)  # a prompt shows a moment before its reader heeds Ctrl-C
            os.write(terminal, keys)
    else:
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), screen.decode().replace("\r\n", "\n")


def test_at_a_terminal_the_prompt_and_the_numbers_are_shown_too(tiny_folder, expected, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    command = [*COMMAND, "generate", PROMPT, "--model", str(tiny_folder), *LIMITS, "--max-new-tokens", "20"]
    code, screen = at_a_terminal(command)
    assert code == 0
    assert f"\033[2m{PROMPT}\033[0m{expected.text}\n" in screen
    # Where colorama is installed, numba has it put the terminal's colours back at exit.
    assert screen.rstrip().removesuffix("\033[0m").rstrip().endswith("per token)")


def test_chat_at_a_terminal(tiny, tiny_folder, monkeypatch, tmp_path):
    """An answer, one that Ctrl-C stops, a line that it clears, and the way out."""
    monkeypatch.setenv("GEMMA_RUNTIME_HISTORY", str(tmp_path / "history"))
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")  # nobody answers where the cursor is
    so_far = runtime.chat(tiny, [{"role": "user", "content": "the dog"}], max_new_tokens=8).text
    command = [*INTERRUPTED_IN_STEP_8, "chat", str(tiny_folder), *LIMITS, "--max-new-tokens", "40"]
    talk = [(b">>>", b"the dog\r"), (so_far[:4].encode(), b""), (b">>>", b"never sent\x03"), (b">>>", b"/stats\r")]
    code, screen = at_a_terminal(command, [*talk, (b"tokens of context", b""), (b">>>", b"\x04")])
    assert code == 0, screen
    assert "/help lists the commands" in screen and "Traceback" not in screen
    assert "prompt + 8 new tokens" in screen
    assert "never sent" not in (tmp_path / "history").read_text()


@pytest.mark.parametrize(
    ("speculate", "device", "rows"), [(None, "auto", 1), ("prompt", "auto", 8), ("prompt", "cpu", 1)]
)
def test_guesses_on_a_gpu_load_the_model_for_more_rows(speculate, device, rows, monkeypatch):
    found = []
    monkeypatch.setattr(runtime, "load", lambda *_, max_batch, **limits: found.append(max_batch))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    options = {"model": "m", "device": device, "dtype": "auto", "max_seq_len": None, "eager": False, "quantize": None}
    load(argparse.Namespace(**options, revision=None, threads=None, speculate=speculate))
    assert found == [rows]
