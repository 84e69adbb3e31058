"""The lab's `full` profile on a few generated images of CIFAR's shape, and what the lab's own functions promise."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from full_profile import run_full

from lossbook import lab
from lossbook.optimization import self_tuning as S


def few_images(*, train):
    """Images of CIFAR-10's shape, a color for each class."""
    labels = torch.arange(10).repeat(9 if train else 3)
    colors = torch.rand(10, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(int(train)))
    return lab.Images((colors[labels] + 0.1 * noise).clamp(0, 1), labels, tuple("abcdefghij"))


class Small(torch.nn.Module):
    """The lab's network, narrower."""

    def __init__(self, n, network):
        super().__init__()
        self.inner = network(n)
        widths = ((3, 4), (4, 8), (8, 8))
        self.inner.convs = torch.nn.ModuleList(S.BestResponseConv2d(a, b, 3, n, padding=1) for a, b in widths)
        self.inner.linear, self.inner.last = S.BestResponseLinear(128, 16, n), S.BestResponseLinear(16, 10, n)

    def forward(self, *arguments):
        return self.inner(*arguments)


@pytest.fixture(scope="module")
def names():
    patch, found = pytest.MonkeyPatch(), {}
    patch.setattr(lab, "load_cifar10", few_images)
    sizes = dict(net=lambda n: Small(n, found["CNN"]), train=60, valid=30, batch=20, steps=12, warmup=3, watch=4)
    sizes |= dict(ridge_steps=120, draws=1, seeds=(0, 1), lr=0.05)

    def remember(source, so_far):
        found.update({"CNN": so_far["CNN"]} if "CNN" in so_far else {})
        return source

    try:
        yield run_full("optimization/self_tuning", patch, until="dropout", sizes=sizes, change=remember)
    finally:
        patch.undo()


def test_full_profile_trains(names):
    assert names["NAMES"] == ["conv 1", "conv 2", "conv 3", "linear", "noise", "cutout length", "cutout holes"]
    assert set(names["tuned"]) == {(0.05, "valid", 0), (0.05, "valid", 1), (0.5, "valid", 0), (0.5, "valid", 1), (0.05, "train", 0), (0.05, "train", 1)}  # fmt: skip
    for (start, *_), result in names["tuned"].items():
        assert len(result["curve"]) == 4 and np.isfinite([*result["curve"], result["test_loss"]]).all()
        assert result["final"] == result["curve"][-1] and result["best"] == min(result["curve"])
        assert set(result["schedule"]) == set(names["NAMES"]) and result["scale"].shape == (12, 7)
        for name, path in result["schedule"].items():
            assert path.shape == (12,) and (path[:4] == path[0]).all()  # the warm-up, and the step after it
            if name in names["DROPOUTS"]:
                assert path[0].item() == pytest.approx(start) and path[4] != path[0]
        assert (result["schedule"]["cutout length"] == math.floor(start / 0.9 * 24)).all()
    assert len(names["plain"]) == 2 * (4 + 1 + 3)
    assert all(len(r["curve"]) == 4 and 0 <= r["accuracy"] <= 1 for r in names["plain"].values())
    assert names["dropout"]((0.05, "valid")).shape == (2, 12)
    assert names["values"](names["plain"], ("grid", 0.2), "final").shape == (2,)


def test_stacked_networks_are_single_ones(names, monkeypatch):
    """Without noise every network of the stack is trained as by torch's SGD."""
    zeros = {name: torch.zeros(1) for name in names["NAMES"]}
    monkeypatch.setitem(names, "schedule_of", lambda *job: zeros)
    results = names["ordinary"](1)
    train, valid, test, net, optimizer = names["prepare"](1)
    data, curve = names["batches"](*train, 1), []
    for update in range(24):
        x, y = next(data)
        optimizer.zero_grad()
        F.cross_entropy(net(x, None, dict.fromkeys(zeros, torch.tensor(0.0))), y).backward()
        optimizer.step()
        if update in (5, 11, 17, 23):
            curve.append(names["evaluate"](net, *valid)[0])
    assert list(results) == names["SETTINGS"] == names["SEARCH"] + names["REPLAYS"]
    for result in results.values():
        assert result["curve"] == pytest.approx(curve, rel=1e-3) and result["final"] == result["curve"][-1]
        assert result["test_loss"] == pytest.approx(names["evaluate"](net, *test)[0], rel=1e-3)
        assert result["accuracy"] == pytest.approx(names["evaluate"](net, *test)[1], abs=0.05)


