"""Files that are either whole or not there, and where the project's own data lies."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from entroformer_lib.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; takes `path`'s place on success, and is removed on any failure."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file or none.

    Raises:
        UserError: the disk is full, the folder is missing or may not be written to.
    """
    try:
        with replacing(path) as part, open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}.") from None


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Checksum of a file in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def data_folder() -> Path:
    """The folder `data/` of the repository, or its copy inside an installed package."""
    repository = Path(__file__).parents[1] / "data"
    return repository if (repository / "weights").is_dir() else Path(__file__).parent / "_data"
