"""The cache of converted models: complete folders, each written once whatever process asks first.

A folder is written beside its final place and renamed when complete; a lock file lets one process at a time write it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from runtime.checkpoint import read_json
from runtime.errors import CacheError, CheckpointError

CACHE_ENV = "GEMMA_RUNTIME_CACHE"
VERSION = 1  # part of every folder's name: raise it when what is written changes
_MANIFEST = "manifest.json"


def cache_folder() -> Path:
    """Where conversions are kept: $GEMMA_RUNTIME_CACHE, or ~/.cache/gemma-runtime."""
    try:
        return Path(os.environ.get(CACHE_ENV) or "~/.cache/gemma-runtime").expanduser()
    except RuntimeError as error:  # a user without a home
        raise CacheError(f"no folder for the model cache: {error} (set {CACHE_ENV} to one)") from error


def cached(key: str, write: Callable[[Path], None]) -> Path:
    """The complete folder of that key in the cache, written first where it is absent or broken.

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
        raise _unwritable(folder.parent, error) from error
    return folder


def _unwritable(cache: Path, error: OSError) -> CacheError:
    return CacheError(
        f"cannot write the model cache {cache}: {error.strerror or error} (set {CACHE_ENV} to choose another folder)"
    )


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
