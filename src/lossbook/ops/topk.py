"""The k largest similarities of each row, without the matrix of similarities."""

import torch
from torch import Tensor

from lossbook import _checks
from lossbook.ops.streamed import _chunk_rows


class _StreamedTopK(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(queries, keys, exclude, k, chunk_rows):
        values, indices = [], []
        for start in range(0, queries.shape[0], chunk_rows):
            similarities = queries[start : start + chunk_rows] @ keys.T
            if exclude is not None:
                similarities = similarities.scatter(1, exclude[start : start + chunk_rows], -torch.inf)
            largest = similarities.topk(k, dim=1)
            values.append(largest.values)
            indices.append(largest.indices)
        return torch.cat(values), torch.cat(indices)

    @staticmethod
    def setup_context(ctx, inputs, output):
        queries, keys, _, _, ctx.chunk_rows = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(queries, keys, output[1])

    @staticmethod
    def backward(ctx, grad_values, _):
        queries, keys, indices = ctx.saved_tensors
        grad_queries, grad_keys = [], torch.zeros_like(keys) if ctx.needs_input_grad[1] else None
        for start in range(0, queries.shape[0], ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            grad = grad_values[rows]
            grad = grad.new_zeros(len(grad), len(keys)).scatter(1, indices[rows], grad)  # k entries a row
            if ctx.needs_input_grad[0]:
                grad_queries.append(grad @ keys)
            if grad_keys is not None:
                grad_keys = grad_keys + grad.T @ queries[rows]
        return torch.cat(grad_queries) if grad_queries else None, grad_keys, None, None, None


def streamed_topk(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    exclude: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The k largest :math:`q_i^\top k_j` of each row i, in descending order, and their indices j.

    Differentiable in ``queries`` and ``keys``; there is no forward mode. Products are taken in the inputs' dtype, also under autocast.

    Args:
        queries: shape ``(B, d)``, floating point. Not normalized here.
        keys: shape ``(N, d)``, the dtype and device of ``queries``.
        k: how many, between 1 and N, less what ``exclude`` leaves out.
        exclude: shape ``(B,)`` or ``(B, m)``, int64: for each row, the indices of keys that are left out. ``torch.arange(B)``
            leaves out each row itself.
        chunk_size: rows taken at a time; None chooses by ``N`` and the device.

    Returns:
        Values and indices (int64), each of shape ``(B, k)``.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes do not fit, or fewer than ``k`` keys are left.

    Complexity: O(BNd) time; O(chunk_size * N + (B + N) d) memory against O(BN) of the dense computation.

    Source: the choice of hardest negatives; chapter ``similarity/groco``, def-groco-loss.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> values, indices = streamed_topk(x, x, 1, exclude=torch.arange(3))
        >>> values.squeeze(1), indices.squeeze(1)
        (tensor([0.6000, 0.8000, 0.8000]), tensor([1, 2, 1]))
    """
    _checks.floating("queries", queries, 2)
    _checks.floating("keys", keys, 2)
    rows, num_keys = queries.shape[0], keys.shape[0]
    if keys.shape[1] != queries.shape[1] or keys.dtype != queries.dtype:
        raise ValueError(
            f"keys must have {queries.shape[1]} columns of {queries.dtype} like queries, "
            f"got shape {tuple(keys.shape)} of {keys.dtype}"
        )
    left = num_keys
    if exclude is not None:
        _checks.integer("exclude", exclude, ndim=getattr(exclude, "ndim", 1))
        if exclude.ndim not in (1, 2) or exclude.shape[0] != rows:
            raise ValueError(f"exclude must have shape ({rows},) or ({rows}, m), got {tuple(exclude.shape)}")
        if _checks.known_false((exclude >= 0) & (exclude < num_keys)):
            raise ValueError(f"exclude must hold indices in [0, {num_keys}), got {exclude.min()} to {exclude.max()}")
        exclude = exclude.reshape(rows, -1)
        left -= exclude.shape[1]
    k = _checks.positive_int("k", k)
    if k > left:
        raise ValueError(f"k must be at most {left}, the number of keys left, got {k}")
    chunk_rows = _chunk_rows(num_keys, queries.device) if chunk_size is None else chunk_size
    _checks.positive_int("chunk_size", chunk_rows)
    with torch.autocast(queries.device.type, enabled=False):
        return _StreamedTopK.apply(queries, keys, exclude, k, chunk_rows)
