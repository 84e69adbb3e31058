"""The theorems of chapter classification/comp_sum as properties; closed forms, limits, extremes and bad input."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from lossbook.classification import comp_sum as C

TAUS = (0, 0.3, 0.5, 0.9, 1, 1.2, 1.5, 1.9, 2, 3)

seeds = st.integers(0, 2**31)
taus = st.one_of(st.sampled_from(TAUS), st.floats(0, 4))
few = settings(deadline=None, max_examples=60)


def random_logits(seed, rows=4, classes=None, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    n = classes or int(torch.randint(2, 12, (), generator=generator))
    logits = scale * torch.randn(rows, n, generator=generator, dtype=torch.float64)
    return logits, torch.randint(n, (rows,), generator=generator)


def random_distributions(seed, rows=200, classes=None):
    """Distributions over the classes, from flat to sharp."""
    generator = torch.Generator().manual_seed(seed)
    n = classes or int(torch.randint(2, 11, (), generator=generator))
    sharpness = 10 ** (3 * torch.rand(rows, 1, generator=generator, dtype=torch.float64) - 2)
    return torch.softmax(sharpness * torch.randn(rows, n, generator=generator, dtype=torch.float64), 1), generator


def slow_loss(scores, y, tau):
    """Phi_1(sum Phi_2), class by class, with fifty digits."""
    with mpmath.workdps(50):
        u = sum(mpmath.exp(mpmath.mpf(h) - mpmath.mpf(scores[y])) for k, h in enumerate(scores) if k != y)
        exponent = 1 - mpmath.mpf(tau)
        return float(mpmath.log(1 + u) if exponent == 0 else ((1 + u) ** exponent - 1) / exponent)


def slow_transform(beta, tau, n):
    """The four formulas as they are printed, with fifty digits."""
    with mpmath.workdps(50):
        b, t = mpmath.mpf(beta), mpmath.mpf(tau)
        if t >= 2:
            return float(b / ((t - 1) * n ** (t - 1)))
        if t == 1:
            return float(((1 + b) * mpmath.log(1 + b) + ((1 - b) * mpmath.log(1 - b) if b < 1 else 0)) / 2)
        a = 1 / (2 - t)
        mean = (((1 + b) ** a + (1 - b) ** a) / 2) ** (2 - t)
        return float(2 ** (1 - t) / (1 - t) * (1 - mean) if t < 1 else (mean - 1) / ((t - 1) * n ** (t - 1)))


def zero_one_regret(p, chosen):
    return p.amax(1) - p.gather(1, chosen[:, None]).squeeze(1)


# --- the family -------------------------------------------------------------------------------------------------------


@few
@given(seeds, taus)
def test_loss_equals_the_slow_definition(seed, tau):
    logits, target = random_logits(seed)
    loss = C.comp_sum_loss(logits, target, tau=tau, reduction="none")
    slow = [slow_loss(row.tolist(), y, tau) for row, y in zip(logits, target.tolist(), strict=True)]
    torch.testing.assert_close(loss, torch.tensor(slow, dtype=torch.float64), rtol=1e-11, atol=1e-14)
    u = torch.tensor(
        [slow_loss(row.tolist(), y, 0) for row, y in zip(logits, target.tolist(), strict=True)], dtype=torch.float64
    )
    torch.testing.assert_close(C.phi(u, tau=tau), loss, rtol=1e-9, atol=1e-9)


@few
@given(seeds)
def test_named_members(seed):
    logits, target = random_logits(seed)
    s = logits.softmax(1).gather(1, target[:, None]).squeeze(1)
    loss = lambda tau: C.comp_sum_loss(logits, target, tau=tau, reduction="none")  # noqa: E731
    torch.testing.assert_close(loss(1), F.cross_entropy(logits, target, reduction="none"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss(2), 1 - s, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss(0), 1 / s - 1, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss(1.7), (1 - s**0.7) / 0.7, rtol=1e-10, atol=1e-12)


def test_equal_logits():
    logits, target = torch.zeros(1, 10, dtype=torch.float64), torch.tensor([4])
    for tau, value in zip((0, 0.5, 1, 1.5, 2), (9, 4.324555, 2.302585, 1.367544, 0.9), strict=True):
        assert C.comp_sum_loss(logits, target, tau=tau).item() == pytest.approx(value, abs=6e-7)
    for tau, n in itertools.product((0, 0.5, 1.5, 2, 3), (2, 7, 1000)):
        loss = C.comp_sum_loss(torch.zeros(1, n, dtype=torch.float64), torch.tensor([1]), tau=tau).item()
        assert loss == pytest.approx((n ** (1 - tau) - 1) / (1 - tau), rel=1e-12)


@few
@given(seeds, st.floats(-1, 1))
def test_continuous_at_one(seed, sign):
    logits, target = random_logits(seed, scale=1.0)
    logits = logits.clamp(-3, 3).requires_grad_()
    epsilon = 1e-4 * (sign or 1)
    near, at = (C.comp_sum_loss(logits, target, tau=tau, reduction="none") for tau in (1 + epsilon, 1))
    assert ((near - at).abs() <= 0.51 * abs(epsilon) * at**2 + 1e-15).all()
    for k in range(len(at)):
        one, other = (torch.autograd.grad(loss[k], logits, retain_graph=True)[0] for loss in (near, at))
        assert (one - other).abs().max() <= 2 * abs(epsilon) * at[k] + 1e-14


@pytest.mark.parametrize("epsilon", [1e-4, 1e-7, 1e-10, 1e-13, 2**-52])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_digits_are_lost_near_one(epsilon, dtype):
    logits, target = (x.to(dtype) if x.is_floating_point() else x for x in random_logits(0))
    for tau in (1 - epsilon, 1 + epsilon):
        loss = C.comp_sum_loss(logits, target, tau=tau, reduction="none")
        slow = [slow_loss(row.tolist(), y, tau) for row, y in zip(logits, target.tolist(), strict=True)]
        rtol = 1e-5 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(loss, torch.tensor(slow, dtype=dtype), rtol=rtol, atol=0)


@few
@given(seeds, taus)
def test_invariances_and_gradient(seed, tau):
    logits, target = random_logits(seed)
    logits.requires_grad_()
    loss = C.comp_sum_loss(logits, target, tau=tau, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    s = logits.detach().softmax(1)
    weight = s.gather(1, target[:, None]) ** (tau - 1)
    expected = weight * (s - F.one_hot(target, s.shape[1]))
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(C.comp_sum_loss(logits + 7, target, tau=tau, reduction="none"), loss, rtol=1e-9, atol=0)
    order = torch.randperm(s.shape[1], generator=torch.Generator().manual_seed(seed))
    permuted = C.comp_sum_loss(logits[:, order], order.argsort()[target], tau=tau, reduction="none")
    torch.testing.assert_close(permuted, loss, rtol=1e-9, atol=1e-12)


@few
@given(seeds, taus, st.floats(0, 2))
def test_family_falls_with_tau_and_is_a_concave_function_of_the_first(seed, tau, more):
    logits, target = random_logits(seed)
    first, low, high = (
        C.comp_sum_loss(logits, target, tau=t, reduction="none") for t in (0, tau, min(tau + more, 5.0))
    )
    assert (high <= low * (1 + 1e-12)).all()
    torch.testing.assert_close(low, C.phi(first, tau=tau), rtol=1e-8, atol=1e-9)
    u = torch.linspace(0, 50, 201, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(C.phi(u, tau=tau).sum(), u)
    torch.testing.assert_close(slope, (1 + u.detach()) ** -tau)
    assert C.phi(torch.zeros(1), tau=tau).item() == 0


@pytest.mark.parametrize("tau", [0, 0.5, 1, 1.5, 2, 3])
def test_gradcheck(tau):
    logits, target = random_logits(1, classes=5, scale=1.0)
    logits.requires_grad_()
    other = (logits.detach() + 0.3 * torch.randn_like(logits)).requires_grad_()
    p = torch.softmax(logits.detach() * 2, 1)
    assert torch.autograd.gradcheck(lambda x: C.comp_sum_loss(x, target, tau=tau), logits)
    assert torch.autograd.gradgradcheck(lambda x: C.comp_sum_loss(x, target, tau=tau), logits)
    assert torch.autograd.gradcheck(lambda x: C.conditional_risk(x, p, tau=tau), logits)
    assert torch.autograd.gradcheck(
        lambda x, z: C.smooth_adversarial_comp_sum_loss(x, z, target, tau=tau, rho=0.7, nu=1.3), (logits, other)
    )
    sets = torch.stack([logits.detach(), other.detach()], 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: C.rho_margin_comp_sum(x, target, tau=tau, rho=1.0), sets)


def test_reductions_agree():
    logits, target = random_logits(2)
    each = C.comp_sum_loss(logits, target, tau=1.5, reduction="none")
    assert each.shape == (4,)
    torch.testing.assert_close(C.comp_sum_loss(logits, target, tau=1.5, reduction="sum"), each.sum())
    torch.testing.assert_close(C.comp_sum_loss(logits, target, tau=1.5), each.mean())


# --- risks at one input -----------------------------------------------------------------------------------------------


def test_worked_example():
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    scores = torch.tensor([[0.3, 0.4, 0.3]], dtype=torch.float64).log()
    for tau, risk, best, transform in [
        (1, 1.1177, 1.0297, 0.0201),
        (2, 0.67, 0.5, 0.0667),
        (0, 2.0833, 1.8970, 0.0202),
    ]:
        assert C.conditional_risk(scores, p, tau=tau).item() == pytest.approx(risk, abs=6e-5)
        assert C.optimal_conditional_risk(p, tau=tau).item() == pytest.approx(best, abs=6e-5)
        beta = torch.tensor([0.2], dtype=torch.float64)
        assert C.consistency_transform(beta, tau=tau, num_classes=3).item() == pytest.approx(transform, abs=6e-5)
    regret = C.conditional_risk(scores, p, tau=1) - C.optimal_conditional_risk(p, tau=1)
    assert C.consistency_bound(regret, tau=1, num_classes=3).item() == pytest.approx(0.413, abs=6e-4)


@few
@given(seeds, taus)
def test_conditional_risk_is_the_expected_loss(seed, tau):
    p, generator = random_distributions(seed, rows=5)
    logits = 2 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    n = p.shape[1]
    losses = [C.comp_sum_loss(logits, torch.full((5,), y), tau=tau, reduction="none") for y in range(n)]
    torch.testing.assert_close(C.conditional_risk(logits, p, tau=tau), (p * torch.stack(losses, 1)).sum(1))


def test_a_class_without_probability_costs_nothing():
    p = torch.tensor([[1.0, 0.0]])
    for tau in TAUS:
        assert C.conditional_risk(torch.tensor([[0.0, -torch.inf]]), p, tau=tau).item() == 0
        assert C.optimal_conditional_risk(p, tau=tau).item() == 0
        assert C.optimal_softmax(p, tau=tau).tolist() == [[1.0, 0.0]]


@few
@given(seeds, taus)
def test_optimal_softmax_attains_the_optimum_and_nothing_is_below(seed, tau):
    p, generator = random_distributions(seed)
    best = C.optimal_conditional_risk(p, tau=tau)
    if abs(tau - 1) > 1e-8 or tau == 1:  # nearer, the two are one loss but for rounding
        s = C.optimal_softmax(p, tau=tau)
        torch.testing.assert_close(s.sum(1), torch.ones(len(p), dtype=torch.float64))
        torch.testing.assert_close(C.conditional_risk(s.log(), p, tau=tau), best, rtol=1e-6, atol=1e-8)
    other = 3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    assert (C.conditional_risk(other, p, tau=tau) >= best - 1e-7).all()


@pytest.mark.parametrize("tau", [0, 0.5, 1, 1.5, 1.9])
def test_optimum_against_a_numerical_minimizer(tau):
    p = torch.tensor([[0.42, 0.3, 0.18, 0.1], [0.7, 0.15, 0.1, 0.05]], dtype=torch.float64)
    logits = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        risk = C.conditional_risk(logits, p, tau=tau).sum()
        risk.backward()
        return risk

    optimizer.step(closure)
    found = C.conditional_risk(logits.detach(), p, tau=tau)
    torch.testing.assert_close(found, C.optimal_conditional_risk(p, tau=tau), rtol=0, atol=1e-8)
    torch.testing.assert_close(logits.detach().softmax(1), C.optimal_softmax(p, tau=tau), rtol=0, atol=1e-4)


def test_optimum_closed_forms_and_limits():
    p, _ = random_distributions(3)
    risk = lambda tau: C.optimal_conditional_risk(p, tau=tau)  # noqa: E731
    torch.testing.assert_close(risk(0), p.sqrt().sum(1) ** 2 - 1, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(risk(1), -torch.xlogy(p, p).sum(1), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(risk(1.5), 2 * (1 - (p**2).sum(1).sqrt()), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(risk(3), (1 - p.amax(1)) / 2, rtol=1e-11, atol=1e-12)
    for tau in (1 - 2e-8, 1 + 2e-8, 1 + 1e-9, 1 - 2**-53):
        torch.testing.assert_close(risk(tau), risk(1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(risk(2 - 1e-9), risk(2), rtol=1e-6, atol=1e-7)
    single = p.float() / p.float().sum(1, keepdim=True)  # float32 keeps its digits near 1
    torch.testing.assert_close(
        C.optimal_conditional_risk(single, tau=1 + 1e-5), risk(1 + 1e-5).float(), rtol=1e-4, atol=1e-5
    )


# --- the H-consistency transform and bound ----------------------------------------------------------------------------


@few
@given(st.floats(1e-9, 1), taus, st.integers(2, 1000))
def test_transform_equals_the_printed_formula(beta, tau, n):
    if 0 < abs(tau - 1) < 1e-6:
        tau = 1
    ours = C.consistency_transform(torch.tensor(beta, dtype=torch.float64), tau=tau, num_classes=n).item()
    # what cancels near 1 is of the order of beta squared over |1 - tau|
    room = 1e-14 * beta**2 / abs(1 - tau) if tau != 1 else 1e-15 * beta
    assert ours == pytest.approx(slow_transform(beta, tau, n), rel=1e-11, abs=room)


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.3, 0.999999, 1.0])
@pytest.mark.parametrize("tau", [0, 0.5, 0.999, 1.001, 1.5, 1.999, 2 - 1e-12])
def test_transform_keeps_its_digits(beta, tau):
    ours = C.consistency_transform(torch.tensor(beta, dtype=torch.float64), tau=tau, num_classes=7).item()
    assert ours == pytest.approx(slow_transform(beta, tau, 7), rel=1e-9)


def test_transform_closed_forms():
    beta = torch.linspace(0, 1, 101, dtype=torch.float64)
    transform = lambda tau, n=5: C.consistency_transform(beta, tau=tau, num_classes=n)  # noqa: E731
    torch.testing.assert_close(transform(0), 1 - (1 - beta**2).sqrt())
    torch.testing.assert_close(transform(2), beta / 5)
    torch.testing.assert_close(transform(3), beta / 50)
    assert transform(1)[-1].item() == pytest.approx(math.log(2), abs=1e-15)
    for tau in (1 - 1e-7, 1 + 1e-7, 1 + 1e-9):
        torch.testing.assert_close(transform(tau), transform(1), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(transform(2 - 1e-10), transform(2), rtol=1e-6, atol=1e-9)
    at = C.consistency_transform(torch.tensor(0.5, dtype=torch.float64), tau=1.5, num_classes=4)
    assert at.item() == pytest.approx(0.118034, abs=6e-7)


@few
@given(taus, st.integers(2, 100))
def test_transform_is_convex_increasing_and_between_its_quadratics(tau, n):
    beta = torch.linspace(0, 1, 401, dtype=torch.float64)
    exact, simple, asymptotic = (
        C.consistency_transform(beta, tau=tau, num_classes=n, form=form) for form in ("exact", "simple", "asymptotic")
    )
    assert exact[0].item() == 0
    room = 1e-12 if abs(tau - 1) > 1e-3 else 1e-9
    assert (exact.diff() > -room).all() and exact[200].item() > 0
    assert (exact.diff(n=2) > -room).all()
    assert (exact >= simple - room).all()
    if tau < 1:
        assert (simple == asymptotic).all()
    if 1 <= tau < 2:  # the chapter's proof goes through cross-entropy
        cross_entropy = C.consistency_transform(beta, tau=1, num_classes=n)
        assert (exact >= n ** (1 - tau) * cross_entropy - room).all()


@pytest.mark.parametrize("tau", [0, 0.5, 0.9, 1, 1.1, 1.5, 1.9, 2, 3])
def test_asymptotic_form_is_the_limit(tau):
    beta = torch.tensor([1e-2, 1e-4], dtype=torch.float64)
    exact = C.consistency_transform(beta, tau=tau, num_classes=9)
    asymptotic = C.consistency_transform(beta, tau=tau, num_classes=9, form="asymptotic")
    assert (exact / asymptotic - 1).abs()[1] < 1e-5
    t = exact[1:]
    assert C.consistency_bound(t, tau=tau, num_classes=9, form="asymptotic").item() == pytest.approx(1e-4, rel=1e-5)


def test_asymptotic_form_is_no_guarantee_between_one_and_two():
    one = torch.ones(1, dtype=torch.float64)
    exact, asymptotic = (C.consistency_transform(one, tau=1.9, num_classes=9, form=f) for f in ("exact", "asymptotic"))
    assert asymptotic > 2 * exact


@few
@given(st.floats(1e-3, 1), taus, st.integers(2, 200))
def test_bound_inverts_the_transform(beta, tau, n):
    if 0 < abs(tau - 1) < 1e-6:
        tau = 1
    beta = torch.tensor([beta], dtype=torch.float64)
    t = C.consistency_transform(beta, tau=tau, num_classes=n)
    exact = C.consistency_bound(t, tau=tau, num_classes=n)
    torch.testing.assert_close(exact, beta, rtol=0, atol=1e-8)
    assert (C.consistency_bound(t, tau=tau, num_classes=n, form="simple") >= exact - 1e-8).all()
    assert C.consistency_bound(t + 100, tau=tau, num_classes=n).item() == 1 or n ** (tau - 1) > 100


@pytest.mark.parametrize("tau", [0, 0.7, 1, 1.4, 1.999, 2, 2.5])
def test_bound_is_exact_for_tiny_excess_and_one_at_the_end(tau):
    t = torch.tensor([0, 1e-14, 1e-8], dtype=torch.float64)
    exact = C.consistency_bound(t, tau=tau, num_classes=4)
    assert exact[0].item() == 0
    asymptotic = C.consistency_bound(t, tau=tau, num_classes=4, form="asymptotic")
    torch.testing.assert_close(exact[1:], asymptotic[1:], rtol=2e-3, atol=0)
    end = C.consistency_transform(torch.ones(1, dtype=torch.float64), tau=tau, num_classes=4)
    assert C.consistency_bound(end * 1.001, tau=tau, num_classes=4).item() == 1


@pytest.mark.parametrize("tau", [300.0, 700.0, 1e6])
@pytest.mark.parametrize("form", C.FORMS)
def test_bound_where_the_slope_underflows(tau, form):
    excess = torch.tensor([0.0, 1e-3, 1.0], requires_grad=True)
    bound = C.consistency_bound(excess, tau=tau, num_classes=10, form=form)
    assert bound[0].item() == 0 and (bound[1:] >= bound[:-1]).all()
    if form == "sharp":  # tau - 1 times the excess, whatever the number of classes
        torch.testing.assert_close(bound, ((tau - 1) * excess).clamp(max=1))
    else:
        assert (bound[1:] >= 1).all()
    if form in ("exact", "sharp"):
        (slope,) = torch.autograd.grad(bound.sum(), excess)
        assert not slope.isnan().any() and bound[2].item() == 1


def test_simple_bounds_as_printed():
    t = torch.tensor([0.01, 3.0], dtype=torch.float64)
    simple = lambda tau: C.consistency_bound(t, tau=tau, num_classes=100, form="simple")  # noqa: E731
    torch.testing.assert_close(simple(0.5), (2**0.5 * 1.5 * t).sqrt())
    torch.testing.assert_close(simple(1), (2 * t).sqrt())
    torch.testing.assert_close(simple(1.5), (2 * 10 * t).sqrt())
    torch.testing.assert_close(simple(2), 100 * t)
    torch.testing.assert_close(simple(3), 2 * 100**2 * t)
    at = torch.tensor([0.02], dtype=torch.float64)
    assert C.consistency_bound(at, tau=1, num_classes=100).item() == pytest.approx(0.1993304, abs=6e-8)
    assert C.consistency_bound(at, tau=2, num_classes=100).item() == 1


@settings(deadline=None, max_examples=100)
@given(seeds, taus)
def test_h_consistency_at_each_input(seed, tau):
    """The theorem: the surrogate regret is at least the transform of the zero-one regret."""
    p, generator = random_distributions(seed)
    scale = 10 ** (2.5 * torch.rand(len(p), 1, generator=generator, dtype=torch.float64) - 1.5)
    logits = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    near = (
        p.log() / max(2 - tau, 0.05) + 0.3 * logits
    )  # half of the rows near the optimum, where the bound is tested hardest
    logits = torch.where(torch.arange(len(p))[:, None] % 2 == 0, logits, near)
    beta = zero_one_regret(p, logits.argmax(1))
    regret = C.conditional_risk(logits, p, tau=tau) - C.optimal_conditional_risk(p, tau=tau)
    room = 1e-10 if abs(tau - 1) > 1e-4 or tau == 1 else 1e-7
    floor = C.consistency_transform(beta, tau=tau, num_classes=p.shape[1])
    assert (regret - floor >= -room * (1 + regret.abs())).all()
    # Jensen: the same for the mean over inputs, with the bound
    bound = C.consistency_bound(regret.mean().clamp(min=0), tau=tau, num_classes=p.shape[1])
    assert beta.mean() <= bound + 1e-6


@pytest.mark.parametrize("tau", [0, 0.3, 0.7, 1, 1.2, 1.5, 1.9, 2])
def test_tight_for_two_classes(tau):
    beta = torch.linspace(0, 1, 21, dtype=torch.float64)
    p = torch.stack([(1 + beta) / 2, (1 - beta) / 2], 1)
    regret = C.conditional_risk(torch.zeros_like(p), p, tau=tau) - C.optimal_conditional_risk(p, tau=tau)
    torch.testing.assert_close(regret, C.consistency_transform(beta, tau=tau, num_classes=2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tau", [0, 0.5, 0.9, 1])
def test_tight_in_the_limit_for_more_classes(tau):
    beta = torch.linspace(0, 1, 21, dtype=torch.float64)
    p = torch.stack([(1 + beta) / 2, (1 - beta) / 2, *[0 * beta] * 3], 1)
    logits = torch.tensor([0.0, 0.0, -40, -40, -40], dtype=torch.float64).expand_as(p)
    regret = C.conditional_risk(logits, p, tau=tau) - C.optimal_conditional_risk(p, tau=tau)
    torch.testing.assert_close(regret, C.consistency_transform(beta, tau=tau, num_classes=5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [2, 3, 10, 50])
def test_tight_for_the_absolute_error(n):
    """At tau = 2 the factor n is needed: flat scores, and a label almost uniform."""
    beta = torch.linspace(0, 1 / (n - 1), 11, dtype=torch.float64)
    p = ((1 + beta) / n)[:, None].repeat(1, n)
    p[:, 1] -= beta
    p = p.clamp(min=0)
    regret = C.conditional_risk(torch.zeros_like(p), p, tau=2) - C.optimal_conditional_risk(p, tau=2)
    torch.testing.assert_close(regret, C.consistency_transform(beta, tau=2, num_classes=n), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tau", [1.3, 1.6])
def test_two_likely_classes_do_not_pay_for_the_others(tau):
    """Between 1 and 2, two tied classes attain the bound of two classes, n^(tau - 1) times the one of n."""
    beta = torch.linspace(0.1, 1, 10, dtype=torch.float64)
    p = torch.stack([(1 + beta) / 2, (1 - beta) / 2, 0 * beta, 0 * beta, 0 * beta, 0 * beta], 1)
    logits = torch.tensor([0.0, 0.0, -60, -60, -60, -60], dtype=torch.float64).expand_as(p)
    regret = C.conditional_risk(logits, p, tau=tau) - C.optimal_conditional_risk(p, tau=tau)
    floor = C.consistency_transform(beta, tau=tau, num_classes=6)
    torch.testing.assert_close(regret, 3 ** (tau - 1) * floor, rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=100)
@given(seeds, st.floats(2, 5))
def test_sharp_form_holds_at_each_input(seed, tau):
    """From tau = 2 on: the regret is at least the sharp line, which is never below the exact one."""
    p, generator = random_distributions(seed)
    n = p.shape[1]
    # likely classes that nearly tie, and scores that tie on a set of classes: where the bound is tested hardest
    keep = torch.rand(p.shape, generator=generator) < 0.5
    keep[:, 0] = True
    sparse = (p * keep) / (p * keep).sum(1, keepdim=True)
    p = torch.where(torch.rand(len(p), 1, generator=generator) < 0.5, p, sparse)
    logits = torch.where(keep, 0.0, -60.0).double() + 1e-3 * torch.rand(
        p.shape, generator=generator, dtype=torch.float64
    )
    beta = zero_one_regret(p, logits.argmax(1))
    regret = C.conditional_risk(logits, p, tau=tau) - C.optimal_conditional_risk(p, tau=tau)
    sharp = C.consistency_transform(beta, tau=tau, num_classes=n, form="sharp")
    assert (regret >= sharp - 1e-9).all()
    assert (sharp >= C.consistency_transform(beta, tau=tau, num_classes=n) - 1e-15).all()
    torch.testing.assert_close(C.consistency_bound(sharp, tau=tau, num_classes=n, form="sharp"), beta)


@pytest.mark.parametrize(
    ("tau", "n", "slope"), [(3, 2, 0.75), (3, 30, 0.75), (2.5, 100, 0.6151), (2, 7, 1 / 7), (4, 9, 0.875)]
)
def test_sharp_form_is_attained(tau, n, slope):
    """The prediction ties with the m - 1 classes that share all of the probability."""
    line = C.consistency_transform(torch.ones(1).double(), tau=tau, num_classes=n, form="sharp").item() * (tau - 1)
    assert line == pytest.approx(slope, abs=6e-5)
    ratios = []
    for m in range(2, n + 1):
        p = torch.zeros(1, n, dtype=torch.float64)
        p[0, 1:m] = 1 / (m - 1)
        logits = torch.full((1, n), -400.0, dtype=torch.float64)
        logits[0, :m] = 0  # the tie is broken to class 0, which has no probability
        regret = C.conditional_risk(logits, p, tau=tau) - C.optimal_conditional_risk(p, tau=tau)
        ratios.append(regret.item() * (tau - 1) * (m - 1))
    assert min(ratios) == pytest.approx(line, rel=1e-9)


@pytest.mark.parametrize("tau", [0, 0.5, 1, 1.5, 1.99, 2, 3])
def test_gradients_of_transform_and_bound(tau):
    beta = torch.tensor([1e-3, 0.05, 0.5, 0.95], dtype=torch.float64, requires_grad=True)
    for form in C.FORMS:
        assert torch.autograd.gradcheck(
            lambda b, form=form: C.consistency_transform(b, tau=tau, num_classes=5, form=form),
            beta,
            eps=1e-7,
            atol=1e-6,
        )
    exact = C.consistency_bound(beta / 50, tau=tau, num_classes=5)
    assert exact.requires_grad == (tau >= 2)  # no wrong gradient through the bisection
    assert C.consistency_bound(beta / 50, tau=tau, num_classes=5, form="simple").requires_grad


def test_bounded_scores_are_not_enough():
    """Pitfall of the chapter: with scores in [-1, 1] and three classes, the optimum of cross-entropy ties two unequal classes."""
    p = torch.tensor([[0.51, 0.49, 0.0]], dtype=torch.float64)
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 41, dtype=torch.float64)] * 3)
    risk = C.conditional_risk(grid, p.expand(len(grid), 3).contiguous(), tau=1)
    assert grid[risk.argmin()].tolist() == [1, 1, -1]


# --- minimizability gaps ----------------------------------------------------------------------------------------------


@few
@given(seeds, taus)
def test_gap_of_constant_scores(seed, tau):
    """Constant scores: the gap is a Jensen gap of the optimal risk; at tau = 1 it is the mutual information."""
    p, _ = random_distributions(seed, rows=30)
    gap = C.optimal_conditional_risk(p.mean(0, keepdim=True), tau=tau) - C.optimal_conditional_risk(p, tau=tau).mean()
    assert gap.item() >= -1e-7
    information = torch.xlogy(p, p / p.mean(0)).sum(1).mean()
    if tau == 1:
        assert gap.item() == pytest.approx(information.item(), abs=1e-10)


@few
@given(seeds, st.floats(0, 3), st.floats(0, 2))
def test_gap_bound(seed, tau, more):
    """Deterministic labels, constant scores in a box: the gap is below its bound, and the bound falls with tau."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(2, 6, (), generator=generator))
    frequencies = torch.softmax(torch.randn(n, generator=generator, dtype=torch.float64), 0)
    scores = (
        torch.tanh(torch.randn(500, n, generator=generator, dtype=torch.float64)) * 2
    )  # constant hypotheses, |h| <= 2
    p = frequencies.expand(500, n).contiguous()
    risk = lambda t: C.conditional_risk(scores, p, tau=t).min()  # noqa: E731
    bound = lambda t: C.minimizability_gap_bound(risk(0), tau=t, num_classes=n, score_bound=2.0)  # noqa: E731
    best_at_each = C.phi(torch.tensor((n - 1) * math.exp(-4), dtype=torch.float64), tau=tau)
    assert risk(tau) - best_at_each <= bound(tau) + 1e-9
    assert bound(tau + more) <= bound(tau) + 1e-9 and bound(tau) >= 0
    free = C.minimizability_gap_bound(risk(0), tau=tau, num_classes=n, score_bound=math.inf)
    torch.testing.assert_close(free - bound(tau), best_at_each)


