"""Models from a hub, tried against one on loopback: what is asked for, in which order, and what each failure says."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import runtime
from runtime.api import load
from runtime.bench.small_models import save_small_model
from runtime.checkpoint import sources
from runtime.checkpoint.cache import CACHE_ENV
from runtime.cost import plan
from runtime.errors import (
    AccessDenied,
    CacheError,
    CheckpointError,
    GemmaRuntimeError,
    HubError,
    InvalidArgument,
    ModelNotFound,
)
from runtime.loading import resolve

from .container_files import Variant, pack_model, save_plain_model
from .hub_server import COMMIT, Hub, failing, serving, stalling

pytestmark = pytest.mark.newest_only  # about code of our own

NAME = "google/tiny"
LIMITS: dict[str, Any] = {"device": "cpu", "max_seq_len": 64, "progress": False, "eager": True}
SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
SECRET = "hf_thisIsASecret"


@pytest.fixture
def hub(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one model, which huggingface_hub is made to ask, with an empty cache and no waiting to retry."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for module in ("utils._http", "file_download"):
            monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=lambda seconds: None))
        huggingface_hub.close_session()
        hub.add(NAME, tiny_folder)
        yield hub
        huggingface_hub.close_session()


def test_weights_are_quantised_once_they_are_downloaded(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "own"))
    save_small_model("gemma", tmp_path / "small", hidden_size=64, intermediate_size=64, head_dim=16)
    hub.add("google/small", tmp_path / "small")
    resolved = resolve("google/small", quantize="int8", **LIMITS)
    assert not list((tmp_path / "own").glob("int8-*")) and not (resolved.source.folder / "model.safetensors").exists()
    model = load("google/small", quantize="int8", **LIMITS)
    assert model.weights.formats == "INT8" and model.plan.weights == resolved.plan.weights == model.weights.nbytes


def test_a_container_is_checked_before_its_weights_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    packed = pack_model(save_plain_model("gemma", tmp_path / "plain"), Variant("gptq"))
    hub.add("google/packed", packed.write(tmp_path / "packed"))
    resolved = resolve("google/packed", **LIMITS)
    assert not (resolved.source.folder / "model.safetensors").exists()
    model = load("google/packed", **LIMITS)
    assert model.weights.formats == "BF16 + Q4_0_BF16"
    assert model.plan.weights == resolved.plan.weights == model.weights.nbytes
    del packed.tensors["model.layers.1.mlp.up_proj.scales"]
    hub.add("google/lacking", packed.write(tmp_path / "lacking"))
    with pytest.raises(CheckpointError, match=r"up_proj\.scales is missing: google/lacking/model\.safetensors$"):
        load("google/lacking", **LIMITS)


def weights_asked_for(hub: Hub) -> list[str]:
    return [path for path in hub.paths() if path.endswith((".safetensors", ".bin"))]


def change_config(hub: Hub, **changes: Any) -> None:
    files = hub.models[NAME]
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | changes).encode()


def split_weights(hub: Hub) -> None:
    """The model in two shards and an index."""
    from safetensors.torch import load as parse
    from safetensors.torch import save

    files = hub.models[NAME]
    tensors = list(parse(files.pop("model.safetensors")).items())
    shards = {f"model-0000{i + 1}-of-00002.safetensors": dict(tensors[i::2]) for i in range(2)}
    places = {name: shard for shard, part in shards.items() for name in part}
    files |= {shard: save(part) for shard, part in shards.items()}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": places}).encode()


def rewrite_weights(hub: Hub, extra: dict[str, Any] | None = None, metadata: dict[str, str] | None = None) -> None:
    """The weights with further tensors, or with metadata in their header."""
    from safetensors.torch import load as parse
    from safetensors.torch import save

    files = hub.models[NAME]
    files["model.safetensors"] = save(parse(files["model.safetensors"]) | (extra or {}), metadata)


# What is downloaded


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_a_model_of_the_hub_is_the_same_model(hub: Hub, tiny_folder: Path, sharded: bool) -> None:
    surplus = ["consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "eval.json", "README.md"]
    hub.models[NAME] |= {name: bytes(100) for name in [*surplus, "original/model.safetensors"]}
    if sharded:
        split_weights(hub)
    model = load(NAME, **LIMITS)
    prompt = "A dog"
    assert (
        runtime.generate(model, prompt, max_new_tokens=8).token_ids
        == runtime.generate(load(tiny_folder, **LIMITS), prompt, max_new_tokens=8).token_ids
    )
    assert model.name == NAME
    got = {path.rpartition("/")[2] for path in hub.paths() if "/resolve/" in path}
    index = {"model.safetensors.index.json"} if sharded else set()
    assert got == {*SMALL, *index, *(name for name in hub.models[NAME] if name.startswith("model-"))} | (
        set() if sharded else {"model.safetensors"}
    )
    names = [path.rpartition("/")[2] for path in hub.paths()]
    weights = [at for at, name in enumerate(names) if name.endswith(".safetensors")]
    assert names.index("tokenizer.json") < weights[0] and names.index("config.json") < weights[0]


def test_what_is_in_the_cache_is_not_downloaded_again(hub: Hub) -> None:
    load(NAME, **LIMITS)
    hub.requests.clear()
    load(NAME, **LIMITS)
    assert [path for path in hub.paths() if "/resolve/" in path or "cdn" in path] == []


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"model_type": "llama"}, {}, "not a Gemma"),
        ({"quantization_config": {"quant_method": "fp8"}}, {}, "quanti"),
        ({}, {"max_seq_len": 257}, r"max_position_embeddings \(256\), got 257"),
    ],
    ids=["another architecture", "quantised", "too long"],
)
def test_a_config_that_is_refused_costs_no_weights(hub: Hub, changes: Any, options: Any, message: str) -> None:
    change_config(hub, **changes)
    with pytest.raises(GemmaRuntimeError, match=message):
        load(NAME, **(LIMITS | options))
    assert weights_asked_for(hub) == []


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_tensors_that_are_refused_cost_no_more_than_their_headers(hub: Hub, sharded: bool, ranges: bool) -> None:
    hub.ranges, hub.chunk_delay_s = ranges, 0.001
    rewrite_weights(hub, extra={"surplus": torch.zeros(32 << 20, dtype=torch.uint8).view(torch.bfloat16)})
    if sharded:
        split_weights(hub)
    with pytest.raises(CheckpointError, match=f"^tensor surplus is not part of this model: {NAME}$"):
        load(NAME, **LIMITS)
    assert hub.sent(".safetensors") < 16 << 20  # what a closed connection still had in flight


def test_a_header_of_any_length_is_read(hub: Hub) -> None:
    rewrite_weights(hub, metadata={"note": "x" * 300_000})
    assert resolve(NAME, **LIMITS).config.family == "gemma3"
    assert 300_000 < hub.sent("/model.safetensors") < 700_000


def test_a_plan_and_what_does_not_fit_cost_no_weights(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan.gather(NAME, gpu="h100")
    assert weights_asked_for(hub) == []
    monkeypatch.setattr("runtime.model.memory_plan.available_bytes", lambda device: 1000)
    with pytest.raises(runtime.NotEnoughMemory):
        load(NAME, **LIMITS)
    assert "HEAD" not in {request.method for request in hub.requests if request.path.endswith(".safetensors")}


def test_a_revision_is_what_is_loaded(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.revisions |= {"refs/pr/1": "1" * 40, "v1.0": "2" * 40}
    assert load(NAME, **LIMITS, revision="refs/pr/1").name == f"{NAME}@refs/pr/1"
    assert resolve(f"{NAME}@{'2' * 40}", **LIMITS).source.folder.name == "2" * 40
    assert resolve(f"{NAME}@v1.0", **LIMITS).source.folder.name == "2" * 40
    assert resolve(NAME, **LIMITS).source.folder.name == COMMIT
    monkeypatch.setenv(sources.MODEL_ENV, NAME)
    assert load(**LIMITS, revision="v1.0").name == f"{NAME}@v1.0"
    with pytest.raises(ModelNotFound, match=f"{hub.endpoint}/{NAME} has no revision v2"):
        load(NAME, **LIMITS, revision="v2")


@pytest.mark.parametrize("revision", ["", "../main", "a..b", "a b", "-x", "/x", "x/", "a//b", "a\nb", "~1"])
def test_what_can_be_no_revision_is_not_asked_for(hub: Hub, revision: str) -> None:
    with pytest.raises(InvalidArgument, match="a revision must be"):
        load(NAME, **LIMITS, revision=revision)
    with pytest.raises(InvalidArgument, match="a revision must be"):
        load(f"{NAME}@{revision}", **LIMITS)
    assert hub.requests == []


def test_a_revision_goes_with_a_hub_id(hub: Hub, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for source in (tiny_folder, str(tiny_folder), tmp_path / "m.gguf", "demo", "no/such/model"):
        with pytest.raises(InvalidArgument, match="a revision goes with a hub id"):
            load(source, **LIMITS, revision="main")
    with pytest.raises(InvalidArgument, match="names a revision, but"):
        load(f"{NAME}@v1", **LIMITS, revision="v1")
    assert hub.requests == []


def test_the_token_goes_to_the_hub_alone_and_into_no_message(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    load(NAME, **LIMITS)
    for request in hub.requests:
        assert request.authorization == (None if request.path.startswith("/cdn") else f"Bearer {SECRET}"), request
    hub.faults["/api/"] = failing(400, f"what is {SECRET}?".encode())
    with pytest.raises(HubError, match=r"400 Bad Request, what is \*\*\*\?"):
        load(f"{NAME}@v3", **LIMITS)


# Repositories that cannot be loaded


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a-Q4_K_M.gguf", "a-Q8_0.GGUF", "README.md"], r"found GGUF: give the path.*\(a-Q4_K_M.gguf, a-Q8_0.GGUF\)"),
        (["config.json", "sub/a.gguf"], r"found GGUF.*\(sub/a.gguf\)"),
        (["adapter_config.json", "config.json", "adapter_model.bin"], "found an adapter.*merge it"),
        (["config.json", "pytorch_model.bin"], r"found pickle weights.*\(pytorch_model.bin\)"),
        (["config.json", "int8/model.safetensors"], r"found safetensors files.*\(int8/model.safetensors\)"),
        (["model.safetensors", "README.md"], "found safetensors|no config.json"),
        (["README.md", "config.json"], r"found no weights, but README.md, config.json"),
        ([], "it is empty"),
    ],
    ids=lambda value: "+".join(value) or "empty" if isinstance(value, list) else "",
)
def test_a_repository_that_cannot_be_loaded_is_described(hub: Hub, names: list[str], message: str) -> None:
    config = hub.models[NAME]["config.json"]
    hub.models[NAME] = {name: config if name == "config.json" else b"{}" for name in names}
    what = "model.safetensors or model.safetensors.index.json" if "config.json" in names else "config.json"
    with pytest.raises(ModelNotFound, match=f"^no {what} in {NAME}: .*{message}") as caught:
        load(NAME, **LIMITS)
    assert "\n" not in str(caught.value) and weights_asked_for(hub) == []


def test_an_index_without_its_shard_is_named(hub: Hub) -> None:
    split_weights(hub)
    del hub.models[NAME]["model-00002-of-00002.safetensors"]
    with pytest.raises(CheckpointError, match=rf"names model-00002-of-00002.safetensors, which is not in {NAME}$"):
        load(NAME, **LIMITS)


def test_an_index_cannot_lead_out_of_the_cache(hub: Hub) -> None:
    split_weights(hub)
    hub.models[NAME]["model.safetensors.index.json"] = b'{"weight_map": {"a": "../../x.safetensors"}}'
    hub.models[NAME]["../../x.safetensors"] = b"x"
    with pytest.raises(GemmaRuntimeError):
        load(NAME, **LIMITS)


def test_a_dataset_is_no_model(hub: Hub) -> None:
    hub.datasets.add("google/data")
    with pytest.raises(ModelNotFound, match=f"^google/data is a dataset of {hub.endpoint}, not a model$"):
        load("google/data", **LIMITS)


# Failures


REFUSALS: dict[str, tuple[Any, type[Exception], str]] = {
    "gated": (
        failing(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted"),
        AccessDenied,
        "is gated .403 Forbidden, Access is restricted.: accept its licence on {page} and set HF_TOKEN",
    ),
    "missing": (
        failing(404, X_Error_Code="RepoNotFound"),
        ModelNotFound,
        "no such model on the hub .{page}: 404 Not F",
    ),
    "private": (failing(401, X_Error_Code="RepoNotFound"), ModelNotFound, "{page}: 401 .*a private one needs HF_TOKEN"),
    "forbidden": (
        failing(403, b"Not from your country"),
        AccessDenied,
        "{page} refuses access .403 Forbidden, Not from",
    ),
    "limited": (failing(429, b"Slow down"), HubError, "{page} .*429 Too Many Requests, Slow down"),
    "error": (failing(500), HubError, "{page} .*500 Internal Server Error"),
    "bad gateway": (failing(502, b"<html>", Content_Type="text/html"), HubError, "{page} .*502 Bad Gateway$"),
    "busy": (failing(503), HubError, "{page} .*503 Service Unavailable"),
    "log in to the network": (failing(511), HubError, "{page} .*511 Network Authentication Required"),
    "a login page": (
        failing(200, b"<html>", Content_Type="text/html"),
        HubError,
        "{hub} does not answer as a hub: 200",
    ),
    "another list": (failing(200, b"[]"), HubError, "{hub} does not answer as a hub"),
    "a redirect loop": (failing(302, Location="/api/models/x"), HubError, "{page} cannot be reached: .*redirects"),
    "no answer": (stalling(2), HubError, "{page} cannot be reached: .*timed out"),
    "cut off": (stalling(0), HubError, "{page} cannot be reached: "),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("path", ["/api/", "/resolve/main/config.json", "/model.safetensors"])
def test_a_failure_names_the_hub_its_status_and_its_reason(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, case: str, path: str
) -> None:
    fault, kind, message = REFUSALS[case]
    if case == "no answer":
        for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT", "DEFAULT_ETAG_TIMEOUT"):
            monkeypatch.setattr(constants, name, 0.05)
        monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 0.05)
    hub.faults[path] = fault
    with pytest.raises(GemmaRuntimeError) as caught:
        load(NAME, **LIMITS)
    said = str(caught.value)
    assert "\n" not in said and "huggingface.co" not in said and len(said) < 500
    assert hub.endpoint in said
    if path == "/api/":
        assert isinstance(caught.value, kind)
        assert re.search(message.format(page=f"{hub.endpoint}/{NAME}", hub=hub.endpoint), said), said


def test_an_expired_token_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.faults["/api/"] = failing(401, X_Error_Message="Invalid credentials in Authorization header")
    with pytest.raises(
        AccessDenied, match=f"^{hub.endpoint} does not accept the token .401 Unauthorized, Invalid cred"
    ):
        load(NAME, **LIMITS)


def test_what_may_pass_is_tried_again(hub: Hub) -> None:
    left = {"/api/": 3, "/resolve/main/config.json": 3, "/cdn/": 1}

    def first(part: str, status: int) -> Any:
        def fault(exchange: Any) -> None:
            left[part] -= 1
            if not left[part]:
                del hub.faults[part]
            exchange.reply(status)

        return fault

    hub.faults |= {part: first(part, 503 if part != "/cdn/" else 429) for part in left}
    assert load(NAME, **LIMITS).name == NAME
    assert hub.faults == {}


@pytest.mark.parametrize("how", ["refused", "unknown host", "no TLS"])
def test_a_hub_that_cannot_be_reached(hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = {
            "refused": f"http://127.0.0.1:{unused.getsockname()[1]}",
            "unknown host": "http://no-such-host.invalid",
            "no TLS": hub.endpoint.replace("http:", "https:"),
        }[how]
        monkeypatch.setattr(constants, "ENDPOINT", address.replace("//", "//user:password@"))
        monkeypatch.setenv("no_proxy", "*")
        with pytest.raises(HubError) as caught:
            load(NAME, **LIMITS)
    reason = {"refused": "refused", "unknown host": "name|known|resolution", "no TLS": "SSL"}[how]
    assert re.search(
        f"^{NAME} is not in the cache, and {address}/{NAME} cannot be reached: .*({reason})", str(caught.value)
    )
    assert "password" not in str(caught.value)


# The cache


def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    hub.requests.clear()
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    else:
        hub.faults[""] = failing(int(how))


@pytest.mark.parametrize("how", ["offline", "unreachable", "503", "401"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_what_is_whole_in_the_cache_needs_no_hub(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str, sharded: bool
) -> None:
    if sharded:
        split_weights(hub)
    load(NAME, **LIMITS)
    offline(hub, monkeypatch, how)
    assert load(NAME, **LIMITS).name == NAME
    assert load(f"{NAME}@{COMMIT}", **LIMITS)
    assert len(hub.requests) <= 2  # and it is not asked again and again
    with pytest.raises(GemmaRuntimeError, match="HF_HUB_OFFLINE" if how == "offline" else "http://127"):
        load(f"{NAME}@other", **LIMITS)


@pytest.mark.parametrize("how", ["offline", "unreachable", "503"])
def test_what_the_cache_lacks_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    split_weights(hub)
    part = Path(load_folder()) / "model-00002-of-00002.safetensors"
    offline(hub, monkeypatch, how)
    part.unlink()
    with pytest.raises(HubError, match=f"^{part.name} of {NAME} is not in the cache, and http://127"):
        load(NAME, **LIMITS)
    assert plan.gather(NAME, gpu="h100")  # which needs the config only


def load_folder() -> Path:
    return sources.resolve(NAME, progress=False)


def test_a_cache_without_links(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    monkeypatch.setattr("huggingface_hub.file_download._are_symlinks_supported_in_dir", {})
    assert load(NAME, **LIMITS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load(NAME, **LIMITS)


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(CacheError, match=r"^cannot write the hub's cache .*file: "):
        load(NAME, **LIMITS)


# The command line


@pytest.fixture
def command(hub: Hub, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts `gemma-runtime` against the hub."""
    added = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONSAFEPATH": "1",
        "HF_HUB_VERBOSITY": "error",
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | added

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "runtime", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    return start


