"""Lion-K against a literal recursion, and the theorems of the chapter as properties: conjugates, entry, both Lyapunov functions, the problems solved."""

import copy
import io
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize
from torch import nn

from lossbook.optimization import lion as L

DOUBLE = torch.float64


@dataclass(frozen=True)
class Cubic(L.HalfSquare):
    """A third of the sum of cubes of sizes: differentiable, its conjugate finite everywhere."""

    def value(self, m):
        return (m.abs() ** 3).sum() / 3

    def subgradient(self, m):
        return m * m.abs()

    def _conjugate_inside(self, y):
        return 2 / 3 * (y.abs() ** 1.5).sum()

    def conjugate_subgradient(self, y):
        return y.sign() * y.abs().sqrt()


@dataclass(frozen=True)
class LogCosh(L.Kernel):
    """A smooth absolute value with the box as its domain."""

    separable = True

    def value(self, m):
        return (torch.logaddexp(m, -m) - math.log(2)).sum()

    def subgradient(self, m):
        return m.tanh()

    def dual_norm(self, y):
        return y.abs().amax()

    def _conjugate_inside(self, y):
        return (torch.special.xlog1py(1 + y, y) + torch.special.xlog1py(1 - y, -y)).sum() / 2

    def conjugate_subgradient(self, y):
        return y.atanh()


@dataclass(frozen=True)
class Positive(L.Kernel):
    """The sum of positive parts, which is not even: 0 <= x <= 1 / weight_decay."""

    separable = True

    def value(self, m):
        return m.clamp(min=0).sum()

    def subgradient(self, m):
        return (m > 0).to(m.dtype)

    def dual_norm(self, y):
        return 1 + torch.maximum(y - 1, -y).amax()


KERNELS = {
    "l1": L.L1(), "l2": L.L2(), "l1.7": L.LpNorm(1.7), "l3": L.LpNorm(3), "half square": L.HalfSquare(), "huber": L.Huber(0.5),
    "soft": L.SoftThreshold(0.3), "top": L.TopK(2), "group": L.GroupL2(-1), "cubic": Cubic(), "log cosh": LogCosh(), "positive": Positive(),
}  # fmt: skip
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


