"""Decoding: the state of the loop, one step on it, and the host's loop over steps.

A step reads and writes the tensors of a `DecodeState` and reads the weights, nothing else: the same launches with the
same shapes, scalars and addresses every time, whatever the position. Token, position and stop test stay on the device.
On a GPU the step is captured in a CUDA graph, and the host reads tokens some steps behind.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from runtime import kernels
from runtime.kernels.argmax import new_best
from runtime.kernels.attention_runs import AttentionParts
from runtime.kv_cache import KVCache
from runtime.models import FAMILIES
from runtime.readback import PinnedReadback, Readback

if TYPE_CHECKING:
    from runtime.load import Model

EMITTED_RING = 64  # steps that the host may lag behind
MAX_STOP_IDS = 32
HOST_LAG = 4  # steps that the GPU is kept ahead of the host, so that it never waits for one


@dataclass(frozen=True)
class DecodeState:
    """Every tensor that decode steps change, allocated once; d is the model's dtype.

    Between steps `x` holds the embedding of `token`, and `position` the number of cached tokens: the position that
    `token` takes in the next step. The other buffers are scratch within a step.
    """

    token: torch.Tensor  # [batch] int64: the last token of each row
    position: torch.Tensor  # [batch] int32
    done: torch.Tensor  # [batch] bool: the row has emitted a stop token
    stop_ids: torch.Tensor  # [MAX_STOP_IDS] int64, filled up with -1
    x: torch.Tensor  # [batch, hidden] d: the residual stream
    x_alt: torch.Tensor  # [batch, hidden] d: its second buffer
    qkv: torch.Tensor  # [batch, (heads + 2 * kv_heads) * head_dim] d
    attention: AttentionParts
    branch: torch.Tensor  # [batch, hidden] d
    mlp: torch.Tensor  # [batch, intermediate] d
    best: torch.Tensor  # [batch, BEST_SLOTS] int64: the head's workspace
    cache: KVCache
    emitted: torch.Tensor  # [EMITTED_RING, batch] int64: tokens of step s in slot s % EMITTED_RING
    step: torch.Tensor  # [1] int64: steps taken
    logits: torch.Tensor | None  # [batch, vocab] d: the step's logits, where they were asked for
    embed_scale: float  # sqrt(hidden) rounded to d
    pad: int  # what finished rows emit
    graphs: dict[int, StepGraph | None] = field(default_factory=dict, repr=False)  # by steps; None: capture failed
    parts: dict[int, DecodeState] = field(default_factory=dict, repr=False)  # by rows, from `first_rows`

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.token)

    def first_rows(self, rows: int) -> DecodeState:
        """A state of the first `rows` rows: views of this one's buffers, with a ring of emitted tokens and graphs of
        its own. Made once for each number of rows; only one of them may be in use at a time."""
        if rows == self.batch:
            return self
        if rows not in self.parts:
            of_rows = ("token", "position", "done", "x", "x_alt", "qkv", "branch", "mlp", "best", "logits")
            whole: dict[str, Any] = {name: getattr(self, name) for name in of_rows}
            views: dict[str, Any] = {name: None if of is None else of[:rows] for name, of in whole.items()}
            self.parts[rows] = dataclasses.replace(
                self,
                **views,
                attention=AttentionParts(*(tensor[:rows] for tensor in self.attention)),
                cache=self.cache.first_rows(rows),
                emitted=torch.zeros_like(self.emitted[:, :rows], memory_format=torch.contiguous_format),
                graphs={},
                parts={},
            )
        return self.parts[rows]

    def reset(self, stop_ids: Sequence[int] = (), rows: int | None = None) -> None:
        """Makes the state ready for other prompts. The cache need not be cleared: nothing reads what prefill and
        decode have not written.

        Args:
            stop_ids: token ids after which a row is done, at most MAX_STOP_IDS.
            rows: how many rows will have a prompt; the others are done from the start. None for all.

        Raises:
            ValueError: too many stop ids.
        """
        if len(stop_ids) > MAX_STOP_IDS:
            raise ValueError(f"stop_ids: expected at most {MAX_STOP_IDS} ids, got {len(stop_ids)}")
        filled = [*stop_ids, *[-1] * (MAX_STOP_IDS - len(stop_ids))]
        self.stop_ids.copy_(torch.tensor(filled, dtype=torch.int64))
        for tensor in (self.token, self.position, self.done, self.step):
            tensor.zero_()
        if rows is not None:
            self.done[rows:] = True


def new_state(model: Model, batch: int, *, stop_ids: Sequence[int] = (), with_logits: bool = False) -> DecodeState:
    """Allocates the state of a decode loop.

    Args:
        model: the model that will run on it.
        batch: rows, 1 to the model's max_batch.
        stop_ids: token ids after which a row is done.
        with_logits: whether each step leaves its logits in `state.logits`.

    Raises:
        ValueError: batch or the number of stop ids is out of range.
    """
    config, limits, embedding = model.config, model.runtime, model.weights.embedding
    if not 1 <= batch <= limits.max_batch:
        raise ValueError(f"batch: expected 1 to {limits.max_batch} (the model's max_batch), got {batch}")
    device, dtype = embedding.device, embedding.dtype

    def activation(width: int) -> torch.Tensor:
        return torch.zeros(batch, width, dtype=dtype, device=device)

    def integers(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    state = DecodeState(
        token=integers(batch),
        position=torch.zeros(batch, dtype=torch.int32, device=device),
        done=torch.zeros(batch, dtype=torch.bool, device=device),
        stop_ids=integers(MAX_STOP_IDS),
        x=activation(config.hidden),
        x_alt=activation(config.hidden),
        qkv=activation((config.heads + 2 * config.kv_heads) * config.head_dim),
        attention=AttentionParts.allocate(batch, config.heads, config.head_dim, dtype, device),
        branch=activation(config.hidden),
        mlp=activation(config.intermediate),
        best=new_best(batch, device),
        cache=KVCache.allocate(config, batch, limits.max_seq_len, dtype, device),
        emitted=integers(EMITTED_RING, batch),
        step=integers(1),
        logits=activation(config.vocab) if with_logits else None,
        embed_scale=torch.tensor(config.hidden**0.5, dtype=dtype).item(),
        pad=config.pad_token_id,
    )
    state.reset(stop_ids)
    return state


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
        with torch.cuda.graph(self._graph, pool=pool):
            for _ in range(steps):
                decode_step(model, state)

    def replay(self) -> None:
        """Takes the steps. Returns at once; the device runs them in stream order."""
        self._graph.replay()


def stepper(model: Model, state: DecodeState, steps: int = 1) -> Callable[[], None]:
    """What takes `steps` steps on a state in the fastest way its device has: its graph, captured on first use, or the
    plain step on a CPU, where the model's `eager` says so and, with one warning that names the cause, where capture
    fails."""

    def plain() -> None:
        for _ in range(steps):
            decode_step(model, state)

    if model.device.type != "cuda" or model.runtime.eager:
        return plain
    if steps not in state.graphs:
        graph = StepGraph()
        graph.warm_up(model, state)
        state.graphs[steps] = None
        if model.graph_pool is None:
            model.graph_pool = torch.cuda.graph_pool_handle()
        try:
            graph.capture(model, state, steps, model.graph_pool)
            state.graphs[steps] = graph
        except RuntimeError as error:
            warnings.warn(f"decoding without a CUDA graph, since its capture failed: {error}", stacklevel=2)
    captured = state.graphs[steps]
    return plain if captured is None else captured.replay


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
        The rows' next tokens, one list per step; rows that are done give the padding token.

    Raises:
        ValueError: a row would outgrow the model's max_seq_len; raised before any step.
    """
    longest = int(state.position.max()) + max_new_tokens
    if longest > model.runtime.max_seq_len:
        raise ValueError(f"sequence: expected at most max_seq_len = {model.runtime.max_seq_len} tokens, got {longest}")
    if model.device.type == "cuda":
        steps = model.runtime.steps_per_graph
        ahead = max(1, HOST_LAG // steps)
        readback = PinnedReadback(state.emitted, ahead + 1, steps)
        counts = {steps} if max_new_tokens >= steps else set()
        counts |= {1} if max_new_tokens % steps else set()
        take = {count: stepper(model, state, count) for count in counts}
        launch = lambda count: take[count]()  # noqa: E731
        yield from tokens_behind(state, launch, readback, max_new_tokens, steps=steps, ahead=ahead)
        return
    for _ in range(max_new_tokens):
        if state.done.all():
            return
        decode_step(model, state)
        yield state.token.tolist()


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
            done = [was or token in stop_ids for was, token in zip(done, row, strict=True)]
            yield row
            if all(done):
                return
