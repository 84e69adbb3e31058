r"""Weights of samples from their losses in the current batch, for pretraining in one pass.

The method of *Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining* (Sow, Woisetschlaeger, Bulusu, Wang,
Jacobsen and Liang, ICLR 2025, arXiv 2502.06733): losses are normalized to an interval, scored by one of several shapes, and a softmax with
a temperature makes weights of the scores; the theory says by how much weights that follow the losses tighten a bound on convergence.
Equation labels are those of the chapter ``language/reweighting``.

Notation: :math:`f_i` = ``losses[i]``, one number a sequence; :math:`h_i` = ``normalized[i]``; :math:`w` = ``weights`` sum to one; ``r`` is the
temperature :math:`r`, the coefficient of the KL divergence; ``delta`` is the scale :math:`\delta`; M samples make a batch, those of all processes and of all
micro-batches of the step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from lossbook import _checks, ops

Strategy = str | Callable[[Tensor], Tensor]

# ---------------------------------------------------------------------------------------------------------------------
# From losses to weights
# ---------------------------------------------------------------------------------------------------------------------


def sequence_losses(
    hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Tensor | None = None, *, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Mean cross-entropy of each sequence, :math:`f_i` of eq-reweighting-loss, without the (tokens, vocabulary) matrix.

    The state at position t predicts token t + 1. A mean, not a sum: a sum would call every long sequence hard.

    Args:
        hidden: shape ``(B, T, d)``, floating point: the last hidden states.
        weight: shape ``(V, d)``: the output layer.
        tokens: shape ``(B, T)``, int64, in [0, V) where ``mask`` is true; T > 1.
        mask: shape ``(B, T)``, bool: the tokens that count (not padding); the first of a row is never predicted. None takes all.
        bias: shape ``(V,)`` or None.

    Returns:
        ``losses`` ``(B,)``, float32 or wider, in nats a token, and ``num_tokens`` ``(B,)``, int64, the number of tokens in each mean.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes do not fit, or a row has no token to predict. (On an accelerator such a row is not seen, and its loss is 0.)

    Complexity: O(BTVd) time, O(chunk * V + (BT + V) d) memory (:func:`lossbook.ops.sequence_logprobs`).

    Source: Sow et al. 2025, the loss of a sample.

    Example:
        >>> losses, num_tokens = sequence_losses(torch.zeros(2, 4, 3), torch.zeros(5, 3), torch.zeros(2, 4, dtype=torch.int64))
        >>> losses, num_tokens  # log 5
        (tensor([1.6094, 1.6094]), tensor([3, 3]))
    """
    _checks.floating("hidden", hidden, 3)
    if _checks.integer("tokens", tokens, 2).shape != hidden.shape[:2]:
        raise ValueError(f"tokens must have shape {tuple(hidden.shape[:2])} like hidden, got {tuple(tokens.shape)}")
    if tokens.shape[1] < 2:
        raise ValueError(f"tokens must have at least 2 columns, so that there is one to predict, got {tokens.shape[1]}")
    counted = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens) > 0
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a boolean tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.shape != tokens.shape:
            raise ValueError(f"mask must have shape {tuple(tokens.shape)} like tokens, got {tuple(mask.shape)}")
        counted = counted & mask
        if _checks.known_false(counted.any(1)):
            raise ValueError("mask must keep a token after the first in each row, got a row without one")
    num_tokens = counted.sum(1)
    return -ops.sequence_logprobs(hidden, weight, tokens, counted, bias=bias) / num_tokens.clamp(min=1), num_tokens


