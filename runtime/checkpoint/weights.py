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
    FINAL_NORM,
    HEAD,
    LayerWeights,
    ModelWeights,
    Shapes,
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
    if len(config.layers) > stored_layers:  # before the names of that many layers are made
        raise CheckpointError(
            f"the config has {len(config.layers)} layers (num_hidden_layers), but the tensors are of {stored_layers}: "
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
    layers = [layer_shapes(config, index) for index in range(len(config.layers))]
    shapes = stored_shapes(config)
    single = [name for name in (EMBEDDING, FINAL_NORM, HEAD) if name in shapes]
    packed = [packed_shape(rows) for layer in layers for rows in layer.values()]
    slab = Slab([*(shapes[name] for name in single), *packed], dtype, device)

    def read(tensors: Shapes, prefix: str = "") -> torch.Tensor:
        whole = slab.take(packed_shape(tensors))
        for name, rows in zip(tensors, whole.split([shape[0] for shape in tensors.values()]), strict=True):
            stored[prefix + name].copy_into(rows, progress)
        return whole

    embedding = read({EMBEDDING: shapes[EMBEDDING]})
    read_layers = tuple(
        LayerWeights(**{field: read(tensors, f"model.layers.{index}.") for field, tensors in layer.items()})
        for index, layer in enumerate(layers)
    )
    final_norm = read({FINAL_NORM: shapes[FINAL_NORM]})
    head = embedding if config.tied else read({HEAD: shapes[HEAD]})
    return ModelWeights(embedding, read_layers, final_norm, head)
