"""A trace of one request: what the host does when, and on a GPU the device, for Perfetto and chrome://tracing."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from runtime.engine.ranges import PREFIX
from runtime.engine.result import GenerationResult
from runtime.errors import OutputError
from runtime.generation import generate
from runtime.model.model import Model


@dataclass(frozen=True)
class RangeTime:
    """All ranges of one name.

    Attributes:
        name: "step", "prefill chunk", "readback", or that of an operation.
        count: how many there were.
        total_ms: host time spent in them, nested ranges included.
    """

    name: str
    count: int
    total_ms: float


@dataclass(frozen=True)
class Trace:
    """A traced request: its answer, and its ranges, the longest first. Printed it is a table."""

    result: GenerationResult
    ranges: tuple[RangeTime, ...]

    def __str__(self) -> str:
        width = max((len(one.name) for one in self.ranges), default=0)
        lines = [f"{'range'.ljust(width)}  count  host ms"]
        lines += [f"{one.name.ljust(width)}  {one.count:5}  {one.total_ms:7.1f}" for one in self.ranges]
        return "\n".join([*lines, "", str(self.result.stats)])


def trace(model: Model, prompt: str, file: str | os.PathLike[str], max_new_tokens: int) -> Trace:
    """Answer a prompt while torch's profiler records, and write a Chrome trace.

    On a CPU the compiled operations of a step then run one by one instead of as one program, so that each one shows:
    the same tokens, a little later.

    Args:
        model: the model.
        prompt: the text.
        file: where the trace is written, compressed if its name ends in .gz.
        max_new_tokens: most tokens of the answer.

    Raises:
        OutputError: the file cannot be written.
    """
    on_gpu = model.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as recorded:
        result = generate(model, prompt, max_new_tokens=max_new_tokens)
        if on_gpu:
            torch.cuda.synchronize(model.device)
    with tempfile.TemporaryDirectory() as folder:  # the profiler puts a new file in place of a device, pipe or link
        made = Path(folder) / Path(file).name
        recorded.export_chrome_trace(str(made))
        try:
            Path(file).write_bytes(made.read_bytes())
        except OSError as error:
            raise OutputError(f"cannot write the trace {os.fspath(file)}: {error.strerror or error}") from error
    ours = [event for event in recorded.key_averages() if event.key.startswith(PREFIX)]
    ranges = [RangeTime(event.key.removeprefix(PREFIX), event.count, event.cpu_time_total / 1e3) for event in ours]
    return Trace(result, tuple(sorted(ranges, key=lambda one: -one.total_ms)))
