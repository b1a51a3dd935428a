"""Decode steps as a CUDA graph: one launch by the host for a whole step, or for several.

A step reads and writes the tensors of one `DecodeState` and the weights, at the same addresses every time, and reads
the position from the device: so one captured graph serves every token and every context length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from runtime.decode import DecodeState, decode_step

if TYPE_CHECKING:
    from runtime.load import Model


class StepGraph:
    """`steps` decode steps on one state: warmed up, captured once, replayed for ever.

    Args:
        model: a model on a CUDA device.
        state: the state that the graph is bound to; it must outlive the graph.
        steps: decode steps in one replay.
        pool: memory pool of another graph to share; replays of the two must not overlap.
    """

    def __init__(self, model: Model, state: DecodeState, steps: int = 1, pool: tuple[int, int] | None = None) -> None:
        if model.device.type != "cuda":
            raise ValueError(f"device: expected cuda for a CUDA graph, got {model.device}")
        self.model, self.state, self.steps = model, state, steps
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self) -> None:
        """Compiles and loads every kernel by taking one step, then puts back what a step moves on.

        The step writes one position of the cache ahead of what any row has read, which its own next step overwrites.
        """
        state = self.state
        moved = (state.token, state.position, state.done, state.step, state.x, state.emitted)
        before = [tensor.clone() for tensor in moved]
        decode_step(self.model, state)
        for tensor, value in zip(moved, before, strict=True):
            tensor.copy_(value)

    def capture(self) -> None:
        """Records the steps; nothing runs."""
        with torch.cuda.graph(self._graph, pool=self._pool):
            for _ in range(self.steps):
                decode_step(self.model, self.state)

    def replay(self) -> None:
        """Takes the steps. Returns at once; the device runs them in stream order."""
        self._graph.replay()

    @property
    def pool(self) -> tuple[int, int]:
        """The memory pool of the captured graph."""
        return self._graph.pool()
