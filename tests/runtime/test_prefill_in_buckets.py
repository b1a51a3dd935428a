"""Prefill in chunks of a few lengths, as a GPU runs it: Hugging Face's tokens, the plain path's cache, and the same
operations on the same addresses whatever the prompt."""

from __future__ import annotations

import dataclasses
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.bench.small_models import VOCAB
from runtime.engine import padded_chunk as module
from runtime.engine.decode import stepper, tokens
from runtime.engine.padded_chunk import chunk_lengths, run_padded_chunk
from runtime.engine.prefill import Prefill, logits, prefill
from runtime.families.fixed_chunk import FixedChunk
from runtime.families.state import DecodeState, new_state
from runtime.kernels.launch import Gpu, Launch
from runtime.kernels.ops import RecordingOps, TorchOps
from runtime.model.rope import RopeTables

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ["gemma", "gemma2", "gemma3"]
WINDOW = 16
NEW = 20
MAX_SEQ_LEN = 256
GPU = Gpu("no GPU needed", 90, 132)
BELOW_WINDOW, PAST_WINDOW = (5, 12), (8, 40)
# Around both buckets of both sets, around the window, and several chunks: the last one full, of a single token, and
# padded past max_seq_len.
LENGTHS = [1, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 24, 39, 40, 41, 61, 80, 200, 253]


@pytest.fixture
def in_buckets(monkeypatch):
    """A function that gives a model whose prompts are split into these buckets."""

    def split(model, buckets: tuple[int, ...]):
        monkeypatch.setattr(module, "BUCKETS", buckets[:-1])
        model = dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, prefill_chunk=buckets[-1]))
        assert chunk_lengths(model) == list(buckets)
        return model

    return split


def prefill_in_buckets(model, state: DecodeState, row: int, ids: list[int]) -> None:
    """What `prefill` does on a GPU."""
    prompt = Prefill(model, state, row, ids, in_buckets=True)
    while not prompt.is_done:
        prompt.advance()


def buffers(state: DecodeState) -> tuple[torch.Tensor, ...]:
    return state.cache.keys + state.cache.values


def spoilt_state(model, batch: int = 1, **options: Any) -> DecodeState:
    """A state whose every cache slot is NaN-poisoned."""
    state = new_state(model, batch, **options)
    for buffer in buffers(state):
        buffer.fill_(torch.nan)
    return state


@pytest.fixture
def fused(monkeypatch):
    """Chunks in the fused form, of the operations' plain PyTorch forms."""
    monkeypatch.setattr(module, "is_fused", lambda model: True)


def assert_prefilled(pair, ids: list[int], in_buckets) -> None:
    """Hugging Face's tokens and the plain path's cache, by chunks of both sets of buckets."""
    new = min(NEW, MAX_SEQ_LEN - len(ids) + 1)
    expected, _ = pair.hf_greedy(ids, new)
    plain = spoilt_state(pair.ours, with_logits=True)
    prefill(pair.ours, plain, 0, ids)
    for buckets in (BELOW_WINDOW, PAST_WINDOW):
        model = in_buckets(pair.ours, buckets)
        state = spoilt_state(model, with_logits=True)
        prefill_in_buckets(model, state, 0, ids)
        for name in ("token", "position", "done", "x"):
            assert torch.equal(getattr(state, name), getattr(plain, name)), name
        torch.testing.assert_close(state.logits, plain.logits, atol=1e-4, rtol=1e-4)
        for one, other in zip(buffers(plain), buffers(state), strict=True):
            assert torch.equal(one.isnan(), other.isnan())
            assert (one - other).nan_to_num().abs().max() <= 1e-4 * one.nan_to_num().abs().max()
        hidden = torch.full((len(ids), model.config.hidden), torch.nan)
        again = Prefill(model, spoilt_state(model), 0, ids, hidden_out=hidden, in_buckets=True)
        while not again.is_done:
            again.advance()
        torch.testing.assert_close(logits(model, hidden[-1:]), plain.logits, atol=1e-4, rtol=1e-4)
        assert hidden.isfinite().all()
        got = [state.token.item(), *(row[0] for row in tokens(stepper(model, state), state, new - 1))]
        assert got == expected


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_hugging_faces_and_the_cache_is_the_plain_ones(family, length, small_pair, random_ids, in_buckets):
    """Slots that the prompt does not fill are neither read nor written: both keep what they held."""
    assert_prefilled(small_pair(family), random_ids(length, seed=length), in_buckets)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("length", [1, 12, 13, 17, 41, 80, 253])
