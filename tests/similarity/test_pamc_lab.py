"""The lab's `full` profile, on a few generated images of USPS's shape: the code path that `quick` does not take."""

from pathlib import Path

import nbformat
import torch

from lossbook import lab

LAB = Path(__file__).parents[2] / "labs" / "similarity" / "pamc.ipynb"


def few_images(*, train):
    """Nine or three images a class, each class a pattern of its own."""
    labels = torch.arange(10).repeat(9 if train else 3)
    patterns = torch.rand(10, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    images = patterns[labels] + 0.1 * torch.rand(len(labels), 1, 16, 16)
    return lab.Images(images.clamp(0, 1), labels, tuple("0123456789"))


def test_full_profile_trains_and_measures(monkeypatch):
    monkeypatch.setenv("LOSSBOOK_PROFILE", "full")
    monkeypatch.setenv("LOSSBOOK_DEVICE", "cpu")
    monkeypatch.setattr(lab, "load_usps", few_images)
    threads = torch.get_num_threads()
    names = {"__name__": "__main__"}
    for cell in nbformat.read(LAB, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        if cell.source.startswith("import sys"):
            exec("from lossbook import lab\nrun = lab.start()", names)
            continue
        if "SIZES" in cell.source:  # the cell loads the data itself, so sizes change before it goes on
            sizes, rest = cell.source.split("size = SIZES[run.profile]\n")
            exec(sizes, names)
            names["size"] = names["SIZES"]["full"]
            names["size"] |= dict(encoder=(256, 32, 10), pretrain=4, batch=20, epochs=9, seeds=2)
            names["size"] |= dict(sizes=(100, 200, 400), large=1000)
            exec(rest, names)
            continue
        exec(cell.source, names)
        if "digits_seconds" in names:
            break
    torch.set_num_threads(threads)
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
