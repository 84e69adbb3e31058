"""The theorems of chapter similarity/isogclr as properties; the algorithm against a slow loop; limits, extremes and bad input."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from two_processes import in_two_processes

from lossbook.similarity import isogclr as I

seeds = st.integers(0, 2**31)
radii = st.floats(0.01, 1.5)
few = settings(deadline=None, max_examples=30)


def differences(seed, rows=3, negatives=None, spread=1.0):
    """Differences h in [-2, 2] times ``spread``; m from 5 to 40, so that a radius of 1.5 is below log m."""
    generator = torch.Generator().manual_seed(seed)
    m = negatives or int(torch.randint(5, 41, (), generator=generator))
    return spread * (4 * torch.rand(rows, m, generator=generator, dtype=torch.float64) - 2)


def views(seed, rows, dim=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, dim, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]


# --- the dual ---------------------------------------------------------------------------------------------------------


def primal(h, rho, tau_floor):
    """The worst case by constrained maximization over the simplex, without the dual."""
    m = len(h)

    def concentration(p):
        return (p * np.log(np.maximum(p, 1e-300))).sum() + math.log(m)

    constraints = [
        {"type": "eq", "fun": lambda p: p.sum() - 1},
        {"type": "ineq", "fun": lambda p: rho - concentration(p)},
    ]
    start = np.exp(h - h.max())
    start = 0.7 * start / start.sum() + 0.3 / m
    found = minimize(
        lambda p: tau_floor * concentration(p) - p @ h,
        start,
        method="SLSQP",
        bounds=[(1e-12, 1)] * m,
        constraints=constraints,
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return -found.fun


@settings(deadline=None, max_examples=15)
@given(seeds, st.floats(0.05, 1.5), st.sampled_from([0.0, 0.2, 2.0]))
def test_strong_duality(seed, rho, tau_floor):
    h = differences(seed, rows=2, negatives=9)
    loss, tau = I.robust_contrastive_loss(h, rho=rho, tau_floor=tau_floor, reduction="none", return_temperature=True)
    for row in range(2):
        assert loss[row].item() == pytest.approx(primal(h[row].numpy(), rho, tau_floor), abs=1e-5)
    assert (tau >= tau_floor).all()


@few
@given(seeds, radii, st.floats(0.05, 5))
def test_slope_and_curvature_of_the_dual(seed, rho, tau):
    h = differences(seed)
    t = torch.full((3,), tau, dtype=torch.float64, requires_grad=True)
    value = I.dual_objective(h, temperature=t, rho=rho, tau_floor=0.03)
    (slope,) = torch.autograd.grad(value.sum(), t, create_graph=True)
    torch.testing.assert_close(slope, rho - I.kl_from_uniform(h, temperature=tau), rtol=1e-10, atol=1e-10)
    (curvature,) = torch.autograd.grad(slope.sum(), t)
    p = torch.softmax(h / tau, dim=1)
    variance = (p * h**2).sum(1) - (p * h).sum(1) ** 2
    torch.testing.assert_close(curvature, variance / tau**3, rtol=1e-6, atol=1e-8)


def slow_dual(h, tau, rho, tau_floor):
    return tau * math.log(sum(math.exp(x / tau) for x in h) / len(h)) + (tau - tau_floor) * rho


def slow_kl(h, tau):
    z = sum(math.exp(x / tau) for x in h)
    p = [math.exp(x / tau) / z for x in h]
    return sum(q * math.log(len(h) * q) for q in p)


@few
@given(seeds, radii, st.floats(0.05, 5))
def test_values_equal_the_slow_loops(seed, rho, tau):
    h = differences(seed)
    dual = I.dual_objective(h, temperature=tau, rho=rho, tau_floor=0.03)
    concentration = I.kl_from_uniform(h, temperature=tau)
    globally = I.global_contrastive_loss(h, temperature=tau, reduction="none")
    for row in range(3):
        x = h[row].tolist()
        assert dual[row].item() == pytest.approx(slow_dual(x, tau, rho, 0.03), abs=1e-10)
        assert globally[row].item() == pytest.approx(slow_dual(x, tau, 0, 0), abs=1e-10)
        assert concentration[row].item() == pytest.approx(slow_kl(x, tau), abs=1e-10)


@few
@given(seeds, radii, st.sampled_from([0.0, 0.3]))
def test_optimal_temperature_minimizes_the_dual(seed, rho, tau_floor):
    h = differences(seed)
    tau = I.optimal_temperature(h, rho=rho, tau_floor=tau_floor)
    least = I.robust_contrastive_loss(h, rho=rho, tau_floor=tau_floor, reduction="none")
    grid = tau_floor + torch.logspace(-3, 2, 200, dtype=torch.float64)
    values = torch.stack([I.dual_objective(h, temperature=t, rho=rho, tau_floor=tau_floor) for t in grid])
    assert (values >= least - 1e-12).all()
    reached = I.kl_from_uniform(h, temperature=tau)
    interior = tau > tau_floor
    torch.testing.assert_close(reached[interior], torch.full_like(reached[interior], rho), rtol=0, atol=1e-12)
    assert (reached[~interior] <= rho).all()


@few
@given(seeds, st.floats(0.05, 1.0), st.floats(0.1, 20), st.floats(-5, 5))
def test_temperature_scales_with_the_differences_and_ignores_shifts(seed, rho, scale, shift):
    h = differences(seed)
    tau = I.optimal_temperature(h, rho=rho)
    torch.testing.assert_close(I.optimal_temperature(scale * h + shift, rho=rho), scale * tau, rtol=1e-9, atol=1e-12)


@few
@given(seeds)
def test_monotone_in_the_radius_and_between_mean_and_maximum(seed):
    h = differences(seed)
    grid = [0.01, 0.05, 0.1, 0.3, 0.6, 1.0, 1.5]
    taus = torch.stack([I.optimal_temperature(h, rho=rho) for rho in grid])
    losses = torch.stack([I.robust_contrastive_loss(h, rho=rho, reduction="none") for rho in grid])
    assert (taus.diff(dim=0) < 0).all() and (losses.diff(dim=0) > 0).all()
    assert (losses > h.mean(1)).all() and (losses <= h.amax(1) + 1e-12).all()


def test_radius_at_its_ends():
    h = differences(0, negatives=6)
    for rho in (math.log(6), 5.0):
        loss, tau = I.robust_contrastive_loss(h, rho=rho, reduction="none", return_temperature=True)
        assert torch.equal(tau, torch.zeros(3, dtype=torch.float64))
        torch.testing.assert_close(loss, h.amax(1))
        assert torch.equal(I.optimal_temperature(h, rho=rho, tau_floor=0.1), torch.full((3,), 0.1, dtype=torch.float64))
    loss, tau = I.robust_contrastive_loss(h, rho=0.0, tau_max=1e4, reduction="none", return_temperature=True)
    assert torch.equal(tau, torch.full((3,), 1e4, dtype=torch.float64))
    torch.testing.assert_close(loss, h.mean(1), rtol=0, atol=1e-3)
    variance = h.var(dim=1, correction=0)
    torch.testing.assert_close((loss - h.mean(1)) * 2e4, variance, rtol=1e-3, atol=1e-6)


def test_ties_and_constant_rows():
    h = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64, requires_grad=True)
    rho = 0.3  # log(4 / 3) = 0.288 is all that the first row can reach
    loss, tau = I.robust_contrastive_loss(h, rho=rho, reduction="none", return_temperature=True)
    assert tau.tolist() == [0, 0] and loss.tolist() == [1, 0.5]
    loss.sum().backward()
    torch.testing.assert_close(h.grad, torch.tensor([[1 / 3] * 3 + [0], [1 / 4] * 4], dtype=torch.float64))
    assert I.optimal_temperature(h, rho=0.28)[0] > 0
    assert I.optimal_temperature(h, rho=0.0, tau_floor=0.2).tolist() == [1e3, 0.2]
    one = I.robust_contrastive_loss(torch.tensor([[0.7]]), rho=0.3, return_temperature=True)
    assert [x.item() for x in one] == [pytest.approx(0.7), 0]


def test_small_radius_expansion():
    h = differences(1, negatives=30)
    centered = h - h.mean(1, keepdim=True)
    sigma, third = centered.square().mean(1).sqrt(), (centered**3).mean(1)
    for rho in (1e-4, 1e-6):
        expansion = sigma / math.sqrt(2 * rho) + third / (3 * sigma**2)
        tau = I.optimal_temperature(h, rho=rho, tau_max=1e5)
        assert ((tau - expansion).abs() < 2 * math.sqrt(rho)).all()


@few
@given(seeds, radii)
def test_envelope(seed, rho):
    h = differences(seed).requires_grad_()
    loss, tau = I.robust_contrastive_loss(h, rho=rho, reduction="sum", return_temperature=True)
    loss.backward()
    torch.testing.assert_close(h.grad.sum(1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(h.grad, torch.softmax(h.detach() / tau[:, None], dim=1))


@pytest.mark.parametrize("tau_floor", [0.0, 1.0])
def test_gradcheck(tau_floor):
    h = differences(2, negatives=6).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h: I.robust_contrastive_loss(h, rho=0.4, tau_floor=tau_floor), (h,), eps=1e-6, atol=1e-6
    )
    tau = torch.tensor([0.3, 0.7, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, t: I.dual_objective(h, temperature=t, rho=0.4, tau_floor=0.1), (h, tau))
    assert torch.autograd.gradcheck(lambda h, t: I.kl_from_uniform(h, temperature=t), (h, tau))
    assert torch.autograd.gradcheck(lambda h, t: I.global_contrastive_loss(h, temperature=t), (h, tau))


def test_global_loss_is_the_decoupled_softmax_loss():
    generator = torch.Generator().manual_seed(0)
    s = 2 * torch.rand(4, 9, generator=generator, dtype=torch.float64) - 1  # the positive first
    tau, m = 0.3, 8
    decoupled = torch.logsumexp(s[:, 1:] / tau, dim=1) - s[:, 0] / tau
    ours = I.global_contrastive_loss(s[:, 1:] - s[:, :1], temperature=tau, reduction="none")
    torch.testing.assert_close(ours, tau * decoupled - tau * math.log(m))


# --- two levels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("q", "tau"), [(0.01, 0.342161), (0.05, 0.489751), (0.1, 0.566457), (0.3, 0.631353), (0.8, 0)])
def test_two_levels(q, tau):
    h = torch.zeros(1, 1000, dtype=torch.float64)
    h[0, : round(1000 * q)] = 1
    assert I.optimal_temperature(h, rho=0.3).item() == pytest.approx(tau, abs=1e-6)
    assert I.two_level_temperature(q, 1.0, 0.3) == pytest.approx(tau, abs=1e-6)


@few
@given(st.floats(1e-6, 0.999), st.floats(1e-3, 1e3), st.floats(1e-3, 5))
def test_two_level_temperature_solves_its_equation(q, gap, rho):
    tau = I.two_level_temperature(q, gap, rho)
    if q >= math.exp(-rho):
        assert tau == 0
    elif q < 0.99 * math.exp(-rho):  # beyond, 1 - P is below the rounding of this test's own kl
        p = 1 / (1 + (1 - q) / q * math.exp(-gap / tau))
        kl = p * math.log(p / q) + ((1 - p) * math.log((1 - p) / (1 - q)) if p < 1 else 0)
        assert kl == pytest.approx(rho, rel=1e-6, abs=1e-9)


def test_two_level_temperature_peaks_and_falls():
    grid = np.linspace(0.005, 0.735, 147)
    taus = np.array([I.two_level_temperature(q, 1.0, 0.3) for q in grid])
    assert grid[taus.argmax()] == pytest.approx(0.257, abs=0.005) and taus.max() == pytest.approx(0.6349, abs=1e-4)
    assert (np.diff(taus[grid < 0.25]) > 0).all() and (np.diff(taus[grid > 0.265]) < 0).all()
    assert I.two_level_temperature(math.exp(-0.3), 1.0, 0.3) == 0 < I.two_level_temperature(0.7408, 1.0, 0.3)


# --- the algorithm ----------------------------------------------------------------------------------------------------

SETTINGS = dict(rho=0.4, tau_init=0.3125, tau_min=0.28125, tau_max=0.375, gamma=0.6, eta=1.0, beta=0.7, grad_clip=0.25)


class SlowLoop:
    """The algorithm anchor by anchor, with the weights of the estimator written out and everything but similarities detached."""

    def __init__(self, bimodal, n, rho, tau_init, tau_min, tau_max, gamma, eta, beta, grad_clip, individual=True):
        self.bimodal, self.individual, self.rho, self.gamma = bimodal, individual, rho, gamma
        self.tau_min, self.tau_max, self.eta, self.beta, self.clip = tau_min, tau_max, eta, beta, grad_clip
        slots = 2 * n if bimodal else n
        self.n, self.s, self.tau, self.v = n, [None] * slots, [tau_init] * slots, [0.0] * slots

    def step(self, first, second, index):
        first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
        index, visits, value, surrogate = index.tolist(), {}, 0.0, 0.0
        for side, (own, other) in enumerate([(first, second), (second, first)]):
            for i, sample in enumerate(index):
                keys = [other[j] for j in range(len(index)) if index[j] != sample]
                if not self.bimodal:
                    keys += [own[j] for j in range(len(index)) if index[j] != sample]
                positive = own[i] @ other[i]
                x = torch.stack([own[i] @ k for k in keys]) - (positive if self.bimodal else 0)
                slot = sample + side * self.n if self.bimodal else sample
                tau = self.tau[slot]
                e = (x.detach() / tau).exp()
                batch_mean = e.mean().item()
                s = batch_mean if self.s[slot] is None else (1 - self.gamma) * self.s[slot] + self.gamma * batch_mean
                gradient = math.log(s) + self.rho - (e / s * x.detach() / tau).mean().item()
                visits.setdefault(slot, []).append((s, gradient))
                value += tau * (math.log(s) + (self.rho if self.individual else 0))
                surrogate = surrogate + (e / s * x).mean()
                if not self.bimodal:
                    value, surrogate = value - positive.item(), surrogate - positive
        for slot, seen in visits.items():
            self.s[slot] = sum(s for s, _ in seen) / len(seen)
            if self.individual:
                gradient = sum(g for _, g in seen) / len(seen)
                gradient = min(max(gradient, -self.clip), self.clip)
                self.v[slot] = (1 - self.beta) * self.v[slot] + self.beta * gradient
                self.tau[slot] = min(max(self.tau[slot] - self.eta * self.v[slot], self.tau_min), self.tau_max)
        return value / len(index), surrogate / len(index)


@pytest.mark.parametrize("individual", [True, False])
@pytest.mark.parametrize("kind", [I.ISogCLRLoss, I.BimodalISogCLRLoss])
@pytest.mark.parametrize("chunk", [None, 3])
def test_algorithm_equals_the_slow_loop(kind, individual, chunk):
    """Five batches with missing, repeated and new samples: value, gradient and state."""
    loss_fn = kind(7, individual=individual, chunk_size=chunk, **SETTINGS).double()
    slow = SlowLoop(kind is I.BimodalISogCLRLoss, 7, individual=individual, **SETTINGS)
    for seed, index in enumerate([[0, 1, 2, 3], [3, 0, 4, 2], [5, 5, 0, 1], [1, 5, 1, 1], [4, 2, 3, 5]]):
        first, second = views(seed, 4)
        index = torch.tensor(index)
        loss = loss_fn(first, second, index)
        value, surrogate = slow.step(first, second, index)
        assert loss.item() == pytest.approx(value, abs=1e-12)
        wanted = torch.autograd.grad(surrogate, [first, second])
        for got, want in zip(torch.autograd.grad(loss, [first, second]), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        inner = [0.0 if s is None else s for s in slow.s]
        torch.testing.assert_close(loss_fn.inner.flatten(), torch.tensor(inner, dtype=torch.float64))
        torch.testing.assert_close(loss_fn.temperature.flatten(), torch.tensor(slow.tau, dtype=torch.float64))
        torch.testing.assert_close(loss_fn.temperature_momentum.flatten(), torch.tensor(slow.v, dtype=torch.float64))
    if individual:  # the clips were met, and not everywhere
        assert 0 < sum(t in (0.28125, 0.375) for t in slow.tau) < len(slow.tau)


@pytest.mark.parametrize("kind", [I.ISogCLRLoss, I.BimodalISogCLRLoss])
def test_without_memory_it_is_the_loss_of_the_batch(kind):
    """With gamma = 1 value and gradient are those of the objective on the batch, at the stored temperatures."""
    loss_fn = kind(6, gamma=1.0, rho=0.3, tau_init=0.2, tau_min=0.05, tau_max=1.0).double()
    index = torch.arange(6)
    for seed in range(3):
        first, second = views(seed, 6)
        tau = loss_fn.temperature.clone().expand(2, 6)
        value = loss_fn(first, second, index)
        a, b = F.normalize(first, dim=1), F.normalize(second, dim=1)
        off = ~torch.eye(6, dtype=torch.bool)
        plain = 0
        for t, x, y in [(tau[0], a, b), (tau[1], b, a)]:
            s = [x @ y.T] if kind is I.BimodalISogCLRLoss else [x @ x.T, x @ y.T]
            h = torch.cat([m[off].reshape(6, 5) for m in s], dim=1) - (x * y).sum(1)[:, None]
            plain = plain + I.dual_objective(h, temperature=t, rho=0.3).mean()
        torch.testing.assert_close(value, plain, rtol=1e-12, atol=1e-12)
        for got, want in zip(
            torch.autograd.grad(value, [first, second]), torch.autograd.grad(plain, [first, second]), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_temperatures_converge_to_the_exact_ones():
    (x, _), index = views(0, 12, dim=4), torch.arange(12)
    x = x.detach()
    loss_fn = I.ISogCLRLoss(
        12, rho=0.3, gamma=1.0, beta=1.0, eta=0.05, tau_init=0.3, tau_min=1e-3, tau_max=10.0
    ).double()
    for _ in range(500):
        loss_fn(x, x, index)
    s = F.normalize(x, dim=1) @ F.normalize(x, dim=1).T
    others = s[~torch.eye(12, dtype=torch.bool)].reshape(12, 11)
    torch.testing.assert_close(loss_fn.temperature, I.optimal_temperature(others, rho=0.3), rtol=0, atol=1e-3)


def test_moving_average_reduces_the_bias():
    """At B = 8 and tau = 0.2, on a frozen embedding: 200 chains, after 20 visits."""
    torch.manual_seed(0)
    x, tau, n = F.normalize(torch.randn(200, 5), dim=1), 0.2, 200
    log_mean = torch.logsumexp((x @ x.T / tau).fill_diagonal_(-torch.inf), dim=1) - math.log(n - 1)
    bias = {}
    for gamma, first, last in ((1.0, 0, 5), (0.3, 20, 100)):
        loss_fn, found = I.ISogCLRLoss(n, gamma=gamma, tau_init=tau, individual=False), []
        for _ in range(last):
            for index in torch.randperm(n).split(8):
                loss_fn(x[index], x[index], index)
            found.append((loss_fn.log_inner - log_mean).mean())
        bias[gamma] = torch.stack(found[first:]).mean().item()
    assert bias[1.0] < -0.1 and bias[1.0] < 2 * bias[0.3] < 0, bias


def test_untouched_samples_and_eval_mode_keep_the_state():
    for kind in (I.ISogCLRLoss, I.BimodalISogCLRLoss):
        loss_fn = kind(10, rho=0.3, tau_init=0.3, tau_min=0.05, tau_max=1.0)
        loss_fn(*(x.float() for x in views(0, 4)), torch.tensor([0, 1, 2, 3]))
        before = {name: value.clone() for name, value in loss_fn.state_dict().items()}
        loss_fn(*(x.float() for x in views(1, 3)), torch.tensor([2, 7, 3]))
        untouched = [0, 1, 4, 5, 6, 8, 9]
        for name in ("log_inner", "temperature", "temperature_momentum"):
            now = loss_fn.state_dict()[name]
            assert torch.equal(now[..., untouched], before[name][..., untouched])
            assert (now[..., [2, 7, 3]] != before[name][..., [2, 7, 3]]).all()
        before = {name: value.clone() for name, value in loss_fn.state_dict().items()}
        with torch.no_grad():
            loss = loss_fn.eval()(*(x.float() for x in views(2, 4)), torch.tensor([0, 1, 2, 3]))
        assert loss.isfinite() and not loss.requires_grad
        assert all(torch.equal(value, before[name]) for name, value in loss_fn.state_dict().items())


def test_training_without_gradients_moves_the_state_alike():
    states = []
    for enabled in (True, False):
        loss_fn = I.ISogCLRLoss(5, tau_init=0.3)
        with torch.set_grad_enabled(enabled):
            loss_fn(*views(0, 5), torch.arange(5))
        states.append(loss_fn.temperature)
    assert torch.equal(*states) and (states[0] != 0.3).all()


def test_warmup_freezes_the_temperatures_only():
    loss_fn = I.ISogCLRLoss(6, tau_init=0.3, warmup_steps=2)
    for step in range(3):
        loss_fn(*views(step, 6), torch.arange(6))
        moved = loss_fn.temperature != 0.3
        assert moved.all() if step == 2 else not moved.any()
        assert loss_fn.log_inner.isfinite().all() and loss_fn.steps == step + 1


def test_state_round_trip():
    loss_fn, other = I.BimodalISogCLRLoss(6), I.BimodalISogCLRLoss(6)
    loss_fn(*views(0, 4), torch.tensor([0, 5, 2, 3]))
    other.load_state_dict(loss_fn.state_dict())
    batch = (*views(1, 4), torch.tensor([0, 1, 2, 5]))
    assert torch.equal(loss_fn(*batch), other(*batch))
    assert all(torch.equal(a, b) for a, b in zip(loss_fn.buffers(), other.buffers(), strict=True))


KINDS = {"unimodal": I.ISogCLRLoss, "bimodal": I.BimodalISogCLRLoss}
INDEX = torch.tensor([0, 4, 8, 8, 2, 1])  # sample 8 is in both halves


def one_step(kind, rows, distributed):
    """Value, gradient and state of a second batch of six, or of the rows of it that a process has."""
    loss_fn = KINDS[kind](9, distributed=distributed, rho=0.3, tau_init=0.3, tau_min=0.05, tau_max=1.0).double()
    for seed, index in enumerate([torch.arange(6), INDEX]):
        first, second = (x.detach()[rows].requires_grad_() for x in views(seed, 6))
        loss = loss_fn(first, second, index[rows])
    loss.backward()
    return loss.item(), first.grad, second.grad, loss_fn.state_dict()


def of_one_process(rank):
    return {kind: one_step(kind, slice(3 * rank, 3 * rank + 3), True) for kind in KINDS}


def test_two_processes_equal_one(tmp_path):
    results = in_two_processes(of_one_process, tmp_path)
    for kind in KINDS:
        loss, *gradients, state = one_step(kind, slice(None), False)
        losses, *both, states = zip(*(result[kind] for result in results), strict=True)
        assert sum(losses) / 2 == pytest.approx(loss, abs=1e-12)
        for got, want in zip(both, gradients, strict=True):  # averaged over processes, each gradient counts half
            torch.testing.assert_close(torch.cat(got) / 2, want, rtol=1e-9, atol=1e-12)
        for name, value in state.items():
            for got in states:
                torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)


# --- extremes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.005, 1e-4])
def test_tiny_temperatures_in_float32(tau):
    for kind in (I.ISogCLRLoss, I.BimodalISogCLRLoss):
        loss_fn = kind(8, rho=0.3, tau_init=tau, tau_min=tau, tau_max=1.0)
        for step in range(3):
            first, second = (x.float().detach().requires_grad_() for x in views(step, 8))
            loss = loss_fn(first, second, torch.arange(8))
            loss.backward()
            assert loss.isfinite() and first.grad.isfinite().all() and second.grad.isfinite().all()
        assert loss_fn.log_inner.isfinite().all() and loss_fn.temperature.isfinite().all()
        assert not loss_fn.inner.isfinite().all()  # which is why logarithms are kept


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_extreme_differences_in_float32(scale):
    h = differences(4, spread=scale).float().requires_grad_()
    loss, tau = I.robust_contrastive_loss(h, rho=0.3, tau_max=1e6, return_temperature=True)
    loss.backward()
    assert loss.isfinite() and h.grad.isfinite().all()
    torch.testing.assert_close(tau.double() / scale, I.optimal_temperature(differences(4), rho=0.3), rtol=1e-5, atol=0)
    assert I.kl_from_uniform(h, temperature=1e-3 * scale).isfinite().all()


def test_concentration_at_low_temperature_by_hand():
    h = torch.tensor([[0.0, 1.0, 2.0]])
    assert I.kl_from_uniform(h, temperature=1.0).item() == pytest.approx(0.266217, abs=1e-6)
    assert I.kl_from_uniform(h, temperature=1e-3).item() == pytest.approx(math.log(3), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(dtype):
    h = differences(5).to(dtype)
    loss, tau = I.robust_contrastive_loss(h, rho=0.3, return_temperature=True)
    assert loss.dtype == tau.dtype == I.kl_from_uniform(h, temperature=0.5).dtype == dtype
    loss_fn = I.ISogCLRLoss(5)
    assert loss_fn(*(x.to(dtype) for x in views(0, 5)), torch.arange(5)).dtype == dtype
    assert loss_fn.temperature.dtype == torch.float32 and loss_fn.to(dtype).log_inner.dtype == dtype


def test_half_precision_embeddings_and_autocast():
    first, second = (x.to(torch.bfloat16) for x in views(6, 8, dim=16))
    plain, cast = I.ISogCLRLoss(8), I.ISogCLRLoss(8)
    loss = plain(first, second, torch.arange(8))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(cast(first.float(), second.float(), torch.arange(8)), loss)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(cast.temperature, plain.temperature)


def test_transforms_and_compile():
    h = differences(7)
    per_row = torch.func.vmap(torch.func.grad(lambda row: I.robust_contrastive_loss(row[None], rho=0.3)))(h)
    tau = I.optimal_temperature(h, rho=0.3)
    torch.testing.assert_close(per_row, torch.softmax(h / tau[:, None], dim=1))
    compiled = torch.compile(lambda h: I.dual_objective(h, temperature=0.3, rho=0.3), backend="aot_eager")
    torch.testing.assert_close(compiled(h), I.dual_objective(h, temperature=0.3, rho=0.3))


# --- what no theorem sees ---------------------------------------------------------------------------------------------


def test_bisection_keeps_its_digits_in_float32():
    h = differences(5).float()
    torch.testing.assert_close(
        I.optimal_temperature(h, rho=1e-3, tau_max=1e4).double(),
        I.optimal_temperature(h.double(), rho=1e-3, tau_max=1e4),
        rtol=1e-6,
        atol=0,
    )


def test_a_temperature_far_below_the_spread_is_found():
    h = torch.tensor([[1.0, 1.0 - 1e-4, 0.0, 0.5]], dtype=torch.float64)
    tau = I.optimal_temperature(h, rho=1.3)
    assert 1e-5 < tau.item() < 1e-4
    torch.testing.assert_close(I.kl_from_uniform(h, temperature=tau).item(), 1.3, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("kind", "defaults"),
    [
        (I.ISogCLRLoss, dict(rho=0.3, tau_init=0.1, tau_min=0.05, tau_max=1.0, gamma=0.8, eta=0.03, beta=0.5, grad_clip=3.0)),
        (I.BimodalISogCLRLoss, dict(rho=6.0, tau_init=0.01, tau_min=0.005, tau_max=0.05, gamma=0.8, eta=1e-3, beta=0.5, grad_clip=5.0)),
    ],
)  # fmt: skip
def test_defaults_are_the_papers(kind, defaults):
    parameters = inspect.signature(kind).parameters
    assert {name: parameters[name].default for name in defaults} == defaults


@pytest.mark.parametrize(("grad_clip", "moved"), [(None, True), (3.0, False)])
def test_without_a_clip_a_temperature_takes_the_whole_gradient(grad_clip, moved):
    x = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]], dtype=torch.float64), dim=1)
    loss_fn = I.ISogCLRLoss(
        3, tau_init=0.5, tau_min=1e-3, tau_max=99.0, gamma=0.1, beta=1.0, eta=1.0, grad_clip=grad_clip
    )
    loss_fn.log_inner.fill_(-20.0)  # a running mean that lags far behind
    loss_fn(x, x, torch.arange(3))
    assert (loss_fn.temperature_momentum.abs().max() > 3).item() is moved


# --- bad input --------------------------------------------------------------------------------------------------------

H, V, N = torch.zeros(3, 4), torch.eye(3), torch.arange(3)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("difference", lambda: I.kl_from_uniform(torch.zeros(3), temperature=1.0)),
        ("difference", lambda: I.dual_objective(torch.zeros(3, 0), temperature=1.0, rho=0.3)),
        ("difference", lambda: I.optimal_temperature(H.masked_fill(H == 0, math.nan), rho=0.3)),
        ("difference", lambda: I.robust_contrastive_loss(H.masked_fill(torch.eye(3, 4) > 0, -math.inf), rho=0.3)),
        ("view2", lambda: I.ISogCLRLoss(3)(V, V / 0, N)),
        ("chunk_size", lambda: I.ISogCLRLoss(3, chunk_size=-1)),
        ("temperature", lambda: I.kl_from_uniform(H, temperature=0.0)),
        ("temperature", lambda: I.dual_objective(H, temperature=torch.ones(4), rho=0.3)),
        ("temperature", lambda: I.global_contrastive_loss(H, temperature=-1.0)),
        ("rho", lambda: I.dual_objective(H, temperature=1.0, rho=-0.1)),
        ("rho", lambda: I.optimal_temperature(H, rho=math.nan)),
        ("rho", lambda: I.robust_contrastive_loss(H, rho=-1e-9)),
        ("tau_floor", lambda: I.optimal_temperature(H, rho=0.3, tau_floor=-0.1)),
        ("tau_max", lambda: I.optimal_temperature(H, rho=0.3, tau_floor=2.0, tau_max=2.0)),
        ("tau_max", lambda: I.robust_contrastive_loss(H, rho=0.3, tau_max=math.inf)),
        ("reduction", lambda: I.robust_contrastive_loss(H, rho=0.3, reduction="max")),
        ("fraction", lambda: I.two_level_temperature(0.0, 1.0, 0.3)),
        ("fraction", lambda: I.two_level_temperature(1.1, 1.0, 0.3)),
        ("gap", lambda: I.two_level_temperature(0.1, 0.0, 0.3)),
        ("rho", lambda: I.two_level_temperature(0.1, 1.0, 0.0)),
        ("num_samples", lambda: I.ISogCLRLoss(1)),
        ("rho", lambda: I.ISogCLRLoss(3, rho=-0.1)),
        ("tau_min", lambda: I.ISogCLRLoss(3, tau_min=0.0)),
        ("tau_init", lambda: I.ISogCLRLoss(3, tau_min=0.5, tau_max=0.2)),
        ("tau_init", lambda: I.BimodalISogCLRLoss(3, tau_init=0.1)),
        ("gamma", lambda: I.ISogCLRLoss(3, gamma=0.0)),
        ("gamma", lambda: I.ISogCLRLoss(3, gamma=1.5)),
        ("beta", lambda: I.ISogCLRLoss(3, beta=0.0)),
        ("eta", lambda: I.ISogCLRLoss(3, eta=-1.0)),
        ("grad_clip", lambda: I.ISogCLRLoss(3, grad_clip=0.0)),
        ("warmup_steps", lambda: I.ISogCLRLoss(3, warmup_steps=-1)),
        ("view2", lambda: I.ISogCLRLoss(3)(V, torch.eye(4), N)),
        ("view1", lambda: I.ISogCLRLoss(3)(torch.zeros(3), V, N)),
        ("image", lambda: I.BimodalISogCLRLoss(3)(torch.zeros(3), V, N)),
        ("index", lambda: I.ISogCLRLoss(3)(V, V, torch.arange(2))),
        ("index", lambda: I.ISogCLRLoss(3)(V, V, N[None])),
        ("index", lambda: I.ISogCLRLoss(3)(V, V, N + 1)),
        ("index", lambda: I.BimodalISogCLRLoss(3)(V, V, N - 1)),
        ("index", lambda: I.ISogCLRLoss(3)(V, V, torch.tensor([2, 2, 2]))),
        ("index", lambda: I.BimodalISogCLRLoss(3)(V[:1], V[:1], N[:1])),
    ],
)
def test_bad_input(argument, call):
    with pytest.raises(ValueError, match=rf"^{argument} "):
        call()


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("difference", lambda: I.kl_from_uniform([[0.0, 1.0]], temperature=1.0)),
        ("difference", lambda: I.optimal_temperature(H.long(), rho=0.3)),
        ("rho", lambda: I.robust_contrastive_loss(H, rho="0.3")),
        ("rho", lambda: I.dual_objective(H, temperature=1.0, rho=False)),
        ("rho", lambda: I.optimal_temperature(H, rho=torch.tensor([0.3, 0.2]))),
        ("rho", lambda: I.optimal_temperature(H, rho=torch.tensor(0.0))),
        ("num_samples", lambda: I.ISogCLRLoss(3.0)),
        ("view1", lambda: I.ISogCLRLoss(3)(V.long(), V, N)),
        ("text", lambda: I.BimodalISogCLRLoss(3)(V, V.long(), N)),
        ("view2", lambda: I.ISogCLRLoss(3)(V, V.double(), N)),
        ("index", lambda: I.ISogCLRLoss(3)(V, V, N.int())),
        ("index", lambda: I.ISogCLRLoss(3)(V, V, [0, 1, 2])),
    ],
)
def test_wrong_type(argument, call):
    with pytest.raises(TypeError, match=rf"^{argument} "):
        call()
