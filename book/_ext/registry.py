"""The registry of the book: ``book/papers.yml`` as dataclasses, and everything that is made from it.

From the project's root::

    python book/_ext/registry.py write    # rewrite the table of contents, the API pages and the README's table
    python book/_ext/registry.py check    # change nothing; fail and say what disagrees with papers.yml
"""

from __future__ import annotations

import argparse
import difflib
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("chapter", "module", "lab", "tests")
BEGIN, END = "<!-- papers:begin -->", "<!-- papers:end -->"


@dataclass(frozen=True)
class Paper:
    """One paper and its four rooms. The paths of the rooms are relative to ``root``, whether they exist or not."""

    part: str
    slug: str
    title: str
    authors: tuple[str, ...]
    year: int
    venue: str
    arxiv: str
    code: str | None
    cite: str
    root: Path = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """``part/slug``."""
        return f"{self.part}/{self.slug}"

    @property
    def chapter(self) -> Path:
        """The derivation."""
        return Path("chapters", self.part, f"{self.slug}.ipynb")

    @property
    def module(self) -> Path:
        """The method."""
        return Path("src", "lossbook", self.part, f"{self.slug}.py")

    @property
    def lab(self) -> Path:
        """The experiment."""
        return Path("labs", self.part, f"{self.slug}.ipynb")

    @property
    def tests(self) -> Path:
        """The tests."""
        return Path("tests", self.part, f"test_{self.slug}.py")

    @property
    def module_name(self) -> str:
        """The module's import name, such as ``lossbook.similarity.temperature``."""
        return f"lossbook.{self.part}.{self.slug}"

    @property
    def arxiv_url(self) -> str:
        """The paper's page on arXiv."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def code_url(self) -> str | None:
        """The official repository on GitHub, if there is one."""
        return self.code and f"https://github.com/{self.code}"

    def exists(self, room: str) -> bool:
        """Say whether a room (``chapter``, ``module``, ``lab`` or ``tests``) is there."""
        if room not in ROOMS:
            raise ValueError(f"room must be one of {', '.join(ROOMS)}; got {room!r}")
        return (self.root / getattr(self, room)).is_file()

    @property
    def ready(self) -> bool:
        """Whether the chapter exists; a paper without one is in preparation."""
        return self.exists("chapter")


@dataclass(frozen=True)
class Part:
    """One part of the book, with its papers in reading order, and its pages that compare them."""

    part: str
    title: str
    papers: tuple[Paper, ...]
    pages: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Repository:
    """Where the project lives on GitHub."""

    url: str
    branch: str

    @property
    def name(self) -> str:
        """``owner/name``."""
        return self.url.removeprefix("https://github.com/")

    def colab(self, path: Path) -> str:
        """The address that opens the notebook at ``path`` (relative to the root) in Colab."""
        return f"https://colab.research.google.com/github/{self.name}/blob/{self.branch}/{path.as_posix()}"


@functools.cache
def load(root: Path = ROOT) -> tuple[Part, ...]:
    """Read ``book/papers.yml``.

    Args:
        root: the project's root.

    Returns:
        The parts in reading order. Read once per process and root.
    """
    entries = yaml.safe_load((root / "book/papers.yml").read_text(encoding="utf-8"))
    return tuple(
        Part(
            entry["part"],
            entry["title"],
            tuple(
                Paper(**{**paper, "part": entry["part"], "authors": tuple(paper["authors"]), "root": root})
                for paper in entry["papers"]
            ),
            tuple(Path("chapters", entry["part"], f"{page}.ipynb") for page in entry.get("pages", ())),
        )
        for entry in entries
    )


def papers(root: Path = ROOT) -> Iterator[Paper]:
    """Iterate over all papers in reading order."""
    return (paper for part in load(root) for paper in part.papers)


def find(part: str, slug: str, root: Path = ROOT) -> Paper:
    """Return one paper.

    Raises:
        ValueError: if papers.yml has no such part, or no such slug in it; the message lists those it has.
    """
    parts = {entry.part: entry for entry in load(root)}
    if part not in parts:
        raise ValueError(f"book/papers.yml has no part {part!r}; its parts are {', '.join(parts)}")
    slugs = {paper.slug: paper for paper in parts[part].papers}
    if slug not in slugs:
        raise ValueError(f"part {part!r} has no slug {slug!r}; its slugs are {', '.join(slugs)}")
    return slugs[slug]


def repository(root: Path = ROOT) -> Repository:
    """Read the repository's address and branch from ``_config.yml``, the one place where they stand."""
    entry = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]
    return Repository(entry["url"].rstrip("/"), entry["branch"])


