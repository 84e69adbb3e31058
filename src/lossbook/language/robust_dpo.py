r"""Preference losses that are unbiased under flipped labels: robust DPO, beside DPO, conservative DPO, IPO and the hinge.

The method of *Provably Robust DPO: Aligning Language Models with Noisy Feedback* (Ray Chowdhury, Kini and Natarajan, ICML 2024, arXiv
2403.00409): the combination of a loss on the observed pair and on the swapped pair whose expectation over the flip is the clean loss, for any
base loss; what the losses are minimized by in the population, also at a wrong rate; the log-linear estimator with its bounds; and the policies
that no other beats in reward at their divergence from the reference. Equation labels are those of the chapter ``language/robust_dpo``.

Notation: ``margin`` is :math:`z=\beta h`, the implicit reward of the chosen response less that of the rejected one; ``noise_rate`` is
:math:`\varepsilon\in[0,\frac12)`, the share of flipped labels; ``base`` names the loss :math:`\ell(z)`: "logistic" :math:`\log(1+e^{-z})` (DPO),
"squared" :math:`(z-c)^2` (IPO) or "hinge" :math:`\max(0,c-z)` (SLiC), with ``target`` :math:`c`. Logs are natural.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lossbook import _checks

BASES = ("logistic", "squared", "hinge")
KINDS = ("dpo", "cdpo", "rdpo")

# ---------------------------------------------------------------------------------------------------------------------
# The margin, and the losses that know nothing of noise
# ---------------------------------------------------------------------------------------------------------------------


def _rate(name: str, value: float) -> float:
    """``value`` as a float, if it is a share of flips in [0, 0.5)."""
    value = _checks.number(name, value, 0)
    if value >= 0.5:
        raise ValueError(f"{name} must lie in [0, 0.5), got {value}: at 0.5 the labels say nothing")
    return value


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return value


def _margin(margin: Tensor) -> Tensor:
    """The margin in float32 or wider, if it is a tensor of finite numbers."""
    return _checks.wide(_checks.finite("margin", _checks.floating("margin", margin)))


def preference_margin(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""The implicit reward margin :math:`z=\beta\big[\log\frac{\pi_\theta(a_w)}{\pi_0(a_w)}-\log\frac{\pi_\theta(a_l)}{\pi_0(a_l)}\big]` (eq-robust_dpo-margin).

    Args:
        policy_chosen_logps: log-probabilities of the chosen responses under the policy, each summed over its tokens, shape ``(B,)``.
        policy_rejected_logps: those of the rejected responses, shape ``(B,)``.
        ref_chosen_logps: under the reference policy, without gradient, shape ``(B,)``.
        ref_rejected_logps: as well, shape ``(B,)``.
        beta: :math:`\beta>0`, the price of divergence from the reference.

    Returns:
        Shape ``(B,)``, in float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Complexity: O(B) time and memory.

    Source: Rafailov et al. 2023 (DPO); Ray Chowdhury et al. 2024, preliminaries.

    Example:
        >>> first, second = torch.tensor([-3.0]), torch.tensor([-6.0])
        >>> preference_margin(first, second, torch.tensor([-4.0]), torch.tensor([-5.0]), beta=0.5)
        tensor([1.])
    """
    logps = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
    }
    _checks.floating("policy_chosen_logps", policy_chosen_logps, 1)
    for name, value in logps.items():
        _checks.like(name, value, "policy_chosen_logps", policy_chosen_logps, 1)
    beta = _checks.positive_number("beta", beta)
    chosen, rejected, ref_chosen, ref_rejected = map(_checks.wide, logps.values())
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    if _checks.known_false(torch.isfinite(margin.detach().sum())):  # one pass in place of four: look for the culprit
        for name, value in logps.items():
            _checks.finite(name, value)
    return margin if beta == 1 else beta * margin


def _loss(z: Tensor, base: str, target: float) -> Tensor:
    r"""The base loss :math:`\ell(z)`, element by element."""
    if base == "logistic":
        return -F.logsigmoid(z)  # exact for large z, where softplus switches to an approximation
    return (z - target).square() if base == "squared" else F.relu(target - z)


def _swap_gap(z: Tensor, base: str, target: float) -> Tensor:
    r""":math:`\ell(z)-\ell(-z)`, what the loss changes by if the pair is swapped (eq-robust_dpo-gap)."""
    if base == "logistic":
        return -z
    return -4 * target * z if base == "squared" else F.relu(target - z) - F.relu(target + z)


def _base(margin: Tensor, base: str, target: float) -> tuple[Tensor, float]:
    _one_of("base", base, BASES)
    return _margin(margin), _checks.positive_number("target", target)


