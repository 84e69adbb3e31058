r"""The comp-sum losses: cross-entropy and its relatives, what they guarantee about the error rate, and their adversarial form.

The method of *Cross-Entropy Loss Functions: Theoretical Analysis and Applications* (Mao, Mohri and Zhong, ICML 2023, arXiv
2304.07288): one family of losses with a parameter :math:`\tau`, the transforms and bounds that turn its excess risk into excess
zero-one risk, minimizability gaps, and the smooth adversarial loss. Equation labels are those of the chapter
``classification/comp_sum``.

Notation: ``logits`` (B, n) holds the scores :math:`h(x,\cdot)`, :math:`s` is their softmax, ``probabilities`` (B, n) holds the
conditional distribution :math:`p` of the label, and :math:`a=1/(2-\tau)`. Logs are natural.
"""

import math
import sys
from collections.abc import Callable
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossbook import _checks

FORMS = ("exact", "simple", "asymptotic", "sharp")
_NEAR_ONE = 1e-8  # within it the formulas for tau != 1 lose more digits than the formula for tau = 1 is off

# ---------------------------------------------------------------------------------------------------------------------
# The family
# ---------------------------------------------------------------------------------------------------------------------


def _scores(name: str, value: Tensor, ndim: int = 2) -> Tensor:
    _checks.floating(name, value, ndim)
    if value.shape[-1] < 2:
        raise ValueError(f"{name} must have at least 2 classes in the last dimension, got shape {tuple(value.shape)}")
    return value


def _of_log(log_ratio: Tensor, tau: float) -> Tensor:
    r""":math:`\Phi^\tau(u)` of :math:`\log(1+u)`, which is the cross-entropy."""
    return log_ratio if tau == 1 else torch.expm1((1 - tau) * log_ratio) / (1 - tau)


def comp_sum_loss(logits: Tensor, target: Tensor, *, tau: float = 1.0, reduction: str = "mean") -> Tensor:
    r"""Comp-sum loss: sum-exponential (tau = 0), cross-entropy (1), generalized cross-entropy (1 to 2), mean absolute error (2), and all between and above.

    :math:`\ell_\tau=\Phi^\tau\bigl(\sum_{y'\ne y}e^{h_{y'}-h_y}\bigr)=\frac{s_y^{\tau-1}-1}{1-\tau}` (eq-comp_sum-loss), computed as
    :math:`\mathrm{expm1}((1-\tau)\,\mathrm{CE})/(1-\tau)` (eq-comp_sum-expm1). For :math:`\tau\ge1` loss and gradient are finite for all finite
    scores. For :math:`\tau<1` they grow like :math:`e^{(1-\tau)\mathrm{CE}}`; where that overflows the loss is ``inf``, never NaN, and the gradient is lost.

    Args:
        logits: scores, shape ``(B, n)`` with n > 1, floating point.
        target: classes, shape ``(B,)``, int64, in [0, n).
        tau: :math:`\tau\ge0`. Generalized cross-entropy with exponent q is ``tau = 1 + q``.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none"; at least 0; float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape, class, tau or reduction, naming the argument. Where values are not read, in a compiled
            graph, under ``vmap`` and on an accelerator, a class outside of [0, n) is left to torch's kernel; none is ignored, not even -100.

    Complexity: O(Bn) time and memory: one cross-entropy, then O(B).

    Source: Mao, Mohri and Zhong, section 2.

    Example:
        >>> logits, target = torch.zeros(1, 10), torch.tensor([3])
        >>> [round(comp_sum_loss(logits, target, tau=tau).item(), 4) for tau in (0, 1, 1.5, 2)]
        [9.0, 2.3026, 1.3675, 0.9]
    """
    _scores("logits", logits)
    _checks.indices("target", target, logits.shape[1], len(logits))
    tau = _checks.number("tau", tau, 0)
    cross_entropy = F.cross_entropy(_checks.wide(logits), target, ignore_index=_checks.NO_CLASS, reduction="none")
    return _checks.reduced(_of_log(cross_entropy, tau), reduction)


