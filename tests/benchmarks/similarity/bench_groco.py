"""Relaxed sorting networks against diffsort's, the loss against its form through the permutation, and slopes over n."""

import torch
from diffsort import DiffSortNet
from harness import Row, Slope, bar, exponent, in_fresh_process, peak_memory, timed

from lossbook.similarity.groco import (
    bitonic_sort,
    groco_multi_view_loss,
    group_log_probabilities,
    group_probabilities,
    odd_even_sort,
)
from lossbook.similarity.temperature import nt_xent_loss

SORTS = {"odd_even": odd_even_sort, "bitonic": bitonic_sort}


def _step(sort, x, weights):
    x.grad = None
    scores, permutation = sort(x)
    ((permutation * weights).sum() + scores.square().sum()).backward()
    return scores.detach(), permutation.detach(), x.grad


def _sort(network, rows, n, repeats):
    x, weights = torch.randn(rows, n, requires_grad=True), torch.randn(rows, n, n)
    peer = DiffSortNet(network, n, steepness=1.0, distribution="cauchy")
    for dtype, off in ((torch.float32, 1e-6), (torch.float64, 1e-9)):
        inputs = x.detach().to(dtype).requires_grad_(), weights.to(dtype)
        *ours, grad = _step(SORTS[network], *inputs)
        *theirs, peer_grad = _step(peer, *inputs)
        torch.testing.assert_close(ours, theirs, rtol=off, atol=off)
        torch.testing.assert_close(grad, peer_grad, rtol=10 * off, atol=10 * off)
    return timed(lambda: _step(SORTS[network], x, weights), lambda: _step(peer, x, weights), repeats=repeats)


def _adjoint(x):
    x.grad = None
    log = group_log_probabilities(x, x.shape[1] - 1)
    loss = -torch.cat([log[:, :-1, 0], log[:, -1:, 1]], dim=1).mean()
    loss.backward()
    return loss.detach()


def _through_permutation(x):
    x.grad = None
    negative = group_probabilities(odd_even_sort(x)[1], x.shape[1] - 1)
    loss = -torch.cat([negative[:, :-1], 1 - negative[:, -1:]], dim=1).log().mean()
    loss.backward()
    return loss.detach()


def _groups(rows, n, repeats):
    x = torch.rand(rows, n, requires_grad=True)
    torch.testing.assert_close(_adjoint(x), _through_permutation(x), rtol=1e-5, atol=1e-5)
    return timed(lambda: _adjoint(x), lambda: _through_permutation(x), repeats=repeats)


def _groups_time(rows, n, step):
    x = torch.rand(rows, n, requires_grad=True)
    return timed(lambda: step(x), repeats=3)[0]


def _groups_memory(rows, n, step):
    step(torch.rand(2, 4, requires_grad=True))  # what the first call of each kernel allocates for good
    x = torch.rand(rows, n, requires_grad=True)
    return peak_memory(lambda: step(x))


def _loss(batch, repeats):
    views = torch.randn(2, batch, 128, requires_grad=True)

    def step(loss):
        views.grad = None
        loss(views).backward()

    return timed(lambda: step(groco_multi_view_loss), lambda: step(lambda v: nt_xent_loss(*v)), repeats=repeats)


def run() -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    part, slug, rows = "similarity", "groco", []
    for network, sort in SORTS.items():
        for n in (8, 32):
            ours, peer = in_fresh_process(_sort, network, 256, n, 10)
            note = bar(ours / peer, 1, "ratio") if n == 32 else ""
            rows.append(Row(part, slug, sort.__name__, "diffsort", f"256 × {n}", ours, peer, ours / peer, note=note))
    for n in (11, 32, 64):
        ours, matrix = in_fresh_process(_groups, 256, n, 10)
        memory = [in_fresh_process(_groups_memory, 256, n, step) for step in (_adjoint, _through_permutation)]
        rows.append(
            Row(
                part,
                slug,
                "group_log_probabilities",
                "through the permutation",
                f"256 × {n}",
                ours,
                matrix,
                ours / matrix,
                *memory,
            )
        )
    for batch in (256, 1024):
        ours, softmax = in_fresh_process(_loss, batch, 10)
        rows.append(
            Row(part, slug, "groco_multi_view_loss", "nt_xent_loss", f"B = {batch}", ours, softmax, ours / softmax)
        )

    sizes = (64, 128, 256)
    slopes = []
    for step, name, claim in [
        (_adjoint, "group_log_probabilities", "at most 2: n layers of n wires"),
        (_through_permutation, "through the permutation", "at most 3: n layers of n × n shares"),
    ]:
        times = [in_fresh_process(_groups_time, 64, n, step) for n in sizes]
        memory = [in_fresh_process(_groups_memory, 64, n, step) for n in sizes]
        slopes.append(Slope(name, "time", f"n = {sizes[0]} to {sizes[-1]}", exponent(sizes, times), claim))
        slopes.append(Slope(name, "memory", f"n = {sizes[0]} to {sizes[-1]}", exponent(sizes, memory), claim))
    return rows, slopes
