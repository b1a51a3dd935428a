"""Each Triton kernel against its reference on fp64 inputs: on a GPU, or in Triton's interpreter on a CPU.

The references keep their norms in fp32 whatever the input, as Hugging Face does; the comparison's floor covers that.
"""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from runtime import kernels
from runtime.kernels.advance import advance_reference
from runtime.kernels.argmax import NO_KEY, lm_head_argmax_reference, new_best
from runtime.kernels.attention_runs import BLOCK_KEYS, MAX_RUNS, AttentionParts, join_reference, runs_reference
from runtime.kernels.decode_attention import decode_attention_reference
from runtime.kernels.gated_mlp import gated_mlp_reference
from runtime.kernels.launch import INTERPRETING, Block
from runtime.kernels.qkv_projection import qkv_projection_reference
from runtime.kernels.residual_linear import residual_linear_reference
from runtime.kernels.rms_norm import rms_norm_reference

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETING, reason="kernels need a GPU, or TRITON_INTERPRET=1 (tests/test_interpreter.py)"
)

# Triton's interpreter cuts fp32 down to bf16 instead of rounding, and reads bf16 operands of a dot as integers: bf16 is
# tested on a GPU only. fp16 has the same rounding points.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

# What two correct computations may differ by: some units in the last place of the largest value, however small the
# error of the plain operation happens to be.
FLOOR_ULPS = 4
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
EPS = 1e-6
# (outputs, width): whole blocks, and neither side a whole block
SIZES = [(64, 128), (37, 84), (130, 200)]


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).to(dtype).to(DEVICE)


