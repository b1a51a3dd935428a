"""What a repository without a checkpoint that can be loaded holds instead, from the names of its files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LISTED = 6


def describe(names: Iterable[str]) -> str:
    """Say what there is in place of config.json with `model.safetensors` or its index, and what can be done.

    Args:
        names: paths within the repository, "/" between folders.

    Returns:
        A clause that goes on from the repository's name: "holds …".
    """
    paths = sorted(map(PurePosixPath, names))
    top = [path.name for path in paths if len(path.parts) == 1]
    ggufs = [str(path) for path in paths if path.suffix.lower() == ".gguf"]
    pickles = [name for name in top if name.endswith(_PICKLES)]
    folders = sorted({str(path.parent) for path in paths if len(path.parts) > 1 and path.suffix == ".safetensors"})
    other = [name for name in top if name.endswith(".safetensors")]
    if "adapter_config.json" in top:
        return "holds an adapter only: merge it into its base model, and load the result"
    if ggufs:
        return f"holds GGUF files ({_listed(ggufs)}): download one and give its path"
    if SINGLE in top or INDEX in top:
        return "holds no config.json"
    if pickles:
        return f"holds pickle weights only ({_listed(pickles)}), which are never loaded: safetensors are required"
    if folders:
        return f"holds safetensors in folders only ({_listed(folders)}): download one and give its path"
    if other:
        return f"holds {_listed(other)}, but neither {SINGLE} nor {INDEX}"
    return f"holds no weights ({_listed(top) or 'no files'}): expected {SINGLE} or {INDEX}"


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
