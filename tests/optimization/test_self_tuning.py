"""Self-tuning networks against loops over examples, and the theorems of the chapter as properties: affine responses, gates, hypergradients, scales."""

import copy
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize
from torch import nn

from lossbook.optimization import self_tuning as S

DOUBLE = torch.float64
ENTROPY = 0.5 * math.log(2 * math.pi * math.e)
seeds = st.integers(0, 10**6)


def randn(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(in_features=5, out_features=4, n=3, seed=0, **options):
    torch.manual_seed(seed)
    layer = S.BestResponseLinear(in_features, out_features, n, **{"dtype": DOUBLE} | options)
    with torch.no_grad():
        for gate in (layer.weight_gate, layer.bias_gate):
            if gate is not None:
                gate.normal_()  # large enough to be seen
    return layer


def conv(n=3, seed=0, **options):
    torch.manual_seed(seed)
    layer = S.BestResponseConv2d(4, 6, 3, n, **{"dtype": DOUBLE} | options)
    with torch.no_grad():
        layer.weight_gate.normal_()
        if layer.bias_gate is not None:
            layer.bias_gate.normal_()
    return layer


def one(name="rate", low=0.0, high=0.9, init=0.3, **options):
    return S.HyperparameterSpec(name, low, high, init, **options)


# ---- layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 5), (7, 2, 5), (7, 2, 3, 5), (1, 5)])
def test_linear_is_a_loop_over_examples(shape, bias):
    layer, x, h = linear(bias=bias), randn(*shape), randn(shape[0], 3, seed=1)
    rows = []
    for one_x, one_h in zip(x, h, strict=True):
        weight = layer.weight.clone()
        shift = layer.bias.clone() if bias else None
        for unit in range(4):  # the equation, unit by unit
            weight[unit] = weight[unit] + (layer.weight_gate[unit] @ one_h) * layer.hyper_weight[unit]
            if bias:
                shift[unit] = shift[unit] + (layer.bias_gate[unit] @ one_h) * layer.hyper_bias[unit]
        effective = layer.effective_weight(one_h)
        torch.testing.assert_close(effective[0], weight)
        assert effective[1] is None if not bias else torch.allclose(effective[1], shift)
        rows.append(F.linear(one_x, weight, shift))
    torch.testing.assert_close(layer(x, h), torch.stack(rows), rtol=0, atol=1e-10)
    shared = F.linear(x, *layer.effective_weight(h[0]))
    torch.testing.assert_close(layer(x, h[0]), shared, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer(x, h[:1].expand(len(x), 3)), shared, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer(x[0], h[0]), shared[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"bias": False}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"groups": 2, "padding": 2},
    ],
)  # fmt: skip
def test_convolution_is_a_loop_over_examples(options):
    layer, x, h = conv(**options), randn(5, 4, 9, 8), randn(5, 3, seed=1)
    places = {key: value for key, value in options.items() if key != "bias"}
    rows = []
    for one_x, one_h in zip(x, h, strict=True):
        weight, shift = layer.effective_weight(one_h)
        gates = [sum(layer.weight_gate[c, k] * one_h[k] for k in range(3)) for c in range(6)]
        literal = torch.stack([layer.weight[c] + gates[c] * layer.hyper_weight[c] for c in range(6)])
        torch.testing.assert_close(weight, literal)
        rows.append(F.conv2d(one_x[None], weight, shift, **places)[0])
    torch.testing.assert_close(layer(x, h), torch.stack(rows), rtol=0, atol=1e-10)
    torch.testing.assert_close(layer(x, h[1]), F.conv2d(x, *layer.effective_weight(h[1]), **places), rtol=0, atol=1e-10)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, **places), rtol=0, atol=0)


@pytest.mark.parametrize("make, x", [(linear, randn(6, 5)), (conv, randn(6, 4, 7, 7))])
def test_affine_in_the_hyperparameters(make, x):
    layer, first, second = make(), randn(6, 3, seed=1), randn(6, 3, seed=2)
    zero = torch.zeros(6, 3, dtype=DOUBLE)
    cross = layer(x, first + second) - layer(x, first) - layer(x, second) + layer(x, zero)
    assert cross.abs().max() < 1e-12
    torch.testing.assert_close(layer(x, zero), layer(x), rtol=0, atol=1e-15)
    torch.testing.assert_close(layer(x, zero[0]), layer(x), rtol=0, atol=1e-15)
    assert (layer(x, first) - layer(x)).abs().max() > 0.1


@pytest.mark.parametrize("n", [1, 4])
def test_parameter_counts(n):
    count = lambda layer: sum(p.numel() for p in layer.parameters())
    assert count(S.BestResponseLinear(7, 3, n)) == 3 * (2 * 7 + n) + 3 * (2 + n)
    assert count(S.BestResponseLinear(7, 3, n, bias=False)) == 3 * (2 * 7 + n)
    assert count(S.BestResponseConv2d(5, 6, 3, n)) == 6 * (2 * 5 * 9 + n) + 6 * (2 + n)
    assert count(S.BestResponseConv2d(4, 6, 3, n, groups=2)) == 6 * (2 * 2 * 9 + n) + 6 * (2 + n)


def test_start_values():
    torch.manual_seed(0)
    for layer, plain in (
        (S.BestResponseLinear(100, 200, 5), nn.Linear(100, 200)),
        (S.BestResponseConv2d(25, 200, 2, 5), nn.Conv2d(25, 200, 2)),
    ):
        bound = 0.1  # one over the root of the fan-in, 100
        for values in (layer.weight, layer.hyper_weight, plain.weight):
            assert values.abs().max() <= bound and values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        for values in (layer.bias, layer.hyper_bias, plain.bias):
            assert 0.9 * bound < values.abs().max() <= bound
        for gate in (layer.weight_gate, layer.bias_gate):
            assert gate.std().item() == pytest.approx(0.01, rel=0.1) and (gate != 0).all()
        assert not torch.equal(layer.weight, layer.hyper_weight)
        missing, unexpected = layer.load_state_dict(plain.state_dict(), strict=False)
        assert not unexpected and len(missing) == 4 and torch.equal(layer.weight, plain.weight)


@pytest.mark.parametrize("make, x", [(linear, randn(4, 5)), (conv, randn(4, 4, 5, 5))])
def test_gradients(make, x):
    layer, h = make(), randn(4, 3, seed=3).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def run(x, h, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, h))

    assert torch.autograd.gradcheck(run, (x.clone().requires_grad_(), h, *values))
    assert torch.autograd.gradcheck(lambda h: layer.squared_norm(h), (h,))


@pytest.mark.parametrize("make", [linear, conv])
def test_squared_norm(make):
    layer, h = make(), randn(6, 3, seed=4)
    literal = torch.stack([layer.effective_weight(row)[0].square().sum() for row in h])
    torch.testing.assert_close(layer.squared_norm(h), literal)
    torch.testing.assert_close(layer.squared_norm(h[0]), literal[0])


