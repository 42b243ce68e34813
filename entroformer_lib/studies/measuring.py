"""Measuring many pictures, models and settings: on all cores, and going on after a kill.

A coding is one picture through one codec at one setting. Each is a run of the experiment engine, in a folder beside the
result, and known by all that it depends on: the bytes of a picture are among that, and its name is not. Starting the
same again only does the rest, under the names that pictures have by then. Every coding runs on a single thread, however
many run side by side, so that the numbers do not depend on how many cores there are.

    python -m entroformer_lib.studies.measuring jpeg webp jpeg2000 avif --pictures pictures/kodak --out result.json
"""

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro
from dask.system import CPU_COUNT
from PIL import Image
from tyro.conf import Positional

from entroformer_lib.codec import codec
from entroformer_lib.codec.many import one_thread
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import StudyError
from entroformer_lib.files import file_digest
from entroformer_lib.studies import results
from entroformer_lib.studies.classical import CODECS, check_available, coded, decoded, evaluate_classical
from entroformer_lib.studies.commands import at_least, check_place, run
from entroformer_lib.studies.engine import Outcome, Task, sweep
from entroformer_lib.studies.rate_distortion import evaluate_picture, names_of, pictures_to_test
from entroformer_lib.weights.kept import forget, kept_model, name_elsewhere
from entroformer_lib.weights.zoo import split_name


@dataclass(frozen=True)
class Coding:
    """One picture through one codec at one setting.

    codec: a model (name or file), or a classical codec. setting: the lambda of a variable-rate model, the quality of a
    classical codec, or None where there is only one. name: of the picture in this run, see `names_of`. weights: the
    digest that they must have; None takes those that are there. effort: a model's, see `encode`.
    """

    codec: str
    setting: float | None
    picture: str
    device: str = "cpu"
    name: str | None = None
    weights: str | None = None
    effort: int = 0

    def __call__(self, folder: Path | None = None, answer: str = "answer") -> dict:
        """Does it.  ->  the columns of `evaluate_picture`"""
        with one_thread():
            if self.codec in CODECS:
                return evaluate_classical(Path(self.picture), self.codec, self.setting)
            model = _model(self.codec, self.setting, self.device, self.weights)
            return evaluate_picture(model, Path(self.picture), self.effort)

    def row(self, measured: dict) -> dict:
        """What was measured, under the names of this run: codec, setting, image, and the columns of
        `evaluate_picture`."""
        name = Path(self.picture).stem if self.name is None else self.name
        return {"codec": self.codec, "setting": self.setting, "image": name, **measured}

    def task(self) -> Task:
        """As a run of the engine: another one for other bytes of the picture or other weights, wherever they lie. The
        model's name is in each file, so another name is another run too. It can be done in any folder."""
        identity = {"picture": file_digest(Path(self.picture)), "device": self.device}
        work = dataclasses.replace(self, picture=os.path.abspath(self.picture))
        if self.codec in CODECS:
            return Task.by_identity(self.codec, work, {**identity, "codec": self.codec, "setting": self.setting})
        kept, model = kept_model(self.codec, self.device), _model(self.codec, self.setting, self.device)
        work = dataclasses.replace(work, codec=name_elsewhere(self.codec), weights=kept.digest)
        weights = {"model": model.name, "weights": kept.digest, "level": model.level}
        weights |= {"effort": self.effort} if self.effort else {}
        return Task.by_identity(model.name, work, {**identity, **weights})


def _model(name: str, setting: float | None, device: str, weights: str | None = None) -> Entroformer:
    kept = kept_model(name, device, weights)
    kept.model.level = kept.level if setting is None else kept.model.gain.level_of(setting)
    return kept.model


def picture_at(name: str, setting: float | None, picture: Image.Image) -> tuple[Image.Image, int]:
    """A picture through one codec at one setting, see Coding  ->  the decoded picture and the bytes it took."""
    if name in CODECS:
        data = coded(picture, name, setting)
        return decoded(data), len(data)
    model = _model(name, setting, "auto")
    data = codec.encode(model, picture)
    return codec.decode(data, model, max_pixels=None).convert("RGB"), len(data)


def tasks_of(codec: str, pictures: Iterable[Path], device: str = "cpu", effort: int = 0) -> list[Coding]:
    """All settings of a codec on all pictures, setting by setting. effort: a model's, see `encode`.

    Raises:
        WeightsError: neither a model nor a classical codec.
        StudyError: a classical codec that this Pillow does not have.
    """
    if codec in CODECS:
        check_available(codec)
        settings = CODECS[codec][1]
    else:
        config = kept_model(codec, device).model.config
        settings = (None,) if split_name(codec)[1] or not config.lmbdas else config.lmbdas
    paths = [Path(picture) for picture in pictures]
    named = list(zip(paths, names_of(paths), strict=True))
    return [
        Coding(codec, setting, str(path), device, name, effort=effort) for setting in settings for path, name in named
    ]


