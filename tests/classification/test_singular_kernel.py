"""Kernels of wide and deep networks: against loops and decimals of 80 digits, closed forms, networks of finite width, and the limits."""

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.dummy import DummyClassifier
from sklearn.neighbors import KNeighborsClassifier

from lossbook.classification import singular_kernel as S

D = torch.float64
Dual = S.DualActivation
few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)
DIRICHLET = dict(alpha_pos=[0.5, 0.5, 2.5], alpha_neg=[2.5, 0.1, 0.5])
MAJORITY, NEAREST = Dual.hermite([0.2, 0, 0, 0.8]), Dual.hermite([0, 0, 1])


def random_squares(seed, low=1, degree=6):
    """Squared Hermite coefficients from degree `low` on."""
    w = np.random.default_rng(seed).dirichlet(np.ones(degree + 1 - low))
    return [0.0] * low + w.tolist()


def sphere(n, p, seed, dtype=D):
    x = torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=D).abs()
    return torch.nn.functional.normalize(x).to(dtype)


def with_cosine(xi):
    """Two rows with a given cosine."""
    xi = torch.as_tensor(xi, dtype=D)
    return torch.tensor([[1.0, 0.0]], dtype=D), torch.stack([xi, torch.sqrt(1 - xi * xi)], -1).reshape(-1, 2)


def data(n=300, tests=2000, seed=0, parameters=DIRICHLET):
    g = torch.Generator().manual_seed(seed)
    return *S.dirichlet_sphere(n, **parameters, generator=g), *S.dirichlet_sphere(tests, **parameters, generator=g)


def agreement(a, b):
    return (torch.as_tensor(a) == torch.as_tensor(b)).double().mean().item()


# --- duals --------------------------------------------------------------------------------------------------------


def quadrature(fn):
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    return float((torch.as_tensor(weights / math.sqrt(2 * math.pi)) * fn(torch.as_tensor(nodes))).sum())


@given(seeds, st.integers(0, 2))
@few
def test_hermite_is_the_power_series(seed, low):
    w = random_squares(seed, low)
    dual, xi = Dual.hermite(w), torch.linspace(0, 1, 9, dtype=D)
    slow = [sum(c * x**k for k, c in enumerate(w)) for x in xi.tolist()]
    slope = [sum(k * c * x ** (k - 1) for k, c in enumerate(w) if k) for x in xi.tolist()]
    torch.testing.assert_close(dual(xi), torch.tensor(slow, dtype=D), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dual.derivative(xi), torch.tensor(slope, dtype=D), rtol=1e-12, atol=1e-14)
    assert dual.at_zero == w[0] and dual.slope_at_zero == w[1] and dual.lowest_degree == low
    assert dual.slope_at_one == pytest.approx(sum(k * c for k, c in enumerate(w)))


ALL = {
    "hermite": Dual.hermite(random_squares(3)),
    "with a constant": MAJORITY,
    "square": NEAREST,
    "optimal 1": Dual.optimal(1),
    "optimal 5": Dual.optimal(5),
    "sine": Dual.sine(6.0),
    "erf": Dual.erf(),
    "relu": Dual.relu(),
}


