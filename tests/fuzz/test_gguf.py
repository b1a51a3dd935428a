"""Damaged GGUF files: each loads as the `gguf` package reads it, or is refused in one line, soon, in little memory."""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from runtime.checkpoint.gguf.conversion import write_folder
from runtime.checkpoint.gguf.file import GgufFile
from runtime.errors import GemmaRuntimeError
from runtime.loading import read_config
from runtime.text.tokenizer import Tokenizer

from ..runtime.gguf_files import write_gguf

gguf = pytest.importorskip("gguf", reason="needs the demo extra")
pytestmark = [pytest.mark.sweep, pytest.mark.newest_only]  # about code of our own
SECONDS, BYTES = 5.0, 500 << 20  # that one file may take, of time and of memory beyond what the test has itself
NUMBERS = (0, 1, 2, 3, 7, 8, 9, 13, 31, 32, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 60)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small Gemma 3 with every kind of entry that real files have."""
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    kinds: dict[str, Any] = {"general.name": "small", "general.tags": ["a", "b"], "tokenizer.chat_template": "{{ x }}"}
    kinds |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.scores": [-float(i) for i in range(266)]}
    sizes = {"attention.sliding_window_pattern": [True, False], "rope.freq_base": 1e6}
    write_gguf(path, sizes=sizes, metadata=kinds)
    return path.read_bytes()


def fields(content: bytes) -> list[tuple[int, int]]:
    """Place and size of every count, length, type, dimension and offset of a sound file, and of its scalar values."""
    places, at = [(4, 4), (8, 8), (16, 8)], 24
    widths = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def number(size: int) -> int:
        nonlocal at
        places.append((at, size))
        at += size
        return int.from_bytes(content[at - size : at], "little")

    def string() -> None:
        nonlocal at
        length = number(8)
        at += length

    tensors, keys = struct.unpack_from("<QQ", content, 8)
    for _ in range(keys):
        string()
        kind = number(4)
        if kind == 8:
            string()
        elif kind == 9:
            item, count = number(4), number(8)
            for _ in range(count):
                string() if item == 8 else number(widths[item])
        else:
            number(widths[kind])
    for _ in range(tensors):
        string()
        for _ in range(number(4)):
            number(8)
        number(4), number(8)
    return places


def damaged(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Endlessly, the same each time: first each interesting field at each interesting number, then at random."""
    places = fields(content)
    header = places[-1][0] + 8
    rare = places[:60] + places[-80:]  # the vocabulary lies between

    def put(at: int, value: bytes) -> bytes:
        return content[:at] + value + content[at + len(value) :]

    for size in (0, 1, 4, 8, 23, 24, 25, header - 1, header, header + 31, len(content) - 1):
        yield f"cut at {size}", content[:size]
    for at, size in rare:
        for value in (0, NUMBERS[-1]):
            yield f"{value} at {at}", put(at, (value % (1 << 8 * size)).to_bytes(size, "little"))
    generator = random.Random(0)
    while True:
        choice = generator.randrange(5)
        if choice == 0:
            at = generator.randrange(header)
            yield f"a bit at {at}", put(at, bytes([content[at] ^ 1 << generator.randrange(8)]))
        elif choice == 1:
            at, size = generator.choice(rare if generator.random() < 0.5 else places)
            value = generator.choice(NUMBERS) % (1 << 8 * size)
            yield f"{value} at {at}", put(at, value.to_bytes(size, "little"))
        elif choice == 2:
            (at, size), (other, length) = generator.choices(places, k=2)
            yield f"{other} over {at}", put(at, content[other : other + length][:size])
        elif choice == 3:
            start, stop = sorted(generator.choices(range(header), k=2))
            yield f"without {start} to {stop}", content[:start] + content[stop:]
        else:
            at = generator.randrange(header, len(content))
            yield f"bytes at {at}", put(at, generator.randbytes(4)[: len(content) - at])


def as_the_package_reads(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """The vocabulary, and the tensors by their names in the file, as bf16 bits of the model's own convention."""
    reader = gguf.GGUFReader(path)
    values = {}
    for tensor in reader.tensors:
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
        values[tensor.name] = numbers - 1 if tensor.name.endswith("_norm.weight") else numbers
    return reader.fields["tokenizer.ggml.tokens"].contents(), values


def same(path: Path, folder: Path) -> bool:
    """Whether a converted folder holds what the package reads, in the same order of tensors."""
    tokens, values = as_the_package_reads(path)
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    spelled = ["▁" * len(token) if token and not token.strip(" ") else token for token in tokens]
    stored = load_file(folder / "model.safetensors")
    mine = sorted((tuple(tensor.shape), tensor.view(torch.int16).numpy().tobytes()) for tensor in stored.values())
    theirs = [torch.from_numpy(numbers.copy()).to(torch.bfloat16) for numbers in values.values()]
    expected = sorted((tuple(tensor.shape), tensor.view(torch.int16).numpy().tobytes()) for tensor in theirs)
    return vocabulary == {token: index for index, token in enumerate(spelled)} and mine == expected


def test_damaged_files_load_as_they_read_or_are_refused(sound: bytes, tmp_path: Path, fuzz_seconds: float) -> None:
    path, loaded, refused = tmp_path / "m.gguf", 0, 0
    ended = time.monotonic() + fuzz_seconds
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index, (what, content) in enumerate(damaged(sound)):
        if time.monotonic() > ended:
            break
        path.write_bytes(content)
        folder = tmp_path / str(index)
        folder.mkdir()
        started = time.monotonic()
        error = attempt(path, folder)
        assert time.monotonic() - started < SECONDS, what
        if error is None:
            loaded += 1
            assert same(path, folder), f"{what}: loads as something else"
        else:
            refused += 1
            assert isinstance(error, GemmaRuntimeError), f"{what}: {error!r}"
            assert "\n" not in str(error) and len(str(error)) < 1000, what
        shutil.rmtree(folder)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < BYTES, f"{grown >> 20} MB more were in use"
    assert refused > 10 and loaded > 10, f"{refused} refused, {loaded} loaded"


def attempt(path: Path, folder: Path) -> Exception | None:
    """Convert, and read what was written; return what was raised."""
    try:
        write_folder(GgufFile(path), folder, progress=False)
        Tokenizer.from_folder(folder, read_config(folder).vocab)
    except Exception as error:
        return error
    return None
