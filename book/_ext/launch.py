"""Where a notebook comes alive: buttons that open it in Colab or a JupyterHub or download it,
links to the repository's files, and the hub's page.
"""

from pathlib import Path
from urllib.parse import urlencode

import registry
from docutils import nodes
from nodes_kit import link
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.docutils import SphinxDirective, SphinxRole

LAUNCH_NAMES = {"colab": "Open in Colab", "jupyterhub": "Open in JupyterHub", "download": "Download"}


def configured_hub(config: Config) -> str:
    """The address of the JupyterHub that ``_config.yml`` names, or an empty string."""
    return config.html_theme_options.get("launch_buttons", {}).get("jupyterhub_url", "").rstrip("/")


def launch_address(config: Config, root: Path, docname: str, where: str) -> str:
    """Where a launch button of a notebook's page leads.

    Args:
        config: the book's configuration; its launch buttons may name a JupyterHub.
        root: the project's root.
        docname: the notebook's path from the root, without suffix.
        where: ``"colab"``, ``"jupyterhub"`` or ``"download"``.

    Returns:
        An address; a JupyterHub that is not configured leads to the page that asks for it.

    Raises:
        ValueError: if ``where`` is none of the three.
    """
    repository = registry.repository(root)
    up = "../" * docname.count("/")
    path = Path(f"{docname}.ipynb")
    if where == "colab":
        return repository.colab(path)
    if where == "download":
        return f"{up}_sources/{path.as_posix()}"
    if where == "jupyterhub":
        hub = configured_hub(config)
        if not hub:
            return f"{up}book/hub.html#{path.as_posix()}"
        urlpath = f"lab/tree/{repository.name.split('/')[-1]}/{path.as_posix()}"
        query = urlencode({"repo": repository.url, "branch": repository.branch, "urlpath": urlpath})
        return f"{hub}/hub/user-redirect/git-pull?{query}"
    raise ValueError(f"where must be one of {', '.join(LAUNCH_NAMES)}; got {where!r}")


class Launch(SphinxRole):
    """``{launch}`colab` ``: a button that opens this page's notebook in Colab or a JupyterHub, or downloads it."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Make the button."""
        try:
            address = launch_address(self.config, Path(self.env.srcdir), self.env.docname, self.text)
        except ValueError as error:
            message = self.inliner.reporter.error(f"launch: {error}", line=self.lineno)
            return [], [message]
        return [link(LAUNCH_NAMES[self.text], address, "lossbook-button")], []


def source_address(root: Path, path: Path) -> str:
    """Where a file of the repository can be read on GitHub."""
    repository = registry.repository(root)
    return f"{repository.url}/blob/{repository.branch}/{path.as_posix()}"


class Source(SphinxRole):
    """``{source}`path` ``: a link to a file of the repository; one that is not there is an error."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Make the link."""
        root = Path(self.env.srcdir)
        if not (root / self.text).exists():
            return [], [self.inliner.reporter.error(f"source: no file {self.text!r}", line=self.lineno)]
        address = source_address(root, Path(self.text))
        return [nodes.reference("", "", nodes.literal("", self.text), refuri=address)], []


class HubForm(SphinxDirective):
    """``{hub-form}``: asks for the address of a JupyterHub and makes the link; ``hub.js`` fills it in."""

    def run(self) -> list[nodes.Node]:
        """Make the form, which names the repository and branch to pull."""
        root = Path(self.env.srcdir)
        self.env.note_dependency(str(root / "_config.yml"))
        repository = registry.repository(root)
        form = (
            f'<form class="lossbook-hub" data-repository="{repository.url}" data-branch="{repository.branch}">'
            '<label for="lossbook-hub-address">Address of your JupyterHub</label>'
            '<input id="lossbook-hub-address" type="url" required placeholder="https://hub.example.edu">'
            '<label for="lossbook-hub-path">Notebook</label>'
            '<input id="lossbook-hub-path" type="text" value="labs">'
            '<button class="lossbook-button" type="submit">Open in JupyterHub</button>'
            '<output for="lossbook-hub-address lossbook-hub-path"></output></form>'
        )
        return [nodes.raw("", form, format="html")]


def _add_jupyterhub_button(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object) -> None:
    """Give a lab's launch menu a JupyterHub entry where the theme has none, since no hub is configured."""
    if not pagename.startswith("labs/") or configured_hub(app.config):
        return
    for group in context.get("header_buttons", []):
        if group.get("label") == "launch-buttons":
            group["buttons"].append(
                {
                    "type": "link",
                    "text": "JupyterHub",
                    "tooltip": "Launch on JupyterHub",
                    "icon": "_static/images/logo_jupyterhub.svg",
                    "url": launch_address(app.config, Path(app.srcdir), pagename, "jupyterhub"),
                }
            )


def _add_hub_script(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object) -> None:
    """Load the form's script on its own page only."""
    if 'class="lossbook-hub"' in context.get("body", ""):
        app.add_js_file("hub.js", loading_method="defer")


def setup(app: Sphinx) -> None:
    """Register the roles and the form, and add the button and the form's script."""
    app.add_role("launch", Launch())
    app.add_role("source", Source())
    app.add_directive("hub-form", HubForm)
    app.connect("html-page-context", _add_jupyterhub_button, priority=600)  # after the theme's own
    app.connect("html-page-context", _add_hub_script)
