r"""Preference losses as programs of propositional logic.

The method of *Understanding the Logic of Direct Preference Alignment through Logic* (Richardson, Srikumar and Sabharwal, ICML 2025,
arXiv 2412.17696): preference structures, their compilation to a loss by weighted model counting, the decompilation of a loss
to its structure, the losses that have names, and the landscape of all losses with the order of entailment. Equation labels are
those of the chapter ``language/preference_logic``.

Notation: a *world* gives each of n propositions the value true or false. Proposition i is true with probability
:math:`p_i=e^{\ell_i}`, independently, and ``log_probs`` (B, n) holds :math:`\ell_i\le0`, column i for ``variables[i]``. Most
structures speak of W, "the model generates the winner", and L, "the model generates the loser". Worlds are listed from all true
to all false: TT, TF, FT, FF. Logs are natural.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING

import sympy  # comes with torch, which uses it for the shapes of compiled graphs
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Boolean, Implies, Not, Or, SOPform, Xor
from torch import Tensor

from lossbook import _checks
from lossbook.language import robust_dpo

if TYPE_CHECKING:
    import networkx

World = tuple[bool, ...]
Part = tuple[bool | None, ...]
Formula = Boolean | bool

W, L = sympy.symbols("W L")
"""The model generates the winner; the model generates the loser."""

MARKS = ("✓", "×", "B", "-")
"""A world counts above the fraction only, below it only, on both sides, or not at all."""

LINKS = ("logistic", "squared", "hinge")


def worlds(n: int) -> tuple[World, ...]:
    """All :math:`2^n` worlds, from all true to all false.

    Args:
        n: number of propositions, at least 1.

    Returns:
        A tuple of worlds, each a tuple of n bools.

    Raises:
        TypeError, ValueError: for an n that is no integer, or below 1.

    Source: Richardson et al., the truth-table notation.

    Example:
        >>> ["".join("FT"[value] for value in world) for world in worlds(2)]
        ['TT', 'TF', 'FT', 'FF']
    """
    return tuple(itertools.product((True, False), repeat=_checks.positive_int("n", n)))


# ---------------------------------------------------------------------------------------------------------------------
# Preference structures
# ---------------------------------------------------------------------------------------------------------------------


def _boolean(name: str, formula: Formula) -> Boolean:
    formula = sympy.sympify(formula)
    if not isinstance(formula, Boolean) or formula.atoms(Relational):
        raise TypeError(f"{name} must be a formula of propositional logic, got {formula!r}")
    return formula


def _satisfying(name: str, formula: Formula, variables: Sequence[sympy.Symbol]) -> frozenset[World]:
    """The worlds in which a formula is true."""
    formula = _boolean(name, formula)
    if other := formula.free_symbols - set(variables):
        raise ValueError(f"{name} must use the variables {variables} only, got {sorted(map(str, other))}")
    values = lambda world: dict(zip(variables, map(sympy.sympify, world), strict=True))
    return frozenset(world for world in worlds(len(variables)) if formula.xreplace(values(world)) == sympy.true)


def _merged(models: frozenset[World]) -> tuple[Part, ...]:
    """These worlds in fewer, disjoint parts. A part is a world with None where both values belong to it: p + (1 - p) = 1."""
    if models <= {()}:
        return tuple(models)
    yes, no = (frozenset(world[1:] for world in models if world[0] == value) for value in (True, False))
    branches = ((None, yes),) if yes == no else ((True, yes), (False, no))
    return tuple((value, *part) for value, group in branches for part in _merged(group))


@lru_cache(maxsize=4096)
def _simplest(variables: tuple[sympy.Symbol, ...], true: frozenset[World], free: frozenset[World]) -> Boolean:
    """A shortest disjunction of conjunctions that is true in these worlds, and whatever it likes in the free ones."""
    return SOPform(variables, *([[int(value) for value in world] for world in group] for group in (true, free)))


def _symbols(variables: Iterable[sympy.Symbol]) -> tuple[sympy.Symbol, ...]:
    variables = tuple(variables)
    if not variables or len(set(variables)) < len(variables):
        raise ValueError(f"variables must be distinct symbols, at least one, got {variables}")
    if not all(isinstance(variable, sympy.Symbol) for variable in variables):
        raise TypeError(f"variables must be sympy symbols, got {variables}")
    return variables


@dataclass(frozen=True)
class Structure:
    r"""A preference structure :math:`(P,P_C,P_A)`: a loss, up to its link, as three formulas (def-preference_logic-structure).

    The loss compares the weight of the worlds in which :attr:`formula` holds with the weight of those in which :attr:`negation`
    does. Two structures are the same loss if these agree, whatever their three formulas look like: see :meth:`equivalent`.

    Args:
        core: :math:`P`, what should hold; a formula of ``sympy.logic``.
        conditioning: :math:`P_C`, the worlds that count at all.
        additive: :math:`P_A`, the worlds that count on both sides.
        variables: the propositions, distinct symbols, in the order of the columns of ``log_probs``.

    Raises:
        TypeError, ValueError: for what is not a formula of these variables, naming the argument.

    Complexity: :math:`O(2^n)` evaluations of the formulas, and :math:`O(2^nn)` to merge their worlds.

    Source: Richardson et al., definition of a preference structure.

    Example:
        >>> cpo = Structure(W | ~L, W | L, W & L, variables=(W, L))
        >>> cpo.table()
        {'TT': 'B', 'TF': '✓', 'FT': '×', 'FF': '-'}
        >>> cpo.polynomials()
        (W, L)
    """

    core: Formula
    conditioning: Formula = sympy.true
    additive: Formula = sympy.false
    _: KW_ONLY
    variables: tuple[sympy.Symbol, ...]
    _above: frozenset[World] = field(init=False, repr=False, compare=False)
    _below: frozenset[World] = field(init=False, repr=False, compare=False)
    _parts: tuple[tuple[Part, ...], tuple[Part, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)  # the way into a frozen dataclass
        put("variables", _symbols(self.variables))
        names = ("core", "conditioning", "additive")
        core, counts, both = (_satisfying(name, getattr(self, name), self.variables) for name in names)
        for name in names:
            put(name, sympy.sympify(getattr(self, name)))
        put("_above", (core | both) & counts)
        put("_below", (frozenset(worlds(len(self.variables))) - core | both) & counts)
        put("_parts", (_merged(self._above), _merged(self._below)))

    @property
    def formula(self) -> Boolean:
        r"""The formula form :math:`(P\vee P_A)\wedge P_C` (eq-preference_logic-forms): what counts above the fraction."""
        return And(Or(self.core, self.additive), self.conditioning)

    @property
    def negation(self) -> Boolean:
        r"""The negated form :math:`(\neg P\vee P_A)\wedge P_C` (eq-preference_logic-forms): what counts below the fraction."""
        return And(Or(Not(self.core), self.additive), self.conditioning)

    @classmethod
    def from_pair(cls, p1: Formula, p2: Formula, *, variables: Iterable[sympy.Symbol] = (W, L)) -> "Structure":
        r"""The structure whose forms are two given formulas, by the implication construction (eq-preference_logic-implication).

        :math:`P=P_2\to P_1`, :math:`P_C=P_1\vee P_2`, :math:`P_A=P_1\wedge P_2`.

        Example:
            >>> Structure.from_pair(W, L).core
            Implies(L, W)
        """
        p1, p2 = _boolean("p1", p1), _boolean("p2", p2)
        return cls(Implies(p2, p1), Or(p1, p2), And(p1, p2), variables=variables)

    @classmethod
    def from_models(
        cls,
        formula_models: Iterable[Sequence[bool]],
        negation_models: Iterable[Sequence[bool]],
        variables: Iterable[sympy.Symbol] = (W, L),
    ) -> "Structure":
        r"""The structure of two sets of worlds, in shortest formulas: :math:`P` and :math:`P_A` are free where they do not matter.

        Example:
            >>> Structure.from_models([(1, 0)], [(0, 1)]).conditioning == (W & ~L) | (L & ~W)
            True
        """
        variables = _symbols(variables)
        everything = frozenset(worlds(len(variables)))
        above, below = (frozenset(map(tuple, group)) for group in (formula_models, negation_models))
        for name, group in (("formula_models", above), ("negation_models", below)):
            if not group <= everything:
                raise ValueError(
                    f"{name} must hold worlds of {len(variables)} values, true or false, got {sorted(group - everything)}"
                )
        # A world may have come as zeros and ones: take its equal of bools.
        above, below = (frozenset(world for world in everything if world in group) for group in (above, below))
        outside = everything - (above | below)
        return cls(
            _simplest(variables, above - below, outside | (above & below)),
            _simplest(variables, above | below, frozenset()),
            _simplest(variables, above & below, outside),
            variables=variables,
        )

    @classmethod
    def from_table(
        cls, marks: Sequence[str] | Mapping[str, str], variables: Iterable[sympy.Symbol] = (W, L)
    ) -> "Structure":
        """The structure of one mark of :data:`MARKS` for each world, in the order of :func:`worlds`; inverse of :meth:`table`.

        Example:
            >>> Structure.from_table("B✓×-").equivalent(NAMED["CPO"])
            True
        """
        variables = _symbols(variables)
        marks = list(marks.values() if isinstance(marks, Mapping) else marks)
        if len(marks) != 2 ** len(variables) or not set(marks) <= set(MARKS):
            raise ValueError(f"marks must be {2 ** len(variables)} of {MARKS}, got {marks}")
        pairs = list(zip(worlds(len(variables)), marks, strict=True))
        return cls.from_models([w for w, m in pairs if m in "✓B"], [w for w, m in pairs if m in "×B"], variables)

    def models(self) -> tuple[tuple[World, ...], tuple[World, ...]]:
        """The worlds of the formula form and those of the negated form, each in the order of :func:`worlds`."""
        return tuple(tuple(sorted(group, reverse=True)) for group in (self._above, self._below))

    def table(self) -> dict[str, str]:
        """The mark of each world, written as a word over T and F."""
        sides = {(True, False): "✓", (False, True): "×", (True, True): "B", (False, False): "-"}
        everything = worlds(len(self.variables))
        return {"".join("FT"[x] for x in w): sides[w in self._above, w in self._below] for w in everything}

    def polynomials(self) -> tuple[sympy.Expr, sympy.Expr]:
        r"""Both weighted model counts as polynomials, in which a symbol stands for its probability (eq-preference_logic-wmc).

        Example:
            >>> NAMED["cCPO"].polynomials()
            (W, -L*(W - 1))
        """
        return tuple(_polynomial(group, self.variables) for group in self.models())

    def simplified(self) -> "Structure":
        """An equivalent structure with shortest formulas."""
        return Structure.from_models(*self.models(), self.variables)

    def equivalent(self, other: "Structure") -> bool:
        """Whether both are the same loss: the same variables, and the same worlds above and below."""
        return self.variables == other.variables and self.models() == other.models()

    def entails(self, other: "Structure") -> bool:
        r"""Whether :math:`\overline P\sqsubseteq\overline P'` (eq-preference_logic-order): the formula of this one entails that of
        ``other``, and the negated form of ``other`` that of this one. Then the loss is at least as large, everywhere."""
        if not isinstance(other, Structure):
            raise TypeError(f"other must be a Structure, got {type(other).__name__}")
        if self.variables != other.variables:
            raise ValueError(f"other must have the variables {self.variables}, got {other.variables}")
        return self._above <= other._above and other._below <= self._below

    def swapped(self) -> "Structure":
        """The loss of the swapped pair: every two columns, of winner and of loser, exchanged."""
        order = _swap(self)
        return Structure.from_models(
            *([[w[i] for i in order] for w in group] for group in self.models()), self.variables
        )

    def antisymmetric(self) -> bool:
        r"""Whether :math:`\rho` changes its sign when winner and loser are swapped: then it is a logit of the preference."""
        return self.models() == self.swapped().models()[::-1]

    def with_reference(self) -> "Structure":
        r"""The structure of :math:`\rho_\theta-\rho_{\rm ref}` (eq-preference_logic-reference): a twin of each variable, for the reference.

        Example:
            >>> NAMED["CPO"].with_reference().equivalent(NAMED["DPO"])
            True
        """
        twins = [sympy.Symbol(f"{variable.name}_r") for variable in self.variables]
        renamed = dict(zip(self.variables, twins, strict=True))
        of_reference = (self.negation.xreplace(renamed), self.formula.xreplace(renamed))
        pair = (And(*both) for both in zip((self.formula, self.negation), of_reference, strict=True))
        return Structure.from_pair(*pair, variables=(*self.variables, *twins))


def _swap(structure: Structure) -> list[int]:
    """The order of the columns in which winner and loser change places."""
    n = len(structure.variables)
    if n % 2:
        raise ValueError(f"structure must have winner and loser in turn, an even number of variables, got {n}")
    return [i ^ 1 for i in range(n)]


def _polynomial(models: Iterable[World], variables: Sequence[sympy.Symbol]) -> sympy.Expr:
    weight = lambda world: sympy.Mul(*(x if true else 1 - x for x, true in zip(variables, world, strict=True)))
    return sympy.factor(sympy.Add(*map(weight, models)))


# ---------------------------------------------------------------------------------------------------------------------
# Compilation: from a structure to a loss
# ---------------------------------------------------------------------------------------------------------------------


def log1mexp(x: Tensor) -> Tensor:
    r""":math:`\log(1-e^x)` for :math:`x<0`, with all its digits, and its gradient, at both ends (eq-preference_logic-log1mexp).

    Args:
        x: floating point, any shape, below 0.

    Returns:
        The shape of ``x``.

    Source: Maechler 2012, the two branches.

    Example:
        >>> log1mexp(torch.tensor([-1e-6, -30.0]))
        tensor([-1.3816e+01, -9.3576e-14])
    """
    near = x > -math.log(2)
    near_zero = torch.log(-torch.expm1(x))
    # Where this branch is not taken, its gradient may be infinite, and 0 times infinity is NaN: evaluate it at -1.
    far_below = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, near_zero, far_below)


LARGEST = -1e-7
r"""Larger log-probabilities are taken as this one, so that :math:`\log(1-p)` is finite."""


def _log_probs(log_probs: Tensor, n: int) -> Tensor:
    """Log-probabilities of n propositions, in float32 or wider."""
    _checks.finite("log_probs", _checks.floating("log_probs", log_probs, 2))
    if log_probs.shape[1] != n:
        raise ValueError(
            f"log_probs must have shape (B, {n}), a column for each variable, got {tuple(log_probs.shape)}"
        )
    if _checks.known_false(log_probs <= 0):
        raise ValueError(f"log_probs must be at most 0, got {log_probs.max().item():g}")
    return _checks.wide(log_probs).clamp(max=LARGEST)


def log_weighted_model_count(models: Tensor, log_probs: Tensor) -> Tensor:
    r"""Logarithm of the weighted model count, :math:`\log\sum_{v\models\varphi}\prod_ip_i^{v_i}(1-p_i)^{1-v_i}` (eq-preference_logic-wmc).

    Args:
        models: the worlds in which the formula holds, bool, shape ``(m, n)``; none for m = 0.
        log_probs: :math:`\log p_i\le0`, shape ``(B, n)``, floating point, finite; above ``LARGEST`` taken as that.

    Returns:
        Shape ``(B,)``, at most 0, up to rounding; :math:`-\infty` for m = 0. float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape or range, naming the argument.

    Complexity: O(Bmn) time and memory.

    Source: Richardson et al., weighted model counting; Xu et al. 2018 (semantic loss).

    Example:
        >>> only_winner = torch.tensor([[True, False]])
        >>> log_weighted_model_count(only_winner, torch.tensor([[0.3, 0.6]]).log()).exp()
        tensor([0.1200])
    """
    if not isinstance(models, Tensor) or models.dtype != torch.bool:
        raise TypeError(f"models must be a boolean tensor, got {getattr(models, 'dtype', type(models).__name__)}")
    if models.ndim != 2 or models.shape[1] == 0:
        raise ValueError(f"models must have shape (m, n) with n > 0, got {tuple(models.shape)}")
    log_p = _log_probs(log_probs, models.shape[1])
    if len(models) == 0:
        return log_p.new_full((len(log_p),), -torch.inf)
    return torch.logsumexp(_log_weights(models.to(log_p.device), log_p, log1mexp(log_p)), dim=0)


def _log_weights(models: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Logarithms of the weights of m worlds, (m, B): long rows, which are quick to sum; ``log_q`` is log(1 - p)."""
    # A choice, not a product with 0 and 1: that would meet 0 times a number that is out of range.
    return torch.where(models[..., None], log_p.T.contiguous(), log_q.T.contiguous()).sum(1)


