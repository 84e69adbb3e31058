"""Updates against autograd with SGD and scikit-learn's Perceptron, the margin against a support vector machine; slopes in n and d, and of counts."""

import math

import numpy as np
import torch
from harness import Row, Slope, bar, exponent, in_fresh_process, peak_memory, timed
from sklearn.linear_model import Perceptron
from sklearn.svm import SVC

from lossbook.optimization import large_steps as G

PART, SLUG = "optimization", "large_steps"


def _data(n, d, least=0.05):
    """Gaussian samples in a flat half-space, random labels."""
    z = torch.randn(n, d, dtype=torch.float64)
    z[:, 0] = least * (1 + z[:, 0].abs())
    labels = torch.where(torch.rand(n) < 0.5, -1.0, 1.0).double()
    return labels[:, None] * z, labels


def _by_autograd(features, labels, step_size, updates):
    """The same updates by autograd and torch's SGD."""
    theta = torch.zeros(features.shape[1], dtype=features.dtype, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=step_size)
    for _ in range(updates):
        optimizer.zero_grad()
        margins = labels * (features @ theta)
        if (margins > 0).all():
            break
        G.logistic_loss(theta, features, labels).backward()
        optimizer.step()
    return theta.detach()


def _updates(n, d, count, repeats):
    """Milliseconds of `count` updates (inseparable data, so that none stops): ours, ours normalized, autograd with SGD."""
    features, labels = _data(n, d)
    labels = labels[torch.randperm(n)]
    ours = lambda **options: G.lr_gd(features, labels, step_size=0.5, max_iter=count, record=False, **options)
    result = ours()
    assert result.iterations is None
    torch.testing.assert_close(result.theta, _by_autograd(features, labels, 0.5, count), rtol=1e-8, atol=1e-10)
    return timed(
        ours,
        lambda: ours(normalized=True),
        lambda: _by_autograd(features, labels, 0.5, count),
        repeats=repeats,
    )


def _memory(ours, n, d, count):
    """Megabytes at the peak of `count` updates."""
    features, labels = _data(n, d)
    labels = labels[torch.randperm(n)]
    if ours:
        return peak_memory(lambda: G.lr_gd(features, labels, step_size=0.5, max_iter=count, record=False))
    return peak_memory(lambda: _by_autograd(features, labels, 0.5, count))


def _perceptrons(n, d, repeats):
    """Milliseconds to a separator: our three perceptrons, and scikit-learn's, which visits the samples in order."""
    features, labels = _data(n, d, least=0.3)
    table, y = features.numpy(), labels.numpy()
    z = labels[:, None] * features
    peer = Perceptron(fit_intercept=False, tol=None)
    goal = lambda: (y * (table @ peer.fit(table, y).coef_[0]) > 0).all()
    assert any(goal() for peer.max_iter in (2**k for k in range(14)))  # the least power of two that is enough
    own = [
        lambda: G.batch_perceptron(features, labels, max_iter=10**5, record=False),
        lambda: G.batch_perceptron(features, labels, max_iter=10**5, normalized=True, record=False),
        lambda: G.perceptron(features, labels, max_iter=10**5, record=False),
    ]
    for run in own:
        assert (z @ run().theta > 0).all()
    return timed(*own, lambda: peer.fit(table, y), repeats=repeats)


def _margin(n, d, repeats):
    """Milliseconds of the margin: ours, and a support vector machine on z and -z."""
    features, labels = _data(n, d, least=0.5)
    z = (labels[:, None] * features).numpy()
    both, classes = np.concatenate([z, -z]), np.repeat([1, -1], n)
    peer = SVC(kernel="linear", C=1e9, tol=1e-6)
    margin, _ = G.max_margin(features, labels)
    assert math.isclose(margin, 1 / np.linalg.norm(peer.fit(both, classes).coef_), rel_tol=1e-3)
    return timed(lambda: G.max_margin(features, labels), lambda: peer.fit(both, classes), repeats=repeats)


def _time(n, d, count=50):
    """Milliseconds of `count` updates."""
    features, labels = _data(n, d)
    labels = labels[torch.randperm(n)]
    run = lambda: G.lr_gd(features, labels, step_size=0.5, max_iter=count, record=False)
    assert run().iterations is None
    return timed(run, repeats=7)[0]


def run(small: bool = False) -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    rows, slopes = [], []
    shapes = ((200, 20, 100, 5),) if small else ((400, 65, 500, 15), (5000, 785, 100, 9), (5000, 3073, 30, 7))
    for n, d, count, repeats in shapes:
        size = f"{n} × {d}, {count} updates"
        ours, normalized, peer = in_fresh_process(_updates, n, d, count, repeats)
        memory = [in_fresh_process(_memory, own, n, d, count) for own in (True, False)]
        rows.append(
            Row(PART, SLUG, "lr_gd", "autograd and torch.optim.SGD", size, ours, peer, ours / peer, *memory,
                note=bar(ours / peer, 1.2, "ratio"))
        )  # fmt: skip
        rows.append(Row(PART, SLUG, "lr_gd, normalized", "lr_gd", size, normalized, ours, normalized / ours))
    for n, d, repeats in ((60, 5, 3),) if small else ((200, 20, 9), (2000, 20, 5)):
        *own, peer = in_fresh_process(_perceptrons, n, d, repeats)
        names = ("batch_perceptron", "batch_perceptron, normalized", "perceptron")
        for name, ours in zip(names, own, strict=True):
            rows.append(
                Row(PART, SLUG, name, "sklearn Perceptron, to the same goal", f"{n} × {d}", ours, peer, ours / peer)
            )
    for n, d, repeats in ((60, 5, 3),) if small else ((200, 20, 9), (2000, 50, 5)):
        ours, peer = in_fresh_process(_margin, n, d, repeats)
        rows.append(
            Row(PART, SLUG, "max_margin", "sklearn SVC, C = 1e9", f"{n} × {d}", ours, peer, ours / peer,
                note=bar(ours / peer, 1, "ratio"))
        )  # fmt: skip
    samples, features = ((500, 1000), (50, 100)) if small else ((8000, 16000, 32000, 64000), (128, 256, 512, 1024))
    times = [in_fresh_process(_time, n, 200) for n in samples]
    slopes.append(
        Slope("lr_gd", "time", f"n = {samples[0]} to {samples[-1]}, d = 200", exponent(samples, times), "1 (O(nd))")
    )
    times = [in_fresh_process(_time, 8000, d) for d in features]
    slopes.append(
        Slope("lr_gd", "time", f"d = {features[0]} to {features[-1]}, n = 8000", exponent(features, times), "1 (O(nd))")
    )
    sizes = (100, 1000, 10_000)
    for normalized, claim in ((False, "1 (of the order of n)"), (True, "0 (R²/μ², whatever n is)")):
        counts = [
            G.batch_perceptron(*G.worst_case_dataset(n), max_iter=n, normalized=normalized, record=False).iterations
            for n in sizes
        ]
        name = f"batch_perceptron{', normalized' if normalized else ''}, worst case"
        slopes.append(Slope(name, "updates", f"n = {sizes[0]} to {sizes[-1]}", exponent(sizes, counts), claim))
    return rows, slopes
