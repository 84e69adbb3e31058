"""SRPO against slow loops and L-BFGS, and the theorems of the chapter as properties: identities, saddle, uniqueness, the family, additive preferences."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from lossbook.language import srpo as S
from lossbook.language.robust_dpo import preference_loss

DOUBLE = torch.float64
seeds = st.integers(0, 10**6)
betas = st.sampled_from([0.05, 0.2, 0.5, 1.0, 5.0])
quick = settings(max_examples=40, deadline=None)


def random_game(seed, K=6, same_reference=False):
    """A preference matrix without any order, and references."""
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.uniform(0.02, 0.98, (K, K)), 1)
    p = torch.tensor(upper + np.tril(1 - upper.T, -1) + np.eye(K) / 2)
    ref = torch.tensor(rng.dirichlet(np.ones(K) * 2)) + 1e-3
    ref_improver = torch.tensor(rng.dirichlet(np.ones(K) * 2, K)) + 1e-3
    ref, ref_improver = ref / ref.sum(), ref_improver / ref_improver.sum(1, keepdim=True)
    return p, ref, ref.expand(K, K).clone() if same_reference else ref_improver


def uniform(K):
    return torch.full((K,), 1 / K, dtype=DOUBLE), torch.full((K, K), 1 / K, dtype=DOUBLE)


def bradley_terry(rewards, scale=1.0):
    r = torch.as_tensor(rewards, dtype=DOUBLE)
    return torch.sigmoid(scale * (r[:, None] - r))


def circle(s):
    """Rock, paper, scissors: paper beats rock, scissors beat paper, rock beats scissors, with probability ½ + s."""
    p = torch.full((3, 3), 0.5, dtype=DOUBLE)
    for winner, loser in ((1, 0), (2, 1), (0, 2)):
        p[winner, loser], p[loser, winner] = 0.5 + s, 0.5 - s
    return p


def log_ratios(p, ref, ref_improver, beta):
    saddle = S.tabular_srpo(p, ref, ref_improver, beta=beta)
    return saddle, (saddle.generator / ref).log(), (saddle.improver / ref_improver).log()


def random_policy(rng, *shape):
    return torch.tensor(rng.normal(size=shape)).softmax(-1)


def value_by_loops(p, pi, dagger, ref, ref_improver, beta):
    total = 0.0
    for d in range(len(p)):
        for y in range(len(p)):
            log_ratio = math.log(dagger[d, y] / ref_improver[d, y])
            total += float(pi[d] * dagger[d, y] * (p[y, d] - beta * log_ratio))
        total += beta * float(pi[d] * math.log(pi[d] / ref[d]))
    return total


def fit(p, ref, ref_improver, mu, beta, alpha, start):
    """L-BFGS on the population loss over the logits of both policies."""
    K = len(p)
    weights = mu[:, None] * mu

    def policies(z):
        z = torch.as_tensor(z, dtype=DOUBLE)
        return z[:K].log_softmax(0), z[K:].reshape(K, K).log_softmax(1)

    def function(z):
        z = torch.tensor(z, dtype=DOUBLE, requires_grad=True)
        generator, improver = policies(z)
        loss = S.srpo_population_loss(
            generator - ref.log(), improver - ref_improver.log(), p, weights, beta=beta, alpha=alpha
        )
        loss = loss / (weights.mean() * beta**2)
        (gradient,) = torch.autograd.grad(loss, z)
        return loss.item(), gradient.numpy()

    options = dict(maxiter=20000, maxfun=40000, ftol=1e-30, gtol=1e-14, maxcor=60)
    found = minimize(function, start, jac=True, method="L-BFGS-B", options=options)
    return *(log.exp() for log in policies(found.x)), found.fun


# The theorems as properties


@quick
@given(seeds, betas)
def test_identities_at_the_saddle(seed, beta):
    p, ref, ref_improver = random_game(seed)
    _, rho, D = log_ratios(p, ref, ref_improver, beta)
    diagonal = D.diagonal()
    assert torch.allclose(0.5 + beta * (D - diagonal[:, None]), p.T, atol=1e-12)
    assert torch.allclose(0.5 + beta / 2 * (D - D.T + rho[None] - rho[:, None]), p.T, atol=1e-12)
    constant = rho - diagonal
    assert torch.allclose(constant, constant[0].expand_as(constant), atol=1e-11)


@quick
@given(seeds, betas)
def test_saddle_point_and_pythagoras(seed, beta):
    p, ref, ref_improver = random_game(seed, K=5)
    rng = np.random.default_rng(seed)
    saddle = S.tabular_srpo(p, ref, ref_improver, beta=beta)
    assert torch.allclose(saddle.generator.sum(), torch.ones((), dtype=DOUBLE))
    assert torch.allclose(saddle.improver.sum(1), torch.ones(5, dtype=DOUBLE))

    def value(pi, dagger):
        return S.game_value(p, pi, dagger, ref, ref_improver, beta=beta)

    assert torch.allclose(value(saddle.generator, saddle.improver), saddle.value, atol=1e-12)
    for _ in range(25):
        pi, dagger = random_policy(rng, 5), random_policy(rng, 5, 5)
        assert value(pi, saddle.improver) >= saddle.value - 1e-12
        assert value(saddle.generator, dagger) <= saddle.value + 1e-12
        kl_generator = (pi * (pi / saddle.generator).log()).sum()
        kl_improver = pi @ (dagger * (dagger / saddle.improver).log()).sum(1)
        expected = saddle.value + beta * (kl_generator - kl_improver)
        assert torch.allclose(value(pi, dagger), expected, atol=1e-10)
        assert value(pi, dagger).item() == pytest.approx(value_by_loops(p, pi, dagger, ref, ref_improver, beta))


@quick
@given(seeds, betas)
def test_log_partition_is_the_gain(seed, beta):
    p, ref, ref_improver = random_game(seed, K=4)
    saddle = S.tabular_srpo(p, ref, ref_improver, beta=beta)
    for d in range(4):
        Z = sum(float(ref_improver[d, y]) * math.exp(float(p[y, d]) / beta) for y in range(4))
        assert saddle.log_partition[d].item() == pytest.approx(math.log(Z))
        for y in range(4):
            expected = float(ref_improver[d, y]) * math.exp(float(p[y, d]) / beta) / Z
            assert saddle.improver[d, y].item() == pytest.approx(expected)
    # What revision guarantees: at least the reference's win rate, plus beta KL, from every draft.
    wins = (saddle.improver * p.T).sum(1)
    kl = (saddle.improver * (saddle.improver / ref_improver).log()).sum(1)
    assert (wins >= (ref_improver * p.T).sum(1) + beta * kl - 1e-12).all()


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10**4), st.sampled_from([0.2, 0.5]), st.sampled_from([0.25, 0.5]))
def test_one_minimizer_for_every_behaviour(seed, beta, alpha):
    """Three starts and three behaviour policies: L-BFGS comes to the saddle point."""
    K = 4
    p, ref, ref_improver = random_game(seed, K)
    rng = np.random.default_rng(seed)
    saddle = S.tabular_srpo(p, ref, ref_improver, beta=beta)
    for mu in (uniform(K)[0], torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=DOUBLE), (random_policy(rng, K) + 0.25) / 2):
        start = rng.normal(size=K + K * K)
        generator, improver, loss = fit(p, ref, ref_improver, mu, beta, alpha, start)
        assert loss < 1e-9
        assert (generator - saddle.generator).abs().max() < 1e-4
        assert (improver - saddle.improver).abs().max() < 1e-4


def test_one_minimizer_tight():
    for seed, alpha in ((0, 0.25), (1, 0.5)):
        p, ref, ref_improver = random_game(seed, 4)
        saddle = S.tabular_srpo(p, ref, ref_improver, beta=0.5)
        for k, mu in enumerate(([0.25] * 4, [0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4])):
            start = np.random.default_rng(k).normal(size=20)
            mu = torch.tensor(mu, dtype=DOUBLE)
            generator, improver, _ = fit(p, ref, ref_improver, mu, 0.5, alpha, start)
            assert (generator - saddle.generator).abs().max() < 1e-5
            assert (improver - saddle.improver).abs().max() < 1e-5


def test_generator_loss_alone_does_not_determine_the_policies():
    p, ref, ref_improver = random_game(0, 4)
    saddle = S.tabular_srpo(p, ref, ref_improver, beta=0.5)
    away = []
    for k in range(3):
        start = np.random.default_rng(k).normal(size=20)
        generator, _, loss = fit(p, ref, ref_improver, uniform(4)[0], 0.5, 0.0, start)
        assert loss < 1e-12
        away.append((generator - saddle.generator).abs().max().item())
    assert max(away) > 1e-3


@quick
@given(seeds, betas)
def test_family_of_zeros_of_the_generator_loss(seed, beta):
    """A symmetric S in the improver's exponent changes both policies and leaves the loss at 0; the improver loss sees it."""
    K = 5
    p, ref, ref_improver = random_game(seed, K)
    saddle = S.tabular_srpo(p, ref, ref_improver, beta=beta)
    S_ = torch.tensor(np.random.default_rng(seed).normal(size=(K, K)))
    S_ = S_ + S_.T
    logits = saddle.improver.log() + S_
    A = logits.logsumexp(1)
    improver = (logits - A[:, None]).exp()
    generator = (saddle.generator.log() - A).softmax(0)
    rho, D = (generator / ref).log(), (improver / ref_improver).log()
    loss = [
        S.srpo_population_loss(rho, D, p, uniform(K)[1] / K, beta=beta, alpha=alpha).item() for alpha in (0.0, 0.5, 1.0)
    ]
    assert loss[0] < 1e-20 and loss[1] > 1e-8 and loss[2] == pytest.approx(2 * loss[1])


