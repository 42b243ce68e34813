"""Processes of their own that begin with the library imported: forked from a server that has done nothing else.

Importing CompressAI takes seconds, which a fresh interpreter needs before it does what a test is about.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"  # Windows has none
_CONTEXT = multiprocessing.get_context(METHOD)
# No matplotlib: while it is imported it asks whether it is in a kernel.
PRELOADED = ["distributed", "entroformer_lib.studies.measuring", "entroformer_lib.codec.many", "ipykernel.kernelapp"]


def ensure_server() -> None:
    """Starts the server where none is. Its processes have one thread, as those of dask."""
    if METHOD == "spawn":
        return
    _CONTEXT.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()


def start(
    function: Callable,
    *arguments,
    output: Path,
    environment: Mapping[str, str] = os.environ,
    folder: Path = Path(),
) -> BaseProcess:
    """Starts a function of a module.

    output: the file for what it says, errors too. folder: where it works.
    """
    ensure_server()
    given = (dict(environment), str(folder.absolute()), str(output))
    process = _CONTEXT.Process(target=_begin, args=(function, arguments, *given))
    process.start()
    return process


def _begin(function: Callable, arguments: tuple, environment: dict[str, str], folder: str, output: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with open(output, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    function(*arguments)


def entroformer(*words) -> None:
    """`python -m entroformer_lib`, from inside a process of its own."""
    sys.argv = ["entroformer", *map(str, words)]
    runpy.run_module("entroformer_lib", run_name="__main__", alter_sys=True)


def run(*words, output: Path) -> tuple[int, str]:
    """A command in a process of its own.  ->  its exit code, and what it said"""
    process = start(entroformer, *words, output=output)
    process.join()
    return process.exitcode, output.read_text()
