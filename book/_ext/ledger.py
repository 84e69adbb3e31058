"""The ledger: claims as they were measured, read from the executed labs and from recorded runs, never typed."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import registry
from cards import RegistryDirective
from docutils import nodes
from nodes_kit import box, cross_reference, facts, page, paragraph, section, span, text_with_math
from reader import CLAIM
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective, SphinxRole

HELD, DIFFERS = "held", "not reproduced here"


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, as one run measured it. The fields are among those that ``lossbook.lab.claim`` stores."""

    name: str
    statement: str
    paper: str
    measured: str
    holds: bool
    expected: str
    reason: str | None
    profile: str
    device: str

    @classmethod
    def from_payload(cls, payload: dict) -> "Claim":
        """Read a stored payload; what the ledger does not show is passed over."""
        return cls(**{name: payload.get(name) for name in cls.__dataclass_fields__})

    @property
    def outcome(self) -> str:
        """``"held"`` or ``"not reproduced here"``."""
        return HELD if self.holds else DIFFERS

    @property
    def run(self) -> str:
        """Profile and device of the run in a few words."""
        return f"{self.profile} profile, {self.device}"


def notebook_claims(path: Path) -> list[Claim]:
    """Read the claims out of an executed notebook's outputs, in their order."""
    notebook = nbformat.read(path, as_version=4)
    payloads = [
        output["data"][CLAIM]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if CLAIM in output.get("data", {})
    ]
    return [Claim.from_payload(payload) for payload in payloads]


def sources(paper: registry.Paper) -> list[Path]:
    """The files that hold a paper's claims: its lab, then its recorded runs by device."""
    recorded = sorted((paper.root / "book" / "results").glob(f"*/{paper.part}/{paper.slug}.json"))
    return ([paper.root / paper.lab] if paper.exists("lab") else []) + recorded


def read_claims(paper: registry.Paper) -> dict[str, list[Claim]]:
    """Read a paper's claims from every source.

    Returns:
        For each claim's name the runs that measured it, in the order in which the labs make them.
    """
    claims: dict[str, list[Claim]] = {}
    for source in sources(paper):
        if source.suffix == ".ipynb":
            found = notebook_claims(source)
        else:
            found = map(Claim.from_payload, json.loads(source.read_text(encoding="utf-8")))
        for claim in found:
            claims.setdefault(claim.name, []).append(claim)
    return claims


def anchor(paper: registry.Paper, name: str) -> str:
    """The ledger's anchor of a claim: ``claim-<part>-<slug>-<name>``."""
    return f"claim-{paper.part}-{paper.slug}-" + re.sub(r"[^\w-]+", "-", name)


def outcome_node(claim: Claim, content: nodes.Node | None = None) -> nodes.inline:
    """The outcome as a small mark; word and shape say it, not the color alone."""
    kind = "lossbook-held" if claim.holds else "lossbook-differs"
    return nodes.inline("", "", content or nodes.Text(claim.outcome), classes=["lossbook-outcome", kind])


def claim_row(runs: list[Claim]) -> nodes.container:
    """One claim: what it says, the paper's figure, and what each run measured."""
    first = runs[0]
    rows = [("Paper", text_with_math(first.paper))] if first.paper else []
    for claim in runs:
        measured = [*text_with_math(claim.measured), " ", span(f"({claim.run})", "lossbook-muted")]
        if len(runs) > 1:
            measured += [" ", outcome_node(claim)]
        rows.append(("Here", measured))
        if not claim.holds and claim.reason:
            rows.append(("Why", text_with_math(claim.reason)))
    return box(
        paragraph(outcome_node(first), " ", *text_with_math(first.statement), classes=["lossbook-claim-statement"]),
        facts(rows),
        classes=["lossbook-claim"],
    )


class ClaimRow(SphinxDirective):
    """``{claim-row}``: one stored claim, in a lab's page; the notebook reader writes it."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Make the row from the payload."""
        return [claim_row([Claim.from_payload(json.loads("\n".join(self.content)))])]


class Ledger(RegistryDirective):
    """``{ledger}``: every claim of every lab, paper by paper, with the counts on top."""

    def run(self) -> list[nodes.Node]:
        """Make the counts and a section for each paper that has claims."""
        self.note_registry()
        labels = self.env.get_domain("std")
        sections: list[nodes.Node] = []
        outcomes: list[bool] = []
        for paper in registry.papers(self.root):
            for source in sources(paper):
                self.env.note_dependency(str(source))
            claims = read_claims(paper)
            if not claims:
                continue
            rows = []
            for name, runs in claims.items():
                row = claim_row(runs)
                row["ids"].append(anchor(paper, name))
                labels.anonlabels[anchor(paper, name)] = (self.env.docname, anchor(paper, name))
                labels.labels[anchor(paper, name)] = (self.env.docname, anchor(paper, name), name)
                rows.append(row)
                outcomes.append(all(run.holds for run in runs))
            lab = paragraph("Measured in ", page("the lab", self.docname(paper.lab), self.env.docname), ".")
            sections.append(section(paper.title, f"ledger-{paper.part}-{paper.slug}", lab, *rows))
        total = len(list(registry.papers(self.root)))
        counts = paragraph(
            nodes.strong("", f"{len(outcomes)} claims"),
            f" from {len(sections)} of {total} papers: ",
            nodes.strong("", f"{sum(outcomes)} held"),
            f", {len(outcomes) - sum(outcomes)} not reproduced here.",
            classes=["lossbook-counts"],
        )
        return [counts, *sections]


class ClaimLink(SphinxRole):
    """``{claim}`part/slug/name` ``: a claim's outcome as a small mark that links to the ledger."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Make the link; a claim that no lab makes is an error."""
        root = Path(self.env.srcdir)
        part, slug, name = (self.text.split("/", 2) + ["", ""])[:3]
        try:
            paper = registry.find(part, slug, root)
            claims = read_claims(paper)
            if name not in claims:
                raise ValueError(f"{part}/{slug} has no claim {name!r}; its claims are {', '.join(claims) or 'none'}")
        except ValueError as error:
            return [], [self.inliner.reporter.error(f"claim: {error}", line=self.lineno)]
        for source in sources(paper):
            self.env.note_dependency(str(source))
        claim = claims[name][0]
        target = anchor(paper, name)
        mark = cross_reference(claim.outcome, domain="std", kind="ref", target=target, docname=self.env.docname)
        return [outcome_node(claim, mark)], []


def _always_read(app: Sphinx, env: BuildEnvironment, *changes: set[str]) -> Iterator[str]:
    """Read the pages again that show a folder's files, since a new file is no dependency yet."""
    return [name for name in ("book/ledger", "book/benchmarks") if name in env.found_docs]


def setup(app: Sphinx) -> None:
    """Register the directives and the role."""
    app.add_directive("claim-row", ClaimRow)
    app.add_directive("ledger", Ledger)
    app.add_role("claim", ClaimLink())
    app.connect("env-get-outdated", _always_read)
