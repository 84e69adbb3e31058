"""The theorems of chapter similarity/groco as properties; oracles, closed forms, limits, extremes and bad input."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from lossbook.similarity import groco as G
from lossbook.similarity.temperature import contrastive_loss

SORTS = {"odd_even": G.odd_even_sort, "bitonic": G.bitonic_sort}
MONOTONE = ("cauchy", "reciprocal")

seeds = st.integers(0, 2**31)
distributions = st.sampled_from(["cauchy", "logistic", "gaussian", "reciprocal"])
steepnesses = st.floats(0.1, 20)
few = settings(deadline=None, max_examples=40)


def draw(seed, *shape, dtype=torch.float64):
    """Similarities in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) - 1


def slow_comparator(x, beta, distribution):
    v = beta * x
    return {
        "cauchy": lambda: 0.5 + math.atan(v) / math.pi,
        "logistic": lambda: 1 / (1 + math.exp(-v)),
        "gaussian": lambda: 0.5 * math.erfc(-v / math.sqrt(2)),
        "reciprocal": lambda: 0.5 * (1 + v / (2 + abs(v))),
    }[distribution]()


def slow_gates(n, network):
    """Gates as (wire of the smaller, wire of the larger), layer by layer; the bitonic one in its usual form with directions."""
    if network == "odd_even":
        return [[(i, i + 1) for i in range(layer % 2, n - 1, 2)] for layer in range(n)]
    layers, size = [], 2
    while size <= n:
        stride = size // 2
        while stride:
            pairs = [(i, i + stride) for i in range(n) if not i & stride]
            layers.append([(i, j) if not i & size else (j, i) for i, j in pairs])
            stride //= 2
        size *= 2
    return layers


def slow_sort(x, network, beta, distribution):
    """One row, gate by gate, in Python floats: sorted scores, and Q as a list of rows."""
    n = len(x)
    x, q = list(x), [[float(i == j) for j in range(n)] for i in range(n)]
    for layer in slow_gates(n, network):
        for low, high in layer:
            stay, swap = (slow_comparator(d, beta, distribution) for d in (x[high] - x[low], x[low] - x[high]))
            for row in [x, *q]:
                a, b = row[low], row[high]
                row[low], row[high] = stay * a + swap * b, swap * a + stay * b
    return x, q


def slow_groco(positive, negative, k, beta, distribution):
    losses = []
    for pos, neg in zip(positive.tolist(), negative.tolist(), strict=True):
        x = sorted(sorted(neg)[-k:]) + sorted(pos)
        _, q = slow_sort(x, "odd_even", beta, distribution)
        own = [sum(row[:k]) if i < k else sum(row[k:]) for i, row in enumerate(q)]
        losses.append(-sum(map(math.log, own)) / len(x))
    return torch.tensor(losses, dtype=torch.float64)


# --- the networks -----------------------------------------------------------------------------------------------------


