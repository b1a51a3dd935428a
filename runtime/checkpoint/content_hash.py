"""What a file holds, as a hash of all its bytes, computed once and remembered.

A file is known again by its place on the disk, its size and its times, the last of which (ctime) no program can set. So
a file that is rewritten in place, with its old size and its old mtime put back, is read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from runtime.errors import CheckpointError
from runtime.model.progress import ProgressBar

_BLOCK = 4 << 20
_SETTLED_NS = 2_000_000_000  # a change this soon after another may get the same time
_SECOND_NS = 1_000_000_000


def signature(path: Path) -> list[int]:
    """What tells whether a file is still the same: device, inode, size, mtime and ctime in nanoseconds.

    Raises:
        CheckpointError: there is no such file, or it may not be looked at.
    """
    try:
        return _signature(path.stat())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def content_hash(path: Path, known: Path, progress: bool | None = None) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits.

    Args:
        path: the file.
        known: a folder of hashes, made where it is missing: one small file for each file whose hash was computed.
            Where it cannot be written or read, hashes are computed each time.
        progress: whether to draw a progress bar; None draws it on a terminal only.

    Raises:
        CheckpointError: the file cannot be read, or changes meanwhile.
    """
    now = time.time_ns()
    before = signature(path)
    entry = known / f"{before[0]:x}-{before[1]:x}.json"
    remembered = _recall(entry, before)
    if remembered is not None:
        return remembered
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file, ProgressBar(f"reading {path.name}", before[2], progress) as bar:
            while block := file.read(_BLOCK):
                digest.update(block)
                bar.advance(len(block))
            after = _signature(os.fstat(file.fileno()))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if after != before:
        raise CheckpointError(f"{path} changed while it was being read")
    if _tells_changes(before, now):
        _remember(entry, before, digest.hexdigest())
    return digest.hexdigest()


def _signature(stat: os.stat_result) -> list[int]:
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _tells_changes(signed: list[int], now: int) -> bool:
    """Whether any later change must show in a signature. A change a moment ago may be followed by another in the same
    tick of the clock; and a time in whole seconds comes from a coarse clock, or from an image that gives all of its
    files the same."""
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
