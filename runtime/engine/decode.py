"""Decoding: one step on a state, and the host's loop over steps.

A step reads and writes the tensors of a `DecodeState` and reads the weights, nothing else: the same launches with the
same shapes, scalars and addresses every time, whatever the position. Token, position and stop test stay on the device.
On a GPU the step is captured in a CUDA graph, and the host reads tokens some steps behind. On a CPU it is captured as
calls of compiled kernels.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Generator
from contextlib import nullcontext
from typing import Any

import torch

from runtime import kernels
from runtime.engine.capture import capturing
from runtime.engine.engine import engine_of
from runtime.engine.readback import PinnedReadback, Readback
from runtime.errors import InvalidArgument
from runtime.families import FAMILIES
from runtime.families.state import DecodeState
from runtime.kernels import cpu_calls
from runtime.model.model import Model
from runtime.model.threads import torch_threads

HOST_LAG = 4  # steps that the GPU is kept ahead of the host, so that it never waits for one


@torch.inference_mode()
def decode_step(model: Model, state: DecodeState) -> None:
    """Takes every row one token further. Everything it changes is in `state`."""
    FAMILIES[model.config.family].decode(model, state)
    kernels.advance(
        state.token,
        state.x,
        state.position,
        state.done,
        state.emitted,
        state.step,
        model.weights.embedding,
        state.stop_ids,
        embed_scale=state.embed_scale,
        pad=state.pad,
    )


class StepGraph:
    """Decode steps on one state as a CUDA graph: warmed up, captured once, replayed for ever.

    Every address in it is one of the state or of the weights, and the position is read from the device: one graph
    serves every token and every context length. It keeps neither of them alive: whoever holds it must.
    """

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, model: Model, state: DecodeState) -> None:
        """Compiles and loads every kernel by taking one step, then puts back what a step moves on.

        The step writes the cache slot of each row's next position, which the real step writes again.
        """
        moved = [state.token, state.position, state.done, state.step, state.x, state.emitted]
        moved += [] if state.logits is None else [state.logits]
        before = [tensor.clone() for tensor in moved]
        decode_step(model, state)
        for tensor, value in zip(moved, before, strict=True):
            tensor.copy_(value)

    def capture(self, model: Model, state: DecodeState, steps: int = 1, pool: Any = None) -> None:
        """Records `steps` decode steps; nothing runs. `pool` is a memory pool to share with other graphs."""
        with capturing(self._graph, model.device, pool):
            for _ in range(steps):
                decode_step(model, state)

    def replay(self) -> None:
        """Takes the steps. Returns at once; the device runs them in stream order."""
        self._graph.replay()


class StepCalls:
    """A decode step on a CPU as calls of compiled kernels: captured once, replayed for ever. It keeps the memory of the
    tensors that it reads and writes."""

    def __init__(self) -> None:
        self._calls = cpu_calls.Calls()
        self._threads = 1

    def capture(self, model: Model, state: DecodeState) -> None:
        """Records one decode step; nothing runs."""
        self._calls = cpu_calls.captured(lambda: decode_step(model, state))
        self._threads = model.runtime.threads

    def replay(self) -> None:
        """Takes the step."""
        cpu_calls.run(self._calls, self._threads)


def stepper(model: Model, state: DecodeState, steps: int = 1) -> Callable[[], None]:
    """What takes `steps` steps on a state in the fastest way its device has, captured on first use: a CUDA graph, or on
    a CPU one step's calls of compiled kernels. Or the plain step, where the model's `eager` says so, where a CPU has no
    compiled kernels and, with one warning that names the cause, where a GPU's capture fails."""

    plain = _times(steps, functools.partial(_plain_step, model, state))
    if model.runtime.eager or (model.device.type == "cpu" and cpu_calls.missing(model.dtype)):
        return plain
    if model.device.type == "cpu":
        if 1 not in state.graphs:
            calls = StepCalls()
            calls.capture(model, state)
            state.graphs[1] = calls  # complete, as all that is kept here: what an interrupt cuts short is made again
        return _times(steps, state.graphs[1].replay)
    if steps not in state.graphs:
        graph = StepGraph()
        graph.warm_up(model, state)
        engine = engine_of(model)
        if engine.graph_pool is None:
            engine.graph_pool = torch.cuda.graph_pool_handle()
        try:
            graph.capture(model, state, steps, engine.graph_pool)
            state.graphs[steps] = graph
        except RecursionError:  # the caller's depth, which is no property of the step
            raise
        except RuntimeError as error:
            state.graphs[steps] = None
            warnings.warn(f"decoding without a CUDA graph, since its capture failed: {error}", stacklevel=2)
    captured = state.graphs[steps]
    return plain if captured is None else captured.replay


