"""`runtime.wrap`: a model of transformers in memory, whose weights become ours."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import runtime
from runtime.hugging_face.shared_weights import named_weights

FAMILIES = ("gemma", "gemma2", "gemma3")
IDS = torch.tensor([[33, 41, 52, 67, 78, 41, 52]])
LIMITS = {"max_seq_len": 64}


def wrapped(pair, dtype=torch.float32, **options):
    """A wrapped copy, since a wrapped model's own weights move."""
    return runtime.wrap(copy.deepcopy(pair.hf).to(dtype), **LIMITS, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrapped_model_generates_what_it_did_before(small_pair, family):
    pair = small_pair(family)
    greedy = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    assert wrapped(pair).generate(IDS, **greedy).tolist() == pair.hf.generate(IDS, **greedy).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_its_parameters_are_views_of_our_weights(small_pair, family):
    model = wrapped(small_pair(family))
    ours = named_weights(model.gemma_runtime)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert parameters.keys() == ours.keys()
    assert all(value.data_ptr() == ours[name].data_ptr() for name, value in parameters.items())
    logits = [each(IDS).logits for each in (model, small_pair(family).hf)]
    logits = [each.detach() for each in logits]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4 * float(logits[1].abs().max()))


def test_a_head_of_its_own_stays_one(small_pair):
    pair = small_pair("gemma", tie_word_embeddings=False)
    model = wrapped(pair)
    assert not model.gemma_runtime.config.tied
    greedy = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": None}
    assert model.generate(IDS, **greedy).tolist() == pair.hf.generate(IDS, **greedy).tolist()


def test_it_is_a_model_of_transformers_to_whoever_asks(small_pair, tmp_path):
    pair = small_pair("gemma3")
    model = wrapped(pair)
    assert isinstance(model, type(pair.hf))
    assert type(model).__name__ == "Gemma3ForCausalLM"
    assert model.can_generate()
    assert model.eval() is model
    assert model.to("cpu") is model
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(pair.hf)
    assert all(map(torch.equal, again.state_dict().values(), pair.hf.state_dict().values()))


@pytest.mark.parametrize("move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("meta")])
def test_it_is_not_moved_or_converted(small_pair, move):
    model = wrapped(small_pair("gemma"))
    with pytest.raises(ValueError, match=r"stays on cpu in torch\.float32"):
        move(model)
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (1, 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_what_they_are(small_pair, dtype):
    model = wrapped(small_pair("gemma3"), dtype, eager=True)  # which compiles nothing
    answer = model.generate(IDS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    assert model.dtype == dtype == model.gemma_runtime.dtype
    assert answer.logits[0].dtype == torch.float32


def test_what_cannot_be_wrapped_is_refused(small_pair):
    pair = small_pair("gemma")
    with pytest.raises(TypeError, match="GemmaForCausalLM"):
        runtime.wrap(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="GemmaModel"):
        runtime.wrap(pair.hf.model)
    with pytest.raises(ValueError, match="wrapped already"):
        runtime.wrap(wrapped(pair))
    mixed = copy.deepcopy(pair.hf)
    mixed.lm_head.weight = torch.nn.Parameter(mixed.lm_head.weight.to(torch.bfloat16))
    with pytest.raises(ValueError, match="one dtype, got bfloat16, float32"):
        runtime.wrap(mixed)
    with pytest.raises(ValueError, match=r"dtype must be one of .* got float64"):
        runtime.wrap(copy.deepcopy(pair.hf).double())
    with pytest.raises(ValueError, match=r"max_seq_len must be at most .* got 1000"):
        runtime.wrap(copy.deepcopy(pair.hf), max_seq_len=1000)
    adapted = copy.deepcopy(pair.hf)
    adapted.model.layers[0].lora = torch.nn.Linear(2, 2)
    with pytest.raises(runtime.CheckpointError, match=r"layers\.0\.lora"):
        runtime.wrap(adapted)
    broken = copy.deepcopy(pair.hf)
    broken.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(runtime.CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight .* not finite"):
        runtime.wrap(broken)
    with pytest.raises(ValueError, match='interface must be "runtime" or "hf"'):
        runtime.load("demo", interface="torch")
