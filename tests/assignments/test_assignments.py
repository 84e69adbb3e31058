"""Assignments and their grader: solutions get full marks, wrong answers lose them, no submission harms another."""

import contextlib
import csv
import functools
import json
import math
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "book/_ext"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "book/_tools"))
import grade
import new_paper
import registry
import sandbox

import assignments

ROOT = registry.ROOT
SECONDS, MEGABYTES = 8, 1500


@dataclass(frozen=True)
class Assignment:
    """What the master of a part and its wrong answers say, question by question."""

    points: dict[str, int]
    functions: dict[str, str]
    wrong: dict[str, dict[str, str]]  # the bodies of wrong answers, by the name of the mistake

    @property
    def total(self):
        return sum(self.points.values())


def _assignment(part):
    cells = nbformat.read(ROOT / f"labs/{part}/assignment.ipynb", as_version=4).cells
    begins = [number for number, cell in enumerate(cells) if cell.source.startswith("# BEGIN QUESTION")]
    points, functions, wrong = {}, {}, {}
    for begin in begins:
        question = yaml.safe_load(cells[begin].source)
        if question.get("manual"):  # read by a person
            continue
        solution = next(cell.source for cell in cells[begin:] if "# BEGIN SOLUTION\n" in cell.source)
        points[question["name"]] = question["points"]
        functions[question["name"]] = re.match(r"def (\w+)\(", solution)[1]
    for path in sorted((Path(__file__).parent / part).glob("*.yml")):
        wrong |= yaml.safe_load(path.read_text(encoding="utf-8"))
    return Assignment(dict(sorted(points.items())), functions, wrong)


PARTS = {part: _assignment(part) for part in assignments.parts()}
# The grader itself is put to the test with this part and its question `temperature_penalty`.
SIMILARITY = PARTS["similarity"]
ALL = SIMILARITY.total
PENALTY = SIMILARITY.points["temperature_penalty"]
# Questions are graded in the order of their names, so these count although the next one never ends.
BEFORE_PENALTY = sum(points for question, points in SIMILARITY.points.items() if question < "temperature_penalty")
NOTHING_RIGHT = " = ".join(SIMILARITY.functions.values()) + " = lambda *args: 1.0"
EVERY_QUESTION = ".*".join(sorted(SIMILARITY.points))