def test_gap_bound_is_the_integral():
    low, high, tau = 3 * math.exp(-2), 2.5, 1.6
    with mpmath.workdps(30):
        integral = float(mpmath.quad(lambda u: (1 + u) ** -mpmath.mpf(tau), [low, high]))
    ours = C.minimizability_gap_bound(torch.tensor(high, dtype=torch.float64), tau=tau, num_classes=4, score_bound=1.0)
    assert ours.item() == pytest.approx(integral, rel=1e-12)


@pytest.mark.parametrize("tau", [0, 0.5, 1, 1.7, 2, 700.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gap_bound_keeps_its_digits_and_is_never_negative(tau, dtype):
    least = 999 * math.exp(-2 * 0.1)
    below, above = torch.tensor([least * (1 - 9e-7), least * (1 + 9e-7)], dtype=torch.float64).to(dtype)
    assert C.minimizability_gap_bound(below, tau=tau, num_classes=1000, score_bound=0.1).item() == 0
    ours = C.minimizability_gap_bound(above, tau=tau, num_classes=1000, score_bound=0.1).item()
    with mpmath.workdps(50):  # what was rounded is the risk, not the difference of two terms that nearly agree
        low, high, e = mpmath.mpf(999) * mpmath.exp(-mpmath.mpf("0.2")), mpmath.mpf(above.item()), 1 - mpmath.mpf(tau)
        exact = mpmath.log((1 + high) / (1 + low)) if e == 0 else ((1 + high) ** e - (1 + low) ** e) / e
    assert ours == pytest.approx(float(exact), rel=0.1 if dtype == torch.float32 else 1e-8, abs=1e-300)


# --- against an adversary ---------------------------------------------------------------------------------------------


def slow_margin_loss(scores, y, tau, rho):
    """The supremum over the given inputs, one at a time."""
    values = []
    for h in scores:
        margins = [min(max(0.0, 1 - (h[y] - h[k]) / rho), 1.0) for k in range(len(h)) if k != y]
        values.append(math.log1p(sum(margins)) if tau == 1 else ((1 + sum(margins)) ** (1 - tau) - 1) / (1 - tau))
    return max(values)


def random_sets(seed, rows=20):
    generator = torch.Generator().manual_seed(seed)
    n, size = (int(torch.randint(2, 7, (), generator=generator)) for _ in range(2))
    center = 2 * torch.randn(rows, 1, n, generator=generator, dtype=torch.float64)
    around = torch.rand(rows, 1, 1, generator=generator, dtype=torch.float64) * 2
    sets = center + around * torch.randn(rows, size, n, generator=generator, dtype=torch.float64)
    return sets, torch.softmax(2 * torch.randn(rows, n, generator=generator, dtype=torch.float64), 1)


@few
@given(seeds, taus, st.floats(0.1, 3))
def test_margin_loss_equals_the_slow_loop_and_the_smooth_loss_is_above(seed, tau, rho):
    if 0 < abs(tau - 1) < 1e-6:
        tau = 1
    sets, p = random_sets(seed)
    n = p.shape[1]
    target = torch.arange(len(p)) % n
    margin = C.rho_margin_comp_sum(sets, target, tau=tau, rho=rho, reduction="none")
    slow = [slow_margin_loss(s.tolist(), y, tau, rho) for s, y in zip(sets, target.tolist(), strict=True)]
    torch.testing.assert_close(margin, torch.tensor(slow, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    smooth = torch.stack(
        [
            C.smooth_adversarial_comp_sum_loss(
                sets[:, 0], sets[:, k], target, tau=tau, rho=rho, nu=math.sqrt(n - 1) / rho, reduction="none"
            )
            for k in range(sets.shape[1])
        ]
    ).amax(0)
    assert (smooth >= margin - 1e-9).all()


@few
@given(seeds, taus, st.floats(0.05, 3))
def test_adversarial_h_consistency_at_each_input(seed, tau, rho):
    """The theorem at one input; the first score vector of a set is that of the clean input."""
    sets, p = random_sets(seed)
    rows, _, n = sets.shape
    risk = torch.zeros(rows, dtype=torch.float64)
    zero_one = torch.zeros(rows, dtype=torch.float64)
    for y in range(n):
        target = torch.full((rows,), y)
        risk += p[:, y] * C.rho_margin_comp_sum(sets, target, tau=tau, rho=rho, reduction="none")
        others = torch.cat([sets[:, :, :y], sets[:, :, y + 1 :]], 2).amax(2)
        zero_one += p[:, y] * ((sets[:, :, y] - others) <= 0).any(1)
    ranks = torch.arange(n, dtype=torch.float64)
    best = (p.sort(1, descending=True).values * C.phi(ranks, tau=tau)).sum(1)
    unit = C.phi(torch.ones(1, dtype=torch.float64), tau=tau)
    assert (unit * (zero_one - 1 + p.amax(1)) <= risk - best + 1e-9).all()
    # an ordering kept with gaps of rho attains the optimum
    order = p.argsort(1, descending=True).argsort(1)
    sorted_scores = (-order * rho * (1 + 1e-9))[:, None].double()
    attained = sum(
        p[:, y] * C.rho_margin_comp_sum(sorted_scores, torch.full((rows,), y), tau=tau, rho=rho, reduction="none")
        for y in range(n)
    )
    torch.testing.assert_close(attained, best, rtol=1e-6, atol=1e-6)


def test_smooth_loss_where_nothing_moved():
    logits, target = random_logits(5)
    logits.requires_grad_()
    smooth = C.smooth_adversarial_comp_sum_loss(logits, logits.detach(), target, tau=1.5, rho=0.5, nu=3.0)
    clean = C.comp_sum_loss(logits / 0.5, target, tau=1.5)
    torch.testing.assert_close(smooth, clean, rtol=0, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (smooth, clean)))


def test_smooth_loss_with_weight_zero_is_the_clean_loss():
    logits, target = random_logits(9)
    logits.requires_grad_()
    smooth = C.smooth_adversarial_comp_sum_loss(logits, logits.detach() + 1e3, target, tau=0.5, rho=2.0, nu=0)
    clean = C.comp_sum_loss(logits / 2, target, tau=0.5)
    torch.testing.assert_close(smooth, clean, rtol=0, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (smooth, clean)))


def test_smooth_loss_by_hand():
    logits, moved = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[-1.0, 0.0, 2.0]])
    # differences (2, 1) become (-1, -3): a movement of length 5; rho = 2 halves the scores
    value = C.smooth_adversarial_comp_sum_loss(logits, moved, torch.tensor([0]), tau=0, rho=2.0, nu=0.7)
    assert value.item() == pytest.approx(math.exp(-1) + math.exp(-0.5) + 0.7 * 5, rel=1e-6)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 5))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