def test_zero_gates_are_a_saddle():
    """With V = 0 the hyper weight gets no gradient; with both 0 neither does."""
    layer, x, h = linear(), randn(8, 5), randn(8, 3, seed=1)
    with torch.no_grad():
        layer.weight_gate.zero_()
    layer(x, h).square().sum().backward()
    assert not layer.hyper_weight.grad.any() and layer.weight_gate.grad.abs().max() > 0.1
    layer.zero_grad()
    with torch.no_grad():
        layer.hyper_weight.zero_()
    layer(x, h).square().sum().backward()
    assert not layer.hyper_weight.grad.any() and not layer.weight_gate.grad.any()


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_autocast_compile_and_vmap(kind):
    make = linear if kind == "linear" else conv
    layer = make(dtype=torch.float32)
    x = randn(*((6, 5) if kind == "linear" else (6, 4, 8, 8)), dtype=torch.float32)
    h = randn(6, 3, seed=1, dtype=torch.float32)
    expected, norms = layer(x, h), layer.squared_norm(h)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x, h)
        # Gates stay in float32: a perturbation of 0.001 beside 5 is seen by them.
        near = layer._gates(torch.tensor([5.0, 5.0, 5.001]), x, 0 if kind == "linear" else 2)[0]
        assert near.dtype == torch.float32
        assert not torch.equal(near, layer._gates(torch.tensor([5.0, 5.0, 5.0]), x, 0 if kind == "linear" else 2)[0])
        assert layer.squared_norm(h).dtype == torch.float32
        torch.testing.assert_close(layer.squared_norm(h), norms)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05)
    half.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, h), expected)
    torch.testing.assert_close(compiled(x), layer(x))
    if kind == "linear":
        each = torch.func.vmap(lambda x, h: layer(x, h))(x, h)
        torch.testing.assert_close(each, expected)
        jacobian = torch.func.jacrev(lambda h: layer(x[0], h))(h[0])
        gate = layer.weight_gate * (layer.hyper_weight @ x[0])[:, None] + layer.bias_gate * layer.hyper_bias[:, None]
        torch.testing.assert_close(jacobian, gate)


def test_layers_at_extremes():
    layer = linear(dtype=torch.float32)
    for value in (1e4, -1e4):
        h = torch.full((2, 3), value, requires_grad=True)
        output = layer(torch.ones(2, 5), h)
        output.sum().backward()
        assert output.isfinite().all() and h.grad.isfinite().all() and layer.squared_norm(h).isfinite().all()
    assert layer(torch.empty(0, 5)).shape == (0, 4)
    transposed = torch.randn(5, 6).T
    torch.testing.assert_close(layer(transposed, h[0].detach()), layer(transposed.contiguous(), h[0].detach()))


def test_bad_layers():
    x, layer = randn(4, 5), linear()
    for h in (randn(4, 2), randn(3, 3), randn(1, 3), randn(4), randn(4, 3, 1), torch.tensor(1.0).double()):
        with pytest.raises(ValueError, match="h must have shape"):
            layer(x, h)
    with pytest.raises(ValueError, match="h must have shape"):
        layer(randn(5), randn(5, 3))
    with pytest.raises(TypeError, match="dtype of the layer"):
        layer(x, randn(4, 3).float())
    with pytest.raises(TypeError, match="h must be a floating-point"):
        layer(x, torch.ones(4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"h must have shape \(3,\)"):
        layer.effective_weight(randn(4, 3))
    with pytest.raises(ValueError, match="x must have shape"):
        conv()(randn(4, 5, 5), randn(3))
    for arguments, name in (((0, 1, 1), "in_features"), ((1, 0, 1), "out_features"), ((1, 1, 0), "num_hparams")):
        with pytest.raises(ValueError, match=name):
            S.BestResponseLinear(*arguments)
    with pytest.raises(TypeError, match="in_features"):
        S.BestResponseLinear(1.5, 1, 1)
    with pytest.raises(ValueError, match="groups"):
        S.BestResponseConv2d(3, 4, 3, 1, groups=2)
    with pytest.raises(ValueError, match="kernel_size"):
        S.BestResponseConv2d(3, 4, 0, 1)
    with pytest.raises(ValueError, match="padding"):
        S.BestResponseConv2d(3, 4, 3, 1, padding=-1)
    assert "num_hparams=3" in repr(linear()) and "stride=2" in repr(conv(stride=2))


# ---- hyperparameters -----------------------------------------------------------------------------------------------

INTERVALS = [(0.0, 0.9), (0.0, math.inf), (-math.inf, 1.0), (-2.0, 3.0), (-math.inf, math.inf)]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(INTERVALS), st.floats(-30, 30))
def test_maps_are_inverses(interval, x):
    low, high = interval
    value = torch.tensor(x, dtype=DOUBLE)
    r = S.bounded(value, low, high)
    assert low <= r <= high
    if low + 1e-9 < r < high - 1e-9:
        inverse = S.unbounded(r, low, high)
        torch.testing.assert_close(S.bounded(inverse, low, high), r, rtol=1e-10, atol=1e-10)


def test_maps_by_hand():
    values = torch.tensor([0.05, 0.45, 0.89], dtype=DOUBLE)
    assert S.unbounded(values, 0, 0.9)[1] == pytest.approx(0, abs=1e-15)
    assert S.unbounded(values, 0, 0.9)[0] == pytest.approx(math.log(0.05 / 0.85))
    assert S.bounded(torch.tensor(0.0).double(), 1, math.inf) == pytest.approx(1 + math.log(2))
    assert S.bounded(torch.tensor(0.0).double(), -math.inf, 1) == pytest.approx(1 - math.log(2))
    assert S.bounded(torch.tensor(25.0).double(), 0, math.inf) == 25 + math.log1p(math.exp(-25))
    for low, high in INTERVALS:
        sign = -1 if low == -math.inf and high == 1 else 1  # that map falls, as in the paper's code
        assert (S.bounded(torch.linspace(-3, 3, 9), low, high).diff() * sign > 0).all()
    for value in (50.0, 1e-6, 1e-3, 1.0, 700.0):
        inverse = S.softplus_inverse(torch.tensor(value, dtype=DOUBLE))
        assert inverse.isfinite() and torch.logaddexp(inverse, torch.zeros(()).double()).item() == pytest.approx(
            value, rel=1e-9
        )
    assert S.softplus_inverse(torch.tensor(math.log(2))).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("low, high", INTERVALS)
def test_maps_at_extremes(low, high):
    x = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4], requires_grad=True)
    r = S.bounded(x, low, high)
    r.sum().backward()
    assert r.isfinite().all() and x.grad.isfinite().all()
    assert torch.autograd.gradcheck(
        lambda x: S.bounded(x, low, high), (torch.linspace(-3, 3, 5, dtype=DOUBLE, requires_grad=True),)
    )


def test_discrete_values():
    spec = one("length", 0, 24, 4.5, discrete=True)
    x = torch.cat([torch.linspace(-50, 50, 2001), torch.tensor([-1e4, 1e4])]).requires_grad_()
    values = spec.constrain(x)
    assert values.unique().tolist() == list(range(24))  # 24 itself is not in the open interval
    assert values[-1] == 23 and values[-2] == 0
    values.sum().backward()
    assert not x.grad.any()
    assert one("holes", 0, 2.5, 1.5, discrete=True).constrain(torch.tensor([1e4])).item() == 2
    assert one("depth", 1, math.inf, 3.5, discrete=True).constrain(torch.tensor([-1e4, 5.3])).tolist() == [1, 6]
    assert one("below", -math.inf, 3, 1.5, discrete=True).constrain(torch.tensor([-1e4, 1e4])).tolist() == [2, -9997]
    hparams = S.HyperparameterSet([spec])
    assert hparams.values() == {"length": 4.0}


def test_set_starts_where_it_should():
    specs = [one("a", 0, 0.9, 0.05), one("b", 0, math.inf, 2.0, scale=1.3), one("c", -math.inf, 1, 0.5)]
    hparams = S.HyperparameterSet(specs, dtype=DOUBLE)
    assert hparams.values() == pytest.approx({"a": 0.05, "b": 2.0, "c": 0.5})
    assert hparams.scale.tolist() == pytest.approx([0.5, 1.3, 0.5]) and len(hparams) == 3
    assert S.HyperparameterSet(specs).unconstrained.dtype == torch.float32
    constrained = hparams.constrain(randn(2, 4, 3))
    assert {name: value.shape for name, value in constrained.items()} == dict.fromkeys("abc", (2, 4))
    h = randn(5, 3).requires_grad_()
    sum(value.sum() for value in hparams.constrain(h).values()).backward()
    assert (h.grad != 0).all()  # not detached
    assert set(hparams.state_dict()) == {"unconstrained", "raw_scale"} and repr(hparams).count("a, b, c") == 1


