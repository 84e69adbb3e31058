r"""Forgetting by a bounded loss: negative preference optimization, what it is compared with, and how forgetting is measured.

The method of *Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning* (Zhang, Lin, Bai and Mei, COLM 2024, arXiv
2404.05868): the loss and its gradient's weight, gradient ascent and the other baselines, the retain terms, the metrics of the TOFU benchmark, the exact
dynamics of one example, and the paper's synthetic task. Equation labels are those of the chapter ``language/npo``.

Notation: ``logps`` (B,) holds :math:`\log\pi_\theta(y|x)`, the *sum* of an answer's token log-probabilities (:func:`lossbook.ops.sequence_logprobs`),
``ref_logps`` the same of the model before unlearning. :math:`R=\log\pi_\theta-\log\pi_{\rm ref}`, ``beta`` is :math:`\beta`. Logs are natural.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossbook import _checks
from lossbook.language.robust_dpo import dpo_loss

# ---------------------------------------------------------------------------------------------------------------------
# The loss and its weight
# ---------------------------------------------------------------------------------------------------------------------


def _log_ratio(logps: Tensor, ref_logps: Tensor, suffix: str = "") -> Tensor:
    """R (B,), in float32 or wider; the reference gets no gradient."""
    _checks.floating(f"logps{suffix}", logps, 1)
    _checks.like(f"ref_logps{suffix}", ref_logps, f"logps{suffix}", logps, 1)
    return _checks.wide(logps) - _checks.wide(ref_logps.detach())


def npo_loss(logps: Tensor, ref_logps: Tensor, *, beta: float, reduction: str = "mean") -> Tensor:
    r"""Negative preference optimization, :math:`\frac2\beta\log(1+(\pi_\theta/\pi_{\rm ref})^\beta)` of each answer to forget (eq-npo-loss).

    Args:
        logps: log-probabilities of the answers under the model, shape ``(B,)``, floating point; sums over tokens, not means.
        ref_logps: the same under the model before unlearning, shape ``(B,)``; no gradient flows into it.
        beta: :math:`\beta>0`. With log-probabilities that are sums, 0.1 suits long answers and 0.2 to 1 answers of a few tokens.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none"; float32 or wider, at least 0.

    Raises:
        TypeError, ValueError: for a wrong type, shape, beta or reduction, naming the argument.

    Complexity: O(B) time and memory.

    Source: Zhang et al., eq. 3.

    Example:
        >>> ref = torch.zeros(2)
        >>> npo_loss(torch.log(torch.tensor([3.0, 1 / 3])), ref, beta=1.0, reduction="none")  # 2 log 4, 2 log 4/3
        tensor([2.7726, 0.5754])
    """
    ratio, beta = _log_ratio(logps, ref_logps), _checks.positive_number("beta", beta)
    # softplus is linear above its threshold, which costs the gradient its last digits.
    return -2 / beta * _checks.reduced(F.logsigmoid(-beta * ratio), reduction)


def npo_weight(logps: Tensor, ref_logps: Tensor, *, beta: float) -> Tensor:
    r"""The weight :math:`W=2\sigma(\beta R)` by which the loss multiplies gradient ascent's gradient (eq-npo-weight).

    1 at the start for every :math:`\beta`; towards 0 as an answer is forgotten, towards 2 as it becomes likelier than it was.

    Args:
        logps, ref_logps, beta: as in :func:`npo_loss`.

    Returns:
        Shape ``(B,)``, in [0, 2], without a gradient.

    Raises:
        TypeError, ValueError: for a wrong type, shape or beta, naming the argument.

    Complexity: O(B).

    Source: Zhang et al., eq. 4, with the factor 2 that the appendix leaves out.

    Example:
        >>> npo_weight(torch.log(torch.tensor([3.0, 1.0, 1 / 3])), torch.zeros(3), beta=1.0)
        tensor([1.5000, 1.0000, 0.5000])
    """
    return 2 * torch.sigmoid(_checks.positive_number("beta", beta) * _log_ratio(logps.detach(), ref_logps))


# ---------------------------------------------------------------------------------------------------------------------
# What it is compared with, and the terms that keep what is to be kept
# ---------------------------------------------------------------------------------------------------------------------


def gradient_ascent_loss(logps: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""Gradient ascent, :math:`L_{GA}=\mathbb E\log\pi_\theta(y|x)`, to be minimized: unbounded below (eq-npo-ga).

    Args:
        logps: shape ``(B,)``, as in :func:`npo_loss`.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none"; float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape or reduction, naming the argument.

    Complexity: O(B).

    Source: Zhang et al., section 2.

    Example:
        >>> gradient_ascent_loss(torch.tensor([-1.0, -4.0]))
        tensor(-2.5000)
    """
    return _checks.reduced(_checks.wide(_checks.floating("logps", logps, 1)), reduction)