def test_perturb_stays_in_the_ball_and_leaves_the_model_alone(norm, bounds):
    model = network()
    model[2].eval()  # one frozen layer in a model that trains
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, target = torch.rand(8, 3, 4), torch.arange(8) % 5
    x[0], x[1] = 0, 1
    kept = x.clone()
    worst = C.perturb(
        model, x, target, radius=0.3, norm=norm, bounds=bounds, generator=torch.Generator().manual_seed(0)
    )
    assert worst.shape == x.shape and not worst.requires_grad and torch.equal(x, kept)
    delta = (worst - x).flatten(1)
    length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (length <= 0.3 * (1 + 1e-5)).all() and length.max() > 0.2
    if bounds:
        assert worst.min() >= 0 and worst.max() <= 1
    assert [m.training for m in model] == [True, True, False, True, True, True]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def movement(model, x, moved, target):
    model = model.eval()
    with torch.no_grad():
        d = model(moved) - model(x)
        own = d.gather(1, target[:, None])
        return ((own - d) ** 2).sum(1).sqrt()


def test_perturb_finds_the_supremum_of_a_linear_model():
    """For two classes and a linear model, the largest movement is radius times the norm of the difference of the weights."""
    torch.manual_seed(1)
    model = nn.Linear(6, 2)
    x, target = torch.rand(4, 6), torch.tensor([0, 1, 0, 1])
    w = (model.weight[0] - model.weight[1]).detach()
    for norm, dual in (("linf", w.abs().sum()), ("l2", w.norm())):
        worst = C.perturb(model, x, target, radius=0.25, steps=20, step_size=0.5, norm=norm, bounds=None)
        torch.testing.assert_close(movement(model, x, worst, target), (0.25 * dual).expand(4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_perturb_improves_with_steps(norm):
    model, x, target = network(), torch.rand(32, 12), torch.arange(32) % 5
    found = [
        movement(
            model,
            x,
            C.perturb(
                model, x, target, radius=0.2, steps=steps, step_size=0.05, norm=norm,
                generator=torch.Generator().manual_seed(3),
            ),
            target,
        )
        for steps in (0, 1, 3, 10)
    ]  # fmt: skip
    for fewer, more in itertools.pairwise(found):
        assert (more >= fewer - 1e-6).all()  # the best seen is kept
    assert found[-1].mean() > 1.5 * found[0].mean()


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_perturb_takes_steps_of_two_and_a_half_radii_in_all(steps):
    model, x, target = network(), torch.rand(32, 12), torch.arange(32) % 5
    run = lambda **options: C.perturb(  # noqa: E731
        model, x, target, radius=0.2, steps=steps, norm="l2", bounds=None, generator=torch.Generator().manual_seed(3), **options
    )  # fmt: skip
    assert torch.equal(run(), run(step_size=2.5 * 0.2 / steps))
    for other in (2.5 * 0.2, 2 * 0.2 / steps):
        assert torch.equal(run(), run(step_size=other)) == (other == 2.5 * 0.2 / steps)


@pytest.mark.parametrize("shape", [(20_000, 1), (5000, 3), (2000, 2, 4)])
def test_perturb_starts_uniformly_in_the_ball(shape):
    x, target = torch.full(shape, 7.0), torch.zeros(shape[0], dtype=torch.int64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape[1:]), 2))
    for norm in ("linf", "l2"):
        start = C.perturb(
            model, x, target, radius=0.5, steps=0, norm=norm, bounds=None, generator=torch.Generator().manual_seed(0)
        )
        delta = ((start - x) / 0.5).flatten(1).double()
        d = delta.shape[1]
        uniform = delta.flatten() / 2 + 0.5 if norm == "linf" else delta.norm(dim=1) ** d
        assert stats.kstest(uniform.numpy(), "uniform").pvalue > 0.01
        assert (delta.mean(0).abs() < 4 * delta.std(0) / shape[0] ** 0.5).all()  # no side is preferred
        assert stats.binomtest(int((delta > 0).sum()), delta.numel()).pvalue > 0.01


