r"""Losses that are worst cases over the classes: from the support vector machine over cross-entropy to losses that survive label noise.

The method of *Label Distributionally Robust Losses for Multi-class Classification* (Zhu, Ying and Yang, ICML 2023, arXiv 2112.14869): the
LDR-KL loss with its exact limits, the worst-case weights behind it, the adaptive loss ALDR-KL whose temperature is a fixed point for every
example, the criterion under which that point is unique, the training loss with one stored temperature for each sample, the normalization
of scores, and both kinds of label noise. Equation labels are those of the chapter ``classification/ldr``.

Notation: ``logits`` (B, K) holds scores :math:`f_k`, ``target`` (B,) the label :math:`y`; ``lam`` is the temperature :math:`\lambda`, ``margin``
is :math:`c`, and :math:`v_k=f_k-f_y+c\,\mathbb 1[k\ne y]`. ``lambda_0`` is :math:`\lambda_0`, ``alpha`` is :math:`\bar\alpha`, the strength in units of
:math:`\log K/\lambda_0`. :math:`\mathrm{KL}(p)` is the divergence of p from uniform. Logs are natural.
"""

import math
from functools import partial
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossbook import _checks
from lossbook._blocks import by_rows

NORMALIZATIONS = ("softplus_mean", "mean_abs", None)
_LARGE = 100.0  # above this temperature log(mean(exp)) loses digits, and log1p(mean(expm1)) keeps them
_TINY = 1e-30  # scores divided by less would overflow; a temperature this small changes the loss by less than 1e-28
_UNROLLED = 16  # steps of the solver in a compiled graph

# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def _scores(logits: Tensor) -> Tensor:
    """The logits in float32 or wider, if they are finite and have a column for each of at least two classes."""
    _checks.floating("logits", logits, 2)
    if logits.shape[1] < 2:
        raise ValueError(f"logits must have at least 2 columns, one for each class, got shape {tuple(logits.shape)}")
    _checks.finite("logits", logits)
    return _checks.wide(logits)


def _margin(scores: Tensor, target: Tensor | None, margin: float, *, needs_target: bool = True) -> float:
    """``margin`` as a float, if it is at least 0 and the target holds a class for each row; without a margin there may be no target."""
    margin = _checks.number("margin", margin, 0)
    if needs_target or target is not None:
        _checks.indices("target", target, scores.shape[1], len(scores))
    elif margin:
        raise ValueError("target must be given with margin > 0: the margin spares the label's class")
    return margin


def _shifted(scores: Tensor, target: Tensor | None, margin: float) -> Tensor:
    r"""The scores with :math:`c` taken off the label's: then :math:`v_k=s_k-s_y` (eq-ldr-shift)."""
    return scores.scatter_add(1, target[:, None], scores.new_full((len(target), 1), -margin)) if margin else scores


def _in_place(tensor: Tensor, method: str, *arguments) -> Tensor:
    """Call a method that changes the tensor; under vmap, if only the arguments are batched, the one that makes a new tensor."""
    try:
        return getattr(tensor, f"{method}_")(*arguments)
    except RuntimeError:
        return getattr(tensor, method)(*arguments)


def _tempered(scores: Tensor, target: Tensor, lam: float | Tensor, margin: float, *, own: bool = False) -> Tensor:
    """:func:`_shifted` over the temperature, in one new tensor where that can be, or in ``scores`` itself if they are the caller's own."""
    tempered = _in_place(scores, "div", _column(lam)) if own else scores / _column(lam)
    if not margin:
        return tempered
    shift = scores.new_full((len(target), 1), -margin) / _column(lam)
    return _in_place(tempered, "scatter_add", 1, target[:, None], shift)


def _temperature(lam: float | Tensor, rows: int) -> float | Tensor:
    """``lam``, if it is a number in [0, inf], or a tensor of such numbers with shape () or (rows,)."""
    if not isinstance(lam, Tensor):
        if isinstance(lam, bool) or not isinstance(lam, Real):
            raise TypeError(f"lam must be a number or a tensor, got {type(lam).__name__}")
        if not lam >= 0:
            raise ValueError(f"lam must lie in [0, inf], got {lam}")
        return float(lam)
    if not lam.is_floating_point():
        raise TypeError(f"lam must be a floating-point tensor, got {lam.dtype}")
    if lam.ndim and lam.shape != (rows,):
        raise ValueError(f"lam must have shape () or ({rows},), got {tuple(lam.shape)}")
    if _checks.known_false(lam >= 0):
        raise ValueError(f"lam must lie in [0, inf] everywhere, got {lam.detach()}")
    return lam


