"""Row-wise log-sum-exp of similarities, without the matrix of similarities.

The loss of an anchor against N keys needs ``logsumexp_k(q . k)``: one number a row, from a matrix that nothing else needs. Rows
are taken a chunk at a time, and the backward pass computes each chunk again instead of keeping it.
"""

import torch
from torch import Tensor

from lossbook import _checks

# Similarities in a chunk. On a CPU, 32 MiB of float32: the C library gives blocks of this size back to the system, where
# smaller ones leave gaps that the next chunk may not fit. On a GPU, enough to fill it.
_CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}
# Fewer rows than this make the matrix products memory-bound, so wide rows get larger chunks, up to a limit.
_CHUNK_ROWS, _CHUNK_LIMIT = 512, 2**25


def _chunk_rows(num_keys: int, device: torch.device) -> int:
    elements = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["cuda"])
    return max(1, elements // num_keys, min(_CHUNK_ROWS, _CHUNK_LIMIT // num_keys))


# The next three work in place: one block a chunk.


def _logits(queries: Tensor, keys: Tensor, bias: Tensor | None, mask: Tensor | None, exclude: Tensor | None) -> Tensor:
    """One chunk of the matrix, in float32 or wider, with -inf where a key is not used."""
    logits = (queries @ keys.T).to(torch.promote_types(queries.dtype, torch.float32))
    if bias is not None:
        logits.add_(bias)
    if mask is not None:
        logits.masked_fill_(~mask, -torch.inf)
    if exclude is not None:
        logits.scatter_(1, exclude, -torch.inf)
    return logits


def _logsumexp_(logits: Tensor) -> Tensor:
    """Log-sum-exp by row, and -inf in a row without keys; overwrites ``logits``."""
    largest = logits.amax(dim=1, keepdim=True)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    return logits.sub_(largest).exp_().sum(dim=1).log() + largest.squeeze(1)


def _softmax_(logits: Tensor, logsumexp: Tensor) -> Tensor:
    """``exp(logits - logsumexp)`` by row, and zero in a row without keys, where both are -inf; overwrites ``logits``."""
    return logits.sub_(logsumexp.masked_fill(logsumexp == -torch.inf, 0)[:, None]).exp_()


class _StreamedLogSumExp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(queries, keys, bias, mask, exclude, chunk_rows):
        rows = []
        for start in range(0, queries.shape[0], chunk_rows):
            rows_of = _slicer(start, chunk_rows)
            logits = _logits(rows_of(queries), keys, bias, rows_of(mask), rows_of(exclude))
            rows.append(_logsumexp_(logits))
        return torch.cat(rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        queries, keys, bias, mask, exclude, ctx.chunk_rows = inputs
        ctx.save_for_backward(queries, keys, bias, mask, exclude, output)

    @staticmethod
    def backward(ctx, grad_output):
        queries, keys, bias, mask, exclude, logsumexp = ctx.saved_tensors
        need_queries, need_keys, need_bias = ctx.needs_input_grad[:3]
        grad_queries, grad_keys, grad_bias = [], None, None
        with torch.autocast(queries.device.type, enabled=False):  # as forward, wherever backward is called
            for start in range(0, queries.shape[0], ctx.chunk_rows):
                rows_of = _slicer(start, ctx.chunk_rows)
                q, grad = rows_of(queries), rows_of(grad_output)
                softmax = _softmax_(_logits(q, keys, bias, rows_of(mask), rows_of(exclude)), rows_of(logsumexp))
                if need_bias:
                    part = grad @ softmax
                    grad_bias = part if grad_bias is None else grad_bias + part
                softmax = softmax.to(q.dtype)
                if need_queries:
                    grad_queries.append((softmax @ keys) * grad[:, None].to(q.dtype))
                if need_keys:
                    grad_keys = _accumulated(grad_keys, softmax.T, q * grad[:, None].to(q.dtype), grad.dtype)
        return (
            torch.cat(grad_queries) if need_queries else None,
            grad_keys.to(keys.dtype) if need_keys else None,
            grad_bias.to(bias.dtype) if need_bias else None,
            None,
            None,
            None,
        )


def _slicer(start: int, rows: int):
    return lambda tensor: None if tensor is None else tensor[start : start + rows]


def _accumulated(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``total + a @ b`` in ``dtype``; where that is the factors' own, the product is added as it is made."""
    if total is None:
        return (a @ b).to(dtype)
    return total.addmm_(a, b) if a.dtype == dtype else total.add_(a @ b)


def streamed_logsumexp(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    exclude: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Row-wise :math:`\log\sum_k \exp(q_i^\top k_k/\tau_i + b_k)`, without holding the matrix of similarities.

    Differentiable in ``queries``, ``keys``, ``temperature`` and ``bias``; a second derivative holds the matrix, and there is
    no forward mode. Products are taken in the inputs' dtype, also
    under autocast; what follows is in float32 or wider.

    Args:
        queries: shape ``(B, d)``, floating point. Not normalized here.
        keys: shape ``(N, d)``, the dtype and device of ``queries``.
        temperature: :math:`\tau > 0`, one number, or a tensor of shape ``()`` or ``(B,)``, one for each row.
        bias: shape ``(N,)``; added to every row's scaled similarities (a log-weight of each key).
        mask: shape ``(B, N)``, bool, true where a key is used. It is as large as the matrix: prefer ``exclude``.
        exclude: shape ``(B,)`` or ``(B, m)``, int64: for each row, the indices of keys that are left out. ``torch.arange(B)``
            leaves out each row itself.
        chunk_size: rows taken at a time; None chooses by ``N`` and the device.

    Returns:
        Shape ``(B,)``, float32 or wider; -inf, with zero gradients, in a row in which no key is left.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes do not fit, or the temperature is not finite and positive.

    Complexity: O(BNd) time: four matrix products of this size, one forward and three backward, where the dense
    computation takes three; O(chunk_size * N + (B + N) d) memory against O(BN).

    Source: the log-partition function of softmax losses; chapter ``similarity/temperature``, eq-temperature-loss.

    Example:
        >>> x = torch.eye(3)
        >>> streamed_logsumexp(x, x, exclude=torch.arange(3))  # log(2 e^0)
        tensor([0.6931, 0.6931, 0.6931])
    """
    _checks.floating("queries", queries, 2)
    _checks.floating("keys", keys, 2)
    rows, num_keys = queries.shape[0], keys.shape[0]
    if keys.shape[1] != queries.shape[1] or keys.dtype != queries.dtype:
        raise ValueError(
            f"keys must have {queries.shape[1]} columns of {queries.dtype} like queries, "
            f"got shape {tuple(keys.shape)} of {keys.dtype}"
        )
    temperature = _checks.temperature(temperature, rows)
    if bias is not None and _checks.floating("bias", bias).shape != (num_keys,):
        raise ValueError(f"bias must have shape ({num_keys},), got {tuple(bias.shape)}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a boolean tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.shape != (rows, num_keys):
            raise ValueError(f"mask must have shape ({rows}, {num_keys}), got {tuple(mask.shape)}")
    if exclude is not None:
        _checks.integer("exclude", exclude, ndim=2 if getattr(exclude, "ndim", 1) == 2 else 1)
        if exclude.shape[0] != rows:
            raise ValueError(f"exclude must have shape ({rows},) or ({rows}, m), got {tuple(exclude.shape)}")
        if _checks.known_false((exclude >= 0) & (exclude < num_keys)):
            raise ValueError(f"exclude must hold indices in [0, {num_keys}), got {exclude.min()} to {exclude.max()}")
        exclude = exclude.reshape(rows, -1)
    chunk_rows = _chunk_rows(num_keys, queries.device) if chunk_size is None else chunk_size
    _checks.positive_int("chunk_size", chunk_rows)
    with torch.autocast(queries.device.type, enabled=False):
        # The temperature's gradient flows through this division: d lse / d tau = -E[s] / tau^2 needs nothing else.
        scaled = queries / (temperature[:, None] if getattr(temperature, "ndim", 0) == 1 else temperature)
        return _StreamedLogSumExp.apply(scaled.to(queries.dtype), keys, bias, mask, exclude, chunk_rows)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Log-probability of each target token under a linear output layer, without the (tokens, vocabulary) matrix.

    :math:`\log p(y_t) = (h_t^\top w_{y_t} + b_{y_t})/\tau - \log\sum_v\exp((h_t^\top w_v + b_v)/\tau)`.

    Args:
        hidden: shape ``(..., d)``, floating point: the last hidden states.
        weight: shape ``(V, d)``, the dtype and device of ``hidden``: the output layer, one row a token.
        targets: shape ``(...)``, int64, in ``[0, V)`` or equal to ``ignore_index``.
        bias: shape ``(V,)`` or None.
        temperature: a number > 0.
        ignore_index: the target that marks a position without one.
        chunk_size: tokens taken at a time; None chooses by ``V`` and the device.

    Returns:
        Shape ``(...)``, float32 or wider, at most 0 up to rounding; 0, with zero gradient, where the target is ``ignore_index``.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes do not fit, a target is out of range, or the temperature is not finite and positive.

    Complexity: O(TVd) time and O(chunk_size * V + (T + V) d) memory for T tokens.

    Source: the softmax likelihood of a language model; the same recomputation as :func:`streamed_logsumexp`.

    Example:
        >>> token_logprobs(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([1, -100]))  # -log 4, ignored
        tensor([-1.3863,  0.0000])
    """
    _checks.floating("hidden", hidden)
    _checks.floating("weight", weight, 2)
    if weight.shape[1] != hidden.shape[-1] or weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight must have {hidden.shape[-1]} columns of {hidden.dtype} like hidden, "
            f"got shape {tuple(weight.shape)} of {weight.dtype}"
        )
    if _checks.integer("targets", targets, hidden.ndim - 1).shape != hidden.shape[:-1]:
        raise ValueError(f"targets must have shape {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}")
    used = targets != ignore_index
    if _checks.known_false(~used | ((targets >= 0) & (targets < weight.shape[0]))):
        raise ValueError(f"targets must lie in [0, {weight.shape[0]}) or be {ignore_index} (ignore_index)")
    temperature = _checks.positive_number("temperature", temperature)
    states, index = hidden.reshape(-1, hidden.shape[-1]), targets.where(used, 0).reshape(-1)
    scaled_bias = None if bias is None else bias / temperature
    normalizer = streamed_logsumexp(states, weight, temperature=temperature, bias=scaled_bias, chunk_size=chunk_size)
    with torch.autocast(hidden.device.type, enabled=False):
        target_logits = (states * weight[index]).sum(-1, dtype=normalizer.dtype) / temperature
        if scaled_bias is not None:
            target_logits = target_logits + scaled_bias[index]
    return (target_logits - normalizer).reshape(targets.shape).masked_fill(~used, 0)


def sequence_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Log-probability of each sequence's marked tokens, each given those before it: a response, given its prompt.

    :math:`\log\pi(y\mid x)=\sum_{t:\,m_t=1}\log p(y_t\mid y_{<t})`, where the state at position t - 1 predicts token t.

    Args:
        hidden: shape ``(B, T, d)``, floating point: the last hidden states of a causal model.
        weight: shape ``(V, d)``, the dtype and device of ``hidden``: the output layer, one row a token.
        tokens: shape ``(B, T)``, int64, in ``[0, V)`` wherever ``mask`` is true.
        mask: shape ``(B, T)``, bool, true at the tokens that are counted, one or more in each row. Nothing predicts
            position 0: false there.
        bias: shape ``(V,)`` or None.
        temperature: a number > 0.
        chunk_size: tokens taken at a time; None chooses by ``V`` and the device.

    Returns:
        Shape ``(B,)``, float32 or wider. Divided by ``mask.sum(1)``, it is the mean for each token.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes do not fit, ``mask`` is true at position 0 or has a row without a true element, a counted
            token is out of range, or the temperature is not finite and positive.

    Complexity: as :func:`token_logprobs`, for the tokens that are counted.

    Source: the likelihood of a response under a language model, as all preference losses take it.

    Example:
        >>> tokens, mask = torch.tensor([[0, 1, 2]]), torch.tensor([[False, True, True]])
        >>> sequence_logprobs(torch.zeros(1, 3, 2), torch.zeros(4, 2), tokens, mask)  # -2 log 4
        tensor([-2.7726])
    """
    _checks.floating("hidden", hidden, 3)
    if _checks.integer("tokens", tokens, 2).shape != hidden.shape[:2]:
        raise ValueError(f"tokens must have shape {tuple(hidden.shape[:2])}, got {tuple(tokens.shape)}")
    if _checks.boolean_mask("mask", mask, tuple(tokens.shape)) is None:
        raise TypeError("mask must be a boolean tensor, got None")
    if _checks.known_false(~mask[:, :1]):
        raise ValueError("mask must be false at position 0, which nothing predicts")
    rows, positions = mask.nonzero(as_tuple=True)
    chosen = hidden[rows, positions - 1]
    logprobs = token_logprobs(
        chosen,
        weight,
        tokens[rows, positions],
        bias=bias,
        temperature=temperature,
        ignore_index=-1,
        chunk_size=chunk_size,
    )
    return logprobs.new_zeros(len(tokens)).index_add(0, rows, logprobs)
