"""Decoding: one step on a state, and the host's loop over steps.

A step reads and writes the tensors of a `DecodeState` and reads the weights, nothing else: the same launches with the
same shapes, scalars and addresses every time, whatever the position. Token, position and stop test stay on the device,
so one captured graph serves every token and context length; on a GPU the host reads tokens some steps behind.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial

import torch

from runtime.engine.graph import captured, run_plainly
from runtime.engine.readback import PinnedReadback, Readback
from runtime.errors import InvalidArgument
from runtime.families import FAMILIES
from runtime.families.state import DecodeState
from runtime.kernels.ops import Ops
from runtime.model.model import Model

HOST_LAG = 4  # steps that the GPU is kept ahead of the host, so that it never waits for the host


@torch.inference_mode()
def decode_step(ops: Ops, model: Model, state: DecodeState) -> None:
    """Takes every row one token further on a backend. It changes nothing outside `state`."""
    FAMILIES[model.config.family].decode(ops, model, state)
    ops.advance(
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


def stepper(model: Model, state: DecodeState, steps: int = 1) -> Callable[[], None]:
    """A function that takes `steps` steps on a state: by a graph captured on first use, or as plain steps where nothing
    can be captured (see `captured`)."""
    if model.device.type == "cpu" and steps > 1:  # no launches to save: one step is captured and repeated
        step = stepper(model, state)

        def repeated() -> None:
            for _ in range(steps):
                step()

        return repeated

    def operations(ops: Ops) -> None:
        for _ in range(steps):
            decode_step(ops, model, state)

    key = ("decoding", state.batch, steps)
    graph = captured(model, state.graphs, key, operations, lambda ops: _warm_up(ops, model, state))
    return partial(run_plainly, model, operations) if graph is None else graph.replay


def _warm_up(ops: Ops, model: Model, state: DecodeState) -> None:
    """Takes one step, then restores what it advanced. The cache slot of each row's next position stays written; the
    next step overwrites it."""
    advanced = [state.token, state.position, state.done, state.step, state.x, state.emitted]
    advanced += [] if state.logits is None else [state.logits]
    before = [tensor.clone() for tensor in advanced]
    decode_step(ops, model, state)
    for tensor, value in zip(advanced, before, strict=True):
        tensor.copy_(value)


def rows_of_step(model: Model, batch: int) -> int:
    """The number of rows in a step for `batch` sequences: on a GPU 1, 2, 4, 8 or max_batch, so that graphs are few."""
    if model.device.type != "cuda" or model.runtime.eager:
        return batch
    return min(1 << (batch - 1).bit_length(), model.runtime.max_batch)


def tokens(model: Model, state: DecodeState, max_new_tokens: int) -> Generator[list[int], None, None]:
    """Decodes until every row is done, or `max_new_tokens` times.

    Args:
        model: the model.
        state: its rows filled by prefill, which has also picked each row's first token, not counted here.
        max_new_tokens: most steps to take.

    Yields:
        The rows' next tokens, one list per step; rows that are done emit the padding token. NO_TOKEN, where a row's
        logits are not finite, ends that row.

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
    done, token = state.done.numpy(), state.token.numpy()  # five times faster to read than a tensor
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
    """The host's loop on a GPU: launches steps without waiting for them, and reads their tokens `ahead` launches later.
    Steps taken past the last stop token change nothing that is read.

    Args:
        state: ready to decode; nothing of it but `emitted` is read while steps run.
        launch: launches a number of steps: `steps`, or 1 for the remainder of max_new_tokens.
        readback: where their tokens come back.
        max_new_tokens: most steps to take; no more are launched, since the cache may have no room for them.
        steps: steps per launch.
        ahead: launches that the device is kept ahead of the host, so that it never waits for the host.

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
            done = [is_done or token in stop_ids or token < 0 for is_done, token in zip(done, row, strict=True)]
            yield row
            if all(done):
                return
