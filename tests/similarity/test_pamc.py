"""The theorems of chapter similarity/pamc as properties; the losses against slow loops; limits, extremes and bad input."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from sklearn.metrics import accuracy_score
from sklearn.neighbors import kneighbors_graph
from torch.utils._python_dispatch import TorchDispatchMode

from lossbook import lab
from lossbook.similarity import pamc as P

seeds = st.integers(0, 2**31)
inverse_temperatures = st.floats(0.01, 4)
few = settings(deadline=None, max_examples=30)


def graph(n, generator, order=1, dtype=torch.float64):
    """A random sparse graph and its influence matrix."""
    adjacency = (torch.rand(n, n, generator=generator) < 0.2).triu(1)
    return P.influence_matrix((adjacency | adjacency.T).to(dtype), order)


def instance(seed, n=None, d=4, k=3, order=2):
    """Embedding with rows of many lengths, labels with each cluster in use, and influence."""
    generator = torch.Generator().manual_seed(seed)
    n = n or int(torch.randint(2 * k, 25, (), generator=generator))
    z = torch.randn(n, d, generator=generator, dtype=torch.float64)
    z = z * torch.rand(n, 1, generator=generator, dtype=torch.float64).exp()
    labels = torch.cat([torch.arange(k), torch.randint(k, (n - k,), generator=generator)])
    return z, labels[torch.randperm(n, generator=generator)], graph(n, generator, order)


# --- values -----------------------------------------------------------------------------------------------------------


def cosine(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))


def slow_positive(z, influence, tau, self_similarity):
    total = 0.0
    for i in range(len(z)):
        similarity = [self_similarity if i == j else cosine(z[i], z[j]) for j in range(len(z))]
        total += math.log(sum(influence[i][j] * math.exp(tau * similarity[j]) for j in range(len(z))))
    return total / len(z)


def slow_negative(z, tau, self_similarity):
    total = 0.0
    for i in range(len(z)):
        similarity = [self_similarity if i == j else cosine(z[i], z[j]) for j in range(len(z))]
        total += math.log(sum(math.exp(tau * s) for s in similarity))
    return total / len(z)


def slow_meta_nodes(z, labels, k):
    sums = [[0.0] * len(z[0]) for _ in range(k)]
    for row, label in zip(z, labels, strict=True):
        sums[label] = [a + b for a, b in zip(sums[label], row, strict=True)]
    return sums


@few
@given(seeds, inverse_temperatures, st.sampled_from([0.0, 1.0, -0.3]), st.integers(1, 4))
def test_losses_equal_the_slow_loops(seed, tau, self_similarity, order):
    z, labels, influence = instance(seed, order=order)
    rows, options = z.tolist(), dict(tau=tau, self_similarity=self_similarity)
    positive = slow_positive(rows, influence.to_dense().tolist(), tau, self_similarity)
    meta = slow_negative(slow_meta_nodes(rows, labels.tolist(), 3), tau, self_similarity)
    pairs = slow_negative(rows, tau, self_similarity)
    assert P.neighborhood_positive(z, influence, **options).item() == pytest.approx(positive, abs=1e-12)
    assert P.meta_node_negative(z, labels, 3, **options).item() == pytest.approx(meta, abs=1e-12)
    assert P.pairwise_negative(z, **options, chunk_size=4).item() == pytest.approx(pairs, abs=1e-12)
    loss = P.pamc_loss(z, labels, influence, num_clusters=3, **options)
    assert loss.item() == pytest.approx(meta - positive, abs=1e-12)
    exact = P.pairwise_contrast_loss(z, influence, **options)
    assert exact.item() == pytest.approx(pairs - positive, abs=1e-12)


def dense_reference(z, labels, influence, k, tau):
    """The authors' loss, in its dense form, with the 1e-10 in the logarithms."""
    onehot = F.one_hot(labels, k).to(z.dtype)
    similarity, meta = (F.normalize(x, dim=1) @ F.normalize(x, dim=1).T for x in (z, onehot.T @ z))
    similarity, meta = (x * (1 - torch.eye(len(x), dtype=x.dtype)) for x in (similarity, meta))
    positive = ((tau * similarity).exp() * influence.to_dense()).sum(1)
    return -(positive + 1e-10).log().mean() + ((tau * meta).exp().sum(1) + 1e-10).log().mean()


@few
@given(seeds, inverse_temperatures)
def test_value_and_gradient_of_the_reference(seed, tau):
    z, labels, influence = instance(seed)
    x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss = P.pamc_loss(x, labels, influence, num_clusters=3, tau=tau)
    reference = dense_reference(y, labels, influence, 3, tau)
    torch.testing.assert_close(loss, reference, rtol=0, atol=1e-8)
    loss.backward(), reference.backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-7, atol=1e-8)


BLOCKS = torch.block_diag(*[torch.full((2, 2), 0.5, dtype=torch.float64)] * 2).to_sparse()


