"""Tests of ``lossbook.language.reweighting``."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from two_processes import in_two_processes

from lossbook import lab
from lossbook.language import reweighting as R

DOUBLE = torch.float64
E = math.e
NAMED = R.STRATEGIES
SHAPED = [name for name in NAMED if name != "uniform"]


def rand(*shape, seed=0, dtype=DOUBLE):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randn(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_weights(losses, strategy, r, delta):
    """Plain Python, one sample at a time, the formula as the paper writes it."""
    f = [float(x) for x in losses]
    low, high = min(f), max(f)
    width = max(high - low, 1e-6)
    scores = []
    for x in f:
        h = 2 * delta * x / width - delta * (high + low) / width
        scores.append(
            {
                "uniform": 0.0,
                "linupper": min(h + delta, delta),
                "quadratic": 1 - h * h / delta**2,
                "extremes": abs(h),
                "dro": h,
            }[strategy]
        )
    top = max(scores)
    powers = [math.exp((s - top) / r) for s in scores]
    return torch.tensor([p / sum(powers) for p in powers], dtype=DOUBLE)


batches = st.builds(
    lambda n, seed, skew: 5 * rand(n, seed=seed) ** skew,
    st.integers(2, 40),
    st.integers(0, 2**31),
    st.sampled_from([0.2, 1.0, 5.0]),
)
temperatures = st.floats(0.05, 50)
deltas = st.floats(0.1, 10)
names = st.sampled_from(NAMED)

# ---- the weights ---------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(batches, names, temperatures, deltas)
def test_weights_are_the_slow_ones(f, strategy, r, delta):
    w = R.sample_weights(f, strategy=strategy, r=r, delta=delta)
    assert torch.allclose(w, slow_weights(f, strategy, r, delta), rtol=1e-7, atol=1e-12)
    assert (w >= 0).all() and w.sum() == pytest.approx(1, abs=1e-12) and not w.requires_grad


@settings(max_examples=50, deadline=None)
@given(batches, names, st.floats(0.1, 10), st.floats(0.1, 100), st.floats(-100, 100), st.integers(0, 999))
def test_weights_follow_permutations_and_not_affine_changes(f, strategy, r, a, b, seed):
    w = R.sample_weights(f, strategy=strategy, r=r)
    order = torch.randperm(len(f), generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(R.sample_weights(f[order], strategy=strategy, r=r), w[order], rtol=0, atol=1e-12)
    if (f.max() - f.min()) * min(a, 1) > 1e-3:
        assert torch.allclose(R.sample_weights(a * f + b, strategy=strategy, r=r), w, rtol=1e-6, atol=1e-8)


def test_three_losses():
    f = torch.tensor([0.0, 1.0, 2.0], dtype=DOUBLE)
    h = R.normalize_losses(f)
    assert h.tolist() == [-1, 0, 1]
    assert R.score(h, "linupper").tolist() == [0, 1, 1]
    assert R.score(h, "quadratic").tolist() == [0, 1, 0]
    assert R.score(h, "extremes").tolist() == [1, 0, 1]
    assert R.score(h, "dro").tolist() == [-1, 0, 1] and R.score(h, "uniform").tolist() == [0, 0, 0]
    assert R.score(h, lambda x: 3 * x).tolist() == [-3, 0, 3]
    wanted = torch.tensor([1, E, E], dtype=DOUBLE) / (1 + 2 * E)
    assert torch.allclose(R.sample_weights(f), wanted, rtol=0, atol=1e-12)
    assert wanted.tolist() == pytest.approx([0.155362, 0.422319, 0.422319], abs=1e-6)


def test_delta_scales_what_it_should():
    """LinUpper, Extremes and the line at (delta, r) are those at (1, r / delta); Quadratic does not know delta."""
    f = rand(12)
    for strategy in ("linupper", "extremes", "dro"):
        scaled, unit = (
            R.sample_weights(f, strategy=strategy, r=2.0, delta=3.0),
            R.sample_weights(f, strategy=strategy, r=2 / 3),
        )
        assert torch.allclose(scaled, unit, rtol=1e-12)
    assert torch.allclose(
        R.sample_weights(f, strategy="quadratic", delta=3.0), R.sample_weights(f, strategy="quadratic"), rtol=1e-12
    )


def test_limits_of_the_temperature():
    f = torch.tensor([1.0, 2.1, 3.0], dtype=DOUBLE)
    for strategy in NAMED:
        for r in (1e6, math.inf):
            w = R.sample_weights(f, strategy=strategy, r=r)
            assert torch.allclose(w, torch.full_like(w, 1 / 3), rtol=0, atol=1e-6)
    assert torch.equal(R.sample_weights(f, strategy="linupper", r=math.inf), torch.full_like(f, 1 / 3))
    assert R.sample_weights(f, strategy="quadratic", r=1e-3).tolist() == [0, 1, 0]
    assert R.sample_weights(f, strategy="dro", r=1e-3).tolist() == [0, 0, 1]
    assert R.sample_weights(f, strategy="extremes", r=1e-3).tolist() == [0.5, 0, 0.5]
    assert R.sample_weights(f, strategy="linupper", r=1e-3).tolist() == [0, 0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("strategy", NAMED)
def test_extremes_of_losses_and_temperature(dtype, strategy):
    for f in (1e4 * randn(50, dtype=dtype), torch.full((7,), -1e4, dtype=dtype), torch.tensor([3.0], dtype=dtype)):
        for r in (1e-300, 1e-45, 1e-6, 1.0, 1e6):
            w = R.sample_weights(f, strategy=strategy, r=r)
            assert w.dtype == dtype and w.isfinite().all() and w.sum() == pytest.approx(1, abs=1e-5)
    w = R.sample_weights(torch.full((7,), -1e4, dtype=dtype), strategy=strategy)
    assert torch.equal(w, torch.full_like(w, 1 / 7))
    assert R.dro_value(1e4 * torch.tensor([-1.0, 1.0], dtype=dtype), r=1e-3) == pytest.approx(1e4, abs=1e-2)


def test_near_equal_losses_keep_their_digits():
    """In float32 the paper's two fractions are each about 1e5 here: their difference would be noise."""
    f = 10 + torch.arange(5, dtype=torch.float32) * 2.0**-12
    assert R.normalize_losses(f).tolist() == [-1, -0.5, 0, 0.5, 1]
    tiny = torch.tensor([0.0, 1e-8], dtype=DOUBLE)  # the floor is a maximum: h is the difference over 1e-6
    assert R.normalize_losses(tiny).tolist() == pytest.approx([-0.01, 0.01])
    assert R.normalize_losses(tiny, eps=1e-9).tolist() == [-1, 1]
    assert R.normalize_losses(torch.ones(4)).tolist() == [0] * 4