def test_ctrl_c_ends_a_download_at_once(hub: Hub, command: Callable[..., subprocess.Popen[str]]) -> None:
    rewrite_weights(hub, metadata={"note": "x" * 2_000_000})
    hub.chunk_delay_s = 0
    slow = hub.models[NAME]["model.safetensors"] + bytes(8 << 20)

    def trickle(exchange: Any) -> None:
        hub.chunk_delay_s = 1.0
        exchange.reply(200, slow, ETag='"x"')

    hub.faults["/cdn/"] = trickle
    process = command("generate", "A dog", "--model", NAME, "--max-seq-len", "64")
    try:
        deadline = time.monotonic() + 60
        while hub.chunk_delay_s == 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "")
    assert time.monotonic() - started < 5


def test_the_command_line_in_one_line_without_bars(hub: Hub, command: Callable[..., subprocess.Popen[str]]) -> None:
    asked = ["generate", "A dog", "--model", NAME, "--max-seq-len", "64", "--max-new-tokens", "4", "--eager"]
    known, unknown = command(*asked, "--revision", "main"), command(*asked, "--revision", "v2")
    out, err = known.communicate(timeout=120)
    assert (known.returncode, err) == (0, "") and out
    out, err = unknown.communicate(timeout=120)
    assert (unknown.returncode, out) == (2, "")
    assert (
        err == f"gemma-runtime: error: {hub.endpoint}/{NAME} has no revision v2 (404 Not Found, Invalid rev id: v2)\n"
    )
