"""The theorems of chapter classification/z_loss as properties; the layer against dense SGD; limits, extremes and bad input."""

import copy
import math
import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lossbook.classification import z_loss as Z

seeds = st.integers(0, 2**31)
few = settings(deadline=None, max_examples=40)
HYPER = st.tuples(st.floats(0.05, 5), st.floats(-3, 15))


def random_logits(seed, rows=4, classes=None, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    classes = classes or int(torch.randint(2, 40, (), generator=g))
    scale = 10 ** float(torch.empty(()).uniform_(-2, 2, generator=g))
    logits = scale * torch.randn(rows, classes, generator=g, dtype=torch.float64) + scale
    target = torch.randint(classes, (rows,), generator=g)
    return logits.to(dtype).requires_grad_(), target


def slow_z(row, c):
    mean = sum(row) / len(row)
    return (row[c] - mean) / math.sqrt(sum((x - mean) ** 2 for x in row) / len(row))


def slow_z_loss(logits, target, a, b):
    """The definition, in Python floats."""
    values = []
    for row, c in zip(logits.tolist(), target.tolist(), strict=True):
        t = a * (b - slow_z(row, c))
        values.append((max(t, 0) + math.log1p(math.exp(-abs(t)))) / a)
    return torch.tensor(values, dtype=torch.float64)


def squared_error(statistics, classes):
    return Z.squared_error_from_statistics(*statistics, classes)


def taylor(statistics, classes):
    return Z.taylor_softmax_from_statistics(*statistics, classes)


def spherical(statistics, classes):
    return Z.spherical_softmax_from_statistics(*statistics, classes, eps=0.1)


def z_mild(statistics, classes):
    return Z.z_loss_from_statistics(*statistics, classes, a=0.5, b=2.0)


LOSSES = {"z": z_mild, "squared error": squared_error, "taylor": taylor, "spherical": spherical}
RATES = {"z": 0.3, "squared error": 0.05, "taylor": 0.3, "spherical": 0.02}


# --- the losses -------------------------------------------------------------------------------------------------------


@few
@given(seeds, HYPER)
def test_z_loss_equals_the_definition(seed, hyper):
    a, b = hyper
    logits, target = random_logits(seed)
    got = Z.z_loss(logits, target, a=a, b=b, reduction="none")
    torch.testing.assert_close(got, slow_z_loss(logits, target, a, b), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(Z.z_loss(logits, target, a=a, b=b), got.mean())
    torch.testing.assert_close(Z.z_loss(logits, target, a=a, b=b, reduction="sum"), got.sum())
    statistics = Z.spherical_statistics(logits, target)
    again = Z.z_loss_from_statistics(*statistics, logits.shape[1], a=a, b=b)
    torch.testing.assert_close(again, got, rtol=1e-9, atol=1e-11)


@few
@given(seeds, HYPER)
def test_gradient_formulas(seed, hyper):
    a, b = hyper
    logits, target = random_logits(seed)
    d = logits.shape[1]
    (grad,) = torch.autograd.grad(Z.z_loss(logits, target, a=a, b=b, reduction="sum"), logits)
    three = [x.detach().requires_grad_() for x in Z.spherical_statistics(logits, target)]
    partials = torch.autograd.grad(Z.z_loss_from_statistics(*three, d, a=a, b=b).sum(), three)
    for i, (row, c) in enumerate(zip(logits.tolist(), target.tolist(), strict=True)):
        mean = sum(row) / d
        std = math.sqrt(sum((x - mean) ** 2 for x in row) / d)
        z = [(x - mean) / std for x in row]
        psi = -1 / (1 + math.exp(-a * (b - z[c])))
        wanted = [-psi / (d * std) * (1 + z[c] * z[k] - d * (k == c)) for k in range(d)]
        torch.testing.assert_close(grad[i], torch.tensor(wanted, dtype=torch.float64), rtol=1e-7, atol=1e-11 / std)
        by_sum = psi * (-1 / (d * std) + z[c] * mean / (d * std**2))
        by_square = -psi * z[c] / (2 * d * std**2)
        for got, value in zip(partials, (by_sum, by_square, psi / std), strict=True):
            assert got[i].item() == pytest.approx(value, rel=1e-6, abs=1e-9 * max(1, 1 / std**2))


def test_worked_example():
    o, c = torch.tensor([[1.0, 0, 0, -1]], dtype=torch.float64), torch.tensor([0])
    three = [x.requires_grad_() for x in Z.spherical_statistics(o, c)]
    loss = Z.z_loss_from_statistics(*three, 4, a=1.0, b=0.0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-math.sqrt(2))), abs=1e-14)
    by_sum, by_square, by_target = torch.autograd.grad(loss.sum(), three)
    assert by_target.item() == pytest.approx(-0.276578, abs=6e-7)
    assert by_sum.item() == pytest.approx(0.069144, abs=6e-7) == by_square.item()


@few
@given(seeds, st.floats(0.01, 100), st.floats(-100, 100))
def test_shift_and_scale_change_nothing(seed, scale, shift):
    logits, target = random_logits(seed)
    logits = (logits / logits.std()).detach().requires_grad_()
    loss = Z.z_loss(logits, target, a=0.7, b=1.0, reduction="none")
    moved = Z.z_loss(scale * logits + shift, target, a=0.7, b=1.0, reduction="none")
    torch.testing.assert_close(moved, loss, rtol=1e-9, atol=1e-9)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert grad.sum(1).abs().max() < 1e-11 * (1 + grad.abs().max())
    assert (grad * logits).sum(1).abs().max() < 1e-11 * (1 + (grad * logits).abs().max())