def normalize_losses(losses: Tensor, *, delta: float = 1.0, eps: float = 1e-6) -> Tensor:
    r"""Losses on the interval :math:`[-\delta,\delta]`, the smallest of the batch at one end and the largest at the other (eq-reweighting-normalize).

    :math:`h_i=\delta\,\frac{(f_i-l_{\min})-(l_{\max}-f_i)}{\max(l_{\max}-l_{\min},\,\epsilon)}`: written so, near-equal losses lose no digits. Affine
    changes :math:`af+b` of the losses with :math:`a>0` leave :math:`h` as it is.

    Args:
        losses: shape ``(M,)``, floating point, finite.
        delta: :math:`\delta>0`.
        eps: floor of the range, > 0 (a maximum, not a sum).

    Returns:
        Shape ``(M,)``, float32 or wider; 0 for every sample if all losses are equal.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(M).

    Source: Sow et al. 2025, normalization of the losses of a batch; the official code's floor.

    Example:
        >>> normalize_losses(torch.tensor([0.0, 1.0, 2.0]))
        tensor([-1.,  0.,  1.])
    """
    f = _losses(losses)
    delta, eps = _checks.positive_number("delta", delta), _checks.positive_number("eps", eps)
    low, high = f.amin(), f.amax()
    return delta * (((f - low) - (high - f)) / (high - low).clamp(min=eps))


_SHAPES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "uniform": lambda h, delta: torch.zeros_like(h),
    "linupper": lambda h, delta: (h + delta).clamp(max=delta),
    "quadratic": lambda h, delta: 1 - (h / delta).square(),
    "extremes": lambda h, delta: h.abs(),
    "dro": lambda h, delta: h,
}
STRATEGIES = tuple(_SHAPES)


def score(normalized: Tensor, strategy: Strategy = "linupper", *, delta: float = 1.0) -> Tensor:
    r"""Score of each sample by the shape of a strategy (eq-reweighting-shapes).

    Args:
        normalized: :math:`h`, shape ``(M,)``, floating point, in :math:`[-\delta,\delta]`.
        strategy: "linupper", :math:`\min(h+\delta,\delta)`; "quadratic", :math:`1-h^2/\delta^2`; "extremes", :math:`|h|`; "dro", the line
            :math:`h` without a cap; "uniform", 0; or a function from :math:`h` to scores.
        delta: :math:`\delta>0`, the one of :func:`normalize_losses`.

    Returns:
        Shape ``(M,)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(M).

    Source: Sow et al. 2025, the strategies LinUpper, Quadratic and Extremes; the uncapped line is the "upper" of the GPT-2 code, at twice its temperature.

    Example:
        >>> h = torch.tensor([-1.0, 0.0, 1.0])
        >>> score(h, "linupper"), score(h, "quadratic"), score(h, "extremes")
        (tensor([0., 1., 1.]), tensor([0., 1., 0.]), tensor([1., 0., 1.]))
    """
    delta = _checks.positive_number("delta", delta)
    _checks.finite("normalized", _checks.floating("normalized", normalized, 1))
    if _checks.known_false(normalized.abs() <= delta * (1 + 1e-5)):
        raise ValueError(
            f"normalized must lie in [-{delta:g}, {delta:g}], got {normalized.min()} to {normalized.max()}"
        )
    shape = _strategy(strategy)
    if not callable(strategy):
        return shape(normalized, delta)
    scores = strategy(normalized)
    if not isinstance(scores, Tensor) or scores.shape != normalized.shape or not scores.is_floating_point():
        raise ValueError(
            f"strategy must return floating-point scores of shape {tuple(normalized.shape)}, got {scores!r}"
        )
    return scores


def _strategy(strategy: Strategy) -> Callable:
    if callable(strategy):
        return strategy
    if not isinstance(strategy, str) or strategy not in _SHAPES:
        raise ValueError(f"strategy must be one of {STRATEGIES} or a function, got {strategy!r}")
    return _SHAPES[strategy]


