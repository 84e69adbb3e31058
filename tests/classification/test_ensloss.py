"""The theorems of chapter classification/ensloss as properties; closed forms, limits, extremes and bad input."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, special, stats
from sklearn.metrics import hinge_loss

from lossbook import _blocks
from lossbook.classification import ensloss as E

seeds = st.integers(0, 2**31)
lambdas = st.sampled_from([-1.0, -0.4, 0.0, 1e-9, 0.6, 1.0])
few = settings(deadline=None, max_examples=50)
DOUBLE = torch.float64

# The worked example of the chapter.
MARGINS = torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=DOUBLE)
DRAWS = torch.tensor([0.0, -1.0, 0.5, -2.0], dtype=DOUBLE)


def batch(seed, rows=None, ties=False, scale=3.0):
    """Margins and draws, float64; with ties the margins are few integers, zero among them."""
    generator = torch.Generator().manual_seed(seed)
    n = rows or int(torch.randint(1, 40, (), generator=generator))
    margins = scale * torch.randn(n, generator=generator, dtype=DOUBLE)
    return margins.round() if ties else margins, torch.randn(n, generator=generator, dtype=DOUBLE)


def slow_box_cox(x, lam):
    if lam == 0:
        return math.exp(x)
    base = 1 + lam * x
    if base <= 0:
        return 0.0 if lam > 0 else math.inf
    return base ** (1 / lam)


def slow_derivatives(margins, draws, lam, floor=-1.0, tail=True, shift=1e-6):
    """Margin by margin, in Python floats: how many margins lie below, and the slopes of that place and its ties."""
    slopes = sorted(-slow_box_cox(x, lam) if floor is None else max(floor, -slow_box_cox(x, lam)) for x in draws)
    out = []
    for z in margins:
        below, ties = sum(other < z for other in margins), sum(other == z for other in margins)
        slope = sum(slopes[below : below + ties]) / ties
        out.append((slope / z if tail and z > 1 else slope) - shift)
    return torch.tensor(out, dtype=DOUBLE)


def slow_is_calibrated(margins, derivatives, smooth=False):
    """Every pair, by the definition of a convex function with a negative derivative at 0."""
    pairs = list(zip(margins, derivatives, strict=True))
    for z, g in pairs:
        if z <= 0 and g >= 0:
            return False
        for other, h in pairs:
            if z < other and g > h:
                return False
            if z == other and g != h and (smooth or z == 0):
                return False
    return True


def minimizer(derivative, eta):
    """The t that minimizes eta phi(t) + (1 - eta) phi(-t), by bisection on its derivative."""
    slope = lambda t: eta * derivative(t) - (1 - eta) * derivative(-t)
    low, high = -1.0, 1.0
    while slope(low) > 0:
        low *= 2
    while slope(high) < 0:
        high *= 2
    return optimize.brentq(slope, low, high, xtol=1e-13)


# --- derivatives without a loss -----------------------------------------------------------------------------------


def test_inverse_box_cox_closed_forms():
    x = torch.linspace(-4, 4, 81, dtype=DOUBLE)
    torch.testing.assert_close(E.inverse_box_cox(x, 0.0), x.exp())
    torch.testing.assert_close(E.inverse_box_cox(x, 1.0), (1 + x).clamp(min=0))
    torch.testing.assert_close(E.inverse_box_cox(x[x < 1], -1.0), 1 / (1 - x[x < 1]))
    assert (E.inverse_box_cox(x[x > 1], -1.0) == math.inf).all()
    torch.testing.assert_close(E.inverse_box_cox(x, 0.5), (1 + x / 2).clamp(min=0) ** 2)


@few
@given(st.floats(-8, 8), st.floats(-1, 1))
def test_inverse_box_cox_equals_the_power(x, lam):
    if abs(lam) < 1e-6:
        expected = math.exp(x)
    else:
        expected = slow_box_cox(x, lam)
    got = E.inverse_box_cox(torch.tensor([x], dtype=DOUBLE), lam).item()
    assert got == pytest.approx(expected, rel=1e-4 if abs(lam) < 1e-6 else 1e-8)


@pytest.mark.parametrize("lam", [1e-3, 1e-8, -1e-8, 1e-15, 1e-30, 5e-324])
def test_small_lambda_keeps_its_digits_in_float32(lam):
    x = torch.linspace(-4, 4, 81)
    expected = np.exp(np.log1p(lam * x.double().numpy()) / lam) if abs(lam) > 1e-14 else np.exp(x.double().numpy())
    torch.testing.assert_close(E.inverse_box_cox(x, lam), torch.from_numpy(expected).float(), rtol=2e-5, atol=0)


def test_worked_example():
    got = E.calibrated_derivatives(MARGINS, DRAWS, shift=0)
    expected = torch.tensor([-0.367879, -1, -0.067668, -1], dtype=DOUBLE)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    got = E.calibrated_derivatives(MARGINS[:3], torch.tensor([0.0, 1, -1], dtype=DOUBLE))
    torch.testing.assert_close(got, torch.tensor([-1, -1, -0.183940], dtype=DOUBLE) - 1e-6, rtol=0, atol=1e-6)


@few
@given(seeds, lambdas, st.booleans(), st.booleans(), st.sampled_from([-0.3, -1.0, -5.0, None]))
def test_derivatives_equal_the_slow_loop(seed, lam, ties, tail, floor):
    margins, draws = batch(seed, ties=ties)
    floor = -2.0 if floor is None and lam < 0 else floor
    got = E.calibrated_derivatives(margins, draws, box_cox=lam, floor=floor, tail=tail, shift=1e-3)
    slow_lam = 0.0 if abs(lam) < 1e-6 else lam
    expected = slow_derivatives(margins.tolist(), draws.tolist(), slow_lam, floor, tail, shift=1e-3)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-12)


@few
@given(seeds, lambdas, st.booleans(), st.booleans())
def test_derivatives_are_those_of_a_calibrated_loss(seed, lam, ties, tail):
    margins, draws = batch(seed, ties=ties)
    g = E.calibrated_derivatives(margins, draws, box_cox=lam, tail=tail)
    assert E.is_calibrated_vector(margins, g, smooth=True, atol=1e-12)
    assert slow_is_calibrated(margins.tolist(), [round(x, 12) for x in g.tolist()], smooth=True)
    assert (g <= -1e-6).all() and (g >= -1 - 1.001e-6).all()
    above = margins > 1
    bound = 1 / margins[above] if tail else torch.ones_like(margins[above])
    assert (g[above].abs() <= bound + 1.001e-6).all()
    E.interpolating_loss(margins, g.round(decimals=12))  # a loss that has them exists


@few
@given(seeds, st.booleans())
def test_permuting_the_batch_permutes_the_result(seed, ties):
    margins, draws = batch(seed, ties=ties)
    order = torch.randperm(len(margins), generator=torch.Generator().manual_seed(seed))
    again = torch.randperm(len(margins), generator=torch.Generator().manual_seed(seed + 1))
    got = E.calibrated_derivatives(margins, draws)
    torch.testing.assert_close(E.calibrated_derivatives(margins[order], draws[again]), got[order], rtol=1e-14, atol=0)


def test_long_vectors_take_another_sort():
    margins, draws = batch(5, rows=2**14 + 3)
    margins[::7] = margins[3]
    got = E.calibrated_derivatives(margins, draws)
    both = torch.func.vmap(E.calibrated_derivatives)(margins[None], draws[None])[0]
    torch.testing.assert_close(both, got, rtol=1e-12, atol=0)
    margins, draws = margins.numpy(), draws.numpy()
    slopes = np.sort(-np.minimum(1, np.exp(draws)))
    order = np.argsort(margins)
    first, last = (np.searchsorted(margins[order], margins, side) for side in ("left", "right"))
    below = np.concatenate([[0], np.cumsum(slopes)])
    expected = (below[last] - below[first]) / (last - first) / np.maximum(1, margins) - 1e-6
    torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_of_ties_does_not_break_the_order(dtype):
    """The rounded mean of many slopes at the floor is the floor: the vector is calibrated without any tolerance."""
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        margins = (3 * torch.randn(30, generator=generator, dtype=dtype)).round()
        draws = torch.randn(30, generator=generator, dtype=dtype)
        g = E.calibrated_derivatives(margins, draws, floor=-0.3, shift=1e-6 * (seed % 2))
        assert E.is_calibrated_vector(margins, g, smooth=True)
        E.interpolating_loss(margins, g)
        together = torch.func.vmap(
            lambda z, x, s=seed: E.calibrated_derivatives(z, x, floor=-0.3, shift=1e-6 * (s % 2))
        )
        assert torch.equal(together(margins[None], draws[None])[0], g)


def test_slopes_are_constants():
    margins, draws = batch(1, rows=8)
    margins.requires_grad_(), draws.requires_grad_()
    knots = (-1.0, 3.0, 8)
    assert not E.calibrated_derivatives(margins, draws).requires_grad
    assert not E.drawn_slopes(margins, draws, knots=knots).requires_grad


def test_infinite_draws_are_clipped():
    margins = torch.tensor([-1.0, 0.5, 2.0])
    got = E.calibrated_derivatives(margins, torch.tensor([5.0, 3.0, -2.0]), box_cox=-1.0, shift=0)
    torch.testing.assert_close(got, torch.tensor([-1, -1, -1 / 6]))  # 1 - x <= 0 twice; 1/3 over 2


def test_without_tail_the_large_margins_keep_their_slope():
    margins = torch.tensor([0.5, 2.0, 8.0], dtype=DOUBLE)
    draws = torch.zeros(3, dtype=DOUBLE)
    kept = E.calibrated_derivatives(margins, draws, tail=False, shift=0)
    assert kept.tolist() == [-1, -1, -1]
    assert E.calibrated_derivatives(margins, draws, shift=0).tolist() == [-1, -0.5, -0.125]
    assert E.calibrated_derivatives(margins, draws, floor=-0.25, tail=False, shift=0).tolist() == [-0.25] * 3


# --- a loss that is drawn first ---------------------------------------------------------------------------------------


def slow_drawn(z, draws, knots, lam, floor, shift):
    first, last, number = knots
    slopes = sorted(max(floor, -slow_box_cox(x, lam)) - shift for x in draws)
    at = [first + (last - first) * m / (number - 1) for m in range(number)]
    if z <= first:
        slope = slopes[0]
    elif z >= last:
        slope = slopes[-1]
    else:
        m = max(m for m in range(number - 1) if at[m] <= z)
        slope = slopes[m] + (slopes[m + 1] - slopes[m]) * (z - at[m]) / (at[m + 1] - at[m])
    return slope / max(1, z) / max(1, z / last)


@few
@given(seeds, lambdas, st.sampled_from([(-1.0, 3.0, 16), (0.5, 1.0, 2), (-3, 8, 5)]), st.sampled_from([-1.0, -0.3]))
def test_drawn_slopes_are_one_function_of_the_margin(seed, lam, knots, floor):
    margins, _ = batch(seed)
    draws = torch.randn(knots[2], generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    options = dict(knots=knots, box_cox=lam, floor=floor, shift=1e-3)
    got = E.drawn_slopes(margins, draws, **options)
    slow_lam = 0.0 if abs(lam) < 1e-6 else lam
    expected = [slow_drawn(z, draws.tolist(), knots, slow_lam, floor, 1e-3) for z in margins.tolist()]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=DOUBLE), rtol=1e-6, atol=1e-12)
    # The slope at a margin does not depend on the others, nor on the order of the draws.
    torch.testing.assert_close(E.drawn_slopes(margins[:1], draws.flip(0), **options), got[:1])
    # Negative, not decreasing, continuous, and with a finite integral: bounded below.
    grid = torch.linspace(-6, 12, 18_001, dtype=DOUBLE)
    slopes = E.drawn_slopes(grid, draws, **options)
    steepest = (1 + 1e-3) * (knots[2] - 1) / (knots[1] - knots[0]) + 2.1
    assert (slopes < 0).all() and (slopes.diff() >= -1e-12).all() and slopes.diff().max() < 1e-3 * steepest
    far = torch.tensor([1e2, 1e4, 1e6], dtype=DOUBLE)
    beyond = E.drawn_slopes(far, draws, **options) * far**2
    torch.testing.assert_close(beyond, beyond[:1].expand(3))
    assert E.is_calibrated_vector(margins, got, smooth=True, atol=1e-12)


@pytest.mark.parametrize("classes", [None, 3])
def test_the_surrogate_of_a_loss_drawn_first(classes, monkeypatch):
    torch.manual_seed(0)
    knots, shape = (-1.0, 3.0, 8), (6,) if classes is None else (6, classes)
    logits, draws = (3 * torch.randn(shape, dtype=DOUBLE)).requires_grad_(), torch.randn(8, dtype=DOUBLE)
    target = torch.randint(2 if classes is None else classes, (6,))
    margins = E.signed_margins(logits, target)
    loss = E.ens_loss(logits, target, knots=knots, draws=draws)
    (gradient,) = torch.autograd.grad(loss, logits)
    signs = torch.where(margins == logits, 1.0, -1.0)
    torch.testing.assert_close(gradient, signs * E.drawn_slopes(margins, draws, knots=knots) / 6)
    run = lambda: E.ens_loss(logits, target, knots=knots, generator=torch.Generator().manual_seed(3))
    whole = run()
    monkeypatch.setattr(_blocks, "_ELEMENTS", 4)  # some rows at a time
    torch.testing.assert_close(run(), whole)
    torch.testing.assert_close(
        torch.autograd.grad(E.ens_loss(logits, target, knots=knots, draws=draws), logits)[0], gradient
    )
    criterion = E.EnsLoss(knots=knots, generator=torch.Generator().manual_seed(3))
    assert torch.equal(run(), criterion(logits, target))
    first = torch.randn(8, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    torch.testing.assert_close(run(), E.ens_loss(logits, target, knots=knots, draws=first))


@settings(deadline=None, max_examples=10)
@given(seeds, st.integers(3, 6))
def test_the_mean_of_losses_drawn_first_orders_the_classes(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    many = [torch.randn(16, generator=generator, dtype=DOUBLE) for _ in range(20)]
    axis = torch.linspace(-400, 400, 80_001, dtype=DOUBLE)
    mean = torch.stack([E.drawn_slopes(axis, draws) for draws in many]).mean(0).numpy()
    p = np.random.default_rng(seed).dirichlet(np.ones(classes)).clip(1e-3)
    p = p / p.sum()
    scores = np.array([minimizer(lambda t: np.interp(t, axis, mean), eta) for eta in p])
    order = np.argsort(p)
    assert (np.diff(scores[order])[np.diff(p[order]) > 1e-4] > 0).all()


# --- the mean of a large batch ------------------------------------------------------------------------------------


def order_statistic_mean(j, n, lam=0.0):
    """E max(-1, -u) of the draw that the j-th smallest margin of n gets: the integral over the j-th largest normal draw."""
    density = stats.beta(n - j + 1, j)
    value = lambda p: max(-1.0, -slow_box_cox(special.ndtri(p), lam)) * density.pdf(p)
    kink = special.ndtr(0.0)
    peak = density.mean()
    points = sorted({0.0, kink, peak, max(peak - 8 * density.std(), 0), min(peak + 8 * density.std(), 1), 1.0})
    return sum(integrate.quad(value, a, b, limit=200)[0] for a, b in zip(points[:-1], points[1:], strict=True))


def test_mean_slope_is_the_order_statistic_integral():
    generator = torch.Generator().manual_seed(0)
    margins = torch.linspace(-1, 0.9, 128, dtype=DOUBLE)
    draws = torch.randn(20_000, 128, generator=generator, dtype=DOUBLE)
    vector = torch.func.vmap(lambda d: E.calibrated_derivatives(margins, d, shift=0))(draws)
    mean, spread = vector.mean(0), vector.std(0)
    for j, value in [(1, -1.000), (64, -0.963), (128, -0.081)]:
        exact = order_statistic_mean(j, 128)
        assert exact == pytest.approx(value, abs=6e-4)
        assert mean[j - 1].item() == pytest.approx(exact, abs=0.005)
    assert spread[95].item() == pytest.approx(0.061, abs=0.003)  # quantile 1/4 of the draws: sqrt(v(1-v)/B) / density


@pytest.mark.parametrize("lam", [0.0, -0.5, 1.0])
def test_the_integral_tends_to_expected_derivative(lam):
    gaps = []
    for n in (16, 128, 1024):
        j = np.unique(np.linspace(1, n, 16).astype(int))
        limit = E.expected_derivative(torch.from_numpy((j - 0.5) / n), box_cox=lam)
        gaps.append(max(abs(order_statistic_mean(int(i), n, lam) - x) for i, x in zip(j, limit.tolist(), strict=True)))
    assert gaps[1] < 0.04 if lam == 0 else gaps[1] < 0.1
    assert gaps[0] > gaps[1] > gaps[2]


def test_expected_derivative_closed_forms():
    q = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.9, 0.975, 1.0], dtype=DOUBLE)
    expected = torch.tensor([-1, -1, -1, -0.5094, -0.2776, -0.1409, 0], dtype=DOUBLE)
    torch.testing.assert_close(E.expected_derivative(q), expected, rtol=0, atol=5e-5)
    x = -special.ndtri(0.9)
    assert E.expected_derivative(q[4], box_cox=1.0).item() == 0  # 1 + x < 0
    assert E.expected_derivative(q[4], box_cox=-1.0).item() == pytest.approx(-1 / (1 - x))
    assert E.expected_derivative(q[1], floor=None).item() == pytest.approx(-math.exp(-special.ndtri(0.25)))
    assert E.expected_derivative(q[1], floor=-0.5).item() == -0.5


# --- the surrogate ------------------------------------------------------------------------------------------------


@few
@given(seeds, lambdas)
def test_gradient_is_label_times_slope(seed, lam):
    logits, draws = batch(seed)
    target = torch.randint(2, logits.shape, generator=torch.Generator().manual_seed(seed))
    sign = 2 * target - 1
    logits.requires_grad_()
    g = slow_derivatives((sign * logits).tolist(), draws.tolist(), 0.0 if abs(lam) < 1e-6 else lam)
    for kind in (target, target.bool(), target.double()):
        loss = E.ens_loss(logits, kind, box_cox=lam, draws=draws)
        (gradient,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(gradient, sign * g / len(g), rtol=1e-6, atol=1e-12)
    each = E.ens_loss(logits, target, box_cox=lam, draws=draws, reduction="none")
    torch.testing.assert_close(each, g * sign * logits, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(E.ens_loss(logits, target, box_cox=lam, draws=draws, reduction="sum"), each.sum())


def test_gradcheck_where_slopes_depend_on_ranks_only():
    logits, draws = batch(3, rows=7)
    target = torch.tensor([0, 1, 1, 0, 1, 0, 1])
    loss = lambda x: E.ens_loss(x, target, draws=draws, tail=False)
    assert torch.autograd.gradcheck(loss, logits.requires_grad_())
    # With the tail, a finite difference would see -u, a constant; the method's gradient is the slope all the same.
    x = torch.tensor([4.0], dtype=DOUBLE, requires_grad=True)
    E.ens_loss(x, torch.tensor([1]), draws=torch.zeros(1, dtype=DOUBLE), shift=0).backward()
    assert x.grad.item() == -0.25


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 3)])
def test_shapes_of_binary_problems(shape):
    torch.manual_seed(0)
    logits, target = torch.randn(shape, requires_grad=True), torch.randint(2, shape)
    draws = torch.randn(shape)
    each = E.ens_loss(logits, target, draws=draws, reduction="none")
    flat = E.ens_loss(logits.flatten(), target.flatten(), draws=draws.flatten(), reduction="none")
    assert each.shape == (6,)
    torch.testing.assert_close(each, flat.view(6, -1).sum(1))
    torch.testing.assert_close(E.ens_loss(logits, target, draws=draws), flat.sum() / 6)
    if shape == (6, 1):
        torch.testing.assert_close(E.ens_loss(logits, target[:, 0], draws=draws), flat.mean())


def test_one_versus_rest_is_the_sum_of_binary_problems_with_one_loss():
    torch.manual_seed(1)
    logits, target = torch.randn(5, 4, dtype=DOUBLE, requires_grad=True), torch.tensor([3, 0, 1, 1, 2])
    draws = torch.randn(5, 4, dtype=DOUBLE)
    margins = E.signed_margins(logits, target)
    signs = torch.tensor([[1.0 if target[i] == k else -1.0 for k in range(4)] for i in range(5)], dtype=DOUBLE)
    assert torch.equal(margins, signs * logits)
    g = slow_derivatives(margins.flatten().tolist(), draws.flatten().tolist(), 0.0).view(5, 4)
    loss = E.ens_loss(logits, target, draws=draws)
    torch.testing.assert_close(loss, (g * margins).sum() / 5)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, signs * g / 5)
    torch.testing.assert_close(E.ens_loss(logits, F.one_hot(target, 4), draws=draws), loss)


def test_draws_are_standard_normal_and_reproducible():
    logits, target = torch.linspace(-1, 0.9, 4000, dtype=DOUBLE), torch.ones(4000)
    run = lambda seed, **options: E.ens_loss(
        logits, target, generator=torch.Generator().manual_seed(seed), floor=None, shift=0, reduction="none", **options
    )
    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    u = (-run(0) / logits)[logits != 0]
    assert stats.kstest(u.log().numpy(), "norm").pvalue > 0.01
    torch.manual_seed(5)
    first = E.ens_loss(logits, target)
    assert first != E.ens_loss(logits, target)
    torch.manual_seed(5)
    assert first == E.ens_loss(logits, target)


# --- the criterion ------------------------------------------------------------------------------------------------


def test_criterion_equals_the_function_and_redraws_lambda():
    logits, target = torch.randn(8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1] * 4)
    criterion = E.EnsLoss(0.3, redraw_every=2, tail=False, generator=torch.Generator().manual_seed(1))
    mirror = torch.Generator().manual_seed(1)
    seen = []
    for call in range(6):
        if call in (2, 4):
            torch.rand((), generator=mirror)  # lambda
        value = criterion(logits, target)
        seen.append(criterion.box_cox)
        expected = E.ens_loss(logits, target, box_cox=criterion.box_cox, tail=False, generator=mirror)
        assert value == expected
    assert seen[0] == seen[1] == 0.3 and seen[2] == seen[3] != seen[1] and seen[4] == seen[5] != seen[3]
    assert all(-1 <= lam <= 1 for lam in seen)
    criterion.eval()
    for _ in range(5):
        criterion(logits, target)
    assert criterion.box_cox == seen[-1] and criterion.calls == 6
    other = E.EnsLoss()
    other.load_state_dict(pickle.loads(pickle.dumps(criterion.state_dict())))
    assert other.box_cox == criterion.box_cox and other.calls == 6
    assert copy.deepcopy(E.EnsLoss(0.2)).box_cox == 0.2


def test_redrawn_lambda_is_uniform():
    criterion = E.EnsLoss(generator=torch.Generator().manual_seed(0))
    draws = [criterion.redraw() for _ in range(500)]
    assert stats.kstest(draws, stats.uniform(-1, 2).cdf).pvalue > 0.01
    assert criterion.box_cox == draws[-1]


def test_criterion_takes_classes():
    logits, target = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 1, 2, 2, 0])
    E.EnsLoss()(logits, target).backward()
    assert (logits.grad.sign() == 1 - 2 * F.one_hot(target, 3)).all()


def test_training_separates_two_classes():
    torch.manual_seed(0)
    x = torch.randn(200, 2)
    y = (x @ torch.tensor([1.0, -2.0]) > 0).long()
    model, criterion = torch.nn.Linear(2, 1), E.EnsLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    assert ((model(x)[:, 0] > 0) == y).float().mean() > 0.97


# --- the conditions -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-3, 1)), min_size=1, max_size=5), st.booleans())
def test_is_calibrated_vector_equals_all_pairs(pairs, smooth):
    z, g = (torch.tensor(column, dtype=DOUBLE) for column in zip(*pairs, strict=True))
    expected = slow_is_calibrated(z.tolist(), g.tolist(), smooth)
    assert E.is_calibrated_vector(z, g, smooth=smooth) == expected
    if smooth and expected:
        E.interpolating_loss(z, g)
    elif smooth:
        with pytest.raises(ValueError, match="derivatives"):
            E.interpolating_loss(z, g)


def test_each_condition_is_needed():
    z = torch.tensor([-1.0, 0.0, 0.0, 1.0, 1.0])
    assert E.is_calibrated_vector(z, torch.tensor([-1, -0.5, -0.5, 0.0, 0.3]))
    assert not E.is_calibrated_vector(z, torch.tensor([-1, -0.5, -0.5, 0.0, 0.3]), smooth=True)  # a kink at 1
    assert not E.is_calibrated_vector(z, torch.tensor([-1, -0.5, -0.4, 0.0, 0.3]))  # a kink at 0
    assert not E.is_calibrated_vector(z, torch.tensor([-0.4, -0.5, -0.5, 0.0, 0.3]))  # concave
    assert not E.is_calibrated_vector(z, torch.tensor([-1, 0.0, 0.0, 0.0, 0.3]))  # flat at 0
    assert E.is_calibrated_vector(z, torch.tensor([-1, -0.5, -0.5 + 1e-9, 0.0, 0.0]), smooth=True, atol=1e-8)
    assert E.is_calibrated_vector(z, torch.tensor([-0.5, -0.5 - 1e-7, -0.5, 0.0, 0.0]), atol=1e-6)


@few
@given(seeds, st.sampled_from(["method", "any sign", "one side"]))
def test_interpolating_loss_has_every_property(seed, source):
    margins, draws = batch(seed)
    if source == "method":
        g = E.calibrated_derivatives(margins, draws)
    else:
        margins = margins.abs() + 0.01 if source == "one side" and seed % 2 else margins
        margins = -margins.abs() if source == "one side" and not seed % 2 else margins
        g = torch.zeros_like(margins).scatter(0, margins.argsort(), draws.sort().values)
        top = -0.01 - torch.rand(1, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
        g = torch.where(margins <= 0, g.minimum(top), g)
    if not E.is_calibrated_vector(margins, g):
        return
    phi = E.interpolating_loss(margins, g)
    torch.testing.assert_close(phi.derivative(margins), g, rtol=0, atol=1e-10)
    grid = torch.linspace(-12, 12, 4001, dtype=DOUBLE)
    values, slopes = phi(grid), phi.derivative(grid)
    assert (slopes.diff() >= -1e-12).all() and (values.diff().diff() >= -1e-10).all()  # convex
    assert phi.derivative(torch.zeros(1)).item() < 0 and phi(torch.zeros(1)).item() == 0
    end = phi.knots[-1] + torch.tensor([0.0, 1.0, 1e6], dtype=DOUBLE)
    assert (phi(end).diff() >= -1e-6).all()  # bounded below: it does not fall any more
    x = grid.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(phi(x).sum(), x)
    torch.testing.assert_close(gradient, slopes, rtol=1e-9, atol=1e-9)
    # The integral of the derivative, by the trapezoid rule with the knots on the grid: exact for a piecewise linear slope.
    points = torch.cat([grid, phi.knots[phi.knots.abs() < 12], grid.new_zeros(1)]).unique()
    area = torch.trapezoid(phi.derivative(points), points)
    torch.testing.assert_close(phi(points[-1]) - phi(points[0]), area, rtol=1e-9, atol=1e-9)


def test_interpolating_loss_puts_knots_where_they_are_needed():
    pairs = lambda z, g: E.interpolating_loss(torch.tensor(z, dtype=DOUBLE), torch.tensor(g, dtype=DOUBLE))
    at_zero = lambda loss: loss.derivative(torch.zeros(1)).item()
    assert at_zero(pairs([-1.0, 2.0], [-1.0, 0.5])) == pytest.approx(-0.5)  # the line is negative
    assert at_zero(pairs([-2.0, 1.0], [-1.0, 0.5])) == -0.5  # the line is at 0: half the slope on the left
    assert at_zero(pairs([1.0], [0.5])) == -1.0  # nothing on the left
    assert at_zero(pairs([1.0], [-0.5])) == -0.5
    left = pairs([-2.0], [-0.5])
    assert at_zero(left) == -0.5 and left.derivative(torch.tensor([1.0])).item() == 0
    assert pairs([-2.0, 2.0, 2.0], [-0.5, 1.0, 1.0]).knots.tolist() == [-2.0, 0.0, 2.0]
    later = E.interpolating_loss(torch.tensor([1.0]), torch.tensor([-0.5]), rise=4.0)
    assert later.derivative(torch.tensor([3.0, 5.0])).tolist() == [-0.25, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [1e6, 1e16, 1e20, 3e38])
def test_interpolating_loss_at_large_margins(dtype, far):
    margins, slopes = torch.tensor([-far, 1.0, far], dtype=dtype), torch.tensor([-1.0, -0.75, -0.5], dtype=dtype)
    loss = E.interpolating_loss(margins, slopes)
    torch.testing.assert_close(loss.derivative(margins), slopes.double())
    assert loss.derivative(margins.double() * 2)[2].item() == 0  # bounded below
    assert loss(margins).isfinite().all() and (loss(margins).diff() < 0).all()


def test_interpolating_loss_says_what_is_wrong():
    z = torch.tensor([1.0, -1.0, 1.0])
    for slopes, words in [
        ([-0.5, -0.25, -0.5], "got -0.25 and -0.5 at the margins -1 and 1"),
        ([-0.5, -1.0, -0.25], "got -0.5 and -0.25 at the margins 1 and 1"),
        ([0.5, 0.0, 0.5], "got 0 at the margin -1"),
    ]:
        with pytest.raises(ValueError, match=words):
            E.interpolating_loss(z, torch.tensor(slopes))


# --- calibration of losses and of their means -----------------------------------------------------------------------


def random_losses(seed, count, rows=8, lam=0.0):
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(count):
        margins = 3 * torch.randn(rows, generator=generator, dtype=DOUBLE)
        draws = torch.randn(rows, generator=generator, dtype=DOUBLE)
        losses.append(E.interpolating_loss(margins, E.calibrated_derivatives(margins, draws, box_cox=lam)))
    return losses


def scalar(derivative):
    return lambda t: float(derivative(torch.tensor([t], dtype=DOUBLE)))


@settings(deadline=None, max_examples=10)
@given(seeds)
def test_the_mean_of_calibrated_losses_is_calibrated(seed):
    losses = random_losses(seed, 30)
    mean = lambda z: torch.stack([loss(z) for loss in losses]).mean(0)
    knots = torch.cat([loss.knots for loss in losses]).unique()
    slopes = torch.stack([loss.derivative(knots) for loss in losses]).mean(0)
    slope = lambda t: float(np.interp(t, knots, slopes))  # the mean of piecewise linear slopes is one
    grid = torch.linspace(-8, 8, 801, dtype=DOUBLE)
    assert (mean(grid).diff().diff() >= -1e-10).all() and slope(0.0) < 0
    for eta in (0.3, 0.45, 0.55, 0.7):
        assert np.sign(minimizer(slope, eta)) == np.sign(2 * eta - 1)


@few
@given(seeds, st.integers(2, 6), lambdas)
def test_one_versus_rest_with_a_differentiable_loss_finds_the_bayes_class(seed, classes, lam):
    loss = random_losses(seed, 1, lam=lam)[0]
    p = np.random.default_rng(seed).dirichlet(np.ones(classes))
    scores = np.array([minimizer(scalar(loss.derivative), eta) for eta in p])
    order = np.argsort(p)
    assert (np.diff(scores[order])[np.diff(p[order]) > 1e-6] > 0).all()  # strictly increasing in the probability
    assert scores.argmax() == p.argmax()


def test_a_kink_ties_classes_and_a_mean_over_kinks_does_not():
    # Hinge: every t with eta < 1/2 has the minimizer -1.
    p = [0.4, 0.35, 0.25]
    grid = torch.linspace(-2, 2, 4001, dtype=DOUBLE)
    risk = lambda eta: (
        eta * E.margin_loss(grid, "hinge", reduction="none")
        + (1 - eta) * E.margin_loss(-grid, "hinge", reduction="none")
    )
    assert [round(grid[risk(eta).argmin()].item(), 6) for eta in p] == [-1, -1, -1]
    # The mean of (S - z)_+ over S uniform on (0, 2) is differentiable, with slope -P(S > z): no ties.
    scores = [minimizer(lambda z: -min(1.0, max(0.0, 1 - z / 2)), eta) for eta in p]
    assert scores[0] > scores[1] > scores[2]
    assert scores[0] == pytest.approx(-2 / 3)  # 0.4 = 0.6 (1 - |t| / 2)
    # One loss for each class, each of them calibrated: the order may turn around.
    shallow, steep = scalar(lambda z: -torch.sigmoid(-z)), scalar(lambda z: -torch.sigmoid(-20 * z))
    assert minimizer(shallow, 0.3) < minimizer(steep, 0.25)


@pytest.mark.parametrize("kind", ["logistic", "hinge", "exponential", "squared_hinge", "inverse_tail", "log_tail"])
def test_a_majority_class_is_found_by_any_calibrated_loss(kind):
    grid = torch.linspace(-6, 6, 12001, dtype=DOUBLE)
    loss = E.margin_loss(grid, kind, reduction="none")
    for p in ([0.55, 0.3, 0.15], [0.1, 0.65, 0.25]):
        scores = [grid[(eta * loss + (1 - eta) * loss.flip(0)).argmin()].item() for eta in p]
        assert [score > 0 for score in scores] == [eta > 0.5 for eta in p]


def test_the_perceptron_loss_is_not_calibrated():
    # At eta = 0.6 the risk 0.6 (-t)_+ + 0.4 t_+ is smallest at t = 0, where there is no sign.
    grid = torch.linspace(-2, 2, 401, dtype=DOUBLE)
    loss = E.margin_loss(grid, "perceptron", reduction="none")
    assert grid[(0.6 * loss + 0.4 * loss.flip(0)).argmin()].abs().item() < 1e-12


def test_tail_lemma():
    tail = lambda power, upto: integrate.quad(lambda s: math.exp(s * (1 - power)), 0, math.log(upto))[0]
    assert tail(1.5, 1e8) == pytest.approx(2, abs=1e-3)
    assert tail(1.0, 1e8) == pytest.approx(math.log(1e8))
    # The module's two tails with these slopes: bounded below by -1, and not.
    far = torch.tensor([1e3, 1e8], dtype=DOUBLE)
    assert (E.margin_loss(far, "inverse_tail", reduction="none") > -1).all()
    torch.testing.assert_close(E.margin_loss(far, "log_tail", reduction="none"), -far.log())


SLOPES = {
    "logistic": lambda z: -1 / (1 + math.exp(z)),
    "hinge": lambda z: -1.0 if z < 1 else 0.0,
    "exponential": lambda z: -math.exp(-z),
    "squared_hinge": lambda z: -2 * max(1 - z, 0),
    "perceptron": lambda z: -1.0 if z < 0 else 0.0,
    "sigmoid": lambda z: -math.exp(z) / (1 + math.exp(z)) ** 2,
    "exponential_tail": lambda z: -1.0 if z < 1 else -math.exp(1 - z),
    "inverse_tail": lambda z: -1.0 if z < 1 else -1 / z**2,
    "inverse_log_tail": lambda z: -1.0 if z < 1 else -math.e / ((z + math.e - 1) * math.log(z + math.e - 1) ** 2),
    "log_tail": lambda z: -1.0 if z < 1 else -1 / z,
}


@pytest.mark.parametrize("kind", SLOPES)
def test_fixed_losses_have_the_slopes_of_the_table(kind):
    points = [-5.0, -1.3, -0.2, 0.4, 0.99, 1.01, 2.5, 9.0]
    z = torch.tensor(points, dtype=DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(E.margin_loss(z, kind, reduction="sum"), z)
    torch.testing.assert_close(slope, torch.tensor([SLOPES[kind](p) for p in points], dtype=DOUBLE))
    assert torch.autograd.gradcheck(lambda z: E.margin_loss(z, kind), z)
    around = torch.tensor([1 - 1e-9, 1 + 1e-9], dtype=DOUBLE)
    assert E.margin_loss(around, kind, reduction="none").diff().abs() < 1e-8  # no jump
    big = torch.tensor([-1e4, 1e4], requires_grad=True)
    if kind != "exponential":
        value = E.margin_loss(big, kind, reduction="sum")
        value.backward()
        assert value.isfinite() and big.grad.isfinite().all()


def test_fixed_losses_equal_the_libraries():
    torch.manual_seed(0)
    logits, target = 3 * torch.randn(50, dtype=DOUBLE), torch.randint(2, (50,))
    margins = E.signed_margins(logits, target)
    bce = F.binary_cross_entropy_with_logits(logits, target.double())
    torch.testing.assert_close(E.margin_loss(margins), bce)
    assert E.margin_loss(margins, "hinge").item() == pytest.approx(hinge_loss(target, logits))
    rows = E.signed_margins(logits.view(10, 5), torch.arange(10) % 5)
    both = F.binary_cross_entropy_with_logits(
        logits.view(10, 5), F.one_hot(torch.arange(10) % 5, 5).double(), reduction="none"
    )
    torch.testing.assert_close(E.margin_loss(rows, reduction="none"), both.sum(1))


# --- extremes, dtypes, transforms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lam", [-1.0, 0.0, 1.0])
def test_extreme_margins(dtype, lam):
    logits = torch.tensor([1e4, -1e4, 0.0, 1e-30, 1e4], dtype=dtype, requires_grad=True)
    loss = E.ens_loss(logits, torch.tensor([1, 1, 0, 1, 0]), box_cox=lam, draws=8 * torch.linspace(-1, 1, 5).to(dtype))
    loss.backward()
    assert loss.dtype == dtype and loss.isfinite() and logits.grad.isfinite().all()
    assert logits.grad[0].abs() <= (1e-4 + 1.01e-6) / 5 and logits.grad[0] < 0


def test_a_batch_of_one_and_equal_margins():
    x = torch.tensor([0.3], requires_grad=True)
    E.ens_loss(x, torch.tensor([0]), draws=torch.tensor([-1.0]), shift=0).backward()
    assert x.grad.item() == pytest.approx(math.exp(-1))
    zeros = torch.zeros(6)
    g = E.calibrated_derivatives(zeros, torch.randn(6))
    assert (g == g[0]).all() and E.is_calibrated_vector(zeros, g, smooth=True)


def test_noncontiguous_input():
    logits, target = torch.randn(10, 6)[::2, ::3], torch.tensor([0, 1, 0, 0, 1])
    draws = torch.randn(5, 2)
    torch.testing.assert_close(
        E.ens_loss(logits, target, draws=draws.T.contiguous().T), E.ens_loss(logits.contiguous(), target, draws=draws)
    )


def test_half_precision_and_autocast():
    torch.manual_seed(0)
    logits, target, draws = torch.randn(64), torch.randint(2, (64,)), torch.randn(64)
    half = logits.bfloat16().requires_grad_()
    loss = E.ens_loss(half, target, draws=draws)
    loss.backward()
    wide = half.detach().float().requires_grad_()
    E.ens_loss(wide, target, draws=draws).backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.grad, wide.grad.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            E.ens_loss(logits, target, draws=draws), E.ens_loss(logits.clone(), target, draws=draws), rtol=0, atol=0
        )
        model = torch.nn.Linear(4, 1)
        E.ens_loss(model(torch.randn(64, 4)), target).backward()
    assert model.weight.grad.isfinite().all()


def test_long_vectors_of_bfloat16():
    margins, draws = torch.randn(2**14).bfloat16(), torch.randn(2**14).bfloat16()
    assert E.is_calibrated_vector(margins, E.calibrated_derivatives(margins, draws), atol=1e-2)


def test_transforms_and_compile():
    torch.manual_seed(0)
    logits, draws = torch.randn(3, 20, dtype=DOUBLE).mul(2).round() / 2, torch.randn(3, 20, dtype=DOUBLE)  # with ties
    target = torch.randint(2, (3, 20))
    loss = lambda x, y, d: E.ens_loss(x, y, draws=d)
    together = torch.func.vmap(torch.func.grad(loss))(logits, target, draws)
    for i in range(3):
        x = logits[i].clone().requires_grad_()
        loss(x, target[i], draws[i]).backward()
        torch.testing.assert_close(together[i], x.grad)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits[0], target[0], draws[0]), loss(logits[0], target[0], draws[0]))
    first = lambda x, y, d: E.ens_loss(x, y, draws=d, knots=(-1.0, 3.0, 20))
    torch.testing.assert_close(
        torch.func.vmap(first)(logits, target, draws),
        torch.stack([first(*each) for each in zip(logits, target, draws, strict=True)]),
    )
    compiled_first = torch.compile(first, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled_first(logits[0], target[0], draws[0]), first(logits[0], target[0], draws[0]))
    classes = torch.randint(20, (3,))
    torch.testing.assert_close(compiled(logits, classes, draws), loss(logits, classes, draws))


@pytest.mark.parametrize("wrong", [-100, -1, 2])
def test_wrong_classes_are_not_silent_in_a_compiled_graph_and_under_vmap(wrong):
    logits, target = torch.zeros(3, 2), torch.tensor([0, 1, wrong])
    assert torch.compile(lambda x, y: E.ens_loss(x, y), backend="aot_eager")(logits, target).isnan()
    rows = torch.func.vmap(lambda x, y: E.signed_margins(x[None], y[None])[0])(logits, target)
    assert rows.isnan().all(1).tolist() == [False, False, True]


def test_wrong_labels_are_not_silent_where_values_are_not_checked(monkeypatch):
    monkeypatch.setattr(E._checks, "known_false", lambda condition: False)  # as on an accelerator
    assert E.ens_loss(Z, torch.tensor([0.0, 0.5, 1.0])).isnan()
    assert E.ens_loss(Z, torch.tensor([-1, 1, 1])).isnan()
    for wrong in (-100, -1, 2):
        margins = E.signed_margins(torch.ones(3, 2), torch.tensor([0, 1, wrong]))
        assert margins[:2].tolist() == [[1, -1], [-1, 1]] and margins[2].isnan().all()
        assert E.ens_loss(torch.zeros(3, 2), torch.tensor([0, 1, wrong])).isnan()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_agrees_given_the_draws():
    torch.manual_seed(0)
    logits, target, draws = torch.randn(500), torch.randint(2, (500,)), torch.randn(500)
    there = E.ens_loss(logits.cuda(), target.cuda(), draws=draws.cuda(), reduction="none")
    torch.testing.assert_close(there.cpu(), E.ens_loss(logits, target, draws=draws, reduction="none"))


# --- bad input ----------------------------------------------------------------------------------------------------

Z, Y = torch.zeros(3), torch.tensor([0, 1, 1])
D = torch.tensor([0.0, 1.0], dtype=DOUBLE)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: E.inverse_box_cox(Z, 1.5), "lam"),
        (lambda: E.inverse_box_cox(Z, float("nan")), "lam"),
        (lambda: E.calibrated_derivatives(Z, torch.zeros(2)), "draws"),
        (lambda: E.calibrated_derivatives(Z * torch.nan, Z), "margins"),
        (lambda: E.calibrated_derivatives(Z, Z * torch.nan), "draws"),
        (lambda: E.calibrated_derivatives(Z[:0], Z[:0]), "margins"),
        (lambda: E.calibrated_derivatives(Z[None], Z[None]), "margins"),
        (lambda: E.calibrated_derivatives(Z, Z, floor=0.0), "floor"),
        (lambda: E.calibrated_derivatives(Z, Z, floor=0.5), "floor"),
        (lambda: E.calibrated_derivatives(Z, Z, floor=None, box_cox=-0.5), "floor"),
        (lambda: E.calibrated_derivatives(Z, Z, box_cox=-2.0), "box_cox"),
        (lambda: E.calibrated_derivatives(Z, Z, shift=-1e-6), "shift"),
        (lambda: E.drawn_slopes(Z, Z, knots=(0.0, 2.0, 4)), "draws"),
        (lambda: E.drawn_slopes(Z, Z, knots=(0.0, 0.5, 3)), "knots"),
        (lambda: E.drawn_slopes(Z, Z, knots=(2.0, 2.0, 3)), "knots"),
        (lambda: E.drawn_slopes(Z, Z, knots=(0.0, 2.0, 1)), "knots"),
        (lambda: E.drawn_slopes(Z, Z, knots=(0.0, float("inf"), 3)), "knots"),
        (lambda: E.drawn_slopes(Z, Z, knots=(0.0, 2.0, 3), shift=0), "shift"),
        (lambda: E.drawn_slopes(Z, Z, knots=(0.0, 2.0, 3), floor=None), "floor"),
        (lambda: E.drawn_slopes(Z * torch.nan, Z, knots=(0.0, 2.0, 3)), "margins"),
        (lambda: E.ens_loss(Z, Y, knots=(0.0, 2.0, 3), tail=False), "tail"),
        (lambda: E.ens_loss(Z, Y, knots=(0.0, 2.0, 3), draws=torch.zeros(4)), "draws"),
        (lambda: E.EnsLoss(knots=(0.0, 0.5, 3)), "knots"),
        (lambda: E.EnsLoss(knots=(0.0, 1.5, 3), tail=False), "tail"),
        (lambda: E.EnsLoss(floor=None).redraw(), "floor"),
        (lambda: E.expected_derivative(torch.tensor([1.2])), "quantile must lie in .* got 1.2"),
        (lambda: E.expected_derivative(Z, box_cox=2.0), "box_cox"),
        (lambda: E.expected_derivative(Z, floor=1.0), "floor"),
        (lambda: E.expected_derivative(Z, floor=None, box_cox=-1.0), "floor"),
        (lambda: E.ens_loss(Z, torch.tensor([-1, 1, 1])), "target must .* got -1"),
        (lambda: E.ens_loss(Z, torch.tensor([0.0, 0.5, 1.0])), "target must .* got 0.5"),
        (lambda: E.ens_loss(Z, Y[:2]), "target"),
        (lambda: E.ens_loss(Z[:, None], Y[None]), "target"),
        (lambda: E.ens_loss(torch.zeros(3, 2), torch.tensor([0, 1, 2])), "target"),
        (lambda: E.ens_loss(torch.zeros(3, 2), torch.tensor([0, 1])), "target"),
        (lambda: E.ens_loss(torch.zeros(3, 2, 2), Y), "logits"),
        (lambda: E.ens_loss(Z[:0], Y[:0]), "logits"),
        (lambda: E.ens_loss(Z / 0, Y), "logits"),
        (lambda: E.ens_loss(Z, Y, draws=torch.zeros(4)), "draws"),
        (lambda: E.ens_loss(Z, Y, reduction="average"), "reduction"),
        (lambda: E.ens_loss(Z, Y, floor=0), "floor"),
        (lambda: E.EnsLoss(2.0), "box_cox"),
        (lambda: E.EnsLoss(redraw_every=0), "redraw_every"),
        (lambda: E.EnsLoss(redraw_every=3, floor=None), "floor"),
        (lambda: E.EnsLoss(shift=-1.0), "shift"),
        (lambda: E.is_calibrated_vector(Z, Z[:2]), "derivatives"),
        (lambda: E.is_calibrated_vector(Z, Z / 0), "derivatives"),
        (lambda: E.is_calibrated_vector(Z, Z, atol=-1.0), "atol"),
        (lambda: E.interpolating_loss(Z, torch.tensor([-1.0, -2.0, -1.0])), "derivatives"),
        (lambda: E.interpolating_loss(Z, Z - 1, rise=0), "rise"),
        (lambda: E.PiecewiseQuadratic(D.flip(0), D), "knots must .* got .1.0, 0.0"),
        (lambda: E.PiecewiseQuadratic(D * 0, D), "knots"),
        (lambda: E.PiecewiseQuadratic(D[:1], D[:1]), "knots"),
        (lambda: E.PiecewiseQuadratic(D, D / 0), "slopes"),
        (lambda: E.PiecewiseQuadratic(D, D[:1]), "slopes"),
        (lambda: E.margin_loss(Z, "huber"), "kind"),
        (lambda: E.margin_loss(Z, ["hinge"]), "kind"),
        (lambda: E.margin_loss(torch.tensor(0.0)), "margins"),
        (lambda: E.margin_loss(Z, reduction="all"), "reduction"),
    ],
)
def test_bad_values_name_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: E.inverse_box_cox([0.0], 0.0), "x"),
        (lambda: E.inverse_box_cox(Z, "0"), "lam"),
        (lambda: E.calibrated_derivatives(Z, Z.double()), "draws"),
        (lambda: E.calibrated_derivatives(Z.long(), Z), "margins"),
        (lambda: E.ens_loss(Y, Y), "logits"),
        (lambda: E.ens_loss(Z, [0, 1, 1]), "target"),
        (lambda: E.ens_loss(Z, Y.to(torch.int32)), "target"),
        (lambda: E.ens_loss(torch.zeros(3, 2), torch.tensor([0.0, 1.0, 1.0])), "target"),
        (lambda: E.ens_loss(Z, Y, draws=Z.double()), "draws"),
        (lambda: E.drawn_slopes(Z, Z, knots=(0.0, 2.0)), "knots"),
        (lambda: E.drawn_slopes(Z, Z, knots=3), "knots"),
        (lambda: E.drawn_slopes(Z, Z.double(), knots=(0.0, 2.0, 3)), "draws"),
        (lambda: E.expected_derivative(0.5), "quantile"),
        (lambda: E.is_calibrated_vector(Z, Z.double()), "derivatives"),
        (lambda: E.EnsLoss(redraw_every=1.5), "redraw_every"),
        (lambda: E.PiecewiseQuadratic(D, D.float()), "slopes"),
        (lambda: E.PiecewiseQuadratic(D, D)(0.5), "z must"),
        (lambda: E.PiecewiseQuadratic(D, D).derivative([0.5]), "z must"),
        (lambda: E.margin_loss([0.0]), "margins"),
    ],
)
def test_bad_types_name_the_argument(call, name):
    with pytest.raises(TypeError, match=name):
        call()
