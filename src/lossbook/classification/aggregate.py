r"""Learning when only the mean response of each bag is known.

The method of *Learning from Aggregate responses: Instance Level versus Bag Level Loss Functions* (Javanmard, Chen, Mirrokni,
Badanidiyuru and Fu, ICLR 2024, arXiv 2401.11081): the loss of a bag's mean prediction, the mean loss of its members' predictions, the
interpolation of both, the exact asymptotic risk of the interpolated least squares, and bag means with label differential privacy.
Equation labels are those of the chapter ``classification/aggregate``.

Notation: ``bag`` (B,) says which of the :math:`m` bags each instance is in; bag :math:`a` has :math:`k_a` members, mean response
:math:`\bar y_a` and mean prediction :math:`\bar f_a`. ``rho`` is :math:`\rho`, ``psi`` is :math:`\psi=n/d`, samples per feature,
``bag_size`` is :math:`k`. Bags weigh equally whatever their size. Logs are natural.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lossbook import _checks

LOSSES = ("squared", "bce_with_logits", "cross_entropy")

# ---------------------------------------------------------------------------------------------------------------------
# Bags
# ---------------------------------------------------------------------------------------------------------------------


def _count(bag: Tensor) -> int:
    """How many bags there are if every index has a member."""
    _checks.integer("bag", bag, 1)
    return max(int(bag.max()) + 1, 1) if len(bag) else 1


def _bag_sizes(bag: Tensor, rows: int, num_bags: int) -> Tensor:
    """Number of members of each bag, int64, after a check that every bag has one."""
    if _checks.integer("bag", bag, 1).shape[0] != rows:
        raise ValueError(f"bag must have shape ({rows},), one entry for each instance, got {tuple(bag.shape)}")
    if _checks.known_false((bag >= 0) & (bag < num_bags)):
        raise ValueError(f"bag must lie in [0, {num_bags}), got {bag.min()} to {bag.max()}")
    sizes = torch.zeros(num_bags, dtype=torch.int64, device=bag.device).index_add(0, bag, torch.ones_like(bag))
    if _checks.known_false(sizes > 0):
        raise ValueError(
            f"bag must have a member for every index below {num_bags}, got none for {(sizes == 0).nonzero()[0].item()}"
        )
    return sizes


def _columns(weight: Tensor, like: Tensor) -> Tensor:
    """One weight a row, shaped to multiply a ``(B,)`` or ``(B, C)`` tensor."""
    return weight if like.ndim == 1 else weight[:, None]


def _sum(values: Tensor, bag: Tensor, sizes: Tensor) -> Tensor:
    """Sum of the rows of each bag."""
    return values.new_zeros(len(sizes), *values.shape[1:]).index_add(0, bag, values)


def _mean(values: Tensor, bag: Tensor, sizes: Tensor) -> Tensor:
    """Mean of the rows of each bag."""
    return _sum(values, bag, sizes) / _columns(sizes, values)


def _log_mean_exp(values: Tensor, bag: Tensor, sizes: Tensor) -> Tensor:
    """``log(mean(exp(values)))`` over the rows of each bag, finite whenever the values are, which are at most 0."""
    if _checks.known_false(values.detach().amin() < math.log(torch.finfo(values.dtype).tiny) / 2):
        return _mean(values.exp(), bag, sizes).log()  # nothing underflows, and no peaks are needed
    index = _columns(bag, values).expand_as(values)
    floor = values.new_full((len(sizes), *values.shape[1:]), -torch.inf)
    peak = floor.scatter_reduce(0, index, values.detach(), "amax")  # a constant: what it adds, the logarithm takes away
    return peak + _mean((values - peak[bag]).exp(), bag, sizes).log()


def _one_or_two_dims(name: str, values: Tensor) -> Tensor:
    if _checks.floating(name, values).ndim not in (1, 2):
        raise ValueError(f"{name} must have shape (B,) or (B, C), got {tuple(values.shape)}")
    return values


def bag_mean(values: Tensor, bag: Tensor, num_bags: int | None = None) -> Tensor:
    r"""Mean of each bag's rows, :math:`\bar f_a=\frac1{k_a}\sum_{i\in B_a}f_i`; differentiable.

    Args:
        values: shape ``(B,)`` or ``(B, C)``, floating point.
        bag: the bag of each row, int64, shape ``(B,)``, every index from 0 to ``num_bags - 1`` at least once.
        num_bags: :math:`m`; None takes the largest index plus one.

    Returns:
        Shape ``(num_bags,)`` or ``(num_bags, C)``; float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape or index, or a bag without a member, naming the argument.

    Complexity: O(BC) time and memory.

    Source: Javanmard et al., section 1: the responses that are released.

    Example:
        >>> bag_mean(torch.tensor([0.0, 2.0, 1.0]), torch.tensor([0, 0, 1]))
        tensor([1., 1.])
    """
    _one_or_two_dims("values", values)
    num_bags = _count(bag) if num_bags is None else _checks.positive_int("num_bags", num_bags)
    sizes = _bag_sizes(bag, len(values), num_bags)
    return _mean(_checks.wide(values), bag, sizes)


# ---------------------------------------------------------------------------------------------------------------------
# The losses
# ---------------------------------------------------------------------------------------------------------------------


def _prepare(prediction: Tensor, bag_response: Tensor, bag: Tensor, loss: str) -> tuple[Tensor, Tensor, Tensor]:
    """Checked prediction and response in float32 or wider, and the sizes of the bags."""
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {LOSSES}, got {loss!r}")
    _one_or_two_dims("prediction", prediction)
    if loss != "squared":
        _checks.floating("prediction", prediction, 2 if loss == "cross_entropy" else 1)
    _checks.floating("bag_response", bag_response, prediction.ndim)
    if bag_response.shape[1:] != prediction.shape[1:]:
        raise ValueError(
            f"bag_response must have shape (bags, {prediction.shape[1]}), got {tuple(bag_response.shape)} for a prediction of {tuple(prediction.shape)}"
        )
    sizes = _bag_sizes(bag, len(prediction), len(bag_response))
    if loss == "cross_entropy":  # NaN and infinity show in the sum
        total = _checks.finite("bag_response", bag_response.sum(1))
        if _checks.known_false((bag_response.amin(1) >= 0) & ((total - 1).abs() <= 1e-3)):
            raise ValueError("bag_response must hold shares of classes: at least 0, each row adding up to 1")
    else:
        _checks.finite("bag_response", bag_response)
        if loss == "bce_with_logits" and _checks.known_false((bag_response >= 0) & (bag_response <= 1)):
            raise ValueError("bag_response must lie in [0, 1], a share of positives for each bag")
    prediction = _checks.wide(prediction)
    return prediction, bag_response.to(prediction.dtype), sizes


def _log_probabilities(logits: Tensor) -> Tensor:
    """Log-probability of each class, shape ``(B, C)``; of logits ``(B,)`` those of 0 and 1."""
    if logits.ndim == 1:
        return torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=1)
    return F.log_softmax(logits, dim=1)


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared distance of the rows."""
    each = F.mse_loss(x, y, reduction="none")
    return each if each.ndim == 1 else each.sum(1)


