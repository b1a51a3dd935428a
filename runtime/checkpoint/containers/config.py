"""What the quantization_config of a checkpoint's config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.checkpoint.containers import awq, compressed_tensors, gptq
from runtime.checkpoint.containers.scheme import Scheme
from runtime.errors import CheckpointError
from runtime.model.config_fields import shown

_READERS = {"compressed-tensors": compressed_tensors.read, "gptq": gptq.read, "awq": awq.read}
_OTHERS = {
    "aqlm": "additive codebooks",
    "auto-round": "AutoRound's own packing",
    "bitnet": "ternary weights",
    "bitsandbytes": "NF4 or LLM.int8() weights",
    "eetq": "int8 weights in EETQ's order",
    "fbgemm_fp8": "float8 weights",
    "fp8": "float8 weights",
    "fp_quant": "MXFP4 or NVFP4 weights",
    "gguf": "a GGUF file: load the file itself",
    "higgs": "lattice codebooks",
    "hqq": "HQQ weights, with zeros that are not integers",
    "modelopt": "float8 or NVFP4 weights",
    "mxfp4": "MXFP4 weights",
    "quanto": "Quanto's tensors",
    "quark": "Quark's tensors",
    "spqr": "SpQR weights",
    "torchao": "torchao's tensors",
    "vptq": "vector codebooks",
}


def scheme_of(config: Mapping[str, Any]) -> Scheme | None:
    """How a checkpoint stores its matrices as integers; None where it stores values.

    Args:
        config: the parsed config.json.

    Raises:
        CheckpointError: in a way that blocks cannot hold exactly; the message says which.
    """
    given = config.get("quantization_config")
    if given is None:
        return None
    method = given.get("quant_method") if isinstance(given, Mapping) else given
    if not isinstance(given, Mapping) or not isinstance(method, str) or method not in _READERS:
        what = f", {_OTHERS[method]}" if isinstance(method, str) and method in _OTHERS else ""
        raise CheckpointError(
            f"quantization_config: quant_method must be one of {tuple(_READERS)}, got {shown(method)}{what}"
        )
    return _READERS[method](given)
