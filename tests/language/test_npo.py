"""The theorems of chapter language/npo as properties; closed forms, limits, metrics against slow oracles, the synthetic task, bad input."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp
from scipy.special import expit
from scipy.stats import hmean, ks_2samp

from lossbook.language import npo as N

D = torch.float64
seeds = st.integers(0, 2**31)
betas = st.floats(0.01, 20)
few = settings(deadline=None, max_examples=40)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=generator(seed), dtype=D)


# ---- the loss --------------------------------------------------------------------------------------------------------


@few
@given(seeds, betas)
def test_loss_and_weight_are_their_equations(seed, beta):
    logps, ref = -normal(9, seed=seed).exp(), -normal(9, seed=seed + 1).exp()
    wanted, weights = [], []
    for a, b in zip(logps.tolist(), ref.tolist(), strict=True):
        ratio = (math.exp(a) / math.exp(b)) ** beta
        wanted.append(2 / beta * math.log1p(ratio))
        weights.append(2 * math.exp(a) ** beta / (math.exp(a) ** beta + math.exp(b) ** beta))
    got = N.npo_loss(logps, ref, beta=beta, reduction="none")
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(N.npo_weight(logps, ref, beta=beta), weights, rtol=1e-9)
    assert N.npo_loss(logps, ref, beta=beta).item() == pytest.approx(np.mean(wanted))
    assert N.npo_loss(logps, ref, beta=beta, reduction="sum").item() == pytest.approx(np.sum(wanted))


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 10.0])
def test_at_the_start(beta):
    """Weight 1 and NPO's first step is gradient ascent's, for every beta."""
    logps = (-normal(5).exp()).requires_grad_()
    loss = N.npo_loss(logps, logps.detach(), beta=beta)
    loss.backward()
    assert loss.item() == pytest.approx(2 / beta * math.log(2))
    assert torch.equal(N.npo_weight(logps, logps, beta=beta), torch.ones(5, dtype=D))
    torch.testing.assert_close(logps.grad, torch.full((5,), 0.2, dtype=D))


def test_by_hand():
    zero = torch.zeros(2, dtype=D)
    logps = torch.tensor([math.log(3), -math.log(3)], dtype=D)
    got = N.npo_loss(logps, zero, beta=1.0, reduction="none").tolist()
    assert got == pytest.approx([2.772589, 0.575364], abs=1e-6)
    assert N.npo_weight(logps, zero, beta=1.0).tolist() == pytest.approx([1.5, 0.5])


@few
@given(seeds, st.floats(-6, 0))
def test_gradient_ascent_is_the_limit(seed, power):
    beta = 10**power
    ratio = normal(20, seed=seed, scale=3.0)
    loss = N.npo_loss(ratio, torch.zeros_like(ratio), beta=beta, reduction="none")
    excess = loss - 2 / beta * math.log(2) - ratio
    estimate = beta * ratio**2 / 4
    rounding = 1e-14 / beta
    assert (excess >= -rounding).all() and (excess <= estimate + rounding).all()
    # log cosh x = x²/2 - x⁴/12 + ..., with x = βR/2
    assert (excess >= estimate * (1 - (beta * ratio) ** 2 / 24) - rounding).all()


def test_order_of_the_limit():
    ratio, zero = torch.tensor([-3.0], dtype=D), torch.zeros(1, dtype=D)
    excess = N.npo_loss(ratio, zero, beta=0.2).item() - 10 * math.log(2) + 3
    assert excess == pytest.approx(0.443408, abs=1e-6)


def test_hinge_is_the_other_limit():
    ratio = torch.linspace(-2, 2, 9, dtype=D)
    loss = N.npo_loss(ratio, torch.zeros_like(ratio), beta=1e4, reduction="none")
    torch.testing.assert_close(loss, 2 * ratio.clamp(min=0), rtol=0, atol=2e-4)


@few
@given(seeds, betas)
def test_gradient_is_the_weight(seed, beta):
    logps, ref = normal(7, seed=seed, scale=4.0).requires_grad_(), normal(7, seed=seed + 1).requires_grad_()
    N.npo_loss(logps, ref, beta=beta).backward()
    weight = N.npo_weight(logps, ref, beta=beta)
    torch.testing.assert_close(logps.grad, weight / 7, rtol=1e-9, atol=1e-12)
    assert ref.grad is None and not weight.requires_grad
    assert (weight >= 0).all() and (weight <= 2).all()
    order = (logps - ref).detach().argsort()
    assert (weight[order].diff() >= 0).all()


def test_gradcheck_and_functional():
    logps, ref, idk = (normal(4, seed=k).requires_grad_(k != 1) for k in range(3))
    losses = [
        lambda x: N.npo_loss(x, ref, beta=0.7),
        lambda x: N.dpo_unlearning_loss(x, ref, idk, ref, beta=0.7),
        lambda x: N.dpo_unlearning_loss(idk, ref, x, ref, beta=0.7),
        lambda x: N.kto_unlearning_loss(x, ref, 0.3, beta=0.7),
        N.gradient_ascent_loss,
        N.retain_loss,
        N.idk_loss,
    ]
    for loss in losses:
        assert torch.autograd.gradcheck(loss, logps, check_forward_ad=False)
        wanted = torch.autograd.grad(loss(logps), logps)[0]
        torch.testing.assert_close(torch.func.grad(loss)(logps.detach()), wanted)
    batch = normal(3, 4, seed=9)
    each = torch.func.vmap(lambda x: N.npo_loss(x, ref.detach(), beta=0.7))(batch)
    torch.testing.assert_close(each, torch.stack([N.npo_loss(x, ref, beta=0.7) for x in batch]))
    compiled = torch.compile(lambda x: N.npo_loss(x, ref.detach(), beta=0.7), backend="aot_eager")
    torch.testing.assert_close(compiled(logps), losses[0](logps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes(dtype):
    logps = torch.tensor([1e4, -1e4, 0.0], dtype=dtype, requires_grad=True)
    ref = torch.zeros(3, dtype=dtype)
    for beta in (0.1, 1.0, 10.0):
        loss = N.npo_loss(logps, ref, beta=beta, reduction="none")
        assert loss.dtype == dtype
        torch.testing.assert_close(loss[:2], torch.tensor([2e4, 0.0], dtype=dtype))
        (gradient,) = torch.autograd.grad(loss.sum(), logps)
        torch.testing.assert_close(gradient, torch.tensor([2.0, 0.0, 1.0], dtype=dtype))
        torch.testing.assert_close(N.npo_weight(logps, ref, beta=beta), gradient)
        others = N.dpo_unlearning_loss(logps, ref, -logps, ref, beta=beta, reduction="none")
        kto = N.kto_unlearning_loss(logps, ref, 1e4, beta=beta, reduction="none")
        assert others.isfinite().all() and kto.isfinite().all()
    never = torch.tensor([-math.inf], requires_grad=True)  # an answer of probability zero is forgotten
    loss = N.npo_loss(never, torch.zeros(1), beta=1.0)
    loss.backward()
    assert loss.item() == 0 and never.grad.item() == 0


def test_digits_where_softplus_is_linear():
    """Above its threshold torch's softplus drops what is left of the exponential."""
    ratio = torch.tensor([21.0], dtype=D, requires_grad=True)
    loss = N.npo_loss(ratio, torch.zeros(1, dtype=D), beta=1.0)
    loss.backward()
    assert loss.item() - 42 == pytest.approx(2 * math.exp(-21), rel=1e-4)
    assert 2 - ratio.grad.item() == pytest.approx(2 * math.exp(-21), rel=1e-4)


