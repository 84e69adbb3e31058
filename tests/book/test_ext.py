"""The notebook reader and the directives, on inputs small enough to read."""

import json
import re

import listing
import nbformat
import pytest
from bs4 import BeautifulSoup
from docutils import nodes
from figures import DEFAULT_HEIGHT, MIMETYPE, figure_html, figure_title
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from reader import CLAIM, WIDGET_STATE, WIDGET_VIEW, read_notebook
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

STEPS = [{"label": text, "method": "animate", "args": [[str(i)], {"mode": "immediate"}]} for i, text in enumerate("ab")]
FIGURE = {
    "data": [{"type": "bar", "y": [1, 2], "text": "</script>"}],
    "layout": {
        "title": {"text": "Share of <b>push</b>"},
        "width": 900,
        "sliders": [{"active": 1, "currentvalue": {"prefix": "τ = ", "suffix": " nats"}, "steps": STEPS}],
        "updatemenus": [{"type": "buttons", "buttons": [{"label": "Play", "method": "animate", "args": [None, {}]}]}],
    },
    "frames": [{"name": "0", "data": []}, {"name": "1", "data": []}],
}
PAYLOAD = {
    "name": "tolerance-grows",
    "statement": r"Tolerance grows with $\tau$, if <0.5.",
    "paper": "figure 5",
    "measured": "0.43 ± 0.02",
    "holds": True,
    "expected": "holds",
    "reason": None,
    "profile": "quick",
    "device": "cpu",
    "seed": 0,
}
DIFFERS = PAYLOAD | {"name": "best", "holds": False, "expected": "differs", "reason": "The data set is too easy."}


def read(*cells, **metadata) -> nbformat.NotebookNode:
    return read_notebook(nbformat.writes(new_notebook(cells=list(cells), metadata=metadata)))


def read_output(data: dict, models: dict | None = None) -> list[dict]:
    widgets = {WIDGET_STATE: {"state": models or {}, "version_major": 2, "version_minor": 0}}
    notebook = read(new_code_cell("x", outputs=[new_output("display_data", data)]), widgets=widgets)
    assert "widgets" not in notebook.metadata
    return [output["data"] for output in notebook.cells[0].outputs]


def model(name: str, **state) -> dict:
    return {"model_name": f"{name}Model", "model_module": "@jupyter-widgets/controls", "state": state}


# figures


def test_figure_is_stored_whole_and_cannot_end_its_script():
    soup = BeautifulSoup(figure_html(FIGURE), "html.parser")
    stored = json.loads(soup.script.string)
    assert stored["data"] == FIGURE["data"]
    assert stored["frames"] == FIGURE["frames"]
    assert stored["layout"]["autosize"] and "width" not in stored["layout"]
    assert stored["controls"] == [FIGURE["layout"]["updatemenus"][0]["buttons"], STEPS]
    plot = soup.find(class_="lossbook-plot")
    assert (plot["role"], plot["aria-label"]) == ("img", "Share of push")
    assert plot["style"] == f"min-height:{DEFAULT_HEIGHT}px"


def test_title_stands_above_the_plot_unless_the_figure_changes_it():
    captioned = BeautifulSoup(figure_html(FIGURE), "html.parser")
    assert captioned.find("p").string == "Share of push"
    assert "title" not in json.loads(captioned.script.string)["layout"]
    changing = FIGURE | {"frames": [{"name": "0", "data": [], "layout": {"title": "Frame"}}]}
    soup = BeautifulSoup(figure_html(changing), "html.parser")
    assert soup.find("p") is None
    assert json.loads(soup.script.string)["layout"]["title"] == FIGURE["layout"]["title"]


def test_controls_of_a_figure_become_the_browsers_own():
    soup = BeautifulSoup(figure_html(FIGURE), "html.parser")
    slider = soup.find("input")
    assert (slider["type"], slider["min"], slider["max"], slider["value"]) == ("range", "0", "1", "1")
    assert soup.find("label").get_text(" ") == "τ = b nats"
    assert [button.string for button in soup.find_all("button")] == ["Play"]
    menu = {"active": 1, "buttons": [{"label": "x"}, {"label": "y"}]}
    select = BeautifulSoup(figure_html({"layout": {"updatemenus": [menu]}}), "html.parser").find("select")
    assert select.find("option", selected=True).string == "y"


