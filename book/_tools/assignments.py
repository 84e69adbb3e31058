"""Make the student's version and the autograder of each part's assignment, with Otter Assign.

From the project's root::

    python book/_tools/assignments.py [PART ...]

writes ``_build/assignments/<part>/student`` and ``_build/assignments/<part>/autograder`` for every
``labs/<part>/assignment.ipynb``. Otter runs the hidden tests on the solutions, too, and an assignment whose
solutions do not get full marks is an error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from otter.assign import main as otter_assign

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "_build/assignments"


def parts() -> list[str]:
    """The parts that have an assignment."""
    return sorted(path.parent.name for path in ROOT.glob("labs/*/assignment.ipynb"))


def build(part: str) -> Path:
    """Make both versions of one part's assignment, and run the tests on its solutions.

    Args:
        part: a part that has an assignment.

    Returns:
        The folder that holds ``student`` and ``autograder``. The autograder's zip file, for Gradescope and for
        ``otter grade``, is ``autograder/autograder.zip`` there.

    Raises:
        ValueError: if the part has no assignment.
        RuntimeError: if the solutions do not get full marks.
    """
    if part not in parts():
        raise ValueError(f"part must have an assignment: {', '.join(parts())}; got {part!r}")
    otter_assign(str(ROOT / "labs" / part / "assignment.ipynb"), str(OUT / part))
    (made,) = (OUT / part / "autograder").glob("*.zip")  # Otter puts the time into its name
    made.rename(made.with_name("autograder.zip"))
    return OUT / part


def autograder(part: str) -> Path:
    """The autograder's zip file of one part, made anew if it is missing or older than the master."""
    made, master = OUT / part / "autograder/autograder.zip", ROOT / "labs" / part / "assignment.ipynb"
    if not made.exists() or (master.exists() and made.stat().st_mtime < master.stat().st_mtime):
        build(part)
    return made


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Make student and autograder versions of the assignments.")
    parser.add_argument("part", nargs="*", help="parts to make; all that have an assignment if none is named")
    for part in parser.parse_args(arguments).part or parts():
        try:
            print(f"{part}: {build(part)}")
        except (ValueError, RuntimeError) as error:
            sys.exit(f"assignments: {part}: {error}")


if __name__ == "__main__":
    main()
