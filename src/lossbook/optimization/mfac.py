r"""M-FAC: products with the inverse of an empirical Fisher matrix that is never formed, and an optimizer and a pruner built on them.

The method of *M-FAC: Efficient Matrix-Free Approximations of Second-Order Information* (Frantar, Kurtic and Alistarh, NeurIPS 2021,
arXiv 2107.03356). With gradients :math:`g_1,\dots,g_m\in\mathbb R^d` as the rows of :math:`G` and a damping :math:`\lambda>0`, the matrix is
:math:`\hat F=\lambda I+\frac1mG^\top G`; the divisor is always :math:`m`, also where rows are zero. Everything here is its exact inverse, up to rounding:
*static* for a fixed set of gradients, *dynamic* for a window in which one gradient after the other is replaced. Equation labels are
those of the chapter ``optimization/mfac``.

With the damping :math:`10^{-5}` of the official code, entries are multiplied by :math:`10^5`. What is :math:`m\times m`, and every sum over :math:`d`
that leads to it, is therefore computed in float64, a page of columns at a time.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossbook import _checks

# Elements that are held in float64 at a time. On a CPU 2 MB stay in its cache; an accelerator wants few and large operations.
_PAGE = {"cpu": 2**18}
_PAGE_ELSEWHERE = 2**24

# ---------------------------------------------------------------------------------------------------------------------
# The matrix, and the paper's recursions
# ---------------------------------------------------------------------------------------------------------------------


def _gradients(grads: Tensor) -> Tensor:
    """Gradients ``(m, d)``, finite, detached, in float32 or wider."""
    return _checks.wide(_checks.finite("grads", _checks.floating("grads", grads, 2)).detach())


def empirical_fisher(grads: Tensor, damping: float) -> Tensor:
    r"""The matrix itself, :math:`\lambda I+\frac1mG^\top G` (eq-mfac-fisher): a dense reference for small :math:`d`.

    Args:
        grads: :math:`G`, one gradient a row, shape ``(m, d)``, floating.
        damping: :math:`\lambda>0`.

    Returns:
        Shape ``(d, d)``, in the dtype of ``grads`` (float32 for half precision).

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(d²m) time, O(d²) memory.

    Source: Frantar et al., section on the background.

    Example:
        >>> empirical_fisher(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), damping=1.0)
        tensor([[2.0000, 0.5000],
                [0.5000, 1.5000]])
    """
    grads, damping = _gradients(grads), _checks.positive_number("damping", damping)
    eye = torch.eye(grads.shape[1], dtype=grads.dtype, device=grads.device)
    with torch.autocast(grads.device.type, enabled=False):
        return grads.T @ grads / len(grads) + damping * eye


def static_recursion(grads: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    r"""The paper's static precomputation, one gradient after the other (eq-mfac-static): a readable reference.

    :math:`v_i=\hat F_{i-1}^{-1}g_i` and :math:`q_i=m+g_i^\top v_i`, where :math:`\hat F_i` holds the first :math:`i` gradients. Then
    :math:`\hat F^{-1}=\lambda^{-1}I-\sum_iv_iv_i^\top/q_i`. :class:`StaticInverseFisher` computes the same without a loop over :math:`m`.

    Args:
        grads: shape ``(m, d)``, floating; not changed.
        damping: :math:`\lambda>0`.

    Returns:
        ``V`` of shape ``(m, d)`` and ``q`` of shape ``(m,)``, in the dtype of ``grads`` (float32 for half precision).

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(dm²) time, O(dm) memory.

    Source: Frantar et al., section on the static algorithm.

    Example:
        >>> V, q = static_recursion(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), damping=1.0)
        >>> V, q
        (tensor([[1.0000, 0.0000],
                [0.6667, 1.0000]]), tensor([3.0000, 3.6667]))
    """
    grads, damping = _gradients(grads), _checks.positive_number("damping", damping)
    V, q = grads / damping, grads.new_full((len(grads),), float(len(grads)))
    with torch.autocast(grads.device.type, enabled=False):
        for i, g in enumerate(grads):
            V[i] -= (V[:i] @ g / q[:i]) @ V[:i]
            q[i] += g @ V[i]
    return V, q


def _cholesky(matrix: Tensor) -> Tensor:
    """Cholesky factor of positive definite float64 matrices. Where rounding has made one indefinite, as it does for huge gradients that are nearly
    parallel, a multiple of the rounding error is added to the diagonal."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not failed.any():
        return factor
    rounding = (
        max(32, 4 * matrix.shape[-1]) * torch.finfo(matrix.dtype).eps * matrix.diagonal(dim1=-2, dim2=-1).amax(-1)
    )
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.cholesky(matrix + rounding[..., None, None] * eye)


