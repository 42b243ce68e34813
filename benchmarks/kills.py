"""Commands that are killed at random moments, and commands whose disk fills up: what is left, and do they go on?

python benchmarks/kills.py --kills 50 --out data/results/kills.json

Every command does small work in a folder of its own: killed up to five times in a row, three times out of four with
SIGKILL, else with SIGTERM, each time at a random moment of its usual duration, and then started once more and left in
peace. After each kill every file under a final name must be whole, and in the end the result must be that of a run
which nobody disturbed. The moments follow from the seed, but how far the work has come by then depends on the machine.

Then the disk: the folder lies on a small tmpfs, or where none can be mounted under a limit for the size of files; a
random part of what the work needs is free. The command must end with a sentence, leave whole files, and finish once
there is room.

Processes are forked from one that has imported the library (tests/warm.py), so kills fall into the work and not into
the seconds of imports before it. `--fresh` starts new interpreters instead. The result is written after each command,
and what it holds is not repeated.
"""

import contextlib
import hashlib
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import warm  # noqa: E402

from entroformer_lib.codec import codec  # noqa: E402
from entroformer_lib.codec.container import Container  # noqa: E402
from entroformer_lib.datasets import SAMPLES, sample_picture  # noqa: E402
from entroformer_lib.studies import results  # noqa: E402
from entroformer_lib.training.folder import read_checkpoint  # noqa: E402
from entroformer_lib.weights.zoo import load_model, read_weights, save_weights, tensors_digest  # noqa: E402

IN_A_ROW = 5
NUMBERS = itertools.count()
SMALL_ENTROPY_MODEL = "Z=12 dim=24 heads=2 top_k=6 context_layers=1"
SMALL = f"N=16 M=24 {SMALL_ENTROPY_MODEL}"
# What differs from run to run, however undisturbed
OF_THE_RUN = ("seconds", "_s", "_ms", "images_per_s", "provenance", "training", "date")


@dataclass(frozen=True)
class Case:
    """A command on small work.

    words: the command line, in a folder where `given` lies. out: what it writes, which is all that is looked at.
    """

    words: str
    out: str = "out"

    def run_in(self, folder: Path, most: int | None = None) -> "Process":
        """Starts it.  most: bytes that a file may have"""
        return Process(shlex.split(self.words), folder, most)


CASES_OF_KILLS = {
    "compress": Case("compress given/photos/a/astronaut.png -o out/x.ef --model micro --resume"),
    "compress, a folder": Case("compress given/photos -o out --model micro --resume --jobs 1"),
    "decompress": Case("decompress given/x.ef -o out/x.png --resume"),
    "decompress, a folder": Case("decompress given/small -o out --resume --jobs 1"),
    "train": Case(
        "train --data given/photos --out out/run --model tiny-parallel --steps 8 --batch 1 --crop 64 --log-every 1 "
        f"--checkpoint-seconds 0 --accelerator cpu --devices 1 --architecture {SMALL}"
    ),
    "eval": Case("eval micro --data given/photos --json out/result.json --jobs 1"),
    "study ablation": Case(
        "study ablation --transforms micro --train-on given/photos --kodak given/photos --out out/runs --steps 4 "
        "--crop 64 --limit 2 --checkpoint-seconds 0 --accelerator cpu --results out/results --seeds 0 "
        f"--fields {SMALL_ENTROPY_MODEL}"
    ),
    "import-official": Case("import-official given/theirs.pth out/ours.safetensors --top-k 6 --force"),
    # last: every start imports the library anew, in the server of its processes
    "compress, a folder, two processes": Case("compress given/photos -o out --model micro --resume --jobs 2"),
}


