r"""Infinitely wide and deep networks as classifiers: their kernels, the three limits, and the singular kernel that is optimal.

The method of *Wide and Deep Neural Networks Achieve Optimality for Classification* (Radhakrishnan, Belkin and Uhler, PNAS 2023, arXiv 2204.14126):
the kernels of infinitely wide networks by recursion over the layers, the limit of their classifiers as the depth grows (nearest neighbour, majority vote or
singular kernel, decided by three moments of the activation), the activations whose limit is the Hilbert estimate, and the paper's simulated data.
Equation labels are those of the chapter ``classification/singular_kernel``.

Notation: inputs are unit vectors in :math:`\mathbb R^{d+1}` with non-negative cosines, ``dimension`` is :math:`d`, the dimension of the *sphere*; ``xi`` is the cosine
:math:`\xi=x^\top x'`, and :math:`u=1-\xi=\frac12\|x-x'\|^2`; ``dual`` is :math:`\check\phi`, with :math:`a=\check\phi'(0)` and :math:`b=\check\phi'(1)`. Computed in float64.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lossbook import _checks

# ---------------------------------------------------------------------------------------------------------------------
# Activations and their duals
# ---------------------------------------------------------------------------------------------------------------------


def _polynomial(coefficients: Tensor, x: Tensor) -> Tensor:
    """Value of a polynomial by Horner's rule; non-negative coefficients and arguments keep all digits."""
    first, *rest = coefficients.flip(0).to(x).unbind()
    total = first.expand_as(x)
    for c in rest:
        total = torch.addcmul(c, total, x)
    return total