def _plain_step(model: Model, state: DecodeState) -> None:
    with torch_threads(model.runtime.threads) if model.device.type == "cpu" else nullcontext():
        decode_step(model, state)


def _times(count: int, take: Callable[[], None]) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(count):
            take()

    return repeated


def rows_of_step(model: Model, batch: int) -> int:
    """The rows that a step for `batch` sequences has: on a GPU 1, 2, 4, 8 or max_batch, so that graphs are few."""
    if model.device.type != "cuda" or model.runtime.eager:
        return batch
    return min(1 << (batch - 1).bit_length(), model.runtime.max_batch)


def tokens(model: Model, state: DecodeState, max_new_tokens: int) -> Generator[list[int], None, None]:
    """Decodes until every row is done, or `max_new_tokens` times.

    Args:
        model: the model.
        state: its rows filled by prefill, which has also picked each row's first token; that one is not counted here.
        max_new_tokens: most steps to take.

    Yields:
        The rows' next tokens, one list per step; rows that are done give the padding token. NO_TOKEN ends a row, where
        its logits are not finite.

    Raises:
        ValueError: a row would outgrow the model's max_seq_len; raised before any step.
    """
    longest = int(state.position.max()) + max_new_tokens
    if longest > model.runtime.max_seq_len:
        raise InvalidArgument(
            f"sequence: expected at most max_seq_len = {model.runtime.max_seq_len} tokens, got {longest}"
        )
    if model.device.type == "cuda":
        steps = model.runtime.steps_per_graph
        ahead = max(1, HOST_LAG // steps)
        readback = PinnedReadback(state.emitted, ahead + 1, steps)
        counts = {steps} if max_new_tokens >= steps else set()
        counts |= {1} if max_new_tokens % steps else set()
        take = {count: stepper(model, state, count) for count in counts}
        yield from tokens_behind(state, lambda count: take[count](), readback, max_new_tokens, steps=steps, ahead=ahead)
        return
    step = stepper(model, state)
    done, token = state.done.numpy(), state.token.numpy()  # read at a fifth of what a tensor takes
    for _ in range(max_new_tokens):
        if all(done.tolist()):
            return
        step()
        yield token.tolist()


def tokens_behind(
    state: DecodeState,
    launch: Callable[[int], None],
    readback: Readback,
    max_new_tokens: int,
    *,
    steps: int = 1,
    ahead: int = HOST_LAG,
) -> Generator[list[int], None, None]:
    """The host's loop on a GPU: launches steps without waiting for them, and reads each one's tokens `ahead` launches
    later. Steps taken past the last stop token change nothing that is read.

    Args:
        state: ready to decode; nothing of it but `emitted` is read while steps run.
        launch: launches so many steps; it is called with `steps`, and with 1 for what is left of max_new_tokens.
        readback: where their tokens come back.
        max_new_tokens: most steps to take; not one more is launched, as there may be no room for it in the cache.
        steps: steps of one launch.
        ahead: launches that the device is kept ahead of the host, so that it never waits for one.

    Yields:
        As `tokens`.
    """
    stop_ids, done, first = set(state.stop_ids.tolist()), state.done.tolist(), int(state.step)
    launched = waiting = 0
    while not all(done) and (waiting or launched < max_new_tokens):
        while waiting <= ahead and launched < max_new_tokens:
            count = steps if launched + steps <= max_new_tokens else 1
            launch(count)
            readback.request(first + launched, count)
            launched, waiting = launched + count, waiting + 1
        waiting -= 1
        for row in readback.take():
            done = [was or token in stop_ids or token < 0 for was, token in zip(done, row, strict=True)]
            yield row
            if all(done):
                return
