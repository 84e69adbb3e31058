"""Run notebooks and store what they printed, in the one form that is committed.

From the project's root::

    python book/_tools/run_notebook.py chapters/similarity/temperature.ipynb
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from new_paper import METADATA


def run(path: Path) -> float:
    """Run the notebook in its own folder, store outputs and widget state, and return the seconds it took."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": path.parent}},
        record_timing=False,
        coalesce_streams=True,  # what a slow cell prints in several messages is one output
    )
    start = time.perf_counter()
    client.execute()
    seconds = time.perf_counter() - start
    widgets = notebook.metadata.get("widgets")
    notebook.metadata = METADATA | ({"widgets": widgets} if widgets else {})
    nbformat.write(notebook, path)
    return seconds


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: run_notebook.py NOTEBOOK ...")
    for name in sys.argv[1:]:
        print(f"{name}: {run(Path(name)):.1f} s")