def test_entropy():
    hparams = S.HyperparameterSet([one(scale=1.0)], dtype=DOUBLE)
    assert hparams.entropy().item() == pytest.approx(1.4189385332, abs=1e-9)
    assert torch.autograd.grad(hparams.entropy(), hparams.raw_scale)[0] > 0
    with torch.no_grad():
        hparams.raw_scale.zero_()  # exercise of the chapter
    assert torch.autograd.grad(hparams.entropy(), hparams.raw_scale)[0].item() == pytest.approx(0.5 / math.log(2))
    several = S.HyperparameterSet([one("a", scale=0.2), one("b", scale=3.0)], dtype=DOUBLE)
    assert several.entropy().item() == pytest.approx(math.log(0.2) + math.log(3.0) + 2 * ENTROPY)
    normal = torch.distributions.Normal(torch.zeros(2), torch.tensor([0.2, 3.0]))
    assert several.entropy().item() == pytest.approx(normal.entropy().sum().item(), rel=1e-6)
    for dtype in (torch.float32, DOUBLE):
        hparams = S.HyperparameterSet([one()], dtype=dtype)
        for raw in (-1e4, -200.0, -20.001, -19.999, 0.0, 30.0, 1e4):
            with torch.no_grad():
                hparams.raw_scale.fill_(raw)
            entropy = hparams.entropy()
            assert entropy.isfinite() and torch.autograd.grad(entropy, hparams.raw_scale)[0].isfinite().all()
            expected = raw if raw < -50 else math.log(np.logaddexp(0, raw))
            assert entropy.item() - ENTROPY == pytest.approx(expected, rel=1e-6)


def test_perturb():
    specs = [one("a", scale=0.5), one("b", scale=2.0), one("c", scale=1.0, per_example=False)]
    hparams = S.HyperparameterSet(specs, dtype=DOUBLE)
    h = hparams.perturb(100_000, torch.Generator().manual_seed(0))
    noise = h - hparams.unconstrained
    for column, scale in ((0, 0.5), (1, 2.0)):
        assert noise[:, column].mean().abs().item() < 0.05 * scale
        assert noise[:, column].std().item() == pytest.approx(scale, rel=0.05)
    assert (h[:, 2] == h[0, 2]).all() and noise[0, 2] != 0
    assert torch.corrcoef(noise[:, :2].T)[0, 1].abs() < 0.02
    shared = torch.stack(
        [hparams.perturb(1, torch.Generator().manual_seed(s))[0, 2] - hparams.unconstrained[2] for s in range(500)]
    )
    assert shared.std().item() == pytest.approx(1, rel=0.15)
    again = hparams.perturb(100_000, torch.Generator().manual_seed(0))
    assert torch.equal(h, again)
    h[:, 0].sum().backward()
    assert hparams.unconstrained.grad.tolist() == [100_000, 0, 0]
    expected = noise[:, 0].sum().item() / 0.5 * torch.sigmoid(hparams.raw_scale[0]).item()
    assert hparams.raw_scale.grad[0].item() == pytest.approx(expected)


def test_bad_hyperparameters():
    for low, high, init in ((0, 0.9, 0.9), (0, 0.9, 0.0), (0, 0.9, -1), (0, math.inf, 0)):
        with pytest.raises(ValueError, match="init"):
            one("a", low, high, init)
    for low, high in ((1, 1), (2, 1), (math.nan, 1), (math.inf, math.inf), (-math.inf, -math.inf)):
        with pytest.raises(ValueError, match="low must be less"):
            one("a", low, high, 0.5)
    with pytest.raises(TypeError, match="low must be a number"):
        S.bounded(torch.ones(1), "0", 1)
    with pytest.raises(ValueError, match="scale"):
        one(scale=0.0)
    with pytest.raises(TypeError, match="name"):
        one("")
    with pytest.raises(TypeError, match="init"):
        one(init="0.5")
    with pytest.raises(ValueError, match="specs must hold at least one"):
        S.HyperparameterSet([])
    with pytest.raises(ValueError, match="different names"):
        S.HyperparameterSet([one(), one()])
    with pytest.raises(TypeError, match="HyperparameterSpec"):
        S.HyperparameterSet(["rate"])
    hparams = S.HyperparameterSet([one()])
    with pytest.raises(ValueError, match="batch_size"):
        hparams.perturb(0)
    for h in (torch.ones(2), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="h must have 1 columns"):
            hparams.constrain(h)
    for r in (0.0, 0.9, 1.0, math.nan):
        with pytest.raises(ValueError, match="r must lie strictly"):
            S.unbounded(torch.tensor(r), 0, 0.9)
    for y in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="y must be > 0"):
            S.softplus_inverse(torch.tensor(y))
    with pytest.raises(TypeError, match="x must be a floating-point"):
        S.bounded(torch.ones(1, dtype=torch.int64), 0, 1)


# ---- regularizers --------------------------------------------------------------------------------------------------


