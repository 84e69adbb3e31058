"""iSogCLR against LibAUC's ``GCLoss_v1`` (two views) and ``GCLoss_v2`` (image and text): first equal trajectories, then time and memory.

LibAUC's dependencies are heavy and its losses need none of them: ``pip install --no-deps libauc``. Without it this file measures ours alone.
"""

import contextlib
import importlib.util
import io

import torch
import torch.nn.functional as F
from harness import Row, Slope, exponent, in_fresh_process, peak_memory, timed

from lossbook.similarity.isogclr import BimodalISogCLRLoss, ISogCLRLoss

PEER = importlib.util.find_spec("libauc") is not None
DIM, NUM_SAMPLES = 128, 50_000
SHARED = dict(gamma=0.6, eta=0.01, beta=0.9)
UNIMODAL = dict(rho=0.3, tau_min=0.05, tau_max=0.7)
BIMODAL = dict(rho=2.0, tau_min=0.005, tau_max=0.05)


def _peer(kind, num_samples):
    from libauc.losses import contrastive

    name, options, tau = ("GCLoss_v1", UNIMODAL, 0.1) if kind is ISogCLRLoss else ("GCLoss_v2", BIMODAL, 0.01)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints when it is made
        return getattr(contrastive, name)(N=num_samples, tau=tau, enable_isogclr=True, **options, **SHARED)


def _ours(kind, num_samples):
    options = UNIMODAL if kind is ISogCLRLoss else BIMODAL
    return kind(num_samples, grad_clip=None, **options, **SHARED)


def _assert_equal_trajectories(kind, num_samples=48, batch=12, epochs=4):
    """Train free embeddings by SGD with both; conventions coincide where each epoch visits each sample once."""
    generator = torch.Generator().manual_seed(0)
    start = F.normalize(torch.randn(2, num_samples, 8, generator=generator), dim=2)
    ours, peer = _ours(kind, num_samples), _peer(kind, num_samples)
    x, y = start.clone().requires_grad_(), start.clone().requires_grad_()
    scale = 1 if kind is ISogCLRLoss else 2 / (batch - 1)  # GCLoss_v2 sums over negatives and halves over directions
    for epoch in range(epochs):
        with contextlib.redirect_stdout(io.StringIO()):
            peer.adjust_gamma(epoch)
        for index in torch.randperm(num_samples, generator=generator).split(batch):
            (gradient,) = torch.autograd.grad(ours(x[0, index], x[1, index], index), x)
            views = (F.normalize(y[view, index], dim=1) for view in (0, 1))  # GCLoss_v2 takes unit rows
            loss = peer(*views, index)
            (peer_gradient,) = torch.autograd.grad(scale * (loss[0] if isinstance(loss, tuple) else loss), y)
            torch.testing.assert_close(gradient, peer_gradient, rtol=1e-3, atol=1e-5)
            x.data -= gradient
            y.data -= peer_gradient
    torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
    if kind is ISogCLRLoss:
        inner, temperature = peer.u.log(), peer.learnable_tau
    else:
        inner = torch.stack([peer.u1.log() + peer.b1, peer.u2.log() + peer.b2])
        temperature = torch.stack([peer.learnable_tau_img, peer.learnable_tau_txt])
    torch.testing.assert_close(ours.log_inner, inner.squeeze(-1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.temperature, temperature.squeeze(-1), rtol=1e-3, atol=1e-5)
    assert ours.temperature.std() > 1e-3  # they did move, each its own way


def _batch(size):
    views = [F.normalize(torch.randn(size, DIM), dim=1).requires_grad_() for _ in range(2)]
    return *views, torch.randperm(NUM_SAMPLES)[:size]


def _step(loss_fn, first, second, index):
    first.grad = second.grad = None
    loss = loss_fn(first, second, index)
    (loss[0] if isinstance(loss, tuple) else loss).backward()


def _time(kind, size, repeats):
    batch = _batch(size)
    loss_fns = [_ours(kind, NUM_SAMPLES)] + ([_peer(kind, NUM_SAMPLES)] if PEER else [])
    return timed(*(lambda loss_fn=loss_fn: _step(loss_fn, *batch) for loss_fn in loss_fns), repeats=repeats)


def _time_alone(size):
    loss_fn, batch = _ours(ISogCLRLoss, NUM_SAMPLES), _batch(size)
    return timed(lambda: _step(loss_fn, *batch), repeats=1)[0]


def _memory(make, kind, size):
    loss_fn, batch = make(kind, NUM_SAMPLES), _batch(size)
    _step(make(kind, NUM_SAMPLES), *_batch(8))  # what the first call of each kernel allocates for good
    return peak_memory(lambda: _step(loss_fn, *batch))


def run() -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    part, slug, rows, slopes = "similarity", "isogclr", [], []
    if not PEER:
        print("similarity/isogclr: LibAUC is not installed (pip install --no-deps libauc): measuring ours alone")
    for kind, name in ((ISogCLRLoss, "GCLoss_v1"), (BimodalISogCLRLoss, "GCLoss_v2")):
        if PEER:
            in_fresh_process(_assert_equal_trajectories, kind)
        for size, repeats in ((128, 30), (512, 10), (2048, 3)):
            ours, *peer = in_fresh_process(_time, kind, size, repeats)
            memory = in_fresh_process(_memory, _ours, kind, size)
            peer_memory = in_fresh_process(_memory, _peer, kind, size) if PEER else None
            rows.append(
                Row(
                    part,
                    slug,
                    kind.__name__,
                    f"LibAUC {name}" if PEER else "",
                    f"B = {size}",
                    ours,
                    peer[0] if peer else None,
                    ours / peer[0] if peer else None,
                    memory,
                    peer_memory,
                )
            )
    sizes = (2048, 4096, 8192)
    times = [in_fresh_process(_time_alone, size) for size in sizes]
    memories = [in_fresh_process(_memory, _ours, ISogCLRLoss, size) for size in sizes]
    span = f"B = {sizes[0]} to {sizes[-1]}"
    slopes.append(Slope("ISogCLRLoss", "time", span, exponent(sizes, times), "2: every pair is looked at"))
    slopes.append(Slope("ISogCLRLoss", "memory", span, exponent(sizes, memories), "at most 1: no B × B matrix"))
    return rows, slopes
