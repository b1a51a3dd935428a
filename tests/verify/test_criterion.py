"""The criterion's bounds, on records made by hand: just within passes, just past does not."""

from __future__ import annotations

import pytest

from runtime.parity.criterion import judge
from runtime.parity.records import Divergence, PromptRecord, Variant

NAN = float("nan")


def record(
    steps=64, *, ours=1.0, theirs=1.0, our_logits=1.0, gap=None, step=3, first=True, nearer=False, variant_gap=None,
    broken=(),
):  # fmt: skip
    """A prompt whose errors are the given multiples of a spread of values; with a gap, one that diverges, where
    fp64 prefers our token or Hugging Face's."""
    spread = [(1 + index % 16) / 16 for index in range(steps)]
    tokens = list(range(steps))
    answer = [*tokens[:step], 999, *tokens[step + 1 :]] if gap is not None else tokens
    pair = (gap or 0.0, 0.0) if nearer else (0.0, gap or 0.0)
    divergence = Divergence(
        step=step, ours=999, theirs=step, first=first, our_pair=pair, their_pair=pair, true_pair=pair, gap=gap or 0.0
    )
    variant = Variant(tokens=tokens, parts_at=None if variant_gap is None else 1, gap=variant_gap or 0.0)
    return PromptRecord(
        name="",
        suite="",
        prompt_ids=[1],
        ours=answer,
        theirs=tokens,
        forced=answer,
        not_the_largest=list(broken),
        margins=[1.0] * steps,
        our_errors=[ours * value for value in spread],
        their_errors=[theirs * value for value in spread],
        our_logit_errors=[our_logits * value for value in spread],
        their_logit_errors=spread,
        divergences=[] if gap is None else [divergence],
        variants={"other": variant},
    )


def refused(records, dtype="bfloat16", **options):
    return {found.part for found in judge(records, dtype, **options) if found.passed is False}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_sides_pass(dtype):
    assert refused([record()], dtype) == set()


def test_fp32_allows_a_gap_of_twice_hugging_faces_largest_error():
    assert refused([record(), record(gap=2.0)], "float32") == set()
    assert refused([record(), record(gap=2.001)], "float32") == {"fp32 tokens"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_may_be_four_times_as_wrong(dtype):
    assert refused([record(our_logits=3.99)], dtype) == set()
    assert refused([record(our_logits=4.01)], dtype) == {"logit error"}
    assert refused([record(our_logits=0.24)], dtype) == {"one model on both sides"}
    assert "logit error" in refused([record(our_logits=NAN)], dtype)


def test_margin_errors_at_full_size():
    assert refused([record(ours=1.24)] * 40) == set()
    assert refused([record(ours=1.26)] * 40) == {"margin error, median", "margin error, p99"}
    assert refused([record(ours=2.01)] * 40) == {"margin error, median", "margin error, p99", "margin error, max"}
    assert refused([record(ours=NAN)] * 40) == {"margin error, median", "margin error, p99", "margin error, max"}


def test_one_large_error_in_a_thousand_is_the_maximum():
    outlier = record().model_copy(update={"our_errors": [2.1, *record().our_errors[1:]]})
    assert refused([outlier, *[record()] * 39]) == {"margin error, max"}


def test_few_steps_leave_room_for_chance_and_not_for_faults():
    shuffled = record(16).model_copy(update={"our_errors": [1.3 * e for e in reversed(record(16).their_errors)]})
    assert refused([shuffled]) == set()
    assert {"margin error, median", "margin error, p99"} <= refused([record(16, ours=3.0)])


def test_first_divergences_are_bounded_by_hugging_faces_own():
    own = [record(variant_gap=0.4), *[record()] * 38]
    assert refused([*own, record(gap=0.4)]) == set()
    assert refused([*own, record(gap=0.41)]) == {"first divergences"}
    assert refused([record(gap=0.99)]) == set()  # without 40 prompts its largest error stands for it
    assert refused([record(gap=1.01)]) == {"first divergences"}


@pytest.mark.parametrize("first", [True, False])
def test_in_16_bits_a_divergence_whose_token_fp64_prefers_is_hugging_faces_error(first):
    """Its error on the two tokens is at least the gap, though its errors on fp64's own best two may be smaller."""
    part, gap = ("first divergences", 1.5) if first else ("later divergences", 2.5)
    assert refused([record(gap=gap, first=first)]) == {part}
    assert refused([record(gap=gap, first=first, nearer=True)]) == set()
    assert refused([record(gap=2.5, first=first, nearer=True)], "float32") == {"fp32 tokens"}


def test_no_more_prompts_diverge_than_hugging_faces_worst_pair():
    own = [record(variant_gap=0.4)] * 2
    assert refused([*own, *[record(gap=0.1)] * 2, *[record()] * 36]) == set()
    assert refused([*own, *[record(gap=0.1)] * 3, *[record()] * 35]) == {"diverging prompts"}


def test_hugging_faces_own_operations_give_its_tokens():
    assert refused([record()] * 2, same_operations=True) == set()
    assert refused([record(), record(gap=1e-9)], same_operations=True) == {"equal tokens"}


def test_the_first_of_the_largest_logits_is_the_token():
    assert refused([record(broken=[5])]) == {"greedy choice"}


def test_a_free_run_is_the_forced_one_up_to_the_first_divergence():
    other = record().model_copy(update={"ours": [7, *record().ours[1:]]})
    assert "free and forced runs" in refused([other], "float32")
