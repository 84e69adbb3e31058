r"""Training a classifier with a loss that is drawn anew for each batch, as a vector of derivatives.

The method of *EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in Classification* (Dai, ICML 2025,
arXiv 2409.00908): positive draws by an inverse Box-Cox transform, sorted into the derivatives of a convex calibrated loss, and the
surrogate that back-propagates them; which vectors are such derivatives, and a loss that has them; the mean of the draws for a large
batch; the fixed losses it competes with; and one-versus-rest for several classes, with the condition under which it is right.
Equation labels are those of the chapter ``classification/ensloss``.

Notation: a *margin* is :math:`z=yf(x)` with :math:`y\in\{-1,1\}`; the loss is :math:`\phi(z)`, its derivative :math:`g=\phi'(z)`;
``box_cox`` is :math:`\lambda`. *Calibrated* (CC) means: convex, differentiable at 0, :math:`\phi'(0)<0`. Logs are natural.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossbook import _checks
from lossbook._blocks import by_rows

# ---------------------------------------------------------------------------------------------------------------------
# Derivatives without a loss
# ---------------------------------------------------------------------------------------------------------------------


def inverse_box_cox(x: Tensor, lam: float) -> Tensor:
    r"""Inverse Box-Cox transform :math:`[1+\lambda x]_+^{1/\lambda}`, :math:`e^x` at :math:`\lambda=0` (eq-ensloss-box-cox).

    Computed as :math:`\exp(\mathrm{log1p}(\lambda x)/\lambda)`: the power loses all digits where :math:`\lambda` is small.

    Args:
        x: any shape, floating point.
        lam: :math:`\lambda\in[-1,1]`.

    Returns:
        Shape of ``x``, in :math:`[0,\infty]`. Where :math:`1+\lambda x\le0` it is 0 for :math:`\lambda>0` and infinite for :math:`\lambda<0`, and
        the gradient may be NaN there: the method does not differentiate its draws.

    Raises:
        TypeError, ValueError: for a wrong type or number, naming the argument.

    Complexity: O(n) time and memory.

    Source: Dai, the random positive numbers of the algorithm; Box and Cox 1964.

    Example:
        >>> inverse_box_cox(torch.tensor([-2.0, 0.0, 1.0]), 1.0)
        tensor([0., 1., 2.])
    """
    _checks.floating("x", x)
    if (
        abs(_checks.number("lam", lam, -1, 1)) < 1e-20
    ):  # lam * x would be lost in float32; the relative error is lam x^2 / 2
        return x.exp()
    return (torch.log1p((lam * x).clamp(min=-1)) / lam).exp()


def calibrated_derivatives(
    margins: Tensor,
    draws: Tensor,
    *,
    box_cox: float = 0.0,
    floor: float | None = -1.0,
    tail: bool = True,
    shift: float = 1e-6,
) -> Tensor:
    r"""The derivatives, at the margins of a batch, of a random convex calibrated loss (eq-ensloss-derivatives).

    The draws become positive numbers :math:`u`, and :math:`-u`, clipped from below at ``floor``, is sorted like the margins: the smallest
    margin gets the steepest slope. Slopes of margins :math:`z>1` are divided by :math:`z`; ``shift`` is subtracted last. Equal margins share
    the mean of their slopes, so that the loss has a derivative there; the authors' code gives them different ones, which is a kink.

    Args:
        margins: shape ``(N,)``, floating point, finite. No gradient flows into them.
        draws: standard normal numbers, shape ``(N,)``, dtype of ``margins``; their order does not matter.
        box_cox: :math:`\lambda\in[-1,1]`.
        floor: steepest slope, below 0; None leaves the slopes as they are, for :math:`\lambda\ge0` only (else some are infinite).
        tail: divide by the margin where it is above 1.
        shift: at least 0; with 0 and :math:`\lambda>0` a slope may be zero, which is not calibrated at margins :math:`z\le0`.

    Returns:
        Shape ``(N,)``: negative numbers that do not decrease with the margin.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Complexity: O(N log N) time, two sorts; O(N) memory.

    Source: Dai, algorithm; the authors' code for the order of clip, tail and shift, and for their defaults.

    Example:
        >>> calibrated_derivatives(torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.0, 1.0, -1.0]), shift=0)
        tensor([-1.0000, -1.0000, -0.1839])
    """
    _checks.finite("margins", _checks.floating("margins", margins, 1))
    _checks.finite("draws", _checks.like("draws", draws, "margins", margins, 1))
    _check_options(box_cox, floor, shift)
    return _derivatives(margins.detach(), draws.detach(), box_cox, floor, tail, shift)


def _derivatives(z: Tensor, draws: Tensor, box_cox: float, floor: float | None, tail: bool, shift: float) -> Tensor:
    slopes = -inverse_box_cox(draws, box_cox)
    if floor is not None:
        slopes = slopes.clamp(min=floor)
    order = _argsort(z)
    z_sorted = z.gather(0, order)
    slopes = _tied_means(z_sorted, _sort(slopes))
    if tail:
        slopes = slopes / z_sorted.clamp(min=1)
    return torch.empty_like(slopes).scatter(0, order, slopes - shift)


def _memory(x: Tensor) -> np.ndarray | None:
    """A NumPy view of a long CPU tensor, whose sort is several times as fast as torch's; None where there is no such view."""
    if len(x) < 2**14 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    try:
        return x.numpy()
    except (RuntimeError, TypeError):  # a batched tensor of vmap; bfloat16
        return None


