"""Target surrogates against slow loops and closed forms: majorization, descent, rates and the linear model's limits as properties; SSO as an optimizer."""

import copy
import io
import itertools
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lossbook.optimization import target_surrogates as T

DOUBLE = torch.float64
LOSSES = {
    "squared": (T.squared_losses, 1.0),
    "logistic": (T.logistic_losses, 0.25),
    "cross_entropy": (T.cross_entropy_losses, 0.5),
}
every_loss = pytest.mark.parametrize("kind", LOSSES)
seeds = st.integers(0, 10_000)


def randn(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def problem(kind, seed=0, n=12):
    """Inputs, targets, a network that fits the loss, and the loss of outputs."""
    x = randn(n, 4, seed=seed)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1 if kind == "logistic" else 3)).double()
    if kind == "logistic":
        y = (uniform(n, seed=seed + 1) < 0.5).double()
        return x, y, net, lambda: net(x).squeeze(1), lambda z: T.logistic_losses(z, y)
    if kind == "squared":
        y = randn(n, 3, seed=seed + 1)
        return x, y, net, lambda: net(x), lambda z: T.squared_losses(z, y)
    y = torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed))
    return x, y, net, lambda: net(x), lambda z: T.cross_entropy_losses(z, y)


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def logistic_data(n, scales, seed):
    d = len(scales)
    X = randn(n, d, seed=seed) * torch.tensor(scales, dtype=DOUBLE)
    return X, (uniform(n, seed=seed + 1) < 0.5).double()


def newton(X, y, weights=None):
    """The minimizer of the (weighted) mean logistic loss, in the coordinates of a QR basis."""
    Q, R = torch.linalg.qr(X)
    w, u = torch.ones_like(y) if weights is None else weights, torch.zeros(X.shape[1], dtype=DOUBLE)
    for _ in range(100):
        p = torch.sigmoid(Q @ u)
        gradient, H = Q.T @ (w * (p - y)), (Q * (w * p * (1 - p))[:, None]).T @ Q
        move, scale = torch.linalg.solve(H, gradient), 1.0
        value = (w * T.logistic_losses(Q @ u, y)).sum()
        while (w * T.logistic_losses(Q @ (u - scale * move), y)).sum() > value + 1e-12:
            scale /= 2
        u = u - scale * move
        if gradient.norm() < 1e-13:
            break
    return torch.linalg.solve_triangular(R, u[:, None], upper=True)[:, 0]


# ---- losses and the oracle -----------------------------------------------------------------------------------------


def test_losses_are_their_loops():
    z, y, one = randn(5, 3), randn(5, 3, seed=1), randn(5, seed=2)
    for i in range(5):
        assert T.squared_losses(z, y)[i].item() == pytest.approx(
            sum((z[i, k] - y[i, k]).item() ** 2 for k in range(3)) / 2
        )
        label = i % 3
        wanted = math.log(sum(math.exp(z[i, k]) for k in range(3))) - z[i, label].item()
        assert T.cross_entropy_losses(z, torch.arange(5) % 3)[i].item() == pytest.approx(wanted)
        target = i / 4
        wanted = math.log(1 + math.exp(one[i])) - target * one[i].item()
        assert T.logistic_losses(one, torch.arange(5) / 4)[i].item() == pytest.approx(wanted, abs=1e-7)


@every_loss
def test_gradient_is_each_samples_own(kind):
    x, y, net, forward, loss = problem(kind)
    z = forward()
    grad = T.target_gradient(LOSSES[kind][0], z, y)
    assert not grad.requires_grad and grad.shape == z.shape
    for i in range(len(z)):
        row = z[i : i + 1].detach().requires_grad_()
        (own,) = torch.autograd.grad(LOSSES[kind][0](row, y[i : i + 1]).sum(), row)
        assert torch.allclose(grad[i], own[0], rtol=1e-12, atol=1e-14)
    with torch.no_grad():  # the oracle turns gradients on
        assert torch.equal(T.target_gradient(LOSSES[kind][0], forward(), y), grad)


def test_gradient_of_outputs_without_autograd():
    with torch.inference_mode():
        z = torch.tensor([3.0, 5.0])
    assert T.target_gradient(T.squared_losses, z, torch.zeros(2)).tolist() == [3, 5]


@settings(max_examples=60, deadline=None)
@given(seed=seeds, scale=st.floats(0.01, 100))
def test_smoothness_constants(seed, scale):
    """Hessians of the losses have no eigenvalue above L; the sharp ones reach it."""
    p = F.softmax(scale * randn(5, seed=seed), 0)
    H = torch.diag(p) - torch.outer(p, p)
    assert torch.linalg.eigvalsh(H)[-1] <= T.TARGET_SMOOTHNESS["cross_entropy"] + 1e-12
    half = torch.tensor([0.5, 0.5, 0.0], dtype=DOUBLE)
    assert torch.linalg.eigvalsh(torch.diag(half) - torch.outer(half, half))[-1].item() == pytest.approx(0.5)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, DOUBLE])
def test_extremes(kind, dtype):
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype)
    y = torch.tensor([1, 0]) if kind == "cross_entropy" else torch.zeros_like(z)
    if kind == "logistic":
        z, y = z[:, 0], y[:, 0]
    losses, grad = T._oracle(lambda outputs: LOSSES[kind][0](outputs, y), z)
    other = (-z).requires_grad_()
    value = T.target_surrogate(other, z, grad, eta=2.0, anchor_loss=losses)
    value.backward()
    for tensor in (losses, grad, value, other.grad):
        assert torch.isfinite(tensor).all()
    assert value.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)


# ---- the surrogate -------------------------------------------------------------------------------------------------


def slow_surrogate(z, anchor, grad, eta, loss):
    rows = []
    for i in range(len(z)):
        move = [(a - b).item() for a, b in zip(z[i].reshape(-1), anchor[i].reshape(-1), strict=True)]
        slope = sum(g.item() * m for g, m in zip(grad[i].reshape(-1), move, strict=True))
        rows.append(loss[i].item() + slope + sum(m * m for m in move) / (2 * eta))
    return torch.tensor(rows, dtype=DOUBLE)


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 4), (1, 1)])
def test_surrogate_is_a_slow_loop(shape):
    z, anchor, grad = (randn(*shape, seed=k) for k in range(3))
    loss = randn(shape[0], seed=3)
    wanted = slow_surrogate(z, anchor, grad, 0.7, loss)
    given = dict(eta=0.7, anchor_loss=loss)
    assert torch.allclose(
        T.target_surrogate(z, anchor, grad, reduction="none", **given), wanted, rtol=1e-12, atol=1e-12
    )
    assert T.target_surrogate(z, anchor, grad, **given).item() == pytest.approx(wanted.mean().item(), abs=1e-12)
    assert T.target_surrogate(z, anchor, grad, reduction="sum", **given).item() == pytest.approx(
        wanted.sum().item(), abs=1e-12
    )
    shifted = T.target_surrogate(z, anchor, grad, eta=0.7, anchor_loss=2.0)
    assert shifted.item() == pytest.approx((wanted - loss).mean().item() + 2, abs=1e-12)


def test_surrogate_by_hand():
    z, y = torch.tensor([0.0, 1.0], dtype=DOUBLE), torch.tensor([1.0, 0.0], dtype=DOUBLE)
    grad = T.target_gradient(T.logistic_losses, z, y)
    given = dict(eta=4.0, anchor_loss=T.logistic_losses(z, y), reduction="none")
    rows = T.target_surrogate(torch.ones(2, dtype=DOUBLE), z, grad, **given).tolist()
    assert rows == pytest.approx([math.log(2) - 1 / 2 + 1 / 8, math.log(1 + math.e)], abs=1e-12)
    assert sum(rows) / 2 == pytest.approx(0.815704, abs=1e-6)


