"""Gaussian naive Bayes and its bounds: against loops, against scikit-learn, against numerical optima, and the theorems as properties."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.naive_bayes import GaussianNB

from lossbook.classification import naive_bayes as N

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**31)
D = torch.float64


def table(seed, m=30, n=4, classes=3, dtype=D, offset=0.0):
    """Random classes with dependent features, every class at least twice."""
    g = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.arange(classes).repeat(2), torch.randint(classes, (m - 2 * classes,), generator=g)])
    y = y[torch.randperm(m, generator=g)]
    means = torch.randn(classes, n, generator=g, dtype=D)
    mix = torch.randn(n, n, generator=g, dtype=D)
    X = means[y] + torch.randn(m, n, generator=g, dtype=D) @ mix + offset
    return X.to(dtype), y


def slow_parameters(X, y, smoothing, shared):
    """Counts, means and variances, one number at a time."""
    X, y = X.tolist(), y.tolist()
    classes, n, m = max(y) + 1, len(X[0]), len(X)
    prior, mean, var = [], [], []
    for k in range(classes):
        rows = [x for x, label in zip(X, y, strict=True) if label == k]
        prior.append(len(rows) / m)
        mean.append([sum(x[i] for x in rows) / len(rows) for i in range(n)])
        var.append([sum((x[i] - mean[k][i]) ** 2 for x in rows) / len(rows) for i in range(n)])
    if shared:
        pooled = [sum(prior[k] * var[k][i] for k in range(classes)) for i in range(n)]
        var = [pooled] * classes
    return prior, mean, [[v + smoothing for v in row] for row in var]


def slow_joint(x, prior, mean, var):
    """Log prior plus log density of one row, a class at a time."""
    joint = []
    for p, mu, v in zip(prior, mean, var, strict=True):
        density = [stats.norm.logpdf(xi, m, math.sqrt(s)) for xi, m, s in zip(x, mu, v, strict=True)]
        joint.append(math.log(p) + sum(density))
    return joint


# --- the estimator ----------------------------------------------------------------------------------------------------


def test_by_hand():
    X = torch.tensor([[1.0], [2.0], [3.0], [3.0], [5.0], [7.0]], dtype=D)
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    model = N.GaussianNaiveBayes(var_smoothing=0).fit(X, y)
    assert model.means_.flatten().tolist() == [2, 5] and model.variances_.item() == pytest.approx(5 / 3)
    assert model.weight_.flatten().tolist() == pytest.approx([1.2, 3.0])
    assert model.bias_.tolist() == pytest.approx([-1.8931472, -8.1931472])
    assert model.predict(torch.tensor([[3.4999], [3.5001]])).tolist() == [0, 1]
    own = N.GaussianNaiveBayes(var_smoothing=0, shared_variance=False).fit(X, y)
    assert own.variances_.flatten().tolist() == pytest.approx([2 / 3, 8 / 3])
    assert own.predict(torch.tensor([[3.28], [3.29]])).tolist() == [0, 1] and not hasattr(own, "weight_")


@few
@given(seeds, st.booleans(), st.sampled_from([0.0, 0.3]))
def test_equals_the_slow_loop(seed, shared, smoothing):
    X, y = table(seed)
    model = N.GaussianNaiveBayes(smoothing, shared).fit(X, y)
    prior, mean, var = slow_parameters(X, y, smoothing, shared)
    joint = torch.tensor([slow_joint(x, prior, mean, var) for x in X.tolist()], dtype=D)
    torch.testing.assert_close(model.means_, torch.tensor(mean, dtype=D), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.variances_.expand(3, 4), torch.tensor(var, dtype=D), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.log_likelihood(X) + model.log_prior_, joint, rtol=1e-9, atol=1e-9)
    posterior = joint - torch.logsumexp(joint, 1, keepdim=True)
    torch.testing.assert_close(model.predict_log_proba(X), posterior, rtol=1e-9, atol=1e-9)
    assert torch.equal(model.predict(X), joint.argmax(1))


@few
@given(seeds)
def test_equals_scikit_learn_with_own_variances(seed):
    X, y = table(seed, m=60)
    theirs = GaussianNB(var_smoothing=1e-9).fit(X.numpy(), y.numpy())
    ours = N.GaussianNaiveBayes(theirs.epsilon_, shared_variance=False).fit(X, y)
    np.testing.assert_allclose(ours.means_, theirs.theta_, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(ours.variances_, theirs.var_, rtol=1e-8)
    np.testing.assert_allclose(ours.predict_log_proba(X), theirs.predict_log_proba(X.numpy()), rtol=1e-8, atol=1e-8)


class Diagonal:
    """A covariance estimator for scikit-learn's discriminant analysis that ignores correlations."""

    def fit(self, X):
        self.covariance_ = np.diag(X.var(0))
        return self


