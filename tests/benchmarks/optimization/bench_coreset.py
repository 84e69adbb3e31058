"""The loop against a fit to all points and against growing uniform samples, to the same excess cost; vector summation against numpy and scipy; slopes."""

import time

import numpy as np
import torch
from harness import Row, Slope, bar, exponent, in_fresh_process, peak_memory, timed
from scipy.optimize import nnls

from lossbook.optimization import coreset as A

PART, SLUG = "optimization", "coreset"
TARGET = 0.05  # excess cost


def _problem(n, d):
    """Logistic regression with a tenth of positives."""
    X = torch.randn(n, d, dtype=torch.float64)
    y = torch.where(X[:, :3].sum(1) + torch.randn(n, dtype=torch.float64) > 2.5, 1, -1)
    return A.LogisticRegressionProblem(X, y)


def _to_target(n, d, repeats):
    """Medians of milliseconds to an excess cost of TARGET: the loop, uniform samples of doubled size, and a fit to all points, whose time is that of the best."""
    problem, seconds = _problem(n, d), ([], [], [])
    best = problem.full_cost(problem.fit_all())
    limit = best * (1 + TARGET)
    for seed in range(repeats):
        start = time.perf_counter()
        problem.fit_all()
        seconds[2].append(time.perf_counter() - start)
        for place, coreset_of in enumerate((_loop, _uniform)):
            generator = torch.Generator().manual_seed(seed)
            start, size = time.perf_counter(), 50
            while True:  # both start at 50 points, and double until the full cost of a model is low enough
                if coreset_of(problem, size, generator) <= limit:
                    break
                size *= 2
            seconds[place].append(time.perf_counter() - start)
    return [1e3 * float(np.median(s)) for s in seconds]


def _loop(problem, size, generator):
    found = A.auto_coreset(
        problem.n, problem.loss_vector, problem.fit, size, labels=problem.labels, by_class=False, generator=generator
    )
    return min(row.cost for row in found.history)


def _uniform(problem, size, generator):
    while True:
        sample = A.uniform_coreset(problem.n, size, generator=generator)
        if len(problem.labels[sample.indices].unique()) == 2:
            return problem.full_cost(problem.fit(sample.indices, sample.weights))


def _sampling(n, k, size, repeats):
    """Milliseconds of sensitivity sampling: ours, and numpy's choice with the same probabilities."""
    matrix = torch.rand(n, k, dtype=torch.float64) ** 3
    table = matrix.numpy()

    def numpy_sample():
        lengths = np.sqrt((table**2).sum(1))
        p = lengths / lengths.sum()
        draws, counts = np.unique(np.random.default_rng().choice(n, size, p=p), return_counts=True)
        return draws, counts / (size * p[draws])

    ours, (draws, weights) = A.sensitivity_sample(matrix, size), numpy_sample()
    for sums in (ours.cost(matrix).numpy(), weights @ table[draws]):  # both within five standard errors of the sums
        error = np.linalg.norm(sums - table.sum(0))
        assert error < 5 * A.expected_sampling_error(matrix, size).sqrt().item()
    lengths = matrix.norm(dim=1)
    unit = lengths.sum() / (size * lengths)
    counts = weights / unit[draws].numpy()
    np.testing.assert_allclose(counts, counts.round(), rtol=1e-9)
    return timed(lambda: A.sensitivity_sample(matrix, size), numpy_sample, repeats=repeats)


def _exact(n, k, repeats):
    """Milliseconds of exact summation: ours, and scipy's non-negative least squares, whose solutions have as few points."""
    matrix = torch.rand(n, k, dtype=torch.float64)
    system = np.column_stack([matrix.numpy(), np.ones(n)]).T
    sums = system.sum(1)
    ours, theirs = A.caratheodory(matrix), nnls(system, sums)[0]
    assert len(ours) <= k + 1 and (theirs > 0).sum() <= k + 1
    np.testing.assert_allclose(system[:, ours.indices] @ ours.weights.numpy(), sums, rtol=1e-8)
    np.testing.assert_allclose(system @ theirs, sums, rtol=1e-6)
    return timed(lambda: A.caratheodory(matrix), lambda: nnls(system, sums), repeats=repeats)


def _time(kind, n, k, size):
    """Milliseconds of one call."""
    matrix = torch.rand(n, k, dtype=torch.float64)
    calls = {
        "sensitivity_sample": lambda: A.sensitivity_sample(matrix, size),
        "expected_sampling_error": lambda: A.expected_sampling_error(matrix, size),
        "summation_error": lambda: A.summation_error(matrix, small),
        "uniform_coreset": lambda: A.uniform_coreset(n, size),
        "best_of_means": lambda: A.best_of_means(matrix, 200, trials=size),
        "caratheodory": lambda: A.caratheodory(matrix, size=size),
    }
    small = A.uniform_coreset(n, 100)
    return timed(calls[kind], repeats=7)[0]


