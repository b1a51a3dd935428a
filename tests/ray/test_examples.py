"""The examples on a cluster of two nodes: whatever is lost on the way, every answer is the one of `generate` alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray.serve", reason="needs the ray extra")
pytestmark = pytest.mark.ray

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(example, *arguments):
    """What an example prints."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / example, *map(str, arguments)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_dataset_is_answered_though_a_run_stops_and_an_engine_and_a_node_are_lost(tiny_folder):
    said = run("ray_batch.py", tiny_folder, "--prompts", 64)
    stopped = int(re.search(r"stopped with (\d+) of 64 prompts answered", said)[1])
    to_go = int(re.search(r"an engine and a node lost with (\d+) prompts to go", said)[1])
    assert 0 < to_go < 64 - stopped < 64  # both came in the middle
    assert "64 prompts answered once each, with the tokens of generate alone" in said


def test_questions_are_answered_though_a_replica_and_a_node_are_lost(tiny_folder):
    said = run("ray_serve.py", tiny_folder)
    assert "a second replica came" in said and "a node lost" in said
    assert int(re.search(r"(\d+) questions answered, with the tokens of generate alone", said)[1]) > 50
