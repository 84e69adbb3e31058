r"""Surrogates in the space of targets: one call of an expensive gradient, many cheap steps of the model.

The method of *Target-based Surrogates for Stochastic Optimization* (Lavington, Vaswani, Babanezhad, Schmidt and Le Roux, ICML 2023,
arXiv 2302.02607): a quadratic upper bound of the loss in the model's outputs, minimized over the parameters by an inner optimizer; its limits for
linear models; and the line search that it is compared with. Equation labels are those of the chapter ``optimization/target_surrogates``.

Notation: ``outputs`` (n, ...) holds the targets :math:`z_i=f_i(\theta)`, one row for each sample, ``eta`` is the step :math:`\eta` in their space,
``inner_lr`` is :math:`\alpha`, ``inner_steps`` is :math:`m`. A *sample's gradient* is :math:`\nabla\ell_i(z_i)`, never divided by :math:`n`.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lossbook import _checks

# ---------------------------------------------------------------------------------------------------------------------
# Losses of outputs, their smoothness, and the oracle
# ---------------------------------------------------------------------------------------------------------------------

TARGET_SMOOTHNESS = {"squared": 1.0, "logistic": 0.25, "cross_entropy": 0.5}
"""The constant :math:`L` of eq-target_surrogates-smooth for :func:`squared_losses`, :func:`logistic_losses` and :func:`cross_entropy_losses`."""


def _rows(values: Tensor) -> Tensor:
    """The sum over all but the first dimension."""
    return values if values.ndim == 1 else values.flatten(1).sum(1)


def _outputs(name: str, value: Tensor, ndim: int | None = None) -> Tensor:
    """Check outputs: floating point, a row for each sample; give them back in float32 or wider."""
    _checks.floating(name, value, ndim)
    if value.ndim == 0:
        raise ValueError(f"{name} must have a row for each sample, got shape ()")
    return _checks.wide(value)


def squared_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    r""":math:`\frac12\|z_i-y_i\|^2` for each sample; :math:`L=1`.

    Args:
        outputs: shape ``(n, ...)``, floating point.
        targets: in the shape of ``outputs``.

    Returns:
        Shape ``(n,)``, float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type or shape, naming the argument.

    Complexity: O(np) time and memory for p outputs a sample.

    Source: Lavington et al. 2023, the squared loss.

    Example:
        >>> squared_losses(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
        tensor([2.5000])
    """
    outputs = _outputs("outputs", outputs)
    _checks.floating("targets", targets)
    if targets.shape != outputs.shape:
        raise ValueError(f"targets must have the shape of outputs, {tuple(outputs.shape)}, got {tuple(targets.shape)}")
    return _rows((outputs - targets).square()) / 2


def logistic_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    r""":math:`\log(1+e^{z_i})-y_iz_i` for each sample; :math:`L=\frac14`.

    Args:
        outputs: logits, shape ``(n,)``, floating point.
        targets: shape ``(n,)``, floating point; 0 or 1, or probabilities between.

    Returns:
        Shape ``(n,)``, float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(n) time and memory.

    Source: Lavington et al. 2023, the logistic loss.

    Example:
        >>> logistic_losses(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
        tensor([0.6931, 1.3133])
    """
    outputs = _outputs("outputs", outputs, 1)
    _checks.floating("targets", targets)
    if targets.shape != outputs.shape:
        raise ValueError(f"targets must have the shape of outputs, {tuple(outputs.shape)}, got {tuple(targets.shape)}")
    if _checks.known_false((targets >= 0) & (targets <= 1)):
        raise ValueError(f"targets must lie in [0, 1], got {targets.min()} to {targets.max()}")
    return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none")


def cross_entropy_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    r""":math:`\log\sum_ke^{z_{ik}}-z_{iy_i}` for each sample; :math:`L=\frac12`.

    Args:
        outputs: logits, shape ``(n, classes)``, floating point.
        targets: shape ``(n,)``, int64 in [0, classes).

    Returns:
        Shape ``(n,)``, float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(n classes) time and memory.

    Source: Lavington et al. 2023, the multiclass loss; the constant is derived in the chapter.

    Example:
        >>> cross_entropy_losses(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])
    """
    outputs = _outputs("outputs", outputs, 2)
    _checks.indices("targets", targets, outputs.shape[1], rows=len(outputs))
    return F.cross_entropy(outputs, targets, reduction="none", ignore_index=_checks.NO_CLASS)


def _oracle(loss: Callable[[Tensor], Tensor], outputs: Tensor) -> tuple[Tensor, Tensor]:
    """One call of the oracle: losses (n,) and the samples' gradients, both without a graph."""
    with torch.enable_grad():
        leaf = _outputs("outputs", outputs).detach().clone().requires_grad_()
        losses = loss(leaf)
        if not isinstance(losses, Tensor) or losses.shape != leaf.shape[:1]:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"the loss must return one value for each sample, shape ({len(leaf)},), got {got}")
        if not losses.requires_grad:
            raise ValueError("the loss must be a differentiable function of the outputs, got one without a graph")
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), grad


