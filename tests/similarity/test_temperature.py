"""The theorems of chapter similarity/temperature as properties; closed forms, limits, extremes and bad input."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lossbook.similarity import temperature as T

# The worked example of the chapter: one positive, two negatives.
POSITIVE = torch.tensor([0.6], dtype=torch.float64)
NEGATIVES = torch.tensor([[0.8, 0.2]], dtype=torch.float64)

seeds = st.integers(0, 2**31)
temperatures = st.floats(0.05, 10)
few = settings(deadline=None, max_examples=50)


def random_pairs(seed, rows=3, negatives=None, dtype=torch.float64):
    """Similarities in [-1, 1]; K up to 50."""
    generator = torch.Generator().manual_seed(seed)
    k = negatives or int(torch.randint(1, 51, (), generator=generator))
    draw = torch.rand(rows, k + 1, generator=generator, dtype=torch.float64).to(dtype) * 2 - 1
    return draw[:, 0].clone().requires_grad_(), draw[:, 1:].clone().requires_grad_()


def random_vectors(seed, rows, dim, count=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, dim, generator=generator, dtype=torch.float64) for _ in range(count)]


def slow_contrastive(positive, negatives, tau, mask=None):
    """The definition, pair by pair, in Python floats."""
    losses = []
    for i, s in enumerate(positive.tolist()):
        kept = [x for j, x in enumerate(negatives[i].tolist()) if mask is None or mask[i, j]]
        losses.append(math.log1p(sum(math.exp((x - s) / tau) for x in kept)))
    return torch.tensor(losses, dtype=torch.float64)


def slow_info_nce(query, key, tau):
    losses = []
    for i in range(len(query)):
        s = [F.cosine_similarity(query[i], key[j], dim=0) / tau for j in range(len(key))]
        losses.append(-s[i] + torch.stack(s).logsumexp(0))
    return torch.stack(losses)


def slow_nt_xent(view1, view2, tau):
    views, n = torch.cat([view1, view2]), len(view1)
    losses = []
    for i in range(2 * n):
        s = {j: F.cosine_similarity(views[i], views[j], dim=0) / tau for j in range(2 * n) if j != i}
        losses.append(-s[(i + n) % (2 * n)] + torch.stack(list(s.values())).logsumexp(0))
    return torch.stack(losses)


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_worked_example():
    value = lambda x: pytest.approx(x, abs=6e-7)  # the dossier's digits  # noqa: E731
    assert T.contrastive_loss(POSITIVE, NEGATIVES, temperature=0.5).item() == value(1.078802)
    pull, push = T.similarity_gradients(POSITIVE, NEGATIVES, temperature=0.5)
    assert pull.item() == pytest.approx(-1.319995, abs=2e-6)
    assert (push * 0.5).squeeze().tolist() == value([0.507224, 0.152773])
    assert 1 + 0.5 * pull.item() == value(0.340003)
    assert T.relative_penalty(NEGATIVES, temperature=0.5).squeeze().tolist() == value([0.768525, 0.231475])
    assert T.penalty_entropy(NEGATIVES, temperature=0.5).item() == value(0.541053)
    assert T.contrastive_loss(POSITIVE, NEGATIVES, temperature=0.1).item() == value(2.129109)
    assert T.relative_penalty(NEGATIVES, temperature=0.1).squeeze().tolist() == value([0.997527, 0.002473])


@few
@given(seeds, temperatures, st.booleans())
def test_contrastive_loss_equals_the_slow_loop(seed, tau, masked):
    positive, negatives = random_pairs(seed)
    mask = None
    if masked:
        mask = negatives > -0.5
        mask[:, 0] = True
    loss = T.contrastive_loss(positive, negatives, temperature=tau, mask=mask, reduction="none")
    torch.testing.assert_close(loss, slow_contrastive(positive, negatives, tau, mask), rtol=1e-12, atol=1e-12)
    assert (loss >= 0).all()


@few
@given(seeds, st.integers(2, 7), temperatures, st.sampled_from([None, 1, 3]))
def test_batch_losses_equal_the_slow_loops(seed, rows, tau, chunk):
    q, k = (x.requires_grad_() for x in random_vectors(seed, rows, 4))
    both_ways = (slow_info_nce(q, k, tau) + slow_info_nce(k, q, tau)) / 2
    for ours, slow in [
        (T.info_nce_loss(q, k, temperature=tau, reduction="none", chunk_size=chunk), slow_info_nce(q, k, tau)),
        (T.info_nce_loss(q, k, temperature=tau, reduction="none", symmetric=True, chunk_size=chunk), both_ways),
        (T.nt_xent_loss(q, k, temperature=tau, reduction="none", chunk_size=chunk), slow_nt_xent(q, k, tau)),
    ]:
        torch.testing.assert_close(ours, slow, rtol=1e-10, atol=1e-12)
        for a, b in zip(
            torch.autograd.grad(ours.mean(), [q, k]), torch.autograd.grad(slow.mean(), [q, k]), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_explicit_and_batch_forms_agree():
    q, k = random_vectors(0, 6, 4)
    positive, negatives = T.pair_similarities(q, k)
    full = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T
    assert torch.equal(positive, full.diagonal())
    for i in range(6):
        assert torch.equal(negatives[i], torch.cat([full[i, :i], full[i, i + 1 :]]))
    torch.testing.assert_close(
        T.contrastive_loss(positive, negatives, temperature=0.2), T.info_nce_loss(q, k, temperature=0.2)
    )


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, n, t: T.contrastive_loss(p, n, temperature=t),
        lambda p, n, t: T.hard_contrastive_loss(p, n, alpha=0.5, temperature=t),
        lambda p, n, t: T.simple_contrastive_loss(p, n),
        lambda p, n, t: T.simple_contrastive_loss(p, n, weight=0.7),
        lambda p, n, t: T.hard_simple_loss(p, n, alpha=0.5),
        lambda p, n, t: T.zero_margin_triplet(p, n),
        lambda p, n, t: T.large_temperature_expansion(p, n, temperature=3.0),
        lambda p, n, t: T.penalty_entropy(n, temperature=t),
        lambda p, n, t: T.relative_penalty(n, temperature=t),
    ],
)
def test_gradcheck_explicit(loss):
    positive, negatives = random_pairs(3, negatives=6)
    tau = torch.tensor([0.3, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: loss(*x), (positive, negatives, tau))


def test_gradcheck_batch():
    q, k = (x.requires_grad_() for x in random_vectors(1, 4, 3))
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, t: T.info_nce_loss(q, k, temperature=t, symmetric=True), (q, k, tau))
    assert torch.autograd.gradcheck(lambda q, k, t: T.nt_xent_loss(q, k, temperature=t), (q, k, tau))
    assert torch.autograd.gradgradcheck(lambda q, k, t: T.info_nce_loss(q, k, temperature=t), (q, k, tau))
    assert torch.autograd.gradcheck(lambda q: T.uniformity(F.normalize(q, dim=1)), (q,))
    assert torch.autograd.gradcheck(lambda q: T.tolerance(F.normalize(q, dim=1), torch.tensor([0, 0, 1, 1])), (q,))


def test_numpy_numbers_are_numbers():
    positive, negatives = random_pairs(4)
    assert T.contrastive_loss(positive, negatives, temperature=np.float32(0.5)) == T.contrastive_loss(
        positive, negatives, temperature=0.5
    )
    assert T.simplex_embedding(np.int64(3), 2).shape == (3, 2)


def test_reductions_agree():
    positive, negatives = random_pairs(4)
    each = T.contrastive_loss(positive, negatives, reduction="none")
    torch.testing.assert_close(T.contrastive_loss(positive, negatives, reduction="sum"), each.sum())
    torch.testing.assert_close(T.contrastive_loss(positive, negatives), each.mean())


def test_temperature_per_row():
    positive, negatives = random_pairs(5)
    tau = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    together = T.contrastive_loss(positive, negatives, temperature=tau, reduction="none")
    alone = [T.contrastive_loss(positive[i, None], negatives[i, None], temperature=tau[i].item()) for i in range(3)]
    torch.testing.assert_close(together, torch.stack(alone))
    q, k = random_vectors(6, 3, 4)
    together = T.info_nce_loss(q, k, temperature=tau, reduction="none")
    for i in range(3):
        torch.testing.assert_close(together[i], T.info_nce_loss(q, k, temperature=tau[i].item(), reduction="none")[i])


# --- gradients --------------------------------------------------------------------------------------------------------


@few
@given(seeds, temperatures)
def test_gradients_equal_autograd_and_pull_equals_push(seed, tau):
    positive, negatives = random_pairs(seed)
    T.contrastive_loss(positive, negatives, temperature=tau, reduction="sum").backward()
    pull, push = T.similarity_gradients(positive, negatives, temperature=tau)
    torch.testing.assert_close(pull, positive.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(push, negatives.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(push.sum(1), -pull, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(push.sum(1), -positive.grad, rtol=1e-10, atol=1e-10)


@few
@given(seeds, temperatures)
def test_penalty_is_a_boltzmann_distribution(seed, tau):
    positive, negatives = random_pairs(seed, negatives=7)
    penalty = T.relative_penalty(negatives, temperature=tau)
    pull, push = T.similarity_gradients(positive, negatives, temperature=tau)
    torch.testing.assert_close(penalty, push / -pull[:, None])
    torch.testing.assert_close(penalty.sum(1), torch.ones(3, dtype=torch.float64))
    log_ratio = penalty.log()[:, :-1] - penalty.log()[:, 1:]
    torch.testing.assert_close(log_ratio, (negatives[:, :-1] - negatives[:, 1:]) / tau, rtol=1e-9, atol=1e-9)
    # Halving the temperature squares every ratio, and the positive does not matter.
    halved = T.relative_penalty(negatives, temperature=tau / 2)
    torch.testing.assert_close(halved / halved.sum(1, keepdim=True), penalty**2 / (penalty**2).sum(1, keepdim=True))


@few
@given(seeds, st.floats(0.05, 5))
def test_embedding_gradient_equals_autograd(seed, tau):
    u, g = random_vectors(seed, 3, 5)
    keys = F.normalize(torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=2)
    keys[:, 0] = F.normalize(u, dim=1)  # a negative equal to the anchor
    g = F.normalize(g, dim=1)
    u.requires_grad_()
    f = F.normalize(u, dim=1)
    T.contrastive_loss((f * g).sum(1), torch.einsum("bd,bkd->bk", f, keys), temperature=tau, reduction="sum").backward()
    parts = T.embedding_gradient(u.detach(), g, keys, temperature=tau)
    torch.testing.assert_close(parts.sum(1), u.grad, rtol=1e-9, atol=1e-10)
    assert parts[:, 1].abs().max() < 1e-12 / tau
    # A negative's force has the length P sqrt(1 - s^2) / (tau |u|).
    similarity = torch.einsum("bd,bkd->bk", f, keys).detach()
    _, push = T.similarity_gradients((f * g).sum(1).detach(), similarity, temperature=tau)
    length = push * (1 - similarity**2).clamp(min=0).sqrt() / u.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(parts[:, 1:].norm(dim=2), length, rtol=1e-6, atol=1e-5)


# --- entropy ----------------------------------------------------------------------------------------------------------


@few
@given(seeds)
def test_entropy_and_tau_times_loss_grow_with_temperature(seed):
    positive, negatives = random_pairs(seed)
    grid = torch.logspace(-2, 2, 60, dtype=torch.float64)
    entropies = torch.stack([T.penalty_entropy(negatives, temperature=t.item()) for t in grid])
    energies = torch.stack(
        [t * T.contrastive_loss(positive, negatives, temperature=t.item(), reduction="none") for t in grid]
    )
    assert (entropies.diff(dim=0) >= -1e-12).all()
    assert (energies.diff(dim=0) >= -1e-12).all()


@few
@given(seeds, st.floats(0.1, 5))
def test_derivatives_in_temperature(seed, tau):
    positive, negatives = random_pairs(seed, negatives=6)
    t = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    (entropy_slope,) = torch.autograd.grad(T.penalty_entropy(negatives, temperature=t).sum(), t)
    r = T.relative_penalty(negatives, temperature=tau)
    variance = (r * negatives**2).sum(1) - (r * negatives).sum(1) ** 2
    torch.testing.assert_close(entropy_slope, variance.sum() / tau**3, rtol=1e-5, atol=1e-9)
    (energy_slope,) = torch.autograd.grad((t * T.contrastive_loss(positive, negatives, temperature=t)), t)
    logits = torch.cat([positive[:, None], negatives], 1) / tau
    p = logits.softmax(1)
    torch.testing.assert_close(energy_slope, -(p * p.log()).sum(1).mean(), rtol=1e-9, atol=1e-9)
    (loss_slope,) = torch.autograd.grad(T.contrastive_loss(positive, negatives, temperature=t), t)
    expected = (positive / tau**2 - (p * logits).sum(1) / tau).mean()
    torch.testing.assert_close(loss_slope, expected, rtol=1e-9, atol=1e-9)


def test_all_similarities_equal():
    for k in (1, 4, 50):
        positive, negatives = torch.full((2,), 0.3), torch.full((2, k), 0.3)
        for tau in (0.01, 1.0, 100.0):
            assert T.contrastive_loss(positive, negatives, temperature=tau).item() == pytest.approx(math.log(1 + k))
            torch.testing.assert_close(T.relative_penalty(negatives, temperature=tau), torch.full((2, k), 1 / k))
            torch.testing.assert_close(T.penalty_entropy(negatives, temperature=tau), torch.full((2,), math.log(k)))


def test_entropy_limits_count_the_ties():
    negatives = torch.tensor([[0.9, 0.9, 0.2, -0.5]], dtype=torch.float64)
    assert T.effective_negatives(negatives, temperature=1e-3).item() == pytest.approx(2)
    assert T.effective_negatives(negatives, temperature=1e4).item() == pytest.approx(4, abs=1e-6)


def test_penalty_statistics_of_100_negatives():
    negatives = torch.linspace(-0.5, 0.9, 100, dtype=torch.float64)[None]
    for tau, effective, top in [
        (0.07, 13.4784, 0.867371),
        (0.2, 38.1893, 0.507345),
        (0.5, 75.7095, 0.261829),
        (1.0, 92.3707, 0.174232),
    ]:
        assert T.effective_negatives(negatives, temperature=tau).item() == pytest.approx(effective, abs=6e-5)
        assert T.relative_penalty(negatives, temperature=tau)[0, -10:].sum().item() == pytest.approx(top, abs=6e-7)


# --- limits -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(seeds, st.sampled_from([1e-3, 1e-2, 0.1, 0.5, 1.0, 10.0]))
def test_sandwich(seed, tau):
    positive, negatives = random_pairs(seed)
    triplet = T.zero_margin_triplet(positive, negatives, reduction="none")
    energy = tau * T.contrastive_loss(positive, negatives, temperature=tau, reduction="none")
    assert (energy >= triplet - 1e-12).all()
    assert (energy <= triplet + tau * math.log(1 + negatives.shape[1]) + 1e-12).all()


def test_cold_limit():
    assert abs(0.01 * T.contrastive_loss(POSITIVE, NEGATIVES, temperature=0.01).item() - 0.2) < 1e-6
    # Where the positive has won, each derivative is at most K/tau exp(-(gap)/tau).
    positive, tau = torch.tensor([0.9], dtype=torch.float64), 0.01
    pull, push = T.similarity_gradients(positive, NEGATIVES, temperature=tau)
    bound = 2 / tau * math.exp(-0.1 / tau)
    assert 0 < -pull.item() <= bound and push.max().item() <= bound
    # At a tie with t negatives the pull is t / (1 + t) / tau.
    tie = torch.tensor([[0.9, 0.9, 0.1]], dtype=torch.float64)
    pull, _ = T.similarity_gradients(positive, tie, temperature=tau)
    assert pull.item() == pytest.approx(-2 / 3 / tau)


def test_warm_limit():
    exact = T.contrastive_loss(POSITIVE, NEGATIVES, temperature=100.0).item()
    second = T.large_temperature_expansion(POSITIVE, NEGATIVES, temperature=100.0).item()
    assert exact == pytest.approx(1.0979487321, abs=1e-10)
    assert second == pytest.approx(1.0979487331, abs=1e-10)
    assert abs(exact - second) < 2e-9
    tau = 1e3
    first = T.large_temperature_expansion(POSITIVE, NEGATIVES, temperature=tau, order=1).item()
    error = T.contrastive_loss(POSITIVE, NEGATIVES, temperature=tau).item() - first
    variance = torch.tensor([0.6, 0.8, 0.2], dtype=torch.float64).var(correction=0).item()
    assert error * tau**2 == pytest.approx(variance / 2, rel=1e-2)


@few
@given(seeds, st.sampled_from([20.0, 100.0, 500.0]))
def test_expansion_error_is_of_its_order(seed, tau):
    pairs = random_pairs(seed, rows=1)
    for order in (1, 2):  # similarities span 2, so Var / 2 and the third cumulant / 6 are below 1
        expansion = T.large_temperature_expansion(*pairs, temperature=tau, order=order)
        assert abs(T.contrastive_loss(*pairs, temperature=tau) - expansion) <= tau ** -(order + 1) + 1e-12


def test_simple_loss_is_the_warm_limit():
    positive, negatives = random_pairs(7)
    tau = 1e4
    n = negatives.shape[1] + 1
    loss = T.contrastive_loss(positive, negatives, temperature=tau)
    scaled = (loss - math.log(n)) * tau * n / (n - 1)
    torch.testing.assert_close(scaled, T.simple_contrastive_loss(positive, negatives), rtol=1e-3, atol=1e-4)


def test_simple_loss_by_hand():
    assert T.simple_contrastive_loss(POSITIVE, NEGATIVES, weight=2.0).item() == pytest.approx(-0.6 + 2 * 1.0)
    mask = torch.tensor([[True, False]])
    assert T.simple_contrastive_loss(POSITIVE, NEGATIVES, mask=mask).item() == pytest.approx(-0.6 + 0.8)


# --- hard negatives ---------------------------------------------------------------------------------------------------


@few
@given(seeds, st.floats(0.01, 1), temperatures)
def test_hard_loss_keeps_the_hardest(seed, alpha, tau):
    positive, negatives = random_pairs(seed, rows=2)
    kept = max(1, math.ceil(alpha * negatives.shape[1] - 1e-9))
    top = negatives.detach().sort(dim=1, descending=True).values[:, :kept]
    loss = T.hard_contrastive_loss(positive, negatives, alpha=alpha, temperature=tau, reduction="none")
    torch.testing.assert_close(loss, slow_contrastive(positive, top, tau), rtol=1e-10, atol=1e-12)
    simple = T.hard_simple_loss(positive, negatives, alpha=alpha, reduction="none")
    torch.testing.assert_close(simple, top.mean(1) - positive)
    (loss.sum() + simple.sum()).backward()
    dropped = negatives < top[:, -1:]
    assert (negatives.grad[dropped] == 0).all() and (negatives.grad[~dropped] > 0).all()
    ordinary = T.contrastive_loss(positive, negatives, temperature=tau, reduction="none")
    assert (loss <= ordinary + 1e-12).all()


@few
@given(seeds)
def test_hard_contrastive_grows_with_alpha_and_ends_at_the_ordinary(seed):
    positive, negatives = random_pairs(seed)
    losses = torch.stack(
        [T.hard_contrastive_loss(positive, negatives, alpha=a, temperature=0.5) for a in (0.05, 0.2, 0.5, 0.9, 1.0)]
    )
    assert (losses.diff() >= -1e-12).all()
    torch.testing.assert_close(losses[-1], T.contrastive_loss(positive, negatives, temperature=0.5))
    torch.testing.assert_close(
        T.hard_simple_loss(positive, negatives, alpha=1.0), T.simple_contrastive_loss(positive, negatives)
    )


def test_hard_losses_at_one_negative():
    positive, negatives = random_pairs(8, negatives=1)
    torch.testing.assert_close(
        T.hard_contrastive_loss(positive, negatives, alpha=0.01), T.contrastive_loss(positive, negatives)
    )
    torch.testing.assert_close(
        T.hard_simple_loss(positive, negatives, alpha=0.01), T.simple_contrastive_loss(positive, negatives)
    )


def pushed(negatives, alpha, mask=None):
    """Which negatives receive a push from the hard losses; both must agree."""
    negatives = negatives.clone().requires_grad_()
    positive = torch.zeros(len(negatives))
    T.hard_contrastive_loss(positive, negatives, alpha=alpha, mask=mask).backward()
    hard, negatives.grad = negatives.grad > 0, None
    T.hard_simple_loss(positive, negatives, alpha=alpha, mask=mask).backward()
    assert torch.equal(hard, negatives.grad > 0)
    return hard


def test_number_kept_is_guarded_against_rounding():
    assert pushed(torch.linspace(0, 0.1, 100)[None], 0.07).sum() == 7
    assert pushed(torch.linspace(0, 0.1, 101)[None], 0.07, torch.arange(101)[None] < 100).sum() == 7
    assert pushed(torch.zeros(1, 10), 0.3).sum() == 3  # exactly that many, also at ties


def test_hardest_of_the_unmasked():
    negatives = torch.tensor([[0.2, 0.1, 0.0, 0.05], [0.2, 0.1, 0.0, 0.05]])
    mask = torch.tensor([[False, True, True, True], [False, False, True, True]])
    assert pushed(negatives, 0.5, mask).tolist() == [  # two of three, one of two
        [False, True, False, True],
        [False, False, False, True],
    ]


def test_hard_losses_are_close_at_high_temperature():
    positive, negatives = random_pairs(9, negatives=40)
    tau, kept = 1e3, 4
    hard = T.hard_contrastive_loss(positive, negatives, alpha=0.1, temperature=tau)
    simple = T.hard_simple_loss(positive, negatives, alpha=0.1)
    assert abs(hard - (math.log(kept + 1) + kept / ((kept + 1) * tau) * simple)) < 1e-6


# --- the optimum and the two-level model ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(seeds, st.integers(2, 12), st.integers(1, 12), st.floats(0.05, 5))
def test_no_encoder_is_below_the_simplex_bound(seed, n, dim, tau):
    q, k = random_vectors(seed, n, dim)
    bound = T.simplex_lower_bound(n, tau)
    for other in (k, q, q + 0.1 * k):  # strangers, twins, and close to twins: the bound is nearly tight there
        assert T.info_nce_loss(q, other, temperature=tau).item() >= bound * (1 - 1e-9)


@pytest.mark.parametrize(("n", "tau", "value"), [(4, 0.5, 0.189339), (10, 0.2, 0.0342017), (2, 1.0, None)])
def test_the_simplex_attains_the_bound(n, tau, value):
    for dim in (n - 1, n + 3):
        x = T.simplex_embedding(n, dim)
        cosines = x @ x.T
        off = cosines[~torch.eye(n, dtype=torch.bool)]
        torch.testing.assert_close(cosines.diagonal(), torch.ones(n, dtype=torch.float64))
        torch.testing.assert_close(off, torch.full_like(off, -1 / (n - 1)))
        assert T.info_nce_loss(x, x, temperature=tau).item() == pytest.approx(T.simplex_lower_bound(n, tau), abs=1e-9)
    if value:
        assert T.simplex_lower_bound(n, tau) == pytest.approx(value, abs=6e-7)


def test_two_level_derivative():
    n = classes = 10
    tau, a = 0.3, torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    T.contrastive_loss(*T.two_level_similarities(a, classes, n), temperature=tau).backward()
    b = -(1 + (n - 1) * 0.2) / (n * (classes - 1))
    own, other = math.exp((0.2 - 1) / tau), math.exp((b - 1) / tau)
    closed = (n - 1) / tau * (own - other) / (1 + (n - 1) * own + n * (classes - 1) * other)
    assert a.grad.item() == pytest.approx(closed, abs=1e-12)
    assert a.grad.item() == pytest.approx(0.2477376, abs=6e-8)


@few
@given(st.integers(2, 8), st.integers(2, 8), st.floats(0.1, 3))
def test_two_level_loss_is_convex_with_its_minimum_at_the_simplex(classes, n, tau):
    def loss(a):
        return T.contrastive_loss(*T.two_level_similarities(a, classes, n), temperature=tau)

    grid = torch.linspace(-1 / (n - 1), 1, 41, dtype=torch.float64)
    values = torch.stack([loss(a) for a in grid])
    assert (values.diff().diff() >= -1e-12).all()
    simplex = torch.tensor(-1 / (n * classes - 1), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(simplex), simplex)
    assert abs(slope) < 1e-12 and (values >= loss(simplex) - 1e-12).all()


def test_two_level_gram_matrix_is_feasible():
    a, classes, n = torch.tensor(0.5, dtype=torch.float64), 4, 3
    _, negatives = T.two_level_similarities(a, classes, n)
    own, other = negatives[0, 0], negatives[0, -1]
    block = torch.kron(torch.eye(classes, dtype=torch.float64), torch.ones(n, n, dtype=torch.float64))
    gram = block * own + (1 - block) * other + torch.eye(classes * n, dtype=torch.float64) * (1 - own)
    eigenvalues = torch.linalg.eigvalsh(gram)
    assert eigenvalues[0].abs() < 1e-12 and eigenvalues[1] > 0.1  # least possible: one eigenvalue is zero


def test_false_negative_mass():
    a = torch.tensor(0.5, dtype=torch.float64)
    _, negatives = T.two_level_similarities(a, 10, 10)
    mass = [T.relative_penalty(negatives, temperature=t)[0, :9].sum().item() for t in (0.1, 1.0, 1e4)]
    assert mass == pytest.approx([0.96472, 0.14913, 9 / 99], rel=1e-3)


# --- measures ---------------------------------------------------------------------------------------------------------


def slow_uniformity(x, t):
    return torch.pdist(x).square().mul(-t).exp().mean().log()


@few
@given(seeds, st.integers(2, 9), st.sampled_from([None, 1, 2]), st.sampled_from([0.5, 2.0]))
def test_uniformity_equals_pdist_and_ignores_rotations(seed, n, chunk, t):
    (x,) = random_vectors(seed, n, 3, count=1)
    torch.testing.assert_close(T.uniformity(x, t=t, chunk_size=chunk), slow_uniformity(x, t), rtol=1e-10, atol=1e-10)
    x = F.normalize(x, dim=1)
    rotation = torch.linalg.qr(random_vectors(seed + 1, 3, 3, count=1)[0]).Q
    permutation = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(T.uniformity(x @ rotation, t=t), T.uniformity(x, t=t))
    torch.testing.assert_close(T.uniformity(x[permutation], t=t), T.uniformity(x, t=t))


@few
@given(seeds, st.floats(0.1, 2))
def test_negatives_are_a_uniformity_potential(seed, tau):
    (f, *_), keys = random_vectors(seed, 1, 4, count=1)[0][None], random_vectors(seed + 1, 8, 4, count=1)[0]
    f, keys = F.normalize(f, dim=-1), F.normalize(keys, dim=1)
    left = torch.logsumexp(keys @ f.squeeze() / tau, 0) - math.log(8)
    right = 1 / tau + torch.logsumexp(-(keys - f).square().sum(1) / (2 * tau), 0) - math.log(8)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    # The batch's negatives, averaged outside the log, are at most the pooled potential (Jensen).
    _, negatives = T.pair_similarities(keys, keys)
    per_anchor = (torch.logsumexp(negatives / tau, 1) - math.log(7)).mean()
    assert per_anchor <= 1 / tau + T.uniformity(keys, t=1 / (2 * tau)) + 1e-12


def test_uniformity_of_a_point_is_zero_in_float32():
    assert T.uniformity(F.normalize(torch.ones(5, 3), dim=1)).item() == pytest.approx(0, abs=1e-5)


@few
@given(seeds, st.integers(2, 10))
def test_tolerance_equals_the_slow_loop(seed, n):
    (x,) = random_vectors(seed, n, 3, count=1)
    x = F.normalize(x, dim=1)
    labels = torch.randint(-1, 2, (n,), generator=torch.Generator().manual_seed(seed))
    labels[0] = labels[1]
    same = [(i, j) for i in range(n) for j in range(n) if i != j and labels[i] == labels[j]]
    total = sum((x[i] @ x[j]).item() for i, j in same)
    assert T.tolerance(x, labels).item() == pytest.approx(total / len(same), abs=1e-12)
    assert T.tolerance(x, labels, normalize="joint").item() == pytest.approx(total / (n * (n - 1)), abs=1e-12)


def test_alignment():
    x, y = (F.normalize(v, dim=1) for v in random_vectors(10, 5, 3))
    assert T.alignment(x, x).item() == pytest.approx(1)
    assert T.alignment(x, y).item() == pytest.approx(1 - (x - y).square().sum(1).mean().item() / 2)


# --- memory bank ------------------------------------------------------------------------------------------------------


def test_memory_bank_samples_all_but_its_own():
    bank = T.MemoryBank(5, 3)
    drawn = bank.sample(2000, torch.tensor([0, 2, 4]), torch.Generator().manual_seed(0))
    for row, own in zip(drawn, (0, 2, 4), strict=True):
        counts = row.bincount(minlength=5)
        assert counts[own] == 0 and (counts[counts > 0] > 400).all() and (counts > 0).sum() == 4


def test_memory_bank_updates_by_momentum_without_gradient():
    bank = T.MemoryBank(4, 3, momentum=0.25)
    before = bank.bank.clone()
    torch.testing.assert_close(before.norm(dim=1), torch.ones(4))
    new = F.normalize(torch.randn(2, 3), dim=1).requires_grad_()
    bank.update(torch.tensor([1, 3]), new)
    expected = F.normalize(0.25 * before[[1, 3]] + 0.75 * new, dim=1)
    torch.testing.assert_close(bank.bank[[1, 3]], expected.detach())
    assert torch.equal(bank.bank[[0, 2]], before[[0, 2]]) and not bank.bank.requires_grad
    other = T.MemoryBank(4, 3)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.bank, bank.bank)
    assert bank.to(torch.float64).bank.dtype == torch.float64


# --- extremes and transforms ------------------------------------------------------------------------------------------


def test_tiny_temperature_in_float32_is_finite_where_exp_overflows():
    positive, negatives = random_pairs(11, dtype=torch.float32)
    loss = T.contrastive_loss(positive, negatives, temperature=1e-4)
    loss.backward()
    assert loss.isfinite() and positive.grad.isfinite().all() and negatives.grad.isfinite().all()
    s = positive.detach()[:, None] / 1e-4, negatives.detach() / 1e-4
    naive = -(s[0].exp() / (s[0].exp() + s[1].exp().sum(1, keepdim=True))).log()
    assert not naive.isfinite().all()


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_similarities_in_float32(scale):
    positive = torch.tensor([scale, 0.0, scale], requires_grad=True)
    negatives = torch.tensor([[scale, 0.0], [scale, scale], [-scale, 1.0]], requires_grad=True)
    for loss in (
        T.contrastive_loss(positive, negatives, temperature=1.0),
        T.hard_contrastive_loss(positive, negatives, alpha=0.5, temperature=1.0),
    ):
        grads = torch.autograd.grad(loss, [positive, negatives])
        assert loss.isfinite() and all(g.isfinite().all() for g in grads)
    assert T.penalty_entropy(negatives, temperature=1.0).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    positive, negatives = random_pairs(12, dtype=dtype)
    assert T.contrastive_loss(positive, negatives).dtype == dtype
    assert T.hard_simple_loss(positive, negatives, alpha=0.5).dtype == dtype
    assert T.uniformity(torch.randn(4, 3, dtype=dtype)).dtype == dtype
    assert T.info_nce_loss(torch.randn(4, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype)).dtype == dtype


def test_half_precision_embeddings_give_a_float32_loss():
    q, k = (x.to(torch.bfloat16).requires_grad_() for x in random_vectors(13, 8, 16))
    loss = T.info_nce_loss(q, k, temperature=0.1)
    loss.backward()
    assert loss.dtype == torch.float32 and q.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, T.info_nce_loss(q.float(), k.float(), temperature=0.1))
    explicit = T.pair_similarities(q.float(), k.float())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(T.info_nce_loss(q.float(), k.float(), temperature=0.1), loss)
        torch.testing.assert_close(T.pair_similarities(q.float(), k.float()), explicit, rtol=0, atol=0)


def test_transforms_and_compile():
    positive, negatives = (x.detach() for x in random_pairs(14, negatives=5))
    per_row = torch.func.vmap(torch.func.grad(lambda n, p: T.contrastive_loss(p[None], n[None], temperature=0.3)))
    torch.testing.assert_close(
        per_row(negatives, positive), T.similarity_gradients(positive, negatives, temperature=0.3)[1]
    )
    compiled = torch.compile(lambda q, k: T.info_nce_loss(q, k, temperature=0.2), backend="aot_eager")
    q, k = random_vectors(15, 5, 4)
    torch.testing.assert_close(compiled(q, k), T.info_nce_loss(q, k, temperature=0.2))


# --- bad input --------------------------------------------------------------------------------------------------------

P, N = torch.zeros(3), torch.zeros(3, 4)
V = torch.eye(3)


@pytest.mark.parametrize("tau", [0, -1.0, float("nan"), float("inf"), torch.tensor(-1.0), torch.ones(2)])
@pytest.mark.parametrize(
    "call",
    [
        lambda t: T.contrastive_loss(P, N, temperature=t),
        lambda t: T.hard_contrastive_loss(P, N, alpha=0.5, temperature=t),
        lambda t: T.info_nce_loss(V, V, temperature=t),
        lambda t: T.nt_xent_loss(V, V, temperature=t),
        lambda t: T.similarity_gradients(P, N, temperature=t),
        lambda t: T.relative_penalty(N, temperature=t),
        lambda t: T.penalty_entropy(N, temperature=t),
        lambda t: T.effective_negatives(N, temperature=t),
        lambda t: T.embedding_gradient(V, V, V[None].repeat(3, 1, 1), temperature=t),
    ],
)
def test_bad_temperature(call, tau):
    with pytest.raises(ValueError, match="temperature"):
        call(tau)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: T.contrastive_loss(torch.zeros(2), N), "positive"),
        (lambda: T.contrastive_loss(P, torch.zeros(3, 0)), "negatives"),
        (lambda: T.contrastive_loss(P, torch.zeros(3)), "negatives"),
        (lambda: T.contrastive_loss(P, N, mask=torch.ones(3, 3, dtype=torch.bool)), "mask"),
        (lambda: T.contrastive_loss(P, N, mask=torch.eye(3, 4, dtype=torch.bool).logical_not() & (N > 0)), "mask"),
        (lambda: T.contrastive_loss(P, N, reduction="average"), "reduction"),
        (lambda: T.hard_contrastive_loss(P, N, alpha=0), "alpha"),
        (lambda: T.hard_contrastive_loss(P, N, alpha=1.5), "alpha"),
        (lambda: T.hard_simple_loss(P, N, alpha=float("nan")), "alpha"),
        (lambda: T.hard_simple_loss(P, N, alpha=0.5, weight=-1.0), "weight"),
        (lambda: T.simple_contrastive_loss(P, N, weight=0), "weight"),
        (lambda: T.zero_margin_triplet(P, torch.zeros(2, 4)), "positive"),
        (lambda: T.large_temperature_expansion(P, N, temperature=1.0, order=3), "order"),
        (lambda: T.large_temperature_expansion(P, N, temperature=0.0), "temperature"),
        (lambda: T.info_nce_loss(V, torch.eye(4)[:, :3]), "key"),
        (lambda: T.info_nce_loss(V[:1], V[:1]), "query"),
        (lambda: T.nt_xent_loss(V[:1], V[:1]), "view1"),
        (lambda: T.nt_xent_loss(V, V[:2]), "view2"),
        (lambda: T.pair_similarities(V[:1], V[:1]), "query"),
        (lambda: T.pair_similarities(V, V[:, :2]), "key"),
        (lambda: T.embedding_gradient(V, V, V[None], temperature=1.0), "negative_keys"),
        (lambda: T.embedding_gradient(V * 0, V, V[None].repeat(3, 1, 1), temperature=1.0), "output"),
        (lambda: T.nt_xent_loss(V, V, temperature=torch.ones(3)), "temperature"),
        (lambda: T.simplex_lower_bound(1, 0.5), "num_instances"),
        (lambda: T.simplex_lower_bound(4, 0.0), "temperature"),
        (lambda: T.simplex_embedding(5, 3), "dim"),
        (lambda: T.two_level_similarities(torch.tensor(0.5), 1, 5), "num_classes"),
        (lambda: T.two_level_similarities(torch.tensor(0.5), 5, 1), "class_size"),
        (lambda: T.alignment(V, V[:2]), "y"),
        (lambda: T.uniformity(V[:1]), "embedding"),
        (lambda: T.uniformity(V, t=0), "t must"),
        (lambda: T.uniformity(V, chunk_size=0), "chunk_size"),
        (lambda: T.tolerance(V, torch.arange(3)), "labels"),
        (lambda: T.tolerance(V, torch.zeros(2, dtype=torch.int64)), "labels"),
        (lambda: T.tolerance(V, torch.zeros(3, dtype=torch.int64), normalize="both"), "normalize"),
        (lambda: T.MemoryBank(5, 3, momentum=1.0), "momentum"),
        (lambda: T.MemoryBank(1, 3), "num_samples"),
        (lambda: T.MemoryBank(5, 3).sample(0, torch.tensor([1])), "num_negatives"),
        (lambda: T.MemoryBank(5, 3).sample(2, torch.tensor([5])), "exclude"),
        (lambda: T.MemoryBank(5, 3).update(torch.tensor([1, 1]), V[:2]), "index"),
        (lambda: T.MemoryBank(5, 3).update(torch.tensor([1]), V), "embedding"),
    ],
)
def test_bad_values_name_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: T.contrastive_loss([0.1], N), "positive"),
        (lambda: T.contrastive_loss(P, N.long()), "negatives"),
        (lambda: T.contrastive_loss(P, N, mask=N), "mask"),
        (lambda: T.contrastive_loss(P, N, temperature="cold"), "temperature"),
        (lambda: T.contrastive_loss(P, N, temperature=True), "temperature"),
        (lambda: T.info_nce_loss(V.long(), V), "query"),
        (lambda: T.info_nce_loss(V, V.double()), "key"),
        (lambda: T.nt_xent_loss(V, V.double()), "view2"),
        (lambda: T.contrastive_loss(P, N.double()), "positive"),
        (lambda: T.tolerance(V, [0, 0, 1]), "labels"),
        (lambda: T.tolerance(V, torch.zeros(3)), "labels"),
        (lambda: T.MemoryBank(5, 3).sample(2, [1]), "exclude"),
        (lambda: T.MemoryBank(5, 3, momentum="a"), "momentum"),
        (lambda: T.simplex_embedding(3.0, 4), "num_points"),
    ],
)
def test_bad_types_name_the_argument(call, name):
    with pytest.raises(TypeError, match=name):
        call()
