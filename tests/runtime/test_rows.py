"""Rows: requests that come and go at any step, each with the answer that it gets alone."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import json
import random
import threading
import time
from collections import deque

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.routing import Route

import runtime
from runtime.engine import decode
from runtime.engine.pending import PendingTokens
from runtime.engine.prefill import Prefill
from runtime.engine.result import GenerationResult
from runtime.engine.scheduler import scheduler_of
from runtime.kernels.launch import INTERPRETING

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[2, *(7 + (5 * i * k) % 90 for k in range(length))] for i, length in enumerate((1, 3, 9, 17, 30, 45), 1)]
LONGEST = 24
if INTERPRETING:  # where a step takes half a second
    PROMPTS, LONGEST = PROMPTS[2:5], 5
# Every second prompt's tokens are drawn.
TEMPERATURES = [0.0 if index % 2 == 0 else 0.5 + 0.25 * index for index in range(len(PROMPTS))]
SAMPLING = [{"temperature": value, "seed": index} for index, value in enumerate(TEMPERATURES)]


class Late:
    """Reads tokens as late as the engine lets it: what a device that is far ahead of the host leaves in its buffers."""

    def __init__(self, device, requests, steps, rows):
        self.requests, self.steps, self.rows, self.waiting = requests, steps, rows, deque()

    def request(self, tokens):
        assert len(self.waiting) < self.requests and len(tokens) <= self.steps
        assert all(len(values) <= self.rows for values in tokens)
        self.waiting.append(list(tokens))

    def take(self):
        return [values.tolist() for values in self.waiting.popleft()]


def fresh(model, **limits):
    """The same weights with an engine of their own."""
    return dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, **limits))


@pytest.fixture(scope="module")
def small_in(small_pair):
    """A function that gives a small model in a dtype."""
    layers = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]} if INTERPRETING else {}
    return lambda dtype: fresh(small_pair("gemma3", dtype, sliding_window=16, **layers).ours, threads=1)


@pytest.fixture(scope="module")
def small(small_in):
    return small_in(torch.float32)


KINDS = {
    "compiled": {},
    "compiled, bf16": {"dtype": torch.bfloat16},
    "eager": {"eager": True},
    "eager, bf16": {"eager": True, "dtype": torch.bfloat16},
    "ahead of the host": {"steps_per_graph": 1},
    "eight steps a graph": {"steps_per_graph": 8},
}
# Compiled and by PyTorch's operations; how far a device is ahead is the scheduler's, which is the same.
WITH_OLDEST = ["compiled, bf16", "eager"]
if INTERPRETING:  # tests/test_interpreter.py
    KINDS = {"interpreted": {}, "interpreted, bf16": {"dtype": torch.bfloat16}}
    WITH_OLDEST = ["interpreted"]


@pytest.fixture(scope="module")
def answers_alone(small_in):
    """A function that gives a model's answers one at a time."""

    @functools.cache
    def of(dtype, eager):
        alone, options = fresh(small_in(dtype), max_batch=1, eager=eager), {"max_new_tokens": LONGEST}
        return [
            runtime.generate(alone, prompt, **options, **sampling, ignore_eos=True).token_ids
            for prompt, sampling in zip(PROMPTS, SAMPLING, strict=True)
        ]

    return of


@pytest.fixture(
    params=[pytest.param(name, marks=() if name in WITH_OLDEST else pytest.mark.newest_only) for name in KINDS]
)
def kind(request, small_in, answers_alone, monkeypatch):
    """A model, and its answers one at a time."""
    limits = dict(KINDS[request.param])
    dtype = limits.pop("dtype", torch.float32)
    answers = answers_alone(dtype, limits.get("eager", False))
    if "steps_per_graph" in limits:
        ahead = max(1, decode.HOST_LAG // limits["steps_per_graph"])
        monkeypatch.setattr(decode, "launches_ahead", lambda model: ahead)
        monkeypatch.setattr(decode, "readback_for", Late)
        monkeypatch.setattr(
            decode, "rows_of_step", lambda model, rows: min(1 << (rows - 1).bit_length(), model.runtime.max_batch)
        )
    return fresh(small_in(dtype), max_batch=4, **limits), answers


@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "eager"])
def test_sixteen_rows_leave_every_answer_as_it_is_alone(small, eager):
    """While prompts of several lengths come, and answers of several lengths end."""
    prompts = [[2, *(7 + (3 * i * k) % 90 for k in range(2 + i % 7))] for i in range(20)]
    alone, model = (fresh(small, max_batch=rows, eager=eager) for rows in (1, 16))
    expected = [runtime.generate(alone, prompt, max_new_tokens=24, ignore_eos=True).token_ids for prompt in prompts]
    streams = [
        runtime.stream(model, prompt, max_new_tokens=24 - index % 5, ignore_eos=True)
        for index, prompt in enumerate(prompts)
    ]
    for stream in streams:
        stream.submit()
    for stream, tokens in zip(streams, expected, strict=True):
        got = tuple(piece.token_ids[0] for piece in stream)
        assert got == tokens[: len(got)] and len(got) >= 20