def test_dropout():
    rates = torch.tensor([0.0, 0.3, 0.8, 1.0], requires_grad=True)
    x = (1 + randn(4, 50_000).abs().float()).requires_grad_()
    y = S.dropout_per_example(x, rates)
    assert torch.equal(y[0], x[0]) and not y[3].any()
    for i in (1, 2):
        dropped = y[i] == 0
        assert dropped.float().mean().item() == pytest.approx(rates[i].item(), abs=0.01)
        torch.testing.assert_close(y[i][~dropped], x[i][~dropped] / (1 - rates[i]))
        assert y[i].mean().item() == pytest.approx(x[i].mean().item(), rel=0.02)
    y.sum().backward()
    assert rates.grad is None and x.grad.isfinite().all() and not x.grad[3].any()
    assert S.dropout_per_example(x, rates, training=False) is x
    channels = S.dropout_per_example(torch.ones(3, 400, 2, 2), torch.tensor(0.5), shared_dims=2)
    assert (channels == channels[..., :1, :1]).all() and 0.4 < (channels == 0).float().mean() < 0.6
    half = S.dropout_per_example(torch.ones(2, 8, dtype=torch.bfloat16), torch.tensor([0.5, 0.5]))
    assert half.dtype == torch.bfloat16
    a, b = (S.dropout_per_example(x, rates, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)


def test_dropout_is_torch_s_in_law():
    """With one rate: the same mean and variance as torch's."""
    x = torch.ones(1, 200_000)
    torch.manual_seed(0)
    ours, theirs = S.dropout_per_example(x, torch.tensor([0.4])), F.dropout(x, 0.4)
    assert sorted(ours.unique().tolist()) == pytest.approx(sorted(theirs.unique().tolist()))
    assert ours.var().item() == pytest.approx(theirs.var().item(), rel=0.02)


def test_noise():
    scales, x = torch.tensor([0.0, 0.5, 2.0], requires_grad=True), torch.full((3, 40_000), 3.0)
    for multiplicative in (False, True):
        y = S.noise_per_example(x, scales, multiplicative=multiplicative)
        assert torch.equal(y[0], x[0])
        for i in (1, 2):
            expected = scales[i].item() * (3 if multiplicative else 1)
            assert y[i].std().item() == pytest.approx(expected, rel=0.02)
            assert y[i].mean().item() == pytest.approx(3, abs=0.05)
        assert not y.requires_grad
    assert S.noise_per_example(x, scales, training=False) is x
    scaled = S.noise_per_example(torch.arange(1, 7.0).repeat(3, 1), scales, multiplicative=True, shared_dims=1)
    torch.testing.assert_close(scaled / torch.arange(1, 7.0), (scaled[:, :1]).expand(3, 6))
    assert scaled[1, 0] != scaled[2, 0]


def test_cutout():
    torch.manual_seed(0)
    images = torch.rand(300, 3, 12, 10) + 1
    lengths = torch.tensor([0.0, 1.0, 4.0, 5.9]).repeat(75)
    holes = torch.arange(300) % 3
    y = S.cutout_per_example(images, lengths, holes.float(), max_holes=2)
    removed = (y == 0).all(1)
    assert torch.equal(removed, (y == 0).any(1)) and torch.equal(y[~(y == 0)], images[~(y == 0)])
    for i in range(300):
        side, count = int(lengths[i]), int(holes[i])
        area = removed[i].sum().item()
        assert area <= count * side**2 and (area > 0) == (side * count > 0)
        if count == 1 and side:  # one rectangle, whose sides are at most the length
            rows, columns = removed[i].any(1).sum().item(), removed[i].any(0).sum().item()
            assert rows * columns == area and rows <= side and columns <= side
            assert rows >= side // 2 and columns >= side // 2  # its center lies inside
    # A pixel far from the border is covered with probability length² / (H W).
    many = S.cutout_per_example(torch.ones(20_000, 1, 12, 10), torch.tensor(4.0))
    assert (many[:, 0, 6, 5] == 0).float().mean().item() == pytest.approx(16 / 120, rel=0.06)
    assert many[:, 0].amin((1, 2)).max() == 0 and (many[0] == 0).sum() <= 16
    assert S.cutout_per_example(images, lengths, training=False) is images
    whole = S.cutout_per_example(images, torch.tensor(100.0))
    assert not whole.any()


@pytest.mark.parametrize("function", [S.dropout_per_example, S.noise_per_example, S.cutout_per_example])
def test_bad_regularizers(function):
    x = torch.ones(3, 2, 4, 4)
    for strength in (torch.ones(2), torch.ones(3, 1), torch.ones(1)):
        with pytest.raises(ValueError, match=r"must have shape \(\) or \(3,\)"):
            function(x, strength)
    for strength in (torch.tensor(-0.1), torch.tensor([0.1, math.nan, 0.2])):
        with pytest.raises(ValueError, match="must lie in"):
            function(x, strength)
    with pytest.raises(TypeError, match="floating-point"):
        function(x.long(), torch.tensor(0.5))
    with pytest.raises(TypeError, match="floating-point"):
        function(x, torch.tensor(1))
    if function is not S.cutout_per_example:
        with pytest.raises(ValueError, match="x must have a dimension of examples"):
            function(torch.tensor(1.0), torch.tensor(0.5))
        with pytest.raises(ValueError, match="shared_dims"):
            function(x, torch.tensor(0.5), shared_dims=4)
    compiled = torch.compile(lambda x, r: function(x, r), backend="aot_eager", fullgraph=True)
    assert compiled(x, torch.full((3,), 0.5)).shape == x.shape


def test_bad_dropout_and_cutout():
    with pytest.raises(ValueError, match="rates must lie"):
        S.dropout_per_example(torch.ones(2, 2), torch.tensor([0.5, 1.1]))
    with pytest.raises(ValueError, match="holes must lie"):
        S.cutout_per_example(torch.ones(1, 1, 4, 4), torch.tensor(2.0), torch.tensor(2.0))
    with pytest.raises(ValueError, match="images must have 4"):
        S.cutout_per_example(torch.ones(4, 4), torch.tensor(2.0))


# ---- theorems ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 6), st.integers(0, 8), st.sampled_from([-3.0, 0.0, 2.0, 5.0]))
def test_gating_is_the_ridge_solution(seed, columns, more, lam):
    X, t = randn(columns + more + 1, columns, seed=seed), randn(columns + more + 1, seed=seed + 1)
    if torch.linalg.cond(X) > 1e3:
        return
    Q, s, gates = S.linear_best_response(X, t, lam)
    literal = torch.linalg.solve(X.T @ X + math.exp(lam) * torch.eye(columns, dtype=DOUBLE), X.T @ t)
    scale = max(1.0, literal.abs().max().item())
    torch.testing.assert_close(Q.T @ s / scale, literal / scale, rtol=0, atol=1e-9)
    torch.testing.assert_close(S.ridge_response(X, t, lam) / scale, literal / scale, rtol=0, atol=1e-9)
    assert ((0 < gates) & (gates < 1)).all() and (gates.diff() <= 0).all()
    torch.testing.assert_close(Q.norm(dim=1), gates)  # the rows of V^T have length 1


def test_gating_to_the_last_digits():
    X, t = randn(12, 4), randn(12, seed=1)
    for lam in (-3.0, 0.0, 2.0, 5.0):
        Q, s, _ = S.linear_best_response(X, t, lam)
        literal = torch.linalg.solve(X.T @ X + math.exp(lam) * torch.eye(4, dtype=DOUBLE), X.T @ t)
        torch.testing.assert_close(Q.T @ s, literal, rtol=0, atol=1e-12)


def jacobian_penalty_loss(X, t, Q, s, lam):
    """The training loss of the theorem, with the Jacobian by autograd, example by example."""
    output = lambda x: s @ (Q @ x)
    errors = sum((output(x) - y) ** 2 for x, y in zip(X, t, strict=True))
    penalty = sum(torch.func.jacrev(output)(x).square().sum() for x in X)
    return errors + math.exp(lam) / len(X) * penalty


@pytest.mark.parametrize("lam", [-3.0, 0.0, 2.0, 5.0])
def test_gating_is_a_minimum_of_the_penalized_network(lam):
    X, t = randn(9, 3), randn(9, seed=1)
    Q, s, _ = (value.requires_grad_() for value in S.linear_best_response(X, t, lam))
    loss = jacobian_penalty_loss(X, t, Q, s, lam)
    for gradient in torch.autograd.grad(loss, (Q, s)):
        assert gradient.abs().max() < 1e-9
    for seed in range(20):  # no other network has a smaller loss
        other = jacobian_penalty_loss(X, t, Q + 0.3 * randn(3, 3, seed=seed), s + 0.3 * randn(3, seed=seed + 99), lam)
        assert other > loss


def test_gates_by_hand_and_limits():
    X, t = torch.diag(torch.tensor([3.0, 1.0], dtype=DOUBLE)), torch.ones(2, dtype=DOUBLE)
    assert S.linear_best_response(X, t, 0.0)[2].tolist() == pytest.approx([0.9, 0.5])
    assert S.linear_best_response(X, t, math.log(9))[2][0].item() == pytest.approx(0.5)
    assert (S.linear_best_response(X, t, -1e4)[2] == 1).all() and not S.linear_best_response(X, t, 1e4)[2].any()
    path = torch.stack([S.linear_best_response(X, t, lam)[2] for lam in (-9.0, -3.0, 0.0, 3.0, 9.0)])
    assert (path.diff(dim=0) < 0).all() and path[0].min() > 0.999 and path[-1].max() < 0.002
    assert torch.autograd.gradcheck(
        lambda lam: S.linear_best_response(X, t, lam), (torch.tensor(0.3).double().requires_grad_(),)
    )


def test_ridge():
    X, t = randn(20, 6), randn(20, seed=1)
    lam = torch.tensor([[-2.0, 0.0, 1.0], [3.0, 4.0, 5.0]], dtype=DOUBLE)
    path = S.ridge_response(X, t, lam)
    assert path.shape == (2, 3, 6)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(path[i, j], S.ridge_response(X, t, lam[i, j].item()))
    torch.testing.assert_close(S.ridge_response(X, t, lam, mean=True), S.ridge_response(X, t, lam + math.log(20)))
    w = S.ridge_response(X, t, 0.7, mean=True).requires_grad_()
    loss = (X @ w - t).square().mean() + math.exp(0.7) * w.square().sum()
    assert torch.autograd.grad(loss, w)[0].abs().max() < 1e-12
    torch.testing.assert_close(S.ridge_response(X, t, -1e4), torch.linalg.lstsq(X, t).solution)
    assert not S.ridge_response(X, t, 1e4).any()
    # Without full rank: the limit is the pseudo-inverse's, and wide problems are ridge's, too.
    twice = torch.cat([X[:, :3], X[:, :3]], 1)
    torch.testing.assert_close(S.ridge_response(twice, t, -1e4), torch.linalg.pinv(twice) @ t)
    wide = X.T
    literal = torch.linalg.solve(wide.T @ wide + math.exp(0.4) * torch.eye(20, dtype=DOUBLE), wide.T @ t[:6])
    torch.testing.assert_close(S.ridge_response(wide, t[:6], 0.4), literal)
    zero = S.ridge_response(torch.zeros(3, 2), torch.ones(3), 0.0)
    assert not zero.any()
    assert torch.autograd.gradcheck(
        lambda lam: S.ridge_response(X, t, lam), (torch.tensor([0.3, -1.0]).double().requires_grad_(),)
    )


def quadratic(seed, p=4, n=2):
    z = randn(p, p + 2, seed=seed)
    return (
        z @ z.T / p + 0.3 * torch.eye(p, dtype=DOUBLE),
        randn(p, n, seed=seed + 1),
        randn(p, seed=seed + 2),
        randn(n, seed=seed + 3),
    )


def expected_loss(A, B, d, lam, Sigma, w0, Theta):
    """E L_T(lam + e, w0 + Theta e) over all signs of the columns of the root of Sigma: mean 0, covariance Sigma."""
    root, n, total = torch.linalg.cholesky(Sigma), len(lam), 0.0
    for sign in (1.0, -1.0):
        for k in range(n):
            e = sign * math.sqrt(n) * root[:, k]
            w = w0 + Theta @ e
            total = total + w @ A @ w / 2 + w @ B @ (lam + e) + d @ w
    return total / (2 * n)


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_affine_response_is_exact_for_quadratics(seed):
    A, B, d, lam = quadratic(seed)
    z = randn(2, 3, seed=seed + 4)
    Sigma = z @ z.T / 3 + 0.2 * torch.eye(2, dtype=DOUBLE)
    w0, Theta = S.quadratic_response(A, B, d, lam)
    torch.testing.assert_close(w0, -torch.linalg.solve(A, B @ lam + d))
    torch.testing.assert_close(Theta, -torch.linalg.solve(A, B))

    def objective(flat):
        x = torch.tensor(flat, requires_grad=True)
        value = expected_loss(A, B, d, lam, Sigma, x[:4], x[4:].reshape(4, 2))
        return value.item(), torch.autograd.grad(value, x)[0].numpy()

    found = minimize(
        objective, np.zeros(12), jac=True, method="L-BFGS-B", options=dict(ftol=1e-16, gtol=1e-11, maxiter=5000)
    )
    expected = torch.cat([w0, Theta.flatten()]).numpy()
    assert np.abs(found.x - expected).max() < 1e-5 * max(1, np.abs(expected).max())
    assert objective(expected)[0] <= found.fun + 1e-9
    # Without perturbation the Jacobian is not identified.
    free = randn(4, 2, seed=seed + 5).requires_grad_()
    unperturbed = expected_loss(A, B, d, lam, 1e-30 * torch.eye(2, dtype=DOUBLE), w0, free)
    assert torch.autograd.grad(unperturbed, free)[0].abs().max() < 1e-12


def test_best_response_layer_learns_the_affine_response():
    """A layer with constant input is the affine response; phase A alone finds value and Jacobian at the same time."""
    A, B, d, lam = quadratic(3, p=3, n=2)
    torch.manual_seed(0)
    layer = S.BestResponseLinear(1, 3, 2, dtype=DOUBLE)
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    w0, Theta = S.quadratic_response(A, B, d, lam)
    for step in range(3000):
        if step == 2000:
            optimizer.param_groups[0]["lr"] = 0.002
        h = lam + 0.5 * torch.randn(64, 2, dtype=DOUBLE)
        w = layer(torch.ones(64, 1, dtype=DOUBLE), h)
        loss = ((w @ A * w).sum(1) / 2 + (w * (h @ B.T)).sum(1) + w @ d).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    response = lambda h: layer(torch.ones(1, dtype=DOUBLE), h)
    torch.testing.assert_close(response(lam), w0, rtol=0, atol=0.02)
    torch.testing.assert_close(torch.func.jacrev(response)(lam), Theta, rtol=0, atol=0.02)


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(-3, 3))
def test_implicit_hypergradient_of_ridge(seed, start):
    X, t, X_V, t_V = (
        randn(12, 4, seed=seed),
        randn(12, seed=seed + 1),
        randn(9, 4, seed=seed + 2),
        randn(9, seed=seed + 3),
    )
    train = lambda lam, w: (X @ w - t).square().sum() + lam[0].exp() * w.square().sum()
    valid = lambda lam, w: (X_V @ w - t_V).square().mean() + 0.1 * lam[0] ** 2  # it depends on lam directly, too
    lam = torch.tensor([start], dtype=DOUBLE)
    at = lambda value: valid(torch.tensor([value], dtype=DOUBLE), S.ridge_response(X, t, value)).item()
    slope = (at(start + 1e-4) - at(start - 1e-4)) / 2e-4
    found = S.implicit_hypergradient(train, valid, S.ridge_response(X, t, start), lam)
    assert found.shape == (1,) and found.item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_implicit_hypergradient_of_several():
    A, B, d, lam = quadratic(1)
    train = lambda lam, w: w @ A @ w / 2 + w @ B @ lam + d @ w
    valid = lambda lam, w: (w - 1).square().sum() + lam.pow(3).sum()
    w0, Theta = S.quadratic_response(A, B, d, lam)
    expected = 3 * lam**2 + Theta.T @ (2 * (w0 - 1))
    torch.testing.assert_close(S.implicit_hypergradient(train, valid, w0, lam), expected)