@few
@given(seeds, HYPER)
def test_identities_of_the_partials(seed, hyper):
    logits, target = random_logits(seed)
    three = [x.detach().requires_grad_() for x in Z.spherical_statistics(logits, target)]
    d = logits.shape[1]
    loss = Z.z_loss_from_statistics(*three, d, a=hyper[0], b=hyper[1])
    by_sum, by_square, by_target = torch.autograd.grad(loss.sum(), three)
    total, total_sq, target_logit = (x.detach() for x in three)
    for terms in (
        (2 * by_square * total, d * by_sum, by_target),
        (2 * by_square * total_sq, by_sum * total, by_target * target_logit),
    ):
        assert (sum(terms).abs() <= 1e-9 * sum(t.abs() for t in terms) + 1e-13).all()


@few
@given(seeds)
def test_family_gradient_is_a_sum_of_three_vectors(seed):
    logits, target = random_logits(seed)
    d = logits.shape[1]
    for loss in LOSSES.values():
        three = [x.detach().requires_grad_() for x in Z.spherical_statistics(logits, target)]
        by_sum, by_square, by_target = torch.autograd.grad(loss(three, d).sum(), three, allow_unused=True)
        by_sum = torch.zeros_like(by_square) if by_sum is None else by_sum
        terms = by_sum[:, None], 2 * by_square[:, None] * logits, by_target[:, None] * F.one_hot(target, d)
        (grad,) = torch.autograd.grad(loss(Z.spherical_statistics(logits, target), d).sum(), logits)
        assert ((grad - sum(terms)).abs() <= 1e-9 * sum(x.abs() for x in terms) + 1e-300).all()


@few
@given(seeds)
def test_other_members_equal_their_definitions(seed):
    logits, target = random_logits(seed)
    three = Z.spherical_statistics(logits, target)
    d = logits.shape[1]
    onehot = F.one_hot(target, d).double()
    expansion = 1 + logits + logits.square() / 2
    square = logits.square() + 0.1
    pick = target[:, None]
    for got, wanted in (
        (squared_error(three, d), (logits - onehot).square().sum(1)),
        (taylor(three, d), -(expansion / expansion.sum(1, keepdim=True)).gather(1, pick).squeeze(1).log()),
        (spherical(three, d), -(square / square.sum(1, keepdim=True)).gather(1, pick).squeeze(1).log()),
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_limits_of_the_sharpness():
    logits, target = random_logits(3, rows=20, classes=8)
    z = torch.tensor([slow_z(r, c) for r, c in zip(logits.tolist(), target.tolist(), strict=True)], dtype=torch.float64)
    hinge = Z.z_loss(logits, target, a=1e4, b=0.5, reduction="none")
    assert (hinge - (0.5 - z).clamp(min=0)).abs().max() <= 1e-4 * math.log(2) + 1e-12
    small = Z.z_loss(logits, target, a=1e-6, b=0.5, reduction="none") - math.log(2) / 1e-6
    torch.testing.assert_close(small, (0.5 - z) / 2, rtol=0, atol=1e-5)


def test_value_at_b_and_largest_z():
    o = torch.eye(10, dtype=torch.float64)[:1]
    assert Z.z_loss(o, torch.tensor([0]), a=0.4, b=3.0).item() == pytest.approx(math.log(2) / 0.4, abs=1e-14)
    assert slow_z(o[0].tolist(), 0) == pytest.approx(3)


@few
@given(seeds, HYPER)
def test_bounds(seed, hyper):
    a, b = hyper
    logits, target = random_logits(seed)
    loss = Z.z_loss(logits, target, a=a, b=b, reduction="none")
    top = math.sqrt(logits.shape[1] - 1)
    low, high = (math.log1p(math.exp(a * (b - t))) / a for t in (top, -top))
    assert (loss >= low - 1e-10).all() and (loss <= high + 1e-10).all()


def test_gradcheck_of_losses():
    logits, target = random_logits(4, classes=6)
    logits = (logits / logits.std()).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda o: Z.z_loss(o, target, a=0.5, b=2.0), logits)
    assert torch.autograd.gradgradcheck(lambda o: Z.z_loss(o, target, a=0.5, b=2.0), logits)
    for loss in LOSSES.values():
        assert torch.autograd.gradcheck(lambda o, f=loss: f(Z.spherical_statistics(o, target), 6), logits)


# --- ranks ------------------------------------------------------------------------------------------------------------


@few
@given(seeds)
def test_the_guarantee(seed):
    logits, target = random_logits(seed, rows=30)
    d = logits.shape[1]
    z = torch.tensor([slow_z(r, c) for r, c in zip(logits.tolist(), target.tolist(), strict=True)], dtype=torch.float64)
    k = Z.in_top_k_guarantee(z, d)
    for row, c, zc, kc in zip(logits.tolist(), target.tolist(), z.tolist(), k.tolist(), strict=True):
        rank = sum(x >= row[c] for x in row)
        assert rank <= kc <= d
        assert kc == d if zc <= 0 else kc <= d / (1 + zc**2) + 1 or kc == 1


def test_the_guarantee_is_tight():
    for d in range(3, 200):
        for k in (1, 2, d - 1):
            o = torch.zeros(d, dtype=torch.float64)
            o[:k] = 1  # k classes tie at the top: the z-score that just guarantees rank k
            z = torch.tensor([slow_z(o.tolist(), 0)], dtype=torch.float64)
            assert Z.in_top_k_guarantee(z, d).item() == Z.in_top_k_guarantee(z.float(), d).item() == k
    assert Z.in_top_k_guarantee(torch.tensor([math.sqrt(1999) + 1e-9], dtype=torch.float64), 10_000).item() == 5


