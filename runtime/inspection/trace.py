"""A trace of one request: what the host does when, and on a GPU the device, for Perfetto and chrome://tracing."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
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
    """A traced request. Printed it is a table.

    Attributes:
        result: its answer.
        ranges: its ranges, the longest first.
        chrome: the Chrome trace, as JSON.
    """

    result: GenerationResult
    ranges: tuple[RangeTime, ...]
    chrome: bytes = field(repr=False)

    def __str__(self) -> str:
        width = max((len(one.name) for one in self.ranges), default=0)
        lines = [f"{'range'.ljust(width)}  count  host ms"]
        lines += [f"{one.name.ljust(width)}  {one.count:5}  {one.total_ms:7.1f}" for one in self.ranges]
        return "\n".join([*lines, "", str(self.result.stats)])


def trace(model: Model, prompt: str, max_new_tokens: int) -> Trace:
    """Answer a prompt while torch's profiler records.

    On a CPU the compiled operations of a step then run one by one instead of as one program, so that each one shows:
    the same tokens, a little later.

    Args:
        model: the model.
        prompt: the text.
        max_new_tokens: most tokens of the answer.

    Raises:
        OutputError: the profiler cannot write into the temporary folder.
    """
    on_gpu = model.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as recorded:
        result = generate(model, prompt, max_new_tokens=max_new_tokens)
        if on_gpu:
            torch.cuda.synchronize(model.device)
    ours = [event for event in recorded.key_averages() if event.key.startswith(PREFIX)]
    ranges = [RangeTime(event.key.removeprefix(PREFIX), event.count, event.cpu_time_total / 1e3) for event in ours]
    return Trace(result, tuple(sorted(ranges, key=lambda one: -one.total_ms)), _exported(recorded))


def _exported(recorded: profile) -> bytes:
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            recorded.export_chrome_trace(str(file))
            if not file.exists():  # the profiler logs what it cannot write, and raises nothing
                raise OSError(f"{tempfile.gettempdir()} may be full")
            return file.read_bytes()
    except OSError as error:
        raise OutputError(f"cannot write the trace into the temporary folder: {error}") from error