def test_perturb_without_gradients_around_it():
    model, x, target = network(), torch.rand(4, 12), torch.arange(4)
    with torch.no_grad():
        inside = C.perturb(model, x, target, radius=0.1, generator=torch.Generator().manual_seed(0))
    outside = C.perturb(model, x, target, radius=0.1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(inside, outside)
    for p in model.parameters():
        p.requires_grad_(False)
    frozen = C.perturb(model, x, target, radius=0.1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(frozen, outside)


def test_perturb_restores_the_mode_after_an_error():
    model = network()
    with pytest.raises(ValueError, match="target"):
        C.perturb(model, torch.rand(4, 12), torch.full((4,), 5), radius=0.1)
    assert model.training and all(m.training for m in model)


# --- extremes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1, 1.2, 1.7, 2, 3])
def test_extreme_scores_in_float32(tau):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, 1e4, -1e4]], requires_grad=True)
    loss = C.comp_sum_loss(logits, torch.tensor([0, 0, 1]), tau=tau, reduction="none")
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()
    assert loss[0].item() == 0
    if tau > 1:
        assert loss[1].item() == pytest.approx(1 / (tau - 1)) and logits.grad[1].abs().max() == 0
    assert loss[2].item() == pytest.approx(slow_loss([1e4, 1e4, -1e4], 1, tau), rel=1e-6)


