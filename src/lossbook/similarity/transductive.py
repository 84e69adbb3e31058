r"""Clustering the queries of a few-shot episode: prototypes, a graph Laplacian, labels as constraints.

The method of *Transductive Few-Shot Learning: Clustering is All You Need?* (Ziko, Boudiaf, Dolz, Granger and Ben Ayed, 2021, arXiv
2106.09516): a prototype term (K-means or K-modes) plus a Laplacian that asks neighbors to agree, relaxed with an entropy, and a
bound optimizer whose step is one softmax a point. With it come the price of a partition's entropy, a step that cannot ascend on any
graph, and the baselines: nearest prototype, LaplacianShot, PADDLE. Equation labels are those of the chapter ``similarity/transductive``.

Notation: ``features`` (N, d) holds the points :math:`x_p`, ``assignment`` (N, K) the rows :math:`s_p\in\Delta_K`, ``unary`` (N, K) the costs
:math:`a_{pk}`, ``affinity`` (N, N) the graph :math:`W\ge0`; :math:`\lambda` is ``weight``, :math:`\gamma` is ``complexity``. All but a sparse
graph may have leading axes, one entry an episode. Logs are natural.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lossbook import _checks, ops

_KINDS = ("means", "modes", "points")
_BANDWIDTH_FLOOR = 1e-6  # identical points have no distance to set a bandwidth by
_DIFFERENCES = 2**16  # distances come from differences up to this many numbers, above from a product


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def _matrix(name: str, value: Tensor, like: Tensor | None = None) -> Tensor:
    """``value``, if it is a finite floating-point tensor ``(..., rows, columns)``, of the dtype of ``like``."""
    _checks.floating(name, value)
    if value.ndim < 2:
        raise ValueError(f"{name} must have at least 2 dimensions, got shape {tuple(value.shape)}")
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {value.layout}")
    if like is not None and value.dtype != like.dtype:
        raise TypeError(f"{name} must have dtype {like.dtype}, got {value.dtype}")
    return _checks.finite(name, value)


def _same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> Tensor:
    if _matrix(name, value, other).shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {tuple(other.shape)}, got {tuple(value.shape)}")
    return value


def _rows(name: str, value: Tensor, shape: torch.Size, shape_of: str) -> Tensor:
    """``value``, if it holds distributions over the classes in rows."""
    _matrix(name, value)
    if value.shape != shape:
        raise ValueError(f"{name} must have the shape of {shape_of}, {tuple(shape)}, got {tuple(value.shape)}")
    if _checks.known_false((value >= 0) & ((value.sum(-1, keepdim=True) - 1).abs() < 1e-3)):
        raise ValueError(f"{name} must have rows that are at least 0 and add up to 1")
    return value


def _graph(affinity: Tensor, rows: Tensor, symmetric: bool = True) -> Tensor:
    """``affinity``, if it is a non-negative graph over the points in ``rows``; COO tensors come back coalesced."""
    _checks.floating("affinity", affinity)
    shape = (*rows.shape[:-2], rows.shape[-2], rows.shape[-2])
    if affinity.shape != shape:
        raise ValueError(f"affinity must have shape {shape}, got {tuple(affinity.shape)}")
    if affinity.dtype != rows.dtype:
        raise TypeError(f"affinity must have dtype {rows.dtype}, got {affinity.dtype}")
    if affinity.layout == torch.sparse_coo:
        affinity = affinity.coalesce()
        weights, other = affinity.values(), affinity
    elif affinity.layout == torch.strided:
        weights, other = affinity, affinity.mT
    else:
        raise ValueError(f"affinity must be dense or a sparse COO tensor, got layout {affinity.layout}")
    if _checks.known_false(torch.isfinite(weights) & (weights >= 0)):
        raise ValueError("affinity must be finite and >= 0")
    if symmetric:
        if affinity.layout == torch.sparse_coo:
            mirrored = affinity.t().coalesce()
            if mirrored.indices().shape != affinity.indices().shape or _checks.known_false(
                mirrored.indices() == affinity.indices()
            ):
                raise ValueError("affinity must be symmetric")
            other = mirrored.values()
        if weights.numel() and _checks.known_false((weights - other).abs() <= 1e-5 * weights.abs().amax()):
            raise ValueError("affinity must be symmetric")
    return affinity


def _support(
    mask: Tensor | None, assignment: Tensor | None, unary: Tensor
) -> tuple[Tensor | None, Tensor | None]:  # mask with a last axis of one
    if (mask is None) != (assignment is None):
        raise ValueError("support_mask and support_assignment must be given together")
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"support_mask must be a boolean tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.shape != unary.shape[:-1]:
        raise ValueError(f"support_mask must have shape {tuple(unary.shape[:-1])}, got {tuple(mask.shape)}")
    _same_shape("support_assignment", assignment, "unary", unary)
    simplex = (assignment >= 0) & ((assignment.sum(-1, keepdim=True) - 1).abs() < 1e-3)
    if _checks.known_false(~mask[..., None] | simplex):
        raise ValueError(
            "support_assignment must have rows that are at least 0 and add up to 1 where support_mask is true"
        )
    return mask[..., None], assignment


# ---------------------------------------------------------------------------------------------------------------------
# Features and their graph
# ---------------------------------------------------------------------------------------------------------------------


def cl2n(features: Tensor, base_mean: Tensor) -> Tensor:
    r"""Features minus the mean of the base classes, then of length one (eq-transductive-cl2n).

    Args:
        features: shape ``(..., N, d)``, floating point.
        base_mean: shape ``(d,)``: the mean feature of the data that the network was trained on.

    Returns:
        The shape of ``features``, unit rows; a row equal to the mean stays zero.

    Raises:
        TypeError, ValueError: for a wrong type, shape or a value that is not finite, naming the argument.

    Source: Wang et al. 2019 (SimpleShot); Ziko et al., section on experiments.

    Example:
        >>> cl2n(torch.tensor([[4.0, 5.0]]), torch.tensor([1.0, 1.0]))
        tensor([[0.6000, 0.8000]])
    """
    _matrix("features", features)
    if _checks.floating("base_mean", base_mean, 1).shape != features.shape[-1:]:
        raise ValueError(f"base_mean must have shape {tuple(features.shape[-1:])}, got {tuple(base_mean.shape)}")
    return F.normalize(features - base_mean, dim=-1)


def shift_correction(support: Tensor, query: Tensor) -> Tensor:
    r"""Queries moved by :math:`\bar x_{\rm support}-\bar x_{\rm query}`, so that both sets have one mean (eq-transductive-shift).

    Right if classes are as frequent among the queries as in the support; otherwise it moves the queries off.

    Args:
        support: shape ``(..., S, d)``, floating point.
        query: shape ``(..., Q, d)``.

    Returns:
        The shape of ``query``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or a value that is not finite, naming the argument.

    Source: Liu et al. 2020 (prototype rectification); Ziko et al., section on experiments.

    Example:
        >>> shift_correction(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]])).squeeze(1)
        tensor([-1.,  1.])
    """
    _episode(support, query)
    return query + support.mean(-2, keepdim=True) - query.mean(-2, keepdim=True)


def _episode(support: Tensor, query: Tensor) -> None:
    _matrix("support", support)
    _matrix("query", query, support)
    if query.shape[:-2] != support.shape[:-2] or query.shape[-1] != support.shape[-1]:
        shape = (*support.shape[:-2], "Q", support.shape[-1])
        raise ValueError(f"query must have shape {shape} to fit support, got {tuple(query.shape)}")


def knn_affinity(
    features: Tensor, num_neighbors: int, *, symmetric: bool = True, sparse: bool = False, chunk_size: int | None = None
) -> Tensor:
    r"""The k-nearest-neighbor graph: :math:`w_{pq}=1` where q is among the k nearest of p, then :math:`\frac12(W+W^\top)` (eq-transductive-graph).

    A point is no neighbor of itself. Equal distances are broken arbitrarily. No gradient flows through the choice.

    Args:
        features: shape ``(..., N, d)``, floating point; Euclidean distances.
        num_neighbors: k, from 1 to N - 1. (scikit-learn's graph with itself in it and ``n_neighbors=3`` has k = 2.)
        symmetric: average with the transpose; without, rows are the directed graph of the authors' code.
        sparse: return a coalesced sparse COO tensor; for one set of points only.
        chunk_size: rows of distances held at a time; None chooses.

    Returns:
        Shape ``(..., N, N)``, dense or sparse, zero diagonal, weights 0, 1/2 and 1.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Complexity: O(N^2 d) time; O(chunk_size * N + N(d + k)) memory sparse, O(N^2) dense, each for one set of points.

    Source: Ziko et al., section on experiments; the official code's graph.

    Example:
        >>> knn_affinity(torch.tensor([[0.0], [1.0], [3.0]]), 1)
        tensor([[0.0000, 1.0000, 0.0000],
                [1.0000, 0.0000, 0.5000],
                [0.0000, 0.5000, 0.0000]])
    """
    _matrix("features", features)
    rows = features.shape[-2]
    if _checks.positive_int("num_neighbors", num_neighbors) >= rows:
        raise ValueError(f"num_neighbors must be less than the number of points, {rows}, got {num_neighbors}")
    if sparse and features.ndim > 2:
        raise ValueError(f"sparse needs one set of points, (N, d), got features of shape {tuple(features.shape)}")
    own = torch.arange(rows, device=features.device)

    def nearest(x: Tensor) -> Tensor:
        # |x - y|^2 = |x|^2 - 2 (x.y - |y|^2 / 2): the nearest have the largest bracket. Centered, it keeps its digits.
        x = x - x.mean(0)
        keys = torch.cat([x, -x.square().sum(1, keepdim=True) / 2], dim=1)
        queries = torch.cat([x, x.new_ones(rows, 1)], dim=1)
        return ops.streamed_topk(queries, keys, num_neighbors, exclude=own, chunk_size=chunk_size)[1]

    points = features.detach()
    if sparse:
        index = torch.stack([own.repeat_interleave(num_neighbors), nearest(points).flatten()])
        values = features.new_full(index.shape[1:], 0.5 if symmetric else 1.0)
        if symmetric:
            index, values = torch.cat([index, index.flip(0)], dim=1), values.repeat(2)
        return torch.sparse_coo_tensor(index, values, (rows, rows), check_invariants=True).coalesce()
    neighbors = torch.vmap(nearest)(points.reshape(-1, *points.shape[-2:])).reshape(*points.shape[:-1], -1)
    graph = features.new_zeros(*points.shape[:-1], rows).scatter(-1, neighbors, 1.0)
    return (graph + graph.mT) / 2 if symmetric else graph


# ---------------------------------------------------------------------------------------------------------------------
# The relaxed objective and its bound
# ---------------------------------------------------------------------------------------------------------------------


def _smooth(affinity: Tensor | None, assignment: Tensor) -> Tensor | None:
    """The neighbors' vote :math:`b=WS`, or None without a graph."""
    if affinity is None:
        return None
    with torch.autocast(assignment.device.type, enabled=False):
        return affinity @ assignment


def _prior(assignment: Tensor, fixed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Shares of the classes among the free points, ``(..., 1, K)``, and the number of these, ``(..., 1, 1)``."""
    if fixed is None:
        free = assignment.new_full((*assignment.shape[:-2], 1, 1), assignment.shape[-2])
        mass = assignment.sum(-2, keepdim=True)
    else:
        free = (~fixed).sum(-2, keepdim=True).to(assignment.dtype)
        mass = (assignment * ~fixed).sum(-2, keepdim=True)
    return mass / free.clamp(min=1), free


def _log(x: Tensor) -> Tensor:
    """The log, with a finite stand-in for that of zero: 0 * log 0 is then 0, and a class without mass stays without.

    No gradient flows at zero: a clamp of the log would pass on 0 times infinity.
    """
    return torch.where(x > 0, x.where(x > 0, 1.0).log(), torch.finfo(x.dtype).min / 1e8)


def _total(terms: Tensor) -> Tensor:
    """Sum over points and classes, over the points in float64: the stopping rule compares the 7th digit."""
    return terms.sum(-1).sum(-1, dtype=torch.float64)


def _value(assignment, entropy, unary, vote, weight, complexity, fixed) -> Tensor:
    """The objective in float64, given the elements of the negative entropy and the vote of the neighbors."""
    linear = unary if vote is None else unary - weight / 2 * vote
    value = _total(entropy + assignment * linear)
    if complexity:
        share, free = _prior(assignment, fixed)
        value = value - complexity * _total(free * share * _log(share))
    return value


def laplacian_energy(assignment: Tensor, affinity: Tensor) -> Tensor:
    r"""The agreement of neighbors :math:`\langle S,WS\rangle=\sum_{p,q}w_{pq}s_p^\top s_q`, over ordered pairs (eq-transductive-agreement).

    Args:
        assignment: shape ``(..., N, K)``, floating point.
        affinity: shape ``(..., N, N)``, at least 0, dense or sparse COO.

    Returns:
        Shape ``(...)``.

    Raises:
        TypeError, ValueError: for a wrong type or shape, naming the argument.

    Complexity: O(mK) time and O(NK) memory, for m entries of W: N^2 dense, at most 2Nk for a sparse graph of k neighbors.

    Source: Ziko et al., the concave Laplacian term.

    Example:
        >>> w = knn_affinity(torch.tensor([[0.0], [1.0], [3.0]]), 1)
        >>> laplacian_energy(torch.eye(2)[[0, 0, 1]], w)
        tensor(2.)
    """
    _matrix("assignment", assignment)
    vote = _smooth(_graph(affinity, assignment, symmetric=False), assignment)
    return _total(assignment * vote).to(assignment.dtype)


def relaxed_objective(
    assignment: Tensor,
    unary: Tensor,
    affinity: Tensor | None = None,
    *,
    weight: float = 0.0,
    complexity: float = 0.0,
    support_mask: Tensor | None = None,
) -> Tensor:
    r"""The relaxed objective :math:`\mathcal R(S)=\mathcal H(S)+\langle S,a\rangle-\frac\lambda2\langle S,WS\rangle+\gamma\,n\,H(\pi)` (eq-transductive-relaxed).

    :math:`\mathcal H=\sum s\log s`; :math:`\pi` are the shares of the classes among the :math:`n` points outside of the support, :math:`H` their entropy.

    Args:
        assignment: :math:`S`, rows on the simplex, shape ``(..., N, K)``, floating point. Differentiable where it is > 0.
        unary: costs :math:`a`, shape ``(..., N, K)``.
        affinity: :math:`W`, symmetric, at least 0, shape ``(..., N, N)``, dense or sparse COO; None for no graph.
        weight: :math:`\lambda\ge0`.
        complexity: :math:`\gamma\ge0`, the price of a nat of the partition's entropy for each point.
        support_mask: bool, shape ``(..., N)``, true at points that do not count in :math:`\pi`.

    Returns:
        Shape ``(...)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Complexity: O(NK + mK) time and O(NK) memory.

    Source: Ziko et al., the concave-convex relaxation; Martin et al. 2022 (PADDLE) for the last term.

    Example:
        >>> relaxed_objective(torch.full((2, 2), 0.5), torch.zeros(2, 2))  # -2 log 2
        tensor(-1.3863)
    """
    unary, affinity, weight, complexity = _problem(unary, affinity, weight, complexity)
    _rows("assignment", assignment, unary.shape, "unary")
    fixed = _support(support_mask, None if support_mask is None else assignment, unary)[0]
    entropy = assignment * _log(assignment)
    value = _value(assignment, entropy, unary, _smooth(affinity, assignment), weight, complexity, fixed)
    return value.to(assignment.dtype)


def _problem(unary, affinity, weight, complexity, symmetric=True):
    _matrix("unary", unary)
    weight, complexity = _checks.number("weight", weight, 0), _checks.number("complexity", complexity, 0)
    if affinity is None and weight:
        raise ValueError(f"affinity must be given when weight > 0, got None and weight {weight}")
    affinity = None if affinity is None else _graph(affinity, unary, symmetric)
    return unary, affinity if weight else None, weight, complexity


def auxiliary_objective(
    assignment: Tensor,
    current: Tensor,
    unary: Tensor,
    affinity: Tensor | None = None,
    *,
    weight: float = 0.0,
    complexity: float = 0.0,
    support_mask: Tensor | None = None,
) -> Tensor:
    r"""The bound :math:`\mathcal A_i(S)`: :math:`\mathcal R` with its concave terms replaced by their tangents at ``current`` (eq-transductive-auxiliary).

    Equal to :math:`\mathcal R` in value and gradient at ``current``, and above it everywhere if :math:`W\succeq0`.

    Args:
        assignment: :math:`S`, shape ``(..., N, K)``, floating point.
        current: :math:`S^i`, rows on the simplex, the same shape; each class with some mass if ``complexity`` > 0.
        unary, affinity, weight, complexity, support_mask: as in :func:`relaxed_objective`.

    Returns:
        Shape ``(...)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Complexity: O(NK + mK) time and O(NK) memory.

    Source: Ziko et al., the auxiliary function.

    Example:
        >>> s, a = torch.full((2, 2), 0.5), torch.zeros(2, 2)
        >>> auxiliary_objective(s, s, a), relaxed_objective(s, a)
        (tensor(-1.3863), tensor(-1.3863))
    """
    unary, affinity, weight, complexity = _problem(unary, affinity, weight, complexity)
    _rows("assignment", assignment, unary.shape, "unary")
    _rows("current", current, unary.shape, "unary")
    fixed = _support(support_mask, None if support_mask is None else current, unary)[0]
    value = _total(assignment * (_log(assignment) + unary))
    if affinity is not None:
        value = value - weight * _total((assignment - current / 2) * _smooth(affinity, current))
    if complexity:
        (share, free), log_prior = _prior(assignment, fixed), _log(_prior(current, fixed)[0])
        value = value - complexity * _total(free * share * log_prior)
    return value.to(assignment.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The bound optimizer
# ---------------------------------------------------------------------------------------------------------------------


def monotonicity_margin(affinity: Tensor, weight: float) -> Tensor:
    r"""What is left of the condition under which the undamped step cannot ascend: :math:`2-\lambda\max(0,-\lambda_{\min}(W))` (eq-transductive-condition).

    Args:
        affinity: :math:`W`, symmetric, at least 0, dense, shape ``(..., N, N)``, floating point.
        weight: :math:`\lambda\ge0`.

    Returns:
        Shape ``(...)``; negative means that there is no guarantee.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, or a sparse graph, naming the argument.

    Complexity: O(N^3) time, O(N^2) memory.

    Source: own theorem (chapter, thm-transductive-descent).

    Example:
        >>> ring = torch.tensor([[0.0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]])
        >>> monotonicity_margin(ring, 0.75)
        tensor(0.5000)
    """
    _matrix("affinity", affinity)
    _graph(affinity, affinity)
    lowest = torch.linalg.eigvalsh(affinity)[..., 0]
    return 2 - _checks.number("weight", weight, 0) * (-lowest).clamp(min=0)


def _damping(affinity: Tensor | None, weight: float, proximal: float | None) -> Tensor | float:
    """The proximal coefficients, ``(..., N, 1)``, or one number."""
    if proximal is not None:
        return _checks.number("proximal", proximal, 0)
    if affinity is None:
        return 0.0
    degree = affinity.sum(-1)
    degree = degree.to_dense() if degree.layout != torch.strided else degree
    return ((weight * degree - 1) / 2).clamp(min=0)[..., None]


def _step(assignment, log_assignment, unary, vote, weight, complexity, fixed, log_clamped, damping):
    """The next assignment, and its log; rows where ``fixed`` is true are the support's."""
    logits = -unary if vote is None else weight * vote - unary
    if complexity:
        logits = logits + complexity * _log(_prior(assignment, fixed)[0])
    if isinstance(damping, Tensor) or damping:
        logits = (logits + damping * log_assignment) / (1 + damping)
    log_new = logits - logits.logsumexp(-1, keepdim=True)  # faster than log_softmax for few classes
    if fixed is not None:
        log_new = log_clamped.where(fixed, log_new)
    return log_new.exp(), log_new


def bound_update(
    assignment: Tensor,
    unary: Tensor,
    affinity: Tensor | None = None,
    *,
    weight: float = 0.0,
    complexity: float = 0.0,
    proximal: float | None = None,
    support_mask: Tensor | None = None,
    support_assignment: Tensor | None = None,
) -> Tensor:
    r"""One step of the bound optimizer, all points at once (eq-transductive-update, damped eq-transductive-proximal).

    :math:`s_p\propto\exp\frac{-a_p+\lambda b_p+\gamma\log\pi+\eta_p\log s_p}{1+\eta_p}` with the neighbors' vote :math:`b=WS`; rows of the
    support are set to their labels. :math:`\eta=0` is the paper's step.

    Args:
        assignment: :math:`S`, rows on the simplex, shape ``(..., N, K)``, floating point.
        unary: costs :math:`a`, shape ``(..., N, K)``.
        affinity: :math:`W`, at least 0, shape ``(..., N, N)``, dense or sparse COO; None for no graph. A directed graph is taken as it
            is, without a guarantee.
        weight: :math:`\lambda\ge0`.
        complexity: :math:`\gamma\ge0`.
        proximal: :math:`\eta\ge0`, one number; None takes :math:`\eta_p=\max(0,\frac{\lambda d_p-1}2)` by the degree :math:`d_p` of each point,
            with which the objective of a symmetric graph cannot rise. That needs rows of the support that are at their labels already: a step
            that puts them there moves them by any amount.
        support_mask: bool, shape ``(..., N)``, true at points whose rows are given.
        support_assignment: shape ``(..., N, K)``; the rows at other points are not read.

    Returns:
        Shape ``(..., N, K)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Complexity: O(NK + mK) time and O(NK) memory, for m entries of W: N^2 dense, at most 2Nk for a sparse graph of k neighbors.

    Source: Ziko et al., the parallel update; the damping is the chapter's.

    Example:
        >>> bound_update(torch.full((1, 2), 0.5), torch.tensor([[0.0, 1.0]]))
        tensor([[0.7311, 0.2689]])
    """
    unary, affinity, weight, complexity = _problem(unary, affinity, weight, complexity, symmetric=False)
    _rows("assignment", assignment, unary.shape, "unary")
    fixed, clamped = _support(support_mask, support_assignment, unary)
    damping = _damping(affinity, weight, proximal)
    vote, log_clamped = _smooth(affinity, assignment), None if fixed is None else _log(clamped)
    return _step(assignment, _log(assignment), unary, vote, weight, complexity, fixed, log_clamped, damping)[0]


@torch.no_grad()
def laplacian_assignment(
    unary: Tensor,
    affinity: Tensor | None = None,
    *,
    weight: float = 0.0,
    complexity: float = 0.0,
    proximal: float | None = None,
    support_mask: Tensor | None = None,
    support_assignment: Tensor | None = None,
    init: Tensor | None = None,
    max_iterations: int = 600,
    tolerance: float = 1e-7,
    check_monotone: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Iterate :func:`bound_update` from :math:`\mathrm{softmax}(-a)` until :math:`\mathcal R` stands still: the assignment step.

    With several episodes each stops on its own; its history then repeats its last value.

    Args:
        unary, affinity, weight, complexity, proximal, support_mask, support_assignment: as in :func:`bound_update`, the graph symmetric.
        init: the first :math:`S`, shape ``(..., N, K)``, rows on the simplex; None for :math:`\mathrm{softmax}(-a)`.
        max_iterations: steps at most, at least 1.
        tolerance: stop when :math:`\mathcal R` changes by at most this share of itself, at least 0.
        check_monotone: raise if :math:`\mathcal R` rises by more than rounding explains.

    Returns:
        :math:`S`, shape ``(..., N, K)``, and the values of :math:`\mathcal R` from the first :math:`S` on, float64, shape ``(T + 1, ...)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.
        RuntimeError: the objective rose, and ``check_monotone`` is true.

    Complexity: O(T(NK + mK)) time for T steps and O(NK) memory; one product with W a step.

    Source: Ziko et al., the inner loop of the algorithm.

    Example:
        >>> pair = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
        >>> s, history = laplacian_assignment(pair, pair, weight=1.0, tolerance=1e-12)
        >>> round(s[0, 0].item(), 6), round(history[-1].item(), 6)
        (0.662584, -1.050914)
    """
    unary, affinity, weight, complexity = _problem(unary, affinity, weight, complexity)
    fixed, clamped = _support(support_mask, support_assignment, unary)
    damping = _damping(affinity, weight, proximal)
    _checks.positive_int("max_iterations", max_iterations)
    tolerance = _checks.number("tolerance", tolerance, 0)
    if not isinstance(check_monotone, bool):
        raise TypeError(f"check_monotone must be a bool, got {type(check_monotone).__name__}")
    s = torch.softmax(-unary, dim=-1) if init is None else _rows("init", init, unary.shape, "unary").to(unary.dtype)
    s = s if fixed is None else clamped.where(fixed, s)
    log_s, vote, log_clamped = _log(s), _smooth(affinity, s), None if fixed is None else _log(clamped)
    history = [_value(s, s * log_s, unary, vote, weight, complexity, fixed)]
    done = torch.zeros_like(history[0], dtype=torch.bool)
    for _ in range(max_iterations):
        new, log_new = _step(s, log_s, unary, vote, weight, complexity, fixed, log_clamped, damping)
        if done.ndim and bool(done.any()):  # episodes that have stopped stay
            stay = done[..., None, None]
            new, log_new = s.where(stay, new), log_s.where(stay, log_new)
        s, log_s, vote = new, log_new, _smooth(affinity, new)
        value = _value(s, s * log_s, unary, vote, weight, complexity, fixed)
        value = history[-1].where(done, value)
        done = done | ((value - history[-1]).abs() <= tolerance * history[-1].abs())
        history.append(value)
        if bool(done.all()):
            break
    values = torch.stack(history)
    slack = 1e3 * torch.finfo(unary.dtype).eps * (1 + values[:-1].abs())
    if check_monotone and bool((values.diff(dim=0) > slack).any()):
        raise RuntimeError(f"the objective rose by {values.diff(dim=0).max().item():.3g}; leave proximal at None")
    return s, values


# ---------------------------------------------------------------------------------------------------------------------
# Prototypes
# ---------------------------------------------------------------------------------------------------------------------


def _kind(kind: str, bandwidth: float | Tensor | None, shape: torch.Size) -> float | Tensor | None:
    """The bandwidth shaped to divide ``(..., N, K)``, or None for K-means; ``shape`` is that of the leading axes."""
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {_KINDS}, got {kind!r}")
    if kind == "means":
        return None
    if bandwidth is None:
        raise ValueError(f"bandwidth must be given for kind {kind!r}, got None")
    if isinstance(bandwidth, Tensor) and bandwidth.ndim:
        if _checks.floating("bandwidth", bandwidth).shape != shape:
            shapes = f"() or {tuple(shape)}" if shape else "()"
            raise ValueError(f"bandwidth must have shape {shapes}, got {tuple(bandwidth.shape)}")
        if _checks.known_false(torch.isfinite(bandwidth) & (bandwidth > 0)):
            raise ValueError("bandwidth must be finite and > 0 everywhere")
        return bandwidth[..., None, None]
    return _checks.temperature(bandwidth, name="bandwidth")


def _squared_distances(features: Tensor, prototypes: Tensor) -> Tensor:
    """``(..., N, K)``: of differences where these are few, which is exact; else through one matrix product.

    The product errs by rounding at the scale of the squared distance between a point or a prototype and the mean prototype. That is
    harmless where this is the scale of the distances themselves, and not with an outlier among the prototypes.
    """
    if features.numel() * prototypes.shape[-2] <= _DIFFERENCES:
        return (features[..., None, :] - prototypes[..., None, :, :]).square().sum(-1)
    center = prototypes.mean(-2, keepdim=True)
    x, m = features - center, prototypes - center
    with torch.autocast(x.device.type, enabled=False):
        product = x @ m.mT
    return (x.square().sum(-1, keepdim=True) - 2 * product + m.square().sum(-1)[..., None, :]).clamp(min=0)


def prototype_costs(
    features: Tensor, prototypes: Tensor, *, kind: str = "means", bandwidth: float | Tensor | None = None
) -> Tensor:
    r"""Unary costs of each point under each prototype (eq-transductive-means, eq-transductive-modes).

    "means": :math:`\|x_p-m_k\|^2`. "modes" and "points": :math:`-e^{-\|x_p-m_k\|^2/2\sigma^2}`. The entropy of the relaxation has weight one, so
    the scale of the features is an inverse temperature.

    Args:
        features: :math:`x`, shape ``(..., N, d)``, floating point.
        prototypes: :math:`m`, shape ``(..., K, d)``.
        kind: "means", "modes" or "points".
        bandwidth: :math:`\sigma>0`, a number or a tensor of the leading shape; needed by the last two.

    Returns:
        Shape ``(..., N, K)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or kind, naming the argument.

    Complexity: O(NKd) time, O(NK + (N + K)d) memory and at most 2^16 numbers on top. Up to that many differences they are taken one by one;
    beyond, :math:`\|x\|^2-2x^\top m+\|m\|^2` about the mean prototype loses digits if one prototype is far from the others (use float64 then).

    Source: Ziko et al., the prototype terms.

    Example:
        >>> prototype_costs(torch.tensor([[0.0], [3.0]]), torch.tensor([[1.0], [3.0]]))
        tensor([[1., 9.],
                [4., 0.]])
    """
    _prototypes(features, prototypes)
    bandwidth = _kind(kind, bandwidth, features.shape[:-2])
    squared = _squared_distances(features, prototypes)
    return squared if bandwidth is None else -torch.exp(-squared / (2 * bandwidth**2))


def _prototypes(features: Tensor, prototypes: Tensor, name: str = "prototypes") -> None:
    _matrix("features", features)
    _matrix(name, prototypes, features)
    if prototypes.shape[:-2] != features.shape[:-2] or prototypes.shape[-1] != features.shape[-1]:
        shape = (*features.shape[:-2], "K", features.shape[-1])
        raise ValueError(f"{name} must have shape {shape} to fit features, got {tuple(prototypes.shape)}")


def update_prototypes(
    features: Tensor,
    assignment: Tensor,
    *,
    kind: str = "means",
    bandwidth: float | Tensor | None = None,
    previous: Tensor | None = None,
    tolerance: float = 1e-5,
    max_iterations: int = 100,
) -> Tensor:
    r"""The prototype step: better prototypes for a given assignment (eq-transductive-mean, eq-transductive-meanshift).

    "means": :math:`m_k=\sum_ps_{pk}x_p/\sum_ps_{pk}`, the minimizer. "modes": mean-shift from ``previous``, each step of which lowers the cost.
    "points": the point with the largest :math:`s_{pk}`, the cheap choice of SLK-BO; with a clamped support that is a support point.
    A class without mass keeps its previous prototype.

    Args:
        features: :math:`x`, shape ``(..., N, d)``, floating point.
        assignment: :math:`S`, shape ``(..., N, K)``, at least 0.
        kind: "means", "modes" or "points".
        bandwidth: :math:`\sigma>0`, as in :func:`prototype_costs`.
        previous: shape ``(..., K, d)``; needed by "modes", and where a class has no mass.
        tolerance: a prototype's mean-shift stops when it moves no further than this.
        max_iterations: mean-shift steps at most.

    Returns:
        Shape ``(..., K, d)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape, kind or number, or a class without mass or previous prototype, naming the argument.

    Complexity: O(NKd) time a step, O(NK + (N + K)d) memory.

    Source: Ziko et al., the prototype step; Ziko et al. 2018 (SLK) for modes.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [5.0]])
        >>> update_prototypes(x, torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).squeeze(1)
        tensor([0.5000, 5.0000])
    """
    _matrix("features", features)
    _matrix("assignment", assignment, features)
    if assignment.shape[:-1] != features.shape[:-1]:
        raise ValueError(f"assignment must have shape {(*features.shape[:-1], 'K')}, got {tuple(assignment.shape)}")
    if _checks.known_false(assignment >= 0):
        raise ValueError("assignment must be at least 0 everywhere")
    bandwidth = _kind(kind, bandwidth, features.shape[:-2])
    if previous is not None:
        _prototypes(features, previous, "previous")
        if previous.shape[-2] != assignment.shape[-1]:
            raise ValueError(f"previous must have {assignment.shape[-1]} prototypes, got shape {tuple(previous.shape)}")
    elif kind == "modes":
        raise ValueError("previous must be given for kind 'modes', got None")
    tolerance = _checks.number("tolerance", tolerance, 0)
    _checks.positive_int("max_iterations", max_iterations)
    mass = assignment.sum(-2)[..., None]
    if previous is None and _checks.known_false(mass > 0):
        raise ValueError("previous must be given where a class has no mass in assignment, got None")

    def average(weights: Tensor) -> Tensor:  # of the points, over the columns of weights
        with torch.autocast(features.device.type, enabled=False):
            total = weights.mT @ features
        return total / weights.sum(-2)[..., None].clamp(min=torch.finfo(weights.dtype).tiny)

    if kind == "means":
        new = average(assignment)
    elif kind == "points":
        index = assignment.argmax(-2)[..., None].expand(*assignment.shape[:-2], -1, features.shape[-1])
        new = features.gather(-2, index)
    else:
        new, log_s, moving = previous, _log(assignment), torch.ones_like(mass, dtype=torch.bool)
        for _ in range(max_iterations):
            # In the log domain: far from every point the kernels underflow, and their ratios do not.
            logits = log_s - _squared_distances(features, new) / (2 * bandwidth**2)
            before, new = new, average(torch.softmax(logits, dim=-2)).where(moving, new)
            moving = (new - before).norm(dim=-1, keepdim=True) > tolerance  # each prototype stops on its own
            if not torch.compiler.is_compiling() and not bool(moving.any()):
                break
    return new if previous is None else torch.where(mass > 0, new, previous)


# ---------------------------------------------------------------------------------------------------------------------
# The block-coordinate algorithm
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SLKResult:
    """What :func:`slk_cluster` and :func:`slk_fit` found; leading axes are those of the features.

    Args:
        labels: int64: of every point ``(..., N)`` from :func:`slk_cluster`, of the queries ``(..., Q)`` from :func:`slk_fit`.
        assignment: rows on the simplex, ``(..., N, K)``, the support first.
        prototypes: ``(..., K, d)``: those that the assignment was made with.
        objective_history: values of the relaxed objective after each assignment step, float64, ``(T, ...)``.
        iterations: int64, ``(...)``: assignment steps until it stopped.
        converged: bool, ``(...)``: whether the objective stood still before the loops ran out or a class vanished.

    Source: Ziko et al., the output of the block-coordinate algorithm.
    """

    labels: Tensor
    assignment: Tensor
    prototypes: Tensor
    objective_history: Tensor
    iterations: Tensor
    converged: Tensor


def graph_bandwidth(features: Tensor, affinity: Tensor) -> Tensor:
    r"""The bandwidth :math:`\sigma` with :math:`\sigma^2=\sum w_{pq}\|x_p-x_q\|^2/\sum w_{pq}`, the mean over edges, at least 1e-6 (eq-transductive-bandwidth).

    Args:
        features: shape ``(..., N, d)``, floating point.
        affinity: symmetric, at least 0, shape ``(..., N, N)``, dense or sparse COO, with at least one edge.

    Returns:
        :math:`\sigma`, shape ``(...)``.

    Raises:
        TypeError, ValueError: for a wrong type or shape, or a graph without edges, naming the argument.

    Complexity: O(md) time, O(Nd) memory on top of the graph.

    Source: Ziko et al., official code, with the number of edges that there are.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [3.0]])
        >>> graph_bandwidth(x, knn_affinity(x, 1)).square()  # edges 1, 1, 2: (1 + 1 + 4) / 3
        tensor(2.0000)
    """
    affinity = _graph(affinity, _matrix("features", features))
    x = features - features.mean(-2, keepdim=True)
    degree = affinity.sum(-1)
    degree = degree.to_dense() if degree.layout != torch.strided else degree
    mass = degree.sum(-1, dtype=torch.float64)
    if _checks.known_false(mass > 0):
        raise ValueError("affinity must have at least one edge, got none")
    total = 2 * (_total(degree[..., None] * x.square()) - _total(x * _smooth(affinity, x)))
    return (total / mass).clamp(min=_BANDWIDTH_FLOOR).sqrt().to(features.dtype)


@torch.no_grad()
def slk_cluster(
    features: Tensor,
    prototypes: Tensor,
    *,
    affinity: Tensor | None = None,
    weight: float = 0.7,
    num_neighbors: int = 2,
    complexity: float = 0.0,
    kind: str = "means",
    bandwidth: float | Tensor | None = None,
    hard_prototypes: bool = True,
    proximal: float | None = None,
    support_mask: Tensor | None = None,
    support_assignment: Tensor | None = None,
    max_loops: int = 100,
    tolerance: float = 1e-4,
    max_iterations: int = 600,
    inner_tolerance: float = 1e-7,
) -> SLKResult:
    r"""Cluster points: prototypes and assignments in turn (algorithm alg-transductive-slk), with or without labeled points.

    ``hard_prototypes`` is the paper's algorithm: prototypes from the largest entry of each row, and each assignment step from
    :math:`\mathrm{softmax}(-a)`; with ``weight=0`` and "means" it is K-means by Lloyd. Without it, prototypes come from the soft assignment and
    each step starts where the last one ended: then the objective cannot rise (thm-transductive-blocks), and ``weight=0`` is soft K-means;
    with ``complexity=1`` on top, the EM algorithm of a Gaussian mixture with variance 1/2 and free class shares.

    Args:
        features: shape ``(..., N, d)``, floating point.
        prototypes: the first, shape ``(..., K, d)``.
        affinity: :math:`W`, symmetric, at least 0, shape ``(..., N, N)``, dense or sparse COO; None makes it by :func:`knn_affinity`.
        weight: :math:`\lambda\ge0`; 0 needs no graph.
        num_neighbors: of the graph, where ``affinity`` is None.
        complexity: :math:`\gamma\ge0`.
        kind: "means", "modes" or "points".
        bandwidth: :math:`\sigma`, a number; None takes :func:`graph_bandwidth`.
        hard_prototypes: see above.
        proximal: as in :func:`bound_update`.
        support_mask: bool, shape ``(..., N)``, true at labeled points.
        support_assignment: their rows, shape ``(..., N, K)``.
        max_loops: assignment steps at most.
        tolerance: stop when the objective changes by at most this share of itself from loop to loop, at least 0.
        max_iterations, inner_tolerance: of the assignment step, as in :func:`laplacian_assignment`.

    Returns:
        :class:`SLKResult`. If with hard prototypes a class loses its last point, the state before is restored, and ``converged`` is false.

    Raises:
        TypeError, ValueError: for a wrong type, shape, kind or number, naming the argument.

    Complexity: O(NKd + T(NK + mK)) time a loop of T updates, for m entries of W, and O(m + NK + (N + K)d) memory; making the graph costs
    O(N^2 d) time once. The graph made here is sparse, m <= 2Nk, for one set of points; with leading axes it is dense, m = N^2 an episode.

    Source: Ziko et al., the block-coordinate algorithm.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [5.0], [6.0]])
        >>> slk_cluster(x, x[:2], weight=0.0).labels
        tensor([0, 0, 1, 1])
    """
    _prototypes(features, prototypes)
    weight = _checks.number("weight", weight, 0)
    if not isinstance(hard_prototypes, bool):
        raise TypeError(f"hard_prototypes must be a bool, got {type(hard_prototypes).__name__}")
    tolerance = _checks.number("tolerance", tolerance, 0)
    _checks.positive_int("max_loops", max_loops)
    if affinity is None and (weight or (kind != "means" and bandwidth is None)):
        affinity = knn_affinity(features, num_neighbors, sparse=features.ndim == 2)
    if kind in ("modes", "points") and bandwidth is None:
        bandwidth = graph_bandwidth(features, affinity)
    stepped = dict(weight=weight, complexity=complexity, proximal=proximal)
    stepped |= dict(max_iterations=max_iterations, tolerance=inner_tolerance)
    shape = features.shape[:-2]
    stopped, converged = (torch.zeros(shape, dtype=torch.bool, device=features.device) for _ in range(2))
    iterations = torch.zeros(shape, dtype=torch.int64, device=features.device)
    values, s, m = [], None, prototypes
    for _ in range(max_loops):
        active = ~stopped
        everything = bool(active.all())

        def take(x, active=active, everything=everything):  # of the episodes that go on
            return x if everything or not isinstance(x, Tensor) or not x.ndim else x[active]

        def put(old, new, active=active, everything=everything):
            return (
                new if everything else old.masked_scatter(active.reshape(*shape, *[1] * (old.ndim - len(shape))), new)
            )

        points, sigma, before = take(features), take(bandwidth), take(prototypes)
        unary = prototype_costs(points, before, kind=kind, bandwidth=sigma)
        new, history = laplacian_assignment(
            unary,
            take(affinity),
            init=None if hard_prototypes or s is None else take(s),
            support_mask=take(support_mask),
            support_assignment=take(support_assignment),
            **stepped,
        )
        value, done = history[-1], torch.zeros_like(history[-1], dtype=torch.bool)
        iterations = put(iterations, take(iterations) + 1)
        hard, current = None, before
        if hard_prototypes:
            hard = torch.zeros_like(new).scatter_(-1, new.argmax(-1, keepdim=True), 1.0)
            done = (hard.sum(-2) == 0).any(-1)  # a class has lost its last point
        if values:
            last, lost = take(values[-1]), done
            new, current = take(s).where(lost[..., None, None], new), take(m).where(lost[..., None, None], before)
            value = last.where(lost, value)
            still = ~lost & ((value - last).abs() <= tolerance * last.abs())
            converged, done = put(converged, still), lost | still
        s, m = put(s, new), put(m, current)
        values.append(put(values[-1] if values else value, value))
        stopped = put(stopped, done)
        if bool(stopped.all()):
            break
        weights = new if hard is None or kind == "points" else hard
        prototypes = put(prototypes, update_prototypes(points, weights, kind=kind, bandwidth=sigma, previous=before))
    return SLKResult(s.argmax(-1), s, m, torch.stack(values), iterations, converged)


def _labeled(support: Tensor, support_labels: Tensor, query: Tensor, num_classes: int) -> Tensor:
    """The support's labels as rows, if each class has one."""
    _episode(support, query)
    _checks.positive_int("num_classes", num_classes)
    _checks.integer("support_labels", support_labels, support.ndim - 1)
    if support_labels.shape != support.shape[:-1]:
        raise ValueError(
            f"support_labels must have shape {tuple(support.shape[:-1])}, got {tuple(support_labels.shape)}"
        )
    if _checks.known_false((support_labels >= 0) & (support_labels < num_classes)):
        raise ValueError(
            f"support_labels must lie in [0, {num_classes}), got {support_labels.min()} to {support_labels.max()}"
        )
    rows = F.one_hot(support_labels, num_classes).to(support.dtype)
    if _checks.known_false(rows.sum(-2) > 0):
        raise ValueError(f"support_labels must have at least one label of each of the {num_classes} classes")
    return rows