def _strength(lambda_0: float, alpha: float) -> tuple[float, float]:
    """``lambda_0`` and ``alpha``, if the temperature that they allow stays above zero."""
    lambda_0 = _checks.positive_number("lambda_0", lambda_0)
    if _checks.positive_number("alpha", alpha) <= 1:
        raise ValueError(f"alpha must be greater than 1, or a temperature may reach 0, got {alpha}")
    return lambda_0, float(alpha)


def _column(lam: float | Tensor) -> float | Tensor:
    """The temperature, shaped to divide a ``(B, K)`` tensor."""
    return lam[:, None] if isinstance(lam, Tensor) and lam.ndim == 1 else lam


def normalize_scores(logits: Tensor, method: str | None) -> Tensor:
    r"""Scores on a scale of their own, as the authors' training does; the argmax stays (eq-ldr-normalize).

    Args:
        logits: shape ``(B, K)``, floating point.
        method: "softplus_mean" gives :math:`\log(1+e^{f_k})` over its mean in the row; "mean_abs" gives :math:`f_k` over the mean of
            :math:`|f_j|`; None gives the logits. A mean below 1e-12 counts as 1e-12. The gradient flows through the mean.

    Returns:
        Shape ``(B, K)``, in float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape or method, naming the argument.

    Complexity: O(BK) time and memory.

    Source: Zhu, Ying and Yang's code (Optimization-AI/ICML2023_LDR).

    Example:
        >>> normalize_scores(torch.tensor([[3.0, -1.0]]), "mean_abs")
        tensor([[ 1.5000, -0.5000]])
    """
    return _normalized(_scores(logits), _known("method", method))


def _known(name: str, method: str | None) -> str | None:
    if method not in NORMALIZATIONS:
        raise ValueError(f"{name} must be one of {NORMALIZATIONS}, got {method!r}")
    return method


