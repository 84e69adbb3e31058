"""Preference structures against brute force over worlds, the dictionary against closed forms, and the theorems of the chapter as properties."""

import itertools
import math
from fractions import Fraction

import networkx
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import false, true
from sympy.logic.boolalg import And, Equivalent, Implies, Not, Or, Xor

from lossbook.language import preference_logic as P
from lossbook.language.preference_logic import L, Structure, W

DOUBLE = torch.float64
X3 = sympy.symbols("X1:4")
X4 = sympy.symbols("X1:5")
W_R, L_R = sympy.symbols("W_r L_r")
ALL = P.enumerate_structures()
SENSIBLE = P.enumerate_structures(sensible=True)
BOTH = [s for s in ALL if all(s.models())]  # both forms are satisfiable
named_pairs = [name for name in P.NAMED if name != "DPO"]


def log1m(x):
    return torch.log(-torch.expm1(x))


CLOSED = {
    "CE": lambda w, l: w - log1m(w),
    "CEUnl": lambda w, l: w + log1m(l) - log1m(w + log1m(l)),
    "CPO": lambda w, l: w - l,
    "ORPO": lambda w, l: w - log1m(w) - l + log1m(l),
    "unCPO": lambda w, l: torch.log(1 - l.exp() + (w + l).exp()) - l - log1m(w),
    "cCPO": lambda w, l: w - l - log1m(w),
    "cUNL": lambda w, l: w + log1m(l) - l,
    "fUNL": lambda w, l: log1m(l) - l,
    "cfUNL": lambda w, l: log1m(l) - l - log1m(w),
    "qfUNL": lambda w, l: w + log1m(l) - log1m(w),
    "DPO": lambda w, l, wr, lr: (w - l) - (wr - lr),
}
TABLES = {
    "CE": "✓✓××", "CEUnl": "×✓××", "CPO": "B✓×-", "ORPO": "-✓×-", "unCPO": "✓✓×✓", "cCPO": "✓✓×-", "cUNL": "×✓×-",
    "fUNL": "×✓×✓", "cfUNL": "-✓×✓", "qfUNL": "-✓××",
}  # fmt: skip


def marks(structure):
    return "".join(structure.table().values())


