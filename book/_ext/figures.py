"""Plotly figures on a static page: the stored figure becomes a box that the book's own plotly.js draws."""

import base64
import json
import re
from html import escape
from pathlib import Path

import numpy as np
import plotly
from sphinx.application import Sphinx
from sphinx.util.fileutil import copy_asset

MIMETYPE = "application/vnd.plotly.v1+json"
DEFAULT_HEIGHT = 450
CAPTIONED_MARGIN = 30  # pixels above the axes, for subplot titles, where the page itself shows the title
PLOTLY_JS = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"


def _plain(value: object) -> str:
    """Text of a Plotly label: HTML tags dropped, line breaks as spaces."""
    return re.sub(r"\s+", " ", re.sub(r"</?[a-zA-Z][^>]*>", " ", "" if value is None else str(value))).strip()


def figure_title(layout: dict) -> str:
    """What a screen reader says for a figure: its title, else its axes, else a plain word."""

    def text(part: dict) -> str:
        title = part.get("title") or ""
        return _plain(title.get("text") if isinstance(title, dict) else title)

    axes = [text(layout.get(axis) or {}) for axis in ("yaxis", "xaxis")]
    return text(layout) or " against ".join(filter(None, axes)) or "Figure"


def _slider(slider: dict) -> str:
    """A slider as a range input."""
    current = slider.get("currentvalue") or {}
    name = _plain(current.get("prefix")) or "Step"
    suffix = _plain(current.get("suffix"))
    steps, active = slider["steps"], int(slider.get("active") or 0)
    shown = f"{_plain(steps[active].get('label'))} {suffix}".strip()
    return (
        f'<label class="lossbook-slider lossbook-control"><span class="lossbook-slider-name">{escape(name)}</span>'
        f'<input type="range" min="0" max="{len(steps) - 1}" value="{active}" data-suffix="{escape(suffix)}">'
        f"<output>{escape(shown)}</output></label>"
    )


def _menu(menu: dict, label: str) -> str:
    """A menu as buttons or, where the figure has a dropdown, as a select."""
    names = [escape(_plain(button.get("label"))) for button in menu["buttons"]]
    if menu.get("type") == "buttons":
        buttons = (
            f'<button type="button" class="lossbook-button" value="{i}">{name}</button>' for i, name in enumerate(names)
        )
        return f'<div class="lossbook-buttons lossbook-control">{"".join(buttons)}</div>'
    active = int(menu.get("active") or 0)
    options = (f'<option value="{i}"{" selected" * (i == active)}>{name}</option>' for i, name in enumerate(names))
    return f'<select class="lossbook-control" aria-label="{escape(label)}">{"".join(options)}</select>'


def _column(values: list | dict) -> list:
    """A stored column: a list, or the bytes of an array."""
    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"]).tolist()
    return values


def _table(trace: dict, caption: str) -> str:
    """A Plotly table as a table of the page: it is read aloud, and it scrolls on a phone."""
    header = "".join(f"<th>{escape(_plain(name))}</th>" for name in trace["header"]["values"])
    rows = zip(*map(_column, trace["cells"]["values"]), strict=True)
    body = "".join("<tr>" + "".join(f"<td>{escape(_plain(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<table class="table lossbook-table"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"
    )


def figure_html(figure: dict) -> str:
    """Turn a stored Plotly figure into HTML that ``figures.js`` draws.

    Its sliders and menus become the browser's own controls: they are reached by keyboard and read well in every theme.

    Args:
        figure: the stored figure, with ``data``, ``layout`` and, where it moves, ``frames``.

    Returns:
        A table's figure as a ``<table>``; any other as a ``<div class="lossbook-figure">`` with the figure's title, a plot whose height is reserved, its controls, and
        the figure as compact JSON.
    """
    layout = dict(figure.get("layout") or {})
    height = int(layout.get("height") or DEFAULT_HEIGHT)
    layout.update(height=height, autosize=True)
    layout.pop("width", None)
    label = figure_title(layout)
    traces = figure.get("data") or []
    if len(traces) == 1 and traces[0].get("type") == "table":
        return _table(traces[0], label)
    moving = json.dumps([figure.get("frames"), layout.get("sliders"), layout.get("updatemenus")])
    caption = ""
    if layout.get("title") and '"title' not in moving:  # a page wraps a title, Plotly cuts it
        layout.pop("title")
        margin = layout.get("margin") or {}
        layout["margin"] = margin | {"t": min(margin.get("t", CAPTIONED_MARGIN), CAPTIONED_MARGIN)}
        caption = f'<p class="lossbook-figure-title" aria-hidden="true">{escape(label)}</p>'
    menus = [menu for menu in layout.pop("updatemenus", None) or [] if menu.get("buttons")]
    sliders = [slider for slider in layout.pop("sliders", None) or [] if slider.get("steps")]
    controls = [*(_menu(menu, label) for menu in menus), *(_slider(slider) for slider in sliders)]
    steps = [menu["buttons"] for menu in menus] + [slider["steps"] for slider in sliders]
    stored = {
        "data": traces,
        "layout": layout,
        "frames": figure.get("frames") or [],
        "controls": [
            [{key: step.get(key) for key in ("label", "method", "args")} for step in group] for group in steps
        ],
    }
    text = json.dumps(stored, separators=(",", ":")).replace("</", "<\\/")
    return (
        f'<div class="lossbook-figure">{caption}'
        f'<div class="lossbook-plot" role="img" aria-label="{escape(label)}" style="min-height:{height}px"></div>'
        f'{"".join(controls)}<script type="application/json">{text}</script></div>'
    )


def _add_scripts(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object) -> None:
    """Load plotly.js on pages that show a figure, and on no other."""
    if 'class="lossbook-figure"' in context.get("body", ""):
        app.add_js_file("plotly.min.js", loading_method="defer")
        app.add_js_file("figures.js", loading_method="defer")


def _copy_plotly(app: Sphinx, exception: Exception | None) -> None:
    """Serve plotly.js from the book itself, as it came with the installed Python package."""
    if exception is None and app.builder.format == "html":
        copy_asset(str(PLOTLY_JS), str(Path(app.outdir) / "_static"))


def setup(app: Sphinx) -> None:
    """Connect the figure's scripts to the build."""
    app.connect("html-page-context", _add_scripts)
    app.connect("build-finished", _copy_plotly)
