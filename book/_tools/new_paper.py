"""Create the four rooms of one paper from templates: its chapter, module, lab and tests.

The first paper of a part brings the part's package and the beginning of its assignment, too.

From the project's root::

    python book/_tools/new_paper.py PART SLUG
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from string import Template

import jupytext
import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_ext"))
import registry

TEMPLATES = Path(__file__).parent / "templates"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def lab_setup(root: Path = registry.ROOT) -> str:
    """Return the source of the set-up cell that every lab has, with the repository's address filled in."""
    text = (TEMPLATES / "lab_setup.py").read_text(encoding="utf-8").rstrip("\n")
    return Template(text).substitute(repository=registry.repository(root).url)


def _fill(template: str, paper: registry.Paper) -> str:
    authors = ", ".join(paper.authors)
    rooms = f"Chapter: {paper.chapter.as_posix()}; lab: {paper.lab.as_posix()}; tests: {paper.tests.as_posix()}."
    return Template((TEMPLATES / template).read_text(encoding="utf-8")).substitute(
        title=paper.title,
        name=paper.name,
        module_name=paper.module_name,
        summary=textwrap.fill(paper.title, 117),
        source=textwrap.fill(f"{authors}, {paper.venue} {paper.year}, arXiv:{paper.arxiv}. {rooms}", 117),
        colab=registry.repository(paper.root).colab(paper.lab),
        setup=lab_setup(paper.root),
    )


def _assignment(part: str, root: Path) -> str:
    template = Template((TEMPLATES / "assignment.md").read_text(encoding="utf-8"))
    colab = registry.repository(root).colab(Path("labs", part, "assignment.ipynb"))
    return _notebook(template.substitute(part=part, colab=colab))


def _notebook(text: str) -> str:
    notebook = jupytext.reads(text, fmt="md:myst")
    notebook.metadata = METADATA
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def create(part: str, slug: str, root: Path = registry.ROOT) -> list[Path]:
    """Create the four rooms of a paper, and the part's package and assignment where they are missing; remake the lists.

    Args:
        part: a part of ``book/papers.yml``.
        slug: a slug of that part.
        root: the project's root.

    Returns:
        The paths of the four rooms, relative to the root.

    Raises:
        ValueError: if papers.yml has no such paper.
        FileExistsError: if one of the rooms exists; nothing is written then.
    """
    paper = registry.find(part, slug, root)
    if taken := [getattr(paper, room).as_posix() for room in registry.ROOMS if paper.exists(room)]:
        raise FileExistsError(f"{', '.join(taken)} exists already; nothing was written")
    texts = {
        paper.chapter: _notebook(_fill("chapter.md", paper)),
        paper.module: _fill("module.py", paper),
        paper.lab: _notebook(_fill("lab.md", paper)),
        paper.tests: _fill("tests.py", paper),
    }
    for path, text in texts.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    package = root / paper.module.parent / "__init__.py"
    if not package.exists():
        title = next(entry.title for entry in registry.load(root) if entry.part == part)
        package.write_text(f'"""{title}."""\n', encoding="utf-8")
    assignment = root / paper.lab.parent / "assignment.ipynb"
    if not assignment.exists():
        assignment.write_text(_assignment(part, root), encoding="utf-8")
    registry.write(root)
    return list(texts)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Create the four rooms of one paper from templates.")
    parser.add_argument("part", help="a part of book/papers.yml")
    parser.add_argument("slug", help="a slug of that part")
    options = parser.parse_args(arguments)
    try:
        rooms = create(options.part, options.slug)
    except (ValueError, FileExistsError) as error:
        sys.exit(f"new_paper: {error}")
    for path in rooms:
        print(f"created {path}")


if __name__ == "__main__":
    main()
