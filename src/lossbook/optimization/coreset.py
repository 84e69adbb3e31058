r"""Coresets for any loss: a few weighted points whose loss is that of all of them.

The method of *AutoCoreset: An Automatic Practical Coreset Construction Framework* (Maalouf, Tukan, Braverman and Rus, ICML 2023, arXiv 2305.11980):
evaluate a few models on all points, one column of losses for each; choose weighted points whose rows add up to the column sums; fit a model to them, add its
losses as a column, and repeat. Needed are the losses and a solver, nothing else. Three ways to solve the vector summation: sensitivity sampling, the best of
many uniform samples, and Carathéodory's theorem. Equation labels are those of the chapter ``optimization/coreset``.

Notation: ``matrix`` (n, k) is the loss matrix :math:`M`, ``weights`` (n,) are the weights :math:`w\ge0` of the data, all 1 where they are None, and ``size`` is
:math:`\tau`, which counts draws: a point that is drawn twice is stored once. :math:`s=w^\top M`, and :math:`v` are the weights of the coreset. All sums are
taken in double precision.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lossbook import _checks

# ---------------------------------------------------------------------------------------------------------------------
# Coresets, and how well they add up
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Coreset:
    """Points and their weights (def-coreset-coreset).

    Args:
        indices: distinct points in increasing order, int64, shape ``(m,)``.
        weights: their weights :math:`v`, at least 0, floating point, shape ``(m,)``.

    Raises:
        TypeError, ValueError: for a wrong type or shape, a negative index or weight, or a point that occurs twice, naming the argument.

    Source: Maalouf et al., weighted subsets.

    Example:
        >>> coreset = Coreset(torch.tensor([0, 2]), torch.tensor([1.5, 2.0]))
        >>> coreset.cost(torch.tensor([2.0, 7.0, 1.0, 4.0]))
        tensor(5.)
    """

    indices: Tensor
    weights: Tensor

    def __post_init__(self):
        _checks.integer("indices", self.indices, 1)
        if not isinstance(self.weights, Tensor) or not self.weights.is_floating_point():
            raise TypeError(f"weights must be a floating-point tensor, got {type(self.weights).__name__}")
        if self.weights.shape != self.indices.shape:
            raise ValueError(
                f"weights must have shape {tuple(self.indices.shape)}, one for each index, got {tuple(self.weights.shape)}"
            )
        if _checks.known_false(self.indices >= 0) or _checks.known_false(self.indices.diff() > 0):
            raise ValueError(f"indices must be >= 0, distinct and increasing, got {self.indices}")
        if _checks.known_false(self.weights >= 0):
            raise ValueError(f"weights must be >= 0, got {self.weights}")

    def __len__(self) -> int:
        return len(self.indices)

    def cost(self, loss_vector: Tensor) -> Tensor:
        """The coreset's cost :math:`F_v=\\sum_{i\\in I}v_if_i` from the losses of all points, ``(n,)``, or ``(n, k)`` for k models: shape ``()`` or ``(k,)``."""
        _checks.floating("loss_vector", loss_vector)
        if loss_vector.ndim > 2 or _checks.known_false(self.indices < len(loss_vector)):
            raise ValueError(
                f"loss_vector must have shape (n,) or (n, k) with n above the last index, got {tuple(loss_vector.shape)}"
            )
        return (self.weights.double() @ loss_vector[self.indices].double()).to(loss_vector.dtype)


def _rows(matrix: Tensor, weights: Tensor | None) -> Tensor:
    """Check the loss matrix and the weights of its rows; give back the weights in double precision."""
    _checks.finite("matrix", _checks.floating("matrix", matrix, 2))
    return _weights(weights, len(matrix), matrix.device)


def _weights(weights: Tensor | None, n: int, device: torch.device | None = None) -> Tensor:
    if weights is None:
        return torch.ones(n, dtype=torch.float64, device=device)
    _checks.finite("weights", _checks.floating("weights", weights, 1))
    if len(weights) != n:
        raise ValueError(f"weights must have shape ({n},), one for each point, got {tuple(weights.shape)}")
    if _checks.known_false(weights >= 0) or _checks.known_false(weights.sum() > 0):
        raise ValueError(f"weights must be >= 0 and not all 0, got {weights.min()} to {weights.max()}")
    return weights.double()


