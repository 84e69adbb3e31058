"""What the lab's own functions promise, and its `full` profile on tiny models and a few generated pairs."""

import math

import numpy as np
import pytest
import torch
from full_profile import run_full

from lossbook import lab

WORDS = ["<end>", "ask", "film", "plot", "the", "bad", "good", "end"]
TEMPLATE = "{% for m in messages %}ask {{ m['content'] }} {% endfor %}"
SMALL = dict(pairs=24, held_out=8, steps=6, batch=6, seeds=(0, 1), other_lrs=(1e-2,), samples=5, jobs=1)


class Rows(dict):
    """What the lab uses of `datasets.Dataset`: columns by name, rows by iteration."""

    def shuffle(self, seed):
        order = np.random.default_rng(seed).permutation(len(self["prompt"]))
        return Rows({name: [column[i] for i in order] for name, column in self.items()})

    def select(self, numbers):
        return Rows({name: [column[i] for i in numbers] for name, column in self.items()})

    def __iter__(self):
        return (dict(zip(self.keys(), row, strict=True)) for row in zip(*self.values(), strict=True))


def fake_pairs(name, columns, *, split):
    assert name == "HuggingFaceH4/ultrafeedback_binarized" and split == "train_prefs"
    assert list(columns) == ["prompt", "chosen", "rejected"]
    rng = np.random.default_rng(0)
    prompts = [" ".join(rng.choice(["film", "plot"], int(rng.integers(1, 9)))) for _ in range(40)]
    answer = lambda prompt, word, k: [
        dict(role="user", content=prompt),
        dict(role="assistant", content=" ".join(["the", word] + ["end"] * k)),
    ]
    lengths = rng.integers(0, 4, (2, 40))
    return Rows(
        prompt=prompts,
        chosen=[answer(p, "good", k) for p, k in zip(prompts, lengths[0], strict=True)],
        rejected=[answer(p, "bad", k) for p, k in zip(prompts, lengths[1], strict=True)],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, torchvision):  # transformers imports torchvision where it is installed
    """A causal model and a judge of a few hundred weights, with a tokenizer of words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("models")
    table = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<end>"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=table, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = TEMPLATE
    sizes = dict(vocab_size=8, bos_token_id=0, eos_token_id=0, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    torch.manual_seed(0)
    for name, build in (("model", transformers.GPT2LMHeadModel), ("judge", transformers.GPT2ForSequenceClassification)):
        build(transformers.GPT2Config(**sizes, num_labels=1, pad_token_id=0)).save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    return path


@pytest.fixture(scope="module")
def full(folder):
    patch = pytest.MonkeyPatch()
    patch.setattr(lab, "load_hub_dataset", fake_pairs)
    sizes = SMALL | dict(model=str(folder / "model"), judge=str(folder / "judge"), prompt_tokens=5, answer_tokens=4)
    try:
        yield run_full("language/preference_logic", patch, until="FIRST", sizes=sizes | dict(lr=3e-2))
    finally:
        patch.undo()


@pytest.fixture(scope="module")
def letters():
    patch = pytest.MonkeyPatch()
    sizes = SMALL | dict(data="letters", pairs=100, held_out=50, steps=40, batch=32, lr=2e-3, samples=200)
    try:
        yield run_full("language/preference_logic", patch, until="FIRST", sizes=sizes)
    finally:
        patch.undo()


@pytest.mark.parametrize("which", ["full", "letters"])
def test_runs(which, request):
    names = request.getfixturevalue(which)
    size, results = names["size"], names["results"]
    assert set(names["LOSSES"]) == {"CEUnl", "CE", "cUNL", "CPO", "ORPO", "cCPO", "fUNL", "unCPO", "-✓×B"}
    seeds = names["SEEDS"]
    tuned = {(n, 1e-2, "true", s) for n in ("CE", "CPO", "ORPO", "cCPO") for s in seeds}
    others = {(n, size["lr"], "random", s) for n in ("CE", "CPO", "unCPO") for s in seeds}
    assert set(results) == {(n, size["lr"], "true", s) for n in names["LOSSES"] for s in seeds} | tuned | others
    for result in results.values():
        assert result["start"].shape == result["end"].shape == (size["pairs"] + size["held_out"], 2)
        assert (
            result["end"].isfinite().all() and (result["end"] <= 0).all() and (result["end"] != result["start"]).any()
        )
        assert result["path"].shape == (size["steps"], 2)
    for (_, lr, labels, _), result in results.items():  # texts only where they are asked for
        assert ("reward" in result) == ("texts" in result) == (labels == "true" and lr == size["lr"])
        if "reward" in result:
            assert len(result["reward"]) == size["samples"] and np.isfinite(result["reward"]).all()
    for seed in seeds:  # the same start and the same batches, whatever the loss
        same = [results[n, size["lr"], "true", seed] for n in names["LOSSES"]]
        assert all(
            torch.equal(r["start"], same[0]["start"]) and (r["path"][0] == same[0]["path"][0]).all() for r in same
        )


@pytest.mark.parametrize("which", ["full", "letters"])
def test_losses_learn(which, request):
    names = request.getfixturevalue(which)
    lr = names["size"]["lr"]
    for name in ("CE", "CPO", "ORPO", "cCPO"):
        gain = names["values"](names["change"](0), name) - names["values"](names["change"](1), name)
        assert (gain > 0).all(), name
    assert (names["values"](names["change"](0), "CE") > 0).all()
    assert math.isinf(names["pull"]("CE", 0)) and names["pull"]("CPO", 0) == pytest.approx(1, abs=1e-5)
    swapped = names["results"]["CE", lr, "random", 0]["start"]
    kept = (swapped == names["results"]["CE", lr, "true", 0]["start"]).all(1).double().mean()
    assert 0.2 < kept < 0.8


@pytest.mark.parametrize("which", ["full", "letters"])
def test_log_probs_are_means_over_the_answer(which, request):
    names = request.getfixturevalue(which)
    task = names["tasks"][0]
    net = task.model()
    ours = names["all_log_probs"](net, task)
    logits = lambda tokens: torch.nn.functional.linear(net.hidden(tokens[None]), net.output_weight)[0].log_softmax(1)
    with torch.no_grad():
        for pair in range(4):
            for side in range(2):
                tokens, mask = task.tokens[side, pair], task.mask[side, pair]
                scores = logits(tokens)
                each = [scores[t - 1, tokens[t]].item() for t in range(1, len(tokens)) if mask[t]]
                assert ours[pair, side].item() == pytest.approx(np.mean(each), abs=1e-5)


def test_pairs_of_the_data_set(full):
    """Winner and loser begin with one prompt, cut from the left, and the mask is the answer with its end."""
    task = full["tasks"][0]
    assert task.tokens.shape == (2, 32, 9)
    for pair in range(32):
        texts = [[WORDS[t] for t in side[pair].tolist()] for side in task.tokens]
        first = [int(side[pair].nonzero()[0]) for side in task.mask]
        assert first[0] == first[1] <= 5 and texts[0][: first[0]] == texts[1][: first[0]]
        for text, side, word in zip(texts, task.mask, ("good", "bad"), strict=True):
            answer = [t for t, m in zip(text, side[pair].tolist(), strict=True) if m]
            assert answer[:2] == ["the", word] and len(answer) <= 4 and (len(answer) == 4 or answer[-1] == "<end>")
            assert not side[pair, : first[0]].any() and all(t == "<end>" for t in text[first[0] + len(answer) :])
    prompts = {tuple(row.tolist()) for row in task.tokens[0]}
    assert prompts != {tuple(row.tolist()) for row in full["tasks"][1].tokens[0]}  # a seed draws its own pairs


def test_letters_are_labelled_by_their_sum(letters):
    task = letters["tasks"][0]
    assert task.tokens.shape == (2, 150, 7) and (task.tokens[..., 0] == 10).all() and task.tokens[..., 1:].max() < 10
    assert (task.judge(task.tokens[0]) > task.judge(task.tokens[1])).all()
    written = task.write(task.model())
    assert written.shape == (200, 7) and torch.equal(written, task.write(task.model()))
    one = torch.full((1, 7), 3)
    assert -6 <= task.judge(one).item() <= 6


def test_names_of_losses(letters):
    assert letters["called"](letters["LOSSES"]["CPO"]) == "CPO" and letters["GROUP"]["CPO"] == "-"
    assert letters["GROUP"] == {name: letters["marks"](s)[3] for name, s in letters["LOSSES"].items()}
