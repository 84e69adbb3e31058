r"""Lion, the Lion-K family, and the constrained problems that they solve.

The method of *Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts* (Chen, Liu, Liang and Liu, ICLR 2024, arXiv 2310.05898):
an optimizer for each convex function :math:`\mathcal K`, which minimizes :math:`f(x)+\frac1\lambda\mathcal K^*(\lambda x)` (eq-lion-objective), and the
Lyapunov functions that prove it, in continuous and in discrete time. Lion itself is the kernel :math:`\|m\|_1`, whose problem is
:math:`\min f(x)` subject to :math:`\|x\|_\infty\le1/\lambda`. Equation labels are those of the chapter ``optimization/lion``.

Notation: ``x`` are parameters, ``weight_decay`` is :math:`\lambda`, decoupled, and ``lr`` is :math:`\eta`. The paper's momentum ``m`` averages
*minus* the gradients. The optimizers keep ``exp_avg`` :math:`=-m`, as PyTorch does. A kernel takes a tensor of any shape as one vector.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lossbook import _checks

# ---------------------------------------------------------------------------------------------------------------------
# Kernels: a convex function, a rule for its subgradient, and its conjugate
# ---------------------------------------------------------------------------------------------------------------------


class Kernel:
    r"""A convex :math:`\mathcal K` with the conjugate :math:`\mathcal K^*(y)=\sup_m\langle y,m\rangle-\mathcal K(m)` (def-lion-conjugate).

    A kernel of your own defines :meth:`value` and :meth:`subgradient`, and what differs from a norm: for a norm the conjugate is 0 on the
    unit ball of the dual norm and infinite outside, so :meth:`dual_norm` is all that is left to say.

    Attributes:
        separable: a class attribute; true if :math:`\mathcal K` is a sum over elements, so that a tensor may be handled in blocks.
        even: a class attribute; true if :math:`\mathcal K(-m)=\mathcal K(m)`, which saves the optimizer a negation. A subclass inherits it.

    Args: none; a kernel with parameters is a dataclass.

    Source: Chen et al. 2024, Lion-K.
    """

    separable = False
    even = False

    def value(self, m: Tensor) -> Tensor:
        r""":math:`\mathcal K(m)`, shape ``()``, for a floating-point tensor of any shape. O(d) time."""
        raise NotImplementedError

    def subgradient(self, m: Tensor) -> Tensor:
        r"""The element of :math:`\partial\mathcal K(m)` that the optimizer moves along, in the shape of ``m``; 0 at kinks. O(d) time and memory."""
        raise NotImplementedError

    def subgradient_(self, m: Tensor) -> Tensor:
        """:meth:`subgradient`, in the memory of ``m``. Like :meth:`subgradients` it only saves time, and who overrides one of the three overrides all."""
        return m.copy_(self.subgradient(m))

    def subgradients(self, ms: Sequence[Tensor]) -> Sequence[Tensor]:
        """:meth:`subgradient` of each tensor of a list."""
        return [self.subgradient(m) for m in ms]

    def dual_norm(self, y: Tensor) -> Tensor:
        r"""The norm whose unit ball is the domain of :math:`\mathcal K^*`, shape ``()``; 0 if the domain is the whole space."""
        raise NotImplementedError

    def domain_violation(self, y: Tensor) -> Tensor:
        r"""How far ``y`` is outside of the domain of :math:`\mathcal K^*`: the dual norm less 1, at least 0; shape ``()``.

        Each step of the optimizer multiplies it, at :math:`y=\lambda x`, by at most :math:`1-\eta\lambda` (eq-lion-entry).
        """
        return (self.dual_norm(y) - 1).clamp(min=0)

    def conjugate(self, y: Tensor, tol: float = 1e-6) -> Tensor:
        r""":math:`\mathcal K^*(y)`, shape ``()``; infinite where :meth:`domain_violation` exceeds ``tol`` or is NaN. O(d) time."""
        _checks.number("tol", tol, 0)
        return self._conjugate_inside(y).masked_fill(~(self.domain_violation(y) <= tol), math.inf)

    def _conjugate_inside(self, y: Tensor) -> Tensor:
        """The conjugate in its domain: 0 for a norm."""
        return y.new_zeros(())

    def conjugate_subgradient(self, y: Tensor) -> Tensor:
        r"""An element of :math:`\partial\mathcal K^*(y)` for ``y`` in the domain, in the shape of ``y``: 0 for a norm."""
        return torch.zeros_like(y)


class _Box(Kernel):
    """What kernels share that are a sum over elements and have the box as their domain."""

    separable = even = True

    def dual_norm(self, y: Tensor) -> Tensor:
        return y.abs().amax()


@dataclass(frozen=True)
class L1(_Box):
    r""":math:`\|m\|_1`: the step is the sign, and the problem has the box :math:`\|x\|_\infty\le1/\lambda`. This is Lion.

    Args: none.

    Source: Chen et al. 2024 (the kernel); Chen et al. 2023, arXiv 2302.06675 (Lion).

    Example:
        >>> L1().subgradient(torch.tensor([-2.0, 0.0, 0.5]))
        tensor([-1.,  0.,  1.])
        >>> L1().conjugate(torch.tensor([1.0, -1.0])), L1().conjugate(torch.tensor([1.01, 0.0]))
        (tensor(0.), tensor(inf))
    """

    def value(self, m: Tensor) -> Tensor:
        return m.abs().sum()

    def subgradient(self, m: Tensor) -> Tensor:
        return m.sign()

    def subgradient_(self, m: Tensor) -> Tensor:
        return m.sign_()

    def subgradients(self, ms: Sequence[Tensor]) -> Sequence[Tensor]:
        return torch._foreach_sign(list(ms))


def _largest(m: Tensor, dim: Any = None) -> Tensor:
    """The largest absolute value, or 1 if it is 0 or not finite: dividing by it first keeps powers from overflow and underflow."""
    largest = m.detach().abs().amax(dim=() if dim is None else dim, keepdim=dim is not None)
    return torch.where((largest > 0) & (largest < math.inf), largest, 1.0)


def _norm(m: Tensor, p: float, dim: Any = None) -> Tensor:
    """The p-norm, without overflow or underflow on the way."""
    largest = _largest(m, dim)
    norm = torch.linalg.vector_norm(m / largest, p, dim=dim)
    return norm * largest.reshape(norm.shape)


@dataclass(frozen=True)
class GroupL2(Kernel):
    r""":math:`\sum_g\|m_g\|_2` over the slices along ``dim``: each has unit length in the step, and :math:`\|x_g\|_2\le1/\lambda` in the problem.

    Args:
        dim: the dimension, or dimensions, that a norm sums over; None for all, which makes one group. The optimizer applies it to each tensor.

    Source: Chen et al. 2024, the table of kernels; conjugate derived in the chapter (prop-lion-dictionary).

    Example:
        >>> GroupL2(1).subgradient(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))
        tensor([[ 0.6000, -0.8000],
                [ 0.0000,  0.0000]])
    """

    even = True
    dim: int | tuple[int, ...] | None = -1

    def value(self, m: Tensor) -> Tensor:
        return _norm(m, 2, self.dim).sum()

    def subgradient(self, m: Tensor) -> Tensor:
        scaled = m / _largest(m, self.dim)
        # A group that is not zero has now a norm of at least 1; one that is zero stays zero.
        return scaled / torch.linalg.vector_norm(scaled, dim=self.dim, keepdim=True).clamp(min=1)

    def dual_norm(self, y: Tensor) -> Tensor:
        return _norm(y, 2, self.dim).amax()


@dataclass(frozen=True)
class L2(GroupL2):
    r""":math:`\|m\|_2`: normalized momentum, and the ball :math:`\|x\|_2\le1/\lambda`.

    Args: none.

    Source: Chen et al. 2024, the table of kernels; conjugate derived in the chapter (prop-lion-dictionary).

    Example:
        >>> L2().subgradient(torch.tensor([3.0, -4.0]))
        tensor([ 0.6000, -0.8000])
    """

    dim: None = field(default=None, init=False, repr=False)


@dataclass(frozen=True)
class LpNorm(Kernel):
    r""":math:`\|m\|_p`, and the ball :math:`\|x\|_q\le1/\lambda` with :math:`\frac1p+\frac1q=1`.

    Args:
        p: a finite number of at least 1.

    Raises:
        TypeError, ValueError: for another ``p``.

    Source: Chen et al. 2024, the table of kernels; conjugate derived in the chapter (prop-lion-dictionary).

    Example:
        >>> LpNorm(3).subgradient(torch.tensor([1.0, 2.0]))  # sign(m) |m|^2 / 9^(2/3)
        tensor([0.2311, 0.9245])
    """

    even = True
    p: float

    def __post_init__(self):
        _checks.number("p", self.p, 1)

    def value(self, m: Tensor) -> Tensor:
        return _norm(m, self.p)

    def subgradient(self, m: Tensor) -> Tensor:
        scaled = m / _largest(m)
        norm = torch.linalg.vector_norm(scaled, self.p).clamp(min=1)
        return scaled.sign() * (scaled.abs() / norm) ** (self.p - 1)

    def dual_norm(self, y: Tensor) -> Tensor:
        return _norm(y, math.inf if self.p == 1 else self.p / (self.p - 1))


@dataclass(frozen=True)
class HalfSquare(Kernel):
    r""":math:`\frac12\|m\|_2^2`: gradient descent with momentum and decoupled decay, and :math:`f+\frac\lambda2\|x\|^2`.

    Args: none.

    Source: Chen et al. 2024, the table of kernels; conjugate derived in the chapter (prop-lion-dictionary).

    Example:
        >>> HalfSquare().conjugate(torch.tensor([1.0, 2.0]))
        tensor(2.5000)
    """

    separable = even = True

    def value(self, m: Tensor) -> Tensor:
        return m.square().sum() / 2

    def subgradient(self, m: Tensor) -> Tensor:
        return m.clone()

    def dual_norm(self, y: Tensor) -> Tensor:
        return y.new_zeros(())

    def _conjugate_inside(self, y: Tensor) -> Tensor:
        return y.square().sum() / 2

    def conjugate_subgradient(self, y: Tensor) -> Tensor:
        return y.clone()


@dataclass(frozen=True)
class Huber(_Box):
    r""":math:`\sum_i\frac{m_i^2}{2e}` up to :math:`|m_i|=e` and :math:`|m_i|-\frac e2` beyond: a clipped step; the box, and :math:`\frac{e\lambda}2\|x\|^2`.

    Args:
        e: the width, finite and > 0.

    Raises:
        TypeError, ValueError: for another ``e``.

    Source: Chen et al. 2024, the table of kernels; conjugate derived in the chapter (prop-lion-dictionary).

    Example:
        >>> Huber(0.5).conjugate(torch.tensor([0.2, -0.8]))
        tensor(0.1700)
    """

    e: float

    def __post_init__(self):
        _checks.positive_number("e", self.e)

    def value(self, m: Tensor) -> Tensor:
        size = m.abs()
        return torch.where(size <= self.e, size.square() / (2 * self.e), size - self.e / 2).sum()

    def subgradient(self, m: Tensor) -> Tensor:
        return (m / self.e).clamp(-1, 1)

    def _conjugate_inside(self, y: Tensor) -> Tensor:
        return self.e / 2 * y.square().sum()

    def conjugate_subgradient(self, y: Tensor) -> Tensor:
        return self.e * y


@dataclass(frozen=True)
class SoftThreshold(_Box):
    r""":math:`\sum_i\max(|m_i|-e,0)`: a sign that is 0 up to the threshold; the box, and :math:`e\|x\|_1`, which makes ``x`` sparse.

    Args:
        e: the threshold, finite and > 0.

    Raises:
        TypeError, ValueError: for another ``e``.

    Source: Chen et al. 2024, the table of kernels; conjugate derived in the chapter (prop-lion-dictionary).

    Example:
        >>> SoftThreshold(0.5).subgradient(torch.tensor([0.4, -0.8]))
        tensor([ 0., -1.])
    """

    e: float

    def __post_init__(self):
        _checks.positive_number("e", self.e)

    def value(self, m: Tensor) -> Tensor:
        return (m.abs() - self.e).clamp(min=0).sum()

    def subgradient(self, m: Tensor) -> Tensor:
        return m.sign().masked_fill_(m.abs() <= self.e, 0)

    def _conjugate_inside(self, y: Tensor) -> Tensor:
        return self.e * y.abs().sum()

    def conjugate_subgradient(self, y: Tensor) -> Tensor:
        return self.e * y.sign()


@dataclass(frozen=True)
class TopK(Kernel):
    r"""The sum of the ``k`` largest :math:`|m_i|`: signs of ``k`` elements; :math:`\|x\|_\infty\le1/\lambda` and :math:`\|x\|_1\le k/\lambda`.

    Args:
        k: a positive integer; of a tensor with fewer elements all are taken. Which of several equal elements are taken is not defined.

    Raises:
        TypeError, ValueError: for another ``k``.

    Source: Chen et al. 2024, the table of kernels; conjugate derived in the chapter (prop-lion-dictionary).

    Example:
        >>> TopK(2).subgradient(torch.tensor([0.1, -3.0, 2.0]))
        tensor([ 0., -1.,  1.])
    """

    even = True
    k: int

    def __post_init__(self):
        _checks.positive_int("k", self.k)

    def _top(self, m: Tensor) -> torch.return_types.topk:
        return m.abs().flatten().topk(min(self.k, m.numel()))

    def value(self, m: Tensor) -> Tensor:
        return self._top(m).values.sum()

    def subgradient(self, m: Tensor) -> Tensor:
        signs, top = m.sign().flatten(), self._top(m).indices
        return torch.zeros_like(signs).scatter(0, top, signs.gather(0, top)).view(m.shape)

    def dual_norm(self, y: Tensor) -> Tensor:
        return torch.maximum(y.abs().amax(), y.abs().sum() / self.k)


# ---------------------------------------------------------------------------------------------------------------------
# The optimizers
# ---------------------------------------------------------------------------------------------------------------------

BLOCK = 2**18  # elements handled at a time on a CPU: few calls, and what a block needs stays in the cache


class LionK(torch.optim.Optimizer):
    r"""Lion-K: step along a subgradient of :math:`\mathcal K` at a mixture of momentum and gradient, with decoupled decay (eq-lion-update).

    With :math:`b` = ``exp_avg`` and the gradient :math:`g`,

    .. math::
        x\leftarrow(1-\eta\lambda)x+\eta\nabla\mathcal K\bigl(-\beta_1b-(1-\beta_1)g\bigr),\qquad b\leftarrow\beta_2b+(1-\beta_2)g .

    For :math:`\lambda>0` its problem is eq-lion-objective, whatever :math:`\eta` and the betas are. To *reach* the solution the learning rate must decay.

    A NaN or infinite gradient stays in the buffer for good. With :class:`L1` it does not show: the sign of NaN is 0 in PyTorch, so these coordinates only
    decay from then on, and the loss stays finite. Skip such steps. Parameters in half precision lose steps below their resolution: keep them in float32.

    Args:
        params: parameters, or parameter groups; a group may have its own ``lr``, ``betas`` and ``weight_decay``.
        kernel: a :class:`Kernel`.
        lr: :math:`\eta\ge0`, a number. :math:`\eta\lambda<1` is needed at every step.
        betas: :math:`(\beta_1,\beta_2)`, each in [0, 1).
        weight_decay: :math:`\lambda\ge0`; 0 is no constraint.
        scope: "tensor" applies the kernel to each tensor, "group" to all tensors of a parameter group as one vector. It matters where the kernel is
            not separable.
        foreach: update all tensors of a group by a few calls, which helps where launching a call is slow. None does it on accelerators only. (A kernel
            over a ``group`` does not need it.)

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument; at a step for a sparse gradient, or once ``lr * weight_decay`` is 1 or more.

    Complexity: O(d) time a step; one buffer of memory. Beside it, on a CPU, a separable kernel needs O(1) for tensors that are contiguous, else O(d of the
    largest tensor); with ``foreach`` or the scope "group" O(d). A compiled step, ``torch.compile(optimizer.step)``, reads and writes everything once and is
    the fastest on a CPU that has a C++ compiler.

    Source: Chen et al. 2024, Lion-K; the order (the step uses the old buffer) as in the Lion code of google/automl.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([3.0, 0.0]))
        >>> optimizer = LionK([x], L2(), lr=0.5, weight_decay=1.0)
        >>> x.grad = torch.tensor([-30.0, 40.0])
        >>> optimizer.step()
        >>> x.data
        tensor([ 1.8000, -0.4000])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        kernel: Kernel,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        scope: str = "tensor",
        *,
        foreach: bool | None = None,
    ):
        if not isinstance(kernel, Kernel):
            raise TypeError(f"kernel must be a Kernel, got {type(kernel).__name__}")
        if scope not in ("tensor", "group"):
            raise ValueError(f"scope must be 'tensor' or 'group', got {scope!r}")
        if scope == "group" and isinstance(kernel, GroupL2) and kernel.dim is not None:
            raise ValueError("scope must be 'tensor' for GroupL2, whose groups are slices of a tensor, got 'group'")
        if foreach is not None and not isinstance(foreach, bool):
            raise TypeError(f"foreach must be a bool or None, got {foreach!r}")
        # Not among the group's options, so that a state_dict holds tensors and numbers only.
        self.kernel, self.scope, self.foreach = kernel, scope, foreach
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "kernel": self.kernel, "scope": self.scope, "foreach": self.foreach}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check a group's numbers, and add it; raises as the constructor."""
        options = {**self.defaults, **param_group}
        for name in ("kernel", "scope", "foreach"):
            if name in options:
                raise TypeError(f"{name} is one for all parameter groups, got {options[name]!r} in a group")
        _step_numbers(options["lr"], options["betas"], options["weight_decay"])
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model anew, calls ``backward`` and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _step_numbers(group["lr"], group["betas"], group["weight_decay"])
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            if not params:
                continue
            grads = [p.grad for p in params]
            if any(g.is_sparse for g in grads):
                raise TypeError("the gradient must be dense, got a sparse one")
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            self._update(group, params, grads, [self.state[p]["exp_avg"] for p in params])
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]) -> None:
        lr, (beta1, beta2), decay = group["lr"], group["betas"], 1 - group["lr"] * group["weight_decay"]
        even = self.kernel.even
        along = -lr if even else lr  # an even kernel steps back along the mixture of gradients: no negation
        many = params[0].device.type != "cpu" if self.foreach is None else self.foreach
        if self.scope == "group" or (many and len(params) > 1):
            mixtures = torch._foreach_lerp(buffers, grads, 1 - beta1)
            if not even:
                torch._foreach_neg_(mixtures)
            if self.scope == "group":
                joint = self.kernel.subgradient(torch.cat([m.flatten() for m in mixtures]))
                parts = joint.split([m.numel() for m in mixtures])
                steps = [part.view(m.shape) for part, m in zip(parts, mixtures, strict=True)]
            else:
                steps = self.kernel.subgradients(mixtures)
            if decay != 1:
                torch._foreach_mul_(params, decay)
            torch._foreach_add_(params, steps, alpha=along)
            torch._foreach_lerp_(buffers, grads, 1 - beta2)
            return
        for whole in zip(params, grads, buffers, strict=True):
            for p, g, b in _blocks(*whole) if self.kernel.separable else [whole]:
                mixture = torch.lerp(b, g, 1 - beta1, out=self._scratch(b))
                b.lerp_(g, 1 - beta2)  # now, while both are in the cache
                step = self.kernel.subgradient_(mixture if even else mixture.neg_())
                if decay != 1:
                    p.mul_(decay)
                p.add_(step, alpha=along)

    def _scratch(self, like: Tensor) -> Tensor | None:
        """Memory for the mixture of a block, the same at each step: new memory costs more time than the arithmetic."""
        if like.device.type != "cpu" or torch.compiler.is_compiling() or like.numel() > BLOCK:
            return None
        kept = self.__dict__.setdefault("_kept", {})
        if like.dtype not in kept:
            kept[like.dtype] = like.new_empty(BLOCK)
        return kept[like.dtype][: like.numel()].view(like.shape)


