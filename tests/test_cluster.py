"""Compression and evaluation on a dask cluster: what one process gives, whatever happens to the workers."""

import contextlib
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import warm
from conftest import micro_model
from mortal import Mortal, MortalCoding
from test_cli import call

from entroformer_lib import cluster
from entroformer_lib.codec import many
from entroformer_lib.datasets import sample_picture
from entroformer_lib.errors import ClusterError, StudyError, WeightsError
from entroformer_lib.studies.measuring import measure
from entroformer_lib.weights import kept
from entroformer_lib.weights.zoo import save_weights

PLACES = ("cat.png", "a/dog.png", "b/cat.png", "b/deadly.png")
TIMES = ("encode_s", "decode_s")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Pictures in folders, and a model found by the name `micro`."""
    home = tmp_path_factory.mktemp("home")
    save_weights(micro_model("parallel"), home / "weights" / "micro.safetensors", {"lmbda": 0.5})
    for number, name in enumerate(PLACES):
        (home / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        sample_picture("chelsea").crop((0, 0, 70 + number, 64)).save(home / "photos" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENTROFORMER_WEIGHTS", str(home / "weights"))
        patch.chdir(home)
        yield home


@pytest.fixture(scope="module")
def address(home, tmp_path_factory):
    """The scheduler of two processes that work in another folder, open to everybody as dask's is by itself."""
    warm.ensure_server()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with cluster.local_cluster(2, closed=False) as client:
        client.run(os.chdir, elsewhere)
        yield client.scheduler.address


@pytest.fixture
def bad(home):
    """A picture that is none, among the others."""
    path = home / "photos" / "a" / "bad.png"
    path.write_text("no picture")
    yield path
    path.unlink()


