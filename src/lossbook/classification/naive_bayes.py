r"""Gaussian naive Bayes beside logistic regression: the estimator, its sample sizes, and the bounds that compare the two.

The method of *Revisiting Discriminative vs. Generative Classifiers: Theory and Implications* (Zheng, Wu, Bao, Cao, Li and Zhu, ICML 2023,
arXiv 2302.02334): multiclass naive Bayes with variances that the classes share, a *linear* classifier; how many samples it needs
(:math:`O(\log n)`) and how many logistic regression needs (:math:`O(n)`); the H-consistency bound of the logistic loss; and the simulation. Two results
of the chapter stand beside them: what naive Bayes needs where evidence is thin, and what logistic regression needs where it is not. Equation
labels are those of the chapter ``classification/naive_bayes``.

Notation: ``num_features`` is :math:`n`, ``num_classes`` is :math:`K`, and samples are counted by :math:`m`. Logs are natural. Logistic regression itself is
scikit-learn's ``LogisticRegression``; its loss is ``torch.nn.functional.cross_entropy``.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lossbook import _checks
from lossbook.classification import comp_sum

# ---------------------------------------------------------------------------------------------------------------------
# The estimator
# ---------------------------------------------------------------------------------------------------------------------


def _table(name: str, value: Tensor | np.ndarray, columns: int | None = None) -> Tensor:
    """Features ``(m, n)`` in float64, if they are finite and have the right number of columns."""
    if isinstance(value, np.ndarray):
        plain = value.flags.writeable and all(stride >= 0 for stride in value.strides)
        value = torch.as_tensor(value if plain else value.copy())
    _checks.finite(name, _checks.floating(name, value, 2))
    if columns is not None and value.shape[1] != columns:
        raise ValueError(f"{name} must have {columns} columns, as in fit, got {value.shape[1]}")
    return value.double()


def _labels(y: Tensor | np.ndarray, rows: int, num_classes: int | None) -> Tensor:
    """Labels below K; where K is not given every class must occur, so that there are no more classes than rows."""
    if isinstance(y, np.ndarray) and np.issubdtype(y.dtype, np.integer):
        y = torch.as_tensor(y.astype(np.int64))
    return _checks.indices("y", y, rows if num_classes is None else num_classes, rows)


class GaussianNaiveBayes:
    r"""Multiclass Gaussian naive Bayes, by default with variances shared by the classes: a linear classifier (eq-naive_bayes-linear).

    Predicts :math:`\arg\max_k\log\hat p_k-\frac12\sum_i(x_i-\hat\mu_{ki})^2/\hat\sigma_i^2`, with the classes' shares and means, and the pooled variance
    :math:`\hat\sigma_i^2=\sum_k\hat p_k\hat v_{ki}+\texttt{var\_smoothing}` (eq-naive_bayes-estimates). With ``shared_variance=False`` each class keeps its own
    variances: a quadratic classifier, that of scikit-learn's ``GaussianNB``. In double precision.

    Args:
        var_smoothing: an absolute number that is added to every variance, at least 0. (scikit-learn multiplies its own by the largest variance.)
        shared_variance: pool the variances over the classes.

    Attributes:
        class_count_: samples of each class so far, float64, shape ``(K,)``.
        means_: class means :math:`\hat\mu`, shape ``(K, n)``.
        variances_: shape ``(n,)``, or ``(K, n)`` without pooling; smoothing included.
        log_prior_: :math:`\log\hat p_k`, shape ``(K,)``.
        weight_, bias_: with pooling, the linear classifier, shapes ``(K, n)`` and ``(K,)``: ``X @ weight_.T + bias_`` has the same argmax, up to
            rounding, which is large where features are large beside their deviations.

    Raises:
        TypeError, ValueError: for a wrong number, naming the argument.

    Complexity: O(mn) time to fit; O(mnK) to predict; O(Kn) memory beside the data.

    Source: Zheng et al., section on naive Bayes, and the official code; merging batches by Chan, Golub and LeVeque 1979.

    Example:
        >>> X, y = torch.tensor([[1.0], [2.0], [3.0], [3.0], [5.0], [7.0]]), torch.tensor([0, 0, 0, 1, 1, 1])
        >>> model = GaussianNaiveBayes(var_smoothing=0.0).fit(X, y)
        >>> model.means_.flatten().tolist(), round(model.variances_.item(), 4)
        ([2.0, 5.0], 1.6667)
        >>> model.predict(torch.tensor([[3.4], [3.6]]))  # the boundary is at 3.5
        tensor([0, 1])
    """

    def __init__(self, var_smoothing: float = 1e-9, shared_variance: bool = True):
        self.var_smoothing = _checks.number("var_smoothing", var_smoothing, 0)
        self.shared_variance = bool(shared_variance)

    def fit(self, X: Tensor | np.ndarray, y: Tensor | np.ndarray) -> "GaussianNaiveBayes":
        """Fit to features ``(m, n)`` and int64 labels ``(m,)`` in 0, ..., K - 1, all of which occur; forgets what came before.

        Raises:
            TypeError, ValueError: for a wrong type, shape or value, a class without samples, or a variance of zero, naming the argument.
        """
        X = _table("X", X)
        y = _labels(y, len(X), None)
        count = torch.bincount(y)
        if len(count) < 2 or not bool((count > 0).all()):
            raise ValueError(
                f"y must have at least 2 classes and samples of each of 0 to K - 1, got counts {count.tolist()}"
            )
        self._forget()
        self._merge(X, y, len(count))
        if not bool((self.variances_ > 0).all()):
            self._forget()
            raise ValueError("var_smoothing must be > 0 where a feature does not vary within a class, got 0")
        return self

    def partial_fit(
        self, X: Tensor | np.ndarray, y: Tensor | np.ndarray, num_classes: int | None = None
    ) -> "GaussianNaiveBayes":
        """Add a batch: after all batches the model is that of :meth:`fit` on all rows (eq-naive_bayes-merge).

        Args:
            X, y: as in :meth:`fit`; a batch may lack classes.
            num_classes: K; needed with the first batch, unless that batch has all classes.

        Raises:
            TypeError, ValueError: for a wrong type, shape or value, naming the argument.
        """
        first = not hasattr(self, "class_count_")
        if num_classes is not None:
            _checks.positive_int("num_classes", num_classes, minimum=2)
            if not first and num_classes != len(self.class_count_):
                raise ValueError(f"num_classes must stay {len(self.class_count_)}, got {num_classes}")
        X = _table("X", X, None if first else self.means_.shape[1])
        known = num_classes if first else len(self.class_count_)
        y = _labels(y, len(X), known)
        if known is None and (known := int(y.max()) + 1) < 2:
            raise ValueError("num_classes must be given with a first batch of one class, got None")
        self._merge(X, y, known)
        return self

    def _forget(self) -> None:
        for name in ("class_count_", "means_", "_squares"):
            self.__dict__.pop(name, None)

    def _merge(self, X: Tensor, y: Tensor, num_classes: int) -> None:
        """Counts, means and sums of squared deviations of a batch, merged with those that are there."""
        X = X.detach()
        count = torch.bincount(y, minlength=num_classes).double()
        zeros = X.new_zeros(num_classes, X.shape[1])
        means = zeros.index_add(0, y, X) / count.clamp(min=1)[:, None]
        squares = zeros.index_add(0, y, (X - means[y]).square_())
        if hasattr(self, "class_count_"):
            total = self.class_count_ + count
            share, step = (count / total.clamp(min=1))[:, None], means - self.means_
            squares = self._squares + squares + self.class_count_[:, None] * share * step.square()
            count, means = total, self.means_ + share * step
        self.class_count_, self.means_, self._squares = count, means, squares
        self.log_prior_ = (count / count.sum()).log()
        pooled = squares.sum(0) / count.sum() if self.shared_variance else squares / count.clamp(min=1)[:, None]
        self.variances_ = pooled + self.var_smoothing
        if self.shared_variance:
            self.weight_ = means / self.variances_
            self.bias_ = self.log_prior_ - (means * self.weight_).sum(1) / 2

    def _centered(self, X: Tensor | np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs, the center of the classes' means, the means less this center, and the variances as rows.

        The inputs must be taken less the center, too: it keeps the digits of large offsets.
        """
        if not hasattr(self, "class_count_"):
            raise RuntimeError("the model is not fitted: call fit first")
        if not bool((self.class_count_ > 0).all()):
            raise RuntimeError(f"every class needs samples, got counts {self.class_count_.long().tolist()}")
        if not bool((self.variances_ > 0).all()):
            raise ValueError("var_smoothing must be > 0 where a feature does not vary within a class, got 0")
        X, center = _table("X", X, self.means_.shape[1]), self.means_.mean(0)
        return X, center, self.means_ - center, self.variances_.expand_as(self.means_)

    def log_likelihood(self, X: Tensor | np.ndarray) -> Tensor:
        r"""Log density of each row in each class, :math:`\log\prod_i\mathcal N(x_i;\hat\mu_{ki},\hat\sigma_{(k)i}^2)`, float64, shape ``(B, K)``.

        Raises:
            RuntimeError: before fitting, or while a class has no samples.
            TypeError, ValueError: for a wrong type, shape or value, naming the argument.
        """
        X, center, means, variances = self._centered(X)
        X = X - center
        square = X.square() @ variances.reciprocal().T - 2 * X @ (means / variances).T
        return -(square + (means.square() / variances + (2 * math.pi * variances).log()).sum(1)) / 2

    def predict_log_proba(self, X: Tensor | np.ndarray) -> Tensor:
        """Log posterior of the classes under the model, float64, shape ``(B, K)``; raises as :meth:`log_likelihood`."""
        return torch.log_softmax(self.log_likelihood(X) + self.log_prior_, dim=1)

    def predict(self, X: Tensor | np.ndarray) -> Tensor:
        """The class with the largest posterior, int64, shape ``(B,)``; raises as :meth:`log_likelihood`."""
        if not self.shared_variance:
            return (self.log_likelihood(X) + self.log_prior_).argmax(1)
        X, center, means, variances = self._centered(X)
        weight = means / variances
        bias = self.log_prior_ - (means * weight).sum(1) / 2
        # In blocks that stay in the cache: to write a centered copy of all rows takes longer than the product.
        return torch.cat([((rows - center) @ weight.T + bias).argmax(1) for rows in X.split(512)])


