r"""One temperature for each anchor: a robust contrastive loss whose worst case sets it.

The method of *Not All Semantics are Created Equal* (Qiu, Hu, Yuan, Zhou, Zhang and Yang, ICML 2023, arXiv 2305.11965): the global
contrastive loss, its distributionally robust form and the dual in which the temperature is a multiplier, that multiplier solved
exactly, and the stochastic algorithm with a moving average and a temperature for every sample, for two views of an image and
for pairs of image and text. Equation labels are those of the chapter ``similarity/isogclr``.

Notation: ``difference`` (B, m) holds :math:`h_{ij}=s_{ij}-s_{ii}`, negative minus positive similarity, of B anchors with m negatives;
:math:`\tau` is ``temperature``, :math:`\rho` the radius of the Kullback-Leibler ball in nats, :math:`p_\tau` the softmax of
:math:`h/\tau` and :math:`u` the uniform distribution over the negatives. Logs are natural.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossbook import _checks, ops

# ---------------------------------------------------------------------------------------------------------------------
# The robust loss and its dual
# ---------------------------------------------------------------------------------------------------------------------


def _column(temperature: float | Tensor) -> float | Tensor:
    """The temperature, shaped to divide a ``(B, m)`` tensor."""
    return temperature[:, None] if isinstance(temperature, Tensor) and temperature.ndim == 1 else temperature


def kl_from_uniform(difference: Tensor, *, temperature: float | Tensor) -> Tensor:
    r"""How concentrated the negatives are: :math:`\mathrm{KL}(p_\tau\|u)` of :math:`p_\tau\propto e^{h/\tau}` (eq-isogclr-kl).

    Args:
        difference: :math:`h`, or similarities of the negatives (a shift of a row changes nothing), shape ``(B, m)``, floating point.
        temperature: :math:`\tau>0`, a number, or a tensor of shape ``()`` or ``(B,)`` (differentiable).

    Returns:
        Shape ``(B,)``, in nats, between 0 and :math:`\log m`; it falls with :math:`\tau`.

    Raises:
        TypeError, ValueError: for a wrong type, shape or temperature, naming the argument.

    Complexity: O(Bm) time and memory.

    Source: Qiu et al., the constraint of the robust loss (section 4).

    Example:
        >>> kl_from_uniform(torch.tensor([[0.0, 1.0, 2.0]]), temperature=1.0)
        tensor([0.2662])
    """
    _checks.finite("difference", _checks.floating("difference", difference, 2))
    log_p = torch.log_softmax(difference / _column(_checks.temperature(temperature, len(difference))), dim=1)
    return (log_p.exp() * log_p).sum(1) + math.log(difference.shape[1])


def dual_objective(
    difference: Tensor, *, temperature: float | Tensor, rho: float, tau_floor: float = 0.0, reduction: str = "none"
) -> Tensor:
    r"""The dual :math:`\phi_i(\tau)=\tau\log\frac1m\sum_je^{h_{ij}/\tau}+(\tau-\tau_0)\rho` (eq-isogclr-dual).

    Convex in :math:`\tau`; its minimum over :math:`\tau\ge\tau_0` is :func:`robust_contrastive_loss`.

    Args:
        difference: :math:`h`, shape ``(B, m)``, floating point.
        temperature: :math:`\tau>0`, a number, or a tensor of shape ``()`` or ``(B,)`` (differentiable).
        rho: radius :math:`\rho\ge0` of the ball, in nats.
        tau_floor: :math:`\tau_0\ge0`, the price of a nat inside of the ball.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``(B,)``, or ``()`` with a reduction.

    Raises:
        TypeError, ValueError: for a wrong type, shape, temperature, rho, tau_floor or reduction, naming the argument.

    Complexity: O(Bm) time and memory.

    Source: Qiu et al., eq. 5.

    Example:
        >>> dual_objective(torch.tensor([[0.0, 1.0, 2.0]]), temperature=1.0, rho=0.5)
        tensor([1.8090])
    """
    _checks.finite("difference", _checks.floating("difference", difference, 2))
    temperature = _checks.temperature(temperature, len(difference))
    log_mean = torch.logsumexp(difference / _column(temperature), dim=1) - math.log(difference.shape[1])
    price = (temperature - _checks.number("tau_floor", tau_floor, 0)) * _checks.number("rho", rho, 0)
    return _checks.reduced(temperature * log_mean + price, reduction)


def global_contrastive_loss(difference: Tensor, *, temperature: float | Tensor, reduction: str = "mean") -> Tensor:
    r"""The loss at one fixed temperature, :math:`\tau\log\frac1m\sum_je^{h_{ij}/\tau}` (eq-isogclr-global): SogCLR's objective.

    With all negatives of the data set in ``difference`` it is the global contrastive loss; the positive is not in the sum.

    Args:
        difference: :math:`h`, shape ``(B, m)``, floating point.
        temperature: :math:`\tau>0`, a number, or a tensor of shape ``()`` or ``(B,)`` (differentiable).
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none"; between the mean and the largest difference.

    Raises:
        TypeError, ValueError: for a wrong type, shape, temperature or reduction, naming the argument.

    Complexity: O(Bm) time and memory.

    Source: Qiu et al., eq. 2; Yuan et al. 2022 (SogCLR).

    Example:
        >>> global_contrastive_loss(torch.tensor([[0.0, 1.0, 2.0]]), temperature=1.0)
        tensor(1.3090)
    """
    return dual_objective(difference, temperature=temperature, rho=0.0, reduction=reduction)


_BISECTIONS = 60  # of an interval in log tau; they reach the last digits of float64


@torch.no_grad()
def optimal_temperature(difference: Tensor, *, rho: float, tau_floor: float = 0.0, tau_max: float = 1e3) -> Tensor:
    r"""The minimizer :math:`\tau_i^*` of the dual: the temperature at which the concentration is exactly :math:`\rho` (eq-isogclr-optimal).

    :math:`\mathrm{KL}(p_\tau\|u)` falls with :math:`\tau`, so bisection in :math:`\log\tau` finds the root; it runs in float64.
    Nothing is differentiated.

    Args:
        difference: :math:`h`, or similarities of the negatives, shape ``(B, m)``, floating point.
        rho: radius :math:`\rho\ge0`, in nats; a radius of :math:`\log m` or more holds every distribution.
        tau_floor: :math:`\tau_0\ge0`, the least temperature.
        tau_max: the largest temperature, above ``tau_floor``.

    Returns:
        Shape ``(B,)``, dtype of ``difference``: ``tau_floor`` in a row whose concentration never exceeds ``rho`` (with a floor of 0, that
        is where at least a fraction :math:`e^{-\rho}` of the negatives ties at the top, to within :math:`10^{-6}` of the row's spread), and
        ``tau_max`` in a row whose concentration is above ``rho`` even there, as always for ``rho = 0``.

    Raises:
        TypeError, ValueError: for a wrong type, shape, rho, tau_floor or tau_max, naming the argument.

    Complexity: O(60 Bm) time, O(Bm) memory.

    Source: the optimality condition of Qiu et al., eq. 5; solved exactly here.

    Example:
        >>> optimal_temperature(torch.tensor([[0.0, 1.0, 2.0], [0.0, 10.0, 20.0]]), rho=0.3)
        tensor([0.9267, 9.2665])
    """
    _checks.finite("difference", _checks.floating("difference", difference, 2))
    rho, tau_floor = _checks.number("rho", rho, 0), _checks.number("tau_floor", tau_floor, 0)
    if not tau_floor < _checks.positive_number("tau_max", tau_max):
        raise ValueError(f"tau_max must be above tau_floor = {tau_floor}, got {tau_max}")
    h = difference.double()
    spread = h.amax(1) - h.amin(1)
    low = torch.full_like(spread, tau_floor) if tau_floor else (1e-6 * spread).clamp(max=tau_max)
    low = torch.where(low > 0, low, tau_max)  # a constant row: any temperature will do
    inside = (spread == 0) | (kl_from_uniform(h, temperature=low) <= rho)
    high = torch.full_like(spread, tau_max)
    outside = ~inside & (kl_from_uniform(h, temperature=high) >= rho)
    for _ in range(_BISECTIONS):
        middle = (low * high).sqrt()
        cold = kl_from_uniform(h, temperature=middle) > rho
        low, high = torch.where(cold, middle, low), torch.where(cold, high, middle)
    tau = torch.where(inside, tau_floor, torch.where(outside, tau_max, high))
    return tau.to(difference.dtype)


def robust_contrastive_loss(
    difference: Tensor,
    *,
    rho: float,
    tau_floor: float = 0.0,
    tau_max: float = 1e3,
    reduction: str = "mean",
    return_temperature: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The worst case over all weights of the negatives in a Kullback-Leibler ball around the uniform (eq-isogclr-robust).

    :math:`\ell_i=\max_{p:\,\mathrm{KL}(p\|u)\le\rho}\sum_jp_jh_{ij}-\tau_0\mathrm{KL}(p\|u)`, by way of the dual at its exact minimizer. The
    gradient in ``difference`` is the worst case itself, :math:`p_{\tau^*}` (eq-isogclr-envelope).

    Args:
        difference: :math:`h`, shape ``(B, m)``, floating point.
        rho: radius :math:`\rho\ge0`, in nats. 0 gives the mean (up to the finite ``tau_max``), :math:`\log m` or more the maximum.
        tau_floor: :math:`\tau_0\ge0`.
        tau_max: the largest temperature that is tried, above ``tau_floor``.
        reduction: "none", "mean" or "sum" over the batch.
        return_temperature: also give back :math:`\tau_i^*`.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none"; with ``return_temperature`` a pair of that and the temperatures, shape ``(B,)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape, number or reduction, naming the argument.

    Complexity: O(60 Bm) time, O(Bm) memory.

    Source: Qiu et al., eqs. 4 and 5.

    Example:
        >>> loss, tau = robust_contrastive_loss(torch.tensor([[0.0, 1.0, 2.0]]), rho=0.3, return_temperature=True)
        >>> loss, tau
        (tensor(1.6077), tensor([0.9267]))
    """
    tau = optimal_temperature(difference, rho=rho, tau_floor=tau_floor, tau_max=tau_max)
    warm = tau > 0
    soft = dual_objective(difference, temperature=tau.where(warm, 1), rho=rho, tau_floor=tau_floor)
    loss = _checks.reduced(torch.where(warm, soft, difference.amax(1)), reduction)
    return (loss, tau) if return_temperature else loss


def two_level_temperature(fraction: float, gap: float, rho: float) -> float:
    r"""The optimal temperature where a fraction q of the negatives is closer to the anchor than the rest, by a gap (eq-isogclr-two-level).

    Args:
        fraction: :math:`q\in(0,1]`, the share of similar negatives.
        gap: :math:`\Delta>0`, by how much more similar they are.
        rho: radius :math:`\rho>0`, in nats.

    Returns:
        :math:`\tau^*=\Delta/(\mathrm{logit}\,P^*-\mathrm{logit}\,q)` with :math:`\mathrm{kl}(P^*\|q)=\rho`; 0 where :math:`q\ge e^{-\rho}`, since then even the
        weights that leave out all others are in the ball.

    Raises:
        TypeError, ValueError: for a wrong number, naming the argument.

    Source: own closed form (chapter, prop-isogclr-two-level).

    Example:
        >>> [round(two_level_temperature(q, gap=1.0, rho=0.3), 6) for q in (0.01, 0.1, 0.8)]
        [0.342161, 0.566457, 0.0]
    """
    q = _checks.fraction("fraction", fraction)
    gap, rho = _checks.positive_number("gap", gap), _checks.positive_number("rho", rho)
    if -math.log(q) <= rho:
        return 0.0

    def kl(x: float) -> float:  # of the weights at temperature gap / x, in a form that does not cancel at large x
        others = (1 - q) * math.exp(-x)
        return -others / (q + others) * x - math.log(q + others)

    low, high = 0.0, 1.0
    while kl(high) <= rho:
        high *= 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(middle) <= rho else (low, middle)
    return gap / high


# ---------------------------------------------------------------------------------------------------------------------
# The stochastic algorithm
# ---------------------------------------------------------------------------------------------------------------------


def _unit_rows(x: Tensor) -> Tensor:
    """Rows of length one, in float32 or wider: 1/tau amplifies what half precision rounds away."""
    return F.normalize(_checks.wide(x), dim=1)


def _same_sample(index: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of a batch the rows of the same sample, filled up with the last of them, and how many they are."""
    _, group, counts = index.unique(return_inverse=True, return_counts=True)
    if len(counts) < 2:
        raise ValueError(
            f"index must name at least 2 samples, so that there is a negative, got only {index[:1].tolist()}"
        )
    start = counts.cumsum(0) - counts
    place = torch.arange(int(counts.max()), device=index.device)
    rows = start[group][:, None] + torch.minimum(place, counts[group][:, None] - 1)
    return group.argsort(stable=True)[rows], counts[group]


class _IndividualTemperatures(nn.Module):
    """The state of both forms, one slot an anchor, and the step that moves it."""

    log_inner: Tensor
    temperature: Tensor
    temperature_momentum: Tensor
    steps: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        rho: float,
        tau_init: float,
        tau_min: float,
        tau_max: float,
        gamma: float,
        eta: float,
        beta: float,
        grad_clip: float | None,
        individual: bool,
        warmup_steps: int,
        distributed: bool,
        chunk_size: int | None,
    ):
        super().__init__()
        _checks.positive_int("num_samples", shape[-1], minimum=2)
        for name, tau in (("tau_min", tau_min), ("tau_init", tau_init), ("tau_max", tau_max)):
            _checks.positive_number(name, tau)
        if not tau_min <= tau_init <= tau_max:
            raise ValueError(f"tau_init must lie in [tau_min, tau_max] = [{tau_min}, {tau_max}], got {tau_init}")
        self.num_samples, self.rho = shape[-1], _checks.number("rho", rho, 0)
        self.tau_min, self.tau_max = tau_min, tau_max
        self.gamma, self.beta = _checks.fraction("gamma", gamma), _checks.fraction("beta", beta)
        self.eta = _checks.positive_number("eta", eta)
        self.grad_clip = math.inf if grad_clip is None else _checks.positive_number("grad_clip", grad_clip)
        self.individual, self.distributed = individual, distributed
        self.chunk_size = None if chunk_size is None else _checks.positive_int("chunk_size", chunk_size)
        self.warmup_steps = _checks.positive_int("warmup_steps", warmup_steps, minimum=0)
        self.register_buffer("log_inner", torch.full(shape, -torch.inf))  # log 0: not seen yet
        self.register_buffer("temperature", torch.full(shape, float(tau_init)))
        self.register_buffer("temperature_momentum", torch.zeros(shape))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def inner(self) -> Tensor:
        r"""The running means :math:`s_i` themselves; they overflow where :math:`\tau` is small, and their logarithms do not."""
        return self.log_inner.exp()

    def _loss(self, names: tuple[str, str], first: Tensor, second: Tensor, index: Tensor) -> Tensor:
        """The objective at the running means, with the gradient of the estimator; in training the state moves."""
        _checks.floating(names[0], first, 2)
        _checks.like(names[1], second, names[0], first, 2)
        _checks.indices("index", index, self.num_samples, len(first))
        for name, x in zip(names, (first, second), strict=True):
            _checks.finite(name, x)  # NaN would stay in the state
        rows = [_unit_rows(first), _unit_rows(second)]
        needed = self.training or torch.is_grad_enabled()
        with torch.set_grad_enabled(needed), torch.autocast(first.device.type, enabled=False):
            leaves = [x.detach().requires_grad_() for x in rows]
            slot = self._slots(index)
            tau = self.temperature.view(-1)[slot].to(rows[0].dtype).requires_grad_()
            log_mean, positive = self._log_mean(*leaves, index, tau)
            mean = log_mean.detach()
            inner = self._running_mean(slot, mean)
            # The value is log s, the gradient that of the batch's mean over s.
            log_inner = inner + (mean - inner).exp() * (log_mean - mean)
            loss = tau * (log_inner + (self.rho if self.individual else 0.0)) - positive
            # One backward pass gives the gradients of the temperatures, needed now, and those of the rows, kept for later.
            gradients = torch.autograd.grad(loss.sum(), [*leaves, tau]) if needed else []
        if self.training:
            self._step(slot, inner, gradients[2])
        linear = sum(((x - x.detach()) * g).sum() for x, g in zip(rows, gradients[:2], strict=False))
        return (loss.detach().sum() + linear) / len(index)

    def _running_mean(self, slot: Tensor, log_mean: Tensor) -> Tensor:
        r""":math:`\log s`, the old mean mixed with the batch's; an anchor that is new takes the batch's."""
        old = self.log_inner.view(-1)[slot].to(log_mean.dtype)
        keep = math.log1p(-self.gamma) if self.gamma < 1 else -math.inf
        return torch.where(old == -torch.inf, log_mean, torch.logaddexp(old + keep, log_mean + math.log(self.gamma)))

    def _batch(self, index: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor, int, list[Tensor]]:
        """For each anchor its own sample's rows, the logarithm of the number of others, the number of all, and the rows of all processes."""
        everyone, *rows = (ops.gather(x) if self.distributed else x for x in (index, *rows))
        own = ops.local_rows(len(index), index.device) if self.distributed else slice(None)
        same, count = (x[own] for x in _same_sample(everyone))
        return same, (len(everyone) - count).to(rows[0].dtype).log(), len(everyone), rows

    @torch.no_grad()
    def _step(self, slot: Tensor, inner: Tensor, gradient: Tensor) -> None:
        """Store the running means and, after the warm-up, move the temperatures; an anchor that comes twice counts by its mean."""
        if self.distributed:
            slot, inner, gradient = (ops.gather(x) for x in (slot, inner, gradient))
        used, group, counts = slot.unique(return_inverse=True, return_counts=True)
        top = inner.new_full(used.shape, -torch.inf).scatter_reduce(0, group, inner, "amax")
        mean = inner.new_zeros(used.shape).index_add(0, group, (inner - top[group]).exp()) / counts
        self.log_inner.view(-1)[used] = (top + mean.log()).to(self.log_inner.dtype)
        self.steps += 1
        if not self.individual or self.steps <= self.warmup_steps:
            return
        gradient = inner.new_zeros(used.shape).index_add(0, group, gradient) / counts
        gradient = gradient.clamp(-self.grad_clip, self.grad_clip).to(self.temperature.dtype)
        momentum = (1 - self.beta) * self.temperature_momentum.view(-1)[used] + self.beta * gradient
        tau = (self.temperature.view(-1)[used] - self.eta * momentum).clamp(self.tau_min, self.tau_max)
        self.temperature_momentum.view(-1)[used] = momentum
        self.temperature.view(-1)[used] = tau


class ISogCLRLoss(_IndividualTemperatures):
    r"""iSogCLR for two views of each sample: a running mean and a temperature for every sample, right at any batch size.

    Both views are anchors, and the views of all *other* samples of the batch are their negatives. With :math:`\hat g` the batch's mean of
    :math:`e^{s_{ij}/\tau_i}`, each anchor takes :math:`s=(1-\gamma)s_i+\gamma\hat g`, or :math:`\hat g` where the sample is new. The value is the
    objective at these estimates, :math:`\frac1B\sum_i\sum_{\mathrm{views}}\tau_i(\log s+\rho)-s_{ii}` (eq-isogclr-objective); its gradient is that of
    :math:`\tau_i\hat g/s-s_{ii}` with :math:`s` held fixed (eq-isogclr-estimator), not what differentiating the value would give; there is no second one. Then the
    temperatures take a step (eq-isogclr-temperature-step); the value uses those from before. State moves in ``train()`` mode only.

    As in the authors' code for this case, :math:`s` averages :math:`e^{s_{ij}/\tau}`, without the positive. A sample that comes twice in a batch is no
    negative of itself, and its state takes the mean of its anchors; samples that are missing keep their state.

    Args:
        num_samples: n, size of the training set, at least 2.
        rho: radius :math:`\rho\ge0`, in nats.
        tau_init, tau_min, tau_max: first, least and largest temperature.
        gamma: share of the new batch in the running mean, in (0, 1].
        eta: step size of the temperatures.
        beta: share of the new gradient in their momentum, in (0, 1].
        grad_clip: bound on a temperature's gradient, or None.
        individual: False keeps every temperature at ``tau_init`` and leaves :math:`\rho` out: SogCLR.
        warmup_steps: calls in training before the temperatures start to move.
        distributed: take negatives from the batches of all processes of the default group, and keep the state equal on all.
        chunk_size: rows of similarities held at a time; None chooses.

    Attributes:
        log_inner: buffer, :math:`\log s_i`, shape ``(n,)``, float32; -inf where a sample is new. ``inner`` is its exponential.
        temperature: buffer, :math:`\tau_i`, shape ``(n,)``.
        temperature_momentum: buffer, shape ``(n,)``.
        steps: buffer, calls in training so far.

    Raises:
        TypeError, ValueError: for a wrong number, naming the argument.

    Complexity: O(B^2 d) time, O(chunk_size * B + B d + n) memory; no (2B, 2B) matrix is held.

    Source: Qiu et al., algorithm 1; conventions of the authors' unimodal code.

    Example:
        >>> loss_fn = ISogCLRLoss(num_samples=100)
        >>> x, index = torch.eye(4), torch.tensor([3, 14, 15, 92])
        >>> loss_fn(x, x, index)  # 2 (0.1 (log 1 + 0.3) - 1)
        tensor(-1.9400)
        >>> loss_fn.temperature[[3, 5]]  # the gradient was log 1 + 0.3 - 0; sample 5 was not there
        tensor([0.0955, 0.1000])
    """

    def __init__(
        self,
        num_samples: int,
        *,
        rho: float = 0.3,
        tau_init: float = 0.1,
        tau_min: float = 0.05,
        tau_max: float = 1.0,
        gamma: float = 0.8,
        eta: float = 0.03,
        beta: float = 0.5,
        grad_clip: float | None = 3.0,
        individual: bool = True,
        warmup_steps: int = 0,
        distributed: bool = False,
        chunk_size: int | None = None,
    ):
        super().__init__(
            (num_samples,), rho, tau_init, tau_min, tau_max, gamma, eta, beta, grad_clip, individual, warmup_steps,
            distributed, chunk_size,
        )  # fmt: skip

    def forward(self, view1: Tensor, view2: Tensor, index: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            view1: shape ``(B, d)``, floating point; rows are L2-normalized here.
            view2: shape ``(B, d)``; row ``i`` is the other view of the same sample.
            index: int64, shape ``(B,)``, in [0, num_samples): which sample each row is; at least two of them differ.

        Returns:
            Shape ``()``, float32 or wider.

        Raises:
            TypeError, ValueError: for a wrong type, shape or index, naming the argument.
        """
        return self._loss(("view1", "view2"), view1, view2, index)

    def _slots(self, index: Tensor) -> Tensor:
        return index.repeat(2)

    def _log_mean(self, view1: Tensor, view2: Tensor, index: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        same, log_count, total, views = self._batch(index, view1, view2)
        negatives = ops.streamed_logsumexp(
            torch.cat([view1, view2]),
            torch.cat(views),
            temperature=tau,
            exclude=torch.cat([same, same + total], dim=1).repeat(2, 1),
            chunk_size=self.chunk_size,
        )
        return negatives - math.log(2) - log_count.repeat(2), (view1 * view2).sum(1).repeat(2)


class BimodalISogCLRLoss(_IndividualTemperatures):
    r"""iSogCLR for pairs of image and text: a temperature for every image and one for every text.

    Images are anchors against the texts of the *other* pairs and texts against the images. As in the authors' code for this case, :math:`s` averages
    :math:`e^{h_{ij}/\tau}`, with the positive subtracted. Value, gradient, state and repeated samples are otherwise as in :class:`ISogCLRLoss`: the
    value is :math:`\frac1B\sum_i\tau_i(\log s_i+\rho)+\tau_i'(\log s_i'+\rho)` (eq-isogclr-bimodal).

    Args:
        num_samples: n, number of pairs in the training set, at least 2.
        rho: radius :math:`\rho\ge0`, in nats. It must be below the logarithm of the number of negatives, else every temperature falls to ``tau_min``.
        tau_init, tau_min, tau_max, gamma, eta, beta, grad_clip, individual, warmup_steps, distributed, chunk_size: as in :class:`ISogCLRLoss`.

    Attributes:
        log_inner: buffer, shape ``(2, n)``, float32: first the images', then the texts'; -inf where a sample is new.
        temperature: buffer, shape ``(2, n)``.
        temperature_momentum: buffer, shape ``(2, n)``.
        steps: buffer, calls in training so far.

    Raises:
        TypeError, ValueError: for a wrong number, naming the argument.

    Complexity: O(B^2 d) time, O(chunk_size * B + B d + n) memory.

    Source: Qiu et al., the bimodal objective (section 4); conventions of the authors' bimodal code and of LibAUC's ``GCLoss_v2``.

    Example:
        >>> loss_fn = BimodalISogCLRLoss(num_samples=100)
        >>> x = torch.eye(4)
        >>> loss_fn(x, x, torch.arange(4))  # 2 (0.01 (-100 + 6))
        tensor(-1.8800)
        >>> loss_fn.temperature.shape
        torch.Size([2, 100])
    """

    def __init__(
        self,
        num_samples: int,
        *,
        rho: float = 6.0,
        tau_init: float = 0.01,
        tau_min: float = 0.005,
        tau_max: float = 0.05,
        gamma: float = 0.8,
        eta: float = 1e-3,
        beta: float = 0.5,
        grad_clip: float | None = 5.0,
        individual: bool = True,
        warmup_steps: int = 0,
        distributed: bool = False,
        chunk_size: int | None = None,
    ):
        super().__init__(
            (2, num_samples), rho, tau_init, tau_min, tau_max, gamma, eta, beta, grad_clip, individual, warmup_steps,
            distributed, chunk_size,
        )  # fmt: skip

    def forward(self, image: Tensor, text: Tensor, index: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            image: shape ``(B, d)``, floating point; rows are L2-normalized here.
            text: shape ``(B, d)``; row ``i`` belongs to row ``i`` of ``image``.
            index: int64, shape ``(B,)``, in [0, num_samples): which pair each row is; at least two of them differ.

        Returns:
            Shape ``()``, float32 or wider.

        Raises:
            TypeError, ValueError: for a wrong type, shape or index, naming the argument.
        """
        return self._loss(("image", "text"), image, text, index)

    def _slots(self, index: Tensor) -> Tensor:
        return torch.cat([index, index + self.num_samples])

    def _log_mean(self, image: Tensor, text: Tensor, index: Tensor, tau: Tensor) -> tuple[Tensor, float]:
        same, log_count, _, (images, texts) = self._batch(index, image, text)
        negatives = [
            ops.streamed_logsumexp(anchors, others, temperature=t, exclude=same, chunk_size=self.chunk_size)
            for anchors, others, t in zip((image, text), (texts, images), tau.chunk(2), strict=True)
        ]
        positive = (image * text).sum(1).repeat(2) / tau
        return torch.cat(negatives) - log_count.repeat(2) - positive, 0.0
