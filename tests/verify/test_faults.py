"""Each fault of a list, planted into the runtime, makes the audit refuse, and the healthy runtime passes."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

import runtime
from runtime.engine.prefill import Prefill
from runtime.kernels.ops import Ops
from runtime.kernels.rms_norm import residual_torch, rms_norm_torch
from runtime.parity.quick import quick_audit

TOKENS = 12


@pytest.fixture
def audit(monkeypatch, random_ids, one_thread, tmp_path):
    """Runs `verify` on a folder, without what takes long and a planted fault does not reach: another process."""
    invariances = import_module("runtime.parity.invariances")
    monkeypatch.setattr(invariances, "REPETITIONS", 3)
    monkeypatch.setattr(
        invariances.Invariances,
        "_fresh_process",
        lambda self, name: invariances.Check(name=name, passed=None, detail=""),
    )

    def run(source, dtype="float32", eager=False, tokens=TOKENS):
        longest = 40 if dtype == "float32" else 30  # not a short chunk
        prompts = [random_ids(length, seed=length) for length in (5, 11, longest)]
        return runtime.verify(
            source,
            prompts=prompts,
            tokens=tokens,
            device="cpu",
            dtype=dtype,
            eager=eager,
            json_path=tmp_path / "report.json",
            progress=False,
        )

    return run


def wrong_norm(monkeypatch):
    healthy = Ops.gated_mlp

    def gated_mlp(ops, out, x, norm_weight, *arguments, **options):
        healthy(ops, out, x, norm_weight - 1, *arguments, **options)

    monkeypatch.setattr(Ops, "gated_mlp", gated_mlp)


def window_one_short(monkeypatch):
    healthy = Ops.decode_attention

    def attention(*arguments, window=None, **options):
        healthy(*arguments, window=window and window - 1, **options)

    monkeypatch.setattr(Ops, "decode_attention", attention)


def rows_swapped(monkeypatch):
    healthy = Ops.decode_attention

    def attention(ops, out, k_cache, *arguments, **options):
        if len(k_cache) > 1:
            k_cache[:2, :, 1] = k_cache[:2, :, 1].flip(0)
        healthy(ops, out, k_cache, *arguments, **options)

    monkeypatch.setattr(Ops, "decode_attention", attention)


def softcap_skipped(monkeypatch):
    for name in ("decode_attention", "lm_head_argmax"):
        healthy = getattr(Ops, name)

        def uncapped(*arguments, healthy=healthy, softcap=None, **options):
            healthy(*arguments, **options)

        monkeypatch.setattr(Ops, name, uncapped)


def stale_keys(monkeypatch):
    healthy = Prefill.advance

    def advance(prompt, *work):
        first = [keys[prompt.row, :, 0] for keys in prompt._state.cache.keys]
        if not prompt.tokens:
            prompt.kept = [key.clone() for key in first]
        done = healthy(prompt, *work)
        if prompt.is_done:
            for key, kept in zip(first, prompt.kept, strict=True):
                key.copy_(kept if kept.any() else key)
        return done

    monkeypatch.setattr(Prefill, "advance", advance)


def rounding_skipped(monkeypatch):
    def gated_mlp(ops, out, x, norm_weight, gate_up, *, eps, branch=None, branch_norm=None, residual_out=None, **_):
        residual = residual_torch(x, branch, branch_norm, eps)
        if residual_out is not None:
            residual_out.copy_(residual)
        normed = rms_norm_torch(residual, norm_weight, eps)
        gate, up = (torch.cat([F.linear(row[None], of) for row in normed]) for of in gate_up.chunk(2))
        out.copy_(F.gelu(gate.float(), approximate="tanh") * up.float())  # the activation is not rounded

    monkeypatch.setattr(Ops, "gated_mlp", gated_mlp)


def position_off(monkeypatch):
    healthy = Prefill.advance

    def advance(prompt, *work):
        done = healthy(prompt, *work)
        if prompt.is_done and prompt.tokens > prompt._model.runtime.prefill_chunk:
            prompt._state.position[prompt.row] += 1
        return done

    monkeypatch.setattr(Prefill, "advance", advance)


def tie_to_the_highest(monkeypatch):
    healthy = Ops.lm_head_argmax

    def head(ops, token, x, *arguments, logits=None, **options):
        kept = torch.empty(len(x), arguments[1].shape[0], dtype=x.dtype) if logits is None else logits
        healthy(ops, token, x, *arguments, logits=kept, **options)
        for row, values in enumerate(kept):
            token[row] = torch.nonzero(values == values.max())[-1, 0]

    monkeypatch.setattr(Ops, "lm_head_argmax", head)


# Compiled steps would take these up once, when they are captured.
IN_PYTHON = (rows_swapped, rounding_skipped)
FAULTS = {
    "wrong norm": (wrong_norm, "gemma3", "float32", "logit error"),
    "wrong norm, bf16": (wrong_norm, "gemma", "bfloat16", "margin error, median"),
    "window off by one": (window_one_short, "gemma3", "float32", "logit error"),
    "window off by one, bf16": (window_one_short, "gemma2", "bfloat16", "in fp32: logit error"),
    "cache rows swapped": (rows_swapped, "gemma3", "float32", "batch of 2"),
    "cache rows swapped, bf16": (rows_swapped, "gemma", "bfloat16", "batch of 2"),
    "softcap skipped": (softcap_skipped, "gemma2", "float32", "logit error"),
    "stale keys": (stale_keys, "gemma3", "float32", "after a stream closed early"),
    "stale keys, bf16": (stale_keys, "gemma", "bfloat16", "first divergences"),
    "position off after chunks": (position_off, "gemma3", "float32", "prefill in chunks of 16"),
    "position off after chunks, bf16": (position_off, "gemma", "bfloat16", "prefill in chunks of 16"),
    "a rounding skipped": (rounding_skipped, "gemma", "bfloat16", "equal tokens"),
}


@pytest.mark.newest_only  # about the audit; with the oldest it refuses the faults that it plants itself
@pytest.mark.parametrize(("plant", "family", "dtype", "where"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_refused(plant, family, dtype, where, audit, small_pair, monkeypatch):
    source = small_pair(family, getattr(torch, dtype)).ours.name
    plant(monkeypatch)
    # A rounding more or less shows in few tokens: it takes more of them.
    report = audit(source, dtype, plant in IN_PYTHON, 100 if plant is rounding_skipped else TOKENS)
    assert not report.passed
    answers = {found.part: found.passed for found in report.findings}
    answers |= {check.name: check.passed for check in report.checks}
    assert answers[where] is False, report


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ties_go_to_the_lowest(dtype, audit, small_pair, monkeypatch, tmp_path):
    """Every token has a twin of equal logits."""
    pair = small_pair("gemma3", getattr(torch, dtype), vocab_size=498, seed=1)
    with torch.no_grad():
        table = pair.hf.model.embed_tokens.weight
        table[1::2] = table[::2]
    pair.hf.save_pretrained(tmp_path / "twins")
    healthy = audit(tmp_path / "twins", dtype)
    assert healthy.passed, healthy
    tie_to_the_highest(monkeypatch)
    report = audit(tmp_path / "twins", dtype, eager=True)
    assert not report.passed
    assert next(found for found in report.findings if found.part == "greedy choice").passed is False


@pytest.mark.parametrize(
    ("family", "dtype", "eager"),
    [
        ("gemma", "float32", False),
        ("gemma2", "bfloat16", False),
        ("gemma3", "float32", False),
        ("gemma3", "bfloat16", False),
        ("gemma3", "bfloat16", True),
    ],
)
def test_the_healthy_runtime_passes(family, dtype, eager, audit, small_pair):
    report = audit(small_pair(family, getattr(torch, dtype)).ours.name, dtype, eager)
    assert report.passed, report
    assert all(fault.refused for fault in report.faults) and len(report.faults) >= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_the_quick_audit(family, dtype, small_pair, monkeypatch, one_thread):
    model = small_pair(family, dtype).ours
    healthy = quick_audit(model)
    assert healthy.passed, healthy
    assert healthy.verdict.startswith("passed: ") and healthy.verdict.count("\n") == 0
    with monkeypatch.context() as planted:
        wrong_norm(planted)
        assert not quick_audit(model).passed
    if dtype is torch.float32 and family != "gemma":
        with monkeypatch.context() as planted:
            window_one_short(planted)
            refused = quick_audit(model)
        assert not refused.passed and refused.verdict.startswith("refused: ") and "logit error" in refused.verdict


def test_the_quick_audit_says_what_it_expects(small_pair):
    model = small_pair("gemma3").ours
    with pytest.raises(ValueError, match="at least 1, got 0"):
        quick_audit(model, prompts=0)
    with pytest.raises(ValueError, match="leave room in max_seq_len = 256, got 256"):
        quick_audit(model, tokens=256)
