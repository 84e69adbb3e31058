"""Reads a notebook for the book: what its outputs hold is shown without a kernel and without an outside script.

Stored Plotly figures become boxes that the local plotly.js draws, ipywidgets become their stored state, claims become
rows of the same form as in the ledger, the Colab badge (an outside image) becomes buttons of our own, and the marks that nbval reads are left out.
"""

import json
import math
import re
from html import escape

import nbformat
from figures import MIMETYPE as PLOTLY
from figures import figure_html
from nbformat import NotebookNode

CLAIM = "application/vnd.lossbook.claim+json"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"

COLAB_BADGE = re.compile(r"\[!\[[^\]]*\]\(https://colab\.research\.google\.com/assets/colab-badge\.svg\)\]\([^)]*\)")
NBVAL_MARK = re.compile(r"^# NBVAL_\w+\n?", re.MULTILINE)
LAUNCH_ROW = "{launch}`colab` {launch}`jupyterhub` {launch}`download`"
LIVE_NOTE = (
    "{.lossbook-live-note}\nThis is the stored state. It comes alive in {launch}`colab` or {launch}`jupyterhub`."
)

BOXES = {"BoxModel", "HBoxModel", "VBoxModel", "GridBoxModel", "TabModel", "AccordionModel", "StackModel"}
TEXTS = {"HTMLModel", "HTMLMathModel", "LabelModel"}
CHOICES = {"DropdownModel", "SelectModel", "RadioButtonsModel", "ToggleButtonsModel", "SelectionSliderModel"}
CHECKS = {"CheckboxModel", "ToggleButtonModel", "ValidModel"}
PROGRESS = {"FloatProgressModel", "IntProgressModel"}


def _text(value: str | list[str]) -> str:
    """A notebook's text, which may be stored as a list of lines."""
    return value if isinstance(value, str) else "".join(value)


def _output_html(output: dict, models: dict) -> str:
    """One stored output inside a widget, as HTML."""
    if output["output_type"] == "stream":
        return f"<pre>{escape(_text(output['text']))}</pre>"
    data = output.get("data", {})
    if PLOTLY in data:
        return figure_html(data[PLOTLY])
    if WIDGET_VIEW in data:
        return _widget_html(data[WIDGET_VIEW]["model_id"], models)
    if "text/html" in data:
        return _text(data["text/html"])
    if "image/png" in data:
        return f'<img alt="" src="data:image/png;base64,{_text(data["image/png"]).strip()}">'
    return f"<pre>{escape(_text(data.get('text/plain', '')))}</pre>"


def _number(value: float) -> str:
    """A control's number, short."""
    return format(value, ".4g") if isinstance(value, float) else str(value)


def _control(name: str, state: dict) -> str:
    """One control as a labelled, disabled control of the browser that shows its stored value."""
    value = state.get("value")
    description = state.get("description") or ""
    if name == "ButtonModel":
        return f'<button type="button" disabled>{escape(description)}</button>'
    name_html = f'<span class="lossbook-slider-name">{escape(description)}</span>' if description else ""
    unnamed = "" if description else ' aria-label="value"'
    if name in CHOICES:
        options = list(state.get("_options_labels", []))
        index = state.get("index")
        chosen = escape(options[index]) if index is not None else ""
        control = f"<select disabled{unnamed}><option>{chosen}</option></select>"
    elif name in CHECKS:
        control = f'<input type="checkbox" disabled{unnamed}{" checked" if value else ""}>'
    elif name in PROGRESS:
        control = f'<progress{unnamed} max="{state.get("max", 100)}" value="{value or 0}"></progress>'
    elif name.endswith("SliderModel") and isinstance(value, (int, float)):
        low, high, position = state.get("min", 0), state.get("max", 100), value
        if name == "FloatLogSliderModel":  # its ends are exponents
            low, high, position = state.get("min", 0), state.get("max", 4), math.log(value, state.get("base", 10))
        control = f'<input type="range" disabled{unnamed} min="{low}" max="{high}" step="any" value="{position}">'
        control += f"<output>{_number(value)}</output>"
    else:
        shown = " – ".join(map(_number, value)) if isinstance(value, (list, tuple)) else _number(value)
        control = f'<input type="text" disabled{unnamed} value="{escape(shown)}">'
    return f'<label class="lossbook-slider">{name_html}{control}</label>'


