"""Test what changed since HEAD, and nothing else: `make check`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def changed() -> list[Path]:
    """Paths that differ from HEAD or are new, relative to the root; deleted ones left out."""
    commands = (["git", "diff", "--name-only", "HEAD"], ["git", "ls-files", "--others", "--exclude-standard"])
    names = [
        subprocess.run(c, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n") for c in commands
    ]
    return sorted({Path(name) for name in sum(names, []) if name and (ROOT / name).exists()})


def plan(paths: list[Path]) -> list[list[str]]:
    """The commands that test these paths; a module brings its test file, shared code brings its folder of tests."""
    python, tests, notebooks = [], set(), []
    for path in paths:
        parts = path.parts
        if path.suffix == ".py" and path.name != "lab_setup.py":
            python.append(str(path))
        if path.suffix == ".ipynb" and parts[0] in ("chapters", "labs"):
            notebooks.append(str(path))
        if parts[:2] == ("src", "lossbook") and path.suffix == ".py":
            tests.add(str(path))  # its doctests
            own = ROOT / "tests" / parts[2] / f"test_{path.stem}.py"
            folder = ROOT / "tests" / parts[2]
            tests.update(str(p.relative_to(ROOT)) for p in [own if own.exists() else folder] if p.exists())
        elif parts[0] == "tests" and path.name.startswith("test_") and parts[1] != "benchmarks":
            tests.add(str(path))
        elif parts[0] == "book":
            tests.update(("tests/book/test_registry.py", "tests/book/test_ext.py"))
            if path.name in ("assignments.py", "grade.py", "sandbox.py"):
                tests.add("tests/assignments")
    module = [sys.executable, "-m"]
    commands = [
        (python, [*module, "ruff", "check", *python]),
        (python, [*module, "ruff", "format", "--check", *python]),
        (tests, [*module, "pytest", "-q", "--doctest-modules", *sorted(tests)]),
        (notebooks, [*module, "pytest", "-q", "--nbval-lax", "--nbval-cell-timeout", "300", *notebooks]),
    ]
    return [command for needed, command in commands if needed]


def main() -> int:
    """Run the plan; the number of commands that failed."""
    commands = plan(changed())
    if not commands:
        print("Nothing that has a test changed since HEAD.")
    return sum(subprocess.run(command, cwd=ROOT).returncode != 0 for command in commands)


if __name__ == "__main__":
    sys.exit(main())
