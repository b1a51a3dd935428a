"""A model's engine: it takes requests as they come, and runs as many of them together as the model has rows."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from runtime.engine.options import StreamOptions
from runtime.engine.prompt import Batch, Encoded, Prompt
from runtime.engine.request import read_raw_request, read_request, whole_number
from runtime.engine.scheduler import check_open, scheduler_of
from runtime.engine.stream import Stream
from runtime.errors import InvalidArgumentType
from runtime.model.model import Model

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Engine:
    """The requests of a model. A model has one engine, which `generate` and the rest use too; every object of this
    class is a handle on it.

    Requests get a row of the batch in order of arrival, as soon as one is free, and give it back when they end. They do
    not affect each other: each gets exactly the tokens that it would get alone.

    Args:
        model: a loaded model.
        max_queue: how many prompts may wait for a row before `submit` refuses more; None for any number.
    """

    def __init__(self, model: Model, *, max_queue: int | None = None) -> None:
        if not isinstance(model, Model):
            raise InvalidArgumentType(f"expected a model, got {type(model).__name__}")
        self.model = model
        self.max_queue = None if max_queue is None else whole_number("max_queue", max_queue, least=0)
        check_open(model)

    def submit(self, prompt: Prompt | Batch | Encoded, **options: Unpack[StreamOptions]) -> Stream:
        """Takes a request, which runs whenever somebody reads any stream of the model.

        Args:
            prompt, options: as in `runtime.generate`.

        Raises:
            ValueError, TypeError: prompt or options cannot be run; nothing has been changed.
            QueueFull: max_queue prompts wait for a row already.
            ModelClosed: the model has been closed.
        """
        check_open(self.model)
        stream = Stream(self.model, read_request(self.model, read_raw_request(prompt, **options)))
        stream.submit(self.max_queue)
        return stream

    def close(self) -> None:
        """End every request of the model, and free its KV cache and its graphs; the weights stay. The next request
        allocates and captures them again."""
        scheduler_of(self.model).clear()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