def test_half_precision_and_autocast():
    logps, ref = torch.tensor([-300.0, -20.0]), torch.tensor([-301.0, -19.5])
    wanted = N.npo_loss(logps, ref, beta=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert N.npo_loss(logps, ref, beta=0.1).item() == wanted.item()
    half = N.npo_loss(logps.bfloat16(), ref.bfloat16(), beta=0.1)  # the differences are taken in float32
    rounded = N.npo_loss(logps.bfloat16().float(), ref.bfloat16().float(), beta=0.1)
    assert half.dtype == torch.float32 and half.item() == rounded.item()


# ---- what it is compared with ----------------------------------------------------------------------------------------


@few
@given(seeds, betas)
def test_the_family(seed, beta):
    logps, ref, idk, ref_idk = (normal(6, seed=seed + k, scale=2.0) for k in range(4))
    npo = N.npo_loss(logps, ref, beta=beta, reduction="none")
    # DPO with a winner that has not moved, and KTO with the reference point 0, are NPO.
    torch.testing.assert_close(N.dpo_unlearning_loss(logps, ref, idk, idk, beta=beta, reduction="none"), npo)
    torch.testing.assert_close(N.kto_unlearning_loss(logps, ref, 0.0, beta=beta, reduction="none"), npo)
    torch.testing.assert_close(
        N.kto_unlearning_loss(logps, ref, torch.tensor(0.5), beta=beta), N.npo_loss(logps - 0.5, ref, beta=beta)
    )
    wanted = [
        -2 / beta * math.log(1 / (1 + math.exp(-beta * ((c - e) - (a - b)))))
        for a, b, c, e in zip(*(x.tolist() for x in (logps, ref, idk, ref_idk)), strict=True)
    ]
    got = N.dpo_unlearning_loss(logps, ref, idk, ref_idk, beta=beta, reduction="none")
    np.testing.assert_allclose(got, wanted, rtol=1e-7, atol=1e-9)


def test_plain_baselines():
    logps = torch.tensor([-1.0, -4.0])
    assert N.gradient_ascent_loss(logps).item() == -2.5
    assert N.retain_loss(logps).item() == N.idk_loss(logps).item() == 2.5
    assert N.retain_loss(logps, reduction="sum").item() == 5
    assert N.idk_loss(logps, reduction="none").tolist() == [1, 4]


def test_no_gradient_into_references():
    tensors = [normal(3, seed=k).requires_grad_() for k in range(4)]
    point = torch.tensor(0.3, dtype=D, requires_grad=True)
    loss = N.dpo_unlearning_loss(*tensors, beta=1.0) + N.kto_unlearning_loss(tensors[0], tensors[1], point, beta=1.0)
    loss.backward()
    assert tensors[1].grad is None and tensors[3].grad is None and point.grad is None
    assert tensors[0].grad is not None and tensors[2].grad is not None
    logits, ref = normal(2, 3, seed=1).requires_grad_(), normal(2, 3, seed=2).requires_grad_()
    N.retain_kl(logits, ref).backward()
    assert ref.grad is None and logits.grad is not None


def test_retain_kl():
    logits, ref = normal(2, 3, 5, seed=1, scale=2.0), normal(2, 3, 5, seed=2, scale=2.0)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    each = []
    for i, t in itertools.product(range(2), range(3)):
        p, q = torch.softmax(ref[i, t], 0).tolist(), torch.softmax(logits[i, t], 0).tolist()
        each.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert N.retain_kl(logits, ref).item() == pytest.approx(np.mean(each))
    kept = [each[0], each[2], each[5]]
    assert N.retain_kl(logits, ref, mask).item() == pytest.approx(np.mean(kept))
    assert N.retain_kl(ref, ref).item() == pytest.approx(0, abs=1e-12)
    # The direction: it is not symmetric.
    assert N.retain_kl(logits, ref).item() != pytest.approx(N.retain_kl(ref, logits).item(), rel=1e-3)
    nan = logits.clone()
    nan[0, 1] = math.nan  # a masked token does not count
    assert N.retain_kl(nan, ref, mask).item() == pytest.approx(np.mean(kept))
    nan.requires_grad_()
    (gradient,) = torch.autograd.grad(N.retain_kl(nan, ref, mask), nan)
    wanted = (torch.softmax(logits, -1) - torch.softmax(ref, -1)) * mask[:, :, None] / 3
    torch.testing.assert_close(gradient, wanted)
    one = torch.tensor([[False] * 3, [True, False, False]])  # a row without a token
    assert N.retain_kl(logits, ref, one).item() == pytest.approx(each[3])
    far = torch.tensor([[1e4, -1e4]])
    assert N.retain_kl(far, -far).isfinite()


# ---- metrics ---------------------------------------------------------------------------------------------------------


@few
@given(seeds)
def test_truth_ratio(seed):
    wrong, right = -normal(8, 5, seed=seed).exp(), -normal(8, seed=seed + 1).exp()
    arithmetic = [np.mean(np.exp(w)) / math.exp(r) for w, r in zip(wrong.numpy(), right.tolist(), strict=True)]
    geometric = [
        math.prod(math.exp(x) for x in w) ** 0.2 / math.exp(r)
        for w, r in zip(wrong.tolist(), right.tolist(), strict=True)
    ]
    np.testing.assert_allclose(N.truth_ratio(wrong, right), arithmetic)
    np.testing.assert_allclose(N.truth_ratio(wrong, right, mean="geometric"), geometric)
    np.testing.assert_allclose(N.truth_ratio(wrong, right, log=True), np.log(arithmetic), atol=1e-12)
    assert (N.truth_ratio(wrong, right) >= N.truth_ratio(wrong, right, mean="geometric") - 1e-12).all()
    assert N.truth_score(torch.tensor(arithmetic)) == pytest.approx(np.mean([max(0, 1 - x) for x in arithmetic]))


def test_truth_ratio_at_the_edge():
    same = torch.full((3, 5), -0.7)
    torch.testing.assert_close(N.truth_ratio(same, same[:, 0]), torch.ones(3))
    far = torch.full((1, 2), -1.0), torch.full((1,), -1e4)
    assert N.truth_ratio(*far).item() == math.inf
    assert N.truth_ratio(*far, log=True).item() == pytest.approx(9999)
    assert N.truth_score(N.truth_ratio(*far)) == 0


def test_forget_quality():
    a, b = normal(40, seed=1), normal(30, seed=2) + 0.5
    assert N.forget_quality(a, a) == 1
    assert N.forget_quality(a, b) == ks_2samp(a.numpy(), b.numpy()).pvalue
    assert N.forget_quality(a[:30], a[:30] + 100) < 1e-10
    # The test only sees ranks: ratios, logarithms and inverses give one p-value.
    for change in (torch.exp, lambda x: (-x).exp()):
        assert N.forget_quality(change(a), change(b)) == pytest.approx(N.forget_quality(a, b), rel=1e-9)
    assert N.forget_quality(torch.tensor([math.inf, 1.0]), torch.tensor([math.inf, 1.0])) == 1


def slow_lcs(a, b):
    return max((k for k in range(len(a) + 1) for c in itertools.combinations(a, k) if subsequence(c, b)), default=0)


def subsequence(c, b):
    rest = iter(b)
    return all(x in rest for x in c)


@few
@given(st.lists(st.integers(0, 3), min_size=1, max_size=7), st.lists(st.integers(0, 3), max_size=7))
def test_rouge_l(reference, candidate):
    assert N.rouge_l_recall(reference, candidate) == slow_lcs(reference, candidate) / len(reference)
    assert N.rouge_l_recall(reference, reference) == 1 and N.rouge_l_recall(reference, []) == 0


def test_utility():
    right, wrong = -normal(6, seed=1).exp(), -normal(6, 4, seed=2).exp()
    assert N.answer_probability(right) == pytest.approx(np.exp(right.numpy()).mean())
    shares = [
        math.exp(r) / (math.exp(r) + sum(map(math.exp, w))) for r, w in zip(right.tolist(), wrong.tolist(), strict=True)
    ]
    assert N.answer_probability(right, wrong) == pytest.approx(np.mean(shares))
    values = [0.9, 0.8, 0.5, 0.7, 0.6, 0.9, 0.99, 0.3, 0.2]
    assert N.model_utility(values) == hmean(values) == pytest.approx(9 / sum(1 / v for v in values))
    assert N.model_utility([0.5, 0.0]) == 0 and N.model_utility(torch.tensor([0.5, 0.5])) == pytest.approx(0.5)


# ---- the flow --------------------------------------------------------------------------------------------------------


def runge_kutta(m0, kappa, t, beta):
    def velocity(_t, m):
        p = expit(m)
        weight = 1.0 if beta is None else 2 * p**beta / (p**beta + (1 / (1 + math.exp(-m0))) ** beta)
        return -kappa * (1 - p) * weight

    return solve_ivp(velocity, (0, t[-1]), [m0], t_eval=t, method="DOP853", rtol=1e-12, atol=1e-12).y[0]


@pytest.mark.parametrize("beta", [None, 0.1, 0.5, 1.0, 2.0, 7.0, 60.0])
@pytest.mark.parametrize(("m0", "kappa"), [(2.0, 1.0), (-1.0, 0.3), (5.0, 40.0)])
def test_flow_against_runge_kutta(beta, m0, kappa):
    t = np.array([0.0, 1e-6, 0.5, 3.0, 30.0, 100.0])
    wanted = runge_kutta(m0, kappa, t, beta)
    np.testing.assert_allclose(N.margin_flow(m0, kappa, torch.tensor(t), beta=beta), wanted, rtol=1e-8, atol=1e-8)


def test_flow_numbers():
    assert N.margin_flow(2.0, 1.0, 30.0).item() == pytest.approx(-20.6109, abs=1e-4)
    assert N.margin_flow(2.0, 1.0, 30.0, beta=1.0).item() == pytest.approx(-3.55850, abs=1e-5)
    # Times to the margin -10: in closed form, and back.
    for time, beta in ((19.389, None), (9723.9, 1.0)):
        assert N.margin_flow(2.0, 1.0, time, beta=beta).item() == pytest.approx(-10, abs=1e-3)
    for beta, off in ((0.25, 0.010), (0.5, 0.0038), (1.0, 0.0024), (2.0, 0.014)):
        flow, formula = (f(2.0, 1.0, 1e4, beta=beta).item() for f in (N.margin_flow, N.margin_asymptote))
        assert abs(flow - formula) == pytest.approx(off, rel=0.06)


@few
@given(st.floats(-5, 5), st.floats(0.1, 10), st.floats(0.05, 5))
def test_time_as_an_integral(m0, kappa, beta):
    """The flow, put into the integral that it inverts."""
    t = 20.0
    m = N.margin_flow(m0, kappa, t, beta=beta).item()
    pi0 = 1 / (1 + math.exp(-m0))
    time, _ = quad(
        lambda s: (1 + math.exp(s)) * (1 + (pi0 * (1 + math.exp(-s))) ** beta), m, m0, epsabs=1e-12, epsrel=1e-11
    )
    assert time == pytest.approx(2 * kappa * t, rel=1e-7)
    m = N.margin_flow(m0, kappa, t).item()
    assert m0 - m + math.exp(m0) - math.exp(m) == pytest.approx(kappa * t, rel=1e-9)


@few
@given(st.floats(-3, 3), st.floats(0.1, 10), st.floats(0.05, 5))
def test_order_of_flows(m0, kappa, beta):
    t = torch.tensor([[0.0, 0.1], [10.0, 1000.0]], dtype=D)
    ascent, npo, npo2 = (N.margin_flow(m0, kappa, t, beta=b) for b in (None, beta, 2 * beta))
    assert npo.shape == t.shape and npo.dtype == D
    assert npo[0, 0].item() == pytest.approx(m0, abs=1e-9)
    assert (npo >= ascent - 1e-9).all() and (npo2 >= npo - 1e-9).all()
    assert (npo.flatten().diff() < 0).all()


def test_flow_with_a_steep_integrand():
    m = N.margin_flow(0.0, 1.0, 5.0, beta=3000.0).item()
    time, _ = quad(lambda s: (1 + math.exp(s)) * (1 + ((1 + math.exp(-s)) / 2) ** 3000), m, 0, epsrel=1e-11)
    assert time == pytest.approx(10, rel=1e-7)
    m = N.margin_flow(0.0, 1.0, 1e200, beta=1000.0).item()  # several panels
    edges = np.linspace(m, 0, 200)
    pieces = [
        quad(lambda s: (1 + math.exp(s)) * (1 + ((1 + math.exp(-s)) / 2) ** 1000), a, b)[0]
        for a, b in zip(edges[:-1], edges[1:], strict=True)
    ]
    assert sum(pieces) == pytest.approx(2e200, rel=1e-7)


@pytest.mark.parametrize(
    ("m0", "kappa", "t", "beta"), [(0.0, 1e3, 1e6, 1e-3), (-500.0, 1.0, 1e5, 0.02), (3.0, 2.0, 1e30, 0.03)]
)
def test_flow_far_down(m0, kappa, t, beta):
    """Far below zero the integral is (m0' - m) + π0^β (e^(-βm) - e^(-βm0')) / β, from a margin m0' = -40 or lower."""
    log_pi = -np.logaddexp(0, -m0)
    start = min(m0, -40.0)
    near = 0.0 if start == m0 else quad(
        lambda s: (1 + math.exp(s)) * (1 + math.exp(beta * (log_pi + np.logaddexp(0, -s)))), start, m0, epsrel=1e-12
    )[0]  # fmt: skip
    m = N.margin_flow(m0, kappa, t, beta=beta).item()
    assert m < -700
    time = near + start - m + math.exp(beta * (log_pi - start)) * math.expm1(beta * (start - m)) / beta
    assert time == pytest.approx(2 * kappa * t, rel=1e-8)


def test_flow_limits():
    t = torch.tensor([1.0, 10.0, 100.0], dtype=D)
    small = N.margin_flow(1.0, 1.0, t, beta=1e-6)
    torch.testing.assert_close(small, N.margin_flow(1.0, 1.0, t), rtol=1e-3, atol=1e-3)
    near = N.margin_flow(1.0, 1.0, t, beta=1 + 1e-9)
    torch.testing.assert_close(near, N.margin_flow(1.0, 1.0, t, beta=1.0), rtol=1e-8, atol=1e-8)
    for beta in (None, 0.5, 1.0):  # far starts
        for m0 in (-300.0, 300.0):
            assert N.margin_flow(m0, 1.0, t, beta=beta).isfinite().all()
    for power in (4, 6, 8):
        assert N.margin_asymptote(2.0, 1.0, 10.0**power).item() == pytest.approx(
            N.margin_flow(2.0, 1.0, 10.0**power).item()
        )
    off = [
        abs((N.margin_flow(2.0, 1.0, t, beta=0.5) - N.margin_asymptote(2.0, 1.0, t, beta=0.5)).item())
        for t in (1e4, 1e6)
    ]
    assert off[1] < off[0] / 30


# ---- the theorem -----------------------------------------------------------------------------------------------------


def data(seed, n=5, d=8, low=0.8, high=1.2, cosine=0.0):
    """Rows of lengths in [low, high], orthogonal up to `cosine`, labels and a start."""
    g = generator(seed)
    q = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=D))[0][:n]
    q = F.normalize(q + cosine * torch.randn(n, d, generator=g, dtype=D) / math.sqrt(d), dim=1)
    x = q * (low + (high - low) * torch.rand(n, 1, generator=g, dtype=D))
    return x, torch.randint(2, (n,), generator=g).to(D), 0.5 * torch.randn(d, generator=g, dtype=D)


