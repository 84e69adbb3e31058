"""The loss against pytorch-metric-learning's, its share of a training step, and slopes of time and memory over the batch."""

import torch
import torch.nn.functional as F
from harness import Row, Slope, bar, exponent, in_fresh_process, peak_memory, timed
from pytorch_metric_learning.losses import ThresholdConsistentMarginLoss

from lossbook.similarity.tcm import operating_characteristics, supervised_contrastive_loss, tcm_loss


def _batch(rows, dim=128):
    """Four samples a class, and embeddings with both kinds of hard pairs."""
    labels = torch.arange(rows // 4).repeat(4)
    centers = torch.randn(rows // 4, dim) + 2 * torch.randn(1, dim)
    return (centers[labels] + 0.5 * torch.randn(rows, dim)).requires_grad_(), labels


def _step(loss, x, labels):
    x.grad = None
    value = loss(x, labels)
    value.backward()
    return value.detach(), x.grad


def _loss(rows, repeats):
    x, labels = _batch(rows)
    peer = ThresholdConsistentMarginLoss()
    (ours, grad), (theirs, peer_grad) = _step(tcm_loss, x, labels), _step(peer, x, labels)
    assert ours > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, peer_grad, rtol=1e-3, atol=1e-6)
    return timed(lambda: _step(tcm_loss, x, labels), lambda: _step(peer, x, labels), repeats=repeats)


def _memory(rows, peer):
    loss = ThresholdConsistentMarginLoss() if peer else tcm_loss
    _step(loss, *_batch(16))  # what the first call of each kernel allocates for good
    x, labels = _batch(rows)
    return peak_memory(lambda: _step(loss, x, labels))


def _time(rows):
    x, labels = _batch(rows)
    return timed(lambda: _step(tcm_loss, x, labels), repeats=3)[0]


def _training(rows, repeats):
    """A step of a small encoder with the base loss and TCM, and with the base loss alone."""
    x, labels = torch.randn(rows, 784), torch.arange(rows // 4).repeat(4)
    model = torch.nn.Sequential(torch.nn.Linear(784, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 128))
    base = supervised_contrastive_loss

    def step(loss):
        model.zero_grad()
        loss(model(x)).backward()

    both = lambda z: base(z, labels) + tcm_loss(z, labels)
    return timed(lambda: step(both), lambda: step(lambda z: base(z, labels)), repeats=repeats)


def _characteristics(rows, repeats):
    """Counting by index, against comparing every distance with every threshold."""
    x, labels = _batch(rows, dim=32)
    x, grid = x.detach(), torch.linspace(0.2, 1.5, 50, dtype=torch.float64)

    def dense():
        z = F.normalize(x.double(), dim=1)
        distance = (2 - 2 * z @ z.T).clamp(min=0).sqrt()
        one = F.one_hot(labels).double()
        own = torch.stack([(one.T @ ((distance <= t).double() @ one)).diagonal() for t in grid], dim=1)
        every = torch.stack([one.T @ (distance <= t).double().sum(1) for t in grid], dim=1)
        size = one.sum(0)[:, None]
        return (own - size) / (size * (size - 1)), 1 - (every - own) / (size * (rows - size))

    for ours, theirs in zip(operating_characteristics(x, labels, grid)[:2], dense(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    return timed(lambda: operating_characteristics(x, labels, grid), dense, repeats=repeats)


def run() -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    part, slug, rows = "similarity", "tcm", []
    for batch in (128, 512):
        ours, peer = in_fresh_process(_loss, batch, 3)
        memory = [in_fresh_process(_memory, batch, which) for which in (False, True)]
        note = bar(ours / peer, 1, "ratio") if batch == 512 else ""
        row = Row(part, slug, "tcm_loss", "pytorch-metric-learning", f"B = {batch}", ours, peer, ours / peer, *memory)
        rows.append(Row(**{**row.__dict__, "note": note}))
    for batch in (128, 1024):
        both, base = in_fresh_process(_training, batch, 5)
        rows.append(
            Row(part, slug, "supervised contrastive + TCM", "without TCM", f"B = {batch}, MLP", both, base, both / base)
        )
    ours, dense = in_fresh_process(_characteristics, 2000, 2)
    rows.append(
        Row(
            part,
            slug,
            "operating_characteristics",
            "every threshold",
            "n = 2000, 50 thresholds",
            ours,
            dense,
            ours / dense,
        )
    )
    sizes = (2048, 4096, 8192)
    times, memory = ([in_fresh_process(f, n, *rest) for n in sizes] for f, rest in ((_time, ()), (_memory, (False,))))
    what = f"B = {sizes[0]} to {sizes[-1]}"
    return rows, [
        Slope("tcm_loss", "time", what, exponent(sizes, times), "2: all pairs of the batch"),
        Slope("tcm_loss", "memory", what, exponent(sizes, memory), "at most 1: chunks of constant size"),
    ]