def kl_weights(scores: Tensor, *, r: float = 1.0) -> Tensor:
    r"""Weights :math:`w_i\propto e^{s_i/r}` that maximize :math:`\sum_iw_is_i-r\,\mathrm{KL}(w\|u)` over the simplex (eq-reweighting-weights).

    Differentiable in ``scores``: detach them, or the weights, for training.

    Args:
        scores: :math:`s`, shape ``(M,)``, floating point, finite.
        r: :math:`r>0`; infinite gives uniform weights, and towards 0 the weight goes to the largest score.

    Returns:
        Shape ``(M,)``, float32 or wider; non-negative, sum 1.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(M).

    Source: Sow et al. 2025, weights as a softmax of scores.

    Example:
        >>> kl_weights(torch.tensor([0.0, 1.0, 1.0]))  # (1, e, e) / (1 + 2e)
        tensor([0.1554, 0.4223, 0.4223])
    """
    r = _temperature("r", r)
    s = _checks.wide(_checks.finite("scores", _checks.floating("scores", scores, 1)))
    # The largest score becomes 0 before the division, so that nothing overflows.
    return torch.softmax((s - s.detach().amax()) / max(r, torch.finfo(s.dtype).tiny), dim=0)


def kl_objective(weights: Tensor, scores: Tensor, *, r: float = 1.0) -> Tensor:
    r"""The game that weights play: :math:`\sum_iw_is_i-r\,\mathrm{KL}(w\|u)` with :math:`u` uniform (eq-reweighting-game).

    Args:
        weights: :math:`w`, shape ``(M,)``, floating point, in the simplex (not checked: it is a linear function plus an entropy).
        scores: :math:`s`, shape ``(M,)``.
        r: :math:`r>0`, finite.

    Returns:
        Shape ``()``. Its maximum, at :func:`kl_weights`, is :func:`dro_value` of the scores.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(M).

    Source: KL-regularized distributionally robust optimization; chapter, thm-reweighting-game.

    Example:
        >>> s = torch.tensor([0.0, 1.0, 1.0])
        >>> kl_objective(kl_weights(s), s), dro_value(s)  # log((1 + 2e) / 3)
        (tensor(0.7634), tensor(0.7634))
    """
    r = _checks.positive_number("r", r)
    _checks.floating("scores", scores, 1)
    w, s = _checks.wide(_checks.like("weights", weights, "scores", scores, 1)), _checks.wide(scores)
    return (w * s).sum() - r * (torch.special.xlogy(w, w).sum() + math.log(len(w)) * w.sum())


def dro_value(losses: Tensor, *, r: float = 1.0) -> Tensor:
    r"""The soft maximum :math:`r\log\bigl(\frac1M\sum_ie^{f_i/r}\bigr)` of the losses (eq-reweighting-game).

    Its gradient is :math:`\sum_iw_i\nabla f_i` with :math:`w` = :func:`kl_weights` of the losses themselves (eq-reweighting-danskin).

    Args:
        losses: shape ``(M,)``, floating point, finite.
        r: :math:`r>0`, finite.

    Returns:
        Shape ``()``, between the mean and the maximum.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(M).

    Source: KL-regularized distributionally robust optimization; chapter, thm-reweighting-game.

    Example:
        >>> dro_value(torch.tensor([0.0, 1.0, 2.0]), r=1e-3)  # close to the largest
        tensor(1.9989)
    """
    r = _checks.positive_number("r", r)
    f = _losses(losses)
    high = f.detach().amax()
    return high + r * (torch.logsumexp((f - high) / r, dim=0) - math.log(len(f)))


