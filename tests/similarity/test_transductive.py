"""The theorems of chapter similarity/transductive as properties; closed forms, limits, special cases and bad input."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lossbook.similarity import transductive as X

# The chapter's example: two points that want different classes, joined by one edge.
PAIR = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)

seeds = st.integers(0, 2**31)
few = settings(deadline=None, max_examples=50)
close = dict(rtol=1e-10, atol=1e-12)


def random_problem(seed, batch=(), diagonal=False):
    """Unaries, a random symmetric graph and an assignment; N up to 12, K up to 5."""
    g = torch.Generator().manual_seed(seed)
    n, k = int(torch.randint(2, 13, (), generator=g)), int(torch.randint(1, 6, (), generator=g))
    draw = lambda *shape: torch.rand(*batch, *shape, generator=g, dtype=torch.float64)  # noqa: E731
    w = draw(n, n) * (draw(n, n) < 0.4)
    w = torch.triu(w, 0 if diagonal else 1)
    w = w + w.mT
    s = torch.softmax(4 * draw(n, k) - 2, dim=-1)
    return 2 * draw(n, k), w, s, g


def episode(seed, shots=1, queries=6, classes=4, dim=6, batch=(), noise=0.8):
    g = torch.Generator().manual_seed(seed)
    centers = 1.5 * torch.randn(*batch, classes, dim, generator=g, dtype=torch.float64)
    labels, truth = (torch.arange(classes).repeat_interleave(m) for m in (shots, queries))
    points = centers[..., torch.cat([labels, truth]), :]
    points = points + noise * torch.randn(points.shape, generator=g, dtype=torch.float64)
    labeled = len(labels)
    return points[..., :labeled, :], labels.expand(*batch, -1), points[..., labeled:, :], truth.expand(*batch, -1)


def some_support(n, k, g):
    mask = torch.rand(n, generator=g) < 0.3
    return mask, F.one_hot(torch.randint(k, (n,), generator=g), k).double()


# --- slow loops ---------------------------------------------------------------------------------------------------------


def slow_objective(s, a, w, weight, complexity=0.0, mask=None):
    (n, k), total = s.shape, 0.0
    for p in range(n):
        for c in range(k):
            total += (s[p, c] * math.log(s[p, c]) if s[p, c] > 0 else 0) + s[p, c] * a[p, c]
        for q in range(n):
            total -= weight / 2 * w[p, q] * sum(s[p, c] * s[q, c] for c in range(k))
    free = [p for p in range(n) if mask is None or not mask[p]]
    for c in range(k):
        mass = sum(s[p, c] for p in free)
        if mass > 0:
            total -= complexity * mass * math.log(mass / len(free))
    return float(total)


def slow_update(s, a, w, weight, complexity=0.0, eta=None, mask=None, clamped=None):
    (n, k), rows = s.shape, []
    free = [p for p in range(n) if mask is None or not mask[p]]
    for p in range(n):
        if p not in free:
            rows.append(clamped[p])
            continue
        damping = max(0.0, (weight * float(w[p].sum()) - 1) / 2) if eta is None else eta
        logits = []
        for c in range(k):
            logit = -a[p, c] + weight * sum(w[p, q] * s[q, c] for q in range(n))
            logit += complexity * math.log(sum(float(s[q, c]) for q in free) / len(free)) if complexity else 0
            logits.append((logit + damping * s[p, c].log()) / (1 + damping))
        weights = [math.exp(x - max(logits)) for x in logits]
        rows.append(torch.tensor(weights, dtype=torch.float64) / sum(weights))
    return torch.stack(rows)


@few
@given(seeds, st.sampled_from([0.0, 0.7, 5.0]), st.sampled_from([0.0, 1.3]), st.sampled_from([None, 0.0, 0.4]))
def test_objective_and_update_equal_the_slow_loops(seed, weight, complexity, eta):
    a, w, s, g = random_problem(seed, diagonal=True)
    mask, clamped = some_support(*a.shape, g)
    mask[0] = False
    s = clamped.where(mask[:, None], s)
    options = dict(weight=weight, complexity=complexity)
    value = X.relaxed_objective(s, a, w, support_mask=mask, **options)
    assert value.item() == pytest.approx(slow_objective(s, a, w, weight, complexity, mask), rel=1e-10, abs=1e-10)
    if complexity and (s[~mask].sum(0) == 0).any():
        return
    new = X.bound_update(s, a, w, proximal=eta, support_mask=mask, support_assignment=clamped, **options)
    torch.testing.assert_close(new, slow_update(s, a, w, weight, complexity, eta, mask, clamped), **close)
    sparse = X.bound_update(s, a, w.to_sparse(), proximal=eta, support_mask=mask, support_assignment=clamped, **options)
    torch.testing.assert_close(sparse, new, **close)


@few
@given(seeds)
def test_neighbors_equal_the_slow_loop(seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 3, generator=g, dtype=torch.float64) + 100
    k = int(torch.randint(1, 9, (), generator=g))
    directed = torch.zeros(9, 9, dtype=torch.float64)
    for p in range(9):
        others = sorted((q for q in range(9) if q != p), key=lambda q: (x[p] - x[q]).square().sum().item())
        directed[p, others[:k]] = 1
    assert torch.equal(X.knn_affinity(x, k, symmetric=False), directed)
    symmetric = X.knn_affinity(x, k)
    assert torch.equal(symmetric, (directed + directed.T) / 2)
    assert torch.equal(X.knn_affinity(x, k, sparse=True).to_dense(), symmetric)
    assert torch.equal(X.knn_affinity(x, k, sparse=True, symmetric=False, chunk_size=2).to_dense(), directed)
    both = X.knn_affinity(torch.stack([x, x.flip(0)]), k)
    assert torch.equal(both, torch.stack([symmetric, symmetric.flip(0, 1)]))


def test_neighbors_far_from_the_origin_in_single_precision():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)) + 3000
    distances = torch.cdist(x.double(), x.double()).fill_diagonal_(torch.inf)
    wanted = torch.zeros(60, 60).scatter(1, distances.topk(3, largest=False).indices, 1.0)
    assert torch.equal(X.knn_affinity(x, 3, symmetric=False), wanted)


def test_neighbors_agree_with_scikit_learn_that_counts_the_point_itself():
    from sklearn.neighbors import NearestNeighbors

    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    graph = NearestNeighbors(n_neighbors=3).fit(x.numpy()).kneighbors_graph(x.numpy()).toarray() - np.eye(40)
    np.testing.assert_array_equal(X.knn_affinity(x, 2, symmetric=False).numpy(), graph)


# --- closed forms -------------------------------------------------------------------------------------------------------


def test_without_a_graph_one_step_is_the_softmax():
    a, w, s, _ = random_problem(1)
    torch.testing.assert_close(X.bound_update(s, a), torch.softmax(-a, dim=-1), **close)
    torch.testing.assert_close(X.bound_update(s, a, w, weight=0.0), torch.softmax(-a, dim=-1), **close)


def test_a_sparse_graph_without_edges_changes_nothing():
    a, w, _, _ = random_problem(1)
    s, _ = X.laplacian_assignment(a, torch.zeros_like(w).to_sparse(), weight=1.0)
    torch.testing.assert_close(s, torch.softmax(-a, dim=-1), **close)


def test_two_points_and_an_edge():
    s, history = X.laplacian_assignment(PAIR, PAIR, weight=1.0, tolerance=0.0, check_monotone=True)
    p = s[0, 0].item()
    assert p == pytest.approx(0.6625842, abs=1e-7)
    assert p == pytest.approx(1 / (1 + math.exp(-(1 + (1 - 2 * p)))), abs=1e-8)
    np.testing.assert_allclose(history[:3], [-1.0197472, -1.0446489, -1.0496694], atol=1e-7)
    assert history[-1].item() == pytest.approx(-1.0509141, abs=1e-7)


@pytest.mark.parametrize(
    ("weight", "loop", "proximal", "fixed_point"),
    [(1.9, 0, 0.0, 0.5128191), (2.1, 0, 0.0, None), (2.1, 1, 0.0, 0.524979), (2.1, 0, 0.1, 0.512194)]
    + [(2.1, 0, None, 0.512194), (50.0, 0, None, 0.5 + 0.1 / 4 / 26)],
)
def test_the_threshold_is_tight_and_damping_keeps_the_fixed_point(weight, loop, proximal, fixed_point):
    a, w = 0.1 * PAIR, PAIR + loop * torch.eye(2, dtype=torch.float64)
    s = torch.softmax(-a, dim=-1)  # symmetric under the exchange of points and classes, and so it stays
    for _ in range(2000 if weight == 50 else 400):
        before, s = s, X.bound_update(s, a, w, weight=weight, proximal=proximal)
    change = (s - before).abs().max().item()
    if fixed_point is None:
        assert change > 0.3
        assert X.monotonicity_margin(w, weight).item() == pytest.approx(-0.1)
    else:
        assert change < 1e-8
        assert s[0, 0].item() == pytest.approx(fixed_point, abs=2e-6)


def test_largest_guaranteed_weight_of_a_ring():
    ring = torch.tensor([[0.0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]], dtype=torch.float64)
    assert X.monotonicity_margin(ring, 1.0).item() == pytest.approx(0, abs=1e-12)
    both = X.monotonicity_margin(torch.stack([ring, torch.eye(4).double()]), 3.0)
    assert both.tolist() == pytest.approx([-4.0, 2.0])


@few
@given(seeds)
def test_on_one_hot_rows_the_laplacian_counts_the_cut(seed):
    a, w, _, g = random_problem(seed)
    n, k = a.shape
    labels = torch.randint(k, (n,), generator=g)
    s = F.one_hot(labels, k).double()
    quadratic = 0.5 * (w[:, :, None] * (s[:, None] - s[None]).square()).sum()
    cut = (w * (labels[:, None] != labels)).sum()
    assert quadratic.item() == pytest.approx((w.sum() - X.laplacian_energy(s, w)).item(), abs=1e-12)
    assert quadratic.item() == pytest.approx(cut.item(), abs=1e-12)


def test_bandwidth_is_the_mean_over_the_edges():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 50
    directed = X.knn_affinity(x, 3, symmetric=False)
    wanted = (directed * torch.cdist(x, x).square()).sum() / directed.sum()
    for graph in (X.knn_affinity(x, 3), X.knn_affinity(x, 3, sparse=True)):
        assert X.graph_bandwidth(x, graph).square().item() == pytest.approx(wanted.item(), rel=1e-10)
    assert X.graph_bandwidth(torch.ones(4, 2), torch.ones(4, 4) - torch.eye(4)).item() == pytest.approx(1e-3)


# --- the theorems -------------------------------------------------------------------------------------------------------


@few
@given(seeds, st.floats(0.0, 60.0), st.sampled_from([0.0, 0.5, 3.0]), st.booleans())
def test_the_damped_step_decreases_sufficiently_on_any_graph(seed, weight, complexity, supported):
    """Theorem sufficient decrease: by at least half the squared length of the step, whatever the weight and the graph."""
    a, w, s, g = random_problem(seed, diagonal=True)
    options = dict(weight=weight, complexity=complexity)
    given_rows = {}
    if supported:
        mask, clamped = some_support(*a.shape, g)
        s, options["support_mask"] = clamped.where(mask[:, None], s), mask
        given_rows = dict(support_assignment=clamped)
    for _ in range(25):
        new = X.bound_update(s, a, w, **options, **given_rows)
        gain = X.relaxed_objective(s, a, w, **options) - X.relaxed_objective(new, a, w, **options)
        assert gain.item() >= 0.5 * (new - s).square().sum().item() - 1e-11 * (1 + weight * w.sum().item())
        s = new
    if supported:
        assert torch.equal(s[mask], clamped[mask])


@few
@given(seeds, st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 2.0]))
def test_the_descent_identity_is_exact(seed, eta, complexity):
    a, w, s, g = random_problem(seed, diagonal=True)
    weight = 8 * torch.rand((), generator=g, dtype=torch.float64).item()
    options = dict(weight=weight, complexity=complexity)
    new = X.bound_update(s, a, w, proximal=eta, **options)
    step = new - s
    kl = lambda p, q: (p * (p / q).log()).sum()  # noqa: E731
    change = -(1 + eta) * kl(s, new) - eta * kl(new, s) - weight / 2 * (step * (w @ step)).sum()
    change = change - complexity * kl(new.sum(0), s.sum(0))
    difference = X.relaxed_objective(new, a, w, **options) - X.relaxed_objective(s, a, w, **options)
    assert difference.item() == pytest.approx(change.item(), abs=1e-10)


@pytest.mark.parametrize("kind", ["at the threshold", "semi-definite", "far beyond"])
def test_the_undamped_step_is_monotone_up_to_the_threshold(kind):
    rises = 0
    for seed in range(200):
        a, w, _, g = random_problem(seed)
        if kind == "semi-definite":
            x = torch.randn(len(a), 2, generator=g, dtype=torch.float64)
            w, weight = torch.exp(-torch.cdist(x, x).square() / 2), 5.0
        else:
            lowest = -torch.linalg.eigvalsh(w)[0].item()
            weight = (2 if kind == "at the threshold" else 40) / max(lowest, 1e-3)
        _, history = X.laplacian_assignment(a, w, weight=weight, proximal=0.0, max_iterations=60)
        rises += bool((history.diff() > 1e-9 * (1 + history[0].abs())).any())
        if kind != "far beyond":
            assert X.monotonicity_margin(w, weight) > -1e-9
    assert rises == 0 if kind != "far beyond" else rises > 40


@few
@given(seeds, st.sampled_from([0.0, 1.5]))
def test_the_auxiliary_function_majorizes_where_the_graph_is_semi_definite(seed, complexity):
    a, _, current, g = random_problem(seed)
    x = torch.randn(len(a), 2, generator=g, dtype=torch.float64)
    w = torch.exp(-torch.cdist(x, x).square())
    options = dict(weight=2.0, complexity=complexity)
    for sharpness in (0.1, 1.0, 10.0):
        s = torch.softmax(sharpness * torch.randn(a.shape, generator=g, dtype=torch.float64), dim=-1)
        bound = X.auxiliary_objective(s, current, a, w, **options)
        assert bound >= X.relaxed_objective(s, a, w, **options) - 1e-10
    here = current.clone().requires_grad_()
    objective, bound = X.relaxed_objective(here, a, w, **options), X.auxiliary_objective(here, current, a, w, **options)
    assert objective.item() == pytest.approx(bound.item(), abs=1e-10)
    slopes = [torch.autograd.grad(f, here)[0] for f in (objective, bound)]
    slopes = [slope - slope.mean(-1, keepdim=True) for slope in slopes]  # along the simplex
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-9)
    best = X.auxiliary_objective(X.bound_update(current, a, w, proximal=0.0, **options), current, a, w, **options)
    assert best <= bound + 1e-10


def test_a_fixed_point_is_stationary():
    for seed in range(20):
        a, w, _, _ = random_problem(seed)
        s, _ = X.laplacian_assignment(a, w, weight=0.6, complexity=0.5, tolerance=0.0, max_iterations=5000)
        if s.sum(0).min() < 1e-6:
            continue
        s = s.requires_grad_()
        (slope,) = torch.autograd.grad(X.relaxed_objective(s, a, w, weight=0.6, complexity=0.5), s)
        assert (slope - slope.mean(-1, keepdim=True)).abs().max() < 1e-4


def test_history_is_the_objective_and_stops_at_the_tolerance():
    a, w, _, _ = random_problem(5)
    s, history = X.laplacian_assignment(a, w, weight=1.0, tolerance=1e-3)
    assert history[-1].item() == pytest.approx(X.relaxed_objective(s, a, w, weight=1.0).item(), rel=1e-12)
    changes = history.diff().abs() / history[:-1].abs()
    assert changes[-1] <= 1e-3 and (changes[:-1] > 1e-3).all()
    _, exact = X.laplacian_assignment(a, w, weight=1.0, max_iterations=3, tolerance=0.0)
    assert len(exact) == 4
    again, _ = X.laplacian_assignment(a, w, weight=1.0, init=s, max_iterations=1)
    torch.testing.assert_close(again, X.bound_update(s, a, w, weight=1.0), **close)


def test_check_monotone_says_when_the_objective_rises():
    a, w = 0.1 * PAIR, PAIR
    init = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)  # each adopts the other's class, and back
    options = dict(weight=20.0, init=init, max_iterations=20, check_monotone=True)
    X.laplacian_assignment(a, w, **options)
    with pytest.raises(RuntimeError, match="the objective rose"):
        X.laplacian_assignment(a, w, proximal=0.0, **options | dict(init=init.clamp(0.3, 0.7)))


def discrete_objective(labels, a, w, weight):
    chosen = a[torch.arange(len(a)), labels].sum()
    return chosen + weight / 4 * (w * 2 * (labels[:, None] != labels)).sum()


@pytest.mark.parametrize("seed", range(5))
def test_brute_force_in_the_two_limits_of_the_weight(seed):
    a, w, _, g = random_problem(seed)
    n = min(len(a), 7)
    a, w = torch.rand(n, 2, generator=g, dtype=torch.float64), w[:n, :n]
    support = {0: 1}  # one labeled point
    labelings = [
        torch.tensor(x) for x in itertools.product([0, 1], repeat=n) if all(x[p] == y for p, y in support.items())
    ]
    best = {
        weight: min(labelings, key=lambda x: discrete_objective(x, a, w, weight).item()) for weight in (0.0, 1000.0)
    }
    nearest = a.argmin(1)
    nearest[0] = 1
    assert torch.equal(best[0.0], nearest)
    assert (w * (best[1000.0][:, None] != best[1000.0])).sum() == 0  # constant on each component
    # the relaxation on one-hot rows is the discrete problem, up to a constant
    rows = [F.one_hot(x, 2).double() for x in labelings]
    offsets = [
        (discrete_objective(x, a, w, 0.7) - X.relaxed_objective(s, a, w, weight=0.7)).item()
        for x, s in zip(labelings, rows, strict=True)
    ]
    assert offsets == pytest.approx([0.35 * w.sum().item()] * len(offsets), abs=1e-10)


# --- prototypes ---------------------------------------------------------------------------------------------------------


def test_costs_and_prototypes_equal_the_slow_loops():
    g = torch.Generator().manual_seed(0)
    x, m = torch.randn(7, 3, generator=g, dtype=torch.float64), torch.randn(2, 3, generator=g, dtype=torch.float64)
    s = torch.rand(7, 2, generator=g, dtype=torch.float64)
    squared = torch.tensor([[(p - c).square().sum() for c in m] for p in x], dtype=torch.float64)
    torch.testing.assert_close(X.prototype_costs(x, m), squared, **close)
    for kind in ("modes", "points"):
        torch.testing.assert_close(X.prototype_costs(x, m, kind=kind, bandwidth=0.7), -(-squared / 0.98).exp(), **close)
    mean = torch.stack([sum(s[p, c] * x[p] for p in range(7)) / s[:, c].sum() for c in range(2)])
    torch.testing.assert_close(X.update_prototypes(x, s), mean, **close)
    kernel = (-squared / 0.98).exp()
    shifted = torch.stack(
        [sum(s[p, c] * kernel[p, c] * x[p] for p in range(7)) / (s * kernel)[:, c].sum() for c in range(2)]
    )
    one = X.update_prototypes(x, s, kind="modes", bandwidth=0.7, previous=m, max_iterations=1)
    torch.testing.assert_close(one, shifted, **close)
    assert torch.equal(X.update_prototypes(x, s, kind="points", bandwidth=0.7), x[s.argmax(0)])


@few
@given(seeds, st.floats(0.05, 3.0))
def test_mean_shift_never_lowers_the_density_and_tends_to_the_mean(seed, bandwidth):
    g = torch.Generator().manual_seed(seed)
    x, m = torch.randn(12, 2, generator=g, dtype=torch.float64), torch.randn(3, 2, generator=g, dtype=torch.float64)
    s = torch.softmax(torch.randn(12, 3, generator=g, dtype=torch.float64), dim=-1)
    density = lambda m: -(s * X.prototype_costs(x, m, kind="modes", bandwidth=bandwidth)).sum(0)  # noqa: E731
    before = density(m)
    options = dict(kind="modes", previous=m, max_iterations=1)
    assert (density(X.update_prototypes(x, s, bandwidth=bandwidth, **options)) >= before - 1e-12).all()
    wide = X.update_prototypes(x, s, bandwidth=1e6, **options)
    torch.testing.assert_close(wide, X.update_prototypes(x, s), rtol=1e-6, atol=1e-9)


def test_a_class_without_mass_keeps_its_prototype_and_far_modes_do_not_underflow():
    x, m = torch.tensor([[0.0], [1.0]]), torch.tensor([[5.0], [7.0]])
    s = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert X.update_prototypes(x, s, previous=m).squeeze(1).tolist() == [0.5, 7.0]
    far = X.update_prototypes(x, s, kind="modes", bandwidth=0.01, previous=1000 * m, max_iterations=1)
    assert far.squeeze(1).tolist() == [1.0, 7000.0]  # the nearest point has all the kernel's weight


# --- special cases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_without_graph_and_labels_it_is_scikit_learns_k_means(seed):
    from sklearn.cluster import KMeans

    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:150] += 2.5
    peer = KMeans(5, init=x[:5].numpy(), n_init=1, tol=0, algorithm="lloyd", max_iter=1000).fit(x.numpy())
    ours = X.slk_cluster(x, x[:5], weight=0.0, tolerance=0.0)
    assert ours.converged and ours.iterations > 3
    np.testing.assert_array_equal(ours.labels, peer.labels_)
    np.testing.assert_allclose(ours.prototypes, peer.cluster_centers_, atol=1e-12)


def _e_step(x, means, shares):
    from sklearn.mixture import GaussianMixture

    model = GaussianMixture(len(means), covariance_type="spherical")
    model.weights_, model.means_, model.covariances_ = shares, means, np.full(len(means), 0.5)
    model.precisions_cholesky_ = np.full(len(means), math.sqrt(2))
    return model.predict_proba(x)


def test_soft_prototypes_are_soft_k_means():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = x[:4].numpy()
    for _ in range(6):
        share = _e_step(x.numpy(), means, np.full(4, 0.25))
        last, means = means, share.T @ x.numpy() / share.sum(0)[:, None]
    ours = X.slk_cluster(x, x[:4], weight=0.0, hard_prototypes=False, max_loops=6, tolerance=0.0)
    np.testing.assert_allclose(ours.assignment, share, atol=1e-12)
    np.testing.assert_allclose(ours.prototypes, last, atol=1e-12)


def test_with_complexity_one_it_ends_at_a_fixed_point_of_em_with_free_shares():
    x = 2 * torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = X.slk_cluster(
        x, x[:4], weight=0.0, complexity=1.0, hard_prototypes=False, max_loops=3000, tolerance=0.0, inner_tolerance=0.0
    )
    s = ours.assignment.numpy()
    shares = s.mean(0)
    assert shares.max() > shares.min() + 0.02  # the shares are not what they started as
    means = s.T @ x.numpy() / s.sum(0)[:, None]
    np.testing.assert_allclose(_e_step(x.numpy(), means, shares), s, atol=2e-6)


@pytest.mark.parametrize("kind", ["means", "modes"])
@pytest.mark.parametrize("complexity", [0.0, 1.0])
def test_the_soft_algorithm_never_rises_across_blocks(kind, complexity):
    for seed in range(10):
        support, labels, query, _ = episode(seed)
        options = dict(kind=kind, complexity=complexity, weight=5.0, hard_prototypes=False, tolerance=1e-6)
        result = X.slk_fit(support, labels, query, num_classes=4, **options)
        history = result.objective_history
        assert len(history) > 2 and (history.diff() <= 1e-10 * (1 + history[0].abs())).all()
        assert result.converged


def test_soft_loops_start_where_the_last_one_ended_and_hard_ones_afresh():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = X.knn_affinity(x, 2)
    options = dict(affinity=w, weight=1.5, max_iterations=1, tolerance=0.0)
    for hard in (False, True):
        one = X.slk_cluster(x, x[:3], hard_prototypes=hard, max_loops=1, **options)
        two = X.slk_cluster(x, x[:3], hard_prototypes=hard, max_loops=2, **options)
        means = X.update_prototypes(x, F.one_hot(one.labels, 3).double() if hard else one.assignment)
        torch.testing.assert_close(two.prototypes, means, **close)
        costs = X.prototype_costs(x, means)
        start = torch.softmax(-costs, dim=-1) if hard else one.assignment
        torch.testing.assert_close(two.assignment, X.bound_update(start, costs, w, weight=1.5), **close)


def test_points_are_chosen_by_the_soft_assignment():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = dict(kind="points", bandwidth=1.0, weight=0.0)
    one, two = (X.slk_cluster(x, x[-3:] + 0.1, max_loops=loops, **options) for loops in (1, 2))
    chosen = one.assignment.argmax(0)
    assert torch.equal(two.prototypes, x[chosen])
    assert not torch.equal(chosen, F.one_hot(one.labels, 3).argmax(0))  # not the first of each class


def test_constrained_k_means_equals_lloyd_with_clamped_labels():
    for seed in range(10):
        support, labels, query, _ = episode(seed, shots=2, noise=2.0)
        points = torch.cat([support, query + support.mean(0) - query.mean(0)])
        means = torch.stack([support[labels == c].mean(0) for c in range(4)])
        for _ in range(100):
            found = torch.stack([(p - means).square().sum(1) for p in points]).argmin(1)
            found[: len(labels)] = labels
            last, means = means, torch.stack([points[found == c].mean(0) for c in range(4)])
            if torch.equal(last, means):
                break
        result = X.slk_fit(support, labels, query, num_classes=4, weight=0.0, tolerance=0.0)
        assert torch.equal(result.labels, found[len(labels) :])
        assert torch.equal(result.assignment[: len(labels)], F.one_hot(labels, 4).double())
        torch.testing.assert_close(result.prototypes, means, rtol=1e-9, atol=1e-9)


def test_the_baselines_are_pieces_of_the_method():
    support, labels, query, _ = episode(3, shots=2, queries=8, noise=2.0)
    means = torch.stack([support[labels == c].mean(0) for c in range(4)])
    nearest = torch.cdist(query, means).argmin(1)
    assert torch.equal(X.nearest_prototype(support, labels, query, num_classes=4), nearest)
    assert torch.equal(X.laplacian_shot(support, labels, query, num_classes=4, weight=0.0), nearest)
    costs, graph = torch.cdist(query, means).square(), X.knn_affinity(query, 2)
    wanted = X.laplacian_assignment(costs, graph, weight=3.0)[0].argmax(1)
    shot = X.laplacian_shot(support, labels, query, num_classes=4, weight=3.0)
    assert torch.equal(shot, wanted) and not torch.equal(shot, nearest)
    soft = X.slk_fit(support, labels, query, num_classes=4, shift=False, weight=0.0, hard_prototypes=False)
    free = X.paddle(support, labels, query, num_classes=4, complexity=0.0)
    assert torch.equal(soft.assignment, free.assignment)


def test_complexity_empties_classes_that_are_not_there():
    support, labels, query, truth = episode(0, shots=3, queries=20, noise=0.5, classes=5)
    there = truth < 2
    query, truth = query[there], truth[there]
    shares = lambda s: s[len(labels) :].mean(0)  # noqa: E731
    plain = X.paddle(0.4 * support, labels, 0.4 * query, num_classes=5, complexity=0.0)
    priced = X.paddle(0.4 * support, labels, 0.4 * query, num_classes=5, complexity=1.0)
    assert (priced.labels == truth).double().mean() >= (plain.labels == truth).double().mean()
    assert shares(priced.assignment)[2:].sum() < 0.01 < shares(plain.assignment)[2:].sum()


# --- the algorithm ------------------------------------------------------------------------------------------------------


OPTIONS = [
    {},
    dict(kind="modes"),
    dict(kind="points", hard_prototypes=False),
    dict(weight=0.0),
    dict(hard_prototypes=False, complexity=0.5, num_neighbors=3),
    dict(shift=False, proximal=0.0),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_batched_episodes_equal_a_loop(options):
    support, labels, query, _ = episode(0, batch=(3, 2), noise=1.5)
    together = X.slk_fit(support, labels, query, num_classes=4, **options)
    for i, j in itertools.product(range(3), range(2)):
        alone = X.slk_fit(support[i, j], labels[i, j], query[i, j], num_classes=4, **options)
        assert torch.equal(together.labels[i, j], alone.labels)
        assert together.iterations[i, j] == alone.iterations and together.converged[i, j] == alone.converged
        torch.testing.assert_close(together.assignment[i, j], alone.assignment, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(together.prototypes[i, j], alone.prototypes, rtol=1e-8, atol=1e-9)
        steps = len(alone.objective_history)
        torch.testing.assert_close(together.objective_history[:steps, i, j], alone.objective_history, rtol=1e-9, atol=0)
        assert (together.objective_history[steps:, i, j] == together.objective_history[steps - 1, i, j]).all()


@pytest.mark.parametrize("seed", range(5))
def test_equivariance(seed):
    support, labels, query, _ = episode(seed, shots=2, noise=1.5)
    g = torch.Generator().manual_seed(seed)
    fit = lambda s, y, q: X.slk_fit(s, y, q, num_classes=4)  # noqa: E731
    plain = fit(support, labels, query)
    order = torch.randperm(len(query), generator=g)
    assert torch.equal(fit(support, labels, query[order]).labels, plain.labels[order])
    classes = torch.randperm(4, generator=g)
    renamed = fit(support, classes[labels], query)
    assert torch.equal(renamed.labels, classes[plain.labels])
    torch.testing.assert_close(renamed.prototypes[classes], plain.prototypes, rtol=1e-8, atol=1e-9)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))
    move = torch.randn(6, generator=g, dtype=torch.float64)
    turned = fit(support @ rotation + move, labels, query @ rotation + move)
    torch.testing.assert_close(turned.assignment, plain.assignment, rtol=1e-7, atol=1e-8)
    shifted = fit(support, labels, query + move)  # undone by the shift correction
    torch.testing.assert_close(shifted.assignment, plain.assignment, rtol=1e-7, atol=1e-8)


def test_a_vanished_class_restores_the_state_before():
    # The graph pulls the third class's only point over in the first loop.
    x = torch.tensor([[0.0], [1.0], [4.2], [4.4]], dtype=torch.float64)
    first = torch.tensor([[0.5], [4.3], [4.36]], dtype=torch.float64)
    graph = torch.zeros(4, 4, dtype=torch.float64)
    graph[2, 3] = graph[3, 2] = 4.0
    result = X.slk_cluster(x, first, affinity=graph, weight=1.0, max_loops=50)
    assert not result.converged and result.iterations == 1
    torch.testing.assert_close(result.prototypes, first)
    assert len(set(result.labels.tolist())) == 2
    # Lloyd that loses a class in its second loop: the first loop's state comes back.
    for seed in range(2000):
        g = torch.Generator().manual_seed(seed)
        points, first = (10 * torch.rand(n, 1, generator=g, dtype=torch.float64) for n in (9, 4))
        result = X.slk_cluster(points, first, weight=0.0, tolerance=0.0)
        if not result.converged and result.iterations == 2:
            break
    else:
        raise AssertionError("no instance in which the second loop loses a class")
    nearest = torch.cdist(points, first).argmin(1)
    assert torch.equal(result.labels, nearest) and len(nearest.unique()) == 4
    torch.testing.assert_close(result.prototypes, first)
    assert result.objective_history[1] == result.objective_history[0]
    # In a batch with an episode that goes on, both end as they do alone.
    other = points.flip(0) * 3
    both = X.slk_cluster(torch.stack([points, other]), torch.stack([first, other[:4]]), weight=0.0, tolerance=0.0)
    alone = X.slk_cluster(other, other[:4], weight=0.0, tolerance=0.0)
    assert torch.equal(both.labels, torch.stack([result.labels, alone.labels]))
    assert both.iterations.tolist() == [2, alone.iterations.item()] and alone.iterations > 2
    torch.testing.assert_close(both.prototypes, torch.stack([result.prototypes, alone.prototypes]))


def test_unlabeled_points_help():
    """One label a class, twenty queries: clustering beats the nearest prototype on average."""
    gains = []
    for seed in range(40):
        support, labels, query, truth = episode(seed, queries=20, noise=1.2, dim=10)
        clustered = X.slk_fit(support, labels, query, num_classes=4, shift=False).labels
        nearest = X.nearest_prototype(support, labels, query, num_classes=4)
        gains.append(((clustered == truth).double().mean() - (nearest == truth).double().mean()).item())
    assert np.mean(gains) > 0.03


def test_features_and_shift():
    g = torch.Generator().manual_seed(0)
    x, mean = torch.randn(3, 5, 4, generator=g), torch.randn(4, generator=g)
    unit = X.cl2n(x, mean)
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(3, 5))
    torch.testing.assert_close((unit * (x - mean)).sum(-1), (x - mean).norm(dim=-1))
    assert torch.equal(X.cl2n(mean[None], mean), torch.zeros(1, 4))
    moved = X.shift_correction(x, x[:, :2] * 3)
    torch.testing.assert_close(moved.mean(-2), x.mean(-2))
    torch.testing.assert_close(moved[:, 0] - moved[:, 1], 3 * (x[:, 0] - x[:, 1]))


# --- derivatives, types, extremes -----------------------------------------------------------------------------------------


def test_gradcheck():
    a, w, s, g = random_problem(2)
    current = torch.softmax(torch.randn(s.shape, generator=g, dtype=torch.float64), dim=-1)
    s, a = s.requires_grad_(), a.requires_grad_()
    x, m = (torch.randn(5, 3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    # relaxed_objective wants rows on the simplex: a softmax keeps gradcheck's steps on it.
    row = lambda f: lambda s, a: f(torch.softmax(s, -1), a)  # noqa: E731
    options = dict(weight=0.7, complexity=0.4)
    for f in (
        lambda s, a: X.relaxed_objective(s, a, w, **options),
        lambda s, a: X.relaxed_objective(s, a, w.to_sparse(), **options),
        lambda s, a: X.auxiliary_objective(s, current, a, w, **options),
        lambda s, a: X.bound_update(s, a, w, **options),
    ):
        assert torch.autograd.gradcheck(row(f), (s, a))
    assert torch.autograd.gradcheck(lambda s: X.laplacian_energy(s, w), (s,))
    for kind in ("means", "modes"):
        assert torch.autograd.gradcheck(
            lambda x, m, kind=kind: X.prototype_costs(x, m, kind=kind, bandwidth=0.8), (x, m)
        )


@pytest.mark.parametrize("weight", [0.4, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unrolled_steps_have_finite_gradients_where_entries_underflow(weight, dtype):
    scale = 120.0 if dtype == torch.float32 else 900.0  # e^-scale is zero
    a, w = (scale * PAIR).to(dtype).requires_grad_(), PAIR.to(dtype)
    s = torch.softmax(-a, dim=-1)
    assert (s == 0).any()
    for _ in range(2):
        s = X.bound_update(s, a, w, weight=weight, complexity=0.5)
    values = X.relaxed_objective(s, a, w, weight=weight, complexity=0.5), s[0, 0]
    slopes = torch.stack([torch.autograd.grad(value, a, retain_graph=True)[0] for value in values])
    assert slopes.isfinite().all()
    moderate = PAIR.clone().requires_grad_()  # and they are the right ones where nothing underflows
    torch.autograd.gradcheck(lambda a: X.bound_update(torch.softmax(-a, -1), a, PAIR, weight=weight), (moderate,))


def test_one_hot_rows_and_empty_classes_have_finite_gradients():
    s = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.5, 0.5, 0]], dtype=torch.float64, requires_grad=True)
    a, w = torch.rand(3, 3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64) - torch.eye(3)
    options = dict(weight=3.0, complexity=1.0)  # damped; the third class has no mass
    mask = torch.tensor([True, False, False])
    given = dict(support_mask=mask, support_assignment=s.detach())
    for value in (
        X.bound_update(s, a, w, **options)[:, 0].sum(),
        X.bound_update(s, a, w, **options, **given)[:, 0].sum(),
        X.auxiliary_objective(s, s, a, w, **options),
        X.relaxed_objective(s, a, w, **options),
    ):
        (slope,) = torch.autograd.grad(value, s, retain_graph=True)
        assert slope.isfinite().all() and (slope[s > 0] != 0).any()


def test_an_outlying_prototype_costs_the_others_no_digits(monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, m = torch.randn(200, 8, generator=g), torch.randn(5, 8, generator=g)
    m[4] = 1e4
    exact = (x[:, None].double() - m.double()).square().sum(-1)
    torch.testing.assert_close(X.prototype_costs(x, m).double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(X.prototype_costs(x, m).argmin(1), exact.argmin(1))
    monkeypatch.setattr(X, "_DIFFERENCES", 0)  # the product: as good where the prototypes are of one scale, far from 0
    x, m = x + 1000, m[:4] + 1000
    exact = (x[:, None].double() - m.double()).square().sum(-1)
    torch.testing.assert_close(X.prototype_costs(x, m).double(), exact, rtol=1e-3, atol=1e-3)
    assert X.prototype_costs(m, m).diagonal().abs().max() < 1e-3


def test_the_guarantee_needs_support_rows_at_their_labels():
    a, w = PAIR, PAIR
    s, mask, rows = torch.full_like(PAIR, 0.5), torch.tensor([True, False]), PAIR  # row 0 goes where it costs most
    new = X.bound_update(s, a, w, weight=1.0, support_mask=mask, support_assignment=rows)
    assert X.relaxed_objective(new, a, w, weight=1.0) > X.relaxed_objective(s, a, w, weight=1.0)


def test_gradient_at_zero_distance_is_zero():
    x = torch.ones(1, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(X.prototype_costs(x, torch.ones(1, 2)).sum(), x)
    assert torch.equal(slope, torch.zeros(1, 2))


def test_func_transforms_and_compile():
    a, w, s, _ = random_problem(4)
    batch = torch.stack([a, a + 1, 2 * a])
    stepped = torch.vmap(lambda a: X.bound_update(s, a, w, weight=0.7, complexity=0.5))(batch)
    torch.testing.assert_close(stepped[2], X.bound_update(s, 2 * a, w, weight=0.7, complexity=0.5), **close)
    slope = torch.func.grad(lambda a: X.relaxed_objective(s, a, w, weight=0.7))(a)
    torch.testing.assert_close(slope, s, **close)
    if hasattr(torch, "compile"):
        step = torch.compile(
            lambda s, a: X.bound_update(s, a, w, weight=0.7, complexity=0.5), backend="aot_eager", fullgraph=True
        )
        torch.testing.assert_close(step(s, a), X.bound_update(s, a, w, weight=0.7, complexity=0.5), **close)


def test_float32_autocast_and_extremes():
    support, labels, query, _ = episode(0)
    support, query = support.float(), query.float()
    plain = X.slk_fit(support, labels, query, num_classes=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = X.slk_fit(support, labels, query, num_classes=4)
    assert plain.assignment.dtype == torch.float32 and torch.equal(plain.assignment, cast.assignment)
    huge = X.slk_fit(1e4 * support, labels, 1e4 * query, num_classes=4, complexity=1.0)
    assert huge.assignment.isfinite().all() and huge.objective_history.isfinite().all()
    a = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    s, history = X.laplacian_assignment(a, PAIR.float(), weight=1.0, complexity=1.0)
    assert torch.equal(s, torch.eye(2).flip(0)) and history.isfinite().all()
    same = X.slk_fit(
        torch.zeros(2, 3), torch.tensor([0, 1]), torch.zeros(4, 3), num_classes=2, kind="modes", weight=0.0
    )
    assert (same.labels == 0).all() and same.assignment.isfinite().all()  # all ties: the lower class


def test_large_sparse_graph_holds_no_square():
    g = torch.Generator().manual_seed(0)
    n, k = 50_000, 10  # a dense graph would take 10 GB
    x = torch.randn(k, 8, generator=g)[torch.arange(n) % k] * 4 + torch.randn(n, 8, generator=g)
    ring = torch.stack([torch.arange(n), (torch.arange(n) + k) % n])
    index = torch.cat([ring, ring.flip(0)], dim=1)
    graph = torch.sparse_coo_tensor(index, torch.ones(2 * n), (n, n), check_invariants=True)
    mask = torch.arange(n) < k
    clamped = F.one_hot(torch.arange(n) % k, k).float()
    result = X.slk_cluster(
        x, x[:k], affinity=graph, weight=1.0, support_mask=mask, support_assignment=clamped, max_loops=3
    )
    assert (result.labels == torch.arange(n) % k).double().mean() > 0.99


def test_modules_raise_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        support, labels, query, _ = episode(0)
        X.slk_fit(support, labels, query, num_classes=4, kind="modes")


# --- bad input ----------------------------------------------------------------------------------------------------------

S, A, W = torch.full((3, 2), 0.5), torch.zeros(3, 2), torch.ones(3, 3) - torch.eye(3)
XS, LS, XQ = torch.eye(2), torch.tensor([0, 1]), torch.rand(4, 2)
MASK = torch.tensor([True, False, False])
NAN = torch.full((3, 2), torch.nan)
DIRECTED = torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])


def fit(*args, **options):
    return X.slk_fit(*args, **({"num_classes": 2} | options))


BAD = [
    (lambda: X.bound_update([[1.0]], A), TypeError, "assignment"),
    (lambda: X.bound_update(S, None), TypeError, "unary"),
    (lambda: X.bound_update(S, NAN), ValueError, "unary must be finite"),
    (lambda: X.bound_update(S, torch.zeros(2)), ValueError, "unary"),
    (lambda: X.bound_update(S[:2], A), ValueError, "assignment must have the shape of unary"),
    (lambda: X.bound_update(2 * S, A), ValueError, "assignment must have rows"),
    (lambda: X.bound_update(S, A, weight=1.0), ValueError, "affinity must be given"),
    (lambda: X.bound_update(S, A, W[:2], weight=1.0), ValueError, "affinity must have shape"),
    (lambda: X.bound_update(S, A, -W, weight=1.0), ValueError, "affinity must be finite and >= 0"),
    (lambda: X.bound_update(S, A, W.double(), weight=1.0), TypeError, "affinity must have dtype"),
    (lambda: X.bound_update(S, A, "graph", weight=1.0), TypeError, "affinity"),
    (lambda: X.bound_update(S, A, W, weight=-1.0), ValueError, "weight must be finite and >= 0"),
    (lambda: X.bound_update(S, A, W, weight=True), TypeError, "weight"),
    (lambda: X.bound_update(S, A, W, weight=None), TypeError, "weight"),
    (lambda: X.bound_update(S, A, W, weight=math.nan), ValueError, "weight"),
    (lambda: X.bound_update(S, A, complexity="1"), TypeError, "complexity"),
    (lambda: X.bound_update(S, A, proximal=-0.1), ValueError, "proximal"),
    (lambda: X.bound_update(S, A, support_mask=MASK), ValueError, "given together"),
    (lambda: X.bound_update(S, A, support_mask=[1, 0, 0], support_assignment=S), TypeError, "support_mask"),
    (lambda: X.bound_update(S, A, support_mask=MASK[:2], support_assignment=S), ValueError, "support_mask"),
    (lambda: X.bound_update(S, A, support_mask=MASK, support_assignment=A), ValueError, "support_assignment"),
    (lambda: X.bound_update(S, A, support_mask=MASK, support_assignment=S[:, :1]), ValueError, "support_assignment"),
    (lambda: X.laplacian_assignment(A, DIRECTED, weight=1.0), ValueError, "affinity must be symmetric"),
    (lambda: X.laplacian_assignment(A, DIRECTED.to_sparse(), weight=1.0), ValueError, "affinity must be symmetric"),
    (lambda: X.laplacian_assignment(A, W, weight=1.0, max_iterations=0), ValueError, "max_iterations"),
    (lambda: X.laplacian_assignment(A, W, weight=1.0, tolerance=-1), ValueError, "tolerance"),
    (lambda: X.laplacian_assignment(A, W, weight=1.0, init=A), ValueError, "init must have rows"),
    (lambda: X.laplacian_assignment(A, W, weight=1.0, check_monotone=1), TypeError, "check_monotone"),
    (lambda: X.relaxed_objective(S, A, DIRECTED, weight=1.0), ValueError, "affinity must be symmetric"),
    (lambda: X.auxiliary_objective(S, 2 * S, A), ValueError, "current"),
    (lambda: X.laplacian_energy(S, W[0]), ValueError, "affinity"),
    (lambda: X.monotonicity_margin(W.to_sparse(), 1.0), ValueError, "affinity must be a dense tensor"),
    (lambda: X.monotonicity_margin(DIRECTED, 1.0), ValueError, "affinity must be symmetric"),
    (lambda: X.monotonicity_margin(W, -1.0), ValueError, "weight"),
    (lambda: X.knn_affinity(XQ, 4), ValueError, "num_neighbors must be less"),
    (lambda: X.knn_affinity(XQ, 0), ValueError, "num_neighbors"),
    (lambda: X.knn_affinity(XQ, 1.5), TypeError, "num_neighbors"),
    (lambda: X.knn_affinity(XQ.tolist(), 1), TypeError, "features"),
    (lambda: X.knn_affinity(XQ[None], 1, sparse=True), ValueError, "sparse"),
    (lambda: X.knn_affinity(XQ / 0, 1), ValueError, "features must be finite"),
    (lambda: X.prototype_costs(XQ, XS, kind="median"), ValueError, "kind must be one of"),
    (lambda: X.prototype_costs(XQ, XS, kind="modes"), ValueError, "bandwidth must be given"),
    (lambda: X.prototype_costs(XQ, XS, kind="modes", bandwidth=0.0), ValueError, "bandwidth"),
    (lambda: X.prototype_costs(XQ, XS, kind="modes", bandwidth="1"), TypeError, "bandwidth"),
    (lambda: X.prototype_costs(XQ, torch.eye(3)), ValueError, "prototypes must have shape"),
    (lambda: X.prototype_costs(XQ, XS.double()), TypeError, "prototypes"),
    (lambda: X.update_prototypes(XQ, S), ValueError, "assignment must have shape"),
    (lambda: X.update_prototypes(XQ, torch.zeros(4, 2)), ValueError, "previous must be given"),
    (lambda: X.update_prototypes(XQ, torch.ones(4, 2), kind="modes", bandwidth=1.0), ValueError, "previous"),
    (lambda: X.update_prototypes(XQ, torch.ones(4, 3), previous=XS), ValueError, "previous must have 3 prototypes"),
    (lambda: X.update_prototypes(XQ, torch.ones(4, 2), max_iterations=True), TypeError, "max_iterations"),
    (lambda: X.slk_cluster(XQ, XS, hard_prototypes=None), TypeError, "hard_prototypes"),
    (lambda: X.slk_cluster(XQ, XS, max_loops=0), ValueError, "max_loops"),
    (lambda: X.update_prototypes(XQ, -torch.ones(4, 2)), ValueError, "assignment must be at least 0"),
    (lambda: X.slk_cluster(XQ, XS, kind="modes", bandwidth=torch.ones(3)), ValueError, "bandwidth must have shape"),
    (lambda: X.prototype_costs(XQ, XS, kind="modes", bandwidth=torch.zeros(())), ValueError, "bandwidth"),
    (lambda: X.graph_bandwidth(XQ, torch.zeros(4, 4)), ValueError, "affinity must have at least one edge"),
    (lambda: X.graph_bandwidth(XQ, torch.zeros(4, 4).to_sparse()), ValueError, "affinity must have at least one edge"),
    (lambda: fit(XS, LS, XQ, support_mask=MASK), TypeError, "support_mask must not be given to slk_fit"),
    (lambda: X.paddle(XS, LS, XQ, num_classes=2, weight=1.0), TypeError, "weight must not be given to paddle"),
    (lambda: X.laplacian_shot(XS, LS, XQ, num_classes=2, affinity=W), TypeError, "affinity must not be given"),
    (lambda: X.slk_cluster(XQ, XS, weight=-1), ValueError, "weight"),
    (lambda: X.slk_cluster(XQ, XS, num_neighbors=4), ValueError, "num_neighbors"),
    (lambda: fit(XS, [0, 1], XQ), TypeError, "support_labels"),
    (lambda: fit(XS, torch.tensor([0, 2]), XQ), ValueError, "support_labels must lie in"),
    (lambda: fit(XS, torch.tensor([0, 0]), XQ), ValueError, "at least one label of each"),
    (lambda: fit(XS, torch.tensor([0, 1, 1]), XQ), ValueError, "support_labels must have shape"),
    (lambda: fit(XS, LS, XQ[:, :1]), ValueError, "query must have shape"),
    (lambda: fit(XS, LS, XQ * torch.nan), ValueError, "query must be finite"),
    (lambda: fit(None, LS, XQ), TypeError, "support"),
    (lambda: fit(XS, LS, XQ, shift="yes"), TypeError, "shift"),
    (lambda: fit(XS, LS, XQ, num_classes=0), ValueError, "num_classes"),
    (lambda: fit(XS, LS, XQ, neighbours=2), TypeError, "neighbours"),
    (lambda: X.paddle(XS, LS, XQ, num_classes=2, complexity=-1), ValueError, "complexity"),
    (lambda: X.laplacian_shot(XS, LS, XQ, num_classes=2, weight=-1), ValueError, "weight"),
    (lambda: X.cl2n(XQ, torch.zeros(3)), ValueError, "base_mean must have shape"),
    (lambda: X.cl2n(XQ, 0.0), TypeError, "base_mean"),
    (lambda: X.shift_correction(XS, XQ.double()), TypeError, "query"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