def test_half_precision_is_widened():
    for dtype in (torch.bfloat16, torch.float16):
        f = rand(20, dtype=torch.float32).to(dtype)
        w = R.sample_weights(f)
        assert w.dtype == torch.float32 and torch.equal(w, R.sample_weights(f.float()))
        assert R.reweighted_loss(f).dtype == torch.float32


def test_an_outlier_squeezes_the_rest():
    f = torch.cat([1 + rand(99), torch.tensor([1e6], dtype=DOUBLE)])
    w = R.sample_weights(f)
    assert R.normalize_losses(f)[:99].max() < -0.99999
    assert w[-1] == pytest.approx(E / (99 + E), abs=1e-6) and w[-1] == pytest.approx(0.0267, abs=5e-5)
    assert w[:99].max() - w[:99].min() < 1e-7


@settings(max_examples=100, deadline=None)
@given(batches, names, temperatures, deltas)
def test_caps(f, strategy, r, delta):
    w = R.sample_weights(f, strategy=strategy, r=r, delta=delta)
    h = R.normalize_losses(f, delta=delta)
    top = {"uniform": len(f), "linupper": int((h >= 0).sum()), "extremes": 2}.get(strategy, 1)
    cap = R.weight_cap(len(f), top, strategy=strategy, r=r, delta=delta)
    assert w.max() <= cap * (1 + 1e-9) and 1 / len(f) <= cap * (1 + 1e-9) <= 1 + 1e-8
    span = {"uniform": 0, "quadratic": 1, "dro": 2 * delta}.get(strategy, delta)
    assert (w.max() / w.min()).log() <= span / r + 1e-9
    if strategy == "linupper" and top / len(f) >= (E - 2) / (2 * (E - 1)):
        assert R.sample_weights(f, r=delta, delta=delta).max() <= 2 / len(f) * (1 + 1e-9)


