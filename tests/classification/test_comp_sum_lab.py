"""The lab's `full` profile, on a few generated images of CIFAR's shape: the code path that `quick` does not take."""

import numpy as np
import torch
from full_profile import run_full
from torch import nn

from lossbook import lab


def few_images(classes, each):
    """Images of a color for each class."""

    def load(*, train):
        labels = torch.arange(classes).repeat(each if train else 2)
        colors = torch.rand(classes, 3, 1, 1, generator=torch.Generator().manual_seed(0))
        images = (colors[labels] + 0.1 * torch.rand(len(labels), 3, 32, 32)).clamp(0, 1)
        return lab.Images(images, labels, tuple(str(c) for c in range(classes)))

    return load


def test_full_profile_trains_and_measures(monkeypatch):
    monkeypatch.setattr(lab, "load_cifar10", few_images(10, 6))
    monkeypatch.setattr(lab, "load_cifar100", few_images(100, 2))
    # The bound and the gaps run on the same data in both profiles; the first seed is enough here.
    few = {"range(2)": "range(1)", "(30, 1500)": "(30,)", "range(3)": "range(1)"}

    def change(source, names):
        for long, short in few.items() if source.startswith(("def regrets", "def gaps")) else ():
            source = source.replace(long, short)
        return source

    sizes = dict(
        model=lambda inputs, n: nn.Sequential(nn.AvgPool2d(8), lab.MLP([48, 8, n])),
        class_epochs=2, noise_epochs=2, robust_epochs=2, robust_batch=30, seeds=range(2), noise_seeds=range(2),
    )  # fmt: skip
    names = run_full("classification/comp_sum", monkeypatch, until="table", sizes=sizes, change=change)
    assert set(names["shared"]) == {
        (name, tau, seed) for name in ("cifar-10", "cifar-100") for tau in names["CLASS_TAUS"] for seed in (0, 1)
    }
    assert names["most"] == "cifar-100" and names["number_of_classes"](names["most"]) == 100
    train, validation, test = names["load"]("cifar-10", 0)
    assert [len(part[1]) for part in (train, validation, test)] == [54, 6, 20]
    assert all(0 <= value <= 1 for result in names["shared"].values() for value in result)
    assert all(record.shape == (2, 2) and np.isfinite(record).all() for record in names["noise"].values())
    assert all(bound >= beta - 1e-9 for _n, _tau, bound, beta in names["dots"])
    assert (np.diff(names["gap"][:, :, 0], axis=1) < 0).all()
    for name in names["RUNS"]:
        clean, robust = names["defense"](name, "clean"), names["defense"](name)
        assert clean.shape == (2,) and (robust <= clean + 1e-9).all()


def test_defenses_are_the_losses_that_they_say(monkeypatch):
    """Away from training: the ascent stays in the ball, climbs, and each loss is its formula."""
    monkeypatch.setattr(lab, "load_cifar10", few_images(10, 2))
    monkeypatch.setattr(lab, "load_cifar100", few_images(100, 1))

    def change(source, names):  # definitions only
        return source if not source.startswith(("def many", "NOISE", "def regrets", "def gaps")) else ""

    def definitions(source, names):
        source = change(source, names)
        return source.split("choices = run_all")[0] + "\ndone = True" if source.startswith("def ascend") else source

    names = run_full("classification/comp_sum", monkeypatch, until="done", sizes=dict(radius=0.1), change=definitions)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 10)).train()
    x, y = torch.rand(16, 3, 2, 2), torch.arange(16) % 10
    cross_entropy = lambda h: nn.functional.cross_entropy(h, y, reduction="sum")  # noqa: E731
    worst = names["ascend"](net, x, cross_entropy, 0.1, 5)
    assert (worst - x).abs().max() <= 0.1 + 1e-6 and worst.min() >= 0 and worst.max() <= 1 and net.training
    assert cross_entropy(net(worst)) > cross_entropy(net(x)) * 1.02
    torch.manual_seed(1)
    attacked = names["ascend"](net, x, cross_entropy, 0.1, 5)
    torch.manual_seed(1)
    torch.testing.assert_close(names["pgd"](net, x, y, 1.0, 5), cross_entropy(net(attacked)) / 16)
    # TRADES at weight 0 is cross-entropy, and its second term is a divergence: never below it
    plain = names["plain"](net, x, y, 0.0, 0)
    torch.testing.assert_close(names["trades"](net, x, y, 0.0, 5), plain)
    assert names["trades"](net, x, y, 1.0, 5) > plain and names["smooth"](net, x, y, 0.2, 5) > plain
    assert names["margin"](torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([1])).item() == -2.0
    hit = names["accuracy"](net, (x, y))
    assert names["robust_accuracy"](net, (x, y)) <= hit + 1e-9