def _log_count(parts: tuple[Part, ...], log_p: Sequence[Tensor], log_q: Mapping[int, Tensor]) -> Tensor:
    """Logarithm of the weight of all these parts, (B,)."""
    weights = []
    for part in parts:
        factors = [log_p[i] if true else log_q[i] for i, true in enumerate(part) if true is not None]
        weights.append(sum(factors[1:], start=factors[0]) if factors else 0 * log_p[0])  # log 1, in the graph
    return torch.logsumexp(torch.stack(weights), dim=0) if len(weights) > 1 else weights[0]


def _both_forms(structure: Structure) -> tuple[frozenset[World], frozenset[World]]:
    """The worlds of both forms; each form must have one."""
    if not isinstance(structure, Structure):
        raise TypeError(f"structure must be a Structure, got {type(structure).__name__}")
    for name, group in (("formula", structure._above), ("negation", structure._below)):
        if not group:
            raise ValueError(
                f"structure must have satisfiable forms, got no world for its {name}: the ratio is 0 or infinite"
            )
    return structure._above, structure._below


def semantic_log_ratio(structure: Structure, log_probs: Tensor) -> Tensor:
    r"""What the loss wants large, :math:`\rho_{sem}=\log\frac{\mathrm{WMC}(\overline P_f)}{\mathrm{WMC}(\overline P_{\neg f})}` (eq-preference_logic-ratio).

    Args:
        structure: whose forms are both satisfiable.
        log_probs: shape ``(B, n)``, floating point, finite, at most 0; column i belongs to ``structure.variables[i]``.

    Returns:
        Shape ``(B,)``, float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape or range, or a form that no world satisfies.

    Complexity: O(Bkn) time and memory for forms of k parts; worlds that differ in one proposition are one part, so that k is at
    most their number, and 1 for each form of CPO, ORPO and DPO.

    Source: Richardson et al., the generalized semantic loss.

    Example:
        >>> log_probs = torch.tensor([[0.3, 0.6]]).log()
        >>> semantic_log_ratio(NAMED["CPO"], log_probs), semantic_log_ratio(NAMED["unCPO"], log_probs)
        (tensor([-0.6931]), tensor([0.3228]))
    """
    _both_forms(structure)
    above, below = structure._parts
    log_p = _log_probs(log_probs, len(structure.variables)).unbind(1)
    negated = {i for part in above + below for i, true in enumerate(part) if true is False}
    log_q = {i: log1mexp(log_p[i]) for i in negated}
    return _log_count(above, log_p, log_q) - _log_count(below, log_p, log_q)