# Cells put before the answers (HOSTILE) and after them (HOSTILE_AFTER): code, status, what the reason says, total.
# PRECIOUS stands for a folder outside of the submission's own.
HOSTILE = {
    "loops": ("while True: pass", "time limit", "still running after 8 s", 0),
    "prints": ("while True: print('x' * 1000)", "time limit", "still running after 8 s", 0),
    "exits_hard": ("import os\nos._exit(0)", "ended", "exit code 0", 0),
    "aborts": ("import os\nos.abort()", "ended", "SIGABRT", 0),
    "hangs_up": ("import os\nos.closerange(3, 1000)", "ended", "its process ended", 0),
    "exits": ("import sys\nsys.exit()", "graded", "code cell 1: SystemExit", ALL),
    "raises": ("1 / 0", "graded", "code cell 1: ZeroDivisionError: division by zero", ALL),
    "is_no_python": ("def f(:", "graded", "code cell 1: SyntaxError", ALL),
    "asks": ("input()", "graded", "code cell 1: EOFError|code cell 1: StdinNotImplementedError", ALL),
    "allocates": ("hoard = []\nwhile True: hoard.append(bytes(10**7))", "graded", "code cell 1: MemoryError", ALL),
    "allocates_crumbs": (
        "hoard = []\nwhile True: hoard.append(bytes(2000))",
        "graded|ended",
        "code cell 1: MemoryError",
        0,
    ),
    "allocates_tensors": ("import torch\ntorch.ones(10**10)", "graded", "code cell 1: RuntimeError.*memory", ALL),
    "fills_the_disk": ("with open('big', 'wb') as f: f.write(bytes(10**8))", "graded", "OSError.*File too large", ALL),
    "deletes": ("import shutil\nshutil.rmtree('PRECIOUS')", "graded", r"PermissionError.*\(os", ALL),
    "deletes_upwards": ("import os\nos.chdir('PRECIOUS')\nos.remove('file.txt')", "graded", r"\(os.remove\)", ALL),
    "renames": ("import os\nos.rename('PRECIOUS/file.txt', 'mine.txt')", "graded", r"\(os.rename\)", ALL),
    "overwrites": ("open('PRECIOUS/file.txt', 'w').write('gone')", "graded", r"\(open\)", ALL),
    "links": ("import os\nos.symlink('PRECIOUS/file.txt', 'link')\nopen('link', 'w')", "graded", r"\(open\)", ALL),
    "overwrites_from_c": (
        "import torch\ntorch.save(1, 'PRECIOUS/file.txt')",
        "graded",
        "code cell 1: RuntimeError",
        ALL,
    ),
    "deletes_from_c": (
        "import ctypes\nctypes.CDLL(None).unlink(b'PRECIOUS/file.txt')",
        "graded",
        "may not use ctypes",
        ALL,
    ),
    "deletes_from_a_shell": ("!rm -r PRECIOUS", "graded", "may not use|pty", ALL),
    "forks": ("import os\nfor _ in range(3): os.fork()", "graded", "may not use os.fork", ALL),
    "leaves_a_child": (
        "import subprocess\nsubprocess.Popen(['sleep', '54321'])",
        "graded",
        "may not use subprocess",
        ALL,
    ),
    "kills": ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", "graded", "may not use os.kill", ALL),
    "phones": ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "graded", "may not use socket", ALL),
    "lifts_its_limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "graded",
        "may not use resource",
        ALL,
    ),
    "imports_the_solution": (
        "from lossbook.similarity.temperature import relative_penalty",
        "graded",
        "code cell 1: ModuleNotFoundError",
        ALL,
    ),
}
if not sandbox.landlock_version():  # no audit hook sees what C code does
    del HOSTILE["overwrites_from_c"]
