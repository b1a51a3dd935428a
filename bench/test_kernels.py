"""The kernel micro-benchmarks under pytest-benchmark: `pytest bench --benchmark-only`.

The shapes of Gemma 3 270M in bf16 with random weights, on the GPU if there is one. Each operation is grouped with
PyTorch's equivalent operation; a time covers `launches` calls, as the extra info says. `gemma-runtime bench kernels`
measures the same pairs with the correctness gate and the bandwidth.
"""

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is in the extra bench")

from runtime.bench.operations import pairs
from runtime.bench.shapes import random_model
from runtime.bench.timing import synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = (
    "qkv_projection",
    "gated_mlp",
    "residual_linear",
    "lm_head_argmax",
    "decode_attention",
)


@pytest.fixture(scope="module")
def found():
    model = random_model("gemma-3-270m", str(DEVICE), "bfloat16", max_seq_len=1024)
    return {pair.kernel: pair for pair in pairs(model, [1], [512])}


@pytest.mark.parametrize("side", ["gemma-runtime", "PyTorch"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel(benchmark, found, kernel, side):
    pair = found[kernel]
    run = pair.ours if side == "gemma-runtime" else pair.peers["torch_us"]
    benchmark.group = f"{pair.kernel} {pair.shape}"
    benchmark.extra_info["launches"] = pair.launches

    def timed():
        run()
        synchronize(DEVICE)

    timed()
    benchmark.pedantic(timed, rounds=10)
