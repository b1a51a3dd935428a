"""Every field that transformers reads from config.json or generation_config.json: its tokens, or a refusal by name.

The fields are not listed here but found: declared by transformers' own classes, taken from their keyword arguments,
or seen to be read while transformers loads a model and generates. Each gets values that matter; a field that has none
in the tables below, as one new in a later transformers, fails until someone decides about it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers
from packaging.version import Version

from runtime.api import load
from runtime.errors import CheckpointError, GemmaRuntimeError
from runtime.generation import generate

pytestmark = pytest.mark.usefixtures("one_thread")

NEW_TOKENS = 10
PROMPT = (5, 9, 7, 11, 6, 13, 8, 10, 9, 12, 5)  # longer than the window
ONE_TOKEN = (7,)
TRANSFORMERS = Version(transformers.__version__)
EVERY = 1 if TRANSFORMERS >= Version("5.23") else 2  # older versions are tried with every second value of a field

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
}
SLIDING = {"query_pre_attn_scalar": 12, "sliding_window": 4}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = SIZES | SLIDING | {"model_type": "gemma3_text", "sliding_window_pattern": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma": SIZES | {"model_type": "gemma"},
    "gemma2": SIZES | SLIDING | {"model_type": "gemma2"},
    "gemma3_text": TEXT,
    "gemma3": {"model_type": "gemma3", "text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """Stands in a value for a token of the unperturbed answer."""

    index: int


FIRST = Answer(0)

# Values that matter, by field of the generation config; then the fields that can change nothing in a greedy run.
GENERATION: dict[str, list[Any]] = {
    "assistant_early_exit": [1],
    "bad_words_ids": [[[FIRST]]],
    "begin_suppress_tokens": [[FIRST]],
    "cache_implementation": ["quantized", "paged", "static", "hybrid", "sliding_window", "dynamic", "offloaded"],
    "constraints": [[[5]]],
    "dola_layers": ["low", [0, 1]],
    "encoder_no_repeat_ngram_size": [1],
    "encoder_repetition_penalty": [9.0, 0.1],
    "eos_token_id": [FIRST, [3, FIRST], [[FIRST]], [], None, -1, 10**6, 2**70, 1.5, "1"],
    "exponential_decay_length_penalty": [[1, 9.0]],
    "force_words_ids": [[[5]]],
    "forced_bos_token_id": [9],
    "forced_eos_token_id": [9],
    "guidance_scale": [3.0],
    "is_assistant": [True],
    "max_time": [1e-9],
    "min_length": [40],
    "min_new_tokens": [9],
    "no_repeat_ngram_size": [1, 2],
    "num_beams": [3],
    "num_return_sequences": [2],
    "penalty_alpha": [0.6],
    "prompt_lookup_num_tokens": [2],
    "repetition_penalty": [9.0, 0.1],
    "sequence_bias": [[[[FIRST], -99.0]]],
    "speculation_type": ["dflash"],
    "stop_strings": [["a"]],
    "suppress_tokens": [[FIRST]],
    "token_healing": [True],
    "use_mtp": [True],
    "watermarking_config": [{"bias": 99.0}],
}
# These act on a prompt of one token alone, and where an answer's length ends it.
FORCED = {"forced_bos_token_id", "forced_eos_token_id"}
INERT_IN_GENERATION: dict[str, list[Any]] = {
    "_from_model_config": [True],
    "assistant_confidence_threshold": [0.9],
    "assistant_ensemble_weight": [0.5],
    "assistant_lookbehind": [1],
    "bos_token_id": [5, None],
    "cache_config": [{"nbits": 2}],
    "compile_config": [{}],
    "continuous_batching_config": [{}],
    "decoder_start_token_id": [5],
    "disable_compile": [True],
    "diversity_penalty": [1.0],
    "do_sample": [True],
    "early_stopping": [True],
    "epsilon_cutoff": [0.5],
    "eta_cutoff": [0.5],
    "length_penalty": [-3.0],
    "low_memory": [True],
    "max_cache_len": [64],
    "max_length": [13],  # the caller's own max_new_tokens stands before both
    "max_matching_ngram_size": [1],
    "max_new_tokens": [3],
    "min_p": [0.9],
    "num_assistant_tokens": [1],
    "num_assistant_tokens_schedule": ["heuristic"],
    "num_beam_groups": [2],
    "output_attentions": [True],
    "output_hidden_states": [True],
    "output_logits": [True],
    "output_scores": [True],
    "pad_token_id": [5, None],
    "prefill_chunk_size": [4],
    "remove_invalid_values": [True],
    "renormalize_logits": [True],  # it can change a near tie by its rounding, and is refused
    "return_dict_in_generate": [True],
    "target_lookbehind": [1],
    "temperature": [0.01, 9.0],
    "top_h": [0.1],
    "top_k": [1, 50],
    "top_p": [0.1],
    "transformers_version": ["4.0.0"],
    "typical_p": [0.1],
    "use_cache": [False],
}


LAYER_KINDS = ("full_attention", "sliding_attention")
ROPE: list[dict[str, Any]] = [
    {"rope_theta": 50.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 50.0},
    {"type": "linear", "factor": 0.25},
    {"rope_type": "default", "type": "linear", "factor": 4.0},
    {"rope_type": "linear"},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
]
ROPES = [None, {}, [], *ROPE, *(dict.fromkeys(LAYER_KINDS, rope) for rope in ROPE), {"full_attention": ROPE[2]}]
ALL_SLIDING, ALL_FULL = ["sliding_attention"] * 3, ["full_attention"] * 3
# The same by field of a model's config, outer or nested.
CONFIG: dict[str, list[Any]] = {
    "_attn_implementation": ["eager", "sdpa", "paged|sdpa"],
    "attention_bias": [True],
    "attention_chunk_size": [3],
    "attn_implementation": ["eager", "sdpa", "paged|sdpa", {"": "eager"}],
    "attn_logit_softcapping": [0.05, None, 0.0],
    "attribute_map": [{"rms_norm_eps": "initializer_range"}],
    "decoder": [{"eos_token_id": FIRST}],
    "final_logit_softcapping": [0.002, None, 0.0],
    "fusion_config": [{"patch_embeddings": True}],
    "generator": [{"eos_token_id": FIRST}],
    "head_dim": [4, 16, 7, None],
    "hidden_act": ["gelu", "relu"],
    "hidden_activation": ["gelu", "relu", None],
    "hidden_size": [16, None],
    "intermediate_size": [24],
    "is_causal": [False, None],
    "is_encoder_decoder": [True],
    "kv_sharing_modes": [["store", "store", "reuse"]],
    "layer_types": [ALL_SLIDING, ALL_FULL, ["sliding_attention"], ["chunked_attention"] * 3, None],
    "model_type": ["gemma", "gemma2", "gemma3_text", "llama", None],
    "num_attention_heads": [2, 8],
    "num_hidden_layers": [2, 4],
    "num_key_value_heads": [1, 4, None],
    "num_kv_shared_layers": [2],
    "partial_rotary_factor": [0.5],
    "per_layer_config": [{"0": {"sliding_window": 2}}],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_8bit": True}],
    "query_pre_attn_scalar": [0, 3, 10**6],
    "rms_norm_eps": [0.5, 0.0],
    "rope_local_base_freq": [30.0, None],
    "rope_parameters": ROPES,
    "rope_scaling": ROPES,
    "rope_theta": [30.0, None, 0],
    "sliding_window": [1, 2, 9, 0, -3, None],
    "sliding_window_pattern": [1, 3, 0, -2, None],
    "text_config": [{"eos_token_id": FIRST}, {}, None],
    "text_encoder": [{"eos_token_id": FIRST}],
    "tie_word_embeddings": [False],
    "transformers_weights": ["other.safetensors"],
    "use_bidirectional_attention": [True],
    "vocab_size": [60],
    "dtype": ["bfloat16", "float16", "float64", {"": "bfloat16"}, "float", None],
    "torch_dtype": ["bfloat16", "float16", "torch.bfloat16"],
}
INERT_IN_CONFIG: dict[str, list[Any]] = {
    "_auto_class": ["AutoConfig"],
    "_experts_implementation": ["eager"],
    "_output_attentions": [True],
    "_rope_type_labels": [["main"]],
    "_sliding_window_pattern": [3],
    "allow_global_per_layer_attribute_access": [True],
    "architectures": [["GemmaForSequenceClassification"], None],
    "attention_dropout": [0.9],
    "auto_map": [{"AutoConfig": "other.Config", "AutoModelForCausalLM": "other.Model"}],
    "base_model_ep_plan": [{"layers.*": "x"}],
    "base_model_fsdp_plan": [{"layers.*": "x"}],
    "base_model_pp_plan": [{"norm": [["x"], ["x"]]}],
    "base_model_tp_plan": [{"layers.*": "x"}],
    "boi_token_index": [7],
    "chunk_size_feed_forward": [2],
    "default_rope_type": ["axial"],
    "default_theta": [30.0],
    "eoi_token_index": [9],
    "experts_implementation": ["eager"],
    "gradient_checkpointing": [True],
    "id2label": [{"0": "x"}],
    "ignore_keys_at_rope_validation": [["factor"]],
    "image_token_id": [60],
    "image_token_index": [60],
    "initializer_range": [9.0],
    "is_heterogeneous": [True],
    "label2id": [{"x": 0}],
    "max_position_embeddings": [22, 10**6],
    "mlp_layer_types": [["dense", "sparse", "dense"]],
    "mm_tokens_per_image": [1],
    "mtp_layer_types": [["full_attention"]],
    "name_or_path": ["org/other"],
    "num_heads": [1],
    "num_labels": [5],
    "original_max_position_embeddings": [4],
    "per_layer_attributes": [["head_dim"]],
    "problem_type": ["regression"],
    "return_dict": [False],
    "serialize_explicit_per_layer_config": [True],
    "some_field_of_a_trainer": [{"r": 16}],  # no field of transformers: ignored
    "sub_configs": [{}],
    "sub_configs_defaults": [{}],
    "use_return_dict": [False],
    "vision_aspect_ratio": ["x"],
    "vision_config": [VISION | {"initializer_range": 3.0}],
    "vision_feature_layer": [1],
    "vision_feature_select_strategy": ["x"],
}
# Names that loaders take as arguments, never from a file, and what only some versions have: tried all at once.
LOADERS = {
    *("_commit_hash", "_configuration_file", "_from_auto", "_from_pipeline", "base_config_key", "cache_dir"),
    *("commit_message", "extra_config_files", "extra_files", "force_download", "gguf_file"),
    *("has_no_defaults_at_init", "keys_to_ignore_at_inference", "local_files_only", "proxies", "repo_id"),
    *("return_unused_kwargs", "revision", "subfolder", "token", "trust_remote_code"),
}


def declared(kind: type) -> set[str]:
    """The fields of a config class, by its own account: of the dataclass, of the class and among its arguments."""
    found = {field.name for field in dataclasses.fields(kind)}
    for base in kind.__mro__:
        if not base.__module__.startswith("transformers"):
            continue
        found |= {name for name in vars(base) if not name.startswith("__") and not callable(getattr(base, name))}
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="kwargs" | "config_dict"), attr="pop" | "get"),
                    args=[ast.Constant(value=str(name)), *_],
                ):
                    found.add(name)
    return found


@dataclasses.dataclass(frozen=True)
class Base:
    """A small random checkpoint without its configs, and what transformers answers with the unperturbed ones."""

    weights: Path
    config: dict[str, Any]
    generation: dict[str, Any]
    answers: dict[tuple[int, ...], list[int]]  # by prompt

    def folder(self, at: Path, config: dict[str, Any], generation: dict[str, Any] | None) -> Path:
        at.mkdir()
        os.link(self.weights, at / "model.safetensors")
        (at / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (at / "generation_config.json").write_text(json.dumps(generation))
        return at

    def fill(self, value: Any) -> Any:
        """A value with the tokens of the unperturbed answer in the places kept for them."""
        if isinstance(value, Answer):
            return self.answers[PROMPT][value.index]
        if isinstance(value, list):
            return [self.fill(item) for item in value]
        return {key: self.fill(item) for key, item in value.items()} if isinstance(value, dict) else value


def theirs(folder: Path, attention: dict[str, Any], prompt: tuple[int, ...] = PROMPT) -> list[int]:
    """Hugging Face's greedy tokens, as the checkpoint's own generation config has them."""
    model, ids = transformers.AutoModelForCausalLM.from_pretrained(folder, **attention), torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS)
    return getattr(out, "sequences", out)[0, len(prompt) :].tolist()


def ours(folder: Path, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    model = load(folder, device="cpu", eager=True, progress=False)
    return list(generate(model, prompt, max_new_tokens=NEW_TOKENS).token_ids)


@pytest.fixture(autouse=True)
def without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """A function that makes a family's checkpoint once. Its answer meets its stop token half way."""
    made: dict[str, Base] = {}

    def make(family: str) -> Base:
        if family not in made:
            folder, config = tmp_path_factory.mktemp(family), CONFIGS[family]
            torch.manual_seed(3)
            model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    spread = 0.3 if "norm" in name else 0.02 if "embed" in name else 2.0 * weight.shape[-1] ** -0.5
                    weight.normal_(1.0 if "norm" in name else 0.0, spread)
            model.save_pretrained(folder)
            whole = Base(folder / "model.safetensors", config, {"pad_token_id": 0}, {})
            free = theirs(whole.folder(folder / "free", config, whole.generation), attention(family))
            stop = next(token for at, token in enumerate(free) if at >= 5 and token not in free[:at])
            generation = whole.generation | {"eos_token_id": [1, stop]}
            stopped = whole.folder(folder / "base", config, generation)
            answers = {prompt: theirs(stopped, attention(family), prompt) for prompt in (PROMPT, ONE_TOKEN)}
            made[family] = dataclasses.replace(whole, generation=generation, answers=answers)
        return made[family]

    return make