def test_caps_are_reached():
    """Losses at two points only: k at the top, the rest at the bottom."""
    for strategy in ("linupper", "dro"):
        for k in (1, 3, 9):
            f = torch.cat([torch.zeros(10 - k), torch.ones(k)]).double()
            w = R.sample_weights(f, strategy=strategy, r=0.7, delta=2.0)
            assert w.max() == pytest.approx(R.weight_cap(10, k, strategy=strategy, r=0.7, delta=2.0), rel=1e-12)
    f = torch.tensor([0.0, 1.0] + [0.5] * 8, dtype=DOUBLE)
    assert R.sample_weights(f, strategy="extremes").max() == pytest.approx(R.weight_cap(10, 2, strategy="extremes"))
    f = torch.tensor([0.0] * 5 + [1.0] * 4 + [0.5], dtype=DOUBLE)
    w = R.sample_weights(f, strategy="quadratic", delta=7.0)
    assert w.max() == pytest.approx(R.weight_cap(10, strategy="quadratic", delta=7.0), rel=1e-12)
    assert R.weight_cap(5, r=math.inf) == pytest.approx(0.2) and R.weight_cap(1) == 1 and R.weight_cap(9, r=1e-9) == 1
    share = (E - 2) / (2 * (E - 1))
    assert share == pytest.approx(0.20901, abs=1e-5)
    assert R.weight_cap(10**6, math.ceil(share * 10**6)) <= 2e-6 < R.weight_cap(10**6, math.floor(share * 10**6))


# ---- the game ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(batches, st.floats(0.1, 20), st.integers(0, 2**31))
def test_weights_win_the_game(s, r, seed):
    best = R.kl_weights(s, r=r)
    value = R.dro_value(s, r=r)
    assert R.kl_objective(best, s, r=r) == pytest.approx(value.item(), abs=1e-9)
    assert value == pytest.approx(r * math.log((s / r).exp().mean().item()), rel=1e-9)
    assert s.mean() - 1e-9 <= value <= s.max() + 1e-9
    w = -(rand(len(s), seed=seed) + 1e-12).log()
    w = w / w.sum()
    gap = r * (w * (w / best).log()).sum()
    assert gap >= -1e-12
    assert value - R.kl_objective(w, s, r=r) == pytest.approx(gap.item(), abs=1e-8)


def test_the_game_at_a_corner():
    s = torch.tensor([1.0, 2.0], dtype=DOUBLE)
    corner = torch.tensor([0.0, 1.0], dtype=DOUBLE)  # 0 log 0 = 0
    assert R.kl_objective(corner, s, r=0.5) == pytest.approx(2 - 0.5 * math.log(2))


def test_gradient_is_that_of_the_soft_maximum():
    """Only with the losses themselves as scores."""
    x = randn(30, 5)
    grads = []
    for which in (0, 1):
        theta = randn(5, seed=1).requires_grad_()
        f = (x @ theta).square()
        loss = R.dro_value(f, r=0.7) if which else R.reweighted_loss(f, weights=R.kl_weights(f, r=0.7))
        loss.backward()
        grads.append(theta.grad)
    assert torch.allclose(*grads, rtol=0, atol=1e-10) and grads[0].abs().max() > 0.1


def test_gradcheck():
    f = rand(6).requires_grad_()
    w = R.sample_weights(f)
    assert torch.autograd.gradcheck(lambda x: R.reweighted_loss(x, weights=w), (f,))
    assert torch.autograd.gradcheck(lambda x: R.dro_value(x, r=0.3), (f,))
    assert torch.autograd.gradcheck(lambda x: R.kl_weights(x, r=0.3), (f,))
    hidden, weight = (randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(((2, 4, 3), (5, 3))))
    tokens = torch.randint(0, 5, (2, 4), generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda h, o: R.sequence_losses(h, o, tokens)[0], (hidden, weight))