def test_topk_error():
    logits, target = random_logits(5, rows=50, classes=12)
    rounded = (logits / logits.std()).round()  # with ties
    ranks = [sum(x >= row[c] for x in row) for row, c in zip(rounded.tolist(), target.tolist(), strict=True)]
    wanted = [sum(r > k for r in ranks) / 50 for k in (1, 3, 12)]
    assert Z.topk_error(rounded, target, (1, 3, 12)).tolist() == pytest.approx(wanted) and wanted[2] == 0
    assert Z.topk_error(torch.full((2, 3), math.nan), torch.tensor([0, 1]), [1]).item() == 1


# --- the layer against dense SGD --------------------------------------------------------------------------------------


def dense_step(weight, hidden, target, loss, rate, decay=0.0, bias=True):
    """One step of dense SGD by autograd; what the loss and the gradient for hidden are."""
    weight, h = weight.clone().requires_grad_(), hidden.detach().clone().requires_grad_()
    logits = (torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1) if bias else h) @ weight.T
    value = loss(Z.spherical_statistics(logits, target), len(weight)).mean()
    value.backward()
    return (1 - rate * decay) * (weight.detach() - rate * weight.grad), value.item(), h.grad


def draw(g, rows=6, width=6, classes=50):
    target = torch.randint(classes, (rows,), generator=g)
    target[1] = target[0]  # a class that repeats
    return torch.randn(rows, width, generator=g, dtype=torch.float64).requires_grad_(), target