def _factor(gram: Tensor, damping: float) -> Tensor:
    r"""Cholesky factor of :math:`S=\lambda^{-1}GG^\top+mI` from :math:`GG^\top`, in float64; of each matrix of a batch."""
    m = gram.shape[-1]
    return _cholesky(gram.double() / damping + m * torch.eye(m, dtype=torch.float64, device=gram.device))


def dynamic_coefficients(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    r"""The paper's two matrices of coefficients, from products of gradients alone (eq-mfac-d, eq-mfac-b).

    :math:`D_{ij}=g_i^\top\hat F_{i-1}^{-1}g_j` for :math:`i\le j`, and :math:`v_i=\sum_{k\le i}B_{ik}g_k`. With :math:`S=\lambda^{-1}GG^\top+mI=LU`, :math:`L`
    unit lower triangular, they are :math:`D=U-mI` and :math:`B=\lambda^{-1}L^{-1}` (eq-mfac-lu). The factors come from Cholesky's, because torch
    has an LU factorization without pivoting on GPUs only.

    Args:
        gram: :math:`GG^\top`, symmetric and positive semidefinite, shape ``(m, m)``, floating.
        damping: :math:`\lambda>0`.

    Returns:
        ``D``, upper triangular, and ``B``, lower triangular, each ``(m, m)`` in the dtype of ``gram``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(m³) time, O(m²) memory.

    Source: Frantar et al., section on the dynamic algorithm; LU by the official code.

    Example:
        >>> D, B = dynamic_coefficients(torch.tensor([[1.0, 1.0], [1.0, 2.0]]), damping=1.0)
        >>> D, B
        (tensor([[1.0000, 1.0000],
                [0.0000, 1.6667]]), tensor([[ 1.0000,  0.0000],
                [-0.3333,  1.0000]]))
    """
    _checks.finite("gram", _checks.floating("gram", gram, 2))
    if gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram must be square, got shape {tuple(gram.shape)}")
    damping = _checks.positive_number("damping", damping)
    C = _factor(gram, damping)
    pivots, eye = C.diagonal(), torch.eye(len(C), dtype=C.dtype, device=C.device)
    D = pivots[:, None] * C.T - len(C) * eye
    B = torch.linalg.solve_triangular(C / pivots, eye, upper=False, unitriangular=True) / damping
    return D.to(gram.dtype), B.to(gram.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Static: fixed gradients
# ---------------------------------------------------------------------------------------------------------------------


def _per_page(piece: Tensor) -> int:
    """How many pieces of this size make a page, at least one."""
    return max(1, _PAGE.get(piece.device.type, _PAGE_ELSEWHERE) // piece.numel())


def _pages(rows: Tensor, *others: Tensor) -> Iterator[tuple]:
    """Slices of the last dimension, and what lies there in ``rows`` and in others as wide, in float64."""
    width = _per_page(rows[..., 0])
    for start in range(0, rows.shape[-1], width):
        page = slice(start, start + width)
        yield page, *(value[..., page].double() for value in (rows, *others))


def _gram(rows: Tensor) -> Tensor:
    r""":math:`GG^\top` in float64; of each matrix of a batch."""
    return sum(values @ values.mT for _, values in _pages(rows))


def _vectors(name: str, x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """``x`` as rows ``(k, dim)``, if it is one vector or a matrix of them, of this dtype."""
    _checks.floating(name, x)
    if x.ndim not in (1, 2) or x.shape[-1] != dim:
        raise ValueError(f"{name} must have shape ({dim},) or (k, {dim}), got {tuple(x.shape)}")
    if x.dtype != dtype:
        raise TypeError(f"{name} must have the dtype of the gradients, {dtype}, got {x.dtype}")
    return x.reshape(-1, dim)


class StaticInverseFisher:
    r"""The inverse of the damped empirical Fisher of fixed gradients: products, entries, and the diagonal (eq-mfac-static, eq-mfac-compact).

    :math:`\hat F^{-1}=\lambda^{-1}I-Y^\top Y` with :math:`Y=\lambda^{-1}C^{-1}G` and the Cholesky factor :math:`C` of :math:`S=\lambda^{-1}GG^\top+mI`. Row :math:`i` of
    :math:`Y` is :math:`v_i/\sqrt{q_i}` of :func:`static_recursion`.

    With ``block_size`` only diagonal blocks are kept: entries across blocks are zero, and the last block may be shorter. Blocks narrower than
    :math:`m` are inverted themselves, which is cheaper and keeps more digits.

    Args:
        grads: one gradient a row, shape ``(m, d)``, floating. Neither changed nor kept.
        damping: :math:`\lambda>0`.
        block_size: :math:`B`, at least 1; None for one block.

    Attributes:
        dim: :math:`d`.
        damping: as given.
        block_size: as given, but at most :math:`d`; :math:`d` for None.
        dtype: of what is kept, that of ``grads`` (float32 for half precision).

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(dm² + m³) time once, O(dm) a product, O(m) an entry, O(dm) the diagonal; O(dm + m²) memory. With blocks O(d(m² + m³/B)) once; for
    B < m O(d(mB + B²)) once, O(dB) a product, O(1) an entry, O(d) the diagonal, O(dB) memory. Products lose about eps · ‖x‖/λ, eps that of
    the dtype: take float64 where curvature is far above the damping.

    Source: Frantar et al., section on the static algorithm; the Cholesky form is the chapter's.

    Example:
        >>> inverse = StaticInverseFisher(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), damping=1.0)
        >>> (inverse.mul(torch.tensor([1.0, 0.0])) * 11).round()
        tensor([ 6., -2.])
        >>> round(11 * inverse.entry(0, 1).item()), (inverse.diagonal() * 11).round()
        (-2, tensor([6., 8.]))
    """

    def __init__(self, grads: Tensor, damping: float, *, block_size: int | None = None):
        grads, self.damping = _gradients(grads), _checks.positive_number("damping", damping)
        (m, self.dim), self.dtype = grads.shape, grads.dtype
        size = self.dim if block_size is None else min(_checks.positive_int("block_size", block_size), self.dim)
        count = math.ceil(self.dim / size)
        self.block_size, self._narrow = size, size < m
        blocks = F.pad(grads, (0, count * size - self.dim)).view(m, count, size).transpose(0, 1)  # (b, m, B)
        self._factors = grads.new_empty(count, min(m, size), size)  # Y, or the inverses of narrow blocks
        self._floor = None if self._narrow else grads.new_empty(count, size)  # of the diagonal
        per_page = _per_page(blocks[0])
        floors = [None] * math.ceil(count / per_page) if self._narrow else self._floor.split(per_page)
        for some, factors, floor in zip(blocks.split(per_page), self._factors.split(per_page), floors, strict=True):
            if self._narrow:
                eye = torch.eye(size, dtype=torch.float64, device=grads.device)
                fisher = _gram(some.mT) / m + self.damping * eye
                factors.copy_(torch.cholesky_inverse(_cholesky(fisher)))
            else:
                C = _factor(_gram(some), self.damping)
                for page, values in _pages(some):
                    factors[..., page] = torch.linalg.solve_triangular(C, values, upper=False) / self.damping
                    floor[..., page] = 1 / (self.damping + values.square().mean(1))
        self._denominators = None
        if block_size is None:
            C = _factor(_gram(grads), self.damping) if self._narrow else C[0]
            self._denominators = C.diagonal().square().to(self.dtype)

    @property
    def denominators(self) -> Tensor:
        r""":math:`q_i=m+g_i^\top\hat F_{i-1}^{-1}g_i\ge m`, shape ``(m,)``; a ValueError with blocks, which have no such recursion."""
        if self._denominators is None:
            raise ValueError(f"block_size must be None for denominators, got {self.block_size}")
        return self._denominators

    def mul(self, x: Tensor) -> Tensor:
        r""":math:`\hat F^{-1}x` for a vector ``(d,)`` or for each row of ``(k, d)``, in the shape and dtype of ``x``, which is that of the gradients.

        Raises:
            TypeError, ValueError: for a wrong type, dtype or shape, naming the argument.
        """
        rows = _vectors("x", x, self.dim, self.dtype)
        count, _, size = self._factors.shape
        with torch.autocast(x.device.type, enabled=False):
            columns = F.pad(rows, (0, count * size - self.dim)).view(len(rows), count, size).permute(1, 2, 0)
            product = self._factors @ columns
            if not self._narrow:
                product = columns / self.damping - self._factors.mT @ product
        return product.permute(2, 0, 1).flatten(1)[:, : self.dim].reshape(x.shape)

    def diagonal(self) -> Tensor:
        r"""The diagonal of :math:`\hat F^{-1}`, shape ``(d,)``; positive: rounding takes no entry below its bound :math:`1/\hat F_{qq}`."""
        if self._narrow:
            return self._factors.diagonal(dim1=1, dim2=2).flatten()[: self.dim]
        return (1 / self.damping - self._factors.square().sum(1)).maximum(self._floor).flatten()[: self.dim]

    def entry(self, i: int, j: int) -> Tensor:
        r"""The entry :math:`[\hat F^{-1}]_{ij}`, a tensor of shape ``()``; an IndexError where there is no such entry."""
        for name, index in (("i", i), ("j", j)):
            if not 0 <= index < self.dim:
                raise IndexError(f"{name} must lie in [0, {self.dim}), got {index}")
        (block, row), (other, column) = divmod(i, self.block_size), divmod(j, self.block_size)
        if block != other:
            return self._factors.new_zeros(())
        if self._narrow:
            return self._factors[block, row, column]
        product = (self._factors[block, :, row] * self._factors[block, :, column]).sum()
        return (1 / self.damping - product).maximum(self._floor[block, row]) if i == j else -product


# ---------------------------------------------------------------------------------------------------------------------
# Dynamic: a sliding window
# ---------------------------------------------------------------------------------------------------------------------


class DynamicInverseFisher:
    r"""The inverse of the damped empirical Fisher of the last ``window`` gradients, one replaced at a time (eq-mfac-dynamic, eq-mfac-window).

    Keeps the gradients and their products :math:`GG^\top`. A new gradient overwrites the oldest: the order of rows does not matter to :math:`\hat F`.
    Before the window is full, the missing rows are zero, and the divisor is ``window`` all the same. Sums over the dimension are computed in
    float64: in float32 only the last rounding is float32's, as long as ‖g‖²/(λm) is far below 1e8.

    Args:
        window: :math:`m`, at least 1.
        dim: :math:`d`, at least 1.
        damping: :math:`\lambda>0`.
        dtype: of the gradients kept, float32 or float64.
        device: of everything kept.

    Attributes:
        rows: the gradients in their slots, shape ``(m, d)``.
        gram: :math:`GG^\top`, float64, shape ``(m, m)``.
        num_seen: gradients so far; the next one goes to slot ``num_seen % window``.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Complexity: O(dm + m³) time an update with the first product after it, O(dm + m²) a product; O(dm + m²) memory.

    Source: Frantar et al., section on the dynamic algorithm; the Cholesky form and the window form are the chapter's.

    Example:
        >>> inverse = DynamicInverseFisher(2, 2, damping=1.0)
        >>> for g in ([9.0, 9.0], [1.0, 0.0], [1.0, 1.0]):  # the third overwrites the first
        ...     inverse.update(torch.tensor(g))
        >>> (inverse.mul(torch.tensor([1.0, 0.0])) * 11).round()
        tensor([ 6., -2.])
    """

    def __init__(
        self,
        window: int,
        dim: int,
        damping: float,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        self.window, self.dim = _checks.positive_int("window", window), _checks.positive_int("dim", dim)
        self.damping = _checks.positive_number("damping", damping)
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be float32 or float64, got {dtype}")
        self.rows = torch.zeros(self.window, self.dim, dtype=dtype, device=device)
        self.gram = torch.zeros(self.window, self.window, dtype=torch.float64, device=device)
        self.num_seen, self._cholesky = 0, None

    @property
    def factor(self) -> Tensor:
        r"""The Cholesky factor of :math:`\lambda^{-1}GG^\top+mI`, float64; computed once after an update or a change of ``damping``."""
        if self._cholesky is None or self._cholesky[0] != self.damping:
            self._cholesky = self.damping, _factor(self.gram, self.damping)
        return self._cholesky[1]

    @property
    def D(self) -> Tensor:
        r"""The paper's :math:`D` of the rows in their slots (:func:`dynamic_coefficients`), float64, shape ``(m, m)``."""
        return dynamic_coefficients(self.gram, self.damping)[0]

    @property
    def B(self) -> Tensor:
        r"""The paper's :math:`B` of the rows in their slots (:func:`dynamic_coefficients`), float64, shape ``(m, m)``."""
        return dynamic_coefficients(self.gram, self.damping)[1]

    def _products(self, x: Tensor) -> Tensor:
        """Products of all gradients with the rows of ``x``, float64, shape ``(m, k)``."""
        return sum(values @ x_.T for _, values, x_ in _pages(self.rows, x))

    @torch.no_grad()
    def update(self, g: Tensor) -> None:
        """Put ``g`` of shape ``(d,)`` in the place of the oldest gradient.

        Raises:
            TypeError, ValueError: for a wrong type, dtype or shape, or a gradient that is not finite; the window stays as it was.
        """
        _vectors("g", _checks.floating("g", g, 1), self.dim, self.rows.dtype)
        # A bad gradient would stay for a whole window. Reading one number stalls an accelerator, but so does the check of the factorization.
        if not torch.isfinite(torch.linalg.vector_norm(g, dtype=torch.float64)):
            raise ValueError("g must be finite, got NaN or infinity")
        slot = self.num_seen % self.window
        self.rows[slot] = g
        self.gram[slot] = self.gram[:, slot] = self._products(g[None])[:, 0]
        self.num_seen += 1
        self._cholesky = None

    def mul(self, x: Tensor) -> Tensor:
        r""":math:`\hat F^{-1}x` for a vector ``(d,)`` or for each row of ``(k, d)``, in the shape and dtype of ``x``, which is that of the gradients.

        Raises:
            TypeError, ValueError: for a wrong type, dtype or shape, naming the argument.
        """
        x_rows = _vectors("x", x, self.dim, self.rows.dtype)
        coefficients = torch.cholesky_solve(self._products(x_rows) / self.damping, self.factor).T
        pages = [(x_ - coefficients @ values) / self.damping for _, values, x_ in _pages(self.rows, x_rows)]
        return torch.cat(pages, dim=1).to(x.dtype).reshape(x.shape)

    @torch.no_grad()
    def update_mul(self, g: Tensor) -> Tensor:
        r"""Put ``g`` in, and return :math:`\hat F^{-1}g=\frac m\lambda G^\top S^{-1}e_r` (eq-mfac-window): no difference of large numbers.

        Raises:
            TypeError, ValueError: as :meth:`update`.
        """
        slot = self.num_seen % self.window
        self.update(g)
        unit = torch.zeros(self.window, 1, dtype=torch.float64, device=self.rows.device)
        unit[slot] = self.window / self.damping
        coefficients = torch.cholesky_solve(unit, self.factor)[:, 0]
        product = torch.empty_like(g)
        for page, values in _pages(self.rows):
            product[page] = coefficients @ values
        return product


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer
# ---------------------------------------------------------------------------------------------------------------------


def _wide(params: list[Tensor]) -> torch.dtype:
    """The dtype of the window: that of the parameters, or float32 where theirs are narrower."""
    return functools.reduce(torch.promote_types, [p.dtype for p in params], torch.float32)


class MFAC(torch.optim.Optimizer):
    r"""Steps along :math:`\hat F^{-1}g`, with the Fisher matrix of the last gradients of all parameters together (eq-mfac-step).

    The gradient, with ``weight_decay`` times the weights added, enters the window first and is multiplied then:
    :math:`u=\hat F^{-1}g`, :math:`v\leftarrow\mu v+(1-\mu)u`, :math:`w\leftarrow w-\mathrm{lr}\,v`. By eq-mfac-decrease a step without momentum changes the loss by at
    most :math:`\mathrm{lr}\cdot m` to first order: learning rates are small.

    One window spans all groups: only ``lr`` may differ between groups. ``num_grads`` stays what it is from the first step on. A parameter without gradient counts as a gradient of zero.

    Args:
        params: parameters or groups, on one device.
        lr: learning rate, at least 0.
        momentum: :math:`\mu` in [0, 1), of an average of steps; not the sum that ``torch.optim.SGD`` keeps.
        weight_decay: at least 0; coupled, it goes through the curvature.
        num_grads: :math:`m`, the window.
        damping: :math:`\lambda>0`.
        sparse: parameters that are exactly zero when the optimizer is made stay so. Mind biases that start at zero.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument; at a step, for a gradient that is not finite or not dense:
            weights and window stay as they were.

    Complexity: O(dm + m³) time a step, O(dm + m²) memory: the window holds ``num_grads`` copies of the gradient, in float32 or wider.

    Source: Frantar et al., section on optimization; defaults of the official code, which refuses closures.

    Example:
        >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = MFAC([weight], lr=1.0, num_grads=1, damping=1e-3)
        >>> weight.square().sum().div(2).backward()
        >>> optimizer.step()
        >>> weight.detach()  # with m = 1 the step is g / (damping + |g|²), here of length 1/5
        tensor([2.8800, 3.8400])
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        num_grads: int = 1024,
        damping: float = 1e-5,
        *,
        sparse: bool = False,
    ):
        if _checks.number("momentum", momentum, 0, 1) == 1:
            raise ValueError("momentum must be < 1, got 1")
        _checks.number("lr", lr, 0)
        _checks.number("weight_decay", weight_decay, 0)
        _checks.positive_int("num_grads", num_grads)
        _checks.positive_number("damping", damping)
        self._fisher, self._velocity, self._mask = None, None, None
        shared = dict(momentum=momentum, weight_decay=weight_decay, num_grads=num_grads, damping=damping)
        super().__init__(params, dict(lr=lr, **shared))
        if sparse:
            self._mask = torch.cat([p.detach().ne(0).flatten() for p in self._params()])

    def add_param_group(self, param_group: dict) -> None:
        """Add a group before the first step; a ValueError afterwards, or where anything but ``lr`` differs."""
        if self._fisher is not None or self._mask is not None:
            raise ValueError("param_group must come before the window or the mask of the parameters, got one later")
        super().add_param_group(param_group)
        group, shared = self.param_groups[-1], ("momentum", "weight_decay", "num_grads", "damping")
        try:
            _checks.number("lr", group["lr"], 0)
            for name in shared:
                if group[name] != self.param_groups[0][name]:
                    raise ValueError(f"{name} must be {self.param_groups[0][name]} in all groups, got {group[name]}")
            for p in group["params"]:
                if not p.is_floating_point():
                    raise TypeError(f"params must be floating-point tensors, got {p.dtype}")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _gradient(self, params: list[Tensor], weight_decay: float) -> Tensor:
        """All gradients as one vector, with the decay, in float32 or wider."""
        for p in params:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise ValueError(f"params must have dense gradients, got layout {p.grad.layout}")
        dtype = _wide(params)
        g = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().to(dtype) for p in params])
        if weight_decay:
            g = g + weight_decay * torch.cat([p.flatten().to(dtype) for p in params])
        return g if self._mask is None else g * self._mask

    @torch.compiler.disable  # in a compiled training step, too: nothing to fuse here, and a number is read
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step. A ``closure``, if given, computes loss and gradients once, before it, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params, shared = self._params(), self.param_groups[0]
        g = self._gradient(params, shared["weight_decay"])
        if self._fisher is None:
            self._fisher = DynamicInverseFisher(
                shared["num_grads"], len(g), shared["damping"], dtype=g.dtype, device=g.device
            )
        if self._fisher.window != shared["num_grads"]:
            raise ValueError(
                f"num_grads must stay {self._fisher.window} after the first step, got {shared['num_grads']}"
            )
        self._fisher.damping = _checks.positive_number("damping", shared["damping"])  # it may be scheduled, as lr
        v = self._fisher.update_mul(g)
        if momentum := shared["momentum"]:
            previous = torch.zeros_like(v) if self._velocity is None else self._velocity
            self._velocity = v = momentum * previous + (1 - momentum) * v
        pieces = iter(v.split([p.numel() for p in params]))
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_((group["lr"] * next(pieces)).view(p.shape).to(p.dtype))
        return loss

    def state_dict(self) -> dict:
        """That of every optimizer, and under ``"mfac"`` the window, the velocity and the mask, each None where there is none."""
        fisher = self._fisher
        window = None if fisher is None else dict(rows=fisher.rows, gram=fisher.gram, num_seen=fisher.num_seen)
        return super().state_dict() | {"mfac": dict(window=window, velocity=self._velocity, mask=self._mask)}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue from :meth:`state_dict`, on the device and in the dtype of the parameters as they are now; tensors are copied.

        The mask is that of ``state_dict``. Raises ValueError for the state of another optimizer or of other parameters.
        """
        if "mfac" not in state_dict:
            raise ValueError("state_dict must be that of an MFAC, got one without 'mfac'")
        params, state = self._params(), state_dict["mfac"]
        window, dim = state["window"], sum(p.numel() for p in params)
        dtype = _wide(params)
        if window is not None and window["rows"].shape[1] != dim:
            raise ValueError(f"state_dict must be of {dim} parameters, got {window['rows'].shape[1]}")
        super().load_state_dict(state_dict)

        def own(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
            return None if tensor is None else tensor.to(params[0].device, dtype, copy=True)

        self._velocity, self._mask, self._fisher = own(state["velocity"], dtype), own(state["mask"]), None
        if window is not None:
            rows, damping = own(window["rows"], dtype), self.param_groups[0]["damping"]
            self._fisher = DynamicInverseFisher(*rows.shape, damping, dtype=rows.dtype, device=rows.device)
            self._fisher.rows, self._fisher.gram = rows, own(window["gram"])
            self._fisher.num_seen = window["num_seen"]

    def __getstate__(self) -> dict:
        """What copies and pickles keep."""
        return super().__getstate__() | {name: getattr(self, name) for name in ("_fisher", "_velocity", "_mask")}


# ---------------------------------------------------------------------------------------------------------------------
# The pruner
# ---------------------------------------------------------------------------------------------------------------------


def _weights(weights: Tensor, inverse: StaticInverseFisher) -> Tensor:
    """Weights ``(d,)``, finite, in the dtype of the inverse."""
    _checks.finite("weights", _checks.floating("weights", weights, 1))
    return _vectors("weights", weights, inverse.dim, inverse.dtype)[0]


def obs_saliency(weights: Tensor, inverse: StaticInverseFisher) -> Tensor:
    r"""Increase of the quadratic model when one weight is removed and the others make up for it, :math:`w_q^2/(2[\hat F^{-1}]_{qq})` (eq-mfac-obs).

    Args:
        weights: shape ``(d,)``, in the dtype of ``inverse``.
        inverse: the static inverse, of dimension d.

    Returns:
        Shape ``(d,)``, at least 0.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: that of the inverse's diagonal, O(dm).

    Source: Hassibi and Stork 1992; Frantar et al., section on pruning.

    Example:
        >>> inverse = StaticInverseFisher(torch.tensor([[2.0, 0.0]]), damping=1.0)  # F = diag(5, 1)
        >>> obs_saliency(torch.tensor([1.0, 2.0]), inverse)
        tensor([2.5000, 2.0000])
    """
    return _weights(weights, inverse).square() / (2 * inverse.diagonal())


def obs_update(weights: Tensor, inverse: StaticInverseFisher, drop_index: Tensor, *, joint: bool = False) -> Tensor:
    r"""The change of all weights that removes those of a set P: ``weights + obs_update(...)`` is exactly zero there.

    The paper and its code add the updates of single weights (eq-mfac-additive): :math:`\delta=\hat F^{-1}t`, :math:`t_q=-w_q/[\hat F^{-1}]_{qq}` on P, and set P to zero
    then. This is the default; it costs one product. ``joint`` gives the minimizer of :math:`\frac12\delta^\top\hat F\delta` among the changes that
    remove P (eq-mfac-joint), which is never worse in the quadratic model. For one weight, or a diagonal inverse, both are the same.

    Args:
        weights: shape ``(d,)``, in the dtype of ``inverse``.
        inverse: the static inverse, of dimension d.
        drop_index: P, different indices, int64, shape ``(k,)``.
        joint: solve for all of P together.

    Returns:
        Shape ``(d,)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(dm) time; joint O(kdm + k³) time and O(kd) memory.

    Source: Frantar et al., section on pruning, and the official code; the joint form follows Hassibi and Stork.

    Example:
        >>> inverse = StaticInverseFisher(torch.tensor([[1.0, 1.0]]), damping=1.0)  # F = [[2, 1], [1, 2]]
        >>> obs_update(torch.tensor([1.0, 4.0]), inverse, torch.tensor([0])).round(decimals=4)
        tensor([-1.0000,  0.5000])
    """
    w = _weights(weights, inverse)
    _checks.indices("drop_index", drop_index, len(w))
    if len(drop_index.unique()) < len(drop_index):
        raise ValueError("drop_index must hold different indices, got one twice")
    if joint and len(drop_index):
        columns = inverse.mul(F.one_hot(drop_index, len(w)).to(w.dtype))
        with torch.autocast(w.device.type, enabled=False):
            delta = torch.linalg.solve(columns[:, drop_index], -w[drop_index]) @ columns
    else:
        target = torch.zeros_like(w)
        target[drop_index] = -w[drop_index] / inverse.diagonal()[drop_index]
        delta = inverse.mul(target)
    delta[drop_index] = -w[drop_index]
    return delta


def _density(sparsity: float) -> float:
    if _checks.number("sparsity", sparsity, 0, 1) == 1:
        raise ValueError("sparsity must be < 1, got 1")
    return 1 - float(sparsity)


def round_density(start: float, target: float, rounds: int, j: int) -> float:
    r"""Share of weights alive after round ``j``: equal ratios, :math:`\mathrm{start}\,(\mathrm{target}/\mathrm{start})^{j/\mathrm{rounds}}` (eq-mfac-rounds).

    Args:
        start: share before the first round, in (0, 1].
        target: share after the last, in (0, start].
        rounds: number of rounds, at least 1.
        j: from 0 to ``rounds``.

    Returns:
        The share, a float.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Source: the official code.

    Example:
        >>> [round(round_density(1.0, 0.1, 4, j), 4) for j in range(1, 5)]
        [0.5623, 0.3162, 0.1778, 0.1]
    """
    _checks.fraction("start", start)
    if _checks.positive_number("target", target) > start:
        raise ValueError(f"target must be at most start, {start}, got {target}")
    rounds = _checks.positive_int("rounds", rounds)
    if not 0 <= j <= rounds:
        raise ValueError(f"j must lie in [0, {rounds}], got {j}")
    return start * (target / start) ** (j / rounds)


@torch.no_grad()
def prune_obs(
    weights: Tensor,
    grad_fn: Callable[[Tensor], Tensor],
    sparsity: float,
    *,
    damping: float = 1e-5,
    num_grads: int = 1024,
    rounds: int = 16,
    block_size: int | None = None,
) -> Tensor:
    r"""Prune to a sparsity in rounds: each takes fresh gradients, removes the weights of least saliency, and updates the others.

    Weights that are zero at the start are dead from the start; only those alive at the start of a round take part in its inverse. After round j exactly
    ``round(d * round_density(start, 1 - sparsity, rounds, j))`` weights are alive, where ``start`` is the share alive at the start; of equal saliencies
    the lower index goes first. Where fewer are alive at the start than asked for, nothing is pruned. Updates are those of single weights, added
    (:func:`obs_update`).

    Args:
        weights: shape ``(d,)``, floating; not changed.
        grad_fn: takes weights ``(d,)`` and returns gradients ``(num_grads, d)``, floating, on the same device; called once a round. In float64 the
            inverse keeps more digits.
        sparsity: share of zeros in the result, in [0, 1).
        damping: :math:`\lambda>0`.
        num_grads: :math:`m`, at least 1.
        rounds: at least 1; the official code takes 16.
        block_size: of :class:`StaticInverseFisher`, over the weights that are alive; 1 is the diagonal Fisher, which does not change the others.

    Returns:
        The pruned weights, shape ``(d,)``, in the dtype of ``weights``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: each round O(dm² + m³) time and O(dm) memory, besides ``grad_fn``.

    Source: Frantar et al., section on pruning; schedule of the official code.

    Example:
        >>> gradients = torch.eye(4) * torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> prune_obs(torch.ones(4), lambda w: gradients, 0.5, num_grads=4, rounds=2)
        tensor([0., 0., 1., 1.])
    """
    w = _checks.finite("weights", _checks.floating("weights", weights, 1)).detach().clone()
    target, num_grads = _density(sparsity), _checks.positive_int("num_grads", num_grads)
    rounds = _checks.positive_int("rounds", rounds)
    alive = w.nonzero()[:, 0]
    start = len(alive) / len(w)
    for j in range(1, rounds + 1 if target < start else 1):
        if not len(alive):  # rounded to none
            break
        with torch.enable_grad():
            grads = _checks.floating("grad_fn's gradients", grad_fn(w.clone()), 2)
        if grads.shape != (num_grads, len(w)):
            raise ValueError(f"grad_fn must return shape ({num_grads}, {len(w)}), got {tuple(grads.shape)}")
        inverse = StaticInverseFisher(grads[:, alive], damping, block_size=block_size)
        current = w[alive].to(inverse.dtype)
        order = obs_saliency(current, inverse).argsort(stable=True)
        gone = len(alive) - round(len(w) * round_density(start, target, rounds, j))
        w[alive] = (current + obs_update(current, inverse, order[:gone])).to(w.dtype)
        alive = alive[order[gone:].sort().values]
    return w


def prune_magnitude(weights: Tensor, sparsity: float) -> Tensor:
    r"""Set the weights of least magnitude to zero: the baseline.

    Args:
        weights: shape ``(d,)``, floating; not changed.
        sparsity: share of zeros in the result, in [0, 1); ``round(d * (1 - sparsity))`` weights stay. Of equal magnitudes the lower index goes first.

    Returns:
        Shape ``(d,)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(d log d) time, O(d) memory.

    Source: Frantar et al., section on pruning, as a baseline.

    Example:
        >>> prune_magnitude(torch.tensor([0.5, -2.0, 0.1, 1.0]), 0.5)
        tensor([ 0., -2.,  0.,  1.])
    """
    w = _checks.finite("weights", _checks.floating("weights", weights, 1)).detach().clone()
    gone = len(w) - round(len(w) * _density(sparsity))
    w[w.abs().argsort(stable=True)[:gone]] = 0
    return w


def collect_gradients(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    params: Iterable[Tensor] | None = None,
    *,
    per_sample: bool = True,
) -> Tensor:
    r"""Gradients of a model's loss as rows, for the classes above.

    Args:
        model: takes a batch of inputs. With ``per_sample`` it may not mix samples or change its buffers: put batch norm in evaluation mode.
        loss_fn: takes outputs and targets and returns their mean loss, shape ``()``.
        batches: pairs of inputs ``(b, ...)`` and targets ``(b, ...)``.
        params: parameters of the model, in the order of columns; None for all. ``nn.utils.parameters_to_vector`` has the same order.
        per_sample: one row a sample (``torch.func.vmap``), else one a batch.

    Returns:
        Shape ``(m, d)``, with m samples or batches.

    Raises:
        ValueError: no batch, or ``params`` holds something that is not a parameter of the model.

    Complexity: O(md) memory, and the activations of a batch.

    Source: Frantar et al., section on experiments, where a gradient may also be the mean over a batch.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
        >>> G = collect_gradients(model, F.mse_loss, [(x, y)])
        >>> G.shape, (G[1] / G[0]).round()  # 2wx²
        (torch.Size([2, 1]), tensor([4.]))
    """
    names = {id(p): name for name, p in model.named_parameters()}
    params = list(model.parameters() if params is None else params)
    if not params or any(id(p) not in names for p in params):
        raise ValueError("params must be parameters of the model, got others or none")
    chosen = {names[id(p)]: p.detach() for p in params}

    def loss(values: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return loss_fn(torch.func.functional_call(model, values, (inputs,)), targets)

    def sample_loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(values, x[None], y[None])

    rows = []
    for inputs, targets in batches:
        if per_sample:
            grads = torch.func.vmap(torch.func.grad(sample_loss), in_dims=(None, 0, 0))(chosen, inputs, targets)
            rows.append(torch.cat([grads[name].flatten(1) for name in chosen], dim=1))
        else:
            grads = torch.func.grad(loss)(chosen, inputs, targets)
            rows.append(torch.cat([grads[name].flatten() for name in chosen])[None])
    if not rows:
        raise ValueError("batches must not be empty, got none")
    return torch.cat(rows)