def uniform(rows, n, low=-12.0, high=-1e-4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(rows, n, generator=generator, dtype=DOUBLE)


def count(models, p):
    """The weighted model count, world by world."""
    return sum(math.prod(q if v else 1 - q for q, v in zip(p, world, strict=True)) for world in models)


def holds(formula, variables, world):
    return formula.subs(dict(zip(variables, world, strict=True))) == True  # noqa: E712


def random_formula(draw, variables, depth=3):
    kind = draw(st.sampled_from(["leaf", "leaf", "not", "and", "or", "implies", "xor", "iff"])) if depth else "leaf"
    if kind == "leaf":
        return draw(st.sampled_from([*variables, true, false]))
    parts = [random_formula(draw, variables, depth - 1) for _ in range(1 if kind == "not" else 2)]
    return {"not": Not, "and": And, "or": Or, "implies": Implies, "xor": Xor, "iff": Equivalent}[kind](*parts)


@st.composite
def formulas(draw, most=3, number=2):
    variables = sympy.symbols(f"X1:{draw(st.integers(1, most)) + 1}")
    return variables, [random_formula(draw, variables) for _ in range(number)]


probabilities = st.floats(0.001, 0.999)


# ---- weighted model counts -----------------------------------------------------------------------------------------


def test_counts_by_hand():
    log_probs = torch.tensor([[0.3, 0.6]], dtype=DOUBLE).log()
    for formula, wanted in ((And(W, Not(L)), 0.12), (Implies(L, W), 0.58), (true, 1.0), (Xor(W, L), 0.54)):
        models = torch.tensor(Structure(formula, variables=(W, L)).models()[0])
        assert P.log_weighted_model_count(models, log_probs).exp().item() == pytest.approx(wanted, abs=1e-12)
    nothing = torch.zeros(0, 2, dtype=torch.bool)
    assert P.log_weighted_model_count(nothing, log_probs.expand(3, 2)).tolist() == [-math.inf] * 3


@settings(deadline=None, max_examples=60)
@given(formulas(most=4, number=1), st.lists(probabilities, min_size=4, max_size=4))
def test_counts_are_sums_over_worlds(drawn, p):
    variables, (formula,) = drawn
    n = len(variables)
    brute = [w for w in itertools.product((True, False), repeat=n) if holds(formula, variables, w)]
    structure = Structure(formula, variables=variables)
    models, others = structure.models()
    assert list(models) == brute and set(models) | set(others) == set(P.worlds(n)) and not set(models) & set(others)
    log_probs = torch.tensor([p[:n]], dtype=DOUBLE).log()
    tensors = [torch.tensor(group, dtype=torch.bool).reshape(-1, n) for group in (models, others)]
    yes, no = (P.log_weighted_model_count(group, log_probs).exp().item() for group in tensors)
    assert yes == pytest.approx(count(brute, p[:n]), abs=1e-12) and yes + no == pytest.approx(1, abs=1e-12)
    polynomial = structure.polynomials()[0]
    assert float(polynomial.subs(dict(zip(variables, p, strict=False)))) == pytest.approx(yes, abs=1e-12)


def test_worlds():
    assert P.worlds(1) == ((True,), (False,)) and len(P.worlds(4)) == 16
    assert list(Structure(W, variables=(W, L)).table()) == ["TT", "TF", "FT", "FF"]


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_log1mexp(dtype):
    x = -torch.logspace(-6, math.log10(80), 400, dtype=DOUBLE).to(dtype)
    wanted = torch.tensor(
        [float(sympy.log(1 - sympy.exp(sympy.Float(v, 60)))) for v in x.double().tolist()], dtype=DOUBLE
    )
    assert ((P.log1mexp(x).double() - wanted) / wanted).abs().max() < (1e-6 if dtype == torch.float32 else 1e-13)
    for value in (-1e-30, -1e-7, -math.log(2), -1.0, -88.0, -104.0, -1e4, -1e30):
        x = torch.tensor(value, dtype=dtype, requires_grad=True)
        P.log1mexp(x).backward()
        with_digits = -1 / math.expm1(-value) if value > -700 else 0.0
        assert x.grad.item() == pytest.approx(with_digits, rel=1e-5, abs=1e-37)


# ---- structures ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(formulas())
def test_implication_construction(drawn):
    variables, (p1, p2) = drawn
    structure = Structure.from_pair(p1, p2, variables=variables)
    for world in P.worlds(len(variables)):
        assert (
            holds(structure.formula, variables, world)
            == holds(p1, variables, world)
            == (world in structure.models()[0])
        )
        assert (
            holds(structure.negation, variables, world)
            == holds(p2, variables, world)
            == (world in structure.models()[1])
        )


@settings(deadline=None, max_examples=60)
@given(formulas(number=3))
def test_forms_are_their_definition(drawn):
    """Equation 1 world by world; P_C is the union of both forms exactly if it holds nowhere else, P_A their intersection inside."""
    variables, (core, conditioning, additive) = drawn
    structure = Structure(core, conditioning, additive, variables=variables)
    for world in P.worlds(len(variables)):
        p, c, a = (holds(f, variables, world) for f in (core, conditioning, additive))
        above, below = (world in group for group in structure.models())
        assert above == ((p or a) and c) and below == ((not p or a) and c)
        assert (above or below) == c and (above and below) == (a and c)
    simple = structure.simplified()
    assert simple.equivalent(structure) and simple.simplified() == simple
    both_ways = Structure.from_pair(structure.formula, structure.negation, variables=variables)
    assert both_ways.equivalent(structure)
    backwards = Structure.from_pair(structure.negation, structure.formula, variables=variables)
    assert backwards.models() == structure.models()[::-1]


def test_dictionary():
    assert list(P.NAMED) == list(CLOSED) and {name: marks(P.NAMED[name]) for name in named_pairs} == TABLES
    for name in named_pairs:
        assert Structure.from_table(TABLES[name]).equivalent(P.NAMED[name])
        assert Structure.from_table(P.NAMED[name].table()).equivalent(P.NAMED[name])
        assert P.NAMED[name].simplified().equivalent(P.NAMED[name])
    assert P.NAMED["CE"].simplified() == Structure(W, variables=(W, L))
    assert P.NAMED["cUNL"].simplified().additive == false
    assert Structure.from_table("B✓B×").core == W  # free where a world counts on both sides
    names = {"CEUnl", "CE", "CPO", "ORPO", "unCPO", "cCPO", "cUNL", "fUNL", "cfUNL", "qfUNL"}
    assert sum(any(s.equivalent(P.NAMED[name]) for name in names) for s in SENSIBLE) == 10
    assert set(P.LOSSES) == set(P.NAMED) | {"IPO", "SLiC"}
    assert P.LOSSES["IPO"] == ("DPO", "squared") and P.LOSSES["SLiC"] == ("CPO", "hinge")
    with pytest.raises(TypeError):
        P.NAMED["CPO"] = P.NAMED["CE"]


def test_numbers():
    log_probs = torch.tensor([[0.3, 0.6]], dtype=DOUBLE).log()
    wanted = dict(CPO=-0.693147, ORPO=-1.252763, unCPO=0.322773, cCPO=-0.336472, CE=-0.847298, CEUnl=-1.992430)
    wanted |= dict(fUNL=-0.405465, cUNL=-1.609438, cfUNL=-0.048790, qfUNL=-1.763589)
    for name, value in wanted.items():
        assert P.semantic_log_ratio(P.NAMED[name], log_probs).item() == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("name", CLOSED)
def test_compiled_is_closed_form(name):
    structure = P.NAMED[name]
    log_probs = uniform(1000, len(structure.variables)).requires_grad_()
    compiled, closed = P.semantic_log_ratio(structure, log_probs), CLOSED[name](*log_probs.unbind(1))
    assert torch.allclose(compiled, closed, rtol=0, atol=1e-9)
    gradient = torch.autograd.grad(compiled.sum(), log_probs, retain_graph=True)[0]
    wanted = torch.autograd.grad(closed.sum(), log_probs)[0]
    assert ((gradient - wanted) / wanted.abs().clamp(min=1)).abs().max() < 1e-9
    polynomials = [
        sympy.lambdify(structure.variables, q)(*log_probs.detach().exp().unbind(1)) for q in structure.polynomials()
    ]
    assert torch.allclose(polynomials[0].log() - polynomials[1].log(), closed.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
@pytest.mark.parametrize("name", named_pairs)
def test_links(name, beta):
    log_probs = uniform(50, 2)
    rho = CLOSED[name](*log_probs.unbind(1))
    loss = lambda link, reduction="none": P.preference_loss(
        P.NAMED[name], log_probs, link=link, beta=beta, reduction=reduction
    )
    assert torch.allclose(loss("logistic"), torch.log1p(torch.exp(-beta * rho)), rtol=1e-8, atol=1e-8)
    assert torch.allclose(loss("squared"), (rho - 0.5 / beta) ** 2, rtol=1e-8, atol=1e-8)
    assert torch.allclose(loss("hinge"), torch.clamp(beta - rho, min=0), rtol=1e-8, atol=1e-8)
    assert loss("hinge", "mean") == loss("hinge").mean() and loss("hinge", "sum") == loss("hinge").sum()


def test_ordinary_losses_are_logarithms_of_one_count():
    log_probs = uniform(50, 2)
    ordinary = P.preference_loss(P.NAMED["CEUnl"], log_probs, reduction="none")
    assert torch.allclose(ordinary, -(log_probs[:, 0] + log1m(log_probs[:, 1])), rtol=1e-12, atol=1e-12)


def test_peers():
    columns = uniform(100, 4).unbind(1)
    pair = torch.stack(columns[:2], dim=1)
    assert torch.allclose(P.cpo_log_ratio(*columns[:2]), P.semantic_log_ratio(P.NAMED["CPO"], pair), atol=1e-12)
    assert torch.allclose(P.orpo_log_ratio(*columns[:2]), P.semantic_log_ratio(P.NAMED["ORPO"], pair), atol=1e-9)
    assert torch.allclose(P.orpo_log_ratio(*columns[:2]), CLOSED["ORPO"](*columns[:2]), atol=1e-10)
    four = torch.stack(columns, dim=1)
    assert torch.allclose(P.dpo_log_ratio(*columns), P.semantic_log_ratio(P.NAMED["DPO"], four), atol=1e-12)


def test_simpo_is_dpo_with_a_reference_set_by_hand():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 20, (2, 64), generator=generator)
    sums = lengths * uniform(64, 2, low=-5.0).T
    for margin in (0.0, 0.3, 2.0):
        ours = P.simpo_log_ratio(*sums, *lengths, margin=margin)
        reference = torch.tensor([-0.5, -0.5 - margin], dtype=DOUBLE).expand(64, 2)
        columns = torch.cat([(sums / lengths).T, reference], dim=1)
        assert torch.allclose(ours, P.semantic_log_ratio(P.NAMED["DPO"], columns), atol=1e-12)
        assert torch.allclose(ours, sums[0] / lengths[0] - sums[1] / lengths[1] - margin, atol=1e-12)


# ---- decompilation -------------------------------------------------------------------------------------------------


def test_decompile_is_the_inverse():
    for structure in ALL:
        assert P.decompile(*structure.polynomials()).equivalent(structure)
        assert P.decompile(*(q.expand() for q in structure.polynomials())).equivalent(structure)
    expanded = P.NAMED["DPO"].polynomials()
    assert P.decompile(*expanded, P.NAMED["DPO"].variables).equivalent(P.NAMED["DPO"])


@settings(deadline=None, max_examples=40)
@given(formulas())
def test_decompile_three_variables(drawn):
    variables, (p1, p2) = drawn
    structure = Structure.from_pair(p1, p2, variables=variables)
    assert P.decompile(*structure.polynomials(), variables).equivalent(structure)


def test_decompiled_formulas():
    cpo = P.decompile(W, L)
    assert (cpo.core, cpo.conditioning, cpo.additive) == (Implies(L, W), Or(W, L), And(W, L))
    sources = {
        "CE": (W, 1 - W), "CEUnl": (W * (1 - L), 1 - W * (1 - L)), "ORPO": (W * (1 - L), L * (1 - W)),
        "unCPO": (L * W + 1 - L, L * (1 - W)), "cCPO": (W, L * (1 - W)), "cUNL": (W * (1 - L), L), "fUNL": (1 - L, L),
        "cfUNL": (1 - L, L * (1 - W)), "qfUNL": (W * (1 - L), 1 - W),
    }  # fmt: skip
    for name, pair in sources.items():
        assert P.decompile(*pair).equivalent(P.NAMED[name]), name
    assert P.decompile(W * L_R, L * W_R, (W, L, W_R, L_R)).equivalent(P.NAMED["DPO"])
    assert marks(P.decompile(1, 0)) == "✓✓✓✓" and marks(P.decompile(0, 1)) == "××××"


@pytest.mark.parametrize(
    "numerator, words",
    [
        (W**2, r"numerator must have no variable with an exponent above 1, got the monomial W\*\*2"),
        (W * (1 - L * W), r"the monomial L\*W\*\*2|the monomial W\*\*2\*L"),
        (W + L, r"numerator must be 0 or 1 at each vertex, got 2 at W = 1, L = 1"),
        (W / 2, r"got 1/2 at W = 1, L = 1"),
        (1 - W - L, r"got -1 at W = 1, L = 1"),
        (2, r"got 2 at W = 1"),
        (0.5 * W, r"at W = 1, L = 1"),
        (W / L, "numerator must be a polynomial"),
        (sympy.exp(W), "numerator must be a polynomial"),
        (W * sympy.Symbol("Q"), r"numerator must use the variables \(W, L\) only, got \['Q'\]"),
    ],
)
def test_not_decompilable(numerator, words):
    with pytest.raises(ValueError, match=words):
        P.decompile(numerator, L)
    with pytest.raises(ValueError, match=words.replace("numerator", "denominator")):
        P.decompile(W, numerator)


def test_a_square_needs_a_copy():
    """DPO-positive's numerator has the square of a probability; a second proposition with the same probability has it."""
    copy = sympy.Symbol("W_2")
    structure = P.decompile(W * copy * L_R, L * W_R, (W, copy, L, W_R, L_R))
    w, l, wr, lr = uniform(50, 4).unbind(1)
    rho = P.semantic_log_ratio(structure, torch.stack([w, w, l, wr, lr], dim=1))
    assert torch.allclose(rho, 2 * w + lr - l - wr, atol=1e-10)


def test_vertex_theorem():
    """All multilinear polynomials with coefficients in {-2..2}: those that pass are the 16 counts, no more."""
    passed = {}
    for c in itertools.product(range(-2, 3), repeat=4):
        q = c[0] + c[1] * W + c[2] * L + c[3] * W * L
        try:
            passed[c] = P.decompile(q, 1).models()[0]
        except ValueError:
            continue
    assert len(passed) == len(set(passed.values())) == 16
    for c, models in passed.items():
        for p, q in ((0.2, 0.7), (0.9, 0.4)):
            assert c[0] + c[1] * p + c[2] * q + c[3] * p * q == pytest.approx(count(models, (p, q)))


# ---- the landscape -------------------------------------------------------------------------------------------------


def test_counts_of_the_landscape():
    assert len(P.enumerate_structures(1)) == 16 and len(ALL) == 256 and len(BOTH) == 225 and len(SENSIBLE) == 16
    assert len({s.models() for s in ALL}) == 256
    disjoint = [s for s in ALL if not set(s.models()[0]) & set(s.models()[1])]
    assert len(disjoint) == 81 and sum(len(s.models()[0]) + len(s.models()[1]) == 4 for s in disjoint) == 16
    varying = [s for s in BOTH if s.models()[0] != s.models()[1]]
    assert sum(P.is_monotone(s) for s in varying) == 52 and sum(P.is_monotone(s, strict=True) for s in BOTH) == 34
    assert all(P.is_monotone(s) for s in SENSIBLE)
    assert [marks(s) for s in SENSIBLE if not P.is_monotone(s, strict=True)] == ["✓✓××", "×✓×✓"]
    assert [marks(s) for s in SENSIBLE if s.antisymmetric()] == ["B✓×B", "B✓×-", "-✓×B", "-✓×-"]
    assert P.NAMED["DPO"].antisymmetric()


def test_some_ratios_have_several_structures():
    """A factor cancels: the 225 usable structures have 187 ratios; the sensible ones have 16."""
    different = lambda structures: {sympy.cancel(top / bottom) for top, bottom in (s.polynomials() for s in structures)}
    assert len(different(BOTH)) == 187 and len(different(SENSIBLE)) == 16
    with_factor = P.decompile(W * (1 - L), (1 - W) * (1 - L))
    assert marks(with_factor) == "-✓-×" and not with_factor.equivalent(P.NAMED["CE"])
    log_probs = uniform(20, 2)
    ratios = (P.semantic_log_ratio(s, log_probs) for s in (with_factor, P.NAMED["CE"]))
    assert torch.allclose(*ratios, atol=1e-9)


def test_monotone_against_a_grid():
    """Exact sign test against the gradients on a grid; a strict sign that touches zero inside shows on the grid's diagonal."""
    grid = torch.linspace(0.02, 0.98, 25, dtype=DOUBLE)
    log_probs = torch.cartesian_prod(grid, grid).log()
    for structure in BOTH:
        g = P.log_ratio_gradient(structure, log_probs) * torch.tensor([1, -1])
        assert P.is_monotone(structure) == bool((g > -1e-9).all()), marks(structure)
        assert P.is_monotone(structure, strict=True) == bool((g > 1e-9).all()), marks(structure)


def test_quadratic_signs():
    for c in itertools.product(range(-4, 5), repeat=3):
        x = sorted({Fraction(0), Fraction(1), *(Fraction(k, 24) for k in range(25))})
        x += [Fraction(-c[1], 2 * c[2])] if c[2] and 0 < Fraction(-c[1], 2 * c[2]) < 1 else []
        q = [c[0] + c[1] * t + c[2] * t * t for t in x]
        inside = [v for t, v in zip(x, q, strict=True) if 0 < t < 1]
        assert P._nonnegative(*c, False) == (min(q) >= 0), c
        # Roots of these quadratics may be irrational, but then the vertex is on the other side.
        assert P._nonnegative(*c, True) == (min(q) >= 0 and min(inside) > 0), c


def test_lattice():
    graph = P.entailment_graph(SENSIBLE)
    assert graph.number_of_edges() == 32 and networkx.is_directed_acyclic_graph(graph)
    bottom = [s for s in SENSIBLE if graph.in_degree(s) == 0]
    top = [s for s in SENSIBLE if graph.out_degree(s) == 0]
    assert len(bottom) == len(top) == 1
    assert bottom[0].equivalent(P.NAMED["CEUnl"]) and top[0].equivalent(P.NAMED["unCPO"])
    assert sorted(d for _, d in graph.degree()) == [4] * 16
    order = {
        structure: i for i, structure in enumerate(SENSIBLE)
    }  # edges come in the order of the structures, in every run
    edges = [(order[a], order[b]) for a, b in graph.edges]
    assert list(graph) == SENSIBLE and edges == sorted(edges)
    cpo, orpo = P.NAMED["CPO"], P.NAMED["ORPO"]
    assert not cpo.entails(orpo) and not orpo.entails(cpo)
    for a, b in itertools.product(SENSIBLE, repeat=2):
        assert a.entails(b) == networkx.has_path(graph, a, b)
    between = [s for s in SENSIBLE if orpo.entails(s) and s.entails(P.NAMED["unCPO"])]
    assert len(between) == 4
    whole = P.entailment_graph(ALL)
    assert whole.number_of_edges() == 8 * 2**7  # the Boolean lattice with 8 atoms: a side of a world is switched
    one = P.entailment_graph(P.enumerate_structures(1))
    assert one.number_of_edges() == 32


def test_monotonicity_theorem():
    """All comparable pairs, at random probabilities: a stronger structure has the smaller ratio and the larger loss."""
    log_probs = uniform(20, 2, low=-5.0, high=-0.01)
    masks = [[torch.tensor(group, dtype=torch.bool).reshape(-1, 2) for group in s.models()] for s in ALL]
    counts = torch.stack(
        [torch.stack([P.log_weighted_model_count(m, log_probs) for m in pair]) for pair in masks]
    ).exp()
    order = torch.tensor([[a.entails(b) for b in ALL] for a in ALL])
    assert order.sum() == 9**4
    for a, b in order.nonzero().tolist():
        assert (counts[a, 0] * counts[b, 1] <= counts[b, 0] * counts[a, 1] + 1e-12).all()
    for loss in ("logistic", "hinge"):
        losses = {s: P.preference_loss(s, log_probs, link=loss, beta=0.7, reduction="none") for s in BOTH}
        for a, b in itertools.product(BOTH, repeat=2):
            if a.entails(b):
                assert (losses[a] >= losses[b] - 1e-9).all()
    squared = [
        P.preference_loss(P.NAMED[name], log_probs, link="squared", reduction="none") for name in ("CEUnl", "unCPO")
    ]
    assert (squared[0] < squared[1]).any()  # not for a link that turns


def test_dpo():
    dpo = P.NAMED["DPO"]
    above, below = dpo.models()
    assert len(above) == len(below) == 4
    sizes = [len(Structure(f, variables=dpo.variables).models()[0]) for f in (dpo.core, dpo.conditioning, dpo.additive)]
    assert sizes == [13, 7, 1]
    assert dpo.core.equals(Implies(And(W_R, L), And(L_R, W))) and dpo.conditioning.equals(Or(And(W_R, L), And(L_R, W)))
    assert P.NAMED["CPO"].with_reference().equivalent(dpo)


@pytest.mark.parametrize("name", named_pairs)
def test_reference_subtracts(name):
    twin, columns = P.NAMED[name].with_reference(), uniform(40, 4, low=-6.0)
    assert [v.name for v in twin.variables] == ["W", "L", "W_r", "L_r"]
    difference = P.semantic_log_ratio(P.NAMED[name], columns[:, :2]) - P.semantic_log_ratio(
        P.NAMED[name], columns[:, 2:]
    )
    assert torch.allclose(P.semantic_log_ratio(twin, columns), difference, atol=1e-9)


@pytest.mark.parametrize("structure", SENSIBLE, ids=marks)
def test_limits(structure):
    """Both probabilities vanish with a fixed ratio: the mark of FF decides."""
    for kappa in (0.5, 2.0, 7.0):
        log_probs = torch.tensor([[math.log(kappa) - 30, -30.0]], dtype=DOUBLE)
        rho = P.semantic_log_ratio(structure, log_probs).item()
        wanted = {"-": math.log(kappa), "B": 0.0, "✓": 30.0, "×": math.log(kappa) - 30}[marks(structure)[3]]
        assert rho == pytest.approx(wanted, abs=1e-10)


@pytest.mark.parametrize("structure", SENSIBLE, ids=marks)
def test_extremes(structure):
    values = torch.tensor([0.0, -1e-7, -1e-3, -1.0, -1e3, -1e4])
    log_probs = torch.cartesian_prod(values, values).requires_grad_()
    for link in P.LINKS:
        loss = P.preference_loss(structure, log_probs, link=link, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, log_probs)
        assert loss.isfinite() and gradient.isfinite().all()
    exact = P.log_ratio_gradient(structure, log_probs.detach())
    assert exact.isfinite().all()


# ---- gradients -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(BOTH), st.lists(st.tuples(probabilities, probabilities), min_size=1, max_size=4))
def test_gradient_is_a_difference_of_posteriors(structure, p):
    log_probs = torch.tensor(p, dtype=DOUBLE).log().requires_grad_()
    (automatic,) = torch.autograd.grad(P.semantic_log_ratio(structure, log_probs).sum(), log_probs)
    ours = P.log_ratio_gradient(structure, log_probs.detach())
    assert torch.allclose(ours, automatic, rtol=1e-8, atol=1e-8)
    for row, probs in zip(ours.tolist(), p, strict=True):
        posterior = [
            [count([w for w in group if w[i]], probs) / count(group, probs) for i in range(2)]
            for group in structure.models()
        ]
        wanted = [(posterior[0][i] - posterior[1][i]) / (1 - probs[i]) for i in range(2)]
        assert row == pytest.approx(wanted, rel=1e-6, abs=1e-8)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.data())