@few
@given(seeds, st.integers(1, 9), steepnesses, distributions)
def test_odd_even_equals_the_slow_loop(seed, n, beta, distribution):
    x = draw(seed, 3, n)
    scores, q = G.odd_even_sort(x, steepness=beta, distribution=distribution)
    for i in range(3):
        slow = slow_sort(x[i].tolist(), "odd_even", beta, distribution)
        torch.testing.assert_close(scores[i], torch.tensor(slow[0], dtype=torch.float64), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(q[i], torch.tensor(slow[1], dtype=torch.float64), rtol=1e-11, atol=1e-12)


@few
@given(seeds, st.sampled_from([1, 2, 4, 8, 16]), steepnesses, distributions)
def test_bitonic_equals_the_slow_loop(seed, n, beta, distribution):
    x = draw(seed, 2, n)
    scores, q = G.bitonic_sort(x, steepness=beta, distribution=distribution)
    for i in range(2):
        slow = slow_sort(x[i].tolist(), "bitonic", beta, distribution)
        torch.testing.assert_close(scores[i], torch.tensor(slow[0], dtype=torch.float64), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(q[i], torch.tensor(slow[1], dtype=torch.float64), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("network", SORTS)
@pytest.mark.parametrize("distribution", ["cauchy", "logistic", "reciprocal"])
def test_networks_equal_diffsort(network, distribution):
    diffsort = pytest.importorskip("diffsort")
    x = draw(0, 6, 16).requires_grad_()
    weights = draw(1, 6, 16, 16)
    peer = diffsort.DiffSortNet(network, 16, steepness=3.0, distribution=distribution)(x)
    ours = SORTS[network](x, steepness=3.0, distribution=distribution)
    for a, b in zip(ours, peer, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad((q * weights).sum() + s.square().sum(), x)[0] for s, q in (ours, peer)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-11)


@few
@given(seeds, st.sampled_from(["odd_even", "bitonic"]), steepnesses, distributions)
def test_permutation_is_doubly_stochastic_and_makes_the_scores(seed, network, beta, distribution):
    x = draw(seed, 3, 8)
    scores, q = SORTS[network](x, steepness=beta, distribution=distribution)
    ones = torch.ones(3, 8, dtype=torch.float64)
    assert (q >= 0).all()
    torch.testing.assert_close(q.sum(1), ones, rtol=0, atol=1e-12)
    torch.testing.assert_close(q.sum(2), ones, rtol=0, atol=1e-12)
    torch.testing.assert_close(scores, (x[:, None] @ q).squeeze(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(scores.sum(1), x.sum(1))
    # Majorized by the input: the m largest relaxed scores never add up to more than the m largest scores.
    largest = [s.sort(dim=1, descending=True).values.cumsum(1) for s in (scores, x)]
    assert (largest[0] <= largest[1] + 1e-12).all()


@pytest.mark.parametrize("n", range(2, 11))
def test_odd_even_sorts_all_binary_inputs_in_n_layers_and_no_fewer(n):
    binary = torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)), dtype=torch.float64)
    scores, _ = G.odd_even_sort(binary, steepness=1e12)
    torch.testing.assert_close(scores, binary.sort(dim=1).values, rtol=0, atol=1e-9)
    assert len(G._odd_even_layers(n)) == (1 if n == 2 else n)
    if n > 2:  # without its last layer it does not sort
        scores, _ = G._run(binary, G._odd_even_layers(n)[:-1], 1e12, "cauchy")
        assert not torch.allclose(scores, binary.sort(dim=1).values, atol=1e-3)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_bitonic_sorts_all_binary_inputs(n):
    binary = torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)), dtype=torch.float64)
    scores, _ = G.bitonic_sort(binary, steepness=1e12)
    torch.testing.assert_close(scores, binary.sort(dim=1).values, rtol=0, atol=1e-9)
    depth = int(math.log2(n))
    assert len(G._bitonic_layers(n)) == depth * (depth + 1) // 2


@few
@given(seeds, st.sampled_from(["odd_even", "bitonic"]), distributions)
def test_steep_limit_is_the_sort(seed, network, distribution):
    n = 8
    generator = torch.Generator().manual_seed(seed)
    gaps = 0.01 + torch.rand(1, n, generator=generator, dtype=torch.float64)
    x = gaps.cumsum(1)[:, torch.randperm(n, generator=generator)]
    scores, q = SORTS[network](x, steepness=1e6, distribution=distribution)
    torch.testing.assert_close(scores, x.sort(dim=1).values, rtol=0, atol=2e-5)
    wanted = F.one_hot(x.argsort(dim=1), n).transpose(1, 2).double()
    torch.testing.assert_close(q, wanted, rtol=0, atol=2e-3)


# --- comparators ------------------------------------------------------------------------------------------------------


@few
@given(st.floats(-30, 30), steepnesses, distributions)
def test_comparator_equals_its_formula_and_is_symmetric(x, beta, distribution):
    value = G.comparator(torch.tensor(x, dtype=torch.float64), steepness=beta, distribution=distribution)
    mirrored = G.comparator(torch.tensor(-x, dtype=torch.float64), steepness=beta, distribution=distribution)
    assert value.item() == pytest.approx(slow_comparator(x, beta, distribution), rel=1e-9, abs=1e-12)
    assert (value + mirrored).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("distribution", "slope"),
    [("cauchy", 1 / math.pi), ("logistic", 1 / 4), ("gaussian", 1 / math.sqrt(2 * math.pi)), ("reciprocal", 1 / 4)],
)
def test_slope_at_a_tie(distribution, slope):
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    G.comparator(zero, steepness=3.0, distribution=distribution).backward()
    assert zero.grad.item() == pytest.approx(3 * slope)


