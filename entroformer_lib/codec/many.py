"""Files to files: what `entroformer compress` and `decompress` do to one file, and how they go through many.

An output is whole or not there (`files.replacing`), so one that exists is done. Of many, every file is coded on a
single thread, in this process or in several, so the outputs do not depend on how many. A file that cannot be coded
costs itself alone, and so does one at which a process dies.

Not with concurrent.futures: its pool breaks as a whole when a process dies, and when the parent is killed its processes
stay. Here each process has a pipe of its own, whose end tells both sides.
"""

import contextlib
import functools
import glob
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from entroformer_lib.codec import codec, pictures
from entroformer_lib.codec.container import MAX_PIXELS, Container
from entroformer_lib.datasets import files_under, is_picture
from entroformer_lib.errors import DataError, in_words
from entroformer_lib.files import write_bytes
from entroformer_lib.memory import keep_freed_memory
from entroformer_lib.weights.zoo import device_of, load_model

Job = tuple[Path, Path]  # a file and its output
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_load = functools.lru_cache(maxsize=2)(load_model)
_load_named = functools.lru_cache(maxsize=2)(codec.model_named)


def _ready(device: str) -> None:
    """Forgets the models of earlier commands, whose files may have been written anew."""
    keep_freed_memory()
    _load.cache_clear()
    _load_named.cache_clear()
    device_of(device)


@dataclass(frozen=True)
class Compress:
    """Pictures to `.ef` files.  model: name or file. bpp: the most bits per pixel that a file may have."""

    model: str
    bpp: float | None = None
    device: str = "auto"

    ending = ".ef"
    what = "picture"

    def prepare(self) -> None:
        """Raises UserError for what would be wrong with every picture."""
        codec.check_bpp(self.bpp)
        _ready(self.device)
        _load(self.model, self.device)

    def takes(self, path: Path) -> bool:
        """Whether a file in a folder is meant."""
        return is_picture(path)

    def __call__(self, source: Path | bytes, form: str) -> tuple[bytes, dict]:
        """An `.ef` file; and its bytes, width, height, bpp, and notes: a sentence for each thing that is not kept."""
        picture = pictures.open_picture(source)
        data = codec.encode(_load(self.model, self.device), picture, self.bpp)
        bpp = 8 * len(data) / (picture.width * picture.height)
        facts = {"bytes": len(data), "width": picture.width, "height": picture.height, "bpp": bpp}
        return data, {**facts, "notes": pictures.losses(picture)}


@dataclass(frozen=True)
class Decompress:
    """`.ef` files to pictures.  model: name or file; None takes the one that the file names. max_pixels: a file that
    claims more is refused."""

    model: str | None = None
    device: str = "auto"
    max_pixels: int = MAX_PIXELS

    ending = ".png"
    what = ".ef file"

    def prepare(self) -> None:
        """Raises UserError for what would be wrong with every file."""
        _ready(self.device)
        if self.model is not None:
            _load(self.model, self.device)

    def takes(self, path: Path) -> bool:
        """Whether a file in a folder is meant."""
        return path.suffix.lower() == ".ef"

    def __call__(self, source: Path | bytes, form: str) -> tuple[bytes, dict]:
        """A picture in the format of the ending `form`; and its width, height, and notes, of which there are none."""
        data = source if isinstance(source, bytes) else read(source)
        container = Container.unpack(data)
        container.check_pixels(self.max_pixels)
        pictures.file_of("L" if container.grey else "RGB", form)
        model = _load_named(container.model, self.device) if self.model is None else _load(self.model, self.device)
        picture = codec.decode(data, model, max_pixels=self.max_pixels)
        return pictures.file_of(picture, form), {"width": picture.width, "height": picture.height, "notes": []}


Work = Compress | Decompress


def read(file: Path) -> bytes:
    """The bytes of an `.ef` file.

    Raises:
        DataError: a folder, or no file.
    """
    if file.is_dir():
        raise DataError(f"{file} is a folder, not an .ef file.")
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise DataError(f"There is no file {file}.") from None


# ---- which files, and where they go ----


def means_many(inputs: Sequence[str], output: str | None) -> bool:
    """Whether a command names many files: several, a folder, a pattern, or a folder (that ends with /) to write to."""
    return (
        len(inputs) > 1
        or (inputs[0] != "" and os.path.isdir(inputs[0]))
        or _is_pattern(inputs[0])
        or (output is not None and output.endswith(("/", os.sep)))
    )


def _is_pattern(name: str) -> bool:
    return glob.has_magic(name) and not os.path.lexists(name)


