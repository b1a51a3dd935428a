"""A dataset of prompts through a pool of actors, each with an engine of its own.

Ray Data runs an actor's batches again elsewhere when the actor or its node is lost, and keeps the order of the prompts.
An actor holds two batches at a time, so that rows that one leaves free go to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow
import ray.data

from runtime import api
from runtime.engine.engine import Engine
from runtime.engine.options import Options, check_names
from runtime.engine.request import read_raw_request, whole_number
from runtime.engine.stream import Stream
from runtime.errors import ENDS_ONE_ANSWER, GrammarTooComplex, InvalidArgument, one_line
from runtime.ray.engine_kwargs import read_engine_kwargs

Row: TypeAlias = dict[str, Any]

# What an answer adds to its row, under the names of Ray's own processors where they have one.
COLUMNS = pyarrow.schema(
    {
        "generated_text": pyarrow.string(),
        "generated_tokens": pyarrow.list_(pyarrow.int64()),
        "prompt_token_ids": pyarrow.list_(pyarrow.int64()),
        "finish_reason": pyarrow.string(),
        "seed": pyarrow.uint64(),
        "error": pyarrow.string(),
    }
)
# These are not plain values, or have results without a column.
_LEFT_OUT = ("cancel", "logits_processors", "logprobs", "prompt_logprobs")
OPTIONS = tuple(name for name in Options.__annotations__ if name not in _LEFT_OUT)
BATCHES_TOGETHER = 2


@dataclass(frozen=True)
class Processor:
    """What `build_processor` returns: called with a dataset, it returns the dataset of the answers, to be computed
    lazily."""

    model_source: str | None
    engine_kwargs: Mapping[str, Any]
    sampling_params: Mapping[str, Any]
    preprocess: Callable[[Row], Row] | None
    postprocess: Callable[[Row], Row] | None
    pool: ray.data.ActorPoolStrategy
    batch_size: int
    remote_args: Mapping[str, Any]

    def __call__(self, dataset: ray.data.Dataset) -> ray.data.Dataset:
        if self.preprocess is not None:
            dataset = dataset.map(self.preprocess)
        # Otherwise an actor's task would be a whole block, however many batches that is.
        dataset = dataset.repartition(target_num_rows_per_block=self.batch_size).map_batches(
            Answering,
            fn_constructor_args=(self.model_source, self.engine_kwargs, self.sampling_params),
            batch_size=self.batch_size,
            batch_format="pyarrow",
            compute=self.pool,
            **self.remote_args,
        )
        if self.postprocess is not None:
            dataset = dataset.map(self.postprocess)
        dataset.context.execution_options.preserve_order = True
        return dataset


class Answering:
    """An actor of the pool: a model, and the batches that it answers."""

    def __init__(
        self, model_source: str | None, engine_kwargs: Mapping[str, Any], sampling_params: Mapping[str, Any]
    ) -> None:
        self._model = api.load(model_source, progress=False, **engine_kwargs)
        self._engine = Engine(self._model)
        self._sampling_params = sampling_params

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        under_way = [self._begin(row) for row in batch.to_pylist()]
        answers = [asked if isinstance(asked, dict) else _finish(asked) for asked in under_way]
        kept = batch.select([name for name in batch.column_names if name not in COLUMNS.names])
        added = pyarrow.Table.from_pylist(answers, schema=COLUMNS)
        for name, column in zip(COLUMNS.names, added.columns, strict=True):
            kept = kept.append_column(name, column)
        return kept

    def _begin(self, row: Row) -> Stream | Row:
        """The stream of a row's answer, or the columns that say what is wrong with the row."""
        given = {name: value for name, value in (row.get("sampling_params") or {}).items() if value is not None}
        if ("prompt" in row) == ("messages" in row):
            raise InvalidArgument(f"rows must have a column prompt or a column messages, got {', '.join(row)}")
        try:
            check_names(given, OPTIONS)
            prompt = row["prompt"] if "prompt" in row else self._rendered(row["messages"])
            return self._engine.submit(prompt, **{**self._sampling_params, **given})
        except (ValueError, TypeError, GrammarTooComplex) as error:
            return {"error": one_line(error)}

    def _rendered(self, messages: Any) -> list[int]:
        tokenizer = self._model.tokenizer
        if tokenizer is None or not tokenizer.has_chat_template:
            raise InvalidArgument(f"{self._model.name} has no chat template: expected a column prompt, got messages")
        # Arrow gives every message the fields of all messages, as nulls.
        whole = [{name: value for name, value in message.items() if value is not None} for message in messages]
        ids: list[int] = tokenizer.apply_chat(whole)
        return ids


