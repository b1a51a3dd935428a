"""What a Gemma decoder is made of, read once from Hugging Face's config and validated.

`ModelConfig` is the architecture (fixed by the checkpoint), `RuntimeConfig` the caller's choices (device, dtype,
sequence and batch limits). Nothing outside `ModelConfig.from_hf` reads a Hugging Face field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import CheckpointError, InvalidArgument, InvalidArgumentType

FAMILIES = ("gemma", "gemma2", "gemma3")
DTYPES = ("float32", "bfloat16", "float16")
ROPE_KINDS = ("default", "linear")
STEPS_PER_GRAPH = (1, 4, 8)
MAX_BATCH = 8  # rows that the kernels serve in one pass over the weights
MAX_THREADS = 256  # that the CPU's kernels can share their work among


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one kind of layer.

    `theta` is the base, `kind` one of "default", "linear"; angles are position * theta^(-2i/head_dim) / factor.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0

    def __post_init__(self) -> None:
        _require(self.kind in ROPE_KINDS, f"rope type {self.kind!r} is not supported, expected one of {ROPE_KINDS}")
        _require_positive(self, "theta", "factor")


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
        outer, config = config, _text_config(config)
        family = config["model_type"].removesuffix("_text")
        defaults = _DEFAULTS[family]

        def field(name: str) -> Any:
            return config.get(name, defaults.get(name))

        def anywhere(name: str, default: Any) -> Any:
            return config.get(name, outer.get(name, default))

        _refuse_unsupported(family, outer, config, field)
        layers = field("num_hidden_layers")
        _require(_is_int(layers) and layers > 0, f"num_hidden_layers must be a positive integer, got {layers!r}")
        kinds = _layer_kinds(family, config, layers)
        window = field("sliding_window")
        _require(window is not None or "sliding_attention" not in kinds, "sliding_window is null but some layers slide")
        ropes = _ropes(family, config)
        head_dim = field("head_dim")
        scalar = head_dim if family == "gemma" else field("query_pre_attn_scalar")
        _require(
            isinstance(scalar, int | float) and scalar > 0, f"query_pre_attn_scalar must be positive, got {scalar!r}"
        )

        defined = generation if generation is not None else {}
        # A generation config is complete: where it names no stop token, Hugging Face has none. Without one, the
        # config decides.
        fallback = outer.get("eos_token_id", config.get("eos_token_id", 1)) if generation is None else None
        stop = defined.get("eos_token_id", fallback)
        stop_ids = () if stop is None else tuple(stop) if isinstance(stop, list) else (stop,)
        pad = defined.get("pad_token_id", anywhere("pad_token_id", 0))
        if pad is None:  # Hugging Face then pads with the first stop token
            pad = stop_ids[0] if stop_ids else 0

        return cls(
            family=family,
            vocab=field("vocab_size"),
            hidden=field("hidden_size"),
            intermediate=field("intermediate_size"),
            layers=layers,
            heads=field("num_attention_heads"),
            kv_heads=field("num_key_value_heads"),
            head_dim=head_dim,
            rms_norm_eps=field("rms_norm_eps"),
            attention_scale=scalar**-0.5,
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
            rope=tuple(ropes[kind] for kind in kinds),
            # Gemma 3's config has the field, its attention in transformers does not apply it.
            attention_softcap=field("attn_logit_softcapping") if family == "gemma2" else None,
            final_softcap=field("final_logit_softcapping"),
            max_position_embeddings=field("max_position_embeddings"),
            bos_token_id=anywhere("bos_token_id", 2),
            pad_token_id=pad,
            stop_token_ids=stop_ids,
            stored_dtype=_stored_dtype(outer, config),
        )


@dataclass(frozen=True)
class RuntimeConfig:
    """The caller's choices, "auto" already resolved: device ("cpu", "cuda", "cuda:1", or "meta" for shapes without
    data), dtype ("float32", "bfloat16", "float16"), the longest sequence and the largest batch that buffers are made
    for, prefill chunk in tokens, decode steps in one CUDA graph, whether to do without graphs, and threads on a CPU."""

    device: str
    dtype: str
    max_seq_len: int = 4096
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
}


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's own part of a config: `text_config` of a multimodal Gemma 3, else the config itself."""
    model_type = config.get("model_type")
    if model_type == "gemma3":
        text = config.get("text_config")
        _require(isinstance(text, Mapping), "a gemma3 config must have a text_config")
        return {**text, "model_type": "gemma3_text"}  # type: ignore[dict-item]
    expected = ("gemma", "gemma2", "gemma3_text", "gemma3")
    _require(model_type in expected, f"not a Gemma checkpoint: model_type {model_type!r}, expected one of {expected}")
    return config


