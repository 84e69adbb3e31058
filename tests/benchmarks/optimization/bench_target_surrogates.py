"""SSO with one inner step against torch's SGD, the exact linear step against numpy's least squares; slopes over inner steps, samples and outputs."""

import numpy as np
import torch
from harness import Row, Slope, bar, exponent, in_fresh_process, peak_memory, timed

from lossbook.optimization import target_surrogates as T

PART, SLUG = "optimization", "target_surrogates"


def _network(width):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))


def _step(name, width, n, inner_steps=1):
    """A training step on one batch, and its network."""
    net, generator = _network(width), torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 64, generator=generator), torch.randint(10, (n,), generator=generator)
    if name == "SGD":
        optimizer = torch.optim.SGD(net.parameters(), 1e-3)

        def step():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()

        return net, step
    options = {"SSO": dict(tolerance=0), "SSO, armijo": dict(inner="armijo", inner_lr=1.0)}[name]
    optimizer = T.SSO(net.parameters(), 2.0, inner_steps, **{"inner": "gd", "inner_lr": 1e-3, **options})
    return net, lambda: optimizer.step(lambda: net(x), lambda z: T.cross_entropy_losses(z, y))


def _assert_same(width, n):
    """One inner step is SGD."""
    (ours, mine), (theirs, other) = _step("SSO", width, n), _step("SGD", width, n)
    for _ in range(5):
        mine()
        other()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def _steps(width, n, repeats):
    _assert_same(width, n)
    return timed(_step("SSO", width, n)[1], _step("SGD", width, n)[1], repeats=repeats)


def _linear(n, d):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, d), (d,), (n,)))


def _exact(n, d, repeats):
    X, theta, grad = _linear(n, d)
    A, b, start = X.numpy(), grad.numpy(), theta.numpy()
    ours = lambda: T.exact_linear_step(X, theta, grad, 1.0)
    theirs = lambda: start - np.linalg.lstsq(A, b, rcond=None)[0]
    np.testing.assert_allclose(ours().numpy(), theirs(), rtol=1e-8, atol=1e-10)
    return timed(ours, theirs, repeats=repeats)


def _memory(name, width, n):
    _, step = _step(name, width, n)
    return peak_memory(lambda: [step() for _ in range(2)])


def _inner_time(m, repeats):
    return timed(_step("SSO", 256, 512, m)[1], repeats=repeats)[0]


def _surrogate_time(n, repeats):
    generator = torch.Generator().manual_seed(0)
    z, anchor, grad = (torch.randn(n, 64, generator=generator) for _ in range(3))
    return timed(lambda: T.target_surrogate(z, anchor, grad, eta=1.0), repeats=repeats)[0]


def _exact_time(n, repeats):
    X, theta, grad = _linear(n, 32)
    return timed(lambda: T.exact_linear_step(X, theta, grad, 1.0), repeats=repeats)[0]


def run(width: int = 1024, n: int = 2048, repeats: int = 15) -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    ours, theirs = in_fresh_process(_steps, width, n, repeats)
    memory = {name: in_fresh_process(_memory, name, width, n) for name in ("SSO", "SGD")}
    rows = [
        Row(PART, SLUG, "SSO, one inner step", "torch SGD", f"batch {n}, width {width}", ours, theirs, ours / theirs,
            memory["SSO"], memory["SGD"], note=bar(ours / theirs, 1.3, "ratio"))
    ]  # fmt: skip
    ours, theirs = in_fresh_process(_exact, 20 * n, 64, repeats)
    rows.append(
        Row(PART, SLUG, "exact_linear_step", "numpy lstsq", f"n = {20 * n}, d = 64", ours, theirs, ours / theirs,
            note=bar(ours / theirs, 1.5, "ratio"))
    )  # fmt: skip
    slopes = []
    for what, function, sizes, claim in (
        ("SSO, one outer step", _inner_time, [8, 16, 32, 64], "m, gradient steps"),
        ("target_surrogate", _surrogate_time, [8 * n, 16 * n, 32 * n, 64 * n], "n"),
        ("exact_linear_step", _exact_time, [4 * n, 8 * n, 16 * n, 32 * n], "n"),
    ):
        times = [in_fresh_process(function, size, repeats) for size in sizes]
        span = f"{claim} = {sizes[0]} to {sizes[-1]}"
        slopes.append(Slope(what, "time", span, exponent(sizes, times), f"1 (O({claim[0]}))"))
    return rows, slopes