def _link(log_ratio: Tensor, link: str, beta: float, reduction: str) -> Tensor:
    beta = _checks.positive_number("beta", beta)
    if link not in LINKS:
        raise ValueError(f"link must be one of {LINKS}, got {link!r}")
    if link == "logistic":
        return robust_dpo.preference_loss(beta * log_ratio, reduction=reduction)
    target = 1 / (2 * beta) if link == "squared" else beta
    return robust_dpo.preference_loss(log_ratio, base=link, target=target, reduction=reduction)


def preference_loss(
    structure: Structure, log_probs: Tensor, *, link: str = "logistic", beta: float = 1.0, reduction: str = "mean"
) -> Tensor:
    r"""The loss of a preference structure, :math:`f(\rho_{sem},\beta)` (eq-preference_logic-links).

    Logistic :math:`-\log\sigma(\beta\rho)`, squared :math:`(\rho-\frac1{2\beta})^2`, hinge :math:`\max(0,\beta-\rho)`.

    Args:
        structure, log_probs: as in :func:`semantic_log_ratio`.
        link: "logistic" (DPO, CPO, ORPO), "squared" (IPO) or "hinge" (SLiC).
        beta: :math:`\beta>0`.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        Shape ``()``, or ``(B,)`` with reduction "none"; float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape, range, link or reduction, or a form that no world satisfies.

    Complexity: as :func:`semantic_log_ratio`.

    Source: Richardson et al., the generalized semantic loss and its links.

    Example:
        >>> preference_loss(NAMED["CE"], torch.tensor([[0.3, 0.6]]).log())  # -log 0.3
        tensor(1.2040)
    """
    return _link(semantic_log_ratio(structure, log_probs), link, beta, reduction)