def _sort(x: Tensor) -> Tensor:
    memory = _memory(x)
    return x.sort().values if memory is None else torch.from_numpy(np.sort(memory))


def _argsort(x: Tensor) -> Tensor:
    memory = _memory(x)
    # It need not be stable: equal margins share their slopes.
    return x.argsort() if memory is None else torch.from_numpy(np.argsort(memory))


def _check_options(box_cox: float, floor: float | None, shift: float) -> None:
    _checks.number("box_cox", box_cox, -1, 1)
    _check_floor(floor, box_cox)
    _checks.number("shift", shift, 0)


def _check_floor(floor: float | None, box_cox: float) -> None:
    if floor is None:
        if box_cox < 0:
            raise ValueError(
                f"floor must be a number where box_cox < 0, as slopes may be infinite; box_cox is {box_cox}"
            )
    elif _checks.number("floor", floor) >= 0:
        raise ValueError(f"floor must be < 0, got {floor}")


def _tied_means(z: Tensor, slopes: Tensor) -> Tensor:
    """Sorted ``slopes``, with the mean over each run of equal ``z``; shapes do not depend on values, so that it compiles."""
    if _checks.known_false((z[1:] == z[:-1]).any()):
        return slopes
    run = F.pad((z[1:] != z[:-1]).long().cumsum(0), (1, 0))
    empty = torch.zeros_like(slopes)
    total, count = (empty.scatter_add(0, run, part) for part in (slopes, torch.ones_like(slopes)))
    # A rounded mean of equal slopes need not be their value, and one that leaves its run would break the order.
    least, most = (empty.scatter_reduce(0, run, slopes, kind, include_self=False) for kind in ("amin", "amax"))
    return (total / count.clamp(min=1)).clamp(least, most).gather(0, run)


def drawn_slopes(
    margins: Tensor,
    draws: Tensor,
    *,
    knots: tuple[float, float, int] = (-1.0, 3.0, 16),
    box_cox: float = 0.0,
    floor: float = -1.0,
    shift: float = 1e-6,
) -> Tensor:
    r"""Slopes of a random loss that is drawn *before* the margins are seen (eq-ensloss-first): a variant that is not in the paper.

    The sorted draws are the slopes at fixed knots, with straight lines between them; behind 1 the slope is divided by the margin, and behind the
    last knot once more. Given the draws this is one function of the margin, whatever the batch: :math:`\phi` is convex, differentiable
    everywhere, calibrated and bounded below, so that thm-ensloss-mean and thm-ensloss-one-versus-rest hold for its mean as they stand.

    Args:
        margins: any shape, floating point, finite. No gradient flows into them.
        draws: standard normal numbers, shape ``(n,)``, dtype of ``margins``.
        knots: the first knot, the last one, at least 1 and above the first, and their number n > 1; equally spaced.
        box_cox: :math:`\lambda\in[-1,1]`.
        floor: steepest slope, below 0.
        shift: subtracted from the slopes at the knots, above 0.

    Returns:
        Shape of ``margins``: negative numbers that do not decrease with the margin; 0 where they underflow, in float32 at margins beyond 1e19.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Complexity: O(N + n log n) time, O(N + n) memory: no sort of the margins.

    Source: derived in the chapter.

    Example:
        >>> drawn_slopes(torch.tensor([-5.0, 0.0, 3.0, 6.0]), torch.tensor([0.0, -1.0, -2.0]), knots=(-1, 3, 3), shift=1e-9)
        tensor([-1.0000, -0.6839, -0.0451, -0.0113])
    """
    _checks.finite("margins", _checks.floating("margins", margins))
    _check_knots(knots, box_cox, floor, shift)
    _checks.finite("draws", _checks.floating("draws", draws, 1))
    if draws.shape != (knots[2],):
        raise ValueError(f"draws must have shape ({knots[2]},), one for each knot, got {tuple(draws.shape)}")
    if draws.dtype != margins.dtype:
        raise TypeError(f"draws must have the dtype of margins, {margins.dtype}, got {draws.dtype}")
    slope = _drawn(draws.detach(), knots, box_cox, floor, shift)
    (slopes,) = by_rows(lambda z: (slope(z),), margins.detach().flatten())
    return slopes.view_as(margins)