def under(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_there_and_back(home, address, bad):
    """The same files, rows, order, sentences and exit code as one process gives; a bad file is told and passed over."""
    said, files = [], []
    for how in (("--jobs", 1), ("--scheduler", address)):
        said.append(call("compress", "photos", "-o", "small", "--model", "micro", "--json", *how, expect=1))
        said[-1] += call("decompress", "small", "-o", "back", "--json", *how)
        files.append(under(home / "small") | under(home / "back"))
        shutil.rmtree(home / "small")
        shutil.rmtree(home / "back")
    assert said[0] == said[1] and files[0] == files[1] and len(files[0]) == 8
    rows, errors, *_ = said[1]
    assert [json.loads(line)["file"] for line in rows.splitlines() if "error" in line] == ["photos/a/bad.png"]
    assert "photos/a/bad.png: " in errors and "1 of 5 files failed." in errors


def test_eval(home, address, bad):
    results, said = [], []
    for how in (("--jobs", 1), ("--scheduler", address)):
        out, errors = call("eval", "weights/micro.safetensors", "--data", "photos", "--json", "-", *how)
        results.append(json.loads(out))
        said.append(errors)
    alone, together = ([{k: v for k, v in row.items() if k not in TIMES} for row in r["images"]] for r in results)
    assert alone == together and len(alone) == 4
    assert all(str(Path("photos/a/bad.png")) in errors and "left out" in errors for errors in said)


# ---- workers that die ----


@pytest.mark.parametrize("always", [False, True])
def test_a_worker_that_dies_at_a_file(home, address, tmp_path, always):
    """Another one takes the file; at which four died, that one is given up. All others are there."""
    work, note = many.Compress("micro"), tmp_path / "note"
    alone = list(many.go_through(work, many.jobs_of(["photos"], tmp_path / "alone", work), 1))
    jobs = many.jobs_of(["photos"], tmp_path / "together", work)
    rows = list(many.go_through(Mortal("micro", note=str(note), always=always), jobs, scheduler=address))
    assert [(Path(row["file"]), Path(row["output"])) for row in rows] == jobs
    whole = under(tmp_path / "alone")
    if always:
        assert [row["file"] for row in rows if "4 processes that worked at it died" in row.get("error", "")] == [
            "photos/b/deadly.png"
        ]
        del whole["b/deadly.ef"]
    else:
        assert [{**row, "output": ""} for row in rows] == [{**row, "output": ""} for row in alone]
    assert under(tmp_path / "together") == whole
    assert len(set(note.read_text().split())) == (4 if always else 2)


@pytest.mark.parametrize("always", [False, True])
def test_a_worker_that_dies_at_a_picture_of_eval(home, address, tmp_path, always):
    note, done, seen = tmp_path / "note", tmp_path / "rows", []
    codings = [MortalCoding("micro", None, f"photos/{p}", name=p, note=str(note), always=always) for p in PLACES]
    codings = [codings[-1], *codings[:-1]]
    if always:
        with pytest.raises(StudyError, match="photos/b/deadly.png: 4 processes(.|\n)*1 of 4 could not be measured"):
            measure(codings, done, report=seen.append, scheduler=address)
    else:
        assert measure(codings, done, report=seen.append, scheduler=address) == seen
    assert [row["image"] for row in seen] == [coding.name for coding in codings[always:]]


# ---- workers that stay ----


def test_a_worker_that_stays_takes_the_weights_that_are_there_now(home, address, tmp_path):
    """Two commands with a training between them."""
    files = []
    for seed in (0, 1):
        save_weights(micro_model("parallel", seed=seed), tmp_path / "mine.safetensors", {})
        work = many.Compress(str(tmp_path / "mine.safetensors"))
        for out, how in (("alone", {"count": 1}), ("together", {"scheduler": address})):
            list(many.go_through(work, many.jobs_of(["photos/b"], tmp_path / f"{out}{seed}", work), **how))
            files.append(under(tmp_path / f"{out}{seed}"))
        assert files[-1] == files[-2] and len(files[-1]) == 2
    assert files[0] != files[-1]


def test_other_weights_are_refused(home):
    digest = kept.kept_model("micro", "cpu").digest
    assert kept.kept_model("micro", "cpu", digest).digest == digest
    with pytest.raises(WeightsError, match="weights .*micro.safetensors are others"):
        kept.kept_model("micro", "cpu", "0" * 64)


def test_what_a_model_is_called_elsewhere(home):
    path = str(home / "weights" / "micro.safetensors")
    assert kept.name_elsewhere("micro") == path == kept.name_elsewhere("weights/micro.safetensors")
    assert kept.name_elsewhere("micro@0.5") == f"{path}@0.5"
    assert kept.name_elsewhere("blocks-parallel@0.02") == "blocks-parallel@0.02"


# ---- clusters that cannot be used ----


@contextlib.contextmanager
def one_worker(threads: int = 1):
    """A scheduler, with a worker in this process."""
    from distributed import Scheduler, SpecCluster, Worker

    worker = {"cls": Worker, "options": {"nthreads": threads, "dashboard": False}}
    scheduler = {"cls": Scheduler, "options": {"dashboard": False, "dashboard_address": "127.0.0.1:0"}}
    with SpecCluster({0: worker}, scheduler) as both:
        both.wait_for_workers(1)
        yield both


@pytest.mark.parametrize("gone, sentence", [("workers", "no workers any more"), ("scheduler", "not answer any more")])
def test_a_cluster_that_ends_in_the_middle(gone, sentence, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 1.0)
    with one_worker() as both, cluster.processes(both.scheduler_address) as client:
        found = cluster.over(abs, [-1, -2, -3], client, lambda item, error: error)
        assert next(found) == (0, 1)
        monkeypatch.setattr(cluster, "ALONE_FOR", 0.0 if gone == "workers" else 60.0)
        both.scale(0) if gone == "workers" else both.close()
        with pytest.raises(ClusterError, match=sentence):
            list(found)


def test_no_more_is_sent_than_the_workers_can_begin(monkeypatch):
    """What waits at a worker would be suspected when that dies."""
    sent = []
    with one_worker() as both, cluster.processes(both.scheduler_address) as client:
        submit = client.submit
        monkeypatch.setattr(client, "submit", lambda *words, **more: sent.append(words) or submit(*words, **more))
        found = cluster.over(abs, [-1, -2, -3], client, lambda item, error: error)
        for number in range(3):
            assert next(found) == (number, number + 1) and len(sent) == number + 1


def test_nobody_else_gives_work_to_the_cluster_of_this_machine():
    """Whoever knows its port has no certificate."""
    from distributed import Client

    with cluster.local_cluster(1) as client:
        assert client.submit(abs, -3).result() == 3
        address = client.scheduler.address.removeprefix("tls://")
        for stranger in (f"tcp://{address}", f"tls://{address}"):
            with pytest.raises((OSError, TypeError)):
                Client(stranger, timeout=2)


MEETING = threading.Barrier(2)


def meets(item: int) -> bool:
    """Whether another call is made at the same time, in this process."""
    try:
        return MEETING.wait(timeout=0.2) >= 0
    except threading.BrokenBarrierError:
        return False


def test_a_process_does_one_task_at_a_time():
    """Models, seeds and torch's threads are its own."""
    with one_worker(threads=2) as both, cluster.processes(both.scheduler_address) as client:
        assert sorted(cluster.over(meets, range(2), client, lambda item, error: error)) == [(0, False), (1, False)]


@pytest.mark.parametrize("command", [
    ("compress", "photos", "-o", "out", "--model", "micro"),
    ("eval", "micro", "--data", "photos", "--json", "out.json"),
])  # fmt: skip
def test_words_that_make_no_sense(home, command, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 1.0)
    assert "leave it out" in call(*command, "--scheduler", "tcp://127.0.0.1:9", "--jobs", 1, expect=1)[1]
    assert "does not answer; nothing was started" in call(*command, "--scheduler", "tcp://127.0.0.1:9", expect=1)[1]
    assert not list(home.glob("out*"))
