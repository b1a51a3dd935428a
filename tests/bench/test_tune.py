"""The search of block shapes, as far as it goes without a GPU."""

import json
import time

import pytest
import torch

from runtime.bench import products, tune
from runtime.bench.products import cases
from runtime.cost.plan import TARGETS
from runtime.kernels.block import Block
from runtime.kernels.ops import TorchOps
from runtime.kernels.scaled_matrix import COLUMNS
from runtime.model.config import ModelConfig
from runtime.model.published import PUBLISHED

pytestmark = pytest.mark.newest_only

CONFIG = ModelConfig.from_hf(PUBLISHED["gemma-3-270m"])
CASES = cases(CONFIG)


@pytest.mark.parametrize("quantize", ["", "int8", "int4"])
@pytest.mark.parametrize("max_rows", [1, 8, 64])
def test_candidates_are_blocks_of_every_form_the_default_first(max_rows, quantize):
    for case in cases(CONFIG, quantize):
        for dtype in (torch.bfloat16, torch.float32):
            found = tune.candidates(case, dtype, max_rows, TARGETS["h100"].gpu)
            assert found[0] == tune.default_block(case, dtype, max_rows) and len(set(found)) == len(found) > 1
            forms = {block.form for block in found}
            if dtype is torch.float32:
                assert forms == {"sum"}
            else:
                assert forms >= ({"sum", "loop"} if max_rows == 1 else {"loop"})
            if case.integers == "int4":
                assert "held" not in forms and not any(block.columns % COLUMNS for block in found)


@pytest.mark.parametrize("integers, bits", [("int8", 8), ("int4", 4.5)])
def test_a_case_knows_the_bytes_of_integers(integers, bits):
    case = cases(CONFIG, integers)[2]
    rows, weights = 2 * case.outputs, case.weights(torch.bfloat16, torch.device("cpu"))
    assert (
        case.bytes(torch.bfloat16) == weights.nbytes == rows * case.width * bits / 8 + 4 * rows * (integers == "int8")
    )
    assert 0.9 < weights.dequantized().std() * case.width**0.5 < 1.1


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as if: of two candidates the second alone compiles, and takes 7 us."""
    monkeypatch.setattr(tune, "gpu_of", lambda device: TARGETS["h100"].gpu)
    monkeypatch.setattr(
        tune,
        "candidates",
        lambda case, dtype, rows, gpu: [tune.default_block(case, dtype, rows), Block("loop", 16, 64, 4, 3)],
    )
    monkeypatch.setattr(tune, "compile_all", lambda jobs, gpu, workers: {(job[0], job[2]): [job[3]] for job in jobs})
    monkeypatch.setattr(tune, "search", lambda case, dtype, rows, blocks: [(7.0, block) for block in blocks])


@pytest.mark.usefixtures("gpu")
def test_a_table_keeps_what_it_had_and_says_what_there_was_no_time_for(tmp_path):
    path = tmp_path / "h100.json"
    path.write_text(json.dumps({"blocks": {"of another shape": ["sum", 1, 128, 4]}, "time_us": {}}))
    key = CASES[0].key(torch.bfloat16, 8)
    lines = list(tune.write_table(CASES[:1], torch.bfloat16, path, 1, classes=(8,)))
    assert "2 candidates compiled" in lines[0] and lines[1].startswith(f"{key}: 7.00 us")
    written = path.read_text()
    table = json.loads(written)
    assert table["blocks"] == {"of another shape": ["sum", 1, 128, 4], key: ["loop", 16, 64, 4, 3]}
    assert table["time_us"] == {key: 7.0} and table["gpu"] == TARGETS["h100"].gpu.name
    _, line = tune.write_table(CASES[:1], torch.bfloat16, path, 1, time.monotonic() - 1, (1,))
    assert "no time left" in line and path.read_text() == written


def test_a_block_with_another_result_ends_the_search(monkeypatch):
    """On plain operations, which take no notice of blocks."""
    monkeypatch.setattr(tune, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(products, "WEIGHT_BYTES", 1e6)
    monkeypatch.setattr(tune, "LAUNCHES", 2)
    blocks = [tune.default_block(CASES[1], torch.float32, 64), Block("loop", 16, 64, 4, 3)]
    found = tune.search(CASES[1], torch.float32, 64, blocks)
    assert {block for _, block in found} == set(blocks) and found == sorted(found) and found[0][0] > 0

    class WrongOps(TorchOps):
        def residual_linear(self, out, *tensors, block, **options):
            super().residual_linear(out, *tensors, block=block, **options)
            out += block == blocks[1]

    monkeypatch.setattr(tune, "ops_for", lambda device, rows: WrongOps())
    with pytest.raises(AssertionError, match="gives another result"):
        tune.search(CASES[1], torch.float32, 64, blocks)


@pytest.mark.sweep
def test_a_search_may_be_simulated(monkeypatch, capsys, tmp_path):
    pytest.importorskip("numba", reason="needs the cpu extra")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "cases", lambda config, quantize: CASES[1:2])
    monkeypatch.setattr(tune, "candidates", lambda case, dtype, rows, gpu: [tune.default_block(case, dtype, rows)])
    assert tune.main(["--simulated", "h100", "--models", "gemma-3-270m", "--rows", "8"]) == 0
    line, error = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{CASES[1].key(torch.bfloat16, 8)}, simulated us: (") and "not measured" in error


@pytest.mark.parametrize(
    ("option", "given"),
    [("--models", "gemma-9"), ("--quantize", "int8,q4"), ("--kernels", "rms_norm"), ("--rows", "2")],
)
def test_bad_input_is_refused_in_a_line(option, given, capsys):
    with pytest.raises(SystemExit) as ended:
        tune.main([option, given])
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "expected some of" in error and error.endswith(f"got {given.split(',')[-1]}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_searched(capsys):
    with pytest.raises(SystemExit) as ended:
        tune.main([])
    assert ended.value.code == 2 and "no CUDA device" in capsys.readouterr().err
