"""The lab's `full` profile on a few generated images of CIFAR's shape, and what the lab's own functions promise."""

import numpy as np
import pytest
import torch
from full_profile import run_full

from lossbook import lab


def few_images(*, train):
    """Images of CIFAR-10's shape, a color for each class."""
    labels = torch.arange(10).repeat(6 if train else 3)
    colors = torch.rand(10, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(int(train)))
    return lab.Images((colors[labels] + 0.1 * noise).clamp(0, 1), labels, tuple("abcdefghij"))


@pytest.fixture(scope="module")
def names():
    patch = pytest.MonkeyPatch()
    patch.setattr(lab, "load_cifar10", few_images)
    sizes = dict(net=lambda: lab.ResNet(3, 10, width=4, blocks=(1, 1)), batch=20, steps=40, full_batch_steps=5)
    sizes |= dict(problem_steps=300, draws=(400,), seeds=(0, 1), decays=(0, 1, 10), lr=0.005)
    try:
        yield run_full("optimization/lion", patch, until="network_H", sizes=sizes)
    finally:
        patch.undo()


def test_full_profile_trains(names):
    assert set(names["networks"]) == {(*j, seed) for j in names["all_jobs"] for seed in (0, 1)}
    for (_, lam, *_), result in names["networks"].items():
        assert all(np.isfinite([result[key] for key in ("loss", "accuracy", "face", "violation", "norm")]))
        assert result["largest"][0][0] == 0 and result["largest"][-1][0] == 40
        assert set(result["histograms"]) == {0, 2, 8, 40} and (lam or result["face"] == 0)
        assert all(shares.sum() == pytest.approx(1) for shares in result["histograms"].values())
    learned, control = (names["values"](names[which], "loss").mean() for which in ("FAR", "CONTROL"))
    own = names["values"](names["LION"][1], "loss").mean()
    assert own < 1.8 < control and np.isfinite(learned)


def test_networks_enter_the_box_at_the_rate_of_the_theorem(names):
    """Batch norm's ones are far outside of the box of 10; each step brings them in by the factor."""
    steps, rows = names["largest"](names["LION"][10])
    outside = np.maximum(10 * rows - 1, 0)
    assert (outside[:, 0] > 5).all() and (outside <= outside[:, :1] * (1 - 0.05) ** steps + 1e-4).all()
    far = names["largest"](names["FAR"])[1]
    assert (far[:, 0] == pytest.approx(20 * rows[:, 0], rel=1e-5)) and (far[:, -1] < far[:, 0]).all()


def test_full_batch_run_is_lions(names):
    for f, H in names["network_H"].values():
        assert len(f) == len(H) == 5 and np.isfinite(f).all() and np.isfinite(H).all()
        assert (np.diff(H) < 0).all() and (f < H).all()


def test_references_are_the_minima(names):
    """Each reference is below its objective at random points of the domain, and Lion-K comes near it."""
    rng = np.random.default_rng(0)
    for name, reference in names["REFERENCES"].items():
        A, b = names["problem"](7)
        kernel, least = names["KERNELS"][name], reference(A, b)
        for _ in range(200):
            x = torch.tensor(rng.uniform(-1, 1, 20))
            x = x / max(kernel.dual_norm(x).item(), 1)
            assert names["objective"](A, b, x) + kernel.conjugate(x) >= least - 1e-9
        assert -1e-9 < names["solved"][name, 0]["relative"] < 0.01
    for (name, _), result in names["solved"].items():
        assert np.isnan(result["gap"]) or result["gap"] <= result["certificate"] + 1e-9, name


def test_moved_problem_is_not_degenerate(names):
    """Bounds and, where there was room, solution stay; free coordinates and multipliers keep their distance."""
    for seed in (0, 208):  # a free coordinate near the wall; a bound that is only just active
        A, b = names["problem"](seed)
        x = torch.tensor(names["bounded"](A, b).x)
        _, moved = names["moved"](A, b)
        y = torch.tensor(names["bounded"](A, moved).x)
        at_wall = x.abs() > 1 - 1e-9
        assert torch.equal(at_wall, y.abs() > 1 - 1e-9)
        before = (1 - x[~at_wall].abs()).min() < 0.01, (A @ x - b)[at_wall].abs().min() < 0.001
        assert before == (seed == 0, seed == 208)
        assert y[~at_wall].abs().max() < 0.9 + 1e-6
        gradient = A @ y - moved
        assert gradient[~at_wall].abs().max() < 1e-6 and (-gradient * y)[at_wall].min() > 0.1 - 1e-6


def test_followed_runs(names):
    f, H, bound = names["followed"]["L1", 0]
    assert f[0] == 0 and f[1] > 0  # uphill at first
    assert (np.diff(H) <= bound[:-1] + 1e-10).all()
    for times, _, H, rate in names["flows"].values():
        assert len(times) == len(H) == len(rate) == 601 and (rate <= 1e-12).all()
    assert names["cosine"](0) == 1 and names["cosine"](150) == pytest.approx(0.5)