@pytest.mark.parametrize("tau", [0, 0.5, 0.99])
def test_extreme_scores_below_one_are_never_nan(tau):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [-30.0, 30, 0]])
    loss = C.comp_sum_loss(logits, torch.tensor([0, 0, 0]), tau=tau, reduction="none")
    assert not loss.isnan().any() and loss[0].item() == 0
    assert loss[1].item() == torch.inf or tau == 0.99
    assert loss[2].item() == pytest.approx(slow_loss([-30, 30, 0], 0, tau), rel=1e-4)


def test_half_precision_and_autocast():
    logits, target = random_logits(6)
    half = logits.to(torch.bfloat16).requires_grad_()
    for tau in (0, 1, 1.5):
        loss = C.comp_sum_loss(half, target, tau=tau)
        (gradient,) = torch.autograd.grad(loss, half)
        assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
        torch.testing.assert_close(loss, C.comp_sum_loss(half.float(), target, tau=tau))
    model, x = nn.Linear(3, 5), torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(x)
        loss = C.comp_sum_loss(scores, target % 5, tau=1.5)
        smooth = C.smooth_adversarial_comp_sum_loss(scores, scores, target % 5)
    assert scores.dtype == torch.bfloat16 and loss.dtype == smooth.dtype == torch.float32
    torch.testing.assert_close(loss, C.comp_sum_loss(scores.float(), target % 5, tau=1.5))