def phi(u: Tensor, *, tau: float) -> Tensor:
    r"""The outer function :math:`\Phi^\tau(u)=\frac{(1+u)^{1-\tau}-1}{1-\tau}`, :math:`\log(1+u)` at tau = 1 (eq-comp_sum-phi).

    Args:
        u: at least 0, any shape, floating point.
        tau: :math:`\tau\ge0`.

    Returns:
        The shape of ``u``; increasing and concave in ``u``, with slope at most 1.

    Raises:
        TypeError, ValueError: for a wrong type or a negative number, naming the argument.

    Source: Mao, Mohri and Zhong, section 2.

    Example:
        >>> phi(torch.tensor([0.0, 3.0]), tau=0.5)
        tensor([0., 2.])
    """
    _checks.floating("u", u)
    if _checks.known_false(u >= 0):
        raise ValueError(f"u must be >= 0 everywhere, got {u.min()}")
    return _of_log(torch.log1p(u), _checks.number("tau", tau, 0))


# ---------------------------------------------------------------------------------------------------------------------
# Risks at one input, where the distribution of the label is known
# ---------------------------------------------------------------------------------------------------------------------


def _distribution(probabilities: Tensor) -> Tensor:
    _scores("probabilities", probabilities)
    off = (probabilities.sum(1) - 1).abs()
    if _checks.known_false((probabilities >= 0).all(1) & (off < 1e-4)):
        raise ValueError("probabilities must be >= 0 and add up to 1 in each row")
    return probabilities


def conditional_risk(logits: Tensor, probabilities: Tensor, *, tau: float) -> Tensor:
    r"""Expected loss at each input, :math:`\mathcal C_\tau(h,x)=\sum_yp_y\ell_\tau(h,x,y)` (eq-comp_sum-conditional).

    Args:
        logits: scores, shape ``(B, n)``, floating point; ``-inf`` where the softmax is zero.
        probabilities: :math:`p`, shape ``(B, n)``, rows that add up to 1; a class with :math:`p_y=0` costs nothing.
        tau: :math:`\tau\ge0`.

    Returns:
        Shape ``(B,)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape, distribution or tau, naming the argument.

    Complexity: O(Bn) time and memory.

    Source: Mao, Mohri and Zhong, section 3.

    Example:
        >>> s, p = torch.tensor([[0.3, 0.4, 0.3]]), torch.tensor([[0.5, 0.3, 0.2]])
        >>> conditional_risk(s.log(), p, tau=1)
        tensor([1.1177])
    """
    _distribution(probabilities)
    _checks.like("logits", logits, "probabilities", probabilities, 2)
    cross_entropy = -torch.log_softmax(_checks.wide(logits), dim=1)
    cross_entropy = cross_entropy.masked_fill(probabilities == 0, 0)  # before expm1: 0 times inf has no gradient
    return (probabilities * _of_log(cross_entropy, _checks.number("tau", tau, 0))).sum(1)


def optimal_conditional_risk(probabilities: Tensor, *, tau: float) -> Tensor:
    r"""The least conditional risk over all scores, :math:`\mathcal C^*_\tau(p)` (eq-comp_sum-optimum): entropy at tau = 1, :math:`\frac{1-\max p}{\tau-1}` from 2 on.

    Below 2 it is :math:`\frac{\|p\|_a-1}{1-\tau}` with :math:`\|p\|_a=(\sum_yp_y^a)^{1/a}`, computed in the log domain.

    Args:
        probabilities: :math:`p`, shape ``(B, n)``, floating point, rows that add up to 1.
        tau: :math:`\tau\ge0`; within 1e-8 of 1 it counts as 1.

    Returns:
        Shape ``(B,)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape, distribution or tau, naming the argument.

    Complexity: O(Bn) time and memory.

    Source: Mao, Mohri and Zhong, section 3 and appendix; derived in the chapter.

    Example:
        >>> p = torch.tensor([[0.5, 0.3, 0.2]])
        >>> [round(optimal_conditional_risk(p, tau=tau).item(), 4) for tau in (0, 1, 2)]
        [1.897, 1.0297, 0.5]
    """
    tau = _checks.number("tau", tau, 0)
    log_p = _distribution(probabilities).double().log()
    log_p = log_p - torch.logsumexp(log_p, dim=1, keepdim=True)  # a rounded sum would be divided by |1 - tau|
    if tau >= 2:
        risk = -torch.expm1(log_p.amax(1)) / (tau - 1)
    elif abs(tau - 1) < _NEAR_ONE:
        risk = -torch.xlogy(log_p.exp(), log_p.exp()).sum(1)
    else:
        risk = torch.expm1((2 - tau) * torch.logsumexp(log_p / (2 - tau), dim=1)) / (1 - tau)
    return risk.to(probabilities.dtype)


