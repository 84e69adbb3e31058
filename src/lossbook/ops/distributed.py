"""Gather over processes, with gradients."""

import torch
import torch.distributed as dist
from torch import Tensor


def _processes() -> tuple[int, int]:
    """Rank and size of the default process group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        ctx.rows = len(tensor)
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[local_rows(ctx.rows, grad.device)]


def gather(tensor: Tensor) -> Tensor:
    """Concatenate ``tensor`` of all processes along the first dimension, in the order of ranks.

    The gradient of a process's rows is the sum of what all processes' losses send back to them. If each process takes the
    mean loss over its own rows and gradients are averaged over processes, as ``DistributedDataParallel`` does, loss and
    gradient are those of one process that holds the whole batch.

    Args:
        tensor: shape ``(B, ...)``, the same on every process; any dtype.

    Returns:
        Shape ``(world_size * B, ...)``; ``tensor`` itself when no process group is initialized.

    Raises:
        ValueError: if the processes hold different shapes.

    Complexity: one all-gather forward, one all-reduce backward; O(world_size * B) memory.

    Source: the usual practice of SimCLR and CLIP training.

    Example:
        >>> gather(torch.ones(2, 3)).shape  # one process
        torch.Size([2, 3])
    """
    _, size = _processes()
    if size == 1:
        return tensor
    shapes: list = [None] * size
    dist.all_gather_object(shapes, tuple(tensor.shape))
    if len(set(shapes)) > 1:
        raise ValueError(f"tensor must have one shape on every process, got {shapes}")
    return _Gather.apply(tensor.contiguous())


def local_rows(num_rows: int, device: torch.device | None = None) -> Tensor:
    """Positions of this process's ``num_rows`` rows in what :func:`gather` returns.

    Args:
        num_rows: rows that each process holds.
        device: where the result lives.

    Returns:
        Shape ``(num_rows,)``, int64: ``rank * num_rows + arange(num_rows)``.

    Source: bookkeeping of :func:`gather`.

    Example:
        >>> local_rows(3)  # one process
        tensor([0, 1, 2])
    """
    rank, _ = _processes()
    return torch.arange(rank * num_rows, (rank + 1) * num_rows, device=device)
