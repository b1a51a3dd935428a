"""Decode steps of all running answers: plain, speculative, masked, or with tokens that the answers choose."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Collection, Iterable
from enum import Enum

import torch

from runtime.engine import decode
from runtime.engine.answer import Answer
from runtime.engine.choosing import chosen
from runtime.engine.masks import Masks
from runtime.engine.pending import Launched, PendingTokens, give
from runtime.engine.prefill import warm_up
from runtime.engine.ranges import marked
from runtime.engine.rows import Rows
from runtime.engine.speculation import Speculation, can_speculate
from runtime.families.state import EMITTED_RING
from runtime.model.model import Model

_log = logging.getLogger("gemma_runtime")


class Choosing(Enum):
    """How a step's tokens are chosen, apart from temperatures."""

    HEAD = "head"
    MASKS = "masks"  # by the head, among the tokens of a mask in some rows
    LOGITS = "logits"  # in some rows by their answers, from all logits

    @staticmethod
    def of(answers: Iterable[Answer]) -> Choosing:
        """What a step of some answers needs."""
        choices = [answer.choice for answer in answers if answer.choice]
        if not choices:
            return Choosing.HEAD
        return Choosing.MASKS if all(choice.is_masked_pick for choice in choices) else Choosing.LOGITS


class Steps:
    """Launches the next steps of the rows.

    Args:
        device: what takes them.
        rows: whose answers they are for.
        pending: where their tokens are requested.
        ahead: launches that the device is kept ahead of the host, so that it never waits for the host; 0 on a CPU.
    """

    def __init__(self, device: decode.DeviceSteps, rows: Rows, pending: PendingTokens, ahead: int) -> None:
        self._device, self._rows, self._pending, self._ahead = device, rows, pending, ahead
        self._masks = Masks(rows.state)
        self._speculation: dict[bool, Speculation] = {}  # by whether answers choose their tokens from logits
        self._warm: set[tuple[Choosing, bool]] = set()  # the steps that are compiled, and whether they draw tokens

    def launch(self, model: Model) -> bool:
        """Launches steps until the device is as far ahead of the host as it may be.

        Returns:
            Whether the oldest tokens on their way are to be waited for now.
        """
        rows, pending, choosing = self._rows, self._pending, Choosing.of(self._rows.running)
        if len(rows.running) == 1 and rows.running[0].call.speculates and can_speculate(model):
            if not pending:  # guesses need all tokens so far
                self._speculate(model)
            return True
        if choosing is Choosing.MASKS:
            return self._is_last_step() or self._step_by_masks(model)
        if choosing is Choosing.LOGITS:
            if not pending and not self._is_last_step():  # choices need all tokens so far
                with marked("step"):
                    self._take_step(model)
                self._request(model)
            return True
        most = model.runtime.steps_per_graph if self._ahead else 1
        while rows.running and len(pending) <= self._ahead:
            left = max(answer.max_new_tokens - 1 - answer.steps for answer in rows.running)
            if left <= 0:
                return True
            count = most if left >= most else 1
            view = rows.of_step(model)
            with marked("step"):
                self._device.launch(model, view, count, rows.samples)
            self._request(model, count)
        return True

    def _is_last_step(self) -> bool:
        """Whether every answer has had all of its steps."""
        return all(answer.max_new_tokens - 1 <= answer.steps for answer in self._rows.running)

    def _take_step(self, model: Model, before_masks: Callable[[], None] = lambda: None) -> None:
        """Launches one step, in which tokens are chosen as the answers need. `before_masks` runs before masks are
        filled, which needs all tokens so far."""
        rows, choosing = self._rows, Choosing.of(self._rows.running)
        view = rows.of_step(model, with_logits=choosing is Choosing.LOGITS)

        @torch.inference_mode()
        def choose() -> None:
            assert view.logits is not None
            for row, answer in enumerate(rows.running):
                if answer.choice:
                    view.token[row] = chosen(answer, int(view.token[row]), view.logits[row])

        def fill() -> None:
            before_masks()
            self._masks.fill(rows.running)

        if choosing is Choosing.LOGITS:
            self._device.choose(model, view, choose, rows.samples)
        elif choosing is Choosing.MASKS:
            self._device.mask(model, view, fill, rows.samples)
        else:
            self._device.launch(model, view, 1, rows.samples)

    def _step_by_masks(self, model: Model) -> bool:
        """Launches one step with masks: its layers, then its head once all earlier tokens have been handed out. Rows
        keep their places until then.

        Returns:
            Whether its tokens are to be waited for now: on a GPU once the next step's layers are launched.
        """

        def hand_out_all() -> None:
            while self._pending:
                self._pending.hand_out_oldest()

        with marked("step"):
            self._take_step(model, hand_out_all)
        self._request(model)
        self._rows.take_back()
        return not self._ahead

    def _request(self, model: Model, count: int = 1) -> None:
        """Asks for the tokens of steps that have just been launched."""
        rows = self._rows
        view, steps = rows.of_step(model), range(rows.steps, rows.steps + count)
        rows.steps += count
        for answer in rows.running:
            answer.steps += count
        tokens = [view.emitted_at[at % EMITTED_RING] for at in steps] if self._ahead else [view.token_array]
        self._pending.request(model, rows.state, tokens, Launched(tuple(rows.running), steps))

    def _speculate(self, model: Model) -> None:
        """Takes the next step of the only running answer, and hands out its tokens, of which there may be several."""
        rows = self._rows
        (answer,) = rows.running
        chooses = answer.choice is not None
        if chooses not in self._speculation:
            self._speculation[chooses] = Speculation(model, rows.first(rows.state.batch, with_logits=chooses))
        with marked("step"):
            tokens, error = self._speculation[chooses].step(model, answer, functools.partial(self._take_step, model))
        step, rows.steps = rows.steps, rows.steps + 1
        answer.steps += len(tokens)
        for token in tokens:
            if not answer.is_over:
                give(answer, token, step)
        if error and not answer.is_over:
            answer.fail(error)
        rows.take_back()

    def warm_up(self, model: Model, waiting: Collection[Answer]) -> None:
        """Compiles and captures plain steps and those that the waiting answers need, unless it already has. No row may
        have an answer, since each kind takes one step, after which all rows are freed."""
        samples = any(answer.sampling.samples for answer in waiting)
        for choosing, draws in dict.fromkeys(((Choosing.HEAD, False), (Choosing.of(waiting), samples))):
            if (choosing, draws) not in self._warm:
                self._warm_up(model, max(1, min(len(waiting), self._rows.state.batch)), choosing, draws)
                self._warm.add((choosing, draws))

    def _warm_up(self, model: Model, answers: int, choosing: Choosing, samples: bool) -> None:
        _log.info("%s: compiling and capturing the decode step, or loading it from the cache", model.name)
        started = time.perf_counter()
        rows = self._rows
        view = rows.first(decode.rows_of_step(model, answers), with_logits=choosing is Choosing.LOGITS)
        with marked("warm-up"):
            if choosing is Choosing.LOGITS:
                self._device.choose(model, view, lambda: None, samples)
            elif choosing is Choosing.MASKS:
                self._device.mask(model, view, lambda: None, samples)
            else:
                self._device.launch(model, view, 1, samples)
            warm_up(model, rows.first(rows.state.batch, with_logits=choosing is not Choosing.HEAD), samples)
        rows.forget()
        _log.info("%s: decode step ready after %.1f s", model.name, time.perf_counter() - started)
