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


def _times(name, sizes, repeats=5):
    return [_time((name,), size, repeats)[0] for size in sizes]


def _memory(name, n):
    small, losses = _losses(100)
    _step(losses[name], small)  # what the first call of each kernel allocates for good
    embedding, losses = _losses(n)
    return peak_memory(lambda: _step(losses[name], embedding))


def run() -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    part, slug, rows, slopes = "similarity", "pamc", [], []
    in_fresh_process(_assert_equal)
    names, sizes, dense = ("pamc_loss", "pairwise_contrast_loss", "dense"), (2000, 4000, 8000), []
    for n in sizes:
        *times, peer = in_fresh_process(_time, names, n, 5)
        *memories, peer_memory = (in_fresh_process(_memory, name, n) for name in names)
        dense.append(peer_memory)
        for name, ours, memory in zip(names, times, memories, strict=False):
            row = Row(part, slug, name, "dense exact loss", f"n = {n}", ours, peer, ours / peer, memory, peer_memory)
            rows.append(row)
    large = (25_000, 50_000, 100_000)
    memories = [in_fresh_process(_memory, "pamc_loss", n) for n in large]
    times = in_fresh_process(_times, "pamc_loss", large)
    rows.append(Row(part, slug, "pamc_loss", "", f"n = {large[-1]}", times[-1], memory_mb=memories[-1]))

    def slope(name, quantity, over, measured, claim):
        slopes.append(Slope(name, quantity, f"n = {over[0]} to {over[-1]}", exponent(over, measured), claim))

    # From 10^3 on, time is at first that of the calls; the slope at the upper end is nearer to the limit.
    wide, narrow = (1000, 3000, 10_000, 30_000, 100_000), (1000, 2000, 4000, 8000)
    slope("pamc_loss", "time", wide, in_fresh_process(_times, "pamc_loss", wide), "at most 1")
    slope("pamc_loss", "time", large, times, "1: linear in nodes and edges")
    exact = in_fresh_process(_times, "pairwise_contrast_loss", narrow)
    slope("pairwise_contrast_loss", "time", narrow, exact, "2: every pair is looked at")
    slope("pamc_loss", "memory", large, memories, "1: linear in nodes and edges")
    slope("dense exact loss", "memory", sizes, dense, "2: several n × n matrices")
    return rows, slopes
