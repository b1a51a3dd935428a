"""Heads that are not the embedding table, and the names and buffers that a decoder's tensors come with: what
transformers makes of them, this runtime makes too."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import runtime
from runtime.cost.launches import step_launches
from runtime.cost.plan import TARGETS, make_plan
from runtime.errors import CheckpointError
from runtime.parity.oracle import Oracle

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ["gemma", "gemma2", "gemma3"]
TOKENS = 24
PROMPT = [2, 5, 7, 11, 300]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def saved(small_pair, tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a small model of a family, saved by transformers with a head of its own."""
    made: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(f"untied-{family}")
            small_pair(family, tie_word_embeddings=False).hf.save_pretrained(made[family])
        return made[family]

    return save


@pytest.fixture
def variant(saved, tmp_path) -> Callable[..., Path]:
    """A function that writes a changed copy of such a folder."""

    def write(family: str, change: Callable[[Tensors], Tensors], **fields: Any) -> Path:
        source = saved(family)
        config = json.loads((source / "config.json").read_text()) | fields
        (tmp_path / "config.json").write_text(json.dumps(config))
        tensors = {name: value.clone() for name, value in load_file(source / "model.safetensors").items()}
        save_file(change(tensors), tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return write


def load(folder: Path, **options: Any) -> runtime.Model:
    return runtime.load(folder, device="cpu", max_seq_len=64, max_batch=2, **options)


def tokens_of(model: runtime.Model) -> list[int]:
    return list(runtime.generate(model, PROMPT, max_new_tokens=TOKENS, ignore_eos=True).token_ids)


def theirs(folder: Path) -> list[int]:
    attention = "eager" if json.loads((folder / "config.json").read_text())["model_type"] == "gemma2" else "sdpa"
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    prompt = torch.tensor([PROMPT])
    options = {"do_sample": False, "max_new_tokens": TOKENS, "eos_token_id": None}
    return hf.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, len(PROMPT) :].tolist()


HEADS: Mapping[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], bool]] = {
    "untied": (lambda tensors: tensors, {}, False),
    "untied, though the config ties": (lambda tensors: tensors, {"tie_word_embeddings": True}, False),
    "equal, though the config does not tie": (lambda tensors: tensors | {HEAD: tensors[EMBEDDING].clone()}, {}, True),
    "only the head is stored": (
        lambda tensors: (
            {name: value for name, value in tensors.items() if name != EMBEDDING} | {HEAD: tensors[EMBEDDING]}
        ),
        {"tie_word_embeddings": True},
        True,
    ),
    "under the decoder's prefix": (
        lambda tensors: {f"model.{name}": value for name, value in tensors.items()},
        {},
        False,
    ),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stored_head_gives_hugging_faces_tokens(family, head, variant):
    change, fields, tied = HEADS[head]
    folder = variant(family, change, **fields)
    expected = theirs(folder)
    assert len(set(expected)) >= 8, "the reference itself must not repeat itself"
    for eager in (False, True):
        model = load(folder, eager=eager)
        assert (model.config.tied, model.weights.head is model.weights.embedding) == (tied, tied)
        assert tokens_of(model) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_counts_an_untied_head(family, saved):
    model = load(saved(family))
    config, plan, item = model.config, model.plan, 4
    weights = model.weights
    layers = [value for layer in weights.layers for value in vars(layer).values() if value is not None]
    assert plan.weights == sum(value.nbytes for value in (weights.embedding, weights.head, weights.final_norm, *layers))
    assert plan.weights_read == plan.weights - weights.embedding.nbytes
    assert plan.bytes_per_token(0) == plan.weights_read + config.hidden * item
    assert runtime.inspect(model, PROMPT).parameters == plan.weights // item
    stats = runtime.generate(model, [PROMPT, PROMPT], max_new_tokens=2, ignore_eos=True).pop().stats
    assert 2 * stats.bytes_per_token == plan.weights_read + 2 * (plan.bytes_per_token(6) - plan.weights_read)
    # The cost sheet runs the step itself, on tensors without data.
    sheet = make_plan(config, "untied", "float32", TARGETS["h100"], batch=2, context=20)
    assert sheet.bytes_needed == plan.weights_read + 2 * (plan.bytes_per_token(20) - plan.weights_read)
    launches = {
        launch.kernel.fn.__name__: launch.arguments for launch in step_launches(config, "float32", TARGETS["h100"].gpu)
    }
    assert launches["lm_head_kernel"]["table_ptr"] is not launches["advance_kernel"]["table_ptr"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_runs_an_untied_head(family, small_pair, random_ids):
    pair, ids = small_pair(family, tie_word_embeddings=False), random_ids(20)
    truth = Oracle(pair.ours.config, pair.ours.weights).logits(ids, 3)
    assert torch.allclose(truth.float(), pair.hf(torch.tensor([ids])).logits[0, -3:], rtol=1e-3, atol=1e-3)


def test_the_audit_passes_an_untied_head(saved):
    report = runtime.verify(saved("gemma3"), prompts=[PROMPT, PROMPT[::-1]], tokens=8, device="cpu")
    assert report.passed, str(report)


def test_a_head_that_is_not_there_is_refused(variant):
    folder = variant("gemma", lambda tensors: {name: value for name, value in tensors.items() if name != HEAD})
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight \(tie_word_embeddings is false\) is missing"):
        load(folder)  # transformers draws a random one


def renamed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {f"{prefix}{name.removeprefix('model.')}": value for name, value in tensors.items()}


TIED = {"tie_word_embeddings": True}


def without_head(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if name != HEAD}


@pytest.mark.parametrize("prefix", ["", "model.", "model.model."], ids=["none", "model.", "model.model."])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefixes_that_transformers_reads(family, prefix, variant):
    folder = variant(family, lambda tensors: renamed(prefix)(without_head(tensors)), **TIED)
    assert tokens_of(load(folder)) == theirs(folder)


BUFFERS = {
    "model.embed_tokens.embed_scale": torch.tensor(3.0),
    "model.position_ids": torch.arange(9)[None],
    "model.rotary_emb.inv_freq": torch.ones(12),
    "model.rotary_emb_local.inv_freq": torch.ones(12),
    "model.rotary_emb.full_attention_inv_freq": torch.ones(12),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(12, dtype=torch.float64),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_surplus_buffers_that_transformers_ignores(family, variant):
    folder = variant(family, lambda tensors: without_head(tensors) | BUFFERS, **TIED)
    assert tokens_of(load(folder)) == theirs(folder)


def test_a_tensor_under_two_names_is_refused(variant):
    folder = variant("gemma", lambda tensors: tensors | {"embed_tokens.weight": tensors[EMBEDDING].clone()})
    with pytest.raises(CheckpointError, match="are the same tensor"):
        load(folder)
