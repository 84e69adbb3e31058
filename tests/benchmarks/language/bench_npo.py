"""Answers' log-probabilities against log_softmax and gather, the exact flow against an ODE solver, the gradient flow against its 20 000 steps; slopes."""

import numpy as np
import torch
from harness import Row, Slope, bar, exponent, in_fresh_process, peak_memory, timed
from scipy.integrate import solve_ivp

from lossbook import ops
from lossbook.language import npo as N

PART, SLUG = "language", "npo"


def _answers(rows, length, vocabulary, dim=64):
    """Hidden states, output weight, tokens and the mask of the answers, the second half of each row."""
    hidden, weight = torch.randn(rows, length, dim), torch.randn(vocabulary, dim) / 8
    tokens = torch.randint(vocabulary, (rows, length))
    return hidden, weight, tokens, (torch.arange(length) >= length // 2).expand(rows, -1)


def _by_gather(logits, labels):
    """The usual way: a log-softmax of everything, then the tokens of the answer."""
    shifted, used = labels[:, 1:], labels[:, 1:] != -100
    picked = logits[:, :-1].log_softmax(-1).gather(2, shifted.where(used, 0)[:, :, None])[:, :, 0]
    return (picked * used).sum(1)


def _ways(way, data):
    """One of two ways to the gradient of the NPO loss in the hidden states."""
    hidden, weight, tokens, mask = data
    hidden = hidden.detach().requires_grad_()
    if way == "sequence_logprobs":
        logps = ops.sequence_logprobs(hidden, weight, tokens, mask)
    else:
        logps = _by_gather(hidden @ weight.T, tokens.where(mask, -100))
    N.npo_loss(logps, logps.detach() + 1, beta=0.1).backward()
    return hidden.grad


WAYS = ("sequence_logprobs", "gather")


def _losses(sizes, repeats):
    """Milliseconds of forward and backward, for both ways."""
    data = _answers(*sizes)
    torch.testing.assert_close(*(_ways(way, data) for way in WAYS), rtol=1e-3, atol=1e-6)
    return timed(*(lambda way=way: _ways(way, data) for way in WAYS), repeats=repeats)


def _memory(way, sizes):
    data = _answers(*sizes)
    return peak_memory(lambda: _ways(way, data))


def _flow(count, beta, repeats):
    """Milliseconds for margins at `count` times: ours, and an adaptive method of order 8 with a tolerance of 1e-9."""
    t = torch.logspace(-1, 3, count, dtype=torch.float64)
    pi0 = 1 / (1 + np.exp(-2.0))

    def velocity(_t, m):
        p = 1 / (1 + np.exp(-m))
        return -(1 - p) * 2 * p**beta / (p**beta + pi0**beta)

    peer = lambda: solve_ivp(velocity, (0, 1000.0), [2.0], t_eval=t.numpy(), method="DOP853", rtol=1e-9, atol=1e-9).y[0]
    ours = lambda: N.margin_flow(2.0, 1.0, t, beta=beta)
    np.testing.assert_allclose(ours(), peer(), rtol=1e-6)
    return timed(ours, peer, repeats=repeats)


def _fit(steps, repeats):
    """Milliseconds of the synthetic task's reference model: the flow, and gradient descent."""
    g = torch.Generator().manual_seed(0)
    task = N.gaussian_logistic_unlearning(1.0, generator=g)
    model = N.RandomFeatureClassifier(16, generator=g)
    fits = [lambda m=m: model.fit(task.retain_x, task.retain_y, steps=steps, method=m) for m in ("flow", "descent")]
    flow, descent = (fit().theta.detach().clone() for fit in fits)
    assert (flow - descent).norm() < 1e-3 * descent.norm()
    return timed(*fits, repeats=repeats)


def _rouge_time(n):
    a, b = (np.random.default_rng(k).integers(50, size=n).tolist() for k in range(2))
    return timed(lambda: N.rouge_l_recall(a, b), repeats=5)[0]


def run(small: bool = False) -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    rows, slopes = [], []
    for sizes, repeats in (((2, 16, 500), 3),) if small else (((8, 128, 8000), 7), ((8, 128, 32000), 5)):
        times = dict(zip(WAYS, in_fresh_process(_losses, sizes, repeats), strict=True))
        memory = {way: in_fresh_process(_memory, way, sizes) for way in WAYS}
        size = f"{sizes[0]} × {sizes[1]} tokens, {sizes[2]} words"
        ours, peer = WAYS
        ratio = times[ours] / times[peer]
        rows.append(
            Row(PART, SLUG, f"npo_loss of {ours}", "log_softmax and gather", size, times[ours], times[peer], ratio,
                memory[ours], memory[peer], note=bar(ratio, 1.2, "ratio"))
        )  # fmt: skip
    for count, beta in ((50, 0.5),) if small else ((1000, 0.5), (1000, 1.0)):
        ours, peer = in_fresh_process(_flow, count, beta, 3 if small else 9)
        rows.append(
            Row(PART, SLUG, f"margin_flow, β = {beta}", "scipy DOP853", f"{count} times", ours, peer, ours / peer)
        )
    steps = 2000 if small else 20_000
    ours, peer = in_fresh_process(_fit, steps, 1 if small else 3)
    rows.append(
        Row(PART, SLUG, "fit by the flow", "gradient descent", f"1000 × 128, {steps} steps", ours, peer, ours / peer,
            note=bar(ours / peer, 1, "ratio"))
    )  # fmt: skip
    lengths = (100, 200) if small else (100, 200, 400, 800)
    times = [in_fresh_process(_rouge_time, n) for n in lengths]
    slopes.append(
        Slope("rouge_l_recall", "time", f"n = {lengths[0]} to {lengths[-1]}", exponent(lengths, times), "2 (O(mn))")
    )
    return rows, slopes
