r"""Logistic regression with any step size, and the perceptrons that it becomes.

The method of *From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes* (Alexander Tyurin, AAAI 2025,
arXiv 2412.08424): gradient descent on the logistic loss of separable data, run until all samples are right; its limit for large steps, a batch
perceptron; the version that divides the gradient by the mean weight; and the bounds on the number of updates. Equation labels are those of the
chapter ``optimization/large_steps``.

Notation: ``features`` (n, d) holds :math:`a_i`, ``labels`` (n,) holds :math:`y_i\in\{-1,+1\}`, and ``step_size`` is :math:`\gamma`. :math:`z_i=y_ia_i`,
:math:`m_i=z_i^\top\theta` is the margin of a sample, :math:`w_i=\sigma(-m_i)` its weight, and :math:`W=\sum_iw_i`. There is no intercept: append a constant feature to have
one. A sample is right if its margin is > 0; a margin of 0 is wrong. Logs are natural.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lossbook import _checks

# ---------------------------------------------------------------------------------------------------------------------
# The loss, its gradient, and the factor that normalizes it
# ---------------------------------------------------------------------------------------------------------------------


def _data(features: Tensor, labels: Tensor) -> Tensor:
    """Check features (n, d) and labels (n,) of -1 and +1; give back the labels in the features' dtype."""
    _checks.finite("features", _checks.floating("features", features, 2))
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"labels must have shape ({len(features)},), one for each row of features, got {tuple(labels.shape)}"
        )
    if labels.dtype == torch.bool or _checks.known_false(labels.abs() == 1):
        raise ValueError(f"labels must be -1 or +1, got {labels.unique().tolist()[:5]}")
    return labels.to(features.dtype)