@pytest.mark.parametrize("name", ALL)
def test_the_parts_of_a_dual_fit_together(name):
    dual = ALL[name]
    xi = torch.tensor([0.0, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0], dtype=D)
    value = dual(xi)
    torch.testing.assert_close(value[-1].item(), 1.0, rtol=1e-14, atol=0)
    torch.testing.assert_close(dual.gap(1 - xi), 1 - value, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(dual.reduced(xi) * xi**dual.lowest_degree, value, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(dual.log_ratio(xi[1:].log()), (value / xi)[1:].log(), rtol=1e-12, atol=1e-14)
    assert (dual.reduced(torch.zeros(1, dtype=D)) > 0).all()
    x = xi[1:-1].clone().requires_grad_()
    torch.testing.assert_close(dual.derivative(x), torch.autograd.grad(dual(x).sum(), x)[0], rtol=1e-10, atol=1e-12)
    assert dual.slope_at_one == pytest.approx(dual.derivative(torch.ones(1, dtype=D)).item())
    u = torch.logspace(
        -14, -2, 13, dtype=D
    )  # the gap keeps its digits: F(u) = b u + o(u), here by central differences of its log
    slope = (dual.gap(u * 1.001).log() - dual.gap(u / 1.001).log()) / (2 * math.log(1.001))
    assert ((slope - 1).abs() < 0.3).all() and ((slope[:6] - 1).abs() < 2e-4).all()
    assert dual.gap(u[:1]).item() == pytest.approx(dual.slope_at_one * 1e-14, rel=1e-6, abs=0)


def test_the_gap_of_relu_has_all_its_digits_where_series_and_difference_meet():
    angle = torch.tensor([0.01, 0.0499, 0.0501, 0.3], dtype=D)
    u = 2 * torch.sin(angle / 2) ** 2
    exact = []
    for v in angle.tolist():  # 1 - [cos v (pi - v) + sin v] / pi, by its Taylor series
        terms = [(-1) ** k * v ** (2 * k + 1) * (1 / math.factorial(2 * k) - 1 / math.factorial(2 * k + 1)) for k in range(1, 12)]  # fmt: skip
        exact.append(2 * math.sin(v / 2) ** 2 + math.fsum(terms) / math.pi)
    torch.testing.assert_close(Dual.relu().gap(u), torch.tensor(exact, dtype=D), rtol=1e-12, atol=0)


def test_log_ratio_where_the_kernel_underflows():
    t = torch.tensor([-1e4, -math.inf], dtype=D)
    assert NEAREST.log_ratio(t).tolist() == [-1e4, -math.inf]
    assert Dual.optimal(4).log_ratio(t).tolist() == pytest.approx([math.log(0.25)] * 2)
    assert MAJORITY.log_ratio(t).tolist() == pytest.approx([1e4 + math.log(0.2), math.inf])


def test_closed_forms_are_the_duals_of_their_activations():
    xi = torch.linspace(0, 1, 11, dtype=D)
    for name, dual in (("erf", Dual.erf()), ("sine", Dual.sine(1.0)), (2, Dual.optimal(2)), (1, Dual.optimal(1))):
        again = Dual.from_activation(S.activation(name), degree=80)
        torch.testing.assert_close(again(xi), dual(xi), rtol=1e-11, atol=1e-11)
        assert quadrature(lambda z, name=name: S.activation(name)(z) ** 2) == pytest.approx(1, abs=1e-10)
    torch.testing.assert_close(Dual.from_activation(lambda x: 3 * (x * x - 1))(xi), xi**2, rtol=1e-12, atol=1e-14)
    gaussian = Dual.from_activation(lambda x: torch.exp(-x * x / 2), degree=80)
    torch.testing.assert_close(gaussian(xi), (3 / (4 - xi**2)).sqrt(), rtol=1e-11, atol=0)
    slope = Dual.from_activation(lambda x: x * torch.exp(-x * x / 2), degree=80)
    torch.testing.assert_close(slope(xi), xi * (3 / (4 - xi**2)) ** 1.5, rtol=1e-10, atol=0)


def test_relu_against_monte_carlo():
    g = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 400_000, generator=g, dtype=D)
    for xi in (0.2, 0.8):
        other = xi * z + math.sqrt(1 - xi * xi) * noise
        mean = (S.activation("relu")(z) * S.activation("relu")(other)).mean().item()
        slope = 2 * ((z > 0) & (other > 0)).double().mean().item()
        at = torch.tensor(xi, dtype=D)
        assert Dual.relu()(at).item() == pytest.approx(mean, abs=0.01)
        assert Dual.relu().derivative(at).item() == pytest.approx(slope, abs=0.005)


@pytest.mark.parametrize("d", [2, 4, 8])
def test_moments_of_the_optimal_activation(d):
    phi = S.activation(d)

    def slope(z):
        z = z.clone().requires_grad_()
        return torch.autograd.grad(phi(z).sum(), z)[0]

    assert quadrature(lambda z: phi(z) ** 2) == pytest.approx(1, abs=1e-10)
    assert quadrature(phi) == pytest.approx(0, abs=1e-10)
    assert quadrature(slope) == pytest.approx(2 ** (-d / 4), abs=1e-10)
    assert quadrature(lambda z: slope(z) ** 2) == pytest.approx(2, abs=1e-10)
    assert phi(torch.ones(2, dtype=torch.float32)).dtype == torch.float32


# --- kernels ------------------------------------------------------------------------------------------------------


def slow_kernels(xi, w, depth):
    """NNGP by the loop, NTK as the unrolled sum of products."""
    dual = lambda x: sum(c * x**k for k, c in enumerate(w))
    slope = lambda x: sum(k * c * x ** (k - 1) for k, c in enumerate(w) if k)
    sigma = [xi]
    for _ in range(depth):
        sigma.append(dual(sigma[-1]))
    ntk = sum(sigma[l] * math.prod(slope(sigma[j]) for j in range(l, depth)) for l in range(depth + 1))
    return sigma[-1], ntk


@given(seeds, st.integers(0, 6), st.integers(0, 2))
@few
def test_kernels_against_loops(seed, depth, low):
    w = random_squares(seed, low)
    X, Y = sphere(4, 3, seed), sphere(3, 3, seed + 1)
    slow = [[slow_kernels(float(x @ y), w, depth) for y in Y] for x in X]
    args = dict(dual=Dual.hermite(w), depth=depth)
    nngp, ntk = (torch.tensor([[pair[k] for pair in row] for row in slow], dtype=D) for k in (0, 1))
    torch.testing.assert_close(S.nngp_kernel(X, Y, **args), nngp, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(S.nngp_kernel(X, Y, **args, log=True), nngp.log(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(S.ntk_kernel(X, Y, **args), ntk, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(S.ntk_kernel(X, Y, **args, log=True), ntk.log(), rtol=1e-8, atol=1e-8)


@given(seeds, st.integers(0, 30))
@few
def test_diagonal(seed, depth):
    X, dual = sphere(3, 4, seed), Dual.hermite(random_squares(seed))
    b = dual.slope_at_one
    wanted = depth + 1 if b == 1 else (b ** (depth + 1) - 1) / (b - 1)
    torch.testing.assert_close(S.ntk_kernel(X, X, dual=dual, depth=depth).diagonal(), torch.full((3,), wanted, dtype=D))
    assert (S.nngp_kernel(X, X, dual=dual, depth=depth).diagonal() == 1).all()
    relu = S.ntk_kernel(X, X, dual=Dual.relu(), depth=depth).diagonal()
    torch.testing.assert_close(relu, torch.full((3,), depth + 1.0, dtype=D))


def test_kernels_are_positive_semidefinite_and_symmetric():
    X = sphere(12, 4, 0)
    for dual in ALL.values():
        for kernel in (S.nngp_kernel(X, X, dual=dual, depth=4), S.ntk_kernel(X, X, dual=dual, depth=4)):
            torch.testing.assert_close(kernel, kernel.T, rtol=1e-12, atol=0)
            assert torch.linalg.eigvalsh(kernel).min() > -1e-9 * kernel.max()


def test_the_ntk_of_networks_of_finite_width():
    """Depth 1: inner products of gradients in both layers, the mean of 16 networks."""
    phi, m = S.activation(2), 8192
    X = sphere(2, 3, 1)
    g, total = torch.Generator().manual_seed(0), torch.zeros(2, 2, dtype=D)
    for _ in range(16):
        W = torch.randn(m, 3, generator=g, dtype=D, requires_grad=True)
        out = torch.randn(m, generator=g, dtype=D, requires_grad=True)
        rows = [torch.cat([v.flatten() for v in torch.autograd.grad(out @ phi(W @ x) / math.sqrt(m), (W, out))]) for x in X]  # fmt: skip
        total += torch.stack(rows) @ torch.stack(rows).T / 16
    torch.testing.assert_close(total, S.ntk_kernel(X, X, dual=Dual.optimal(2), depth=1), rtol=0.05, atol=0)


def test_near_points_in_float64_and_equal_points_in_float32():
    d4 = Dual.optimal(4)
    u = 2.0**-60
    near = torch.tensor([[1.0, 0.0], [1.0, math.sqrt(2 * u)]], dtype=D)
    log = S.nngp_kernel(near, near, dual=d4, depth=10, log=True)
    assert log[0, 1].item() == pytest.approx(-(2.0**10) * u, rel=1e-9, abs=0)
    X = sphere(5, 7, 0, torch.float32)
    kernel = S.nngp_kernel(X, X, dual=d4, depth=60)
    assert kernel.dtype == D and (kernel.diagonal() == 1).all()
    assert (kernel - torch.eye(5, dtype=D)).abs().max() < 1e-6


def test_norms_are_corrected():
    """Rows within the tolerance are used as if their norm were 1, also where a point meets itself."""
    X, Y = sphere(5, 3, 0), sphere(4, 3, 1)
    args = dict(dual=Dual.optimal(2), depth=6)
    torch.testing.assert_close(S.ntk_kernel(X * 1.000005, Y, **args), S.ntk_kernel(X, Y, **args), rtol=1e-12, atol=0)
    assert S.nngp_kernel(X * 1.000005, X, dual=Dual.optimal(2), depth=6).diagonal().min() > 1 - 1e-12


def test_the_gradient_lies_in_the_sphere():
    """The kernel does not see the norm of a row, so that its gradient is at right angles to the row."""
    X = sphere(5, 3, 0).requires_grad_()
    (gradient,) = torch.autograd.grad(S.nngp_kernel(X, sphere(4, 3, 1), dual=Dual.optimal(2), depth=2).sum(), X)
    assert gradient.norm(dim=1).min() > 0.1 and (gradient * X).sum(1).abs().max() < 1e-12


def test_underflow():
    X, Y = with_cosine([0.3, 0.9])
    log = S.nngp_kernel(X, Y, dual=Dual.optimal(20), depth=200, log=True)
    c = S.limit_kernel(torch.tensor([[0.3, 0.9]], dtype=D), dual=Dual.optimal(20))
    torch.testing.assert_close(log, c - 200 * 10 * math.log(2), rtol=1e-12, atol=0)
    assert (S.nngp_kernel(X, Y, dual=Dual.optimal(20), depth=200) == 0).all()
    log = S.nngp_kernel(X, Y, dual=NEAREST, depth=18, log=True)
    torch.testing.assert_close(log, 2.0**18 * torch.tensor([[0.3, 0.9]], dtype=D).log(), rtol=1e-12, atol=0)
    X, Y = with_cosine([0.0])
    assert S.nngp_kernel(X, Y, dual=NEAREST, depth=3, log=True).item() == -math.inf
    across = torch.tensor([[-1e-8, 1.0]], dtype=D)  # a right angle up to rounding
    assert S.nngp_kernel(X, across, dual=Dual.optimal(2), depth=3).item() == 0
    assert S.nngp_kernel(X, across, dual=Dual.optimal(2), depth=3, log=True).item() == -math.inf
    assert S.nngp_kernel(X, Y, dual=MAJORITY, depth=1, log=True).item() == pytest.approx(math.log(0.2))


def test_underflow_and_overflow_of_the_tangent_kernel():
    X, Y = with_cosine([0.3, 0.9, 1.0])
    # (2^(L+1) - 1) xi^(2^L); with 100 layers the power hides the factor, with 12 it does not, and xi^(2^11) is zero
    for depth in (12, 100):
        squares = S.ntk_kernel(X, Y, dual=NEAREST, depth=depth, log=True)
        factor = math.log(2.0 ** (depth + 1) - 1)
        wanted = 2.0**depth * torch.tensor([[0.3, 0.9, 1.0]], dtype=D).log() + factor
        torch.testing.assert_close(squares, wanted, rtol=1e-12, atol=0)
    a, xi = 2.0**-10, Decimal(0.3)
    getcontext().prec = 60
    w, kernel = [Decimal(c) for c in (0, a, 1 - 2 * a, a)], xi
    for _ in range(300):
        slope = w[1] + 2 * w[2] * xi + 3 * w[3] * xi * xi
        xi = w[1] * xi + w[2] * xi**2 + w[3] * xi**3
        kernel = xi + kernel * slope
    found = S.ntk_kernel(X, Y, dual=Dual.optimal(20), depth=300, log=True)
    assert found[0, 0].item() == pytest.approx(float(kernel.ln()), rel=1e-12)
    deep = S.ntk_kernel(X, X, dual=Dual.optimal(20), depth=5000, log=True)
    assert deep.item() == pytest.approx(5001 * math.log(2), rel=1e-12)
    for dual in (MAJORITY, Dual.relu(), Dual.erf()):
        args = dict(dual=dual, depth=8)
        torch.testing.assert_close(S.ntk_kernel(X, Y, **args, log=True).exp(), S.ntk_kernel(X, Y, **args))
    X, Y = with_cosine([0.0])
    assert S.ntk_kernel(X, Y, dual=NEAREST, depth=3, log=True).item() == -math.inf
    assert S.ntk_kernel(X, Y, dual=MAJORITY, depth=1, log=True).item() == pytest.approx(math.log(0.2))


# --- the limit kernel ---------------------------------------------------------------------------------------------


def decimal_limit(xi, w, depth, log=False):
    """Lim of a^-L times the L-fold composition, literally, with 80 digits and without underflow."""
    getcontext().prec = 80
    w, x = [Decimal(c) for c in w], Decimal(xi)
    for _ in range(depth):
        x = sum(c * x**k for k, c in enumerate(w))
    c = x / w[1] ** depth
    return float(c.ln() if log else c)


@given(st.integers(0, 10**6), st.floats(0.01, 0.999))
@few
def test_limit_kernel_against_decimals(seed, xi):
    w = random_squares(seed, degree=4)
    w = [0, 0.1 + 0.9 * w[1], *(0.9 * c for c in w[2:])]
    w = [c / sum(w) for c in w]
    found = S.limit_kernel(torch.tensor(xi, dtype=D), dual=Dual.hermite(w), log=False).item()
    a, b = w[1], sum(k * c for k, c in enumerate(w))
    depth = math.ceil(math.log(1e3) / math.log(b) + 45 / -math.log(a))
    if depth < 1500:
        assert found == pytest.approx(decimal_limit(xi, w, depth), rel=1e-9)


@pytest.mark.parametrize(("d", "known"), [(200, None), (400, 986.123), (783, 2190.59), (2000, 6578)])
def test_high_dimensions(d, known):
    """Where a = 2^(-d/2) is tiny a factor is near 1 only once Sigma is small beside a."""
    xi = torch.tensor([0.1, 0.6, 0.99], dtype=D)
    found = [S.limit_kernel(x, dual=Dual.optimal(d)).item() for x in xi]  # each stops by itself
    a = 2.0 ** (-d / 2)
    assert found == pytest.approx([decimal_limit(x, [0, a, 1 - 2 * a, a], 40, log=True) for x in xi.tolist()], rel=1e-9)
    assert known is None or found[1] == pytest.approx(known, rel=1e-4)


def test_values_and_rates_of_the_optimal_dual():
    xi, d4 = torch.tensor([0.3, 0.6, 0.9, 0.99], dtype=D), Dual.optimal(4)
    c = S.limit_kernel(xi, dual=d4, log=False)
    torch.testing.assert_close(c, torch.tensor([0.717041, 4.905790, 128.4959, 14466.30], dtype=D), rtol=1e-6, atol=0)
    pair = with_cosine(xi)
    nngp = S.nngp_kernel(*pair, dual=d4, depth=50)[0] * 4.0**50
    torch.testing.assert_close(nngp, c, rtol=1e-9, atol=0)
    scaled = [S.ntk_kernel(*pair, dual=d4, depth=L)[0, 1].item() * 4.0**L / (L + 1) for L in (50, 100, 200)]
    assert scaled == pytest.approx([5.4226, 5.1668, 5.0369], abs=1e-4)
    errors = [s - c[1].item() for s in scaled]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.05) and errors[1] / errors[2] == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("dual", [Dual.optimal(1), Dual.optimal(4), Dual.erf(), Dual.sine(6.0)])
def test_functional_equation(dual):
    xi = torch.linspace(0.01, 0.99, 50, dtype=D)
    left = S.limit_kernel(dual(xi), dual=dual)
    torch.testing.assert_close(left, S.limit_kernel(xi, dual=dual) + math.log(dual.slope_at_zero), rtol=0, atol=1e-10)
    small = torch.tensor(1e-6, dtype=D)
    assert S.limit_kernel(small, dual=dual, log=False).item() / 1e-6 == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("a", [0.3, 0.5, 0.8])
def test_limit_kernels_in_closed_form(a):
    """A geometric series is a Moebius map, with c = xi / (1 - xi); its square-root twin has c = xi / sqrt(1 - xi^2)."""
    k = torch.arange(120, dtype=D)
    geometric = torch.cat([torch.zeros(1, dtype=D), a * (1 - a) ** k])
    xi = 1 - 2.0 ** -torch.arange(1, 12, dtype=D)
    dual = Dual.hermite(geometric / geometric.sum())
    torch.testing.assert_close(S.limit_kernel(xi, dual=dual, log=False), xi / (1 - xi), rtol=1e-9, atol=0)
    assert S.singularity_exponent(dual) == pytest.approx(2, abs=1e-9)
    binomial = torch.cumprod(torch.cat([torch.ones(1, dtype=D), (k[1:] - 0.5) / k[1:] * (1 - a)]), 0) * math.sqrt(a)
    odd = torch.zeros(241, dtype=D)
    odd[1::2] = binomial
    dual = Dual.hermite(odd / odd.sum())
    wanted = xi / torch.sqrt((1 - xi) * (1 + xi))
    torch.testing.assert_close(S.limit_kernel(xi, dual=dual, log=False), wanted, rtol=1e-8, atol=0)
    assert S.singularity_exponent(dual) == pytest.approx(1, abs=1e-8)


def test_ends():
    ends = torch.tensor([0.0, 1.0], dtype=D)
    assert S.limit_kernel(ends, dual=Dual.optimal(3), log=False).tolist() == [0, math.inf]
    assert S.limit_kernel(ends, dual=Dual.erf()).tolist() == [-math.inf, math.inf]
    assert S.limit_kernel(torch.tensor([[0.5]]), dual=Dual.optimal(3)).dtype == D
    for dual in (Dual.optimal(3), Dual.erf(), Dual.sine(2.0)):  # c(0) = 0 and c'(0) = 1
        zero = torch.zeros(2, dtype=D, requires_grad=True)
        S.limit_kernel(zero, dual=dual, log=False).sum().backward()
        torch.testing.assert_close(zero.grad, torch.ones(2, dtype=D), rtol=1e-12, atol=0)
    tiny = torch.tensor(1e-300, dtype=D)
    assert S.limit_kernel(tiny, dual=Dual.optimal(3)).item() == pytest.approx(math.log(1e-300))


@pytest.mark.parametrize("d", [1, 2, 3, 4, 8])
def test_exponents_of_the_optimal_duals(d):
    assert S.singularity_exponent(Dual.optimal(d)) == pytest.approx(d, abs=1e-12)
    u = torch.tensor([2.0**-17, 2.0**-27], dtype=D)
    c = S.limit_kernel(1 - u, dual=Dual.optimal(d))
    assert (2 * (c[0] - c[1]) / (u[0] / u[1]).log()).item() == pytest.approx(-d, abs=0.003)


def test_the_bounded_factor():
    """c(xi) ||x - x'||^d near 1: constant to five digits for d = 2 and 4, a small oscillation for d = 1."""
    u = 2.0 ** -torch.linspace(20, 30, 41, dtype=D)
    u = 1 - (1 - u)
    for d, low, high in ((1, 0.71730, 0.71828), (2, 1.21033, 1.21033), (4, 5.8596, 5.8596)):
        factor = (S.limit_kernel(1 - u, dual=Dual.optimal(d)) + d / 2 * (2 * u).log()).exp()
        assert factor.min().item() == pytest.approx(low, abs=2e-5 * d)
        assert factor.max().item() == pytest.approx(high, abs=2e-5 * d)


@pytest.mark.parametrize(("s", "alpha"), [(2.676, 2), (6.13539, 4), (13.8258, 8), (1.0, 1.1856)])
def test_exponents_of_sines(s, alpha):
    assert S.singularity_exponent(Dual.sine(s)) == pytest.approx(alpha, abs=1e-4)
    assert S.singularity_exponent(Dual.sine(s)) == pytest.approx(
        -2 * math.log(s / math.sinh(s)) / math.log(s / math.tanh(s))
    )


def test_gradients_and_transforms():
    xi = torch.tensor([0.05, 0.4, 0.8, 0.97], dtype=D, requires_grad=True)
    for dual in (Dual.optimal(2), Dual.erf(), Dual.sine(2.0)):
        assert torch.autograd.gradcheck(lambda x, dual=dual: S.limit_kernel(x, dual=dual), xi)
    X, Y = sphere(4, 3, 0), sphere(5, 3, 1)
    args = dict(dual=Dual.optimal(2), depth=3)
    batched = torch.func.vmap(lambda x: S.ntk_kernel(x[None], Y, **args)[0])(X)
    torch.testing.assert_close(batched, S.ntk_kernel(X, Y, **args))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(S.ntk_kernel(X, Y, **args), S.ntk_kernel(X, Y, **args))
        narrow = S.ntk_kernel(X.float(), Y.float(), **args)
    torch.testing.assert_close(narrow, S.ntk_kernel(X, Y, **args), rtol=1e-5, atol=1e-6)


# --- the three limits ---------------------------------------------------------------------------------------------

TABLE = {
    "tanh": (torch.tanh, 0, 0.9646, 1.1778, "singular", 0.881),
    "erf": (torch.erf, 0, 0.9558, 1.2257, "singular", 0.888),
    "sin": (torch.sin, 0, 0.9225, 1.3130, "singular", 1.186),
    "x exp": (lambda x: x * torch.exp(-x * x / 2), 0, 0.8059, 2.0, "singular", 1.245),
    "cube": (lambda x: x**3, 0, 0.7746, 1.8, "singular", 1.738),
    "square": (lambda x: x * x - 1, 0, 0, 2.0, "nearest", None),
    "cos": (lambda x: torch.cos(x) - math.exp(-0.5), 0, 0, 2.1640, "nearest", None),
    "gelu": (torch.nn.functional.gelu, 0.4326, 0.7668, 1.0720, "majority", None),
    "sigmoid": (torch.sigmoid, 0.923, 0.382, 0.153, "undetermined", None),
    "softplus": (torch.nn.functional.softplus, 0.840, 0.521, 0.319, "undetermined", None),
    "relu": (None, 0.5642, 0.7071, 1.0, "undetermined", None),
    "linear": (lambda x: 2 * x, 0, 1.0, 1.0, "undetermined", None),
}


@pytest.mark.parametrize("name", TABLE)
def test_where_activations_fall(name):
    fn, first, second, slope, kind, alpha = TABLE[name]
    dual = Dual.relu() if fn is None else Dual.from_activation(fn)
    digits = 1e-3 if name in ("sigmoid", "softplus") else 1e-4
    assert math.sqrt(dual.at_zero) == pytest.approx(first, abs=digits)
    assert math.sqrt(dual.slope_at_zero) == pytest.approx(second, abs=digits)
    assert dual.slope_at_one == pytest.approx(slope, abs=digits)
    assert S.limit_type(dual) == kind
    if alpha:
        assert S.singularity_exponent(dual) == pytest.approx(alpha, abs=6e-4)
    else:
        for call in (lambda: S.singularity_exponent(dual), lambda: S.limit_kernel(torch.ones(1, dtype=D), dual=dual)):
            with pytest.raises(ValueError, match="singular"):
                call()


def test_types():
    duals = [Dual.optimal(2), Dual.optimal(1), NEAREST, MAJORITY, Dual.erf(), Dual.sine(2.0), Dual.relu()]
    kinds = ["singular", "singular", "nearest", "majority", "singular", "singular", "undetermined"]
    assert [S.limit_type(dual) for dual in duals] == kinds
    assert S.limit_type(Dual.hermite([0, 0, 0, 1])) == "nearest"
    assert S.limit_type(Dual.hermite([0.5, 0.5])) == "undetermined"
    assert S.limit_type(Dual.hermite([1e-6, 0.4, 0, 0.6 - 1e-6])) == "majority"  # however small the constant


def test_the_majority_kernel_is_constant():
    X, Y = with_cosine([0.0, 0.5, 0.99])
    kernel = S.ntk_kernel(X, Y, dual=MAJORITY, depth=200)
    torch.testing.assert_close(kernel, torch.full((1, 3), 0.230874, dtype=D), rtol=0, atol=1e-6)
    assert S.nngp_kernel(X, Y, dual=MAJORITY, depth=200)[0, 0].item() == pytest.approx(0.20711, abs=1e-5)


def test_relu_is_a_quarter_off_the_diagonal():
    X, Y = with_cosine([0.0, 0.5, 0.9])
    for depth, slack in ((1000, 0.02), (8000, 0.004)):
        kernel = S.ntk_kernel(X, Y, dual=Dual.relu(), depth=depth) / (depth + 1)
        assert ((kernel - 0.25).abs() < slack).all()


@pytest.mark.parametrize("seed", [0, 2])
def test_predictions_converge(seed):
    X, y, Z, _z = data(seed=seed)
    limit = S.SingularKernelClassifier(dimension=2).fit(X, y).predict(Z)
    for depth, least in ((20, 0.98), (40, 0.995)):
        deep = S.DeepKernelClassifier(Dual.optimal(2), depth, kernel="nngp").fit(X, y)
        assert agreement(deep.predict(Z), limit) >= least
    nearest = KNeighborsClassifier(1).fit(X, y).predict(Z)
    assert agreement(S.DeepKernelClassifier(NEAREST, 18, kernel="nngp").fit(X, y).predict(Z), nearest) >= 0.995
    majority = DummyClassifier(strategy="most_frequent").fit(X, y).predict(Z)
    assert agreement(S.DeepKernelClassifier(MAJORITY, 30).fit(X, y).predict(Z), majority) >= 0.995
    assert 0.6 < agreement(limit, majority) < 0.95 and agreement(limit, nearest) < 0.99  # three different rules


def test_deep_tangent_classifiers_whose_kernel_underflows():
    """For 54 to 100 % of the test points all entries of the kernel are zero in double precision."""
    X, y, Z, _z = data(n=40, tests=200)
    near = torch.from_numpy(KNeighborsClassifier(1).fit(X, y).predict(Z))
    for dual, depth in ((NEAREST, 18), (NEAREST, 60), (Dual.optimal(20), 200)):
        assert (S.ntk_kernel(X, Z, dual=dual, depth=depth) == 0).all(0).double().mean() > 0.3
        model = S.DeepKernelClassifier(dual, depth).fit(X, y)
        assert agreement(model.predict(Z), near) > 0.98 and torch.equal(model.predict(X), y)
    for kernel, depth in (("nngp", 1022), ("ntk", 1015)):  # where even the logarithm overflows
        with pytest.raises(ValueError, match="depth"):
            S.DeepKernelClassifier(NEAREST, depth, kernel).fit(X, y).predict(Z)


def test_a_classifier_so_deep_that_its_diagonal_overflows():
    X, y, Z, _z = data(n=40, tests=200)
    assert torch.isinf(S.ntk_kernel(X[:1], X[:1], dual=Dual.optimal(2), depth=1200)).all()
    for dual in (Dual.optimal(2), MAJORITY):
        deep, deeper = (S.DeepKernelClassifier(dual, depth).fit(X, y) for depth in (500, 1200))
        torch.testing.assert_close(deep.coefficients_, deeper.coefficients_)  # by then the matrix is the identity
        assert torch.equal(deep.predict(X), y) and torch.equal(deeper.predict(X), y)
    limit = S.SingularKernelClassifier(dimension=2).fit(X, y).predict(Z)
    assert agreement(S.DeepKernelClassifier(Dual.optimal(2), 1200).fit(X, y).predict(Z), limit) > 0.98


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_training_points_are_found_again_at_any_depth(dtype):
    X = sphere(300, 5, 3, dtype)
    y = torch.randint(2, (300,), generator=torch.Generator().manual_seed(4))
    assert torch.equal(S.DeepKernelClassifier(MAJORITY, 1200, "nngp").fit(X, y).predict(X), y)


@pytest.mark.parametrize("d", [2, 4])
def test_the_tangent_kernel_is_more_singular_until_it_is_deep(d):
    """K / a^L is (L + 1) c plus about c' b / (b - 1) = c d / u for near points: depth must be large beside 1 / u."""
    for u in (2.0**-14, 2.0**-18):
        near = torch.tensor([[1.0, 0.0], [1 - u, math.sqrt(u * (2 - u))]], dtype=D)
        c = S.limit_kernel(torch.tensor(1 - u, dtype=D), dual=Dual.optimal(d)).item()
        for depth in (60, 100):
            kernel = S.ntk_kernel(near[:1], near[1:], dual=Dual.optimal(d), depth=depth).item()
            ratio = math.exp(math.log(kernel) + depth * d / 2 * math.log(2) - c)
            assert ratio * u == pytest.approx(d, rel=0.02)


def test_the_tangent_kernel_agrees_at_last():
    X, y, Z, _z = data(tests=500)
    limit = S.SingularKernelClassifier(dimension=2).fit(X, y).predict(Z)
    assert agreement(S.DeepKernelClassifier(Dual.optimal(2), 160).fit(X, y).predict(Z), limit) > 0.96


# --- weights and classifiers ------------------------------------------------------------------------------------------


@given(seeds, st.floats(0.2, 8))
@few
def test_hilbert_weights(seed, exponent):
    X, Z = sphere(6, 3, seed), sphere(4, 3, seed + 1)
    weights = S.hilbert_weights(X, Z, exponent=exponent)
    slow = torch.tensor([[float((x - z).norm()) ** -exponent for z in Z] for x in X], dtype=D)
    torch.testing.assert_close(weights, slow / slow.sum(0), rtol=1e-9, atol=1e-12)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(S.hilbert_weights(X[order], Z, exponent=exponent), weights[order])
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=D))[0]
    torch.testing.assert_close(S.hilbert_weights(X @ turn, Z @ turn, exponent=exponent), weights, rtol=1e-8, atol=1e-10)
    own = S.hilbert_weights(X, X, exponent=exponent)
    assert torch.equal(own, torch.eye(6, dtype=D))


def test_hilbert_weights_do_not_depend_on_the_unit():
    X, Z = sphere(6, 3, 0), torch.cat([sphere(4, 3, 1), sphere(6, 3, 0)[:1]])
    for unit in (1e-200, 1e200, 3.0):
        found = S.hilbert_weights(unit * X, unit * Z, exponent=2.0)
        torch.testing.assert_close(found, S.hilbert_weights(X, Z, exponent=2.0), rtol=1e-12, atol=0)
    zeros = torch.zeros(2, 3, dtype=D)
    assert S.hilbert_weights(zeros, zeros, exponent=1.0).tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_hilbert_weights_at_both_ends():
    X, y, Z, _z = data(n=101, tests=300)
    score = lambda exponent: torch.where(y.double() @ S.hilbert_weights(X, Z, exponent=exponent) >= 0, 1, -1)
    assert agreement(score(200.0), KNeighborsClassifier(1).fit(X, y).predict(Z)) == 1
    assert agreement(score(1e-3), torch.full((300,), y.sum().sign().item())) == 1


def test_share_of_the_nearest_neighbour():
    medians = {}
    for exponent in (1.0, 2.0, 4.0):
        for n in (100, 1000, 10_000):
            weights = S.hilbert_weights(sphere(n, 3, n), sphere(400, 3, 1), exponent=exponent)
            medians[exponent, n] = weights.amax(0).median().item()
    assert medians[1.0, 100] / medians[1.0, 10_000] > 5
    assert 1.5 < medians[2.0, 100] / medians[2.0, 10_000] < 3
    assert medians[4.0, 100] / medians[4.0, 10_000] < 1.25


def angles(*degrees):
    radians = torch.tensor(degrees, dtype=D).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], 1)


