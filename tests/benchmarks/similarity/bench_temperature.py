"""NT-Xent against pytorch-metric-learning's, and the hard loss against the ordinary one."""

import torch
from harness import Row, Slope, bar, in_fresh_process, timed
from pytorch_metric_learning.losses import NTXentLoss

from lossbook.similarity.temperature import contrastive_loss, hard_contrastive_loss, nt_xent_loss

PEER = NTXentLoss(temperature=0.5)


def _ours(view1, view2):
    view1.grad = view2.grad = None
    loss = nt_xent_loss(view1, view2, temperature=0.5)
    loss.backward()
    return loss.detach()


def _peer(view1, view2):
    view1.grad = view2.grad = None
    labels = torch.arange(len(view1)).repeat(2)
    loss = PEER(torch.cat([view1, view2]), labels)
    loss.backward()
    return loss.detach()


def _nt_xent(batch, repeats):
    views = [torch.randn(batch, 128, requires_grad=True) for _ in range(2)]
    torch.testing.assert_close(_ours(*views), _peer(*views), rtol=1e-5, atol=1e-5)
    return timed(lambda: _ours(*views), lambda: _peer(*views), repeats=repeats)


def _hard(rows, negatives, repeats):
    pairs = torch.rand(rows, requires_grad=True), torch.rand(rows, negatives, requires_grad=True)

    def step(loss, **options):
        for x in pairs:
            x.grad = None
        loss(*pairs, temperature=1.0, **options).backward()

    return timed(lambda: step(hard_contrastive_loss, alpha=0.0819), lambda: step(contrastive_loss), repeats=repeats)


def run() -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    part, slug, rows = "similarity", "temperature", []
    for batch, repeats in ((32, 50), (128, 30), (256, 10)):
        ours, peer = in_fresh_process(_nt_xent, batch, repeats)
        note = bar(ours / peer, 1 / 3, "ratio") if batch == 128 else ""
        rows.append(
            Row(
                part,
                slug,
                "nt_xent_loss",
                "pytorch-metric-learning",
                f"B = {batch}",
                ours,
                peer,
                ours / peer,
                note=note,
            )
        )
    ours, ordinary = in_fresh_process(_hard, 128, 4095, 20)
    size = "128 anchors × 4095 negatives"
    rows.append(Row(part, slug, "hard_contrastive_loss", "contrastive_loss", size, ours, ordinary, ours / ordinary))
    return rows, []
