"""The theorems of chapter classification/ldr as properties; closed forms, limits, extremes and bad input."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from lossbook import _blocks
from lossbook.classification import ldr as L

# The worked example of the chapter: three scores, the true label first, a wrong label last.
SCORES = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)

seeds = st.integers(0, 2**31)
lams = st.floats(0.05, 50)
margins = st.sampled_from([0.0, 0.1, 1.0, 3.0])
few = settings(deadline=None, max_examples=40)


def draw(seed, rows=4, classes=None, scale=3.0):
    """Scores, labels and the generator that drew them; K up to 12."""
    generator = torch.Generator().manual_seed(seed)
    k = classes or int(torch.randint(2, 13, (), generator=generator))
    logits = scale * torch.randn(rows, k, generator=generator, dtype=torch.float64)
    return logits, torch.randint(k, (rows,), generator=generator), generator


def simplex(generator, rows, k):
    """Random distributions, some of them close to a vertex."""
    spread = torch.randn(rows, k, generator=generator, dtype=torch.float64)
    return torch.softmax(spread * 3 * torch.rand(rows, 1, generator=generator, dtype=torch.float64), 1)


# --- slow oracles: Python floats, class by class ----------------------------------------------------------------------


def slow_v(row, y, margin):
    return [f - row[y] + (margin if k != y else 0.0) for k, f in enumerate(row)]


def slow_ldr(row, y, lam, margin=0.0):
    v = slow_v(row, y, margin)
    if lam == 0:
        return max(v)
    if lam == math.inf:
        return sum(v) / len(v)
    top = max(v)
    return top + lam * math.log(sum(math.exp((x - top) / lam) for x in v) / len(v))


def slow_weights(row, y, lam, margin=0.0):
    v = slow_v(row, y, margin)
    top = max(v)
    w = [math.exp((x - top) / lam) for x in v]
    return [x / sum(w) for x in w]


def slow_kl(p):
    return sum(x * math.log(len(p) * x) for x in p if x > 0)


def slow_fall(v, lambda_0, alpha, steps=20_000):
    """The plain iteration from lambda_0."""
    lam = lambda_0
    for _ in range(steps):
        new = lambda_0 - lambda_0 / (alpha * math.log(len(v))) * slow_kl(slow_weights(v, 0, lam))
        if lam - new < 1e-15:
            break
        lam = new
    return lam


def slow_normal(row, method):
    if method == "softplus_mean":
        row = [math.log1p(math.exp(-abs(x))) + max(x, 0) for x in row]
    mean = sum(abs(x) for x in row) / len(row)
    return [x / max(mean, 1e-12) for x in row]


def objective(logits, target, lam, lambda_0, alpha):
    """What the adversary maximizes over the temperature; ``lam`` has shape (B,) or is a number."""
    inner = L.ldr_kl_loss(logits, target, lam=lam, reduction="none")
    return inner - alpha * math.log(logits.shape[1]) / (2 * lambda_0) * (lam - lambda_0) ** 2


# --- LDR-KL -----------------------------------------------------------------------------------------------------------


def test_worked_example():
    """The digits of the chapter's opening."""
    loss = lambda y, lam: L.ldr_kl_loss(SCORES, torch.tensor([y]), lam=lam).item()
    assert [round(loss(y, 1.0), 4) for y in range(3)] == [-0.6910, 0.3090, 1.3090]
    for y in range(3):
        weights = L.ldr_kl_weights(SCORES, torch.tensor([y]))[0].tolist()
        assert weights == pytest.approx([0.665241, 0.244728, 0.090031], abs=6e-7)
    warm = L.ldr_kl_weights(SCORES, torch.tensor([2]), lam=10.0)[0]
    assert (warm - torch.tensor([0.0, 0.0, 1.0])).tolist() == pytest.approx([0.367, 0.332, -0.699], abs=6e-4)
    for lam, total in ((1.0, 0.9270), (10.0, 0.0999)):
        assert sum(loss(y, lam) for y in range(3)) == pytest.approx(total, abs=6e-5)


@few
@given(seeds, st.one_of(st.sampled_from([0.0, math.inf, 100.0, 101.0, 1e6]), lams), margins)
def test_loss_and_weights_equal_the_slow_loop(seed, lam, margin):
    logits, target, _ = draw(seed)
    pairs = list(zip(logits.tolist(), target.tolist(), strict=True))
    loss = L.ldr_kl_loss(logits, target, lam=lam, margin=margin, reduction="none")
    slow = torch.tensor([slow_ldr(row, y, lam, margin) for row, y in pairs], dtype=torch.float64)
    torch.testing.assert_close(loss, slow, rtol=1e-9, atol=1e-9)
    if 0 < lam < math.inf:
        weights = torch.tensor([slow_weights(row, y, lam, margin) for row, y in pairs], dtype=torch.float64)
        torch.testing.assert_close(
            L.ldr_kl_weights(logits, target, lam=lam, margin=margin), weights, rtol=1e-10, atol=1e-13
        )
        assert (loss >= -lam * math.log(logits.shape[1]) - 1e-9).all()


@pytest.mark.parametrize("lam", [1.0, 2.0, 0.3])
def test_is_a_tempered_cross_entropy(lam):
    logits, target, _ = draw(0, rows=20, classes=7)
    expected = lam * (F.cross_entropy(logits / lam, target) - math.log(7))
    torch.testing.assert_close(L.ldr_kl_loss(logits, target, lam=lam), expected, rtol=0, atol=1e-12)


def test_limits_are_the_limits():
    logits, target, _ = draw(1, rows=30, classes=6)
    options = dict(margin=0.7, reduction="none")
    cold, warm = (L.ldr_kl_loss(logits, target, lam=lam, **options) for lam in (0, math.inf))
    # Crammer-Singer: the best rival with its margin, or 0. Linear: the mean score less the label's, plus c (K - 1) / K.
    label = logits.gather(1, target[:, None]).squeeze(1)
    rival = logits.scatter(1, target[:, None], -math.inf).amax(1)
    torch.testing.assert_close(cold, (rival + 0.7 - label).clamp(min=0))
    torch.testing.assert_close(warm, logits.mean(1) - label + 0.7 * 5 / 6)
    near = L.ldr_kl_loss(logits, target, lam=1e-3, **options)
    assert ((near <= cold) & (near >= cold - 1e-3 * math.log(6) - 1e-12)).all()
    for lam, order in ((1e4, 1.0), (1e5, 0.1), (1e6, 0.01)):  # the error falls like Var / (2 lam)
        error = L.ldr_kl_loss(logits, target, lam=lam, **options) - warm
        shifted = logits.scatter_add(1, target[:, None], torch.full((30, 1), -0.7, dtype=torch.float64))
        expected = shifted.var(1, correction=0) / (2 * lam)
        torch.testing.assert_close(error, expected, rtol=1e-2, atol=2e-11 * lam / 1e4)
        assert error.max() < order