def layer_step(layer, hidden, target, loss, rate, decay=0.0):
    value = loss(layer(hidden, target), layer.num_classes).mean()
    value.backward()
    layer.step(rate, decay)
    return value.item()


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("name", LOSSES)
def test_three_hundred_steps_equal_dense_sgd(name, decay):
    torch.manual_seed(0)
    layer = Z.SphericalOutput(6, 50, dtype=torch.float64)
    g, weight = torch.Generator().manual_seed(1), layer.weight
    for _ in range(300):
        hidden, target = draw(g)
        weight, value, grad = dense_step(weight, hidden, target, LOSSES[name], RATES[name], decay)
        assert layer_step(layer, hidden, target, LOSSES[name], RATES[name], decay) == pytest.approx(value, rel=1e-9)
        torch.testing.assert_close(hidden.grad, grad, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(layer.weight, weight, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(layer.gram, weight.T @ weight, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(layer.column_sum, weight.sum(0), rtol=1e-9, atol=1e-10)
    assert layer.gram_error() < 1e-10
    if name != "squared error":  # else a wrong inverse would be repaired by refactoring, and not be seen
        assert not layer.refactorizations


@few
@given(seeds, st.integers(1, 9), st.integers(1, 5), st.integers(2, 30), st.booleans(), st.booleans(), st.sampled_from(sorted(LOSSES)))  # fmt: skip
def test_one_step_equals_dense_sgd(seed, rows, width, classes, bias, centred, name):
    torch.manual_seed(seed % 1000)
    layer = Z.SphericalOutput(width, classes, bias=bias, centred=centred, dtype=torch.float64, tolerance=1.0)
    layer.omega += torch.randn(width + bias, dtype=torch.float64) / 10  # factors that are not where they begin
    layer.U += torch.randn(width + bias, width + bias, dtype=torch.float64) / 10
    layer.U_inv = torch.linalg.inv(layer.U)
    weight = layer.weight
    layer.gram, layer.column_sum = weight.T @ weight, weight.sum(0)
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64).requires_grad_()
    target = torch.randint(classes, (rows,), generator=g)
    wanted, value, grad = dense_step(weight, hidden, target, LOSSES[name], 0.1, 0.2, bias)
    if not math.isfinite(value) or not (wanted.abs() < 100).all():  # standard deviation zero, or close to it
        return
    assert layer_step(layer, hidden, target, LOSSES[name], 0.1, 0.2) == pytest.approx(value, rel=1e-8)
    torch.testing.assert_close(hidden.grad, grad, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(layer.weight, wanted, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(layer.gram, wanted.T @ wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.column_sum, wanted.sum(0), rtol=1e-6, atol=1e-6)


def test_weight_decay_scales_the_inverse_too():
    """A wrong inverse would be repaired by refactoring, and not be seen in the weights."""
    torch.manual_seed(0)
    layer = Z.SphericalOutput(6, 50, dtype=torch.float64)
    hidden, target = draw(torch.Generator().manual_seed(11))
    layer_step(layer, hidden, target, z_mild, 0.5, 0.5)
    torch.testing.assert_close(layer.U @ layer.U_inv, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-13)
    layer_step(layer, hidden, target, z_mild, 0.5, 0.5)
    assert layer.write_error < 1e-14 and not layer.refactorizations


def test_a_batch_of_one_and_a_frozen_network():
    torch.manual_seed(0)
    layer = Z.SphericalOutput(4, 9, dtype=torch.float64)
    hidden, target = torch.randn(1, 4, dtype=torch.float64), torch.tensor([8])
    weight, value, _ = dense_step(layer.weight, hidden, target, z_mild, 1.0)
    assert layer_step(layer, hidden, target, z_mild, 1.0) == pytest.approx(value)
    torch.testing.assert_close(layer.weight, weight)
    assert hidden.grad is None


def test_column_sums_and_norm():
    torch.manual_seed(0)
    z, squared = (Z.SphericalOutput(6, 50, dtype=torch.float64, centred=False) for _ in range(2))
    start, start_squared = z.weight.sum(0), squared.weight.sum(0)
    g = torch.Generator().manual_seed(2)
    norms = [z.weight.norm()]
    for _ in range(30):
        hidden, target = draw(g)
        layer_step(z, hidden, target, z_mild, 0.3)
        layer_step(squared, hidden, target, squared_error, 0.05)
        norms.append(z.weight.norm())
    torch.testing.assert_close(z.weight.sum(0), start, rtol=0, atol=1e-12)
    torch.testing.assert_close(z.column_sum, start, rtol=0, atol=1e-12)
    assert (squared.weight.sum(0) - start_squared).norm() > 0.1
    assert all(later > earlier for earlier, later in zip(norms, norms[1:], strict=False))


def test_norm_grows_by_the_squared_gradient():
    torch.manual_seed(0)
    layer = Z.SphericalOutput(6, 50, dtype=torch.float64)
    hidden, target = draw(torch.Generator().manual_seed(3))
    before = layer.weight
    layer_step(layer, hidden, target, z_mild, 0.7)
    moved = (layer.weight - before).square().sum()
    assert layer.weight.square().sum().item() == pytest.approx((before.square().sum() + moved).item(), rel=1e-12)


def test_centring_leaves_centred_logits():
    torch.manual_seed(0)
    plain = Z.SphericalOutput(4, 20, dtype=torch.float64, centred=False)
    torch.manual_seed(0)
    centred = Z.SphericalOutput(4, 20, dtype=torch.float64)
    hidden, target = torch.randn(5, 4, dtype=torch.float64), torch.arange(5)
    logits = plain.logits(hidden)
    torch.testing.assert_close(centred.logits(hidden), logits - logits.mean(1, keepdim=True), rtol=0, atol=1e-12)
    torch.testing.assert_close(z_mild(centred(hidden, target), 20), z_mild(plain(hidden, target), 20))
    assert centred.gram_error() < 1e-14 and centred.column_sum.abs().max() == 0


def test_either_sign_of_the_quadratic_term_and_zero():
    """z_c < 0 expands, z_c > 0 contracts, z_c = 0 leaves the inverse alone."""
    for logit in (-1.0, 0.0, 1.0):
        layer = Z.SphericalOutput(2, 3, bias=False, centred=False, dtype=torch.float64)
        layer.V[:] = torch.tensor([[logit, 0.3], [1.0, -0.3], [-1.0, 0.7]])
        layer.refactor()
        layer_step(layer, torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0]), z_mild, 1.0)
        sign = (layer.U[0, 0] - 1).sign().item()
        assert sign == -math.copysign(1, logit) if logit else abs(layer.U[0, 0] - 1) < 1e-12
        torch.testing.assert_close(layer.U @ layer.U_inv, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-10)


# --- errors, and what they decide -------------------------------------------------------------------------------------


def long_run(layer, steps, rate=10.0, seed=0, watch=lambda step: None):
    """Noisy class vectors under the Z-loss (0.1, 10): a run in which U loses its digits."""
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(layer.num_classes, layer.hidden_features, generator=g, dtype=torch.float64)
    for step in range(steps):
        target = torch.randint(layer.num_classes, (64,), generator=g)
        noise = torch.randn(64, layer.hidden_features, generator=g, dtype=torch.float64)
        hidden = torch.tanh(centers[target] + 0.5 * noise)
        Z.z_loss_from_statistics(*layer(hidden, target), layer.num_classes, a=0.1, b=10.0).mean().backward()
        layer.step(rate)
        watch(step)


def new_layer(dtype, **options):
    torch.manual_seed(0)
    return Z.SphericalOutput(31, 500, dtype=dtype, **options)


def test_without_refactorization_the_layer_loses_its_digits():
    layer = new_layer(torch.float64, tolerance=1.0)
    errors = {}
    long_run(layer, 801, watch=lambda t: errors.update({t: layer.gram_error()}) if t % 400 == 0 else None)
    assert not layer.refactorizations and layer.condition_number() > 1e6
    assert errors[400] > 100 * errors[0] and errors[800] > 100 * errors[400] and errors[800] > 1e-10


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_measured_error_keeps_both_errors_small(dtype, tolerance):
    layer, grams = new_layer(dtype), []
    assert layer.tolerance == tolerance
    long_run(layer, 1000, watch=lambda step: grams.append(layer.gram_error()) if step % 20 == 0 else None)
    assert max(grams) <= 10 * tolerance
    periods = [r.steps for r in layer.refactorizations]
    assert 1 <= len(periods) <= 15 and sum(periods) <= 1000 and min(periods) > 20
    for r in layer.refactorizations:
        assert r.write_error > tolerance / 100 and r.gram_error <= 10 * tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_change_that_arrives_measured_from_outside(dtype, tolerance):
    """Dense weights before and after a step, against the gradient by autograd; just before the layer refactors, and after."""
    layer, worst = new_layer(dtype), 0.0
    g = torch.Generator().manual_seed(0)
    centers = torch.randn(500, 31, generator=g, dtype=torch.float64)

    def exact(one):
        return one.V.double() @ one.U + one.omega

    for step in range(500):
        target = torch.randint(500, (64,), generator=g)
        hidden = torch.tanh(centers[target] + 0.5 * torch.randn(64, 31, generator=g, dtype=torch.float64))
        before, folded = exact(layer), len(layer.refactorizations)
        steep = lambda three, classes: Z.z_loss_from_statistics(*three, classes, a=0.1, b=10.0)  # noqa: E731
        layer_step(layer, hidden, target, steep, 10.0)
        if step % 10 == 0 and len(layer.refactorizations) == folded:
            wanted, *_ = dense_step(before, hidden, target, steep, 10.0)
            rows = target.unique()
            worst = max(worst, ((exact(layer) - wanted)[rows].norm() / before[rows].norm()).item())
    assert layer.refactorizations and tolerance / 1000 < worst < 10 * tolerance, worst


def test_a_tighter_tolerance_refactors_more_often():
    counts = []
    for tolerance in (1e-15, 1e-13, 1e-8):
        layer = new_layer(torch.float64, tolerance=tolerance)
        long_run(layer, 600)
        counts.append(len(layer.refactorizations))
    assert counts[0] > counts[1] > counts[2] == 0, counts


def test_the_write_error_is_the_error_of_the_write():
    """Spoil the inverse by a known amount: the change that arrives in W is wrong by the error that the step reports."""
    torch.manual_seed(0)
    layer = Z.SphericalOutput(6, 50, dtype=torch.float64, tolerance=1.0)
    exact = copy.deepcopy(layer)
    layer.U_inv += 1e-4 * torch.randn(7, 7, dtype=torch.float64)
    hidden, target = draw(torch.Generator().manual_seed(4))
    rows = layer.weight[target.unique()].norm()  # each class once
    for one in (layer, exact):
        layer_step(one, hidden, target, z_mild, 0.3)
    wrong = (layer.weight - exact.weight).norm()
    assert layer.write_error == pytest.approx((wrong / rows).item(), rel=1e-6) and layer.write_error > 1e-6
    spoiled = copy.deepcopy(exact)
    spoiled.tolerance = spoiled._limit = 1e-8
    spoiled.U_inv += 1e-4 * torch.randn(7, 7, dtype=torch.float64)
    layer_step(spoiled, hidden, target, z_mild, 0.3)
    layer_step(exact, hidden, target, z_mild, 0.3)
    torch.testing.assert_close(spoiled.weight, exact.weight, rtol=0, atol=1e-13)  # refactored instead of written
    assert len(spoiled.refactorizations) == 1 and spoiled.refactorizations[0].write_error > 1e-8


def test_a_bad_gram_matrix_tightens_the_limit():
    layer = new_layer(torch.float64)
    long_run(layer, 5)
    layer.gram[0, 0] *= 1 + 1e-6
    layer.U_inv[0, 0] *= 1 + 1e-6
    long_run(layer, 1)
    found = layer.refactorizations[-1]
    assert found.steps == 6 and found.gram_error > 1e-9 and layer._limit == pytest.approx(1e-13, abs=0)
    assert layer.gram_error() < 1e-13
    layer.U_inv[0, 0] *= 1 + 1e-6  # and once more, with a good Gram matrix: the limit rises again
    long_run(layer, 1)
    assert len(layer.refactorizations) == 2 and layer._limit == pytest.approx(1e-12, abs=0)


def test_a_singular_step_is_done_by_refactoring():
    """Squared error at rate 1 / (2 |h|^2) projects W along h: A has no inverse, the step is exact all the same."""
    torch.manual_seed(0)
    layer = Z.SphericalOutput(3, 10, bias=False, dtype=torch.float64)
    hidden, target = torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.float64), torch.tensor([4])
    weight, *_ = dense_step(layer.weight, hidden, target, squared_error, 1 / 18, bias=False)
    layer_step(layer, hidden, target, squared_error, 1 / 18)
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-13)
    assert len(layer.refactorizations) == 1 and layer.gram_error() < 1e-13
    torch.testing.assert_close(layer.U, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_refactor_leaves_the_weight(dtype):
    layer = new_layer(dtype)
    long_run(layer, 20)
    before, condition = layer.weight, layer.condition_number()
    layer.refactor()
    atol = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=atol)
    assert condition > 1.5 and layer.condition_number() == 1 and layer.gram_error() < 1e-13
    assert layer.refactorizations[-1].steps == 20 and layer.refactorizations[-1].write_error == 0


