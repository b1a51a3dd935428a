"""Prefill: from a prompt to its first token, in chunks, one sequence at a time.

Chunks begin at multiples of their length, and a chunk's results depend, bit for bit, only on its tokens and those
before it: not on what decodes between two chunks, nor on whether the chunks before it were run or copied from an
earlier prompt's (prefix_cache.py).

On a CPU a chunk runs in plain PyTorch, with Hugging Face's operations in the same order and without padding, a few
layers at a time while others decode. Unless the model is eager, a short chunk runs in the decode step's compiled
kernels (short_chunk.py), and 16-bit products run in fp32 where the processor has no 16-bit ones. On a GPU, where
launching those operations one by one would take most of the time, a chunk runs as matrix products between fused
kernels, padded to one of a few lengths, for each of which a graph is captured (padded_chunk.py). Either way a row's
cache and first token do not depend on the other rows of the batch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from runtime.engine.first_token import Drawn, make_ready, pick_captured, pick_first_token
from runtime.engine.graph import run_plainly, runs_compiled
from runtime.engine.padded_chunk import padded_chunk
from runtime.engine.prefix_cache import PrefixCache
from runtime.engine.ranges import marked
from runtime.engine.short_chunk import is_short, short_chunk
from runtime.errors import InvalidArgument
from runtime.families import FAMILIES
from runtime.families.chunk import Chunk
from runtime.families.state import DecodeState
from runtime.kernels.advance import embed_torch
from runtime.kernels.argmax import logits_torch
from runtime.kernels.ops import Ops
from runtime.kernels.rms_norm import rms_norm_torch
from runtime.model.model import Model

CPU_BUDGET = 64  # tokens; about as long as two steps of eight rows
VOCAB_SLICE = 32768  # rows of a quantised head whose values are held at once
READING_WORK = 50  # what reading the weights costs a chunk, in tokens of a long one


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
    step may run over the row between two chunks: it changes token and x, which the last chunk sets, and writes the slot
    of the next position, which the next chunk overwrites; in a sliding layer that slot holds the one position of the
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
        samples: bool = False,
    ) -> None:
        """Copies what `cache` has of the prompt's beginning; runs nothing.

        Args:
            model: the model.
            state: one row of it is written: cache, token, position, done, x, and logits if the state has them.
            row: which.
            ids: the prompt, 1 to max_seq_len ids.
            cache: where its beginning is looked up and its whole chunks are kept; None for neither.
            hidden_out: [len(ids), hidden] in the model's dtype, written if given: the residual after the last layer,
                which `logits` takes. The prompt is then run in full.
            in_buckets: whether chunks are padded to a few lengths; None: only on a GPU.
            samples: whether the first token is drawn by the row's temperature and seed.

        Raises:
            ValueError: no such row, or the prompt is empty, too long or holds an id outside the vocabulary.
        """
        _check_prompt(model, state, row, ids)
        self.row = row  # whoever moves the row's tensors sets it
        self._model, self._ids, self._samples = model, ids, samples
        self._state = state.parent or state  # so that one graph serves every row, however many decode
        self.hidden_out = hidden_out
        self._cache = cache if hidden_out is None else None
        if in_buckets is None:
            in_buckets = model.device.type == "cuda"
        self._in_buckets = in_buckets
        self._chunk: Chunk | None = None  # the chunk whose layers are being run
        self._residuals: Iterator[torch.Tensor] = iter(())  # the residual after each of them
        self._layers_left = 0  # how many of them are left
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
    def leaves_logits(self) -> bool:
        """Whether the logits of the first token are left in the state."""
        return self._state.logits is not None

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
        return self._chunk_work / (self._layers if self._is_by_layer else 1)

    @property
    def _chunk_work(self) -> int:
        """The work of the whole next chunk, in tokens of a long one."""
        return self.next_tokens + READING_WORK

    @property
    def _layers(self) -> int:
        return len(self._model.config.layers)

    @property
    def _is_by_layer(self) -> bool:
        return not self._in_buckets and not is_short(self._model, self.next_tokens)

    @torch.inference_mode()
    def advance(self, work: float = math.inf) -> float:
        """Runs the next chunk, or some of its layers; the last one picks the first token. On a GPU it launches them and
        returns.

        Args:
            work: how much of the chunk may be run, in tokens of a long one, spread evenly over the layers; at least
                next_work is run.

        Returns:
            How much has been run.
        """
        assert not self.is_done
        with marked("prefill chunk"):
            return self._advance(work)

    def _advance(self, work: float) -> float:
        done: float = self._chunk_work
        if self._is_by_layer:
            layers = min(self._layers_left or self._layers, max(1, int(min(work, done) * self._layers / done)))
            done *= layers / self._layers
            run_plainly(self._model, functools.partial(self._run_layers, count=layers))
            if self._layers_left:
                return done
        elif self._in_buckets:
            into, at = self._residual_out, self._start
            padded_chunk(self._model, self._state, self.row, self._tokens, at, into, self._samples)
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

    @property
    def _tokens(self) -> torch.Tensor:
        """The next chunk's token ids."""
        return self._prompt[self._start : self._start + self.next_tokens]

    @property
    def _residual_out(self) -> torch.Tensor | None:
        return None if self.hidden_out is None else self.hidden_out[self._start : self._start + self.next_tokens]

    def _run_layers(self, ops: Ops, count: int) -> None:
        """Runs the chunk's next layers as Hugging Face does, and the head once the prompt's last layer has run."""
        model, state, is_last = self._model, self._state, len(self._left) == 1
        if self._chunk is None:
            x = embed_torch(model.weights.embedding, self._tokens[None], state.embed_scale, model.dtype)
            residual_wanted = is_last or self.hidden_out is not None
            self._chunk = Chunk(model, state.cache, self.row, self._start, self.next_tokens, residual_wanted)
            self._residuals = FAMILIES[model.config.family].prefill_layers(self._chunk, x)
            self._layers_left = self._layers
        self._chunk.row = self.row
        (x,) = deque(itertools.islice(self._residuals, count), maxlen=1)
        self._layers_left -= count
        if self._layers_left:
            return
        self._chunk, self._residuals = None, iter(())
        if self._residual_out is not None:
            self._residual_out.copy_(x[0])
        if is_last:
            row, end = (torch.tensor([value], device=model.device) for value in (self.row, len(self._ids)))
            if runs_compiled(model):
                drawn = Drawn(self.row, len(self._ids) - 1) if self._samples else None
                make_ready(model, state, row, end, *pick_captured(model, state, x[0, -1:], drawn))
            else:
                pick_first_token(ops, model, state, row, end, x[0, -1:], self._samples)

    def _run_short(self) -> None:
        """Runs the next chunk as rows of a decode step."""
        is_last, into, at = len(self._left) == 1, self._residual_out, self._start
        picked = short_chunk(self._model, self._state, self.row, self._tokens, at, is_last, into, self._samples)
        if picked is not None:
            row, end = torch.tensor([self.row], device="cpu"), torch.tensor([len(self._ids)], device="cpu")
            make_ready(self._model, self._state, row, end, *picked)