def descend(x, y, theta0, beta, lr, steps):
    """How far each margin has moved, at every step, by autograd through the module."""
    signs, theta, moved = 2 * y - 1, theta0.clone().requires_grad_(), []
    ref = F.logsigmoid(signs * (x @ theta0))
    losses = []
    for _ in range(steps):
        logps = F.logsigmoid(signs * (x @ theta))
        loss = N.gradient_ascent_loss(logps) if beta is None else N.npo_loss(logps, ref, beta=beta)
        (gradient,) = torch.autograd.grad(loss, theta)
        with torch.no_grad():
            theta -= lr * gradient
            moved.append(-signs * (x @ (theta - theta0)))
        losses.append(loss.item())
    return torch.stack(moved), torch.tensor(losses)


@pytest.mark.parametrize("seed", range(3))
def test_linear_and_logarithmic_divergence(seed):
    x, y, start = data(seed)
    steps = torch.arange(1, 2001, dtype=D)
    moved, _ = descend(x, y, start, None, 0.5, 2000)
    norm = moved.norm(dim=1)
    slopes = [np.polyfit(steps[part], norm[part], 1)[0] for part in (slice(0, 1000), slice(1000, None))]
    assert 0.9 < slopes[1] / slopes[0] < 1.1
    for beta in (0.5, 1.0, 2.0):
        moved, _ = descend(x, y, start, beta, 0.5, 2000)
        straight = (beta * moved.max(1).values).exp()
        assert np.corrcoef(steps, straight)[0, 1] ** 2 > 0.99
        assert moved.norm(dim=1)[-1] < 0.1 * norm[-1]


