"""Run every benchmark, print the tables, and keep them for the book: `make bench`.

`python tests/benchmarks/run.py similarity/bench_temperature` runs one file and keeps nothing.
"""

import datetime
import importlib
import json
import platform
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "book" / "results" / "benchmarks.json"


def machine() -> str:
    """The processor's name, and what ran on it."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, 2 threads, Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def show(rows: list[dict]) -> None:
    """Print dictionaries with the same keys as a table."""
    text = [list(rows[0])] + [["" if v is None else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    for line in text:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main(chosen: list[str]) -> None:
    """Run the chosen files, or all."""
    sys.path.insert(0, str(HERE))
    harness = importlib.import_module("harness")
    rows, slopes = [], []
    for path in sorted(HERE.glob("*/bench_*.py")):
        name = path.relative_to(HERE).with_suffix("").as_posix()
        if chosen and name not in chosen:
            continue
        sys.path.insert(0, str(path.parent))  # so that a fresh process can import what it is handed
        new_rows, new_slopes = importlib.import_module(path.stem).run()
        rows, slopes = rows + new_rows, slopes + new_slopes
    tables = harness.as_json(rows, slopes)
    print(machine(), end="\n\n")
    show(tables["rows"])
    if slopes:
        print()
        show(tables["slopes"])
    if not chosen:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        record = {"machine": machine(), "date": datetime.date.today().isoformat(), **tables}
        RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
