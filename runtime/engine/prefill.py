"""Prefill: from a prompt to its first token, in chunks, one sequence at a time.

Chunks begin at multiples of their length, and a chunk's bits depend on its tokens and those before it and on nothing
else: not on what decodes between two chunks, nor on whether an earlier prompt's chunks were copied in their place
(prefix_cache.py).

On a CPU in plain PyTorch, with Hugging Face's operations in its order and without padding, some layers of a chunk at a
time where others decode meanwhile; a short chunk by the decode step's compiled kernels (short_chunk.py), unless the
model is eager. On a GPU, where launching those operations separately takes most of the time, in chunks padded to a few
lengths: the same operations on the same addresses whatever the prompt, so that each length is captured in a CUDA graph.
Either way a row's cache and first token do not depend on the other rows of the batch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from runtime.engine.graph import captured, run_plainly
from runtime.engine.prefix_cache import PrefixCache
from runtime.engine.short_chunk import is_short, short_chunk
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
CPU_BUDGET = 64  # tokens; about as long as two steps of eight rows
READING_WORK = 20  # what reading the weights adds to a chunk's work, in tokens: of a few it takes most of the time


def prefill(
    model: Model, state: DecodeState, row: int, ids: Sequence[int], *, hidden_out: torch.Tensor | None = None
) -> torch.Tensor:
    """Runs a prompt from an empty cache, all its chunks at once, and picks its first token.

    Args:
        model, state, row, ids, hidden_out: as `Prefill`.

    Returns:
        The first token [1] int64: a view of state.token. NO_TOKEN where the logits are not finite.

    Raises:
        ValueError: as `Prefill`.
    """
    prompt = Prefill(model, state, row, ids, hidden_out=hidden_out)
    while not prompt.is_done:
        prompt.advance()
    return state.token[row : row + 1]


class Prefill:
    """A prompt on its way into one row of a state.

    Until its last chunk has run, the row is done and state.position holds the number of its cached tokens. A decode
    step that runs over the row between two chunks changes its token and x, which the last chunk sets, and writes the
    slot of that next position: the next chunk writes it anew, and in a sliding layer it holds the one position of the
    ring that has left every window. Within a chunk, between two of its layers, no step may run over the row.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Model,
        state: DecodeState,
        row: int,
        ids: Sequence[int],
        *,
        cache: PrefixCache | None = None,
        hidden_out: torch.Tensor | None = None,
        in_buckets: bool | None = None,
    ) -> None:
        """Copies what `cache` has of the prompt's beginning; runs nothing.

        Args:
            model: the model.
            state: one row of it is written: cache, token, position, done, x, and logits if the state has them.
            row: which.
            ids: the prompt, 1 to max_seq_len ids.
            cache: where its beginning is looked up and its whole chunks are kept; None for neither.
            hidden_out: [len(ids), hidden] in the model's dtype, written if given: the residual after the last layer,
                which `logits` takes. The prompt is then run in full, by no graph.
            in_buckets: whether chunks are padded to a few lengths; None for on a GPU alone.

        Raises:
            ValueError: no such row, or the prompt is empty, too long or holds an id outside the vocabulary.
        """
        _check_prompt(model, state, row, ids)
        self.row = row  # whoever moves the row's tensors sets it
        self._model, self._ids = model, ids
        self._state = state.parent or state  # so that one graph serves every row, however many decode
        self._hidden_out = hidden_out
        self._cache = cache if hidden_out is None else None
        if in_buckets is None:
            in_buckets = model.device.type == "cuda"
        self._in_buckets = in_buckets
        self._chunk: Chunk | None = None  # whose layers are being run,
        self._residuals: Iterator[torch.Tensor] = iter(())  # what they leave,
        self._layers_left = 0  # and how many are left
        # One transfer for the whole prompt: a transfer for each chunk would wait for the chunk before.
        self._prompt = torch.tensor(ids, dtype=torch.int64, device=model.device)
        self.cached_tokens = 0 if self._cache is None else self._cache.restore(self._state, row, ids)
        chunks = model.runtime.prefill_chunks(len(ids))
        self._left = deque(chunk for chunk in chunks if chunk.start >= self.cached_tokens)
        self._wait()

    def __repr__(self) -> str:
        return f"Prefill({self._start} of {len(self._ids)} tokens in row {self.row})"

    @property
    def is_done(self) -> bool:
        """Whether the first token has been picked."""
        return not self._left

    @property
    def tokens(self) -> int:
        """How many of the prompt's tokens the row's cache holds, in some layers at least."""
        return self._start + (self.next_tokens if self._chunk else 0)

    @property
    def _start(self) -> int:
        """Position of the next chunk's first token."""
        return self._left[0].start if self._left else len(self._ids)

    @property
    def next_tokens(self) -> int:
        """How many tokens the next chunk has; 0 where the prompt is done."""
        return len(self._left[0]) if self._left else 0

    @property
    def next_work(self) -> float:
        """The least that `advance` runs next: one layer's share of a chunk that runs layer by layer."""
        return self._chunk_work / (len(self._model.config.layers) if self._is_by_layer else 1)

    @property
    def _chunk_work(self) -> int:
        """The work of the whole next chunk, in tokens of a long one."""
        return self.next_tokens + READING_WORK

    @property
    def _is_by_layer(self) -> bool:
        return not self._in_buckets and (self._hidden_out is not None or not is_short(self._model, self.next_tokens))

    @torch.inference_mode()
    def advance(self, work: float = math.inf) -> float:
        """Runs the next chunk, or some of its layers; the last one picks the first token. On a GPU it launches them and
        returns.

        Args:
            work: how much may be run of the chunk, in tokens of a long one, of which every layer has its share;
                next_work is run in any case.

        Returns:
            How much has been run.
        """
        assert not self.is_done
        done: float = self._chunk_work
        if self._is_by_layer:
            every = len(self._model.config.layers)
            layers = min(self._layers_left or every, max(1, int(min(work, done) * every / done)))
            done *= layers / every
            run_plainly(self._model, functools.partial(self._run, layers=layers))
            if self._layers_left:
                return done
        elif self._in_buckets:
            self._run_padded()
        else:
            self._run_short()
        chunk = self._left.popleft()
        if self._cache is not None:
            self._cache.keep(self._state, self.row, self._ids, chunk)
        if not self.is_done:
            self._wait()
        return done

    def _wait(self) -> None:
        """Leaves the row as it has to be until the next chunk."""
        self._state.position[self.row] = self._start
        self._state.done[self.row] = True

    def _run(self, ops: Ops, layers: int) -> None:
        """The next layers of the chunk as Hugging Face runs it."""
        model, state, start, count = self._model, self._state, self._start, self.next_tokens
        end = start + count
        is_last = end == len(self._ids)
        if self._chunk is None:
            x = embed_torch(model.weights.embedding, self._prompt[None, start:end], state.embed_scale)
            residual_wanted = is_last or self._hidden_out is not None
            self._chunk = Chunk(model, state.cache, self.row, start, count, residual_wanted)
            self._residuals = FAMILIES[model.config.family].prefill_layers(self._chunk, x)
            self._layers_left = len(model.config.layers)
        self._chunk.row = self.row
        (x,) = deque(itertools.islice(self._residuals, layers), maxlen=1)
        self._layers_left -= layers
        if self._layers_left:
            return
        self._chunk, self._residuals = None, iter(())
        if self._hidden_out is not None:
            self._hidden_out[start:end] = x[0]
        if is_last:
            row, position = (torch.tensor([value], device=model.device) for value in (self.row, end))
            _pick(ops, model, state, row, position, x[0, -1:])

    def _run_short(self) -> None:
        """The next chunk as rows of a step."""
        model, start, end = self._model, self._start, self._start + self.next_tokens
        picked = short_chunk(model, self._state, self.row, self._prompt[start:end], start, end == len(self._ids))
        if picked is not None:
            _make_ready(model, self._state, torch.tensor([self.row]), torch.tensor([end]), *picked)

    def _run_padded(self) -> None:
        """The next chunk, padded to the first length that holds it: by a graph unless the model is eager.

        Not only for speed: PyTorch's fused attention on a GPU has been wrong for masks of 513 keys, and an unpadded
        prompt can have any number.
        """
        model, chunk, start, count = self._model, self._state.chunk, self._start, self.next_tokens
        chunk[0], chunk[1], chunk[2] = self.row, start, count
        chunk[3 : 3 + count] = self._prompt[start : start + count]  # padding may be anything
        lengths = chunk_lengths(model)
        seq = next(length for length in lengths if length >= count)
        past = _past(model, start, lengths[-1])
        if self._hidden_out is None:
            _run_chunk(model, self._state, seq, past)
        else:
            x = prefill_chunk(ops_for(model.device), model, self._state, seq, past)
            self._hidden_out[start : start + count] = x[:count]