def test_compiled_is_the_ratio_of_counts(n, data):
    """Any two sets of worlds, value and gradient; merged parts are disjoint and cover the worlds."""
    everything = list(itertools.product((True, False), repeat=n))
    groups = [data.draw(st.sets(st.sampled_from(everything), min_size=1)) for _ in range(2)]
    structure = Structure.from_models(*groups, sympy.symbols(f"X1:{n + 1}"))
    for group, parts in zip(groups, structure._parts, strict=True):
        covered = [w for part in parts for w in everything if all(v in (None, x) for v, x in zip(part, w, strict=True))]
        assert sorted(covered) == sorted(group)
    p = torch.tensor([data.draw(st.lists(probabilities, min_size=n, max_size=n))], dtype=DOUBLE)
    log_probs = p.log().requires_grad_()
    rho = P.semantic_log_ratio(structure, log_probs)
    wanted = [count(group, p[0].tolist()) for group in groups]
    assert rho.item() == pytest.approx(math.log(wanted[0] / wanted[1]), rel=1e-9, abs=1e-9)
    (automatic,) = torch.autograd.grad(rho.sum(), log_probs)
    assert torch.allclose(P.log_ratio_gradient(structure, log_probs.detach()), automatic, rtol=1e-8, atol=1e-8)


def test_compiled_losses_are_as_short_as_written_ones():
    """CPO, ORPO and DPO are a difference of two products, and CPO and DPO need no 1 - p."""
    assert P.NAMED["CPO"]._parts == (((True, None),), ((None, True),))
    assert P.NAMED["ORPO"]._parts == (((True, False),), ((False, True),))
    assert P.NAMED["DPO"]._parts == (((True, None, None, True),), ((None, True, True, None),))
    assert Structure(false, variables=(W,))._parts == ((), ((None,),))


