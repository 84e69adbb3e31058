"""The theorems of chapter language/robust_dpo as properties; closed forms, limits, extremes and bad input."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, linprog, minimize

from lossbook.language import robust_dpo as R

seeds = st.integers(0, 2**31)
rates = st.floats(0, 0.45)
targets = st.floats(0.1, 3)
margins = st.lists(st.floats(-50, 50), min_size=1, max_size=8)
kinds = st.sampled_from(R.KINDS)
bases = st.sampled_from(R.BASES)
few = settings(deadline=None, max_examples=60)
GRID = torch.linspace(-50, 50, 2001, dtype=torch.float64)


# --- slow oracles: Python floats, pair by pair ------------------------------------------------------------------------


def slow_loss(z, base, target):
    if base == "logistic":
        return math.log1p(math.exp(-abs(z))) + max(-z, 0)
    return (z - target) ** 2 if base == "squared" else max(0, target - z)


def slow_robust(z, rate, base, target):
    return ((1 - rate) * slow_loss(z, base, target) - rate * slow_loss(-z, base, target)) / (1 - 2 * rate)


def slow_conservative(z, rate, base, target):
    return (1 - rate) * slow_loss(z, base, target) + rate * slow_loss(-z, base, target)


def observed_loss(kind, z, rate, base="logistic", target=1.0):
    """The loss that a kind gives to an observed margin."""
    if kind == "dpo":
        return slow_loss(z, base, target)
    return (slow_conservative if kind == "cdpo" else slow_robust)(z, rate, base, target)


def expected_loss(kind, z, p, rate, assumed, base="logistic", target=1.0):
    """By enumeration of the clean label and of the flip."""
    total = 0.0
    for clean, chance in ((1, p), (-1, 1 - p)):
        for flip, share in ((1, 1 - rate), (-1, rate)):
            total += chance * share * observed_loss(kind, clean * flip * z, assumed, base, target)
    return total


def peer(margin, loss_type, smoothing=0.0, beta=1.0):
    """TRL's DPOTrainer, its formulas written out; ``margin`` is the difference of log-ratios, without beta."""
    kept, swapped = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    if loss_type == "sigmoid":
        return -kept * (1 - smoothing) - swapped * smoothing
    if loss_type == "robust":
        return (-kept * (1 - smoothing) + swapped * smoothing) / (1 - 2 * smoothing)
    return torch.relu(1 - beta * margin) if loss_type == "hinge" else (margin - 1 / (2 * beta)) ** 2


# --- the losses -------------------------------------------------------------------------------------------------------


@few
@given(margins, rates, bases, targets)
def test_losses_equal_the_slow_loop(values, rate, base, target):
    z = torch.tensor(values, dtype=torch.float64)
    options = dict(base=base, target=target, reduction="none")
    for found, slow in (
        (R.preference_loss(z, **options), lambda v: slow_loss(v, base, target)),
        (R.robust_dpo_loss(z, noise_rate=rate, **options), lambda v: slow_robust(v, rate, base, target)),
        (R.conservative_dpo_loss(z, noise_rate=rate, **options), lambda v: slow_conservative(v, rate, base, target)),
    ):
        expected = torch.tensor([slow(v) for v in values], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    mean, total = (
        R.robust_dpo_loss(z, noise_rate=rate, base=base, target=target, reduction=r) for r in ("mean", "sum")
    )
    torch.testing.assert_close(total, len(values) * mean)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.49])