def optimal_softmax(probabilities: Tensor, *, tau: float) -> Tensor:
    r"""The softmax that attains :math:`\mathcal C^*_\tau(p)`: :math:`s_y\propto p_y^{1/(2-\tau)}` below 2, all on the likeliest class from 2 on (eq-comp_sum-minimizer).

    Args:
        probabilities: :math:`p`, shape ``(B, n)``, floating point, rows that add up to 1.
        tau: :math:`\tau\ge0`.

    Returns:
        Shape ``(B, n)``, rows that add up to 1. A zero is approached by scores that tend to :math:`-\infty`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: for a wrong shape, distribution or tau, or a tie for the likeliest class at ``tau >= 2``, where the optimum is not unique.

    Complexity: O(Bn) time and memory.

    Source: Mao, Mohri and Zhong, appendix; derived in the chapter.

    Example:
        >>> optimal_softmax(torch.tensor([[0.5, 0.3, 0.2]]), tau=1.5)
        tensor([[0.6579, 0.2368, 0.1053]])
    """
    tau = _checks.number("tau", tau, 0)
    _distribution(probabilities)
    if tau < 2:
        return torch.softmax(probabilities.log() / (2 - tau), dim=1)
    best = probabilities == probabilities.amax(1, keepdim=True)
    if _checks.known_false(best.sum(1) == 1):
        raise ValueError("probabilities must have one likeliest class in each row where tau >= 2, got a tie")
    return best.to(probabilities.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# What a small excess risk guarantees about the zero-one loss
# ---------------------------------------------------------------------------------------------------------------------


def _family(tau: float, num_classes: int, form: str) -> tuple[float, int]:
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    return _checks.number("tau", tau, 0), _checks.positive_int("num_classes", num_classes, minimum=2)


def _curvature(tau: float, num_classes: int, form: str) -> float:
    r"""c of the quadratic :math:`c\beta^2` that the transform is at least ("simple") or tends to at 0 ("asymptotic"); tau < 2."""
    if tau < 1:
        return 2**-tau / (2 - tau)
    return num_classes ** (1 - tau) / 2 / (1 if form == "simple" else 2 - tau)


def _slope(tau: float, num_classes: int, form: str) -> float:
    r"""The transform over beta for tau >= 2: as the paper has it, or the best constant that there is (eq-comp_sum-sharp)."""
    if form != "sharp":
        return num_classes ** (1 - tau) / (tau - 1)
    m = torch.arange(1, num_classes + 1, dtype=torch.float64)  # classes that tie for the prediction
    return (1 - ((m - 1) * m ** (1 - tau)).max().item()) / (tau - 1)


def consistency_transform(beta: Tensor, *, tau: float, num_classes: int, form: str = "exact") -> Tensor:
    r"""The H-consistency transform :math:`\mathcal T_\tau(\beta)`: the surrogate regret that a zero-one regret of beta costs at least (eq-comp_sum-transform).

    With the power mean :math:`N(\beta)=\bigl(\frac{(1+\beta)^a+(1-\beta)^a}2\bigr)^{1/a}`: :math:`\frac{2^{1-\tau}}{1-\tau}(1-N)` for
    :math:`\tau<1`, :math:`\frac{1+\beta}2\log(1+\beta)+\frac{1-\beta}2\log(1-\beta)` at 1, :math:`\frac{n^{1-\tau}}{\tau-1}(N-1)` between 1 and 2,
    :math:`\frac{n^{1-\tau}}{\tau-1}\beta` from 2 on. Computed from :math:`\log N=\frac12\log(1-\beta^2)+\frac1a\log\cosh(a\,\mathrm{artanh}\,\beta)`, in
    float64: nothing overflows near 2, and small beta keeps its digits.

    Args:
        beta: conditional zero-one regret, in [0, 1], any shape, floating point.
        tau: :math:`\tau\ge0`; within 1e-8 of 1 it counts as 1.
        num_classes: n, at least 2.
        form: "exact"; "simple", the quadratic that :math:`\mathcal T_\tau` is never below (eq-comp_sum-simple); or "asymptotic", the quadratic that it
            approaches as :math:`\beta\to0` (eq-comp_sum-asymptotic). Up to 1 these two are one; from 2 on both are the exact form. "sharp", from 2 on the
            best line that there is (eq-comp_sum-sharp), which beyond 2 hardly depends on n; below 2 the exact form.

    Returns:
        The shape and dtype of ``beta``; convex and increasing in beta.

    Raises:
        TypeError, ValueError: for a wrong type, number or form, naming the argument.

    Source: Mao, Mohri and Zhong, theorem 3.1.

    Example:
        >>> consistency_transform(torch.tensor([0.2, 1.0]), tau=1, num_classes=3)
        tensor([0.0201, 0.6931])
    """
    _checks.floating("beta", beta)
    if _checks.known_false((beta >= 0) & (beta <= 1)):
        raise ValueError(f"beta must lie in [0, 1], got {beta.min()} to {beta.max()}")
    tau, n = _family(tau, num_classes, form)
    b = beta.double()
    if tau >= 2:
        value = _slope(tau, n, form) * b
    elif form in ("simple", "asymptotic"):
        value = _curvature(tau, n, form) * b * b
    elif abs(tau - 1) < _NEAR_ONE:
        few, many = torch.where(b < 0.5, b, 0), torch.where(b < 0.5, 0.5, b)  # digits near 0, a gradient at 1
        rest = torch.where(b < 0.5, torch.special.xlog1py(1 - few, -few), -torch.special.entr(1 - many))
        value = (torch.special.xlog1py(1 + b, b) + rest) / 2
    else:
        a = 1 / (2 - tau)
        near = a * torch.atanh(b) < 1
        few, many = (
            torch.where(near, b, 0),
            torch.where(near, 0.5, b),
        )  # each where its formula is good, and its gradient
        small = torch.log1p(-few * few) / 2 + torch.log1p(2 * torch.sinh(a * torch.atanh(few) / 2) ** 2) / a
        large = torch.log1p(many) + (torch.log1p(((1 - many) / (1 + many)) ** a) - math.log(2)) / a
        log_n = torch.where(near, small, large)
        scale = 2 ** (1 - tau) if tau < 1 else n ** (1 - tau)
        value = scale * torch.expm1(log_n) / (tau - 1)
    return value.to(beta.dtype)


def consistency_bound(excess: Tensor, *, tau: float, num_classes: int, form: str = "exact") -> Tensor:
    r"""The H-consistency bound :math:`\Gamma_\tau(t)=\mathcal T_\tau^{-1}(t)`: how large the zero-one regret can be at a surrogate regret of t (eq-comp_sum-bound).

    :math:`t=\mathcal R_{\ell_\tau}(h)-\mathcal R^*_{\ell_\tau}(\mathcal H)+\mathcal M_{\ell_\tau}(\mathcal H)`, and :math:`\Gamma_\tau(t)` bounds the same
    sum of the zero-one loss.

    Args:
        excess: t, at least 0, any shape, floating point.
        tau: :math:`\tau\ge0`.
        num_classes: n, at least 2.
        form: "exact", 1 from :math:`\mathcal T_\tau(1)` on, below tau = 2 by bisection, through which no gradient flows; "simple", :math:`\sqrt{2^\tau(2-\tau)t}`, :math:`\sqrt{2n^{\tau-1}t}` or
            :math:`(\tau-1)n^{\tau-1}t`, a guarantee, too, and not clipped to 1; or "asymptotic", what both the exact bound and its own formula tend to as
            :math:`t\to0`, which between 1 and 2 is *not* a guarantee; or "sharp", as in
            :func:`consistency_transform`.

    Returns:
        The shape and dtype of ``excess``; 0 at 0. Where :math:`n^{1-\tau}` underflows, near :math:`\tau=300` for ten classes, any other excess
        allows every regret.

    Raises:
        TypeError, ValueError: for a wrong type, number or form, naming the argument.

    Complexity: 64 evaluations of the transform.

    Source: Mao, Mohri and Zhong, theorem 3.1.

    Example:
        >>> consistency_bound(torch.tensor([0.02]), tau=1, num_classes=3)
        tensor([0.1993])
    """
    _checks.floating("excess", excess)
    if _checks.known_false(excess >= 0):
        raise ValueError(f"excess must be >= 0 everywhere, got {excess.min()}")
    tau, n = _family(tau, num_classes, form)
    t = excess.double()
    if tau >= 2:
        value = t / max(_slope(tau, n, form), sys.float_info.min)  # it underflows for large tau, and 0 / 0 is no bound
        return (value.clamp(max=1) if form in ("exact", "sharp") else value).to(excess.dtype)
    if form in ("simple", "asymptotic"):
        return torch.sqrt(t / _curvature(tau, n, form)).to(excess.dtype)
    with torch.no_grad():
        high = torch.sqrt(t / _curvature(tau, n, "simple")).clamp(max=1)  # the simple bound is a guarantee
        low = torch.zeros_like(high)
        for _ in range(64):
            middle = (low + high) / 2
            above = consistency_transform(middle, tau=tau, num_classes=n) > t
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return high.to(excess.dtype)


def minimizability_gap_bound(best_sum_exp_risk: Tensor, *, tau: float, num_classes: int, score_bound: float) -> Tensor:
    r"""The bound :math:`\widehat{\mathcal M}_\tau` of the minimizability gap, for deterministic labels and scores that fill :math:`[-\Lambda,\Lambda]^n` (eq-comp_sum-gap).

    :math:`\Phi^\tau(R)-\Phi^\tau(L)` with :math:`R=\mathcal R^*_{\ell_0}(\mathcal H)` and :math:`L=(n-1)e^{-2\Lambda}`; it does not increase with tau.
    Computed as :math:`(1+L)^{1-\tau}\,\Phi^\tau\bigl(\frac{R-L}{1+L}\bigr)`, which is the same integral: nothing cancels.

    Args:
        best_sum_exp_risk: :math:`R`, the least sum-exponential risk of the hypothesis set, any shape, floating point; at least :math:`L`, up to a
            rounding of 1e-6, which counts as :math:`L`.
        tau: :math:`\tau\ge0`.
        num_classes: n, at least 2.
        score_bound: :math:`\Lambda\ge0`; ``math.inf`` for scores without a bound.

    Returns:
        The shape of ``best_sum_exp_risk``; at least 0.

    Raises:
        TypeError, ValueError: for a wrong type or number, naming the argument.

    Source: Mao, Mohri and Zhong, section 4.

    Example:
        >>> risk = torch.tensor(3.0)
        >>> [round(minimizability_gap_bound(risk, tau=tau, num_classes=4, score_bound=math.inf).item(), 4) for tau in (0, 1, 2)]
        [3.0, 1.3863, 0.75]
    """
    _checks.floating("best_sum_exp_risk", best_sum_exp_risk)
    n = _checks.positive_int("num_classes", num_classes, minimum=2)
    least = (n - 1) * math.exp(
        -2 * (score_bound if score_bound == math.inf else _checks.number("score_bound", score_bound, 0))
    )
    if _checks.known_false(best_sum_exp_risk >= least * (1 - 1e-6)):
        raise ValueError(
            f"best_sum_exp_risk must be at least {least:g}, the least value for score_bound {score_bound:g}, got {best_sum_exp_risk.min()}"
        )
    tau, rise = _checks.number("tau", tau, 0), (best_sum_exp_risk - least).clamp(min=0)
    return (1 + least) ** (1 - tau) * phi(rise / (1 + least), tau=tau)


# ---------------------------------------------------------------------------------------------------------------------
# Against an adversary
# ---------------------------------------------------------------------------------------------------------------------


def rho_margin_comp_sum(
    score_sets: Tensor, target: Tensor, *, tau: float, rho: float, reduction: str = "mean"
) -> Tensor:
    r"""The supremum-based adversarial surrogate :math:`\tilde\ell_{\tau,\rho}` (eq-comp_sum-margin), where the perturbed inputs are finitely many.

    :math:`\sup_{x'}\Phi^\tau\bigl(\sum_{y'\ne y}\Phi_\rho(h(x',y)-h(x',y'))\bigr)` with the margin loss :math:`\Phi_\rho(u)=\min\{\max\{0,1-u/\rho\},1\}`.

    Args:
        score_sets: scores at S perturbed inputs of each sample, shape ``(B, S, n)``, floating point.
        target: classes, shape ``(B,)``, int64.
        tau: :math:`\tau\ge0`.
        rho: margin :math:`\rho>0`.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none"; between 0 and :math:`\Phi^\tau(n-1)`.

    Raises:
        TypeError, ValueError: for a wrong type, shape, class, number or reduction, naming the argument.

    Complexity: O(BSn) time and memory.

    Source: Mao, Mohri and Zhong, section 5.

    Example:
        >>> scores = torch.tensor([[[2.0, 0.0, 0.0], [0.5, 0.0, 1.0]]])  # one sample, two perturbed inputs
        >>> rho_margin_comp_sum(scores, torch.tensor([0]), tau=0, rho=1.0)
        tensor(1.5000)
    """
    rows, _, n = _scores("score_sets", score_sets, 3).shape
    _checks.indices("target", target, n, rows)
    rho = _checks.positive_number("rho", rho)
    score_sets = _checks.wide(score_sets)  # ranks are counted, and bfloat16 cannot count to 1000
    own = score_sets.gather(2, target[:, None, None].expand(-1, score_sets.shape[1], 1))
    margins = (1 - (own - score_sets) / rho).clamp(0, 1)
    worst = (margins.sum(2) - 1).clamp(min=0).amax(1)  # less the own class, whose margin is 1; phi increases
    return _checks.reduced(phi(worst, tau=tau), reduction)


def _movement(logits: Tensor, perturbed_logits: Tensor, target: Tensor) -> Tensor:
    """How far the score differences of each row move, (B, n); the entry of the own class is zero."""
    moved = perturbed_logits - logits
    return moved.gather(1, target[:, None]) - moved


def smooth_adversarial_comp_sum_loss(
    logits: Tensor,
    perturbed_logits: Tensor,
    target: Tensor,
    *,
    tau: float = 1.0,
    rho: float = 1.0,
    nu: float = 0.2,
    reduction: str = "mean",
) -> Tensor:
    r"""Smooth adversarial comp-sum loss (eq-comp_sum-smooth), given the scores at the worst perturbed input that was found.

    :math:`\Phi^\tau\bigl(\sum_{y'\ne y}e^{-(h_y-h_{y'})/\rho}\bigr)+\nu\,\bigl\|\bar\Delta_h(x',y)-\bar\Delta_h(x,y)\bigr\|_2` with the score differences
    :math:`\bar\Delta_h(x,y)=(h(x,y)-h(x,y'))_{y'\ne y}`. With the worst :math:`x'` and :math:`\nu\ge\sqrt{n-1}/\rho` it is at least
    :func:`rho_margin_comp_sum`; in training that is far too much, and nu is tuned. With a smaller nu, and with 0, where only the loss of the clean
    scores is left, nothing is guaranteed against an adversary.

    Args:
        logits: scores at the clean input, shape ``(B, n)``, floating point.
        perturbed_logits: scores at the perturbed input, for example from :func:`perturb`, the shape and dtype of ``logits``.
        target: classes, shape ``(B,)``, int64.
        tau: :math:`\tau\ge0`.
        rho: scale of the scores, > 0. Only nu times rho matters, up to a rescaling of the scores.
        nu: weight of the movement, at least 0.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none". Where the scores did not move, the second term has gradient zero.

    Raises:
        TypeError, ValueError: for a wrong type, shape, class, number or reduction, naming the argument.

    Complexity: O(Bn) time and memory.

    Source: Mao, Mohri and Zhong, section 5.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 1.0]])
        >>> smooth_adversarial_comp_sum_loss(logits, logits - torch.tensor([3.0, 0.0, -1.0]), torch.tensor([0]), nu=0.2)
        tensor(1.4076)
    """
    _checks.like("perturbed_logits", perturbed_logits, "logits", logits, 2)
    rho, nu = _checks.positive_number("rho", rho), _checks.number("nu", nu, 0)
    logits, perturbed_logits = _checks.wide(logits), _checks.wide(perturbed_logits)
    loss = comp_sum_loss(logits / rho, target, tau=tau, reduction="none")
    moved = torch.linalg.vector_norm(_movement(logits, perturbed_logits, target), dim=1)
    return _checks.reduced(loss + nu * moved, reduction)


def _range(bounds: tuple[float, float] | None) -> tuple[float, float]:
    """Least and largest value of an input."""
    if bounds is None:
        return -math.inf, math.inf
    try:
        low, high = bounds
    except (TypeError, ValueError):
        raise TypeError(f"bounds must be (least, largest) or None, got {bounds!r}") from None
    if not all(isinstance(end, Real) and not isinstance(end, bool) for end in (low, high)):
        raise TypeError(f"bounds must hold two numbers, got {bounds!r}")
    if not low < high:
        raise ValueError(f"bounds must be (least, largest) with the least below the largest, got {bounds!r}")
    return low, high


def perturb(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    target: Tensor,
    *,
    radius: float,
    steps: int = 10,
    step_size: float | None = None,
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The inner supremum of the smooth adversarial loss, by projected gradient ascent: inputs that move the score differences most (eq-comp_sum-ascent).

    A random start in the ball, then steps on :math:`\|\bar\Delta_h(x',y)-\bar\Delta_h(x,y)\|_2^2` (the square: the norm has no gradient where nothing has
    moved), each projected to the ball and to ``bounds``; each sample keeps the best input that it has seen. A lower estimate of the supremum: the one
    step of the method that is not exact.

    Args:
        model: maps ``(B, ...)`` to scores ``(B, n)``. A module is evaluated in eval mode, and left as found: modes, ``requires_grad`` and ``.grad``.
        x: clean inputs, shape ``(B, ...)`` with at least two dimensions, floating point, inside ``bounds``.
        target: classes, shape ``(B,)``, int64.
        radius: :math:`\gamma>0`, in the unit of ``x``.
        steps: K, at least 0; with 0 the random start comes back.
        step_size: None for :math:`2.5\,\gamma/K`.
        norm: "linf" (signed steps) or "l2" (normalized steps), over all but the first dimension.
        bounds: least and largest value of an input, in this order, or None.
        generator: on the device of ``x``.

    Returns:
        The shape and dtype of ``x``, detached.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Complexity: K + 2 evaluations of the model and K gradients.

    Source: Mao, Mohri and Zhong, section 6; the attack is that of Madry et al. 2018.

    Example:
        >>> model, x = nn.Linear(2, 3), torch.full((4, 2), 0.5)
        >>> worst = perturb(model, x, torch.zeros(4, dtype=torch.int64), radius=0.1)
        >>> bool((worst - x).abs().max() <= 0.1 + 1e-6)
        True
    """
    if _checks.floating("x", x).ndim < 2:
        raise ValueError(f"x must have shape (B, ...), one input for each row, got {tuple(x.shape)}")
    radius, steps = _checks.positive_number("radius", radius), _checks.positive_int("steps", steps, minimum=0)
    step_size = 2.5 * radius / max(steps, 1) if step_size is None else _checks.positive_number("step_size", step_size)
    if norm not in ("linf", "l2"):
        raise ValueError(f'norm must be "linf" or "l2", got {norm!r}')
    low, high = _range(bounds)
    if _checks.known_false((x >= low) & (x <= high)):
        raise ValueError(f"x must lie inside bounds [{low:g}, {high:g}], got {x.min()} to {x.max()}")

    def length(v: Tensor) -> Tensor:
        tiny = torch.finfo(v.dtype).tiny
        return torch.linalg.vector_norm(v.flatten(1), dim=1).clamp(min=tiny).view(-1, *[1] * (v.ndim - 1))

    def project(delta: Tensor) -> Tensor:
        delta = delta.clamp(-radius, radius) if norm == "linf" else delta * (radius / length(delta)).clamp(max=1)
        return (x + delta).clamp(low, high)  # towards x, so it stays in the ball

    draw = torch.rand if norm == "linf" else torch.randn
    start = draw(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    if norm == "linf":
        start = radius * (2 * start - 1)
    else:  # uniform in the ball: a random direction, and a length whose d-th power is uniform
        share = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device) ** (len(x) / x.numel())
        start = start / length(start) * radius * share.view(-1, *[1] * (x.ndim - 1))
    modes = [(m, m.training) for m in model.modules()] if isinstance(model, nn.Module) else []
    try:
        if modes:
            model.eval()
        x = x.detach()
        with torch.no_grad():
            clean = _scores("the model's output", model(x))
            _checks.indices("target", target, clean.shape[1], len(x))
        current = best = project(start)
        most = clean.new_full((len(x),), -1)
        for step in range(steps + 1):
            with torch.set_grad_enabled(step < steps):
                current = current.detach().requires_grad_(step < steps)
                moved = _movement(clean, model(current), target).square().sum(1)
                if step < steps:
                    (slope,) = torch.autograd.grad(moved.sum(), current)
            better = (moved > most).detach()
            most = torch.where(better, moved.detach(), most)
            best = torch.where(better.view(-1, *[1] * (x.ndim - 1)), current.detach(), best)
            if step < steps:
                direction = slope.sign() if norm == "linf" else slope / length(slope)
                current = project(current.detach() + step_size * direction - x)
    finally:
        for module, mode in modes:
            module.training = mode
    return best
