"""The lab's `full` profile on a few generated posts, handed to it as scikit-learn would: the path that `quick` does not take."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from full_profile import run_full


def few_posts(*, subset, remove):
    """Sentences of a small language in which the next word follows from the last two."""
    assert remove == ("headers", "footers", "quotes")
    rng = np.random.default_rng(0 if subset == "train" else 1)
    posts = []
    for _ in range(60 if subset == "train" else 20):
        words = list(rng.integers(0, 40, 2))
        for _ in range(40):
            words.append((2 * words[-1] + words[-2] + 1) % 40)
        posts.append(
            " ".join("w" + chr(97 + w % 26) + chr(97 + w // 26) for w in words)
            + ("" if subset == "train" else " unseen")
        )
    posts[0] = ""  # some posts are empty after the removal
    return SimpleNamespace(data=posts)


@pytest.fixture
def names(monkeypatch):
    monkeypatch.setattr("sklearn.datasets.fetch_20newsgroups", few_posts)
    sizes = dict(positions=900, epochs=2, batch=32, embedding=8, hidden=15, context=3, seeds=(0, 1), rounds=1)
    sizes |= dict(classes=(10**3, 2 * 10**3, 3 * 10**3), dense=(10**3, 2 * 10**3))

    def small(source, names):
        """Two losses, and layers of a few thousand classes in the place of a hundred thousand and a million."""
        if source.startswith("RATES"):
            source += '\nRATES = {name: RATES[name] for name in ("cross-entropy", "Z (0.3, 10)", "Z (1, 10)")}'
        for large, few in (("10**6", "3 * 10**3"), ("10**5", "2 * 10**3"), ("steps=300", "steps=20")):
            source = source.replace(large, few)
        return source

    return run_full("classification/z_loss", monkeypatch, until="amortized", sizes=sizes, change=small)


def test_full_profile_trains_and_times(names):
    data, vocabulary = names["data"], names["vocabulary"]
    assert vocabulary[0] == "<unknown>" and len(vocabulary) == 41
    assert all(windows.shape[1] == 4 and (windows[:, -1] > 0).all() for windows in data.values())
    assert not any("unseen" in word for word in vocabulary)
    assert set(names["measured"]) == {(name, seed) for name in names["RATES"] for seed in (0, 1)}
    for result in names["measured"].values():
        assert all(
            0 <= later <= earlier <= 100 for earlier, later in zip(result["errors"], result["errors"][1:], strict=False)
        )
        assert sum(result["scores"]) == pytest.approx(1, abs=1e-5)
    distance = (names["factored_weight"] - names["dense_weight"]).norm() / names["dense_weight"].norm()
    assert distance < 1e-8
    assert set(names["step_time"]) >= {(name, n) for name in ("factored", "dense", "adaptive") for n in (1000, 2000)}
    assert all(seconds > 0 for seconds in [*names["step_time"].values(), *names["refactor_time"].values()])
    assert 1 <= names["period"] <= 300 and names["amortized"] > 0


def test_training_learns_and_the_parts_share_no_post(names):
    frequent = np.mean([100 * (names["data"]["test"][:, -1] > k).double().mean().item() for k in names["KS"]])
    learned = names["measured"]["Z (0.3, 10)", 0]["errors"]
    assert np.mean(learned) < frequent
    parts = [part for part, _ in names["documents"]()]
    assert parts.count("test") == 20 and parts.count("validation") == 6 and parts.count("train") == 54


def test_standardized_scores_need_no_logits(names):
    network, layer, _ = names["train"]("Z (0.3, 10)", 10.0, 0)
    windows = names["data"]["test"][:50]
    scores = names["standardized"](network, layer, windows)
    logits = layer.logits(network(windows[:, :-1])).double()
    z = (logits - logits.mean(1, keepdim=True)) / logits.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(scores, z.gather(1, windows[:, -1:]).squeeze(1), rtol=1e-4, atol=1e-4)