@quick
@given(seeds, betas, st.sampled_from([0.1, 0.25, 0.9]))
def test_no_bad_stationary_points(seed, beta, alpha):
    """In the coordinates u = D - D(d|d) and v = rho + A the loss is a quadratic: its second difference along a line is constant and >= 0."""
    K = 4
    p, ref, ref_improver = random_game(seed, K)
    rng = np.random.default_rng(seed)
    mu = random_policy(rng, K)

    def loss(u, v):
        A = (ref_improver.log() + u).logsumexp(1)
        rho = v - A
        rho = rho - (ref.log() + rho).logsumexp(0)
        return S.srpo_population_loss(rho, u - A[:, None], p, mu[:, None] * mu, beta=beta, alpha=alpha).item()

    def draw():
        u = rng.normal(size=(K, K))
        return torch.tensor(u - np.diag(np.diag(u))), torch.tensor(rng.normal(size=K))

    (u, v), (du, dv) = draw(), draw()
    values = [loss(u + t * du, v + t * dv) for t in range(-2, 3)]
    second = [values[i - 1] - 2 * values[i] + values[i + 1] for i in (1, 2, 3)]
    assert min(second) > 0 and second == pytest.approx([second[0]] * 3, rel=1e-7)


@quick
@given(seeds, betas)
def test_worth_of_seeing_the_draft(seed, beta):
    """With one reference for both players the value is ½ plus beta times the KL of the generator to the improver."""
    p, ref, ref_improver = random_game(seed, same_reference=True)
    saddle = S.tabular_srpo(p, ref, ref_improver, beta=beta)
    kl = (saddle.generator * (saddle.generator.log() - saddle.improver.log())).sum(1)
    assert saddle.value.item() == pytest.approx(0.5 + beta * (saddle.generator @ kl).item(), abs=1e-11)
    assert saddle.value > 0.5


