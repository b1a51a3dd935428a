"""Decoding: one step on a state, and what replays it.

A step reads and writes the tensors of a `DecodeState` and reads the weights, nothing else: the same launches with the
same shapes, scalars and addresses every time, whatever the position. Token, position and stop test stay on the device,
so one captured graph serves every token and context length; on a GPU the host reads tokens some steps behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from runtime.engine.graph import GraphKey, Operations, captured, run_plainly
from runtime.engine.readback import Readback, readback_for
from runtime.families import FAMILIES
from runtime.families.head import Residual, pick_token
from runtime.families.state import DecodeState
from runtime.kernels.ops import Ops
from runtime.model.model import Model

HOST_LAG = 4  # steps that a GPU is kept ahead of the host


@torch.inference_mode()
def decode_step(ops: Ops, model: Model, state: DecodeState, samples: bool = False, masks: bool = False) -> None:
    """Takes every row one token further on a backend. It changes nothing outside `state`. With `samples`, rows with a
    temperature draw their tokens; with `masks`, no row picks a token that its mask rules out. A step whose rows are all
    greedy and unmasked needs neither."""
    _pick(ops, model, state, _layers(ops, model, state), samples, masks)
    _advance(ops, model, state, state.argmax_keys)


def _layers(ops: Ops, model: Model, state: DecodeState) -> Residual:
    """The first part of a step, up to the head."""
    residual: Residual = FAMILIES[model.config.family].decode_layers(ops, model, state, ops.decode_attention)
    return residual


def _pick(
    ops: Ops,
    model: Model,
    state: DecodeState,
    residual: Residual,
    samples: bool,
    masks: bool = False,
    leaves_pick: bool = True,
) -> None:
    """The second part of a step, up to the rows' tokens."""
    pick_token(
        ops,
        model,
        state,
        state.token,
        **residual,
        logits=state.logits,
        sampling=state.sampling if samples else None,
        mask=state.mask if masks else None,
        leaves_pick=leaves_pick,
    )


def _advance(ops: Ops, model: Model, state: DecodeState, argmax_keys: torch.Tensor | None = None) -> None:
    """The last part of a step, from the rows' tokens on; read from `argmax_keys` if the head left them there."""
    ops.advance(
        state.token,
        state.x,
        state.position,
        state.done,
        state.emitted,
        state.step,
        model.weights.embedding,
        state.stop_ids,
        state.limit,
        embed_scale=state.embed_scale,
        pad=state.pad,
        argmax_keys=argmax_keys,
    )


def stepper(model: Model, state: DecodeState, steps: int = 1, samples: bool = False) -> Callable[[], None]:
    """A function that takes `steps` steps on a state: by a graph captured on first use, or as plain steps where nothing
    can be captured (see `captured`). `samples` as in `decode_step`."""
    if steps > 1 and model.device.type == "cpu":  # no launches to save: one step is captured and repeated
        step = stepper(model, state, samples=samples)

        def repeated() -> None:
            for _ in range(steps):
                step()

        return repeated

    key = (_kind("decoding", state, samples), state.batch, steps)
    if (graph := state.graphs.get(key)) is not None:
        return graph.replay

    def operations(ops: Ops) -> None:
        for _ in range(steps):
            decode_step(ops, model, state, samples)

    return _replay(model, state, key, operations, lambda ops: _warm_up(ops, model, state, samples))


def _warm_up(ops: Ops, model: Model, state: DecodeState, samples: bool) -> None:
    take_back(state, lambda: decode_step(ops, model, state, samples))


def choosing_stepper(
    model: Model, state: DecodeState, choose: Callable[[], None], samples: bool = False
) -> Callable[[], None]:
    """A function that takes one step with a break after the head: `choose` finds the rows' tokens in state.token and
    their logits in state.logits, and may replace tokens before the step goes on. `samples` as in `decode_step`."""

    def pick(ops: Ops) -> None:
        with torch.inference_mode():
            _pick(ops, model, state, _layers(ops, model, state), samples, leaves_pick=False)

    def advance(ops: Ops) -> None:
        with torch.inference_mode():
            _advance(ops, model, state)

    def step_through(ops: Ops) -> None:
        pick(ops)
        advance(ops)

    def warm_up(ops: Ops) -> None:
        take_back(state, partial(step_through, ops))

    picks = _replay(model, state, (_kind("picking", state, samples), state.batch, 1), pick, warm_up)
    advances = _replay(model, state, ("advancing", state.batch, 1), advance, warm_up)

    def step() -> None:
        picks()
        choose()
        advances()

    return step


