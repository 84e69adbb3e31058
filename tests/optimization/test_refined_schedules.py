"""Tests of ``lossbook.optimization.refined_schedules``."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter1d
from scipy.optimize import minimize
from torch import nn
from torch.optim import lr_scheduler as torch_schedules

from lossbook.optimization import refined_schedules as R

F64 = torch.float64
seeds = st.integers(0, 2**32 - 1)


def positive(generator, *shape, spread=1.0):
    """Log-normal numbers."""
    return (spread * torch.randn(*shape, generator=generator, dtype=F64)).exp()


def norm_curve(end, n=2000):
    """The synthetic norms of the official repository: a steep fall in the first tenth, then a line to ``end``."""
    line = np.interp(np.linspace(0, 1, n), [0, 0.003, 0.02, 0.03, 0.1, 1], [15, 6, 4, 2, 1, end])
    return torch.from_numpy(gaussian_filter1d(line, 40, mode="nearest"))


# Oracles: loops that follow the equations


def slow_identity(q, w):
    q, w, T = q.tolist(), w.tolist(), len(q)
    mean = sum(w[t] * q[t] for t in range(T)) / sum(w)
    correction = sum(
        w[k] / (sum(w[k:]) * sum(w[k + 1 :])) * sum(w[t] * (q[t] - q[k]) for t in range(k + 1, T)) for k in range(T - 1)
    )
    return mean, correction


def slow_rates(w):
    w = w.tolist()
    return [w[t] * sum(w[t + 1 :]) / sum(w) for t in range(len(w))]


def slow_schedule_bound(eta, G, D):
    eta, G, T = eta.tolist(), G.tolist(), len(eta)

    def squares(k):
        return sum(eta[t] ** 2 * G[t] ** 2 for t in range(k, T))

    total = D**2 / (2 * sum(eta)) + squares(0) / (2 * sum(eta))
    return total + 0.5 * sum(eta[k] / (sum(eta[k:]) * sum(eta[k + 1 :])) * squares(k) for k in range(T - 1))


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(2, 50))
def test_identity_and_its_oracle(seed, T):
    g = torch.Generator().manual_seed(seed)
    q, w = torch.randn(T, generator=g, dtype=F64), positive(g, T)
    mean, correction = R.last_iterate_identity(q, w)
    assert mean + correction == pytest.approx(q[-1].item(), abs=1e-12)
    assert (mean.item(), correction.item()) == pytest.approx(slow_identity(q, w), abs=1e-11)


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(2, 30))
def test_rates_and_bounds_against_loops(seed, T):
    g = torch.Generator().manual_seed(seed)
    w, G, D = positive(g, T), positive(g, T), positive(g, 1).item()
    assert R.weights_to_learning_rates(w).tolist() == pytest.approx(slow_rates(w), rel=1e-12)
    slow = (D**2 + sum(a**2 * b**2 for a, b in zip(w.tolist(), G.tolist(), strict=True))) / (2 * sum(w.tolist()))
    assert R.weighted_bound(w, G, D).item() == pytest.approx(slow, rel=1e-12)
    assert R.schedule_bound(w, G, D).item() == pytest.approx(slow_schedule_bound(w, G, D), rel=1e-12)
    inverse = sum(b**-2 for b in G.tolist())
    assert R.optimal_weights(G, D).tolist() == pytest.approx([D / inverse**0.5 * b**-2 for b in G.tolist()], rel=1e-12)
    assert R.optimal_bound(G, D).item() == pytest.approx(D / inverse**0.5, rel=1e-12)


# The theorems as properties


class Problem:
    """f(x) = |Ax - b|_1, convex and not smooth; subgradient A' sign(Ax - b)."""

    def __init__(self, g):
        d, n = torch.randint(1, 6, (2,), generator=g).tolist()
        self.A, self.b = torch.randn(n, d, generator=g, dtype=F64), torch.randn(n, generator=g, dtype=F64)
        self.start, self.u = torch.randn(2, d, generator=g, dtype=F64)

    def f(self, x):
        return (self.A @ x - self.b).abs().sum().item()

    def gradient(self, x):
        return self.A.T @ (self.A @ x - self.b).sign()


