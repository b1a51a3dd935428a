"""`bench compare`: this runtime beside peers on the same weights, each in its own process, in alternating runs."""

from __future__ import annotations

import itertools
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from runtime.bench.gguf_file import OwnFile, own_file
from runtime.bench.gguf_peer import fingerprint, gguf_of
from runtime.bench.measure import (
    LEAST_SEQ_LEN,
    UNMEASURED,
    Request,
    bytes_per_step,
    finished,
    folder_of,
    prompt_ids,
    rotated,
)  # fmt: skip
from runtime.bench.records import Audit, Row
from runtime.bench.worker import NotInstalled, PeerError, Worker
from runtime.checkpoint.cache import cached
from runtime.cost.bandwidth import ReadBandwidth
from runtime.loading import ResolvedModel, read_config, resolve
from runtime.text.tokenizer import Tokenizer

OURS = "gemma-runtime"
# These run the model's own GGUF file, whatever its types.
OUR_BLOCKS, AS_STORED = "gemma-runtime-gguf", "llama.cpp-gguf"
# Name -> the engine's file in peers/ and its options beside the model.
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    OURS: ("ours", {}),
    OUR_BLOCKS: ("ours", {"quantize": "gguf"}),
    "hf-dynamic": ("hugging_face", {"cache": "dynamic", "compile": False}),
    "hf-static": ("hugging_face", {"cache": "static", "compile": False}),
    "hf-compile": ("hugging_face", {"cache": "static", "compile": True}),
    "llama.cpp": ("llama_cpp", {}),
    AS_STORED: ("llama_cpp", {}),
    "vllm": ("vllm", {}),
    "openvino": ("openvino", {}),
}
# Threads of the engine that ran last may still spin, OpenMP's for up to 0.2 s.
SETTLE_S = 0.25

Sizes = tuple[int, int]  # prompt and answer, in tokens


@dataclass
class Entry:
    """One engine in the comparison: its process or, once it has failed, the reason."""

    name: str
    worker: Worker | None = None
    version: str | None = None
    status: str = "ok"
    reason: str | None = None
    audit: Audit | None = None
    own_file: OwnFile | None = None  # of an engine that runs the model's own GGUF file
    cache_dtype: str | None = None  # of its KV cache
    load_s: float | None = None
    peak_memory_mb: float | None = None
    first_call_s: dict[Sizes, float] = field(default_factory=dict)
    requests: dict[Sizes, list[Request]] = field(default_factory=dict)

    def fail(self, error: PeerError) -> None:
        """Takes the engine out of the comparison."""
        missing = isinstance(error, NotInstalled)
        self.status, self.reason = (
            ("skipped", f"not usable here: {error}") if missing else ("crashed", f"crashed: {error}")
        )
        if self.worker is not None:
            self.worker.close()
        self.worker = None
        print(f"{self.name}: {self.reason}", file=sys.stderr)

    def run(
        self, prompt: list[int], new_tokens: int, *, ceiling: ReadBandwidth | None = None, warms_up: bool = False
    ) -> Request | None:
        """One request, with the ceiling measured directly before it if there is one; None if the engine failed. Peak
        memory is taken from warm-up requests, before any audit."""
        if self.worker is None:
            return None
        read_gb_s = UNMEASURED
        time.sleep(SETTLE_S)
        if ceiling is not None:
            read_gb_s = ceiling.gb_s()
            time.sleep(SETTLE_S)
        try:
            found = self.worker.ask(run={"prompt": prompt, "new_tokens": new_tokens})
            if len(found["tokens"]) != new_tokens:
                raise PeerError(f"gave {len(found['tokens'])} tokens, expected {new_tokens}")
        except PeerError as error:
            self.fail(error)
            return None
        if warms_up and found["peak_memory_mb"] is not None:
            self.peak_memory_mb = max(self.peak_memory_mb or 0.0, found["peak_memory_mb"])
        return Request([found["tokens"]], found["times_s"], read_gb_s)


