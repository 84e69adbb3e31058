"""Spherical losses against cross-entropy; the factored layer against a dense one and adaptive softmax, up to a million classes."""

import time

import torch
import torch.nn.functional as F
from harness import Row, Slope, bar, exponent, in_fresh_process, peak_memory, timed
from torch import nn

from lossbook.classification import z_loss as Z

WIDTH, BATCH = 127, 128  # and the constant feature: d = 128
SIZES = (10**3, 10**4, 10**5, 10**6)
LOSSES = {
    "z_loss": lambda o, c: Z.z_loss(o, c),
    "squared_error": lambda o, c: Z.squared_error_from_statistics(*Z.spherical_statistics(o, c), o.shape[1]).mean(),
    "taylor_softmax": lambda o, c: Z.taylor_softmax_from_statistics(*Z.spherical_statistics(o, c), o.shape[1]).mean(),
    "spherical_softmax": lambda o, c: Z.spherical_softmax_from_statistics(
        *Z.spherical_statistics(o, c), o.shape[1]
    ).mean(),
}


def _assert_equal_outputs():
    """Factored steps against dense SGD by autograd, with refactorizations on the way."""
    layer = Z.SphericalOutput(WIDTH, 2000, dtype=torch.float64, tolerance=1e-14)
    weight = layer.weight.requires_grad_()
    for hidden, target in _batches(2000, 60):
        Z.z_loss_from_statistics(*layer(hidden, target), 2000).mean().backward()
        layer.step(10.0)
        weight.grad = None
        Z.z_loss(F.pad(hidden.detach().double(), (0, 1), value=1.0) @ weight.T, target).backward()
        weight.data -= 10 * weight.grad
    torch.testing.assert_close(layer.weight, weight.detach(), rtol=1e-8, atol=1e-10)


