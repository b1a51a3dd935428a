"""The page at `/` in headless Chromium."""

from __future__ import annotations

import math
import re
import shutil
import threading
import time

import pytest

import runtime
from runtime.engine.scheduler import scheduler_of
from runtime.inspection.attention import attention_weights

from .conftest import eventually, listening

pytestmark = [pytest.mark.serve, pytest.mark.newest_only]

PROMPT = "the dog"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra clients")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"needs Chromium, as one of the commands {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=program)
        yield browser
        browser.close()


class SlowSteps:
    """Steps with log probabilities that take a tenth of a second longer, and after the first ones wait to be let go on,
    however slow the browser is."""

    FIRST = 6  # that a browser can wait for

    def __init__(self, choose):
        self._choose, self._may_go_on, self._taken = choose, threading.Event(), 0

    def __call__(self, *arguments):
        if self._taken >= self.FIRST:
            self._may_go_on.wait(60)
        self._taken += 1
        time.sleep(0.1)
        self._choose(*arguments)

    def hold(self):
        self._may_go_on.clear()
        self._taken = 0

    def go_on(self):
        self._may_go_on.set()


@pytest.fixture
def slow_steps(model, monkeypatch):
    device = scheduler_of(model)._device
    steps = SlowSteps(device.choose)
    monkeypatch.setattr(device, "choose", steps)
    yield steps
    steps.go_on()


@pytest.fixture
def visit(chromium, server):
    """A function that opens the page in a browser of its own, whose errors and other servers fail the test."""
    contexts, wrong = [], []

    def open_page(fragment="", port=server.port, width=1280, scheme="light"):
        address = f"http://127.0.0.1:{port}/"
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if "Content Security" in said.text else None)
        page.on("request", lambda asked: None if asked.url.startswith((address, "data:")) else wrong.append(asked.url))
        page.set_default_timeout(15_000)
        page.goto(address + fragment)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def ask(page, prompt=PROMPT, **fields):
    page.fill("#prompt", prompt)
    for name, value in ({"max_tokens": 8} | fields).items():
        page.fill(f"[name={name}]", str(value))
    page.press("#prompt", "Control+Enter")


def until_done(page):
    page.wait_for_selector("#status:has-text(' after ')")
    assert page.is_enabled("#run") and page.is_disabled("#stop")


def ids_of(page):
    """Of the steps."""
    return [int(text) for text in page.locator("#steps tbody .id").all_inner_texts()]


def is_idle(server):
    admission, scheduler = server.service.admission, scheduler_of(server.service.model)
    return not (admission.answers or admission.responses or scheduler.running or scheduler.waiting)


def generated(model, prompt, tokens, **options):
    return list(runtime.generate(model, prompt, max_new_tokens=tokens, **options).token_ids)


def test_tokens_come_one_by_one(visit, model, slow_steps):
    page = visit()
    ask(page, max_tokens=12)
    page.wait_for_selector("#steps tbody tr:nth-child(3)")
    assert page.locator("#steps tbody tr").count() < 12 and page.is_disabled("#run") and page.is_enabled("#stop")
    slow_steps.go_on()
    until_done(page)
    result = runtime.generate(model, PROMPT, max_new_tokens=12, logprobs=5)
    assert ids_of(page) == list(result.token_ids)
    for row, known in zip(page.locator("#steps tbody tr").all(), result.logprobs, strict=True):
        assert row.locator(".chip").count() == 5 and row.locator(".chip.is-taken").count() == 1
        likelihood = 100 * math.exp(known.logprob)
        assert float(row.locator(".probability").inner_text().rstrip(" %")) == pytest.approx(likelihood, abs=0.051)
        over = known.logprob - known.top[1][1]
        assert float(row.locator(".margin").inner_text()) == pytest.approx(over, abs=0.0051)
    times = [float(text.removesuffix(" ms")) for text in page.locator("#steps tbody .time").all_inner_texts()]
    assert sum(times) > 11 * 100, "the steps' own time at least, however their tokens arrived"
    assert page.locator("#tokens .tok").count() == len(result.prompt_token_ids) + 12


def test_what_stops_a_request_frees_its_row(visit, server, slow_steps):
    page = visit()
    for stop in (lambda: page.keyboard.press("Escape"), lambda: page.click("#stop")):
        slow_steps.hold()
        ask(page, max_tokens=100)
        page.wait_for_selector("#steps tbody tr:nth-child(3)")
        assert not is_idle(server)
        stop()
        until_done(page)
        slow_steps.go_on()
        assert "Stopped after" in page.inner_text("#status")
        assert eventually(lambda: is_idle(server), seconds=2)


def test_another_candidate_and_a_link_to_it(visit, model):
    page = visit()
    ask(page)
    until_done(page)
    prompt, expected = model.tokenizer.encode(PROMPT), generated(model, PROMPT, 8)
    page.fill("#prompt", "and something else")  # that has not been asked
    for step, rank in ((4, 3), (6, 2)):
        chip = page.locator(f"#steps tbody tr:nth-child({step + 1}) .chip").nth(rank)
        chosen = int(chip.get_attribute("data-id"))
        chip.click()
        until_done(page)
        expected = [*expected[:step], chosen]
        expected += generated(model, prompt + expected, 8 - len(expected))
        assert ids_of(page) == expected
    assert page.locator("#steps .badge").count() == page.locator("#tokens .is-chosen").count() == 2
    fragment = page.evaluate("location.hash")
    assert re.search(r"choices=4%3A\d+\+6%3A\d+", fragment)
    again = visit(fragment)
    until_done(again)
    assert ids_of(again) == expected and again.input_value("#prompt") == PROMPT
    assert again.locator("#steps .badge").count() == 2 and again.evaluate("location.hash") == fragment


