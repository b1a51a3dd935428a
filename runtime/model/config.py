"""What a Gemma decoder is made of, read once from Hugging Face's config and validated.

`ModelConfig` is the architecture (fixed by the checkpoint), `RuntimeConfig` the caller's choices (device, dtype,
sequence and batch limits). Nothing reads a Hugging Face field but `ModelConfig.from_hf`, with rope_config.py and
generation_config.py for its parts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import CheckpointError, InvalidArgument, InvalidArgumentType
from runtime.model.config_fields import MOST_LAYERS, Fields, refuse, shown
from runtime.model.generation_config import GenerationConfig
from runtime.model.rope_config import LAYER_KINDS, RopeConfig, read_ropes

FAMILY_NAMES = {"gemma": "Gemma", "gemma2": "Gemma 2", "gemma3": "Gemma 3"}
FAMILIES = tuple(FAMILY_NAMES)
DTYPES = ("float32", "bfloat16", "float16")
STEPS_PER_GRAPH = (1, 4, 8)
DEFAULT_SEQ_LEN = 4096
MAX_BATCH = 8  # rows that the kernels serve in one pass over the weights
MAX_THREADS = 256  # that the CPU's kernels can share their work among


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a Gemma 1, 2 or 3 text decoder.

    Sizes are element counts. `windows[i]` is the sliding window of layer i in keys (the query itself included), or
    None where the layer attends to everything; `rope[i]` is that layer's rotary embedding. `attention_scale`
    multiplies QK^T. A softcap of None means none. `stored_dtype` is the dtype that the checkpoint declares, None
    where it declares none.
    """

    family: str  # "gemma", "gemma2" or "gemma3"
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_norm_eps: float
    attention_scale: float
    windows: tuple[int | None, ...]
    rope: tuple[RopeConfig, ...]
    attention_softcap: float | None
    final_softcap: float | None
    max_position_embeddings: int
    bos_token_id: int | None
    pad_token_id: int
    stop_token_ids: tuple[int, ...]
    stored_dtype: str | None = None
    tied: bool = True  # the LM head is the embedding table; what the tensors are decides (`weights.is_tied`)

    def __post_init__(self) -> None:
        _require(self.family in FAMILIES, f"family {self.family!r} is not supported, expected one of {FAMILIES}")
        for name in ("vocab", "hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim"):
            _require_positive_int(self, name)
        _require_positive_int(self, "max_position_embeddings")
        _require_positive(self, "rms_norm_eps", "attention_scale")
        _require(
            self.heads % self.kv_heads == 0,
            f"attention heads must be a multiple of key/value heads, got {self.heads} and {self.kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim must be even for the rotary embedding, got {self.head_dim}")
        for name in ("windows", "rope"):
            given = len(getattr(self, name))
            _require(given == self.layers, f"{name} must have one entry per layer ({self.layers}), got {given}")
        for window in self.windows:
            _require(
                window is None or (_is_int(window) and window > 0), f"a window must be positive or None, got {window!r}"
            )
        for name in ("attention_softcap", "final_softcap"):
            if getattr(self, name) is not None:
                _require_positive(self, name)
        _require(
            _is_int(self.pad_token_id) and 0 <= self.pad_token_id < self.vocab,
            f"pad_token_id must be in [0, {self.vocab}), got {self.pad_token_id!r}",
        )
        for stop_id in self.stop_token_ids:
            _require(_is_int(stop_id) and stop_id >= 0, f"a stop token id must be an id, got {stop_id!r}")
        _require(
            self.stored_dtype is None or self.stored_dtype in DTYPES,
            f"weights in {self.stored_dtype} are not supported, expected one of {DTYPES}",
        )

    @property
    def qkv_splits(self) -> tuple[int, int, int]:
        """How many outputs of the packed QKV projection are queries, keys and values."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """Read the parsed `config.json` and `generation_config.json` of a Hugging Face checkpoint.

        Both layouts of fields are understood (before and after transformers 5); absent fields get transformers'
        defaults. A field that Hugging Face would act on and this runtime does not implement is refused.

        Args:
            config: parsed `config.json` (of a multimodal Gemma 3: its `text_config` is used).
            generation: parsed `generation_config.json`, or None where the checkpoint has none.

        Returns:
            The validated architecture.

        Raises:
            CheckpointError: not a Gemma 1, 2 or 3 text decoder, or one with a feature that is not implemented.

        Source: transformers' configuration_gemma.py, configuration_gemma2.py, configuration_gemma3.py.
        """
        text = _text_config(config)
        family = text["model_type"].removesuffix("_text")
        fields = Fields(text, _DEFAULTS[family])
        _refuse_unsupported(family, config, fields)
        kinds = _layer_kinds(family, fields)
        window = fields.whole("sliding_window", least=2) if "sliding_attention" in kinds else None
        ropes = read_ropes(family, fields)
        head_dim, vocab = fields.whole("head_dim"), fields.whole("vocab_size")
        ids = GenerationConfig.from_hf(config, generation, vocab)
        return cls(
            family=family,
            vocab=vocab,
            hidden=fields.whole("hidden_size"),
            intermediate=fields.whole("intermediate_size"),
            layers=len(kinds),
            heads=fields.whole("num_attention_heads"),
            kv_heads=fields.whole("num_key_value_heads"),
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps"),
            attention_scale=(head_dim if family == "gemma" else fields.number("query_pre_attn_scalar")) ** -0.5,
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
            rope=tuple(ropes[kind] for kind in kinds),
            # Gemma 3's config has the field, its attention in transformers does not apply it.
            attention_softcap=fields.number_or_none("attn_logit_softcapping") if family == "gemma2" else None,
            # Nor does a multimodal Gemma 3 apply this one; Gemma 1 has neither.
            final_softcap=fields.number_or_none("final_logit_softcapping")
            if family == "gemma2" or config["model_type"] == "gemma3_text"
            else None,
            max_position_embeddings=fields.whole("max_position_embeddings"),
            bos_token_id=ids.bos_token_id,
            pad_token_id=ids.pad_token_id,
            stop_token_ids=ids.stop_token_ids,
            stored_dtype=_stored_dtype(config),
            tied=bool(config.get("tie_word_embeddings", True)),  # a multimodal config's own, as transformers reads it
        )


@dataclass(frozen=True)
class RuntimeConfig:
    """The caller's choices, "auto" already resolved: device ("cpu", "cuda", "cuda:1", or "meta" for shapes without
    data), dtype ("float32", "bfloat16", "float16"), the longest sequence and the largest batch that buffers are made
    for, prefill chunk in tokens, decode steps in one CUDA graph, whether to do without graphs, and threads on a CPU."""

    device: str
    dtype: str
    max_seq_len: int = DEFAULT_SEQ_LEN
    max_batch: int = 1
    prefill_chunk: int = 2048
    steps_per_graph: int = 1
    eager: bool = False
    threads: int = 1

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cpu|meta|cuda(:\d+)?", self.device):
            raise InvalidArgument(f'device must be "cpu", "cuda" or "cuda:N", got {self.device!r}')
        if self.dtype not in DTYPES:
            raise InvalidArgument(f"dtype must be one of {DTYPES}, got {self.dtype!r}")
        for name in ("max_seq_len", "max_batch", "prefill_chunk", "steps_per_graph", "threads"):
            value = getattr(self, name)
            if not _is_int(value):
                raise InvalidArgumentType(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise InvalidArgument(f"{name} must be at least 1, got {value}")
        if self.steps_per_graph not in STEPS_PER_GRAPH:
            raise InvalidArgument(f"steps_per_graph must be one of {STEPS_PER_GRAPH}, got {self.steps_per_graph}")
        if not isinstance(self.eager, bool):
            raise InvalidArgumentType(f"eager must be True or False, got {self.eager!r}")
        if self.max_batch > MAX_BATCH:
            raise InvalidArgument(f"max_batch must be at most {MAX_BATCH}, got {self.max_batch}")
        if self.threads > MAX_THREADS:
            raise InvalidArgument(f"threads must be at most {MAX_THREADS}, got {self.threads}")


# transformers' defaults where a config leaves a field out; None where the family has no such field.
_COMMON: dict[str, Any] = {
    "vocab_size": 256000,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": _COMMON
    | {
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "gemma2": _COMMON
    | {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
}
_DEFAULTS["gemma3"] = _DEFAULTS["gemma2"] | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
}


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's own part of a config: `text_config` of a multimodal Gemma 3, else the config itself."""
    model_type = config.get("model_type")
    expected = ("gemma", "gemma2", "gemma3_text", "gemma3")
    _require(
        model_type in expected, f"not a Gemma checkpoint: model_type {shown(model_type)}, expected one of {expected}"
    )
    if model_type != "gemma3":
        return config
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        refuse("text_config of a gemma3 config", "an object", text)
    return {**text, "model_type": "gemma3_text"}


