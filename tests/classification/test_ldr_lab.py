"""The lab's `full` profile, on a few generated images of CIFAR-100's shape, and what the lab's own pieces promise."""

import numpy as np
import pytest
import torch
from full_profile import run_full

from lossbook import lab

CHOSEN = ("CE", "MAE", "LDR 10 softplus", "ALDR 1 mean abs", "ALDR 1 shuffled")


def few_images(*, train):
    """Four or two images a class, each class a color of its own."""
    labels = torch.arange(100).repeat(4 if train else 2)
    colors = torch.rand(100, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    images = (colors[labels] + 0.05 * torch.rand(len(labels), 3, 8, 8)).clamp(0, 1)
    return lab.Images(images, labels, tuple(str(i) for i in range(100)))


def few_losses(source, names):
    return source.replace("for method in METHODS if", f"for method in {CHOSEN!r} if")


@pytest.fixture(scope="module")
def names():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(lab, "load_cifar100", few_images)
        sizes = dict(train=320, validation=80, epochs=2, milestones=(1,), lrs=(0.01, 0.05), seeds=range(2))
        small = lambda: lab.ResNet(3, 100, width=8, blocks=(1, 1))
        sizes |= dict(networks=lambda n: yield_names["Several"]([small() for _ in range(n)]))
        yield_names = {}

        def change(source, names):
            yield_names.update(names)
            return few_losses(source, names)

        yield run_full("classification/ldr", monkeypatch, until="measured", sizes=sizes, change=change)


def test_full_profile_measures_every_loss(names):
    measured = names["measured"]
    jobs = {(method, noise) for method in CHOSEN for noise in names["NOISES"]}
    assert set(measured) == {(method, noise) for method, noise in jobs if method not in names["SKIPPED"][noise]}
    assert not names["SKIPPED"]["next class 0.3"] and "CE" not in names["SKIPPED"]["clean"]
    for (method, noise), result in measured.items():
        for key in ("accuracy", "top2", "top5", "second", "validation"):
            assert result[key].shape == (2,) and ((result[key] >= 0) & (result[key] <= 1)).all()
        assert (result["top2"] >= result["accuracy"]).all() and (result["top5"] >= result["top2"]).all()
        assert set(result["lr"]) <= {0.01, 0.05}
        assert ("temperature" in result) == method.startswith("ALDR")
        assert ("gap" in result) == (method.startswith("ALDR") and noise != "clean")
        assert ("detection" in result) == (method == "CE" and noise != "clean")
    stored = measured["ALDR 1 mean abs", "clean"]
    assert (stored["temperature"] < 1).all() and (stored["temperature"] >= 0.5).all()
    assert stored["history"].shape == (len(names["snapshots"]()), 320) and stored["wrong"].shape == (320,)
    for each in measured["CE", "uniform 0.6"]["detection"].values():
        assert each.shape == (2,) and ((each >= 0) & (each <= 1)).all()


def test_splits_and_noise(names):
    _, labels, classes, border = names["load"]()
    assert classes == 100 and border == 400 and len(labels) == 600
    for noise, low, high in (("clean", 0, 0), ("uniform 0.6", 0.5, 0.68), ("next class 0.3", 0.23, 0.37)):
        fit, check, test, noisy = names["draw"](labels, classes, border, noise, seed=3)
        assert (len(fit), len(check)) == (320, 80) and torch.equal(test, torch.arange(400, 600))
        assert torch.equal(torch.cat([fit, check]).sort().values, torch.arange(400))
        wrong = noisy != labels
        assert low <= wrong.float().mean() <= high
        if noise == "next class 0.3":
            assert torch.equal(noisy[wrong], (labels[wrong] + 1) % 100)
    # Without a border each seed draws its own test set from the rest.
    fit, check, test, _ = names["draw"](labels, classes, None, "clean", seed=3)
    assert torch.equal(torch.cat([fit, check, test]).sort().values, torch.arange(600))


def test_each_network_has_its_own_rate_and_the_same_start(names):
    wide, rates = names["Wide"](6, (12, 7, 4)), torch.tensor([0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    several = names["Several"]([torch.nn.Linear(3, 2) for _ in range(6)])
    for network in (wide, several):
        network.copy_first(2)
    for p, rate in wide.rated(rates):
        assert rate.flatten().tolist() == rates.tolist() and (rate * p).shape == p.shape
        assert torch.equal(p[0], p[2]) and torch.equal(p[1], p[5])
    assert not torch.equal(wide.weights[0][0], wide.weights[0][1])
    pairs = several.rated(rates)
    assert [rate.item() for _, rate in pairs[::2]] == pytest.approx(rates.tolist())
    assert torch.equal(pairs[0][0], pairs[4][0]) and not torch.equal(pairs[0][0], pairs[2][0])


def test_wide_network_is_many_networks(names):
    torch.manual_seed(0)
    wide = names["Wide"](3, (12, 7, 4))
    images = torch.rand(3, 5, 1, 3, 4)
    scores = wide(images)
    for m in range(3):
        hidden = images[m].flatten(1) @ wide.weights[0][m] + wide.biases[0][m]
        torch.testing.assert_close(scores[m], hidden.tanh() @ wide.weights[1][m] + wide.biases[1][m])
    assert not torch.equal(wide.weights[0][0], wide.weights[0][1])
    models = [torch.nn.Flatten(), torch.nn.Flatten()]
    assert torch.equal(names["Several"](models)(images[:2]), images[:2].flatten(2))


def test_shuffled_control_gives_each_row_the_temperature_of_another(names):
    models, batch = len(names["lrs"]) * len(names["seeds"]), 5
    f = torch.randn(models * batch, 6)
    y, index = torch.arange(models * batch) % 6, torch.arange(models * batch)
    shuffled, plain = (names["losses"](models * batch)[name]() for name in ("ALDR 1 shuffled", "ALDR 1 mean abs"))
    value = shuffled(f, y, index)
    plain(f, y, index)
    torch.testing.assert_close(shuffled.temperature, plain.temperature)
    other = plain.temperature.view(models, batch)[:, [4, 0, 1, 2, 3]].flatten()
    expected = names["L"].aldr_kl_loss(f, y, margin=0.1, normalization="mean_abs", temperature=other, reduction="none")
    torch.testing.assert_close(value, expected)


def test_detection_ranks_wrong_labels(names):
    """A model that is right and sure: the loss finds all wrong labels, the temperature sees no label."""
    truth = torch.arange(40) % 4
    scores = 5 * torch.nn.functional.one_hot(truth, 4).float()[None]
    wrong = (torch.arange(40) % 3 == 0)[None]
    given = torch.where(wrong, (truth + 1) % 4, truth)
    found = names["detection"](scores, given, wrong)
    assert found["loss"].tolist() == [1.0]
    for name, value in found.items():
        if name != "loss":
            np.testing.assert_allclose(value, 0.5)