# ---------------------------------------------------------------------------------------------------------------------
# How many samples naive Bayes needs
# ---------------------------------------------------------------------------------------------------------------------


def _open(name: str, value: float, high: float = 1.0) -> float:
    """A number in (0, high]."""
    if _checks.positive_number(name, value) > high:
        raise ValueError(f"{name} must lie in (0, {high:g}], got {value}")
    return float(value)


def parameter_sample_size(
    epsilon: float, *, delta: float, num_features: int, num_classes: int, min_prior: float
) -> int:
    r"""Samples after which *all* parameters are within epsilon: :math:`m\ge\frac{1}{p_0\epsilon^2}\log\frac{5Kn}\delta` (eq-naive_bayes-parameters).

    With features in [0, 1] and probability at least :math:`1-\delta`: every :math:`\hat p_k` and :math:`\hat\mu_{ki}` within epsilon, every pooled
    variance within two epsilon.

    Args:
        epsilon: in :math:`(0,1/\sqrt8]`.
        delta: probability of failure, in (0, 1).
        num_features: n, at least 2.
        num_classes: K, at least 2.
        min_prior: :math:`p_0`, at most the probability of the rarest class, in (0, 1/K].

    Returns:
        The least such integer.

    Raises:
        TypeError, ValueError: for a wrong number, naming the argument.

    Source: Zheng et al., theorem on naive Bayes; the constants are the chapter's.

    Example:
        >>> parameter_sample_size(0.05, delta=0.05, num_features=2048, num_classes=10, min_prior=0.08)
        72662
    """
    epsilon = _open("epsilon", epsilon, 1 / math.sqrt(8))
    if _open("delta", delta) == 1:
        raise ValueError("delta must be < 1, got 1")
    n = _checks.positive_int("num_features", num_features, minimum=2)
    k = _checks.positive_int("num_classes", num_classes, minimum=2)
    return math.ceil(math.log(5 * k * n / delta) / (_open("min_prior", min_prior, 1 / k) * epsilon**2))