def target_gradient(loss_fn: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor) -> Tensor:
    r"""The samples' gradients :math:`\nabla\ell_i(z_i)`: what one call of the oracle returns.

    It is the gradient of the *sum* of the losses, so that no row is divided by n. It carries no graph, and leaves ``outputs`` as they are.

    Args:
        loss_fn: from outputs and targets to one loss for each sample, shape ``(n,)``.
        outputs: shape ``(n, ...)``, floating point.
        targets: whatever ``loss_fn`` takes.

    Returns:
        In the shape of ``outputs``, float32 or wider, detached.

    Raises:
        TypeError, ValueError: for outputs that are no floating-point rows, or losses that are not one differentiable value for each row.

    Complexity: that of the loss and its gradient.

    Source: Lavington et al. 2023, the gradient oracle.

    Example:
        >>> target_gradient(logistic_losses, torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
        tensor([-0.5000,  0.7311])
    """
    return _oracle(lambda z: loss_fn(z, targets), outputs)[1]


# ---------------------------------------------------------------------------------------------------------------------
# Surrogates
# ---------------------------------------------------------------------------------------------------------------------


def _anchored(name: str, value: Tensor, other_name: str, other: Tensor) -> Tensor:
    """An anchor tensor: detached, in the shape and the (wide) dtype of the outputs."""
    _checks.floating(name, value)
    if value.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {tuple(other.shape)}, got {tuple(value.shape)}")
    return value.detach().to(other.dtype)


