"""A chunk of a prompt on a GPU, padded to one of a few lengths: the same operations on the same addresses whatever the
prompt, so that each length is captured in a CUDA graph.

Not only for speed: PyTorch's fused attention on a GPU has been wrong for masks of 513 keys, and an unpadded prompt can
have any number.
"""

from __future__ import annotations

from collections import deque

import torch

from runtime.engine.first_token import pick_first_token
from runtime.engine.graph import captured, ops_of
from runtime.families import FAMILIES
from runtime.families.fixed_chunk import FixedChunk
from runtime.families.state import DecodeState
from runtime.kernels.advance import embed_torch
from runtime.kernels.ops import Ops
from runtime.model.model import Model

# Below 128 tokens reading the weights takes most of the time on every GPU; above, doubling wastes at most half a chunk.
BUCKETS = (128, 256, 512, 1024)


def chunk_lengths(model: Model) -> list[int]:
    """The lengths that chunks of prompts are padded to, ascending; every chunk but the last has the last."""
    longest = min(model.runtime.prefill_chunk, model.runtime.max_seq_len)
    return [*(length for length in BUCKETS if length < longest), longest]


def padded_chunk(
    model: Model, state: DecodeState, row: int, ids: torch.Tensor, start: int, residual_out: torch.Tensor | None = None
) -> None:
    """Runs a chunk and picks the token after it, by a graph unless the model is eager.

    Args:
        model: the model.
        state: of all rows; one row is written: cache, token, position, done, x, and logits if it has them.
        row: which.
        ids: [count] int64, at most the longest of `chunk_lengths`.
        start: the position of the first; earlier positions are cached already.
        residual_out: [count, hidden], written if given: the residual after the last layer. Then no graph is used.
    """
    lengths, count = chunk_lengths(model), len(ids)
    seq = next(length for length in lengths if length >= count)
    past = _past(model, start, lengths[-1])
    chunk = state.chunk
    chunk[0], chunk[1], chunk[2] = row, start, count
    chunk[3 : 3 + count] = ids  # padding may be anything
    if residual_out is None:
        _run(model, state, seq, past)
    else:
        residual_out.copy_(run_fixed_chunk(ops_of(model), model, state, seq, past)[:count])


def _past(model: Model, start: int, longest: int) -> int:
    """How many slots of a full layer a chunk attends to: none at first, then growing by factors of 4, so that a long
    max_seq_len costs little where the prompt is short."""
    past = longest if start else 0
    while past < start:
        past *= 4
    return min(past, model.runtime.max_seq_len)


def _run(model: Model, state: DecodeState, seq: int, past: int) -> None:
    """Runs the chunk in state.chunk: by its graph, captured after the first chunk of its sizes, or plainly."""
    key = ("prefill", seq, past)
    if graph := state.graphs.get(key):
        graph.replay()
        return

    def operations(ops: Ops) -> None:
        run_fixed_chunk(ops, model, state, seq, past)

    # No warm-up: a chunk that runs twice would miss the keys that it has replaced in a sliding layer.
    operations(ops_of(model))
    if model.device.type == "cuda":  # a CPU captures compiled kernels, and these are PyTorch's operations
        captured(model, state.graphs, key, operations)


@torch.inference_mode()
def run_fixed_chunk(ops: Ops, model: Model, state: DecodeState, seq: int, past: int) -> torch.Tensor:
    """Runs the chunk in state.chunk, padded to `seq` tokens, and picks the token after it.

    The operations and their addresses depend on `seq` and `past` alone. It changes nothing outside `state`.

    Args:
        ops: the backend of the head.
        model: the model.
        state: as `padded_chunk`.
        seq: padded length, at least the chunk's number of tokens.
        past: 0 for the first chunk of a prompt, else at least its start: how many slots of a full layer it attends to.

    Returns:
        The residual [seq, hidden] after the last layer, whose rows behind the chunk's tokens mean nothing.
    """
    row, start, count, ids = state.chunk[: 3 + seq].split((1, 1, 1, seq))
    x = embed_torch(model.weights.embedding, ids[None], state.embed_scale)
    chunk = FixedChunk(model, state.cache, row, start, count, seq, past)
    (x,) = deque(FAMILIES[model.config.family].prefill_layers(chunk, x), maxlen=1)
    # Only the last chunk needs it, but leaving it out of the others would double the number of graphs.
    pick_first_token(ops, model, state, row, start + count, x[0].index_select(0, count - 1))
    return x[0]
