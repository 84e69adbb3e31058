"""The lab's `full` profile on a few generated documents of seven domains, and what the lab's own functions promise."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from full_profile import run_full

from lossbook import lab

DOMAINS = ("ArXiv", "Book", "C4", "CommonCrawl", "Github", "StackExchange", "Wikipedia")
asked = []


class Words:
    """A tokenizer of single characters, with an end-of-text token."""

    eos_token_id = 11

    def __call__(self, text):
        return SimpleNamespace(input_ids=[int(c) for c in text])

    def __len__(self):
        return 12


def documents(name, columns, *, split, streaming):
    """Endless documents in which each digit follows the one before; every seventh is of one domain."""
    asked.append((name, columns, split, streaming))
    number = 0
    while True:
        digits = "".join(str((number + i) % 10) for i in range(40))
        yield dict(text=digits, meta=dict(redpajama_set_name=f"RedPajama{DOMAINS[number % 7]}"))
        number += 1


@pytest.fixture(scope="module")
def names():
    patch = pytest.MonkeyPatch()
    patch.setattr(lab, "load_hub_dataset", documents)
    patch.setattr(lab, "load_language_model", lambda name: (None, Words()))
    sizes = dict(tokens=5000, dim=16, depth=1, heads=2, length=9, batch=12, steps=30, warmup=5, lr=0.02, passages=3)
    sizes |= dict(pages=200, test=15, checks=3, seeds=(0, 1), more=(2,))
    try:
        yield run_full("language/reweighting", patch, until="explore", sizes=sizes)
    finally:
        patch.undo()


def test_text_comes_in_streams(names):
    assert asked == [("DKYoon/SlimPajama-6B", ["text", "meta"], split, True) for split in ("train", "test")]
    assert len(names["train_stream"]) == 4800 and len(names["pages"]) == 200 and names["vocabulary"] == 12
    assert names["train_stream"][:42].tolist() == [i % 10 for i in range(40)] + [11, 1]  # documents end by the token
    assert set(names["test"]) == {f"RedPajama{d}" for d in DOMAINS}
    for part in names["test"].values():
        assert part.shape == (15, 9) and part.dtype == torch.int64


def test_windows(names):
    stream = torch.arange(50)
    spaced = names["spaced"](stream, 3)
    assert spaced[:, 0].tolist() == [0, 20, 41] and (spaced.diff(dim=1) == 1).all()
    drawn = names["random_windows"](stream, 500, torch.Generator().manual_seed(0))
    assert drawn.min() == 0 and drawn.max() == 49 and (drawn.diff(dim=1) == 1).all()


def test_batches_are_mixed_as_the_table_says(names):
    generator = torch.Generator().manual_seed(0)
    passages = {tuple(row) for row in names["passages"].tolist()}
    assert len(passages) == 3
    wanted = {
        "repetition": [6, 6, 0],
        "repetition and noise": [5, 6, 1],
        "diverse": [12, 0, 0],
        "narrow": [6, 6, 0],
    }
    for mixture, counts in wanted.items():
        tokens, got = names["draw"](mixture, generator)
        assert got == counts and tokens.shape == (12, 9)
        repeated = tokens[got[0] : got[0] + got[1]]
        if names["MIXTURES"][mixture][2]:
            assert all(tuple(row) in passages for row in repeated.tolist())
        elif counts[1]:
            assert not all(tuple(row) in passages for row in repeated.tolist())
    again = [names["draw"]("narrow", torch.Generator().manual_seed(7))[0] for _ in range(2)]
    assert torch.equal(*again)


def test_every_run_is_recorded(names):
    more = {(*job, seed) for job in names["FASTER"] for seed in (2,)}
    assert set(names["trained"]) == {(*job, seed) for job in names["RUNS"] for seed in (0, 1)} | more
    for (mixture, name, _, _), result in names["trained"].items():
        shares = result["shares"]
        assert shares.shape == (30, 3) and shares.sum(1) == pytest.approx(1, abs=1e-4)
        assert shares[:5] == pytest.approx(np.tile(np.array(result["counts"]) / 12, (5, 1)), abs=1e-5)  # burn-in
        assert [step for step, _ in result["curve"]] == ([10, 20, 30] if mixture == "repetition" else [])
        assert len(result["last"]) == 12
        assert np.isfinite(result["loss"]) and result["loss"] == pytest.approx(
            np.mean(list(result["domains"].values()))
        )
        if name == "uniform":
            assert np.abs(result["alignments"]).max() < 1e-5
        if name in ("LinUpper", "DRO"):
            assert (result["alignments"] > -1e-5).all() and result["alignments"][5:].max() > 1e-3
        if mixture == "diverse":
            assert result["loss"] < 2.0  # of log 12 = 2.48: it learns


def test_strategies_see_the_same_batches(names):
    """Uniform weights and a shuffle differ in nothing before the burn-in ends."""
    one, other = (names["trained"]["repetition", name, 1.0, 0] for name in ("uniform", "shuffled"))
    assert one["counts"] == other["counts"] and np.array_equal(one["shares"][:5], other["shares"][:5])
    assert not np.array_equal(one["shares"][6:], other["shares"][6:])


def test_regression_is_the_chapters(names):
    result = names["regression"]("uniform", 0)
    assert result["F"][299] == pytest.approx(0.0444, abs=2e-4) and result["mean"] == pytest.approx(0.410, abs=1e-3)
    assert result["bound"] == pytest.approx(0.853, abs=1e-3) and np.abs(result["A"]).max() < 1e-12