def target_surrogate(
    outputs: Tensor,
    anchor_outputs: Tensor,
    anchor_grad: Tensor,
    *,
    eta: float,
    anchor_loss: float | Tensor = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""The surrogate :math:`\ell_i(z_{t,i})+\langle\nabla\ell_i(z_{t,i}),z_i-z_{t,i}\rangle+\frac1{2\eta}\|z_i-z_{t,i}\|^2` (eq-target_surrogates-surrogate).

    It is an upper bound of the loss wherever the model goes if :math:`\eta\le1/L` (eq-target_surrogates-majorize), with equality at the anchor, where the
    gradients are equal, too. Anchor, gradient and loss at the anchor are constants: no gradient flows into them.

    Args:
        outputs: :math:`z`, shape ``(n, ...)``, floating point; differentiable.
        anchor_outputs: :math:`z_t`, in the shape of ``outputs``.
        anchor_grad: the samples' gradients at the anchor, in the shape of ``outputs``, not divided by n; see :func:`target_gradient`.
        eta: :math:`\eta>0`.
        anchor_loss: the losses at the anchor, a number, or a tensor of shape ``()`` or ``(n,)``; it shifts the value only.
        reduction: "none", "mean" or "sum" over the samples.

    Returns:
        Shape ``()``, or ``(n,)`` with reduction "none"; float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape, value or reduction, naming the argument.

    Complexity: O(np) time and memory for p outputs a sample.

    Source: Lavington et al. 2023, the target surrogate.

    Example:
        >>> z, y = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
        >>> grad = target_gradient(logistic_losses, z, y)
        >>> target_surrogate(torch.ones(2), z, grad, eta=4.0, anchor_loss=logistic_losses(z, y))
        tensor(0.8157)
    """
    eta = _checks.positive_number("eta", eta)
    outputs = _outputs("outputs", outputs)
    move = outputs - _anchored("anchor_outputs", anchor_outputs, "outputs", outputs)
    grad = _anchored("anchor_grad", anchor_grad, "outputs", outputs)
    if isinstance(anchor_loss, Tensor):
        if anchor_loss.shape not in ((), outputs.shape[:1]):
            wanted = f"() or ({len(outputs)},)"
            raise ValueError(f"anchor_loss must have shape {wanted}, got {tuple(anchor_loss.shape)}")
        anchor_loss = _checks.floating("anchor_loss", anchor_loss).detach()
    else:
        anchor_loss = _checks.number("anchor_loss", anchor_loss)
    return _checks.reduced(anchor_loss + _rows((grad + move / (2 * eta)) * move), reduction)


def mirror_surrogate(
    log_probs: Tensor, anchor_log_probs: Tensor, anchor_grad: Tensor, *, eta: float, reduction: str = "mean"
) -> Tensor:
    r"""The surrogate with a Kullback-Leibler divergence, :math:`\langle\nabla\ell_i(p_{t,i}),p_i-p_{t,i}\rangle+\frac1\eta\mathrm{KL}(p_i\,\|\,p_{t,i})`
    (eq-target_surrogates-mirror).

    For targets that are probabilities, as a policy's. Over all probabilities its minimizer is :math:`p_{ik}\propto p_{t,ik}e^{-\eta\nabla_k\ell_i}`.
    Log-probabilities keep it finite where the probabilities themselves underflow.

    Args:
        log_probs: :math:`\log p`, shape ``(n, classes)``, floating point, each row normalized; differentiable.
        anchor_log_probs: :math:`\log p_t`, in the same shape.
        anchor_grad: the samples' gradients with respect to the *probabilities* :math:`p`, in the same shape, not divided by n.
        eta: :math:`\eta>0`.
        reduction: "none", "mean" or "sum" over the samples.

    Returns:
        Shape ``()``, or ``(n,)`` with reduction "none"; float32 or wider. Infinite where ``p > 0`` and the anchor's probability is 0.

    Raises:
        TypeError, ValueError: for a wrong type, shape, value or reduction, naming the argument.

    Complexity: O(n classes) time and memory.

    Source: Lavington et al. 2023, the mirror variant.

    Example:
        >>> anchor = torch.tensor([[0.5, 0.5]]).log()
        >>> mirror_surrogate(torch.tensor([[0.25, 0.75]]).log(), anchor, torch.tensor([[1.0, -1.0]]), eta=1.0)
        tensor(-0.3692)
    """
    eta = _checks.positive_number("eta", eta)
    log_probs = _outputs("log_probs", log_probs, 2)
    anchor = _anchored("anchor_log_probs", anchor_log_probs, "log_probs", log_probs)
    grad = _anchored("anchor_grad", anchor_grad, "log_probs", log_probs)
    probs = log_probs.exp()
    # 0 log 0 is 0, also where both logs are infinite; masks on both sides keep a NaN out of the gradient, too.
    ratio = log_probs.masked_fill(probs == 0, 0) - anchor.masked_fill(probs == 0, 0)
    return _checks.reduced((grad * (probs - anchor.exp()) + probs * ratio / eta).sum(1), reduction)


SCHEDULES = ("constant", "sqrt", "exponential", "line_search")


def target_step_size(eta: float, step: int, schedule: str = "constant", *, total_steps: int | None = None) -> float:
    r"""The step :math:`\eta_t` in target space (eq-target_surrogates-schedules).

    :math:`\eta`, :math:`\eta/\sqrt t` or :math:`\eta\,T^{-t/T}` at :math:`t` = ``step``, which counts from 1; :math:`T` = ``total_steps``.

    Args:
        eta: :math:`\eta>0`.
        step: at least 1.
        schedule: "constant", "sqrt" or "exponential"; "line_search" gives ``eta``, where :func:`target_line_search` starts.
        total_steps: at least 1; needed by "exponential" only.

    Returns:
        A number > 0.

    Raises:
        TypeError, ValueError: for numbers outside of these ranges, another schedule, or an exponential one without ``total_steps``.

    Source: Lavington et al. 2023, the step sizes of SSO.

    Example:
        >>> [round(target_step_size(1.0, t, "exponential", total_steps=4), 3) for t in (1, 2, 3, 4)]
        [0.707, 0.5, 0.354, 0.25]
    """
    eta, step = _checks.positive_number("eta", eta), _checks.positive_int("step", step)
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    if total_steps is not None:
        _checks.positive_int("total_steps", total_steps)
    if schedule == "exponential":
        if total_steps is None:
            raise ValueError("total_steps must be given for schedule 'exponential', got None")
        return eta * total_steps ** (-step / total_steps)
    return eta / step**0.5 if schedule == "sqrt" else eta


def target_line_search(
    loss: Callable[[Tensor], Tensor],
    outputs: Tensor,
    grad: Tensor,
    *,
    eta: float,
    c: float = 0.5,
    shrink: float = 0.9,
    max_trials: int = 100,
) -> tuple[float, int]:
    r"""The first of :math:`\eta,0.9\eta,0.81\eta,\dots` with :math:`\ell(z-\eta\nabla\ell)\le\ell(z)-c\,\eta\|\nabla\ell\|^2` (eq-target_surrogates-line-search).

    :math:`\ell` is the *sum* over samples, which the samples' gradients are the gradient of. It costs values of the loss, no gradient and no run of the
    model, and accepts every :math:`\eta\le2(1-c)/L`.

    Args:
        loss: from outputs to one loss for each sample, shape ``(n,)``.
        outputs: :math:`z`, shape ``(n, ...)``, floating point.
        grad: the samples' gradients at ``outputs``, in their shape.
        eta: the first trial, > 0.
        c: in (0, 1).
        shrink: in (0, 1).
        max_trials: at least 1.

    Returns:
        The step, 0 if no trial is accepted, and the number of trials, each of which is one value of the loss; one more is the value at ``outputs``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: one value of the loss and O(np) for each trial.

    Source: Lavington et al. 2023, code (line search in target space).

    Example:
        >>> z, y = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
        >>> grad = target_gradient(squared_losses, z, y)
        >>> eta, trials = target_line_search(lambda z: squared_losses(z, y), z, grad, eta=2.0)
        >>> round(eta, 4), trials  # every step up to 2 (1 - c) / L = 1 is accepted
        (0.9566, 8)
    """
    eta = _checks.positive_number("eta", eta)
    _armijo_numbers(c, shrink, max_trials)
    with torch.no_grad():
        z = _outputs("outputs", outputs).detach()
        grad = _anchored("grad", grad, "outputs", z)
        start, slope = loss(z).sum().item(), grad.square().sum().item()
        for trial in range(1, max_trials + 1):
            if loss(z - eta * grad).sum().item() <= start - c * eta * slope:
                return eta, trial
            eta *= shrink
    return 0.0, max_trials


# ---------------------------------------------------------------------------------------------------------------------
# Linear models: exact inner solutions
# ---------------------------------------------------------------------------------------------------------------------


def surrogate_smoothness(X: Tensor, *, eta: float) -> Tensor:
    r""":math:`\beta=\lambda_{\max}(X^\top X)/(n\eta)`, the smoothness of the surrogate of a linear model in its parameters (eq-target_surrogates-beta).

    The inner learning rate :math:`1/\beta` never increases the surrogate. With :math:`\eta=1/L` it is the smoothness of the loss itself that is known.

    Args:
        X: features, shape ``(n, d)``, floating point, finite.
        eta: :math:`\eta>0`.

    Returns:
        Shape ``()``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(nd min(n, d)) time.

    Source: derived in the chapter.

    Example:
        >>> surrogate_smoothness(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), eta=4.0)
        tensor(1.1250)
    """
    _checks.finite("X", _checks.floating("X", X, 2))
    return torch.linalg.matrix_norm(X, ord=2) ** 2 / (len(X) * _checks.positive_number("eta", eta))


def exact_linear_step(X: Tensor, theta: Tensor, grad: Tensor, eta: float) -> Tensor:
    r"""The surrogate's minimizer for a linear model, :math:`\theta-\eta X^+G` (eq-target_surrogates-exact): a projected gradient step in target space.

    Of several minimizers, where the columns of X depend on each other, it is the one nearest to ``theta``.

    Args:
        X: features, shape ``(n, d)``, floating point, finite.
        theta: shape ``(d,)``, or ``(d, p)`` for p outputs.
        grad: the samples' gradients G, shape ``(n,)`` or ``(n, p)``, not divided by n.
        eta: :math:`\eta>0`.

    Returns:
        In the shape of ``theta``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(nd min(n, d)) time, by a singular value decomposition.

    Source: Lavington et al. 2023, linear models; with the logistic loss and ``eta=4`` Böhning and Lindsay 1988.

    Example:
        >>> X, y, theta = torch.tensor([[1.0, 0.0], [0.0, 10.0]]), torch.tensor([1.0, 5.0]), torch.zeros(2)
        >>> exact_linear_step(X, theta, target_gradient(squared_losses, X @ theta, y), 1.0)  # least squares in one call
        tensor([1.0000, 0.5000])
    """
    _checks.finite("X", _checks.floating("X", X, 2))
    eta = _checks.positive_number("eta", eta)
    _same_dtype(X, theta=theta, grad=grad)
    n, d = X.shape
    if theta.ndim not in (1, 2) or len(theta) != d:
        raise ValueError(f"theta must have shape ({d},) or ({d}, p), got {tuple(theta.shape)}")
    if grad.shape != (n, *theta.shape[1:]):
        raise ValueError(f"grad must have shape {(n, *theta.shape[1:])}, got {tuple(grad.shape)}")
    columns = grad if grad.ndim == 2 else grad[:, None]
    # gelsd copes with dependent columns; on other devices only a solver that does not is there. LAPACK wants X by columns, and brought into
    # this order beforehand it is copied in a third of the time that lstsq takes for it.
    if X.device.type == "cpu":
        move = torch.linalg.lstsq(X.mT.contiguous().mT, columns, driver="gelsd").solution
    else:
        move = torch.linalg.pinv(X) @ columns
    return theta - eta * move.reshape(theta.shape)


def _same_dtype(X: Tensor, **others: Tensor) -> None:
    for name, value in others.items():
        if _checks.floating(name, value).dtype != X.dtype:
            raise TypeError(f"{name} must have the dtype of the features, {X.dtype}, got {value.dtype}")


def _one_sample(x: Tensor, theta: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The checked direction :math:`x/\\|x\\|^2` times the gradient, and :math:`\\|x\\|^2`, for one sample or a stack."""
    _same_dtype(x, theta=theta, grad=grad)
    if _checks.floating("x", x).ndim == 0 or x.shape != theta.shape:
        raise ValueError(f"x must have the shape of theta, {tuple(theta.shape)}, and a dimension, got {tuple(x.shape)}")
    if grad.shape != x.shape[:-1]:
        raise ValueError(f"grad must have shape {tuple(x.shape[:-1])}, one for each row of x, got {tuple(grad.shape)}")
    squared = x.square().sum(-1, keepdim=True)
    if _checks.known_false(squared > 0):
        raise ValueError("x must not be zero, got a row of zeros")
    return grad[..., None] * (x / squared), squared