def randn(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def run(optimizer, params, grads):
    """Positions after each step, for a list of gradients."""
    path = []
    for grad in grads:
        for p, g in zip(params, grad, strict=True):
            p.grad = g.clone()
        optimizer.step()
        path.append([p.detach().clone() for p in params])
    return path


def largest_difference(path, other):
    return max((a - b).abs().max().item() for x, y in zip(path, other, strict=True) for a, b in zip(x, y, strict=True))


# ---- the update ----------------------------------------------------------------------------------------------------


def test_lion_is_a_literal_recursion():
    """Number by number, with two parameter groups."""
    shapes, numbers = ((3,), (2, 2)), ((0.01, 0.9, 0.99, 2.0), (0.1, 0.5, 0.7, 0.0))
    params = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    groups = [dict(params=[p], lr=n[0], betas=n[1:3], weight_decay=n[3]) for p, n in zip(params, numbers, strict=True)]
    state = [[[x, 0.0] for x in p.flatten().tolist()] for p in params]
    grads = [[randn(*shape, seed=100 + 2 * t + i) for i, shape in enumerate(shapes)] for t in range(50)]
    path = run(L.Lion(groups), params, grads)
    for grad, seen in zip(grads, path, strict=True):
        for (lr, b1, b2, lam), rows, g, p in zip(numbers, state, grad, seen, strict=True):
            for row, gi in zip(rows, g.flatten().tolist(), strict=True):
                c = b1 * row[1] + (1 - b1) * gi
                row[0] -= lr * ((c > 0) - (c < 0) + lam * row[0])
                row[1] = b2 * row[1] + (1 - b2) * gi
            assert torch.allclose(p.flatten(), torch.tensor([row[0] for row in rows], dtype=DOUBLE), rtol=0, atol=1e-12)


@every_kernel
@pytest.mark.parametrize("scope", ["tensor", "group"])
def test_lion_k_is_its_equation(kernel, scope):
    """In the paper's momentum m, on whole tensors, or on their concatenation."""
    if scope == "group" and isinstance(kernel, L.GroupL2) and kernel.dim is not None:
        pytest.skip("groups are slices of a tensor")
    lr, (b1, b2), lam = 0.03, (0.8, 0.95), 1.5
    params = [randn(3, 2), randn(4, seed=1)]
    xs, ms = [p.clone() for p in params], [torch.zeros_like(p) for p in params]
    grads = [[randn(3, 2, seed=10 + t), randn(4, seed=50 + t)] for t in range(30)]
    path = run(L.LionK(params, kernel, lr, (b1, b2), lam, scope), params, grads)
    for grad, seen in zip(grads, path, strict=True):
        mixtures = [b1 * m - (1 - b1) * g for m, g in zip(ms, grad, strict=True)]
        if scope == "tensor":
            steps = [kernel.subgradient(c) for c in mixtures]
        else:
            joint = kernel.subgradient(torch.cat([c.flatten() for c in mixtures]))
            steps = [joint[:6].view(3, 2), joint[6:]]
        xs = [(1 - lr * lam) * x + lr * s for x, s in zip(xs, steps, strict=True)]
        ms = [b2 * m - (1 - b2) * g for m, g in zip(ms, grad, strict=True)]
        assert largest_difference([xs], [seen]) < 1e-13


def test_lion_is_the_kernel_l1():
    first, second = randn(7), randn(7)
    grads = [[randn(7, seed=t)] for t in range(20)]
    one = run(L.Lion([first], 0.02, (0.7, 0.8), 3.0), [first], grads)
    other = run(L.LionK([second], L.L1(), 0.02, (0.7, 0.8), 3.0), [second], grads)
    assert largest_difference(one, other) == 0


def test_explicit_is_implicit():
    """The step of the code solves x' = x + eps (u - lam x') with eps = lr / (1 - lr lam)."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        lam = float(rng.uniform(0.01, 20))
        lr = float(rng.uniform(0.001, 0.99)) / lam
        x = torch.tensor(rng.normal(size=5))
        before = x.clone()
        grad = torch.tensor(rng.normal(size=5))
        run(L.Lion([x], lr, (0.9, 0.99), lam), [x], [[grad]])
        eps, _ = L.lyapunov_constant(lr=lr, weight_decay=lam)
        implicit = before + eps * (-grad.sign() - lam * x)
        assert ((x - implicit).abs() <= 1e-13 * (1 + eps * (1 + lam * x.abs()))).all()
        assert torch.allclose((before - eps * grad.sign()) / (1 + eps * lam), x, rtol=1e-14, atol=1e-14 / lam)
        assert lr == pytest.approx(eps / (1 + eps * lam), rel=1e-14)


def test_scaling_gradients():
    """The sign does not see a common factor, the half square is linear in it."""
    grads = [[randn(6, seed=t)] for t in range(40)]
    for kernel in (L.L1(), L.L2(), L.LpNorm(1.7), L.TopK(2)):
        paths = []
        for factor in (1.0, 1e6, 1e-6):
            x = randn(6, seed=9)
            paths.append(
                run(L.LionK([x], kernel, 0.01, weight_decay=1.0), [x], [[factor * g for g in gs] for gs in grads])
            )
        assert largest_difference(paths[0], paths[1]) < 1e-13 and largest_difference(paths[0], paths[2]) < 1e-13
    moves = []
    for factor in (1.0, 1e3):
        x = torch.zeros(6, dtype=DOUBLE)
        moves.append(
            run(L.LionK([x], L.HalfSquare(), 0.01, weight_decay=1.0), [x], [[factor * g for g in gs] for gs in grads])[
                -1
            ][0]
        )
    assert torch.allclose(1e3 * moves[0], moves[1], rtol=1e-12)


def test_half_square_is_heavy_ball_with_decay():
    """With equal betas: an average of gradients, a step along it, and decoupled decay."""
    x, beta, lr, lam = randn(5), 0.9, 0.1, 0.3
    y, average = x.clone(), torch.zeros(5, dtype=DOUBLE)
    grads = [[randn(5, seed=t)] for t in range(30)]
    path = run(L.LionK([x], L.HalfSquare(), lr, (beta, beta), lam), [x], grads)
    for (g,), (seen,) in zip(grads, path, strict=True):
        average = beta * average + (1 - beta) * g
        y = y - lr * lam * y - lr * average
        assert torch.allclose(seen, y, rtol=0, atol=1e-13)


def test_kernels_that_are_l1():
    m = randn(4, 5)
    for kernel in (L.TopK(20), L.TopK(100), L.LpNorm(1)):
        assert torch.equal(kernel.subgradient(m), m.sign()) and kernel.value(m).item() == pytest.approx(
            m.abs().sum().item()
        )
        assert kernel.dual_norm(m).item() == pytest.approx(
            max(m.abs().max().item(), m.abs().sum().item() / 20 if isinstance(kernel, L.TopK) else 0)
        )
    column = m.reshape(-1, 1)
    assert torch.equal(L.GroupL2(1).subgradient(column), column.sign())
    for kernel, same in ((L.LpNorm(2), L.L2()), (L.GroupL2(None), L.L2())):
        assert torch.allclose(kernel.subgradient(m), same.subgradient(m), atol=1e-15) and kernel.value(m) == same.value(
            m
        )


# ---- kernels and conjugates ----------------------------------------------------------------------------------------


@every_kernel
def test_subgradients_and_young(kernel):
    """Subgradient inequality, Fenchel-Young and its equality, and that every step lies in the domain of the conjugate."""
    for seed in range(40):
        m, other = randn(3, 4, seed=seed), 2 * randn(3, 4, seed=1000 + seed)
        step = kernel.subgradient(m)
        assert step.shape == m.shape and step.dtype == m.dtype
        assert kernel.value(other) >= kernel.value(m) + (step * (other - m)).sum() - 1e-12
        assert kernel.domain_violation(step) <= 1e-12
        gap = kernel.value(m) + kernel.conjugate(step) - (step * m).sum()
        assert abs(gap.item()) < 1e-10, gap
        y = kernel.subgradient(other) * 0.7
        assert kernel.value(m) + kernel.conjugate(y) - (y * m).sum() >= -1e-10
        # and from the other side: m = conjugate_subgradient(y) has y as a subgradient
        dual = kernel.conjugate_subgradient(y)
        assert abs((kernel.value(dual) + kernel.conjugate(y) - (y * dual).sum()).item()) < 1e-10


@every_kernel
def test_gradients_by_autograd(kernel):
    """Away from kinks the subgradients are the gradients of the values."""
    for seed in range(10):
        m = randn(3, 4, seed=seed).requires_grad_()
        (grad,) = torch.autograd.grad(kernel.value(m), m)
        assert torch.allclose(grad, kernel.subgradient(m.detach()), atol=1e-12)
        y = (0.3 * randn(3, 4, seed=seed).sign() / 12 * (1 + torch.rand(3, 4, dtype=DOUBLE))).requires_grad_()
        if isinstance(kernel, Positive):
            y = y.detach().abs().requires_grad_()
        conjugate = kernel.conjugate(y)
        grad = torch.autograd.grad(conjugate, y)[0] if conjugate.requires_grad else torch.zeros_like(y)
        assert torch.allclose(grad, kernel.conjugate_subgradient(y.detach()), atol=1e-12)


@every_kernel
def test_conjugate_is_the_supremum(kernel):
    """In one dimension, against a grid."""
    grid = torch.linspace(-30, 30, 60_001, dtype=DOUBLE)
    values = torch.stack([kernel.value(m[None]) for m in grid[::30]])
    low = 0.0 if isinstance(kernel, Positive) else -0.95
    for y in np.linspace(low, 0.95, 9):
        brute = (y * grid[::30] - values).max().item()
        assert kernel.conjugate(torch.tensor([y], dtype=DOUBLE)).item() == pytest.approx(brute, abs=1e-3)
    beyond = kernel.conjugate(torch.tensor([1.01], dtype=DOUBLE)).item()
    assert math.isfinite(beyond) == isinstance(kernel, L.HalfSquare)


def test_domains():
    y = torch.tensor([[0.6, -0.8], [0.3, 0.2]], dtype=DOUBLE)
    wanted = {
        "l1": 0.8,
        "l2": math.sqrt(1.13),
        "l3": (0.6**1.5 + 0.8**1.5 + 0.3**1.5 + 0.2**1.5) ** (2 / 3),
        "half square": 0.0,
    }
    wanted |= {"huber": 0.8, "soft": 0.8, "top": 0.95, "group": 1.0}
    for name, norm in wanted.items():
        assert KERNELS[name].dual_norm(y).item() == pytest.approx(norm, abs=1e-12), name
        assert KERNELS[name].domain_violation(3 * y).item() == pytest.approx(max(3 * norm - 1, 0), abs=1e-12), name
    assert L.L1().conjugate(torch.tensor([1 + 1e-7])) == 0 and L.L1().conjugate(torch.tensor([1.0001])) == math.inf
    assert L.L1().conjugate(torch.tensor([1.5]), tol=0.6) == 0
    assert L.Huber(0.5).conjugate(torch.tensor([0.2, -0.8])).item() == pytest.approx(0.17)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_kinks_and_extremes(dtype):
    zero = torch.zeros(2, 3, dtype=dtype)
    for name, kernel in KERNELS.items():
        assert torch.equal(kernel.subgradient(zero), zero), name
        assert kernel.value(zero) == 0 and kernel.conjugate(zero) == 0, name
    for name in ("l1", "l2", "l1.7", "l3", "group", "top"):
        for scale in (1e-30, 1e30):
            m = torch.tensor([[3.0, -4.0, 0.0], [1.0, 0.0, 0.0]], dtype=dtype)
            got = KERNELS[name].subgradient(scale * m)
            assert torch.allclose(got, KERNELS[name].subgradient(m), rtol=1e-5), (name, scale)
    for kernel, y, norm in (
        (L.LpNorm(1.01), (0.01, 0.02), 0.02),  # the dual exponent is 101
        (L.LpNorm(1.01), (3.0, 5.0), 5.0),
        (L.LpNorm(1.1), (5e3, 5e3), 5e3 * 2 ** (1 / 11)),
        (L.L2(), (1e30, 1e30), 2**0.5 * 1e30),
        (L.GroupL2(-1), (3e-30, 4e-30), 5e-30),
    ):
        assert kernel.dual_norm(torch.tensor(y, dtype=dtype)).item() == pytest.approx(norm, rel=1e-5)
    assert L.L2().value(torch.tensor([1e30, 1e30], dtype=dtype)).item() == pytest.approx(2**0.5 * 1e30)
    for name in KERNELS.keys() - {"half square", "cubic"}:
        for bad in (math.nan, math.inf):
            assert KERNELS[name].conjugate(torch.full((1, 2), bad, dtype=dtype)) == math.inf, name
    x = torch.zeros(3, dtype=dtype)
    run(L.LionK([x], L.L2(), 0.1, weight_decay=1.0), [x], [[torch.zeros(3, dtype=dtype)]] * 3)
    assert torch.equal(x, torch.zeros(3, dtype=dtype))
    assert L.SoftThreshold(0.3).subgradient(torch.tensor([0.3, -0.3, 0.31])).tolist() == [0, 0, 1]
    assert L.Huber(0.5).value(torch.tensor([0.5, -2.0])).item() == pytest.approx(0.25 + 1.75)


@every_kernel
def test_three_forms_of_a_subgradient(kernel):
    m = randn(3, 4)
    wanted, place = kernel.subgradient(m), m.clone()
    assert kernel.subgradient_(place) is place and torch.equal(place, wanted)
    assert all(
        torch.equal(a, kernel.subgradient(b)) for a, b in zip(kernel.subgradients([m, -m]), [m, -m], strict=True)
    )


def test_kernels_need_no_contiguous_memory():
    m = randn(4, 6)[:, ::2].T
    for name, kernel in KERNELS.items():
        assert torch.allclose(kernel.subgradient(m), kernel.subgradient(m.contiguous()), rtol=1e-14), name


# ---- phase one: the constraint -------------------------------------------------------------------------------------


def test_entry_of_the_box():
    x = torch.full((4,), 5.0, dtype=DOUBLE)
    path = run(L.Lion([x], 0.05, weight_decay=1.0), [x], [[randn(4, seed=t)] for t in range(200)])
    assert path[0][0].abs().max() <= 4.8 + 1e-12
    outside = [4.0] + [max(p[0].abs().max().item() - 1, 0) for p in path]
    assert all(b <= 0.95 * a + 1e-12 for a, b in zip(outside, outside[1:], strict=False)) and outside[-1] < 1e-3
    y = torch.full((4,), 5.0, dtype=DOUBLE)  # the bound is attained where all gradients pull outwards
    path = run(L.Lion([y], 0.05, weight_decay=1.0), [y], [[-torch.ones(4, dtype=DOUBLE)]] * 50)
    assert path[-1][0][0].item() - 1 == pytest.approx(4 * 0.95**50, rel=1e-12)


@every_kernel
def test_entry_of_every_domain(kernel):
    """The violation shrinks by 1 - lr * lam a step, whatever the gradients; and what is inside stays."""
    if isinstance(kernel, L.HalfSquare):
        pytest.skip("no constraint")
    lam, lr = 2.5, 0.02
    x = 3 * randn(3, 4)
    optimizer = L.LionK([x], kernel, lr, weight_decay=lam)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 + math.sin(t))
    before = kernel.domain_violation(lam * x).item()
    assert before > 0
    for t in range(300):
        shrink = 1 - optimizer.param_groups[0]["lr"] * lam
        run(optimizer, [x], [[randn(3, 4, seed=t)]])
        after = kernel.domain_violation(lam * x).item()
        assert after <= shrink * before + 1e-12
        schedule.step()
        before = after
    assert before < 1e-4


def test_inside_stays_inside():
    x = torch.empty(10, dtype=DOUBLE).uniform_(-1, 1, generator=torch.Generator().manual_seed(0)) / 3
    path = run(L.Lion([x], 0.1, weight_decay=3.0), [x], [[randn(10, seed=t)] for t in range(1000)])
    assert max(3 * p[0].abs().max().item() for p in path) <= 1 + 1e-12


# ---- phase two: Lyapunov functions ---------------------------------------------------------------------------------


def test_constant():
    eps, c = L.lyapunov_constant(lr=0.01, weight_decay=1.0)
    assert (round(eps, 6), round(c, 6)) == (0.010101, 0.825688)
    # The limit of the flow: with alpha = gamma, beta1 = 1 - e gamma, beta2 = 1 - eps gamma, it is c of the flow over gamma.
    e, gamma, lam, eps = 0.3, 2.0, 0.7, 1e-9
    lr = eps / (1 + eps * lam)
    _, c = L.lyapunov_constant(lr=lr, betas=(1 - e * gamma, 1 - eps * gamma), weight_decay=lam)
    assert c == pytest.approx((1 - e * gamma) / (1 + e * lam) / gamma, rel=1e-6)
    assert L.lyapunov_constant(lr=0.1, betas=(0.0, 0.9), weight_decay=1.0)[1] == 0


def instances(kernel, count, seed):
    """Smooth problems in three dimensions, and where the step begins, with lam x in the domain, often at its edge."""
    z, b, y, m = (randn(count, *shape, seed=4 * seed + i) for i, shape in enumerate([(3, 3), (3,), (3,), (3,)]))
    size = torch.func.vmap(kernel.dual_norm)(y)[:, None]
    u = torch.rand(count, 1, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)).mul(1.5).clamp(max=1)
    if isinstance(kernel, Positive):
        y = torch.rand(count, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)).mul(1.2).clamp(max=1)
    elif not isinstance(kernel, L.HalfSquare):
        y = u * y / size
    return z @ z.mT, 2 * b, y, 3 * m


def objective(A, b, x):
    return x @ A @ x / 2 - b @ x + x.cos().sum()


@pytest.mark.parametrize(
    "kernel", [k for k in KERNELS.values() if not isinstance(k, LogCosh)], ids=[n for n in KERNELS if n != "log cosh"]
)
def test_discrete_lyapunov(kernel):
    """eq-lion-decrease on 3000 random instances, by the step of the optimizer's equation."""
    rng = np.random.default_rng(1)
    tightest, count = math.inf, 100
    for seed in range(30):
        beta1, beta2 = sorted(rng.uniform(0, 1, 2)) if seed % 5 else [rng.uniform(0, 1)] * 2
        if seed % 7 == 1:
            beta1 = 0.0
        lam = float(np.exp(rng.uniform(-2, 2)))
        options = dict(
            lr=float(np.exp(rng.uniform(-6, -0.05))) / lam, betas=(float(beta1), float(beta2)), weight_decay=lam
        )
        A, b, y, m = instances(kernel, count, seed)
        smoothness = torch.linalg.eigvalsh(A)[:, -1] + 1

        def check(A, b, x, m, options=options, lam=lam):
            g = A @ x - b - x.sin()
            lr, (b1, b2) = options["lr"], options["betas"]
            after = (1 - lr * lam) * x + lr * kernel.subgradient(b1 * m - (1 - b1) * g)
            m_after = b2 * m - (1 - b2) * g
            d1, d2, bound = L.lyapunov_decrease(x, m, g, kernel, smoothness=0.0, **options)
            before = L.lyapunov(objective(A, b, x), x, m, kernel, **options)
            change = L.lyapunov(objective(A, b, after), after, m_after, kernel, **options) - before
            _, _, rough = L.lyapunov_decrease(x, m, g, kernel, smoothness=1.0, **options)
            return d1, d2, bound, rough - bound, change, before.abs()

        d1, d2, bound, square, change, size = torch.func.vmap(check)(A, b, y / lam, m)
        scale = 1 + size + change.abs()
        assert (d1 >= -1e-11 * scale).all() and (d2 >= -1e-11 * scale).all() and torch.isfinite(change).all()
        slack = bound + smoothness * square - change
        assert (slack >= -1e-11 * scale).all(), (slack / scale).min()
        tightest = min(tightest, (slack / scale).min().item())
    assert tightest < 1e-2  # the bound says something


def test_decrease_by_hand():
    one = torch.ones(1, dtype=DOUBLE)
    options = dict(smoothness=1.0, lr=0.5, weight_decay=1.0)
    got = L.lyapunov_decrease(0 * one, one, -one, L.L1(), betas=(0.5, 0.5), **options)
    assert [v.item() for v in got] == pytest.approx([0.5, 0.0, -0.625])
    # Half square, beta1 = 0, beta2 = 1/2: mixture 1, m' = 0, y = 1/2, V = 1/2; eps = 1, c = 0.
    got = L.lyapunov_decrease(0 * one, -one, -one, L.HalfSquare(), betas=(0.0, 0.5), **options)
    assert [v.item() for v in got] == pytest.approx([0.25, 1.0, -0.25 + 0.125])
    # Half square, 1/4 and 1/2, m = 1, g = 1: mixture -1/2, m' = 0, y = -1/4 = V; c = (1/4) / (1/2 + 3/4) = 1/5, and the factor of D2 is 2 c.
    got = L.lyapunov_decrease(0 * one, one, one, L.HalfSquare(), betas=(0.25, 0.5), **options)
    assert [v.item() for v in got] == pytest.approx([0.0625, 0.25, -1.2 * 0.0625 - 0.4 * 0.25 + 0.03125])


def test_lyapunov_of_lion_along_a_run():
    """With the optimizer and its own buffer: H falls in all but the last, fine steps; f alone does not."""
    A, b = box_problem()
    x = nn.Parameter(torch.zeros(20, dtype=DOUBLE))
    optimizer = L.Lion([x], 1e-3, weight_decay=1.0)
    m = torch.zeros(20, dtype=DOUBLE)
    smoothness = torch.linalg.eigvalsh(A)[-1].item()
    H, f, limits = [], [], []
    for _ in range(1500):
        value = x.detach() @ A @ x.detach() / 2 - b @ x.detach()
        x.grad = A @ x.detach() - b
        H.append(L.lyapunov(value, x.detach(), m, L.L1(), lr=1e-3, weight_decay=1.0).item())
        f.append(value.item())
        _, _, bound = L.lyapunov_decrease(
            x.detach(), m, x.grad, L.L1(), smoothness=smoothness, lr=1e-3, weight_decay=1.0
        )
        limits.append(bound.item())
        optimizer.step()
        m = -optimizer.state[x]["exp_avg"]
    assert (np.diff(H) <= np.array(limits[:-1]) + 1e-12).all()
    assert H[0] == f[0] == 0 and H[-1] < -1 and all(h >= v - 1e-12 for h, v in zip(H, f, strict=True))


SMOOTH = {"half square": L.HalfSquare(), "log cosh": LogCosh(), "cubic": Cubic()}


@pytest.mark.parametrize("kernel", SMOOTH.values(), ids=SMOOTH)
@pytest.mark.parametrize("eps", [0.0, 0.3, 1.0])
def test_flow_dissipates(kernel, eps):
    """eq-lion-ode-rate: by autograd at random points, and by differences along the solved flow."""
    numbers = dict(alpha=0.8, gamma=1.0, eps=eps, lam=1.3)
    A, b, y, m = instances(kernel, 20, 3)
    for A_, b_, x, m_ in zip(A, b, 0.9 * y / 1.3, m, strict=True):
        x, m_ = x.clone().requires_grad_(), m_.clone().requires_grad_()
        H = L.lyapunov_ode(objective(A_, b_, x), x, m_, kernel, **numbers)
        by_x, by_m = torch.autograd.grad(H, (x, m_))
        x, m_ = x.detach(), m_.detach()
        g = A_ @ x - b_ - x.sin()
        m_dot = -0.8 * g - m_
        rate = by_x @ (kernel.subgradient(m_ + eps * m_dot) - 1.3 * x) + by_m @ m_dot
        d1, d2, claimed = L.lyapunov_ode_rate(x, m_, g, kernel, **numbers)
        assert claimed.item() == pytest.approx(rate.item(), rel=1e-9, abs=1e-9) and d1 >= 0 and d2 >= 0

    step = 0.0025
    times = torch.arange(400, dtype=DOUBLE) * step
    xs, ms = L.lionk_ode(
        lambda x: A[0] @ x - b[0] - x.sin(), 0.5 * y[0] / 1.3, m[0] / 3, kernel, 0.8, 1.0, eps, 1.3, times
    )
    H = torch.stack(
        [L.lyapunov_ode(objective(A[0], b[0], x), x, v, kernel, **numbers) for x, v in zip(xs, ms, strict=True)]
    )
    rates = [
        L.lyapunov_ode_rate(x, v, A[0] @ x - b[0] - x.sin(), kernel, **numbers)[2] for x, v in zip(xs, ms, strict=True)
    ]
    assert (H.diff() <= 1e-10).all() and xs.shape == ms.shape == (400, 3)
    difference, rates = (8 * (H[3:-1] - H[1:-3]) - (H[4:] - H[:-4])) / (12 * step), torch.stack(rates)
    smooth = torch.ones(400, dtype=torch.bool)
    if isinstance(kernel, Cubic):  # its conjugate has a kink in the slope at 0
        smooth = (xs.abs() > 0.1).all(1) & (ms.abs() > 0.1).all(1)
    smooth = smooth[2:-2] & smooth[4:] & smooth[:-4]
    assert smooth.sum() > 30
    assert torch.allclose(difference[smooth], rates[2:-2][smooth], rtol=1e-6, atol=2e-6 * rates.abs().max().item())
    assert H[-1] - H[0] == pytest.approx(torch.trapezoid(rates, dx=step).item(), rel=1e-2)


def test_lion_is_an_euler_scheme_of_the_flow():
    """Halving the step halves the distance to the solved flow."""
    kernel, lam = LogCosh(), 0.8
    A, b, _, _ = instances(kernel, 1, 5)
    e, gamma, end = 0.4, 1.0, 2.0
    xs, ms = L.lionk_ode(
        lambda x: A[0] @ x - b[0] - x.sin(),
        torch.zeros(3, dtype=DOUBLE),
        torch.zeros(3, dtype=DOUBLE),
        kernel,
        gamma,
        gamma,
        e,
        lam,
        [end],
    )
    errors = []
    for steps in (400, 800):
        h = end / steps
        x = torch.zeros(3, dtype=DOUBLE)
        optimizer = L.LionK([x], kernel, h, (1 - e * gamma, 1 - h * gamma), lam)
        for _ in range(steps):
            run(optimizer, [x], [[A[0] @ x - b[0] - x.sin()]])
        errors.append(max((x - xs[0]).abs().max().item(), (optimizer.state[x]["exp_avg"] + ms[0]).abs().max().item()))
    assert errors[1] < 5e-3 and errors[0] / errors[1] == pytest.approx(2, abs=0.15)


def test_flow_enters_the_box():
    """Phase one in continuous time: the violation falls at least like exp(-lam t)."""
    kernel, times = LogCosh(), torch.linspace(0, 3, 31, dtype=DOUBLE)
    x0 = torch.tensor([4.0, -3.0, 1.0], dtype=DOUBLE)
    xs, _ = L.lionk_ode(lambda x: x.cos() - 2, x0, torch.zeros(3, dtype=DOUBLE), kernel, 1.0, 1.0, 0.2, 1.5, times)
    violation = torch.stack([kernel.domain_violation(1.5 * x) for x in xs])
    assert (violation <= violation[0] * (-1.5 * times).exp() + 1e-9).all() and violation[0] == 5.0


# ---- the problems that are solved ----------------------------------------------------------------------------------


def box_problem(seed=0):
    z = randn(20, 40, seed=seed)
    return z @ z.T / 40, 2 * randn(20, seed=100 + seed)


def decayed(kernel, A, b, lam=1.0, lr=0.05, steps=4000, start=None):
    """The last iterate of Lion-K with the full gradient and a learning rate that decays to zero along a cosine."""
    x = torch.zeros_like(b) if start is None else start.clone()
    optimizer = L.LionK([x], kernel, lr, weight_decay=lam)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x.grad = A @ x - b
        optimizer.step()
        schedule.step()
    return x


def bounded(A, b, lam=1.0, ridge=0.0):
    """Minimum in the box by L-BFGS-B, of the objective with ridge / 2 |x|^2 added."""
    A, b = A.numpy() + ridge * np.eye(len(b)), b.numpy()
    found = minimize(
        lambda x: (x @ A @ x / 2 - b @ x, A @ x - b), np.zeros(len(b)), jac=True, method="L-BFGS-B",
        bounds=[(-1 / lam, 1 / lam)] * len(b), options=dict(ftol=1e-16, gtol=1e-12, maxiter=10_000, maxfun=100_000),
    )  # fmt: skip
    return torch.tensor(found.x)


def value(A, b, x):
    return (x @ A @ x / 2 - b @ x).item()


def test_residual_follows_the_dissipation():
    """prop-lion-residual: the gap of the gradient against that of the momentum, and the momentum against the gradient."""
    lr, lam, betas = 0.01, 1.0, (0.9, 0.95)
    for seed in range(5):
        A, b = box_problem(seed)
        smoothness, d = torch.linalg.eigvalsh(A)[-1].item(), len(b)
        x = torch.zeros_like(b)
        optimizer = L.Lion([x], lr, betas, lam)
        m, grad = randn(d, seed=seed), A @ x - b
        optimizer.state[x]["exp_avg"] = -m
        apart = (m + grad).norm().item()
        for t in range(1, 201):
            mixture = torch.lerp(-grad, m, betas[0])
            x.grad, before = grad, x.clone()
            delta1 = L.lyapunov_decrease(
                before, m, grad, L.L1(), smoothness=smoothness, lr=lr, betas=betas, weight_decay=lam
            )[0]
            optimizer.step()
            m, grad = -optimizer.state[x]["exp_avg"], A @ x - b
            assert L.kkt_residual(x, grad, lam) <= delta1 + 2 * (mixture + grad).abs().sum() + 1e-10
            assert (m + grad).norm() <= betas[1] ** t * apart + 2 * smoothness * lr * d**0.5 / (1 - betas[1]) + 1e-10


@pytest.mark.parametrize("seed", [0, 1])
def test_lion_solves_the_box(seed):
    A, b = box_problem(seed)
    x, wanted = decayed(L.L1(), A, b), bounded(A, b)
    assert abs(value(A, b, x) - value(A, b, wanted)) < 1e-8
    assert x.abs().max() <= 1 + 1e-12 and 5 < (wanted.abs() > 1 - 1e-9).sum() < 20
    assert 0 <= L.kkt_residual(wanted, A @ wanted - b, 1.0) < 1e-5
    assert 0 <= L.kkt_residual(x, A @ x - b, 1.0) < 1e-4


@pytest.mark.parametrize("lam", [0.5, 2.0])
def test_the_box_is_one_over_the_decay(lam):
    """Whatever the learning rate and the betas are."""
    A, b = box_problem(2)
    wanted = bounded(A, b, lam)
    assert abs(value(A, b, decayed(L.L1(), A, b, lam)) - value(A, b, wanted)) < 1e-7
    assert abs(value(A, b, decayed(L.L1(), A, b, lam, lr=0.02)) - value(A, b, wanted)) < 1e-7


def test_huber_solves_the_box_with_a_ridge():
    A, b = box_problem()
    eye = torch.eye(20, dtype=DOUBLE)
    x, wanted = decayed(L.Huber(1.0), A, b), bounded(A, b, ridge=1.0)
    assert abs(value(A + eye, b, x) - value(A + eye, b, wanted)) < 1e-8


def test_soft_threshold_solves_the_box_with_l1():
    A, b = box_problem()
    e = 0.5

    def split(z):
        x = z[:20] - z[20:]
        g = A.numpy() @ x - b.numpy()
        return x @ A.numpy() @ x / 2 - b.numpy() @ x + e * z.sum(), np.concatenate([g + e, e - g])

    found = minimize(
        split,
        np.zeros(40),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, 1)] * 40,
        options=dict(ftol=1e-16, gtol=1e-12, maxiter=10_000),
    )
    wanted = torch.tensor(found.x[:20] - found.x[20:])
    x = decayed(L.SoftThreshold(e), A, b)
    total = lambda x: value(A, b, x) + e * x.abs().sum().item()
    assert abs(total(x) - total(wanted)) < 1e-8


