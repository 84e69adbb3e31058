"""The Hilbert vote and the deep classifier against scikit-learn's, with equal outputs; slopes in points, layers and test points."""

import numpy as np
import torch
from harness import Row, Slope, bar, exponent, in_fresh_process, peak_memory, timed
from sklearn.kernel_ridge import KernelRidge
from sklearn.neighbors import KNeighborsClassifier

from lossbook.classification import singular_kernel as S

PART, SLUG = "classification", "singular_kernel"


def _data(n, m, p=3):
    g = torch.Generator().manual_seed(0)
    X, Z = (
        torch.nn.functional.normalize(torch.randn(k, p, generator=g, dtype=torch.float64).abs(), dim=1) for k in (n, m)
    )
    return X, torch.randint(2, (n,), generator=g), Z


def _hilbert(n, m, repeats):
    """Milliseconds of the weights' vote: ours, then scikit-learn's neighbours classifier with all points."""
    X, y, Z = _data(n, m)
    peer = KNeighborsClassifier(n, weights=lambda d: d**-2.0, algorithm="brute").fit(X.numpy(), y.numpy())
    ours = lambda: y.double() @ S.hilbert_weights(X, Z, exponent=2.0)
    np.testing.assert_allclose(ours(), peer.predict_proba(Z.numpy())[:, 1], rtol=1e-6, atol=1e-8)
    return timed(ours, lambda: peer.predict_proba(Z.numpy()), repeats=repeats)


def _deep(n, m, repeats):
    """Milliseconds to fit and predict with a kernel of depth 40, well conditioned: ours, then scikit-learn's ridge on our kernel matrices."""
    X, y, Z = _data(n, m)
    dual = S.DualActivation.optimal(2)

    def ours():
        return S.DeepKernelClassifier(dual, 40).fit(X, y).predict(Z)

    def theirs():
        scale = (dual.slope_at_one**41 - 1) / (dual.slope_at_one - 1)
        matrix = S.ntk_kernel(X, X, dual=dual, depth=40).numpy() / scale
        model = KernelRidge(alpha=1e-12, kernel="precomputed").fit(matrix, np.eye(2)[y])
        return model.predict(S.ntk_kernel(Z, X, dual=dual, depth=40).numpy() / scale).argmax(1)

    assert (ours().numpy() == theirs()).mean() > 0.98
    return timed(ours, theirs, repeats=repeats)


def _memory(n, m):
    """Megabytes at the peak of one prediction at infinite depth."""
    X, y, Z = _data(n, m)
    model = S.SingularKernelClassifier(2).fit(X, y)
    return peak_memory(lambda: model.predict(Z))


def _limit(n, m):
    X, y, Z = _data(n, m)
    model = S.SingularKernelClassifier(2).fit(X, y)
    return timed(lambda: model.predict(Z), repeats=5)[0]


def _layers(depth):
    X, _y, Z = _data(400, 400)
    dual = S.DualActivation.optimal(2)
    return timed(lambda: S.ntk_kernel(X, Z, dual=dual, depth=depth), repeats=5)[0]


def _fit(n):
    X, y, _Z = _data(n, 1)
    return timed(lambda: S.DeepKernelClassifier(S.DualActivation.erf(), 5).fit(X, y), repeats=3)[0]


def run() -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    rows, slopes = [], []
    for n, m, repeats in ((300, 1000, 15), (2000, 2000, 5)):
        size = f"{n} points, {m} tests"
        ours, peer = in_fresh_process(_hilbert, n, m, repeats)
        memory = in_fresh_process(_memory, n, m)
        rows.append(
            Row(PART, SLUG, "hilbert_weights, vote", "sklearn KNeighborsClassifier, all points", size, ours, peer,
                ours / peer, note=bar(ours / peer, 3, "ratio"))
        )  # fmt: skip
        rows.append(Row(PART, SLUG, "SingularKernelClassifier.predict", "none", size, in_fresh_process(_limit, n, m), memory_mb=memory))  # fmt: skip
    ours, peer = in_fresh_process(_deep, 300, 300, 3)
    rows.append(
        Row(PART, SLUG, "DeepKernelClassifier, pseudo-inverse", "sklearn KernelRidge, a tiny ridge", "300 points, 300 tests",
            ours, peer, ours / peer)
    )  # fmt: skip
    for name, sizes, function, claim in (
        ("SingularKernelClassifier.predict, m", (500, 1000, 2000, 4000), lambda m: (_limit, 500, m), "1 (O(nm))"),
        ("SingularKernelClassifier.predict, n", (500, 1000, 2000, 4000), lambda n: (_limit, n, 500), "1 (O(nm))"),
        ("ntk_kernel, layers", (20, 40, 80, 160), lambda depth: (_layers, depth), "1 (O(L))"),
        ("DeepKernelClassifier.fit, n", (125, 250, 500, 1000), lambda n: (_fit, n), "up to 3 (O(n^3))"),
    ):
        times = [in_fresh_process(*function(k)) for k in sizes]
        slopes.append(Slope(name, "time", f"{sizes[0]} to {sizes[-1]}", exponent(sizes, times), claim))
    return rows, slopes
