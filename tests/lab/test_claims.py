import json

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from lossbook import lab

MIME = "application/vnd.lossbook.claim+json"
GIVEN = {"paper": "83.27", "measured": "0.66 ± 0.02"}


@pytest.fixture
def shown(monkeypatch):
    """What the claims display, as mime bundles; the run has started."""
    monkeypatch.setenv("LOSSBOOK_DEVICE", "cpu")
    lab.start(seed=5)
    bundles = []
    monkeypatch.setattr("IPython.display.display", lambda claim: bundles.append(claim._repr_mimebundle_()))
    return bundles


@pytest.mark.parametrize("true", [True, np.True_, np.array(1.0) < 2, torch.tensor(True), torch.tensor(1.0) > 0])
def test_a_claim_is_stored_with_its_run(shown, true):
    lab.claim("u-shape", "Accuracy peaks in between.", **GIVEN, holds=true)
    (bundle,) = shown
    assert bundle[MIME] == {
        "name": "u-shape",
        "statement": "Accuracy peaks in between.",
        "paper": "83.27",
        "measured": "0.66 ± 0.02",
        "holds": True,
        "expected": "holds",
        "reason": None,
        "profile": "quick",
        "device": "cpu",
        "seed": 5,
    }
    assert bundle[MIME]["holds"] is True
    assert 'class="lossbook-claim"' in bundle["text/html"]
    for text in ("holds", "Accuracy peaks in between.", "83.27", "0.66 ± 0.02"):
        assert text in bundle["text/html"] and text in bundle["text/plain"]


@pytest.mark.parametrize("false", [False, np.False_, torch.tensor(False)])
def test_a_claim_that_fails_is_shown_and_raises(shown, false):
    with pytest.raises(lab.ClaimError, match="'u-shape' does not hold.*0.66"):
        lab.claim("u-shape", "It peaks.", **GIVEN, holds=false)
    assert shown[0][MIME]["holds"] is False and "does not hold" in shown[0]["text/html"]
    assert issubclass(lab.ClaimError, AssertionError)


def test_a_declared_difference_passes_with_its_reason(shown):
    lab.claim("u-shape", "It peaks.", **GIVEN, holds=False, expected="differs", reason="Too few images.")
    assert shown[0][MIME]["reason"] == "Too few images." and shown[0][MIME]["expected"] == "differs"
    for kind in ("text/html", "text/plain"):
        assert "not reproduced here" in shown[0][kind] and "Too few images." in shown[0][kind]


def test_a_stale_reason_raises(shown):
    with pytest.raises(lab.ClaimError, match="out of date.*Too few images"):
        lab.claim("u-shape", "It peaks.", **GIVEN, holds=True, expected="differs", reason="Too few images.")
    assert len(shown) == 1


text = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@given(text, text, text, st.none() | text)
def test_any_text_survives_json_and_stays_inside_its_row(statement, paper, measured, reason):
    from lossbook.lab._claims import _Claim

    expected = "differs" if reason else "holds"
    row = _Claim("a", statement, paper, measured, not reason, expected, reason, "quick", "cpu", 0)
    bundle = row._repr_mimebundle_()
    assert json.loads(json.dumps(bundle)) == bundle
    assert bundle["text/html"].count("<") == 5  # the row's own tags: div, strong, /strong, br, /div


@pytest.mark.parametrize(
    ("change", "error", "argument"),
    [
        ({"name": "U shape"}, ValueError, "name"),
        ({"name": "-u"}, ValueError, "name"),
        ({"name": ""}, ValueError, "name"),
        ({"name": 3}, TypeError, "name"),
        ({"statement": " "}, ValueError, "statement"),
        ({"paper": 83.27}, TypeError, "paper"),
        ({"measured": 0.66}, TypeError, "measured"),
        ({"holds": 1}, TypeError, "holds"),
        ({"holds": torch.tensor(0.3)}, TypeError, "holds"),
        ({"holds": np.array([True])}, TypeError, "holds"),
        ({"holds": None}, TypeError, "holds"),
        ({"expected": "fails"}, ValueError, "expected"),
        ({"expected": "differs"}, ValueError, "reason"),
        ({"expected": "differs", "reason": " "}, ValueError, "reason"),
        ({"reason": "No."}, ValueError, "reason"),
    ],
)
def test_bad_input_is_named_and_nothing_is_shown(shown, change, error, argument):
    arguments = {"name": "u-shape", "statement": "It peaks.", **GIVEN, "holds": True} | change
    with pytest.raises(error, match=f"^{argument} must"):
        lab.claim(**arguments)
    assert shown == []


def test_a_claim_needs_a_run():
    with pytest.raises(RuntimeError, match=r"lab\.start"):
        lab.claim("u-shape", "It peaks.", **GIVEN, holds=True)


def test_outside_a_notebook_a_claim_prints_its_row(monkeypatch, capsys):
    monkeypatch.setenv("LOSSBOOK_DEVICE", "cpu")
    lab.start()
    capsys.readouterr()
    lab.claim("u-shape", "It peaks.", **GIVEN, holds=True)
    assert capsys.readouterr().out == "holds: It peaks. | paper: 83.27 | measured here: 0.66 ± 0.02\n"


def test_a_notebook_keeps_claims_and_figures(monkeypatch):
    monkeypatch.setenv("LOSSBOOK_DEVICE", "cpu")
    claim = 'lab.claim("c", "It peaks.", paper="1", measured="2", holds={})'
    cells = [
        "from lossbook import lab\nrun = lab.start(seed=2)",
        claim.format("run.seed == 2"),
        "import plotly.graph_objects as go\nlab.slider_figure(([1, 2], lambda k: [go.Scatter(y=[0, k])]), label='k')",
        claim.format("False"),
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    with pytest.raises(CellExecutionError, match="ClaimError"):
        NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    start, kept, figure, failed = (cell.outputs for cell in notebook.cells)
    assert start[0].text.startswith("lossbook ") and start[0].text.count("\n") == 1
    assert set(kept[0].data) == {MIME, "text/html", "text/plain"}
    assert kept[0].data[MIME]["seed"] == 2
    assert [set(output.data) for output in figure] == [{"application/vnd.plotly.v1+json"}]
    assert failed[0].data[MIME]["holds"] is False and failed[1].ename == "ClaimError"
