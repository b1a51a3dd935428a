"""Successive tokens of one sequence on a CPU, each as a row of the decode step's compiled kernels: a short chunk of a
prompt, or guesses at what the model will pick (speculation.py).

The weights are read once for all rows, and nothing returns to Python between two layers. A token's keys, values and
logits have the bits that a decode step gives them at that position, however many tokens share the chunk.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from runtime.engine.first_token import CapturedHead, Drawn
from runtime.engine.graph import CapturedGraph, runs_compiled
from runtime.families import FAMILIES
from runtime.families.head import Residual
from runtime.families.state import DecodeState
from runtime.kernels.advance import embed_torch
from runtime.kernels.ops import Ops
from runtime.kernels.rms_norm import residual_torch
from runtime.model.config import SHORT_CHUNK
from runtime.model.model import Model

# The longest short chunk. Beyond it, PyTorch's products take less time: in bf16 from 36 tokens on (AMD EPYC of family
# 25, two cores), in fp32 later. With matrices in blocks, where the processor multiplies bytes (digits.py), they never
# do: there all chunks are short.
MOST_TOKENS = SHORT_CHUNK
# Most positions whose next tokens may be asked for: guesses that are further ahead are seldom right.
MOST_PICKED = 8


def is_short(model: Model, count: int) -> bool:
    """Whether a chunk of `count` tokens is run here. Nothing but its length decides, so that its bits never depend on
    what came before it or on what runs beside it."""
    return count <= MOST_TOKENS and runs_compiled(model)


def short_chunk(
    model: Model,
    state: DecodeState,
    row: int,
    ids: torch.Tensor,
    start: int,
    is_last: bool,
    residual_out: torch.Tensor | None = None,
    samples: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Runs a short chunk.

    Args:
        model: the model.
        state: of all rows. Cache slots of one row are written.
        row: which.
        ids: [count] int64, at most MOST_TOKENS.
        start: the position of the first; earlier positions are cached already.
        is_last: whether the token after the chunk is wanted.
        residual_out: [count, hidden], written if given: the residual after the last layer.
        samples: whether that token is drawn by the row's temperature and seed.

    Returns:
        That token [1] int64 and its logits [1, vocab], None unless the state has logits: both overwritten by the next
        chunk. None if it is not wanted.
    """
    chunk = _chunk_of(model, state)
    picked = chunk.run(model, row, ids, start, int(is_last), samples)
    if residual_out is not None:
        residual_out.copy_(chunk.residual(model, len(ids)))
    return picked


def next_tokens(
    model: Model, state: DecodeState, row: int, ids: torch.Tensor, start: int, samples: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs tokens of one sequence, and picks the model's own next token after each.

    Args:
        model, state, row, start, samples: as in `short_chunk`.
        ids: [count] int64, at most MOST_PICKED.

    Returns:
        Those tokens [count] int64, NO_TOKEN where the logits are not finite, and their logits [count, vocab], None
        unless the state has logits: both overwritten by the next chunk.
    """
    picked = _chunk_of(model, state).run(model, row, ids, start, len(ids), samples)
    assert picked is not None
    return picked


def _chunk_of(model: Model, state: DecodeState) -> ShortChunk:
    """A state's short chunk, captured on first use."""
    key = ("short chunk", 0, int(state.logits is not None))
    if key not in state.graphs:
        state.graphs[key] = ShortChunk(model, state)
    chunk: ShortChunk = state.graphs[key]
    return chunk


class ShortChunk:
    """The buffers of MOST_TOKENS rows, and the kernels captured on them once for every number of rows: a chunk takes
    the last ones. The head is captured apart, since few chunks need it."""

    def __init__(self, model: Model, state: DecodeState) -> None:
        def rows_of(tensor: torch.Tensor, rows: int = MOST_TOKENS) -> torch.Tensor:
            return tensor.new_zeros(rows, *tensor.shape[1:])

        names = ("token", "position", "x", "x_alt", "qkv", "attended", "branch", "mlp")
        buffers: dict[str, Any] = {name: rows_of(getattr(state, name)) for name in names}
        self._rows = dataclasses.replace(state, **buffers, graphs={}, parent=None)
        self._row = torch.zeros(1, dtype=torch.int64, device="cpu")

        def layers(ops: Ops) -> None:
            def attention(*arguments: Any, **options: Any) -> None:
                ops.sequence_attention(*arguments, **options, row=self._row)

            self._residual: Residual = FAMILIES[model.config.family].decode_layers(ops, model, self._rows, attention)

        self._layers = CapturedGraph(model)
        self._layers.capture(layers)
        self._head = CapturedHead(model, state, self._last_rows(MOST_PICKED), has_logits=state.logits is not None)

    def run(
        self, model: Model, row: int, ids: torch.Tensor, start: int, picked: int, samples: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """As `short_chunk` and `next_tokens`: the tokens after the last `picked` ids, None for no ids."""
        rows, count = self._rows, len(ids)
        rows.x[-count:] = embed_torch(model.weights.embedding, ids, rows.embed_scale)
        rows.position[-count:] = torch.arange(start, start + count, dtype=torch.int32, device="cpu")
        self._row[0] = row
        self._layers.replay(rows=count)
        drawn = Drawn(row, start + count - 1) if samples else None
        return self._head.run(picked, drawn) if picked else None

    def residual(self, model: Model, count: int) -> torch.Tensor:
        """The residual of the last run's `count` tokens after the last layer, [count, hidden]."""
        return residual_torch(**self._last_rows(count), eps=model.config.rms_norm_eps)

    def _last_rows(self, count: int) -> Residual:
        """What the layers leave in the last `count` rows."""
        branch = self._residual["branch"]
        return Residual(
            x=self._residual["x"][-count:],
            branch=None if branch is None else branch[-count:],
            branch_norm=self._residual["branch_norm"],
        )