def moments(X, t, lam, scale, order=60):
    """The expected objective of the affine response, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    u = lam + scale * torch.tensor(nodes)
    share = torch.tensor(weights / weights.sum())

    def objective(w0, theta):
        w = w0 + u[:, None] * theta
        return share @ ((w @ X.T - t).square().mean(1) + u.exp() * w.square().sum(1))

    return objective


@pytest.mark.parametrize("lam, scale", [(-1.0, 0.1), (0.5, 0.5), (-2.0, 1.0), (1.0, 2.0)])
def test_expected_ridge_response(lam, scale):
    X, t = randn(15, 4), randn(15, seed=1)
    w0, theta = (value.requires_grad_() for value in S.expected_ridge_response(X, t, lam, scale))
    for gradient in torch.autograd.grad(moments(X, t, lam, scale)(w0, theta), (w0, theta)):
        assert gradient.abs().max() < 1e-8
    # The same system in w0 and theta, not centered.
    m0 = math.exp(lam + scale**2 / 2)
    m1, m2 = (lam + scale**2) * m0, ((lam + scale**2) ** 2 + scale**2) * m0
    A, b, eye = X.T @ X / 15, X.T @ t / 15, torch.eye(4, dtype=DOUBLE)
    system = torch.cat(
        [
            torch.cat([A + m0 * eye, lam * A + m1 * eye], 1),
            torch.cat([lam * A + m1 * eye, (lam**2 + scale**2) * A + m2 * eye], 1),
        ]
    )
    literal = torch.linalg.solve(system, torch.cat([b, lam * b]))
    torch.testing.assert_close(torch.cat([w0, theta]).detach(), literal, rtol=1e-7, atol=1e-9)


def test_expected_ridge_response_tends_to_the_tangent():
    X, t = randn(15, 4), randn(15, seed=1)
    lam = torch.tensor(0.3, dtype=DOUBLE)
    response = lambda lam: S.ridge_response(X, t, lam, mean=True)
    value, slope = response(lam), torch.func.jacfwd(response)(lam)
    errors = []
    for scale in (0.2, 0.1, 0.05):
        w0, theta = S.expected_ridge_response(X, t, lam, scale)
        errors.append(max((w0 + lam * theta - value).norm().item(), (theta - slope).norm().item()))
    assert errors[2] < 0.01 and errors[0] / errors[1] == pytest.approx(4, rel=0.1)  # the bias is of order scale²
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("shape", [(15, 4), (4, 15), (1, 1)])
def test_expected_ridge_response_of_many_and_at_extremes(shape):
    X, t = randn(*shape), randn(shape[0], seed=1)
    lams = torch.tensor([[-1e4, -2.0, 0.0], [1.0, 3.0, 1e4]], dtype=DOUBLE)
    w0, theta = S.expected_ridge_response(X, t, lams, 0.7)
    assert w0.shape == theta.shape == (2, 3, shape[1]) and w0.isfinite().all() and theta.isfinite().all()
    for k in np.ndindex(2, 3):
        for many, single in zip((w0, theta), S.expected_ridge_response(X, t, lams[k].item(), 0.7), strict=True):
            torch.testing.assert_close(many[k], single)
    for k in ((0, 1), (0, 2), (1, 0), (1, 1)):
        at = w0[k].requires_grad_(), theta[k].requires_grad_()
        for gradient in torch.autograd.grad(moments(X, t, lams[k], 0.7)(*at), at):
            assert gradient.abs().max() < 1e-7
    least_squares = torch.linalg.pinv(X) @ t
    torch.testing.assert_close(w0[0, 0] - 1e4 * theta[0, 0], least_squares)
    assert not theta[0, 0].any() and not w0[1, 2].any() and not theta[1, 2].any()
    slope = torch.func.jacfwd(lambda lam: S.ridge_response(X, t, lam, mean=True))(lams[0, 1])
    torch.testing.assert_close(
        S.expected_ridge_response(X, t, -2.0, 1e-9)[1], slope
    )  # no cancellation for a tiny scale


def test_entropy_weight_sets_the_scale():
    """E (a/2)(scale z)² - tau H is least at scale = sqrt(tau / a), reached from both sides; without tau the scale falls all the way."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    nodes, share = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    a, tau = 2.0, 0.08
    for start in (0.02, 3.0):
        hparams = S.HyperparameterSet([one("u", -math.inf, math.inf, 0.0, scale=start)], dtype=DOUBLE)
        optimizer = torch.optim.Adam([hparams.raw_scale], 0.05)
        for _ in range(1500):
            optimizer.zero_grad()
            (share @ (a / 2 * (hparams.scale * nodes) ** 2) - tau * hparams.entropy()).backward()
            optimizer.step()
        assert hparams.scale.item() == pytest.approx(math.sqrt(tau / a), rel=1e-3)
    hparams = S.HyperparameterSet([one("u", -math.inf, math.inf, 0.0, scale=1.0)], dtype=DOUBLE)
    optimizer, scales = torch.optim.SGD([hparams.raw_scale], 0.3), [1.0]
    for _ in range(200):
        optimizer.zero_grad()
        (share @ torch.cosh(hparams.scale * nodes)).backward()  # convex
        optimizer.step()
        scales.append(hparams.scale.item())
    assert (np.diff(scales) < 0).all() and scales[-1] < 0.1
    hparams = S.HyperparameterSet([one("u", -math.inf, math.inf, 0.0, scale=0.3)], dtype=DOUBLE)
    (share @ torch.cos(hparams.scale * nodes)).backward()  # concave around 0
    assert hparams.raw_scale.grad < 0