def test_refactor_between_forward_and_step():
    one, other = (new_layer(torch.float64) for _ in range(2))
    g = torch.Generator().manual_seed(5)
    hidden, target = draw(g, width=31, classes=500)
    for layer in (one, other):
        loss = z_mild(layer(hidden, target), 500).mean()
        loss.backward()
        if layer is other:
            layer.refactor()
        layer.step(2.0)
    torch.testing.assert_close(one.weight, other.weight)


# --- cost -------------------------------------------------------------------------------------------------------------


def test_the_step_does_not_depend_on_the_number_of_classes():
    """What a step touches: rows of V of the batch's classes, nothing else that has D in its shape."""
    torch.manual_seed(0)
    sizes = {}

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    sizes["largest"] = max(sizes.get("largest", 0), 0 if tensor is layer.V else tensor.numel())
            return out

    for classes in (100, 20_000):
        layer = Z.SphericalOutput(15, classes)
        hidden, target = torch.randn(8, 15), torch.randint(classes, (8,))
        with Recorder():
            layer_step(layer, hidden, target, z_mild, 0.1)
        assert sizes.pop("largest") <= 16 * 16


def test_time_of_a_step_is_flat_in_the_number_of_classes():
    def milliseconds(classes):
        layer = Z.SphericalOutput(63, classes)
        seconds = []
        for _ in range(40):
            hidden, target = torch.randn(32, 63), torch.randint(classes, (32,))
            start = time.perf_counter()
            layer_step(layer, hidden, target, z_mild, 1.0)
            seconds.append(time.perf_counter() - start)
        assert not layer.refactorizations
        return statistics.median(seconds[10:])

    attempts = []
    for _ in range(3):  # a busy machine may spoil one
        attempts.append(milliseconds(200_000) / milliseconds(1_000))
        if attempts[-1] < 2:
            break
    assert min(attempts) < 2, attempts


