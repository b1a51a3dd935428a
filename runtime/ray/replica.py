"""The server as a deployment of Ray Serve: the same application in every replica, each with an engine of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve

from runtime import api
from runtime.engine.request import whole_number
from runtime.errors import InvalidArgumentType
from runtime.model.config import MAX_BATCH
from runtime.ray.engine_kwargs import read_engine_kwargs
from runtime.serve.app import application
from runtime.serve.service import Settings

ROWS = 8
TIMEOUT_S = 600.0
AHEAD = 2  # requests in a replica for each of its rows, so that a free row never waits for one
RETRY_AFTER_S = 1
SETTINGS = tuple(field.name for field in dataclasses.fields(Settings) if field.name != "names")


def deployment(
    model_source: str | None = None,
    engine_kwargs: Mapping[str, Any] | None = None,
    *,
    model_id: str | Sequence[str],
    replicas: int | tuple[int, int] = 1,
    **settings: Any,
) -> serve.Deployment:
    """Makes a Ray Serve deployment of the server behind `gemma-runtime serve`: `serve.run(deployment(...).bind())`.

    A request goes to the less loaded of two replicas. Those that find no room wait in the proxy; where `max_queue` of
    them wait already, it answers 429. Everything else that Ray Serve can do is set by `.options(...)` on the result:
    `ray_actor_options` with `num_cpus` or `num_gpus`, `autoscaling_config`, `request_router_config` and so on.

    Args:
        model_source: as `runtime.load`'s source. A path has to exist on every node.
        engine_kwargs: `runtime.load`'s other arguments. `max_batch` is a number, 8 by default. On a CPU an engine has
            as many threads as its replica has `num_cpus`, 1 by default.
        model_id: what clients call the model, or several such names.
        replicas: how many; or the least and the most, between which Ray adds one when the requests that run or wait
            outnumber the rows of the present ones.
        settings: the other fields of `runtime.serve.service.Settings`. `timeout_s`, 600 by default, is also how long a
            replica that is to stop has for the answers under way.

    Raises:
        ValueError, TypeError: an argument is out of range, or there is no such setting.
    """
    for name in settings:
        if name not in SETTINGS:
            raise InvalidArgumentType(f"there is no setting {name}, expected {', '.join(SETTINGS)}")
    loading = {"max_batch": ROWS, **read_engine_kwargs(engine_kwargs)}
    rows = whole_number("max_batch", loading["max_batch"], least=1, most=MAX_BATCH)
    names = (model_id,) if isinstance(model_id, str) else tuple(model_id)
    read = Settings(names, **{"timeout_s": TIMEOUT_S, **settings})

    def app() -> FastAPI:  # in the replica
        return application(api.load(model_source, progress=False, **loading), read)

    options: dict[str, Any] = {}
    if isinstance(replicas, tuple):
        least, most = replicas
        whole_number("replicas", most, least=whole_number("replicas", least, least=1))
        options["autoscaling_config"] = {
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": rows,
        }
    else:
        options["num_replicas"] = whole_number("replicas", replicas, least=1)
    made = serve.deployment(
        name="gemma-runtime",
        max_ongoing_requests=AHEAD * rows,
        max_queued_requests=read.max_queue,
        backpressure_config={"status_code": 429, "retry_after_s": RETRY_AFTER_S},
        graceful_shutdown_timeout_s=read.timeout_s or TIMEOUT_S,
        **options,
    )
    return made(serve.ingress(app)())
