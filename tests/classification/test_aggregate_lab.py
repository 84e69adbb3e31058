"""What the lab's functions promise, and its `full` profile on tables and images of the data sets' own format."""

import numpy as np
import torch
from full_profile import run_full
from sklearn import datasets

from lossbook import lab
from lossbook.classification import aggregate as A


def small_table(*, return_X_y):
    """240 districts with the eight features of California Housing; the response is linear."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(240, 8))
    return X, X @ np.arange(1.0, 9.0) + 2 + rng.normal(size=240)


def few_images(*, train):
    """Sixteen or four images a class, each class a pattern of its own."""
    labels = torch.arange(10).repeat(16 if train else 4)
    patterns = torch.rand(10, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    images = patterns[labels] + 0.1 * torch.rand(len(labels), 1, 28, 28)
    return lab.Images(images.clamp(0, 1), labels, tuple("0123456789"))


def test_full_profile(monkeypatch):
    monkeypatch.setattr(datasets, "fetch_california_housing", small_table)
    monkeypatch.setattr(lab, "load_mnist", few_images)
    sizes = dict(
        dim=20, draws=3, private_draws=range(2), train=200, bags=(4, 10), splits=2, network_bags=(4, 10), widths=(16,),
        table_epochs=2, table_batch=40, image_train=160, image_bags=(4, 16), image_widths=(16,), image_epochs=2,
        image_batch=32, seeds=range(2), fresh=range(2), image_seeds=range(2),
    )  # fmt: skip
    names = run_full("classification/aggregate", monkeypatch, until="private_table", sizes=sizes)
    linear = names["linear_results"]
    assert set(linear) == {(k, s) for k in (4, 10) for s in (0, 1)}
    for errors in linear.values():
        splits = errors.pop("splits")
        assert len(splits) == 2 and all(split["chosen"] in names["GRID"] for split in splits)
        assert all(np.isfinite(list(errors.values())))
        assert errors["best weight"] <= min(
            errors["cross-validated weight"], errors["bag level"], errors["instance level"]
        )
        assert errors["single responses"] < errors["instance level"] < errors["shuffled"] + 1
    assert {key[:3] for key in names["networks"]} == {
        *(("table", k, 0.0) for k in (4, 10)), *(("image", k, 0.0) for k in (4, 16)), ("image", 4, names["HARD"])
    }  # fmt: skip
    for key, results in names["networks"].items():
        assert set(results) == set(names["WEIGHTS"])
        for measures in results.values():
            assert all(np.isfinite(list(measures.values())))
            assert key[0] == "image" or measures["identity"] < 1e-9
        assert len({m["error"] for m in results.values()} | {m["held_out"] for m in results.values()}) > 2
    for key, result in names["simulated"].items():
        errors, risks = result
        assert len(errors) == 12 and np.isfinite(errors).all(), key
        assert len(risks) == 12 and min(risks) > 0
    assert all(v.shape == (2, 2) and np.isfinite(v).all() for v in names["private"].values())
    assert {key[:2] for key in names["private_table"]} == {(k, e) for k in (1, 4, 16) for e in (3.0, 1.0)}

    # What the functions promise.
    X, y = names["load_table"]()
    assert X.mean(0).abs().max() < 1e-12 and (y.std() - 1).abs() < 1e-12
    rows, bag = names["deal"](22, 4, torch.Generator().manual_seed(0))
    assert len(rows) == 20 == len(set(rows.tolist())) and torch.bincount(bag).tolist() == [4] * 5
    errors, risks = names["simulate"](4, 2, 0.5, [0.1, 1.0], 0, None, 1)
    assert names["simulate"](4, 2, 0.5, [0.1, 1.0], 0)[1] is None
    assert np.allclose(errors, names["simulate"](4, 2, 0.5, [0.1, 1.0], 0)[0])
    limit = [sum(A.asymptotic_risk(4, 2, rho, noise_variance=0.5)).item() for rho in (0.1, 1.0)]
    assert np.allclose(risks, limit, rtol=0.4)
    private, ridge = names["simulate"](4, 2, 0.5, [0.1], 0, (2.0, 1e9))  # no noise to speak of: only clipping differs
    assert abs(private[0] / errors[0] - 1) < 0.5
    assert 0 < ridge < 10
    assert all(np.isfinite(result["ridge, no intercept"]) for result in names["private_table"].values())
