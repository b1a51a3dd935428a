"""The report of a benchmark: one versioned schema for every command, which `diff`, `export` and the page read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field

SCHEMA_VERSION = 1
LEAST_DECODE_RATIO = 0.90  # share of a static batch's decode rate that requests in flight must keep
LEAST_GAPS = 100  # between tokens, before their 99th percentile says anything


class Record(BaseModel):
    """Strict: an unknown field in a file is an error, and so is a value of the wrong type."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Samples(BaseModel):
    """Raw measurements of one quantity in the order taken, with their percentiles, interpolated linearly."""

    model_config = ConfigDict(extra="ignore", frozen=True)  # percentiles in a file are recomputed

    values: tuple[float, ...] = Field(min_length=1)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def p50(self) -> float:
        return self.percentile(50)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def p90(self) -> float:
        return self.percentile(90)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def p95(self) -> float:
        return self.percentile(95)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def p99(self) -> float:
        return self.percentile(99)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def spread(self) -> float:
        """The middle half of the samples, as a share of the median."""
        low, high = self.quarters
        return (high - low) / self.p50 if self.p50 else 0.0

    @property
    def quarters(self) -> tuple[float, float]:
        """The ends of the middle half."""
        return self.percentile(25), self.percentile(75)

    @classmethod
    def of(cls, values: Iterable[float]) -> Samples:
        return cls(values=tuple(values))

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.values, percent))


class Audit(Record):
    """The result of the quick parity audit of a configuration, before it was timed."""

    passed: bool
    verdict: str


class Environment(Record):
    """What the numbers depend on."""

    device: str  # "cpu" or "cuda:0"
    device_name: str
    multiprocessors: int | None = None  # of a GPU
    block_table_sha256: str | None = None  # of the GPU's block shapes, where it has a table
    cores: int
    threads: int
    clocks_mhz: float | None  # of the GPU's multiprocessors, or the mean of the CPU's cores
    driver: str | None
    datasheet_gb_s: float | None  # the memory bandwidth in its datasheet
    read_bandwidth: str | None = None  # what measures it, in words
    load_average: float  # of the last minute, before the first run
    versions: dict[str, str | None]  # of python, torch, ...
    commit: str | None

    def flat(self) -> dict[str, Any]:
        """Every field and every version by its name."""
        fields = self.model_dump(mode="json")
        return fields | fields.pop("versions")


class Part(Record):
    """One stage of a decode step: a kind of operation and its share of a token's time."""

    name: str  # "qkv_projection", "decode_attention", ...
    time_us: float  # in one step, over all layers; the median of a few steps
    launches: int  # in one step


class Measured(Record):
    """What rows of every kind have. A row has numbers only if `status` is "ok"."""

    status: Literal["ok", "refused", "skipped", "crashed"] = "ok"
    reason: str | None = None  # why not "ok", or why there are fewer samples than requested
    audit: Audit | None = None  # of this runtime
    model: str
    dtype: str
    load_s: float | None = None
    achieved_gb_s: float | None = None  # what must be read / the time of it, the median
    read_bandwidth_gb_s: float | None = None  # the median of the readings
    read_bandwidth_readings_gb_s: Samples | None = None  # one per run, directly before it
    share_of_read_bandwidth: float | None = None  # the median of the shares
    shares_of_read_bandwidth: Samples | None = None  # one per run, of the reading before it
    share_of_datasheet: float | None = None  # where the datasheet's bandwidth is known


class Row(Measured):
    """One engine in one configuration. Like every kind of row it has a `name`, its configuration in words, and `times`,
    what `diff` compares by quantity and unit: one sample per run, since the gaps within one answer are not independent
    of each other."""

    benchmark: Literal["latency", "throughput", "compare"]
    engine: str = "gemma-runtime"  # or "hf-dynamic", "llama.cpp", ...
    engine_version: str | None = None
    batch_size: int
    prompt_len: int  # tokens of one row's prompt; of a file of prompts their mean
    gen_len: int  # tokens of one row's answer
    requests: int | None = None  # of a file of prompts

    first_call_s: float | None = None  # the first request in this configuration, compilation and capture included
    ttft_ms: Samples | None = None  # one per request: to the first token of every row
    inter_token_ms: Samples | None = None  # every gap between two tokens, of all requests
    tpot_ms: Samples | None = None  # one per request: (end to end - TTFT) / (n - 1)
    prefill_tokens_per_s: Samples | None = None  # one per request, over all its rows
    decode_tokens_per_s: Samples | None = None  # one per request, over all its rows
    output_tokens_per_s: Samples | None = None  # throughput: one per pass over the file, prefill included
    bytes_per_step: int | None = None  # every weight once, every row's KV cache in the middle of its answer
    bytes_per_token: int | None = None  # of each of the step's tokens
    peak_memory_mb: float | None = None
    equal_tokens: float | None = None  # compare: share of this engine's tokens that are gemma-runtime's, by position
    parts: tuple[Part, ...] = ()

    @property
    def name(self) -> str:
        sizes = f"b{self.batch_size} pp{self.prompt_len} tg{self.gen_len}"
        return f"{self.benchmark}: {self.engine}, {self.model}, {self.dtype}, {sizes}"

    def times(self) -> dict[str, Samples | None]:
        return {"TTFT, ms": self.ttft_ms, "TPOT, ms": self.tpot_ms}


