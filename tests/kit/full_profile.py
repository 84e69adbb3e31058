"""What the tests of the labs share: run a lab's `full` profile on the CPU with small sizes and handed-in data."""

import re
from pathlib import Path

import nbformat
import torch

LABS = Path(__file__).parents[2] / "labs"


def run_full(name, monkeypatch, *, until, sizes=None, change=lambda source, names: source):
    """Run the code cells of the lab `part/slug` in the profile `full` until one of them defines `until`.

    Args:
        name: the lab, `part/slug`.
        monkeypatch: the test's, for the profile and the device.
        until: a name; the cells after the one that defines it do not run.
        sizes: entries that replace those of the profile, as soon as the lab has picked it: `size = SIZES[run.profile]`.
        change: a function of a cell's source and the names so far; it may change the names, and returns what to run.

    Returns:
        The lab's names.
    """
    monkeypatch.setenv("LOSSBOOK_PROFILE", "full")
    monkeypatch.setenv("LOSSBOOK_DEVICE", "cpu")
    threads, names, picked = torch.get_num_threads(), {"__name__": "__main__", "_sizes": sizes or {}}, False
    try:
        for cell in nbformat.read(LABS / f"{name}.ipynb", as_version=4).cells:
            if cell.cell_type != "code":
                continue
            source = cell.source
            if source.startswith("import sys"):
                source = "from lossbook import lab\nrun = lab.start()"
            small = r"\g<0>\nassert size is SIZES['full']\nsize |= _sizes"
            source, found = re.subn(r"^size = SIZES\[run\.profile\]$", small, source, flags=re.M)
            picked |= bool(found)
            exec(change(source, names), names)
            if until in names:
                assert picked, "the lab must pick its sizes by `size = SIZES[run.profile]`"
                return names
    finally:
        torch.set_num_threads(threads)
    raise AssertionError(f"no cell defines {until}")