def retain_loss(logps: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""Cross-entropy of the answers to keep, :math:`L_{RT}=-\mathbb E\log\pi_\theta(y|x)` (eq-npo-retain).

    Args:
        logps: of answers to *retain*, shape ``(B,)``.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none"; float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape or reduction, naming the argument.

    Complexity: O(B).

    Source: Zhang et al., section 2.

    Example:
        >>> retain_loss(torch.tensor([-1.0, -4.0]))
        tensor(2.5000)
    """
    return -gradient_ascent_loss(logps, reduction=reduction)


def idk_loss(logps_idk: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""Cross-entropy of an uninformed answer ("I don't know") to the questions to forget, :math:`L_{FG}` (eq-npo-idk).

    Args:
        logps_idk: log-probabilities of the uninformed answers, shape ``(B,)``.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none"; float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape or reduction, naming the argument.

    Complexity: O(B).

    Source: Maini et al. 2024 (TOFU); Zhang et al., section 2.

    Example:
        >>> idk_loss(torch.tensor([-1.0, -4.0]))
        tensor(2.5000)
    """
    return -_checks.reduced(_checks.wide(_checks.floating("logps_idk", logps_idk, 1)), reduction)


def dpo_unlearning_loss(
    logps: Tensor,
    ref_logps: Tensor,
    logps_idk: Tensor,
    ref_logps_idk: Tensor,
    *,
    beta: float,
    reduction: str = "mean",
) -> Tensor:
    r"""DPO with the uninformed answer as winner: :math:`-\frac2\beta\log\sigma(\beta R_{\rm idk}-\beta R)` (eq-npo-dpo).

    Args:
        logps, ref_logps: of the answers to forget, shape ``(B,)``, as in :func:`npo_loss`.
        logps_idk, ref_logps_idk: of the uninformed answers, shape ``(B,)``.
        beta: :math:`\beta>0`.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none"; float32 or wider, at least 0.

    Raises:
        TypeError, ValueError: for a wrong type, shape, beta or reduction, naming the argument; or a margin that is not finite.

    Complexity: O(B) time and memory.

    Source: Rafailov et al. 2023, with the factor 2 of eq-npo-loss; Zhang et al., section 4.

    Example:
        >>> zero = torch.zeros(1)
        >>> dpo_unlearning_loss(torch.log(torch.tensor([3.0])), zero, zero, zero, beta=1.0)  # NPO, if the winner stays
        tensor(2.7726)
    """
    ratio = _log_ratio(logps, ref_logps)
    _checks.like("logps_idk", logps_idk, "logps", logps, 1)
    ratio_idk = _log_ratio(logps_idk, ref_logps_idk, "_idk")
    beta = _checks.positive_number("beta", beta)
    return 2 / beta * dpo_loss(beta * (ratio_idk - ratio), reduction=reduction)


def kto_unlearning_loss(
    logps: Tensor, ref_logps: Tensor, reference_point: float | Tensor, *, beta: float, reduction: str = "mean"
) -> Tensor:
    r"""KTO's loss of an undesired answer, in the logarithmic form: :math:`-\frac2\beta\log\sigma(\beta z-\beta R)` (eq-npo-kto).

    The reference point :math:`z` estimates :math:`\mathrm{KL}(\pi_\theta\|\pi_{\rm ref})`, or the mean log-ratio of the uninformed answers; it gets no gradient.
    NPO is :math:`z=0`. A loss minus a constant: the published code adds 1.

    Args:
        logps, ref_logps: of the answers to forget, shape ``(B,)``, as in :func:`npo_loss`.
        reference_point: :math:`z`, a number, or a tensor of shape ``()``.
        beta: :math:`\beta>0`; it multiplies :math:`z`, too, as in KTO and in the paper's synthetic code (its TOFU code does not do this).
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none"; float32 or wider, at least 0.

    Raises:
        TypeError, ValueError: for a wrong type, shape, reference point, beta or reduction, naming the argument; or a margin that is not finite.

    Complexity: O(B) time and memory.

    Source: Ethayarajh et al. 2024; the code of Zhang et al. (``kto_logsigmoid``).

    Example:
        >>> kto_unlearning_loss(torch.log(torch.tensor([3.0])), torch.zeros(1), 0.0, beta=1.0)
        tensor(2.7726)
    """
    ratio, beta = _log_ratio(logps, ref_logps), _checks.positive_number("beta", beta)
    if not isinstance(reference_point, Tensor):
        reference_point = _checks.number("reference_point", reference_point)
    elif reference_point.ndim or not reference_point.is_floating_point():
        raise ValueError(
            "reference_point must be a number or a floating-point tensor of shape (), "
            f"got {reference_point.dtype}, {tuple(reference_point.shape)}"
        )
    else:
        reference_point = reference_point.detach()
    return 2 / beta * dpo_loss(beta * (reference_point - ratio), reduction=reduction)


def retain_kl(logits: Tensor, ref_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Mean over tokens of :math:`\mathrm{KL}(\pi_{\rm ref}\|\pi_\theta)` of the next token, :math:`K_{RT}` (eq-npo-kl).

    Args:
        logits: shape ``(..., V)``, floating point.
        ref_logits: the same before unlearning; no gradient flows into them.
        mask: bool, shape ``(...)``, true where a token counts; at least one does. None: all.

    Returns:
        Shape ``()``, float32 or wider, at least 0 up to rounding. Subtracted, on answers to forget, it is the term :math:`-K_{FG}`.

    Raises:
        TypeError, ValueError: for a wrong type or shape, or a mask without a token, naming the argument.

    Complexity: O(TV) time and memory for T tokens that count.

    Source: Zhang et al., section 2. The text has :math:`\mathrm{KL}(\pi_\theta\|\pi_{\rm ref})`; this is the code's direction.

    Example:
        >>> retain_kl(torch.zeros(1, 2), torch.log(torch.tensor([[3.0, 1.0]])))  # log 2 minus the entropy of (3/4, 1/4)
        tensor(0.1308)
    """
    _checks.floating("logits", logits)
    _checks.like("ref_logits", ref_logits, "logits", logits, logits.ndim)
    if logits.ndim == 0:
        raise ValueError("logits must have shape (..., V), got shape ()")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a boolean tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.shape != logits.shape[:-1]:
            raise ValueError(f"mask must have shape {tuple(logits.shape[:-1])}, got {tuple(mask.shape)}")
        if _checks.known_false(mask.any()):
            raise ValueError("mask must keep at least one token, got only False")
        logits, ref_logits = logits[mask], ref_logits[mask]  # other tokens cost nothing and may hold anything
    ref = F.log_softmax(_checks.wide(ref_logits.detach()), -1)
    per_token = F.kl_div(F.log_softmax(_checks.wide(logits), -1), ref, reduction="none", log_target=True).sum(-1)
    return per_token.mean()


# ---------------------------------------------------------------------------------------------------------------------
# What has been forgotten, and what has been kept: the metrics of TOFU
# ---------------------------------------------------------------------------------------------------------------------


def truth_ratio(
    perturbed_logps: Tensor, paraphrased_logps: Tensor, *, mean: str = "arithmetic", log: bool = False
) -> Tensor:
    r"""Mean probability of wrong answers over the probability of a right one, each length-normalized (eq-npo-truth).

    Below 1 the model knows the answer; at about 1 it does not.

    Args:
        perturbed_logps: *mean* token log-probabilities of K wrong answers to each question, shape ``(B, K)``, floating point.
        paraphrased_logps: the same of a paraphrase of the right answer, shape ``(B,)``.
        mean: over the wrong answers: "arithmetic", as in TOFU's and the paper's text, or "geometric", as in the code of both.
        log: return the logarithm, which does not overflow; a Kolmogorov-Smirnov test gives the same p-value.

    Returns:
        Shape ``(B,)``, float32 or wider, > 0, or its logarithm.

    Raises:
        TypeError, ValueError: for a wrong type, shape or mean, naming the argument.

    Complexity: O(BK).

    Source: Maini et al. 2024 (TOFU); Zhang et al., section 5.

    Example:
        >>> wrong, right = torch.log(torch.tensor([[0.1, 0.3]])), torch.log(torch.tensor([0.4]))
        >>> truth_ratio(wrong, right), truth_ratio(wrong, right, mean="geometric")
        (tensor([0.5000]), tensor([0.4330]))
    """
    wrong = _checks.wide(_checks.floating("perturbed_logps", perturbed_logps, 2))
    _checks.floating("paraphrased_logps", paraphrased_logps, 1)
    if len(paraphrased_logps) != len(wrong):
        raise ValueError(
            f"paraphrased_logps must have shape ({len(wrong)},), one for each row of perturbed_logps, "
            f"got {tuple(paraphrased_logps.shape)}"
        )
    if mean not in ("arithmetic", "geometric"):
        raise ValueError(f"mean must be 'arithmetic' or 'geometric', got {mean!r}")
    numerator = wrong.mean(1) if mean == "geometric" else torch.logsumexp(wrong, 1) - math.log(wrong.shape[1])
    ratio = numerator - _checks.wide(paraphrased_logps)
    return ratio if log else ratio.exp()


def truth_score(ratios: Tensor) -> float:
    r"""Mean of :math:`\max(0,1-\text{truth ratio})`, the form in which truth ratios enter the model utility (eq-npo-utility).

    Args:
        ratios: truth ratios of questions whose answers should be known, shape ``(B,)``, >= 0; may be infinite.

    Returns:
        A float in [0, 1].

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(B).

    Source: Maini et al. 2024 (TOFU).

    Example:
        >>> truth_score(torch.tensor([0.25, 3.0]))
        0.375
    """
    _checks.floating("ratios", ratios, 1)
    if _checks.known_false(ratios >= 0):
        raise ValueError(f"ratios must be >= 0, got {ratios.min()}")
    return (1 - ratios).clamp(min=0).mean().item()


def answer_probability(logps: Tensor, wrong_logps: Tensor | None = None) -> float:
    r"""Mean length-normalized probability of the right answer; with wrong answers, its share among all of them (eq-npo-utility).

    Args:
        logps: mean token log-probabilities of the right answers, shape ``(B,)``, floating point.
        wrong_logps: of K wrong answers to each question, shape ``(B, K)``: for questions of multiple choice (real authors, world facts). None: retained answers.

    Returns:
        A float in [0, 1].

    Raises:
        TypeError, ValueError: for a wrong type or shape, naming the argument.

    Complexity: O(BK).

    Source: Maini et al. 2024 (TOFU).

    Example:
        >>> right, wrong = torch.log(torch.tensor([0.4])), torch.log(torch.tensor([[0.1, 0.3]]))
        >>> round(answer_probability(right), 4), round(answer_probability(right, wrong), 4)
        (0.4, 0.5)
    """
    right = _checks.wide(_checks.floating("logps", logps, 1))
    if wrong_logps is None:
        return right.exp().mean().item()
    wrong = _checks.wide(_checks.floating("wrong_logps", wrong_logps, 2))
    if len(wrong) != len(right):
        raise ValueError(
            f"wrong_logps must have {len(right)} rows, one for each of logps, got shape {tuple(wrong.shape)}"
        )
    return torch.softmax(torch.cat([right[:, None], wrong], 1), 1)[:, 0].mean().item()


def rouge_l_recall(reference: Sequence[Hashable], candidate: Sequence[Hashable]) -> float:
    r"""ROUGE-L recall: length of the longest common subsequence over the length of the reference (eq-npo-utility).

    Args:
        reference: the right answer, a sequence of tokens (words or ids), not empty. A string counts as its characters: split it into words first.
        candidate: what the model has generated, any length.

    Returns:
        A float in [0, 1].

    Raises:
        ValueError: for an empty reference.

    Complexity: O(mn) time, O(n) memory.

    Source: Lin 2004; Maini et al. 2024 (TOFU).

    Example:
        >>> rouge_l_recall("born in a small town".split(), "in a town born".split())
        0.6
    """
    if len(reference) == 0:
        raise ValueError("reference must not be empty")
    row = [0] * (len(candidate) + 1)
    for wanted in reference:
        before = 0  # the table's entry above and to the left
        for j, got in enumerate(candidate, start=1):
            before, row[j] = row[j], before + 1 if wanted == got else max(row[j], row[j - 1])
    return row[-1] / len(reference)


def forget_quality(ratios: Tensor, ratios_retrained: Tensor) -> float:
    r"""p-value of the two-sample Kolmogorov-Smirnov test between truth ratios of two models on the forget set (eq-npo-quality).

    Large if the unlearned model cannot be told from the one that never saw the data; by convention above 0.05. It depends on the number of questions.

    Args:
        ratios: truth ratios (or their logarithms) of the unlearned model, shape ``(B,)``.
        ratios_retrained: the same of the model trained on the retained data only, shape ``(C,)``.

    Returns:
        A float in [0, 1].

    Raises:
        TypeError, ValueError: for a wrong type or shape or a NaN, naming the argument.

    Complexity: O(n log n); exact p-values up to 10 000 questions, and with :math:`O(BC)` operations.

    Source: Maini et al. 2024 (TOFU).

    Example:
        >>> x = torch.linspace(0, 1, 30)
        >>> forget_quality(x, x), forget_quality(x, x + 2) < 1e-10
        (1.0, True)
    """
    from scipy.stats import ks_2samp

    samples = []
    for name, value in (("ratios", ratios), ("ratios_retrained", ratios_retrained)):
        if torch.isnan(_checks.floating(name, value, 1)).any():
            raise ValueError(f"{name} must not be NaN")
        samples.append(value.detach().double().cpu().numpy())
    return float(ks_2samp(*samples).pvalue)


def model_utility(values: Sequence[float]) -> float:
    r"""Harmonic mean of what a model should have kept, in TOFU nine numbers (eq-npo-utility); 0 if one of them is 0.

    Args:
        values: answer probability, ROUGE-L recall and truth score, each on retained data, real authors and world facts; in [0, 1], not empty.

    Returns:
        A float in [0, 1].

    Raises:
        TypeError, ValueError: for an empty sequence or a value outside of [0, 1].

    Complexity: O(1) a value.

    Source: Maini et al. 2024 (TOFU).

    Example:
        >>> round(model_utility([1.0, 0.5, 0.25]), 6)
        0.428571
    """
    from scipy.stats import hmean

    if len(values) == 0:
        raise ValueError("values must not be empty")
    return float(hmean([_checks.number(f"values[{i}]", float(value), 0, 1) for i, value in enumerate(values)]))


# ---------------------------------------------------------------------------------------------------------------------
# How fast it forgets: one example, exactly, and the bounds of the theorem
# ---------------------------------------------------------------------------------------------------------------------

_NODES = 12  # of Gauss's rule on each panel
_PANEL = 0.5  # a sixth of the distance to the integrand's singularities at ± iπ; with a large β it is less


def _start(m0: float, kappa: float) -> tuple[float, float, float]:
    m0 = _checks.number("m0", m0, -500, 500)
    return m0, _checks.positive_number("kappa", kappa), F.logsigmoid(torch.tensor(m0, dtype=torch.float64)).item()


def _bisected(low: Tensor, high: Tensor, above: Callable[[Tensor], Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """An interval around the point where ``above`` turns from true (at ``low``) to false, elementwise."""
    for _ in range(steps):
        middle = (low + high) / 2
        left = above(middle)
        low, high = torch.where(left, middle, low), torch.where(left, high, middle)
    return low, high


def _times(name: str, t: Tensor | float) -> Tensor:
    try:
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number or a tensor, got {type(t).__name__}") from error
    if t.numel() == 0:
        raise ValueError(f"{name} must not be empty")
    if not bool((torch.isfinite(t) & (t >= 0)).all()):
        raise ValueError(f"{name} must be finite and >= 0 everywhere, got {t.min()} to {t.max()}")
    return t


def margin_flow(m0: float, kappa: float, t: Tensor | float, *, beta: float | None = None) -> Tensor:
    r"""Margin of one forgotten example under gradient flow, exactly (eq-npo-flow).

    A logistic model with :math:`\pi=\sigma(m)` follows :math:`\dot m=-\kappa(1-\pi)W`: gradient ascent has :math:`W=1`, NPO :math:`W=2\pi^\beta/(\pi^\beta+\pi_0^\beta)`. Time as a function
    of the margin is an integral; gradient ascent and :math:`\beta=1` have it in closed form (eq-npo-time-ga, eq-npo-time-npo), other
    :math:`\beta` by Gauss's rule (eq-npo-time). It is then inverted.

    Args:
        m0: margin at the start, in [-500, 500]; the reference has :math:`\pi_0=\sigma(m_0)`.
        kappa: squared length of the example's features times its weight in the loss, > 0.
        t: times, any shape, >= 0.
        beta: :math:`\beta>0`; None for gradient ascent.

    Returns:
        Margins, the shape of ``t``, float64, CPU.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Complexity: O(n) for n times; with other :math:`\beta` also :math:`O(|m_0-m|)` panels.

    Source: this course; the dynamics behind Zhang et al., Theorem 2.

    Example:
        >>> margin_flow(2.0, 1.0, 30.0), margin_flow(2.0, 1.0, 30.0, beta=1.0)
        (tensor(-20.6109, dtype=torch.float64), tensor(-3.5585, dtype=torch.float64))
    """
    m0, kappa, log_pi = _start(m0, kappa)
    t = _times("t", t)
    if beta is None:
        from scipy.special import wrightomega

        c = m0 + math.exp(m0) - kappa * t  # m + e^m = c, so that e^m is Wright's omega of c
        omega = torch.as_tensor(wrightomega(c.numpy()), dtype=torch.float64)
        # Each form keeps its digits on its own side; ω underflows far to the left.
        return torch.where(c > 0, omega.clamp(min=1e-300).log(), c - omega)
    beta = _checks.positive_number("beta", beta)
    flat, pi, growth = t.flatten(), math.exp(log_pi), -beta * log_pi
    # No margin is below that of gradient ascent (W <= 1), or below that of the term π0^β e^{-βs} alone.
    tail = torch.logaddexp((2 * beta * kappa * flat).log() + growth, torch.tensor(-beta * m0).double()) / -beta
    low = torch.maximum(m0 - kappa * flat, tail)
    if beta == 1:
        # Times 2κ, with expm1 for what is near zero near the start.
        def elapsed(m: Tensor) -> Tensor:
            s = m - m0
            return -(1 + 2 * pi) * s - (1 + pi) * math.exp(m0) * torch.expm1(s) + pi * math.exp(-m0) * torch.expm1(-s)

        low, high = _bisected(low, torch.full_like(low, m0), lambda m: elapsed(m) > 2 * kappa * flat, 80)
        return ((low + high) / 2).view(t.shape)
    import numpy as np

    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(_NODES))

    def slowness(s: Tensor) -> Tensor:
        ratio = beta * (log_pi - F.logsigmoid(s))  # β log(π0 / σ(s)), below the lower bound perhaps large
        return (1 + s.exp()) * (1 + ratio.clamp(max=690).exp())

    def integral(a: Tensor, b: Tensor) -> Tensor:
        """Of the slowness from a to b, elementwise, at most one panel apart."""
        return slowness(((a + b) / 2)[:, None] + ((b - a) / 2)[:, None] * nodes) @ weights * (b - a) / 2

    panel = min(_PANEL, 1 / beta)
    edges = m0 - panel * torch.arange(math.ceil((m0 - low.min().item()) / panel) + 1, dtype=torch.float64)
    total = torch.cat([torch.zeros(1).double(), integral(edges[1:], edges[:-1]).cumsum(0)])
    k = (torch.searchsorted(total, 2 * kappa * flat, right=True) - 1).clamp(max=len(edges) - 1)
    start, left = edges[k], 2 * kappa * flat - total[k]
    low, high = _bisected(start - panel, start, lambda m: integral(m, start) > left, 10)
    m = (low + high) / 2
    for _ in range(4):  # Newton's method, from a thousandth of a panel away
        m = torch.clamp(m + (integral(m, start) - left) / slowness(m), low, high)
    return m.view(t.shape)


def margin_asymptote(m0: float, kappa: float, t: Tensor | float, *, beta: float | None = None) -> Tensor:
    r"""What :func:`margin_flow` tends to: :math:`m_0+e^{m_0}-\kappa t` or :math:`-\frac1\beta\log\frac{2\beta\kappa t}{\pi_0^\beta}` (eq-npo-asymptote).

    Args:
        m0, kappa, t, beta: as in :func:`margin_flow`, with t > 0.

    Returns:
        The shape of ``t``, float64. The difference from the flow tends to 0, for NPO like :math:`t^{-1/\max(1,\beta)}\log t`.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Complexity: O(n) for n times.

    Source: this course.

    Example:
        >>> margin_asymptote(2.0, 1.0, 1e4, beta=0.5)
        tensor(-18.5476, dtype=torch.float64)
    """
    m0, kappa, log_pi = _start(m0, kappa)
    t = _times("t", t)
    if not bool((t > 0).all()):
        raise ValueError("t must be > 0 everywhere, got 0")
    if beta is None:
        return m0 + math.exp(m0) - kappa * t
    beta = _checks.positive_number("beta", beta)
    return log_pi - (2 * beta * kappa * t).log() / beta


def divergence_bounds(
    steps: Tensor | int,
    step_size: float,
    *,
    min_norm: float,
    max_norm: float,
    max_margin: float,
    beta: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Bounds on how far each margin has moved after ``steps`` of gradient descent on *orthogonal* data (eq-npo-divergence).

    Gradient ascent: between :math:`a\,\eta_0t` and :math:`B_x^2\,\eta_0t`. NPO: between :math:`\frac1\beta\log(1+\beta a\,\eta_0t)` and
    :math:`\frac1\beta\log(1+(e^{\beta A}-1)\,\eta_0t)`, with :math:`a=(1-\sigma(M))\,b_x^2` and :math:`A=2(1+e^M)^\beta B_x^2`.

    Args:
        steps: t, a number or an integer tensor, >= 0.
        step_size: :math:`\eta_0`, the step size over the number of examples, in (0, 1].
        min_norm, max_norm: :math:`b_x` and :math:`B_x`, bounds of the lengths of the examples, 0 < min_norm <= max_norm.
        max_margin: M, a bound of the absolute margins at the start, >= 0.
        beta: :math:`\beta>0`; None for gradient ascent.

    Returns:
        Lower and upper bounds, float64, the shape of ``steps``.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Complexity: O(n) for n numbers of steps.

    Source: Zhang et al., Theorem 2, with the constants of the chapter's proof.

    Example:
        >>> low, high = divergence_bounds(1000, 0.1, min_norm=1.0, max_norm=1.0, max_margin=0.0, beta=1.0)
        >>> round(low.item(), 3), round(high.item(), 3)
        (3.932, 8.587)
    """
    steps = _times("steps", steps)
    eta = _checks.number("step_size", _checks.positive_number("step_size", step_size), 0, 1)
    low, high = _checks.positive_number("min_norm", min_norm), _checks.positive_number("max_norm", max_norm)
    if low > high:
        raise ValueError(f"min_norm must be at most max_norm, {max_norm}, got {min_norm}")
    m = _checks.number("max_margin", max_margin, 0)
    slowest = low**2 / (1 + math.exp(min(m, 700)))
    if beta is None:
        return slowest * eta * steps, high**2 * eta * steps
    beta = _checks.positive_number("beta", beta)
    fastest = beta * high**2 * 2 * math.exp(min(beta * (m + math.log1p(math.exp(-m))), 700))
    # log(1 + (e^c - 1) x) without e^c
    upper = torch.logaddexp(torch.zeros(()).double(), fastest + math.log(-math.expm1(-fastest)) + (eta * steps).log())
    return torch.log1p(beta * slowest * eta * steps) / beta, upper / beta


# ---------------------------------------------------------------------------------------------------------------------
# The synthetic task
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class UnlearningTask:
    """Data of the paper's synthetic experiment; inputs float64 ``(n, d)``, labels float64 ``(n,)``, 0 or 1.

    Args:
        forget_x, forget_y: the examples to forget.
        retain_x, retain_y: the examples to keep.
        uninformed_y: labels for ``forget_x`` from a fair coin, the "I don't know" of this task.
        forget_eval_x, retain_eval_x: fresh inputs of the two kinds, on which distances are measured.

    Source: Zhang et al., section 4.
    """

    forget_x: Tensor
    forget_y: Tensor
    retain_x: Tensor
    retain_y: Tensor
    uninformed_y: Tensor
    forget_eval_x: Tensor
    retain_eval_x: Tensor


def gaussian_logistic_unlearning(
    alpha: float,
    *,
    num_forget: int = 200,
    num_retain: int = 1000,
    num_eval: int = 1000,
    dim: int = 16,
    generator: torch.Generator | None = None,
) -> UnlearningTask:
    r"""Two Gaussian clouds around :math:`\pm\alpha1_d` whose labels follow opposite rules (eq-npo-task).

    Forget: :math:`x\sim N(\alpha1,I)`, :math:`P(y=1)=\sigma((x-\alpha1)^\top1/\sqrt d+1)`; retain: the mirror image, with mean :math:`-\alpha1`, slope and intercept reversed.

    Args:
        alpha: half of the distance between the means in each coordinate, finite: 1 in the paper's first setting, 0 in its second, where the clouds coincide.
        num_forget, num_retain: examples of each kind.
        num_eval: fresh inputs of each kind.
        dim: d.
        generator: source of randomness, on the CPU.

    Returns:
        The data.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Complexity: O(nd) for n examples.

    Source: Zhang et al., section 4; the sizes are the paper's.

    Example:
        >>> task = gaussian_logistic_unlearning(1.0, generator=torch.Generator().manual_seed(0))
        >>> task.forget_x.shape, round(task.forget_x.mean().item(), 1), round(task.retain_x.mean().item(), 1)
        (torch.Size([200, 16]), 1.0, -1.0)
    """
    alpha = _checks.number("alpha", alpha)
    dim = _checks.positive_int("dim", dim)

    def cloud(n: int, sign: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(n, dim, generator=generator, dtype=torch.float64)
        uniform = torch.rand(n, generator=generator, dtype=torch.float64)
        return sign * alpha + noise, (uniform < torch.sigmoid(sign * (noise.sum(1) / math.sqrt(dim) + 1))).double()

    sizes = dict(num_forget=num_forget, num_retain=num_retain, num_eval=num_eval)
    for name, value in sizes.items():
        _checks.positive_int(name, value)
    forget, retain = cloud(num_forget, 1), cloud(num_retain, -1)
    coin = torch.randint(2, (num_forget,), generator=generator).double()
    return UnlearningTask(*forget, *retain, coin, cloud(num_eval, 1)[0], cloud(num_eval, -1)[0])


def binary_kl(target_logits: Tensor, logits: Tensor) -> Tensor:
    r"""Mean of :math:`\mathrm{KL}(\sigma(a)\|\sigma(b))` for logits a of the target and b of the model: the synthetic task's distances (eq-npo-distance).

    Args:
        target_logits: of the retrained model, shape ``(n,)``, floating point.
        logits: of the unlearned one.

    Returns:
        Shape ``()``, at least 0 up to rounding.

    Raises:
        TypeError, ValueError: for a wrong type or shape, naming the argument.

    Complexity: O(n).

    Source: Zhang et al., section 4.

    Example:
        >>> binary_kl(torch.log(torch.tensor([3.0])), torch.zeros(1))
        tensor(0.1308)
    """
    _checks.floating("target_logits", target_logits, 1)
    _checks.like("logits", logits, "target_logits", target_logits, 1)
    p, q = _checks.wide(target_logits), _checks.wide(logits)
    return sum(torch.sigmoid(s * p) * (F.logsigmoid(s * p) - F.logsigmoid(s * q)) for s in (1, -1)).mean()


class RandomFeatureClassifier(nn.Module):
    r"""Logistic regression on fixed random features, :math:`P(y=1|x)=\sigma(\theta^\top\mathrm{ReLU}(Wx))` (eq-npo-features). Float64, no bias.

    Args:
        dim: d, the inputs' dimension.
        num_features: N.
        generator: for W, i.i.d. :math:`N(0,1/d)`, on the CPU.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Source: Zhang et al., section 4 (N = 128).

    Example:
        >>> model = RandomFeatureClassifier(16, generator=torch.Generator().manual_seed(0))
        >>> model(torch.ones(3, 16).double()).shape
        torch.Size([3])
    """

    weight: Tensor

    def __init__(self, dim: int, num_features: int = 128, *, generator: torch.Generator | None = None):
        super().__init__()
        shape = _checks.positive_int("num_features", num_features), _checks.positive_int("dim", dim)
        self.register_buffer("weight", torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(dim))
        self.theta = nn.Parameter(torch.zeros(num_features, dtype=torch.float64))

    def features(self, x: Tensor) -> Tensor:
        """``ReLU(Wx)``, shape ``(n, N)``, for ``x`` float64 of shape ``(n, d)``."""
        _checks.floating("x", x, 2)
        if x.shape[1] != self.weight.shape[1] or x.dtype != self.weight.dtype:
            raise ValueError(
                f"x must be {self.weight.dtype} with {self.weight.shape[1]} columns, got {x.dtype}, {tuple(x.shape)}"
            )
        return F.relu(x @ self.weight.T)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of y = 1, shape ``(n,)``."""
        return self.features(x) @ self.theta

    def log_prob(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-probabilities of the labels ``y`` (0 or 1), shape ``(n,)``: a one-token answer."""
        return F.logsigmoid(self._signs(x, y) * self(x))

    def _signs(self, x: Tensor, y: Tensor) -> Tensor:
        if _checks.floating("y", y, 1).shape != x.shape[:1]:
            raise ValueError(f"y must have shape ({len(x)},), one for each row of x, got {tuple(y.shape)}")
        if _checks.known_false((y == 0) | (y == 1)):
            raise ValueError("y must be 0 or 1")
        return 2 * y - 1

    @torch.no_grad()
    def fit(
        self, x: Tensor, y: Tensor, *, steps: int = 20_000, lr: float = 0.05, method: str = "descent"
    ) -> "RandomFeatureClassifier":
        r"""Full-batch gradient descent on the mean logistic loss from :math:`\theta=0`, or the gradient flow that it follows.

        The paper's models are early-stopped: the slow directions of the features have not converged, so a solver that goes to the minimum gives other models.
        The flow, to time ``steps * lr`` by an implicit method, gives these, with an error of the order of ``lr``, in a fraction of the time.

        Args:
            x: float64, shape ``(n, d)``.
            y: float64, shape ``(n,)``, 0 or 1.
            steps: number of steps, at least 1.
            lr: step size, > 0.
            method: "descent" or "flow".

        Returns:
            The model itself.

        Raises:
            TypeError, ValueError: for a wrong type, shape or value, naming the argument.

        Complexity: O(steps * nN), or about a hundred Hessians of :math:`O(nN^2)` for the flow.

        Source: Zhang et al., section 4 (the default steps and step size).
        """
        steps, lr = _checks.positive_int("steps", steps), _checks.positive_number("lr", lr)
        z = self.features(x) * self._signs(x, y)[:, None]  # the margins are z θ

        def velocity(theta: Tensor) -> Tensor:
            return torch.sigmoid(-(z @ theta)) @ z / len(z)

        if method == "descent":
            theta = torch.zeros_like(self.theta)
            for _ in range(steps):
                theta = theta + lr * velocity(theta)
        elif method == "flow":
            from scipy.integrate import solve_ivp

            def jacobian(_t, theta):
                p = torch.sigmoid(z @ torch.from_numpy(theta))
                return (-(z.T * (p * (1 - p))) @ z / len(z)).numpy()

            z = z.cpu()
            result = solve_ivp(
                lambda _t, theta: velocity(torch.from_numpy(theta)).numpy(),
                (0, steps * lr), [0.0] * z.shape[1], method="BDF", jac=jacobian, rtol=1e-5, atol=1e-7,
                t_eval=[steps * lr],
            )  # fmt: skip
            theta = torch.from_numpy(result.y[:, -1]).to(self.theta.device)
        else:
            raise ValueError(f"method must be 'descent' or 'flow', got {method!r}")
        self.theta.copy_(theta)
        return self
