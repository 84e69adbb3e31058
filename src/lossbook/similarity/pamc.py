r"""A contrastive loss on a graph whose negatives are clusters, each one the sum of its members.

The method of *Efficient block contrastive learning via parameter-free meta-node approximation* (Kulatilleke, Portmann and Chandra, 2022,
arXiv 2209.14067), written PamC here: positives from a sparse graph, negatives between meta-nodes, the exact pair loss and the sampled one
that it replaces, what the replacement loses, and the clustering objective it is trained with. Equation labels are those of the chapter
``similarity/pamc``.

Notation: ``embedding`` (n, d) holds :math:`z_i`, similarities are cosines, ``labels`` (n,) is :math:`c(i)` in [0, k), ``influence`` is the sparse
:math:`\Gamma`. :math:`\tau` is ``tau`` and *multiplies* similarities: an inverse temperature. Logs are natural.
"""

import math
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossbook import _checks, ops

# ---------------------------------------------------------------------------------------------------------------------
# The graph
# ---------------------------------------------------------------------------------------------------------------------


def knn_graph(features: Tensor, num_neighbors: int) -> Tensor:
    r"""The graph that joins each row with its nearest rows, and with those that have it among theirs.

    Args:
        features: shape ``(n, p)``, floating point, finite.
        num_neighbors: how many other rows, from 1 to n - 1, by Euclidean distance; equal rows may come in any order.

    Returns:
        Sparse COO tensor ``(n, n)`` of zeros and ones, symmetric, with an empty diagonal; dtype of ``features``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Complexity: O(n^2 p) time; no (n, n) matrix is held.

    Source: the authors' graphs of data sets without one (USPS, HHAR, Reuters).

    Example:
        >>> knn_graph(torch.tensor([[0.0], [1.0], [5.0]]), 1).to_dense()
        tensor([[0., 1., 0.],
                [1., 0., 1.],
                [0., 1., 0.]])
    """
    x = _checks.finite("features", _checks.floating("features", features, 2)).detach().double()
    n = len(x)
    if _checks.positive_int("num_neighbors", num_neighbors) >= n:
        raise ValueError(f"num_neighbors must be below the number of rows, {n}, got {num_neighbors}")
    x = x - x.mean(0)
    # -|x - y|^2 + |x|^2 = 2 x.y - |y|^2 has the order of the distances, and is one product.
    queries, keys = F.pad(x, (0, 1), value=1.0), torch.cat([2 * x, -(x * x).sum(1, keepdim=True)], dim=1)
    itself = torch.arange(n, device=x.device)
    nearest = ops.streamed_topk(queries, keys, num_neighbors, exclude=itself)[1].flatten()
    one_way = torch.stack([itself.repeat_interleave(num_neighbors), nearest])
    indices = torch.cat([one_way, one_way.flip(0)], dim=1).unique(dim=1)
    ones = torch.ones(indices.shape[1], dtype=features.dtype, device=x.device)
    return torch.sparse_coo_tensor(indices, ones, (n, n), is_coalesced=True, check_invariants=False)


def influence_matrix(adjacency: Any, order: int, *, cumulative: bool = True) -> Tensor:
    r"""How much each node within some hops influences a node, :math:`\Gamma=\sum_{r=1}^R\hat A^r`, :math:`\hat A=D^{-1}(A+I)` (eq-pamc-influence).

    Row i of :math:`\hat A^r` says where a random walk from i stands after r steps, if each step may also stay.

    Args:
        adjacency: :math:`A`, shape ``(n, n)``: a sparse or dense tensor, or any SciPy sparse matrix; entries finite and :math:`\ge0`. Self-loops are added
            here.
        order: :math:`R\ge1`, number of hops.
        cumulative: False gives :math:`\hat A^R` alone.

    Returns:
        Sparse COO tensor ``(n, n)``, coalesced; rows sum to ``order``, or to 1 where not cumulative. It has the dtype of ``adjacency``, or the default one
        where that has no floating point.

    Raises:
        TypeError, ValueError: for a wrong type, shape, entry or number, naming the argument.

    Complexity: the products of sparse matrices; the result has as many entries as there are pairs within R hops.

    Source: ``get_A_r_flexSP`` of the authors' code.

    Example:
        >>> influence_matrix(torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]]), 1).to_dense()
        tensor([[0.5000, 0.5000, 0.0000],
                [0.3333, 0.3333, 0.3333],
                [0.0000, 0.5000, 0.5000]])
    """
    if hasattr(adjacency, "tocoo"):  # scipy.sparse, without a need for SciPy
        coo = adjacency.tocoo()
        indices = torch.stack([torch.as_tensor(coo.row).long(), torch.as_tensor(coo.col).long()])
        adjacency = torch.sparse_coo_tensor(indices, torch.as_tensor(coo.data), coo.shape, check_invariants=False)
    if not isinstance(adjacency, Tensor):
        raise TypeError(f"adjacency must be a tensor or a SciPy sparse matrix, got {type(adjacency).__name__}")
    if adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1] or adjacency.numel() == 0:
        raise ValueError(f"adjacency must have shape (n, n), got {tuple(adjacency.shape)}")
    order = _checks.positive_int("order", order)
    n = len(adjacency)
    adjacency = adjacency.detach().to_sparse_coo().coalesce()
    if _checks.known_false(torch.isfinite(adjacency.values()) & (adjacency.values() >= 0)):
        raise ValueError("adjacency must be finite and >= 0")
    if not adjacency.is_floating_point():
        adjacency = adjacency.to(torch.get_default_dtype())
    diagonal = torch.arange(n, device=adjacency.device).expand(2, n)
    ones = torch.ones(n, dtype=adjacency.dtype, device=adjacency.device)
    loops = torch.sparse_coo_tensor(diagonal, ones, (n, n), check_invariants=False)
    step = (adjacency + loops).coalesce()
    rows = step.indices()[0]
    degree = torch.zeros(n, dtype=step.dtype, device=step.device).index_add(0, rows, step.values())
    step = torch.sparse_coo_tensor(
        step.indices(), step.values() / degree[rows], (n, n), is_coalesced=True, check_invariants=False
    )
    power = total = step
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        for _ in range(order - 1):
            power = torch.sparse.mm(power, step)
            total = total + power if cumulative else power
    return total.coalesce()


