r"""A generator and a self-improver, learned from preference pairs whoever collected them.

The method of *Self-Improving Robust Preference Optimization* (Eugene Choi, Arash Ahmadian, Matthieu Geist, Olivier Pietquin, Mohammad Gheshlaghi Azar, ICLR 2025,
arXiv 2406.01660): a game between a generator and an improver that revises its drafts, solved exactly for finitely many completions; the squared losses on labelled pairs with the same
solution; revision; and the optima of DPO and IPO, which depend on the data-collecting policy. Their losses are :func:`~lossbook.language.robust_dpo.preference_loss` of the margin
:math:`m=\varrho(y_w)-\varrho(y_l)`: ``preference_loss(beta * m)`` and ``preference_loss(m, base="squared", target=0.5 / tau)``. Equation labels are those of the chapter ``language/srpo``.

Notation: K completions of one prompt. ``preference[i, j]`` is :math:`p(i\succ j)`, the probability that i is preferred to j, with ``preference + preference.T == 1``. Arrays of
shape ``(K, K)`` that belong to an improver have drafts as rows: ``improver[d, y]`` is :math:`\pi_\dagger(y\mid d)`. ``beta`` is :math:`\beta`, the weight of both KL terms of the game.
A log-ratio is the log-probability under a policy minus that under its reference, summed over tokens.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lossbook import _checks

_T = TypeVar("_T")

# ---------------------------------------------------------------------------------------------------------------------
# Argument checks
# ---------------------------------------------------------------------------------------------------------------------


def _preference(value: Tensor) -> Tensor:
    """Check a preference matrix: (K, K), in [0, 1], and 1 in sum with its transpose."""
    _checks.floating("preference", value, 2)
    if value.shape[0] != value.shape[1]:
        raise ValueError(f"preference must be square, got shape {tuple(value.shape)}")
    if _checks.known_false((value >= 0) & (value <= 1)):
        raise ValueError("preference must lie in [0, 1]")
    if _checks.known_false((value + value.T - 1).abs() <= 1e-5):
        raise ValueError(
            f"preference[i, j] + preference[j, i] must be 1, got sums up to {(value + value.T - 1).abs().max():.2g} away from it"
        )
    return value


def _distribution(name: str, value: Tensor, preference: Tensor, ndim: int = 1) -> Tensor:
    """Check probabilities over K completions, (K,) or, for an improver, (K, K) with one distribution a row."""
    _checks.floating(name, value, ndim)
    shape = (len(preference),) * ndim
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape} for {len(preference)} completions, got {tuple(value.shape)}")
    if value.dtype != preference.dtype:
        raise TypeError(f"{name} must have the dtype of preference, {preference.dtype}, got {value.dtype}")
    if _checks.known_false(value >= 0) or _checks.known_false((value.sum(-1) - 1).abs() <= 1e-4):
        raise ValueError(f"{name} must hold probabilities that sum to 1{' in each row' if ndim == 2 else ''}")
    return value


def _mean(preference: Tensor, policy: Tensor) -> Tensor:
    """Each completion's mean preference over what a policy writes; under autocast a matrix product would be in half precision."""
    return (preference * policy).sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# The game
# ---------------------------------------------------------------------------------------------------------------------


class SaddlePoint(NamedTuple):
    r"""What :func:`tabular_srpo` returns.

    Args:
        generator: :math:`\pi^*`, shape ``(K,)``.
        improver: :math:`\pi_\dagger^*`, shape ``(K, K)``, drafts are rows.
        value: :math:`J^*`, shape ``()``.
        log_partition: :math:`\log Z(d)` of each draft, shape ``(K,)``; times beta it is what the improver can gain from the draft.

    Source: Choi et al., the two players of the objective.
    """

    generator: Tensor
    improver: Tensor
    value: Tensor
    log_partition: Tensor