def _blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Views of the same elements of each tensor, block by block; whole tensors off the CPU, under a compiler, and where one has gaps."""
    if tensors[0].device.type != "cpu" or torch.compiler.is_compiling() or tensors[0].numel() <= BLOCK:
        return [tensors]
    if not all(tensor.is_contiguous() for tensor in tensors):
        return [tensors]
    return zip(*(tensor.view(-1).split(BLOCK) for tensor in tensors), strict=True)


class Lion(LionK):
    r"""Lion: the sign of a mixture of momentum and gradient, with decoupled weight decay (eq-lion-lion); :class:`LionK` with :class:`L1`.

    For :math:`\lambda>0` it minimizes :math:`f(x)` subject to :math:`\|x\|_\infty\le1/\lambda` (eq-lion-box). Its authors advise a learning rate 3 to 10
    times smaller than AdamW's, and a weight decay 3 to 10 times larger: the product of the two stays.

    Args:
        params, lr, betas, weight_decay, foreach: as for :class:`LionK`.

    Raises:
        TypeError, ValueError: as :class:`LionK`.

    Complexity: O(d) time a step; one buffer of memory.

    Source: Chen et al. 2023, arXiv 2302.06675; its code in google/automl, folder ``lion``.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([2.0, -2.0]))
        >>> optimizer = Lion([x], lr=0.1, weight_decay=1.0)
        >>> for _ in range(100):
        ...     x.grad = torch.tensor([-5.0, -0.01])  # f falls along both axes for ever: only the box stops x
        ...     optimizer.step()
        >>> x.data
        tensor([1.0000, 0.9999])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
    ):
        super().__init__(params, L1(), lr, betas, weight_decay, foreach=foreach)


