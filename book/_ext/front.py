"""The home page's live figure: what the temperature of a contrastive loss does, computed by the book's own module."""

from pathlib import Path

import plotly.graph_objects as go
from docutils import nodes
from figures import figure_html
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

SIMILARITIES = [-0.6, -0.45, -0.3, -0.15, 0.0, 0.12, 0.24, 0.36, 0.48, 0.6, 0.72, 0.84]
TEMPERATURES = [0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0]
START = TEMPERATURES.index(0.3)
ACCENT = "#3b6fb6"


def temperature_figure() -> go.Figure:
    """Share of the push that each of twelve negatives receives, over a grid of temperatures."""
    import torch  # here and not above: only the home page needs it

    from lossbook.similarity.temperature import relative_penalty

    negatives = torch.tensor([SIMILARITIES], dtype=torch.float64)
    shares = [relative_penalty(negatives, temperature=temperature)[0].tolist() for temperature in TEMPERATURES]
    rounded = [[round(share, 4) for share in row] for row in shares]
    steps = [
        {"label": f"{temperature:g}", "method": "restyle", "args": [{"y": [row]}]}
        for temperature, row in zip(TEMPERATURES, rounded, strict=True)
    ]
    figure = go.Figure(go.Bar(x=SIMILARITIES, y=rounded[START], marker_color=ACCENT, hovertemplate="%{y:.1%}"))
    figure.update_layout(
        template="none",
        title="Which negatives does a contrastive loss push?",
        height=245,
        margin={"l": 52, "r": 8, "t": 10, "b": 44},
        xaxis={"title": {"text": "similarity of the negative"}, "showgrid": False, "zeroline": False},
        yaxis={"title": {"text": "share of the push"}, "range": [0, 1], "tickformat": ".0%", "zeroline": False},
        sliders=[{"active": START, "currentvalue": {"prefix": "Temperature τ = "}, "steps": steps}],
    )
    return figure


class TemperatureFigure(SphinxDirective):
    """``{temperature-figure}``: the live figure of the home page."""

    def run(self) -> list[nodes.Node]:
        """Draw it, and draw it again when the module changes."""
        module = Path(self.env.srcdir) / "src" / "lossbook" / "similarity" / "temperature.py"
        self.env.note_dependency(str(module))
        return [nodes.raw("", figure_html(temperature_figure().to_plotly_json()), format="html")]


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("temperature-figure", TemperatureFigure)