def _finish(stream: Stream) -> Row:
    """Waits for an answer, while those after it go on."""
    error = None
    try:
        for _ in stream:
            pass
    except ENDS_ONE_ANSWER as failure:
        error = one_line(failure)
    result = stream.results[0]
    return {
        "generated_text": result.text,
        "generated_tokens": result.token_ids,
        "prompt_token_ids": result.prompt_token_ids,
        "finish_reason": result.finish_reason,
        "seed": result.seed,
        "error": error,
    }


def build_processor(
    model_source: str | None = None,
    engine_kwargs: Mapping[str, Any] | None = None,
    *,
    sampling_params: Mapping[str, Any] | None = None,
    preprocess: Callable[[Row], Row] | None = None,
    postprocess: Callable[[Row], Row] | None = None,
    concurrency: int | tuple[int, int] = 1,
    batch_size: int = 32,
    **remote_args: Any,
) -> Processor:
    """Makes a processor that answers the prompts of a Ray Data dataset, in their order.

    A row has either `prompt` (text or ids) or `messages` (a conversation), and may have `sampling_params`, which
    override those for all rows. Its answer is added as `generated_text`, `generated_tokens`, `prompt_token_ids`,
    `finish_reason` and `seed`; where the row cannot be run, or its logits overflow, `error` says why, which is null
    otherwise.

    Tokens equal those of `runtime.generate` with the same options on the row alone, however rows are spread over
    actors, and even if an actor or a node is lost on the way. A row that draws (a temperature above 0) needs a seed for
    that.

    Args:
        model_source: as `runtime.load`'s source. A path has to exist on every node.
        engine_kwargs: `runtime.load`'s other arguments, above all `max_batch` and `max_seq_len`. On a CPU an engine has
            as many threads as its actor has `num_cpus`, 1 by default.
        sampling_params: options of `runtime.generate` for all rows.
        preprocess: applied to each row first.
        postprocess: applied to each row with its answer.
        concurrency: how many actors, or the least and the most of a pool that grows and shrinks.
        batch_size: rows that an actor gets at a time. It holds at most twice as many, which are lost with it and rerun.
        remote_args: what each actor needs, under Ray's names: `num_cpus`, `num_gpus`, `resources` and so on.

    Returns:
        A function from a dataset to the dataset of its answers.

    Raises:
        ValueError, TypeError: an argument is out of range, or there is no such option.
    """
    sampling_params = dict(sampling_params or {})
    check_names(sampling_params, OPTIONS)
    read_raw_request([0], **sampling_params)
    least, most = concurrency if isinstance(concurrency, tuple) else (concurrency, concurrency)
    whole_number("concurrency", least, least=1)
    whole_number("concurrency", most, least=least)
    pool = ray.data.ActorPoolStrategy(
        min_size=least,
        max_size=most,
        max_tasks_in_flight_per_actor=BATCHES_TOGETHER,
        max_concurrent_calls_per_actor=BATCHES_TOGETHER,
        enable_true_multi_threading=True,
    )
    return Processor(
        model_source,
        read_engine_kwargs(engine_kwargs),
        sampling_params,
        preprocess,
        postprocess,
        pool,
        whole_number("batch_size", batch_size, least=1),
        remote_args,
    )
