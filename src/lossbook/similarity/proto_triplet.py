r"""Two losses for few-shot learning that look at distances: Proto-Triplet and ICNN.

The method of *SuSana Distancia is all you need* (Mendez-Ruiz et al., arXiv 2305.09062, 2023): episodes of a few labeled images
of each class; the triplet loss of queries with class prototypes; the inter- and intra-class nearest-neighbor score and its
negative logarithm as a loss; and the cross-entropy of prototypical networks, which both are measured against and combined with.
Equation labels are those of the chapter ``similarity/proto_triplet``.

Notation: embeddings ``(n, d)`` are not normalized; ``support`` are the labeled points of an episode, ``queries`` those to be
classified, ``prototypes`` (N, d) the class means; row :math:`a` of ``prototypes`` is class :math:`a`. Logs are natural.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lossbook import _checks

# ---------------------------------------------------------------------------------------------------------------------
# Episodes
# ---------------------------------------------------------------------------------------------------------------------


class Episode(NamedTuple):
    """A few-shot task, as :func:`sample_episode` draws it.

    Attributes:
        support: the labeled items, shape ``(way * shot, ...)``, class after class.
        support_labels: int64, shape ``(way * shot,)``, from 0 to way - 1.
        queries: the items to be classified, none of them in ``support``, class after class.
        query_labels: int64, one for each query, from 0 to way - 1.
        classes: int64, shape ``(way,)``: the label in the data set of each of the episode's classes.
    """

    support: Tensor
    support_labels: Tensor
    queries: Tensor
    query_labels: Tensor
    classes: Tensor


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