@pytest.mark.parametrize(
    ("other", "pamc", "exact"), [((0.0, 1.0), 0.0730327, 1.1235539), ((-1.0, 0.0), -0.3068528, None)]
)
def test_by_hand(other, pamc, exact):
    z = torch.tensor([(1.0, 0.0), (1.0, 0.0), other, other], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    assert P.pamc_loss(z, labels, BLOCKS, num_clusters=2, tau=1.0).item() == pytest.approx(pamc, abs=1e-7)
    assert P.neighborhood_positive(z, BLOCKS, tau=1.0).exp().item() == pytest.approx(1.8591409, abs=1e-7)
    if exact:
        assert P.pairwise_contrast_loss(z, BLOCKS, tau=1.0).item() == pytest.approx(exact, abs=1e-7)


def test_meta_nodes_hard_soft_and_empty():
    z, labels, _ = instance(0, n=12)
    hard = P.meta_nodes(z, labels, 5)
    torch.testing.assert_close(hard, torch.stack([z[labels == a].sum(0) for a in range(5)]))
    assert (hard[3:] == 0).all()
    torch.testing.assert_close(P.meta_nodes(z, F.one_hot(labels, 5).to(z.dtype), 5), hard)
    q = torch.rand(12, 5, dtype=torch.float64, requires_grad=True)
    soft = P.meta_nodes(z.requires_grad_(), q, 5)
    torch.testing.assert_close(soft, torch.einsum("ia,id->ad", q, z))
    soft.sum().backward()
    assert q.grad is None and z.grad is not None
    loss = P.meta_node_negative(z, q, 5, tau=1.0)
    assert loss.item() == pytest.approx(slow_negative(soft.tolist(), 1.0, 0.0), abs=1e-12)


def test_empty_clusters_are_in_neither_sum():
    z, labels, influence = instance(1, n=12)
    options = dict(tau=1.3, self_similarity=0.0)
    wanted = P.meta_node_negative(z, labels, 3, **options)
    spread_out = torch.tensor([1, 4, 6])[labels]  # clusters 0, 2, 3, 5 and 7 are empty
    z = z.requires_grad_()
    loss = P.meta_node_negative(z, spread_out, 8, **options)
    torch.testing.assert_close(loss, wanted)
    assert torch.autograd.grad(loss, z)[0].isfinite().all()
    soft = F.one_hot(spread_out, 8).to(z.dtype)
    torch.testing.assert_close(P.meta_node_negative(z, soft, 8, **options), wanted)
    gap, same = P.negative_gap(z, spread_out, 8, tau=1.3), P.negative_gap(z, labels, 3, tau=1.3)
    torch.testing.assert_close(torch.stack(gap), torch.stack(same))


def test_cluster_whose_members_cancel():
    z = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [3.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = P.meta_node_negative(z, torch.tensor([0, 0, 1]), 2, tau=1.0)
    assert loss.item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(loss, z)
    assert (gradient == 0).all()


@few
@given(seeds, inverse_temperatures)
def test_one_cluster_and_one_cluster_a_node(seed, tau):
    z, _, _ = instance(seed)
    one = P.meta_node_negative(z, torch.zeros(len(z), dtype=torch.int64), 1, tau=tau)
    assert one.item() == pytest.approx(0, abs=1e-12)
    each = P.meta_node_negative(z, torch.randperm(len(z)), len(z), tau=tau, self_similarity=0.4)
    torch.testing.assert_close(each, P.pairwise_negative(z, tau=tau, self_similarity=0.4))


@few
@given(seeds, inverse_temperatures)
def test_symmetries(seed, tau):
    z, labels, influence = instance(seed)
    wanted = P.pamc_loss(z, labels, influence, num_clusters=3, tau=tau)
    exact = P.pairwise_contrast_loss(z, influence, tau=tau)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    moved = influence.to_dense()[order][:, order].to_sparse()
    torch.testing.assert_close(P.pamc_loss(z[order], labels[order], moved, num_clusters=3, tau=tau), wanted)
    torch.testing.assert_close(P.pairwise_contrast_loss(z[order], moved, tau=tau), exact)
    torch.testing.assert_close(P.pamc_loss(7 * z, labels, influence, num_clusters=3, tau=tau), wanted)


def test_long_rows_weigh_more():
    z, labels, influence = instance(2, n=12)
    member = int((labels == labels.bincount().argmax()).nonzero()[0])
    longer = z.clone()
    longer[member] *= 5  # the cosines do not see it, the sums do
    exact = [P.pairwise_contrast_loss(x, influence, tau=1.0) for x in (z, longer)]
    torch.testing.assert_close(*exact)
    pamc = [P.pamc_loss(x, labels, influence, num_clusters=3, tau=1.0) for x in (z, longer)]
    assert abs(pamc[0] - pamc[1]) > 0.01


# --- what the approximation loses -------------------------------------------------------------------------------------


@few
@given(seeds)
def test_statistics_are_those_of_all_pairs_and_cosines_are_inflated_means(seed):
    z, labels, _ = instance(seed)
    unit = F.normalize(z, dim=1)
    statistics = P.block_statistics(3 * z, labels, 3)
    products = unit @ unit.T
    cosines = F.normalize(P.meta_nodes(unit, labels, 3), dim=1)
    for a in range(3):
        assert statistics.resultants[a].item() == pytest.approx(unit[labels == a].mean(0).norm().item(), abs=1e-12)
        for b in range(3):
            block = products[labels == a][:, labels == b]
            assert statistics.means[a, b].item() == pytest.approx(block.mean().item(), abs=1e-12)
            assert statistics.variances[a, b].item() == pytest.approx(block.var(correction=0).item(), abs=1e-12)
            inflated = statistics.means[a, b] / (statistics.resultants[a] * statistics.resultants[b])
            assert inflated.item() == pytest.approx((cosines[a] @ cosines[b]).item(), abs=1e-11)
    r = statistics.resultants
    assert (statistics.variances <= 1 - (r[:, None] * r) ** 2 + 1e-12).all()


@settings(deadline=None, max_examples=100)
@given(seeds, st.floats(0.001, 4), st.floats(0.0, 3.0))
def test_bounds_on_the_block_sums(seed, tau, noise):
    generator = torch.Generator().manual_seed(seed)
    z, labels, _ = instance(seed, k=5)
    z = torch.randn(5, 4, generator=generator, dtype=torch.float64)[labels] + noise * z
    unit = F.normalize(z, dim=1)
    member = F.one_hot(labels, 5).double()
    exact = (member.T @ (tau * unit @ unit.T).exp() @ member).log()
    lower, hoeffding, bennett = P.block_sum_bounds(P.block_statistics(z, labels, 5), tau=tau)
    assert (lower <= exact + 1e-12).all() and (exact <= hoeffding + 1e-12).all() and (exact <= bennett + 1e-12).all()


@settings(deadline=None, max_examples=100)
@given(seeds, st.floats(0.001, 4), st.floats(0.0, 3.0), st.sampled_from([0.0, 1.0]))
def test_gap_adds_up_and_keeps_its_bounds(seed, tau, noise, self_similarity):
    generator = torch.Generator().manual_seed(seed)
    z, labels, _ = instance(seed, k=3)
    z = F.normalize(torch.randn(3, 4, generator=generator, dtype=torch.float64)[labels] + noise * z, dim=1)
    gap = P.negative_gap(z, labels, 3, tau=tau, self_similarity=self_similarity)
    options = dict(tau=tau, self_similarity=self_similarity)
    total = P.pairwise_negative(z, **options) - P.meta_node_negative(z, labels, 3, **options) - math.log(len(z) / 3)
    torch.testing.assert_close(gap.total, total)
    torch.testing.assert_close(gap.total, sum(gap[1:]))
    statistics = P.block_statistics(z, labels, 3)
    lower, hoeffding, bennett = P.block_sum_bounds(statistics, tau=tau)
    assert -1e-12 <= gap.spread <= min((hoeffding - lower).max(), (bennett - lower).max()) + 1e-12
    delta = 1 - statistics.resultants.min() ** 2
    assert abs(gap.inflation) <= tau * delta + 1e-12
    share = statistics.sizes / len(z)
    apart = (share - 1 / 3).abs().sum() / 2
    assert abs(gap.sizes) <= (3 * share).log().abs().max() + 2 * tau * apart + 1e-12
    if self_similarity == 1:
        assert abs(gap.diagonal) < 1e-12


def test_exact_for_balanced_clusters_of_one_direction():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    labels = torch.arange(4).repeat_interleave(20)
    z = 3 * centers[labels]
    for tau in (0.3, 1.0, 3.0):
        options = dict(tau=tau, self_similarity=1.0)
        difference = P.pairwise_negative(z, **options) - P.meta_node_negative(z, labels, 4, **options)
        assert difference.item() == pytest.approx(math.log(20), abs=1e-10)
    noise = torch.randn(80, 5, generator=generator, dtype=torch.float64)
    gaps = [
        abs(P.negative_gap(centers[labels] + s * noise, labels, 4, tau=1.0, self_similarity=1.0).total.item())
        for s in (1.0, 0.3, 0.1, 0.01)
    ]
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] and gaps[3] < 3e-4


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_sampled_negatives_are_too_low_and_approach_the_exact():
    z, _, influence = instance(3, n=40)
    exact = P.pairwise_contrast_loss(z, influence, tau=2.0).item()
    means = []
    for m in (1, 4, 16, 256):
        generator = torch.Generator().manual_seed(0)
        draws = [
            P.sampled_contrast_loss(z, influence, tau=2.0, num_negatives=m, generator=generator) for _ in range(200)
        ]
        means.append(torch.stack(draws).mean().item())
    biases = [exact - mean for mean in means]
    assert biases[0] > 2 * biases[1] > 4 * biases[2] > 0 and biases[0] > 0.3 and abs(biases[3]) < 0.01


def test_sampled_sum_is_unbiased():
    """With one negative a row, the exponential of the row's term is the sum itself."""
    z, _, influence = instance(4, n=5)
    unit = F.normalize(z, dim=1)
    sums = ((1.5 * unit @ unit.T).exp() * (1 - torch.eye(5, dtype=z.dtype))).sum(1) + 1
    lowest, highest = math.inf, -math.inf
    positive = P.neighborhood_positive(z, influence, tau=1.5)
    generator = torch.Generator().manual_seed(0)
    logs = []
    for _ in range(4000):
        loss = P.sampled_contrast_loss(z, influence, tau=1.5, num_negatives=1, generator=generator) + positive
        lowest, highest = min(lowest, loss.item()), max(highest, loss.item())
        logs.append(loss.item())
    terms = (1.5 * unit @ unit.T)[~torch.eye(5, dtype=torch.bool)].view(5, 4)
    choices = torch.logaddexp(terms + math.log(4), torch.zeros(()).double())
    assert lowest == pytest.approx(choices.amin(1).mean().item(), abs=1e-9)
    assert highest == pytest.approx(choices.amax(1).mean().item(), abs=1e-9)
    assert np.mean(logs) == pytest.approx(choices.mean().item(), abs=4 * np.std(logs) / math.sqrt(4000))
    torch.testing.assert_close(choices.exp().mean(1), sums)  # unbiased inside of the logarithm


# --- the graph --------------------------------------------------------------------------------------------------------


@few
@given(seeds, st.integers(1, 6))
def test_knn_graph_is_scikit_learns(seed, k):
    generator = torch.Generator().manual_seed(seed)
    x = 1000 + torch.randn(30, 3, generator=generator)
    one_way = kneighbors_graph(x.double().numpy(), k).toarray()
    adjacency = P.knn_graph(x, k)
    np.testing.assert_array_equal(adjacency.to_dense().numpy(), np.maximum(one_way, one_way.T))
    assert adjacency.dtype == torch.float32 and adjacency.is_coalesced()


@few
@given(seeds, st.integers(1, 4), st.booleans())
def test_influence_is_the_power_sum_of_a_random_walk(seed, order, cumulative):
    generator = torch.Generator().manual_seed(seed)
    adjacency = (torch.rand(9, 9, generator=generator) < 0.2).triu(1)
    adjacency = (adjacency | adjacency.T).double()
    step = adjacency + torch.eye(9, dtype=torch.float64)
    step = step / step.sum(1, keepdim=True)
    powers = [torch.linalg.matrix_power(step, r) for r in range(1, order + 1)]
    wanted = sum(powers) if cumulative else powers[-1]
    for form in (adjacency, adjacency.to_sparse(), adjacency.to_sparse_csr(), csr_matrix(adjacency.numpy())):
        influence = P.influence_matrix(form, order, cumulative=cumulative)
        torch.testing.assert_close(influence.to_dense(), wanted)
        assert influence.is_coalesced()
    torch.testing.assert_close(
        influence.to_dense().sum(1), torch.full((9,), order if cumulative else 1, dtype=torch.float64)
    )
    assert P.influence_matrix(adjacency.bool(), 1).dtype == torch.float32


@pytest.mark.parametrize("name", ["karate", "les_miserables"])
def test_real_graphs_keep_the_bounds(name):
    """Spectral embedding and communities of a real graph: the bounds of the theorem hold, and the order of its errors is as said."""
    import networkx as nx

    g = lab.load_graph(name)
    adjacency = (torch.tensor(nx.to_numpy_array(g)) > 0).double()
    degree = adjacency.sum(1)
    values, vectors = torch.linalg.eigh(adjacency / (degree[:, None] * degree).sqrt())
    communities = nx.community.greedy_modularity_communities(g)
    k = len(communities)
    z = vectors[:, -k:] / degree[:, None].sqrt()
    place = {node: i for i, node in enumerate(g)}
    labels = torch.zeros(len(g), dtype=torch.int64)
    for a, members in enumerate(communities):
        labels[[place[node] for node in members]] = a
    statistics = P.block_statistics(z, labels, k)
    unit, member = F.normalize(z, dim=1), F.one_hot(labels, k).double()
    for tau in (0.25, 0.5, 1.5):
        exact = (member.T @ (tau * unit @ unit.T).exp() @ member).log()
        lower, hoeffding, bennett = P.block_sum_bounds(statistics, tau=tau)
        assert (lower <= exact + 1e-12).all() and (exact <= torch.minimum(hoeffding, bennett) + 1e-12).all()
        gap = P.negative_gap(unit, labels, k, tau=tau, self_similarity=1.0)
        assert 0 <= gap.spread <= tau**2 / 2
        assert abs(gap.inflation) <= tau * (1 - statistics.resultants.min() ** 2)


# --- clustering -------------------------------------------------------------------------------------------------------


@few
@given(seeds, st.floats(0.3, 20))
def test_soft_assignment_is_students_t(seed, dof):
    z, _, _ = instance(seed)
    centers = z[:3] + 0.1
    kernel = (1 + torch.cdist(z, centers) ** 2 / dof) ** (-(dof + 1) / 2)
    q = P.soft_assignment(z, centers, dof=dof)
    torch.testing.assert_close(q, kernel / kernel.sum(1, keepdim=True))
    on_center = P.soft_assignment(centers, centers, dof=dof)
    assert (on_center.argmax(1) == torch.arange(3)).all()


def test_gradient_of_soft_assignment_at_a_center():
    z = torch.tensor([[1.0, 2.0], [0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    centers = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(P.soft_assignment(z, centers)[:, 0].log().sum(), z)
    # At the center log q_0 = -log(1 + 1 / (1 + |z - mu_1|^2)): only the other center pulls.
    wanted = 2 * torch.tensor([1.0, 2.0], dtype=torch.float64) / (6 * 7)
    torch.testing.assert_close(gradient[0], wanted)
    apart = torch.tensor([[1.2, 1.9], [-0.3, 0.2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(P.soft_assignment, (z, apart))


@few
@given(seeds)
def test_target_sharpens_balanced_assignments(seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.rand(9, 3, generator=generator, dtype=torch.float64)
    for _ in range(500):  # rows of sum 1, columns of sum 3
        q = q / q.sum(0) * 3
        q = q / q.sum(1, keepdim=True)
    p = P.target_distribution(q)
    slow = [
        [q[i, a] ** 2 / q[:, a].sum() / sum(q[i, b] ** 2 / q[:, b].sum() for b in range(3)) for a in range(3)]
        for i in range(9)
    ]
    torch.testing.assert_close(p, torch.tensor(slow, dtype=torch.float64))
    entropy = lambda x: -(x * x.log()).sum(1)
    assert (entropy(p) <= entropy(q) + 1e-9).all()
    divergence = P.cluster_kl(q, p)
    assert divergence.item() == pytest.approx((p * (p / q).log()).sum().item() / 9, abs=1e-12)
    assert divergence > 0 and abs(P.cluster_kl(q, q)) < 1e-15


def test_target_frees_from_cluster_size():
    """Two clusters, one with 90 of 100 nodes: a node that is half in each goes to the small one."""
    q = torch.tensor([[0.9, 0.1]] * 90 + [[0.1, 0.9]] * 9 + [[0.5, 0.5]])
    p = P.target_distribution(q)
    assert p[-1, 1] == pytest.approx((81 + 0.9 + 0.5) / 100, abs=1e-6)
    assert not P.target_distribution(q.requires_grad_()).requires_grad


def test_cluster_kl_at_zeros():
    q = torch.tensor([[1.0, 0.0], [0.5, 0.5]], requires_grad=True)
    loss = P.cluster_kl(q, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert loss.item() == pytest.approx(math.log(2) / 2)
    (gradient,) = torch.autograd.grad(loss, q)
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, 0.0], [-1.0, 0.0]]))
    assert P.cluster_kl(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])) == math.inf
    tiny = torch.tensor([[1e-30, 2e-30]])  # its squares underflow
    torch.testing.assert_close(P.target_distribution(tiny), torch.tensor([[1 / 3, 2 / 3]]))


@few
@given(seeds, st.integers(1, 5), st.integers(1, 5))
def test_accuracy_is_the_best_naming(seed, classes, clusters):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (30,), generator=generator)
    predicted = torch.randint(clusters, (30,), generator=generator)
    size = max(classes, clusters)
    best = max(
        accuracy_score(labels, torch.tensor(name)[predicted]) for name in permutations(range(size))
    )  # fmt: skip
    assert P.clustering_accuracy(labels, predicted) == pytest.approx(best)
    assert P.clustering_accuracy(labels, (labels + 2) % 7) == 1


def test_module_is_the_sum_of_its_parts():
    z, _, influence = instance(5, n=15)
    z = z.requires_grad_()
    centers = z.detach()[:3]
    loss_fn = P.PamCLoss(centers, alpha=0.7, beta=1.9, tau=1.1)
    q = P.soft_assignment(z, loss_fn.centers)
    kl = P.cluster_kl(q, P.target_distribution(q))
    options = dict(num_clusters=3, tau=1.1)
    hard = 1.9 * kl + 0.7 * P.pamc_loss(z, q.argmax(1), influence, **options)
    torch.testing.assert_close(loss_fn(z, influence), hard)
    soft = 1.9 * kl + 0.7 * P.pamc_loss(z, q, influence, **options)
    soft_fn = P.PamCLoss(centers, alpha=0.7, beta=1.9, tau=1.1, soft=True)
    torch.testing.assert_close(soft_fn(z, influence), soft)
    assert abs(soft - hard) > 1e-3
    assert (loss_fn.predict(z) == q.argmax(1)).all()
    for fn in (loss_fn, soft_fn):  # the contrastive part is constant in the assignment: the centers learn from KL alone
        (got,) = torch.autograd.grad(fn(z, influence), fn.centers)
        p = P.target_distribution(P.soft_assignment(z, fn.centers))
        (wanted,) = torch.autograd.grad(1.9 * P.cluster_kl(P.soft_assignment(z, fn.centers), p), fn.centers)
        torch.testing.assert_close(got, wanted)
    copy = P.PamCLoss(torch.zeros(3, 4, dtype=torch.float64) + 1, alpha=0.7, beta=1.9, tau=1.1)
    copy.load_state_dict(loss_fn.state_dict())
    torch.testing.assert_close(copy(z, influence), hard)
    assert P.PamCLoss(centers, alpha=0, beta=1, tau=1.0)(z, influence).item() == pytest.approx(kl.item())


def test_labels_are_constants_of_the_step():
    z, labels, influence = instance(6, n=10)
    x = z.clone().requires_grad_()
    P.meta_node_negative(x, labels, 3, tau=1.0).backward()
    # The gradient of a node is that of its cluster's sum.
    centers = P.meta_nodes(z, labels, 3).requires_grad_()
    P.pairwise_negative(centers, tau=1.0).backward()
    torch.testing.assert_close(x.grad, centers.grad[labels])


# --- derivatives, precision, transforms ------------------------------------------------------------------------------


def test_gradcheck():
    z, labels, influence = instance(7, n=6, d=3, k=2)
    z = z.requires_grad_()
    for self_similarity in (0.0, 1.0):
        options = dict(tau=1.4, self_similarity=self_similarity)
        pamc = lambda x, options=options: P.pamc_loss(x, labels, influence, num_clusters=2, **options)
        exact = lambda x, options=options: P.pairwise_contrast_loss(x, influence, **options, chunk_size=4)
        assert torch.autograd.gradcheck(pamc, z) and torch.autograd.gradcheck(exact, z)
        assert torch.autograd.gradgradcheck(pamc, z)

    def sampled(x):
        generator = torch.Generator().manual_seed(0)
        return P.sampled_contrast_loss(x, influence, tau=1.4, num_negatives=3, generator=generator)

    assert torch.autograd.gradcheck(sampled, z)


def test_blocks_of_edges_make_no_difference(monkeypatch):
    z, _, influence = instance(8, n=20, order=3)
    x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
    whole = P.neighborhood_positive(x, influence, tau=1.0)
    whole.backward()
    monkeypatch.setattr(P, "_EDGE_ELEMENTS", 30)  # seven edges a block
    parts = P.neighborhood_positive(y, influence, tau=1.0)
    parts.backward()
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(y.grad, x.grad)


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor) and x.layout is torch.strided:
                self.elements = max(self.elements, x.numel())
        return result


def test_no_matrix_of_pairs_is_made():
    n, d, k = 20_000, 16, 10
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(n, (2, 5 * n), generator=generator)
    adjacency = torch.sparse_coo_tensor(ends, torch.ones(5 * n), (n, n), check_invariants=True)
    influence = P.influence_matrix(adjacency + adjacency.t(), 1)
    z = torch.randn(n, d, generator=generator, requires_grad=True)
    with Largest() as largest:
        P.pamc_loss(z, torch.arange(n) % k, influence, num_clusters=k, tau=1.0).backward()
    assert largest.elements <= max(2 * influence._nnz(), P._EDGE_ELEMENTS)  # 3.5 MB, where n x n has 1.6 GB
    z = torch.randn(3000, d, generator=generator, requires_grad=True)
    with Largest() as largest:
        P.pairwise_negative(z, tau=1.0, chunk_size=100).backward()
    assert largest.elements == 100 * 3000
    with Largest() as largest:
        P.knn_graph(torch.randn(6000, 3, generator=generator), 3)
    assert largest.elements < 6000**2 / 2


@pytest.mark.parametrize("tau", [1e-4, 1e4])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_extremes_in_float32(tau, scale):
    z, labels, influence = instance(9, n=12)
    wide = (z * scale).requires_grad_()
    narrow = (z * scale).float().requires_grad_()
    options = dict(num_clusters=3, tau=tau)
    for name, arguments in (("pamc_loss", (labels, influence)), ("pairwise_contrast_loss", (influence,))):
        kept = options if name == "pamc_loss" else dict(tau=tau)
        loss = getattr(P, name)(narrow, *arguments, **kept)
        wanted = getattr(P, name)(wide, *arguments, **kept)
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6 + 1e-6 * tau)
        gradient, exact = torch.autograd.grad(loss, narrow)[0], torch.autograd.grad(wanted, wide)[0]
        assert loss.dtype == torch.float32 and gradient.isfinite().all()
        torch.testing.assert_close(gradient.double() * scale, exact * scale, rtol=2e-3, atol=1e-5 * tau)
    q = P.soft_assignment(1e4 * torch.randn(5, 3), 1e4 * torch.randn(2, 3))
    assert q.isfinite().all()