@settings(deadline=None, max_examples=12)
@given(seeds, st.sampled_from([None, 0.3, 1.0, 3.0]), st.integers(1, 6), st.floats(0.05, 1))
def test_bounds_of_the_theorem(seed, beta, n, lr):
    x, y, start = data(seed, n=n)
    most = (x @ start).abs().max().item()
    steps = torch.arange(1, 201)
    moved, losses = descend(x, y, start, beta, lr, 200)
    norms = x.norm(dim=1)
    options = dict(min_norm=norms.min().item(), max_norm=norms.max().item() + 1e-12, max_margin=most, beta=beta)
    low, high = N.divergence_bounds(steps, lr / n, **options)
    assert (moved >= low[:, None] * (1 - 1e-9)).all() and (moved <= high[:, None] * (1 + 1e-9)).all()
    assert (moved.diff(dim=0) > 0).all() and (losses.diff() < 0).all()  # every forgotten margin falls, and the loss


@pytest.mark.parametrize("cosine", [0.02, 0.1])
def test_nearly_orthogonal_data(cosine):
    x, y, start = data(4, cosine=cosine)
    for beta in (None, 1.0):
        moved, losses = descend(x, y, start, beta, 0.5, 1000)
        assert (moved.diff(dim=0) > 0).all() and (losses.diff() < 0).all()
        spread = moved.max(1).values - moved.min(1).values
        growth = moved[-1].norm() / moved[99].norm()
        assert (growth > 7) if beta is None else (growth < 3 and spread[-1] < 2)


