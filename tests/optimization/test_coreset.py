"""The theorems of chapter optimization/coreset as properties; enumeration, closed forms, the loop, scikit-learn's objectives, bad input."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lossbook.optimization import coreset as A

D = torch.float64
seeds = st.integers(0, 2**31)
few = settings(deadline=None, max_examples=40)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed), dtype=D)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=D)


def embedded(coreset, n):
    """The weights of the coreset as a vector of n."""
    v = torch.zeros(n, dtype=D)
    v[coreset.indices] = coreset.weights.double()
    return v


# ---------------------------------------------------------------------------------------------------------------------
# Costs and sums
# ---------------------------------------------------------------------------------------------------------------------


@given(seeds)
@few
def test_cost_is_the_weighted_sum(seed):
    n, k = 9, 3
    matrix, v = rand(n, k, seed=seed), rand(n, seed=seed + 1)
    v[rand(n, seed=seed + 2) < 0.5] = 0
    support = v.nonzero().flatten()
    coreset = A.Coreset(support, v[support])
    slow = [sum(float(v[i]) * float(matrix[i, j]) for i in range(n)) for j in range(k)]
    assert coreset.cost(matrix).tolist() == pytest.approx(slow)
    assert coreset.cost(matrix[:, 1]).item() == pytest.approx(slow[1]) and len(coreset) == len(support)
    w = rand(n, seed=seed + 3)
    full = [sum(float(w[i]) * float(matrix[i, j]) for i in range(n)) for j in range(k)]
    error = math.dist(slow, full)
    assert A.summation_error(matrix, coreset, w).item() == pytest.approx(error)
    ones = math.dist(slow, matrix.sum(0).tolist())
    assert A.summation_error(matrix, coreset).item() == pytest.approx(ones)


@given(seeds)
@few
def test_span_bound(seed):
    """thm-coreset-span, for arbitrary weights and queries."""
    n, k = 20, 4
    matrix, alpha = rand(n, k, seed=seed), randn(k, seed=seed + 1)
    v, w = rand(n, seed=seed + 2), rand(n, seed=seed + 3)
    loss = matrix @ alpha + 0.1 * randn(n, seed=seed + 4)
    coreset = A.Coreset(torch.arange(n), v)
    delta = A.summation_error(matrix, coreset, w)
    rho = (loss - matrix @ alpha).abs().max()
    gap = (coreset.cost(loss) - w @ loss).abs()
    assert gap <= delta * alpha.norm() + rho * (v.sum() + w.sum()) + 1e-12


@given(seeds)
@few
def test_span_bound_is_reached(seed):
    """With alpha along the error of the sums, and the rest along the sign of the weights' difference, it is an equality."""
    n, k, rho = 12, 3, 0.2
    matrix, v, w = rand(n, k, seed=seed), rand(n, seed=seed + 1), torch.zeros(n, dtype=D)
    w[0] = 1e-9  # with almost no weight on the other side, the l1 norms of v and w add up to that of v - w
    alpha = v @ matrix - w @ matrix
    loss = matrix @ alpha + rho * (v - w).sign()
    coreset = A.Coreset(torch.arange(n), v)
    bound = A.summation_error(matrix, coreset, w) * alpha.norm() + rho * (v.sum() + w.sum())
    assert (coreset.cost(loss) - w @ loss).item() == pytest.approx(bound.item(), rel=1e-8)


def test_chord_bound_of_convex_losses():
    """prop-coreset-hull: up to 1 + eps the coreset's cost lies below the chords of the full one, on the hull of the queries."""
    x = randn(200, seed=0)
    queries = torch.tensor([-1.0, 0.5, 2.0], dtype=D)
    matrix = (x[:, None] - queries).abs()
    coreset = A.sensitivity_sample(matrix, 40, generator=generator(1))
    eps = (coreset.cost(matrix) / matrix.sum(0) - 1).abs().max()
    for seed in range(50):
        alpha = torch.softmax(randn(3, seed=seed), 0)
        loss = (x - alpha @ queries).abs()
        assert coreset.cost(loss) <= (1 + eps) * (alpha @ matrix.sum(0)) + 1e-9


@given(seeds)
@few
def test_excess_of_the_coresets_solution(seed):
    """prop-coreset-append, for the mean of points on a line, where both solutions are closed forms."""
    x = randn(60, seed=seed)
    coreset = A.uniform_coreset(60, 30, weights=torch.ones(60, dtype=D), generator=generator(seed))
    points, v = x[coreset.indices], coreset.weights
    ours, best = (v @ points) / v.sum(), x.mean()
    full = [float(((x - c) ** 2).sum()) for c in (ours, best)]
    small = [float(v @ (points - c) ** 2) for c in (ours, best)]
    eps = max(abs(s / f - 1) for s, f in zip(small, full, strict=True))
    assert small[0] <= small[1] + 1e-12
    if eps < 1:
        assert full[0] <= (1 + eps) / (1 - eps) * full[1] + 1e-9


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


