"""Where a model comes from: a folder, a hub id, a GGUF file or the packaged demo, all made a local folder in Hugging
Face's layout."""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT_ENV = "GEMMA_RUNTIME_MODEL"
DEMO = "demo"


def default_source() -> str:
    """The model meant where none is named: $GEMMA_RUNTIME_MODEL, or the packaged demo."""
    return os.environ.get(DEFAULT_ENV) or DEMO


def resolve(source: str | os.PathLike[str]) -> Path:
    """Make a source a local folder with config.json and safetensors, downloading or converting where needed.

    Args:
        source: a folder, a `.gguf` file, a hub id ("owner/name"), or "demo".

    Returns:
        The folder.

    Raises:
        FileNotFoundError: nothing is found under that name.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    raise FileNotFoundError(f"no model at {source}")
