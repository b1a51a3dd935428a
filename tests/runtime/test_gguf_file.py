"""The structure of GGUF files: parts found and put together, damage and absurd numbers refused in one line, at once."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtime.checkpoint.gguf.file import GgufFile
from runtime.checkpoint.gguf.header import is_gguf
from runtime.errors import CheckpointError

from .gguf_files import shapes, write_gguf

gguf = pytest.importorskip("gguf", reason="needs the demo extra")
HUGE = struct.pack("<Q", 1 << 60)


def text(string: str | bytes) -> bytes:
    raw = string.encode() if isinstance(string, str) else string
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, dims: tuple[int, ...], offset: int = 0, kind: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def whole(keys: list[bytes], tensors: list[bytes], data: int = 4096) -> bytes:
    """A file of these metadata entries, these entries of the tensor table and so many bytes of data."""
    return b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors) + bytes(data)


FAULTS: dict[str, tuple[bytes, str]] = {
    "another magic": (b"GGML" + bytes(40), "not a GGUF file"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + bytes(40), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(40), "big-endian"),
    "keys without number": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60),
        "claims 0 tensors and 1152921504606846976",
    ),
    "tensors without number": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "claims 1152921504606846976 tensors"),
    "endless key": (whole([HUGE], []), "truncated: .* claims 1152921504606846976 bytes"),
    "endless text": (whole([key("a", 8, HUGE)], []), "truncated"),
    "endless array": (whole([key("a", 9, struct.pack("<I", 4) + HUGE)], []), "claims 1152921504606846976 items"),
    "endless strings": (whole([key("a", 9, struct.pack("<I", 8) + HUGE)], []), "claims 1152921504606846976 items"),
    "array past the end": (whole([key("a", 9, struct.pack("<IQ", 4, 1 << 20))], []), "truncated"),
    "nested arrays": (whole([key("a", 9, struct.pack("<IQIQ", 9, 1, 4, 0))], []), "'a' has nested arrays"),
    "unknown type": (whole([key("a", 13, bytes(8))], []), "'a' has the unknown type 13"),
    "unknown items": (whole([key("a", 9, struct.pack("<IQ", 77, 1))], []), "'a' has items of the unknown type 77"),
    "a key twice": (whole([key("a", 4, bytes(4))] * 2, []), "duplicate metadata key 'a'"),
    "no UTF-8": (whole([key("a", 8, text(b"\xff\xfe"))], []), "is not UTF-8"),
    "alignment 0": (whole([key("general.alignment", 4, bytes(4))], []), "must be a power of two, got 0"),
    "alignment 24": (whole([key("general.alignment", 4, struct.pack("<I", 24))], []), "got 24"),
    "alignment a text": (whole([key("general.alignment", 8, text("32"))], []), "got '32'"),
    "no dimensions": (whole([], [tensor("t", ())]), "has 0 dimensions"),
    "five dimensions": (whole([], [tensor("t", (1,) * 5)]), "has 5 dimensions"),
    "dimensions without number": (whole([], [text("t") + b"\xff" * 4]), "has 4294967295 dimensions"),
    "a dimension of 0": (whole([], [tensor("t", (0, 4))]), "which F32 cannot store"),
    "a size of 2^248": (whole([], [tensor("t", (1 << 62,) * 4)]), "truncated: tensor 't' ends at byte"),
    "an offset of 2^63": (whole([], [tensor("t", (4,), 1 << 63)]), "truncated: tensor 't' ends at byte"),
    "half a block": (whole([], [tensor("t", (48,), kind=8)]), "which Q8_0 cannot store"),
    "integers": (whole([], [tensor("t", (32,), kind=26)]), "'t' is stored as I32"),
    "no such type": (whole([], [tensor("t", (32,), kind=999)]), "'t' is stored as 999"),
    "a tensor twice": (whole([], [tensor("t", (8,)), tensor("t", (8,), 32)]), "duplicate tensor 't'"),
    "overlapping": (whole([], [tensor("a", (32,)), tensor("b", (8,), 96)]), "'b' begins at byte 1.*inside another"),
    "one in another": (whole([], [tensor("a", (512,)), tensor("b", (8,), 32)]), "'b' begins at byte 1.*inside another"),
    "misaligned": (whole([], [tensor("t", (8,), 4)]), "begins at 4, not a multiple of 32"),
    "a line break in a name": (whole([], [tensor("a\nb", (0,))]), r"tensor 'a\\nb'"),
    "a long name": (whole([], [tensor("x" * 10**6, (0,))]), "name must be at most 63 long"),
    "a long key": (whole([key("x" * 10**6, 13, bytes(8))], []), "has the unknown type 13"),
    "a long alignment": (whole([key("general.alignment", 8, text("3" * 10**6))], []), "got '333"),
    "a long split count": (whole([key("split.count", 8, text("3" * 10**6))], []), "split.count '333"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    content, message = FAULTS[fault]
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        GgufFile(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value) and "m.gguf" in str(caught.value) and len(str(caught.value)) < 1000


def test_files_cut_short_are_refused_wherever_the_cut(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [0, 3, 10, 23, *range(24, 9000, 371), len(content) // 2, len(content) - 1]:
        cut.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            GgufFile(cut)


def test_a_text_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "m.gguf").open("wb") as file:
        file.write(whole([key("a", 8, struct.pack("<Q", 2 << 30))], [], 0))
        file.truncate(3 << 30)  # a sparse file
    with pytest.raises(CheckpointError, match="claims a string of 2147483648 bytes"):
        GgufFile(tmp_path / "m.gguf")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for act in (GgufFile, is_gguf):
        with pytest.raises(CheckpointError, match=r"gone\.gguf cannot be read: No such file"):
            act(tmp_path / "gone.gguf")


def test_a_file_cut_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    file = GgufFile(tmp_path / "m.gguf")
    with (tmp_path / "m.gguf").open("r+b") as opened:
        opened.truncate(20_000)
    with pytest.raises(CheckpointError, match=r"m\.gguf has changed since its header was read"):
        list(file.rows("blk.1.ffn_down.weight"))


def test_values_of_every_kind_are_read(tmp_path: Path) -> None:
    kinds = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    keys = [key(f"k{kind}", kind, struct.pack(f"<{form}", 1)) for kind, form in kinds.items()]
    keys += [key(f"a{kind}", 9, struct.pack(f"<IQ3{form}", kind, 3, 1, 0, 1)) for kind, form in kinds.items()]
    keys += [key("text", 8, text("schön\n")), key("texts", 9, struct.pack("<IQ", 8, 2) + text("") + text("▁a"))]
    (tmp_path / "m.gguf").write_bytes(whole(keys, [tensor("row", (8, 1, 1, 1))]))
    file = GgufFile(tmp_path / "m.gguf")
    assert file.metadata == {f"k{kind}": 1 for kind in kinds} | {f"a{kind}": [1, 0, 1] for kind in kinds} | {
        "text": "schön\n",
        "texts": ["", "▁a"],
    }
    assert file.metadata["k7"] is True and file.tensors["row"].shape == (8,)


def split(path: Path, parts: int, describe: Callable[[int], dict[str, int]] | None = None) -> dict[str, np.ndarray]:
    """Write a model in parts beside each other, its metadata in the first."""
    names, values = list(shapes()), {}
    for number in range(parts):
        said = {"split.no": number, "split.count": parts, "split.tensors.count": len(names)}
        said |= describe(number) if describe else {}
        part = path.with_name(f"{path.name}-{number + 1:05d}-of-{parts:05d}.gguf")
        values |= write_gguf(part, metadata=said, only=names[number::parts])
    return values


def test_a_split_file_is_read_whole_from_any_part(tmp_path: Path) -> None:
    values = split(tmp_path / "m", 3)
    for number in (1, 2, 3):
        file = GgufFile(tmp_path / f"m-{number:05d}-of-00003.gguf")
        assert file.tensors.keys() == values.keys() == shapes().keys()
        for name, numbers in values.items():
            assert np.array_equal(np.concatenate(list(file.rows(name))).reshape(numbers.shape), numbers), name


SPLITS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a part missing": (lambda path: (path / "m-00002-of-00003.gguf").unlink(), "no m-00002-of-00003.gguf beside it"),
    "a part twice": (
        lambda path: (path / "m-00003-of-00003.gguf").write_bytes((path / "m-00002-of-00003.gguf").read_bytes()),
        r"m-00003-of-00003.gguf must be shard 3 of 3, got split\.no 1",
    ),
    "no GGUF": (lambda path: (path / "m-00002-of-00003.gguf").write_bytes(b"x" * 99), "m-00002.*not a GGUF file"),
}


@pytest.mark.parametrize("fault", SPLITS)
def test_incomplete_split_files_are_refused(tmp_path: Path, fault: str) -> None:
    damage, message = SPLITS[fault]
    split(tmp_path / "m", 3)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        GgufFile(tmp_path / "m-00001-of-00003.gguf")


def test_a_part_under_another_name_says_what_it_is(tmp_path: Path) -> None:
    split(tmp_path / "m", 2)
    (tmp_path / "m-00001-of-00002.gguf").rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=re.escape("a shard of a split model (split.no 0, split.count 2)")):
        GgufFile(tmp_path / "renamed.gguf")


def test_parts_of_two_models_are_refused(tmp_path: Path) -> None:
    split(tmp_path / "m", 2, lambda _: {"split.tensors.count": 99})
    with pytest.raises(CheckpointError, match="must have 99 tensors"):
        GgufFile(tmp_path / "m-00001-of-00002.gguf")
    write_gguf(tmp_path / "m-00002-of-00002.gguf", metadata={"split.no": 1, "split.count": 2})
    with pytest.raises(CheckpointError, match="duplicate tensor"):
        GgufFile(tmp_path / "m-00001-of-00002.gguf")


def test_a_gguf_file_is_known_by_its_content(tmp_path: Path) -> None:
    write_gguf(tmp_path / "anything")
    (tmp_path / "m.gguf").write_bytes(b"PK")
    assert is_gguf(tmp_path / "anything") and not is_gguf(tmp_path / "m.gguf")
