"""The theorems of chapter optimization/mfac as properties; dense inverses, closed forms, limits, extremes and bad input."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lossbook.optimization import mfac as M

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 12)
dampings = st.sampled_from([1e-5, 1e-2, 1.0, 30.0])
few = settings(deadline=None, max_examples=40)

# The worked example of the chapter.
G2 = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
KINDS = pytest.mark.parametrize("kind", ["static", "dynamic"])


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(G, damping, count=None):
    """The inverse of the matrix, summed gradient by gradient; the first `count` of them only, divided by m all the same."""
    matrix = damping * torch.eye(G.shape[1], dtype=torch.float64)
    for g in G.double()[:count]:
        matrix = matrix + torch.outer(g, g) / len(G)
    return torch.linalg.inv(matrix)


def filled(G, damping, window=None):
    """A dynamic inverse after all rows of G."""
    inverse = M.DynamicInverseFisher(window or len(G), G.shape[1], damping, dtype=G.dtype)
    for g in G:
        inverse.update(g)
    return inverse


def make(kind, G, damping):
    return M.StaticInverseFisher(G, damping) if kind == "static" else filled(G, damping)


def close(a, b, tolerance):
    """Agreement relative to the largest element."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


# ---- exact inverses ---------------------------------------------------------------------------------------------------


@KINDS
@few
@given(seed=seeds, m=sizes, d=st.integers(1, 30), damping=dampings)
def test_products_are_those_of_the_dense_inverse(kind, seed, m, d, damping):
    """Issue's bar: 1e-8 in float64, relative to the largest entry."""
    G, inverse = draw(seed, m, d), None
    inverse = make(kind, G, damping)
    close(inverse.mul(torch.eye(d, dtype=torch.float64)), dense(G, damping), 1e-8)
    x = draw(seed + 1, d)
    close(inverse.mul(x), dense(G, damping) @ x, 1e-8)


@few
@given(seed=seeds, m=sizes, d=st.integers(1, 30))
def test_entries_and_diagonal(seed, m, d):
    G = draw(seed, m, d)
    inverse, wanted = M.StaticInverseFisher(G, 1e-2), dense(G, 1e-2)
    close(inverse.diagonal(), wanted.diagonal(), 1e-10)
    i, j = seed % d, seed // 7 % d
    for a, b in ((i, j), (i, i), (j, i)):
        assert inverse.entry(a, b).item() == pytest.approx(wanted[a, b].item(), rel=1e-9, abs=1e-9)
    assert (inverse.denominators >= m).all() and inverse.denominators.shape == (m,)


def test_the_dossiers_case():
    G = draw(0, 8, 30)
    inverse = M.StaticInverseFisher(G, 1e-2)
    torch.testing.assert_close(inverse.mul(torch.eye(30).double()), dense(G, 1e-2), rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse.diagonal(), dense(G, 1e-2).diagonal(), rtol=0, atol=1e-10)
    torch.testing.assert_close(M.empirical_fisher(G, 1e-2) @ dense(G, 1e-2), torch.eye(30).double())


@few
@given(seed=seeds, m=sizes, d=st.integers(1, 30), damping=st.sampled_from([1e-2, 1.0, 30.0]))
def test_recursion_is_the_definition_and_the_cholesky_form(seed, m, d, damping):
    G = draw(seed, m, d)
    before = G.clone()
    V, q = M.static_recursion(G, damping)
    assert torch.equal(G, before)
    for i in range(m):
        v = dense(G, damping, i) @ G[i]
        close(V[i], v, 1e-9)
        assert q[i].item() == pytest.approx(m + (G[i] @ v).item(), rel=1e-10)
    inverse = M.StaticInverseFisher(G, damping)
    torch.testing.assert_close(inverse.denominators, q, rtol=1e-10, atol=0)
    if not inverse._narrow:
        close(inverse._factors[0] * q.sqrt()[:, None], V, 1e-9)


@few
@given(seed=seeds, m=sizes, d=st.integers(1, 30), damping=st.sampled_from([1e-2, 1.0]))
def test_coefficients_are_what_the_paper_defines(seed, m, d, damping):
    G = draw(seed, m, d)
    D, B = M.dynamic_coefficients(G @ G.T, damping)
    V, q = M.static_recursion(G, damping)
    wanted = torch.zeros(m, m, dtype=torch.float64)
    for i in range(m):
        wanted[i, i:] = G[i] @ dense(G, damping, i) @ G[i:].T
    close(D, wanted, 1e-9)
    close(B @ G, V, 1e-9)
    torch.testing.assert_close(D.diagonal() + m, q, rtol=1e-9, atol=0)
    assert torch.equal(B, B.tril()) and torch.equal(D, D.triu())
    torch.testing.assert_close(B.diagonal(), torch.full((m,), 1 / damping).double())
    # The paper's loop for B, and the LU factorization of S by elimination without pivoting.
    slow = torch.eye(m, dtype=torch.float64) / damping
    for i in range(1, m):
        slow[i, :i] = -(D[:i, i] / (m + D.diagonal()[:i])) @ slow[:i, :i]
    close(B, slow, 1e-9)
    S = G @ G.T / damping + m * torch.eye(m)
    for k in range(m):
        S[k + 1 :] -= torch.outer(S[k + 1 :, k] / S[k, k], S[k])
    close(D, S.triu() - m * torch.eye(m), 1e-9)


@few
@given(seed=seeds, m=sizes, d=st.integers(1, 20))
def test_product_by_the_papers_loops(seed, m, d):
    """u by forward substitution, c from u and B: what `mul` computes with two triangular solves."""
    inverse, x = filled(draw(seed, m, d), 0.1), draw(seed + 1, d)
    D, B, q = inverse.D, inverse.B, m + inverse.D.diagonal()
    u = inverse.rows @ x / 0.1
    for i in range(1, m):
        u[i:] -= D[i - 1, i:] * u[i - 1] / q[i - 1]
    close(inverse.mul(x), x / 0.1 - (u / q) @ B @ inverse.rows, 1e-9)


