"""The hash of a file's content, computed once and remembered.

A remembered hash holds while the file's device, inode, size, mtime and ctime do. No program can set ctime, so that even
a file rewritten in place with its old size and mtime is hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from runtime.checkpoint.files import reading
from runtime.checkpoint.progress import progress_bar
from runtime.errors import CheckpointError

_BLOCK = 4 << 20
_SETTLED_NS = 2_000_000_000  # changes closer together than this may get the same time
_SECOND_NS = 1_000_000_000


def signature(path: Path) -> list[int]:
    """A file's device, inode, size, mtime and ctime (both in nanoseconds), which change with its content.

    Raises:
        CheckpointError: there is no such file, or it may not be accessed.
    """
    with reading(path):
        return _signature(path.stat())


def content_hash(path: Path, known: Path, progress: bool | None = None) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits.

    Args:
        path: the file.
        known: a folder of remembered hashes, one small file each; created if missing. Where it cannot be written or
            read, hashes are computed each time.
        progress: whether to draw a progress bar; None draws it on a terminal only.

    Raises:
        CheckpointError: the file cannot be read, or changes while it is read.
    """
    now = time.time_ns()
    before = signature(path)
    entry = known / f"{before[0]:x}-{before[1]:x}.json"
    remembered = _recall(entry, before)
    if remembered is not None:
        return remembered
    digest = hashlib.sha256()
    with reading(path), path.open("rb") as file, progress_bar(f"reading {path.name}", before[2], progress) as bar:
        while block := file.read(_BLOCK):
            digest.update(block)
            bar.update(len(block))
        after = _signature(os.fstat(file.fileno()))
    if after != before:
        raise CheckpointError(f"{path} changed while it was being read")
    if _tells_changes(before, now):
        _remember(entry, before, digest.hexdigest())
    return digest.hexdigest()


def _signature(stat: os.stat_result) -> list[int]:
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _tells_changes(signed: list[int], now: int) -> bool:
    """Whether any later change is sure to change the signature: not soon after a change, as the next may get the same
    time; nor with whole-second times, from a coarse clock or from an image with one time for all files."""
    ctime = signed[-1]
    return ctime + _SETTLED_NS < now and ctime % _SECOND_NS != 0


def _recall(entry: Path, signed: list[int]) -> str | None:
    try:
        stored = json.loads(entry.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(stored, dict) or stored.get("signature") != signed:
        return None
    digest = stored.get("sha256")
    return digest if isinstance(digest, str) and len(digest) == 64 else None


def _remember(entry: Path, signed: list[int], digest: str) -> None:
    partial = entry.with_name(f"{entry.name}.{os.getpid()}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"signature": signed, "sha256": digest}))
        partial.replace(entry)
    except OSError:
        pass  # computed again next time