def _memory(n, k):
    """Megabytes at the peak of a sample."""
    matrix = torch.rand(n, k, dtype=torch.float64)
    return peak_memory(lambda: A.sensitivity_sample(matrix, 100))


def _loop_time(n):
    """Milliseconds of ten rounds for medians, whose solver costs next to nothing."""
    x = torch.randn(n, dtype=torch.float64)

    def median(indices, weights):
        values, order = x[indices].sort()
        return values[(weights[order].cumsum(0) >= weights.sum() / 2).nonzero()[0]]

    return timed(
        lambda: A.auto_coreset(n, lambda m: (x - m).abs(), median, 100, patience=10, max_rounds=10), repeats=5
    )[0]


SLOPES = (
    ("sensitivity_sample", "n", (100_000, 200_000, 400_000, 800_000), dict(k=16, size=100), "1 (O(nk))"),
    ("sensitivity_sample", "k", (16, 32, 64, 128), dict(n=100_000, size=100), "at most 1 (O(nk))"),
    ("expected_sampling_error", "n", (100_000, 200_000, 400_000, 800_000), dict(k=16, size=100), "1 (O(nk))"),
    ("summation_error", "n", (100_000, 200_000, 400_000, 800_000), dict(k=16, size=100), "1 (O(nk))"),
    ("uniform_coreset", "n", (1_000_000, 2_000_000, 4_000_000), dict(k=1, size=100), "1 (O(n + size log size))"),
    ("best_of_means", "size", (1000, 2000, 4000, 8000), dict(n=10_000, k=16), "1 (O((n + trials size) k))"),
    ("caratheodory", "n", (200_000, 400_000, 800_000, 1_600_000), dict(k=4, size=None), "1 (O(nk + t k^3 log(n/t)))"),
    ("caratheodory", "size", (50, 100, 200, 400), dict(n=20_000, k=8), "below 1 (O(nk + t k^3 log(n/t)))"),
)


def run() -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    rows, slopes = [], []
    for n, d, repeats in ((10_000, 10, 9), (200_000, 10, 5), (200_000, 50, 3)):
        ours, uniform, full = in_fresh_process(_to_target, n, d, repeats)
        size, name = f"{n} points, {d} features", f"time to an excess cost of {TARGET:.0%}"
        rows.append(Row(PART, SLUG, name, "fit to all points (sklearn)", size, ours, full, ours / full))
        rows.append(Row(PART, SLUG, name, "uniform samples, doubled", size, ours, uniform, ours / uniform))
    for n, k, tau in ((10_000, 16, 100), (500_000, 16, 100)):
        ours, peer = in_fresh_process(_sampling, n, k, tau, 9)
        rows.append(
            Row(PART, SLUG, "sensitivity_sample", "numpy choice with p", f"{n} × {k}", ours, peer, ours / peer,
                note=bar(ours / peer, 2, "ratio"))
        )  # fmt: skip
    for n, k in ((2000, 4), (20_000, 4), (20_000, 16)):
        ours, peer = in_fresh_process(_exact, n, k, 5)
        rows.append(Row(PART, SLUG, "caratheodory", "scipy nnls", f"{n} × {k}", ours, peer, ours / peer))
    for name, what, values, fixed, claim in SLOPES:
        times = [
            in_fresh_process(_time, name, *(dict(fixed, **{what: v})[key] for key in ("n", "k", "size")))
            for v in values
        ]
        label = "trials" if name == "best_of_means" else what
        others = ", ".join(f"{key} = {value}" for key, value in fixed.items() if value is not None)
        slopes.append(
            Slope(name, "time", f"{label} = {values[0]} to {values[-1]}, {others}", exponent(values, times), claim)
        )
    numbers = (50_000, 100_000, 200_000, 400_000)
    times = [in_fresh_process(_loop_time, n) for n in numbers]
    slopes.append(
        Slope(
            "auto_coreset, 13 fits",
            "time",
            f"n = {numbers[0]} to {numbers[-1]}",
            exponent(numbers, times),
            "1 (O(nk) a round)",
        )
    )
    numbers = (1_000_000, 2_000_000, 4_000_000)
    memory = [in_fresh_process(_memory, n, 2) for n in numbers]
    slopes.append(
        Slope(
            "sensitivity_sample",
            "memory",
            f"n = {numbers[0]} to {numbers[-1]}, k = 2",
            exponent(numbers, memory),
            "1 (O(n))",
        )
    )
    return rows, slopes
