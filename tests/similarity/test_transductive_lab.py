"""The lab's `full` profile, on a few generated images of CIFAR-100's shape: the code path that `quick` does not take."""

from pathlib import Path

import nbformat
import torch

from lossbook import lab

LAB = Path(__file__).parents[2] / "labs" / "similarity" / "transductive.ipynb"


def few_images(*, train):
    """Fifteen or five images a class, each class a color of its own."""
    labels = torch.arange(100).repeat(15 if train else 5)
    colors = torch.rand(100, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    images = (colors[labels] + 0.05 * torch.rand(len(labels), 3, 8, 8)).clamp(0, 1)
    return lab.Images(images, labels, tuple(str(i) for i in range(100)))


def test_full_profile_measures_every_method(monkeypatch):
    monkeypatch.setenv("LOSSBOOK_PROFILE", "full")
    monkeypatch.setenv("LOSSBOOK_DEVICE", "cpu")
    monkeypatch.setattr(lab, "load_cifar100", few_images)
    threads = torch.get_num_threads()
    names = {"__name__": "__main__"}
    for cell in nbformat.read(LAB, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        if cell.source.startswith("import sys"):
            exec("from lossbook import lab\nrun = lab.start()", names)
            continue
        source = cell.source.replace("for queries in (1, 2, 5, 15, 30)", "for queries in (1, 2)")
        exec(source, names)
        if "SIZES" in cell.source:
            size = names["size"]
            assert size is names["SIZES"]["full"]
            size |= dict(epochs=1, episodes=12, validation=3, seeds=range(2), dim=16)
            size |= dict(body=lambda: lab.ResNet(3, None, width=8, blocks=(1, 1)))
            names["QUERIES"] = 2
            base, validation, novel = names["load"]()
            assert [int(part[1].max()) + 1 for part in (base, validation, novel)] == [64, 16, 20]
            assert sum(len(part[1]) for part in (base, validation, novel)) == 2000
        if "Draw" in cell.source or "def draw" in cell.source:
            names["draw"].__defaults__ = (2, True)  # fifteen queries a class would be more than there are
        if "measured" in names:
            break
    torch.set_num_threads(threads)
    for result in names["measured"].values():
        for (setting, name), accuracy in result["results"].items():
            assert accuracy.shape == (12,) and (accuracy >= 0).all() and (accuracy <= 1).all()
            assert name in names["STRESSED"] or "unbalanced" not in setting
        assert {name for setting, name in result["results"] if setting == "5-shot"} == set(names["METHODS"])
        # Colors are easy even for a network that has hardly been trained.
        assert result["results"]["5-shot", "prototype"].mean() > 0.5
        assert result["chosen"]["SLK-means", 1] in names["GRID"]
