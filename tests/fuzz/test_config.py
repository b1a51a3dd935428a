"""Damaged and absurd config.json and generation_config.json: the tokens of transformers, or one line that refuses.

Never another exception, and never anything big built from what a config says: the tensors' shapes are known first.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from runtime.api import load
from runtime.errors import GemmaRuntimeError
from runtime.generation import generate
from runtime.model.generation_config import HONOURED, GenerationConfig
from runtime.sampling.params import SamplingParams
from runtime.sampling.processors import Ends, processors_of

PROMPT = [7, 8, 9, 10, 11, 12, 13]
NEW_TOKENS = 4
CONFIG: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "query_pre_attn_scalar": 8,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "hidden_activation": "gelu_pytorch_tanh",
    "final_logit_softcapping": 5.0,
    "torch_dtype": "float32",
    "bos_token_id": 2,
    "pad_token_id": 0,
}
GENERATION: dict[str, Any] = {"eos_token_id": [1, 98], "do_sample": True, "top_k": 64, "repetition_penalty": 1.0}
# What a field is given in place of its value, as JSON text.
ODD = [
    *("null", "true", "false", "0", "-1", "1", "2", "3", "8", "1.0", "0.5", "-0.0", "1e-320", "1e308", "1e999", "NaN"),
    *(
        "Infinity",
        "-Infinity",
        "1000000000",
        "9223372036854775808",
        "1" + "0" * 400,
        "1" * 5000,
        '""',
        '"8"',
        '"a\\u0000b"',
    ),
    *('"\\ud800"', '"float16"', '"full_attention"', "[]", "{}", "[[]]", "[1, 2]", "[true]", '{"rope_type": "linear"}'),
    *(
        '{"__float__": "NaN"}',
        '{"full_attention": {"rope_theta": 9.0}}',
        "[" * 900 + "]" * 900,
        '"' + "x" * 100_000 + '"',
    ),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tensors of the undamaged checkpoint."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def spelled(fields: dict[str, Any], changes: dict[str, str]) -> str:
    """A config with some values replaced by JSON text; the replaced key may be a new one."""
    texts = {name: json.dumps(value) for name, value in fields.items()} | changes
    return "{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in texts.items()) + "}"


def always() -> Iterator[tuple[str, str]]:
    """Pairs of config.json and generation_config.json that every run tries."""
    whole, generation = json.dumps(CONFIG), json.dumps(GENERATION)
    yield whole, generation
    for text in (
        "",
        "null",
        "[]",
        "3",
        '"x"',
        "{",
        "{}",
        "[" * 100_000,
        '{"a":' * 100_000,
        whole[:-1],
        "\ufeff" + whole,
    ):
        yield text, generation
        yield whole, text
    for name in CONFIG:
        for text in ("1000000000", "1" + "0" * 400, "NaN", "null", "true", '"8"', "[]"):
            yield spelled(CONFIG, {name: text}), generation
    for name in ("eos_token_id", "pad_token_id", "bos_token_id", "repetition_penalty", "num_beams", "suppress_tokens"):
        for text in ODD:
            yield whole, spelled(GENERATION, {name: text})


def drawn(seed: int) -> tuple[str, str]:
    """A pair that a seed decides: odd values in up to three fields, and now and then damaged text."""
    rng = random.Random(seed)
    texts = []
    for fields in (CONFIG, GENERATION):
        names = rng.sample(sorted(fields), rng.randint(0, 3))
        text = spelled(fields, {name: rng.choice(ODD) for name in names})
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            at, length = rng.randrange(len(text)), rng.randint(1, 9)
            text = (
                text[:at] + rng.choice(("", '"', "{", "]", ",", "0", "\\", "\x00", text[:length])) + text[at + length :]
            )
        texts.append(text)
    return texts[0], texts[1]


# What the fields about logits are given, beside ODD: ids within and beyond the vocabulary of 99, pairs and numbers.
OF_LOGITS = [
    *("[7]", "[98]", "[99]", "[-1]", "[1000000000]", "[[7]]", "[[99]]", "[[7, 8]]", "[[7], [7]]", "[[[7], 1.0]]"),
    *("[[[7], 2]]", "[[[99], 1.0]]", "[[[7, 8], -1e999]]", "[[[7], 1.0], [[7], 2.0]]", "[1, 1e20]", "[3, -1]"),
    *("[0, 0.5]", "98", "99", "2.5", "1e-45", "1e29"),
]


@pytest.mark.parametrize("name", HONOURED)
def test_fields_about_logits(name: str) -> None:
    """Each is refused or applied: nothing but an error of this package, and nothing big from what a field says."""
    outcomes = set()
    for text in ODD + OF_LOGITS:
        if text == "1" * 5000:  # which Python's json does not read
            continue
        try:
            fields = json.loads(spelled(GENERATION, {name: text}))
            config = GenerationConfig.from_hf(CONFIG, fields, CONFIG["vocab_size"])
            ends = Ends(PROMPT, max_new_tokens=24, stop_ids=config.stop_token_ids)
            processors = processors_of(SamplingParams(), config.processors, ends, (), torch.device("cpu"))
            for answered in (0, 1, 22, 23):
                ids, logits = torch.tensor([PROMPT + [5] * answered]), torch.linspace(-5, 5, 99)[None]
                for processor in processors:
                    logits = processor(ids, logits)
                assert logits.shape == (1, 99)
            outcomes.add("applied" if processors else "neutral")
        except GemmaRuntimeError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000, (text, error)
            outcomes.add("refused")
    assert {"applied", "refused"} <= outcomes


@pytest.mark.sweep
@pytest.mark.newest_only  # parity/test_config_fields.py has every field with the oldest
def test_configs(weights: Path, tmp_path: Path, fuzz_seconds: float) -> None:
    began, ran = time.monotonic(), 0
    for number, (config, generation) in enumerate(itertools.chain(always(), map(drawn, itertools.count()))):
        if time.monotonic() - began > fuzz_seconds:
            break
        folder = tmp_path / str(number)
        folder.mkdir()
        os.link(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(config, encoding="utf-8", errors="surrogatepass")
        (folder / "generation_config.json").write_text(generation, encoding="utf-8", errors="surrogatepass")
        try:
            model = load(folder, device="cpu", eager=True, progress=False)
            answer = list(generate(model, PROMPT, max_new_tokens=NEW_TOKENS).token_ids)
        except GemmaRuntimeError as error:
            message = str(error)
            assert len(message.splitlines()) == 1 and len(message) < 1000, (config, generation, message)
            continue
        ran += 1
        # What was loaded has the shapes of the tensors, so that transformers builds nothing big either.
        expected = theirs(folder)
        assert expected in (None, answer), (config, generation, expected, answer)
    assert ran, f"none of {number} pairs was run: not even the undamaged one"


def theirs(folder: Path) -> list[int] | None:
    """Hugging Face's tokens, None where it fails."""
    ids = torch.tensor([PROMPT])
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS)[
            0, len(PROMPT) :
        ].tolist()
    except Exception:
        return None
