"""The loss against its formula written out, the saddle point against scipy, DPO's optimum against L-BFGS, a training step of six sequences against two."""

import numpy as np
import scipy.optimize
import scipy.special
import torch
from harness import Row, Slope, bar, exponent, in_fresh_process, timed
from torch import nn

from lossbook import lab, ops
from lossbook.language import srpo as S
from lossbook.language.robust_dpo import preference_loss

PART, SLUG = "language", "srpo"


def _game(K, seed=0):
    """A random preference matrix and references, float64."""
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.uniform(0.05, 0.95, (K, K)), 1)
    p = torch.tensor(upper + np.tril(1 - upper.T, -1) + np.eye(K) / 2)
    return p, torch.tensor(rng.dirichlet(np.ones(K))), torch.tensor(rng.dirichlet(np.ones(K), K))


def _written_out(w, l, wl, ll, ww, lw, beta=0.3, alpha=0.25):
    generator = (beta / 2 * (w - l + wl - lw) - 0.5) ** 2
    improver = ((beta * (wl - ll) - 0.5) ** 2 + (beta * (ww - lw) - 0.5) ** 2) / 2
    return ((1 - alpha) * generator + alpha * improver).mean()


def _losses(B, repeats):
    """Milliseconds, forward and backward: SRPO and its formula."""
    six = [torch.randn(B, requires_grad=True) for _ in range(6)]
    ours, theirs = lambda: S.srpo_loss(S.PairLogRatios(*six), beta=0.3), lambda: _written_out(*six)
    torch.testing.assert_close(ours(), theirs())
    return timed(lambda: ours().backward(), lambda: theirs().backward(), repeats=repeats)


def _saddle(K, repeats):
    """Milliseconds of the saddle point: ours, and scipy's softmax and log-sum-exp."""
    p, ref, refs = _game(K)
    arrays = p.numpy(), ref.numpy(), refs.numpy()

    def peer():
        logits = np.log(arrays[2]) + arrays[0].T / 0.3
        generator = np.log(arrays[1]) - scipy.special.logsumexp(logits, axis=1)
        return scipy.special.softmax(generator), scipy.special.softmax(logits, axis=1)

    ours = S.tabular_srpo(p, ref, refs, beta=0.3)
    for a, b in zip(ours[:2], peer(), strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-8, atol=1e-14)
    return timed(lambda: S.tabular_srpo(p, ref, refs, beta=0.3), peer, repeats=repeats)


def _dpo(K, repeats):
    """Milliseconds of DPO's optimum: ours, and L-BFGS on the loss."""
    p, ref, _ = _game(K)
    mu = torch.tensor(np.random.default_rng(1).dirichlet(np.full(K, 5.0)))
    weights, array = (mu[:, None] * mu).numpy(), p.numpy()

    def function(theta):
        gap = theta[:, None] - theta
        loss = (weights * array * np.logaddexp(0, -gap)).sum()
        return loss, (weights * (scipy.special.expit(gap) - array)).sum(1)

    def peer():
        options = dict(ftol=1e-30, gtol=1e-10, maxiter=5000)
        return scipy.optimize.minimize(function, np.zeros(K), jac=True, method="L-BFGS-B", options=options).x

    expected = (ref.log() + torch.tensor(peer())).softmax(0)
    assert (S.dpo_optimum(p, ref, mu, beta=1.0) - expected).abs().max() < 1e-4
    return timed(lambda: S.dpo_optimum(p, ref, mu, beta=1.0), peer, repeats=repeats)


def _step(B, T, dim, repeats):
    """Milliseconds of a training step on B pairs: SRPO with six sequences, four of them with a draft, and DPO with two."""
    model = lab.Transformer(1000, dim=dim, depth=2, heads=4, context=3 * T)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def sequences(count, length):
        tokens = torch.randint(1000, (count * B, length))
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        mask[:, -T:] = True
        return tokens, mask

    short, long = sequences(2, 2 * T), sequences(4, 3 * T)

    def logprobs(tokens, mask):
        return ops.sequence_logprobs(model.hidden(tokens), model.output_weight, tokens, mask)

    def step(loss):
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def srpo():
        ratios = torch.cat([logprobs(*short), logprobs(*long)]).unflatten(0, (6, B))
        return S.srpo_loss(S.PairLogRatios(*ratios), beta=0.3)

    def dpo():
        w, l = logprobs(*short).unflatten(0, (2, B))
        return preference_loss(0.3 * (w - l))

    return timed(lambda: step(srpo), lambda: step(dpo), repeats=repeats)


def run(small: bool = False) -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    rows, slopes = [], []
    for B, repeats in ((100, 5),) if small else ((64, 200), (100_000, 30)):
        ours, peer = in_fresh_process(_losses, B, repeats)
        note = bar(ours / peer, 1.2, "ratio") if B >= 10_000 else ""
        rows.append(
            Row(PART, SLUG, "srpo_loss", "the formula in torch", f"B = {B}", ours, peer, ours / peer, note=note)
        )
    for K, repeats in ((20, 3),) if small else ((50, 50), (1000, 15)):
        ours, peer = in_fresh_process(_saddle, K, repeats)
        rows.append(Row(PART, SLUG, "tabular_srpo", "scipy", f"K = {K}", ours, peer, ours / peer))
    for K, repeats in ((5, 3),) if small else ((10, 20), (100, 10)):
        ours, peer = in_fresh_process(_dpo, K, repeats)
        rows.append(Row(PART, SLUG, "dpo_optimum", "scipy L-BFGS", f"K = {K}", ours, peer, ours / peer))
    for shape, repeats in (((4, 4, 16), 3),) if small else (((16, 32, 128), 9),):
        ours, peer = in_fresh_process(_step, *shape, repeats)
        size = "B = {}, prompt, draft and answer of {} tokens, width {}".format(*shape)
        rows.append(Row(PART, SLUG, "a step of SRPO", "a step of DPO", size, ours, peer, ours / peer,
                        note="six sequences, 16 T tokens for each pair, against two, 4 T"))  # fmt: skip
    sizes = (100, 200) if small else (500, 1000, 2000, 4000)
    times = [in_fresh_process(_saddle, K, 5)[0] for K in sizes]
    slopes.append(Slope("tabular_srpo", "time", f"K = {sizes[0]} to {sizes[-1]}", exponent(sizes, times), "2 (O(K²))"))
    return rows, slopes
