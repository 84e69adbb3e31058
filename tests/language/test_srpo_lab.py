"""What the lab writes out itself, in the profile `quick`; and its profile `full` on a tiny language model, judge and data set, saved as the hub's are."""

import itertools
import json

import numpy as np
import pytest
import torch
from full_profile import run_full

from lossbook import lab
from lossbook.language import srpo as S

TINY = dict(steps=20, batch=8, sft_steps=5, pairs=40, drafts=12, seeds=(0, 1), draws=range(500, 501), fresh=range(530, 531), lines=range(500, 502), jobs=1)  # fmt: skip


@pytest.fixture(scope="module")
def circle():
    """The names of the lab with the sizes of `quick`, without its experiment."""
    patch = pytest.MonkeyPatch()

    def quick(source, names):
        if source.startswith("SIZES = "):
            source = source.replace("size = SIZES[run.profile]", "size = SIZES['quick']")
            source += f"\nsize |= {TINY!r}\nsize |= dict(drafts=2000, chunk=700)\n"
        return source.replace("size |= _sizes", "")

    def change(source, names):
        source = quick(source.replace("assert size is SIZES['full']", "size = SIZES['quick']"), names)
        return source

    try:
        yield run_full("language/srpo", patch, until="evaluate", change=change)
    finally:
        patch.undo()


class Fixed(torch.nn.Module):
    """A model whose next token depends on the last one only: hidden states are one-hot, the output weight is a table of logits."""

    def __init__(self, logits):
        super().__init__()
        self.output_weight = torch.nn.Parameter(logits.T.contiguous())

    def hidden(self, tokens):
        return torch.nn.functional.one_hot(tokens, self.output_weight.shape[1]).to(self.output_weight.dtype)


def test_log_probabilities_and_samples(circle):
    """Of a Markov chain, against products of its table; contexts of different lengths in one batch."""
    table = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    model = Fixed(table)
    log_p = table[:, :6].log_softmax(1)  # answers are made of the first six tokens
    contexts, answers = [[6], [3, 2, 7]], [[1, 4], [0, 0]]
    tokens, mask = circle["pack"](contexts, answers)
    assert tokens.shape == (2, 5) and mask.sum(1).tolist() == [2, 2]
    expected = [log_p[6, 1] + log_p[1, 4], log_p[7, 0] + log_p[0, 0]]
    assert circle["logprobs"](model, tokens, mask).tolist() == pytest.approx([x.item() for x in expected], abs=1e-5)

    written = circle["write"](model, [[6], [3, 2, 7]] * 4000, seed=0)
    for context, part in ((6, written[::2]), (7, written[1::2])):
        counts = np.zeros((6, 6))
        for a, b in part:
            counts[a, b] += 1 / len(part)
        exact = (log_p[context].exp()[:, None] * log_p[:6].exp()).detach().numpy()
        assert abs(counts - exact).max() < 0.03


def test_labels_and_the_order_of_six(circle):
    tokens, mask = circle["labelled"]("rock", 0, False, 6)
    assert tokens.shape == mask.shape == (6, 40, 5) and (mask.sum(2) == 2).all()
    w, l = tokens[0][:, 1:3], tokens[1][:, 1:3]
    assert (tokens[:2, :, 0] == 6).all() and (tokens[2:, :, 2] == 7).all()
    for k, (draft, answer) in enumerate(((l, w), (l, l), (w, w), (w, l)), start=2):
        assert torch.equal(tokens[k][:, :2], draft) and torch.equal(tokens[k][:, 3:], answer)
    two, _ = circle["labelled"]("rock", 0, False, 2)
    assert torch.equal(two, tokens[:2, :, : two.shape[2]]) and two.shape[:2] == (2, 40)
    assert not torch.equal(tokens[0], circle["labelled"]("rock", 1, False, 6)[0][0])


