"""The lab's `full` profile, on a few generated images, and what the lab's own functions promise."""

import math
from types import SimpleNamespace

import pytest
import torch
from full_profile import run_full

from lossbook import lab
from lossbook.optimization import large_steps as G


def few_images(*, train=True):
    """Forty images of CIFAR-10's shape, a color for each class."""
    labels = torch.arange(10).repeat(4)
    colors = torch.rand(10, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return lab.Images((colors[labels] + 0.1 * torch.rand(40, 3, 32, 32)).clamp(0, 1), labels, tuple("abcdefghij"))


def few_clothes(root, *, train, download):
    """What torchvision's FashionMNIST has: gray images as bytes, and targets."""
    targets = torch.arange(10).repeat(4)
    return SimpleNamespace(
        data=(20 * targets[:, None, None] + torch.randint(0, 9, (40, 28, 28))).byte(), targets=targets
    )


def fewer_pairs(source, names):
    return source.replace("combinations([c for c in range(10) if c != 4], 2)", "[(0, 1), (5, 7)]")


@pytest.fixture(scope="module")
def names(torchvision):
    patch = pytest.MonkeyPatch()
    patch.setattr(lab, "load_cifar10", few_images)
    patch.setattr(torchvision.datasets, "FashionMNIST", few_clothes)
    try:
        sizes = dict(worst=(10, 30), cap=500, samples=6, seeds=range(2))
        yield run_full("optimization/large_steps", patch, until="controls", sizes=sizes, change=fewer_pairs)
    finally:
        patch.undo()


def test_full_profile_runs_the_images(names):
    assert set(names["image_counts"]) == {
        (name, kind) for name in ("digits", "fashion", "cifar") for kind in ("equal", "few")
    }
    for counts in names["image_counts"].values():
        assert set(counts) == set(names["TABLE"]) and all(count >= 1 for count in counts.values())
    assert names["image_counts"]["digits", "equal"][0.1, True] == math.inf  # beyond the cap of this test
    for name, width in (("fashion", 784), ("cifar", 3072)):
        features, labels = names["image_pair"](name)
        assert features.shape == (6, width + 1) and labels.tolist() == [1, 1, 1, -1, -1, -1]
        assert features.dtype == torch.float64 and features.norm(dim=1).max().item() == pytest.approx(1)
    assert names["PAIRS"] == [(0, 1), (5, 7)] and set(names["worst"]) == {10, 30}
    assert len(names["BOUNDED"]) > 50 and all(count <= bound for count, bound in names["BOUNDED"])


def test_few_keeps_all_of_one_class(names):
    data = names["digit_pair"](0, 1)
    sizes = [(data[1] == y).sum().item() for y in (1, -1)]
    for of, own in ((1, sizes[0]), (-1, sizes[1])):
        features, labels = names["imbalanced"](data, of, 0)
        assert (labels == of).sum() == own and (labels == -of).sum() == max(2, round(0.02 * own))
        rows = {tuple(row) for row in data[0][data[1] == -of].tolist()}
        drawn = features[labels == -of]
        assert all(tuple(row) in rows for row in drawn.tolist())
        assert not torch.equal(drawn, names["imbalanced"](data, of, 1)[0][labels == -of])


def test_counts_are_the_module_s(names):
    data = names["digit_pair"](5, 7)
    margin, _ = G.max_margin(*data)
    before = len(names["BOUNDED"])
    assert names["updates"](data, margin) == G.batch_perceptron(*data, max_iter=500).iterations
    assert (
        names["updates"](data, margin, 10, True)
        == G.lr_gd(*data, step_size=10, max_iter=500, normalized=True).iterations
    )
    assert names["updates"](data, None, 1e-6) == math.inf
    assert [bound for _, bound in names["BOUNDED"][before:]] == [
        G.iteration_bound(*data, margin=margin, method="batch_perceptron"),
        G.iteration_bound(*data, margin=margin, method="normalized_lr_gd", step_size=10),
    ]
    limit = G.batch_perceptron(*data, max_iter=500)
    assert names["distance"](limit, 1.0, limit) == 0
    assert names["distance"](limit, 2.0, limit) == pytest.approx(0.5)
