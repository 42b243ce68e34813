"""Files to files: what `entroformer compress` and `decompress` do to one file, and how they go through many.

An output is whole or not there (`files.replacing`), so one that exists is done. Of many, every file is coded on a
single thread, in this process, in several or on a cluster (cluster.py), so the outputs do not depend on how many. A
file that cannot be coded costs itself alone, and so does one at which processes die.
"""

import contextlib
import functools
import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from entroformer_lib.cluster import over, processes
from entroformer_lib.codec import codec, pictures
from entroformer_lib.codec.container import MAX_PIXELS, Container
from entroformer_lib.codec.search import check_effort
from entroformer_lib.datasets import files_under, is_picture
from entroformer_lib.entroformer import Entroformer, searching
from entroformer_lib.errors import DataError, in_words
from entroformer_lib.files import write_bytes
from entroformer_lib.memory import keep_freed_memory
from entroformer_lib.weights.kept import forget, kept_model, name_elsewhere
from entroformer_lib.weights.zoo import device_of

Job = tuple[Path, Path]  # a file and its output


@functools.lru_cache(maxsize=2)
def _load_named(name: str, device: str, weights: bytes) -> Entroformer:
    """weights: their digest, as the file tells it; for another one they are loaded anew."""
    return codec.model_named(name, device)


def _ready(device: str) -> str:
    """Forgets the models of earlier commands, whose files may have been written anew.  ->  the device, chosen here for
    all workers"""
    keep_freed_memory()
    forget()
    _load_named.cache_clear()
    return str(device_of(device))


@dataclass(frozen=True)
class Compress:
    """Pictures to `.ef` files.

    model: name or file. bpp: the most bits per pixel that a file may have. window: how far a latent looks for context,
    in latents; None: as the model does. ks, effort: as `encode` takes them. weights: the digest that they must have;
    None takes those that are there.
    """

    model: str
    bpp: float | None = None
    device: str = "auto"
    window: int | None = None
    ks: tuple[int, ...] = ()
    effort: int = 0
    weights: str | None = None

    ending = ".ef"
    what = "picture"

    def prepared(self) -> "Compress":
        """The same for any process, in any folder. Raises UserError for what would be wrong with every picture."""
        codec.check_bpp(self.bpp)
        device = _ready(self.device)
        kept = kept_model(self.model, device)
        check_effort(kept.model, self.effort)
        with self._searching(kept.model):
            for k in self.ks:
                with searching(kept.model, None, k):
                    pass
        return replace(self, model=name_elsewhere(self.model), device=device, weights=kept.digest)

    def takes(self, path: Path) -> bool:
        """Whether a file in a folder is meant."""
        return is_picture(path)

    def __call__(self, source: Path | bytes, form: str) -> tuple[bytes, dict]:
        """An `.ef` file; and its bytes, width, height, bpp, and notes: a sentence for each thing that is not kept."""
        if is_picture(f"a{form}"):
            raise DataError(f"An .ef file under a name that ends with {form} could be taken for a picture.")
        picture = pictures.open_picture(source)
        model = kept_model(self.model, self.device, self.weights).model
        with self._searching(model):
            data = codec.encode(model, picture, self.bpp, self.ks, self.effort)
        bpp = 8 * len(data) / (picture.width * picture.height)
        facts = {"bytes": len(data), "width": picture.width, "height": picture.height, "bpp": bpp}
        return data, {**facts, "notes": pictures.losses(picture)}

    def _searching(self, model: Entroformer):
        return searching(model, model.search_window if self.window is None else self.window, None)


@dataclass(frozen=True)
class Decompress:
    """`.ef` files to pictures.

    model: name or file; None takes the one that the file names. max_pixels: a file that claims more is refused.
    weights: as of Compress.
    """

    model: str | None = None
    device: str = "auto"
    max_pixels: int = MAX_PIXELS
    weights: str | None = None

    ending = ".png"
    what = ".ef file"

    def prepared(self) -> "Decompress":
        """The same for any process, in any folder. Raises UserError for what would be wrong with every file."""
        device = _ready(self.device)
        if self.model is None:
            return replace(self, device=device)
        weights = kept_model(self.model, device).digest
        return replace(self, model=name_elsewhere(self.model), device=device, weights=weights)

    def takes(self, path: Path) -> bool:
        """Whether a file in a folder is meant."""
        return path.suffix.lower() == ".ef"

    def __call__(self, source: Path | bytes, form: str) -> tuple[bytes, dict]:
        """A picture in the format of the ending `form`; and its width, height, and notes: what the format lost."""
        data = source if isinstance(source, bytes) else read(source)
        container = Container.unpack(data)
        container.check_pixels(self.max_pixels)
        pictures.file_of("L" if container.grey else "RGB", form)
        if self.model is None:
            model = _load_named(container.model, self.device, container.weights)
        else:
            model = kept_model(self.model, self.device, self.weights).model
        picture = codec.decode(data, model, max_pixels=self.max_pixels)
        facts = {"width": picture.width, "height": picture.height, "notes": pictures.lost_in(form)}
        return pictures.file_of(picture, form), facts


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
        DataError: outputs exist, and neither `force` nor `resume` says what to do about them; or one is an input.
    """
    there = [output for _, output in jobs if output.is_file()]
    inputs = {os.path.realpath(source) for source, _ in jobs}
    if itself := [output for output in there if os.path.realpath(output) in inputs]:
        raise DataError(f"{itself[0]} is one of the inputs; choose another folder.")
    if there and not (force or resume):
        raise DataError(
            f"{len(there)} of {len(jobs)} outputs exist, {there[0]} among them; --resume keeps them, "
            "--force replaces them."
        )
    return [job for job in jobs if not (resume and job[1].is_file())]


# ---- all of them ----


def go_through(work: Work, jobs: list[Job], count: int | None = None, scheduler: str | None = None) -> Iterator[dict]:
    """Does all jobs.  ->  a row for each, in their order: file, output; what `work` tells, or error: a sentence

    Args:
        count: processes; default: as many as there are cores, or one on a GPU.
        scheduler: address of a dask scheduler, whose workers do it; `count` is not used then.

    Raises:
        UserError: what would be wrong with every file, before any is touched.
        ClusterError: the scheduler does not answer, or has no workers; or all of them are gone.
    """
    work = work.prepared()
    if count is None:
        from dask.system import CPU_COUNT

        count = CPU_COUNT if device_of(work.device).type == "cpu" else 1
    anywhere = [tuple(part.absolute() if isinstance(part, Path) else part for part in job) for job in jobs]
    with processes(scheduler, min(count, len(jobs)), own_gpu=False) as client:
        done = over(functools.partial(_do, work), anywhere, client, lambda job, sentence: {"error": sentence})
        for number, row in _in_order(done):
            source, output = jobs[number]
            yield {"file": str(source), "output": str(output), **row}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes on one thread inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _do(work: Work, job: Job) -> dict:
    """One file on one thread, with whatever is wrong with it as a sentence."""
    source, output = job
    try:
        with one_thread():
            data, facts = work(source, output.suffix)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(output, data)
    except Exception as error:
        return {"error": in_words(error)}
    return facts


def _in_order(numbered: Iterator[tuple[int, dict]]) -> Iterator[tuple[int, dict]]:
    early, following = {}, 0
    for number, row in numbered:
        early[number] = row
        while following in early:
            yield following, early.pop(following)
            following += 1
