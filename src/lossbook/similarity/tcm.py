r"""One threshold for all classes: how to measure whether there is one, and a loss that asks for it.

The method of *Threshold-Consistent Margin Loss for Open-World Deep Metric Learning* (Zhang, Xu, Tang, Fang, Wu, Tighe and Xing, ICLR
2024, arXiv 2307.04047): the two-margin loss on hard pairs that is added to any metric loss, the operating characteristics of each
class, their utility, and the inconsistency score OPIS over a calibrated range of thresholds. Equation labels are those of the chapter
``similarity/tcm``.

Notation: rows of ``embedding`` become unit vectors :math:`z_i`, :math:`s_{ij}=z_i^\top z_j` and :math:`\delta_{ij}=\sqrt{2-2s_{ij}}`. A pair is positive if
its labels agree. A pair is accepted at threshold :math:`t` if :math:`\delta_{ij}\le t`; :math:`\psi_i(t)` is the share of class i's positive pairs that
are, and :math:`\phi_i(t)` the share of its negative pairs that are not.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lossbook import _checks, ops
from lossbook.ops.streamed import _chunk_rows

METRICS = ("euclidean", "cosine", "precomputed")

# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


def _margins(positive_margin: float, negative_margin: float) -> tuple[float, float]:
    """The two margins, if they are cosines in the right order."""
    positive = _checks.number("positive_margin", positive_margin, -1, 1)
    if not _checks.number("negative_margin", negative_margin, -1, 1) < positive:
        raise ValueError(f"negative_margin must be below positive_margin = {positive}, got {negative_margin}")
    return positive, float(negative_margin)


def _finite(name: str, value: Tensor, ndim: int) -> Tensor:
    """``value``, if it is a floating-point tensor of finite numbers with ``ndim`` dimensions, none of them empty."""
    return _checks.finite(name, _checks.floating(name, value, ndim))


def _directions(name: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows at length one, in ``dtype`` or wider, if none of them is zero."""
    if _checks.known_false((rows != 0).any(1)):
        raise ValueError(f"{name} must not have a row of zeros: it has no direction")
    rows = rows.to(torch.promote_types(rows.dtype, dtype))
    largest = rows.detach().abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return F.normalize(rows / largest, dim=1)  # no overflow, and no underflow, in the squares


def _unit_rows(embedding: Tensor, labels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of length one, in ``dtype`` or wider; there are at least two, each with a label and a direction."""
    _finite("embedding", embedding, 2)
    if len(_checks.integer("labels", labels, 1)) != len(embedding):
        raise ValueError(f"labels must have shape ({len(embedding)},), one for each row, got {tuple(labels.shape)}")
    if len(embedding) < 2:
        raise ValueError(f"embedding must have at least 2 rows, so that there is a pair, got {len(embedding)}")
    return _directions("embedding", embedding, dtype)


def _hard(similarities: Tensor, same: Tensor, margins: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Which pairs violate a margin, or are at it: positives, negatives."""
    return same & (similarities <= margins[0]), ~same & (similarities >= margins[1])


def _sums(similarities: Tensor, positive: Tensor, negative: Tensor, margins: tuple[float, float]) -> tuple[Tensor, ...]:
    """Sums of the violations over the hard pairs, and how many pairs these are: positive, negative sum, positive, negative count."""
    low, high = (margins[0] - similarities) * positive, (similarities - margins[1]) * negative
    return low.sum(), high.sum(), positive.sum(), negative.sum()


class _HardPairSums(torch.autograd.Function):
    """:func:`_sums` over all pairs of a query with a key other than itself, a chunk of queries at a time."""

    generate_vmap_rule = True

    @staticmethod
    def _chunk(start, queries, keys, labels, key_labels, own, margins, chunk_rows):
        rows = slice(start, start + chunk_rows)
        similarities = queries[rows] @ keys.T
        positive, negative = _hard(similarities, labels[rows, None] == key_labels, margins)
        return rows, similarities, positive.scatter(1, own[rows, None], False), negative

    @staticmethod
    def forward(queries, keys, labels, key_labels, own, margins, chunk_rows):
        totals = None
        for start in range(0, queries.shape[0], chunk_rows):
            _, *chunk = _HardPairSums._chunk(start, queries, keys, labels, key_labels, own, margins, chunk_rows)
            sums = _sums(*chunk, margins)
            totals = sums if totals is None else [a + b for a, b in zip(totals, sums, strict=True)]
        return tuple(totals)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.margins, ctx.chunk_rows = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_positive, grad_negative, *_):
        queries, keys, *rest = ctx.saved_tensors
        grad_queries, grad_keys = [], 0.0
        with torch.autocast(queries.device.type, enabled=False):
            for start in range(0, queries.shape[0], ctx.chunk_rows):
                chunk = _HardPairSums._chunk(start, queries, keys, *rest, ctx.margins, ctx.chunk_rows)
                rows, _, positive, negative = chunk
                pull = negative * grad_negative - positive * grad_positive  # the gradient in the similarities
                grad_queries.append(pull @ keys)
                grad_keys = grad_keys + pull.T @ queries[rows]
        return torch.cat(grad_queries), grad_keys, None, None, None, None, None