def _refuse_unsupported(family: str, outer: Mapping[str, Any], config: Mapping[str, Any], field: Any) -> None:
    activation = "hidden_act" if family == "gemma" else "hidden_activation"
    given = field(activation)
    # Early Gemma 1 checkpoints say "gelu" and mean the tanh form; transformers reads them so too.
    if not (given == "gelu_pytorch_tanh" or (family == "gemma" and given == "gelu")):
        raise CheckpointError(f"{activation} must be 'gelu_pytorch_tanh', got {given!r}")
    for part in (outer, config):
        for name in ("attention_bias", "use_bidirectional_attention", "quantization_config"):
            _require(not part.get(name), f"{name} is not supported, got {part.get(name)!r}")
        _require(part.get("tie_word_embeddings", True) is True, "tie_word_embeddings must be true: Gemma ties its head")


def _layer_kinds(family: str, config: Mapping[str, Any], layers: int) -> list[str]:
    if family == "gemma":
        return ["full_attention"] * layers
    kinds = config.get("layer_types")
    if kinds is None:
        every = 2 if family == "gemma2" else config.get("sliding_window_pattern", 6)
        _require(_is_int(every) and every > 0, f"sliding_window_pattern must be a positive integer, got {every!r}")
        return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    _require(isinstance(kinds, list) and len(kinds) == layers, f"layer_types must name {layers} layers, got {kinds!r}")
    for kind in kinds:
        _require(kind in ("sliding_attention", "full_attention"), f"unknown layer type {kind!r}")
    return kinds


def _ropes(family: str, config: Mapping[str, Any]) -> dict[str, RopeConfig]:
    """The rotary embedding of each kind of layer. transformers 5 nests everything in `rope_parameters`; older
    layouts spread it over `rope_theta`, `rope_local_base_freq` and `rope_scaling`."""
    parameters, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    kinds = ("full_attention", "sliding_attention")
    if family != "gemma3":
        rope = _rope(scaling or parameters, config.get("rope_theta", 10_000.0))
        return dict.fromkeys(kinds, rope)
    unknown = sorted(set(parameters) - set(kinds))
    _require(not unknown, f"rope_parameters of a gemma3 config must be nested in {kinds}, got {unknown}")
    full = {**(parameters.get("full_attention") or {}), **scaling}
    sliding = parameters.get("sliding_attention") or {}
    return {
        "full_attention": _rope(full, config.get("rope_theta", 1_000_000.0)),
        "sliding_attention": _rope(sliding, config.get("rope_local_base_freq", 10_000.0)),
    }


def _rope(parameters: Mapping[str, Any], theta: float) -> RopeConfig:
    nested = sorted(name for name, value in parameters.items() if isinstance(value, Mapping))
    _require(not nested, f"rope_parameters of this family must not be nested, got {nested}")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    partial = parameters.get("partial_rotary_factor", 1.0)
    _require(partial == 1.0, f"partial_rotary_factor must be 1, got {partial!r}")
    factor = parameters.get("factor") if kind != "default" else 1.0
    return RopeConfig(parameters.get("rope_theta", theta), kind, factor)  # type: ignore[arg-type]


def _stored_dtype(outer: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    for part in (outer, config):
        for name in ("dtype", "torch_dtype"):
            if part.get(name):
                return str(part[name]).removeprefix("torch.")
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
