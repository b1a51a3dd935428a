"""The weights of a decoder as the kernels want them: packed once at load, row-major, one contiguous tensor each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from runtime.checkpoint.safetensors_folder import Checkpoint, StoredTensor
from runtime.errors import CheckpointError
from runtime.model.config import ModelConfig
from runtime.model.huge_pages import Slab


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerWeights:
    """One layer. Norm weights are stored as in the checkpoint (the multiplier is 1 + weight).

    Gemma 1 has no norm after its branches (`post_attention_norm` and `post_mlp_norm` are None; what Hugging Face
    calls its post_attention_layernorm is `mlp_norm` here); Gemma 3 alone has `q_norm` and `k_norm`.
    """

    attention_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [(heads + 2 * kv_heads) * head_dim, hidden]: all q rows, then k, then v
    q_norm: torch.Tensor | None = None  # [head_dim]
    k_norm: torch.Tensor | None = None  # [head_dim]
    output: torch.Tensor  # [hidden, heads * head_dim]
    post_attention_norm: torch.Tensor | None = None  # [hidden]
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2 * intermediate, hidden]: all gate rows, then up
    down: torch.Tensor  # [hidden, intermediate]
    post_mlp_norm: torch.Tensor | None = None  # [hidden]

    def __repr__(self) -> str:
        named = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return f"LayerWeights({', '.join(f'{name} {list(tensor.shape)}' for name, tensor in named.items())})"


@dataclass(frozen=True, repr=False)
class ModelWeights:
    """A whole decoder. Where the LM head is tied to the embedding table they are the same tensor."""

    embedding: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor  # [hidden]
    head: torch.Tensor  # [vocab, hidden]

    @property
    def parameters(self) -> int:
        """Weights in all, a tied table counted once."""
        tensors = [self.embedding, self.final_norm, *([] if self.head is self.embedding else [self.head])]
        tensors += [weight for layer in self.layers for weight in vars(layer).values() if weight is not None]
        return sum(tensor.numel() for tensor in tensors)

    def __repr__(self) -> str:
        table = self.embedding
        return f"ModelWeights({len(self.layers)} layers, {self.parameters:,} parameters, {table.dtype}, {table.device})"


# Which of a family's stored norms is which field.
_SANDWICH_NORMS = {
    "attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
_NORMS = {
    "gemma": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "gemma2": _SANDWICH_NORMS,
    "gemma3": _SANDWICH_NORMS | {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"},
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What may stand before the decoder's names: nothing (a bare decoder), "model." (a causal LM), "model.model." (which
# Hugging Face reads too), and with "language_model." in any place a multimodal model of some version.
_PREFIX = re.compile(r"(?:model\.|language_model\.)*")
_VISION = ("vision_tower.", "multi_modal_projector.")
# Buffers that some versions of transformers stored, and none reads: they follow from the config.
_BUFFERS = re.compile(r"(?:.*\.)?(?:embed_scale|position_ids|\w*inv_freq|(?:cos|sin)_cached)")

_Parts = dict[str, tuple[int, ...]]  # stored tensors that are stacked by rows, in order: name -> shape


def layer_shapes(config: ModelConfig) -> dict[str, _Parts]:
    """For each field of `LayerWeights` that the family has: the stored tensors (name within the layer -> shape)
    that are stacked by rows to make it."""
    hidden, mlp = config.hidden, config.intermediate
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    fields: dict[str, _Parts] = {
        "qkv": {
            "self_attn.q_proj.weight": (q, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
        },
        "output": {"self_attn.o_proj.weight": (hidden, q)},
        "gate_up": {"mlp.gate_proj.weight": (mlp, hidden), "mlp.up_proj.weight": (mlp, hidden)},
        "down": {"mlp.down_proj.weight": (hidden, mlp)},
    }
    for field, stored in _NORMS[config.family].items():
        size = config.head_dim if field in ("q_norm", "k_norm") else hidden
        fields[field] = {f"{stored}.weight": (size,)}
    return fields


def stored_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name (as in a causal LM) and shape of every tensor that a checkpoint of this architecture must hold."""
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab, config.hidden),
        "model.norm.weight": (config.hidden,),
    }
    if not config.tied:
        shapes[HEAD] = (config.vocab, config.hidden)
    per_layer = [part for parts in layer_shapes(config).values() for part in parts.items()]
    for layer in range(config.layers):
        shapes.update({f"model.layers.{layer}.{name}": shape for name, shape in per_layer})
    return shapes


