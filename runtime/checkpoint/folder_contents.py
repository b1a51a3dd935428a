"""What a folder or repository holds in place of a checkpoint that can be loaded, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

_CONVERT = "a checkpoint in Hugging Face's layout is required"
# What each kind is known by (patterns of file names) and what to say of it. The first that fits is told.
_KINDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("adapter_config.json", "adapter_model.*"),
        "an adapter (LoRA), not a model: merge it into its base model (peft's merge_and_unload, then save_pretrained) "
        "and load the result",
    ),
    (("*.gguf",), "GGUF: give the path of one file (one on a hub has to be downloaded first)"),
    (("model-*-of-*.safetensors",), "shards of a checkpoint, but not the index that names them"),
    (("consolidated*.safetensors", "consolidated*.pth"), f"consolidated weights: {_CONVERT}"),
    (("*.safetensors",), "safetensors under other names than a checkpoint's"),
    (
        ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"),
        "pickle weights, which can run code when they are loaded: safetensors are required, which transformers' "
        "save_pretrained writes",
    ),
    (("*.h5", "*.keras"), f"Keras weights: {_CONVERT}"),
    (("*.msgpack",), f"Flax weights: {_CONVERT}"),
    (("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"), f"an Orbax checkpoint (JAX): {_CONVERT}"),
    (("*.onnx",), f"an ONNX model: {_CONVERT}"),
    (("*.tflite", "*.task", "*.litertlm"), f"a LiteRT model: {_CONVERT}"),
    (("openvino_*.xml",), f"an OpenVINO model: {_CONVERT}"),
)
_NAMED = 3  # files that a message names


def describe(folder: Path) -> str:
    """What a folder and those right below it hold, and what to do about it: the end of an error message."""
    try:
        paths = [path.relative_to(folder) for pattern in ("*", "*/*") for path in folder.glob(pattern)]
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return describe_names(path.as_posix() for path in paths)


def describe_names(names: Iterable[str]) -> str:
    """The same, from the names of the files relative to the folder or repository, "/" between folders."""
    paths = sorted(map(PurePosixPath, names))
    if not paths:
        return "it is empty"
    top = [path for path in paths if len(path.parts) == 1]
    below = [path for path in paths if len(path.parts) == 2]
    models = [path.parent for path in below if path.name == "config.json"]
    return (
        _weights(top)
        or (f"found {_listed(models)} below it, each with a config.json: name that folder" if models else "")
        or _weights(below)
        or f"found no weights, but {_listed(top)}"
    )


def _weights(paths: list[PurePosixPath]) -> str:
    for patterns, said in _KINDS:
        if found := [path for path in paths if any(fnmatchcase(path.name.lower(), p.lower()) for p in patterns)]:
            return f"found {said} ({_listed(found)})"
    return ""


def _listed(paths: list[PurePosixPath]) -> str:
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return ", ".join(map(str, paths[:_NAMED])) + more