# ---- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", NAMED)
def test_no_gradient_through_the_weights(strategy):
    f = rand(9).requires_grad_()
    loss = R.reweighted_loss(f, strategy=strategy, r=0.6)
    loss.backward()
    w = R.sample_weights(f, strategy=strategy, r=0.6)
    assert not w.requires_grad and torch.equal(f.grad, w) and loss.item() == pytest.approx((w * f).sum().item())
    if strategy == "uniform":
        assert loss.item() == pytest.approx(f.mean().item())
    given = w.clone().requires_grad_()
    R.reweighted_loss(f, weights=given).backward()
    assert given.grad is None


def test_strategy_is_not_used_beside_weights():
    f, w = rand(4), torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=DOUBLE)
    assert R.reweighted_loss(f, strategy="dro", r=0.1, weights=w) == pytest.approx((w * f).sum().item())


def test_micro_batches_add_up():
    """Weights once for the step, then the parts: the gradient of the whole batch. Weights for each micro-batch alone are something else."""
    x = randn(24, 5)
    losses = lambda rows, theta: (x[rows] @ theta).square()
    whole = randn(5, seed=1).requires_grad_()
    R.reweighted_loss(losses(slice(None), whole), r=0.3).backward()
    parts, alone = (randn(5, seed=1).requires_grad_() for _ in range(2))
    with torch.no_grad():
        w = R.sample_weights(losses(slice(None), parts), r=0.3)
    for k in range(0, 24, 6):
        R.reweighted_loss(losses(slice(k, k + 6), parts), weights=w[k : k + 6]).backward()
        (R.reweighted_loss(losses(slice(k, k + 6), alone), r=0.3) / 4).backward()
    assert torch.allclose(parts.grad, whole.grad, rtol=1e-12) and not torch.allclose(alone.grad, whole.grad, rtol=0.01)


def slow_sequence_losses(hidden, weight, tokens, mask, bias):
    losses, counts = [], []
    for h, t, m in zip(hidden, tokens, mask, strict=True):
        terms = [
            F.cross_entropy((h[k - 1] @ weight.T + bias)[None], t[k][None]) for k in range(1, len(t)) if m[k].item()
        ]
        losses.append(torch.stack(terms).mean())
        counts.append(len(terms))
    return torch.stack(losses), torch.tensor(counts)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(2, 7), st.integers(1, 9), st.integers(0, 999))
def test_sequence_losses_are_the_slow_ones(batch, length, vocabulary, seed):
    hidden, weight, bias = (
        randn(batch, length, 3, seed=seed),
        randn(vocabulary, 3, seed=seed + 1),
        randn(vocabulary, seed=3),
    )
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (batch, length), generator=generator)
    mask = torch.rand(batch, length, generator=generator) < 0.6
    mask[:, -1] = True
    losses, counts = R.sequence_losses(hidden, weight, tokens.masked_fill(~mask, -7), mask, bias=bias)
    wanted, numbers = slow_sequence_losses(hidden, weight, tokens, mask, bias)
    assert torch.allclose(losses, wanted, rtol=1e-9) and torch.equal(counts, numbers)
    everything = R.sequence_losses(hidden, weight, tokens, bias=bias)
    wanted, numbers = slow_sequence_losses(hidden, weight, tokens, torch.ones_like(mask), bias)
    assert torch.allclose(everything[0], wanted, rtol=1e-9) and torch.equal(everything[1], numbers)


def test_token_weights():
    f, n = rand(5), torch.tensor([3, 9, 1, 4, 8])
    w = R.token_weights(R.sample_weights(f, strategy="uniform"), n)
    assert torch.allclose(R.reweighted_loss(f, weights=w), (n * f).sum() / n.sum())  # the mean over tokens
    w = R.sample_weights(f)
    assert torch.allclose(R.token_weights(w, torch.full((5,), 7)), w, rtol=1e-14)
    assert torch.allclose(R.token_weights(w, n), w * n * 5 / 25, rtol=1e-14)