def test_worked_example():
    X, y, Z = angles(0, 30, 80), torch.tensor([1, -1, 1]), angles(10, 20)
    distances = torch.cdist(X, Z[:1])[:, 0]
    torch.testing.assert_close(distances, torch.tensor([0.17431, 0.34730, 1.14715], dtype=D), rtol=0, atol=1e-5)
    votes = y.double() @ (1 / torch.cdist(X, Z))
    assert votes.tolist() == pytest.approx([3.730, -1.858], abs=1e-3)
    hilbert = y.double() @ S.hilbert_weights(X, Z, exponent=1.0)
    torch.testing.assert_close(hilbert, votes / (1 / torch.cdist(X, Z)).sum(0))
    assert S.SingularKernelClassifier(dimension=1).fit(X, y).predict(Z).tolist() == [1, -1]


def test_the_limit_classifier_against_loops():
    X, Z = sphere(7, 4, 0), sphere(5, 4, 1)
    y = torch.tensor([3, 5, 3, 9, 5, 9, 9])
    model = S.SingularKernelClassifier(dimension=3).fit(X, y)
    w = [0, 2**-1.5, 1 - 2**-0.5, 2**-1.5]
    c = [[decimal_limit(float(x @ z), w, 120) for x in X] for z in Z]
    votes = [[sum(ci for ci, yi in zip(row, y.tolist(), strict=True) if yi == k) / sum(row) for k in (3, 5, 9)] for row in c]  # fmt: skip
    torch.testing.assert_close(model.decision_function(Z), torch.tensor(votes, dtype=D), rtol=1e-9, atol=0)
    assert model.classes_.tolist() == [3, 5, 9]
    assert model.predict(Z).tolist() == [(3, 5, 9)[np.argmax(row)] for row in votes]
    assert torch.equal(model.predict(X), y)  # it interpolates


