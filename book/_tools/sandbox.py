"""The inside of the grader: run the cells of one submission, then call its functions when asked.

:func:`run` is the body of a process of its own; ``grade.py`` is its other side. They speak over a socket, a line of
JSON each way, and nothing that comes out of a submission is ever unpickled or executed by the grader. The limits and
the guard stop accidents and simple attacks: a seat belt, not a jail.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import socket
import struct
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import torch
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

FILE_BYTES = 16 * 2**20
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.chmod", "os.chown", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.utime")
REFUSED = (
    "ctypes.",
    "os.exec",
    "os.fork",
    "os.kill",
    "os.posix_spawn",
    "os.system",
    "pty.",
    "resource.",
    "socket.",
    "subprocess.",
)
NUMBERS = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def encode(value: Any) -> Any:
    """Turn numbers, strings, tensors, arrays, and lists, tuples and dicts of them, into plain JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": value.detach().cpu().flatten().tolist(), "dtype": dtype, "shape": list(value.shape)}
    if isinstance(value, np.ndarray | np.generic):
        return {"array": value.flatten().tolist(), "dtype": value.dtype.name, "shape": list(value.shape)}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [encode(item) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item) for key, item in value.items()}}
    raise TypeError(f"a graded function may return numbers, strings, tensors and arrays, got {type(value).__name__}")


def decode(value: Any) -> Any:
    """Turn what :func:`encode` made back into the value; for forged text, raise an ``Exception`` or make a value."""
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "dict":
        return {key: decode(item) for key, item in content.items()}
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](decode(item) for item in content)
    if kind not in ("tensor", "array") or value["dtype"] not in NUMBERS:
        raise ValueError(
            f"a graded function may return tensors and arrays of numbers, got {kind} of {value.get('dtype')}"
        )
    if kind == "tensor":
        return torch.tensor(content, dtype=getattr(torch, value["dtype"])).reshape(value["shape"])
    return np.array(content, dtype=value["dtype"]).reshape(value["shape"])


def guard(folder: str) -> None:
    """Refuse from now on to start processes, to use the network, and to change files outside of one folder.

    Args:
        folder: the folder in which files may be written, a real path.
    """

    def targets(event: str, args: tuple[Any, ...]) -> list[tuple[Any, int]]:
        """The paths that an event changes, each with the open folder that it is relative to, or -1."""
        if event == "open":
            return [(args[0], -1)] if args[2] & WRITES else []
        if event in ("os.link", "os.rename"):
            return list(zip(args[:2], args[2:], strict=True))
        if event == "os.symlink":
            return [args[1:]]
        return [(args[0], -1 if event == "os.truncate" else args[-1])] if event in CHANGES else []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"a submission may not use {event}")
        for path, relative_to in targets(event, args):
            if isinstance(path, int):  # a file that is open already
                continue
            path = os.fsdecode(path)
            if relative_to >= 0:
                path = os.path.join(os.readlink(f"/proc/self/fd/{relative_to}"), path)
            if path != os.devnull and not os.path.realpath(path).startswith(folder + os.sep):
                raise PermissionError(f"a submission may not change files outside of its folder ({event})")

    if landlock_version():
        _landlock(folder)
    sys.addaudithook(hook)


def landlock_version() -> int:
    """The version of Landlock in this kernel, 0 if it has none."""
    return max(ctypes.CDLL(None).syscall(444, None, 0, 1), 0) if sys.platform == "linux" else 0