def single_sample_step(
    x: Tensor, theta: Tensor, grad: Tensor, *, eta: float, inner_lr: float, inner_steps: int
) -> Tensor:
    r"""Where ``inner_steps`` gradient steps on one sample's surrogate lead, for a linear model (eq-target_surrogates-inner-closed).

    :math:`\theta-\eta\,\ell'\big[1-(1-\alpha\|x\|^2/\eta)^m\big]\,x/\|x\|^2`. One step is SGD with :math:`\alpha`, whatever :math:`\eta` is.

    Args:
        x: the sample, shape ``(d,)``, or ``(k, d)`` for k samples with a model each.
        theta: in the shape of ``x``.
        grad: :math:`\ell'(x^\top\theta)`, shape ``()`` or ``(k,)``.
        eta: :math:`\eta>0`.
        inner_lr: :math:`\alpha>0`; the steps converge if it is below :math:`2\eta/\|x\|^2`.
        inner_steps: :math:`m\ge1`.

    Returns:
        In the shape of ``theta``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(kd) time, whatever m is.

    Source: derived in the chapter.

    Example:
        >>> x, zero, one = torch.tensor([2.0, 0.0]), torch.zeros(2), torch.tensor(1.0)
        >>> single_sample_step(x, zero, one, eta=2.0, inner_lr=0.25, inner_steps=3)  # 7/8 of the way
        tensor([-0.8750,  0.0000])
    """
    eta, inner_lr = _checks.positive_number("eta", eta), _checks.positive_number("inner_lr", inner_lr)
    _checks.positive_int("inner_steps", inner_steps)
    direction, squared = _one_sample(x, theta, grad)
    ratio = inner_lr / eta * squared
    # 1 - (1 - r)^m, without losing a small r in rounding
    small = -torch.expm1(inner_steps * torch.log1p(-ratio.clamp(max=0.5)))
    share = torch.where(ratio < 0.5, small, 1 - (1 - ratio) ** inner_steps)
    return theta - eta * share * direction


