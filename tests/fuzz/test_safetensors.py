"""Damaged safetensors checkpoints: what loads has the very tensors that transformers reads, and all else is refused in
one line by an error of this package."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.api import load
from runtime.errors import GemmaRuntimeError
from runtime.hugging_face.shared_weights import named_weights

pytestmark = [pytest.mark.sweep, pytest.mark.newest_only]  # about code of our own

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FIELDS = {
    "model_type": "gemma",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
}
# Values that stand where others should: wrong types, bounds, and what is slow or deep to read.
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 7, 2**31, 2**63, 2**64, 10**40, 0.0, 1.5, float("nan"), float("inf"), "", "F32", "F4",
    "I64", "BF16", "F8_E4M3", "x" * 10_000, "\0", "\ud800", "../x.safetensors", [], {}, [[]], [1] * 100, [0, 8], ["a"],
    {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
]  # fmt: skip
DEEP = b'{"a":' * 100_000
NAMES = [
    "lm_head.weight",
    "model.model.norm.weight",
    "norm.weight",
    "model.a\nb.weight",
    "model.layers.2.mlp.up_proj.weight",
    "__metadata__",
]
RAW = [
    b"",
    b"\0",
    b"{}",
    b"[]",
    b"null",
    DEEP,
    b"[" * 100_000,
    b"\xff\xfe{}",
    b"\xef\xbb\xbf{}",
    b"9" * 5000,
    b"\xff" * 64,
]


def checkpoint(folder: Path, shards: int) -> None:
    """A small whole checkpoint of one file, or of two with an index."""
    import transformers

    torch.manual_seed(0)
    model = transformers.GemmaForCausalLM(transformers.GemmaConfig(**FIELDS))
    tensors = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    (folder / "config.json").write_text(json.dumps(FIELDS))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = {f"model-0000{part + 1}-of-00002.safetensors": sorted(tensors)[part::2] for part in range(2)}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def split(data: bytes) -> tuple[Any, bytes]:
    """The header and the data of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def spoilt(value: Any, dice: random.Random) -> Any:
    """A copy of a JSON value with one odd thing somewhere in it."""
    value = copy.deepcopy(value)
    owner, key = None, None
    inner = value
    while isinstance(inner, dict | list) and inner and (owner is None or dice.random() < 0.8):
        owner, key = inner, dice.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        inner = owner[key]
    if owner is None:
        return dice.choice(ODD)
    kind = dice.randrange(4)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, dict):
        owner[dice.choice([*NAMES, "", "x", str(key).upper()])] = owner.pop(key)
    elif kind == 2 and isinstance(inner, int) and not isinstance(inner, bool):
        owner[key] = inner + dice.choice([-8, -4, -1, 1, 4, 8])
    else:
        owner[key] = copy.deepcopy(dice.choice(ODD))
    return value


def spoil_header(path: Path, dice: random.Random) -> None:
    header, data = split(path.read_bytes())
    path.write_bytes(joined(spoilt(header, dice), data))


def swap_entries(path: Path, dice: random.Random) -> None:
    """Two tensors lie where the other one did, or in one place."""
    header, data = split(path.read_bytes())
    one, other = dice.sample([name for name in header if name != "__metadata__"], 2)
    header[one]["data_offsets"] = header[other]["data_offsets"]
    path.write_bytes(joined(header, data))


def repeat_name(path: Path, dice: random.Random) -> None:
    header, data = split(path.read_bytes())
    name, entry = dice.choice([item for item in header.items() if item[0] != "__metadata__"])
    changed = json.dumps({name: spoilt(entry, dice)})
    path.write_bytes(joined((json.dumps(header)[:-1] + ", " + changed[1:]).encode(), data))


def spoil_length(path: Path, dice: random.Random) -> None:
    header, data = split(path.read_bytes())
    path.write_bytes(joined(header, data, dice.choice([0, 1, 2, 7, 10**6, 10**9, 2**63, 2**64 - 1])))


def spoil_bytes(path: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(dice.randint(1, 4)):
        data[dice.randrange(min(len(data), 3000))] = dice.choice([0, 34, 44, 48, 57, 91, 93, 123, 125, 127, 255])
    path.write_bytes(data)


def cut_or_grow(path: Path, dice: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: dice.randrange(len(data))] if dice.random() < 0.7 else data + b"\0" * dice.randint(1, 9))