def _levels(prediction: Tensor, response: Tensor, bag: Tensor, sizes: Tensor, loss: str, rho: float) -> Tensor:
    """``(1 - rho)`` times the loss at bag level plus ``rho`` times that at instance level, shape ``(m,)``."""
    levels = []
    if loss == "squared":
        if rho != 1:
            levels.append((1 - rho) * _squared(_mean(prediction, bag, sizes), response))
        if rho != 0:
            levels.append(rho * _mean(_squared(prediction, response[bag]), bag, sizes))
        return sum(levels)
    log_p = _log_probabilities(prediction)
    share = torch.stack([1 - response, response], dim=1) if response.ndim == 1 else response
    if (held := _held(share, bag)) is None:
        return (share * _log_levels(log_p, bag, sizes, rho)).sum(1)
    of, column, instance, pair = held
    value = share[of, column] * _log_levels(log_p[instance, column[pair]], pair, sizes[of], rho)
    return value.new_zeros(len(sizes)).index_add(0, of, value)


def _held(share: Tensor, bag: Tensor) -> tuple[Tensor, ...] | None:
    """The pairs of a bag and a class that it has a share of, and for each instance which pairs are its bag's.

    A bag of few members has few classes: the others get no weight, and their probabilities are not needed one by one. None where most
    classes have a share, where a share has a gradient, and where values cannot be read.
    """
    if share.requires_grad:
        return None
    number = torch.count_nonzero(share, dim=1)[bag]  # of the pairs of each instance's bag
    if not _checks.known_false(4 * number.sum() > len(bag) * share.shape[1]):
        return None
    of, column = share.nonzero(as_tuple=True)
    instance = torch.arange(len(bag)).repeat_interleave(number)
    end = torch.bincount(of, minlength=len(share)).cumsum(0)[bag]  # where the list of its bag's pairs ends
    pair = torch.arange(len(instance)) + (end - number.cumsum(0))[instance]
    return of, column, instance, pair


def _log_levels(log_p: Tensor, group: Tensor, sizes: Tensor, rho: float) -> Tensor:
    """Minus ``(1 - rho)`` times the logarithm of the mean probability of each group, minus ``rho`` times the mean of the logarithms."""
    levels = []
    if rho != 1:
        levels.append((rho - 1) * _log_mean_exp(log_p, group, sizes))
    if rho != 0:
        levels.append(-rho * _mean(log_p, group, sizes))
    return sum(levels)


def bag_loss(
    prediction: Tensor, bag_response: Tensor, bag: Tensor, *, loss: str = "squared", reduction: str = "mean"
) -> Tensor:
    r"""The loss of each bag's mean prediction against its mean response, :math:`L_{\rm bag}` of eq-aggregate-losses.

    For the two losses on logits the mean prediction is the mean *probability*, taken in the log domain.

    Args:
        prediction: shape ``(B,)``, or ``(B, C)`` with loss "squared" (a squared norm) and "cross_entropy" (logits), floating point.
        bag_response: mean response of each bag, shape ``(m,)`` or ``(m, C)``; for the losses on logits the share of each class.
        bag: the bag of each row, int64, shape ``(B,)``; every bag of the batch is whole and has at least one member.
        loss: "squared", "bce_with_logits" or "cross_entropy".
        reduction: "none", "mean" or "sum" over bags.

    Returns:
        Shape ``()``, or ``(m,)`` with reduction "none"; float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape, index, share or name, naming the argument.

    Complexity: O(BC) time and memory.

    Source: Javanmard et al., section 1.

    Example:
        >>> f, bag = torch.tensor([0.0, 2.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
        >>> bag_loss(f, torch.tensor([1.0, 0.0]), bag)
        tensor(0.5000)
    """
    prediction, response, sizes = _prepare(prediction, bag_response, bag, loss)
    return _checks.reduced(_levels(prediction, response, bag, sizes, loss, 0), reduction)


def instance_loss(
    prediction: Tensor, bag_response: Tensor, bag: Tensor, *, loss: str = "squared", reduction: str = "mean"
) -> Tensor:
    r"""The mean loss of each prediction against the mean response of its bag, :math:`L_{\rm ins}` of eq-aggregate-losses.

    Args:
        prediction: as in :func:`bag_loss`.
        bag_response: as in :func:`bag_loss`.
        bag: as in :func:`bag_loss`.
        loss: "squared", "bce_with_logits" or "cross_entropy".
        reduction: "none", "mean" or "sum" over bags.

    Returns:
        Shape ``()``, or ``(m,)`` with reduction "none"; float32 or wider. Never below :func:`bag_loss`.

    Raises:
        TypeError, ValueError: for a wrong type, shape, index, share or name, naming the argument.

    Complexity: O(BC) time and memory.

    Source: Javanmard et al., section 1.

    Example:
        >>> f, bag = torch.tensor([0.0, 2.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
        >>> instance_loss(f, torch.tensor([1.0, 0.0]), bag)
        tensor(1.)
    """
    prediction, response, sizes = _prepare(prediction, bag_response, bag, loss)
    return _checks.reduced(_levels(prediction, response, bag, sizes, loss, 1), reduction)


