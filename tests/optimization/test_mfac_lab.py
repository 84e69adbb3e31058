"""The lab's `full` profile, on a few generated images of CIFAR's shape, and what the lab's own functions promise."""

import math

import numpy as np
import pytest
import torch
from full_profile import run_full
from torch.nn.utils import parameters_to_vector

from lossbook import lab
from lossbook.optimization import mfac as M


def few_images(*, train):
    """Images of CIFAR-10's shape, a color for each class."""
    labels = torch.arange(10).repeat(5 if train else 2)
    colors = torch.rand(10, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(int(train)))
    return lab.Images((colors[labels] + 0.2 * noise).clamp(0, 1), labels, tuple("abcdefghij"))


SMALL = dict(
    net=lambda: lab.ResNet(width=4, blocks=(1, 1)), batch=8, steps=7, tuning_steps=2, windows=(1, 4), dimensions=(200, 400), dense=(50,),
    cost_window=4, pruned_steps=3, num_grads=6, block=50, sparsities=(0.8, 0.9), gradient_counts=(4, 6), seeds=range(2), fresh=range(2),
)  # fmt: skip


@pytest.fixture(scope="module")
def full():
    """The lab's names after all cells, with the claims written down instead of judged."""
    patch, claims, nets = pytest.MonkeyPatch(), {}, {}

    def change(source, names):
        if "size" in names and "net" not in nets:
            nets["net"] = names["SIZES"]["quick"]["net"]
        if "interact(" in source:
            return source.split("\ninteract(")[0] + "\nexplore(3, 0.1)"
        return source + ("\ndone = True" if '"own-curvature"' in source else "")

    patch.setattr(lab, "load_cifar10", few_images)
    patch.setattr(lab, "claim", lambda name, statement, **rest: claims.update({name: rest}))
    try:
        names = run_full("optimization/mfac", patch, until="done", sizes=SMALL, change=change)
        yield names | {"claims": claims}
    finally:
        patch.undo()


def test_every_run_is_there(full):
    tuned, trained = full["TUNED"], full["trained"]
    assert set(tuned) == {("M-FAC", 1), ("M-FAC", 4), ("SGD", 0), ("Adam", 0)}
    assert len(full["tuning"]) == 4 * 6 and all(tuned[how] in full["RATES"][how[0]] for how in tuned)
    assert len({len(rates) for rates in full["RATES"].values()}) == 1  # the same tuning for all
    for (_method, window, _rate, _seed, steps), found in trained.items():
        if math.isfinite(found["loss"]) and window:
            assert (
                found["shares"].shape == found["others"].shape == found["cosines"].shape == (round(steps / 2),)
            )  # before the first milestone
            assert found["shares"].max() <= 1.01 and (np.abs(found["cosines"]) <= 1.001).all()
            assert found["coefficients"][0].shape == (window, window)
            if window == 1:
                np.testing.assert_allclose(found["cosines"], 1, atol=1e-2)
                np.testing.assert_allclose(found["others"], 0, atol=1e-6)
                assert found["afresh"] == 0
            else:
                assert abs(found["afresh"]) < 1.01 and (found["afresh"] or steps < 4)
    assert len(full["pruned"]) == 6 * 2 * 2 + 2 + 2
    assert all(0 <= a <= 1 and math.isfinite(loss) for loss, a in full["pruned"].values())
    assert max(full["differences"]) < 1e-8 and set(full["seconds"]) == {50, 200, 400}


def test_every_claim_is_asked(full):
    assert len(full["claims"]) == 15 and "joint-update" not in full["claims"]  # too large for all weights of a ResNet
    assert "expected" not in full["claims"]["above-first-order"]  # this excuse is that of the quick profile


def test_sizes_of_the_full_profile():
    """The network of the full profile is a ResNet-20."""
    net = lab.ResNet(width=16, blocks=(3, 3, 3))
    count = sum(p.numel() for p in net.parameters())
    assert 265_000 < count < 280_000


def test_training_is_that_of_the_optimizer(full):
    """The lab's loop, written again: same weights after three steps, so the same final loss."""
    lab.seed_all(1)
    net = SMALL["net"]()
    optimizer = M.MFAC(net.parameters(), lr=1e-3, num_grads=4, weight_decay=3e-3)
    images, labels, *_ = full["load"](1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        index = torch.randint(len(images), (8,), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net.train()(images[index]), labels[index]).backward()
        optimizer.step()
        for group in optimizer.param_groups:  # halves and three quarters of three steps are steps 2 and 2
            group["lr"] = 1e-3 if _ < 1 else 1e-5
    wanted, _ = full["evaluate"](net, images, labels)
    assert full["train"]("M-FAC", 4, 1e-3, 1, 3)["loss"] == pytest.approx(wanted, rel=1e-3)


def test_pruners_keep_what_they_promise(full, monkeypatch):
    """The share that is left; the control hands over the same columns in another order; a diverging run is no result."""
    seen, real = [], M.prune_obs

    def spy(weights, grad_fn, sparsity, **options):
        rows = grad_fn(weights.clone())
        seen.append((rows, options))
        found = real(weights, lambda w: rows, sparsity, **options)
        assert (found != 0).sum() == round(len(found) * (1 - sparsity))
        return found

    monkeypatch.setattr(M, "prune_obs", spy)
    for name in ("OBS, 4 rounds", "curvature of others, 16 rounds", "diagonal, 16 rounds"):
        full["prune"](name, 0.9, 6, 0)
    (own, four), (other, _), (_, diagonal) = seen
    assert own.dtype == torch.float64 and own.shape[0] == 6
    assert (four["rounds"], four["block_size"]) == (4, 50) and diagonal["block_size"] == 1
    assert not torch.equal(own, other)
    torch.testing.assert_close(own.sort(dim=1).values, other.sort(dim=1).values)


def test_quick_splits_do_not_overlap(full):
    full["size"]["data"], kept = "digits", full["size"]["data"]
    full["size"]["train"], train = 1300, full["size"]["train"]
    try:
        a, y, b, z = full["load"](3)
    finally:
        full["size"]["data"], full["size"]["train"] = kept, train
    assert len(a) == len(y) == 1300 and len(b) == len(z) == 497
    everything = torch.cat([a, b]).flatten(1).sum(1).sort().values
    assert torch.equal(everything, lab.load_digits().images.flatten(1).sum(1).sort().values)
    assert parameters_to_vector(lab.MLP([64, 32, 10]).parameters()).numel() == 2410


def test_gradients_taken_afresh(full, monkeypatch):
    """With the same batch again and again, today's gradient of an earlier one is the step's own: the same share of the bound."""
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: torch.arange(8))
    monkeypatch.setitem(full["size"], "decay", (0, 0, 0))
    found = full["train"]("M-FAC", 4, 1e-4, 0, 4)
    assert found["afresh"] == pytest.approx(found["shares"][1], rel=1e-3)