def _without_zero(quotient: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An even function f(x)/x with a finite value at zero, without zero over zero."""
    return lambda x: quotient(x.clamp(min=1e-9))


class DualActivation:
    r"""Dual :math:`\check\phi(\xi)=\mathbb E[\phi(z)\phi(z')]=\sum_kc_k^2\xi^k` of an activation, for standard normals of correlation :math:`\xi` (eq-singular_kernel-dual).

    Made by :meth:`hermite`, :meth:`optimal`, :meth:`sine`, :meth:`erf`, :meth:`relu` or :meth:`from_activation`; all are normalized,
    :math:`\check\phi(1)=1`. Functions of ``xi`` take a float64 tensor of any shape with values in [0, 1].

    Args:
        value: :math:`\check\phi(\xi)`.
        derivative: :math:`\check\phi'(\xi)`, the dual of :math:`\phi'`.
        gap: :math:`F(u)=1-\check\phi(1-u)`, which keeps its digits for small u.
        reduced: :math:`\check\phi(\xi)/\xi^k`, with k the lowest degree.
        lowest_degree: k, the least degree with :math:`c_k\ne0`.

    Attributes:
        at_zero: :math:`\check\phi(0)=A^2`, a float.
        slope_at_zero: :math:`\check\phi'(0)=a=A'^2`.
        slope_at_one: :math:`\check\phi'(1)=b=B'`.

    Source: Radhakrishnan et al., section on dual activations; Daniely, Frostig and Singer 2016.

    Example:
        >>> dual = DualActivation.hermite([0.0, 0.5, 0.0, 0.5])
        >>> dual(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist()
        [0.0, 0.3125, 1.0]
        >>> dual.at_zero, dual.slope_at_zero, dual.slope_at_one
        (0.0, 0.5, 2.0)
    """

    def __init__(self, value: Callable, derivative: Callable, gap: Callable, reduced: Callable, lowest_degree: int):
        self._value, self._derivative, self.gap, self.reduced = value, derivative, gap, reduced
        self.lowest_degree = lowest_degree
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        self.at_zero = float(value(ends)[0])
        self.slope_at_zero, self.slope_at_one = derivative(ends).tolist()

    def __call__(self, xi: Tensor) -> Tensor:
        r""":math:`\check\phi(\xi)`, the shape of ``xi``."""
        return self._value(_cosines(xi))

    def derivative(self, xi: Tensor) -> Tensor:
        r""":math:`\check\phi'(\xi)`, the shape of ``xi``."""
        return self._derivative(_cosines(xi))

    def log_ratio(self, log_xi: Tensor) -> Tensor:
        r""":math:`\log\check\phi(e^t)-t`, also where :math:`e^t` underflows; ``log_xi`` is t, at most 0."""
        _checks.floating("log_xi", log_xi)
        if _checks.known_false(log_xi <= 0):
            raise ValueError(f"log_xi must be at most 0, got {log_xi.max()}")
        rest = self.reduced(log_xi.double().exp()).log()
        return rest if self.lowest_degree == 1 else (self.lowest_degree - 1) * log_xi.double() + rest

    def step(self, xi: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The next layer's ``xi`` and ``u``; a small u is not formed from xi."""
        new = self.gap(u)
        return torch.where(new < 0.5, 1 - new, self._value(xi)), new

    @classmethod
    def hermite(cls, squared_coefficients: Sequence[float]) -> "DualActivation":
        r"""The polynomial :math:`\sum_kc_k^2\xi^k`, from :math:`c_0^2,c_1^2,\dots`: non-negative numbers that add up to 1 within 1e-9.

        Raises:
            TypeError, ValueError: for anything else.
        """
        try:
            w = torch.as_tensor(squared_coefficients, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"squared_coefficients must be numbers, got {squared_coefficients!r}") from error
        if w.ndim != 1 or len(w) < 2 or not bool((w >= 0).all()) or not abs(float(w.sum()) - 1) < 1e-9:
            raise ValueError(
                f"squared_coefficients must be 2 or more numbers >= 0 with sum 1, got {squared_coefficients}"
            )
        low = int(w.nonzero()[0])
        if low == len(w) - 1 == 0 or float(w[0]) == 1:
            raise ValueError("squared_coefficients must not be those of a constant, got 1 at degree 0")
        slopes = w[1:] * torch.arange(1, len(w), dtype=torch.float64)
        # 1 - xi^k = u (1 + xi + ... + xi^(k-1)): no difference is left.
        tails = w.flip(0).cumsum(0).flip(0)[1:]
        return cls(
            lambda xi: _polynomial(w, xi),
            lambda xi: _polynomial(slopes, xi),
            lambda u: u * _polynomial(tails, 1 - u),
            lambda xi: _polynomial(w[low:], xi),
            low,
        )

    @classmethod
    def optimal(cls, dimension: int) -> "DualActivation":
        r"""The dual whose limit is singular of order exactly ``dimension`` (eq-singular_kernel-optimal), that of ``activation(dimension)``; up to 2000."""
        return cls.hermite(_optimal_squares(dimension))

    @classmethod
    def sine(cls, s: float) -> "DualActivation":
        r""":math:`\sinh(s\xi)/\sinh s`, the dual of :math:`\phi\propto\sin(\sqrt s\,x)`; s in (0, 300]."""
        s = _checks.positive_number("s", s)
        if s > 300:
            raise ValueError(f"s must be at most 300, got {s}")
        scale = math.sinh(s)
        return cls(
            lambda xi: torch.sinh(s * xi) / scale,
            lambda xi: s * torch.cosh(s * xi) / scale,
            lambda u: 2 * torch.cosh(s - s * u / 2) * torch.sinh(s * u / 2) / scale,
            _without_zero(lambda xi: torch.sinh(s * xi) / (xi * scale)),
            1,
        )

    @classmethod
    def erf(cls) -> "DualActivation":
        r""":math:`\arcsin\frac{2\xi}3/\arcsin\frac23` (eq-singular_kernel-arcsine), the dual of the error function."""
        scale, root = math.asin(2 / 3), math.sqrt(5) / 3

        def gap(u):  # arcsin p - arcsin q, with p - q = 2u/3 and p + q = 2(2 - u)/3
            q = 2 * (1 - u) / 3
            return torch.asin(4 * u * (2 - u) / 9 / (2 / 3 * torch.sqrt(1 - q * q) + q * root)) / scale

        return cls(
            lambda xi: torch.asin(2 * xi / 3) / scale,
            lambda xi: 2 / (scale * torch.sqrt(9 - 4 * xi * xi)),
            gap,
            _without_zero(lambda xi: torch.asin(2 * xi / 3) / (xi * scale)),
            1,
        )

    @classmethod
    def relu(cls) -> "DualActivation":
        r"""The arc-cosine kernel :math:`\frac1\pi[\xi(\pi-\theta)+\sin\theta]`, :math:`\theta=\arccos\xi` (eq-singular_kernel-arccosine), the dual of :math:`\sqrt2\max(0,x)`."""

        def value(xi):
            return (xi * (math.pi - torch.acos(xi)) + torch.sqrt((1 - xi) * (1 + xi))) / math.pi

        def gap(u):
            angle = 2 * torch.asin(torch.sqrt(u / 2))
            square = angle * angle  # the series of angle * cos(angle) - sin(angle) where the difference has no digits
            series = -angle * square * (1 / 3 - square / 30 * (1 - square / 28))
            rest = torch.where(angle < 0.05, series, angle * torch.cos(angle) - torch.sin(angle))
            return u + rest / math.pi

        return cls(value, lambda xi: 1 - torch.acos(xi) / math.pi, gap, value, 0)

    @classmethod
    def from_activation(cls, fn: Callable[[Tensor], Tensor], degree: int = 32) -> "DualActivation":
        r"""The dual of an elementwise ``fn``, from its first Hermite coefficients (200 quadrature nodes, then normalized).

        For smooth functions only: a kink has a heavy tail of coefficients that is cut here (ReLU's b comes out as 0.949 and not 1).

        Raises:
            TypeError, ValueError: if ``fn`` gives no finite tensor of its input's shape, or is constant up to ``degree``.
        """
        degree = _checks.positive_int("degree", degree)
        if degree > 199:
            raise ValueError(f"degree must be at most 199, for 200 quadrature nodes, got {degree}")
        nodes, weights = np.polynomial.hermite_e.hermegauss(200)
        z, weights = torch.as_tensor(nodes), torch.as_tensor(weights / math.sqrt(2 * math.pi))
        values = fn(z)
        if not isinstance(values, Tensor) or values.shape != z.shape:
            raise TypeError("fn must map a tensor to a tensor of the same shape")
        if not bool(torch.isfinite(values).all()):
            raise ValueError("fn must be finite on [-28, 28], got NaN or infinity")
        before, now, squares = torch.zeros_like(z), torch.ones_like(z), []
        for k in range(degree + 1):
            squares.append(float((weights * values * now).sum()) ** 2)
            before, now = now, (z * now - math.sqrt(k) * before) / math.sqrt(k + 1)
        squares = torch.tensor(squares, dtype=torch.float64)
        squares[squares < 1e-20 * squares.sum()] = 0.0  # rounding is no degree
        if not float(squares[1:].sum()) > 0:
            raise ValueError(f"fn must not be constant or zero, got no Hermite coefficient of degree 1 to {degree}")
        return cls.hermite(squares / squares.sum())


def _optimal_squares(dimension: int) -> list[float]:
    """Squared Hermite coefficients of the optimal activation."""
    dimension = _checks.positive_int("dimension", dimension)
    if dimension > 2000:
        raise ValueError(f"dimension must be at most 2000, where 2^(-d/2) is still a normal number, got {dimension}")
    if dimension == 1:  # the general form has a negative square here
        return [0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5]
    a = 2 ** (-dimension / 2)
    return [0.0, a, 1 - 2 * a, a]


def activation(name: str | int) -> Callable[[Tensor], Tensor]:
    r"""The activation :math:`\phi` itself, elementwise and with :math:`\mathbb E\phi(z)^2=1`, for networks of finite width (eq-singular_kernel-optimal).

    Args:
        name: a dimension d of the sphere for the optimal activation, or "erf", "sine" (:math:`\propto\sin x`) or "relu".

    Returns:
        A function from a floating-point tensor to one of its shape and dtype.

    Raises:
        TypeError, ValueError: for another name, or a dimension that is not in 1 to 2000.

    Source: Radhakrishnan et al., the activations that achieve optimality, and the official code (d = 1).

    Example:
        >>> activation(2)(torch.tensor([0.0, 1.0, 2.0]))
        tensor([0.0000, 0.1298, 1.9916])
    """
    known = {
        "erf": lambda x: torch.erf(x) / math.sqrt(2 / math.pi * math.asin(2 / 3)),
        "sine": lambda x: torch.sin(x) / math.sqrt(-math.expm1(-2) / 2),
        "relu": lambda x: math.sqrt(2) * torch.relu(x),
    }
    if isinstance(name, str):
        if name not in known:
            raise ValueError(f"name must be a dimension or one of {', '.join(known)}, got {name!r}")
        return known[name]
    coefficients = [math.sqrt(square) for square in _optimal_squares(name)]

    def optimal(x):
        total, before, now = torch.zeros_like(x), torch.zeros_like(x), torch.ones_like(x)
        for k, c in enumerate(coefficients):
            total = total + c * now
            before, now = now, (x * now - math.sqrt(k) * before) / math.sqrt(k + 1)
        return total

    return optimal


# ---------------------------------------------------------------------------------------------------------------------
# Kernels of wide networks
# ---------------------------------------------------------------------------------------------------------------------


def _cosines(xi: Tensor) -> Tensor:
    """Cosines in float64, if none is known to lie outside of [0, 1]."""
    _checks.floating("xi", xi)
    if _checks.known_false((xi >= 0) & (xi <= 1)):
        raise ValueError(f"xi must lie in [0, 1], got {xi.min()} to {xi.max()}")
    return xi.double()


def _is_dual(dual: DualActivation) -> DualActivation:
    if not isinstance(dual, DualActivation):
        raise TypeError(f"dual must be a DualActivation, got {type(dual).__name__}")
    return dual


def _unit_rows(name: str, X: Tensor) -> Tensor:
    """Rows in float64 and of norm 1 to the last digits, if they have norm 1 within 1e-5; a second time nothing changes."""
    X = _checks.finite(name, _checks.floating(name, X, 2)).double()
    norms = X.norm(dim=1, keepdim=True)
    if _checks.known_false((norms - 1).abs() < 1e-5):
        raise ValueError(f"{name} must have rows of norm 1, got norms {norms.min():.6g} to {norms.max():.6g}")
    # Rows of fit come here twice, and if the last digit changed, a deep kernel would take them for other points. A norm
    # of 1 up to rounding is set to 1; its gradient stays.
    return X / torch.where((norms - 1).abs() < 1e-14, norms - norms.detach() + 1, norms)


def _half_squares(name: str, X1: Tensor, X2: Tensor) -> Tensor:
    """Halved squared distances from differences: the expanded square has no digits for near points."""
    if X1.shape[1] != X2.shape[1]:
        raise ValueError(f"{name} must have {X1.shape[1]} columns, got {X2.shape[1]}")
    return torch.cdist(X1, X2, compute_mode="donot_use_mm_for_euclid_dist").square() / 2


def _pairs(name1: str, X1: Tensor, name2: str, X2: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and halved squared distances of all pairs."""
    X1, X2 = _unit_rows(name1, X1), _unit_rows(name2, X2)
    u = _half_squares(name2, X1, X2)
    xi = X1 @ X2.T
    if _checks.known_false(xi > -1e-6):
        names = name1 if name1 == name2 else f"{name1} and {name2}"
        raise ValueError(f"{names} must have non-negative cosines, got {xi.min():.6g}")
    return torch.where(u < 0.5, 1 - u, xi.clamp(min=0)), u.clamp(max=1)


def _log(xi: Tensor, u: Tensor) -> Tensor:
    return torch.where(u < 0.5, torch.log1p(-u), xi.log())


def _kernel(xi: Tensor, u: Tensor, dual: DualActivation, depth: int, tangent: bool) -> Tensor:
    """Sigma, or K with ``tangent``, by the recursion."""
    kernel = xi
    for _ in range(depth):
        slope = dual._derivative(xi) if tangent else 0.0
        xi, u = dual.step(xi, u)
        kernel = xi + kernel * slope
    return kernel


def _log_kernel(xi: Tensor, u: Tensor, dual: DualActivation, depth: int, tangent: bool) -> Tensor:
    """The logarithm, where the kernel itself may underflow or overflow.

    K / Sigma follows r <- 1 + m r, where m = xi dual'(xi) / dual(xi) is the mean degree of lem-singular_kernel-sandwich.
    """
    t, k = _log(xi, u), dual.lowest_degree
    log_r = torch.zeros_like(t)
    for _ in range(depth):
        reduced = dual.reduced(xi)
        if tangent:  # m by xi^(k-1), of dual' and of dual / xi; where that underflows m is k
            power = xi ** (k - 1)
            m = torch.where(power > 1e-250, dual._derivative(xi) / (reduced * power), float(k))
            log_r = torch.logaddexp(torch.zeros_like(t), log_r + m.log())
        t = k * t + reduced.log() if k else reduced.log()
        xi, u = dual.step(xi, u)
        t = torch.where(u < 0.5, torch.log1p(-u), t)
    return t + log_r


def nngp_kernel(X1: Tensor, X2: Tensor, *, dual: DualActivation, depth: int, log: bool = False) -> Tensor:
    r"""The kernel of the last layer's outputs, :math:`\Sigma^{(L)}=\check\phi^{\circ L}(\xi)` (eq-singular_kernel-recursion), or its logarithm.

    The logarithm is accurate where the kernel itself underflows, as it does fast when :math:`\check\phi'(0)=0`.

    Args:
        X1: shape ``(n1, d + 1)``, float32 or float64, rows of norm 1 within 1e-5 (half precision rounds more).
        X2: shape ``(n2, d + 1)``; no cosine with a row of X1 may be negative.
        dual: the activation's dual.
        depth: L, the number of hidden layers, at least 0.
        log: give :math:`\log\Sigma^{(L)}`.

    Returns:
        Shape ``(n1, n2)``, float64, in [0, 1]; its logarithm may be minus infinity.

    Raises:
        TypeError, ValueError: for a wrong type, shape, norm or cosine, naming the argument.

    Complexity: O(n1 n2 (d + Lp)) time with p the degree of a polynomial dual, and 1 for the others; O(n1 n2) memory.

    Source: Radhakrishnan et al., the NNGP and NTK recursions.

    Example:
        >>> X = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
        >>> nngp_kernel(X, X, dual=DualActivation.optimal(2), depth=2)[0]  # (0.408 + 0.408^3) / 2
        tensor([1.0000, 0.2380], dtype=torch.float64)
    """
    _is_dual(dual)
    depth = _checks.positive_int("depth", depth, minimum=0)
    xi, u = _pairs("X1", X1, "X2", X2)
    return (_log_kernel if log else _kernel)(xi, u, dual, depth, tangent=False)


def ntk_kernel(X1: Tensor, X2: Tensor, *, dual: DualActivation, depth: int, log: bool = False) -> Tensor:
    r"""The neural tangent kernel, :math:`K^{(l+1)}=\Sigma^{(l+1)}+K^{(l)}\check\phi'(\Sigma^{(l)})` from :math:`K^{(0)}=\xi` (eq-singular_kernel-recursion), or its logarithm.

    The logarithm is accurate where the kernel underflows or, for equal rows, overflows.

    Args:
        X1, X2, dual, depth: as in :func:`nngp_kernel`.
        log: give :math:`\log K^{(L)}`.

    Returns:
        Shape ``(n1, n2)``, float64; :math:`\sum_{l\le L}b^l` for equal rows.

    Raises:
        TypeError, ValueError: as :func:`nngp_kernel`.

    Complexity: O(n1 n2 (d + Lp)) time with p the degree of a polynomial dual, and 1 for the others; O(n1 n2) memory.

    Source: Radhakrishnan et al., the NNGP and NTK recursions; Jacot et al. 2018.

    Example:
        >>> X = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
        >>> ntk_kernel(X, X, dual=DualActivation.optimal(2), depth=1)[0]  # xi + 2 xi^3
        tensor([3.0000, 1.0320], dtype=torch.float64)
    """
    _is_dual(dual)
    depth = _checks.positive_int("depth", depth, minimum=0)
    xi, u = _pairs("X1", X1, "X2", X2)
    return (_log_kernel if log else _kernel)(xi, u, dual, depth, tangent=True)


# ---------------------------------------------------------------------------------------------------------------------
# The limits of depth
# ---------------------------------------------------------------------------------------------------------------------


def limit_type(dual: DualActivation) -> str:
    r"""Which classifier infinite depth leads to, from :math:`\check\phi(0)`, :math:`\check\phi'(0)` and :math:`\check\phi'(1)` (thm-singular_kernel-types).

    Args:
        dual: the activation's dual.

    Returns:
        "singular" if :math:`A=0\ne A'`; "nearest" if :math:`A=A'=0`; "majority" if :math:`A\ne0` and :math:`B'>1`; "undetermined" if
        :math:`B'\le1+10^{-9}`, where the moments alone do not decide: ReLU at :math:`B'=1` tends to the majority, slowly (prop-singular_kernel-boundary),
        sigmoid and softplus below 1 to no vote, and a linear activation stays as it is.

    Raises:
        TypeError: if ``dual`` is none.

    Source: Radhakrishnan et al., theorem on the taxonomy; the case :math:`B'\le1` is the chapter's.

    Example:
        >>> [limit_type(DualActivation.hermite(w)) for w in ([0, 0.5, 0.5], [0, 0, 1], [0.2, 0, 0.8], [0.5, 0.5])]
        ['singular', 'nearest', 'majority', 'undetermined']
    """
    _is_dual(dual)
    if dual.slope_at_one <= 1 + 1e-9:
        return "undetermined"
    if dual.at_zero > 0:
        return "majority"
    return "singular" if dual.slope_at_zero > 0 else "nearest"


def _is_singular(dual: DualActivation) -> DualActivation:
    if limit_type(dual) != "singular":
        raise ValueError(f"dual must be of limit type 'singular', got {limit_type(dual)!r}")
    return dual


def singularity_exponent(dual: DualActivation) -> float:
    r"""The order of the singularity, :math:`\alpha=-2\log\check\phi'(0)/\log\check\phi'(1)` (eq-singular_kernel-exponent).

    Args:
        dual: one of type "singular".

    Returns:
        :math:`\alpha>0`: the limit kernel is :math:`\|x-x'\|^{-\alpha}` up to a bounded factor.

    Raises:
        TypeError, ValueError: if ``dual`` is none, or of another type.

    Source: Radhakrishnan et al., theorem on the singular kernel.

    Example:
        >>> round(singularity_exponent(DualActivation.optimal(3)), 10), round(singularity_exponent(DualActivation.erf()), 4)
        (3.0, 0.8882)
    """
    _is_singular(dual)
    return -2 * math.log(dual.slope_at_zero) / math.log(dual.slope_at_one)


def _log_factors(xi: Tensor, u: Tensor, dual: DualActivation) -> Tensor:
    """log of c(xi) / xi: the logs of the factors dual(xi_l) / (a xi_l), layer by layer, and their tail in closed form."""
    a, parts = dual.slope_at_zero, []
    # On a CPU by pieces that stay in its cache through all layers.
    size = 2**14 if xi.device.type == "cpu" else max(1, xi.numel())
    for x, v in zip(xi.reshape(-1).split(size), u.reshape(-1).split(size), strict=True):
        total, layer = torch.where(v > 0, 0.0, math.inf).to(x), 0
        # Reading a value stalls an accelerator: look at every eighth layer only.
        while layer % 8 or bool(((x > 1e-9 * a) & (v > 0)).any()):
            total = total + (dual.reduced(x).log() - math.log(a))
            x, v = dual.step(x, v)
            layer += 1
        # From here on x shrinks by a, and the log of a factor with it, up to (x / a)^2, which is below the last digit.
        parts.append(total + (dual.reduced(x).log() - math.log(a)) / (1 - a))
    return torch.cat(parts).reshape(xi.shape)


def limit_kernel(xi: Tensor, *, dual: DualActivation, log: bool = True) -> Tensor:
    r"""The kernel of infinite depth, :math:`c(\xi)=\lim_La^{-L}\check\phi^{\circ L}(\xi)` (eq-singular_kernel-koenigs), by default its logarithm.

    Solves :math:`c(\check\phi(\xi))=a\,c(\xi)` with :math:`c'(0)=1`. Summed in logs: the powers of a underflow where c does not.

    Args:
        xi: cosines in [0, 1], any shape, floating point.
        dual: one of type "singular".
        log: give :math:`\log c`.

    Returns:
        The shape of ``xi``, float64; infinite at 1, and :math:`c(0)=0`.

    Raises:
        TypeError, ValueError: for a wrong type, value or dual, naming the argument.

    Complexity: about :math:`\log\frac1{1-\xi}/\log b-20/\log a` layers, each O(1) time for an element: a dual close to linear takes long, :math:`2\cdot10^4` layers
    at :math:`a=0.999`. How many is read off the values, so that ``torch.compile`` and ``vmap`` do not apply; gradients do.

    Source: Radhakrishnan et al., theorem on the singular kernel; Koenigs 1884.

    Example:
        >>> limit_kernel(torch.tensor([0.3, 0.9], dtype=torch.float64), dual=DualActivation.optimal(4), log=False)
        tensor([  0.7170, 128.4959], dtype=torch.float64)
    """
    _is_singular(dual)
    xi = _cosines(xi)
    factors = _log_factors(xi, 1 - xi, dual)
    return _log(xi, 1 - xi) + factors if log else xi * factors.exp()


# ---------------------------------------------------------------------------------------------------------------------
# Classifiers
# ---------------------------------------------------------------------------------------------------------------------


def _votes(log_weights: Tensor, u: Tensor) -> Tensor:
    """Weights that add up to one in each column; points at distance zero take all, and equal weights where all are zero."""
    there = (u == 0).double()
    nothing = (log_weights == -math.inf).all(dim=0)
    log_weights = torch.where(there.bool() | nothing, 0.0, log_weights)
    return torch.where(there.any(dim=0), there / there.sum(dim=0).clamp(min=1), torch.softmax(log_weights, dim=0))


def hilbert_weights(X_train: Tensor, X_test: Tensor, *, exponent: float) -> Tensor:
    r"""Weights of the Hilbert estimate, :math:`\|x-x_i\|^{-\alpha}/\sum_j\|x-x_j\|^{-\alpha}` (eq-singular_kernel-hilbert).

    Args:
        X_train: shape ``(n, p)``, floating point, any points.
        X_test: shape ``(m, p)``.
        exponent: :math:`\alpha>0`; consistent at the dimension of the data.

    Returns:
        Shape ``(n, m)``, float64; each column adds up to 1. A test point that is a training point has all its weight there.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Complexity: O(nmp) time, O(nm) memory.

    Source: Devroye, Györfi and Krzyżak 1998; Radhakrishnan et al., discussion of the singular kernel.

    Example:
        >>> X = torch.tensor([[0.0], [1.0], [3.0]])
        >>> hilbert_weights(X, torch.tensor([[2.0], [3.0]]), exponent=1.0).T.tolist()
        [[0.2, 0.4, 0.4], [0.0, 0.0, 1.0]]
    """
    exponent = _checks.positive_number("exponent", exponent)
    X_train, X_test = (
        _checks.finite(name, _checks.floating(name, X, 2)).double()
        for name, X in (("X_train", X_train), ("X_test", X_test))
    )
    # Where squares of such numbers would overflow or underflow, all are scaled by one power of two.
    power = torch.frexp(torch.maximum(X_train.abs().max(), X_test.abs().max())).exponent.clamp(min=-1000)
    power = torch.where(power.abs() > 300, power, 0)
    u = _half_squares("X_test", torch.ldexp(X_train, -power), torch.ldexp(X_test, -power))
    return _votes(-exponent / 2 * u.log(), u)


class _Votes:
    """What the two classifiers share: labels as one-hot rows, and a prediction as the class with the largest score."""

    def _remember(self, X: Tensor, y: Tensor) -> Tensor:
        X = _unit_rows("X", X)
        _checks.integer("y", y, 1)
        if len(y) != len(X):
            raise ValueError(f"y must have shape ({len(X)},), one for each row, got {tuple(y.shape)}")
        self.classes_, self._index = torch.unique(y, return_inverse=True)
        self.X_ = X
        return torch.nn.functional.one_hot(self._index, len(self.classes_)).double()

    def _fitted(self):
        if not hasattr(self, "X_"):
            raise RuntimeError("the model is not fitted: call fit first")
        return self

    def predict(self, X: Tensor) -> Tensor:
        """The class with the largest score, int64, shape ``(m,)``; of equal scores the largest label, +1 of -1 and +1."""
        scores = self.decision_function(X)
        return self.classes_[len(self.classes_) - 1 - scores.flip(1).argmax(dim=1)]


class SingularKernelClassifier(_Votes):
    r"""The classifier of infinite depth, :math:`\mathrm{sign}\sum_iy_i\,c(x^\top x_i)` (eq-singular_kernel-classifier): a vote without a solve.

    It interpolates: a training point gets its own label, shared equally among coinciding ones.

    Args:
        dimension: d of the sphere, for the optimal activation; or
        dual: one of type "singular". Give one of the two.

    Attributes:
        classes_: the labels in increasing order, shape ``(K,)``.
        X_: training inputs in float64, shape ``(n, d + 1)``.

    Raises:
        TypeError, ValueError: for none or both of the two, or another type of dual.

    Complexity: O(nm(d + L)) time, with L layers as in :func:`limit_kernel`, and O(nm) memory to predict m points.

    Source: Radhakrishnan et al., theorem on the singular kernel and corollary on optimality.

    Example:
        >>> X = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, 1.0], [0.1, 1.0]]))
        >>> SingularKernelClassifier(dimension=1).fit(X, torch.tensor([1, -1, 1])).predict(X)
        tensor([ 1, -1,  1])
    """

    def __init__(self, dimension: int | None = None, dual: DualActivation | None = None):
        if (dimension is None) == (dual is None):
            raise ValueError(f"give one of dimension and dual, got dimension={dimension!r}, dual={dual!r}")
        self.dual = DualActivation.optimal(dimension) if dual is None else _is_singular(dual)

    def fit(self, X: Tensor, y: Tensor) -> "SingularKernelClassifier":
        """Remember unit rows ``(n, d + 1)`` and int64 labels ``(n,)``; raises TypeError, ValueError."""
        self._one_hot = self._remember(X, y)
        return self

    def decision_function(self, X: Tensor) -> Tensor:
        """Each class's share of the weights, shape ``(m, K)``; rows add up to 1. Raises RuntimeError before fitting, TypeError, ValueError."""
        xi, u = _pairs("X of fit", self._fitted().X_, "X", X)
        return _votes(_log(xi, u) + _log_factors(xi, u, self.dual), u).T @ self._one_hot


