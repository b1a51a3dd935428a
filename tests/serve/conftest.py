"""A server in this process: the tiny model, its application, and a client that speaks to it without a socket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from starlette.testclient import TestClient

from ..runtime.conftest import tiny_folder as tiny_folder

NAME = "tiny"


@pytest.fixture(scope="session")
def model(tiny_folder: Path) -> Any:
    """The tiny model: float32 on the CPU, 128 tokens, 4 rows."""
    from runtime.api import load

    return load(tiny_folder, device="cpu", max_seq_len=128, max_batch=4, progress=False)


@contextmanager
def serving(model: Any, **settings: Any) -> Iterator[TestClient]:
    """A client of an application on a model, while that runs."""
    from runtime.serve.app import application
    from runtime.serve.service import Settings

    with TestClient(application(model, Settings((NAME, "other"), **settings)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="session")
def client(model: Any) -> Iterator[TestClient]:
    with serving(model) as client:
        yield client


@pytest.fixture
def serve(model: Any) -> Callable[..., Any]:
    """A function that makes a client of a server with other settings."""
    return lambda **settings: serving(model, **settings)