def test_table_becomes_a_table_of_the_page():
    stored = {"dtype": "f8", "bdata": "AAAAAAAA8D8AAAAAAAAEQA=="}
    trace = {"type": "table", "header": {"values": ["<b>loss</b>", "k"]}, "cells": {"values": [["a < b", 0], stored]}}
    soup = BeautifulSoup(figure_html({"data": [trace], "layout": {"title": "Measures"}}), "html.parser")
    assert soup.caption.string == "Measures"
    rows = [[cell.string for cell in row.find_all(["th", "td"])] for row in soup.find_all("tr")]
    assert rows == [["loss", "k"], ["a < b", "1.0"], ["0", "2.5"]]


@pytest.mark.parametrize(
    ("layout", "title"),
    [
        ({"title": "Plain"}, "Plain"),
        ({"xaxis": {"title": {"text": "τ"}}, "yaxis": {"title": "loss"}}, "loss against τ"),
        ({}, "Figure"),
    ],
)
def test_figure_has_a_name(layout, title):
    assert figure_title(layout) == title


def test_reader_draws_a_plotly_output_and_drops_its_other_forms():
    (data,) = read_output({MIMETYPE: FIGURE, "text/html": "<div>heavy</div>", "text/plain": "Figure()"})
    assert list(data) == ["text/html"]
    assert "lossbook-figure" in data["text/html"] and "heavy" not in data["text/html"]


def test_reader_leaves_other_outputs_alone():
    assert read_output({"text/plain": "1.0"}) == [{"text/plain": "1.0"}]


# widgets


def test_widget_shows_its_stored_state_and_says_where_it_lives():
    models = {
        "box": model("VBox", children=["IPY_MODEL_tau", "IPY_MODEL_kind", "IPY_MODEL_out", "IPY_MODEL_text"]),
        "tau": model("FloatLogSlider", description="τ", value=0.1, min=-2.0, max=1.0, base=10.0),
        "kind": model("Dropdown", description="loss", _options_labels=["ordinary", "hard"], index=1),
        "out": model(
            "Output",
            outputs=[
                {"output_type": "stream", "name": "stdout", "text": "1 < 2"},
                {"output_type": "display_data", "data": {MIMETYPE: FIGURE}, "metadata": {}},
            ],
        ),
        "text": model("HTML", value="<b>3.2</b>"),
    }
    stored, note = read_output({WIDGET_VIEW: {"model_id": "box"}, "text/plain": "VBox()"}, models)
    soup = BeautifulSoup(stored["text/html"], "html.parser")
    slider = soup.find("input")
    assert slider.has_attr("disabled") and slider.find_parent("label").get_text(" ") == "τ 0.1"
    assert float(slider["value"]) == pytest.approx(-1.0) and (slider["min"], slider["max"]) == ("-2.0", "1.0")
    assert soup.find("select").has_attr("disabled") and soup.find("option").string == "hard"
    assert soup.find("pre").string == "1 < 2"
    assert soup.find(class_="lossbook-figure") and soup.find("b").string == "3.2"
    assert "comes alive in {launch}`colab`" in note["text/markdown"]


@pytest.mark.parametrize(
    ("name", "state", "html"),
    [
        ("IntRangeSlider", {"value": [2, 5], "description": "k"}, 'value="2 – 5"'),
        ("Checkbox", {"value": True, "description": "hard"}, "checked"),
        ("IntSlider", {"value": 3}, 'aria-label="value"'),
        ("Button", {"description": "Draw"}, "<button"),
        ("Label", {"value": "a < b"}, "a &lt; b"),
        ("FloatText", {"value": 0.25, "description": "x"}, 'value="0.25"'),
    ],
)
def test_single_widgets(name, state, html):
    shown = read_output({WIDGET_VIEW: {"model_id": "w"}}, {"w": model(name, **state)})
    assert html in shown[0]["text/html"]