@pytest.mark.parametrize("distribution", MONOTONE)
def test_tails_keep_their_digits_in_float32(distribution):
    far = torch.tensor([-1e4, -1e6])
    exact = {"cauchy": 1 / (math.pi * 1e4), "reciprocal": 1 / (2 + 1e4)}[distribution]
    value = G.comparator(far, distribution=distribution)
    assert value[0].item() == pytest.approx(exact, rel=1e-5) and value[1] > 0


def soft_min(x, beta, distribution):
    """Soft minimum of 0 and x, and its derivative in the zero."""
    zero = torch.zeros_like(x).requires_grad_()
    scores, _ = G.odd_even_sort(torch.stack([zero, x], dim=1), steepness=beta, distribution=distribution)
    (slope,) = torch.autograd.grad(scores[:, 0].sum(), zero)
    return scores[:, 0].detach(), slope


@pytest.mark.parametrize("distribution", MONOTONE)
def test_monotone_comparators(distribution):
    x = torch.cat([-torch.logspace(4, -4, 200), torch.logspace(-4, 4, 200)]).double()
    value, slope = soft_min(x, 1.0, distribution)
    assert ((slope > 0) & (slope < 1)).all()
    error = value - x.clamp(max=0)
    half = error[200:]
    assert (half.diff() >= 0).all()  # it grows with the distance,
    assert half[-1].item() == pytest.approx(
        {"cauchy": 1 / math.pi, "reciprocal": 1.0}[distribution], rel=1e-3
    )  # up to here


def test_logistic_soft_minimum_turns_at_the_root():
    def slope(u):
        return soft_min(torch.tensor([u], dtype=torch.float64), 1.0, "logistic")[1].item()

    assert brentq(slope, -2, -1, xtol=1e-12) == pytest.approx(-1.2784645, abs=1e-7)
    x = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    error = soft_min(x, 1.0, "logistic")[0] - x.clamp(max=0)
    assert error.max().item() == pytest.approx(0.2784645, abs=1e-6)
    assert abs(x[error.argmax()].item()) == pytest.approx(1.2784645, abs=1e-3)


def test_cauchy_error_approaches_its_bound():
    beta = 2.0
    x = torch.tensor([1e6], dtype=torch.float64)
    assert abs(soft_min(x, beta, "cauchy")[0].item() - 1 / (math.pi * beta)) < 1e-6


def jacobian(x, network, beta, distribution):
    return torch.func.vmap(
        torch.func.jacrev(lambda row: SORTS[network](row[None], steepness=beta, distribution=distribution)[0][0])
    )(x)


@few
@given(seeds, st.sampled_from(["odd_even", "bitonic"]), st.floats(0.1, 100), st.sampled_from(MONOTONE))
def test_jacobian_of_a_monotone_network_is_doubly_stochastic(seed, network, beta, distribution):
    slopes = jacobian(draw(seed, 3, 8), network, beta, distribution)
    assert (slopes >= -1e-12).all()
    ones = torch.ones(3, 8, dtype=torch.float64)
    torch.testing.assert_close(slopes.sum(1), ones, rtol=0, atol=1e-9)
    torch.testing.assert_close(slopes.sum(2), ones, rtol=0, atol=1e-9)


@pytest.mark.parametrize("distribution", ["logistic", "gaussian"])
def test_other_networks_are_not_monotone(distribution):
    assert jacobian(draw(0, 20, 8), "odd_even", 5.0, distribution).min() < -0.1


# --- the loss ---------------------------------------------------------------------------------------------------------