def find_stored(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, StoredTensor]:
    """Find a decoder's tensors in a checkpoint and check names, shapes and dtypes, reading headers only.

    Returns:
        Every tensor by its name in a causal LM. The head is among them where one is stored; the embedding table is the
        head where it is tied and only the head is stored.

    Raises:
        CheckpointError: a tensor is missing, surplus, misshapen, there twice or of another dtype; it is named. The
            vision part of a multimodal checkpoint and buffers that follow from the config are known and skipped.
    """
    found: dict[str, StoredTensor] = {}
    multimodal = False
    for name, tensor in checkpoint.tensors.items():
        prefix = _PREFIX.match(name)[0]  # type: ignore[index]
        multimodal |= "language_model." in prefix
        rest = name.removeprefix(prefix)
        name = rest if rest == HEAD or rest.startswith(_VISION) else f"model.{rest}"
        if name in found:
            raise CheckpointError(f"{found[name].name} and {tensor.name} are the same tensor: {checkpoint.folder}")
        found[name] = tensor
    if config.tied and HEAD in found and EMBEDDING not in found:
        found[EMBEDDING] = found[HEAD]

    stored_layers = len({name.split(".")[2] for name in found if name.startswith("model.layers.")})
    if config.layers > stored_layers:  # before the names of that many layers are made
        raise CheckpointError(
            f"the config has {config.layers} layers (num_hidden_layers), but the tensors are of {stored_layers}: "
            f"{checkpoint.folder}"
        )
    expected = stored_shapes(config)
    missing = [name for name in expected if name not in found]
    surplus = [
        tensor.name
        for name, tensor in found.items()
        if name not in expected
        and name != HEAD
        and not _BUFFERS.fullmatch(name)
        and not (multimodal and name.startswith(_VISION))
    ]
    for names, what in ((missing, "missing"), (surplus, "not part of this model")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            more += " (tie_word_embeddings is false)" if names[0] == HEAD else ""
            raise CheckpointError(f"tensor {names[0]}{more} is {what}: {checkpoint.folder}")
    if HEAD in found:
        expected[HEAD] = expected[EMBEDDING]
    for name, shape in expected.items():
        found[name].check(shape)
    return {name: found[name] for name in expected}


def is_tied(stored: dict[str, StoredTensor], dtype: torch.dtype) -> bool:
    """Whether the head is the embedding table. What is stored decides, as in Hugging Face: a head of other values is
    run even where the config says that it is tied.

    Args:
        stored: from `find_stored`.
        dtype: of the model; values that it makes equal are equal.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if HEAD not in stored or stored[HEAD] is stored[EMBEDDING]:
        return True
    return stored[HEAD].equals(stored[EMBEDDING], dtype)


def read_weights(
    stored: dict[str, StoredTensor],
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int], None] | None = None,
) -> ModelWeights:
    """Read, convert and pack a checkpoint's weights.

    Args:
        stored: the tensors, from `find_stored`.
        config: the architecture, whose `tied` is what `is_tied` says of them.
        device: where the weights go.
        dtype: what they are converted to.
        progress: called with the number of stored bytes after each slice.

    Returns:
        The packed weights, in one allocation.

    Raises:
        CheckpointError: a value is not finite, or a file cannot be read.
    """
    fields = layer_shapes(config)
    table: _Parts = {EMBEDDING: (config.vocab, config.hidden)}
    norm: _Parts = {"model.norm.weight": (config.hidden,)}
    heads: list[_Parts] = [] if config.tied else [{HEAD: (config.vocab, config.hidden)}]
    tensors = [table, *[parts for _ in range(config.layers) for parts in fields.values()], norm, *heads]
    slab = Slab([_packed_shape(parts) for parts in tensors], dtype, device)

    def read(parts: _Parts, prefix: str = "") -> torch.Tensor:
        packed = slab.take(_packed_shape(parts))
        for name, rows in zip(parts, packed.split([shape[0] for shape in parts.values()]), strict=True):
            stored[prefix + name].copy_into(rows, progress)
        return packed

    layers = []
    embedding = read(table)
    for layer in range(config.layers):
        packed = {field: read(parts, f"model.layers.{layer}.") for field, parts in fields.items()}
        layers.append(LayerWeights(**packed))
    final_norm = read(norm)
    return ModelWeights(embedding, tuple(layers), final_norm, embedding if config.tied else read(heads[0]))


def _packed_shape(parts: _Parts) -> tuple[int, ...]:
    shapes = list(parts.values())
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])