def test_labels_follow_the_judges(circle):
    circle["size"]["pairs"], before = 6000, circle["size"]["pairs"]
    try:
        task = circle["circle"]()
        assert len(task.pairs["rock"]) == 6000
        shares = np.bincount([a[0] % 3 for _, a, _, _ in task.pairs["rock"]], minlength=3) / 6000
        assert shares == pytest.approx([0.7, 0.15, 0.15], abs=0.02)
        task_before, circle["task"] = circle["task"], task
        for shuffled, share in ((False, 0.95), (True, 0.5)):
            tokens, _ = circle["labelled"]("rock", 0, shuffled, 6)
            w, l = tokens[0][:, 1] % 3, tokens[1][:, 1] % 3
            different = w != l
            beats = (w == (l + 1) % 3)[different].double().mean().item()
            assert beats == pytest.approx(share, abs=0.04)
        circle["task"] = task_before
    finally:
        circle["size"]["pairs"] = before
    assert np.isin([d == y for _, d, y in task.reference], True).mean() == pytest.approx(0.3 + 0.7 / 36, abs=0.03)


def test_objectives_are_the_modules(circle):
    ratios = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    beta = circle["size"]["beta"]
    assert torch.equal(
        circle["objective"]("SRPO", ratios), S.srpo_loss(S.PairLogRatios(*ratios), beta=beta, alpha=0.25)
    )
    margin = ratios[0] - ratios[1]
    assert circle["objective"]("IPO", ratios[:2]).item() == pytest.approx(
        (margin - 0.5 / beta).square().mean().item(), rel=1e-5
    )
    assert circle["objective"]("DPO", ratios[:2]).item() == pytest.approx(
        (1 + (-beta * margin).exp()).log().mean().item(), rel=1e-5
    )


def test_evaluation_of_a_known_model(circle):
    """It writes uniformly, and revises into what beats the last letter of the draft's class, whatever that is."""
    table = torch.zeros(8, 8)
    table[7, 1] = table[7, 4] = 30.0  # every revision is paper
    result = circle["evaluate"](Fixed(table), [[0, 0]] * 1000 + [[1, 0]] * 1000, 0)
    assert result["generator"] == pytest.approx([1 / 3] * 3, abs=0.04)
    assert result["exploitability"] == pytest.approx(0.5, abs=0.04)
    assert result["improvement"] == pytest.approx((0.95 + 0.5) / 2)
    assert result["against_drafts"][0] == pytest.approx(0.5, abs=0.04) and result["against_drafts"][1:] == [0.5, 0.5]
    assert result["table"][:2] == pytest.approx(np.array([[0, 1, 0], [0, 1, 0]]))


def test_judge_is_the_circle(circle):
    judge = circle["task"].judge
    texts = [[a, b] for a, b in itertools.product(range(6), range(2))]
    for a, b in itertools.product(texts, texts):
        p, q = (float(judge([[]], [x], [y])[0]) for x, y in ((a, b), (b, a)))
        assert p + q == pytest.approx(1)
        assert p == pytest.approx({0: 0.5, 1: 0.95, 2: 0.05}[(a[0] - b[0]) % 3])


def test_why_dpo_does_not_move_on_every_table():
    """The reason in the ledger: where the policy stays, both writers lead it to one completion, and its scores do move."""
    flat, skewed = torch.full((4,), 0.25, dtype=torch.float64), torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
    still = []
    for seed in range(500, 512):
        upper = np.triu(np.random.default_rng(seed).uniform(size=(4, 4)), 1)
        p = torch.tensor(upper + np.tril(1 - upper.T, -1) + np.eye(4) / 2)
        policies = [S.dpo_optimum(p, flat, mu, beta=0.3) for mu in (flat, skewed)]
        if (policies[0] - policies[1]).abs().sum() / 2 > 0.01:
            continue
        still.append(seed)
        assert policies[0].argmax() == policies[1].argmax() and min(q.max() for q in policies) > 0.999
        scores = [0.3 * (q.log() - q.log().mean()) for q in policies]
        assert (scores[0] - scores[1]).abs().max() > 0.1
    assert len(still) == 2