@quick
@given(seeds, betas)
def test_additive_preferences(seed, beta):
    """There the improver ignores the draft, and generator, improver and IPO are one policy, for every behaviour."""
    _, ref, ref_improver = random_game(seed, same_reference=True)
    rng = np.random.default_rng(seed)
    f = torch.tensor(rng.uniform(0, 0.5, 6))
    p = 0.5 + f[:, None] - f
    saddle = S.tabular_srpo(p, ref, ref_improver, beta=beta)
    expected = (ref.log() + f / beta).softmax(0)
    assert torch.allclose(saddle.generator, expected, atol=1e-12)
    assert torch.allclose(saddle.improver, expected.expand(6, 6), atol=1e-12)
    assert torch.allclose(S.ipo_optimum(p, ref, random_policy(rng, 6), tau=beta), expected, atol=1e-12)
    assert saddle.value.item() == pytest.approx(0.5)


@quick
@given(seeds)
def test_exploitability_and_improvement_by_loops(seed):
    p, ref, ref_improver = random_game(seed, K=4)
    best = max(sum(float(p[y, d] * ref[d]) for d in range(4)) for y in range(4))
    assert S.exploitability(p, ref).item() == pytest.approx(best) and best >= 0.5
    pairs = itertools.product(range(4), range(4))
    total = sum(float(ref[d] * ref_improver[d, y] * p[y, d]) for d, y in pairs)
    assert S.improvement(p, ref, ref_improver).item() == pytest.approx(total)


# The losses


@quick
@given(seeds, betas, st.sampled_from([0.0, 0.25, 1.0]))
def test_population_loss_by_loops(seed, beta, alpha):
    K = 4
    p, *_ = random_game(seed, K)
    rng = np.random.default_rng(seed)
    rho, D, weights = (torch.tensor(rng.normal(size=s)) for s in ((K,), (K, K), (K, K)))
    weights = weights.abs()
    total = 0.0
    for d, y in itertools.product(range(K), range(K)):
        pair = p[y, d] - 0.5 - beta / 2 * (D[d, y] - D[y, d] + rho[y] - rho[d])
        alone = p[y, d] - 0.5 - beta * (D[d, y] - D[d, d])
        total += float(weights[d, y] * ((1 - alpha) * pair**2 + alpha * alone**2))
    assert S.srpo_population_loss(rho, D, p, weights, beta=beta, alpha=alpha).item() == pytest.approx(total)


@quick
@given(seeds, betas, st.sampled_from([0.0, 0.25, 1.0]))
def test_hard_labels_add_a_constant(seed, beta, alpha):
    K = 4
    p, mu, _ = random_game(seed, K)
    rng = np.random.default_rng(seed)
    rho, D = torch.tensor(rng.normal(size=K)), torch.tensor(rng.normal(size=(K, K)))
    w, l = (index.flatten() for index in torch.meshgrid(torch.arange(K), torch.arange(K), indexing="ij"))
    ratios = S.PairLogRatios(rho[w], rho[l], D[l, w], D[l, l], D[w, w], D[w, l])
    # (w, l) comes up if w is written first, l second, and w wins; or the other way round.
    chance = 2 * mu[w] * mu[l] * p[w, l]
    hard = (chance * S.srpo_loss(ratios, beta=beta, alpha=alpha, reduction="none")).sum()
    soft = S.srpo_population_loss(rho, D, p, mu[:, None] * mu, beta=beta, alpha=alpha)
    noise = (mu[:, None] * mu * p * (1 - p)).sum()
    assert hard.item() == pytest.approx((soft + noise).item(), rel=1e-10)