HOSTILE_AFTER = {
    "loops_when_called": (
        "import time\ndef relative_penalty(negatives, temperature):\n    while True: time.sleep(1)",
        "time limit",
        "still running",
        BEFORE_PENALTY,
    ),
    "exits_when_called": (
        "import sys\ndef relative_penalty(*args): sys.exit()",
        "graded",
        "RuntimeError.*SystemExit",
        ALL - PENALTY,
    ),
    "trickles": (
        "import gc, socket, time\n"
        "channels = [thing for thing in gc.get_objects() if isinstance(thing, socket.socket)]\n"
        "while True:\n"
        "    for channel in channels:\n"
        "        try: channel.send(b' ')\n"
        "        except OSError: pass",
        "ended|time limit",
        "larger than 4 MB|still running",
        0,
    ),
    "dies_when_called": ("import os\ndef relative_penalty(*args): os._exit(3)", "ended", "exit code 3", BEFORE_PENALTY),
    "answers_with_gigabytes": (
        "def relative_penalty(*args): return 'x' * 10**7",
        "ended",
        "answer larger than 4 MB",
        BEFORE_PENALTY,
    ),
    "answers_with_magic": (
        "class Yes:\n    def __getattribute__(self, name): return Yes()\n    def __call__(self, *args): return True\n"
        "    def __eq__(self, other): return True\ndef relative_penalty(*args): return Yes()",
        "graded",
        "temperature_penalty: TypeError",
        ALL - PENALTY,
    ),
    "takes_back_its_answer": (
        "del relative_penalty",
        "graded",
        "temperature_penalty: RuntimeError.*not defined",
        ALL - PENALTY,
    ),
    "overwrites_the_grader": (
        "import builtins, json, math, numpy, otter, torch\n"
        "yes = lambda *args, **options: True\n"
        "for module, name in [(torch, 'allclose'), (torch.Tensor, '__eq__'), (math, 'isclose'), (numpy, 'allclose'),\n"
        "                     (builtins, 'abs'), (builtins, 'all'), (otter.Notebook, 'check'), (json.JSONDecoder, 'decode')]:\n"
        "    try: setattr(module, name, yes)\n"
        "    except Exception: pass\n" + NOTHING_RIGHT,
        "graded",
        EVERY_QUESTION,
        0,
    ),
    "writes_results": (
        "for name in ('results.json', 'results.pkl', 'grades.csv'):\n"
        "    open(name, 'w').write('{\"score\": 10, \"tests\": []}')\n" + NOTHING_RIGHT,
        "graded",
        EVERY_QUESTION,
        0,
    ),
    "forges_messages": (
        "import gc, socket\n"
        "for thing in gc.get_objects():\n"
        "    try:\n"
        '        if isinstance(thing, socket.socket): thing.send(b\'{"status": "graded", "total": 10}\\n\' * 99)\n'
        "    except OSError: pass",
        "ended",
        "forged message",
        0,
    ),
}
HONEST = {
    "magic": "%%time\nimport scipy.stats\nscipy.stats.norm.rvs(size=3)",
    "own_files": """
import pathlib, tempfile, numpy as np, torch
with tempfile.TemporaryDirectory() as folder:
    np.save(f"{folder}/a.npy", 1)
    torch.save(torch.ones(3), "x.pt")
    torch.load("x.pt")
pathlib.Path("x.pt").rename("y.pt").unlink()
open("/dev/null", "w").write("x")""",
    "autograd": "import torch\nx = torch.ones(200, 200, requires_grad=True)\n(x @ x).exp().sum().backward()",
    "talks": "from IPython.display import Markdown, display\ndisplay(Markdown('text'))\nprint('x' * 10**7)",
}
NOT_NOTEBOOKS = {
    "empty": b"",
    "binary": bytes(range(256)),
    "truncated": b'{"cells": [{"cell_type": "code", "source": "x',
    "a_list": b"[]",
    "no_cells": b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": 7}',
    "nested": b'{"cells":' + b"[" * 100_000,
}


@functools.cache
def built(part):
    """The folder with a part's student version and autograder, made by the command."""
    command = [sys.executable, ROOT / "book/_tools/assignments.py", part]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return ROOT / "_build/assignments" / part


def read(path):
    return nbformat.read(path, as_version=4)


def with_answer(notebook, function, body):
    """The notebook with another body for one function."""
    (cell,) = (cell for cell in notebook.cells if cell.source.startswith(f"def {function}("))
    cell.source = "\n".join([cell.source.splitlines()[0], *("    " + line for line in body.splitlines())])
    return notebook


@pytest.fixture(scope="session")
def precious(tmp_path_factory):
    """A folder outside of every submission's own, with a file."""
    folder = tmp_path_factory.mktemp("precious")
    (folder / "file.txt").write_text("precious")
    return folder


def write_grader_trials(folder, solution, precious):
    """Submissions that attack the grader or make it hard, and honest ones that its guard might hinder."""
    for name in ("m_middle", "section 2/Zoë Ångström"):
        (folder / name).parent.mkdir(exist_ok=True)
        nbformat.write(read(solution), folder / f"{name}.ipynb")
    for name, (code, *_) in (HOSTILE | HOSTILE_AFTER).items():
        notebook = read(solution)
        cell = nbformat.v4.new_code_cell(code.replace("PRECIOUS", str(precious)))
        notebook.cells.insert(0 if name in HOSTILE else len(notebook.cells), cell)
        nbformat.write(notebook, folder / f"hostile-{name}.ipynb")
    for name, code in HONEST.items():
        notebook = read(solution)
        notebook.cells.insert(0, nbformat.v4.new_code_cell(code))
        nbformat.write(notebook, folder / f"honest-{name}.ipynb")
    for name, content in NOT_NOTEBOOKS.items():
        (folder / f"not-{name}.ipynb").write_bytes(content)


