"""`bench compare`: this runtime beside peers on the same weights, each in its own process, in alternating runs."""

from __future__ import annotations

import itertools
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from runtime.bench.gguf_file import OwnFile, fingerprint, gguf_of, own_file
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
    """One engine in the comparison: its process, unless it has failed, and what was measured."""

    row: Row  # without sizes and numbers; it says why the engine is out of the comparison
    resolved: ResolvedModel
    worker: Worker | None = None
    own_file: OwnFile | None = None  # of an engine that runs the model's own GGUF file
    cache_dtype: str = "float32"  # of that engine's KV cache
    first_call_s: dict[Sizes, float] = field(default_factory=dict)
    requests: dict[Sizes, list[Request]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.row.engine

    def add(self, **fields: Any) -> None:
        self.row = self.row.model_copy(update=fields)

    def leave(self, status: str, reason: str) -> None:
        """Takes the engine out of the comparison."""
        self.add(status=status, reason=reason, load_s=None, peak_memory_mb=None)
        if self.worker is not None:
            self.worker.close()
        self.worker = None
        print(f"{self.name}: {reason}", file=sys.stderr)

    @contextmanager
    def taken_out_if_it_fails(self, *not_usable: type[Exception]) -> Iterator[None]:
        skipped: tuple[type[Exception], ...] = (NotInstalled, *not_usable)
        try:
            yield
        except skipped as error:
            self.leave("skipped", f"not usable here: {error}")
        except PeerError as error:
            self.leave("crashed", f"crashed: {error}")

    def start(self, folder: Path, interpreters: dict[str, str], stack: ExitStack) -> None:
        """Starts an engine and loads the model."""
        (file, engine_options), found = ENGINES[self.name], self.resolved
        options: dict[str, Any] = engine_options | {"source": found.name, "folder": str(folder)}
        options |= {name: getattr(found.runtime, name) for name in ("device", "dtype", "max_seq_len", "threads")}
        print(f"{self.name}, {found.runtime.dtype}: loading", file=sys.stderr)
        with self.taken_out_if_it_fails(ImportError, ValueError):  # these say why a file that it needs is not to be had
            self.worker = stack.enter_context(Worker(file, interpreters.get(self.name, sys.executable)))
            self.add(engine_version=self.worker.version)
            if self.name in (OUR_BLOCKS, AS_STORED):
                self.own_file = own_file(found.name)
                self.cache_dtype = "float32" if self.name == OUR_BLOCKS else "float16"
                self.add(dtype=self.own_file.types)
                options |= {"gguf": str(self.own_file.path), "dtype": self.cache_dtype}
            elif file == "llama_cpp":
                options["gguf"] = str(gguf_of(folder, found.runtime.dtype))
            elif file == "openvino":
                options["exported"] = str(_exported(self.worker, folder, found.runtime.dtype))
            self.add(load_s=self.worker.ask(load=options)["load_s"])

    def warm_up(self, prompts: dict[Sizes, list[int]], warmup: int) -> None:
        """Runs the first call of every size, which is timed separately, and the untimed warm-up calls."""
        for size, prompt in prompts.items():
            for number in range(1 + warmup):
                request = self.run(prompt, size[1], warms_up=True)
                if request is not None and not number:
                    self.first_call_s[size] = request.times_s[-1]

    def audit(self) -> None:
        """Audits this runtime after its first calls: an earlier audit would compile what they are to compile."""
        with self.taken_out_if_it_fails():
            if self.worker is not None:
                verdict = Audit(**self.worker.ask(audit={}))
                self.add(audit=verdict)
                if not verdict.passed:
                    self.leave("refused", verdict.verdict)

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
        with self.taken_out_if_it_fails():
            found = self.worker.ask(run={"prompt": prompt, "new_tokens": new_tokens})
            if len(found["tokens"]) != new_tokens:
                raise PeerError(f"gave {len(found['tokens'])} tokens, expected {new_tokens}")
            if warms_up and found["peak_memory_mb"] is not None:
                self.add(peak_memory_mb=max(self.row.peak_memory_mb or 0.0, found["peak_memory_mb"]))
            step_bytes = self.bytes_per_step(len(prompt), new_tokens)
            return Request([found["tokens"]], found["times_s"], len(prompt), step_bytes, read_gb_s)
        return None

    def bytes_per_step(self, *size: int) -> int:
        """Bytes that the middle step of an answer must read, for a prompt and an answer of so many tokens."""
        plan, dtype = self.resolved.plan, self.resolved.runtime.dtype
        if self.own_file is not None:
            return self.own_file.bytes_per_step(plan, dtype, self.cache_dtype, *size)
        return bytes_per_step(plan, size[:1], size[1])

    def finished(self, size: Sizes, repeat: int, ours: Entry | None) -> Row | None:
        """The row of one size; None where the comparison was interrupted before its first run."""
        row = self.row.model_copy(update={"prompt_len": size[0], "gen_len": size[1]})
        requests = self.requests.get(size, [])
        if row.status != "ok" or not requests:
            return row if row.status != "ok" else None
        more: dict[str, Any] = {"first_call_s": self.first_call_s[size]}
        if ours is not None and ours.requests.get(size):
            more["equal_tokens"] = equal_share(requests[0].tokens[0], ours.requests[size][0].tokens[0])
        row = finished(row, requests, torch.device(self.resolved.runtime.device), len(requests), repeat)
        return row.model_copy(update=more)


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
        choices: dict[str, Any] = {"device": options.device, "dtype": dtype, "needs_values": True}  # the peers' too
        found = resolve(options.model, **choices, max_seq_len=room, progress=False)
        yield from _comparison(options, engines, found, folder)
        engines = [name for name in engines if name not in (OUR_BLOCKS, AS_STORED)]  # their weights have own types
        if not engines:
            break


def _comparison(options: Namespace, engines: list[str], found: ResolvedModel, folder: Path) -> Iterator[Row]:
    tokenizer = Tokenizer.from_folder(folder, found.config.vocab)
    sizes = list(itertools.product(options.prompt_len, options.gen_len))
    prompts = {size: prompt_ids(tokenizer, found.config.vocab, size[0]) for size in sizes}
    fields: dict[str, Any] = {"benchmark": "compare", "model": found.name, "dtype": found.runtime.dtype}
    fields |= {"batch_size": 1, "prompt_len": 0, "gen_len": 0}
    entries = {name: Entry(Row(engine=name, **fields), found) for name in engines}
    try:
        with ExitStack() as stack:
            for entry in entries.values():
                entry.start(folder, dict(options.peer), stack)
                entry.warm_up(prompts, options.warmup)
                if ENGINES[entry.name][0] == "ours":
                    entry.audit()
                if entry.row.status == "refused":
                    for other in entries.values():
                        if other is not entry:
                            other.leave("skipped", f"{entry.name} was refused")
                    break
            else:
                _measure(list(entries.values()), prompts, options.repeat, torch.device(found.runtime.device))
    finally:  # what was measured before an interrupt too
        for size, entry in itertools.product(sizes, entries.values()):
            row = entry.finished(size, options.repeat, entries.get(OURS))
            if row is not None:
                yield row


def _measure(entries: list[Entry], prompts: dict[Sizes, list[int]], repeat: int, device: torch.device) -> None:
    """Runs all sizes and engines alternately, so that other load on the machine affects all of them alike."""
    ceiling = ReadBandwidth(device)
    for number in range(repeat):
        print(f"round {number + 1} of {repeat}", file=sys.stderr)
        for size, entry in itertools.product(prompts, rotated(entries, number)):
            request = entry.run(prompts[size], size[1], ceiling=ceiling)
            if request is not None:
                entry.requests.setdefault(size, []).append(request)


def _exported(worker: Worker, folder: Path, dtype: str) -> Path:
    """A checkpoint in the engine's own format, which the engine writes into the cache of converted models."""

    def write(target: Path) -> None:
        worker.ask(export={"folder": str(folder), "target": str(target), "dtype": dtype})

    return cached(f"{worker.version.replace(' ', '-')}-{fingerprint(folder)}-{dtype}", write)


def equal_share(tokens: list[int], ours: list[int]) -> float:
    """The share of positions at which two answers of one length have the same token."""
    return sum(a == b for a, b in zip(tokens, ours, strict=True)) / len(ours)