def test_losses_by_hand():
    ratios = S.PairLogRatios(*torch.tensor([[0.6], [0.2], [0.5], [0.1], [0.3], [-0.1]], dtype=DOUBLE))
    assert S.srpo_generator_loss(ratios, beta=1.0).item() == pytest.approx(0, abs=1e-15)
    assert S.srpo_improver_loss(ratios, beta=1.0).item() == pytest.approx(0.01)
    assert S.srpo_loss(ratios, beta=1.0, alpha=0.3).item() == pytest.approx(0.003)
    other = S.PairLogRatios(*torch.tensor([[1.0], [-1.0], [0.4], [0.1], [0.2], [-0.6]], dtype=DOUBLE))
    assert S.srpo_generator_loss(other, beta=0.5).item() == pytest.approx((0.25 * 3.0 - 0.5) ** 2)
    assert S.srpo_improver_loss(other, beta=0.5).item() == pytest.approx(((0.15 - 0.5) ** 2 + (0.4 - 0.5) ** 2) / 2)


@quick
@given(seeds, betas)
def test_without_an_improver_it_is_ipo(seed, beta):
    rng = np.random.default_rng(seed)
    winner, loser = torch.tensor(rng.normal(size=(2, 8)) * 3)
    zero = torch.zeros(8, dtype=DOUBLE)
    ratios = S.PairLogRatios(winner, loser, zero, zero, zero, zero)
    ours = S.srpo_generator_loss(ratios, beta=beta, reduction="none")
    theirs = preference_loss(winner - loser, base="squared", target=1 / beta, reduction="none")
    assert torch.allclose(ours, beta**2 / 4 * theirs)
    assert torch.allclose(theirs, (winner - loser - 1 / beta) ** 2)


def test_reductions_and_mixture():
    ratios = S.PairLogRatios(*torch.randn(6, 7, generator=torch.Generator().manual_seed(0)))
    for function in (S.srpo_generator_loss, S.srpo_improver_loss, S.srpo_loss):
        each = function(ratios, beta=0.3, reduction="none")
        assert each.shape == (7,)
        assert torch.allclose(function(ratios, beta=0.3), each.mean())
        assert torch.allclose(function(ratios, beta=0.3, reduction="sum"), each.sum())
    mixed = S.srpo_loss(ratios, beta=0.3, alpha=0.4)
    parts = S.srpo_generator_loss(ratios, beta=0.3), S.srpo_improver_loss(ratios, beta=0.3)
    assert torch.allclose(mixed, 0.6 * parts[0] + 0.4 * parts[1])
    assert torch.allclose(S.srpo_loss(ratios, beta=0.3), 0.75 * parts[0] + 0.25 * parts[1])


# Closed forms


def test_two_completions():
    saddle = S.tabular_srpo(torch.tensor([[0.5, 0.8], [0.2, 0.5]], dtype=DOUBLE), *uniform(2), beta=0.5)
    assert saddle.generator[0].item() == pytest.approx(0.645656, abs=1e-6)
    assert saddle.log_partition.exp().tolist() == pytest.approx([2.105053, 3.835657], abs=1e-6)
    z = [math.exp(1), math.exp(0.4), math.exp(1.6)]
    assert saddle.improver[0, 1].item() == pytest.approx(z[1] / (z[0] + z[1]))  # draft 0: revision 1 wins with 0.2
    assert saddle.improver[1, 0].item() == pytest.approx(z[2] / (z[0] + z[2]))


@pytest.mark.parametrize("s", [0.1, 0.45])
@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
def test_rock_paper_scissors(s, beta):
    p = circle(s)
    saddle = S.tabular_srpo(p, *uniform(3), beta=beta)
    assert torch.allclose(saddle.generator, uniform(3)[0], atol=1e-12)
    up, down = math.exp(s / beta), math.exp(-s / beta)
    expected = ((0.5 + s) * up + 0.5 + (0.5 - s) * down) / (up + 1 + down)
    for draft in torch.eye(3, dtype=DOUBLE):
        assert S.improvement(p, draft, saddle.improver).item() == pytest.approx(expected)
    assert S.exploitability(p, saddle.generator).item() == pytest.approx(0.5)


def test_equal_preferences():
    _, ref, ref_improver = random_game(3)
    saddle = S.tabular_srpo(torch.full((6, 6), 0.5, dtype=DOUBLE), ref, ref_improver, beta=0.1)
    assert torch.allclose(saddle.generator, ref) and torch.allclose(saddle.improver, ref_improver)
    assert saddle.value.item() == pytest.approx(0.5)


def test_revision_of_fifty_completions():
    """The chapter's table: rewards along revisions of the generator's drafts, the reference's and the worst."""
    r = torch.tensor(np.random.default_rng(0).normal(size=50))
    p = bradley_terry(r, 3.0)
    expected = {
        0.3: ([0.903, 0.850, 0.835], [0.129, 0.814, 0.883], [-2.325, 0.186, 0.830], 0.839),
        0.1: ([1.786, 1.618, 1.575], [0.129, 1.272, 1.653], [-2.325, 0.227, 1.317], 1.438),
        0.05: ([1.942, 1.938, 1.937], [0.129, 1.411, 1.866], [-2.325, 0.267, 1.477], 1.663),
    }
    worst = torch.zeros(50, dtype=DOUBLE)
    worst[r.argmin()] = 1
    for beta, (own, reference, lifted, ipo) in expected.items():
        saddle = S.tabular_srpo(p, *uniform(50), beta=beta)
        for start, rewards in ((saddle.generator, own), (uniform(50)[0], reference), (worst, lifted)):
            chain = S.revise(start, saddle.improver, 2)
            assert torch.allclose(chain.sum(1), torch.ones(3, dtype=DOUBLE))
            assert (chain @ r).tolist() == pytest.approx(rewards, abs=6e-4)
        assert (S.ipo_optimum(p, *[uniform(50)[0]] * 2, tau=beta) @ r).item() == pytest.approx(ipo, abs=6e-4)