def test_l2_solves_the_ball():
    for scale in (1.0, 0.01):  # at the sphere, and inside
        A, b = box_problem()
        b = scale * b
        eye = torch.eye(20, dtype=DOUBLE)
        norm = lambda nu: torch.linalg.solve(A + nu * eye, b).norm().item() - 1  # noqa: B023
        nu = brentq(norm, 0, 1e4, xtol=1e-15) if norm(0) > 0 else 0.0
        wanted = torch.linalg.solve(A + nu * eye, b)
        assert (nu > 0) == (scale == 1)
        x = decayed(L.L2(), A, b)
        assert abs(value(A, b, x) - value(A, b, wanted)) < 1e-8 and x.norm() <= 1 + 1e-12


def test_half_square_solves_the_ridge():
    A, b = box_problem()
    wanted = torch.linalg.solve(A + 0.7 * torch.eye(20, dtype=DOUBLE), b)
    assert torch.allclose(decayed(L.HalfSquare(), A, b, lam=0.7, steps=3000), wanted, atol=1e-8)


def test_kernel_that_is_not_even():
    """The sign convention matters: the sum of positive parts keeps x in [0, 1 / lam]."""
    A, b = box_problem()
    x = decayed(Positive(), A, b)
    found = minimize(
        lambda z: (z @ A.numpy() @ z / 2 - b.numpy() @ z, A.numpy() @ z - b.numpy()), np.zeros(20), jac=True, method="L-BFGS-B",
        bounds=[(0, 1)] * 20, options=dict(ftol=1e-16, gtol=1e-12),
    )  # fmt: skip
    assert value(A, b, x) == pytest.approx(found.fun, abs=1e-8) and x.min() >= 0


