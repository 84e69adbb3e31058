"""The streamed log-sum-exp and token log-probabilities against the dense computation."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lossbook.ops import sequence_logprobs, streamed_logsumexp, streamed_topk, token_logprobs
from lossbook.ops import streamed as streamed_module


def dense_logsumexp(queries, keys, temperature=1.0, bias=None, mask=None, exclude=None):
    """The oracle: the whole matrix, autograd through torch.logsumexp."""
    temperature = torch.as_tensor(temperature, dtype=queries.dtype)
    logits = queries @ keys.T / (temperature[:, None] if temperature.ndim else temperature)
    if bias is not None:
        logits = logits + bias
    if exclude is not None:
        mask = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask
        mask = mask.scatter(1, exclude.reshape(len(queries), -1), False)
    return torch.logsumexp(logits if mask is None else logits.masked_fill(~mask, -torch.inf), dim=1)


def instance(seed, rows, keys, dim, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return draw(rows, dim).requires_grad_(), draw(keys, dim).requires_grad_(), draw


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    keys=st.integers(2, 9),
    chunk=st.sampled_from([None, 1, 2, 3, 100]),
    per_row=st.booleans(),
    with_bias=st.booleans(),
    with_mask=st.booleans(),
    excluded=st.integers(0, 2),
)
def test_equals_dense_with_gradients(seed, rows, keys, chunk, per_row, with_bias, with_mask, excluded):
    q, k, draw = instance(seed, rows, keys, 4)
    temperature = (draw(rows) if per_row else draw(1)[0]).exp().requires_grad_()
    bias = draw(keys).requires_grad_() if with_bias else None
    mask = (draw(rows, keys) > -1) if with_mask else None
    exclude = torch.arange(rows * excluded).reshape(rows, excluded) % keys if excluded else None
    if mask is not None:
        mask = mask.scatter(1, torch.full((rows, 1), keys - 1), True)
        exclude = None  # one key at least stays
    elif excluded >= keys:
        exclude = None
    weight = draw(rows)
    leaves = [x for x in (q, k, temperature, bias) if x is not None]
    ours = streamed_logsumexp(q, k, temperature=temperature, bias=bias, mask=mask, exclude=exclude, chunk_size=chunk)
    theirs = dense_logsumexp(q, k, temperature, bias, mask, exclude)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours @ weight, leaves), torch.autograd.grad(theirs @ weight, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 7])
def test_float32_equals_dense_to_1e_6(chunk):
    q, k, _ = instance(0, 64, 50, 16, torch.float32)
    q2, k2 = F.normalize(q.detach()).requires_grad_(), F.normalize(k.detach()).requires_grad_()
    ours = streamed_logsumexp(q2, k2, temperature=0.1, chunk_size=chunk).mean()
    theirs = dense_logsumexp(q2, k2, 0.1).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(ours, [q2, k2]), torch.autograd.grad(theirs, [q2, k2]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_gradcheck():
    q, k, draw = instance(1, 5, 6, 3)
    temperature, bias = draw(5).exp().requires_grad_(), draw(6).requires_grad_()
    exclude = torch.tensor([0, 1, 2, 3, 5])

    def function(q, k, temperature, bias):
        return streamed_logsumexp(q, k, temperature=temperature, bias=bias, exclude=exclude, chunk_size=2)

    assert torch.autograd.gradcheck(function, (q, k, temperature, bias))
    assert torch.autograd.gradgradcheck(function, (q, k, temperature, bias))


def test_gradient_only_where_it_is_asked_for():
    q, k, _ = instance(2, 4, 5, 3)
    streamed_logsumexp(q.detach(), k).sum().backward()
    assert q.grad is None and k.grad is not None
    k.grad = None
    streamed_logsumexp(q, k.detach()).sum().backward()
    assert q.grad is not None and k.grad is None


def test_holds_no_matrix(monkeypatch):
    """No tensor with more than chunk x N elements is made, forward or back."""
    sizes = []
    original = streamed_module._logits
    monkeypatch.setattr(streamed_module, "_logits", lambda *a: sizes.append(original(*a)) or sizes[-1])
    q, k, _ = instance(3, 40, 30, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        streamed_logsumexp(q, k, chunk_size=8).sum().backward()
    assert max(t.numel() for t in sizes) == 8 * 30 and len(sizes) == 10
    assert max(saved) <= 40 * 4


def test_a_row_without_keys_is_minus_infinity_with_zero_gradient():
    q, k, _ = instance(4, 2, 1, 3)
    out = streamed_logsumexp(q, k, exclude=torch.tensor([0, 0]))
    assert (out == -torch.inf).all()
    out.sum().backward()
    assert (q.grad == 0).all() and (k.grad == 0).all()


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_finite_at_extreme_logits_in_float32(scale):
    q = torch.tensor([[scale], [1.0]], requires_grad=True)
    k = torch.tensor([[1.0], [1.0], [-1.0]], requires_grad=True)
    out = streamed_logsumexp(q, k)
    out.sum().backward()
    assert out.isfinite().all() and q.grad.isfinite().all() and k.grad.isfinite().all()
    torch.testing.assert_close(out[0].item(), abs(scale) + (0.6931 if scale > 0 else 0.0), rtol=1e-6, atol=1e-3)


def test_small_temperature_in_float32_is_finite():
    q, k, _ = instance(5, 6, 7, 4, torch.float32)
    q, k = F.normalize(q.detach()).requires_grad_(), F.normalize(k.detach()).requires_grad_()
    streamed_logsumexp(q, k, temperature=1e-4).sum().backward()
    assert q.grad.isfinite().all() and k.grad.isfinite().all()


def test_shift_of_every_key_bias_shifts_the_result():
    q, k, draw = instance(6, 3, 4, 2)
    bias = draw(4)
    torch.testing.assert_close(streamed_logsumexp(q, k, bias=bias + 2.5), streamed_logsumexp(q, k, bias=bias) + 2.5)


def test_non_contiguous_inputs():
    q, k, _ = instance(7, 4, 4, 6)
    q2, k2 = q.detach().T.contiguous().T.requires_grad_(), k.detach()[:, ::2]
    torch.testing.assert_close(streamed_logsumexp(q2[:, ::2], k2), dense_logsumexp(q2[:, ::2], k2))


def test_half_precision_inputs_give_float32():
    q, k, _ = instance(8, 6, 5, 4, torch.bfloat16)
    out = streamed_logsumexp(q, k)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert q.grad.dtype == k.grad.dtype == torch.bfloat16
    torch.testing.assert_close(out, dense_logsumexp(q.float(), k.float()), rtol=2e-2, atol=2e-2)


def test_autocast_does_not_lower_the_precision():
    q, k, _ = instance(9, 6, 5, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = streamed_logsumexp(q, k)
    assert torch.equal(inside, streamed_logsumexp(q, k))


def test_func_grad_and_vmap():
    q, k, draw = instance(10, 5, 4, 3)
    queries = draw(3, 5, 3)
    grads = torch.func.vmap(torch.func.grad(lambda x: streamed_logsumexp(x, k.detach(), chunk_size=2).sum()))(queries)
    for x, grad in zip(queries, grads, strict=True):
        x = x.clone().requires_grad_()
        dense_logsumexp(x, k.detach()).sum().backward()
        torch.testing.assert_close(grad, x.grad)


def test_compiles():
    q, k, _ = instance(11, 5, 4, 3)
    function = torch.compile(lambda q, k: streamed_logsumexp(q, k, temperature=0.5).sum(), backend="aot_eager")
    torch.testing.assert_close(function(q, k), dense_logsumexp(q, k, 0.5).sum())
    function(q, k).backward()
    expected = torch.autograd.grad(dense_logsumexp(q, k, 0.5).sum(), [q, k])
    torch.testing.assert_close(q.grad, expected[0])
    torch.testing.assert_close(k.grad, expected[1])


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"queries": [[1.0]]}, TypeError, "queries"),
        ({"queries": torch.ones(3, dtype=torch.int64)}, TypeError, "queries"),
        ({"queries": torch.ones(3)}, ValueError, "queries"),
        ({"queries": torch.ones(0, 2)}, ValueError, "queries"),
        ({"keys": torch.ones(4, 3)}, ValueError, "keys"),
        ({"keys": torch.ones(4, 2, dtype=torch.float64)}, ValueError, "keys"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"temperature": "warm"}, TypeError, "temperature"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, ValueError, "temperature"),
        ({"temperature": torch.ones(2)}, ValueError, "temperature"),
        ({"temperature": torch.ones((), dtype=torch.int64)}, TypeError, "temperature"),
        ({"bias": torch.ones(3)}, ValueError, "bias"),
        ({"mask": torch.ones(3, 4)}, TypeError, "mask"),
        ({"mask": [[True] * 4] * 3}, TypeError, "mask"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, ValueError, "mask"),
        ({"exclude": torch.arange(2)}, ValueError, "exclude"),
        ({"exclude": torch.tensor([0, 1, 4])}, ValueError, "exclude"),
        ({"exclude": torch.tensor([0.0, 1, 2])}, TypeError, "exclude"),
        ({"exclude": [0, 1, 2]}, TypeError, "exclude"),
        ({"exclude": torch.zeros(3, 1, 1, dtype=torch.int64)}, ValueError, "exclude"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"chunk_size": 1.5}, TypeError, "chunk_size"),
    ],
)
def test_bad_input_names_the_argument(change, error, name):
    arguments = {"queries": torch.ones(3, 2), "keys": torch.ones(4, 2)} | change
    queries, keys = arguments.pop("queries"), arguments.pop("keys")
    with pytest.raises(error, match=name):
        streamed_logsumexp(queries, keys, **arguments)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    chunk=st.sampled_from([None, 1, 3]),
    with_bias=st.booleans(),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_token_logprobs_equal_log_softmax(seed, chunk, with_bias, temperature):
    h, w, draw = instance(seed, 8, 7, 5)
    bias = draw(7).requires_grad_() if with_bias else None
    targets = torch.randint(0, 7, (2, 4), generator=torch.Generator().manual_seed(seed))
    targets[0, 1] = -100
    ours = token_logprobs(h.reshape(2, 4, 5), w, targets, bias=bias, temperature=temperature, chunk_size=chunk)
    logits = (F.linear(h, w, bias) / temperature).log_softmax(-1)
    theirs = -F.nll_loss(logits, targets.reshape(-1), reduction="none").reshape(2, 4)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert ours[0, 1] == 0
    leaves = [x for x in (h, w, bias) if x is not None]
    weight = draw(2, 4)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), leaves),
        torch.autograd.grad((theirs * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"targets": torch.tensor([0, 4])}, ValueError, "targets"),
        ({"targets": torch.tensor([0, -1])}, ValueError, "targets"),
        ({"targets": torch.tensor([0])}, ValueError, "targets"),
        ({"targets": torch.tensor([0.0, 1.0])}, TypeError, "targets"),
        ({"weight": torch.ones(4, 2)}, ValueError, "weight"),
        ({"temperature": 0}, ValueError, "temperature"),
        ({"bias": torch.ones(3)}, ValueError, "bias"),
    ],
)
def test_token_logprobs_bad_input(change, error, name):
    arguments = {"hidden": torch.ones(2, 3), "weight": torch.ones(4, 3), "targets": torch.tensor([0, 1])} | change
    with pytest.raises(error, match=name):
        token_logprobs(**arguments)


def test_backward_inside_of_autocast_is_that_outside():
    q, k = (torch.randn(6, 5, requires_grad=True) for _ in range(2))
    for function in (
        lambda: streamed_logsumexp(q, k, temperature=0.1, chunk_size=4).sum(),
        lambda: streamed_topk(q, k, 2, chunk_size=4)[0].sum(),
        lambda: token_logprobs(q, k, torch.arange(6), chunk_size=4).sum(),
    ):
        outside = torch.autograd.grad(function(), (q, k))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = torch.autograd.grad(function(), (q, k))
        torch.testing.assert_close(inside, outside, rtol=0, atol=0)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), chunk=st.sampled_from([None, 1, 3]), temperature=st.sampled_from([0.5, 1.0]))
def test_sequence_logprobs_add_what_a_loop_adds(seed, chunk, temperature):
    h, w, draw = instance(seed, 15, 7, 5)
    bias = draw(7)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 7, (3, 5), generator=generator)
    mask = torch.rand(3, 5, generator=generator) < 0.5
    mask[:, 0], mask[:, 4] = False, True
    tokens[~mask] = 99  # what is not counted may be padding
    ours = sequence_logprobs(h.reshape(3, 5, 5), w, tokens, mask, bias=bias, temperature=temperature, chunk_size=chunk)
    logprobs = (F.linear(h.reshape(3, 5, 5), w, bias) / temperature).log_softmax(-1)
    theirs = torch.stack([sum(logprobs[b, t - 1, tokens[b, t]] for t in range(5) if mask[b, t]) for b in range(3)])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weight = draw(3)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (h, w)),
        torch.autograd.grad((theirs * weight).sum(), (h, w)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"hidden": torch.ones(3, 2)}, ValueError, "hidden"),
        ({"tokens": torch.ones(2, 4, dtype=torch.int64)}, ValueError, "tokens"),
        ({"tokens": torch.ones(2, 3)}, TypeError, "tokens"),
        ({"mask": None}, TypeError, "mask"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "mask must be false at position 0"),
        ({"mask": torch.tensor([[False, True, True], [False] * 3])}, ValueError, "mask"),
        ({"tokens": torch.full((2, 3), 4)}, ValueError, "targets"),
        ({"temperature": 0}, ValueError, "temperature"),
    ],
)
def test_sequence_logprobs_bad_input(change, error, name):
    mask = torch.tensor([[False, True, True], [False, False, True]])
    arguments = {"hidden": torch.ones(2, 3, 5), "weight": torch.ones(4, 5), "mask": mask}
    arguments |= {"tokens": torch.ones(2, 3, dtype=torch.int64)} | change
    with pytest.raises(error, match=name):
        sequence_logprobs(**arguments)