# Limits


def test_large_beta_leaves_the_references():
    p, ref, ref_improver = random_game(1)
    saddle = S.tabular_srpo(p, ref, ref_improver, beta=1e5)
    assert torch.allclose(saddle.generator, ref, atol=1e-4) and torch.allclose(saddle.improver, ref_improver, atol=1e-4)
    assert saddle.value.item() == pytest.approx(S.improvement(p, ref, ref_improver).item(), abs=1e-4)


def test_small_beta_concentrates():
    p = bradley_terry([0.0, 1.0, 0.3, -0.5])
    saddle = S.tabular_srpo(p, *uniform(4), beta=1e-3)
    assert saddle.generator[1] > 1 - 1e-9 and (saddle.improver[:, 1] > 1 - 1e-9).all()
    order = torch.tensor([[0.5, 1, 1], [0, 0.5, 1], [0, 0, 0.5]], dtype=DOUBLE)
    saddle = S.tabular_srpo(order, *uniform(3), beta=1e-3)
    assert saddle.generator[0] > 1 - 1e-9
    assert torch.allclose(saddle.improver[2], torch.tensor([0.5, 0.5, 0.0], dtype=DOUBLE))


def test_small_beta_is_the_least_worst_completion_not_the_mixed_winner():
    """The improver sees the draft: without a Condorcet winner the generator becomes a pure minimax choice."""
    p = torch.tensor([[0.5, 0.9, 0.4], [0.1, 0.5, 0.7], [0.6, 0.3, 0.5]], dtype=DOUBLE)
    saddle = S.tabular_srpo(p, *uniform(3), beta=1e-3)
    best = p.T.amax(1).argmin()
    assert saddle.generator[best] > 1 - 1e-9
    assert S.exploitability(p, saddle.generator).item() == pytest.approx(p.T.amax(1).min().item())


# The baselines


@quick
@given(seeds, betas)
def test_ipo_optimum_minimizes_its_loss(seed, tau):
    p, ref, _ = random_game(seed, 5)
    mu = random_policy(np.random.default_rng(seed), 5)
    rho = (S.ipo_optimum(p, ref, mu, tau=tau) / ref).log().requires_grad_()
    margins = rho[:, None] - rho
    loss = preference_loss(margins.flatten(), base="squared", target=0.5 / tau, reduction="none")
    weighted = (mu[:, None] * mu * p).flatten() @ loss
    (gradient,) = torch.autograd.grad(weighted, rho)
    assert (gradient * tau).abs().max() < 1e-10


@quick
@given(seeds, betas)
def test_dpo_optimum_minimizes_its_loss(seed, beta):
    p, ref, _ = random_game(seed, 5)
    mu = random_policy(np.random.default_rng(seed), 5)
    policy = S.dpo_optimum(p, ref, mu, beta=beta)
    if policy.min() < 1e-300:
        return
    rho = (policy / ref).log().requires_grad_()
    loss = preference_loss(beta * (rho[:, None] - rho).flatten(), reduction="none")
    weighted = (mu[:, None] * mu * p).flatten() @ loss
    (gradient,) = torch.autograd.grad(weighted, rho)
    assert (gradient / beta).abs().max() < 1e-9


@quick
@given(seeds)
def test_dpo_recovers_bradley_terry_for_every_behaviour(seed):
    rng = np.random.default_rng(seed)
    rewards = torch.tensor(rng.normal(size=5))
    ref = random_policy(rng, 5)
    expected = (ref.log() + rewards / 0.7).softmax(0)
    found = S.dpo_optimum(bradley_terry(rewards), ref, random_policy(rng, 5), beta=0.7)
    assert torch.allclose(found, expected, atol=1e-9)


def test_ipo_and_dpo_depend_on_the_behaviour_and_srpo_does_not():
    p, ref, ref_improver = random_game(4, 4)
    flat, skewed = uniform(4)[0], torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=DOUBLE)
    for optimum in (
        lambda mu: S.ipo_optimum(p, ref, mu, tau=0.3),
        lambda mu: S.dpo_optimum(p, ref, mu, beta=0.3),
    ):
        assert (optimum(flat) - optimum(skewed)).abs().sum() / 2 > 0.01
    start = np.random.default_rng(0).normal(size=20)
    fits = [fit(p, ref, ref_improver, mu, 0.3, 0.25, start)[0] for mu in (flat, skewed)]
    assert (fits[0] - fits[1]).abs().sum() / 2 < 1e-5


