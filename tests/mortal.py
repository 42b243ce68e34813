"""Work at which processes die, for test_cluster.py. Every new worker imports this file, so it imports little."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from entroformer_lib.codec import many
from entroformer_lib.studies.measuring import Coding


@dataclass(frozen=True)
class Mortal(many.Compress):
    """Work at which the process dies when the file is `deadly.png`: once, or every time."""

    note: str = ""
    always: bool = False

    def __call__(self, source, form):
        die(source, self.note, self.always)
        return super().__call__(source, form)


@dataclass(frozen=True)
class MortalCoding(Coding):
    """The same of a coding."""

    note: str = ""
    always: bool = False

    def __call__(self, folder=None, answer="answer"):
        die(Path(self.picture), self.note, self.always)
        return super().__call__(folder, answer)


def die(path: Path, note: str, always: bool) -> None:
    if path.name == "deadly.png":
        with open(note, "a") as file:
            file.write(f"{os.getpid()}\n")
        if always or len(Path(note).read_text().split()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