def replace_whole(path: Path, dice: random.Random) -> None:
    raw = dice.choice(RAW)
    path.write_bytes(raw if dice.random() < 0.5 else joined(raw, b"\0" * 8))


def replace_by_what_is_no_file(path: Path, dice: random.Random) -> None:
    path.unlink()
    kind = dice.randrange(5)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(path.name)
    elif kind == 2:
        path.symlink_to("nowhere")
    elif kind == 3:
        os.mkfifo(path)


def change_tensor(path: Path, dice: random.Random) -> None:
    """A well-formed file with a tensor of another dtype, shape or name, or one more."""
    tensors = load_file(path)
    name = dice.choice(sorted(tensors))
    value = tensors[name]
    kinds: list[Callable[[], torch.Tensor]] = [
        lambda: value.double(),
        lambda: value.bfloat16(),
        lambda: value.to(torch.int8),
        lambda: value.to(torch.float8_e4m3fn),
        lambda: value.bool(),
        lambda: value.flatten(),
        lambda: value[None],
        lambda: value[:0],
        lambda: torch.tensor(1.0),
        lambda: value.t().contiguous(),
        lambda: value * float("nan"),
    ]
    place = dice.choice([name, name, *NAMES[:-1], "model.embed_tokens.embed_scale", "model.rotary_emb.inv_freq"])
    tensors[place] = dice.choice(kinds)()
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})


def spoil_json(path: Path, dice: random.Random) -> None:
    path.write_text(json.dumps(spoilt(json.loads(path.read_text()), dice)))


WEIGHTS = [
    spoil_header, swap_entries, repeat_name, spoil_length, spoil_bytes, cut_or_grow, replace_whole,
    replace_by_what_is_no_file, change_tensor,
]  # fmt: skip
INDEX = [spoil_json, spoil_bytes, cut_or_grow, replace_whole, replace_by_what_is_no_file]


def check(folder: Path, label: str) -> bool:
    """The oracle; whether the checkpoint loads."""
    try:
        model = load(folder, device="cpu", max_seq_len=8)
    except GemmaRuntimeError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 20_000, label
        return False
    except Exception as error:
        raise AssertionError(f"{label}: {type(error).__name__}: {error}") from error
    import transformers

    stored = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    try:
        theirs = transformers.GemmaForCausalLM.from_pretrained(folder, dtype=model.dtype).state_dict()
    except Exception:  # at something beside the tensors, such as an index without metadata
        theirs = {EMBEDDING: stored[HEAD]} if EMBEDDING not in stored else {}
        theirs |= {HEAD: stored.get(HEAD, stored.get(EMBEDDING))} | stored
    for name, ours in named_weights(model).items():
        assert ours is None or torch.equal(ours, theirs[name].to(model.dtype)), f"{label}: {name}"
    return True


@pytest.mark.parametrize("shards", [1, 2], ids=["one file", "two shards"])
@pytest.mark.usefixtures("one_thread")
def test_what_loads_is_what_transformers_reads(shards, tmp_path, fuzz_seconds):
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    whole = tmp_path / "whole"
    whole.mkdir()
    checkpoint(whole, shards)
    assert check(whole, "untouched")
    until, loaded, refused, seed = time.monotonic() + fuzz_seconds / 2, 0, 0, 0
    while time.monotonic() < until or seed < 200:
        dice, seed = random.Random(seed), seed + 1
        folder = tmp_path / "spoilt"
        shutil.copytree(whole, folder)
        files = sorted(folder.glob("model*.safetensors"))
        index = folder / "model.safetensors.index.json"
        in_index = shards == 2 and dice.random() < 0.4
        spoil = dice.choice(INDEX if in_index else WEIGHTS)
        spoil(index if in_index else dice.choice(files), dice)
        if check(folder, f"seed {seed - 1}, {spoil.__name__}"):
            loaded += 1
        else:
            refused += 1
        shutil.rmtree(folder)
    assert loaded and refused > loaded, (loaded, refused)
