"""A chunk of a prompt on a GPU, padded to one of a few lengths: the same operations on the same addresses whatever the
prompt, so that each length is captured in a CUDA graph.

There are two forms. The fused one (families/fused_chunk.py), ten launches a layer, runs wherever Triton's kernels do;
one graph serves all chunks of a length. GEMMA_RUNTIME_FUSED_PREFILL=0 chooses the other, slower on an H200: PyTorch's
operations (families/fixed_chunk.py), 45 to 70 launches a layer, with graphs for several numbers of earlier positions.
There, padding is not only for speed: PyTorch's fused attention on a GPU has been wrong for masks of 513 keys, and an
unpadded prompt can have any number.
"""

from __future__ import annotations

import os
from collections import deque

import torch

from runtime.engine.first_token import pick_first_token
from runtime.engine.graph import captured, ops_of
from runtime.families import FAMILIES
from runtime.families.fixed_chunk import FixedChunk
from runtime.families.fused_chunk import fused_layers
from runtime.families.state import DecodeState
from runtime.kernels.advance import embed_torch
from runtime.kernels.launch import INTERPRETING
from runtime.kernels.ops import Ops
from runtime.model.model import Model

# Below 128 tokens reading the weights takes most of the time on every GPU; above, doubling wastes at most half a chunk.
BUCKETS = (128, 256, 512, 1024)


SWITCH = "GEMMA_RUNTIME_FUSED_PREFILL"


def is_fused(model: Model) -> bool:
    """Whether a model's chunks run as fused kernels between products: where Triton's kernels run, unless
    GEMMA_RUNTIME_FUSED_PREFILL=0."""
    return (model.device.type == "cuda" or INTERPRETING) and os.environ.get(SWITCH, "1") != "0"


def chunk_lengths(model: Model) -> list[int]:
    """The lengths that chunks of prompts are padded to, ascending; every chunk but a prompt's last has the longest."""
    longest = min(model.runtime.prefill_chunk, model.runtime.max_seq_len)
    return [*(length for length in BUCKETS if length < longest), longest]


def padded_chunk(
    model: Model,
    state: DecodeState,
    row: int,
    ids: torch.Tensor,
    start: int,
    residual_out: torch.Tensor | None = None,
    samples: bool = False,
) -> None:
    """Runs a chunk and picks the token after it, by a graph unless the model is eager.

    Args:
        model: the model.
        state: of all rows; one row is written: cache, token, position, done, x, and logits if it has them.
        row: which.
        ids: [count] int64, at most the longest of `chunk_lengths`.
        start: the position of the first; earlier positions are cached already.
        residual_out: [count, hidden], written if given: the residual after the last layer. Then no graph is used.
        samples: whether the token is drawn by the row's temperature and seed.
    """
    lengths, count = chunk_lengths(model), len(ids)
    seq = next(length for length in lengths if length >= count)
    past = None if is_fused(model) else _past(model, start, lengths[-1])
    chunk = state.chunk
    chunk[0], chunk[1], chunk[2] = row, start, count
    chunk[3 : 3 + count] = ids  # padding may be anything
    if residual_out is None:
        _run(model, state, seq, past, samples)
    else:
        residual_out.copy_(run_padded_chunk(ops_of(model), model, state, seq, past, samples)[:count])


def _past(model: Model, start: int, longest: int) -> int:
    """How many slots of a full layer a chunk attends to: none at first, then growing by factors of 4, so that a long
    max_seq_len costs little where the prompt is short."""
    past = longest if start else 0
    while past < start:
        past *= 4
    return min(past, model.runtime.max_seq_len)


def _run(model: Model, state: DecodeState, seq: int, past: int | None, samples: bool) -> None:
    """Runs the chunk in state.chunk: by its graph, captured after the first chunk of its sizes, or plainly."""
    kind = "prefill" if past is not None else "fused prefill"
    kind += ", drawn" * samples + ", logits" * (state.logits is not None)
    key = (kind, seq, past or 0)
    if graph := state.graphs.get(key):
        graph.replay()
        return

    def operations(ops: Ops) -> None:
        run_padded_chunk(ops, model, state, seq, past, samples)

    # No warm-up: a chunk that runs twice would miss the keys that it has replaced in a sliding layer.
    operations(ops_of(model))
    if model.device.type == "cuda":  # a CPU can capture compiled kernels only, not these PyTorch operations
        captured(model, state.graphs, key, operations)


@torch.inference_mode()
def run_padded_chunk(
    ops: Ops, model: Model, state: DecodeState, seq: int, past: int | None, samples: bool = False
) -> torch.Tensor:
    """Runs the chunk in state.chunk, padded to `seq` tokens, and picks the token after it.

    The operations and their addresses depend on `seq` and `past` alone. It changes nothing outside `state`.

    Args:
        ops: the backend of the head, and of the fused form.
        model: the model.
        state: as `padded_chunk`.
        seq: padded length, at least the chunk's number of tokens.
        past: how many slots of a full layer PyTorch's form attends to: 0 for the first chunk of a prompt, else at least
            its start. None for the fused form, which reads as many as there are.
        samples: as `padded_chunk`.

    Returns:
        The residual [seq, hidden] after the last layer; its rows past the chunk's tokens are meaningless.
    """
    row, start, count, ids = state.chunk[: 3 + seq].split((1, 1, 1, seq))
    x = embed_torch(model.weights.embedding, ids, state.embed_scale, model.dtype)
    if past is None:
        x = fused_layers(ops, model, state.cache, state.chunk[:3], x)
    else:
        chunk = FixedChunk(model, state.cache, row, start, count, seq, past)
        (last,) = deque(FAMILIES[model.config.family].prefill_layers(chunk, x[None]), maxlen=1)
        x = last[0]
    # Only the last chunk needs it, but leaving it out of the others would double the number of graphs.
    pick_first_token(ops, model, state, row, start + count, x.index_select(0, count - 1), samples)
    return x