def prefill_budget(model: Model) -> int:
    """How many tokens' worth of prompts may run between two steps of others: fewer delay their tokens less, more bring
    the prompt's first token sooner. On a GPU a whole chunk, which takes about as long as a few steps there."""
    return model.runtime.prefill_chunk if model.device.type == "cuda" else CPU_BUDGET


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
def prefill_chunk(ops: Ops, model: Model, state: DecodeState, seq: int, past: int) -> torch.Tensor:
    """Runs the chunk in state.chunk, padded to `seq` tokens, and picks the token after it.

    The operations and their addresses depend on `seq` and `past` alone. It changes nothing outside `state`.

    Args:
        ops: the backend of the head.
        model: the model.
        state: of all rows; the chunk's row is written, as by `prefill`.
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
    _pick(ops, model, state, row, start + count, x[0].index_select(0, count - 1))
    return x[0]


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
    _make_ready(model, state, row, end, token, logits)


def _make_ready(
    model: Model,
    state: DecodeState,
    row: torch.Tensor,
    end: torch.Tensor,
    token: torch.Tensor,
    logits: torch.Tensor | None,
) -> None:
    """Makes a row ready for its first decode step, given what was picked after position end - 1."""
    state.token.index_copy_(0, row, token)
    state.position.index_copy_(0, row, end.to(torch.int32))
    done = (token[:, None] == state.stop_ids.index_select(0, row)).any(dim=1).logical_or_(token < 0)
    state.done.index_copy_(0, row, done.logical_or_(end >= state.limit.index_select(0, row)))
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
