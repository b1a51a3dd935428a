"""What the comparison of two commits finds, and what it lets pass."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from runtime.bench import equivalence

pytestmark = pytest.mark.newest_only

ROOT = Path(__file__).parents[2]
ONE_MODEL = ["--against", "HEAD", "--models", "gemma2", "--dtypes", "float32", "--modes", "eager"]


def git(tree, *command):
    author = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", tree, *author, *command], check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path):
    """A copy of this tree, committed."""
    for folder in equivalence.FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--message", "A tree")
    return tmp_path


def test_an_equal_tree_passes(tree, capsys):
    assert equivalence.main(ONE_MODEL, tree) == 0
    told = re.search(r"^(\d+) answers \((\d+) values\) .* none differ$", capsys.readouterr().out, re.MULTILINE)
    assert told is not None and int(told[1]) > 10 and int(told[2]) > 200


def test_a_planted_difference_is_found(tree, capsys):
    changed = 0
    for file in (tree / "kernels").glob("*.py"):
        changed += file.read_text().count("torch.tanh(")
        file.write_text(file.read_text().replace("torch.tanh(", "torch.sin("))
    assert changed
    assert equivalence.main(ONE_MODEL, tree) == 1
    assert "gemma2, float32, eager, a look past the window, best logits" in capsys.readouterr().out


def test_a_tree_that_fails_is_no_equal_one(tree, capsys, monkeypatch):
    (tree / "runtime" / "__init__.py").write_text("raise ImportError('broken')\n")
    command = ["-c", "import runtime"]
    monkeypatch.setattr(
        equivalence, "compare", lambda folder, *_: equivalence.run_tree(folder / "after", "a", *command)
    )
    assert equivalence.main([], tree) == 3
    assert equivalence.main(["--against", "HEAD"], tree) == 1
    assert "after, a: exit code 1" in capsys.readouterr().out


def test_without_a_parent_nothing_is_compared(tree, capsys):
    assert equivalence.main([], tree) == 3
    assert "has no commit HEAD^" in capsys.readouterr().out
    shutil.rmtree(tree / ".git")
    assert equivalence.main(ONE_MODEL, tree) == 3


@pytest.mark.parametrize(("message", "code"), [("Change it", 1), ("Change it\n\nChanges-answers: sums differ", 0)])
def test_a_commit_may_say_that_it_changes_answers(tree, capsys, monkeypatch, message, code):
    monkeypatch.setattr(equivalence, "compare", lambda *_: ({"a": ["1", "2"]}, {"a": ["1", "3"]}))
    git(tree, "commit", "--allow-empty", "--message", message)
    assert equivalence.main([], tree) == code
    out = capsys.readouterr().out
    assert "a 1: was '2', is '3'" in out
    assert ("sums differ" in out) == (code == 0)


def test_an_answer_that_is_missing_differs():
    assert equivalence.differences({"a": ["1"]}, {"a": ["1", "2"], "b": ["3"]}) == [
        "a 1: was nothing, is '2'",
        "b 0: was nothing, is '3'",
    ]
    assert equivalence.differences({"a": ["1"]}, {"a": ["1"]}) == []
