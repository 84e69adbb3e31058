"""The comp-sum family against torch's cross-entropy: forward and backward; and its growth with the number of classes."""

import torch
import torch.nn.functional as F
from harness import Row, Slope, bar, exponent, in_fresh_process, timed

from lossbook.classification.comp_sum import comp_sum_loss

ROWS, CLASSES = 4096, 1000


def _step(loss, logits, *arguments, **options):
    logits.grad = None
    value = loss(logits, *arguments, **options)
    value.backward()
    return value.detach()


def _inputs(rows, classes):
    return torch.randn(rows, classes, requires_grad=True), torch.randint(classes, (rows,))


def _family(tau, repeats):
    logits, target = _inputs(ROWS, CLASSES)
    equal = _step(comp_sum_loss, logits, target, tau=1), logits.grad.clone()
    torch.testing.assert_close(equal, (_step(F.cross_entropy, logits, target), logits.grad.clone()))
    s = logits.detach().double().softmax(1).gather(1, target[:, None])
    wanted = (-s.log() if tau == 1 else (s ** (tau - 1) - 1) / (1 - tau)).mean().float()
    torch.testing.assert_close(_step(comp_sum_loss, logits, target, tau=tau), wanted, rtol=1e-4, atol=1e-6)
    return timed(
        lambda: _step(comp_sum_loss, logits, target, tau=tau),
        lambda: _step(F.cross_entropy, logits, target),
        repeats=repeats,
    )


def _classes(classes, repeats):
    logits, target = _inputs(ROWS, classes)
    return timed(lambda: _step(comp_sum_loss, logits, target, tau=1.7), repeats=repeats)[0]


def run() -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    part, slug, size = "classification", "comp_sum", f"({ROWS}, {CLASSES}) float32"
    rows = []
    for tau in (0, 1, 1.7, 2):
        ours, peer = in_fresh_process(_family, tau, 30)
        note = bar(ours / peer, 3, "ratio")
        name = f"comp_sum_loss, tau = {tau:g}"
        rows.append(Row(part, slug, name, "F.cross_entropy", size, ours, peer, ours / peer, note=note))
    numbers = (1000, 2000, 4000, 8000)
    times = [in_fresh_process(_classes, number, 9) for number in numbers]
    slope = Slope("comp_sum_loss", "time over classes", "1000 to 8000", exponent(numbers, times), "at most 1.2: O(Bn)")
    return rows, [slope]
