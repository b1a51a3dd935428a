"""What shows itself in a console or a notebook is a line, however many tensors it holds."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re

import runtime
from runtime.families.chunk import Chunk
from runtime.families.state import new_state
from runtime.kernels.attention_splits import AttentionSplits
from runtime.loading import resolve
from runtime.parity.oracle import Oracle

HOLDERS = r"Tensor|\bModel\b|Weights|KVCache|DecodeState|AttentionSplits|RopeTables|StoredTensor"


def shown(tiny) -> dict[str, str]:
    state = new_state(tiny, 2, with_logits=True)
    held = {
        "model": tiny,
        "weights": tiny.weights,
        "layer": tiny.weights.layers[0],
        "rope": tiny.rope,
        "state": state,
        "state of one row": state.first_rows(1),
        "cache": state.cache,
        "splits": AttentionSplits.allocate(2, 3, 4, 16, tiny.device),
        "chunk": Chunk(tiny, state.cache, 0, 0, 3),
        "oracle": Oracle(tiny.config, tiny.weights),
        "stream": runtime.stream(tiny, [2, 3], max_new_tokens=1),
    }
    return {name: repr(value) for name, value in held.items()}


def test_a_repr_is_one_short_line(tiny):
    for name, text in shown(tiny).items():
        assert len(text) < 400 and "\n" not in text and "tensor(" not in text, (name, text)


def test_a_model_says_what_it_is(tiny):
    count = f"{tiny.plan.weights // 4:,}"
    for part in (repr(tiny.name), "Gemma 3", count, "float32", "device: cpu", "max_seq_len: 128", "max_batch: 4"):
        assert part in repr(tiny)
    table = dataclasses.replace(tiny, name="<b>&")._repr_html_()
    assert table.startswith("<table>") and table.count("<tr>") == 7
    assert "&lt;b&gt;&amp;" in table and "<b>" not in table and count in table


def test_what_is_known_before_the_weights_are_read_names_no_tensor(tiny_folder):
    assert "StoredTensor" not in repr(resolve(tiny_folder, device="cpu", max_seq_len=32))


def modules():
    for package in (runtime, importlib.import_module("runtime.kernels")):
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not re.search(r"__main__|\.bench|\.lm_eval|\.ray\.|kernels\.cpu", found.name):
                yield importlib.import_module(found.name)


def holders():
    """Every dataclass and named tuple with a field that may hold tensors."""
    for module in modules():
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ == module.__name__ and (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")):
                named = {name: str(value) for name, value in inspect.get_annotations(kind).items()}
                silent = (
                    {f.name for f in dataclasses.fields(kind) if not f.repr} if dataclasses.is_dataclass(kind) else ()
                )
                if any(re.search(HOLDERS, value) for name, value in named.items() if name not in silent):
                    yield kind


def test_no_holder_of_tensors_has_a_generated_repr():
    found = list(holders())
    assert len(found) >= 10
    for kind in found:
        assert not hasattr(kind.__repr__, "__wrapped__"), f"{kind.__qualname__} has the repr of its dataclass"
        if hasattr(kind, "_fields"):
            assert "def __repr__" in inspect.getsource(kind), f"{kind.__qualname__} has the repr of a named tuple"