class Failure(Exception):
    pass


actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, len(PROMPTS) - 1), st.integers(0, LONGEST)),
        st.tuples(st.just("read"), st.integers(0, 9), st.integers(1, 12)),
        st.tuples(st.sampled_from(["cancel", "close", "forget", "interrupt"]), st.integers(0, 9), st.just(0)),
    ),
    min_size=10,
    max_size=25,
)


@settings(
    deadline=None,
    max_examples=3 if INTERPRETING else 8,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(actions)
def test_whatever_comes_and_goes_every_answer_is_the_one_it_has_alone(kind, actions):
    model, answers = kind
    model = dataclasses.replace(model)
    engine = scheduler_of(model)
    open_ = []  # (stream, prompt, most, what has been read)

    def read(entry, count):
        stream, _, _, got = entry
        for _ in range(count):
            piece = next(stream, None)
            if piece is None:
                return
            got.extend(piece.token_ids)

    for what, which, number in actions:
        if what == "submit":
            stream = runtime.stream(model, PROMPTS[which], max_new_tokens=number, ignore_eos=True, **SAMPLING[which])
            stream.submit()
            open_.append((stream, which, number, []))
            del stream  # so that one that is forgotten is
        elif open_:
            entry = open_[which % len(open_)]
            if what == "read":
                read(entry, number)
            elif what == "interrupt":
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(PendingTokens, "hand_out_oldest", lambda self: (_ for _ in ()).throw(Failure()))
                    try:
                        read(entry, 1)
                    except Failure:
                        open_.remove(entry)
            else:
                open_.remove(entry)
                if what == "forget":
                    del entry
                elif what == "close":
                    entry[0].close()
                else:
                    entry[0].cancel()
                    read(entry, LONGEST)
                    assert tuple(entry[3]) == answers[entry[1]][: len(entry[3])]
                    (result,) = entry[0].results
                    expected = "length" if len(entry[3]) == entry[2] else "cancelled"
                    assert (result.token_ids, result.finish_reason) == (tuple(entry[3]), expected)
    for entry in random.Random(0).sample(open_, len(open_)):
        read(entry, LONGEST)
        stream, which, most, got = entry
        assert tuple(got) == answers[which][:most]
        assert stream.results[0].finish_reason == "length"
    gc.collect()
    engine.has_endings = True
    engine.tidy()
    assert not engine.running and not engine.waiting, "a row has leaked"
    line = engine.turn.line
    assert line.holder is None and not line.waiting and not line.waiting_alone


def test_a_batch_of_any_size_comes_back_in_order(kind):
    model, answers = kind
    order = [random.Random(1).randrange(len(PROMPTS)) for _ in range(13)]
    sampling = {"temperature": [TEMPERATURES[i] for i in order], "seed": order}
    prompts = [PROMPTS[i] for i in order]
    results = runtime.generate(model, prompts, max_new_tokens=LONGEST, ignore_eos=True, **sampling)
    assert [result.token_ids for result in results] == [answers[i] for i in order]
    stats = results[0].stats
    assert stats.new_tokens == 13 * LONGEST and stats.ttft_s > 0 and stats.decode_tokens_per_s > 0


def test_many_threads(kind):
    model, answers = kind
    wrong = []

    def ask(seed):
        draw = random.Random(seed)
        for _ in range(3):
            which, most = draw.randrange(len(PROMPTS)), draw.randint(1, LONGEST)
            options = {"max_new_tokens": most, "ignore_eos": True} | SAMPLING[which]
            got = runtime.generate(model, PROMPTS[which], **options).token_ids
            if got != answers[which][:most]:
                wrong.append((which, most, got))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


def test_a_stop_token_is_its_rows_own(small):
    model = fresh(small, max_batch=4)
    free = [runtime.generate(model, p, max_new_tokens=LONGEST, ignore_eos=True).token_ids for p in PROMPTS]
    stop = free[0][10]
    stopping = dataclasses.replace(model, config=dataclasses.replace(model.config, stop_token_ids=(stop,)))
    streams = [
        runtime.stream(stopping, prompt, max_new_tokens=LONGEST, ignore_eos=index % 2 == 1)
        for index, prompt in enumerate([*PROMPTS, PROMPTS[0]])
    ]
    for stream in streams:
        stream.submit()
    for index, stream in enumerate(streams):
        tokens = free[index % len(PROMPTS)]
        end = tokens.index(stop) + 1 if stop in tokens and index % 2 == 0 else LONGEST
        assert tuple(piece.token_ids[0] for piece in stream) == tokens[:end]


@pytest.mark.parametrize("way", ["timeout", "event", "another thread"])
def test_a_long_answer_can_be_cancelled(small, way):
    model = fresh(small, max_batch=2, max_seq_len=256)
    expected = runtime.generate(model, PROMPTS[0], max_new_tokens=240, ignore_eos=True)
    step, event = decode.stepper, threading.Event()
    with pytest.MonkeyPatch.context() as patch:  # two seconds and a half for the whole answer
        patch.setattr(decode, "stepper", lambda *arguments: lambda: (time.sleep(0.01), step(*arguments)()))
        options = {"max_new_tokens": 240, "ignore_eos": True}
        stream = runtime.stream(
            model,
            PROMPTS[0],
            **options,
            timeout=0.2 if way == "timeout" else None,
            cancel=event if way == "event" else None,
        )
        timer = threading.Timer(0.2, event.set if way == "event" else stream.cancel)
        if way != "timeout":
            timer.start()
        began = time.monotonic()
        got = tuple(piece.token_ids[0] for piece in stream)
        assert time.monotonic() - began < 1.5
        timer.cancel()
    assert 0 < len(got) < 240 and got == expected.token_ids[: len(got)]
    assert stream.results[0].finish_reason == "cancelled"
    assert runtime.generate(model, PROMPTS[0], max_new_tokens=9, ignore_eos=True).token_ids == expected.token_ids[:9]


def test_a_waiting_answer_can_be_cancelled(small):
    model = fresh(small, max_batch=1)
    first = runtime.stream(model, PROMPTS[0], max_new_tokens=30, ignore_eos=True)
    next(first)
    late = runtime.generate(model, PROMPTS[1], max_new_tokens=30, timeout=0)
    assert (late.token_ids, late.finish_reason) == ((), "cancelled")
    assert len(list(first)) == 29


def test_a_full_queue_refuses(small):
    engine = runtime.Engine(fresh(small, max_batch=1), max_queue=2)
    streams = [engine.submit(prompt, max_new_tokens=3, ignore_eos=True) for prompt in PROMPTS[:2]]
    with pytest.raises(runtime.QueueFull, match="2 prompts wait for a row, and max_queue = 2"):
        engine.submit(PROMPTS[2])
    assert [len(list(stream)) for stream in streams] == [3, 3]
    assert len(list(engine.submit(PROMPTS[2], max_new_tokens=3, ignore_eos=True))) == 3


def test_a_prompt_that_fails_fails_alone(small, monkeypatch):
    model = fresh(small, max_batch=4)
    expected = runtime.generate(model, PROMPTS[0], max_new_tokens=20, ignore_eos=True).token_ids
    advance = Prefill.advance

    def failing(prefill, work):
        if list(prefill._ids) == PROMPTS[1]:
            raise MemoryError("too long for the scratch")
        return advance(prefill, work)

    monkeypatch.setattr(Prefill, "advance", failing)
    good = runtime.stream(model, PROMPTS[0], max_new_tokens=20, ignore_eos=True)
    got = [next(good).token_ids[0]]
    bad = runtime.stream(model, PROMPTS[1], max_new_tokens=20)
    bad.submit()
    got += [piece.token_ids[0] for piece in good]
    assert tuple(got) == expected
    with pytest.raises(MemoryError, match="scratch"):
        next(bad)
    assert list(bad) == []


def test_a_thousand_requests_leave_nothing(small):
    model = fresh(small, max_batch=4)
    runtime.generate(model, PROMPTS, max_new_tokens=2)
    gc.collect()
    before = len(gc.get_objects()), threading.active_count(), torch.get_num_threads()
    for index in range(1000):
        stream = runtime.stream(model, PROMPTS[index % 3], max_new_tokens=3, ignore_eos=True)
        next(stream)
        if index % 3 == 0:
            stream.cancel()
        elif index % 3 == 1:
            list(stream)
        del stream
    gc.collect()
    after = len(gc.get_objects()), threading.active_count(), torch.get_num_threads()
    assert after[0] - before[0] < 500 and after[1:] == before[1:]
    assert scheduler_of(model).running <= 1


def test_tasks_of_an_event_loop(kind):
    """Streams read in turns by one loop, tasks that are cancelled, and whole answers."""
    model, answers = kind

    async def read(which, most):
        options = {"max_new_tokens": most, "ignore_eos": True} | SAMPLING[which]
        async with runtime.astream(model, PROMPTS[which], **options) as pieces:
            got = tuple([piece.token_ids[0] async for piece in pieces])
        assert got == answers[which][:most]
        return len(got)

    async def everything():
        draw = random.Random(2)
        tasks = [asyncio.create_task(read(draw.randrange(len(PROMPTS)), draw.randint(1, LONGEST))) for _ in range(32)]
        cancelled = asyncio.create_task(runtime.agenerate(model, PROMPTS[0], max_new_tokens=200, ignore_eos=True))
        first, second = (
            runtime.astream(model, PROMPTS[which], max_new_tokens=LONGEST, ignore_eos=True, **SAMPLING[which])
            for which in (1, 2)
        )
        pairs = [(await anext(first), await anext(second)) for _ in range(LONGEST)]
        assert [tuple(piece.token_ids[0] for piece in row) for row in zip(*pairs, strict=True)] == answers[1:3]
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert sum(await asyncio.gather(*tasks)) > 32
        sampling = {"temperature": TEMPERATURES, "seed": list(range(len(PROMPTS)))}
        batch = await runtime.agenerate(model, PROMPTS, max_new_tokens=9, ignore_eos=True, **sampling)
        assert [row.token_ids for row in batch] == [row[:9] for row in answers]
        with pytest.raises(ValueError, match="max_new_tokens"):
            runtime.astream(model, PROMPTS[0], max_new_tokens=-1)

    asyncio.run(everything())
    for thread in threading.enumerate():
        if thread.name == "gemma-runtime stream":
            thread.join(10)
            assert not thread.is_alive()


@pytest.mark.parametrize("version", ["2.3", "2.4"], ids=["told of the disconnect", "sending fails"])
def test_clients_of_a_web_server_that_leave(small, version, monkeypatch):
    """In the middle of a stream: their rows are free at once. ASGI servers tell an application so in two ways."""
    model = fresh(small, max_batch=2)
    step = scheduler_of(model).step
    monkeypatch.setattr(scheduler_of(model), "step", lambda call=None: (time.sleep(0.02), step(call)))

    async def body(most):
        async for piece in runtime.astream(model, PROMPTS[0], max_new_tokens=most, ignore_eos=True):
            yield f"{piece.token_ids[0]} "

    async def answer(request):
        return StreamingResponse(body(int(request.query_params["most"])))

    app = Starlette(routes=[Route("/", answer)])

    async def ask(most, leaves_after):
        """What a client has received by the time it leaves."""
        got, left = [], asyncio.Event()

        async def receive():
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if left.is_set() and version == "2.4":
                raise OSError("the client has gone")
            got.append(message.get("body", b"").decode())
            if len(got) > leaves_after:
                left.set()

        asgi = {"version": "3.0", "spec_version": version}
        scope = {"type": "http", "asgi": asgi, "method": "GET", "path": "/", "headers": []}
        try:
            await app(scope | {"query_string": f"most={most}".encode()}, receive, send)
        except ClientDisconnect:
            pass
        return "".join(got).split()

    async def everything():
        expected = await ask(9, 100)
        assert len(expected) == 9
        leaving = await asyncio.gather(*(ask(100, 3) for _ in range(6)))
        assert [tokens[:3] for tokens in leaving] == [expected[:3]] * 6
        started = time.monotonic()
        assert await ask(9, 100) == expected
        assert time.monotonic() - started < 1
        while scheduler_of(model).running:
            await asyncio.sleep(0.01)
            assert time.monotonic() - started < 2, "rows of clients that have left"

    asyncio.run(everything())


def test_many_prompts_into_a_file(small, tmp_path):
    model, out = fresh(small, max_batch=3), tmp_path / "answers.jsonl"
    prompts = [PROMPTS[i % 5] for i in range(17)]
    prompts[4] = [2, 10**9]

    def lines():
        return [json.loads(line) for line in out.read_text().splitlines()]

    def interrupted():
        for index, prompt in enumerate(prompts):
            if index == 12:
                raise KeyboardInterrupt
            yield prompt

    options = {"max_new_tokens": 2, "ignore_eos": True}
    with pytest.raises(KeyboardInterrupt):
        runtime.generate_many(model, interrupted(), out, **options)
    before = len(lines())
    assert 0 < before < 12
    with out.open("a") as file:
        file.write('{"index": 16, "tex')  # a line that a crash has cut
    assert runtime.generate_many(model, prompts, out, **options) == 17 - before
    found = {line["index"]: line for line in lines()}
    assert len(lines()) == len(found) == 17
    assert "from 0 to" in found[4]["error"]
    for i, line in found.items():
        if i != 4:
            assert line["token_ids"] == list(runtime.generate(model, prompts[i], **options).token_ids)
    assert runtime.generate_many(model, prompts, out, **options) == 0
    with pytest.raises(ValueError, match="holds the answer to another prompt under index 0"):
        runtime.generate_many(model, prompts[1:], out)
    with pytest.raises(ValueError, match="max_new_tokens"):
        runtime.generate_many(model, prompts, tmp_path / "none", max_new_tokens=-1)
    assert not (tmp_path / "none").exists()
    (tmp_path / "text").write_text("a text\n")
    with pytest.raises(ValueError, match=r"line 1 .* is no answer"):
        runtime.generate_many(model, prompts, tmp_path / "text")
    for path in (tmp_path / "no folder" / "file", tmp_path, tmp_path / ("a" * 300)):
        with pytest.raises(OSError, match="cannot write"):
            runtime.generate_many(model, prompts, path)
    with pytest.raises(ValueError, match="the path of a file"):
        runtime.generate_many(model, prompts, f"{tmp_path}/a\0b")


@pytest.mark.parametrize("text", ["my only copy", '{"index": 0, "error": "x"}\nmy only copy', '{"a": 1}', "\n", "été"])
def test_a_file_that_holds_no_answers_is_left_as_it_is(small, tmp_path, text):
    out = tmp_path / "text"
    out.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="is no answer of generate_many"):
        runtime.generate_many(fresh(small), PROMPTS[:2], out)
    assert out.read_bytes() == text.encode("latin-1")


@pytest.mark.parametrize("cut", range(1, 12))
def test_an_answer_with_any_character_cut_anywhere_is_taken_up(small, tmp_path, monkeypatch, cut):
    out, model, answers = tmp_path / "answers", fresh(small), GenerationResult.to_dict
    monkeypatch.setattr(GenerationResult, "to_dict", lambda result: {**answers(result), "text": "a\u2028b\x85é雪"})
    assert runtime.generate_many(model, PROMPTS[:2], out, max_new_tokens=1) == 2
    whole = out.read_bytes()
    out.write_bytes(whole[: whole.index("雪".encode(), whole.index(b"\n")) + 8 - cut])
    assert runtime.generate_many(model, PROMPTS[:2], out, max_new_tokens=1) == 1
    assert [json.loads(line)["index"] for line in out.read_bytes().splitlines()] == [0, 1]


def test_many_prompts_into_a_pipe(small, pipe):
    """Which is not read for answers that it has already."""
    path, text = pipe
    assert runtime.generate_many(fresh(small, max_batch=3), PROMPTS[:2], path, max_new_tokens=2) == 2
    assert [json.loads(line)["index"] for line in text().splitlines()] == [0, 1]
