"""A Gemma decoder's architecture, read from Hugging Face's config, and the caller's choices.

Only `ModelConfig.from_hf` reads Hugging Face's fields, through layer_config.py, rope_config.py and
generation_config.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.errors import InvalidArgument, InvalidArgumentType
from runtime.model.config_fields import DEFAULTS, NEUTRAL, Fields, is_integer, refuse, require_neutral
from runtime.model.generation_config import GenerationConfig
from runtime.model.layer_config import LayerConfig, read_layers

FAMILY_NAMES = {"gemma": "Gemma", "gemma2": "Gemma 2", "gemma3": "Gemma 3"}
FAMILIES = tuple(FAMILY_NAMES)
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZED_TO = ("int8", "int4")  # what the weights of any checkpoint can become
QUANTIZE = ("gguf", *QUANTIZED_TO)
CONTAINERS = ("compressed-tensors", "gptq", "awq")  # checkpoints' own integer formats, kept by default
STEPS_PER_GRAPH = (1, 4, 8)
DEFAULT_SEQ_LEN = 4096
TAIL_CHUNK = 64  # tokens; shorter chunks would take notably longer in total
SHORT_CHUNK = 32  # tokens that compiled kernels take at once
MAX_BATCH = 64  # rows that the kernels handle in one pass over the weights
MAX_THREADS = 256  # of the CPU kernels


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a Gemma 1, 2 or 3 text decoder.

    Sizes are element counts. `attention_scale` multiplies QK^T. A softcap of None means none. `stored_dtype` is the
    dtype that the checkpoint declares, None where it declares none.

    Raises:
        CheckpointError: a field is out of range; it is named.
    """

    family: str  # "gemma", "gemma2" or "gemma3"
    vocab: int
    hidden: int
    intermediate: int
    layers: tuple[LayerConfig, ...]
    rms_norm_eps: float
    attention_scale: float
    attention_softcap: float | None
    final_softcap: float | None
    max_position_embeddings: int
    bos_token_id: int | None
    pad_token_id: int
    stop_token_ids: tuple[int, ...]
    stored_dtype: str | None = None
    # What is done to logits before a token is chosen: fields of transformers' GenerationConfig, by name.
    processors: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tied: bool = True  # the LM head is the embedding table; the stored tensors decide (`checkpoint.weights.is_tied`)

    def __post_init__(self) -> None:
        fields = Fields(vars(self), {})
        for name in ("vocab", "hidden", "intermediate", "max_position_embeddings"):
            fields.integer(name)
        for name in ("rms_norm_eps", "attention_scale"):
            fields.number(name)
        for name in ("attention_softcap", "final_softcap"):
            fields.number_or_none(name)
        fields.integer("pad_token_id", 0, self.vocab - 1)
        if self.family not in FAMILIES:
            refuse("family", f"one of {FAMILIES}", self.family)
        if not self.layers or not all(isinstance(layer, LayerConfig) for layer in self.layers):
            refuse("layers", "at least one LayerConfig", self.layers)
        if not all(is_integer(stop_id, 0) for stop_id in self.stop_token_ids):
            refuse("stop_token_ids", "token ids", self.stop_token_ids)
        if self.stored_dtype is not None and self.stored_dtype not in DTYPES:
            refuse("stored_dtype", f"one of {DTYPES}", self.stored_dtype)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """Read the parsed `config.json` and `generation_config.json` of a Hugging Face checkpoint.

        Understands the layouts before and after transformers 5; absent fields get transformers' defaults. Refuses any
        field that transformers honours and this runtime does not implement.

        Args:
            config: parsed `config.json` (of a multimodal Gemma 3: its `text_config` is used).
            generation: parsed `generation_config.json`, or None where the checkpoint has none.

        Returns:
            The validated architecture.

        Raises:
            CheckpointError: not a Gemma 1, 2 or 3 text decoder, or a feature that is not implemented.

        Source: transformers' configuration_gemma.py, configuration_gemma2.py, configuration_gemma3.py.
        """
        text = _text_config(config)
        family = text["model_type"].removesuffix("_text")
        fields = Fields(text, DEFAULTS[family])
        _refuse_unsupported(family, config, fields)
        layers, vocab = read_layers(family, fields), fields.integer("vocab_size")
        # Gemma 1 scales by its head_dim.
        scale = layers[0].head_dim if family == "gemma" else fields.number("query_pre_attn_scalar")
        ids = GenerationConfig.from_hf(config, generation, vocab)
        return cls(
            family=family,
            vocab=vocab,
            hidden=fields.integer("hidden_size"),
            intermediate=fields.integer("intermediate_size"),
            layers=layers,
            rms_norm_eps=fields.number("rms_norm_eps"),
            attention_scale=scale**-0.5,
            # Gemma 3's config has this field, but transformers' attention does not apply it.
            attention_softcap=fields.number_or_none("attn_logit_softcapping") if family == "gemma2" else None,
            # Multimodal Gemma 3 does not apply this one either; Gemma 1 has neither.
            final_softcap=fields.number_or_none("final_logit_softcapping")
            if family == "gemma2" or config["model_type"] == "gemma3_text"
            else None,
            max_position_embeddings=fields.integer("max_position_embeddings"),
            bos_token_id=ids.bos_token_id,
            pad_token_id=ids.pad_token_id,
            stop_token_ids=ids.stop_token_ids,
            processors=ids.processors,
            stored_dtype=_stored_dtype(config),
            tied=bool(config.get("tie_word_embeddings", True)),  # the outer value in a multimodal config
        )


