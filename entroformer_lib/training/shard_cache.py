"""Shards from an object store or the web: fetched whole into a folder of bounded size, which all processes share.

A shard belongs to whoever holds its lock while it is fetched, opened or thrown away, so nobody sees half of one and
none is fetched twice at a time. What was not used for longest is thrown away first. A reader keeps the file that it
has open, whatever happens to its name meanwhile.
"""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from entroformer_lib.errors import DataError
from entroformer_lib.files import file_digest

# What fsspec speaks by these names needs a package that is not always there.
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}


def is_remote(name: str) -> bool:
    """Whether a name is an address, or a command whose output is meant (pipe:COMMAND)."""
    return "://" in name or name.startswith("pipe:")


def file_name(path: str | os.PathLike) -> str:
    """The name of a file that was found in a folder, so that it is never taken for an address or a command."""
    name = os.fspath(path)
    return os.path.join(os.curdir, name) if is_remote(name) else name


def default_folder() -> Path:
    """Where shards are kept when nobody says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "entroformer" / "shards"


@dataclass(frozen=True)
class ShardCache:
    """A folder for fetched shards.

    gigabytes: how much it may hold. A shard that is thrown away while a process reads it takes room until that one is
    done with it, so the disk needs more: one shard for each picture of the batch, at most.
    """

    folder: Path
    gigabytes: float = 50.0

    def open(self, name: str, sha256: str | None = None, checked: bool = False) -> BinaryIO:
        """A shard, opened for reading; fetched first where it is an address and not here.

        Args:
            sha256: the shard's, by the manifest; what was kept of another shard at the same address is not taken for
                this one.
            checked: a shard that is fetched must have this checksum.

        Raises:
            DataError: it cannot be fetched, or is another one.
        """
        if not is_remote(name):
            return open(name, "rb")
        path = self._place(name, sha256)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(path).acquire():
            if not path.exists():
                part = path.with_name(path.name + ".part")  # one left by a killed process is written over
                try:
                    fetch(name, part)
                    if checked and file_digest(part) != sha256:
                        raise DataError(f"The shard {name} has not the checksum that its manifest says.")
                    os.replace(part, path)
                finally:
                    part.unlink(missing_ok=True)
            os.utime(path, ns=(time.time_ns(),) * 2)  # finer than the system's own clock of files
            file = open(path, "rb")  # noqa: SIM115  the reader closes it
        self._shrink(path)
        return file

    def _place(self, name: str, sha256: str | None) -> Path:
        readable = re.sub(r"[^\w.-]", "_", name.rpartition("/")[2])[-80:]
        return self.folder / f"{hashlib.sha256(f'{name} {sha256}'.encode()).hexdigest()[:16]}-{readable}"

    def _lock(self, path: Path) -> FileLock:
        return FileLock(path.with_name(path.name + ".lock"))

    def _shrink(self, newest: Path) -> None:
        """Throws away what was used longest ago, until the rest fits. What another process holds the lock of stays."""
        files = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # somebody else threw it away
                if path.suffix != ".lock":
                    files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.gigabytes * 1e9:
                break
            if path == newest:
                continue
            lock = self._lock(path.with_name(path.name.removesuffix(".part")))
            with suppress(Timeout, PermissionError), lock.acquire(0):  # PermissionError: Windows removes no open file
                path.unlink(missing_ok=True)
                total -= size


def fetch(name: str, path: Path) -> None:
    """Writes what an address or a command gives into a file.

    Raises:
        DataError: it gives nothing, or less than it should.
    """
    if name.startswith("pipe:"):
        from webdataset import gopen

        with _in_a_sentence(name), closing(gopen(name)) as source, open(path, "wb") as file:
            shutil.copyfileobj(source, file)
        return
    with _in_a_sentence(name):
        system, place = _system(name)
        system.get_file(place, str(path))
        size = system.info(place).get("size")
        if size is not None and size != path.stat().st_size:
            raise OSError(f"it has {size} bytes, and {path.stat().st_size} came")


def read(name: str) -> bytes | None:
    """A small file, here or at an address; None where there is none."""
    if not is_remote(name):
        return Path(name).read_bytes() if Path(name).is_file() else None
    try:
        with _in_a_sentence(name):
            system, place = _system(name)
            return system.cat_file(place)
    except _NotThere:
        return None


def matches(pattern: str) -> list[str]:
    """The addresses that a pattern with * stands for, sorted."""
    with _in_a_sentence(pattern):
        system, place = _system(pattern)
        return sorted(system.unstrip_protocol(found) for found in system.glob(place))


def _system(name: str):
    """fsspec's file system for an address, and what that calls the file."""
    import fsspec

    return fsspec.core.url_to_fs(name)


class _NotThere(DataError):
    """An address where nothing is, or nothing that this user may know of."""


@contextmanager
def _in_a_sentence(name: str) -> Iterator[None]:
    """Inside, whatever a store or server answers becomes a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # each store has its own
        protocol = name.partition("://")[0]
        status = getattr(error, "status", None)  # aiohttp's; s3fs raises Python's own errors
        if isinstance(error, ImportError) and protocol in PACKAGES:
            raise DataError(f"{protocol}:// needs a package: pip install {PACKAGES[protocol]}") from None
        if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ == "NoCredentialsError":
            answer = f"the store answers {status or 403}; its credentials are missing or do not suffice"
            raise _NotThere(f"{name} may not be read: {answer}.") from None
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            raise _NotThere(f"There is nothing at {name}.") from None
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(f"{name} cannot be fetched: {reason}.") from None