@every_loss
@settings(max_examples=25, deadline=None)
@given(seed=seeds, eta=st.floats(0.01, 100))
def test_anchor(kind, seed, eta):
    """There value and gradient with respect to the parameters are the loss's."""
    x, y, net, forward, loss = problem(kind, seed)
    z = forward()
    losses, grad = T._oracle(loss, z)
    surrogate = T.target_surrogate(z, z, grad, eta=eta, anchor_loss=losses)
    true = loss(z).mean()
    assert surrogate.item() == pytest.approx(true.item(), abs=1e-12)
    params = list(net.parameters())
    found = torch.autograd.grad(surrogate, params, retain_graph=True)
    for mine, wanted in zip(found, torch.autograd.grad(true, params), strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-10, atol=1e-12)


@every_loss
@settings(max_examples=40, deadline=None)
@given(seed=seeds, scale=st.floats(0.01, 30))
def test_majorization(kind, seed, scale):
    """Wherever the parameters go, at eta = 1 / L and below."""
    x, y, net, forward, loss = problem(kind, seed)
    z = forward().detach()
    losses, grad = T._oracle(loss, z)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * randn(*p.shape, seed=seed + 7))
        other = forward()
    for eta in (1 / LOSSES[kind][1], 0.3 / LOSSES[kind][1]):
        given = dict(eta=eta, anchor_loss=losses, reduction="none")
        rows, true = T.target_surrogate(other, z, grad, **given), loss(other)
        assert (rows >= true - 1e-11 * (1 + rows.abs())).all()
    if kind == "squared":
        exact = T.target_surrogate(other, z, grad, eta=1.0, anchor_loss=losses, reduction="none")
        assert torch.allclose(exact, true, rtol=1e-10, atol=1e-10)


def test_the_constants_are_tight():
    grid = torch.linspace(-1, 1, 41, dtype=DOUBLE)
    for kind, count in (("logistic", 1), ("cross_entropy", 2)):
        outputs = grid if count == 1 else torch.stack([grid, -grid, torch.full_like(grid, -50)], 1)
        y = torch.zeros(41, dtype=DOUBLE) if count == 1 else torch.zeros(41).long()
        losses, grad = T._oracle(lambda z, kind=kind, y=y: LOSSES[kind][0](z, y), outputs * 0 + outputs[20])
        given = dict(anchor_loss=losses, reduction="none")
        for times, fails in ((1, False), (1.25, True)):
            bound = T.target_surrogate(
                outputs, outputs[20].expand_as(outputs), grad, eta=times / LOSSES[kind][1], **given
            )
            assert bool((bound < LOSSES[kind][0](outputs, y) - 1e-12).any()) == fails


def test_surrogate_gradcheck_and_transforms():
    z, anchor, grad = (randn(4, 3, seed=k) for k in range(3))
    assert torch.autograd.gradcheck(lambda v: T.target_surrogate(v, anchor, grad, eta=0.4), z.requires_grad_())
    f = lambda v, a, g: T.target_surrogate(v, a, g, eta=0.4)  # noqa: E731
    wanted = (grad + (z - anchor) / 0.4) / 4
    assert torch.allclose(torch.func.grad(f)(z, anchor, grad), wanted)
    many = torch.func.vmap(f)(torch.stack([z, 2 * z]), torch.stack([anchor] * 2), torch.stack([grad] * 2))
    assert torch.allclose(many, torch.stack([f(z, anchor, grad), f(2 * z, anchor, grad)]))
    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(z, anchor, grad), f(z, anchor, grad))
    anchors = anchor.clone().requires_grad_(), grad.clone().requires_grad_()
    f(z, *anchors).backward()
    assert anchors[0].grad is None and anchors[1].grad is None
    turned = [t.detach().T.contiguous().T for t in (z, anchor, grad)]
    assert torch.allclose(f(*turned), f(z, anchor, grad))


@settings(max_examples=40, deadline=None)
@given(seed=seeds, eta=st.floats(0.05, 5))
def test_mirror_surrogate(seed, eta):
    anchor = F.log_softmax(2 * randn(4, 5, seed=seed), 1)
    other = F.log_softmax(2 * randn(4, 5, seed=seed + 1), 1)
    grad = randn(4, 5, seed=seed + 2)
    rows = T.mirror_surrogate(other, anchor, grad, eta=eta, reduction="none")
    for i in range(4):
        p, q = other[i].exp(), anchor[i].exp()
        wanted = sum((grad[i, k] * (p[k] - q[k]) + p[k] * math.log(p[k] / q[k]) / eta).item() for k in range(5))
        assert rows[i].item() == pytest.approx(wanted, abs=1e-10)
    best = F.log_softmax(anchor - eta * grad, 1)  # mirror descent
    least = T.mirror_surrogate(best, anchor, grad, eta=eta, reduction="none")
    assert (least <= rows + 1e-12).all()
    closed = -torch.logsumexp(anchor - eta * grad, 1) / eta - (grad * anchor.exp()).sum(1)
    assert torch.allclose(least, closed, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, scale=st.floats(0.1, 10))
def test_mirror_surrogate_majorizes(seed, scale):
    """By Pinsker's inequality it lies above the quadratic one, and so above a loss of the probabilities with L = 1."""
    anchor, other = (F.log_softmax(scale * randn(6, 4, seed=seed + k), 1) for k in range(2))
    y = randn(6, 4, seed=seed + 2)
    losses, grad = T._oracle(lambda p: T.squared_losses(p, y), anchor.exp())
    bound = losses + T.mirror_surrogate(other, anchor, grad, eta=1.0, reduction="none")
    quadratic = T.target_surrogate(other.exp(), anchor.exp(), grad, eta=1.0, anchor_loss=losses, reduction="none")
    assert (bound >= quadratic - 1e-11).all() and (bound >= T.squared_losses(other.exp(), y) - 1e-11).all()


def test_mirror_surrogate_at_the_edge():
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = T.mirror_surrogate(F.log_softmax(logits, 1), F.log_softmax(-logits.detach(), 1), torch.ones(1, 3), eta=1.0)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(logits.grad).all()
    zero = torch.tensor([[0.0, -math.inf]])
    leaf = zero.clone().requires_grad_()
    value = T.mirror_surrogate(leaf, zero, torch.ones(1, 2), eta=1.0)
    value.backward()
    assert value == 0 and torch.isfinite(leaf.grad).all()
    half = torch.tensor([[0.5, 0.5]]).log()
    assert T.mirror_surrogate(half, zero, torch.ones(1, 2), eta=1.0) == math.inf
    assert torch.autograd.gradcheck(
        lambda v: T.mirror_surrogate(F.log_softmax(v, 1), half.double(), torch.ones(1, 2), eta=0.3),
        randn(1, 2).requires_grad_(),
    )


# ---- steps in target space -----------------------------------------------------------------------------------------


def test_schedules():
    for total in (1, 7, 100):
        assert T.target_step_size(3.0, 1, "sqrt") == 3.0
        assert T.target_step_size(3.0, total, "sqrt") == pytest.approx(3 / math.sqrt(total))
        assert T.target_step_size(3.0, 1, "exponential", total_steps=total) == pytest.approx(3 * total ** (-1 / total))
        assert T.target_step_size(3.0, total, "exponential", total_steps=total) == pytest.approx(3 / total)
        assert T.target_step_size(3.0, total) == 3.0