@given(seeds, st.sampled_from(["ntk", "nngp"]))
@few
def test_the_deep_classifier_is_kernel_regression(seed, kernel):
    X, Z = sphere(8, 4, seed), sphere(5, 4, seed + 1)
    y = torch.randint(3, (8,), generator=torch.Generator().manual_seed(seed))
    dual = Dual.erf()
    model = S.DeepKernelClassifier(dual, 6, kernel).fit(X, y)
    function = S.ntk_kernel if kernel == "ntk" else S.nngp_kernel
    weights = torch.linalg.solve(function(X, X, dual=dual, depth=6), torch.eye(8, dtype=D)[:, :])
    scores = function(Z, X, dual=dual, depth=6) @ weights @ torch.nn.functional.one_hot(y).double()[:, y.unique()]
    found = model.decision_function(Z)
    torch.testing.assert_close(
        torch.nn.functional.normalize(found), torch.nn.functional.normalize(scores), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(model.predict(X), y)


def test_low_rank_needs_the_pseudo_inverse():
    X, y, Z, z = data()
    dual = Dual.optimal(2)
    matrix = S.ntk_kernel(X, X, dual=dual, depth=1)
    assert torch.linalg.matrix_rank(matrix, hermitian=True, rtol=1e-12) == 10
    shallow = S.DeepKernelClassifier(dual, 1).fit(X, y)
    assert agreement(shallow.predict(Z), z) > 0.9
    solve = torch.linalg.lstsq(matrix, y.double()[:, None], driver="gelsd", rcond=1e-12).solution[:, 0]
    kernel = S.ntk_kernel(Z, X, dual=dual, depth=1)
    minus, plus = shallow.decision_function(Z).T
    torch.testing.assert_close((plus - minus) * kernel.sum(1), kernel @ solve * 3, rtol=1e-8, atol=1e-8)
    middle = S.DeepKernelClassifier(dual, 5, "nngp").fit(X, y)  # nearly singular, and fits the labels all the same
    assert agreement(middle.predict(X), y) > 0.992


def test_the_cutoff_of_the_pseudo_inverse():
    """Two points at gap u, no layer: the smaller eigenvalue is u / 2 of the larger one, kept at 5e-11, left out at 5e-14."""
    y = torch.tensor([1, -1])
    for u, fits in ((1e-10, True), (1e-13, False)):
        X = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, math.sqrt(2 * u)]], dtype=D))
        scores = S.DeepKernelClassifier(Dual.optimal(1), 0, "nngp").fit(X, y).decision_function(X)
        differ = (scores[:, 0] - scores[:, 1]).abs()
        assert ((differ > 0.4) if fits else (differ < 1e-6)).all()


