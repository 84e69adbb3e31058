"""The propositions of chapter similarity/proto_triplet as properties; closed forms, limits, extremes and bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lossbook.similarity import proto_triplet as P

seeds = st.integers(0, 2**31)
few = settings(deadline=None, max_examples=50)


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