def test_temperature_schedule():
    schedule = R.TemperatureSchedule(0.4, 3)
    assert [schedule(t) for t in range(5)] == [100, 100, 100, 0.4, 0.4]
    assert R.TemperatureSchedule(0.4, 0)(0) == 0.4
    uniform = R.TemperatureSchedule(1.0, 1, r_initial=math.inf)
    f = rand(6)
    assert torch.equal(R.sample_weights(f, r=uniform(0)), torch.full_like(f, 1 / 6)) and uniform(1) == 1


# ---- theory --------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 8), st.sampled_from([*NAMED, "random"]), st.floats(0.01, 1), st.floats(0.1, 10),
    st.integers(1, 30), st.integers(0, 2**31),
)  # fmt: skip
def test_convergence(num_samples, dim, strategy, c, r, steps, seed):
    """Least squares with a common minimizer, and any weights: the bound holds, and with the cap the other one does."""
    x = randn(num_samples, dim, seed=seed) * (10 ** (2 * rand(num_samples, 1, seed=seed + 1) - 1))
    target, smoothness = randn(dim, seed=seed + 2), x.square().sum(1).max().item()
    for capped in (False, True):
        eta = 1 / (4 * smoothness) if capped else c / smoothness
        theta, alignments, means = torch.zeros(dim, dtype=DOUBLE), [], []
        for t in range(steps):
            gaps = x @ (theta - target)
            f = gaps.square() / 2
            if strategy == "random":
                w = -(1 - rand(num_samples, seed=seed + 3 + t)).log() + 1e-9
                w = w / w.sum()
            else:
                w = R.sample_weights(f, strategy=strategy, r=r)
            if capped:  # towards uniform weights, until the largest is 2/M
                excess = w - 1 / num_samples
                w = 1 / num_samples + excess / max(1.0, num_samples * excess.max().item())
            means.append(f.mean())
            alignments.append(R.alignment(w, f))
            theta = theta - eta * (w * gaps) @ x
        alignments, distance = torch.stack(alignments), target.square().sum().item()
        bound = R.convergence_bound(distance, eta, alignments) * (2 if capped else 1)
        assert torch.stack(means).mean() <= bound + 1e-9 * (1 + abs(bound))


def test_convergence_bound_is_reached():
    """One sample in one dimension at full step: gone after one step, and the bound is exact."""
    a, target = 3.0, 2.0
    f = torch.tensor([(a * target) ** 2 / 2], dtype=DOUBLE)
    A = R.alignment(torch.ones(1, dtype=DOUBLE), f)
    assert A == 0 and R.convergence_bound(target**2, 1 / a**2, A[None]) == pytest.approx(f.item())


def test_alignment():
    f = torch.tensor([0.0, 1.0, 2.0], dtype=DOUBLE)
    A = R.alignment(R.sample_weights(f), f)
    assert A == pytest.approx((E - 1) / (2 * E + 1)) == pytest.approx(0.266956, abs=1e-6)
    g, minima = rand(8), rand(8, seed=1)
    w = R.sample_weights(g, strategy="extremes")
    slow = sum((w[i] - 1 / 8) * (g[i] - minima[i]) for i in range(8))
    assert R.alignment(w, g, minima) == pytest.approx(slow.item())
    assert R.alignment(w, g) == pytest.approx(8 * torch.cov(torch.stack([w, g]), correction=0)[0, 1].item())
    big = 1e4 + rand(1000, dtype=torch.float32)  # a common level costs no digits
    w = R.sample_weights(big)
    assert R.alignment(w, big) == pytest.approx(R.alignment(w.double(), big.double()).item(), rel=1e-3)


@settings(max_examples=100, deadline=None)
@given(batches, st.sampled_from(["linupper", "dro"]), st.floats(0.1, 20), st.floats(1, 10))
def test_chebyshev(f, strategy, r, factor):
    """Weights that grow with the loss align, the more the colder."""
    warm, cold = (R.alignment(R.sample_weights(f, strategy=strategy, r=t), f) for t in (r, r / factor))
    assert -1e-12 <= warm <= cold + 1e-10
    falling = R.sample_weights(f, strategy=lambda h: -h, r=r)
    assert R.alignment(falling, f) <= 1e-12