def test_a_constant_ratio_has_a_gradient():
    log_probs = uniform(3, 2).requires_grad_()
    rho = P.semantic_log_ratio(Structure.from_table("BBBB"), log_probs)
    (gradient,) = torch.autograd.grad(rho.sum(), log_probs)
    assert (rho == 0).all() and (gradient == 0).all()


def test_gradient_with_a_reference():
    columns = uniform(20, 4, low=-6.0).requires_grad_()
    (automatic,) = torch.autograd.grad(P.semantic_log_ratio(P.NAMED["DPO"], columns).sum(), columns)
    assert torch.allclose(P.log_ratio_gradient(P.NAMED["DPO"], columns.detach()), automatic, atol=1e-9)


@pytest.mark.parametrize("structure", SENSIBLE, ids=marks)
def test_gradcheck(structure):
    log_probs = uniform(4, 2, low=-4.0, high=-0.1).requires_grad_()
    both = lambda x: (P.preference_loss(structure, x), P.preference_loss(structure, x, link="squared"))
    assert torch.autograd.gradcheck(both, (log_probs,))


@pytest.mark.parametrize("name", ["CPO", "unCPO"])
def test_functional_transforms(name):
    log_probs = uniform(6, 2, low=-4.0, high=-0.1)
    loss = lambda x: P.preference_loss(P.NAMED[name], x)
    grad = torch.func.grad(loss)(log_probs)
    each = torch.func.vmap(torch.func.grad(lambda x: loss(x[None])))(log_probs)
    assert torch.allclose(6 * grad, each, atol=1e-12)
    assert torch.allclose(torch.compile(loss, backend="eager")(log_probs), loss(log_probs), atol=1e-12)