def summation_error(matrix: Tensor, coreset: Coreset, weights: Tensor | None = None) -> Tensor:
    r"""How far the coreset's column sums are from those of all points, :math:`\|v^\top M-w^\top M\|_2` (eq-coreset-summation).

    Args:
        matrix: shape ``(n, k)``, floating point, finite.
        coreset: some of the n points.
        weights: shape ``(n,)``, at least 0; None for ones.

    Returns:
        Shape ``()``, float64.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(nk) time and memory.

    Source: Maalouf et al., the vector summation problem.

    Example:
        >>> matrix = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 5.0]])
        >>> summation_error(matrix, Coreset(torch.tensor([2]), torch.tensor([2.0])))
        tensor(3.1623, dtype=torch.float64)
    """
    weights = _rows(matrix, weights)
    if not isinstance(coreset, Coreset):
        raise TypeError(f"coreset must be a Coreset, got {type(coreset).__name__}")
    return torch.linalg.vector_norm(coreset.cost(matrix.double()) - weights @ matrix.double())


# ---------------------------------------------------------------------------------------------------------------------
# Vector summation by sampling
# ---------------------------------------------------------------------------------------------------------------------


def _merge(draws: Tensor, per_draw: Tensor, dtype: torch.dtype) -> Coreset:
    """Draws as distinct points: weights ``per_draw`` (n,) times how often each was drawn."""
    indices, counts = torch.unique(draws, return_counts=True)
    return Coreset(indices, (per_draw[indices] * counts).to(dtype))