class DeepKernelClassifier(_Votes):
    r"""Ridgeless kernel regression on one-hot labels with a kernel of finite depth (eq-singular_kernel-regression): the infinitely wide network, trained.

    The kernel matrix is inverted as a pseudo-inverse with relative cutoff 1e-12: at small depth a polynomial dual gives a matrix of low rank.

    Args:
        dual: the activation's dual.
        depth: L, at least 0.
        kernel: "ntk" (all layers trained) or "nngp" (the last one only).

    Attributes:
        classes_: the labels in increasing order, shape ``(K,)``.
        X_: training inputs in float64, shape ``(n, d + 1)``.
        coefficients_: shape ``(n, K)``.

    Raises:
        TypeError, ValueError: for a wrong dual, depth or kernel.

    Complexity: O(n^2(d + L) + n^3) time and O(n^2) memory to fit; O(nm(d + L)) to predict m points.

    Source: Radhakrishnan et al., the setting; Jacot et al. 2018.

    Example:
        >>> X = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, 1.0], [0.1, 1.0]]))
        >>> DeepKernelClassifier(DualActivation.optimal(1), depth=5).fit(X, torch.tensor([1, -1, 1])).predict(X)
        tensor([ 1, -1,  1])
    """

    def __init__(self, dual: DualActivation, depth: int, kernel: str = "ntk"):
        self.dual, self.depth = _is_dual(dual), _checks.positive_int("depth", depth, minimum=0)
        if kernel not in ("ntk", "nngp"):
            raise ValueError(f"kernel must be 'ntk' or 'nngp', got {kernel!r}")
        self.kernel = kernel

    def fit(self, X: Tensor, y: Tensor) -> "DeepKernelClassifier":
        """Fit to unit rows ``(n, d + 1)`` and int64 labels ``(n,)``; raises TypeError, and ValueError also for equal rows with different labels."""
        one_hot = self._remember(X, y)
        xi, u = _pairs("X", self.X_, "X", self.X_)
        if bool(((u == 0) & (self._index[:, None] != self._index)).any()):
            raise ValueError("X must not have equal rows with different labels: the kernel matrix is singular")
        tangent = self.kernel == "ntk"
        matrix = _kernel(xi, u, self.dual, self.depth, tangent)
        # The diagonal is the same for all points: without it the entries lie in [0, 1].
        matrix = matrix / matrix[0, 0]
        if not bool(torch.isfinite(matrix).all()):  # the diagonal of a deep tangent kernel overflows
            logs = _log_kernel(xi, u, self.dual, self.depth, tangent)
            matrix = (logs - logs[0, 0]).exp()
        self.coefficients_ = torch.linalg.pinv(matrix, rtol=1e-12, hermitian=True) @ one_hot
        return self

    def decision_function(self, X: Tensor) -> Tensor:
        """Scores ``(m, K)``, each row up to a positive factor: the kernel, which may be tiny, is divided by its sum over the training points.

        Raises RuntimeError before fitting, TypeError, ValueError (also for a depth at which even the kernel's logarithm overflows).
        """
        xi, u = _pairs("X of fit", self._fitted().X_, "X", X)
        logs = _log_kernel(xi, u, self.dual, self.depth, self.kernel == "ntk")
        if bool(((logs < -1e299) & (xi > 0)).any()):
            raise ValueError(f"depth must be small enough for the kernel's logarithm to be finite, got {self.depth}")
        return torch.softmax(logs.nan_to_num(neginf=-1e300), dim=0).T @ self.coefficients_