def jobs_of(inputs: Sequence[str], out: Path, work: Work) -> list[Job]:
    """All files that are meant, sorted, and the output of each.

    Files keep their place below the folder that all inputs have in common. Where two would have the same output, such
    as a.png and a.jpg, the ending of the picture stays: a.png.ef.

    Args:
        inputs: files, folders (with their subfolders), patterns such as photos/**/*.png. Of folders and patterns those
            are taken whose ending fits.

    Raises:
        DataError: nothing is found, or two outputs would have one name nevertheless.
    """
    files, roots = {}, set()  # files by their absolute names: no file is done twice
    for name in inputs:
        if name in ("", "-"):
            raise DataError(f"'{name}' does not name one of many files.")
        if _is_pattern(name) or os.path.isdir(name):
            found = [path for path in _under(name) if work.takes(path)]
            if not found:
                raise DataError(f"There is no {work.what} in {name}, as a folder or a pattern.")
            roots.add(_fixed_part(name))
        else:
            found = [Path(name)]
            roots.add(os.path.dirname(os.path.abspath(name)))
        files.update((Path(os.path.abspath(path)), path) for path in found)
    try:
        root = os.path.commonpath(roots)
    except ValueError:
        raise DataError("The files lie on several drives; compress those of each by themselves.") from None
    places = {file: out / file.relative_to(root) for file in sorted(files)}
    alike = Counter(_key(place.with_suffix(work.ending)) for place in places.values())
    outputs = {}
    for file, place in places.items():
        short, long = place.with_suffix(work.ending), place.with_name(place.name + work.ending)
        outputs[file] = short if alike[_key(short)] == 1 else long
    counts = Counter(map(_key, outputs.values()))
    for file, output in outputs.items():
        if counts[_key(output)] > 1:
            raise DataError(f"{file} and another file would both become {output}; rename one of them.")
    return [(files[file], output) for file, output in outputs.items()]


def _under(name: str) -> list[Path]:
    if not _is_pattern(name):
        return files_under(name)
    matches = map(Path, glob.glob(name, recursive=True))
    return [path for match in matches for path in (files_under(match) if match.is_dir() else [match])]


def _fixed_part(name: str) -> str:
    """The folder itself, or of a pattern what stands before its first wildcard."""
    path = os.path.abspath(name)
    while _is_pattern(path):
        path = os.path.dirname(path)
    return path


def _key(path: Path) -> str:
    """Some file systems take Cat.ef and cat.ef for one."""
    return str(path).casefold()


def left_to_do(jobs: list[Job], force: bool, resume: bool) -> list[Job]:
    """The jobs without those that are done, where `resume` asks for that.

    Raises:
        DataError: outputs exist, and neither `force` nor `resume` says what to do about them.
    """
    if force and resume:
        raise DataError("--force replaces what exists, and --resume keeps it; choose one.")
    there = [output for _, output in jobs if output.is_file()]
    if there and not (force or resume):
        raise DataError(
            f"{len(there)} of {len(jobs)} outputs exist, {there[0]} among them; --resume keeps them, "
            "--force replaces them."
        )
    return [job for job in jobs if not (resume and job[1].is_file())]


# ---- all of them ----


def go_through(work: Work, jobs: list[Job], count: int | None = None) -> Iterator[dict]:
    """Does all jobs.  ->  a row for each, in their order: file, output; what `work` tells, or error: a sentence

    Args:
        count: processes; default: as many as there are cores, or one on a GPU.

    Raises:
        UserError: what would be wrong with every file, before any is touched.
    """
    work.prepare()
    if count is None:
        from dask.system import CPU_COUNT

        count = CPU_COUNT if device_of(work.device).type == "cpu" else 1
    count = min(count, len(jobs))
    if count > 1:
        yield from _in_order(_in_processes(work, jobs, count))
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for job in jobs:
            yield _do(work, job)
    finally:
        torch.set_num_threads(before)


def _do(work: Work, job: Job) -> dict:
    """One file, with whatever is wrong with it as a sentence."""
    source, output = job
    row = {"file": str(source), "output": str(output)}
    try:
        data, facts = work(source, output.suffix)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(output, data)
    except Exception as error:
        return {**row, "error": in_words(error)}
    return {**row, **facts}


def _in_order(numbered: Iterator[tuple[int, dict]]) -> Iterator[dict]:
    early, following = {}, 0
    for number, row in numbered:
        early[number] = row
        while following in early:
            yield early.pop(following)
            following += 1


def _in_processes(work: Work, jobs: list[Job], count: int) -> Iterator[tuple[int, dict]]:
    """Numbers of jobs and their rows, as they are done. A process that dies is replaced."""
    waiting, busy = deque(enumerate(jobs)), {}
    idle = [_Process(work) for _ in range(count)]
    try:
        while waiting or busy:
            while waiting and idle:
                process = idle.pop()
                number, job = waiting.popleft()
                process.begin(job)
                busy[process.pipe] = process, number, job
            for pipe in wait(list(busy)):
                process, number, (source, output) = busy.pop(pipe)
                row = process.row()
                if row is None:
                    error = "The process that worked at it died, perhaps for want of memory; fewer --jobs may help."
                    row = {"file": str(source), "output": str(output), "error": error}
                    process.end()
                    process = _Process(work)
                idle.append(process)
                yield number, row
    finally:
        for process in [*idle, *(process for process, *_ in busy.values())]:
            process.end()


class _Process:
    """A process of one thread that does a job at a time."""

    def __init__(self, work: Work):
        context = multiprocessing.get_context(METHOD)
        if METHOD == "forkserver":
            context.set_forkserver_preload([__name__])  # what is imported once need not be imported by each
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, job: Job) -> None:
        with contextlib.suppress(OSError):  # it is dead, and `row` will say so
            self.pipe.send(job)

    def row(self) -> dict | None:
        """Of the job that was begun; None where the process died."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return None

    def end(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def _serve(work: Work, pipe: Connection) -> None:
    """Does jobs until the other side closes the pipe, or is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C goes to all processes, and the first one tells the others
    torch.set_num_threads(1)
    keep_freed_memory()
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(_do(work, pipe.recv()))
