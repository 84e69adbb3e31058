import dataclasses
import random
import subprocess
import sys
import time
import warnings

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest
import torch

from lossbook import lab
from lossbook.lab._start import current_run

LIGHT = """
import sys
import time
import lossbook
assert "lossbook.lab" not in sys.modules and "torch" not in sys.modules, "import lossbook loads too much"
import lossbook.lab
heavy = {"IPython", "datasets", "matplotlib", "networkx", "plotly", "scipy", "skimage", "sklearn", "torchvision", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""


def test_importing_the_kit_loads_torch_and_numpy_only():
    result = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_public_name_exists_and_is_documented():
    assert len(set(lab.__all__)) == len(lab.__all__)
    for name in lab.__all__:
        value = getattr(lab, name)
        assert not callable(value) or value.__doc__, name


@pytest.fixture
def cpu_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_defaults_without_a_gpu(cpu_only, capsys):
    run = lab.start()
    assert run == lab.Run("quick", torch.device("cpu"), 0)
    assert run is current_run()
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    for part in ("profile quick", "device cpu", "seed 0", torch.__version__):
        assert part in out
    assert "/" not in out


def test_the_run_is_frozen(cpu_only):
    with pytest.raises(dataclasses.FrozenInstanceError):
        lab.start().seed = 3


def test_a_gpu_means_full(monkeypatch, capsys):
    monkeypatch.setattr("lossbook.lab._start._choose_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    assert lab.start().profile == "full"
    assert "device A GPU" in capsys.readouterr().out
    monkeypatch.setenv("LOSSBOOK_PROFILE", "quick")
    assert lab.start().profile == "quick"


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_the_environment_decides(monkeypatch, profile):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOSSBOOK_DEVICE", "cpu")
    monkeypatch.setenv("LOSSBOOK_PROFILE", profile)
    assert lab.start(seed=4) == lab.Run(profile, torch.device("cpu"), 4)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LOSSBOOK_PROFILE", "fast"),
        ("LOSSBOOK_PROFILE", "Quick"),
        ("LOSSBOOK_DEVICE", "gpu"),
        ("LOSSBOOK_DEVICE", "meta"),
        ("LOSSBOOK_DEVICE", "cuda:99"),
    ],
)
def test_bad_environment_is_named(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable}.*{value}"):
        lab.start()
    with pytest.raises(RuntimeError, match=r"lab\.start"):
        current_run()


def test_quick_uses_at_most_two_threads(monkeypatch, cpu_only):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for available in (1, 2, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda available=available: available)
        lab.start()
    assert asked == [1, 2, 2]
    monkeypatch.setenv("LOSSBOOK_PROFILE", "full")
    lab.start()
    assert len(asked) == 3


def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_a_worker_started_twice_is_no_news(cpu_only):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        lab.start()
        warnings.warn("A worker stopped while some jobs were given to the executor.", UserWarning, stacklevel=1)
        warnings.warn("another one", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in said] == ["another one"]


def test_seeds_every_generator(cpu_only):
    lab.start(seed=7)
    first = draws()
    lab.seed_all(np.int64(7))
    assert draws() == first
    lab.seed_all(8)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, ValueError), (2**32, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_bad_seed_is_named(seed, error):
    with pytest.raises(error, match="seed"):
        lab.seed_all(seed)


def test_figures_are_stored_as_the_plotly_mimetype_only(cpu_only):
    lab.start()
    assert pio.templates.default == "lossbook"
    figure = go.Figure(go.Scatter(y=[1, 2]))
    assert figure.layout.template.layout.paper_bgcolor == "rgba(0,0,0,0)"
    assert set(figure._repr_mimebundle_()) == {"application/vnd.plotly.v1+json"}


def test_colab_draws_with_its_own_renderer(monkeypatch, cpu_only):
    monkeypatch.setitem(sys.modules, "google.colab", object())
    lab.start()
    assert pio.renderers.default == "colab"


def test_the_clock_of_a_cpu_counts_what_this_process_computes(cpu_only):
    run = lab.start()
    start = run.clock()
    time.sleep(0.2)
    asleep, start = run.clock() - start, run.clock()
    sum(range(10**7))
    assert 0 <= asleep < 0.1
    assert run.clock() - start > 0.01
