"""The lab's `full` profile with a tiny model and a few invented questions, and what the lab's own functions promise."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from full_profile import run_full

from lossbook import lab
from lossbook.language import npo as N

METHODS = ("GA", "NPO", "GA+RT", "IDK+RT", "DPO+RT", "KTO+RT", "NPO+RT")
PLACES = ("Paris", "Rome", "Oslo", "Lima", "Bonn", "Cairo", "Quito")


class Words:
    """A tokenizer that numbers words as they come, and returns what those of transformers do."""

    eos_token_id = pad_token_id = 0

    def __init__(self):
        self.known = {}

    def __call__(self, text):
        return SimpleNamespace(input_ids=[self.known.setdefault(w, 1 + len(self.known)) for w in text.split()])


TOKENIZER = Words()


def tiny_model(name, **options):
    return lab.Transformer(300, dim=16, depth=1, heads=2, context=128), TOKENIZER


def questions(name, columns, *, config=None, split="train"):
    """Three questions to forget, nine in all."""
    everyone = list(range(9)) if config == "full" else [0, 1, 2] if "forget" in config else list(range(3, 9))
    table = dict(
        question=[f"Where was author number {k} born ?" for k in everyone],
        answer=[f"In {PLACES[k % 7]}" + " indeed" * (k % 3) for k in everyone],
        paraphrased_answer=[f"{PLACES[k % 7]} is the place" for k in everyone],
        perturbed_answer=[[f"{PLACES[(k + j) % 7]} is the place" for j in range(1, 6)] for k in everyone],
    )
    assert name == "locuslab/TOFU" and (config.endswith("_perturbed") or "perturbed_answer" not in columns)
    return {column: table[column] for column in columns}


@pytest.fixture(scope="module")
def names():
    patch = pytest.MonkeyPatch()
    patch.setattr(lab, "load_language_model", tiny_model)
    patch.setattr(lab, "load_hub_dataset", questions)
    rates = {m: (0.01, 0.2) for m in METHODS}
    common = dict(seeds=(0, 1), steps=4, batch=8, every=2, utility=True, adam=1e-3, rates=rates)
    worlds = dict(
        authors=dict(memorize=(60, 32, 1e-2, None), optimizer="sgd", **common),
        tofu=dict(memorize=(60, 8, 1e-2, None), optimizer="adamw", **common),
    )
    try:
        yield run_full(
            "language/npo", patch, until="runs", sizes=dict(apart=(0, 1), coincide=(0,), steps=12, worlds=worlds)
        )
    finally:
        patch.undo()


def test_full_profile_runs(names):
    assert set(names["runs"]) == {
        (w, m, s) for w in ("authors", "tofu") for m in (*METHODS, "GA AdamW", "NPO AdamW") for s in (0, 1)
    }
    for reports in names["runs"].values():
        assert len(reports) == 3 and all(0 <= r["quality"] <= 1 and 0 <= r["utility"] <= 1 for r in reports if r)
        assert reports[0]["weights"] == pytest.approx([1] * 3)
    for method in METHODS:
        assert names["column"]("tofu", method, "kept").shape == (2, 3)
    assert {key[1:] for key in names["paths"]} == {(m, lr) for m, lr, _ in names["APART"] + names["TOGETHER"]}
    for (alpha, _, _), path in names["paths"].items():
        assert path.shape == (2 if alpha else 1, len(names["MARKS"]), 2)


def test_facts_are_learned_or_the_lab_stops(names):
    world = names["authors_world"](3)
    few = world.train[torch.arange(8)]
    model = names["memorize"](world, few, 3, 400, 8, 3e-3, 0.99)
    assert (names["likeliest"](model, few)[:, 0] == 1).all()
    with pytest.raises(RuntimeError, match="seed 3: less than 99% of the facts are right after 3 steps"):
        names["memorize"](world, few, 3, 3, 8, 3e-3, 0.99)


def test_small_world(names):
    world = names["authors_world"](3)
    gone, kept = world.forget, world.retain
    assert len(gone.answer) == len(kept.answer) == 100 and len(world.train) == 200 and len(gone.wrong) == 500
    authors = [set(part.answer.tokens[:, 1].tolist()) for part in (gone, kept)]
    assert not authors[0] & authors[1] and len(authors[0] | authors[1]) == 40
    assert torch.equal(world.train_retain.tokens, kept.answer.tokens)
    for part in (gone, kept):
        right, wrong = part.answer.tokens, part.wrong.tokens.view(100, 5, -1)
        assert (wrong[:, :, :3] == right[:, None, :3]).all() and (wrong[:, :, -1] == 1).all()
        assert (wrong[:, :, 3:6] != right[:, None, 3:6]).any(2).float().mean() > 0.99
        assert (part.idk.tokens[:, 3:6] == part.idk.tokens[0, 3:6]).all()
        assert (
            part.idk.tokens[0, 3].item() > right.max().item()
            and part.answer.mask[0].tolist() == [False] * 3 + [True] * 4
        )
    questions_ = {tuple(row) for row in world.train.tokens[:, 1:3].tolist()}
    assert len(questions_) == 200
    assert torch.equal(world.train.tokens, names["authors_world"](3).train.tokens)
    assert not torch.equal(world.train.tokens, names["authors_world"](4).train.tokens)


def test_tofu_rows(names):
    world = names["tofu_world"](0)
    assert (len(world.train), len(world.train_retain), len(world.forget.answer), len(world.retain.answer)) == (
        9,
        6,
        3,
        6,
    )
    rows = world.train
    for k in range(9):
        asked, answer = (
            TOKENIZER(t).input_ids
            for t in (
                f"Question: Where was author number {k} born ? Answer:",
                f"In {PLACES[k % 7]}" + " indeed" * (k % 3),
            )
        )
        counted = rows.tokens[k][rows.mask[k]].tolist()
        assert counted == [*answer, 0] and rows.tokens[k, : len(asked)].tolist() == asked
        assert rows.mask[k].sum() == len(answer) + 1 and not rows.mask[k, : len(asked)].any()
    assert len(world.forget.wrong) == 15
    text = {v: w for w, v in TOKENIZER.known.items()}
    said = [
        " ".join(text[t] for t in row[m].tolist() if t)
        for row, m in zip(world.forget.wrong.tokens, world.forget.wrong.mask, strict=True)
    ]
    assert said[5:10] == [f"{PLACES[(1 + j) % 7]} is the place" for j in range(1, 6)]
    assert "I don't know." == " ".join(
        text[t] for t in world.forget.idk.tokens[0][world.forget.idk.mask[0]].tolist() if t
    )


def test_one_pass_is_several(names):
    world = names["tofu_world"](0)
    model = world.fresh()
    parts = [world.forget.answer, None, world.forget.idk, world.train]
    got = names["together"](model, parts)
    assert got[1] is None
    for rows, values in zip(parts, got, strict=True):
        if rows is not None:
            torch.testing.assert_close(values, names["logps"](model, rows))
    average = names["logps"](model, world.train, average=True)
    torch.testing.assert_close(average * world.train.mask.sum(1), got[3])


def test_likeliest(names):
    world, before = names["prepared"]["authors", 0]
    rows = world.train[torch.arange(0, 200, 7)]
    found = names["likeliest"](before.model, rows)
    logits = before.model(rows.tokens)
    for k in range(len(rows)):
        guess = [int(logits[k, t - 1].argmax()) for t in range(3, 7)]
        right = rows.tokens[k, 3:].tolist()
        assert found[k, 0] == (guess == right) and found[k, 1] == N.rouge_l_recall(right, guess)


def test_synthetic_methods_side_by_side(names):
    """Each column is its method's gradient descent, written out alone."""
    problem = names["synthetic"](1.0, 5)
    settings = [
        ("GA", 1e-2, 1.0),
        ("NPO", 1e-2, 2.0),
        ("GA+RT", 2e-2, 1.0),
        ("DPO+RT", 1e-2, 0.1),
        ("KTO+RT", 1e-2, 1.0),
        ("IDK+RT", 1e-2, 1.0),
    ]
    got = names["forget"](problem, settings)
    n = problem.count
    z, s = problem.features, problem.signs

    def logp(theta, signs, rows):
        return F.logsigmoid(signs * (rows @ theta))

    ref, idk_ref = logp(problem.start, s[:n], z[:n]), logp(problem.start, problem.idk, z[:n])
    for k, (method, lr, beta) in enumerate(settings):
        theta = problem.start.clone()
        for _ in range(names["MARKS"][-1]):
            theta.requires_grad_()
            x, idk = logp(theta, s[:n], z[:n]), logp(theta, problem.idk, z[:n])
            loss = {
                "GA": x.mean(),
                "NPO": N.npo_loss(x, ref, beta=beta),
                "IDK": -idk.mean(),
                "DPO": N.dpo_unlearning_loss(x, ref, idk, idk_ref, beta=beta),
                "KTO": N.kto_unlearning_loss(x, ref, (idk - idk_ref).mean().item(), beta=beta),
            }[method.removesuffix("+RT")]
            if "+RT" in method:
                loss = loss - logp(theta, s[n:], z[n:]).mean()
            theta = theta.detach() - lr * torch.autograd.grad(loss, theta)[0]
        wanted = [N.binary_kl(target, features @ theta).item() for features, target in problem.evals]
        np.testing.assert_allclose(got[k, -1], wanted, rtol=1e-9)
    begin = [N.binary_kl(target, features @ problem.start).item() for features, target in problem.evals]
    np.testing.assert_allclose(got[:, 0], [begin] * len(settings))
    assert names["MARKS"][0] == 0 and names["MARKS"][-1] == names["size"]["steps"]


