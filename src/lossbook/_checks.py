"""Argument checks that the papers' modules share. Each error names the argument, what came and what is needed."""

import math
from numbers import Integral, Real

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")
NO_CLASS = torch.iinfo(
    torch.int64
).min  # for F.cross_entropy, which ignores the class -100 if it is not told another one


def known_false(condition: Tensor) -> bool:
    """Whether ``condition`` is known to be false for some element.

    Under ``vmap`` and ``torch.compile`` values are not available, and on an accelerator reading one would stall the
    queue: there the answer is ``False``, and shapes and dtypes are all that is checked.
    """
    if torch.compiler.is_compiling() or condition.device.type != "cpu":
        return False
    try:
        return not bool(condition.all())
    except RuntimeError:  # a batched tensor of vmap has no one truth value
        return False


def floating(name: str, value: Tensor, ndim: int | None = None) -> Tensor:
    """``value``, if it is a floating-point tensor with ``ndim`` dimensions, none of them empty."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s), got shape {tuple(value.shape)}")
    if value.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(value.shape)}")
    return value


def finite(name: str, value: Tensor) -> Tensor:
    """``value``, if none of its elements is known to be NaN or infinite."""
    # One sum takes a fraction of the time of a test of each element, and is finite if they are, unless it overflows.
    if known_false(torch.isfinite(value.detach().sum())) and known_false(torch.isfinite(value)):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return value


def integer(name: str, value: Tensor, ndim: int) -> Tensor:
    """``value``, if it is an int64 tensor with ``ndim`` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {value.dtype}")
    if value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s), got shape {tuple(value.shape)}")
    return value


def indices(name: str, value: Tensor, size: int, rows: int | None = None) -> Tensor:
    """``value``, if it is int64 of shape ``(rows,)``, any length for None, and none is known to lie outside of [0, size)."""
    integer(name, value, 1)
    if rows is not None and len(value) != rows:
        raise ValueError(f"{name} must have shape ({rows},), one for each row, got {tuple(value.shape)}")
    if known_false((value >= 0) & (value < size)):
        raise ValueError(f"{name} must lie in [0, {size}), got {value.min()} to {value.max()}")
    return value


def wide(value: Tensor) -> Tensor:
    """``value`` in float32 or wider: half precision is too coarse for sums over a batch or over classes."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def like(name: str, value: Tensor, other_name: str, other: Tensor, ndim: int) -> Tensor:
    """``value``, if it is a floating-point tensor with ``ndim`` dimensions, and of the shape and dtype of ``other``."""
    floating(name, value, ndim)
    if value.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {tuple(other.shape)}, got {tuple(value.shape)}")
    if value.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {value.dtype}")
    return value


def positive_number(name: str, value: float) -> float:
    """``value`` as a float, if it is finite and greater than zero."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and > 0, got {value}")
    return float(value)


def number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    """``value`` as a float, if it is finite and lies in [``low``, ``high``]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and low <= value <= high):
        bounds = f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be finite and {bounds}, got {value}")
    return float(value)


def positive_int(name: str, value: int, minimum: int = 1) -> int:
    """``value`` as an int, if it is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def fraction(name: str, value: float) -> float:
    """``value``, if it lies in (0, 1]."""
    if positive_number(name, value) > 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value}")
    return float(value)


def temperature(value: float | Tensor, rows: int | None = None, name: str = "temperature") -> float | Tensor:
    """A temperature: a float, or a tensor of shape ``()``, or ``(rows,)`` where there is one for each row; finite, > 0."""
    if not isinstance(value, Tensor):
        return positive_number(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if value.ndim and value.shape != (rows,):
        shapes = "()" if rows is None else f"() or ({rows},)"
        raise ValueError(f"{name} must have shape {shapes}, got {tuple(value.shape)}")
    if known_false(torch.isfinite(value) & (value > 0)):
        raise ValueError(f"{name} must be finite and > 0 everywhere, got {value.detach()}")
    return value


def boolean_mask(name: str, mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """A boolean mask of ``shape`` with at least one true element in each row, or None."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a boolean tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(mask.shape)}")
    if known_false(mask.any(dim=-1)):
        raise ValueError(f"{name} must keep at least one element in each row, got a row of False")
    return mask


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """``loss`` after ``reduction``: "none", "mean" or "sum"."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()
