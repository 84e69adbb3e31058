r"""The Z-loss, and an output layer whose exact update does not cost more with more classes.

The method of *The Z-loss: a shift and scale invariant classification loss belonging to the Spherical Family* (de Brébisson and
Vincent, arXiv 1604.08859) and of the factored layer that it needs (Vincent, de Brébisson and Bouthillier, NIPS 2015, arXiv
1412.7091): the losses that see a vector of logits only through its sum, its sum of squares and the target's logit, as functions
of the logits or of these three numbers, and :class:`SphericalOutput`, which computes the three numbers, the gradient and the SGD
update without the logits. Equation labels are those of the chapter ``classification/z_loss``.

Notation: ``logits`` (B, D) holds :math:`o=Wh` a row, ``target`` (B,) the class :math:`c`, :math:`d` is the width of :math:`h`;
``total`` is :math:`s=\sum_ko_k`, ``total_sq`` is :math:`q=\sum_ko_k^2`, ``target_logit`` is :math:`o_c`.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossbook import _checks, ops

# ---------------------------------------------------------------------------------------------------------------------
# The losses
# ---------------------------------------------------------------------------------------------------------------------


def _classified(logits: Tensor, target: Tensor) -> Tensor:
    """Check a batch of logits and its classes; give back the logits, half precision as float32."""
    _checks.floating("logits", logits, 2)
    if logits.shape[1] < 2:
        raise ValueError(f"logits must have at least 2 columns, one for each class, got shape {tuple(logits.shape)}")
    _checks.indices("target", target, logits.shape[1], len(logits))
    return _checks.wide(logits)


def _vectors(total: Tensor, total_sq: Tensor, target_logit: Tensor, num_classes: int) -> int:
    """Check three statistics; give back the number of classes."""
    _checks.floating("total", total, 1)
    _checks.like("total_sq", total_sq, "total", total, 1)
    _checks.like("target_logit", target_logit, "total", total, 1)
    return _checks.positive_int("num_classes", num_classes, 2)


def z_loss(
    logits: Tensor, target: Tensor, *, a: float = 0.3, b: float = 10.0, eps: float = 1e-12, reduction: str = "mean"
) -> Tensor:
    r"""The Z-loss of explicit logits: a softplus of the standardized target logit.

    :math:`L=\frac1a\log(1+e^{a(b-z_c)})` with :math:`z_c=(o_c-\mu)/\sigma` (eq-z_loss-loss), :math:`\mu` and :math:`\sigma` the mean and
    the population deviation of the row. Adding a constant to a row, or multiplying it by a positive number, changes nothing.

    Args:
        logits: shape ``(B, D)``, floating point, D at least 2; half precision is computed in float32.
        target: int64, shape ``(B,)``, in [0, D).
        a: sharpness, greater than 0; large is a hinge at ``b``, small is linear.
        b: the z-score that is asked of the target.
        eps: a row whose deviation is not above ``eps`` has no z-scores: it is given :math:`z_c=0` and no gradient.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none".

    Raises:
        TypeError, ValueError: for a wrong type, shape, class, number or reduction, naming the argument.

    Complexity: O(BD) time and memory.

    Source: de Brébisson and Vincent, section 3.

    Example:
        >>> z_loss(torch.tensor([[1.0, 0.0, 0.0, -1.0]]), torch.tensor([0]), a=1.0, b=0.0)  # z = sqrt(2)
        tensor(0.2176)
    """
    logits = _classified(logits, target)
    # The loss does not see a shift: taking the mean out first keeps the digits of the variance, and no gradient passes there.
    logits = logits - logits.mean(1, keepdim=True).detach()
    statistics = spherical_statistics(logits, target)
    return _checks.reduced(z_loss_from_statistics(*statistics, logits.shape[1], a=a, b=b, eps=eps), reduction)


class _ThreeNumbers(torch.autograd.Function):
    """Sum, sum of squares and target logit of each row; their gradient is one pass over the logits (eq-z_loss-gradient)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits, target):
        squares = torch.linalg.vecdot(logits, logits, dim=1)
        return logits.sum(1), squares, logits.gather(1, target[:, None]).squeeze(1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, by_total, by_total_sq, by_target):
        logits, target = ctx.saved_tensors
        shared = torch.addcmul(by_total[:, None], logits, 2 * by_total_sq[:, None])
        return shared.scatter_add(1, target[:, None], by_target[:, None]), None


