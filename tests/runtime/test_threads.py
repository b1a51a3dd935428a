"""How many threads a model computes with: what the machine, the container and the caller say."""

from __future__ import annotations

import os
import re

import pytest
import torch

import runtime
from runtime.errors import GemmaRuntimeError
from runtime.kernels.advance import embed_torch
from runtime.model import threads as counting
from runtime.model.config import MAX_THREADS
from runtime.model.threads import available_threads, cpu_quota, torch_threads


def cgroups(folder, files, own):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "own").write_text(own)
    return {"root": folder, "own": folder / "own"}


V1 = {"quota": "cpu.cfs_quota_us", "period": "cpu.cfs_period_us"}
QUOTAS = {
    "none at all": ({}, "", None),
    "two cores": ({"cpu.max": "200000 100000\n"}, "0::/\n", 2.0),
    "unlimited": ({"cpu.max": "max 100000\n"}, "0::/\n", None),
    "one and a half": ({"cpu.max": "150000 100000\n"}, "0::/\n", 1.5),
    "a cgroup of its own": ({"pod/job/cpu.max": "50000 100000\n"}, "0::/pod/job\n", 0.5),
    "the tighter one around": (
        {"pod/job/cpu.max": "max 100000\n", "pod/cpu.max": "300000 100000\n"},
        "0::/pod/job\n",
        3.0,
    ),
    "version 1": ({f"cpu/{V1['quota']}": "250000\n", f"cpu/{V1['period']}": "100000\n"}, "3:cpu,cpuacct:/\n", 2.5),
    "version 1, no limit": ({f"cpu/{V1['quota']}": "-1\n", f"cpu/{V1['period']}": "100000\n"}, "3:cpu:/\n", None),
    "version 1, inside": (
        {f"cpu,cpuacct/docker/{V1['quota']}": "100000\n", f"cpu,cpuacct/docker/{V1['period']}": "100000\n"},
        "4:memory:/docker\n3:cpu,cpuacct:/docker\n",
        1.0,
    ),
    "not a number": ({"cpu.max": "some 100000\n"}, "0::/\n", None),
    "one word": ({"cpu.max": "100000\n"}, "0::/\n", None),
    "no period": ({"cpu.max": "100000 0\n"}, "0::/\n", None),
    "another controller's": (
        {f"cpu/job/{V1['quota']}": "1\n", f"cpu/job/{V1['period']}": "1\n"},
        "2:cpuset:/job\n",
        None,
    ),
}


@pytest.mark.parametrize(("files", "own", "cores"), QUOTAS.values(), ids=QUOTAS)
def test_the_quota_of_a_container(files, own, cores, tmp_path):
    assert cpu_quota(**cgroups(tmp_path, files, own)) == cores


def test_no_cgroups_at_all(tmp_path):
    assert cpu_quota(tmp_path / "absent", tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("torchs", "allowed", "quota", "expected"),
    [
        (8, 8, None, 8),
        (4, 8, None, 4),
        (8, 3, None, 3),
        (8, 8, 2.0, 2),
        (8, 8, 1.5, 2),
        (8, 8, 0.1, 1),
        (999, 999, 999.0, MAX_THREADS),
    ],
)
def test_as_many_as_may_be_kept_busy(torchs, allowed, quota, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: torchs)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(allowed)), raising=False)
    monkeypatch.setattr(counting, "cpu_quota", lambda: quota)
    assert available_threads() == expected


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, "two", "2", 10**9, MAX_THREADS + 1, [2]], ids=repr)
def test_numbers_that_are_refused(threads):
    """Before anything is looked for: there is no such model."""
    with pytest.raises(GemmaRuntimeError, match="threads must be .*got " + re.escape(repr(threads))):
        runtime.load("/nowhere/at/all", device="cpu", threads=threads)


def test_the_callers_number_is_put_back():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise RuntimeError
    assert torch.get_num_threads() == before


def test_models_keep_to_their_own_numbers(small_pair, tmp_path, monkeypatch):
    """Prefill, and decoding by PyTorch's operations, on the model's threads; the caller's number stays as it was."""
    small_pair("gemma").hf.save_pretrained(tmp_path)
    before, seen = torch.get_num_threads(), []
    answers = []

    def watched(*arguments):
        seen.append(torch.get_num_threads())
        return embed_torch(*arguments)

    monkeypatch.setattr("runtime.engine.prefill.embed_torch", watched)
    for asked in (1, 3, "auto"):
        model = runtime.load(tmp_path, device="cpu", max_seq_len=64, threads=asked)
        seen.clear()
        answers.append(runtime.generate(model, [2, *range(5, 45)], max_new_tokens=9, ignore_eos=True).token_ids)
        assert set(seen) == {available_threads() if asked == "auto" else asked}
        assert torch.get_num_threads() == before
    assert answers[0] == answers[1] == answers[2]
