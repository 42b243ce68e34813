"""Measuring many pictures, models and settings: on all cores, and going on after a kill.

A task is one picture through one codec at one setting. Whatever is finished stands as a line in a file beside the
result, with a key of everything it depends on; starting the same again only does the rest. Every task runs on a single
thread, however many run side by side, so that the numbers do not depend on how many cores there are.

    python -m entroformer_lib.studies.measuring jpeg webp jpeg2000 avif --pictures pictures/kodak --out result.json
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from PIL import Image
from tyro.conf import Positional

from entroformer_lib.codec import codec
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import StudyError
from entroformer_lib.files import write_bytes
from entroformer_lib.memory import keep_freed_memory
from entroformer_lib.studies.classical import CODECS, coded, evaluate_classical
from entroformer_lib.studies.rate_distortion import evaluate_picture, pictures_to_test
from entroformer_lib.studies.results import provenance
from entroformer_lib.weights.zoo import load_model, weights_digest


@dataclass(frozen=True)
class Task:
    """One picture through one codec at one setting.

    codec: a model (name or file), or a classical codec. setting: the lambda of a variable-rate model, the quality of a
    classical codec, or None where there is only one.
    """

    codec: str
    setting: float | None
    picture: str
    device: str = "cpu"

    def row(self) -> dict:
        """Does it.  ->  codec, setting, and the columns of `evaluate_picture`"""
        if self.codec in CODECS:
            measured = evaluate_classical(Path(self.picture), self.codec, self.setting)
        else:
            measured = evaluate_picture(_model(self.codec, self.setting, self.device), Path(self.picture))
        return {"codec": self.codec, "setting": self.setting, **measured}

    def key(self) -> str:
        """Changes with the picture's bytes and the model's weights, not with their places."""
        picture = hashlib.sha256(Path(self.picture).read_bytes()).hexdigest()[:16]
        weights = "" if self.codec in CODECS else weights_digest(_loaded(self.codec, self.device)).hex()[:16]
        return f"{Path(self.codec).name} {self.setting} {weights} {picture} {self.device}"


@functools.lru_cache(maxsize=2)
def _loaded(name: str, device: str) -> Entroformer:
    return load_model(name, device)


def _model(name: str, setting: float | None, device: str) -> Entroformer:
    model = _loaded(name, device)
    if setting is not None:
        model.level = model.gain.level_of(setting)
    return model


def picture_at(name: str, setting: float | None, picture: Image.Image) -> tuple[Image.Image, int]:
    """A picture through one codec at one setting, see Task  ->  the decoded picture and the bytes it took."""
    if name in CODECS:
        data = coded(picture, name, setting)
        return Image.open(io.BytesIO(data)).convert("RGB"), len(data)
    model = _model(name, setting, "auto")
    data = codec.encode(model, picture)
    return codec.decode(data, model).convert("RGB"), len(data)


def tasks_of(codec: str, pictures: Iterable[Path], device: str = "cpu") -> list[Task]:
    """All settings of a codec on all pictures, setting by setting.

    Raises:
        WeightsError: neither a model nor a classical codec.
    """
    if codec in CODECS:
        settings = CODECS[codec][1]
    else:
        model = _loaded(codec, device)
        settings = (None,) if "@" in codec or not model.config.lmbdas else model.config.lmbdas
    return [Task(codec, setting, str(path), device) for setting in settings for path in pictures]


def measure(
    tasks: list[Task],
    done: Path | None = None,
    jobs: int | None = None,
    report: Callable[[dict], None] = lambda row: None,
) -> list[dict]:
    """The rows of all tasks, in their order.

    Args:
        done: file for finished rows, one line each; rows it already holds are not measured again. The caller removes it
            once the result is written.
        jobs: processes; default: as many as there are cores, or one on a GPU.
        report: called with each row in the order of the tasks, as soon as it and all before it are there.

    Raises:
        UserError: from any of the tasks. What is finished stays in `done`.
    """
    keys = [task.key() for task in tasks]
    rows = _read(done)
    missing = [i for i, key in enumerate(keys) if key not in rows]
    if jobs is None:
        jobs = 1 if any(task.device != "cpu" for task in tasks) else cores()
    shown = 0
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(done, "a")) if done is not None and missing else None
        run = _one_by_one if min(jobs, len(missing)) <= 1 else _side_by_side
        for i, row in run([tasks[i] for i in missing], jobs) if missing else ():
            rows[keys[missing[i]]] = row
            if file is not None:
                file.write(json.dumps({"key": keys[missing[i]], "row": row}) + "\n")
                file.flush()
            while shown < len(tasks) and keys[shown] in rows:
                report(rows[keys[shown]])
                shown += 1
    for key in keys[shown:]:
        report(rows[key])
    return [rows[key] for key in keys]


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(done: Path | None) -> dict[str, dict]:
    """Finished rows by key. A last line that a kill cut short is measured again."""
    rows = {}
    if done is None or not done.exists():
        return rows
    text = done.read_text()
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            rows[entry["key"]] = entry["row"]
        except (ValueError, KeyError, TypeError):
            if not text.endswith(line):
                raise StudyError(f"{done} does not hold measured rows; remove it to measure again.") from None
            done.write_text(text[: -len(line)])
    return rows


def _one_by_one(tasks: list[Task], jobs: int) -> Iterator[tuple[int, dict]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i, task in enumerate(tasks):
            yield i, task.row()
    finally:
        torch.set_num_threads(before)


def _side_by_side(tasks: list[Task], jobs: int) -> Iterator[tuple[int, dict]]:
    """In processes of their own (spawned: forking a process in which torch has threads can hang)."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(jobs, len(tasks)), context, _prepare) as pool:
        futures = {pool.submit(Task.row, task): i for i, task in enumerate(tasks)}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _prepare() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()


def save(codecs: Positional[tuple[str, ...]], pictures: Path, out: Path, jobs: int | None = None) -> None:
    """Measures codecs at all their settings and writes rows, means and provenance; goes on after a kill.

    Args:
        codecs: Models (names or files) and classical codecs.
        pictures: Folder of pictures.
        out: The result, JSON.
        jobs: Pictures at a time; default: as many as there are cores.
    """
    paths = pictures_to_test(pictures)
    tasks = [task for name in codecs for task in tasks_of(name, paths)]
    done = out.with_name(out.name + ".rows")
    rows = measure(
        tasks, done, jobs, lambda row: print(row["codec"], row["setting"], row["image"], row["bpp"], flush=True)
    )
    write_bytes(out, json.dumps({"rows": rows, "mean": means(rows), "provenance": provenance()}, indent=1).encode())
    done.unlink(missing_ok=True)


def _tell(row: dict) -> None:
    print(row["codec"], row["setting"], row["image"], f"{row['bpp']:.3f} bpp {row['psnr_db']:.2f} dB", flush=True)


def means(rows: list[dict]) -> list[dict]:
    """One row per codec and setting: the means of all pictures, in the order in which they come."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["codec"], row["setting"]), []).append(row)
    columns = [key for key, value in rows[0].items() if isinstance(value, float) and key != "setting"]
    return [
        {"codec": name, "setting": setting, "images": len(group)}
        | {key: sum(row[key] for row in group) / len(group) for key in columns}
        for (name, setting), group in groups.items()
    ]


if __name__ == "__main__":
    tyro.cli(save)