def test_bad_exact_responses():
    X, t = randn(6, 3), randn(6, seed=1)
    for function in (
        S.ridge_response,
        S.linear_best_response,
        lambda X, t, lam: S.expected_ridge_response(X, t, lam, 0.5),
    ):
        with pytest.raises(ValueError, match="t must have shape"):
            function(X, t[:5], 0.0)
        with pytest.raises(ValueError, match="X must be finite"):
            function(torch.full_like(X, math.nan), t, 0.0)
        with pytest.raises(ValueError, match="X must have 2"):
            function(t, t, 0.0)
        with pytest.raises(TypeError, match="lam must have the dtype"):
            function(X, t, torch.tensor(0.0))
        with pytest.raises(ValueError, match="lam must be finite"):
            function(X, t, math.inf)
    with pytest.raises(ValueError, match=r"lam must have shape \(\)"):
        S.linear_best_response(X, t, torch.zeros(2, dtype=DOUBLE))
    with pytest.raises(ValueError, match="independent columns"):
        S.linear_best_response(torch.cat([X, X], 1)[:, :4], t, 0.0)
    with pytest.raises(ValueError, match="independent columns"):
        S.linear_best_response(X[:2], t[:2], 0.0)
    with pytest.raises(ValueError, match="scale"):
        S.expected_ridge_response(X, t, 0.0, 0.0)
    A, B, d, lam = quadratic(0)
    for bad in (-A, A + torch.triu(torch.ones(4, 4), 1)):
        with pytest.raises(ValueError, match="positive definite"):
            S.quadratic_response(bad, B, d, lam)
    with pytest.raises(ValueError, match="d must have shape"):
        S.quadratic_response(A, B, d[:2], lam)
    with pytest.raises(ValueError, match="positive definite"):
        S.implicit_hypergradient(
            lambda lam, w: -w.square().sum() * lam.sum(), lambda lam, w: w.sum(), torch.ones(2), torch.ones(1)
        )
    with pytest.raises(TypeError, match="lam must have the dtype"):
        S.implicit_hypergradient(lambda lam, w: w.sum(), lambda lam, w: w.sum(), torch.ones(2), torch.ones(1).double())


# ---- training ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two best-response layers with dropout between them."""

    def __init__(self, n=2):
        super().__init__()
        self.first, self.second = S.BestResponseLinear(6, 16, n), S.BestResponseLinear(16, 3, n)

    def forward(self, x, h=None, rates=None, training=False):
        hidden = F.relu(self.first(x, h))
        if rates is not None:
            hidden = S.dropout_per_example(hidden, rates["dropout"], training)
        return self.second(hidden, h)


def batches(count, size=8, seed=0):
    X = randn(count, size, 6, seed=seed, dtype=torch.float32)
    return [(x, x[:, :3].argmax(1)) for x in X]


def train_loss(model, batch, h, rates):
    x, labels = batch
    penalty = rates["penalty"] * (model.first.squared_norm(h) + model.second.squared_norm(h))
    return F.cross_entropy(model(x, h, rates, model.training), labels) + penalty.mean()


def valid_loss(model, batch, h):
    assert not model.training
    return F.cross_entropy(model(batch[0], h), batch[1])


SPECS = [one("dropout", 0, 0.9, 0.3), one("penalty", 0, math.inf, 0.01, per_example=False)]


def trainer(seed=0, model=None, losses=(train_loss, valid_loss), **options):
    torch.manual_seed(seed)
    model, hparams = model or Net(), S.HyperparameterSet(SPECS)
    tune = options.get("tune_scale", True)
    return S.STNTrainer(
        model, hparams, *losses, opt_w=torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), opt_h=torch.optim.Adam([hparams.unconstrained], 0.03),
        opt_s=torch.optim.Adam([hparams.raw_scale], 0.03) if tune else None, **options,
    )  # fmt: skip


def snapshot(module):
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def changed(before, module):
    return {name for name, value in module.named_parameters() if not torch.equal(before[name], value)}


