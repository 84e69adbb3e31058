"""M-FAC's products against dense inverses and the paper's loop, its steps against torch's optimizers, slopes in d and m, and memory at d = 10⁶."""

import torch
from harness import Row, Slope, bar, exponent, in_fresh_process, peak_memory, timed
from torch import nn

from lossbook.optimization import mfac as M

PART, SLUG = "optimization", "mfac"
DAMPING = 1e-2


def _static(d, m, repeats):
    """Milliseconds of building and one product: static class, dense inverse; then of one product alone, and of one with the dense inverse."""
    grads, x = torch.randn(m, d, dtype=torch.float64), torch.randn(d, dtype=torch.float64)
    inverse, dense = M.StaticInverseFisher(grads, DAMPING), torch.linalg.inv(M.empirical_fisher(grads, DAMPING))
    scale = dense.abs().max().item()
    torch.testing.assert_close(inverse.mul(x), dense @ x, rtol=0, atol=1e-8 * scale * x.norm().item())
    torch.testing.assert_close(inverse.diagonal(), dense.diagonal(), rtol=0, atol=1e-8 * scale)
    return timed(
        lambda: M.StaticInverseFisher(grads, DAMPING).mul(x),
        lambda: torch.linalg.inv(M.empirical_fisher(grads, DAMPING)) @ x,
        lambda: inverse.mul(x),
        lambda: dense @ x,
        repeats=repeats,
    )


def _recursion(d, m, repeats):
    """Milliseconds of the Cholesky form and of the paper's loop over gradients, with equal denominators."""
    grads = torch.randn(m, d, dtype=torch.float64)
    torch.testing.assert_close(
        M.StaticInverseFisher(grads, DAMPING).denominators, M.static_recursion(grads, DAMPING)[1]
    )
    return timed(
        lambda: M.StaticInverseFisher(grads, DAMPING), lambda: M.static_recursion(grads, DAMPING), repeats=repeats
    )


def _steps(d, m, repeats):
    """Milliseconds of one step of MFAC, SGD with momentum and Adam; under a huge damping MFAC is SGD."""
    start, grad = torch.randn(d), torch.randn(d)
    ends = []
    for make in (lambda p: M.MFAC(p, lr=1e7, damping=1e8, num_grads=m), lambda p: torch.optim.SGD(p, lr=0.1)):
        p = nn.Parameter(start.clone())
        p.grad = grad
        make([p]).step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)
    steps = []
    for make in (
        lambda p: M.MFAC(p, lr=1e-6, num_grads=m),
        lambda p: torch.optim.SGD(p, lr=1e-6, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=1e-6),
    ):
        p = nn.Parameter(start.clone())
        p.grad = grad.clone()
        optimizer = make([p])
        for _ in range(m if m <= 128 else 8):  # fills the window with gradients that differ
            p.grad.normal_()
            optimizer.step()
        steps.append(optimizer.step)
    return timed(*steps, repeats=repeats)


def _time(what, d, m, repeats):
    """Milliseconds of one operation at one size, in float32."""
    grads = torch.randn(m, d)
    if what == "build":
        return timed(lambda: M.StaticInverseFisher(grads, DAMPING), repeats=repeats)[0]
    if what == "product":
        inverse = M.StaticInverseFisher(grads, DAMPING)
        return timed(lambda: inverse.mul(grads[0]), repeats=4 * repeats)[0]
    dynamic = M.DynamicInverseFisher(m, d, DAMPING)
    return timed(lambda: dynamic.update_mul(grads[0]), repeats=repeats)[0]


def _memory(d, m):
    """Megabytes above the gradients, for a static build and a product."""
    grads, x = torch.randn(m, d), torch.randn(d)
    return peak_memory(lambda: M.StaticInverseFisher(grads, DAMPING).mul(x))


def _dynamic_memory(d, m):
    """Megabytes above the window of gradients, for an update and its product."""
    dynamic, g = M.DynamicInverseFisher(m, d, DAMPING), torch.randn(d)
    dynamic.rows.fill_(0.01)  # pages of the window that are in memory
    dynamic.gram.fill_(1e-4 * d)
    return peak_memory(lambda: dynamic.update_mul(g))


def run(small: bool = False) -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    rows, slopes, repeats = [], [], 3 if small else 7
    for d in (500, 1000) if small else (500, 1000, 2000):
        build, dense, product, dense_product = in_fresh_process(_static, d, 32, repeats)
        size = f"d = {d}, m = 32, float64"
        rows.append(Row(PART, SLUG, "static build and product", "dense inverse", size, build, dense, build / dense, note=bar(build / dense, 1, "ratio")))  # fmt: skip
        rows.append(Row(PART, SLUG, "static product", "product with a dense inverse", size, product, dense_product, product / dense_product, note="no bar"))  # fmt: skip
    ours, loop = in_fresh_process(_recursion, 20_000, 128, repeats)
    rows.append(Row(PART, SLUG, "static build", "the paper's loop over gradients", "d = 20000, m = 128, float64", ours, loop, ours / loop, note=bar(ours / loop, 1, "ratio")))  # fmt: skip
    for m in (32,) if small else (32, 128):
        ours, sgd, adam = in_fresh_process(_steps, 100_000, m, repeats)
        for peer, milliseconds in (("SGD, momentum", sgd), ("Adam", adam)):
            note = f"no bar: reads {m} gradients where the peer reads one"
            rows.append(Row(PART, SLUG, "MFAC.step", f"torch.optim {peer}", f"d = 100000, m = {m}", ours, milliseconds, ours / milliseconds, note=note))  # fmt: skip
    static, dynamic = (in_fresh_process(function, 1_000_000, 64) for function in (_memory, _dynamic_memory))
    note = "above the gradients; " + bar(static / 1024, 2, "GB")
    rows.append(Row(PART, SLUG, "static build and product", "", "d = 10⁶, m = 64", in_fresh_process(_time, "build", 1_000_000, 64, 1), memory_mb=static, note=note))  # fmt: skip
    note = "above the window; " + bar(dynamic / 1024, 2, "GB")
    rows.append(Row(PART, SLUG, "dynamic update and product", "", "d = 10⁶, m = 64", in_fresh_process(_time, "update", 1_000_000, 64, 3), memory_mb=dynamic, note=note))  # fmt: skip
    # Sizes whose results are beyond 32 MB: below, the C library keeps memory between calls, and a slope would measure that.
    ds = (320_000, 640_000) if small else (320_000, 640_000, 1_280_000, 2_560_000)
    for what, name, m in (
        ("build", "StaticInverseFisher", 32), ("product", "StaticInverseFisher.mul", 32), ("update", "DynamicInverseFisher.update_mul", 32),
    ):  # fmt: skip
        times = [in_fresh_process(_time, what, d, m, 11) for d in ds]
        slopes.append(Slope(name, "time", f"d = {ds[0]} to {ds[-1]}, m = {m}", exponent(ds, times), "1 (O(dm²) or O(dm))"))  # fmt: skip
    for what, name, d, ms, claim in (
        ("build", "StaticInverseFisher", 20_000, (512, 1024, 2048), "2 (O(dm²))"),
        ("product", "StaticInverseFisher.mul", 200_000, (64, 128, 256, 512), "1 (O(dm))"),
        ("update", "DynamicInverseFisher.update_mul", 200_000, (64, 128, 256, 512), "1 (O(dm + m³), m³ small here)"),
    ):
        times = [in_fresh_process(_time, what, d, m, 5) for m in ms]
        slopes.append(Slope(name, "time", f"m = {ms[0]} to {ms[-1]}, d = {d}", exponent(ms, times), claim))
    return rows, slopes
