r"""Learning by sorting: all positives should come after all negatives, in whatever order inside each group.

The method of *Learning by Sorting: Self-supervised Learning with Group Ordering Constraints* (Shvetsova, Petersen, Kukleva, Schiele
and Kuehne, ICCV 2023, arXiv 2301.02009): relaxed sorting networks, the probability that an element ends among the ranks of its
group, the loss made of it, and the softmax loss over the same hardest negatives. Equation labels are those of the chapter
``similarity/groco``.

Notation: ``x`` (B, n) holds n scores a row, small ones first when sorted; ``permutation`` is :math:`Q`, with
:math:`Q_{ij}` the share of input i at rank j; ``steepness`` is :math:`\beta` and ``distribution`` names the comparator :math:`F`.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lossbook import _checks, ops
from lossbook.similarity.temperature import contrastive_loss

# ---------------------------------------------------------------------------------------------------------------------
# Comparators
# ---------------------------------------------------------------------------------------------------------------------


def _cauchy(v: Tensor) -> Tensor:
    # 1/2 + atan(v)/pi as the angle of the point (-v, 1): it keeps its digits where it is close to zero.
    return torch.atan2(torch.ones_like(v), -v) / math.pi


def _reciprocal(v: Tensor) -> Tensor:
    tail = 1 / (2 + torch.where(v > 0, v, -v))  # |v|, with a derivative at zero
    return torch.where(v > 0, 1 - tail, tail)


def _log_ndtr(v: Tensor) -> Tensor:
    # torch.special.log_ndtr has a wrong derivative far below zero in float32; erfcx carries the tail without its exponential.
    low = v.clamp(max=-1.0)
    tail = (torch.special.erfcx(-low / math.sqrt(2)) / 2).log() - low * low / 2
    return torch.where(v < -1, tail, torch.special.ndtr(v.clamp(min=-1.0)).log())


_COMPARATORS = {
    "cauchy": _cauchy,
    "logistic": torch.sigmoid,
    "gaussian": torch.special.ndtr,
    "reciprocal": _reciprocal,
}
_LOG_COMPARATORS = {
    "cauchy": lambda v: _cauchy(v).log(),
    "logistic": F.logsigmoid,
    "gaussian": _log_ndtr,
    "reciprocal": lambda v: _reciprocal(v).log(),
}


def _checked(steepness: float, distribution: str) -> float:
    if not isinstance(distribution, str) or distribution not in _COMPARATORS:
        raise ValueError(f"distribution must be one of {tuple(_COMPARATORS)}, got {distribution!r}")
    return _checks.positive_number("steepness", steepness)


def comparator(difference: Tensor, *, steepness: float = 1.0, distribution: str = "cauchy") -> Tensor:
    r"""Probability :math:`F(b-a)` that a gate leaves a and b in their order (eq-groco-comparators).

    :math:`F(-x)=1-F(x)`, and F does not decrease. "cauchy" and "reciprocal" keep every output of a network monotone in every input;
    "logistic" and "gaussian" do not (thm-groco-monotone).

    Args:
        difference: :math:`b-a`, any shape, floating point.
        steepness: :math:`\beta>0`, in inverse units of ``difference``; the order becomes hard as it grows.
        distribution: "cauchy", :math:`\frac12+\frac1\pi\arctan\beta x`; "logistic", :math:`\sigma(\beta x)`; "gaussian",
            :math:`\Phi(\beta x)`; or "reciprocal", :math:`\frac12\bigl(1+\frac{\beta x}{2+\beta|x|}\bigr)`.

    Returns:
        The shape of ``difference``, in [0, 1].

    Raises:
        TypeError, ValueError: for a wrong type, steepness or distribution, naming the argument.

    Source: Shvetsova et al., section on differentiable sorting; Petersen et al. 2022 for Cauchy and reciprocal.

    Example:
        >>> comparator(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.2500, 0.5000, 0.7500])
    """
    steepness = _checked(steepness, distribution)
    return _COMPARATORS[distribution](steepness * _checks.floating("difference", difference))


# ---------------------------------------------------------------------------------------------------------------------
# Relaxed sorting networks
# ---------------------------------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """Gates on the wires from ``start`` to ``stop``, in blocks of twice ``stride``: low half against high half.

    ``mirrored``: the first wire of a block meets the last one, the second the last but one.
    """

    start: int
    stop: int
    stride: int = 1
    mirrored: bool = False


def _odd_even_layers(n: int) -> list[_Layer]:
    layers = [_Layer(parity, n - (n - parity) % 2) for parity in (0, 1)]
    return [layers[step % 2] for step in range(n) if layers[step % 2].stop > layers[step % 2].start]


def _bitonic_layers(n: int) -> list[_Layer]:
    if n & (n - 1):
        raise ValueError(f"x must have a power of two as its number of columns for a bitonic network, got {n}")
    layers = []
    for merge in range(1, n.bit_length()):  # two sorted runs of 2^(merge - 1) become one of 2^merge
        layers.append(_Layer(0, n, 2 ** (merge - 1), mirrored=True))
        layers += [_Layer(0, n, 2**half) for half in reversed(range(merge - 1))]
    return layers


_NETWORKS = {"odd_even": _odd_even_layers, "bitonic": _bitonic_layers}


def _split(wires: Tensor, layer: _Layer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Wires ``(B, n, ...)`` as those before the layer's gates, low ends, high ends, those after."""
    before, gated, after = wires.split([layer.start, layer.stop - layer.start, wires.shape[1] - layer.stop], dim=1)
    low, high = gated.unflatten(1, (-1, 2, layer.stride)).unbind(2)
    return before, low, high.flip(2) if layer.mirrored else high, after