def test_two_shapes_have_no_sign():
    low, high = (torch.tensor(values, dtype=DOUBLE) for values in ([0.0, 0.1, 0.2, 1.0], [0.0, 0.8, 0.9, 1.0]))
    signs = {
        s: [R.alignment(R.sample_weights(f, strategy=s), f) > 0 for f in (low, high)] for s in ("extremes", "quadratic")
    }
    assert signs == {"extremes": [True, False], "quadratic": [False, True]}


def test_letting_gradients_through_can_reverse_a_sample():
    """With s = f the coefficient of sample i is w_i (1 + (f_i - mean_w f) / r): negative below mean_w f - r."""
    f, r = torch.tensor([0.0, 1.0, 2.0], dtype=DOUBLE).requires_grad_(), 0.5
    w = R.kl_weights(f, r=r)
    (through,) = torch.autograd.grad((w * f).sum(), f)
    mean = (w * f).sum()
    assert torch.allclose(through, w * (1 + (f - mean) / r)) and through[0] < 0 < w[0]


# ---- processes -----------------------------------------------------------------------------------------------------

ROWS, DIM = 6, 4


def data():
    return randn(2 * ROWS, DIM, seed=5), torch.randint(1, 9, (2 * ROWS,), generator=torch.Generator().manual_seed(0))


def losses_of(x, theta):
    return (x @ theta).square()