def enumerated(matrix, weights, p, size):
    """Mean and mean square error of the sums over all sequences of draws, with their probabilities."""
    n, s = len(matrix), weights @ matrix
    mean, square = torch.zeros_like(s), 0.0
    for draws in itertools.product([i for i in range(n) if p[i] > 0], repeat=size):
        chance = math.prod(float(p[i]) for i in draws)
        total = sum(weights[i] * matrix[i] / (size * p[i]) for i in draws)
        mean, square = mean + chance * total, square + chance * float((total - s).square().sum())
    return mean, square


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [1, 3])
def test_expected_error_by_enumeration(mix, size):
    matrix, weights = rand(5, 2, seed=3), torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0], dtype=D)
    matrix[1] = 0
    lengths = weights * matrix.norm(dim=1)
    p = (1 - mix) * lengths / lengths.sum() + mix / 5
    mean, square = enumerated(matrix, weights, p, size)
    torch.testing.assert_close(mean, weights @ matrix)
    assert A.expected_sampling_error(matrix, size, weights, mix=mix).item() == pytest.approx(square)


@pytest.mark.parametrize("weighted", [False, True])
def test_sampling_is_unbiased_with_the_stated_error(weighted):
    n, size, repeats = 30, 5, 20_000
    matrix = rand(n, 3, seed=1) ** 3
    weights = rand(n, seed=2) + 0.1 if weighted else None
    s = matrix.sum(0) if weights is None else weights @ matrix
    g = generator(0)
    sums = torch.stack(
        [A.sensitivity_sample(matrix, size, weights=weights, generator=g).cost(matrix) for _ in range(repeats)]
    )
    error = sums.std(0) / math.sqrt(repeats)
    assert ((sums.mean(0) - s).abs() < 4 * error).all()
    measured = (sums - s).square().sum(1).mean()
    expected = A.expected_sampling_error(matrix, size, weights)
    assert measured / expected == pytest.approx(1, abs=0.05)


def test_uniform_sampling_is_unbiased_with_the_stated_error():
    n, size = 30, 5
    matrix, weights, g = rand(n, 3, seed=1), rand(n, seed=2), generator(0)
    sums = torch.stack([A.uniform_coreset(n, size, weights=weights, generator=g).cost(matrix) for _ in range(10_000)])
    s = weights @ matrix
    assert ((sums.mean(0) - s).abs() < 4 * sums.std(0) / 100).all()
    measured = (sums - s).square().sum(1).mean()
    assert measured / A.expected_sampling_error(matrix, size, weights, mix=1) == pytest.approx(1, abs=0.05)


@given(seeds)
@few
def test_error_bounds(seed):
    """thm-coreset-sampling: no other p does better, and (k - 1)/tau |s|^2 for losses of at least 0; uniform (n - 1)/tau |s|^2."""
    n, k = 12, 4
    matrix, weights = rand(n, k, seed=seed) ** 4, rand(n, seed=seed + 1)
    square = (weights @ matrix).square().sum()
    error = A.expected_sampling_error(matrix, 7, weights)
    assert error <= (k - 1) / 7 * square * (1 + 1e-12)
    assert A.expected_sampling_error(matrix, 7, weights, mix=1) <= (n - 1) / 7 * square * (1 + 1e-12)
    p = torch.softmax(randn(n, seed=seed + 2), 0)
    other = ((weights * matrix.norm(dim=1)).square() / p).sum() - square
    assert error <= other / 7 * (1 + 1e-12)
    assert A.expected_sampling_error(matrix, 14, weights) == pytest.approx(error.item() / 2)


def test_bounds_are_tight():
    assert A.expected_sampling_error(torch.eye(2, dtype=D), 4).sqrt().item() == pytest.approx(math.sqrt(0.5))
    heavy = torch.zeros(10, 2, dtype=D)
    heavy[3] = torch.tensor([3.0, 4.0])
    assert A.expected_sampling_error(heavy, 2, mix=1).item() == pytest.approx(9 / 2 * 25)
    assert A.expected_sampling_error(heavy, 2).item() == 0


def test_one_column_is_exact_for_every_draw():
    matrix, g = rand(100, 1, seed=0) ** 5, generator(0)
    for _ in range(50):
        assert A.summation_error(matrix, A.sensitivity_sample(matrix, 3, generator=g)) < 1e-10 * matrix.sum()


def test_equal_rows_have_equal_weights():
    matrix = torch.ones(50, 3)
    coreset = A.sensitivity_sample(matrix, 10, generator=generator(0))
    counts = coreset.weights / 5
    torch.testing.assert_close(counts, counts.round())
    assert coreset.weights.sum().item() == pytest.approx(50) and coreset.weights.dtype == torch.float32


@pytest.mark.parametrize("seed", range(10))
def test_heavy_point(seed):
    matrix = rand(200, 3, seed=seed)
    matrix[0] *= 1000
    norm = matrix.sum(0).norm()
    assert A.expected_sampling_error(matrix, 5).sqrt() / norm < 0.3
    assert A.expected_sampling_error(matrix, 5, mix=1).sqrt() / norm > 2.5


