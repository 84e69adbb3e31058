"""Fixtures of the lab kit's tests."""

import importlib
import os
import socket
import sys

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


@pytest.fixture(scope="session")
def torchvision():
    """torchvision, also where its compiled operators do not load.

    Beside a torch of another build (CPU wheels from one index, torchvision from another) the import stops at operators
    without a schema. The data sets and models are pure Python; declaring the two schemas lets them be imported.
    """
    try:
        yield importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")  # the schemas live as long as this object
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield importlib.import_module("torchvision")
