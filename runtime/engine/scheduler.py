"""The engine's inside: which answer has which row, and what one step does.

The rows of the decode state are handed out from the first on, so that a step of `n` answers takes the first `n` rows;
when one ends, the last takes its place. Answers wait in the order of their requests. A prompt is filled in chunks into
the row after the last one, between the steps of the others. Nothing of a row's result depends on which row it is, on
the others, or on when they came.

Whoever waits for an answer takes the steps, for everybody's rows, while nobody else does (turn.py): a lone caller
decodes in its own thread, and a reader who does not read holds up no one.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import torch

from runtime.engine import decode
from runtime.engine.answer import Answer, Call
from runtime.engine.choosing import choose_first, chosen
from runtime.engine.masks import Masks
from runtime.engine.prefill import Prefill, prefill_budget, warm_up
from runtime.engine.prefix_cache import PrefixCache
from runtime.engine.prompt_logprobs import ScoredPrefill
from runtime.engine.ranges import marked
from runtime.engine.readback import Readback
from runtime.engine.speculation import Speculation, can_speculate
from runtime.engine.turn import Turn
from runtime.engine.views import Views
from runtime.errors import ModelClosed, QueueFull
from runtime.families.state import EMITTED_RING, DecodeState, new_state
from runtime.kernels.argmax import NO_TOKEN
from runtime.model.model import Model

_log = logging.getLogger("gemma_runtime")


class Launched(NamedTuple):
    """Tokens on their way to the host."""

    answers: tuple[Answer, ...]  # by row
    steps: range | None  # the decode step that picks each; None for a prompt's first token


class Choosing(Enum):
    """What a step's tokens are chosen by, beside temperatures."""

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