def _edges(influence: Tensor, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and weights of a sparse influence matrix for ``n`` nodes, in the order of the rows."""
    if not isinstance(influence, Tensor) or influence.layout not in (torch.sparse_coo, torch.sparse_csr):
        kind = influence.layout if isinstance(influence, Tensor) else type(influence).__name__
        raise TypeError(f"influence must be a sparse tensor (see influence_matrix), got {kind}")
    if influence.shape != (n, n):
        raise ValueError(f"influence must have shape ({n}, {n}), one row a node, got {tuple(influence.shape)}")
    if not influence.is_floating_point():
        raise TypeError(f"influence must be a floating-point tensor, got {influence.dtype}")
    influence = influence.detach().to_sparse_coo().coalesce()
    (rows, columns), weights = influence.indices(), influence.values().to(dtype)
    if _checks.known_false(torch.isfinite(weights) & (weights >= 0)):
        raise ValueError("influence must be finite and >= 0")
    if _checks.known_false(weights.new_zeros(n).index_add(0, rows, weights) > 0):
        raise ValueError("influence must have a positive entry in each row, got a row without")
    return rows, columns, weights


# ---------------------------------------------------------------------------------------------------------------------
# Checks and cosines
# ---------------------------------------------------------------------------------------------------------------------


def _embedding(embedding: Tensor) -> Tensor:
    """``embedding``, if it is finite and has no zero row, whose cosines would not exist."""
    _checks.finite("embedding", _checks.floating("embedding", embedding, 2))
    if _checks.known_false(embedding.detach().abs().amax(1) > 0):
        raise ValueError("embedding must have no zero row, since cosines need a direction")
    return embedding


def _unit_rows(x: Tensor) -> Tensor:
    """Rows of length one at any scale, in float32 or wider; a zero row stays zero, with a zero gradient."""
    x = _checks.wide(x)
    scale = x.detach().abs().amax(1, keepdim=True)
    return F.normalize(x / torch.where(scale > 0, scale, torch.inf), dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Meta-nodes and the two negative terms
# ---------------------------------------------------------------------------------------------------------------------


def _assignment(assignment: Tensor, n: int, num_clusters: int) -> Tensor:
    """Labels ``(n,)`` in [0, k) or soft assignments ``(n, k)``, constants of the step."""
    num_clusters = _checks.positive_int("num_clusters", num_clusters)
    if isinstance(assignment, Tensor) and assignment.is_floating_point():
        if _checks.floating("assignment", assignment, 2).shape != (n, num_clusters):
            raise ValueError(
                f"assignment must have shape ({n}, {num_clusters}), a row of weights a node, got {tuple(assignment.shape)}"
            )
        if _checks.known_false(torch.isfinite(assignment) & (assignment >= 0)):
            raise ValueError("assignment must be finite and >= 0")
    else:
        if len(_checks.integer("assignment", assignment, 1)) != n:
            raise ValueError(f"assignment must hold {n} labels, one for each node, got {len(assignment)}")
        if _checks.known_false((assignment >= 0) & (assignment < num_clusters)):
            raise ValueError(
                f"assignment must lie in [0, {num_clusters}), got {assignment.min()} to {assignment.max()}"
            )
    return assignment.detach()


def _sum_by(assignment: Tensor, num_clusters: int, x: Tensor) -> Tensor:
    """Sum of the rows of ``x`` over each cluster."""
    if assignment.is_floating_point():
        return assignment.to(x.dtype).T @ x
    return x.new_zeros(num_clusters, *x.shape[1:]).index_add(0, assignment, x)


def meta_nodes(embedding: Tensor, assignment: Tensor, num_clusters: int) -> Tensor:
    r"""One vector for each cluster, the sum of its members: :math:`C_a=\sum_{i:c(i)=a}z_i` (eq-pamc-meta).

    With soft assignments :math:`q` it is :math:`C_a=\sum_iq_{ia}z_i`: the variant that the paper's abstract speaks of. The authors' code takes labels.

    Args:
        embedding: :math:`z`, shape ``(n, d)``, floating point, finite. Not normalized: long rows weigh more.
        assignment: labels, int64 ``(n,)`` in [0, num_clusters), or soft assignments :math:`q\ge0`, floating point ``(n, num_clusters)``. No gradient
            flows into it.
        num_clusters: k.

    Returns:
        Shape ``(k, d)``, float32 or wider; a zero row for an empty cluster.

    Raises:
        TypeError, ValueError: for a wrong type, shape or label, naming the argument.

    Complexity: O(nd) time with labels, O(nkd) with soft assignments; O(nd + kd) memory.

    Source: Kulatilleke et al., the meta-nodes of the method; ``train_scgc_trimPOS_CCSP`` of their code (which forms an (n, k, d) tensor).

    Example:
        >>> meta_nodes(torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 1.0]]), torch.tensor([0, 0, 2]), 3)
        tensor([[2., 2.],
                [0., 0.],
                [0., 1.]])
    """
    _checks.finite("embedding", _checks.floating("embedding", embedding, 2))
    assignment = _assignment(assignment, len(embedding), num_clusters)
    with torch.autocast(embedding.device.type, enabled=False):
        return _sum_by(assignment, num_clusters, _checks.wide(embedding))


def _log_partitions(
    unit: Tensor, tau: float, self_similarity: float, *, used: Tensor | None = None, chunk_size: int | None = None
) -> Tensor:
    r""":math:`\log\sum_je^{\tau s_{ij}}` of each row, the diagonal replaced; keys that are not ``used`` are left out."""
    bias = None if used is None else torch.zeros_like(unit[:, 0]).masked_fill(~used, -torch.inf)
    itself = torch.arange(len(unit), device=unit.device)
    others = ops.streamed_logsumexp(tau * unit, unit, bias=bias, exclude=itself, chunk_size=chunk_size)
    return torch.logaddexp(others, torch.full_like(others, tau * self_similarity))


def meta_node_negative(
    embedding: Tensor, assignment: Tensor, num_clusters: int, *, tau: float, self_similarity: float = 0.0
) -> Tensor:
    r"""The negative term between meta-nodes, :math:`\frac1k\sum_a\log\sum_be^{\tau\,\mathrm{Sim}_{ab}}`, :math:`\mathrm{Sim}_{ab}=\cos(C_a,C_b)` (eq-pamc-negative).

    Clusters that are empty are in neither sum, and k counts the others. A cluster whose members cancel has cosine 0 with all others, and no gradient.

    Args:
        embedding: :math:`z`, shape ``(n, d)``, floating point, finite.
        assignment: labels or soft assignments, as in :func:`meta_nodes`.
        num_clusters: k.
        tau: :math:`\tau>0`, an inverse temperature.
        self_similarity: what stands on the diagonal of :math:`\mathrm{Sim}`, in [-1, 1]: 0 as in the authors' code, or the true cosine, 1.

    Returns:
        Shape ``()``, float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape, label or number, naming the argument.

    Complexity: O(nd + k^2 d) time with labels, O(nkd + k^2 d) with soft assignments; O(nd + kd) memory plus a chunk of the (k, k) matrix.

    Source: Kulatilleke et al., the negative term of the method; ``NcontrastCCSP`` of their code.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> meta_node_negative(z, torch.tensor([0, 0, 1]), 2, tau=1.0)  # log(e^0 + e^0)
        tensor(0.6931)
    """
    centers = meta_nodes(embedding, assignment, num_clusters)
    tau, self_similarity = (
        _checks.positive_number("tau", tau),
        _checks.number("self_similarity", self_similarity, -1, 1),
    )
    with torch.autocast(embedding.device.type, enabled=False):
        ones = centers.new_ones(len(embedding))
        used = _sum_by(assignment.detach(), num_clusters, ones) > 0
        if _checks.known_false(used.any()):
            raise ValueError("assignment must give some weight to some cluster, got zeros only")
        rows = _log_partitions(_unit_rows(centers), tau, self_similarity, used=used)
        return rows.where(used, 0).sum() / used.sum()


def pairwise_negative(
    embedding: Tensor, *, tau: float, self_similarity: float = 0.0, chunk_size: int | None = None
) -> Tensor:
    r"""The exact negative term, over all pairs of nodes: :math:`\frac1n\sum_i\log\sum_je^{\tau\,\mathrm{sim}_{ij}}` (eq-pamc-pair).

    Args:
        embedding: :math:`z`, shape ``(n, d)``, floating point, finite, without zero rows.
        tau: :math:`\tau>0`, an inverse temperature.
        self_similarity: what stands on the diagonal, in [-1, 1]: 0 as in the authors' code, or 1.
        chunk_size: rows of similarities held at a time; None chooses.

    Returns:
        Shape ``()``, float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Complexity: O(n^2 d) time, O(chunk_size * n + nd) memory; the backward pass computes similarities anew.

    Source: the negative term of the loss that Kulatilleke et al. start from; ``train_scgc_trim`` of their code.

    Example:
        >>> pairwise_negative(torch.eye(4), tau=1.0)  # log(4 e^0)
        tensor(1.3863)
    """
    _embedding(embedding)
    tau, self_similarity = (
        _checks.positive_number("tau", tau),
        _checks.number("self_similarity", self_similarity, -1, 1),
    )
    with torch.autocast(embedding.device.type, enabled=False):
        return _log_partitions(_unit_rows(embedding), tau, self_similarity, chunk_size=chunk_size).mean()


# ---------------------------------------------------------------------------------------------------------------------
# The positive term
# ---------------------------------------------------------------------------------------------------------------------

_EDGE_ELEMENTS = 2**20  # numbers in a gathered block of edges


class _EdgeProducts(torch.autograd.Function):
    """``x[rows] . x[columns]`` for each edge; the gathered rows are not kept, and gathered again in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, rows, columns):
        chunk = max(1, _EDGE_ELEMENTS // x.shape[1])
        ends = zip(rows.split(chunk), columns.split(chunk), strict=True)
        return torch.cat([(x.index_select(0, i) * x.index_select(0, j)).sum(1) for i, j in ends])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_output):
        x, rows, columns = ctx.saved_tensors
        chunk = max(1, _EDGE_ELEMENTS // x.shape[1])
        total = None
        for i, j, grad in zip(*(part.split(chunk) for part in (rows, columns, grad_output)), strict=True):
            part = grad[:, None] * x.index_select(
                0, j
            )  # vmap allows adding in place only to what has its dimension already
            total = torch.zeros_like(x).index_add(0, i, part) if total is None else total.index_add_(0, i, part)
            total.index_add_(0, j, grad[:, None] * x.index_select(0, i))
        return total, None, None


def _logsumexp_by(rows: Tensor, n: int, logits: Tensor) -> Tensor:
    """Log-sum-exp of the entries of each row."""
    largest = torch.full_like(logits[:1].expand(n), -torch.inf).scatter_reduce(0, rows, logits.detach(), "amax")
    total = torch.zeros_like(largest).index_add(0, rows, (logits - largest[rows]).exp())
    return largest + total.log()


def neighborhood_positive(embedding: Tensor, influence: Tensor, *, tau: float, self_similarity: float = 0.0) -> Tensor:
    r"""The mean log-similarity of a node to its neighborhood, :math:`\frac1n\sum_i\log\sum_j\Gamma_{ij}e^{\tau\,\mathrm{sim}_{ij}}` (eq-pamc-positive).

    Args:
        embedding: :math:`z`, shape ``(n, d)``, floating point, finite, without zero rows.
        influence: :math:`\Gamma`, sparse tensor ``(n, n)``, entries :math:`\ge0`, at least one positive in each row; see :func:`influence_matrix`.
        tau: :math:`\tau>0`, an inverse temperature.
        self_similarity: the similarity of a node to itself, in [-1, 1]: 0 as in the authors' code, or 1.

    Returns:
        Shape ``()``, float32 or wider. The loss has it with a minus.

    Raises:
        TypeError, ValueError: for a wrong type, shape, entry or number, naming the argument.

    Complexity: O(Ed) time for E entries of :math:`\Gamma`, O(E + nd) memory: edges are taken a block at a time, and again in the backward pass.

    Source: Kulatilleke et al., the positive term of the method; ``NcontrastCCSP`` of their code.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> neighborhood_positive(z, influence_matrix(torch.tensor([[0, 1], [1, 0]]), 1), tau=1.0)  # log((e^0 + e^1) / 2)
        tensor(0.6201)
    """
    _embedding(embedding)
    tau, self_similarity = (
        _checks.positive_number("tau", tau),
        _checks.number("self_similarity", self_similarity, -1, 1),
    )
    with torch.autocast(embedding.device.type, enabled=False):
        unit = _unit_rows(embedding)
        rows, columns, weights = _edges(influence, len(unit), unit.dtype)
        similarity = torch.where(rows == columns, self_similarity, _EdgeProducts.apply(unit, rows, columns))
        return _logsumexp_by(rows, len(unit), tau * similarity + weights.log()).mean()


# ---------------------------------------------------------------------------------------------------------------------
# The losses
# ---------------------------------------------------------------------------------------------------------------------


def pamc_loss(
    embedding: Tensor,
    assignment: Tensor,
    influence: Tensor,
    *,
    num_clusters: int,
    tau: float,
    self_similarity: float = 0.0,
) -> Tensor:
    r"""PamC: the neighborhood against the meta-nodes (eq-pamc-loss).

    Args:
        embedding: :math:`z`, shape ``(n, d)``, floating point, finite, without zero rows.
        assignment: labels or soft assignments, as in :func:`meta_nodes`.
        influence: :math:`\Gamma`, sparse tensor ``(n, n)``, as in :func:`neighborhood_positive`.
        num_clusters: k.
        tau: :math:`\tau>0`, an inverse temperature.
        self_similarity: what stands on both diagonals, in [-1, 1]: 0 as in the authors' code, or 1.

    Returns:
        Shape ``()``, float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape, label, entry or number, naming the argument.

    Complexity: O((E + n + k^2) d) time with labels for E entries of :math:`\Gamma`; O(E + nd + kd) memory plus a chunk of the (k, k) matrix.

    Source: Kulatilleke et al., the loss of the method; ``NcontrastCCSP`` of their code, without the 1e-10 in its logarithms.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> influence = influence_matrix(torch.block_diag(*torch.tensor([[[0, 1], [1, 0]]] * 2)), 1)
        >>> pamc_loss(z, torch.tensor([0, 0, 1, 1]), influence, num_clusters=2, tau=1.0)
        tensor(0.0730)
    """
    options = dict(tau=tau, self_similarity=self_similarity)
    positive = neighborhood_positive(embedding, influence, **options)
    return meta_node_negative(embedding, assignment, num_clusters, **options) - positive


def pairwise_contrast_loss(
    embedding: Tensor, influence: Tensor, *, tau: float, self_similarity: float = 0.0, chunk_size: int | None = None
) -> Tensor:
    r"""The exact loss: the neighborhood against all nodes (eq-pamc-exact).

    Args:
        embedding, influence, tau, self_similarity: as in :func:`pamc_loss`.
        chunk_size: rows of similarities held at a time; None chooses.

    Returns:
        Shape ``()``, float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape, entry or number, naming the argument.

    Complexity: O(n^2 d + Ed) time, O(chunk_size * n + E + nd) memory.

    Source: the exact form of the loss of Kulatilleke et al.; ``train_scgc_trim`` of their code.

    Example:
        >>> influence = influence_matrix(torch.zeros(4, 4), 1)
        >>> pairwise_contrast_loss(torch.eye(4), influence, tau=1.0)  # log 4 - log e^0
        tensor(1.3863)
    """
    options = dict(tau=tau, self_similarity=self_similarity)
    positive = neighborhood_positive(embedding, influence, **options)
    return pairwise_negative(embedding, **options, chunk_size=chunk_size) - positive


def sampled_contrast_loss(
    embedding: Tensor,
    influence: Tensor,
    *,
    tau: float,
    num_negatives: int,
    self_similarity: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The neighborhood against a sample: for each node m others, drawn uniformly with replacement (eq-pamc-sampled).

    The estimate of the sum is unbiased, that of its logarithm is too low on average.

    Args:
        embedding, influence, tau, self_similarity: as in :func:`pamc_loss`; at least two nodes.
        num_negatives: :math:`m\ge1`.
        generator: of the draws; None takes the global one.

    Returns:
        Shape ``()``, float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape, entry or number, naming the argument.

    Complexity: O((nm + E) d) time, O(nm + E + nd) memory.

    Source: the sampled baseline that Kulatilleke et al. call biased; this form is our own.

    Example:
        >>> influence = influence_matrix(torch.zeros(4, 4), 1)
        >>> sampled_contrast_loss(torch.eye(4), influence, tau=1.0, num_negatives=2)  # all others are alike: exact
        tensor(1.3863)
    """
    n = len(_embedding(embedding))
    if n < 2:
        raise ValueError("embedding must have at least 2 rows, so that there is a negative, got 1")
    num_negatives = _checks.positive_int("num_negatives", num_negatives)
    positive = neighborhood_positive(embedding, influence, tau=tau, self_similarity=self_similarity)
    device = embedding.device if generator is None else generator.device
    drawn = torch.randint(n - 1, (n, num_negatives), generator=generator, device=device).to(embedding.device)
    itself = torch.arange(n, device=embedding.device)[:, None]
    drawn = drawn + (drawn >= itself)  # any but the node itself
    with torch.autocast(embedding.device.type, enabled=False):
        rows = itself.expand_as(drawn).flatten()
        similarity = _EdgeProducts.apply(_unit_rows(embedding), rows, drawn.flatten()).unflatten(0, drawn.shape)
        others = torch.logsumexp(tau * similarity, dim=1) + math.log((n - 1) / num_negatives)
        return torch.logaddexp(others, torch.full_like(others, tau * self_similarity)).mean() - positive


# ---------------------------------------------------------------------------------------------------------------------
# What the approximation loses
# ---------------------------------------------------------------------------------------------------------------------


class BlockStatistics(NamedTuple):
    r"""What :func:`block_statistics` returns, for k clusters of unit vectors.

    Args:
        sizes: :math:`n_a`, int64 ``(k,)``.
        resultants: :math:`R_a` in [0, 1], float64 ``(k,)``.
        means: :math:`m_{ab}` in [-1, 1], float64 ``(k, k)``.
        variances: :math:`\sigma_{ab}^2\ge0`, float64 ``(k, k)``.

    Source: own (chapter, prop-pamc-inflation and prop-pamc-block).
    """

    sizes: Tensor
    resultants: Tensor
    means: Tensor
    variances: Tensor


@torch.no_grad()
def block_statistics(embedding: Tensor, labels: Tensor, num_clusters: int) -> BlockStatistics:
    r"""Cluster sizes, resultant lengths, and the mean and variance of similarity in each pair of clusters (eq-pamc-block, eq-pamc-variance).

    With the rows normalized, :math:`R_a=\|\bar z_a\|`, :math:`m_{ab}=\bar z_a^\top\bar z_b` and :math:`\sigma_{ab}^2=\mathrm{tr}(\Sigma_a\Sigma_b)-m_{ab}^2`, where :math:`\Sigma_a` is the mean of
    :math:`z_iz_i^\top` over the cluster. All :math:`n_an_b` pairs count, those of a node with itself included.

    Args:
        embedding: shape ``(n, d)``, floating point, finite, without zero rows; normalized here.
        labels: int64 ``(n,)``, in [0, num_clusters).
        num_clusters: k.

    Returns:
        :class:`BlockStatistics`, float64 and without gradient; nan for the resultants, means and variances of empty clusters.

    Raises:
        TypeError, ValueError: for a wrong type, shape or label, naming the argument.

    Complexity: O(n d^2 + k^2 d^2) time, O(nd + kd^2) memory; no pair is looked at.

    Source: own (chapter, prop-pamc-inflation and prop-pamc-block).

    Example:
        >>> statistics = block_statistics(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0, 1]), 2)
        >>> statistics.resultants
        tensor([0.7071, 1.0000], dtype=torch.float64)
    """
    _embedding(embedding)
    if _checks.integer("labels", labels, 1).shape != (len(embedding),):
        raise ValueError(f"labels must hold {len(embedding)} labels, one for each node, got {len(labels)}")
    labels = _assignment(labels, len(embedding), num_clusters)
    unit = _unit_rows(embedding.double())
    sizes = labels.bincount(minlength=num_clusters)
    parts = unit[labels.argsort()].split(sizes.tolist())
    mean = torch.stack([part.mean(0) for part in parts])
    second = torch.stack([part.T @ part for part in parts]).flatten(1) / sizes[:, None]
    means = mean @ mean.T
    return BlockStatistics(sizes, mean.norm(dim=1), means, (second @ second.T - means**2).clamp(min=0))


def block_sum_bounds(statistics: BlockStatistics, *, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""Bounds on the logarithm of each block sum, :math:`\log\sum_{i\in a,j\in b}e^{\tau z_i^\top z_j}`: Jensen's, Hoeffding's, Bennett's (eq-pamc-bounds).

    Args:
        statistics: from :func:`block_statistics`.
        tau: :math:`\tau>0`.

    Returns:
        The lower bound :math:`\log(n_an_b)+\tau m_{ab}`, and two upper ones: the lower one plus :math:`\tau^2/2`, and plus
        :math:`\log(1+\sigma_{ab}^2\psi(\tau))` with :math:`\psi(\tau)=(e^{2\tau}-1-2\tau)/4`. Each of shape ``(k, k)``, float64.

    Raises:
        TypeError, ValueError: for a wrong type or number, naming the argument.

    Complexity: O(k^2).

    Source: own (chapter, prop-pamc-block).

    Example:
        >>> statistics = block_statistics(torch.eye(2), torch.tensor([0, 0]), 1)  # the sum is 2 e + 2 e^0
        >>> [round(bound.exp().item(), 4) for bound in block_sum_bounds(statistics, tau=1.0)]
        [6.5949, 10.8731, 8.404]
    """
    if not isinstance(statistics, BlockStatistics):
        raise TypeError(f"statistics must come from block_statistics, got {type(statistics).__name__}")
    tau = statistics.means.new_tensor(_checks.positive_number("tau", tau))
    log_sizes = statistics.sizes.double().log()
    lower = log_sizes[:, None] + log_sizes + tau * statistics.means
    psi = (torch.expm1(2 * tau) - 2 * tau) / 4
    return lower, lower + tau**2 / 2, lower + torch.log1p(statistics.variances * psi)