def tabular_srpo(preference: Tensor, ref: Tensor, ref_improver: Tensor, *, beta: float) -> SaddlePoint:
    r"""The saddle point of the game between generator and improver, in closed form (eq-srpo-improver, eq-srpo-generator).

    .. math::
        \pi_\dagger^*(y\mid d)=\frac{\pi_{\rm ref}(y\mid d)\,e^{p(y\succ d)/\beta}}{Z(d)},\qquad
        \pi^*(y)\propto\frac{\pi_{\rm ref}(y)}{Z(y)},\qquad J^*=-\beta\log\sum_y\frac{\pi_{\rm ref}(y)}{Z(y)} .

    Args:
        preference: shape ``(K, K)``, float32 or float64, in [0, 1]; ``preference[i, j]`` is :math:`p(i\succ j)`.
        ref: the generator's reference, shape ``(K,)``, preference's dtype, sums to 1.
        ref_improver: the improver's reference, shape ``(K, K)``, each row sums to 1; row = draft.
        beta: weight of the KL terms, > 0.

    Returns:
        A :class:`SaddlePoint`.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(K²) time and memory.

    Source: Choi et al., the objective; the closed forms are derived in the chapter.

    Example:
        >>> uniform = torch.full((2, 2), 0.5)
        >>> saddle = tabular_srpo(torch.tensor([[0.5, 0.8], [0.2, 0.5]]), uniform[0], uniform, beta=0.5)
        >>> saddle.generator
        tensor([0.6457, 0.3543])
    """
    _preference(preference)
    _distribution("ref", ref, preference)
    _distribution("ref_improver", ref_improver, preference, ndim=2)
    beta = _checks.positive_number("beta", beta)
    # Row = draft, so what is added is p(y > d), the transpose of preference.
    improver = ref_improver.log() + preference.T / beta
    log_partition = improver.logsumexp(1)
    generator = ref.log() - log_partition
    log_total = generator.logsumexp(0)
    return SaddlePoint(
        (generator - log_total).exp(), (improver - log_partition[:, None]).exp(), -beta * log_total, log_partition
    )


def _kl(policy: Tensor, ref: Tensor) -> Tensor:
    """Kullback-Leibler divergence over the last dimension; 0 log 0 is 0."""
    return (torch.xlogy(policy, policy) - torch.xlogy(policy, ref)).sum(-1)


def game_value(
    preference: Tensor, generator: Tensor, improver: Tensor, ref: Tensor, ref_improver: Tensor, *, beta: float
) -> Tensor:
    r"""What the generator pays to the improver (eq-srpo-game).

    .. math::
        \mathbb E_{d\sim\pi}\Big[\mathbb E_{y\sim\pi_\dagger(\cdot\mid d)}\,p(y\succ d)-\beta\,\mathrm{KL}\big(\pi_\dagger(\cdot\mid d)\,\|\,\pi_{\rm ref}(\cdot\mid d)\big)\Big]
        +\beta\,\mathrm{KL}(\pi\,\|\,\pi_{\rm ref}) .

    Args:
        preference, ref, ref_improver, beta: as in :func:`tabular_srpo`.
        generator: :math:`\pi`, shape ``(K,)``.
        improver: :math:`\pi_\dagger`, shape ``(K, K)``, drafts are rows.

    Returns:
        Shape ``()``; infinite where a policy leaves the support of its reference.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(K²) time and memory.

    Source: Choi et al., the min-max objective.

    Example:
        >>> uniform = torch.full((2, 2), 0.5)
        >>> game_value(uniform, uniform[0], uniform, uniform[0], uniform, beta=1.0)
        tensor(0.5000)
    """
    _preference(preference)
    _distribution("generator", generator, preference)
    _distribution("improver", improver, preference, ndim=2)
    _distribution("ref", ref, preference)
    _distribution("ref_improver", ref_improver, preference, ndim=2)
    beta = _checks.positive_number("beta", beta)
    gain = (improver * preference.T).sum(1) - beta * _kl(improver, ref_improver)
    # A draft that the generator never writes costs nothing, also where the improver's KL is infinite.
    return torch.where(generator > 0, generator * gain, 0).sum() + beta * _kl(generator, ref)


def exploitability(preference: Tensor, policy: Tensor) -> Tensor:
    r"""The best win rate of one fixed completion against a policy, :math:`\max_yp(y\succ\pi)` (eq-srpo-exploitability).

    It is at least ½, and ½ exactly where no completion is preferred to what the policy writes.

    Args:
        preference: as in :func:`tabular_srpo`.
        policy: shape ``(K,)``, sums to 1.

    Returns:
        Shape ``()``, in [½, 1].

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(K²).

    Source: the preference game; chapter.

    Example:
        >>> exploitability(torch.tensor([[0.5, 0.8], [0.2, 0.5]]), torch.tensor([0.0, 1.0]))
        tensor(0.8000)
    """
    _preference(preference)
    return _mean(preference, _distribution("policy", policy, preference)).amax()


