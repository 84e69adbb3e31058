"""The theorems of chapter similarity/tcm as properties; oracles, closed forms, limits, extremes and bad input."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from two_processes import in_two_processes

from lossbook.similarity import tcm as M
from lossbook.similarity.temperature import simplex_embedding

float64 = torch.float64
seeds = st.integers(0, 2**31)
few = settings(deadline=None, max_examples=40)


def draw(seed, n=12, d=4, classes=3, dtype=float64):
    """Points that crowd around a few centers, and their labels: both kinds of hard pairs occur."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat(
        [torch.arange(classes).repeat(2), torch.randint(classes, (n - 2 * classes,), generator=generator)]
    )
    labels = labels[torch.randperm(n, generator=generator)]
    centers = torch.randn(classes, d, generator=generator, dtype=float64)
    points = centers[labels] + 0.7 * torch.randn(n, d, generator=generator, dtype=float64)
    return points.to(dtype), labels


def slow_cosines(x):
    rows = [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in x.tolist()]
    return [[sum(a * b for a, b in zip(p, q, strict=True)) for q in rows] for p in rows]


def slow_tcm(x, labels, high=0.9, low=0.5):
    """The loss pair by pair, each unordered pair once: the means of both sides."""
    s, sides = slow_cosines(x), ([], [])
    for i in range(len(s)):
        for j in range(i):
            if labels[i] == labels[j] and s[i][j] <= high:
                sides[0].append(high - s[i][j])
            if labels[i] != labels[j] and s[i][j] >= low:
                sides[1].append(s[i][j] - low)
    return [sum(side) / len(side) if side else 0.0 for side in sides]


def plane(angles):
    """Unit vectors in the plane at these angles, in degrees."""
    angles = torch.tensor(angles, dtype=float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


# --- the loss ---------------------------------------------------------------------------------------------------------


@few
@given(seeds, st.floats(-0.2, 0.95), st.floats(0.05, 0.8), st.integers(1, 13))
def test_loss_equals_the_slow_loop(seed, high, gap, chunk_size):
    x, labels = draw(seed)
    options = dict(positive_margin=high, negative_margin=max(high - gap, -1))
    loss, *parts = M.tcm_loss(
        x, labels, positive_weight=2.0, negative_weight=0.3, return_parts=True, chunk_size=chunk_size, **options
    )
    slow = slow_tcm(x, labels.tolist(), high, max(high - gap, -1))
    assert [part.item() for part in parts] == pytest.approx(slow, abs=1e-12)
    assert loss.item() == pytest.approx(2 * slow[0] + 0.3 * slow[1], abs=1e-12)


def test_the_loss_of_six_similarities_by_hand():
    positive, negative = torch.tensor([0.95, 0.8, 0.5]), torch.tensor([0.6, 0.2, 0.5])
    loss, *parts = M.tcm_loss_from_similarity(positive, negative, return_parts=True)
    # 0.95 is no hard positive; the negative at the margin itself counts in the mean of its side.
    assert [loss.item(), *(part.item() for part in parts)] == pytest.approx([0.30, 0.25, 0.05], abs=1e-6)


def test_a_positive_at_its_margin_counts():
    loss = M.tcm_loss_from_similarity(torch.tensor([0.5, 0.75]), torch.zeros(0), positive_margin=0.75)
    assert loss.item() == 0.125


@few
@given(seeds)
def test_gradient_on_similarities_is_shared_equally(seed):
    generator = torch.Generator().manual_seed(seed)
    positive, negative = (2 * torch.rand(n, generator=generator, dtype=float64) - 1 for n in (20, 30))
    positive[0], negative[0] = 0.0, 0.9  # at least one hard pair a side
    positive.requires_grad_(), negative.requires_grad_()
    loss = M.tcm_loss_from_similarity(positive, negative, positive_weight=2.0, negative_weight=0.7)
    pull, push = torch.autograd.grad(loss, [positive, negative])
    hard = (positive <= 0.9).double(), (negative >= 0.5).double()
    torch.testing.assert_close(pull, -2.0 * hard[0] / hard[0].sum())
    torch.testing.assert_close(push, 0.7 * hard[1] / hard[1].sum())
    assert pull.sum().item() == pytest.approx(-2.0) and push.sum().item() == pytest.approx(0.7)


@few
@given(seeds, st.integers(1, 13))
def test_gradient_in_the_embedding_equals_that_of_all_pairs(seed, chunk_size):
    x, labels = draw(seed)
    x.requires_grad_()
    one, other = torch.triu_indices(len(x), len(x), offset=1)
    values = [
        M.tcm_loss(x, labels, chunk_size=chunk_size, positive_weight=1.5),
        M.tcm_loss(x, labels, pairs=(one, other), positive_weight=1.5),
    ]
    z = F.normalize(x, dim=1)
    s, same = (z @ z.T)[one, other], labels[one] == labels[other]
    values.append(M.tcm_loss_from_similarity(s[same], s[~same], positive_weight=1.5))
    for value in values:
        assert value.item() == pytest.approx(values[0].item(), abs=1e-12)
        (grad,) = torch.autograd.grad(value, x, retain_graph=True)
        torch.testing.assert_close(grad, torch.autograd.grad(values[0], x, retain_graph=True)[0], rtol=0, atol=1e-12)


def test_a_row_is_no_pair_with_itself():
    x = torch.eye(3, dtype=float64)[[0, 0, 1, 2]]
    x[1, 1] = 0.75  # a cosine of 0.8 with the first row; at a margin of 1 a row would be hard with itself
    loss = M.tcm_loss(x, torch.tensor([0, 0, 1, 2]), positive_margin=1.0, negative_margin=0.7)
    assert loss.item() == pytest.approx(0.2)


@few
@given(seeds)
def test_pairs_take_margins_and_weights(seed):
    x, labels = draw(seed)
    one, other = torch.triu_indices(12, 12, offset=1)
    slow = slow_tcm(x, labels.tolist(), 0.8, 0.4)
    options = dict(positive_margin=0.8, negative_margin=0.4, positive_weight=2.0, negative_weight=0.3)
    loss, *parts = M.tcm_loss(x, labels, pairs=(one, other), return_parts=True, **options)
    assert [part.item() for part in parts] == pytest.approx(slow, abs=1e-12)
    assert loss.item() == pytest.approx(2 * slow[0] + 0.3 * slow[1], abs=1e-12)


def test_similarities_take_margins():
    positive, negative = torch.tensor([0.95, 0.7], dtype=float64), torch.tensor([0.4, 0.1], dtype=float64)
    options = dict(positive_margin=0.8, negative_margin=0.2, positive_weight=2.0, negative_weight=0.3)
    loss = M.tcm_loss_from_similarity(positive, negative, **options)
    assert loss.item() == pytest.approx(2 * 0.1 + 0.3 * 0.2, abs=1e-12)


def test_pairs_select():
    x, labels = draw(0)
    chosen = torch.tensor([0, 3, 5]), torch.tensor([1, 2, 9])
    s, same = torch.tensor(slow_cosines(x))[chosen], labels[chosen[0]] == labels[chosen[1]]
    expected = M.tcm_loss_from_similarity(s[same].float(), s[~same].float())
    assert M.tcm_loss(x, labels, pairs=chosen).item() == pytest.approx(expected.item(), abs=1e-6)
    empty = torch.zeros(0, dtype=torch.int64)
    assert M.tcm_loss(x, labels, pairs=(empty, empty)).item() == 0


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_gradcheck(chunk_size):
    for seed in range(3):
        x, labels = draw(seed, n=8)
        loss = lambda x, labels=labels: M.tcm_loss(x, labels, chunk_size=chunk_size)
        assert loss(x) > 0.01
        assert torch.autograd.gradcheck(loss, [x.requires_grad_()])
        assert torch.autograd.gradgradcheck(loss, [x])


def test_no_hard_pair_gives_a_differentiable_zero():
    x = plane([0, 5, 120, 125]).requires_grad_()
    loss, *parts = M.tcm_loss(x, torch.tensor([0, 0, 1, 1]), return_parts=True)
    assert loss.requires_grad and [loss.item(), *(part.item() for part in parts)] == [0, 0, 0]
    loss.backward()
    assert (x.grad == 0).all()
    empty = torch.zeros(0)
    assert M.tcm_loss_from_similarity(empty, empty).item() == 0


def test_equal_rows_and_opposite_rows():
    for angles in ([0, 0, 0, 0], [0, 180, 0, 180]):
        x = plane(angles).float().requires_grad_()
        loss = M.tcm_loss(x, torch.tensor([0, 0, 1, 1]))
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all()
    assert M.tcm_loss(plane([0, 0]), torch.tensor([0, 1])).item() == pytest.approx(0.5)
    assert M.tcm_loss(plane([0, 180]), torch.tensor([0, 0])).item() == pytest.approx(1.9)


def test_repairing_a_small_violation_raises_the_loss():
    none = torch.zeros(0)
    before = M.tcm_loss_from_similarity(torch.tensor([0.5, 0.89]), none)
    after = M.tcm_loss_from_similarity(torch.tensor([0.5, 0.91]), none)
    assert [before.item(), after.item()] == pytest.approx([0.205, 0.4], abs=1e-6)


def test_the_mean_over_all_pairs_never_rises_when_a_violation_shrinks():
    angles = torch.tensor([0.0, 60, 27, 200, 210])
    labels = torch.tensor([0, 0, 0, 1, 1])
    loss, hinge = [], []
    for shift in (
        0.0,
        2.0,
    ):  # brings the third point within 25.8 degrees of the first, and no positive pair further apart
        x = plane((angles + torch.tensor([shift, 0, 0, 0, 0])).tolist())
        loss.append(M.tcm_loss(x, labels).item())
        hinge.append(M.class_hinges(x, labels)[0].sum().item())
    assert loss[1] > loss[0] and hinge[1] < hinge[0]


@few
@given(seeds)
def test_invariances(seed):
    x, labels = draw(seed)
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=float64))
    scale = torch.rand(12, 1, generator=generator, dtype=float64) + 0.1
    order = torch.randperm(12, generator=generator)
    loss = M.tcm_loss(x, labels).item()
    assert M.tcm_loss(scale * x @ rotation, labels).item() == pytest.approx(loss, abs=1e-12)
    assert M.tcm_loss(x[order], 7 - 3 * labels[order]).item() == pytest.approx(loss, abs=1e-12)