def spherical_statistics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""The three numbers of each row that a spherical loss may see: :math:`s=\sum_ko_k`, :math:`q=\sum_ko_k^2` and :math:`o_c`.

    Args:
        logits: shape ``(B, D)``, floating point, D at least 2; half precision is computed in float32.
        target: int64, shape ``(B,)``, in [0, D).

    Returns:
        ``total``, ``total_sq`` and ``target_logit``, each of shape ``(B,)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or class, naming the argument.

    Complexity: O(BD) time, and O(BD) memory in the backward pass only. There is no forward mode.

    Source: Vincent et al. 2015, section 2.

    Example:
        >>> spherical_statistics(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([2]))
        (tensor([6.]), tensor([14.]), tensor([3.]))
    """
    return _ThreeNumbers.apply(_classified(logits, target), target)


def z_loss_from_statistics(
    total: Tensor,
    total_sq: Tensor,
    target_logit: Tensor,
    num_classes: int,
    *,
    a: float = 0.3,
    b: float = 10.0,
    eps: float = 1e-12,
) -> Tensor:
    r"""The Z-loss (eq-z_loss-loss) from three statistics a row, with :math:`\mu=s/D` and :math:`\sigma^2=q/D-\mu^2` (eq-z_loss-moments).

    The difference loses digits where :math:`|\mu|\gg\sigma`; a centred :class:`SphericalOutput` has :math:`\mu=0`. A row in which it cannot be
    told from rounding (:math:`\sigma^2` below 8 units of the last place of :math:`q/D`) counts as one of equal logits.

    Args:
        total: :math:`s`, shape ``(B,)``, floating point.
        total_sq: :math:`q`, shape ``(B,)``.
        target_logit: :math:`o_c`, shape ``(B,)``.
        num_classes: D, at least 2.
        a, b, eps: as in :func:`z_loss`.

    Returns:
        Shape ``(B,)``, differentiable in the three statistics.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Source: de Brébisson and Vincent, section 3.

    Example:
        >>> one = torch.tensor([1.0])
        >>> z_loss_from_statistics(0 * one, 2 * one, one, 4, a=1.0, b=0.0)
        tensor([0.2176])
    """
    num_classes = _vectors(total, total_sq, target_logit, num_classes)
    a, b, eps = _checks.positive_number("a", a), _checks.number("b", b), _checks.number("eps", eps, 0, 1e18)
    mean = total / num_classes
    variance = total_sq / num_classes - mean.square()
    # What is left of q/D - mu^2 when all logits are equal is rounding: a few units in the last place of q/D.
    spread = variance > (total_sq.detach() / num_classes * (8 * torch.finfo(total_sq.dtype).eps)).clamp(min=eps**2)
    z = ((target_logit - mean) / variance.where(spread, 1.0).sqrt()).where(spread, 0.0)
    return -F.logsigmoid(a * (z - b)) / a  # softplus is linear above its threshold, which costs digits


def squared_error_from_statistics(total: Tensor, total_sq: Tensor, target_logit: Tensor, num_classes: int) -> Tensor:
    r"""Squared distance of the logits to the one-hot target, :math:`q-2o_c+1` (eq-z_loss-family).

    Args:
        total, total_sq, target_logit: the statistics, each of shape ``(B,)``; ``total`` is not used.
        num_classes: D, at least 2; not used.

    Returns:
        Shape ``(B,)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Source: Vincent et al. 2015, section 3.

    Example:
        >>> squared_error_from_statistics(*spherical_statistics(torch.tensor([[1.0, 2.0]]), torch.tensor([0])), 2)
        tensor([4.])
    """
    _vectors(total, total_sq, target_logit, num_classes)
    return total_sq - 2 * target_logit + 1


def taylor_softmax_from_statistics(total: Tensor, total_sq: Tensor, target_logit: Tensor, num_classes: int) -> Tensor:
    r"""Minus the log of the softmax in which :math:`1+o+o^2/2` replaces :math:`e^o` (eq-z_loss-family).

    Args:
        total, total_sq, target_logit: the statistics, each of shape ``(B,)``.
        num_classes: D, at least 2.

    Returns:
        Shape ``(B,)``, greater than 0.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Source: de Brébisson and Vincent 2016, arXiv 1511.05042 (log-Taylor softmax).

    Example:
        >>> taylor_softmax_from_statistics(*spherical_statistics(torch.zeros(1, 4), torch.tensor([0])), 4)  # log 4
        tensor([1.3863])
    """
    num_classes = _vectors(total, total_sq, target_logit, num_classes)
    return (num_classes + total + total_sq / 2).log() - (1 + target_logit + target_logit.square() / 2).log()


def spherical_softmax_from_statistics(
    total: Tensor, total_sq: Tensor, target_logit: Tensor, num_classes: int, *, eps: float = 1e-3
) -> Tensor:
    r"""Minus the log of the softmax in which :math:`o^2+\epsilon` replaces :math:`e^o` (eq-z_loss-family).

    Args:
        total, total_sq, target_logit: the statistics, each of shape ``(B,)``; ``total`` is not used.
        num_classes: D, at least 2.
        eps: :math:`\epsilon>0`, which keeps the loss of a zero logit finite.

    Returns:
        Shape ``(B,)``, greater than 0.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Source: de Brébisson and Vincent 2016, arXiv 1511.05042 (log-spherical softmax).

    Example:
        >>> spherical_softmax_from_statistics(*spherical_statistics(torch.ones(1, 4), torch.tensor([0])), 4)  # log 4
        tensor([1.3863])
    """
    num_classes, eps = _vectors(total, total_sq, target_logit, num_classes), _checks.positive_number("eps", eps)
    return (total_sq + num_classes * eps).log() - (target_logit.square() + eps).log()


# ---------------------------------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------------------------------


def in_top_k_guarantee(z: Tensor, num_classes: int) -> Tensor:
    r"""The k for which a z-score guarantees a place among the first k: :math:`\max(1,\lfloor D/(1+z^2)\rfloor)` for :math:`z>0` (eq-z_loss-rank).

    Args:
        z: z-scores of the target, any shape, floating point; of the population, so at most :math:`\sqrt{D-1}`.
        num_classes: D, at least 2.

    Returns:
        int64, the shape of ``z``; D, which guarantees nothing, where ``z`` is not above 0.

    Raises:
        TypeError, ValueError: for a wrong type or number, naming the argument.

    Source: own (chapter, thm-z_loss-rank); Cantelli's inequality.

    Example:
        >>> in_top_k_guarantee(torch.tensor([44.72, 3.0, -1.0]), 10_000)
        tensor([    4,  1000, 10000])
    """
    _checks.floating("z", z)
    num_classes = _checks.positive_int("num_classes", num_classes, 2)
    # The guard: at z = sqrt(D - 1), rounded, the quotient may be a little below the 1 that it is.
    guard = 1 + max(1e-9, 4 * torch.finfo(z.dtype).eps)
    k = (guard * num_classes / (1 + z.double().square())).floor().clamp(min=1)
    return k.where(z > 0, float(num_classes)).long()


def topk_error(logits: Tensor, target: Tensor, ks: Sequence[int]) -> Tensor:
    """Share of rows whose target is not among the k largest logits; a class that ties with the target ranks before it.

    Args:
        logits: shape ``(B, D)``, floating point.
        target: int64, shape ``(B,)``, in [0, D).
        ks: the numbers k, each at least 1.

    Returns:
        float64, shape ``(len(ks),)``, in [0, 1].

    Raises:
        TypeError, ValueError: for a wrong type, shape, class or k, naming the argument.

    Complexity: O(BD) time and memory.

    Source: de Brébisson and Vincent, section 4 (top-k error).

    Example:
        >>> topk_error(torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), torch.tensor([0, 2]), (1, 2, 3))
        tensor([0.5000, 0.5000, 0.0000], dtype=torch.float64)
    """
    logits = _classified(logits, target)
    if not isinstance(ks, Sequence):
        raise TypeError(f"ks must be a sequence of integers, got {type(ks).__name__}")
    ks = torch.tensor([_checks.positive_int("ks", k) for k in ks], device=logits.device)
    below = (logits < logits.gather(1, target[:, None])).sum(1, dtype=torch.int32)
    rank = logits.shape[1] - below  # 1 for the first; what is not below counts, so do ties and NaN
    return (rank[:, None] > ks).double().mean(0)


# ---------------------------------------------------------------------------------------------------------------------
# The factored layer
# ---------------------------------------------------------------------------------------------------------------------

_CHUNK = 8192  # rows of V that a pass over all classes holds at a time


@dataclass
class _Batch:
    """What a forward pass leaves for the gradient and the step; float64."""

    hidden: Tensor  # H
    hidden_gram: Tensor  # H Q
    target_rows: Tensor  # the rows of W that the batch asks for
    target: Tensor
    total: Tensor
    column_sum: Tensor
    partials: tuple[Tensor, Tensor, Tensor] | None = None  # of the loss, in total, total_sq and target_logit

    def gradient(self, partials: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The gradient for H (eq-z_loss-hidden)."""
        by_total, by_total_sq, by_target = (p[:, None] for p in partials)
        return 2 * by_total_sq * self.hidden_gram + by_total * self.column_sum + by_target * self.target_rows


