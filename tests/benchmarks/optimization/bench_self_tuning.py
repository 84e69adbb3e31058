"""Best-response layers against plain ones, and against forming a weight for each example; slopes over the batch and the hyperparameters."""

import torch
from harness import Row, Slope, bar, exponent, in_fresh_process, peak_memory, timed
from torch import nn

from lossbook.optimization import self_tuning as S

PART, SLUG = "optimization", "self_tuning"


def _linear(B, width, n):
    layer, plain = S.BestResponseLinear(width, width, n), nn.Linear(width, width)
    with torch.no_grad():
        layer.weight_gate.normal_(std=0.1)
        layer.bias_gate.normal_(std=0.1)
    return layer, plain, torch.randn(B, width), torch.randn(B, n)


def _formed(layer, x, h):
    """The weight of each example, formed, and a batched product."""
    weight = layer.weight + (h @ layer.weight_gate.T)[:, :, None] * layer.hyper_weight
    bias = layer.bias + (h @ layer.bias_gate.T) * layer.hyper_bias
    return torch.baddbmm(bias[:, :, None], weight, x[:, :, None])[:, :, 0]


def _step(module, *inputs):
    """Forward and backward."""
    module.zero_grad()
    module(*inputs).square().mean().backward()


def _against_plain(B, width, n, repeats):
    layer, plain, x, h = _linear(B, width, n)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)
    return timed(lambda: _step(layer, x, h), lambda: _step(plain, x), repeats=repeats)


def _against_formed(B, width, n, repeats):
    layer, _, x, h = _linear(B, width, n)
    torch.testing.assert_close(layer(x, h), _formed(layer, x, h), rtol=1e-4, atol=1e-4)

    def formed():
        layer.zero_grad()
        _formed(layer, x, h).square().mean().backward()

    return timed(lambda: _step(layer, x, h), formed, repeats=repeats)


def _conv(B, channels, repeats):
    layer = S.BestResponseConv2d(channels, channels, 3, 8, padding=1)
    plain = nn.Conv2d(channels, channels, 3, padding=1)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x, h = torch.randn(B, channels, 16, 16), torch.randn(B, 8)
    torch.testing.assert_close(layer(x), plain(x))
    return timed(lambda: _step(layer, x, h), lambda: _step(plain, x), repeats=repeats)


def _memory(which, B, width, n):
    layer, plain, x, h = _linear(B, width, n)
    if which == "formed":
        return peak_memory(lambda: _formed(layer, x, h).square().mean().backward())
    inputs = (x, h) if which == "ours" else (x,)
    return peak_memory(lambda: _step(layer if which == "ours" else plain, *inputs))


def _batch_time(B, width, n, repeats):
    layer, _, x, h = _linear(B, width, n)
    return timed(lambda: _step(layer, x, h), repeats=repeats)[0]


def run(width: int = 512, repeats: int = 20) -> tuple[list[Row], list[Slope]]:
    """Rows and slopes of this file."""
    rows, n = [], 8
    for B in (128, 2048):
        ours, theirs = in_fresh_process(_against_plain, B, width, n, repeats)
        memory = [in_fresh_process(_memory, which, B, width, n) for which in ("ours", "plain")]
        rows.append(
            Row(PART, SLUG, "BestResponseLinear, forward and backward", "nn.Linear", f"B = {B}, {width} x {width}, n = {n}",
                ours, theirs, ours / theirs, *memory, note=bar(ours / theirs, 3.0, "ratio"))
        )  # fmt: skip
    B = 128
    ours, theirs = in_fresh_process(_against_formed, B, width, n, max(3, repeats // 4))
    memory = [in_fresh_process(_memory, which, B, width, n) for which in ("ours", "formed")]
    rows.append(
        Row(PART, SLUG, "BestResponseLinear, forward and backward", "a weight formed for each example", f"B = {B}, {width} x {width}, n = {n}",
            ours, theirs, ours / theirs, *memory, note=bar(ours / theirs, 0.1, "ratio"))
    )  # fmt: skip
    ours, theirs = in_fresh_process(_conv, 32, 64, max(3, repeats // 4))
    rows.append(
        Row(PART, SLUG, "BestResponseConv2d, forward and backward", "nn.Conv2d", "B = 32, 64 channels, 16 x 16, n = 8",
            ours, theirs, ours / theirs, note=bar(ours / theirs, 3.0, "ratio"))
    )  # fmt: skip
    sizes = [512, 1024, 2048, 4096]
    times = [in_fresh_process(_batch_time, B, width, n, repeats) for B in sizes]
    slopes = [Slope("BestResponseLinear", "time", f"B = {sizes[0]} to {sizes[-1]}", exponent(sizes, times), "1 (O(B))")]
    counts = [1, 4, 16, 64]
    times = [in_fresh_process(_batch_time, 1024, width, k, repeats) for k in counts]
    slopes.append(
        Slope("BestResponseLinear", "time", f"n = {counts[0]} to {counts[-1]}", exponent(counts, times), "0: n is small beside the width")
    )  # fmt: skip
    return rows, slopes