def test_dpo_without_minimizer():
    order = torch.tensor([[0.5, 1.0], [0.0, 0.5]], dtype=DOUBLE)
    with pytest.raises(ValueError, match="no minimizer"):
        S.dpo_optimum(order, *[uniform(2)[0]] * 2, beta=0.1)
    ring = circle(0.5)  # preferences of 0 and 1, but a chain of wins leads everywhere
    assert torch.allclose(S.dpo_optimum(ring, *[uniform(3)[0]] * 2, beta=0.1), uniform(3)[0])
    chain = torch.full((5, 5), 0.5, dtype=DOUBLE)  # only neighbours on a ring of five can lose to the one before
    for i in range(5):
        for j in range(5):
            if i != j:
                chain[i, j] = 1.0 if (j - i) % 5 in (1, 2) else 0.0
    assert torch.allclose(S.dpo_optimum(chain, *[uniform(5)[0]] * 2, beta=0.1), uniform(5)[0])


def test_dpo_optimum_of_certain_preferences():
    """Preferences of 0 and 1 have a minimizer where a chain of wins, however long, leads from each to each."""
    ring = torch.tril(torch.ones(5, 5, dtype=DOUBLE), -1)  # from the last to the first it is one win, back it is four
    for i in range(4):
        ring[i, i + 1], ring[i + 1, i] = 1.0, 0.0
    ring.fill_diagonal_(0.5)
    for p, mu in ((ring, uniform(5)[0]), (circle(0.5), torch.tensor([0.2, 0.3, 0.5], dtype=DOUBLE))):
        scores = S.dpo_optimum(p, uniform(len(p))[0], mu, beta=1.0).log()
        wins = torch.sigmoid(scores[:, None] - scores) - p  # as many expected as there are
        assert (mu * wins).sum(1).abs().max() < 1e-12


def test_dpo_optimum_of_preferences_with_a_rounding_error():
    """Sums that differ from 1 by what the check allows: the smaller of each pair is what counts."""
    p = torch.tensor([[0.5, 0.05 + 9e-6], [0.95, 0.5]], dtype=DOUBLE)
    policy = S.dpo_optimum(p, *[uniform(2)[0]] * 2, beta=1.0)
    assert policy[0].item() == pytest.approx(0.05 + 9e-6, rel=1e-9)


def test_dpo_optimum_of_nearly_certain_preferences():
    p = bradley_terry([0.0, 12.0, -9.0])
    expected = torch.tensor([0.0, 12.0, -9.0], dtype=DOUBLE).softmax(0)
    assert torch.allclose(S.dpo_optimum(p, *[uniform(3)[0]] * 2, beta=1.0).log(), expected.log(), atol=1e-3)


@pytest.mark.parametrize("rare", [1e-3, 1e-6, 1e-10, 1.7e-13, 7e-15])
def test_dpo_optimum_of_a_rare_win(rare):
    """The smaller of a pair of preferences is taken as it is: 1 - 1e-14 has lost most of its digits."""
    p = torch.tensor([[0.5, 1 - rare], [rare, 0.5]], dtype=DOUBLE)
    policy = S.dpo_optimum(p, *[uniform(2)[0]] * 2, beta=20.0)
    assert 20 * (policy[0] / policy[1]).log().item() == pytest.approx(math.log((1 - rare) / rare), rel=1e-7)


def test_dpo_optimum_says_what_it_cannot_find():
    for p in (bradley_terry([40.8, -51.0, 8.4]), torch.tensor([[0.5, 1.0], [1e-30, 0.5]], dtype=DOUBLE)):
        K = len(p)
        with pytest.raises(ValueError, match="too close to 0 or 1"):
            S.dpo_optimum(p, *[uniform(K)[0]] * 2, beta=1.0)
    # Newton's method stops here, at scores that differ by 33 and not by 41.
    p, behaviour = torch.tensor([[0.5, 1.0], [1e-18, 0.5]], dtype=DOUBLE), torch.tensor([0.55, 0.45], dtype=DOUBLE)
    with pytest.raises(ValueError, match="too close to 0 or 1"):
        S.dpo_optimum(p, uniform(2)[0], behaviour, beta=1.0)


def test_one_completion():
    """Nothing to choose: every player is a point, and the value is that of a draw."""
    one, p = torch.ones(1, dtype=DOUBLE), torch.full((1, 1), 0.5, dtype=DOUBLE)
    saddle = S.tabular_srpo(p, one, one[None], beta=0.3)
    assert saddle.generator.tolist() == [1.0] and saddle.improver.tolist() == [[1.0]]
    assert saddle.value.item() == pytest.approx(0.5) and S.exploitability(p, one).item() == 0.5
    assert S.dpo_optimum(p, one, one, beta=0.3).tolist() == S.ipo_optimum(p, one, one, tau=0.3).tolist() == [1.0]


# Gradients, precision, devices


