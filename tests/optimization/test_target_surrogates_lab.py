"""The lab's `full` profile on a few generated images, and what the lab's own loops promise."""

import math

import numpy as np
import pytest
import torch
from full_profile import run_full

from lossbook import lab
from lossbook.optimization import target_surrogates as T


def few_images(root=None, *, train=True, download=True):
    """Images of MNIST's shape, a gray level for each class."""
    labels = torch.arange(10).repeat(12)
    noise = torch.rand(120, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return lab.Images((labels[:, None, None, None] / 12 + 0.2 * noise).clamp(0, 1), labels, tuple("abcdefghij"))


@pytest.fixture(scope="module")
def names():
    patch = pytest.MonkeyPatch()
    patch.setattr(lab, "load_mnist", few_images)
    sizes = dict(ranks={10: 2, 4: 1, 1: 1}, inner=(1, 5), hidden=8, batch=40, calls=6, network_inner=(1, 3))
    sizes |= dict(seeds=range(2), steps=2000, groupings=1)
    try:
        yield run_full("optimization/target_surrogates", patch, until="long", sizes=sizes)
    finally:
        patch.undo()


def test_every_run_is_there(names):
    wanted = {"SLS", "SLS, reset", "SSO, m=1", "SSO, m=5", "SGD", "Adam", "Adagrad"}
    for k, count in ((10, 2), (4, 1), (1, 1)):
        found = {name for name, rank, _ in names["factorized"] if rank == k}
        assert found == wanted and sum(rank == k for _, rank, _ in names["factorized"]) == count * len(wanted)
    for excess, evaluations in names["factorized"].values():
        assert np.isfinite(excess).all() and excess[-1] > -1e-12 and (np.diff(evaluations) > 0).all()
    assert set(names["trained"]) == {*names["GRID"], "η = 2"} and names["pixels"].shape == (120, 784)
    for runs in names["trained"].values():
        for run in runs:
            assert run.shape == (6, 4) and np.isfinite(run).all() and (np.diff(run[:, :3], axis=0) > 0).all()
    assert all(run[0] == 18 for run in names["long"])


def test_columns_of_sso_are_the_modules(names):
    """The loop for all η at once against the optimizer, one by one; infinitely many steps against the exact one."""
    X, y = names["main"]
    for m in (1, 5):
        fast = names["sso"](X, y, (4, 16), m, 6)
        for column, eta in enumerate((4.0, 16.0)):
            theta = torch.nn.Parameter(torch.zeros(X.shape[1], dtype=torch.float64))
            lr = 1 / T.surrogate_smoothness(X, eta=eta).item()
            optimizer = T.SSO([theta], eta, m, inner="gd", inner_lr=lr, tolerance=0)
            for call in range(6):
                loss = optimizer.step(lambda theta=theta: X @ theta, lambda z: T.logistic_losses(z, y))
                assert loss.item() == pytest.approx(fast[call, column], abs=1e-10)
    exact, theta = names["sso"](X, y, (4,), math.inf, 6), torch.zeros(X.shape[1], dtype=torch.float64)
    for call in range(6):
        assert T.logistic_losses(X @ theta, y).mean().item() == pytest.approx(exact[call, 0], abs=1e-9)
        theta = T.exact_linear_step(X, theta, T.target_gradient(T.logistic_losses, X @ theta, y), 4.0)


def test_gradient_descent_has_the_steps_that_it_names(names):
    X, y = names["main"]
    L = torch.linalg.eigvalsh(X.T @ X)[-1] / (4 * len(X))
    theta = torch.zeros(X.shape[1], dtype=torch.float64)
    for _ in range(3):
        theta = theta - 8 / L * X.T @ (torch.sigmoid(X @ theta) - y) / len(X)
    found = names["gradient_descent"](X, y, 3)[-1, names["SCALES"].index(8)]
    assert found == pytest.approx(T.logistic_losses(X @ theta, y).mean().item(), rel=1e-9)


def test_newton_finds_the_minimum(names):
    X, y = names["standardized"](names["digits"].data, names["digits"].target % 2)
    least, curvature = names["newton"](X, y)
    path = names["sso"](X, y, (4,), math.inf, 200)[:, 0]
    assert 0 < path[-1] - least < 1e-3 and (np.diff(path) < 1e-12).all()
    theta, inverse = torch.zeros(X.shape[1], dtype=torch.float64), torch.linalg.pinv(X)
    for _ in range(200):
        theta = theta - 4 * inverse @ (torch.sigmoid(X @ theta) - y)
    p = torch.sigmoid(X @ theta)
    assert 4 * (p - p**2).mean().item() == pytest.approx(curvature, rel=0.05)


def test_fresh_seeds(names):
    """The claims that were restated use seeds from 20 on, all others the first ones."""
    assert [names["seeds_of"](k) for k in (10, 4, 1)] == [[20, 21], [20], [0]]
    assert {(k, seed) for _, k, seed in names["factorized"]} == {(10, 20), (10, 21), (4, 20), (1, 0)}


def test_single_samples_are_the_modules_steps(names):
    """One chain replayed by kaczmarz_step and by SGD, with the same draws."""
    cloud = names["clouds"][0]
    X, y = (torch.tensor(part) for part in cloud)
    for exact in (True, False):
        _, early = names["single_samples"]([cloud], exact, 30, chains=1, kept=30)
        rng, theta = np.random.default_rng(0), torch.zeros(2, dtype=torch.float64)
        for t in range(1, 31):
            i = rng.integers(30, size=(1, 1)).item()
            eta, residual = min(1, 20 / t), X[i] @ theta - y[i]
            theta = T.kaczmarz_step(X[i], theta, residual, eta) if exact else theta - 0.01 * eta * residual * X[i]
            assert np.allclose(early[t - 1, 0], theta.numpy(), rtol=1e-9, atol=1e-12)


def test_minima_of_the_clouds(names):
    for (X, y), (of_h, of_phi) in zip(names["clouds"], names["minima"], strict=True):
        residuals = X @ of_h - y, (X @ of_phi - y) / (X**2).sum(1)
        assert all(np.abs(X.T @ r).max() < 1e-9 for r in residuals)


def test_minibatches_with_one_inner_step_are_sgd(names):
    """With one inner step the learning rate is that of the batch's surrogate; SGD with it moves alike."""
    X, y = names["main"]
    one = names["minibatches"](X, y, (1.0, 4.0), 1, 0, calls=1)
    batch = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))[:32]
    rates = [32 * eta / torch.linalg.matrix_norm(X[batch], ord=2).item() ** 2 for eta in (1.0, 4.0)]
    assert np.allclose(one, names["minibatches"](X, y, rates, None, 0, calls=1), rtol=1e-10)