def _taken(function: str, options: dict, *names: str) -> None:
    """An error if an option is one that the function sets itself."""
    for name in names:
        if name in options:
            raise TypeError(f"{name} must not be given to {function}, which sets it")


def slk_fit(
    support: Tensor, support_labels: Tensor, query: Tensor, *, num_classes: int, shift: bool = True, **options
) -> SLKResult:
    r"""Label the queries of an episode by clustering them together with the support (algorithm alg-transductive-slk).

    Prototypes start at the means of the support; the rows of the support are clamped to their labels throughout.
    ``weight=0`` is constrained K-means, or with ``kind="modes"`` constrained K-modes.

    Args:
        support: features of the labeled points, shape ``(..., S, d)``, floating point.
        support_labels: int64 in [0, K), each class at least once, shape ``(..., S)``.
        query: shape ``(..., Q, d)``.
        num_classes: K.
        shift: apply :func:`shift_correction` first.
        **options: keywords of :func:`slk_cluster`: ``weight`` (0.7), ``num_neighbors`` (2), ``kind`` ("means"), ``hard_prototypes`` (true), ...

    Returns:
        :class:`SLKResult`: ``labels`` of the queries, ``(..., Q)``, ``assignment`` of all points, the support first. Ties go to the lower class.

    Raises:
        TypeError, ValueError: for a wrong type, shape, label or number, naming the argument.

    Complexity: that of :func:`slk_cluster` with N = S + Q; a batch of episodes holds a dense graph, O((S + Q)^2) an episode.

    Source: Ziko et al., SLK-means and SLK-MS.

    Example:
        >>> support, query = torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [2.9], [4.5]])
        >>> slk_fit(support, torch.tensor([0, 1]), query, num_classes=2, shift=False).labels
        tensor([0, 1, 1])
    """
    _taken("slk_fit", options, "features", "prototypes", "support_mask", "support_assignment")
    rows = _labeled(support, support_labels, query, num_classes)
    if not isinstance(shift, bool):
        raise TypeError(f"shift must be a bool, got {type(shift).__name__}")
    query = shift_correction(support, query) if shift else query
    labeled = support.shape[-2]
    points = torch.cat([support, query], dim=-2)
    mask = torch.arange(points.shape[-2], device=points.device) < labeled
    result = slk_cluster(
        points,
        update_prototypes(support, rows),
        support_mask=mask.expand(points.shape[:-1]),
        support_assignment=F.pad(rows, (0, 0, 0, query.shape[-2])),
        **options,
    )
    fields = vars(result) | {"labels": result.labels[..., labeled:]}
    return SLKResult(**fields)