def test_gradients():
    values = torch.randn(6, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for function in (S.srpo_generator_loss, S.srpo_improver_loss, S.srpo_loss):
        assert torch.autograd.gradcheck(lambda *v, f=function: f(S.PairLogRatios(*v), beta=0.3), tuple(values))
    p, ref, ref_improver = random_game(0, 3)
    rho, D = torch.randn(3, dtype=DOUBLE).requires_grad_(), torch.randn(3, 3, dtype=DOUBLE).requires_grad_()
    loss = lambda rho, D: S.srpo_population_loss(rho, D, p, ref_improver, beta=0.3, alpha=0.25)
    assert torch.autograd.gradcheck(loss, (rho, D))


def test_extremes():
    for scale in (1e4, -1e4):
        ratios = S.PairLogRatios(*(scale * torch.tensor([[1.0], [-1], [1], [1], [-1], [-1]])))
        assert torch.isfinite(S.srpo_loss(ratios, beta=0.1, alpha=0.25))
    saddle = S.tabular_srpo(circle(0.5).float(), *(u.float() for u in uniform(3)), beta=1e-4)
    assert all(torch.isfinite(part).all() for part in saddle)
    assert saddle.generator.dtype == torch.float32
    absent = torch.tensor([0.0, 0.5, 0.5], dtype=DOUBLE)
    saddle = S.tabular_srpo(circle(0.3), absent, absent.expand(3, 3), beta=0.2)
    assert saddle.generator[0] == 0 and (saddle.improver[:, 0] == 0).all() and torch.isfinite(saddle.value)
    value = S.game_value(circle(0.3), *saddle[:2], absent, absent.expand(3, 3), beta=0.2)
    assert value.item() == pytest.approx(saddle.value.item())
    wrong = torch.tensor([1.0, 0.0, 0.0], dtype=DOUBLE)
    assert S.game_value(circle(0.3), wrong, saddle.improver, absent, absent.expand(3, 3), beta=0.2).isinf()
    # A draft that is never written may have any improver, also one of infinite divergence.
    off = saddle.improver.clone()
    off[0] = wrong
    value = S.game_value(circle(0.3), saddle.generator, off, absent, absent.expand(3, 3), beta=0.2)
    assert value.item() == pytest.approx(saddle.value.item())


def test_half_precision_is_widened():
    ratios = S.PairLogRatios(*torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).bfloat16())
    wide = S.PairLogRatios(*(r.float() for r in ratios))
    assert S.srpo_loss(ratios, beta=0.3).dtype == torch.float32
    assert torch.equal(S.srpo_loss(ratios, beta=0.3), S.srpo_loss(wide, beta=0.3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(S.srpo_loss(wide, beta=0.3), S.srpo_loss(ratios, beta=0.3))
    p, ref, improver = (x.float() for x in random_game(2, 4))
    rho, D = torch.randn(4).bfloat16(), torch.randn(4, 4).bfloat16()
    population = lambda *r: S.srpo_population_loss(*r, p, improver, beta=0.3, alpha=0.25)
    assert torch.equal(population(rho, D), population(rho.float(), D.float()))
    calls = (
        lambda: S.exploitability(p, ref),
        lambda: S.ipo_optimum(p, ref, improver[0], tau=0.1),
        lambda: S.revise(ref, improver, 3),
        lambda: S.dpo_optimum(p, ref, improver[0], beta=0.1),
        lambda: S.tabular_srpo(p, ref, improver, beta=0.1).generator,
    )
    for call in calls:  # no product of matrices in half precision
        with torch.autocast("cpu", torch.bfloat16):
            inside = call()
        assert torch.equal(inside, call())


def test_transforms():
    values = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(2))
    loss = lambda v: S.srpo_loss(S.PairLogRatios(*v.unbind(0)), beta=0.3, alpha=0.25)
    each = torch.stack([torch.func.grad(loss)(v) for v in values])
    assert torch.allclose(torch.func.vmap(torch.func.grad(loss))(values), each)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(values[0]), loss(values[0]))
    games = [random_game(seed, 4) for seed in range(3)]
    many = torch.func.vmap(lambda p, r, i: S.tabular_srpo(p, r, i, beta=0.3).generator)(
        *map(torch.stack, zip(*games, strict=True))
    )
    assert torch.allclose(many[1], S.tabular_srpo(*games[1], beta=0.3).generator)


def test_self_revise():
    calls = []
    stages = S.self_revise(lambda x: calls.append(x) or x + 1, 0, 3)
    assert stages == [0, 1, 2, 3] and calls == [0, 1, 2]
    assert S.self_revise(lambda x: x, "draft", 0) == ["draft"]


def test_revise_is_a_matrix_power():
    _, ref, improver = random_game(5, 4)
    chain = S.revise(ref, improver, 3)
    assert chain.shape == (4, 4) and torch.equal(chain[0], ref)
    assert torch.allclose(chain[3], ref @ torch.linalg.matrix_power(improver, 3))
    assert S.revise(ref, improver, 0).shape == (1, 4)


# Bad input

