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
from runtime.model.config import ModelConfig
from runtime.model.published import PUBLISHED

pytestmark = pytest.mark.newest_only

CASES = cases(ModelConfig.from_hf(PUBLISHED["gemma-3-270m"]))


@pytest.mark.parametrize("max_rows", [1, 8, 64])
def test_candidates_are_blocks_of_every_form_the_default_first(max_rows):
    for case in CASES:
        found = tune.candidates(case, max_rows)
        assert found[0] == tune.default_block(case, max_rows) and len(set(found)) == len(found)
        assert {"loop"} < {block.form for block in found} or max_rows == 64


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as if: of two candidates the second alone compiles, and takes 7 us."""
    monkeypatch.setattr(tune, "gpu_of", lambda device: TARGETS["h100"].gpu)
    monkeypatch.setattr(
        tune, "candidates", lambda case, rows: [tune.default_block(case, rows), Block("loop", 16, 64, 4, 3)]
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
    blocks = [tune.default_block(CASES[1], 64), Block("loop", 16, 64, 4, 3)]
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
    monkeypatch.setattr(tune, "cases", lambda config: CASES[1:2])
    monkeypatch.setattr(tune, "candidates", lambda case, rows: [tune.default_block(case, rows)])
    assert tune.main(["--simulated", "h100", "--models", "gemma-3-270m", "--rows", "8"]) == 0
    line, error = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{CASES[1].key(torch.bfloat16, 8)}, simulated us: (") and "not measured" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_searched(capsys):
    with pytest.raises(SystemExit) as ended:
        tune.main([])
    assert ended.value.code == 2 and "no CUDA device" in capsys.readouterr().err