@torch.no_grad()
def sample_weights(
    losses: Tensor,
    *,
    strategy: Strategy = "linupper",
    r: float = 1.0,
    delta: float = 1.0,
    distributed: bool = False,
) -> Tensor:
    r"""The weights of a batch: normalize, score, softmax (eq-reweighting-normalize, eq-reweighting-shapes, eq-reweighting-weights), without gradient.

    With gradient accumulation call it *once* a step, on the losses of all micro-batches together (a pass without gradient gives them), and hand each
    micro-batch its part of the result in :func:`reweighted_loss`.

    Args:
        losses: shape ``(M,)``, floating point, finite: those of this process.
        strategy: as in :func:`score`.
        r: temperature, > 0; infinite gives uniform weights.
        delta: :math:`\delta>0`. The largest ratio of two weights is :math:`e^{\delta/r}` for "linupper" and "extremes", :math:`e^{2\delta/r}` for "dro", and
            :math:`e^{1/r}` for "quadratic", whatever :math:`\delta`.
        distributed: the batch is that of all processes of the default group, which hold equally many losses. The result is this process's part.

    Returns:
        Shape ``(M,)``, float32 or wider, detached; non-negative, sum 1 (over all processes).

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(M), and one all-gather of M numbers from each process with ``distributed``.

    Source: Sow et al. 2025, algorithm; scaled by world size in :func:`reweighted_loss`.

    Example:
        >>> sample_weights(torch.tensor([0.0, 1.0, 2.0]))  # (1, e, e) / (1 + 2e)
        tensor([0.1554, 0.4223, 0.4223])
    """
    _strategy(strategy)
    _temperature("r", r)
    f = _losses(losses)
    everyone = ops.gather(f) if distributed else f
    weights = kl_weights(score(normalize_losses(everyone, delta=delta), strategy, delta=delta), r=r)
    return weights[ops.local_rows(len(f), f.device)] if distributed else weights


def reweighted_loss(
    losses: Tensor,
    *,
    strategy: Strategy = "linupper",
    r: float = 1.0,
    delta: float = 1.0,
    weights: Tensor | None = None,
    distributed: bool = False,
) -> Tensor:
    r"""The scalar :math:`\sum_iw_if_i` whose gradient is :math:`\sum_iw_i\nabla f_i`: no gradient flows through the weights (eq-reweighting-update).

    Args:
        losses: shape ``(M,)``, floating point, finite, with gradient: those of this process, or of one of its micro-batches.
        strategy: as in :func:`score`.
        r: temperature, > 0; infinite gives uniform weights, and then the mean of the losses.
        delta: :math:`\delta>0`.
        weights: shape ``(M,)``, finite: used as they are, detached; ``strategy``, ``r`` and ``delta`` are then not used. The parts of micro-batches add up.
        distributed: weights are those of the batch of all processes of the default group, and the local sum is multiplied by the number of
            processes: after gradients are averaged over processes, as ``DistributedDataParallel`` does, they are those of one process with the whole batch.

    Returns:
        Shape ``()``, float32 or wider. On the scale of a *mean* of losses: do not divide by M.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(M), and one all-gather of M numbers from each process with ``distributed`` and no ``weights``.

    Source: Sow et al. 2025, algorithm.

    Example:
        >>> losses = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
        >>> reweighted_loss(losses).backward()
        >>> losses.grad
        tensor([0.1554, 0.4223, 0.4223])
    """
    f = _losses(losses)
    if weights is None:
        weights = sample_weights(losses, strategy=strategy, r=r, delta=delta, distributed=distributed)
    elif _checks.floating("weights", weights, 1).shape != f.shape:
        raise ValueError(f"weights must have shape {tuple(f.shape)}, one for each loss, got {tuple(weights.shape)}")
    else:
        _checks.finite("weights", weights)
    total = (weights.detach() * f).sum()
    return total * _world_size() if distributed else total


