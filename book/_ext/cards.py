"""What the book shows of its registry: a paper's card, the parts, and all papers."""

from pathlib import Path

import registry
from docutils import nodes
from launch import source_address
from nodes_kit import box, cross_reference, joined, link, page, paragraph, section, span
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class RegistryDirective(SphinxDirective):
    """A directive that reads the registry; its page is read again when the registry or the contents change."""

    @property
    def root(self) -> Path:
        """The project's root."""
        return Path(self.env.srcdir)

    def note_registry(self) -> None:
        """Tell Sphinx what this page depends on. The table of contents changes whenever a paper becomes ready."""
        for name in ("book/papers.yml", "_toc.yml"):
            self.env.note_dependency(str(self.root / name))

    def docname(self, path: Path) -> str:
        """The name under which Sphinx knows a notebook."""
        return path.with_suffix("").as_posix()


class PaperCard(RegistryDirective):
    """``{paper-card} part/slug``: the paper, and the doors to its other rooms."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Make the card."""
        self.note_registry()
        part, _, slug = self.arguments[0].partition("/")
        try:
            paper = registry.find(part, slug, self.root)
        except ValueError as error:
            raise self.error(f"paper-card: {error}") from error
        title = paragraph(link(paper.title, paper.arxiv_url), classes=["lossbook-card-title"])
        source, _ = self.parse_inline(f"{', '.join(paper.authors)}. {paper.venue} {paper.year}. {{cite}}`{paper.cite}`")
        repository = registry.repository(self.root)
        doors = [link(f"arXiv:{paper.arxiv}", paper.arxiv_url)]
        if paper.code_url:
            doors.append(link("official code", paper.code_url))
        if paper.exists("module"):
            xref = cross_reference(
                "module", domain="py", kind="mod", target=paper.module_name, docname=self.env.docname
            )
            doors.append(xref)
        if paper.exists("lab"):
            doors.append(page("lab", self.docname(paper.lab), self.env.docname))
        if paper.exists("tests"):
            doors.append(link("tests", source_address(self.root, paper.tests)))
        if paper.exists("lab"):
            doors.append(link("Run the lab in Colab", repository.colab(paper.lab), "lossbook-button"))
        return [
            box(
                title,
                paragraph(*source, classes=["lossbook-card-source"]),
                paragraph(*joined(doors), classes=["lossbook-card-doors"]),
                classes=["lossbook-card"],
            )
        ]


class PaperList(RegistryDirective):
    """``{paper-list}``: all parts and papers; a paper that is ready leads to its chapter and lab."""

    def run(self) -> list[nodes.Node]:
        """Make one section a part."""
        self.note_registry()
        return [section(part.title, part.part, self._papers(part)) for part in registry.load(self.root)]

    def _papers(self, part: registry.Part) -> nodes.bullet_list:
        items = [nodes.list_item("", *self._paper(paper)) for paper in part.papers]
        return nodes.bullet_list("", *items, classes=["lossbook-papers"])

    def _paper(self, paper: registry.Paper) -> list[nodes.Node]:
        docname = self.env.docname
        many = len(paper.authors) > 2
        authors = f"{paper.authors[0]} et al." if many else " and ".join(paper.authors)
        source = span(f"{authors}, {paper.venue} {paper.year}", "lossbook-muted")
        doors: list[nodes.Node] = [link(f"arXiv:{paper.arxiv}", paper.arxiv_url)]
        if paper.ready:
            title: nodes.Node = page(paper.title, self.docname(paper.chapter), docname)
            if paper.exists("lab"):
                doors.append(page("lab", self.docname(paper.lab), docname))
        else:
            title = nodes.Text(paper.title)
            doors.append(span("in preparation", "lossbook-muted"))
        return [paragraph(title), paragraph(*joined([source, *doors]), classes=["lossbook-papers-state"])]


class PartList(RegistryDirective):
    """``{part-list}``: the parts in short, each leading to its papers."""

    def run(self) -> list[nodes.Node]:
        """Make one line a part."""
        self.note_registry()
        items = []
        for part in registry.load(self.root):
            name, _, about = part.title.partition(": ")
            ready = sum(paper.ready for paper in part.papers)
            count = span(f"{len(part.papers)} papers" + (f", {ready} ready" if ready else ""), "lossbook-muted")
            name_link = link(name, f"papers.html#{part.part}")
            about_line = paragraph(about, classes=["lossbook-parts-about"])
            items.append(nodes.list_item("", paragraph(name_link, " ", count), about_line))
        return [nodes.bullet_list("", *items, classes=["lossbook-parts"])]


def setup(app: Sphinx) -> None:
    """Register the directives."""
    app.add_directive("paper-card", PaperCard)
    app.add_directive("paper-list", PaperList)
    app.add_directive("part-list", PartList)
