"""What every test run states, and small random Gemma models: one checkpoint in two implementations."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from triton import next_power_of_2

from runtime.bench.small_models import VOCAB, save_small_model
from runtime.engine.graph import ops_of
from runtime.kernels import block
from runtime.kernels.block import Block
from runtime.kernels.launch import INTERPRETING

# Read when numba is imported. Otherwise its compiler, on any thread, sets sys.stderr back to what it was a moment
# before, for colorama's sake, and the next test's messages go where the last one's went.
os.environ["NUMBA_DISABLE_ERROR_MESSAGE_HIGHLIGHTING"] = "1"

STACK = ("torch", "triton", "transformers", "tokenizers", "numpy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-seconds", type=float, default=10.0, metavar="S", help="how long each test under tests/fuzz goes on"
    )
    parser.addoption(
        "--soak-seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="how long clients keep a server busy in test_load.py",
    )


# Minutes each; one that began last would keep one process busy and leave the others idle.
LONGEST = ("test_interpreter.py", "test_compiled.py", "test_bench.py", "test_verify.py", "test_check.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest begin first, beside all others where several processes share the tests."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_report_header() -> str:
    return "stack: " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in STACK)


@pytest.fixture(autouse=True, scope="session")
def interpreter() -> Iterator[None]:
    """Where kernels are interpreted: Triton's interpreter with its bf16 mended and every address checked."""
    if not INTERPRETING:
        yield
        return
    from runtime.check.interpreter import checked_interpreter

    with checked_interpreter():
        yield


@dataclass
class Pair:
    """One checkpoint in Hugging Face's implementation and in this one."""

    hf: Any
    ours: Any

    def hf_greedy(self, ids: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
        """Hugging Face's greedy continuation, stop tokens ignored, and its logits [tokens, vocab]."""
        prompt = torch.tensor([ids])
        out = self.hf.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits)

    def greedy(self, ids: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
        """The same from this runtime's prefill and decode steps in plain PyTorch, as `eager` models run."""
        from runtime.engine.decode import decode_step
        from runtime.engine.prefill import prefill
        from runtime.families.state import new_state

        eager = dataclasses.replace(self.ours, runtime=dataclasses.replace(self.ours.runtime, eager=True))
        state = new_state(eager, 1, with_logits=True)
        picked, logits = [int(prefill(eager, state, 0, ids))], [state.logits.clone()]
        for _ in range(tokens - 1):
            decode_step(ops_of(eager), eager, state)
            picked.append(int(state.token))
            logits.append(state.logits.clone())
        return picked, torch.cat(logits)

    def in_chunks(self, size: int) -> Pair:
        """The pair with this runtime's prefill cut into chunks of `size` tokens."""
        runtime = dataclasses.replace(self.ours.runtime, prefill_chunk=size)
        return Pair(self.hf, dataclasses.replace(self.ours, runtime=runtime))


@pytest.fixture(scope="session")
def small_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """A function that makes (once per session) a small random model of a family in both implementations."""
    from runtime.api import load
    from runtime.hugging_face.shared_weights import align_weights

    made: dict[tuple[Any, ...], Pair] = {}

    def make(family: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, **overrides: Any) -> Pair:
        key = (family, dtype, seed, *((name, str(value)) for name, value in sorted(overrides.items())))
        if key in made:
            return made[key]
        folder = tmp_path_factory.mktemp(family)
        model_class = save_small_model(family, folder, seed=seed, **overrides)
        # Loaded again: `model.to(bfloat16)` would round the rotary frequencies too. Gemma 2 has to be eager, or older
        # transformers drop its softcap without a word.
        attention = "eager" if family == "gemma2" else "sdpa"
        hf = align_weights(model_class.from_pretrained(folder, dtype=dtype, attn_implementation=attention)).eval()
        ours = load(
            folder,
            device="cpu",
            dtype=str(dtype).removeprefix("torch."),
            max_seq_len=256,
            max_batch=8,
            progress=False,
        )
        made[key] = Pair(hf, ours)
        return made[key]

    return make


# Widths that int4 has kernels for on a GPU, and a ring that has gone round after 17 tokens.
QUANTIZED_SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}


@pytest.fixture(scope="session")
def quantized_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """A function that makes (once per session) a small random model quantised at load, of integers with scales as a
    GPU has it, and Hugging Face's of its exact values, which other code decodes, or of those rounded to the dtype."""
    import transformers

    from runtime.api import load
    from runtime.checkpoint.cache import CACHE_ENV
    from runtime.checkpoint.files import read_json
    from runtime.hugging_face.shared_weights import align_weights, hugging_face
    from runtime.loading import resolve
    from runtime.parity.reference import reference_model

    made: dict[tuple[Any, ...], Pair] = {}

    def make(family: str, to: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Pair:
        key = (family, to, dtype, *sorted(overrides.items()))
        if key in made:
            return made[key]
        folder = tmp_path_factory.mktemp(f"{family}-{to}")
        layers = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3" else {}
        model_class = save_small_model(family, folder, **QUANTIZED_SIZES, **layers, **overrides)
        options: dict[str, Any] = {"device": "cpu", "max_seq_len": 64, "max_batch": 8, "quantize": to}
        name = str(dtype).removeprefix("torch.")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(CACHE_ENV, str(folder / "cache"))
            for module in ("checkpoint.scaled", "checkpoint.weights", "loading"):
                patch.setattr(f"runtime.{module}.is_scaled", lambda device: True)
            ours = load(folder, dtype=name, progress=False, **options)
            reference = reference_model(ours, resolve(folder, dtype=name, progress=False, **options))
        exact = hugging_face(read_json(folder / "config.json"), reference)
        if dtype is not torch.float32:
            exact.save_pretrained(folder / "values")
            attention = exact.config._attn_implementation
            read = model_class.from_pretrained(folder / "values", dtype=dtype, attn_implementation=attention)
            exact = align_weights(read).eval()
            exact.generation_config = transformers.GenerationConfig()
        made[key] = Pair(exact, ours)
        return made[key]

    return make


@pytest.fixture(scope="module")
def large_blocks() -> Iterator[None]:
    """The interpreter takes about as long for a program of 512 weight rows as for one of 8."""

    def sum_block(outputs: int, width: int, dtype: torch.dtype, matrices: int, integers: str | None = None) -> Block:
        return Block("sum", 512, next_power_of_2(width), 4)

    def dot_block(width: int, max_rows: int, *, is_normed: bool, integers: str | None = None) -> Block:
        return Block("loop", 128, 128 if integers == "int4" else 32, 2)  # of whole words

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "sum_block", sum_block)
        patch.setattr(block, "dot_block", dot_block)
        block.block_for.cache_clear()
        yield
    block.block_for.cache_clear()


@pytest.fixture
def fuzz_seconds(request: pytest.FixtureRequest) -> float:
    """How long a fuzz test goes on."""
    return request.config.getoption("--fuzz-seconds")


@pytest.fixture
def random_ids() -> Callable[..., list[int]]:
    """A function that draws a prompt of random tokens."""
    return lambda count, seed=0: random.Random(seed).choices(range(3, VOCAB), k=count)


@pytest.fixture
def pipe(tmp_path: Path) -> tuple[Path, Callable[[], str]]:
    """A named pipe, and a function that returns what has been read of it by its end."""
    path, read = tmp_path / "pipe.json", list[str]()
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_text()), daemon=True)
    reader.start()

    def text() -> str:
        reader.join(60)
        return read[0]

    return path, text


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for tests on tiny tensors, where waiting for each other costs threads more than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