def _toc(root: Path) -> str:
    def document(path: str | Path) -> dict:
        return {"file": Path(path).with_suffix("").as_posix()}

    def chapter(paper: Paper) -> dict:
        sections = {"sections": [document(paper.lab)]} if paper.exists("lab") else {}
        return document(paper.chapter) | sections

    groups = [{"caption": "Start here", "chapters": [document("book/how-to-use"), document("book/notation")]}]
    for part in load(root):
        if ready := [chapter(paper) for paper in part.papers if paper.ready]:
            ready += [document(page) for page in part.pages if (root / page).is_file()]
            groups.append({"caption": part.title, "numbered": 1, "chapters": ready})  # Theorem 3.1 is of chapter 3
    course = [document(f"book/{page}") for page in ("papers", "ledger", "benchmarks", "instructors")]
    groups.append({"caption": "The course", "chapters": course})
    api = ["ops", "lab"] + [part.part for part in load(root) if any(paper.exists("module") for paper in part.papers)]
    reference = [
        document("book/api/index") | {"sections": [document(f"book/api/{page}") for page in api]},
        document("book/hub"),
        document("book/references"),
    ]
    groups.append({"caption": "Reference", "chapters": reference})
    toc = {"format": "jb-book", "root": "book/index", "parts": groups}
    header = "# Made from book/papers.yml by `python book/_ext/registry.py write`.\n"
    return header + yaml.safe_dump(toc, sort_keys=False, allow_unicode=True, width=120)


def _api_page(part: Part) -> str:
    lines = [f"# {part.title}"]
    for paper in part.papers:
        if paper.exists("module"):
            lines += ["", f"## `{paper.module_name}`", ""]
            if paper.ready:
                lines += [f"Derived in {{doc}}`/{paper.chapter.with_suffix('').as_posix()}`.", ""]
            lines += ["```{eval-rst}", f".. automodule:: {paper.module_name}", "   :members:", "```"]
    if missing := [f"`{paper.slug}`" for paper in part.papers if not paper.exists("module")]:
        lines += ["", f"In preparation: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _readme_table(root: Path) -> str:
    lines = ["| paper | slug | rooms |", "| --- | --- | --- |"]
    for part in load(root):
        lines.append(f"| **{part.title}** | `{part.part}` | |")
        for paper in part.papers:
            links = [f"[{room}]({getattr(paper, room).as_posix()})" for room in ROOMS[:3] if paper.exists(room)]
            rooms = " · ".join(links) or "in preparation"
            lines.append(f"| [{paper.title}]({paper.arxiv_url}) | `{paper.slug}` | {rooms} |")
    return "\n".join(lines)


def _readme(root: Path) -> str:
    path = root / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n## The papers\n\n{BEGIN}\n{END}\n".lstrip()
    before, rest = text.split(BEGIN, 1)
    if END not in rest:
        raise ValueError(f"README.md has {BEGIN} without {END} after it")
    return f"{before}{BEGIN}\n{_readme_table(root)}\n{END}{rest.split(END, 1)[1]}"


def generated(root: Path = ROOT) -> dict[Path, str]:
    """Make everything that is made from papers.yml and the rooms that exist.

    Args:
        root: the project's root.

    Returns:
        The text of each file, by its path relative to the root.

    Raises:
        ValueError: if README.md has the opening marker of the table and not the closing one.
    """
    texts = {Path("_toc.yml"): _toc(root)}
    for part in load(root):
        if any(paper.exists("module") for paper in part.papers):
            texts[Path("book", "api", f"{part.part}.md")] = _api_page(part)
    texts[Path("README.md")] = _readme(root)
    return texts


def differences(root: Path = ROOT) -> dict[Path, str]:
    """Return, for each file that is not as papers.yml has it, the lines that differ (``-`` stored, ``+`` wanted)."""
    found = {}
    for path, wanted in generated(root).items():
        stored = (root / path).read_text(encoding="utf-8") if (root / path).exists() else ""
        if stored != wanted:
            diff = list(difflib.unified_diff(stored.splitlines(), wanted.splitlines(), lineterm="", n=0))
            found[path] = "\n".join(line for line in diff[2:] if not line.startswith("@@"))
    return found


def write(root: Path = ROOT) -> list[Path]:
    """Write each file that is not as papers.yml has it, and return their paths relative to the root."""
    texts = generated(root)
    found = list(differences(root))
    for path in found:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(texts[path], encoding="utf-8")
    return found


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description="Write or check what is made from book/papers.yml.")
    parser.add_argument("command", choices=["write", "check"])
    if parser.parse_args(arguments).command == "write":
        for path in write(root):
            print(f"wrote {path}")
        return 0
    found = differences(root)
    for path, lines in found.items():
        print(f"{path} disagrees with book/papers.yml:\n{lines}\n", file=sys.stderr)
    if found:
        print("Run: python book/_ext/registry.py write", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
