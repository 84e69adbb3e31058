"""Small makers of docutils nodes that the book's directives share."""

import re
from collections.abc import Iterable, Sequence

from docutils import nodes
from sphinx import addnodes


def box(*children: nodes.Node, classes: Sequence[str] = ()) -> nodes.container:
    """A ``<div>`` with these classes around these children."""
    return nodes.container("", *children, classes=list(classes), is_div=True)


def paragraph(*children: nodes.Node | str, classes: Sequence[str] = ()) -> nodes.paragraph:
    """A paragraph; strings become text."""
    return nodes.paragraph("", "", *map(as_node, children), classes=list(classes))


def as_node(child: nodes.Node | str) -> nodes.Node:
    """Text for a string, the node itself otherwise."""
    return nodes.Text(child) if isinstance(child, str) else child


def text_with_math(text: object) -> list[nodes.Node]:
    """Text in which ``$...$`` is mathematics, and nothing else is markup."""
    pieces = re.split(r"\$([^$]+)\$", str(text))
    return [nodes.math("", piece) if i % 2 else nodes.Text(piece) for i, piece in enumerate(pieces) if piece]


def span(text: str, *classes: str) -> nodes.inline:
    """A ``<span>`` with these classes."""
    return nodes.inline("", text, classes=list(classes))


def link(text: str, address: str, *classes: str) -> nodes.reference:
    """A link to an address."""
    return nodes.reference("", "", nodes.Text(text), refuri=address, classes=list(classes))


def cross_reference(text: str, *, domain: str, kind: str, target: str, docname: str) -> addnodes.pending_xref:
    """A link that Sphinx resolves, and warns of when its target is missing."""
    return addnodes.pending_xref(
        "",
        nodes.inline("", text),
        refdomain=domain,
        reftype=kind,
        reftarget=target,
        refexplicit=True,
        refwarn=True,
        refdoc=docname,
    )


def page(text: str, target: str, docname: str) -> addnodes.pending_xref:
    """A link to another page of the book, by its path from the root."""
    return cross_reference(text, domain="std", kind="doc", target=f"/{target}", docname=docname)


def joined(parts: Iterable[nodes.Node | str], separator: str = " · ") -> list[nodes.Node | str]:
    """The parts with a separator between each two."""
    result: list[nodes.Node | str] = []
    for part in parts:
        result += [separator, part] if result else [part]
    return result


def facts(pairs: Iterable[tuple[str, Sequence[nodes.Node | str]]]) -> nodes.definition_list:
    """A list of named facts."""
    items = [
        nodes.definition_list_item("", nodes.term("", name), nodes.definition("", paragraph(*value)))
        for name, value in pairs
    ]
    return nodes.definition_list("", *items, classes=["lossbook-facts"])


def section(title: str, anchor: str, *children: nodes.Node) -> nodes.section:
    """A section with its own anchor, which the page's contents list shows."""
    return nodes.section("", nodes.title("", title), *children, ids=[anchor], names=[anchor])


def table(header: Sequence[str], rows: Iterable[Sequence[nodes.Node | str]]) -> nodes.table:
    """A table with one header row; strings become text."""

    def row(cells: Sequence[nodes.Node | str]) -> nodes.row:
        return nodes.row("", *(nodes.entry("", paragraph(cell)) for cell in cells))

    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in header), cols=len(header))
    group += nodes.thead("", row(header))
    group += nodes.tbody("", *map(row, rows))
    return nodes.table("", group, classes=["lossbook-table"])
