"""Kernels of notebooks, forked from a process that has imported the library."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import warm
from ipykernel.kernelapp import launch_new_instance
from jupyter_client import BlockingKernelClient, write_connection_file


def begin_kernel(connection: str) -> None:
    """In a process of its own, which ends when the server of such processes does."""
    launch_new_instance(["-f", connection, f"--IPKernelApp.parent_handle={os.getppid()}"])


@contextmanager
def kernel(folder: Path, environment: dict[str, str], place: Path) -> Iterator[BlockingKernelClient]:
    """A kernel in a process of its own.  folder: for its files; place: where its cells work"""
    connection, _ = write_connection_file(str(folder / "kernel.json"))
    given = dict(output=folder / "kernel.txt", environment=environment, folder=place)
    process = warm.start(begin_kernel, connection, **given)
    client = BlockingKernelClient(connection_file=connection)
    client.load_connection_file()
    client.start_channels(hb=False)  # no beats are no death: it may take its time to begin
    try:
        client.wait_for_ready(timeout=300)
        yield client
    finally:
        client.stop_channels()
        process.kill()
        process.join()