def log_ratio_gradient(structure: Structure, log_probs: Tensor) -> Tensor:
    r"""The gradient of :math:`\rho_{sem}` in each log-probability, as a difference of posteriors (eq-preference_logic-gradient).

    :math:`\frac{\partial\rho}{\partial\log p_i}=\frac{\Pr(\neg X_i\mid\overline P_{\neg f})-\Pr(\neg X_i\mid\overline P_f)}{1-p_i}`. Times
    :math:`\beta\sigma(-\beta\rho)` it is the weight of :math:`\nabla_\theta\log p_i` in a step that lowers the logistic loss.

    Args:
        structure, log_probs: as in :func:`semantic_log_ratio`.

    Returns:
        Shape ``(B, n)``, float32 or wider.

    Raises:
        TypeError, ValueError: as :func:`semantic_log_ratio`.

    Complexity: O(Bmn) time and memory for m worlds in both forms.

    Source: derived in the chapter.

    Example:
        >>> log_ratio_gradient(NAMED["ORPO"], torch.tensor([[0.5, 0.2]]).log())  # 1 / (1 - p) for both
        tensor([[ 2.0000, -1.2500]])
    """
    above, below = _both_forms(structure)
    log_p = _log_probs(log_probs, len(structure.variables))
    log_q = log1mexp(log_p)

    def lifted(group: frozenset[World]) -> Tensor:
        """Pr(not X_i | group) / Pr(not X_i)."""
        models = torch.tensor(sorted(group), device=log_p.device)
        posterior = torch.log_softmax(_log_weights(models, log_p, log_q), dim=0)[:, None] - log_q.T
        return torch.where(models[..., None], -torch.inf, posterior).exp().sum(0).T

    return lifted(below) - lifted(above)