def test_worked_example_by_hand():
    D, B = M.dynamic_coefficients(G2 @ G2.T, 1.0)
    torch.testing.assert_close(D, torch.tensor([[1, 1], [0, 5 / 3]]).double())
    torch.testing.assert_close(B, torch.tensor([[1, 0], [-1 / 3, 1]]).double(), rtol=1e-7, atol=1e-7)
    e = torch.tensor([1.0, 0.0]).double()
    for inverse in (M.StaticInverseFisher(G2, 1.0), filled(G2, 1.0)):
        torch.testing.assert_close(inverse.mul(e), torch.tensor([6 / 11, -2 / 11]).double(), rtol=1e-7, atol=1e-7)


# ---- the window -------------------------------------------------------------------------------------------------------


@few
@given(seed=seeds, m=st.integers(1, 6), extra=st.integers(0, 20), damping=dampings)
def test_window_forgets_and_order_does_not_matter(seed, m, extra, damping):
    """After any number of gradients, three full turns among them, the last m count, in any order."""
    G, x = draw(seed, m + extra, 9), draw(seed + 1, 9)
    inverse = filled(G, damping, window=m)
    close(inverse.mul(x), dense(G[-m:], damping) @ x, 1e-8)
    close(inverse.mul(x), M.StaticInverseFisher(G[-m:].flip(0), damping).mul(x), 1e-8)
    assert inverse.num_seen == m + extra
    slots = [(m + extra - m + k) % m for k in range(m)]
    assert torch.equal(inverse.rows[slots], G[-m:])
    torch.testing.assert_close(inverse.gram, inverse.rows @ inverse.rows.T)


@few
@given(seed=seeds, m=st.integers(2, 8), data=st.data())
def test_missing_rows_are_zero_and_the_divisor_stays(seed, m, data):
    seen = data.draw(st.integers(0, m - 1))
    G = draw(seed, m, 7)
    G[seen:] = 0
    inverse = filled(G[:seen], 0.1, window=m)
    close(inverse.mul(torch.eye(7).double()), dense(G, 0.1), 1e-9)
    if seen == 0:
        torch.testing.assert_close(inverse.mul(G[0] + 1), (G[0] + 1) / 0.1)


@few
@given(seed=seeds, m=st.integers(1, 6), extra=st.integers(0, 8), damping=dampings)
def test_update_mul_is_update_then_mul(seed, m, extra, damping):
    G = draw(seed, m + extra, 9)
    first, second = filled(G[:-1], damping, window=m), filled(G[:-1], damping, window=m)
    u = first.update_mul(G[-1])
    second.update(G[-1])
    close(u, second.mul(G[-1]), 1e-7)
    kept = torch.cat([torch.zeros(m, 9), G])[-m:]
    close(u, dense(kept, damping) @ G[-1], 1e-7)
    assert first.num_seen == second.num_seen and torch.equal(first.gram, second.gram)


def test_products_keep_the_digits_of_float32():
    """At damping 1e-5 a sum in float32 would lose 3 to 4 digits more: see the chapter's pitfalls."""
    G = draw(0, 8, 30) * 5 / math.sqrt(30)
    single = filled(G[:-1].float(), 1e-5, window=8)
    u = single.update_mul(G[-1].float())
    for ours in (u, single.mul(G[-1].float())):
        assert ours.dtype == torch.float32
        close(ours.double(), dense(G.float(), 1e-5) @ G[-1].float().double(), 1e-5)
    naive = M.StaticInverseFisher(G.float(), 1e-5).mul(G[-1].float()).double()
    assert (naive - u).abs().max() > 1e-3 * u.abs().max()  # the static form keeps Y in float32
    G = draw(1, 30) + 1e-3 * draw(2, 8, 30)  # nearly collinear
    u = filled(G[:-1].float(), 1e-5, window=8).update_mul(G[-1].float()).double()
    close(u, dense(G.float(), 1e-5) @ G[-1].float().double(), 1e-5)


# ---- bounds, closed forms, limits ---------------------------------------------------------------------------------------