def test_formula_of_trl(rate):
    found = R.robust_dpo_loss(GRID, noise_rate=rate, reduction="none")
    expected = peer(GRID, "robust", rate)
    assert ((found - expected).abs() <= 1e-12 * expected.abs().clamp(min=1) / (1 - 2 * rate)).all()
    torch.testing.assert_close(
        R.conservative_dpo_loss(GRID, noise_rate=rate, reduction="none"),
        peer(GRID, "sigmoid", rate),
        rtol=1e-13,
        atol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_peers_on_random_batches(dtype):
    """The four losses of TRL that this module holds, from log-probabilities, to 1e-6."""
    generator = torch.Generator().manual_seed(0)
    logps = [-20 * torch.rand(512, generator=generator, dtype=dtype) for _ in range(4)]
    chosen, rejected, ref_chosen, ref_rejected = logps
    log_ratios = (chosen - rejected) - (ref_chosen - ref_rejected)
    close = dict(rtol=1e-6, atol=1e-6 if dtype == torch.float64 else 2e-5)
    for beta in (0.1, 0.5):
        z = R.preference_margin(*logps, beta=beta)
        h = R.preference_margin(*logps, beta=1.0)
        none = dict(reduction="none")
        torch.testing.assert_close(R.dpo_loss(z, **none), peer(log_ratios, "sigmoid", 0, beta), **close)
        for rate in (0.1, 0.4):
            robust, smooth = (peer(log_ratios, kind, rate, beta) for kind in ("robust", "sigmoid"))
            torch.testing.assert_close(R.robust_dpo_loss(z, noise_rate=rate, **none), robust, **close)
            torch.testing.assert_close(R.conservative_dpo_loss(z, noise_rate=rate, **none), smooth, **close)
        ipo = R.preference_loss(h, base="squared", target=1 / (2 * beta), **none)
        torch.testing.assert_close(ipo, peer(log_ratios, "ipo", beta=beta), rtol=2e-5, atol=1e-4)
        torch.testing.assert_close(
            R.preference_loss(z, base="hinge", **none), peer(log_ratios, "hinge", beta=beta), **close
        )


def test_without_noise_it_is_the_base_loss():
    for base in R.BASES:
        clean = R.preference_loss(GRID, base=base, target=0.7, reduction="none")
        for loss in (R.robust_dpo_loss, R.conservative_dpo_loss):
            assert torch.equal(loss(GRID, noise_rate=0.0, base=base, target=0.7, reduction="none"), clean)
    assert torch.equal(R.dpo_loss(GRID, reduction="none"), R.preference_loss(GRID, reduction="none"))


@few
@given(margins, rates, bases, targets)
def test_unbiased(values, rate, base, target):
    """The expectation over the flip is the clean loss: eq-robust_dpo-unbiased."""
    z = torch.tensor(values, dtype=torch.float64)
    options = dict(noise_rate=rate, base=base, target=target, reduction="none")
    mean = (1 - rate) * R.robust_dpo_loss(z, **options) + rate * R.robust_dpo_loss(-z, **options)
    clean = R.preference_loss(z, base=base, target=target, reduction="none")
    size = 1 + z.square().max().item()
    torch.testing.assert_close(mean, clean, rtol=1e-12, atol=1e-12 * size)


@few
@given(margins, rates)
def test_affine_identities(values, rate):
    z = torch.tensor(values, dtype=torch.float64)
    clean = R.dpo_loss(z, reduction="none")
    robust = R.robust_dpo_loss(z, noise_rate=rate, reduction="none")
    smooth = R.conservative_dpo_loss(z, noise_rate=rate, reduction="none")
    torch.testing.assert_close(robust - clean, -rate / (1 - 2 * rate) * z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(smooth - clean, rate * z, rtol=1e-12, atol=1e-12)


def test_worked_example():
    """z = 1 at a quarter of flips."""
    z = torch.ones(1, dtype=torch.float64)
    losses = [
        R.dpo_loss(z),
        R.conservative_dpo_loss(z, noise_rate=0.25),
        R.robust_dpo_loss(z, noise_rate=0.25),
    ]
    assert [x.item() for x in losses] == pytest.approx([0.313262, 0.563262, -0.186738], abs=6e-7)
    weights = [R.gradient_weight(z, kind=kind, noise_rate=0.25).item() for kind in R.KINDS]
    assert weights == pytest.approx([0.268941, 0.018941, 0.768941], abs=6e-7)


@few
@given(margins, rates, kinds)
def test_gradient_weight_is_autograds(values, rate, kind):
    z = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    loss = {
        "dpo": lambda: R.dpo_loss(z, reduction="sum"),
        "cdpo": lambda: R.conservative_dpo_loss(z, noise_rate=rate, reduction="sum"),
        "rdpo": lambda: R.robust_dpo_loss(z, noise_rate=rate, reduction="sum"),
    }[kind]()
    (gradient,) = torch.autograd.grad(loss, z)
    weight = R.gradient_weight(z.detach(), kind=kind, noise_rate=rate)
    torch.testing.assert_close(weight, -gradient, rtol=1e-12, atol=1e-13)
    if kind == "rdpo":  # the mixture of the two sides of the pair
        s = torch.sigmoid(z.detach())
        torch.testing.assert_close(weight, ((1 - rate) * (1 - s) + rate * s) / (1 - 2 * rate), rtol=1e-10, atol=1e-12)


def test_curvature_is_dpos():
    z = GRID[800:1200].clone().requires_grad_()
    curvatures = []
    for loss in (R.dpo_loss(z, reduction="sum"), R.robust_dpo_loss(z, noise_rate=0.3, reduction="sum")):
        (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
        curvatures.append(torch.autograd.grad(gradient.sum(), z)[0])
    torch.testing.assert_close(*curvatures, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(curvatures[0], torch.sigmoid(z) * torch.sigmoid(-z), rtol=1e-10, atol=1e-15)


@few
@given(st.floats(-20, 20), rates, bases, targets)
def test_flip_variance_by_enumeration(z, rate, base, target):
    kept, swapped = slow_robust(z, rate, base, target), slow_robust(-z, rate, base, target)
    mean = (1 - rate) * kept + rate * swapped
    slow = (1 - rate) * (kept - mean) ** 2 + rate * (swapped - mean) ** 2
    found = R.flip_variance(torch.tensor([z], dtype=torch.float64), noise_rate=rate, base=base, target=target)
    assert found.item() == pytest.approx(slow, rel=1e-7, abs=1e-7)


def test_robust_ipo_is_ipo_with_a_larger_target():
    for rate, c in ((0.1, 1.0), (0.3, 0.5), (0.4, 2.0)):
        found = R.robust_dpo_loss(GRID, noise_rate=rate, base="squared", target=c, reduction="none")
        shift = c**2 * (1 - 1 / (1 - 2 * rate) ** 2)
        expected = R.preference_loss(GRID, base="squared", target=c / (1 - 2 * rate), reduction="none") + shift
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)


@few
@given(st.floats(-8, 8), rates, targets)
def test_for_small_margins_a_correction_changes_beta(z, rate, c):
    """prop-robust_dpo-beta: DPO at (1 - 2 rate) beta and at beta / (1 - 2 rate); exact for the squared loss."""
    k, log2 = 1 - 2 * rate, math.log(2)
    one = torch.tensor([z], dtype=torch.float64)
    robust, smooth = (f(one, noise_rate=rate).item() for f in (R.robust_dpo_loss, R.conservative_dpo_loss))
    assert abs(k**2 * (robust - log2) - (R.dpo_loss(k * one).item() - log2)) <= k**2 * z**4 / 96 + 1e-12
    assert abs(smooth - log2 - k**2 * (R.dpo_loss(one / k).item() - log2)) <= z**4 / (96 * k**2) + 1e-12
    squared = dict(base="squared", target=c)
    at = lambda t: (
        k**2 * R.robust_dpo_loss(t, noise_rate=rate, **squared) - R.preference_loss(k * t, **squared)
    ).item()
    assert at(one) == pytest.approx(at(0 * one), abs=1e-9)
    at = lambda t: (
        R.conservative_dpo_loss(t, noise_rate=rate, **squared) - R.preference_loss(t, base="squared", target=k * c)
    ).item()
    assert at(one) == pytest.approx(at(0 * one), abs=1e-9)


def test_robust_hinge_is_not_convex():
    """Its slopes, from left to right: not in order."""
    rate = 0.2
    z = torch.tensor([-5.0, 0.3, 5.0], dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(R.robust_dpo_loss(z, noise_rate=rate, base="hinge", reduction="sum"), z)
    expected = [-(1 - rate) / (1 - 2 * rate), -1 / (1 - 2 * rate), -rate / (1 - 2 * rate)]
    assert slopes.tolist() == pytest.approx(expected, abs=1e-12)


@few
@given(margins, rates)
def test_general_correction(values, rate):
    z = torch.tensor(values, dtype=torch.float64)
    for loss_fn, base in ((lambda t: F.softplus(-t), "logistic"), (lambda t: (t - 1).square(), "squared")):
        found = R.robust_preference_loss(loss_fn, z, noise_rate=rate, reduction="none")
        expected = R.robust_dpo_loss(z, noise_rate=rate, base=base, reduction="none")
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-7)
    z = z / 10
    robust = lambda t: R.robust_preference_loss(lambda u: torch.exp(-u), t, noise_rate=rate, reduction="none")
    torch.testing.assert_close((1 - rate) * robust(z) + rate * robust(-z), torch.exp(-z), rtol=1e-9, atol=1e-10)


# --- log-probabilities and labels -------------------------------------------------------------------------------------


@few
@given(seeds, st.floats(0.01, 10))
def test_margin(seed, beta):
    generator = torch.Generator().manual_seed(seed)
    logps = list(-30 * torch.rand(4, 6, generator=generator, dtype=torch.float64))
    found = R.preference_margin(*logps, beta=beta)
    a, b, c, d = (x.tolist() for x in logps)
    slow = [beta * (math.log(math.exp(a[i]) / math.exp(c[i])) - b[i] + d[i]) for i in range(6)]
    assert found.tolist() == pytest.approx(slow, rel=1e-9, abs=1e-9)
    swapped = R.preference_margin(*(logps[i] for i in (1, 0, 3, 2)), beta=beta)
    torch.testing.assert_close(swapped, -found)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "names", [("policy_chosen",), ("policy_rejected",), ("ref_chosen",), ("policy_rejected", "ref_rejected")]
)
def test_margin_names_what_is_not_finite(names, value):
    """Also where two infinities meet."""
    logps = {f"{who}_{what}": torch.zeros(4) for who in ("policy", "ref") for what in ("chosen", "rejected")}
    for name in names:
        logps[name][2] = value
    with pytest.raises(ValueError, match=f"{names[0]}_logps must be finite"):
        R.preference_margin(**{f"{name}_logps": x for name, x in logps.items()}, beta=0.1)


def test_flips():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.arange(30_000).reshape(10_000, 3), -torch.arange(30_000).reshape(10_000, 3) - 1
    new_chosen, new_rejected, flipped = R.flip_labels(chosen, rejected, 0.3, generator)
    assert flipped.dtype == torch.bool and flipped.shape == (10_000,)
    assert abs(flipped.float().mean().item() - 0.3) < 4.5 * math.sqrt(0.21 / 10_000)
    assert torch.equal(new_chosen[flipped], rejected[flipped]) and torch.equal(new_rejected[flipped], chosen[flipped])
    assert torch.equal(new_chosen[~flipped], chosen[~flipped])
    assert torch.equal(new_rejected[~flipped], rejected[~flipped])
    assert not R.flip_labels(chosen, rejected, 0.0)[2].any()
    again = R.flip_labels(chosen, rejected, 0.3, torch.Generator().manual_seed(0))[2]
    assert torch.equal(again, flipped)
    halves = flipped[: len(flipped) // 2 * 2].reshape(2, -1).float()  # flips of different pairs are independent
    assert abs(torch.corrcoef(halves)[0, 1].item()) < 0.07


# --- population optima ------------------------------------------------------------------------------------------------


def test_population_example():
    """The chapter's numbers at p = 0.9, rate 0.2; and p = 0.8, rate 0.1."""
    found = [R.population_margin(0.9, kind=kind, noise_rate=0.2).item() for kind in R.KINDS]
    assert found == pytest.approx([1.0459686, 0.5927680, 2.1972246], abs=6e-8)
    found = [R.effective_probability(0.8, kind=kind, noise_rate=0.1).item() for kind in R.KINDS]
    assert found == pytest.approx([0.74, 0.692, 0.8], abs=1e-12)
    cap = R.population_margin(1.0, kind="dpo", noise_rate=0.4).item()
    assert cap == pytest.approx(math.log(0.6 / 0.4)) == pytest.approx(0.405, abs=6e-4)


@few
@given(st.floats(0.02, 0.98), rates, st.one_of(st.none(), rates), kinds)
def test_population_margin_minimizes_the_enumerated_loss(p, rate, assumed, kind):
    used = rate if assumed is None else assumed
    q = R.effective_probability(p, kind=kind, noise_rate=rate, assumed_rate=assumed).item()
    for z in (-2.0, 0.3, 1.7):  # the expected loss is the clean loss at q
        for base in R.BASES:
            mix = q * slow_loss(z, base, 1.0) + (1 - q) * slow_loss(-z, base, 1.0)
            assert expected_loss(kind, z, p, rate, used, base) == pytest.approx(mix, rel=1e-8, abs=1e-9)
    if 1e-3 < q < 1 - 1e-3:
        slope = lambda z: expected_loss(kind, z + 1e-5, p, rate, used) - expected_loss(kind, z - 1e-5, p, rate, used)
        found = R.population_margin(p, kind=kind, noise_rate=rate, assumed_rate=assumed).item()
        assert found == pytest.approx(brentq(slope, -12, 12, xtol=1e-9), rel=1e-3, abs=2e-3)
        assert found == pytest.approx(math.log(q / (1 - q)), rel=1e-7, abs=1e-7)
    if not 0 <= q <= 1:  # without a lower bound, even in expectation
        ends = [expected_loss(kind, z, p, rate, used) for z in (-1e9, 1e9)]
        assert min(ends) < (-1 if min(q, 1 - q) < -1e-6 else 1)
        if min(q, 1 - q) < -1e-12:
            with pytest.raises(ValueError, match="p must leave a finite optimum"):
                R.population_margin(p, kind=kind, noise_rate=rate, assumed_rate=assumed)


@few
@given(st.floats(0.02, 0.98), rates, kinds, targets)
def test_population_margins_of_other_bases(p, rate, kind, target):
    options = dict(kind=kind, noise_rate=rate, target=target)
    squared = R.population_margin(p, base="squared", **options).item()
    shrink = {"dpo": 1 - 2 * rate, "cdpo": (1 - 2 * rate) ** 2, "rdpo": 1.0}[kind]
    assert squared == pytest.approx(target * shrink * (2 * p - 1), abs=1e-9)
    hinge = R.population_margin(p, base="hinge", **options).item()
    if abs(p - 0.5) > 1e-6:  # the order survives, and magnitude was never there
        assert hinge == math.copysign(target, p - 0.5)
    for base, best in (("squared", squared), ("hinge", hinge)):
        least = expected_loss(kind, best, p, rate, rate, base, target)
        for z in np.linspace(-8, 8, 33):
            assert expected_loss(kind, z, p, rate, rate, base, target) >= least - 1e-9


def test_population_margin_at_the_edges():
    assert R.population_margin(1e-15, kind="rdpo", noise_rate=0.3).item() == pytest.approx(math.log(1e-15), rel=1e-9)
    half = R.population_margin(torch.tensor([0.25], dtype=torch.bfloat16), kind="rdpo", noise_rate=0.4)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(-math.log(3), rel=1e-5)
    p = torch.tensor([0.1, 0.5, 0.9])
    assert R.population_margin(p, kind="cdpo", noise_rate=0.2).dtype == torch.float32
    assert R.population_margin(0.5, kind="cdpo", noise_rate=0.2, base="hinge").item() == 0
    for kind in ("dpo", "rdpo"):
        with pytest.raises(ValueError, match="finite optimum"):
            R.population_margin(1.0, kind=kind, noise_rate=0.0)
    with pytest.raises(ValueError, match="finite optimum"):  # the observed probability 0.26 is below the assumed rate
        R.population_margin(0.1, kind="rdpo", noise_rate=0.2, assumed_rate=0.3)
    with pytest.raises(ValueError, match="finite optimum"):
        R.population_margin(0.1, kind="rdpo", noise_rate=0.2, assumed_rate=0.3, base="hinge")
    q = R.effective_probability(0.1, kind="rdpo", noise_rate=0.2, assumed_rate=0.3).item()
    assert q == pytest.approx((0.26 - 0.3) / 0.4) and q < 0
    squared = R.population_margin(0.1, kind="rdpo", noise_rate=0.2, assumed_rate=0.3, base="squared").item()
    assert squared == pytest.approx(2 * q - 1)


# --- log-linear policies ----------------------------------------------------------------------------------------------


def sample(n, d, rate, size, generator, sphere=False):
    """Differences in the order of the observed labels, and the true coefficients."""
    if sphere:  # of two features of length 1
        pair = F.normalize(torch.randn(2, n, d, generator=generator, dtype=torch.float64), dim=2)
        x = pair[0] - pair[1]
    else:
        x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    w = size * F.normalize(torch.randn(d, generator=generator, dtype=torch.float64), dim=0)
    first = torch.rand(n, generator=generator, dtype=torch.float64) < torch.sigmoid(x @ w)
    flips = torch.rand(n, generator=generator, dtype=torch.float64) < rate
    return torch.where((first ^ flips)[:, None], x, -x), w


def error(model, x, w, ridge=0.0):
    """The distance in the norm of the theorem."""
    difference = model.coef_ - w
    return ((x @ difference).square().mean() + ridge * difference.square().sum()).sqrt().item()


def objective(w, x, kind, rate, beta, ridge):
    z = beta * x @ w
    slope = {"dpo": 0, "cdpo": rate, "rdpo": -rate / (1 - 2 * rate)}[kind]
    return np.logaddexp(0, -z).mean() + slope * z.mean() + ridge / 2 * w @ w


@settings(deadline=None, max_examples=15)
@given(seeds, kinds, st.floats(0, 0.3), st.sampled_from([0.0, 0.01, 1.0]), st.floats(0.3, 2))
def test_estimator_is_the_minimizer(seed, kind, rate, ridge, beta):
    x, _ = sample(300, 3, rate, 1.0, torch.Generator().manual_seed(seed))
    model = R.LogLinearPreference(beta, rate, kind, ridge=ridge).fit(x)
    if not model.converged_:
        return
    arguments = (x.numpy(), kind, rate, beta, ridge)
    other = minimize(objective, np.zeros(3), args=arguments, method="BFGS", options=dict(gtol=1e-8))
    assert objective(model.coef_.numpy(), *arguments) <= other.fun + 1e-10
    assert model.coef_.tolist() == pytest.approx(other.x.tolist(), rel=1e-3, abs=1e-3)
    assert model.ridge_ == ridge


@settings(deadline=None, max_examples=12)
@given(seeds, kinds, st.floats(0, 0.4), st.sampled_from([0.0, 0.1]), st.floats(0.1, 1.5))
def test_radius_gives_the_constrained_minimizer(seed, kind, rate, ridge, radius):
    x, _ = sample(200, 3, rate, 1.5, torch.Generator().manual_seed(seed))
    x = x * torch.tensor([1.0, 2.0, 0.3], dtype=torch.float64)  # so that a projection of the free one is another point
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = R.LogLinearPreference(1.0, rate, kind, radius=radius, ridge=ridge).fit(x)
    assert model.converged_ and model.coef_.norm() <= radius * (1 + 1e-9)
    arguments = (x.numpy(), kind, rate, 1.0, ridge)
    inside = dict(type="ineq", fun=lambda w: radius**2 - w @ w)
    other = minimize(objective, np.full(3, 1e-3), args=arguments, constraints=[inside], method="SLSQP", tol=1e-12)
    assert objective(model.coef_.numpy(), *arguments) <= other.fun + 1e-7
    assert model.coef_.tolist() == pytest.approx(other.x.tolist(), abs=2e-3)
    if model.ridge_ > ridge:
        assert model.coef_.norm().item() == pytest.approx(radius, rel=1e-6)


def test_estimation_theorem_as_property():
    """The bound holds in all of the draws, though it may fail in a tenth; and it is not tight."""
    generator = torch.Generator().manual_seed(0)
    d, n, ridge = 5, 2000, 1e-3
    gamma = R.curvature_floor(2.0)
    ratios = []
    for draw in range(60):
        rate = (0.0, 0.2, 0.4)[draw % 3]
        x, w = sample(n, d, rate, 0.8, generator, sphere=True)
        model = R.LogLinearPreference(1.0, rate, "rdpo", radius=1.0).fit(x)
        bound = R.estimation_bound(d, n, noise_rate=rate, beta=1.0, gamma=gamma, radius=1.0, ridge=ridge, delta=0.1)
        ratios.append(error(model, x, w, ridge) / bound)
    assert sum(ratio > 1 for ratio in ratios) <= 6 and max(ratios) < 0.5


def test_estimation_bound_by_hand():
    log = math.log(10)
    slow = math.sqrt((5 + 2 * math.sqrt(5 * log) + 2 * log) / 2000) / (0.1 * 2 * 0.6) + 2 * 3 * math.sqrt(0.01)
    found = R.estimation_bound(5, 2000, noise_rate=0.2, beta=2, gamma=0.1, radius=3, ridge=0.01, delta=0.1)
    assert found == pytest.approx(slow)
    # As many pairs more as 1 / (1 - 2 rate)²: the same bound.
    options = dict(beta=1, gamma=0.1, radius=1, ridge=0.0, delta=0.1)
    clean, noisy = (R.estimation_bound(5, n, noise_rate=e, **options) for n, e in ((1000, 0.0), (6250, 0.3)))
    assert noisy == pytest.approx(clean, rel=1e-12)
    for m in (0.0, 1.0, 3.0, 30.0):
        assert R.curvature_floor(m) == pytest.approx(1 / (2 + math.exp(m) + math.exp(-m)))
    assert R.curvature_floor(1e4) == 0
    assert R.suboptimality_bound(0.5, max_reward=3.0, coverage=2.0) == pytest.approx(3 * math.sqrt(2) / 4)


def test_error_scales_with_rate_and_sample():
    generator = torch.Generator().manual_seed(1)
    for rate in (0.0, 0.2, 0.4):
        for n in (2000, 8000):
            draws = [sample(n, 5, rate, 1.0, generator, sphere=True) for _ in range(16)]
            errors = [error(R.LogLinearPreference(1.0, rate, "rdpo").fit(x), x, w) for x, w in draws]
            assert 1.5 < np.mean(errors) * (1 - 2 * rate) * math.sqrt(n / 5) < 3.1


def test_bias_floor():
    generator = torch.Generator().manual_seed(2)
    means = {}
    for n in (2000, 8000):
        draws = [sample(n, 8, 0.2, 1.0, generator) for _ in range(16)]
        for kind in R.KINDS:
            means[kind, n] = np.mean([error(R.LogLinearPreference(1.0, 0.2, kind).fit(x), x, w) for x, w in draws])
    assert [means["dpo", n] for n in (2000, 8000)] == pytest.approx([0.477, 0.467], rel=0.07)
    assert [means["cdpo", n] for n in (2000, 8000)] == pytest.approx([0.694, 0.692], rel=0.05)
    assert 0.3 < means["rdpo", 8000] / means["rdpo", 2000] < 0.7


def test_unbounded_without_ridge_and_cured_by_a_radius():
    """The loss has a minimum exactly where no direction gains more by its linear term than the logistic loss costs."""
    rate, found = 0.4, []
    for seed in range(12):
        x, _ = sample(500, 8, rate, 1.0, torch.Generator().manual_seed(seed))
        n, d = x.shape
        # min over |v| <= 1 of mean (x v)_- less e mean x v, as a linear program in v and in the parts s >= -x v, s >= 0
        cost = np.concatenate([-rate / (1 - 2 * rate) * x.mean(0).numpy(), np.full(n, 1 / n)])
        program = linprog(
            cost,
            A_ub=np.hstack([-x.numpy(), -np.eye(n)]),
            b_ub=np.zeros(n),
            bounds=[(-1, 1)] * d + [(0, None)] * n,
        )
        unbounded = program.fun < -1e-9
        found.append(unbounded)
        model = R.LogLinearPreference(1.0, rate, "rdpo")
        if unbounded:
            with pytest.warns(RuntimeWarning, match="unbounded below"):
                model.fit(x)
            cured = R.LogLinearPreference(1.0, rate, "rdpo", radius=3.0).fit(x)
            assert cured.converged_ and cured.coef_.norm().item() == pytest.approx(3.0, rel=1e-6)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model.fit(x)
        assert model.converged_ == (not unbounded)
    assert 0 < sum(found) < len(found)


@pytest.mark.parametrize("seed", [29, 32, 43])
def test_heavy_tails_need_the_line_search(seed):
    """Full Newton steps diverge on these pairs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    x = x * torch.exp(3 * torch.randn(12, 1, generator=generator, dtype=torch.float64))
    model = R.LogLinearPreference(1.0, 0.0, "dpo").fit(x)
    assert model.converged_ and model.coef_.norm() < 100
    slope = (R.gradient_weight(x @ model.coef_, kind="dpo")[:, None] * x).mean(0)
    assert slope.norm() < 1e-6 * x.norm()


def test_separable_pairs_have_no_minimum():
    """The gradient of DPO vanishes far out, and that is no convergence; cDPO has a minimum."""
    x = torch.tensor([[1.0, 0.2], [0.5, -1.0], [2.0, 0.1]])
    for kind in ("dpo", "rdpo"):
        with pytest.warns(RuntimeWarning, match="unbounded below"):
            assert not R.LogLinearPreference(1.0, 0.1, kind).fit(x).converged_
        assert R.LogLinearPreference(1.0, 0.1, kind, radius=5.0).fit(x).coef_.norm().item() == pytest.approx(5)
    assert R.LogLinearPreference(1.0, 0.1, "cdpo").fit(x).converged_
    twice = torch.tensor([[1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])  # of many minimizers, the shortest
    assert R.LogLinearPreference(1.0, 0.0, "dpo").fit(twice).coef_.tolist() == pytest.approx([math.log(2) / 2] * 2)
    assert R.LogLinearPreference(1.0, 0.0, "dpo").fit(torch.zeros(3, 2)).coef_.tolist() == [0, 0]


@pytest.mark.parametrize("kind", R.KINDS)
def test_a_direction_without_a_minimum_is_found_though_the_rest_has_one(kind):
    """The first pair separates along (1, 1), where the gradient and the curvature fade; the other two balance."""
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]])
    for turn in (torch.eye(2), torch.tensor([[1.0, 0.3], [0.1, 1e-7]])):
        model = R.LogLinearPreference(1.0, 0.1, kind)
        if kind == "cdpo":
            margins = model.fit(x @ turn).decision_function(x @ turn)
            assert model.converged_ and margins.tolist() == pytest.approx([math.log(9), 0, 0], abs=1e-6)
        else:
            with pytest.warns(RuntimeWarning, match="unbounded below"):
                assert not model.fit(x @ turn).converged_


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1e9])
def test_features_of_any_size(scale):
    """Margins do not depend on the units of a feature."""
    x, _ = sample(400, 3, 0.1, 1.0, torch.Generator().manual_seed(4))
    units = torch.tensor([1.0, scale, 1.0], dtype=torch.float64)
    for kind in R.KINDS:
        ours, other = (R.LogLinearPreference(1.0, 0.1, kind).fit(t) for t in (x, x * units))
        assert ours.converged_ and other.converged_
        torch.testing.assert_close(other.coef_ * units, ours.coef_, rtol=1e-5, atol=1e-6)


def test_estimator_predicts():
    x, w = sample(4000, 3, 0.0, 3.0, torch.Generator().manual_seed(0))
    model = R.LogLinearPreference(0.5, 0.0, "dpo").fit(x.numpy())
    torch.testing.assert_close(model.decision_function(x), 0.5 * x @ model.coef_)
    torch.testing.assert_close(model.predict_proba(x), torch.sigmoid(0.5 * x @ model.coef_))
    assert torch.equal(model.predict(x), x @ model.coef_ > 0) and model.predict(x).double().mean() > 0.8
    torch.testing.assert_close(0.5 * model.coef_, w, rtol=0.1, atol=0.2)  # beta w is what data determine
    again = copy.deepcopy(model).fit(x.float())
    torch.testing.assert_close(again.coef_, model.coef_, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="fit"):
        R.LogLinearPreference(0.5, 0.0, "dpo").predict(x)
    with pytest.raises(ValueError, match="3 columns"):
        model.predict(x[:, :2])
    with pytest.raises(ValueError, match="x must be finite"):
        model.fit(torch.tensor([[math.nan]]))


@few
@given(seeds)
def test_suboptimality_theorem(seed):
    """Coverage is taken along the segment between the two policies, where the proof needs it."""
    generator = torch.Generator().manual_seed(seed)
    prompts, actions, d = 4, 5, 3
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    phi, theta, base = normal(prompts, actions, d), normal(d), 0.3 * normal(d)
    other = theta + normal(d) * 10 ** (2 * torch.rand((), generator=generator, dtype=torch.float64) - 2)
    log_policy = lambda t: torch.log_softmax(phi @ t, 1)
    reward = torch.rand(prompts, actions, generator=generator, dtype=torch.float64) * 2

    def covariance(t):
        p = log_policy(t).exp()
        centered = phi - (p[:, :, None] * phi).sum(1, keepdim=True)
        return torch.einsum("sa,sai,saj->ij", p, centered, centered) / prompts

    sigma = covariance(base)
    root = torch.linalg.inv(torch.linalg.cholesky(sigma))
    steps = torch.linspace(0, 1, 41, dtype=torch.float64)
    coverage = max(
        torch.linalg.eigvalsh(root @ covariance(theta + t * (other - theta)) @ root.T)[-1].item() for t in steps
    )
    difference = other - theta
    distance = (difference @ sigma @ difference).sqrt().item()
    kl = R.reward_and_kl(log_policy(theta), log_policy(other), reward)[1].mean().item()
    assert kl <= 1.02 * coverage / 2 * distance**2 + 1e-12
    lost = (
        (R.reward_and_kl(log_policy(theta), log_policy(base), reward)[0]).mean()
        - (R.reward_and_kl(log_policy(other), log_policy(base), reward)[0]).mean()
    )
    assert lost <= 1.02 * R.suboptimality_bound(distance, max_reward=2.0, coverage=max(coverage, 1.0)) + 1e-12


# --- the frontier -----------------------------------------------------------------------------------------------------


@few
@given(seeds, st.floats(0.05, 5))
def test_optimal_policy_is_optimal(seed, beta):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(3, 6, generator=generator, dtype=torch.float64)
    ref, reward = torch.log_softmax(2 * normal(), 1), normal()
    best = R.optimal_policy(ref, reward, beta=beta)
    best_reward, best_kl = R.reward_and_kl(best, ref, reward)
    value = best_reward - beta * best_kl
    torch.testing.assert_close(value, beta * torch.logsumexp(ref + reward / beta, 1), rtol=1e-9, atol=1e-9)
    for _ in range(10):
        policy = torch.log_softmax(3 * normal(), 1)
        mean, kl = R.reward_and_kl(policy, ref, reward)
        assert (mean - beta * kl <= value + 1e-9).all() and (kl >= -1e-12).all()
        for i in range(3):
            slow = sum(math.exp(policy[i, a]) * reward[i, a].item() for a in range(6))
            assert mean[i].item() == pytest.approx(slow)
    # The implicit reward of the optimum gives back the differences of rewards: eq-robust_dpo-implicit.
    flat = lambda t, k: t[:, k].contiguous()
    margin = R.preference_margin(flat(best, 0), flat(best, 1), flat(ref, 0), flat(ref, 1), beta=beta)
    torch.testing.assert_close(margin, reward[:, 0] - reward[:, 1], rtol=1e-8, atol=1e-8)


def test_frontier_is_monotone_and_ends_at_the_best_response():
    ref, reward = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.0, 1.0, 3.0])
    points = [R.reward_and_kl(R.optimal_policy(ref, reward, beta=b), ref, reward) for b in (100, 10, 1, 0.1, 0.01)]
    rewards, kls = ([p[i].item() for p in points] for i in (0, 1))
    assert rewards == sorted(rewards) and kls == sorted(kls)
    assert rewards[-1] == pytest.approx(3.0) and kls[-1] == pytest.approx(math.log(10), rel=1e-5)
    certain = torch.tensor([1.0, 0.0, 0.0]).log()  # a policy that never goes there
    mean, kl = R.reward_and_kl(certain, ref, reward)
    assert mean == 0 and kl.item() == pytest.approx(-math.log(0.6), rel=1e-6)


# --- extremes, precision, transforms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("base", R.BASES)
def test_extremes(dtype, base):
    z = torch.tensor([-1e4, -0.0, 1e4], dtype=dtype, requires_grad=True)
    for loss in (R.robust_dpo_loss, R.conservative_dpo_loss):
        losses = loss(z, noise_rate=0.3, base=base, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), z)
        assert losses.isfinite().all() and gradient.isfinite().all() and losses.dtype == dtype
    if base == "logistic":
        (gradient,) = torch.autograd.grad(R.robust_dpo_loss(z, noise_rate=0.3, reduction="sum"), z)
        assert gradient.tolist() == pytest.approx([-0.7 / 0.4, -0.5 - 0.75, -0.75], rel=1e-5)
        # The formula of two log-sigmoids has lost its digits here, this one has not.
        exact = [-0.75 * 1e4 * s + max(-1e4 * s, 0) for s in (-1, 1)]
        found = R.robust_dpo_loss(z.detach()[[0, 2]], noise_rate=0.3, reduction="none")
        assert found.tolist() == pytest.approx(exact, rel=1e-6)


def test_half_precision_and_autocast():
    z = torch.linspace(-3, 3, 7, dtype=torch.bfloat16)
    loss = R.robust_dpo_loss(z, noise_rate=0.1, reduction="none")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, R.robust_dpo_loss(z.float(), noise_rate=0.1, reduction="none"))
    weight = torch.randn(8, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = F.linear(torch.ones(5, 8), weight.T)
        z = R.preference_margin(*(logps[:, k].contiguous() for k in range(4)), beta=0.5)
        R.robust_dpo_loss(z, noise_rate=0.1).backward()
    assert z.dtype == torch.float32 and weight.grad.isfinite().all() and weight.grad.abs().sum() > 0


def test_gradcheck_and_transforms():
    z = torch.tensor([-2.0, 0.4, 3.0], dtype=torch.float64, requires_grad=True)
    for base in R.BASES:
        for function in (R.robust_dpo_loss, R.conservative_dpo_loss):
            loss = lambda t, f=function, b=base: f(t, noise_rate=0.2, base=b)
            assert torch.autograd.gradcheck(loss, z)
    loss = lambda t: R.robust_dpo_loss(t, noise_rate=0.2)
    per_sample = torch.func.vmap(torch.func.grad(loss))(z.detach())
    torch.testing.assert_close(per_sample, -R.gradient_weight(z.detach(), kind="rdpo", noise_rate=0.2))
    batch = torch.stack([z.detach(), z.detach() / 2])
    torch.testing.assert_close(torch.func.vmap(loss)(batch)[1], loss(batch[1]))
    compiled = torch.compile(
        lambda *t: R.robust_dpo_loss(R.preference_margin(*t, beta=0.3), noise_rate=0.2), backend="aot_eager"
    )
    logps = [-torch.rand(6) for _ in range(4)]
    expected = R.robust_dpo_loss(R.preference_margin(*logps, beta=0.3), noise_rate=0.2)
    torch.testing.assert_close(compiled(*logps), expected)
    strided = torch.randn(10, dtype=torch.float64)[::2]
    torch.testing.assert_close(loss(strided), loss(strided.contiguous()))


# --- bad input --------------------------------------------------------------------------------------------------------

Z = torch.ones(3)


@pytest.mark.parametrize("rate", [0.5, -0.1, 0.7, math.nan, "0.1", True])
def test_bad_rates(rate):
    calls = (
        lambda: R.robust_dpo_loss(Z, noise_rate=rate),
        lambda: R.conservative_dpo_loss(Z, noise_rate=rate),
        lambda: R.robust_preference_loss(torch.exp, Z, noise_rate=rate),
        lambda: R.gradient_weight(Z, kind="dpo", noise_rate=rate),
        lambda: R.flip_variance(Z, noise_rate=rate),
        lambda: R.population_margin(0.5, kind="dpo", noise_rate=rate),
        lambda: R.flip_labels(Z, Z, rate),
        lambda: R.LogLinearPreference(1.0, rate, "dpo"),
        lambda: R.estimation_bound(2, 3, noise_rate=rate, beta=1, gamma=0.1, radius=1, ridge=0, delta=0.1),
    )
    for call in calls:
        with pytest.raises((TypeError, ValueError), match="noise_rate"):
            call()
    with pytest.raises((TypeError, ValueError), match="assumed_rate"):
        R.population_margin(0.5, kind="rdpo", noise_rate=0.1, assumed_rate=rate)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: R.preference_margin(Z, Z, Z, torch.ones(2), beta=1.0), "ref_rejected_logps"),
        (lambda: R.preference_margin(Z, torch.ones(1), Z, Z, beta=1.0), "policy_rejected_logps"),
        (lambda: R.preference_margin(Z, Z, Z.double(), Z, beta=1.0), "ref_chosen_logps"),
        (lambda: R.preference_margin(Z[:, None], Z, Z, Z, beta=1.0), "policy_chosen_logps"),
        (lambda: R.preference_margin(Z, Z, Z, Z - math.inf, beta=1.0), "ref_rejected_logps"),
        (lambda: R.preference_margin(Z, Z, Z, Z, beta=0.0), "beta"),
        (lambda: R.preference_margin(Z, Z, Z, Z, beta=-1.0), "beta"),
        (lambda: R.dpo_loss([1.0]), "margin"),
        (lambda: R.dpo_loss(torch.ones(3, dtype=torch.int64)), "margin"),
        (lambda: R.dpo_loss(torch.ones(0)), "margin"),
        (lambda: R.dpo_loss(torch.tensor([math.nan])), "margin"),
        (lambda: R.dpo_loss(Z, reduction="average"), "reduction"),
        (lambda: R.robust_dpo_loss(Z, noise_rate=0.1, base="ipo"), "base"),
        (lambda: R.robust_dpo_loss(Z, noise_rate=0.1, base="hinge", target=0.0), "target"),
        (lambda: R.robust_preference_loss(torch.sum, Z, noise_rate=0.1), "loss_fn"),
        (lambda: R.robust_preference_loss(None, Z, noise_rate=0.1), "loss_fn"),
        (lambda: R.robust_preference_loss(lambda t: t.tolist(), Z, noise_rate=0.1), "loss_fn"),
        (lambda: R.gradient_weight(Z, kind="ipo", noise_rate=0.1), "kind"),
        (lambda: R.population_margin(1.5, kind="dpo", noise_rate=0.1), "p must"),
        (lambda: R.population_margin(torch.tensor([-0.1]), kind="dpo", noise_rate=0.1), "p must"),
        (lambda: R.population_margin(0.5, kind="dpo", noise_rate=0.1, base="none"), "base"),
        (lambda: R.effective_probability(0.5, kind="x", noise_rate=0.1), "kind"),
        (lambda: R.flip_labels(Z, torch.ones(2), 0.1), "chosen and rejected"),
        (lambda: R.flip_labels(Z, Z.double(), 0.1), "rejected"),
        (lambda: R.flip_labels([1], Z, 0.1), "chosen"),
        (lambda: R.LogLinearPreference(0.0, 0.1, "dpo"), "beta"),
        (lambda: R.LogLinearPreference(1.0, 0.1, "ipo"), "kind"),
        (lambda: R.LogLinearPreference(1.0, 0.1, "dpo", radius=0.0), "radius"),
        (lambda: R.LogLinearPreference(1.0, 0.1, "dpo", ridge=-1.0), "ridge"),
        (lambda: R.LogLinearPreference(1.0, 0.1, "dpo").fit(Z), "x must"),
        (lambda: R.curvature_floor(-1.0), "max_margin"),
        (lambda: R.estimation_bound(0, 3, noise_rate=0.1, beta=1, gamma=0.1, radius=1, ridge=0, delta=0.1), "d must"),
        (lambda: R.estimation_bound(2, 3, noise_rate=0.1, beta=1, gamma=0.3, radius=1, ridge=0, delta=0.1), "gamma"),
        (lambda: R.estimation_bound(2, 3, noise_rate=0.1, beta=1, gamma=0.1, radius=1, ridge=0, delta=1.0), "delta"),
        (lambda: R.suboptimality_bound(-0.1, max_reward=1.0, coverage=1.0), "error"),
        (lambda: R.suboptimality_bound(0.1, max_reward=1.0, coverage=0.5), "coverage"),
        (lambda: R.optimal_policy(Z, Z, beta=1.0), "ref_logps"),
        (lambda: R.optimal_policy((Z / 3).log(), torch.ones(2), beta=1.0), "reward"),
        (lambda: R.reward_and_kl((Z / 3).log(), Z, Z), "ref_logps"),
        (lambda: R.reward_and_kl((Z / 3).log(), (Z / 3).log(), Z * math.nan), "reward"),
    ],
)  # fmt: skip
def test_bad_input(call, name):
    with pytest.raises((TypeError, ValueError), match=name):
        call()