# --- state, devices, transforms ---------------------------------------------------------------------------------------


def test_state_dict_round_trip_and_no_parameters():
    layer = new_layer(torch.float64)
    long_run(layer, 10)
    other = Z.SphericalOutput(31, 500, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    assert set(layer.state_dict()) == {"V", "U", "U_inv", "omega", "gram", "column_sum", "_extra_state"}
    assert list(layer.parameters()) == []
    for one in (layer, other):
        long_run(one, 3, seed=1)
    torch.testing.assert_close(layer.weight, other.weight, rtol=0, atol=0)
    layer._limit = 1e-13  # learned
    other.load_state_dict(layer.state_dict())
    assert other._limit == 1e-13 and other._steps == layer._steps == 13
    other = Z.SphericalOutput(31, 500, dtype=torch.float64, tolerance=1e-14)
    other.load_state_dict(layer.state_dict())
    assert other._limit == 1e-14  # never above the layer's own tolerance


def test_loading_a_wider_layer_and_dropping_the_batch():
    layer, narrow = new_layer(torch.float64), new_layer(torch.float32)
    long_run(layer, 10)
    hidden, target = draw(torch.Generator().manual_seed(12), width=31, classes=500)
    z_mild(narrow(hidden, target), 500).mean().backward()
    narrow.load_state_dict(layer.state_dict())
    torch.testing.assert_close(narrow.weight.double(), layer.weight, rtol=1e-6, atol=1e-6)
    assert narrow.gram_error() < 1e-14
    assert narrow._limit == narrow.tolerance  # a limit of float64 would call for a refactorization at every step
    with pytest.raises(RuntimeError, match="backward"):
        narrow.step(1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_chunk_of_the_classes(monkeypatch, dtype):
    whole = new_layer(dtype)
    monkeypatch.setattr(Z, "_CHUNK", 7)
    layer = new_layer(dtype)
    weight = layer.V.double() + layer.omega
    torch.testing.assert_close(layer.gram, weight.T @ weight, rtol=1e-9, atol=1e-9)
    for one in (whole, layer):
        long_run(one, 10)
        one.refactor()
    atol = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(layer.weight, whole.weight, rtol=0, atol=atol)
    torch.testing.assert_close(layer.V, whole.V, rtol=0, atol=atol)
    torch.testing.assert_close(layer.column_sum, layer.V.double().sum(0))
    assert layer.gram_error() < 1e-13
    layer.gram += 1e-3 * torch.eye(32, dtype=torch.float64)
    dense = layer.V.double()
    wanted = (layer.gram - dense.T @ dense).norm() / (dense.T @ dense).norm()
    assert layer.gram_error() == pytest.approx(wanted.item(), rel=1e-6)


def test_a_waiting_batch():
    """It survives a look at other data without gradients, and not a cast."""
    one, other = (new_layer(torch.float64) for _ in range(2))
    hidden, target = draw(torch.Generator().manual_seed(14), width=31, classes=500)
    for layer in (one, other):
        z_mild(layer(hidden, target), 500).mean().backward()
    with torch.no_grad():
        one(hidden.detach() + 1, target)
    one.step(1.0)
    other.step(1.0)
    torch.testing.assert_close(one.weight, other.weight, rtol=0, atol=0)
    z_mild(one(hidden, target), 500).mean().backward()
    one.float()
    with pytest.raises(RuntimeError, match="backward"):
        one.step(1.0)


def test_buffers_are_written_in_place():
    layer = new_layer(torch.float64)
    before = {name: buffer.data_ptr() for name, buffer in layer.named_buffers()}
    long_run(layer, 3)
    layer.refactor()
    assert before == {name: buffer.data_ptr() for name, buffer in layer.named_buffers()}


def test_a_discarded_gradient_warns():
    layer = new_layer(torch.float64)
    hidden, target = draw(torch.Generator().manual_seed(13), width=31, classes=500)
    layer(hidden, target)
    z_mild(layer(hidden, target), 500).mean().backward()
    with pytest.warns(UserWarning, match="discarded"):
        layer(hidden, target)


def test_casting_keeps_the_factors_wide_and_the_gram_matrix_right():
    layer = new_layer(torch.float64)
    long_run(layer, 10)
    before = layer.weight
    layer.float()
    assert layer.V.dtype == torch.float32 and layer.U.dtype == layer.gram.dtype == torch.float64
    assert layer.tolerance == 1e-5 and layer.gram_error() < 1e-14
    torch.testing.assert_close(layer.weight.double(), before, rtol=1e-6, atol=1e-6)
    long_run(layer, 5)
    before = layer.weight
    layer.double()
    assert layer.V.dtype == torch.float64 and layer.tolerance == 1e-12
    torch.testing.assert_close(layer.weight, before.double(), rtol=1e-6, atol=1e-6)
    for cast in ("half", "bfloat16"):
        with pytest.raises(TypeError, match="float32 or float64"):
            getattr(layer, cast)()
    assert layer.V.dtype == torch.float64
    tight = Z.SphericalOutput(3, 5, tolerance=1e-14, dtype=torch.float64).float()
    assert tight.tolerance == torch.finfo(torch.float32).eps


def test_evaluation():
    layer = new_layer(torch.float64)
    long_run(layer, 10)
    hidden = torch.randn(7, 31, dtype=torch.float64)
    logits = F.pad(hidden, (0, 1), value=1.0) @ layer.weight.T
    torch.testing.assert_close(layer.logits(hidden), logits)
    values, classes = layer.topk(hidden, 5)
    torch.testing.assert_close(values, logits.topk(5).values)
    assert torch.equal(classes, logits.topk(5).indices)
    layer.eval()
    target = torch.arange(7)
    three, wanted = layer(hidden, target), Z.spherical_statistics(logits, target)
    torch.testing.assert_close(three, wanted)
    with pytest.raises(RuntimeError, match="step"):
        layer.step(1.0)


def test_eval_still_sends_the_gradient_to_hidden():
    layer = new_layer(torch.float64).eval()
    hidden, target = draw(torch.Generator().manual_seed(6), width=31, classes=500)
    _, _, grad = dense_step(layer.weight, hidden, target, z_mild, 1.0)
    z_mild(layer(hidden, target), 500).mean().backward()
    torch.testing.assert_close(hidden.grad, grad)


def test_backward_passes_add_up():
    one, other = (new_layer(torch.float64) for _ in range(2))
    hidden, target = draw(torch.Generator().manual_seed(7), width=31, classes=500)
    loss = z_mild(one(hidden, target), 500).mean()
    loss.backward(retain_graph=True)
    loss.backward()
    one.step(0.5)
    z_mild(other(hidden, target), 500).mean().backward()
    other.step(1.0)
    torch.testing.assert_close(one.weight, other.weight)


def test_step_needs_a_backward_pass_each_time():
    layer = new_layer(torch.float64)
    hidden, target = draw(torch.Generator().manual_seed(8), width=31, classes=500)
    three = layer(hidden, target)
    with pytest.raises(RuntimeError, match="backward"):
        layer.step(1.0)
    z_mild(three, 500).mean().backward()
    layer.step(1.0)
    with pytest.raises(RuntimeError, match="since the last step"):
        layer.step(1.0)


def test_a_gradient_that_is_not_finite_changes_nothing():
    layer = new_layer(torch.float64)
    hidden, target = draw(torch.Generator().manual_seed(9), width=31, classes=500)
    before = layer.weight
    (z_mild(layer(hidden, target), 500).mean() * math.nan).backward()
    with pytest.raises(ValueError, match="must be finite"):
        layer.step(1.0)
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=0)
    z_mild(layer(hidden, target), 500).mean().backward()
    with pytest.raises(ValueError, match="must be finite"):
        layer.step(1e300)
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=0)
    assert layer.gram_error() < 1e-13 and layer._steps == 0


