"""The rooms of the house: which part imports which, in the order that docs/architecture.md walks through them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# From the ground up: a room uses itself and those before it. A name is a folder of runtime/ or a file of it.
ROOMS = (
    "kernels",
    "errors",
    "model",
    "checkpoint",
    "text",
    "sampling",
    "loading",
    "families",
    "engine",
    "generation",
    "inspection",
    "hugging_face",
    "api",
    "cost",
    "page",
    "parity",
    "check",
    "lm_eval",
    "serve",
    "ray",
    "cli",
    "__main__",
)
LOOSE = 6  # files that may lie in runtime/ itself


def modules() -> dict[str, Path]:
    """Every module by its name once installed."""
    found = {}
    for folder, package in (("runtime", "runtime"), ("kernels", "runtime.kernels"), ("bench", "runtime.bench")):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            parts = path.relative_to(REPOSITORY / folder).with_suffix("").parts
            name = ".".join((package, *parts))
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules of this project that a module imports, anywhere in it, for its types alone too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return {module for module in found if module in MODULES and module != name}


def room(name: str) -> str:
    """Where a module is; the package's own face is "runtime"."""
    return name.split(".")[1] if "." in name else name


IMPORTS = {name: imports(name) for name in MODULES}
OF_THE_HOUSE = sorted(name for name in MODULES if name != "runtime" and room(name) != "bench")


def test_every_room_is_known():
    assert {room(name) for name in OF_THE_HOUSE} == set(ROOMS)


@pytest.mark.parametrize("name", OF_THE_HOUSE)
def test_a_room_uses_only_those_before_it(name):
    allowed = set(ROOMS[: ROOMS.index(room(name)) + 1])
    beyond = {module for module in IMPORTS[name] if room(module) not in allowed}
    if name == "runtime.__main__" or room(name) == "cli":  # the command line calls what users call, and the benchmark
        beyond -= {"runtime", "runtime.bench.command"}
    assert not beyond


def test_kernels_know_nothing_of_the_runtime():
    assert {room(module) for name in OF_THE_HOUSE if room(name) == "kernels" for module in IMPORTS[name]} == {"kernels"}


def test_nothing_imports_the_benchmark_but_the_command_line():
    users = {name for name in OF_THE_HOUSE if any(room(module) == "bench" for module in IMPORTS[name])}
    assert {room(name) for name in users} <= {"cli"}


def test_no_two_modules_import_each_other_in_a_circle():
    def reached(name: str) -> set[str]:
        seen: set[str] = set()
        ahead = [name]
        while ahead:
            for module in IMPORTS[ahead.pop()] - seen - {"runtime"}:
                seen.add(module)
                ahead.append(module)
        return seen

    assert not [name for name in MODULES if name != "runtime" and name in reached(name)]


def test_few_files_lie_loose():
    loose = [path.name for path in (REPOSITORY / "runtime").glob("*.py")]
    assert len(loose) <= LOOSE, loose


ARCHITECTURE = REPOSITORY / "docs" / "architecture.md"
PAGES = [REPOSITORY / "README.md", *sorted(ARCHITECTURE.parent.glob("*.md"))]


def linked(text: str, folder: Path) -> list[Path]:
    """What the links of a page in `folder` lead to, in order."""
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    return [(folder / target).resolve() for target in targets if "://" not in target]


def rooms_among(paths: list[Path]) -> list[str]:
    """The rooms that are linked as a whole, each once: a folder, or a file of runtime/ itself."""
    places = [path for path in paths if path.parent == REPOSITORY / "runtime" or path == REPOSITORY / "kernels"]
    return list(dict.fromkeys(path.stem for path in places if path.stem != "__init__"))


def test_the_architecture_page_lists_the_rooms_from_the_ground_up():
    table = re.findall(r"^\| \[`([\w/.]+)`\]", ARCHITECTURE.read_text(), re.MULTILINE)
    assert [entry.rstrip("/").removesuffix(".py") for entry in table] == [name for name in ROOMS if name != "__main__"]


def test_the_reading_order_leads_through_every_room():
    section = ARCHITECTURE.read_text().split("## Reading the code")[1].split("\n## ")[0]
    assert set(rooms_among(linked(section, ARCHITECTURE.parent))) == set(ROOMS) - {"__main__"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page):
    """Links are test_docs.py's."""
    paths = re.findall(r"`((?:runtime|kernels|bench|tests|docs|examples)/[\w./-]*)`", page.read_text())
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