def _join(before: Tensor, low: Tensor, high: Tensor, after: Tensor, layer: _Layer) -> Tensor:
    """The inverse of :func:`_split`."""
    gated = torch.stack([low, high.flip(2) if layer.mirrored else high], dim=2).flatten(1, 3)
    return torch.cat([before, gated, after], dim=1) if before.shape[1] + after.shape[1] else gated


def _run(x: Tensor, layers: list[_Layer], steepness: float, distribution: str) -> tuple[Tensor, list[Tensor]]:
    """Relaxed sorted scores, and the differences that the gates of each layer saw."""
    differences = []
    for layer in layers:
        before, low, high, after = _split(x, layer)
        differences.append(steepness * (high - low))
        stay = _COMPARATORS[distribution](differences[-1])
        x = _join(before, torch.lerp(high, low, stay), torch.lerp(low, high, stay), after, layer)
    return x, differences


def _sort(x: Tensor, network: str, steepness: float, distribution: str) -> tuple[Tensor, Tensor]:
    steepness = _checked(steepness, distribution)
    n = _checks.floating("x", x, 2).shape[1]
    layers = _NETWORKS[network](n)
    x, differences = _run(x, layers, steepness, distribution)
    columns = torch.eye(n, dtype=x.dtype, device=x.device).expand(len(x), n, n)  # wire, input
    for layer, difference in zip(layers, differences, strict=True):
        before, low, high, after = _split(columns, layer)
        stay = _COMPARATORS[distribution](difference)[..., None]
        columns = _join(before, torch.lerp(high, low, stay), torch.lerp(low, high, stay), after, layer)
    return x, columns.transpose(1, 2)


def odd_even_sort(x: Tensor, *, steepness: float = 1.0, distribution: str = "cauchy") -> tuple[Tensor, Tensor]:
    r"""Relaxed odd-even transposition sort: scores in ascending order, and the soft permutation Q (eq-groco-permutation).

    n layers; each compares neighbors, by turns from the first wire and from the second. Q is doubly stochastic, and
    the sorted scores are :math:`\hat x=Q^\top x`.

    Args:
        x: scores, shape ``(B, n)``, floating point.
        steepness: :math:`\beta>0`; the sort becomes exact as it grows.
        distribution: of the comparator, see :func:`comparator`.

    Returns:
        Sorted scores of shape ``(B, n)``, and Q of shape ``(B, n, n)``: ``Q[b, i, j]`` is the share of input i at rank j.

    Raises:
        TypeError, ValueError: for a wrong type, shape, steepness or distribution, naming the argument.

    Complexity: O(B n^3) time in n steps; O(B n^2) memory, and O(B n^3) where autograd keeps each step. The loss does not need Q and
    stays at O(B n^2) for both (:func:`group_log_probabilities`).

    Source: Petersen et al. 2021; Shvetsova et al., section on differentiable sorting.

    Example:
        >>> scores, q = odd_even_sort(torch.tensor([[3.0, 1.0, 2.0]]), steepness=1e6)
        >>> scores.round(), q[0].round()
        (tensor([[1., 2., 3.]]), tensor([[0., 0., 1.],
                [1., 0., 0.],
                [0., 1., 0.]]))
    """
    return _sort(x, "odd_even", steepness, distribution)


