"""The config.json that a GGUF file's metadata amounts to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.errors import CheckpointError
from runtime.gguf_file import GgufFile


def hf_config(file: GgufFile) -> dict[str, Any]:
    """The `config.json` that a GGUF file's metadata amounts to; what it leaves out gets transformers' defaults.

    Raises:
        CheckpointError: the architecture is not gemma, gemma2 or gemma3, or a size is missing.
    """
    metadata = file.metadata
    family = metadata.get("general.architecture")
    if family not in ("gemma", "gemma2", "gemma3"):
        raise CheckpointError(f"GGUF architecture must be gemma, gemma2 or gemma3, got {family!r}: {file.path}")

    def value(name: str, default: Any = None) -> Any:
        return metadata.get(f"{family}.{name}", default)

    try:
        vocab = file.tensors["token_embd.weight"].shape[0]
        hidden, layers, heads = (
            metadata[f"{family}.{name}"] for name in ("embedding_length", "block_count", "attention.head_count")
        )
        config: dict[str, Any] = {
            "architectures": ["Gemma3ForCausalLM" if family == "gemma3" else f"{family.capitalize()}ForCausalLM"],
            "model_type": "gemma3_text" if family == "gemma3" else family,
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": metadata[f"{family}.feed_forward_length"],
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": value("attention.head_count_kv", heads),
            "head_dim": value("attention.key_length", 256),
            "rms_norm_eps": _shortest(metadata[f"{family}.attention.layer_norm_rms_epsilon"]),
            "max_position_embeddings": metadata[f"{family}.context_length"],
            "rope_theta": value("rope.freq_base", 1_000_000.0 if family == "gemma3" else 10_000.0),
            "torch_dtype": "bfloat16",
            "transformers_version": "5.0.0",  # without one, transformers warns that the tokenizer may be a wrong one
        }
    except KeyError as error:
        raise CheckpointError(f"the GGUF file has no {error.args[0]}: {file.path}") from None
    config["hidden_act" if family == "gemma" else "hidden_activation"] = "gelu_pytorch_tanh"
    if value("rope.scaling.type", "none") != "none" or value("rope.scaling.factor"):
        config["rope_scaling"] = {
            "rope_type": value("rope.scaling.type", "linear"),
            "factor": value("rope.scaling.factor", 1.0),
        }
    if family != "gemma":
        # Not stored: the largest models scale by their own width per head, the others by head_dim.
        largest = layers == (46 if family == "gemma2" else 62)
        config["query_pre_attn_scalar"] = hidden // heads if largest else config["head_dim"]
        optional = {
            "sliding_window": value("attention.sliding_window"),
            "sliding_window_pattern": value("attention.sliding_window_pattern") if family == "gemma3" else None,
            "rope_local_base_freq": value("rope.freq_base_swa") if family == "gemma3" else None,
            "attn_logit_softcapping": value("attn_logit_softcapping"),
            "final_logit_softcapping": value("final_logit_softcapping"),
        }
        config.update({name: given for name, given in optional.items() if given is not None})
    return config | _token_ids(metadata)


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    named = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
    stop = [named["eos"] if named["eos"] is not None else 1]
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    # A chat model also ends its turns; GGUF files do not always say by which token.
    turn = (
        tokens.index("<end_of_turn>") if "tokenizer.chat_template" in metadata and "<end_of_turn>" in tokens else None
    )
    stop += [index for index in (named["eot"], turn) if index is not None and index not in stop]
    return {
        "bos_token_id": 2 if named["bos"] is None else named["bos"],
        "eos_token_id": stop[0] if len(stop) == 1 else list(dict.fromkeys(stop)),
        "pad_token_id": named["padding"] or 0,
    }


def _shortest(number: float) -> float:
    """The decimal meant by a number that was stored as float32: 1e-6 rather than 9.99999997e-07."""
    return float(f"{number:.7g}")