def _limited(most: int, *words: str) -> None:
    """The command where the kernel refuses to write a file beyond a size, as a full disk would."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    warm.entroformer(*words)


class Process:
    """A command under way, in a forked process."""

    place = Path()  # for what commands say, which is not on the disk that is full

    def __init__(self, words: list[str], folder: Path, most: int | None = None):
        self.folder, self.said = folder, self.place / f"{next(NUMBERS)}.said"
        (folder / "out").mkdir(exist_ok=True)
        environment = {**os.environ, "ENTROFORMER_WEIGHTS": str(folder / "given" / "weights")}
        what = (warm.entroformer, *words) if most is None else (_limited, most, *words)
        self.process = warm.start(*what, output=self.said, environment=environment, folder=folder)

    def wait(self, seconds: float | None = None) -> bool:
        """Waits for its end.  ->  whether it came"""
        self.process.join(seconds)
        return self.process.exitcode is not None

    @property
    def code(self) -> int | None:
        return self.process.exitcode

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def left_behind(self, patience: float = 60) -> int:
        """Processes of the command that still work in its folder; those of a killed one may finish their file."""
        end = time.monotonic() + patience
        while left := sum(_works_in(process, self.folder) for process in psutil.process_iter()):
            if time.monotonic() > end:
                return left
            time.sleep(0.05)
        return 0


def _works_in(process: psutil.Process, folder: Path) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        return process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == folder
    return False


# ---- what a command left ----


def _load_picture(path: Path) -> None:
    with Image.open(path) as picture:
        picture.load()


READERS: dict[str, Callable[[Path], object]] = {
    ".ef": lambda path: Container.unpack(path.read_bytes()),
    ".png": _load_picture,
    ".json": lambda path: json.loads(path.read_text()),
    ".safetensors": read_weights,
    ".pt": lambda path: read_checkpoint(path, torch.device("cpu")),
    ".npy": lambda path: __import__("numpy").load(path),
}


def half_written(out: Path) -> list[str]:
    """Files under final names that cannot be read."""
    found = []
    for path in out.rglob("*"):
        try:
            if path.suffix in READERS and path.is_file():
                READERS[path.suffix](path)
        except Exception as error:
            found.append(f"{path.relative_to(out)}: {error}")
    return found


def result_of(out: Path) -> dict[str, str]:
    """Digests of all results, by their place, without what differs from run to run however undisturbed."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        if path.suffix in (".ef", ".png", ".npy"):
            data = path.read_bytes()
        elif path.suffix == ".safetensors":
            data = tensors_digest(read_weights(path)[0])
        elif path.suffix in (".json", ".jsonl"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            rows = {json.dumps(_lasting(json.loads(line), out)) for line in lines}  # a curve may have a row twice
            data = "\n".join(sorted(rows)).encode()
        else:
            continue
        found[str(path.relative_to(out))] = hashlib.sha256(data).hexdigest()
    return found


def _lasting(value, out: Path):
    if isinstance(value, dict):
        return {k: _lasting(v, out) for k, v in value.items() if not (k.endswith(OF_THE_RUN))}
    if isinstance(value, list):
        return [_lasting(v, out) for v in value]
    return value.replace(str(out.parent), "") if isinstance(value, str) else value


# ---- the two experiments ----


@dataclass
class Tally:
    """What happened to one command."""

    kills: int = 0
    sigterms: int = 0
    half_written: list[str] = field(default_factory=list)
    failed_resumes: list[str] = field(default_factory=list)
    left_processes: int = 0
    left_parts: int = 0  # files under names of their own that nobody removed
    resumes: int = 0


def undisturbed(case: Case, given: Path, folder: Path) -> tuple[dict[str, str], float, int]:
    """Its result, seconds, and the bytes that it wrote."""
    begun(given, folder)
    start = time.monotonic()
    process = case.run_in(folder)
    process.wait()
    seconds = time.monotonic() - start
    if process.code or not result_of(folder / "out"):  # or nothing would be compared
        sys.exit(f"{case.words}: {process.said.read_text()}")
    size = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
    return result_of(folder / "out"), seconds, size


def begun(given: Path, folder: Path) -> Path:
    """A new folder with the given files."""
    folder.mkdir()
    (folder / "given").symlink_to(given)
    return folder


def killed(case: Case, given: Path, place: Path, usual: tuple, count: int, chance: random.Random) -> Tally:
    """A command killed so many times.  usual: of `undisturbed`"""
    expected, seconds, _ = usual
    tally = Tally()
    while tally.kills < count:
        folder = begun(given, place / f"round{tally.kills}")
        for _ in range(min(IN_A_ROW, count - tally.kills)):
            process = case.run_in(folder)
            number = signal.SIGTERM if chance.random() < 0.25 else signal.SIGKILL
            start = time.monotonic()
            if process.wait(chance.uniform(0, seconds)):  # too late
                seconds = time.monotonic() - start
                break
            process.kill(number)
            process.wait()
            tally.kills += 1
            tally.sigterms += number == signal.SIGTERM
            tally.left_processes += process.left_behind()
            tally.half_written += half_written(folder / "out")
        _resume(case, folder, expected, tally)
        shutil.rmtree(folder)
    return tally


def _resume(case: Case, folder: Path, expected: dict[str, str], tally: Tally) -> None:
    tally.resumes += 1
    process = case.run_in(folder)
    process.wait()
    said = process.said.read_text()
    found = {} if process.code else result_of(folder / "out")
    if found != expected:
        differs = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        tally.failed_resumes.append(f"code {process.code}, {differs[:3]}, {said[-400:]}")
    tally.left_parts += sum(1 for _ in (folder / "out").rglob("*.part"))


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A tmpfs of so many bytes.  ->  whether it could be mounted"""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    try:
        mounted = not subprocess.run(command, capture_output=True).returncode
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def filled(case: Case, given: Path, place: Path, usual: tuple, count: int, chance: random.Random) -> dict:
    """A command on a disk that fills up, so many times.  usual: of `undisturbed`"""
    expected, _, size = usual
    tally, refused, how = Tally(), 0, "tmpfs"
    without_sentence = []
    for number in range(count):
        room = chance.randrange(size)
        with small_disk(place / f"disk{number}", 2 * size + (64 << 20)) as mounted:
            folder = begun(given, place / f"disk{number}" / "work")
            ballast = place / f"disk{number}" / "ballast"
            most = None
            if mounted:
                free = shutil.disk_usage(folder).free - room
                with open(ballast, "wb") as file:
                    file.write(bytes(free))
            else:
                how, most = "RLIMIT_FSIZE", room
            process = case.run_in(folder, most)
            process.wait()
            said = process.said.read_text()
            if process.code:
                refused += 1
                told = [line for line in said.splitlines() if line.startswith("entroformer: ")]
                if process.code != 1 or not told or "Traceback" in said or "Please report" in said:
                    without_sentence.append(f"code {process.code}: {said[-600:]}")
            tally.half_written += half_written(folder / "out")
            tally.left_parts += sum(1 for _ in (folder / "out").rglob("*.part"))
            ballast.unlink(missing_ok=True)
            _resume(case, folder, expected, tally)
            process.left_behind()  # or the disk would be busy
    return {
        "by": how, "fills": count, "refused": refused, "without_sentence": len(without_sentence),
        "half_written": len(tally.half_written), "resumes": tally.resumes,
        "failed_resumes": len(tally.failed_resumes), "left_parts": tally.left_parts,
        "findings": [*without_sentence, *tally.half_written, *tally.failed_resumes],
    }  # fmt: skip


def write_given(given: Path) -> None:
    """The small work: photographs, a model, their `.ef` files, a checkpoint of the released code's kind."""
    from conftest import micro_model  # not above: every forked process begins by importing this module
    from released import CASES, released, save

    for number, name in enumerate(SAMPLES):
        path = given / "photos" / "ab"[number % 2] / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sample_picture(name).crop((100, 0, 292, 128)).save(path)
    save_weights(micro_model("parallel"), given / "weights" / "micro.safetensors", {"lmbda": 0.02})
    model = load_model(given / "weights" / "micro.safetensors", "cpu")
    for path in (given / "photos").rglob("*.png"):
        small = given / "small" / path.parent.name / f"{path.stem}.ef"
        small.parent.mkdir(parents=True, exist_ok=True)
        small.write_bytes(codec.encode(model, path))
    shutil.copy(small, given / "x.ef")
    save(released(CASES["parallel"]), given / "theirs.pth")


def main(
    out: Path | None = None,
    kills: int = 50,
    fills: int = 10,
    only: tuple[str, ...] = (),
    seed: int = 0,
) -> None:
    """Kills and fills disks, prints what happened, and writes it.

    Args:
        kills: Of each command.
        fills: Full disks of each command.
        only: These commands.
    """
    work = Process.place = Path(tempfile.mkdtemp(prefix="kills-")).resolve()
    rows = json.loads(out.read_text())["rows"] if out is not None and out.exists() else []
    try:
        write_given(work / "given")
        warm.ensure_server()
        undisturbed(CASES_OF_KILLS["compress"], work / "given", work / "first")  # after which the server is ready
        for name, case in CASES_OF_KILLS.items():
            if (only and name not in only) or any(row["command"] == name and row["kills"] >= kills for row in rows):
                continue
            rows = [row for row in rows if row["command"] != name]
            place = work / name.replace(" ", "-").replace(",", "")
            place.mkdir()
            chance, usual = random.Random(f"{seed} {name}"), undisturbed(case, work / "given", place / "undisturbed")
            row = {"command": name, "seconds": usual[1]}
            t = killed(case, work / "given", place, usual, kills, chance)
            row |= {"kills": t.kills, "sigterms": t.sigterms, "half_written": len(t.half_written)}
            row |= {"resumes": t.resumes, "failed_resumes": len(t.failed_resumes), "left_processes": t.left_processes}
            row |= {"left_parts": t.left_parts, "findings": [*t.half_written, *t.failed_resumes]}
            row["full_disks"] = filled(case, work / "given", place, usual, fills, chance)
            print(row, flush=True)
            rows.append(row)
            shutil.rmtree(place)
            if out is not None:
                results.save(out, {"rows": rows}, seed=seed)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    tyro.cli(main)