@few
@given(seeds, st.integers(2, 5))
def test_equals_scikit_learn_with_shared_variances(seed, classes):
    X, y = table(seed, m=60, classes=classes)
    lda = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=Diagonal()).fit(X.numpy(), y.numpy())
    ours = N.GaussianNaiveBayes(0.0).fit(X, y)
    weight, bias = (ours.weight_, ours.bias_) if classes > 2 else (ours.weight_.diff(dim=0), ours.bias_.diff())
    np.testing.assert_allclose(weight, lda.coef_, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(bias, lda.intercept_, rtol=1e-8, atol=1e-8)
    # Not its log-probabilities: for two classes it takes them from 1 - p, which has lost the digits of a small one.
    np.testing.assert_allclose(ours.predict_log_proba(X).exp(), lda.predict_proba(X.numpy()), rtol=1e-8, atol=1e-8)


@few
@given(seeds)
def test_is_linear_and_ignores_shift_and_scale(seed):
    X, y = table(seed)
    g = torch.Generator().manual_seed(seed)
    model = N.GaussianNaiveBayes(0.0).fit(X, y)
    scores = X @ model.weight_.T + model.bias_
    assert torch.equal(model.predict(X), scores.argmax(1))
    torch.testing.assert_close(torch.log_softmax(scores, 1), model.predict_log_proba(X), rtol=1e-9, atol=1e-9)
    shift = 10 * torch.randn(4, generator=g, dtype=D)
    scale = torch.exp(torch.randn(4, generator=g, dtype=D))
    moved = N.GaussianNaiveBayes(0.0).fit(X * scale + shift, y)
    torch.testing.assert_close(
        moved.predict_log_proba(X * scale + shift), model.predict_log_proba(X), rtol=1e-8, atol=1e-8
    )


@few
@given(seeds, st.booleans(), st.integers(1, 6))
def test_batches_equal_one_fit(seed, shared, batches):
    X, y = table(seed, m=40, offset=100.0)
    order = torch.argsort(y) if seed % 2 else torch.arange(40)  # sorted: batches lack classes
    cuts = sorted(torch.randperm(39, generator=torch.Generator().manual_seed(seed))[: batches - 1].add(1).tolist())
    streamed = N.GaussianNaiveBayes(1e-3, shared)
    for part in torch.tensor_split(order, cuts):
        streamed.partial_fit(X[part], y[part], num_classes=3)
    whole = N.GaussianNaiveBayes(1e-3, shared).fit(X, y)
    for name in ("class_count_", "means_", "variances_", "log_prior_") + (("weight_", "bias_") if shared else ()):
        torch.testing.assert_close(getattr(streamed, name), getattr(whole, name), rtol=1e-10, atol=1e-10)
    assert torch.equal(streamed.predict(X), whole.predict(X))


def test_fit_forgets_and_continues():
    X, y = table(0)
    model = N.GaussianNaiveBayes().fit(*table(1, classes=5)).fit(X, y)
    assert torch.equal(model.means_, N.GaussianNaiveBayes().fit(X, y).means_)
    more, labels = table(2)
    model.partial_fit(more, labels)
    both = N.GaussianNaiveBayes().fit(torch.cat([X, more]), torch.cat([y, labels]))
    torch.testing.assert_close(model.weight_, both.weight_)


def test_limits_are_nearest_mean():
    """Equal shares and variances: the nearest class mean, Euclidean."""
    g = torch.Generator().manual_seed(0)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)), dtype=D)  # variance exactly one, means exact
    means = torch.randn(4, 3, generator=g, dtype=D)
    X, y = (means[:, None] + signs).reshape(-1, 3), torch.arange(4).repeat_interleave(8)
    model = N.GaussianNaiveBayes(0.0).fit(X, y)
    points = 2 * torch.randn(500, 3, generator=g, dtype=D)
    assert torch.equal(model.predict(points), torch.cdist(points, means).argmin(1))


def test_diagonal_rule_is_the_fitted_one():
    X, y = table(5)
    model = N.GaussianNaiveBayes(0.2).fit(X, y)
    weight, bias = N.diagonal_rule(model.means_, model.variances_, model.log_prior_.exp())
    torch.testing.assert_close(weight, model.weight_)
    torch.testing.assert_close(bias, model.bias_)


def test_float32_with_large_offset_numpy_and_slices():
    X, y = table(6, m=200, offset=1e4, dtype=torch.float32)
    model, wide = N.GaussianNaiveBayes().fit(X, y), N.GaussianNaiveBayes().fit(X.double() - 1e4, y)
    assert torch.equal(model.predict(X), wide.predict(X.double() - 1e4))
    assert model.predict_log_proba(X).dtype == D
    torch.testing.assert_close(
        model.predict_log_proba(X), wide.predict_log_proba(X.double() - 1e4), rtol=1e-6, atol=1e-6
    )
    table_, labels = X.numpy()[::-1], y.numpy()[::-1].astype(np.int32)
    table_.flags.writeable = False
    other = N.GaussianNaiveBayes().fit(table_, labels)
    torch.testing.assert_close(other.means_, model.means_)
    strided = torch.stack([X, -X], 2)[:, :, 0]
    torch.testing.assert_close(N.GaussianNaiveBayes().fit(strided, y).means_, model.means_)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.predict_log_proba(X), N.GaussianNaiveBayes().fit(X, y).predict_log_proba(X))


@pytest.mark.parametrize("rows", [1, 512, 513, 1300])
def test_rows_are_predicted_in_blocks(rows):
    X, y = table(6, m=1300, offset=1e4)
    model = N.GaussianNaiveBayes().fit(X, y)
    assert torch.equal(model.predict(X[:rows]), model.predict_log_proba(X[:rows]).argmax(1))


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_float32(scale):
    X, y = table(7, dtype=torch.float32)
    model = N.GaussianNaiveBayes().fit(X * scale, y)
    assert model.predict_log_proba(X * scale).isfinite().all()
    assert torch.equal(model.predict(X * scale), N.GaussianNaiveBayes(0.0).fit(X * scale, y).predict(X * scale))


def test_gradient_flows_to_the_input():
    X, y = table(8)
    for shared in (True, False):
        model = N.GaussianNaiveBayes(shared_variance=shared).fit(X.requires_grad_(), y)
        assert not model.means_.requires_grad
        assert torch.autograd.gradcheck(model.predict_log_proba, (X[:3].detach().requires_grad_(),))


# --- sample sizes of naive Bayes --------------------------------------------------------------------------------------


def test_parameter_sample_size():
    sizes = dict(delta=0.05, num_features=2048, num_classes=10, min_prior=0.08)
    m = N.parameter_sample_size(0.05, **sizes)
    assert m == 72_662 == math.ceil(5000 * math.log(2_048_000))
    doubled = N.parameter_sample_size(0.05, **(sizes | dict(num_features=4096)))
    assert doubled - m == pytest.approx(5000 * math.log(2), abs=1)


