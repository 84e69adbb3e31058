"""Run the benchmarks and print their tables; `--keep` keeps them for the book, one record a file.

`make bench` runs all and keeps them; `python tests/benchmarks/run.py similarity/bench_temperature` runs one file.
"""

import argparse
import datetime
import importlib
import json
import platform
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "book" / "benchmarks"


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


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Time the modules against their peers.")
    parser.add_argument("file", nargs="*", help="a file without its ending, such as similarity/bench_temperature")
    parser.add_argument("--keep", action="store_true", help="keep the tables for the book")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(HERE))
    harness = importlib.import_module("harness")
    files = {path.relative_to(HERE).with_suffix("").as_posix(): path for path in sorted(HERE.glob("*/bench_*.py"))}
    if unknown := [name for name in options.file if name not in files]:
        parser.error(f"no such file: {', '.join(unknown)}; there are {', '.join(files)}")
    print(machine())
    for name in options.file or files:
        sys.path.insert(0, str(files[name].parent))  # so that a fresh process can import what it is handed
        tables = harness.as_json(*importlib.import_module(files[name].stem).run())
        print(f"\n{name}")
        show(tables["rows"])
        if tables["slopes"]:
            show(tables["slopes"])
        sys.stdout.flush()
        if options.keep:
            path = RESULTS / f"{name.replace('bench_', '')}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            record = {"machine": machine(), "date": datetime.date.today().isoformat(), **tables}
            path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
