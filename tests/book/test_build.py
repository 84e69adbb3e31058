"""The build has no warning, its links resolve, and its pages are light and self-contained."""

import re
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup

CHAPTER_LIMIT = 1_500_000


@pytest.fixture(scope="module")
def soups(built):
    return {page: BeautifulSoup((built.folder / page).read_bytes(), "html.parser") for page in built.pages}


def test_builds_without_warning(built):
    assert built.returncode == 0, built.log
    assert not re.findall(r"(?:WARNING|ERROR): .*", built.log)


def test_has_every_page_of_the_house(built):
    names = "index how-to-use notation papers ledger benchmarks instructors references hub api/index api/ops api/lab"
    assert {f"book/{name}.html" for name in names.split()} <= set(built.pages)


def test_chapters_are_light(built, soups):
    for page, soup in soups.items():
        if page.startswith("chapters/"):
            path = built.folder / page
            images = {
                (path.parent / unquote(image["src"])).resolve()
                for image in soup.find_all("img", src=True)
                if not image["src"].startswith("data:")
            }
            size = path.stat().st_size + sum(image.stat().st_size for image in images)
            assert size < CHAPTER_LIMIT, f"{page} and its images: {size} bytes"


def test_no_page_loads_from_outside(soups):
    outside = [
        f"{page}: {address}"
        for page, soup in soups.items()
        for tag in soup.find_all(["script", "img", "link", "iframe", "source"])
        if urlsplit(address := tag.get("src") or tag.get("href") or "").netloc and tag.get("rel") != ["canonical"]
    ]
    assert outside == []


def test_plotly_is_loaded_only_where_a_figure_is(soups):
    for page, soup in soups.items():
        loads = soup.find("script", src=re.compile(r"plotly\.min\.js")) is not None
        assert loads == (soup.find(class_="lossbook-figure") is not None), page


def test_internal_links_resolve(built, soups):
    anchors = {
        page: {tag["id"] for tag in soup.find_all(id=True)}
        | {tag["name"] for tag in soup.find_all("a", attrs={"name": True})}
        for page, soup in soups.items()
    }
    broken = []
    for page, soup in soups.items():
        for tag in soup.find_all("a", href=True):
            address = urlsplit(tag["href"])
            if address.scheme or address.netloc or tag["href"] == "#":
                continue
            target = (
                (built.folder / page).parent.joinpath(unquote(address.path)) if address.path else built.folder / page
            )
            target = target.resolve()
            if not target.is_file():
                broken.append(f"{page}: {tag['href']}")
                continue
            name = target.relative_to(built.folder.resolve()).as_posix()
            if name not in anchors:  # a notebook to download
                continue
            # the hub's page reads the notebook's path from its fragment
            if address.fragment and name != "book/hub.html" and unquote(address.fragment) not in anchors[name]:
                broken.append(f"{page}: {tag['href']}")
    assert broken == []


def test_every_lab_has_its_launch_buttons(built, soups):
    labs = [page for page in built.pages if page.startswith("labs/")]
    assert labs
    for page in labs:
        notebook = page.removesuffix(".html") + ".ipynb"
        addresses = [tag["href"] for tag in soups[page].select(".bd-header-article a[href]")]
        assert any(
            address.startswith("https://colab.research.google.com/") and address.endswith(notebook)
            for address in addresses
        ), page
        assert any("hub" in address and notebook in unquote(address) for address in addresses), page
        assert any(address.endswith(f"_sources/{notebook}") for address in addresses), page
        assert (built.folder / "_sources" / notebook).is_file()