def test_ties_and_what_nothing_is_near():
    X, y = angles(0, 90), torch.tensor([1, -1])
    assert S.SingularKernelClassifier(dimension=1).fit(X, y).predict(angles(45)).tolist() == [1]
    assert S.SingularKernelClassifier(dimension=1).fit(X, -y).predict(angles(45)).tolist() == [1]
    X = torch.eye(3, dtype=D)[:2]
    far = S.SingularKernelClassifier(dimension=2).fit(X, y)
    assert far.decision_function(torch.eye(3, dtype=D)[2:]).tolist() == [[0.5, 0.5]]
    half = torch.tensor([[1.0, 0.0, 1.0]], dtype=D) / math.sqrt(
        2
    )  # at right angles to one of the two: no vote from there
    assert far.decision_function(half).tolist() == [[0.0, 1.0]]
    for kernel in ("ntk", "nngp"):
        deep = S.DeepKernelClassifier(NEAREST, 3, kernel).fit(X, y)
        assert deep.predict(torch.eye(3, dtype=D)[2:]).tolist() == [1]
        assert torch.isfinite(deep.decision_function(torch.eye(3, dtype=D)[2:])).all()


def test_coinciding_training_points():
    X = angles(20, 20, 70)
    y = torch.tensor([1, -1, -1])
    limit = S.SingularKernelClassifier(dimension=1).fit(X, y)
    assert limit.decision_function(angles(20)).tolist() == [[0.5, 0.5]]
    assert S.hilbert_weights(X, angles(20), exponent=1.0).flatten().tolist() == [0.5, 0.5, 0]
    for kernel in ("ntk", "nngp"):
        with pytest.raises(ValueError, match="singular"):
            S.DeepKernelClassifier(Dual.optimal(1), 3, kernel).fit(X, y)
    same = S.DeepKernelClassifier(Dual.optimal(1), 3).fit(X, torch.tensor([1, 1, -1]))
    assert same.predict(X).tolist() == [1, 1, -1]