def score_error_constant(min_variance: float, min_prior: float) -> float:
    r"""The constant :math:`c=\frac4{\rho_0}+\frac6{\rho_0^2}+\frac2{p_0}` of :math:`|\hat l_k(x)-l_k(x)|\le c\,n\,\epsilon` (eq-naive_bayes-scores).

    Args:
        min_variance: :math:`\rho_0`, at most the least pooled variance of a feature in [0, 1], in (0, 1/4].
        min_prior: :math:`p_0`, in (0, 1/2].

    Returns:
        c, above 100.

    Raises:
        TypeError, ValueError: for a wrong number, naming the argument.

    Source: the chapter.

    Example:
        >>> round(score_error_constant(0.05, 0.5), 6)
        2484.0
    """
    rho, p = _open("min_variance", min_variance, 0.25), _open("min_prior", min_prior, 0.5)
    return 4 / rho + 6 / rho**2 + 2 / p


def naive_bayes_sample_size(
    tau: float, *, delta: float, num_features: int, num_classes: int, min_variance: float, min_prior: float
) -> int:
    r"""Samples after which naive Bayes errs at most :math:`G(\tau)` more than its limit, with probability :math:`1-\delta` (eq-naive_bayes-theorem).

    :func:`parameter_sample_size` at :math:`\epsilon=\min(\frac\tau{2c},\frac{\rho_0}4,\frac{p_0}2)`: n enters through a logarithm.

    Args:
        tau: gap per feature, > 0.
        delta, num_features, num_classes, min_prior: as in :func:`parameter_sample_size`.
        min_variance: as in :func:`score_error_constant`.

    Returns:
        Samples, at least 1.

    Raises:
        TypeError, ValueError: for a wrong number, naming the argument.

    Source: Zheng et al., theorem on naive Bayes; the constants are the chapter's.

    Example:
        >>> sizes = dict(delta=0.05, num_classes=2, min_variance=0.05, min_prior=0.5)
        >>> [naive_bayes_sample_size(1.0, num_features=n, **sizes) for n in (100, 200)]
        [488856428, 523071593]
    """
    c = score_error_constant(min_variance, min_prior)
    epsilon = min(_checks.positive_number("tau", tau) / (2 * c), min_variance / 4, min_prior / 2)
    return parameter_sample_size(
        epsilon, delta=delta, num_features=num_features, num_classes=num_classes, min_prior=min_prior
    )