def test_large_temperatures_keep_their_digits_in_float32():
    logits, target, _ = draw(2, rows=50, classes=1000)
    exact = L.ldr_kl_loss(logits, target, lam=math.inf, reduction="none")
    for lam in (1e6, torch.full((50,), 1e6)):
        loss = L.ldr_kl_loss(logits.float(), target, lam=lam, reduction="none")
        assert (loss - exact).abs().max() < 1e-4
    x = logits.float().requires_grad_()
    L.ldr_kl_loss(x, target, lam=1e6, reduction="sum").backward()
    torch.testing.assert_close(x.grad.double(), 1e-3 - F.one_hot(target, 1000).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("lead", [0.0, 1e2, 1e4, 1e5])
@pytest.mark.parametrize("lam", [99.0, 101.0, 1e4])
def test_many_classes_in_float32(lead, lam):
    """Peaked or flat, K = 50000: the error is of the order of the largest difference of scores times a rounding."""
    logits = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, 0] += lead
    logits = logits.float()
    for target in (torch.tensor([0, 0]), torch.tensor([1, 2])):
        exact = L.ldr_kl_loss(logits.double(), target, lam=lam, reduction="none")
        for temperature in (lam, torch.tensor(lam)):
            loss = L.ldr_kl_loss(logits, target, lam=temperature, reduction="none")
            assert (loss - exact).abs().max() < 2e-6 * max(lead, 100)
            x = logits.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(L.ldr_kl_loss(x, target, lam=temperature, reduction="sum"), x)
            expected = L.ldr_kl_weights(logits.double(), target, lam=lam) - F.one_hot(target, 50_000)
            torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)


def test_temperature_by_row_and_scalar_tensor():
    logits, target, _ = draw(3, rows=7, classes=5)
    values = [0.0, 0.05, 1.0, 99.0, 101.0, 1e6, math.inf]
    lam = torch.tensor(values, dtype=torch.float64)
    together = L.ldr_kl_loss(logits, target, lam=lam, margin=0.3, reduction="none")
    weights = L.ldr_kl_weights(logits, target, lam=lam, margin=0.3)
    for i, value in enumerate(values):
        row = logits[i : i + 1], target[i : i + 1]
        assert together[i].item() == pytest.approx(L.ldr_kl_loss(*row, lam=value, margin=0.3).item(), abs=1e-9)
        torch.testing.assert_close(weights[i : i + 1], L.ldr_kl_weights(*row, lam=value, margin=0.3))
        scalar = torch.tensor(value, dtype=torch.float64)
        assert L.ldr_kl_loss(*row, lam=scalar, margin=0.3).item() == pytest.approx(together[i].item(), abs=1e-12)


def test_weights_at_the_limits():
    tie = torch.tensor([[1.0, 1.0, 0.0, -3.0]])
    assert L.ldr_kl_weights(tie, torch.tensor([2]), lam=0)[0].tolist() == [0.5, 0.5, 0, 0]
    # The margin is taken off the label's score: with c = 1 the label 0 is no longer among the maximizers.
    assert L.ldr_kl_weights(tie, torch.tensor([0]), lam=0, margin=1.0)[0].tolist() == [0, 1, 0, 0]
    assert L.ldr_kl_weights(tie, torch.tensor([2]), lam=math.inf)[0].tolist() == [0.25] * 4


@few
@given(seeds, lams, margins)
def test_gibbs_identity(seed, lam, margin):
    """For every p: <p, v> - lam KL(p) = psi - lam KL(p || p*). It makes p* the maximizer, and psi the value."""
    logits, target, generator = draw(seed, rows=5)
    p = simplex(generator, 5, logits.shape[1])
    loss = L.ldr_kl_loss(logits, target, lam=lam, margin=margin, reduction="none")
    best = L.ldr_kl_weights(logits, target, lam=lam, margin=margin)
    for i in range(5):
        v = slow_v(logits[i].tolist(), int(target[i]), margin)
        gain = sum(a * b for a, b in zip(p[i].tolist(), v, strict=True)) - lam * slow_kl(p[i].tolist())
        lost = torch.special.xlogy(p[i], p[i] / best[i]).sum().item()
        assert lost >= -1e-12
        if best[i].min() > 1e-250:
            assert gain == pytest.approx(loss[i].item() - lam * lost, abs=1e-8, rel=1e-9)


def test_dual_by_numerical_maximization():
    logits, target, _ = draw(4, rows=1, classes=5)
    v = torch.tensor(slow_v(logits[0].tolist(), int(target[0]), 0.5), dtype=torch.float64)

    def negative(z):
        z = torch.tensor(z, requires_grad=True)
        p = torch.softmax(z, 0)
        value = -(p @ v - 1.7 * (p * (5 * p).log()).sum())
        value.backward()
        return value.item(), z.grad.numpy()

    found = minimize(negative, np.zeros(5), jac=True, method="BFGS", options=dict(gtol=1e-10))
    assert -found.fun == pytest.approx(L.ldr_kl_loss(logits, target, lam=1.7, margin=0.5).item(), abs=1e-8)
    weights = torch.softmax(torch.tensor(found.x), 0)
    torch.testing.assert_close(weights, L.ldr_kl_weights(logits, target, lam=1.7, margin=0.5)[0], rtol=0, atol=1e-6)


@few
@given(seeds, st.one_of(st.sampled_from([0.0, math.inf, 500.0]), lams), margins)
def test_gradient_is_weights_minus_label(seed, lam, margin):
    logits, target, _ = draw(seed)
    logits.requires_grad_()
    for temperature in (lam, torch.tensor(lam, dtype=torch.float64)):
        loss = L.ldr_kl_loss(logits, target, lam=temperature, margin=margin, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, logits)
        weights = L.ldr_kl_weights(logits.detach(), target, lam=lam, margin=margin)
        expected = weights - F.one_hot(target, logits.shape[1])
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("normalization", L.NORMALIZATIONS)
def test_gradcheck(normalization):
    logits, target, _ = draw(5, rows=3, classes=4)
    logits.requires_grad_()
    lam = torch.tensor([0.4, 1.0, 150.0], dtype=torch.float64, requires_grad=True)
    loss = lambda x, t: L.ldr_kl_loss(x, target, lam=t, margin=0.2, normalization=normalization, reduction="none")
    assert torch.autograd.gradcheck(loss, (logits, lam))
    assert torch.autograd.gradgradcheck(lambda x: L.ldr_kl_loss(x, target, lam=0.7, margin=0.2), (logits,))
    assert torch.autograd.gradcheck(lambda x: L.normalize_scores(x, normalization), (logits,))