# --- peers ------------------------------------------------------------------------------------------------------------


def value_and_gradient(loss, x):
    x = x.detach().clone().requires_grad_()
    value = loss(x)
    return value.item(), torch.autograd.grad(value, x)[0]


@pytest.mark.parametrize("seed", range(5))
def test_equals_pytorch_metric_learning(seed):
    peers = pytest.importorskip("pytorch_metric_learning.losses")
    x, labels = draw(seed, n=32, d=8, classes=6, dtype=torch.float32)
    for weights in ((1.0, 1.0), (0.5, 3.0)):
        peer = peers.ThresholdConsistentMarginLoss(*weights, margin_plus=0.8, margin_minus=0.4)
        ours = lambda x, w=weights: M.tcm_loss(
            x, labels, positive_margin=0.8, negative_margin=0.4, positive_weight=w[0], negative_weight=w[1]
        )
        (value, grad), (peer_value, peer_grad) = (
            value_and_gradient(loss, x) for loss in (ours, lambda x, peer=peer: peer(x, labels))
        )
        assert value > 0.1 and value == pytest.approx(peer_value, abs=1e-6)
        torch.testing.assert_close(grad, peer_grad, rtol=0, atol=1e-6)


def test_is_a_contrastive_loss_over_violations():
    peers = pytest.importorskip("pytorch_metric_learning.losses")
    from pytorch_metric_learning.distances import CosineSimilarity

    x, labels = draw(1, n=24, classes=5)
    peer = peers.ContrastiveLoss(pos_margin=0.9, neg_margin=0.5, distance=CosineSimilarity())  # mean over the nonzero
    (value, grad), (peer_value, peer_grad) = (
        value_and_gradient(loss, x) for loss in (lambda x: M.tcm_loss(x, labels), lambda x: peer(x, labels))
    )
    assert value == pytest.approx(peer_value, abs=1e-10)
    torch.testing.assert_close(grad, peer_grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["TripletMarginLoss", "MultiSimilarityLoss", "SupConLoss"])
