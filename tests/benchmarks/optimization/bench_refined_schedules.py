"""Schedulers and the norm recorder against torch's, in a training loop; slopes of the bounds and of the refined schedule."""

import torch
from harness import Row, Slope, bar, exponent, in_fresh_process, timed
from torch.optim import lr_scheduler as torch_schedules

from lossbook.optimization import refined_schedules as R

PART, SLUG = "optimization", "refined_schedules"
PEERS = {
    "LinearDecayLR": lambda o, T: torch_schedules.PolynomialLR(o, T, power=1.0),
    "TabulatedLR": lambda o, T: torch_schedules.LambdaLR(o, lambda k: 1 - k / T),
}
OURS = {
    "LinearDecayLR": lambda o, T: R.LinearDecayLR(o, T),
    "TabulatedLR": lambda o, T: R.TabulatedLR(o, R.named_schedule("linear", T)),
}


def _scheduler(name, groups, steps, repeats):
    """Milliseconds of all steps of a schedule: ours, then torch's; the rates are equal."""

    def rates(make):
        parameters = [dict(params=[torch.zeros(1, requires_grad=True)], lr=0.1 * (i + 1)) for i in range(groups)]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        scheduler, found = make[name](optimizer, steps), []
        optimizer.step()
        for _ in range(steps):
            found.append([group["lr"] for group in optimizer.param_groups])
            scheduler.step()
        return torch.tensor(found)

    torch.testing.assert_close(rates(OURS), rates(PEERS), rtol=1e-5, atol=1e-8)
    return timed(lambda: rates(OURS), lambda: rates(PEERS), repeats=repeats)


def _recorder(order, width, depth, repeats):
    """Milliseconds of one record: ours, then torch's total norm of the same gradients."""
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(depth)))
    model(torch.randn(8, width)).square().mean().backward()
    gradients = [p.grad for p in model.parameters()]
    recorder = R.GradNormRecorder(model.parameters(), ord=order)
    recorder.record()
    torch.testing.assert_close(recorder.norms[0], torch.nn.utils.get_total_norm(gradients, float(order)))
    return timed(recorder.record, lambda: torch.nn.utils.get_total_norm(gradients, float(order)), repeats=repeats)


def _time(name, T):
    """Milliseconds of one call at length T."""
    norms = torch.rand(T, dtype=torch.float64) + 0.5
    rates = R.named_schedule("linear", T).requires_grad_()
    steps = {
        "schedule_bound, forward and backward": lambda: R.schedule_bound(rates, norms, 1.0).backward(),
        "refined_schedule, no filter": lambda: R.refined_schedule(norms, tau=None),
        "smooth_grad_norms, tau = 0.1": lambda: R.smooth_grad_norms(norms),
    }
    return timed(steps[name], repeats=7)[0]


def run() -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    rows, slopes = [], []
    for name, peer in (("LinearDecayLR", "torch PolynomialLR"), ("TabulatedLR", "torch LambdaLR")):
        for groups in (1, 20):
            ours, theirs = in_fresh_process(_scheduler, name, groups, 1000, 9)
            rows.append(
                Row(PART, SLUG, f"{name}, 1000 steps", peer, f"{groups} group(s)", ours, theirs, ours / theirs,
                    note=bar(ours / theirs, 1.5, "ratio"))
            )  # fmt: skip
    for order in (1, 2):
        for width, depth in ((64, 4), (512, 20)):
            ours, theirs = in_fresh_process(_recorder, order, width, depth, 51)
            rows.append(
                Row(PART, SLUG, f"GradNormRecorder, ord={order}", "torch get_total_norm", f"{2 * depth} tensors, width {width}",
                    ours, theirs, ours / theirs, note=bar(ours / theirs, 2, "ratio"))
            )  # fmt: skip
    for name, lengths, claim in (
        ("schedule_bound, forward and backward", (100_000, 200_000, 400_000, 800_000), "1 (O(T))"),
        ("refined_schedule, no filter", (100_000, 200_000, 400_000, 800_000), "1 (O(T))"),
        ("smooth_grad_norms, tau = 0.1", (4000, 8000, 16_000, 32_000), "about 1 (O(T log T))"),
    ):
        times = [in_fresh_process(_time, name, T) for T in lengths]
        span = f"T = {lengths[0]} to {lengths[-1]}"
        slopes.append(Slope(name, "time", span, exponent(lengths, times), claim))
    return rows, slopes