def population_loss(
    structure: Structure,
    log_probs: Tensor,
    preference: float | Tensor,
    *,
    noise_rate: float = 0.0,
    link: str = "logistic",
    beta: float = 1.0,
) -> Tensor:
    r"""The expected loss of a pair of which the first wins with probability :math:`q`, and labels flip (eq-preference_logic-population).

    :math:`\tilde q\,f(\rho(p_1,p_2))+(1-\tilde q)\,f(\rho(p_2,p_1))` with :math:`\tilde q=(1-2\varepsilon)q+\varepsilon`.

    Args:
        structure: with an even number of variables, winner and loser in turn.
        log_probs: shape ``(B, n)``: first and second response, and, with a reference, the reference's for both.
        preference: :math:`q\in[0,1]`, a number, or a tensor of shape ``(B,)``.
        noise_rate: :math:`\varepsilon\in[0,\frac12]`, the share of labels that are swapped.
        link, beta: as in :func:`preference_loss`.

    Returns:
        Shape ``(B,)``, float32 or wider.

    Raises:
        TypeError, ValueError: as :func:`preference_loss`, or for a preference or a noise rate out of range.

    Complexity: twice :func:`semantic_log_ratio`.

    Source: derived in the chapter.

    Example:
        >>> log_probs = torch.tensor([[0.8, 0.2]]).log()  # where the loss of CEUnl is smallest, for q = 0.8
        >>> population_loss(NAMED["CEUnl"], log_probs, 0.8)
        tensor([1.0008])
    """
    first = preference_loss(structure, log_probs, link=link, beta=beta, reduction="none")
    second = preference_loss(structure, log_probs[:, _swap(structure)], link=link, beta=beta, reduction="none")
    if not isinstance(preference, Tensor):
        preference = _checks.number("preference", preference, 0, 1)
    elif preference.shape != first.shape:
        raise ValueError(
            f"preference must be a number or have shape {tuple(first.shape)}, got {tuple(preference.shape)}"
        )
    elif _checks.known_false((preference >= 0) & (preference <= 1)):
        raise ValueError("preference must lie in [0, 1]")
    noise_rate = _checks.number("noise_rate", noise_rate, 0, 0.5)
    seen = (1 - 2 * noise_rate) * preference + noise_rate
    return seen * first + (1 - seen) * second


