"""``{literalinclude}`` of a function shows its code without the docstring, which the API page has in a better form."""

import ast

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.directives.code import LiteralInclude


def without_docstring(source: str) -> str:
    """The source of one function or class without its docstring; any other text as it is."""
    try:
        definition = ast.parse(source).body[0]
    except (SyntaxError, IndexError):
        return source
    if not isinstance(definition, ast.FunctionDef | ast.ClassDef) or ast.get_docstring(definition) is None:
        return source
    docstring, lines = definition.body[0], source.splitlines(keepends=True)
    return "".join(lines[: docstring.lineno - 1] + lines[docstring.end_lineno :])


class Listing(LiteralInclude):
    """Sphinx's directive; with ``:pyobject:`` the docstring is left out."""

    def run(self) -> list[nodes.Node]:
        """Include the file."""
        found = super().run()
        for block in (
            block for node in found for block in node.findall(nodes.literal_block) if "pyobject" in self.options
        ):
            text = without_docstring(block.astext())
            block.rawsource = text
            block.children = []
            block += nodes.Text(text)
        return found


def setup(app: Sphinx) -> None:
    """Take the place of Sphinx's directive."""
    app.add_directive("literalinclude", Listing, override=True)