class NegativeGap(NamedTuple):
    r"""What :func:`negative_gap` returns: the gap, and four parts that add up to it, each float64 of shape ``()``.

    Args:
        total: the exact negative term minus that of the meta-nodes minus :math:`\log(n/k)`.
        spread: similarities within a pair of clusters are not all equal.
        inflation: the cosine of sums is not the mean cosine.
        sizes: each cluster counts once.
        diagonal: the diagonals are replaced.

    Source: own (chapter, thm-pamc-gap).
    """

    total: Tensor
    spread: Tensor
    inflation: Tensor
    sizes: Tensor
    diagonal: Tensor


@torch.no_grad()
def negative_gap(
    embedding: Tensor, labels: Tensor, num_clusters: int, *, tau: float, self_similarity: float = 0.0
) -> NegativeGap:
    r"""What separates the exact negative term from that of the meta-nodes and :math:`\log(n/k)`, and why (eq-pamc-gap).

    ``spread`` is what similarities within a pair of clusters differ from their mean, in :math:`[0,\tau^2/2]`; ``inflation`` what the cosine of sums
    differs from the mean cosine; ``sizes`` what counting each cluster once costs; ``diagonal`` what replacing the diagonals by ``self_similarity`` does.

    Args:
        embedding: shape ``(n, d)``, floating point, finite, without zero rows. Where rows differ in length, that meta-nodes weigh by it is part of
            ``inflation``.
        labels: int64 ``(n,)``, in [0, num_clusters).
        num_clusters: k; empty clusters are not counted.
        tau: :math:`\tau>0`.
        self_similarity: as in :func:`pamc_loss`.

    Returns:
        :class:`NegativeGap`, float64 and without gradient.

    Raises:
        TypeError, ValueError: for a wrong type, shape, label or number, naming the argument.

    Complexity: that of :func:`pairwise_negative`, twice.

    Source: own (chapter, thm-pamc-gap).

    Example:
        >>> z, labels = torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1])
        >>> negative_gap(z, labels, 2, tau=1.0, self_similarity=1.0).total.abs() < 1e-12  # two directions, two equal clusters
        tensor(True)
    """
    statistics = block_statistics(embedding, labels, num_clusters)
    used = statistics.sizes > 0
    sizes = statistics.sizes[used].double()
    n, k = len(embedding), len(sizes)
    z = embedding.double()
    centers = _unit_rows(meta_nodes(z, labels, num_clusters)[used])
    cosines = (centers @ centers.T).fill_diagonal_(1)

    def weighted(similarity: Tensor) -> Tensor:
        return (sizes / n) @ torch.logsumexp(sizes.log() + tau * similarity, dim=1)

    exact = pairwise_negative(z, tau=tau, self_similarity=self_similarity)
    exact_true = pairwise_negative(z, tau=tau, self_similarity=1.0)
    meta = meta_node_negative(z, labels, num_clusters, tau=tau, self_similarity=self_similarity)
    meta_true = torch.logsumexp(tau * cosines, dim=1).mean()
    by_mean, by_cosine = weighted(statistics.means[used][:, used]), weighted(cosines)
    return NegativeGap(
        total=exact - meta - math.log(n / k),
        spread=exact_true - by_mean,
        inflation=by_mean - by_cosine,
        sizes=by_cosine - meta_true - math.log(n / k),
        diagonal=(exact - exact_true) + (meta_true - meta),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Clustering
# ---------------------------------------------------------------------------------------------------------------------


def soft_assignment(embedding: Tensor, centers: Tensor, *, dof: float = 1.0) -> Tensor:
    r"""How much each node belongs to each cluster, :math:`q_{ia}\propto(1+\|z_i-\mu_a\|^2/v)^{-(v+1)/2}` (eq-pamc-soft).

    Args:
        embedding: :math:`z`, shape ``(n, d)``, floating point, finite.
        centers: :math:`\mu`, shape ``(k, d)``, dtype of ``embedding``.
        dof: :math:`v>0`, degrees of freedom of Student's t.

    Returns:
        Shape ``(n, k)``, float32 or wider; rows sum to 1. Differentiable in ``embedding`` and ``centers``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Complexity: O(nkd) time, O(nk) memory.

    Source: deep embedded clustering, as used by Kulatilleke et al.

    Example:
        >>> soft_assignment(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]]))  # 1 : 1/5, and 1/2 : 1/2
        tensor([[0.8333, 0.1667],
                [0.5000, 0.5000]])
    """
    _checks.finite("embedding", _checks.floating("embedding", embedding, 2))
    _checks.finite("centers", _checks.floating("centers", centers, 2))
    if centers.shape[1] != embedding.shape[1] or centers.dtype != embedding.dtype:
        raise ValueError(
            f"centers must have {embedding.shape[1]} columns of {embedding.dtype} like embedding, "
            f"got shape {tuple(centers.shape)} of {centers.dtype}"
        )
    dof = _checks.positive_number("dof", dof)
    with torch.autocast(embedding.device.type, enabled=False):
        distance = torch.cdist(
            _checks.wide(embedding), _checks.wide(centers), compute_mode="donot_use_mm_for_euclid_dist"
        )
        return torch.softmax(-(dof + 1) / 2 * torch.log1p(distance**2 / dof), dim=1)


@torch.no_grad()
def target_distribution(assignment: Tensor) -> Tensor:
    r"""Soft assignments, sharpened and freed of cluster size: :math:`p_{ia}\propto q_{ia}^2/\sum_iq_{ia}` (eq-pamc-target).

    Args:
        assignment: :math:`q\ge0`, shape ``(n, k)``, floating point, at least one positive entry in each row.

    Returns:
        Shape ``(n, k)``, dtype of ``assignment``; rows sum to 1. Without gradient: it is the constant target of a step.

    Raises:
        TypeError, ValueError: for a wrong type, shape or entry, naming the argument.

    Complexity: O(nk).

    Source: deep embedded clustering, as used by Kulatilleke et al.

    Example:
        >>> target_distribution(torch.tensor([[0.8, 0.2], [0.2, 0.8]]))
        tensor([[0.9412, 0.0588],
                [0.0588, 0.9412]])
    """
    _distribution("assignment", assignment)
    weight = assignment / assignment.amax(1, keepdim=True)  # a row's scale cancels, and the squares do not underflow
    mass = assignment.sum(0)
    weight = weight**2 / mass.where(mass > 0, 1)
    return weight / weight.sum(1, keepdim=True)


def _distribution(name: str, value: Tensor) -> Tensor:
    """``value``, if it is ``(n, k)`` of weights, finite and at least 0, with something in each row."""
    _checks.floating(name, value, 2)
    if _checks.known_false(torch.isfinite(value) & (value >= 0)):
        raise ValueError(f"{name} must be finite and >= 0")
    if _checks.known_false(value.amax(1) > 0):
        raise ValueError(f"{name} must have a positive entry in each row, got a row of zeros")
    return value


def cluster_kl(assignment: Tensor, target: Tensor) -> Tensor:
    r"""The clustering loss :math:`\frac1n\sum_i\sum_ap_{ia}\log(p_{ia}/q_{ia})` (eq-pamc-kl).

    Args:
        assignment: :math:`q`, shape ``(n, k)``, floating point, rows sum to 1.
        target: :math:`p`, of the same shape and dtype; see :func:`target_distribution`. Differentiable, too.

    Returns:
        Shape ``()``; at least 0 for rows that sum to 1, and inf where p has weight on a zero of q.

    Raises:
        TypeError, ValueError: for a wrong type, shape or entry, naming the argument.

    Complexity: O(nk).

    Source: deep embedded clustering, as used by Kulatilleke et al.

    Example:
        >>> q = torch.tensor([[0.8, 0.2], [0.2, 0.8]])
        >>> cluster_kl(q, target_distribution(q))  # 0.9412 log(0.9412 / 0.8) + 0.0588 log(0.0588 / 0.2)
        tensor(0.0810)
    """
    _distribution("assignment", assignment)
    _checks.like("target", target, "assignment", assignment, 2)
    _distribution("target", target)
    for name, value in (("assignment", assignment), ("target", target)):
        if _checks.known_false((value.detach().sum(1) - 1).abs() < 1e-3):
            raise ValueError(f"{name} must have rows that sum to 1")
    positive = target > 0
    log_ratio = target.where(positive, 1).log() - assignment.where(positive, 1).log()
    return (target * log_ratio).sum(1).mean()


class PamCLoss(nn.Module):
    r"""The whole objective, :math:`\beta\,\mathcal L_{\mathrm{KL}}+\alpha\,\mathcal L_{\mathrm{PamC}}`, with trainable cluster centers (eq-pamc-total).

    One forward pass takes :math:`q` from the embedding, :math:`p` and the labels from the same :math:`q` without gradient, and adds both losses.

    Args:
        centers: first :math:`\mu`, shape ``(k, d)``, floating point: those of k-means.
        alpha: weight of the contrastive loss, at least 0.
        beta: weight of the clustering loss, at least 0.
        tau: :math:`\tau>0`, an inverse temperature.
        dof: :math:`v>0` of :func:`soft_assignment`.
        self_similarity: as in :func:`pamc_loss`.
        soft: meta-nodes from :math:`q` itself in place of its largest entry.

    Attributes:
        centers: parameter, shape ``(k, d)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, naming the argument.

    Complexity: O((E + nk + k^2) d) time for E entries of :math:`\Gamma`, O(E + nd + nk) memory.

    Source: Kulatilleke et al., the total loss; ``train_scgc_trimPOS_CCSP`` of their code.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> influence = influence_matrix(torch.block_diag(*torch.tensor([[[0, 1], [1, 0]]] * 2)), 1)
        >>> loss_fn = PamCLoss(torch.eye(2), alpha=1.0, beta=1.0, tau=1.0)
        >>> loss_fn(z, influence).item(), loss_fn.predict(z)  # doctest: +ELLIPSIS
        (0.145..., tensor([0, 0, 1, 1]))
    """

    def __init__(
        self,
        centers: Tensor,
        *,
        alpha: float,
        beta: float,
        tau: float,
        dof: float = 1.0,
        self_similarity: float = 0.0,
        soft: bool = False,
    ):
        super().__init__()
        _checks.finite("centers", _checks.floating("centers", centers, 2))
        self.centers = nn.Parameter(centers.detach().clone())
        self.alpha, self.beta = _checks.number("alpha", alpha, 0), _checks.number("beta", beta, 0)
        self.tau, self.dof = _checks.positive_number("tau", tau), _checks.positive_number("dof", dof)
        self.self_similarity = _checks.number("self_similarity", self_similarity, -1, 1)
        if not isinstance(soft, bool):
            raise TypeError(f"soft must be True or False, got {type(soft).__name__}")
        self.soft = soft

    def forward(self, embedding: Tensor, influence: Tensor) -> Tensor:
        """The loss of all nodes.

        Args:
            embedding: shape ``(n, d)``, dtype of the centers, finite, without zero rows.
            influence: sparse tensor ``(n, n)``, as in :func:`neighborhood_positive`.

        Returns:
            Shape ``()``, float32 or wider.

        Raises:
            TypeError, ValueError: for a wrong type, shape or entry, naming the argument.
        """
        q = soft_assignment(embedding, self.centers, dof=self.dof)
        assignment = q if self.soft else q.argmax(1)
        options = dict(num_clusters=len(self.centers), tau=self.tau, self_similarity=self.self_similarity)
        contrast = pamc_loss(embedding, assignment, influence, **options)
        return self.beta * cluster_kl(q, target_distribution(q)) + self.alpha * contrast

    @torch.no_grad()
    def predict(self, embedding: Tensor) -> Tensor:
        """The cluster of each node, int64 ``(n,)``."""
        return soft_assignment(embedding, self.centers, dof=self.dof).argmax(1)


def clustering_accuracy(labels: Tensor, predicted: Tensor) -> float:
    r"""The share of nodes whose cluster has their class, under the best one-to-one naming of clusters (Hungarian method).

    Args:
        labels: the classes, int64 ``(n,)``, at least 0.
        predicted: the clusters, int64 ``(n,)``, at least 0.

    Returns:
        A float in [0, 1].

    Raises:
        TypeError, ValueError: for a wrong type or shape, naming the argument.

    Complexity: O(n + k^3). Needs SciPy.

    Source: the measure of Kulatilleke et al.

    Example:
        >>> clustering_accuracy(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 1]))
        0.75
    """
    from scipy.optimize import linear_sum_assignment

    for name, value in (("labels", labels), ("predicted", predicted)):
        if not len(_checks.integer(name, value, 1)):
            raise ValueError(f"{name} must not be empty")
        if value.min() < 0:
            raise ValueError(f"{name} must be at least 0, got {value.min()}")
    if predicted.shape != labels.shape:
        raise ValueError(
            f"predicted must have the shape of labels, {tuple(labels.shape)}, got {tuple(predicted.shape)}"
        )
    count = int(max(labels.max(), predicted.max())) + 1
    table = (labels.cpu() * count + predicted.cpu()).bincount(minlength=count**2).reshape(count, count)
    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    return float(table[rows, columns].sum() / len(labels))
