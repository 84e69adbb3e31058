r"""What the temperature of a contrastive loss does.

The method of *Understanding the Behaviour of Contrastive Loss* (Wang and Liu, CVPR 2021, arXiv 2012.09740): the softmax
contrastive loss, the distribution of its push over the negatives, its two limits in the temperature as losses of their own,
the losses on explicitly chosen hard negatives, and the measures of what a trained encoder has become: uniformity, tolerance,
alignment. Equation labels are those of the chapter ``similarity/temperature``.

Notation: ``positive`` (B,) holds :math:`s_{ii}`, ``negatives`` (B, K) holds :math:`s_{ij}, j\ne i`, and ``temperature`` is
:math:`\tau`. :math:`P_i` is the softmax over the positive and the negatives, :math:`r_i` over the negatives only. Logs are natural.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossbook import _checks, ops

# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


def _pairs(positive: Tensor, negatives: Tensor, mask: Tensor | None = None) -> Tensor | None:
    """Check one positive and K negatives a row; give back the checked mask."""
    _checks.floating("negatives", negatives, 2)
    _checks.floating("positive", positive, 1)
    if positive.dtype != negatives.dtype:
        raise TypeError(f"positive must have the dtype of negatives, {negatives.dtype}, got {positive.dtype}")
    if positive.shape[0] != negatives.shape[0]:
        raise ValueError(
            f"positive must have shape ({negatives.shape[0]},), one for each row of negatives, got {tuple(positive.shape)}"
        )
    return _checks.boolean_mask("mask", mask, negatives.shape)


def _column(temperature: float | Tensor) -> float | Tensor:
    """The temperature, shaped to divide a ``(B, K)`` tensor."""
    return temperature[:, None] if isinstance(temperature, Tensor) and temperature.ndim == 1 else temperature


def contrastive_loss(
    positive: Tensor,
    negatives: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Softmax contrastive loss of one positive against K negatives.

    :math:`\mathcal L_i = \log\bigl(1+\sum_{k\ne i} e^{(s_{ik}-s_{ii})/\tau}\bigr)` (eq-temperature-loss), with the positive in
    the denominator. Computed in the log domain, in the dtype of the similarities: finite as long as :math:`s/\tau` is.

    Args:
        positive: similarity to the positive, shape ``(B,)``, floating point.
        negatives: similarities to the negatives, shape ``(B, K)``.
        temperature: :math:`\tau>0`, a number, or a tensor of shape ``()`` or ``(B,)`` (differentiable).
        mask: bool, shape ``(B, K)``, true where a negative is used.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none"; at least 0.

    Raises:
        TypeError, ValueError: for a wrong type, shape, temperature, mask or reduction, naming the argument.

    Complexity: O(BK) time and memory.

    Source: Wang and Liu, eq. 1.

    Example:
        >>> s = torch.tensor([0.6]), torch.tensor([[0.8, 0.2]])
        >>> contrastive_loss(*s, temperature=0.5)
        tensor(1.0788)
    """
    mask = _pairs(positive, negatives, mask)
    temperature = _checks.temperature(temperature, len(positive))
    logits = negatives / _column(temperature)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    # log(1 + e^x) as -logsigmoid(-x): softplus is linear above its threshold, which costs the gradient its last digits.
    return _checks.reduced(-F.logsigmoid(positive / temperature - torch.logsumexp(logits, dim=1)), reduction)


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    symmetric: bool = False,
    reduction: str = "mean",
    distributed: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    r"""The contrastive loss of a batch of pairs: row ``i`` of ``key`` is the positive of row ``i`` of ``query``, the others its negatives.

    :math:`\mathcal L_i` of eq-temperature-loss with :math:`s_{ij}` the cosine of ``query[i]`` and ``key[j]``: cross-view negatives only,
    as in MoCo and CLIP. Nothing is detached, and no (B, B) matrix is held (:func:`lossbook.ops.streamed_logsumexp`).

    Args:
        query: shape ``(B, d)``, floating point, B > 1; rows are L2-normalized here.
        key: shape ``(B, d)``.
        temperature: :math:`\tau>0`, a number, or a tensor of shape ``()`` or ``(B,)`` (differentiable).
        symmetric: average, sample by sample, with the loss in which ``key`` asks and ``query`` answers.
        reduction: "none", "mean" or "sum" over the batch.
        distributed: take the negatives from the batches of all processes of the default group.
        chunk_size: rows of similarities held at a time; None chooses.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none"; float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape, temperature or reduction, naming the argument.

    Complexity: O(B^2 d) time, O(chunk_size * B + B d) memory.

    Source: Wang and Liu, eq. 1; van den Oord et al. 2018 (InfoNCE).

    Example:
        >>> x = torch.eye(4)
        >>> info_nce_loss(x, x, temperature=0.5)  # log(1 + 3 e^-2)
        tensor(0.3408)
    """
    _checks.floating("query", query, 2)
    _checks.like("key", key, "query", query, 2)
    rows = query.shape[0]
    temperature = _checks.temperature(temperature, rows)
    query, key = _unit_rows(query), _unit_rows(key)
    own = ops.local_rows(rows, query.device) if distributed else torch.arange(rows, device=query.device)
    positive = (query * key).sum(1) / temperature

    def one_way(anchors: Tensor, others: Tensor) -> Tensor:
        others = ops.gather(others) if distributed else others
        if len(others) < 2:
            raise ValueError(f"query must have at least 2 rows, so that there is a negative, got {len(others)}")
        return -F.logsigmoid(
            positive
            - ops.streamed_logsumexp(anchors, others, temperature=temperature, exclude=own, chunk_size=chunk_size)
        )

    loss = one_way(query, key)
    if symmetric:
        loss = (loss + one_way(key, query)) / 2
    return _checks.reduced(loss, reduction)