def token_weights(weights: Tensor, num_tokens: Tensor, *, distributed: bool = False) -> Tensor:
    r"""Weights times each sequence's share of tokens, :math:`w_i\,Mn_i/\sum_jn_j` (eq-reweighting-tokens), for sequences of unequal lengths.

    With uniform weights :func:`reweighted_loss` then is the mean over *tokens*, as in ordinary training; with equal lengths nothing changes. The sum is no longer 1.

    Args:
        weights: :math:`w`, shape ``(M,)``, of :func:`sample_weights`.
        num_tokens: :math:`n`, shape ``(M,)``, int64, of :func:`sequence_losses`.
        distributed: the batch is that of all processes, as in :func:`sample_weights`.

    Returns:
        Shape ``(M,)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(M).

    Source: the official GPT-2 code.

    Example:
        >>> token_weights(torch.tensor([0.5, 0.5]), torch.tensor([30, 10]))
        tensor([0.7500, 0.2500])
    """
    _checks.floating("weights", weights, 1)
    if _checks.integer("num_tokens", num_tokens, 1).shape != weights.shape:
        raise ValueError(
            f"num_tokens must have shape {tuple(weights.shape)} like weights, got {tuple(num_tokens.shape)}"
        )
    if _checks.known_false(num_tokens > 0):
        raise ValueError(f"num_tokens must be > 0, got {num_tokens.min()}")
    everyone = ops.gather(num_tokens) if distributed else num_tokens
    weights = _checks.wide(weights)
    return weights * (num_tokens.to(weights.dtype) * len(everyone) / everyone.sum().to(weights.dtype))


@dataclass(frozen=True)
class TemperatureSchedule:
    r"""The temperature over steps: ``r_initial`` for ``step < burn_in``, then ``r``. Early losses say little about samples.

    Args:
        r: temperature, > 0.
        burn_in: number of first steps, at least 0.
        r_initial: temperature of these steps, > 0; infinite gives uniform weights.

    Returns:
        A function of the step, counted from 0.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Complexity: O(1).

    Source: Sow et al. 2025 and the official codes: 1000 uniform steps for GPT-2, :math:`r=100` during warm-up for 1.4B and 7B.

    Example:
        >>> schedule = TemperatureSchedule(0.4, burn_in=2)
        >>> [schedule(step) for step in range(4)]
        [100.0, 100.0, 0.4, 0.4]
    """

    r: float
    burn_in: int
    r_initial: float = 100.0

    def __post_init__(self):
        _temperature("r", self.r)
        _checks.positive_int("burn_in", self.burn_in, minimum=0)
        _temperature("r_initial", self.r_initial)

    def __call__(self, step: int) -> float:
        return float(self.r_initial if _checks.positive_int("step", step, minimum=0) < self.burn_in else self.r)


# ---------------------------------------------------------------------------------------------------------------------
# What theory says about weights
# ---------------------------------------------------------------------------------------------------------------------


def weight_cap(
    num_samples: int, num_top: int = 1, *, strategy: str = "linupper", r: float = 1.0, delta: float = 1.0
) -> float:
    r"""The largest weight that a strategy can give, whatever the losses are: :math:`\frac{1}{k+(M-k)e^{-R/r}}` (eq-reweighting-cap).

    :math:`R` is the range of the scores: :math:`\delta` for "linupper" and "extremes", :math:`2\delta` for "dro", 1 for "quadratic", 0 for "uniform".

    Args:
        num_samples: M.
        num_top: k, how many samples share the largest score, at least. For "linupper" those at or above mid-range; for "extremes" it is 2 or more
            unless all losses are equal.
        strategy: one of the named ones.
        r: temperature, > 0.
        delta: :math:`\delta>0`.

    Returns:
        A number in [1/M, 1].

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Complexity: O(1).

    Source: chapter, prop-reweighting-cap. The paper's theorem assumes weights of at most 2/M.

    Example:
        >>> round(weight_cap(100, 1), 4), round(weight_cap(100, 21) * 100, 4)  # 2/M from 21 % on
        (0.0267, 1.9975)
    """
    num_samples = _checks.positive_int("num_samples", num_samples)
    if _checks.positive_int("num_top", num_top) > num_samples:
        raise ValueError(f"num_top must be at most num_samples = {num_samples}, got {num_top}")
    if callable(strategy):
        raise ValueError(f"strategy must be one of {STRATEGIES}, got a function")
    _strategy(strategy)
    r, delta = _temperature("r", r), _checks.positive_number("delta", delta)
    spread = {"uniform": 0.0, "linupper": delta, "extremes": delta, "quadratic": 1.0, "dro": 2 * delta}[strategy]
    return 1 / (num_top + (num_samples - num_top) * math.exp(-spread / r))