def _drawn(
    draws: Tensor, knots: tuple[float, float, int], box_cox: float, floor: float, shift: float
) -> Callable[[Tensor], Tensor]:
    """The slope of the drawn loss, a function of the margin."""
    first, last, number = knots
    left = _sort(-inverse_box_cox(draws, box_cox).clamp(max=-floor)) - shift
    right = torch.cat([left[1:], left[-1:]])

    def slope(z: Tensor) -> Tensor:
        place = ((z - first) * ((number - 1) / (last - first))).clamp(0, number - 1)
        knot = place.int().flatten()  # index_select takes less time than an index with brackets
        low, high = (at.index_select(0, knot).view_as(z) for at in (left, right))
        z = z.clamp(min=1)
        return torch.lerp(low, high, place.frac()) / z / (z / last).clamp(min=1)

    return slope


def _check_knots(knots: tuple[float, float, int], box_cox: float, floor: float | None, shift: float) -> None:
    try:
        first, last, number = knots
    except (TypeError, ValueError):
        raise TypeError(f"knots must be (first, last, number), got {knots!r}") from None
    first, last = _checks.number("knots: first", first), _checks.number("knots: last", last)
    if last < 1 or first >= last:
        raise ValueError(f"knots must end at 1 or above, and begin below their end, got first {first} and last {last}")
    _checks.positive_int("knots: number", number, minimum=2)
    _check_options(box_cox, floor, _checks.positive_number("shift", shift))
    if floor is None:
        raise ValueError("floor must be a number where slopes are drawn at knots, so that their mean exists")


def expected_derivative(quantile: Tensor, *, box_cox: float = 0.0, floor: float | None = -1.0) -> Tensor:
    r"""What a slope tends to in a large batch, at the margin that has this quantile in it (eq-ensloss-limit).

    :math:`\max\{\mathtt{floor},-\mathrm{BC}^{-1}_\lambda(\Phi_N^{-1}(1-q))\}`, without tail factor and shift.

    Args:
        quantile: :math:`q=F(z)`, the share of margins below, any shape, floating point, in [0, 1].
        box_cox: :math:`\lambda\in[-1,1]`.
        floor: as in :func:`calibrated_derivatives`.

    Returns:
        Shape of ``quantile``, at most 0, not decreasing in it.

    Raises:
        TypeError, ValueError: for a wrong type or number, naming the argument.

    Complexity: O(n) time and memory.

    Source: derived in the chapter.

    Example:
        >>> expected_derivative(torch.tensor([0.25, 0.75, 0.9]))
        tensor([-1.0000, -0.5094, -0.2776])
    """
    _checks.floating("quantile", quantile)
    if _checks.known_false((quantile >= 0) & (quantile <= 1)):
        raise ValueError(f"quantile must lie in [0, 1], got {quantile.min()} to {quantile.max()}")
    _check_options(box_cox, floor, 0)
    slopes = -inverse_box_cox(-torch.special.ndtri(quantile), box_cox)
    return slopes if floor is None else slopes.clamp(min=floor)


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------


