"""The lab's `full` profile, on a few generated images of CIFAR-100's shape: the code path that `quick` does not take."""

import torch
from full_profile import run_full

from lossbook import lab


def few_images(*, train):
    """Sixteen or five images a class, each class a color of its own."""
    labels = torch.arange(100).repeat(16 if train else 5)
    colors = torch.rand(100, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    images = (colors[labels] + 0.1 * torch.rand(len(labels), 3, 32, 32)).clamp(0, 1)
    return lab.Images(images, labels, tuple(str(c) for c in range(100)))


def few_episodes(source, names):
    """One scale, and small episodes once the networks are defined."""
    if "def run_all" in source:
        names["size"] |= dict(episodes=4, way=3, queries=5, epoch=1)
    return source.replace("sets = dict", "SCALES = (1 / 2,)\nsets = dict")


def test_full_profile_trains_on_other_classes_than_it_tests(monkeypatch):
    monkeypatch.setattr(lab, "load_cifar100", few_images)
    sizes = dict(test_episodes=31, seeds=(0,), more=(1,))
    names = run_full("similarity/proto_triplet", monkeypatch, until="measured", sizes=sizes, change=few_episodes)
    assert [len(labels.unique()) for _, labels in names["sets"].values()] == [64, 16, 20]
    groups = [set(labels.tolist()) for _, labels in names["sets"].values()]
    assert not groups[0] & groups[1] and not groups[1] & groups[2] and not groups[0] & groups[2]
    close = ("CE, T = 1", "PT, m = 0.5", "CE + PT + ICNN")
    assert set(names["measured"]) == {(name, 0) for name in names["losses"]} | {(name, 1) for name in close}
    embeddings = {}
    for (name, seed), result in names["measured"].items():
        assert result["novel", 1].shape == (31,) and 0 < result["score"] <= 1
        assert result["embedding"].isfinite().all() and result["embedding"].shape == (20 * 21, 64)
        embeddings[name, seed] = result["embedding"]
    # Every loss moves the encoder, and each elsewhere; the two halves of a run are not the same.
    for name in names["losses"]:
        for other in names["losses"]:
            assert torch.equal(embeddings[name, 0], embeddings[other, 0]) == (name == other), (name, other)