def test_float32_and_other_layouts():
    X, y, Z, _z = data(n=60, tests=100)
    for make in (lambda: S.SingularKernelClassifier(2), lambda: S.DeepKernelClassifier(Dual.erf(), 12)):
        wide = make().fit(X, y).predict(Z)
        assert agreement(make().fit(X.float(), y).predict(Z.float()), wide) > 0.97
        strided = torch.stack([Z, Z], 2)[..., 0]
        assert not strided.is_contiguous() and torch.equal(make().fit(X, y).predict(strided), wide)
        assert make().fit(X, y).predict(Z[:1]).shape == (1,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    X, y, Z, _z = data(n=60, tests=100)
    for make in (lambda: S.SingularKernelClassifier(2), lambda: S.DeepKernelClassifier(Dual.erf(), 12)):
        here, there = make().fit(X, y), make().fit(X.cuda(), y.cuda())
        torch.testing.assert_close(there.decision_function(Z.cuda()).cpu(), here.decision_function(Z), rtol=1e-5, atol=1e-6)  # fmt: skip


# --- the paper's data -------------------------------------------------------------------------------------------------


def test_dirichlet_data():
    X, y = S.dirichlet_sphere(20_000, **DIRICHLET, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(X.norm(dim=1), torch.ones(20_000, dtype=D))
    assert (X >= 0).all() and (y == 1).double().mean().item() == pytest.approx(0.4, abs=0.015)
    s = X / X.sum(1, keepdim=True)
    for label, alpha in ((1, DIRICHLET["alpha_pos"]), (-1, DIRICHLET["alpha_neg"])):
        mean = torch.tensor(alpha, dtype=D) / sum(alpha)
        torch.testing.assert_close(s[y == label].mean(0), mean, rtol=0, atol=0.01)
    again = S.dirichlet_sphere(20_000, **DIRICHLET, generator=torch.Generator().manual_seed(0))
    assert torch.equal(X, again[0]) and torch.equal(y, again[1])


def test_the_bayes_rule_against_densities():
    from scipy.stats import dirichlet

    pair, prior = dict(alpha_pos=[3.0, 1.0, 2.0], alpha_neg=[1.0, 2.0, 2.5]), 0.3
    X = sphere(200, 3, 0)
    s = (X / X.sum(1, keepdim=True)).numpy()
    s /= s.sum(1, keepdims=True)
    ratio = [prior * dirichlet.pdf(p, pair["alpha_pos"]) / ((1 - prior) * dirichlet.pdf(p, pair["alpha_neg"])) for p in s]  # fmt: skip
    found = S.dirichlet_bayes_predict(X, **pair, prior=prior)
    assert found.tolist() == [1 if r >= 1 else -1 for r in ratio] and len(found.unique()) == 2
    corner = torch.eye(3, dtype=D)
    assert S.dirichlet_bayes_predict(corner[[0, 2]], **DIRICHLET).tolist() == [-1, 1]


def test_no_rule_beats_bayes():
    X, y, Z, z = data(n=300, tests=20_000, seed=3)
    best = S.dirichlet_bayes_predict(Z, **DIRICHLET)
    assert agreement(best, z) == pytest.approx(0.9475, abs=0.006)
    for model in (S.SingularKernelClassifier(2), S.DeepKernelClassifier(Dual.optimal(2), 1)):
        assert agreement(model.fit(X, y).predict(Z[:3000]), z[:3000]) < agreement(best[:3000], z[:3000])


# --- bad input --------------------------------------------------------------------------------------------------------

X0, Y0, OPTIMAL = sphere(4, 3, 0), torch.tensor([1, -1, 1, 1]), Dual.optimal(2)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: Dual.hermite([0.5, 0.4]), "squared_coefficients"),
        (lambda: Dual.hermite([1.5, -0.5]), "squared_coefficients"),
        (lambda: Dual.hermite([1.0, 0.0]), "constant"),
        (lambda: Dual.hermite([math.nan, 1.0]), "squared_coefficients"),
        (lambda: Dual.optimal(0), "dimension"),
        (lambda: Dual.sine(0.0), "s must"),
        (lambda: Dual.sine(1000.0), "s must"),
        (lambda: Dual.from_activation(torch.log), "fn"),
        (lambda: Dual.from_activation(torch.ones_like), "fn"),
        (lambda: Dual.from_activation(torch.tanh, degree=0), "degree"),
        (lambda: Dual.from_activation(torch.tanh, degree=200), "degree"),
        (lambda: Dual.optimal(2001), "dimension"),
        (lambda: S.activation("tanh"), "name"),
        (lambda: S.activation(0), "dimension"),
        (lambda: OPTIMAL(torch.tensor([1.1])), "xi"),
        (lambda: OPTIMAL.derivative(torch.tensor([-0.1])), "xi"),
        (lambda: OPTIMAL.log_ratio(torch.tensor([0.1])), "log_xi"),
        (lambda: S.nngp_kernel(X0 * 1.01, X0, dual=OPTIMAL, depth=1), "X1 must have rows of norm 1"),
        (lambda: S.ntk_kernel(X0, 2 * X0, dual=OPTIMAL, depth=1), "X2"),
        (lambda: S.ntk_kernel(X0, -X0, dual=OPTIMAL, depth=1), "non-negative cosines"),
        (lambda: S.ntk_kernel(X0, X0[:, :2] / X0[:, :2].norm(dim=1, keepdim=True), dual=OPTIMAL, depth=1), "columns"),
        (lambda: S.ntk_kernel(X0 * math.nan, X0, dual=OPTIMAL, depth=1), "X1"),
        (lambda: S.ntk_kernel(X0[0], X0, dual=OPTIMAL, depth=1), "X1"),
        (lambda: S.nngp_kernel(X0[:0], X0, dual=OPTIMAL, depth=1), "X1"),
        (lambda: S.nngp_kernel(X0, X0, dual=OPTIMAL, depth=-1), "depth"),
        (lambda: S.limit_kernel(torch.tensor(-0.1), dual=OPTIMAL), "xi"),
        (lambda: S.limit_kernel(torch.tensor(0.1), dual=NEAREST), "nearest"),
        (lambda: S.hilbert_weights(X0, X0, exponent=0.0), "exponent"),
        (lambda: S.hilbert_weights(X0, X0[:, :2], exponent=1.0), "X_test"),
        (lambda: S.hilbert_weights(X0 * math.inf, X0, exponent=1.0), "X_train"),
        (lambda: S.SingularKernelClassifier(), "dimension and dual"),
        (lambda: S.SingularKernelClassifier(2, OPTIMAL), "dimension and dual"),
        (lambda: S.SingularKernelClassifier(dual=MAJORITY), "majority"),
        (lambda: S.SingularKernelClassifier(2).fit(X0, Y0[:3]), "y must"),
        (lambda: S.SingularKernelClassifier(2).fit(2 * X0, Y0), "X must"),
        (lambda: S.DeepKernelClassifier(OPTIMAL, 1).fit(torch.cat([X0, -X0]), Y0.repeat(2)), "^X must have non-negative"),
        *[
            (lambda model=model, Z=Z: model.fit(X0, Y0).predict(Z), name)
            for model in (S.SingularKernelClassifier(2), S.DeepKernelClassifier(OPTIMAL, 1))
            for Z, name in (
                (torch.eye(2), "^X must have 3 columns"),
                (2 * X0, "^X must have rows of norm 1"),
                (-X0, "^X of fit and X must have non-negative"),
                (X0[:0], "^X must not be empty"),
            )
        ],
        (lambda: S.DeepKernelClassifier(OPTIMAL, -1), "depth"),
        (lambda: S.DeepKernelClassifier(OPTIMAL, 1, "rbf"), "kernel"),
        (lambda: S.dirichlet_sphere(0, **DIRICHLET), "n must"),
        (lambda: S.dirichlet_sphere(3, alpha_pos=[1, 2], alpha_neg=[1, 2, 3]), "alpha_neg"),
        (lambda: S.dirichlet_sphere(3, alpha_pos=[1, 0], alpha_neg=[1, 2]), "alpha_pos"),
        (lambda: S.dirichlet_sphere(3, **DIRICHLET, prior=1.0), "prior"),
        (lambda: S.dirichlet_bayes_predict(X0[:, :2] / X0[:, :2].norm(dim=1, keepdim=True), **DIRICHLET), "columns"),
        (lambda: S.dirichlet_bayes_predict(-X0, **DIRICHLET), "negative entry"),
    ],
)  # fmt: skip
def test_bad_values_name_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: Dual.optimal(2.5), "dimension"),
        (lambda: Dual.hermite(None), "squared_coefficients"),
        (lambda: Dual.hermite(["a", "b"]), "squared_coefficients"),
        (lambda: S.DeepKernelClassifier(OPTIMAL, 1).fit(X0, Y0).predict([1.0]), "^X must be a tensor"),
        (lambda: Dual.from_activation(lambda x: 1.0), "fn"),
        (lambda: S.activation(2.0), "dimension"),
        (lambda: OPTIMAL(0.5), "xi"),
        (lambda: S.nngp_kernel(X0, X0, dual=2, depth=1), "dual"),
        (lambda: S.ntk_kernel(X0.long(), X0, dual=OPTIMAL, depth=1), "X1"),
        (lambda: S.ntk_kernel(X0, X0, dual=OPTIMAL, depth=1.0), "depth"),
        (lambda: S.limit_type("erf"), "dual"),
        (lambda: S.limit_kernel(0.5, dual=OPTIMAL), "xi"),
        (lambda: S.hilbert_weights(X0, X0, exponent="2"), "exponent"),
        (lambda: S.SingularKernelClassifier(2).fit(X0, Y0.double()), "y"),
        (lambda: S.SingularKernelClassifier(dual="erf"), "dual"),
        (lambda: S.DeepKernelClassifier("erf", 1), "dual"),
        (lambda: S.dirichlet_sphere(3.0, **DIRICHLET), "n must"),
    ],
)
def test_bad_types_name_the_argument(call, name):
    with pytest.raises(TypeError, match=name):
        call()


@pytest.mark.parametrize("model", [S.SingularKernelClassifier(2), S.DeepKernelClassifier(OPTIMAL, 1)])
def test_not_ready(model):
    with pytest.raises(RuntimeError, match="fit"):
        model.predict(X0)