# ---------------------------------------------------------------------------------------------------------------------
# Lyapunov functions
# ---------------------------------------------------------------------------------------------------------------------


def _step_numbers(lr: float, betas: tuple[float, float], weight_decay: float) -> tuple[float, float, float, float]:
    """The checked numbers of a step: lr, beta1, beta2, weight decay."""
    lr, weight_decay = _checks.number("lr", lr, 0), _checks.number("weight_decay", weight_decay, 0)
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
    for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
        if _checks.number(name, beta, 0, 1) == 1:
            raise ValueError(f"{name} must be < 1, got {beta}")
    if lr * weight_decay >= 1:
        raise ValueError(f"lr * weight_decay must be < 1, got {lr} * {weight_decay}")
    return lr, float(betas[0]), float(betas[1]), weight_decay


def lyapunov_constant(
    *, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float
) -> tuple[float, float]:
    r"""The step :math:`\epsilon` of the implicit form, and the constant :math:`c` of the discrete Lyapunov function (eq-lion-constant).

    :math:`\epsilon=\frac\eta{1-\eta\lambda}` and :math:`c=\frac{\epsilon\beta_1}{(1-\beta_2)+\epsilon\lambda(1-\beta_1)}`.

    Args:
        lr: :math:`\eta>0`.
        betas: :math:`0\le\beta_1\le\beta_2<1`.
        weight_decay: :math:`\lambda>0`, with :math:`\eta\lambda<1`.

    Returns:
        :math:`\epsilon` and :math:`c`, floats.

    Raises:
        TypeError, ValueError: for numbers outside of these ranges.

    Source: Chen et al. 2024, Theorem 4.1, with constants derived in the chapter.

    Example:
        >>> eps, c = lyapunov_constant(lr=0.01, weight_decay=1.0)
        >>> round(eps, 6), round(c, 6)
        (0.010101, 0.825688)
    """
    lr, beta1, beta2, lam = _step_numbers(lr, betas, weight_decay)
    _checks.positive_number("lr", lr)
    _checks.positive_number("weight_decay", lam)
    if beta1 > beta2:
        raise ValueError(f"betas must not decrease, betas[0] <= betas[1], got {betas}")
    eps = lr / (1 - lr * lam)
    return eps, eps * beta1 / ((1 - beta2) + eps * lam * (1 - beta1))


