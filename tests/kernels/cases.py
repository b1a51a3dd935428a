"""The inputs of each kernel, and how what it makes of them is compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

from runtime.kernels import attention_splits
from runtime.kernels.argmax import NO_KEY, NO_TOKEN, new_argmax_keys
from runtime.kernels.attention_splits import AttentionSplits
from runtime.kernels.launch import INTERPRETING
from runtime.kernels.ops import Ops, TorchOps, ops_for

from .comparison import SAME_ROUNDINGS, assert_as_exact, assert_same_roundings

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"
EPS = 1e-6
Results = dict[str, torch.Tensor]

# Arguments whose first dimension is the rows of a batch; `emitted` has them in its second.
ROW_TENSORS = {
    *("x", "branch", "residual", "normed", "qkv", "position", "k_cache", "v_cache"),
    *("token", "done", "stop_ids", "limit"),
}
# Slots that no visible position has filled hold this, which shows in any sum.
UNFILLED = 1e4
# A program takes the interpreter some milliseconds, so that some tests have fewer splits there, which grow sooner.
FEW_SPLITS = 4 if INTERPRETING else attention_splits.WARP_SPLITS.few


def limit_splits(patch: pytest.MonkeyPatch, few: int, **beyond: int) -> None:
    """Lets attention have at most so many splits of older keys, a power of 2: in every row, or in those that are short
    by what `beyond` sets of a SplitPlan."""
    for name in ("WARP_SPLITS", "GROUP_SPLITS"):
        plan = getattr(attention_splits, name)
        fewer = min(plan.few, few)
        patch.setattr(attention_splits, name, plan._replace(**{"few": fewer, "most": fewer} | beyond))


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).to(dtype).to(DEVICE)


def unwritten(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """An output in which every element that a kernel leaves out shows."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