def test_bounds_at_the_edge():
    options = dict(min_norm=1.0, max_norm=1.0, beta=1.0)
    low, high = N.divergence_bounds(0, 0.5, max_margin=0.0, **options)
    assert low == high == 0
    low, high = N.divergence_bounds(10, 0.5, max_margin=600.0, **options)  # e^A does not overflow
    assert low >= 0 and high.isfinite()
    low, high = N.divergence_bounds(torch.tensor([10]), 0.5, max_margin=0.0, **options)
    assert low.item() == pytest.approx(math.log1p(2.5)) and high.item() == pytest.approx(math.log1p(5 * math.expm1(4)))


def test_the_reference_is_what_stops_it():
    """A margin that starts lower (a reference that knew less) ends lower, by what the asymptote says."""
    t = torch.tensor(1e7, dtype=D)
    a, b = (N.margin_flow(m, 1.0, t, beta=0.5).item() for m in (0.0, -3.0))
    wanted = F.logsigmoid(torch.tensor([0.0, -3.0], dtype=D)).diff().item()
    assert b - a == pytest.approx(wanted, abs=1e-3)


# ---- the synthetic task ----------------------------------------------------------------------------------------------


def test_generator():
    task = N.gaussian_logistic_unlearning(
        1.0, num_forget=20_000, num_retain=20_000, num_eval=5000, generator=generator(0)
    )
    for x, y, sign in ((task.forget_x, task.forget_y, 1), (task.retain_x, task.retain_y, -1)):
        assert x.mean(0).sub(sign).abs().max() < 0.04 and x.dtype == D and set(y.unique().tolist()) == {0, 1}
        torch.testing.assert_close(torch.cov(x.T), torch.eye(16, dtype=D), rtol=0, atol=0.05)
        logits = sign * ((x - sign).sum(1) / 4 + 1)
        for near in (-1.0, 0.0, 1.0, 2.0):  # the labels' rule, in a strip
            inside = (logits - near).abs() < 0.1
            if inside.sum() > 500:
                assert y[inside].mean().item() == pytest.approx(1 / (1 + math.exp(-near)), abs=0.06)
    assert task.uninformed_y.mean().item() == pytest.approx(0.5, abs=0.02)
    assert task.forget_eval_x.mean().item() == pytest.approx(1, abs=0.02)
    assert task.retain_eval_x.mean().item() == pytest.approx(-1, abs=0.02)
    together = N.gaussian_logistic_unlearning(0.0, generator=generator(0))
    assert together.forget_x.mean().abs() < 0.1 and len(together.retain_x) == 1000 and len(together.forget_x) == 200
    again = N.gaussian_logistic_unlearning(0.0, generator=generator(0))
    assert torch.equal(again.forget_y, together.forget_y) and torch.equal(again.retain_eval_x, together.retain_eval_x)