def test_dtypes():
    log_probs = uniform(8, 2, low=-6.0)
    wanted = P.preference_loss(P.NAMED["ORPO"], log_probs)
    for dtype in (torch.float32, torch.bfloat16):
        loss = P.preference_loss(P.NAMED["ORPO"], log_probs.to(dtype))
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5 if dtype == torch.float32 else 0.05)
    columns = log_probs.to(torch.bfloat16).unbind(1)
    for ratio in (P.cpo_log_ratio, P.orpo_log_ratio, lambda w, l: P.dpo_log_ratio(w, l, l, w)):
        assert ratio(*columns).dtype == torch.float32
        assert torch.equal(ratio(*columns), ratio(*(column.float() for column in columns)))
    with torch.autocast("cpu", torch.bfloat16):
        assert P.preference_loss(P.NAMED["ORPO"], log_probs.float()).item() == pytest.approx(wanted.item(), rel=1e-5)
    strided = torch.cat([log_probs, log_probs], dim=1)[:, ::2]
    assert P.preference_loss(P.NAMED["CE"], strided) == P.preference_loss(P.NAMED["CE"], strided.contiguous())


# ---- noisy labels --------------------------------------------------------------------------------------------------


def test_population_loss_is_the_expectation():
    log_probs = uniform(5, 2, low=-4.0)
    for name, q, noise in itertools.product(named_pairs, (0.0, 0.3, 0.8, 1.0), (0.0, 0.2, 0.5)):
        seen = q * (1 - noise) + (1 - q) * noise
        one, two = (
            P.preference_loss(P.NAMED[name], x, beta=0.5, reduction="none") for x in (log_probs, log_probs.flip(1))
        )
        ours = P.population_loss(P.NAMED[name], log_probs, q, noise_rate=noise, beta=0.5)
        assert torch.allclose(ours, seen * one + (1 - seen) * two, atol=1e-12)
    each = torch.tensor([0.1, 0.5, 0.9, 0.2, 1.0], dtype=DOUBLE)
    rows = torch.cat([P.population_loss(P.NAMED["CE"], log_probs[i : i + 1], each[i].item()) for i in range(5)])
    assert torch.allclose(P.population_loss(P.NAMED["CE"], log_probs, each), rows)


