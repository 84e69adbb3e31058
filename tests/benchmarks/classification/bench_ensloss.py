"""EnsLoss against the losses that PyTorch has, for one logit a sample and for a thousand classes; its cost over the batch size."""

import shutil

import torch
import torch.nn.functional as F
from harness import Row, Slope, bar, exponent, in_fresh_process, timed

from lossbook.classification.ensloss import ens_loss, margin_loss, signed_margins

KNOTS = (-1.0, 3.0, 16)


def _step(loss, logits, target):
    logits.grad = None
    loss(logits, target).backward()
    return logits.grad


def _sorted_slopes(logits, target, draws):
    """The gradient of the method, written out in torch: sort, clip, divide, put back."""
    margins = torch.where(target == 1, logits, -logits).detach().flatten()
    slopes, order = (-draws.flatten().exp()).clamp(min=-1).sort().values, margins.argsort()
    slopes = slopes / margins[order].clamp(min=1) - 1e-6
    return torch.empty_like(slopes).index_put_((order,), slopes).view_as(logits) * (2 * target - 1)


def _check(ours, logits, target, draws):
    """Equal where no other margin is the same: equal margins, of which float32 has some, share their slopes in ours."""
    _, place, counts = torch.where(target == 1, logits, -logits).unique(return_inverse=True, return_counts=True)
    alone = counts[place] == 1
    torch.testing.assert_close(ours[alone], _sorted_slopes(logits, target, draws)[alone], rtol=1e-4, atol=1e-6)


def _binary(batch, repeats):
    logits, target = torch.randn(batch, requires_grad=True), torch.randint(2, (batch,)).float()
    draws = torch.randn(batch)
    ours = _step(lambda x, y: ens_loss(x, y, draws=draws, reduction="sum"), logits, target).clone()
    _check(ours, logits, target, draws)
    return timed(
        lambda: _step(ens_loss, logits, target),
        lambda: _step(F.binary_cross_entropy_with_logits, logits, target),
        repeats=repeats,
    )


def _classes(rows, classes, repeats):
    logits, target = torch.randn(rows, classes, requires_grad=True), torch.randint(classes, (rows,))
    one_hot = F.one_hot(target, classes).float()
    draws = torch.randn(rows, classes)
    ours = _step(lambda x, y: ens_loss(x, y, draws=draws, reduction="sum"), logits, target).clone()
    _check(ours, logits, one_hot, draws)
    logistic = lambda x, y: margin_loss(signed_margins(x, y))
    binary = lambda x, y: F.binary_cross_entropy_with_logits(x, one_hot, reduction="sum") / len(x)
    torch.testing.assert_close(logistic(logits, target), binary(logits, target), rtol=1e-4, atol=0)
    at_knots = lambda x, y, draws=None: ens_loss(x, y, knots=KNOTS, draws=draws)
    losses = [ens_loss, at_knots, logistic, binary, F.cross_entropy]
    if shutil.which("g++"):
        losses.append(torch.compile(at_knots))
        few = draws[0, : KNOTS[2]]
        ours, fused = (_step(lambda x, y, f=f: f(x, y, few), logits, target).clone() for f in (at_knots, losses[-1]))
        torch.testing.assert_close(fused, ours, rtol=1e-4, atol=1e-9)
    return timed(*(lambda loss=loss: _step(loss, logits, target) for loss in losses), repeats=repeats)


def run() -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    part, slug, rows, sizes, times = "classification", "ensloss", [], [], []
    for batch, repeats in ((128, 300), (4096, 100), (2**18, 10), (2**20, 5)):
        ours, peer = in_fresh_process(_binary, batch, repeats)
        rows.append(
            Row(part, slug, "ens_loss", "binary_cross_entropy_with_logits", f"B = {batch}", ours, peer, ours / peer)
        )
        if batch >= 2**18:
            sizes.append(batch)
            times.append(ours)
    ours, at_knots, logistic, binary, softmax, *compiled = in_fresh_process(_classes, 4096, 1000, 15)
    size = "4096 × 1000"
    variants = [("ens_loss", ours, "sorts 4.1 million margins; "), ("ens_loss, knots", at_knots, "")]
    variants += [("ens_loss, knots, compiled", time, "") for time in compiled]
    for name, mine, note in variants:
        for peer, time in (("binary_cross_entropy_with_logits", binary), ("cross_entropy", softmax)):
            note_peer = note + bar(mine / time, 3, "ratio")
            rows.append(Row(part, slug, name, peer, size, mine, time, mine / time, note=note_peer))
    name, peer = "margin_loss, one-versus-rest", "binary_cross_entropy_with_logits"
    rows.append(Row(part, slug, name, peer, size, logistic, binary, logistic / binary))
    sizes.append(4096 * 1000)
    times.append(ours)
    slope = Slope(
        "ens_loss", "time over logits", "262 thousand to 4.1 million", exponent(sizes, times), "N log N: near 1"
    )
    return rows, [slope]