def masking_stepper(
    model: Model, state: DecodeState, fill: Callable[[], None], samples: bool = False
) -> Callable[[], None]:
    """A function that takes one step whose head reads the rows' masks, which `fill` writes after the layers have been
    run or, on a GPU, launched: there the host computes masks while the device runs the layers. `samples` as in
    `decode_step`."""
    residual: Residual = state.graphs.setdefault(("residual", state.batch, 0), {})  # once the layers are captured

    def layers(ops: Ops) -> None:
        with torch.inference_mode():
            residual.update(_layers(ops, model, state))

    def head(ops: Ops) -> None:
        with torch.inference_mode():
            _pick(ops, model, state, residual, samples, masks=True)
            _advance(ops, model, state, state.argmax_keys)

    def step_through(ops: Ops) -> None:
        layers(ops)
        head(ops)

    def warm_up(ops: Ops) -> None:
        take_back(state, partial(step_through, ops))

    runs_layers = _replay(model, state, ("layers", state.batch, 1), layers, warm_up)
    picks = _replay(model, state, (_kind("masked head", state, samples), state.batch, 1), head, warm_up)

    def step() -> None:
        runs_layers()
        fill()
        picks()

    return step


def _kind(kind: str, state: DecodeState, samples: bool) -> str:
    """The kind of steps, as a graph's key names it: with whether they draw tokens and whether they leave logits."""
    if samples:
        kind += ", drawn"
    return kind if state.logits is None else kind + ", logits"


def _replay(
    model: Model, state: DecodeState, key: GraphKey, operations: Operations, warm_up: Operations
) -> Callable[[], None]:
    """A function that runs operations on a state: a graph captured on first use, or plain calls."""
    graph = captured(model, state.graphs, key, operations, warm_up)
    return partial(run_plainly, model, operations) if graph is None else graph.replay


def take_back(state: DecodeState, step: Callable[[], None]) -> None:
    """Takes one step, then restores what it advanced. The cache slot of each row's next position stays written; the
    next step overwrites it."""
    advanced = [state.token, state.position, state.done, state.step, state.x, state.emitted]
    advanced += [] if state.logits is None else [state.logits]
    before = [tensor.clone() for tensor in advanced]
    step()
    for tensor, value in zip(advanced, before, strict=True):
        tensor.copy_(value)


def launches_ahead(model: Model) -> int:
    """How many launches of steps the device is kept ahead, so that it never waits for the host: none on a CPU."""
    return max(1, HOST_LAG // model.runtime.steps_per_graph) if model.device.type == "cuda" else 0


class DeviceSteps:
    """Takes an engine's steps on a model's device. A stand-in that takes none shows what the host's part costs."""

    def ahead(self, model: Model) -> int:
        """As `launches_ahead`."""
        return launches_ahead(model)

    def launch(self, model: Model, state: DecodeState, steps: int, samples: bool = False) -> None:
        """Takes steps on a state; on a GPU it launches them and returns. `samples` as in `decode_step`."""
        stepper(model, state, steps, samples)()

    def choose(self, model: Model, state: DecodeState, choose: Callable[[], None], samples: bool = False) -> None:
        """Takes one step with a break for the answers' choices, as `choosing_stepper`."""
        choosing_stepper(model, state, choose, samples)()

    def mask(self, model: Model, state: DecodeState, fill: Callable[[], None], samples: bool = False) -> None:
        """Takes one step with masks, as `masking_stepper`."""
        masking_stepper(model, state, fill, samples)()

    def readback(self, model: Model, state: DecodeState, requests: int) -> Readback:
        """What reads the steps' tokens back, at most `requests` launches behind."""
        return readback_for(model.device, requests, model.runtime.steps_per_graph, state.batch)


def rows_of_step(model: Model, batch: int) -> int:
    """The number of rows in a step for `batch` sequences: on a GPU a power of two or max_batch, for few graphs."""
    if not model.runtime.device.startswith("cuda") or model.runtime.eager:
        return batch
    return min(1 << (batch - 1).bit_length(), model.runtime.max_batch)


def tokens(step: Callable[[], None], state: DecodeState, most: int) -> Iterator[list[int]]:
    """Takes steps one by one, waiting for each, until every row of a state is done or `most` steps are taken.

    Yields:
        The rows' next tokens, one list per step; rows that are done emit the padding token.
    """
    for _ in range(most):
        if state.done.all():
            return
        step()
        yield state.token.tolist()
