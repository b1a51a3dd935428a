"""The documentation: links and anchors, commands and options, examples, the version, and the strict build."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import runtime
from runtime.cli.main import main

pytestmark = pytest.mark.newest_only

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
PROGRAMS = re.compile(r"(?:\.venv/bin/)?(gemma-runtime|python -m runtime(?:\.[\w.]+)?|make)(?= |$)(.*)", re.MULTILINE)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """What GitHub and the site call the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> Iterator[tuple[str, str]]:
    """Every command of ours that a page names, in a block of code or within a sentence: program, and the rest."""
    text = page.read_text().replace("\\\n", " ")
    blocks = "\n".join(block for _, block in FENCE.findall(text))
    spans = "\n".join(span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", FENCE.sub("", text)))
    for line in f"{blocks}\n{spans}".splitlines():
        line = re.sub(r"^[ -]*run: |^ *", "", line)
        if found := PROGRAMS.match(line):
            yield found.group(1), found.group(2).strip()


@functools.cache
def help_of(program: str, command: str = "", subcommand: str = "") -> str:
    """What `--help` prints; a command that does not exist raises."""
    if program == "python -m runtime.lm_eval":  # whose command line sets up logging for its process
        call = [sys.executable, "-m", "runtime.lm_eval", "run", "--help"]
        environment = os.environ | {"PYTHONSAFEPATH": "1"}
        return subprocess.run(call, env=environment, capture_output=True, text=True, check=True).stdout
    printed = io.StringIO()
    words = [word for word in (command, subcommand) if word]
    with (
        contextlib.redirect_stdout(printed),
        pytest.raises(SystemExit) as ended,
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
    ):
        if program == "gemma-runtime":
            raise SystemExit(main([*words, "--help"]))
        patch.setattr(sys, "argv", [program, *words, "--help"])
        warnings.simplefilter("ignore")  # a module that is imported already is run once more
        runpy.run_module(program.removeprefix("python -m "), run_name="__main__", alter_sys=True)
    assert not ended.value.code, f"{program} {' '.join(words)} --help: {ended.value.code}"
    return printed.getvalue()


def help_for(program: str, rest: str) -> str:
    """The help of the command that a line calls."""
    words = shlex.split(re.split(r"\s#", rest)[0])
    if program == "python -m runtime":
        program = "gemma-runtime"
    if program != "gemma-runtime" or not words or words[0].startswith("-"):
        return help_of(program)
    if words[0] in ("bench", "check") and len(words) > 1 and words[1].islower():
        return help_of(program, *words[:2])
    return help_of(program, words[0])


@every_page
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    broken = []
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_a_broken_anchor_would_be_noticed():
    assert "what-the-same-tokens-means" in anchors(ROOT / "docs" / "numerics.md")
    assert "no-such-heading" not in anchors(ROOT / "docs" / "numerics.md")


@every_page
def test_every_command_exists_and_takes_its_options(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong = []
    for program, rest in commands(page):
        if program == "make":
            names = re.findall(r"(?<!\S)[a-z][\w-]*(?!\S)", rest.split("#")[0])
            wrong += [f"make {name}" for name in names if name not in targets]
        else:
            known = set(OPTION.findall(help_for(program, rest)))
            wrong += [f"{program} {rest}: {option}" for option in OPTION.findall(rest) if option not in known]
    assert wrong == []


@every_page
def test_an_option_on_its_own_is_one_of_some_command(page):
    known = set(OPTION.findall((ROOT / "tests" / "conftest.py").read_text()))
    for program, rest in {command for each in PAGES for command in commands(each) if command[0] != "make"}:
        known |= set(OPTION.findall(help_for(program, rest)))
    alone = {option for span in re.findall(r"`(--[^`]+)`", prose(page)) for option in OPTION.findall(span)}
    assert alone - known == set()


def test_commands_are_found_and_wrong_ones_refused(tmp_path):
    page = tmp_path / "page.md"
    within = "or `python -m runtime.bench.gpu --out DIR\n--dry-run`, `make x`"
    page.write_text(f"```\ngemma-runtime info --plan h100\n```\n{within}")
    assert list(commands(page)) == [
        ("gemma-runtime", "info --plan h100"),
        ("python -m runtime.bench.gpu", "--out DIR --dry-run"),
        ("make", "x"),
    ]
    with pytest.raises(AssertionError, match="no-such-command"):
        help_of("gemma-runtime", "no-such-command")
    with pytest.raises(ImportError):
        help_of("python -m runtime.bench.none")


@every_page
def test_python_examples_use_names_that_exist(page):
    for language, block in FENCE.findall(page.read_text()):
        if language == "python":
            used = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Attribute)]
            names = [node.attr for node in used if isinstance(node.value, ast.Name) and node.value.id == "runtime"]
            assert [name for name in names if name not in runtime.__all__] == []


def test_the_readme_stays_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert next(number for number, line in enumerate(lines) if line.startswith("## ")) <= 60


def test_the_changelogs_top_entry_is_the_version():
    assert re.findall(r"^## \[?([\w.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == runtime.__version__


def test_every_environment_variable_is_in_the_table():
    variable = re.compile(r"GEMMA_RUNTIME_[A-Z_]+")
    sources = [path for folder in ("kernels", "runtime", "bench") for path in (ROOT / folder).rglob("*.py")]
    used = {name for path in sources for name in variable.findall(path.read_text())}
    assert used == set(variable.findall((ROOT / "docs" / "usage.md").read_text()))


def test_every_public_name_is_on_the_api_page():
    page = (ROOT / "docs" / "api.md").read_text()
    documented = set(re.findall(r"^::: runtime\.(\w+)", page, re.MULTILINE))
    errors = {name for name in runtime.__all__ if hasattr(runtime.errors, name)}
    assert documented - {"errors"} == set(runtime.__all__) - errors


needs_docs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="the extra `docs` is not installed",
)


def built(tree: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]  # as `make docs` does
    environment = os.environ | {"PYTHONSAFEPATH": "1", "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


@needs_docs
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    done = built(ROOT, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.glob("*.html"))
    assert {page.stem for page in pages} >= {page.stem for page in (ROOT / "docs").glob("*.md")}
    loaded = re.compile(r"""<(script|img|iframe|link)\b[^>]*(src|href)=["']?(https?:)?//""")
    assert [page.name for page in pages if loaded.search(page.read_text())] == []
    assert 'id="runtime.generate"' in (tmp_path / "api.html").read_text()


@needs_docs
@pytest.mark.parametrize(
    "fault",
    ["[to](nowhere.md)", "[to](usage.md#nowhere)", "[to](../runtime/nowhere.py)", "::: runtime.nowhere"],
    ids=["page", "anchor", "file", "name"],
)
def test_the_strict_build_refuses(fault, tmp_path):
    for path in ROOT.iterdir():
        if path.name != "docs":
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / "kernels.md").open("a") as page:
        page.write(f"\n{fault}\n")
    done = built(tmp_path, tmp_path / "site")
    assert done.returncode, "it was built"
    assert "nowhere" in done.stdout + done.stderr