def test_without_decay_there_is_no_constraint():
    A, b = box_problem()
    wanted = torch.linalg.solve(A, b)
    x = decayed(L.L1(), A, b, lam=0.0, steps=6000)
    assert wanted.abs().max() > 3 and abs(value(A, b, x) - value(A, b, wanted)) < 1e-6


def test_beta1_zero_is_frank_wolfe():
    """x' = x + lr lam (s - x) with s the corner that minimizes the linear model."""
    A, b = box_problem()
    x, y = torch.zeros(20, dtype=DOUBLE), torch.zeros(20, dtype=DOUBLE)
    optimizer = L.Lion([x], 0.05, (0.0, 0.5), 2.0)
    for _ in range(20):
        y = y + 0.1 * (-(A @ y - b).sign() / 2 - y)
        run(optimizer, [x], [[A @ x - b]])
        assert torch.allclose(x, y, atol=1e-14)


# ---- kkt_residual --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), lam=st.floats(0.1, 10))
def test_kkt_residual(seed, lam):
    g, x = (
        randn(6, seed=seed),
        (2 * torch.rand(6, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)) - 1) / lam,
    )
    residual = L.kkt_residual(x, g, lam)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=DOUBLE) / lam] * 6)
    assert residual.item() == pytest.approx(lam * (g @ x - (corners @ g).min()).item(), rel=1e-9, abs=1e-12)
    assert residual > 0 and L.kkt_residual(-g.sign() / lam, g, lam).item() == pytest.approx(0, abs=1e-12)
    # It is the first dissipation, where the mixture is minus the gradient (m = -g) and the step does not move.
    d1, _, _ = L.lyapunov_decrease(x, -g, g, L.L1(), smoothness=0.0, lr=1e-12 / lam, weight_decay=lam)
    assert d1.item() == pytest.approx(residual.item(), rel=1e-9)


