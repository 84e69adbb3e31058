"""The lab's `full` profile, on a few generated images of USPS's shape: the code path that `quick` does not take."""

import torch
from full_profile import run_full

from lossbook import lab


def few_images(*, train):
    """Nine or three images a class, each class a pattern of its own."""
    labels = torch.arange(10).repeat(9 if train else 3)
    patterns = torch.rand(10, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    images = patterns[labels] + 0.1 * torch.rand(len(labels), 1, 16, 16)
    return lab.Images(images.clamp(0, 1), labels, tuple("0123456789"))


def test_full_profile_trains_and_measures(monkeypatch):
    monkeypatch.setattr(lab, "load_usps", few_images)
    sizes = dict(encoder=(256, 32, 10), pretrain=4, batch=20, epochs=9, seeds=2, sizes=(100, 200, 400), large=1000)
    names = run_full("similarity/pamc", monkeypatch, until="digits_seconds", sizes=sizes)
    assert len(names["everything"][0]) == 120 and names["K"] == 10
    assert set(names["measured"]) == {
        (method, setting, seed)
        for setting in names["SETTINGS"]
        for method in names["methods"][setting]
        for seed in (0, 1)
    }
    for (method, setting, _seed), result in names["measured"].items():
        assert 0 < result["accuracy"] <= 1 and 0 < result["NMI"] <= 1
        assert len(result["trace"]) == (2 if method == "PamC" else 0)
        if method == "PamC":
            trace = torch.tensor(result["trace"])
            assert trace.shape == (2, 8 if setting == "KL strong" else 3) and trace.isfinite().all()
    scores = {m: names["measured"][m, "equal weights", 0]["trace"] for m in ("PamC", "exact")}
    assert scores["PamC"] and not scores["exact"]
    moved = {m: names["measured"][m, "equal weights", 0]["code"] for m in ("PamC", "exact", "PamC, shuffled")}
    assert (moved["PamC"] - moved["exact"]).abs().max() > 1e-3  # the methods are different losses
    assert (moved["PamC"] - moved["PamC, shuffled"]).abs().max() > 1e-3
    assert torch.tensor(names["near"]).isfinite().all() and min(names["slack"]) >= -1e-9
    assert names["memory"]["dense exact"][-1] > names["memory"]["PamC"][-1] and names["large_seconds"] > 0