def discriminant_gap(scores: Tensor, *, num_features: int) -> Tensor:
    r"""Gap of the two largest scores per feature, :math:`(l_{(1)}-l_{(2)})/n` (eq-naive_bayes-gap).

    Args:
        scores: shape ``(B, K)`` with K > 1, floating point, finite.
        num_features: n.

    Returns:
        Shape ``(B,)``, at least 0.

    Raises:
        TypeError, ValueError: for a wrong type or shape, naming the argument.

    Source: Zheng et al., the assumption of the theorem on naive Bayes.

    Example:
        >>> discriminant_gap(torch.tensor([[1.0, 5.0, 3.0]]), num_features=4)
        tensor([0.5000])
    """
    if _checks.finite("scores", _checks.floating("scores", scores, 2)).shape[1] < 2:
        raise ValueError(f"scores must have at least 2 columns, got shape {tuple(scores.shape)}")
    top = scores.topk(2, dim=1).values
    return (top[:, 0] - top[:, 1]) / _checks.positive_int("num_features", num_features)


def gap_probability(scores: Tensor, tau: float | Tensor, *, num_features: int) -> Tensor:
    r"""Share of rows whose gap per feature is at most tau: the empirical :math:`G(\tau)` (eq-naive_bayes-gap).

    Args:
        scores: as in :func:`discriminant_gap`.
        tau: a number, or a tensor of shape ``(T,)``, at least 0.
        num_features: n.

    Returns:
        The shape of ``tau``.

    Raises:
        TypeError, ValueError: for a wrong type or shape, naming the argument.

    Source: Zheng et al., the assumption of the theorem on naive Bayes.

    Example:
        >>> gap_probability(torch.tensor([[1.0, 5.0], [0.0, 1.0]]), 0.5, num_features=4)
        tensor(0.5000)
    """
    gap = discriminant_gap(scores, num_features=num_features)
    tau = torch.as_tensor(tau, dtype=gap.dtype, device=gap.device)
    if tau.ndim > 1:
        raise ValueError(f"tau must be a number or have shape (T,), got {tuple(tau.shape)}")
    if _checks.known_false(tau >= 0):
        raise ValueError(f"tau must be >= 0, got {tau}")
    return (gap <= tau[..., None]).to(gap.dtype).mean(-1)


def weak_evidence_error(distance_sq: float | Tensor, features_per_sample: float | Tensor) -> Tensor:
    r"""Limit of the error of naive Bayes where :math:`n/m\to\kappa` and the evidence stays: :math:`\Phi\bigl(-\frac{\Delta^2}{2\sqrt{\Delta^2+4\kappa}}\bigr)` (eq-naive_bayes-weak).

    Two Gaussian classes of equal probability, independent features: :math:`\Delta^2=\sum_i(\mu_{1i}-\mu_{0i})^2/\sigma_i^2`.

    Args:
        distance_sq: :math:`\Delta^2`, at least 0, a number or a tensor.
        features_per_sample: :math:`\kappa=n/m`, at least 0, a number or a tensor; 0 gives the Bayes error.

    Returns:
        The common shape, float64.

    Raises:
        TypeError, ValueError: for a negative number, naming the argument.

    Source: the chapter.

    Example:
        >>> weak_evidence_error(12.5, torch.tensor([0.0, 1.0]))
        tensor([0.0385, 0.0619], dtype=torch.float64)
    """
    d, kappa = (torch.as_tensor(v, dtype=torch.float64) for v in (distance_sq, features_per_sample))
    for name, value in (("distance_sq", d), ("features_per_sample", kappa)):
        if _checks.known_false(torch.isfinite(value) & (value >= 0)):
            raise ValueError(f"{name} must be finite and >= 0, got {value}")
    tiny = torch.finfo(torch.float64).tiny
    return torch.special.ndtr(-d / (2 * (d + 4 * kappa).clamp(min=tiny).sqrt()))


# ---------------------------------------------------------------------------------------------------------------------
# How many samples logistic regression needs
# ---------------------------------------------------------------------------------------------------------------------