def interpolated_loss(
    prediction: Tensor,
    bag_response: Tensor,
    bag: Tensor,
    *,
    rho: float,
    loss: str = "squared",
    reduction: str = "mean",
) -> Tensor:
    r"""Between bag and instance level, :math:`L_{\rm int}=(1-\rho)L_{\rm bag}+\rho L_{\rm ins}` (eq-aggregate-interpolation).

    With the squared loss this is :math:`L_{\rm bag}+\rho\mathcal R`, :math:`\mathcal R` being the :func:`spread` of the predictions.

    Args:
        prediction: as in :func:`bag_loss`.
        bag_response: as in :func:`bag_loss`.
        bag: as in :func:`bag_loss`.
        rho: at least 0; 0 is the bag level, 1 the instance level, and above 1 the spread costs more still.
        loss: "squared", "bce_with_logits" or "cross_entropy".
        reduction: "none", "mean" or "sum" over bags.

    Returns:
        Shape ``()``, or ``(m,)`` with reduction "none"; float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape, index, share, rho or name, naming the argument.

    Complexity: O(BC) time and memory.

    Source: Javanmard et al., section 2.

    Example:
        >>> f, bag = torch.tensor([0.0, 2.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
        >>> interpolated_loss(f, torch.tensor([1.0, 0.0]), bag, rho=0.5)
        tensor(0.7500)
    """
    prediction, response, sizes = _prepare(prediction, bag_response, bag, loss)
    rho = _checks.number("rho", rho, 0)
    return _checks.reduced(_levels(prediction, response, bag, sizes, loss, rho), reduction)


def spread(prediction: Tensor, bag: Tensor, num_bags: int | None = None) -> Tensor:
    r"""Variance of the predictions inside bags, :math:`\mathcal R=\frac1m\sum_a\frac1{k_a}\sum_{i\in B_a}\|f_i-\bar f_a\|^2` (eq-aggregate-spread).

    Args:
        prediction: shape ``(B,)`` or ``(B, C)``, floating point.
        bag: as in :func:`bag_mean`.
        num_bags: as in :func:`bag_mean`.

    Returns:
        Shape ``()``, at least 0; float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape or index, naming the argument.

    Complexity: O(BC) time and memory.

    Source: Javanmard et al., Lemma 1, with the scale put right.

    Example:
        >>> spread(torch.tensor([0.0, 2.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]))
        tensor(0.5000)
    """
    center = bag_mean(prediction, bag, num_bags)
    sizes = _bag_sizes(bag, len(prediction), len(center))
    return _levels(_checks.wide(prediction), center, bag, sizes, "squared", 1).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Linear regression
# ---------------------------------------------------------------------------------------------------------------------


def _linear_data(X: Tensor, bag: Tensor, response: Tensor | None = None) -> tuple[Tensor, ...]:
    """Checked features, bags, sizes and response, in float64."""
    X, bag = (torch.as_tensor(v) if isinstance(v, np.ndarray) else v for v in (X, bag))
    _checks.finite("X", _checks.floating("X", X, 2))
    _checks.integer("bag", bag, 1)
    if response is None:
        num_bags = _count(bag)
    else:
        response = torch.as_tensor(response) if isinstance(response, np.ndarray) else response
        response = _checks.finite("bag_response", _checks.floating("bag_response", response, 1)).double()
        num_bags = len(response)
    return X.double(), bag, _bag_sizes(bag, len(X), num_bags).double(), response


def _two_blocks(X: Tensor, bag: Tensor, sizes: Tensor, response: Tensor, intercept: bool) -> tuple[Tensor, ...]:
    r"""``L_bag`` and the spread of a linear model as triangular systems :math:`\|R_1\theta-t_1\|^2`, :math:`\|R_2\theta\|^2`, and the centers."""
    means, m = _mean(X, bag, sizes), len(sizes)
    within = (X - means[bag]) / (m * sizes[bag]).sqrt()[:, None]
    center = means.mean(0) if intercept else torch.zeros_like(X[0])
    offset = response.mean() if intercept else response.new_zeros(())
    between = torch.cat([means - center, (response - offset)[:, None]], dim=1) / math.sqrt(m)
    between = torch.linalg.qr(between, mode="r").R
    return between[:, :-1], between[:, -1], torch.linalg.qr(within, mode="r").R, center, offset