def test_parameters_are_within_epsilon_as_often_as_promised():
    """Beta features: the guarantee is kept, with much to spare; at a hundredth of the samples it is broken, so the test can fail."""
    k, n, epsilon, delta = 3, 20, 0.1, 0.2
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.5, 3, (2, k, n))
    p = np.array([0.3, 0.3, 0.4])
    mean, var = stats.beta.mean(a, b), stats.beta.var(a, b)

    def fails(m):
        y = rng.choice(k, m, p=p)
        if len(np.unique(y)) < k:
            return True
        model = N.GaussianNaiveBayes(0.0).fit(rng.beta(a[y], b[y]), y)
        off = [
            np.abs(model.log_prior_.exp().numpy() - p).max() / epsilon,
            np.abs(model.means_.numpy() - mean).max() / epsilon,
            np.abs(model.variances_.numpy() - p @ var).max() / (2 * epsilon),
        ]
        return max(off) > 1

    m = N.parameter_sample_size(epsilon, delta=delta, num_features=n, num_classes=k, min_prior=0.3)
    assert np.mean([fails(m) for _ in range(200)]) <= delta / 4
    assert np.mean([fails(m // 100) for _ in range(50)]) > delta


def score_error(means, variances, prior, means2, variances2, prior2):
    """The largest change of a score over the box [0, 1]^n, for each class: a sum of worst coordinates."""
    dw = means2 / variances2 - means / variances
    db = torch.log(prior2) - torch.log(prior) - (means2**2 / variances2 - means**2 / variances).sum(1) / 2
    return torch.maximum(dw.clamp(min=0).sum(1) + db, dw.clamp(max=0).sum(1).neg() - db)


def disturbed(seed, n=7, k=3):
    """True parameters, parameters within epsilon of them, and epsilon."""
    g = torch.Generator().manual_seed(seed)
    u = lambda *shape: torch.rand(*shape, generator=g, dtype=D)  # noqa: E731
    rho, p0 = 0.02 + 0.2 * u(1).item(), 0.05 + 0.2 * u(1).item()
    epsilon = min(rho / 4, p0 / 2) * u(1).item()
    means, variances = u(k, n), rho + (0.25 - rho) * u(n)
    prior = p0 + (1 - k * p0) * torch.softmax(2 * u(k), 0)
    sign = lambda *shape: torch.where(u(*shape) < 0.8, (2 * (u(*shape) < 0.5) - 1).to(D), 2 * u(*shape) - 1)  # noqa: E731
    means2 = (means + epsilon * sign(k, n)).clamp(0, 1)
    variances2 = variances + 2 * epsilon * sign(n)
    prior2 = prior + epsilon * sign(k)
    return (means, variances, prior), (means2, variances2, prior2), epsilon, rho, p0


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_scores_move_at_most_c_n_epsilon(seed):
    true, other, epsilon, rho, p0 = disturbed(seed)
    n = true[0].shape[1]
    worst = score_error(*true, *other)
    assert (worst <= N.score_error_constant(rho, p0) * n * epsilon * (1 + 1e-9)).all()
    x = torch.rand(50, n, dtype=D, generator=torch.Generator().manual_seed(seed))
    first, second = ((x @ w.T + b) for w, b in (N.diagonal_rule(*true), N.diagonal_rule(*other)))
    assert ((first - second).abs().amax(0) <= worst + 1e-9).all()


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_predictions_change_only_inside_the_gap(seed):
    true, other, epsilon, *_ = disturbed(seed)
    n = true[0].shape[1]
    c = score_error(*true, *other).max().item() / (n * epsilon)
    x = torch.rand(400, n, dtype=D, generator=torch.Generator().manual_seed(seed))
    first, second = ((x @ w.T + b) for w, b in (N.diagonal_rule(*true), N.diagonal_rule(*other)))
    changed = (first.argmax(1) != second.argmax(1)).double().mean()
    assert changed <= N.gap_probability(first, 2 * c * epsilon, num_features=n)
    inside = N.discriminant_gap(first, num_features=n) <= 2 * c * epsilon
    assert not (first.argmax(1) != second.argmax(1))[~inside].any()


def test_score_constant_and_sample_size():
    assert N.score_error_constant(0.05, 0.5) == pytest.approx(80 + 2400 + 4)
    sizes = dict(delta=0.1, num_classes=4, min_variance=0.1, min_prior=0.2)
    m1, m2, m4 = (N.naive_bayes_sample_size(0.5, num_features=n, **sizes) for n in (1000, 2000, 4000))
    assert m2 - m1 == pytest.approx(m4 - m2, abs=1)  # a logarithm
    epsilon = 0.5 / (2 * (40 + 600 + 10))
    assert m1 == math.ceil(math.log(5 * 4 * 1000 / 0.1) / (0.2 * epsilon**2))
    # large tau: the other conditions bind
    assert N.naive_bayes_sample_size(1e6, num_features=10, **sizes) == N.parameter_sample_size(
        0.025, delta=0.1, num_features=10, num_classes=4, min_prior=0.2
    )
    assert N.naive_bayes_sample_size(1e6, num_features=10, **(sizes | dict(min_prior=0.02))) == N.parameter_sample_size(
        0.01, delta=0.1, num_features=10, num_classes=4, min_prior=0.02
    )


@few
@given(seeds, st.integers(2, 6))
def test_gap_is_what_a_sort_finds(seed, classes):
    scores = torch.randn(20, classes, dtype=D, generator=torch.Generator().manual_seed(seed))
    gaps = [(sorted(row)[-1] - sorted(row)[-2]) / 5 for row in scores.tolist()]
    torch.testing.assert_close(N.discriminant_gap(scores, num_features=5), torch.tensor(gaps, dtype=D))
    taus = torch.tensor([0.0, gaps[3], 1e3], dtype=D)
    shares = N.gap_probability(scores, taus, num_features=5)
    assert shares.tolist() == [sum(gap <= tau for gap in gaps) / 20 for tau in taus.tolist()]
    assert N.gap_probability(scores, gaps[3], num_features=5) == shares[1]


def test_weak_evidence_limit():
    assert N.weak_evidence_error(9.0, 0.0).item() == pytest.approx(stats.norm.cdf(-1.5))
    assert N.weak_evidence_error(0.0, 0.0).item() == 0.5
    assert N.weak_evidence_error(4.0, 1e12).item() == pytest.approx(0.5, abs=1e-5)
    assert N.weak_evidence_error(12.0, 3.0).item() == pytest.approx(stats.norm.cdf(-6 / math.sqrt(24)))
    assert N.weak_evidence_error(torch.ones(3), torch.ones(3)).shape == (3,)


@pytest.mark.parametrize("kappa", [0.5, 2.0])
def test_weak_evidence_is_where_naive_bayes_goes(kappa):
    """Forty fits at n = 800, variances estimated."""
    n, distance_sq = 800, 9.0
    m = int(n / kappa)
    variances = torch.linspace(0.5, 2, n, dtype=D)
    step = variances.sqrt() * math.sqrt(distance_sq / n) / 2
    means, covariance = torch.stack([-step, step]), variances.diag()
    g = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(40):
        model = N.GaussianNaiveBayes().fit(*N.gaussian_mixture(m, means, covariance, generator=g))
        errors.append(N.linear_rule_error(model.weight_, model.bias_, means, covariance).item())
    assert np.mean(errors) == pytest.approx(N.weak_evidence_error(distance_sq, kappa).item(), abs=0.008)


# --- bounds of the logistic loss --------------------------------------------------------------------------------------


def regrets(p, scores):
    """Zero-one and logistic regret at one input, by plain sums; ties go to the first class."""
    log_s = scores - torch.logsumexp(scores, 0)
    logistic = sum(pk * (pk.log() - sk) for pk, sk in zip(p, log_s, strict=True) if pk > 0)
    return (p.max() - p[scores.argmax()]).item(), logistic.item()


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(2, 6), st.floats(0.05, 3))
def test_logistic_regret_bounds_the_zero_one_regret(seed, classes, spread):
    g = torch.Generator().manual_seed(seed)
    p = torch.softmax(2 * torch.randn(classes, generator=g, dtype=D), 0)
    beta, t = regrets(p, p.log() + spread * torch.randn(classes, generator=g, dtype=D))
    t = max(t, 0.0)
    assert N.logistic_transform(torch.tensor([beta], dtype=D)).item() <= t + 1e-12
    exact, simple = (N.logistic_bound(torch.tensor([t], dtype=D), form=f).item() for f in ("exact", "simple"))
    assert beta <= exact + 1e-9 and exact <= simple + 1e-9 and simple == pytest.approx(math.sqrt(2 * t))


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("beta", [0.02, 0.3, 0.9])
def test_logistic_bound_is_attained(classes, beta):
    """The two likeliest classes at a tie that goes to the wrong one, all others without probability and out of reach."""
    p, scores = torch.zeros(classes, dtype=D), torch.full((classes,), -40.0, dtype=D)
    p[:2] = torch.tensor([1 - beta, 1 + beta], dtype=D) / 2
    scores[:2] = 0.0  # a tie goes to the first
    found, t = regrets(p, scores)
    assert found == pytest.approx(beta)
    assert N.logistic_bound(torch.tensor([t], dtype=D)).item() == pytest.approx(beta, abs=1e-7)
    assert N.logistic_bound(torch.tensor([0.99 * t], dtype=D)).item() < beta  # a hundredth less would be broken


@few
@given(st.floats(0, 1), st.floats(0.05, 4))
def test_bounded_transform_is_the_least_regret(beta, bound):
    """Two classes, score differences in [-2B, 2B], the wrong one predicted: by numerical search."""

    def risk(d):
        return (1 + beta) / 2 * np.logaddexp(0, -d) + (1 - beta) / 2 * np.logaddexp(0, d)

    # reach over the ends: the minimizers sit there
    options = dict(method="bounded", options=dict(xatol=1e-12))
    best = min(risk(2 * bound), optimize.minimize_scalar(risk, bounds=(-2 * bound, 2 * bound), **options).fun)
    wrong = min(risk(0.0), optimize.minimize_scalar(risk, bounds=(-2 * bound, 0.0), **options).fun)
    got = N.logistic_transform(torch.tensor([beta], dtype=D), score_bound=bound).item()
    assert got == pytest.approx(wrong - best, abs=1e-8)


def test_bounded_transform_by_hand_and_limits():
    one = torch.ones(1, dtype=D)
    assert N.logistic_transform(one, score_bound=1.0).item() == pytest.approx(math.log(2) - math.log1p(math.exp(-2)))
    assert N.logistic_transform(one).item() == pytest.approx(math.log(2))
    beta = torch.linspace(0, 1, 101, dtype=D)
    b = beta[1:-1]
    curve = (1 + b) / 2 * (1 + b).log() + (1 - b) / 2 * (1 - b).log()
    torch.testing.assert_close(N.logistic_transform(beta)[1:-1], curve)
    torch.testing.assert_close(N.logistic_transform(beta, score_bound=50.0), N.logistic_transform(beta))
    assert N.logistic_transform(torch.zeros(1), score_bound=0.5).item() == 0


@settings(max_examples=60, deadline=None)
@given(st.floats(0.001, 1), st.floats(0.05, 4))
def test_bound_inverts_the_transform(beta, bound):
    for b in (bound, math.inf):
        t = N.logistic_transform(torch.tensor([beta], dtype=D), score_bound=b)
        assert N.logistic_bound(t, score_bound=b).item() == pytest.approx(beta, abs=1e-7)
        simple = N.logistic_bound(t, score_bound=b, form="simple").item()
        assert simple >= beta - 1e-9
    knee, t = math.tanh(bound), t.item()
    simple = N.logistic_bound(torch.tensor([t], dtype=D), score_bound=bound, form="simple").item()
    assert simple == pytest.approx(max(math.sqrt(2 * t), 2 * t / knee))
    assert N.logistic_bound(torch.tensor([5.0]), score_bound=bound).item() == 1


def box_optimum(p, bound):
    """Scores in the box with the least logistic risk, by bisection for the normalizer: h = clip(log p + c)."""
    log_p = p.clamp(min=1e-300).log()

    def excess(c):  # at the optimum log-sum-exp of the clipped scores equals c, which the free scores have
        h = (log_p + c).clamp(-bound, bound)
        return (torch.logsumexp(h, 0) - c).item()

    c = optimize.brentq(excess, -bound - 1, bound + math.log(len(p)) + 1, xtol=1e-14)
    return (log_p + c).clamp(-bound, bound)


@few
@given(seeds, st.integers(3, 6), st.floats(0.2, 2))
def test_blind_regret_of_a_box(seed, classes, bound):
    """At the threshold a tie is optimal, beyond it is not; and no random distribution beats it."""
    limit = N.box_blind_regret(bound, classes)
    rest = torch.zeros(classes - 2, dtype=D)
    for beta, tied in ((0.99 * limit, True), (1.01 * limit, False)):
        p = torch.cat([torch.tensor([(1 + beta) / 2, (1 - beta) / 2], dtype=D), rest])
        h = box_optimum(p, bound)
        assert (abs(h[0] - h[1]).item() < 1e-12) == tied
    g = torch.Generator().manual_seed(seed)
    p = torch.softmax(3 * torch.randn(classes, generator=g, dtype=D), 0)
    h = box_optimum(p, bound)
    # optimal: no other scores in the box cost less
    cost = lambda s: torch.logsumexp(s, -1) - s @ p  # noqa: E731
    others = bound * (2 * torch.rand(200, classes, generator=g, dtype=D) - 1)
    assert (cost(others) >= cost(h) - 1e-9).all() and (cost(h + 0.01 * (others - h)) >= cost(h) - 1e-12).all()
    tied = p[h >= h.max() - 1e-12]
    assert (p.max() - tied.min()).item() <= limit + 1e-9


def test_blind_regret_closed_form():
    assert N.box_blind_regret(0.7, 2) == 0
    assert N.box_blind_regret(1.0, 3) == pytest.approx(math.exp(-2) / (2 + math.exp(-2)))
    assert N.box_blind_regret(1e-9, 4) == pytest.approx(0.5)


def test_estimation_bound():
    sizes = dict(num_classes=3, weight_norm=0.5, delta=0.1)
    assert N.logistic_excess_bound(400, num_features=25, loss_bound=2.0, **sizes) == pytest.approx(
        8 * 3 * 0.5 * 5 / 20 + 4 * math.sqrt(math.log(20) / 800)
    )
    bound = math.log(3) + 2 * (2.5 + 0.3)
    assert N.logistic_excess_bound(400, num_features=25, bias_bound=0.3, **sizes) == pytest.approx(
        8 * 3 * 2.8 / 20 + 2 * bound * math.sqrt(math.log(20) / 800)
    )


@few
@given(seeds)
def test_estimation_error_is_within_the_bound_and_the_loss_within_its_own(seed):
    """Rademacher averages of the linear scores, in closed form: the step that brings in the n."""
    g = torch.Generator().manual_seed(seed)
    m, n, k, norm = 50, 8, 3, 0.7
    x = torch.rand(m, n, generator=g, dtype=D)
    signs = (2 * torch.randint(2, (200, m, k), generator=g) - 1).to(D)
    average = norm * torch.einsum("rmk,mn->rkn", signs, x).norm(dim=2).sum(1).mean() / m
    without_rest = N.logistic_excess_bound(
        m, num_features=n, num_classes=k, weight_norm=norm, delta=1.0, loss_bound=1e-300
    )
    assert 8 * average <= without_rest  # 4 times sqrt 2 times the Lipschitz constant sqrt 2
    w = torch.randn(k, n, generator=g, dtype=D)
    w = norm * w / w.norm(dim=1, keepdim=True)
    loss = torch.nn.functional.cross_entropy(x @ w.T, torch.randint(k, (m,), generator=g), reduction="none")
    assert loss.max() <= math.log(k) + 2 * norm * math.sqrt(n)


def test_margin_bound():
    sizes = dict(num_classes=4, min_variance=0.1, min_prior=0.2, delta=0.1)
    a = 15 + math.log(5)
    loss_bound = math.log(4) + 2 * 3 * a
    expected = math.log(1 + 3 * math.exp(-1.5)) + 0.01 * loss_bound + 8 * 4 * 3 * a / 100
    expected = (expected + 2 * loss_bound * math.sqrt(math.log(20) / 20000)) / math.log(2)
    assert N.margin_error_bound(10_000, scale=3.0, tau=0.5, miss=0.01, **sizes) == pytest.approx(expected)


@few
@given(seeds, st.integers(2, 30), st.integers(2, 4))
def test_scaled_naive_bayes_lies_in_the_small_ball(seed, n, k):
    """The comparison rule of the margin bound: norms, biases, and its logistic risk given its margins."""
    (means, variances, prior), *_, rho, p0 = disturbed(seed, n, k)
    g = torch.Generator().manual_seed(seed)
    s, tau = 4.0, 0.3
    weight, bias = (s / n * v for v in N.diagonal_rule(means, variances, prior))
    assert (weight.norm(dim=1) <= s / (rho * math.sqrt(n)) + 1e-12).all()
    assert (bias.abs() <= s * (math.log(1 / p0) + 1 / (2 * rho)) + 1e-12).all()
    x, y = torch.rand(200, n, generator=g, dtype=D), torch.randint(k, (200,), generator=g)
    scores = x @ weight.T + bias
    own = scores.gather(1, y[:, None]).squeeze(1)
    margin = (own - scores.scatter(1, y[:, None], -math.inf).amax(1)) / s
    loss = torch.nn.functional.cross_entropy(scores, y, reduction="none")
    good = margin > tau
    assert (loss[good] <= math.log1p((k - 1) * math.exp(-s * tau))).all()
    assert (loss <= math.log(k) + 2 * s * (1.5 / rho - math.log(p0))).all()


# --- simulation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_mixture_parameters(classes):
    means, covariance = N.mixture_parameters(6, classes)
    raw = torch.tensor([-1.0, 1.0, 2.0, 4.0, 8.0][:classes], dtype=D)
    unit = 1.0 if classes == 2 else 2.0 ** (classes - 3)
    levels = raw if classes == 2 else (raw - unit) / unit
    assert means.tolist() == [[level] * 6 for level in levels.tolist()]
    assert covariance.diagonal().tolist() == [6 / unit**2] * 3 + [1 / unit**2] * 3
    assert torch.equal(covariance, covariance.diagonal().diag())


def test_hard_covariance_is_what_numpy_draws():
    n = 25
    np.random.seed(0)
    a = 2 * np.random.rand(n, n) - 1
    c = a.T @ a
    np.fill_diagonal(c, [n] * (n // 2) + [1] * (n - n // 2))
    assert (np.linalg.eigvalsh(c) < -1e-6).sum() == 7
    _, values, vectors = np.linalg.svd(c)
    _, covariance = N.mixture_parameters(n, 2, mode="hard")
    np.testing.assert_allclose(covariance, (vectors.T * values) @ vectors, atol=1e-9)
    assert not torch.allclose(covariance, N.mixture_parameters(n, 2, mode="hard", covariance_seed=1)[1])


def test_mixture_has_its_moments_and_every_class():
    g = torch.Generator().manual_seed(0)
    for mode in ("easy", "hard"):
        means, covariance = N.mixture_parameters(5, 3, mode=mode)
        X, y = N.gaussian_mixture(60_000, means, covariance, generator=g)
        for k in range(3):
            torch.testing.assert_close(X[y == k].mean(0), means[k], atol=0.06, rtol=0)
        residual = X - means[y]
        torch.testing.assert_close(residual.T @ residual / len(X), covariance, atol=0.15, rtol=0)
        assert (y.bincount() / len(y) - 1 / 3).abs().max() < 0.01
    assert N.gaussian_mixture(3, means, covariance)[1].tolist() == [0, 1, 2]
    assert N.gaussian_mixture(4, means.float(), covariance.float())[0].dtype == torch.float32


def test_exact_error_equals_sampling():
    g = torch.Generator().manual_seed(1)
    means, covariance = N.mixture_parameters(6, 2, mode="hard")
    weight, bias = torch.randn(2, 6, generator=g, dtype=D) + means, torch.randn(2, generator=g, dtype=D)
    X, y = N.gaussian_mixture(200_000, means, covariance, generator=g)
    sampled = ((X @ weight.T + bias).argmax(1) != y).double().mean().item()
    assert N.linear_rule_error(weight, bias, means, covariance).item() == pytest.approx(sampled, abs=0.004)
    flat = torch.zeros_like(weight)
    for b in (torch.zeros(2, dtype=D), torch.tensor([0.0, 1.0], dtype=D)):
        assert N.linear_rule_error(flat, b, means, covariance).item() == pytest.approx(0.5)


@pytest.mark.parametrize("n", [4, 20, 100])
def test_easy_mixture_has_the_error_and_gap_of_the_chapter(n):
    means, covariance = N.mixture_parameters(n, 2)
    weight, bias = N.diagonal_rule(means, covariance.diagonal())
    error = N.linear_rule_error(weight, bias, means, covariance).item()
    assert error == pytest.approx(stats.norm.cdf(-math.sqrt((n + 1) / 2)), rel=1e-6)
    w = weight[1] - weight[0]
    assert (w @ means[1] + bias[1] - bias[0]).item() == pytest.approx(n + 1)
    assert (w @ covariance @ w).item() == pytest.approx(2 * (n + 1))


def test_naive_bayes_is_early_and_logistic_regression_late():
    from sklearn.linear_model import LogisticRegression

    means, covariance = N.mixture_parameters(100, 2)
    g = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(5):
        X, y = N.gaussian_mixture(12, means, covariance, generator=g)
        ours = N.GaussianNaiveBayes().fit(X, y)
        other = LogisticRegression(max_iter=1000).fit(X.numpy(), y.numpy())
        w, b = torch.as_tensor(other.coef_[0]), torch.as_tensor(other.intercept_[0])
        pair = torch.stack([-w / 2, w / 2]), torch.stack([-b / 2, b / 2])
        errors.append(
            [N.linear_rule_error(*rule, means, covariance).item() for rule in ((ours.weight_, ours.bias_), pair)]
        )
    early, late = np.mean(errors, axis=0)
    assert early < 0.01 and late > 0.02


def test_sample_complexity():
    assert N.sample_complexity([2, 4, 8], [0.5, 0.1, 0.2], 0.15) == 4
    assert N.sample_complexity([2, 4, 8], [0.5, 0.1, 0.05], 0.1) == 8  # strictly below
    assert N.sample_complexity([2, 4, 8], [0.5, 0.1, 0.2], 0.05) == math.inf


# --- bad input --------------------------------------------------------------------------------------------------------

X0, Y0 = table(0)
SIZES = dict(delta=0.1, num_features=5, num_classes=2, min_prior=0.5)
LOGISTIC = dict(num_features=5, num_classes=2, weight_norm=1.0, delta=0.1)
MARGIN = dict(scale=1.0, tau=1.0, miss=0.0, num_classes=2, min_variance=0.1, min_prior=0.5, delta=0.1)
MEANS, COVARIANCE = N.mixture_parameters(4, 2)


def fitted(**options):
    return N.GaussianNaiveBayes(**options).fit(X0, Y0)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: N.GaussianNaiveBayes(-1.0), "var_smoothing"),
        (lambda: N.GaussianNaiveBayes().fit(X0[0], Y0), "X"),
        (lambda: N.GaussianNaiveBayes().fit(X0, Y0[:3]), "y"),
        (lambda: N.GaussianNaiveBayes().fit(X0, Y0 - 1), "y"),
        (lambda: N.GaussianNaiveBayes().fit(X0, Y0 * 2), "y"),
        (lambda: N.GaussianNaiveBayes().fit(X0, Y0 + 10**9), "y"),
        (lambda: N.GaussianNaiveBayes().fit(X0, Y0 * 0), "y"),
        (lambda: N.GaussianNaiveBayes().fit(X0 * math.nan, Y0), "X"),
        (lambda: N.GaussianNaiveBayes().fit(X0[:0], Y0[:0]), "X"),
        (lambda: N.GaussianNaiveBayes(0.0).fit(X0 * 0, Y0), "var_smoothing"),
        (lambda: N.GaussianNaiveBayes(0.0, False).fit(torch.cat([X0, X0[:1]]), torch.cat([Y0, torch.tensor([3])])), "var_smoothing"),
        (lambda: fitted().predict(X0[:, :2]), "X"),
        (lambda: fitted().predict(X0 * math.inf), "X"),
        (lambda: fitted().partial_fit(X0[:, :2], Y0), "X"),
        (lambda: fitted().partial_fit(X0, Y0 + 1), "y"),
        (lambda: fitted().partial_fit(X0, Y0, num_classes=4), "num_classes"),
        (lambda: N.GaussianNaiveBayes().partial_fit(X0, Y0 * 0), "num_classes"),
        (lambda: N.GaussianNaiveBayes().partial_fit(X0, Y0, num_classes=1), "num_classes"),
        (lambda: N.GaussianNaiveBayes(0.0).partial_fit(X0[:2] * 0, torch.tensor([0, 1])).predict(X0), "var_smoothing"),
        (lambda: N.parameter_sample_size(0.4, **SIZES), "epsilon"),
        (lambda: N.parameter_sample_size(0.0, **SIZES), "epsilon"),
        (lambda: N.parameter_sample_size(0.1, **(SIZES | dict(delta=1.0))), "delta"),
        (lambda: N.parameter_sample_size(0.1, **(SIZES | dict(num_features=1))), "num_features"),
        (lambda: N.parameter_sample_size(0.1, **(SIZES | dict(num_classes=1))), "num_classes"),
        (lambda: N.parameter_sample_size(0.1, **(SIZES | dict(min_prior=0.6))), "min_prior"),
        (lambda: N.score_error_constant(0.3, 0.5), "min_variance"),
        (lambda: N.score_error_constant(0.1, 0.6), "min_prior"),
        (lambda: N.naive_bayes_sample_size(0.0, min_variance=0.1, **SIZES), "tau"),
        (lambda: N.discriminant_gap(X0[:, :1], num_features=3), "scores"),
        (lambda: N.discriminant_gap(X0, num_features=0), "num_features"),
        (lambda: N.gap_probability(X0, torch.zeros(2, 2), num_features=3), "tau"),
        (lambda: N.weak_evidence_error(-1.0, 0.0), "distance_sq"),
        (lambda: N.weak_evidence_error(1.0, torch.tensor([1.0, math.nan])), "features_per_sample"),
        (lambda: N.logistic_excess_bound(0, **LOGISTIC), "m must"),
        (lambda: N.logistic_excess_bound(5, **(LOGISTIC | dict(weight_norm=-1.0))), "weight_norm"),
        (lambda: N.logistic_excess_bound(5, bias_bound=-1.0, **LOGISTIC), "bias_bound"),
        (lambda: N.logistic_excess_bound(5, loss_bound=0.0, **LOGISTIC), "loss_bound"),
        (lambda: N.logistic_excess_bound(5, **(LOGISTIC | dict(delta=1.5))), "delta"),
        (lambda: N.margin_error_bound(5, **(MARGIN | dict(miss=1.5))), "miss"),
        (lambda: N.margin_error_bound(5, **(MARGIN | dict(scale=0.0))), "scale"),
        (lambda: N.margin_error_bound(5, **(MARGIN | dict(tau=0.0))), "tau"),
        (lambda: N.margin_error_bound(5, **(MARGIN | dict(min_variance=1.0))), "min_variance"),
        (lambda: N.logistic_transform(torch.tensor([1.2])), "beta"),
        (lambda: N.logistic_transform(torch.tensor([1.2]), score_bound=1.0), "beta"),
        (lambda: N.logistic_transform(torch.tensor([0.2]), score_bound=0.0), "score_bound"),
        (lambda: N.logistic_bound(torch.tensor([-0.1])), "excess"),
        (lambda: N.logistic_bound(torch.tensor([0.1]), score_bound=-1.0), "score_bound"),
        (lambda: N.logistic_bound(torch.tensor([0.1]), form="asymptotic"), "form"),
        (lambda: N.box_blind_regret(0.0, 3), "score_bound"),
        (lambda: N.box_blind_regret(1.0, 1), "num_classes"),
        (lambda: N.mixture_parameters(1, 2), "num_features"),
        (lambda: N.mixture_parameters(4, 1), "num_classes"),
        (lambda: N.mixture_parameters(4, 2, mode="medium"), "mode"),
        (lambda: N.mixture_parameters(4, 2, mode="hard", covariance_seed=-1), "covariance_seed"),
        (lambda: N.gaussian_mixture(1, MEANS, COVARIANCE), "m must"),
        (lambda: N.gaussian_mixture(5, MEANS, COVARIANCE[:2]), "covariance"),
        (lambda: N.gaussian_mixture(5, MEANS, -COVARIANCE), "covariance"),
        (lambda: N.gaussian_mixture(5, MEANS, COVARIANCE - 3), "covariance"),
        (lambda: N.diagonal_rule(MEANS, COVARIANCE[0]), "variances"),
        (lambda: N.diagonal_rule(MEANS, COVARIANCE.diagonal()[:2]), "variances"),
        (lambda: N.diagonal_rule(MEANS, COVARIANCE.diagonal(), torch.ones(3)), "prior"),
        (lambda: N.linear_rule_error(MEANS, torch.zeros(3), MEANS, COVARIANCE), "bias"),
        (lambda: N.linear_rule_error(MEANS[:, :2], torch.zeros(2), MEANS, COVARIANCE), "weight"),
        (lambda: N.linear_rule_error(MEANS[:1], torch.zeros(1), MEANS[:1], COVARIANCE), "means"),
        (lambda: N.sample_complexity([1, 2], [0.1], 0.2), "errors"),
        (lambda: N.sample_complexity([2, 1], [0.1, 0.2], 0.2), "sizes"),
        (lambda: N.sample_complexity([1, 2], [0.1, 0.2], math.nan), "target"),
        (lambda: N.sample_complexity([1, 2], [0.1, math.nan], 0.2), "errors"),
        (lambda: N.gap_probability(MEANS * math.nan, 0.5, num_features=3), "scores"),
        (lambda: N.gap_probability(MEANS, -0.5, num_features=3), "tau"),
        (lambda: N.gaussian_mixture(5, MEANS, COVARIANCE + torch.ones(4, 4, dtype=D).triu(1)), "symmetric"),
        (lambda: N.gaussian_mixture(5, MEANS, COVARIANCE * math.nan), "covariance"),
        (lambda: N.gaussian_mixture(5, MEANS * math.inf, COVARIANCE), "means"),
        (lambda: N.weak_evidence_error(1.0, torch.tensor([5.0, math.inf])), "inf"),
        (lambda: N.margin_error_bound(9, scale=1, tau=1, miss=0, num_classes=3, min_variance=0.1, min_prior=0.5, delta=0.1), "min_prior"),
    ],
)  # fmt: skip
def test_bad_values_name_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: N.GaussianNaiveBayes("small"), "var_smoothing"),
        (lambda: N.GaussianNaiveBayes().fit([[1.0]], Y0), "X"),
        (lambda: N.GaussianNaiveBayes().fit(X0.long(), Y0), "X"),
        (lambda: N.GaussianNaiveBayes().fit(X0, Y0.double()), "y"),
        (lambda: N.GaussianNaiveBayes().fit(X0, Y0.double().numpy()), "y"),
        (lambda: N.GaussianNaiveBayes().partial_fit(X0, Y0, num_classes=3.0), "num_classes"),
        (lambda: N.parameter_sample_size("a", **SIZES), "epsilon"),
        (lambda: N.logistic_transform(0.2), "beta"),
        (lambda: N.logistic_transform(0.2, score_bound=1.0), "beta"),
        (lambda: N.logistic_bound(0.2), "excess"),
        (lambda: N.gaussian_mixture(5, MEANS, COVARIANCE.float()), "covariance"),
        (lambda: N.linear_rule_error(MEANS.float(), torch.zeros(2), MEANS, COVARIANCE), "weight"),
    ],
)
def test_bad_types_name_the_argument(call, name):
    with pytest.raises(TypeError, match=name):
        call()