def rows(options: Namespace) -> Iterator[Row]:
    """The rows of a comparison, dtype by dtype: for each size one row per engine.

    Args:
        options: model, device, warmup, repeat; engines, names or None for all; peer, pairs of a name and an
            interpreter; and lists: dtype, prompt_len, gen_len.

    Raises:
        ValueError: an engine is unknown.
        KeyboardInterrupt: re-raised after the rows of finished measurements.
    """
    engines = list(ENGINES) if options.engines is None else options.engines
    for name in (*engines, *(name for name, _ in options.peer)):
        if name not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    folder = folder_of(options.model)
    longest = max(options.prompt_len) + max(options.gen_len)
    room = max(longest, min(LEAST_SEQ_LEN, read_config(folder).max_position_embeddings))
    for dtype in options.dtype:
        found = resolve(options.model, device=options.device, dtype=dtype, max_seq_len=room, progress=False)
        yield from _comparison(options, engines, found, folder)
        engines = [name for name in engines if name not in (OUR_BLOCKS, AS_STORED)]  # their weights have own types
        if not engines:
            break


def _comparison(options: Namespace, engines: list[str], found: ResolvedModel, folder: Path) -> Iterator[Row]:
    device = torch.device(found.runtime.device)
    tokenizer = Tokenizer.from_folder(folder, found.config.vocab)
    entries = [Entry(name) for name in engines]
    sizes = list(itertools.product(options.prompt_len, options.gen_len))
    prompts = {size: prompt_ids(tokenizer, found.config.vocab, size[0]) for size in sizes}
    stopped: KeyboardInterrupt | None = None
    with ExitStack() as stack:
        try:
            if prepare(entries, found, folder, prompts, options.warmup, dict(options.peer), stack):
                _measure(entries, prompts, options.repeat, ReadBandwidth(device))
        except KeyboardInterrupt as interrupt:
            stopped = interrupt
    ours = next((entry for entry in entries if entry.name == OURS), None)
    for size, entry in itertools.product(sizes, entries):
        row = _row(entry, found, size)
        requests = entry.requests.get(size, [])
        if ours is not None and ours.status == "refused" and entry is not ours:
            row = row.model_copy(update={"status": "skipped", "reason": f"{OURS} was refused"})
        elif entry.status == "ok" and requests:
            more: dict[str, Any] = {"first_call_s": entry.first_call_s[size], "peak_memory_mb": entry.peak_memory_mb}
            step_bytes = bytes_per_step(found.plan, [size[0]], size[1])
            if entry.own_file is not None and entry.cache_dtype is not None:
                dtypes = (found.runtime.dtype, entry.cache_dtype)
                step_bytes = entry.own_file.bytes_per_step(found.plan, *dtypes, *size)
            if ours is not None and ours.requests.get(size):
                more["equal_tokens"] = equal_share(requests[0].tokens[0], ours.requests[size][0].tokens[0])
            tokens, steps = [size[0]] * len(requests), [step_bytes] * len(requests)
            row = finished(row, requests, tokens, steps, device, len(requests), options.repeat)
            row = row.model_copy(update=more)
        elif entry.status == "ok":
            continue  # interrupted before its first run
        yield row
    if stopped is not None:
        raise stopped


def prepare(
    entries: list[Entry],
    found: ResolvedModel,
    folder: Path,
    prompts: dict[Sizes, list[int]],
    warmup: int,
    interpreters: dict[str, str],
    stack: ExitStack,
) -> bool:
    """Starts and warms up the engines one by one, and audits this runtime; returns whether they may be timed."""
    for entry in entries:
        start_engine(entry, found, folder, interpreters, stack)
        warm_up(entry, prompts, warmup)
        if ENGINES[entry.name][0] == "ours":
            audit_engine(entry)
        if entry.status == "refused":
            return False
    return True


