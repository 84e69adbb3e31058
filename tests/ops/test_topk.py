"""The streamed top-k against the dense one: values, indices, gradients, memory, transforms, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lossbook.ops import streamed_topk


def vectors(seed, rows, keys, dim=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for n in (rows, keys)
    ]


def dense(queries, keys, k, exclude=None):
    similarities = queries @ keys.T
    if exclude is not None:
        similarities = similarities.scatter(1, exclude.reshape(len(queries), -1), -torch.inf)
    return similarities.topk(k, dim=1)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(4, 9), st.sampled_from([None, 1, 3]), st.integers(0, 2))
def test_equals_the_dense_computation(seed, rows, num_keys, chunk, excluded):
    q, keys = vectors(seed, rows, num_keys)
    generator = torch.Generator().manual_seed(seed)
    exclude = torch.stack([torch.randperm(num_keys, generator=generator)[:excluded] for _ in range(rows)])
    exclude = None if excluded == 0 else exclude[:, 0] if excluded == 1 else exclude
    k = int(torch.randint(1, num_keys - excluded + 1, (), generator=generator))
    values, indices = streamed_topk(q, keys, k, exclude=exclude, chunk_size=chunk)
    wanted = dense(q, keys, k, exclude)
    torch.testing.assert_close(values, wanted.values, rtol=1e-12, atol=1e-12)
    assert torch.equal(indices, wanted.indices)
    weights = torch.randn(rows, k, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((values * weights).sum(), [q, keys]),
        torch.autograd.grad((wanted.values * weights).sum(), [q, keys]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradcheck_and_transforms():
    q, keys = vectors(0, 5, 6)
    function = lambda q, k: streamed_topk(q, k, 2, exclude=torch.arange(5), chunk_size=2)[0]
    assert torch.autograd.gradcheck(function, (q, keys)) and torch.autograd.gradgradcheck(function, (q, keys))
    batch = torch.randn(3, 5, 4, dtype=torch.float64)
    mapped = torch.func.vmap(lambda q: streamed_topk(q, keys.detach(), 2)[0])(batch)
    torch.testing.assert_close(mapped, torch.stack([streamed_topk(q, keys.detach(), 2)[0] for q in batch]))
    compiled = torch.compile(lambda q, k: streamed_topk(q, k, 2)[0], backend="aot_eager")
    torch.testing.assert_close(compiled(q, keys), streamed_topk(q, keys, 2)[0])


def test_only_what_needs_a_gradient_gets_one():
    q, keys = vectors(1, 5, 6)
    streamed_topk(q, keys.detach(), 2)[0].sum().backward()
    assert q.grad is not None and keys.grad is None
    streamed_topk(q.detach(), keys, 2)[0].sum().backward()
    assert keys.grad is not None


def test_autocast_does_not_round_the_products():
    q, keys = vectors(2, 5, 6, dtype=torch.float32)
    wanted = streamed_topk(q, keys, 2)[0]
    with torch.autocast("cpu", torch.bfloat16):
        inside = streamed_topk(q, keys, 2)[0]
    assert inside.dtype == torch.float32 and torch.equal(inside, wanted)


def test_jacobian_in_keys():
    q, keys = (x.detach() for x in vectors(4, 3, 5))
    jacobian = torch.func.jacrev(lambda k: streamed_topk(q, k, 2)[0])(keys)
    assert jacobian.shape == (3, 2, *keys.shape)


Q, K = torch.eye(3), torch.eye(5)[:, :3].contiguous()


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: streamed_topk(Q.long(), K, 1), TypeError, "queries"),
        (lambda: streamed_topk(Q, K.double(), 1), ValueError, "keys"),
        (lambda: streamed_topk(Q, K[:, :2], 1), ValueError, "keys"),
        (lambda: streamed_topk(Q, K, 6), ValueError, "k must"),
        (lambda: streamed_topk(Q, K, 0), ValueError, "k must"),
        (lambda: streamed_topk(Q, K, 1.0), TypeError, "k must"),
        (lambda: streamed_topk(Q, K, 5, exclude=torch.arange(3)), ValueError, "k must be at most 4"),
        (lambda: streamed_topk(Q, K, 1, exclude=torch.tensor([0, 1, 5])), ValueError, "exclude"),
        (lambda: streamed_topk(Q, K, 1, exclude=torch.arange(2)), ValueError, "exclude"),
        (
            lambda: streamed_topk(Q, K, 1, exclude=torch.zeros(3, 1, 1, dtype=torch.int64)),
            ValueError,
            r"exclude must have shape \(3,\)",
        ),
        (lambda: streamed_topk(Q, K, 1, exclude=torch.zeros(3)), TypeError, "exclude"),
        (lambda: streamed_topk(Q, K, 1, chunk_size=0), ValueError, "chunk_size"),
    ],
)
def test_bad_input_names_the_argument(call, error, name):
    with pytest.raises(error, match=name):
        call()
