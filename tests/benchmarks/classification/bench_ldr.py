"""LDR-KL, ALDR-KL and its one-step form against cross-entropy; time against the number of classes."""

import math
import statistics

import torch
import torch.nn.functional as F
from harness import Row, Slope, bar, exponent, in_fresh_process, timed

from lossbook.classification.ldr import ALDRKLLoss, aldr_kl_loss, aldr_temperature, ldr_kl_loss

ROWS, CLASSES = 4096, 1000
TEMPERATURE, MARGIN = 2.0, 0.1


def _batch(rows, classes):
    return torch.randn(rows, classes, requires_grad=True), torch.randint(classes, (rows,))


def _step(loss, logits):
    logits.grad = None
    loss().backward()


def _check(logits, target):
    """The losses equal their definitions, by plain formulas in double precision."""
    torch.testing.assert_close(
        ldr_kl_loss(logits, target) + math.log(CLASSES), F.cross_entropy(logits, target), rtol=0, atol=1e-5
    )
    with torch.no_grad():
        v = (logits - logits.gather(1, target[:, None])).double() + MARGIN
        v.scatter_(1, target[:, None], 0.0)

        def tempered(lam):
            return lam * (torch.logsumexp(v / lam[:, None], 1) - math.log(CLASSES))

        pull = 2 * math.log(CLASSES)
        expected = tempered(torch.full((ROWS,), TEMPERATURE, dtype=torch.float64)).mean().float()
        torch.testing.assert_close(
            ldr_kl_loss(logits, target, lam=TEMPERATURE, margin=MARGIN), expected, rtol=0, atol=1e-5
        )
        lam = torch.ones(ROWS, dtype=torch.float64)
        for _ in range(30):
            log_p = torch.log_softmax(v / lam[:, None], 1)
            lam = 1 - ((log_p.exp() * log_p).sum(1) + math.log(CLASSES)) / pull
        torch.testing.assert_close(aldr_temperature(logits, target, margin=MARGIN), lam.float(), rtol=0, atol=1e-5)
        expected = (tempered(lam) - pull / 2 * (lam - 1) ** 2).mean().float()
        torch.testing.assert_close(aldr_kl_loss(logits, target, margin=MARGIN), expected, rtol=0, atol=1e-5)


def _measure(repeats):
    logits, target = _batch(ROWS, CLASSES)
    _check(logits, target)
    index = torch.arange(ROWS)
    plain = ALDRKLLoss(ROWS, margin=MARGIN, normalization=None, margin_in_update=True, smoothing=0.0)
    authors = ALDRKLLoss(ROWS, margin=MARGIN)
    losses = [
        lambda: F.cross_entropy(logits, target),
        lambda: ldr_kl_loss(logits, target, lam=TEMPERATURE, margin=MARGIN),
        lambda: aldr_kl_loss(logits, target, margin=MARGIN),
        lambda: plain(logits, target, index),
        lambda: authors(logits, target, index),
    ]
    return timed(*(lambda loss=loss: _step(loss, logits) for loss in losses), repeats=repeats)


def _scaling(loss, classes, repeats):
    logits, target = _batch(1024, classes)
    return timed(lambda: _step(lambda: loss(logits, target, margin=MARGIN), logits), repeats=repeats)[0]


def run() -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    processes = [in_fresh_process(_measure, 15) for _ in range(5)]  # where memory lies moves a time by half
    cross_entropy, *ours = (statistics.median(times) for times in zip(*processes, strict=True))
    size = f"B = {ROWS}, K = {CLASSES}, forward and backward"
    names = (
        ("ldr_kl_loss", 3),
        ("aldr_kl_loss, temperature solved", 6),
        ("ALDRKLLoss, one step", 3),
        ("ALDRKLLoss, normalized and smoothed as the authors'", None),
    )
    rows = [
        Row(
            "classification",
            "ldr",
            name,
            "torch cross_entropy",
            size,
            time,
            cross_entropy,
            time / cross_entropy,
            note=bar(time / cross_entropy, limit, "ratio") if limit else "",
        )
        for (name, limit), time in zip(names, ours, strict=True)
    ]
    classes = (500, 1000, 2000, 4000)
    slopes = [
        Slope(
            f"{loss.__name__}, B = 1024",
            "time",
            f"K = {classes[0]} to {classes[-1]}",
            exponent(classes, [in_fresh_process(_scaling, loss, k, 9) for k in classes]),
            "O(BK): 1",
        )
        for loss in (ldr_kl_loss, aldr_kl_loss)
    ]
    return rows, slopes