@settings(max_examples=60, deadline=None)
@given(seed=seeds, c=st.floats(0.1, 0.9), scale=st.floats(0.1, 10))
def test_target_line_search(seed, c, scale):
    """Every step up to 2 (1 - c) / L is accepted, for the sum of the losses; with the squared loss none beyond."""
    z, y = scale * randn(9, seed=seed), (uniform(9, seed=seed + 1) < 0.5).double()
    for fn, targets, L in ((T.logistic_losses, y, 0.25), (T.squared_losses, randn(9, seed=seed + 2), 1.0)):
        loss = lambda v, fn=fn, targets=targets: fn(v, targets)  # noqa: E731
        grad = T.target_gradient(fn, z, targets)
        eta, trials = T.target_line_search(loss, z, grad, eta=50.0, c=c)
        limit = 2 * (1 - c) / L
        assert 50 * 0.9 ** (trials - 1) == pytest.approx(eta) and eta >= 0.9 * limit * (1 - 1e-9)
        assert loss(z - eta * grad).sum() <= loss(z).sum() - c * eta * grad.square().sum() + 1e-9
        if fn is T.squared_losses:
            assert eta <= limit * (1 + 1e-9)
    assert T.target_line_search(loss, z, -grad, eta=1.0, max_trials=5) == (0.0, 5)


def test_line_search_as_a_schedule():
    x, y, net, forward, loss = problem("logistic")
    optimizer = T.SSO(net.parameters(), 100.0, 3, schedule="line_search")
    calls = []
    for _ in range(5):
        z = forward().detach()
        eta, trials = T.target_line_search(loss, z, T._oracle(loss, z)[1], eta=100.0)
        calls.append(trials + 2)
        assert eta >= 0.9 * 4
        optimizer.step(forward, loss)
    assert optimizer.oracle_calls == 5 and optimizer.loss_evals == sum(calls)


def test_the_line_searched_step_is_used():
    """A model that is its parameters lands at a step in target space, of the length that the search found."""
    start, y = randn(6, seed=3), torch.tensor([0.0, 1.0] * 3, dtype=DOUBLE)
    loss, theta = lambda z: T.logistic_losses(z, y), nn.Parameter(start.clone())
    grad = T.target_gradient(T.logistic_losses, start, y)
    eta, trials = T.target_line_search(loss, start, grad, eta=100.0, c=0.7)
    assert 1 < trials and eta < 100
    optimizer = T.SSO([theta], 100.0, 200, inner="gd", inner_lr=3 * eta, schedule="line_search", c=0.7, tolerance=1e-14)
    optimizer.step(lambda: theta * 1, loss)
    assert torch.allclose(theta.detach(), start - eta * grad, rtol=0, atol=1e-9)


# ---- linear models -------------------------------------------------------------------------------------------------


def test_exact_step_is_least_squares():
    X, y, theta = randn(20, 4), randn(20, seed=1), randn(4, seed=2)
    grad = T.target_gradient(T.squared_losses, X @ theta, y)
    wanted = torch.linalg.lstsq(X, y[:, None]).solution[:, 0]
    assert torch.allclose(T.exact_linear_step(X, theta, grad, 1.0), wanted, rtol=0, atol=1e-10)
    Y, many = randn(20, 3, seed=3), randn(4, 3, seed=4)
    grad = T.target_gradient(T.squared_losses, X @ many, Y)
    assert torch.allclose(
        T.exact_linear_step(X, many, grad, 1.0), torch.linalg.lstsq(X, Y).solution, rtol=0, atol=1e-10
    )


@settings(max_examples=40, deadline=None)
@given(seed=seeds, n=st.integers(1, 12), d=st.integers(1, 8), eta=st.floats(0.1, 5))
def test_exact_step_is_the_projection(seed, n, d, eta):
    """It minimizes the surrogate, nothing nearer to theta does, also with too few samples and equal columns."""
    X, theta, grad = randn(n, d, seed=seed), randn(d, seed=seed + 1), randn(n, seed=seed + 2)
    X[:, -1] = X[:, 0]
    after = T.exact_linear_step(X, theta, grad, eta)
    z = X @ theta
    slope = X.T @ (grad + (X @ after - z) / eta)
    assert slope.abs().max() < 1e-8 * (1 + 1 / eta)
    move = after - theta
    assert torch.allclose(torch.linalg.pinv(X) @ (X @ move), move, atol=1e-8)
    projected = X @ torch.linalg.pinv(X) @ (z - eta * grad)
    assert torch.allclose(X @ after, projected, atol=1e-8)


def test_exact_steps_never_increase_the_logistic_loss():
    X, y = logistic_data(40, (30, 10, 3, 1, 0.1), 0)
    theta, losses = torch.zeros(5, dtype=DOUBLE), []
    for _ in range(50):
        losses.append(T.logistic_losses(X @ theta, y).mean().item())
        theta = T.exact_linear_step(X, theta, T.target_gradient(T.logistic_losses, X @ theta, y), 4.0)
    assert all(b <= a + 1e-13 for a, b in itertools.pairwise(losses))
    assert losses[-1] < losses[0] and (X.T @ (torch.sigmoid(X @ theta) - y)).abs().max() < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_convex_rate_and_the_condition_of_the_features(seed):
    X, y = logistic_data(60, (30, 10, 3, 1, 0.1), 100 + 3 * seed)
    best = newton(X, y)
    least, distance = T.logistic_losses(X @ best, y).mean(), (X @ best).square().sum()
    theta = torch.zeros(5, dtype=DOUBLE)
    for t in range(1, 31):
        theta = T.exact_linear_step(X, theta, T.target_gradient(T.logistic_losses, X @ theta, y), 4.0)
        assert T.logistic_losses(X @ theta, y).mean() - least <= distance / (8 * t * 60) + 1e-13


@pytest.mark.parametrize("seed", range(3))
def test_few_exact_calls_against_thousands(seed):
    X, y = logistic_data(300, (30, 10, 3, 1, 0.1), 50 + 5 * seed)
    least = T.logistic_losses(X @ newton(X, y), y).mean()
    theta = torch.zeros(5, dtype=DOUBLE)
    for _ in range(3):
        theta = T.exact_linear_step(X, theta, T.target_gradient(T.logistic_losses, X @ theta, y), 4.0)
    assert T.logistic_losses(X @ theta, y).mean() - least < 1e-6
    theta, lr = torch.zeros(5, dtype=DOUBLE), 1 / T.surrogate_smoothness(X, eta=4.0)
    for _ in range(3000):
        theta = theta - lr * X.T @ (torch.sigmoid(X @ theta) - y) / 300
    assert T.logistic_losses(X @ theta, y).mean() - least > 1e-5


@settings(max_examples=30, deadline=None)
@given(seed=seeds, eta=st.floats(0.05, 1.0), mu=st.floats(0.05, 1.0))
def test_strongly_convex_rate(seed, eta, mu):
    """Weighted squares: curvatures in [mu, 1]. The distance falls by (1 - mu eta) a call at least, and so by the paper's root of it."""
    X, y, theta = randn(15, 3, seed=seed), randn(15, seed=seed + 1), randn(3, seed=seed + 2)
    w = mu + (1 - mu) * uniform(15, seed=seed + 3)
    root = w.sqrt()[:, None]
    best = X @ torch.linalg.lstsq(root * X, root * y[:, None]).solution[:, 0]
    for _ in range(6):
        z = X @ theta
        theta = T.exact_linear_step(X, theta, w * (z - y), eta)
        assert (X @ theta - best).norm() <= (1 - mu * eta) * (z - best).norm() + 1e-10


