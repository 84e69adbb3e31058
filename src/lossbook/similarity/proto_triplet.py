r"""Two losses for few-shot learning that look at distances: Proto-Triplet and ICNN.

The method of *SuSana Distancia is all you need* (Mendez-Ruiz et al., arXiv 2305.09062, 2023): episodes of a few labeled images
of each class; the triplet loss of queries with class prototypes; the inter- and intra-class nearest-neighbor score and its
negative logarithm as a loss; and the cross-entropy of prototypical networks, which both are measured against and combined with.
Equation labels are those of the chapter ``similarity/proto_triplet``.

Notation: embeddings ``(n, d)`` are not normalized; ``support`` are the labeled points of an episode, ``queries`` those to be
classified, ``prototypes`` (N, d) the class means; row :math:`a` of ``prototypes`` is class :math:`a`. Logs are natural.
Coordinates must be finite, and so must squared distances: in float32, coordinates of up to :math:`9\cdot10^{18}/\sqrt d`. Half
precision is computed in float32; tensors that are compared must otherwise share a dtype.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lossbook import _checks

# ---------------------------------------------------------------------------------------------------------------------
# Episodes
# ---------------------------------------------------------------------------------------------------------------------


class Episode(NamedTuple):
    """A few-shot task, as :func:`sample_episode` draws it.

    Args:
        support, support_labels, queries, query_labels, classes: the fields, described one by one below.

    Source: Vinyals et al. 2016; def-proto_triplet-episode.

    Example:
        >>> episode = sample_episode(torch.rand(8, 3), torch.arange(2).repeat(4), way=2, shot=1, queries=3)
        >>> episode.support.shape, episode.query_labels.tolist()
        (torch.Size([2, 3]), [0, 0, 0, 1, 1, 1])
    """

    support: Tensor
    """The labeled items, shape ``(way * shot, ...)``, class after class."""
    support_labels: Tensor
    """int64, shape ``(way * shot,)``, from 0 to way - 1."""
    queries: Tensor
    """The items to be classified, none of them in ``support``, class after class."""
    query_labels: Tensor
    """int64, one for each query, from 0 to way - 1."""
    classes: Tensor
    """int64, shape ``(way,)``: the label in the data set of each of the episode's classes."""


def sample_episode(
    features: Tensor,
    labels: Tensor,
    *,
    way: int,
    shot: int,
    queries: int | Sequence[int],
    generator: torch.Generator | None = None,
) -> Episode:
    """Draw a task: ``way`` classes, and from each of them ``shot`` support items and some queries (def-proto_triplet-episode).

    Classes and items are drawn uniformly without replacement. ``features=torch.arange(N)`` gives positions instead of items.

    Args:
        features: images, embeddings or anything else with one item for each label, shape ``(N, ...)``, any dtype.
        labels: classes, shape ``(N,)``, int64.
        way: number of classes, at least 1.
        shot: support items for each class, at least 1.
        queries: queries for each class, at least 1; or a sequence of ``way`` numbers of at least 0 that are not all 0, the j-th
            for the class that the episode calls j.
        generator: on the device of ``labels``.

    Returns:
        An :class:`Episode`, with labels from 0 to way - 1 in the random order of ``classes``.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if shapes do not fit, there are fewer than ``way`` classes, or a class that was drawn has too few items.

    Complexity: O(N * way + N log N) time for N labels.

    Source: Vinyals et al. 2016 (episodes); Mendez-Ruiz et al., section 3.

    Example:
        >>> labels = torch.arange(4).repeat_interleave(6)
        >>> episode = sample_episode(torch.arange(24), labels, way=3, shot=1, queries=5)
        >>> episode.support_labels, episode.queries.shape
        (tensor([0, 1, 2]), torch.Size([15]))
        >>> bool((labels[episode.support] == episode.classes).all())
        True
    """
    _checks.integer("labels", labels, 1)
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a tensor, got {type(features).__name__}")
    if features.shape[:1] != labels.shape:
        raise ValueError(f"features must have one item for each of {len(labels)} labels, got {tuple(features.shape)}")
    way, shot = _checks.positive_int("way", way), _checks.positive_int("shot", shot)
    counts = _query_counts(queries, way)
    classes = labels.unique()
    if len(classes) < way:
        raise ValueError(f"way must be at most {len(classes)}, the number of classes in labels, got {way}")
    classes = classes[torch.randperm(len(classes), generator=generator, device=labels.device)[:way]]
    support, others = [], []
    for name, count in zip(classes, counts, strict=True):
        items = (labels == name).nonzero().squeeze(1)
        if len(items) < shot + count:
            raise ValueError(
                f"labels must have shot + queries = {shot + count} items of class {name}, which was drawn, got {len(items)}"
            )
        items = items[torch.randperm(len(items), generator=generator, device=labels.device)]
        support.append(items[:shot])
        others.append(items[shot : shot + count])
    own = torch.arange(way, device=labels.device)
    query_labels = own.repeat_interleave(torch.tensor(counts, device=labels.device))
    support, others = (torch.cat(parts).to(features.device) for parts in (support, others))
    return Episode(features[support], own.repeat_interleave(shot), features[others], query_labels, classes)