def improvement(preference: Tensor, drafts: Tensor, improver: Tensor) -> Tensor:
    r"""Probability that a revision is preferred to its draft, :math:`\mathbb E_{d\sim q}\,\mathbb E_{y\sim\pi_\dagger(\cdot\mid d)}\,p(y\succ d)` (eq-srpo-improvement).

    Args:
        preference: as in :func:`tabular_srpo`.
        drafts: the distribution q of drafts, shape ``(K,)``.
        improver: shape ``(K, K)``, drafts are rows.

    Returns:
        Shape ``()``, in [0, 1].

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(K²).

    Source: chapter.

    Example:
        >>> p = torch.tensor([[0.5, 0.8], [0.2, 0.5]])
        >>> improvement(p, torch.tensor([0.5, 0.5]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))  # ½ and 0.8
        tensor(0.6500)
    """
    _preference(preference)
    _distribution("drafts", drafts, preference)
    _distribution("improver", improver, preference, ndim=2)
    return (drafts[:, None] * improver * preference.T).sum()


# ---------------------------------------------------------------------------------------------------------------------
# The losses
# ---------------------------------------------------------------------------------------------------------------------


class PairLogRatios(NamedTuple):
    r"""The six log-ratios of a labelled pair, each of shape ``(B,)``.

    Args:
        winner: :math:`\varrho(y_w)=\log\pi(y_w)-\log\pi_{\rm ref}(y_w)`, of the generator.
        loser: :math:`\varrho(y_l)`.
        winner_given_loser: :math:`D(y_w\mid y_l)`, of the improver: the winner as a revision of the loser.
        loser_given_loser: :math:`D(y_l\mid y_l)`, the loser left as it is.
        winner_given_winner: :math:`D(y_w\mid y_w)`.
        loser_given_winner: :math:`D(y_l\mid y_w)`.

    Source: Choi et al., the offline loss.
    """

    winner: Tensor
    loser: Tensor
    winner_given_loser: Tensor
    loser_given_loser: Tensor
    winner_given_winner: Tensor
    loser_given_winner: Tensor


def _ratios(log_ratios: PairLogRatios) -> PairLogRatios:
    """Check six vectors of the same shape and dtype; give them back in float32 or wider."""
    if not isinstance(log_ratios, tuple) or len(log_ratios) != 6:
        raise TypeError(f"log_ratios must be a PairLogRatios of six tensors, got {type(log_ratios).__name__}")
    first = log_ratios[0]
    for name, value in zip(PairLogRatios._fields, log_ratios, strict=True):
        _checks.floating(f"log_ratios.{name}", value, 1)
        _checks.like(f"log_ratios.{name}", value, "log_ratios.winner", first, 1)
    return PairLogRatios(*(_checks.wide(value) for value in log_ratios))


def _generator_term(r: PairLogRatios, beta: float) -> Tensor:
    margin = r.winner - r.loser + r.winner_given_loser - r.loser_given_winner
    return (beta / 2 * margin - 0.5).square()


def _improver_term(r: PairLogRatios, beta: float) -> Tensor:
    to_winner = r.winner_given_loser - r.loser_given_loser  # a better revision than leaving the loser
    stay = r.winner_given_winner - r.loser_given_winner  # leaving the winner than spoiling it
    return ((beta * to_winner - 0.5).square() + (beta * stay - 0.5).square()) / 2


def srpo_generator_loss(log_ratios: PairLogRatios, *, beta: float, reduction: str = "mean") -> Tensor:
    r"""The loss of a pair that ties generator and improver together (eq-srpo-hard, left).

    .. math:: \hat L=\Big(\tfrac\beta2\big[\varrho(y_w)-\varrho(y_l)+D(y_w\mid y_l)-D(y_l\mid y_w)\big]-\tfrac12\Big)^2

    Alone it does not determine the two policies: mix it with :func:`srpo_improver_loss`.

    Args:
        log_ratios: six tensors of shape ``(B,)``, floating point.
        beta: > 0. The margin that is asked for is 1 / beta nats.
        reduction: "none", "mean" or "sum".

    Returns:
        Shape ``()``, or ``(B,)`` with "none"; float32 or wider, >= 0.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(B).

    Source: Choi et al., the offline loss; derived in the chapter.

    Example:
        >>> ratios = PairLogRatios(*torch.tensor([[0.6], [0.2], [0.5], [0.1], [0.3], [-0.1]]))
        >>> srpo_generator_loss(ratios, beta=1.0)
        tensor(0.)
    """
    return _checks.reduced(_generator_term(_ratios(log_ratios), _checks.positive_number("beta", beta)), reduction)


