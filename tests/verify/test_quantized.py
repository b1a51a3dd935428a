"""The audit of quantised models: it passes, on values that other code has decoded; faults in decoding are refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import runtime
from runtime.bench.small_models import save_small_model
from runtime.check.integer_cases import near
from runtime.checkpoint.cache import CACHE_ENV
from runtime.errors import InvalidArgument
from runtime.kernels import quantized
from runtime.kernels.cpu.block_formats import INT8, Format, Part, int8_rows
from runtime.kernels.cpu.block_values import dequantized
from runtime.kernels.quantized import QuantizedMatrix
from runtime.model.config import RuntimeConfig
from runtime.parity.block_faults import misread
from runtime.parity.report import Report

from ..kernels.stored_blocks import ALL_FORMATS, matrix
from ..runtime.container_files import Variant, pack_model

pytestmark = pytest.mark.newest_only

PROMPTS = [[5, 9, 11], [7] * 30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("quantised")
    save_small_model("gemma3", made, hidden_size=128, intermediate_size=192, head_dim=32)
    return made


@pytest.fixture
def audit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None, tmp_path: Path
) -> Iterator[Callable[..., Report]]:
    """Runs `verify` by plain steps, without the invariances, which know nothing of weights."""
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    monkeypatch.setattr(import_module("runtime.parity.invariances").Invariances, "checks", lambda _: {})

    def run(quantize: str | None, source: Path = folder) -> Report:
        return runtime.verify(
            source, prompts=PROMPTS, tokens=4, device="cpu", quantize=quantize, eager=True, progress=False
        )

    yield run


@pytest.mark.parametrize("quantize", [pytest.param("int8", marks=pytest.mark.sweep), "int4"])
def test_a_healthy_model_passes_and_every_planted_fault_is_refused(audit: Callable[..., Report], quantize: str) -> None:
    report = audit(quantize)
    assert report.passed, str(report)
    assert report.environment["quantize"] == quantize and f"{quantize}, float32" in str(report)
    (weights,) = (finding for finding in report.findings if finding.part == "weights")
    assert weights.passed and weights.measured == "55 of 55 tensors equal"
    planted = {fault.name for fault in report.faults if fault.name.endswith("in one matrix")}
    names = {"the neighbour's scale", "the zero point off by one"} | (
        {"nibbles swapped"} if quantize == "int4" else set()
    )
    assert planted == {f"{name} in one matrix" for name in names}
    assert all(fault.refused for fault in report.faults)


def test_a_gguf_file_passes(audit: Callable[..., Report], tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the demo extra")
    from ..runtime.gguf_files import shapes, write_gguf

    kinds = {name: "Q4_1" if "ffn_down" in name else "Q8_0" for name, shape in shapes().items() if len(shape) == 2}
    write_gguf(tmp_path / "m.gguf", kind=kinds)
    report = audit("gguf", tmp_path / "m.gguf")
    assert report.passed, str(report)
    assert "the neighbour's scale in one matrix" not in {fault.name for fault in report.faults}  # all are equal
    assert "the minimum subtracted twice in one matrix" in {fault.name for fault in report.faults}


@pytest.mark.sweep
def test_a_containers_integers_pass(audit: Callable[..., Report], folder: Path, tmp_path: Path) -> None:
    container = pack_model(folder, Variant("gptq", symmetric=False)).write(tmp_path / "m")
    report = audit(None, container)
    assert report.passed, str(report)
    assert report.environment["quantize"] == "gptq" and "gptq, float32" in str(report)
    planted = {fault.name for fault in report.faults if fault.name.endswith("in one matrix")}
    names = ("nibbles swapped", "the neighbour's scale", "the zero point off by one")
    assert planted == {f"{name} in one matrix" for name in names} and all(fault.refused for fault in report.faults)
    with pytest.raises(InvalidArgument, match="to audit gptq's integers, got 'bfloat16' and 'cpu'"):
        runtime.verify(container, prompts=PROMPTS, tokens=4, device="cpu", dtype="bf16", progress=False)


@pytest.mark.parametrize(
    "fault",
    [
        "nibbles swapped",
        pytest.param("the neighbour's scale", marks=pytest.mark.sweep),
        pytest.param("the zero point off by one", marks=pytest.mark.sweep),
    ],
)
def test_a_runtime_that_misreads_blocks_is_refused(
    audit: Callable[..., Report], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Wherever the runtime decodes blocks of Q4_0."""

    def wrong(data: np.ndarray, form: Format) -> np.ndarray:
        if form.name != "Q4_0":
            return dequantized(data, form)
        return misread(QuantizedMatrix([Part(form, torch.from_numpy(data))]))[fault].numpy()

    monkeypatch.setattr(import_module("runtime.parity.audit"), "negative_controls", lambda _: [])
    monkeypatch.setattr(quantized, "unusable_numba", lambda: "not here")
    monkeypatch.setattr(quantized, "dequantized", wrong)
    report = audit("int4")
    assert not report.passed
    broken = {finding.part for finding in report.findings if finding.passed is False}
    assert broken >= {"weights", "fp32 tokens"} or broken >= {"weights", "logit error"}, str(report)