GOOD = random_game(0, 3)
RATIOS = S.PairLogRatios(*torch.zeros(6, 2))


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: S.tabular_srpo(GOOD[0] + 0.1, *GOOD[1:], beta=1.0), ValueError, "preference"),
        (lambda: S.tabular_srpo(torch.full((3, 3), 0.6).double(), *GOOD[1:], beta=1.0), ValueError, r"must be 1, got"),
        (lambda: S.tabular_srpo(GOOD[0] * 3 - 1, *GOOD[1:], beta=1.0), ValueError, r"preference must lie"),
        (lambda: S.tabular_srpo(GOOD[0] * math.nan, *GOOD[1:], beta=1.0), ValueError, r"preference"),
        (lambda: S.tabular_srpo(GOOD[0][:2], *GOOD[1:], beta=1.0), ValueError, "square"),
        (lambda: S.tabular_srpo(GOOD[0].tolist(), *GOOD[1:], beta=1.0), TypeError, "preference must be a tensor"),
        (lambda: S.tabular_srpo(GOOD[0], GOOD[1][:2], GOOD[2], beta=1.0), ValueError, r"ref must have shape \(3,\)"),
        (lambda: S.tabular_srpo(GOOD[0], GOOD[1] * 2, GOOD[2], beta=1.0), ValueError, "ref must hold probabilities"),
        (lambda: S.tabular_srpo(GOOD[0], GOOD[1].float(), GOOD[2], beta=1.0), TypeError, "ref must have the dtype"),
        (lambda: S.tabular_srpo(GOOD[0], GOOD[1], GOOD[2].T, beta=1.0), ValueError, "ref_improver .* each row"),
        (lambda: S.tabular_srpo(*GOOD, beta=0.0), ValueError, "beta"),
        (lambda: S.tabular_srpo(*GOOD, beta="1"), TypeError, "beta"),
        (lambda: S.game_value(GOOD[0], GOOD[1], GOOD[1], GOOD[1], GOOD[2], beta=1.0), ValueError, "improver"),
        (lambda: S.game_value(GOOD[0], -GOOD[1], GOOD[2], GOOD[1], GOOD[2], beta=1.0), ValueError, "generator"),
        (lambda: S.exploitability(GOOD[0], GOOD[1] + 1), ValueError, "policy"),
        (lambda: S.improvement(GOOD[0], GOOD[1] + 1, GOOD[2]), ValueError, "drafts"),
        (lambda: S.srpo_loss(RATIOS, beta=1.0, alpha=1.5), ValueError, "alpha"),
        (lambda: S.srpo_loss(RATIOS, beta=1.0, alpha=-0.1), ValueError, "alpha"),
        (lambda: S.srpo_loss(RATIOS, beta=-1.0), ValueError, "beta"),
        (lambda: S.srpo_loss(RATIOS[:5], beta=1.0), TypeError, "log_ratios"),
        (lambda: S.srpo_loss(RATIOS._replace(loser=torch.zeros(3)), beta=1.0), ValueError, "log_ratios.loser"),
        (lambda: S.srpo_loss(RATIOS._replace(winner=torch.zeros(2, 1)), beta=1.0), ValueError, "log_ratios.winner"),
        (lambda: S.srpo_loss(RATIOS._replace(loser=torch.zeros(2).double()), beta=1.0), TypeError, "log_ratios.loser"),
        (lambda: S.srpo_loss(S.PairLogRatios(*torch.zeros(6, 0)), beta=1.0), ValueError, "empty"),
        (lambda: S.srpo_loss(RATIOS, beta=1.0, reduction="max"), ValueError, "reduction"),
        (lambda: S.ipo_optimum(*GOOD[:2], GOOD[1], tau=0.0), ValueError, "tau"),
        (lambda: S.dpo_optimum(*GOOD[:2], GOOD[1], beta=0.0), ValueError, "beta"),
        (lambda: S.ipo_optimum(*GOOD[:2], GOOD[1] * 2, tau=1.0), ValueError, "behaviour"),
        (
            lambda: S.dpo_optimum(*GOOD[:2], torch.tensor([0.0, 0.5, 0.5]).double(), beta=1.0),
            ValueError,
            "behaviour must be > 0",
        ),
        (lambda: S.revise(GOOD[1], GOOD[2], -1), ValueError, "steps"),
        (lambda: S.revise(GOOD[1], GOOD[2], 1.5), TypeError, "steps"),
        (lambda: S.revise(GOOD[1], GOOD[2][:2], 1), ValueError, "improver must be square"),
        (lambda: S.revise(GOOD[1][:2], GOOD[2], 1), ValueError, "distribution"),
        (lambda: S.self_revise("revise", 0, 1), TypeError, "sample_fn"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    "change, error, match",
    [
        (dict(generator_log_ratio=torch.zeros(2)), ValueError, "generator_log_ratio"),
        (dict(improver_log_ratio=torch.zeros(3)), ValueError, "improver_log_ratio"),
        (dict(weights=-torch.ones(3, 3)), ValueError, "weights"),
        (dict(weights=torch.ones(3, 2)), ValueError, "weights"),
        (dict(alpha=2), ValueError, "alpha"),
    ],
)
def test_bad_population_loss(change, error, match):
    good = dict(
        generator_log_ratio=torch.zeros(3), improver_log_ratio=torch.zeros(3, 3), weights=torch.ones(3, 3), alpha=0.5
    )
    with pytest.raises(error, match=match):
        S.srpo_population_loss(**(good | change), preference=GOOD[0], beta=1.0)