def _query_counts(queries: int | Sequence[int], way: int) -> list[int]:
    """The number of queries of each of the episode's classes."""
    if not isinstance(queries, Sequence) or isinstance(queries, str):
        return [_checks.positive_int("queries", queries)] * way
    counts = [_checks.positive_int("queries", count, minimum=0) for count in queries]
    if len(counts) != way:
        raise ValueError(f"queries must hold one number for each of {way} classes, got {len(counts)}")
    if not any(counts):
        raise ValueError("queries must not all be 0")
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# Prototypes: the cross-entropy and the triplet loss
# ---------------------------------------------------------------------------------------------------------------------

# Under the root of every distance: it makes the gradient 0, not undefined, where two points coincide.
_SMOOTHING = 1e-6


def _points(name: str, value: Tensor, like: tuple[str, Tensor] | None = None) -> Tensor:
    """``value`` in float32 or wider, as 1e-6 needs, if it is ``(n, d)``, with the d and dtype of ``like``, and in range."""
    _checks.floating(name, value, 2)
    if like is not None and value.shape[1] != like[1].shape[1]:
        raise ValueError(f"{name} must have {like[1].shape[1]} columns like {like[0]}, got shape {tuple(value.shape)}")
    value = _checks.wide(_checks.finite(name, value))
    if like is not None and value.dtype != like[1].dtype:
        raise TypeError(f"{name} must have the dtype of {like[0]}, {like[1].dtype}, got {value.dtype}")
    largest = math.sqrt(torch.finfo(value.dtype).max / value.shape[1]) / 2
    if _checks.known_false(value.abs() <= largest):
        raise ValueError(f"{name} must be at most {largest:.2g} in size, for finite squared distances in {value.dtype}")
    return value