def test_random_features():
    model = N.RandomFeatureClassifier(5, 7, generator=generator(0))
    x, y = normal(4, 5, seed=1), torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=D)
    with torch.no_grad():
        model.theta.copy_(normal(7, seed=2))
    wanted = []
    for row, label in zip(x, y.tolist(), strict=True):
        logit = sum(
            float(t) * max(0.0, float(w @ row)) for t, w in zip(model.theta.detach(), model.weight, strict=True)
        )
        wanted.append(math.log(1 / (1 + math.exp(-logit if label else logit))))
    np.testing.assert_allclose(model.log_prob(x, y).detach(), wanted)
    assert [name for name, _ in model.named_parameters()] == ["theta"]
    assert N.RandomFeatureClassifier(400, generator=generator(0)).weight.std().item() == pytest.approx(0.05, rel=0.05)


def test_fit():
    task = N.gaussian_logistic_unlearning(1.0, num_retain=60, generator=generator(1))
    model = N.RandomFeatureClassifier(16, 20, generator=generator(2))
    x, y = task.retain_x, task.retain_y
    theta = torch.zeros(20, dtype=D, requires_grad=True)
    for _ in range(30):
        loss = -F.logsigmoid((2 * y - 1) * (model.features(x) @ theta)).mean()
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = (theta - 0.05 * gradient).detach().requires_grad_()
    torch.testing.assert_close(model.fit(x, y, steps=30).theta.detach(), theta.detach())
    descent = model.fit(x, y, steps=4000).theta.detach().clone()
    flow = model.fit(x, y, steps=4000, method="flow").theta.detach().clone()
    assert (flow - descent).norm() < 1e-3 * descent.norm()
    further = model.fit(x, y, steps=40_000, method="flow").theta.detach()
    assert (further - flow).norm() > 0.05 * flow.norm()  # early-stopped: a minimizer is another model


