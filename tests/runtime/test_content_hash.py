"""Files are hashed whole, once, and again as soon as anything about them may have changed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from runtime.checkpoint import content_hash as module
from runtime.checkpoint.content_hash import content_hash
from runtime.errors import CheckpointError


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets files just written be remembered, as if they had lain there for a while."""
    monkeypatch.setattr(module, "_SETTLED_NS", -(10**10))


def forbid_reading(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module.hashlib, "sha256", lambda *_: pytest.fail("hashed again"))


def test_it_is_the_sha256_of_everything(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000
    (tmp_path / "file").write_bytes(content)
    assert content_hash(tmp_path / "file", tmp_path / "known") == hashlib.sha256(content).hexdigest()
    assert not (tmp_path / "known").exists()  # a moment after it was written, nothing is certain


def test_a_file_that_has_not_changed_is_not_read_again(
    tmp_path: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"one")
    (tmp_path / "link").hardlink_to(tmp_path / "file")
    first = content_hash(tmp_path / "file", tmp_path / "known")
    with monkeypatch.context() as patch:
        forbid_reading(patch)
        assert content_hash(tmp_path / "file", tmp_path / "known") == first
        assert content_hash(tmp_path / "link", tmp_path / "known") == first


def test_a_change_shows_though_size_and_mtime_stay(tmp_path: Path, settled: None) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"one")
    stat, first = file.stat(), content_hash(file, tmp_path / "known")
    time.sleep(0.02)  # a tick of the clock, which a settled file is far away from
    with file.open("r+b") as opened:
        opened.write(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content_hash(file, tmp_path / "known") != first


def test_times_that_tell_nothing_are_not_trusted() -> None:
    now = 1_700_000_000_123_456_789
    assert module._tells_changes([1, 2, 3, now, now - 3 * 10**9], now)
    assert not module._tells_changes([1, 2, 3, now, now - 10**9], now)  # may change again in the same tick
    assert not module._tells_changes([1, 2, 3, 0, 1_600_000_000 * 10**9], now)  # an image's, or a coarse clock's
    assert not module._tells_changes([1, 2, 3, now, now + 10**9], now)  # the clock was set back


@pytest.mark.parametrize("damage", ["", "{", "[" * 100_000, "[]", '{"signature": 1}', "wrong hash", "wrong signature"])
def test_a_damaged_entry_is_ignored_and_replaced(tmp_path: Path, settled: None, damage: str) -> None:
    (tmp_path / "file").write_bytes(b"one")
    first = content_hash(tmp_path / "file", tmp_path / "known")
    (entry,) = (tmp_path / "known").iterdir()
    whole = json.loads(entry.read_text())
    if damage == "wrong hash":
        damage = json.dumps(whole | {"sha256": 3})
    elif damage == "wrong signature":
        damage = json.dumps({"signature": [*whole["signature"][:-1], 5], "sha256": "0" * 64})
    entry.write_text(damage)
    assert content_hash(tmp_path / "file", tmp_path / "known") == first
    assert json.loads(entry.read_text()) == whole


def test_without_a_folder_to_write_to_it_is_computed_each_time(tmp_path: Path, settled: None) -> None:
    (tmp_path / "file").write_bytes(b"one")
    (tmp_path / "known").write_text("in the way")
    for _ in range(2):
        assert content_hash(tmp_path / "file", tmp_path / "known") == hashlib.sha256(b"one").hexdigest()


def test_a_file_that_changes_or_is_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"one")
    signatures = iter([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]])
    monkeypatch.setattr(module, "_signature", lambda _: next(signatures))
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        content_hash(tmp_path / "file", tmp_path / "known")
    with pytest.raises(CheckpointError, match="gone cannot be read: No such file"):
        content_hash(tmp_path / "gone", tmp_path / "known")