def test_half_precision_network_and_autocast():
    layer, other = (new_layer(torch.float32) for _ in range(2))
    hidden, target = draw(torch.Generator().manual_seed(10), width=31, classes=500)
    half = hidden.detach().to(torch.bfloat16).requires_grad_()
    wide = half.detach().double().requires_grad_()
    outside = layer.logits(hidden.float().detach()), layer.topk(hidden.float().detach(), 3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer.logits(hidden.float().detach()), outside[0], rtol=0, atol=0)
        torch.testing.assert_close(layer.topk(hidden.float().detach(), 3), outside[1], rtol=0, atol=0)
        loss = z_mild(layer(half, target), 500).mean()
        loss.backward()
        layer.step(1.0)
    z_mild(other(wide, target), 500).mean().backward()
    other.step(1.0)
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.grad.double(), wide.grad, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(layer.weight, other.weight, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_in_float32(scale):
    logits = torch.tensor([[scale, 0.0, 1.0, -1.0], [scale, scale, scale + 1, scale]], requires_grad=True)
    target = torch.tensor([0, 2])
    for loss in (lambda o: Z.z_loss(o, target), *(lambda o, f=f: f(Z.spherical_statistics(o, target), 4).sum() for f in LOSSES.values())):  # fmt: skip
        (grad,) = torch.autograd.grad(loss(logits), logits)
        assert loss(logits).isfinite() and grad.isfinite().all()
    wanted = slow_z_loss(logits.double(), target, 0.3, 10.0).float()
    torch.testing.assert_close(Z.z_loss(logits, target, reduction="none"), wanted, rtol=1e-5, atol=1e-5)


def test_equal_logits_have_no_gradient():
    logits = torch.tensor([[3.0, 3.0, 3.0], [0.0, 1.0, 2.0]], requires_grad=True)
    loss = Z.z_loss(logits, torch.tensor([0, 0]), a=1.0, b=0.0, reduction="none")
    loss.sum().backward()
    assert loss[0].item() == pytest.approx(math.log(2)) and logits.grad[0].abs().max() == 0
    assert logits.grad[1].abs().max() > 0.1


@few
@given(st.floats(-1e3, 1e3), st.sampled_from([3, 7, 50, 1000]), st.sampled_from([torch.float32, torch.float64]))
def test_equal_logits_of_any_size_have_no_gradient(value, classes, dtype):
    logits = torch.full((1, classes), value, dtype=dtype, requires_grad=True)
    target = torch.tensor([1])
    statistics = Z.spherical_statistics(logits, target)
    for loss in (
        Z.z_loss(logits, target, a=1.0, b=0.0),
        Z.z_loss_from_statistics(*statistics, classes, a=1.0, b=0.0)[0],
    ):
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.item() == pytest.approx(math.log(2)) and grad.abs().max() == 0


def test_half_precision_logits_give_a_float32_loss():
    logits, target = random_logits(6, classes=9, dtype=torch.bfloat16)
    loss = Z.z_loss(logits, target)
    loss.backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, Z.z_loss(logits.float(), target))