@few
@given(seeds, st.integers(1, 6), st.integers(1, 3), steepnesses, distributions)
def test_loss_equals_the_slow_loop(seed, k, num_positives, beta, distribution):
    positive, negative = draw(seed, 3, num_positives), draw(seed + 1, 3, k + 2)
    loss = G.groco_loss(
        positive, negative, num_negatives=k, steepness=beta, distribution=distribution, reduction="none"
    )
    torch.testing.assert_close(loss, slow_groco(positive, negative, k, beta, distribution), rtol=1e-8, atol=1e-9)
    assert (loss > -1e-12).all()


@few
@given(seeds, st.sampled_from(["odd_even", "bitonic"]), st.integers(1, 7), steepnesses, distributions)
def test_adjoint_gives_the_probabilities_of_the_matrix(seed, network, k, beta, distribution):
    x = draw(seed, 3, 8)
    _, q = SORTS[network](x, steepness=beta, distribution=distribution)
    logs = G.group_log_probabilities(x, k, network=network, steepness=beta, distribution=distribution)
    negative = G.group_probabilities(q, k)
    torch.testing.assert_close(logs[..., 0].exp(), negative, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(logs.exp().sum(2), torch.ones(3, 8, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(negative.sum(1), torch.full((3,), float(k), dtype=torch.float64))


def test_worked_example_and_three_gates_by_hand():
    loss = G.groco_loss(torch.tensor([[0.6]]), torch.tensor([[0.2]]), num_negatives=1)
    assert loss.item() == pytest.approx(0.4762327, abs=1e-6)
    # n = 3: gates (1,2), (2,3), (1,2).
    x = draw(0, 1, 3)[0].tolist()
    f = lambda v: 0.5 + math.atan(v) / math.pi
    p = f(x[1] - x[0])
    a, b, c = p * x[0] + (1 - p) * x[1], (1 - p) * x[0] + p * x[1], x[2]
    q = f(c - b)
    b, c = q * b + (1 - q) * c, (1 - q) * b + q * c
    r = f(b - a)
    by_hand = [r * a + (1 - r) * b, (1 - r) * a + r * b, c]
    scores, permutation = G.odd_even_sort(torch.tensor([x], dtype=torch.float64))
    assert scores[0].tolist() == pytest.approx(by_hand, abs=1e-12)
    first = [p * r + (1 - p) * q * (1 - r), p * (1 - r) + (1 - p) * q * r, (1 - p) * (1 - q)]
    assert permutation[0, 0].tolist() == pytest.approx(first, abs=1e-12)


@pytest.mark.parametrize(("k", "value"), [(1, math.log(2)), (2, 0.4228371), (10, 0.2019829)])
def test_loss_at_ties(k, value):
    assert G.groco_loss(torch.zeros(1, 1), torch.zeros(1, k), num_negatives=k).item() == pytest.approx(value, abs=1e-6)


def test_rank_distribution_of_the_last_of_three_ties():
    _, q = G.odd_even_sort(torch.zeros(1, 3))
    assert q[0, 2].tolist() == [0.25, 0.25, 0.5]


def test_best_value_of_cosines_is_not_zero():
    loss = G.groco_loss(torch.ones(1, 1, dtype=torch.float64), -torch.ones(1, 10, dtype=torch.float64))
    assert loss.item() == pytest.approx(0.1469718, abs=1e-7)


@few
@given(seeds, st.floats(0.01, 1e4), st.floats(-1, 1))
def test_one_negative_with_the_logistic_comparator_is_the_contrastive_loss(seed, beta, positive):
    negative = draw(seed, 1, 1)
    positive = torch.tensor([[positive]], dtype=torch.float64)
    ours = G.groco_loss(positive, negative, num_negatives=1, steepness=beta, distribution="logistic")
    softmax = contrastive_loss(positive[:, 0], negative, temperature=1 / beta)
    torch.testing.assert_close(ours, softmax, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, F.softplus(-beta * (positive - negative)).squeeze(), rtol=1e-8, atol=1e-9)


def test_cauchy_gradient_of_one_negative():
    def slope(difference):
        x = torch.tensor([[difference]], dtype=torch.float64, requires_grad=True)
        G.groco_loss(x, torch.zeros(1, 1, dtype=torch.float64), num_negatives=1).backward()
        return -x.grad.item()

    assert slope(0.0) == pytest.approx(2 / math.pi)
    assert slope(-2.0) == pytest.approx(0.431, abs=5e-4)
    assert slope(-1000.0) == pytest.approx(1 / 1000, rel=1e-2)  # whatever the steepness
    grid = torch.linspace(-2, 0, 2001, dtype=torch.float64)
    slopes = [slope(x) for x in grid.tolist()]
    assert max(slopes) == pytest.approx(0.725, abs=5e-4)
    assert grid[slopes.index(max(slopes))].item() == pytest.approx(-0.43, abs=0.005)


def test_gradient_falls_on_the_hardest():
    negative = torch.linspace(-0.3, 0.4, 10, dtype=torch.float64)[None].requires_grad_()
    positive = torch.tensor([[0.3, 0.5, 0.7]], dtype=torch.float64, requires_grad=True)
    G.groco_loss(positive, negative).backward()
    wanted = [8.493e-5, 9.821e-5, 6.775e-4, 7.778e-4, 3.192e-3, 3.537e-3, 9.060e-3, 9.638e-3, 1.537e-2, 1.544e-2]
    assert negative.grad[0].tolist() == pytest.approx(wanted, rel=1e-3)
    assert positive.grad[0].tolist() == pytest.approx([-0.0204, -0.0197, -0.0178], rel=1e-2)
    assert (negative.grad.diff() >= 0).all() and positive.grad.abs().argmax() == 0


@few
@given(seeds, distributions)
def test_invariances(seed, distribution):
    generator = torch.Generator().manual_seed(seed)
    positive, negative = draw(seed, 3, 3), draw(seed + 1, 3, 9)
    value = lambda p, n: G.groco_loss(p, n, num_negatives=4, distribution=distribution, reduction="none")
    loss = value(positive, negative)
    easy = negative.topk(4, dim=1).values[:, -1:] - torch.rand(3, 5, generator=generator, dtype=torch.float64)
    for other in (
        value(positive[:, torch.randperm(3, generator=generator)], negative),
        value(positive, negative[:, torch.randperm(9, generator=generator)]),
        value(positive, torch.cat([negative, easy], dim=1)),
        value(positive + 0.3, negative + 0.3),
    ):
        torch.testing.assert_close(other, loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        G.groco_loss(2 * positive, 2 * negative, num_negatives=4, distribution=distribution),
        G.groco_loss(positive, negative, num_negatives=4, steepness=2.0, distribution=distribution),
    )


@few
@given(seeds, st.floats(0.01, 1))
def test_moving_all_positives_up_lowers_the_loss_at_steepness_one(seed, shift):
    positive, negative = draw(seed, 20, 3), draw(seed + 1, 20, 10)
    before, after = (G.groco_loss(p, negative, reduction="none") for p in (positive, positive + shift))
    assert (after < before).all()


def test_single_gradients_may_have_the_wrong_sign_and_more_so_when_steep():
    def share(beta):
        positive, negative = draw(0, 2000, 1).requires_grad_(), draw(1, 2000, 2).requires_grad_()
        G.groco_loss(positive, negative, num_negatives=2, steepness=beta, reduction="sum").backward()
        return (negative.grad < 0).double().mean().item()

    assert 0.02 < share(1.0) < share(5.0) and share(0.01) < share(1.0)


def test_mask_leaves_out_negatives():
    positive, negative = draw(2, 4, 2), draw(3, 4, 8)
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[:, ::2] = False
    masked = G.groco_loss(positive, negative, num_negatives=4, mask=mask)
    torch.testing.assert_close(masked, G.groco_loss(positive, negative[:, 1::2], num_negatives=4))


def test_reductions_agree():
    positive, negative = draw(4, 5, 2), draw(5, 5, 12)
    each = G.groco_loss(positive, negative, reduction="none")
    torch.testing.assert_close(G.groco_loss(positive, negative, reduction="sum"), each.sum())
    torch.testing.assert_close(G.groco_loss(positive, negative), each.mean())


@pytest.mark.parametrize("distribution", ["cauchy", "logistic", "gaussian", "reciprocal"])
def test_gradcheck(distribution):
    options = dict(steepness=2.0, distribution=distribution)
    x = draw(6, 2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: G.odd_even_sort(x, **options), x)
    assert torch.autograd.gradcheck(lambda x: G.bitonic_sort(x[:, :4], **options), x)
    positive, negative = draw(7, 2, 2).requires_grad_(), draw(8, 2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, n: G.groco_loss(p, n, num_negatives=3, **options), (positive, negative))
    tie = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)  # smooth where the groups tie
    assert torch.autograd.gradcheck(lambda p: G.groco_loss(p, torch.zeros_like(p), num_negatives=1, **options), tie)


# --- batches of views -------------------------------------------------------------------------------------------------


def views(seed=0, num=3, rows=8, dim=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, rows, dim, generator=generator, dtype=torch.float64).requires_grad_()


def slow_multi_view(views, k, as_positive, stop, **options):
    unit = F.normalize(views, dim=-1)
    keys = unit.detach() if stop else unit
    losses = torch.empty(views.shape[:2], dtype=torch.float64)
    for v, i in itertools.product(range(len(views)), range(views.shape[1])):
        positive = torch.stack([unit[v, i] @ keys[w, i] for w in range(as_positive) if w != v])
        negative = torch.stack([unit[v, i] @ keys[v, j] for j in range(views.shape[1]) if j != i])
        losses[v, i] = G.groco_loss(positive[None], negative[None], num_negatives=k, **options)
    return losses


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize(("as_positive", "chunk"), [(None, None), (2, 3)])
def test_multi_view_loss_equals_the_slow_loop(stop, as_positive, chunk):
    x = views()
    options = dict(steepness=2.0, distribution="logistic")
    ours = G.groco_multi_view_loss(
        x,
        num_negatives=4,
        num_positive_views=as_positive,
        stop_gradient=stop,
        reduction="none",
        chunk_size=chunk,
        **options,
    )
    slow = slow_multi_view(x, 4, as_positive or 3, stop, **options)
    torch.testing.assert_close(ours, slow, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(loss.mean(), x)[0] for loss in (ours, slow)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_stopping_the_gradient_matters():
    x = views(1)
    grads = [
        torch.autograd.grad(G.groco_multi_view_loss(x, num_negatives=3, stop_gradient=stop), x)[0] for stop in (0, 1)
    ]
    assert (grads[0] - grads[1]).abs().max() > 1e-3


@few
@given(seeds, st.sampled_from([None, 1, 4]), st.booleans(), st.integers(1, 8))
def test_top_k_nt_xent_equals_the_slow_loop(seed, chunk, stop, k):
    first, second = (v.detach().requires_grad_() for v in views(seed, 2, 5, 4))
    ours = G.top_k_nt_xent_loss(
        first, second, num_negatives=k, temperature=0.3, stop_gradient=stop, reduction="none", chunk_size=chunk
    )
    unit = F.normalize(torch.cat([first, second]), dim=1)
    keys = unit.detach() if stop else unit
    slow = []
    for i in range(10):
        others = torch.stack([unit[i] @ keys[j] for j in range(10) if j % 5 != i % 5])
        kept = torch.cat([(unit[i] @ keys[(i + 5) % 10])[None], others.topk(k).values]) / 0.3
        slow.append(kept.logsumexp(0) - kept[0])
    slow = torch.stack(slow)
    torch.testing.assert_close(ours, slow, rtol=1e-10, atol=1e-12)
    for a, b in zip(
        *(torch.autograd.grad(loss.mean(), [first, second]) for loss in (ours, slow)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_order_accuracy():
    positive = torch.tensor([[0.5, 0.9], [0.5, 0.9], [0.5, 0.9]])
    negative = torch.tensor([[0.4, -1.0], [0.6, -1.0], [0.5, 0.0]])
    assert G.order_accuracy(positive, negative).item() == pytest.approx(1 / 3)


# --- extremes and transforms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["cauchy", "logistic", "gaussian", "reciprocal"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_extreme_similarities_in_float32(distribution, scale):
    generator = torch.Generator().manual_seed(0)
    positive = scale * torch.sign(torch.randn(20, 2, generator=generator))
    negative = scale * torch.sign(torch.randn(20, 12, generator=generator))
    positive.requires_grad_(), negative.requires_grad_()
    loss = G.groco_loss(positive, negative, distribution=distribution)
    loss.backward()
    assert loss.isfinite() and positive.grad.isfinite().all() and negative.grad.isfinite().all()
    for sort, n in ((G.odd_even_sort, 12), (G.bitonic_sort, 8)):
        assert all(part.isfinite().all() for part in sort(negative[:, :n], distribution=distribution))


def test_hopeless_order_still_has_a_gradient_in_float32():
    positive = torch.tensor([[-1.0]], requires_grad=True)
    loss = G.groco_loss(positive, torch.ones(1, 10), steepness=1e4, distribution="logistic")
    loss.backward()
    assert loss.item() > 1e3 and positive.grad.item() < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    positive, negative = draw(9, 3, 2, dtype=dtype), draw(10, 3, 12, dtype=dtype)
    assert G.groco_loss(positive, negative).dtype == dtype
    assert G.odd_even_sort(negative)[1].dtype == dtype
    assert G.groco_multi_view_loss(views().to(dtype), num_negatives=3).dtype == dtype
    assert G.order_accuracy(positive, negative).dtype == dtype


def test_half_precision_gives_a_float32_loss():
    x = views(2).detach().to(torch.bfloat16).requires_grad_()
    loss = G.groco_multi_view_loss(x, num_negatives=3)
    loss.backward()
    assert loss.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, G.groco_multi_view_loss(x.float(), num_negatives=3))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(G.groco_multi_view_loss(x.float(), num_negatives=3), loss)


def test_transforms_and_compile():
    positive, negative = draw(11, 3, 2), draw(12, 3, 6)
    loss = lambda p, n: G.groco_loss(p, n, num_negatives=4)
    per_row = torch.func.vmap(torch.func.grad(lambda p, n: loss(p[None], n[None])))(positive, negative)
    leaf = positive.clone().requires_grad_()
    G.groco_loss(leaf, negative, num_negatives=4, reduction="sum").backward()
    torch.testing.assert_close(per_row, leaf.grad)
    compiled = torch.compile(loss, backend="aot_eager")
    torch.testing.assert_close(compiled(positive, negative), loss(positive, negative))


def test_non_contiguous_input():
    positive, negative = draw(13, 2, 3).T, draw(14, 12, 3).T
    torch.testing.assert_close(
        G.groco_loss(positive, negative), G.groco_loss(positive.contiguous(), negative.contiguous())
    )


# --- bad input --------------------------------------------------------------------------------------------------------

P, N, X = torch.zeros(3, 2), torch.zeros(3, 12), torch.zeros(3, 4)
V = torch.eye(12).expand(2, 12, 12)


@pytest.mark.parametrize(
    "call",
    [
        lambda **options: G.comparator(X, **options),
        lambda **options: G.odd_even_sort(X, **options),
        lambda **options: G.bitonic_sort(X, **options),
        lambda **options: G.group_log_probabilities(X, 2, **options),
        lambda **options: G.groco_loss(P, N, **options),
        lambda **options: G.groco_multi_view_loss(V, **options),
    ],
)
def test_bad_steepness_and_distribution(call):
    for steepness in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="steepness"):
            call(steepness=steepness)
    with pytest.raises(TypeError, match="steepness"):
        call(steepness="steep")
    with pytest.raises(ValueError, match="distribution.*'normal'"):
        call(distribution="normal")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: G.odd_even_sort(torch.zeros(4)), "x must"),
        (lambda: G.odd_even_sort(torch.zeros(2, 0)), "x must"),
        (lambda: G.bitonic_sort(torch.zeros(2, 6)), "x must.*power of two.*6"),
        (lambda: G.group_probabilities(torch.zeros(2, 3, 4), 1), "permutation"),
        (lambda: G.group_probabilities(torch.zeros(2, 3, 3), 3), "num_negatives"),
        (lambda: G.group_probabilities(torch.zeros(2, 3, 3), 0), "num_negatives"),
        (lambda: G.group_log_probabilities(X, 4), "num_negatives"),
        (lambda: G.group_log_probabilities(X, 2, network="bubble"), "network.*'bubble'"),
        (lambda: G.group_log_probabilities(torch.zeros(2, 6), 2, network="bitonic"), "x must"),
        (lambda: G.groco_loss(P[:2], N), "positive"),
        (lambda: G.groco_loss(P[:, 0], N), "positive"),
        (lambda: G.groco_loss(P, N[:, 0]), "negative"),
        (lambda: G.groco_loss(P, N, num_negatives=13), "num_negatives.*12.*13"),
        (lambda: G.groco_loss(P, N, num_negatives=0), "num_negatives"),
        (lambda: G.groco_loss(P, N, mask=N[:, :3] == 0), "mask"),
        (lambda: G.groco_loss(P, N, mask=torch.arange(12).expand(3, 12) < 9), "mask.*10.*9"),
        (lambda: G.groco_loss(P, N, reduction="average"), "reduction"),
        (lambda: G.groco_loss(P / 0, N), "positive.*finite"),
        (lambda: G.groco_loss(P, N.masked_fill(N == N.max(), torch.nan)), "negative.*finite"),
        (lambda: G.groco_loss(P, N.masked_fill(torch.arange(12) > 8, -torch.inf)), "negative.*finite"),
        (lambda: G.groco_loss(P, N, distribution=["cauchy"]), "distribution"),
        (lambda: G.group_log_probabilities(N, 3, network=["odd_even"]), "network"),
        (lambda: G.groco_multi_view_loss(V[0]), "views"),
        (lambda: G.groco_multi_view_loss(V[:1]), "views"),
        (lambda: G.groco_multi_view_loss(V, num_negatives=12), "num_negatives"),
        (lambda: G.groco_multi_view_loss(V, num_positive_views=1), "num_positive_views"),
        (lambda: G.groco_multi_view_loss(V, num_positive_views=3), "num_positive_views"),
        (lambda: G.groco_multi_view_loss(V, chunk_size=0), "chunk_size"),
        (lambda: G.top_k_nt_xent_loss(V[0], V[0][:3]), "view2"),
        (lambda: G.top_k_nt_xent_loss(V[0], V[0], num_negatives=23), "num_negatives"),
        (lambda: G.top_k_nt_xent_loss(V[0], V[0], temperature=0), "temperature"),
        (lambda: G.order_accuracy(P[:2], N), "positive"),
    ],
)
def test_bad_values_name_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: G.comparator(0.5), "difference"),
        (lambda: G.odd_even_sort(X.long()), "x must"),
        (lambda: G.group_probabilities(torch.zeros(2, 3, 3), 1.0), "num_negatives"),
        (lambda: G.groco_loss([0.1], N), "positive"),
        (lambda: G.groco_loss(P, N, mask=N), "mask"),
        (lambda: G.groco_loss(P, N, num_negatives=True), "num_negatives"),
        (lambda: G.groco_multi_view_loss(V.long()), "views"),
        (lambda: G.groco_loss(P, N.double()), "positive"),
        (lambda: G.order_accuracy(P, N.double()), "positive"),
        (lambda: G.top_k_nt_xent_loss(V[0].long(), V[0]), "view1"),
        (lambda: G.top_k_nt_xent_loss(V[0], V[0].double()), "view2"),
    ],
)
def test_bad_types_name_the_argument(call, name):
    with pytest.raises(TypeError, match=name):
        call()


@pytest.mark.parametrize("distribution", ["cauchy", "logistic", "gaussian", "reciprocal"])
@pytest.mark.parametrize("steepness", [1e2, 1e3, 1e4])
def test_gradients_far_out_of_order_keep_their_digits_in_float32(distribution, steepness):
    grads = []
    for dtype in (torch.float32, torch.float64):
        positive = torch.tensor([[-1.0]], dtype=dtype, requires_grad=True)
        negative = torch.tensor([[1.0]], dtype=dtype)
        G.groco_loss(positive, negative, num_negatives=1, steepness=steepness, distribution=distribution).backward()
        grads.append(positive.grad.double())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=0)