def preference_loss(margin: Tensor, *, base: str = "logistic", target: float = 1.0, reduction: str = "mean") -> Tensor:
    r"""A base loss :math:`\ell(z)` that takes every label as it is: DPO, IPO or the hinge (eq-robust_dpo-bases).

    IPO with its own parameter :math:`\tau`, as published, is ``base="squared"`` with a margin of ``beta=1`` and ``target`` :math:`=\frac1{2\tau}`.
    Reward models train by the same losses, with the difference of two rewards as their margin.

    Args:
        margin: :math:`z`, floating point, shape ``(B,)``, or any other: the loss is elementwise.
        base: "logistic", "squared" or "hinge".
        target: :math:`c>0` of the last two; the logistic loss has none.
        reduction: "none", "mean" or "sum".

    Returns:
        Shape ``()``, or that of ``margin`` with reduction "none".

    Raises:
        TypeError, ValueError: for a wrong type, value or word, naming the argument.

    Complexity: O(B) time and memory.

    Source: Rafailov et al. 2023 (logistic); Azar et al. 2024 (squared); Zhao et al. 2023 (hinge).

    Example:
        >>> [round(preference_loss(torch.tensor([0.5]), base=base).item(), 4) for base in BASES]
        [0.4741, 0.25, 0.5]
    """
    z, target = _base(margin, base, target)
    return _checks.reduced(_loss(z, base, target), reduction)


