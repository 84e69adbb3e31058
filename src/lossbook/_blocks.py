"""Work on blocks of rows that stay in a CPU's cache, for modules that pass over their scores several times."""

from collections.abc import Callable

import torch
from torch import Tensor

_ELEMENTS = 2**19  # a block


def by_rows(function: Callable[..., tuple[Tensor, ...]], x: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
    """``function`` of blocks of the rows of ``x`` and ``more``; of all rows at once on an accelerator, and in a compiled graph."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return function(x, *more)
    rows = max(1, _ELEMENTS * len(x) // x.numel())
    blocks = zip(*(values.split(rows) for values in (x, *more)), strict=True)
    return tuple(torch.cat(parts) for parts in zip(*(function(*block) for block in blocks), strict=True))