def _labels(name: str, labels: Tensor, points: tuple[str, Tensor], num_classes: int | None = None) -> Tensor:
    """``labels``, if there is one for each of ``points``, from 0 to ``num_classes`` - 1 where that is given."""
    if _checks.integer(name, labels, 1).shape != points[1].shape[:1]:
        raise ValueError(
            f"{name} must have shape ({len(points[1])},), one for each row of {points[0]}, got {tuple(labels.shape)}"
        )
    if num_classes is not None and _checks.known_false((labels >= 0) & (labels < num_classes)):
        raise ValueError(f"{name} must lie in [0, {num_classes}), got {labels.min()} to {labels.max()}")
    return labels


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """Plain distances, from differences: the form with a matrix product loses small distances far from the origin."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def class_prototypes(support: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    r"""The mean of each class's support points, :math:`c_a` (eq-proto_triplet-prototype).

    Args:
        support: shape ``(S, d)``, floating point, finite.
        labels: shape ``(S,)``, int64, from 0 to ``num_classes`` - 1, each of them at least once.
        num_classes: N, at least 1.

    Returns:
        Shape ``(N, d)``, float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape or label, or a class without support, naming the argument.

    Complexity: O((S + N) d) time and memory.

    Source: Snell et al. 2017, eq. 1; Mendez-Ruiz et al., section 3.

    Example:
        >>> class_prototypes(torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1]), 2)
        tensor([[1.],
                [5.]])
    """
    points = _points("support", support)
    num_classes = _checks.positive_int("num_classes", num_classes)
    _labels("labels", labels, ("support", points), num_classes)
    counts = points.new_zeros(num_classes).index_add(0, labels, points.new_ones(len(labels)))
    if _checks.known_false(counts > 0):
        raise ValueError(f"labels must hold each class below {num_classes}, got none of class {int(counts.argmin())}")
    return points.new_zeros(num_classes, points.shape[1]).index_add(0, labels, points) / counts[:, None]


def euclidean_distance(x: Tensor, y: Tensor, *, eps: float = _SMOOTHING) -> Tensor:
    r"""Smoothed distances :math:`d(x,y)=\sqrt{\|x-y\|^2+\varepsilon}` (eq-proto_triplet-distance).

    Args:
        x: shape ``(n, d)``, floating point, finite.
        y: shape ``(m, d)``.
        eps: :math:`\varepsilon>0`, in squared units; the gradient at ``x = y`` is 0.

    Returns:
        Shape ``(n, m)``, float32 or wider, at least :math:`\sqrt\varepsilon`. First derivatives only.

    Raises:
        TypeError, ValueError: for a wrong type, shape or eps, naming the argument.

    Complexity: O(nmd) time, O(nm) memory.

    Source: Mendez-Ruiz et al., released code.

    Example:
        >>> euclidean_distance(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[5.0000e+00, 1.0000e-03]])
    """
    x = _points("x", x)
    y = _points("y", y, ("x", x))
    return (_distance(x, y).square() + _checks.positive_number("eps", eps)).sqrt()


def _episode(queries: Tensor, labels: Tensor, prototypes: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Checked queries and prototypes."""
    prototypes = _points("prototypes", prototypes)
    if len(prototypes) < least:
        raise ValueError(f"prototypes must be at least {least}, so that one is wrong, got {len(prototypes)}")
    queries = _points("queries", queries, ("prototypes", prototypes))
    _labels("labels", labels, ("queries", queries), len(prototypes))
    return queries, prototypes


