"""What a caller holds of a request: its pieces as they come, its results so far, and how to end it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from types import TracebackType

from runtime.engine.answer import Answer, Call
from runtime.engine.choosing import choice_of
from runtime.engine.clock import Clock
from runtime.engine.non_finite import non_finite
from runtime.engine.request import Request
from runtime.engine.result import FinishReason, GenerationResult, Piece
from runtime.engine.scheduler import check_open, scheduler_of
from runtime.model.model import Model


class Stream:
    """The pieces of one request as they come, and `results`: what has come so far, one GenerationResult per prompt.

    Any thread may read, cancel or close it, and one thread may read several streams in turns. A stream that is not read
    holds up nobody: its tokens wait for it. Closing it, leaving its `with` block or dropping the last reference to it
    gives its rows back.
    """

    def __init__(self, model: Model, request: Request) -> None:
        self.request = request
        self.model = model
        self._clock = Clock(model.plan)
        self._call = Call(request.timeout, request.cancel, request.reuse, self._clock, request.speculate is not None)
        self._answers = [
            self._answer(index, copy)
            for index in range(len(request.prompts))
            for copy in range(request.n or 1)  # answers to one prompt are neighbours: they share its row
        ]
        self._read = [0] * len(self._answers)  # pieces read, by answer
        self._over = 0  # answers in front of the first that is not over
        self._process: int | None = None  # where it was submitted: a forked child submits it again
        self._is_closed = False

    def _answer(self, index: int, copy: int) -> Answer:
        """The answer `copy` to the prompt `index`."""
        request, model, ids = self.request, self.model, self.request.prompts[index]
        stops = (*request.stop_token_ids, *(() if request.ignore_eos else model.config.stop_token_ids))
        stop_ids = tuple(dict.fromkeys(stops))  # each takes a place in the decode state
        sampling = request.sampling[index].with_seed(copy)
        return Answer(
            index * (request.n or 1) + copy,
            model.tokenizer,
            request.max_new_tokens,
            stop_ids,
            request.stop_strings,
            ids,
            self._call,
            sampling,
            request.skip_special_tokens,
            choice_of(model, request, sampling, ids, stop_ids),
        )

    def submit(self, most_waiting: int | None = None) -> None:
        """Queues the request for rows, unless it is queued already; asking for the first piece does the same.

        Raises:
            QueueFull: `most_waiting` prompts wait already.
        """
        if self._process == os.getpid():
            return
        scheduler_of(self.model).submit(self._answers, most_waiting)
        self._process = os.getpid()

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        if self._is_closed:
            raise StopIteration
        try:
            check_open(self.model)
            piece = self._next_unread()
            if piece is None and not self._is_over():
                self.submit()
                scheduler_of(self.model).drive(self._call, self._is_served)
                piece = self._next_unread()
            if piece is not None:
                return piece
            self._raise_failures()
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.abandon()

    def abandon(self) -> None:
        """End the request where it stands, safely from anywhere that the garbage collector may run: this waits for no
        lock, and the next step frees the rows."""
        # A stream whose creation failed or was interrupted has no such attribute.
        if "_is_closed" in vars(self) and self.model.engine is not None and not self._is_complete():
            self._call.end(None)
            self.model.engine.has_endings = True

    def close(self) -> None:
        """End the request where it stands, and read no more of it."""
        self._is_closed = True
        self._end(None)

    def cancel(self) -> None:
        """End the request within one step, whichever thread takes it; what has come by then can still be read. Answers
        that are not finished get the finish reason "cancelled"."""
        self._end("cancelled")

    def _end(self, reason: FinishReason | None) -> None:
        if not self._is_complete():  # even if it was ended before: the rest may have been interrupted
            self._call.end(reason)
            self._call.wake()
            scheduler = scheduler_of(self.model)
            scheduler.has_endings = True
            scheduler.tidy()

    # For a driver, which takes the steps and reads without waiting

    def announce_at(self, ready: threading.Event) -> None:
        """Have a shared event set with each piece and each end; to be called before the stream is submitted."""
        self._call.ready = ready

    @property
    def has_news(self) -> bool:
        """Whether there is a piece that has not been read, or no more will come."""
        return self._is_served()

    def take(self) -> tuple[list[Piece], bool]:
        """The pieces that have come and have not been read, and whether they are the last."""
        is_over = self._is_over()  # before the pieces, for more may come meanwhile
        return list(iter(self._next_unread, None)), is_over

    @property
    def failure(self) -> Exception | None:
        """The error that follows the last piece, if something went wrong."""
        try:
            self._raise_failures()
        except Exception as error:
            return error
        return None

    @property
    def finished(self) -> int:
        """How many of the request's answers are complete."""
        return sum(answer.is_over for answer in self._answers)

    @property
    def cached_tokens(self) -> int:
        """How many of its prompts' tokens were reused from earlier prompts. Of several answers to a prompt only the
        first counts, since the others share its row."""
        return sum(answer.cached_tokens for answer in self._answers[:: self.request.n or 1])

    @property
    def results(self) -> list[GenerationResult]:
        lengths = [(len(answer.prompt), len(answer.pieces)) for answer in self._answers]
        stats = self._clock.stats(lengths, sum(answer.cached_tokens for answer in self._answers))
        return [
            GenerationResult(
                "".join(piece.text for piece in answer.pieces),
                tuple(token for piece in answer.pieces for token in piece.token_ids),
                tuple(answer.prompt),
                answer.finish_reason if answer.is_over else self._call.reason,
                stats,
                answer.sampling.seed,
                answer.logprobs,
                answer.prompt_logprobs,
            )
            for answer in self._answers
        ]

    def _is_served(self) -> bool:
        return bool(self._call.arrived) or self._is_over()

    def _is_over(self) -> bool:
        """Whether no more pieces will come."""
        return self._call.is_ended or self._is_complete()

    def _is_complete(self) -> bool:
        over = self._over  # a local count, since other threads count too
        while over < len(self._answers) and self._answers[over].is_over:
            over += 1
        self._over = over
        return over == len(self._answers)

    def _next_unread(self) -> Piece | None:
        arrived = self._call.arrived
        answer = arrived.popleft() if arrived else None
        if answer is None and self._is_over():  # an interrupt may have come between a piece and the note of its arrival
            answer = next((late for late in self._answers if len(late.pieces) > self._read[late.index]), None)
        if answer is None:
            return None
        self._read[answer.index] += 1
        return answer.pieces[self._read[answer.index] - 1]

    def _raise_failures(self) -> None:
        for answer in self._answers:
            if answer.error is not None:
                raise answer.error
        failed = [answer for answer in self._answers if answer.has_overflowed]
        if failed:
            where = ", ".join(f"token {len(answer.pieces)} of prompt {answer.index}" for answer in failed)
            one = f"token {len(failed[0].pieces)}"
            raise non_finite(self.model, f"of {where if self.request.is_batch else one}")
