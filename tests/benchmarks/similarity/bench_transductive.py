"""Clustering with and without a graph, against scikit-learn's K-means and neighbors: first equal outputs, then time and memory up to n = 100,000."""

import numpy as np
import torch
from harness import Row, Slope, exponent, in_fresh_process, peak_memory, timed
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors

from lossbook.similarity import transductive as X

DIM, CLASSES, LOOPS = 16, 100, 5


def _points(n):
    generator = torch.Generator().manual_seed(0)
    centers = 2 * torch.randn(CLASSES, DIM, generator=generator)
    return centers[torch.arange(n) % CLASSES] + torch.randn(n, DIM, generator=generator)


def _graph(n, neighbors=2):
    """A sparse symmetric graph with the size of a k-nearest-neighbor graph; its making is measured apart."""
    own = torch.arange(n).repeat(neighbors)
    other = torch.cat([(torch.arange(n) + CLASSES * j) % n for j in range(1, neighbors + 1)])
    index = torch.cat([torch.stack([own, other]), torch.stack([other, own])], dim=1)
    return torch.sparse_coo_tensor(index, torch.full((index.shape[1],), 0.5), (n, n), check_invariants=True).coalesce()


def _k_means(x):
    return X.slk_cluster(x, x[:CLASSES], weight=0.0, max_loops=LOOPS, tolerance=0.0, max_iterations=1)


def _peer(x):
    return KMeans(CLASSES, init=x[:CLASSES], n_init=1, max_iter=LOOPS, tol=0, algorithm="lloyd").fit(x)


def _assert_equal_outputs():
    x = _points(3000).double()
    ours = X.slk_cluster(x, x[:CLASSES], weight=0.0, tolerance=0.0, max_loops=300)
    peer = KMeans(CLASSES, init=x[:CLASSES].numpy(), n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(x.numpy())
    assert ours.converged
    np.testing.assert_array_equal(ours.labels, peer.labels_)
    np.testing.assert_allclose(ours.prototypes, peer.cluster_centers_, atol=1e-9)
    graph = X.knn_affinity(x, 3, symmetric=False, sparse=True).to_dense().numpy()
    peer = NearestNeighbors(n_neighbors=3, algorithm="brute").fit(x.numpy()).kneighbors_graph().toarray()
    np.testing.assert_array_equal(graph, peer)


def _time_k_means(n):
    x = _points(n)
    return timed(lambda: _k_means(x), lambda: _peer(x.numpy()), repeats=2)


def _memory_k_means(n, peer):
    x = _points(n)
    return peak_memory(lambda: _peer(x.numpy()) if peer else _k_means(x))


def _time_neighbors(n):
    x = _points(n)
    search = NearestNeighbors(n_neighbors=2, algorithm="brute")
    return timed(lambda: X.knn_affinity(x, 2, sparse=True), lambda: search.fit(x.numpy()).kneighbors_graph(), repeats=2)


def _memory_neighbors(n, peer):
    x = _points(n)
    search = NearestNeighbors(n_neighbors=2, algorithm="brute")
    return peak_memory(lambda: search.fit(x.numpy()).kneighbors_graph() if peer else X.knn_affinity(x, 2, sparse=True))


def _fit(x, graph, supported):
    options = {}
    if supported:
        mask = torch.arange(len(x)) < CLASSES
        rows = torch.zeros(len(x), CLASSES)
        rows[torch.arange(CLASSES), torch.arange(CLASSES)] = 1
        options = dict(support_mask=mask, support_assignment=rows)
    return X.slk_cluster(x, x[:CLASSES], affinity=graph, weight=0.7, max_loops=2, max_iterations=10, **options)


def _time_fit(n, supported):
    x, graph = _points(n), _graph(n)
    return timed(lambda: _fit(x, graph, supported), repeats=1)[0]


def _memory_fit(n, supported):
    x, graph = _points(n), _graph(n)
    _fit(_points(1000), _graph(1000), supported)
    return peak_memory(lambda: _fit(x, graph, supported))


def run() -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    part, slug, rows = "similarity", "transductive", []
    in_fresh_process(_assert_equal_outputs)
    for n in (10_000, 100_000):
        ours, peer = in_fresh_process(_time_k_means, n)
        memory, peer_memory = (in_fresh_process(_memory_k_means, n, which) for which in (False, True))
        name = f"n = {n}, K = {CLASSES}, {LOOPS} loops"
        rows.append(
            Row(
                part,
                slug,
                "slk_cluster (K-means)",
                "scikit-learn KMeans",
                name,
                ours,
                peer,
                ours / peer,
                memory,
                peer_memory,
            )
        )
    n = 20_000
    ours, peer = in_fresh_process(_time_neighbors, n)
    memory, peer_memory = (in_fresh_process(_memory_neighbors, n, which) for which in (False, True))
    rows.append(
        Row(
            part,
            slug,
            "knn_affinity",
            "scikit-learn brute force",
            f"n = {n}",
            ours,
            peer,
            ours / peer,
            memory,
            peer_memory,
        )
    )
    sizes = (25_000, 50_000, 100_000)
    times = [in_fresh_process(_time_fit, n, False) for n in sizes]
    memories = [in_fresh_process(_memory_fit, n, False) for n in sizes]
    setting = f"n = {sizes[-1]}, K = {CLASSES}, sparse graph"
    rows.append(Row(part, slug, "slk_cluster", "", setting, times[-1], None, None, memories[-1], None))
    supported = in_fresh_process(_time_fit, sizes[-1], True), in_fresh_process(_memory_fit, sizes[-1], True)
    rows.append(Row(part, slug, "slk_cluster, with support", "", setting, supported[0], None, None, supported[1], None))
    span = f"n = {sizes[0]} to {sizes[-1]}"
    slopes = [
        Slope("slk_cluster", "time", span, exponent(sizes, times), "1: a sparse product and a softmax a point"),
        Slope("slk_cluster", "memory", span, exponent(sizes, memories), "1: a few copies of S, no n × n matrix"),
    ]
    return rows, slopes