def srpo_improver_loss(log_ratios: PairLogRatios, *, beta: float, reduction: str = "mean") -> Tensor:
    r"""The loss of a pair for the improver alone, the mean of both orders of draft and revision (eq-srpo-hard, right).

    .. math:: \hat L_\dagger=\tfrac12\Big[\big(\beta[D(y_w\mid y_l)-D(y_l\mid y_l)]-\tfrac12\big)^2+\big(\beta[D(y_w\mid y_w)-D(y_l\mid y_w)]-\tfrac12\big)^2\Big]

    Args:
        log_ratios, beta, reduction: as in :func:`srpo_generator_loss`; the first two log-ratios are not used.

    Returns:
        Shape ``()``, or ``(B,)`` with "none"; float32 or wider, >= 0.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(B).

    Source: Choi et al., the offline loss; derived in the chapter.

    Example:
        >>> ratios = PairLogRatios(*torch.tensor([[0.6], [0.2], [0.5], [0.1], [0.3], [-0.1]]))
        >>> srpo_improver_loss(ratios, beta=1.0)
        tensor(0.0100)
    """
    return _checks.reduced(_improver_term(_ratios(log_ratios), _checks.positive_number("beta", beta)), reduction)


def srpo_loss(log_ratios: PairLogRatios, *, beta: float, alpha: float = 0.25, reduction: str = "mean") -> Tensor:
    r"""The loss of SRPO on labelled pairs, :math:`(1-\alpha)\hat L+\alpha\hat L_\dagger` (eq-srpo-mixed).

    Args:
        log_ratios, beta, reduction: as in :func:`srpo_generator_loss`.
        alpha: weight of the improver's loss, in [0, 1]. Inside of (0, 1) the two policies are determined.

    Returns:
        Shape ``()``, or ``(B,)`` with "none"; float32 or wider, >= 0.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(B), beside the six log-probabilities of each pair.

    Source: Choi et al., the offline loss; derived in the chapter.

    Example:
        >>> ratios = PairLogRatios(*torch.tensor([[0.6], [0.2], [0.5], [0.1], [0.3], [-0.1]]))
        >>> srpo_loss(ratios, beta=1.0, alpha=0.25)
        tensor(0.0025)
    """
    ratios, beta = _ratios(log_ratios), _checks.positive_number("beta", beta)
    alpha = _checks.number("alpha", alpha, 0, 1)
    return _checks.reduced(
        (1 - alpha) * _generator_term(ratios, beta) + alpha * _improver_term(ratios, beta), reduction
    )