def dpo_loss(margin: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""Direct preference optimization: :math:`\ell(z)=\log(1+e^{-z})` (eq-robust_dpo-dpo).

    Args:
        margin: :math:`z`, floating point, shape ``(B,)``, or any other: the loss is elementwise.
        reduction: "none", "mean" or "sum".

    Returns:
        Shape ``()``, or that of ``margin`` with reduction "none"; at least 0.

    Raises:
        TypeError, ValueError: for a wrong type or word, naming the argument.

    Complexity: O(B) time and memory.

    Source: Rafailov et al. 2023, equation (7).

    Example:
        >>> dpo_loss(torch.tensor([1.0]))
        tensor(0.3133)
    """
    return preference_loss(margin, reduction=reduction)


# ---------------------------------------------------------------------------------------------------------------------
# Two answers to flipped labels: smooth them, or undo them
# ---------------------------------------------------------------------------------------------------------------------


def conservative_dpo_loss(
    margin: Tensor, *, noise_rate: float, base: str = "logistic", target: float = 1.0, reduction: str = "mean"
) -> Tensor:
    r"""Label smoothing: :math:`(1-\varepsilon)\ell(z)+\varepsilon\ell(-z)`, for DPO :math:`\ell(z)+\varepsilon z` (eq-robust_dpo-conservative).

    Args:
        margin: :math:`z`, floating point, shape ``(B,)``, or any other: the loss is elementwise.
        noise_rate: :math:`\varepsilon\in[0,\frac12)`.
        base: "logistic" (cDPO), "squared" or "hinge".
        target: :math:`c>0` of the last two.
        reduction: "none", "mean" or "sum".

    Returns:
        Shape ``()``, or that of ``margin`` with reduction "none".

    Raises:
        TypeError, ValueError: for a wrong type, value or word, naming the argument.

    Complexity: O(B) time and memory.

    Source: Mitchell 2023 (cDPO); Ray Chowdhury et al. 2024, its comparison.

    Example:
        >>> conservative_dpo_loss(torch.tensor([1.0]), noise_rate=0.25)
        tensor(0.5633)
    """
    noise_rate = _rate("noise_rate", noise_rate)
    z, target = _base(margin, base, target)
    return _checks.reduced(_loss(z, base, target) - noise_rate * _swap_gap(z, base, target), reduction)


def robust_dpo_loss(
    margin: Tensor, *, noise_rate: float, base: str = "logistic", target: float = 1.0, reduction: str = "mean"
) -> Tensor:
    r"""The unbiased loss: its expectation over flips at this rate is :math:`\ell(z)` on the clean pair (eq-robust_dpo-robust).

    :math:`\hat\ell(z)=\frac{(1-\varepsilon)\ell(z)-\varepsilon\ell(-z)}{1-2\varepsilon}=\ell(z)+\frac\varepsilon{1-2\varepsilon}[\ell(z)-\ell(-z)]`; for DPO
    :math:`\ell(z)-\frac\varepsilon{1-2\varepsilon}z`. For :math:`\varepsilon>0` the logistic and hinge losses have no lower bound; the squared one is
    the same parabola around a target of :math:`\frac c{1-2\varepsilon}`, less a constant (eq-robust_dpo-ipo).

    Args:
        margin: :math:`z`, floating point, shape ``(B,)``, or any other: the loss is elementwise.
        noise_rate: :math:`\varepsilon\in[0,\frac12)`, the assumed share of flipped labels.
        base: "logistic" (rDPO), "squared" (robust IPO) or "hinge".
        target: :math:`c>0` of the last two.
        reduction: "none", "mean" or "sum".

    Returns:
        Shape ``()``, or that of ``margin`` with reduction "none"; may be negative.

    Raises:
        TypeError, ValueError: for a wrong type, value or word, naming the argument.

    Complexity: O(B) time and memory.

    Source: Ray Chowdhury et al. 2024, the rDPO loss.

    Example:
        >>> robust_dpo_loss(torch.tensor([1.0]), noise_rate=0.25)
        tensor(-0.1867)
    """
    noise_rate = _rate("noise_rate", noise_rate)
    z, target = _base(margin, base, target)
    excess = noise_rate / (1 - 2 * noise_rate)
    return _checks.reduced(_loss(z, base, target) + excess * _swap_gap(z, base, target), reduction)


def robust_preference_loss(
    loss_fn: Callable[[Tensor], Tensor], margin: Tensor, *, noise_rate: float, reduction: str = "mean"
) -> Tensor:
    r"""The unbiased version of any loss, :math:`\frac{(1-\varepsilon)\ell(z)-\varepsilon\ell(-z)}{1-2\varepsilon}` (eq-robust_dpo-robust).

    Args:
        loss_fn: :math:`\ell`, elementwise: a tensor to a tensor of the same shape.
        margin: :math:`z`, floating point, shape ``(B,)``, or any other.
        noise_rate: :math:`\varepsilon\in[0,\frac12)`.
        reduction: "none", "mean" or "sum".

    Returns:
        Shape ``()``, or that of ``margin`` with reduction "none".

    Raises:
        TypeError, ValueError: for a wrong type, value or word, or a ``loss_fn`` that changes the shape, naming the argument.

    Complexity: two calls of ``loss_fn`` on B numbers.

    Source: Ray Chowdhury et al. 2024, the unbiased estimator; Natarajan et al. 2013 for classification.

    Example:
        >>> robust_preference_loss(lambda z: torch.exp(-z), torch.tensor([1.0]), noise_rate=0.25)
        tensor(-0.8073)
    """
    noise_rate = _rate("noise_rate", noise_rate)
    z = _margin(margin)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of a tensor, got {type(loss_fn).__name__}")
    kept, swapped = loss_fn(z), loss_fn(-z)
    if not isinstance(kept, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got {type(kept).__name__}")
    if kept.shape != z.shape or swapped.shape != z.shape:
        raise ValueError(f"loss_fn must keep the shape of margin, {tuple(z.shape)}, got {tuple(kept.shape)}")
    loss = ((1 - noise_rate) * kept - noise_rate * swapped) / (1 - 2 * noise_rate)
    return _checks.reduced(loss, reduction)


def _slope(kind: str, noise_rate: float) -> float:
    """The slope of the linear term by which a loss differs from DPO's (eq-robust_dpo-slopes)."""
    return {"dpo": 0.0, "cdpo": noise_rate, "rdpo": -noise_rate / (1 - 2 * noise_rate)}[_one_of("kind", kind, KINDS)]


def gradient_weight(margin: Tensor, *, kind: str, noise_rate: float = 0.0) -> Tensor:
    r"""How hard a pair is pushed apart, :math:`-\partial\,\mathrm{loss}/\partial z` (eq-robust_dpo-weights).

    :math:`\sigma(-z)` for DPO, :math:`\sigma(-z)-\varepsilon` for cDPO, :math:`\sigma(-z)+\frac\varepsilon{1-2\varepsilon}` for rDPO.

    Args:
        margin: :math:`z`, floating point, any shape.
        kind: "dpo", "cdpo" or "rdpo".
        noise_rate: :math:`\varepsilon\in[0,\frac12)`; "dpo" does not use it.

    Returns:
        The shape of ``margin``.

    Raises:
        TypeError, ValueError: for a wrong type, value or word, naming the argument.

    Complexity: O(B) time and memory.

    Source: Ray Chowdhury et al. 2024, the weights in the gradients.

    Example:
        >>> [round(gradient_weight(torch.tensor([1.0]), kind=kind, noise_rate=0.25).item(), 4) for kind in KINDS]
        [0.2689, 0.0189, 0.7689]
    """
    return torch.sigmoid(-_margin(margin)) - _slope(kind, _rate("noise_rate", noise_rate))


def flip_variance(margin: Tensor, *, noise_rate: float, base: str = "logistic", target: float = 1.0) -> Tensor:
    r"""The price of being unbiased: the variance of :math:`\hat\ell` over the flip of one pair (eq-robust_dpo-variance).

    :math:`\frac{\varepsilon(1-\varepsilon)}{(1-2\varepsilon)^2}[\ell(z)-\ell(-z)]^2`, for DPO with :math:`z^2` in place of the square.

    Args:
        margin: :math:`z` of the clean pair, floating point, any shape.
        noise_rate: :math:`\varepsilon\in[0,\frac12)`.
        base: "logistic", "squared" or "hinge".
        target: :math:`c>0` of the last two.

    Returns:
        The shape of ``margin``.

    Raises:
        TypeError, ValueError: for a wrong type, value or word, naming the argument.

    Complexity: O(B) time and memory.

    Source: derived in the chapter (prop-robust_dpo-variance).

    Example:
        >>> flip_variance(torch.tensor([2.0]), noise_rate=0.25)
        tensor([3.])
    """
    noise_rate = _rate("noise_rate", noise_rate)
    z, target = _base(margin, base, target)
    return noise_rate * (1 - noise_rate) / (1 - 2 * noise_rate) ** 2 * _swap_gap(z, base, target).square()


# ---------------------------------------------------------------------------------------------------------------------
# What the losses are minimized by, with endless data
# ---------------------------------------------------------------------------------------------------------------------


def _share(p: Tensor, kind: str, noise_rate: float, assumed_rate: float) -> Tensor:
    """:func:`effective_probability` times a factor that is the same for p and 1 - p; small probabilities keep their digits."""
    if kind == "dpo":
        return (1 - 2 * noise_rate) * p + noise_rate
    if kind == "cdpo":
        return (1 - 2 * assumed_rate) * ((1 - 2 * noise_rate) * p + noise_rate) + assumed_rate
    return (1 - 2 * noise_rate) * p + (noise_rate - assumed_rate)


def _probability(
    p: float | Tensor, kind: str, noise_rate: float, assumed_rate: float | None
) -> tuple[Tensor, float, float]:
    p = p if isinstance(p, Tensor) else torch.tensor(_checks.number("p", p, 0, 1), dtype=torch.float64)
    p = _checks.wide(_checks.floating("p", p))
    if _checks.known_false((p >= 0) & (p <= 1)):
        raise ValueError(f"p must lie in [0, 1], got {p.min().item()} to {p.max().item()}")
    _one_of("kind", kind, KINDS)
    noise_rate = _rate("noise_rate", noise_rate)
    return p, noise_rate, noise_rate if assumed_rate is None else _rate("assumed_rate", assumed_rate)


def effective_probability(
    p: float | Tensor, *, kind: str, noise_rate: float, assumed_rate: float | None = None
) -> Tensor:
    r"""The probability :math:`q` for which a loss on noisy labels is, in expectation, the clean loss (eq-robust_dpo-effective).

    The expected loss of a pair is :math:`q\,\ell(z)+(1-q)\,\ell(-z)` with :math:`q=p_\varepsilon=(1-2\varepsilon)p+\varepsilon` for "dpo",
    :math:`(1-2\varepsilon')p_\varepsilon+\varepsilon'` for "cdpo" and :math:`\frac{p_\varepsilon-\varepsilon'}{1-2\varepsilon'}` for "rdpo", which leaves [0, 1] where
    :math:`\varepsilon'` is assumed too large. This holds for every base loss.

    Args:
        p: clean probability that the first response is preferred, a number or a tensor of any shape, in [0, 1].
        kind: "dpo", "cdpo" or "rdpo".
        noise_rate: :math:`\varepsilon\in[0,\frac12)`, the true share of flips.
        assumed_rate: :math:`\varepsilon'`, the rate in the loss; None for the true one. "dpo" does not use it.

    Returns:
        The shape of ``p``, in float32 or wider (float64 for a number).

    Raises:
        TypeError, ValueError: for a wrong type, value or word, naming the argument.

    Complexity: O(1) a number.

    Source: derived in the chapter (prop-robust_dpo-population).

    Example:
        >>> [round(effective_probability(0.9, kind=kind, noise_rate=0.2).item(), 4) for kind in KINDS]
        [0.74, 0.644, 0.9]
    """
    p, noise_rate, assumed = _probability(p, kind, noise_rate, assumed_rate)
    share = _share(p, kind, noise_rate, assumed)
    return share / (1 - 2 * assumed) if kind == "rdpo" else share


def population_margin(
    p: float | Tensor,
    *,
    kind: str,
    noise_rate: float,
    assumed_rate: float | None = None,
    base: str = "logistic",
    target: float = 1.0,
) -> Tensor:
    r"""The margin that minimizes the expected loss of one pair, in closed form (eq-robust_dpo-optimum).

    With :math:`q` from :func:`effective_probability`: :math:`\log\frac q{1-q}` for the logistic loss, :math:`c(2q-1)` for the squared one,
    :math:`c\,\mathrm{sign}(q-\frac12)` for the hinge (at a tie every :math:`|z|\le c` is as good as the 0 that is returned).

    Args:
        p: clean probability that the first response is preferred, a number or a tensor of any shape, in [0, 1].
        kind: "dpo", "cdpo" or "rdpo".
        noise_rate: :math:`\varepsilon\in[0,\frac12)`, the true share of flips.
        assumed_rate: :math:`\varepsilon'`, the rate in the loss; None for the true one.
        base: "logistic", "squared" or "hinge".
        target: :math:`c>0` of the last two.

    Returns:
        The shape of ``p``, in float32 or wider (float64 for a number).

    Raises:
        ValueError: where no margin is finite and optimal: :math:`q` outside of (0, 1) for the logistic loss, outside of [0, 1] for the hinge.
        TypeError, ValueError: for a wrong type, value or word, naming the argument.

    Complexity: O(1) a number.

    Source: derived in the chapter (prop-robust_dpo-population).

    Example:
        >>> [round(population_margin(0.9, kind=kind, noise_rate=0.2).item(), 4) for kind in KINDS]
        [1.046, 0.5928, 2.1972]
    """
    p, noise_rate, assumed = _probability(p, kind, noise_rate, assumed_rate)
    _one_of("base", base, BASES)
    target = _checks.positive_number("target", target)
    wins, losses = (_share(x, kind, noise_rate, assumed) for x in (p, 1 - p))
    inside = (wins > 0) & (losses > 0) if base == "logistic" else (wins >= 0) & (losses >= 0)
    if base != "squared" and _checks.known_false(inside):
        raise ValueError(
            f"p must leave a finite optimum: at noise_rate {noise_rate} and assumed_rate {assumed} the {kind} loss with"
            f" base {base!r} has none for p from {p.min().item()} to {p.max().item()}"
        )
    if base == "logistic":
        return wins.log() - losses.log()
    gap = (wins - losses) / (1 - 2 * assumed if kind == "rdpo" else 1)
    return target * (gap if base == "squared" else gap.sign())


def flip_labels(
    chosen: Tensor, rejected: Tensor, noise_rate: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Swap each pair with probability ``noise_rate``, independently of all else (def-robust_dpo-noise).

    Args:
        chosen: responses, or anything that stands for them, shape ``(B, ...)``, any dtype.
        rejected: those that lost, of the same shape and dtype.
        noise_rate: :math:`\varepsilon\in[0,\frac12)`.
        generator: of random numbers, on the device of ``chosen``; None for torch's own.

    Returns:
        ``chosen`` and ``rejected`` with the swapped rows exchanged, and which were, bool, shape ``(B,)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Complexity: O(size of ``chosen``) time and memory.

    Source: Ray Chowdhury et al. 2024, the model of noise.

    Example:
        >>> chosen, rejected, flipped = flip_labels(torch.ones(1000), torch.zeros(1000), 0.25, torch.Generator().manual_seed(0))
        >>> bool((chosen == ~flipped).all()), round(flipped.float().mean().item(), 2)
        (True, 0.25)
    """
    if not isinstance(chosen, Tensor) or not isinstance(rejected, Tensor):
        name, value = ("chosen", chosen) if not isinstance(chosen, Tensor) else ("rejected", rejected)
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if chosen.ndim < 1 or rejected.shape != chosen.shape:
        raise ValueError(
            f"chosen and rejected must have one shape (B, ...), got {tuple(chosen.shape)} and {tuple(rejected.shape)}"
        )
    if rejected.dtype != chosen.dtype:
        raise TypeError(f"rejected must have the dtype of chosen, {chosen.dtype}, got {rejected.dtype}")
    noise_rate = _rate("noise_rate", noise_rate)
    flipped = torch.rand(len(chosen), generator=generator, device=chosen.device) < noise_rate
    swap = flipped.reshape(-1, *[1] * (chosen.ndim - 1))
    return torch.where(swap, rejected, chosen), torch.where(swap, chosen, rejected), flipped


# ---------------------------------------------------------------------------------------------------------------------
# Log-linear policies: the estimator and its bounds
# ---------------------------------------------------------------------------------------------------------------------


class LogLinearPreference:
    r"""The preference losses for log-linear policies :math:`\pi_\theta(a|s)\propto e^{\phi(s,a)^\top\theta}`: a convex problem in :math:`w=\theta-\theta_0`.

    Minimizes :math:`\frac1n\sum_i\mathrm{loss}(\beta x_i^\top w)+\frac\rho2\|w\|^2` by Newton's method in float64 (eq-robust_dpo-estimator). With a ``radius`` it finds
    the minimizer in the ball :math:`\|w\|\le B`: where the free one is longer, or where there is none, the ridge is raised until :math:`\|w\|=B`.

    Args:
        beta: :math:`\beta>0`.
        noise_rate: :math:`\varepsilon\in[0,\frac12)`; "dpo" does not use it.
        kind: "dpo", "cdpo" or "rdpo".
        radius: :math:`B>0`, or None for no ball.
        ridge: :math:`\rho\ge0`.
        max_iter: iterations, for each ridge that is tried.
        tol: on the root mean square by which another Newton step would change the margins; features that are collinear
            up to 1e-7 of their size count as collinear.

    Attributes:
        coef_: :math:`\hat w`, float64, shape ``(d,)``.
        ridge_: the ridge that belongs to it: ``ridge``, or more where the ball is active.
        converged_: whether it is a minimizer. Without ridge and radius there may be none: then ``coef_`` is where the search broke off.

    Raises:
        TypeError, ValueError: for a wrong type, value or word, naming the argument.

    Complexity: O(nd² + d³) an iteration; some 10 ridges where the ball is active.

    Source: Ray Chowdhury et al. 2024, log-linear policies; the constrained solution derived in the chapter (rem-robust_dpo-ball).

    Example:
        >>> x = torch.tensor([[1.0], [1.0], [1.0], [-1.0]])  # the first response wins three times out of four
        >>> LogLinearPreference(1.0, 0.0, "dpo").fit(x).coef_  # log 3
        tensor([1.0986], dtype=torch.float64)
    """

    def __init__(
        self,
        beta: float,
        noise_rate: float,
        kind: str,
        radius: float | None = None,
        ridge: float = 0.0,
        *,
        max_iter: int = 100,
        tol: float = 1e-8,
    ):
        self.beta = _checks.positive_number("beta", beta)
        self.noise_rate = _rate("noise_rate", noise_rate)
        self.kind = _one_of("kind", kind, KINDS)
        self.radius = None if radius is None else _checks.positive_number("radius", radius)
        self.ridge = _checks.number("ridge", ridge, 0)
        self.max_iter = _checks.positive_int("max_iter", max_iter)
        self.tol = _checks.positive_number("tol", tol)

    def fit(self, x: Any) -> "LogLinearPreference":
        """Fit to feature differences ``x``, chosen less rejected, floating point, shape ``(n, d)``; returns itself.

        Raises:
            TypeError, ValueError: for another type or shape, or numbers that are not finite.
            RuntimeWarning: (a warning) where no minimum was found.
        """
        x = self._features(x)
        self.n_features_in_ = x.shape[1]
        w, converged = self._solve(x, torch.zeros(x.shape[1], dtype=torch.float64), self.ridge)
        ridge = self.ridge
        if self.radius is not None and not (converged and w.norm() <= self.radius):
            w, converged, ridge = self._on_sphere(x, w, converged)
        self.coef_, self.converged_, self.ridge_ = w, converged, ridge
        if not converged:
            warnings.warn(
                f"no minimum was found in {self.max_iter} iterations: the {self.kind} loss may be unbounded below on these"
                " pairs; set radius or ridge",
                RuntimeWarning,
                stacklevel=2,
            )
        return self

    def decision_function(self, x: Any) -> Tensor:
        r"""The margins :math:`\beta x^\top\hat w`, float64, shape ``(n,)``, of differences ``x`` of shape ``(n, d)``."""
        if not hasattr(self, "coef_"):
            raise RuntimeError("fit must come before decision_function, predict and predict_proba")
        x = self._features(x)
        if x.shape[1] != self.n_features_in_:
            raise ValueError(f"x must have {self.n_features_in_} columns, as in fit, got {x.shape[1]}")
        return self.beta * (x @ self.coef_)

    def predict_proba(self, x: Any) -> Tensor:
        """The probability that the first response is preferred, shape ``(n,)``."""
        return torch.sigmoid(self.decision_function(x))

    def predict(self, x: Any) -> Tensor:
        """Whether the first response is preferred, bool, shape ``(n,)``."""
        return self.decision_function(x) > 0

    @staticmethod
    def _features(x: Any) -> Tensor:
        x = _checks.floating("x", torch.as_tensor(x), 2).detach().to("cpu", torch.float64)
        return _checks.finite("x", x)

    def _loss(self, x: Tensor, w: Tensor, ridge: float) -> Tensor:
        z = self.beta * (x @ w)
        return (_slope(self.kind, self.noise_rate) * z - F.logsigmoid(z)).mean() + ridge / 2 * w.square().sum()

    def _gradient(self, x: Tensor, w: Tensor, ridge: float) -> Tensor:
        weight = gradient_weight(self.beta * (x @ w), kind=self.kind, noise_rate=self.noise_rate)
        return ridge * w - self.beta * (weight @ x) / len(x)

    @staticmethod
    def _scaled(hessian: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix with ones on its diagonal, since features may differ in size by any factor, and the scale."""
        scale = hessian.diagonal().clamp(min=1e-300).rsqrt()
        return scale[:, None] * hessian * scale, scale

    def _solve(self, x: Tensor, w: Tensor, ridge: float) -> tuple[Tensor, bool]:
        """The minimizer for one ridge, by Newton's method from ``w``, and whether it is one."""
        rtol, eye = 1e-15 * max(10, len(w)), torch.eye(len(w), dtype=w.dtype)
        gram, _ = self._scaled(self.beta**2 / len(x) * x.T @ x + ridge * eye)
        rank = torch.linalg.matrix_rank(gram, rtol=rtol, hermitian=True)
        for _ in range(self.max_iter):
            z = self.beta * (x @ w)
            curvature = torch.sigmoid(z) * torch.sigmoid(-z)  # above zero far out, where 1 - sigmoid is not
            hessian = self.beta**2 / len(x) * (x.T * curvature) @ x + ridge * eye
            gradient = self._gradient(x, w, ridge)
            scaled, scale = self._scaled(hessian)
            step = scale * (torch.linalg.pinv(scaled, rtol=rtol, hermitian=True) @ (scale * gradient))
            if not torch.isfinite(step).all():
                return w, False
            # The gradient alone would not do: it vanishes at infinity, too, where the pairs can be separated.
            if self.beta * (x @ step).square().mean().sqrt() <= self.tol and (ridge * step).norm() <= self.tol:
                # Nor is it one where pairs differ in a direction in which the loss no longer bends.
                return w - step, bool(torch.linalg.matrix_rank(scaled, rtol=rtol, hermitian=True) == rank)
            loss, t = self._loss(x, w, ridge), 1.0
            while t > 1e-10 and self._loss(x, w - t * step, ridge) > loss - 1e-4 * t * (gradient @ step) + 1e-14:
                t /= 2
            w = w - t * step
        return w, False

    def _on_sphere(self, x: Tensor, free: Tensor, converged: bool) -> tuple[Tensor, bool, float]:
        r"""The minimizer on the sphere: the root of 1/|w| - 1/B, which grows with the ridge, and nearly linearly (Illinois' rule)."""
        zero = torch.zeros(x.shape[1], dtype=torch.float64)
        # A minimizer w has ridge |w|² = -<loss's gradient at w, w> <= |gradient at 0| |w| by convexity.
        low, high = self.ridge, max(self.ridge, self._gradient(x, zero, 0).norm().item() / self.radius)
        below = (1 / free.norm().item() if converged else 0.0) - 1 / self.radius
        w, converged = self._solve(x, zero, high)
        above = 1 / max(w.norm().item(), 1e-300) - 1 / self.radius
        best, side = (w, converged, high), 0
        for _ in range(60):
            if abs(1 / self.radius - 1 / best[0].norm().item()) <= 1e-8 / self.radius or not best[1]:
                break
            middle = (low * above - high * below) / (above - below)
            w, converged = self._solve(x, best[0], middle)
            gap = (1 / w.norm().item() if converged else 0.0) - 1 / self.radius
            if gap < 0:
                low, below, above, side = middle, gap, above / (2 if side < 0 else 1), -1
            else:
                high, above, below, side, best = middle, gap, below / (2 if side > 0 else 1), 1, (w, True, middle)
        return best


def curvature_floor(max_margin: float) -> float:
    r"""The least curvature of the logistic loss on :math:`|z|\le m`, :math:`\gamma=\sigma'(m)=\frac1{2+e^m+e^{-m}}` (eq-robust_dpo-gamma).

    Args:
        max_margin: :math:`m\ge0`; for features of norm at most L and the ball of radius B it is :math:`2\beta LB`.

    Returns:
        :math:`\gamma\in[0,\frac14]`.

    Raises:
        TypeError, ValueError: for another ``max_margin``.

    Complexity: O(1).

    Source: Ray Chowdhury et al. 2024, log-linear policies.

    Example:
        >>> curvature_floor(0.0), round(curvature_floor(2.0), 4)
        (0.25, 0.105)
    """
    small = math.exp(-_checks.number("max_margin", max_margin, 0))
    return small / (1 + small) ** 2


def estimation_bound(
    d: int, n: int, *, noise_rate: float, beta: float, gamma: float, radius: float, ridge: float, delta: float
) -> float:
    r"""A bound on :math:`\|\hat\theta-\theta^*\|_{\hat\Sigma+\lambda I}` for rDPO that fails with probability at most :math:`\delta` (eq-robust_dpo-bound).

    :math:`\frac1{\gamma\beta(1-2\varepsilon)}\sqrt{\frac{d+2\sqrt{d\ln(1/\delta)}+2\ln(1/\delta)}n}+2B\sqrt\lambda`.

    Args:
        d: number of features.
        n: number of pairs.
        noise_rate: :math:`\varepsilon\in[0,\frac12)`.
        beta: :math:`\beta>0`.
        gamma: :math:`\gamma\in(0,\frac14]`, from :func:`curvature_floor`.
        radius: :math:`B>0` of the ball that holds :math:`\theta^*-\theta_0`, and in which the estimator stays.
        ridge: :math:`\lambda\ge0` of the norm (the estimator has none).
        delta: :math:`\delta\in(0,1)`.

    Returns:
        The right side of the bound.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Complexity: O(1).

    Source: Ray Chowdhury et al. 2024, the estimation error; constants derived in the chapter (thm-robust_dpo-estimation).

    Example:
        >>> round(estimation_bound(5, 2000, noise_rate=0.2, beta=1, gamma=0.105, radius=1, ridge=1e-3, delta=0.1), 4)
        1.5002
    """
    d, n = _checks.positive_int("d", d), _checks.positive_int("n", n)
    if _checks.positive_number("gamma", gamma) > 0.25:
        raise ValueError(f"gamma must lie in (0, 0.25], got {gamma}")
    if _checks.positive_number("delta", delta) >= 1:
        raise ValueError(f"delta must lie in (0, 1), got {delta}")
    log = -math.log(delta)
    noise = math.sqrt((d + 2 * math.sqrt(d * log) + 2 * log) / n)
    scale = gamma * _checks.positive_number("beta", beta) * (1 - 2 * _rate("noise_rate", noise_rate))
    radius = _checks.positive_number("radius", radius)
    return noise / scale + 2 * radius * math.sqrt(_checks.number("ridge", ridge, 0))


def suboptimality_bound(error: float, *, max_reward: float, coverage: float) -> float:
    r"""A bound on the reward that is lost, :math:`\frac{r_{\max}\sqrt\kappa}2\|\hat\theta-\theta^*\|_{\Sigma_0}` (eq-robust_dpo-suboptimality).

    Args:
        error: :math:`\|\hat\theta-\theta^*\|_{\Sigma_0}\ge0`, :math:`\Sigma_0` the covariance of the features within a prompt under the reference.
        max_reward: :math:`r_{\max}>0`; rewards lie in :math:`[0,r_{\max}]`.
        coverage: :math:`\kappa\ge1`, by which such a covariance under a policy of the ball exceeds :math:`\Sigma_0` at most.

    Returns:
        The right side of the bound.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Complexity: O(1).

    Source: Ray Chowdhury et al. 2024, the performance gap; constants derived in the chapter (thm-robust_dpo-suboptimality).

    Example:
        >>> suboptimality_bound(0.1, max_reward=2.0, coverage=4.0)
        0.2
    """
    error = _checks.number("error", error, 0)
    max_reward = _checks.positive_number("max_reward", max_reward)
    return max_reward * math.sqrt(_checks.number("coverage", coverage, 1)) / 2 * error


# ---------------------------------------------------------------------------------------------------------------------
# Reward against divergence: order and magnitude told apart
# ---------------------------------------------------------------------------------------------------------------------


def _normalized(name: str, logps: Tensor) -> Tensor:
    """Log-probabilities over the last dimension, if they are known to sum to one."""
    _checks.floating(name, logps)
    if logps.ndim < 1:
        raise ValueError(f"{name} must have shape (..., A), got ()")
    total = torch.logsumexp(_checks.wide(logps.detach()), -1)
    if _checks.known_false(total.abs() < 1e-3):
        raise ValueError(f"{name} must be log-probabilities that sum to one over the last dimension")
    return _checks.wide(logps)


def optimal_policy(ref_logps: Tensor, reward: Tensor, *, beta: float) -> Tensor:
    r"""The policy of the most reward less :math:`\beta\,\mathrm{KL}(\pi\|\pi_0)`: :math:`\pi^*\propto\pi_0e^{r/\beta}` (eq-robust_dpo-tilt).

    No policy of the same or a smaller divergence has more reward: over all :math:`\beta` these policies are the reward-KL frontier.

    Args:
        ref_logps: :math:`\log\pi_0`, shape ``(..., A)``, over the A responses of the last dimension.
        reward: :math:`r`, finite, of the same shape and dtype.
        beta: :math:`\beta>0`.

    Returns:
        :math:`\log\pi^*`, the shape of ``ref_logps``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, or for log-probabilities that are none, naming the argument.

    Complexity: O(A) time and memory a prompt.

    Source: Ray Chowdhury et al. 2024, preliminaries; the frontier derived in the chapter (prop-robust_dpo-frontier).

    Example:
        >>> optimal_policy(torch.tensor([0.5, 0.5]).log(), torch.tensor([math.log(3), 0.0]), beta=1.0).exp()
        tensor([0.7500, 0.2500])
    """
    logps = _normalized("ref_logps", ref_logps)
    _checks.finite("reward", _checks.like("reward", reward, "ref_logps", ref_logps, ref_logps.ndim))
    return torch.log_softmax(logps + reward / _checks.positive_number("beta", beta), -1)


def reward_and_kl(policy_logps: Tensor, ref_logps: Tensor, reward: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean reward and :math:`\mathrm{KL}(\pi\|\pi_0)` of a policy on finitely many responses (eq-robust_dpo-frontier).

    Args:
        policy_logps: :math:`\log\pi`, shape ``(..., A)``; :math:`-\infty` where the policy never goes.
        ref_logps: :math:`\log\pi_0`, of the same shape and dtype; finite.
        reward: :math:`r`, of the same shape and dtype; finite.

    Returns:
        Two tensors of shape ``(...)``; average them over prompts.

    Raises:
        TypeError, ValueError: for a wrong type or shape, or for log-probabilities that are none, naming the argument.

    Complexity: O(A) time and memory a prompt.

    Source: definitions; chapter (prop-robust_dpo-frontier).

    Example:
        >>> half = torch.tensor([0.5, 0.5]).log()
        >>> reward_and_kl(torch.tensor([0.75, 0.25]).log(), half, torch.tensor([1.0, 0.0]))
        (tensor(0.7500), tensor(0.1308))
    """
    logps = _normalized("policy_logps", policy_logps)
    for name, value in (("ref_logps", ref_logps), ("reward", reward)):
        _checks.finite(name, _checks.like(name, value, "policy_logps", policy_logps, policy_logps.ndim))
    ref = _normalized("ref_logps", ref_logps)
    p = logps.exp()
    ratio = torch.where(p > 0, logps - ref, 0)
    return (p * reward).sum(-1), (p * ratio).sum(-1)
