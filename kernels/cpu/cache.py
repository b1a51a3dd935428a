"""The disk cache of compiled kernels, in the folder that numba would use.

An entry is valid only for the exact source of every file in the kernels' folder, since compiled code inlines functions
of several files, and its digest is checked before it is loaded; otherwise the kernel is compiled again. A cache that
cannot be read or written costs a compilation and one warning, never the request.

numba's own cache promises less: its stamp covers only the file of the function itself, code of an older source keeps
the name of the new one's if the disk fills up while it is replaced, and a file with a flipped bit is run.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import sysconfig
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import FunctionCache, NullCache
from numba.core.serialize import dumps

DIGEST_BYTES = 32


def compiled(function: Callable[..., Any]) -> Any:
    """Compiles a function on its first call, for any types, and keeps the code on disk.

    Only fused multiply-adds that are written as such are fused: no fast-math, nothing is reordered.
    """
    dispatcher: Any = numba.njit(nogil=True, error_model="numpy")(function)
    try:
        dispatcher._cache = KernelCache(function)  # where cache=True puts numba's own
    except (RuntimeError, OSError) as error:  # no folder can be written: numba's "no locator available"
        KernelCache.warn(error)
        dispatcher._cache = NullCache()
    return dispatcher


@functools.cache
def source_stamp(folder: Path) -> str:
    """A digest of every Python file in a folder and of the compiler's versions: entries of another stamp are stale."""
    sources = sorted((path.name, path.read_bytes()) for path in folder.iterdir() if path.suffix == ".py")
    return _hex((numba.__version__, llvmlite.__version__, sources))[:16]


def _hex(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


class Entries:
    """The compiled forms of one function, a file each: the digest of what follows, then numba's pickle.

    Args:
        folder: where they are kept; it may not exist yet.
        name: of the function, unique in the folder.
        stamp: of the source that they were compiled from.
    """

    def __init__(self, folder: Path, name: str, stamp: str) -> None:
        self._folder, self._name, self._stamp = folder, name, stamp

    def load(self, key: Any) -> Any:
        """What was saved under a key, None where nothing was.

        Raises:
            OSError, ValueError: it cannot be read, or is not what was saved.
        """
        path = self._path(key)
        try:
            stored = path.read_bytes()
        except FileNotFoundError:
            return None
        digest, data = stored[:DIGEST_BYTES], stored[DIGEST_BYTES:]
        if hashlib.sha256(data).digest() != digest:
            raise ValueError(f"{path} is damaged, and replaced")
        return pickle.loads(data)

    def save(self, key: Any, value: Any) -> None:
        """Saves a value and deletes the function's entries of other stamps.

        Raises:
            OSError: it cannot be written; no partial file is left.
        """
        data = dumps(value)
        path = self._path(key)
        partial = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            partial.write_bytes(hashlib.sha256(data).digest() + data)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        for path in self._folder.glob(f"{self._name}.*.nbc"):
            if not path.name.startswith(f"{self._name}.{self._stamp}."):
                with suppress(FileNotFoundError):  # another process may do the same
                    path.unlink()

    def _path(self, key: Any) -> Path:
        return self._folder / f"{self._name}.{self._stamp}.{_hex(key)[:32]}.nbc"


class KernelCache(FunctionCache):
    """numba's cache of one function, on `Entries`; its key has the argument types, the processor and its features."""

    _warned = False  # one warning a process, whatever the number of functions

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        name = f"{function.__module__}.{function.__qualname__}.{sysconfig.get_config_var('SOABI')}"
        stamp = source_stamp(Path(function.__code__.co_filename).parent)
        self._cache_file = Entries(Path(self._cache_path), name, stamp)  # type: ignore[assignment]

    def load_overload(self, signature: Any, target: Any) -> Any:
        try:
            return super().load_overload(signature, target)
        except Exception as error:  # whatever a damaged pickle may raise
            self.warn(error)
            return None

    def save_overload(self, signature: Any, result: Any) -> None:
        try:
            super().save_overload(signature, result)
        except Exception as error:
            self.warn(error)

    @classmethod
    def warn(cls, error: Exception) -> None:
        """Warns, once, that the cache is of no use and why."""
        if not KernelCache._warned:
            KernelCache._warned = True
            warnings.warn(
                "kernels are compiled in memory, which takes a minute, since their cache on disk cannot be used: "
                f"{' '.join(str(error).split())} (set NUMBA_CACHE_DIR to choose another folder)",
                stacklevel=2,
            )
