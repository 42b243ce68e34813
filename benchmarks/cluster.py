"""What a second process is worth: evaluation and compression on a dask cluster, and pictures streamed from shards.

python benchmarks/cluster.py --out data/results/cluster.json

One worker and two are measured in turns, and the least time counts. Each has one thread, so it takes two idle cores;
the load of the machine before the measurement is part of the result. The workers of the cluster have loaded the model
before the clock runs; what the command itself does (loading the model, digests of pictures) is within, and so is the
start of the processes that stream. Files and crops must not depend on the number of workers. The pictures are crops of
scikit-image's photographs. Four to six minutes.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from dask.system import CPU_COUNT
from many_files import write_pictures

from entroformer_lib.cluster import local_cluster
from entroformer_lib.codec.many import Compress, go_through, jobs_of
from entroformer_lib.datasets import fetch
from entroformer_lib.studies import results
from entroformer_lib.studies.measuring import Coding, measure
from entroformer_lib.studies.rate_distortion import names_of, pictures_to_test
from entroformer_lib.training.data import StreamedCrops
from entroformer_lib.training.packing import pack

WORKERS = (1, 2)
BATCH = 8


def evaluated(folder: Path, model: str, scheduler: str, limit: int | None = None) -> list:
    """Sizes of all files; the rows are thrown away, so that each call measures anew."""
    paths = pictures_to_test(folder / "photos", limit)
    codings = [Coding(model, None, str(path), "cpu", name) for path, name in zip(paths, names_of(paths), strict=True)]
    with tempfile.TemporaryDirectory() as done:
        return [row["bytes"] for row in measure(codings, Path(done), scheduler=scheduler)]


def compressed(folder: Path, model: str, scheduler: str) -> list:
    """All files."""
    work = Compress(model, device="cpu")
    jobs = jobs_of([str(folder / "photos")], folder / "small", work)
    failed = [row for row in go_through(work, jobs, scheduler=scheduler) if "error" in row]
    assert not failed, failed
    return [output.read_bytes() for _, output in jobs]


def streamed(folder: Path, samples: int, workers: int) -> list:
    """Sums of crops, as a training's worker processes read them."""
    crops = StreamedCrops(folder / "shards" / "manifest.json", 128, workers=workers, places=BATCH)
    return [float(x.sum()) for x in crops.batches([range(i, i + BATCH) for i in range(0, samples, BATCH)])]


def timed(what: str, works: dict[int, Callable[[], list]], repeats: int) -> list[dict]:
    """A row for each number of workers: seconds (the least), and times (how many times as fast as one)."""
    seconds: dict[int, list[float]] = {workers: [] for workers in works}
    answers = []
    for _ in range(repeats):
        for workers, work in works.items():
            start = time.perf_counter()
            answers.append(work())
            seconds[workers].append(time.perf_counter() - start)
    assert all(answer == answers[0] for answer in answers), what
    least = {workers: min(each) for workers, each in seconds.items()}
    rows = [{"work": what, "workers": n, "seconds": s, "times": least[1] / s} for n, s in least.items()]
    for row in rows:
        print(row, flush=True)
    return rows


def main(
    out: Path | None = None, model: str = "blocks-parallel", pictures: int = 96, samples: int = 2400, repeats: int = 2
) -> None:
    """Measures, prints, and writes the result with its provenance.

    Args:
        pictures: That are evaluated and compressed, of 64 to 160 pixels.
        samples: That are streamed, of photographs of 451 to 640 pixels.
        repeats: Turns; the least time counts.
    """
    torch.set_num_threads(1)
    load, rows, folder = os.getloadavg()[0], [], Path(tempfile.mkdtemp())
    try:
        write_pictures(folder / "photos", pictures)
        with local_cluster(1, closed=False) as one, local_cluster(2, closed=False) as two:
            addresses = {workers: client.scheduler.address for workers, client in zip(WORKERS, (one, two), strict=True)}
            for address in addresses.values():
                evaluated(folder, model, address, limit=6)  # every worker loads the model
            for what, work in (("eval", evaluated), ("compress", compressed)):
                works = {n: lambda at=at, work=work: work(folder, model, at) for n, at in addresses.items()}
                rows += timed(what, works, repeats)
        fetch("samples", folder / "samples")
        pack(folder / "samples", folder / "shards", 128, per_shard=2, jobs=1)
        works = {n: lambda n=n: streamed(folder, samples, n) for n in WORKERS}
        rows += timed("streamed decoding", works, repeats)
    finally:
        shutil.rmtree(folder)
    if out is not None:
        about = {"model": model, "pictures": pictures, "samples": samples, "repeats": repeats}
        results.save(out, {"rows": rows, **about}, cores=CPU_COUNT, load_before=load)


if __name__ == "__main__":
    tyro.cli(main)