def test_transforms_and_compile():
    logits, target = random_logits(7, classes=9)
    per_row = torch.func.vmap(torch.func.grad(lambda o, c: Z.z_loss(o[None], c[None])))
    (grad,) = torch.autograd.grad(Z.z_loss(logits, target, reduction="sum"), logits)
    torch.testing.assert_close(per_row(logits.detach(), target), grad)
    compiled = torch.compile(lambda o, c: Z.z_loss(o, c), backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target), Z.z_loss(logits, target))


# --- bad input --------------------------------------------------------------------------------------------------------

O, C, V = torch.randn(3, 4), torch.tensor([0, 1, 3]), torch.ones(3)  # noqa: E741
LAYER = Z.SphericalOutput(2, 5)
H = torch.randn(3, 2)


def stepped(**options):
    layer = Z.SphericalOutput(2, 5)
    Z.z_loss_from_statistics(*layer(H, C), 5).mean().backward()
    layer.step(**options)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: Z.z_loss(O[0], C), "logits"),
        (lambda: Z.z_loss(O[:, :1], C * 0), "logits"),
        (lambda: Z.z_loss(O, C[:2]), "target"),
        (lambda: Z.z_loss(O, C + 1), "target"),
        (lambda: Z.z_loss(O, C - 1), "target"),
        (lambda: Z.z_loss(O, C[:, None]), "target"),
        (lambda: Z.z_loss(O, C, a=0), "a must"),
        (lambda: Z.z_loss(O, C, a=-1.0), "a must"),
        (lambda: Z.z_loss(O, C, b=math.nan), "b must"),
        (lambda: Z.z_loss(O, C, eps=-1.0), "eps"),
        (lambda: Z.z_loss(O, C, eps=1e200), "eps"),
        (lambda: Z.z_loss(O, C, reduction="avg"), "reduction"),
        (lambda: Z.spherical_statistics(O, C + 2), "target"),
        (lambda: Z.z_loss_from_statistics(V, V[:2], V, 4), "total_sq"),
        (lambda: Z.z_loss_from_statistics(V, V, V[:2], 4), "target_logit"),
        (lambda: Z.z_loss_from_statistics(V, V, V, 1), "num_classes"),
        (lambda: Z.squared_error_from_statistics(V[:, None], V, V, 4), "total"),
        (lambda: Z.taylor_softmax_from_statistics(V, V, V, 0), "num_classes"),
        (lambda: Z.spherical_softmax_from_statistics(V, V, V, 4, eps=0.0), "eps"),
        (lambda: Z.in_top_k_guarantee(V, 1), "num_classes"),
        (lambda: Z.topk_error(O, C, [1, 0]), "ks"),
        (lambda: Z.SphericalOutput(0, 5), "hidden_features"),
        (lambda: Z.SphericalOutput(2, 1), "num_classes"),
        (lambda: Z.SphericalOutput(2, 5, init_std=0), "init_std"),
        (lambda: Z.SphericalOutput(2, 5, tolerance=0), "tolerance"),
        (lambda: Z.SphericalOutput(2, 5, tolerance=1e-9), "tolerance"),
        (lambda: Z.SphericalOutput(2, 5, tolerance=2), "tolerance"),
        (lambda: LAYER(H[:, :1], C), "hidden"),
        (lambda: LAYER(H[0], C), "hidden"),
        (lambda: LAYER(H, C[:1]), "target"),
        (lambda: LAYER(H, C + 2), "target"),
        (lambda: LAYER.logits(O), "hidden"),
        (lambda: stepped(lr=0), "lr"),
        (lambda: stepped(lr=-1.0), "lr"),
        (lambda: stepped(lr=1.0, weight_decay=-0.1), "weight_decay"),
        (lambda: stepped(lr=10.0, weight_decay=0.1), "weight_decay"),
    ],
)
def test_bad_values_name_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: Z.z_loss(O.tolist(), C), "logits"),
        (lambda: Z.z_loss(O.long(), C), "logits"),
        (lambda: Z.z_loss(O, C.int()), "target"),
        (lambda: Z.z_loss(O, C, a="sharp"), "a must"),
        (lambda: Z.z_loss_from_statistics(V, V.double(), V, 4), "total_sq"),
        (lambda: Z.z_loss_from_statistics(V, V, V, 4.0), "num_classes"),
        (lambda: Z.in_top_k_guarantee(C, 4), "z must"),
        (lambda: Z.topk_error(O, C, 3), "ks"),
        (lambda: Z.SphericalOutput(2.0, 5), "hidden_features"),
        (lambda: Z.SphericalOutput(2, 5, dtype=torch.float16), "dtype"),
        (lambda: Z.SphericalOutput(2, 5, tolerance="tight"), "tolerance"),
        (lambda: LAYER(H.long(), C), "hidden"),
        (lambda: LAYER(H, C.float()), "target"),
        (lambda: stepped(lr=True), "lr"),
    ],
)
def test_bad_types_name_the_argument(call, name):
    with pytest.raises(TypeError, match=name):
        call()
