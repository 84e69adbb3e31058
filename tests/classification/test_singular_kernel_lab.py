"""The lab's `full` profile with small sizes, and what the lab's own functions promise."""

import math

import numpy as np
import pytest
import torch
from full_profile import run_full

from lossbook.classification import singular_kernel as S

SMALL = dict(
    points=40, tests=50, seeds=range(2), fresh=range(2), relu=(9, 20, (10, 20, 40)),
    exponents=((1, 2, 4, 8), (30, 60), 80, range(2)), network=(40, 50),
    widths=(8, 16), network_points=12, depths=(1, 2), network_seeds=range(2),
)  # fmt: skip


@pytest.fixture(scope="module")
def names():
    """The lab's names, after its experiments."""
    patch = pytest.MonkeyPatch()
    try:
        yield run_full("classification/singular_kernel", patch, until="off", sizes=SMALL)
    finally:
        patch.undo()


def test_full_profile_runs(names):
    assert set(names["table"]) == {(d, n) for d in (1, 2, 4, 8) for n in (30, 60)}
    assert all(rows.shape == (2, 7) for rows in names["table"].values())
    assert set(names["off"]) == {(name, depth, width) for name in names["ACTIVATIONS"] for depth in (1, 2) for width in (8, 16)}  # fmt: skip
    assert names["relu"].shape == (2, 3, 2) and names["board"].shape == (2, 7, 3)
    assert all(rows.shape == (2, 11) for rows in names["control"].values())
    for kind, limits in names["agreement"].items():
        assert limits.shape == (2, 7, 3) and (limits >= 0).all() and (limits <= 1).all()
        assert (
            limits[:, -1, list(names["KINDS"]).index(kind)].min() > 0.9
        )  # at 40 layers each agrees with its own limit
    assert names["fitted"] == [1.0, 1.0]
    for rows in names["digits"].values():
        assert rows.shape == (2, 7) and (rows > 0.3).all()


def test_data_sets_of_training_and_test_differ(names):
    X, y, Z, z = names["draw"](4, 30, 40, 0)
    assert X.shape == (30, 5) and Z.shape == (40, 5) and len(y) == 30 and len(z) == 40
    assert torch.cdist(X, Z).min() > 0
    again, other = names["draw"](4, 30, 40, 0), names["draw"](4, 30, 40, 1)
    assert torch.equal(again[0], X) and not torch.equal(other[0], X)


def test_regression_with_and_without_a_ridge(names):
    X, y, Z, _z = names["draw"](2, 15, 10, 0)
    t, dual = y.double(), S.DualActivation.erf()
    K, k = S.ntk_kernel(X, X, dual=dual, depth=5), S.ntk_kernel(Z, X, dual=dual, depth=5)
    for ridge in (0.0, 0.3):
        wanted = k @ torch.linalg.solve(K + ridge * K[0, 0] * torch.eye(15, dtype=K.dtype), t)
        found = names["regress"](dual, 5, X, t, Z, ridge, S.ntk_kernel)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    both = names["regress"](dual, 5, X, t, Z, (0.0, 0.3), S.ntk_kernel)
    torch.testing.assert_close(both[1], found, rtol=1e-9, atol=1e-9)
    assert both.shape == (2, 10)


def test_the_checkerboard_flips_a_twentieth(names):
    g = torch.Generator().manual_seed(0)
    x = names["octant"](4000, g)
    y = names["checkerboard"](x, g)
    clean = torch.where((torch.floor(4 * x[:, 0]) + torch.floor(4 * x[:, 1])) % 2 > 0, 1, -1)
    assert (y != clean).double().mean().item() == pytest.approx(0.05, abs=0.01)
    assert torch.allclose(x.norm(dim=1), torch.ones(4000, dtype=x.dtype)) and (x >= 0).all()


def test_steps_in_function_space_are_gradient_descent(names):
    """The closed form against the steps one at a time, on training and on test points."""
    X, y, Z, _z = names["draw"](2, 12, 7, 0)
    dual = S.DualActivation.erf()
    found, rate = names["wide_limit"](dual, 2, X, y, Z, 9)
    both = torch.cat([X, Z])
    kernel = S.ntk_kernel(both, X, dual=dual, depth=2)
    f = torch.zeros(19, dtype=torch.float64)
    for _ in range(9):
        f = f - rate * kernel @ (f[:12] - y)
    torch.testing.assert_close(found, f[12:], rtol=1e-8, atol=1e-8)


def test_a_wide_network_is_near_its_kernel(names):
    X, y, Z, _z = names["draw"](2, 12, 20, 0)
    limit, rate = names["wide_limit"](S.DualActivation.erf(), 1, X, y, Z, 30)
    errors = []
    for width in (16, 1024):
        g = torch.Generator().manual_seed(0)
        out = names["train"](S.activation("erf"), 1, width, X, y, Z, rate, 30, g)
        errors.append((out - limit).square().mean().sqrt().item())
    assert errors[1] < errors[0] / 2 and errors[1] < 0.05 and math.isfinite(errors[0])
    assert np.isfinite(limit.numpy()).all()
