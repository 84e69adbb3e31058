"""Weights against the paper's formula in plain torch, a reweighted step against an ordinary one; slope in the batch size."""

import torch
import torch.nn.functional as F
from harness import Row, Slope, bar, exponent, in_fresh_process, timed

from lossbook import lab
from lossbook.language import reweighting as R

PART, SLUG = "language", "reweighting"


def _as_written(losses, r):
    """LinUpper's weights by the two fractions of the paper, without any check."""
    low, high = losses.min(), losses.max()
    width = (high - low).clamp(min=1e-6)
    h = 2 * losses / width - (high + low) / width
    return torch.softmax((h + 1).clamp(max=1) / r, dim=0)


def _weights(count, repeats):
    """Milliseconds of the weights of `count` losses: ours, as written."""
    losses = torch.rand(count)
    ours, peer = (lambda: R.sample_weights(losses, r=0.4)), (lambda: _as_written(losses, 0.4))
    torch.testing.assert_close(ours(), peer(), rtol=1e-4, atol=1e-7)
    return timed(ours, peer, repeats=repeats)


def _step(dim, depth, batch, length, repeats):
    """Milliseconds of forward and backward: reweighted, uniform by cross entropy over all tokens, and of the weights alone."""
    vocabulary = 8192
    model = lab.Transformer(vocabulary, dim=dim, depth=depth, heads=4, context=length)
    tokens = torch.randint(vocabulary, (batch, length))

    def reweighted(r):
        model.zero_grad()
        losses, _ = R.sequence_losses(model.hidden(tokens), model.output_weight, tokens)
        R.reweighted_loss(losses, r=r).backward()
        return model.embedding.weight.grad

    def ordinary():
        model.zero_grad()
        logits = model(tokens)[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        return model.embedding.weight.grad

    torch.testing.assert_close(reweighted(float("inf")).clone(), ordinary().clone(), rtol=1e-3, atol=1e-6)
    losses = torch.rand(batch)
    return timed(lambda: reweighted(0.4), ordinary, lambda: R.sample_weights(losses, r=0.4), repeats=repeats)


def _accumulated(dim, parts, repeats):
    """Milliseconds of a step in micro-batches: with a first pass for the weights, and without (uniform)."""
    model = lab.Transformer(512, dim=dim, depth=2, heads=4, context=64)
    tokens = torch.randint(512, (8 * parts, 64)).split(8)
    losses_of = lambda part: R.sequence_losses(model.hidden(part), model.output_weight, part)[0]

    def two_passes():
        model.zero_grad()
        with torch.no_grad():
            weights = R.sample_weights(torch.cat([losses_of(part) for part in tokens]), r=0.4).split(8)
        for part, w in zip(tokens, weights, strict=True):
            R.reweighted_loss(losses_of(part), weights=w).backward()

    def uniform():
        model.zero_grad()
        for part in tokens:
            (losses_of(part).mean() / parts).backward()

    return timed(two_passes, uniform, repeats=repeats)


def run(small: bool = False) -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    rows, slopes = [], []
    repeats = 3 if small else 30
    for count in (2**8,) if small else (2**8, 2**12, 2**16):
        ours, peer = in_fresh_process(_weights, count, repeats)
        rows.append(
            Row(PART, SLUG, "sample_weights", "the formula in plain torch", f"{count} losses", ours, peer, ours / peer)
        )
    shapes = ((32, 1, 4, 16, 2),) if small else ((64, 2, 32, 128, 7), (256, 4, 16, 128, 5))
    for dim, depth, batch, length, repeats in shapes:
        ours, peer, weights = in_fresh_process(_step, dim, depth, batch, length, repeats)
        size = f"transformer {depth} × {dim}, batch {batch} × {length}, V = 8192"
        rows.append(Row(PART, SLUG, "reweighted step", "cross entropy of all logits", size, ours, peer, ours / peer))
        rows.append(
            Row(PART, SLUG, "sample_weights", "the reweighted step", size, weights, ours, weights / ours,
                note=bar(weights / ours, 0.01, "share of the step"))
        )  # fmt: skip
    ours, peer = in_fresh_process(_accumulated, 32 if small else 64, 4, 2 if small else 9)
    rows.append(
        Row(PART, SLUG, "a step in 4 micro-batches", "the same with uniform weights", "transformer 2 × 64, 4 × 8 × 64", ours, peer, ours / peer,
            note="a second forward pass")
    )  # fmt: skip
    counts = (2**14, 2**16) if small else (2**20, 2**21, 2**22, 2**23)
    times = [in_fresh_process(_weights, count, 3 if small else 7)[0] for count in counts]
    slopes.append(
        Slope("sample_weights", "time", f"M = {counts[0]} to {counts[-1]}", exponent(counts, times), "1 (O(M))")
    )
    return rows, slopes
