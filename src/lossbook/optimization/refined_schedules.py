r"""Learning-rate schedules for the last iterate: where linear decay comes from, and how gradient norms refine it.

The method of *When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement* (Defazio, Cutkosky, Mehta and Mishchenko 2023,
arXiv 2310.07831): a conversion that turns the regret of any online algorithm into a guarantee for the last iterate, the weights that make the guarantee
best for given gradient norms, the bound of any schedule as a differentiable function, and what a training loop needs: a recorder of norms, and
schedulers. Equation labels are those of the chapter ``optimization/refined_schedules``.

Notation: ``weights`` (T,) holds :math:`w_t`, ``learning_rates`` :math:`\eta_t`, ``grad_norms`` :math:`G_t=\|g_t\|`, and ``distance`` is
:math:`D=\|x_1-u\|`. Entry ``k`` of a table is step :math:`t=k+1`. Sums over a range are :math:`w_{a:b}=\sum_{t=a}^bw_t`.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lossbook import _checks


def _positive(name: str, value: Tensor, length: int | None = None) -> Tensor:
    """``value`` in float32 or wider, if it has shape ``(T,)`` with T > 1 (``length`` where given) and is finite and > 0."""
    _checks.floating(name, value, 1)
    if len(value) < 2:
        raise ValueError(f"{name} must have at least 2 entries, got {len(value)}")
    if length is not None and len(value) != length:
        raise ValueError(f"{name} must have {length} entries, one for each step, got {len(value)}")
    if _checks.known_false(torch.isfinite(value) & (value > 0)):
        raise ValueError(f"{name} must be finite and > 0 everywhere, got {value.min():g} to {value.max():g}")
    return _checks.wide(value)


def _tail_sums(values: Tensor) -> Tensor:
    """The sum from each entry to the last one, added from the end on."""
    return values.flip(0).cumsum(0).flip(0)


# ---------------------------------------------------------------------------------------------------------------------
# The conversion
# ---------------------------------------------------------------------------------------------------------------------


def last_iterate_identity(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    r"""The last of a sequence of numbers as their weighted mean plus a correction (eq-refined_schedules-identity).

    :math:`q_T=\frac1{w_{1:T}}\sum_tw_tq_t+\sum_{k<T}\frac{w_k}{w_{k:T}w_{k+1:T}}\sum_{t>k}w_t(q_t-q_k)`, an identity for any numbers.

    Args:
        values: :math:`q`, shape ``(T,)``, T > 1, floating point; differentiable.
        weights: :math:`w>0`, shape ``(T,)``; differentiable.

    Returns:
        The mean and the correction, each of shape ``()``; their sum is ``values[-1]``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(T) time and memory.

    Source: Defazio et al., the lemma behind the conversion theorem and the bound of any schedule.

    Example:
        >>> mean, correction = last_iterate_identity(torch.tensor([4.0, 2.0, 3.0]), torch.ones(3))
        >>> mean, correction  # 3 = 3 + 0
        (tensor(3.), tensor(0.))
    """
    _checks.finite("values", _checks.floating("values", values, 1))
    weights = _positive("weights", weights, len(values))
    tails = _tail_sums(weights)
    means = _tail_sums(weights * values) / tails  # of q_k, ..., q_T
    return means[0], (weights[:-1] / tails[:-1] * (means[1:] - values[:-1])).sum()


def last_iterate_step(x: Tensor, delta: Tensor, weights: Tensor, t: int) -> Tensor:
    r"""Shrink a move of the base algorithm so that the last iterate inherits its regret (eq-refined_schedules-conversion).

    :math:`x_{t+1}=x_t+\frac{w_{t+1:T}}{w_{1:T}}\Delta_t` with :math:`\Delta_t=z_{t+1}-z_t`. The base algorithm sees gradients at :math:`x_t`.

    Args:
        x: :math:`x_t`, any shape, floating point.
        delta: :math:`\Delta_t`, same shape and dtype.
        weights: :math:`w>0`, shape ``(T,)``, fixed before the run.
        t: the step, from 1 to T as in the paper. Step T moves nothing.

    Returns:
        :math:`x_{t+1}`, the shape of ``x``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(T) time for the sums, in addition to the size of ``x``.

    Source: Defazio et al., the conversion theorem.

    Example:
        >>> last_iterate_step(torch.zeros(2), torch.tensor([4.0, -4.0]), torch.ones(4), t=1)
        tensor([ 3., -3.])
    """
    _checks.like("delta", delta, "x", x, _checks.floating("x", x).ndim)
    weights = _positive("weights", weights)
    if _checks.positive_int("t", t) > len(weights):
        raise ValueError(f"t must be at most {len(weights)}, the number of weights, got {t}")
    return x + weights[t:].sum() / weights.sum() * delta


def weights_to_learning_rates(weights: Tensor) -> Tensor:
    r"""The learning rates of the converted gradient descent (eq-refined_schedules-rates).

    :math:`\eta_t=w_t\frac{w_{t+1:T}}{w_{1:T}}`; the last one is 0.

    Args:
        weights: :math:`w>0`, shape ``(T,)``, T > 1, floating point; differentiable.

    Returns:
        Shape ``(T,)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(T) time and memory.

    Source: Defazio et al., corollary of the conversion theorem.

    Example:
        >>> weights_to_learning_rates(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([0.9000, 1.4000, 1.2000, 0.0000])
    """
    wide = _positive("weights", weights).double()  # products of float32 weights may leave float32
    tails = _tail_sums(wide)
    return (wide * torch.cat([tails[1:], tails.new_zeros(1)]) / tails[0]).to(_checks.wide(weights).dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The bound, and the weights that make it best
# ---------------------------------------------------------------------------------------------------------------------


def weighted_bound(weights: Tensor, grad_norms: Tensor, distance: float) -> Tensor:
    r"""The guarantee of converted gradient descent (eq-refined_schedules-bound).

    :math:`f(x_T)-f(u)\le B(w)=\frac{D^2+\sum_tw_t^2G_t^2}{2w_{1:T}}` for convex :math:`f`, with the rates of :func:`weights_to_learning_rates`.

    Args:
        weights: :math:`w>0`, shape ``(T,)``, T > 1, floating point; differentiable.
        grad_norms: :math:`G>0`, shape ``(T,)``; differentiable.
        distance: :math:`D>0`, from the start to the comparator.

    Returns:
        Shape ``()``, in the unit of :math:`f`.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(T) time and memory.

    Source: Defazio et al., corollary of the conversion theorem.

    Example:
        >>> weighted_bound(torch.full((4,), 0.5), torch.ones(4), 1.0)  # D G / sqrt(T)
        tensor(0.5000)
    """
    weights = _positive("weights", weights)
    grad_norms = _positive("grad_norms", grad_norms, len(weights))
    distance = _checks.positive_number("distance", distance)
    wide, norms = weights.double(), grad_norms.double()  # squares of float32 numbers may leave float32
    return ((distance**2 + (wide * norms).square().sum()) / (2 * wide.sum())).to(weights.dtype)


def optimal_weights(grad_norms: Tensor, distance: float) -> Tensor:
    r"""The weights with the least :func:`weighted_bound` (eq-refined_schedules-optimal): :math:`w_t=D\,G_t^{-2}\big/\sqrt{\sum_sG_s^{-2}}`.

    Args:
        grad_norms: :math:`G>0`, shape ``(T,)``, T > 1, floating point; differentiable.
        distance: :math:`D>0`, from the start to the comparator.

    Returns:
        Shape ``(T,)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(T) time and memory.

    Source: Defazio et al., the theorem on the refined schedule.

    Example:
        >>> optimal_weights(torch.tensor([2.0, 1.0, 1.0]), 1.5)
        tensor([0.2500, 1.0000, 1.0000])
    """
    grad_norms = _positive("grad_norms", grad_norms)
    distance = _checks.positive_number("distance", distance)
    # Beside the least norm, squares neither overflow nor all vanish.
    least = grad_norms.min()
    relative = least / grad_norms
    return distance / least * relative.square() / torch.linalg.vector_norm(relative)


def optimal_bound(grad_norms: Tensor, distance: float) -> Tensor:
    r"""The least :func:`weighted_bound` over all weights (eq-refined_schedules-optimal): :math:`D\big/\sqrt{\sum_tG_t^{-2}}`.

    Args:
        grad_norms: :math:`G>0`, shape ``(T,)``, T > 1, floating point; differentiable.
        distance: :math:`D>0`, from the start to the comparator.

    Returns:
        Shape ``()``, in the unit of :math:`f`.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(T) time and memory.

    Source: Defazio et al., the theorem on the refined schedule.

    Example:
        >>> optimal_bound(torch.full((4,), 3.0), 1.0)  # D G / sqrt(T)
        tensor(1.5000)
    """
    grad_norms = _positive("grad_norms", grad_norms)
    distance = _checks.positive_number("distance", distance)
    least = grad_norms.min()
    return distance * least / torch.linalg.vector_norm(least / grad_norms)


def schedule_bound(learning_rates: Tensor, grad_norms: Tensor, distance: float) -> Tensor:
    r"""The guarantee for the last iterate of plain gradient descent with any learning rates (eq-refined_schedules-any).

    :math:`f(x_T)-f(u)\le\frac{D^2+\sum_t\eta_t^2G_t^2}{2\eta_{1:T}}+\frac12\sum_{k<T}\frac{\eta_k}{\eta_{k:T}\eta_{k+1:T}}\sum_{t\ge k}\eta_t^2G_t^2`.

    Args:
        learning_rates: :math:`\eta>0`, shape ``(T,)``, T > 1, floating point; differentiable. The last one moves no iterate: it is a free weight.
        grad_norms: :math:`G>0`, shape ``(T,)``; differentiable.
        distance: :math:`D>0`, from the start to the comparator.

    Returns:
        Shape ``()``, in the unit of :math:`f`.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(T) time and memory.

    Source: Defazio et al., the bound of any schedule.

    Example:
        >>> schedule_bound(torch.full((2,), 0.5), torch.ones(2), 1.0)
        tensor(1.)
    """
    rates = _positive("learning_rates", learning_rates)
    grad_norms = _positive("grad_norms", grad_norms, len(rates))
    distance = _checks.positive_number("distance", distance)
    wide, norms = rates.double(), grad_norms.double()  # squares of float32 numbers may leave float32
    tails, squares = _tail_sums(wide), _tail_sums((wide * norms).square())
    correction = (wide[:-1] / tails[:-1] * squares[:-1] / tails[1:]).sum()
    return ((distance**2 + squares[0]) / (2 * tails[0]) + correction / 2).to(rates.dtype)


def minimize_schedule_bound(grad_norms: Tensor, distance: float, *, max_iter: int = 5000) -> Tensor:
    r"""Learning rates with the least :func:`schedule_bound`, found numerically (L-BFGS-B on :math:`\log\eta`).

    Args:
        grad_norms: :math:`G>0`, shape ``(T,)``, T > 1, floating point.
        distance: :math:`D>0`, from the start to the comparator.
        max_iter: most iterations; there is a warning if they do not suffice.

    Returns:
        Shape ``(T,)``, the dtype of ``grad_norms`` (float32 or wider), without gradient. A stationary point: the bound is not convex in
        :math:`\log\eta`, and nothing is claimed about a global minimum.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(T) time and memory for an iteration. Needs SciPy.

    Source: Defazio et al., numerical schedules from the bound of any schedule.

    Example:
        >>> rates = minimize_schedule_bound(torch.ones(100), 1.0)
        >>> (rates[[20, 40, 60]] / rates[0]).round(decimals=1)  # nearly linear, and nobody asked for it
        tensor([0.8000, 0.6000, 0.4000])
    """
    from scipy.optimize import minimize

    grad_norms = _positive("grad_norms", grad_norms)
    distance = _checks.positive_number("distance", distance)
    _checks.positive_int("max_iter", max_iter)
    largest = grad_norms.max()
    norms = (grad_norms / largest).detach().cpu().double()  # units out: the rates scale like D / G
    size = torch.linalg.vector_norm(norms).item()

    def objective(log_rates):
        x = torch.from_numpy(log_rates).requires_grad_()
        with torch.enable_grad():
            value = schedule_bound(x.exp(), norms, 1.0) * len(norms) / size  # of the order of 1
        return value.item(), torch.autograd.grad(value, x)[0].numpy()

    start = (named_schedule("linear", len(norms)) / size).log().numpy()
    options = dict(maxiter=max_iter, maxfun=20 * max_iter, ftol=1e-15, gtol=1e-9)
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    if found.status == 1:
        warnings.warn(f"max_iter = {max_iter} iterations did not suffice", stacklevel=2)
    return torch.from_numpy(found.x).exp().to(grad_norms) * distance / largest.detach()


# ---------------------------------------------------------------------------------------------------------------------
# The refined schedule
# ---------------------------------------------------------------------------------------------------------------------


def smooth_grad_norms(grad_norms: Tensor, tau: float = 0.1) -> Tensor:
    r"""Median filter over a window of about :math:`\tau T` steps, as in the released code.

    The width is odd, :math:`k=2\lfloor\lfloor\tau T\rfloor/2\rfloor+1`. On the right the sequence is continued by reflection, on the left by its
    first value: a record of the very first step is copied :math:`\lfloor k/2\rfloor` times and is *not* removed where it is an outlier.

    Args:
        grad_norms: :math:`G>0`, shape ``(T,)``, T > 1, floating point.
        tau: share of the sequence that a window covers, in (0, 1).

    Returns:
        Shape ``(T,)``, dtype (float32 or wider) and device of ``grad_norms``, without gradient.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: about O(T log T) time, O(T) memory; on the CPU. Needs SciPy.

    Source: Defazio et al., section on smoothing, and the official code.

    Example:
        >>> norms = torch.ones(100)
        >>> norms[50] = 100.0
        >>> smooth_grad_norms(norms).max()
        tensor(1.)
    """
    import numpy as np
    from scipy.ndimage import median_filter

    grad_norms = _positive("grad_norms", grad_norms)
    if _checks.positive_number("tau", tau) >= 1:
        raise ValueError(f"tau must lie in (0, 1), got {tau}")
    width = 2 * (int(tau * len(grad_norms)) // 2) + 1
    padded = np.pad(grad_norms.detach().cpu().numpy(), (0, 2 * width), mode="reflect")
    return torch.from_numpy(median_filter(padded, size=width, mode="nearest")[: len(grad_norms)]).to(grad_norms)


def refined_schedule(
    grad_norms: Tensor,
    *,
    power: float = 2.0,
    tau: float | None = 0.1,
    normalize: bool = True,
    floor: float | None = None,
) -> Tensor:
    r"""The schedule that recorded gradient norms ask for (eq-refined_schedules-refined).

    :math:`\eta_t\propto w_tw_{t+1:T}` with :math:`w_t=\hat G_t^{-\texttt{power}}`, :math:`\hat G` the smoothed norms.

    Args:
        grad_norms: :math:`G>0`, shape ``(T,)``, T > 1, floating point; differentiable with ``tau=None``.
        power: 2 for gradient descent with :math:`\ell_2` norms; 1 with :math:`\ell_1` norms for Adam and other steps of unit size per coordinate.
        tau: window of :func:`smooth_grad_norms`; None leaves the norms as they are.
        normalize: divide by the largest rate, as the paper's plots do: a table of factors for :class:`TabulatedLR`, the default because the
            base rate has to be tuned again in any case. False gives :math:`w_tw_{t+1:T}/w_{1:T}`, as the released function does.
        floor: raise norms to this share of their median, in (0, 1]; zeros are then allowed, if the median is > 0. For gradients the median
            counts as a constant. Off by default. One norm near zero takes the whole schedule otherwise.

    Returns:
        Shape ``(T,)``, float32 or wider; the last entry is 0.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument; without ``normalize`` also where the rates are
            too large or too small for the dtype.

    Complexity: O(T) time and memory, and that of the filter.

    Source: Defazio et al., the theorem on the refined schedule and the algorithm; the powers are those of the official code.

    Example:
        >>> refined_schedule(torch.tensor([4.0, 2.0, 1.0, 1.0]), tau=None)  # warm-up without a rule for it
        tensor([0.1406, 0.5000, 1.0000, 0.0000])
    """
    power = _checks.positive_number("power", power)
    if floor is not None:
        _checks.fraction("floor", floor)
        _checks.floating("grad_norms", grad_norms, 1)
        if _checks.known_false(grad_norms >= 0):
            raise ValueError(f"grad_norms must be >= 0 everywhere, got {grad_norms.min():g}")
        median = grad_norms.detach().median()
        if _checks.known_false(median > 0):
            raise ValueError("grad_norms must have a median > 0 where there is a floor, got 0")
        grad_norms = grad_norms.clamp(min=floor * median)
    grad_norms = _positive("grad_norms", grad_norms)
    if tau is not None:
        grad_norms = smooth_grad_norms(grad_norms, tau)
    # Powers of ratios in double precision: the table is short, and squares of float32 norms may leave float32.
    least = grad_norms.min().double()
    weights = (least / grad_norms.double()) ** power
    rates = weights_to_learning_rates(weights.clamp(min=torch.finfo(torch.float64).tiny))
    rates = (rates / rates.max() if normalize else rates * least**-power).to(grad_norms.dtype)
    if _checks.known_false(torch.isfinite(rates) & (rates.max() > 0)):
        raise ValueError(f"grad_norms to the power -{power:g} leave {rates.dtype}, got norms from {least:g}: normalize")
    return rates


def named_schedule(name: str, total_steps: int, *, warmup_steps: int = 0, offset: float = 1.0) -> Tensor:
    r"""A schedule by its name: factors :math:`\le1` of a base rate, for the steps :math:`k=0,\dots,T-1`.

    "constant" 1; "inverse_sqrt" :math:`(1+k/c)^{-1/2}`; "inverse" :math:`(1+k/c)^{-1}`; "stepwise" 1, 0.1 from :math:`k\ge T/2`, 0.01 from
    :math:`k\ge3T/4`; "cosine" :math:`\frac12(1+\cos(\pi k/T))`; "linear" :math:`1-k/T`. With W warm-up steps the first W factors are
    :math:`(k+1)/W`, and the named schedule of length :math:`T-W` follows. "linear" with a short warm-up is the paper's recommendation.

    Args:
        name: one of the six.
        total_steps: T, at least 1.
        warmup_steps: W, from 0 to T - 1.
        offset: :math:`c>0`, in steps; used by "inverse" and "inverse_sqrt".

    Returns:
        Shape ``(T,)``, float64, with maximum 1.

    Raises:
        TypeError, ValueError: for an unknown name or a wrong number, naming the argument.

    Complexity: O(T) time and memory.

    Source: Defazio et al., the schedules of their comparison.

    Example:
        >>> named_schedule("linear", 4)
        tensor([1.0000, 0.7500, 0.5000, 0.2500], dtype=torch.float64)
    """
    length = _checks.positive_int("total_steps", total_steps)
    if _checks.positive_int("warmup_steps", warmup_steps, minimum=0) >= length:
        raise ValueError(f"warmup_steps must be less than total_steps = {length}, got {warmup_steps}")
    offset = _checks.positive_number("offset", offset)
    k = torch.arange(length - warmup_steps, dtype=torch.float64)
    share = k / len(k)
    shapes = {
        "constant": torch.ones_like(k),
        "inverse_sqrt": (1 + k / offset).rsqrt(),
        "inverse": 1 / (1 + k / offset),
        "stepwise": k.new_tensor([1.0, 0.1, 0.01])[(share >= 0.5).long() + (share >= 0.75).long()],
        "cosine": (1 + (torch.pi * share).cos()) / 2,
        "linear": 1 - share,
    }
    if not isinstance(name, str) or name not in shapes:
        raise ValueError(f"name must be one of {', '.join(shapes)}, got {name!r}")
    warmup = torch.arange(1, warmup_steps + 1, dtype=torch.float64) / max(warmup_steps, 1)
    return torch.cat([warmup, shapes[name]])


# ---------------------------------------------------------------------------------------------------------------------
# In a training loop
# ---------------------------------------------------------------------------------------------------------------------


class TabulatedLR(LRScheduler):
    r"""Multiply the base rate of each parameter group by a table: entry ``k`` for update ``k``, counted from 0.

    Call ``step()`` after each update, once for each entry. The last call has no entry of its own and keeps the last factor; one more raises.

    Args:
        optimizer: any :class:`torch.optim.Optimizer`; its rates, floats or tensors, are the base rates.
        table: factors, shape ``(T,)``, finite and at least 0, such as :func:`refined_schedule` or :func:`named_schedule` gives.
        last_epoch: -1 to start; as in :class:`torch.optim.lr_scheduler.LRScheduler`.

    Attributes:
        table: the factors, a list of floats; part of ``state_dict()``, so that a run resumes with the schedule it began.

    Raises:
        TypeError, ValueError: for a wrong optimizer or table, naming the argument; for a step beyond the table.

    Complexity: O(number of groups) a step; O(T) memory.

    Source: Defazio et al., the algorithm: rerun with the refined schedule, its base rate tuned again.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        >>> scheduler = TabulatedLR(optimizer, [0.5, 1.0, 0.25])
        >>> for _ in range(3):
        ...     print(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     scheduler.step()
        1.0
        2.0
        0.5
    """

    def __init__(self, optimizer: Optimizer, table: Tensor | Sequence[float], last_epoch: int = -1):
        try:
            values = torch.as_tensor(table, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"table must hold numbers, got {table!r}") from error
        values = _checks.finite("table", _checks.floating("table", values, 1)).detach()
        if bool((values < 0).any()):
            raise ValueError(f"table must be >= 0 everywhere, got {values.min():g}")
        self.table = values.tolist()
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rates of the current step, one for each group."""
        if self.last_epoch > len(self.table):
            raise ValueError(
                f"table must have an entry for each update, got {len(self.table)} entries and another step"
            )
        factor = self.table[min(self.last_epoch, len(self.table) - 1)]
        return [base * factor for base in self.base_lrs]


class LinearDecayLR(TabulatedLR):
    r"""Linear decay to zero after a short linear warm-up: the schedule to begin with (eq-refined_schedules-linear).

    Update ``k`` has the factor :math:`1-k/T`, so the last one still moves. Attributes, steps and state are those of :class:`TabulatedLR`.

    Args:
        optimizer: any :class:`torch.optim.Optimizer`.
        total_steps: T, the number of updates, at least 1.
        warmup_steps: the first of them, in which the factor rises to 1; from 0 to T - 1.
        last_epoch: -1 to start.

    Raises:
        TypeError, ValueError: for a wrong optimizer or number, naming the argument; for a step beyond the last.

    Source: Defazio et al., corollary of the conversion theorem, and their recommendation.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> LinearDecayLR(optimizer, total_steps=4).table
        [1.0, 0.75, 0.5, 0.25]
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, last_epoch: int = -1):
        super().__init__(optimizer, named_schedule("linear", total_steps, warmup_steps=warmup_steps), last_epoch)


class GradNormRecorder:
    r"""Record the norm of the gradient of all parameters together, step by step.

    Call :meth:`record` after ``backward()``; after ``scaler.unscale_(optimizer)`` where gradients are scaled, and before clipping, since the
    theory's :math:`g_t` is the whole gradient. Weight decay is not in it: torch's optimizers add it later.

    Args:
        parameters: those of the model, or one tensor. Parameters without a gradient do not count.
        ord: 2 for gradient descent; 1 for Adam and its relatives, with ``refined_schedule(..., power=1)``.

    Raises:
        TypeError, ValueError: for wrong parameters or ``ord``, naming the argument; for a record without any gradient.

    Complexity: O(number of parameters) a record, nothing is read back from the device; O(t) memory after t records.

    Source: Defazio et al., the algorithm.

    Example:
        >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> recorder = GradNormRecorder([x])
        >>> x.square().sum().backward()
        >>> recorder.record()
        >>> recorder.norms
        tensor([10.])
    """

    def __init__(self, parameters: Tensor | Iterable[Tensor], ord: int = 2):
        several = [parameters] if isinstance(parameters, Tensor) else parameters
        self.parameters = list(several) if isinstance(several, Iterable) else []
        if not self.parameters or not all(isinstance(p, Tensor) for p in self.parameters):
            raise TypeError("parameters must be one or more tensors, such as model.parameters()")
        if type(ord) is not int or ord not in (1, 2):
            raise ValueError(f"ord must be 1 or 2, got {ord!r}")
        self.ord = ord
        self._norms: list[Tensor] = []

    @torch.no_grad()
    def record(self) -> None:
        """Append the norm of the current gradients; ValueError if there are none."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:
            raise ValueError("parameters must have gradients: call record() after backward()")
        gradients = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        # In half precision a sum of squares overflows or loses its digits.
        norms = [torch.linalg.vector_norm(_checks.wide(g), self.ord).to(gradients[0].device) for g in gradients]
        self._norms.append(torch.linalg.vector_norm(torch.stack(norms), self.ord))

    @property
    def norms(self) -> Tensor:
        """The norms so far, shape ``(t,)``, on the device of the gradients."""
        return torch.stack(self._norms) if self._norms else torch.empty(0)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"norms": self.norms, "ord": self.ord}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the record of a checkpoint; its ``ord`` must be the recorder's."""
        if state["ord"] != self.ord:
            raise ValueError(f"ord must be {self.ord}, as in the recorder, got a state with {state['ord']}")
        self._norms = list(_checks.floating("norms", state["norms"], 1).to(self.parameters[0].device))