def test_exact_step_does_not_see_the_basis():
    X, y = logistic_data(30, (3, 1, 0.3), 5)
    A = randn(3, 3, seed=9) + 2 * torch.eye(3, dtype=DOUBLE)
    outputs = {}
    for name, features in (("X", X), ("XA", X @ A)):
        exact, plain = torch.zeros(3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
        for _ in range(10):
            exact = T.exact_linear_step(features, exact, T.target_gradient(T.logistic_losses, features @ exact, y), 4.0)
            plain = plain - 0.1 * features.T @ (torch.sigmoid(features @ plain) - y) / 30
        outputs[name] = features @ exact, features @ plain
    assert torch.allclose(outputs["X"][0], outputs["XA"][0], rtol=0, atol=1e-8)
    assert (outputs["X"][1] - outputs["XA"][1]).abs().max() > 1e-2


def test_surrogate_smoothness():
    X = randn(9, 4)
    assert T.surrogate_smoothness(X, eta=0.7).item() == pytest.approx(
        torch.linalg.eigvalsh(X.T @ X)[-1].item() / (9 * 0.7)
    )


@settings(max_examples=40, deadline=None)
@given(seed=seeds, m=st.integers(1, 9), eta=st.floats(0.1, 5), share=st.floats(0.05, 1.9))
def test_single_sample_steps(seed, m, eta, share):
    """The closed form is m gradient steps on the surrogate by autograd; the limit is Kaczmarz'."""
    x, theta, y = randn(4, seed=seed), randn(4, seed=seed + 1), randn(1, seed=seed + 2)
    alpha = share * eta / x.square().sum().item()
    z = (x @ theta)[None]
    grad = T.target_gradient(T.squared_losses, z, y)
    omega = theta.clone()
    for _ in range(m):
        omega.requires_grad_()
        surrogate = T.target_surrogate((x @ omega)[None], z, grad, eta=eta)
        omega = (omega - alpha * torch.autograd.grad(surrogate, omega)[0]).detach()
    given = dict(eta=eta, inner_lr=alpha)
    closed = T.single_sample_step(x, theta, grad[0], inner_steps=m, **given)
    assert torch.allclose(closed, omega, rtol=1e-9, atol=1e-11)
    limit = T.kaczmarz_step(x, theta, grad[0], eta)
    far = T.single_sample_step(x, theta, grad[0], inner_steps=2000, **given)
    assert torch.allclose(far, limit, rtol=1e-9, atol=1e-10)
    assert torch.allclose(T.exact_linear_step(x[None], theta, grad, eta), limit, rtol=1e-9, atol=1e-10)
    assert (x @ T.kaczmarz_step(x, theta, grad[0], 1.0)).item() == pytest.approx(y.item(), abs=1e-9)
    stack = T.kaczmarz_step(torch.stack([x, 2 * x]), torch.stack([theta] * 2), torch.cat([grad, grad]), eta)
    assert torch.allclose(stack[0], limit) and torch.allclose(stack[1] - theta, (limit - theta) / 2)


def test_closed_form_by_hand():
    x, theta, one = (
        torch.tensor([2.0, 0.0], dtype=DOUBLE),
        torch.zeros(2, dtype=DOUBLE),
        torch.tensor(1.0, dtype=DOUBLE),
    )
    step = T.single_sample_step(x, theta, one, eta=2.0, inner_lr=0.25, inner_steps=3)
    assert step.tolist() == [-2 * 0.875 / 2, 0.0]


def test_a_small_rate_is_not_lost():
    """One step is SGD's, also where 1 - (1 - r) is zero in single precision."""
    x, theta, slope = torch.tensor([1.0, 2.0]), torch.zeros(2), torch.tensor(3.0)
    for alpha in (1e-8, 1e-12):
        step = T.single_sample_step(x, theta, slope, eta=1.0, inner_lr=alpha, inner_steps=1)
        assert torch.allclose(step, -alpha * slope * x, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["squared", "logistic"])
@pytest.mark.parametrize("seed", range(4))
def test_interpolation_never_moves_away(kind, seed):
    X, best = randn(20, 3, seed=seed), randn(3, seed=seed + 50)
    y = X @ best if kind == "squared" else torch.sigmoid(X @ best)
    losses, L = LOSSES[kind]
    theta, eta = torch.zeros(3, dtype=DOUBLE), 0.7 / L
    picks = torch.randint(20, (400,), generator=torch.Generator().manual_seed(seed)).tolist()
    for i in picks:
        before = (theta - best).square().sum()
        grad = T.target_gradient(losses, (X[i] @ theta)[None], y[i : i + 1])[0]
        theta = T.kaczmarz_step(X[i], theta, grad, eta)
        gain = eta * (2 / L - eta) / X[i].square().sum() * grad**2
        assert (theta - best).square().sum() <= before - gain + 1e-13
    if kind == "squared":
        assert (theta - best).norm() < 1e-10


def test_bias_without_interpolation():
    """Single samples, exact: the minimizer of the reweighted loss, not of the mean loss. One inner step: SGD, no bias."""
    n, d, chains = 30, 3, 8
    X = F.normalize(randn(n, d), dim=1) * 10 ** uniform(n, 1, seed=1)
    y = X @ randn(d, seed=2) + randn(n, seed=3)
    squared = X.square().sum(1)
    mean_best = torch.linalg.lstsq(X, y[:, None]).solution[:, 0]
    root = squared.rsqrt()[:, None]
    weighted_best = torch.linalg.lstsq(root * X, root * y[:, None]).solution[:, 0]
    theta, total, steps = torch.zeros(chains, d, dtype=DOUBLE), 0, 30_000
    picks = torch.randint(n, (steps, chains), generator=torch.Generator().manual_seed(4))
    directions = X / squared[:, None]
    for t in range(steps):  # kaczmarz_step without its checks
        rows = X[picks[t]]
        residual = (rows * theta).sum(1) - y[picks[t]]
        theta = theta - min(1, 20 / (t + 1)) * residual[:, None] * directions[picks[t]]
        if t == 500:
            own = T.kaczmarz_step(rows, theta, residual, 0.3)
            assert torch.allclose(own, theta - 0.3 * residual[:, None] * directions[picks[t]])
        if t >= steps // 2:
            total = total + theta
    mean = (total / (steps - steps // 2)).mean(0)
    to_weighted, to_mean = (mean - weighted_best).norm(), (mean - mean_best).norm()
    assert to_weighted < 0.25 * to_mean
    # The expected step vanishes at the one, and not at the other.
    drift = lambda theta: ((X @ theta - y)[:, None] * directions).mean(0).norm()  # noqa: E731
    assert drift(weighted_best) < 1e-12 < 1e-3 < drift(mean_best)


# ---- Armijo --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=seeds, c=st.floats(0.05, 0.9), first=st.floats(1e-3, 100))
def test_armijo(seed, c, first):
    H = randn(4, 4, seed=seed)
    H = H @ H.T
    x = randn(4, seed=seed + 1).requires_grad_()
    fn = lambda: x @ H @ x / 2  # noqa: E731
    before, start, gradient = fn().item(), x.detach().clone(), H @ x.detach()
    value, step, trials = T.armijo_step(fn, [x], first, c=c, max_trials=300)
    assert torch.allclose(x.detach(), start - step * gradient, rtol=1e-12, atol=1e-12)
    assert value == fn().item() <= before - c * step * gradient.square().sum().item()
    assert step == pytest.approx(first * 0.9 ** (trials - 1))
    largest = torch.linalg.eigvalsh(H)[-1].item()
    assert step >= 0.9 * min(first, 2 * (1 - c) / largest) * (1 - 1e-9)
    if trials > 1:  # the trial before was not good enough
        last = step / 0.9
        other = start - last * gradient
        assert other @ H @ other / 2 > before - c * last * gradient.square().sum().item() * (1 + 1e-12) - 1e-12


def test_armijo_without_an_accepted_trial_stays():
    x = torch.tensor([1.0, 2.0], dtype=DOUBLE, requires_grad=True)
    start = x.detach().clone()
    steep = lambda: 1e9 * (x**2).sum()  # noqa: E731
    assert T.armijo_step(steep, [x], 10.0) == (5e9, 0.0, 100)
    assert torch.equal(x.detach(), start)
    value, step, trials = T.armijo_step(steep, [x], 10.0, min_step=5.0)
    assert (step, trials) == (0.0, 7) and torch.equal(x.detach(), start)
    assert T.armijo_step(lambda: (0 * x).sum(), [x], 1.0) == (0.0, 0.0, 0)
    nan = lambda: (x * math.nan).sum()  # noqa: E731
    assert T.armijo_step(nan, [x], 1.0)[1] == 0 and torch.equal(x.detach(), start)
    unused, frozen = torch.ones(2, requires_grad=True), torch.ones(2)
    assert T.armijo_step(lambda: (x**2).sum(), [unused, frozen, x], 0.1, c=0.5)[1] == 0.1
    assert torch.equal(unused.detach(), frozen) and x.grad is None


# ---- SSO -----------------------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("eta", [0.01, 100.0])
def test_one_inner_step_is_sgd(kind, eta):
    paths = []
    for mine in (True, False):
        x, y, net, forward, loss = problem(kind)
        optimizer = (
            T.SSO(net.parameters(), eta, 1, inner="gd", inner_lr=0.3)
            if mine
            else torch.optim.SGD(net.parameters(), 0.3)
        )
        path = []
        for _ in range(20):
            if mine:
                optimizer.step(forward, loss)
            else:
                optimizer.zero_grad()
                loss(forward()).mean().backward()
                optimizer.step()
            path.append(flat(net))
        paths.append(torch.stack(path))
    assert torch.allclose(*paths, rtol=0, atol=1e-12)


def literal_sso(net, forward, loss, steps, eta, m, alpha, schedule, total):
    for t in range(1, steps + 1):
        z = forward().detach()
        leaf = z.clone().requires_grad_()
        (G,) = torch.autograd.grad(loss(leaf).sum(), leaf)
        eta_t = {"constant": eta, "sqrt": eta / t**0.5, "exponential": eta * (1 / total) ** (t / total)}[schedule]
        for _ in range(m):
            out = forward()
            n = len(out)
            S = sum((G[i] * out[i]).sum() + ((out[i] - z[i]) ** 2).sum() / (2 * eta_t) for i in range(n)) / n
            grads = torch.autograd.grad(S, list(net.parameters()))
            with torch.no_grad():
                for p, g in zip(net.parameters(), grads, strict=True):
                    p -= alpha * g
    return flat(net)


@every_loss
@pytest.mark.parametrize("schedule", ["constant", "sqrt", "exponential"])
def test_sso_is_its_algorithm(kind, schedule):
    x, y, net, forward, loss = problem(kind)
    wanted = literal_sso(net, forward, loss, 6, 0.8, 4, 0.1, schedule, 6)
    x, y, net, forward, loss = problem(kind)
    optimizer = T.SSO(net.parameters(), 0.8, 4, inner="gd", inner_lr=0.1, schedule=schedule, total_steps=6)
    for _ in range(6):
        before = loss(forward()).mean()
        returned = optimizer.step(forward, loss)
        assert returned.item() == pytest.approx(before.item()) and not returned.requires_grad
    assert torch.allclose(flat(net), wanted, rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in net.parameters())


def literal_armijo(net, forward, loss, steps, eta, m, reset):
    """The same with line searches, a step memory, and a count of the runs of the model."""
    memory, runs = None, 0
    params = list(net.parameters())
    for _ in range(steps):
        z = forward().detach()
        leaf = z.clone().requires_grad_()
        (G,) = torch.autograd.grad(loss(leaf).sum(), leaf)
        S = lambda: T.target_surrogate(forward(), z, G, eta=eta)  # noqa: B023, E731
        if reset:
            memory = None
        for _ in range(m):
            value = S()
            runs += 1
            grads = torch.autograd.grad(value, params)
            squared = sum((g**2).sum() for g in grads).item()
            start = [p.detach().clone() for p in params]
            step = 10.0 if memory is None else 1.8 * memory
            with torch.no_grad():
                while True:
                    for p, s, g in zip(params, start, grads, strict=True):
                        p.copy_(s - step * g)
                    runs += 1
                    if S().item() <= value.item() - 0.5 * step * squared:
                        break
                    step *= 0.9
            memory = step
    return flat(net), runs


@every_loss
@pytest.mark.parametrize("reset", [True, False])
def test_sso_with_armijo_is_its_algorithm(kind, reset):
    x, y, net, forward, loss = problem(kind)
    wanted, runs = literal_armijo(net, forward, loss, 4, 0.8, 3, reset)
    x, y, net, forward, loss = problem(kind)
    optimizer = T.SSO(net.parameters(), 0.8, 3, reset_inner_step=reset)
    for _ in range(4):
        optimizer.step(forward, loss)
    assert torch.allclose(flat(net), wanted, rtol=1e-8, atol=1e-9)
    assert optimizer.model_evals == runs and optimizer.oracle_calls == 4 and optimizer.model_grads == 12


def test_honest_counts():
    x, y, net, forward, loss = problem("logistic")
    calls = dict(forward=0, loss=0)

    def counted_forward():
        calls["forward"] += 1
        return forward()

    def counted_loss(z):
        calls["loss"] += 1
        assert z.requires_grad and z.is_leaf  # the oracle cannot reach the model
        return loss(z)

    for options in (dict(inner="gd", inner_lr=0.1), dict(inner="armijo"), dict(schedule="line_search")):
        calls.update(forward=0, loss=0)
        optimizer = T.SSO(net.parameters(), 4.0, 7, **options)
        assert optimizer.steps == optimizer.oracle_calls == optimizer.model_evals == 0
        free = "schedule" in options
        for _ in range(3):
            optimizer.step(counted_forward, loss if free else counted_loss)
        assert optimizer.oracle_calls == optimizer.steps == 3 and optimizer.model_evals == calls["forward"]
        assert free or optimizer.loss_evals == calls["loss"] == 3
        if options.get("inner") == "gd":
            assert optimizer.model_evals == optimizer.model_grads == 21
    sls = T.SLS(net.parameters())
    calls.update(forward=0, loss=0)
    for _ in range(3):
        sls.step(counted_forward, lambda z: [loss(z), calls.update(loss=calls["loss"] + 1)][0])
    assert sls.oracle_calls == 3 and sls.loss_evals == sls.model_evals == calls["loss"] == calls["forward"] > 6
    with pytest.raises(AttributeError, match="no attribute 'calls'"):
        sls.calls  # noqa: B018


def test_sls_returns_the_loss_before_its_step():
    """On x² from 3 the first trial 0.5 lands on the minimum: two values of the loss, and no more."""
    x = nn.Parameter(torch.tensor([3.0], dtype=DOUBLE))
    optimizer = T.SLS([x], first_step=0.5)
    assert optimizer.step(lambda: x * 1, lambda z: z**2).item() == 9 and x.item() == 0
    assert (optimizer.loss_evals, optimizer.model_evals, optimizer.model_grads) == (2, 2, 1)


def test_gradient_of_the_loss_stays_that_of_the_anchor():
    """The loss changes its gradient after each call; inner steps must not see it."""
    theta, called = nn.Parameter(torch.zeros(1, dtype=DOUBLE)), []

    def loss(z):
        called.append(1)
        return z * (1.0 if len(called) == 1 else 1e6)

    T.SSO([theta], 1.0, 500, inner="gd", inner_lr=0.1).step(lambda: theta * 1, loss)
    assert len(called) == 1 and theta.item() == pytest.approx(-1.0, abs=1e-5)  # z - eta * gradient


@pytest.mark.parametrize("m", [1, 3, 20])
@settings(max_examples=8, deadline=None)
@given(seed=seeds)
def test_descent_and_rate(m, seed):
    """The chapter's theorem, each outer step, on logistic data."""
    X, y = logistic_data(25, (3, 1, 0.3), seed)
    theta = nn.Parameter(randn(3, seed=seed + 9))
    beta = T.surrogate_smoothness(X, eta=4.0).item()
    optimizer = T.SSO([theta], 4.0, m, inner="gd", inner_lr=1 / beta, tolerance=0)
    forward, loss = lambda: X @ theta, lambda z: T.logistic_losses(z, y)
    value = lambda: loss(X @ theta.detach()).mean().item()  # noqa: E731
    first, smallest = value(), math.inf
    for t in range(1, 31):
        before = value()
        squared = (X.T @ (torch.sigmoid(X @ theta.detach()) - y) / 25).square().sum().item()
        smallest = min(smallest, squared)
        optimizer.step(forward, loss)
        assert value() <= before - squared / (2 * beta) + 1e-13
        assert smallest <= 2 * beta * (first - 0) / t  # the infimum is at least 0


@every_loss
def test_armijo_never_increases_surrogate_or_loss(kind):
    x, y, net, forward, loss = problem(kind)
    optimizer = T.SSO(net.parameters(), 1 / LOSSES[kind][1], 10)
    values = [optimizer.step(forward, loss).item() for _ in range(15)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(values)) and values[-1] < values[0]


def test_m_one_with_the_squared_loss_is_sls():
    """At eta = 1 the surrogate is the loss."""
    paths = []
    for make in (lambda p: T.SSO(p, 1.0, 1, tolerance=0), lambda p: T.SLS(p, reset=True)):
        x, y, net, forward, loss = problem("squared")
        optimizer = make(net.parameters())
        for _ in range(10):
            optimizer.step(forward, loss)
        paths.append(flat(net))
    assert torch.allclose(*paths, rtol=0, atol=1e-9)


def test_many_inner_steps_are_the_exact_step():
    X, y = logistic_data(30, (1, 0.8, 0.6), 3)
    theta = nn.Parameter(torch.zeros(3, dtype=DOUBLE))
    optimizer = T.SSO(
        [theta], 4.0, 3000, inner="gd", inner_lr=1 / T.surrogate_smoothness(X, eta=4.0).item(), tolerance=1e-13
    )
    wanted = T.exact_linear_step(X, theta.detach(), T.target_gradient(T.logistic_losses, X @ theta.detach(), y), 4.0)
    optimizer.step(lambda: X @ theta, lambda z: T.logistic_losses(z, y))
    assert torch.allclose(theta.detach(), wanted, rtol=0, atol=1e-10)
    assert optimizer.model_evals < 3000  # the tolerance ended it


def test_zero_gradient_returns_at_once():
    for inner in ("gd", "armijo"):
        theta = nn.Parameter(torch.ones(2, dtype=DOUBLE))
        optimizer = T.SSO([theta], 1.0, 50, inner=inner)
        optimizer.step(lambda theta=theta: theta * 1, lambda z: (z - 1) ** 2)
        assert optimizer.oracle_calls == optimizer.model_evals == 1 and theta.tolist() == [1, 1]


@pytest.mark.parametrize("reset", [True, False])
def test_a_search_without_success_ends_the_inner_loop(reset):
    """The surrogate is too steep for the shortest trial: nothing moves, and nothing more is tried."""
    theta = nn.Parameter(torch.ones(2, dtype=DOUBLE))
    optimizer = T.SSO([theta], 1.0, 5, reset_inner_step=reset)
    for step in (1, 2):
        loss = optimizer.step(lambda: 1e6 * theta, lambda z: T.squared_losses(z, torch.zeros_like(z)))
        assert loss.item() == pytest.approx(5e11) and theta.tolist() == [1, 1]
        assert optimizer.model_evals == 101 * step and optimizer.model_grads == optimizer.oracle_calls == step


@pytest.mark.parametrize("inner", ["gd", "armijo"])
@pytest.mark.parametrize("view", [lambda theta: theta, lambda theta: theta[:2]], ids=["whole", "part"])
def test_a_model_that_is_its_parameters(inner, view):
    """Outputs that share their memory with the parameters move with them; the anchor must not."""
    theta = nn.Parameter(torch.ones(3, dtype=DOUBLE))
    optimizer = T.SSO([theta], 0.5, 100, inner=inner, inner_lr=1.0 if inner == "armijo" else 0.2)
    optimizer.step(lambda: view(theta), lambda z: T.squared_losses(z, torch.zeros_like(z)))
    assert view(theta).tolist() == pytest.approx([0.5] * len(view(theta)), abs=1e-5)


@pytest.mark.parametrize("tolerance, runs", [(0.3, 3), (0.25, 3), (0.2, 4)])
def test_the_inner_loop_ends_at_the_tolerance(tolerance, runs):
    """The surrogate's gradient is halved by each inner step, from 1 on."""
    theta = nn.Parameter(torch.zeros(1, dtype=DOUBLE))
    optimizer = T.SSO([theta], 1.0, 50, inner="gd", inner_lr=0.5, tolerance=tolerance)
    optimizer.step(lambda: theta * 1, lambda z: T.squared_losses(z, torch.ones_like(z)))
    assert optimizer.model_evals == optimizer.model_grads == runs


def test_without_a_step_in_target_space_nothing_moves():
    """The loss is too steep for five trials in target space: there is no surrogate then."""
    theta = nn.Parameter(torch.ones(2, dtype=DOUBLE))
    optimizer = T.SSO([theta], 1.0, 3, inner="gd", inner_lr=0.1, schedule="line_search", max_trials=5)
    optimizer.step(lambda: theta * 1, lambda z: 1e9 * z**2)
    assert theta.tolist() == [1, 1]
    assert (optimizer.model_evals, optimizer.loss_evals, optimizer.oracle_calls) == (1, 7, 1)


def test_a_scaled_direction():
    """A direction eight times as long, and trials an eighth as long, are the same search."""
    ends = []
    for scale in (1.0, 8.0):
        x, y, net, forward, loss = problem("cross_entropy")
        optimizer = T.SSO(net.parameters(), 2.0, 5, inner_lr=scale, first_step=10 / scale, min_step=0.0)
        for _ in range(3):
            optimizer.step(forward, loss)
        ends.append(flat(net))
    assert torch.allclose(*ends, rtol=0, atol=1e-12)


def test_minibatches_never_see_other_samples():
    """The surrogate of a batch is a seminorm: with a parameter for each sample the others stay."""
    theta = nn.Parameter(torch.zeros(4, dtype=DOUBLE))
    y = torch.arange(1.0, 5.0, dtype=DOUBLE)
    optimizer = T.SSO([theta], 1.0, 200, inner="gd", inner_lr=1.0, tolerance=1e-12)
    optimizer.step(lambda: theta[:2], lambda z: T.squared_losses(z, y[:2]))
    assert theta.tolist() == pytest.approx([1, 2, 0, 0], abs=1e-9)


# ---- SSO as an optimizer -------------------------------------------------------------------------------------------


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches(count):
    return [(randn(10, 6, seed=2 * t), torch.arange(10) % 3) for t in range(count)]


def train(net, optimizer, data):
    for x, y in data:
        optimizer.step(lambda x=x: net(x), lambda z, y=y: T.cross_entropy_losses(z, y))
    return flat(net)


def groups_of(net):
    weights, biases = ([p for p in net.parameters() if (p.ndim > 1) == big] for big in (True, False))
    return [dict(params=weights), dict(params=biases, inner_lr=0.05)]


MAKERS = {
    "gd": lambda groups: T.SSO(groups, 2.0, 3, inner="gd", inner_lr=0.2, schedule="sqrt"),
    "armijo": lambda groups: T.SSO(groups, 2.0, 3, schedule="exponential", total_steps=20, reset_inner_step=False),
    "sls": lambda groups: T.SLS(groups),
}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def test_parameter_groups():
    """A group's inner learning rate scales its gradient, for both inner optimizers."""
    steps = {}
    for options in (dict(inner="gd", inner_lr=0.2), dict(inner="armijo")):
        net = network()
        before = [p.detach().clone() for p in net.parameters()]
        optimizer = T.SSO(groups_of(net), 2.0, 1, **options)
        (x, y) = batches(1)[0]
        grads = torch.autograd.grad(T.cross_entropy_losses(net(x), y).mean(), list(net.parameters()))
        train(net, optimizer, [(x, y)])
        moved = [(b - p.detach()) / g for p, b, g in zip(net.parameters(), before, grads, strict=True)]
        steps[options["inner"]] = [m.mean().item() for m in moved]
        assert all(torch.allclose(m, m.mean().expand_as(m), rtol=1e-6) for m in moved)
    assert steps["gd"] == pytest.approx([0.2, 0.05, 0.2, 0.05])
    weights = steps["armijo"][0]
    assert steps["armijo"] == pytest.approx([weights, 0.05 * weights] * 2) and weights > 0


def test_options_live_in_the_groups():
    net = network()
    optimizer = T.SSO(net.parameters(), 2.0, 3, inner="gd", inner_lr=0.2)
    optimizer.param_groups[0]["inner_steps"] = 5
    train(net, optimizer, batches(1))
    assert optimizer.model_evals == 5
    extra = nn.Parameter(torch.zeros(2, dtype=DOUBLE))
    optimizer.add_param_group(dict(params=[extra], inner_lr=1.0))
    train(net, optimizer, batches(2))  # a parameter that the model does not use stays
    assert torch.equal(extra.detach(), torch.zeros(2, dtype=DOUBLE))
    with pytest.raises(ValueError, match="eta is one for all parameter groups"):
        optimizer.add_param_group(dict(params=[nn.Parameter(torch.zeros(1))], eta=1.0))


@every_maker
def test_state_dict_in_the_middle_of_a_run(make):
    data = batches(20)
    net = network()
    first = make(groups_of(net))
    wanted = train(net, first, data)
    net = network()
    optimizer = make(groups_of(net))
    train(net, optimizer, data[:9])
    file = io.BytesIO()
    torch.save(dict(net=net.state_dict(), optimizer=optimizer.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = network(seed=5)
    other.load_state_dict(saved["net"])
    fresh = make(groups_of(other))
    fresh.load_state_dict(saved["optimizer"])
    assert fresh.param_groups[1]["inner_lr"] == 0.05 and fresh.oracle_calls == 9
    copied = copy.deepcopy((other, fresh))
    assert torch.equal(train(other, fresh, data[9:]), wanted)
    assert torch.equal(train(*copied, data[9:]), wanted)
    for name in T.COUNTERS:
        assert getattr(fresh, name) == getattr(copied[1], name) == getattr(first, name)


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_checkpoint_on_another_device(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    make = lambda net: T.SSO(net.parameters(), 2.0, 3, inner="gd", inner_lr=0.2, tolerance=0)  # noqa: E731
    net = network()
    optimizer = make(net)
    train(net, optimizer, batches(5))
    moved = network().to(device)
    fresh = make(moved)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.oracle_calls == 5 and fresh.model_evals == 15
    x = torch.zeros(10, 6, dtype=DOUBLE, device=device)  # and it steps there
    loss = fresh.step(lambda: moved(x), lambda z: T.squared_losses(z, torch.zeros_like(z)))
    assert loss.device.type == device and fresh.oracle_calls == 6 and fresh.model_evals == 18


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@every_maker
def test_gpu_is_the_cpu(make):
    paths = []
    for device in ("cpu", "cuda"):
        net = network().to(device)
        data = [(x.to(device), y.to(device)) for x, y in batches(10)]
        paths.append(train(net, make(groups_of(net)), data).cpu())
    assert torch.allclose(*paths, rtol=0, atol=1e-9)


@every_maker
def test_closures_turn_gradients_on(make):
    net, other = network(), network()
    wanted = train(net, make(groups_of(net)), batches(4))
    with torch.no_grad():
        assert torch.equal(train(other, make(groups_of(other)), batches(4)), wanted)


@every_maker
def test_compiled_model(make):
    torch._dynamo.reset()
    net, other = network(), network()
    wanted = train(net, make(groups_of(net)), batches(4))
    compiled, optimizer = torch.compile(other, backend="aot_eager"), make(groups_of(other))
    for x, y in batches(4):
        optimizer.step(lambda x=x: compiled(x), lambda z, y=y: T.cross_entropy_losses(z, y))
    assert torch.allclose(flat(other), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("make", [MAKERS["gd"], MAKERS["armijo"]], ids=["gd", "armijo"])
def test_compiled_training_step(make):
    torch._dynamo.reset()
    net, other = network(), network()
    first, second = make(groups_of(net)), make(groups_of(other))
    wanted = train(net, first, batches(2))

    @torch.compile(backend="aot_eager")
    def training_step(x, y):
        return second.step(lambda: other(x), lambda z: T.cross_entropy_losses(z, y))

    for x, y in batches(2):
        training_step(x, y)
    assert torch.allclose(flat(other), wanted, rtol=0, atol=1e-9)
    assert second.model_evals == first.model_evals and second.oracle_calls == 2


@pytest.mark.parametrize("inner", ["gd", "armijo"])
@pytest.mark.parametrize("around", ["forward", "step"])
def test_amp_loop(inner, around):
    """Autocast to bfloat16, around the model or around the whole step, where its cache of casts must not survive a move."""
    torch.manual_seed(0)
    net, plain = (nn.Linear(6, 3) for _ in range(2))
    plain.load_state_dict(net.state_dict())
    losses, cast = {}, lambda: torch.autocast("cpu", torch.bfloat16)
    for name, model in (("amp", net), ("plain", plain)):
        optimizer, values = T.SSO(model.parameters(), 2.0, 5, inner=inner, inner_lr=0.3 if inner == "gd" else 1.0), []
        for t in range(15):
            x = randn(30, 6, seed=t % 3, dtype=torch.float32)
            y = x[:, :3].argmax(1)
            outputs = []

            def forward(model=model, name=name, x=x, outputs=outputs):
                with cast() if name == "amp" and around == "forward" else nullcontext():
                    outputs.append(model(x))
                return outputs[-1]

            with cast() if name == "amp" and around == "step" else nullcontext():
                values.append(optimizer.step(forward, lambda z, y=y: T.cross_entropy_losses(z, y)).item())
            if name == "amp":
                assert outputs[0].dtype == torch.bfloat16
                assert not torch.equal(outputs[0], outputs[-1])  # the model that was run had moved
        losses[name] = values
    assert losses["amp"] == pytest.approx(losses["plain"], abs=0.05) and losses["amp"][-1] < 0.6 * losses["amp"][0]
    assert net.weight.dtype == torch.float32


def test_a_failed_search_leaves_no_cast_behind():
    """The parameters are back where they were; under autocast so is the model."""
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2), randn(5, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        steep = lambda: 1e9 * layer(x).float().square().sum()  # noqa: E731
        assert T.armijo_step(steep, layer.parameters(), 1.0, max_trials=3)[1:] == (0.0, 3)
        assert torch.equal(layer(x), before)


def test_two_dtypes_and_a_frozen_parameter():
    a, b, c = nn.Parameter(randn(3)), nn.Parameter(randn(3).float()), nn.Parameter(randn(3), requires_grad=False)
    frozen = c.clone()
    for inner in ("gd", "armijo"):
        optimizer = T.SSO([c, a, b], 1.0, 40, inner=inner, inner_lr=1.0 if inner == "armijo" else 0.5)
        optimizer.step(lambda: a + b.double() + c, lambda z: T.squared_losses(z, torch.ones(3, dtype=DOUBLE)))
        assert torch.allclose(a + b + c, torch.ones(3, dtype=DOUBLE), atol=1e-4)
        with torch.no_grad():
            a.add_(1)
    assert torch.equal(c, frozen)


def test_hooks_and_schedulers():
    theta, seen = nn.Parameter(torch.zeros(2)), []
    optimizer = T.SSO([theta], 1.0, 2)
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    optimizer.step(lambda: theta * 1, lambda z: (z - 1) ** 2)
    assert seen == [1]
    assert "SSO" in repr(optimizer) and "eta" in repr(optimizer)


# ---- bad input -----------------------------------------------------------------------------------------------------

two, three = torch.zeros(2), torch.zeros(3)


def leaf(*shape):
    return nn.Parameter(torch.zeros(*shape))


def sso(**options):
    return T.SSO([leaf(2)], **{**dict(eta=1.0, inner_steps=2), **options})


def stepped(forward, loss):
    theta = leaf(2)
    return T.SSO([theta], 1.0, 2).step(lambda: forward(theta), loss)


def changing():
    shapes = iter([2, 3, 3])
    theta = leaf(3)
    return T.SSO([theta], 1.0, 2, inner="gd").step(lambda: theta[: next(shapes)], lambda z: z)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: T.target_surrogate(two, three, two, eta=1.0), ValueError, "anchor_outputs must have the shape of outputs"),
        (lambda: T.target_surrogate(two, two, three, eta=1.0), ValueError, "anchor_grad must have the shape of outputs"),
        (lambda: T.target_surrogate(two, two, two, eta=0.0), ValueError, "eta must be finite and > 0"),
        (lambda: T.target_surrogate(two, two, two, eta="1"), TypeError, "eta must be a number"),
        (lambda: T.target_surrogate(two.long(), two, two, eta=1.0), TypeError, "outputs must be a floating"),
        (lambda: T.target_surrogate(torch.tensor(1.0), two, two, eta=1.0), ValueError, "outputs must have a row"),
        (lambda: T.target_surrogate(torch.zeros(0), two, two, eta=1.0), ValueError, "outputs must not be empty"),
        (lambda: T.target_surrogate(two, two, two, eta=1.0, anchor_loss=three), ValueError, "anchor_loss must have shape"),
        (lambda: T.target_surrogate(two, two, two, eta=1.0, anchor_loss=math.nan), ValueError, "anchor_loss must be finite"),
        (lambda: T.target_surrogate(two, two, two, eta=1.0, reduction="max"), ValueError, "reduction must be one of"),
        (lambda: T.mirror_surrogate(two, two, two, eta=1.0), ValueError, "log_probs must have 2 dimension"),
        (lambda: T.mirror_surrogate(two[None], two, two, eta=1.0), ValueError, "anchor_log_probs must have the shape"),
        (lambda: T.mirror_surrogate(two[None], two[None], two[None], eta=-1.0), ValueError, "eta must be"),
        (lambda: T.squared_losses(two, three), ValueError, "targets must have the shape of outputs"),
        (lambda: T.logistic_losses(two, two - 1), ValueError, r"targets must lie in \[0, 1\]"),
        (lambda: T.logistic_losses(two, three), ValueError, "targets must have the shape of outputs"),
        (lambda: T.cross_entropy_losses(two[None], torch.tensor([2])), ValueError, r"targets must lie in \[0, 2\)"),
        (lambda: T.cross_entropy_losses(two[None], torch.tensor([0, 1])), ValueError, "targets must have shape"),
        (lambda: T.target_gradient(lambda z, y: z.sum(), two, two), ValueError, "one value for each sample"),
        (lambda: T.target_gradient(lambda z, y: z.detach(), two, two), ValueError, "differentiable function"),
        (lambda: T.target_step_size(1.0, 0), ValueError, "step must be at least 1"),
        (lambda: T.target_step_size(1.0, 1, "linear"), ValueError, "schedule must be one of"),
        (lambda: T.target_step_size(1.0, 1, "exponential"), ValueError, "total_steps must be given"),
        (lambda: T.target_line_search(lambda z: z, two, two, eta=1.0, c=1.0), ValueError, r"c must lie in \(0, 1\)"),
        (lambda: T.target_line_search(lambda z: z, two, three, eta=1.0), ValueError, "grad must have the shape"),
        (lambda: T.surrogate_smoothness(two, eta=1.0), ValueError, "X must have 2 dimension"),
        (lambda: T.exact_linear_step(torch.ones(3, 2), three, three, 1.0), ValueError, r"theta must have shape \(2,\)"),
        (lambda: T.exact_linear_step(torch.ones(3, 2), two, two, 1.0), ValueError, r"grad must have shape \(3,\)"),
        (lambda: T.exact_linear_step(torch.ones(3, 2), two.double(), three, 1.0), TypeError, "theta must have the dtype"),
        (lambda: T.exact_linear_step(torch.full((3, 2), math.inf), two, three, 1.0), ValueError, "X must be finite"),
        (lambda: T.kaczmarz_step(two, two, torch.tensor(1.0), 1.0), ValueError, "x must not be zero"),
        (lambda: T.kaczmarz_step(two + 1, three, torch.tensor(1.0), 1.0), ValueError, "x must have the shape of theta"),
        (lambda: T.kaczmarz_step(two + 1, two, two, 1.0), ValueError, "grad must have shape"),
        (lambda: T.single_sample_step(two + 1, two, torch.tensor(1.0), eta=1.0, inner_lr=0.0, inner_steps=1), ValueError, "inner_lr"),
        (lambda: T.single_sample_step(two + 1, two, torch.tensor(1.0), eta=1.0, inner_lr=1.0, inner_steps=0), ValueError, "inner_steps"),
        (lambda: T.armijo_step(lambda: two.sum(), [leaf(2)], 1.0), ValueError, "must depend on params"),
        (lambda: T.armijo_step(lambda: leaf(2).sum(), [leaf(2)], 1.0), ValueError, "depends on none of them"),
        (lambda: T.armijo_step(lambda: two.sum(), [two], 1.0), ValueError, "requires a gradient"),
        (lambda: T.armijo_step(lambda: leaf(2) * 1, [leaf(2)], 1.0), ValueError, "must have a scalar value"),
        (lambda: T.armijo_step(lambda: two.sum(), [leaf(2)], 0.0), ValueError, "step must be"),
        (lambda: T.armijo_step(lambda: two.sum(), [leaf(2)], 1.0, shrink=1.0), ValueError, "shrink must lie"),
        (lambda: sso(eta=0.0), ValueError, "eta must be"),
        (lambda: sso(inner_steps=0), ValueError, "inner_steps must be at least 1"),
        (lambda: sso(inner="adam"), ValueError, "inner must be 'armijo' or 'gd'"),
        (lambda: sso(inner_lr=-1.0), ValueError, "inner_lr must be"),
        (lambda: sso(schedule="exponential"), ValueError, "total_steps must be given"),
        (lambda: sso(schedule="cosine"), ValueError, "schedule must be one of"),
        (lambda: sso(reset_inner_step=1), TypeError, "reset_inner_step must be a bool"),
        (lambda: sso(tolerance=-1.0), ValueError, "tolerance must be"),
        (lambda: sso(first_step=0.0), ValueError, "first_step must be"),
        (lambda: sso(grow=0.5), ValueError, "grow must be"),
        (lambda: sso(c=0.0), ValueError, "c must lie"),
        (lambda: sso(max_trials=0), ValueError, "max_trials must be"),
        (lambda: sso(min_step=-1.0), ValueError, "min_step must be"),
        (lambda: T.SLS([leaf(2)], reset="yes"), TypeError, "reset must be a bool"),
        (changing, ValueError, "outputs must have the shape of the anchor"),
        (lambda: stepped(lambda theta: theta, lambda z: z.mean()), ValueError, "one value for each sample"),
        (lambda: stepped(lambda theta: theta.detach(), lambda z: z), ValueError, "must depend on params"),
        (lambda: stepped(lambda theta: theta.sum(), lambda z: z), ValueError, "outputs must have a row"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