def _widget_html(model_id: str, models: dict) -> str:
    """A widget's stored state as HTML: boxes nested, text as text, controls disabled, outputs as they were."""
    model = models.get(model_id)
    if model is None:
        return ""
    name, state = model["model_name"], model["state"]
    if name in BOXES:
        direction = "row" if name == "HBoxModel" else "column"
        children = (child.removeprefix("IPY_MODEL_") for child in state.get("children", []))
        inner = "".join(_widget_html(child, models) for child in children)
        return f'<div class="lossbook-box lossbook-box-{direction}">{inner}</div>'
    if name in TEXTS:
        value = state.get("value", "")
        return f"<div>{escape(value) if name == 'LabelModel' else value}</div>"
    if name == "OutputModel":
        return "".join(_output_html(output, models) for output in state.get("outputs", []))
    if "_widget_data" in state:  # a Plotly FigureWidget
        return figure_html({"data": state["_widget_data"], "layout": state.get("_widget_layout", {})})
    if "value" in state or "index" in state or "description" in state:
        return _control(name, state)
    return ""


def _is_control(model: dict) -> bool:
    """Whether the reader of a live notebook can move this widget."""
    name, state = model["model_name"], model["state"]
    return name not in PROGRESS | TEXTS and ("value" in state or "index" in state)


def _reachable(model_id: str, models: dict) -> list[dict]:
    """A widget's model and those of the widgets in it."""
    model = models.get(model_id)
    if model is None:
        return []
    children = (child.removeprefix("IPY_MODEL_") for child in model["state"].get("children", []))
    return [model, *(inner for child in children for inner in _reachable(child, models))]


def _shown(output: NotebookNode, models: dict) -> list[NotebookNode]:
    """The outputs that the page shows for one stored output."""
    data = output.get("data", {})
    if PLOTLY in data:
        return [nbformat.v4.new_output("display_data", {"text/html": figure_html(data[PLOTLY])})]
    if CLAIM in data:
        row = f"````{{claim-row}}\n{json.dumps(data[CLAIM])}\n````"
        return [nbformat.v4.new_output("display_data", {"text/markdown": row})]
    if WIDGET_VIEW in data:
        model_id = data[WIDGET_VIEW]["model_id"]
        stored = _widget_html(model_id, models)
        reached = _reachable(model_id, models)
        parts = []
        if stored:
            parts.append({"text/html": f'<div class="lossbook-widget">{stored}</div>'})
        if not reached or any(map(_is_control, reached)):
            parts.append({"text/markdown": LIVE_NOTE})
        return [nbformat.v4.new_output("display_data", part) for part in parts]
    return [output]


def read_notebook(text: str) -> NotebookNode:
    """Read a notebook as the book shows it (a reader for MyST-NB's ``nb_custom_formats``).

    Args:
        text: the ``.ipynb`` file's text.

    Returns:
        The notebook, with its Plotly, widget and claim outputs turned into HTML or MyST Markdown. Its widget state is
        dropped, so that MyST-NB loads no widget script.
    """
    notebook = nbformat.reads(text, as_version=4)
    stored = notebook.metadata.pop("widgets", {})
    models = stored.get(WIDGET_STATE, {}).get("state", {})
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = COLAB_BADGE.sub(LAUNCH_ROW, cell.source)
        elif cell.cell_type == "code":
            cell.source = NBVAL_MARK.sub("", cell.source)
            cell.outputs = [shown for output in cell.outputs for shown in _shown(output, models)]
    return notebook
