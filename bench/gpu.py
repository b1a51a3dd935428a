"""One measured session on a GPU: ceilings, correctness, kernels, whole steps, and Hugging Face on the same weights.

    python -m runtime.bench.gpu --out FILE [--models gemma-1.1-2b,...] [--parts speeds,...] [--minutes 9] [--compile]

The weights are random, of the published shapes (runtime.bench.shapes). A model's correctness gate runs before its
speeds: captured against eager steps, a row alone against the same row in a batch of 8, fp32 tokens against Hugging
Face's; beside it, an audit of the errors in bf16. A gate that fails ends the run with exit code 1. The file is
rewritten after every part, so that a run cut short leaves what it has measured. No part begins after --minutes.

Times are medians with their 10th and 90th percentile; GB/s counts the bytes that a step must read (every weight once,
the tied table once, the cached keys and values that its layers look at).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
import triton.language as tl

from runtime.bench.shapes import SHAPES, random_model
from runtime.bench.tune import Case, cases, launcher, time_us
from runtime.config import ModelConfig
from runtime.decode import DecodeState, StepGraph, decode_step, new_state
from runtime.kernels.advance import embed_reference
from runtime.kernels.launch import let_next_kernel_start, options, wait_for_previous_kernel
from runtime.load import Model
from runtime.prefill import prefill

MAX_SEQ_LEN = 4352
PROMPT = 128
NEW = 64


@triton.jit
def read_kernel(out_ptr, x_ptr, elements, BLOCK: tl.constexpr):
    # One program reads a run of its own and leaves one word, so that the reading cannot be left out.
    program = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, elements, BLOCK):
        total ^= tl.load(x_ptr + program.to(tl.int64) * elements + start + tl.arange(0, BLOCK))
    tl.store(out_ptr + program, tl.sum(total, axis=0))


@triton.jit
def empty_kernel(out_ptr, USE_DEPENDENT_LAUNCH: tl.constexpr):
    # What a launch costs that does nothing.
    let_next_kernel_start(USE_DEPENDENT_LAUNCH)
    wait_for_previous_kernel(USE_DEPENDENT_LAUNCH)
    tl.store(out_ptr + tl.program_id(0), 0)


def environment() -> dict[str, Any]:
    """The machine and the versions."""
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    shown = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "gpu": torch.cuda.get_device_name(),
        "nvidia_smi": shown.stdout.strip().splitlines(),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "commit": commit.stdout.strip() or None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def ceilings() -> dict[str, float]:
    """What the GPU can do at best: bandwidth of reading and of copying, and the cost of an empty launch in a graph."""
    buffer = torch.randint(0, 1 << 30, (1 << 30,), device="cuda", dtype=torch.int32)
    out = torch.empty(1 << 16, device="cuda", dtype=torch.int32)
    reads = []
    for programs, block in ((132 * 8, 2048), (4096, 4096), (16384, 8192)):
        elements = buffer.numel() // programs // block * block
        launch = partial(read_kernel[(programs,)], out, buffer, elements, BLOCK=block, num_warps=4)
        reads.append(elements * programs * 4 / time_us(launch) / 1e3)
    other = torch.empty_like(buffer)
    copied = buffer.numel() * 8 / time_us(partial(_repeat, partial(other.copy_, buffer), 1)) / 1e3
    result = {"read_gb_s": max(reads), "copy_gb_s": copied}
    for dependent in (False, True):
        chosen = {**options(out.device, 4), "launch_pdl": dependent}
        launch = partial(empty_kernel[(132,)], out, USE_DEPENDENT_LAUNCH=dependent, **chosen)
        name = "empty_dependent_launch_us" if dependent else "empty_launch_us"
        result[name] = time_us(partial(_repeat, launch, 930)) / 930
    return result


def start(model: Model, state: DecodeState, context: int) -> None:
    """Puts a state `context` tokens into made-up sequences, each row another."""
    state.reset()
    generator = torch.Generator("cuda").manual_seed(1)
    for row in range(state.batch):
        for cache in (*state.cache.keys, *state.cache.values):
            cache[row].normal_(generator=generator)
    state.position.fill_(context)
    state.token.copy_(torch.arange(state.batch) + 7)
    state.x.copy_(embed_reference(model.weights.embedding, state.token, state.embed_scale))


def graph_of(model: Model, state: DecodeState, steps: int = 1) -> StepGraph:
    """A captured graph on a state."""
    graph = StepGraph(model, state, steps)
    graph.warm_up()
    graph.capture()
    return graph


def decoded(step: Callable[[], None], state: DecodeState, count: int) -> list[list[int]]:
    """The tokens of `count` steps, one list per step."""
    tokens = []
    for _ in range(count):
        step()
        tokens.append(state.token.tolist())
    return tokens


def gate(name: str, dtype: str) -> dict[str, Any]:
    """The correctness gate of one model shape; `passed` says whether its speeds may be measured."""
    model = random_model(name, "cuda", dtype, max_seq_len=1024, max_batch=8)
    alone, batch = new_state(model, 1), new_state(model, 8)
    start(model, alone, 100)
    eager = decoded(lambda: decode_step(model, alone), alone, 32)
    graph = graph_of(model, alone)
    start(model, alone, 100)
    captured = decoded(graph.replay, alone, 32)
    graph = graph_of(model, batch)
    start(model, batch, 100)
    together = decoded(graph.replay, batch, 32)
    result: dict[str, Any] = {
        "model": name,
        "dtype": dtype,
        "captured_equals_eager": captured == eager,
        "row_equals_itself_in_a_batch": [row[0] for row in together] == [row[0] for row in captured],
        "distinct_tokens": len({row[0] for row in captured}),
    }
    prompt = torch.randint(5, model.config.vocab, (300,), generator=torch.Generator().manual_seed(2)).tolist()
    start(model, alone, 0)
    ours = [int(prefill(model, alone, 0, prompt))] + [row[0] for row in decoded(stepper(model, alone), alone, NEW - 1)]
    theirs = greedy(hugging_face(name, model), prompt, NEW)
    result["tokens"] = NEW
    result["tokens_equal_to_hugging_face"] = next((i for i in range(NEW) if ours[i] != theirs[i]), NEW)
    exact = dtype != "float32" or ours == theirs
    result["passed"] = result["captured_equals_eager"] and result["row_equals_itself_in_a_batch"] and exact
    return result


@torch.inference_mode()
def audit(name: str) -> dict[str, Any]:
    """bf16 decoding against Hugging Face's, teacher-forced on one random text: the error on the margin between the two
    best tokens, and on all logits, of each against the same weights in fp32.

    The kernels add in another order than Hugging Face, so tokens may differ at near ties; but a rounding that one of
    them skips shows here as a larger error.
    """
    model = random_model(name, "cuda", "bfloat16", max_seq_len=1024)
    theirs = hugging_face(name, model)
    text = torch.randint(5, model.config.vocab, (PROMPT + NEW,), generator=torch.Generator().manual_seed(3)).tolist()
    state = new_state(model, 1, with_logits=True)
    prefill(model, state, 0, text[:PROMPT])
    ours_logits = []
    for token in text[PROMPT:]:
        state.token.fill_(token)
        state.x.copy_(embed_reference(model.weights.embedding, state.token, state.embed_scale))
        decode_step(model, state)
        assert state.logits is not None
        ours_logits.append(state.logits[0].float())
    ids = torch.tensor([text], device="cuda")
    out = theirs(ids[:, :PROMPT], use_cache=True, logits_to_keep=1)
    their_logits = []
    for index in range(PROMPT, len(text)):
        out = theirs(ids[:, index : index + 1], past_key_values=out.past_key_values, use_cache=True)
        their_logits.append(out.logits[0, -1].float())
    theirs.float()
    truth = theirs(ids, logits_to_keep=NEW).logits[0].float()
    best = truth.topk(2).indices
    margin = (truth.gather(1, best) @ truth.new_tensor([1.0, -1.0])).abs()
    result: dict[str, Any] = {"model": name, "dtype": "bfloat16", "steps": NEW, "margin_median": margin.median().item()}
    for side, rows in (("ours", ours_logits), ("hugging_face", their_logits)):
        logits = torch.stack(rows)
        pair = logits.gather(1, best)
        error = (pair[:, 0] - pair[:, 1] - margin).abs()
        result[side] = {
            "margin_error_median": error.median().item(),
            "margin_error_p99": error.quantile(0.99).item(),
            "margin_error_max": error.max().item(),
            "logits_error_rms": ((logits - truth).pow(2).mean() / truth.pow(2).mean()).sqrt().item(),
            "same_token_as_fp32": int((logits.argmax(dim=1) == truth.argmax(dim=1)).sum()),
        }
    print("   audit", result, flush=True)
    return result


def stepper(model: Model, state: DecodeState) -> Callable[[], None]:
    """One captured step on a state that is in use: warming up changes nothing that is read."""
    return graph_of(model, state).replay


def hugging_face(name: str, model: Model) -> Any:
    """Hugging Face's model on the very same weights, which it shares."""
    config = transformers.AutoConfig.for_model(**SHAPES[name])
    # Gemma 2's softcap needs eager attention in the transformers versions that leave it out elsewhere.
    attention = "eager" if model.config.family == "gemma2" else "sdpa"
    with torch.device("cuda"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, attn_implementation=attention
        ).eval()
    c, tensors = model.config, dict[str, torch.Tensor | None]()
    tensors["model.embed_tokens.weight"] = model.weights.embedding
    tensors["lm_head.weight"] = model.weights.embedding
    tensors["model.norm.weight"] = model.weights.final_norm
    for index, layer in enumerate(model.weights.layers):
        prefix = f"model.layers.{index}."
        parts = layer.qkv.split([count * c.head_dim for count in (c.heads, c.kv_heads, c.kv_heads)])
        for part, weight in zip("qkv", parts, strict=True):
            tensors[f"{prefix}self_attn.{part}_proj.weight"] = weight
        tensors[f"{prefix}self_attn.o_proj.weight"] = layer.output
        gate_weight, up_weight = layer.gate_up.chunk(2)
        tensors[f"{prefix}mlp.gate_proj.weight"], tensors[f"{prefix}mlp.up_proj.weight"] = gate_weight, up_weight
        tensors[f"{prefix}mlp.down_proj.weight"] = layer.down
        tensors[f"{prefix}input_layernorm.weight"] = layer.attention_norm
        if layer.post_attention_norm is None:
            tensors[f"{prefix}post_attention_layernorm.weight"] = layer.mlp_norm
        else:
            tensors[f"{prefix}post_attention_layernorm.weight"] = layer.post_attention_norm
            tensors[f"{prefix}pre_feedforward_layernorm.weight"] = layer.mlp_norm
            tensors[f"{prefix}post_feedforward_layernorm.weight"] = layer.post_mlp_norm
        if layer.q_norm is not None:
            tensors[f"{prefix}self_attn.q_norm.weight"] = layer.q_norm
            tensors[f"{prefix}self_attn.k_norm.weight"] = layer.k_norm
    theirs.load_state_dict(tensors, strict=True, assign=True)
    return theirs


