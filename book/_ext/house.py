"""The book's own Sphinx extension: figures, launch buttons, cards, ledger, benchmark tables, and the home page's figure."""

import zlib
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

PIECES = ("figures", "launch", "cards", "ledger", "bench_tables", "front")


def _forget_failed_build(app: Sphinx, exception: Exception | None) -> None:
    """After a build with warnings, read every page next time: pages that are not read again would not warn again."""
    if exception or app._warncount:
        Path(app.doctreedir, "environment.pickle").unlink(missing_ok=True)


def _write_all_when_contents_change(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Every page shows the table of contents, so a new page or title is written into all of them."""
    toc = Path(app.srcdir, "_toc.yml").read_text(encoding="utf-8")
    contents = (toc, {name: title.astext() for name, title in env.titles.items()})
    changed = getattr(env, "lossbook_contents", contents) != contents
    env.lossbook_contents = contents
    return sorted(env.found_docs) if changed else []


def setup(app: Sphinx) -> dict:
    """Set up every piece."""
    for piece in PIECES:
        app.setup_extension(piece)
    app.connect("env-updated", _write_all_when_contents_change)
    app.connect("build-finished", _forget_failed_build)
    # a changed extension reads every page again
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return {"version": "1", "env_version": zlib.crc32(sources), "parallel_read_safe": True}