def bitonic_sort(x: Tensor, *, steepness: float = 1.0, distribution: str = "cauchy") -> tuple[Tensor, Tensor]:
    r"""Relaxed bitonic sort: as :func:`odd_even_sort`, in :math:`\frac12\log_2n\,(\log_2n+1)` layers.

    Args:
        x: scores, shape ``(B, n)``, floating point, n a power of two.
        steepness: :math:`\beta>0`; the sort becomes exact as it grows.
        distribution: of the comparator, see :func:`comparator`.

    Returns:
        Sorted scores of shape ``(B, n)``, and Q of shape ``(B, n, n)``: ``Q[b, i, j]`` is the share of input i at rank j.

    Raises:
        TypeError, ValueError: for a wrong type, shape, steepness or distribution, naming the argument.

    Complexity: O(B n^2 log^2 n) time and, where autograd keeps each step, memory.

    Source: Batcher 1968; Petersen et al. 2021.

    Example:
        >>> bitonic_sort(torch.tensor([[3.0, 1.0, 4.0, 2.0]]), steepness=1e6)[0]
        tensor([[1.0000, 2.0000, 3.0000, 4.0000]])
    """
    return _sort(x, "bitonic", steepness, distribution)


# ---------------------------------------------------------------------------------------------------------------------
# Group ordering constraints
# ---------------------------------------------------------------------------------------------------------------------


def group_probabilities(permutation: Tensor, num_negatives: int) -> Tensor:
    r"""Share of each input on the first k ranks, :math:`\pi^-_i=\sum_{j\le k}Q_{ij}` (eq-groco-group).

    Args:
        permutation: Q of :func:`odd_even_sort` or :func:`bitonic_sort`, shape ``(B, n, n)``, floating point.
        num_negatives: k, from 1 to n - 1.

    Returns:
        Shape ``(B, n)``, in [0, 1]; each row adds up to k. :math:`\pi^+_i` is one minus it.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Source: Shvetsova et al., section on group ordering constraints.

    Example:
        >>> _, q = odd_even_sort(torch.zeros(1, 3))  # two negatives and a positive, tied
        >>> group_probabilities(q, 2)
        tensor([[0.7500, 0.7500, 0.5000]])
    """
    _checks.floating("permutation", permutation, 3)
    if permutation.shape[1] != permutation.shape[2]:
        raise ValueError(f"permutation must have shape (B, n, n), got {tuple(permutation.shape)}")
    _check_split(num_negatives, permutation.shape[1])
    return permutation[:, :, :num_negatives].sum(2)


def _check_split(num_negatives: int, n: int) -> None:
    if _checks.positive_int("num_negatives", num_negatives) >= n:
        raise ValueError(f"num_negatives must be less than the number of scores, {n}, got {num_negatives}")


