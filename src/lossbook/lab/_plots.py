"""Colors, template and the two figures that labs share: a mean with its interval, and a slider over computed frames."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLORS: Mapping[str, str] = MappingProxyType(
    {
        "blue": "#0072B2",
        "vermilion": "#D55E00",
        "green": "#009E73",
        "purple": "#CC79A7",
        "orange": "#E69F00",
        "sky": "#56B4E9",
        "yellow": "#F0E442",
        "black": "#000000",
    }
)
"""The color-blind-safe palette of Okabe and Ito, name to hex. Yellow is faint on a white page and black is lost on a
dark one, so the template's color cycle leaves them out."""

FONT = "#737373"  # contrast with white 4.7, with the book's dark page 3.9
LINE = "rgba(128,128,128,0.3)"


def template() -> "go.layout.Template":
    """Return the ``lossbook`` template: transparent paper, gray text and grid that read on light and on dark pages."""
    import plotly.graph_objects as go

    axis = {"gridcolor": LINE, "zerolinecolor": LINE, "linecolor": FONT, "showline": True, "ticks": "outside"}
    axis |= {"tickcolor": FONT, "automargin": True}
    return go.layout.Template(
        layout={
            "colorway": [code for name, code in COLORS.items() if name not in ("yellow", "black")],
            "font": {"color": FONT, "size": 14},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 60, "r": 20, "t": 50, "b": 50},
            "xaxis": axis,
            "yaxis": axis,
            "colorscale": {"sequential": "Cividis", "sequentialminus": "Cividis", "diverging": "RdBu"},
            "legend": {"bgcolor": "rgba(0,0,0,0)"},
            "sliderdefaults": {"bordercolor": FONT, "tickcolor": FONT},
            "updatemenudefaults": {"bgcolor": "rgba(0,0,0,0)", "bordercolor": FONT},
        }
    )


