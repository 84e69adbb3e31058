"""Compiled losses against the same losses written by hand; slopes in the batch and in the number of propositions."""

import sympy
import torch
import torch.nn.functional as F
from harness import Row, Slope, bar, exponent, in_fresh_process, timed

from lossbook.language import preference_logic as P

PART, SLUG = "language", "preference_logic"


def _written(name, log_probs):
    """The usual code of a loss."""
    if name == "DPO":
        ratio = P.dpo_log_ratio(*log_probs.unbind(1))
    else:
        ratio = {"CPO": P.cpo_log_ratio, "ORPO": P.orpo_log_ratio}[name](*log_probs.unbind(1))
    return -F.logsigmoid(ratio).mean()


def _against_closed_form(name, batch, repeats):
    structure = P.NAMED[name]
    log_probs = (-5 * torch.rand(batch, len(structure.variables)) - 0.01).requires_grad_()

    def step(loss):
        log_probs.grad = None
        loss(log_probs).backward()
        return log_probs.grad

    ours, peer = lambda: step(lambda x: P.preference_loss(structure, x)), lambda: step(lambda x: _written(name, x))
    torch.testing.assert_close(ours(), peer(), rtol=1e-4, atol=1e-7)
    return timed(ours, peer, repeats=repeats)


def _time(batch, n):
    """Milliseconds of a count over all worlds of n propositions but one, with its gradient."""
    models = torch.tensor(P.worlds(n)[:-1])
    log_probs = (-5 * torch.rand(batch, n) - 0.01).requires_grad_()
    step = lambda: P.log_weighted_model_count(models, log_probs).sum().backward()
    return timed(step, repeats=7)[0]


def _decompile(repeats):
    """Milliseconds to decompile DPO and to compile a batch of 64 with it."""
    structure = P.NAMED["DPO"]
    pair = [sympy.expand(q) for q in structure.polynomials()]
    log_probs = -torch.rand(64, 4) - 0.01
    return timed(
        lambda: P.decompile(*pair, structure.variables),
        lambda: P.preference_loss(structure, log_probs),
        repeats=repeats,
    )


def run() -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    rows, slopes = [], []
    for name in ("CPO", "ORPO", "DPO"):
        for batch, repeats in ((64, 200), (100_000, 11)):
            ours, peer = in_fresh_process(_against_closed_form, name, batch, repeats)
            note = bar(ours / peer, 3, "ratio")
            rows.append(
                Row(PART, SLUG, f"preference_loss, {name}", "written by hand", f"B = {batch}", ours, peer, ours / peer, note=note)
            )  # fmt: skip
    ours, peer = in_fresh_process(_decompile, 21)
    rows.append(Row(PART, SLUG, "decompile, DPO", "preference_loss, B = 64", "n = 4", ours, peer, ours / peer))
    batches = (40_000, 80_000, 160_000, 320_000)
    times = [in_fresh_process(_time, batch, 4) for batch in batches]
    slopes.append(
        Slope("log_weighted_model_count", "time", f"B = {batches[0]} to {batches[-1]}, n = 4, 15 worlds", exponent(batches, times), "1 (O(Bmn))")
    )  # fmt: skip
    numbers = (4, 5, 6, 7, 8)
    work = [n * (2**n - 1) for n in numbers]
    times = [in_fresh_process(_time, 2000, n) for n in numbers]
    slopes.append(
        Slope("log_weighted_model_count", "time", f"mn = {work[0]} to {work[-1]} (n = 4 to 8, all worlds but one), B = 2000", exponent(work, times), "1 (O(Bmn))")
    )  # fmt: skip
    return rows, slopes