def _margins(theta: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Margins (n,), or (n, k) for k models, in float32 or wider; the labels are those of :func:`_data`."""
    return _checks.wide((labels if theta.ndim == 1 else labels[:, None]) * (features @ theta))


def _model(theta: Tensor, features: Tensor, columns: bool = False) -> None:
    """Check theta (d,), or (d, k) where ``columns`` allows it."""
    _checks.floating("theta", theta)
    d = features.shape[1]
    if theta.ndim not in ((1, 2) if columns else (1,)) or len(theta) != d:
        wanted = f"({d},) or ({d}, k)" if columns else f"({d},)"
        raise ValueError(
            f"theta must have shape {wanted} for features of shape {tuple(features.shape)}, got {tuple(theta.shape)}"
        )
    if theta.dtype != features.dtype:
        raise TypeError(f"theta must have the dtype of features, {features.dtype}, got {theta.dtype}")


def logistic_loss(theta: Tensor, features: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""The logistic loss :math:`\log(1+e^{-m_i})` of a linear classifier (eq-large_steps-loss).

    Computed as :math:`-\log\sigma(m)`: ``softplus`` is linear above its threshold, which costs values and gradients their last digits.

    Args:
        theta: shape ``(d,)``, or ``(d, k)`` for k models.
        features: shape ``(n, d)``, floating point, finite, of theta's dtype.
        labels: shape ``(n,)``, values -1 and +1, of any dtype.
        reduction: "none", "mean" or "sum" over the samples.

    Returns:
        Shape ``()``, or ``(k,)`` for k models; ``(n,)`` or ``(n, k)`` with reduction "none". Float32 or wider, >= 0.

    Raises:
        TypeError, ValueError: for a wrong type, shape, value or reduction, naming the argument.

    Complexity: O(ndk) time, O(nk) memory beside the data.

    Source: Tyurin, the logistic regression problem.

    Example:
        >>> features, labels = misleading_loss_dataset()
        >>> theta = torch.tensor([4.0, 6.0], dtype=torch.float64)  # after one step of size 8
        >>> logistic_loss(theta, features, labels, reduction="none")
        tensor([2.1269e+00, 6.9144e-13], dtype=torch.float64)
    """
    labels = _data(features, labels)
    _model(theta, features, columns=True)
    if reduction not in _checks.REDUCTIONS:
        raise ValueError(f"reduction must be one of {_checks.REDUCTIONS}, got {reduction!r}")
    losses = -F.logsigmoid(_margins(theta, features, labels))
    return losses if reduction == "none" else losses.mean(0) if reduction == "mean" else losses.sum(0)


def logistic_gradient(theta: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    r"""Gradient of the mean logistic loss, :math:`-\frac1n\sum_iw_iz_i` (eq-large_steps-gradient), without autograd.

    Args:
        theta, features, labels: as in :func:`logistic_loss`, one model.

    Returns:
        Shape ``(d,)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(nd) time, O(n + d) memory beside the data.

    Source: Tyurin, LR+GD.

    Example:
        >>> features, labels = misleading_loss_dataset()
        >>> logistic_gradient(torch.zeros(2, dtype=torch.float64), features, labels)
        tensor([-0.5000, -0.7500], dtype=torch.float64)
    """
    labels = _data(features, labels)
    _model(theta, features)
    return -_combine(torch.sigmoid(-_margins(theta, features, labels)), features, labels) / len(features)


def _combine(weights: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    r""":math:`\sum_iw_iz_i`, without the n × d table of the z."""
    return (weights.to(features.dtype) * labels) @ features


def normalization_factor(theta: Tensor, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    r"""The factor :math:`\beta=n/W` of the normalized method, and its logarithm (eq-large_steps-beta).

    :math:`\log\beta=\log n-\mathrm{LSE}_i\log\sigma(-m_i)` is finite wherever the margins are. :math:`\beta` itself overflows where it exceeds the dtype's largest number, at
    :math:`\log\beta` = 709 in float64 and 88 in float32: do not multiply by it. :func:`normalized_weights` are finite.

    Args:
        theta, features, labels: as in :func:`logistic_loss`, one model.

    Returns:
        :math:`\beta` > 1, or infinity, and :math:`\log\beta`, both of shape ``()``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(nd) time, O(n) memory beside the data.

    Source: Tyurin, Normalized LR+GD.

    Example:
        >>> features, labels = torch.tensor([[1.0]]), torch.tensor([1])
        >>> normalization_factor(torch.tensor([0.0]), features, labels)
        (tensor(2.), tensor(0.6931))
        >>> normalization_factor(torch.tensor([200.0]), features, labels)
        (tensor(inf), tensor(200.))
    """
    labels = _data(features, labels)
    _model(theta, features)
    log_weights = F.logsigmoid(-_margins(theta, features, labels))
    log_beta = math.log(len(features)) - torch.logsumexp(log_weights, 0)
    return log_beta.exp(), log_beta


def normalized_weights(theta: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    r"""The weights :math:`p_i=w_i/W` with which the normalized method adds the samples (eq-large_steps-normalized).

    A softmax of :math:`\log\sigma(-m_i)`: they add up to 1 where all the :math:`w_i` underflow, too.

    Args:
        theta, features, labels: as in :func:`logistic_loss`, one model.

    Returns:
        Shape ``(n,)``, float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(nd) time, O(n) memory beside the data.

    Source: Tyurin, Normalized LR+GD.

    Example:
        >>> features, labels = torch.tensor([[800.0], [801.0]]), torch.tensor([1, 1])
        >>> normalized_weights(torch.tensor([1.0]), features, labels)  # 1 and 1/e, over their sum
        tensor([0.7311, 0.2689])
    """
    labels = _data(features, labels)
    _model(theta, features)
    return _shares(_margins(theta, features, labels))


def _shares(margins: Tensor) -> Tensor:
    return torch.softmax(F.logsigmoid(-margins), 0)


# ---------------------------------------------------------------------------------------------------------------------
# Five ways to a separator
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SeparationResult:
    r"""One run from :math:`\theta_0=0`. The last four hold one entry for each :math:`t=0,\dots,T`, T updates, both ends included; None without ``record``.

    Args:
        theta: the last iterate, shape ``(d,)``.
        iterations: updates made before the first iterate with all margins > 0; None if ``max_iter`` updates did not get there.
        losses: mean logistic loss of the iterates, shape ``(T + 1,)``.
        accuracies: share of margins > 0, shape ``(T + 1,)``; 0 at the start.
        grad_norms: norm of the mean logistic loss's gradient, shape ``(T + 1,)``.
        iterates: shape ``(T + 1, d)``.

    Source: what the figures of Tyurin show of a run.
    """

    theta: Tensor
    iterations: int | None
    losses: Tensor | None = None
    accuracies: Tensor | None = None
    grad_norms: Tensor | None = None
    iterates: Tensor | None = None


@torch.no_grad()
def _until_separated(
    features: Tensor, labels: Tensor, max_iter: int, record: bool, update: Callable[[int, Tensor], Tensor]
) -> SeparationResult:
    """Add ``update(t, margins)`` until all margins are > 0."""
    _checks.positive_int("max_iter", max_iter)
    theta = features.new_zeros(features.shape[1])
    rows: list[tuple[Tensor, ...]] = []
    with torch.autocast(features.device.type, enabled=False):  # a count of updates is no place for rounding
        for t in itertools.count():
            margins = _margins(theta, features, labels)
            right = margins > 0
            if record:
                gradient = _combine(torch.sigmoid(-margins), features, labels) / len(features)
                rows.append((-F.logsigmoid(margins).mean(), right.to(margins.dtype).mean(), gradient.norm(), theta))
            solved = bool(right.all())  # the one value that the host has to read at each step
            if solved or t == max_iter:
                break
            theta = theta + update(t, margins)
    kept = [torch.stack(column) for column in zip(*rows, strict=True)]
    return SeparationResult(theta, t if solved else None, *kept)


def lr_gd(
    features: Tensor,
    labels: Tensor,
    *,
    step_size: float,
    max_iter: int,
    normalized: bool = False,
    record: bool = True,
) -> SeparationResult:
    r"""Gradient descent on the logistic loss until the data are separated (eq-large_steps-gd).

    :math:`\theta_{t+1}=\theta_t+\frac\gamma n\sum_iw_iz_i`, or, normalized, :math:`\theta_{t+1}=\theta_t+\gamma\sum_ip_iz_i` with :math:`p=w/W` (eq-large_steps-normalized).

    Args:
        features: shape ``(n, d)``, floating point, finite.
        labels: shape ``(n,)``, values -1 and +1, of any dtype.
        step_size: :math:`\gamma` > 0. Equal step sizes are not equal steps: the normalized one is :math:`n/W` times longer, at least twice at the start.
        max_iter: most updates, at least 1.
        normalized: divide the gradient by the mean weight.
        record: keep losses, accuracies, gradient norms and iterates.

    Returns:
        The run; tensors of the features' dtype and device.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(nd) time for each update, O(n + d) memory beside the data, and O(Td) with ``record``. Each update waits for the device once,
    because the stop depends on the margins.

    Source: Tyurin, LR+GD and Normalized LR+GD.

    Example:
        >>> features, labels = worst_case_dataset(1000)
        >>> lr_gd(features, labels, step_size=100, max_iter=1000).iterations
        308
        >>> [lr_gd(features, labels, step_size=s, max_iter=1000, normalized=True).iterations for s in (100, 10, 1, 0.1)]
        [2, 2, 16, 157]
    """
    labels = _data(features, labels)
    gamma = _checks.positive_number("step_size", step_size)

    def update(t: int, margins: Tensor) -> Tensor:
        weights = _shares(margins) if normalized else torch.sigmoid(-margins) / len(features)
        return gamma * _combine(weights, features, labels)

    return _until_separated(features, labels, max_iter, record, update)


def batch_perceptron(
    features: Tensor, labels: Tensor, *, max_iter: int, normalized: bool = False, record: bool = True
) -> SeparationResult:
    r"""Add the mean over the batch of all wrong :math:`z_i` (eq-large_steps-bp): the limit of :func:`lr_gd` divided by :math:`\gamma`, as :math:`\gamma\to\infty`.

    The sum of the wrong samples is divided by n; but the first update, where all are wrong, is *half* of the mean. Normalized, it is divided by the number of
    wrong samples, at the first update, too (eq-large_steps-nbp).

    Args:
        features, labels, max_iter, record: as in :func:`lr_gd`.
        normalized: divide by the number of wrong samples.

    Returns:
        The run. Losses and gradient norms are those of the iterates as they are, without a step size.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: as :func:`lr_gd`.

    Source: Tyurin, Batch Perceptron and Normalized Batch Perceptron.

    Example:
        >>> [batch_perceptron(*worst_case_dataset(n), max_iter=400).iterations for n in (10, 100, 1000)]
        [4, 31, 301]
        >>> batch_perceptron(*worst_case_dataset(1000), max_iter=400, normalized=True).iterations
        2
    """
    labels = _data(features, labels)

    def update(t: int, margins: Tensor) -> Tensor:
        wrong = (margins <= 0).to(features.dtype)
        if normalized:
            return _combine(wrong, features, labels) / wrong.sum()
        return _combine(wrong, features, labels) / (len(features) if t else 2 * len(features))

    return _until_separated(features, labels, max_iter, record, update)


def perceptron(
    features: Tensor,
    labels: Tensor,
    *,
    max_iter: int,
    order: str = "first",
    generator: torch.Generator | None = None,
    record: bool = True,
) -> SeparationResult:
    r"""The classical perceptron: add one wrong :math:`z_j` (eq-large_steps-perceptron).

    Args:
        features, labels, max_iter, record: as in :func:`lr_gd`.
        order: "first" takes the wrong sample with the smallest index, "random" any, with equal probabilities.
        generator: for "random", on the features' device.

    Returns:
        The run, as in :func:`batch_perceptron`.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: as :func:`lr_gd`: all margins are looked at before each update.

    Source: Rosenblatt 1958; Tyurin, Theorem 5.2.

    Example:
        >>> perceptron(*worst_case_dataset(1000), max_iter=10).iterations
        2
    """
    labels = _data(features, labels)
    if order not in ("first", "random"):
        raise ValueError(f"order must be 'first' or 'random', got {order!r}")
    if order == "first" and generator is not None:
        raise ValueError("generator must be None with order 'first', which draws nothing")

    def update(t: int, margins: Tensor) -> Tensor:
        wrong = (margins <= 0).to(torch.float32)
        one = torch.multinomial(wrong, 1, generator=generator) if order == "random" else wrong.argmax()[None]
        return (labels[one, None] * features[one])[0]

    return _until_separated(features, labels, max_iter, record, update)


class NormalizedGD(torch.optim.Optimizer):
    r"""Gradient descent that divides the gradient by the mean weight :math:`W/n` of the batch (eq-large_steps-normalized), for models of your own.

    Each step is given the mean weight of the batch that the gradient is of: ``torch.sigmoid(-margins).mean()`` for the mean logistic loss. For a
    linear model prefer :func:`lr_gd`, which also works where all weights underflow. Here a mean weight of 0 makes no step; the gradient is 0 then, too.

    Args:
        params: parameters or parameter groups.
        lr: :math:`\gamma` > 0.

    Raises:
        TypeError, ValueError: for a wrong step size or mean weight, naming the argument.

    Complexity: O(parameters) time for each step; no state.

    Source: Tyurin, Normalized LR+GD.

    Example:
        >>> features, labels = worst_case_dataset(1000)
        >>> theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> optimizer, steps = NormalizedGD([theta], lr=1.0), 0
        >>> while (margins := labels * (features @ theta)).min() <= 0:
        ...     optimizer.zero_grad()
        ...     logistic_loss(theta, features, labels).backward()
        ...     optimizer.step(torch.sigmoid(-margins.detach()).mean())
        ...     steps += 1
        >>> steps
        16
    """

    def __init__(self, params: Iterable[Any], lr: float):
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its ``lr`` is checked as that of the constructor."""
        _checks.positive_number("lr", param_group.get("lr", self.defaults["lr"]))
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, mean_weight: float | Tensor, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step.

        Args:
            mean_weight: in [0, 1], a number or a tensor of shape ``()``, of the parameters as they are before the step.
            closure: computes the loss and its gradient, called once before the step.

        Returns:
            What the closure returns, or None.

        Raises:
            TypeError, ValueError: for a wrong mean weight.
        """
        if not isinstance(mean_weight, Tensor):
            mean_weight = torch.tensor(_checks.number("mean_weight", mean_weight, 0, 1), dtype=torch.float64)
        elif mean_weight.ndim or not mean_weight.is_floating_point():
            raise ValueError(
                f"mean_weight must be a floating-point tensor of shape (), got {mean_weight.dtype}, {tuple(mean_weight.shape)}"
            )
        elif _checks.known_false((mean_weight >= 0) & (mean_weight <= 1)):
            raise ValueError(f"mean_weight must lie in [0, 1], got {mean_weight}")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            scale = torch.where(mean_weight > 0, group["lr"] / mean_weight, 0)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad * scale.to(parameter.grad))
        return loss


# ---------------------------------------------------------------------------------------------------------------------
# The bounds
# ---------------------------------------------------------------------------------------------------------------------


def max_margin(features: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    r"""The margin :math:`\mu=\max_{\|\theta\|=1}\min_iz_i^\top\theta` of separable data, and the direction u that has it (eq-large_steps-margin).

    u points to the point of the convex hull of the :math:`z_i` that is nearest to 0 (eq-large_steps-dual). Non-negative least squares finds it: of all :math:`p\ge0`, the one
    with the smallest :math:`\|\sum_ip_iz_i\|^2+(1-\sum_ip_i)^2` is the nearest point's, up to scale. What is returned is the margin *of the direction that is returned*, so it is a
    lower bound of :math:`\mu` whatever the solver's rounding.

    Args:
        features, labels: as in :func:`lr_gd`.

    Returns:
        The margin, > 0, and u with norm 1, shape ``(d,)``, of the features' dtype and device.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, or data that are not separable, naming the argument. A margin below about 1e-7 of the
            largest row's norm counts as none.

    Complexity: a finite number of least-squares problems in float64, about as many as there are support vectors, each of O(n) to O(nd) and more.

    Source: Tyurin, the separability assumption; Lawson and Hanson 1974 for the solver.

    Example:
        >>> margin, u = max_margin(*worst_case_dataset(10))
        >>> round(margin, 6), u.abs().round(decimals=6).tolist()
        (0.5, [1.0, 0.0])
    """
    import numpy as np
    from scipy.optimize import nnls

    z = (_data(features, labels)[:, None] * features.detach()).double().cpu()
    radius = z.norm(dim=1).max().item()
    z = z / (radius or 1.0)
    system = np.vstack([z.T.numpy(), np.ones(len(z))])
    p, _ = nnls(system, np.eye(len(system))[-1])
    u = F.normalize(torch.from_numpy(p) @ z, dim=0).to(features.dtype)
    margin = (z @ F.normalize(u.double(), dim=0)).min().item()
    if margin <= 0:
        raise ValueError(
            f"features must be separable by labels through 0, with a margin of at least 1e-7 of the largest row's norm, got {margin:.1e}"
        )
    return margin * radius, u.to(features.device)


METHODS = ("batch_perceptron", "perceptron", "normalized_batch_perceptron", "normalized_lr_gd", "lr_gd")


def iteration_bound(
    features: Tensor, labels: Tensor, *, margin: float, method: str, step_size: float | None = None
) -> float:
    r"""Most updates that a method may need, from :math:`R=\max_i\|a_i\|`, the margin :math:`\mu` and :math:`\gamma`.

    ===============================  ==========================================================================  =============================
    method                           bound                                                                       label
    ===============================  ==========================================================================  =============================
    ``batch_perceptron``             :math:`nR^2/\mu^2`                                                          eq-large_steps-bp-bound
    ``perceptron``                   :math:`R^2/\mu^2`                                                           eq-large_steps-novikoff
    ``normalized_batch_perceptron``  :math:`R^2/\mu^2`                                                           eq-large_steps-nbp-bound
    ``normalized_lr_gd``             :math:`R^2/\mu^2+2\log(2n-1)/(\gamma\mu^2)`                                 eq-large_steps-normalized-bound
    ``lr_gd``                        :math:`2nR^2/\mu^2+4n\log(2n-1)/(\gamma\mu^2)`                              eq-large_steps-gd-bound
    ===============================  ==========================================================================  =============================

    Args:
        features, labels: as in :func:`lr_gd`.
        margin: :math:`\mu`, or any lower bound of it, in (0, R]; see :func:`max_margin`.
        method: one of the five.
        step_size: :math:`\gamma` > 0, for the last two, and only for them.

    Returns:
        The bound, a float: the method stops after at most its floor.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(nd).

    Source: Tyurin, Theorems 3.3, 5.2, 5.3 and 6.1; the last one is the chapter's.

    Example:
        >>> data = worst_case_dataset(5000)
        >>> round(iteration_bound(*data, margin=0.5, method="normalized_lr_gd", step_size=1.0), 4)
        78.6819
    """
    _data(features, labels)
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    n, radius = len(features), features.detach().double().norm(dim=1).max().item()
    if _checks.positive_number("margin", margin) > radius * (1 + 1e-6):
        raise ValueError(f"margin must be at most the largest norm of a row of features, {radius:.6g}, got {margin}")
    if (step_size is not None) != method.endswith("lr_gd"):
        raise ValueError(f"step_size must be given for the two methods with lr_gd, and only there, got {step_size}")
    bound = (radius / margin) ** 2
    if step_size is not None:
        bound += 2 * math.log(2 * n - 1) / _checks.positive_number("step_size", step_size) / margin**2
    return bound * {"batch_perceptron": n, "lr_gd": 2 * n}.get(method, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Two data sets
# ---------------------------------------------------------------------------------------------------------------------


def worst_case_dataset(n: int) -> tuple[Tensor, Tensor]:
    r"""One sample against all others: :math:`z_1=(\frac12,-1)`, :math:`z_2=\dots=z_n=(\frac12,1)`, with :math:`R^2/\mu^2=5` (eq-large_steps-worst).

    The batch perceptron needs exactly :math:`\lfloor(3n+2)/10\rfloor+1` updates. For :math:`n\equiv6` modulo 10 a margin is exactly 0 on the way, which rounding may turn into
    one update less.

    Args:
        n: samples, at least 2.

    Returns:
        Features ``(n, 2)``, float64, and labels ``(n,)``, all +1; the single sample is row 0.

    Raises:
        TypeError, ValueError: for a wrong n.

    Source: Tyurin, Theorem 5.1.

    Example:
        >>> worst_case_dataset(3)[0].tolist()
        [[0.5, -1.0], [0.5, 1.0], [0.5, 1.0]]
    """
    features = torch.tensor([0.5, 1.0], dtype=torch.float64).repeat(_checks.positive_int("n", n, minimum=2), 1)
    features[0, 1] = -1
    return features, torch.ones(n, dtype=torch.float64)


def misleading_loss_dataset() -> tuple[Tensor, Tensor]:
    r"""Two samples on which the loss is largest one step before all is solved: :math:`(1,-1)` of class +1, :math:`(-1,-4)` of class -1 (eq-large_steps-misleading).

    Args: none.

    Returns:
        Features ``(2, 2)`` and labels ``(2,)``, float64.

    Source: Tyurin, Theorem 4.1.

    Example:
        >>> run = lr_gd(*misleading_loss_dataset(), step_size=100, max_iter=5)
        >>> run.iterations, [round(x, 4) for x in run.losses.tolist()]
        (2, [0.6931, 12.5, 0.0])
    """
    return torch.tensor([[1.0, -1.0], [-1.0, -4.0]], dtype=torch.float64), torch.tensor([1.0, -1.0]).double()