def test_progress_bar_is_no_control():
    shown = read_output({WIDGET_VIEW: {"model_id": "w"}}, {"w": model("FloatProgress", value=9, max=9)})
    assert ["<progress" in data.get("text/html", "") for data in shown] == [True]


def test_widget_without_stored_state_says_where_it_lives():
    (note,) = read_output({WIDGET_VIEW: {"model_id": "gone"}, "text/plain": "VBox()"})
    assert "comes alive" in note["text/markdown"]


def test_marks_for_nbval_are_not_shown():
    (cell,) = read(new_code_cell("# NBVAL_CHECK_OUTPUT\nprint(1)  # NBVAL stays here")).cells
    assert cell.source == "print(1)  # NBVAL stays here"


def test_colab_badge_becomes_buttons():
    badge = "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/x)"
    source = read(new_markdown_cell(f"# Lab\n\n{badge}\n\nText")).cells[0].source
    assert "https://" not in source
    assert re.findall(r"\{launch\}`(\w+)`", source) == ["colab", "jupyterhub", "download"]


# directives, in a book of one paper

PAPERS = """
- part: similarity
  title: "Similarity: contrast, metric"
  papers:
    - {slug: temperature, title: On Temperature, authors: [Ada Lovelace, Emmy Noether], year: 2021, venue: CVPR,
       arxiv: "2012.09740", code: some/code, cite: lovelace2021}
    - {slug: isogclr, title: On Individuals, authors: [A B, C D, E F], year: 2023, venue: ICML,
       arxiv: "2305.11965", code: null, cite: b2023}
"""
CONFIG = "repository: {url: https://github.com/some/book, branch: trunk}\n"
BIBLIOGRAPHY = "@misc{lovelace2021, author={Lovelace, Ada}, title={On Temperature}, year={2021}}"


def lab_notebook(*payloads: dict) -> str:
    cells = [
        new_code_cell("lab.claim()", outputs=[new_output("display_data", {CLAIM: payload})]) for payload in payloads
    ]
    metadata = {"language_info": {"name": "python"}}
    return nbformat.writes(new_notebook(cells=[new_markdown_cell("# Lab"), *cells], metadata=metadata))


@pytest.fixture
def book(tmp_path):
    """A function that builds a book of these pages and returns the doctree of `book/page`, and the warnings."""
    root = tmp_path / "root"

    def write(name: str, text: str) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")

    write("book/papers.yml", PAPERS)
    write("_config.yml", CONFIG)
    write("_toc.yml", "")
    write("refs.bib", BIBLIOGRAPHY)
    write("index.md", "# Book\n\n```{toctree}\n:glob:\nbook/*\nlabs/*/*\nchapters/*/*\n```\n")
    write("chapters/similarity/temperature.ipynb", lab_notebook())
    write("labs/similarity/temperature.ipynb", lab_notebook(PAYLOAD, DIFFERS))

    def build(page: str, **files: str):
        write("book/page.md", f"# Page\n\n{page}\n")
        for name, text in files.items():
            write(name, text)
        warnings = (tmp_path / "warnings.txt").open("w+")
        config = {
            "extensions": ["myst_nb", "sphinxcontrib.bibtex", "launch", "cards", "ledger", "bench_tables"],
            "nb_execution_mode": "off",
            "nb_render_markdown_format": "myst",
            "nb_custom_formats": {".ipynb": ["reader.read_notebook", {}, False]},
            "bibtex_bibfiles": ["refs.bib"],
            "myst_enable_extensions": ["attrs_block"],
        }
        with docutils_namespace():
            app = Sphinx(
                root, None, tmp_path / "out", tmp_path / "trees", "html", config, status=None, warning=warnings
            )
            app.build()
            tree = app.env.get_and_resolve_doctree("book/page", app.builder)
        warnings.seek(0)
        return tree, warnings.read()

    return build


