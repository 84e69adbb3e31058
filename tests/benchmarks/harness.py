"""Time, peak memory and scaling exponents, each measured in a fresh process so that runs do not disturb each other."""

import multiprocessing as mp
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import psutil
import torch

THREADS = 2


@dataclass(frozen=True)
class Row:
    """One comparison with a peer, on the same inputs in the same process; ``ratio`` is ours over the peer's time."""

    part: str
    slug: str
    name: str
    peer: str
    size: str
    time_ours_ms: float
    time_peer_ms: float | None = None
    ratio: float | None = None
    memory_mb: float | None = None
    memory_peer_mb: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Slope:
    """A scaling exponent: the slope of log time or log memory over log size."""

    name: str
    quantity: str
    range: str
    slope: float
    claim: str


def timed(*steps: Callable[[], object], repeats: int) -> list[float]:
    """Median milliseconds of each step; the steps take turns, so that a slow moment of the machine hits all of them."""
    for step in steps:
        step()
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats):
        for step, record in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            record.append(time.perf_counter() - start)
    return [1e3 * statistics.median(record) for record in seconds]


def peak_memory(step: Callable[[], object]) -> float:
    """Megabytes by which the process grows at its peak while ``step`` runs; call it once, in a fresh process."""
    before = psutil.Process().memory_info().rss
    step()
    return max(0.0, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20)


def _child(pipe, function, arguments):
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    pipe.send(function(*arguments))


def in_fresh_process(function: Callable, *arguments):
    """What ``function(*arguments)`` returns, run in a process of its own."""
    context = mp.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def exponent(sizes: Sequence[float], measured: Sequence[float]) -> float:
    """Least-squares slope of log ``measured`` over log ``sizes``."""
    return float(np.polyfit(np.log(sizes), np.log(measured), 1)[0])


def bar(ratio: float, limit: float, what: str) -> str:
    """A bar in words, and whether it is met."""
    return f"bar: {what} at most {limit:g}; {'met' if ratio <= limit else 'MISSED'}"


def as_json(rows: Sequence[Row], slopes: Sequence[Slope]) -> dict:
    """The two tables, rounded, as the book reads them."""

    def rounded(item: dict) -> dict:
        return {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in item.items()}

    return {"rows": [rounded(asdict(row)) for row in rows], "slopes": [rounded(asdict(slope)) for slope in slopes]}