@dataclass
class Case:
    """One call of an operation, to be run on any backend, by plain PyTorch in fp64 too.

    Attributes:
        call: takes a backend, then the arguments by name.
        inputs: by name. Those that the operation writes to are results too.
        outputs: the shapes of its other results, by name, without the rows.
        rows: of the batch.
        dtype: the model's.
        exact: the results that have to be the reference's bit for bit.
        looser: another bound than SAME_ROUNDINGS for results whose roundings are not all Hugging Face's, by design.
        slack: what of its largest value a result may be off for the sake of the hardware's functions.
    """

    call: Callable[..., None]
    inputs: dict[str, Any]
    outputs: dict[str, tuple[int, ...]]
    rows: int
    dtype: torch.dtype
    written: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    looser: dict[str, float] = field(default_factory=dict)
    slack: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def kernel(self) -> Callable[..., None]:
        """The call on Triton kernels, of a model whose most rows are not known."""
        return self.kernel_of(None)

    def kernel_of(self, max_rows: int | None) -> Callable[..., None]:
        """The call on the Triton kernels of a model of at most so many rows; of one, each row is a call of its own."""
        call = partial(self.call, ops_for(torch.device(DEVICE), max_rows))
        return partial(self._by_row, call) if max_rows == 1 else call

    def _by_row(self, call: Callable[..., None], **arguments: Any) -> None:
        of_rows = ROW_TENSORS | self.outputs.keys()
        for row in range(len(arguments[next(iter(self.outputs))])):
            own = {
                name: value[row : row + 1] if name in of_rows and value is not None else value
                for name, value in arguments.items()
            }
            call(**own)

    @property
    def reference(self) -> Callable[..., None]:
        """The call in plain PyTorch."""
        return partial(self.call, TorchOps())

    def run(
        self,
        function: Callable[..., None],
        rows: slice = slice(None),
        dtype: torch.dtype | None = None,
        device: str = DEVICE,
        **changed: Any,
    ) -> Results:
        """What a function makes of some rows, its floating-point inputs cast to `dtype` if that is given."""
        count = len(range(self.rows)[rows])

        def prepared(name: str, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            value = value[:, rows] if name == "emitted" else value[rows] if name in ROW_TENSORS else value
            cast = dtype if dtype and value.is_floating_point() else value.dtype
            return value.to(device, cast, copy=True).contiguous()

        arguments = {name: prepared(name, value) for name, value in self.inputs.items()}
        for name, shape in self.outputs.items():
            arguments[name] = unwritten(count, *shape, dtype=dtype or self.dtype).to(device)
        if DEVICE == "cuda":
            torch.cuda.synchronize()  # decode_attention reads its cache before it waits for the kernel before it
        function(**arguments, **self.options | changed)
        return {name: arguments[name] for name in (*self.outputs, *self.written)}

    def assert_right(self, given: Results) -> None:
        """Compares results with the reference's: as exact, and bit for bit where they can be."""
        plain, truth = self.run(self.reference), self.run(self.reference, dtype=torch.float64)
        for name in given:
            if name in self.exact:
                assert torch.equal(given[name], plain[name]), f"{name} differs from the reference's"
            else:
                assert_as_exact(given[name], plain[name], truth[name], self.slack, self.magnitude())

    def magnitude(self) -> float:
        """The largest sum of what is added up, without signs, where the plain operation adds it in a higher precision
        than the kernel; 0 where it does not, and so has the error of its own sums."""
        return 0.0

    def assert_rounded(self, given: Results) -> None:
        """Compares where results were rounded. Takes a dtype of 16 bits, and enough values for a share of them.

        The plain operation is a CPU's, whose products are rounded once; a GPU's may add up parts in 16 bits.
        """
        plain = self.run(self.reference, device="cpu")
        truth = self.run(self.reference, device="cpu", dtype=torch.float64)
        for name in given.keys() - {*self.exact}:
            bound = self.looser.get(name, SAME_ROUNDINGS)
            assert_same_roundings(given[name].cpu(), plain[name], truth[name], bound)

    def compare(self, given: Results) -> None:
        """Every comparison that the dtype allows."""
        self.assert_right(given)
        if self.dtype.itemsize == 2:
            self.assert_rounded(given)


def branch(rows: int, width: int, dtype: torch.dtype, branched: bool) -> dict[str, torch.Tensor]:
    """The inputs that a branch adds to a kernel."""
    if not branched:
        return {}
    return {"branch": random(rows, width, dtype=dtype), "branch_norm": random(width, dtype=dtype, scale=0.1)}


def norm_case(rows: int, width: int, dtype: torch.dtype, with_residual: bool) -> Case:
    inputs = {
        "x": random(rows, width, dtype=dtype),
        "weight": random(width, dtype=dtype, scale=0.1),
        "residual": random(rows, width, dtype=dtype) if with_residual else None,
    }
    return Case(Ops.rms_norm, inputs, {"out": (width,)}, rows, dtype, options={"eps": EPS})


def projection_case(name: str, rows: int, outputs: int, width: int, dtype: torch.dtype, branched: bool) -> Case:
    """qkv_projection, or gated_mlp with twice the weights."""
    weight, matrices = {"qkv_projection": ("weight", 1), "gated_mlp": ("gate_up", 2)}[name]
    inputs = {
        "x": random(rows, width, dtype=dtype),
        "norm_weight": random(width, dtype=dtype, scale=0.1),
        weight: random(outputs * matrices, width, dtype=dtype, scale=width**-0.5),
    } | branch(rows, width, dtype, branched)
    shapes = {"out": (outputs,)} | ({"residual_out": (width,)} if branched else {})
    return Case(getattr(Ops, name), inputs, shapes, rows, dtype, options={"eps": EPS})


def linear_case(rows: int, outputs: int, width: int, dtype: torch.dtype, with_residual: bool) -> Case:
    inputs = {
        "x": random(rows, width, dtype=dtype),
        "weight": random(outputs, width, dtype=dtype, scale=width**-0.5),
        "residual": random(rows, outputs, dtype=dtype) if with_residual else None,
    }
    return Case(Ops.residual_linear, inputs, {"out": (outputs,)}, rows, dtype)


class HeadCase(Case):
    """The head, whose tokens follow exactly from its own logits."""

    def assert_right(self, given: Results) -> None:
        super().assert_right({"logits": given["logits"]})
        expected = [int(row.float().argmax()) for row in given["logits"].cpu()]
        assert given["token"].tolist() == expected, "the lowest of the largest logits, as they were rounded"

    def assert_rounded(self, given: Results) -> None:
        super().assert_rounded({"logits": given["logits"]})


def head_case(
    rows: int, vocab: int, width: int, dtype: torch.dtype, branched: bool = False, softcap: float | None = None
) -> Case:
    def call(ops, token, x, **arguments):
        keys = new_argmax_keys(len(x), x.device)
        ops.lm_head_argmax(token, x, argmax_keys=keys, **arguments)
        assert bool((keys == NO_KEY).all()), "the workspace is left as it was found"

    inputs = {
        "token": torch.full((rows,), -1, device=DEVICE),
        "x": random(rows, width, dtype=dtype),
        "norm_weight": random(width, dtype=dtype, scale=0.1),
        "table": random(vocab, width, dtype=dtype),
    } | branch(rows, width, dtype, branched)
    options = {"eps": EPS, "softcap": softcap}
    shapes = {"logits": (vocab,)}
    return HeadCase(call, inputs, shapes, rows, dtype, written=("token",), options=options)


def far_below_zero_case(dtype: torch.dtype) -> Case:
    """A gated MLP whose gates lie from -4 to -1: there tanh's GELU and the exact one part by several per cent, and
    1 + tanh cancels."""
    rows, outputs, width = 3, 64, 84
    case = projection_case("gated_mlp", rows, outputs, width, dtype, branched=False)
    x, gate_up = case.inputs["x"], case.inputs["gate_up"]
    case.inputs["norm_weight"].zero_()
    x.copy_(x[:1].sign() * torch.rand(rows, width, device=DEVICE).to(dtype))
    gates = torch.linspace(-4.6, -1.2, outputs, device=DEVICE)[:, None]
    gate_up[:outputs] = (gates * x[0].sign().float() / width).to(dtype)
    return case


def head_of_ties(dtype: torch.dtype) -> Case:
    """A head whose largest logits are equal once they are rounded to 16 bits, the later in the table the larger before,
    and whose other logits are far below."""
    case = head_case(2, 301, 84, dtype)
    x, table = case.inputs["x"], case.inputs["table"]
    x.copy_(x[:1].expand_as(x).clone())
    case.inputs["norm_weight"].zero_()
    table.copy_(-x[:1] * torch.rand(301, 1, device=DEVICE).to(dtype))
    for step, token in enumerate((7, 40, 200, 297)):
        table[token] = x[0]
        table[token, 0] *= 1 + step * torch.finfo(dtype).eps
    return case


def head_of_equal_rows(dtype: torch.dtype) -> Case:
    """A head four of whose rows are one and give the largest logit: two are neighbours, two in other blocks."""
    case = head_case(2, 301, 84, dtype)
    x, table = case.inputs["x"], case.inputs["table"]
    x.copy_(x[:1].expand_as(x).clone())
    case.inputs["norm_weight"].zero_()
    table.mul_(0.01)
    table[[40, 7, 200, 6]] = x[0]
    return case


def head_below_zero(dtype: torch.dtype) -> Case:
    """A head whose every logit is below zero, which is what a masked lane makes, and the last one the largest."""
    case = head_case(2, 301, 84, dtype)
    x, table = case.inputs["x"], case.inputs["table"]
    x.copy_(x[:1].expand_as(x).clone())
    case.inputs["norm_weight"].zero_()
    table.copy_(-x[:1] * torch.linspace(9, 3, 301, device=DEVICE).to(dtype)[:, None])
    return case


class NonFiniteHead(HeadCase):
    """A head some of whose rows have nothing to pick."""

    def assert_right(self, given: Results) -> None:
        plain = self.run(self.reference)
        expected = [best if math.isfinite(row[best]) else NO_TOKEN for row in given["logits"] for best in [_best(row)]]
        assert NO_TOKEN in expected
        assert given["token"].tolist() == expected == plain["token"].tolist()
        torch.testing.assert_close(given["logits"].isfinite(), plain["logits"].isfinite())

    def assert_rounded(self, given: Results) -> None:
        """Nothing here is about roundings."""


def _best(row: torch.Tensor) -> int:
    return int(row.float().cpu().argmax())


def head_that_overflows(dtype: torch.dtype) -> Case:
    """Rows of one number each, which meet a column each of the table. The greatest logit is: infinite; finite, beside
    one of minus infinity; minus infinity; NaN, from a NaN in the row; NaN, from an infinity there; finite."""
    case = head_case(6, 301, 84, dtype)
    x, table = case.inputs["x"], case.inputs["table"]
    x.zero_()
    x.diagonal().fill_(1)
    x[3, 3], x[4, 4] = torch.nan, torch.inf
    most = torch.finfo(dtype).max
    table[297, 0], table[7, 1], table[:, 2] = most, -most, -most
    case.inputs["norm_weight"].zero_()
    return NonFiniteHead(**vars(case))


def head_with_a_nan(dtype: torch.dtype) -> Case:
    """One logit of each row is a NaN with its sign bit set, which as an integer is below every number."""
    case = head_case(3, 301, 84, dtype)
    case.inputs["table"][200] = -case.inputs["table"][200].fill_(torch.nan)
    return NonFiniteHead(**vars(case))


def advance_of_none(dtype: torch.dtype) -> Case:
    """Rows that picked nothing, one of them done before, where every place for a stop token is taken."""
    case = advance_case(4, 84, dtype)
    case.inputs["token"][:2] = NO_TOKEN
    case.inputs["stop_ids"] = case.inputs["stop_ids"][:, -1:].contiguous()
    case.inputs["limit"] = case.inputs["position"] + 10
    return case


def advance_case(rows: int, width: int, dtype: torch.dtype) -> Case:
    vocab, ring = 301, 4
    token = torch.randint(vocab, (rows,), device=DEVICE)
    index = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    position = torch.randint(100, (rows,), dtype=torch.int32, device=DEVICE)
    own = token.where(index % 4 == 2, -1)  # a stop token of the row alone; another is that of all
    inputs = {
        "token": token,
        "x": unwritten(rows, width, dtype=dtype),
        "position": position,
        "done": index % 3 == 1,
        "emitted": torch.zeros(ring, rows, dtype=torch.int64, device=DEVICE),
        "step": torch.full((rows + 3,), 6, device=DEVICE),
        "table": random(vocab, width, dtype=dtype),
        "stop_ids": torch.stack((own, torch.full_like(token, -1), token[-1].expand(rows)), dim=1),
        "limit": position + index % 4,  # reached by every fourth row, from the first on
    }
    written = ("token", "x", "position", "done", "emitted", "step")
    options = {"embed_scale": torch.tensor(width**0.5, dtype=dtype).item(), "pad": 0}
    return Case(Ops.advance, inputs, {}, rows, dtype, written, written, options=options)


def empty_splits(out: torch.Tensor, heads: int, head_dim: int, most: int | None = None) -> AttentionSplits:
    """Splits for an output, NaN where no kernel has written: `most` of older keys, or as many as any row can have."""
    if most is None:
        most = max(attention_splits.WARP_SPLITS.most, attention_splits.GROUP_SPLITS.most)
    splits = AttentionSplits.allocate(len(out), most, heads, head_dim, out.device)
    return AttentionSplits(*(tensor.fill_(float("nan")) for tensor in splits))