def _vectors(x: Tensor, m: Tensor, grad: Tensor | None = None) -> None:
    """Check parameters, momentum and gradient, of any one shape."""
    _checks.floating("x", x)
    _checks.like("m", m, "x", x, x.ndim)
    if grad is not None:
        _checks.like("grad", grad, "x", x, x.ndim)


def lyapunov(
    f_value: float | Tensor,
    x: Tensor,
    m: Tensor,
    kernel: Kernel,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float,
) -> Tensor:
    r"""The discrete Lyapunov function :math:`H(x,m)` (eq-lion-lyapunov), which falls along Lion-K up to a term of order :math:`\epsilon^2`.

    :math:`H=f(x)+\frac1\lambda\mathcal K^*(\lambda x)+c\,\bigl(\mathcal K^*(\lambda x)+\mathcal K(m)-\lambda\langle m,x\rangle\bigr)`.

    Args:
        f_value: :math:`f(x)`.
        x: parameters, floating point, any shape.
        m: the paper's momentum, minus ``exp_avg``, in the shape of ``x``.
        kernel: :math:`\mathcal K`.
        lr, betas, weight_decay: as in :func:`lyapunov_constant`.

    Returns:
        Shape ``()``; infinite where :math:`\lambda x` is outside of the domain of :math:`\mathcal K^*`.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Complexity: O(d) time and memory.

    Source: Chen et al. 2024, Theorem 4.1, with constants derived in the chapter.

    Example:
        >>> lyapunov(0.0, torch.tensor([0.5]), torch.tensor([2.0]), L1(), lr=0.01, weight_decay=1.0)  # c (2 - 1)
        tensor(0.8257)
    """
    _vectors(x, m)
    _, c = lyapunov_constant(lr=lr, betas=betas, weight_decay=weight_decay)
    conjugate = kernel.conjugate(weight_decay * x)
    return f_value + conjugate / weight_decay + c * (conjugate + kernel.value(m) - weight_decay * (m * x).sum())


