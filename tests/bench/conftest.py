"""A ceiling without its seconds."""

import pytest

from runtime.cost.bandwidth import ReadBandwidth


@pytest.fixture
def read_gb_s(monkeypatch):
    """A function that makes every reading of the ceiling what another function gives."""

    def give(reading):
        monkeypatch.setattr(ReadBandwidth, "__init__", lambda self, device: None)
        monkeypatch.setattr(ReadBandwidth, "gb_s", lambda self: reading())

    return give


@pytest.fixture
def steady_ceiling(read_gb_s):
    """A machine that reads 20 GB/s whenever it is asked."""
    read_gb_s(lambda: 20.0)
