"""Compiled kernels kept on disk, where numba keeps them. A cache that cannot be read or written costs a compilation and
one warning, never the request; and what is loaded is what was saved for this very source, or it is compiled anew.

numba's own files say less: code of an older source stays under the name that a new one is given when the disk is full
at that moment, and a file with a flipped bit is run.
"""

from __future__ import annotations

import hashlib
import pickle
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, NullCache
from numba.core.serialize import dumps

DIGEST_BYTES = 32


class Entries:
    """The compiled forms of one function, a file each: the digest of what follows, then numba's pickle.

    Args:
        folder: where they are kept; it may not exist yet.
        name: of the function, unique in the folder.
        source: what identifies the source that they were compiled from.
    """

    def __init__(self, folder: Path, name: str, source: Any) -> None:
        self._folder, self._name = folder, name
        self._source = _hex((numba.__version__, source))[:16]

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
        """Keeps a value; entries of another source go.

        Raises:
            OSError: it cannot be written; nothing is left of it.
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
            if not path.name.startswith(f"{self._name}.{self._source}."):
                with suppress(FileNotFoundError):  # another process may do the same
                    path.unlink()

    def _path(self, key: Any) -> Path:
        return self._folder / f"{self._name}.{self._source}.{_hex(key)[:32]}.nbc"


def _hex(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


class KernelCache(FunctionCache):
    """numba's cache of one function, on `Entries`."""

    _warned = False  # one warning a process, whatever the number of functions

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        locator = self._impl.locator
        folder, name = Path(self._cache_path), self._impl.filename_base
        self._cache_file = Entries(folder, name, locator.get_source_stamp())  # type: ignore[assignment]

    def load_overload(self, signature: Any, target: Any) -> Any:
        try:
            return super().load_overload(signature, target)
        except Exception as error:  # whatever a damaged pickle may raise
            self.warn(error)
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        try:
            super().save_overload(signature, compiled)
        except Exception as error:
            self.warn(error)

    @classmethod
    def warn(cls, error: Exception) -> None:
        """Says once that code was compiled which the cache should have given, or will have to be again."""
        if not KernelCache._warned:
            KernelCache._warned = True
            warnings.warn(
                "kernels are compiled in memory, which takes a minute, since their cache on disk cannot be used: "
                f"{' '.join(str(error).split())} (set NUMBA_CACHE_DIR to choose another folder)",
                stacklevel=2,
            )


def cached(function: Callable[..., Any]) -> KernelCache | NullCache:
    """The cache of a function, or where no folder can be written none."""
    try:
        return KernelCache(function)
    except (RuntimeError, OSError) as error:  # the former is numba's "no locator available"
        KernelCache.warn(error)
        return NullCache()