def logistic_excess_bound(
    m: int,
    *,
    num_features: int,
    num_classes: int,
    weight_norm: float,
    delta: float,
    bias_bound: float = 0.0,
    loss_bound: float | None = None,
) -> float:
    r"""Excess logistic risk of the empirical minimizer: :math:`\frac{8K(W\sqrt n+\Lambda)}{\sqrt m}+2B\sqrt{\frac{\log(2/\delta)}{2m}}` (eq-naive_bayes-estimation).

    For features in [0, 1], scores :math:`w_k^\top x+b_k` with :math:`\|w_k\|\le W` and :math:`|b_k|\le\Lambda`; with probability at least :math:`1-\delta`.

    Args:
        m: number of samples.
        num_features: n.
        num_classes: K, at least 2.
        weight_norm: W, at least 0.
        delta: in (0, 1].
        bias_bound: :math:`\Lambda`, at least 0.
        loss_bound: B, a bound of the loss; None for :math:`\log K+2(W\sqrt n+\Lambda)`.

    Returns:
        The bound, at least 0, in nats.

    Raises:
        TypeError, ValueError: for a wrong number, naming the argument.

    Source: Zheng et al., theorem on logistic regression; the constants are the chapter's.

    Example:
        >>> round(logistic_excess_bound(10**6, num_features=100, num_classes=2, weight_norm=1.0, delta=0.05), 4)
        0.2162
    """
    m, n = _checks.positive_int("m", m), _checks.positive_int("num_features", num_features)
    k = _checks.positive_int("num_classes", num_classes, minimum=2)
    reach = _checks.number("weight_norm", weight_norm, 0) * math.sqrt(n) + _checks.number("bias_bound", bias_bound, 0)
    bound = math.log(k) + 2 * reach if loss_bound is None else _checks.positive_number("loss_bound", loss_bound)
    return 8 * k * reach / math.sqrt(m) + 2 * bound * math.sqrt(math.log(2 / _open("delta", delta)) / (2 * m))


def margin_error_bound(
    m: int,
    *,
    scale: float,
    tau: float,
    miss: float,
    num_classes: int,
    min_variance: float,
    min_prior: float,
    delta: float,
) -> float:
    r"""Bound of the error of logistic regression with :math:`W=\frac s{\rho_0\sqrt n}`, under the assumption that serves naive Bayes; n is not in it (eq-naive_bayes-margin).

    :math:`\frac1{\log2}\Bigl[\log(1+(K-1)e^{-s\tau})+qB_s+\frac{8KsA}{\sqrt m}+2B_s\sqrt{\frac{\log(2/\delta)}{2m}}\Bigr]` with
    :math:`A=\frac3{2\rho_0}+\log\frac1{p_0}` and :math:`B_s=\log K+2sA`.

    Args:
        m: number of samples.
        scale: s > 0; the weights' norm times :math:`\rho_0\sqrt n`.
        tau: margin per feature, > 0.
        miss: q, the probability that the limit of naive Bayes has a margin of at most tau per feature, in [0, 1].
        num_classes, delta: as in :func:`logistic_excess_bound`.
        min_variance: as in :func:`score_error_constant`.
        min_prior: as in :func:`parameter_sample_size`.

    Returns:
        The bound, at least 0; above 1 it says nothing.

    Raises:
        TypeError, ValueError: for a wrong number, naming the argument.

    Source: the chapter; margin bounds of this kind go back to Bartlett 1998 and Koltchinskii and Panchenko 2002.

    Example:
        >>> sizes = dict(tau=1.0, miss=0.0, num_classes=2, min_variance=0.05, min_prior=0.5, delta=0.05)
        >>> round(margin_error_bound(10**9, scale=6.0, **sizes), 4)
        0.1837
    """
    s, tau = _checks.positive_number("scale", scale), _checks.positive_number("tau", tau)
    q = _checks.number("miss", miss, 0, 1)
    k = _checks.positive_int("num_classes", num_classes, minimum=2)
    rho, p = _open("min_variance", min_variance, 0.25), _open("min_prior", min_prior, 1 / k)
    reach = s * (1.5 / rho - math.log(p))
    best = math.log1p((k - 1) * math.exp(-s * tau)) + q * (math.log(k) + 2 * reach)
    excess = logistic_excess_bound(m, num_features=1, num_classes=k, weight_norm=0.0, bias_bound=reach, delta=delta)
    return (best + excess) / math.log(2)


