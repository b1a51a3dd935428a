"""The chat at a terminal, its keys typed into a pipe."""

import argparse
import json
import stat

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import runtime
from runtime.cli.history import HISTORY_ENV, history
from runtime.cli.repl import Repl
from runtime.errors import InvalidArgument

CTRL_C, CTRL_D, ALT_ENTER = "\x03", "\x04", "\x1b\r"
PASTE, PASTED = "\x1b[200~", "\x1b[201~"


@pytest.fixture
def history_file(tmp_path, monkeypatch):
    monkeypatch.setenv(HISTORY_ENV, str(tmp_path / "state" / "history"))
    return tmp_path / "state" / "history"


@pytest.fixture
def type_in(tiny, history_file, capsys):
    """Types keys into a chat, which must end by them: the chat, stdout, stderr."""

    def call(keys, max_new_tokens=4):
        options = argparse.Namespace(
            max_new_tokens=max_new_tokens,
            stop=None,
            speculate=None,
            sampling={},
            json=False,
            no_stream=False,
        )
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            pipe.send_bytes(keys.encode(errors="surrogateescape"))
            repl = Repl(tiny, tiny.tokenizer, options)
            assert repl.run() == 0
        return repl, *capsys.readouterr()

    return call


def texts(repl, role="user"):
    return [message["content"] for message in repl.turns if message["role"] == role]


def test_answers_are_those_of_chat(type_in, tiny):
    repl, out, err = type_in(f"the dog\r  and the snow \r{CTRL_D}")
    asked, replies = [], []
    for said in ("the dog", "and the snow"):
        asked.append({"role": "user", "content": said})
        replies.append(runtime.chat(tiny, asked, max_new_tokens=4).text)
        asked.append({"role": "assistant", "content": replies[-1]})
    assert repl.messages() == asked
    assert out == "".join(reply + "\n" for reply in replies)
    assert err.count("[cut after 4 tokens") == 2 and "error" not in err


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (f"the{ALT_ENTER}dog\r", ["the\ndog"]),
        ("the\\\rdog\r", ["the\ndog"]),
        ("the\ndog\r", ["the", "dog"]),  # an Enter typed while an answer was written
        (f"{PASTE}the\ndog\r\nsnow{PASTED}\r", ["the\ndog\nsnow"]),
        (f"the dog{CTRL_C}snow\r", ["snow"]),
        ("\r  \r /snow\r", ["/snow"]),
    ],
    ids=["Alt-Enter", "backslash", "Ctrl-J", "paste", "Ctrl-C", "empty lines"],
)
def test_what_is_typed_is_what_is_sent(type_in, keys, expected):
    assert texts(type_in(keys + "/exit\r", max_new_tokens=1)[0]) == expected


def test_commands(type_in, tmp_path):
    file = tmp_path / "saved.json"
    keys = f"/help\r/stats\r/save {file}\r/system\r/system the snow\rthe dog\r/stats\r/system\r/save {file}\r"
    repl, _, err = type_in(f"{keys}/save {file}\r/save {tmp_path / 'no' / 'where'}\r/save\r/sing\r/\r{CTRL_D}")
    for shown in ("Alt-Enter", "no answer yet", "no system prompt", "of 128 tokens of context", "\nthe snow\n"):
        assert shown in err
    errors = [line for line in err.splitlines() if "error: " in line]
    parts = ("no conversation to save", "File exists", "No such file", "needs a file name", "'/sing'", "'/'")
    assert len(errors) == len(parts) and all(part in line for part, line in zip(parts, errors, strict=True))
    assert json.loads(file.read_text()) == repl.messages()
    assert [message["role"] for message in repl.messages()] == ["system", "user", "assistant"]


def test_reset_starts_over(type_in, tiny):
    repl, out, _ = type_in("/system the snow\rthe dog\r/reset\rthe dog\r/exit\r")
    fresh = runtime.chat(tiny, [{"role": "user", "content": "the dog"}], max_new_tokens=4).text
    assert out.endswith(f"\n{fresh}\n") and repl.messages()[0]["role"] == "user" and len(repl.turns) == 2


def test_a_template_without_a_system_role_says_so(type_in, tiny, monkeypatch):
    def refuse(messages):
        if messages[0]["role"] == "system":
            raise InvalidArgument("the chat template refuses these messages: System role not supported")
        return [2, 5]

    monkeypatch.setattr(tiny.tokenizer, "apply_chat", refuse)
    repl, _, err = type_in("/system the snow\rthe dog\r/exit\r")
    assert "System role not supported" in err and repl.system == "" and texts(repl) == ["the dog"]


def test_a_conversation_ends_at_the_context_and_can_start_anew(type_in):
    repl, out, err = type_in("the dog\rthe snow\rthe\r/reset\rthe\r/exit\r", max_new_tokens=110)
    assert "[cut: the context of 128 tokens is full; /reset starts over" in err
    assert "has outgrown max_seq_len = 128: /reset starts over" in err
    assert texts(repl) == ["the"]


def test_history_is_kept_for_its_user_alone(type_in, history_file, monkeypatch):
    history_file.parent.mkdir()
    history_file.touch(0o644)
    for text in ("the\\\rdog", "the snow"):
        type_in(f"{text}\r{CTRL_D}", max_new_tokens=1)
    assert list(history().load_history_strings()) == ["the snow", "the\ndog"]  # the last first
    assert stat.S_IMODE(history_file.stat().st_mode) == 0o600
    before = history_file.read_bytes()
    for kept_nowhere in ("", "/proc/history"):
        monkeypatch.setenv(HISTORY_ENV, kept_nowhere)
        assert texts(type_in("the snow\r/exit\r", max_new_tokens=1)[0]) == ["the snow"]
    assert history_file.read_bytes() == before


def test_bytes_that_are_no_text_are_refused_and_the_chat_goes_on(type_in):
    repl, _, err = type_in("\udcff\rthe\r/exit\r", max_new_tokens=1)
    assert "valid Unicode" in err and texts(repl) == ["the"]


def test_control_characters_of_an_answer_do_not_reach_a_terminal(type_in, tiny, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    piece = "the\x1b]0;\x07\x9b2J\x7f\r\n\t"
    monkeypatch.setattr(type(tiny.tokenizer.incremental()), "push", lambda self, token: piece)
    repl, out, _ = type_in("the dog\r/exit\r", max_new_tokens=1)
    assert out == "the␛]0;␇�2J␡␍\n\t\n"
    assert texts(repl, "assistant") == [piece]
