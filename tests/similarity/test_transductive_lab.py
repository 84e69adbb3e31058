"""The lab's `full` profile, on a few generated images of CIFAR-100's shape: the code path that `quick` does not take."""

import torch
from full_profile import run_full

from lossbook import lab


def few_images(*, train):
    """Fifteen or five images a class, each class a color of its own."""
    labels = torch.arange(100).repeat(15 if train else 5)
    colors = torch.rand(100, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    images = (colors[labels] + 0.05 * torch.rand(len(labels), 3, 8, 8)).clamp(0, 1)
    return lab.Images(images, labels, tuple(str(i) for i in range(100)))


def two_queries(source, names):
    """Two queries a class: fifteen would be more than there are."""
    if "draw" in names:
        names["draw"].__defaults__ = (2, True)
    if "SIZES" in source:
        source += "\nQUERIES = 2"
    return source.replace("for queries in (1, 2, 5, 15, 30)", "for queries in (1, 2)")


def test_full_profile_measures_every_method(monkeypatch):
    monkeypatch.setattr(lab, "load_cifar100", few_images)
    sizes = dict(epochs=1, episodes=12, validation=3, seeds=range(2), dim=16)
    sizes |= dict(body=lambda: lab.ResNet(3, None, width=8, blocks=(1, 1)))
    names = run_full("similarity/transductive", monkeypatch, until="measured", sizes=sizes, change=two_queries)
    base, validation, novel = names["load"]()
    assert [int(part[1].max()) + 1 for part in (base, validation, novel)] == [64, 16, 20]
    assert sum(len(part[1]) for part in (base, validation, novel)) == 2000
    for result in names["measured"].values():
        for (setting, name), accuracy in result["results"].items():
            assert accuracy.shape == (12,) and (accuracy >= 0).all() and (accuracy <= 1).all()
            assert name in names["STRESSED"] or "unbalanced" not in setting
        assert {name for setting, name in result["results"] if setting == "5-shot"} == set(names["METHODS"])
        # Colors are easy even for a network that has hardly been trained.
        assert result["results"]["5-shot", "prototype"].mean() > 0.5
        assert result["chosen"]["SLK-means", 1] in names["GRID"]