@few
@given(seed=seeds, m=sizes, d=st.integers(1, 20), damping=dampings, scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_decrease_and_spectrum_bounds(seed, m, d, damping, scale):
    """eq-mfac-decrease and eq-mfac-spectrum."""
    G = scale * draw(seed, m, d)
    for g in G:
        rounding = 1e-14 * (g @ g).item() / damping  # a product is a difference of vectors of length |g| / damping
        assert -rounding <= (g @ filled(G, damping).mul(g)).item() <= m * (1 + 1e-9) + rounding
    values = torch.linalg.eigvalsh(M.StaticInverseFisher(G, damping).mul(torch.eye(d).double()))
    low = 1 / (damping + torch.linalg.matrix_norm(G, 2).item() ** 2 / m)
    assert values.min() >= low * (1 - 1e-6) - 1e-9 / damping and values.max() <= 1 / damping * (1 + 1e-9)


@KINDS
def test_orthogonal_directions_get_exactly_the_damping(kind):
    G, x = draw(0, 4, 10), draw(1, 10)
    x -= torch.linalg.pinv(G) @ (G @ x)
    torch.testing.assert_close(make(kind, G, 1e-2).mul(x), 100 * x, rtol=1e-9, atol=1e-9)


@KINDS
def test_one_gradient(kind):
    g = draw(0, 1, 10)
    wanted = g[0] / (0.3 + g.square().sum())
    torch.testing.assert_close(make(kind, g, 0.3).mul(g[0]), wanted)
    torch.testing.assert_close(M.DynamicInverseFisher(1, 10, 0.3, dtype=torch.float64).update_mul(g[0]), wanted)


@KINDS
def test_large_damping_and_one_dimension(kind):
    G, x = draw(0, 8, 30), draw(1, 30)
    torch.testing.assert_close(1e8 * make(kind, G, 1e8).mul(x), x, rtol=1e-6, atol=1e-6)
    G, x = draw(0, 8, 1), draw(1, 1)
    torch.testing.assert_close(make(kind, G, 0.2).mul(x), x / (0.2 + G.square().mean()))


@KINDS
def test_zero_gradients_and_extreme_sizes(kind):
    x = draw(1, 5)
    torch.testing.assert_close(make(kind, torch.zeros(3, 5).double(), 0.5).mul(x), 2 * x)
    for scale in (1e-20, 1e15):
        found = make(kind, draw(0, 3, 5, dtype=torch.float32) * scale, 1e-5).mul(x.float())
        assert torch.isfinite(found).all()


@pytest.mark.parametrize("scale", [1e4, 1e8, 1e15])
def test_huge_parallel_gradients(scale):
    """Beyond float64 the damping is lost in rounding; the factorization goes through all the same."""
    G = scale * (draw(0, 1, 50) + 1e-6 * draw(1, 32, 50))
    for rows in (G, G[:1].expand(32, 50)):
        for size in (None, 8):
            assert torch.isfinite(M.StaticInverseFisher(rows, 1e-5, block_size=size).mul(rows[0])).all()
        window = M.DynamicInverseFisher(32, 50, 1e-5)
        for g in rows.float():
            u = window.update_mul(g)
        assert torch.isfinite(u).all()


@pytest.mark.parametrize("seed", range(4))
def test_many_equal_gradients(seed):
    """The rounding error of the factorization grows with m: what is added to the diagonal must, too, and must stay small beside it."""
    g = 1e4 * draw(seed, 1, 5000, dtype=torch.float32)
    u = M.StaticInverseFisher(g.expand(64, 5000), 1e-5).mul(g[0])
    assert torch.isfinite(u).all()
    factor = M._cholesky(torch.full((64, 64), 1e9, dtype=torch.float64))
    torch.testing.assert_close(factor @ factor.T, torch.full((64, 64), 1e9, dtype=torch.float64), rtol=1e-12, atol=0)


# ---- blocks ---------------------------------------------------------------------------------------------------------


@few
@given(seed=seeds, m=sizes, d=st.integers(1, 25), block=st.integers(1, 30))
def test_blocks_are_inverses_of_the_blocks(seed, m, d, block):
    """Both ways, B >= m and B < m, and a ragged last block."""
    G, x = draw(seed, m, d), draw(seed + 1, 2, d)
    wanted = torch.block_diag(*(dense(part, 0.05) for part in G.split(block, dim=1)))
    inverse = M.StaticInverseFisher(G, 0.05, block_size=block)
    close(inverse.mul(torch.eye(d).double()), wanted, 1e-9)
    close(inverse.mul(x), x @ wanted, 1e-9)
    close(inverse.diagonal(), wanted.diagonal(), 1e-9)
    for i, j in {(0, 0), (0, d - 1), (d - 1, d // 2), (d - 1, d - 1)}:
        assert inverse.entry(i, j).item() == pytest.approx(wanted[i, j].item(), rel=1e-8, abs=1e-9)
    if block == 1:
        close(inverse.diagonal(), 1 / (0.05 + G.square().mean(0)), 1e-12)
    with pytest.raises(ValueError, match="block_size must be None"):
        inverse.denominators  # noqa: B018


@pytest.mark.parametrize("page", [1, 7, 50])
def test_pages_change_nothing(monkeypatch, page):
    G, x = draw(0, 5, 33), draw(1, 33)
    settings_ = [dict(), dict(block_size=4), dict(block_size=7)]
    whole = [M.StaticInverseFisher(G, 0.1, **s).mul(x) for s in settings_] + [filled(G, 0.1).mul(x)]
    updated = filled(G, 0.1).update_mul(x)
    monkeypatch.setitem(M._PAGE, "cpu", page)
    paged = [M.StaticInverseFisher(G, 0.1, **s).mul(x) for s in settings_] + [filled(G, 0.1).mul(x)]
    for a, b in zip(paged, whole, strict=True):
        close(a, b, 1e-12)
    close(filled(G, 0.1).update_mul(x), updated, 1e-12)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_nothing_larger_than_the_gradients():
    m, d = 32, 200_000
    G, x = draw(0, m, d, dtype=torch.float32), draw(1, d, dtype=torch.float32)
    with Largest() as largest:
        inverse = M.StaticInverseFisher(G, 1e-2)
        inverse.mul(x)
        inverse.diagonal()
    assert largest.elements == m * d
    dynamic = M.DynamicInverseFisher(m, d, 1e-2)
    with Largest() as largest:
        dynamic.update(x)
        dynamic.mul(x)
        dynamic.update_mul(x)
    assert largest.elements <= m * d
    with Largest() as largest:
        inverse.mul(x)
        inverse.entry(0, 1)
    assert largest.elements <= m * d


# ---- dtypes, transforms ---------------------------------------------------------------------------------------------


def test_product_is_linear_for_autograd_and_vmap():
    G, x = draw(0, 4, 6), draw(1, 3, 6).requires_grad_()
    for inverse in (M.StaticInverseFisher(G, 0.1), M.StaticInverseFisher(G, 0.1, block_size=2), filled(G, 0.1)):
        assert torch.autograd.gradcheck(inverse.mul, (x,))
        torch.testing.assert_close(torch.func.vmap(inverse.mul)(x), inverse.mul(x))
        hessian = torch.func.hessian(lambda y, inverse=inverse: y @ inverse.mul(y) / 2)(x[0].detach())
        torch.testing.assert_close(hessian, inverse.mul(torch.eye(6).double()))
        compiled = torch.compile(inverse.mul, backend="eager")
        torch.testing.assert_close(compiled(x), inverse.mul(x))


def test_dtypes_views_and_autocast():
    G, x = draw(0, 4, 6), draw(1, 6)
    assert M.StaticInverseFisher(G.half(), 0.1).dtype == torch.float32
    assert M.static_recursion(G.bfloat16(), 0.1)[0].dtype == torch.float32
    wanted = dense(G, 0.1) @ x
    strided = G.T.contiguous().T
    close(M.StaticInverseFisher(strided, 0.1).mul(torch.stack([x, x], 1)[:, 0]), wanted, 1e-9)
    for inverse in (M.StaticInverseFisher(G.float(), 0.1), filled(G.float(), 0.1)):
        with torch.autocast("cpu", torch.bfloat16):
            found = inverse.mul(x.float())
        assert found.dtype == torch.float32
        close(found.double(), wanted, 1e-5)
    assert not M.StaticInverseFisher(G.requires_grad_(), 0.1).mul(x).requires_grad


# ---- the optimizer ----------------------------------------------------------------------------------------------------


def manual(w, grads, lr, momentum=0.0, weight_decay=0.0, m=4, damping=0.1):
    """The optimizer's recursion with dense inverses: weights after each step."""
    window, v, trajectory = torch.zeros(m, len(w), dtype=torch.float64), torch.zeros_like(w), []
    for t, grad in enumerate(grads):
        g = grad(w) + weight_decay * w
        window[t % m] = g
        u = dense(window, damping) @ g
        v = momentum * v + (1 - momentum) * u
        w = w - lr * (v if momentum else u)
        trajectory.append(w)
    return trajectory


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.2), (0.7, 0.1)])
def test_steps_on_a_quadratic(momentum, weight_decay):
    """Two groups with their own learning rates, one window, ten steps: two and a half turns."""
    A, w0 = draw(0, 6, 6), draw(1, 6)
    A = A @ A.T
    a, b = (nn.Parameter(part.clone()) for part in (w0[:2], w0[2:].view(2, 2)))
    optimizer = M.MFAC([dict(params=[a], lr=0.3), dict(params=[b])], lr=0.05, momentum=momentum, weight_decay=weight_decay, num_grads=4, damping=0.1)  # fmt: skip
    lr = torch.tensor([0.3] * 2 + [0.05] * 4).double()
    for wanted in manual(w0, [lambda w: A @ w] * 10, lr, momentum, weight_decay):
        w = torch.cat([a, b.flatten()])
        optimizer.zero_grad()
        (w @ A @ w / 2).backward()
        assert optimizer.step() is None
        torch.testing.assert_close(torch.cat([a, b.flatten()]).detach(), wanted, rtol=1e-6, atol=1e-6)