def lyapunov_decrease(
    x: Tensor,
    m: Tensor,
    grad: Tensor,
    kernel: Kernel,
    *,
    smoothness: float,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Both dissipations of the step from :math:`(x_t,m_t)`, and the bound on :math:`H(x_{t+1},m_{t+1})-H(x_t,m_t)` (eq-lion-decrease).

    :math:`\Delta^1=\langle V,\tilde m-y\rangle` and :math:`\Delta^2=\langle\tilde m-m_{t+1},\nabla\mathcal K(\tilde m)-\nabla\mathcal K(m_{t+1})\rangle` with
    :math:`V=\nabla\mathcal K(\tilde m)-\lambda x_{t+1}` and :math:`y` the kernel's element of :math:`\partial\mathcal K^*(\lambda x_{t+1})`; the bound is
    :math:`-\epsilon(1+c\lambda)\Delta^1-\frac{c(1-\beta_2)}{\beta_2-\beta_1}\Delta^2+\frac{L\epsilon^2}2\|V\|^2`.

    Args:
        x, m: where the step begins; :math:`\lambda x` in the domain of :math:`\mathcal K^*`. ``m`` is minus ``exp_avg``.
        grad: the full gradient of :math:`f` at ``x``.
        kernel: :math:`\mathcal K`.
        smoothness: :math:`L\ge0`, the Lipschitz constant of the gradient.
        lr, betas, weight_decay: as in :func:`lyapunov_constant`. With equal betas the second term is absent.

    Returns:
        :math:`\Delta^1\ge0`, :math:`\Delta^2\ge0` and the bound, each of shape ``()``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Complexity: O(d) time and memory.

    Source: Chen et al. 2024, Theorem 4.1, with constants derived in the chapter.

    Example:
        >>> one = torch.tensor([1.0])
        >>> step = dict(lr=0.5, betas=(0.5, 0.5), weight_decay=1.0)  # eps = 1, c = 1/2, V = 1/2
        >>> lyapunov_decrease(0 * one, one, -one, L1(), smoothness=1.0, **step)  # -3/2 / 2 + 1/8
        (tensor(0.5000), tensor(0.), tensor(-0.6250))
    """
    _vectors(x, m, grad)
    smoothness = _checks.number("smoothness", smoothness, 0)
    eps, c = lyapunov_constant(lr=lr, betas=betas, weight_decay=weight_decay)
    beta1, beta2 = betas
    mixture, new_m = torch.lerp(-grad, m, beta1), torch.lerp(-grad, m, beta2)
    step = kernel.subgradient(mixture)
    y = (1 - lr * weight_decay) * weight_decay * x + lr * weight_decay * step  # lambda times the next x
    velocity = step - y
    delta1 = (velocity * (mixture - kernel.conjugate_subgradient(y))).sum()
    delta2 = ((mixture - new_m) * (step - kernel.subgradient(new_m))).sum()
    bound = -eps * (1 + c * weight_decay) * delta1 + smoothness * eps**2 / 2 * velocity.square().sum()
    if beta1 < beta2:
        bound = bound - c * (1 - beta2) / (beta2 - beta1) * delta2
    return delta1, delta2, bound


def _ode_numbers(alpha: float, gamma: float, eps: float, lam: float) -> None:
    for name, value in (("alpha", alpha), ("gamma", gamma), ("lam", lam)):
        _checks.positive_number(name, value)
    if _checks.number("eps", eps, 0) * gamma > 1:
        raise ValueError(f"eps * gamma must be at most 1, got {eps} * {gamma}")


def lyapunov_ode(
    f_value: float | Tensor, x: Tensor, m: Tensor, kernel: Kernel, *, alpha: float, gamma: float, eps: float, lam: float
) -> Tensor:
    r"""The Lyapunov function of the flow (eq-lion-ode-lyapunov), which falls along :func:`lionk_ode`.

    :math:`H=\alpha f(x)+\frac\gamma\lambda\mathcal K^*(\lambda x)+c\,\bigl(\mathcal K^*(\lambda x)+\mathcal K(m)-\lambda\langle m,x\rangle\bigr)` with
    :math:`c=\frac{1-\varepsilon\gamma}{1+\varepsilon\lambda}`.

    Args:
        f_value: :math:`f(x)`.
        x, m: parameters and the paper's momentum, floating point, one shape.
        kernel: :math:`\mathcal K`.
        alpha, gamma, lam: :math:`\alpha,\gamma,\lambda>0`.
        eps: :math:`\varepsilon\ge0` with :math:`\varepsilon\gamma\le1`.

    Returns:
        Shape ``()``; infinite where :math:`\lambda x` is outside of the domain of :math:`\mathcal K^*`.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Complexity: O(d) time and memory.

    Source: Chen et al. 2024, Theorem 3.1.

    Example:
        >>> x, m = torch.tensor([0.5]), torch.tensor([2.0])
        >>> lyapunov_ode(0.0, x, m, HalfSquare(), alpha=1.0, gamma=1.0, eps=0.0, lam=1.0)  # 1/8 + (1/8 + 2 - 1)
        tensor(1.2500)
    """
    _vectors(x, m)
    _ode_numbers(alpha, gamma, eps, lam)
    conjugate, c = kernel.conjugate(lam * x), (1 - eps * gamma) / (1 + eps * lam)
    return alpha * f_value + gamma / lam * conjugate + c * (conjugate + kernel.value(m) - lam * (m * x).sum())


def lyapunov_ode_rate(
    x: Tensor, m: Tensor, grad: Tensor, kernel: Kernel, *, alpha: float, gamma: float, eps: float, lam: float
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Both dissipations of the flow at :math:`(x,m)`, and the rate :math:`\dot H=-(\gamma+c\lambda)\Delta_1-c\Delta_2` (eq-lion-ode-rate).

    :math:`\Delta_1=\langle\tilde m-\nabla\mathcal K^*(\lambda x),\nabla\mathcal K(\tilde m)-\lambda x\rangle` and
    :math:`\Delta_2=\frac1\varepsilon\langle\tilde m-m,\nabla\mathcal K(\tilde m)-\nabla\mathcal K(m)\rangle`, 0 for :math:`\varepsilon=0`.

    Args:
        x, m: parameters and the paper's momentum, floating point, one shape.
        grad: the gradient of :math:`f` at ``x``.
        kernel, alpha, gamma, eps, lam: as in :func:`lyapunov_ode`; :math:`\mathcal K` and :math:`\mathcal K^*` differentiable.

    Returns:
        :math:`\Delta_1\ge0`, :math:`\Delta_2\ge0` and :math:`\dot H\le0`, each of shape ``()``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Complexity: O(d) time and memory.

    Source: Chen et al. 2024, Theorem 3.1.

    Example:
        >>> x, m = torch.tensor([0.5]), torch.tensor([2.0])
        >>> lyapunov_ode_rate(x, m, 0 * x, HalfSquare(), alpha=1.0, gamma=1.0, eps=0.0, lam=1.0)  # 1.5^2, and twice that
        (tensor(2.2500), tensor(0.), tensor(-4.5000))
    """
    _vectors(x, m, grad)
    _ode_numbers(alpha, gamma, eps, lam)
    m_dot = -alpha * grad - gamma * m
    mixture, c = m + eps * m_dot, (1 - eps * gamma) / (1 + eps * lam)
    step = kernel.subgradient(mixture)
    delta1 = ((mixture - kernel.conjugate_subgradient(lam * x)) * (step - lam * x)).sum()
    # (mixture - m) / eps is m_dot, also in the limit eps = 0, where the two subgradients agree.
    delta2 = (m_dot * (step - kernel.subgradient(m))).sum()
    return delta1, delta2, -(gamma + c * lam) * delta1 - c * delta2


def lionk_ode(
    f_grad: Callable[[Tensor], Tensor],
    x0: Tensor,
    m0: Tensor,
    kernel: Kernel,
    alpha: float,
    gamma: float,
    eps: float,
    lam: float,
    t_eval: Sequence[float] | Tensor,
) -> tuple[Tensor, Tensor]:
    r"""Solve the flow of which Lion-K is an Euler scheme (eq-lion-ode), by scipy's adaptive Runge-Kutta method of order 8.

    :math:`\dot m=-\alpha\nabla f(x)-\gamma m`, :math:`\tilde m=m+\varepsilon\dot m`, :math:`\dot x=\nabla\mathcal K(\tilde m)-\lambda x`. The kernel should be
    differentiable: at a jump of :math:`\nabla\mathcal K` an adaptive solver takes tiny steps and promises nothing.

    Args:
        f_grad: maps ``x``, float64, shape ``(d,)``, to the gradient of :math:`f`.
        x0, m0: where the flow begins, floating point, shape ``(d,)``.
        kernel, alpha, gamma, eps, lam: as in :func:`lyapunov_ode`.
        t_eval: increasing times of at least 0; the flow begins at 0.

    Returns:
        ``x`` and ``m`` at the times, float64, shape ``(T, d)`` each.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.
        RuntimeError: if the solver stops before the last time.

    Complexity: O(d) time for each of 12 evaluations a step, and one gradient each; O(Td) memory.

    Source: Chen et al. 2024, the ODE of Lion-K.

    Example:
        >>> zero = torch.zeros(1, dtype=torch.float64)
        >>> x, m = lionk_ode(lambda x: 0 * x, zero + 1, zero, HalfSquare(), 1.0, 1.0, 0.0, 2.0, [0.0, 1.0])
        >>> x.flatten()  # nothing but decay: e^(-2t)
        tensor([1.0000, 0.1353], dtype=torch.float64)
    """
    from scipy.integrate import solve_ivp

    _checks.floating("x0", x0, 1)
    _checks.like("m0", m0, "x0", x0, 1)
    _ode_numbers(alpha, gamma, eps, lam)
    times = torch.as_tensor(t_eval, dtype=torch.float64)
    if times.ndim != 1 or len(times) == 0 or not bool((times >= 0).all() and (times.diff() > 0).all()):
        raise ValueError(f"t_eval must be increasing times of at least 0, got {t_eval}")

    def velocity(_time, state):
        x, m = torch.as_tensor(state).chunk(2)
        m_dot = -alpha * f_grad(x) - gamma * m
        return torch.cat([kernel.subgradient(m + eps * m_dot) - lam * x, m_dot]).numpy()

    start = torch.cat([x0, m0]).detach().double().cpu().numpy()
    span = (0.0, max(times[-1].item(), 1e-12))
    solution = solve_ivp(velocity, span, start, "DOP853", times.numpy(), rtol=1e-10, atol=1e-12)
    if not solution.success:
        raise RuntimeError(f"the solver stopped: {solution.message}")
    x, m = torch.as_tensor(solution.y.T).chunk(2, dim=1)
    return x, m


def kkt_residual(x: Tensor, grad: Tensor, weight_decay: float) -> Tensor:
    r"""How far ``x`` is from a stationary point of :math:`\min f` in the box :math:`\|x\|_\infty\le1/\lambda`: :math:`\|g\|_1+\lambda\langle x,g\rangle` (eq-lion-kkt).

    In the box it is at least 0, and 0 exactly where each coordinate has :math:`g_i=0` or sits on the face that :math:`-g_i` points to: :math:`\lambda` times
    the Frank-Wolfe gap. Outside of the box it means nothing.

    Args:
        x: parameters, floating point, any shape.
        grad: gradient of :math:`f`, in the shape of ``x``.
        weight_decay: :math:`\lambda>0`.

    Returns:
        Shape ``()``, in units of the gradient.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Complexity: O(d) time and memory.

    Source: Chen et al. 2024, the dissipation of Lion; Frank and Wolfe 1956.

    Example:
        >>> kkt_residual(torch.tensor([1.0, 0.5]), torch.tensor([-3.0, 0.2]), 1.0)  # the first is at its face
        tensor(0.3000)
    """
    _checks.floating("x", x)
    _checks.like("grad", grad, "x", x, x.ndim)
    _checks.positive_number("weight_decay", weight_decay)
    return (grad.abs() + weight_decay * x * grad).sum()
