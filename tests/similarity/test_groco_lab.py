"""The lab's `full` profile, on a few generated images of CIFAR-10's shape: the code path that `quick` does not take."""

from pathlib import Path

import nbformat
import torch

from lossbook import lab

LAB = Path(__file__).parents[2] / "labs" / "similarity" / "groco.ipynb"


def few_images(*, train):
    """Six or four images a class, each class a color of its own."""
    labels = torch.arange(10).repeat(6 if train else 4)
    colors = torch.rand(10, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return lab.Images(
        (colors[labels] + 0.1 * torch.rand(len(labels), 3, 32, 32)).clamp(0, 1), labels, tuple("abcdefghij")
    )


def test_full_profile_trains_with_two_and_four_views(monkeypatch):
    monkeypatch.setenv("LOSSBOOK_PROFILE", "full")
    monkeypatch.setenv("LOSSBOOK_DEVICE", "cpu")
    monkeypatch.setattr(lab, "load_cifar10", few_images)
    threads = torch.get_num_threads()
    names = {"__name__": "__main__"}
    for cell in nbformat.read(LAB, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        if cell.source.startswith("import sys"):
            exec("from lossbook import lab\nrun = lab.start()", names)
            continue
        if cell.source.startswith("jobs ="):  # the experiment: three of the losses are enough here
            kept = ("sort, 4 views", "softmax, τ=0.5", "top 10, τ=0.5")
            names["losses"] = {name: names["losses"][name] for name in kept}
        exec(cell.source, names)
        if "SIZES" in cell.source:
            assert names["size"] is names["SIZES"]["full"]
            names["size"] |= dict(epochs=2, batch=20, seeds=(0, 1), backbone=lambda: lab.ResNet(3, None, width=8))
            names["size"] |= dict(head=lambda: lab.MLP([64, 32, 16]))
        if "measured" in names:
            break
    torch.set_num_threads(threads)
    assert set(names["measured"]) == {(name, seed) for name in names["losses"] for seed in (0, 1)}
    for result in names["measured"].values():
        assert all(torch.tensor(value).isfinite().all() for value in result.values())
    # Training moves the encoder, and each loss moves it elsewhere.
    images = few_images(train=True).images
    encoders = [names["train"](loss, images, seed=0) for loss in (*names["losses"].values(), lambda v: 0 * v.sum())]
    weights = [next(encoder.parameters()) for encoder in encoders]
    assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
