"""What the commands of the studies share: nonsense is refused before any work, in one sentence."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from entroformer_lib.errors import StudyError, UserError


def at_least(least: int, **values: int | None) -> None:
    """Refuses numbers that are too small; None stands for a default.

    Raises:
        StudyError: names the first.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise StudyError(f"{name.replace('_', ' ')} must be at least {least}; it is {value}.")


def check_place(out: Path) -> None:
    """Makes the folder of a result, before anything is measured.

    Raises:
        StudyError: the result could not be written there, or a file there is none.
    """
    if out.is_dir():
        raise StudyError(f"{out} is a folder; the result must be a file.")
    if out.is_file() and not _is_result(out):
        raise StudyError(f"{out} exists and is not a result; choose another name.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"The folder {out.parent} cannot be made: {error.strerror}.") from None
    if not os.access(out.parent, os.W_OK):
        raise StudyError(f"Nothing can be written into the folder {out.parent}.")


def check_weights(out: Path | None, model) -> None:
    """Refuses a result of other weights in the place of a new one.

    Raises:
        StudyError: there is one.
    """
    from entroformer_lib.weights.zoo import weights_digest

    if out is not None and out.is_file():
        about = json.loads(out.read_bytes())["provenance"]
        if about.get("weights_sha256") not in (None, weights_digest(model).hex()):
            raise StudyError(f"{out} is the result of other weights ({about.get('model')}); choose another name.")


def _is_result(path: Path) -> bool:
    try:
        return "provenance" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def run(command: Callable[[], object]) -> None:
    """Runs a command; what the user can put right becomes one sentence and exit code 1."""
    try:
        command()
    except UserError as error:
        sys.exit(f"{error}")