def net_and_batches(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    batches = [(draw(10 + t, 8, 5, dtype=dtype), torch.arange(8) % 3) for t in range(12)]
    return net, batches


def train(net, optimizer, batches):
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def test_training_lowers_the_loss():
    net, batches = net_and_batches()
    x, y = batches[0]
    first = F.cross_entropy(net(x), y).item()
    train(net, M.MFAC(net.parameters(), lr=0.05, num_grads=8, damping=0.1), [(x, y)] * 100)
    assert F.cross_entropy(net(x), y).item() < 0.5 * first


@pytest.mark.parametrize("at", [0, 2, 6])
def test_state_dict_continues_the_run(at):
    """Saved through a file that holds only plain data, before, within and after the window fills; the old run goes on undisturbed."""
    options = dict(lr=0.05, momentum=0.8, weight_decay=0.01, num_grads=4)
    net, batches = net_and_batches()
    optimizer = M.MFAC(net.parameters(), **options)
    train(net, optimizer, batches[:at])
    file = io.BytesIO()
    torch.save(dict(net=net.state_dict(), optimizer=optimizer.state_dict()), file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    other, _ = net_and_batches(1)
    other.load_state_dict(stored["net"])
    resumed = M.MFAC(other.parameters(), lr=9.0)
    resumed.load_state_dict(stored["optimizer"])
    assert resumed.param_groups[0]["lr"] == 0.05
    clone_net, clone = copy.deepcopy((net, optimizer))
    clone.param_groups[0]["params"] = list(clone_net.parameters())
    wanted = train(net, optimizer, batches[at:])
    assert torch.equal(train(other, resumed, batches[at:]), wanted)
    assert torch.equal(train(clone_net, clone, batches[at:]), wanted)


def test_checkpoint_goes_to_the_device_of_the_parameters():
    """The meta device stands for an accelerator; and what is loaded is a copy."""
    net, batches = net_and_batches()
    optimizer = M.MFAC(net.parameters(), num_grads=3, momentum=0.5)
    train(net, optimizer, batches[:4])
    state = optimizer.state_dict()
    other = M.MFAC(copy.deepcopy(net).to("meta").parameters())
    other.load_state_dict(state)
    assert {t.device.type for t in (other._fisher.rows, other._fisher.gram, other._velocity)} == {"meta"}
    assert other._fisher.gram.dtype == torch.float64 and other._fisher.num_seen == 4
    same = M.MFAC(net.parameters())
    same.load_state_dict(state)
    same._fisher.rows.zero_()
    assert state["mfac"]["window"]["rows"].abs().sum() > 0
    with pytest.raises(ValueError, match="state_dict must be of 3 parameters, got 39"):
        M.MFAC([nn.Parameter(torch.zeros(3))]).load_state_dict(state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same():
    net, batches = net_and_batches()
    options = dict(lr=0.02, num_grads=4, damping=1e-2, momentum=0.5)
    optimizer = M.MFAC(net.parameters(), **options)
    train(net, optimizer, batches[:6])
    there = copy.deepcopy(net).cuda()
    moved = M.MFAC(there.parameters())
    moved.load_state_dict(optimizer.state_dict())
    wanted = train(net, optimizer, batches[6:])
    found = train(there, moved, [(x.cuda(), y.cuda()) for x, y in batches[6:]])
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-4)


def test_schedules_closures_and_missing_gradients():
    net, batches = net_and_batches()
    other = copy.deepcopy(net)
    (x, y), *_ = batches
    optimizer = M.MFAC(net.parameters(), lr=0.1, num_grads=2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    start = F.cross_entropy(net(x), y)
    assert optimizer.step(closure) == start and calls == [True]
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    train(other, M.MFAC(other.parameters(), lr=0.1, num_grads=2), [(x, y)])
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))

    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = M.MFAC([a, b], lr=1.0, num_grads=1)
    a.sum().backward()
    optimizer.step()
    torch.testing.assert_close(a.detach(), torch.full((2,), 0.5), rtol=1e-4, atol=0)  # 1 - 1 / (2 + damping)
    assert torch.equal(b.detach(), torch.ones(3)) and optimizer._fisher.dim == 5


def test_compiled_training_step():
    net, batches = net_and_batches()
    other = copy.deepcopy(net)
    optimizer = M.MFAC(net.parameters(), lr=0.05, num_grads=4)

    @torch.compile(backend="eager")
    def step(x, y):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    for x, y in batches:
        step(x, y)
    wanted = train(other, M.MFAC(other.parameters(), lr=0.05, num_grads=4), batches)
    torch.testing.assert_close(nn.utils.parameters_to_vector(net.parameters()), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inside", [False, True])
def test_mixed_precision_loop(inside):
    """GradScaler unscales, steps, and skips the step that has an overflow; the step may stand inside of autocast."""
    net, batches = net_and_batches()
    optimizer, scaler = M.MFAC(net.parameters(), lr=0.02, num_grads=4), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t, (x, y) in enumerate(batches[:6]):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(net(x), y)
        scaler.scale(loss * (math.inf if t == 3 else 1)).backward()
        before = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            scaler.step(optimizer)
        scaler.update()
        after = nn.utils.parameters_to_vector(net.parameters())
        assert torch.equal(before, after) == (t == 3) and torch.isfinite(after).all()
        g = torch.cat([p.grad.flatten() for p in net.parameters()])
        if t != 3:
            window = optimizer._fisher.rows
            close((before - after).double() / 0.02, dense(window, 1e-5) @ g.double(), 1e-2)
    assert optimizer._fisher.num_seen == 5


def test_half_precision_parameters_have_a_single_precision_window():
    net, batches = net_and_batches(dtype=torch.bfloat16)
    optimizer = M.MFAC(net.parameters(), lr=0.05, num_grads=3, momentum=0.5)
    train(net, optimizer, batches[:3])
    assert optimizer._fisher.rows.dtype == optimizer._velocity.dtype == torch.float32
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    other = M.MFAC(net.parameters())
    other.load_state_dict(optimizer.state_dict())
    assert other._velocity.dtype == torch.float32 and torch.equal(other._fisher.rows, optimizer._fisher.rows)


def test_state_of_another_optimizer_or_dtype():
    net, batches = net_and_batches(dtype=torch.float64)
    optimizer = M.MFAC(net.parameters(), lr=0.05, num_grads=3, momentum=0.5)
    train(net, optimizer, batches[:3])
    narrow = copy.deepcopy(net).float()
    other = M.MFAC(narrow.parameters())
    other.load_state_dict(optimizer.state_dict())
    assert other._fisher.rows.dtype == other._velocity.dtype == torch.float32
    wanted = train(net, optimizer, batches[3:])
    found = train(narrow, other, [(x.float(), y) for x, y in batches[3:]])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="state_dict must be that of an MFAC"):
        other.load_state_dict(torch.optim.SGD(narrow.parameters()).state_dict())


def test_damping_may_be_scheduled_and_the_window_may_not():
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = M.MFAC([w], lr=1.0, num_grads=2, damping=1.0)
    rows = [torch.tensor(row, dtype=torch.float64) for row in ([1.0, 2.0], [3.0, -1.0])]
    for row, damping in zip(rows, (1.0, 0.1), strict=True):
        optimizer.param_groups[0]["damping"] = damping
        before, w.grad = w.detach().clone(), row
        optimizer.step()
    fisher = 0.1 * torch.eye(2, dtype=torch.float64) + sum(torch.outer(row, row) for row in rows) / 2
    torch.testing.assert_close(before - w.detach(), torch.linalg.solve(fisher, rows[1]), rtol=1e-12, atol=1e-12)
    optimizer.param_groups[0]["damping"] = 0.0
    with pytest.raises(ValueError, match="damping"):
        optimizer.step()
    optimizer.param_groups[0] |= dict(damping=0.1, num_grads=3)
    with pytest.raises(ValueError, match="num_grads must stay 2 after the first step, got 3"):
        optimizer.step()
    assert optimizer._fisher.num_seen == 2


def test_groups_come_before_the_mask():
    optimizer = M.MFAC([nn.Parameter(torch.tensor([0.0, 1.0]))], sparse=True)
    with pytest.raises(ValueError, match="param_group must come before"):
        optimizer.add_param_group(dict(params=[nn.Parameter(torch.ones(1))]))
    assert len(optimizer.param_groups) == 1


def test_mask_holds_without_decay():
    w = nn.Parameter(torch.tensor([0.0, 1.0]))
    optimizer = M.MFAC([w], lr=0.1, num_grads=2, sparse=True)
    w.grad = torch.ones(2)
    optimizer.step()
    assert w[0] == 0 and w[1] < 1 and optimizer._fisher.rows[0].tolist() == [0.0, 1.0]


def test_pruning_hands_out_copies_of_the_weights():
    """A grad_fn that spoils its argument spoils nothing else."""
    gradients = torch.eye(4) * torch.tensor([1.0, 2.0, 3.0, 4.0])

    def spoil(w):
        w.zero_()
        return gradients

    wanted = M.prune_obs(torch.ones(4), lambda w: gradients, 0.5, num_grads=4, rounds=2)
    assert torch.equal(M.prune_obs(torch.ones(4), spoil, 0.5, num_grads=4, rounds=2), wanted)


def test_sparse_parameters_stay_zero():
    net, batches = net_and_batches()
    with torch.no_grad():
        net[0].weight[:, ::2] = 0
    zero = net[0].weight == 0
    dense_net = copy.deepcopy(net)
    optimizer = M.MFAC(net.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01, num_grads=4, sparse=True)
    train(net, optimizer, batches[:6])
    assert (net[0].weight[zero] == 0).all() and (net[0].weight[~zero] != 0).all()
    assert (optimizer._fisher.rows[:, :20][:, zero.flatten()] == 0).all()
    train(dense_net, M.MFAC(dense_net.parameters(), lr=0.05, num_grads=4), batches[:6])
    assert (dense_net[0].weight[zero] != 0).all()
    other = M.MFAC(net.parameters())
    other.load_state_dict(optimizer.state_dict())
    train(net, other, batches[6:])
    assert (net[0].weight[zero] == 0).all()


def test_a_bad_gradient_changes_nothing():
    w = nn.Parameter(torch.ones(3))
    optimizer = M.MFAC([w], lr=0.1, num_grads=2)
    w.grad = torch.ones(3)
    optimizer.step()
    before = copy.deepcopy((w.detach(), optimizer._fisher.rows, optimizer._fisher.gram))
    for bad in (math.nan, math.inf, -math.inf):
        w.grad = torch.tensor([1.0, bad, 1.0])
        with pytest.raises(ValueError, match="g must be finite"):
            optimizer.step()
    after = (w.detach(), optimizer._fisher.rows, optimizer._fisher.gram)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and optimizer._fisher.num_seen == 1
    w.grad = torch.full((3,), 1e30)  # its square overflows in float32
    optimizer.step()
    assert torch.isfinite(w).all()


# ---- the pruner -------------------------------------------------------------------------------------------------------


@few
@given(seed=seeds, m=sizes, d=st.integers(2, 20), data=st.data())
def test_removing_one_weight(seed, m, d, data):
    """The update removes it, costs the saliency, and no other change that removes it costs less."""
    G, w = draw(seed, m, d), draw(seed + 1, d)
    matrix, inverse = M.empirical_fisher(G, 0.1), M.StaticInverseFisher(G, 0.1)
    q = data.draw(st.integers(0, d - 1))
    delta = M.obs_update(w, inverse, torch.tensor([q]))
    cost = (delta @ matrix @ delta / 2).item()
    assert (w + delta)[q] == 0
    assert M.obs_saliency(w, inverse)[q].item() == pytest.approx(cost, rel=1e-9)
    other = delta + 0.1 * draw(seed + 2, d)
    other[q] = -w[q]
    assert cost <= (other @ matrix @ other / 2).item() + 1e-12


@pytest.mark.parametrize("block", [None, 64])
def test_saliencies_stay_positive_where_float32_loses_all_digits(block):
    """1/λ minus a sum leaves less than nothing there; the diagonal keeps its bound 1 / F_qq, and so no strong weight goes first."""
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(64, 64, generator=generator) * 10 ** (4 * torch.rand(64, generator=generator) - 2)
    fisher = M.empirical_fisher(G.double(), 1e-5).diagonal().float()
    inverse = M.StaticInverseFisher(G, 1e-5, block_size=block)
    assert (1e5 - inverse._factors.square().sum(1) <= 0).any()
    assert (inverse.diagonal() >= 0.999 / fisher).all()
    assert (M.obs_saliency(torch.ones(64), inverse) <= 0.501 * fisher).all()
    assert all(inverse.entry(i, i) > 0 for i in range(64))


def test_autocast_takes_no_digits():
    """The references, the saliencies and both updates under autocast are those without it."""
    G, w = torch.randn(8, 30, generator=torch.Generator().manual_seed(0)), torch.linspace(1, 2, 30)

    def everything():
        inverse, drop = M.StaticInverseFisher(G, 0.1), torch.tensor([1, 2, 5])
        updates = [M.obs_update(w, inverse, drop, joint=joint) for joint in (True, False)]
        return [M.empirical_fisher(G, 0.1), *M.static_recursion(G, 0.1), M.obs_saliency(w, inverse), *updates]

    with torch.autocast("cpu", torch.bfloat16):
        under = everything()
    for a, b in zip(under, everything(), strict=True):
        assert torch.equal(a, b)


def test_pruning_that_leaves_no_weight_ends():
    """A sparsity that rounds to no weight at all, reached before the last round."""
    assert not M.prune_obs(torch.ones(4), lambda w: torch.eye(4), 0.99, num_grads=4, rounds=8).any()


@few
@given(seed=seeds, m=sizes, d=st.integers(2, 20), data=st.data())
def test_joint_update_is_the_constrained_minimum(seed, m, d, data):
    G, w = draw(seed, m, d), draw(seed + 1, d)
    matrix, inverse = M.empirical_fisher(G, 0.1), M.StaticInverseFisher(G, 0.1)
    drop = torch.tensor(sorted(data.draw(st.sets(st.integers(0, d - 1), min_size=1))))
    keep = torch.tensor([i for i in range(d) if i not in drop], dtype=torch.int64)
    joint, additive = (M.obs_update(w, inverse, drop, joint=j) for j in (True, False))
    assert (w + joint)[drop].eq(0).all() and (w + additive)[drop].eq(0).all()
    costs = [(change @ matrix @ change / 2).item() for change in (joint, additive)]
    assert costs[0] <= costs[1] * (1 + 1e-9)
    wanted = -w.clone()  # the stationary point of the quadratic over the weights that stay
    wanted[keep] = torch.linalg.solve(matrix[keep][:, keep], matrix[keep][:, drop] @ w[drop])
    close(joint, wanted, 1e-8)
    target = torch.zeros(d).double()
    target[drop] = -w[drop] / torch.linalg.inv(matrix).diagonal()[drop]
    slow = torch.linalg.inv(matrix) @ target
    slow[drop] = -w[drop]
    close(additive, slow, 1e-8)


def test_diagonal_fisher_moves_only_what_is_dropped():
    G, w = draw(0, 6, 9), draw(1, 9)
    inverse = M.StaticInverseFisher(G, 1e-3, block_size=1)
    torch.testing.assert_close(M.obs_saliency(w, inverse), w.square() / 2 * (1e-3 + G.square().mean(0)))
    drop = torch.tensor([7, 2])
    for joint in (False, True):
        delta = M.obs_update(w, inverse, drop, joint=joint)
        wanted = torch.zeros(9).double()
        wanted[drop] = -w[drop]
        assert torch.equal(delta, wanted)
    assert torch.equal(M.obs_update(w, inverse, drop[:0]), torch.zeros(9).double())
    assert torch.equal(M.obs_update(w, inverse, drop[:0], joint=True), torch.zeros(9).double())


def reference_prune(w, grad_fn, sparsity, damping, rounds, block=30):
    """Rounds with dense inverses of the alive weights, in blocks of neighbors among them."""
    d, w = len(w), w.clone()
    alive = [i for i in range(d) if w[i] != 0]
    start = len(alive) / d
    for j in range(1, rounds + 1):
        parts = grad_fn(w)[:, alive].split(block, dim=1)
        inverse = torch.block_diag(*(dense(part, damping) for part in parts))
        score = [(w[i].item() ** 2 / 2 / inverse[k, k].item(), k) for k, i in enumerate(alive)]
        stay = round(d * start * ((1 - sparsity) / start) ** (j / rounds))
        gone = [k for _, k in sorted(score)[: len(alive) - stay]]
        new = w[alive].clone()
        for k in gone:
            new -= w[alive[k]] / inverse[k, k] * inverse[:, k]
        new[gone] = 0
        w[alive] = new
        alive = [i for k, i in enumerate(alive) if k not in gone]
    return w


@pytest.mark.parametrize("rounds", [1, 3, 8])
@pytest.mark.parametrize("dead", [0, 6])
def test_rounds_against_dense_inverses(rounds, dead):
    X, w = draw(0, 12, 30), draw(1, 30)
    w[:dead] = 0
    calls = []

    def grad_fn(weights):
        assert torch.is_grad_enabled()
        calls.append(weights.clone())
        return X * torch.tanh(X @ weights)[:, None]

    found = M.prune_obs(w, grad_fn, 0.8, damping=1e-2, num_grads=12, rounds=rounds)
    counts = [int((v != 0).sum()) for v in calls] + [int((found != 0).sum())]
    start = (30 - dead) / 30
    assert counts == [round(30 * start * (0.2 / start) ** (j / rounds)) for j in range(rounds + 1)]
    close(found, reference_prune(w, grad_fn, 0.8, 1e-2, rounds), 1e-8)
    found = M.prune_obs(w, grad_fn, 0.8, damping=1e-2, num_grads=12, rounds=rounds, block_size=5)
    close(found, reference_prune(w, grad_fn, 0.8, 1e-2, rounds, block=5), 1e-8)
    assert len({tuple(c.tolist()) for c in calls[:rounds]}) == rounds  # fresh weights each round


def test_pruning_keeps_what_it_should():
    w = draw(0, 10, dtype=torch.float32)
    before = w.clone()
    assert torch.equal(M.prune_obs(w, None, 0.0, num_grads=3), w)  # nothing to do, no gradient asked for
    half = M.prune_magnitude(w, 0.5)
    assert torch.equal(M.prune_obs(half, None, 0.4), half)
    assert torch.equal(w, before) and (half != 0).sum() == 5 and half.abs()[half != 0].min() >= w.abs().median()
    assert M.prune_magnitude(torch.ones(5), 0.4).tolist() == [0, 0, 1, 1, 1]  # ties: the lower index goes first
    ties = M.prune_obs(torch.ones(5), lambda w: torch.zeros(2, 5), 0.6, num_grads=2, rounds=2)
    assert ties.tolist() == [0, 0, 0, 1, 1]
    double = M.prune_obs(w, lambda w: draw(1, 4, 10), 0.5, num_grads=4, rounds=2)
    assert double.dtype == torch.float32 and (double != 0).sum() == 5
    # A dead input has no gradient: saliency is damping / 2 times the square, so it goes first, though it is the largest weight.
    G = draw(2, 20, 10)
    G[:, 3] = 0
    w[3] = 5.0
    assert M.prune_obs(w, lambda w: G, 0.1, num_grads=20, rounds=1)[3] == 0


def test_density_of_rounds():
    densities = [round(M.round_density(1.0, 0.1, 4, j), 4) for j in range(5)]
    assert densities == [1.0, 0.5623, 0.3162, 0.1778, 0.1]
    assert M.round_density(0.5, 0.5, 3, 2) == 0.5 and M.round_density(0.8, 0.2, 2, 1) == pytest.approx(0.4)


# ---- gradients of a model -----------------------------------------------------------------------------------------------


def test_collected_gradients_are_those_of_autograd():
    net, batches = net_and_batches(dtype=torch.float64)
    rows, means = [], []
    for x, y in batches[:2]:
        for k in range(len(x)):
            grads = torch.autograd.grad(F.cross_entropy(net(x[k : k + 1]), y[k : k + 1]), list(net.parameters()))
            rows.append(torch.cat([g.flatten() for g in grads]))
        grads = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
        means.append(torch.cat([g.flatten() for g in grads]))
    G = M.collect_gradients(net, F.cross_entropy, batches[:2])
    torch.testing.assert_close(G, torch.stack(rows))
    torch.testing.assert_close(
        M.collect_gradients(net, F.cross_entropy, batches[:2], per_sample=False), torch.stack(means)
    )
    chosen = [net[2].weight, net[0].bias]
    part = M.collect_gradients(net, F.cross_entropy, batches[:2], chosen)
    torch.testing.assert_close(part, torch.cat([G[:, 24:36], G[:, 20:24]], dim=1))
    assert not G.requires_grad and all(p.grad is None for p in net.parameters())


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: M.StaticInverseFisher(torch.ones(3), 0.1), ValueError, "grads must have 2 dimension"),
        (lambda: M.StaticInverseFisher(torch.ones(2, 3, 4), 0.1), ValueError, "grads must have 2 dimension"),
        (lambda: M.StaticInverseFisher(torch.ones(0, 3), 0.1), ValueError, "grads must not be empty"),
        (lambda: M.StaticInverseFisher(torch.ones(2, 3).long(), 0.1), TypeError, "grads must be a floating"),
        (lambda: M.StaticInverseFisher([[1.0]], 0.1), TypeError, "grads must be a tensor"),
        (lambda: M.StaticInverseFisher(torch.tensor([[math.nan]]), 0.1), ValueError, "grads must be finite"),
        (lambda: M.StaticInverseFisher(G2, 0.0), ValueError, "damping must be finite and > 0, got 0.0"),
        (lambda: M.StaticInverseFisher(G2, -1.0), ValueError, "damping must"),
        (lambda: M.StaticInverseFisher(G2, "a"), TypeError, "damping must be a number"),
        (lambda: M.StaticInverseFisher(G2, 0.1, block_size=0), ValueError, "block_size must be at least 1"),
        (lambda: M.StaticInverseFisher(G2, 0.1).mul(torch.ones(3).double()), ValueError, r"x must have shape \(2,\)"),
        (lambda: M.StaticInverseFisher(G2, 0.1).mul(torch.ones(1, 1, 2).double()), ValueError, "x must have shape"),
        (lambda: M.StaticInverseFisher(G2, 0.1).mul(torch.ones(2)), TypeError, "x must have the dtype"),
        (lambda: M.StaticInverseFisher(G2, 0.1).entry(0, 2), IndexError, r"j must lie in \[0, 2\), got 2"),
        (lambda: M.StaticInverseFisher(G2, 0.1).entry(-1, 0), IndexError, r"i must lie in \[0, 2\), got -1"),
        (lambda: M.empirical_fisher(G2, math.inf), ValueError, "damping must"),
        (lambda: M.static_recursion(G2[0], 0.1), ValueError, "grads must have 2"),
        (lambda: M.dynamic_coefficients(torch.ones(2, 3), 0.1), ValueError, "gram must be square"),
        (lambda: M.dynamic_coefficients(torch.full((2, 2), math.inf), 0.1), ValueError, "gram must be finite"),
        (lambda: M.dynamic_coefficients(G2, 0), ValueError, "damping must"),
        (lambda: M.DynamicInverseFisher(0, 3, 0.1), ValueError, "window must be at least 1"),
        (lambda: M.DynamicInverseFisher(2.5, 3, 0.1), TypeError, "window must be an integer"),
        (lambda: M.DynamicInverseFisher(2, 0, 0.1), ValueError, "dim must be at least 1"),
        (lambda: M.DynamicInverseFisher(2, 3, 0.0), ValueError, "damping must"),
        (lambda: M.DynamicInverseFisher(2, 3, 0.1, dtype=torch.half), TypeError, "dtype must be float32 or float64"),
        (lambda: filled(G2, 0.1).update(torch.ones(3).double()), ValueError, "g must have shape"),
        (lambda: filled(G2, 0.1).update(torch.ones(1, 2).double()), ValueError, "g must have 1 dimension"),
        (lambda: filled(G2, 0.1).update(torch.ones(2)), TypeError, "g must have the dtype"),
        (lambda: filled(G2, 0.1).update_mul(torch.tensor([1.0, math.nan]).double()), ValueError, "g must be finite"),
        (lambda: filled(G2, 0.1).mul(torch.ones(2)), TypeError, "x must have the dtype"),
        (lambda: M.obs_saliency(torch.ones(3).double(), M.StaticInverseFisher(G2, 0.1)), ValueError, "weights must"),
        (lambda: M.obs_saliency(torch.ones(2), M.StaticInverseFisher(G2, 0.1)), TypeError, "weights must have the dt"),
        (lambda: M.obs_update(G2[0], M.StaticInverseFisher(G2, 0.1), torch.tensor([2])), ValueError, "drop_index must"),
        (lambda: M.obs_update(G2[0], M.StaticInverseFisher(G2, 0.1), torch.tensor([1, 1])), ValueError, "drop_index"),
        (lambda: M.obs_update(G2[0], M.StaticInverseFisher(G2, 0.1), torch.tensor([1.0])), TypeError, "drop_index"),
        (lambda: M.prune_magnitude(torch.ones(3), 1.0), ValueError, "sparsity must be < 1"),
        (lambda: M.prune_magnitude(torch.ones(3), -0.1), ValueError, "sparsity must be"),
        (lambda: M.prune_magnitude(torch.ones(3), 1.5), ValueError, "sparsity must be"),
        (lambda: M.prune_obs(torch.ones(3), None, 1.0), ValueError, "sparsity must be < 1"),
        (lambda: M.prune_obs(torch.ones(3), lambda w: torch.ones(2, 3), 0.5, num_grads=4), ValueError, "grad_fn must"),
        (lambda: M.prune_obs(torch.ones(3), lambda w: w, 0.5, num_grads=4), ValueError, "grad_fn's gradients must"),
        (lambda: M.prune_obs(torch.ones(3), None, 0.5, rounds=0), ValueError, "rounds must"),
        (lambda: M.prune_obs(torch.ones(3), None, 0.5, num_grads=0), ValueError, "num_grads must"),
        (lambda: M.round_density(0.5, 0.6, 4, 1), ValueError, "target must be at most start"),
        (lambda: M.round_density(1.0, 0.5, 4, 5), ValueError, "j must lie"),
        (lambda: M.collect_gradients(nn.Linear(1, 1), F.mse_loss, []), ValueError, "batches must not be empty"),
        (lambda: M.collect_gradients(nn.Linear(1, 1), F.mse_loss, [], [torch.ones(1)]), ValueError, "params must be"),
        (lambda: M.collect_gradients(nn.Linear(1, 1), F.mse_loss, [], []), ValueError, "params must be"),
    ],
)  # fmt: skip
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(lr=-1.0), "lr must"), (dict(momentum=1.0), "momentum must be < 1"), (dict(momentum=-0.1), "momentum must"),
        (dict(weight_decay=-0.1), "weight_decay must"), (dict(num_grads=0), "num_grads must"), (dict(damping=0.0), "damping must"),
        (dict(lr=math.nan), "lr must"),
    ],
)  # fmt: skip
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        M.MFAC([nn.Parameter(torch.ones(2))], **options)


def test_bad_groups_and_gradients():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    for name, value in dict(momentum=0.5, weight_decay=0.1, num_grads=3, damping=1.0).items():
        with pytest.raises(ValueError, match=f"{name} must be .* in all groups"):
            M.MFAC([dict(params=[a]), dict(params=[b], **{name: value})])
    with pytest.raises(ValueError, match="lr must"):
        M.MFAC([dict(params=[a], lr=-1)])
    with pytest.raises(TypeError, match="floating-point"):
        M.MFAC([torch.ones(2, dtype=torch.complex64, requires_grad=True)])
    optimizer = M.MFAC([a], num_grads=2)
    with pytest.raises(ValueError, match="momentum"):
        optimizer.add_param_group(dict(params=[b], momentum=0.5))
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group(dict(params=[b], lr=0.5))
    a.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(ValueError, match="param_group must come before"):
        optimizer.add_param_group(dict(params=[nn.Parameter(torch.ones(1))]))
    a.grad = torch.ones(2).to_sparse()
    with pytest.raises(ValueError, match="dense gradients"):
        optimizer.step()
