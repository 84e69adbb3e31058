"""The lab's `full` profile, on a few generated images of CIFAR's shape, and what the lab's own functions promise."""

import ast
import math

import nbformat
import numpy as np
import pytest
import torch
from full_profile import LABS, run_full
from torch import nn

from lossbook import lab
from lossbook.classification import naive_bayes as N


def few_images(*, train):
    """Images of CIFAR-10's shape, a color for each class."""
    labels = torch.arange(10).repeat(8 if train else 4)
    colors = torch.rand(10, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return lab.Images(
        (colors[labels] + 0.2 * torch.rand(len(labels), 3, 32, 32)).clamp(0, 1), labels, tuple("abcdefghij")
    )


class Colors(nn.Module):
    """In place of a ResNet: the mean color and its square, and a last layer that the lab takes off."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 1000)

    def forward(self, x):
        assert x.shape[1:] == (3, 224, 224) and not self.training
        mean = x.mean((2, 3))
        return self.fc(torch.cat([mean, mean**2], 1))


def only_networks(source, names):
    """The simulations run in the other profile; here the cells that need their results are left out."""
    if source.startswith(("FITS = {", "many = run_all", "bound_jobs", "figure")):
        return ""
    for job in ("hard_results = run_all", "known = run_all", "tables = run_all", "bound_jobs = "):
        source = source.split(job)[0]
    return source


def test_full_profile_evaluates_backbones(monkeypatch, torchvision):
    asked = []
    monkeypatch.setattr(lab, "load_cifar10", few_images)
    monkeypatch.setattr(
        torchvision.models, "get_model", lambda name, weights: asked.append((name, weights)) or Colors()
    )
    monkeypatch.setattr(torch.hub, "load", lambda where, name: asked.append((where, name)) or Colors())
    sizes = dict(labels=(20, 40, 60), held_out=(20, 30), splits=2, seeds=range(2), tumor_seeds=range(2))
    names = run_full("classification/naive_bayes", monkeypatch, until="networks", sizes=sizes, change=only_networks)
    assert asked == [("resnet50", "DEFAULT"), ("facebookresearch/dino:main", "dino_resnet50")]
    assert set(names["networks"]) == {(name, seed) for name in names["size"]["networks"] for seed in (0, 1)}
    X, y = names["stored"]["resnet50"]
    assert X.shape == (120, 6) and X.dtype == torch.float64
    assert torch.equal(y, torch.cat([few_images(train=part).labels for part in (True, False)]))
    for curves, control, classes in names["networks"].values():
        assert classes == 10 and len(curves) == 2
        assert set(curves[0]) == {
            (m, *setting)
            for m in (20, 40, 60)
            for setting in [("naive Bayes", s) for s in names["SMOOTHINGS"]]
            + [("logistic", c) for c in names["PENALTIES"]]
        }
        best = min(test for (m, *_), (_validation, test) in curves[0].items() if m == 60)
        assert best < 0.3 < 0.6 < min(test for _validation, test in control.values())
    other = names["networks"]["resnet50", 0][0][1]
    assert other != names["networks"]["resnet50", 0][0][0]  # splits differ


@pytest.fixture(scope="module")
def functions():
    """The lab's functions, without its experiments."""
    patch = pytest.MonkeyPatch()
    patch.setattr(lab, "load_cifar10", few_images)

    def definitions(source, names):
        source = only_networks(source, names)
        return source.split('if size["images"] == "digits":\n    stored')[0] + (
            "\ndone = True" if "def network_curve" in source else ""
        )

    try:
        yield run_full("classification/naive_bayes", patch, until="done", change=definitions)
    finally:
        patch.undo()


def test_needed_finds_the_first_size(functions):
    calls = []

    def error(m):
        calls.append(m)
        return 1 / m

    for target in (0.3, 0.1, 0.013, 0.002):
        found = functions["needed"](error, target, 4)
        assert 1 / target < found <= 2 ** (1 / 8) / target + 2
    assert functions["needed"](error, 0.9, 4) == 4  # the least size will do
    assert functions["needed"](lambda m: 1.0, 0.5, 4) == math.inf
    assert max(calls) < 2000 and functions["slope"]([10, 100], [5, 50]) == pytest.approx(1)


@pytest.mark.parametrize("scale", ["none", "standardize", "min-max"])
def test_rules_are_the_classifiers(functions, scale):
    """Scaling goes into the weights: the rule predicts as scikit-learn does on scaled features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, StandardScaler

    g = torch.Generator().manual_seed(0)
    for classes in (2, 3):
        means, covariance = N.mixture_parameters(6, classes)
        X, y = N.gaussian_mixture(40, means, covariance, generator=g)
        X[:, 5] = 2.0  # a constant feature
        Z, _ = N.gaussian_mixture(200, means, covariance, generator=g)
        Z[:, 5] = 2.0
        scaler = {"none": FunctionTransformer(), "standardize": StandardScaler(), "min-max": MinMaxScaler()}[scale]
        model = LogisticRegression(C=0.5, max_iter=1000).fit(scaler.fit_transform(X.numpy()), y.numpy())
        weight, bias = functions["logistic"](0.5, scale)(X, y)
        assert weight.shape == (classes, 6) and bias.shape == (classes,)
        agree = (Z @ weight.T + bias).argmax(1).numpy() == model.predict(scaler.transform(Z.numpy()))
        assert agree.mean() > 0.99
        smooth, own = functions["smoothed"](1e-3)(X, y), N.GaussianNaiveBayes(1e-3)
        unit = MinMaxScaler().fit(X.numpy())
        own.fit(unit.transform(X.numpy()), y)
        assert torch.equal((Z @ smooth[0].T + smooth[1]).argmax(1), own.predict(unit.transform(Z.numpy())))
        error = functions["error_rate"]((weight, bias), X, y)
        assert error == ((X @ weight.T + bias).argmax(1) != y).double().mean().item()


def test_mixtures_have_the_evidence_that_they_say(functions):
    for n in (20, 80):
        for kind, wanted in (("easy", 2 * (n + 1)), ("thin", 9.0)):
            means, covariance = functions["mixture"](kind, n, 2)
            distance = ((means[1] - means[0]) ** 2 / covariance.diagonal()).sum().item()
            assert distance == pytest.approx(wanted)
    hard = functions["mixture"]("hard", 20, 2, 3)[1]
    assert torch.equal(hard, N.mixture_parameters(20, 2, mode="hard", covariance_seed=3)[1])


@pytest.mark.parametrize("n", [6, 7])
def test_the_control_drops_the_noisy_half(functions, n):
    """Logistic regression as in the paper, unscaled, on the features with variance 1; the others have weight 0."""
    means, covariance = N.mixture_parameters(n, 2)
    noisy = covariance.diagonal() > 1
    assert noisy.sum() == n // 2 and noisy[: n // 2].all()
    X, y = N.gaussian_mixture(60, means, covariance, generator=torch.Generator().manual_seed(0))
    weight, bias = functions["without_noisy_half"](X, y)
    assert weight.shape == (2, n) and (weight[:, noisy] == 0).all()
    kept, own = functions["logistic"]()(X[:, ~noisy], y)
    assert torch.equal(weight[:, ~noisy], kept) and torch.equal(bias, own)


def test_learning_curves_keep_parts_apart(functions):
    """A rule that knows the training rows by heart is right on none of the others: training, validation and test are disjoint."""
    y = torch.arange(90) % 3
    X = torch.randn(90, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = []
    rules = functions["smoothed"]

    def spy(smoothing):
        fit = rules(smoothing)

        def inner(rows, labels):
            seen.append({tuple(row) for row in rows.tolist()})
            return fit(rows, labels)

        return inner

    functions["smoothed"] = spy
    scored = []
    error_rate = functions["error_rate"]
    functions["error_rate"] = lambda rule, rows, labels: scored.append({tuple(r) for r in rows.tolist()}) or error_rate(rule, rows, labels)  # fmt: skip
    try:
        functions["learning_curve"](X, y, (12, 30), (20, 25), 0)
    finally:
        functions["smoothed"], functions["error_rate"] = rules, error_rate
    validation, test = scored[0], scored[1]
    assert len(validation) == 20 and len(test) == 25 and not validation & test
    assert {len(rows) for rows in seen} == {12, 30} and all(not rows & (validation | test) for rows in seen)


def test_pretraining_moves_the_network(functions):
    images, labels = torch.rand(300, 1, 8, 8), torch.arange(300) % 3
    states = [
        functions["pretrain"](kind, images, labels, 0, epochs=e)
        for kind in ("supervised", "contrastive")
        for e in (0, 1)
    ]
    first = [next(net.parameters()) for net in states]
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[3])
    assert all(net(images[:5]).shape == (5, 64) and not net.training for net in states)
    assert np.isfinite(states[3](images).detach().numpy()).all()


def named_functions(*names):
    """Functions that the lab defines beside its pictures and claims, by name, without running their cells."""
    space = {"np": np, "math": math}
    for cell in nbformat.read(LABS / "classification/naive_bayes.ipynb", as_version=4).cells:
        if cell.cell_type == "code" and not cell.source.startswith("import sys"):
            tree = ast.parse(cell.source)
            tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
            exec(compile(tree, "lab", "exec"), space)
    assert set(names) <= set(space)
    return space


def made_up_curves():
    """Two seeds with two splits each. Validation prefers one setting of each family, the test part another one."""
    errors = {  # (validation, test) at 10 and at 40 labels; what is added to both in the second split cancels
        ("naive Bayes", 1e-9): ((0.30, 0.20), (0.20, 0.18)),
        ("naive Bayes", 1e-2): ((0.25, 0.28), (0.25, 0.10)),
        ("logistic", 0.1): ((0.45, 0.10), (0.30, 0.02)),
        ("logistic", 1.0): ((0.40, 0.35), (0.10, 0.14)),
    }
    return [
        [
            {
                (m, *key): [pair[0] + shift, pair[1] + shift + 0.01 * seed]
                for key, pairs in errors.items()
                for m, pair in zip((10, 40), pairs, strict=True)
            }
            for shift in (-0.01, 0.01)
        ]
        for seed in (0, 1)
    ]


def test_tuning_looks_at_validation_and_reports_the_test_part():
    space, curves, labels = named_functions("errors_of", "differences"), made_up_curves(), (10, 40)
    tuned = {"naive Bayes": [0.28, 0.18], "logistic": [0.35, 0.14]}  # the least test errors are 0.20, 0.10; 0.10, 0.02
    for family, row in tuned.items():
        found = space["errors_of"](curves, labels, family)
        assert found == pytest.approx(np.array([row, np.add(row, 0.01)]))
    fixed = space["errors_of"](curves, labels, "logistic", 0.1)
    assert fixed == pytest.approx(np.array([[0.10, 0.02], [0.11, 0.03]]))
    # one split's validation errors alone do not choose: the mean over splits does
    curves[0][0][10, "naive Bayes", 1e-2][0] = 0.5
    assert space["errors_of"](curves, labels, "naive Bayes")[:, 0] == pytest.approx([0.20, 0.29])
    curves = made_up_curves()
    gain = space["differences"](curves, labels, (10, 40))
    assert gain == pytest.approx([(0.28 - 0.35 + 0.18 - 0.14) / 2] * 2)
    assert space["differences"](curves, labels, (40,), (1e-2, 0.1)) == pytest.approx([0.08] * 2)


def test_later_compares_each_with_its_own_end():
    space, curves = named_functions("errors_of", "later"), made_up_curves()
    for seed in curves:
        for split in seed:
            split |= {(100, *key): [0.0, split[40, *key][1] - 0.01] for _m, *key in list(split)}
    space |= {"size": {"labels": (10, 40, 100)}, "middle": (10, 40), "network_results": lambda name: curves}
    # logistic at 0.1: (0.10 + 0.02) / 2 above its last 0.01; naive Bayes at 1e-9: (0.20 + 0.18) / 2 above its last 0.17
    assert space["later"]("any", (1e-9, 0.1)) == pytest.approx([0.05 - 0.02] * 2)


def test_a_claim_needs_its_margin_and_every_seed():
    space = named_functions("at_least", "within", "together")
    at_least, between = space["at_least"], space["within"]
    assert at_least("gain", [0.02, 0.04], 0.03) == ("gain +0.030 (from +0.020 to +0.040)", True)
    assert not at_least("gain", [0.02, 0.03], 0.03)[1]  # the mean is below
    assert not at_least("gain", [0.2, -0.001], 0.03)[1]  # a seed has the other sign
    assert between("slope", [0.1, 0.2], high=0.2) == ("slope 0.10 to 0.20", True)
    assert not between("slope", [0.1, 0.21], high=0.2)[1] and not between("slope", [0.5, 0.7], low=0.6)[1]
    assert between("ratio", [1.4], high=1.5) == ("ratio 1.40", True)
    both = space["together"](("a", True), ("b", False))
    assert both == {"measured": "a; b", "holds": False} and space["together"](("a", True))["holds"]
