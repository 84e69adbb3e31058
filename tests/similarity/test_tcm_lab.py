"""The lab's `full` profile, on a few generated images of CIFAR-100's shape: the code path that `quick` does not take."""

import math

import torch
from full_profile import run_full

from lossbook import lab


def few_images(*, train):
    """Eight images of each of 100 classes, each class a color of its own."""
    assert train
    labels = torch.arange(100).repeat(8)
    colors = torch.rand(100, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    images = (colors[labels] + 0.1 * torch.rand(len(labels), 3, 32, 32)).clamp(0, 1)
    return lab.Images(images, labels, tuple(str(c) for c in range(100)))


def test_full_profile_trains_and_measures(monkeypatch):
    monkeypatch.setattr(lab, "load_cifar100", few_images)
    sizes = dict(steps=2, batch=(8, 4), seeds=range(2), digits=dict(steps=3, splits=range(1)))
    sizes |= dict(encoder=lambda: lab.ResNet(3, 128, width=8, blocks=(1, 1)))
    names = run_full("similarity/tcm", monkeypatch, until="measured", sizes=sizes)
    digits = [setting for setting in names["settings"] if "digits" in setting]
    assert len(digits) == 2 and len(names["measured"]) == 2 * (len(names["settings"]) - 2) + 2
    for (setting, _seed), result in names["measured"].items():
        for part in result.values():
            assert 0 <= part["recall@1"] <= 1 and 0 <= part["OPIS"] <= 250 and math.isfinite(part["worst class"])
            assert all(curve.shape[-1] == 50 for curve in part["curves"])
        assert "other" in result and ("trained" in result) == ("digits" in setting)
        assert len(result["new"]["curves"][1]) == (16 if "digits" in setting else 20)
    first, second, new = names["load"](0)
    assert [len(part) for part in (first, second, new)] == [60, 20, 20] and first.shape[1:] == (8, 3, 32, 32)
    assert sum(names["size"]["classes"]) == 100