# ---------------------------------------------------------------------------------------------------------------------
# Decompilation: from a loss to its structure
# ---------------------------------------------------------------------------------------------------------------------


def decompile(
    numerator: sympy.Expr | int, denominator: sympy.Expr | int, variables: Iterable[sympy.Symbol] = (W, L)
) -> Structure:
    r"""The preference structure of :math:`\rho=\log\frac{\rm numerator}{\rm denominator}` (alg-preference_logic-decompile).

    A polynomial is the weighted model count of a formula if and only if it is multilinear and its value at each vertex of the
    cube is 0 or 1; the formula holds where it is 1 (thm-preference_logic-vertices). Both formulas go through the implication
    construction.

    Args:
        numerator, denominator: polynomials in the variables; a symbol stands for the probability of its proposition.
        variables: the propositions, in the order of the columns of ``log_probs``.

    Returns:
        The structure, with its formulas as short as those of numerator and denominator allow.

    Raises:
        ValueError: for what is no polynomial of these variables, for a variable with an exponent above 1 (naming the monomial), or
            for a value at a vertex other than 0 and 1 (naming the vertex).

    Complexity: :math:`O(2^n)` evaluations; the shortest formula is NP-hard to find, and quick for n up to 4.

    Source: Richardson et al., the decompilation algorithm; the criterion is derived in the chapter.

    Example:
        >>> orpo = decompile(W * (1 - L), L * (1 - W))
        >>> orpo.table()
        {'TT': '-', 'TF': '✓', 'FT': '×', 'FF': '-'}
    """
    variables = _symbols(variables)
    pair = (_formula("numerator", numerator, variables), _formula("denominator", denominator, variables))
    return Structure.from_pair(*pair, variables=variables)


def _formula(name: str, expression: sympy.Expr | int, variables: tuple[sympy.Symbol, ...]) -> Boolean:
    """The formula whose weighted model count a polynomial is."""
    expression = sympy.sympify(expression)
    try:
        polynomial = sympy.Poly(expression, *variables)
    except (sympy.PolynomialError, sympy.CoercionFailed) as error:
        raise ValueError(f"{name} must be a polynomial in {variables}, got {expression}") from error
    if other := polynomial.free_symbols_in_domain:
        raise ValueError(f"{name} must use the variables {variables} only, got {sorted(map(str, other))}")
    for powers, _ in polynomial.terms():
        if max(powers) > 1:
            monomial = sympy.Mul(*(x**power for x, power in zip(variables, powers, strict=True)))
            raise ValueError(f"{name} must have no variable with an exponent above 1, got the monomial {monomial}")
    true = []
    for world in worlds(len(variables)):
        value = polynomial(*map(int, world))
        if value not in (0, 1):
            vertex = ", ".join(f"{x} = {int(v)}" for x, v in zip(variables, world, strict=True))
            raise ValueError(f"{name} must be 0 or 1 at each vertex, got {value} at {vertex}")
        if value == 1:
            true.append(world)
    return _simplest(variables, frozenset(true), frozenset())


# ---------------------------------------------------------------------------------------------------------------------
# The losses that have names
# ---------------------------------------------------------------------------------------------------------------------

_W_R, _L_R = sympy.symbols("W_r L_r")
_not_both, _either, _imp = Not(And(W, L)), Or(W, L), Implies(L, W)

NAMED: Mapping[str, Structure] = MappingProxyType(
    {
        "CE": Structure(W, variables=(W, L)),
        "CEUnl": Structure(And(W, Not(L)), variables=(W, L)),
        "CPO": Structure(_imp, _either, And(W, L), variables=(W, L)),
        "ORPO": Structure(_imp, Xor(W, L), variables=(W, L)),
        "unCPO": Structure(_imp, variables=(W, L)),
        "cCPO": Structure(_imp, _either, variables=(W, L)),
        "cUNL": Structure(And(W, Not(L)), _either, variables=(W, L)),
        "fUNL": Structure(Not(L), variables=(W, L)),
        "cfUNL": Structure(Not(L), _not_both, variables=(W, L)),
        "qfUNL": Structure(And(W, Not(L)), _not_both, variables=(W, L)),
        "DPO": Structure.from_pair(And(W, _L_R), And(L, _W_R), variables=(W, L, _W_R, _L_R)),
    }
)
"""The structures of the losses in the chapter's dictionary, in its order. All speak of (W, L), and DPO of a reference, too."""

LOSSES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {name: (name, "logistic") for name in NAMED} | {"IPO": ("DPO", "squared"), "SLiC": ("CPO", "hinge")}
)
"""Each named loss as its structure, a key of :data:`NAMED`, and its link, one of :data:`LINKS`."""


def _same(names: Sequence[str], *columns: Tensor) -> list[Tensor]:
    """The columns, of one shape and dtype and finite, in float32 or wider."""
    _checks.floating(names[0], columns[0], 1)
    for name, column in zip(names, columns, strict=True):
        _checks.finite(name, _checks.like(name, column, names[0], columns[0], 1))
    return [_checks.wide(column) for column in columns]


