"""The correctness gate that a model must pass on a GPU before its speed is measured, and the errors of bf16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from runtime.bench.scale import Scale
from runtime.engine.decode import decode_step, stepper, tokens
from runtime.engine.graph import ops_of
from runtime.engine.prefill import prefill
from runtime.families.state import DecodeState, new_state
from runtime.hugging_face.shared_weights import hugging_face
from runtime.kernels.advance import embed_torch
from runtime.model.model import Model
from runtime.parity.hugging_face import greedy
from runtime.parity.teacher_forcing import TeacherForcing


def start(model: Model, state: DecodeState, context: int) -> None:
    """Fills a state with random caches of `context` tokens, different in each row."""
    state.reset()
    generator = torch.Generator(model.device).manual_seed(1)
    for row in range(state.batch):
        for cache in (*state.cache.keys, *state.cache.values):
            cache[row].normal_(generator=generator)
    state.position.fill_(context)
    state.token.copy_(torch.arange(state.batch) + 7)
    state.x.copy_(embed_torch(model.weights.embedding, state.token, state.embed_scale))


def first_rows_logits(model: Model, rows: int, context: int) -> torch.Tensor:
    """The first row's logits [vocab] after two steps of `rows` rows from a random context of `context` tokens."""
    state = new_state(model, rows, with_logits=True)
    start(model, state, context)
    for _ in range(2):
        decode_step(ops_of(model), model, state)
    assert state.logits is not None
    return state.logits[0].clone()


def gate(scale: Scale, name: str, dtype: str, max_batch: int) -> dict[str, Any]:
    """The correctness gate of one model with `max_batch` rows; `passed` says whether its speeds may be measured."""
    model = scale.model(name, dtype, max_batch=max_batch, max_seq_len=min(1024, scale.max_seq_len))
    alone, batch = new_state(model, 1, with_logits=True), new_state(model, max_batch, with_logits=True)
    before, count = scale.prompt * 3 // 4, scale.new // 2

    def first_row(step: Callable[[], None], state: DecodeState) -> list[int]:
        """The first row's tokens of some steps from random caches."""
        start(model, state, before)
        return [rows[0] for rows in tokens(step, state, count)]

    eager = first_row(lambda: decode_step(ops_of(model), model, alone), alone)
    captured_step = stepper(model, alone)
    captured, together = first_row(captured_step, alone), first_row(stepper(model, batch), batch)
    assert alone.logits is not None and batch.logits is not None
    result: dict[str, Any] = {
        "model": name,
        "dtype": dtype,
        "quantize": scale.quantize,
        "max_batch": max_batch,
        "captured_equals_eager": captured == eager,
        "row_equals_itself_in_a_batch": together == captured,
        "logits_equal_themselves_in_a_batch": torch.equal(alone.logits[0], batch.logits[0]),
        "distinct_tokens": len(set(captured)),
    }
    length = min(300, scale.max_seq_len - scale.new)
    prompt = torch.randint(5, model.config.vocab, (length,), generator=torch.Generator().manual_seed(2)).tolist()
    start(model, alone, 0)
    first = int(prefill(model, alone, 0, prompt))
    ours = [first] + [row[0] for row in tokens(captured_step, alone, scale.new - 1)]
    theirs = greedy(hugging_face(scale.hf_config(name), model), prompt, scale.new)
    result["tokens"] = scale.new
    result["tokens_equal_to_hugging_face"] = next((i for i in range(scale.new) if ours[i] != theirs[i]), scale.new)
    exact = dtype != "float32" or ours == theirs
    same = ("captured_equals_eager", "row_equals_itself_in_a_batch", "logits_equal_themselves_in_a_batch")
    result["passed"] = all(result[name] for name in same) and exact
    return result


@torch.inference_mode()
def audit(scale: Scale, name: str) -> dict[str, Any]:
    """Decoding in the scale's dtype beside Hugging Face's, teacher-forced on one random text: the error of each on the
    margin between the top two tokens, and on all logits, against the same weights in fp32.

    The kernels sum in another order than Hugging Face, so tokens may differ at near ties; but a skipped rounding shows
    here as a larger error.
    """
    model = scale.model(name, max_seq_len=min(1024, scale.max_seq_len))
    theirs = hugging_face(scale.hf_config(name), model)
    length = scale.prompt + scale.new
    text = torch.randint(5, model.config.vocab, (length,), generator=torch.Generator().manual_seed(3)).tolist()
    _, ours = TeacherForcing(model).run(text[: scale.prompt], [*text[scale.prompt :], 0])  # the last is not read
    ids = torch.tensor([text], device=model.device)
    out = theirs(ids[:, : scale.prompt], use_cache=True, logits_to_keep=1)
    their_logits = []
    for index in range(scale.prompt, length):
        out = theirs(ids[:, index : index + 1], past_key_values=out.past_key_values, use_cache=True)
        their_logits.append(out.logits[0, -1].float().clone())
    theirs.float()
    truth = theirs(ids, logits_to_keep=scale.new).logits[0].float()
    best = truth.topk(2).indices
    margin = (truth.gather(1, best) @ truth.new_tensor([1.0, -1.0])).abs()
    result: dict[str, Any] = {
        "model": name,
        "dtype": scale.dtype,
        "steps": scale.new,
        "margin_median": margin.median().item(),
    }
    for side, logits in (("ours", ours[1:].float()), ("hugging_face", torch.stack(their_logits))):
        pair = logits.gather(1, best)
        error = (pair[:, 0] - pair[:, 1] - margin).abs()
        result[side] = {
            "margin_error_median": error.median().item(),
            "margin_error_p99": error.quantile(0.99).item(),
            "margin_error_max": error.max().item(),
            "logits_error_rms": ((logits - truth).pow(2).mean() / truth.pow(2).mean()).sqrt().item(),
            "same_token_as_fp32": int((logits.argmax(dim=1) == truth.argmax(dim=1)).sum()),
        }
    return result
