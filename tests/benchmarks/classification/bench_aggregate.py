"""Bag losses against the plain loss of each instance, the estimator against scikit-learn's and NumPy's least squares, and their slopes."""

import numpy as np
import torch
import torch.nn.functional as F
from harness import Row, Slope, bar, exponent, in_fresh_process, timed
from sklearn.linear_model import LinearRegression

from lossbook.classification import aggregate as A

PART, SLUG = "classification", "aggregate"
ROWS, CLASSES = 4096, 1000


def _bags(rows, k):
    """Random bags of k."""
    return torch.arange(rows // k).repeat_interleave(k)[torch.randperm(rows)]


def _step(x, value):
    """Forward and backward of one loss."""

    def run():
        x.grad = None
        loss = value()
        loss.backward()
        return loss.detach()

    return run


def _losses(k, repeats):
    """Milliseconds of bag, instance and interpolated loss, then of the plain loss, for cross-entropy and squared loss."""
    x = torch.randn(ROWS, CLASSES, requires_grad=True)
    labels, values, bag = torch.randint(CLASSES, (ROWS,)), torch.randn(ROWS, CLASSES), _bags(ROWS, k)
    shares = A.bag_mean(F.one_hot(labels, CLASSES).float(), bag)
    found = {}
    for loss, response, plain in (
        ("cross_entropy", shares, lambda: F.cross_entropy(x, labels)),
        ("squared", A.bag_mean(values, bag), lambda: F.mse_loss(x, values, reduction="sum") / ROWS),
    ):
        one = torch.arange(ROWS)  # bags of one: all losses are the plain loss
        single = F.one_hot(labels, CLASSES).float() if loss == "cross_entropy" else values
        for value in (
            A.bag_loss(x, single, one, loss=loss),
            A.instance_loss(x, single, one, loss=loss),
            A.interpolated_loss(x, single, one, rho=0.3, loss=loss),
        ):
            torch.testing.assert_close(value, plain(), rtol=1e-5, atol=1e-5)
        found[loss] = timed(
            _step(x, lambda loss=loss, r=response: A.bag_loss(x, r, bag, loss=loss)),
            _step(x, lambda loss=loss, r=response: A.instance_loss(x, r, bag, loss=loss)),
            _step(x, lambda loss=loss, r=response: A.interpolated_loss(x, r, bag, rho=0.3, loss=loss)),
            _step(x, plain),
            repeats=repeats,
        )
    return found


def _least_squares(n, d, k, repeats):
    """Milliseconds of the estimator and of scikit-learn's, on the same rows; at the instance level both give the same."""
    X = torch.randn(n, d, dtype=torch.float64)
    y = X @ torch.randn(d, dtype=torch.float64) + torch.randn(n, dtype=torch.float64) + 1
    bag = _bags(n, k)
    response = A.bag_mean(y, bag)
    model = A.InterpolatedLeastSquares(rho=0.5)
    target = response[bag]
    peer = LinearRegression().fit(X.numpy(), target.numpy())
    for rho in (0.5, 1.0) if k == 1 else (1.0,):
        ours = A.InterpolatedLeastSquares(rho).fit(X, response, bag)
        np.testing.assert_allclose(ours.coef_, peer.coef_, atol=1e-9)
    return timed(
        lambda: model.fit(X, response, bag),
        lambda: LinearRegression().fit(X.numpy(), target.numpy()),
        repeats=repeats,
    )


def _stacked(n, d, k, repeats):
    """Milliseconds of the estimator and of NumPy's least squares on the stacked system of 2n rows, with equal outputs."""
    X = torch.randn(n, d, dtype=torch.float64)
    bag, rho = _bags(n, k), 0.3
    response = A.bag_mean(X @ torch.ones(d, dtype=torch.float64) + torch.randn(n, dtype=torch.float64), bag)
    model = A.InterpolatedLeastSquares(rho, fit_intercept=False)

    def peer():
        means, target = A.bag_mean(X, bag)[bag], response[bag]
        rows = torch.cat([(1 - rho) ** 0.5 * means, rho**0.5 * X]).numpy()
        values = torch.cat([(1 - rho) ** 0.5 * target, rho**0.5 * target]).numpy()
        return np.linalg.lstsq(rows, values, rcond=None)[0]

    np.testing.assert_allclose(model.fit(X, response, bag).coef_, peer(), atol=1e-9)
    return timed(lambda: model.fit(X, response, bag), peer, repeats=repeats)


def _fit_time(n, d):
    """Milliseconds of one fit."""
    X, bag = torch.randn(n, d, dtype=torch.float64), _bags(n, 4)
    response = A.bag_mean(X.sum(1), bag)
    return timed(lambda: A.InterpolatedLeastSquares(0.3).fit(X, response, bag), repeats=7)[0]


def _loss_time(n):
    """Milliseconds of forward and backward of the interpolated cross-entropy."""
    x, bag = torch.randn(n, 100, requires_grad=True), _bags(n, 4)
    response = torch.full((n // 4, 100), 0.01)
    step = _step(x, lambda: A.interpolated_loss(x, response, bag, rho=0.3, loss="cross_entropy"))
    return timed(step, repeats=9)[0]


def run() -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    rows, slopes = [], []
    for k in (2, 8, 32):
        found = in_fresh_process(_losses, k, 15)
        cross_entropy = found["cross_entropy"][-1]  # the yardstick of all losses, beside the plain loss
        for loss, (*ours, plain) in found.items():
            peers = {"F.cross_entropy": cross_entropy} | ({"F.mse_loss": plain} if loss == "squared" else {})
            for name, milliseconds in zip(("bag_loss", "instance_loss", "interpolated_loss"), ours, strict=True):
                for peer, time in peers.items():
                    note = bar(milliseconds / time, 3, "ratio") if peer == "F.cross_entropy" else ""
                    rows.append(Row(PART, SLUG, f"{name}, {loss}", peer, f"({ROWS}, {CLASSES}), bags of {k}", milliseconds, time, milliseconds / time, note=note))  # fmt: skip
    for n, d, k in ((4096, 50, 1), (4096, 50, 8)):
        ours, peer = in_fresh_process(_least_squares, n, d, k, 15)
        rows.append(Row(PART, SLUG, "InterpolatedLeastSquares", "sklearn LinearRegression", f"{n} × {d}, bags of {k}", ours, peer, ours / peer, note=bar(ours / peer, 3, "ratio")))  # fmt: skip
    ours, peer = in_fresh_process(_stacked, 4096, 50, 8, 15)
    rows.append(Row(PART, SLUG, "InterpolatedLeastSquares", "np.linalg.lstsq, stacked", "4096 × 50, bags of 8", ours, peer, ours / peer, note=bar(ours / peer, 3, "ratio")))  # fmt: skip
    samples, features, batch = (8192, 16384, 32768, 65536), (64, 128, 256, 512), (2048, 4096, 8192, 16384)
    times = [in_fresh_process(_fit_time, n, 40) for n in samples]
    slopes.append(Slope("InterpolatedLeastSquares.fit", "time", f"n = {samples[0]} to {samples[-1]}, d = 40", exponent(samples, times), "1 (O(nd² + d³))"))  # fmt: skip
    times = [in_fresh_process(_fit_time, 16384, d) for d in features]
    slopes.append(Slope("InterpolatedLeastSquares.fit", "time", f"d = {features[0]} to {features[-1]}, n = 16384", exponent(features, times), "at most 2 (O(nd²)), towards 3 as d nears n"))  # fmt: skip
    times = [in_fresh_process(_loss_time, n) for n in batch]
    slopes.append(Slope("interpolated_loss, cross_entropy", "time", f"B = {batch[0]} to {batch[-1]}, C = 100", exponent(batch, times), "1 (O(BC))"))  # fmt: skip
    return rows, slopes