def links(tree: nodes.Node) -> dict[str, str]:
    return {node.astext(): node.get("refuri", "") for node in tree.findall(nodes.reference)}


def test_paper_card_opens_every_room_that_is_there(book):
    tree, warnings = book("```{paper-card} similarity/temperature\n```\n\n```{bibliography}\n```")
    found = links(tree)
    assert found["On Temperature"] == found["arXiv:2012.09740"] == "https://arxiv.org/abs/2012.09740"
    assert found["official code"] == "https://github.com/some/code"
    assert found["lab"] == "../labs/similarity/temperature.html"
    notebook = "labs/similarity/temperature.ipynb"
    assert found["Run the lab in Colab"] == f"https://colab.research.google.com/github/some/book/blob/trunk/{notebook}"
    assert "tests" not in found and "module" not in found
    assert "Ada Lovelace, Emmy Noether. CVPR 2021." in tree.astext()
    assert warnings == ""


def test_paper_card_of_an_unknown_paper_warns(book):
    _, warnings = book("```{paper-card} similarity/temprature\n```")
    assert "no slug 'temprature'" in warnings and "temperature, isogclr" in warnings


def test_paper_list_links_what_is_ready_and_nothing_else(book):
    tree, warnings = book("```{paper-list}\n```")
    found = links(tree)
    assert found["On Temperature"] == "../chapters/similarity/temperature.html"
    assert "On Individuals" not in found
    assert "A B et al., ICML 2023 · arXiv:2305.11965 · in preparation" in tree.astext()
    assert "Ada Lovelace and Emmy Noether" in tree.astext()
    assert warnings == ""


def test_part_list_counts_papers(book):
    tree, _ = book("```{part-list}\n```")
    assert links(tree)["Similarity"] == "papers.html#similarity"
    assert "2 papers, 1 ready" in tree.astext()


def test_ledger_reads_labs_and_recorded_runs(book):
    recorded = json.dumps([PAYLOAD | {"profile": "full", "device": "NVIDIA H100", "measured": "0.51", "seed": 1}])
    tree, warnings = book("```{ledger}\n```", **{"book/results/h100/similarity/temperature.json": recorded})
    text = tree.astext()
    assert "2 claims from 1 of 2 papers: 1 held, 1 not reproduced here." in text
    assert "0.43 ± 0.02 (quick profile, cpu)" in text
    assert "0.51 (full profile, NVIDIA H100)" in text
    assert "The data set is too easy." in text
    anchors = {name for node in tree.findall(nodes.container) for name in node["ids"]}
    assert anchors == {"claim-similarity-temperature-tolerance-grows", "claim-similarity-temperature-best"}
    assert [node.astext() for node in tree.findall(nodes.math)] == [r"\tau"] * 2
    assert "if <0.5." in text
    assert warnings == ""


def test_claim_role_links_to_the_ledger_with_the_outcome(book):
    page = "{claim}`similarity/temperature/best` {claim}`similarity/temperature/tolerance-grows`"
    tree, warnings = book(page, **{"book/ledger.md": "# Ledger\n\n```{ledger}\n```\n"})
    assert links(tree) == {
        "not reproduced here": "ledger.html#claim-similarity-temperature-best",
        "held": "ledger.html#claim-similarity-temperature-tolerance-grows",
    }
    assert warnings == ""


def test_claim_role_of_an_unknown_claim_warns(book):
    _, warnings = book("{claim}`similarity/temperature/worst`")
    assert "no claim 'worst'; its claims are tolerance-grows, best" in warnings


def test_ledger_without_claims(book):
    tree, _ = book("```{ledger}\n```", **{"labs/similarity/temperature.ipynb": lab_notebook()})
    assert "0 claims from 0 of 2 papers: 0 held" in tree.astext()