def srpo_population_loss(
    generator_log_ratio: Tensor,
    improver_log_ratio: Tensor,
    preference: Tensor,
    weights: Tensor,
    *,
    beta: float,
    alpha: float,
) -> Tensor:
    r"""The loss of SRPO on all ordered pairs of K completions, with known preferences (eq-srpo-losses, eq-srpo-mixed).

    The sum over drafts d and revisions y, with weights :math:`w_{dy}`, of :math:`1-\alpha` times the square of
    :math:`p(y\succ d)-\frac12-\frac\beta2[D(y\mid d)-D(d\mid y)+\varrho(y)-\varrho(d)]` and :math:`\alpha` times that of :math:`p(y\succ d)-\frac12-\beta[D(y\mid d)-D(d\mid d)]`.

    Args:
        generator_log_ratio: :math:`\varrho`, shape ``(K,)``, floating point, of a policy that sums to 1.
        improver_log_ratio: ``[d, y]`` is :math:`D(y\mid d)`, shape ``(K, K)``, of a policy whose rows sum to 1.
        preference: as in :func:`tabular_srpo`.
        weights: shape ``(K, K)``, >= 0; :math:`\mu(d)\mu(y)` for independent completions of a policy :math:`\mu`.
        beta: > 0.
        alpha: weight of the improver's loss, in [0, 1].

    Returns:
        Shape ``()``, >= 0; 0 at the saddle point of :func:`tabular_srpo`.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(K²) time and memory.

    Source: Choi et al.; derived in the chapter.

    Example:
        >>> p, uniform = torch.tensor([[0.5, 0.8], [0.2, 0.5]]), torch.full((2, 2), 0.5)
        >>> saddle = tabular_srpo(p, uniform[0], uniform, beta=0.5)
        >>> rho, D = (saddle.generator / uniform[0]).log(), (saddle.improver / uniform).log()
        >>> srpo_population_loss(rho, D, p, uniform**2, beta=0.5, alpha=0.25).round(decimals=6)
        tensor(0.)
    """
    _preference(preference)
    K = len(preference)
    for name, value, ndim in (
        ("generator_log_ratio", generator_log_ratio, 1),
        ("improver_log_ratio", improver_log_ratio, 2),
        ("weights", weights, 2),
    ):
        if _checks.floating(name, value, ndim).shape != (K,) * ndim:
            raise ValueError(f"{name} must have shape {(K,) * ndim} for {K} completions, got {tuple(value.shape)}")
    if _checks.known_false(weights >= 0):
        raise ValueError("weights must be >= 0")
    beta, alpha = _checks.positive_number("beta", beta), _checks.number("alpha", alpha, 0, 1)
    rho, D = _checks.wide(generator_log_ratio), _checks.wide(improver_log_ratio)
    target = preference.T - 0.5  # row = draft
    pair = target - beta / 2 * (D - D.T + rho[None, :] - rho[:, None])
    alone = target - beta * (D - D.diagonal()[:, None])
    return (weights * ((1 - alpha) * pair.square() + alpha * alone.square())).sum()


# ---------------------------------------------------------------------------------------------------------------------
# Revision
# ---------------------------------------------------------------------------------------------------------------------


def revise(distribution: Tensor, improver: Tensor, steps: int) -> Tensor:
    r"""The distribution of a draft after each of some revisions, :math:`q_{k+1}=q_k\pi_\dagger` (eq-srpo-chain).

    Args:
        distribution: of the first draft, shape ``(K,)``, sums to 1.
        improver: shape ``(K, K)``, drafts are rows.
        steps: revisions, >= 0.

    Returns:
        Shape ``(steps + 1, K)``; row 0 is ``distribution``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(steps · K²).

    Source: Choi et al., self-revision at test time.

    Example:
        >>> revise(torch.tensor([1.0, 0.0]), torch.tensor([[0.5, 0.5], [0.0, 1.0]]), 2)
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000],
                [0.2500, 0.7500]])
    """
    _checks.floating("improver", improver, 2)
    if improver.shape[0] != improver.shape[1]:
        raise ValueError(f"improver must be square, got shape {tuple(improver.shape)}")
    _distribution("improver", improver, improver, ndim=2)
    chain = [_distribution("distribution", distribution, improver)]
    for _ in range(_checks.positive_int("steps", steps, minimum=0)):
        chain.append(_mean(improver.T, chain[-1]))
    return torch.stack(chain)


def self_revise(sample_fn: Callable[[_T], _T], drafts: _T, steps: int) -> list[_T]:
    r"""Revise drafts with a model, again and again: :math:`y_{k+1}\sim\pi_\dagger(\cdot\mid y_k)` (eq-srpo-chain).

    Args:
        sample_fn: takes a batch of drafts and returns one sampled revision of each.
        drafts: the first batch, of any type that ``sample_fn`` takes.
        steps: revisions, >= 0.

    Returns:
        ``steps + 1`` batches; the first is ``drafts``.

    Raises:
        TypeError, ValueError: if ``sample_fn`` cannot be called, or ``steps`` is not an integer >= 0.

    Complexity: ``steps`` calls.

    Source: Choi et al., self-revision at test time.

    Example:
        >>> self_revise(lambda texts: [text + "!" for text in texts], ["no"], 2)
        [['no'], ['no!'], ['no!!']]
    """
    if not callable(sample_fn):
        raise TypeError(f"sample_fn must be callable, got {type(sample_fn).__name__}")
    stages = [drafts]
    for _ in range(_checks.positive_int("steps", steps, minimum=0)):
        stages.append(sample_fn(stages[-1]))
    return stages


# ---------------------------------------------------------------------------------------------------------------------
# What SRPO is compared with
# ---------------------------------------------------------------------------------------------------------------------


