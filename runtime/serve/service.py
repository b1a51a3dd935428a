"""A loaded model as the endpoints use it: it takes requests in, and hands each the pieces of its answers."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import anyio.to_thread

from runtime import generation
from runtime.api import Model
from runtime.engine.driver import Delivery, Driver
from runtime.engine.stream import Stream
from runtime.errors import InvalidArgument
from runtime.serve.admission import Admission
from runtime.serve.answering import Answering
from runtime.serve.call_format import CallFormat, call_format
from runtime.serve.error import ApiError
from runtime.serve.metrics import Metrics
from runtime.text.tokenizer import Tokenizer

_log = logging.getLogger("gemma_runtime")

# One request for each kind of step: greedy or drawn tokens, from the head itself or from all logits.
_STEPS: tuple[dict[str, Any], ...] = ({}, {"temperature": 1.0}, {"logprobs": 0}, {"temperature": 1.0, "logprobs": 0})

Read = tuple[Sequence[Sequence[int]], int | None, dict[str, Any]]


class Work(NamedTuple):
    """What a request's body asks of the engine.

    Args:
        answers: how many, over all its prompts.
        read: returns the prompts' ids, the most tokens of an answer (None for as many as there is room for) and the
            engine's other options; runs in a thread, since prompts may be long.
    """

    answers: int
    read: Callable[[], Read]


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    Args:
        names: what clients call the model, the name in answers first.
        api_key: the key that clients must send; None for none.
        max_queue: how many answers may wait for a row.
        timeout_s: seconds after which a request is given up; None for never.
        cors_origins: origins whose web pages may use the server.
        read_gb_s: the machine's read bandwidth, for the metrics; None where it was not measured.
    """

    names: tuple[str, ...]
    api_key: str | None = None
    max_queue: int = 64
    timeout_s: float | None = None
    cors_origins: tuple[str, ...] = ()
    read_gb_s: float | None = None


class Service:
    """The model, its driver, and the requests under way. Apart from the driver's thread and the reading of prompts,
    everything runs on the event loop.

    Raises:
        InvalidArgument: the model has no tokenizer.
    """

    def __init__(self, model: Model, settings: Settings) -> None:
        if model.tokenizer is None:
            raise InvalidArgument(f"serving needs a tokenizer, but {model.name} has none")
        self.model, self.settings = model, settings
        self.tokenizer: Tokenizer = model.tokenizer
        self.admission = Admission(model.runtime.max_batch, settings.max_queue)
        self.metrics = Metrics(model, settings.names[0], self.admission, settings.read_gb_s)
        self.is_ready = False
        self.started_at = int(time.time())
        self._under_way: dict[Stream, Answering] = {}
        self._driver: Driver | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def name(self) -> str:
        """What the model is called in answers."""
        return self.settings.names[0]

    @functools.cached_property
    def call_format(self) -> CallFormat:
        """How the model writes tool calls.

        Raises:
            ApiError: its chat template takes no tools.
        """
        return call_format(self.tokenizer, self.model.config.stop_token_ids)

    @property
    def context(self) -> int:
        """The most tokens that prompt and answer may have together."""
        return self.model.runtime.max_seq_len

    async def start(self) -> None:
        """Starts the driver, and has everything that a step may need compiled before any client waits for it."""
        self._loop = asyncio.get_running_loop()
        self._driver = Driver(self.model, self._deliver)
        for options in _STEPS:
            warm_up = Answering(generation.stream(self.model, [0], max_new_tokens=2, reuse=False, **options))
            self._submit(warm_up)
            async for _ in warm_up.pieces():
                pass
        self.is_ready = True

    async def stop(self) -> None:
        """Ends every request under way, and closes the driver."""
        self.is_ready, self.admission.is_draining = False, True
        self.refuse()
        if self._driver is not None:
            await anyio.to_thread.run_sync(self._driver.close)

    def refuse(self) -> None:
        """Ends every request under way with an error."""
        for stream, answering in self._under_way.items():
            answering.is_refused = True
            stream.cancel()

    async def begin(self, work: Work) -> Answering:
        """Takes a request in.

        Raises:
            ApiError: there is no room, or the request is invalid.
            GemmaRuntimeError: likewise, from the engine.
        """
        received_s, answers = time.perf_counter(), work.answers
        self.admission.enter(answers)
        try:
            stream = await anyio.to_thread.run_sync(functools.partial(self._stream, work))
            answering = Answering(stream, lambda: self.admission.answered(answers), self.admission.leave)
            self._submit(answering)
            self.metrics.begin(stream, received_s)
        except BaseException:
            self.admission.answered(answers)
            self.admission.leave()
            raise
        return answering

    def _submit(self, answering: Answering) -> None:
        assert self._driver is not None, "started"
        self._driver.submit(answering.stream)
        self._under_way[answering.stream] = answering

    def _stream(self, work: Work) -> Stream:
        prompts, most, options = work.read()
        longest = max(map(len, prompts))
        wanted = self.context - longest if most is None else most
        if wanted < 0 or longest + wanted > self.context or (longest == self.context and most is None):
            raise ApiError(
                400,
                f"prompt and max_tokens must fit the context of {self.context} tokens together, got {longest} + "
                f"{max(wanted, 1)}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return generation.stream(
            self.model, list(prompts), max_new_tokens=wanted, timeout=self.settings.timeout_s, **options
        )

    def _deliver(self, deliveries: list[Delivery]) -> None:
        """Passes deliveries from the driver's thread to the event loop."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._hand_on, deliveries, time.perf_counter())
        except RuntimeError:  # the loop has been closed
            pass

    def _hand_on(self, deliveries: list[Delivery], at_s: float) -> None:
        self.metrics.step(deliveries, at_s)
        for delivery in deliveries:
            self._under_way[delivery.stream].arrive(delivery)
            if delivery.is_last:
                self._under_way.pop(delivery.stream).answered()
