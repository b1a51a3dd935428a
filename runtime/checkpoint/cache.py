"""The cache of converted models: complete folders, each written once, by the first process that needs it.

A folder is written next to its final place and renamed when complete, under a lock file. Its manifest holds the hash of
every file: if one is truncated, edited or replaced, the folder is written again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from runtime.checkpoint.content_hash import content_hash
from runtime.checkpoint.files import read_json
from runtime.errors import CacheError, CheckpointError

CACHE_ENV = "GEMMA_RUNTIME_CACHE"
VERSION = 4  # part of every folder's name: raise it when the written files change
HASHES = "hashes"  # the folder of remembered hashes, next to those of models
_MANIFEST = "manifest.json"


def cache_folder() -> Path:
    """The folder of converted models: $GEMMA_RUNTIME_CACHE, or ~/.cache/gemma-runtime."""
    try:
        return Path(os.environ.get(CACHE_ENV) or "~/.cache/gemma-runtime").expanduser()
    except RuntimeError as error:  # a user without a home
        raise CacheError(f"no folder for the model cache: {error} (set {CACHE_ENV} to one)") from error


def cached(key: str, write: Callable[[Path], None]) -> Path:
    """The cached folder of a key, written first if it is absent or broken.

    Args:
        key: the folder's name, which must identify its content.
        write: fills an empty folder.

    Raises:
        CacheError: the cache cannot be written.
    """
    folder = cache_folder() / f"{key}-v{VERSION}"
    if _complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder.parent, error) from error
    try:
        with _lock(folder):
            if not _complete(folder):  # another process may have been faster
                partial = folder.with_name(f"{folder.name}.partial")
                for stale in (folder, partial):
                    if stale.exists():
                        shutil.rmtree(stale)
                partial.mkdir()
                try:
                    write(partial)
                    (partial / _MANIFEST).write_text(json.dumps(_hashes(partial)))
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.filename is not None and not Path(error.filename).is_relative_to(folder.parent):
            raise  # the source's error, not the cache's
        raise _unwritable(folder.parent, error) from error
    return folder


def _unwritable(cache: Path, error: OSError) -> CacheError:
    return CacheError(
        f"cannot write the model cache {cache}: {error.strerror or error} (set {CACHE_ENV} to choose another folder)"
    )


def _complete(folder: Path) -> bool:
    """Whether a cached folder holds exactly the files of its manifest, unchanged."""
    try:
        return read_json(folder / _MANIFEST) == _hashes(folder)
    except (OSError, CheckpointError):
        return False


def _hashes(folder: Path) -> dict[str, str]:
    """The hash of every file in a folder, recursively, except the manifest."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    known = cache_folder() / HASHES
    return {name: content_hash(path, known, progress=False) for name, path in files.items() if name != _MANIFEST}


def _lock(folder: Path) -> FileLock:
    """The lock held while a folder is written; a crash releases it, and its file may stay.

    Where the file system has no flock, taking it is an error: a soft lock would outlive a crash.
    """
    return FileLock(folder.with_name(f"{folder.name}.lock"), fallback_to_soft=False)