def kaczmarz_step(x: Tensor, theta: Tensor, grad: Tensor, eta: float) -> Tensor:
    r"""The minimizer of one sample's surrogate for a linear model, :math:`\theta-\eta\,\ell'x/\|x\|^2` (eq-target_surrogates-kaczmarz).

    With the squared loss it is Kaczmarz' step with relaxation :math:`\eta`. Without interpolation it goes to another minimizer than that of the mean loss
    (eq-target_surrogates-reweighted).

    Args:
        x, theta, grad, eta: as in :func:`single_sample_step`.

    Returns:
        In the shape of ``theta``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(kd) time.

    Source: derived in the chapter; Kaczmarz 1937.

    Example:
        >>> x, theta = torch.tensor([2.0, 0.0]), torch.tensor([3.0, 7.0])
        >>> kaczmarz_step(x, theta, x @ theta - 1, 1.0)  # afterwards the equation 2 a = 1 holds
        tensor([0.5000, 7.0000])
    """
    eta = _checks.positive_number("eta", eta)
    return theta - eta * _one_sample(x, theta, grad)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The optimizers
# ---------------------------------------------------------------------------------------------------------------------


def _armijo_numbers(c: float, shrink: float, max_trials: int) -> None:
    for name, value in (("c", c), ("shrink", shrink)):
        if not 0 < _checks.number(name, value) < 1:
            raise ValueError(f"{name} must lie in (0, 1), got {value}")
    _checks.positive_int("max_trials", max_trials)


@torch.compiler.disable
def _move(params: Sequence[Tensor], directions: Sequence[Tensor], step: float) -> None:
    """Step against the directions. Autocast keeps casts of parameters, which are of no use once these have moved."""
    torch._foreach_add_(params, directions, alpha=-step)
    torch.clear_autocast_cache()


# A loop over numbers that a compiler would specialize on. A compiled model in it stays compiled.
@torch.compiler.disable(recursive=False)
def _armijo(
    value_at: Callable[[], float],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    directions: Sequence[Tensor],
    step: float,
    numbers: dict[str, Any],
    *,
    value: float,
) -> tuple[float, float, int]:
    """The line search from a point whose value and gradients are known; without an accepted trial the point stays."""
    slope = sum(torch.stack([(g * d).sum() for g, d in zip(grads, directions, strict=True)]).tolist())
    if not slope > 0:
        return value, 0.0, 0
    start, trials = [p.clone() for p in params], 0
    while trials < numbers["max_trials"] and step >= numbers["min_step"]:
        trials += 1
        _move(params, directions, step)
        trial = value_at()
        if trial <= value - numbers["c"] * step * slope:
            return trial, step, trials
        torch._foreach_copy_(params, start)
        step *= numbers["shrink"]
    torch.clear_autocast_cache()
    return value, 0.0, trials