@pytest.mark.parametrize("family", FAMILIES)
def test_so_they_are_by_fused_chunks(family, length, small_pair, random_ids, in_buckets):
    assert_prefilled(small_pair(family), random_ids(length, seed=length), in_buckets)


class StoresFirst(TorchOps):
    """Stores a chunk before it attends."""

    def chunk_attention(self, out, keys, values, qkv, chunk, *, heads, **more):
        self.store_chunk(keys, values, qkv, chunk, heads=heads)
        super().chunk_attention(out, keys, values, qkv, chunk, heads=heads, **more)


@pytest.mark.usefixtures("fused")
def test_a_chunk_stored_before_it_attends_is_noticed(small_pair, random_ids, in_buckets, monkeypatch):
    monkeypatch.setattr(module, "ops_of", lambda model: StoresFirst())
    assert_prefilled(small_pair("gemma3"), random_ids(16, seed=16), in_buckets)  # one chunk, or one window
    with pytest.raises(AssertionError):
        assert_prefilled(small_pair("gemma3"), random_ids(41, seed=41), in_buckets)


@pytest.mark.parametrize("is_fused", [False, True], ids=["PyTorch", "fused"])
@pytest.mark.parametrize("buckets", [BELOW_WINDOW, PAST_WINDOW], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_bit(family, dtype, buckets, is_fused, small_pair, random_ids, in_buckets):
    """Whatever its tokens are, even if they make their own rows NaN."""
    model = in_buckets(small_pair(family, dtype).ours, buckets)
    seq, ids = buckets[-1], random_ids(2 * buckets[-1] - 5)
    states = []
    for padding in ([0] * 5, [7, 300, 42, 42, 5], [498] * 5):
        state = spoilt_state(model, with_logits=True)
        prefill_in_buckets(model, state, 0, ids[:seq])
        state.chunk.copy_(torch.tensor([0, seq, seq - 5, *ids[seq:], *padding]))
        weights = model.weights
        if padding[0] == 498:
            table = weights.embedding.clone()
            table[498] = torch.nan  # its logit would be NaN too: compared below without it
            weights = dataclasses.replace(weights, embedding=table)
        past = None if is_fused else seq
        run_padded_chunk(TorchOps(), dataclasses.replace(model, weights=weights), state, seq, past)
        states.append(state)
    first, *others = states
    for other in others:
        for one, same in zip((*buffers(first), first.position), (*buffers(other), other.position), strict=True):
            assert torch.equal(one.nan_to_num(7.0), same.nan_to_num(7.0))
        assert torch.equal(first.logits[:, :498], other.logits[:, :498])


@pytest.mark.parametrize("is_fused", [False, True], ids=["PyTorch", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_writes_its_row_alone_whichever_rows_decode(
    family, is_fused, small_pair, random_ids, in_buckets, monkeypatch
):
    monkeypatch.setattr(module, "is_fused", lambda model: is_fused)
    model = in_buckets(small_pair(family).ours, BELOW_WINDOW)
    whole = spoilt_state(model, 4, with_logits=True)
    state = whole.first_rows(3).first_rows(2)
    assert state.parent is whole
    prompts = [random_ids(23, seed=1), random_ids(30, seed=2)]
    for row, ids in enumerate(prompts):
        prefill_in_buckets(model, state, row, ids)
    for row, ids in enumerate(prompts):
        alone = spoilt_state(model, with_logits=True)
        prefill_in_buckets(model, alone, 0, ids)
        for one, many in zip((*buffers(alone), alone.logits), (*buffers(whole), whole.logits), strict=True):
            assert torch.equal(one[0].nan_to_num(7.0), many[row].nan_to_num(7.0))
        for name in ("token", "position", "x"):
            assert torch.equal(getattr(alone, name)[0], getattr(state, name)[row]), name
    assert all(buffer[2:].isnan().all() for buffer in buffers(whole))
    assert whole.position.tolist() == [23, 30, 0, 0] and not whole.logits[2:].any()


class StoresBackwards(TorchDispatchMode):
    """A GPU may store what goes to one slot in any order."""

    stores = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index_put_.default:
            self.stores += 1
            target, (row, heads, slot), values, *rest = args
            args = target, (row, heads, slot.flip(0)), values.flip(0), *rest
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_stores_changes_no_bit(family, small_pair, random_ids, in_buckets):
    model = in_buckets(small_pair(family).ours, PAST_WINDOW)
    forwards, backwards = spoilt_state(model), spoilt_state(model)
    prefill_in_buckets(model, forwards, 0, random_ids(77))
    with StoresBackwards() as watch:
        prefill_in_buckets(model, backwards, 0, random_ids(77))
    assert watch.stores == 2 * 2 * len(model.config.layers)
    for one, other in zip(buffers(forwards), buffers(backwards), strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


class Recorded(TorchDispatchMode):
    """The operations of a chunk: shapes and scalars of all arguments, and where those lie that it did not make."""

    def __init__(self, state: DecodeState, model) -> None:
        super().__init__()
        lasting = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
        lasting += [*buffers(state), model.weights.embedding, model.weights.final_norm]
        lasting += [value for layer in model.weights.layers for value in vars(layer).values() if value is not None]
        lasting += [table for index in range(len(model.config.layers)) for table in model.rope.for_layer(index)]
        self.lasting = {tensor.untyped_storage().data_ptr() for tensor in lasting}
        self.seen: list[Any] = []
        self.made: list[torch.Tensor] = []  # kept, so that no address is used twice

    def described(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            lasts = value.untyped_storage().data_ptr() in self.lasting
            return value.data_ptr() if lasts else "made", value.dtype, tuple(value.shape), value.stride()
        if isinstance(value, (tuple, list)):
            return tuple(self.described(item) for item in value)
        return value

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((str(func), self.described(args), self.described(tuple((kwargs or {}).items()))))
        out = func(*args, **(kwargs or {}))
        self.made.append(out)
        return out


class NoHead(TorchOps):
    """The head is one operation, which is not looked into."""

    def lm_head_argmax(self, token, *rest, **more):
        token.zero_()


def recorded(model, state: DecodeState, request: list[int], seq: int, past: int) -> list[Any]:
    state.chunk.zero_()
    state.chunk[: len(request)] = torch.tensor(request)
    with Recorded(state, model) as watch:
        run_padded_chunk(NoHead(), model, state, seq, past)
    return watch.seen


@pytest.mark.parametrize(("seq", "past"), [(12, 0), (40, 0), (12, 48), (40, 40)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_prompt_makes_the_same_operations(family, seq, past, small_pair, random_ids):
    """Same order, shapes, strides, scalars and lasting addresses, whatever row, start and number of tokens: what a
    CUDA graph needs."""
    model = small_pair(family).ours
    state = new_state(model, 3, with_logits=True)
    prompts = [(0, past, seq), (2, max(0, past - 12), 3), (1, max(0, past - 24), 1)]
    first, *others = [
        recorded(model, state, [row, start, count, *random_ids(count, seed=row)], seq, past)
        for row, start, count in prompts
    ]
    assert len(first) > 20 * len(model.config.layers)
    for other in others:
        assert other == first


def without_data(model):
    """The model on the device "meta", where reading a value back raises, as it does while a graph is captured."""
    runtime = dataclasses.replace(model.runtime, device="meta")

    def moved(owner):
        tensors = {name: value.to("meta") for name, value in vars(owner).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(owner, **tensors)

    weights = dataclasses.replace(moved(model.weights), layers=tuple(moved(layer) for layer in model.weights.layers))
    return dataclasses.replace(model, runtime=runtime, weights=weights, rope=RopeTables(model.config, runtime))


@pytest.mark.parametrize(("seq", "past"), [(12, 0), (40, 0), (12, 48), (40, 40)])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_read_back(family, seq, past, small_pair):
    model = without_data(small_pair(family).ours)
    state = new_state(model, 3, with_logits=True)
    ops = RecordingOps(GPU)
    run_padded_chunk(ops, model, state, seq, past)
    assert len(ops.launches) == 2  # the head's


def described(launch: Launch) -> tuple[Any, ...]:
    """A launch's kernel, grid, scalars, and its tensors' sizes; and where those are that were there before."""
    arguments = {
        name: (value.dtype, tuple(value.shape), value.stride()) if isinstance(value, torch.Tensor) else value
        for name, value in launch.arguments.items()
    }
    lasting = ("k_cache_ptr", "v_cache_ptr", "chunk_ptr", "cos_ptr", "sin_ptr", "norm_weight_ptr")
    addresses = [launch.arguments[name].data_ptr() for name in lasting if name in launch.arguments]
    return launch.kernel, launch.grid, arguments, addresses, launch.options


class RecordedLayers(RecordingOps):
    """All but the head."""

    def lm_head_argmax(self, token, *rest, **more):
        token.zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_chunk_makes_the_same_launches_for_every_prompt(family, small_pair, random_ids):
    """Six a layer, between its four products, and the last residual's."""
    model = small_pair(family).ours
    state, made = new_state(model, 3, with_logits=True), []
    for row, start, count in [(0, 0, 40), (2, 0, 3), (1, 77, 40), (0, 200, 1)]:
        state.chunk[: 3 + count] = torch.tensor([row, start, count, *random_ids(count, seed=row)])
        ops = RecordedLayers(GPU)
        run_padded_chunk(ops, model, state, 40, None)
        made.append([described(launch) for launch in ops.launches])
    first, *others = made
    assert all(other == first for other in others)
    assert len(first) == 6 * len(model.config.layers) + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_chunk_reads_nothing_back(family, small_pair):
    model = without_data(small_pair(family).ours)
    run_padded_chunk(RecordingOps(GPU), model, new_state(model, 3, with_logits=True), 40, None)


def test_a_chunk_that_reads_back_is_noticed(small_pair, monkeypatch):
    model = without_data(small_pair("gemma3").ours)
    honest = FixedChunk._extend
    monkeypatch.setattr(FixedChunk, "_extend", lambda self, *given: (int(self._count), honest(self, *given))[1])
    with pytest.raises(RuntimeError, match="meta"):
        run_padded_chunk(RecordingOps(GPU), model, new_state(model, 1), 12, 0)


def test_operations_that_depend_on_the_prompt_are_noticed(small_pair, random_ids, monkeypatch):
    model = small_pair("gemma3").ours
    state = new_state(model, 1)
    honest = FixedChunk._extend
    monkeypatch.setattr(
        FixedChunk, "_extend", lambda self, index, k, v: honest(self, index, k, v.add(int(self._count)))
    )
    one, other = (recorded(model, state, [0, 0, count, *random_ids(count)], 12, 0) for count in (12, 7))
    assert one != other


@pytest.fixture
def prefill_on_a_gpu(on_a_gpu, cuda_graphs, monkeypatch):
    """A function that prefills a prompt, and its state. A chunk describes itself by its sizes, row, start and count."""
    position, done = torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.bool)
    chunk_input = torch.zeros(2051, dtype=torch.int64)
    state = SimpleNamespace(
        graphs={}, logits=None, parent=None, batch=8, position=position, done=done, chunk=chunk_input
    )
    on_a_gpu.config = SimpleNamespace(vocab=VOCAB)

    def chunk(ops, model, state, seq, past, samples):
        cuda_graphs.run(lambda: (seq, past, *state.chunk[:3].tolist()))

    honest = torch.tensor
    monkeypatch.setenv(module.SWITCH, "0")
    monkeypatch.setattr(module, "run_padded_chunk", chunk)
    monkeypatch.setattr(module.torch, "tensor", lambda data, dtype=None, device=None: honest(data, dtype=dtype))

    def run(length, row=0, state=state):
        prefill_in_buckets(on_a_gpu, state, row, [5] * length)

    return run, state


def test_graphs_are_captured_once_per_length_and_share_a_pool(prefill_on_a_gpu, cuda_graphs):
    run, state = prefill_on_a_gpu
    for length in (1, 100, 128, 129, 600, 1000, 7, 200):
        run(length)
    assert [seq for _, seq, *_ in cuda_graphs.ran] == [128, 128, 128, 256, 1024, 1024, 128, 256]
    assert [how for how, *_ in cuda_graphs.ran] == [
        "plainly", *["replayed"] * 2, "plainly", "plainly", *["replayed"] * 3
    ]  # fmt: skip
    cuda_graphs.ran.clear()
    run(5 * 2048 + 1, row=3)
    assert cuda_graphs.ran == [
        ("plainly", 2048, 0, 3, 0, 2048),
        ("plainly", 2048, 2048, 3, 2048, 2048),
        ("plainly", 2048, 8192, 3, 4096, 2048),
        ("replayed", 2048, 8192, 3, 6144, 2048),
        ("replayed", 2048, 8192, 3, 8192, 2048),
        ("plainly", 128, 30000, 3, 10240, 1),
    ]
    assert [key[1:] for key in state.graphs] == [
        (128, 0), (256, 0), (1024, 0), (2048, 0), (2048, 2048), (2048, 8192), (128, 30000)
    ]  # fmt: skip
    assert len(cuda_graphs.captures) == 7 and len({id(graph.memory) for graph in cuda_graphs.captures}) == 1
    # Those of the whole state serve the state of its first rows.
    run(1, row=1, state=SimpleNamespace(parent=state, batch=2))
    assert cuda_graphs.ran[-1] == ("replayed", 128, 0, 1, 0, 1)


def test_one_graph_of_the_fused_form_serves_every_start(prefill_on_a_gpu, cuda_graphs, monkeypatch):
    run, state = prefill_on_a_gpu
    run(5)
    monkeypatch.delenv(module.SWITCH)
    for _ in range(2):
        run(3 * 2048 + 1, row=3)
    assert cuda_graphs.ran[1:] == [
        ("plainly", 2048, None, 3, 0, 2048),
        ("replayed", 2048, None, 3, 2048, 2048),
        ("replayed", 2048, None, 3, 4096, 2048),
        ("plainly", 128, None, 3, 6144, 1),
        ("replayed", 2048, None, 3, 0, 2048),
        ("replayed", 2048, None, 3, 2048, 2048),
        ("replayed", 2048, None, 3, 4096, 2048),
        ("replayed", 128, None, 3, 6144, 1),
    ]
    assert [*state.graphs] == [("prefill", 128, 0), ("fused prefill", 2048, 0), ("fused prefill", 128, 0)]


def test_a_failed_capture_is_one_warning_and_plain_chunks(prefill_on_a_gpu, cuda_graphs):
    run, _ = prefill_on_a_gpu
    run(1)
    cuda_graphs.fails = True
    with pytest.warns(UserWarning, match="prefill without a CUDA graph, since its capture failed: operation not perm"):
        run(200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in (200, 500, 3):
            run(length)
    assert [ran[:3] for ran in cuda_graphs.ran] == [
        ("plainly", 128, 0), ("plainly", 256, 0), ("plainly", 256, 0), ("plainly", 512, 0), ("replayed", 128, 0)
    ]  # fmt: skip
    assert len(cuda_graphs.captures) == 2


def test_an_eager_model_runs_the_same_chunks_uncaptured(prefill_on_a_gpu, on_a_gpu, cuda_graphs):
    run, _ = prefill_on_a_gpu
    on_a_gpu.runtime = dataclasses.replace(on_a_gpu.runtime, eager=True)
    for length in (3, 3, 2049):
        run(length)
    assert [ran[:3] for ran in cuda_graphs.ran] == [
        *[("plainly", 128, 0)] * 2, ("plainly", 2048, 0), ("plainly", 128, 2048)
    ]  # fmt: skip
    assert cuda_graphs.captures == []


def test_a_short_max_seq_len_is_a_bucket_of_its_own(small_pair):
    model = small_pair("gemma").ours
    assert chunk_lengths(model) == [128, 256]
    assert chunk_lengths(dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, max_seq_len=1))) == [1]