# ---------------------------------------------------------------------------------------------------------------------
# Baselines: the same pieces, fewer of them
# ---------------------------------------------------------------------------------------------------------------------


def nearest_prototype(support: Tensor, support_labels: Tensor, query: Tensor, *, num_classes: int) -> Tensor:
    r"""Label each query by the nearest mean of the support, alone (SimpleShot): one step with :math:`\lambda=0` and no prototype step.

    Args:
        support, support_labels, query, num_classes: as in :func:`slk_fit`.

    Returns:
        Labels, int64, shape ``(..., Q)``; ties go to the lower class.

    Raises:
        TypeError, ValueError: for a wrong type, shape or label, naming the argument.

    Complexity: O((S + Q)Kd) time.

    Source: Snell et al. 2017; Wang et al. 2019 (SimpleShot).

    Example:
        >>> support, query = torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [2.9]])
        >>> nearest_prototype(support, torch.tensor([0, 1]), query, num_classes=2)
        tensor([0, 1])
    """
    rows = _labeled(support, support_labels, query, num_classes)
    return prototype_costs(query, update_prototypes(support, rows)).argmin(-1)


def laplacian_shot(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    *,
    num_classes: int,
    weight: float = 0.7,
    num_neighbors: int = 2,
    **options,
) -> Tensor:
    r"""Label queries with prototypes fixed at the support's means, and a graph over the queries only (LaplacianShot).

    Args:
        support, support_labels, query, num_classes: as in :func:`slk_fit`.
        weight: :math:`\lambda\ge0`.
        num_neighbors: of the graph.
        **options: keywords of :func:`laplacian_assignment`.

    Returns:
        Labels, int64, shape ``(..., Q)``; ties go to the lower class.

    Raises:
        TypeError, ValueError: for a wrong type, shape, label or number, naming the argument.

    Complexity: O(Q^2 d + T(QK + mK)) time for T updates; m <= 2Qk for one episode, and a dense graph, m = Q^2 an episode, for a batch.

    Source: Ziko et al. 2020 (LaplacianShot), without its prototype rectification.

    Example:
        >>> support, query = torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [1.9], [2.2], [2.9]])
        >>> laplacian_shot(support, torch.tensor([0, 1]), query, num_classes=2, weight=0.5)
        tensor([0, 0, 1, 1])
    """
    _taken("laplacian_shot", options, "unary", "affinity")
    rows = _labeled(support, support_labels, query, num_classes)
    costs = prototype_costs(query, update_prototypes(support, rows))
    graph = knn_affinity(query, num_neighbors, sparse=query.ndim == 2) if _checks.number("weight", weight, 0) else None
    return laplacian_assignment(costs, graph, weight=weight, **options)[0].argmax(-1)