@pytest.mark.parametrize("base", ["sgd", "sign"])
@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(2, 25))
def test_conversion_theorem(base, seed, T):
    """Any base algorithm: the last iterate is no worse than its weighted regret."""
    g = torch.Generator().manual_seed(seed)
    p, w = Problem(g), positive(g, T)
    step = positive(g, 1).item()
    x, z, regret, norms = p.start, p.start, 0.0, []
    for t in range(1, T + 1):
        gradient = p.gradient(x)
        norms.append(gradient.norm())
        regret += (w[t - 1] * gradient @ (z - p.u)).item()
        delta = -w[t - 1] * gradient if base == "sgd" else -step * gradient.sign()
        last, z = x, z + delta
        x = R.last_iterate_step(x, delta, w, t)
    assert torch.equal(x, last)  # step T moves nothing
    scale = 1 + abs(p.f(p.start)) + sum(n.item() for n in norms)
    assert p.f(x) - p.f(p.u) <= regret / w.sum().item() + 1e-12 * scale
    if base == "sgd" and min(norms) > 0:
        bound = R.weighted_bound(w, torch.stack(norms), (p.start - p.u).norm().item()).item()
        assert regret / w.sum().item() <= bound + 1e-12 * scale
        y = p.start  # the same run as plain descent with the learning rates of these weights
        for eta in R.weights_to_learning_rates(w)[:-1]:
            y = y - eta * p.gradient(y)
        assert p.f(y) - p.f(p.u) <= bound + 1e-12 * scale


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(2, 25))
def test_bound_of_any_schedule(seed, T):
    g = torch.Generator().manual_seed(seed)
    p, eta = Problem(g), 0.3 * positive(g, T)
    x, norms = p.start, []
    for t in range(T):
        gradient = p.gradient(x)
        norms.append(gradient.norm())
        last, x = x, x - eta[t] * gradient
    if min(norms) > 0:
        bound = R.schedule_bound(eta, torch.stack(norms), (p.start - p.u).norm().item()).item()
        assert p.f(last) - p.f(p.u) <= bound * (1 + 1e-12)


def test_bound_is_attained():
    """f(x) = G max_i x_i from 0 against u = -D / sqrt(T): the bound is met with equality, so no smaller constant is right."""
    D, G, T = 1.0, 2.0, 4
    x, w = torch.zeros(T, dtype=F64), torch.full((T,), D / (G * T**0.5), dtype=F64)
    for eta in R.weights_to_learning_rates(w)[:-1]:
        subgradient = torch.zeros(T, dtype=F64)
        subgradient[x.argmax()] = G
        x = x - eta * subgradient
    gap = G * x.max() + G * D / T**0.5
    assert gap.item() == pytest.approx(R.weighted_bound(w, torch.full((T,), G, dtype=F64), D).item(), rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(2, 30))
def test_optimal_weights_are_optimal(seed, T):
    g = torch.Generator().manual_seed(seed)
    G, D = positive(g, T), positive(g, 1).item()
    w, best = R.optimal_weights(G, D), R.optimal_bound(G, D).item()
    assert R.weighted_bound(w, G, D).item() == pytest.approx(best, rel=1e-12)
    constant = D * G.square().sum().sqrt().item() / T
    assert best <= constant * (1 + 1e-12)
    for t in range(T):
        for factor in (0.9, 1.1):
            other = w.clone()
            other[t] *= factor
            assert R.weighted_bound(other, G, D).item() > best
    assert R.weighted_bound(positive(g, T), G, D).item() >= best * (1 - 1e-12)


def test_optimal_bound_is_the_minimum_found_numerically():
    G, D = positive(torch.Generator().manual_seed(0), 12), 1.7

    def objective(v):
        x = torch.from_numpy(v).requires_grad_()
        value = R.weighted_bound(x.exp(), G, D)
        value.backward()
        return value.item(), x.grad.numpy()

    found = minimize(objective, np.zeros(12), jac=True, method="L-BFGS-B", options=dict(ftol=1e-15, gtol=1e-10))
    assert found.fun == pytest.approx(R.optimal_bound(G, D).item(), rel=1e-6)
    assert np.exp(found.x) == pytest.approx(R.optimal_weights(G, D).numpy(), rel=1e-3)


# Closed forms


@pytest.mark.parametrize("T", [2, 3, 10, 101])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_constant_norms_give_linear_decay(T, power):
    got = R.refined_schedule(torch.full((T,), 3.7, dtype=F64), tau=None, power=power)
    k = torch.arange(T, dtype=F64)
    torch.testing.assert_close(got, (T - 1 - k) / (T - 1), rtol=0, atol=1e-12)


def test_worked_example():
    G = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=F64)
    torch.testing.assert_close(R.refined_schedule(G, tau=None).tolist(), [0.140625, 0.5, 1.0, 0.0])
    assert R.optimal_bound(G, 1.0).item() == pytest.approx(0.657596, abs=5e-7)
    assert R.refined_schedule(G, tau=None, normalize=False).tolist() == pytest.approx(
        slow_rates(G**-2), rel=1e-12
    )  # the released function's scale
    got = R.weights_to_learning_rates(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64))
    assert got.tolist() == pytest.approx([0.9, 1.4, 1.2, 0.0])