@pytest.mark.parametrize("name", ["CPO", "ORPO", "DPO"])
def test_antisymmetric_losses_report_the_preference(name):
    """Their optimum is a log ratio whose logistic is the probability that is seen: noise shrinks it."""
    structure, q, noise, beta = P.NAMED[name], 0.8, 0.1, 0.5
    columns = uniform(4000, len(structure.variables), low=-6.0, high=-0.05)
    loss = P.population_loss(structure, columns, q, noise_rate=noise, beta=beta)
    seen = (1 - 2 * noise) * q + noise
    best = columns[loss.argmin()][None]
    assert torch.sigmoid(beta * P.semantic_log_ratio(structure, best)).item() == pytest.approx(seen, abs=0.01)
    entropy = -(seen * math.log(seen) + (1 - seen) * math.log(1 - seen))
    assert loss.min().item() == pytest.approx(entropy, abs=1e-4) and (loss >= entropy - 1e-12).all()


def test_ceunl_has_its_optimum_inside():
    """Here p1 = q and p2 = 1 - q, in closed form."""
    for q in (0.2, 0.5, 0.8):
        log_probs = torch.tensor([[q, 1 - q]], dtype=DOUBLE).log().requires_grad_()
        (gradient,) = torch.autograd.grad(P.population_loss(P.NAMED["CEUnl"], log_probs, q).sum(), log_probs)
        assert gradient.abs().max() < 1e-12
        others = P.population_loss(P.NAMED["CEUnl"], uniform(500, 2, low=-4.0), q)
        assert (others >= P.population_loss(P.NAMED["CEUnl"], log_probs, q) - 1e-12).all()