def cpo_log_ratio(log_p_w: Tensor, log_p_l: Tensor) -> Tensor:
    r""":math:`\log\frac{p_w}{p_l}`, written out: the peer of ``NAMED["CPO"]``.

    Args:
        log_p_w, log_p_l: log-probabilities of winner and loser, shape ``(B,)``, floating point, finite.

    Returns:
        Shape ``(B,)``, float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape or range, naming the argument.

    Source: Xu et al. 2024 (CPO).

    Example:
        >>> cpo_log_ratio(torch.tensor([-1.0]), torch.tensor([-3.0]))
        tensor([2.])
    """
    log_p_w, log_p_l = _same(("log_p_w", "log_p_l"), log_p_w, log_p_l)
    return log_p_w - log_p_l


def orpo_log_ratio(log_p_w: Tensor, log_p_l: Tensor) -> Tensor:
    r""":math:`\log\frac{p_w(1-p_l)}{p_l(1-p_w)}`, the log odds ratio: the peer of ``NAMED["ORPO"]``.

    Args:
        log_p_w, log_p_l: log-probabilities of winner and loser, shape ``(B,)``, floating point, finite, below 0.

    Returns:
        Shape ``(B,)``, float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape or range, naming the argument.

    Source: Hong et al. 2024 (ORPO).

    Example:
        >>> orpo_log_ratio(torch.tensor([0.8]).log(), torch.tensor([0.5]).log())  # log(4 / 1)
        tensor([1.3863])
    """
    log_p_w, log_p_l = _same(("log_p_w", "log_p_l"), log_p_w, log_p_l)
    if _checks.known_false((log_p_w < 0) & (log_p_l < 0)):
        raise ValueError("log_p_w and log_p_l must be below 0")
    return log_p_w - log_p_l - log1mexp(log_p_w) + log1mexp(log_p_l)


def dpo_log_ratio(log_p_w: Tensor, log_p_l: Tensor, ref_log_p_w: Tensor, ref_log_p_l: Tensor) -> Tensor:
    r""":math:`\log\frac{p_w}{p_l}-\log\frac{p_w^{\rm ref}}{p_l^{\rm ref}}`: the peer of ``NAMED["DPO"]``.

    Args:
        log_p_w, log_p_l: the model's log-probabilities of winner and loser, shape ``(B,)``, floating point, finite.
        ref_log_p_w, ref_log_p_l: those of the reference.

    Returns:
        Shape ``(B,)``, float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape or range, naming the argument.

    Source: Rafailov et al. 2023 (DPO).

    Example:
        >>> dpo_log_ratio(*torch.tensor([[-1.0], [-3.0], [-2.0], [-2.5]]))
        tensor([1.5000])
    """
    names = ("log_p_w", "log_p_l", "ref_log_p_w", "ref_log_p_l")
    return robust_dpo.preference_margin(*_same(names, log_p_w, log_p_l, ref_log_p_w, ref_log_p_l), beta=1.0)


def simpo_log_ratio(
    log_p_w: Tensor, log_p_l: Tensor, length_w: Tensor, length_l: Tensor, *, margin: float = 0.0
) -> Tensor:
    r""":math:`\frac{\log p_w}{|y_w|}-\frac{\log p_l}{|y_l|}-\gamma`: CPO of length-normalized probabilities, with a margin.

    The margin is the log ratio of a reference set by hand (eq-preference_logic-simpo).

    Args:
        log_p_w, log_p_l: log-probabilities of whole responses, shape ``(B,)``, floating point.
        length_w, length_l: tokens of the responses, shape ``(B,)``, at least 1.
        margin: :math:`\gamma`, in units of :math:`\rho`; SimPO's own margin divided by its :math:`\beta`.

    Returns:
        Shape ``(B,)``, float32 or wider.

    Raises:
        TypeError, ValueError: for a wrong type, shape or length, naming the argument.

    Source: Meng et al. 2024 (SimPO).

    Example:
        >>> simpo_log_ratio(*torch.tensor([[-4.0], [-9.0], [4.0], [3.0]]), margin=0.5)
        tensor([1.5000])
    """
    log_p_w, log_p_l = _same(("log_p_w", "log_p_l"), log_p_w, log_p_l)
    for name, length in (("length_w", length_w), ("length_l", length_l)):
        if not isinstance(length, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(length).__name__}")
        if length.shape != log_p_w.shape:
            raise ValueError(
                f"{name} must have the shape of log_p_w, {tuple(log_p_w.shape)}, got {tuple(length.shape)}"
            )
        if _checks.known_false(length >= 1):
            raise ValueError(f"{name} must be at least 1, got {length.min()}")
    return log_p_w / length_w - log_p_l / length_l - _checks.number("margin", margin)


# ---------------------------------------------------------------------------------------------------------------------
# The landscape
# ---------------------------------------------------------------------------------------------------------------------


