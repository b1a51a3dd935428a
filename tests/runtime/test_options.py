"""The command line's own words: help, --json and its file, completion of a shell, colours."""

from __future__ import annotations

import argparse
import inspect
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout

import pytest

import runtime
from runtime.bench.command import parser as bench_parser
from runtime.cli import streams
from runtime.cli.main import main, parser
from runtime.engine.options import StreamOptions

LIMITS = ["--device", "cpu", "--max-seq-len", "128"]
PROMPT = "the dog"
BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
function_of=$(complete -p gemma-runtime | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
"$function_of" gemma-runtime "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def commands(root: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command that does something itself."""
    found = {}
    for action in root._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= commands(command) or {command.prog: command}
    return found


COMMANDS = {name: one for root in (parser(), bench_parser()) for name, one in commands(root).items()}


@pytest.mark.parametrize("arguments", [[], ["bench"], ["check"]], ids=["alone", "bench", "check"])
def test_without_a_command_help_is_printed(arguments, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("usage: gemma-runtime") and "COMMAND" in err


def test_an_option_is_spelt_and_explained_alike_in_every_command():
    """But for the numbers of a command, and dtypes, of which the benchmark takes several."""
    assert {"gemma-runtime check kernels", "gemma-runtime bench latency", "gemma-runtime verify"} <= COMMANDS.keys()
    seen: dict[str, set] = {}
    for name, command in COMMANDS.items():
        for action in command._actions:
            for option in {"--model", "--revision", "--device", "--threads", "--html", "--json"} & {
                *action.option_strings
            }:
                if (name, option) != ("gemma-runtime chat", "--json"):  # prints a line for each answer
                    seen.setdefault(option, set()).add((action.metavar, action.nargs, action.default))
    assert {option: len(ways) for option, ways in seen.items()} == dict.fromkeys(seen, 1), seen
    assert len(seen) == 6


def test_a_model_is_an_argument_where_there_is_no_other():
    for name, command in COMMANDS.items():
        positional = {action.metavar for action in command._actions if not action.option_strings}
        if any("--model" in action.option_strings for action in command._actions):
            assert positional in ({"MODEL"}, {"PROMPT"}, {"FILE"}), name


def answer(tiny_folder, capsys, *options):
    assert main(["generate", "--model", str(tiny_folder), *LIMITS, "--max-new-tokens", "4", *options]) == 0
    return capsys.readouterr().out


def test_json_beside_a_prompt_prints_and_a_json_file_is_written(tiny_folder, capsys, tmp_path):
    printed = json.loads(answer(tiny_folder, capsys, "--json", PROMPT))
    file = tmp_path / "answer.json"
    text = answer(tiny_folder, capsys, "--json", str(file), PROMPT)
    assert text == printed["text"] + "\n"
    written = json.loads(file.read_text())
    assert written["token_ids"] == printed["token_ids"] and written["model"] == printed["model"]
    odd = tmp_path / "answer"
    answer(tiny_folder, capsys, f"--json={odd}", PROMPT)
    assert json.loads(odd.read_text())["text"] == printed["text"]


def test_every_option_is_typed_and_shown():
    shown = inspect.signature(runtime.generate).parameters.keys() - {"model_or_prompt", "prompt", "progress"}
    assert shown == StreamOptions.__annotations__.keys()


def test_sampling_options_are_those_of_generate(tiny_folder, tiny, capsys):
    given = ["--temperature", "1.5", "--top-k", "20", "--top-p", "0.9", "--min-p", "0.01", "--seed", "3"]
    given += ["--repetition-penalty", "1.2", "--presence-penalty", "0.5", "--frequency-penalty", "-0.5"]
    lines = answer(tiny_folder, capsys, *given, "-n", "2", "--logprobs", "1", "--json", PROMPT).splitlines()
    expected = runtime.generate(
        tiny,
        PROMPT,
        max_new_tokens=4,
        n=2,
        temperature=1.5,
        top_k=20,
        top_p=0.9,
        min_p=0.01,
        seed=3,
        logprobs=1,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
    )
    assert [json.loads(line)["token_ids"] for line in lines] == [list(result.token_ids) for result in expected]
    assert [len(json.loads(line)["logprobs"]) for line in lines] == [len(result.token_ids) for result in expected]
    text = answer(tiny_folder, capsys, *given, "-n", "2", PROMPT)
    assert text == "".join(f"--- answer {at} of 2 ---\n{expected[at - 1].text}\n" for at in (1, 2))


def test_an_answer_follows_a_schema_from_a_file(tiny_folder, capsys, tmp_path):
    pytest.importorskip("llguidance", reason="needs the structured extra")
    file = tmp_path / "schema.json"
    file.write_text('{"enum": ["ab", "cd"]}')
    assert json.loads(answer(tiny_folder, capsys, "--json-schema", str(file), PROMPT)) in ("ab", "cd")
    assert answer(tiny_folder, capsys, "--regex", "a{3}", PROMPT) == "aaa\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot read"), ("{", "must hold JSON"), ("[]", "must hold an object, got list")],
    ids=["missing", "no JSON", "a list"],
)
def test_a_schema_that_cannot_be_read_is_refused_first(content, said, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "load", lambda *_, **__: pytest.fail("loaded a model"))
    file = tmp_path / "schema.json"
    if content is not None:
        file.write_text(content)
    assert main(["generate", PROMPT, "--json-schema", str(file)]) == 2
    out, err = capsys.readouterr()
    assert not out and said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "options",
    [
        *(["--top-p", "0"], ["--top-p", "1.1"], ["--min-p", "-1"], ["--top-k", "-1"], ["--repetition-penalty", "0"]),
        *(["--presence-penalty", "3"], ["--frequency-penalty", "nan"], ["-n", "0"], ["--logprobs", "x"]),
        ["--regex", "a", "--json-schema", "b"],
    ],
    ids=" ".join,
)
def test_bad_sampling_options_are_one_line(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", PROMPT, *options])
    out, err = capsys.readouterr()
    assert not out and "error: argument" in err and len(err.splitlines()) == 1


def test_inspect_writes_its_json_too(tiny_folder, capsys, tmp_path):
    file = tmp_path / "inspection.json"
    assert main(["inspect", "--model", str(tiny_folder), *LIMITS, PROMPT, "--json", str(file)]) == 0
    assert "{" not in capsys.readouterr().out.split("\n")[0]
    assert json.loads(file.read_text())


@pytest.mark.parametrize("command", [["generate", PROMPT], ["inspect", PROMPT], ["info"], ["check", "kernels"]])
def test_a_json_file_that_cannot_be_written_is_refused_first(command, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "load", lambda *_, **__: pytest.fail("loaded a model"))
    assert main([*command, "--json", "/no/such/folder/a.json"]) == 2
    out, err = capsys.readouterr()
    assert not out and "no folder /no/such/folder" in err and len(err.splitlines()) == 1


def test_the_benchmark_prints_one_format(tmp_path, capsys):
    assert main(["bench", "latency", "--json", "--output", "csv"]) == 2
    assert "expected one of them" in capsys.readouterr().err
    reports = [str(tmp_path / name) for name in ("a.json", "b.json")]
    assert main(["bench", "diff", *reports, "--json", "--markdown"]) == 2
    assert "expected one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "dimmed"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
    ids=["neither", "NO_COLOR", "empty NO_COLOR", "dumb"],
)
def test_dimmed_text_is_for_terminals_that_want_it(environment, dimmed, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in ({"TERM": "xterm"} | environment).items():
        monkeypatch.setenv(name, value)
    assert streams.dimmed("x") == "x"  # not a terminal
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert streams.dimmed("x") == ("\033[2mx\033[0m" if dimmed else "x")


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory):
    pytest.importorskip("shtab", reason="the extra 'completion' is not installed")
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    printed, script = io.StringIO(), tmp_path_factory.mktemp("completion") / "gemma-runtime.bash"
    with redirect_stdout(printed):
        assert main(["completion", "bash"]) == 0
    script.write_text(printed.getvalue())
    return script


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gen"], {"generate"}),
        (["bench", "lat"], {"latency"}),
        (["check", "kernels", "--ju"], {"--junit"}),
        (["verify", "--oracle", "hf-"], {"hf-static"}),
        (["bench", "compare", "--output", "js"], {"json"}),
        (["verify", "--prompts", "que"], {"questions.txt"}),
        (["bench", "diff", "que"], {"questions.txt"}),
        (["verify", "che"], {"checkpoint"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bash_completes_commands_options_values_and_files(words, expected, bash_script, tmp_path):
    (tmp_path / "questions.txt").touch()
    (tmp_path / "checkpoint").mkdir()
    call = ["bash", "--norc", "-c", BASH, "bash", str(bash_script), "gemma-runtime", *words]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    assert {line.strip() for line in done.stdout.splitlines()} == expected, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_scripts(shell, capsys):
    pytest.importorskip("shtab", reason="the extra 'completion' is not installed")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "junit" in script and "throughput" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_completion_without_its_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'gemma-runtime[completion]'" in capsys.readouterr().err


def test_the_command_line_starts_without_slow_modules():
    code = "import sys; from runtime.cli.main import parser; parser(); print(*sys.modules, sep='\\n')"
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy", "triton", "shtab", "prompt_toolkit"} & {*done.stdout.split()}