@pytest.mark.parametrize("T, ratio", [(10, 1.956775), (50, 2.34077), (100, 2.48543), (1000, 2.912812)])
def test_constant_steps_keep_the_logarithm(T, ratio):
    D, G = 1.3, torch.full((T,), 0.7, dtype=F64)
    harmonic = sum(1 / k for k in range(1, T))
    eta = D / (0.7 * math.sqrt(T * (1 + harmonic)))
    best = D * 0.7 * math.sqrt((1 + harmonic) / T)
    assert R.schedule_bound(torch.full((T,), eta, dtype=F64), G, D).item() == pytest.approx(best, rel=1e-12)
    for factor in (0.9, 1.1):
        assert R.schedule_bound(torch.full((T,), factor * eta, dtype=F64), G, D).item() > best
    assert best / R.optimal_bound(G, D).item() == pytest.approx(ratio, abs=1e-5)
    assert R.optimal_bound(G, D).item() == pytest.approx(D * 0.7 / math.sqrt(T), rel=1e-12)


def test_minimized_schedule_is_nearly_linear():
    ones = torch.ones(100, dtype=F64)
    eta = R.minimize_schedule_bound(ones, 1.0)
    assert 1.999 < R.schedule_bound(eta, ones, 1.0).item() * 10 < 2.003
    for k in (25, 50, 75):
        assert eta[k] / eta[0] == pytest.approx(1 - k / 100, abs=0.01)


def test_minimized_schedule_is_a_minimum():
    g = torch.Generator().manual_seed(1)
    G, D = 30 * positive(g, 20, spread=0.3), 5.0
    eta = R.minimize_schedule_bound(G, D)
    best = R.schedule_bound(eta, G, D).item()
    assert best < R.schedule_bound(D / G.norm() * R.named_schedule("linear", 20), G, D).item()
    for t in range(20):
        for factor in (0.95, 1.05):
            other = eta.clone()
            other[t] *= factor
            assert R.schedule_bound(other, G, D).item() > best
    with pytest.warns(UserWarning, match="max_iter"):
        R.minimize_schedule_bound(G, D, max_iter=1)
    assert R.minimize_schedule_bound(G.float(), D).dtype == torch.float32
    assert not R.minimize_schedule_bound(G.clone().requires_grad_(), D).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(R.minimize_schedule_bound(7 * G, 2 * D), 2 / 7 * eta, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "end, peak, half, ratio", [(1.0, 0.135, 0.583, 0.644), (2.0, 0.121, 0.212, 0.743), (0.7, 0.1505, 0.860, 0.569)]
)
def test_synthetic_curves_of_the_repository(end, peak, half, ratio):
    G = norm_curve(end)
    schedule = R.refined_schedule(G, tau=None)
    assert schedule.argmax().item() / 2000 == pytest.approx(peak, abs=0.005)
    assert schedule[0] < 0.02 and schedule[1000] == pytest.approx(half, abs=0.005)
    constant = torch.ones(2000, dtype=F64) / G.norm()
    assert (R.optimal_bound(G, 1.0) / R.weighted_bound(constant, G, 1.0)).item() == pytest.approx(ratio, abs=5e-4)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_scales_and_powers(power):
    g = torch.Generator().manual_seed(2)
    G = positive(g, 30)
    torch.testing.assert_close(R.refined_schedule(1e3 * G, power=power), R.refined_schedule(G, power=power))
    scaled = R.refined_schedule(10 * G, power=power, normalize=False)
    torch.testing.assert_close(scaled, R.refined_schedule(G, power=power, normalize=False) / 10**power)
    # The last norm enters only as the tail: doubling it divides that tail's share by 2^power.
    rates = R.refined_schedule(torch.tensor([1.0, 1.0], dtype=F64), tau=None, power=power, normalize=False)
    doubled = R.refined_schedule(torch.tensor([1.0, 2.0], dtype=F64), tau=None, power=power, normalize=False)
    w = 2.0**-power
    assert rates[0].item() == pytest.approx(0.5) and doubled[0].item() == pytest.approx(w / (1 + w))


def test_default_is_power_two_with_a_filter():
    G = positive(torch.Generator().manual_seed(3), 60)
    expected = torch.tensor(slow_rates(R.smooth_grad_norms(G, 0.1) ** -2.0), dtype=F64)
    torch.testing.assert_close(R.refined_schedule(G), expected / expected.max(), rtol=1e-12, atol=1e-15)


