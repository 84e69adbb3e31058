"""What the lab's own functions promise, and its `full` profile on a tiny model and a few generated reviews."""

import math

import nbformat
import numpy as np
import pytest
import torch
from full_profile import LABS, run_full

from lossbook import lab

SMALL = dict(
    samples=300,
    held=200,
    rows=512,
    betas=(0.1, 0.5),
    checkpoints=(4, 8, 16, 24),
    seeds=(0, 1),
    more=(2,),
    replications=2,
)


def fake_reviews(name, columns, **_):
    """Reviews of ten words; one of them tells the label."""
    assert name == "stanfordnlp/imdb" and list(columns) == ["text", "label"]
    rng = np.random.default_rng(0)
    labels = [0, 1] * 60
    texts = [
        " ".join([*rng.choice(["film", "plot", "the"], 6), ("bad", "good")[k], "end", "end", "end"]) for k in labels
    ]
    return {"text": [*texts, "short film"], "label": [*labels, 1]}


@pytest.fixture(scope="module")
def tiny_model(torchvision):  # transformers imports torchvision where it is installed
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<end>", "film", "plot", "the", "bad", "good", "end", "short"]
    table = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<end>"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=table, eos_token="<end>", pad_token="<end>")
    sizes = transformers.GPT2Config(
        vocab_size=8, bos_token_id=0, eos_token_id=0, n_positions=16, n_embd=16, n_layer=1, n_head=2
    )
    return lambda name: (lab.PretrainedTransformer(transformers.GPT2LMHeadModel(sizes)).eval(), tokenizer)


@pytest.fixture(scope="module")
def imdb(tiny_model):
    patch = pytest.MonkeyPatch()
    patch.setattr(lab, "load_hub_dataset", fake_reviews)
    patch.setattr(lab, "load_language_model", tiny_model)
    sizes = SMALL | dict(prompt=2, length=8, pairs=256, pretrain=100, steps=24, batch=64, lr=5e-3)
    try:
        yield run_full("language/robust_dpo", patch, until="frontiers", sizes=sizes)
    finally:
        patch.undo()


@pytest.fixture(scope="module")
def letters():
    patch = pytest.MonkeyPatch()
    sizes = SMALL | dict(world="letters", length=3, pairs=400, pretrain=60, steps=24, batch=100, lr=4e-3)
    try:
        yield run_full("language/robust_dpo", patch, until="frontiers", sizes=sizes)
    finally:
        patch.undo()


@pytest.mark.parametrize("which", ["imdb", "letters"])
def test_runs(which, request):
    names = request.getfixturevalue(which)
    grid = {"clean": (0.5,), "dpo": (0.02, 0.1, 0.5), "cdpo": (0.1, 0.5), "rdpo": (0.1, 0.5)}
    wanted = {(kind, beta, s) for kind, betas in grid.items() for beta in betas for s in (0, 1)}
    assert set(names["tuned"]) == wanted | {("rdpo", 0.5, 2), ("dpo", 0.5, 2), ("dpo", 0.1, 2)}
    for (_, beta, seed), result in names["tuned"].items():
        assert len(result["checkpoints"]) == 4 and len(result["losses"]) == 24
        for c in result["checkpoints"]:
            assert np.isfinite(list(c.values())).all() and 0 <= c["accuracy"] <= 1 and c["kl"] > -0.1
        assert result["losses"][0] == pytest.approx(math.log(2), abs=1e-5)  # every margin is 0 at the start
        assert result["margins"].shape == (200,) and result["margins"].abs().max() < beta * 100
        for kind, loss in result["noisy"].items():  # on pairs that the tuning did not see, with flips
            z = torch.where(names["worlds"][(seed,)].data["held", "flipped"], -1, 1) * result["margins"]
            slope = {"dpo": 0.0, "cdpo": 0.4, "rdpo": -2.0}[kind]
            assert loss == pytest.approx((torch.nn.functional.softplus(-z) + slope * z).mean().item(), abs=1e-5)
    for s in (0, 1):
        start = names["starts"][s]
        assert start["kl"] == pytest.approx(0, abs=1e-5) and start["held_clean"] == pytest.approx(math.log(2), abs=1e-6)
        first, last = names["tuned"]["clean", 0.5, s]["checkpoints"][::3]
        assert last["reward"] > start["reward"] and last["accuracy"] > 0.6
        kl, best = names["frontiers"][(s,)]
        assert (np.diff(kl) > 0).all() and (np.diff(best) > 0).all() and kl[0] < 0.1