def _batches(classes, count):
    """Hidden vectors, and targets of a Zipf distribution."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.multinomial(
        1 / torch.arange(1.0, classes + 1), count * BATCH, replacement=True, generator=generator
    )
    hidden = torch.randn(count, BATCH, WIDTH, generator=generator)
    return [(h.requires_grad_(), c) for h, c in zip(hidden, targets.view(count, BATCH), strict=True)]


def _in_turn(classes, step):
    """A function without arguments that takes one batch after the other."""
    batches = _batches(classes, 16)
    turn = iter(range(10**9))
    return lambda: step(*batches[next(turn) % 16])


def _factored(classes):
    layer = Z.SphericalOutput(WIDTH, classes)

    def step(hidden, target):
        hidden.grad = None
        Z.z_loss_from_statistics(*layer(hidden, target), classes).mean().backward()
        layer.step(1.0)

    return _in_turn(classes, step), layer


def _dense(classes):
    layer = nn.Linear(WIDTH, classes)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)

    def step(hidden, target):
        hidden.grad = None
        optimizer.zero_grad()
        F.cross_entropy(layer(hidden), target).backward()
        optimizer.step()

    return _in_turn(classes, step)


def _adaptive(classes, fractions):
    layer = nn.AdaptiveLogSoftmaxWithLoss(WIDTH, classes, [classes // f for f in fractions])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)

    def step(hidden, target):
        hidden.grad = None
        optimizer.zero_grad()
        layer(hidden, target).loss.backward()
        optimizer.step()

    return _in_turn(classes, step)


def _time_losses(name):
    logits, target = torch.randn(4096, 1000, requires_grad=True), torch.randint(1000, (4096,))

    def step(loss):
        logits.grad = None
        loss(logits, target).backward()

    return timed(lambda: step(LOSSES[name]), lambda: step(F.cross_entropy), repeats=20)


def _time_sizes():
    """Median milliseconds of a factored step at each size, the sizes taking turns; then a refactorization of each."""
    pairs = [_factored(classes) for classes in SIZES]
    steps = timed(*[step for step, _ in pairs], repeats=60)
    assert not any(layer.refactorizations for _, layer in pairs)  # these are steps between refactorizations
    return steps, [timed(layer.refactor, repeats=3)[0] for _, layer in pairs]


def _time_dense(classes, repeats):
    return timed(_dense(classes), repeats=repeats)[0]


def _time_adaptive(classes, repeats):
    """The fastest of three pairs of cutoffs."""
    steps = [_adaptive(classes, fractions) for fractions in ((100, 10), (20, 5), (200, 20))]
    return min(timed(*steps, repeats=repeats))


def _run(classes, steps=600):
    """Milliseconds a step of a training run in which the layer refactors by itself, and its refactorizations."""
    layer = Z.SphericalOutput(WIDTH, classes)
    centers = torch.randn(2000, WIDTH)
    batches = _batches(classes, 16)
    start = time.perf_counter()
    for step in range(steps):
        noise, target = batches[step % 16]
        hidden = torch.tanh(centers[target % 2000] + 0.5 * noise.detach()).requires_grad_()
        Z.z_loss_from_statistics(*layer(hidden, target), classes).mean().backward()
        layer.step(10.0)
    return 1e3 * (time.perf_counter() - start) / steps, [tuple(r) for r in layer.refactorizations]


def _memory(classes, dense):
    """Peak growth while a layer is made and two steps are taken; V or W itself is in it."""

    def two_steps():
        step = _dense(classes) if dense else _factored(classes)[0]
        step()
        step()

    return peak_memory(two_steps)


def run() -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    part, slug = "classification", "z_loss"
    in_fresh_process(_assert_equal_outputs)
    rows = []
    for name in LOSSES:
        ours, peer = in_fresh_process(_time_losses, name)
        note = bar(ours / peer, 3, "ratio")
        rows.append(Row(part, slug, name, "F.cross_entropy", "(4096, 1000)", ours, peer, ours / peer, note=note))

    steps, refactors = in_fresh_process(_time_sizes)
    flat = steps[-1] / steps[0]
    rows.append(
        Row(part, slug, "factored step", "the same, D = 10³", "D = 10⁶, d = 128, batch 128", steps[-1], steps[0], flat,
            note=bar(flat, 2, "ratio"))
    )  # fmt: skip
    for classes, refactor in zip(SIZES[-2:], refactors[-2:], strict=True):
        rows.append(Row(part, slug, "refactorization", "", f"D = {classes:,}", refactor))

    amortized, found = in_fresh_process(_run, 10**5)
    period = min([r[0] for r in found] + [600])
    amortized += refactors[2] / period  # one more, as the run may have had none
    dense = {n: in_fresh_process(_time_dense, n, 40 if n < 10**5 else 5) for n in SIZES[:3]}
    memory = [in_fresh_process(_memory, 10**5, which) for which in (False, True)]
    size = f"D = 10⁵; {len(found)} refactorizations in 600 steps, and one more"
    ratio = amortized / dense[10**5]
    rows.append(
        Row(part, slug, "factored step with refactorizations", "dense, cross-entropy, SGD", size, amortized, dense[10**5], ratio,
            *memory, note=bar(ratio, 0.1, "ratio"))
    )  # fmt: skip
    for classes, repeats in ((10**5, 20), (10**6, 4)):
        adaptive = in_fresh_process(_time_adaptive, classes, repeats)
        place = SIZES.index(classes)
        ours = steps[place] + refactors[place] / period
        size = f"D = {classes:,}, a refactorization every {period} steps"
        rows.append(Row(part, slug, "factored step with refactorizations", "AdaptiveLogSoftmaxWithLoss", size, ours, adaptive, ours / adaptive))  # fmt: skip

    span = f"D = {SIZES[0]} to {SIZES[-1]}"
    memories = [in_fresh_process(_memory, n, False) for n in SIZES[-2:]]
    slopes = [
        Slope("factored step", "time", span, exponent(SIZES, steps), "0: no more with more classes"),
        Slope("refactorization", "time", f"D = {SIZES[1]} to {SIZES[-1]}", exponent(SIZES[1:], refactors[1:]), "1: O(D d²)"),
        Slope("dense step", "time", f"D = {SIZES[0]} to {SIZES[2]}", exponent(list(dense), list(dense.values())), "1: O(m D d)"),
        Slope("factored layer", "memory", f"D = {SIZES[-2]} to {SIZES[-1]}", exponent(SIZES[-2:], memories), "1: V"),
    ]  # fmt: skip
    return rows, slopes
