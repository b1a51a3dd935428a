"""Attention weights of one head: Hugging Face's own, and what they have to be in any case."""

import copy

import pytest
import torch

import runtime
from runtime.engine.scheduler import scheduler_of
from runtime.errors import NonFiniteError
from runtime.inspection.attention import attention_weights

pytestmark = pytest.mark.newest_only


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_they_are_hugging_faces(family, small_pair, random_ids):
    """In every layer and head, past the windows of sliding layers: as near to fp64 as Hugging Face's own in fp32."""
    pair, ids = small_pair(family), random_ids(40)
    theirs, truth = (
        model(torch.tensor([ids]), output_attentions=True).attentions
        for model in (eager(pair.hf, torch.float32), eager(pair.hf, torch.float64))
    )
    assert len(truth) == len(pair.ours.config.layers)
    for layer, heads in enumerate(truth):
        ours = torch.stack([attention_weights(pair.ours, ids, layer, head) for head in range(len(heads[0]))])
        error, allowed = ((weights - heads[0]).abs().max() for weights in (ours, theirs[layer][0]))
        assert error <= 2 * allowed + 1e-6


def eager(hf, dtype):
    """A copy of Hugging Face's model that keeps its attention weights."""
    copied = copy.deepcopy(hf).to(dtype)
    copied.set_attn_implementation("eager")
    return copied


def test_a_window_ends_them(tiny):
    ids = tiny.tokenizer.encode("the dog the snow the dog the snow")
    window = tiny.config.layers[0].window
    assert len(ids) > window and tiny.config.layers[1].window is None
    sliding, full = (attention_weights(tiny, ids, layer, 3) for layer in (0, 1))
    for weights in (sliding, full):
        torch.testing.assert_close(weights.sum(1), torch.ones(len(ids)))
        assert not weights.triu(1).any()
    assert not sliding.tril(-window).any() and full.tril(-window).any()


def test_answers_go_on_between_its_layers_and_are_the_same(tiny):
    alone = runtime.generate(tiny, "the dog", max_new_tokens=60, ignore_eos=True).token_ids
    weights = attention_weights(tiny, [2, 7, 8], 2, 1)
    pieces = runtime.stream(tiny, "the dog", max_new_tokens=60, ignore_eos=True)
    picked = [next(pieces).token_ids[0]]
    scheduler = scheduler_of(tiny)
    before = scheduler.tokens
    assert torch.equal(attention_weights(tiny, [2, 7, 8], 2, 1), weights)
    assert scheduler.tokens == before + 2, "a step between layers 0 and 1, and one between 1 and 2"
    assert (*picked, *(piece.token_ids[0] for piece in pieces)) == alone


def test_weights_that_are_no_number(tiny):
    tiny.weights.layers[1].attention_norm.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="layer 1"):
        attention_weights(tiny, [2, 7], 1, 0)