def measure(
    codings: list[Coding],
    done: Path,
    jobs: int | None = None,
    report: Callable[[dict], None] = lambda row: None,
    scheduler: str | None = None,
) -> list[dict]:
    """The rows of all codings, in their order.

    Args:
        done: folder for finished rows, of `finished_rows`; rows it already holds are not measured again.
        jobs: processes; default: as many as the cores that this process may use, or one on a GPU.
        report: called with each row in the order of the codings, as soon as it and all before it are there.
        scheduler: address of a dask scheduler, whose workers measure; `jobs` is not used then.

    Raises:
        StudyError: jobs below 1; or codings that failed, each with its error, after all others were measured. What is
            finished stays in `done`.
        ClusterError: the scheduler does not answer, or has no workers.
    """
    at_least(1, jobs=jobs)
    if jobs is None:
        jobs = CPU_COUNT if all(coding.device == "cpu" for coding in codings) else 1
    forget()
    tasks, rows, failed = [coding.task() for coding in codings], [], {}
    coming = deque(zip(codings, tasks, strict=True))

    def tell(outcome: Outcome | None = None) -> None:
        if outcome is not None and outcome.error is not None:
            failed[outcome.name] = outcome.error
        while coming and (coming[0][1].name in failed or not coming[0][1].missing(done)):
            coding, task = coming.popleft()
            if task.name not in failed:
                rows.append(coding.row(task.answer(done)))
                report(rows[-1])

    tell()
    sweep(tasks, done, scheduler, jobs, tell, own_gpu=False)
    if failed:
        errors = [f"{c.picture}: {failed[t.name]}" for c, t in zip(codings, tasks, strict=True) if t.name in failed]
        raise StudyError("\n".join([*errors, f"{len(errors)} of {len(codings)} could not be measured."]))
    return rows


@contextlib.contextmanager
def finished_rows(out: Path | None) -> Iterator[Path]:
    """A folder for finished rows beside a result; gone after the block, which writes the result. After an error or a
    kill it stays, and the same command goes on from there.

    out: the result; None where nothing is written, and the rows are not kept

    Raises:
        StudyError: a file lies in the folder's place.
    """
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    done = out.with_name(out.name + ".rows")
    if done.is_file():
        raise StudyError(f"{done} does not hold measured rows; remove it to measure again.")
    done.mkdir(parents=True, exist_ok=True)
    try:
        yield done
    except BaseException:
        with contextlib.suppress(OSError):  # it holds rows
            done.rmdir()
        raise
    shutil.rmtree(done, ignore_errors=True)


def save(codecs: Positional[tuple[str, ...]], pictures: Path, out: Path, jobs: int | None = None) -> None:
    """Measures codecs at all their settings and writes rows, means and provenance; goes on after a kill.

    Args:
        codecs: Models (names or files) and classical codecs.
        pictures: Folder of pictures.
        out: The result, JSON.
        jobs: Pictures at a time; default: as many as there are cores.
    """
    at_least(1, codecs=len(codecs), jobs=jobs)
    check_place(out)
    paths = pictures_to_test(pictures)
    codings = [coding for name in codecs for coding in tasks_of(name, paths)]
    with finished_rows(out) as done:
        rows = measure(codings, done, jobs, _tell)
        results.save(out, {"rows": rows, "mean": means(rows)})


def _tell(row: dict) -> None:
    print(row["codec"], row["setting"], row["image"], f"{row['bpp']:.3f} bpp {row['psnr_db']:.2f} dB", flush=True)


def about(card: dict, variant: str) -> dict:
    """What a saved Kodak result says of its model: `optimised_for`, `variant` (or the card's `kind`, where a family has
    two of a variant), and `transforms`, by which the models of a family find each other; None for one that stands
    alone."""
    transforms = card.get("training", {}).get("transforms") if card.get("family", True) else None
    return {
        "optimised_for": card.get("metric", "mse"),
        "variant": card.get("kind") or variant,
        "transforms": transforms,
    }


def means(rows: list[dict]) -> list[dict]:
    """One row per codec and setting: the means of all pictures, in the order in which they come."""
    table = pd.DataFrame(rows)
    measured = table.select_dtypes("float").columns.drop("setting", errors="ignore")
    groups = table.groupby(["codec", "setting"], sort=False, dropna=False)
    return results.records(groups[list(measured)].mean().assign(images=groups.size()).reset_index())


if __name__ == "__main__":
    run(lambda: tyro.cli(save))