def test_not_ready():
    with pytest.raises(RuntimeError, match="fit"):
        N.GaussianNaiveBayes().predict(X0)
    model = N.GaussianNaiveBayes().partial_fit(X0[Y0 < 2], Y0[Y0 < 2], num_classes=3)
    with pytest.raises(RuntimeError, match="class"):
        model.predict(X0)
    model.partial_fit(X0[Y0 == 2], Y0[Y0 == 2])
    assert torch.equal(model.predict(X0), fitted().predict(X0))
    spoiled = fitted(var_smoothing=0.0)
    with pytest.raises(ValueError, match="var_smoothing"):
        spoiled.fit(X0 * 0, Y0)
    with pytest.raises(RuntimeError, match="fit"):
        spoiled.predict(X0)


def test_a_rule_turned_round_errs_where_the_other_does_not():
    means, covariance = N.mixture_parameters(20, 2, mode="hard")
    weight, bias = N.diagonal_rule(means, covariance.diagonal())
    error = N.linear_rule_error(weight, bias, means, covariance).item()
    assert 0 < error < 0.5
    assert N.linear_rule_error(weight.flip(0), bias.flip(0), means, covariance).item() == pytest.approx(1 - error)


def test_scores_keep_their_digits_far_from_the_origin():
    X, y = table(6, m=200)
    near, far = N.GaussianNaiveBayes().fit(X, y), N.GaussianNaiveBayes().fit(X + 1e8, y)
    torch.testing.assert_close(far.predict_log_proba(X + 1e8), near.predict_log_proba(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score_bound", [0.5, 1.0, 2.0])
def test_the_transform_has_one_slope_at_the_knee_and_the_exact_bound_none(score_bound):
    beta = torch.tensor([math.tanh(score_bound), 0.2, 0.99], dtype=torch.float64, requires_grad=True)
    N.logistic_transform(beta, score_bound=score_bound).sum().backward()
    torch.testing.assert_close(beta.grad, torch.atanh(beta.detach()).clamp(max=score_bound))
    for bound in (score_bound, math.inf):
        assert not N.logistic_bound(beta, score_bound=bound).requires_grad
