"""`gemma-runtime serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from runtime.cli import arguments
from runtime.cli.exit_codes import DONE
from runtime.errors import MissingPackage
from runtime.model.config import MAX_BATCH

API_KEY = "GEMMA_RUNTIME_API_KEY"


def add(commands: arguments.Commands) -> None:
    command = arguments.add_command(
        commands,
        run,
        "Serve a model to OpenAI's clients.",
        "Serve a model over HTTP in the shapes of OpenAI's API. Needs the extra 'serve'.",
    )
    arguments.add_model(command, positional=True)
    arguments.add_quantize(command)
    arguments.add_max_seq_len(command)
    arguments.add_eager(command)
    add = command.add_argument
    add("--host", default="127.0.0.1", metavar="HOST", help="address to listen at (%(default)s: this machine alone)")
    add("--port", type=arguments.whole(0, 65535), default=8000, metavar="PORT", help="port (%(default)s; 0: any)")
    add("--api-key", metavar="KEY", help=f"what clients must show (default: ${API_KEY}, or nothing)")
    add(
        "--max-batch",
        type=_rows,
        default="auto",
        metavar="N",
        help="answers that decode together (auto: as many as fit in half of the memory that is free)",
    )
    add(
        "--max-queue",
        type=arguments.whole(0),
        default=64,
        metavar="N",
        help="answers that may wait for a row; beyond that requests get 429 (%(default)s)",
    )
    add(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="what clients call the model; may be repeated (default: its name, of a path the last part)",
    )
    add("--cors-origin", action="append", default=[], metavar="ORIGIN", help="a web page's origin that may use it")
    add(
        "--timeout",
        type=arguments.whole(1),
        default=600,
        metavar="SECONDS",
        help="after which a request is given up (%(default)s)",
    )
    add(
        "--drain",
        type=arguments.whole(0),
        default=30,
        metavar="SECONDS",
        help="for requests under way once SIGTERM or Ctrl-C has come (%(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    try:
        from runtime.serve.server import bind, serve
        from runtime.serve.service import Settings
    except ModuleNotFoundError as error:
        if str(error.name).startswith("runtime"):
            raise
        raise MissingPackage(f"serve needs {error.name}: pip install 'gemma-runtime[serve]'") from None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    address = bind(options.host, options.port)  # a bad address fails before a model is loaded
    model = arguments.load(options)
    settings = Settings(
        names=tuple(options.served_model_name or (_short(model.name),)),
        api_key=options.api_key or os.environ.get(API_KEY) or None,
        max_queue=options.max_queue,
        timeout_s=options.timeout,
        cors_origins=tuple(options.cors_origin),
        read_gb_s=_read_bandwidth(model.device),
    )
    serve(model, settings, address, options.drain)
    return DONE


def _rows(text: str) -> int | str:
    return text if text == "auto" else arguments.whole(1, MAX_BATCH)(text)


def _short(name: str) -> str:
    """A model's name without the folders of this machine."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def _read_bandwidth(device: object) -> float:
    from runtime.cost.bandwidth import ReadBandwidth

    return ReadBandwidth(device).gb_s()  # type: ignore[arg-type]