def test_lab_shows_its_claims_as_rows(book, tmp_path):
    book("text")
    soup = BeautifulSoup((tmp_path / "out/labs/similarity/temperature.html").read_text("utf-8"), "html.parser")
    rows = soup.find_all(class_="lossbook-claim")
    assert [row.find(class_="lossbook-outcome").string for row in rows] == ["held", "not reproduced here"]


def test_benchmarks_before_and_after_the_first_record(book):
    tree, _ = book("```{benchmarks}\n```")
    assert "No benchmark is recorded yet." in tree.astext()
    row = {"part": "similarity", "slug": "temperature", "name": "InfoNCE", "peer": "NT-Xent", "size": "B=128"}
    row |= {"time_ours_ms": 1.234, "time_peer_ms": 5.0, "ratio": 0.2468, "memory_mb": None, "note": ""}
    slope = {"name": "InfoNCE", "quantity": "time", "range": "1k–16k", "slope": 1.987, "claim": "2"}
    first = {"machine": "two cores", "date": "2026-11-28", "rows": [row], "slopes": [slope]}
    files = {"book/benchmarks/similarity/temperature.json": json.dumps(first)}
    tree, warnings = book("```{benchmarks}\n```", **files)
    cells = [entry.astext() for entry in tree.findall(nodes.entry)]
    assert ["1.23 ms", "5 ms", "0.247", "–"] == cells[11:15]
    assert "1.99" in cells and "Measured on two cores, 2026-11-28." in tree.astext()
    assert warnings == ""
    second = first | {"machine": "four cores", "slopes": [], "rows": [row | {"memory_mb": 2.0, "memory_peer_mb": 8.0}]}
    files |= {f"book/benchmarks/{name}.json": json.dumps(second) for name in ("similarity/tcm", "ops/streamed")}
    tree, warnings = book("```{benchmarks}\n```", **files)
    assert [found.astext() for found in tree.findall(nodes.title)][-2:] == ["Ops", "Similarity"]
    assert "Measured on four cores, 2026-11-28 (tcm); two cores, 2026-11-28 (temperature)." in tree.astext()
    assert "2 MB (8 MB)" in [entry.astext() for entry in tree.findall(nodes.entry)]
    assert warnings == ""


@pytest.mark.parametrize(
    ("hub", "address"),
    [
        ("", "../book/hub.html#book/page.ipynb"),
        (
            "https://hub.example.edu/",
            "https://hub.example.edu/hub/user-redirect/git-pull?repo=https%3A%2F%2Fgithub.com%2Fsome%2Fbook&branch=trunk"
            "&urlpath=lab%2Ftree%2Fbook%2Fbook%2Fpage.ipynb",
        ),
    ],
)
def test_launch_address_of_a_hub(book, tmp_path, hub, address):
    from launch import launch_address
    from sphinx.config import Config

    config = Config({}, {"html_theme_options": {"launch_buttons": {"jupyterhub_url": hub}}})
    config.add("html_theme_options", {}, "html", dict)
    assert launch_address(config, tmp_path / "root", "book/page", "jupyterhub") == address


def test_launch_role_names_the_places(book):
    tree, warnings = book("{launch}`download`")
    assert links(tree)["Download"] == "../_sources/book/page.ipynb" and warnings == ""
    _, warnings = book("{launch}`mars`")
    assert "where must be one of colab, jupyterhub, download; got 'mars'" in warnings


def test_source_role_links_to_a_file_that_is_there(book):
    tree, warnings = book("{source}`_config.yml`")
    assert links(tree)["_config.yml"] == "https://github.com/some/book/blob/trunk/_config.yml" and warnings == ""
    _, warnings = book("{source}`gone.py`")
    assert "source: no file 'gone.py'" in warnings


def test_listing_leaves_the_docstring_out():
    source = 'def f(x):\n    """What f does.\n\n    More.\n    """\n    return x  # as it is\n'
    assert listing.without_docstring(source) == "def f(x):\n    return x  # as it is\n"
    for other in ("def f(x):\n    return x\n", "x = 1\n", "not python (", ""):
        assert listing.without_docstring(other) == other