def of_one_process(rank):
    out = {}
    x, n = (values[rank * ROWS : (rank + 1) * ROWS] for values in data())
    for strategy in NAMED:
        theta = torch.ones(DIM, dtype=DOUBLE, requires_grad=True)
        f = losses_of(x, theta)
        w = R.sample_weights(f, strategy=strategy, r=0.5, distributed=True)
        loss = R.reweighted_loss(f, strategy=strategy, r=0.5, distributed=True)
        loss.backward()
        out[strategy] = w, loss.detach(), theta.grad
    theta = torch.ones(DIM, dtype=DOUBLE, requires_grad=True)  # two micro-batches on each process
    with torch.no_grad():
        w = R.sample_weights(losses_of(x, theta), r=0.5, distributed=True)
    parts = [slice(0, 3), slice(3, ROWS)]
    values = [R.reweighted_loss(losses_of(x[p], theta), weights=w[p], distributed=True) for p in parts]
    sum(values).backward()
    out["micro"] = w, sum(values).detach(), theta.grad
    net = torch.nn.Linear(DIM, 1, bias=False, dtype=DOUBLE)
    torch.nn.init.ones_(net.weight)
    model = torch.nn.parallel.DistributedDataParallel(net)
    R.reweighted_loss(model(x).squeeze(1).square(), r=0.5, distributed=True).backward()
    out["ddp"] = net.weight.grad[0]
    out["tokens"] = R.token_weights(w, n, distributed=True)
    try:
        R.sample_weights(torch.rand(rank + 1), distributed=True)
    except ValueError as error:
        out["error"] = str(error)
    return out


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return in_two_processes(of_one_process, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("name", [*NAMED, "micro"])
def test_two_processes_match_one(two_processes, name):
    theta = torch.ones(DIM, dtype=DOUBLE, requires_grad=True)
    x, _ = data()
    f = losses_of(x, theta)
    strategy = "linupper" if name == "micro" else name
    loss = R.reweighted_loss(f, strategy=strategy, r=0.5)
    loss.backward()
    weights, values, grads = zip(*(out[name] for out in two_processes), strict=True)
    close = dict(rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat(weights), R.sample_weights(f, strategy=strategy, r=0.5), **close)
    torch.testing.assert_close(sum(values) / 2, loss.detach(), **close)  # processes are averaged
    torch.testing.assert_close(sum(grads) / 2, theta.grad, **close)
    if name == "linupper":
        assert all(torch.allclose(out["ddp"], theta.grad, **close) for out in two_processes)


def test_processes_share_tokens_and_shapes(two_processes):
    x, n = data()
    w = R.sample_weights(losses_of(x, torch.ones(DIM, dtype=DOUBLE)), r=0.5)
    assert torch.allclose(torch.cat([out["tokens"] for out in two_processes]), R.token_weights(w, n), rtol=1e-10)
    assert all("must have one shape on every process" in out["error"] for out in two_processes)


def test_distributed_without_a_group_is_one_process():
    f, n = rand(5), torch.tensor([1, 2, 3, 4, 5])
    w = R.sample_weights(f)
    assert torch.equal(R.sample_weights(f, distributed=True), w)
    assert R.reweighted_loss(f, distributed=True) == R.reweighted_loss(f)
    assert torch.equal(R.token_weights(w, n, distributed=True), R.token_weights(w, n))


# ---- transformations and training ----------------------------------------------------------------------------------


def test_transformations():
    f = rand(4, 7)
    slow = torch.stack([R.sample_weights(row, r=0.3) for row in f])
    assert torch.allclose(torch.func.vmap(lambda row: R.sample_weights(row, r=0.3))(f), slow, rtol=1e-12)
    assert torch.allclose(torch.func.grad(lambda row: R.reweighted_loss(row, r=0.3))(f[0]), slow[0], rtol=1e-12)
    torch._dynamo.reset()
    for strategy in SHAPED:
        compiled = torch.compile(
            lambda x, s=strategy: R.reweighted_loss(x, strategy=s), backend="aot_eager", fullgraph=True
        )
        x, y = f[0].clone().requires_grad_(), f[0].clone().requires_grad_()
        compiled(x).backward()
        R.reweighted_loss(y, strategy=strategy).backward()
        assert torch.allclose(x.grad, y.grad, rtol=1e-12)


def test_training_a_language_model_under_autocast():
    torch.manual_seed(0)
    model = lab.Transformer(20, dim=16, depth=1, heads=2, context=8)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    tokens = torch.randint(0, 20, (12, 8), generator=torch.Generator().manual_seed(0))
    values = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.hidden(tokens)
            losses, _ = R.sequence_losses(hidden, model.output_weight.to(hidden.dtype), tokens)
            loss = R.reweighted_loss(losses, r=0.4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(losses.mean().item())
    assert losses.dtype == torch.float32 and values[-1] < values[0] - 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("strategy", NAMED)
def test_gpu_is_the_cpu(strategy):
    f = rand(50)
    w = R.sample_weights(f.cuda(), strategy=strategy, r=0.3)
    assert w.is_cuda and torch.allclose(w.cpu(), R.sample_weights(f, strategy=strategy, r=0.3), rtol=1e-10)


# ---- bad input -----------------------------------------------------------------------------------------------------

THREE = torch.tensor([1.0, 2.0, 3.0])
TOKENS = torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: R.sample_weights(torch.zeros(0)), ValueError, "losses must not be empty"),
        (lambda: R.sample_weights([1.0, 2.0]), TypeError, "losses must be a tensor, got list"),
        (lambda: R.sample_weights(TOKENS[0]), TypeError, "losses must be a floating-point tensor"),
        (lambda: R.sample_weights(torch.zeros(2, 2)), ValueError, r"losses must have 1 dimension\(s\), got shape \(2, 2\)"),
        (lambda: R.sample_weights(torch.tensor([1.0, math.nan])), ValueError, "losses must be finite"),
        (lambda: R.reweighted_loss(torch.tensor([1.0, math.inf])), ValueError, "losses must be finite"),
        (lambda: R.sample_weights(THREE, r=0.0), ValueError, "r must be finite and > 0, got 0"),
        (lambda: R.sample_weights(THREE, r=-math.inf), ValueError, "r must be finite and > 0"),
        (lambda: R.sample_weights(THREE, r="cold"), TypeError, "r must be a number"),
        (lambda: R.sample_weights(THREE, delta=0.0), ValueError, "delta must be finite and > 0"),
        (lambda: R.sample_weights(THREE, strategy="upper"), ValueError, "strategy must be one of .*'linupper'.* got 'upper'"),
        (lambda: R.sample_weights(THREE, strategy=3), ValueError, "strategy must be one of"),
        (lambda: R.sample_weights(THREE, strategy=lambda h: h.sum()), ValueError, r"strategy must return floating-point scores of shape \(3,\)"),
        (lambda: R.score(2 * THREE), ValueError, r"normalized must lie in \[-1, 1\]"),
        (lambda: R.score(THREE, "dro", delta=-3.0), ValueError, "delta must be finite and > 0"),
        (lambda: R.normalize_losses(THREE, eps=0.0), ValueError, "eps must be finite and > 0"),
        (lambda: R.reweighted_loss(THREE, weights=torch.ones(2)), ValueError, r"weights must have shape \(3,\), one for each loss"),
        (lambda: R.reweighted_loss(THREE, weights=TOKENS[0]), TypeError, "weights must be a floating-point tensor"),
        (lambda: R.reweighted_loss(THREE, weights=THREE / torch.tensor([1.0, 0.0, 1.0])), ValueError, "weights must be finite"),
        (lambda: R.kl_weights(THREE, r=0), ValueError, "r must be finite and > 0"),
        (lambda: R.kl_objective(THREE, THREE.double()), TypeError, "weights must have the dtype of scores"),
        (lambda: R.kl_objective(THREE, THREE, r=math.inf), ValueError, "r must be finite"),
        (lambda: R.dro_value(THREE, r=math.inf), ValueError, "r must be finite"),
        (lambda: R.token_weights(THREE, TOKENS[0]), ValueError, r"num_tokens must have shape \(3,\)"),
        (lambda: R.token_weights(THREE, torch.tensor([1, 0, 2])), ValueError, "num_tokens must be > 0, got 0"),
        (lambda: R.sequence_losses(torch.zeros(2, 3, 5), torch.zeros(7, 5), TOKENS), ValueError, r"tokens must have shape \(2, 3\)"),
        (lambda: R.sequence_losses(torch.zeros(2, 1, 5), torch.zeros(7, 5), TOKENS[:, :1]), ValueError, "at least 2 columns"),
        (lambda: R.sequence_losses(torch.zeros(2, 4, 5), torch.zeros(7, 5), TOKENS, TOKENS), TypeError, "mask must be a boolean"),
        (lambda: R.sequence_losses(torch.zeros(2, 4, 5), torch.zeros(7, 5), TOKENS, (TOKENS == 0)[:1]), ValueError, "mask must have shape"),
        (lambda: R.sequence_losses(torch.zeros(2, 4, 5), torch.zeros(7, 5), TOKENS, torch.arange(4).expand(2, 4) < 1), ValueError, "mask must keep a token after the first"),
        (lambda: R.TemperatureSchedule(0.0, 3), ValueError, "r must be finite and > 0"),
        (lambda: R.TemperatureSchedule(1.0, -1), ValueError, "burn_in must be at least 0"),
        (lambda: R.TemperatureSchedule(1.0, 1, r_initial=0.0), ValueError, "r_initial must be"),
        (lambda: R.TemperatureSchedule(1.0, 1)(-1), ValueError, "step must be at least 0"),
        (lambda: R.weight_cap(3, 4), ValueError, "num_top must be at most num_samples = 3, got 4"),
        (lambda: R.weight_cap(0), ValueError, "num_samples must be at least 1"),
        (lambda: R.weight_cap(3, strategy=lambda h: h), ValueError, "got a function"),
        (lambda: R.alignment(torch.ones(2), THREE), ValueError, r"weights must have shape \(3,\) like losses"),
        (lambda: R.alignment(THREE, THREE, torch.ones(2)), ValueError, "minima must have the shape of losses"),
        (lambda: R.convergence_bound(-1.0, 0.1, THREE), ValueError, "distance_sq must be"),
        (lambda: R.convergence_bound(1.0, 0.0, THREE), ValueError, "step_size must be"),
        (lambda: R.convergence_bound(1.0, 1.0, torch.zeros(0)), ValueError, "alignments must not be empty"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
