import json

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plotly.subplots import make_subplots
from scipy import stats

from lossbook import lab
from lossbook.lab._plots import FONT, template


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    high, low = sorted([luminance(first), luminance(second)], reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_palette_and_template_read_on_light_and_dark():
    assert len(lab.COLORS) == 8 and len(set(lab.COLORS.values())) == 8
    layout = template().layout
    assert layout.paper_bgcolor == layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert set(layout.colorway) < set(lab.COLORS.values())
    for color in layout.colorway[:4]:
        assert contrast(color, "#ffffff") >= 2.95 and contrast(color, "#121212") >= 3
    assert contrast(FONT, "#ffffff") >= 4.5 and contrast(FONT, "#121212") >= 3
    with pytest.raises(TypeError):
        lab.COLORS["blue"] = "#000000"


@given(st.integers(2, 8), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_interval_is_students(rows, columns, seed):
    values = np.random.default_rng(seed).normal(size=(rows, columns))
    mean, half_width = lab.mean_interval(values)
    for column in range(columns):
        interval = stats.ttest_1samp(values[:, column], 0).confidence_interval(0.95)
        np.testing.assert_allclose([mean[column] - half_width[column], mean[column] + half_width[column]], interval)


def test_the_interval_covers_the_mean_in_95_percent_of_the_cases():
    mean, half_width = lab.mean_interval(np.random.default_rng(0).normal(size=(4, 20_000)))
    assert abs((np.abs(mean) < half_width).mean() - 0.95) < 0.01


def test_the_interval_takes_tensors_and_lists():
    rows = [[1.0, 2.0], [2.0, 5.0], [4.0, 4.0]]
    expected = lab.mean_interval(np.array(rows))
    for values in (rows, torch.tensor(rows, requires_grad=True)):
        for ours, theirs in zip(lab.mean_interval(values), expected, strict=True):
            np.testing.assert_allclose(ours, theirs)
    mean, half_width = lab.mean_interval([3.0, 3.0])
    assert mean == 3 and half_width == 0


@pytest.mark.parametrize("values", [1.0, [1.0], [[1.0, 2.0]], [1.0, float("nan")]])
def test_bad_values_are_named(values):
    with pytest.raises(ValueError, match="^values must"):
        lab.mean_interval(values)


@pytest.mark.parametrize("color", ["vermilion", "#D55E00"])
def test_band_draws_mean_and_interval(color):
    x, values = [0, 1, 2], np.array([[1.0, 2.0, 3.0], [3.0, 2.5, 3.0], [2.0, 4.0, 3.0]])
    mean, half_width = lab.mean_interval(values)
    figure = go.Figure()
    assert lab.band(figure, x, values, name="loss", color=color) is figure
    area, line = figure.data
    np.testing.assert_allclose(line.y, mean)
    np.testing.assert_allclose(area.y, np.concatenate([mean - half_width, (mean + half_width)[::-1]]))
    np.testing.assert_allclose(area.x, [0, 1, 2, 2, 1, 0])
    assert line.line.color == "#D55E00" and area.fillcolor == "rgba(213,94,0,0.2)" and area.fill == "toself"
    assert line.name == "loss" and area.showlegend is False


def test_band_goes_into_a_subplot():
    figure = make_subplots(1, 2)
    lab.band(figure, [0, 1], [[1, 2], [2, 3]], name="loss", color="blue", row=1, col=2)
    assert {trace.xaxis for trace in figure.data} == {"x2"}


def test_bad_band_is_named():
    with pytest.raises(ValueError, match="^values must be"):
        lab.band(go.Figure(), [0, 1, 2], [[1, 2], [2, 3]], name="loss", color="blue")
    with pytest.raises(ValueError, match="^color must be"):
        lab.band(go.Figure(), [0, 1], [[1, 2], [2, 3]], name="loss", color="mauve")


def draw(slope):
    return [go.Scatter(x=[0, 1], y=[0, slope]), go.Bar(x=[0], y=[slope])]


def test_slider_frames_are_computed_over_the_grid():
    grid = [0.1, 0.5, 2.0]
    figure = lab.slider_figure((grid, draw), label="τ", unit="s", start=0.5, title="Slopes", yaxis_range=[0, 2])
    assert [frame.data[1].y[0] for frame in figure.frames] == grid
    assert [trace.y[-1] for trace in figure.data] == [0.5, 0.5]
    (slider,) = figure.layout.sliders
    assert slider.active == 1
    assert slider.currentvalue.prefix == "τ = " and slider.currentvalue.suffix == " s"
    assert [step.label for step in slider.steps] == ["0.1", "0.5", "2"]
    assert figure.layout.title.text == "Slopes" and figure.layout.yaxis.range == (0, 2)
    assert not figure.layout.updatemenus


def test_each_step_shows_its_frame_at_once():
    figure = lab.slider_figure((range(4), draw), label="k")
    names = [frame.name for frame in figure.frames]
    assert len(set(names)) == 4 and all(isinstance(name, str) for name in names)
    for name, step in zip(names, figure.layout.sliders[0].steps, strict=True):
        target, options = step.args
        assert step.method == "animate" and list(target) == [name]
        assert options == {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}


def test_slider_takes_a_mapping_and_starts_at_the_first():
    figure = lab.slider_figure({"cold": draw(1), "warm": draw(2)}, label="temperature")
    assert figure.layout.sliders[0].active == 0 and figure.data[1].y == (1,)
    assert [step.label for step in figure.layout.sliders[0].steps] == ["cold", "warm"]
    json.loads(figure.to_json())


def test_play_button_comes_only_when_asked():
    figure = lab.slider_figure((range(3), draw), label="k", play=True)
    (menu,) = figure.layout.updatemenus
    assert menu.buttons[0].method == "animate" and menu.buttons[0].args[0] is None


@pytest.mark.parametrize("frames", [{}, {1: []}, {1: draw(1), 2: draw(2)[:1]}], ids=["none", "empty", "unequal"])
def test_bad_frames_are_named(frames):
    with pytest.raises(ValueError, match="^frames must"):
        lab.slider_figure(frames, label="k")


def test_start_outside_the_grid_is_named():
    with pytest.raises(ValueError, match="^start must be one of .*, got 3"):
        lab.slider_figure(([1, 2], draw), label="k", start=3)
