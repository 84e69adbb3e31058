"""A step of Lion against torch's SGD with momentum and AdamW, with weight decay and without, compiled and not; its slope over the parameters; memory."""

import shutil

import torch
from harness import Row, Slope, bar, exponent, in_fresh_process, peak_memory, timed

from lossbook.optimization import lion as L

PART, SLUG = "optimization", "lion"


def _optimizer(name, params, decay):
    if name == "SGD":
        return torch.optim.SGD(params, 1e-4, momentum=0.9, weight_decay=decay)
    if name == "AdamW":
        return torch.optim.AdamW(params, 1e-4, weight_decay=decay)
    kernel = {"Lion": L.L1(), "LionK half square": L.HalfSquare(), "LionK L2": L.L2()}[name]
    return L.LionK(params, kernel, 1e-4, (0.9, 0.9) if name == "LionK half square" else (0.9, 0.99), decay)


def _parameters(d, pieces):
    """Parameters of d numbers together, with gradients."""
    params = [torch.nn.Parameter(torch.randn(d // pieces)) for _ in range(pieces)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def _assert_right(d):
    """Lion is its equation, and with the half square it is torch's momentum, up to the first step, which torch does not dampen."""
    (p,) = _parameters(d, 1)
    wanted, buffer = p.detach().double(), torch.zeros(d, dtype=torch.float64)
    optimizer = L.Lion([p], 1e-2, weight_decay=0.1)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        g = p.grad.double()
        wanted = (1 - 1e-3) * wanted - 1e-2 * (0.9 * buffer + 0.1 * g).sign()
        buffer = 0.99 * buffer + 0.01 * g
        optimizer.step()
    unlike = (p.detach().double() - wanted).abs() > 1e-5
    assert unlike.double().mean() < 1e-5, "a sign may differ where the mixture is zero up to rounding, and nowhere else"

    (first,) = _parameters(1000, 1)
    second = torch.nn.Parameter(first.detach().clone())
    ours = L.LionK([first], L.HalfSquare(), 1e-2, (0.9, 0.9))
    theirs = torch.optim.SGD([second], 1e-2, momentum=0.9, dampening=0.9)
    for step in range(5):
        grad = torch.zeros(1000) if step == 0 else torch.randn(1000)
        first.grad, second.grad = grad.clone(), grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def _steps(d, pieces, decay, repeats):
    """Milliseconds of a step: Lion, SGD, AdamW, and the first two compiled, if there is a C++ compiler."""
    _assert_right(min(d, 10**6))
    optimizers = [_optimizer(name, _parameters(d, pieces), decay) for name in ("Lion", "SGD", "AdamW")]
    steps = [optimizer.step for optimizer in optimizers]
    compiled = [torch.compile(step) for step in steps[:2]] if shutil.which("g++") else []
    return timed(*steps, *compiled, repeats=repeats)


def _memory(name, d):
    """Megabytes at the peak of the first two steps, the state included."""
    optimizer = _optimizer(name, _parameters(d, 1), 0.1)
    return peak_memory(lambda: [optimizer.step() for _ in range(2)])


def _step_time(name, d, repeats):
    return timed(_optimizer(name, _parameters(d, 1), 0.1).step, repeats=repeats)[0]


def run(d: int = 10**7, repeats: int = 25) -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    rows, slopes = [], []
    memory = {name: in_fresh_process(_memory, name, d) for name in ("Lion", "SGD", "AdamW")}
    for pieces, decay in ((1, 0.1), (1, 0.0), (100, 0.1)):
        ours, sgd, adamw, *compiled = in_fresh_process(_steps, d, pieces, decay, repeats)
        size = f"{d:.0e} parameters in {pieces}".replace("+0", "") + f", decay {decay:g}"
        for peer, name, theirs, limit in (
            ("torch SGD, momentum", "SGD", sgd, 1.1),
            ("torch AdamW", "AdamW", adamw, 1.0),
        ):
            rows.append(
                Row(PART, SLUG, "Lion, one step", peer, size, ours, theirs, ours / theirs, memory["Lion"], memory[name],
                    note=bar(ours / theirs, limit, "ratio"))
            )  # fmt: skip
        if compiled:
            fused, sgd_fused = compiled
            rows.append(
                Row(PART, SLUG, "Lion, compiled step", "torch SGD, momentum", size, fused, sgd, fused / sgd,
                    note=bar(fused / sgd, 1.1, "ratio"))
            )  # fmt: skip
            rows.append(
                Row(PART, SLUG, "Lion, compiled step", "torch SGD, compiled", size, fused, sgd_fused, fused / sgd_fused)
            )
    sizes = [d // 64, d // 16, d // 4, d]
    for name in ("Lion", "LionK L2"):
        times = [in_fresh_process(_step_time, name, size, repeats) for size in sizes]
        slopes.append(Slope(f"{name}, one step", "time", f"d = {sizes[0]} to {d}", exponent(sizes, times), "1 (O(d))"))
    return rows, slopes
