"""The audit's checks of drawn answers: they pass, and refuse what depends on row, neighbours or guesses."""

from __future__ import annotations

import dataclasses

import pytest

import runtime
from runtime.engine.speculation import Speculation
from runtime.families.state import DecodeState
from runtime.parity import invariances
from runtime.parity.invariances import Invariances

NAMES = ("drawn, among greedy rows", "drawn, in another order of arrival", "drawn, with guesses")
IDS = [[5, 9, 11], [7, 8] * 9, list(range(20, 32))]
set_row, check = DecodeState.set_row, Speculation.check


def seed_of_the_row(state, row, stop_ids, limit, seed=0, inverse_temperature=0.0):
    set_row(state, row, stop_ids, limit, seed + row, inverse_temperature)


def greedy_rows_drawn(state, row, stop_ids, limit, seed=0, inverse_temperature=0.0):
    set_row(state, row, stop_ids, limit, seed, max(inverse_temperature, 1.0 if row else 0.0))


def guesses_taken_as_they_are(speculation, model, answer, guesses):
    right = check(speculation, model, answer, guesses)
    return right._replace(tokens=[guesses[0], *right.tokens[1:]])


FAULTS = {
    "none": (None, "", None, set()),
    "a seed of the row": (DecodeState, "set_row", seed_of_the_row, {*NAMES[:2]}),
    "greedy rows drawn": (DecodeState, "set_row", greedy_rows_drawn, {NAMES[0]}),
    "guesses taken as they are": (Speculation, "check", guesses_taken_as_they_are, {NAMES[2]}),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("fault", FAULTS)
def test_drawn_answers_are_checked(fault, small_pair, monkeypatch):
    monkeypatch.setattr(invariances, "TEMPERATURE", 0.05)  # a small model's logits are nearly flat
    monkeypatch.setattr("runtime.engine.step_cost.StepCost.of", lambda cost, rows: 1.0)  # guesses always pay
    model = dataclasses.replace(small_pair("gemma3").ours)
    expected = [list(runtime.generate(model, ids, max_new_tokens=24, ignore_eos=True).token_ids) for ids in IDS]
    where, name, faulty, refused_by = FAULTS[fault]
    if where is not None:
        monkeypatch.setattr(where, name, faulty)
    checks = Invariances(model, None, IDS, expected, 0.0, None).checks()
    found = {name: checks[name]() for name in NAMES}
    if found[NAMES[2]].passed is None:
        assert "no guesses" in found[NAMES[2]].detail
        refused_by = refused_by - {NAMES[2]}
    assert {name for name, check in found.items() if check.passed is False} == refused_by, found
    assert checks["drawn, captured and eager"]().passed is None
