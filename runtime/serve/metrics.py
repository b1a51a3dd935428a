"""What a server measures, as Prometheus reads it: under vLLM's names where the meaning is vLLM's."""

from __future__ import annotations

import time
from collections import Counter as Count
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from runtime.engine.driver import Delivery
from runtime.engine.scheduler import scheduler_of
from runtime.engine.stream import Stream
from runtime.model.model import Model
from runtime.serve.admission import Admission

_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000)
_FIRST_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_BETWEEN_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 1, 2.5, 5)
_WHOLE_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
WINDOW_S = 1.0  # of decoding, for the share of the read bandwidth
IDLE_S = 5.0  # after which the share is 0


@dataclass
class _Progress:
    """One request's answers so far."""

    received_s: float
    last_s: dict[int, float] = field(default_factory=dict)  # by answer: the time of its newest token
    tokens: Count[int] = field(default_factory=Count)  # by answer


class Metrics:
    """Fed on the event loop; read by any scrape.

    Args:
        model: the one whose rows are counted.
        name: the label `model_name`.
        admission: counts responses.
        read_gb_s: the machine's read bandwidth; None where it was not measured.
    """

    def __init__(self, model: Model, name: str, admission: Admission, read_gb_s: float | None) -> None:
        self._model, self._read_gb_s = model, read_gb_s
        self._progress: dict[Stream, _Progress] = {}
        self._registry = CollectorRegistry()
        self._step_s = 0.0  # when the last deliveries arrived
        self._window_bytes, self._window_s, self._bytes_per_s = 0, 0.0, 0.0
        labels: dict[str, Any] = {"labelnames": ["model_name"], "registry": self._registry}

        def gauge(name_: str, text: str) -> Gauge:
            return Gauge(name_, text, **labels).labels(name)

        def counter(name_: str, text: str) -> Counter:
            return Counter(name_, text, **labels).labels(name)

        def histogram(name_: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name_, text, buckets=buckets, **labels).labels(name)

        scheduler = scheduler_of(model)
        slots = model.runtime.max_batch * model.runtime.max_seq_len
        gauge("vllm:num_requests_running", "Answers that have a row.").set_function(lambda: scheduler.running)
        gauge("vllm:num_requests_waiting", "Answers that wait for a row.").set_function(lambda: scheduler.waiting)
        usage = gauge("vllm:kv_cache_usage_perc", "Slots of the rows' KV cache that are filled. 1 means all.")
        usage.set_function(lambda: scheduler.tokens / slots)
        self._prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.")
        self._new_tokens = counter("vllm:generation_tokens", "Tokens of answers.")
        self._queries = counter("vllm:prefix_cache_queries", "Tokens of prompts looked up in the prefix cache.")
        self._hits = counter("vllm:prefix_cache_hits", "Tokens of prompts taken over from earlier prompts.")
        self._finished = Counter(
            "vllm:request_success",
            "Answers that are complete.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._name = name
        self._first = histogram(
            "vllm:time_to_first_token_seconds", "From a request to an answer's first token.", _FIRST_S
        )
        self._between = histogram("vllm:inter_token_latency_seconds", "Between an answer's tokens.", _BETWEEN_S)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From a request to its last token.", _WHOLE_S)
        self._prompts = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._answers = histogram("vllm:request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self._read = counter("gemma_runtime:decode_read_bytes", "Weights and cache that decode steps had to read.")
        self._decoding = counter("gemma_runtime:decode_seconds", "Time between steps that brought tokens.")
        gauge(
            "gemma_runtime:read_bandwidth_bytes_per_second",
            "This machine's, measured at the start; 0 for not measured.",
        ).set(1e9 * (read_gb_s or 0))
        share = gauge(
            "gemma_runtime:read_bandwidth_share",
            f"Of it, what decoding used over the last {WINDOW_S:g} s; 0 while idle.",
        )
        share.set_function(self._share)
        unread = gauge("gemma_runtime:open_responses", "Responses that are not yet read to their end.")
        unread.set_function(lambda: admission.responses)
        self._responses = Counter(
            "gemma_runtime:http_responses", "Responses by path and status.", ["path", "status"], registry=self._registry
        )

    def render(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def responded(self, path: str, status: int) -> None:
        """Counts a response; `path` is its route's, or "other" where there is none."""
        self._responses.labels(path, status).inc()

    def begin(self, stream: Stream, received_s: float) -> None:
        """Starts following a request that arrived at `received_s` of time.perf_counter."""
        self._progress[stream] = _Progress(received_s)

    def step(self, deliveries: Sequence[Delivery], at_s: float) -> None:
        """Records what a step delivered at `at_s` of time.perf_counter."""
        decoded: list[int] = []  # tokens in the cache of each answer that a decode step extended
        for delivery in deliveries:
            progress = self._progress.get(delivery.stream)
            if progress is None:
                continue
            prompts, answers = delivery.stream.request.prompts, delivery.stream.request.n or 1
            for piece in delivery.pieces:
                before = progress.last_s.get(piece.index)
                if before is None:
                    self._first.observe(at_s - progress.received_s)
                else:
                    self._between.observe(at_s - before)
                    decoded.append(len(prompts[piece.index // answers]) + progress.tokens[piece.index])
                progress.last_s[piece.index] = at_s
                progress.tokens[piece.index] += 1
            self._new_tokens.inc(len(delivery.pieces))
            if delivery.is_last:
                self._end(delivery, self._progress.pop(delivery.stream), at_s)
        if decoded:
            self._count_reads(decoded, at_s)
        self._step_s = at_s

    def _count_reads(self, contexts: list[int], at_s: float) -> None:
        plan, took_s = self._model.plan, at_s - self._step_s
        read = plan.weights_read + sum(plan.bytes_per_token(context) - plan.weights_read for context in contexts)
        self._read.inc(read)
        self._decoding.inc(took_s)
        self._window_bytes += read
        self._window_s += took_s
        if self._window_s >= WINDOW_S:
            self._bytes_per_s = self._window_bytes / self._window_s
            self._window_bytes, self._window_s = 0, 0.0

    def _end(self, delivery: Delivery, progress: _Progress, at_s: float) -> None:
        stream = delivery.stream
        for prompt in stream.request.prompts:
            self._prompts.observe(len(prompt))
            self._prompt_tokens.inc(len(prompt))
            self._queries.inc(len(prompt) if stream.request.reuse else 0)
        self._hits.inc(stream.cached_tokens)
        for index, result in enumerate(stream.results):
            self._answers.observe(progress.tokens[index])
            reason = "error" if delivery.error else {"cancelled": "abort", None: "abort"}.get(result.finish_reason)
            self._finished.labels(self._name, reason or result.finish_reason).inc()
        self._whole.observe(at_s - progress.received_s)

    def _share(self) -> float:
        if not self._read_gb_s or time.perf_counter() - self._step_s > IDLE_S:
            return 0.0
        return self._bytes_per_s / (self._read_gb_s * 1e9)