def _solve(blocks: tuple[Tensor, ...], rho: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Coefficients (R, d) of least norm and intercepts (R,), one for each of the R weights ``rho``."""
    R1, t1, R2, center, offset = blocks
    d, count = R1.shape[1], len(rho)
    rows = [R1.expand(count, -1, -1), rho.sqrt()[:, None, None] * R2]
    if ridge:
        rows.append((math.sqrt(ridge) * torch.eye(d, dtype=R1.dtype, device=R1.device)).expand(count, -1, -1))
    U, s, Vh = torch.linalg.svd(torch.cat(rows, dim=1), full_matrices=False)
    keep = s > s[:, :1] * max(U.shape[1:]) * torch.finfo(s.dtype).eps
    along = torch.einsum("rpq,p->rq", U[:, : len(t1)], t1)
    theta = torch.einsum("rq,rqd->rd", torch.where(keep, along / s.where(keep, 1), 0), Vh)
    return theta, offset - theta @ center


def least_squares_path(
    X: Tensor, bag_response: Tensor, bag: Tensor, rhos: Tensor, *, ridge: float = 0.0, fit_intercept: bool = True
) -> tuple[Tensor, Tensor]:
    r"""The minimizers of :math:`L_{\rm bag}+\rho\mathcal R+\texttt{ridge}\,\|\theta\|^2` for many weights, from one factorization of the data.

    Args:
        X: features, shape ``(n, d)``, floating point.
        bag_response: mean responses, shape ``(m,)``.
        bag: the bag of each row, int64, shape ``(n,)``.
        rhos: weights, each at least 0, shape ``(R,)``.
        ridge: as in :class:`InterpolatedLeastSquares`.
        fit_intercept: as in :class:`InterpolatedLeastSquares`.

    Returns:
        Coefficients ``(R, d)``, of least norm where they are not unique, and intercepts ``(R,)``, float64.

    Raises:
        TypeError, ValueError: for a wrong type, shape, value or index, naming the argument.

    Complexity: O(nd^2 + R d^3) time, O(nd + R d^2) memory.

    Source: Javanmard et al., section 3; all weights from one factorization are the chapter's.

    Example:
        >>> X, bag = torch.tensor([[0.0], [1.0], [2.0], [5.0]]), torch.tensor([0, 0, 1, 1])
        >>> least_squares_path(X, torch.tensor([1.0, 7.0]), bag, torch.tensor([0.0, 1.0]))[0].round(decimals=4)
        tensor([[2.0000],
                [1.2857]], dtype=torch.float64)
    """
    X, bag, sizes, response = _linear_data(X, bag, bag_response)
    ridge = _checks.number("ridge", ridge, 0)
    return _solve(_two_blocks(X, bag, sizes, response, fit_intercept), _weights(rhos).to(X.device), ridge)


def _weights(rhos: Tensor) -> Tensor:
    """Checked weights, float64, shape ``(R,)``."""
    rhos = _grid("rhos", rhos, 0)
    if rhos.ndim != 1 or not len(rhos):
        raise ValueError(f"rhos must have shape (R,) with R > 0, got {tuple(rhos.shape)}")
    return rhos


class InterpolatedLeastSquares:
    r"""Linear regression on bag means by the interpolated squared loss (eq-aggregate-normal-equations).

    Minimizes :math:`L_{\rm bag}(\theta)+\rho\mathcal R(\theta)+\texttt{ridge}\,\|\theta\|^2` in double precision. The intercept has no penalty. Where
    the minimizer is not unique, the one with the smallest :math:`\|\theta\|` is taken.

    Args:
        rho: at least 0; 0 is the bag level, 1 the instance level.
        ridge: weight of the squared norm of the coefficients, at least 0.
        fit_intercept: whether to fit an intercept.

    Attributes:
        coef_: float64, shape ``(d,)``.
        intercept_: float64, shape ``()``; 0 without an intercept.

    Raises:
        TypeError, ValueError: for a wrong number, naming the argument.

    Complexity: O(nd^2 + d^3) time, O(nd) memory.

    Source: Javanmard et al., section 3.

    Example:
        >>> X, bag = torch.tensor([[0.0], [1.0], [2.0], [5.0]]), torch.tensor([0, 0, 1, 1])
        >>> model = InterpolatedLeastSquares(rho=0.0).fit(X, torch.tensor([1.0, 7.0]), bag)
        >>> model.coef_.round(decimals=6), model.predict(X).round(decimals=6)
        (tensor([2.], dtype=torch.float64), tensor([ 0.,  2.,  4., 10.], dtype=torch.float64))
    """

    def __init__(self, rho: float = 0.5, ridge: float = 0.0, fit_intercept: bool = True):
        self.rho = _checks.number("rho", rho, 0)
        self.ridge = _checks.number("ridge", ridge, 0)
        self.fit_intercept = bool(fit_intercept)

    def fit(self, X: Tensor, bag_response: Tensor, bag: Tensor) -> "InterpolatedLeastSquares":
        """Fit to features ``(n, d)``, mean responses ``(m,)`` and bags ``(n,)``: tensors or NumPy arrays.

        Raises:
            TypeError, ValueError: for a wrong type, shape, value or index, naming the argument.
        """
        theta, intercept = least_squares_path(
            X,
            bag_response,
            bag,
            torch.tensor([self.rho], dtype=torch.float64),
            ridge=self.ridge,
            fit_intercept=self.fit_intercept,
        )
        self.coef_, self.intercept_ = theta[0], intercept[0]
        return self

    def predict(self, X: Tensor) -> Tensor:
        """Predictions of instances, float64, shape ``(n,)``, for features ``(n, d)``.

        Raises:
            RuntimeError: before :meth:`fit`.
            TypeError, ValueError: for a wrong type or shape, naming the argument.
        """
        if not hasattr(self, "coef_"):
            raise RuntimeError("the model is not fitted: call fit first")
        X = _checks.floating("X", torch.as_tensor(X) if isinstance(X, np.ndarray) else X, 2)
        if X.shape[1] != len(self.coef_):
            raise ValueError(f"X must have {len(self.coef_)} columns, as in fit, got {X.shape[1]}")
        return X.double() @ self.coef_ + self.intercept_


def conditional_risk(
    X: Tensor, bag: Tensor, rho: float, *, noise_variance: float, signal: float = 1.0
) -> tuple[Tensor, Tensor]:
    r"""Bias and variance of :class:`InterpolatedLeastSquares` for *these* features, without intercept (eq-aggregate-conditional).

    With :math:`A=X_1^\top X_1+\rho X_2^\top X_2` and :math:`W_1=X_1^\top X_1`: squared bias :math:`\frac{r^2}d\|A^{-1}W_1-I\|_F^2`, the mean over all
    directions of :math:`\theta_0`, and variance :math:`\sigma^2\mathrm{tr}(A^{-1}W_1A^{-1})`. Exact at any size; bags of equal size.

    Args:
        X: features, shape ``(n, d)``, floating point.
        bag: the bag of each row, int64, shape ``(n,)``, bags of equal size.
        rho: at least 0.
        noise_variance: :math:`\sigma^2` of one response, at least 0.
        signal: :math:`r^2=\|\theta_0\|^2`, at least 0.

    Returns:
        Squared bias and variance, the two parts of :math:`\mathbb E\|\hat\theta-\theta_0\|^2`, float64, shape ``()``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, unequal bags, or a singular :math:`A`, naming the argument.

    Complexity: O(nd^2 + d^3) time, O(nd) memory.

    Source: the chapter; Javanmard et al., section 3, has its limit.

    Example:
        >>> bias2, variance = conditional_risk(torch.eye(2), torch.tensor([0, 1]), 0.3, noise_variance=0.5)
        >>> round(bias2.item(), 6), round(variance.item(), 6)
        (0.0, 1.0)
    """
    X, bag, sizes, _ = _linear_data(X, bag)
    rho, noise_variance, signal = (
        _checks.number(name, value, 0)
        for name, value in (("rho", rho), ("noise_variance", noise_variance), ("signal", signal))
    )
    if not bool((sizes == sizes[0]).all()):
        raise ValueError(f"bag must have bags of equal size, got sizes from {sizes.min():g} to {sizes.max():g}")
    n, d = X.shape
    means = _mean(X, bag, sizes)
    W1 = sizes[0] * means.T @ means
    within = X - means[bag]
    A = W1 + rho * within.T @ within
    values = torch.linalg.eigvalsh(A)
    if values[0] <= d * torch.finfo(X.dtype).eps * values[-1]:
        raise ValueError(
            f"X must determine the estimator, got a singular system for {n} rows, {d} columns and rho = {rho:g}"
        )
    map_ = torch.linalg.solve(A, W1)  # of theta_0 to the mean estimate
    bias2 = signal / d * (map_ - torch.eye(d, dtype=X.dtype, device=X.device)).square().sum()
    return bias2, noise_variance * torch.linalg.solve(A, map_.T).diagonal().sum()


# ---------------------------------------------------------------------------------------------------------------------
# The asymptotic risk
# ---------------------------------------------------------------------------------------------------------------------


def _grid(name: str, value: float | Tensor, low: float, strict: bool = False) -> Tensor:
    """A number or a tensor of numbers as float64, if all are finite and at least (or above) ``low``."""
    if isinstance(value, np.ndarray):
        value = torch.as_tensor(value)
    if not isinstance(value, Tensor):
        value = torch.tensor(_checks.number(name, value), dtype=torch.float64)
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must hold numbers, got {value.dtype}")
    value = value.double()
    if _checks.known_false(torch.isfinite(value) & ((value > low) if strict else (value >= low))):
        raise ValueError(f"{name} must be finite and {'>' if strict else '>='} {low:g}, got {value.tolist()}")
    return value


def _grids(**given: tuple[float | Tensor, float] | tuple[float | Tensor, float, bool]) -> tuple[Tensor, ...]:
    """Arguments ``name=(value, low[, strict])`` after :func:`_grid`, broadcast; numbers go to the device of the tensors."""
    values = [_grid(name, *rest) for name, rest in given.items()]
    device = next((v.device for v in values if v.device.type != "cpu"), values[0].device)
    values = [v if v.ndim else v.to(device) for v in values]
    try:
        return torch.broadcast_tensors(*values)
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(v.shape)}" for name, v in zip(given, values, strict=True))
        raise ValueError(f"the arguments must have shapes that broadcast, got {shapes}") from None


def asymptotic_risk(
    psi: float | Tensor,
    bag_size: float | Tensor,
    rho: float | Tensor,
    *,
    noise_variance: float | Tensor,
    signal: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    r"""Limits of squared bias and variance as :math:`n,d\to\infty`, :math:`n/d\to\psi` (eq-aggregate-bias, eq-aggregate-variance).

    For random bags of equal size and Gaussian features with identity covariance. All arguments broadcast.

    Args:
        psi: :math:`\psi>1`, samples per feature.
        bag_size: :math:`k\ge1`.
        rho: :math:`\rho\ge0`; above 0 where there are no more bags than features, :math:`\psi\le k`.
        noise_variance: :math:`\sigma^2\ge0` of one response.
        signal: :math:`r^2=\|\theta_0\|^2\ge0`.

    Returns:
        Squared bias and variance, float64, of the broadcast shape; their sum is the limit of :math:`\|\hat\theta-\theta_0\|^2`.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Complexity: O(1) for each entry.

    Source: Javanmard et al., section 3, which gives fixed-point equations; the closed form is the chapter's.

    Example:
        >>> bias2, variance = asymptotic_risk(4, 2, 0.5, noise_variance=1.0)
        >>> round((bias2 + variance).item(), 5)
        0.48155
    """
    psi, k, rho, noise_variance, signal = _grids(
        psi=(psi, 1, True), bag_size=(bag_size, 1), rho=(rho, 0), noise_variance=(noise_variance, 0), signal=(signal, 0)
    )
    if _checks.known_false((rho > 0) | (psi > k)):
        raise ValueError(
            "rho must be > 0 where psi <= bag_size: there the bag level alone does not determine the estimator"
        )
    a, b = psi / k, psi - psi / k
    linear, square = a + b * rho - 1 - rho, rho * (psi - 1)
    # The positive root of square g^2 + linear g = 1, in the form without cancellation.
    root = (linear.square() + 4 * square).sqrt() + linear.abs()
    g = torch.where(linear >= 0, 2 / root, root / (2 * square).where(square > 0, 1))
    slope = a / (1 + g).square() + b * rho / (1 + rho * g).square()
    variance = a * g / ((1 + g).square() * slope)
    leak = b * g / ((1 + rho * g).square() * slope)
    alpha, rest = a * g / (1 + g), b * rho * g / (1 + rho * g)  # they add up to 1
    bias2 = rest.square() * (1 + variance) + (alpha * rho).square() * leak
    return signal * bias2, noise_variance * variance


def best_rho(
    psi: float | Tensor,
    bag_size: float | Tensor,
    *,
    noise_variance: float | Tensor,
    signal: float | Tensor = 1.0,
    upper: float = 10.0,
) -> Tensor:
    r"""The weight with the smallest asymptotic risk, :math:`\rho^\star\in[10^{-6},\texttt{upper}]`; all arguments but ``upper`` broadcast.

    Grids in the logarithm, each inside the best cells of the one before, down to a relative error of 1e-5. A result at an end of the range says that the
    minimum lies there or beyond.

    Args:
        psi: :math:`\psi>1`, samples per feature.
        bag_size: :math:`k\ge1`.
        noise_variance: :math:`\sigma^2\ge0` of one response.
        signal: :math:`r^2\ge0`.
        upper: largest weight allowed, above 1e-6; 1 stays between bag and instance level.

    Returns:
        Float64, of the broadcast shape; 0 for bags of one, where the risk does not depend on the weight.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Source: Javanmard et al., section 3.

    Example:
        >>> round(best_rho(5, 2, noise_variance=1.0).item(), 2)
        0.4
    """
    upper = _checks.number("upper", upper, 1e-6)
    psi, k, noise_variance, signal = _grids(
        psi=(psi, 1, True), bag_size=(bag_size, 1), noise_variance=(noise_variance, 0), signal=(signal, 0)
    )

    def risk(log_rho: Tensor) -> Tensor:
        return torch.stack(asymptotic_risk(psi, k, log_rho.exp(), noise_variance=noise_variance, signal=signal)).sum(0)

    low, high = torch.full_like(psi, math.log(1e-6)), torch.full_like(psi, math.log(upper))
    for count in (121, 41, 41, 41, 41):  # each grid lies between the neighbors of the best point of the one before
        share = torch.linspace(0, 1, count, dtype=psi.dtype, device=psi.device).reshape(-1, *[1] * psi.ndim)
        points = low + share * (high - low)
        best = risk(points).argmin(0, keepdim=True)
        low, high = (points.gather(0, (best + step).clamp(0, count - 1))[0] for step in (-1, 1))
    best = points.gather(0, best)[0]
    return torch.where(k == 1, 0.0, best.exp())


def ridge_risk(
    psi: float | Tensor, bag_size: float | Tensor, *, noise_variance: float | Tensor, signal: float | Tensor = 1.0
) -> Tensor:
    r"""Limit of the risk of the bag-level fit with the best ridge, the yardstick for every other penalty (eq-aggregate-ridge).

    The positive root :math:`u` of :math:`\frac{au}{\sigma^2+u}+\frac u{r^2}=1`, :math:`a=\psi/k`. No estimator that is linear in the bag means does better on
    average over the directions of :math:`\theta_0`. Without noise, or without signal, the limit of that root.

    Args:
        psi: :math:`\psi>0`, samples per feature.
        bag_size: :math:`k\ge1`.
        noise_variance: :math:`\sigma^2\ge0` of one response.
        signal: :math:`r^2\ge0`.

    Returns:
        Float64, of the broadcast shape.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Complexity: O(1) for each entry.

    Source: the chapter; Hastie et al. 2022 for ridge regression.

    Example:
        >>> round(ridge_risk(5, 2, noise_variance=1.0).item(), 4)
        0.3508
    """
    psi, k, noise_variance, signal = _grids(
        psi=(psi, 0, True), bag_size=(bag_size, 1), noise_variance=(noise_variance, 0), signal=(signal, 0)
    )
    # u^2 + linear u = constant
    linear, constant = (psi / k - 1) * signal + noise_variance, signal * noise_variance
    root = (linear.square() + 4 * constant).sqrt() + linear.abs()
    return torch.where(linear > 0, 2 * constant / root.where(root > 0, 1), root / 2)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing the weight from aggregate data
# ---------------------------------------------------------------------------------------------------------------------


def noise_and_signal(
    X: Tensor, bag_response: Tensor, bag: Tensor, *, fit_intercept: bool = False
) -> tuple[float, float]:
    r"""Estimates of :math:`\sigma^2` and :math:`r^2` from the bag-level fit, both unbiased given the features (eq-aggregate-plug-in).

    Args:
        X: features, shape ``(n, d)``, with more bags than parameters.
        bag_response: mean responses, shape ``(m,)``.
        bag: the bag of each row, int64, shape ``(n,)``. A bag of :math:`k_a` weighs :math:`k_a`, the inverse variance of its mean.
        fit_intercept: whether the model has an intercept, one parameter more.

    Returns:
        :math:`\hat\sigma^2\ge0` and :math:`\hat r^2`, which may come out negative.

    Raises:
        TypeError, ValueError: for a wrong type, shape, value or index, or too few bags, naming the argument.

    Complexity: O(nd + md^2 + d^3) time, O(nd) memory.

    Source: own estimates (chapter, eq-aggregate-plug-in).

    Example:
        >>> X = torch.tensor([[1.0], [-1.0], [2.0]])
        >>> noise, signal = noise_and_signal(X, torch.tensor([2.0, -2.0, 4.0]), torch.tensor([0, 1, 2]))
        >>> round(noise, 6), round(signal, 6)
        (0.0, 4.0)
    """
    X, bag, sizes, response = _linear_data(X, bag, bag_response)
    m, d = len(sizes), X.shape[1]
    if m <= d + fit_intercept:
        raise ValueError(f"bag_response must have more bags than parameters, {d + fit_intercept}, got {m}")
    means = _mean(X, bag, sizes)
    if fit_intercept:
        share = sizes / sizes.sum()
        means, response = means - share @ means, response - share @ response
    rows, target = sizes.sqrt()[:, None] * means, sizes.sqrt() * response
    Q, R = torch.linalg.qr(rows)
    if R.diagonal().abs().min() <= m * torch.finfo(R.dtype).eps * R.diagonal().abs().max():
        raise ValueError("X must have bag means of full column rank")
    theta = torch.linalg.solve_triangular(R, (Q.T @ target)[:, None], upper=True)[:, 0]
    noise = (target - rows @ theta).square().sum() / (m - d - fit_intercept)
    inverse = torch.linalg.solve_triangular(R, torch.eye(d, dtype=R.dtype, device=R.device), upper=True)
    return noise.item(), (theta.square().sum() - noise * inverse.square().sum()).item()


def plug_in_rho(
    X: Tensor, bag_response: Tensor, bag: Tensor, *, fit_intercept: bool = False, upper: float = 10.0
) -> float:
    r""":func:`best_rho` at the estimates of :func:`noise_and_signal`, the signal at least a thousandth of the noise.

    It believes that the features have identity covariance and that bags are random and of one size, :math:`n/m`.

    Args:
        X: features, shape ``(n, d)``, with more bags than parameters.
        bag_response: mean responses, shape ``(m,)``.
        bag: the bag of each row, int64, shape ``(n,)``.
        fit_intercept: whether the model has an intercept.
        upper: as in :func:`best_rho`.

    Returns:
        The weight.

    Raises:
        TypeError, ValueError: for a wrong type, shape, value or index, or too few bags, naming the argument.

    Source: own (chapter); Javanmard et al., section 3, for the weight that it estimates.
    """
    noise, signal = noise_and_signal(X, bag_response, bag, fit_intercept=fit_intercept)
    psi, bag_size = len(X) / X.shape[1], len(X) / len(bag_response)
    return best_rho(psi, bag_size, noise_variance=noise, signal=max(signal, 1e-3 * noise), upper=upper).item()


def bag_validation_errors(
    X: Tensor,
    bag_response: Tensor,
    bag: Tensor,
    rhos: Tensor,
    *,
    folds: int = 5,
    ridge: float = 0.0,
    fit_intercept: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Cross-validated bag-level error of :class:`InterpolatedLeastSquares` for each weight; no bag is cut.

    The held-out error estimates :math:`\frac1k(\|\hat\theta-\theta_0\|^2+\sigma^2)` for identity covariance (eq-aggregate-validation), so that its
    minimizer is an estimate of the best weight.

    Args:
        X: features, shape ``(n, d)``.
        bag_response: mean responses, shape ``(m,)``.
        bag: the bag of each row, int64, shape ``(n,)``.
        rhos: weights, each at least 0, shape ``(R,)``.
        folds: number of folds, from 2 to :math:`m`.
        ridge: as in :class:`InterpolatedLeastSquares`.
        fit_intercept: as in :class:`InterpolatedLeastSquares`.
        generator: draws the folds, on the CPU; None takes torch's own.

    Returns:
        Mean squared error over held-out bags, float64, shape ``(R,)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape, value or index, naming the argument.

    Complexity: O(folds (nd^2 + R d^3)) time, O(nd + R d^2) memory.

    Source: own (chapter, eq-aggregate-validation).
    """
    X, bag, sizes, response = _linear_data(X, bag, bag_response)
    rhos = _weights(rhos).to(X.device)
    m, ridge = len(sizes), _checks.number("ridge", ridge, 0)
    if _checks.positive_int("folds", folds, minimum=2) > m:
        raise ValueError(f"folds must be at most the number of bags, {m}, got {folds}")
    fold = (torch.randperm(m, generator=generator) % folds).to(X.device)
    means = _mean(X, bag, sizes)
    errors = X.new_zeros(len(rhos))
    for held_out in range(folds):
        train = fold != held_out
        rows = train[bag]
        renumber = train.cumsum(0) - 1
        blocks = _two_blocks(X[rows], renumber[bag[rows]], sizes[train], response[train], fit_intercept)
        theta, intercept = _solve(blocks, rhos, ridge)
        residual = response[~train, None] - (means[~train] @ theta.T + intercept)
        errors += residual.square().sum(0)
    return errors / m


# ---------------------------------------------------------------------------------------------------------------------
# Label differential privacy
# ---------------------------------------------------------------------------------------------------------------------


def laplace_scale(bag_size: float | Tensor, clip: float, epsilon: float) -> Tensor:
    r"""Scale of the Laplace noise on a bag mean, sensitivity over privacy: :math:`\frac{2C}{k\varepsilon}` (eq-aggregate-laplace).

    Responses lie in :math:`[-C,C]` after clipping, so replacing one moves the mean of its bag by at most :math:`2C/k`, and no other mean.

    Args:
        bag_size: :math:`k\ge1`, a number or a tensor of sizes.
        clip: :math:`C>0`, in the unit of the response.
        epsilon: :math:`\varepsilon>0`, the privacy loss allowed to one release.

    Returns:
        Float64, of the shape of ``bag_size``, in the unit of the response.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Source: Dwork et al. 2006; Javanmard et al., section 4.

    Example:
        >>> laplace_scale(4, clip=2.0, epsilon=0.5)
        tensor(2., dtype=torch.float64)
    """
    k = _grid("bag_size", bag_size, 1)
    return 2 * _checks.positive_number("clip", clip) / (k * _checks.positive_number("epsilon", epsilon))


def private_bag_response(
    response: Tensor, bag: Tensor, *, clip: float, epsilon: float, generator: torch.Generator | None = None
) -> Tensor:
    r"""Bag means of clipped responses with Laplace noise: :math:`\varepsilon`-label differentially private (eq-aggregate-mechanism).

    *Sensitivity*: replacing one response moves one mean by at most :math:`2C/k_a`. *Composition*: bags of one release are disjoint, so the whole vector
    costs :math:`\varepsilon` and not :math:`m\varepsilon`; several releases of the same responses cost the sum of their :math:`\varepsilon`. Whatever is computed from the
    result and the features costs nothing more. Features, bags and their sizes count as public, and ``clip`` must not be chosen by looking at
    the responses. The noise is ordinary floating point, which is no protection against an attack on its last bits.

    Args:
        response: one response for each instance, shape ``(n,)``, floating point.
        bag: the bag of each response, int64, shape ``(n,)``.
        clip: :math:`C>0`.
        epsilon: :math:`\varepsilon>0`.
        generator: on the device of the responses.

    Returns:
        Noisy means, shape ``(m,)``; float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape, value or index, naming the argument.

    Complexity: O(n) time and memory.

    Source: Javanmard et al., section 4.

    Example:
        >>> y, bag = torch.tensor([3.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
        >>> private_bag_response(y, bag, clip=2.0, epsilon=1e9).round(decimals=4)  # 3 is clipped to 2
        tensor([1., 1.])
    """
    _checks.finite("response", _checks.floating("response", response, 1))
    clip, epsilon = _checks.positive_number("clip", clip), _checks.positive_number("epsilon", epsilon)
    means = bag_mean(response.clamp(-clip, clip), bag)
    scale = laplace_scale(_bag_sizes(bag, len(response), len(means)), clip, epsilon)
    first, second = torch.empty(2, *means.shape, dtype=torch.float64, device=means.device).exponential_(
        generator=generator
    )
    return means + (scale * (first - second)).to(means.dtype)  # a difference of exponentials has Laplace's law


def privacy_loss(response: Tensor, neighbor: Tensor, bag: Tensor, *, clip: float, epsilon: float) -> Tensor:
    r"""The most that a release of :func:`private_bag_response` can tell two vectors of responses apart (eq-aggregate-privacy-loss).

    The supremum of the log ratio of the two densities, :math:`\sum_a|\bar y_a-\bar y'_a|\,k_a\varepsilon/(2C)`. At most :math:`\varepsilon` where one response differs, and
    :math:`j\varepsilon` where :math:`j` do.

    Args:
        response: shape ``(n,)``, floating point.
        neighbor: the other responses, shape ``(n,)``.
        bag: the bag of each response, int64, shape ``(n,)``.
        clip: :math:`C>0`.
        epsilon: :math:`\varepsilon>0`.

    Returns:
        Shape ``()``, at least 0; float64.

    Raises:
        TypeError, ValueError: for a wrong type, shape, value or index, naming the argument.

    Source: Dwork et al. 2006, applied to the means of bags in the chapter.

    Example:
        >>> y = torch.tensor([2.0, 0.0, 1.0, 1.0])
        >>> privacy_loss(y, torch.tensor([-2.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]), clip=2.0, epsilon=0.5)
        tensor(0.5000, dtype=torch.float64)
    """
    _checks.finite("response", _checks.floating("response", response, 1))
    _checks.finite("neighbor", _checks.like("neighbor", neighbor, "response", response, 1))
    clip, epsilon = _checks.positive_number("clip", clip), _checks.positive_number("epsilon", epsilon)
    one, other = (bag_mean(y.double().clamp(-clip, clip), bag) for y in (response, neighbor))
    sizes = _bag_sizes(bag, len(response), len(one))
    return ((one - other).abs() / laplace_scale(sizes, clip, epsilon)).sum()


def private_noise_variance(
    noise_variance: float | Tensor, bag_size: float | Tensor, clip: float, epsilon: float
) -> Tensor:
    r"""Noise variance of one response that private bag means behave like: :math:`\sigma^2+\frac{8C^2}{k\varepsilon^2}` (eq-aggregate-private-variance).

    Exact where nothing is clipped, for the coefficients of centered features. An intercept gets the privacy noise
    :math:`\frac{8C^2}{nk\varepsilon^2}`, which falls in :math:`k` (eq-aggregate-grand-mean). Goes into :func:`asymptotic_risk` as its ``noise_variance``.

    Args:
        noise_variance: :math:`\sigma^2\ge0` of one response.
        bag_size: :math:`k\ge1`.
        clip: :math:`C>0`.
        epsilon: :math:`\varepsilon>0`.

    Returns:
        Float64, of the broadcast shape.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Source: Javanmard et al., section 4.

    Example:
        >>> private_noise_variance(0.25, 2, clip=2.0, epsilon=4.0)
        tensor(1.2500, dtype=torch.float64)
    """
    noise_variance, k = _grids(noise_variance=(noise_variance, 0), bag_size=(bag_size, 1))
    # k times the variance 2 scale^2 of the noise on a mean
    return noise_variance + 2 * k * laplace_scale(k, clip, epsilon).square()


class BestBagSize(NamedTuple):
    """What :func:`best_bag_size` found.

    Args:
        bag_size: the size with the least risk.
        rho: the best weight at this size.
        risk: the risk there.
        risks: the risk of every candidate at its own best weight, in their order.

    Source: Javanmard et al., section 4.
    """

    bag_size: int
    rho: float
    risk: float
    risks: Tensor


def best_bag_size(
    psi: float,
    bag_sizes: range | list[int],
    *,
    noise_variance: float,
    clip: float,
    epsilon: float,
    signal: float = 1.0,
    upper: float = 10.0,
) -> BestBagSize:
    r"""The bag size with the smallest asymptotic risk under label privacy, each size at its own best weight (eq-aggregate-best-size).

    Args:
        psi: :math:`\psi>1`, samples per feature.
        bag_sizes: candidates, integers of at least 1.
        noise_variance: :math:`\sigma^2\ge0` of one response, before the privacy noise.
        clip: :math:`C>0`.
        epsilon: :math:`\varepsilon>0`.
        signal: :math:`r^2\ge0`.
        upper: largest weight allowed; 1 stays between bag and instance level.

    Returns:
        ``bag_size``, ``rho`` and ``risk`` at the best, and ``risks``, float64, one for each candidate.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Source: Javanmard et al., section 4.

    Example:
        >>> best_bag_size(10, range(1, 6), noise_variance=0.25, clip=2.0, epsilon=3.0, upper=1.0).bag_size
        2
    """
    if not isinstance(bag_sizes, Iterable):
        raise TypeError(f"bag_sizes must be a range or a list of integers, got {type(bag_sizes).__name__}")
    sizes = [_checks.positive_int("bag_sizes", k) for k in bag_sizes]
    if not sizes:
        raise ValueError("bag_sizes must have at least one candidate")
    psi, noise_variance, signal = (  # one setting: a tensor would be paired with the sizes
        _checks.number(name, value)
        for name, value in (("psi", psi), ("noise_variance", noise_variance), ("signal", signal))
    )
    k = torch.tensor(sizes, dtype=torch.float64)
    noise = private_noise_variance(noise_variance, k, clip, epsilon)
    rho = best_rho(psi, k, noise_variance=noise, signal=signal, upper=upper)
    risks = torch.stack(asymptotic_risk(psi, k, rho, noise_variance=noise, signal=signal)).sum(0)
    best = int(risks.argmin())
    return BestBagSize(sizes[best], rho[best].item(), risks[best].item(), risks)