def test_each_phase_leaves_the_other_s_parameters_alone():
    t = trainer()
    weights, hyper = snapshot(t.model), snapshot(t.hparams)
    t._fit_response(batches(1)[0])
    assert changed(weights, t.model) == set(weights) and not changed(hyper, t.hparams)
    assert t.hparams.unconstrained.grad is None and t.hparams.raw_scale.grad is None
    t.opt_w.zero_grad()
    weights = snapshot(t.model)
    t.model.eval()
    t._move_hyperparameters(batches(1, seed=1)[0])
    assert not changed(weights, t.model) and changed(hyper, t.hparams) == {"unconstrained", "raw_scale"}
    assert all(p.grad is None for p in t.model.parameters())


def test_step_is_a_literal_recursion():
    """Two steps of plain gradient descent, written out with the same draws."""
    torch.manual_seed(0)
    model, hparams = Net(), S.HyperparameterSet(SPECS)
    twin, other = copy.deepcopy(model), copy.deepcopy(hparams)
    generator = torch.Generator().manual_seed(7)
    t = S.STNTrainer(
        model, hparams, train_loss, valid_loss, opt_w=torch.optim.SGD(model.parameters(), 0.1), opt_h=torch.optim.SGD([hparams.unconstrained], 0.2),
        opt_s=torch.optim.SGD([hparams.raw_scale], 0.3), entropy_weight=0.01, generator=torch.Generator().manual_seed(7),
    )  # fmt: skip
    train, valid = batches(4), batches(2, size=5, seed=9)
    torch.manual_seed(1)
    results = [t.step(train[:2], valid[:1]), t.step(train[2:], valid[1:])]
    torch.manual_seed(1)
    for k in range(2):
        losses = []
        for batch in train[2 * k : 2 * k + 2]:
            z = torch.randn(8, 2, generator=generator)
            z[:, 1] = z[0, 1]
            h = (other.unconstrained + F.softplus(other.raw_scale) * z).detach()
            rates = {"dropout": 0.9 * torch.sigmoid(h[:, 0]), "penalty": F.softplus(h[:, 1])}
            twin.train()
            loss = train_loss(twin, batch, h, rates)
            losses.append(loss.item())
            for p, g in zip(twin.parameters(), torch.autograd.grad(loss, list(twin.parameters())), strict=True):
                p.data -= 0.1 * g
        z = torch.randn(5, 2, generator=generator)
        z[:, 1] = z[0, 1]
        scale = F.softplus(other.raw_scale)
        twin.eval()
        loss = valid_loss(twin, valid[k], other.unconstrained + scale * z)
        entropy = (scale * math.sqrt(2 * math.pi * math.e)).log().sum()
        a, b = torch.autograd.grad(loss - 0.01 * entropy, [other.unconstrained, other.raw_scale])
        other.unconstrained.data -= 0.2 * a
        other.raw_scale.data -= 0.3 * b
        assert results[k]["train_loss"].item() == pytest.approx(sum(losses) / 2, rel=1e-5)
        assert results[k]["valid_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(hparams.unconstrained, other.unconstrained)
    torch.testing.assert_close(hparams.raw_scale, other.raw_scale)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_warm_up_history_and_modes():
    t = trainer(warmup=2, valid_steps=3)
    start = t.hparams.unconstrained.detach().clone()
    t.model.eval()
    train, valid = iter(batches(40)), iter(batches(40, seed=1))
    for k in range(4):
        result = t.step(train, valid)
        assert math.isnan(result["valid_loss"]) == (k < 2) and not t.model.training
        assert torch.equal(t.hparams.unconstrained, start) == (k < 2)
    assert t.steps == 4 and len(list(train)) == 32 and len(list(valid)) == 34  # none is taken in the warm-up
    history = torch.stack(t.history["unconstrained"])
    assert history.shape == (4, 2) and torch.equal(history[2], start) and not torch.equal(history[3], start)
    assert len(t.history["scale"]) == 4
    schedule = t.schedule()
    assert schedule["dropout"].tolist()[:3] == pytest.approx([0.3] * 3)
    torch.testing.assert_close(schedule["dropout"][3], 0.9 * torch.sigmoid(history[3, 0]))
    rates = S.replayed_rates(schedule, 7, 5)
    assert rates["dropout"].shape == (5,) and (rates["dropout"] == schedule["dropout"][3]).all()
    assert S.replayed_rates(schedule, 10**6, 1, train_steps=3)["penalty"] == schedule["penalty"][3]
    ramp = {"rate": torch.tensor([0.1, 0.2, 0.3, 0.4])}
    assert [S.replayed_rates(ramp, k, 1)["rate"].item() for k in range(5)] == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3])
    assert S.replayed_rates(ramp, 5, 1, train_steps=3)["rate"].item() == pytest.approx(0.2)
    assert S.replayed_rates(schedule, 3, 1, train_steps=1)["dropout"] == schedule["dropout"][3]
    t.model.train()
    with pytest.raises(ValueError, match="valid_batches must give 3"):
        t.step(batches(2), iter(batches(2)))
    t.step(batches(2), batches(3))
    assert t.model.training


def test_fixed_scale():
    """Without tuning, sigma stays and phase B sees lambda itself, the same for all examples."""
    seen = []

    def watched(model, batch, h):
        seen.append(h)
        return valid_loss(model, batch, h)

    t = trainer(losses=(train_loss, watched), tune_scale=False)
    raw = t.hparams.raw_scale.detach().clone()
    for _ in range(3):
        t.step(batches(2), batches(1))
    assert torch.equal(t.hparams.raw_scale, raw) and all(h.shape == (2,) for h in seen)


def test_plain_layers_bit_for_bit():
    """With h = None everywhere, training is that of plain layers."""
    t = trainer(
        losses=(lambda model, batch, h, rates: F.cross_entropy(model(batch[0]), batch[1]), valid_loss), warmup=10**9
    )
    plain = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    plain[0].load_state_dict({k: v for k, v in t.model.first.state_dict().items() if k in ("weight", "bias")})
    plain[2].load_state_dict({k: v for k, v in t.model.second.state_dict().items() if k in ("weight", "bias")})
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9)
    for k in range(10):
        train = batches(2, seed=k)
        t.step(train, iter(()))
        for x, labels in train:
            optimizer.zero_grad()
            F.cross_entropy(plain(x), labels).backward()
            optimizer.step()
    for layer, ours in ((plain[0], t.model.first), (plain[2], t.model.second)):
        assert torch.equal(layer.weight, ours.weight) and torch.equal(layer.bias, ours.bias)
        assert ours.hyper_weight.grad is None


@pytest.mark.parametrize("tune_scale", [True, False])
@pytest.mark.parametrize("own_generator", [True, False])
def test_state_dict_in_the_middle_of_a_run(tune_scale, own_generator):
    generator = lambda: {"generator": torch.Generator().manual_seed(3)} if own_generator else {}
    train, valid = batches(40), batches(20, seed=1)
    whole = trainer(tune_scale=tune_scale, warmup=2, **generator())
    for k in range(8):
        whole.step(train[2 * k : 2 * k + 2], [valid[k]])
    file = io.BytesIO()
    torch.save({"trainer": whole.state_dict(), "random": torch.get_rng_state()}, file)
    results = [whole.step(train[2 * k : 2 * k + 2], [valid[k]]) for k in range(8, 16)]
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = trainer(seed=99, tune_scale=tune_scale, warmup=2, **generator())
    other.load_state_dict(saved["trainer"])
    torch.set_rng_state(saved["random"])
    again = [other.step(train[2 * k : 2 * k + 2], [valid[k]]) for k in range(8, 16)]
    for a, b in zip(results, again, strict=True):
        assert torch.equal(a["train_loss"], b["train_loss"]) and torch.equal(a["valid_loss"], b["valid_loss"])
    for module in ("model", "hparams"):
        for p, q in zip(getattr(whole, module).parameters(), getattr(other, module).parameters(), strict=True):
            assert torch.equal(p, q)
    assert other.steps == whole.steps == 16
    for name in ("unconstrained", "scale"):
        assert torch.equal(torch.stack(whole.history[name]), torch.stack(other.history[name]))
    assert {name: len(values) for name, values in whole.schedule().items()} == {"dropout": 16, "penalty": 16}