def group_log_probabilities(
    x: Tensor,
    num_negatives: int,
    *,
    network: str = "odd_even",
    steepness: float = 1.0,
    distribution: str = "cauchy",
) -> Tensor:
    r"""Logarithms of :math:`\pi^-_i` and :math:`\pi^+_i`, without the matrix Q (eq-groco-adjoint).

    The scores run forward through the network; the indicators of the two rank blocks run backward through the same gates,
    in the log domain: finite however far a score is from its place.

    Args:
        x: scores, shape ``(B, n)``, floating point.
        num_negatives: k, from 1 to n - 1: the size of the first rank block.
        network: "odd_even", or "bitonic" (n a power of two).
        steepness: :math:`\beta>0`.
        distribution: of the comparator, see :func:`comparator`.

    Returns:
        Shape ``(B, n, 2)``: :math:`\log\pi^-_i`, then :math:`\log\pi^+_i`; float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape, number, network, steepness or distribution, naming the argument.

    Complexity: O(B n^2) time and memory with the odd-even network, against O(B n^3) through Q; O(B n log^2 n) with the bitonic one.

    Source: own (chapter, eq-groco-adjoint); the probabilities are those of Shvetsova et al.

    Example:
        >>> group_log_probabilities(torch.zeros(1, 3), 2).exp()
        tensor([[[0.7500, 0.2500],
                 [0.7500, 0.2500],
                 [0.5000, 0.5000]]])
    """
    steepness = _checked(steepness, distribution)
    n = _checks.floating("x", x, 2).shape[1]
    _check_split(num_negatives, n)
    if not isinstance(network, str) or network not in _NETWORKS:
        raise ValueError(f"network must be one of {tuple(_NETWORKS)}, got {network!r}")
    layers = _NETWORKS[network](n)
    x = _checks.wide(x)
    _, differences = _run(x, layers, steepness, distribution)
    is_negative = torch.arange(n, device=x.device) < num_negatives
    # log 0 as a number whose differences are finite; every input reaches every rank, so that none of it is left at the end.
    never = torch.finfo(x.dtype).min / 8
    blocks = torch.stack([is_negative, ~is_negative], dim=1).to(x.dtype)
    blocks = ((1 - blocks) * never).expand(len(x), n, 2)
    gates = torch.cat([difference.flatten(1) for difference in differences], dim=1)
    log_stay, log_swap = (
        _LOG_COMPARATORS[distribution](v).split([d[0].numel() for d in differences], dim=1) for v in (gates, -gates)
    )
    for layer, stay, swap in zip(layers[::-1], log_stay[::-1], log_swap[::-1], strict=True):
        before, low, high, after = _split(blocks, layer)
        stay, swap = (v.reshape(*low.shape[:3], 1) for v in (stay, swap))
        blocks = _join(
            before, torch.logaddexp(stay + low, swap + high), torch.logaddexp(swap + low, stay + high), after, layer
        )
    return blocks


def _check_pairs(positive: Tensor, negative: Tensor) -> None:
    _checks.floating("negative", negative, 2)
    _checks.floating("positive", positive, 2)
    if positive.dtype != negative.dtype:
        raise TypeError(f"positive must have the dtype of negative, {negative.dtype}, got {positive.dtype}")
    if len(positive) != len(negative):
        raise ValueError(
            f"positive must have {len(negative)} rows, one for each row of negative, got shape {tuple(positive.shape)}"
        )