def alignment(weights: Tensor, losses: Tensor, minima: Tensor | None = None) -> Tensor:
    r"""What weights take off the bound: :math:`A=\sum_i(w_i-\frac1M)\Delta_i=M\,\mathrm{Cov}_i(w_i,\Delta_i)`, :math:`\Delta_i=f_i-f_i^*` (eq-reweighting-alignment).

    Args:
        weights: :math:`w`, shape ``(M,)``, floating point, sum 1.
        losses: :math:`f`, shape ``(M,)``.
        minima: :math:`f_i^*`, shape ``(M,)``, the value of each loss at the common minimizer; None for 0.

    Returns:
        Shape ``()``, float32 or wider. At least 0 if ``minima`` are equal and weights do not decrease with the loss.

    Raises:
        TypeError, ValueError: for a wrong type, shape or dtype, naming the argument.

    Complexity: O(M).

    Source: Sow et al. 2025, the theorem on convergence; chapter, thm-reweighting-convergence.

    Example:
        >>> losses = torch.tensor([0.0, 1.0, 2.0])
        >>> alignment(sample_weights(losses), losses)  # (e - 1) / (2e + 1)
        tensor(0.2670)
    """
    f = _losses(losses)
    if _checks.floating("weights", weights, 1).shape != f.shape:
        raise ValueError(f"weights must have shape {tuple(f.shape)} like losses, got {tuple(weights.shape)}")
    gaps = f if minima is None else f - _checks.like("minima", minima, "losses", losses, 1)
    return ((_checks.wide(weights) - 1 / len(f)) * (gaps - gaps.mean())).sum()


def convergence_bound(distance_sq: float, step_size: float, alignments: Tensor) -> Tensor:
    r"""Bound on the mean excess of the *unweighted* loss over the first T steps, :math:`\frac{\|\theta_0-\theta^*\|^2}{2\eta T}-\frac1T\sum_{t<T}A_t`
    (eq-reweighting-convergence).

    For convex, :math:`\mathsf L`-smooth losses with a common minimizer, full weighted gradients and :math:`\eta\le1/\mathsf L`.

    Args:
        distance_sq: :math:`\|\theta_0-\theta^*\|^2\ge0`.
        step_size: :math:`\eta>0`.
        alignments: :math:`A_0,\dots,A_{T-1}`, shape ``(T,)``, of :func:`alignment`.

    Returns:
        Shape ``()``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(T).

    Source: chapter, thm-reweighting-convergence, which needs no cap on the weights. By the way of the paper's assumption, weights of at most 2/M,
        it is twice this bound at :math:`\eta=1/(4\mathsf L)` (eq-reweighting-capped).

    Example:
        >>> convergence_bound(4.0, 0.5, torch.tensor([0.1, 0.3]))
        tensor(1.8000)
    """
    distance_sq, step_size = (
        _checks.number("distance_sq", distance_sq, 0),
        _checks.positive_number("step_size", step_size),
    )
    _checks.floating("alignments", alignments, 1)
    return distance_sq / (2 * step_size * len(alignments)) - _checks.wide(alignments).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def _losses(losses: Tensor) -> Tensor:
    """Finite losses of shape ``(M,)`` in float32 or wider."""
    return _checks.wide(_checks.finite("losses", _checks.floating("losses", losses, 1)))


def _temperature(name: str, r: float) -> float:
    """A number > 0, infinity included."""
    if isinstance(r, Real) and not isinstance(r, bool) and r == math.inf:
        return math.inf
    return _checks.positive_number(name, r)


def _world_size() -> int:
    return (
        torch.distributed.get_world_size()
        if torch.distributed.is_available() and torch.distributed.is_initialized()
        else 1
    )