def test_report(names):
    world, before = names["prepared"]["authors", 0]
    report = names["report"](before.model, world, before)
    x = names["logps"](before.model, world.forget.answer).detach()
    assert report["logp"] == pytest.approx(x.mean().item(), rel=1e-5)
    average = x.new_tensor(0) + names["logps"](before.model, world.retain.answer, average=True).detach()
    wrong = names["logps"](before.model, world.retain.wrong, average=True).detach().view(-1, 5)
    right = names["likeliest"](before.model, world.retain.answer)
    values = [average.exp().mean().item(), right[:, 1].mean().item(), N.truth_score(N.truth_ratio(wrong, average))]
    assert report["utility"] == pytest.approx(N.model_utility(values), rel=1e-5)
    assert report["kept"] == right[:, 0].mean() and before.gold["quality"] == 1


def test_a_broken_model_counts_as_worst(names):
    world, before = names["prepared"]["authors", 1]
    reports = names["unlearn"]("authors", world, before, "GA", 1e6, "sgd", 0.2, 1)
    assert reports[-1] is None and len(reports) <= 3
    kept = names["runs"]["authors", "GA", 1]
    names["runs"]["authors", "GA", 1] = reports
    try:
        assert names["column"]("authors", "GA", "logp")[1, -1] == -math.inf
        assert (
            names["column"]("authors", "GA", "quality")[1, -1] == 0
            and names["column"]("authors", "GA", "forgotten")[1, -1] == 1
        )
    finally:
        names["runs"]["authors", "GA", 1] = kept


def test_runs_are_reproducible(names):
    world, before = names["prepared"]["tofu", 0]
    again = names["unlearn"]("tofu", world, before, "NPO+RT", 0.01, "adamw", 0.2, 0)
    assert again[-1] == names["runs"]["tofu", "NPO+RT", 0][-1]