def armijo_step(
    fn: Callable[[], Tensor],
    params: Iterable[Tensor],
    step: float,
    *,
    c: float = 0.5,
    shrink: float = 0.9,
    max_trials: int = 100,
    min_step: float = 1e-6,
) -> tuple[float, float, int]:
    r"""One gradient step, in place, of the first length :math:`s` that gives :math:`S(\omega-s\nabla S)\le S(\omega)-c\,s\|\nabla S\|^2` (eq-target_surrogates-armijo).

    If no trial is accepted, or the gradient is zero, the parameters stay, and the step is 0. So the function never increases.

    Args:
        fn: evaluates the function at the parameters as they are, a differentiable scalar.
        params: leaf tensors that require gradients. Those that the function does not depend on stay.
        step: the first trial, > 0.
        c: in (0, 1). 0.5 is the largest that accepts the step :math:`1/\beta` on every quadratic of smoothness :math:`\beta`.
        shrink: from one trial to the next, in (0, 1).
        max_trials: at least 1.
        min_step: no trial below it, >= 0.

    Returns:
        The value after the move, the accepted step, the number of trials.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Complexity: one gradient, and one value for each trial; a copy of the parameters.

    Source: Lavington et al. 2023, code (the inner optimizer); Armijo 1966.

    Example:
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> value, step, trials = armijo_step(lambda: (x**2).sum(), [x], 10.0)
        >>> round(step, 4), trials  # the smoothness is 2
        (0.471, 30)
    """
    _checks.positive_number("step", step)
    _armijo_numbers(c, shrink, max_trials)
    _checks.number("min_step", min_step, 0)
    params = _trained(params)
    with torch.enable_grad():
        value = fn()
        params, grads = _gradients(value, params)

    def value_at() -> float:
        with torch.no_grad():
            return fn().item()

    with torch.no_grad():
        numbers = dict(c=c, shrink=shrink, max_trials=max_trials, min_step=min_step)
        return _armijo(value_at, params, grads, grads, step, numbers, value=value.item())


def _trained(params: Iterable[Tensor]) -> list[Tensor]:
    params = [p for p in params if p.requires_grad]
    if not params:
        raise ValueError("params must hold a tensor that requires a gradient, got none")
    return params


