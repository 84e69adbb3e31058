"""Tests of the lab ``labs/optimization/refined_schedules.ipynb``: the `full` path, on small sizes and few images."""

import math

import numpy as np
import pytest
import torch
from full_profile import run_full

from lossbook import lab
from lossbook.optimization import refined_schedules as R

SMALL = dict(
    draws=range(2),
    orders=range(2),
    seeds=range(2),
    steps=60,
    epochs=2,
    batch=8,
    width=4,
    samples=40,
    rates={"cifar-10": (-9, -5), "text": (-12, -6)},
)


def few_images(*args, **kwargs):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 10
    images = torch.rand(64, 3, 32, 32, generator=g) / 4 + labels[:, None, None, None] / 10
    return lab.Images(images, labels, tuple("abcdefghij"))


def smaller(source, names):
    """Any best rate will do: on data this small it may lie at an edge."""
    if "def best_column" in source:
        names["strict"] = source[source.index("def best_column") :]
    return source.replace("    assert 0 < best < values.shape[1] - 1", "    assert 0 <= best < values.shape[1]")


@pytest.fixture(scope="module")
def names():
    patch = pytest.MonkeyPatch()
    patch.setattr(lab, "load_cifar10", few_images)
    try:
        yield run_full("optimization/refined_schedules", patch, until="networks", sizes=SMALL, change=smaller)
    finally:
        patch.undo()


def test_full_trains_both_networks(names):
    assert set(names["networks"]) == {"cifar-10", "text"}
    for name, result in names["networks"].items():
        steps = 2 * (40 // 8)
        assert names["network_steps"](name) == steps
        expected = {"ConstantLR", "CosineAnnealingLR", "OneCycleLR", "linear decay", "linear, 10 % warm-up",
                    "cosine, 10 % warm-up", "refined", "refined, floor 1"}  # fmt: skip
        assert set(result["tuned"]) == expected
        for key, values in result["tuned"].items():
            assert values.shape == (2,) and np.isfinite(values).all(), (name, key)
        for seed in (0, 1):
            assert result["norms"][seed].shape == (steps + 1,) and (result["norms"][seed] > 0).all()
            assert result["shapes"][seed].shape == (steps,) and result["shapes"][seed].max() == 1
        # something is learned: the tuned loss is below that of the smallest constant rate
        losses = result["losses"]["ConstantLR"]
        assert result["tuned"]["linear decay"].mean() < losses[:, 0].mean()
    assert names["network"]("text", 0)[1] and not names["network"]("cifar-10", 0)[1]


def test_runs_repeat_and_seeds_differ(names):
    table = R.named_schedule("linear", names["network_steps"]("text"))
    first, again, other = (names["train"]("text", table, 1e-3, seed) for seed in (0, 0, 1))
    assert first[0] == again[0] and torch.equal(first[1], again[1]) and first[0] != other[0]


def test_norms_are_those_that_the_optimizer_wants(names):
    """With Adam the first record is the l1 norm, with SGD the l2 norm, of the first batch's gradient."""
    for name, order in (("text", 1), ("cifar-10", 2)):
        table = R.named_schedule("linear", names["network_steps"](name))
        _, norms = names["train"](name, table, 1e-3, 0)
        model, _ = names["network"](name, 0)
        x, y = names["network_data"](name)
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000))[:8]
        names["loss"](model, x[rows], y[rows]).backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert norms[0].item() == pytest.approx(torch.linalg.vector_norm(flat, order).item(), rel=1e-4)


def test_columns_are_runs_of_their_own(names):
    """All base rates at once are what one torch optimizer after the other gives."""
    problem = names["Logistic"](names["tumors_data"](), 3)
    tables = {key: names["schedules"](60)[key] for key in ("linear decay", "OneCycleLR")}
    values, norms = names["descend"](problem, tables, [-2, 1])
    assert values.shape == (2, 2) and norms.shape == (61, 2, 2)
    for i, table in enumerate(tables.values()):
        for j, rate in enumerate((0.25, 2.0)):
            theta = torch.zeros(31, dtype=torch.float64, requires_grad=True)
            optimizer = torch.optim.SGD([theta], rate)
            scheduler, recorder = R.TabulatedLR(optimizer, table), R.GradNormRecorder([theta])
            for k in range(61):
                optimizer.zero_grad()
                rows = problem.batches[k]
                torch.nn.functional.softplus(-problem.sign[rows] * (problem.X[rows] @ theta)).mean().backward()
                recorder.record()
                if k < 60:
                    optimizer.step()
                    scheduler.step()
            assert norms[:, i, j].tolist() == pytest.approx(recorder.norms.tolist(), rel=1e-9)
            loss = torch.nn.functional.softplus(-problem.sign * (problem.X @ theta)).mean()
            assert values[i, j] == pytest.approx(loss.item(), rel=1e-9)


def test_median_problem(names):
    problem = names["Median"]()
    assert problem.least == pytest.approx(0.5589673, abs=1e-6) and problem.steps == 400
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(10, 3, generator=g, dtype=torch.float64)
    assert (problem.value(theta) >= problem.least).all()
    t = theta[:, 0].clone().requires_grad_()
    problem.value(t[:, None])[0].backward()
    torch.testing.assert_close(t.grad, problem.gradient(theta, 0)[:, 0])
    assert names["Median"](1).X.shape == (300, 10)


def test_schedules_have_one_factor_for_each_update(names):
    for steps in (10, 60, 401):
        tables = names["schedules"](steps)
        assert list(tables)[-1] == "linear decay" and set(names["TORCH"]) < set(tables)
        for name, table in tables.items():
            assert table.shape == (steps,) and table.max() <= 1 + 1e-12 and table.min() > 0, name
        for ours, torchs in (("cosine", "CosineAnnealingLR"), ("stepwise", "MultiStepLR"), ("constant", "ConstantLR")):
            torch.testing.assert_close(R.named_schedule(ours, steps), tables[torchs], rtol=1e-6, atol=1e-12)


def test_best_column_takes_the_mean_and_refuses_an_edge(names):
    values = np.array([[3.0, 1.0, 2.0, 9.0], [3.0, 2.5, 1.0, 9.0]])
    assert names["best_column"](values) == 2
    strict = {"np": np}
    exec(names["strict"], strict)
    assert strict["best_column"](values) == 2
    for edge in ([[1.0, 2.0, 3.0]], [[3.0, 2.0, 1.0]]):
        with pytest.raises(AssertionError, match="edge"):
            strict["best_column"](np.array(edge))


def test_convex_results_are_tuned(names):
    for task, (results, norms, refined, runs) in names["convex"].items():
        seeds = 1 if task == "A, all patients" else 2
        assert len(norms) == len(refined) == len(runs) == seeds
        problem, score = names["tasks"][task][0][0], names["tasks"][task][1]
        values = np.array([score(p, v) for p, (v, _) in zip(names["tasks"][task][0], runs, strict=True)])
        for i, name in enumerate(names["schedules"](problem.steps)):
            assert np.mean(results[name][0]) == pytest.approx(values[:, i].mean(0).min())
        assert all(math.isfinite(v) for v in results["refined"][0])
        assert refined[0]["refined"].shape == (problem.steps,) and norms[0].shape == (problem.steps + 1,)