def test_adds_to_any_metric_loss(name):
    peers = pytest.importorskip("pytorch_metric_learning.losses")
    base = getattr(peers, name)()
    x, labels = draw(2, n=24, classes=5)
    (a, grad_a), (b, grad_b), (both, grad) = (
        value_and_gradient(loss, x)
        for loss in (
            lambda x: base(x, labels),
            lambda x: M.tcm_loss(x, labels),
            lambda x: base(x, labels) + M.tcm_loss(x, labels),
        )
    )
    assert both == pytest.approx(a + b) and b > 0.1
    torch.testing.assert_close(grad, grad_a + grad_b)
    # A few steps on the sum lower the mean violation.
    x = x.clone().requires_grad_()
    before = torch.cat(M.class_hinges(x, labels)[:2]).sum()
    optimizer = torch.optim.SGD([x], lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        (base(x, labels) + M.tcm_loss(x, labels)).backward()
        optimizer.step()
    assert torch.cat(M.class_hinges(x, labels)[:2]).sum() < 0.7 * before


def test_base_losses_equal_pytorch_metric_learning():
    peers = pytest.importorskip("pytorch_metric_learning.losses")
    x, labels = draw(3, n=24, classes=5)
    proxies = draw(4, n=10, classes=5)[0][:5].requires_grad_()
    peer = peers.NormalizedSoftmaxLoss(5, 4, temperature=1 / 16).double()
    peer.W.data = proxies.detach().T.clone()
    (value, grad), (peer_value, peer_grad) = (
        value_and_gradient(loss, x)
        for loss in (lambda x: M.normalized_softmax_loss(x, proxies, labels), lambda x: peer(x, labels))
    )
    assert value == pytest.approx(peer_value, abs=1e-9)
    torch.testing.assert_close(grad, peer_grad, rtol=0, atol=1e-9)
    M.normalized_softmax_loss(x, proxies, labels).backward()
    assert proxies.grad.abs().sum() > 0
    peer = peers.SupConLoss(temperature=0.2)
    (value, grad), (peer_value, peer_grad) = (
        value_and_gradient(loss, x)
        for loss in (lambda x: M.supervised_contrastive_loss(x, labels, temperature=0.2), lambda x: peer(x, labels))
    )
    assert value == pytest.approx(peer_value, abs=1e-9)
    torch.testing.assert_close(grad, peer_grad, rtol=0, atol=1e-9)


def slow_supcon(x, labels, tau):
    s, losses = slow_cosines(x), []
    for i, row in enumerate(s):
        others = [j for j in range(len(s)) if j != i]
        partners = [j for j in others if labels[j] == labels[i]]
        if partners:
            log = math.log(sum(math.exp(row[j] / tau) for j in others))
            losses.append(sum(log - row[j] / tau for j in partners) / len(partners))
    return sum(losses) / len(losses)


@few
@given(seeds, st.floats(0.05, 2), st.integers(1, 12))
def test_supervised_contrastive_equals_the_slow_loop(seed, tau, chunk_size):
    x, labels = draw(seed, n=9)
    labels[0] = 99  # alone in its class: no anchor, but still in the sums of the others
    loss = M.supervised_contrastive_loss(x, labels, temperature=tau, chunk_size=chunk_size)
    assert loss.item() == pytest.approx(slow_supcon(x, labels.tolist(), tau), rel=1e-10)


def test_supervised_contrastive_without_positives_is_a_differentiable_zero():
    x = draw(0, n=6)[0].requires_grad_()
    loss = M.supervised_contrastive_loss(x, torch.arange(6))
    loss.backward()
    assert loss.item() == 0 and (x.grad == 0).all()


def test_normalized_softmax_by_hand():
    z, proxies = plane([0, 100]), plane([10, 90, 200])
    logits = 16 * torch.tensor(slow_cosines(torch.cat([z, proxies])), dtype=float64)[:2, 2:]
    expected = F.cross_entropy(logits, torch.tensor([0, 2]))
    loss = M.normalized_softmax_loss(3 * z, 0.2 * proxies, torch.tensor([0, 2]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_normalized_softmax_with_proxies_of_any_length(scale):
    z, proxies = plane([0, 100]).float(), plane([10, 90, 200]).float()
    labels = torch.tensor([0, 2])
    scaled = (scale * proxies).requires_grad_()
    loss = M.normalized_softmax_loss(z, scaled, labels)
    assert loss.item() == pytest.approx(M.normalized_softmax_loss(z, proxies, labels).item(), rel=1e-6)
    (grad,) = torch.autograd.grad(loss, scaled)
    assert grad.isfinite().all() and grad.abs().sum() > 0


# --- theorems ---------------------------------------------------------------------------------------------------------


def row_gradient_sums(loss, n=8):
    s = torch.rand(n, n, generator=torch.Generator().manual_seed(0), dtype=float64).requires_grad_()
    (grad,) = torch.autograd.grad(loss(s), s)
    return grad.sum(1)


def test_ranking_losses_are_blind_to_the_offset_of_a_row():
    labels, eye = torch.arange(8) // 2, torch.eye(8, dtype=torch.bool)
    same = (labels[:, None] == labels) & ~eye
    softmax = lambda s: (torch.logsumexp(s.masked_fill(eye, -torch.inf) / 0.1, 1) - s[same] / 0.1).sum()
    triplet = lambda s: (s - s[same][:, None] + 0.2).masked_fill(same | eye, 0).clamp(min=0).sum()
    tcm = lambda s: M.tcm_loss_from_similarity(s[same], s[~same & ~eye], positive_weight=3.0)
    for ranking in (softmax, triplet):
        torch.testing.assert_close(row_gradient_sums(ranking), torch.zeros(8, dtype=float64), rtol=0, atol=1e-12)
    sums = row_gradient_sums(tcm)
    assert sums.abs().max() > 0.1 and sums.sum().item() == pytest.approx(-3 + 1)


@few
@given(seeds, st.floats(-0.5, 0.5).filter(lambda b: abs(b) > 0.01))
def test_a_shift_of_all_similarities_changes_tcm_and_no_softmax(seed, shift):
    generator = torch.Generator().manual_seed(seed)
    labels, eye = torch.arange(8) // 2, torch.eye(8, dtype=torch.bool)
    same = (labels[:, None] == labels) & ~eye
    s = (
        torch.rand(8, 8, generator=generator, dtype=float64) * 0.3 + 0.6
    )  # no positive leaves its set at a shift below 0
    softmax = lambda s: (torch.logsumexp(s.masked_fill(eye, -torch.inf) / 0.1, 1) - s[same] / 0.1).sum().item()
    tcm = lambda s: M.tcm_loss_from_similarity(s[same], s[:0, 0], positive_margin=1.0).item()
    assert softmax(s + shift) == pytest.approx(softmax(s), rel=1e-9)
    if shift < 0:
        assert tcm(s + shift) == pytest.approx(tcm(s) - shift)


@few
@given(seeds, st.integers(2, 6))
def test_zero_loss_means_one_threshold(seed, classes):
    """Classes of up to 25.8 degrees, each in a plane of its own: perfect at every threshold of the interval, OPIS 0."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(3)
    angles = 25.8 * torch.rand(3 * classes, generator=generator, dtype=float64)
    x = torch.zeros(len(labels), classes, 2, dtype=float64)
    x[torch.arange(len(labels)), labels] = plane(angles.tolist())
    x = x.flatten(1)
    assert M.tcm_loss(x, labels).item() == 0
    t = torch.linspace(math.sqrt(0.2), 1 - 1e-9, 50, dtype=float64)
    sensitivity, specificity, _ = M.operating_characteristics(x, labels, t)
    curves = M.utility(sensitivity, specificity)
    assert (curves == 1).all() and M.opis(curves, t).item() == 0


def test_the_simplex_is_consistent():
    centers = simplex_embedding(6, 8)
    x = torch.cat([math.sqrt(0.95) * centers.repeat_interleave(4, 0), math.sqrt(0.05) * torch.eye(24)], dim=1)
    labels = torch.arange(6).repeat_interleave(4)
    s = x @ x.T
    assert s[0, 1].item() == pytest.approx(0.95)
    t = torch.linspace(0.45, 0.99, 100, dtype=float64)
    sensitivity, specificity, classes = M.operating_characteristics(x, labels, t)
    assert M.tcm_loss(x, labels).item() == 0 and classes.tolist() == list(range(6))
    assert (M.utility(sensitivity, specificity) == 1).all()
    assert M.opis(M.utility(sensitivity, specificity), t).item() == 0


def test_the_interval_of_the_lemma_is_half_open():
    x, labels = plane([0, math.degrees(math.acos(0.9)), 100, 101]), torch.tensor([0, 0, 1, 1])
    t = torch.tensor([math.sqrt(0.2) - 1e-6, math.sqrt(0.2) + 1e-6], dtype=float64)
    sensitivity, _, _ = M.operating_characteristics(x, labels, t)
    assert sensitivity[0].tolist() == [0, 1]
    x = plane([0, 1, 61, 62])  # the inner pair is at 60 degrees, a distance of 1
    _, specificity, _ = M.operating_characteristics(x, labels, torch.tensor([1 - 1e-6, 1 + 1e-6], dtype=float64))
    assert specificity[0].tolist() == [1, 0.75]


def test_consistent_classes_need_not_have_zero_loss():
    x, labels = plane([0, 40, 130, 170]), torch.tensor([0, 0, 1, 1])  # within 40 degrees, between classes at least 90
    t = torch.linspace(0.7, 1.4, 20, dtype=float64)
    sensitivity, specificity, _ = M.operating_characteristics(x, labels, t)
    assert (M.utility(sensitivity, specificity) == 1).all() and M.tcm_loss(x, labels).item() > 0.1


@few
@given(seeds, st.floats(0.3, 3))
def test_small_hinges_bound_the_inconsistency(seed, c):
    x, labels = draw(seed, n=24, d=6, classes=4)
    high, low = 0.9, -0.5
    positive, negative, _ = M.class_hinges(x, labels, positive_margin=high, negative_margin=low)
    cosine = torch.linspace(low + 0.05, high - 0.05, 30, dtype=float64).flip(0)
    t = (2 - 2 * cosine).sqrt()
    sensitivity, specificity, _ = M.operating_characteristics(x, labels, t)
    miss, accept = positive[:, None] / (high - cosine), negative[:, None] / (cosine - low)
    assert (1 - sensitivity <= miss + 1e-12).all() and (1 - specificity <= accept + 1e-12).all()
    curves = M.utility(sensitivity, specificity, c=c)
    worst = torch.maximum(miss, accept).amax(0).clamp(max=1)
    assert (curves >= 1 - torch.maximum(miss, accept) - 1e-12).all()
    assert (curves.var(dim=0, correction=0) <= worst.square() / 4 + 1e-12).all()


@few
@given(seeds)
def test_the_loss_bounds_the_hinges_of_each_class(seed):
    x, labels = draw(seed)
    _, *parts = M.tcm_loss(x, labels, return_parts=True)
    *hinges, classes = M.class_hinges(x, labels)
    sizes = torch.tensor([(labels == c).sum().item() for c in classes])
    own, other = sizes * (sizes - 1) / 2, sizes * (12 - sizes)
    total = own.sum(), 12 * 11 / 2 - own.sum()
    for hinge, part, all_pairs, pairs in zip(hinges, parts, total, (own, other), strict=True):
        assert (hinge <= all_pairs / pairs * part + 1e-12).all()


def test_the_bound_of_the_loss_is_attained():
    # One class has both of the hard pairs and each of its pairs is hard; the other has no hard pair but as many pairs.
    x, labels = plane([0, 60, 180, 180]), torch.tensor([0, 0, 1, 1])
    loss, positive, _ = M.tcm_loss(x, labels, return_parts=True)
    assert positive.item() == pytest.approx(0.4) and M.class_hinges(x, labels)[0].tolist() == pytest.approx([0.4, 0])


@few
@given(seeds, st.integers(1, 20))
def test_class_hinges_equal_the_slow_loop(seed, chunk_size):
    x, labels = draw(seed)
    labels[0] = 99
    s = slow_cosines(x)
    positive, negative, classes = M.class_hinges(x, labels, chunk_size=chunk_size)
    names = [c for c in sorted(set(labels.tolist())) if labels.tolist().count(c) > 1]
    assert classes.tolist() == names
    for k, c in enumerate(names):
        rows = [i for i in range(12) if labels[i] == c]
        low = [max(0.9 - s[i][j], 0) for i in rows for j in rows if i != j]
        high = [max(s[i][j] - 0.5, 0) for i in rows for j in range(12) if labels[j] != c]
        assert positive[k].item() == pytest.approx(np.mean(low), abs=1e-12)
        assert negative[k].item() == pytest.approx(np.mean(high), abs=1e-12)


def test_kissing_numbers():
    six, seven = plane([60 * k for k in range(6)]), plane([360 / 7 * k for k in range(7)])
    assert M.tcm_loss(six, torch.arange(6)).item() == pytest.approx(0, abs=1e-12)
    assert M.tcm_loss(seven, torch.arange(7)).item() == pytest.approx(math.cos(2 * math.pi / 7) - 0.5, abs=1e-12)
    for dim, number in ((3, 12), (4, 24), (8, 240)):
        roots = torch.cartesian_prod(*[torch.tensor([-1.0, 0, 1])] * dim) if dim < 5 else e8_roots()
        roots = roots[roots.abs().sum(1) == 2] if dim < 5 else roots  # the vectors ±e_i ± e_j
        assert len(roots) == number
        assert M.tcm_loss(roots.double(), torch.arange(number)).item() == pytest.approx(0, abs=1e-12)


def e8_roots():
    pairs = [(i, j, a, b) for i in range(8) for j in range(i) for a in (-1.0, 1.0) for b in (-1.0, 1.0)]
    first = torch.zeros(len(pairs), 8)
    for row, (i, j, a, b) in enumerate(pairs):
        first[row, i], first[row, j] = a, b
    signs = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * 8)
    return torch.cat([first, signs[(signs < 0).sum(1) % 2 == 0]])


def test_perfect_recall_without_a_common_threshold():
    """Class A: positives at 0.2, a third class at 0.5. Class B: positives at 0.6, negatives at 1.2 or more."""
    distance = torch.full((6, 6), 1.2, dtype=float64)
    distance[:2, 4:] = distance[4:, :2] = 0.5
    for first, value in ((0, 0.2), (2, 0.6), (4, 0.2)):
        distance[first, first + 1] = distance[first + 1, first] = value
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    t = torch.linspace(0.1, 1.3, 1201, dtype=float64)
    sensitivity, specificity, _ = M.operating_characteristics(distance, labels, t, metric="precomputed")
    nearest = distance.fill_diagonal_(9).argmin(1)
    assert (labels[nearest] == labels).all()
    curves = M.utility(sensitivity, specificity)
    for row, interval in ((0, (0.2, 0.5)), (1, (0.6, 1.2))):
        perfect = t[curves[row] == 1]
        assert [perfect.min().item(), perfect.max().item()] == pytest.approx(interval, abs=1.1e-3)
    at = (t - 0.55).abs().argmin()
    assert sensitivity[1, at] == 0 and specificity[0, at] == 0.5 and curves[:2].amin(0).amax() < 1


# --- operating characteristics ----------------------------------------------------------------------------------------


@few
@given(seeds, st.sampled_from(M.METRICS), st.integers(1, 13))
def test_characteristics_equal_the_slow_loop(seed, metric, chunk_size):
    x, labels = draw(seed)
    labels[0] = 99  # a class of one: left out, but a negative of the others
    s = slow_cosines(x)
    distance = [[math.sqrt(max(2 - 2 * v, 0)) if metric == "euclidean" else 1 - v for v in row] for row in s]
    t = torch.linspace(0, 2, 37, dtype=float64)
    given_ = (torch.tensor(distance, dtype=float64) if metric == "precomputed" else x), labels, t
    sensitivity, specificity, classes = M.operating_characteristics(*given_, metric=metric, chunk_size=chunk_size)
    names = [c for c in sorted(set(labels.tolist())) if labels.tolist().count(c) > 1]
    assert classes.tolist() == names and sensitivity.shape == specificity.shape == (len(names), 37)
    for k, c in enumerate(names):
        rows = [i for i in range(12) if labels[i] == c]
        own = [distance[i][j] for i in rows for j in rows if i != j]
        other = [distance[i][j] for i in rows for j in range(12) if labels[j] != c]
        for g, threshold in enumerate(t.tolist()):
            assert sensitivity[k, g].item() == pytest.approx(np.mean([v <= threshold for v in own]), abs=1e-12)
            assert specificity[k, g].item() == pytest.approx(np.mean([v > threshold for v in other]), abs=1e-12)
    assert (sensitivity.diff(dim=1) >= 0).all() and (specificity.diff(dim=1) <= 0).all()


def test_a_pair_at_the_threshold_is_accepted():
    distance = torch.tensor([[0, 0.5, 1, 1], [0.5, 0, 1, 1], [1, 1, 0, 0.5], [1, 1, 0.5, 0]])
    args = distance, torch.tensor([0, 0, 1, 1]), torch.tensor([0.25, 0.5, 1.0])
    sensitivity, specificity, _ = M.operating_characteristics(*args, metric="precomputed")
    assert sensitivity.tolist() == [[0, 1, 1]] * 2 and specificity.tolist() == [[1, 1, 0]] * 2


def test_distances_of_float32_rows_are_in_float64():
    x = torch.tensor([[1.0, 0.0], [1.0, 1e-4], [-1.0, 0.0], [-1.0, 1e-4]])
    gap = 2 * math.sin(math.atan(x[1, 1].item()) / 2)
    t = torch.tensor([gap - 1e-9, gap + 1e-9], dtype=float64)
    sensitivity, _, _ = M.operating_characteristics(x, torch.tensor([0, 0, 1, 1]), t)
    assert sensitivity.tolist() == [[0, 1]] * 2


def test_precomputed_distances_are_not_copied():
    generator = torch.Generator().manual_seed(0)
    distance = torch.rand(400, 400, generator=generator)
    distance, labels = distance + distance.T, torch.arange(400) % 20
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            outs = out if isinstance(out, tuple | list) else [out]
            largest.extend(
                o.numel()
                for o in outs
                if isinstance(o, torch.Tensor)
                and o.untyped_storage().data_ptr() != distance.untyped_storage().data_ptr()
            )
            return out

    with Watch():
        M.operating_characteristics(distance, labels, torch.tensor([0.5, 1.0]), metric="precomputed", chunk_size=16)
        M.calibration_range(distance, labels, metric="precomputed", chunk_size=16)
    assert max(largest) <= max(16 * 400, M._BINS)


@few
@given(seeds, st.sampled_from(M.METRICS), st.integers(1, 40), st.floats(0.01, 0.5), st.floats(0.51, 1))
def test_calibration_range_is_the_quantile_of_the_negatives(seed, metric, chunk_size, first, second):
    x, labels = draw(seed, n=30)
    distance = 1 - torch.tensor(slow_cosines(x), dtype=float64)
    distance = (2 * distance).clamp(min=0).sqrt() if metric == "euclidean" else distance
    one, other = np.triu_indices(30, 1)
    negative = distance.numpy()[one, other][(labels[one] != labels[other]).numpy()]
    x = 5 * distance - 2 if metric == "precomputed" else x
    expected = np.quantile(negative, [first, second])
    expected = 5 * expected - 2 if metric == "precomputed" else expected
    got = M.calibration_range(x, labels, far=(first, second), metric=metric, chunk_size=chunk_size)
    assert got == pytest.approx(tuple(expected), abs=1e-9)


def test_calibration_range_hits_its_rates():
    x, labels = draw(0, n=400, d=8, classes=20)
    low, high = M.calibration_range(x, labels, far=(0.01, 0.1))
    one, other = torch.triu_indices(400, 400, offset=1)
    negative = torch.pdist(F.normalize(x, dim=1))[labels[one] != labels[other]]
    assert (negative <= low).double().mean().item() == pytest.approx(0.01, abs=1e-4)
    assert (negative <= high).double().mean().item() == pytest.approx(0.1, abs=1e-4)


@few
@given(seeds, st.floats(1e-2, 1e2))
def test_utility(seed, c):
    generator = torch.Generator().manual_seed(seed)
    psi, phi = torch.rand(2, 50, generator=generator, dtype=float64)
    value = M.utility(psi, phi, c=c)
    torch.testing.assert_close(value, (1 + c**2) * phi * psi / (c**2 * phi + psi))
    torch.testing.assert_close(value, M.utility(phi, psi, c=1 / c))
    assert (value >= torch.minimum(psi, phi) - 1e-12).all() and (value <= torch.maximum(psi, phi) + 1e-12).all()


def test_utility_limits():
    psi, phi = torch.tensor([0.8], dtype=float64), torch.tensor([0.3], dtype=float64)
    assert M.utility(psi, phi).item() == pytest.approx(2 / (1 / 0.8 + 1 / 0.3))
    assert M.utility(psi, phi, c=1e-3).item() == pytest.approx(0.3, abs=1e-5)
    assert M.utility(psi, phi, c=1e3).item() == pytest.approx(0.8, abs=1e-5)
    assert M.utility(psi, phi, c=1e-200).item() == pytest.approx(0.3) and M.utility(psi, phi, c=1e200).item() == 0.8
    zero, one = torch.zeros(1), torch.ones(1)
    for pair in ((zero, zero), (zero, one), (one, zero)):
        for c in (1e-200, 1e-8, 1.0, 1e8, 1e200):
            assert M.utility(*pair, c=c).item() == 0


def test_opis_by_hand():
    t = torch.linspace(0, 1, 1001, dtype=float64)
    assert M.opis(torch.stack([t, 1 - t]), t).item() == pytest.approx(1 / 12, abs=1e-6)
    assert M.opis(torch.stack([torch.ones_like(t), torch.zeros_like(t)]), 3 * t - 1).item() == 0.25
    assert M.opis(t.repeat(5, 1), t).item() == pytest.approx(0, abs=1e-30)
    # Three curves on an uneven grid: variances 2/9 at 0, 0 at 1, 2/3 · (1/4) at 3.
    uneven, curves = torch.tensor([0.0, 1, 3]), torch.tensor([[1, 0.5, 1], [0, 0.5, 0.5], [0, 0.5, 0.0]])
    assert M.opis(curves, uneven).item() == pytest.approx((1 / 9 + 1 / 6) / 3)


@few
@given(seeds, st.integers(2, 9))
def test_opis_properties(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    curves = torch.rand(classes, 20, generator=generator, dtype=float64)
    t = (0.1 + torch.rand(20, generator=generator, dtype=float64)).cumsum(0)
    value = M.opis(curves, t).item()
    assert 0 <= value <= 0.25
    slow = sum(  # the definition, class by class
        torch.trapezoid((curves[i] - curves.mean(0)) ** 2, t) for i in range(classes)
    ) / (classes * (t[-1] - t[0]))
    assert value == pytest.approx(slow.item(), rel=1e-10)
    order = torch.randperm(classes, generator=generator)
    for same in (M.opis(curves[order], t), M.opis(curves.repeat(2, 1), t), M.opis(curves, 3 * t - 5)):
        assert same.item() == pytest.approx(value, rel=1e-10)
    pair = M.opis(curves[:2], t).item()
    gap = torch.trapezoid((curves[0] - curves[1]).square(), t) / (t[-1] - t[0])
    assert pair == pytest.approx(gap.item() / 4) and M.extreme_gap(curves[:2], t).item() == pytest.approx(gap.item())


def test_extreme_gap_takes_the_ends():
    t = torch.tensor([0.0, 1.0])
    curves = torch.tensor([0.5, 1.0, 0.1, 0.3, 0.6, 0.9, 0.55, 0.5, 0.5, 0.5])[:, None].repeat(1, 2)
    assert M.extreme_gap(curves, t, fraction=0.1).item() == pytest.approx(0.81)
    assert M.extreme_gap(curves, t, fraction=0.2).item() == pytest.approx(0.75**2)
    assert M.extreme_gap(curves, t, fraction=0.01).item() == pytest.approx(0.81)  # at least one class


def test_extreme_gap_ranks_by_the_integral_on_an_uneven_grid():
    # Plain means rank the third row last and the second first; over the range the first is last and the third first.
    t = torch.tensor([0.0, 0.1, 0.2, 1.0], dtype=float64)
    curves = torch.tensor([[0.35, 0.35, 0.35, 0.35], [1.0, 1.0, 0.25, 0.25], [0.0, 0.0, 0.6, 0.6]], dtype=float64)
    assert curves.mean(1).argsort().tolist() == [2, 0, 1] and torch.trapezoid(curves, t).argsort().tolist() == [0, 1, 2]
    gap = torch.trapezoid((curves[2] - curves[0]).square(), t)
    assert M.extreme_gap(curves, t).item() == pytest.approx(gap.item())


@pytest.mark.parametrize(("fraction", "count"), [(0.29, 29), (0.07, 7), (0.075, 7), (0.5, 50), (0.001, 1)])
def test_extreme_gap_counts_the_classes(fraction, count):
    curves = torch.arange(100, dtype=float64)[:, None].repeat(1, 2) / 100
    gap = M.extreme_gap(curves, torch.tensor([0.0, 1.0]), fraction=fraction)
    assert gap.item() == pytest.approx((1 - count / 100) ** 2)


def test_a_grid_finer_than_the_curves_dtype():
    t = torch.tensor([1, 1 + 1e-9, 1 + 2e-9], dtype=float64)
    curves = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert M.opis(curves, t).item() == pytest.approx(0.25) and M.extreme_gap(curves, t).item() == pytest.approx(1)


def test_recall_at_1():
    x, labels = draw(5, n=200, d=4, classes=12)
    labels[0] = 99
    s = torch.tensor(slow_cosines(x)).fill_diagonal_(-9)
    hits = [labels[row.argmax()] == labels[i] for i, row in enumerate(s) if labels[i] != 99]
    for chunk_size in (None, 7):
        assert M.recall_at_1(x, labels, chunk_size=chunk_size).item() == pytest.approx(np.mean(hits))
    assert 0.2 < np.mean(hits) < 0.9


# --- several processes ------------------------------------------------------------------------------------------------


def one_step(rows, distributed):
    x, labels = draw(3, n=16, classes=4)
    x = x[rows].requires_grad_()
    loss = M.tcm_loss(x, labels[rows], positive_weight=2.0, distributed=distributed)
    loss.backward()
    return loss.item(), x.grad


def of_one_process(rank):
    return one_step(slice(8 * rank, 8 * rank + 8), True)


def test_two_processes_equal_one(tmp_path):
    losses, gradients = zip(*in_two_processes(of_one_process, tmp_path), strict=True)
    loss, gradient = one_step(slice(None), False)
    assert sum(losses) / 2 == pytest.approx(loss, abs=1e-12) and losses[0] != losses[1]
    torch.testing.assert_close(torch.cat(gradients) / 2, gradient, rtol=1e-9, atol=1e-12)
    assert one_step(slice(None), True)[0] == pytest.approx(loss, abs=1e-12)  # one process, and no group


# --- extremes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_rows_of_any_length_in_float32(scale):
    x, labels = draw(0, dtype=torch.float32)
    scaled = (x * scale).requires_grad_()
    loss = M.tcm_loss(scaled, labels)
    loss.backward()
    assert loss.item() == pytest.approx(M.tcm_loss(x, labels).item(), abs=1e-6) and scaled.grad.isfinite().all()
    assert M.recall_at_1(scaled, labels) == M.recall_at_1(x, labels)


def test_dtypes_agree():
    x, labels = draw(0, n=64, classes=8)
    for loss in (M.tcm_loss, M.supervised_contrastive_loss):
        (wide, grad), (narrow, narrow_grad) = (
            value_and_gradient(lambda x, loss=loss: loss(x, labels), y) for y in (x, x.float())
        )
        assert narrow == pytest.approx(wide, rel=1e-5)
        torch.testing.assert_close(narrow_grad.double(), grad, rtol=1e-4, atol=1e-5)
    half = x.bfloat16().requires_grad_()
    loss = M.tcm_loss(half, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(M.tcm_loss(half.float(), labels).item(), abs=1e-6)


@pytest.mark.parametrize("loss", [M.tcm_loss, M.supervised_contrastive_loss])
def test_autocast(loss):
    x, labels = draw(0, n=64, classes=8, dtype=torch.float32)
    value, gradient = value_and_gradient(lambda x: loss(x, labels), x)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(x, labels)
    assert inside.item() == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(torch.autograd.grad(inside, x)[0], gradient)


def test_backward_under_autocast():
    x, labels = draw(0, n=64, classes=8, dtype=torch.float32)
    _, gradient = value_and_gradient(lambda x: M.tcm_loss(x, labels), x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(value_and_gradient(lambda x: M.tcm_loss(x, labels), x)[1], gradient)


def test_transforms_and_compile():
    x, labels = draw(0)
    stack = torch.stack([x, draw(1)[0]])
    loss = lambda x: M.tcm_loss(x, labels, chunk_size=5)
    _, expected = value_and_gradient(loss, x)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    torch.testing.assert_close(torch.func.vmap(loss)(stack), torch.stack([loss(y) for y in stack]))
    each = torch.func.vmap(torch.func.grad(loss))(stack)
    torch.testing.assert_close(each, torch.stack([value_and_gradient(loss, y)[1] for y in stack]))
    compiled = torch.compile(loss, backend="aot_eager")
    value, grad = value_and_gradient(compiled, x)
    assert value == pytest.approx(loss(x).item()) and torch.allclose(grad, expected)


def test_non_contiguous_input_and_frozen_embedding():
    x, labels = draw(0)
    wide = torch.stack([x, x], dim=2)[:, :, 0]
    assert not wide.is_contiguous() and M.tcm_loss(wide, labels).item() == M.tcm_loss(x, labels).item()
    assert not M.tcm_loss(x, labels).requires_grad


def test_many_rows_hold_no_matrix():
    """Saved for backward: the rows, not the pairs."""
    x, labels = draw(0, n=600, classes=20)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        M.tcm_loss(x.requires_grad_(), labels)
    assert max(saved) <= 600 * 4


# --- bad input --------------------------------------------------------------------------------------------------------

X, Y = draw(0)
T = torch.linspace(0.1, 1.9, 5, dtype=float64)
U = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=float64)
with_nan = X.clone()
with_nan[2, 1] = torch.nan
with_zero = X.clone()
with_zero[2] = 0
lone = torch.arange(12)

BAD = [
    (lambda: M.tcm_loss(X.tolist(), Y), TypeError, "embedding"),
    (lambda: M.tcm_loss(None, Y), TypeError, "embedding"),
    (lambda: M.tcm_loss(X.long(), Y), TypeError, "embedding"),
    (lambda: M.tcm_loss(X[0], Y), ValueError, "embedding"),
    (lambda: M.tcm_loss(X[:0], Y[:0]), ValueError, "embedding"),
    (lambda: M.tcm_loss(X[:1], Y[:1]), ValueError, "embedding.*at least 2"),
    (lambda: M.tcm_loss(with_nan, Y), ValueError, "embedding.*finite"),
    (lambda: M.tcm_loss(with_zero, Y), ValueError, "embedding.*zeros"),
    (lambda: M.tcm_loss(X, Y.tolist()), TypeError, "labels"),
    (lambda: M.tcm_loss(X, Y.int()), TypeError, "labels"),
    (lambda: M.tcm_loss(X, Y[:-1]), ValueError, "labels"),
    (lambda: M.tcm_loss(X, Y[:, None]), ValueError, "labels"),
    (lambda: M.tcm_loss(X, Y, positive_margin=1.1), ValueError, "positive_margin"),
    (lambda: M.tcm_loss(X, Y, positive_margin=math.nan), ValueError, "positive_margin"),
    (lambda: M.tcm_loss(X, Y, positive_margin="0.9"), TypeError, "positive_margin"),
    (lambda: M.tcm_loss(X, Y, negative_margin=-1.1), ValueError, "negative_margin"),
    (lambda: M.tcm_loss(X, Y, negative_margin=0.9), ValueError, "negative_margin"),
    (lambda: M.tcm_loss(X, Y, negative_margin=None), TypeError, "negative_margin"),
    (lambda: M.tcm_loss(X, Y, positive_weight=-1), ValueError, "positive_weight"),
    (lambda: M.tcm_loss(X, Y, negative_weight=math.inf), ValueError, "negative_weight"),
    (lambda: M.tcm_loss(X, Y, negative_weight=True), TypeError, "negative_weight"),
    (lambda: M.tcm_loss(X, Y, chunk_size=0), ValueError, "chunk_size"),
    (lambda: M.tcm_loss(X, Y, chunk_size=2.0), TypeError, "chunk_size"),
    (lambda: M.tcm_loss(X, Y, chunk_size="a", pairs=(lone, lone.flip(0))), TypeError, "chunk_size"),
    (lambda: M.tcm_loss(X, Y, pairs=Y), TypeError, "pairs"),
    (lambda: M.tcm_loss(X, Y, pairs=(Y, Y[:-1])), ValueError, "pairs"),
    (lambda: M.tcm_loss(X, Y, pairs=([0], [1])), TypeError, "pairs"),
    (lambda: M.tcm_loss(X, Y, pairs=(lone, lone)), ValueError, "pairs"),
    (lambda: M.tcm_loss(X, Y, pairs=(lone, lone + 1)), ValueError, "pairs"),
    (lambda: M.tcm_loss(X, Y, pairs=(lone, lone.flip(0)), distributed=True), ValueError, "distributed"),
    (lambda: M.tcm_loss_from_similarity([0.5], torch.zeros(1)), TypeError, "positive"),
    (lambda: M.tcm_loss_from_similarity(torch.zeros(1), None), TypeError, "negative"),
    (lambda: M.tcm_loss_from_similarity(torch.zeros(1), torch.zeros(1, 1)), ValueError, "negative"),
    (lambda: M.tcm_loss_from_similarity(torch.zeros(1), torch.zeros(1).double()), TypeError, "negative"),
    (lambda: M.tcm_loss_from_similarity(torch.tensor([math.inf]), torch.zeros(1)), ValueError, "positive"),
    (lambda: M.normalized_softmax_loss(X, X[:, :2], Y), ValueError, "proxies"),
    (lambda: M.normalized_softmax_loss(X, X.float(), Y), ValueError, "proxies"),
    (lambda: M.normalized_softmax_loss(X, X[:2], Y), ValueError, "labels"),
    (lambda: M.normalized_softmax_loss(X, with_zero, Y), ValueError, "proxies.*zeros"),
    (lambda: M.normalized_softmax_loss(X, with_nan, Y), ValueError, "proxies.*finite"),
    (lambda: M.normalized_softmax_loss(X, X, Y, scale=0), ValueError, "scale"),
    (lambda: M.supervised_contrastive_loss(X, Y, temperature=0), ValueError, "temperature"),
    (lambda: M.supervised_contrastive_loss(X, Y, temperature=None), TypeError, "temperature"),
    (lambda: M.operating_characteristics(X, Y, T.tolist()), TypeError, "thresholds"),
    (lambda: M.operating_characteristics(X, Y, T.flip(0)), ValueError, "thresholds"),
    (lambda: M.operating_characteristics(X, Y, T[:0]), ValueError, "thresholds"),
    (lambda: M.operating_characteristics(X, Y, T, metric="manhattan"), ValueError, "metric"),
    (lambda: M.operating_characteristics(X, Y, T, metric="precomputed"), ValueError, "embedding.*square"),
    (lambda: M.operating_characteristics(X[:, :1] - X[:, 0], Y, T, metric="precomputed"), ValueError, "symmetric"),
    (lambda: M.operating_characteristics(with_nan @ X.T, Y, T, metric="precomputed"), ValueError, "embedding.*finite"),
    (lambda: M.calibration_range(X @ X.T / 0, Y, metric="precomputed"), ValueError, "embedding.*finite"),
    (lambda: M.operating_characteristics(X @ X.T, Y[1:], T, metric="precomputed"), ValueError, "labels"),
    (lambda: M.operating_characteristics(X, lone, T), ValueError, "labels.*two classes"),
    (lambda: M.operating_characteristics(X, 0 * lone, T), ValueError, "labels.*two classes"),
    (lambda: M.class_hinges(X, 0 * lone), ValueError, "labels"),
    (lambda: M.class_hinges(X, Y, negative_margin=0.95), ValueError, "negative_margin"),
    (lambda: M.utility(U.tolist(), U), TypeError, "sensitivity"),
    (lambda: M.utility(U, U[:2]), ValueError, "specificity"),
    (lambda: M.utility(U + 1, U), ValueError, "sensitivity"),
    (lambda: M.utility(U, -U), ValueError, "specificity"),
    (lambda: M.utility(U, U, c=0), ValueError, "c must"),
    (lambda: M.opis(U, T[:-1]), ValueError, "thresholds"),
    (lambda: M.opis(U[:, :1], T[:1]), ValueError, "thresholds"),
    (lambda: M.opis(U, 0 * T), ValueError, "thresholds"),
    (lambda: M.opis(U[:1], T), ValueError, "utility"),
    (lambda: M.opis(U[0], T), ValueError, "utility"),
    (lambda: M.opis(U * torch.nan, T), ValueError, "utility"),
    (lambda: M.extreme_gap(U, T, fraction=0.6), ValueError, "fraction"),
    (lambda: M.extreme_gap(U, T, fraction=0), ValueError, "fraction"),
    (lambda: M.calibration_range(X, Y, far=0.1), TypeError, "far"),
    (lambda: M.calibration_range(X, Y, far=(0.1, 0.01)), ValueError, "far"),
    (lambda: M.calibration_range(X, Y, far=(0, 0.1)), ValueError, "far"),
    (lambda: M.calibration_range(X, 0 * lone), ValueError, "labels"),
    (lambda: M.calibration_range(X[[0] * 12], Y), ValueError, "far.*coincide|far.*different"),
    (lambda: M.recall_at_1(X, lone), ValueError, "labels"),
    (lambda: M.recall_at_1(X, Y, chunk_size=0), ValueError, "chunk_size"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