# ---- permutations and bad input ------------------------------------------------------------------------------------


def test_columns_belong_to_variables():
    log_probs = uniform(10, 2)
    for name in named_pairs:
        s = P.NAMED[name]
        turned = Structure(s.core, s.conditioning, s.additive, variables=(L, W))
        assert torch.allclose(
            P.semantic_log_ratio(turned, log_probs.flip(1)), P.semantic_log_ratio(s, log_probs), atol=1e-12
        )
        assert {word[::-1]: mark for word, mark in turned.table().items()} == s.table()
        swapped = P.semantic_log_ratio(s.swapped(), log_probs)
        assert torch.allclose(swapped, P.semantic_log_ratio(s, log_probs.flip(1)), atol=1e-12)
        back = Structure.from_pair(s.negation, s.formula)
        assert torch.allclose(P.semantic_log_ratio(back, log_probs), -P.semantic_log_ratio(s, log_probs), atol=1e-12)


CPO = P.NAMED["CPO"]
LOGS = torch.full((3, 2), -1.0)
COLUMN = torch.full((3,), -1.0)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: Structure("nonsense(W)", variables=(W, L)), TypeError, "core must be a formula"),
        (lambda: Structure(W + L, variables=(W, L)), TypeError, "core must be a formula"),
        (lambda: Structure(W, sympy.Symbol("Q"), variables=(W, L)), ValueError, r"conditioning must use the variables .* got \['Q'\]"),
        (lambda: Structure(W, W > 0, variables=(W, L)), TypeError, "conditioning must be a formula"),
        (lambda: Structure(W, variables=(W, W)), ValueError, "variables must be distinct symbols"),
        (lambda: Structure(W, variables=()), ValueError, "variables must be distinct symbols, at least one"),
        (lambda: Structure(W, variables=("W",)), TypeError, "variables must be sympy symbols"),
        (lambda: Structure.from_models([(True,)], []), ValueError, "formula_models must hold worlds of 2 values"),
        (lambda: Structure.from_models([], [(True, True, False)]), ValueError, "negation_models must hold worlds of 2"),
        (lambda: Structure.from_table("✓×"), ValueError, "marks must be 4 of"),
        (lambda: Structure.from_table("✓×?-"), ValueError, "marks must be 4 of"),
        (lambda: Structure.from_models([(1, 0)], [(2, 0)]), ValueError, "negation_models must hold .* true or false"),
        (lambda: Structure.from_pair(W + L, L), TypeError, "p1 must be a formula"),
        (lambda: Structure.from_pair(W, W + L), TypeError, "p2 must be a formula"),
        (lambda: CPO.entails(P.NAMED["DPO"]), ValueError, "other must have the variables"),
        (lambda: CPO.entails("DPO"), TypeError, "other must be a Structure, got str"),
        (lambda: Structure(W, variables=(W,)).swapped(), ValueError, "even number of variables, got 1"),
        (lambda: P.log_weighted_model_count(torch.ones(1, 2), LOGS), TypeError, "models must be a boolean tensor"),
        (lambda: P.log_weighted_model_count([[True, True]], LOGS), TypeError, "models must be a boolean tensor, got list"),
        (lambda: P.log_weighted_model_count(torch.ones(2).bool(), LOGS), ValueError, r"models must have shape \(m, n\)"),
        (lambda: P.log_weighted_model_count(torch.ones(1, 3).bool(), LOGS), ValueError, r"log_probs must have shape \(B, 3\)"),
        (lambda: P.semantic_log_ratio(CPO, -LOGS), ValueError, "log_probs must be at most 0, got 1"),
        (lambda: P.semantic_log_ratio(CPO, LOGS - math.inf), ValueError, "log_probs must be finite"),
        (lambda: P.semantic_log_ratio(CPO, LOGS[0]), ValueError, "log_probs must have 2 dimension"),
        (lambda: P.semantic_log_ratio(CPO, LOGS.long()), TypeError, "log_probs must be a floating-point tensor"),
        (lambda: P.semantic_log_ratio(CPO, [[-1.0, -1.0]]), TypeError, "log_probs must be a tensor"),
        (lambda: P.semantic_log_ratio("CPO", LOGS), TypeError, "structure must be a Structure, got str"),
        (lambda: P.semantic_log_ratio(Structure(true, variables=(W, L)), LOGS), ValueError, "no world for its negation"),
        (lambda: P.log_ratio_gradient(Structure(false, variables=(W, L)), LOGS), ValueError, "no world for its formula"),
        (lambda: P.preference_loss(CPO, LOGS, link="exponential"), ValueError, "link must be one of"),
        (lambda: P.preference_loss(CPO, LOGS, beta=0.0), ValueError, "beta must be finite and > 0"),
        (lambda: P.preference_loss(CPO, LOGS, reduction="max"), ValueError, "reduction must be one of"),
        (lambda: P.population_loss(CPO, LOGS, 1.2), ValueError, "preference must be"),
        (lambda: P.population_loss(CPO, LOGS, torch.ones(2)), ValueError, r"preference must be a number or have shape \(3,\)"),
        (lambda: P.population_loss(CPO, LOGS, -torch.ones(3)), ValueError, r"preference must lie in \[0, 1\]"),
        (lambda: P.population_loss(CPO, LOGS, 0.5, noise_rate=0.6), ValueError, "noise_rate must be"),
        (lambda: P.cpo_log_ratio(COLUMN, COLUMN[:2]), ValueError, "log_p_l must have the shape of log_p_w"),
        (lambda: P.orpo_log_ratio(COLUMN, 0 * COLUMN), ValueError, "must be below 0"),
        (lambda: P.dpo_log_ratio(COLUMN, COLUMN, COLUMN.double(), COLUMN), TypeError, "ref_log_p_w must have the dtype"),
        (lambda: P.simpo_log_ratio(COLUMN, COLUMN, 0 * COLUMN, -COLUMN), ValueError, "length_w must be at least 1"),
        (lambda: P.simpo_log_ratio(COLUMN, COLUMN, -COLUMN, 3), TypeError, "length_l must be a tensor"),
        (lambda: P.simpo_log_ratio(COLUMN, COLUMN, -COLUMN, torch.ones(2)), ValueError, "length_l must have the shape"),
        (lambda: P.enumerate_structures(3), ValueError, "n must be 1 or 2, got 3"),
        (lambda: P.enumerate_structures(1, sensible=True), ValueError, "sensible must be False"),
        (lambda: P.is_monotone(P.NAMED["DPO"]), ValueError, "structure must have two variables"),
        (lambda: P.entailment_graph([CPO, CPO.simplified()]), ValueError, "must not hold two that are equivalent"),
        (lambda: P.entailment_graph([CPO, P.NAMED["DPO"]]), ValueError, "other must have the variables"),
        (lambda: P.entailment_graph([CPO, "DPO"]), TypeError, "structures must be Structure objects"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