# ---- the optimizer as an optimizer ---------------------------------------------------------------------------------


@every_kernel
def test_foreach_and_blocks_are_the_plain_path(kernel, monkeypatch):
    """One trajectory to 1e-12, with tensors of several shapes, one of them with gaps and one of many blocks."""
    shapes = ((5, 8), (7,), (50, 3), ())
    grads = [[randn(*shape, seed=20 * t + i) for i, shape in enumerate(shapes)] for t in range(25)]
    if isinstance(kernel, L.GroupL2) and kernel.dim is not None:
        shapes, grads = shapes[:3], [g[:3] for g in grads]
    paths = []
    for foreach, block in ((False, 10**9), (False, 16), (True, 10**9)):
        monkeypatch.setattr(L, "BLOCK", block)
        params = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
        params[0] = params[0].T.contiguous().T  # the same numbers, other strides
        paths.append(run(L.LionK(params, kernel, 0.02, weight_decay=1.0, foreach=foreach), params, grads))
    assert largest_difference(paths[0], paths[1]) < 1e-12 and largest_difference(paths[0], paths[2]) < 1e-12


def test_real_blocks():
    """A tensor longer than a block, with a rest, in float32."""
    d = 2 * L.BLOCK + 77
    x, g = randn(d, dtype=torch.float32), randn(d, seed=1, dtype=torch.float32)
    wanted = 0.98 * x - 0.02 * g.sign()
    optimizer = L.Lion([x], 0.02, weight_decay=1.0)
    run(optimizer, [x], [[g]])
    assert torch.allclose(x, wanted, atol=1e-6) and torch.allclose(optimizer.state[x]["exp_avg"], 0.01 * g, atol=1e-7)
    assert list(optimizer.state[x]) == ["exp_avg"]  # one buffer