def mean_interval(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over axis 0 and the half-width of its 95 % interval by Student's t.

    Args:
        values: array or tensor ``(S, ...)`` of finite numbers, one row per seed, S >= 2.

    Returns:
        ``mean`` and ``half_width``, float64 of shape ``values.shape[1:]``; the interval is ``mean ± half_width``.

    Raises:
        ValueError: fewer than two rows, or a number that is not finite.

    Example:
        >>> mean, half_width = mean_interval([1.0, 2.0, 3.0])
        >>> print(f"{mean:.2f} ± {half_width:.2f}")
        2.00 ± 2.48
    """
    from scipy import stats

    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    values = np.asarray(values, dtype=np.float64)
    if values.ndim == 0 or len(values) < 2:
        raise ValueError(f"values must hold at least two rows, one per seed, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("values must be finite")
    return values.mean(0), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def band(
    figure: "go.Figure",
    x: Any,
    values: Any,
    *,
    name: str,
    color: str,
    row: int | None = None,
    col: int | None = None,
) -> "go.Figure":
    """Add the mean of several runs to a figure, as a line with its 95 % interval as a band.

    Args:
        figure: the Plotly figure to add to.
        x: ``(T,)`` positions.
        values: ``(S, T)`` finite numbers, one row per seed, S >= 2.
        name: of the curve, in the legend.
        color: a name in :data:`COLORS` or ``"#rrggbb"``.
        row, col: the subplot, where the figure has several.

    Returns:
        ``figure``.

    Raises:
        ValueError: the shapes disagree, ``color`` is neither, or as in :func:`mean_interval`.

    Example:
        >>> import plotly.graph_objects as go
        >>> len(band(go.Figure(), [1, 2, 3], [[1, 2, 3], [2, 3, 5]], name="loss", color="blue").data)
        2
    """
    import plotly.colors

    mean, half_width = mean_interval(values)
    x = np.asarray(x)
    if x.ndim != 1 or mean.shape != x.shape:
        raise ValueError(f"values must be (S, T) for x of shape (T,), got a mean of {mean.shape} and x of {x.shape}")
    code = COLORS.get(color, color)
    try:
        red, green, blue = plotly.colors.hex_to_rgb(code)
    except ValueError as error:
        raise ValueError(f"color must be one of {', '.join(COLORS)} or '#rrggbb', got {color!r}") from error
    figure.add_scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([mean - half_width, (mean + half_width)[::-1]]),
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.2)",
        line={"width": 0},
        mode="lines",
        name=name,
        legendgroup=name,
        showlegend=False,
        hoverinfo="skip",
        row=row,
        col=col,
    )
    figure.add_scatter(
        x=x,
        y=mean,
        mode="lines+markers",
        line={"color": code},
        name=name,
        legendgroup=name,
        customdata=half_width,
        hovertemplate="%{y:.4g} ± %{customdata:.2g}",
        row=row,
        col=col,
    )
    return figure


def slider_figure(
    frames: Mapping[Any, Sequence[Any]] | tuple[Sequence[Any], Callable[[Any], Sequence[Any]]],
    *,
    label: str,
    unit: str = "",
    start: Any = None,
    play: bool = False,
    **layout: Any,
) -> "go.Figure":
    """Return a figure with a slider over frames that are computed beforehand, so that it moves on a static page.

    A frame changes what it names and leaves the rest as it was: let every frame set the same properties. Give the axes
    fixed ranges (``yaxis_range=[0, 1]``) where the eye should compare frames.

    Args:
        frames: mapping from the slider's values to lists of Plotly traces, or ``(grid, draw)`` where ``draw(value)``
            returns the traces for one value of the grid. Every frame has the same number of traces.
        label: what the slider changes; the figure shows "label = value unit".
        unit: of the value.
        start: the value shown first; ``None`` for the first of the grid.
        play: add a button that runs through the frames.
        **layout: passed to ``Figure.update_layout``, for example ``title`` or ``xaxis_title``.

    Returns:
        ``plotly.graph_objects.Figure`` with one frame per value.

    Raises:
        ValueError: no frame, frames that differ in their number of traces, or ``start`` outside the grid.

    Example:
        >>> import plotly.graph_objects as go
        >>> figure = slider_figure(([1, 2, 4], lambda k: [go.Scatter(x=[0, 1], y=[0, k])]), label="slope", start=2)
        >>> len(figure.frames), figure.layout.sliders[0].active
        (3, 1)
    """
    import plotly.graph_objects as go

    if isinstance(frames, Mapping):
        grid, drawn = list(frames), [list(traces) for traces in frames.values()]
    else:
        values, draw = frames
        grid = list(values)
        drawn = [list(draw(value)) for value in grid]
    counts = sorted({len(traces) for traces in drawn})
    if len(counts) != 1 or counts[0] == 0:
        raise ValueError(f"frames must be at least one, each with the same number of traces, got the numbers {counts}")
    if start is not None and start not in grid:
        raise ValueError(f"start must be one of {grid}, got {start!r}")
    active = 0 if start is None else grid.index(start)

    def animate(names: list[str] | None, duration: int) -> dict[str, Any]:
        frame = {"duration": duration, "redraw": True}
        return {
            "method": "animate",
            "args": [names, {"mode": "immediate", "frame": frame, "transition": {"duration": 0}}],
        }

    texts = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in grid]
    figure = go.Figure(
        data=drawn[active],
        frames=[go.Frame(name=str(index), data=traces) for index, traces in enumerate(drawn)],
    )
    figure.update_layout(
        sliders=[
            {
                "active": active,
                "currentvalue": {"prefix": f"{label} = ", "suffix": f" {unit}" if unit else ""},
                "pad": {"t": 50},
                "x": 0.12 if play else 0,
                "len": 0.88 if play else 1,
                "steps": [{"label": text, **animate([str(index)], 0)} for index, text in enumerate(texts)],
            }
        ]
    )
    if play:
        buttons = [{"label": "Play", **animate(None, 500)}]
        place = {"x": 0, "xanchor": "left", "y": 0, "yanchor": "top", "pad": {"t": 60}}
        figure.update_layout(updatemenus=[{"type": "buttons", "buttons": buttons, **place}])
    figure.update_layout(layout)
    return figure