def test_schedules(names):
    recorded = names["tuned"][0.05, "valid", 1]["schedule"]
    assert names["schedule_of"]("replay", 0.05, 1) is recorded
    last = names["schedule_of"]("last value", 0.05, 1)
    assert all(torch.equal(last[name], recorded[name][-1:]) for name in names["NAMES"])
    grid = names["schedule_of"]("grid", 0.4, 0)
    assert grid["linear"].item() == pytest.approx(0.4) and grid["noise"].item() == pytest.approx(0.3 * 0.4 / 0.9)
    drawn = names["schedule_of"]("random", 0, 1)
    assert all(
        0 <= drawn[name].item() <= names["RANGES"][name].kwds.get("scale", names["RANGES"][name].args[1])
        for name in names["NAMES"]
    )
    assert drawn != names["schedule_of"]("random", 0, 0)
    late = names["schedule_of"]("late", 0.05, 1)
    for name in names["NAMES"]:
        at = [S.replayed_rates(late, update, 1)[name] for update in range(30)]  # 12 steps of two updates, and beyond
        assert all(rate == recorded[name][0 if update < 12 else -1] for update, rate in enumerate(at))


def test_data(names):
    train, valid, test = names["load"](0)
    assert [len(x) for x, _ in (train, valid, test)] == [60, 30, 30]
    every = torch.cat([train[0], valid[0]]).flatten(1)
    assert len(every.unique(dim=0)) == 90  # nothing in both parts
    assert not torch.equal(names["load"](1)[0][0], train[0])
    data = names["batches"](*train, 0)
    first = [next(data) for _ in range(3)]
    assert sorted(torch.cat([x for x, _ in first]).sum((1, 2, 3)).tolist()) == sorted(train[0].sum((1, 2, 3)).tolist())
    few = names["batches"](train[0][:5], train[1][:5], 0)
    assert len(next(few)[0]) == 5  # fewer images than a batch


def test_networks(names):
    h, rates = torch.randn(6, 7), {name: torch.full((6,), 0.5) for name in names["NAMES"]}
    net = names["CNN"](7)
    images = torch.rand(6, 3, 32, 32)
    assert net(images, h, rates).shape == (6, 10)
    assert not torch.equal(net(images, h, rates), net(images, h, rates))
    net.eval()
    assert torch.equal(net(images, h), net(images, h, rates))  # no noise in evaluation mode, but gates
    assert not torch.equal(net(images, h), net(images))
    mlp = names["MLP"](3)
    digits, h = torch.rand(5, 1, 8, 8), torch.randn(5, 3)
    nothing = dict.fromkeys(mlp.names, torch.tensor(0.0))
    mlp.train()
    x = digits.flatten(1)
    for k, layer in enumerate(mlp.layers):
        x = layer(F.relu(x) if k else x, h)
    torch.testing.assert_close(mlp(digits, h, nothing), x)
    torch.testing.assert_close(mlp.eval()(digits, h), x)
    assert (
        not mlp.train()(digits, h, nothing | {"input": torch.tensor(1.0), "hidden 2": torch.tensor(1.0)}).isnan().any()
    )


def test_wrong_labels(names):
    names["size"]["wrong"] = 0.5
    try:
        noisy, clean = names["load"](0)[0][1], few_images(train=True)
        order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
        changed = (noisy != clean.labels[order][:60]).float().mean().item()
        assert 0.25 < changed < 0.65  # half are drawn anew, and a tenth of these are right by chance
        assert torch.equal(names["load"](0)[2][1], few_images(train=False).labels)
    finally:
        names["size"]["wrong"] = 0.0


def test_ridge(names):
    path, w0, theta, end = names["tune_ridge"](3.0, 0.5, 0, steps=150)
    assert path.shape == (150,) and (path[:101] == 3).all() and end < path[101] < 3
    assert w0.shape == theta.shape == (55,)
    again = names["tune_ridge"](3.0, 0.5, 0, steps=150)
    assert torch.equal(path, again[0]) and not torch.equal(path, names["tune_ridge"](3.0, 0.5, 1, steps=150)[0])
    assert names["rest"](0.5) == pytest.approx(-0.6056, abs=1e-3)
    assert names["best"].x == pytest.approx(-0.5551, abs=1e-3) and names["best"].fun == pytest.approx(
        0.608742, abs=1e-5
    )
