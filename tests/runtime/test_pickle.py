"""What is pickled: a model as the recipe to load it again, a weight as itself."""

from __future__ import annotations

import copy
import multiprocessing
import pickle

import pytest
import torch

import runtime


def answer(model):
    return runtime.generate(model, [2, 7, 9], max_new_tokens=5, ignore_eos=True).token_ids


def test_a_model_pickles_as_the_recipe_to_load_it_again(tiny_folder, capfd):
    model = runtime.load(
        tiny_folder, device="cpu", dtype="bfloat16", max_seq_len=77, max_batch=3, eager=True, progress=True
    )
    expected = answer(model)
    capfd.readouterr()
    pickled = pickle.dumps(model)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert (again.name, again.runtime, again.config) == (model.name, model.runtime, model.config)
    assert answer(again) == expected
    assert capfd.readouterr().err == ""


def test_a_model_is_an_argument_of_a_spawned_process(tiny):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        asked = {"max_new_tokens": 5, "ignore_eos": True}
        told = pool.apply_async(runtime.generate, (tiny, [2, 7, 9]), asked).get(timeout=300)
        assert told.token_ids == answer(tiny)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
def test_a_copy_says_what_to_do(make, tiny):
    with pytest.raises(runtime.InvalidArgumentType, match="share it, since requests take turns, or load it again"):
        make(tiny)
    with pytest.raises(runtime.InvalidArgumentType):
        make({"model": tiny}) if make is copy.deepcopy else make(tiny)


def test_a_weight_pickles_as_itself(tiny):
    weights = tiny.weights
    for tensor in (weights.embedding, weights.layers[1].qkv, weights.layers[0].q_norm, weights.final_norm):
        pickled = pickle.dumps(tensor)
        assert len(pickled) < tensor.nbytes + 1000
        assert torch.equal(pickle.loads(pickled), tensor)
    layer = pickle.dumps(weights.layers[0])
    assert len(layer) < sum(tensor.nbytes for tensor in vars(weights.layers[0]).values()) + 10_000
    everything = pickle.loads(pickle.dumps(weights))
    assert torch.equal(everything.layers[2].down, weights.layers[2].down)
