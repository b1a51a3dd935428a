"""The disk cache of compiled kernels, in the folder that numba would use.

Compiled code inlines functions of several files, so an entry is valid for the exact content of every file in the
kernels' folder; numba's own stamp covers one file. Entries are checksummed, which numba's are not. A cache that cannot
be read or written costs a compilation and one warning, never the request.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import sysconfig
import time
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite import binding
from numba.core.caching import FunctionCache, NullCache
from numba.core.runtime import _nrt_python  # type: ignore[attr-defined]
from numba.core.serialize import dumps

_ABANDONED_SECONDS = 3600  # since a partial file was written: its process has been killed


def compiled(function: Callable[..., Any]) -> Any:
    """Compiles a function on its first call and keeps the code on disk. No fast-math: nothing is reordered or fused."""
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


@functools.cache
def _register_runtime() -> None:
    """Tells LLVM the addresses of the parts of numba's runtime that compiled code calls. Compiling does that too, but
    also compiles the rest of the runtime, of which compiled code has its own copies: 0.07 s and 28 MB."""
    for name, address in _nrt_python.c_helpers.items():
        binding.add_symbol(name if name.startswith("_") else f"NRT_{name}", address)


class Entries:
    """The compiled forms of one function, by its name, a file each: a SHA-256 digest, then numba's pickle."""

    def __init__(self, folder: Path, name: str, stamp: str) -> None:
        self._folder, self._name, self._stamp = folder, name, stamp

    def load(self, key: Any) -> Any:
        """The value saved under a key, or None. Raises OSError or ValueError for an unreadable or damaged file."""
        path = self.path(key)
        try:
            stored = path.read_bytes()
        except FileNotFoundError:
            return None
        digest, data = stored[:32], stored[32:]
        if hashlib.sha256(data).digest() != digest:
            raise ValueError(f"{path} is damaged, and replaced")
        return pickle.loads(data)

    def save(self, key: Any, value: Any) -> None:
        """Saves a value and deletes the function's stale files. Raises OSError, and then leaves no partial file."""
        data = dumps(value)
        path = self.path(key)
        partial = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            partial.write_bytes(hashlib.sha256(data).digest() + data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        for path in self._folder.glob(f"{self._name}.*.nbc"):
            if not path.name.startswith(f"{self._name}.{self._stamp}."):
                path.unlink(missing_ok=True)  # another process may do the same
        for path in self._folder.glob(f"{self._name}.*.tmp"):
            with suppress(FileNotFoundError):  # another process has saved or deleted it
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()

    def path(self, key: Any) -> Path:
        """The file of a key, which need not be there."""
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
        """The compiled form from the disk, or None. Not by numba's own method, which first imports all that compiling
        may need, SciPy included: compiling does that itself."""
        try:
            _register_runtime()
            return self._load_overload(signature, target)
        except Exception as error:  # a damaged pickle may raise anything
            self.warn(error)
            return None

    def file(self, signature: Any, target: Any) -> Path:
        """The file of a compiled form, which need not be there. Like every call of LLVM, this waits while another
        thread compiles."""
        entries: Entries = self._cache_file  # type: ignore[assignment]
        return entries.path(self._index_key(signature, target.codegen()))

    def save_overload(self, signature: Any, result: Any) -> None:
        try:
            super().save_overload(signature, result)
        except Exception as error:
            self.warn(error)

    @classmethod
    def warn(cls, error: Exception) -> None:
        """Warns once that the cache cannot be used, and why."""
        if not KernelCache._warned:
            KernelCache._warned = True
            warnings.warn(
                "kernels are compiled in memory, which takes a minute, since their cache on disk cannot be used: "
                f"{' '.join(str(error).split())} (set NUMBA_CACHE_DIR to choose another folder)",
                stacklevel=2,
            )