def _refuse_unsupported(family: str, config: Mapping[str, Any], fields: Fields) -> None:
    """Refuse what transformers would do and this runtime does not, in the decoder's config and around it."""
    activation = "hidden_act" if family == "gemma" else "hidden_activation"
    given = fields[activation]
    # Early Gemma 1 checkpoints say "gelu" and mean the tanh form; transformers reads them so too.
    if not (given == "gelu_pytorch_tanh" or (family == "gemma" and given == "gelu")):
        refuse(activation, "'gelu_pytorch_tanh'", given)
    for part in (config, fields.given):
        Fields(part, {}).require_supported()
    tied = config.get("tie_word_embeddings", True)
    if not (tied is None or isinstance(tied, bool)):
        refuse("tie_word_embeddings", "true or false", tied)
    if fields.given.get("text_config") is not None:
        refuse("text_config", "absent: only a gemma3 config has one", fields.given["text_config"])
    if family == "gemma" and (window := fields["sliding_window"]) is not None:
        refuse("sliding_window", "null where model_type is gemma, which attends to everything", window)


def _layer_kinds(family: str, fields: Fields) -> list[str]:
    layers, kinds = fields.whole("num_hidden_layers", most=MOST_LAYERS), fields["layer_types"]
    if kinds is None:
        if family == "gemma":
            return ["full_attention"] * layers
        every = 2 if family == "gemma2" else fields.whole("sliding_window_pattern")
        return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    allowed = LAYER_KINDS[:1] if family == "gemma" else LAYER_KINDS
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in allowed for kind in kinds):
        refuse("layer_types", f"a list of {layers}, each {' or '.join(allowed)}", kinds)
    return kinds


def _stored_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that the whole checkpoint declares; what a nested config says of its own has no effect."""
    for name in ("dtype", "torch_dtype"):
        if config.get(name) is not None:
            dtype = str(config[name]).removeprefix("torch.")
            return dtype if dtype in DTYPES else refuse(name, f"one of {DTYPES}", config[name])
    return None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise CheckpointError(message)


def _require_positive_int(owner: Any, name: str) -> None:
    value = getattr(owner, name)
    _require(_is_int(value) and value > 0, f"{name} must be a positive integer, got {value!r}")


def _require_positive(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _require(number and 0 < value < float("inf"), f"{name} must be a positive number, got {value!r}")
