"""Prefill: from a prompt to its first token, one sequence at a time.

On a CPU in plain PyTorch, with Hugging Face's operations in its order and without padding. On a GPU, where launching
those one by one takes most of the time, in chunks of a few lengths, each the same operations on the same addresses
whatever the prompt: captured in a CUDA graph, one for each length. In both a row's cache and first token do not depend
on what shares the batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from runtime import kernels
from runtime.engine.capture import capturing
from runtime.engine.engine import engine_of
from runtime.errors import InvalidArgument
from runtime.families import FAMILIES
from runtime.families.chunk import Chunk
from runtime.families.fixed_chunk import FixedChunk
from runtime.families.state import DecodeState
from runtime.kernels.advance import embed_reference
from runtime.kernels.argmax import logits_reference
from runtime.kernels.rms_norm import rms_norm_reference
from runtime.model.model import Model
from runtime.model.threads import torch_threads

# Below 128 tokens reading the weights takes the time on every GPU; above, doubling wastes half a chunk at most.
BUCKETS = (128, 256, 512, 1024)


@torch.inference_mode()
def prefill(
    model: Model, state: DecodeState, row: int, ids: Sequence[int], *, hidden_out: torch.Tensor | None = None
) -> torch.Tensor:
    """Runs a prompt from an empty cache, in chunks, and picks its first token.

    Args:
        model: the model.
        state: one row of it is written: cache, token, position, done, x, and logits where the state has them.
        row: which.
        ids: the prompt, 1 to max_seq_len ids.
        hidden_out: [len(ids), hidden] in the model's dtype, written if given: the residual stream after the last
            layer, which `logits` takes. The prompt is then not padded, on a GPU either.

    Returns:
        The first token [1] int64: a view of state.token. NO_TOKEN where the logits are not finite.

    Raises:
        ValueError: no such row, or the prompt is empty, too long or holds an id outside the vocabulary.
    """
    _check_prompt(model, state, row, ids)
    if model.device.type == "cuda" and hidden_out is None:
        prefill_in_buckets(model, state, row, ids)
    else:
        with torch_threads(model.runtime.threads) if model.device.type == "cpu" else nullcontext():
            _prefill_unpadded(model, state, row, ids, hidden_out)
    return state.token[row : row + 1]


def _prefill_unpadded(
    model: Model, state: DecodeState, row: int, ids: Sequence[int], hidden_out: torch.Tensor | None
) -> None:
    prompt = torch.tensor(ids, dtype=torch.int64, device=model.device)
    layers = FAMILIES[model.config.family].prefill_layers
    step = model.runtime.prefill_chunk
    for start in range(0, len(ids), step):
        chunk_ids = prompt[None, start : start + step]
        seq = chunk_ids.shape[1]
        x = embed_reference(model.weights.embedding, chunk_ids, state.embed_scale)
        x = layers(Chunk(model, state.cache, row, start, seq), x)
        if hidden_out is not None:
            hidden_out[start : start + seq] = x[0]
    _pick(
        model, state, torch.tensor([row], device=model.device), torch.tensor([len(ids)], device=model.device), x[0, -1:]
    )


@torch.inference_mode()
def prefill_in_buckets(model: Model, state: DecodeState, row: int, ids: Sequence[int]) -> None:
    """What `prefill` does on a GPU: chunks padded to one of a few lengths, captured unless the model is eager.

    Args:
        model, state, row, ids: as `prefill`, already checked.
    """
    state = state.whole or state  # its graphs serve every row, whichever rows decode
    lengths = chunk_lengths(model)
    longest = lengths[-1]
    parts = [ids[start : start + longest] for start in range(0, len(ids), longest)]
    # One transfer for the whole prompt: each would wait for the chunk before.
    requests = torch.tensor(
        [[row, index * longest, len(part), *part, *[0] * (longest - len(part))] for index, part in enumerate(parts)],
        dtype=torch.int64,
        device=model.device,
    )
    for index, part in enumerate(parts):
        state.request.copy_(requests[index])
        seq = next(length for length in lengths if length >= len(part))
        _run_chunk(model, state, seq, _past(model, index * longest, longest))


def chunk_lengths(model: Model) -> list[int]:
    """The lengths that chunks of prompts are padded to on a GPU, ascending; every chunk but the last has the last."""
    longest = min(model.runtime.prefill_chunk, model.runtime.max_seq_len)
    return [*(length for length in BUCKETS if length < longest), longest]


def _past(model: Model, start: int, longest: int) -> int:
    """How many slots of a full layer a chunk looks at: none at first, then in steps of 4, so that a long max_seq_len
    costs little where the prompt is short."""
    past = longest if start else 0
    while past < start:
        past *= 4
    return min(past, model.runtime.max_seq_len)


@torch.inference_mode()
def prefill_chunk(model: Model, state: DecodeState, seq: int, past: int) -> None:
    """Runs the chunk in state.request, padded to `seq` tokens, and picks the token after it.

    Which operations run on which addresses depends on `seq` and `past` alone; everything that changes is in `state`.

    Args:
        model: the model.
        state: all rows; the request's row is written, as by `prefill`.
        seq: places of the chunk, at least its tokens.
        past: 0 for the first chunk of a prompt, or at least its start: how many slots of a full layer are looked at.
    """
    row, start, count, ids = state.request[: 3 + seq].split((1, 1, 1, seq))
    x = embed_reference(model.weights.embedding, ids[None], state.embed_scale)
    chunk = FixedChunk(model, state.cache, row, start, count, seq, past)
    x = FAMILIES[model.config.family].prefill_layers(chunk, x)
    # Needed after the last chunk only, but then a graph of its own would be too.
    _pick(model, state, row, start + count, x[0].index_select(0, count - 1))


class ChunkGraph:
    """The chunks of one length as a CUDA graph; as `StepGraph`, it keeps neither state nor weights alive."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, model: Model, state: DecodeState, seq: int, past: int) -> None:
        """Compiles and loads every kernel by running the chunk in state.request: for good, since a chunk that runs
        twice finds the keys that it replaced in a sliding layer gone."""
        prefill_chunk(model, state, seq, past)

    def capture(self, model: Model, state: DecodeState, seq: int, past: int, pool: Any = None) -> None:
        """Records a chunk; nothing runs. `pool` is a memory pool to share with other graphs."""
        with capturing(self._graph, model.device, pool):
            prefill_chunk(model, state, seq, past)

    def replay(self) -> None:
        """Runs the chunk in state.request. Returns at once; the device runs it in stream order."""
        self._graph.replay()


