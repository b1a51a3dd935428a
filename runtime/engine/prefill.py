"""Prefill: from a prompt to its first token, one sequence at a time.

On a CPU in plain PyTorch, with Hugging Face's operations in its order and without padding. On a GPU, where launching
those separately takes most of the time, in chunks padded to a few lengths: the same operations on the same addresses
whatever the prompt, so that each length is captured in a CUDA graph. Either way a row's cache and first token do not
depend on the other rows of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.engine.graph import captured, run_plainly
from runtime.errors import InvalidArgument
from runtime.families import FAMILIES
from runtime.families.chunk import Chunk
from runtime.families.fixed_chunk import FixedChunk
from runtime.families.head import pick_token
from runtime.families.state import DecodeState
from runtime.kernels.advance import embed_torch
from runtime.kernels.argmax import logits_torch
from runtime.kernels.ops import Ops, ops_for
from runtime.kernels.rms_norm import rms_norm_torch
from runtime.model.model import Model

# Below 128 tokens reading the weights takes most of the time on every GPU; above, doubling wastes at most half a chunk.
BUCKETS = (128, 256, 512, 1024)


@torch.inference_mode()
def prefill(
    model: Model, state: DecodeState, row: int, ids: Sequence[int], *, hidden_out: torch.Tensor | None = None
) -> torch.Tensor:
    """Runs a prompt from an empty cache, in chunks, and picks its first token.

    Args:
        model: the model.
        state: one row of it is written: cache, token, position, done, x, and logits if the state has them.
        row: which.
        ids: the prompt, 1 to max_seq_len ids.
        hidden_out: [len(ids), hidden] in the model's dtype, written if given: the residual after the last layer, which
            `logits` takes. The prompt is then not padded, not even on a GPU.

    Returns:
        The first token [1] int64: a view of state.token. NO_TOKEN where the logits are not finite.

    Raises:
        ValueError: no such row, or the prompt is empty, too long or holds an id outside the vocabulary.
    """
    _check_prompt(model, state, row, ids)
    if model.device.type == "cuda" and hidden_out is None:
        prefill_in_buckets(model, state, row, ids)
    else:
        run_plainly(model, lambda ops: _prefill_unpadded(ops, model, state, row, ids, hidden_out))
    return state.token[row : row + 1]


def _prefill_unpadded(
    ops: Ops, model: Model, state: DecodeState, row: int, ids: Sequence[int], hidden_out: torch.Tensor | None
) -> None:
    prompt = torch.tensor(ids, dtype=torch.int64, device=model.device)
    layers = FAMILIES[model.config.family].prefill_layers
    step = model.runtime.prefill_chunk
    for start in range(0, len(ids), step):
        chunk_ids = prompt[None, start : start + step]
        seq = chunk_ids.shape[1]
        x = embed_torch(model.weights.embedding, chunk_ids, state.embed_scale)
        x = layers(Chunk(model, state.cache, row, start, seq), x)
        if hidden_out is not None:
            hidden_out[start : start + seq] = x[0]
    row_index, end = torch.tensor([row], device=model.device), torch.tensor([len(ids)], device=model.device)
    _pick(ops, model, state, row_index, end, x[0, -1:])


@torch.inference_mode()
def prefill_in_buckets(model: Model, state: DecodeState, row: int, ids: Sequence[int]) -> None:
    """What `prefill` does on a GPU: chunks padded to a few lengths, captured unless the model is eager.

    Args:
        model, state, row, ids: as `prefill`, already checked.
    """
    state = state.parent or state  # so that one graph serves every row, however many decode
    lengths = chunk_lengths(model)
    longest = lengths[-1]
    starts = range(0, len(ids), longest)
    chunks = [ids[start : start + longest] for start in starts]
    # One transfer for the whole prompt: a transfer for each chunk would wait for the chunk before.
    inputs = torch.tensor(
        [
            [row, start, len(chunk), *chunk, *[0] * (longest - len(chunk))]
            for start, chunk in zip(starts, chunks, strict=True)
        ],
        dtype=torch.int64,
        device=model.device,
    )
    for start, chunk, chunk_input in zip(starts, chunks, inputs, strict=True):
        state.chunk.copy_(chunk_input)
        seq = next(length for length in lengths if length >= len(chunk))
        _run_chunk(model, state, seq, _past(model, start, longest))


def chunk_lengths(model: Model) -> list[int]:
    """The lengths that chunks of prompts are padded to on a GPU, ascending; every chunk but the last has the last."""
    longest = min(model.runtime.prefill_chunk, model.runtime.max_seq_len)
    return [*(length for length in BUCKETS if length < longest), longest]


def _past(model: Model, start: int, longest: int) -> int:
    """How many slots of a full layer a chunk attends to: none at first, then growing by factors of 4, so that a long
    max_seq_len costs little where the prompt is short."""
    past = longest if start else 0
    while past < start:
        past *= 4
    return min(past, model.runtime.max_seq_len)


@torch.inference_mode()
def prefill_chunk(ops: Ops, model: Model, state: DecodeState, seq: int, past: int) -> None:
    """Runs the chunk in state.chunk, padded to `seq` tokens, and picks the token after it.

    The operations and their addresses depend on `seq` and `past` alone. It changes nothing outside `state`.

    Args:
        ops: the backend of the head.
        model: the model.
        state: of all rows; the chunk's row is written, as by `prefill`.
        seq: padded length, at least the chunk's number of tokens.
        past: 0 for the first chunk of a prompt, else at least its start: how many slots of a full layer it attends to.
    """
    row, start, count, ids = state.chunk[: 3 + seq].split((1, 1, 1, seq))
    x = embed_torch(model.weights.embedding, ids[None], state.embed_scale)
    chunk = FixedChunk(model, state.cache, row, start, count, seq, past)
    x = FAMILIES[model.config.family].prefill_layers(chunk, x)
    # Only the last chunk needs it, but leaving it out of the others would double the number of graphs.
    _pick(ops, model, state, row, start + count, x[0].index_select(0, count - 1))


def _run_chunk(model: Model, state: DecodeState, seq: int, past: int) -> None:
    """Runs the chunk in state.chunk: by its graph, captured after the first chunk of its sizes, or plainly."""
    key = ("prefill", seq, past)
    if graph := state.graphs.get(key):
        graph.replay()
        return

    def operations(ops: Ops) -> None:
        prefill_chunk(ops, model, state, seq, past)

    # No warm-up: a chunk that runs twice would miss the keys that it has replaced in a sliding layer.
    operations(ops_for(model.device))
    if model.device.type == "cuda":  # a CPU captures compiled kernels, and these are PyTorch's operations
        captured(model, state.graphs, key, operations)


def _pick(ops: Ops, model: Model, state: DecodeState, row: torch.Tensor, end: torch.Tensor, x: torch.Tensor) -> None:
    """Makes a row ready for its first decode step: picks the token after position end - 1, whose residual is
    x [1, hidden]. row and end are [1] int64 on the device."""
    token = torch.empty_like(row)
    logits = None if state.logits is None else torch.empty_like(state.logits[:1])
    pick_token(ops, model, token, x, logits=logits, argmax_keys=state.argmax_keys)
    state.token.index_copy_(0, row, token)
    state.position.index_copy_(0, row, end.to(torch.int32))
    state.done.index_copy_(0, row, (token == state.stop_ids).any(dim=0, keepdim=True).logical_or_(token < 0))
    embedding = embed_torch(model.weights.embedding, token.clamp(min=0), state.embed_scale)
    state.x.index_copy_(0, row, embedding)
    if state.logits is not None and logits is not None:
        state.logits.index_copy_(0, row, logits)


@torch.inference_mode()
def logits(model: Model, hidden: torch.Tensor) -> torch.Tensor:
    """The logits [n, vocab] in the model's dtype, from the last layer's residual `hidden` [n, hidden].

    Computed row by row, for the same bits as a decode step at that position.
    """
    config, weights = model.config, model.weights
    normed = rms_norm_torch(hidden, weights.final_norm, config.rms_norm_eps)
    rows = [logits_torch(row[None], weights.head, config.final_softcap) for row in normed]
    return torch.cat(rows) if rows else hidden.new_empty(0, config.vocab)


def _check_prompt(model: Model, state: DecodeState, row: int, ids: Sequence[int]) -> None:
    if not 0 <= row < state.batch:
        raise InvalidArgument(f"row: expected 0 to {state.batch - 1}, got {row}")
    if not 1 <= len(ids) <= model.runtime.max_seq_len:
        raise InvalidArgument(f"prompt: expected 1 to max_seq_len = {model.runtime.max_seq_len} tokens, got {len(ids)}")
    wrong = next((i for i in ids if not 0 <= i < model.config.vocab), None)
    if wrong is not None:
        raise InvalidArgument(f"prompt: expected token ids from 0 to {model.config.vocab - 1}, got {wrong}")