def test_transforms_compile_and_layout():
    logits, target = random_logits(7, classes=5)
    whole = torch.func.grad(lambda x: C.comp_sum_loss(x, target, tau=1.5, reduction="sum"))(logits)
    rows = torch.func.vmap(torch.func.grad(lambda x, y: C.comp_sum_loss(x[None], y[None], tau=1.5, reduction="sum")))(
        logits, target
    )
    torch.testing.assert_close(whole, rows)
    compiled = torch.compile(lambda x: C.comp_sum_loss(x, target, tau=0.5), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits), C.comp_sum_loss(logits, target, tau=0.5))
    spread = logits.repeat(1, 2).T.contiguous().T[:, ::2][:, :5]
    torch.testing.assert_close(
        C.comp_sum_loss(spread, target, tau=2), C.comp_sum_loss(spread.contiguous(), target, tau=2)
    )


@pytest.mark.parametrize("wrong", [-100, -1, 4])
def test_a_wrong_class_fails_where_values_are_not_read(wrong):
    """The class -100 is no exception, though torch's cross-entropy ignores it unless it is told not to."""
    logits, target = torch.zeros(3, 4), torch.tensor([0, wrong, 3])
    compiled = torch.compile(lambda x, y: C.comp_sum_loss(x, y, tau=1.5), backend="aot_eager", fullgraph=True)
    rows = torch.func.vmap(lambda x, y: C.comp_sum_loss(x[None], y[None]))
    for call in (compiled, rows):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            call(logits, target)