def _gradients(
    value: Tensor, params: Sequence[Tensor], slope: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that the value depends on, and its gradients, or those of its product with the slope; ``.grad`` is left alone."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise ValueError("the function must depend on params and keep its graph, got a value without one")
    if slope is None and value.numel() != 1:
        raise ValueError(f"the function must have a scalar value, got shape {tuple(value.shape)}")
    found = torch.autograd.grad(value, params, slope, allow_unused=True)
    pairs = [(p, g) for p, g in zip(params, found, strict=True) if g is not None]
    if not pairs:
        raise ValueError("the function must depend on params, got one that depends on none of them")
    return [p for p, _ in pairs], [g for _, g in pairs]


COUNTERS = ("steps", "oracle_calls", "loss_evals", "model_evals", "model_grads")


class _Counting(torch.optim.Optimizer):
    """What the two optimizers share: options that are one for all groups, counters, and the line search.

    Options and counters are numbers and strings in ``param_groups`` and in the state of the first parameter, so that a ``state_dict`` holds the whole run.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], scale: float, shared: dict[str, Any]):
        self._shared = tuple(shared)
        super().__init__(params, dict(inner_lr=scale, **shared))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_shared": self._shared}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check a group's ``inner_lr``, and add it; raises for an option that is one for all groups."""
        for name in self._shared:
            if name in param_group:
                raise ValueError(f"{name} is one for all parameter groups, got {param_group[name]!r} in a group")
        _checks.positive_number("inner_lr", param_group.get("inner_lr", self.defaults["inner_lr"]))
        super().add_param_group(param_group)

    def _record(self) -> dict[str, Any]:
        record = self.state[self.param_groups[0]["params"][0]]
        if not record:
            record.update(dict.fromkeys(COUNTERS, 0), line_step=0.0)
        return record

    def __getattr__(self, name: str) -> int:
        if name in COUNTERS:
            return self._record()[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def _forward(self, forward: Callable[[], Tensor]) -> Tensor:
        self._record()["model_evals"] += 1
        return forward()

    def _directions(
        self, value: Tensor, slope: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Parameters, gradients of the value, or of its product with the slope, and gradients times their groups' ``inner_lr``."""
        scales = {p: group["inner_lr"] for group in self.param_groups for p in group["params"]}
        params, grads = _gradients(value, _trained(scales), slope)
        self._record()["model_grads"] += 1
        directions = [g if scales[p] == 1 else g * scales[p] for p, g in zip(params, grads, strict=True)]
        return params, grads, directions

    def _search(self, value_at: Callable[[], float], value: float, found: tuple, shared: dict[str, Any]) -> bool:
        """A line search along the directions that were found; whether a trial was accepted."""
        record = self._record()
        trial = shared["grow"] * record["line_step"] or shared["first_step"]
        _, record["line_step"], _ = _armijo(value_at, *found, trial, shared, value=value)
        return record["line_step"] > 0


def _line_options(
    first_step: float, grow: float, c: float, shrink: float, max_trials: int, min_step: float
) -> dict[str, Any]:
    _checks.positive_number("first_step", first_step)
    _checks.number("grow", grow, 1)
    _armijo_numbers(c, shrink, max_trials)
    _checks.number("min_step", min_step, 0)
    return dict(first_step=first_step, grow=grow, c=c, shrink=shrink, max_trials=max_trials, min_step=min_step)


class SSO(_Counting):
    r"""Surrogates for stochastic optimization: one call of the loss's gradient, then ``inner_steps`` steps on the surrogate (eq-target_surrogates-sso).

    ``step`` evaluates the model on the batch, calls the oracle once there, and minimizes :func:`target_surrogate` over the parameters. With
    ``inner="gd"`` and one inner step it is SGD with the learning rate ``inner_lr``, whatever ``eta`` is.

    The model must be the same function throughout a step: no dropout, no batch norm in training mode, no new batch in ``forward``. Gradients are found
    without ``.grad``, so a gradient scaler has nothing to scale; autocast to bfloat16 needs none. ``eta`` and ``inner_steps`` may be changed between steps,
    in ``param_groups[0]``; PyTorch's schedulers, which change an ``lr``, do not apply.

    Args:
        params: parameters, or parameter groups; a group may have its own ``inner_lr``, everything else is one for all groups.
        eta: :math:`\eta>0`, the step in target space. The surrogate is an upper bound up to :math:`1/L`, see ``TARGET_SMOOTHNESS``.
        inner_steps: :math:`m\ge1`.
        inner: "armijo" or "gd".
        inner_lr: the learning rate :math:`\alpha>0` of "gd". "armijo" multiplies a group's gradient by it to have the search direction; leave 1 for the plain one.
        schedule: "constant", "sqrt", "exponential" as in :func:`target_step_size`, or "line_search", :func:`target_line_search` from ``eta`` on.
        total_steps: T of the exponential schedule.
        reset_inner_step: each outer step begins with the trial ``first_step``; else with ``grow`` times the last accepted step.
        tolerance: the inner loop ends once the surrogate's gradient has at most this norm; 0 never looks, which saves a wait for an accelerator.
        first_step, grow, c, shrink, max_trials, min_step: of the line search, as in :func:`armijo_step`; within an outer step each trial begins with ``grow``
            times the last accepted step.

    Attributes:
        oracle_calls: gradients of the loss, one a step.
        loss_evals: values of the loss: one a step, more with schedule "line_search".
        model_evals: every run of ``forward``, trials of the line search included.
        model_grads: gradients of the surrogate with respect to the parameters.
        steps: outer steps.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument; at a step for outputs or losses of a wrong shape.

    Complexity: with "gd", m runs of the model and m gradients through it a step; "armijo" adds a run for each trial and a copy of the parameters. O(np) beside.

    Source: Lavington et al. 2023, SSO.

    Example:
        >>> X, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([1.0, 6.0])
        >>> theta = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = SSO([theta], eta=1.0, inner_steps=60)
        >>> optimizer.step(lambda: X @ theta, lambda z: squared_losses(z, y))
        tensor(9.2500)
        >>> theta.data, optimizer.oracle_calls
        (tensor([1.0000, 3.0000]), 1)
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        eta: float,
        inner_steps: int,
        *,
        inner: str = "armijo",
        inner_lr: float = 1.0,
        schedule: str = "constant",
        total_steps: int | None = None,
        reset_inner_step: bool = True,
        tolerance: float = 1e-6,
        first_step: float = 10.0,
        grow: float = 1.8,
        c: float = 0.5,
        shrink: float = 0.9,
        max_trials: int = 100,
        min_step: float = 1e-6,
    ):
        target_step_size(eta, 1, schedule, total_steps=total_steps)  # its checks
        _checks.positive_int("inner_steps", inner_steps)
        if inner not in ("armijo", "gd"):
            raise ValueError(f"inner must be 'armijo' or 'gd', got {inner!r}")
        if not isinstance(reset_inner_step, bool):
            raise TypeError(f"reset_inner_step must be a bool, got {type(reset_inner_step).__name__}")
        _checks.number("tolerance", tolerance, 0)
        shared = dict(eta=eta, inner_steps=inner_steps, inner=inner, schedule=schedule, total_steps=total_steps)
        shared |= dict(reset_inner_step=reset_inner_step, tolerance=tolerance)
        shared |= _line_options(first_step, grow, c, shrink, max_trials, min_step)
        super().__init__(params, inner_lr, shared)

    @torch.no_grad()
    def step(self, forward: Callable[[], Tensor], loss: Callable[[Tensor], Tensor]) -> Tensor:
        """One outer step: an oracle call, and up to ``inner_steps`` inner steps.

        Args:
            forward: runs the model on the batch and returns outputs, shape ``(n, ...)``.
            loss: from outputs to one loss for each sample, shape ``(n,)``. It is called once, unless the schedule is "line_search".

        Returns:
            The mean loss before the step, shape ``()``.
        """
        shared, record = self.param_groups[0], self._record()
        _checks.positive_int("inner_steps", shared["inner_steps"])
        with torch.enable_grad():
            outputs = self._forward(forward)
        losses, grad = _oracle(loss, outputs)
        anchor = _checks.wide(outputs).detach().clone()
        eta = self._target_step(loss, anchor, grad, shared)
        record["steps"] += 1
        record["oracle_calls"] += 1
        record["loss_evals"] += 1
        if shared["reset_inner_step"]:
            record["line_step"] = 0.0

        for inner in range(shared["inner_steps"] if eta > 0 else 0):
            with torch.enable_grad():
                outputs = _checks.wide(self._forward(forward) if inner else outputs)
            # Around the current outputs the surrogate has the same form, with this slope, less a constant. So its value here is zero, its gradient is the
            # chain rule's, and its small changes are not lost in rounding.
            current = _anchored("outputs", outputs, "the anchor", anchor)
            slope = grad + (current - anchor) / eta
            found = self._directions(outputs, slope / len(slope))
            # A copy, because a model may return its parameters themselves, and these move.
            surrogate = functools.partial(target_surrogate, anchor_outputs=current.clone(), anchor_grad=slope, eta=eta)
            if not self._inner_step(found, functools.partial(self._value, forward, surrogate), shared):
                break
        return losses.mean()

    def _target_step(self, loss: Callable, anchor: Tensor, grad: Tensor, shared: dict[str, Any]) -> float:
        record = self._record()
        options = {name: shared[name] for name in ("eta", "schedule", "total_steps")}
        eta = target_step_size(step=record["steps"] + 1, **options)
        if shared["schedule"] == "line_search":
            numbers = {name: shared[name] for name in ("c", "shrink", "max_trials")}
            eta, trials = target_line_search(loss, anchor, grad, eta=eta, **numbers)
            record["loss_evals"] += trials + 1
        return eta

    def _value(self, forward: Callable[[], Tensor], surrogate: Callable[[Tensor], Tensor]) -> float:
        return surrogate(self._forward(forward)).item()

    def _inner_step(self, found: tuple, value_at: Callable[[], float], shared: dict[str, Any]) -> bool:
        """One step on the surrogate, whose value is 0; whether there is a reason for another."""
        params, grads, directions = found
        if shared["tolerance"] and torch.nn.utils.get_total_norm(grads) <= shared["tolerance"]:
            return False
        if shared["inner"] == "armijo":
            return self._search(value_at, 0.0, found, shared)
        _move(params, directions, 1.0)
        return True


class SLS(_Counting):
    r"""Gradient descent with a line search on the loss itself: an oracle call, and a value of the loss for each trial.

    The method that :class:`SSO` is compared with. With the squared loss and ``eta=1`` the surrogate is the loss, and SSO with one inner step is this one
    with ``reset=True``.

    Args:
        params: parameters, or parameter groups; a group may have its own ``inner_lr``, which multiplies its gradient in the search direction.
        inner_lr: as above; leave 1 for the plain gradient.
        reset: each step begins with the trial ``first_step``; else with ``grow`` times the last accepted step.
        first_step, grow, c, shrink, max_trials, min_step: of the line search, as in :func:`armijo_step`.

    Attributes:
        oracle_calls, loss_evals, model_evals, model_grads, steps: as in :class:`SSO`. Each trial is one value of the loss.

    Raises:
        TypeError, ValueError: as :class:`SSO`.

    Complexity: one gradient and, for each trial, one run of the model and one value of the loss; a copy of the parameters.

    Source: Vaswani et al. 2019, arXiv 1905.09997; as a baseline in Lavington et al. 2023.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([3.0]))
        >>> optimizer = SLS([x])
        >>> for _ in range(20):
        ...     loss = optimizer.step(lambda: x, lambda z: z**2)
        >>> bool(loss < 1e-12), optimizer.oracle_calls
        (True, 20)
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        inner_lr: float = 1.0,
        reset: bool = False,
        first_step: float = 10.0,
        grow: float = 1.8,
        c: float = 0.5,
        shrink: float = 0.9,
        max_trials: int = 100,
        min_step: float = 1e-6,
    ):
        if not isinstance(reset, bool):
            raise TypeError(f"reset must be a bool, got {type(reset).__name__}")
        shared = dict(reset=reset, **_line_options(first_step, grow, c, shrink, max_trials, min_step))
        super().__init__(params, inner_lr, shared)

    @torch.no_grad()
    def step(self, forward: Callable[[], Tensor], loss: Callable[[Tensor], Tensor]) -> Tensor:
        """One step; arguments and result as for :meth:`SSO.step`, with as many calls of the loss as there are trials, and one."""
        shared, record = self.param_groups[0], self._record()

        def mean_loss() -> Tensor:
            record["loss_evals"] += 1
            return loss(_outputs("outputs", self._forward(forward))).mean()

        with torch.enable_grad():
            value = mean_loss()
        record["steps"] += 1
        record["oracle_calls"] += 1
        if shared["reset"]:
            record["line_step"] = 0.0
        self._search(lambda: mean_loss().item(), value.item(), self._directions(value), shared)
        return value.detach()
