"""Device and dtype: every spelling that a caller may use, resolved to one name."""

from __future__ import annotations

import torch

from runtime.errors import InvalidArgument, InvalidArgumentType
from runtime.model.config import DTYPES

Device = str | int | torch.device
Dtype = str | torch.dtype

_SHORT = {
    "fp32": "float32",
    "f32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
}


def resolve_dtype(dtype: Dtype, name: str = "dtype") -> str:
    """The name of a dtype: "float32", "bfloat16" or "float16"; "auto" stays "auto".

    Args:
        dtype: its name, also with "torch." before it or short ("bf16", "half"), in any case; or the torch.dtype.
        name: what errors call it.

    Raises:
        InvalidArgument: not a dtype that this runtime computes in.
        InvalidArgumentType: neither a string nor a torch.dtype.
    """
    if not isinstance(dtype, str | torch.dtype):
        raise InvalidArgumentType(f"{name} must be a string or a torch.dtype, got {dtype!r}")
    given = str(dtype).lower().removeprefix("torch.")
    resolved = _SHORT.get(given, given)
    if resolved not in (*DTYPES, "auto"):
        raise InvalidArgument(f'{name} must be one of {DTYPES}, short ("bf16"), or "auto", got {dtype!r}')
    return resolved


def resolve_device(device: Device) -> str:
    """The name of an available device: "cpu", "cuda" or "cuda:N"; "auto" is CUDA where there is one.

    Args:
        device: its name, the number of a CUDA device, or a torch.device.

    Raises:
        InvalidArgument: not a CPU or CUDA device, or a CUDA device that this machine lacks.
        InvalidArgumentType: neither a string, an integer nor a torch.device.
    """
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
        raise InvalidArgumentType(f"device must be a string, an integer or a torch.device, got {device!r}")
    name = f"cuda:{device}" if isinstance(device, int) else str(device).lower()
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if (
        kind not in ("cpu", "cuda")
        or (kind == "cpu" and index not in ("", "0"))
        or (":" in name and not (index.isascii() and index.isdecimal()))
    ):
        raise InvalidArgument(f'device must be "auto", "cpu", "cuda" or "cuda:N", got {device!r}')
    if kind == "cpu":
        return "cpu"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count or (index and int(index) >= count):
        raise InvalidArgument(f"device {device!r} was asked for, but {count or 'no'} CUDA devices are found")
    return name