@pytest.fixture(scope="session")
def graded(precious, tmp_path_factory):
    """A function of a part: grade one folder with all of its submissions; return the rows of the table by name."""

    @functools.cache
    def grade_part(part):
        folder = tmp_path_factory.mktemp("submissions")
        solution = built(part) / "autograder/assignment.ipynb"
        nbformat.write(read(built(part) / "student/assignment.ipynb"), folder / "student.ipynb")
        for name in ("a_first", "z_last"):
            nbformat.write(read(solution), folder / f"{name}.ipynb")
        for question, answers in PARTS[part].wrong.items():
            for name, body in answers.items():
                notebook = with_answer(read(solution), PARTS[part].functions[question], body)
                nbformat.write(notebook, folder / f"{question}-{name}.ipynb")
        if part == "similarity":
            write_grader_trials(folder, solution, precious)
        out = tmp_path_factory.mktemp("out") / "grades.csv"
        limits = ["--part", part, "--time", str(SECONDS), "--memory", str(MEGABYTES)]
        command = [sys.executable, ROOT / "book/_tools/grade.py", folder, out, *limits]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        with out.open(newline="", encoding="utf-8") as table:
            rows = list(csv.DictReader(table))
        files = [str(path.relative_to(folder)) for path in folder.rglob("*.ipynb")]
        assert sorted(row["file"] for row in rows) == sorted(files)
        return {row["file"].removesuffix(".ipynb"): row for row in rows}

    return grade_part


def points(part, row):
    return {question: float(row[question]) for question in PARTS[part].points}


# What is made


@pytest.mark.parametrize("part", PARTS)
def test_student_version_shows_no_solution_and_no_hidden_test(part):
    text = (built(part) / "student/assignment.ipynb").read_text()
    assert "SOLUTION" not in text and "HIDDEN" not in text and "colab-badge" not in text
    shown = read(built(part) / "student/assignment.ipynb").metadata["otter"]["tests"]
    kept = read(built(part) / "autograder/assignment.ipynb").metadata["otter"]["tests"]
    assert set(shown) == set(kept) == set(PARTS[part].points)
    for question in PARTS[part].points:
        assert shown[question].count("hidden=False") >= 2 and "hidden=True" not in shown[question]
        assert kept[question].count("hidden=True") >= 2


@pytest.mark.parametrize("part", PARTS)
def test_autograder_is_ready_for_gradescope(part):
    with zipfile.ZipFile(built(part) / "autograder/autograder.zip") as archive:
        names = set(archive.namelist())
        tests = {f"tests/{question}.py" for question in PARTS[part].points}
        assert {"setup.sh", "run_autograder", "run_otter.py", *tests} <= names
        environment = archive.read("environment.yml").decode()
    assert all(re.search(rf"^ *- {package}$", environment, re.M) for package in ("numpy", "scipy", "torch"))


@pytest.mark.parametrize("part", PARTS)
def test_master_opens_in_colab_and_has_normalized_metadata(part):
    path = Path("labs", part, "assignment.ipynb")
    notebook = read(ROOT / path)
    assert notebook.metadata == new_paper.METADATA
    assert f"/colab-badge.svg)]({registry.repository().colab(path)})" in notebook.cells[0].source
    names = [
        re.search(r"^name: (.*)$", cell.source, re.M)[1] for cell in notebook.cells if "BEGIN QUESTION" in cell.source
    ]
    slugs = {paper.slug for paper in registry.papers() if paper.part == part}
    assert all(name.rpartition("_")[0] in slugs for name in names) and len(set(names)) == len(names)


def test_untouched_student_version_runs_and_says_what_is_missing(tmp_path):
    shutil.copy(built("similarity") / "student/assignment.ipynb", tmp_path)
    notebook = read(tmp_path / "assignment.ipynb")
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (said,) = (
        "".join(str(output.data) for output in cell.outputs)
        for cell in notebook.cells
        if "temperature_penalty" in cell.source
    )
    assert "relative_penalty must return a tensor, got NoneType" in said and "passed!" not in said


