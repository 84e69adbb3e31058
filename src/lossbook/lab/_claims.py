"""A paper's claim, put to the test: one row in the notebook, kept in its output for the ledger."""

import html
import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from lossbook.lab._start import current_run

MIME = "application/vnd.lossbook.claim+json"
_SLUG = re.compile(r"[a-z0-9]+(?:[-_][a-z0-9]+)*")


class ClaimError(AssertionError):
    """A claim came out otherwise than the lab says."""


@dataclass(frozen=True)
class _Claim:
    name: str
    statement: str
    paper: str
    measured: str
    holds: bool
    expected: str
    reason: str | None
    profile: str
    device: str
    seed: int

    @property
    def verdict(self) -> str:
        if self.holds:
            return "holds"
        return "not reproduced here" if self.expected == "differs" else "does not hold"

    @property
    def details(self) -> list[str]:
        parts = [f"paper: {self.paper}", f"measured here: {self.measured}"]
        return parts + ([f"reason: {self.reason}"] if self.reason else [])

    def __str__(self) -> str:
        return " | ".join([f"{self.verdict}: {self.statement}", *self.details])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        statement, details = html.escape(self.statement), html.escape(" · ".join(self.details))
        color = "#009E73" if self.holds else "#D55E00"
        return {
            MIME: asdict(self),
            "text/html": (
                f'<div class="lossbook-claim" data-claim="{self.name}" data-verdict="{self.verdict}"'
                f' style="border-left: 4px solid {color}; padding: 0.25em 0.75em">'
                f"<strong>{self.verdict}</strong>: {statement}<br>{details}</div>"
            ),
            "text/plain": str(self),
        }


def claim(
    name: str,
    statement: str,
    *,
    paper: str,
    measured: str,
    holds: bool | np.bool_ | torch.Tensor,
    expected: str = "holds",
    reason: str | None = None,
) -> None:
    """Display one claim of the paper beside what was measured, and store it in the notebook's output for the ledger.

    The row is displayed first, so that the numbers are there to read when the claim raises. It is stored as
    ``application/vnd.lossbook.claim+json`` with the arguments and the profile, device and seed of :func:`start`.

    Args:
        name: short name of the claim in lower case, as in ``"tolerance-grows"``; unique within the lab.
        statement: the claim, one sentence.
        paper: the paper's figure, or what it says.
        measured: what came out here, with its uncertainty and unit.
        holds: whether the measurement agrees with the claim.
        expected: ``"holds"``, or ``"differs"`` for a claim that is known not to reproduce here.
        reason: why it differs; needed with ``expected="differs"`` and only there.

    Raises:
        ClaimError: the claim does not hold though ``expected="holds"``, or holds though ``expected="differs"``.
        RuntimeError: no :func:`start` before.
        TypeError: a text is not a string, or ``holds`` is not a bool.
        ValueError: ``name`` is not a lower-case name, a text is empty, or ``expected`` and ``reason`` do not fit.

    Example:
        >>> from lossbook import lab
        >>> run = lab.start()  # doctest: +ELLIPSIS
        lossbook ...
        >>> lab.claim("sum", "The penalties sum to one.", paper="1", measured="1.000", holds=True)
        holds: The penalties sum to one. | paper: 1 | measured here: 1.000
    """
    run = current_run()
    texts = {"name": name, "statement": statement, "paper": paper, "measured": measured}
    if reason is not None:
        texts["reason"] = reason
    for argument, text in texts.items():
        if not isinstance(text, str):
            raise TypeError(f"{argument} must be a string, got {type(text).__name__}")
        if not text.strip():
            raise ValueError(f"{argument} must not be empty")
    if not _SLUG.fullmatch(name):
        raise ValueError(f"name must be lower-case words joined by hyphens, as in 'tolerance-grows', got {name!r}")
    if isinstance(holds, torch.Tensor | np.ndarray | np.generic) and holds.ndim == 0:
        holds = holds.item()
    if not isinstance(holds, bool):
        raise TypeError(f"holds must be a bool, got {type(holds).__name__}")
    if expected not in ("holds", "differs"):
        raise ValueError(f"expected must be 'holds' or 'differs', got {expected!r}")
    if (expected == "differs") != (reason is not None):
        raise ValueError("reason must be given with expected='differs', and only there")

    from IPython.display import display

    row = _Claim(name, statement, paper, measured, holds, expected, reason, run.profile, run.device_name, run.seed)
    display(row)
    if holds and expected == "differs":
        raise ClaimError(f"claim {name!r} holds, so its reason for differing is out of date: {row}")
    if not holds and expected == "holds":
        raise ClaimError(f"claim {name!r} does not hold: {row}")
