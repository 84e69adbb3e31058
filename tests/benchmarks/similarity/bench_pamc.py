"""PamC against the exact pair loss as it is usually written, with its matrix of similarities: first equal values, then time, memory and slopes."""

import torch
import torch.nn.functional as F
from harness import Row, Slope, exponent, in_fresh_process, peak_memory, timed

from lossbook.similarity.pamc import influence_matrix, meta_nodes, pairwise_contrast_loss, pamc_loss

DIM, CLUSTERS, DEGREE, TAU = 16, 10, 6, 1.0


def _graph(n):
    """Embedding, labels and influence (one hop) of a graph of ten blocks, six edges a node, most of them within a block."""
    first, anywhere = torch.randint(n, (2, n * DEGREE // 2))
    inside = first % CLUSTERS + CLUSTERS * torch.randint(n // CLUSTERS, first.shape)
    second = torch.where(torch.rand(first.shape) < 0.8, inside, anywhere)
    indices = torch.cat([torch.stack([first, second]), torch.stack([second, first])], dim=1).unique(dim=1)
    adjacency = torch.sparse_coo_tensor(indices, torch.ones(indices.shape[1]), (n, n), check_invariants=False)
    labels = torch.arange(n) % CLUSTERS
    embedding = torch.randn(CLUSTERS, DIM)[labels] + 0.5 * torch.randn(n, DIM)
    return embedding.requires_grad_(), labels, influence_matrix(adjacency, 1)


def _dense(keys, embedding, influence):
    """The authors' formula with dense matrices; ``keys`` are the nodes, or the meta-nodes."""

    def similarities(x):
        unit = F.normalize(x, dim=1)
        return (TAU * (unit @ unit.T).fill_diagonal_(0)).exp()

    return similarities(keys).sum(1).log().mean() - (similarities(embedding) * influence).sum(1).log().mean()


def _step(loss, embedding):
    embedding.grad = None
    loss().backward()


def _losses(n):
    embedding, labels, influence = _graph(n)
    return embedding, {
        "pamc_loss": lambda: pamc_loss(embedding, labels, influence, num_clusters=CLUSTERS, tau=TAU),
        "pairwise_contrast_loss": lambda: pairwise_contrast_loss(embedding, influence, tau=TAU),
        "dense": lambda: _dense(embedding, embedding, influence.to_dense()),
        "dense meta": lambda: _dense(meta_nodes(embedding, labels, CLUSTERS), embedding, influence.to_dense()),
    }


def _assert_equal(n=500):
    embedding, losses = _losses(n)
    for ours, peer in (("pamc_loss", "dense meta"), ("pairwise_contrast_loss", "dense")):
        torch.testing.assert_close(losses[ours](), losses[peer](), rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad(losses[name](), embedding)[0] for name in (ours, peer)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def _time(names, n, repeats):
    embedding, losses = _losses(n)
    return timed(*(lambda name=name: _step(losses[name], embedding) for name in names), repeats=repeats)


def _memory(name, n):
    small, losses = _losses(100)
    _step(losses[name], small)  # what the first call of each kernel allocates for good
    embedding, losses = _losses(n)
    return peak_memory(lambda: _step(losses[name], embedding))


def run() -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    part, slug, rows, slopes = "similarity", "pamc", [], []
    in_fresh_process(_assert_equal)
    for n, repeats in ((1000, 20), (2000, 10), (4000, 5), (8000, 3)):
        for name in ("pamc_loss", "pairwise_contrast_loss"):
            ours, peer = in_fresh_process(_time, (name, "dense"), n, repeats)
            memory, peer_memory = (in_fresh_process(_memory, key, n) for key in (name, "dense"))
            size = f"n = {n}"
            rows.append(Row(part, slug, name, "dense exact loss", size, ours, peer, ours / peer, memory, peer_memory))
    n = 100_000
    (ours,) = in_fresh_process(_time, ("pamc_loss",), n, 5)
    rows.append(Row(part, slug, "pamc_loss", "", f"n = {n}", ours, memory_mb=in_fresh_process(_memory, "pamc_loss", n)))
    # From 10^3 on, time is first that of the calls and memory that of nothing: slopes are those of the upper ends, too.
    for name, sizes, claim in (
        ("pamc_loss", (1000, 10_000, 100_000), "at most 1"),
        ("pamc_loss", (25_000, 50_000, 100_000), "1: linear in nodes and edges"),
        ("pairwise_contrast_loss", (1000, 2000, 4000, 8000), "2: every pair is looked at"),
    ):
        times = [in_fresh_process(_time, (name,), size, 5)[0] for size in sizes]
        slopes.append(Slope(name, "time", f"n = {sizes[0]} to {sizes[-1]}", exponent(sizes, times), claim))
    for name, sizes, claim in (
        ("pamc_loss", (25_000, 50_000, 100_000), "1: linear in nodes and edges"),
        ("dense", (2000, 4000, 8000), "2: several n × n matrices"),
    ):
        memories = [in_fresh_process(_memory, name, size) for size in sizes]
        slopes.append(Slope(name, "memory", f"n = {sizes[0]} to {sizes[-1]}", exponent(sizes, memories), claim))
    return rows, slopes