def signed_margins(logits: Tensor, target: Tensor) -> Tensor:
    r"""Margins :math:`y_kf_k(x)` of binary problems, or of the one-versus-rest problems of a multiclass one (eq-ensloss-one-versus-rest).

    Args:
        logits: shape ``(B,)`` or ``(B, K)``, floating point, finite.
        target: of the shape of ``logits`` with values 0 and 1 (bool, int64 or floating point): each logit is a binary problem of its own. Or
            class indices, int64, shape ``(B,)``, beside logits ``(B, K)`` with K > 1: class k against the rest. Logits ``(B, 1)`` may have
            a binary target of shape ``(B,)``.

    Returns:
        Shape of ``logits``, float32 or wider: ``+logits`` where the target is 1, or the class is k, and ``-logits`` elsewhere.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument. Where values are not read, in a compiled graph, under
            ``vmap`` and on an accelerator, the margins of a wrong target are NaN.

    Complexity: O(BK) time and memory.

    Source: Dai, section 2, for two classes; Rifkin and Klautau 2004 for several.

    Example:
        >>> signed_margins(torch.tensor([[0.2, -1.0, 3.0]]), torch.tensor([2]))
        tensor([[-0.2000,  1.0000,  3.0000]])
    """
    logits, target = _checked(logits, target)
    return _sign(logits, target) * logits