def greedy(model: Any, prompt: list[int], count: int, **extra: Any) -> list[int]:
    """Hugging Face's greedy tokens, stop tokens ignored."""
    ids = torch.tensor([prompt], device="cuda")
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **extra,
    )
    return out[0, len(prompt) :].tolist()


def replays_us(graph: StepGraph, count: int) -> list[float]:
    """Sorted device times of single replays."""
    samples = []
    for _ in range(count + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3)
    return sorted(samples[3:])


def speeds(name: str, read_gb_s: float) -> list[dict[str, Any]]:
    """Decode steps of one model in bf16 over contexts, batches and steps in one graph."""
    model = random_model(name, "cuda", "bfloat16", max_seq_len=MAX_SEQ_LEN, max_batch=8)
    rows = []
    for batch, steps, contexts in (
        (1, 1, (128, 1024, 4096)),
        (1, 8, (128,)),
        (2, 1, (128,)),
        (4, 1, (128,)),
        (8, 1, (128, 1024)),
    ):
        state = new_state(model, batch)
        start(model, state, 0)
        began = time.perf_counter()
        graph = graph_of(model, state, steps)
        capture_s = time.perf_counter() - began
        for context in contexts:
            state.position.fill_(context - 1)
            samples = [sample / steps for sample in replays_us(graph, 60 if steps == 1 else 20)]
            median = statistics.median(samples)
            # A batch reads the weights once, and the cache of every row.
            weights = model.plan.weights
            needed = weights + batch * (model.plan.bytes_per_token(context) - weights)
            row = {
                "model": name,
                "dtype": "bfloat16",
                "batch": batch,
                "context": context,
                "steps_per_graph": steps,
                "step_us": median,
                "p10_us": samples[len(samples) // 10],
                "p90_us": samples[len(samples) * 9 // 10],
                "tokens_per_s": batch * 1e6 / median,
                "bytes_per_step": needed,
                "bandwidth_gb_s": needed / median / 1e3,
                "share_of_read_bandwidth": needed / median / 1e3 / read_gb_s,
                "warm_up_and_capture_s": capture_s,
            }
            rows.append(row)
            print(
                f"   {name} batch {batch} context {context} x{steps}: {median:.1f} us, "
                f"{row['tokens_per_s']:.0f} tokens/s, {row['share_of_read_bandwidth']:.1%} of read bandwidth",
                flush=True,
            )
    return rows


def host_loop(name: str) -> dict[str, Any]:
    """The same model through the host's loop: what a caller of the runtime waits for, prefill and reading included."""
    from runtime.decode import tokens

    model = random_model(name, "cuda", "bfloat16", max_seq_len=MAX_SEQ_LEN)
    state = new_state(model, 1)
    result: dict[str, Any] = {"model": name, "dtype": "bfloat16"}
    for length in (128, 512, 2048):
        prompt = [5 + i % 1000 for i in range(length)]
        samples = []
        for _ in range(6):
            began = time.perf_counter()
            int(prefill(model, state, 0, prompt))
            samples.append((time.perf_counter() - began) * 1e3)
        result[f"ttft_{length}_ms"] = statistics.median(samples[1:])
    samples = []
    for _ in range(5):
        prefill(model, state, 0, [5 + i for i in range(PROMPT)])
        torch.cuda.synchronize()
        began = time.perf_counter()
        count = sum(1 for _ in tokens(model, state, 256))
        samples.append(count / (time.perf_counter() - began))
    result["tokens_per_s"] = statistics.median(samples[1:])
    result["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    print(f"   {name} through the host's loop: {result}", flush=True)
    return result


def peers(name: str, compiled: bool) -> list[dict[str, Any]]:
    """Hugging Face's decode speed on the same weights: time of 72 tokens less time of 8, over 64."""
    model = random_model(name, "cuda", "bfloat16", max_seq_len=1024)
    theirs = hugging_face(name, model)
    prompt = [5 + i for i in range(PROMPT)]
    kinds: dict[str, dict[str, Any]] = {
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
    }
    if compiled:
        kinds["static, torch.compile"] = {"cache_implementation": "static"}
    rows = []
    for kind, extra in kinds.items():
        samples = []
        for _ in range(4):
            times = []
            for count in (8, 72):
                torch.cuda.synchronize()
                began = time.perf_counter()
                greedy(theirs, prompt, count, **extra)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
            samples.append(64 / (times[1] - times[0]))
        row = {
            "model": name,
            "dtype": "bfloat16",
            "cache": kind,
            "tokens_per_s": statistics.median(samples[1:]),
            "samples": samples,
        }
        rows.append(row)
        print(f"   Hugging Face {name} {kind}: {row['tokens_per_s']:.1f} tokens/s", flush=True)
    return rows


def kernel_times(name: str, read_gb_s: float) -> list[dict[str, Any]]:
    """Each matrix-vector kernel of a model at 1 and 8 rows, beside PyTorch's product of the same matrix."""
    rows = []
    for case in cases(ModelConfig.from_hf(SHAPES[name])):
        size = case.outputs * case.matrices * case.width * 2
        copies = int(max(2, min(40, 600e6 // size)))
        times = {}
        for count in (1, 8):
            run = launcher(case, torch.bfloat16, copies, count)
            times[count] = time_us(partial(_each, run, range(copies), None)) / copies
        weights = torch.randn(copies, case.outputs * case.matrices, case.width, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(1, case.width, device="cuda", dtype=torch.bfloat16)
        plain = time_us(partial(_each, partial(torch.nn.functional.linear, x), weights)) / copies
        rows.append(_kernel_row(name, case, size, times, plain, read_gb_s))
        del weights
    return rows


def _each(run: Callable[..., Any], items: Iterable[Any], *rest: Any) -> None:
    for item in items:
        run(item, *rest)


def _repeat(run: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        run()


def _kernel_row(name: str, case: Case, size: int, times: dict[int, float], plain: float, read: float) -> dict[str, Any]:
    rate = size / times[1] / 1e3
    shown = f"{times[1]:.2f} us, {rate:.0f} GB/s, torch {plain:.2f} us, 8 rows {times[8]:.2f} us"
    print(f"   {name} {case.key('bfloat16')}: {shown}", flush=True)
    return {
        "model": name,
        "kernel": case.kernel,
        "outputs": case.outputs,
        "width": case.width,
        "time_us": times[1],
        "time_8_rows_us": times[8],
        "bandwidth_gb_s": rate,
        "share_of_read_bandwidth": rate / read,
        "torch_linear_us": plain,
    }


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--models", default="gemma-1.1-2b,gemma-3-270m,gemma-3-1b,gemma-2-2b")
    parser.add_argument(
        "--parts", default="speeds,kernels,host_loop,hugging_face", help="what to measure after the gates"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no part after this time")
    parser.add_argument(
        "--compile", action="store_true", help="measure Hugging Face's compiled static cache too (slow)"
    )
    args = parser.parse_args(argv)
    names = args.models.split(",")
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        parser.error(f"--models: expected some of {', '.join(SHAPES)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device is found; this command measures one")
    deadline = time.monotonic() + 60 * args.minutes
    result: dict[str, Any] = {"schema": 1, "environment": environment(), "ceilings": ceilings(), "gates": []}
    read = result["ceilings"]["read_gb_s"]
    print(json.dumps(result, indent=1), flush=True)
    for name in names:
        for dtype in ("float32", "bfloat16"):
            result["gates"].append(gate(name, dtype))
            print("   gate", result["gates"][-1], flush=True)
            _free()
    result["audits"] = [audit(name) for name in names]
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    if not all(row["passed"] for row in result["gates"]):
        print("a correctness gate failed: no speed is measured")
        return 1
    parts: dict[str, Callable[[str], Any]] = {
        "speeds": lambda name: speeds(name, read),
        "kernels": lambda name: kernel_times(name, read),
        "host_loop": lambda name: [host_loop(name)],
        "hugging_face": lambda name: peers(name, args.compile),
    }
    for part in filter(None, args.parts.split(",")):
        measure = parts[part]
        for name in names:
            if time.monotonic() > deadline:
                result.setdefault("not_measured", []).append(f"{part}: {name}")
                continue
            result.setdefault(part, []).extend(measure(name))
            _free()
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    raise SystemExit(main())
