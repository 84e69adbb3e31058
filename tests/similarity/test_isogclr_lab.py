"""The lab's `full` profile, on a few generated images of CIFAR-10's shape: the code path that `quick` does not take."""

import torch
from full_profile import run_full

from lossbook import lab


def few_images(*, train):
    """Twelve or four images a class, each class a color of its own."""
    labels = torch.arange(10).repeat(12 if train else 4)
    colors = torch.rand(10, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return lab.Images(
        (colors[labels] + 0.1 * torch.rand(len(labels), 3, 32, 32)).clamp(0, 1), labels, tuple("abcdefghij")
    )


def one_start(source, names):
    """One initial temperature is enough here."""
    if "STARTS" in names:
        names["STARTS"] = (0.1,)
    return source


def test_full_profile_trains_and_moves_the_temperatures(monkeypatch):
    monkeypatch.setattr(lab, "load_cifar10", few_images)
    sizes = dict(most=12, imbalance=3, epochs=3, warmup=1, batch=20, seeds=2, splits=2, frozen_epochs=2)
    sizes |= dict(backbone=lambda: lab.ResNet(3, None, width=8), head=lambda: lab.MLP([64, 32, 16]))
    names = run_full("similarity/isogclr", monkeypatch, until="measured", sizes=sizes, change=one_start)
    assert set(names["measured"]) == {
        (m, s, seed) for m in names["METHODS"] for s in names["STARTS"] for seed in (0, 1)
    }
    for (method, start, _seed), result in names["measured"].items():
        assert all(torch.tensor(result[metric]).isfinite() for metric in ("k-NN", "linear probe", "uniformity"))
        if method == "iSogCLR":  # after the warm-up most have been seen again and moved, each by its own
            tau = torch.tensor(result["tau"])
            assert (tau != start).float().mean() > 0.8 and len(tau.unique()) > len(tau) / 2
    assert all(torch.tensor(error).isfinite() for error in names["errors"].values()) and names["exact"].shape == (
        2,
        10,
        10,
    )