def _run_chunk(model: Model, state: DecodeState, seq: int, past: int) -> None:
    """Runs the chunk in state.request in the fastest way there is: its graph, captured after the first chunk of its
    length, or plainly on a CPU, where the model's `eager` says so and, with one warning that names the cause, once a
    capture has failed."""
    key, graphs = (seq, past), state.chunk_graphs
    captured = graphs.get(key)
    if model.device.type != "cuda" or model.runtime.eager or (captured is None and None in graphs.values()):
        prefill_chunk(model, state, seq, past)
        return
    if captured is not None:
        captured.replay()
        return
    graph = ChunkGraph()
    graph.warm_up(model, state, seq, past)
    engine = engine_of(model)
    if engine.graph_pool is None:
        engine.graph_pool = torch.cuda.graph_pool_handle()
    try:
        graph.capture(model, state, seq, past, engine.graph_pool)
        graphs[key] = graph
    except RecursionError:  # the caller's depth, which is no property of the chunk
        raise
    except RuntimeError as error:
        graphs[key] = None
        warnings.warn(f"prefill without a CUDA graph, since its capture failed: {error}", stacklevel=2)


def _pick(model: Model, state: DecodeState, row: torch.Tensor, end: torch.Tensor, x: torch.Tensor) -> None:
    """Readies a row for its first decode step: picks the token after the stream x [1, hidden] of its last position,
    end - 1. Row and end are [1] int64 on the device."""
    weights, stored = model.weights, state.logits
    token = torch.empty_like(row)
    logits = None if stored is None else torch.empty_like(stored[:1])
    kernels.lm_head_argmax(
        token,
        x,
        weights.final_norm,
        weights.head,
        eps=model.config.rms_norm_eps,
        softcap=model.config.final_softcap,
        logits=logits,
        scratch=state.best,
    )
    state.token.index_copy_(0, row, token)
    state.position.index_copy_(0, row, end.to(torch.int32))
    state.done.index_copy_(0, row, (token == state.stop_ids).any(dim=0, keepdim=True).logical_or_(token < 0))
    state.x.index_copy_(0, row, embed_reference(weights.embedding, token.clamp(min=0), state.embed_scale))
    if stored is not None and logits is not None:
        stored.index_copy_(0, row, logits)


@torch.inference_mode()
def logits(model: Model, hidden: torch.Tensor) -> torch.Tensor:
    """The logits after the residual stream `hidden` [n, hidden] of the last layer: [n, vocab] in the model's dtype.

    Row by row, with the bits that a decode step at that position compares.
    """
    config, weights = model.config, model.weights
    normed = rms_norm_reference(hidden, weights.final_norm, config.rms_norm_eps)
    rows = [logits_reference(row[None], weights.head, config.final_softcap) for row in normed]
    return torch.cat(rows) if rows else hidden.new_empty(0, config.vocab)


def _check_prompt(model: Model, state: DecodeState, row: int, ids: Sequence[int]) -> None:
    if not 0 <= row < state.batch:
        raise InvalidArgument(f"row: expected 0 to {state.batch - 1}, got {row}")
    if not 1 <= len(ids) <= model.runtime.max_seq_len:
        raise InvalidArgument(f"prompt: expected 1 to max_seq_len = {model.runtime.max_seq_len} tokens, got {len(ids)}")
    wrong = next((i for i in ids if not 0 <= i < model.config.vocab), None)
    if wrong is not None:
        raise InvalidArgument(f"prompt: expected token ids from 0 to {model.config.vocab - 1}, got {wrong}")
