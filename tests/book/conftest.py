"""The book, built as `make book` builds it, served on localhost, and a Chromium to look at it."""

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@dataclass(frozen=True)
class Built:
    """A build of the book: where it is, and what jupyter-book said."""

    folder: Path
    returncode: int
    log: str

    @property
    def pages(self) -> list[str]:
        """Every page that a reader can open, by its path from the root."""
        index = (self.folder / "searchindex.js").read_text(encoding="utf-8")
        names = json.loads(index.removeprefix("Search.setIndex(").removesuffix(")"))["docnames"]
        return [f"{name}.html" for name in names] + ["genindex.html", "py-modindex.html", "search.html"]


@pytest.fixture(scope="session")
def built() -> Built:
    """Build the book; what is up to date is not built again."""
    tool = Path(sysconfig.get_path("scripts")) / "jupyter-book"
    command = [str(tool), "build", ".", "-W", "--keep-going", "-n"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return Built(ROOT / "_build" / "html", done.returncode, done.stdout)


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Say nothing about single requests."""


@pytest.fixture(scope="session")
def site(built: Built):
    """The address of the built book on localhost."""
    assert built.returncode == 0, "the book does not build; test_build says why"
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_QuietHandler, directory=str(built.folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="session")
def chromium():
    """A function that starts a headless Chromium; a thread needs one of its own.

    Without one installed the browser tests are skipped, except in CI, where they fail.
    """
    executable = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if executable is None:
        message = "No Chromium found: install it (Debian: apt-get install chromium) or name it in CHROMIUM."
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    @contextlib.contextmanager
    def start():
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
            yield browser
            browser.close()

    return start


@pytest.fixture(scope="session")
def browser(chromium):
    """The Chromium of the tests that open single pages."""
    with chromium() as browser:
        yield browser