def paddle(
    support: Tensor, support_labels: Tensor, query: Tensor, *, num_classes: int, complexity: float = 1.0, **options
) -> SLKResult:
    r"""Soft K-means with a price on the entropy of the partition, and no graph (PADDLE): few of the classes in play may be among the queries.

    Args:
        support, support_labels, query, num_classes: as in :func:`slk_fit`; no shift correction, which would assume balanced classes.
        complexity: :math:`\gamma\ge0`; 1 is the description length of the labels in nats.
        **options: keywords of :func:`slk_cluster`.

    Returns:
        :class:`SLKResult`, as of :func:`slk_fit`.

    Raises:
        TypeError, ValueError: for a wrong type, shape, label or number, naming the argument.

    Complexity: O(NKd + TNK) time a loop of T updates.

    Source: Martin et al. 2022 (PADDLE), whose distances have a factor 1/2: multiply the features by :math:`\sqrt{1/2}`.

    Example:
        >>> support, query = torch.tensor([[0.0], [4.0], [8.0]]), torch.tensor([[3.0], [3.5], [5.0], [6.1]])
        >>> paddle(support, torch.tensor([0, 1, 2]), query, num_classes=3).labels
        tensor([1, 1, 1, 1])
    """
    _taken("paddle", options, "shift", "weight")
    options = {"hard_prototypes": False} | options
    return slk_fit(
        support,
        support_labels,
        query,
        num_classes=num_classes,
        shift=False,
        weight=0.0,
        complexity=complexity,
        **options,
    )