def test_state_dict_before_the_first_step():
    t = trainer()
    state = copy.deepcopy(t.state_dict())
    t.step(batches(2), batches(1))
    t.load_state_dict(state)
    assert t.steps == 0 and t.history == {"unconstrained": [], "scale": []}
    with pytest.raises(ValueError, match="at least one step"):
        t.schedule()
    with pytest.raises(ValueError, match="state must have the parts"):
        trainer(tune_scale=False).load_state_dict(state)


def test_compiled_and_autocast():
    train, valid = batches(12), batches(6, seed=1)
    plain, compiled = trainer(), trainer(model=None)
    compiled.model = torch.compile(compiled.model, backend="aot_eager")
    results = []
    for t in (plain, compiled):
        torch.manual_seed(5)
        results.append([t.step(train[2 * k : 2 * k + 2], [valid[k]]) for k in range(6)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a["train_loss"], b["train_loss"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.hparams.unconstrained, compiled.hparams.unconstrained, rtol=1e-4, atol=1e-4)

    def half(loss):
        def run(*arguments):
            with torch.autocast("cpu", torch.bfloat16):
                return loss(*arguments)

        return run

    amp = trainer(losses=(half(train_loss), half(valid_loss)))
    for k in range(6):
        torch.manual_seed(5) if k == 0 else None
        result = amp.step(train[2 * k : 2 * k + 2], [valid[k]])
    assert result["train_loss"].dtype == torch.float32 and result["train_loss"].isfinite()
    assert amp.hparams.unconstrained.dtype == torch.float32
    torch.testing.assert_close(amp.hparams.unconstrained, plain.hparams.unconstrained, rtol=0.05, atol=0.1)


def test_clipping_and_batch_sizes():
    sizes = []

    def counted(model, batch, h, rates):
        sizes.append(len(h))
        return 1e3 * (model.first.squared_norm(h).mean() + model(batch["x"], h[: len(batch["x"])]).mean())

    valid = lambda model, batch, h: model(batch["x"], h[: len(batch["x"])]).square().mean()
    data = [{"x": torch.ones(3, 6)}] * 2
    for size, expected in ((None, 3), (11, 11), (lambda batch: 2 * len(batch["x"]), 6)):
        t = trainer(losses=(counted, valid), batch_size=size, max_grad_norm=0.5)
        before = snapshot(t.model)
        t.step(data, data[:1])
        assert sizes[-2:] == [expected] * 2
        moved = math.sqrt(sum((before[n] - p).square().sum().item() for n, p in t.model.named_parameters()))
        assert moved <= 0.05 * (0.5 + 0.5 * 1.9) + 1e-6  # two steps with momentum, gradients clipped to 0.5
    t = trainer(losses=(lambda model, x, h, rates: model(x, h).mean(), lambda model, x, h: model(x, h).square().mean()))
    t.step([torch.ones(4, 6)] * 2, [torch.ones(4, 6)])


def test_ridge_run_ends_at_the_fixed_point():
    """Alternation on ridge regression stops where the expected phases rest, near the optimum."""
    X, t, X_V, t_V = randn(20, 8), randn(20, seed=1), randn(40, 8, seed=2), randn(40, seed=3)
    true = randn(8, seed=4) / 2
    t, t_V = X @ true + t, X_V @ true + t_V
    torch.manual_seed(0)
    layer = S.BestResponseLinear(8, 1, 1, bias=False, dtype=DOUBLE)
    hparams = S.HyperparameterSet([one("log_penalty", -math.inf, math.inf, -3.0, scale=0.5)], dtype=DOUBLE)

    def train(model, batch, h, rates):
        errors = (model(X.expand(len(h), *X.shape), h)[..., 0] - t).square().mean(1)
        return (errors + rates["log_penalty"].exp() * model.squared_norm(h)).mean()

    valid = lambda model, batch, h: (model(X_V, h)[:, 0] - t_V).square().mean()
    opt_w, opt_h = torch.optim.Adam(layer.parameters(), 0.02), torch.optim.Adam([hparams.unconstrained], 0.02)
    run = S.STNTrainer(
        layer, hparams, train, valid, opt_w=opt_w, opt_h=opt_h, tune_scale=False, warmup=200, batch_size=16
    )
    for _ in range(900):
        run.step([None] * 2, [None])

    def slope(lam):
        w0, theta = S.expected_ridge_response(X, t, lam, 0.5)
        return (theta @ (X_V.T @ (X_V @ (w0 + lam * theta) - t_V))).item()

    rest = brentq(slope, -8, 3)
    path = torch.stack(run.history["unconstrained"])[-200:].mean().item()
    loss = lambda lam: (X_V @ S.ridge_response(X, t, lam, mean=True) - t_V).square().mean().item()
    best = min(loss(lam) for lam in np.linspace(-8, 4, 241))
    assert abs(path - rest) < 0.3 and loss(path) < best + 0.01 < loss(-3.0)


def test_bad_trainers():
    t = trainer()
    model, hparams = t.model, t.hparams
    sgd = lambda *params: torch.optim.SGD(params, 0.1)
    good = dict(opt_w=sgd(*model.parameters()), opt_h=sgd(hparams.unconstrained), opt_s=sgd(hparams.raw_scale))

    def make(**options):
        return S.STNTrainer(model, hparams, train_loss, valid_loss, **good | options)

    for options, match in (
        (dict(opt_s=None), "opt_s must be given"),
        (dict(tune_scale=False), "opt_s must be given"),
        (dict(opt_h=sgd(hparams.raw_scale)), "opt_h must hold"),
        (dict(opt_h=sgd(*hparams.parameters())), "opt_h must hold"),
        (dict(opt_s=sgd(hparams.unconstrained)), "opt_s must hold"),
        (dict(opt_w=sgd(*model.parameters(), hparams.unconstrained)), "opt_w must not"),
        (dict(entropy_weight=-1e-3), "entropy_weight"),
        (dict(train_steps=0), "train_steps"),
        (dict(valid_steps=0), "valid_steps"),
        (dict(warmup=-1), "warmup"),
        (dict(max_grad_norm=0.0), "max_grad_norm"),
        (dict(batch_size=0), "batch_size"),
    ):
        with pytest.raises(ValueError, match=match):
            make(**options)
    with pytest.raises(TypeError, match="hparams"):
        S.STNTrainer(model, [one()], train_loss, valid_loss, **good)
    before = snapshot(model)
    for train, valid in ((batches(1), batches(1)), (batches(3), batches(1)), (batches(2), [])):
        with pytest.raises(ValueError, match="batches must"):
            make().step(train, valid)
    assert not changed(before, model)
    with pytest.raises(ValueError, match="depend on h"):
        deaf = S.STNTrainer(model, hparams, train_loss, lambda m, batch, h: m(batch[0]).mean(), **good)
        deaf.step(batches(2), batches(1))
    for batch in (None, "text", [], ["text"]):
        with pytest.raises(TypeError, match="batch_size must be given"):
            make().step([batch] * 2, [batch])
    with pytest.raises(ValueError, match="update"):
        S.replayed_rates({"a": torch.ones(2)}, -1, 3)
    with pytest.raises(ValueError, match="schedule"):
        S.replayed_rates({"a": torch.ones(2, 2)}, 0, 3)