def logistic_transform(beta: Tensor, *, score_bound: float = math.inf) -> Tensor:
    r"""The H-consistency transform of the logistic loss, :math:`\mathcal T(\beta)`, or :math:`\mathcal T_B(\beta)` for two classes with scores in [-B, B] (eq-naive_bayes-bounded).

    :math:`\frac{1+\beta}2\log(1+\beta)+\frac{1-\beta}2\log(1-\beta)` up to :math:`\beta=\tanh B`; beyond, its tangent, with slope B.

    Args:
        beta: zero-one regret, in [0, 1], any shape, floating point.
        score_bound: B > 0; ``math.inf`` for any number of classes and complete scores.

    Returns:
        The shape and dtype of ``beta``; convex and increasing.

    Raises:
        TypeError, ValueError: for a wrong type or number, naming the argument.

    Source: Zheng et al., H-consistency bound of the logistic loss; derived in the chapter.

    Example:
        >>> logistic_transform(torch.tensor([0.2, 1.0]), score_bound=1.0)
        tensor([0.0201, 0.5662])
    """
    if score_bound == math.inf:
        return comp_sum.consistency_transform(beta, tau=1, num_classes=2)
    knee = math.tanh(_checks.positive_number("score_bound", score_bound))
    if _checks.known_false((_checks.floating("beta", beta) >= 0) & (beta <= 1)):
        raise ValueError(f"beta must lie in [0, 1], got {beta.min()} to {beta.max()}")
    curve = comp_sum.consistency_transform(beta.clamp(max=knee), tau=1, num_classes=2)
    return torch.where(beta > knee, curve + score_bound * (beta - knee), curve)


def logistic_bound(excess: Tensor, *, score_bound: float = math.inf, form: str = "exact") -> Tensor:
    r"""The H-consistency bound of the logistic loss: the largest zero-one regret at a logistic regret of t (eq-naive_bayes-consistency).

    Args:
        excess: t, logistic excess risk plus minimizability gap, at least 0, any shape, floating point.
        score_bound: B > 0; with a finite bound for two classes only: see :func:`box_blind_regret`.
        form: "exact", the inverse of :func:`logistic_transform`, 1 from its largest value on; or "simple", :math:`\sqrt{2t}`, and
            :math:`\max\{\sqrt{2t},2t/\tanh B\}` with a finite B, not clipped.

    Returns:
        The shape and dtype of ``excess``; the exact form carries no gradient.

    Raises:
        TypeError, ValueError: for a wrong type, number or form, naming the argument.

    Source: Zheng et al., H-consistency bound of the logistic loss; derived in the chapter.

    Example:
        >>> logistic_bound(torch.tensor([0.02, 0.5]), score_bound=1.0)
        tensor([0.1993, 0.9338])
    """
    if form not in ("exact", "simple"):
        raise ValueError(f'form must be "exact" or "simple", got {form!r}')
    bound = score_bound if score_bound == math.inf else _checks.positive_number("score_bound", score_bound)
    curve = comp_sum.consistency_bound(excess, tau=1, num_classes=2, form=form)
    if bound == math.inf:
        return curve
    knee = math.tanh(bound)
    if form == "simple":
        return torch.maximum(curve, 2 * excess / knee)
    start = comp_sum.consistency_transform(torch.tensor(knee, dtype=torch.float64), tau=1, num_classes=2).item()
    line = (knee + (excess.detach().double() - start) / bound).clamp(max=1).to(excess.dtype)
    return torch.where(excess > start, line, curve)


def box_blind_regret(score_bound: float, num_classes: int) -> float:
    r"""Largest zero-one regret at which scores in :math:`[-B,B]^K` can still have the least logistic risk, :math:`\frac{(K-2)e^{-2B}}{2+(K-2)e^{-2B}}` (eq-naive_bayes-blind).

    Up to this regret no H-consistency bound that is free of the distribution can say anything about a box. It is 0 for two classes.

    Args:
        score_bound: B > 0.
        num_classes: K, at least 2.

    Returns:
        A regret in [0, 1).

    Raises:
        TypeError, ValueError: for a wrong number, naming the argument.

    Source: the chapter.

    Example:
        >>> round(box_blind_regret(1.0, 3), 4), box_blind_regret(1.0, 2)
        (0.0634, 0.0)
    """
    rest = (_checks.positive_int("num_classes", num_classes, minimum=2) - 2) * math.exp(
        -2 * _checks.positive_number("score_bound", score_bound)
    )
    return rest / (2 + rest)


# ---------------------------------------------------------------------------------------------------------------------
# The simulation
# ---------------------------------------------------------------------------------------------------------------------

MODES = ("easy", "hard")


