"""The inputs of the head: with ties, with nothing to pick, below zero, with rows that are drawn."""

from __future__ import annotations

import math

import torch

from runtime.check.case import EPS, Case, Results, random
from runtime.check.comparison import require
from runtime.check.step_cases import branch
from runtime.kernels.argmax import NO_KEY, NO_TOKEN, new_argmax_keys
from runtime.kernels.gumbel import scores_torch
from runtime.kernels.token_mask import new_token_mask, words_of


class HeadCase(Case):
    """The head, whose tokens follow exactly from its own logits."""

    def assert_right(self, given: Results) -> float:
        share = super().assert_right({"logits": given["logits"]})
        expected, picked = [best(row) for row in given["logits"]], given["token"].tolist()
        require(picked == expected, f"tokens {picked}, expected the lowest of the largest logits, {expected}")
        return share

    def assert_rounded(self, given: Results) -> None:
        super().assert_rounded({"logits": given["logits"]})


def head_case(
    rows: int, vocab: int, width: int, dtype: torch.dtype, branched: bool = False, softcap: float | None = None
) -> Case:
    def call(ops, token, x, **arguments):
        keys = new_argmax_keys(len(x), x.device)
        ops.lm_head_argmax(token, x, argmax_keys=keys, **arguments)
        require(bool((keys == NO_KEY).all()), "the head's workspace is not left as it was found")

    inputs = {
        "token": torch.full((rows,), -1),
        "x": random(rows, width, dtype=dtype),
        "norm_weight": random(width, dtype=dtype, scale=0.1),
        "table": random(vocab, width, dtype=dtype),
    } | branch(rows, width, dtype, branched)
    options = {"eps": EPS, "softcap": softcap}
    shapes = {"logits": (vocab,)}
    return HeadCase(call, inputs, shapes, rows, dtype, written=("token",), options=options)


class SampledHead(HeadCase):
    """A head of rows with and without a temperature, and perhaps a mask, whose tokens follow exactly from its own
    logits."""

    def assert_right(self, given: Results) -> float:
        share = Case.assert_right(self, {"logits": given["logits"]})
        numbers = [self.inputs[name] for name in ("seed", "position", "inverse_temperature")]
        scores = [scores_torch(row, *own) for row, *own in zip(given["logits"].cpu(), *numbers, strict=True)]
        if "mask" in self.inputs:
            for row, words in zip(scores, self.inputs["mask"].tolist(), strict=True):
                row[[at for at in range(len(row)) if not words[at // 32] >> at % 32 & 1]] = -math.inf
        expected, picked = [best(row) for row in scores], given["token"].tolist()
        require(picked == expected, f"tokens {picked}, expected those of the greatest scores, {expected}")
        return share


def sampled_head(rows: int, vocab: int, width: int, dtype: torch.dtype, softcap: float | None = None) -> Case:
    case = head_case(rows, vocab, width, dtype, softcap=softcap)

    def call(ops, token, x, *, inverse_temperature, **arguments):
        case.call(ops, token, x, inverse_temperature=inverse_temperature.float(), **arguments)  # in fp64 too

    case.inputs["table"].mul_(0.3)  # or the same token is drawn every time
    case.inputs |= {
        "seed": torch.randint(-(2**63), 2**63 - 1, (rows,)),
        "position": torch.randint(5000, (rows,), dtype=torch.int32),
        "inverse_temperature": torch.tensor([1.0, 0.0, 1.4, 0.3, 2.0**64])[torch.arange(rows) % 5],
    }
    return SampledHead(**vars(case) | {"call": call})


def masked_head(rows: int, vocab: int, width: int, dtype: torch.dtype, softcap: float | None = None) -> Case:
    """The same with masks: of every token, of half of them, of a few, of the last alone."""
    case = sampled_head(rows, vocab, width, dtype, softcap)
    shares = torch.tensor([1.0, 0.5, 0.02, 0.0, 0.5])[torch.arange(rows) % 5]
    bits = torch.rand(rows, 32 * words_of(vocab)) < shares[:, None]
    bits[:, vocab - 1] = True
    words = (bits.view(rows, -1, 32).long() << torch.arange(32)).sum(dim=2)
    case.inputs["mask"] = (words - (words >> 31 << 32)).to(torch.int32)
    return case


def head_of_ties(dtype: torch.dtype) -> Case:
    """A head whose largest logits are equal once they are rounded to 16 bits, the later in the table the larger before,
    and whose other logits are far below."""
    case = head_case(2, 301, 84, dtype)
    x, table = case.inputs["x"], case.inputs["table"]
    x.copy_(x[:1].expand_as(x).clone())
    case.inputs["norm_weight"].zero_()
    table.copy_(-x[:1] * torch.rand(301, 1).to(dtype))
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
    table.copy_(-x[:1] * torch.linspace(9, 3, 301).to(dtype)[:, None])
    return case


class NonFiniteHead(HeadCase):
    """A head some of whose rows have nothing to pick."""

    def assert_right(self, given: Results) -> float:
        plain = self.run(self.reference)
        picks = [(row, best(row)) for row in given["logits"]]
        expected = [token if math.isfinite(row[token]) else NO_TOKEN for row, token in picks]
        picked, by_reference = given["token"].tolist(), plain["token"].tolist()
        require(NO_TOKEN in expected, f"every row has a token to pick, {expected}: this case is about those without")
        require(picked == expected, f"tokens {picked}, expected {expected}")
        require(picked == by_reference, f"tokens {picked}, the reference's are {by_reference}")
        finite = given["logits"].isfinite(), plain["logits"].isfinite()
        require(torch.equal(*finite), "other logits are finite than the reference's")
        return 0.0

    def assert_rounded(self, given: Results) -> None:
        """Nothing here is about roundings."""


def best(row: torch.Tensor) -> int:
    """The lowest of the largest logits."""
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


def head_with_a_masked_nan(dtype: torch.dtype) -> Case:
    """The same with masks of every token but that one, which shows all the same."""
    case = head_with_a_nan(dtype)
    case.inputs["mask"] = new_token_mask(3, 301, torch.device("cpu"))
    case.inputs["mask"][:, 200 // 32] -= 1 << 200 % 32
    return case
