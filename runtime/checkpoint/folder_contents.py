"""What a folder or repository has instead of a loadable checkpoint, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

_CONVERT = "a checkpoint in Hugging Face's layout is required"
# Patterns of file names and what to say about such files; the first match is reported.
_FORMATS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("adapter_config.json", "adapter_model.*"),
        "an adapter (LoRA), not a model: merge it into its base model (peft's merge_and_unload, then save_pretrained) "
        "and load the result",
    ),
    (("*.gguf",), "GGUF: give the path of one file (download it first if it is on a hub)"),
    (("model-*-of-*.safetensors",), "shards of a checkpoint, but no index"),
    (("consolidated*.safetensors", "consolidated*.pth"), f"consolidated weights: {_CONVERT}"),
    (("*.safetensors",), "safetensors files, but not under a checkpoint's names"),
    (
        ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"),
        "pickle weights, which can run code when they are loaded: safetensors are required (transformers' "
        "save_pretrained writes them)",
    ),
    (("*.h5", "*.keras"), f"Keras weights: {_CONVERT}"),
    (("*.msgpack",), f"Flax weights: {_CONVERT}"),
    (("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"), f"an Orbax checkpoint (JAX): {_CONVERT}"),
    (("*.onnx",), f"an ONNX model: {_CONVERT}"),
    (("*.tflite", "*.task", "*.litertlm"), f"a LiteRT model: {_CONVERT}"),
    (("openvino_*.xml",), f"an OpenVINO model: {_CONVERT}"),
)
_LISTED = 3  # files that a message lists


def describe(folder: Path) -> str:
    """What a folder and its direct subfolders hold, and what to do about it: the end of an error message."""
    try:
        paths = [path.relative_to(folder) for pattern in ("*", "*/*") for path in folder.glob(pattern)]
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return describe_names(path.as_posix() for path in paths)


def describe_names(names: Iterable[str]) -> str:
    """The same, from file names relative to the folder or repository, with "/" between folders."""
    paths = sorted(map(PurePosixPath, names))
    if not paths:
        return "it is empty"
    top = [path for path in paths if len(path.parts) == 1]
    below = [path for path in paths if len(path.parts) == 2]
    models = [path.parent for path in below if path.name == "config.json"]
    return (
        _weights(top)
        or (f"found {_listed(models)} below it, each with a config.json: load that folder" if models else "")
        or _weights(below)
        or f"found no weights, but {_listed(top)}"
    )


def _weights(paths: list[PurePosixPath]) -> str:
    for patterns, message in _FORMATS:
        if matching := [path for path in paths if any(fnmatchcase(path.name.lower(), p.lower()) for p in patterns)]:
            return f"found {message} ({_listed(matching)})"
    return ""


def _listed(paths: list[PurePosixPath]) -> str:
    more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
    return ", ".join(map(str, paths[:_LISTED])) + more