def _uniform_draws(n: int, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.randint(n, shape, generator=generator, device=generator.device if generator else None)


def uniform_coreset(
    n: int,
    size: int,
    *,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Coreset:
    r"""Uniform draws with replacement, of weight :math:`w_in/\tau` each (eq-coreset-uniform): the baseline. Its sums are unbiased.

    Args:
        n: number of points.
        size: draws :math:`\tau\ge1`.
        weights: shape ``(n,)``, at least 0; None for ones.
        labels: int64, shape ``(n,)``: draw class by class, with the sizes of :func:`allocate_by_class` and weights :math:`w_in_c/\tau_c`. None for no classes.
        generator: the source of randomness; None for torch's own.

    Returns:
        At most ``size`` points; weights in the dtype of ``weights``, or torch's default.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(n + size log size) time, O(n) memory.

    Source: Maalouf et al., uniform sampling.

    Example:
        >>> coreset = uniform_coreset(1000, 4, generator=torch.Generator().manual_seed(0))
        >>> coreset.weights
        tensor([250., 250., 250., 250.])
    """
    n, size = _checks.positive_int("n", n), _checks.positive_int("size", size)
    dtype = torch.get_default_dtype() if weights is None else weights.dtype
    weights = _weights(weights, n)
    if labels is not None:
        _labels(labels, n)

        def draw(rows: Tensor, count: int) -> Coreset:
            return uniform_coreset(len(rows), count, weights=weights[rows], generator=generator)

        parts = _by_class(labels, size, draw)
        return Coreset(parts.indices, parts.weights.to(dtype))
    draws = _uniform_draws(n, (size,), generator).to(weights.device)
    return _merge(draws, weights * (n / size), dtype)


def _probabilities(matrix: Tensor, weights: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    """Lengths of the weighted rows, and the probabilities with which rows are drawn."""
    lengths = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float64) * weights
    total, n = lengths.sum(), len(matrix)
    shares = torch.where(total > 0, lengths / total, 1 / n)  # without any length all rows are alike
    return lengths, (1 - mix) * shares + mix / n


def sensitivity_sample(
    matrix: Tensor,
    size: int,
    *,
    weights: Tensor | None = None,
    mix: float = 0.0,
    generator: torch.Generator | None = None,
) -> Coreset:
    r"""Draw rows in proportion to their length, :math:`p_i\propto\|w_iM_{i\cdot}\|_2`, with weight :math:`w_i/(\tau p_i)` (eq-coreset-sensitivity).

    Unbiased, and of all independent draws the one with the least mean square error (thm-coreset-sampling). Rows of length 0 are never drawn; if all are, the draws are uniform.

    Args:
        matrix: shape ``(n, k)``, floating point, finite.
        size: draws :math:`\tau\ge1`, with replacement.
        weights: shape ``(n,)``, at least 0; None for ones.
        mix: the share of a uniform distribution in p, in [0, 1]: no draw weighs more than :math:`w_in/(\tau\,\mathrm{mix})`, and 1 is uniform sampling.
        generator: the source of randomness; None for torch's own.

    Returns:
        At most ``size`` points; weights in the dtype of ``matrix``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(nk + size log n) time, O(n) memory.

    Source: Maalouf et al., importance (sensitivity) sampling for vector summation.

    Example:
        >>> matrix = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 5.0]])  # lengths 5, 0, 5
        >>> coreset = sensitivity_sample(matrix, 100, generator=torch.Generator().manual_seed(0))
        >>> coreset.indices, coreset.weights.sum()
        (tensor([0, 2]), tensor(2.))
    """
    weights = _rows(matrix, weights)
    size, mix = _checks.positive_int("size", size), _checks.number("mix", mix, 0, 1)
    _lengths, p = _probabilities(matrix, weights, mix)
    # The inverse of the distribution function takes any n; the steps of rows that are never drawn are empty.
    steps = p.cumsum(0)
    device = generator.device if generator else None
    uniform = torch.rand(size, dtype=torch.float64, generator=generator, device=device).to(steps.device)
    return _merge(torch.searchsorted(steps, uniform * steps[-1], right=True), weights / (size * p), matrix.dtype)


def expected_sampling_error(matrix: Tensor, size: int, weights: Tensor | None = None, *, mix: float = 0.0) -> Tensor:
    r"""Mean square error of :func:`sensitivity_sample`'s sums in closed form, :math:`\mathbb E\|v^\top M-s\|_2^2=\frac1\tau\bigl[\sum_i\|w_iM_{i\cdot}\|^2/p_i-\|s\|^2\bigr]` (eq-coreset-second).

    Args:
        matrix, size, weights, mix: as in :func:`sensitivity_sample`; with ``mix=1`` the error of uniform sampling.

    Returns:
        Shape ``()``, float64, at least 0; for ``mix=0`` and entries of at least 0 at most :math:`\frac{k-1}\tau\|s\|^2`.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(nk) time and memory.

    Source: derived in the chapter.

    Example:
        >>> expected_sampling_error(torch.eye(2), 4)
        tensor(0.5000, dtype=torch.float64)
    """
    weights = _rows(matrix, weights)
    size, mix = _checks.positive_int("size", size), _checks.number("mix", mix, 0, 1)
    lengths, p = _probabilities(matrix, weights, mix)
    # With p proportional to the lengths this is the square of their sum, also where p is 0.
    moment = torch.where(lengths > 0, lengths.square() / p, 0).sum()
    return ((moment - (weights @ matrix.double()).square().sum()) / size).clamp(min=0)


def best_of_means(
    matrix: Tensor,
    size: int,
    *,
    trials: int = 100,
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Coreset:
    r"""Of many uniform samples the one with the least error :math:`\|v^\top M-w^\top M\|_2`. The choice makes it biased.

    Args:
        matrix: shape ``(n, k)``, floating point, finite.
        size: draws :math:`\tau\ge1` of each sample.
        trials: number of samples.
        weights: shape ``(n,)``, at least 0; None for ones.
        generator: the source of randomness; None for torch's own.

    Returns:
        At most ``size`` points; weights in the dtype of ``matrix``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O((n + trials * size) k) time, O(nk + trials * (size + k)) memory.

    Source: Maalouf et al., whose code calls it the median of means.

    Example:
        >>> matrix = torch.arange(10.0)[:, None]
        >>> coreset = best_of_means(matrix, 3, generator=torch.Generator().manual_seed(0))
        >>> summation_error(matrix, coreset)  # three points with mean 4.5 there are none
        tensor(1.6667, dtype=torch.float64)
    """
    weights = _rows(matrix, weights)
    size, trials = _checks.positive_int("size", size), _checks.positive_int("trials", trials)
    per_draw = weights * (len(matrix) / size)
    draws = _uniform_draws(len(matrix), (trials, size), generator).to(matrix.device)
    terms = per_draw[:, None] * matrix.double()
    sums = F.embedding_bag(draws, terms, mode="sum")  # adds rows up without a table of them
    best = torch.linalg.vector_norm(sums - weights @ matrix.double(), dim=1).argmin()
    return _merge(draws[best], per_draw, matrix.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Vector summation, exactly
# ---------------------------------------------------------------------------------------------------------------------


def _eliminate(vectors: Tensor, weights: Tensor, keep: int) -> Tensor:
    """New weights (m,), at most ``keep`` of them > 0, with the same weighted sum of vectors (m, r), for keep >= r; on the CPU, in float64."""
    table, values, rank = vectors.numpy(), weights.numpy().copy(), vectors.shape[1]  # thousands of tiny steps
    support = np.flatnonzero(values)
    while len(support) > keep:
        few = support[: rank + 1]
        direction = np.linalg.qr(table[few], mode="complete")[0][:, -1]  # orthogonal to all r columns: a null vector
        if -direction.min() > direction.max():  # the largest entry bounds the step
            direction = -direction
        ratios = np.divide(values[few], direction, out=np.full(len(few), np.inf), where=direction > 0)
        rest = np.maximum(values[few] - ratios.min() * direction, 0)
        rest[ratios.argmin()] = 0
        values[few] = rest
        support = np.concatenate([few[rest > 0], support[rank + 1 :]])
    return torch.from_numpy(values)


@torch.no_grad()
def caratheodory(
    matrix: Tensor, weights: Tensor | None = None, *, size: int | None = None, preserve_total: bool = True
) -> Coreset:
    r"""Few points with exactly the same weighted sum of rows (thm-coreset-caratheodory), in boosted rounds (eq-coreset-booster).

    A round cuts the points into groups, reduces the groups' means, and drops the points of the groups that go. What is left at the end is reduced one by one.

    Args:
        matrix: shape ``(n, k)``, floating point, finite.
        weights: shape ``(n,)``, at least 0; None for ones.
        size: stop at this number of points, where it is more than the theorem's; None for as few as there can be.
        preserve_total: preserve the total weight, too. It is not preserved by itself.

    Returns:
        At most ``max(size, k + 1)`` points, ``max(size, k)`` without the total: those of weight > 0, unchanged where they are few enough. Weights in the dtype of ``matrix``, without gradient.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: with t points at the end, O(nk + t k^3 log(n/t)) time and O(nk) memory; the small systems are solved on the CPU.

    Source: Maalouf et al., Carathéodory summation; the booster by Maalouf, Jubran and Feldman 2019.

    Example:
        >>> coreset = caratheodory(torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.full((4,), 0.25))
        >>> len(coreset), coreset.cost(torch.tensor([0.0, 1.0, 2.0, 3.0])), coreset.weights.sum()
        (2, tensor(1.5000), tensor(1.))
    """
    values = _rows(matrix, weights)
    size = 1 if size is None else _checks.positive_int("size", size)
    vectors = matrix.double()
    if preserve_total:
        vectors = torch.cat([vectors, vectors.new_ones(len(vectors), 1)], dim=1)
    scale = vectors.abs().amax(0)
    vectors = vectors / torch.where(scale > 0, scale, 1)  # columns of one size: what is small keeps its digits
    keep = max(size, vectors.shape[1])
    if not preserve_total:  # a row of zeros adds nothing
        values = values.where(vectors.any(1), 0)
    support = values.nonzero().flatten()
    values = values[support]
    while len(support) > 2 * keep:
        group = torch.arange(len(support), device=support.device) * (2 * keep) // len(support)
        mass = values.new_zeros(2 * keep).index_add(0, group, values)
        sums = vectors.new_zeros(2 * keep, vectors.shape[1]).index_add(0, group, values[:, None] * vectors[support])
        reduced = _eliminate((sums / mass[:, None]).cpu(), mass.cpu(), keep).to(mass.device)
        values = values * (reduced / mass)[group]
        support, values = support[values > 0], values[values > 0]
    if len(support) > keep:
        values = _eliminate(vectors[support].cpu(), values.cpu(), keep).to(values.device)
        support, values = support[values > 0], values[values > 0]
    return Coreset(support, values.to(matrix.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Class by class
# ---------------------------------------------------------------------------------------------------------------------


def _labels(labels: Tensor, n: int) -> Tensor:
    _checks.integer("labels", labels, 1)
    if len(labels) != n:
        raise ValueError(f"labels must have shape ({n},), one for each point, got {tuple(labels.shape)}")
    return labels


def allocate_by_class(labels: Tensor, size: int) -> Tensor:
    r"""How many points each class gets: the mean of three policies, rounded (eq-coreset-classes).

    With :math:`\pi_c=n_c/n` the shares are proportional to :math:`\pi_c`, to :math:`|\log\pi_c|` and to :math:`e^{-\pi_c}`. Each class gets at least one point and at most all of its own.

    Args:
        labels: int64, shape ``(n,)``, any values.
        size: :math:`\tau`, from the number of classes to n.

    Returns:
        Sizes in the order of ``labels.unique()``, int64, shape ``(K,)``; they add up to ``size``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(n log n) time.

    Source: the official code, which mixes the policies by a linear program; the plain mean is ours.

    Example:
        >>> allocate_by_class(torch.tensor([-1] * 1623 + [1] * 174), 50)
        tensor([21, 29])
    """
    counts = torch.unique(_checks.integer("labels", labels, 1), return_counts=True)[1].cpu()
    if _checks.positive_int("size", size) < len(counts) or size > len(labels) or not len(labels):
        raise ValueError(
            f"size must be from {len(counts)}, the number of classes, to {len(labels)}, that of points, got {size}"
        )
    if len(counts) == 1:
        return torch.tensor([size])
    share = counts.double() / counts.sum()
    policies = torch.stack([share, -share.log(), (-share).exp()])
    quota = size * (policies / policies.sum(1, keepdim=True)).mean(0)
    # The next point goes where most is missing, and there are some left: the largest of quota less 1, 2, … of each class.
    spare = counts.clamp(max=size) - 1
    owner = torch.arange(len(counts)).repeat_interleave(spare)
    taken = torch.arange(1, len(owner) + 1) - (spare.cumsum(0) - spare)[owner]
    first = (quota[owner] - taken).sort(descending=True, stable=True).indices[: size - len(counts)]
    return 1 + torch.bincount(owner[first], minlength=len(counts))


def _by_class(labels: Tensor, size: int, draw: Callable[[Tensor, int], Coreset]) -> Coreset:
    """One coreset of those that ``draw(rows, size)`` gives for the rows of each class."""
    rows = [(labels == value).nonzero().flatten() for value in labels.unique()]
    parts = [draw(own, count) for own, count in zip(rows, allocate_by_class(labels, size).tolist(), strict=True)]
    indices, order = torch.cat([own[part.indices] for own, part in zip(rows, parts, strict=True)]).sort()
    return Coreset(indices, torch.cat([part.weights for part in parts])[order])


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------

METHODS = ("sensitivity", "best_of_means", "caratheodory")


class Round(NamedTuple):
    """One round of :func:`auto_coreset`: costs of the model that was fitted to its coreset.

    Args:
        cost: :math:`F_w(x_C)`, on all points.
        coreset_cost: :math:`F_v(x_C)`, on the coreset.
        points: distinct points of the coreset.

    Source: Maalouf et al., the loop.
    """

    cost: float
    coreset_cost: float
    points: int


@dataclass(frozen=True, eq=False)
class AutoCoresetResult:
    """What :func:`auto_coreset` found.

    Args:
        coreset: the one whose model has the least cost on all points, of those of the loop.
        model: that model.
        loss_matrix: the loss vectors, shape ``(n, k)``: first those of the initial models, then one for each round.
        history: the rounds.
        initial_costs: costs of the initial models on all points.

    Source: Maalouf et al., the loop.
    """

    coreset: Coreset
    model: Any
    loss_matrix: Tensor
    history: list[Round]
    initial_costs: list[float]

    @property
    def num_fits(self) -> int:
        """How many times a model was fitted."""
        return len(self.initial_costs) + len(self.history)


def auto_coreset(
    n: int,
    loss_fn: Callable[[Any], Tensor],
    fit_fn: Callable[[Tensor, Tensor], Any],
    size: int,
    *,
    weights: Tensor | None = None,
    method: str = "sensitivity",
    labels: Tensor | None = None,
    by_class: bool = True,
    num_init: int = 3,
    patience: int = 5,
    max_rounds: int = 100,
    tol: float = 1e-6,
    normalize: bool = False,
    append: bool = True,
    generator: torch.Generator | None = None,
) -> AutoCoresetResult:
    r"""A coreset for the models that the solver visits: any data, any loss vector, any solver (the loop of section *The loop*).

    Args:
        n: number of points.
        loss_fn: gives a model's loss on each of the n points, *not* multiplied by the weights: a tensor or an array of shape ``(n,)``, finite, at least 0.
        fit_fn: called with indices, int64 ``(m,)``, and weights, float64 ``(m,)``, on the CPU unless ``weights`` is elsewhere; gives the model that is fitted to these points.
        size: :math:`\tau`, from 1 to n.
        weights: weights of the data, shape ``(n,)``, at least 0; None for ones.
        method: "sensitivity", "best_of_means" or "caratheodory", which reduces to ``size`` points.
        labels: int64, shape ``(n,)``: samples that lack a class, or hold it with weight 0 only, are drawn again.
        by_class: with labels, sum class by class, with the sizes of :func:`allocate_by_class`.
        num_init: models that are fitted to uniform samples first.
        patience: stop after so many rounds in a row without a lower cost; "caratheodory" stops where the columns are as many as the points of a class of the coreset, too.
        max_rounds: stop after so many rounds.
        tol: a cost counts as lower if it is by this fraction.
        normalize: divide each column by its cost before summing, so that no bad model rules the sum. Not in the paper.
        append: False keeps the initial columns only: a control, not the method.
        generator: the source of randomness; None for torch's own.

    Returns:
        The coreset, its model, the loss matrix and the history.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, losses that are negative, infinite or NaN, or samples that keep lacking a class, naming the argument.

    Complexity: one fit to ``size`` points and one evaluation of n losses for each of the k columns, and k sums of O(nk); O(nk) memory.

    Source: Maalouf et al., the AutoCoreset loop, and the official code.

    Example:
        >>> x = torch.linspace(0, 1, 101, dtype=torch.float64) ** 3
        >>> result = auto_coreset(  # the median: nothing but losses and a solver
        ...     101, lambda c: (x - c).abs(), lambda i, v: x[i][(v.cumsum(0) / v.sum() >= 0.5).nonzero()[0]], 20,
        ...     generator=torch.Generator().manual_seed(0))
        >>> abs(result.model.item() - 0.125) < 0.05, result.num_fits == result.loss_matrix.shape[1]
        (True, True)
    """
    n, size = _checks.positive_int("n", n), _checks.positive_int("size", size)
    if size > n:
        raise ValueError(f"size must be at most n, {n}, got {size}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    num_init, patience = _checks.positive_int("num_init", num_init), _checks.positive_int("patience", patience)
    max_rounds, tol = _checks.positive_int("max_rounds", max_rounds), _checks.number("tol", tol, 0, 1)
    weights = _weights(weights, n)
    num_classes = 1 if labels is None else len(_labels(labels, n).unique())
    if labels is not None and len(labels[weights > 0].unique()) < num_classes:
        raise ValueError("weights must be > 0 for a point of each class of labels, got a class of weight 0")
    sizes = torch.tensor([size]) if labels is None else allocate_by_class(labels, size)
    smallest = int(sizes.min()) if by_class else size  # Carathéodory needs a point more than there are columns
    if method == "caratheodory" and smallest <= num_init:
        raise ValueError(f"size must give each class more than num_init, {num_init}, points, got {sizes.tolist()}")

    def losses(model: Any) -> Tensor:
        vector = torch.as_tensor(loss_fn(model)).detach().to(weights.device)
        if vector.shape != (n,):
            raise ValueError(f"loss_fn must give shape ({n},), one loss for each point, got {tuple(vector.shape)}")
        if not bool((torch.isfinite(vector) & (vector >= 0)).all()):
            raise ValueError(
                f"loss_fn must give finite losses >= 0, got NaN, infinity or a least of {vector.min().item():.3g}"
            )
        return vector.double()

    def with_every_class(draw: Callable[[], Coreset], tries: int) -> Coreset:
        for _ in range(tries):
            coreset = draw()
            present = coreset.indices[coreset.weights > 0]
            if len(present if labels is None else labels[present].unique()) >= num_classes:
                return coreset
        raise ValueError(
            f"size must be large enough that a sample has weight, and every class, got {size}: {tries} samples had not"
        )

    def summation() -> Coreset:
        matrix = torch.stack(columns, 1)
        matrix = matrix / (weights @ matrix).clamp(min=torch.finfo(matrix.dtype).tiny) if normalize else matrix

        def draw(rows: Tensor, count: int) -> Coreset:
            if method == "caratheodory":
                return caratheodory(matrix[rows], weights[rows], size=count)
            sample = sensitivity_sample if method == "sensitivity" else best_of_means
            return sample(matrix[rows], count, weights=weights[rows], generator=generator)

        everything = torch.arange(n, device=weights.device)
        return draw(everything, size) if labels is None or not by_class else _by_class(labels, size, draw)

    columns = []
    for _ in range(num_init):
        sample = with_every_class(lambda: uniform_coreset(n, size, weights=weights, generator=generator), 1000)
        columns.append(losses(fit_fn(sample.indices, sample.weights)))
    initial_costs = [float(weights @ column) for column in columns]
    history, best, lowest, failures = [], None, max(initial_costs), 0
    while failures < patience and len(history) < max_rounds:
        coreset = with_every_class(summation, 1 if method == "caratheodory" else 1000)
        model = fit_fn(coreset.indices, coreset.weights)
        column = losses(model)
        cost = float(weights @ column)
        history.append(Round(cost, float(coreset.cost(column)), len(coreset)))
        if best is None or cost < best[0]:
            best = cost, coreset, model
        if append:
            columns.append(column)
        lowest, failures = (cost, 0) if cost < lowest * (1 - tol) else (lowest, failures + 1)
        if (
            method == "caratheodory" and len(columns) >= smallest
        ):  # the next sum would need more points than there may be
            break
    return AutoCoresetResult(best[1], best[2], torch.stack(columns, 1), history, initial_costs)


# ---------------------------------------------------------------------------------------------------------------------
# Ready-made problems: scikit-learn's estimators
# ---------------------------------------------------------------------------------------------------------------------


class _Problem:
    """Data, weights, a loss vector and a fit: what the loop needs."""

    def __init__(self, X: Tensor, y: Tensor | None, weights: Tensor | None):
        self.X = _checks.finite("X", _checks.floating("X", X, 2)).double()
        self.n = len(X)
        self.weights = _weights(weights, self.n)
        if y is not None:
            if not isinstance(y, Tensor):
                raise TypeError(f"y must be a tensor, got {type(y).__name__}")
            if y.shape != (self.n,):
                raise ValueError(f"y must have shape ({self.n},), one for each row of X, got {tuple(y.shape)}")
            self.y = _checks.finite("y", y.double())

    def full_cost(self, model: Any) -> float:
        """The cost :math:`F_w` of a model on all points."""
        return float(self.weights @ self.loss_vector(model))

    def fit_all(self) -> Any:
        """The model that is fitted to all points, with their weights."""
        return self.fit(torch.arange(self.n), self.weights)

    def _scores(self, model: Any) -> Tensor:
        """Scores of a linear estimator, of which only ``coef_`` and ``intercept_`` are read."""
        return torch.as_tensor(self.X.numpy() @ model.coef_.ravel() + model.intercept_)


class LogisticRegressionProblem(_Problem):
    r"""Logistic regression with an L2 penalty: scikit-learn's ``LogisticRegression``, whose penalty is spread over the points (eq-coreset-penalty).

    :math:`f_i=\frac1{2\sum w}\|\beta\|^2+C\log(1+e^{-y_i(x_i^\top\beta+b)})`, so that :math:`F_w` is scikit-learn's objective, and minimizing :math:`F_v` is its fit with
    :math:`C\sum w/\sum v` in place of :math:`C`.

    Args:
        X: features, shape ``(n, d)``, floating point, finite.
        y: labels -1 and +1, shape ``(n,)``.
        C: > 0; the larger, the weaker the penalty.
        weights: shape ``(n,)``, at least 0; None for ones.
        estimator: arguments for ``LogisticRegression``; by default ``solver="newton-cholesky"``, ``tol=1e-10``, ``max_iter=1000``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument; from ``fit`` for points of one class.

    Source: Maalouf et al., logistic regression; the split of the penalty after the official code.

    Example:
        >>> X, y = torch.tensor([[-1.0], [0.5], [1.0], [-0.5]]), torch.tensor([-1, -1, 1, 1])
        >>> problem = LogisticRegressionProblem(X, y)
        >>> round(problem.full_cost(problem.fit_all()), 4)
        2.6956
    """

    def __init__(
        self, X: Tensor, y: Tensor, *, C: float = 1.0, weights: Tensor | None = None, estimator: dict | None = None
    ):
        super().__init__(X, y, weights)
        if _checks.known_false(self.y.abs() == 1):
            raise ValueError(f"y must be -1 or +1, got {self.y.unique().tolist()[:5]}")
        self.C = _checks.positive_number("C", C)
        self.labels = self.y.long()
        self.estimator = dict(solver="newton-cholesky", tol=1e-10, max_iter=1000) | (estimator or {})

    def fit(self, indices: Tensor, weights: Tensor) -> Any:
        """A ``LogisticRegression`` that is fitted to weighted points."""
        from sklearn.linear_model import LogisticRegression

        y = self.y[indices]
        if bool((y == y[0]).all()):
            raise ValueError(f"indices must hold points of both classes, got {len(indices)} of one")
        C = self.C * float(self.weights.sum() / weights.sum())
        return LogisticRegression(C=C, **self.estimator).fit(self.X[indices].numpy(), y.numpy(), weights.numpy())

    def loss_vector(self, model: Any) -> Tensor:
        """The losses :math:`f_i` of all points, float64, shape ``(n,)``."""
        penalty = float((model.coef_**2).sum()) / (2 * float(self.weights.sum()))
        return penalty - self.C * F.logsigmoid(self.y * self._scores(model))


class LinearRegressionProblem(_Problem):
    r"""Least squares, :math:`f_i=(x_i^\top\beta+b-y_i)^2`: scikit-learn's ``LinearRegression``.

    Args:
        X: features, shape ``(n, d)``, floating point, finite.
        y: targets, shape ``(n,)``.
        weights: shape ``(n,)``, at least 0; None for ones.
        estimator: arguments for ``LinearRegression``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Source: Maalouf et al., linear regression.

    Example:
        >>> problem = LinearRegressionProblem(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([0.0, 1.0, 0.0]))
        >>> problem.loss_vector(problem.fit_all())
        tensor([0.1111, 0.4444, 0.1111], dtype=torch.float64)
    """

    def __init__(self, X: Tensor, y: Tensor, *, weights: Tensor | None = None, estimator: dict | None = None):
        super().__init__(X, y, weights)
        self.estimator = estimator or {}

    def fit(self, indices: Tensor, weights: Tensor) -> Any:
        """A ``LinearRegression`` that is fitted to weighted points."""
        from sklearn.linear_model import LinearRegression

        return LinearRegression(**self.estimator).fit(self.X[indices].numpy(), self.y[indices].numpy(), weights.numpy())

    def loss_vector(self, model: Any) -> Tensor:
        """The losses :math:`f_i` of all points, float64, shape ``(n,)``."""
        return (self._scores(model) - self.y).square()


class KMeansProblem(_Problem):
    r"""k-means, :math:`f_i=\min_c\|x_i-\mu_c\|^2`: scikit-learn's ``KMeans``. Its fits are local optima.

    Args:
        X: points, shape ``(n, d)``, floating point, finite.
        num_clusters: at least 1.
        weights: shape ``(n,)``, at least 0; None for ones.
        estimator: arguments for ``KMeans``; by default ``n_init=10``, ``random_state=0``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument; from ``fit`` for fewer points than clusters.

    Source: Maalouf et al., 2-means.

    Example:
        >>> problem = KMeansProblem(torch.tensor([[0.0], [1.0], [9.0], [10.0]]), 2)
        >>> problem.full_cost(problem.fit_all())
        1.0
    """

    def __init__(self, X: Tensor, num_clusters: int, *, weights: Tensor | None = None, estimator: dict | None = None):
        super().__init__(X, None, weights)
        self.num_clusters = _checks.positive_int("num_clusters", num_clusters)
        self.estimator = dict(n_init=10, random_state=0) | (estimator or {})

    def fit(self, indices: Tensor, weights: Tensor) -> Any:
        """A ``KMeans`` that is fitted to weighted points."""
        from sklearn.cluster import KMeans

        if len(indices) < self.num_clusters:
            raise ValueError(
                f"indices must hold at least {self.num_clusters} points, one a cluster, got {len(indices)}"
            )
        return KMeans(self.num_clusters, **self.estimator).fit(self.X[indices].numpy(), sample_weight=weights.numpy())

    def loss_vector(self, model: Any) -> Tensor:
        """The losses :math:`f_i` of all points, float64, shape ``(n,)``."""
        centers = torch.as_tensor(model.cluster_centers_)
        # By differences: squares and products lose all digits where the data are far from zero.
        return torch.cdist(self.X, centers, compute_mode="donot_use_mm_for_euclid_dist").amin(1).square()
