"""Grade a folder of notebooks, each in a process of its own, and write a table.

From the project's root::

    python book/_tools/grade.py SUBMISSIONS OUT [--part similarity] [--time 60] [--memory 4000] [--jobs 2]

``SUBMISSIONS`` is a folder; notebooks in folders below it count, too. ``OUT`` is a CSV file with a row for each:
``file``, ``status``, ``reason``, ``total``, ``possible``, and the points of each question. The status is

- ``graded``: all cells were run and all tests asked; the reason lists cells that raised and tests that failed;
- ``time limit``: still running when its time was over;
- ``ended``: its process ended early, by ``os._exit`` or a crash;
- ``invalid``: not a notebook;
- ``not graded``: a failure of the grader's own.

The tests are those of the autograder that ``make assignments`` makes, and they run here. The submission runs in another
process (``sandbox.py``): where a test calls a student's function, the arguments go there and the value comes back, as
JSON. What a submission does to ``torch.allclose`` or to Otter, it does to its own process only.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import sandbox
from otter.test_files.exception_test import ExceptionTestFile

START_SECONDS = 120  # for the grader's own part of a start, before the first cell
NOTEBOOK_BYTES = 20 * 2**20
ANSWER_BYTES = 4 * 2**20
REASON_LENGTH = 2000
CONTEXT = multiprocessing.get_context("forkserver")
LOCK = threading.Lock()  # multiprocessing expects one thread at a time to start and end processes


class NoAnswer(Exception):
    """The submission answers no more."""


class Student:
    """A submission in its process. Stands in for the namespace that Otter's tests run against.

    Args:
        notebook: path of the notebook, alone in the folder that the submission may write to.
        seconds: limit on the time from the first cell to the last answer.
        megabytes: limit on the memory that it takes, in MB.

    Raises:
        OSError: if the process does not start.
    """

    def __init__(self, notebook: Path, seconds: float, megabytes: int) -> None:
        self.status, self.reason = "graded", ""  # or why it answers no more
        self._seconds = seconds
        self._received = b""
        self._channel, theirs = socket.socketpair()
        self._process = CONTEXT.Process(
            target=sandbox.run, args=(theirs, str(notebook), seconds, megabytes), daemon=True
        )
        with LOCK, theirs:
            self._process.start()
        self._deadline = time.monotonic() + START_SECONDS
        try:
            self._ask()
        except NoAnswer:
            self.end()
            raise OSError(f"the sandbox did not start: {self.reason}") from None
        self._deadline = time.monotonic() + seconds

    def run_cells(self) -> list[str]:
        """Wait until all cells were run; return what they raised."""
        message = self._ask()
        if "invalid" in message:
            self._over("invalid", str(message["invalid"]))
        if not isinstance(message.get("errors"), list):
            self._over("ended", "forged message")
        return [str(error) for error in message["errors"]]

    def get(self, name: str, default: Any = None) -> Callable[..., Any]:
        """The student's function of that name; whether there is one shows when it is called."""
        return partial(self._call, name)

    def end(self) -> None:
        """End the process, and those that it started."""
        self._channel.close()
        with LOCK:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()

    def _call(self, name: str, /, *args: Any, **options: Any) -> Any:
        reply = self._ask({"call": name, "args": sandbox.encode(list(args)), "options": sandbox.encode(options)})
        if "value" in reply:
            return sandbox.decode(reply["value"])
        kind, message = reply["error"]
        raise {"TypeError": TypeError, "ValueError": ValueError}.get(kind, RuntimeError)(f"{name}: {kind}: {message}")

    def _ask(self, request: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request, if there is one, and return the next message."""
        if self.status != "graded":
            raise NoAnswer(self.status)
        try:
            if request:
                self._channel.settimeout(self._rest())
                self._channel.sendall(json.dumps(request).encode() + b"\n")
            while b"\n" not in self._received:
                self._channel.settimeout(self._rest())
                more = self._channel.recv(2**16)
                if not more:
                    raise ConnectionError
                self._received += more
                if len(self._received) > ANSWER_BYTES:
                    self._over("ended", f"answer larger than {ANSWER_BYTES // 2**20} MB")
        except TimeoutError:
            self._over("time limit", f"still running after {self._seconds:g} s")
        except ConnectionError:
            self._over("ended", f"its process ended: {self._how()}")
        line, self._received = self._received.split(b"\n", 1)
        with suppress(ValueError, RecursionError):
            if isinstance(message := json.loads(line), dict):
                return message
        self._over("ended", "forged message")

    def _rest(self) -> float:
        rest = self._deadline - time.monotonic()
        if rest <= 0:
            raise TimeoutError
        return rest

    def _how(self) -> str:
        with LOCK:
            self._process.join(2)
            code = self._process.exitcode
        if code is None:
            return "it hung up"
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name

    def _over(self, status: str, reason: str) -> NoReturn:
        self.status, self.reason = status, reason
        raise NoAnswer(reason)


def grade(notebook: Path, tests: dict[str, str], seconds: float, megabytes: int) -> dict[str, Any]:
    """Grade one notebook.

    Args:
        notebook: path of the notebook.
        tests: for each question, the source of its Otter test file, in the exception-based form.
        seconds: limit on the time from the first cell to the last answer.
        megabytes: limit on the memory that the submission takes, in MB.

    Returns:
        The row of the table, without the file's name. Never raises for anything that a submission does.
    """
    files = {question: ExceptionTestFile.from_string(source) for question, source in tests.items()}
    row = {"status": "not graded", "reason": "", "total": 0, "possible": sum(file.possible for file in files.values())}
    row |= dict.fromkeys(files, 0)
    reasons = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            if notebook.stat().st_size > NOTEBOOK_BYTES:
                return row | {"status": "invalid", "reason": f"larger than {NOTEBOOK_BYTES // 2**20} MB"}
            student = Student(shutil.copy(notebook, Path(folder) / "submission.ipynb"), seconds, megabytes)
        except OSError as error:
            return row | {"reason": _short(str(error))}
        try:
            reasons += student.run_cells()
            for question, file in files.items():
                file.run(student)
                row[question] = file.score
                if failed := next((result for result in file.test_case_results if not result.passed), None):
                    reasons.append(f"{question}: {failed.message.split(chr(10), 3)[-1]}")
        except NoAnswer:
            pass
        finally:
            student.end()
    row["total"] = sum(row[question] for question in files)
    reasons = [reason for reason in (student.reason, *reasons) if reason]
    share = REASON_LENGTH // max(len(reasons), 1) - 2  # each is named, however many there are
    return row | {"status": student.status, "reason": _short("; ".join(reason[:share] for reason in reasons))}


def _short(text: str) -> str:
    """One line of printable text that fits into a cell of a table."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(text[:REASON_LENGTH].split())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    import assignments

    parts = assignments.parts()
    parser = argparse.ArgumentParser(description="Grade a folder of notebooks, each in a process of its own.")
    parser.add_argument("submissions", type=Path, help="folder with the notebooks")
    parser.add_argument("out", type=Path, help="the CSV file to write")
    parser.add_argument("--part", choices=parts, help="part of the assignment; needed only if several parts have one")
    parser.add_argument("--time", type=float, default=60, help="seconds for each notebook (default 60)")
    parser.add_argument("--memory", type=int, default=4000, help="MB for each notebook (default 4000; Linux only)")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at a time (default 2)")
    options = parser.parse_args(arguments)
    if options.part is None and len(parts) > 1:
        parser.error(f"--part must be one of {', '.join(parts)}")
    notebooks = sorted(path for path in options.submissions.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
    if not notebooks:
        parser.error(f"submissions must be a folder with notebooks; there is no .ipynb file in {options.submissions}")

    # One template process imports what most submissions import; each submission is forked from it.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    CONTEXT.set_forkserver_preload(
        ["IPython.core.interactiveshell", "nbformat", "otter.test_files", "scipy.optimize", "torch"]
    )
    with zipfile.ZipFile(assignments.autograder(options.part or parts[0])) as archive:
        tests = {
            Path(name).stem: archive.read(name).decode()
            for name in sorted(archive.namelist())
            if name.startswith("tests/")
        }
    with options.out.open("w", newline="", encoding="utf-8") as table, ThreadPoolExecutor(options.jobs) as pool:
        writer = csv.DictWriter(table, ["file", "status", "reason", "total", "possible", *tests])
        writer.writeheader()
        one = partial(grade, tests=tests, seconds=options.time, megabytes=options.memory)
        for notebook, row in zip(notebooks, pool.map(one, notebooks), strict=True):
            row = {key: f"{value:g}" if isinstance(value, int | float) else value for key, value in row.items()}
            row["file"] = notebook.relative_to(options.submissions).as_posix()
            writer.writerow(row)
            table.flush()
            print(
                f"{row['file']}: {row['total']} of {row['possible']} ({row['status']}) {row['reason']}", file=sys.stderr
            )


if __name__ == "__main__":
    main()