def test_floor_guards_against_a_vanishing_norm():
    G = torch.ones(50, dtype=F64)
    G[20] = 1e-6
    spike = R.refined_schedule(G, tau=None)
    assert spike[:20].max() == pytest.approx(1.0, abs=1e-6) or spike[21:].max() < 1e-6
    assert spike[21:].max() < 1e-10  # the whole schedule ends at the small norm
    guarded = R.refined_schedule(G, tau=None, floor=1.0)
    torch.testing.assert_close(guarded, R.refined_schedule(torch.ones(50, dtype=F64), tau=None))
    G[20] = 0.0
    half = R.refined_schedule(G, tau=None, floor=0.5)
    expected = R.refined_schedule(torch.where(G == 0, 0.5, G), tau=None)
    torch.testing.assert_close(half, expected)


# Smoothing


def slow_filter(G, tau):
    """The recipe, index by index: reflection on the right, the first value on the left."""
    T = len(G)
    half = int(tau * T) // 2
    out = []
    for i in range(T):
        window = []
        for j in range(i - half, i + half + 1):
            j = max(j, 0)
            j %= 2 * (T - 1)
            window.append(G[min(j, 2 * (T - 1) - j)].item())
        out.append(sorted(window)[half])
    return out


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(2, 60), st.floats(0.01, 0.45))
def test_filter_against_its_recipe(seed, T, tau):
    G = positive(torch.Generator().manual_seed(seed), T)
    got = R.smooth_grad_norms(G, tau)
    assert got.shape == G.shape and got.tolist() == slow_filter(G, tau)


def test_filter_removes_a_spike_except_at_the_start():
    for k in range(100):
        G = torch.ones(100, dtype=F64)
        G[k] = 100.0
        got = R.smooth_grad_norms(G)
        assert torch.equal(got, torch.ones(100, dtype=F64)) == (k > 0)
        assert k > 0 or (got[0] == 100 and got[5:].max() == 1)
    for T in (17, 18):
        G = positive(torch.Generator().manual_seed(0), T)
        assert torch.equal(R.smooth_grad_norms(G, 1.9 / T), G)  # a window of one step
        assert R.smooth_grad_norms(G.float(), 0.99).dtype == torch.float32


# Named schedules


@pytest.mark.parametrize("name", ["constant", "inverse_sqrt", "inverse", "stepwise", "cosine", "linear"])
@pytest.mark.parametrize("T, warmup", [(1, 0), (8, 0), (100, 0), (100, 10), (11, 10)])
def test_named_schedules(name, T, warmup):
    got = R.named_schedule(name, T, warmup_steps=warmup, offset=3.0)
    assert got.shape == (T,) and got.dtype == F64 and got.max() == 1 and got.min() > 0
    assert torch.equal(got[:warmup], torch.arange(1, warmup + 1, dtype=F64) / max(warmup, 1))
    assert torch.equal(got[warmup:], R.named_schedule(name, T - warmup, offset=3.0))
    n = T - warmup
    formula = {
        "constant": lambda k: 1.0,
        "inverse_sqrt": lambda k: (1 + k / 3) ** -0.5,
        "inverse": lambda k: 1 / (1 + k / 3),
        "stepwise": lambda k: 0.01 if k >= 3 * n / 4 else 0.1 if k >= n / 2 else 1.0,
        "cosine": lambda k: (1 + math.cos(math.pi * k / n)) / 2,
        "linear": lambda k: 1 - k / n,
    }[name]
    assert got[warmup:].tolist() == pytest.approx([formula(k) for k in range(n)], rel=1e-12)