def mixture_parameters(
    num_features: int, num_classes: int, *, mode: str = "easy", covariance_seed: int = 0
) -> tuple[Tensor, Tensor]:
    r"""Means and common covariance of the paper's Gaussian mixture (eq-naive_bayes-mixture).

    Class 0 has mean :math:`-\mathbf 1`, class :math:`k\ge1` has :math:`2^{k-1}\mathbf 1`. "easy": variances n on the first half of the features and 1 on the rest.
    "hard": off the diagonal those of :math:`A^\top A` with :math:`A_{ij}` uniform on (-1, 1). This matrix C is not positive semidefinite, and
    :math:`|C|=V\,\mathrm{diag}|\lambda|\,V^\top` stands for it, as in the published code, whose sampler takes absolute eigenvalues without saying so.
    With more than two classes features are shifted and scaled, :math:`(x-2^{K-3})/2^{K-3}`.

    Args:
        num_features: n, at least 2.
        num_classes: K, at least 2.
        mode: "easy" or "hard".
        covariance_seed: of A, by NumPy's ``RandomState``, as published (there 0).

    Returns:
        Means ``(K, n)`` and covariance ``(n, n)``, float64.

    Raises:
        TypeError, ValueError: for a wrong number or mode, naming the argument.

    Complexity: O(Kn + n^2) time, O(n^3) for "hard".

    Source: Zheng et al., simulation; the official code.

    Example:
        >>> means, covariance = mixture_parameters(4, 2)
        >>> means[:, 0].tolist(), covariance.diagonal().tolist()
        ([-1.0, 1.0], [4.0, 4.0, 1.0, 1.0])
    """
    n = _checks.positive_int("num_features", num_features, minimum=2)
    k = _checks.positive_int("num_classes", num_classes, minimum=2)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    variances = torch.ones(n, dtype=torch.float64)
    variances[: n // 2] = n
    covariance = variances.diag()
    if mode == "hard":
        seed = _checks.positive_int("covariance_seed", covariance_seed, minimum=0)
        a = torch.as_tensor(2 * np.random.RandomState(seed).rand(n, n) - 1)
        gram = a.T @ a
        values, vectors = torch.linalg.eigh(gram - gram.diagonal().diag() + covariance)
        covariance = vectors * values.abs() @ vectors.T
    levels = torch.tensor([-1.0, *(2.0**j for j in range(k - 1))], dtype=torch.float64)
    unit = 2.0 ** (k - 3) if k > 2 else 1.0
    levels = (levels - unit) / unit if k > 2 else levels
    return levels[:, None].repeat(1, n), covariance / unit**2


def gaussian_mixture(
    m: int, means: Tensor, covariance: Tensor, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Samples of equally likely Gaussian classes with one covariance; labels are drawn so that each class occurs.

    Args:
        m: number of samples, at least K. The first K have the labels 0 to K - 1, the others are uniform.
        means: shape ``(K, n)``, floating point.
        covariance: shape ``(n, n)``, symmetric and positive semidefinite; a diagonal one costs O(mn).
        generator: source of randomness, on the device of ``means``.

    Returns:
        Features ``(m, n)`` in the dtype of ``means``, labels int64 ``(m,)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or number, or a covariance with a negative eigenvalue, naming the argument.

    Complexity: O(mn^2 + n^3) time, O(mn) for a diagonal covariance.

    Source: Zheng et al., simulation.

    Example:
        >>> X, y = gaussian_mixture(5, *mixture_parameters(4, 2))
        >>> X.shape, y[:2]
        (torch.Size([5, 4]), tensor([0, 1]))
    """
    classes, n = _checks.finite("means", _checks.floating("means", means, 2)).shape
    root = _root(covariance, n, means.dtype)
    m = _checks.positive_int("m", m, minimum=classes)
    others = torch.randint(classes, (m - classes,), generator=generator, device=means.device)
    y = torch.cat([torch.arange(classes, device=means.device), others])
    noise = torch.randn(m, n, generator=generator, dtype=means.dtype, device=means.device)
    return means[y] + (noise * root if root.ndim == 1 else noise @ root), y


def _covariance(covariance: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    if _checks.floating("covariance", covariance, 2).shape != (n, n):
        raise ValueError(f"covariance must have shape {(n, n)}, got {tuple(covariance.shape)}")
    if covariance.dtype != dtype:
        raise TypeError(f"covariance must have the dtype of means, {dtype}, got {covariance.dtype}")
    scale = _checks.finite("covariance", covariance).abs().amax()
    if _checks.known_false((covariance - covariance.T).abs() <= 1e-5 * scale):
        raise ValueError("covariance must be symmetric")
    return covariance


def _root(covariance: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """The symmetric root, or the standard deviations where the covariance is diagonal."""
    diagonal = _covariance(covariance, n, dtype).diagonal()
    if bool((covariance == diagonal.diag()).all()):
        values, vectors = diagonal, None
    else:
        values, vectors = torch.linalg.eigh(covariance)
    if bool(values.min() < -1e-9 * values.abs().max()):
        raise ValueError(f"covariance must be positive semidefinite, got an eigenvalue {values.min():.3g}")
    root = values.clamp(min=0).sqrt()
    return root if vectors is None else vectors * root @ vectors.T


def diagonal_rule(means: Tensor, variances: Tensor, prior: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""The linear classifier of naive Bayes with known parameters, :math:`l_k(x)=w_k^\top x+b_k` (eq-naive_bayes-linear): with the true ones its limit :math:`h_\infty`.

    Args:
        means: shape ``(K, n)``, floating point.
        variances: shape ``(n,)``, > 0.
        prior: shape ``(K,)``, > 0; None for equal ones.

    Returns:
        Weights ``(K, n)`` and biases ``(K,)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Source: Zheng et al., the generative classifier.

    Example:
        >>> diagonal_rule(torch.tensor([[2.0], [5.0]]), torch.tensor([5 / 3]))
        (tensor([[1.2000],
                [3.0000]]), tensor([-1.8931, -8.1931]))
    """
    classes, n = _checks.floating("means", means, 2).shape
    prior = means.new_full((classes,), 1 / classes) if prior is None else prior
    for name, value, size in (("variances", variances, n), ("prior", prior, classes)):
        if _checks.floating(name, value, 1).shape != (size,):
            raise ValueError(f"{name} must have shape ({size},), got {tuple(value.shape)}")
        if _checks.known_false(value > 0):
            raise ValueError(f"{name} must be > 0 everywhere, got {value.min()}")
    weight = means / variances
    return weight, prior.log() - (means * weight).sum(1) / 2


def linear_rule_error(weight: Tensor, bias: Tensor, means: Tensor, covariance: Tensor) -> Tensor:
    r"""Exact error of a linear classifier on two equally likely Gaussian classes: no test set (eq-naive_bayes-exact).

    With :math:`w=w_1-w_0`, :math:`b=b_1-b_0`: :math:`\frac12\Phi\bigl(\frac{w^\top\mu_0+b}s\bigr)+\frac12\Phi\bigl(-\frac{w^\top\mu_1+b}s\bigr)`, :math:`s^2=w^\top\Sigma w`.

    Args:
        weight: shape ``(2, n)``, floating point.
        bias: shape ``(2,)``.
        means: shape ``(2, n)``.
        covariance: shape ``(n, n)``, symmetric and positive semidefinite; of that only the symmetry is checked.

    Returns:
        Shape ``()``; 1/2 for a rule that does not look at x.

    Raises:
        TypeError, ValueError: for a wrong type or shape, naming the argument.

    Complexity: O(n^2) time.

    Source: derived in the chapter.

    Example:
        >>> means, covariance = mixture_parameters(20, 2)
        >>> round(linear_rule_error(*diagonal_rule(means, covariance.diagonal()), means, covariance).item(), 6)
        0.000597
    """
    if len(_checks.floating("means", means, 2)) != 2:
        raise ValueError(f"means must have two rows, got shape {tuple(means.shape)}")
    _checks.like("weight", weight, "means", means, 2)
    if _checks.floating("bias", bias, 1).shape != (2,):
        raise ValueError(f"bias must have shape (2,), got {tuple(bias.shape)}")
    _covariance(covariance, means.shape[1], means.dtype)
    w, b = weight[1] - weight[0], bias[1] - bias[0]
    spread = (w @ (covariance @ w)).clamp(min=torch.finfo(means.dtype).tiny).sqrt()
    scores = (means @ w + b) / spread
    return (torch.special.ndtr(scores[0]) + torch.special.ndtr(-scores[1])) / 2


def sample_complexity(sizes: Sequence[int], errors: Sequence[float], target: float) -> float:
    """The first sample size whose error is below the target; ``inf`` where none is.

    Args:
        sizes: increasing numbers of samples.
        errors: the error at each of them.
        target: strictly below it counts.

    Returns:
        One of ``sizes`` as a float, or ``inf``.

    Raises:
        TypeError, ValueError: for sequences of different length, sizes that do not increase, or a wrong number, naming the argument.

    Source: Zheng et al., simulation.

    Example:
        >>> sample_complexity([4, 8, 16, 32], [0.3, 0.1, 0.01, 0.02], 0.05)
        16.0
    """
    sizes, errors = [float(s) for s in sizes], [float(e) for e in errors]
    if len(sizes) != len(errors) or not sizes:
        raise ValueError(f"errors must have one number for each of sizes, got {len(errors)} for {len(sizes)}")
    if any(a >= b for a, b in zip(sizes, sizes[1:], strict=False)):
        raise ValueError(f"sizes must increase, got {sizes}")
    if any(map(math.isnan, errors)):
        raise ValueError(f"errors must be numbers, got {errors}")
    target = _checks.number("target", target)
    return next((s for s, e in zip(sizes, errors, strict=True) if e < target), math.inf)
