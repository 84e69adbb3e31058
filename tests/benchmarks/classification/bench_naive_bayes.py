"""The estimator against scikit-learn's, with shared and with own variances, one fit and in batches; its slopes."""

import numpy as np
import torch
from harness import Row, Slope, bar, exponent, in_fresh_process, peak_memory, timed
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB

from lossbook.classification import naive_bayes as N

PART, SLUG = "classification", "naive_bayes"


class Diagonal:
    """A covariance estimator that ignores correlations: with it scikit-learn's discriminant analysis is naive Bayes."""

    def fit(self, X):
        """Variances of one class."""
        self.covariance_ = np.diag(X.var(0))
        return self


def _data(m, n, classes):
    y = torch.cat([torch.arange(classes), torch.randint(classes, (m - classes,))])
    return torch.randn(classes, n, dtype=torch.float64)[y] + torch.randn(m, n, dtype=torch.float64), y


def _own(m, n, classes, repeats):
    """Milliseconds of fit, predict_log_proba and partial_fit in ten batches: ours, then scikit-learn's GaussianNB."""
    X, y = _data(m, n, classes)
    table, labels = X.numpy(), y.numpy()
    theirs = GaussianNB(var_smoothing=1e-9).fit(table, labels)
    ours = N.GaussianNaiveBayes(float(theirs.epsilon_), shared_variance=False).fit(X, y)
    np.testing.assert_allclose(ours.means_, theirs.theta_, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(ours.variances_, theirs.var_, rtol=1e-8)
    np.testing.assert_allclose(ours.predict_log_proba(X), theirs.predict_log_proba(table), rtol=1e-8, atol=1e-8)

    def batches(model, X, y, **first):
        for part in np.array_split(np.arange(m), 10):
            part = slice(part[0], part[-1] + 1)
            model.partial_fit(X[part], y[part], **first)

    return timed(
        lambda: N.GaussianNaiveBayes(shared_variance=False).fit(X, y),
        lambda: GaussianNB().fit(table, labels),
        lambda: ours.predict_log_proba(X),
        lambda: theirs.predict_log_proba(table),
        lambda: batches(N.GaussianNaiveBayes(shared_variance=False), X, y, num_classes=classes),
        lambda: batches(GaussianNB(), table, labels, classes=np.arange(classes)),
        repeats=repeats,
    )


def _shared(m, n, classes, repeats):
    """Milliseconds of fit and predict with shared variances: ours, discriminant analysis with a diagonal covariance, logistic regression."""
    X, y = _data(m, n, classes)
    table, labels = X.numpy(), y.numpy()
    peer = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=Diagonal())
    logistic = LogisticRegression(max_iter=1000)
    ours = N.GaussianNaiveBayes(0.0).fit(X, y)
    np.testing.assert_allclose(ours.weight_, peer.fit(table, labels).coef_, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(ours.bias_, peer.intercept_, rtol=1e-8, atol=1e-8)
    assert (ours.predict(X).numpy() == peer.predict(table)).all()
    return timed(
        lambda: N.GaussianNaiveBayes(0.0).fit(X, y),
        lambda: peer.fit(table, labels),
        lambda: ours.predict(X),
        lambda: peer.predict(table),
        lambda: logistic.fit(table, labels),
        repeats=repeats,
    )


def _fit_memory(ours, m, n, classes):
    """Megabytes at the peak of one fit."""
    X, y = _data(m, n, classes)
    table, labels = X.numpy(), y.numpy()
    if ours:
        return peak_memory(lambda: N.GaussianNaiveBayes(shared_variance=False).fit(X, y))
    return peak_memory(lambda: GaussianNB().fit(table, labels))


def _fit_time(m, n, classes):
    """Milliseconds of one fit."""
    X, y = _data(m, n, classes)
    return timed(lambda: N.GaussianNaiveBayes().fit(X, y), repeats=9)[0]


def run() -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    rows, slopes = [], []
    for m, n, classes, repeats in ((1000, 64, 10, 50), (10_000, 512, 10, 15), (10_000, 512, 100, 9)):
        size = f"{m} × {n}, {classes} classes"
        found = in_fresh_process(_own, m, n, classes, repeats)
        memory = [in_fresh_process(_fit_memory, ours, m, n, classes) for ours in (True, False)]
        for place, name in enumerate(("fit", "predict_log_proba", "partial_fit, 10 batches")):
            ours, peer = found[2 * place : 2 * place + 2]
            extra = dict(memory_mb=memory[0], memory_peer_mb=memory[1]) if name == "fit" else {}
            rows.append(
                Row(PART, SLUG, f"{name}, own variances", "sklearn GaussianNB", size, ours, peer, ours / peer,
                    note=bar(ours / peer, 3, "ratio"), **extra)
            )  # fmt: skip
        ours, peer, ours_predict, peer_predict, logistic = in_fresh_process(_shared, m, n, classes, min(repeats, 7))
        peer_name = "sklearn discriminant analysis, diagonal"
        for name, a, b in (
            ("fit, shared variances", ours, peer),
            ("predict, shared variances", ours_predict, peer_predict),
        ):
            rows.append(Row(PART, SLUG, name, peer_name, size, a, b, a / b, note=bar(a / b, 3, "ratio")))
        rows.append(
            Row(
                PART, SLUG, "fit, shared variances", "sklearn LogisticRegression", size, ours, logistic, ours / logistic
            )
        )
    samples, features, classes = (4096, 8192, 16384, 32768), (64, 128, 256, 512), (8, 32, 128, 512)
    times = [in_fresh_process(_fit_time, m, 128, 10) for m in samples]
    slopes.append(
        Slope(
            "GaussianNaiveBayes.fit",
            "time",
            f"m = {samples[0]} to {samples[-1]}, n = 128",
            exponent(samples, times),
            "1 (O(mn))",
        )
    )
    times = [in_fresh_process(_fit_time, 8192, n, 10) for n in features]
    slopes.append(
        Slope(
            "GaussianNaiveBayes.fit",
            "time",
            f"n = {features[0]} to {features[-1]}, m = 8192",
            exponent(features, times),
            "1 (O(mn))",
        )
    )
    times = [in_fresh_process(_fit_time, 8192, 128, k) for k in classes]
    slopes.append(
        Slope(
            "GaussianNaiveBayes.fit",
            "time",
            f"K = {classes[0]} to {classes[-1]}, m = 8192, n = 128",
            exponent(classes, times),
            "about 0 (O(mn))",
        )
    )
    return rows, slopes
