"""Files that are either whole or not there, and where the project's own data lies."""

import hashlib
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from entroformer_lib.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a new path to write to; what is written takes `path`'s place on success, and is removed on any failure.

    A link is followed, a file that is replaced keeps its mode, and into what is no regular file, such as a pipe or a
    device, the bytes are copied.
    """
    special = path.exists() and not path.is_file()
    path = path if special else Path(os.path.realpath(path))  # the pipe behind /dev/stdout has no other name
    folder = Path(tempfile.gettempdir()) if special else path.parent
    part = folder / f".entroformer-{uuid.uuid4().hex}.part"
    part.touch()  # which gives it the mode of a new file, whatever its writer does later
    mode = (path if path.is_file() else part).stat().st_mode
    try:
        yield part
        if special:
            with open(part, "rb") as source, open(path, "wb") as sink:
                shutil.copyfileobj(source, sink)
            part.unlink()
        else:
            with open(part, "rb+") as written:
                os.fsync(written.fileno())  # or after a power cut an empty file may stand in the old one's place
            part.chmod(stat.S_IMODE(mode))
            os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def remove_parts(folder: Path) -> None:
    """Removes what killed processes were writing in a folder. Only for who is alone in it."""
    for part in folder.glob(".entroformer-*.part"):
        part.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file or none.

    Raises:
        UserError: the disk is full, the folder is missing or may not be written to.
    """
    try:
        with replacing(path) as part, open(part, "wb") as file:
            file.write(data)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}.") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds that this library wrote.

    Raises:
        UserError: it is damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        raise UserError(f"{path} is damaged: it holds no JSON.") from None


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Checksum of a file in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def in_text(name: str) -> str:
    """A file's name, which need not be text, as text."""
    return os.fsencode(name).decode(errors="backslashreplace")


def data_folder() -> Path:
    """The folder `data/` of the repository, or its copy inside an installed package."""
    repository = Path(__file__).parents[1] / "data"
    return repository if (repository / "weights").is_dir() else Path(__file__).parent / "_data"