def attention(family: str) -> dict[str, Any]:
    """Gemma 2's softcap is dropped without a word by SDPA, which is the default before 5.21."""
    return {"attn_implementation": "eager"} if family == "gemma2" and TRANSFORMERS < Version("5.21") else {}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a field is put: the model, the file, and whether that is in its `text_config`."""

    family: str
    file: str
    nested: bool = False

    def __str__(self) -> str:
        return f"{self.family}-{self.file}{'-text_config' if self.nested else ''}"

    def configs(self, base: Base, alone: bool, **changes: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """config.json and generation_config.json with fields changed; `alone` is without the latter."""
        config, generation = json.loads(json.dumps(base.config)), dict(base.generation)
        part = config["text_config"] if self.nested else config
        if alone:
            part |= generation
        (generation if self.file == "generation_config.json" else part).update(changes)
        return config, None if alone else generation


MODELS = [
    Place("gemma", "config.json"),
    Place("gemma2", "config.json"),
    Place("gemma3_text", "config.json"),
    Place("gemma3", "config.json"),
    Place("gemma3", "config.json", nested=True),
]
FILES = [Place(family, "generation_config.json") for family in CONFIGS]
# The tensors decide of these, and are named. Of another text_config transformers would make a model of gigabytes first.
BY_TENSOR = {
    *("head_dim", "hidden_size", "intermediate_size", "model_type", "num_attention_heads", "num_hidden_layers"),
    *("num_key_value_heads", "text_config", "vocab_size"),
}


def is_another_oracle(family: str, name: str, value: Any) -> bool:
    """Whether this transformers differs from the newest, which the runtime follows: before 5.18 an early Gemma 1's
    "gelu" was the exact one. (Gemma 2's softcap: see `attention`.)"""
    return (family, name, value) == ("gemma", "hidden_act", "gelu") and TRANSFORMERS < Version("5.18")


def compare(
    base: Base, place: Place, fields: dict[str, list[Any]], at: Path, alone: bool = False, both: bool = False
) -> set[str]:
    """Try every value of every field.

    Args:
        fields: the values, by name.
        at: an empty folder.
        alone: whether the checkpoint is without a generation_config.json.
        both: whether Hugging Face runs what is refused too.

    Returns:
        The fields that change what Hugging Face answers, or make it fail.
    """
    changed, wrong = set(), []
    cases = [(name, base.fill(value)) for name, values in fields.items() for value in values]
    for number, (name, value) in enumerate(cases):
        if is_another_oracle(place.family, name, value):
            continue
        folder = base.folder(at / str(number), *place.configs(base, alone, **{name: value}))
        given, prompt = f"{name} = {value!r} in {place}", ONE_TOKEN if name in FORCED else PROMPT
        found: list[int] | GemmaRuntimeError
        try:
            found = ours(folder, prompt)
        except GemmaRuntimeError as error:
            found = error
        is_named = isinstance(found, CheckpointError) and (
            name in str(found) or (name in BY_TENSOR and re.search("tensor |the checkpoint has ", str(found)))
        )
        if is_named and not both:
            continue
        try:
            expected = theirs(folder, attention(place.family), prompt)
        except Exception:
            changed.add(name)
            continue
        if expected != base.answers[prompt]:
            changed.add(name)
        if not is_named and found != expected:
            wrong.append(f"{given}: expected {expected}, got {found}")
    assert not wrong, "\n".join(wrong)
    return changed


def first(fields: dict[str, list[Any]], count: int | None) -> dict[str, list[Any]]:
    return {name: values[:count:EVERY] for name, values in fields.items()}


@pytest.mark.parametrize("place", FILES, ids=str)
def test_generation_config(place: Place, base: Callable[[str], Base], tmp_path: Path) -> None:
    whole = place.family == "gemma"
    compare(base(place.family), place, first(INERT_IN_GENERATION | GENERATION, None if whole else 1), tmp_path)


def test_values_of_generation_matter(base: Callable[[str], Base], tmp_path: Path) -> None:
    """Hugging Face shows that the table is right about which fields change an answer."""
    by_intention_lossless = {"assistant_early_exit", "prompt_lookup_num_tokens", "speculation_type"}
    changed = compare(base("gemma"), FILES[0], GENERATION, tmp_path, both=True)
    assert set(GENERATION) - by_intention_lossless <= changed


# With the oldest versions the third family's fields are those of the nested config.
@pytest.mark.sweep
@pytest.mark.parametrize(
    "place",
    [pytest.param(place, marks=pytest.mark.newest_only if place.family == "gemma3_text" else ()) for place in MODELS],
    ids=str,
)
def test_config(place: Place, base: Callable[[str], Base], tmp_path: Path) -> None:
    is_outer, whole = place.family == "gemma3" and not place.nested, base(place.family)
    changed = compare(whole, place, first(CONFIG | INERT_IN_CONFIG, 2 if is_outer else None), tmp_path)
    expected = {"rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling"}
    expected |= {"sliding_window", "layer_types", "query_pre_attn_scalar"} if place.family != "gemma" else set()
    assert is_outer or expected <= changed
    folder = whole.folder(tmp_path / "loaders", *place.configs(whole, False, **dict.fromkeys(LOADERS, "x")))
    assert ours(folder) == theirs(folder, attention(place.family)) == whole.answers[PROMPT]


@pytest.mark.parametrize("place", [MODELS[0], *MODELS[3:]], ids=str)
def test_generation_without_its_own_file(place: Place, base: Callable[[str], Base], tmp_path: Path) -> None:
    """transformers then takes these fields from config.json, of a multimodal one outer before nested."""
    fields = first(GENERATION | INERT_IN_GENERATION, 1) | {"eos_token_id": GENERATION["eos_token_id"]}
    assert "eos_token_id" in compare(base(place.family), place, fields, tmp_path, alone=True)


def test_without_stop_tokens(base: Callable[[str], Base], tmp_path: Path) -> None:
    """A checkpoint that names none has none; an outer null gives way to the nested config's."""
    whole = base("gemma3")
    for number, (outer, nested) in enumerate(
        [({}, {}), ({"eos_token_id": None}, whole.generation), (whole.generation, {})]
    ):
        config = whole.config | outer | {"text_config": TEXT | nested}
        folder = whole.folder(tmp_path / str(number), config, None)
        assert ours(folder) == theirs(folder, {})


@pytest.mark.parametrize("family", CONFIGS)
def test_every_field_is_decided(family: str, base: Callable[[str], Base], monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that transformers declares, takes or reads is in the tables above."""
    known = LOADERS | set(CONFIG) | set(INERT_IN_CONFIG) | set(GENERATION) | set(INERT_IN_GENERATION)
    kind = type(transformers.AutoConfig.for_model(family))
    read, fetch = set(), transformers.PreTrainedConfig.__getattribute__

    def spy(self: Any, name: str) -> Any:
        if "gemma" in type(self).__module__:  # not of the vision tower, which text does not pass through
            read.add(name)
        return fetch(self, name)

    whole = base(family)
    folder = whole.folder(whole.weights.parent / "read", whole.config, whole.generation)
    monkeypatch.setattr(transformers.PreTrainedConfig, "__getattribute__", spy)
    theirs(folder, attention(family))
    # Methods, and what the loader keeps for itself whatever a file says.
    read = {name for name in read if not name.startswith("__") and not callable(getattr(kind, name, None))}
    own = {"_attn_implementation_internal", "_experts_implementation_internal", "_heterogeneity_spec", "_name_or_path"}
    assert declared(kind) | read - own - {"_post_init_done"} <= known | {"_post_init_done"}


def test_every_field_of_generation_is_decided() -> None:
    kind = transformers.GenerationConfig
    found = set(vars(kind())) | set(kind._get_default_generation_params())
    assert found - {"_commit_hash"} == set(GENERATION) | set(INERT_IN_GENERATION)
