"""The propositions of chapter similarity/proto_triplet as properties; closed forms, limits, extremes and bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lossbook.similarity import proto_triplet as P

seeds = st.integers(0, 2**31)
F32 = torch.float32
few = settings(deadline=None, max_examples=50)
S, Y, C = torch.zeros(6, 2), torch.arange(3).repeat(2), torch.eye(3)[:, :2]
NAN, INF = torch.full((6, 2), math.nan), torch.full((6, 2), math.inf)


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


# --- episodes ---------------------------------------------------------------------------------------------------------

# Seven classes with names that are not 0..6, of eight items each, in a mixed order.
LABELS = (torch.arange(56) % 7) * 10 - 20


@few
@given(seeds, st.integers(1, 7), st.integers(1, 5), st.data())
def test_an_episode_is_what_it_says(seed, way, shot, data):
    most = 8 - shot
    numbers = st.lists(st.integers(0, most), min_size=way, max_size=way).filter(any)
    queries = data.draw(st.one_of(st.integers(1, most), numbers, numbers.map(tuple)))
    counts = [queries] * way if isinstance(queries, int) else list(queries)
    position, support_labels, query, query_labels, classes = P.sample_episode(
        torch.arange(56), LABELS, way=way, shot=shot, queries=queries, generator=generator_of(seed)
    )
    assert len(classes.unique()) == way and torch.isin(classes, LABELS).all()
    assert support_labels.tolist() == [j for j in range(way) for _ in range(shot)]
    assert query_labels.tolist() == [j for j in range(way) for _ in range(counts[j])]
    assert torch.equal(LABELS[position], classes[support_labels])
    assert torch.equal(LABELS[query], classes[query_labels])
    drawn = torch.cat([position, query])
    assert len(drawn.unique()) == len(drawn)  # disjoint, nothing twice


def test_episodes_carry_items_of_any_shape_and_dtype():
    images = torch.rand(56, 1, 4, 4, requires_grad=True)
    options = dict(way=3, shot=2, queries=[1, 0, 4])
    episode = P.sample_episode(images, LABELS, **options, generator=generator_of(0))
    position = P.sample_episode(torch.arange(56), LABELS, **options, generator=generator_of(0))
    assert torch.equal(episode.support, images[position.support]) and episode.queries.shape == (5, 1, 4, 4)
    episode.queries.sum().backward()
    assert images.grad.flatten(1).amax(1).nonzero().squeeze(1).tolist() == sorted(position.queries.tolist())


def test_every_item_comes_up_equally_often_and_generators_repeat():
    def draw(generator):
        return P.sample_episode(torch.arange(56), LABELS, way=2, shot=1, queries=3, generator=generator)

    first, again, other = draw(generator_of(1)), draw(generator_of(1)), draw(generator_of(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.queries, other.queries)
    generator, count = generator_of(3), torch.zeros(2, 56)
    for _ in range(3000):
        episode = draw(generator)
        count[0, episode.support] += 1
        count[1, episode.queries] += 1
    expected = 3000 * torch.tensor([[2 / 56], [6 / 56]])
    assert ((count - expected).abs() < 5 * expected.sqrt()).all()


EPISODE = dict(way=3, shot=2, queries=4)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("features", dict(features=torch.zeros(55, 2))),
        ("features", dict(features=torch.tensor(1.0))),
        ("labels", dict(labels=LABELS[:, None])),
        ("labels", dict(shot=5)),
        ("labels", dict(queries=[0, 7, 7])),
        ("way", dict(way=0)),
        ("way", dict(way=8)),
        ("shot", dict(shot=0)),
        ("queries", dict(queries=0)),
        ("queries", dict(queries=[1, 2])),
        ("queries", dict(queries=[1, 2, -1])),
        ("queries", dict(queries=[0, 0, 0])),
        ("queries", dict(queries=[])),
    ],
)
def test_bad_episodes(argument, changes):
    call = dict(features=torch.zeros(56, 2), labels=LABELS) | EPISODE | changes
    with pytest.raises(ValueError, match=rf"^{argument} "):
        P.sample_episode(call.pop("features"), call.pop("labels"), **call)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("features", dict(features=[0] * 56)),
        ("features", dict(features=None)),
        ("labels", dict(labels=LABELS.float())),
        ("labels", dict(labels=LABELS.tolist())),
        ("way", dict(way=3.0)),
        ("way", dict(way="3")),
        ("shot", dict(shot=True)),
        ("queries", dict(queries="444")),
        ("queries", dict(queries=None)),
        ("queries", dict(queries=4.0)),
        ("queries", dict(queries=[1, 2, 3.0])),
        ("queries", dict(queries=torch.tensor([1, 2, 3]))),
    ],
)
def test_episodes_of_the_wrong_type(argument, changes):
    call = dict(features=torch.zeros(56, 2), labels=LABELS) | EPISODE | changes
    with pytest.raises(TypeError, match=rf"^{argument} "):
        P.sample_episode(call.pop("features"), call.pop("labels"), **call)


# --- prototypes -------------------------------------------------------------------------------------------------------


def clouds(seed, way=3, shot=2, queries=4, dim=3, spread=1.0, dtype=torch.float64):
    """A support set and queries around random centers: embeddings and labels of both."""
    generator = generator_of(seed)
    centers = torch.randn(way, dim, generator=generator, dtype=torch.float64)
    own = torch.arange(way)
    support_labels, query_labels = own.repeat_interleave(shot), own.repeat_interleave(queries)
    draw = [
        (centers[y] + spread * torch.randn(len(y), dim, generator=generator, dtype=torch.float64)).to(dtype)
        for y in (support_labels, query_labels)
    ]
    return draw[0], support_labels, draw[1], query_labels


def slow_distance(x, y):
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) + 1e-6)


@few
@given(seeds, st.integers(2, 5), st.integers(1, 4), st.floats(0.05, 20), st.floats(0, 3))
def test_losses_equal_the_slow_loops(seed, way, shot, temperature, margin):
    support, support_labels, queries, labels = clouds(seed, way, shot)
    means = [
        [sum(column) / shot for column in zip(*support[support_labels == a].tolist(), strict=True)] for a in range(way)
    ]
    entropy, triplet = [], []
    for z, y in zip(queries.tolist(), labels.tolist(), strict=True):
        d = [slow_distance(z, c) for c in means]
        logits = [-(x**2 - 1e-6) / temperature for x in d]
        entropy.append(math.log(sum(math.exp(x - logits[y]) for x in logits)))
        triplet.append(max(0.0, d[y] - min(d[a] for a in range(way) if a != y) + margin))
    c = P.class_prototypes(support, support_labels, way)
    torch.testing.assert_close(c, torch.tensor(means, dtype=torch.float64))
    each = P.prototypical_loss(queries, labels, c, temperature=temperature, reduction="none")
    torch.testing.assert_close(each, torch.tensor(entropy, dtype=torch.float64), rtol=1e-9, atol=1e-11)
    each = P.proto_triplet_loss(queries, labels, c, margin=margin, reduction="none")
    torch.testing.assert_close(each, torch.tensor(triplet, dtype=torch.float64), rtol=1e-9, atol=1e-11)
    assert P.proto_triplet_loss(queries, labels, c, margin=margin).item() == pytest.approx(sum(triplet) / len(triplet))
    assert P.proto_triplet_loss(queries, labels, c, margin=margin, reduction="sum").item() == pytest.approx(
        sum(triplet)
    )


LINE = torch.tensor([[0.0], [4.0]], dtype=torch.float64)


def test_proto_triplet_by_hand():
    queries = torch.tensor([[0.0], [3.0]], dtype=torch.float64)
    assert P.proto_triplet_loss(queries, torch.tensor([0, 0]), LINE).item() == pytest.approx(1.25, abs=1e-5)
    assert P.proto_triplet_loss(queries, torch.tensor([0, 1]), LINE).item() == 0


@few
@given(seeds)
def test_proto_triplet_is_zero_exactly_with_the_margin(seed):
    support, support_labels, queries, labels = clouds(seed)
    c = P.class_prototypes(support, support_labels, 3)
    distance = P.euclidean_distance(queries, c)
    gap = distance.masked_fill(F.one_hot(labels).bool(), math.inf).amin(1) - distance[torch.arange(12), labels]
    right = gap > 0
    if not right.any():
        return
    # Scaled up until every gap of a rightly classified query exceeds the margin, those have no loss and no force.
    scale = 0.6 / gap[right].min()
    z, c = (scale * queries[right]).requires_grad_(), scale * c
    loss = P.proto_triplet_loss(z, labels[right], c)
    loss.backward()
    assert loss == 0 and (z.grad == 0).all()
    # The margin is in units of the distance: a little more of it and the closest query has a loss.
    least = P.proto_triplet_loss(z, labels[right], c, margin=0.6001 + 1e-3)
    assert least > 0
    if (~right).any():
        assert (P.proto_triplet_loss(queries[~right], labels[~right], c / scale, reduction="none") >= 0.5).all()


@few
@given(seeds, st.integers(2, 5), st.integers(1, 3))
def test_proto_triplet_gradient(seed, way, shot):
    support, support_labels, queries, labels = clouds(seed, way, shot)
    support.requires_grad_(), queries.requires_grad_()
    c = P.class_prototypes(support, support_labels, way)
    c.retain_grad()
    P.proto_triplet_loss(queries, labels, c).backward()
    to_query, to_prototype = torch.zeros_like(queries), torch.zeros_like(c)
    for q, (z, y) in enumerate(zip(queries.detach(), labels.tolist(), strict=True)):
        d = [slow_distance(z, a) for a in c.detach()]
        wrong = min((a for a in range(way) if a != y), key=lambda a: d[a])
        if d[y] - d[wrong] + 0.5 > 0:
            own_way, wrong_way = (z - c[y].detach()) / d[y], (z - c[wrong].detach()) / d[wrong]
            to_query[q] = (own_way - wrong_way) / len(queries)
            to_prototype[y] -= own_way / len(queries)
            to_prototype[wrong] += wrong_way / len(queries)
    torch.testing.assert_close(queries.grad, to_query, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(c.grad, to_prototype, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(support.grad, to_prototype[support_labels] / shot, rtol=1e-8, atol=1e-10)
    assert (queries.grad.norm(dim=1) < 2 / len(queries)).all()


def test_blind_spot_and_the_largest_force():
    def force(z):
        z = torch.tensor([[z]], dtype=torch.float64, requires_grad=True)
        loss = P.proto_triplet_loss(z, torch.tensor([0]), LINE)
        return loss.item(), torch.autograd.grad(loss, z)[0].item()

    loss, push = force(6.0)  # beyond the wrong prototype
    assert loss == pytest.approx(4.5, abs=1e-6) and abs(push) < 1e-6
    loss, push = force(2.0)  # between the two
    assert loss == pytest.approx(0.5) and 2 - 1e-6 < push < 2
    assert force(-1.0) == (0, 0)  # beyond its own: the hinge is inactive
    prototypes = torch.tensor([[0.0], [4.0]], dtype=torch.float64, requires_grad=True)
    P.proto_triplet_loss(torch.tensor([[6.0]], dtype=torch.float64), torch.tensor([0]), prototypes).backward()
    assert prototypes.grad.flatten().tolist() == pytest.approx([-1, 1], abs=1e-6)  # only the prototypes move


def test_coinciding_points_and_ties():
    point = torch.zeros(1, 2, requires_grad=True)
    c = torch.tensor([[0.0, 0.0], [3.0, 0.0], [-3.0, 0.0]], requires_grad=True)
    distance = P.euclidean_distance(point, c)
    torch.testing.assert_close(distance, torch.tensor([[1e-3, 3.0, 3.0]]))
    assert torch.autograd.grad(distance[0, 0], point)[0].tolist() == [[0, 0]]
    # Two nearest wrong prototypes share the force, and here their pushes cancel.
    loss = P.proto_triplet_loss(point, torch.tensor([0]), c, margin=4.0)
    to_point, to_c = torch.autograd.grad(loss, (point, c))
    assert to_point.abs().max() < 1e-6
    torch.testing.assert_close(to_c, torch.tensor([[0.0, 0.0], [-0.5, 0.0], [0.5, 0.0]]))
    # At the hinge itself there is no force.
    edge = torch.zeros(1, 1, requires_grad=True)
    symmetric = torch.tensor([[1.0], [-1.0]])
    P.proto_triplet_loss(edge, torch.tensor([0]), symmetric, margin=0).backward()
    assert edge.grad.item() == 0


@few
@given(seeds, st.floats(0.1, 10))
def test_cross_entropy_is_a_linear_classifier(seed, temperature):
    support, support_labels, queries, labels = clouds(seed)
    c = P.class_prototypes(support, support_labels, 3)
    logits = F.linear(queries, 2 * c / temperature, -c.square().sum(1) / temperature)
    torch.testing.assert_close(
        P.prototypical_loss(queries, labels, c, temperature=temperature), F.cross_entropy(logits, labels)
    )


@few
@given(seeds, st.floats(0.01, 10), st.floats(0.01, 100))
def test_cross_entropy_in_the_cold_and_under_scaling(seed, temperature, scale):
    support, support_labels, queries, labels = clouds(seed)
    c = P.class_prototypes(support, support_labels, 3)
    squared = (queries[:, None] - c).square().sum(2)
    wrong = squared.masked_fill(F.one_hot(labels).bool(), math.inf).amin(1)
    hinge = F.relu(squared[torch.arange(12), labels] - wrong)
    energy = temperature * P.prototypical_loss(queries, labels, c, temperature=temperature, reduction="none")
    assert (energy >= hinge - 1e-9).all() and (energy <= hinge + temperature * math.log(3) + 1e-9).all()
    # An embedding c times as large is a temperature c^2 times as small.
    larger = P.prototypical_loss(scale * queries, labels, scale * c, temperature=temperature * scale**2)
    torch.testing.assert_close(larger, energy.mean() / temperature)


# --- the score --------------------------------------------------------------------------------------------------------

# Two classes of three points on a line.
POSITIONS = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]], dtype=torch.float64)
CLASSES = torch.tensor([0, 0, 0, 1, 1, 1])


def slow_icnn(points, labels, k, count, reference=None, names=None):
    """The terms, point by point, in Python floats, with ratios to the enemy first and the rescaling after."""
    points, labels = points.tolist(), labels.tolist()
    others, other_labels = (points, labels) if reference is None else (reference.tolist(), names.tolist())
    k = min(k, len(others) - (reference is None) - 1)
    rows = []
    for i, (z, y) in enumerate(zip(points, labels, strict=True)):
        found = sorted(
            (slow_distance(z, x), other_labels[j] == y) for j, x in enumerate(others) if reference is not None or j != i
        )[:count]
        enemy = min((d for d, same in found if not same), default=math.inf)
        ratios = [d / enemy for d, _ in found[:k]]
        largest = max(1.0, *ratios)
        rows.append((found[:k], [x / largest for x in ratios]))
    intra = [[x for x, (_, same) in zip(ratios, near, strict=True) if same] for near, ratios in rows]
    inter = [[d for d, same in near if not same] for near, _ in rows]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    intra = [mean(row) for row in intra if row]
    farthest = max((d for row in inter for d in row), default=1.0)
    inter = [mean(row) / farthest for row in inter if row]
    return (
        1 - (mean(intra) if intra else 0),
        mean(inter) if inter else 1.0,
        mean([same for near, _ in rows for _, same in near]),
    )


def scattered(seed, spread=None):
    """Six to twenty points of two to four classes, more or less mixed; every class is there."""
    generator = generator_of(seed)
    n, way = (int(torch.randint(*span, (), generator=generator)) for span in ((6, 21), (2, 5)))
    labels = torch.cat([torch.arange(way), torch.randint(way, (n - way,), generator=generator)])
    spread = 3 * torch.rand((), generator=generator, dtype=torch.float64) if spread is None else spread
    centers = 2 * torch.randn(way, 3, generator=generator, dtype=torch.float64)
    return centers[labels] + spread * torch.randn(n, 3, generator=generator, dtype=torch.float64), labels


@settings(deadline=None, max_examples=200)
@given(seeds, st.integers(1, 5), st.integers(0, 6), st.booleans())
def test_parts_equal_the_slow_loop(seed, k, extra, against):
    points, labels = scattered(seed)
    options = {}
    if against:
        reference, names = scattered(seed + 1)
        options = dict(reference=reference, reference_labels=names)
    available = len(reference) if against else len(points) - 1
    used = min(k, available - 1)
    count = min(used + extra, available)
    parts = P.icnn_parts(points, labels, k=k, num_neighbors=count, **options)
    slow = slow_icnn(points, labels, k, count, *options.values())
    assert parts.lambda_intra.item() == pytest.approx(slow[0], abs=1e-9)
    assert parts.lambda_inter.item() == pytest.approx(slow[1], abs=1e-9)
    assert parts.gamma.item() == pytest.approx(1.0 if k + 1 >= available else slow[2])
    score = P.icnn_score(points, labels, k=k, num_neighbors=count, **options)
    assert score.item() == pytest.approx(((slow[0] + slow[1]) / 2 + parts.gamma.item()) / 2, abs=1e-9)
    assert P.icnn_loss(points, labels, k=k, num_neighbors=count, **options).item() == pytest.approx(-math.log(score))
    assert all(-1e-12 <= part <= 1 + 1e-12 for part in parts) and 0 < score <= 1 + 1e-12


def test_score_by_hand():
    parts = P.icnn_parts(POSITIONS, CLASSES, k=2, num_neighbors=5)
    assert [part.item() for part in parts] == pytest.approx([1 - (0.15 + 1 / 9 + 0.1875) / 3, 1, 1], abs=1e-6)
    assert P.icnn_score(POSITIONS, CLASSES, k=2, num_neighbors=5).item() == pytest.approx(0.962616, abs=1e-6)
    assert P.icnn_loss(POSITIONS, CLASSES, k=2, num_neighbors=5).item() == pytest.approx(0.038101, abs=1e-6)
    moved = POSITIONS.clone()
    moved[2] = 9
    parts = P.icnn_parts(moved, CLASSES, k=2, num_neighbors=5)
    assert [part.item() for part in parts] == pytest.approx([0.4, 0.625, 0.75], abs=1e-5)
    assert P.icnn_score(moved, CLASSES, k=2, num_neighbors=5).item() == pytest.approx(0.63125, abs=1e-6)
    closer = POSITIONS - 5 * CLASSES[:, None]
    assert P.icnn_score(closer, CLASSES, k=2, num_neighbors=5).item() == pytest.approx(0.9125, abs=1e-6)


def test_classic_score_by_hand():
    # Two neighbors a point: scaled distances are 0 and 1, or 0 and 0 for the middle of three; all are friends.
    distance_term = (4 * math.sqrt(0.5) + 2) / 6
    variance = (4 * (2 / 3) ** 2 + 8 * (1 / 3) ** 2) / 11
    score = (distance_term + math.sqrt(1 - variance) + 1) / 3
    assert P.icnn_score_classic(POSITIONS, CLASSES, k=2).item() == pytest.approx(score)
    assert not P.icnn_score_classic(POSITIONS.clone().requires_grad_(), CLASSES, k=2).requires_grad
    # With the third point at 9 and exponents 1, in the order of the points (distance, friend or enemy): 1f 9f, 1f 8f, 1e 2e,
    # 1e 1f, 1f 1f, 1f 2f. Scaled: 0 and 1 in a row, or 0 and 0 at a tie.
    moved = POSITIONS.clone()
    moved[2] = 9
    per_point = [1, 1, 1, 1, 2, 1]
    friends, enemies = torch.tensor([0.0] * 9 + [1.0] * 3), torch.tensor([0.0] * 11 + [1.0])
    variance_term = 1 - friends.var() - enemies.var()
    score = (sum(per_point) / 12 + variance_term + 9 / 12) / 3
    assert P.icnn_score_classic(moved, CLASSES, k=2, p=1, q=1, r=1).item() == pytest.approx(score.item())
    score = (
        (5 * math.sqrt(0.5) + 1) / 6 + variance_term ** (1 / 3) + (4 + 0.5**0.25) / 6
    ) / 3  # purities 1 1 0 1/2 1 1
    assert P.icnn_score_classic(moved, CLASSES, k=2, p=2, q=3, r=4).item() == pytest.approx(score.item())


@few
@given(seeds, st.integers(1, 4))
def test_invariances(seed, k):
    points, labels = scattered(seed)
    points = 100 * points
    options = dict(k=k, num_neighbors=min(k + 2, len(points) - 1)) if k + 1 < len(points) - 1 else dict(k=k)
    loss = P.icnn_loss(points, labels, **options)
    generator = generator_of(seed)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    shift = 100 * torch.randn(3, generator=generator, dtype=torch.float64)
    order = torch.randperm(len(points), generator=generator)
    torch.testing.assert_close(P.icnn_loss(points @ rotation + shift, labels, **options), loss, rtol=0, atol=1e-9)
    torch.testing.assert_close(P.icnn_loss(points[order], labels[order], **options), loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(P.icnn_loss(points, 7 - 3 * labels, **options), loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(P.icnn_loss(10 * points, labels, **options), loss, rtol=0, atol=1e-7)


@few
@given(seeds, st.integers(1, 4))
def test_the_gradient_neither_shifts_nor_inflates(seed, k):
    points, labels = scattered(seed)
    points = (10 * points).requires_grad_()
    count = min(k + 3, len(points) - 1)
    (gradient,) = torch.autograd.grad(P.icnn_loss(points, labels, k=min(k, count), num_neighbors=count), points)
    assert gradient.sum(0).abs().max() < 1e-10
    assert (points * gradient).sum().abs() < 1e-4
    ((far),) = torch.autograd.grad(
        P.icnn_loss(100 * points, labels, k=min(k, count), num_neighbors=count), points
    )  # d/dz of L(100 z) = 100 L'(100 z), which is L'(z): the gradient in 100 z is 100 times smaller
    torch.testing.assert_close(far, gradient, rtol=1e-3, atol=1e-6)


def test_range_of_the_score():
    for seed in range(300):
        points, labels = scattered(seed)
        score = P.icnn_score(points, labels, k=3)
        # The best of the enemies' ratios is 1; all others may be 0.
        assert 1 / (4 * len(points) * 3) < score <= 1 + 1e-12


def test_score_grows_as_the_classes_shrink():
    generator = generator_of(0)
    centers = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(24, 3, generator=generator, dtype=torch.float64)
    labels = torch.arange(4).repeat_interleave(6)
    scores = [P.icnn_score(centers[labels] + s * noise, labels, num_neighbors=6) for s in (1, 0.5, 0.2, 0.1, 0.01)]
    assert (torch.stack(scores).diff() > 0).all() and scores[-1] > 0.99


@few
@given(seeds)
def test_purity_has_no_gradient(seed):
    points, labels = scattered(seed)
    points.requires_grad_()
    parts = P.icnn_parts(points, labels, k=3, num_neighbors=4)
    assert not parts.gamma.requires_grad
    (gradient,) = torch.autograd.grad(P.icnn_loss(points, labels, k=3, num_neighbors=4), points)
    score = P.icnn_score(points, labels, k=3, num_neighbors=4).detach()
    (rest,) = torch.autograd.grad((parts.lambda_intra + parts.lambda_inter) / 4, points)
    torch.testing.assert_close(gradient, -rest / score)


def test_dead_points_and_points_that_see_an_enemy():
    labels = torch.arange(2).repeat_interleave(8)
    generator = generator_of(1)
    points = (10 * labels[:, None] + torch.randn(16, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    blind = P.icnn_score(points, labels)  # K = 5, and seven friends each
    assert blind == 1 and not torch.autograd.grad(blind, points)[0].any()
    sees = P.icnn_score(points, labels, num_neighbors=8)
    assert 0.9 < sees < 1 and torch.autograd.grad(sees, points)[0].norm(dim=1).min() > 0
    alone = P.icnn_parts(points, torch.zeros(16, dtype=torch.int64), num_neighbors=8)
    assert alone == (1, 1, 1)  # one class: there is no enemy


@few
@given(seeds, st.integers(2, 4), st.integers(2, 6))
def test_one_more_neighbor_than_friends_leaves_no_point_without_an_enemy(seed, way, size):
    generator = generator_of(seed)
    labels = torch.arange(way).repeat_interleave(size)
    points = (100.0 * labels[:, None] + torch.randn(len(labels), 2, generator=generator)).double().requires_grad_()
    k = min(2, size - 1)
    if k + 1 >= len(labels) - 1:
        return
    score = P.icnn_score(points, labels, k=k, num_neighbors=size)
    gradient = torch.autograd.grad(score, points)[0]
    assert score < 1 and (gradient.norm(dim=1) > 0).all()


def test_one_shot_support_says_nothing():
    support = torch.randn(5, 4, generator=generator_of(0), dtype=torch.float64, requires_grad=True)
    parts = P.icnn_parts(support, torch.arange(5))
    assert parts.lambda_intra == 1 and parts.gamma == 1 and 0 < parts.lambda_inter <= 1
    P.icnn_loss(support, torch.arange(5)).backward()
    assert support.grad.isfinite().all()
    seven = P.icnn_parts(torch.randn(7, 4, generator=generator_of(0)), torch.arange(7))
    assert seven.lambda_intra == 1 and seven.gamma == 0


def test_a_reference_drops_nobody():
    twin = P.icnn_parts(POSITIONS, CLASSES, k=2, num_neighbors=6, reference=POSITIONS, reference_labels=CLASSES)
    # Each point finds itself first, at the smoothed distance 0.001.
    slow = slow_icnn(POSITIONS, CLASSES, 2, 6, POSITIONS, CLASSES)
    assert [part.item() for part in twin] == pytest.approx(slow) and twin.lambda_intra > 0.93


def test_chunks_of_the_search_change_nothing(monkeypatch):
    points, labels = scattered(5, spread=2.0)
    whole = P.icnn_parts(points, labels, k=3, num_neighbors=5)
    assert whole.gamma < 1
    for elements in (1, 2 * len(points), 7 * len(points) + 3):
        monkeypatch.setattr(P, "_CHUNK_ELEMENTS", elements)
        assert P.icnn_parts(points, labels, k=3, num_neighbors=5) == whole


# --- together ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1.0, 0.02])
@pytest.mark.parametrize(("shot", "queries"), [(1, 1), (1, 5), (5, 3), (6, 1)])
def test_episodic_loss_is_the_mean_of_its_terms(shot, queries, spread):
    support, s, z, q = clouds(2, way=4, shot=shot, queries=queries, spread=spread)
    c, own = P.class_prototypes(support, s, 4), torch.arange(4)

    def count(friends):
        return max(5, friends + 1)

    full = shot + queries - 1
    both = torch.cat([support, z]), torch.cat([s, q])
    terms = {
        "ce": P.prototypical_loss(z, q, c, temperature=3.0),
        "proto_triplet": P.proto_triplet_loss(z, q, c, margin=0.2),
        "icnn": P.icnn_loss(*both, num_neighbors=count(full) if len(both[0]) > 8 else None),
        "icnn_support": P.icnn_loss(support, s, num_neighbors=count(shot - 1) if shot > 1 else None),
        "icnn_query": P.icnn_loss(
            z, q, reference=support, reference_labels=s, num_neighbors=count(shot) if shot > 1 else None
        ),
        "icnn_prototype": P.icnn_loss(z, q, reference=c, reference_labels=own),
    }
    assert tuple(terms) == P.TERMS
    options = dict(temperature=3.0, margin=0.2)
    for name, value in terms.items():
        assert value.isfinite()
        torch.testing.assert_close(P.episodic_loss(support, s, z, q, terms=[name], **options), value)
    torch.testing.assert_close(
        P.episodic_loss(support, s, z, q, **options), (terms["ce"] + terms["proto_triplet"] + terms["icnn"]) / 3
    )
    torch.testing.assert_close(
        P.episodic_loss(support, s, z, q, terms=P.TERMS, **options), torch.stack(list(terms.values())).mean()
    )


def test_episodic_k():
    support, s, z, q = clouds(3, shot=3, queries=3)
    both = torch.cat([support, z]), torch.cat([s, q])
    torch.testing.assert_close(
        P.episodic_loss(support, s, z, q, terms=["icnn"], k=2), P.icnn_loss(*both, k=2, num_neighbors=6)
    )


def test_episodic_neighbors_reach_past_the_largest_class():
    # Ten points of two classes, two and eight: only the eighth neighbor shows the larger class an enemy.
    s, q = torch.arange(2), torch.tensor([0] + 7 * [1])
    draw = torch.randn(10, 2, generator=generator_of(4), dtype=torch.float64)
    labels = torch.cat([s, q])
    points = draw + 50 * labels[:, None]
    loss = P.episodic_loss(points[:2], s, points[2:], q, terms=["icnn"], k=1)
    assert loss == P.icnn_loss(points, labels, k=1, num_neighbors=8)
    assert loss != P.icnn_loss(points, labels, k=1, num_neighbors=7)


# --- gradients, dtypes, transforms ------------------------------------------------------------------------------------


def test_gradcheck():
    support, s, z, q = (x.requires_grad_() if x.is_floating_point() else x for x in clouds(4))
    t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda x, z, t: P.prototypical_loss(z, q, P.class_prototypes(x, s, 3), temperature=t), (support, z, t))
    assert check(lambda x, z: P.proto_triplet_loss(z, q, P.class_prototypes(x, s, 3)), (support, z))
    assert check(lambda x, z: P.euclidean_distance(x, z), (support, z))
    assert check(lambda z: P.icnn_loss(z, q, k=2, num_neighbors=4), (z,))
    assert check(lambda x, z: P.icnn_loss(z, q, k=2, num_neighbors=3, reference=x, reference_labels=s), (support, z))
    assert check(lambda x, z: P.episodic_loss(x, s, z, q, terms=P.TERMS), (support, z))


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4, 1e15])
def test_extremes_in_float32(scale):
    support, s, z, q = (x.mul(scale).requires_grad_() if x.is_floating_point() else x for x in clouds(5, dtype=F32))
    loss = P.episodic_loss(support, s, z, q, terms=("proto_triplet", "icnn", "icnn_support", "icnn_query"))
    loss = loss + P.episodic_loss(support, s, z, q, terms=("ce",), temperature=scale**2 + 1)
    loss.backward()
    assert loss.isfinite() and support.grad.isfinite().all() and z.grad.isfinite().all()


def test_margin_errors_name_the_bound():
    with pytest.raises(ValueError, match=r"^margin must be finite and >= 0, got -1"):
        P.proto_triplet_loss(S, Y, C, margin=-1)
    assert P.proto_triplet_loss(C, torch.arange(3), C, margin=0) == 0


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nan_and_infinity_are_called_so(bad):
    with pytest.raises(ValueError, match=r"^embedding must be finite, got NaN or infinity$"):
        P.icnn_score(bad, Y)


def test_the_largest_coordinates_in_float32():
    edge = 0.99 * math.sqrt(torch.finfo(F32).max / 2) / 2
    z = edge * torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]]).requires_grad_()
    assert P.icnn_loss(z, torch.tensor([0, 1, 0])).isfinite()
    assert P.proto_triplet_loss(z, torch.arange(3), z.detach().flip(0)).isfinite()
    with pytest.raises(ValueError, match=r"^embedding must be at most"):
        P.icnn_loss(1.1 * z, torch.tensor([0, 1, 0]))


def test_half_precision_mixes_with_single():
    support, s, z, q = clouds(12, dtype=torch.bfloat16)
    torch.testing.assert_close(P.episodic_loss(support, s, z.float(), q), P.episodic_loss(support, s, z, q))


def test_small_distances_far_from_the_origin():
    support, s, z, q = clouds(6)
    near = P.episodic_loss(support, s, z, q)
    far = P.episodic_loss(*(x.to(F32) + 1000 if x.is_floating_point() else x for x in (support, s, z, q)))
    assert far.item() == pytest.approx(near.item(), rel=2e-3)  # coordinates are rounded to 6e-5 there


def test_collapsed_embedding():
    z, labels = torch.ones(12, 3, requires_grad=True), torch.arange(3).repeat(4)
    loss = P.episodic_loss(z, labels, z, labels, terms=P.TERMS)
    loss.backward()
    assert loss.isfinite() and (z.grad == 0).all()  # smoothed distances have no direction at 0


def test_half_precision_and_autocast():
    support, s, z, q = clouds(7, dtype=torch.bfloat16)
    plain = P.episodic_loss(support.float(), s, z.float(), q, terms=P.TERMS)
    torch.testing.assert_close(P.episodic_loss(support, s, z, q, terms=P.TERMS), plain)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(P.episodic_loss(support.float(), s, z.float(), q, terms=P.TERMS), plain)
        layer = torch.nn.Linear(3, 3)
        out = layer(z.float())
        loss = P.icnn_loss(out, q)
        assert out.dtype == torch.bfloat16 and loss.dtype == F32
        loss.backward()
    assert layer.weight.grad.isfinite().all()
    assert P.episodic_loss(*clouds(7)).dtype == torch.float64


def test_non_contiguous_input():
    _, _, z, q = clouds(8)
    wide = torch.stack([z, -z], 2)[:, :, 0]
    assert not wide.is_contiguous() and P.icnn_loss(wide, q) == P.icnn_loss(z, q)


def test_transforms_and_compile():
    support, s, z, q = clouds(9)
    c = P.class_prototypes(support, s, 3)
    losses = [
        lambda x, z: P.prototypical_loss(z, q, P.class_prototypes(x, s, 3)),
        lambda x, z: P.proto_triplet_loss(z, q, P.class_prototypes(x, s, 3)),
        lambda x, z: P.icnn_loss(z, q, k=2, num_neighbors=4),
        lambda x, z: P.icnn_loss(z, q, k=2, num_neighbors=4, reference=x, reference_labels=s),
    ]
    for loss in losses:
        episodes = torch.stack([support, 2 * support]), torch.stack([z, 1.5 * z])
        together = torch.func.vmap(torch.func.grad(loss, argnums=1))(*episodes)
        for x, z1, gradient in zip(*episodes, together, strict=True):
            torch.testing.assert_close(torch.func.grad(loss, argnums=1)(x, z1), gradient)
            ours = z1.clone().requires_grad_()
            torch.testing.assert_close(torch.autograd.grad(loss(x, ours), ours)[0], gradient)
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(support, z), loss(support, z))
    compiled = torch.compile(lambda z: P.episodic_loss(support, s, z, q), backend="aot_eager")
    torch.testing.assert_close(compiled(z), P.episodic_loss(support, s, z, q))
    torch.testing.assert_close(
        torch.func.vmap(lambda z: P.euclidean_distance(z, c))(z[None])[0], P.euclidean_distance(z, c)
    )


def test_peer_of_the_triplet_loss():
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import BatchHardMiner
    from pytorch_metric_learning.reducers import MeanReducer

    plain = LpDistance(normalize_embeddings=False)
    support, s, z, q = clouds(10, way=5, queries=6, dtype=F32)
    c, own = P.class_prototypes(support, s, 5), torch.arange(5)
    triplets = BatchHardMiner(distance=plain)(
        z, q, c, own
    )  # one positive, one's own prototype, and the nearest of the others
    loss = TripletMarginLoss(margin=0.5, distance=plain, reducer=MeanReducer())(z, q, triplets, c, own)
    torch.testing.assert_close(P.proto_triplet_loss(z, q, c), loss, rtol=1e-5, atol=1e-5)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("support", lambda: P.class_prototypes(S[0], Y, 3)),
        ("support", lambda: P.class_prototypes(NAN, Y, 3)),
        ("support", lambda: P.class_prototypes(S[:0], Y[:0], 3)),
        ("labels", lambda: P.class_prototypes(S, Y[:5], 3)),
        ("labels", lambda: P.class_prototypes(S, Y, 2)),
        ("labels", lambda: P.class_prototypes(S, Y - 1, 3)),
        ("labels", lambda: P.class_prototypes(S, Y, 4)),
        ("num_classes", lambda: P.class_prototypes(S, Y, 0)),
        ("x", lambda: P.euclidean_distance(INF, S)),
        ("y", lambda: P.euclidean_distance(S, torch.zeros(6, 3))),
        ("eps", lambda: P.euclidean_distance(S, S, eps=0)),
        ("queries", lambda: P.prototypical_loss(torch.zeros(6, 3), Y, C)),
        ("queries", lambda: P.prototypical_loss(NAN, Y, C)),
        ("labels", lambda: P.prototypical_loss(S, Y[:, None], C)),
        ("labels", lambda: P.prototypical_loss(S, Y + 1, C)),
        ("prototypes", lambda: P.prototypical_loss(S, Y, C[0])),
        ("temperature", lambda: P.prototypical_loss(S, Y, C, temperature=0.0)),
        ("temperature", lambda: P.prototypical_loss(S, Y, C, temperature=torch.ones(6))),
        ("reduction", lambda: P.prototypical_loss(S, Y, C, reduction="max")),
        ("prototypes", lambda: P.proto_triplet_loss(S, 0 * Y, C[:1])),
        ("labels", lambda: P.proto_triplet_loss(S, Y - 1, C)),
        ("labels", lambda: P.proto_triplet_loss(S, Y[:1], C)),
        ("margin", lambda: P.proto_triplet_loss(S, Y, C, margin=-0.1)),
        ("margin", lambda: P.proto_triplet_loss(S, Y, C, margin=math.nan)),
        ("margin", lambda: P.proto_triplet_loss(S, Y, C, margin=math.inf)),
        ("queries", lambda: P.proto_triplet_loss(S + 1e19, Y, C)),
        ("embedding", lambda: P.icnn_score(S - 1e19, Y)),
        ("reduction", lambda: P.proto_triplet_loss(S, Y, C, reduction=None)),
        ("embedding", lambda: P.icnn_score(S[0], Y)),
        ("embedding", lambda: P.icnn_score(NAN, Y)),
        ("embedding", lambda: P.icnn_score(S[:2], Y[:2])),
        ("labels", lambda: P.icnn_loss(S, Y[:5])),
        ("k", lambda: P.icnn_loss(S, Y, k=0)),
        ("num_neighbors", lambda: P.icnn_loss(S, Y, k=2, num_neighbors=1)),
        ("num_neighbors", lambda: P.icnn_loss(S, Y, k=2, num_neighbors=6)),
        ("reference_labels", lambda: P.icnn_loss(S, Y, reference=S)),
        ("reference_labels", lambda: P.icnn_loss(S, Y, reference_labels=Y)),
        ("reference_labels", lambda: P.icnn_loss(S, Y, reference=S, reference_labels=Y[:2])),
        ("reference", lambda: P.icnn_loss(S, Y, reference=S[:1], reference_labels=Y[:1])),
        ("reference", lambda: P.icnn_loss(S, Y, reference=torch.zeros(6, 3), reference_labels=Y)),
        ("k", lambda: P.icnn_score_classic(S, Y, k=-1)),
        ("p", lambda: P.icnn_score_classic(S, Y, p=0)),
        ("r", lambda: P.icnn_score_classic(S, Y, r=math.inf)),
        ("terms", lambda: P.episodic_loss(S, Y, S, Y, terms=())),
        ("terms", lambda: P.episodic_loss(S, Y, S, Y, terms=("ce", "ce"))),
        ("terms", lambda: P.episodic_loss(S, Y, S, Y, terms=("ce", "pt"))),
        ("support_labels", lambda: P.episodic_loss(S, 0 * Y, S, Y)),
        ("support_labels", lambda: P.episodic_loss(S, Y - 1, S, Y)),
        ("support_labels", lambda: P.episodic_loss(S, Y[:4], S, Y)),
        ("support_labels", lambda: P.episodic_loss(S, 2 * Y, S, Y)),
        ("query_labels", lambda: P.episodic_loss(S, Y, S, Y + 1)),
        ("queries", lambda: P.episodic_loss(S, Y, torch.zeros(6, 3), Y)),
        ("k", lambda: P.episodic_loss(S, Y, S, Y, k=0)),
        ("margin", lambda: P.episodic_loss(S, Y, S, Y, margin=-1.0)),
    ],
)
def test_bad_input(argument, call):
    with pytest.raises(ValueError, match=rf"^{argument} "):
        call()


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("support", lambda: P.class_prototypes(S.tolist(), Y, 3)),
        ("support", lambda: P.class_prototypes(S.long(), Y, 3)),
        ("labels", lambda: P.class_prototypes(S, Y.float(), 3)),
        ("num_classes", lambda: P.class_prototypes(S, Y, 3.0)),
        ("x", lambda: P.euclidean_distance(None, S)),
        ("eps", lambda: P.euclidean_distance(S, S, eps="1e-6")),
        ("queries", lambda: P.prototypical_loss("queries", Y, C)),
        ("labels", lambda: P.prototypical_loss(S, Y.tolist(), C)),
        ("prototypes", lambda: P.prototypical_loss(S, Y, C.bool())),
        ("temperature", lambda: P.prototypical_loss(S, Y, C, temperature=True)),
        ("margin", lambda: P.proto_triplet_loss(S, Y, C, margin=False)),
        ("margin", lambda: P.proto_triplet_loss(S, Y, C, margin="0.5")),
        ("margin", lambda: P.proto_triplet_loss(S, Y, C, margin=None)),
        ("margin", lambda: P.proto_triplet_loss(S, Y, C, margin=[0.5])),
        ("margin", lambda: P.proto_triplet_loss(S, Y, C, margin=torch.tensor(0.5))),
        ("queries", lambda: P.proto_triplet_loss(S.double(), Y, C)),
        ("queries", lambda: P.prototypical_loss(S, Y, C.double())),
        ("y", lambda: P.euclidean_distance(S, S.double())),
        ("embedding", lambda: P.icnn_parts(None, Y)),
        ("labels", lambda: P.icnn_parts(S, None)),
        ("k", lambda: P.icnn_parts(S, Y, k=4.0)),
        ("k", lambda: P.icnn_score_classic(S, Y, k="5")),
        ("num_neighbors", lambda: P.icnn_parts(S, Y, num_neighbors="5")),
        ("num_neighbors", lambda: P.icnn_parts(S, Y, num_neighbors=True)),
        ("reference", lambda: P.icnn_parts(S, Y, reference=S.tolist(), reference_labels=Y)),
        ("reference", lambda: P.icnn_parts(S, Y, reference=S.double(), reference_labels=Y)),
        ("q", lambda: P.icnn_score_classic(S, Y, q=None)),
        ("queries", lambda: P.episodic_loss(S, Y, S.double(), Y)),
        ("terms", lambda: P.episodic_loss(S, Y, S, Y, terms=[["ce"]])),
        ("terms", lambda: P.episodic_loss(S, Y, S, Y, terms=["ce", None])),
        ("terms", lambda: P.episodic_loss(S, Y, S, Y, terms="ce")),
        ("terms", lambda: P.episodic_loss(S, Y, S, Y, terms=None)),
        ("support", lambda: P.episodic_loss(None, Y, S, Y)),
        ("query_labels", lambda: P.episodic_loss(S, Y, S, Y.float())),
    ],
)
def test_wrong_type(argument, call):
    with pytest.raises(TypeError, match=rf"^{argument} "):
        call()


def test_no_class_is_ignored_where_values_are_not_read():
    """torch's cross-entropy takes the class -100 for a row without one, unless it is told not to."""
    queries, labels = torch.zeros(3, 2), torch.tensor([0, -100, 3])
    compiled = torch.compile(
        lambda q, y: P.prototypical_loss(q, y, torch.eye(4, 2)), backend="aot_eager", fullgraph=True
    )
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        compiled(queries, labels)