@pytest.mark.parametrize("which", ["imdb", "letters"])
def test_pairs_of_a_world(which, request):
    names = request.getfixturevalue(which)
    world = names["worlds"][(0,)]
    chosen, rejected, ref_chosen, ref_rejected = world.data["train", "clean"]
    prompt = world.prompts.shape[1]
    assert chosen.shape == rejected.shape == (names["size"]["pairs"], prompt + names["size"]["length"])
    assert torch.equal(chosen[:, :prompt], rejected[:, :prompt])  # two responses to one prompt
    assert chosen[:, prompt:].max() < world.vocab
    noisy = world.data["train", "noisy"][0]
    same = (noisy == chosen).all(1)
    assert (same | (noisy == rejected).all(1)).all()
    assert torch.equal(noisy, torch.where(world.data["train", "flipped"][:, None], rejected, chosen))
    differs = (chosen != rejected).any(1)
    assert 0.5 < same[differs].double().mean() < 0.7
    for texts, stored in ((chosen, ref_chosen), (rejected, ref_rejected)):
        logits = (world.policy.hidden(texts) @ world.policy.output_weight[: world.vocab].T).log_softmax(2)
        slow = logits[:, prompt - 1 : -1].gather(2, texts[:, prompt:, None]).sum((1, 2))
        torch.testing.assert_close(stored, slow, rtol=1e-4, atol=1e-4)
    held_chosen, held_rejected, *_ = world.data["held", "clean"]
    sign = (world.reward(held_chosen) - world.reward(held_rejected)).sign()
    assert torch.equal(sign, world.data["held", "better"])
    assert sign.mean() > 0  # the better one wins more often than not


def test_reviews_carry_sentiment(imdb):
    world = imdb["worlds"][(0,)]
    assert world.prompts.shape == (120, 2)  # the short review is left out
    texts = torch.tensor([[1, 2, 5, 5], [1, 2, 4, 4]])
    good, bad = world.reward(texts).tolist()
    assert good > 0.5 > -0.5 > bad


def test_frontier_of_letters_is_exact(letters):
    """No policy is above it; at the ends it is the reference and the best text."""
    world = letters["worlds"][(0,)]
    kl, best = letters["frontiers"][(0,)]
    assert best[0] == pytest.approx(letters["starts"][0]["reward"], abs=0.8) and best[-1] <= 6
    for (_, _, s), result in letters["tuned"].items():
        if s not in letters["SEEDS"]:
            continue
        kl, best = letters["frontiers"][(s,)]
        for c in result["checkpoints"]:
            assert c["reward"] < np.interp(c["kl"], kl, best) + 0.6
    generator = torch.Generator().manual_seed(0)
    texts = letters["write"](world.policy, world, world.prompts.expand(4000, 1), generator)
    assert world.reward(texts).mean().item() == pytest.approx(letters["starts"][0]["reward"], abs=0.3)
    values = 2 * torch.linspace(-1, 1, 10)[texts[:, 1:]].sum(1)
    torch.testing.assert_close(world.reward(texts), values)


@pytest.fixture
def helpers(letters):
    """What the claims are computed with."""
    names = dict(letters)
    cells = nbformat.read(LABS / "language/robust_dpo.ipynb", as_version=4).cells
    exec(next(cell.source for cell in cells if "def within(" in cell.source), names)
    return names


def test_most_reward_up_to_a_divergence(helpers):
    points = lambda *rows: {"checkpoints": [dict(kl=kl, reward=reward) for kl, reward in rows]}
    helpers["SEEDS"] = [0]
    helpers["starts"] = {0: dict(reward=1.0)}
    helpers["tuned"] = {
        ("dpo", 0.1, 0): points((1.0, 2.0), (3.0, 4.0), (4.0, 9.0)),
        ("dpo", 0.5, 0): points((0.5, 2.5), (0.7, 0.0), (8.0, 20.0)),
        ("rdpo", 0.1, 0): points((4.0, 5.0), (6.0, 6.0), (7.0, 7.0)),
        ("rdpo", 0.5, 0): points((0.1, 0.5), (0.2, 0.4), (0.3, 0.1)),
    }
    within = lambda *args: helpers["within"](*args)[0]
    assert within("dpo", 2.0, [0.1]) == pytest.approx(3.0)  # halfway between two checkpoints
    assert within("dpo", 0.5, [0.1]) == pytest.approx(1.5)  # between the start and the first
    assert within("dpo", 0.6, [0.5]) == 2.5
    assert within("dpo", 2.0, [0.1, 0.5]) == pytest.approx(20 * 1.3 / 7.3)
    assert within("rdpo", 2.0, [0.1]) == pytest.approx(3.0)  # no checkpoint so near
    assert within("rdpo", 2.0, [0.5]) == 1.0  # the start itself


def test_a_difference_counts_with_its_interval(helpers):
    assert helpers["ahead"]("by", [1.0, 1.1, 0.9], 0.9)[1]
    assert not helpers["ahead"]("by", [1.0, 1.1, 0.9], 1.1)[1]
    text, passed = helpers["ahead"]("by", [5.0, 0.1, 0.2], 0.5)
    assert not passed and text == "by 1.77 ± 6.96 (from 0.10 to 5.00)"
    assert helpers["worst"]("x", [1.0, 2.0], low=1.0, high=2.0)[1]
    assert not any(helpers["worst"]("x", [1.0, bad], low=1.0, high=2.0)[1] for bad in (0.9, 2.1, math.nan))
    both = helpers["together"](("a", True), ("b", False))
    assert both == dict(measured="a; b", holds=False)


def test_linear_errors(letters):
    errors = letters["errors"]
    assert set(errors) == set(letters["LINEAR"]) and all(rows.shape == (2, 4) for rows in errors.values())
    assert (errors["rdpo", 0.0][:, -1] < errors["rdpo", 0.0][:, 0]).all()
    assert (errors["cdpo", 0.4][:, -1] > errors["dpo", 0.4][:, -1]).all()
    again = letters["linear"]("rdpo", 0.2, 1)
    assert again == pytest.approx(errors["rdpo", 0.2][1].tolist())
