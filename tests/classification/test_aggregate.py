"""The theorems of chapter classification/aggregate as properties; closed forms, limits, simulation, privacy and bad input."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression

from lossbook.classification import aggregate as A

few = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**31)
LOSSES = ("squared", "bce_with_logits", "cross_entropy")

# The worked example of the chapter: two bags of two.
PREDICTION = torch.tensor([0.0, 2.0, 1.0, 1.0], dtype=torch.float64)
RESPONSE = torch.tensor([1.0, 0.0], dtype=torch.float64)
BAG = torch.tensor([0, 0, 1, 1])


def random_bags(seed, loss="squared", equal=False, scale=2.0):
    """Prediction, mean response, bag; bags of one to five members, in random order."""
    generator = torch.Generator().manual_seed(seed)
    m = int(torch.randint(1, 7, (), generator=generator))
    sizes = torch.full((m,), 3) if equal else torch.randint(1, 6, (m,), generator=generator)
    bag = torch.arange(m).repeat_interleave(sizes)
    bag = bag[torch.randperm(len(bag), generator=generator)]
    shape = (len(bag), 4) if loss == "cross_entropy" else (len(bag),)
    prediction = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    response = torch.randn((m, *shape[1:]), generator=generator, dtype=torch.float64)
    if loss != "squared":
        response = response.softmax(1) if response.ndim == 2 else response.sigmoid()
    return prediction.requires_grad_(), response, bag


def members(bag):
    return [[i for i, b in enumerate(bag.tolist()) if b == a] for a in range(int(bag.max()) + 1)]


def slow_levels(prediction, response, bag, loss):
    """Both levels of each bag, member by member."""
    bags, instances = [], []
    for a, inside in enumerate(members(bag)):
        y, f = response[a], [prediction[i] for i in inside]
        if loss == "squared":
            one = lambda x, y=y: (x - y) ** 2
            bags.append(one(sum(f) / len(f)))
            instances.append(sum(one(x) for x in f) / len(f))
        elif loss == "bce_with_logits":
            cost = lambda p, y=y: -y * torch.log(p) - (1 - y) * torch.log(1 - p)
            p = [1 / (1 + torch.exp(-x)) for x in f]
            bags.append(cost(sum(p) / len(p)))
            instances.append(sum(map(cost, p)) / len(p))
        else:
            cost = lambda p, y=y: -sum(y[c] * torch.log(p[c]) for c in range(len(y)))
            p = [torch.exp(x) / torch.exp(x).sum() for x in f]
            bags.append(cost(sum(p) / len(p)))
            instances.append(sum(map(cost, p)) / len(p))
    return torch.stack(bags), torch.stack(instances)


def slow_spread(prediction, bag):
    """The second form of the spread: squared differences of all ordered pairs."""
    total = 0.0
    for inside in members(bag):
        f = [prediction[i] for i in inside]
        total = total + sum(((x - y) ** 2).sum() for x in f for y in f) / (2 * len(f) ** 2)
    return total / len(members(bag))


# --- the losses -------------------------------------------------------------------------------------------------------


def test_worked_example():
    assert A.bag_loss(PREDICTION, RESPONSE, BAG).item() == 0.5
    assert A.instance_loss(PREDICTION, RESPONSE, BAG).item() == 1.0
    assert A.spread(PREDICTION, BAG).item() == 0.5
    assert A.bag_loss(PREDICTION, RESPONSE, BAG, reduction="none").tolist() == [0, 1]
    assert A.instance_loss(PREDICTION, RESPONSE, BAG, reduction="none").tolist() == [1, 1]
    assert A.bag_mean(PREDICTION, BAG).tolist() == [1, 1]


@few
@given(seeds, st.sampled_from(LOSSES), st.floats(0, 3))
def test_losses_equal_the_slow_loops(seed, loss, rho):
    prediction, response, bag = random_bags(seed, loss)
    bags, instances = slow_levels(prediction, response, bag, loss)
    for ours, slow in [
        (A.bag_loss(prediction, response, bag, loss=loss, reduction="none"), bags),
        (A.instance_loss(prediction, response, bag, loss=loss, reduction="none"), instances),
        (
            A.interpolated_loss(prediction, response, bag, rho=rho, loss=loss, reduction="none"),
            (1 - rho) * bags + rho * instances,
        ),
    ]:
        torch.testing.assert_close(ours, slow, rtol=1e-10, atol=1e-11)
        gradients = (torch.autograd.grad(x.mean(), prediction, retain_graph=True)[0] for x in (ours, slow))
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


@few
@given(seeds, st.floats(0, 3))
def test_instance_loss_is_bag_loss_plus_spread(seed, rho):
    prediction, response, bag = random_bags(seed)
    spread = A.spread(prediction, bag)
    torch.testing.assert_close(spread, slow_spread(prediction, bag), rtol=1e-12, atol=1e-12)
    for weight, loss in [
        (1, A.instance_loss(prediction, response, bag)),
        (rho, A.interpolated_loss(prediction, response, bag, rho=rho)),
    ]:
        torch.testing.assert_close(
            loss, A.bag_loss(prediction, response, bag) + weight * spread, rtol=1e-12, atol=1e-12
        )


def test_vectors_are_squared_norms():
    generator = torch.Generator().manual_seed(0)
    f, y = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (6, 2))
    bag = torch.tensor([0, 1, 1, 0, 0, 1])
    for loss in (A.bag_loss, A.instance_loss):
        columns = sum(loss(f[:, c], y[:, c], bag) for c in range(3))
        torch.testing.assert_close(loss(f, y, bag), columns)
    torch.testing.assert_close(A.spread(f, bag), sum(A.spread(f[:, c], bag) for c in range(3)))


@pytest.mark.parametrize("loss", LOSSES)
def test_bags_of_one_give_the_plain_loss(loss):
    prediction, response, _ = random_bags(1, loss)
    response = torch.cat([response] * len(prediction))[: len(prediction)]
    plain = {
        "squared": F.mse_loss,
        "bce_with_logits": F.binary_cross_entropy_with_logits,
        "cross_entropy": F.cross_entropy,
    }[loss](prediction, response)
    bag = torch.arange(len(prediction))
    for value in (
        A.bag_loss(prediction, response, bag, loss=loss),
        A.instance_loss(prediction, response, bag, loss=loss),
        A.interpolated_loss(prediction, response, bag, loss=loss, rho=0.3),
    ):
        torch.testing.assert_close(value, plain)


@pytest.mark.parametrize("loss", LOSSES)
def test_ends_of_the_interpolation_and_reductions(loss):
    f, y, bag = random_bags(5, loss)
    assert torch.equal(A.interpolated_loss(f, y, bag, rho=0, loss=loss), A.bag_loss(f, y, bag, loss=loss))
    assert torch.equal(A.interpolated_loss(f, y, bag, rho=1, loss=loss), A.instance_loss(f, y, bag, loss=loss))
    each = A.interpolated_loss(f, y, bag, rho=0.3, loss=loss, reduction="none")
    assert each.shape == (len(y),)
    torch.testing.assert_close(A.interpolated_loss(f, y, bag, rho=0.3, loss=loss), each.mean())
    torch.testing.assert_close(A.interpolated_loss(f, y, bag, rho=0.3, loss=loss, reduction="sum"), each.sum())


@few
@given(seeds, st.sampled_from(LOSSES))
def test_jensen(seed, loss):
    f, y, bag = random_bags(seed, loss)
    gap = A.instance_loss(f, y, bag, loss=loss, reduction="none") - A.bag_loss(f, y, bag, loss=loss, reduction="none")
    assert (gap >= -1e-12).all()
    alone = torch.bincount(bag) == 1
    assert gap[alone].abs().sum() < 1e-10


@few
@given(seeds)
def test_curvature_bounds_the_gap(seed):
    """With the bag loss at the mean LOGIT, the gap lies between c/2 and C/2 times the spread."""
    f, y, bag = random_bags(seed, "bce_with_logits")
    mean_logit = A.bag_mean(f, bag)
    gap = A.instance_loss(f, y, bag, loss="bce_with_logits") - F.binary_cross_entropy_with_logits(mean_logit, y)
    p = f.abs().max().sigmoid()
    spread = A.spread(f, bag)
    assert p * (1 - p) * spread / 2 - 1e-12 <= gap <= spread / 8 + 1e-12
    f, y, bag = random_bags(seed, "cross_entropy")
    gap = A.instance_loss(f, y, bag, loss="cross_entropy") - F.cross_entropy(A.bag_mean(f, bag), y)
    assert -1e-12 <= gap <= A.spread(f, bag) / 4 + 1e-12


@few
@given(seeds, st.sampled_from(LOSSES))
def test_order_does_not_matter(seed, loss):
    f, y, bag = random_bags(seed, loss)
    generator = torch.Generator().manual_seed(seed)
    rows, names = torch.randperm(len(bag), generator=generator), torch.randperm(len(y), generator=generator)
    value = A.interpolated_loss(f, y, bag, rho=0.4, loss=loss)
    torch.testing.assert_close(A.interpolated_loss(f[rows], y, bag[rows], rho=0.4, loss=loss), value)
    torch.testing.assert_close(A.interpolated_loss(f, y[names], names.argsort()[bag], rho=0.4, loss=loss), value)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss):
    f, y, bag = random_bags(9, loss)
    for call in (
        lambda f: A.bag_loss(f, y, bag, loss=loss),
        lambda f: A.instance_loss(f, y, bag, loss=loss),
        lambda f: A.interpolated_loss(f, y, bag, rho=0.3, loss=loss, reduction="none"),
        lambda f: A.spread(f, bag),
    ):
        assert torch.autograd.gradcheck(call, (f,))
        assert torch.autograd.gradgradcheck(call, (f,))
    tied = torch.zeros_like(f).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: A.bag_loss(f, y, bag, loss=loss), (tied,))


def test_gradcheck_of_bags_with_few_of_the_classes():
    f = torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    bag, y = torch.tensor([0, 1, 0]), torch.zeros(2, 9, dtype=torch.float64)
    y[0, 2] = y[0, 7] = 0.5
    y[1, 0] = 1
    call = lambda f: A.interpolated_loss(f, y, bag, rho=0.3, loss="cross_entropy", reduction="none")
    assert torch.autograd.gradcheck(call, (f,)) and torch.autograd.gradgradcheck(call, (f,))


@pytest.mark.parametrize("level", [A.bag_loss, A.instance_loss])
def test_float32_extremes(level):
    bag = torch.tensor([0, 0, 1])
    logits = torch.tensor([1e4, -1e4, -1e4], requires_grad=True)
    value = level(logits, torch.tensor([0.5, 1.0]), bag, loss="bce_with_logits", reduction="none")
    value.sum().backward()
    assert value.isfinite().all() and logits.grad.isfinite().all()
    assert value[1].item() == 1e4 and logits.grad[2] == -1
    if level is A.bag_loss:  # probabilities 1 and 0, mean one half
        assert value[0].item() == pytest.approx(math.log(2))
    z = torch.tensor([[1e4, -1e4], [1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    value = level(z, torch.tensor([[0.0, 1.0], [0.0, 1.0]]), bag, loss="cross_entropy", reduction="none")
    value.sum().backward()
    assert value.tolist() == [2e4, 0] and z.grad.isfinite().all()
    assert z.grad[0].tolist() == [0.5, -0.5]
    x = torch.tensor([1e4, -1e4, 1e4], requires_grad=True)
    level(x, torch.tensor([0.0, -1e4]), bag).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("loss", ["bce_with_logits", "cross_entropy"])
@pytest.mark.parametrize("scale", [1.0, 10.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_log_domain_is_left_only_where_nothing_underflows(loss, scale, dtype, monkeypatch):
    """Without peaks, where all probabilities are known to be far from underflow, the loss and its gradient are the same."""
    for seed in range(20):
        f, y, bag = random_bags(seed, loss, scale=scale)
        f = f.detach().to(dtype).requires_grad_()
        both = []
        for known_false in (A._checks.known_false, lambda condition: False):  # as on an accelerator: always with peaks
            monkeypatch.setattr(A._checks, "known_false", known_false)
            value = A.bag_loss(f, y.to(dtype), bag, loss=loss, reduction="none")
            (gradient,) = torch.autograd.grad(value.sum() * 2**16, f)  # with the scale of mixed precision
            monkeypatch.undo()
            assert value.isfinite().all() and gradient.isfinite().all()
            both.append((value, gradient))
        rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (1e-12, 1e-13)
        torch.testing.assert_close(both[0][0], both[1][0], rtol=rtol, atol=atol)
        torch.testing.assert_close(both[0][1], both[1][1], rtol=rtol, atol=atol * 2**16)
        exact = f.detach().double()
        p = exact.softmax(1) if exact.ndim == 2 else torch.stack([(-exact).sigmoid(), exact.sigmoid()], 1)
        share = y if y.ndim == 2 else torch.stack([1 - y, y], 1)
        slow = [-(share[i] * p[bag == i].mean(0).log()).sum() for i in range(len(y))]
        torch.testing.assert_close(both[0][0].double(), torch.stack(slow), rtol=rtol, atol=10 * atol)


@few
@given(seeds, st.sampled_from([0, 0.3, 1, 2.5]), st.sampled_from([1.0, 60.0]))
def test_classes_without_a_share_may_be_left_out(seed, rho, scale):
    """Bags of few classes among many, of different sizes: the losses and both gradients are those of all classes, one by one."""
    generator = torch.Generator().manual_seed(seed)
    bag = torch.cat([torch.arange(4), torch.randint(4, (7,), generator=generator)])[
        torch.randperm(11, generator=generator)
    ]
    f = scale * torch.randn(11, 40, generator=generator, dtype=torch.float64)
    y = A.bag_mean(F.one_hot(torch.randint(40, (11,), generator=generator), 40).double(), bag)
    call = lambda f, y: A.interpolated_loss(f, y, bag, rho=rho, loss="cross_entropy", reduction="none")
    ours, gradient = torch.autograd.functional.vjp(lambda f: call(f, y), f, torch.ones(4, dtype=torch.float64))
    bags, instances = slow_levels(f.requires_grad_(), y, bag, "cross_entropy")
    slow = (1 - rho) * bags + rho * instances
    all_classes = call(f, y.clone().requires_grad_())  # a share with a gradient leaves no class out
    for other in (slow, all_classes):
        if scale == 1 or other is all_classes:  # the slow loop underflows
            torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(gradient, torch.autograd.grad(other.sum(), f)[0], rtol=1e-9, atol=1e-10)


def test_gradients_of_small_probabilities_survive_the_scale_of_mixed_precision():
    """Here 1 over the mean probability, times the scale, is beyond float32, and the gradient is not."""
    logits = torch.tensor([[-80.0, 0.0], [-82.0, 0.0]], requires_grad=True)
    loss = A.bag_loss(logits, torch.tensor([[1.0, 0.0]]), torch.tensor([0, 0]), loss="cross_entropy")
    (gradient,) = torch.autograd.grad(loss * 2**16, logits)
    weight = torch.tensor([0.0, -2.0]).softmax(0)[:, None]
    torch.testing.assert_close(gradient, 2**16 * torch.tensor([[-1.0, 1.0]]) * weight)


def test_dtypes_transforms_and_compile():
    for loss in LOSSES:
        f, y, bag = random_bags(12, loss)
        f = f.detach()
        call = lambda f, y=y, bag=bag, loss=loss: A.interpolated_loss(f, y, bag, rho=0.3, loss=loss)
        assert call(f.float()).dtype == torch.float32 and call(f).dtype == torch.float64
        half = f.to(torch.bfloat16)
        torch.testing.assert_close(call(half), call(half.float()))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(call(f.float()), call(f).float())
        many = torch.stack([f, -f])
        ours = torch.func.vmap(torch.func.grad(call))(many)
        for x, gradient in zip(many, ours, strict=True):
            x = x.clone().requires_grad_()
            torch.testing.assert_close(torch.autograd.grad(call(x), x)[0], gradient)
        torch.testing.assert_close(torch.compile(call, backend="aot_eager", fullgraph=True)(f), call(f))


def test_not_contiguous_input():
    f, y, bag = random_bags(3, "cross_entropy")
    turned = f.detach().T.contiguous().T
    assert not turned.is_contiguous()
    torch.testing.assert_close(
        A.bag_loss(turned, y, bag, loss="cross_entropy"), A.bag_loss(f, y, bag, loss="cross_entropy")
    )


# --- least squares ----------------------------------------------------------------------------------------------------


def regression(seed, bags=12, size=3, d=4, noise=1.0, equal=True):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.full((bags,), size) if equal else torch.randint(1, 2 * size, (bags,), generator=generator)
    bag = torch.arange(bags).repeat_interleave(sizes)
    bag = bag[torch.randperm(len(bag), generator=generator)]
    X = torch.randn(len(bag), d, generator=generator, dtype=torch.float64) + 1
    y = X @ torch.arange(1.0, d + 1, dtype=torch.float64) - 2
    y = y + noise * torch.randn(len(bag), generator=generator, dtype=torch.float64)
    return X, A.bag_mean(y, bag), bag


@few
@given(seeds, st.floats(0.01, 3), st.sampled_from([0.0, 0.2]), st.booleans(), st.booleans())
def test_the_fit_is_a_stationary_point(seed, rho, ridge, intercept, equal):
    """The objective is convex, so a zero gradient is the minimum."""
    X, response, bag = regression(seed, equal=equal)
    model = A.InterpolatedLeastSquares(rho, ridge, intercept).fit(X, response, bag)
    theta, constant = model.coef_.clone().requires_grad_(), model.intercept_.clone().requires_grad_()
    value = A.interpolated_loss(X @ theta + constant, response, bag, rho=rho) + ridge * theta.square().sum()
    slope, level = torch.autograd.grad(value, [theta, constant])
    assert slope.abs().max() < 1e-9
    assert (level.abs() < 1e-9) if intercept else (constant == 0)
    torch.testing.assert_close(model.predict(X), (X @ theta + constant).detach())


@few
@given(seeds, st.floats(0, 1))
def test_the_fit_equals_lstsq_on_the_stacked_system(seed, rho):
    X, response, bag = regression(seed)
    means, y = torch.stack([X[members(bag)[a]].mean(0) for a in bag.tolist()]), response[bag]
    p, q = math.sqrt(1 - rho), math.sqrt(rho)
    stacked, target = torch.cat([p * means, q * X]), torch.cat([p * y, q * y])
    expected = np.linalg.lstsq(stacked.numpy(), target.numpy(), rcond=None)[0]
    ours = A.InterpolatedLeastSquares(rho, fit_intercept=False).fit(X, response, bag).coef_
    np.testing.assert_allclose(ours, expected, atol=1e-9)


def test_the_path_is_the_fits():
    X, response, bag = regression(6, equal=False)
    coef, intercept = A.least_squares_path(
        X, response, bag, torch.tensor([0.0, 0.2, 3.0], dtype=torch.float64), ridge=0.1
    )
    assert coef.shape == (3, 4) and intercept.shape == (3,)
    for j, rho in enumerate((0.0, 0.2, 3.0)):
        model = A.InterpolatedLeastSquares(rho, 0.1).fit(X, response, bag)
        torch.testing.assert_close(coef[j], model.coef_)
        torch.testing.assert_close(intercept[j], model.intercept_)


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0, 4.0])
def test_bags_of_one_give_least_squares(rho):
    X, y, bag = regression(2, bags=40, size=1)
    peer = LinearRegression().fit(X.numpy(), y[bag].numpy())
    ours = A.InterpolatedLeastSquares(rho).fit(X.numpy(), y.numpy(), bag.numpy())
    np.testing.assert_allclose(ours.coef_, peer.coef_, atol=1e-8)
    np.testing.assert_allclose(ours.predict(X), peer.predict(X.numpy()), atol=1e-8)


def test_ends_equal_least_squares_on_means_and_on_copies():
    X, response, bag = regression(3)
    means = np.stack([X[inside].mean(0) for inside in members(bag)])
    for rho, peer in [
        (0, LinearRegression().fit(means, response.numpy())),
        (1, LinearRegression().fit(X.numpy(), response[bag].numpy())),
    ]:
        ours = A.InterpolatedLeastSquares(rho).fit(X, response, bag)
        np.testing.assert_allclose(ours.coef_, peer.coef_, atol=1e-9)
        assert ours.intercept_.item() == pytest.approx(peer.intercept_, abs=1e-9)


def test_a_constant_moves_the_intercept_alone():
    X, response, bag = regression(4, equal=False)
    first, second = (A.InterpolatedLeastSquares(0.3, 0.1).fit(X, response + c, bag) for c in (0, 7))
    torch.testing.assert_close(first.coef_, second.coef_)
    assert (second.intercept_ - first.intercept_).item() == pytest.approx(7)


def test_least_norm_where_the_fit_is_not_unique():
    X, response, bag = regression(5, bags=3, d=6)
    ours = A.InterpolatedLeastSquares(0.0, fit_intercept=False).fit(X, response, bag).coef_
    means = torch.stack([X[inside].mean(0) for inside in members(bag)])
    expected = np.linalg.pinv(means.numpy()) @ response.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-10)
    flat = A.InterpolatedLeastSquares(0.5).fit(torch.ones(4, 2), torch.tensor([1.0, 2.0]), torch.tensor([0, 0, 1, 1]))
    assert flat.coef_.tolist() == [0, 0] and flat.intercept_.item() == 1.5


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_equal_features_share_their_weight(rho):
    """Of all fits the one of least norm: no direction that the data leave open gets a share of the rounding."""
    X, response, bag = regression(11, bags=20, size=2, d=3)
    one = A.InterpolatedLeastSquares(rho).fit(X, response, bag).coef_
    both = A.InterpolatedLeastSquares(rho).fit(torch.cat([X, X[:, :1]], 1), response, bag).coef_
    torch.testing.assert_close(both, torch.stack([one[0] / 2, one[1], one[2], one[0] / 2]), rtol=0, atol=1e-10)


def test_nearly_equal_features_are_still_told_apart():
    X, _, bag = regression(11, bags=20, size=2, d=3)
    X[:, 1] = X[:, 0] + 1e-6 * X[:, 1]
    theta = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for rho in (0.0, 1e-12):
        ours = A.InterpolatedLeastSquares(rho).fit(X, A.bag_mean(X @ theta, bag), bag).coef_
        torch.testing.assert_close(ours, theta, rtol=0, atol=1e-4)


@few
@given(seeds, st.floats(0.05, 2))
def test_conditional_risk_is_the_risk_of_the_fit(seed, rho):
    """The estimator is linear in the responses: its mean and covariance are read off the fits to unit vectors."""
    X, _, bag = regression(seed, bags=6, size=2, d=3)
    fit = lambda response: A.InterpolatedLeastSquares(rho, fit_intercept=False).fit(X, response, bag).coef_
    columns = torch.stack([fit(e) for e in torch.eye(6, dtype=torch.float64)], dim=1)  # d x m
    variance = 0.7 * columns.square().sum() / 2  # a mean of two responses has half their variance
    means = torch.stack([X[inside].mean(0) for inside in members(bag)])
    directions = torch.eye(3, dtype=torch.float64)
    bias2 = torch.stack([(columns @ (means @ e) - e).square().sum() for e in directions]).mean() * 2.5
    ours = A.conditional_risk(X, bag, rho, noise_variance=0.7, signal=2.5)
    torch.testing.assert_close(torch.stack(ours), torch.stack([bias2, variance]), rtol=1e-8, atol=1e-10)


# --- the asymptotic risk ----------------------------------------------------------------------------------------------

proportions = st.tuples(st.floats(1.05, 20), st.floats(1, 12), st.floats(1e-3, 5))


def bisected_g(psi, k, rho):
    """The root of the leave-one-out equation, by bisection."""
    a, b = psi / k, psi - psi / k
    low, high = 0.0, 1e9
    for _ in range(200):
        g = (low + high) / 2
        if a * g / (1 + g) + b * rho * g / (1 + rho * g) < 1:
            low = g
        else:
            high = g
    return g


def slow_risk(psi, k, rho, noise, signal):
    """Variance and bias from numerical derivatives of the trace of the inverse."""
    a, b = psi / k, psi - psi / k
    trace = lambda t, s: _general_g(a, b, t, s)
    h = 1e-5
    v1 = -(trace(1 + h, rho) - trace(1 - h, rho)) / (2 * h)
    v2 = -(trace(1, rho * (1 + h)) - trace(1, rho * (1 - h))) / (2 * h * rho)
    alpha = a * trace(1, rho) / (1 + trace(1, rho))
    return signal * ((1 - alpha) ** 2 * (1 + v1) + alpha**2 * rho**2 * v2), noise * v1


def _general_g(a, b, t, s):
    """Limit of the normalized trace of (t W1 + s W2)^-1."""
    roots = np.roots([t * s * (a + b - 1), a * t + b * s - t - s, -1])
    return float(max(roots.real))


@few
@given(proportions)
def test_closed_form_solves_the_leave_one_out_equation(drawn):
    psi, k, rho = drawn
    a, b = psi / k, psi - psi / k
    g = bisected_g(psi, k, rho)
    # read the module's g back from its variance: V1 = a g / ((1+g)^2 Delta)
    delta = a / (1 + g) ** 2 + b * rho / (1 + rho * g) ** 2
    _, variance = A.asymptotic_risk(psi, k, rho, noise_variance=1.0)
    assert variance.item() == pytest.approx(a * g / ((1 + g) ** 2 * delta), rel=1e-9)
    bias2, variance = A.asymptotic_risk(psi, k, rho, noise_variance=0.3, signal=2.0)
    slow_bias2, slow_variance = slow_risk(psi, k, rho, 0.3, 2.0)
    assert variance.item() == pytest.approx(slow_variance, rel=1e-5)
    assert bias2.item() == pytest.approx(slow_bias2, rel=1e-5, abs=1e-7)


@few
@given(st.floats(1.05, 30), st.integers(1, 12), st.floats(0.1, 5), st.floats(0.1, 5))
def test_special_cases(psi, k, noise, signal):
    bias2, variance = A.asymptotic_risk(psi, k, 1.0, noise_variance=noise, signal=signal)
    s = 1 - 1 / k
    assert bias2.item() == pytest.approx(signal * s * (s + 1 / (k * (psi - 1))), rel=1e-12)
    assert variance.item() == pytest.approx(noise / (k * (psi - 1)), rel=1e-12)
    if psi > k:
        bias2, variance = A.asymptotic_risk(psi, k, 0.0, noise_variance=noise, signal=signal)
        assert bias2.item() == 0 and variance.item() == pytest.approx(noise * k / (psi - k), rel=1e-9)
    rhos = torch.tensor([1e-3, 0.5, 3.0], dtype=torch.float64)
    bias2, variance = A.asymptotic_risk(psi, 1, rhos, noise_variance=noise, signal=signal)
    torch.testing.assert_close(variance, torch.full_like(variance, noise / (psi - 1)))
    assert bias2.abs().max() < 1e-20


def test_least_spread_interpolator():
    bias2, variance = A.asymptotic_risk(2, 4, 1e-9, noise_variance=0.5)
    assert bias2.item() == pytest.approx(0.75, abs=1e-7) and variance.item() == pytest.approx(0.75, abs=1e-7)
    for psi, k in [(3.0, 5), (1.5, 2), (6.0, 7)]:
        a = psi / k
        b, kappa = psi - a, (1 - a) / (psi - 1)
        v1 = a * (1 + kappa) ** 2 / (b * kappa)
        bias2, variance = A.asymptotic_risk(psi, k, 1e-9, noise_variance=1.0)
        assert variance.item() == pytest.approx(v1, rel=1e-6)
        assert bias2.item() == pytest.approx((1 - a) ** 2 * (1 + v1) + a**2 * kappa, rel=1e-6)


def test_printed_values():
    total = lambda *x, **y: sum(v.item() for v in A.asymptotic_risk(*x, **y))
    assert total(4, 2, 0.0, noise_variance=1.0) == pytest.approx(1)
    assert total(4, 2, 1.0, noise_variance=1.0) == pytest.approx(0.5)
    assert total(4, 2, 0.5, noise_variance=1.0) == pytest.approx(0.48155, abs=6e-6)


@pytest.mark.parametrize(
    ("psi", "k", "rho", "bias2", "variance"), [(3, 2, 0.2, 0.1429, 0.3214), (6, 3, 0.5, 0.3389, 0.0671), (3, 2, 1, 0.375, 0.125)]
)  # fmt: skip
def test_finite_samples_approach_the_limit(psi, k, rho, bias2, variance):
    d, found = 200, []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        X = torch.randn(psi * d, d, generator=generator, dtype=torch.float64)
        bag = torch.arange(psi * d // k).repeat_interleave(k)
        found.append(torch.stack(A.conditional_risk(X, bag, rho, noise_variance=0.5)))
    found = torch.stack(found).mean(0)
    limit = torch.stack(A.asymptotic_risk(psi, k, rho, noise_variance=0.5))
    assert limit.tolist() == pytest.approx([bias2, variance], abs=6e-5)
    torch.testing.assert_close(found, limit, rtol=0.02, atol=0)


def test_signs_as_features_come_near_the_limit():
    d, found = 200, []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        X = 2.0 * torch.randint(2, (3 * d, d), generator=generator).double() - 1
        found.append(
            torch.stack(A.conditional_risk(X, torch.arange(3 * d // 2).repeat_interleave(2), 0.2, noise_variance=0.5))
        )
    limit = torch.stack(A.asymptotic_risk(3, 2, 0.2, noise_variance=0.5))
    torch.testing.assert_close(torch.stack(found).mean(0), limit, rtol=0.02, atol=0)


@few
@given(st.floats(1.5, 20), st.floats(1.1, 6), st.floats(0.2, 3))
def test_a_little_spread_penalty_always_helps(psi_over_k, k, noise):
    psi = psi_over_k * k
    a, b = psi / k, psi - psi / k
    risk = lambda rho: torch.stack(A.asymptotic_risk(psi, k, rho, noise_variance=noise))
    h = 1e-6
    slope = (risk(h) - risk(0.0)) / h
    assert slope[1].item() == pytest.approx(-2 * noise * a * b / (a - 1) ** 3, rel=2e-2 * max(1, 1 / (a - 1)))
    assert slope[0].item() == pytest.approx(0, abs=1e-2)
    best = A.best_rho(psi, k, noise_variance=noise).item()
    assert best > 1e-6 and risk(best).sum() < risk(0.0).sum()


def test_slope_of_the_example():
    values = [A.asymptotic_risk(5, 2, rho, noise_variance=1.0)[1].item() for rho in (0.0, 1e-7)]
    assert (values[1] - values[0]) / 1e-7 == pytest.approx(-3.7037, abs=1e-3)


def test_monotone_in_rho():
    rho = torch.logspace(-4, 1, 60, dtype=torch.float64)
    psi = torch.tensor([1.2, 2.0, 3.0, 5.0, 8.0, 16.0], dtype=torch.float64)[:, None, None]
    k = torch.tensor([2.0, 3.0, 4.0, 8.0], dtype=torch.float64)[:, None]
    bias2, variance = A.asymptotic_risk(psi, k, rho, noise_variance=1.0)
    assert (variance.diff(dim=2) < 1e-12).all()
    enough = (psi >= k)[..., 0]
    assert (bias2.diff(dim=2)[enough] > -1e-12).all()
    falls = A.asymptotic_risk(3, 8, torch.tensor([1e-3, 0.05]), noise_variance=1.0)[0]
    assert falls[1] < falls[0]  # with fewer bags than features the bias first falls
    assert (bias2[psi[:, 0, 0] >= 2] <= 1 + 1e-12).all()
    assert A.asymptotic_risk(1.1, 2, 1.0, noise_variance=0.0)[0].item() == pytest.approx(2.75)


def test_best_rho():
    snr = torch.tensor([0.5, 1, 2, 10], dtype=torch.float64)
    best = A.best_rho(5, 2, noise_variance=1 / snr)
    assert best.tolist() == pytest.approx([1.0, 0.398, 0.171, 0.030], abs=1e-3)
    assert (best.diff() < 0).all()
    assert A.best_rho(3, 2, noise_variance=2.0).item() == pytest.approx(3.6, abs=0.01)
    assert A.best_rho(3, 2, noise_variance=2.0, upper=1.0).item() == pytest.approx(1.0)
    assert A.best_rho(3, 1, noise_variance=2.0).item() == 0
    assert A.best_rho(3, 2, noise_variance=0.0).item() == pytest.approx(1e-6)
    for psi, k, noise in [(5, 2, 1.0), (3, 8, 0.5), (1.3, 2, 0.1), (10, 4, 3.0)]:
        grid = torch.logspace(-6, 1, 4001, dtype=torch.float64)
        risk = torch.stack(A.asymptotic_risk(psi, k, grid, noise_variance=noise)).sum(0)
        best = A.best_rho(psi, k, noise_variance=noise)
        at_best = torch.stack(A.asymptotic_risk(psi, k, best, noise_variance=noise)).sum()
        assert at_best <= risk.min() + 1e-12 and at_best == pytest.approx(risk.min().item(), rel=1e-5)


@few
@given(st.floats(0.5, 20), st.integers(1, 8), st.floats(0, 5), st.floats(0, 3))
def test_ridge_risk_solves_its_equation_and_is_a_floor(psi, k, noise, signal):
    u = A.ridge_risk(psi, k, noise_variance=noise, signal=signal).item()
    assert 0 <= u <= signal + 1e-12
    residual = psi / k * u * signal + (u - signal) * (noise + u)
    assert abs(residual) < 1e-9
    if psi > 1.05 and noise > 0:
        rho = torch.logspace(-5, 2, 50, dtype=torch.float64)
        risk = torch.stack(A.asymptotic_risk(psi, k, rho, noise_variance=noise, signal=signal)).sum(0)
        assert (risk >= u - 1e-9).all()


def test_ridge_risk_is_reached_by_a_ridge_on_bag_means():
    """The best ridge weight, sigma^2 d / r^2 on the unscaled system, at d = 200."""
    d, psi, k, noise, found = 200, 5, 2, 1.0, []
    for seed in range(6):
        X1 = torch.randn(psi * d // k, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        inverse = torch.linalg.inv(X1.T @ X1 + noise * d * torch.eye(d, dtype=torch.float64))
        found.append(noise * inverse.trace())
    assert torch.stack(found).mean().item() == pytest.approx(0.3508, rel=0.01)
    assert A.ridge_risk(psi, k, noise_variance=noise).item() == pytest.approx(0.3508, abs=5e-5)
    assert A.ridge_risk(0.5, 1, noise_variance=0.0, signal=2.0).item() == pytest.approx(1.0)


@few
@given(st.floats(1.1, 20), st.floats(0.01, 3), st.floats(0.2, 20))
def test_without_the_spread_or_with_a_ridge_bags_of_one_are_best(psi, noise, epsilon):
    k = torch.arange(1.0, 9, dtype=torch.float64)
    private = A.private_noise_variance(noise, k, 2.0, epsilon)
    ridge = A.ridge_risk(psi, k, noise_variance=private)
    assert (ridge.diff() > -1e-12).all()
    few_bags = k < psi
    risk = torch.stack(A.asymptotic_risk(psi, k[few_bags], 0.0, noise_variance=private[few_bags])).sum(0)
    torch.testing.assert_close(risk, (k * noise + 8 * 4 / epsilon**2)[few_bags] / (psi - k[few_bags]))
    assert (risk.diff() > 0).all()


# --- choosing the weight ----------------------------------------------------------------------------------------------


def test_estimates_of_noise_and_signal_are_unbiased():
    generator = torch.Generator().manual_seed(0)
    for intercept, equal in [(False, True), (True, False)]:
        X, _, bag = regression(8, bags=20, size=2, d=5, equal=equal)
        theta = torch.tensor([0.3, -0.2, 0.1, 0.5, 0.0], dtype=torch.float64)
        found = []
        for _ in range(400):
            noise = torch.randn(len(bag), generator=generator, dtype=torch.float64)
            response = A.bag_mean(X @ theta + 3 * intercept + 0.8 * noise, bag)
            found.append(A.noise_and_signal(X, response, bag, fit_intercept=intercept))
        found = torch.tensor(found, dtype=torch.float64)
        z = (found.mean(0) - torch.tensor([0.64, theta.square().sum()])) / (found.std(0) / 20)
        assert z.abs().max() < 3


@pytest.mark.parametrize("intercept", [False, True])
def test_estimates_equal_weighted_least_squares(intercept):
    """Bags of different sizes: weights k_a, the intercept a column of ones."""
    X, response, bag = regression(12, bags=15, size=3, d=4, equal=False)
    inside = members(bag)
    root = np.sqrt([len(rows) for rows in inside])
    columns = np.stack([X[rows].mean(0).numpy() for rows in inside])
    if intercept:
        columns = np.column_stack([columns, np.ones(15)])
    rows, target = root[:, None] * columns, root * response.numpy()
    theta, squares, *_ = np.linalg.lstsq(rows, target, rcond=None)
    noise = squares.item() / (15 - columns.shape[1])
    spread = np.linalg.inv(rows.T @ rows)[:4, :4].trace()
    ours = A.noise_and_signal(X, response, bag, fit_intercept=intercept)
    assert ours == pytest.approx((noise, (theta[:4] ** 2).sum() - noise * spread), rel=1e-9)


def test_plug_in_is_best_rho_at_the_estimates():
    X, response, bag = regression(9, bags=30, size=2, d=5)
    noise, signal = A.noise_and_signal(X, response, bag)
    expected = A.best_rho(12, 2, noise_variance=noise, signal=signal)
    assert A.plug_in_rho(X, response, bag) == expected.item()
    # no signal at all: the floor keeps the search defined, and the weight goes to its end
    generator = torch.Generator().manual_seed(3)
    pure = A.bag_mean(torch.randn(60, generator=generator, dtype=torch.float64), bag)
    assert A.noise_and_signal(X, pure, bag)[1] <= 0
    assert A.plug_in_rho(X, pure, bag, upper=5.0) == pytest.approx(5.0)


def test_plug_in_with_an_intercept_does_not_see_a_constant():
    X, response, bag = regression(9, bags=30, size=2, d=5)
    noise, signal = A.noise_and_signal(X, response, bag, fit_intercept=True)
    expected = A.best_rho(12, 2, noise_variance=noise, signal=signal).item()
    assert A.plug_in_rho(X, response + 50, bag, fit_intercept=True) == pytest.approx(expected, rel=1e-4)
    assert A.plug_in_rho(X, response + 50, bag) != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("intercept", [False, True])
def test_bag_validation_equals_the_loop(intercept):
    X, response, bag = regression(10, equal=False)
    rhos = torch.tensor([0.0, 0.2, 1.0])
    ours = A.bag_validation_errors(
        X, response, bag, rhos, folds=4, ridge=0.1, fit_intercept=intercept, generator=torch.Generator().manual_seed(1)
    )
    fold = torch.randperm(12, generator=torch.Generator().manual_seed(1)) % 4
    for rho, error in zip(rhos.tolist(), ours.tolist(), strict=True):
        total = 0.0
        for f in range(4):
            kept = [a for a in range(12) if fold[a] != f]
            rows = [i for i, a in enumerate(bag.tolist()) if a in kept]
            names = torch.tensor([kept.index(bag[i].item()) for i in rows])
            model = A.InterpolatedLeastSquares(rho, 0.1, intercept).fit(X[rows], response[kept], names)
            for a in set(range(12)) - set(kept):
                total += (model.predict(X[members(bag)[a]]).mean() - response[a]).item() ** 2
        assert error == pytest.approx(total / 12, rel=1e-9)


def test_held_out_bag_error_measures_the_risk():
    """For a fixed estimate and fresh bags: expectation (|error|^2 + noise) / k."""
    generator = torch.Generator().manual_seed(0)
    k, draws, d = 3, 40_000, 4
    theta = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    estimate = theta + torch.tensor([0.3, 0.1, -0.2, 0.4], dtype=torch.float64)
    X = torch.randn(draws * k, d, generator=generator, dtype=torch.float64)
    noise = 0.5 * torch.randn(draws * k, generator=generator, dtype=torch.float64)
    bag = torch.arange(draws).repeat_interleave(k)
    each = A.bag_loss(X @ estimate, A.bag_mean(X @ theta + noise, bag), bag, reduction="none")
    expected = ((estimate - theta).square().sum() + 0.25) / k
    assert abs(each.mean() - expected) < 3 * each.std() / math.sqrt(draws)


# --- privacy ----------------------------------------------------------------------------------------------------------


def test_scale_is_sensitivity_over_epsilon():
    assert A.laplace_scale(5, clip=2.0, epsilon=0.5).item() == pytest.approx(2 * 2 / (5 * 0.5))
    sizes = torch.tensor([1, 2, 4])
    torch.testing.assert_close(
        A.laplace_scale(sizes, 1.0, 2.0), torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64), rtol=0, atol=0
    )


@few
@given(seeds, st.floats(0.1, 3), st.floats(0.1, 5))
def test_sensitivity_and_composition(seed, clip, epsilon):
    """One response: at most epsilon, though the whole vector is released. Of j responses: at most j epsilon."""
    y, _, bag = random_bags(seed, scale=5.0)
    y = y.detach()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    for j in (1, 2, len(y)):
        neighbor = y.clone()
        neighbor[order[:j]] = 10 * torch.randn(j, generator=generator, dtype=torch.float64)[: len(neighbor[order[:j]])]
        loss = A.privacy_loss(y, neighbor, bag, clip=clip, epsilon=epsilon)
        assert 0 <= loss <= j * epsilon * (1 + 1e-12)
    extreme, opposite = y.clone(), y.clone()
    extreme[0], opposite[0] = 1e3, -1e3
    assert A.privacy_loss(extreme, opposite, bag, clip=clip, epsilon=epsilon).item() == pytest.approx(epsilon)


def test_noise_has_the_laplace_distribution():
    from scipy import stats

    k, bags = 3, 20_000
    bag = torch.arange(bags).repeat_interleave(k)
    y = torch.full((bags * k,), 0.5, dtype=torch.float64)
    y[0::3] = 9.0  # clipped to 1
    released = A.private_bag_response(y, bag, clip=1.0, epsilon=0.8, generator=torch.Generator().manual_seed(0))
    noise = (released - (1.0 + 0.5 + 0.5) / 3).numpy()
    assert stats.kstest(noise, stats.laplace(scale=2 * 1.0 / (3 * 0.8)).cdf).pvalue > 0.01
    # independent from bag to bag
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 4 / math.sqrt(bags)


def test_release_of_bags_of_different_sizes():
    """Every bag has the noise of its own size, and both ends of the range are clipped."""
    from scipy import stats

    bags, sizes = 8000, (1, 4, 9)
    bag = torch.arange(3 * bags).repeat_interleave(torch.tensor(sizes).repeat(bags))
    y = torch.full((len(bag),), -50.0, dtype=torch.float64)
    y[torch.arange(len(bag)) % 14 == 0] = 50.0  # the bags of one
    released = A.private_bag_response(y, bag, clip=1.5, epsilon=0.6, generator=torch.Generator().manual_seed(0))
    for k, noise in zip(sizes, (released.reshape(-1, 3) - torch.tensor([1.5, -1.5, -1.5])).T, strict=True):
        assert stats.kstest(noise.numpy(), stats.laplace(scale=2 * 1.5 / (k * 0.6)).cdf).pvalue > 0.01


def test_the_grand_mean_gains_from_larger_bags():
    n, releases, clip, epsilon = 48, 4000, 1.0, 0.9
    for k in (1, 4, 12):
        bag = torch.arange(releases * n // k).repeat_interleave(k)
        released = A.private_bag_response(
            torch.zeros(releases * n), bag, clip=clip, epsilon=epsilon, generator=torch.Generator().manual_seed(k)
        )
        variance = released.reshape(releases, -1).mean(1).var().item()
        assert variance == pytest.approx(8 * clip**2 / (n * k * epsilon**2), rel=0.1)


def test_histograms_of_neighbors_differ_by_at_most_epsilon():
    epsilon, draws = 0.7, 200_000
    bag = torch.arange(draws).repeat_interleave(2)
    edges = torch.linspace(-4, 4, 17, dtype=torch.float64)
    counts = []
    for seed, first in ((0, 1.0), (1, -1.0)):  # one response at either end, its companion the same
        y = torch.tensor([first, 0.2], dtype=torch.float64).repeat(draws)
        released = A.private_bag_response(
            y, bag, clip=1.0, epsilon=epsilon, generator=torch.Generator().manual_seed(seed)
        )
        counts.append(torch.histogram(released, edges).hist)
    enough = (counts[0] > 500) & (counts[1] > 500)
    ratio = (counts[0] / counts[1]).log()[enough].abs()
    error = (1 / counts[0] + 1 / counts[1]).sqrt()[enough]
    assert (ratio <= epsilon + 4 * error).all()
    assert ratio.max() > epsilon - 4 * error[ratio.argmax()]  # and the bound is reached


def test_private_noise_variance_is_what_the_release_has():
    k, bags, epsilon = 4, 50_000, 1.5
    generator = torch.Generator().manual_seed(0)
    bag = torch.arange(bags).repeat_interleave(k)
    y = 0.3 * torch.randn(bags * k, generator=generator, dtype=torch.float64)
    released = A.private_bag_response(y, bag, clip=3.0, epsilon=epsilon, generator=generator)
    expected = A.private_noise_variance(0.09, k, 3.0, epsilon).item()
    assert expected == pytest.approx(0.09 + 8 * 9 / (k * epsilon**2))
    assert (k * released.square()).mean().item() == pytest.approx(expected, rel=0.05)
    assert A.private_noise_variance(0.09, k, 3.0, 1e9).item() == pytest.approx(0.09)


@pytest.mark.parametrize(
    ("epsilon", "upper", "best", "row"),
    [
        (10.0, 1.0, 1, [0.063, 0.093, 0.129, 0.169, 0.213]),
        (3.0, 1.0, 2, [0.423, 0.335, 0.362, 0.392, 0.421]),
        (1.0, 1.0, 5, [3.58, 1.18, 0.874, 0.813, 0.806]),
        (1.0, 10.0, 3, [3.583, 0.8022, 0.7996, 0.8020, 0.8055]),
    ],
)
def test_best_bag_size(epsilon, upper, best, row):
    found = A.best_bag_size(10, range(1, 6), noise_variance=0.25, clip=2.0, epsilon=epsilon, upper=upper)
    assert found.bag_size == best and found.risks.tolist() == pytest.approx(row, rel=6e-3)
    assert found.risk == found.risks.min().item()


def test_best_bag_size_takes_the_signal():
    setting = dict(noise_variance=0.4, clip=1.5, epsilon=0.8)
    found = A.best_bag_size(6, [2, 4, 7], signal=2.5, **setting)
    for k, ours in zip((2, 4, 7), found.risks.tolist(), strict=True):
        noise = 0.4 + 8 * 1.5**2 / (k * 0.8**2)
        rho = torch.logspace(-5, 1, 4001, dtype=torch.float64)
        risk = torch.stack(A.asymptotic_risk(6, k, rho, noise_variance=noise, signal=2.5)).sum(0)
        assert ours == pytest.approx(risk.min().item(), rel=1e-5)
    assert found.risk == min(found.risks.tolist())
    assert found.bag_size == (2, 4, 7)[found.risks.argmin()]


def test_numbers_follow_the_device_of_tensors():
    """The meta device stands for an accelerator: numbers beside its tensors must not stay behind."""
    two = torch.full((2,), 2.0, device="meta")
    for value in (
        *A.asymptotic_risk(5, two, 0.1, noise_variance=1.0),
        A.best_rho(5, 2, noise_variance=two),
        A.ridge_risk(5, two, noise_variance=1.0, signal=2.0),
        A.private_noise_variance(0.5, two, clip=1.0, epsilon=1.0),
    ):
        assert value.device.type == "meta" and value.shape == (2,)


# --- bad input --------------------------------------------------------------------------------------------------------

V, Y = torch.zeros(4), torch.zeros(2)
Q = torch.full((2, 3), 1 / 3)
X4 = torch.eye(4)[:, :2]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: A.bag_mean(torch.zeros(2, 2, 2), torch.tensor([0, 1])), "values"),
        (lambda: A.bag_mean(V, torch.tensor([0, 0, 2, 2])), "bag must have a member"),
        (lambda: A.bag_mean(V, BAG, 3), "bag must have a member"),
        (lambda: A.bag_mean(V, BAG - 1), "bag must lie"),
        (lambda: A.bag_mean(V, BAG, 1), "bag must lie"),
        (lambda: A.bag_mean(V, BAG[:3]), "bag"),
        (lambda: A.bag_mean(V, BAG[0]), "bag must have 1 dim"),
        (lambda: A.bag_mean(V, torch.full((4,), -1)), "bag must lie"),
        (lambda: A.bag_mean(V, BAG[:0]), "bag must have shape"),
        (lambda: A.bag_mean(torch.zeros(0), BAG[:0]), "values"),
        (lambda: A.bag_loss(V, torch.zeros(3), BAG), "bag"),
        (lambda: A.bag_loss(V, Y, BAG, loss="hinge"), "loss"),
        (lambda: A.bag_loss(V, Y, BAG, reduction="average"), "reduction"),
        (lambda: A.bag_loss(V, torch.tensor([0.0, torch.nan]), BAG), "bag_response"),
        (lambda: A.bag_loss(V, torch.zeros(2, 1), BAG), "bag_response"),
        (lambda: A.bag_loss(torch.zeros(4, 3), torch.zeros(2, 2), BAG), "bag_response"),
        (lambda: A.bag_loss(V, Y + 1.1, BAG, loss="bce_with_logits"), "bag_response"),
        (lambda: A.bag_loss(torch.zeros(4, 3), torch.zeros(2, 3), BAG, loss="cross_entropy"), "bag_response"),
        (lambda: A.bag_loss(torch.zeros(4, 3), Q * torch.nan, BAG, loss="cross_entropy"), "bag_response"),
        (lambda: A.bag_loss(torch.zeros(4, 3), Q * torch.tensor([3.0, 3, -3]), BAG, loss="cross_entropy"), "bag_resp"),
        (lambda: A.bag_loss(V, Y, BAG, loss="cross_entropy"), "prediction"),
        (lambda: A.bag_loss(torch.zeros(4, 3), Q, BAG, loss="bce_with_logits"), "prediction"),
        (lambda: A.interpolated_loss(V, Y, BAG, rho=-0.1), "rho"),
        (lambda: A.interpolated_loss(V, Y, BAG, rho=math.nan), "rho"),
        (lambda: A.InterpolatedLeastSquares(rho=-1), "rho"),
        (lambda: A.InterpolatedLeastSquares(ridge=-1), "ridge"),
        (lambda: A.InterpolatedLeastSquares().fit(X4 * torch.nan, Y, BAG), "X"),
        (lambda: A.InterpolatedLeastSquares().fit(V, Y, BAG), "X"),
        (lambda: A.InterpolatedLeastSquares().fit(X4, Y + torch.inf, BAG), "bag_response"),
        (lambda: A.InterpolatedLeastSquares().fit(X4, torch.zeros(3), BAG), "bag"),
        (lambda: A.InterpolatedLeastSquares().fit(X4, Y, BAG).predict(torch.zeros(1, 3)), "X"),
        (lambda: A.conditional_risk(X4, torch.tensor([0, 0, 0, 1]), 0.1, noise_variance=1.0), "bag"),
        (lambda: A.conditional_risk(torch.ones(4, 2), BAG, 0.1, noise_variance=1.0), "X"),
        (lambda: A.conditional_risk(X4, BAG, 0.1, noise_variance=-1.0), "noise_variance"),
        (lambda: A.asymptotic_risk(1.0, 2, 0.1, noise_variance=1.0), "psi"),
        (lambda: A.asymptotic_risk(2, 0.5, 0.1, noise_variance=1.0), "bag_size"),
        (lambda: A.asymptotic_risk(2, 2, 0.0, noise_variance=1.0), "rho"),
        (lambda: A.asymptotic_risk(2, 2, torch.tensor([0.1, -1]), noise_variance=1.0), "rho"),
        (lambda: A.asymptotic_risk(torch.full((3,), 5.0), torch.ones(2), 0.1, noise_variance=1.0), r"psi \(3,\), bag_size \(2,\)"),
        (lambda: A.asymptotic_risk(2, 2, 0.1, noise_variance=math.inf), "noise_variance"),
        (lambda: A.asymptotic_risk(2, 2, 0.1, noise_variance=1.0, signal=-1), "signal"),
        (lambda: A.best_rho(5, 2, noise_variance=1.0, upper=0), "upper"),
        (lambda: A.ridge_risk(0.0, 2, noise_variance=1.0), "psi"),
        (lambda: A.best_rho(0.5, 2, noise_variance=1.0), "psi"),
        (lambda: A.noise_and_signal(X4, Y, BAG), "bag_response"),
        (lambda: A.noise_and_signal(torch.ones(4, 2), torch.zeros(4), torch.arange(4)), "X"),
        (lambda: A.bag_validation_errors(X4, Y, BAG, torch.ones(2), folds=3), "folds"),
        (lambda: A.bag_validation_errors(X4, Y, BAG, torch.ones(2), folds=1), "folds"),
        (lambda: A.bag_validation_errors(X4, Y, BAG, torch.tensor([-1.0]), folds=2), "rhos"),
        (lambda: A.bag_validation_errors(X4, Y, BAG, torch.ones(()), folds=2), "rhos"),
        (lambda: A.least_squares_path(X4, Y, BAG, torch.ones(0)), "rhos"),
        (lambda: A.least_squares_path(X4, Y, BAG, torch.ones(2), ridge=-1), "ridge"),
        (lambda: A.laplace_scale(0, 1.0, 1.0), "bag_size"),
        (lambda: A.laplace_scale(2, 0.0, 1.0), "clip"),
        (lambda: A.laplace_scale(2, 1.0, 0.0), "epsilon"),
        (lambda: A.private_bag_response(V, BAG, clip=1.0, epsilon=-1.0), "epsilon"),
        (lambda: A.private_bag_response(V, BAG, clip=math.inf, epsilon=1.0), "clip"),
        (lambda: A.private_bag_response(V * torch.nan, BAG, clip=1.0, epsilon=1.0), "response"),
        (lambda: A.private_bag_response(V, torch.tensor([0, 0, 2, 2]), clip=1.0, epsilon=1.0), "bag"),
        (lambda: A.privacy_loss(V, V[:2], BAG, clip=1.0, epsilon=1.0), "neighbor"),
        (lambda: A.private_noise_variance(-1.0, 2, 1.0, 1.0), "noise_variance"),
        (lambda: A.best_bag_size(10, [], noise_variance=1.0, clip=1.0, epsilon=1.0), "bag_sizes"),
        (lambda: A.best_bag_size(10, [0], noise_variance=1.0, clip=1.0, epsilon=1.0), "bag_sizes"),
    ],
)  # fmt: skip
def test_bad_values_name_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: A.bag_mean([0.0], BAG), "values"),
        (lambda: A.bag_mean(V, [0, 0, 1, 1]), "bag"),
        (lambda: A.bag_mean(V, 5), "bag must be a tensor"),
        (lambda: A.spread(V, None), "bag must be a tensor"),
        (lambda: A.bag_loss(V.long(), Y, BAG), "prediction"),
        (lambda: A.bag_loss(V, [0.0, 0.0], BAG), "bag_response"),
        (lambda: A.bag_loss(V, Y, BAG.int()), "bag"),
        (lambda: A.interpolated_loss(V, Y, BAG, rho="half"), "rho"),
        (lambda: A.interpolated_loss(V, Y, BAG, rho=True), "rho"),
        (lambda: A.InterpolatedLeastSquares(rho=None), "rho"),
        (lambda: A.InterpolatedLeastSquares().fit([[1.0]], Y, BAG), "X"),
        (lambda: A.asymptotic_risk("5", 2, 0.1, noise_variance=1.0), "psi"),
        (lambda: A.asymptotic_risk(5, 2, torch.tensor([True]), noise_variance=1.0), "rho"),
        (lambda: A.bag_validation_errors(X4, Y, BAG, torch.ones(2), folds=2.0), "folds"),
        (lambda: A.privacy_loss(V, V.double(), BAG, clip=1.0, epsilon=1.0), "neighbor"),
        (lambda: A.best_bag_size(10, [1.5], noise_variance=1.0, clip=1.0, epsilon=1.0), "bag_sizes"),
        (lambda: A.best_bag_size(10, 5, noise_variance=1.0, clip=1.0, epsilon=1.0), "bag_sizes"),
        (lambda: A.best_bag_size(torch.tensor([10.0, 11.0]), [1, 2], noise_variance=1.0, clip=1.0, epsilon=1.0), "psi"),
    ],
)
def test_bad_types_name_the_argument(call, name):
    with pytest.raises(TypeError, match=name):
        call()


def test_predict_before_fit():
    with pytest.raises(RuntimeError, match="fit"):
        A.InterpolatedLeastSquares().predict(X4)