@pytest.mark.parametrize(
    "grad", [lambda d: randn(2, d).T, lambda d: randn(d, 1).expand(d, 2)], ids=["transposed", "expanded"]
)
def test_blocks_need_a_contiguous_gradient(grad):
    grad = grad(L.BLOCK)
    x, y = randn(L.BLOCK, 2), randn(L.BLOCK, 2)
    run(L.Lion([x], 0.02, weight_decay=1.0), [x], [[grad]])
    assert torch.allclose(x, 0.98 * y - 0.02 * grad.sign(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_even_kernels_need_no_negation(kernel_paths, foreach, lam):
    """Bit for bit the path of the literal form."""
    for kernel in KERNELS.values():
        one, other = (kernel_paths(kernel, even, foreach, lam) for even in (True, False))
        assert not kernel.even or all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), kernel


@pytest.fixture
def kernel_paths(monkeypatch):
    def path(kernel, even, foreach, lam):
        if kernel.even:
            monkeypatch.setattr(type(kernel), "even", even)
        params = [randn(40, 3, dtype=torch.float32), randn(7, 2, seed=1, dtype=torch.float32)]
        grads = [[randn(*p.shape, seed=9 * t + p.numel(), dtype=torch.float32) for p in params] for t in range(20)]
        grads[0][0][:5] = 0  # zeros in the mixture
        optimizer = L.LionK(params, kernel, 0.02, weight_decay=lam, foreach=foreach)
        run(optimizer, params, grads)
        monkeypatch.undo()
        return [*params, *(optimizer.state[p]["exp_avg"] for p in params)]

    return path


def test_empty_parameters_are_skipped():
    for kernel in (L.L1(), L.L2(), L.LpNorm(1.5), L.TopK(2)):
        x, empty = randn(3), torch.zeros(0, 2, dtype=DOUBLE)
        run(L.LionK([x, empty], kernel, 0.1), [x, empty], [[torch.ones(3, dtype=DOUBLE), empty.clone()]])
        assert not torch.equal(x, randn(3))


def test_a_copy_steps_alike():
    x = randn(4, 2)
    optimizer = L.LionK([x], L.L2(), 0.1, foreach=True)
    run(optimizer, [x], [[randn(4, 2, seed=1)]])
    again = copy.deepcopy(optimizer)
    (y,) = again.param_groups[0]["params"]
    for one, p in ((optimizer, x), (again, y)):
        run(one, [p], [[randn(4, 2, seed=2)]])
    assert torch.equal(x, y) and again.foreach is True and y is not x


def test_a_gradient_that_is_not_finite_shows_in_the_buffer_only():
    """The pitfall of the docstring: with the sign, coordinates decay from then on; with another kernel NaN is visible."""
    for kernel in (L.L1(), L.L2()):
        x = torch.ones(2)
        optimizer = L.LionK([x], kernel, 0.1, weight_decay=1.0)
        run(optimizer, [x], [[torch.tensor([math.nan, 1.0])], [torch.ones(2)]])
        assert optimizer.state[x]["exp_avg"].isnan()[0]
        assert x[0] == pytest.approx(0.81) if isinstance(kernel, L.L1) else x[0].isnan()


def test_two_dtypes_in_one_optimizer():
    x, y, g, h = randn(5, dtype=torch.float32), randn(6), randn(5, seed=1, dtype=torch.float32), randn(6, seed=2)
    wanted = [0.98 * p - 0.02 * 0.1 * q for p, q in ((x, g), (y, h))]
    run(L.LionK([x, y], L.HalfSquare(), 0.02, weight_decay=1.0), [x, y], [[g, h]])
    assert (
        x.dtype == torch.float32 and torch.allclose(x, wanted[0]) and torch.allclose(y, wanted[1], rtol=0, atol=1e-12)
    )


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def batches(count):
    return [(randn(10, 6, seed=2 * t), torch.arange(10) % 3) for t in range(count)]


def train(net, optimizer, data):
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def groups_of(net):
    """Weights decay, biases do not."""
    weights, biases = ([p for p in net.parameters() if (p.ndim > 1) == big] for big in (True, False))
    return [dict(params=weights, weight_decay=5.0), dict(params=biases, lr=0.01)]


MAKERS = {
    "lion": lambda groups: L.Lion(groups, lr=0.003),
    "l2, group": lambda groups: L.LionK(groups, L.L2(), lr=0.003, scope="group"),
    "top": lambda groups: L.LionK(groups, L.TopK(3), lr=0.003, foreach=True),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_state_dict_in_the_middle_of_a_run(make):
    data = batches(30)
    net = network()
    wanted = train(net, make(groups_of(net)), data)
    net = network()
    optimizer = make(groups_of(net))
    train(net, optimizer, data[:13])
    file = io.BytesIO()
    torch.save(dict(net=net.state_dict(), optimizer=optimizer.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = network(seed=5)
    other.load_state_dict(saved["net"])
    fresh = make(groups_of(other))
    fresh.load_state_dict(saved["optimizer"])
    assert fresh.param_groups[0]["weight_decay"] == 5.0 and fresh.param_groups[1]["lr"] == 0.01
    assert torch.equal(train(other, fresh, data[13:]), wanted)
    again = copy.deepcopy(fresh)
    assert again.kernel == fresh.kernel


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_checkpoint_on_another_device(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    net = network()
    optimizer = L.Lion(net.parameters(), 0.003, weight_decay=5.0)
    train(net, optimizer, batches(5))
    moved = network().to(device)
    fresh = L.Lion(moved.parameters(), 0.003, weight_decay=5.0)
    fresh.load_state_dict(optimizer.state_dict())
    assert {s["exp_avg"].device.type for s in fresh.state.values()} == {device}
    for p in moved.parameters():  # and it steps there
        p.grad = torch.zeros_like(p)
    fresh.step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@every_kernel
def test_gpu_is_the_cpu(kernel):
    paths = []
    for device in ("cpu", "cuda"):
        params = [randn(3, 4).to(device), randn(5, seed=1).to(device)]
        grads = [[randn(3, 4, seed=t).to(device), randn(5, seed=99 + t).to(device)] for t in range(20)]
        paths.append(run(L.LionK(params, kernel, 0.02, weight_decay=1.0), params, grads))
    assert largest_difference(paths[0], [[p.cpu() for p in ps] for ps in paths[1]]) < 1e-12


def test_closure():
    x = nn.Parameter(randn(4))
    optimizer = L.Lion([x], 0.01)

    def closure():
        optimizer.zero_grad()
        loss = (x**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():  # the closure turns gradients on
        losses = [optimizer.step(closure).item() for _ in range(50)]
    assert losses[-1] < losses[0] and optimizer.step() is None


def test_parameters_without_gradients_stay():
    x, y = nn.Parameter(randn(3)), nn.Parameter(randn(3))
    before = y.detach().clone()
    optimizer = L.Lion([x, y], 0.1, weight_decay=1.0)
    x.grad = torch.ones(3, dtype=DOUBLE)
    optimizer.step()
    assert torch.equal(y, before) and y not in optimizer.state
    L.Lion([y]).step()
    assert torch.equal(y, before)


@pytest.mark.parametrize("foreach", [False, True])
def test_compiled_step(foreach):
    torch._dynamo.reset()
    paths = []
    for compiled in (False, True):
        params = [randn(2 * L.BLOCK + 5), randn(4, 3, seed=1)]
        optimizer = L.Lion(params, 0.01, weight_decay=1.0, foreach=foreach)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        path = []
        for t in range(4):
            for i, p in enumerate(params):
                p.grad = randn(*p.shape, seed=10 * t + i)
            step()
            path.append([p.clone() for p in params])
        paths.append(path)
    assert largest_difference(*paths) < 1e-12


def test_compiler_sees_whole_tensors():
    """Blocks are for eager mode: a compiler fuses the step itself."""
    torch._dynamo.reset()
    seen = []

    def backend(module, _inputs):
        seen.extend(node for node in module.graph.nodes if "lerp" in str(node.target))
        return module.forward

    x = randn(3 * L.BLOCK)
    x.grad = randn(3 * L.BLOCK, seed=1)
    optimizer = L.Lion([x], 0.01)
    optimizer.state[x]["exp_avg"] = torch.zeros_like(x)
    torch.compile(optimizer.step, backend=backend)()
    assert len(seen) == 2  # the mixture and the buffer


def test_amp_loop():
    """Autocast to bfloat16 and a gradient scaler; a batch with an infinite gradient is skipped."""
    torch.manual_seed(0)
    net = nn.Linear(6, 3)
    optimizer = L.Lion(net.parameters(), 0.02, weight_decay=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    losses = []
    for t in range(60):
        x = randn(30, 6, seed=t % 3, dtype=torch.float32)
        y = x[:, :3].argmax(1)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(net(x), y)
        before = net.weight.detach().clone()
        scaler.scale(loss * (math.inf if t == 30 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(net.weight, before) == (t == 30)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0] and net.weight.dtype == torch.float32
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.float32}


def test_half_precision_parameters():
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.ones(4, dtype=dtype)
        run(L.LionK([x], L.L2(), 0.5, weight_decay=1.0), [x], [[torch.tensor([3.0, -4.0, 0.0, 0.0], dtype=dtype)]])
        assert torch.allclose(x.float(), torch.tensor([0.2, 0.9, 0.5, 0.5]), atol=1e-2)


def test_schedules():
    x = nn.Parameter(randn(3))
    optimizer = L.Lion([x], 0.4, weight_decay=2.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    moved = []
    for _ in range(3):
        before = x.detach().clone()
        x.grad = torch.ones(3, dtype=DOUBLE)
        optimizer.step()
        schedule.step()
        moved.append(((before - x.detach()) / (1 + 2 * before))[0].item())
    assert moved == pytest.approx([0.4, 0.2, 0.1])


# ---- bad input -----------------------------------------------------------------------------------------------------


def one(**options):
    return L.Lion([torch.zeros(2)], **options)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: one(lr=-0.1), ValueError, "lr must be finite and >= 0, got -0.1"),
        (lambda: one(lr="fast"), TypeError, "lr must be a number"),
        (lambda: one(betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be < 1, got 1.0"),
        (lambda: one(betas=(-0.1, 0.9)), ValueError, r"betas\[0\] must be finite and in \[0, 1\]"),
        (lambda: one(betas=0.9), TypeError, "betas must be a pair"),
        (lambda: one(weight_decay=-1), ValueError, "weight_decay must be"),
        (lambda: one(lr=0.5, weight_decay=2.0), ValueError, r"lr \* weight_decay must be < 1, got 0.5 \* 2.0"),
        (lambda: L.Lion([dict(params=[torch.zeros(2)], weight_decay=20.0)], lr=0.1), ValueError, r"lr \* weight_decay"),
        (lambda: L.LionK([torch.zeros(2)], "l1"), TypeError, "kernel must be a Kernel, got str"),
        (lambda: L.LionK([torch.zeros(2)], L.L2(), scope="all"), ValueError, "scope must be 'tensor' or 'group', got 'all'"),
        (lambda: L.LionK([torch.zeros(2)], L.GroupL2(0), scope="group"), ValueError, "scope must be 'tensor' for GroupL2"),
        (lambda: L.LionK([dict(params=[torch.zeros(2)], kernel=L.L2())], L.L1()), TypeError, "kernel is one for all parameter groups"),
        (lambda: L.Lion([torch.zeros(2)], foreach="yes"), TypeError, "foreach must be a bool or None, got 'yes'"),
        (lambda: L.L2(1), TypeError, "argument"),
        (lambda: L.Huber(0), ValueError, "e must be finite and > 0"),
        (lambda: L.SoftThreshold(-1.0), ValueError, "e must be finite and > 0"),
        (lambda: L.TopK(0), ValueError, "k must be at least 1"),
        (lambda: L.TopK(1.5), TypeError, "k must be an integer"),
        (lambda: L.LpNorm(0.9), ValueError, "p must be finite and >= 1"),
        (lambda: L.LpNorm(math.inf), ValueError, "p must be finite"),
        (lambda: L.L1().conjugate(torch.zeros(2), tol=-1.0), ValueError, "tol must be"),
        (lambda: L.lyapunov_constant(lr=0.1, weight_decay=0.0), ValueError, "weight_decay must be finite and > 0"),
        (lambda: L.lyapunov_constant(lr=0.0, weight_decay=1.0), ValueError, "lr must be finite and > 0"),
        (lambda: L.lyapunov_constant(lr=0.1, betas=(0.9, 0.8), weight_decay=1.0), ValueError, "betas must not decrease"),
        (lambda: L.lyapunov(0.0, torch.zeros(2), torch.zeros(3), L.L1(), lr=0.1, weight_decay=1.0), ValueError, "m must have the shape of x"),
        (lambda: L.lyapunov(0.0, torch.zeros(2).long(), torch.zeros(2), L.L1(), lr=0.1, weight_decay=1.0), TypeError, "x must be a floating"),
        (lambda: L.lyapunov_decrease(*[torch.zeros(2)] * 2, torch.zeros(2).double(), L.L1(), smoothness=1.0, lr=0.1, weight_decay=1.0), TypeError, "grad must have the dtype"),
        (lambda: L.lyapunov_decrease(*[torch.zeros(2)] * 3, L.L1(), smoothness=-1.0, lr=0.1, weight_decay=1.0), ValueError, "smoothness must be"),
        (lambda: L.lyapunov_ode(0.0, *[torch.zeros(2)] * 2, L.L1(), alpha=1.0, gamma=2.0, eps=0.6, lam=1.0), ValueError, r"eps \* gamma must be at most 1"),
        (lambda: L.lyapunov_ode_rate(*[torch.zeros(2)] * 3, L.L1(), alpha=0.0, gamma=2.0, eps=0.1, lam=1.0), ValueError, "alpha must be"),
        (lambda: L.lionk_ode(lambda x: x, *[torch.zeros(2)] * 2, L.L1(), 1.0, 1.0, 0.1, 1.0, [1.0, 0.5]), ValueError, "t_eval must be increasing"),
        (lambda: L.lionk_ode(lambda x: x, *[torch.zeros(2, 2)] * 2, L.L1(), 1.0, 1.0, 0.1, 1.0, [1.0]), ValueError, "x0 must have 1 dimension"),
        (lambda: L.kkt_residual(torch.zeros(2), torch.zeros(3), 1.0), ValueError, "grad must have the shape of x"),
        (lambda: L.kkt_residual(torch.zeros(2), torch.zeros(2), 0.0), ValueError, "weight_decay must be"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_bad_step():
    x = torch.zeros(2)
    optimizer = L.Lion([x], lr=0.4, weight_decay=2.0)
    optimizer.param_groups[0]["lr"] = 0.5
    x.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"lr \* weight_decay must be < 1, got 0.5 \* 2.0"):
        optimizer.step()
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="gradient must be dense"):
        L.Lion(table.parameters()).step()
    assert L.lyapunov(0.0, torch.tensor([2.0]), torch.zeros(1), L.L1(), lr=0.1, weight_decay=1.0) == math.inf
