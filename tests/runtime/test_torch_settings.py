"""What a program has set in torch changes no answer: modes, the default dtype and the default device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from runtime.api import Model, load

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "the dog the dog"
OPTIONS = {"max_new_tokens": 6, "ignore_eos": True}
MODES = [torch.inference_mode, torch.no_grad, torch.enable_grad]
FORMS = {"fp32": {}, "bf16, eager": {"dtype": "bf16", "eager": True}, "int8": {"quantize": "int8"}}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 3},
    "chosen": {"repetition_penalty": 1.3, "logprobs": 2, "prompt_logprobs": 1},
    "speculated": {"speculate": "prompt"},
}


@pytest.fixture
def torch_defaults() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)


def answered(model: Model) -> list[tuple[int, ...]]:
    return [runtime.generate(model, PROMPT, **OPTIONS, **way).token_ids for way in WAYS.values()]


def answers(folder: Path, form: str) -> list[tuple[int, ...]]:
    model = load(folder, device="cpu", max_seq_len=64, max_batch=2, progress=False, **FORMS[form])
    runtime.inspect(model, PROMPT)
    return answered(model)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_defaults_change_nothing(
    tiny_folder: Path, torch_defaults: None, form: str, default: torch.dtype | str
) -> None:
    """A device without data stands for a GPU that a program computes on by default."""
    expected = answers(tiny_folder, form)
    if isinstance(default, str):
        torch.set_default_device(default)
    else:
        torch.set_default_dtype(default)
    assert answers(tiny_folder, form) == expected


@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "eager"])
@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("then", MODES)
def test_calls_in_any_mode_share_a_model(
    tiny_folder: Path,
    eager: bool,
    first: Callable[[], AbstractContextManager[Any]],
    then: Callable[[], AbstractContextManager[Any]],
) -> None:
    model = load(tiny_folder, device="cpu", max_seq_len=64, max_batch=2, eager=eager, progress=False)
    found = []
    for mode in (first, then):
        with mode():
            found.append(
                [runtime.generate(model, "the dog the dog", **OPTIONS, **way).token_ids for way in WAYS.values()]
            )
            stream = runtime.stream(model, ["the dog", "a cat"], **OPTIONS)
            next(stream)
        stream.close()  # in the caller's own mode
    assert found[0] == found[1]