class Scheduler:
    """Hands a model's rows to answers, and takes all of them a step further at a time.

    Everything but `submit`, `drive` and `tidy` is for whoever has the turn.
    """

    def __init__(self, model: Model, steps: decode.DeviceSteps | None = None) -> None:
        self.turn = Turn()
        self.state: DecodeState | None = None  # of max_batch rows, with the graphs captured on it
        self.is_closed = False
        self.has_endings = False  # some call has been asked to end
        self._is_watching = False  # some call ends by its time or its event
        self._device = steps or decode.DeviceSteps()
        self._model = weakref.ref(model)  # weak: a cycle would leave both to the garbage collector
        self._waiting: deque[Answer] = deque()
        self._running: list[Answer] = []  # by row
        self._filling: tuple[Answer, Prefill] | None = None  # in the row after the last that runs
        self._launched: deque[Launched] = deque()
        self._readback: Readback | None = None
        self._prefix_cache: PrefixCache | None = None
        self._speculation: dict[bool, Speculation] = {}  # by whether answers choose their tokens from logits
        self._views: Views | None = None  # of the state
        self._masks: Masks | None = None  # of its rows
        self._steps = 0  # decode steps launched on the state
        self._ahead = 0  # launches that a GPU is kept ahead of the host, so that it never waits for the host
        self._is_chunks_turn = True  # while others decode, chunks of prompts alternate with steps
        self._is_changing = False  # the rows, by whoever has the turn; where that is cut short it stays True
        self._warm: set[tuple[Choosing, bool]] = set()  # the steps that are compiled: and whether they draw tokens
        self._process = os.getpid()

    # What any thread may call

    def submit(self, answers: Sequence[Answer], most_waiting: int | None = None) -> None:
        """Lets answers wait for a row.

        Raises:
            QueueFull: `most_waiting` answers wait already.
        """
        self._check_process()
        if most_waiting is not None and len(self._waiting) >= most_waiting:
            self.turn.run(functools.partial(self._change, self._end))  # what nobody reads waits until somebody looks
            if (waiting := len(self._waiting)) >= most_waiting:
                raise QueueFull(f"the queue is full: {waiting} prompts wait for a row, and max_queue = {most_waiting}")
        self._waiting.extend(answer for answer in answers if not answer.is_over)
        if any(answer.call.is_watched for answer in answers):
            self._is_watching = True  # assigned and not or-ed, since other threads assign it meanwhile

    @property
    def waiting(self) -> int:
        """How many answers wait for a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many answers have a row."""
        return len(self._running) + (self._filling is not None)

    @property
    def tokens(self) -> int:
        """Tokens in the rows' caches."""
        return sum(len(answer.prompt) + answer.steps for answer in tuple(self._running))

    def drive(self, call: Call, is_served: Callable[[], bool]) -> None:
        """Waits until a reader is served, taking steps for everybody while nobody else does.

        Raises:
            ModelClosed: the model has been closed.
            Exception: a step has failed.
        """
        step = functools.partial(self.step, call)
        try:
            while not is_served() and self.turn.run(step):
                pass
            if is_served():  # without having waited for anybody
                return
            with self.turn.waits(call.ready) as ready:
                while not is_served():
                    if not self.turn.run(step):
                        self.turn.wait(ready)
        finally:
            self.tidy()

    def tidy(self) -> None:
        """Gives back the rows of calls that have ended, and a closed model's memory, unless somebody runs the model,
        who will do it."""
        while self.has_endings or self.is_closed:
            if not self.turn.run(functools.partial(self._change, self._collect)):
                return
            if self.is_closed:
                self.turn.run(self._free_model)
                break
        self.turn.wake_next()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until nobody runs the model, and keeps it so inside the `with` block.

        Raises:
            ModelClosed: the model has been closed.
        """
        try:
            with self.turn.held():
                self._open_model()
                yield
        finally:
            self.tidy()

    @contextmanager
    def free_row(self) -> Iterator[tuple[DecodeState, int]]:
        """The same, with a row that no answer has: the state and the row's index. What is left in it is nobody's."""
        with self.alone():
            state = self._ready_state(decodes=False)
            while len(self._running) + (self._filling is not None) == state.batch:
                self.step()
            self._is_changing = True
            yield state, state.batch - 1
            self._is_changing = False

    # What the holder of the turn does

    def step(self, call: Call | None = None) -> None:
        """Takes the next step: rows are given back and out, a chunk of a prompt is run or a decode step is launched,
        and the oldest tokens on their way are handed out.

        Whatever interrupts it, nothing is lost: answers begin anew from their prompts, give the same tokens, and hand
        out only what has not been handed out.

        Args:
            call: of the caller, who gets an error in a chunk of its own prompts; others' errors go to others.
        """
        self._check_process()
        self._change(functools.partial(self._step, call))

    def _change(self, action: Callable[[], None]) -> None:
        """Runs what changes rows. Where it is cut short, even while it makes good what was cut short before, the next
        one makes that good first."""
        if self._is_changing:
            self._begin_anew()
        self._is_changing = True
        action()
        self._is_changing = False

    def _step(self, call: Call | None) -> None:
        state = self._ready_state()
        self._end()
        if self._is_chunks_turn or not self._running:
            self._fill(state, call)
        self._is_chunks_turn = True
        if self._launched and not self._ahead:  # a CPU is never ahead: first tokens go out before the next step
            self._is_chunks_turn = False
            is_due = True
        else:
            is_due = self._launch(state)
        if self._launched and is_due:
            self._hand_out(state)

    def _fill(self, state: DecodeState, call: Call | None) -> None:
        """Runs prompts: a budget's worth where others decode, else as many as there are rows for."""
        if not self._waiting and self._filling is None:
            return
        model = self._open_model()
        others_decode = any(answer.steps for answer in self._running)
        budget = prefill_budget(model)
        left: float = budget
        while True:
            if self._filling is None:
                while self._waiting and self._waiting[0].is_over:
                    self._waiting.popleft()
                if not self._waiting or len(self._running) == state.batch:
                    return
            answer = self._waiting[0] if self._filling is None else self._filling[0]
            try:
                prefill = self._give_row(model, state, answer) if self._filling is None else self._filling[1]
                if others_decode and left < min(budget, prefill.next_work):
                    return
                # Whole chunks on a GPU, where a step of more rows than answers may run over the prompt's row.
                left -= prefill.advance(math.inf if self._ahead else left if others_decode else budget)
            except Exception as error:
                if call is answer.call:
                    raise
                answer.fail(error)
                self._filling = None
                continue
            if prefill.is_done:
                self._running.append(answer)
                self._filling = None
                self._begin(model, state, answer, prefill)
            if not others_decode and (self.has_endings or self._is_watching):
                return  # somebody may be about to end one of them

    def _give_row(self, model: Model, state: DecodeState, answer: Answer) -> Prefill:
        """Lets the first that waits begin in the row after the last that runs."""
        row, sampling = len(self._running), answer.sampling
        if answer.call.clock:
            answer.call.clock.start()
        self._set_row(state, row, answer)
        top, samples = sampling.prompt_logprobs, sampling.samples
        if answer.choice or top is not None or self._is_wanted_again(answer):
            state = self._view(state.batch, with_logits=True)
        cache = self._prefix_cache if answer.call.reuses else None
        if top is None:
            prefill = Prefill(model, state, row, answer.prompt, cache=cache, samples=samples)
        else:
            prefill = ScoredPrefill(model, state, row, answer.prompt, top, samples=samples)
        answer.cached_tokens = prefill.cached_tokens
        self._filling = answer, prefill
        self._waiting.popleft()
        return prefill

    def _set_row(self, state: DecodeState, row: int, answer: Answer) -> None:
        answer.rewind()  # it may have had a row before a step was cut short
        # The first token comes from prefill, so that one step fewer is left.
        limit = len(answer.prompt) + max(answer.max_new_tokens - 1, 0)
        sampling = answer.sampling
        state.set_row(row, tuple(answer.stop_ids), limit, sampling.seed or 0, sampling.inverse_temperature)

    def _is_wanted_again(self, answer: Answer) -> bool:
        """Whether the second that waits is another answer to the same prompt."""
        return len(self._waiting) > 1 and _share_prompt(answer, self._waiting[1])

    def _begin(self, model: Model, state: DecodeState, answer: Answer, prefill: Prefill) -> None:
        """Asks for the first token of an answer whose prompt has been filled, and lets others to the same prompt begin
        in copies of its row."""
        row = prefill.row
        if answer.choice:
            choose_first(model, self._view(state.batch, with_logits=True), row, answer, row)
        if isinstance(prefill, ScoredPrefill):
            answer.prompt_logprobs = tuple(prefill.logprobs)
        self._request_first(state, row, answer)
        if not prefill.leaves_logits:  # and none was waiting when it began
            return
        while self._waiting and _share_prompt(answer, self._waiting[0]) and len(self._running) < state.batch:
            other, target = self._waiting[0], len(self._running)
            if not other.is_over:
                self._running.append(other)
                state.copy_row(row, target, len(answer.prompt))
                self._set_row(state, target, other)
                choose_first(model, self._view(state.batch, with_logits=True), target, other, row)
                other.cached_tokens, other.prompt_logprobs = len(answer.prompt), answer.prompt_logprobs
                self._request_first(state, target, other)
            self._waiting.popleft()

    def _request_first(self, state: DecodeState, row: int, answer: Answer) -> None:
        if not answer.max_new_tokens:
            answer.finish("length")
        # A copy, since the next step overwrites it.
        self._request(state, [state.token[row : row + 1].clone()], Launched((answer,), None))

    def _launch(self, state: DecodeState) -> bool:
        """Launches decode steps until the device is as far ahead of the host as it may be.

        Returns:
            Whether the oldest tokens on their way are to be waited for now.
        """
        model, choosing = self._open_model(), Choosing.of(self._running)
        if self._is_speculating(model):
            if not self._launched:  # guesses follow from all tokens so far
                self._speculate(model, state)
            return True
        if choosing is Choosing.MASKS:
            return self._is_last_step() or self._step_by_masks(model, state)
        if choosing is Choosing.LOGITS:
            if not self._launched and not self._is_last_step():  # choices follow from all tokens so far
                with marked("step"):
                    self._take_step(model)
                self._request_step()
            return True
        most = model.runtime.steps_per_graph if self._ahead else 1
        while self._running and len(self._launched) <= self._ahead:
            left = max(answer.max_new_tokens - 1 - answer.steps for answer in self._running)
            if left <= 0:
                return True
            count = most if left >= most else 1
            view = self._step_view(model)
            with marked("step"):
                self._device.launch(model, view, count, self._samples)
            self._request_step(count)
        return True

    def _is_last_step(self) -> bool:
        """Whether every answer has had all of its steps."""
        return all(answer.max_new_tokens - 1 <= answer.steps for answer in self._running)

    @property
    def _samples(self) -> bool:
        """Whether tokens of some answer are drawn."""
        return any(answer.sampling.samples for answer in self._running)

    def _step_view(self, model: Model, with_logits: bool = False) -> DecodeState:
        """The rows of the next step."""
        return self._view(decode.rows_of_step(model, len(self._running)), with_logits)

    def _take_step(self, model: Model, before_masks: Callable[[], None] = lambda: None) -> None:
        """Launches one step, in which the answers' tokens are chosen as they ask. `before_masks` runs before masks are
        filled, which follow from all tokens so far."""
        choosing = Choosing.of(self._running)
        view = self._step_view(model, with_logits=choosing is Choosing.LOGITS)

        @torch.inference_mode()
        def choose() -> None:
            assert view.logits is not None
            for row, answer in enumerate(self._running):
                if answer.choice:
                    view.token[row] = chosen(answer, int(view.token[row]), view.logits[row])

        def fill() -> None:
            before_masks()
            assert self._masks is not None, "made with the state"
            self._masks.fill(self._running)

        if choosing is Choosing.LOGITS:
            self._device.choose(model, view, choose, self._samples)
        elif choosing is Choosing.MASKS:
            self._device.mask(model, view, fill, self._samples)
        else:
            self._device.launch(model, view, 1, self._samples)

    def _step_by_masks(self, model: Model, state: DecodeState) -> bool:
        """Launches one step by masks: its layers, and once the tokens before it are known and handed out, its head.
        Rows keep their places until then.

        Returns:
            Whether its tokens are to be waited for now: on a GPU once the next step's layers are launched.
        """

        def hand_out_all() -> None:
            while self._launched:
                self._hand_out_oldest()

        with marked("step"):
            self._take_step(model, hand_out_all)
        self._request_step()
        self._take_rows_back(state)
        return not self._ahead

    def _request_step(self, count: int = 1) -> None:
        """Asks for the tokens of steps that have just been launched."""
        view, steps = self._step_view(self._open_model()), range(self._steps, self._steps + count)
        self._steps += count
        for answer in self._running:
            answer.steps += count
        tokens = [view.emitted_at[at % EMITTED_RING] for at in steps] if self._ahead else [view.token_array]
        assert self.state is not None
        self._request(self.state, tokens, Launched(tuple(self._running), steps))

    def _is_speculating(self, model: Model) -> bool:
        """Whether the next step is of an answer that is to be guessed at, and of no other."""
        return len(self._running) == 1 and self._running[0].call.speculates and can_speculate(model)

    def _speculate(self, model: Model, state: DecodeState) -> None:
        """Takes the next step of the one answer that runs, and hands out its tokens, of which it may have several."""
        (answer,) = self._running
        chooses = answer.choice is not None
        if chooses not in self._speculation:
            self._speculation[chooses] = Speculation(model, self._view(state.batch, with_logits=chooses))
        with marked("step"):
            tokens, error = self._speculation[chooses].step(model, answer, functools.partial(self._take_step, model))
        step, self._steps = self._steps, self._steps + 1
        answer.steps += len(tokens)
        for token in tokens:
            if not answer.is_over:
                self._give(answer, token, step)
        if error and not answer.is_over:
            answer.fail(error)
        self._take_rows_back(state)

    def _view(self, rows: int, with_logits: bool = False) -> DecodeState:
        """The state's first rows, as `Views.first`."""
        assert self._views is not None, "made with the state"
        return self._views.first(rows, with_logits)

    def _request(self, state: DecodeState, tokens: Sequence[Any], launched: Launched) -> None:
        if self._readback is None:
            most = self._ahead + 1 + state.batch  # launches of steps, and first tokens
            self._readback = self._device.readback(self._open_model(), state, most)
        self._readback.request(tokens)
        self._launched.append(launched)

    def _hand_out(self, state: DecodeState) -> None:
        """Waits for the oldest tokens on their way, hands them out, and gives back rows of answers that are over."""
        self._hand_out_oldest()
        self._take_rows_back(state)

    def _hand_out_oldest(self) -> None:
        assert self._readback is not None
        answers, steps = self._launched[0]
        with marked("readback"):
            read = self._readback.take()
        for at, tokens in enumerate(read):
            for answer, token in zip(answers, tokens, strict=False):  # a step may have more rows than answers
                if not answer.is_over:
                    self._give(answer, token, None if steps is None else steps[at])
        self._launched.popleft()

    def _give(self, answer: Answer, token: int, step: int | None) -> None:
        if clock := answer.call.clock:
            clock.first() if step is None else clock.tick(step)
        if token == NO_TOKEN:
            answer.has_overflowed = True
            answer.finish(None)
            return
        try:
            answer.take(token)
        except Exception as error:
            answer.fail(error)

    def _take_rows_back(self, state: DecodeState) -> None:
        """Gives the rows of answers that are over to others: the last one that runs moves into each."""
        for row in reversed(range(len(self._running))):
            if not self._running[row].is_over:
                continue
            last = self._running[-1]
            if last is self._running[row]:
                state.done[row] = True
            else:
                state.move_row(len(self._running) - 1, row, len(last.prompt) + last.steps)
                self._running[row] = last
            self._running.pop()
            if self._filling:
                prefill = self._filling[1]
                state.move_row(prefill.row, len(self._running), prefill.tokens)
                prefill.row = len(self._running)

    def _on_rows(self) -> list[Answer]:
        return [*self._running, *([] if self._filling is None else [self._filling[0]])]

    def _end(self) -> None:
        """Ends what is to end, if anything is."""
        if self._is_watching:
            self._look()
        if self.has_endings:
            self._collect()

    def _look(self) -> None:
        """Asks the calls that something outside may end."""
        self._is_watching = False  # first, for other threads set it meanwhile
        for answer in (*self._on_rows(), *self._waiting):
            if answer.call.is_watched:
                self._is_watching = True
                answer.call.look()
                if answer.call.is_ended:
                    self.has_endings = True

    def _collect(self) -> None:
        """Ends what its call has asked to end."""
        self.has_endings = False
        for answer in (*self._on_rows(), *self._waiting):
            if answer.call.is_ended and not answer.is_over:
                answer.finish(answer.call.reason)
        if self._filling and self._filling[0].is_over:
            self._filling = None
        for answer in [answer for answer in tuple(self._waiting) if answer.is_over]:
            self._waiting.remove(answer)  # in place, for other threads add to it meanwhile
        if self.state is not None:
            self._take_rows_back(self.state)

    def _begin_anew(self) -> None:
        """After whatever was raised: the state is made ready, and what had a row waits again, before all others. An
        answer may be noted twice, as it goes from one place to the next."""
        waiting = set(self._waiting)
        answers = dict.fromkeys(answer for answer in self._on_rows() if not (answer.is_over or answer in waiting))
        self._waiting.extendleft(reversed(answers))
        self._forget_rows()
        self.has_endings = True  # of an end that was cut short

    def _ready_state(self, *, decodes: bool = True) -> DecodeState:
        """The decode state, allocated once. Where steps follow, one without answers first compiles the kernels, so that
        no token waits for that."""
        model = self._open_model()
        if self.state is None:
            self._ahead = self._device.ahead(model)
            self._prefix_cache = PrefixCache(model)
            state = new_state(model, model.runtime.max_batch)
            self._views, self._masks, self.state = Views(state, model.config.vocab), Masks(state), state
            self._forget_rows()
        if decodes and not self._running and self._filling is None and not model.runtime.eager:
            samples = any(answer.sampling.samples for answer in self._waiting)
            for kind in dict.fromkeys(((Choosing.HEAD, False), (Choosing.of(self._waiting), samples))):
                if kind not in self._warm:
                    self._warm_up(model, self.state, *kind)
        return self.state

    def _warm_up(self, model: Model, state: DecodeState, choosing: Choosing, samples: bool) -> None:
        _log.info("%s: compiling and capturing the decode step, or loading it from the cache", model.name)
        started = time.perf_counter()
        rows = decode.rows_of_step(model, max(1, min(len(self._waiting), state.batch)))
        with marked("warm-up"):
            if choosing is Choosing.LOGITS:
                self._device.choose(model, self._view(rows, with_logits=True), lambda: None, samples)
            elif choosing is Choosing.MASKS:
                self._device.mask(model, self._view(rows), lambda: None, samples)
            else:
                self._device.launch(model, self._view(rows), 1, samples)
            warm_up(model, self._view(state.batch, with_logits=choosing is not Choosing.HEAD), samples)
        self._forget_rows()
        self._warm.add((choosing, samples))
        _log.info("%s: decode step ready after %.1f s", model.name, time.perf_counter() - started)

    def _open_model(self) -> Model:
        model = self._model()
        assert model is not None, "a request holds its model"
        if self.is_closed:
            raise ModelClosed(f"{model.name} has been closed: load it again")
        return model

    def _forget_rows(self) -> None:
        """Makes every row one that nobody has, on the host and on the device."""
        self._running.clear()
        self._filling = None
        self._launched.clear()
        self._readback = None
        self._is_chunks_turn = True
        self._steps = 0
        if self.state is not None:
            self.state.reset()
            self.state.done.fill_(True)

    def clear(self) -> None:
        """Ends every call, and drops the state and its graphs. Calls that come meanwhile wait for new ones."""
        with self.alone():
            for answer in (*self._on_rows(), *self._waiting):
                answer.call.end("cancelled")
            self._change(self._collect)
            self._free_state()

    def _check_process(self) -> None:
        """In a forked child there are no readers but those that ask again."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._waiting.clear()
            self._forget_rows()

    def _free_state(self) -> None:
        self.state = self._views = self._masks = self._prefix_cache = None
        self._speculation.clear()
        self._forget_rows()
        self._warm.clear()

    def _free_model(self) -> None:
        """Drops the state, its graphs and the weights. Whoever waits finds the model closed."""
        self._free_state()
        self._waiting.clear()
        self.turn.wake_all()
        if model := self._model():
            vars(model).pop("weights", None)
            vars(model).pop("rope", None)


def _share_prompt(answer: Answer, other: Answer) -> bool:
    """Whether one run of a prompt does for two answers: they are of one request, or may take over what others leave."""
    if answer.prompt is other.prompt:
        return True
    return (
        (answer.call.reuses and other.call.reuses)
        and answer.prompt == other.prompt
        and answer.sampling.prompt_logprobs == other.sampling.prompt_logprobs
    )


def scheduler_of(model: Model) -> Scheduler:
    """A model's scheduler, created on first use."""
    scheduler: Scheduler | None = model.engine
    if scheduler is None:
        # Atomic, so that threads whose first requests meet share one; a lock could stay held after Ctrl-C.
        scheduler = vars(model).setdefault("_engine", Scheduler(model))
    return scheduler


def is_closed(model: Model) -> bool:
    return model.engine is not None and model.engine.is_closed


def check_open(model: Model) -> None:
    """Refuse a closed model.

    Raises:
        ModelClosed: it is one.
    """
    if is_closed(model):
        raise ModelClosed(f"{model.name} has been closed: load it again")


def close(model: Model) -> None:
    """Free a model's memory, now or after the step under way, which reads the weights. Whoever waits for the model or
    reads a stream of it finds it closed."""
    scheduler = scheduler_of(model)
    scheduler.is_closed = True
    scheduler.tidy()