def _weighted(sums: tuple[Tensor, ...], weights: tuple[float, float], return_parts: bool):
    """The loss of sums and counts: means over the hard pairs, 0 where there are none, times their weights."""
    positive, negative, num_positive, num_negative = sums
    parts = positive / num_positive.clamp(min=1), negative / num_negative.clamp(min=1)
    loss = weights[0] * parts[0] + weights[1] * parts[1]
    return (loss, *parts) if return_parts else loss


def _weights(positive_weight: float, negative_weight: float) -> tuple[float, float]:
    return _checks.number("positive_weight", positive_weight, 0), _checks.number("negative_weight", negative_weight, 0)


def tcm_loss(
    embedding: Tensor,
    labels: Tensor,
    *,
    positive_margin: float = 0.9,
    negative_margin: float = 0.5,
    positive_weight: float = 1.0,
    negative_weight: float = 1.0,
    pairs: tuple[Tensor, Tensor] | None = None,
    distributed: bool = False,
    chunk_size: int | None = None,
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    r"""Threshold-consistent margin loss of a batch, a regularizer: add it to a metric loss of the same embedding (eq-tcm-loss).

    :math:`\lambda^+` times the mean of :math:`m^+-s_{ij}` over positive pairs with :math:`s_{ij}\le m^+`, plus :math:`\lambda^-` times the mean of
    :math:`s_{ij}-m^-` over negative pairs with :math:`s_{ij}\ge m^-`. A side without such pairs counts as 0, with zero gradient.

    Args:
        embedding: shape ``(B, d)``, floating point, B > 1; rows are L2-normalized here.
        labels: classes, int64, shape ``(B,)``.
        positive_margin: :math:`m^+\in[-1,1]`, a cosine: positive pairs should be above it.
        negative_margin: :math:`m^-\in[-1,m^+)`, a cosine: negative pairs should be below it.
        positive_weight, negative_weight: :math:`\lambda^\pm\ge0`.
        pairs: two int64 tensors of one shape ``(P,)``, indices into the batch: the pairs that count, in place of all of them.
        distributed: take the pairs from the batches of all processes of the default group; not together with ``pairs``.
        chunk_size: rows of similarities held at a time; None chooses, and a small batch is one chunk.
        return_parts: also give back the means of both sides, before their weights.

    Returns:
        Shape ``()``, float32 or wider, at least 0; with ``return_parts`` a triple of that, the positive and the negative mean.

    Raises:
        TypeError, ValueError: for a wrong type, shape, margin, weight or index, a row of zeros or a number that is not finite,
            naming the argument.

    Complexity: O(B^2 d) time, O(chunk_size * B + B d) memory; with ``pairs`` O(P d) of both.

    Source: Zhang et al., section 4 (the loss) and its defaults.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> loss = tcm_loss(x, torch.tensor([0, 0, 1]), return_parts=True)  # 0.9 - 0.8, and 0.6 - 0.5
        >>> [round(value.item(), 4) for value in loss]
        [0.2, 0.1, 0.1]
    """
    margins = _margins(positive_margin, negative_margin)
    weights = _weights(positive_weight, negative_weight)
    if chunk_size is not None:
        _checks.positive_int("chunk_size", chunk_size)
    z = _unit_rows(embedding, labels)
    if pairs is not None:
        if distributed:
            raise ValueError("distributed must be False with pairs: their indices are those of one batch")
        one, other = _pairs(pairs, len(z))
        similarities = (z[one] * z[other]).sum(1)
        hard = _hard(similarities, labels[one] == labels[other], margins)
        return _weighted(_sums(similarities, *hard, margins), weights, return_parts)
    own = ops.local_rows(len(z), z.device) if distributed else torch.arange(len(z), device=z.device)
    keys, key_labels = (ops.gather(z), ops.gather(labels)) if distributed else (z, labels)
    rows = _chunk_rows(len(keys), z.device) if chunk_size is None else int(chunk_size)
    with torch.autocast(z.device.type, enabled=False):
        positive, negative, *counts = _HardPairSums.apply(z, keys, labels, key_labels, own, margins, rows)
    if distributed:  # the mean over processes is then a mean over all pairs
        counts = [ops.gather(count[None]).double().mean() for count in counts]
        counts = [count.to(z.dtype).where(count > 0, 1) for count in counts]
    return _weighted((positive, negative, *counts), weights, return_parts)


def _pairs(pairs: tuple[Tensor, Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """Two checked vectors of indices."""
    if not isinstance(pairs, tuple | list) or len(pairs) != 2:
        raise TypeError(f"pairs must be two int64 tensors, got {type(pairs).__name__}")
    one, other = (_checks.integer(f"pairs[{i}]", index, 1) for i, index in enumerate(pairs))
    if one.shape != other.shape:
        raise ValueError(f"pairs must have one length, got {len(one)} and {len(other)}")
    if _checks.known_false((one >= 0) & (one < rows) & (other >= 0) & (other < rows) & (one != other)):
        raise ValueError(f"pairs must hold indices in [0, {rows}), two different ones in each pair")
    return one, other


def tcm_loss_from_similarity(
    positive: Tensor,
    negative: Tensor,
    *,
    positive_margin: float = 0.9,
    negative_margin: float = 0.5,
    positive_weight: float = 1.0,
    negative_weight: float = 1.0,
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    r"""The same loss of similarities that are at hand: of mined pairs, or of pairs with proxies (eq-tcm-loss).

    Args:
        positive: similarities of positive pairs, shape ``(P,)``, floating point; P may be 0.
        negative: similarities of negative pairs, shape ``(N,)``, the dtype of ``positive``; N may be 0.
        positive_margin, negative_margin, positive_weight, negative_weight, return_parts: as in :func:`tcm_loss`.

    Returns:
        Shape ``()``; with ``return_parts`` a triple, as in :func:`tcm_loss`.

    Raises:
        TypeError, ValueError: for a wrong type, shape, margin, weight or number, naming the argument.

    Complexity: O(P + N) time and memory.

    Source: Zhang et al., section 4.

    Example:
        >>> positive, negative = torch.tensor([0.95, 0.8, 0.5]), torch.tensor([0.6, 0.2, 0.5])
        >>> tcm_loss_from_similarity(positive, negative)  # (0.1 + 0.4) / 2 + (0.1 + 0) / 2
        tensor(0.3000)
    """
    margins = _margins(positive_margin, negative_margin)
    weights = _weights(positive_weight, negative_weight)
    for name, value in (("positive", positive), ("negative", negative)):
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == (0,):
            continue
        _finite(name, value, 1)
    if negative.dtype != positive.dtype:
        raise TypeError(f"negative must have the dtype of positive, {positive.dtype}, got {negative.dtype}")
    same = torch.cat([torch.ones_like(positive, dtype=torch.bool), torch.zeros_like(negative, dtype=torch.bool)])
    similarities = torch.cat([positive, negative])
    return _weighted(_sums(similarities, *_hard(similarities, same, margins), margins), weights, return_parts)


# ---------------------------------------------------------------------------------------------------------------------
# Two losses to add it to
# ---------------------------------------------------------------------------------------------------------------------


def normalized_softmax_loss(embedding: Tensor, proxies: Tensor, labels: Tensor, *, scale: float = 16.0) -> Tensor:
    r"""Cross-entropy of cosines with one proxy for each class (eq-tcm-softmax); proxies are learned with the encoder.

    Args:
        embedding: shape ``(B, d)``, floating point, B > 1; rows are L2-normalized here.
        proxies: shape ``(C, d)``, the dtype of ``embedding``; rows are L2-normalized here, and none may be zero.
        labels: int64, shape ``(B,)``, in ``[0, C)``.
        scale: :math:`\gamma>0`, the inverse of a temperature.

    Returns:
        Shape ``()``, float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape, label or scale, naming the argument.

    Complexity: O(BCd) time, O((B + C) d) memory and a chunk of the logits (:func:`lossbook.ops.token_logprobs`).

    Source: Zhai and Wu 2019 (normalized softmax); the proxy family among the paper's base losses.

    Example:
        >>> normalized_softmax_loss(torch.eye(3), torch.eye(3), torch.arange(3), scale=2.0)  # log(1 + 2 e^-2)
        tensor(0.2395)
    """
    z = _unit_rows(embedding, labels)
    if _finite("proxies", proxies, 2).shape[1] != z.shape[1] or proxies.dtype != embedding.dtype:
        raise ValueError(
            f"proxies must have {z.shape[1]} columns of {embedding.dtype} like embedding, "
            f"got shape {tuple(proxies.shape)} of {proxies.dtype}"
        )
    if _checks.known_false((labels >= 0) & (labels < len(proxies))):
        raise ValueError(
            f"labels must lie in [0, {len(proxies)}), one proxy each, got {labels.min()} to {labels.max()}"
        )
    centers = _directions("proxies", proxies, z.dtype)
    return -ops.token_logprobs(z, centers, labels, temperature=1 / _checks.positive_number("scale", scale)).mean()


def supervised_contrastive_loss(
    embedding: Tensor, labels: Tensor, *, temperature: float = 0.1, chunk_size: int | None = None
) -> Tensor:
    r"""Supervised contrastive loss: the softmax of each anchor over all other rows, its log averaged over the positives (eq-tcm-supcon).

    Args:
        embedding: shape ``(B, d)``, floating point, B > 1; rows are L2-normalized here.
        labels: int64, shape ``(B,)``; anchors without a positive are left out.
        temperature: :math:`\tau>0`.
        chunk_size: rows of similarities held at a time; None chooses.

    Returns:
        Shape ``()``, float32 or wider: the mean over the anchors; 0, with zero gradient, where no anchor has a positive.

    Raises:
        TypeError, ValueError: for a wrong type, shape or temperature, naming the argument.

    Complexity: O(B^2 d) time, O(chunk_size * B + B d) memory: the mean similarity to the positives follows from sums over classes.

    Source: Khosla et al. 2020, eq. 2 (the logarithm inside).

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> supervised_contrastive_loss(x, torch.tensor([0, 0, 1, 1]), temperature=0.5)  # log(1 + 2 e^-2)
        tensor(0.2395)
    """
    z = _unit_rows(embedding, labels)
    temperature = _checks.positive_number("temperature", temperature)
    itself = torch.arange(len(z), device=z.device)
    normalizer = ops.streamed_logsumexp(z, z, temperature=temperature, exclude=itself, chunk_size=chunk_size)
    _, group, sizes = labels.unique(return_inverse=True, return_counts=True)
    others = z.new_zeros(len(sizes), z.shape[1]).index_add(0, group, z)[group] - z
    partners = sizes[group] - 1
    attraction = (z * others).sum(1) / partners.clamp(min=1) / temperature
    used = partners > 0
    return (normalizer - attraction).where(used, 0).sum() / used.sum().clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# What each class makes of a threshold
# ---------------------------------------------------------------------------------------------------------------------


def _ends(distance: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest of given distances, in float64; both are finite only if all are, and nothing is copied."""
    ends = torch.stack(torch.aminmax(_checks.floating("embedding", distance, 2)))
    return tuple(_checks.finite("embedding", ends).double())


def _distance_rows(
    embedding: Tensor, labels: Tensor, metric: str, chunk_size: int | None
) -> Iterator[tuple[slice, Tensor]]:
    """Checked distances of a chunk of rows to all rows, in float64, chunk by chunk."""
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
    if metric == "precomputed":
        largest = max(end.abs() for end in _ends(embedding))
        if embedding.shape[0] != embedding.shape[1] or len(embedding) < 2:
            raise ValueError(f"embedding must be a square matrix of distances, got shape {tuple(embedding.shape)}")
        if len(_checks.integer("labels", labels, 1)) != len(embedding):
            raise ValueError(f"labels must have shape ({len(embedding)},), got {tuple(labels.shape)}")
    else:
        z = _unit_rows(embedding, labels, torch.float64)
    rows = (
        _chunk_rows(len(embedding), embedding.device)
        if chunk_size is None
        else _checks.positive_int("chunk_size", chunk_size)
    )
    for start in range(0, len(embedding), rows):
        chunk = slice(start, start + rows)
        if metric == "precomputed":
            distance = embedding[chunk].double()
            if _checks.known_false((distance - embedding[:, chunk].T).abs() <= 1e-5 * largest):
                raise ValueError("embedding must be a symmetric matrix of distances")
            yield chunk, distance
        else:
            cosine_distance = (1 - z[chunk] @ z.T).clamp(min=0)
            yield chunk, cosine_distance if metric == "cosine" else (2 * cosine_distance).sqrt()


@torch.no_grad()
def operating_characteristics(
    embedding: Tensor, labels: Tensor, thresholds: Tensor, *, metric: str = "euclidean", chunk_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Sensitivity :math:`\psi_i(t)` and specificity :math:`\phi_i(t)` of each class at each threshold (eq-tcm-rates).

    A class without a positive pair is left out; its members still are negatives of the other classes. Nothing is differentiated.

    Args:
        embedding: shape ``(n, d)``, floating point; rows are L2-normalized here. With ``metric="precomputed"`` distances, shape ``(n, n)``.
        labels: int64, shape ``(n,)``.
        thresholds: :math:`t`, shape ``(G,)``, floating point, ascending. A pair is accepted if its distance is at most t.
        metric: "euclidean" is :math:`\sqrt{2-2s}`, "cosine" is :math:`1-s`, "precomputed" takes ``embedding`` as it is, symmetric.
        chunk_size: rows of distances held at a time; None chooses.

    Returns:
        ``(sensitivity, specificity, classes)``: two tensors of shape ``(T, G)``, float64, and the labels of the T classes, ascending.

    Raises:
        TypeError, ValueError: for a wrong type, shape, order or metric, or fewer than two classes with a positive pair, naming the argument.

    Complexity: O(n^2 (d + log G)) time, O(chunk_size * n + n d + T G) memory.

    Source: Zhang et al., section 3.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]])
        >>> grid = torch.tensor([0.5, 0.7, 0.9])
        >>> sensitivity, specificity, classes = operating_characteristics(x, torch.tensor([0, 0, 1, 1]), grid)
        >>> sensitivity.tolist(), specificity[0].tolist()  # the inner pair is at a distance of 0.894
        ([[0.0, 1.0, 1.0], [0.0, 1.0, 1.0]], [1.0, 1.0, 0.75])
    """
    if _checks.known_false(_finite("thresholds", thresholds, 1).diff() >= 0):
        raise ValueError("thresholds must be in ascending order")
    grid = thresholds.double()
    accepted = None
    for rows, distance in _distance_rows(embedding, labels, metric, chunk_size):
        if accepted is None:
            classes, group = labels.unique(return_inverse=True)
            bins = len(classes) * (len(grid) + 1)
            accepted = [torch.zeros(bins, dtype=torch.int64, device=labels.device) for _ in range(2)]
        # The first threshold that accepts a pair, and the class of its row, as one number to count.
        place = torch.searchsorted(grid, distance) + group[rows, None] * (len(grid) + 1)
        same = group[rows, None] == group
        itself = torch.arange(len(group), device=group.device)
        for count, mask in zip(accepted, (same & (itself[rows, None] != itself), ~same), strict=True):
            count += torch.bincount(place[mask], minlength=bins)
    positive, negative = (count.view(len(classes), -1).cumsum(1).double() for count in accepted)
    usable = positive[:, -1] > 0
    if usable.sum() < 2:
        raise ValueError(f"labels must have at least two classes with two samples, got {int(usable.sum())}")
    positive, negative = positive[usable], negative[usable]
    return positive[:, :-1] / positive[:, -1:], 1 - negative[:, :-1] / negative[:, -1:], classes[usable]


@torch.no_grad()
def class_hinges(
    embedding: Tensor,
    labels: Tensor,
    *,
    positive_margin: float = 0.9,
    negative_margin: float = 0.5,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Mean violation of the margins over *all* pairs of each class (eq-tcm-hinge): a curve to log, where the loss is none.

    Their maximum over the classes bounds the inconsistency (thm-tcm-bound). Nothing is differentiated.

    Args:
        embedding: shape ``(n, d)``, floating point; rows are L2-normalized here.
        labels: int64, shape ``(n,)``.
        positive_margin, negative_margin: as in :func:`tcm_loss`.
        chunk_size: rows of similarities held at a time; None chooses.

    Returns:
        ``(positive, negative, classes)``: two tensors of shape ``(T,)``, float64, and the labels of the T classes with a positive
        pair, ascending.

    Raises:
        TypeError, ValueError: for a wrong type, shape or margin, or where no two classes are present, naming the argument.

    Complexity: O(n^2 d) time, O(chunk_size * n + n d) memory.

    Source: own (chapter, thm-tcm-bound).

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> positive, negative, _ = class_hinges(x, torch.tensor([0, 0, 1]))  # 0.9 - 0.8; the mean of 0 and 0.6 - 0.5
        >>> round(positive.item(), 4), round(negative.item(), 4)
        (0.1, 0.05)
    """
    margins = _margins(positive_margin, negative_margin)
    totals = None
    for rows, distance in _distance_rows(embedding, labels, "cosine", chunk_size):
        if totals is None:
            classes, group, sizes = labels.unique(return_inverse=True, return_counts=True)
            totals = distance.new_zeros(2, len(classes))
        same = group[rows, None] == group
        low = (margins[0] - 1 + distance).clamp(min=0) * same  # a row is at distance 0 from itself, which adds nothing
        high = (1 - distance - margins[1]).clamp(min=0) * ~same
        totals.index_add_(1, group[rows], torch.stack([low.sum(1), high.sum(1)]))
    if len(classes) < 2:
        raise ValueError(f"labels must have at least two classes, got {len(classes)}")
    usable = sizes > 1
    positive, negative = totals[0] / (sizes * (sizes - 1)).clamp(min=1), totals[1] / (sizes * (len(group) - sizes))
    return positive[usable], negative[usable], classes[usable]


def utility(sensitivity: Tensor, specificity: Tensor, *, c: float = 1.0) -> Tensor:
    r"""Utility of an operating point, :math:`U=\frac{(1+c^2)\,\phi\,\psi}{c^2\phi+\psi}` (eq-tcm-utility), elementwise.

    A weighted harmonic mean: :math:`c\to0` gives the specificity, :math:`c\to\infty` the sensitivity.

    Args:
        sensitivity: :math:`\psi`, any shape, floating point, in [0, 1].
        specificity: :math:`\phi`, the same shape and dtype, in [0, 1].
        c: :math:`c>0`, the weight of the sensitivity; 1 is the harmonic mean.

    Returns:
        The same shape, in [0, 1]; 0 where either is 0.

    Raises:
        TypeError, ValueError: for a wrong type, shape, range or c, naming the argument.

    Complexity: linear.

    Source: Zhang et al., section 3 (the utility behind OPIS).

    Example:
        >>> utility(torch.tensor([0.8]), torch.tensor([0.3]))
        tensor([0.4364])
    """
    _checks.floating("sensitivity", sensitivity)
    _checks.like("specificity", specificity, "sensitivity", sensitivity, sensitivity.ndim)
    c = _checks.positive_number("c", c)
    for name, value in (("sensitivity", sensitivity), ("specificity", specificity)):
        if _checks.known_false((value >= 0) & (value <= 1)):
            raise ValueError(f"{name} must lie in [0, 1]")
    # Divided by 1 + c^2, and squared where it is at most 1, so that neither end of the range of c overflows.
    small = min(c, 1 / c) ** 2
    weight = (1 if c > 1 else small) / (1 + small)
    below = weight * specificity + (1 - weight) * sensitivity
    return sensitivity * specificity / below.where(below > 0, 1)


def _curves(utility: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Checked curves and their grid, in the wider of their dtypes: in the narrower one, neighbors in the grid might coincide."""
    _finite("utility", utility, 2)
    _finite("thresholds", thresholds, 1)
    if utility.shape[1] != len(thresholds) or len(thresholds) < 2:
        raise ValueError(
            f"thresholds must be at least 2, one for each of the {utility.shape[1]} columns of utility, got {len(thresholds)}"
        )
    if len(utility) < 2:
        raise ValueError(f"utility must have at least 2 rows, one for each class, got {len(utility)}")
    if _checks.known_false(thresholds.diff() > 0):
        raise ValueError("thresholds must be strictly ascending")
    dtype = torch.promote_types(utility.dtype, thresholds.dtype)
    return utility.to(dtype), thresholds.to(dtype)


def opis(utility: Tensor, thresholds: Tensor) -> Tensor:
    r"""Operating-point inconsistency score: the variance of the utility over the classes, averaged over the thresholds (eq-tcm-opis).

    Args:
        utility: :math:`U_i(t)`, shape ``(T, G)``, floating point: T classes, G thresholds.
        thresholds: the grid of the calibration range, shape ``(G,)``, strictly ascending; integrals are by the trapezoid rule.

    Returns:
        Shape ``()``, the wider of the two dtypes, between 0 and 1/4.

    Raises:
        TypeError, ValueError: for a wrong type, shape or order, naming the argument.

    Complexity: O(TG) time and memory.

    Source: Zhang et al., section 3 (OPIS).

    Example:
        >>> opis(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([0.2, 0.7]))
        tensor(0.2500)
    """
    utility, thresholds = _curves(utility, thresholds)
    variance = utility.var(dim=0, correction=0)
    return torch.trapezoid(variance, thresholds) / (thresholds[-1] - thresholds[0])


def extreme_gap(utility: Tensor, thresholds: Tensor, *, fraction: float = 0.1) -> Tensor:
    r"""Mean squared gap between the best and the worst classes (eq-tcm-gap): our reading of the paper's :math:`\epsilon`-OPIS.

    Classes are ranked by their mean utility over the range; the curves of the best fraction are averaged, and those of the worst.

    Args:
        utility: shape ``(T, G)``, floating point.
        thresholds: shape ``(G,)``, strictly ascending.
        fraction: :math:`\epsilon`, in (0, 1/2]; :math:`\epsilon T` classes, rounded down, are taken at each end, and at least one.

    Returns:
        Shape ``()``, the wider of the two dtypes, between 0 and 1.

    Raises:
        TypeError, ValueError: for a wrong type, shape, order or fraction, naming the argument.

    Complexity: O(TG + T log T) time, O(TG) memory.

    Source: own formula, after the idea of Zhang et al., section 3 (:math:`\epsilon`-OPIS); the paper's own may differ.

    Example:
        >>> curves = torch.tensor([[1.0, 1.0], [0.5, 0.5], [0.4, 0.4]])
        >>> extreme_gap(curves, torch.tensor([0.2, 0.7]))
        tensor(0.3600)
    """
    utility, thresholds = _curves(utility, thresholds)
    if _checks.fraction("fraction", fraction) > 0.5:
        raise ValueError(f"fraction must lie in (0, 0.5], got {fraction}")
    length = thresholds[-1] - thresholds[0]
    ranked = utility[torch.trapezoid(utility, thresholds, dim=1).argsort()]
    count = max(1, int(fraction * len(utility) + 1e-9))  # 0.29 of 100 are 29, though the product is a little less
    gap = ranked[-count:].mean(0) - ranked[:count].mean(0)
    return torch.trapezoid(gap.square(), thresholds) / length


_BINS = 2**14  # of the distances: the values in the few bins that hold a quantile are kept


@torch.no_grad()
def calibration_range(
    embedding: Tensor,
    labels: Tensor,
    *,
    far: tuple[float, float] = (0.01, 0.1),
    metric: str = "euclidean",
    chunk_size: int | None = None,
) -> tuple[float, float]:
    r"""The thresholds at which two given shares of all negative pairs are accepted: quantiles of the pooled negative distances (eq-tcm-range).

    Exact, with linear interpolation between neighbors, though the distances are never held: one pass counts them in bins, and a
    second keeps those of the bins in question.

    Args:
        embedding, labels, metric, chunk_size: as in :func:`operating_characteristics`.
        far: two false accept rates, :math:`0<f_1<f_2\le1`.

    Returns:
        :math:`(t_{\min},t_{\max})`, floats; the smaller rate belongs to the smaller threshold.

    Raises:
        TypeError, ValueError: for a wrong type, shape, rate or metric, no negative pair, or thresholds that coincide, naming the argument.

    Complexity: O(n^2 d) time, O(chunk_size * n + n d) memory unless most distances are equal.

    Source: Zhang et al., section 3 (calibration range).

    Example:
        >>> angle = torch.arange(8) * torch.pi / 8
        >>> x = torch.stack([angle.cos(), angle.sin()], dim=1)
        >>> low, high = calibration_range(x, torch.arange(8) // 2, far=(0.1, 0.9))
        >>> round(low, 4), round(high, 4)
        (0.5027, 1.7923)
    """
    if not isinstance(far, tuple | list) or len(far) != 2:
        raise TypeError(f"far must be two numbers, got {far!r}")
    rates = [_checks.fraction("far", rate) for rate in far]
    if not rates[0] < rates[1]:
        raise ValueError(f"far must be in ascending order, got {tuple(far)}")

    def negatives() -> Iterator[Tensor]:
        for rows, distance in _distance_rows(embedding, labels, metric, chunk_size):
            itself = torch.arange(len(labels), device=labels.device)
            yield distance[(labels[rows, None] != labels) & (itself[rows, None] < itself)]

    def bins(values: Tensor) -> Tensor:
        return ((values - low) * (_BINS / (high - low))).long().clamp(0, _BINS - 1)

    low, high = 0.0, 2.0
    if metric == "precomputed":
        low, high = _ends(embedding)
        high = high.where(high > low, low + 1)
    counts = sum(torch.bincount(bins(values), minlength=_BINS) for values in negatives())
    total = int(counts.sum())
    if total == 0:
        raise ValueError("labels must have at least two classes, so that there is a negative pair")
    places = torch.tensor(rates, dtype=torch.float64, device=counts.device) * (total - 1)
    ranks = torch.stack([places.floor(), places.ceil()]).long()
    home = torch.searchsorted(counts.cumsum(0), ranks, right=True)
    kept = torch.zeros(_BINS, dtype=torch.bool, device=counts.device)
    kept[home.flatten()] = True
    values = torch.cat([chunk[kept[bins(chunk)]] for chunk in negatives()]).sort().values
    skipped = (counts * ~kept).cumsum(0)
    lower, upper = values[ranks - skipped[home]]
    first, last = torch.lerp(lower, upper, places - places.floor()).tolist()
    if not first < last:
        raise ValueError(f"far must give two different thresholds, but both are {first:.6g}")
    return first, last


@torch.no_grad()
def recall_at_1(embedding: Tensor, labels: Tensor, *, chunk_size: int | None = None) -> Tensor:
    r"""Share of samples whose nearest other sample is of their class (eq-tcm-recall). No threshold enters.

    Args:
        embedding: shape ``(n, d)``, floating point; rows are L2-normalized here.
        labels: int64, shape ``(n,)``; samples that are alone in their class are not asked, but may be answers.
        chunk_size: rows of similarities held at a time; None chooses.

    Returns:
        Shape ``()``, float64, in [0, 1]. A tie for the nearest is broken arbitrarily.

    Raises:
        TypeError, ValueError: for a wrong type or shape, or where no class has two samples, naming the argument.

    Complexity: O(n^2 d) time, O(chunk_size * n + n d) memory.

    Source: the standard measure of retrieval, as in Zhang et al., section 5.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
        >>> recall_at_1(x, torch.tensor([0, 0, 1, 1]))  # the inner two are nearest to each other
        tensor(0.5000, dtype=torch.float64)
    """
    z = _unit_rows(embedding, labels)
    _, group, sizes = labels.unique(return_inverse=True, return_counts=True)
    asked = sizes[group] > 1
    if not asked.any():
        raise ValueError("labels must have a class with two samples")
    itself = torch.arange(len(z), device=z.device)
    _, nearest = ops.streamed_topk(z, z, 1, exclude=itself, chunk_size=chunk_size)
    return (group[nearest[:, 0]] == group)[asked].double().mean()