def groco_loss(
    positive: Tensor,
    negative: Tensor,
    *,
    num_negatives: int = 10,
    mask: Tensor | None = None,
    steepness: float = 1.0,
    distribution: str = "cauchy",
    reduction: str = "mean",
) -> Tensor:
    r"""Group ordering loss of each anchor: its positives should come after its k hardest negatives (eq-groco-loss).

    :math:`\mathcal L=-\frac1n\bigl[\sum_{i\le k}\log\pi^-_i+\sum_{i>k}\log\pi^+_i\bigr]` over the k hardest negatives and the
    P positives, each group sorted, n = k + P, through the odd-even network.

    Args:
        positive: similarities to the positives, shape ``(B, P)``, floating point.
        negative: similarities to the candidates for negatives, shape ``(B, M)``.
        num_negatives: k, from 1 to M.
        mask: bool, shape ``(B, M)``, true where a candidate may be used, at least k times a row.
        steepness: :math:`\beta>0`, the inverse of a temperature.
        distribution: of the comparator, see :func:`comparator`.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none"; at least 0 up to rounding.

    Raises:
        TypeError, ValueError: for a wrong type, shape, number, mask, steepness, distribution or reduction, naming the argument.

    Complexity: O(B (M + n^2)) time, O(B (M + n^2)) memory.

    Source: Shvetsova et al., section on group ordering constraints. Their code bounds each logarithm at -100; here none needs it.

    Example:
        >>> groco_loss(torch.tensor([[0.6]]), torch.tensor([[0.2, -0.5]]), num_negatives=1)
        tensor(0.4762)
    """
    _check_pairs(positive, negative)
    mask = _checks.boolean_mask("mask", mask, negative.shape)
    k = _checks.positive_int("num_negatives", num_negatives)
    if k > negative.shape[1]:
        raise ValueError(f"num_negatives must be at most {negative.shape[1]}, the columns of negative, got {k}")
    if mask is not None:
        if _checks.known_false(mask.sum(1) >= k):
            raise ValueError(f"mask must keep at least num_negatives = {k} in each row, got {mask.sum(1).min()}")
        negative = negative.masked_fill(~mask, -torch.inf)
    hardest = negative.topk(k, dim=1).values.flip(1)
    for name, scores in (("positive", positive), ("negative", hardest)):
        if _checks.known_false(scores.isfinite()):
            raise ValueError(f"{name} must be finite (a negative, where it is used), got NaN or infinity")
    x = torch.cat([hardest, positive.sort(dim=1).values], dim=1)
    log_probability = group_log_probabilities(x, k, steepness=steepness, distribution=distribution)
    own = torch.cat([log_probability[:, :k, 0], log_probability[:, k:, 1]], dim=1)
    return _checks.reduced(-own.mean(1), reduction)


