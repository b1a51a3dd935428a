"""Maps the tensor names of a GGUF file to Hugging Face's, and checks that the decoder's tensors are all there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from runtime.checkpoint.gguf.file import GgufFile
from runtime.errors import CheckpointError
from runtime.model.config import ModelConfig
from runtime.model.weights import stored_shapes

_BLOCK_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(\w+)\.weight", re.ASCII)
_VISION = ("v.", "mm.")  # a multimodal model's vision tower, which some files hold besides the text decoder
_BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FILE_NAMES = {stored: name for name, stored in _BLOCK_NAMES.items()}
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def decoder_names(file: GgufFile, config: Mapping[str, Any]) -> dict[str, str]:
    """The file's names of the decoder's tensors, by Hugging Face's; a vision tower's are left out.

    Args:
        file: the GGUF file.
        config: from `hf_config`.

    Raises:
        CheckpointError: a tensor is missing, surplus or misshapen; it is named.
    """
    model_type = config["model_type"]
    decoder = [name for name in file.tensors if not (model_type == "gemma3_text" and name.startswith(_VISION))]
    names = {_hf_name(name, model_type): name for name in decoder}
    layers = len({name.split(".")[2] for name in names if name.startswith("model.layers.")})
    if layers < config["num_hidden_layers"]:  # before listing shapes of missing layers
        raise CheckpointError(
            f"block_count must be {layers}, the layers in {file.path}, got {config['num_hidden_layers']}"
        )
    expected = stored_shapes(ModelConfig.from_hf(config))
    surplus = sorted(names.keys() - expected.keys() - {"lm_head.weight"})
    if surplus:
        raise CheckpointError(f"tensor {names[surplus[0]]!r} is not part of this model: {file.path}")
    for name, shape in expected.items():
        given = file.tensors[names[name]].shape if name in names else None
        if given != shape:
            raise CheckpointError(
                f"tensor {name} must have shape {list(shape)}, got {given and list(given)}: {file.path}"
            )
    return names


def file_name(name: str, family: str) -> str:
    """The name in a GGUF file of a tensor of a causal LM, by Hugging Face's name."""
    for in_file, stored in _NAMES.items():
        if stored == name:
            return in_file
    _, _, layer, stored = name.removesuffix(".weight").split(".", 3)
    is_first_mlp_norm = family == "gemma" and stored == "post_attention_layernorm"
    block = "ffn_norm" if is_first_mlp_norm else _FILE_NAMES[stored]
    return f"blk.{layer}.{block}.weight"


def is_norm(name: str) -> bool:
    """Whether a tensor, by its name in the file, is a norm. GGUF stores its factor, 1 + weight; Hugging Face stores the
    weight."""
    return name.endswith("_norm.weight")


def _hf_name(name: str, model_type: str) -> str:
    """The Hugging Face name of a GGUF tensor."""
    if name in _NAMES:
        return _NAMES[name]
    block = _BLOCK_NAME.fullmatch(name)
    if block is None or block[2] not in _BLOCK_NAMES:
        raise CheckpointError(f"tensor {name!r} is not part of a Gemma model")
    stored = _BLOCK_NAMES[block[2]]
    if model_type == "gemma" and block[2] == "ffn_norm":
        stored = "post_attention_layernorm"
    return f"model.layers.{block[1]}.{stored}.weight"