def prototypical_loss(
    queries: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy of prototypical networks: logits are minus squared distances over T (eq-proto_triplet-ce).

    Args:
        queries: shape ``(Q, d)``, floating point, finite.
        labels: the query's row of ``prototypes``, shape ``(Q,)``, int64.
        prototypes: shape ``(N, d)``.
        temperature: :math:`T>0`, a number or a tensor of shape ``()`` (differentiable), in squared units of the embedding.
        reduction: "none", "mean" or "sum" over the queries.

    Returns:
        Shape ``()``, or ``(Q,)`` with reduction "none"; at least 0; float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape, label, temperature or reduction, naming the argument.

    Complexity: O(QNd) time, O(QN) memory.

    Source: Snell et al. 2017, eq. 2; Mendez-Ruiz et al., section 3.

    Example:
        >>> c = torch.tensor([[0.0], [2.0]])
        >>> prototypical_loss(torch.tensor([[0.5]]), torch.tensor([0]), c)  # log(1 + e^(0.25 - 2.25))
        tensor(0.1269)
    """
    queries, prototypes = _episode(queries, labels, prototypes, least=1)
    logits = -_distance(queries, prototypes).square() / _checks.temperature(temperature)
    loss = F.cross_entropy(logits, labels, ignore_index=_checks.NO_CLASS, reduction="none")
    return _checks.reduced(loss, reduction)


def proto_triplet_loss(
    queries: Tensor, labels: Tensor, prototypes: Tensor, *, margin: float = 0.5, reduction: str = "mean"
) -> Tensor:
    r"""Proto-Triplet: :math:`\big[d(z_q,c_{y_q})-\min_{a\ne y_q}d(z_q,c_a)+m\big]_+` for each query (eq-proto_triplet-loss).

    Args:
        queries: shape ``(Q, d)``, floating point, finite.
        labels: the query's row of ``prototypes``, shape ``(Q,)``, int64.
        prototypes: shape ``(N, d)``, N at least 2. At a tie of nearest wrong ones each gets an equal share of the gradient.
        margin: :math:`m\ge0`, in units of the embedding.
        reduction: "none", "mean" or "sum" over the queries.

    Returns:
        Shape ``()``, or ``(Q,)`` with reduction "none"; float32 or wider. 0 where the query is nearer to its own prototype, by m.

    Raises:
        TypeError, ValueError: for a wrong type, shape, label, margin or reduction, naming the argument.

    Complexity: O(QNd) time, O(QN) memory.

    Source: Mendez-Ruiz et al., Proto-Triplet loss.

    Example:
        >>> c = torch.tensor([[0.0], [4.0]])
        >>> proto_triplet_loss(torch.tensor([[0.0], [3.0]]), torch.tensor([0, 0]), c)  # (0 + (3 - 1 + 0.5)) / 2
        tensor(1.2500)
    """
    queries, prototypes = _episode(queries, labels, prototypes, least=2)
    margin = _checks.number("margin", margin, 0.0)
    distance = euclidean_distance(queries, prototypes)
    own = distance.gather(1, labels[:, None])
    nearest_wrong = distance.scatter(1, labels[:, None], torch.inf).amin(1)
    return _checks.reduced(F.relu(own.squeeze(1) - nearest_wrong + margin), reduction)


# ---------------------------------------------------------------------------------------------------------------------
# The nearest-neighbor score and its loss
# ---------------------------------------------------------------------------------------------------------------------

# Distances that the search holds at a time.
_CHUNK_ELEMENTS = 2**22


def _nearest(points: Tensor, reference: Tensor | None, count: int) -> Tensor:
    """Positions of the ``count`` nearest in ``reference`` of each point, or, without reference, of the other points."""
    others = points if reference is None else reference
    rows = max(1, _CHUNK_ELEMENTS // len(others))
    nearest = []
    for start in range(0, len(points), rows):
        distance = _distance(points[start : start + rows], others)
        if reference is None:
            own = torch.arange(start, start + len(distance), device=points.device)
            distance = distance.scatter(1, own[:, None], torch.inf)
        nearest.append(distance.topk(count, dim=1, largest=False).indices)
    return torch.cat(nearest)


def _neighborhood(
    embedding: Tensor,
    labels: Tensor,
    k: int,
    num_neighbors: int | None,
    reference: Tensor | None,
    reference_labels: Tensor | None,
) -> tuple[Tensor, Tensor, int, bool]:
    """Distances to the K nearest and whether they share the label, both (n, K); k; and whether k had to be cut."""
    points = others = _points("embedding", embedding)
    other_labels = _labels("labels", labels, ("embedding", points))
    if (reference is None) != (reference_labels is None):
        raise ValueError("reference_labels must be given with reference, and only then")
    if reference is not None:
        others = reference = _points("reference", reference, ("embedding", points))
        other_labels = _labels("reference_labels", reference_labels, ("reference", reference))
    available = len(others) - (reference is None)
    if available < 2:
        name = "embedding" if reference is None else "reference"
        raise ValueError(f"{name} must have 2 neighbors for each point, got {len(others)} rows")
    k = _checks.positive_int("k", k)
    cut = k + 1 >= available
    k = min(k, available - 1)
    count = k + 1 if num_neighbors is None else _checks.positive_int("num_neighbors", num_neighbors)
    if not k <= count <= available:
        raise ValueError(f"num_neighbors must lie between k = {k} and the {available} available, got {count}")
    with torch.no_grad():
        index = _nearest(points.detach(), None if reference is None else reference.detach(), count)
    # Only these distances are differentiated: the search leaves no matrix behind.
    distance = ((points[:, None] - others[index]).square().sum(2) + _SMOOTHING).sqrt()
    return distance, labels[:, None] == other_labels[index], k, cut


class IcnnParts(NamedTuple):
    """The three terms of the score, each of shape ``()`` and between 0 and 1.

    Args:
        lambda_intra, lambda_inter, gamma: the fields, described one by one below.

    Source: Mendez-Ruiz et al., ICNN loss; def-proto_triplet-icnn.

    Example:
        >>> parts = icnn_parts(torch.rand(6, 2), torch.zeros(6, dtype=torch.int64), k=2)  # one class: no enemy
        >>> tuple(part.item() for part in parts)
        (1.0, 1.0, 1.0)
    """

    lambda_intra: Tensor
    """One minus the mean relative distance of same-class neighbors (eq-proto_triplet-intra)."""
    lambda_inter: Tensor
    """Mean relative distance of neighbors of other classes (eq-proto_triplet-inter)."""
    gamma: Tensor
    """Share of same-class neighbors, without gradient (eq-proto_triplet-purity)."""


def icnn_parts(
    embedding: Tensor,
    labels: Tensor,
    *,
    k: int = 4,
    num_neighbors: int | None = None,
    reference: Tensor | None = None,
    reference_labels: Tensor | None = None,
) -> IcnnParts:
    r"""The three terms of the inter- and intra-class nearest-neighbor score.

    With :math:`d_{i1}\le\dots\le d_{iK}` the smoothed distances of point i to its nearest others, :math:`s_{ij}` whether the j-th has
    its label and :math:`\delta_i` the least distance among those that have not (infinite if there is none):
    :math:`\lambda_{\mathrm{intra}}` is one minus the mean of :math:`d_{ij}/\max(\delta_i,d_{ik})` over same-class neighbors
    :math:`j\le k`; :math:`\lambda_{\mathrm{inter}}` is the mean of :math:`d_{ij}/D` over the others, D being the largest such distance
    of all points; :math:`\gamma` is the mean of :math:`s_{ij}` over :math:`j\le k`. Means are taken point by point first, and over
    the points that have such a neighbor; the first mean is 0 and the second 1 if none has.

    Args:
        embedding: the points that are scored, shape ``(n, d)``, floating point, finite; not normalized here.
        labels: shape ``(n,)``, int64, any numbers.
        k: neighbors in the means, at least 1; cut to one less than the points available, and :math:`\gamma` is 1 then, and also
            where no more than k + 1 are available, as in the released code.
        num_neighbors: K, where enemies are looked for; None is k + 1. With K at most the number of same-class others, a point
            whose K nearest share its label has no gradient: with one more than that number, no point is without.
        reference: the points among which neighbors are looked for, shape ``(m, d)``; None for the other rows of ``embedding``.
            No row of ``reference`` is left out.
        reference_labels: shape ``(m,)``, int64; with ``reference``.

    Returns:
        :class:`IcnnParts`, float32 or wider. Ties among neighbors are broken arbitrarily.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, or fewer than 2 neighbors available, naming the argument.

    Complexity: O(nmd) time forward and O(nKd) backward; O(nKd) memory besides a chunk of the distances.

    Source: Mendez-Ruiz et al., ICNN loss, in the form of the released code.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
        >>> parts = icnn_parts(x, torch.tensor([0, 0, 0, 1, 1, 1]), k=2, num_neighbors=5)
        >>> [round(part.item(), 4) for part in parts]
        [0.8505, 1.0, 1.0]
    """
    distance, same, k, cut = _neighborhood(embedding, labels, k, num_neighbors, reference, reference_labels)
    near, friend = distance[:, :k], same[:, :k]
    nearest_enemy = distance.masked_fill(same, torch.inf).amin(1)
    lambda_intra = 1 - _mean_of_means(near / torch.maximum(nearest_enemy, near[:, -1])[:, None], friend)
    farthest = near.masked_fill(friend, 0).amax()
    some = (~friend).any()
    lambda_inter = torch.where(some, _mean_of_means(near / torch.where(some, farthest, 1), ~friend), 1)
    purity = friend.to(near.dtype).mean()
    return IcnnParts(lambda_intra, lambda_inter, torch.ones_like(purity) if cut else purity)


def _mean_of_means(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over rows of each row's mean over ``mask``; rows without an element are left out, and 0 is the mean of none."""
    counts = mask.sum(1)
    rows = (values * mask).sum(1) / counts.clamp(min=1)
    return rows.sum() / (counts > 0).sum().clamp(min=1)


def icnn_score(
    embedding: Tensor,
    labels: Tensor,
    *,
    k: int = 4,
    num_neighbors: int | None = None,
    reference: Tensor | None = None,
    reference_labels: Tensor | None = None,
) -> Tensor:
    r"""The score :math:`\frac12\big(\frac12(\lambda_{\mathrm{intra}}+\lambda_{\mathrm{inter}})+\gamma\big)` (eq-proto_triplet-score).

    Unchanged by rotations and shifts of the embedding, and, up to the smoothing of distances, by a change of its scale.

    Args:
        embedding, labels, k, num_neighbors, reference, reference_labels: as in :func:`icnn_parts`.

    Returns:
        Shape ``()``, in (0, 1], float32 or wider; higher is better separated.

    Raises:
        TypeError, ValueError: as :func:`icnn_parts`.

    Complexity: that of :func:`icnn_parts`.

    Source: Mendez-Ruiz et al., ICNN loss, in the form of the released code.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
        >>> icnn_score(x, torch.tensor([0, 0, 0, 1, 1, 1]), k=2, num_neighbors=5)
        tensor(0.9626)
    """
    options = dict(k=k, num_neighbors=num_neighbors, reference=reference, reference_labels=reference_labels)
    parts = icnn_parts(embedding, labels, **options)
    return ((parts.lambda_intra + parts.lambda_inter) / 2 + parts.gamma) / 2


def icnn_loss(
    embedding: Tensor,
    labels: Tensor,
    *,
    k: int = 4,
    num_neighbors: int | None = None,
    reference: Tensor | None = None,
    reference_labels: Tensor | None = None,
) -> Tensor:
    r"""The ICNN loss, :math:`-\log` of :func:`icnn_score` (eq-proto_triplet-icnn).

    Args:
        embedding, labels, k, num_neighbors, reference, reference_labels: as in :func:`icnn_parts`.

    Returns:
        Shape ``()``, at least 0, float32 or wider.

    Raises:
        TypeError, ValueError: as :func:`icnn_parts`.

    Complexity: that of :func:`icnn_parts`.

    Source: Mendez-Ruiz et al., ICNN loss, in the form of the released code.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
        >>> icnn_loss(x, torch.tensor([0, 0, 0, 1, 1, 1]), k=2, num_neighbors=5)
        tensor(0.0381)
    """
    options = dict(k=k, num_neighbors=num_neighbors, reference=reference, reference_labels=reference_labels)
    return -icnn_score(embedding, labels, **options).log()


@torch.no_grad()
def icnn_score_classic(
    embedding: Tensor, labels: Tensor, *, k: int = 5, p: float = 2.0, q: float = 2.0, r: float = 2.0
) -> Tensor:
    r"""The older score with a variance term, :math:`\frac13(\lambda+\omega+\gamma)` (eq-proto_triplet-classic); to compare, not to train.

    Args:
        embedding: shape ``(n, d)``, floating point, finite.
        labels: shape ``(n,)``, int64.
        k: neighbors of each point, at least 1; cut to one less than the points available.
        p: exponent of the distance term, > 0: its points enter with the power 1/p.
        q: exponent of the variance term, > 0.
        r: exponent of the purity term, > 0.

    Returns:
        Shape ``()``, in [0, 1], without gradient, float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, or fewer than 3 points, naming the argument.

    Complexity: O(n^2 d) time, O(nkd) memory besides a chunk of the distances.

    Source: Mendez-Ruiz et al. 2021 (arXiv 2107.06992), released code.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
        >>> icnn_score_classic(x, torch.tensor([0, 0, 0, 1, 1, 1]), k=2)
        tensor(0.8917)
    """
    p, q, r = (_checks.positive_number(name, value) for name, value in (("p", p), ("q", q), ("r", r)))
    distance, same, k, _ = _neighborhood(embedding, labels, k, None, None, None)
    near, friend = distance[:, :k], same[:, :k].to(distance.dtype)
    span = near[:, -1:] - near[:, :1]
    scaled = (near - near[:, :1]) / torch.where(span > 0, span, 1)
    per_point = (friend * (1 - scaled) + (1 - friend) * scaled).sum(1)
    best = per_point.amax()
    distance_term = (per_point / torch.where(best > 0, best, 1)).pow(1 / p).mean()
    variances = (friend * scaled).var() + ((1 - friend) * scaled).var()  # of at least 3 numbers in [0, 1]: at most 3/4
    variance_term = (1 - variances).pow(1 / q)
    return (distance_term + variance_term + friend.mean(1).pow(1 / r).mean()) / 3


# ---------------------------------------------------------------------------------------------------------------------
# Both together
# ---------------------------------------------------------------------------------------------------------------------

TERMS = ("ce", "proto_triplet", "icnn", "icnn_support", "icnn_query", "icnn_prototype")


def episodic_loss(
    support: Tensor,
    support_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    terms: Sequence[str] = ("ce", "proto_triplet", "icnn"),
    temperature: float | Tensor = 1.0,
    margin: float = 0.5,
    k: int = 4,
) -> Tensor:
    r"""The mean of several losses on one episode (eq-proto_triplet-combination).

    "ce" is :func:`prototypical_loss` and "proto_triplet" :func:`proto_triplet_loss`, of the queries with the means of the support;
    "icnn" is :func:`icnn_loss` of support and queries together, "icnn_support" of the support alone, "icnn_query" of the queries
    with their neighbors in the support, "icnn_prototype" with theirs among the prototypes. K is one more than the number of
    same-class points that a point can have for neighbors, and at least k + 1: no point is without a force.

    Args:
        support: shape ``(S, d)``, floating point, finite.
        support_labels: shape ``(S,)``, int64, from 0 to N - 1, each of them at least once, N at least 2.
        queries: shape ``(Q, d)``.
        query_labels: shape ``(Q,)``, int64, from 0 to N - 1.
        terms: which losses, different names of the above.
        temperature: of "ce".
        margin: of "proto_triplet".
        k: neighbors of the "icnn" losses.

    Returns:
        Shape ``()``, float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape, label, name or number, naming the argument.

    Complexity: that of the terms: O((S + Q)^2 d) time with "icnn", O(QNd) with prototypes only.

    Source: Mendez-Ruiz et al., the combinations of the released code.

    Example:
        >>> support, queries = torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [3.0]])
        >>> episodic_loss(support, torch.tensor([0, 1]), queries, torch.tensor([0, 1]), terms=("ce", "proto_triplet"))
        tensor(0.0002)
    """
    if isinstance(terms, str) or not isinstance(terms, Sequence):
        raise TypeError(f"terms must be a sequence of names, got {type(terms).__name__}")
    if not all(isinstance(term, str) for term in terms):
        raise TypeError(f"terms must be names, got {list(terms)}")
    if not terms or len(set(terms)) < len(terms) or not set(terms) <= set(TERMS):
        raise ValueError(f"terms must be different names out of {TERMS}, got {tuple(terms)}")
    k = _checks.positive_int("k", k)
    support = _points("support", support)
    _labels("support_labels", support_labels, ("support", support))
    way = int(support_labels.max()) + 1
    if way < 2:
        raise ValueError("support_labels must hold at least 2 classes, got one")
    _labels("support_labels", support_labels, ("support", support), way)
    if _checks.known_false(support_labels.bincount() > 0):
        raise ValueError(f"support_labels must hold each class below {way}, got {support_labels.unique().tolist()}")
    queries = _points("queries", queries, ("support", support))
    _labels("query_labels", query_labels, ("queries", queries), way)
    prototypes, own = class_prototypes(support, support_labels, way), torch.arange(way, device=support.device)

    def icnn(points: Tensor, labels: Tensor, reference: Tensor | None = None, names: Tensor | None = None) -> Tensor:
        enough = int((labels if names is None else names).bincount().max()) + (names is not None)
        count = enough if enough > k else None
        return icnn_loss(points, labels, k=k, num_neighbors=count, reference=reference, reference_labels=names)

    losses = {
        "ce": lambda: prototypical_loss(queries, query_labels, prototypes, temperature=temperature),
        "proto_triplet": lambda: proto_triplet_loss(queries, query_labels, prototypes, margin=margin),
        "icnn": lambda: icnn(torch.cat([support, queries]), torch.cat([support_labels, query_labels])),
        "icnn_support": lambda: icnn(support, support_labels),
        "icnn_query": lambda: icnn(queries, query_labels, support, support_labels),
        "icnn_prototype": lambda: icnn(queries, query_labels, prototypes, own),
    }
    return torch.stack([losses[term]() for term in terms]).mean()
