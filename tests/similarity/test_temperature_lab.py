"""The lab's `full` profile, on a few generated images of CIFAR-10's shape: the code path that `quick` does not take."""

import torch
from full_profile import run_full

from lossbook import lab


def few_images(*, train):
    """Six or four images a class, each class a color of its own."""
    labels = torch.arange(10).repeat(6 if train else 4)
    colors = torch.rand(10, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return lab.Images(
        (colors[labels] + 0.1 * torch.rand(len(labels), 3, 32, 32)).clamp(0, 1), labels, tuple("abcdefghij")
    )


def two_losses(source, names):
    """Two of the losses are enough here."""
    if source.startswith("jobs ="):
        names["losses"] = {name: names["losses"][name] for name in ("tau=0.5", "hard simple")}
    return source


def test_full_profile_trains_with_the_memory_bank(monkeypatch):
    monkeypatch.setattr(lab, "load_cifar10", few_images)
    sizes = dict(epochs=2, batch=20, bank=8, seeds=(0, 1))
    sizes |= dict(backbone=lambda: lab.ResNet(3, None, width=8), head=lambda: lab.MLP([64, 32, 16]))
    names = run_full("similarity/temperature", monkeypatch, until="measured", sizes=sizes, change=two_losses)
    assert set(names["measured"]) == {(name, seed) for name in (*names["losses"], "pixels") for seed in (0, 1)}
    for result in names["measured"].values():
        assert all(torch.tensor(value).isfinite().all() for value in result.values())
    # Training moves the encoder, and each loss moves it elsewhere.
    images = few_images(train=True).images
    encoders = [
        names["train"](loss, images, seed=0)[0] for loss in (*names["losses"].values(), lambda p, n: 0 * p.sum())
    ]
    first, second, untrained = (next(encoder.parameters()) for encoder in encoders)
    assert not torch.equal(first, untrained) and not torch.equal(first, second)