COLAB = """
import sys, types, nbformat
from IPython.core.interactiveshell import InteractiveShell

class Shell(InteractiveShell):
    __module__ = "google.colab._shell"

source = sys.argv[1]
notebook = nbformat.read(source, as_version=4)
message = types.SimpleNamespace(blocking_request=lambda name, timeout_sec: {"ipynb": nbformat.read(source, as_version=4)})
sys.modules["google.colab"] = types.SimpleNamespace(_message=message)
shell = Shell.instance()
shell.register_magic_function(lambda line: print("installs", line), magic_name="pip")
for cell in notebook.cells:
    if cell.cell_type == "code":
        result = shell.run_cell(cell.source)
        result.raise_error()
        if cell.source.startswith("grader.check"):
            print("checked", result.result.name, result.result.passed_all)
"""


@pytest.mark.parametrize("part", PARTS)
def test_checks_work_on_colab(part, tmp_path):
    """On Colab there is no notebook file, and Otter wants its tests in a folder: the set-up cell sees to that."""
    command = [sys.executable, "-c", COLAB, built(part) / "autograder/assignment.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "installs install -q otter-grader" in done.stdout
    checked = re.findall(r"^checked (.*)$", done.stdout, re.M)
    assert sorted(checked) == [f"{question} True" for question in PARTS[part].points]


# Grades


SOLUTIONS = [("similarity", "m_middle"), ("similarity", "section 2/Zoë Ångström")]
SOLUTIONS += [(part, name) for part in PARTS for name in ("a_first", "z_last")]


@pytest.mark.parametrize(("part", "name"), SOLUTIONS)
def test_solution_gets_full_marks_among_the_others(graded, part, name):
    row, total = graded(part)[name], str(PARTS[part].total)
    assert (row["status"], row["reason"], row["total"], row["possible"]) == ("graded", "", total, total)
    assert points(part, row) == PARTS[part].points


@pytest.mark.parametrize("name", HONEST)
def test_guard_hinders_no_honest_work(graded, name):
    row = graded("similarity")[f"honest-{name}"]
    assert (row["status"], row["reason"], row["total"]) == ("graded", "", str(ALL))


@pytest.mark.parametrize("part", PARTS)
def test_untouched_student_version_gets_nothing(graded, part):
    row = graded(part)["student"]
    assert (row["status"], row["total"], row["possible"]) == ("graded", "0", str(PARTS[part].total))
    assert set(points(part, row).values()) == {0}
    assert all(question in row["reason"] for question in PARTS[part].points)


WRONG = [
    (part, question, name)
    for part, assignment in PARTS.items()
    for question, answers in assignment.wrong.items()
    for name in answers
]


@pytest.mark.parametrize(("part", "question", "name"), WRONG)
def test_wrong_answer_loses_the_question_and_no_other(graded, part, question, name):
    row, assignment = graded(part)[f"{question}-{name}"], PARTS[part]
    assert points(part, row) == assignment.points | {question: 0}
    assert row["status"] == "graded" and row["reason"].startswith(f"{question}: ")
    assert row["total"] == str(assignment.total - assignment.points[question])


@pytest.mark.parametrize("part", PARTS)
def test_each_question_has_two_wrong_answers(part):
    assert set(PARTS[part].wrong) == set(PARTS[part].points) and min(map(len, PARTS[part].wrong.values())) >= 2


@pytest.mark.parametrize("name", [*HOSTILE, *HOSTILE_AFTER])
def test_hostile_submission_has_its_own_row_with_a_reason(graded, name):
    _, status, reason, total = (HOSTILE | HOSTILE_AFTER)[name]
    row = graded("similarity")[f"hostile-{name}"]
    assert re.fullmatch(status, row["status"]) and re.search(reason, row["reason"]), row
    assert float(row["total"]) == total == sum(points("similarity", row).values()), row
    assert row["possible"] == str(ALL) and row["reason"].isprintable()


@pytest.mark.parametrize("name", NOT_NOTEBOOKS)
def test_file_that_is_no_notebook_is_invalid(graded, name):
    row = graded("similarity")[f"not-{name}"]
    assert (row["status"], row["total"], row["possible"]) == ("invalid", "0", str(ALL)) and row["reason"]


def test_files_outside_of_a_submission_survive(graded, precious):
    graded("similarity")
    assert [path.name for path in precious.iterdir()] == ["file.txt"]
    assert (precious / "file.txt").read_text() == "precious"


def test_no_process_is_left(graded):
    graded("similarity")
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert b"54321" not in command.read_bytes()


def test_file_that_cannot_be_read_is_not_graded(tmp_path):
    row = grade.grade(tmp_path / "missing.ipynb", {}, 1, 100)
    assert row["status"] == "not graded" and "No such file" in row["reason"]
    with (tmp_path / "large.ipynb").open("wb") as large:
        large.truncate(grade.NOTEBOOK_BYTES + 1)
    row = grade.grade(tmp_path / "large.ipynb", {}, 1, 100)
    assert (row["status"], row["reason"]) == ("invalid", "larger than 20 MB")


def test_commands_name_what_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit):
        grade.main([str(tmp_path), str(tmp_path / "grades.csv")])
    assert f"--part must be one of {', '.join(PARTS)}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        grade.main([str(tmp_path), str(tmp_path / "grades.csv"), "--part", "similarity"])
    assert f"there is no .ipynb file in {tmp_path}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        grade.main([str(tmp_path), str(tmp_path / "grades.csv"), "--part", "cooking"])
    assert "similarity" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="similarity.*'cooking'"):
        assignments.main(["cooking"])