class _Statistics(torch.autograd.Function):
    """Three statistics of the logits of a batch, from H; the backward pass hands the partials to the batch."""

    @staticmethod
    def forward(ctx, hidden, batch):
        ctx.batch, ctx.width, ctx.dtype = batch, hidden.shape[1], hidden.dtype
        h = batch.hidden
        return batch.total.clone(), (h * batch.hidden_gram).sum(1), (h * batch.target_rows).sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *partials):
        batch = ctx.batch
        before = batch.partials or (0.0, 0.0, 0.0)  # as for .grad: a second backward pass adds
        batch.partials = tuple(old + new for old, new in zip(before, partials, strict=True))
        with torch.autocast(batch.hidden.device.type, enabled=False):
            return batch.gradient(partials)[:, : ctx.width].to(ctx.dtype), None


class Refactorization(NamedTuple):
    """What one refactorization of :class:`SphericalOutput` found.

    Args:
        steps: steps since the refactorization before.
        write_error: relative write error of the step that called for it (eq-z_loss-write); 0 if it was called for by hand.
        gram_error: relative error of the maintained Gram matrix, against the one computed anew.

    Source: the chapter; the authors' code refactors after a fixed number of steps.
    """

    steps: int
    write_error: float
    gram_error: float


class SphericalOutput(nn.Module):
    r"""An output layer of D classes for spherical losses, trained by exact SGD at a cost that does not depend on D.

    Keeps :math:`W=VU+\mathbf 1\omega^\top` (eq-z_loss-factors) with :math:`U^{-1}`, the Gram matrix :math:`Q=W^\top W` and the column sums
    :math:`\bar w=W^\top\mathbf 1`. ``layer(hidden, target)`` gives the three statistics from which a loss is computed;
    ``loss.backward()`` sends the exact gradient to ``hidden`` (``torch.func`` does not pass through the layer); ``layer.step(lr)`` is the exact SGD step on W. All state is in
    buffers: no optimizer may touch it. V has the layer's ``dtype``; what is :math:`d\times d` or smaller is float64, and so are the statistics.

    Each step measures how exactly its change arrives in W (eq-z_loss-write). Where the error is above ``tolerance`` the step is done
    together with a *refactorization* instead, :math:`V\leftarrow VU+\mathbf 1\omega^\top,\ U\leftarrow I`, with Q and :math:`\bar w` computed anew; so the
    period is not a hyperparameter. ``refactorizations`` lists what was found each time.

    Args:
        hidden_features: width of ``hidden``.
        num_classes: D, at least 2.
        bias: append the constant 1 to ``hidden``; then d is ``hidden_features + 1``.
        init_std: deviation of the normal initialization of W, greater than 0.
        centred: subtract the mean row from the initial W, which a shift-invariant loss does not see: its logits then have mean 0
            from the start, and keep it.
        tolerance: write error above which the layer refactors, from the rounding unit of the dtype to 1; None is 1e-5 in float32 and
            1e-12 in float64. With 1 it refactors where a step would be lost, and where :meth:`refactor` is called.
        dtype: float32 or float64, of V; None is torch's default.
        device: None is torch's default.

    Raises:
        TypeError, ValueError: for a wrong type or number, naming the argument.

    Complexity: a forward pass and a step O(m d^2 + m^2 d + m^3) time for m rows, and m rows of V read and written; a refactorization
    O(D d^2) time; O(D d + d^2) memory.

    Source: Vincent et al. 2015, sections 3 and 4; the measured period is ours (chapter, *When to refactor*).

    Example:
        >>> layer = SphericalOutput(8, 1000, dtype=torch.float64)
        >>> hidden, target = torch.randn(4, 8), torch.tensor([1, 5, 5, 999])
        >>> loss = z_loss_from_statistics(*layer(hidden, target), 1000).mean()
        >>> loss.backward()
        >>> layer.step(lr=10.0)
        >>> layer.weight.shape, layer.gram_error() < 1e-12
        (torch.Size([1000, 9]), True)
    """

    def __init__(
        self,
        hidden_features: int,
        num_classes: int,
        *,
        bias: bool = True,
        init_std: float = 0.1,
        centred: bool = True,
        tolerance: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.hidden_features = _checks.positive_int("hidden_features", hidden_features)
        self.num_classes = _checks.positive_int("num_classes", num_classes, 2)
        self.bias = bool(bias)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        if tolerance is not None:
            tolerance = _checks.number("tolerance", tolerance, torch.finfo(dtype).eps, 1)
        d, wide = self.hidden_features + self.bias, dict(dtype=torch.float64, device=device)
        weight = torch.randn(self.num_classes, d, dtype=dtype, device=device)
        self.register_buffer("V", weight.mul_(_checks.positive_number("init_std", init_std)))
        self.register_buffer("U", torch.eye(d, **wide))
        self.register_buffer("U_inv", torch.eye(d, **wide))
        self.register_buffer("omega", torch.zeros(d, **wide))
        self.register_buffer("gram", torch.zeros(d, d, **wide))
        self.register_buffer("column_sum", torch.zeros(d, **wide))
        self.refactorizations: list[Refactorization] = []
        self.write_error = 0.0
        self._given, self._steps, self._batch = tolerance, 0, None
        self._set_tolerance()
        self._sum_over_classes()
        if centred:  # eq-z_loss-centre
            self.omega -= self.column_sum / self.num_classes
            self.gram -= torch.outer(self.column_sum, self.column_sum) / self.num_classes
            self.column_sum.zero_()

    def extra_repr(self) -> str:
        return f"{self.hidden_features}, {self.num_classes}, bias={self.bias}, tolerance={self.tolerance:g}, dtype={self.V.dtype}"

    # -- training -----------------------------------------------------------------------------------------------------

    def forward(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The statistics of the logits (eq-z_loss-forward), as the losses ``*_from_statistics`` take them.

        One batch a step: gradients of several forward passes are not accumulated, and a warning says so.

        Args:
            hidden: shape ``(B, hidden_features)``, floating point; its gradient is exact.
            target: int64, shape ``(B,)``, in [0, D).

        Returns:
            ``total``, ``total_sq`` and ``target_logit``, float64, each of shape ``(B,)``. In training mode the batch is kept for
            :meth:`step`; a second call replaces it.
        """
        h = self._checked(hidden)
        _checks.indices("target", target, self.num_classes, len(h))
        if target.device.type != "cpu" and not bool(((target >= 0) & (target < self.num_classes)).all()):
            raise ValueError(f"target must lie in [0, {self.num_classes})")  # a negative index would take another row
        with torch.no_grad(), torch.autocast(h.device.type, enabled=False):
            rows = self.V[target].to(torch.float64) @ self.U + self.omega
            total, column_sum = h @ self.column_sum, self.column_sum.clone()
            batch = _Batch(h, h @ self.gram, rows, target, total, column_sum)
        if self.training and torch.is_grad_enabled():
            if self._batch is not None and self._batch.partials is not None:
                warnings.warn(
                    "the gradient of the last batch is discarded: call step before the next forward", stacklevel=4
                )
            self._batch = batch
            if not hidden.requires_grad:  # W learns from features that do not
                hidden = hidden.detach().requires_grad_()
        return _Statistics.apply(hidden, batch)

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float = 0.0) -> None:
        r"""One exact SGD step on W with the last batch, :math:`W\leftarrow(1-\eta\lambda)(W-\eta\,\partial L/\partial W)` (thm-z_loss-step).

        Args:
            lr: :math:`\eta`, greater than 0.
            weight_decay: :math:`\lambda\ge0`, with :math:`\eta\lambda<1`. ``torch.optim.SGD`` decays W before the step, not after it; that differs by
                :math:`\eta^2\lambda` times the gradient.

        The gradient is what ``backward`` gave: factors of a gradient scaler must be taken out of ``lr``, and neither clipping nor the
        averages of ``DistributedDataParallel`` reach W.

        Raises:
            RuntimeError: no forward and backward pass in training mode since the last step.
            ValueError: a number out of range, or a step that is not finite; W is then as before, and the batch is dropped.
        """
        lr, decay = _checks.positive_number("lr", lr), _checks.number("weight_decay", weight_decay, low=0)
        if lr * decay >= 1:
            raise ValueError(f"weight_decay must be below 1 / lr = {1 / lr:g}, got {decay}")
        batch = self._batch
        if batch is None or batch.partials is None:
            raise RuntimeError("step needs a forward and a backward pass in training mode since the last step")
        self._batch = None
        with torch.autocast(self.V.device.type, enabled=False):
            self._update(batch, lr, 1 - lr * decay)

    def _update(self, batch: _Batch, lr: float, keep: float) -> None:
        h, (by_total, by_total_sq, by_target) = batch.hidden, batch.partials
        gamma = 2 * lr * by_total_sq[:, None]

        def times_a(x: Tensor) -> Tensor:  # X A with A = I - H' Gamma H
            return x - (x @ h.T) @ (gamma * h)

        # The summaries, with the old Q, rows and sums (eq-z_loss-gram).
        gradient, products = batch.gradient(batch.partials), self._output_products(batch)
        cross = gradient.T @ h
        gram = self.gram - lr * (cross + cross.T) + lr * (lr * (h.T @ products @ h))
        column_sum = times_a(self.column_sum[None])[0] - lr * (self.num_classes * by_total + by_target) @ h
        # The factors (eq-z_loss-factors-update): X = H U_new^-1 comes from one solve, and gives the inverse, too.
        u, omega = times_a(self.U), times_a(self.omega[None])[0] - lr * by_total @ h
        system = torch.eye(len(h), dtype=h.dtype, device=h.device) - (h @ h.T) * gamma.T
        x = torch.linalg.solve_ex(system, h @ self.U_inv).result
        u_inv = self.U_inv + h.T @ (gamma * x)
        # The change of the target rows, in V and in W; classes that repeat in the batch add up.
        classes, place = batch.target.unique(return_inverse=True)
        old = self.V[classes].to(torch.float64)
        wanted = torch.zeros_like(old).index_add_(0, place, -lr * by_target[:, None] * h)
        new = (old + torch.zeros_like(old).index_add_(0, place, -lr * by_target[:, None] * x)).to(self.V.dtype)
        arrived, rows = (new.to(torch.float64) - old) @ u, torch.zeros_like(old)
        rows[place] = batch.target_rows
        write_error = (arrived - wanted).norm() / rows.norm()  # eq-z_loss-write
        finite = [torch.isfinite(x).all() for x in (u, omega, gram, column_sum, wanted)]
        write_error, finite = torch.stack(
            [write_error, torch.stack(finite).all().to(write_error)]
        ).tolist()  # one transfer
        if not finite:
            raise ValueError("the step must be finite, got NaN or infinity: look at the loss's gradient and at lr")
        self._steps += 1
        self._copy(U=u, omega=omega, gram=gram, column_sum=column_sum)
        if write_error <= self._limit:
            self._copy(U_inv=u_inv)
            self.write_error = write_error
            self.V[classes] = new
        else:  # NaN from a singular system comes here, too: nothing below needs the inverse
            self._refactor(write_error, classes, wanted)
        if keep != 1:
            self._copy(U=keep * self.U, U_inv=self.U_inv / keep, omega=keep * self.omega)
            self._copy(gram=keep**2 * self.gram, column_sum=keep * self.column_sum)

    def _output_products(self, batch: _Batch) -> Tensor:
        """G' G of the output gradients, (m, m), without G (eq-z_loss-products)."""
        by_total, by_total_sq, by_target = batch.partials
        h, twice = batch.hidden, 2 * by_total_sq[:, None]
        same = (batch.target[:, None] == batch.target).to(h.dtype)
        # G = 1 Ls' + 2 W H' Lq + E Lc: three squares, then the three mixed products and their transposes.
        squares = twice * (h @ batch.hidden_gram.T) * twice.T
        squares = (
            squares + self.num_classes * torch.outer(by_total, by_total) + same * torch.outer(by_target, by_target)
        )
        mixed = twice * ((h @ batch.target_rows.T) * by_target + batch.total[:, None] * by_total)
        mixed = mixed + torch.outer(by_total, by_target)
        return squares + mixed + mixed.T

    # -- refactorization ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refactor(self) -> None:
        r""":math:`V\leftarrow VU+\mathbf 1\omega^\top`, :math:`U\leftarrow I`, :math:`\omega\leftarrow0`; Q and :math:`\bar w` are computed anew. W stays.

        Complexity: O(D d^2) time, O(d^2) memory beside V. A forward pass that waits for its :meth:`step` stays valid.
        """
        self._refactor(0.0)

    def _refactor(self, write_error: float, classes: Tensor | None = None, change: Tensor | None = None) -> None:
        for rows in self.V.split(_CHUNK):
            rows.copy_(rows.to(torch.float64) @ self.U + self.omega)
        if classes is not None:
            self.V[classes] = (self.V[classes].to(torch.float64) + change).to(self.V.dtype)
        identity = torch.eye(len(self.U), dtype=torch.float64, device=self.V.device)
        self._copy(U=identity, U_inv=identity, omega=torch.zeros_like(self.omega))
        self.write_error = 0.0
        maintained = self.gram.clone()
        self._sum_over_classes()
        gram_error = ((maintained - self.gram).norm() / self.gram.norm()).item()
        self.refactorizations.append(Refactorization(self._steps, write_error, gram_error))
        self._steps = 0
        # If Q was worse than the writes, refactor earlier next time; if it was better, as late as the tolerance allows.
        if 0 < write_error <= 1 and gram_error > 0:
            self._limit = min(self.tolerance, self._limit * min(max(self.tolerance / gram_error, 0.1), 10.0))

    def _sum_over_classes(self) -> None:
        """Q and the column sums of V, in float64."""
        gram, column_sum = torch.zeros_like(self.gram), torch.zeros_like(self.column_sum)
        for rows in self.V.split(_CHUNK):
            rows = rows.to(torch.float64)
            gram.addmm_(rows.T, rows)
            column_sum += rows.sum(0)
        self._copy(gram=gram, column_sum=column_sum)

    # -- what costs O(D), for evaluation --------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """W, shape ``(D, d)``, in the layer's dtype; O(D d^2) time. Its last column is the bias, if there is one."""
        with torch.no_grad():
            return torch.cat([(v.to(torch.float64) @ self.U + self.omega).to(v.dtype) for v in self.V.split(_CHUNK)])

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """All logits, shape ``(B, D)``, in the layer's dtype, without a gradient; O(B D d) time."""
        h = self._checked(hidden)
        with torch.autocast(h.device.type, enabled=False):
            return (h @ self.U.T).to(self.V.dtype) @ self.V.T + (h @ self.omega)[:, None].to(self.V.dtype)

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits of each row and their classes, both ``(B, k)``, without a gradient; O(B D d) time."""
        h = self._checked(hidden)
        with torch.autocast(h.device.type, enabled=False):
            values, classes = ops.streamed_topk((h @ self.U.T).to(self.V.dtype), self.V, k)
            return values + (h @ self.omega)[:, None].to(self.V.dtype), classes

    def condition_number(self) -> float:
        """Of U: the digits that reading and writing W through the factors may cost; O(d^3) time."""
        return torch.linalg.cond(self.U).item()

    @torch.no_grad()
    def gram_error(self) -> float:
        r"""Relative error :math:`\|Q-W^\top W\|/\|W^\top W\|` of the maintained Gram matrix, in Frobenius norm; O(D d^2) time."""
        exact = torch.zeros_like(self.gram)
        for rows in self.V.split(_CHUNK):
            rows = rows.to(torch.float64) @ self.U + self.omega
            exact.addmm_(rows.T, rows)
        return ((self.gram - exact).norm() / exact.norm()).item()

    # -- plumbing -------------------------------------------------------------------------------------------------------

    def _set_tolerance(self) -> None:
        default = 1e-5 if self.V.dtype == torch.float32 else 1e-12
        self.tolerance = default if self._given is None else max(self._given, torch.finfo(self.V.dtype).eps)
        self._limit = self.tolerance  # what the write error is held against; see _refactor

    def _checked(self, hidden: Tensor) -> Tensor:
        """``hidden`` as H: in float64, cut from its graph, with the constant feature."""
        _checks.floating("hidden", hidden, 2)
        if hidden.shape[1] != self.hidden_features:
            raise ValueError(f"hidden must have shape (B, {self.hidden_features}), got {tuple(hidden.shape)}")
        h = hidden.detach().to(torch.float64)
        return F.pad(h, (0, 1), value=1.0) if self.bias else h

    def _copy(self, **values: Tensor) -> None:
        """Write into buffers; what else holds them sees the change."""
        for name, value in values.items():
            getattr(self, name).copy_(value)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self._limit, self._steps], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        limit, steps = state.tolist()
        self._limit, self._steps = min(limit, self.tolerance), int(steps)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._batch = None
        if f"{prefix}V" in state_dict and state_dict[f"{prefix}V"].dtype != self.V.dtype:
            self.refactor()  # V has been rounded; Q and the column sums have not
            self._set_tolerance()  # what was learned about the writes of one dtype says nothing about the other's

    def _apply(self, fn, recurse=True):
        """Move and cast as every module does, but keep all except V in float64; a narrower V is summed anew."""
        dtype, before = fn(self.V.new_empty(1)).dtype, self.V.dtype
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"SphericalOutput can be float32 or float64, got {dtype}")
        if dtype != before:
            self.refactor()
        wide = {name: buffer for name, buffer in self.named_buffers(recurse=False) if name != "V"}
        super()._apply(fn, recurse)
        for name, buffer in wide.items():
            setattr(self, name, buffer.to(self.V.device))
        if dtype != before:
            self._sum_over_classes()
            self._set_tolerance()
        self._batch = None
        return self
