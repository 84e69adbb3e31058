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


def three_losses(source, names):
    """Three of the losses are enough here."""
    if source.startswith("jobs ="):
        kept = ("sort, 4 views", "softmax, τ=0.5", "top 10, τ=0.5")
        names["losses"] = {name: names["losses"][name] for name in kept}
    return source


def test_full_profile_trains_with_two_and_four_views(monkeypatch):
    monkeypatch.setattr(lab, "load_cifar10", few_images)
    sizes = dict(epochs=2, batch=20, seeds=(0, 1))
    sizes |= dict(backbone=lambda: lab.ResNet(3, None, width=8), head=lambda: lab.MLP([64, 32, 16]))
    names = run_full("similarity/groco", monkeypatch, until="measured", sizes=sizes, change=three_losses)
    assert set(names["measured"]) == {(name, seed) for name in names["losses"] for seed in (0, 1)}
    for result in names["measured"].values():
        assert all(torch.tensor(value).isfinite().all() for value in result.values())
    # Training moves the encoder, and each loss moves it elsewhere.
    images = few_images(train=True).images
    encoders = [names["train"](loss, images, seed=0) for loss in (*names["losses"].values(), lambda v: 0 * v.sum())]
    weights = [next(encoder.parameters()) for encoder in encoders]
    assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