@torch.inference_mode()
def warm_up(model: Model, state: DecodeState, samples: bool = False) -> None:
    """Compiles and captures the kernels that a CPU runs prompts with, so that no first token waits for that. It
    overwrites the first row."""
    if runs_compiled(model):
        short_chunk(model, state, 0, torch.zeros(1, dtype=torch.int64, device="cpu"), 0, is_last=True, samples=samples)
        pick_captured(model, state, state.x[:1], Drawn(0, 0) if samples else None)


def prefill_budget(model: Model) -> int:
    """How many tokens' worth of prompts may run between two steps of others: fewer delay their tokens less, more bring
    the prompt's first token sooner. On a GPU a whole chunk, which takes about as long as a few steps there."""
    return model.runtime.prefill_chunk if model.device.type == "cuda" else CPU_BUDGET


@torch.inference_mode()
def logits(model: Model, hidden: torch.Tensor) -> torch.Tensor:
    """The logits [n, vocab] in the model's dtype, from the last layer's residual `hidden` [n, hidden].

    Computed row by row, so that a position's logits do not depend on how many are asked for.
    """
    config, weights = model.config, model.weights
    normed = rms_norm_torch(hidden, weights.final_norm, config.rms_norm_eps)
    if not len(normed):
        return hidden.new_empty(0, config.vocab)
    heads = [weights.head] if isinstance(weights.head, torch.Tensor) else weights.head.split(VOCAB_SLICE)
    found = []
    for head in heads:
        values = head if isinstance(head, torch.Tensor) else head.dequantized()
        found.append(torch.cat([logits_torch(row[None], values, config.final_softcap) for row in normed]))
    return torch.cat(found, dim=1)


def _check_prompt(model: Model, state: DecodeState, row: int, ids: Sequence[int]) -> None:
    if not 0 <= row < state.batch:
        raise InvalidArgument(f"row: expected 0 to {state.batch - 1}, got {row}")
    if not 1 <= len(ids) <= model.runtime.max_seq_len:
        raise InvalidArgument(f"prompt: expected 1 to max_seq_len = {model.runtime.max_seq_len} tokens, got {len(ids)}")
    wrong = next((i for i in ids if not 0 <= i < model.config.vocab), None)
    if wrong is not None:
        raise InvalidArgument(f"prompt: expected token ids from 0 to {model.config.vocab - 1}, got {wrong}")