def test_rows_without_length_are_never_drawn_unless_all_are():
    matrix = rand(40, 2, seed=0)
    matrix[::2] = 0
    g = generator(0)
    for _ in range(50):
        assert (A.sensitivity_sample(matrix, 30, generator=g).indices % 2 == 1).all()
    weights = torch.ones(40, dtype=D)
    weights[1::4] = 0
    assert (A.sensitivity_sample(matrix, 300, weights=weights, generator=g).indices % 4 == 3).all()
    empty = A.sensitivity_sample(torch.zeros(40, 2), 200, weights=weights.float(), generator=g)
    assert len(empty) > 30 and empty.weights.max() > 0
    assert A.expected_sampling_error(torch.zeros(4, 2), 3).item() == 0
    lone = torch.zeros(5, 2)
    lone[-1] = 1
    assert A.sensitivity_sample(lone, 20, generator=g).indices.tolist() == [4]


def test_the_least_uniform_number_draws_no_empty_row(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda size, **options: torch.zeros(size, dtype=D))
    assert A.sensitivity_sample(torch.tensor([[0.0], [0.0], [2.0], [1.0]]), 3).indices.tolist() == [2]


def test_mix_bounds_the_weights():
    matrix = torch.cat([torch.full((1, 2), 1e6), torch.full((99, 2), 1e-6)])
    coreset = A.sensitivity_sample(matrix, 500, mix=0.1, generator=generator(0))
    counts = coreset.weights[1:] / (100 / (500 * 0.1))
    assert len(coreset) > 20 and torch.allclose(counts, counts.round(), atol=1e-4)


def test_exercise_by_hand():
    matrix = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 5.0]])
    coreset = A.Coreset(torch.tensor([0, 2]), torch.tensor([1.0, 1.0]))
    assert coreset.cost(matrix).tolist() == [3, 9]
    drawn = A.sensitivity_sample(matrix, 2, generator=generator(3))
    assert set(drawn.weights.tolist()) <= {1.0, 2.0}


def test_best_of_means_is_uniform_with_one_trial():
    matrix, weights = rand(80, 3, seed=0), rand(80, seed=1)
    one = A.best_of_means(matrix, 12, trials=1, weights=weights, generator=generator(5))
    other = A.uniform_coreset(80, 12, weights=weights, generator=generator(5))
    assert torch.equal(one.indices, other.indices) and torch.allclose(one.weights, other.weights)


def test_best_of_means_is_the_best():
    matrix, weights = randn(80, 3, seed=0), rand(80, seed=1)
    got = A.best_of_means(matrix, 12, trials=20, weights=weights, generator=generator(5))
    draws = torch.randint(80, (20, 12), generator=generator(5))
    errors = [float(((80 / 12 * weights[d, None] * matrix[d]).sum(0) - weights @ matrix).norm()) for d in draws]
    assert A.summation_error(matrix, got, weights).item() == pytest.approx(min(errors))
    assert set(got.indices.tolist()) == set(draws[int(np.argmin(errors))].tolist())


