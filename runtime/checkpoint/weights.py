"""Finds a decoder's tensors in a checkpoint, and packs them as the kernels want them."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from runtime.checkpoint.safetensors_folder import Checkpoint, StoredTensor
from runtime.errors import CheckpointError
from runtime.model.config import ModelConfig
from runtime.model.huge_pages import Slab
from runtime.model.weights import (
    EMBEDDING,
    HEAD,
    LayerWeights,
    ModelWeights,
    StackedShapes,
    layer_shapes,
    packed_shape,
    stored_shapes,
)

# What may stand before the decoder's names: nothing (a bare decoder), "model." (a causal LM), "model.model." (which
# Hugging Face reads too), and with "language_model." in any place a multimodal model of some version.
_PREFIX = re.compile(r"(?:model\.|language_model\.)*")
_VISION = ("vision_tower.", "multi_modal_projector.")
# Buffers that some versions of transformers stored, and none reads: they follow from the config.
_BUFFERS = re.compile(r"(?:.*\.)?(?:embed_scale|position_ids|\w*inv_freq|(?:cos|sin)_cached)")


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
    table: StackedShapes = {EMBEDDING: (config.vocab, config.hidden)}
    norm: StackedShapes = {"model.norm.weight": (config.hidden,)}
    heads: list[StackedShapes] = [] if config.tied else [{HEAD: (config.vocab, config.hidden)}]
    tensors = [table, *[parts for _ in range(config.layers) for parts in fields.values()], norm, *heads]
    slab = Slab([packed_shape(parts) for parts in tensors], dtype, device)

    def read(parts: StackedShapes, prefix: str = "") -> torch.Tensor:
        packed = slab.take(packed_shape(parts))
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
