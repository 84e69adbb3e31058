"""Proto-Triplet against pytorch-metric-learning's miner and triplet loss on the same triplets; the ICNN loss against its dense form."""

import torch
from harness import Row, Slope, exponent, in_fresh_process, peak_memory, timed
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner
from pytorch_metric_learning.reducers import MeanReducer

from lossbook.similarity.proto_triplet import icnn_loss, proto_triplet_loss

PLAIN = LpDistance(normalize_embeddings=False)
MINER, PEER = BatchHardMiner(distance=PLAIN), TripletMarginLoss(margin=0.5, distance=PLAIN, reducer=MeanReducer())


def _peer(queries, labels, prototypes):
    own = torch.arange(len(prototypes))
    return PEER(queries, labels, MINER(queries, labels, prototypes, own), prototypes, own)


def _backward(loss, *leaves):
    for leaf in leaves:
        leaf.grad = None
    loss.backward()


def _triplet(way, per_class, dim, repeats):
    labels = torch.arange(way).repeat_interleave(per_class)
    queries, prototypes = torch.randn(len(labels), dim).requires_grad_(), torch.randn(way, dim).requires_grad_()
    ours, peer = proto_triplet_loss(queries, labels, prototypes), _peer(queries, labels, prototypes)
    torch.testing.assert_close(ours, peer, rtol=1e-5, atol=1e-5)
    return timed(
        lambda: _backward(proto_triplet_loss(queries, labels, prototypes), queries, prototypes),
        lambda: _backward(_peer(queries, labels, prototypes), queries, prototypes),
        repeats=repeats,
    )


def _dense_icnn(points, labels, k, num_neighbors):
    """The same loss with autograd through all n x n distances."""
    distance = ((points[:, None] - points).square().sum(2) + 1e-6).sqrt()
    distance = distance + torch.diag(torch.full((len(points),), torch.inf))
    distance, index = distance.topk(num_neighbors, largest=False)
    friend = labels[:, None] == labels[index]
    near, s = distance[:, :k], friend[:, :k].float()
    scale = torch.maximum(distance.masked_fill(friend, torch.inf).amin(1), near[:, -1])
    intra = ((s * near).sum(1) / scale / s.sum(1).clamp(min=1))[s.sum(1) > 0].mean()
    enemy = 1 - s
    inter = ((enemy * near).sum(1) / enemy.sum(1).clamp(min=1))[enemy.sum(1) > 0].mean() / (enemy * near).amax()
    return -(((1 - intra + inter) / 2 + s.mean()) / 2).log()


def _icnn(way, per_class, dim, repeats):
    labels = torch.arange(way).repeat_interleave(per_class)
    points = torch.randn(len(labels), dim).requires_grad_()
    options = dict(k=4, num_neighbors=per_class)
    torch.testing.assert_close(icnn_loss(points, labels, **options), _dense_icnn(points, labels, **options))
    return timed(
        lambda: _backward(icnn_loss(points, labels, **options), points),
        lambda: _backward(_dense_icnn(points, labels, **options), points),
        repeats=repeats,
    )


def _icnn_alone(number):
    """Milliseconds of a forward and backward pass, and its peak memory, with 20 points of a class."""
    labels = torch.arange(number // 20).repeat_interleave(20)
    points = torch.randn(number, 64).requires_grad_()
    memory = peak_memory(lambda: _backward(icnn_loss(points, labels, num_neighbors=20), points))
    return timed(lambda: _backward(icnn_loss(points, labels, num_neighbors=20), points), repeats=3)[0], memory


def run() -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    part, slug, rows = "similarity", "proto_triplet", []
    for way, per_class, dim, repeats in ((5, 15, 64, 100), (20, 15, 64, 100), (30, 15, 640, 30)):
        ours, peer = in_fresh_process(_triplet, way, per_class, dim, repeats)
        size = f"{way} classes × {per_class} queries, d = {dim}"
        rows.append(Row(part, slug, "proto_triplet_loss", "pytorch-metric-learning", size, ours, peer, ours / peer))
    ours, dense = in_fresh_process(_icnn, 20, 20, 64, 10)
    rows.append(Row(part, slug, "icnn_loss", "dense autograd", "20 classes × 20, d = 64", ours, dense, ours / dense))
    numbers = (1000, 2000, 4000, 8000)
    times, memories = zip(*(in_fresh_process(_icnn_alone, number) for number in numbers), strict=True)
    span = f"n = {numbers[0]} … {numbers[-1]}, d = 64, K = 20"
    slopes = [
        Slope("icnn_loss", "time", span, exponent(numbers, times), "2: every pair is compared"),
        Slope("icnn_loss", "memory", span, exponent(numbers, memories), "at most 1: no n × n matrix is kept"),
    ]
    return rows, slopes