def ipo_optimum(preference: Tensor, ref: Tensor, behaviour: Tensor, *, tau: float) -> Tensor:
    r"""The policy that IPO finds in all the pairs of a behaviour policy, :math:`\pi\propto\pi_{\rm ref}\,e^{p(y\succ\mu)/\tau}` (eq-srpo-ipo).

    Args:
        preference, ref: as in :func:`tabular_srpo`.
        behaviour: :math:`\mu`, who wrote the pairs, shape ``(K,)``, sums to 1.
        tau: > 0.

    Returns:
        Shape ``(K,)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(K²).

    Source: Azar et al. 2024.

    Example:
        >>> p, uniform = torch.tensor([[0.5, 0.8], [0.2, 0.5]]), torch.tensor([0.5, 0.5])
        >>> ipo_optimum(p, uniform, uniform, tau=0.3)
        tensor([0.7311, 0.2689])
    """
    _preference(preference)
    _distribution("ref", ref, preference)
    _distribution("behaviour", behaviour, preference)
    return (ref.log() + _mean(preference, behaviour) / _checks.positive_number("tau", tau)).softmax(0)


def dpo_optimum(preference: Tensor, ref: Tensor, behaviour: Tensor, *, beta: float) -> Tensor:
    r"""The policy that DPO finds in all the pairs of a behaviour policy (eq-srpo-dpo).

    :math:`\pi\propto\pi_{\rm ref}\,e^{\theta/\beta}`, where the scores :math:`\theta` are the Bradley-Terry fit: they minimize :math:`\sum_{ij}\mu_i\mu_jp(i\succ j)\log(1+e^{\theta_j-\theta_i})`,
    by Newton's method in float64.

    Args:
        preference, ref: as in :func:`tabular_srpo`.
        behaviour: :math:`\mu`, who wrote the pairs, shape ``(K,)``, > 0, sums to 1.
        beta: > 0.

    Returns:
        Shape ``(K,)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument; and where preferences of 0 and 1, or too close to them, leave the loss without a minimizer that can be found.

    Complexity: O(K³) for each of some ten steps, more for preferences close to 0 and 1.

    Source: Rafailov et al. 2023; Ford 1957 for the condition.

    Example:
        >>> p, uniform = torch.tensor([[0.5, 0.8], [0.2, 0.5]]), torch.tensor([0.5, 0.5])
        >>> dpo_optimum(p, uniform, uniform, beta=1.0)  # Bradley-Terry: the scores differ by log 4
        tensor([0.8000, 0.2000])
    """
    _preference(preference)
    _distribution("ref", ref, preference)
    _distribution("behaviour", behaviour, preference)
    beta = _checks.positive_number("beta", beta)
    if not bool((behaviour > 0).all()):
        raise ValueError("behaviour must be > 0 everywhere: a completion without pairs has no score")
    # A minimizer exists if and only if a chain of possible wins leads from each completion to each other.
    reachable = preference > 0
    for _ in range(len(preference).bit_length()):
        reachable = (reachable.double() @ reachable.double()) > 0
    if not bool(reachable.all()):
        raise ValueError(
            "preference of 0 or 1 splits the completions into winners and losers: the loss of DPO has no minimizer"
        )
    p, mu = preference.detach().double(), behaviour.detach().double()
    rare = p <= p.T  # of a pair the smaller number is the exact one
    pairs, theta, found = mu[:, None] * mu, torch.zeros_like(mu), False
    for _ in range(200):
        gap = theta[:, None] - theta
        error, curvature = torch.sigmoid(gap) - p, pairs * torch.sigmoid(gap) * torch.sigmoid(-gap)
        gradient = (pairs * torch.where(rare, error, -error.T)).sum(1)
        hessian = curvature.sum(1).diag() - curvature
        # The loss does not change if all scores move together; the added matrix fixes their weighted mean.
        step, singular = torch.linalg.solve_ex(hessian + hessian.diagonal().mean().clamp(min=1e-300) * pairs, gradient)
        if singular:
            break
        theta = theta - step
        # Judged by the scores and not by the loss, to which a completion that nearly always wins adds next to nothing.
        found = bool(step.abs().max() <= 1e-8)
        if found:
            break
    if not found:
        raise ValueError("preference is too close to 0 or 1 for the scores of DPO to be found in float64")
    return (ref.log() + (theta / beta).to(ref)).softmax(0)