def test_named_schedules_are_those_of_torch():
    T = 40
    with_torch = {
        "linear": lambda o: torch_schedules.PolynomialLR(o, total_iters=T, power=1.0),
        "cosine": lambda o: torch_schedules.CosineAnnealingLR(o, T_max=T),
        "stepwise": lambda o: torch_schedules.MultiStepLR(o, [T // 2, 3 * T // 4]),
    }
    for name, make in with_torch.items():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler, rates = make(optimizer), []
        for _ in range(T):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert R.named_schedule(name, T).tolist() == pytest.approx(rates, rel=1e-9)
    levels = R.named_schedule("stepwise", T).unique()
    assert levels.tolist() == [0.01, 0.1, 1.0]
    assert R.named_schedule("cosine", T)[T // 2].item() == pytest.approx(0.5)
    assert R.named_schedule("linear", T)[-1].item() == pytest.approx(1 / T)


# In a training loop


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def optimizers(model, name):
    groups = [dict(params=model[0].parameters()), dict(params=model[2].parameters(), lr=0.02)]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9) if name == "sgd" else torch.optim.Adam(groups, lr=0.1)


def batch(t):
    g = torch.Generator().manual_seed(t)
    return torch.randn(16, 4, generator=g, dtype=F64)


def train_step(model, optimizer, scheduler, recorder, t):
    optimizer.zero_grad()
    X = batch(t)
    (model(X)[:, 0] - X.sum(1)).abs().mean().backward()
    recorder.record()
    optimizer.step()
    scheduler.step()


SCHEDULERS = {
    "tabulated": lambda o: R.TabulatedLR(o, R.refined_schedule(torch.linspace(3, 1, 12, dtype=F64), tau=None)),
    "linear": lambda o: R.LinearDecayLR(o, 12, warmup_steps=3),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_follow_the_table_in_each_group(kind):
    model = network()
    optimizer = optimizers(model, "sgd")
    scheduler = SCHEDULERS[kind](optimizer)
    refined = R.refined_schedule(torch.linspace(3, 1, 12, dtype=F64), tau=None)
    wanted = (R.named_schedule("linear", 12, warmup_steps=3) if kind == "linear" else refined).tolist()
    assert scheduler.table == wanted  # in double precision
    for k in range(12):
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1 * wanted[k], 0.02 * wanted[k]])
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * wanted[-1])  # kept after the last update
    with pytest.raises(ValueError, match="12 entries"):
        scheduler.step()


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_run_resumes_from_its_checkpoint(kind, name):
    """Optimizer, scheduler and recorder saved after step 5, loaded into new ones: the same trajectory, bit by bit."""
    model = network()
    optimizer = optimizers(model, name)
    scheduler, recorder = SCHEDULERS[kind](optimizer), R.GradNormRecorder(model.parameters(), ord=1)
    for t in range(5):
        train_step(model, optimizer, scheduler, recorder, t)
    file = io.BytesIO()
    state = [part.state_dict() for part in (model, optimizer, scheduler, recorder)]
    torch.save(state, file)
    file.seek(0)
    other = network(1)
    other_optimizer = optimizers(other, name)
    other_scheduler = R.TabulatedLR(other_optimizer, torch.tensor([1]))  # the checkpoint brings its own table
    other_recorder = R.GradNormRecorder(other.parameters(), ord=1)
    other[0].weight.grad = torch.ones(8, 4, dtype=F64)
    other_recorder.record()  # forgotten when the checkpoint is loaded
    loaded = torch.load(file, weights_only=True)
    for part, saved in zip((other, other_optimizer, other_scheduler, other_recorder), loaded, strict=True):
        part.load_state_dict(saved)
    for t in range(5, 12):
        train_step(model, optimizer, scheduler, recorder, t)
        train_step(other, other_optimizer, other_scheduler, other_recorder, t)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(recorder.norms, other_recorder.norms) and len(recorder.norms) == 12


def test_resumes_with_last_epoch():
    model = network()
    optimizer = optimizers(model, "sgd")
    scheduler = R.LinearDecayLR(optimizer, 10)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    again = optimizers(model, "sgd")
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    R.LinearDecayLR(again, 10, last_epoch=3)
    assert [g["lr"] for g in again.param_groups] == pytest.approx([0.06, 0.012])


def test_compiled_step_sees_each_rate():
    """A rate held in a tensor is filled in place: one compiled graph follows the whole schedule."""
    runs = []
    for compiled in (False, True):
        x = torch.ones(3, dtype=F64, requires_grad=True)
        optimizer = torch.optim.SGD([x], lr=torch.tensor(0.1, dtype=F64))
        scheduler = R.LinearDecayLR(optimizer, 6)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for _ in range(6):
            optimizer.zero_grad()
            x.square().sum().backward()
            step()
            scheduler.step()
        runs.append(x.detach())
    torch.testing.assert_close(runs[0], runs[1])
    assert runs[0][0].item() == pytest.approx(math.prod(1 - 0.2 * (1 - k / 6) for k in range(6)))