def test_binary_kl():
    a, b = normal(6, seed=1, scale=3.0), normal(6, seed=2, scale=3.0)
    p, q = torch.sigmoid(a), torch.sigmoid(b)
    wanted = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(N.binary_kl(a, b), wanted)
    assert N.binary_kl(a, a).item() == 0 and N.binary_kl(a, b) > 0
    assert N.binary_kl(torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4])).item() == 1e4


# ---- bad input -------------------------------------------------------------------------------------------------------

X, Z = torch.zeros(3), torch.zeros(2)
BOUNDS = dict(min_norm=1.0, max_norm=1.0, max_margin=0.0)
MODEL = N.RandomFeatureClassifier(4, 3)
ROWS = torch.zeros(3, 4, dtype=D)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: N.npo_loss(X, X, beta=0.0), ValueError, "beta must be finite and > 0"),
        (lambda: N.npo_loss(X, X, beta="1"), TypeError, "beta must be a number"),
        (lambda: N.npo_loss(X, Z, beta=1.0), ValueError, "ref_logps must have the shape of logps"),
        (lambda: N.npo_loss(X, X.double(), beta=1.0), TypeError, "ref_logps must have the dtype of logps"),
        (lambda: N.npo_loss(X.long(), X, beta=1.0), TypeError, "logps must be a floating-point tensor"),
        (lambda: N.npo_loss(ROWS, ROWS, beta=1.0), ValueError, "logps must have 1 dimension"),
        (lambda: N.npo_loss(X[:0], X[:0], beta=1.0), ValueError, "logps must not be empty"),
        (lambda: N.npo_loss(X, X, beta=1.0, reduction="max"), ValueError, "reduction must be one of"),
        (lambda: N.npo_weight(X, X, beta=-1.0), ValueError, "beta must be"),
        (lambda: N.gradient_ascent_loss(ROWS), ValueError, "logps must have 1 dimension"),
        (lambda: N.idk_loss([1.0]), TypeError, "logps_idk must be a tensor"),
        (lambda: N.retain_loss(X, reduction="all"), ValueError, "reduction"),
        (lambda: N.dpo_unlearning_loss(X, X, Z, Z, beta=1.0), ValueError, "logps_idk must have the shape of logps"),
        (lambda: N.dpo_unlearning_loss(X, X, X, Z, beta=1.0), ValueError, "ref_logps_idk must have the shape of logps_idk"),
        (lambda: N.kto_unlearning_loss(X, X, X, beta=1.0), ValueError, "reference_point must be a number"),
        (lambda: N.kto_unlearning_loss(X, X, math.inf, beta=1.0), ValueError, "reference_point must be finite"),
        (lambda: N.retain_kl(ROWS, ROWS[:2]), ValueError, "ref_logits must have the shape of logits"),
        (lambda: N.retain_kl(ROWS, ROWS, torch.ones(3)), TypeError, "mask must be a boolean tensor"),
        (lambda: N.retain_kl(ROWS, ROWS, torch.ones(2).bool()), ValueError, r"mask must have shape \(3,\)"),
        (lambda: N.retain_kl(ROWS, ROWS, torch.zeros(3).bool()), ValueError, "mask must keep at least one token"),
        (lambda: N.truth_ratio(ROWS, Z.double()), ValueError, r"paraphrased_logps must have shape \(3,\)"),
        (lambda: N.truth_ratio(ROWS, X, mean="median"), ValueError, "mean must be 'arithmetic' or 'geometric'"),
        (lambda: N.truth_score(X - 1), ValueError, "ratios must be >= 0"),
        (lambda: N.answer_probability(X, ROWS[:2]), ValueError, "wrong_logps must have 3 rows"),
        (lambda: N.rouge_l_recall([], [1]), ValueError, "reference must not be empty"),
        (lambda: N.forget_quality(X, X * math.nan), ValueError, "ratios_retrained must not be NaN"),
        (lambda: N.model_utility([]), ValueError, "values must not be empty"),
        (lambda: N.model_utility([0.5, 1.5]), ValueError, r"values\[1\] must be"),
        (lambda: N.margin_flow(501.0, 1.0, 1.0), ValueError, "m0 must be"),
        (lambda: N.margin_flow(0.0, 0.0, 1.0), ValueError, "kappa must be"),
        (lambda: N.margin_flow(0.0, 1.0, -1.0), ValueError, "t must be finite and >= 0"),
        (lambda: N.margin_flow(0.0, 1.0, 1.0, beta=0), ValueError, "beta must be"),
        (lambda: N.margin_asymptote(0.0, 1.0, 0.0), ValueError, "t must be > 0"),
        (lambda: N.margin_flow(0.0, 1.0, X[:0], beta=0.5), ValueError, "t must not be empty"),
        (lambda: N.margin_flow(0.0, 1.0, "soon"), TypeError, "t must be a number or a tensor"),
        (lambda: N.divergence_bounds(-1, 0.1, **BOUNDS), ValueError, "steps must be finite and >= 0"),
        (lambda: N.dpo_unlearning_loss(X, X, X - math.inf, X, beta=1.0), ValueError, "margin must be finite"),
        (lambda: N.divergence_bounds(1, 1.1, **BOUNDS), ValueError, "step_size must be"),
        (lambda: N.divergence_bounds(1, 0.1, **BOUNDS | dict(min_norm=2.0)), ValueError, "min_norm must be at most max_norm"),
        (lambda: N.divergence_bounds(1, 0.1, **BOUNDS | dict(max_margin=-1.0)), ValueError, "max_margin must be"),
        (lambda: N.gaussian_logistic_unlearning(math.nan), ValueError, "alpha must be"),
        (lambda: N.gaussian_logistic_unlearning(1.0, num_forget=0), ValueError, "num_forget must be"),
        (lambda: N.gaussian_logistic_unlearning(1.0, dim=1.5), TypeError, "dim must be an integer"),
        (lambda: N.binary_kl(X, Z), ValueError, "logits must have the shape of target_logits"),
        (lambda: N.RandomFeatureClassifier(4, 0), ValueError, "num_features must be"),
        (lambda: MODEL(ROWS.float()), ValueError, "x must be torch.float64 with 4 columns"),
        (lambda: MODEL(ROWS[:, :3]), ValueError, "x must be"),
        (lambda: MODEL.log_prob(ROWS, Z), ValueError, r"y must have shape \(3,\)"),
        (lambda: MODEL.fit(ROWS, X.double() - 1), ValueError, "y must be 0 or 1"),
        (lambda: MODEL.fit(ROWS, X.double(), steps=0), ValueError, "steps must be"),
        (lambda: MODEL.fit(ROWS, X.double(), lr=-1.0), ValueError, "lr must be"),
        (lambda: MODEL.fit(ROWS, X.double(), method="newton"), ValueError, "method must be 'descent' or 'flow'"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