def test_uniform_by_class():
    labels = torch.tensor([-1] * 90 + [1] * 10)
    weights = rand(100, seed=0)
    g = generator(0)
    coresets = [A.uniform_coreset(100, 20, weights=weights, labels=labels, generator=g) for _ in range(3000)]
    n_0, n_1 = A.allocate_by_class(labels, 20).tolist()
    unit = torch.where(labels == -1, 90 / n_0, 10 / n_1) * weights
    for coreset in coresets[:20]:
        counts = coreset.weights / unit[coreset.indices]
        torch.testing.assert_close(counts, counts.round())
        assert counts[coreset.indices < 90].sum().item() == pytest.approx(n_0)
        assert counts.sum().item() == pytest.approx(20)
    mean = torch.stack([embedded(c, 100) for c in coresets]).mean(0)
    assert (mean - weights).abs().mean() < 0.06 and mean.sum() == pytest.approx(weights.sum().item(), rel=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Caratheodory
# ---------------------------------------------------------------------------------------------------------------------


@given(seeds)
@few
def test_exact_on_the_span(seed):
    matrix = rand(50, 4, seed=seed)
    coreset = A.caratheodory(matrix)
    assert len(coreset) <= 5 and (coreset.weights > 0).all()
    assert coreset.weights.sum().item() == pytest.approx(50, rel=1e-12)
    for alpha in randn(20, 4, seed=seed + 1):
        assert abs(coreset.cost(matrix @ alpha) - (matrix @ alpha).sum()) < 1e-10


@given(seeds, st.integers(1, 6), st.booleans(), st.sampled_from([None, 3, 40]))
@few
def test_caratheodory_preserves_sums(seed, k, preserve_total, size):
    n = 300
    matrix, weights = randn(n, k, seed=seed), rand(n, seed=seed + 1)
    weights[rand(n, seed=seed + 2) < 0.3] = 0
    coreset = A.caratheodory(matrix, weights, size=size, preserve_total=preserve_total)
    assert len(coreset) <= max(size or 1, k + preserve_total)
    assert (weights[coreset.indices] > 0).all() and (coreset.weights > 0).all()
    assert A.summation_error(matrix, coreset, weights) < 1e-9
    if preserve_total:
        assert coreset.weights.sum().item() == pytest.approx(weights.sum().item(), rel=1e-12)


def test_the_boosted_rounds():
    n, k = 1000, 3
    matrix, weights = rand(n, k, seed=0), rand(n, seed=1)
    weights[::3] = 0
    for size, limit in ((None, 4), (50, 50)):
        coreset = A.caratheodory(matrix, weights, size=size)
        assert len(coreset) <= limit and (size is None or len(coreset) > 25)
        assert A.summation_error(matrix, coreset, weights) < 1e-10
        assert coreset.weights.sum().item() == pytest.approx(weights.sum().item(), rel=1e-12)


def test_the_total_is_not_preserved_by_itself():
    matrix = rand(200, 3, seed=0)
    conic = A.caratheodory(matrix, preserve_total=False)
    assert len(conic) <= 3 and A.summation_error(matrix, conic) < 1e-9
    assert abs(conic.weights.sum() - 200) > 1


def test_few_points_are_returned_unchanged():
    matrix, weights = rand(5, 4, seed=0), rand(5, seed=1)
    weights[2] = 0
    coreset = A.caratheodory(matrix, weights)
    assert coreset.indices.tolist() == [0, 1, 3, 4] and torch.equal(coreset.weights, weights[[0, 1, 3, 4]])
    whole = A.caratheodory(rand(30, 2, seed=0), size=30)
    assert torch.equal(whole.weights, torch.ones(30, dtype=D)) and len(whole) == 30


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_columns_of_different_size_and_rank(scale):
    matrix = torch.cat([rand(400, 2, seed=0), scale * rand(400, 1, seed=1), torch.zeros(400, 1, dtype=D)], 1)
    matrix = torch.cat([matrix, matrix[:, :1]], 1)
    coreset = A.caratheodory(matrix)
    assert len(coreset) <= 6
    torch.testing.assert_close(coreset.cost(matrix), matrix.sum(0), rtol=1e-10, atol=0)
    zero = A.caratheodory(torch.zeros(9, 2, dtype=D), preserve_total=False)
    assert len(zero) == 0 and len(A.caratheodory(torch.zeros(9, 2, dtype=D))) <= 3


def test_single_precision_and_line():
    line = A.caratheodory(torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.full((4,), 0.25))
    assert len(line) == 2 and line.weights.dtype == torch.float32
    assert line.weights.sum().item() == pytest.approx(1)
    matrix = rand(500, 5, seed=0).float()
    assert A.summation_error(matrix, A.caratheodory(matrix)) < 1e-3
    for method in (A.sensitivity_sample, A.best_of_means):
        assert method(matrix, 10, generator=generator(0)).weights.dtype == torch.float32


def test_generic_queries_make_least_squares_exact():
    """cor-coreset-quadratics: six queries span the squared losses of a model with two coefficients."""
    n = 300
    X = torch.stack([torch.ones(n, dtype=D), randn(n, seed=0)], 1)
    y = X @ torch.tensor([1.0, -2.0], dtype=D) + randn(n, seed=1)
    queries = randn(6, 2, seed=2)
    matrix = (X @ queries.T - y[:, None]).square()
    assert torch.linalg.matrix_rank(matrix) == 6
    coreset = A.caratheodory(matrix)
    assert len(coreset) <= 7
    points, root = X[coreset.indices], coreset.weights.sqrt()
    small = torch.linalg.lstsq(root[:, None] * points, root * y[coreset.indices]).solution
    full = torch.linalg.lstsq(X, y).solution
    torch.testing.assert_close(small, full, rtol=0, atol=1e-8)
    other = (X @ randn(2, seed=9) - y).square()
    assert coreset.cost(other).item() == pytest.approx(other.sum().item(), rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Class sizes
# ---------------------------------------------------------------------------------------------------------------------


def test_class_sizes_of_the_digits():
    labels = torch.tensor([-1] * 1623 + [1] * 174)
    assert A.allocate_by_class(labels, 50).tolist() == [21, 29]
    assert A.allocate_by_class(labels.flip(0), 50).tolist() == [21, 29]
    assert A.allocate_by_class(torch.zeros(9, dtype=torch.int64), 4).tolist() == [4]
    assert A.allocate_by_class(torch.arange(4).repeat(5), 9).sum() == 9


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(0, 1))
@few
def test_class_sizes_add_up(counts, part):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    size = len(counts) + round(part * (len(labels) - len(counts)))
    sizes = A.allocate_by_class(labels, size)
    assert sizes.sum() == size and (sizes >= 1).all() and (sizes <= torch.tensor(counts)).all()
    if len(counts) > 1:
        share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
        policies = torch.stack([share, -share.log(), (-share).exp()])
        quota = size * (policies / policies.sum(1, keepdim=True)).mean(0)
        greedy = torch.ones_like(sizes)  # point by point, to the class that misses most
        for _ in range(size - len(counts)):
            greedy[torch.where(greedy < torch.tensor(counts), quota - greedy, -torch.inf).argmax()] += 1
        assert sizes.tolist() == greedy.tolist()
        # where no bound is met, sizes are the quota rounded down or up
        if (quota > 1).all() and (quota.ceil() < torch.tensor(counts)).all():
            assert ((sizes - quota).abs() < 1).all()
            up = sizes > quota
            rest = quota - quota.floor()
            assert not up.any() or up.all() or rest[up].min() >= rest[~up].max() - 1e-9


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


def least_squares(n=200, d=3, seed=0, weights=None):
    X = randn(n, d, seed=seed)
    y = X @ randn(d, seed=seed + 1) + randn(n, seed=seed + 2)
    return A.LinearRegressionProblem(X, y, weights=weights)


def logistic(n=300, d=3, seed=0, weights=None, C=1.0):
    X = randn(n, d, seed=seed)
    y = torch.where(X[:, 0] + randn(n, seed=seed + 1) > 1.5, 1, -1)
    return A.LogisticRegressionProblem(X, y, weights=weights, C=C)


@pytest.mark.parametrize("method", A.METHODS)
def test_loop_by_hand(method):
    """Every column is the loss of the model fitted to that round's coreset, which sums the columns before it."""
    weights = rand(200, seed=7) + 0.2
    problem = least_squares(weights=weights)
    fits = []

    def fit(indices, v):
        fits.append((indices, v))
        return problem.fit(indices, v)

    result = A.auto_coreset(200, problem.loss_vector, fit, 30, weights=weights, method=method, generator=generator(0))
    M, k = result.loss_matrix, result.num_fits
    assert M.shape == (200, k) and len(fits) == k == 3 + len(result.history) and len(result.initial_costs) == 3
    g, costs = generator(0), weights @ M
    for j in range(k):
        if j < 3:
            again = A.uniform_coreset(200, 30, weights=weights, generator=g)
        elif method == "caratheodory":
            again = A.caratheodory(M[:, :j], weights, size=30)
        else:
            sample = getattr(A, {"sensitivity": "sensitivity_sample"}.get(method, method))
            again = sample(M[:, :j], 30, weights=weights, generator=g)
        indices, v = fits[j]
        assert torch.equal(again.indices, indices) and torch.allclose(again.weights, v, rtol=1e-6)
        torch.testing.assert_close(problem.loss_vector(problem.fit(indices, v)), M[:, j])
        if j < 3:
            assert result.initial_costs[j] == pytest.approx(costs[j].item())
        else:
            row = result.history[j - 3]
            assert row.cost == pytest.approx(costs[j].item()) and row.points == len(indices)
            assert row.coreset_cost == pytest.approx((v @ M[indices, j]).item())
    best = min(range(3, k), key=lambda j: result.history[j - 3].cost)
    assert torch.equal(result.coreset.indices, fits[best][0])
    assert problem.full_cost(result.model) == pytest.approx(min(row.cost for row in result.history))


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_patience(patience):
    """A scripted sequence of costs: the worst initial one is to be beaten, and each improvement starts the count anew."""
    costs = [5.0, 9.0, 7.0] + [8.0, 8.5, 6.0, 6.1, 6.0, 5.0, 5.5, 5.5, 5.5, 5.5, 5.5, 1.0]
    calls = iter(costs)
    result = A.auto_coreset(
        4, lambda model: torch.full((4,), model / 4, dtype=D), lambda i, v: next(calls), 2, patience=patience, generator=generator(0)
    )  # fmt: skip
    assert result.initial_costs == costs[:3]
    assert len(result.history) == {1: 2, 2: 5, 5: 11}[patience]
    assert [row.cost for row in result.history] == costs[3 : 3 + len(result.history)]
    assert result.model == min(costs[3 : 3 + len(result.history)])


def test_improvements_below_the_tolerance_are_none():
    calls = iter(1 - 1e-9 * j for j in range(100))
    result = A.auto_coreset(4, lambda m: torch.full((4,), m, dtype=D), lambda i, v: next(calls), 2, patience=3)
    assert len(result.history) == 3
    calls = iter(1 - 1e-3 * j for j in range(100))
    result = A.auto_coreset(
        4, lambda m: torch.full((4,), m, dtype=D), lambda i, v: next(calls), 2, patience=3, max_rounds=20
    )
    assert len(result.history) == 20


def test_caratheodory_stops_before_it_needs_more_points_than_there_may_be():
    problem = least_squares(n=60)
    options = dict(method="caratheodory", patience=50)
    result = A.auto_coreset(60, problem.loss_vector, problem.fit, 8, generator=generator(0), **options)
    assert result.num_fits == 8 and max(row.points for row in result.history) <= 8
    labels = torch.tensor([0] * 40 + [1] * 20)
    sizes = A.allocate_by_class(labels, 16)
    for by_class, limit in ((True, int(sizes.min())), (False, 16)):
        result = A.auto_coreset(
            60, problem.loss_vector, problem.fit, 16, labels=labels, by_class=by_class, generator=generator(0), **options
        )  # fmt: skip
        assert result.num_fits == limit and max(row.points for row in result.history) <= 16
    with pytest.raises(ValueError, match=r"size must give each class more than num_init, 3, points, got \[3\]"):
        A.auto_coreset(60, problem.loss_vector, problem.fit, 3, **options)


def test_all_points_are_a_coreset():
    problem = least_squares()
    best = problem.full_cost(problem.fit_all())
    result = A.auto_coreset(200, problem.loss_vector, problem.fit, 200, method="caratheodory", generator=generator(0))
    assert result.history[0].cost == pytest.approx(best, rel=1e-6)
    assert result.coreset.indices.tolist() == list(range(200))


@pytest.mark.parametrize("method", A.METHODS)
def test_same_generator_same_coreset(method):
    problem = logistic()
    runs = [
        A.auto_coreset(
            300, problem.loss_vector, problem.fit, 40, method=method, labels=problem.labels, generator=generator(4)
        )
        for _ in range(2)
    ]
    assert torch.equal(runs[0].coreset.indices, runs[1].coreset.indices)
    assert torch.equal(runs[0].loss_matrix, runs[1].loss_matrix)
    assert len(runs[0].coreset) <= 40


def test_classes_have_their_sizes():
    problem = logistic()
    sizes = A.allocate_by_class(problem.labels, 40).tolist()
    seen = []

    def fit(indices, v):
        seen.append((indices, v))
        return problem.fit(indices, v)

    A.auto_coreset(
        300, problem.loss_vector, fit, 40, method="caratheodory", labels=problem.labels, patience=2, generator=generator(0)
    )  # fmt: skip
    for indices, v in seen[3:]:
        for value, size in zip((-1, 1), sizes, strict=True):
            own = problem.labels[indices] == value
            assert own.sum() <= size
            assert v[own].sum().item() == pytest.approx(int((problem.labels == value).sum()))


def test_samples_without_a_class_are_drawn_again():
    labels = torch.tensor([0] * 95 + [1] * 5)
    seen = []
    for by_class in (True, False):
        A.auto_coreset(
            100, lambda m: torch.ones(100, dtype=D), lambda i, v: seen.append(i), 10, labels=labels, by_class=by_class,
            generator=generator(0),
        )  # fmt: skip
    assert all(len(labels[i].unique()) == 2 for i in seen)
    rare = torch.zeros(100_000, dtype=torch.int64)
    rare[0] = 1
    with pytest.raises(ValueError, match="size must be large enough"):
        A.auto_coreset(
            100_000, lambda m: torch.ones(100_000), lambda i, v: None, 2, labels=rare, generator=generator(0)
        )


def test_without_append_only_the_initial_columns_stay():
    problem = logistic()
    options = dict(labels=problem.labels, by_class=False, patience=50, max_rounds=4)
    with_, without = (
        A.auto_coreset(300, problem.loss_vector, problem.fit, 40, append=append, generator=generator(1), **options)
        for append in (True, False)
    )
    assert with_.loss_matrix.shape == (300, 7) and without.loss_matrix.shape == (300, 3)
    assert torch.equal(with_.loss_matrix[:, :3], without.loss_matrix)
    assert with_.history[0] == without.history[0] and with_.history[1] != without.history[1]
    assert without.num_fits == 7


def test_normalized_columns_do_not_depend_on_scale():
    """One bad initial model with losses a million times as large: normalized, the draws are those of the others."""
    problem = least_squares()
    seen = {}
    for scale in (1.0, 1e6):
        count = iter(range(1000))

        def loss(model, scale=scale, count=count):
            return problem.loss_vector(model) * (scale if next(count) == 0 else 1)

        for normalize in (True, False):
            count = iter(range(1000))
            result = A.auto_coreset(
                200, lambda m, count=count, scale=scale: problem.loss_vector(m) * (scale if next(count) == 0 else 1),
                problem.fit, 30, normalize=normalize, max_rounds=1, generator=generator(0),
            )  # fmt: skip
            seen[scale, normalize] = result.coreset.indices
    assert torch.equal(seen[1.0, True], seen[1e6, True])
    assert not torch.equal(seen[1.0, False], seen[1e6, False])


def test_arrays_and_torch_models_will_do():
    x = randn(100, seed=0)
    result = A.auto_coreset(
        100, lambda c: (x.numpy() - c) ** 2, lambda i, v: np.average(x.numpy()[i], weights=v.numpy()), 50, generator=generator(0)
    )  # fmt: skip
    assert abs(result.model - x.mean().item()) < 0.3

    def fit(indices, v):
        c = torch.zeros((), dtype=D, requires_grad=True)
        for _ in range(20):
            (grad,) = torch.autograd.grad(v @ (x[indices] - c) ** 2 / v.sum(), c)
            c = (c - 0.4 * grad).detach().requires_grad_()
        return c

    torch_result = A.auto_coreset(100, lambda c: (x - c) ** 2, fit, 50, generator=generator(0))
    assert torch_result.model.item() == pytest.approx(result.model, abs=1e-6)
    assert not torch_result.loss_matrix.requires_grad


def test_exact_sums_of_what_has_a_gradient():
    matrix = torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.rand(60, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found, plain = A.caratheodory(matrix, weights), A.caratheodory(matrix.detach(), weights.detach())
    assert found.indices.tolist() == plain.indices.tolist() and found.weights.tolist() == plain.weights.tolist()
    assert not found.weights.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Ready-made problems
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_logistic_cost_is_scikit_learns_objective(weighted):
    from scipy.special import expit

    w = rand(300, seed=8) if weighted else torch.ones(300, dtype=D)
    problem = logistic(weights=w if weighted else None, C=0.3)
    model = problem.fit_all()
    beta, b = model.coef_.ravel(), model.intercept_[0]
    margins = problem.y.numpy() * (problem.X.numpy() @ beta + b)
    objective = 0.5 * beta @ beta + 0.3 * (w.numpy() @ np.log1p(np.exp(-margins)))
    assert problem.full_cost(model) == pytest.approx(objective, rel=1e-12)
    pull = 0.3 * w.numpy() * problem.y.numpy() * expit(-margins)  # the gradient at the fit is zero
    np.testing.assert_allclose(beta - problem.X.numpy().T @ pull, 0, atol=1e-6)
    np.testing.assert_allclose(pull.sum(), 0, atol=1e-6)


def test_the_fit_minimizes_the_coresets_cost():
    """eq-coreset-penalty: with C scaled by the totals the fit to a coreset is stationary for F_v."""
    problem = logistic(C=0.5)
    coreset = A.uniform_coreset(300, 60, generator=generator(0))
    coreset = A.Coreset(coreset.indices, coreset.weights.double() * 1.7)  # a total that is not n
    model = problem.fit(coreset.indices, coreset.weights)
    cost = coreset.cost(problem.loss_vector(model)).item()
    for j in range(3):
        for step in (-1e-3, 1e-3):
            model.coef_[0, j] += step
            assert coreset.cost(problem.loss_vector(model)).item() > cost
            model.coef_[0, j] -= step
    model.intercept_ += 1e-3
    assert coreset.cost(problem.loss_vector(model)).item() > cost


def test_least_squares_and_clusters():
    weights = rand(200, seed=3)
    problem = least_squares(weights=weights)
    model = problem.fit_all()
    X = torch.cat([problem.X, torch.ones(200, 1, dtype=D)], 1)
    root = weights.sqrt()
    beta = torch.linalg.lstsq(root[:, None] * X, root * problem.y).solution
    assert problem.full_cost(model) == pytest.approx((weights @ (X @ beta - problem.y).square()).item())
    points = torch.cat([randn(30, 2, seed=0), randn(30, 2, seed=1) + 8])
    clusters = A.KMeansProblem(points, 2)
    model = clusters.fit_all()
    assert clusters.full_cost(model) == pytest.approx(model.inertia_)
    result = A.auto_coreset(60, clusters.loss_vector, clusters.fit, 20, generator=generator(0))
    assert min(r.cost for r in result.history) < 1.2 * clusters.full_cost(model)
    with pytest.raises(ValueError, match="indices must hold at least 2 points"):
        clusters.fit(torch.tensor([3]), torch.ones(1))


@pytest.mark.parametrize("offset", [0.0, 1e6, 1e8])
def test_clusters_far_from_zero(offset):
    points = randn(200, 2, seed=0) + offset
    problem = A.KMeansProblem(points, 30)
    model = problem.fit_all()
    slow = (points[:, None] - torch.as_tensor(model.cluster_centers_)).square().sum(-1).amin(1)
    torch.testing.assert_close(problem.loss_vector(model), slow, rtol=1e-12, atol=0)


@pytest.mark.parametrize("by_class", [False, True])
def test_points_of_no_weight(by_class):
    """A uniform sample may hold them only, or a class by them only; it is drawn again, and no fit sees it."""
    weights = torch.zeros(300, dtype=D)
    weights[::25] = 1
    problem = logistic(weights=weights)
    problem.y[:50] = 1
    seen = []

    def fit(indices, v):
        seen.append(len(problem.y[indices[v > 0]].unique()))
        return problem.fit(indices, v)

    result = A.auto_coreset(
        300, problem.loss_vector, fit, 12, weights=weights, labels=problem.y.long(), by_class=by_class, generator=generator(0)
    )  # fmt: skip
    assert seen == [2] * result.num_fits
    squares = least_squares(weights=weights[:200])
    assert A.auto_coreset(
        200, squares.loss_vector, squares.fit, 5, weights=weights[:200], generator=generator(0)
    ).coreset


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------

M = torch.rand(6, 2, generator=generator(0))


def loop(**changes):
    arguments = dict(n=6, loss_fn=lambda m: torch.ones(6), fit_fn=lambda i, v: None, size=3) | changes
    return A.auto_coreset(**arguments)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: A.uniform_coreset(6, 0), ValueError, "size must be at least 1, got 0"),
        (lambda: A.uniform_coreset(0, 3), ValueError, "n must be at least 1"),
        (lambda: A.uniform_coreset(6, 3, weights=torch.ones(5)), ValueError, r"weights must have shape \(6,\)"),
        (lambda: A.uniform_coreset(6, 3, weights=-torch.ones(6)), ValueError, "weights must be >= 0"),
        (lambda: A.uniform_coreset(6, 3, weights=torch.zeros(6)), ValueError, "weights must be >= 0 and not all 0"),
        (lambda: A.uniform_coreset(6, 3, weights=torch.ones(6).long()), TypeError, "weights must be a floating"),
        (lambda: A.uniform_coreset(6, 3, labels=torch.ones(6)), TypeError, "labels must be an int64"),
        (lambda: A.uniform_coreset(6, 3, labels=torch.ones(5).long()), ValueError, r"labels must have shape \(6,\)"),
        (lambda: A.sensitivity_sample(M, 0), ValueError, "size must be at least 1"),
        (lambda: A.sensitivity_sample(M, 2.5), TypeError, "size must be an integer"),
        (lambda: A.sensitivity_sample(M, 2, mix=1.5), ValueError, r"mix must be finite and in \[0, 1\]"),
        (lambda: A.sensitivity_sample(M[0], 2), ValueError, "matrix must have 2 dimension"),
        (lambda: A.sensitivity_sample(M.long(), 2), TypeError, "matrix must be a floating-point"),
        (lambda: A.sensitivity_sample(M * math.nan, 2), ValueError, "matrix must be finite"),
        (lambda: A.expected_sampling_error(M, 0), ValueError, "size must be at least 1"),
        (lambda: A.best_of_means(M, 2, trials=0), ValueError, "trials must be at least 1"),
        (lambda: A.caratheodory(M, torch.tensor([1.0, -1, 1, 1, 1, 1])), ValueError, "weights must be >= 0"),
        (lambda: A.caratheodory(M, size=0), ValueError, "size must be at least 1"),
        (lambda: A.caratheodory(torch.empty(0, 2)), ValueError, "matrix must not be empty"),
        (lambda: A.summation_error(M, A.Coreset(torch.tensor([6]), torch.ones(1))), ValueError, "loss_vector must"),
        (lambda: A.summation_error(M, [0, 1]), TypeError, "coreset must be a Coreset, got list"),
        (lambda: loop(labels=torch.arange(6) // 5, weights=torch.tensor([1.0] * 5 + [0.0])), ValueError, "weights must be > 0 for a"),
        (lambda: A.Coreset(torch.tensor([1, 1]), torch.ones(2)), ValueError, "indices must be >= 0, distinct"),
        (lambda: A.Coreset(torch.tensor([-1]), torch.ones(1)), ValueError, "indices must be >= 0"),
        (lambda: A.Coreset(torch.tensor([1]), torch.ones(2)), ValueError, r"weights must have shape \(1,\)"),
        (lambda: A.Coreset(torch.tensor([1]), -torch.ones(1)), ValueError, "weights must be >= 0"),
        (lambda: A.Coreset(torch.tensor([1]), torch.tensor([1])), TypeError, "weights must be a floating"),
        (lambda: A.allocate_by_class(torch.arange(4), 3), ValueError, "size must be from 4"),
        (lambda: A.allocate_by_class(torch.zeros(4).long(), 5), ValueError, "to 4, that of points, got 5"),
        (lambda: loop(size=7), ValueError, "size must be at most n, 6, got 7"),
        (lambda: loop(size=0), ValueError, "size must be at least 1"),
        (lambda: loop(method="magic"), ValueError, "method must be one of"),
        (lambda: loop(patience=0), ValueError, "patience must be at least 1"),
        (lambda: loop(num_init=0), ValueError, "num_init must be at least 1"),
        (lambda: loop(tol=-1.0), ValueError, "tol must be finite and in"),
        (lambda: loop(loss_fn=lambda m: -torch.ones(6)), ValueError, "loss_fn must give finite losses >= 0"),
        (lambda: loop(loss_fn=lambda m: torch.ones(6) * math.nan), ValueError, "loss_fn must give finite losses"),
        (lambda: loop(loss_fn=lambda m: torch.ones(6) * math.inf), ValueError, "loss_fn must give finite losses"),
        (lambda: loop(loss_fn=lambda m: torch.ones(3)), ValueError, r"loss_fn must give shape \(6,\)"),
        (lambda: loop(labels=torch.arange(6)), ValueError, "size must be from 6"),
        (lambda: A.LogisticRegressionProblem(M, torch.arange(6)), ValueError, r"y must be -1 or \+1"),
        (lambda: A.LogisticRegressionProblem(M, torch.ones(6), C=0), ValueError, "C must be finite and > 0"),
        (lambda: A.LinearRegressionProblem(M, torch.ones(5)), ValueError, r"y must have shape \(6,\)"),
        (lambda: A.LinearRegressionProblem(M, [1.0] * 6), TypeError, "y must be a tensor"),
        (lambda: A.KMeansProblem(M, 0), ValueError, "num_clusters must be at least 1"),
        (lambda: A.KMeansProblem(M / 0, 2), ValueError, "X must be finite"),
    ],
)  # fmt: skip
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_classifier_needs_both_classes():
    problem = logistic()
    one = (problem.labels == 1).nonzero().flatten()[:3]
    with pytest.raises(ValueError, match="indices must hold points of both classes, got 3 of one"):
        problem.fit(one, torch.ones(3))