def test_a_link_to_a_seed(visit, model):
    page = visit("#prompt=the+snow&max_tokens=6&temperature=1.5&top_p=0.9&seed=7&candidates=3&chat=1")
    until_done(page)
    ids = model.tokenizer.apply_chat([{"role": "user", "content": "the snow"}])
    assert ids_of(page) == generated(model, ids, 6, temperature=1.5, top_p=0.9, seed=7)
    assert page.is_checked("[name=chat]") and page.locator("#steps tbody tr:first-child .chip").count() == 3


def test_the_keyboard_alone(visit, model):
    page = visit()
    page.focus("#prompt")
    page.keyboard.type(" AT.")
    page.keyboard.press("Control+Enter")
    until_done(page)
    while page.evaluate("document.activeElement.getAttribute('role')") != "option":
        page.keyboard.press("Tab")
    page.keyboard.press("Home")
    assert page.inner_text("#position-title") == "Position 0: <bos>"
    for _ in range(model_length := len(model.tokenizer.encode(page.input_value("#prompt")))):
        page.keyboard.press("ArrowRight")
    assert page.inner_text("#position-title").startswith(f"Position {model_length}:")
    before = ids_of(page)
    page.keyboard.press("Enter")
    chosen = int(page.evaluate("document.activeElement.dataset.id"))
    page.keyboard.press("Enter")
    page.wait_for_selector("#steps .badge")
    until_done(page)
    assert ids_of(page)[0] == chosen != before[0]
    assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true", "the focus is where it was"


def test_a_position_of_the_prompt(visit, model):
    page = visit()
    ask(page)
    until_done(page)
    known = runtime.generate(model, PROMPT, max_new_tokens=1, prompt_logprobs=5).prompt_logprobs[2]
    page.hover("#tokens .tok:nth-child(3)")
    page.wait_for_selector("#position .ranked li")
    shares = [float(text.rstrip(" %")) for text in page.locator("#position .share").all_inner_texts()]
    assert shares[:5] == pytest.approx([100 * math.exp(logprob) for _, logprob in known.top], abs=0.051)
    assert page.locator("#position .is-taken").count() == 1 and page.locator("#position button").count() == 0


def test_attention(visit, model):
    page = visit()
    ask(page)
    until_done(page)
    page.click("#attention summary")
    page.select_option("[name=layer]", "1")
    page.select_option("[name=head]", "2")
    page.click("#attention-request button")
    page.wait_for_selector(".heat-map:visible")
    ids = [*model.tokenizer.encode(PROMPT), *ids_of(page)]
    weights = attention_weights(model, ids, 1, 2)
    last, canvas = len(ids) - 1, page.locator("canvas")
    assert f"({last}) looks at <bos> (0): {100 * weights[last, 0]:.1f} %" in page.inner_text("#readout")
    canvas.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
    assert f"({last - 1}) looks at" in page.inner_text("#readout")
    assert f"(2): {100 * weights[last - 1, 2]:.1f} %" in page.inner_text("#readout")
    page.select_option("[name=head]", "0")
    assert eventually(lambda: "head 0" in page.inner_text("#attention-note"))
    assert canvas.evaluate("one => one.getContext('2d').getImageData(0, 0, one.width, one.height).data.some(Boolean)")


def test_the_key_is_asked_for_and_kept_nowhere(visit, model):
    with listening(model, api_key="secret") as server:
        page = visit(port=server.port)
        for given in ("wrong", "secret"):
            page.fill("[name=key]", given)
            page.keyboard.press("Enter")
            page.wait_for_selector(
                "#key .bad-text:visible" if given == "wrong" else "#key:not([open])", state="attached"
            )
        ask(page)
        page.wait_for_selector("#steps tbody tr:nth-child(8)")
        kept = page.evaluate("[location.href, document.cookie, ...Object.values({...localStorage, ...sessionStorage})]")
        assert "secret" not in "".join(kept) and page.input_value("[name=key]") == ""


def test_what_a_link_must_not_do(visit):
    page = visit("#prompt=%3Cimg+src%3Dx+onerror%3Dalert(1)%3E&max_tokens=2&choices=0:99999999+x:1+1:-1")
    page.wait_for_selector("#error:not(:empty)")
    assert "299" in page.inner_text("#error")
    assert "<img" in page.inner_text("#tokens") and page.locator("main img").count() == 0
    page = visit("#prompt=a&max_tokens=many")
    page.wait_for_selector("#facts:has-text('Gemma 3')")
    assert page.evaluate("document.querySelector('#request').checkValidity()") is False
    page = visit()
    ask(page, max_tokens=1000)
    page.wait_for_selector("#error:not(:empty)")
    assert "context of 128 tokens" in page.inner_text("#error") and page.is_enabled("#run")


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1280, "light")])
def test_every_size_and_scheme(visit, width, scheme):
    page = visit(width=width, scheme=scheme)
    ask(page, max_tokens=30)
    until_done(page)
    page.click("#attention summary")
    page.click("#attention-request button")
    page.wait_for_selector(".heat-map:visible")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) > 384) == (scheme == "light")
    for button in page.locator("form button:visible, .row:visible, .chip:visible").all():
        assert button.bounding_box()["height"] >= 24, "as large as WCAG 2.2 wants a target"