def test_closures_and_amp():
    """A step with a closure; autocast and a gradient scaler leave the recorded norms as they are."""
    x = torch.ones(3, dtype=F64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1)
    scheduler = R.LinearDecayLR(optimizer, 3)

    def closure():
        optimizer.zero_grad()
        loss = (x - 2).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
        scheduler.step()
    assert x.tolist() == pytest.approx([2 - math.prod(1 - 0.2 * (1 - k / 3) for k in range(3))] * 3)

    model = network().float()
    recorder = R.GradNormRecorder(model.parameters())
    norms = []
    for scale in (1.0, 1024.0):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch(0).float()).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        recorder.record()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    norms = recorder.norms
    assert norms[0] > 0 and norms[1].item() == pytest.approx(norms[0].item(), rel=1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_recorder(order):
    model = network()
    unused = torch.zeros(2, requires_grad=True)
    recorder = R.GradNormRecorder([*model.parameters(), unused], ord=order)
    assert recorder.norms.shape == (0,)
    expected = []
    for t in range(3):
        model.zero_grad()
        model(batch(t)).square().sum().backward()
        recorder.record()
        flat = torch.cat([p.grad.flatten() for p in model.parameters()]).abs()
        expected.append((flat.sum() if order == 1 else flat.square().sum().sqrt()).item())
    assert recorder.norms.tolist() == pytest.approx(expected) and not recorder.norms.requires_grad
    if order == 2:
        for p in model.parameters():
            p.grad /= 7
        assert nn.utils.clip_grad_norm_(model.parameters(), 1e9).item() == pytest.approx(expected[-1] / 7)
    assert recorder.norms.tolist() == pytest.approx(expected)  # norms, not views of gradients


def test_recorder_in_half_precision_and_for_sparse_gradients():
    x = torch.zeros(4, dtype=torch.float16, requires_grad=True)
    x.grad = torch.full((4,), 300.0, dtype=torch.float16)  # 300^2 is infinite in float16
    recorder = R.GradNormRecorder(x)
    recorder.record()
    assert recorder.norms.tolist() == [600.0] and recorder.norms.dtype == torch.float32
    table = nn.Embedding(5, 2, sparse=True)
    recorder = R.GradNormRecorder(table.parameters())
    table(torch.tensor([1, 1, 3])).sum().backward()  # row 1 twice: its gradient is (2, 2)
    recorder.record()
    assert recorder.norms.item() == pytest.approx(math.sqrt(4 + 4 + 1 + 1))


# Precision, gradients, transforms


def test_gradients():
    g = torch.Generator().manual_seed(0)
    eta, G, w, q = positive(g, 4, 7)
    for inputs in (eta, G, w, q):
        inputs.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: R.schedule_bound(a, b, 1.5), (eta, G))
    assert torch.autograd.gradcheck(lambda a, b: R.weighted_bound(a, b, 1.5), (w, G))
    assert torch.autograd.gradcheck(R.last_iterate_identity, (q, w))
    assert torch.autograd.gradcheck(R.weights_to_learning_rates, (w,))
    assert torch.autograd.gradcheck(lambda a: (R.optimal_weights(a, 1.5), R.optimal_bound(a, 1.5)), (G,))
    assert torch.autograd.gradcheck(lambda a: R.refined_schedule(a, tau=None), (G,))
    # With a floor the median counts as a constant: the gradient is that of the raised norms.
    level = 0.9 * G.detach().median()
    assert (G < level).any()
    with_floor, by_hand = R.refined_schedule(G, tau=None, floor=0.9), R.refined_schedule(G.clamp(min=level), tau=None)
    found, wanted = (torch.autograd.grad(table @ eta.detach(), G)[0] for table in (with_floor, by_hand))
    torch.testing.assert_close(found, wanted)
    assert (found[G < level] == 0).all() and found.any()