def start_engine(
    entry: Entry, found: ResolvedModel, folder: Path, interpreters: dict[str, str], stack: ExitStack
) -> None:
    """Starts an engine and loads it."""
    file, engine_options = ENGINES[entry.name]
    options = engine_options | {
        "source": found.name,
        "folder": str(folder),
        "device": found.runtime.device,
        "dtype": found.runtime.dtype,
        "max_seq_len": found.runtime.max_seq_len,
        "threads": found.runtime.threads,
    }
    print(f"{entry.name}, {found.runtime.dtype}: loading", file=sys.stderr)
    try:
        entry.worker = stack.enter_context(Worker(file, interpreters.get(entry.name, sys.executable)))
        entry.version = entry.worker.version
        if entry.name in (OUR_BLOCKS, AS_STORED):
            entry.own_file = _own_file(found.name)
            entry.cache_dtype = "float32" if entry.name == OUR_BLOCKS else "float16"
            options |= {"gguf": str(entry.own_file.path), "dtype": entry.cache_dtype}
        elif file == "llama_cpp":
            options["gguf"] = str(_gguf(folder, found.runtime.dtype))
        elif file == "openvino":
            options["exported"] = str(_exported(entry.worker, folder, found.runtime.dtype))
        entry.load_s = entry.worker.ask(load=options)["load_s"]
    except PeerError as error:
        entry.fail(error)


def warm_up(entry: Entry, prompts: dict[Sizes, list[int]], warmup: int) -> None:
    """Runs an engine's first call of every size, which is timed apart, and the untimed warm-up calls."""
    for size, prompt in prompts.items():
        for number in range(1 + warmup):
            request = entry.run(prompt, size[1], warms_up=True)
            if request is not None and not number:
                entry.first_call_s[size] = request.times_s[-1]


def audit_engine(entry: Entry) -> None:
    """Audits this runtime, after its first calls: an earlier audit would compile for them."""
    if entry.worker is None:
        return
    try:
        entry.audit = Audit(**entry.worker.ask(audit={}))
    except PeerError as error:
        return entry.fail(error)
    if not entry.audit.passed:
        entry.status, entry.reason = "refused", entry.audit.verdict


def _own_file(source: str) -> OwnFile:
    try:
        return own_file(source)
    except (ImportError, ValueError) as error:
        raise NotInstalled(f"it runs a GGUF file as it is: {error}") from None


def _gguf(folder: Path, dtype: str) -> Path:
    try:
        return gguf_of(folder, dtype)
    except (ImportError, ValueError) as error:
        raise NotInstalled(f"writing its GGUF file: {error}") from None


def _exported(worker: Worker, folder: Path, dtype: str) -> Path:
    """A checkpoint in the engine's own format, which the engine writes into the cache of converted models."""

    def write(target: Path) -> None:
        worker.ask(export={"folder": str(folder), "target": str(target), "dtype": dtype})

    return cached(f"{worker.version.replace(' ', '-')}-{fingerprint(folder)}-{dtype}", write)


def _measure(entries: list[Entry], prompts: dict[Sizes, list[int]], repeat: int, ceiling: ReadBandwidth) -> None:
    """Runs all sizes and engines alternately, so that other load on the machine affects all of them alike."""
    for number in range(repeat):
        print(f"round {number + 1} of {repeat}", file=sys.stderr)
        for size, entry in itertools.product(prompts, rotated(entries, number)):
            request = entry.run(prompts[size], size[1], ceiling=ceiling)
            if request is not None:
                entry.requests.setdefault(size, []).append(request)


def _row(entry: Entry, found: ResolvedModel, size: Sizes) -> Row:
    return Row(
        benchmark="compare",
        engine=entry.name,
        engine_version=entry.version,
        status=entry.status,  # type: ignore[arg-type]
        reason=entry.reason,
        audit=entry.audit,
        model=found.name,
        dtype=entry.own_file.types if entry.own_file else found.runtime.dtype,
        batch_size=1,
        prompt_len=size[0],
        gen_len=size[1],
        load_s=entry.load_s if entry.status == "ok" else None,
    )


def equal_share(tokens: list[int], ours: list[int]) -> float:
    """The share of positions at which two answers of one length have the same token."""
    return sum(a == b for a, b in zip(tokens, ours, strict=True)) / len(ours)