def _normalized(scores: Tensor, method: str | None) -> Tensor:
    if method is None:
        return scores
    scores = F.softplus(scores) if method == "softplus_mean" else scores
    size = torch.linalg.vector_norm(scores, 1, dim=1, keepdim=True) / scores.shape[1]
    return scores / size.clamp(min=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# One temperature for all
# ---------------------------------------------------------------------------------------------------------------------


def _interior(scores: Tensor, target: Tensor, lam: float | Tensor, margin: float, large: bool) -> Tensor:
    r""":math:`\lambda\log\frac1K\sum_ke^{v_k/\lambda}` by row, :math:`0<\lambda<\infty`; ``large`` keeps the digits of a large one."""
    if not large:
        tempered = _tempered(scores, target, lam, margin)
        cross_entropy = F.cross_entropy(tempered, target, ignore_index=_checks.NO_CLASS, reduction="none")
        return lam * (cross_entropy - math.log(scores.shape[1]))
    scores = _shifted(scores, target, margin)
    largest = scores.amax(1, keepdim=True)
    below = (scores - largest) / _column(lam)
    mean = torch.expm1(below).mean(1)  # near 0 if nearly all classes count, near 1/K - 1 if one does
    log_mean = torch.logsumexp(below, 1) - math.log(scores.shape[1])
    log_mean = torch.where(mean > -0.5, torch.log1p(mean.clamp(min=-0.5)), log_mean)
    return lam * log_mean + (largest - scores.gather(1, target[:, None])).squeeze(1)


def ldr_kl_loss(
    logits: Tensor,
    target: Tensor,
    *,
    lam: float | Tensor = 1.0,
    margin: float = 0.0,
    normalization: str | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Label-distributionally robust loss: the worst weighting of the classes, less :math:`\lambda` times its divergence from uniform.

    :math:`\psi_\lambda=\lambda\log\frac1K\sum_ke^{(f_k-f_y+c[k\ne y])/\lambda}` (eq-ldr-kl). At ``lam=0`` the exact limit :math:`\max_kv_k`, the
    Crammer-Singer loss (eq-ldr-cold); at ``lam=inf`` the exact limit :math:`\frac1K\sum_kv_k`, which is linear (eq-ldr-warm). At ``lam=1`` without a
    margin it is cross-entropy less :math:`\log K`: the loss may be negative. Scores must be finite: a class cannot be masked by :math:`-\infty`. Computed in the log domain, in float32 or wider.

    Args:
        logits: shape ``(B, K)``, floating point, K > 1.
        target: classes, int64, shape ``(B,)``.
        lam: :math:`\lambda\in[0,\infty]`, a number, or a tensor of shape ``()`` or ``(B,)`` (differentiable where it is neither 0 nor infinite).
        margin: :math:`c\ge0`.
        normalization: as in :func:`normalize_scores`.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none"; at least :math:`-\lambda\log K`.

    Raises:
        TypeError, ValueError: for a wrong type, shape, class, number or word, naming the argument.

    Complexity: O(BK) time and memory; a tensor ``lam`` takes about four times as long as a number, as it may hold both limits.

    Source: Zhu, Ying and Yang, the LDR-KL loss.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
        >>> ldr_kl_loss(logits, torch.tensor([2])), ldr_kl_loss(logits, torch.tensor([2]), lam=0), ldr_kl_loss(logits, torch.tensor([2]), lam=math.inf)
        (tensor(1.3090), tensor(2.), tensor(1.))
    """
    scores = _normalized(_scores(logits), _known("normalization", normalization))
    margin = _margin(scores, target, margin)
    lam = _temperature(lam, len(scores))
    if not isinstance(lam, Tensor) and 0 < lam < math.inf:
        return _checks.reduced(_interior(scores, target, max(lam, _TINY), margin, lam > _LARGE), reduction)
    shifted = _shifted(scores, target, margin)
    label = shifted.gather(1, target[:, None]).squeeze(1)
    if not isinstance(lam, Tensor):
        return _checks.reduced((shifted.amax(1) if lam == 0 else shifted.mean(1)) - label, reduction)
    inner = torch.where((lam > 0) & (lam < math.inf), lam, 1).clamp(min=_TINY)
    small, large = (_interior(scores, target, inner, margin, large) for large in (False, True))
    limit = torch.where(lam == 0, shifted.amax(1), shifted.mean(1)) - label
    loss = torch.where((lam > 0) & (lam < math.inf), torch.where(inner > _LARGE, large, small), limit)
    return _checks.reduced(loss, reduction)


def ldr_kl_weights(logits: Tensor, target: Tensor, *, lam: float | Tensor = 1.0, margin: float = 0.0) -> Tensor:
    r"""The worst-case weights of the classes, :math:`p^*_k\propto e^{v_k/\lambda}` (eq-ldr-weights); the loss has gradient :math:`p^*-e_y`.

    Args:
        logits: shape ``(B, K)``, floating point, K > 1.
        target: classes, int64, shape ``(B,)``.
        lam: as in :func:`ldr_kl_loss`. At 0 the weights are uniform on the maximizers of :math:`v`, at infinity on all classes.
        margin: :math:`c\ge0`.

    Returns:
        Shape ``(B, K)``; each row is a distribution.

    Raises:
        TypeError, ValueError: for a wrong type, shape, class or number, naming the argument.

    Complexity: O(BK) time and memory.

    Source: Zhu, Ying and Yang, the solution of the inner maximization.

    Example:
        >>> ldr_kl_weights(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([2]))
        tensor([[0.6652, 0.2447, 0.0900]])
    """
    scores = _scores(logits)
    scores = _shifted(scores, target, _margin(scores, target, margin))
    lam = torch.as_tensor(_temperature(lam, len(scores)), dtype=scores.dtype, device=scores.device).expand(len(scores))
    best = (scores == scores.amax(1, keepdim=True)).to(scores.dtype)
    inner = torch.where((lam > 0) & (lam < math.inf), lam, 1).clamp(min=_TINY)
    limit = torch.where((lam == 0)[:, None], best / best.sum(1, keepdim=True), 1 / scores.shape[1])
    return torch.where(((lam > 0) & (lam < math.inf))[:, None], torch.softmax(scores / inner[:, None], 1), limit)


# ---------------------------------------------------------------------------------------------------------------------
# A temperature for each example
# ---------------------------------------------------------------------------------------------------------------------


def _divergence(
    scores: Tensor,
    largest: Tensor,
    lam: Tensor,
    target: Tensor | None = None,
    *,
    margin: float = 0.0,
    variance: bool = True,
) -> tuple[Tensor, ...]:
    r""":math:`\mathrm{KL}(p_\lambda)` and, if asked for, :math:`\mathrm{Var}_{p_\lambda}(\log p_\lambda)` by row; ``largest`` is each row's maximum."""
    below = _tempered(scores - largest[:, None], target, lam, margin, own=True)
    weight = below.exp()
    total = weight.sum(1)
    mean = weight.mul_(below).sum(1) / total
    divergence = math.log(scores.shape[1]) + mean - total.log()
    if not variance:
        return (divergence,)
    square = weight.mul_(below).sum(1) / total
    return divergence, (square - mean.square()).clamp(min=0)


def aldr_temperature_step(
    logits: Tensor,
    temperature: Tensor,
    target: Tensor | None = None,
    *,
    lambda_0: float = 1.0,
    alpha: float = 2.0,
    margin: float = 0.0,
    smoothing: float = 0.0,
) -> Tensor:
    r"""One step of the fixed-point iteration, :math:`T(\lambda)=\lambda_0-\frac{\lambda_0}{\bar\alpha\log K}\mathrm{KL}(p_\lambda)` (eq-ldr-fixed-point).

    Args:
        logits: shape ``(B, K)``, floating point, K > 1.
        temperature: :math:`\lambda>0`, shape ``(B,)``, floating point.
        target: classes, int64, shape ``(B,)``; needed with a margin, and only then.
        lambda_0: :math:`\lambda_0>0`, the temperature of an example whose scores tie.
        alpha: :math:`\bar\alpha>1`.
        margin: :math:`c\ge0`.
        smoothing: added to each probability before they are normalized again, >= 0; the authors' code has 1e-5.

    Returns:
        Shape ``(B,)``, between :math:`\lambda_0(1-1/\bar\alpha)` and :math:`\lambda_0`, without gradient.

    Raises:
        TypeError, ValueError: for a wrong type, shape, class or number, naming the argument.

    Complexity: O(BK) time, memory for a block of rows.

    Source: Zhu, Ying and Yang, Algorithm 1.

    Example:
        >>> aldr_temperature_step(torch.tensor([[0.0, math.log(3)]]), torch.ones(1))  # KL of (1/4, 3/4) is 0.1308
        tensor([0.9056])
    """
    lambda_0, alpha = _strength(lambda_0, alpha)
    scores = _scores(logits).detach()
    margin = _margin(scores, target, margin, needs_target=False)
    _checks.temperature(_checks.floating("temperature", temperature, 1), len(scores))
    return _step(scores, target, margin, temperature, lambda_0, alpha, _checks.number("smoothing", smoothing, 0))


@torch.no_grad()
def _step(
    scores: Tensor,
    target: Tensor | None,
    margin: float,
    temperature: Tensor,
    lambda_0: float,
    alpha: float,
    smoothing: float,
) -> Tensor:
    num_classes = scores.shape[1]

    def divergence(block: Tensor, lam: Tensor, label: Tensor | None = None) -> tuple[Tensor, ...]:
        if not smoothing:
            largest = _shifted(block, label, margin).amax(1)
            return _divergence(block, largest, lam, label, margin=margin, variance=False)
        p = (torch.softmax(_tempered(block, label, lam, margin), 1) + smoothing).div_(1 + num_classes * smoothing)
        return (math.log(num_classes) + p.log().mul_(p).sum(1),)

    (kl,) = by_rows(divergence, scores, temperature.to(scores.dtype), *([target] if margin else []))
    kl = kl.clamp(0, math.log(num_classes))
    return lambda_0 - lambda_0 / (alpha * math.log(num_classes)) * kl


def aldr_temperature(
    logits: Tensor,
    target: Tensor | None = None,
    *,
    lambda_0: float = 1.0,
    alpha: float = 2.0,
    margin: float = 0.0,
    max_iter: int = 2000,
    tol: float = 1e-10,
) -> Tensor:
    r"""The largest solution of :math:`\lambda=T(\lambda)`, each example's own temperature (eq-ldr-fixed-point).

    The point to which the iteration from :math:`\lambda_0` falls. If ``alpha`` exceeds :func:`aldr_critical_alpha` it is the only solution, and the
    maximizer that defines the loss; then it is found by Newton steps within a bracket. Otherwise by Newton steps that are shortened so that
    they cannot pass it (eq-ldr-newton).

    Args:
        logits: shape ``(B, K)``, floating point, K > 1.
        target: classes, int64, shape ``(B,)``; needed with a margin, and only then.
        lambda_0: :math:`\lambda_0>0`, the temperature of an example whose scores tie.
        alpha: :math:`\bar\alpha>1`.
        margin: :math:`c\ge0`.
        max_iter: most steps; if they do not suffice, the result lies above the solution. Where values are not known, in a compiled graph
            and under ``vmap``, there are 16 steps at most: enough above :func:`aldr_critical_alpha`, not always below.
        tol: stop when no step is longer than this times :math:`\lambda_0`, or than a few roundings, or when the next would not be, as the last three
            steps foretell it.

    Returns:
        Shape ``(B,)``, between :math:`\lambda_0(1-1/\bar\alpha)` and :math:`\lambda_0`, in float32 or wider, without gradient.

    Raises:
        TypeError, ValueError: for a wrong type, shape, class or number, naming the argument.

    Complexity: O(BK) time a step, memory for a block of rows. Usually 3 to 6 steps, up to about 15 near the critical strength; below it, or
    with a score far below the others, possibly hundreds.

    Source: Zhu, Ying and Yang, the optimality condition of ALDR-KL; the steps are the chapter's.

    Example:
        >>> aldr_temperature(torch.tensor([[0.0, math.log(3)]], dtype=torch.float64))
        tensor([0.8836], dtype=torch.float64)
    """
    lambda_0, alpha = _strength(lambda_0, alpha)
    scores = _scores(logits).detach()
    margin = _margin(scores, target, margin, needs_target=False)
    max_iter, tol = _checks.positive_int("max_iter", max_iter), _checks.number("tol", tol, 0)
    return _solve(scores, target, margin, lambda_0, alpha, max_iter, tol)


@torch.no_grad()
def _solve(
    scores: Tensor,
    target: Tensor | None,
    margin: float,
    lambda_0: float,
    alpha: float,
    max_iter: int = 2000,
    tol: float = 1e-10,
) -> Tensor:
    tol = lambda_0 * max(tol, 16 * torch.finfo(scores.dtype).eps)
    budget = alpha * math.log(scores.shape[1])  # the strength of the pull, times lambda_0
    floor = lambda_0 * (1 - 1 / alpha)
    step_of = _bracketed if alpha > aldr_critical_alpha(scores.shape[1]) else _shortened

    def extremes(block: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        block = _shifted(block, label, margin)
        return block.amax(1), block.amin(1)

    divergence = partial(_divergence, margin=margin)
    labels = [target] if margin else []
    largest, smallest = by_rows(extremes, scores, *labels)
    spread = largest - smallest
    lam = torch.full_like(spread, lambda_0)
    state = torch.full_like(spread, floor), lam, lam - floor
    last, fast = torch.zeros_like(lam), False
    for number in range(1, max_iter + 1):
        kl, variance = by_rows(divergence, scores, largest, lam, *labels)
        fall = lam - lambda_0 * (1 - kl / budget)  # h = lam - T(lam), what a plain step falls
        slope = variance * lambda_0 / (budget * lam)  # T'(lam)
        new, state = step_of(lam, fall, slope, spread, state, tol)
        step, lam = (lam - new).abs(), new
        # Once steps shrink fast, one of length s leaves C s^2, and two tell C; taken 16 times, as it is not the same everywhere.
        before, fast = fast, (slope < 0.5) & (step < last / 8)
        stop = _all_below(torch.where(fast & before, 16 * step * (step / last).square(), step), tol)
        last = step
        if stop or (stop is None and number >= _UNROLLED):
            break
    return lam


def _bracketed(lam, fall, slope, spread, state, tol):
    """Newton's step where it stays between the known sides of the only fixed point and shrinks; else T or bisection."""
    low, high, last = state
    plain = lam - fall  # T(lam) lies between lam and the point, and near it where T is flat
    low, high = torch.where(fall <= 0, plain, low), torch.where(fall >= 0, plain, high)
    newton = lam - fall / torch.where(slope < 1, 1 - slope, torch.nan)
    size = (newton - lam).abs()  # nan where there is no Newton step
    good = (size <= tol) | ((newton > low) & (newton < high) & (size <= last / 2))
    safe = torch.where(slope < 0.5, plain, (low + high) / 2)
    new = torch.where(good, newton, safe).clamp(min=low, max=high)
    return new, (low, high, (new - lam).abs())


def _shortened(lam, fall, slope, spread, state, tol):
    """A step down that passes no fixed point (eq-ldr-newton): Newton's, with the least slope that is possible ahead."""
    fall = fall.clamp(min=0)
    # How far to look: Newton's step, or where the tangent promises too much, the scale on which T' changes.
    far = torch.maximum(fall, lam * (fall / spread.clamp(min=_TINY)).sqrt())
    far = torch.minimum(_newton(fall, slope), far)
    lowest = torch.maximum(lam - far, state[0])
    slope = slope * torch.exp(spread * (1 / lam - 1 / lowest))  # at most T' anywhere from lowest to lam
    return torch.maximum(lowest, lam - _newton(fall, slope)), state


def _newton(fall: Tensor, slope: Tensor) -> Tensor:
    """Where a line that starts at ``fall`` and loses ``1 - slope`` a unit meets zero; nowhere if it does not fall."""
    return torch.where(slope < 1, fall / (1 - slope).clamp(min=_TINY), math.inf)


def _all_below(step: Tensor, tol: float) -> bool | None:
    """Whether every step is at most ``tol``; None where nobody can know, under ``vmap`` and in a compiled graph."""
    if torch.compiler.is_compiling():
        return None
    try:
        return bool((step <= tol).all())
    except RuntimeError:  # a batched tensor of vmap has no one truth value
        return None


def aldr_critical_alpha(num_classes: int) -> float:
    r"""The strength :math:`\bar\alpha_K` above which the temperature is unique for all scores of K classes (eq-ldr-critical).

    :math:`\bar\alpha_K\log K=\max_p[\mathrm{Var}_p(\log p)+\mathrm{KL}(p)]`, attained by one large probability and K - 1 equal ones
    (thm-ldr-critical). Below it some scores have several fixed points.

    Args:
        num_classes: K, at least 2.

    Returns:
        A float, greater than 1; it grows like :math:`\frac14\log K`, slowly approached.

    Raises:
        TypeError, ValueError: for a wrong number, naming the argument.

    Complexity: O(1).

    Source: own theorem (chapter, thm-ldr-critical).

    Example:
        >>> [round(aldr_critical_alpha(k), 3) for k in (2, 10, 100, 1000)]
        [1.318, 1.533, 1.949, 2.44]
    """
    others = _checks.positive_int("num_classes", num_classes, minimum=2) - 1
    # With p = e^x / (e^x + K - 1) the derivative in x has the sign of 3 - (2 p - 1) x: positive, then negative.
    low, high = 0.0, 10.0 + 2 * math.log(others)
    for _ in range(100):
        x = (low + high) / 2
        p = 1 / (1 + others * math.exp(-x))
        low, high = (x, high) if (2 * p - 1) * x < 3 else (low, x)
    return (p * (1 - p) * x**2 + p * x - math.log((math.exp(x) + others) / (1 + others))) / math.log(1 + others)


def aldr_kl_loss(
    logits: Tensor,
    target: Tensor,
    *,
    lambda_0: float = 1.0,
    alpha: float = 2.0,
    margin: float = 0.0,
    normalization: str | None = None,
    temperature: float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Adaptive LDR-KL loss: the adversary chooses the temperature, too, at a price for leaving :math:`\lambda_0` (eq-ldr-aldr).

    :math:`\psi_\lambda-\frac{\bar\alpha\log K}{2\lambda_0}(\lambda-\lambda_0)^2` at :math:`\lambda` = :func:`aldr_temperature`, or at the temperature that is
    given. First derivatives are exact at constant :math:`\lambda` (thm-ldr-aldr-gradient); second derivatives are not. If ``alpha`` is not above
    :func:`aldr_critical_alpha`, the largest fixed point need not be the maximizer, and the loss may jump.

    Args:
        logits: shape ``(B, K)``, floating point, K > 1.
        target: classes, int64, shape ``(B,)``.
        lambda_0: :math:`\lambda_0>0`, the temperature of an example whose scores tie.
        alpha: :math:`\bar\alpha>1`.
        margin: :math:`c\ge0`.
        normalization: as in :func:`normalize_scores`.
        temperature: :math:`\lambda>0`, a number, or a tensor of shape ``()`` or ``(B,)``, used as a constant; None solves for it.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none".

    Raises:
        TypeError, ValueError: for a wrong type, shape, class, number or word, naming the argument.

    Complexity: O(BK) time and memory; solving for the temperature takes O(BK) time a step, as :func:`aldr_temperature` says, which holds for
    compiled graphs, too.

    Source: Zhu, Ying and Yang, the ALDR-KL loss.

    Example:
        >>> aldr_kl_loss(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([2]))
        tensor(1.3296)
    """
    lambda_0, alpha = _strength(lambda_0, alpha)
    scores = _normalized(_scores(logits), _known("normalization", normalization))
    margin = _margin(scores, target, margin)
    if temperature is None:
        temperature = _solve(scores.detach(), target, margin, lambda_0, alpha)
    else:
        temperature = _checks.temperature(temperature, len(scores))
    return _checks.reduced(_aldr(scores, target, margin, lambda_0, alpha, temperature), reduction)


def _aldr(
    scores: Tensor, target: Tensor, margin: float, lambda_0: float, alpha: float, temperature: float | Tensor
) -> Tensor:
    large = (lambda_0 if isinstance(temperature, Tensor) else temperature) > _LARGE
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(scores.dtype)
    price = alpha * math.log(scores.shape[1]) / (2 * lambda_0) * (temperature - lambda_0) ** 2
    return _interior(scores, target, temperature, margin, large) - price


class ALDRKLLoss(nn.Module):
    r"""ALDR-KL for training: each sample's temperature is kept, and moves by one step whenever the sample is seen (alg-ldr).

    In training mode a call takes one :func:`aldr_temperature_step` from the stored temperatures of its samples, stores the result, and returns
    :func:`aldr_kl_loss` at it. In evaluation mode it uses what is stored. The defaults of ``margin_in_update`` and ``smoothing`` are the authors'
    code; with ``margin_in_update=True, smoothing=0`` each step applies :math:`T`. At fixed scores the temperature then ends at :func:`aldr_temperature` if
    ``alpha`` exceeds :func:`aldr_critical_alpha`; below that it depends on where it was before, and may stay at a lower fixed point.

    Every call in training mode takes a step, also a second one for the same batch, as under activation checkpointing. The smoothing lifts the
    lowest temperature a little, for K = 1000 and ``alpha=2`` from 0.500 to 0.509 of :math:`\lambda_0`.

    Args:
        num_samples: size of the training set.
        lambda_0: :math:`\lambda_0>0`, and the temperature that every sample begins with.
        alpha: :math:`\bar\alpha>1`.
        margin: :math:`c\ge0`.
        normalization: as in :func:`normalize_scores`.
        margin_in_update: whether the step sees the margin.
        smoothing: of the probabilities in the step, >= 0.
        reduction: "none", "mean" or "sum" over the batch.

    Attributes:
        temperature: buffer of shape ``(num_samples,)``, float32. It moves with ``.to()`` and is part of ``state_dict()``. Under
            DistributedDataParallel pass ``broadcast_buffers=False``, and give each process samples of its own.

    Raises:
        TypeError, ValueError: for a wrong number or word, naming the argument.

    Source: Zhu, Ying and Yang, Algorithm 1.

    Example:
        >>> loss = ALDRKLLoss(100, margin=0.0, normalization=None, smoothing=0.0)
        >>> loss(torch.tensor([[0.0, math.log(3)]]), torch.tensor([1]), index=torch.tensor([7]))
        tensor(-0.3982)
        >>> loss.temperature[6:8]
        tensor([1.0000, 0.9056])
    """

    temperature: Tensor

    def __init__(
        self,
        num_samples: int,
        *,
        lambda_0: float = 1.0,
        alpha: float = 2.0,
        margin: float = 0.1,
        normalization: str | None = "mean_abs",
        margin_in_update: bool = False,
        smoothing: float = 1e-5,
        reduction: str = "mean",
    ):
        super().__init__()
        _checks.positive_int("num_samples", num_samples)
        self.lambda_0, self.alpha = _strength(lambda_0, alpha)
        self.margin = _checks.number("margin", margin, 0)
        self.normalization = _known("normalization", normalization)
        self.margin_in_update = bool(margin_in_update)
        self.smoothing = _checks.number("smoothing", smoothing, 0)
        if reduction not in _checks.REDUCTIONS:
            raise ValueError(f"reduction must be one of {_checks.REDUCTIONS}, got {reduction!r}")
        self.reduction = reduction
        self.register_buffer("temperature", torch.full((num_samples,), self.lambda_0))

    def forward(self, logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
        """The loss of a batch, and in training mode the step of its temperatures.

        Args:
            logits: shape ``(B, K)``, floating point, K > 1.
            target: classes, int64, shape ``(B,)``.
            index: which samples these are, int64, shape ``(B,)``, in [0, num_samples). If a sample comes twice, one
                of its two temperatures is kept.

        Returns:
            Shape ``()``, or ``(B,)`` with reduction "none".

        Raises:
            TypeError, ValueError: for a wrong type, shape, class or index, naming the argument.
        """
        _checks.indices("index", index, len(self.temperature))
        scores = _normalized(_scores(logits), self.normalization)
        if len(index) != len(scores):
            raise ValueError(f"index must have shape ({len(scores)},), one for each row, got {tuple(index.shape)}")
        _checks.indices("target", target, scores.shape[1], len(scores))
        temperature = self.temperature[index]
        if self.training:
            margin = self.margin if self.margin_in_update else 0.0
            seen = scores.detach(), target, margin, temperature
            temperature = _step(*seen, self.lambda_0, self.alpha, self.smoothing)
            self.temperature[index] = temperature.to(self.temperature.dtype)
        return _checks.reduced(
            _aldr(scores, target, self.margin, self.lambda_0, self.alpha, temperature), self.reduction
        )

    def extra_repr(self) -> str:
        return f"num_samples={len(self.temperature)}, lambda_0={self.lambda_0:g}, alpha={self.alpha:g}, margin={self.margin:g}"


# ---------------------------------------------------------------------------------------------------------------------
# Labels that lie
# ---------------------------------------------------------------------------------------------------------------------


def _relabel(labels: Tensor, rate: float, other: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """``other`` in place of ``labels`` with probability ``rate``; the new labels, and where they differ."""
    chance = torch.rand(len(labels), generator=generator, device=labels.device)
    noisy = torch.where(chance < _checks.number("rate", rate, 0, 1), other, labels)
    return noisy, noisy != labels


def uniform_label_noise(
    labels: Tensor, rate: float, num_classes: int, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    r"""With probability ``rate`` a label is drawn again, uniformly from all classes; the new one may be the old (eq-ldr-uniform-noise).

    Args:
        labels: classes, int64, shape ``(N,)``.
        rate: :math:`\eta\in[0,1]`; a share :math:`\eta(1-1/K)` of the labels is expected to become wrong.
        num_classes: K, at least 2.
        generator: on the device of the labels.

    Returns:
        The noisy labels, int64, shape ``(N,)``, and a bool mask of those that are wrong.

    Raises:
        TypeError, ValueError: for a wrong type, shape, class or number, naming the argument.

    Source: Zhu, Ying and Yang, the uniform noise of the experiments.

    Example:
        >>> noisy, wrong = uniform_label_noise(torch.zeros(1000, dtype=torch.int64), 0.5, 10, generator=torch.Generator().manual_seed(0))
        >>> wrong.float().mean()
        tensor(0.4500)
    """
    _checks.indices("labels", labels, _checks.positive_int("num_classes", num_classes, minimum=2))
    other = torch.randint(num_classes, labels.shape, generator=generator, device=labels.device)
    return _relabel(labels, rate, other, generator)


def class_dependent_label_noise(
    labels: Tensor,
    rate: float,
    num_classes: int,
    *,
    mapping: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""With probability ``rate`` a label turns into the one that its class is mistaken for.

    Args:
        labels: classes, int64, shape ``(N,)``.
        rate: probability in [0, 1].
        num_classes: K, at least 2.
        mapping: int64, shape ``(K,)``: the class that each is mistaken for; None takes the next one, :math:`y+1` modulo K.
        generator: on the device of the labels.

    Returns:
        The noisy labels, int64, shape ``(N,)``, and a bool mask of those that are wrong.

    Raises:
        TypeError, ValueError: for a wrong type, shape, class or number, naming the argument.

    Source: Zhu, Ying and Yang, the class-dependent noise of the experiments.

    Example:
        >>> class_dependent_label_noise(torch.tensor([0, 1, 2]), 1.0, 3)
        (tensor([1, 2, 0]), tensor([True, True, True]))
    """
    _checks.indices("labels", labels, _checks.positive_int("num_classes", num_classes, minimum=2))
    if mapping is None:
        mapping = (torch.arange(num_classes, device=labels.device) + 1) % num_classes
    if len(_checks.indices("mapping", mapping, num_classes)) != num_classes:
        raise ValueError(f"mapping must have shape ({num_classes},), one for each class, got {tuple(mapping.shape)}")
    return _relabel(labels, rate, mapping[labels], generator)
