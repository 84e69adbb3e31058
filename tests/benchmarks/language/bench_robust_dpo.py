"""The losses against the formulas of TRL's DPOTrainer, written out here, and the log-linear fit against scikit-learn."""

import torch
import torch.nn.functional as F
from harness import Row, Slope, bar, exponent, in_fresh_process, timed
from sklearn.linear_model import LogisticRegression

from lossbook.language import robust_dpo as R

BETA, RATE = 0.1, 0.1


def _trl(kind, policy_chosen, policy_rejected, ref_chosen, ref_rejected):
    """TRL's loss of a batch, before the mean."""
    logits = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
    if kind == "ipo":
        return (logits - 1 / (2 * BETA)) ** 2
    if kind == "hinge":
        return torch.relu(1 - BETA * logits)
    kept, swapped = F.logsigmoid(BETA * logits), F.logsigmoid(-BETA * logits)
    if kind == "robust":
        return (-kept * (1 - RATE) + swapped * RATE) / (1 - 2 * RATE)
    return -kept * (1 - RATE) - swapped * RATE


def _ours(kind, *logps):
    margin = R.preference_margin(*logps, beta=1.0 if kind == "ipo" else BETA)
    if kind == "ipo":
        return R.preference_loss(margin, base="squared", target=1 / (2 * BETA), reduction="none")
    if kind == "hinge":
        return R.preference_loss(margin, base="hinge", reduction="none")
    loss = R.robust_dpo_loss if kind == "robust" else R.conservative_dpo_loss
    return loss(margin, noise_rate=RATE, reduction="none")


def _losses(kind, batch, repeats):
    logps = [-10 * torch.rand(batch) for _ in range(4)]  # |z| <= 2, where float32 keeps the peer's digits
    for x in logps[:2]:
        x.requires_grad_()
    torch.testing.assert_close(_ours(kind, *logps), _trl(kind, *logps), rtol=1e-6, atol=1e-6 if kind != "ipo" else 2e-5)

    def step(loss):
        for x in logps[:2]:
            x.grad = None
        loss(kind, *logps).mean().backward()

    return timed(lambda: step(_ours), lambda: step(_trl), repeats=repeats)


def _fit(n, d, repeats):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    wins = torch.rand(n, generator=generator, dtype=torch.float64) < torch.sigmoid(x.sum(1) / d**0.5)
    signed, labels = torch.where(wins[:, None], x, -x), wins.numpy()
    ours = R.LogLinearPreference(1.0, 0.0, "dpo")
    peer = LogisticRegression(C=1e12, fit_intercept=False, tol=1e-10, solver="newton-cholesky")
    ours.fit(signed), peer.fit(x.numpy(), labels)
    torch.testing.assert_close(ours.coef_, torch.tensor(peer.coef_[0]), rtol=1e-5, atol=1e-5)
    return timed(lambda: ours.fit(signed), lambda: peer.fit(x.numpy(), labels), repeats=repeats)


def run() -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    part, slug, rows = "language", "robust_dpo", []
    names = {
        "robust": "robust_dpo_loss",
        "sigmoid": "conservative_dpo_loss",
        "ipo": "preference_loss, squared",
        "hinge": "preference_loss, hinge",
    }
    for kind, name in names.items():
        ours, peer = in_fresh_process(_losses, kind, 2**18, 30)
        note = bar(ours / peer, 1.2, "ratio") if kind == "robust" else ""
        rows.append(Row(part, slug, name, f"TRL's formula `{kind}`", "B = 262144", ours, peer, ours / peer, note=note))
    ours, peer = in_fresh_process(_fit, 20_000, 10, 10)
    rows.append(Row(part, slug, "LogLinearPreference", "scikit-learn", "n = 20000, d = 10", ours, peer, ours / peer))
    sizes = [2**k for k in (17, 18, 19, 20)]
    times = [in_fresh_process(_losses, "robust", size, 20)[0] for size in sizes]
    slope = exponent(sizes, times)
    return rows, [Slope("robust_dpo_loss", "time", "B = 2^17 to 2^20", slope, "O(B)")]