def nt_xent_loss(
    view1: Tensor,
    view2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    distributed: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    r"""SimCLR's loss: both views of every sample are anchors, and negatives come from both views, 2B - 2 for each anchor.

    :math:`\mathcal L_i` of eq-temperature-loss over the 2B anchors. No (2B, 2B) matrix is held.

    Args:
        view1: shape ``(B, d)``, floating point, B > 1; rows are L2-normalized here.
        view2: shape ``(B, d)``; row ``i`` is the other view of sample ``i``.
        temperature: :math:`\tau>0`, a number, or a tensor of shape ``()`` (differentiable).
        reduction: "none", "mean" or "sum" over the 2B anchors.
        distributed: take the negatives from the batches of all processes of the default group.
        chunk_size: rows of similarities held at a time; None chooses.

    Returns:
        Shape ``()``, or ``(2B,)`` with reduction "none": first the anchors of ``view1``, then those of ``view2``.

    Raises:
        TypeError, ValueError: for a wrong type, shape, temperature or reduction, naming the argument.

    Complexity: O(B^2 d) time, O(chunk_size * B + B d) memory.

    Source: Chen et al. 2020 (SimCLR), eq. 1; the loss that Wang and Liu's eq. 1 abstracts.

    Example:
        >>> x = torch.eye(4)
        >>> nt_xent_loss(x, x, temperature=0.5)  # log(1 + 6 e^-2)
        tensor(0.5944)
    """
    _checks.floating("view1", view1, 2)
    _checks.like("view2", view2, "view1", view1, 2)
    temperature = _checks.temperature(temperature)
    view1, view2 = _unit_rows(view1), _unit_rows(view2)
    rows = len(view1)
    first, second = (ops.gather(v) if distributed else v for v in (view1, view2))
    total = len(first)
    if total < 2:
        raise ValueError(f"view1 must have at least 2 rows, so that there is a negative, got {total}")
    own = ops.local_rows(rows, view1.device) if distributed else torch.arange(rows, device=view1.device)
    both_views = torch.stack([own, own + total], dim=1)  # an anchor and its positive are not negatives
    negatives = ops.streamed_logsumexp(
        torch.cat([view1, view2]),
        torch.cat([first, second]),
        temperature=temperature,
        exclude=both_views.repeat(2, 1),
        chunk_size=chunk_size,
    )
    positive = (view1 * view2).sum(1) / temperature
    return _checks.reduced(-F.logsigmoid(positive.repeat(2) - negatives), reduction)


def _unit_rows(x: Tensor) -> Tensor:
    """Rows of length one, in float32 or wider: 1/tau amplifies what half precision rounds away."""
    return F.normalize(_checks.wide(x), dim=1)


def pair_similarities(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    r"""Cosines of a batch of pairs, as the pair ``(positive, negatives)`` that the losses of explicit similarities take.

    Args:
        query: shape ``(B, d)``, floating point, B > 1; rows are L2-normalized here.
        key: shape ``(B, d)``.

    Returns:
        ``positive`` of shape ``(B,)``, the diagonal of the cosines, and ``negatives`` of shape ``(B, B - 1)``, the rest of each row in order.

    Raises:
        TypeError, ValueError: for a wrong type or shape, naming the argument.

    Complexity: O(B^2 d) time, O(B^2) memory.

    Source: Wang and Liu, section 3.

    Example:
        >>> positive, negatives = pair_similarities(torch.eye(3), torch.eye(3))
        >>> positive.tolist(), negatives.shape
        ([1.0, 1.0, 1.0], torch.Size([3, 2]))
    """
    _checks.floating("query", query, 2)
    _checks.like("key", key, "query", query, 2)
    rows = len(query)
    if rows < 2:
        raise ValueError(f"query must have at least 2 rows, so that there is a negative, got {rows}")
    with torch.autocast(query.device.type, enabled=False):
        similarities = _unit_rows(query) @ _unit_rows(key).T
    # Dropping the last element and cutting rows of B + 1 puts the diagonal into the first column.
    negatives = similarities.flatten()[:-1].reshape(rows - 1, rows + 1)[:, 1:].reshape(rows, rows - 1)
    return similarities.diagonal(), negatives


# ---------------------------------------------------------------------------------------------------------------------
# What it pushes, and how hard
# ---------------------------------------------------------------------------------------------------------------------


def similarity_gradients(positive: Tensor, negatives: Tensor, *, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    r"""The gradient of each row's loss in its similarities, in closed form (eq-temperature-gradients).

    :math:`\partial_{s_{ii}}\mathcal L_i=-(1-P_{ii})/\tau` and :math:`\partial_{s_{ij}}\mathcal L_i=P_{ij}/\tau`; in each row they add up to zero.

    Args:
        positive: shape ``(B,)``, floating point.
        negatives: shape ``(B, K)``.
        temperature: :math:`\tau>0`, a number, or a tensor of shape ``()`` or ``(B,)``.

    Returns:
        Gradients of shapes ``(B,)`` and ``(B, K)``, of the unreduced loss.

    Raises:
        TypeError, ValueError: for a wrong type, shape or temperature, naming the argument.

    Source: Wang and Liu, eqs. 2 and 3.

    Example:
        >>> pull, push = similarity_gradients(torch.tensor([0.6]), torch.tensor([[0.8, 0.2]]), temperature=0.5)
        >>> pull, push
        (tensor([-1.3200]), tensor([[1.0144, 0.3055]]))
    """
    _pairs(positive, negatives)
    temperature = _checks.temperature(temperature, len(positive))
    probability = torch.softmax(torch.cat([positive[:, None], negatives], dim=1) / _column(temperature), dim=1)[:, 1:]
    # 1 - P_ii as a sum of the others keeps its digits when the positive has won.
    return -probability.sum(1) / temperature, probability / _column(temperature)


def relative_penalty(negatives: Tensor, *, temperature: float | Tensor) -> Tensor:
    r"""Share of the push that each negative receives, :math:`r_i(s_{ij})=e^{s_{ij}/\tau}/\sum_{k\ne i}e^{s_{ik}/\tau}` (eq-temperature-penalty).

    Args:
        negatives: shape ``(B, K)``, floating point.
        temperature: :math:`\tau>0`, a number, or a tensor of shape ``()`` or ``(B,)``.

    Returns:
        Shape ``(B, K)``; each row is at least 0 and adds up to 1.

    Raises:
        TypeError, ValueError: for a wrong type, shape or temperature, naming the argument.

    Source: Wang and Liu, eq. 4.

    Example:
        >>> relative_penalty(torch.tensor([[0.8, 0.2]]), temperature=0.5)
        tensor([[0.7685, 0.2315]])
    """
    _checks.floating("negatives", negatives, 2)
    return torch.softmax(negatives / _column(_checks.temperature(temperature, len(negatives))), dim=1)


def penalty_entropy(negatives: Tensor, *, temperature: float | Tensor) -> Tensor:
    r"""Entropy of the relative penalties, :math:`H(r_i)=-\sum_j r_{ij}\log r_{ij}` (eq-temperature-entropy); it grows with :math:`\tau`.

    Args:
        negatives: shape ``(B, K)``, floating point.
        temperature: :math:`\tau>0`, a number, or a tensor of shape ``()`` or ``(B,)``.

    Returns:
        Shape ``(B,)``, in nats, between 0 and :math:`\log K`.

    Raises:
        TypeError, ValueError: for a wrong type, shape or temperature, naming the argument.

    Source: Wang and Liu, section 3.2 (the entropy of the penalty distribution).

    Example:
        >>> penalty_entropy(torch.tensor([[0.8, 0.2]]), temperature=0.5)
        tensor([0.5411])
    """
    _checks.floating("negatives", negatives, 2)
    log_penalty = torch.log_softmax(negatives / _column(_checks.temperature(temperature, len(negatives))), dim=1)
    return -(log_penalty.exp() * log_penalty).sum(1)


def effective_negatives(negatives: Tensor, *, temperature: float | Tensor) -> Tensor:
    r"""Effective number of negatives, :math:`e^{H(r_i)}`: how many would share the push if they shared it equally.

    Args:
        negatives: shape ``(B, K)``, floating point.
        temperature: :math:`\tau>0`, a number, or a tensor of shape ``()`` or ``(B,)``.

    Returns:
        Shape ``(B,)``, between 1 and K.

    Raises:
        TypeError, ValueError: for a wrong type, shape or temperature, naming the argument.

    Source: the exponential of eq-temperature-entropy.

    Example:
        >>> effective_negatives(torch.zeros(1, 5), temperature=0.5)
        tensor([5.])
    """
    return penalty_entropy(negatives, temperature=temperature).exp()


def embedding_gradient(output: Tensor, positive_key: Tensor, negative_keys: Tensor, *, temperature: float) -> Tensor:
    r"""Gradient of the loss in the encoder's raw output, term by term (eq-temperature-force).

    With :math:`f=u/\|u\|` and :math:`\Pi=I-ff^\top`, the positive contributes :math:`-\frac{1-P_{ii}}{\tau\|u\|}\Pi g_i` and the
    negative :math:`j` contributes :math:`\frac{P_{ij}}{\tau\|u\|}\Pi g_j`. Keys are held constant, as with a memory bank.

    Args:
        output: raw outputs :math:`u`, not zero, shape ``(B, d)``, floating point.
        positive_key: unit vectors :math:`g_i`, shape ``(B, d)``.
        negative_keys: unit vectors :math:`g_j`, shape ``(B, K, d)``.
        temperature: :math:`\tau>0`.

    Returns:
        Shape ``(B, 1 + K, d)``: the contribution of the positive, then of each negative; their sum is the gradient.

    Raises:
        TypeError, ValueError: for a wrong type, shape or temperature, naming the argument.

    Complexity: O(BKd) time and memory.

    Source: own derivation (chapter, eq-temperature-force).

    Example:
        >>> u, g = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> embedding_gradient(u, g, u[:, None] / 2, temperature=1.0)[0, 1]  # a negative equal to the anchor has no force
        tensor([0., 0.])
    """
    _checks.floating("output", output, 2)
    _checks.like("positive_key", positive_key, "output", output, 2)
    _checks.floating("negative_keys", negative_keys, 3)
    if negative_keys.shape[::2] != output.shape:
        raise ValueError(
            f"negative_keys must have shape ({output.shape[0]}, K, {output.shape[1]}), got {tuple(negative_keys.shape)}"
        )
    length = output.norm(dim=1, keepdim=True)
    if _checks.known_false(length > 0):
        raise ValueError("output must not have a row of zeros: it has no direction")
    f = output / length
    positive, negatives = (f * positive_key).sum(1), (negative_keys @ f[:, :, None]).squeeze(2)
    pull, push = similarity_gradients(positive, negatives, temperature=temperature)
    keys = torch.cat([positive_key[:, None], negative_keys], dim=1)
    similarities = torch.cat([positive[:, None], negatives], dim=1)
    tangent = keys - similarities[:, :, None] * f[:, None]
    return torch.cat([pull[:, None], push], dim=1)[:, :, None] * tangent / length[:, :, None]


# ---------------------------------------------------------------------------------------------------------------------
# The limits in temperature
# ---------------------------------------------------------------------------------------------------------------------


def zero_margin_triplet(positive: Tensor, negatives: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""The limit of :math:`\tau\mathcal L_i` as :math:`\tau\to0^+`: :math:`\max(s_{\max}-s_{ii},0)` (eq-temperature-sandwich).

    Args:
        positive: shape ``(B,)``, floating point.
        negatives: shape ``(B, K)``.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none"; at least 0.

    Raises:
        TypeError, ValueError: for a wrong type, shape or reduction, naming the argument.

    Source: Wang and Liu, eq. 6, without its factor :math:`1/\tau`.

    Example:
        >>> zero_margin_triplet(torch.tensor([0.6]), torch.tensor([[0.8, 0.2]]))
        tensor(0.2000)
    """
    _pairs(positive, negatives)
    return _checks.reduced(F.relu(negatives.amax(dim=1) - positive), reduction)


def large_temperature_expansion(
    positive: Tensor, negatives: Tensor, *, temperature: float, order: int = 2, reduction: str = "mean"
) -> Tensor:
    r"""The loss at large :math:`\tau`: :math:`\log N+(\bar s-s_{ii})/\tau+\mathrm{Var}(s)/(2\tau^2)` (eq-temperature-expansion).

    Mean and (population) variance run over all N = K + 1 similarities, the positive included.

    Args:
        positive: shape ``(B,)``, floating point.
        negatives: shape ``(B, K)``.
        temperature: :math:`\tau>0`.
        order: 1 stops before the variance, 2 includes it.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none"; off the loss by :math:`O(\tau^{-order-1})`.

    Raises:
        TypeError, ValueError: for a wrong type, shape, temperature, order or reduction, naming the argument.

    Source: Wang and Liu, eq. 7 (first order); the second order is the chapter's.

    Example:
        >>> s = torch.tensor([0.6]), torch.tensor([[0.8, 0.2]])
        >>> large_temperature_expansion(*s, temperature=10.0), contrastive_loss(*s, temperature=10.0)
        (tensor(1.0923), tensor(1.0923))
    """
    _pairs(positive, negatives)
    temperature = _checks.positive_number("temperature", temperature)
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    similarities = torch.cat([positive[:, None], negatives], dim=1)
    loss = math.log(similarities.shape[1]) + (similarities.mean(1) - positive) / temperature
    if order == 2:
        loss = loss + similarities.var(dim=1, correction=0) / (2 * temperature**2)
    return _checks.reduced(loss, reduction)


def simple_contrastive_loss(
    positive: Tensor,
    negatives: Tensor,
    *,
    weight: float | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""The loss that is left at :math:`\tau\to\infty`: :math:`-s_{ii}+\lambda\sum_{k\ne i}s_{ik}` (eq-temperature-simple).

    Every negative receives the same push.

    Args:
        positive: shape ``(B,)``, floating point.
        negatives: shape ``(B, K)``.
        weight: :math:`\lambda>0`, on the sum; None is one over the number of negatives used, their mean: the limit itself.
        mask: bool, shape ``(B, K)``, true where a negative is used.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none".

    Raises:
        TypeError, ValueError: for a wrong type, shape, weight, mask or reduction, naming the argument.

    Complexity: O(BK) time and memory.

    Source: Wang and Liu, eq. 8.

    Example:
        >>> simple_contrastive_loss(torch.tensor([0.6]), torch.tensor([[0.8, 0.2]]))
        tensor(-0.1000)
    """
    mask = _pairs(positive, negatives, mask)
    used = negatives if mask is None else negatives.masked_fill(~mask, 0)
    if weight is None:
        count = negatives.shape[1] if mask is None else mask.sum(1)
        push = used.sum(1) / count
    else:
        push = used.sum(1) * _checks.positive_number("weight", weight)
    return _checks.reduced(push - positive, reduction)


# ---------------------------------------------------------------------------------------------------------------------
# Hard negatives, chosen explicitly
# ---------------------------------------------------------------------------------------------------------------------


def _hardest(negatives: Tensor, alpha: float, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Each row's hardest fraction ``alpha`` of the negatives in use, at least one, and the mask of those to use."""
    alpha, num = _checks.fraction("alpha", alpha), negatives.shape[1]
    most = max(1, math.ceil(alpha * num - 1e-9))  # the guard: 0.07 * 100 is 7.000000000000001
    if mask is None:
        return negatives.topk(most, dim=1).values, None
    kept = (mask.sum(1, keepdim=True).double() * alpha - 1e-9).ceil().clamp(min=1)
    hardest = negatives.masked_fill(~mask, -torch.inf).topk(most, dim=1).values
    return hardest, torch.arange(most, device=mask.device) < kept


def hard_contrastive_loss(
    positive: Tensor,
    negatives: Tensor,
    *,
    alpha: float,
    temperature: float | Tensor = 0.07,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""The contrastive loss on each anchor\'s hardest negatives only (eq-temperature-hard).

    The other negatives receive exactly no push, so that the loss is aware of hardness at any temperature.

    Args:
        positive: shape ``(B,)``, floating point.
        negatives: shape ``(B, K)``.
        alpha: fraction of the negatives that is kept, in (0, 1]: the :math:`\max(1,\lceil\alpha K\rceil)` hardest; ties at the cut
            are broken arbitrarily. 1 is the ordinary loss.
        temperature: :math:`\tau>0`, a number, or a tensor of shape ``()`` or ``(B,)`` (differentiable).
        mask: bool, shape ``(B, K)``, true where a negative is used; K above counts those.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none"; at most the ordinary loss.

    Raises:
        TypeError, ValueError: for a wrong type, shape, alpha, temperature, mask or reduction, naming the argument.

    Complexity: O(BK log K) time, O(BK) memory.

    Source: Wang and Liu, section 3.4 (hard contrastive loss).

    Example:
        >>> hard_contrastive_loss(torch.tensor([0.6]), torch.tensor([[0.8, 0.2]]), alpha=0.5, temperature=0.5)
        tensor(0.9130)
    """
    mask = _pairs(positive, negatives, mask)
    hardest, mask = _hardest(negatives, alpha, mask)
    return contrastive_loss(positive, hardest, temperature=temperature, mask=mask, reduction=reduction)


def hard_simple_loss(
    positive: Tensor,
    negatives: Tensor,
    *,
    alpha: float,
    weight: float | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""The simple loss on each anchor\'s hardest negatives only (eq-temperature-hard-simple).

    Args:
        positive: shape ``(B,)``, floating point.
        negatives: shape ``(B, K)``.
        alpha: fraction of the negatives that is kept, in (0, 1]: the :math:`\max(1,\lceil\alpha K\rceil)` hardest; ties at the cut
            are broken arbitrarily.
        weight: :math:`\lambda>0`, on the sum; None is one over the number kept.
        mask: bool, shape ``(B, K)``, true where a negative is used; K above counts those.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none".

    Raises:
        TypeError, ValueError: for a wrong type, shape, alpha, weight, mask or reduction, naming the argument.

    Complexity: O(BK log K) time, O(BK) memory.

    Source: Wang and Liu, section 3.4 (hard simple contrastive loss).

    Example:
        >>> hard_simple_loss(torch.tensor([0.6]), torch.tensor([[0.8, 0.2]]), alpha=0.5)
        tensor(0.2000)
    """
    mask = _pairs(positive, negatives, mask)
    hardest, mask = _hardest(negatives, alpha, mask)
    return simple_contrastive_loss(positive, hardest, weight=weight, mask=mask, reduction=reduction)


# ---------------------------------------------------------------------------------------------------------------------
# The optimum, and two models of the way there
# ---------------------------------------------------------------------------------------------------------------------


def simplex_lower_bound(num_instances: int, temperature: float) -> float:
    r"""The least mean loss of N instances, whatever the encoder: :math:`\log(1+(N-1)e^{-N/((N-1)\tau)})` (eq-temperature-simplex).

    Args:
        num_instances: N, at least 2.
        temperature: :math:`\tau>0`.

    Returns:
        The bound, a float; attained by :func:`simplex_embedding` if the dimension is at least N - 1.

    Raises:
        TypeError, ValueError: for a wrong number, naming the argument.

    Source: own theorem (chapter, thm-temperature-simplex).

    Example:
        >>> round(simplex_lower_bound(10, 0.2), 6)
        0.034202
    """
    others = _checks.positive_int("num_instances", num_instances, minimum=2) - 1
    temperature = _checks.positive_number("temperature", temperature)
    return math.log1p(others * math.exp(-(1 + 1 / others) / temperature))


def simplex_embedding(num_points: int, dim: int) -> Tensor:
    r"""Unit vectors with equal pairwise cosines :math:`-1/(N-1)`: the vertices of a regular simplex.

    Args:
        num_points: N, at least 2.
        dim: number of coordinates, at least N - 1.

    Returns:
        Shape ``(N, dim)``, float64.

    Raises:
        TypeError, ValueError: for a wrong number, naming the argument.

    Complexity: O(N^3) time.

    Source: standard; equality case of thm-temperature-simplex.

    Example:
        >>> x = simplex_embedding(3, 2)
        >>> (x @ x.T).round(decimals=3)[0].tolist()
        [1.0, -0.5, -0.5]
    """
    _checks.positive_int("num_points", num_points, minimum=2)
    if _checks.positive_int("dim", dim) < num_points - 1:
        raise ValueError(f"dim must be at least num_points - 1 = {num_points - 1}, got {dim}")
    # The centred basis vectors are a simplex in a hyperplane; the SVD gives their coordinates within it.
    centred = torch.eye(num_points, dtype=torch.float64) - 1 / num_points
    left, _, _ = torch.linalg.svd(centred)
    return F.pad(F.normalize(left[:, : num_points - 1], dim=1), (0, dim - num_points + 1))


def two_level_similarities(same_class: Tensor, num_classes: int, class_size: int) -> tuple[Tensor, Tensor]:
    r"""Similarities of one anchor in a world of equal classes, its positive aligned (eq-temperature-two-level).

    C classes of n aligned points; cosine :math:`a` within a class, and between classes the least that a Gram matrix allows,
    :math:`b(a)=-\frac{1+(n-1)a}{n(C-1)}`.

    Args:
        same_class: :math:`a\in[0,1]`, shape ``()``, floating point; differentiable.
        num_classes: C, at least 2.
        class_size: n, at least 2.

    Returns:
        ``positive`` of shape ``(1,)``, equal to 1, and ``negatives`` of shape ``(1, nC - 1)``: the anchor's own class first.

    Raises:
        TypeError, ValueError: for a wrong type or number, naming the argument.

    Source: own model (chapter, eq-temperature-two-level).

    Example:
        >>> positive, negatives = two_level_similarities(torch.tensor(0.5), num_classes=10, class_size=10)
        >>> negatives.shape, round(negatives[0, -1].item(), 4)
        (torch.Size([1, 99]), -0.0611)
    """
    _checks.floating("same_class", same_class, 0)
    _checks.positive_int("num_classes", num_classes, minimum=2)
    _checks.positive_int("class_size", class_size, minimum=2)
    others = class_size * (num_classes - 1)
    other_class = -(1 + (class_size - 1) * same_class) / others
    return same_class.new_ones(1), torch.cat([same_class.expand(class_size - 1), other_class.expand(others)])[None]


# ---------------------------------------------------------------------------------------------------------------------
# What the encoder has become
# ---------------------------------------------------------------------------------------------------------------------


def alignment(x: Tensor, y: Tensor) -> Tensor:
    r"""Mean cosine of positive pairs, :math:`\frac1n\sum_i x_i^\top y_i`; higher is better aligned.

    Wang and Isola's alignment (with exponent 2) is :math:`2-2\cdot` this.

    Args:
        x: unit vectors, shape ``(n, d)``, floating point.
        y: unit vectors, shape ``(n, d)``.

    Returns:
        Shape ``()``, in [-1, 1].

    Raises:
        TypeError, ValueError: for a wrong type or shape, naming the argument.

    Source: Wang and Isola 2020, in the convention of Wang and Liu.

    Example:
        >>> alignment(torch.eye(3), torch.eye(3))
        tensor(1.)
    """
    _checks.like("y", y, "x", _checks.floating("x", x, 2), 2)
    return (x * y).sum(1).mean()


def uniformity(embedding: Tensor, *, t: float = 2.0, chunk_size: int | None = None) -> Tensor:
    r"""Wang and Isola's uniformity, :math:`\log\mathbb E_{x\ne y}\,e^{-t\|x-y\|^2}` (eq-temperature-uniformity); lower is more uniform.

    The mean runs over pairs of distinct samples.

    Args:
        embedding: shape ``(n, d)``, n > 1, floating point, usually of unit rows.
        t: sharpness of the Gaussian potential, > 0; it matches the temperature :math:`1/(2t)`.
        chunk_size: rows taken at a time; None chooses.

    Returns:
        Shape ``()``; at most 0.

    Raises:
        TypeError, ValueError: for a wrong type, shape or t, naming the argument.

    Complexity: O(n^2 d) time, O(chunk_size * n + n d) memory.

    Source: Wang and Isola 2020; Wang and Liu, eq. 9, with t = 2.

    Example:
        >>> uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))  # -t * 2^2
        tensor(-8.)
    """
    _checks.floating("embedding", embedding, 2)
    n = len(embedding)
    if n < 2:
        raise ValueError(f"embedding must have at least 2 rows, got {n}")
    t = _checks.positive_number("t", t)
    # -t |x - y|^2 = 2t x.y - t |x|^2 - t |y|^2: a log-sum-exp of similarities with a bias for each key.
    bias = -t * embedding.square().sum(1)
    potential = ops.streamed_logsumexp(
        2 * t * embedding,
        embedding,
        bias=bias,
        exclude=torch.arange(n, device=embedding.device),
        chunk_size=chunk_size,
    )
    return torch.logsumexp(potential + bias, dim=0) - math.log(n * (n - 1))


def tolerance(embedding: Tensor, labels: Tensor, *, normalize: str = "conditional") -> Tensor:
    r"""Mean cosine of samples of one class (eq-temperature-tolerance), over pairs of distinct samples.

    Args:
        embedding: unit vectors, shape ``(n, d)``, floating point.
        labels: classes, shape ``(n,)``, int64.
        normalize: "conditional" divides by the number of same-class pairs, :math:`\mathbb E[x^\top y\mid l(x)=l(y)]`; "joint",
            as the paper prints it, by that of all pairs, :math:`\mathbb E[x^\top y\,\mathbb 1\{l(x)=l(y)\}]`.

    Returns:
        Shape ``()``, in [-1, 1].

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if shapes do not fit, ``normalize`` is unknown, or no two samples share a class.

    Complexity: O(nd) time and memory: for each class, the squared length of its sum is the sum of its similarities.

    Source: Wang and Liu, eq. 10.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> tolerance(x, torch.tensor([0, 1, 0])), tolerance(x, torch.tensor([0, 1, 0]), normalize="joint")
        (tensor(1.), tensor(0.3333))
    """
    _checks.floating("embedding", embedding, 2)
    if _checks.integer("labels", labels, 1).shape != embedding.shape[:1]:
        raise ValueError(f"labels must have shape ({len(embedding)},), got {tuple(labels.shape)}")
    if normalize not in ("conditional", "joint"):
        raise ValueError(f'normalize must be "conditional" or "joint", got {normalize!r}')
    _, index, counts = labels.unique(return_inverse=True, return_counts=True)
    same_class_pairs = (counts * (counts - 1)).sum()
    if same_class_pairs == 0:
        raise ValueError("labels must have a class with at least two samples")
    class_sums = embedding.new_zeros(len(counts), embedding.shape[1]).index_add(0, index, embedding)
    total = class_sums.square().sum() - embedding.square().sum()
    n = len(embedding)
    return total / (same_class_pairs if normalize == "conditional" else n * (n - 1))


# ---------------------------------------------------------------------------------------------------------------------
# The paper's training protocol
# ---------------------------------------------------------------------------------------------------------------------


class MemoryBank(nn.Module):
    r"""One stored unit vector for every training sample: the source of positives and negatives in instance discrimination.

    Args:
        num_samples: size of the training set.
        dim: dimension of the embedding.
        momentum: share of the old entry that an update keeps, in [0, 1).

    Attributes:
        bank: buffer of shape ``(num_samples, dim)``, float32, unit rows; random at first. It moves with ``.to()`` and is
            part of ``state_dict()``.

    Raises:
        TypeError, ValueError: for a wrong number, naming the argument.

    Source: Wu et al. 2018; the protocol of Wang and Liu, section 4.

    Example:
        >>> bank = MemoryBank(100, 8)
        >>> index = torch.tensor([3, 7])
        >>> bank.update(index, F.normalize(torch.randn(2, 8), dim=1))
        >>> bank.sample(5, exclude=index).shape
        torch.Size([2, 5])
    """

    bank: Tensor

    def __init__(self, num_samples: int, dim: int, momentum: float = 0.5):
        super().__init__()
        _checks.positive_int("num_samples", num_samples, minimum=2)
        _checks.positive_int("dim", dim)
        if momentum != 0 and _checks.positive_number("momentum", momentum) >= 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        self.momentum = float(momentum)
        self.register_buffer("bank", F.normalize(torch.randn(num_samples, dim), dim=1))

    def sample(self, num_negatives: int, exclude: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw indices of negatives, uniformly with replacement, never a row's own sample.

        Args:
            num_negatives: K, at least 1.
            exclude: int64, shape ``(B,)``: the sample that each row is about.
            generator: on the bank's device.

        Returns:
            Indices into ``bank``, int64, shape ``(B, K)``.

        Raises:
            TypeError, ValueError: for a wrong number or index, naming the argument.
        """
        _checks.positive_int("num_negatives", num_negatives)
        _checks.indices("exclude", exclude, len(self.bank))
        size = (len(exclude), num_negatives)
        drawn = torch.randint(len(self.bank) - 1, size, generator=generator, device=self.bank.device)
        return drawn + (drawn >= exclude[:, None])  # skip the excluded index

    @torch.no_grad()
    def update(self, index: Tensor, embedding: Tensor) -> None:
        """Move entries towards new embeddings: ``momentum * old + (1 - momentum) * new``, then unit length again.

        Args:
            index: int64, shape ``(B,)``, no index twice.
            embedding: unit vectors, shape ``(B, dim)``.

        Raises:
            TypeError, ValueError: for a wrong shape or index, naming the argument.
        """
        _checks.indices("index", index, len(self.bank))
        _checks.floating("embedding", embedding, 2)
        if embedding.shape != (len(index), self.bank.shape[1]):
            raise ValueError(
                f"embedding must have shape ({len(index)}, {self.bank.shape[1]}), got {tuple(embedding.shape)}"
            )
        if len(index.unique()) < len(index):
            raise ValueError("index must not name a sample twice: which of its embeddings should be kept?")
        mixed = self.momentum * self.bank[index] + (1 - self.momentum) * embedding.to(self.bank.dtype)
        self.bank[index] = F.normalize(mixed, dim=1)