# What goes between grader and submission


@pytest.mark.parametrize("dtype", sandbox.NUMBERS)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 2)])
def test_tensors_and_arrays_pass_unchanged(dtype, shape):
    tensor = (torch.randn(shape) * 5).to(getattr(torch, dtype))
    back = sandbox.decode(json.loads(json.dumps(sandbox.encode(tensor))))
    assert back.dtype == tensor.dtype and back.shape == tensor.shape and torch.equal(back, tensor)
    if dtype != "bfloat16":
        back = sandbox.decode(json.loads(json.dumps(sandbox.encode(tensor.numpy()))))
        assert back.dtype == tensor.numpy().dtype and np.array_equal(back, tensor.numpy()) and back.shape == shape


def test_plain_values_pass_unchanged():
    value = {"a": [1, 2.5, (None, True, "x", -math.inf)], "tensor": [], "b": {"list": ()}}
    assert sandbox.decode(json.loads(json.dumps(sandbox.encode(value)))) == value
    assert math.isnan(sandbox.decode(json.loads(json.dumps(sandbox.encode(math.nan)))))


@pytest.mark.parametrize(
    "value",
    [object(), {1: 2}, {1}, 1j, [torch], torch.tensor(1j), np.array(["a"])],
    ids=lambda value: type(value).__name__,
)
def test_other_values_do_not_pass(value):
    with pytest.raises((TypeError, ValueError)):
        sandbox.decode(json.loads(json.dumps(sandbox.encode(value))))


@pytest.mark.parametrize(
    "forged",
    [
        {},
        {"code": "1 + 1"},
        {"tensor": [1], "dtype": "load", "shape": [1]},
        {"tensor": [1, 2], "dtype": "float32", "shape": [3]},
        {"tensor": "x", "dtype": "float32", "shape": []},
        {"array": [1], "dtype": "object", "shape": [1]},
        {"array": [1]},
        {"list": 3},
        {"dict": [1]},
    ],
    ids=str,
)
def test_forged_value_is_an_error(forged):
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError, RuntimeError, StopIteration)):
        sandbox.decode(forged)