@few
@given(seeds, margins)
def test_falls_with_the_temperature_at_the_rate_of_the_divergence(seed, margin):
    logits, target, _ = draw(seed)
    grid = [0.0, *np.logspace(-2, 4, 40), math.inf]
    losses = torch.stack([L.ldr_kl_loss(logits, target, lam=float(x), margin=margin, reduction="none") for x in grid])
    assert (losses.diff(dim=0) <= 1e-9).all()
    lam = torch.full((4,), 1.3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(L.ldr_kl_loss(logits, target, lam=lam, margin=margin, reduction="sum"), lam)
    weights = L.ldr_kl_weights(logits, target, lam=1.3, margin=margin)
    assert slope.tolist() == pytest.approx([-slow_kl(p) for p in weights.tolist()], abs=1e-9)


@few
@given(seeds, st.one_of(st.sampled_from([0.0, math.inf]), lams), margins)
def test_is_convex_in_the_scores(seed, lam, margin):
    logits, target, generator = draw(seed, classes=6)
    other = 3 * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    loss = lambda x: L.ldr_kl_loss(x, target, lam=lam, margin=margin, reduction="none")
    for t in (0.1, 0.5, 0.8):
        chord = t * loss(logits) + (1 - t) * loss(other)
        assert (loss(t * logits + (1 - t) * other) <= chord + 1e-9).all()


@few
@given(seeds, lams, margins)
def test_symmetry_gap(seed, lam, margin):
    logits, _, _ = draw(seed, rows=1)
    k = logits.shape[1]
    everyone = logits.expand(k, k), torch.arange(k)
    gap = L.ldr_kl_loss(*everyone, lam=lam, reduction="sum").item()
    bound = k * (logits.max() - logits.min()).item() ** 2 / (8 * lam)
    assert -1e-9 <= gap <= bound + 1e-9
    total = L.ldr_kl_loss(*everyone, lam=math.inf, margin=margin, reduction="sum").item()
    assert total == pytest.approx(margin * (k - 1), abs=1e-9)


@few
@given(seeds, lams, st.floats(0, 0.99))
def test_uniform_noise_adds_the_symmetry_gap(seed, lam, eta):
    """Under uniform noise the risk is (1 - eta) times the clean one, plus eta times the mean over all labels."""
    logits, _, generator = draw(seed, rows=1)
    k = logits.shape[1]
    q = simplex(generator, 1, k)[0]
    each = lambda lam: L.ldr_kl_loss(logits.expand(k, k), torch.arange(k), lam=lam, reduction="none")
    noisy = (1 - eta) * q + eta / k
    expected = (1 - eta) * (q @ each(lam)) + eta * each(lam).mean()
    assert (noisy @ each(lam)).item() == pytest.approx(expected.item(), abs=1e-9)
    # At infinity the last term is gone: the noisy risk is a multiple of the clean one.
    assert (noisy @ each(math.inf)).item() == pytest.approx((1 - eta) * (q @ each(math.inf)).item(), abs=1e-9)


# --- consistency ------------------------------------------------------------------------------------------------------


def minimizer(risk, shape):
    """The scores that minimize a sum of independent conditional risks."""

    def fun(x):
        f = torch.tensor(x).reshape(shape).requires_grad_()
        value = risk(f)
        value.backward()
        return value.item(), f.grad.numpy().ravel()

    options = dict(maxiter=5000, maxfun=10_000, ftol=1e-15, gtol=1e-9, maxcor=40)
    return torch.tensor(minimize(fun, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options=options).x).reshape(
        shape
    )


def conditional_risk(f, q, loss):
    k = f.shape[1]
    return sum(q[:, y] @ loss(f, torch.full((len(f),), y)) for y in range(k))


@pytest.mark.parametrize("margin", [0.0, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("lam", [0.3, 1.0, 4.0])
def test_minimizers_order_classes_by_their_probability(margin, lam):
    q = torch.softmax(torch.randn(30, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64), 1)
    loss = lambda f, y: L.ldr_kl_loss(f, y, lam=lam, margin=margin, reduction="none")
    best = minimizer(lambda f: conditional_risk(f, q, loss), (30, 4))
    assert torch.equal(best.argsort(1), q.argsort(1))
    if not margin:
        closed = lam * (q.log() - q.log().mean(1, keepdim=True))
        torch.testing.assert_close(best - best.mean(1, keepdim=True), closed, rtol=0, atol=1e-3)


def test_crammer_singer_ties_without_a_majority():
    """q = (.4, .3, .3), c = 1: no scores have less risk than 1, which ties attain; a top gap t costs t (1 - 2 q_top)."""
    q = torch.tensor([[0.4, 0.3, 0.3]], dtype=torch.float64)
    risk = lambda f: conditional_risk(f, q, lambda f, y: L.ldr_kl_loss(f, y, lam=0, margin=1.0, reduction="none"))
    assert risk(torch.zeros(1, 3, dtype=torch.float64)).item() == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        f = torch.randn(1, 3, generator=generator, dtype=torch.float64) * 2
        top, second = f[0].topk(2).values
        gap = min((top - second).item(), 1.0)
        assert risk(f).item() >= 1 + gap * (1 - 2 * q[0, f[0].argmax()].item()) - 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_adaptive_minimizer_has_the_closed_form(seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.softmax(1.5 * torch.randn(10, 4, generator=generator, dtype=torch.float64), 1)
    loss = lambda f, y: L.aldr_kl_loss(f, y, lambda_0=1.3, alpha=2.0, reduction="none")
    best = minimizer(lambda f: conditional_risk(f, q, loss), (10, 4))
    lam = torch.tensor([1.3 - 1.3 / (2 * math.log(4)) * slow_kl(p) for p in q.tolist()], dtype=torch.float64)
    closed = lam[:, None] * q.log()
    torch.testing.assert_close(
        best - best.mean(1, keepdim=True), closed - closed.mean(1, keepdim=True), rtol=0, atol=1e-3
    )
    torch.testing.assert_close(L.aldr_temperature(best, lambda_0=1.3), lam, rtol=0, atol=1e-4)


# --- the adaptive temperature -----------------------------------------------------------------------------------------


def test_two_classes_by_hand():
    v = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    assert L.aldr_temperature_step(v, torch.ones(1, dtype=torch.float64)).item() == pytest.approx(0.905639, abs=6e-7)
    assert L.aldr_temperature(v).item() == pytest.approx(0.883565, abs=6e-7)
    p = 3 ** (1 / 0.883565)
    p = p / (1 + p)
    assert 0.883565 == pytest.approx(1 - slow_kl([p, 1 - p]) / (2 * math.log(2)), abs=1e-6)


@settings(deadline=None, max_examples=60)
@example(seed=2867036, lambda_0=0.1, alpha=1.05, margin=0.0)  # nearly a double fixed point: more than 50 steps
@given(
    seed=seeds,
    lambda_0=st.sampled_from([0.1, 1.0, 10.0]),
    alpha=st.sampled_from([1.05, 1.2, 1.5, 2.0, 5.0]),
    margin=margins,
)
def test_temperature_is_where_the_plain_iteration_ends(seed, lambda_0, alpha, margin):
    logits, target, generator = draw(seed, rows=3)
    logits = logits * lambda_0 * 2 * torch.rand(3, 1, generator=generator, dtype=torch.float64)
    lam = L.aldr_temperature(logits, target, lambda_0=lambda_0, alpha=alpha, margin=margin)
    slow = [
        slow_fall(slow_v(row, y, margin), lambda_0, alpha)
        for row, y in zip(logits.tolist(), target.tolist(), strict=True)
    ]
    assert lam.tolist() == pytest.approx(slow, abs=1e-8 * lambda_0)
    step = L.aldr_temperature_step(logits, lam, target, lambda_0=lambda_0, alpha=alpha, margin=margin)
    assert (step - lam).abs().max() < 1e-8 * lambda_0
    assert (lam >= lambda_0 * (1 - 1 / alpha) * (1 - 1e-12)).all() and (lam <= lambda_0).all()


@few
@given(seeds, st.sampled_from([1.05, 1.25]), st.integers(1, 8))
def test_no_step_passes_the_largest_fixed_point(seed, alpha, steps):
    """After any number of steps the temperature is at or above the point, and at or below that of plain steps."""
    logits, _, _ = draw(seed, rows=3, scale=2.0)
    lam = L.aldr_temperature(logits, alpha=alpha, max_iter=steps, tol=0)
    plain = torch.ones(3, dtype=torch.float64)
    for _ in range(steps):
        plain = L.aldr_temperature_step(logits, plain, alpha=alpha)
    assert (lam <= plain + 1e-14).all()
    assert (lam >= L.aldr_temperature(logits, alpha=alpha, tol=0) - 1e-13).all()


def test_few_steps_are_enough():
    generator = torch.Generator().manual_seed(0)
    for k in (2, 10, 1000):
        alpha = 1.05 * L.aldr_critical_alpha(k)
        scale = torch.logspace(-2, 2, 40, dtype=torch.float64)[:, None]
        logits = scale * torch.randn(40, k, generator=generator, dtype=torch.float64)
        exact = L.aldr_temperature(logits, alpha=alpha, max_iter=1000)
        assert (L.aldr_temperature(logits, alpha=alpha, max_iter=14) - exact).abs().max() < 1e-6
        assert (L.aldr_temperature_step(logits, exact, alpha=alpha) - exact).abs().max() < 1e-12


@pytest.mark.parametrize("outlier", [-5.0, -100.0, -1000.0])
@pytest.mark.parametrize(("k", "alpha"), [(10, 1.54), (100, 2.0), (1000, 2.45)])
def test_an_outlier_does_not_stop_the_solver(k, alpha, outlier):
    """A hopeless class makes the safe steps short; above the critical strength the bracket does not need them."""
    assert alpha > L.aldr_critical_alpha(k)
    logits = torch.zeros(200, k, dtype=torch.float64)
    logits[:, 0], logits[:, 1] = torch.linspace(0.2, 9, 200), outlier
    lam = L.aldr_temperature(logits, alpha=alpha, max_iter=25)
    assert (L.aldr_temperature_step(logits, lam, alpha=alpha) - lam).abs().max() < 1e-10
    single = L.aldr_temperature(logits.float(), alpha=alpha)
    assert (single - lam).abs().max() < 1e-3  # near the critical strength lam moves with the square root of a rounding
    mild = L.aldr_temperature(logits, alpha=2 * alpha)
    assert (L.aldr_temperature(logits.float(), alpha=2 * alpha) - mild).abs().max() < 1e-5


@few
@given(seeds, st.sampled_from([1.1, 2.0]))
def test_plain_iteration_falls_and_its_objective_climbs(seed, alpha):
    logits, target, _ = draw(seed)
    lam = torch.ones(4, dtype=torch.float64)
    value = objective(logits, target, lam, 1.0, alpha)
    for _ in range(20):
        new = L.aldr_temperature_step(logits, lam, alpha=alpha)
        new_value = objective(logits, target, new, 1.0, alpha)
        assert (new <= lam + 1e-14).all() and (new_value >= value - 1e-12).all()
        lam, value = new, new_value


@few
@given(seeds, st.sampled_from([0.1, 1.0, 10.0]), st.sampled_from([1.05, 2.0]))
def test_loss_is_the_maximum_above_the_critical_strength(seed, lambda_0, factor):
    logits, target, _ = draw(seed, scale=3.0 * lambda_0)
    alpha = factor * L.aldr_critical_alpha(logits.shape[1])
    loss = L.aldr_kl_loss(logits, target, lambda_0=lambda_0, alpha=alpha, reduction="none")
    grid = lambda_0 * torch.linspace(0.01, 1.5, 300, dtype=torch.float64)
    values = torch.stack([objective(logits, target, x, lambda_0, alpha) for x in grid])
    low, high = grid[(values.argmax(0) - 1).clamp(min=0)], grid[(values.argmax(0) + 1).clamp(max=299)]
    for _ in range(80):  # golden section
        a, b = high - 0.618033988749895 * (high - low), low + 0.618033988749895 * (high - low)
        left = objective(logits, target, a, lambda_0, alpha) > objective(logits, target, b, lambda_0, alpha)
        low, high = torch.where(left, low, a), torch.where(left, b, high)
    best = objective(logits, target, (low + high) / 2, lambda_0, alpha)
    torch.testing.assert_close(loss, best, rtol=0, atol=1e-8 * lambda_0)
    # Also the form without a temperature: <p, v> - lambda_0 KL(p) + KL(p)^2 / (2 alpha), at p = softmax(v / lam).
    lam = L.aldr_temperature(logits, lambda_0=lambda_0, alpha=alpha)
    for i in range(4):
        p = slow_weights(logits[i].tolist(), int(target[i]), lam[i].item())
        v = slow_v(logits[i].tolist(), int(target[i]), 0.0)
        kl = slow_kl(p)
        pull = alpha * math.log(len(p)) / lambda_0
        value = sum(a * b for a, b in zip(p, v, strict=True)) - lambda_0 * kl + kl**2 / (2 * pull)
        assert loss[i].item() == pytest.approx(value, abs=1e-8 * lambda_0)


def test_critical_strength_is_the_maximum_over_distributions():
    for k, value in ((2, 1.318), (10, 1.533), (50, 1.814), (100, 1.949), (1000, 2.440)):
        assert L.aldr_critical_alpha(k) == pytest.approx(value, abs=6e-4)
    assert L.aldr_critical_alpha(128) < 2 < L.aldr_critical_alpha(129)
    generator = torch.Generator().manual_seed(0)
    for k in (2, 3, 10, 300):
        bound, best = L.aldr_critical_alpha(k) * math.log(k), 0.0
        for scale in (0.3, 1.0, 3.0, 10.0):
            log_p = torch.log_softmax(scale * torch.randn(2000, k, generator=generator, dtype=torch.float64), 1)
            mean = (log_p.exp() * log_p).sum(1)
            spread = (log_p.exp() * log_p**2).sum(1) - mean**2 + mean + math.log(k)
            assert spread.max() <= bound
        for m in range(1, k):  # m large probabilities: one is the worst number
            x = torch.linspace(0, 30, 3001, dtype=torch.float64)
            log_p = torch.log_softmax(torch.cat([x[:, None].expand(-1, m), torch.zeros(3001, k - m)], 1), 1)
            mean = (log_p.exp() * log_p).sum(1)
            value = ((log_p.exp() * log_p**2).sum(1) - mean**2 + mean + math.log(k)).max().item()
            assert value <= bound + 1e-12
            best = max(best, value)
            if m == 4:
                break
        assert best == pytest.approx(bound, abs=1e-4)
    assert L.aldr_critical_alpha(10**9) > 5


@pytest.mark.parametrize("k", [2, 5, 10, 1000])
def test_critical_strength_is_sharp(k):
    """Just below it the worst distribution is an unstable fixed point, between two others; just above it is stable."""
    x = torch.linspace(0, 30, 300_001, dtype=torch.float64)
    p = 1 / (1 + (k - 1) * (-x).exp())
    spread = p * (1 - p) * x**2 + p * x - ((x.exp() + k - 1) / k).log()
    p = p[spread.argmax()].item()
    q = torch.tensor([[p, *[(1 - p) / (k - 1)] * (k - 1)]], dtype=torch.float64)
    for factor, unique in ((0.97, False), (1.03, True)):
        alpha = factor * L.aldr_critical_alpha(k)
        lam = 1 - slow_kl(q[0].tolist()) / (alpha * math.log(k))
        logits = lam * q.log()
        grid = torch.linspace(1 - 1 / alpha, 1, 4001, dtype=torch.float64)
        h = grid - L.aldr_temperature_step(logits.expand(4001, k), grid, alpha=alpha)
        crossings = int((h[1:].sign() != h[:-1].sign()).sum())
        assert crossings == (1 if unique else 3)
        assert (abs(L.aldr_temperature(logits, alpha=alpha).item() - lam) < 1e-8) == unique


def test_bistable_scores():
    """K = 1000, one score 5.45 above the rest, alpha = 2 < 2.44: three fixed points; the loss takes the largest."""
    logits = torch.zeros(1, 1000, dtype=torch.float64)
    logits[0, 0] = 5.45
    zero = torch.tensor([0])
    assert L.aldr_temperature(logits).item() == pytest.approx(0.8844, abs=6e-5)
    for lam, value in ((0.8844, 0.2506), (0.5246, 0.2809)):
        point = torch.tensor([lam], dtype=torch.float64)
        assert (L.aldr_temperature_step(logits, point) - point).abs().item() < 2e-4
        assert L.aldr_kl_loss(logits, zero, temperature=lam).item() + 5.45 == pytest.approx(value, abs=6e-5)
    assert L.aldr_kl_loss(logits, zero).item() + 5.45 == pytest.approx(0.2506, abs=6e-5)


def test_loss_jumps_below_the_critical_strength_only():
    """As one score rises, the largest fixed point vanishes: the loss jumps up, so it cannot be convex there."""
    gaps = torch.linspace(2, 4, 20_001, dtype=torch.float64)
    logits = torch.zeros(20_001, 50, dtype=torch.float64)
    logits[:, 0] = gaps
    jump = lambda alpha: (
        L.aldr_kl_loss(logits, torch.zeros(20_001, dtype=torch.int64), alpha=alpha, reduction="none") + gaps
    ).diff()
    assert jump(1.5).max() > 0.02
    assert jump(1.5).median() < 1e-4
    assert jump(1.01 * L.aldr_critical_alpha(50)).max() < 1.01e-4


@few
@given(seeds)
def test_adaptive_loss_is_convex_above_the_critical_strength(seed):
    logits, target, generator = draw(seed, rows=20, classes=6)
    other = 3 * torch.randn(20, 6, generator=generator, dtype=torch.float64)
    alpha = 1.01 * L.aldr_critical_alpha(6)
    loss = lambda x: L.aldr_kl_loss(x, target, alpha=alpha, reduction="none")
    for t in (0.1, 0.5, 0.8):
        assert (loss(t * logits + (1 - t) * other) <= t * loss(logits) + (1 - t) * loss(other) + 1e-9).all()


@pytest.mark.parametrize("normalization", L.NORMALIZATIONS)
def test_adaptive_gradient(normalization):
    """Danskin: finite differences of the loss, its temperature solved anew, agree with autograd at a constant one."""
    logits, target, _ = draw(6, rows=4, classes=5)
    logits.requires_grad_()
    options = dict(lambda_0=1.3, margin=0.2, normalization=normalization)
    assert torch.autograd.gradcheck(lambda x: L.aldr_kl_loss(x, target, **options), (logits,))
    if normalization is None:
        (gradient,) = torch.autograd.grad(L.aldr_kl_loss(logits, target, reduction="sum", **options), logits)
        lam = L.aldr_temperature(logits, target, lambda_0=1.3, margin=0.2)
        weights = L.ldr_kl_weights(logits.detach(), target, lam=lam, margin=0.2)
        torch.testing.assert_close(gradient, weights - F.one_hot(target, 5))


def test_adaptive_loss_closed_forms():
    same, target = torch.full((2, 7), 3.0, dtype=torch.float64, requires_grad=True), torch.tensor([0, 4])
    loss = L.aldr_kl_loss(same, target, lambda_0=2.0)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert L.aldr_temperature(same, lambda_0=2.0).tolist() == pytest.approx([2.0, 2.0])
    (gradient,) = torch.autograd.grad(2 * loss, same)
    torch.testing.assert_close(gradient, 1 / 7 - F.one_hot(target, 7).double())
    logits, target, _ = draw(8, rows=9, classes=5)
    # A strong pull leaves the temperature where it is.
    torch.testing.assert_close(
        L.aldr_kl_loss(logits, target, lambda_0=0.7, alpha=1e6, margin=0.1),
        L.ldr_kl_loss(logits, target, lam=0.7, margin=0.1),
        rtol=0,
        atol=1e-4,
    )
    # One given temperature, by its definition.
    for lam in (0.6, 150.0, torch.tensor(0.6), torch.full((9,), 0.6)):
        given_value = L.aldr_kl_loss(logits, target, temperature=lam, lambda_0=1.5, alpha=3.0)
        value = float(torch.as_tensor(lam).flatten()[0])
        expected = sum(slow_ldr(r, y, value) for r, y in zip(logits.tolist(), target.tolist(), strict=True)) / 9
        expected -= 3.0 * math.log(5) / (2 * 1.5) * (value - 1.5) ** 2
        assert given_value.item() == pytest.approx(expected, rel=1e-6)


def test_a_given_temperature_is_a_constant():
    logits, target, _ = draw(18, rows=3, classes=5)
    logits.requires_grad_()
    lam = torch.full((3,), 0.8, dtype=torch.float64, requires_grad=True)
    loss = L.aldr_kl_loss(logits, target, temperature=lam)
    assert torch.autograd.grad(loss, lam, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(loss, logits)[0].abs().sum() > 0


@pytest.mark.parametrize(("lambda_0", "k", "scale"), [(1e4, 1000, 3.0), (1.0, 50_000, 100.0)])
def test_adaptive_loss_keeps_its_digits_in_float32(lambda_0, k, scale):
    """Flat at a large reference, peaked at a small one: each branch where it is right."""
    logits = torch.randn(8, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, 0] += scale
    logits, target = logits.float(), torch.zeros(8, dtype=torch.int64)
    exact = L.aldr_kl_loss(logits.double(), target, lambda_0=lambda_0, alpha=4.0, reduction="none")
    loss = L.aldr_kl_loss(logits, target, lambda_0=lambda_0, alpha=4.0, reduction="none")
    assert (loss - exact).abs().max() < 3e-5


def test_scaling():
    """Scores and lambda_0 in another unit: temperature and loss follow."""
    logits, target, _ = draw(9, rows=5, classes=6)
    lam = L.aldr_temperature(logits, lambda_0=1.0)
    torch.testing.assert_close(L.aldr_temperature(50 * logits, lambda_0=50.0), 50 * lam)
    loss = L.aldr_kl_loss(logits, target, reduction="none")
    torch.testing.assert_close(L.aldr_kl_loss(500 * logits, target, lambda_0=500.0, reduction="none"), 500 * loss)


# --- normalization ----------------------------------------------------------------------------------------------------


@few
@given(seeds, st.sampled_from(["softplus_mean", "mean_abs"]))
def test_normalization(seed, method):
    logits, target, _ = draw(seed)
    scores = L.normalize_scores(logits, method)
    slow = torch.tensor([slow_normal(row, method) for row in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(scores, slow)
    torch.testing.assert_close(scores.abs().mean(1), torch.ones(4, dtype=torch.float64))
    assert torch.equal(scores.argmax(1), logits.argmax(1))
    for loss in (L.ldr_kl_loss, L.aldr_kl_loss):
        torch.testing.assert_close(
            loss(logits, target, margin=0.1, normalization=method), loss(slow, target, margin=0.1)
        )


def test_normalization_of_zeros():
    zeros = torch.zeros(2, 3, requires_grad=True)
    scores = L.normalize_scores(zeros, "mean_abs")
    assert scores.tolist() == [[0, 0, 0]] * 2
    L.ldr_kl_loss(zeros, torch.tensor([0, 1]), normalization="mean_abs").backward()
    assert zeros.grad.isfinite().all()
    assert torch.equal(L.normalize_scores(zeros, None), zeros)


# --- the loss with a memory -------------------------------------------------------------------------------------------


def official_step(row, lam, lambda_0, alpha):
    """The authors' update: probabilities without margin, plus 1e-5, normalized again."""
    p = [x + 1e-5 for x in slow_weights(row, 0, lam)]
    total = sum(p)
    return lambda_0 - lambda_0 / (alpha * math.log(len(p))) * slow_kl([x / total for x in p])


def test_memory_follows_the_authors_update():
    logits, target, _ = draw(10, rows=3, classes=6)
    loss = L.ALDRKLLoss(8, lambda_0=2.0, alpha=1.5, margin=0.3).double()
    index = torch.tensor([5, 0, 7])
    scores = [slow_normal(row, "mean_abs") for row in logits.tolist()]
    temperatures = dict.fromkeys(range(8), 2.0)
    for _ in range(3):
        value = loss(logits, target, index)
        expected = []
        for i, row, y in zip(index.tolist(), scores, target.tolist(), strict=True):
            temperatures[i] = official_step(row, temperatures[i], 2.0, 1.5)
            price = 1.5 * math.log(6) / (2 * 2.0) * (temperatures[i] - 2.0) ** 2
            expected.append(slow_ldr(row, y, temperatures[i], 0.3) - price)
        assert value.item() == pytest.approx(sum(expected) / 3, abs=1e-10)
        assert loss.temperature.tolist() == pytest.approx(list(temperatures.values()), abs=1e-12)
    assert loss.temperature[[1, 2, 3, 4, 6]].tolist() == [2.0] * 5


@pytest.mark.parametrize("margin_in_update", [True, False])
def test_memory_converges_to_the_fixed_point(margin_in_update):
    logits, target, _ = draw(11, rows=6, classes=5)
    loss = L.ALDRKLLoss(
        6, margin=0.5, normalization=None, margin_in_update=margin_in_update, smoothing=0.0, reduction="none"
    ).double()
    exact = L.aldr_temperature(logits, target, margin=0.5 if margin_in_update else 0.0)
    distance = (loss.temperature - exact).abs().max()
    for _ in range(200):
        value = loss(logits, target, torch.arange(6))
        new = (loss.temperature - exact).abs().max()
        assert new <= distance + 1e-9
        distance = new
    assert distance < 1e-9
    if margin_in_update:
        torch.testing.assert_close(value, L.aldr_kl_loss(logits, target, margin=0.5, reduction="none"))
    else:
        assert (value - L.aldr_kl_loss(logits, target, margin=0.5, reduction="none")).abs().max() > 1e-4


def test_memory_below_the_critical_strength_depends_on_the_past():
    """K = 10, alpha = 1.2 < 1.53: a lead of 1.8, then 2.5, then 1.8 again; the temperature stays at the lower point."""
    assert L.aldr_critical_alpha(10) > 1.2
    for alpha, returns in ((1.2, False), (1.6, True)):
        loss = L.ALDRKLLoss(1, alpha=alpha, margin=0.0, normalization=None, smoothing=0.0).double()
        kept = []
        for lead in (1.8, 2.5, 1.8):
            logits = torch.zeros(1, 10, dtype=torch.float64)
            logits[0, 0] = lead
            for _ in range(400):
                loss(logits, torch.tensor([0]), torch.tensor([0]))
            kept.append(loss.temperature.item())
        assert kept[0] == pytest.approx(L.aldr_temperature(logits, alpha=alpha).item(), abs=1e-6)
        assert (abs(kept[2] - kept[0]) < 1e-6) == returns
        if not returns:
            assert kept[0] == pytest.approx(0.8103, abs=6e-5) and kept[2] == pytest.approx(0.1675, abs=6e-5)


def test_memory_is_state():
    logits, target, _ = draw(12, rows=4, classes=5)
    index = torch.arange(4)
    loss = L.ALDRKLLoss(4)
    assert list(loss.state_dict()) == ["temperature"] and not list(loss.parameters())
    x = logits.clone().requires_grad_()
    loss(x, target, index).backward()
    assert x.grad.abs().sum() > 0 and not loss.temperature.requires_grad
    # The gradient is that of a constant temperature.
    y = logits.clone().requires_grad_()
    L.aldr_kl_loss(y, target, margin=0.1, normalization="mean_abs", temperature=loss.temperature.clone()).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-7)
    other = L.ALDRKLLoss(4)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.temperature, loss.temperature) and (other.temperature < 1).all()
    kept = copy.deepcopy(loss).to(torch.float64)
    assert kept.temperature.dtype == torch.float64
    assert kept.to("meta").temperature.device.type == "meta"
    # Evaluation uses the memory and leaves it alone.
    loss.eval()
    before = loss.temperature.clone()
    value = loss(2 * logits, target, index)
    assert torch.equal(loss.temperature, before)
    expected = L.aldr_kl_loss(2 * logits, target, margin=0.1, normalization="mean_abs", temperature=before)
    torch.testing.assert_close(value, expected)
    assert "num_samples=4" in repr(loss)


# --- label noise ------------------------------------------------------------------------------------------------------


def transition(noisy, labels, k):
    counts = torch.zeros(k, k)
    counts.index_put_((labels, noisy), torch.ones(len(labels)), accumulate=True)
    return counts / counts.sum(1, keepdim=True)


def test_uniform_noise():
    labels = torch.arange(5).repeat(20_000)
    noisy, wrong = L.uniform_label_noise(labels, 0.6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(wrong, noisy != labels) and noisy.dtype == torch.int64
    expected = torch.full((5, 5), 0.12) + 0.4 * torch.eye(5)
    assert (transition(noisy, labels, 5) - expected).abs().max() < 0.015
    again, _ = L.uniform_label_noise(labels, 0.6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noisy, again)
    assert not L.uniform_label_noise(labels, 0.0, 5)[1].any()
    assert (transition(L.uniform_label_noise(labels, 1.0, 5)[0], labels, 5) - 0.2).abs().max() < 0.015


def test_class_dependent_noise():
    labels = torch.arange(4).repeat(10_000)
    generator = torch.Generator().manual_seed(0)
    noisy, wrong = L.class_dependent_label_noise(labels, 0.3, 4, generator=generator)
    assert torch.equal(wrong, noisy != labels)
    expected = 0.7 * torch.eye(4) + 0.3 * torch.eye(4).roll(1, 1)
    assert (transition(noisy, labels, 4) - expected).abs().max() < 0.02
    mapping = torch.tensor([1, 0, 2, 2])  # 0 and 1 are mistaken for each other, 2 for nothing
    noisy, wrong = L.class_dependent_label_noise(labels, 1.0, 4, mapping=mapping)
    assert torch.equal(noisy, mapping[labels])
    assert not wrong[labels == 2].any() and wrong[labels != 2].all()
    assert torch.equal(L.class_dependent_label_noise(labels, 0.0, 4)[0], labels)


# --- extremes, precision, transforms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 1e-38, 0.1, 1.0, 10.0, 1000.0, math.inf])
@pytest.mark.parametrize("tensor", [False, True])
def test_extreme_scores(lam, tensor):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [1e4, 1e4, 1e4], [0.0, 1e-30, 0.0]], requires_grad=True)
    target = torch.tensor([1, 2, 0, 0])
    loss = L.ldr_kl_loss(logits, target, lam=torch.full((4,), lam) if tensor else lam, margin=0.1, reduction="none")
    slow = [slow_ldr(row, y, lam, 0.1) for row, y in zip(logits.tolist(), target.tolist(), strict=True)]
    assert loss.tolist() == pytest.approx(slow, rel=1e-5, abs=2e-3)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isfinite().all() and gradient.abs().max() <= 1
    assert L.ldr_kl_weights(logits.detach(), target, lam=lam).sum(1).tolist() == pytest.approx([1] * 4)


@pytest.mark.parametrize("lambda_0", [0.1, 1.0, 10.0, 1e4])
def test_extreme_scores_adaptive(lambda_0):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [1e4, 1e4, 1e4], [0.0, 1e-30, 0.0]], requires_grad=True)
    target = torch.tensor([1, 2, 0, 0])
    loss = L.aldr_kl_loss(logits, target, lambda_0=lambda_0, margin=0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and gradient.isfinite().all()
    lam = L.aldr_temperature(logits, lambda_0=lambda_0)
    assert lam[2:].tolist() == pytest.approx([lambda_0] * 2, rel=1e-6)
    if lambda_0 <= 10:
        assert lam[:1].tolist() == pytest.approx([lambda_0 / 2], rel=1e-5)
    stored = L.ALDRKLLoss(4, lambda_0=lambda_0)
    assert stored(logits, target, torch.arange(4)).isfinite() and stored.temperature.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    logits, target, _ = draw(13, rows=5, classes=6)
    half = logits.to(dtype).requires_grad_()
    for loss in (L.ldr_kl_loss, L.aldr_kl_loss):
        value = loss(half, target, margin=0.1)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(half.detach().float(), target, margin=0.1))
        (gradient,) = torch.autograd.grad(value, half)
        assert gradient.dtype == dtype and gradient.isfinite().all()
    assert L.aldr_temperature(half).dtype == torch.float32


def test_autocast():
    logits, target, _ = draw(14, rows=5, classes=6)
    layer = torch.nn.Linear(6, 6)
    stored = L.ALDRKLLoss(5)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(logits.float())
        for loss in (
            L.ldr_kl_loss(out, target, lam=0.5, margin=0.1),
            L.ldr_kl_loss(out, target, lam=torch.full((5,), 2.0), normalization="softplus_mean"),
            L.aldr_kl_loss(out, target, margin=0.1),
            stored(out, target, torch.arange(5)),
        ):
            assert loss.dtype == torch.float32 and loss.isfinite()
            loss.backward(retain_graph=True)
    torch.testing.assert_close(L.aldr_kl_loss(out, target, margin=0.1), L.aldr_kl_loss(out.float(), target, margin=0.1))


def test_several_labels_for_the_same_scores():
    logits, target, _ = draw(17, rows=4, classes=5)
    labels = torch.stack([target, target.roll(1)])
    for loss in (
        lambda y: L.ldr_kl_loss(logits, y, lam=0.7, margin=0.1),
        lambda y: L.aldr_kl_loss(logits, y, margin=0.1),
    ):
        torch.testing.assert_close(torch.func.vmap(loss)(labels), torch.stack([loss(y) for y in labels]))


def test_layout_and_blocks(monkeypatch):
    logits, target, _ = draw(15, rows=7, classes=6)
    turned = logits.T.contiguous().T
    for loss in (L.ldr_kl_loss, L.aldr_kl_loss):
        torch.testing.assert_close(loss(turned, target, margin=0.1), loss(logits, target, margin=0.1))
        each = loss(logits, target, reduction="none")
        torch.testing.assert_close(loss(logits, target), each.mean())
        torch.testing.assert_close(loss(logits, target, reduction="sum"), each.sum())
        torch.testing.assert_close(loss(logits[:1], target[:1]), each[0])
    whole = L.aldr_temperature(logits)
    monkeypatch.setattr(_blocks, "_ELEMENTS", 12)  # two rows at a time
    torch.testing.assert_close(L.aldr_temperature(logits), whole)
    spared = L.aldr_temperature(logits, target, margin=0.3)
    torch.testing.assert_close(
        spared,
        torch.cat([L.aldr_temperature(x[None], y[None], margin=0.3) for x, y in zip(logits, target, strict=True)]),
    )
    torch.testing.assert_close(
        L.aldr_temperature_step(logits, whole, smoothing=1e-5),
        torch.cat(
            [L.aldr_temperature_step(x[None], t[None], smoothing=1e-5) for x, t in zip(logits, whole, strict=True)]
        ),
    )


LOSSES = {
    "ldr": lambda x, y: L.ldr_kl_loss(x, y, lam=0.7, margin=0.1),
    "cold": lambda x, y: L.ldr_kl_loss(x, y, lam=0, margin=0.1),
    "warm": lambda x, y: L.ldr_kl_loss(x, y, lam=math.inf, normalization="softplus_mean"),
    "large": lambda x, y: L.ldr_kl_loss(x, y, lam=1000.0, normalization="mean_abs"),
    "tensor": lambda x, y: L.ldr_kl_loss(x, y, lam=torch.tensor(0.7), margin=0.1),
    "aldr": lambda x, y: L.aldr_kl_loss(x, y, margin=0.1),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_transforms_and_compile(loss):
    logits, target, _ = draw(16, rows=4, classes=5)
    logits = logits.float()
    alone = [(x[None].clone().requires_grad_(), y[None]) for x, y in zip(logits, target, strict=True)]
    expected = torch.cat([torch.autograd.grad(loss(*one), one[0])[0] for one in alone])
    per_row = torch.func.vmap(torch.func.grad(lambda x, y: loss(x[None], y[None])))(logits, target)
    torch.testing.assert_close(per_row, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.func.grad(loss)(logits, target), expected / 4, rtol=1e-5, atol=1e-6)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, target), loss(logits, target))


def test_compiled_solver_and_vmap_reach_the_fixed_point():
    logits = torch.zeros(1, 10, dtype=torch.float64)
    logits[0, 0] = 1.8
    lam = L.aldr_temperature(logits, alpha=1.6)
    solve = lambda x: L.aldr_temperature(x, alpha=1.6)
    torch.testing.assert_close(torch.compile(solve, backend="eager", fullgraph=True)(logits), lam, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.func.vmap(solve)(logits[None])[0], lam, rtol=0, atol=1e-9)


def test_compiled_memory():
    logits, target, _ = draw(17, rows=4, classes=5)
    loss = L.ALDRKLLoss(9)
    compiled = torch.compile(copy.deepcopy(loss), backend="aot_eager")
    index = torch.tensor([8, 1, 2, 3])
    for _ in range(2):
        torch.testing.assert_close(compiled(logits.float(), target, index), loss(logits.float(), target, index))
    torch.testing.assert_close(compiled.temperature, loss.temperature)


# --- bad input --------------------------------------------------------------------------------------------------------

GOOD, Y = torch.randn(3, 4), torch.tensor([0, 1, 3])
BAD = [
    (TypeError, "logits", lambda: L.ldr_kl_loss([[1.0, 2.0]], Y)),
    (TypeError, "logits", lambda: L.ldr_kl_loss(torch.ones(3, 4, dtype=torch.int64), Y)),
    (ValueError, "logits", lambda: L.ldr_kl_loss(torch.ones(4), Y)),
    (ValueError, "logits", lambda: L.ldr_kl_loss(torch.ones(0, 4), torch.ones(0, dtype=torch.int64))),
    (ValueError, "logits.*2 columns", lambda: L.ldr_kl_loss(torch.ones(3, 1), torch.zeros(3, dtype=torch.int64))),
    (ValueError, "logits.*finite", lambda: L.ldr_kl_loss(torch.full((3, 4), math.nan), Y)),
    (ValueError, "logits.*finite", lambda: L.aldr_kl_loss(torch.tensor([[0.0, -math.inf]]), torch.tensor([0]))),
    (TypeError, "target", lambda: L.ldr_kl_loss(GOOD, Y.float())),
    (TypeError, "target", lambda: L.ldr_kl_loss(GOOD, Y.int())),
    (TypeError, "target", lambda: L.ldr_kl_loss(GOOD, [0, 1, 3])),
    (ValueError, "target.*shape", lambda: L.ldr_kl_loss(GOOD, Y[:2])),
    (ValueError, "target", lambda: L.ldr_kl_loss(GOOD, Y[:, None])),
    (ValueError, r"target.*\[0, 4\)", lambda: L.ldr_kl_loss(GOOD, torch.tensor([0, 1, 4]))),
    (ValueError, r"target.*\[0, 4\)", lambda: L.ldr_kl_weights(GOOD, torch.tensor([0, 1, -1]))),
    (ValueError, "lam", lambda: L.ldr_kl_loss(GOOD, Y, lam=-0.1)),
    (ValueError, "lam", lambda: L.ldr_kl_loss(GOOD, Y, lam=math.nan)),
    (TypeError, "lam", lambda: L.ldr_kl_loss(GOOD, Y, lam="1")),
    (TypeError, "lam", lambda: L.ldr_kl_loss(GOOD, Y, lam=True)),
    (TypeError, "lam", lambda: L.ldr_kl_loss(GOOD, Y, lam=torch.tensor(1))),
    (ValueError, "lam.*shape", lambda: L.ldr_kl_loss(GOOD, Y, lam=torch.ones(4))),
    (ValueError, "lam", lambda: L.ldr_kl_weights(GOOD, Y, lam=torch.tensor([1.0, -1.0, 1.0]))),
    (ValueError, "margin", lambda: L.ldr_kl_loss(GOOD, Y, margin=-0.1)),
    (TypeError, "margin", lambda: L.ldr_kl_weights(GOOD, Y, margin=None)),
    (ValueError, "normalization", lambda: L.ldr_kl_loss(GOOD, Y, normalization="mean")),
    (ValueError, "method", lambda: L.normalize_scores(GOOD, "mean")),
    (ValueError, "reduction", lambda: L.ldr_kl_loss(GOOD, Y, reduction="median")),
    (ValueError, "lambda_0", lambda: L.aldr_kl_loss(GOOD, Y, lambda_0=0)),
    (ValueError, "alpha.*greater than 1", lambda: L.aldr_kl_loss(GOOD, Y, alpha=1.0)),
    (ValueError, "alpha", lambda: L.aldr_temperature(GOOD, alpha=0.5)),
    (ValueError, "target.*margin", lambda: L.aldr_temperature(GOOD, margin=0.1)),
    (ValueError, "max_iter", lambda: L.aldr_temperature(GOOD, max_iter=0)),
    (ValueError, "tol", lambda: L.aldr_temperature(GOOD, tol=-1.0)),
    (ValueError, "temperature", lambda: L.aldr_kl_loss(GOOD, Y, temperature=torch.zeros(3))),
    (ValueError, "temperature.*shape", lambda: L.aldr_kl_loss(GOOD, Y, temperature=torch.ones(2))),
    (ValueError, "temperature", lambda: L.aldr_temperature_step(GOOD, torch.ones(2))),
    (TypeError, "temperature", lambda: L.aldr_temperature_step(GOOD, 1.0)),
    (ValueError, "smoothing", lambda: L.aldr_temperature_step(GOOD, torch.ones(3), smoothing=-1)),
    (ValueError, "num_classes", lambda: L.aldr_critical_alpha(1)),
    (ValueError, "num_samples", lambda: L.ALDRKLLoss(0)),
    (ValueError, "normalization", lambda: L.ALDRKLLoss(3, normalization="max")),
    (ValueError, "reduction", lambda: L.ALDRKLLoss(3, reduction="max")),
    (ValueError, r"index.*\[0, 3\)", lambda: L.ALDRKLLoss(3)(GOOD, Y, torch.tensor([0, 1, 3]))),
    (ValueError, "index.*shape", lambda: L.ALDRKLLoss(3)(GOOD, Y, torch.tensor([0, 1]))),
    (TypeError, "index", lambda: L.ALDRKLLoss(3)(GOOD, Y, torch.tensor([0.0, 1, 2]))),
    (ValueError, "rate", lambda: L.uniform_label_noise(Y, 1.5, 4)),
    (ValueError, "labels", lambda: L.uniform_label_noise(Y, 0.5, 3)),
    (ValueError, "mapping", lambda: L.class_dependent_label_noise(Y, 0.5, 4, mapping=torch.tensor([0, 1]))),
    (ValueError, "mapping", lambda: L.class_dependent_label_noise(Y, 0.5, 4, mapping=torch.tensor([0, 1, 2, 4]))),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD)
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_no_class_is_ignored_where_values_are_not_read():
    """torch's cross-entropy takes the class -100 for a row without one, unless it is told not to."""
    logits, target = torch.zeros(3, 4), torch.tensor([0, -100, 3])
    compiled = torch.compile(lambda x, y: L.ldr_kl_loss(x, y), backend="aot_eager", fullgraph=True)
    rows = torch.func.vmap(lambda x, y: L.ldr_kl_loss(x[None], y[None]))
    for call in (compiled, rows):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            call(logits, target)