def test_single_node_and_ties():
    one = torch.tensor([[2.0, 1.0]], requires_grad=True)
    influence = P.influence_matrix(torch.zeros(1, 1), 1)
    loss = P.pamc_loss(one, torch.tensor([0]), influence, num_clusters=1, tau=1.0)
    assert loss.item() == 0 and P.pairwise_contrast_loss(one, influence, tau=1.0).item() == 0
    (gradient,) = torch.autograd.grad(loss, one)
    assert (gradient == 0).all()
    equal = torch.ones(4, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(P.pairwise_negative(equal, tau=1.0), equal)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_half_precision_and_autocast():
    z, labels, influence = instance(10, n=16)
    z = z.float()
    options = dict(num_clusters=3, tau=1.0)
    wanted = P.pamc_loss(z, labels, influence, **options)
    soft = torch.rand(16, 3)
    wanted_soft = P.pamc_loss(z, soft, influence, **options)
    q = P.soft_assignment(z, z[:3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(P.pamc_loss(z, labels, influence, **options), wanted)
        torch.testing.assert_close(P.pamc_loss(z, soft, influence, **options), wanted_soft)
        exact = P.pairwise_contrast_loss(z, influence, tau=1.0)
        torch.testing.assert_close(P.soft_assignment(z, z[:3]), q)
    torch.testing.assert_close(exact, P.pairwise_contrast_loss(z, influence, tau=1.0))
    half = P.pamc_loss(z.bfloat16(), labels, influence, **options)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, P.pamc_loss(z.bfloat16().float(), labels, influence, **options))


def test_functional_transforms():
    z, labels, influence = instance(11, n=9)
    batch = torch.stack([z, z.flip(0), 2 * z + 1])
    options = dict(num_clusters=3, tau=1.2)
    for loss in (
        lambda x: P.pamc_loss(x, labels, influence, **options),
        lambda x: P.pairwise_contrast_loss(x, influence, tau=1.2),
        lambda x: P.cluster_kl(P.soft_assignment(x, x[:3] + 0.1), P.target_distribution(P.soft_assignment(x, x[:3]))),
    ):
        torch.testing.assert_close(torch.func.vmap(loss)(batch), torch.stack([loss(x) for x in batch]))
        gradients = torch.func.vmap(torch.func.grad(loss))(batch)
        for x, gradient in zip(batch, gradients, strict=True):
            y = x.clone().requires_grad_()
            torch.testing.assert_close(gradient, torch.autograd.grad(loss(y), y)[0])


def test_compile():
    z, labels, influence = instance(12, n=9)
    z = z.float()
    for loss in (
        lambda x: P.meta_node_negative(x, labels, 3, tau=1.2),
        lambda x: P.pamc_loss(x, labels, influence.float(), num_clusters=3, tau=1.2),
    ):
        x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
        compiled = torch.compile(loss, backend="aot_eager")(x)
        plain = loss(y)
        torch.testing.assert_close(compiled, plain)
        compiled.backward(), plain.backward()
        torch.testing.assert_close(x.grad, y.grad)


def test_non_contiguous_input():
    z, labels, influence = instance(13, n=10)
    turned = z.T.contiguous().T
    assert not turned.is_contiguous()
    options = dict(num_clusters=3, tau=1.0)
    torch.testing.assert_close(
        P.pamc_loss(turned, labels, influence, **options), P.pamc_loss(z, labels, influence, **options)
    )
    torch.testing.assert_close(
        P.pamc_loss(z, labels, influence.to_sparse_csr(), **options), P.pamc_loss(z, labels, influence, **options)
    )


# --- bad input --------------------------------------------------------------------------------------------------------

Z = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
LABELS = torch.tensor([0, 0, 1])
INFLUENCE = P.influence_matrix(torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]]), 1)
Q = torch.full((3, 2), 0.5)
PAMC = dict(embedding=Z, assignment=LABELS, influence=INFLUENCE, num_clusters=2, tau=1.0)
PAIR = dict(embedding=Z, influence=INFLUENCE, tau=1.0)
LOSS_FN = dict(centers=Z[:2], alpha=1.0, beta=1.0, tau=1.0)
NAN = Z.clone()
NAN[1, 1] = math.nan
EMPTY_ROW = torch.tensor([[0.0, 0, 0], [1, 0, 1], [0, 1, 0]]).to_sparse()
GOOD = {
    P.pamc_loss: PAMC,
    P.pairwise_contrast_loss: PAIR,
    P.sampled_contrast_loss: PAIR | dict(num_negatives=2),
    P.meta_nodes: dict(embedding=Z, assignment=LABELS, num_clusters=2),
    P.pairwise_negative: dict(embedding=Z, tau=1.0),
    P.influence_matrix: dict(adjacency=torch.zeros(3, 3), order=1),
    P.knn_graph: dict(features=Z, num_neighbors=1),
    P.block_statistics: dict(embedding=Z, labels=LABELS, num_clusters=2),
    P.negative_gap: dict(embedding=Z, labels=LABELS, num_clusters=2, tau=1.0),
    P.block_sum_bounds: dict(statistics=P.block_statistics(Z, LABELS, 2), tau=1.0),
    P.soft_assignment: dict(embedding=Z, centers=Z[:2]),
    P.target_distribution: dict(assignment=Q),
    P.cluster_kl: dict(assignment=Q, target=Q),
    P.clustering_accuracy: dict(labels=LABELS, predicted=LABELS),
    P.PamCLoss: LOSS_FN,
}
BAD = [
    (P.pamc_loss, "embedding", [Z.tolist(), Z.long(), Z[0], Z[:0], NAN, None, True, 0 * Z]),
    (P.pamc_loss, "assignment", [LABELS.tolist(), LABELS.int(), LABELS[:2], LABELS + 1, -LABELS, None, Q[:, :1], Q[:2], -Q, Q * math.inf, LABELS.bool()]),
    (P.pamc_loss, "influence", [INFLUENCE.to_dense(), None, "graph", EMPTY_ROW, -INFLUENCE, INFLUENCE * math.nan, torch.eye(4).to_sparse(), torch.ones(3, 2).to_sparse(), torch.eye(3).long().to_sparse()]),
    (P.pamc_loss, "num_clusters", [0, 2.0, True, None, "2", torch.tensor(2)]),
    (P.pamc_loss, "tau", [0.0, -1.0, math.inf, math.nan, None, "1", True, torch.tensor(1.0), [1.0]]),
    (P.pamc_loss, "self_similarity", [1.5, math.nan, None, "0", True]),
    (P.pairwise_contrast_loss, "tau", [0.0, None]),
    (P.pairwise_contrast_loss, "influence", [EMPTY_ROW, INFLUENCE.to_dense()]),
    (P.pairwise_contrast_loss, "chunk_size", [0, 1.5, "all"]),
    (P.sampled_contrast_loss, "num_negatives", [0, 1.5, None, True]),
    (P.sampled_contrast_loss, "tau", [0.0, "1"]),
    (P.sampled_contrast_loss, "embedding", [Z[:1], NAN, None]),
    (P.meta_nodes, "embedding", [Z.tolist(), NAN, Z[0], None]),
    (P.meta_nodes, "num_clusters", [0, None, 1.0]),
    (P.pairwise_negative, "embedding", [NAN, Z * math.inf, Z - Z[:1], None, [1.0]]),
    (P.pairwise_negative, "tau", [0, -1, None]),
    (P.influence_matrix, "adjacency", [None, [[0, 1]], torch.zeros(2, 3), -torch.eye(3), torch.eye(3) * math.nan, torch.zeros(0, 0), csr_matrix(np.ones((2, 3)))]),
    (P.influence_matrix, "order", [0, -1, 1.0, True, None, "2"]),
    (P.knn_graph, "features", [NAN, Z.long(), Z.tolist(), Z[0]]),
    (P.knn_graph, "num_neighbors", [0, 3, 1.0, None]),
    (P.block_statistics, "embedding", [NAN, 0 * Z, None]),
    (P.block_statistics, "labels", [Q, LABELS[:2], LABELS.tolist(), None, LABELS.int()]),
    (P.negative_gap, "labels", [Q, None]),
    (P.negative_gap, "tau", [0.0, None, "1"]),
    (P.block_sum_bounds, "statistics", [None, (1, 2, 3, 4), Z]),
    (P.block_sum_bounds, "tau", [0.0, None, True]),
    (P.soft_assignment, "embedding", [NAN, Z[0], None]),
    (P.soft_assignment, "centers", [Z[:2, :1], Z[:2].double(), NAN, None, Z[:2].tolist()]),
    (P.target_distribution, "assignment", [-Q, 0 * Q, Q[0], Q * math.nan, None, Q.tolist(), LABELS]),
    (P.cluster_kl, "assignment", [-Q, Q[0], None, 0 * Q]),
    (P.cluster_kl, "target", [-Q, Q[:2], Q.double(), None, Q * math.inf, 0 * Q]),
    (P.clustering_accuracy, "labels", [LABELS.tolist(), -1 - LABELS, LABELS.float(), LABELS[:0], None]),
    (P.clustering_accuracy, "predicted", [LABELS[:2], Q, None]),
    (P.PamCLoss, "centers", [Z[:2].tolist(), NAN, Z[0], None]),
    (P.PamCLoss, "alpha", [-1.0, math.nan, None, "1", True, torch.tensor(0.0)]),
    (P.PamCLoss, "beta", [-1.0, math.inf, False]),
    (P.PamCLoss, "tau", [0.0, None]),
    (P.PamCLoss, "self_similarity", [2.0]),
    (P.PamCLoss, "soft", [None, 1, "yes"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "argument", "value"), [(f, name, value) for f, name, values in BAD for value in values]
)
def test_bad_input_is_named(function, argument, value):
    function(**GOOD[function])
    with pytest.raises((TypeError, ValueError), match=f"^{argument} must"):
        function(**GOOD[function] | {argument: value})


def test_bad_dof():
    for dof in (0.0, None, "1", math.nan):
        with pytest.raises((TypeError, ValueError), match="^dof must"):
            P.soft_assignment(Z, Z[:2], dof=dof)
        with pytest.raises((TypeError, ValueError), match="^dof must"):
            P.PamCLoss(Z[:2], alpha=1.0, beta=1.0, tau=1.0, dof=dof)
