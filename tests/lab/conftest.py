"""Fixtures of the lab kit's tests."""

import os
import socket

import plotly.io as pio
import pytest
import torch


@pytest.fixture(autouse=True)
def untouched_environment(monkeypatch):
    """Each test starts seeded, without the kit's environment variables and without a run, and leaves no defaults."""
    torch.manual_seed(0)
    for name in [name for name in os.environ if name.startswith("LOSSBOOK_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("lossbook.lab._start._current", None)
    defaults = pio.templates.default, pio.renderers.default, torch.get_num_threads()
    yield
    pio.templates.default, pio.renderers.default = defaults[:2]
    torch.set_num_threads(defaults[2])


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the test tried to open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