# ---------------------------------------------------------------------------------------------------------------------
# The paper's data
# ---------------------------------------------------------------------------------------------------------------------


def _two_dirichlets(alpha_pos: Sequence[float], alpha_neg: Sequence[float], prior: float) -> tuple[Tensor, Tensor]:
    pair = [torch.as_tensor(alpha, dtype=torch.float64) for alpha in (alpha_pos, alpha_neg)]
    for name, alpha in zip(("alpha_pos", "alpha_neg"), pair, strict=True):
        if alpha.ndim != 1 or len(alpha) < 2 or not bool(((alpha > 0) & torch.isfinite(alpha)).all()):
            raise ValueError(f"{name} must be 2 or more finite numbers > 0, got {alpha.tolist()}")
    if len(pair[0]) != len(pair[1]):
        raise ValueError(f"alpha_neg must have {len(pair[0])} numbers, as alpha_pos, got {len(pair[1])}")
    if not 0 < _checks.positive_number("prior", prior) < 1:
        raise ValueError(f"prior must lie in (0, 1), got {prior}")
    return pair[0], pair[1]


def dirichlet_sphere(
    n: int,
    *,
    alpha_pos: Sequence[float],
    alpha_neg: Sequence[float],
    prior: float = 0.4,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Two Dirichlet classes on the simplex, mapped to the sphere by :math:`s\mapsto s/\|s\|_2`: the paper's simulated data.

    Args:
        n: number of points.
        alpha_pos, alpha_neg: parameters of the classes +1 and -1, d + 1 positive numbers each.
        prior: probability of class +1, in (0, 1).
        generator: source of randomness, on the CPU.

    Returns:
        ``X``, float64 of shape ``(n, d + 1)``, unit rows without negative entries, and ``y``, int64 of shape ``(n,)``, each -1 or +1.

    Raises:
        TypeError, ValueError: for a wrong number, naming the argument.

    Source: the official code of Radhakrishnan et al.

    Example:
        >>> X, y = dirichlet_sphere(5, alpha_pos=[1, 2], alpha_neg=[2, 1], generator=torch.Generator().manual_seed(0))
        >>> X.shape, X.square().sum(1).allclose(torch.ones(5, dtype=X.dtype))
        (torch.Size([5, 2]), True)
    """
    n = _checks.positive_int("n", n)
    alphas = _two_dirichlets(alpha_pos, alpha_neg, prior)
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    positive = rng.random(n) < prior
    s = np.where(positive[:, None], *(rng.dirichlet(alpha.numpy(), n) for alpha in alphas))
    return torch.nn.functional.normalize(torch.as_tensor(s)), torch.as_tensor(2 * positive.astype(np.int64) - 1)


def dirichlet_bayes_predict(
    X: Tensor, *, alpha_pos: Sequence[float], alpha_neg: Sequence[float], prior: float = 0.4
) -> Tensor:
    r"""The Bayes rule of :func:`dirichlet_sphere`: :math:`\pi p_+(s)` against :math:`(1-\pi)p_-(s)` at the simplex point :math:`s=x/\sum_ix_i`.

    The Jacobian of the map to the sphere is the same for both classes and cancels.

    Args:
        X: shape ``(m, d + 1)``, floating point, rows of norm 1 without negative entries.
        alpha_pos, alpha_neg, prior: as in :func:`dirichlet_sphere`.

    Returns:
        int64, shape ``(m,)``, each -1 or +1; +1 in a tie.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Source: the chapter; data from the official code of Radhakrishnan et al.

    Example:
        >>> X = torch.nn.functional.normalize(torch.tensor([[1.0, 3.0], [1.0, 1.4]]))
        >>> dirichlet_bayes_predict(X, alpha_pos=[1, 2], alpha_neg=[2, 1])  # +1 where 0.4 s_2 > 0.6 s_1
        tensor([ 1, -1])
    """
    alphas = _two_dirichlets(alpha_pos, alpha_neg, prior)
    X = _unit_rows("X", X)
    if X.shape[1] != len(alphas[0]):
        raise ValueError(f"X must have {len(alphas[0])} columns, one for each parameter, got {X.shape[1]}")
    if _checks.known_false(X >= 0):
        raise ValueError(f"X must have no negative entry, got {X.min():.6g}")
    logs = (X / X.sum(dim=1, keepdim=True)).clamp(min=1e-300).log()
    shares = (math.log(prior), math.log1p(-prior))
    positive, negative = (
        logs @ (alpha.to(logs.device) - 1) + float(alpha.sum().lgamma() - alpha.lgamma().sum()) + share
        for alpha, share in zip(alphas, shares, strict=True)
    )
    return torch.where(positive >= negative, 1, -1)
