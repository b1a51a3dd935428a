"""Small random Gemma models in compressed-tensors', GPTQ's and AWQ's layouts, packed bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from runtime.bench.small_models import save_small_model

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}
LAYERS = {"gemma3": {"layer_types": ["sliding_attention", "full_attention"]}}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbours is where in a word
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Variant:
    """How a model is packed: `kind` is "pack", "naive", "gptq", "gptq_v2" or "awq"."""

    kind: str
    bits: int = 4
    group: int | None = 32
    symmetric: bool = True
    scales: str = "BF16"

    @property
    def container(self) -> str:
        return {"gptq_v2": "gptq", "pack": "compressed-tensors", "naive": "compressed-tensors"}.get(
            self.kind, self.kind
        )

    def __str__(self) -> str:
        zeros = "" if self.symmetric else "-zeros"
        return f"{self.kind}-{self.bits}-{self.group}-{self.scales}{zeros}"


@dataclass
class Packed:
    """A model as it is about to be written, for tests to change."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    values: dict[str, np.ndarray] = field(default_factory=dict)  # of every matrix and norm, in fp32, by its plain name

    def write(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / "model.safetensors")
        return folder


def pack_model(
    folder: Path, variant: Variant, is_packed: Callable[[str], bool] = lambda name: "_proj" in name
) -> Packed:
    """A small model's matrices as integers; all else in bf16.

    Args:
        folder: from `save_small_model`.
        variant: how they are packed.
        is_packed: which tensors, by their names.
    """
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": config_of(variant)}
    packed = Packed(config | {"dtype": "bfloat16"}, {})
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not is_packed(name):
            packed.tensors[name] = tensor.bfloat16()
            packed.values[name] = tensor.bfloat16().float().numpy()
            continue
        q, zero, scale = quantised(tensor.double().numpy(), variant)
        stored = scale.float().double().numpy()
        group = q.shape[1] // zero.shape[1]
        integers = q - zero.repeat(group, axis=1)
        packed.values[name] = (integers * stored.repeat(group, axis=1)).astype(np.float32)
        parts = _PARTS[variant.kind](q, zero, scale, variant)
        packed.tensors |= {name.removesuffix("weight") + part: value for part, value in parts.items()}
    return packed


def quantised(values: np.ndarray, variant: Variant) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """The nearest integers [rows, columns], zeros and scales [rows, groups]."""
    rows, columns = values.shape
    groups = values.reshape(rows, -1, variant.group or columns)
    top, middle = 2**variant.bits - 1, 2 ** (variant.bits - 1)
    if variant.symmetric:
        scale = np.abs(groups).max(2) / (middle - 1)
        zero = np.full(scale.shape, middle)
    else:
        low, high = np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0)
        scale = (high - low) / top
        zero = np.clip(np.rint(-low / scale), 0, top - (variant.kind == "gptq")).astype(np.int64)
    narrow = torch.from_numpy(scale).to(DTYPES[variant.scales])
    steps = np.rint(groups / narrow.double().numpy()[..., None]) + zero[..., None]
    return np.clip(steps, 0, top).astype(np.int64).reshape(rows, columns), zero, narrow


def words(integers: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Integers [n, count] in int32 words, from the lowest bits, or in an order within each word."""
    per_word = 32 // bits
    given = np.pad(integers, ((0, 0), (0, -integers.shape[1] % per_word))).reshape(len(integers), -1, per_word)
    packed = np.zeros(given.shape[:2], np.uint64)
    for place, number in enumerate(order or range(per_word)):
        packed |= given[..., number].astype(np.uint64) << np.uint64(bits * place)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


def _packed(q: np.ndarray, zero: np.ndarray, scale: torch.Tensor, variant: Variant) -> dict[str, torch.Tensor]:
    zeros = {} if variant.symmetric else {"weight_zero_point": words(zero.T, variant.bits).T}
    shape = torch.tensor(q.shape)
    return {"weight_packed": words(q, variant.bits), "weight_scale": scale, "weight_shape": shape} | zeros


def _naive(q: np.ndarray, zero: np.ndarray, scale: torch.Tensor, variant: Variant) -> dict[str, torch.Tensor]:
    return {"weight": torch.from_numpy((q - 128).astype(np.int8)), "weight_scale": scale}


def _gptq(q: np.ndarray, zero: np.ndarray, scale: torch.Tensor, variant: Variant) -> dict[str, torch.Tensor]:
    stored = zero - (variant.kind == "gptq")
    return {
        "qweight": words(q, variant.bits).T,
        "qzeros": words(stored.T, variant.bits),
        "scales": scale.T,
        "g_idx": torch.arange(q.shape[1], dtype=torch.int32) // (variant.group or q.shape[1]),
    }


def _awq(q: np.ndarray, zero: np.ndarray, scale: torch.Tensor, variant: Variant) -> dict[str, torch.Tensor]:
    return {"qweight": words(q.T, 4, AWQ_ORDER), "qzeros": words(zero.T, 4, AWQ_ORDER), "scales": scale.T}


_PARTS: dict[str, Callable[..., dict[str, torch.Tensor]]] = {
    "pack": _packed,
    "naive": _naive,
    "gptq": _gptq,
    "gptq_v2": _gptq,
    "awq": _awq,
}


def config_of(variant: Variant) -> dict[str, Any]:
    """The quantization_config that the packages write."""
    if variant.container == "compressed-tensors":
        strategy = "channel" if variant.group is None else "group"
        weights = {
            "num_bits": variant.bits,
            "type": "int",
            "symmetric": variant.symmetric,
            "strategy": strategy,
            "group_size": variant.group,
            "dynamic": False,
            "block_structure": None,
            "actorder": None,
            "observer": "minmax",
            "observer_kwargs": {},
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": f"{variant.kind}-quantized",
            "quantization_status": "compressed",
            "kv_cache_scheme": None,
            "global_compression_ratio": 1.9,
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }
    size = -1 if variant.group is None else variant.group
    if variant.kind == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": size,
            "version": "gemm",
            "zero_point": not variant.symmetric,
            "modules_to_not_convert": None,
        }
    return {
        "quant_method": "gptq",
        "bits": variant.bits,
        "group_size": size,
        "sym": variant.symmetric,
        "desc_act": False,
        "checkpoint_format": variant.kind,
        "pack_dtype": "int32",
        "lm_head": False,
        "true_sequential": True,
        "static_groups": False,
        "damp_percent": 0.01,
        "dynamic": None,
        "meta": {"quantizer": ["gptqmodel:2.0.0"]},
    }


def save_plain_model(family: str, folder: Path, **overrides: Any) -> Path:
    """A small model whose matrices kernels take in blocks."""
    save_small_model(family, folder, **SIZES | LAYERS.get(family, {}) | overrides)
    return folder


def changed(config: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """A config with other fields in its quantization_config."""
    return {**config, "quantization_config": {**config["quantization_config"], **fields}}