def groco_multi_view_loss(
    views: Tensor,
    *,
    num_negatives: int = 10,
    num_positive_views: int | None = None,
    stop_gradient: bool = True,
    steepness: float = 1.0,
    distribution: str = "cauchy",
    reduction: str = "mean",
    distributed: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Group ordering loss of a batch of views: every view of every image is an anchor once.

    The positives of an anchor are the other views of its image, its candidates for negatives the *same* view of the other images.
    With ``stop_gradient`` both are constants, so that only the anchor moves.

    Args:
        views: shape ``(V, B, d)``, floating point, V > 1, B > ``num_negatives``; rows are L2-normalized here.
        num_negatives: k, the hardest negatives that are kept.
        num_positive_views: only the first so many views serve as positives, at least 2 (multi-crop: the global crops); None is all.
        stop_gradient: detach positives and negatives.
        steepness: :math:`\beta>0`.
        distribution: of the comparator, see :func:`comparator`.
        reduction: "none", "mean" or "sum" over the V B anchors.
        distributed: take the negatives from the batches of all processes of the default group.
        chunk_size: rows of similarities held at a time; None chooses.

    Returns:
        Shape ``()``, or ``(V, B)`` with reduction "none"; float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape, number, steepness, distribution or reduction, naming the argument.

    Complexity: O(V B^2 d + V B n^2) time; O(chunk_size * B + V B (d + n^2)) memory: no (B, B) matrix is held.

    Source: Shvetsova et al., training procedure, and their code for which views are negatives and what is detached.

    Example:
        >>> views = torch.eye(4).expand(2, 4, 4)
        >>> groco_multi_view_loss(views, num_negatives=1)  # -log F(1 - 0) = -log 3/4
        tensor(0.2877)
    """
    _checks.floating("views", views, 3)
    num_views, rows, _ = views.shape
    if num_views < 2:
        raise ValueError(
            f"views must hold at least 2 views, so that there is a positive, got shape {tuple(views.shape)}"
        )
    as_positive = num_views if num_positive_views is None else num_positive_views
    if not 2 <= _checks.positive_int("num_positive_views", as_positive) <= num_views:
        raise ValueError(f"num_positive_views must be between 2 and {num_views}, got {num_positive_views}")
    views = _unit_rows(views)
    keys = views.detach() if stop_gradient else views
    own = ops.local_rows(rows, views.device) if distributed else torch.arange(rows, device=views.device)
    losses = []
    for group in (range(as_positive), range(as_positive, num_views)):  # anchors with equally many positives together
        if not group:
            continue
        hardest, positive = [], []
        for v in group:
            others = ops.gather(keys[v]) if distributed else keys[v]
            if _checks.positive_int("num_negatives", num_negatives) >= len(others):
                raise ValueError(
                    f"num_negatives must be less than the number of images, {len(others)}, got {num_negatives}"
                )
            hardest.append(ops.streamed_topk(views[v], others, num_negatives, exclude=own, chunk_size=chunk_size)[0])
            positive.append(torch.stack([(views[v] * keys[w]).sum(1) for w in range(as_positive) if w != v], dim=1))
        options = dict(num_negatives=num_negatives, steepness=steepness, distribution=distribution, reduction="none")
        losses.append(groco_loss(torch.cat(positive), torch.cat(hardest), **options).unflatten(0, (-1, rows)))
    return _checks.reduced(torch.cat(losses), reduction)


def _unit_rows(x: Tensor) -> Tensor:
    """Rows of length one, in float32 or wider."""
    return F.normalize(_checks.wide(x), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# The softmax over the same negatives, and what both are measured by
# ---------------------------------------------------------------------------------------------------------------------


def top_k_nt_xent_loss(
    view1: Tensor,
    view2: Tensor,
    *,
    num_negatives: int = 10,
    temperature: float = 0.5,
    stop_gradient: bool = True,
    reduction: str = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    r"""NT-Xent on each anchor's k hardest negatives: the control that differs from GroCo in the softmax.

    Both views of every image are anchors, and the candidates for negatives are both views of the other images.

    Args:
        view1: shape ``(B, d)``, floating point; rows are L2-normalized here.
        view2: shape ``(B, d)``; row ``i`` is the other view of image ``i``.
        num_negatives: k, from 1 to 2B - 2.
        temperature: :math:`\tau>0`.
        stop_gradient: detach positives and negatives.
        reduction: "none", "mean" or "sum" over the 2B anchors.
        chunk_size: rows of similarities held at a time; None chooses.

    Returns:
        Shape ``()``, or ``(2B,)`` with reduction "none"; float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape, number, temperature or reduction, naming the argument.

    Complexity: O(B^2 d) time, O(chunk_size * B + B d) memory.

    Source: the ablation in the code of Shvetsova et al.

    Example:
        >>> x = torch.eye(4)
        >>> top_k_nt_xent_loss(x, x, num_negatives=2, temperature=0.5)  # log(1 + 2 e^-2)
        tensor(0.2395)
    """
    _checks.floating("view1", view1, 2)
    _checks.like("view2", view2, "view1", view1, 2)
    rows = len(view1)
    if _checks.positive_int("num_negatives", num_negatives) > 2 * rows - 2:
        raise ValueError(f"num_negatives must be at most 2B - 2 = {2 * rows - 2}, got {num_negatives}")
    anchors = _unit_rows(torch.cat([view1, view2]))
    keys = anchors.detach() if stop_gradient else anchors
    own = torch.arange(2 * rows, device=anchors.device)
    both_views = torch.stack([own, own.roll(rows)], dim=1)  # an anchor and its positive are not negatives
    hardest, _ = ops.streamed_topk(anchors, keys, num_negatives, exclude=both_views, chunk_size=chunk_size)
    positive = (anchors * keys.roll(rows, dims=0)).sum(1)
    return contrastive_loss(positive, hardest, temperature=temperature, reduction=reduction)


def order_accuracy(positive: Tensor, negative: Tensor) -> Tensor:
    """Share of anchors with every positive above every negative: what the group ordering constraint asks for.

    Args:
        positive: similarities to the positives, shape ``(B, P)``, floating point.
        negative: similarities to the negatives, shape ``(B, M)``.

    Returns:
        Shape ``()``, in [0, 1]; a tie counts as a mistake.

    Raises:
        TypeError, ValueError: for a wrong type or shape, naming the argument.

    Source: own measure (lab); the hard version of the loss.

    Example:
        >>> order_accuracy(torch.tensor([[0.6], [0.6]]), torch.tensor([[0.8, 0.2], [0.5, 0.2]]))
        tensor(0.5000)
    """
    _check_pairs(positive, negative)
    return (positive.amin(1) > negative.amax(1)).to(positive.dtype).mean()