def _landlock(folder: str) -> None:
    """Have Linux refuse the same to C code, which no audit hook sees."""
    create_ruleset, add_rule, restrict_self, set_no_new_privileges = 444, 445, 446, 38
    libc, version = ctypes.CDLL(None, use_errno=True), landlock_version()
    execute, write, truncate = 1 << 0, 1 << 1, 1 << 14
    files = execute | write | sum(1 << bit for bit in range(4, 12 + min(version, 3)))  # 4 and up: make and remove
    tcp, abstract_sockets_and_signals = 0b11, 0b11
    rules = struct.pack("=QQQ", files, tcp, abstract_sockets_and_signals)[
        : 8 if version < 4 else 16 if version < 6 else 24
    ]
    ruleset = libc.syscall(create_ruleset, rules, len(rules), 0)
    for path, allowed in ((folder, files & ~execute), (os.devnull, files & (write | truncate))):
        opened = os.open(path, os.O_PATH)
        libc.syscall(add_rule, ruleset, 1, struct.pack("=Qi", allowed, opened), 0)
        os.close(opened)
    libc.prctl(set_no_new_privileges, 1, 0, 0, 0)
    if libc.syscall(restrict_self, ruleset, 0):
        raise OSError(ctypes.get_errno(), "Landlock refused its rules")
    os.close(ruleset)


def limit(seconds: float, megabytes: int) -> None:
    """Limit this process: its processor time, the memory it takes beyond what it holds now, and the size of a file.

    Args:
        seconds: the grader's own limit, in time on the clock; this one stops what has lost its grader.
        megabytes: memory, in MB; only on Linux.
    """
    limits = {resource.RLIMIT_CPU: int(2 * seconds) + 10, resource.RLIMIT_FSIZE: FILE_BYTES, resource.RLIMIT_CORE: 0}
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + megabytes * 10**6
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))


class _Otter:
    """Stands in for ``otter.Notebook``: the tests run in the grader, so a check in the notebook does nothing."""

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: None


def run(channel: socket.socket, notebook: str, seconds: float, megabytes: int) -> None:
    """Run a notebook's code cells as Jupyter would, going on after an error, then answer calls until the hang-up.

    Sends ``{"ready": true}`` before the first cell, then ``{"errors": [...]}``, or ``{"invalid": why}`` for a file that
    is no notebook. Then each line ``{"call": name, "args": ..., "options": ...}`` gets ``{"value": ...}`` or
    ``{"error": [type, message]}``. What the submission prints is thrown away.

    Args:
        channel: the socket to the grader.
        notebook: path of the notebook, alone in the folder that the submission may write to.
        seconds: the grader's limit on the time from the first cell to the last answer.
        megabytes: limit on memory, in MB.
    """

    def send(message: dict[str, Any]) -> None:
        channel.sendall(json.dumps(message).encode() + b"\n")

    os.setsid()
    folder = os.path.realpath(os.path.dirname(notebook))
    os.chdir(folder)
    for stream in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    path = os.environ.get("PATH", os.defpath)
    os.environ.clear()
    os.environ.update(PATH=path, HOME=folder, TMPDIR=folder, IPYTHONDIR=folder, MPLBACKEND="agg", LANG="C.UTF-8")
    tempfile.tempdir = folder
    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    shell.showtraceback = shell.showsyntaxerror = lambda *args, **options: None
    sys.dont_write_bytecode = True
    sys.modules.update(otter=SimpleNamespace(Notebook=_Otter), lossbook=None)
    torch.set_num_threads(1)
    limit(seconds, megabytes)
    guard(folder)
    send({"ready": True})

    try:
        cells = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    except Exception as error:
        send({"invalid": f"{type(error).__name__}: {error}"})
        return
    errors = []
    for number, source in enumerate(cells, start=1):
        result = shell.run_cell(source)
        if error := result.error_before_exec or result.error_in_exec:
            errors.append(f"code cell {number}: {type(error).__name__}: {error}")
    send({"errors": errors})

    for line in channel.makefile():
        request = json.loads(line)
        try:
            if request["call"] not in shell.user_ns:
                raise NameError(f"{request['call']} is not defined")
            value = shell.user_ns[request["call"]](*decode(request["args"]), **decode(request["options"]))
            reply = {"value": encode(value)}
        except BaseException as error:  # SystemExit, too
            reply = {"error": [type(error).__name__, str(error)]}
        send(reply)