def enumerate_structures(n: int = 2, *, sensible: bool = False) -> list[Structure]:
    r"""All :math:`4^{2^n}` structures of n propositions, up to equivalence: one mark for each world (eq-preference_logic-count).

    Args:
        n: 1 (W alone) or 2 (W and L).
        sensible: with n = 2, only the 16 in which the world TF counts above and FT below.

    Returns:
        Structures in shortest formulas, in the order of their tables.

    Raises:
        TypeError, ValueError: for another n, or ``sensible`` with n = 1.

    Source: Richardson et al., the number of losses; the 16 are the chapter's.

    Example:
        >>> len(enumerate_structures(1)), len(enumerate_structures(sensible=True))
        (16, 16)
    """
    if _checks.positive_int("n", n) > 2:
        raise ValueError(f"n must be 1 or 2, got {n}: three propositions have 65536 structures")
    if sensible and n != 2:
        raise ValueError(f"sensible must be False for n = {n}: it speaks of a winner and a loser")
    choices = (MARKS, "✓", "×", MARKS) if sensible else (MARKS,) * 2**n
    return [Structure.from_table(marks, (W, L)[:n]) for marks in itertools.product(*choices)]


def is_monotone(structure: Structure, *, strict: bool = False) -> bool:
    r"""Whether :math:`\partial\rho/\partial p_w\ge0\ge\partial\rho/\partial p_l` on the whole square, decided exactly (eq-preference_logic-sign).

    Args:
        structure: of (W, L), with satisfiable forms.
        strict: ask for strict signs, inside of the square.

    Returns:
        A bool; true, unless ``strict``, also for a :math:`\rho` that is constant.

    Raises:
        TypeError, ValueError: for another number of variables, or a form that no world satisfies.

    Complexity: O(1).

    Source: derived in the chapter.

    Example:
        >>> is_monotone(NAMED["CE"]), is_monotone(NAMED["CE"], strict=True)  # it ignores the loser
        (True, False)
    """
    _both_forms(structure)
    if len(structure.variables) != 2:
        raise ValueError(f"structure must have two variables, winner and loser, got {structure.variables}")

    def fine(column: int, sign: int) -> bool:
        """Whether the derivative in one probability has this sign, or is zero, for all values x of the other one."""

        def line(group: frozenset[World], own: bool) -> tuple[int, int]:
            """A count at p = 1 or p = 0 is linear in x: its value at 0, and its slope."""
            at_0, at_1 = ((own, x) in group if column == 0 else (x, own) in group for x in (False, True))
            return int(at_0), at_1 - at_0

        (n1, dn1), (n0, dn0) = (line(structure._above, own) for own in (True, False))
        (d1, dd1), (d0, dd0) = (line(structure._below, own) for own in (True, False))
        # The derivative of log(N / D) has the sign of N1 D0 - N0 D1, a quadratic in x.
        quadratic = (n1 * d0 - n0 * d1, n1 * dd0 + dn1 * d0 - n0 * dd1 - dn0 * d1, dn1 * dd0 - dn0 * dd1)
        return _nonnegative(*(sign * c for c in quadratic), strict)

    return fine(0, 1) and fine(1, -1)


def _nonnegative(c0: int, c1: int, c2: int, strict: bool) -> bool:
    """Whether c0 + c1 x + c2 x^2 is at least 0 on [0, 1], or above 0 inside of it; in whole numbers."""
    if c0 < 0 or c0 + c1 + c2 < 0:
        return False
    if c2 > 0 and 0 < -c1 < 2 * c2:  # the vertex lies inside
        least = 4 * c0 * c2 - c1 * c1
        return least > 0 if strict else least >= 0
    return not strict or (c0, c1, c2) != (0, 0, 0)


def entailment_graph(structures: Iterable[Structure]) -> "networkx.DiGraph":
    r"""The order of entailment as a graph of its covering pairs: an edge from each structure to those right above it (eq-preference_logic-order).

    Args:
        structures: of the same variables, no two equivalent.

    Returns:
        A directed graph without cycles whose nodes are the structures; a path from one to another means :meth:`Structure.entails`.

    Raises:
        TypeError, ValueError: for what is no structure, structures of different variables, or two that are equivalent.

    Complexity: :math:`O(s^2)` comparisons for s structures, and a transitive reduction.

    Source: Richardson et al., the lattice of losses.

    Example:
        >>> entailment_graph(enumerate_structures(sensible=True)).number_of_edges()
        32
    """
    import networkx

    structures = list(structures)
    if not all(isinstance(structure, Structure) for structure in structures):
        raise TypeError(f"structures must be Structure objects, got {structures}")
    if len({structure.models() for structure in structures}) < len(structures):
        raise ValueError("structures must not hold two that are equivalent")
    graph = networkx.DiGraph()
    graph.add_nodes_from(structures)
    graph.add_edges_from((a, b) for a, b in itertools.permutations(structures, 2) if a.entails(b))
    covering = networkx.transitive_reduction(graph)  # its order changes from run to run
    graph.remove_edges_from([edge for edge in graph.edges if not covering.has_edge(*edge)])
    return graph