def default_prefill_chunk(device: str, eager: bool, short: bool = False) -> int:
    """Tokens in a chunk of a prompt. On a CPU 256, which takes 3 % less time than 512 for prompts of 512 tokens and 7 %
    less for 4,096, since fewer keys lie outside a sliding window; if all chunks are to be `short`, as many as compiled
    kernels take at once. In eager mode 512: PyTorch's attention on a CPU takes keys in blocks of that many, so the bits
    are those of the whole prompt in one pass. On a GPU 512 too."""
    if device != "cpu" or eager:
        return 512
    return SHORT_CHUNK if short else 256


@dataclass(frozen=True)
class RuntimeConfig:
    """The caller's choices, "auto" already resolved.

    Args:
        device: "cpu", "cuda", "cuda:N", or "meta" for shapes without data.
        dtype: "float32", "bfloat16" or "float16".
        max_seq_len, max_batch: what the buffers are sized for; max_batch is 1 to MAX_BATCH.
        prefill_chunk: tokens of a prompt that prefill runs at a time; see `prefill_chunks` for what is left over, and
            `default_prefill_chunk`.
        prefix_cache_tokens: of earlier prompts, kept in whole chunks for prompts that begin alike; None means
            max_seq_len, 0 keeps none.
        steps_per_graph: decode steps in one CUDA graph.
        eager: whether to decode by plain steps, nothing captured.
        threads: on a CPU.
        quantize: one of QUANTIZE or CONTAINERS where matrices are integers with scales, those of a GGUF file or of a
            container, or made from any checkpoint's values; on a CPU they are in blocks, with all else in float32. None
            where they are values in the dtype.
    """

    device: str
    dtype: str
    max_seq_len: int = DEFAULT_SEQ_LEN
    max_batch: int = 1
    prefill_chunk: int = 512
    prefix_cache_tokens: int | None = None
    steps_per_graph: int = 1
    eager: bool = False
    threads: int = 1
    quantize: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cpu|meta|cuda(:\d+)?", self.device):
            raise InvalidArgument(f'device must be "cpu", "cuda" or "cuda:N", got {self.device!r}')
        if self.dtype not in DTYPES:
            raise InvalidArgument(f"dtype must be one of {DTYPES}, got {self.dtype!r}")
        if self.quantize not in (None, *QUANTIZE, *CONTAINERS):
            raise InvalidArgument(f"quantize must be None or one of {QUANTIZE}, got {self.quantize!r}")
        if self.quantize and self.device == "cpu" and self.dtype != "float32":
            from runtime.kernels.launch import INTERPRETING  # which takes seconds to import

            if not INTERPRETING:
                raise InvalidArgument(
                    f'dtype must be "auto" or "float32" with quantize={self.quantize!r} on a CPU, got {self.dtype!r}'
                )
        if self.quantize not in (None, *QUANTIZED_TO) and self.device != "cpu":
            raise InvalidArgument(
                f'device must be "cpu" with quantize={self.quantize!r} (a GPU takes one of {QUANTIZED_TO}), got '
                f"{self.device!r}"
            )
        for name in ("max_seq_len", "max_batch", "prefill_chunk", "steps_per_graph", "threads"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise InvalidArgumentType(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise InvalidArgument(f"{name} must be at least 1, got {value}")
        kept = self.prefix_cache_tokens
        if kept is not None and (not isinstance(kept, int) or isinstance(kept, bool)):
            raise InvalidArgumentType(f"prefix_cache_tokens must be an integer or None, got {kept!r}")
        if kept is not None and kept < 0:
            raise InvalidArgument(f"prefix_cache_tokens must be at least 0, got {kept}")
        if self.steps_per_graph not in STEPS_PER_GRAPH:
            raise InvalidArgument(f"steps_per_graph must be one of {STEPS_PER_GRAPH}, got {self.steps_per_graph}")
        if not isinstance(self.eager, bool):
            raise InvalidArgumentType(f"eager must be True or False, got {self.eager!r}")
        if self.max_batch > MAX_BATCH:
            raise InvalidArgument(f"max_batch must be at most {MAX_BATCH}, got {self.max_batch}")
        if self.threads > MAX_THREADS:
            raise InvalidArgument(f"threads must be at most {MAX_THREADS}, got {self.threads}")

    @property
    def tail_chunk(self) -> int:
        """Tokens of a chunk once fewer than prefill_chunk are left."""
        return min(TAIL_CHUNK, self.prefill_chunk) if self.device == "cpu" and not self.eager else self.prefill_chunk

    def prefill_chunks(self, tokens: int) -> Iterator[range]:
        """The positions of a prompt's chunks in order: whole ones, then those of the tail, the last of which has the
        rest. A prompt that is shorter than a whole chunk is one chunk.

        Where each begins and ends depends only on the number of tokens, so that prompts that begin alike begin with the
        same chunks.
        """
        start = 0
        while start < tokens:
            is_tail = start and tokens - start < self.prefill_chunk
            end = min(start + (self.tail_chunk if is_tail else self.prefill_chunk), tokens)
            yield range(start, end)
            start = end


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text decoder's config: `text_config` of a multimodal Gemma 3, else the config itself."""
    model_type = config.get("model_type")
    expected = ("gemma", "gemma2", "gemma3_text", "gemma3")
    if model_type not in expected:
        refuse("not a Gemma checkpoint: model_type", f"one of {expected}", model_type)
    if model_type != "gemma3":
        return config
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        refuse("text_config of a gemma3 config", "an object", text)
    return {**text, "model_type": "gemma3_text"}


def _refuse_unsupported(family: str, config: Mapping[str, Any], fields: Fields) -> None:
    """Refuse features that only transformers has, in the text decoder's config and in the outer one."""
    activation = "hidden_act" if family == "gemma" else "hidden_activation"
    function = fields[activation]
    # Early Gemma 1 checkpoints say "gelu" and mean the tanh form, which transformers uses too.
    if not (function == "gelu_pytorch_tanh" or (family == "gemma" and function == "gelu")):
        refuse(activation, "'gelu_pytorch_tanh'", function)
    for given in (config, fields.given):
        require_neutral(given, NEUTRAL)
    tied = config.get("tie_word_embeddings", True)
    if not (tied is None or isinstance(tied, bool)):
        refuse("tie_word_embeddings", "true or false", tied)
    if fields.given.get("text_config") is not None:
        refuse("text_config", "absent: only a gemma3 config has one", fields.given["text_config"])
    if family == "gemma" and (window := fields["sliding_window"]) is not None:
        refuse("sliding_window", "null where model_type is gemma, which attends to everything", window)


def _stored_dtype(config: Mapping[str, Any]) -> str | None:
    """The checkpoint's declared dtype; a nested config's has no effect."""
    for name in ("dtype", "torch_dtype"):
        if config.get(name) is not None:
            dtype = str(config[name]).removeprefix("torch.")
            return dtype if dtype in DTYPES else refuse(name, f"one of {DTYPES}", config[name])
    return None
