"""The lab's `full` profile, on a few generated images of CIFAR's shape, and what the lab's own functions promise."""

import numpy as np
import pytest
import torch
from full_profile import run_full

from lossbook import lab
from lossbook.optimization import coreset as A

SMALL = dict(
    components=4, sizes=(20, 30, 40), repetitions={"logistic": (3, 2, 2), "least squares": (2, 2, 2)}, other_repetitions=2,
    queries=5, rounds=5, round_seeds=2, long_rounds=6, long_seeds=range(2), large=60, large_draws=3, clusters=3, starts=2, jobs=1,
)  # fmt: skip


def images(*, train):
    """A class of ten is brighter in one corner."""
    assert train
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat(30)
    pixels = torch.rand(300, 3, 32, 32, generator=generator)
    pixels[labels == 8, :, :8, :8] += 0.1
    return lab.Images(pixels.clamp(0, 1), labels, tuple("abcdefghij"))


@pytest.fixture(scope="module")
def names():
    patch = pytest.MonkeyPatch()
    patch.setattr(lab, "load_cifar10", images)
    try:
        yield run_full("optimization/coreset", patch, until="single", sizes=SMALL)
    finally:
        patch.undo()


def test_full_profile(names):
    assert (names["n"], names["d"]) == (300, 4) and int((names["y"] == 1).sum()) == 30
    torch.testing.assert_close(names["X"].std(0), torch.ones(4, dtype=torch.float64))
    assert set(names["table"]) == {(name, tau) for name in ("logistic", "least squares") for tau in (20, 30, 40)} | {
        (name, tau) for name in ("SVM", "k-means") for tau in (30, 40)
    }
    assert len(names["table"]["logistic", 20]) == 3
    for (name, tau), rows in names["table"].items():
        for row in rows:
            for method in names["METHODS"][name]:
                cost, _error, fits = row[method]
                best, _error, tries = row["uniform", method]
                assert fits >= 9 and tries == fits and best <= row["uniform"][0]
                assert cost > -1e-9 or name == "k-means", tau
    for trace in names["traces"].values():
        assert trace.shape == (2, 5, 2) and np.isfinite(trace).all()
    assert len(names["exact"]) == 8 and [[len(costs) for costs in row] for row in names["long_runs"]] == [[6, 6, 9]] * 2


def test_the_fits_are_minimizers(names):
    task = names["tasks"]["logistic"]
    for key in ("logistic", "least squares"):
        task = names["tasks"][key]
        sample = A.uniform_coreset(300, 60, generator=torch.Generator().manual_seed(0))
        sample = A.Coreset(sample.indices, sample.weights.double() * 1.3)
        model = task.fit(sample.indices, sample.weights)
        least = sample.cost(task.losses(model)).item()
        theta = np.append(model.coef_, model.intercept_)
        for j in range(5):
            for step in (-1e-3, 1e-3):
                other = theta.copy()
                other[j] += step
                assert sample.cost(task.losses(names["linear_model"](other))).item() > least


def test_limits_are_those_of_the_chapter(names):
    """Least squares: by losses it is the number of coefficients; k-means: the number of clusters that have points."""
    assert names["limit"]["least squares"][1][1] == pytest.approx(5)
    assert names["limit"]["k-means"][1][1] == pytest.approx(3)


def test_ratio_is_paired(names):
    table, key = names["table"], ("logistic", 20)
    saved, table[key] = table[key], [{"a": (2.0 * x,), "b": (x,)} for x in (1.0, 5.0, 0.1)]
    try:
        assert names["ratio"]("logistic", 20, "a", "b") == pytest.approx((2, 2, 2))
    finally:
        table[key] = saved
