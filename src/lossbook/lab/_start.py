"""The first call of every lab: device, profile, seeds and figure defaults, said in one line."""

import os
import random
import sys
import time
import warnings
from dataclasses import dataclass

import numpy as np
import torch

from lossbook import __version__

PROFILES = ("quick", "full")


@dataclass(frozen=True)
class Run:
    """What :func:`start` chose.

    Args:
        profile: ``"quick"`` or ``"full"``; the lab looks its sizes up under this name.
        device: where the lab puts tensors and models.
        seed: the seed given to ``random``, numpy and torch.
    """

    profile: str
    device: torch.device
    seed: int

    @property
    def device_name(self) -> str:
        """The GPU's own name, or the device type (``"cpu"``)."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def clock(self) -> float:
        """Seconds, for differences: on a CPU those that this process has computed, so that other programs do not count; else those on the wall,
        once the device has done what it was given."""
        if self.device.type == "cpu":
            return time.process_time()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


_current: Run | None = None


def current_run() -> Run:
    """Return the :class:`Run` of the last :func:`start`; raise ``RuntimeError`` when there was none."""
    if _current is None:
        raise RuntimeError("no run has started: call lab.start() first")
    return _current


def seed_all(seed: int) -> None:
    """Seed ``random``, numpy's global generator and torch on every device.

    Args:
        seed: integer in [0, 2**32).

    Raises:
        TypeError: ``seed`` is not an integer.
        ValueError: ``seed`` is out of range.

    Example:
        >>> seed_all(0)
        >>> first = torch.rand(3)
        >>> seed_all(0)
        >>> torch.equal(first, torch.rand(3))
        True
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), got {seed}")
    random.seed(int(seed))
    np.random.seed(int(seed))
    torch.manual_seed(int(seed))


def start(*, seed: int = 0) -> Run:
    """Choose device and profile, seed the generators, set the figure defaults, and print one line that says so.

    The environment decides first: ``LOSSBOOK_DEVICE`` (any torch device name; default: CUDA where available, else CPU)
    and ``LOSSBOOK_PROFILE`` (``quick`` or ``full``; default: full on a CUDA GPU, else quick). The quick profile uses at
    most two CPU threads. Plotly figures take the ``lossbook`` template and are stored as the Plotly mimetype only.

    Args:
        seed: integer in [0, 2**32).

    Returns:
        The frozen :class:`Run`; :func:`claim` records it with each claim.

    Raises:
        ValueError: an environment variable holds something else, or names a device that this machine lacks.

    Example:
        >>> run = start(seed=1)  # doctest: +ELLIPSIS
        lossbook ... seed 1...
        >>> run.seed
        1
    """
    global _current
    device = _choose_device()
    profile = os.environ.get("LOSSBOOK_PROFILE") or ("full" if device.type == "cuda" else "quick")
    if profile not in PROFILES:
        raise ValueError(f"LOSSBOOK_PROFILE must be 'quick' or 'full', got {profile!r}")
    seed_all(seed)
    if profile == "quick":
        torch.set_num_threads(min(2, torch.get_num_threads()))
    _set_figure_defaults()
    # A busy machine may start a worker of joblib's twice; the jobs are done all the same, and the message names a path.
    warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
    _current = Run(profile, device, int(seed))
    print(
        f"lossbook {__version__} · profile {profile} · device {_current.device_name} · seed {seed}"
        f" · torch {torch.__version__}"
    )
    return _current


def _choose_device() -> torch.device:
    name = os.environ.get("LOSSBOOK_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # a build without CUDA raises AssertionError
        raise ValueError(f"LOSSBOOK_DEVICE must name a torch device of this machine, got {name!r}") from error
    return device


def _set_figure_defaults() -> None:
    import plotly.io as pio

    from lossbook.lab._plots import template

    pio.templates["lossbook"] = template()
    pio.templates.default = "lossbook"
    pio.renderers.default = "colab" if "google.colab" in sys.modules else "plotly_mimetype"