def test_numpy_numbers_are_numbers():
    logits, target = random_logits(8)
    assert C.comp_sum_loss(logits, target, tau=np.float32(1.5)) == C.comp_sum_loss(logits, target, tau=1.5)
    assert C.consistency_transform(torch.ones(1), tau=np.int64(2), num_classes=np.int64(4)).item() == 0.25


# --- bad input --------------------------------------------------------------------------------------------------------

L, Y = torch.zeros(3, 4), torch.tensor([0, 1, 3])
P = torch.full((3, 4), 0.25)
B = torch.tensor([0.5])
S = torch.zeros(3, 2, 4)
MODEL, X = nn.Linear(2, 4), torch.full((3, 2), 0.5)


@pytest.mark.parametrize("tau", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "call",
    [
        lambda t: C.comp_sum_loss(L, Y, tau=t),
        lambda t: C.phi(B, tau=t),
        lambda t: C.conditional_risk(L, P, tau=t),
        lambda t: C.optimal_conditional_risk(P, tau=t),
        lambda t: C.optimal_softmax(P, tau=t),
        lambda t: C.consistency_transform(B, tau=t, num_classes=3),
        lambda t: C.consistency_bound(B, tau=t, num_classes=3),
        lambda t: C.minimizability_gap_bound(torch.tensor(5.0), tau=t, num_classes=3, score_bound=1.0),
        lambda t: C.rho_margin_comp_sum(S, Y, tau=t, rho=1.0),
        lambda t: C.smooth_adversarial_comp_sum_loss(L, L, Y, tau=t),
    ],
)
def test_bad_tau(call, tau):
    with pytest.raises(ValueError, match="tau"):
        call(tau)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: C.comp_sum_loss(torch.zeros(3), Y), "logits"),
        (lambda: C.comp_sum_loss(torch.zeros(3, 1), Y * 0), "logits"),
        (lambda: C.comp_sum_loss(torch.zeros(0, 4), Y[:0]), "logits"),
        (lambda: C.comp_sum_loss(L, Y[:2]), "target"),
        (lambda: C.comp_sum_loss(L, Y + 1), "target"),
        (lambda: C.comp_sum_loss(L, Y - 1), "target"),
        (lambda: C.comp_sum_loss(L, Y[:, None]), "target"),
        (lambda: C.comp_sum_loss(L, Y, reduction="average"), "reduction"),
        (lambda: C.phi(-B, tau=1), "u must"),
        (lambda: C.conditional_risk(L[:2], P, tau=1), "logits"),
        (lambda: C.conditional_risk(L, P * 2, tau=1), "probabilities"),
        (lambda: C.optimal_conditional_risk(P - 0.5, tau=1), "probabilities"),
        (lambda: C.optimal_softmax(P[:, :1], tau=1), "probabilities"),
        (lambda: C.optimal_softmax(P, tau=2), "probabilities"),
        (lambda: C.consistency_transform(B + 1, tau=1, num_classes=3), "beta"),
        (lambda: C.consistency_transform(-B, tau=1, num_classes=3), "beta"),
        (lambda: C.consistency_transform(B, tau=1, num_classes=1), "num_classes"),
        (lambda: C.consistency_transform(B, tau=2, num_classes=3, form="tight"), "form"),
        (lambda: C.consistency_bound(-B, tau=1, num_classes=3), "excess"),
        (lambda: C.consistency_bound(B * float("nan"), tau=1, num_classes=3), "excess"),
        (lambda: C.consistency_bound(B, tau=1, num_classes=0), "num_classes"),
        (lambda: C.consistency_bound(B, tau=1, num_classes=3, form="tight"), "form"),
        (lambda: C.minimizability_gap_bound(B, tau=1, num_classes=3, score_bound=0.0), "best_sum_exp_risk"),
        (lambda: C.minimizability_gap_bound(B, tau=1, num_classes=3, score_bound=-1.0), "score_bound"),
        (lambda: C.rho_margin_comp_sum(S, Y, tau=1, rho=0), "rho"),
        (lambda: C.rho_margin_comp_sum(L, Y, tau=1, rho=1.0), "score_sets"),
        (lambda: C.smooth_adversarial_comp_sum_loss(L, L[:2], Y), "perturbed_logits"),
        (lambda: C.smooth_adversarial_comp_sum_loss(L, L, Y, rho=-1.0), "rho"),
        (lambda: C.smooth_adversarial_comp_sum_loss(L, L, Y, nu=-0.1), "nu"),
        (lambda: C.perturb(MODEL, X, Y, radius=0), "radius"),
        (lambda: C.perturb(MODEL, X, Y, radius=0.1, steps=-1), "steps"),
        (lambda: C.perturb(MODEL, X, Y, radius=0.1, step_size=0.0), "step_size"),
        (lambda: C.perturb(MODEL, X, Y, radius=0.1, norm="l1"), "norm"),
        (lambda: C.perturb(MODEL, X + 1, Y, radius=0.1), r"x must lie inside bounds \[0, 1\], got 1.5 to 1.5"),
        (lambda: C.perturb(MODEL, X[0], Y[:2], radius=0.1), r"x must have shape \(B, ...\)"),
        (lambda: C.perturb(MODEL, X, Y, radius=0.1, bounds=(1.0, 0.0)), r"bounds must.* got \(1.0, 0.0\)"),
        (lambda: C.perturb(MODEL, X, Y, radius=0.1, bounds=(0.5, 0.5)), "bounds must"),
        (lambda: C.perturb(MODEL, X, Y, radius=0.1, bounds=(0.0, math.nan)), "bounds must"),
        (lambda: C.perturb(MODEL, X, Y[:2], radius=0.1), "target"),
    ],
)
def test_bad_values_name_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: C.comp_sum_loss([[0.0, 1.0]], Y), "logits"),
        (lambda: C.comp_sum_loss(L.long(), Y), "logits"),
        (lambda: C.comp_sum_loss(L, Y.float()), "target"),
        (lambda: C.comp_sum_loss(L, [0, 1, 3]), "target"),
        (lambda: C.comp_sum_loss(L, Y, tau="two"), "tau"),
        (lambda: C.comp_sum_loss(L, Y, tau=True), "tau"),
        (lambda: C.phi(1.0, tau=1), "u must"),
        (lambda: C.conditional_risk(L.double(), P, tau=1), "logits"),
        (lambda: C.optimal_conditional_risk([0.5, 0.5], tau=1), "probabilities"),
        (lambda: C.consistency_transform(0.5, tau=1, num_classes=3), "beta"),
        (lambda: C.consistency_bound(B, tau=1, num_classes=3.0), "num_classes"),
        (lambda: C.minimizability_gap_bound(1.0, tau=1, num_classes=3, score_bound=1.0), "best_sum_exp_risk"),
        (lambda: C.smooth_adversarial_comp_sum_loss(L, L.double(), Y), "perturbed_logits"),
        (lambda: C.perturb(MODEL, X.long(), Y, radius=0.1), "x must"),
        (lambda: C.perturb(MODEL, X, Y, radius=0.1, bounds=1.0), "bounds must be .* got 1.0"),
        (lambda: C.perturb(MODEL, X, Y, radius=0.1, bounds=(0.0, 0.5, 1.0)), "bounds must"),
        (lambda: C.perturb(MODEL, X, Y, radius=0.1, bounds=("0", "1")), "bounds must hold two numbers"),
        (lambda: C.perturb(MODEL, X, Y, radius="small"), "radius"),
    ],
)
def test_bad_types_name_the_argument(call, name):
    with pytest.raises(TypeError, match=name):
        call()


def test_conditional_risk_has_a_gradient_where_a_class_has_no_probability():
    p = torch.tensor([[0.6, 0.4, 0.0]], dtype=torch.float64)
    for tau in (0.0, 0.5, 1.0, 2.0):
        logits = torch.tensor([[0.6, 0.4, -1e4]], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(C.conditional_risk(logits, p, tau=tau).sum(), logits)
        near = torch.tensor([[0.6, 0.4, -40.0]], dtype=torch.float64, requires_grad=True)
        (wanted,) = torch.autograd.grad(C.conditional_risk(near, p, tau=tau).sum(), near)
        torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=0)


def test_margin_loss_counts_ranks_in_half_precision():
    scores = torch.zeros(1, 1, 1000, dtype=torch.bfloat16)
    loss = C.rho_margin_comp_sum(scores, torch.tensor([3]), tau=0, rho=1.0)
    assert loss.item() == pytest.approx(999, rel=1e-6) and loss.dtype == torch.float32


def test_the_logistic_transform_ends_upright():
    beta = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64, requires_grad=True)
    C.consistency_transform(beta, tau=1, num_classes=2).sum().backward()
    torch.testing.assert_close(beta.grad, torch.atanh(beta.detach()))