def test_transforms():
    g = torch.Generator().manual_seed(0)
    etas, G = positive(g, 5, 9), positive(g, 9)
    bound = lambda eta: R.schedule_bound(eta, G, 2.0)
    gradients = torch.func.vmap(torch.func.grad(bound))(etas)
    for eta, gradient in zip(etas, gradients, strict=True):
        eta = eta.clone().requires_grad_()
        bound(eta).backward()
        torch.testing.assert_close(gradient, eta.grad)
    compiled = torch.compile(bound, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(etas[0]), bound(etas[0]))
    schedule = torch.compile(lambda x: R.refined_schedule(x, tau=None), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(schedule(G), R.refined_schedule(G, tau=None))
    with torch.autocast("cpu", torch.bfloat16):
        assert bound(etas[0]).dtype == F64


def test_float32_at_the_extremes():
    G = torch.tensor([1e-20, 1e-20, 2e-20])
    assert R.optimal_bound(G, 1.0).item() == pytest.approx(1e-20 / 1.5, rel=1e-5)
    assert R.optimal_weights(G, 1.0).tolist() == pytest.approx([1e20 / 1.5, 1e20 / 1.5, 1e20 / 6], rel=1e-5)
    G = torch.tensor([1e25, 1e25, 1e-5])  # squares of ratios underflow in float32
    assert R.refined_schedule(G, tau=None).tolist() == pytest.approx([1.0, 1.0, 0.0])
    for big in (1e25, 1e38):
        assert R.weights_to_learning_rates(torch.full((5,), big)).tolist() == pytest.approx(
            [big * (1 - t / 5) for t in range(1, 6)], rel=1e-5
        )
    for size in (1e25, 1e-25):  # D = w = size, G = 1: of the order of size, though its square is no float32
        w, ones = torch.full((4,), size), torch.ones(4)
        assert R.weighted_bound(w, ones, size).item() == pytest.approx(size * 5 / 8, rel=1e-5)
        wanted = size * R.schedule_bound(ones, ones, 1.0).item()
        assert R.schedule_bound(w, ones, size).item() == pytest.approx(wanted, rel=1e-5)
    assert R.refined_schedule(torch.tensor([1e25, 1.0, 1.0]), tau=None, power=20).tolist() == [0.0, 1.0, 0.0]
    assert R.refined_schedule(torch.tensor([1e170, 1.0, 1.0], dtype=F64), tau=None)[1:].tolist() == [1.0, 0.0]
    for far in (torch.full((3,), 1e-20), torch.full((3,), 1e25), torch.full((3,), 1e-160, dtype=F64)):
        with pytest.raises(ValueError, match="grad_norms to the power -2 leave torch.float"):
            R.refined_schedule(far, normalize=False)
    half = R.refined_schedule(torch.tensor([2.0, 1.0, 1.0], dtype=torch.float16), tau=None)
    assert half.dtype == torch.float32 and half.tolist() == pytest.approx([0.5, 1.0, 0.0])
    # a long table: tails summed from the end on keep their digits
    T = 100_000
    k = torch.arange(T, dtype=F64)
    got = R.refined_schedule(torch.full((T,), 0.3), tau=None).double()
    torch.testing.assert_close(got, (T - 1 - k) / (T - 1), rtol=1e-6, atol=1e-9)
    rates = R.weights_to_learning_rates(torch.full((T,), 0.3)).double()
    torch.testing.assert_close(rates[-5:], 0.3 * (T - 1 - k[-5:]) / T, rtol=1e-4, atol=0)
    strided = torch.linspace(1, 2, 20, dtype=F64)[::2]
    torch.testing.assert_close(R.refined_schedule(strided), R.refined_schedule(strided.contiguous()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    G = torch.linspace(3, 1, 50)
    for function in (R.refined_schedule, R.smooth_grad_norms, lambda x: R.minimize_schedule_bound(x, 1.0)):
        got = function(G.cuda())
        assert got.device.type == "cuda"
        torch.testing.assert_close(got.cpu(), function(G))
    torch.testing.assert_close(R.schedule_bound(G.cuda(), G.cuda(), 1.0).cpu(), R.schedule_bound(G, G, 1.0))
    x = torch.ones(3, device="cuda", requires_grad=True)
    recorder = R.GradNormRecorder([x])
    x.sum().backward()
    recorder.record()
    on_cpu = R.GradNormRecorder([torch.ones(3)])
    on_cpu.load_state_dict(recorder.state_dict())
    assert recorder.norms.device.type == "cuda" and on_cpu.norms.tolist() == pytest.approx([3**0.5])


# Bad input


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_numbers(bad):
    good = torch.ones(5)
    wrong = torch.ones(5)
    wrong[2] = bad
    for name, call in {
        "weights": lambda x: R.weights_to_learning_rates(x),
        "weights ": lambda x: R.last_iterate_identity(good, x),
        "weights  ": lambda x: R.weighted_bound(x, good, 1.0),
        "weights   ": lambda x: R.last_iterate_step(good, good, x, 1),
        "grad_norms": lambda x: R.weighted_bound(good, x, 1.0),
        "grad_norms ": lambda x: R.schedule_bound(good, x, 1.0),
        "learning_rates": lambda x: R.schedule_bound(x, good, 1.0),
        "grad_norms  ": lambda x: R.optimal_weights(x, 1.0),
        "grad_norms   ": lambda x: R.optimal_bound(x, 1.0),
        "grad_norms    ": lambda x: R.minimize_schedule_bound(x, 1.0),
        "grad_norms     ": lambda x: R.refined_schedule(x),
        "grad_norms      ": lambda x: R.smooth_grad_norms(x),
    }.items():
        with pytest.raises(ValueError, match=f"^{name.strip()} must be finite and > 0 everywhere"):
            call(wrong)
    for call in (
        lambda D: R.weighted_bound(good, good, D),
        lambda D: R.schedule_bound(good, good, D),
        lambda D: R.optimal_bound(good, D),
        lambda D: R.optimal_weights(good, D),
        lambda D: R.minimize_schedule_bound(good, D),
    ):
        with pytest.raises(ValueError, match="^distance must be"):
            call(bad)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: R.refined_schedule(torch.ones(1)), ValueError, "grad_norms must have at least 2 entries, got 1"),
        (lambda: R.refined_schedule(torch.ones(3, 2)), ValueError, "grad_norms must have 1 dim"),
        (lambda: R.refined_schedule(torch.ones(3, dtype=torch.int64)), TypeError, "grad_norms must be a floating"),
        (lambda: R.refined_schedule([1.0, 2.0]), TypeError, "grad_norms must be a tensor"),
        (lambda: R.refined_schedule(torch.ones(3), tau=0), ValueError, "tau must be"),
        (lambda: R.refined_schedule(torch.ones(3), tau=1.0), ValueError, "tau must lie in"),
        (lambda: R.refined_schedule(torch.ones(3), power=0), ValueError, "power must be"),
        (lambda: R.refined_schedule(torch.ones(3), floor=0), ValueError, "floor must be"),
        (lambda: R.refined_schedule(torch.ones(3), floor=2.0), ValueError, "floor must lie in"),
        (lambda: R.refined_schedule(-torch.ones(3), floor=0.1), ValueError, "grad_norms must be >= 0"),
        (lambda: R.refined_schedule(torch.zeros(3), floor=0.1), ValueError, "grad_norms must have a median > 0"),
        (lambda: R.weighted_bound(torch.ones(3), torch.ones(4), 1.0), ValueError, "grad_norms must have 3 entries"),
        (lambda: R.schedule_bound(torch.ones(3), torch.ones(1), 1.0), ValueError, "grad_norms must have at least"),
        (lambda: R.schedule_bound(torch.ones(3), torch.ones(3), "1"), TypeError, "distance must be a number"),
        (lambda: R.last_iterate_identity(torch.ones(3), torch.ones(2)), ValueError, "weights must have 3 entries"),
        (lambda: R.last_iterate_identity(torch.full((2,), math.nan), torch.ones(2)), ValueError, "values must be fin"),
        (lambda: R.last_iterate_step(torch.ones(3), torch.ones(1), torch.ones(2), 1), ValueError, "delta must have"),
        (lambda: R.last_iterate_step(torch.ones(3), torch.ones(3), torch.ones(2), 0), ValueError, "t must be at le"),
        (lambda: R.last_iterate_step(torch.ones(3), torch.ones(3), torch.ones(2), 3), ValueError, "t must be at most"),
        (lambda: R.minimize_schedule_bound(torch.ones(3), 1.0, max_iter=0), ValueError, "max_iter must be"),
        (lambda: R.named_schedule("liner", 5), ValueError, "name must be one of constant"),
        (lambda: R.named_schedule("linear", 0), ValueError, "total_steps must be"),
        (lambda: R.named_schedule("linear", 5.0), TypeError, "total_steps must be"),
        (lambda: R.named_schedule("linear", 5, warmup_steps=5), ValueError, "warmup_steps must be less than"),
        (lambda: R.named_schedule("linear", 5, warmup_steps=-1), ValueError, "warmup_steps must be at least 0"),
        (lambda: R.named_schedule("inverse", 5, offset=0.0), ValueError, "offset must be"),
        (lambda: R.TabulatedLR("sgd", [1.0]), TypeError, "not an Optimizer"),
        (lambda: R.TabulatedLR(torch.optim.SGD([torch.ones(1)], lr=1.0), [1.0, -0.1]), ValueError, "table must be >="),
        (lambda: R.TabulatedLR(torch.optim.SGD([torch.ones(1)], lr=1.0), "0.5"), TypeError, "table must hold numbers"),
        (lambda: R.TabulatedLR(torch.optim.SGD([torch.ones(1)], lr=1.0), [None]), TypeError, "table must hold numbers"),
        (lambda: R.TabulatedLR(torch.optim.SGD([torch.ones(1)], lr=1.0), []), ValueError, "table must not be empty"),
        (lambda: R.TabulatedLR(torch.optim.SGD([torch.ones(1)], lr=1.0), [math.nan]), ValueError, "table must be fin"),
        (lambda: R.TabulatedLR(torch.optim.SGD([torch.ones(1)], lr=1.0), torch.ones(2, 2)), ValueError, "table must h"),
        (
            lambda: R.refined_schedule(torch.tensor([0.0, 0, 0, 1, 1]), floor=0.5),
            ValueError,
            "grad_norms must have a med",
        ),
        (lambda: R.named_schedule(["linear"], 5), ValueError, "name must be one of constant"),
        (lambda: R.GradNormRecorder(nn.Linear(2, 1)), TypeError, "parameters must be"),
        (lambda: R.GradNormRecorder([torch.ones(1)], ord=True), ValueError, "ord must be 1 or 2"),
        (
            lambda: R.GradNormRecorder(torch.ones(1)).load_state_dict({"norms": torch.ones(2, 2), "ord": 2}),
            ValueError,
            "norms must have 1",
        ),
        (lambda: R.GradNormRecorder([]), TypeError, "parameters must be"),
        (lambda: R.GradNormRecorder(["x"]), TypeError, "parameters must be"),
        (lambda: R.GradNormRecorder([torch.ones(1)], ord=3), ValueError, "ord must be 1 or 2"),
        (lambda: R.GradNormRecorder([torch.ones(1)]).record(), ValueError, "parameters must have gradients"),
        (
            lambda: R.GradNormRecorder(torch.ones(1)).load_state_dict({"norms": torch.ones(2), "ord": 1}),
            ValueError,
            "ord must be 2",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
