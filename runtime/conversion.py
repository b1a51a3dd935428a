"""A GGUF file made, once, a folder in Hugging Face's layout in the cache.

Weights are dequantised and rounded to bfloat16, so that every dtype starts from the same values. A conversion is
written beside its final place and renamed when complete; a lock file lets one process at a time convert a file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint import read_json
from runtime.config import ModelConfig
from runtime.errors import CheckpointError
from runtime.gguf_file import GgufFile
from runtime.gguf_tokenizer import tokenizer_config, tokenizer_json
from runtime.progress import ProgressBar
from runtime.weights import stored_shapes

CACHE_ENV = "GEMMA_RUNTIME_CACHE"
VERSION = 1  # part of every cache key: raise it when a conversion changes
_MANIFEST = "manifest.json"
_SAMPLE_BYTES = 1 << 20

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
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def cache_folder() -> Path:
    """Where conversions are kept: $GEMMA_RUNTIME_CACHE, or ~/.cache/gemma-runtime."""
    return Path(os.environ.get(CACHE_ENV) or "~/.cache/gemma-runtime").expanduser()


def convert(path: Path, progress: bool | None = None) -> Path:
    """The converted folder of a GGUF file, made if the cache does not hold it yet.

    Args:
        path: the `.gguf` file.
        progress: whether to draw a progress bar; None draws it on a terminal only.

    Returns:
        The folder in the cache: config.json, generation_config.json, model.safetensors, tokenizer files.

    Raises:
        CheckpointError: the file is damaged, not a Gemma 1, 2 or 3, or of an unsupported type.
        OSError: the file cannot be read or the cache cannot be written.
    """
    return cached(f"{path.stem}-{_fingerprint(path)}", lambda folder: write_folder(GgufFile(path), folder, progress))


def cached(key: str, write: Callable[[Path], None]) -> Path:
    """The complete folder of that key in the cache, written first where it is absent or broken.

    Args:
        key: the folder's name, which must identify its content.
        write: fills an empty folder.

    Raises:
        OSError: the cache cannot be written.
    """
    folder = cache_folder() / f"{key}-v{VERSION}"
    if _complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock")):
            if not _complete(folder):  # another process may have been faster
                partial = folder.with_name(f"{folder.name}.partial")
                for stale in (folder, partial):
                    if stale.exists():
                        shutil.rmtree(stale)
                partial.mkdir()
                try:
                    write(partial)
                    sizes = {file.name: file.stat().st_size for file in partial.iterdir()}
                    (partial / _MANIFEST).write_text(json.dumps(sizes))
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.filename is not None and not Path(error.filename).is_relative_to(folder.parent):
            raise  # about the source, not the cache
        raise OSError(
            f"cannot write the model cache {folder.parent}: {error.strerror or error} "
            f"(set {CACHE_ENV} to choose another folder)"
        ) from error
    return folder


def write_folder(file: GgufFile, folder: Path, progress: bool | None = None) -> None:
    """Convert an opened GGUF file into an empty folder.

    Raises:
        CheckpointError: it is not a Gemma 1, 2 or 3 with the tensors its metadata announces.
    """
    config = hf_config(file)
    names = {_hf_name(name, config["model_type"]): name for name in file.tensors}
    expected = stored_shapes(ModelConfig.from_hf(config))
    surplus = sorted(names.keys() - expected.keys() - {"lm_head.weight"})
    if surplus:
        raise CheckpointError(f"tensor {names[surplus[0]]} is not part of this model: {file.path}")
    for name, shape in expected.items():
        given = file.tensors[names[name]].shape if name in names else None
        if given != shape:
            raise CheckpointError(
                f"tensor {name} must have shape {list(shape)}, got {given and list(given)}: {file.path}"
            )
    metadata = file.metadata
    tokenizer, tokenizer_options = tokenizer_json(metadata), tokenizer_config(metadata)

    size = sum(2 * math.prod(tensor.shape) for tensor in file.tensors.values())
    free = shutil.disk_usage(folder).free
    if free < 1.1 * size:
        raise OSError(f"{1.1 * size / 1e6:,.0f} MB of disk are needed, {free / 1e6:,.0f} MB are free")
    with ProgressBar(f"converting {file.path.name}", size, progress) as bar:
        _write_safetensors(file, names, folder / "model.safetensors", bar)
    documents = {
        "config.json": config,
        "generation_config.json": {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_options,
    }
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


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


def _hf_name(name: str, model_type: str) -> str:
    """The Hugging Face name of a GGUF tensor."""
    stem = name.removesuffix(".weight")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.weight"
    layer, _, part = stem.removeprefix("blk.").partition(".")
    if not name.startswith("blk.") or not layer.isdigit() or part not in _BLOCK_NAMES or stem == name:
        raise CheckpointError(f"tensor {name} is not part of a Gemma model")
    stored = _BLOCK_NAMES[part]
    if model_type == "gemma" and part == "ffn_norm":
        stored = "post_attention_layernorm"
    return f"model.layers.{layer}.{stored}.weight"


def _write_safetensors(file: GgufFile, names: Mapping[str, str], path: Path, bar: ProgressBar) -> None:
    """Write every tensor as bfloat16, a few rows at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, source in names.items():
        shape = file.tensors[source].shape
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensor data starts aligned
    with path.open("wb") as output:
        output.write(len(encoded).to_bytes(8, "little") + encoded)
        for source in names.values():
            is_norm = source.endswith("_norm.weight")
            for rows in file.rows(source):
                # GGUF stores what a norm multiplies by, 1 + weight; Hugging Face stores the weight.
                stored = torch.from_numpy(rows - 1 if is_norm else rows).to(torch.bfloat16)
                output.write(stored.view(torch.int16).numpy().tobytes())
                bar.advance(stored.nbytes)
        output.flush()
        os.fsync(output.fileno())


def _fingerprint(path: Path) -> str:
    """Identify a file's content by its size, its time and its ends, without reading gigabytes."""
    stat = path.stat()
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, stat.st_size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _complete(folder: Path) -> bool:
    """Whether a cached folder holds every file of its manifest at its full size."""
    try:
        sizes = read_json(folder / _MANIFEST)
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, CheckpointError):
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, by a crash too
        yield


def _shortest(number: float) -> float:
    """The decimal meant by a number that was stored as float32: 1e-6 rather than 9.99999997e-07."""
    return float(f"{number:.7g}")