def _checked(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The logits in float32 or wider, and the target: classes ``(B,)``, or in the shape of the logits."""
    _checks.finite("logits", _checks.floating("logits", logits))
    if logits.ndim not in (1, 2):
        raise ValueError(f"logits must have shape (B,) or (B, K), got {tuple(logits.shape)}")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if logits.ndim == 2 and logits.shape[1] > 1 and target.ndim == 1:
        return _checks.wide(logits), _checks.indices("target", target, logits.shape[1], len(logits))
    if not (target.is_floating_point() or target.dtype in (torch.bool, torch.int64)):
        raise TypeError(f"target must be bool, int64 or floating point, got {target.dtype}")
    if target.ndim == 1 and logits.shape == (len(target), 1):
        target = target[:, None]
    if target.shape != logits.shape:
        raise ValueError(
            f"target must have the shape of logits, {tuple(logits.shape)}, or hold a class for each row, got {tuple(target.shape)}"
        )
    if _checks.known_false((target == 0) | (target == 1)):
        wrong = target[(target != 0) & (target != 1)][0]
        raise ValueError(f"target must hold 0 and 1 only, got {wrong}; labels -1 and 1 become (label + 1) / 2")
    return _checks.wide(logits), target


def _sign(logits: Tensor, target: Tensor) -> Tensor:
    """1 where the target is 1, or the class is the target, and -1 elsewhere; NaN for a wrong target, where values were not read."""
    if target.ndim == logits.ndim:
        return torch.where(target == 1, 1.0, torch.where(target == 0, -1.0, torch.nan)).to(logits.dtype)
    rest = torch.where((target >= 0) & (target < logits.shape[1]), -1.0, torch.nan).to(logits.dtype)
    positive = target[:, None] == torch.arange(logits.shape[1], device=target.device)
    return torch.where(positive, logits.new_ones(()), rest[:, None])


def ens_loss(
    logits: Tensor,
    target: Tensor,
    *,
    box_cox: float = 0.0,
    floor: float | None = -1.0,
    tail: bool = True,
    shift: float = 1e-6,
    knots: tuple[float, float, int] | None = None,
    draws: Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Surrogate whose gradient is that of a random calibrated loss (eq-ensloss-surrogate), drawn anew in each call.

    :math:`\sum_ig_iz_i` with the derivatives :math:`g_i` of :func:`calibrated_derivatives` held constant. **Its value is not a loss**: it may rise
    while the classifier gets better, and only its gradient has a meaning. Second derivatives are zero.

    For class indices it is one-versus-rest, and the decision is the arg max of the logits. All B * K margins share *one* random loss. The mean of
    random losses finds the most probable class if it is convex, calibrated, bounded below, differentiable everywhere, the same for all classes, *and
    does not depend on the network* (thm-ensloss-one-versus-rest). The sort within the batch does not meet the last condition; with many classes, too,
    all margins that matter are clipped at ``floor``, and nothing random is left. With ``knots`` all conditions hold (prop-ensloss-first).

    Args:
        logits: shape ``(B,)`` or ``(B, K)``, floating point, finite.
        target: 0/1 of the shape of ``logits``, or class indices ``(B,)`` beside ``(B, K)``, as in :func:`signed_margins`.
        box_cox: :math:`\lambda\in[-1,1]` of :func:`inverse_box_cox`.
        floor: steepest slope, below 0, or None.
        tail: divide the slopes of margins above 1 by the margin.
        shift: subtracted from each slope, at least 0.
        knots: None sorts the draws within the batch, as the paper does; (first, last, number) draws the loss before the batch is seen, by
            :func:`drawn_slopes`, for example (-1.0, 3.0, 16). Its tail is always on.
        draws: the normal numbers, with as many elements as ``logits``, or as there are knots, in any shape,
            as they are sorted; None draws them.
        generator: for the draws, on the device of ``logits``; None is the default one.
        reduction: "none", "mean" or "sum" over the batch; the terms of a row are added.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none"; float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape, number or value, naming the argument.

    Complexity: O(N log N) time and O(N) memory for N logits; O(N + n log n) time with n knots, of which ``torch.compile`` makes one pass.

    Source: Dai, algorithm; several classes by the chapter's reduction, which is not in the paper.

    Example:
        >>> logits = torch.tensor([0.5, 1.0, -2.0, 0.1], requires_grad=True)
        >>> draws = torch.tensor([0.0, -1.0, 0.5, -2.0])
        >>> ens_loss(logits, torch.tensor([1, 0, 0, 1]), draws=draws, reduction="sum").backward()
        >>> logits.grad
        tensor([-0.3679,  1.0000,  0.0677, -1.0000])
    """
    if knots is None:
        _check_options(box_cox, floor, shift)
    else:
        _check_knots(knots, box_cox, floor, shift)
        if not tail:
            raise ValueError("tail must be True with knots: without it the loss need not be bounded below")
    logits, target = _checked(logits, target)
    fixed = logits.detach()
    count = fixed.numel() if knots is None else knots[2]
    if draws is None:
        draws = torch.randn(count, dtype=fixed.dtype, device=fixed.device, generator=generator)
    else:
        _checks.finite("draws", _checks.floating("draws", draws))
        if draws.numel() != count:
            per = "logit" if knots is None else "knot"
            raise ValueError(f"draws must have {count} elements, one for each {per}, got {draws.numel()}")
        if draws.dtype != fixed.dtype:
            raise TypeError(f"draws must have the dtype of the margins, {fixed.dtype}, got {draws.dtype}")
    draws = draws.detach().flatten()
    if knots is None:
        sign = _sign(fixed, target)
        weights = sign * _derivatives((sign * fixed).flatten(), draws, box_cox, floor, tail, shift).view_as(sign)
    else:
        slope = _drawn(draws, knots, box_cox, floor, shift)

        def weight(fixed: Tensor, target: Tensor) -> tuple[Tensor]:
            sign = _sign(fixed, target)
            return (sign * slope(sign * fixed),)

        (weights,) = by_rows(weight, fixed, target)
    terms = weights * logits
    return _checks.reduced(terms if terms.ndim == 1 else terms.sum(1), reduction)


class EnsLoss(nn.Module):
    r""":func:`ens_loss` as a criterion, with a :math:`\lambda` that may itself be drawn anew.

    In data-parallel training each process sorts within its own part of the batch, with draws of its own if the processes are seeded differently.
    The expected gradient is then that of one process with such a part as its batch.

    Args:
        box_cox: the first :math:`\lambda`.
        redraw_every: calls in training mode after which :math:`\lambda` is drawn again; None never does. The authors' code can redraw it
            for each epoch: call :meth:`redraw` there.
        floor, tail, shift, knots: as in :func:`ens_loss`.
        generator: for all draws, on the device of the logits; None is the default one.

    Attributes:
        box_cox: the current :math:`\lambda`; it and the number of calls are part of ``state_dict()``, the generator's state is
            not: save it beside, for a run that resumes exactly.

    Raises:
        TypeError, ValueError: for a wrong number, naming the argument.

    Source: Dai, algorithm and the authors' trainer.

    Example:
        >>> criterion = EnsLoss(redraw_every=100)
        >>> logits, target = torch.randn(8, requires_grad=True), torch.randint(2, (8,))
        >>> criterion(logits, target).backward()
        >>> bool((logits.grad.sign() == 1 - 2 * target).all())
        True
    """

    def __init__(
        self,
        box_cox: float = 0.0,
        redraw_every: int | None = None,
        *,
        floor: float | None = -1.0,
        tail: bool = True,
        shift: float = 1e-6,
        knots: tuple[float, float, int] | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.box_cox = _checks.number("box_cox", box_cox, -1, 1)
        self.redraw_every = None if redraw_every is None else _checks.positive_int("redraw_every", redraw_every)
        _check_floor(floor, -1 if redraw_every else box_cox)
        self.floor, self.tail, self.shift = floor, tail, _checks.number("shift", shift, 0)
        if knots is not None:
            _check_knots(knots, box_cox, floor, shift)
            if not tail:
                raise ValueError("tail must be True with knots: without it the loss need not be bounded below")
        self.knots, self.generator = knots, generator
        self.calls = 0

    def redraw(self) -> float:
        r"""Draw :math:`\lambda` uniformly from [-1, 1], and give it back."""
        _check_floor(self.floor, -1)
        device = "cpu" if self.generator is None else self.generator.device
        self.box_cox = 2 * torch.rand((), generator=self.generator, device=device).item() - 1
        return self.box_cox

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The mean surrogate of a batch, shape ``()``."""
        if self.redraw_every is not None and self.training:
            if self.calls and self.calls % self.redraw_every == 0:
                self.redraw()
            self.calls += 1
        options = dict(floor=self.floor, tail=self.tail, shift=self.shift, knots=self.knots, generator=self.generator)
        return ens_loss(logits, target, box_cox=self.box_cox, **options)

    def get_extra_state(self) -> dict[str, float]:
        return {"box_cox": self.box_cox, "calls": self.calls}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.box_cox, self.calls = state["box_cox"], state["calls"]


# ---------------------------------------------------------------------------------------------------------------------
# The conditions
# ---------------------------------------------------------------------------------------------------------------------


def is_calibrated_vector(margins: Tensor, derivatives: Tensor, *, smooth: bool = False, atol: float = 0.0) -> bool:
    r"""Whether some convex loss, differentiable at 0 with :math:`\phi'(0)<0`, has these derivatives (prop-ensloss-vectors).

    They must not decrease with the margin, must be negative at margins :math:`z\le0`, and equal where several margins are 0. At other ties a
    derivative is any subgradient.

    Args:
        margins: shape ``(N,)``, floating point, finite.
        derivatives: shape ``(N,)``, dtype of ``margins``, finite.
        smooth: ask for a loss that is differentiable everywhere: derivatives are equal wherever margins are.
        atol: by how much a derivative may fall, or equal margins differ, through rounding.

    Returns:
        A bool.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Complexity: O(N log N) time, O(N) memory.

    Source: derived in the chapter.

    Example:
        >>> z = torch.tensor([0.5, -1.0, 2.0])
        >>> is_calibrated_vector(z, torch.tensor([-0.5, -1.0, 0.2])), is_calibrated_vector(z, torch.tensor([-1.0, -0.5, 0.2]))
        (True, False)
    """
    z, g = _sorted_pairs(margins, derivatives)
    _checks.number("atol", atol, 0)
    steps, tied = g.diff(), z.diff() == 0
    if not smooth:
        tied &= z[1:] == 0
    return bool((steps >= -atol).all() and (steps[tied] <= atol).all() and (g[z <= 0] < 0).all())


def _sorted_pairs(margins: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs in the order of the margins, and of the derivatives where margins tie."""
    z = _checks.finite("margins", _checks.floating("margins", margins, 1)).detach()
    g = _checks.finite("derivatives", _checks.like("derivatives", derivatives, "margins", margins, 1)).detach()
    order = g.argsort()
    order = order[z[order].argsort(stable=True)]
    return z[order], g[order]


def _offence(margins: Tensor, derivatives: Tensor) -> str:
    """Where the derivatives are not those of a smooth calibrated loss, in words."""
    z, g = _sorted_pairs(margins, derivatives)
    wrong = ((g.diff() < 0) | ((z.diff() == 0) & (g.diff() > 0))).nonzero()
    if len(wrong):
        i = wrong[0].item()
        return f"{g[i]:g} and {g[i + 1]:g} at the margins {z[i]:g} and {z[i + 1]:g}"
    i = ((z <= 0) & (g >= 0)).nonzero()[0].item()
    return f"{g[i]:g} at the margin {z[i]:g}"


@dataclass(frozen=True)
class PiecewiseQuadratic:
    r"""A loss whose derivative is linear between knots and constant outside of them, with :math:`\phi(0)=0`.

    Args:
        knots: increasing positions, float64, shape ``(n,)`` with n > 1, finite.
        slopes: the derivative there, float64, shape ``(n,)``, finite.

    Call it for :math:`\phi(z)`, float64 in the shape of ``z``; autograd gives its derivative.

    Raises:
        TypeError, ValueError: for a wrong type or shape, or knots that do not increase, naming the argument.

    Complexity: O(n + M log n) time for M values of the loss, O(M log n) for M derivatives.

    Source: the chapter's construction (prop-ensloss-vectors).

    Example:
        >>> loss = PiecewiseQuadratic(torch.tensor([0.0, 1.0]).double(), torch.tensor([-1.0, 0.0]).double())
        >>> loss(torch.tensor([-1.0, 0.0, 1.0, 2.0])).tolist(), loss.derivative(torch.tensor([0.5])).tolist()
        ([1.0, 0.0, -0.5, -0.5], [-0.5])
    """

    knots: Tensor
    slopes: Tensor

    def __post_init__(self):
        _checks.finite("knots", _checks.floating("knots", self.knots, 1))
        _checks.finite("slopes", _checks.like("slopes", self.slopes, "knots", self.knots, 1))
        if len(self.knots) < 2 or _checks.known_false(self.knots.diff() > 0):
            raise ValueError(f"knots must be at least 2 positions that increase, got {self.knots.tolist()}")

    def derivative(self, z: Tensor) -> Tensor:
        r""":math:`\phi'(z)`, float64 in the shape of ``z``."""
        j, inside = self._locate(_checks.floating("z", z))
        slopes = self.slopes.to(z.device)
        return torch.lerp(slopes[j], slopes[j + 1], inside)

    def __call__(self, z: Tensor) -> Tensor:
        return self._integral(_checks.floating("z", z)) - self._integral(z.new_zeros(()))

    def _locate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The segment of each ``z`` (the nearest one outside), and how far along it, in [0, 1]."""
        knots, z = self.knots.to(z.device), z.double()
        j = (torch.searchsorted(knots, z.detach().contiguous(), right=True) - 1).clamp(0, len(knots) - 2)
        return j, ((z - knots[j]) / (knots[j + 1] - knots[j])).clamp(0, 1)

    def _integral(self, z: Tensor) -> Tensor:
        """An antiderivative of the slope, zero at the first knot."""
        knots, slopes, z = self.knots.to(z.device), self.slopes.to(z.device), z.double()
        width = knots.diff()
        start = F.pad((width * (slopes[1:] + slopes[:-1]) / 2).cumsum(0), (1, 0))
        j, inside = self._locate(z)
        curved = width[j] * inside * (slopes[j] + inside * (slopes[j + 1] - slopes[j]) / 2)
        below, above = (z - knots[0]).clamp(max=0), (z - knots[-1]).clamp(min=0)
        return start[j] + curved + slopes[0] * below + slopes[-1] * above


def interpolating_loss(margins: Tensor, derivatives: Tensor, *, rise: float = 1.0) -> PiecewiseQuadratic:
    r"""A loss with these derivatives: convex, differentiable everywhere, :math:`\phi'(0)<0`, bounded below (prop-ensloss-vectors).

    Its derivative joins the given ones by straight lines. It has a knot at 0, on the line, or lower where the line is above half the derivative of the nearest
    margin on the left (at that half; at -1 where no margin lies left and the first derivative is not negative). Behind the last margin
    it rises to 0 if it is negative there.

    Args:
        margins: shape ``(N,)``, floating point, finite.
        derivatives: shape ``(N,)``, dtype of ``margins``, calibrated; equal where margins are.
        rise: how far behind the last margin, or behind 0 if that lies further right, the derivative is 0; above 0. Where this is lost in a large
            margin, the next number of float64.

    Returns:
        The loss, a callable with a method ``derivative``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument; for derivatives that no such loss has.

    Complexity: O(N log N) time, O(N) memory, and those of :class:`PiecewiseQuadratic` for values of the loss.

    Source: the proof in the chapter.

    Example:
        >>> loss = interpolating_loss(torch.tensor([-1.0, 2.0]), torch.tensor([-1.0, 0.5]))
        >>> loss.derivative(torch.tensor([-3.0, -1.0, 0.0, 2.0])).tolist()
        [-1.0, -1.0, -0.5, 0.5]
    """
    _checks.positive_number("rise", rise)
    if not is_calibrated_vector(margins, derivatives, smooth=True):
        needed = "not decrease with the margin, be negative at margins <= 0, and be equal where margins are equal"
        raise ValueError(f"derivatives must {needed}, got {_offence(margins, derivatives)}")
    z, g = (part.double() for part in _sorted_pairs(margins, derivatives))
    first = F.pad(z.diff() != 0, (1, 0), value=True)
    z, g = z[first], g[first]
    left = int((z <= 0).sum())  # so many knots are not to the right of 0
    if left == 0:
        at_zero = g[0].item() if g[0] < 0 else -1.0
    elif left == len(z):
        at_zero = g[-1].item()
    else:
        line = torch.lerp(g[left - 1], g[left], z[left - 1] / (z[left - 1] - z[left])).item()
        at_zero = min(line, g[left - 1].item() / 2)
    if not (z == 0).any():
        z, g = (torch.cat([p[:left], p.new_tensor([new]), p[left:]]) for p, new in ((z, 0.0), (g, at_zero)))
    if g[-1] < 0:
        end = torch.maximum(z[-1:] + rise, torch.nextafter(z[-1:], z.new_tensor([math.inf])))
        z, g = torch.cat([z, end]), F.pad(g, (0, 1))
    return PiecewiseQuadratic(z, g)


# ---------------------------------------------------------------------------------------------------------------------
# Fixed losses
# ---------------------------------------------------------------------------------------------------------------------

_E = math.e
_MARGIN_LOSSES = {
    "logistic": lambda z: -F.logsigmoid(z),
    "hinge": lambda z: F.relu(1 - z),
    "exponential": lambda z: (-z).exp(),
    "squared_hinge": lambda z: F.relu(1 - z).square(),
    "perceptron": lambda z: F.relu(-z),
    "sigmoid": lambda z: torch.sigmoid(-z),
    # A hinge up to 1, and behind it a tail that starts with the same slope, -1.
    "exponential_tail": lambda z: torch.where(z <= 1, 1 - z, torch.expm1(1 - z.clamp(min=1))),
    "inverse_tail": lambda z: torch.where(z <= 1, 1 - z, 1 / z.clamp(min=1) - 1),
    "inverse_log_tail": lambda z: torch.where(z <= 1, 1 - z, _E / torch.log(z.clamp(min=1) + (_E - 1)) - _E),
    "log_tail": lambda z: torch.where(z <= 1, 1 - z, -torch.log(z.clamp(min=1))),
}


def margin_loss(margins: Tensor, kind: str = "logistic", *, reduction: str = "mean") -> Tensor:
    r"""A fixed loss of the margin :math:`z` (the table of the chapter).

    "logistic" :math:`\log(1+e^{-z})`, "hinge" :math:`(1-z)_+`, "exponential" :math:`e^{-z}`, "squared_hinge" :math:`(1-z)_+^2`; "perceptron"
    :math:`(-z)_+`, not calibrated; "sigmoid" :math:`1/(1+e^z)`, not convex; and :math:`1-z` up to 1 with the tails "exponential_tail"
    :math:`e^{1-z}-1`, "inverse_tail" :math:`1/z-1`, "inverse_log_tail" :math:`e/\log(z+e-1)-e` and "log_tail" :math:`-\log z`, which is unbounded.

    Args:
        margins: shape ``(B,)`` or ``(B, K)``, floating point. "exponential" overflows float32 below -88, as its value does.
        kind: a name above.
        reduction: "none", "mean" or "sum" over the batch; the terms of a row are added.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none".

    Raises:
        TypeError, ValueError: for a wrong type, shape or name, naming the argument.

    Complexity: O(n) time and memory.

    Source: Bartlett, Jordan and McAuliffe 2006; the tails are those of Dai's appendix, with the sign of the exponential one put right.

    Example:
        >>> margin_loss(torch.tensor([0.0, 2.0]), "hinge", reduction="none")
        tensor([1., 0.])
    """
    _checks.floating("margins", margins)
    if margins.ndim not in (1, 2):
        raise ValueError(f"margins must have shape (B,) or (B, K), got {tuple(margins.shape)}")
    if not isinstance(kind, str) or kind not in _MARGIN_LOSSES:
        raise ValueError(f"kind must be one of {', '.join(_MARGIN_LOSSES)}, got {kind!r}")
    terms = _MARGIN_LOSSES[kind](margins)
    return _checks.reduced(terms if terms.ndim == 1 else terms.sum(1), reduction)