def unwritten(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """An output in which every element that a kernel leaves out shows."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def assert_as_exact(given: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    """Asserts that the error of `given` against fp64 truth is at most twice that of the plain operation at the same
    dtype, plus a small floor."""
    truth = truth.double()
    floor = FLOOR_ULPS * torch.finfo(given.dtype).eps * truth.abs().max().item()
    bound = 2 * (plain.double() - truth).abs().max().item() + floor
    error = (given.double() - truth).abs().max().item()
    assert error <= bound, f"error {error:.3e} against fp64, the plain operation's is {(bound - floor) / 2:.3e}"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def stream(rows: int, width: int, dtype: torch.dtype, branched: bool) -> dict[str, torch.Tensor]:
    """The inputs that a branch adds to a kernel."""
    if not branched:
        return {}
    return {"branch": random(rows, width, dtype=dtype), "branch_norm": random(width, dtype=dtype, scale=0.1)}


def wide(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


@dtypes
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(dtype, with_residual):
    x, weight = random(3, 84, dtype=dtype), random(84, dtype=dtype, scale=0.1)
    residual = random(3, 84, dtype=dtype) if with_residual else None
    out = unwritten(3, 84, dtype=dtype)
    kernels.rms_norm(x, weight, EPS, residual=residual, out=out)
    truth = rms_norm_reference(x.double(), weight.double(), EPS, None if residual is None else residual.double())
    assert_as_exact(out, rms_norm_reference(x, weight, EPS, residual), truth)


@dtypes
@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize(("outputs", "width"), SIZES)
@pytest.mark.parametrize(
    ("launcher", "reference", "matrices"),
    [(kernels.qkv_projection, qkv_projection_reference, 1), (kernels.gated_mlp, gated_mlp_reference, 2)],
    ids=["qkv_projection", "gated_mlp"],
)
def test_norm_and_projection(launcher, reference, matrices, outputs, width, branched, dtype):
    rows = 3
    x, norm = random(rows, width, dtype=dtype), random(width, dtype=dtype, scale=0.1)
    weight = random(outputs * matrices, width, dtype=dtype, scale=width**-0.5)
    joined = stream(rows, width, dtype, branched)
    results = []
    for run, cast in (
        (launcher, torch.Tensor.clone),
        (reference, torch.Tensor.clone),
        (reference, torch.Tensor.double),
    ):
        out, kept = (unwritten(rows, size, dtype=dtype).to(cast(x).dtype) for size in (outputs, width))
        inputs = {name: cast(tensor) for name, tensor in joined.items()} | ({"x_out": kept} if branched else {})
        run(out, cast(x), cast(norm), cast(weight), eps=EPS, **inputs)
        results.append((out, kept))
    for given, plain, truth in zip(*results, strict=True):
        if branched or given is results[0][0]:
            assert_as_exact(given, plain, truth)


@dtypes
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("outputs", "width"), SIZES)
def test_residual_linear(outputs, width, with_residual, dtype):
    x, weight = random(3, width, dtype=dtype), random(outputs, width, dtype=dtype, scale=width**-0.5)
    residual = random(3, outputs, dtype=dtype) if with_residual else None
    given, plain = unwritten(3, outputs, dtype=dtype), unwritten(3, outputs, dtype=dtype)
    truth = plain.double()
    kernels.residual_linear(given, x, weight, residual=residual)
    residual_linear_reference(plain, x, weight, residual=residual)
    exact = None if residual is None else residual.double()
    residual_linear_reference(truth, x.double(), weight.double(), residual=exact)
    assert_as_exact(given, plain, truth)


class Joined:
    """Parts of runs for the output projection to join."""

    def __init__(self, heads, head_dim, positions, window, outputs, dtype, with_residual):
        rows, width = len(positions), heads * head_dim
        self.parts = AttentionParts.allocate(rows, heads, head_dim, dtype, torch.device(DEVICE))
        for tensor in self.parts:
            tensor.fill_(float("nan"))
        self.position = torch.tensor(positions, dtype=torch.int32, device=DEVICE)
        self.options = {"heads": heads, "window": window}
        for row, at in enumerate(positions):
            runs = runs_reference(at, window, BLOCK_KEYS[dtype.itemsize])[2]
            self.parts.partial[row, :runs] = torch.randn(runs, width)
            self.parts.stats[row, :runs, 0] = torch.randn(runs, heads) * 3
            self.parts.stats[row, :runs, 1] = torch.rand(runs, heads) * 9 + 1
        self.weight = random(outputs, width, dtype=dtype, scale=width**-0.5)
        self.residual = random(rows, outputs, dtype=dtype) if with_residual else None

    def run(self, rows=slice(None)):
        """What the launcher gives."""
        parts = AttentionParts(*(tensor[rows] for tensor in self.parts))
        out = unwritten(len(parts.joined), len(self.weight), dtype=self.weight.dtype)
        residual = None if self.residual is None else self.residual[rows]
        inputs = (parts, self.position[rows], self.weight)
        kernels.output_projection(out, *inputs, **self.options, residual=residual)
        return out

    def plain(self, dtype):
        """What plain operations give in a dtype, from the parts joined in fp64."""
        wide = AttentionParts(self.parts.partial.double(), self.parts.stats.double(), self.parts.joined)
        x = join_reference(wide, self.position, self.options["window"]).to(dtype)
        out = torch.empty(len(x), len(self.weight), dtype=dtype, device=DEVICE)
        residual = None if self.residual is None else self.residual.to(dtype)
        residual_linear_reference(out, x, self.weight.to(dtype), residual=residual)
        return out


@dtypes
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_dim", "window", "outputs"),
    [(4, 32, None, 64), (3, 28, 90, 37), (1, 80, 40, 130), (5, 24, None, 33)],
)
def test_output_projection(heads, head_dim, window, outputs, with_residual, dtype):
    case = Joined(heads, head_dim, (0, 39, 70, 89, 90, 500, 1300), window, outputs, dtype, with_residual)
    assert_as_exact(case.run(), case.plain(dtype), case.plain(torch.float64))


@dtypes
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("branched", [False, True])
def test_lm_head_argmax(branched, softcap, dtype):
    rows, vocab, width = 3, 301, 84
    x, norm = random(rows, width, dtype=dtype), random(width, dtype=dtype, scale=0.1)
    table, joined = random(vocab, width, dtype=dtype), stream(rows, width, dtype, branched)
    best = new_best(rows, x.device)
    tokens = [torch.full((rows,), -1, device=DEVICE) for _ in range(3)]
    given, plain = unwritten(rows, vocab, dtype=dtype), unwritten(rows, vocab, dtype=dtype)
    truth = plain.double()
    options = {"eps": EPS, "softcap": softcap}
    kernels.lm_head_argmax(tokens[0], x, norm, table, logits=given, scratch=best, **options, **joined)
    lm_head_argmax_reference(tokens[1], x, norm, table, logits=plain, **options, **joined)
    exact = (x.double(), norm.double(), table.double())
    lm_head_argmax_reference(tokens[2], *exact, logits=truth, **options, **wide(joined))
    assert_as_exact(given, plain, truth)
    assert tokens[0].tolist() == [int(row.float().argmax()) for row in given.cpu()]
    assert bool((best == NO_KEY).all()), "the workspace is left as it was found"


@pytest.mark.parametrize("block", [Block(1, 128, 4), Block(8, 128, 4)], ids=["row by row", "in blocks"])
def test_ties_go_to_the_lowest_index(block):
    # Rows 40, 7 and 200 of the table are one row: their logits are equal, and the largest.
    table = random(256, 128, dtype=torch.float32, scale=0.01)
    x = random(1, 128, dtype=torch.float32)
    table[[40, 7, 200]] = x[0] * 0.1
    token = torch.full((1,), -1, device=DEVICE)
    best = new_best(1, x.device)
    norm = torch.zeros(128, device=DEVICE)
    kernels.lm_head_argmax(token, x, norm, table, eps=EPS, scratch=best, block=block)
    assert token.item() == 7


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_of_either_sign_are_equal(zero):
    table, x = torch.zeros(16, 32, device=DEVICE), torch.ones(1, 32, device=DEVICE)
    table[3:] = zero  # products of either sign of zero
    token, best = torch.full((1,), -1, device=DEVICE), new_best(1, x.device)
    kernels.lm_head_argmax(token, x, torch.zeros(32, device=DEVICE), table, eps=EPS, scratch=best)
    assert token.item() == 0


@dtypes
def test_advance(dtype):
    def arguments():
        return {
            "token": torch.tensor([5, 7, 9], device=DEVICE),
            "x": unwritten(3, 84, dtype=dtype),
            "position": torch.tensor([1, 2, 3], dtype=torch.int32, device=DEVICE),
            "done": torch.tensor([False, True, False], device=DEVICE),
            "emitted": torch.zeros(4, 3, dtype=torch.int64, device=DEVICE),
            "step": torch.tensor([6], device=DEVICE),
            "table": table,
            "stop_ids": torch.tensor([9, -1, -1], device=DEVICE),
        }

    table = random(301, 84, dtype=dtype)
    given, expected = arguments(), arguments()
    kernels.advance(**given, embed_scale=9.0, pad=0)
    advance_reference(**expected, embed_scale=9.0, pad=0)
    for name in given:
        assert torch.equal(given[name], expected[name]), name


class Attention:
    """A cache with a past, and one new token per row."""

    def __init__(self, heads, kv_heads, head_dim, positions, window, dtype, *, qk_norm=False, softcap=None):
        rows, self.heads, self.kv_heads = len(positions), heads, kv_heads
        limit = max(positions) + 1
        slots = limit if window is None else min(window, limit)
        # Slots that no visible position has filled hold what would show in any sum.
        self.k, self.v = (torch.full((rows, kv_heads, slots, head_dim), 1e4, dtype=dtype) for _ in range(2))
        for (row, position), cache in itertools.product(enumerate(positions), (self.k, self.v)):
            for past in range(max(0, position - slots + 1), position):
                cache[row, :, past % slots] = torch.randn(kv_heads, head_dim).to(dtype)
        self.k, self.v = self.k.to(DEVICE), self.v.to(DEVICE)
        self.qkv = random(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
        self.position = torch.tensor(positions, dtype=torch.int32, device=DEVICE)
        angles = torch.rand(limit, head_dim // 2) * 6
        self.cos, self.sin = angles.cos().to(dtype).to(DEVICE), angles.sin().to(dtype).to(DEVICE)
        self.norms = {}
        if qk_norm:
            self.norms = {name: random(head_dim, dtype=dtype, scale=0.1) for name in ("q_norm", "k_norm")}
        self.options = {"heads": heads, "scale": head_dim**-0.5, "eps": EPS, "window": window, "softcap": softcap}
        self.width = heads * head_dim

    def run(self, function, dtype, rows=slice(None)):
        """Output, keys and values after one step of some rows."""
        cache = self.k[rows].to(dtype).clone(), self.v[rows].to(dtype).clone()
        out = torch.full((len(cache[0]), self.width), float("nan"), dtype=dtype, device=DEVICE)
        norms = {name: weight.to(dtype) for name, weight in self.norms.items()}
        inputs = self.qkv[rows].to(dtype), self.position[rows], self.cos.to(dtype), self.sin.to(dtype)
        if DEVICE == "cuda":
            torch.cuda.synchronize()  # the kernel reads its cache before it waits for the kernel before it
        function(out, *cache, *inputs, **self.options, **norms)
        return out, *cache

    def kernel(self, out, k, v, qkv, position, *args, **options):
        parts = AttentionParts.allocate(len(out), self.heads, self.width // self.heads, out.dtype, out.device)
        for tensor in parts:
            tensor.fill_(float("nan"))
        kernels.decode_attention(parts, k, v, qkv, position, *args, **options)
        out.copy_(join_reference(parts, position, options["window"]))


WINDOW = 40
SHAPES = {
    "mqa, head_dim 256": (8, 1, 256, None, {}),
    "gqa, window": (4, 2, 64, WINDOW, {}),
    "head_dim 80, q/k norm": (4, 1, 80, WINDOW, {"qk_norm": True}),
    "mha, head_dim 128, q/k norm": (8, 8, 128, None, {"qk_norm": True}),
    "softcap": (4, 2, 64, WINDOW, {"softcap": 50.0}),
}


@dtypes
@pytest.mark.parametrize("positions", [(0, 1, 31), (32, 33, 64), (WINDOW - 2, WINDOW - 1, WINDOW), (3 * WINDOW, 7, 96)])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_attention(shape, positions, dtype):
    heads, kv_heads, head_dim, window, options = SHAPES[shape]
    case = Attention(heads, kv_heads, head_dim, positions, window, dtype, **options)
    given = case.run(case.kernel, dtype)
    plain = case.run(decode_attention_reference, dtype)
    truth = case.run(decode_attention_reference, torch.float64)
    for a, b, c in zip(given, plain, truth, strict=True):
        seen = c.abs() < 1e3  # the untouched slots are compared exactly below
        assert_as_exact(a[seen], b[seen], c[seen])
        assert torch.equal(a[~seen], b[~seen])


# Where runs are as many as there can be and then grow by a block of keys, of 16 in fp32; and well past that.
EDGES = [MAX_RUNS * BLOCK_KEYS[4] * times for times in (1, 2)]


@pytest.mark.parametrize("position", [edge + offset for edge in EDGES for offset in (-1, 0, 1)] + [4101])
def test_attention_past_the_most_runs(position):
    case = Attention(2, 1, 64, (position,), None, torch.float32)
    given, plain = case.run(case.kernel, torch.float32), case.run(decode_attention_reference, torch.float32)
    assert_as_exact(given[0], plain[0], case.run(decode_attention_reference, torch.float64)[0])


@dtypes
def test_a_row_is_the_same_alone_and_beside_seven_others(dtype):
    rows, width, outputs = 8, 200, 96
    x, norm = random(rows, width, dtype=dtype), random(width, dtype=dtype, scale=0.1)
    weight = random(2 * outputs, width, dtype=dtype, scale=width**-0.5)
    joined = stream(rows, width, dtype, True)

    def head(out, x, **joined):
        token, best = torch.zeros(len(x), dtype=torch.int64, device=DEVICE), new_best(len(x), x.device)
        kernels.lm_head_argmax(token, x, norm, weight, eps=EPS, logits=out, scratch=best, **joined)

    def with_stream(launcher):
        def run(out, x, **joined):
            launcher(out, x, norm, weight, eps=EPS, x_out=torch.empty_like(x), **joined)

        return run

    launchers = {
        "qkv_projection": (with_stream(kernels.qkv_projection), 2 * outputs),
        "gated_mlp": (with_stream(kernels.gated_mlp), outputs),
        "lm_head_argmax": (head, 2 * outputs),
        "residual_linear": (lambda out, x, **_: kernels.residual_linear(out, x, weight), 2 * outputs),
    }
    for name, (run, size) in launchers.items():
        together = unwritten(rows, size, dtype=dtype)
        run(together, x, **joined)
        for row in (0, 3, 7):
            alone, one = unwritten(1, size, dtype=dtype), slice(row, row + 1)
            run(alone, x[one], branch=joined["branch"][one], branch_norm=joined["branch_norm"])
            assert torch.equal(alone[0], together[row]), (name, row)

    joined_runs = Joined(4, 32, (0, 5, 31, 32, 33, 70, 95, 600), None, 96, dtype, True)
    together = joined_runs.run()
    for row in (0, 3, 7):
        assert torch.equal(joined_runs.run(slice(row, row + 1))[0], together[row]), ("output_projection", row)

    case = Attention(4, 2, 64, (0, 5, 31, 32, 33, 70, 95, 96), None, dtype)
    together = case.run(case.kernel, dtype)[0]
    for row in (0, 3, 7):
        assert torch.equal(case.run(case.kernel, dtype, slice(row, row + 1))[0][0], together[row])


def test_a_kernel_refuses_to_run_without_its_workspace():
    x, table = random(1, 32, dtype=torch.float32), random(16, 32, dtype=torch.float32)
    head = partial(
        kernels.lm_head_argmax, torch.zeros(1, dtype=torch.int64, device=DEVICE), x, table[0], table, eps=EPS
    )
    with pytest.raises(ValueError, match="scratch: expected new_best of at least 1 rows, got None"):
        head()


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_whole_steps_take_hugging_faces_tokens(family, small_pair, random_ids):
    if DEVICE == "cuda":
        pytest.skip("the small models live on the CPU; tests/gpu has the whole step on a GPU")
    pair, ids = small_pair(family), random_ids(12)
    expected, _ = pair.hf_greedy(ids, 32)
    assert len(set(expected)) >= 16
    assert pair.greedy(ids, 32)[0] == expected