class KernelRow(Measured):
    """One operation at a real shape, beside PyTorch's operation for the same."""

    kernel: str
    shape: str  # "1 x 640 -> 1536", or "context 512"
    time_us: Samples | None = None  # of one launch
    torch_us: Samples | None = None  # None where PyTorch has no equivalent operation
    bytes: int  # weights, or cached keys and values

    @property
    def name(self) -> str:
        return f"{self.kernel}: {self.model}, {self.dtype}, {self.shape}"

    def times(self) -> dict[str, Samples | None]:
        return {"operation, us": self.time_us, "PyTorch, us": self.torch_us}


class InFlightRow(Measured):
    """Requests that share the engine's rows, beside a static batch of as many rows. Samples are one per round, but for
    `inter_token_ms`."""

    rows: int
    requests: int
    prompt_len: int  # tokens of the longest prompt
    gen_len: int  # tokens of the longest answer
    arrival_len: int  # tokens of a prompt that arrives while others decode

    decode_tokens_per_s: Samples | None = None  # in steps of all rows, between which no prompt is run
    static_decode_tokens_per_s: Samples | None = None
    decode_ratio: Samples | None = None  # in flight / static
    meets_decode_ratio: bool | None = None  # whether the median is at least `LEAST_DECODE_RATIO`
    output_tokens_per_s: Samples | None = None  # of the whole run, prefill included
    static_output_tokens_per_s: Samples | None = None  # of the same answers: what goes past their length is not counted
    output_ratio: Samples | None = None
    inter_token_ms: Samples | None = None  # of rows that decode while prompts arrive: each gap of all rounds
    inter_token_p99_ms: float | None = None  # where there are at least `LEAST_GAPS`
    inter_token_max_ms: float | None = None
    arrivals: int | None = None  # prompts that arrived, in all rounds
    step_ms: Samples | None = None  # a step of the same rows without arrivals
    budget_tokens: int | None = None  # of an arriving prompt, run between two steps
    budget_ms: Samples | None = None  # what that share of the prompt takes when it is run alone
    limit_ms: float | None = None  # two steps and the budget, by their medians
    meets_limit: bool | None = None  # whether the 99th percentile is at most that; None where there is none

    @property
    def name(self) -> str:
        sizes = f"{self.rows} rows pp{self.prompt_len} tg{self.gen_len}, pp{self.arrival_len} arriving"
        return f"in flight: {self.model}, {self.dtype}, {sizes}"

    def times(self) -> dict[str, Samples | None]:
        rates = {"steps of all rows": self.decode_tokens_per_s, "whole run": self.output_tokens_per_s}
        return {
            f"time per token, {what}, ms": Samples.of(1e3 / value for value in rate.values)
            for what, rate in rates.items()
            if rate is not None
        }


AnyRow: TypeAlias = Row | KernelRow | InFlightRow


class Report(Record):
    """One run of one command."""

    schema_version: Literal[1] = 1
    command: str
    time: str  # UTC, ISO 8601
    environment: Environment
    rows: tuple[Row, ...] = ()
    kernels: tuple[KernelRow, ...] = ()
    in_flight: tuple[InFlightRow, ...] = ()

    @property
    def all_rows(self) -> list[AnyRow]:
        """Rows of every kind."""
        return [*self.rows, *self.kernels, *self.in_flight]

    def with_rows(self, *rows: AnyRow) -> Report:
        """The same run with these rows."""
        kinds = {"rows": Row, "kernels": KernelRow, "in_flight": InFlightRow}
        update = {name: tuple(row for row in rows if isinstance(row, kind)) for name, kind in kinds.items()}
        return self.model_copy(update=update)

    def to_json(self) -> str:
        """One JSON document, indented."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> Report:
        """Reads a report.

        Raises:
            ValueError: the file is not a report of this version; the message names the first error.
            OSError: it cannot be read.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise ValueError(
                f"{path}: expected a benchmark report of schema version {SCHEMA_VERSION}: {where}: {first['msg']}"
            ) from None
