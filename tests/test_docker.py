"""The Dockerfile installs what the Makefile and pyproject.toml say, from files that its context has."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from .test_packaging import SOURCES

tomllib = pytest.importorskip("tomllib", reason="the standard library has it from Python 3.11 on")
REPOSITORY = Path(__file__).parents[1]
MAKEFILE = (REPOSITORY / "Makefile").read_text()
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The Dockerfile's stages by name: (instruction, what follows it) each, comments left out."""
    text = (REPOSITORY / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    found: dict[str, list[tuple[str, str]]] = {}
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            found[rest.split(" AS ")[1]] = []
        found[list(found)[-1]].append((instruction, rest))
    return found


def installed(stage: str) -> list[str]:
    """What a stage gives to pip, in order, without options."""
    commands = [shlex.split(rest) for instruction, rest in stages()[stage] if instruction == "RUN"]
    pips = [words[words.index("install") + 1 :] for words in commands if "pip" in words]
    return [word for words in pips for word in words if not word.startswith(("-", "http"))]


def pinned(variable: str) -> str:
    """A version that the Makefile pins."""
    return re.search(rf'^{variable} \?= "?([^";\n]+)', MAKEFILE, re.MULTILINE)[1].strip()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_torch_comes_first_and_all_versions_are_the_makefiles(target: str) -> None:
    torch, package, transformers = installed(target)
    assert torch == pinned("TORCH") + ("+cpu" if target == "cpu" else "")
    assert transformers == pinned("TRANSFORMERS")
    for requirement in map(Requirement, (torch, transformers)):
        (ours,) = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == requirement.name]
        assert all(ours.specifier.contains(each.version) for each in requirement.specifier)
    folder, extras = re.fullmatch(r"(\S+)\[(\S+)\]", package).groups()
    assert f"--mount=type=bind,target={folder},rw" in str(stages()[target])
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


def test_the_base_image_is_pinned_and_its_python_is_supported() -> None:
    image, version = re.match(r"(python):(\d\.\d+)-slim-\w+ AS", dict(stages()["base"])["FROM"]).groups()
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"], image


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_nothing_runs_as_root(target: str) -> None:
    stage = stages()[target]
    assert stage[0] == ("FROM", f"base AS {target}")
    assert stage[-1] == ("USER", "1000") and "--uid 1000" in str(stages()["base"])


def test_it_runs_what_make_demo_runs() -> None:
    base = dict(stages()["base"])
    words = [*json.loads(base["ENTRYPOINT"]), *json.loads(base["CMD"])]
    assert shlex.join(words).replace("'", '"') in MAKEFILE
    assert words[0] in PROJECT["scripts"]


def test_its_context_is_what_the_wheel_is_built_from() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    assert {line[1:] for line in lines if line.startswith("!")} == set(SOURCES)
