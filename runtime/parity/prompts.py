"""The prompts of an audit: four suites of ten, or the caller's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from runtime.engine.request import read_prompt
from runtime.errors import InvalidArgument
from runtime.loading import read_config
from runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A named prompt; `content` is text or token ids."""

    name: str
    suite: str
    content: str | list[int]


# Plain beginnings, and degenerate ones: a single letter, one word repeated, no words at all.
_SHORT = [
    "A dog running through the snow is",
    "The capital of France is",
    "Three things make a good soup:",
    "My grandmother used to say that",
    "Water boils at 100 degrees Celsius, and freezes at",
    "I",
    "the the the the the the the the",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,",
    "!!!!!!!!????????",
    "\n\n\n",
]
_CODE = [
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n    pivot = items[0]\n",
    "-- the ten customers who spent most in 2023\nSELECT customers.name, SUM(orders.total) AS spent\nFROM",
    "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n",
    "import torch\n\n\nclass RMSNorm(torch.nn.Module):\n    def __init__(self, width, eps=1e-6):\n",
    '{"name": "Ada", "born": 1815, "children": ["Byron", "Anne", "Ralph"], "known_for":',
    '<!DOCTYPE html>\n<html>\n<head>\n  <title>Tides</title>\n  <meta charset="utf-8">\n',
    "fn fibonacci(n: u64) -> u64 {\n    match n {\n        0 => 0,\n",
    "const debounce = (run, wait) => {\n  let timer;\n  return (...args) => {\n",
    "#!/bin/sh\nset -eu\n# delete every log that is older than a week\nfind",
    "\\begin{theorem}\nEvery bounded sequence of reals has a convergent subsequence.\n\\end{theorem}\n\\begin{proof}\n",
]
_MULTILINGUAL = [
    "Au petit matin, le boulanger du village ouvre sa boutique et",
    "Der Zug nach Hamburg hatte wieder einmal Verspätung, weil",
    "La abuela guardaba en el cajón de la cocina",
    "长城是中国古代的伟大建筑,它的历史可以追溯到",
    "昨日の夜、駅の前で友だちに会って、",
    "Зимой в Сибири очень холодно, поэтому люди",
    "भारत की राजधानी नई दिल्ली है और यहाँ",
    "في الصباح الباكر خرج الصياد إلى البحر",
    "한국의 가을은 하늘이 높고",
    "Η θάλασσα ήταν ήσυχη εκείνο το βράδυ και",
]


def _log(entries: int) -> str:
    winds, seas = ("north", "north-east", "east", "south-west", "west"), ("calm", "slight", "moderate", "rough")
    return "Log of the research vessel Petrel.\n" + "".join(
        f"Day {day}, {day * 7 % 24:02d}:{day * 13 % 60:02d}. Wind {winds[day % 5]} {6 + day * 5 % 23} knots, sea "
        f"{seas[day * 3 % 4]}, pressure {990 + day * 11 % 37} hPa, {day * 17 % 29} birds counted.\n"
        for day in range(1, entries + 1)
    )


def _ledger(entries: int) -> str:
    goods = ("rye flour", "lamp oil", "copper wire", "wool", "green tea", "paper")
    return "date;item;amount;price\n" + "".join(
        f"1903-{1 + n % 12:02d}-{1 + n * 7 % 28:02d};{goods[n * 5 % 6]};"
        f"{3 + n * 11 % 40};{n * 37 % 500}.{n * 29 % 100:02d}\n"
        for n in range(entries)
    )


def _talk(turns: int) -> str:
    questions = ("Where did you put the map?", "Is it far?", "What did the ferryman say?", "Do we have bread left?")
    answers = ("In the green bag, I think.", "Two hours on foot.", "That the river is too high today.", "A little.")
    return "".join(f"Mara: {questions[n * 3 % 4]} ({n})\nJonas: {answers[n * 3 % 4]}\n" for n in range(turns))


def _functions(count: int) -> str:
    return "".join(
        f"def scale_by_{n}(values):\n    return [value * {n} + {n * 7 % 11} for value in values]\n\n\n"
        for n in range(2, count + 2)
    )


def _long() -> list[str]:
    """Texts of 150 to 800 Gemma tokens; five exceed a window of 512, a sixth does within 64 new tokens."""
    return [
        _log(15),
        _log(20),
        _log(5),
        _ledger(25),
        _ledger(8),
        _talk(28),
        _talk(8),
        _functions(18),
        "The list of primes: " + ", ".join(str(n) for n in range(2, 500) if all(n % d for d in range(2, n))),
        "again and " * 300,
    ]


SUITES = ("short", "code", "multilingual", "long")


def suite_prompts(suite: str | None = None) -> list[Prompt]:
    """The ten prompts of a suite, or all forty with None.

    Raises:
        ValueError: there is no such suite.
    """
    if suite is not None and suite not in SUITES:
        raise InvalidArgument(f"suite: expected one of {', '.join(SUITES)}, got {suite!r}")
    texts = {"short": _SHORT, "code": _CODE, "multilingual": _MULTILINGUAL, "long": _long()}
    return [
        Prompt(f"{name} {number}", name, text)
        for name in SUITES
        if suite in (None, name)
        for number, text in enumerate(texts[name], 1)
    ]


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts in a file: one per line or, in a .jsonl file, one JSON object per line whose "prompt" is text or ids.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, has no prompt, or a line is not as above; the message names the line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{file} must be UTF-8 text: {error}") from None
    read = _from_json if file.suffix == ".jsonl" else (lambda line, where: line)
    prompts = [
        Prompt(f"line {number}", "file", read(line, f"{file}, line {number}"))
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise InvalidArgument(f"{file} has no prompts: expected one a line")
    return prompts


def given_prompts(prompts: Sequence[Any]) -> list[Prompt]:
    """A caller's own list of texts or lists of ids."""
    if not prompts:
        raise InvalidArgument("prompts must hold at least one prompt, got none")
    return [Prompt(f"prompt {number}", "given", prompt) for number, prompt in enumerate(prompts, 1)]


def _from_json(line: str, where: str) -> str | list[int]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidArgument(f"{where}: expected a JSON object with a prompt, got {error}") from None
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str | list):
        raise InvalidArgument(f'{where}: expected {{"prompt": text or ids}}, got {line[:60]!r}')
    return prompt


def read_ids(prompts: Sequence[Prompt], folder: Path, name: str) -> list[list[int]]:
    """The prompts' ids, read before the model is loaded since their lengths decide how much memory it needs.

    Args:
        prompts: at least one.
        folder: the checkpoint.
        name: the checkpoint's name in errors.

    Raises:
        ValueError, TypeError: as `runtime.generate`.
    """
    config = read_config(folder)
    reader: Any = SimpleNamespace(config=config, name=name, tokenizer=Tokenizer.from_folder(folder, config.vocab))
    return [read_prompt(reader, prompt.content, prompt.name) for prompt in prompts]
