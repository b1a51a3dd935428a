"""The tests that need a GPU, as far as they can go without one: each is collected and finds its fixtures, and some run
at toy size on a CPU. A name that is none would otherwise show on a GPU alone."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from runtime.bench.scale import TOY

pytestmark = pytest.mark.newest_only

TESTS = Path(__file__).parent
# Everything up to the tests' bodies: fixtures are looked up, and neither they nor tests run.
CHILD = """
import json, sys
import pytest, torch

torch.cuda.is_available = lambda: True  # before a module asks, to skip its tests

class Outcomes:
    def __init__(self):
        self.found = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "setup":
            self.found[report.nodeid] = report.outcome

outcomes = Outcomes()
code = pytest.main(["-m", "gpu", "--setup-plan", "-q", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[outcomes])
print("\\n" + json.dumps([int(code), outcomes.found]))
"""


def planned(*paths: Path) -> tuple[int, dict[str, str], str]:
    """Pytest's exit code for the GPU tests under some paths as if there were a GPU, how far the setup of each came, and
    everything that was printed."""
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", CHILD, "-c", str(TESTS.parent / "pyproject.toml"), *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    code, found = json.loads(done.stdout.splitlines()[-1])
    return code, found, done.stdout + done.stderr


def test_every_gpu_test_finds_its_fixtures():
    modules = sorted({*TESTS.rglob("test_*.py")} - {Path(__file__)})
    marked = [path for path in modules if re.search(r"(?m)^\s*(@|pytestmark = )?pytest\.mark\.gpu", path.read_text())]
    assert {*(TESTS / "gpu").glob("test_*.py")} < {*marked}
    code, found, output = planned(*marked)
    assert code == 0, output
    assert set(found.values()) == {"passed"}, output
    assert {Path(test.partition("::")[0]).name for test in found} == {path.name for path in marked}
    assert len(found) > 300


def test_a_test_that_names_what_is_no_fixture_is_found(tmp_path):
    path = tmp_path / "test_planted.py"
    path.write_text(
        "import pytest\n"
        "from runtime.bench.scale import FULL\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_right(tmp_path): ...\n"
        "def test_wrong(FULL): ...\n"
    )
    code, found, output = planned(path)
    assert code == 1 and "fixture 'FULL' not found" in output
    assert {name.partition("::")[2]: outcome for name, outcome in found.items()} == {
        "test_right": "passed",
        "test_wrong": "failed",
    }


def module(name: str, **changed: Any) -> ModuleType:
    """A module of tests/gpu with other constants."""
    specification = importlib.util.spec_from_file_location(name, TESTS / "gpu" / f"{name}.py")
    assert specification is not None and specification.loader is not None
    found = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(found)
    for constant, value in changed.items():
        assert hasattr(found, constant)
        setattr(found, constant, value)
    return found


@pytest.fixture
def decoding() -> ModuleType:
    return module("test_decode_on_gpu", DEVICE="cpu", SCALE=TOY, SMALL=TOY.overrides)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["gemma-1.1-2b", "gemma-2-2b", "gemma-3-1b"])
def test_the_gates_body(decoding, name):
    decoding.test_gate(name, "float32", 2)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("stop_after", [None, 5])
def test_the_host_loops_body(decoding, stop_after):
    for limits in ({}, {"eager": True}):
        decoding.test_the_hosts_loop_gives_the_tokens_of_eager_steps(limits, 5, stop_after)
    decoding.test_a_stream_closed_early_leaves_a_usable_state()


@pytest.mark.usefixtures("one_thread")
def test_prefills_bodies(monkeypatch):
    """All with chunks that are not padded, as on a CPU."""
    small = TOY.overrides | {"max_position_embeddings": 8192}
    prefilling = module("test_prefill_on_gpu", DEVICE="cpu", SMALL=small)
    prefilling.test_tokens_in_fp32_are_hugging_faces("gemma-3-1b")
    prefilling.test_the_fused_form_is_as_near_the_truth_as_pytorchs("gemma-3-1b", "bfloat16", monkeypatch)
    prefilling.test_a_fused_chunks_bits_depend_on_nothing_but_tokens("gemma-3-1b")


@pytest.mark.usefixtures("one_thread")
def test_the_bodies_of_speculation(monkeypatch):
    sizes: dict[str, Any] = {"SMALL": TOY.overrides, "SEQ": 64, "PROMPT": 20, "STEPS": 40}
    sizes["OPTIONS"] = {"max_new_tokens": 30, "ignore_eos": True}
    guesses = module("test_speculation_on_gpu", DEVICE="cpu", **sizes)
    guesses.test_checked_guesses_leave_what_plain_steps_leave("gemma-3-1b", "float32", 8, {})
    for stop_at in (None, 1):
        with monkeypatch.context() as patch:
            guesses.test_right_guesses_are_handed_out_in_order_beside_answers_that_come_and_go(stop_at, patch)
    sizes |= {"SEQ": 256, "SMALL": TOY.overrides | {"max_position_embeddings": 256}}
    module("test_speculation_on_gpu", DEVICE="cpu", **sizes).test_prompt_lookup_gives_the_plain_tokens({})


@pytest.mark.usefixtures("one_thread")
def test_the_bodies_of_sampling():
    drawing = module("test_sampling_on_gpu", DEVICE="cpu", SMALL=TOY.overrides, SEQ=64, PROMPT=20, STEPS=12)
    drawing.test_drawn_tokens_follow_from_the_logits_of_greedy_steps("gemma-3-1b", "float32", 8)
    drawing.test_picks_by_masks_follow_from_the_logits_of_greedy_steps(0.7, "float32", 8)
    drawing.test_an_answer_is_the_same_however_it_runs("float32")