@pytest.mark.parametrize("name", [*ALL_FORMATS, INT8])
def test_each_fault_is_what_it_says(name: str) -> None:
    whole = matrix(name)
    form, values = whole.parts[0].format, whole.dequantized()
    faults = misread(whole)
    assert all(wrong.shape == values.shape and not torch.equal(wrong, values) for wrong in faults.values())
    columns = 32 if name != INT8 else form.columns
    if "the zero point off by one" in faults:  # one step of the scale everywhere
        steps = (values - faults["the zero point off by one"]).view(-1, 16 if name == "Q6_K" else columns)
        spread = steps.amax(1) - steps.amin(1)
        assert (spread <= 2**-18 * values.view(steps.shape).abs().amax(1)).all() and steps.any()
    else:
        again = faults["the minimum subtracted twice"] - values
        assert (again.view(-1, 32).amax(1) - again.view(-1, 32).amin(1) <= 2**-18 * values.abs().amax()).all()
    assert form in (*ALL_FORMATS.values(), int8_rows(form.columns))


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_each_fault_of_a_gpus_matrix_is_what_it_says(form: str) -> None:
    torch.manual_seed(0)
    whole = near(torch.randn(6, 256), form)
    values, faults = whole.dequantized(), misread(whole)
    assert len(faults) == {"int8": 2, "int4": 3}[form]
    assert all(wrong.shape == values.shape and not torch.equal(wrong, values) for wrong in faults.values())
    steps = (values - faults["the zero point off by one"]).view(6, -1, 256 if form == "int8" else 32)
    scale = whole.scale if form == "int8" else whole.groups()[1].float()
    torch.testing.assert_close(steps, scale.view(6, -1, 1).expand_as(steps), rtol=1e-5, atol=0)


def test_arguments_are_checked_first(folder: Path) -> None:
    for options, message in (
        ({"dtype": "bf16", "quantize": "int8"}, 'dtype must be "auto" or "float32" with quantize=\'int8\''),
        ({"quantize": "int3"}, "quantize must be None or one of"),
        ({"quantize": "gguf"}, "takes a GGUF file or 'demo', got a folder"),
    ):
        with pytest.raises(InvalidArgument, match=re.escape(message)):
            runtime.verify(folder, prompts=PROMPTS, device="cpu", **options)  # type: ignore[arg-type]


def test_a_fresh_process_reads_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loaded(Exception):
        pass

    def load(source: str, **options: object) -> None:
        assert (source, options["quantize"], options["dtype"]) == ("demo", "int4", "float32")
        raise Loaded

    invariances = import_module("runtime.parity.invariances")
    monkeypatch.setattr(invariances, "load", load)
    limits = asdict(RuntimeConfig("cpu", "float32", quantize="int4"))
    with pytest.raises(Loaded):
        invariances.answer_request({"source": "demo", "limits": limits, "prompts": [], "tokens": 1})
