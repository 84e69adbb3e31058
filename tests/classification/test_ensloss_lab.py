"""What the lab's own functions promise, and its `full` profile on small generated data of CIFAR-10's and OpenML's form."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from full_profile import run_full

from lossbook import lab

SIZES = dict(
    parts=(16, 8, 8), epochs=2, noise_epochs=8, batch=4, seeds=(0, 1), class_seeds=(0, 1), classes=(20, 10, 20), class_epochs=2, class_batch=8,
    hidden=(8, 8), rows=(20, 10, 12), splits=range(3), table_epochs=2, table_batch=8,
)  # fmt: skip


def few_images(*, train):
    """Sixteen images a class, each class a color of its own."""
    labels = torch.arange(10).repeat(16)
    colors = torch.rand(10, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return lab.Images((colors[labels] + 0.1 * noise).clamp(0, 1), labels, tuple("abcdefghij"))


def few_rows(*, data_id, return_X_y, as_frame, data_home):
    """Arrays as OpenML gives them without pandas: features as floats, labels as strings."""
    assert return_X_y and not as_frame and data_home
    rng = np.random.default_rng(data_id)
    x = rng.normal(size=(60, 4))
    return x, np.where(x[:, 0] + 0.1 * rng.normal(size=60) > 0, "2", "1").astype(object)


@pytest.fixture(scope="module")
def full():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab, "load_cifar10", few_images)
        patch.setattr("sklearn.datasets.fetch_openml", few_rows)
        network = lambda outputs: lab.ResNet(3, outputs, width=4, blocks=(1, 1))
        return run_full("classification/ensloss", patch, until="significant", sizes=SIZES | dict(network=network))


def test_full_profile_trains_every_loss_on_every_kind_of_data(full):
    assert set(full["tables"]) == set(full["OPENML"]) and len(full["tables"]) == 14
    for kind, names in full["NAMES"].items():
        assert full["accuracy"][kind].shape[:2] == (len(names), 3 if kind == "tables" else 2)
        assert ((full["accuracy"][kind] >= 0) & (full["accuracy"][kind] <= 1)).all()
    assert full["accuracy"]["pairs"].shape[2] == 3
    for name in full["FIXED"]:
        assert sum(full["wins"]("pairs", name)) == 3 and sum(full["significant"](name)) == 14
        assert 0 <= full["holm"]("tables")[name] <= 1


def test_the_best_rate_is_chosen_by_validation(full):
    # (times, parts, losses, tasks, rates): validation prefers rate 1 for the first loss and rate 0 for the second.
    record = np.zeros((1, 2, 2, 3, 2))
    record[0, 0, 0, :, 1] = record[0, 0, 1, :, 0] = 1
    record[0, 1, 0], record[0, 1, 1] = [0.2, 0.3], [0.4, 0.5]
    np.testing.assert_array_equal(full["at_best"](record), [[0.3] * 3, [0.4] * 3])


def test_parts_are_disjoint_and_only_training_and_validation_labels_are_flipped(full):
    clean, noisy = full["pair_data"](), full["pair_data"](flip=0.5)
    for part, (a, b) in enumerate(zip(clean, noisy, strict=True)):
        assert torch.equal(a[0], b[0])
        assert (a[1] == b[1]).all() == (part == 2)
    for task in range(len(clean[0][1])):
        rows = torch.cat([part[0][task] for part in clean]).flatten(1)
        assert len(rows.unique(dim=0)) == len(rows)
    x, y = full["class_data"](blur=True)[0]
    for task in range(2):  # ten copies of an image, with its class four times and the two next ones three times
        copies = x[task].view(10, 20, -1)
        assert (copies == copies[0]).all()
        counts = ((y[task].view(10, 20) - y[task][:20]) % 10).long()
        for image in range(20):
            assert torch.bincount(counts[:, image], minlength=10).tolist() == [4, 3, 3] + [0] * 7


def test_tables_are_split_by_class_and_standardized_by_the_training_part(full):
    x, y = few_rows(data_id=1, return_X_y=True, as_frame=False, data_home="x")
    parts = full["split_table"](x, y == "2", 0)
    assert [len(part[1]) for part in parts] == [20, 10, 12]
    torch.testing.assert_close(parts[0][0].mean(0), torch.zeros(4), atol=0.2, rtol=0)  # but for what is cut off at 5
    share = (y == "2").mean()
    assert abs(parts[0][1].float().mean() - share) < 0.06
    rows = torch.cat([part[0] for part in parts])
    assert len(rows.unique(dim=0)) == len(rows)


def test_corrected_t_is_wider_than_the_plain_one(full):
    from scipy import stats

    values = np.array([0.01, 0.03, 0.02, 0.04, 0.0])
    plain = stats.ttest_1samp(values, 0).pvalue
    assert full["corrected_t"](values, 0.0) == pytest.approx(plain)
    t = values.mean() / (values.std(ddof=1) * math.sqrt(1 / 5 + 0.5))
    assert full["corrected_t"](values, 0.5) == pytest.approx(2 * stats.t.sf(t, 4)) and t > 0
    assert full["corrected_t"](np.zeros(5), 0.5) == 1.0


def test_stacked_training_equals_one_network_in_a_plain_loop(full):
    torch.manual_seed(0)
    x, y = torch.randn(2, 24, 6), torch.randint(2, (2, 24))
    test = torch.randn(2, 500, 6), torch.randint(2, (2, 500))
    network = lambda: lab.MLP([6, 8, 1], batch_norm=True)
    data, rates, epochs, batch = [(x, y), test], (0.01, 0.1), 3, 6
    stacked = full["train"](["logistic", "hinge"], data, network, epochs, batch, rates, every=1)
    assert stacked.shape == (3, 1, 2, 2, 2)
    lab.seed_all(7)
    starts = [network() for _ in range(2)]
    for task, rate in ((0, 0), (1, 1)):
        net = copy.deepcopy(starts[task])
        optimizer = torch.optim.SGD(net.parameters(), lr=rates[rate], momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 4)
        order = torch.Generator().manual_seed(7)
        for epoch in range(epochs):
            for index in torch.rand(2, 24, generator=order).argsort(1)[task].split(batch):
                optimizer.zero_grad()
                target = y[task, index].float()
                F.binary_cross_entropy_with_logits(net(x[task, index])[:, 0], target).backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 10)
                optimizer.step()
                schedule.step()
            net.eval()
            hits = ((net(test[0][task])[:, 0] > 0).long() == test[1][task]).float().mean().item()
            net.train()
            assert stacked[epoch, 0, 0, task, rate] == pytest.approx(hits, abs=0.0041)  # two of 500 by rounding
    torch.set_num_threads(1)