# The profile `full`

WORDS = "the cat sat on mat a dog ran far home and then it was gone".split()


@pytest.fixture(scope="module")
def hub(tmp_path_factory, torchvision):  # transformers imports torchvision where it is installed
    """A GPT-2 with a few hundred weights, a judge, and data sets of few words."""
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("hub")
    vocabulary = {word: k for k, word in enumerate(["<end>", "?", ":", "TL", "DR", ";", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = transformers.GPT2Config(
        vocab_size=len(vocabulary), bos_token_id=0, eos_token_id=0, pad_token_id=0, n_positions=64, n_embd=8, n_layer=1,
        n_head=2, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    for name, model in (("model", transformers.GPT2LMHeadModel), ("judge", transformers.GPT2ForSequenceClassification)):
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
        tokenizer.save_pretrained(root / name)
        model(sizes).save_pretrained(root / name)
    rng = np.random.default_rng(0)
    text = lambda low, high: " ".join(rng.choice(WORDS, int(rng.integers(low, high))))
    records = {
        "preferences": ("train", [dict(prompt=f"{text(5, 12)}\n\nTL;DR:", chosen=text(1, 9), rejected=text(1, 9)) for _ in range(100)]),
        "articles": ("validation", [dict(document=text(5, 12), summary=text(2, 6)) for _ in range(20)]),
    }  # fmt: skip
    for name, (split, rows) in records.items():
        (root / name / "data").mkdir(parents=True)
        (root / name / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
    patch.setattr(lab, "load_hub_dataset", _from_folder(lab.load_hub_dataset))
    try:
        yield root, patch
    finally:
        patch.undo()


def _from_folder(load):
    """A folder of files keeps them in `data`."""
    return lambda name, columns, split: load(f"{name}/data", columns, split=split)


def test_full_profile(hub):
    root, patch = hub
    sizes = TINY | dict(
        model=root / "model",
        judge=root / "judge",
        preferences=str(root / "preferences"),
        articles=str(root / "articles"),
    )
    sizes |= dict(prompt_tokens=10, answer_tokens=8, sft_batch=4, chunk=16, sft_lr=1e-3, lr=1e-3)
    names = run_full("language/srpo", patch, until="trained", sizes=sizes)
    task = names["task"]
    lengths = {writer: [len(w) + len(l) for _, w, l, _ in pairs] for writer, pairs in task.pairs.items()}
    assert set(lengths) == {"short", "long"} and max(lengths["short"]) <= min(lengths["long"])
    assert len(task.prompts) == 12 and all(answer[-1] == task.end for answer in task.rivals["human"])
    prompt, draft = task.prompts[0], task.rivals["human"][0]
    context = task.revise(prompt, draft)
    assert context[: len(prompt)] == prompt and task.end not in context
    assert (
        task.generate(prompt) == prompt + context[len(prompt) : len(prompt) + len(task.generate(prompt)) - len(prompt)]
    )
    judged = task.judge(task.prompts, task.rivals["human"], task.prompts)
    assert judged + task.judge(task.prompts, task.prompts, task.rivals["human"]) == pytest.approx(np.ones(12), abs=1e-5)
    assert len(names["trained"]) == 3 * 2 * 2 + 2 + 2
    for job, result in names["trained"].items():
        assert len(result["losses"]) == (0 if job[0] == "reference" else 20) and np.isfinite(result["losses"]).all()
        assert result["generator"].sum() == pytest.approx(1) and result["table"].sum(1) == pytest.approx(np.ones(4))
        assert 0 < result["improvement"] < 1 and len(result["against_drafts"]) == 3
    first = [names["trained"]["DPO", "short", seed]["losses"][0] for seed in (0, 1)]
    assert first == pytest.approx([np.log(2)] * 2, abs=1e-3)  # all log-ratios start at 0
