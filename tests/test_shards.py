"""Tar shards as one collection: every picture once an epoch, whoever reads it; stores, the cache, broken shards."""

import functools
import hashlib
import http.server
import io
import json
import shutil
import tarfile
import threading
from pathlib import Path

import pytest
import torch
import warm
from PIL import Image

from entroformer_lib.errors import DataError, PassedOver
from entroformer_lib.training.data import PreloadedCrops, StreamedCrops, find_sources, held_out_crops
from entroformer_lib.training.packing import pack
from entroformer_lib.training.shard_cache import ShardCache
from entroformer_lib.training.shards import MANIFEST, READING, OpenShard, Reading, ShardedPictures, find_shards

SIZES = (1, 9, 2, 5)  # pictures in each shard: 17
BATCH = 8


def flat(number: int, side: int = 64) -> bytes:
    """A picture of one colour, by which a crop tells its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (number, 0, 255 - number)).save(buffer, "PNG")
    return buffer.getvalue()


def numbers_of(crops: torch.Tensor) -> list[int]:
    return (crops[:, 0, 0, 0] * 255).round().int().tolist()


def write_shard(path: Path, pictures: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in pictures.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder: Path) -> Path:
    first = 0
    for i, size in enumerate(SIZES):
        write_shard(folder / f"s{i}.tar", {f"{n}.png": flat(n) for n in range(first, first + size)})
        first += size
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Shards of very unequal sizes; picture i is called i.png."""
    return write_shards(tmp_path_factory.mktemp("shards"))


def collection(source, reading: Reading = READING, left_out=frozenset()) -> ShardedPictures:
    names = find_sources(source)[1]
    return ShardedPictures(find_shards(names, 64, lambda name: name not in left_out, reading), BATCH, 5, reading)


def first_names(pictures: ShardedPictures, samples: range) -> list[str]:
    return [next(pictures.candidates(g))[0] for g in samples]


# ---- once an epoch ----


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_picture_comes_once_an_epoch(ranks, workers, folder):
    """In the same order, into however many processes a batch is split; and none has fewer batches than another."""
    steps = 2 * sum(SIZES) // BATCH + 1
    seen = []
    for rank in range(ranks):
        begins = range(rank * BATCH // ranks, steps * BATCH, BATCH)
        stream = StreamedCrops(folder, 64, seed=5, workers=workers, places=BATCH)
        seen.append([numbers_of(x) for x in stream.batches([range(b, b + BATCH // ranks) for b in begins])])
    row = [number for step in zip(*seen, strict=True) for part in step for number in part]
    assert [sorted(row[e * 17 : e * 17 + 17]) for e in (0, 1)] == [list(range(17))] * 2
    assert row[:17] != row[17:34]
    assert [f"{number}.png" for number in row] == first_names(collection(folder), range(len(row)))


def test_a_process_reads_shards_of_its_own(tmp_path):
    """Of 8 equal shards, each of two processes reads 4 in an epoch."""
    for i in range(8):
        write_shard(tmp_path / f"{i}.tar", {f"{i}_{j}.png": flat(i) for j in range(8)})
    names = first_names(collection(tmp_path), range(64))
    halves = [{name[0] for g, name in enumerate(names) if g % BATCH // 4 == rank} for rank in (0, 1)]
    assert len(halves[0]) == len(halves[1]) == 4 and not halves[0] & halves[1]


def test_a_run_that_goes_on_reads_nothing_of_before(folder, monkeypatch):
    """Of an epoch's last three samples three pictures are read, and their shards' headers."""
    expected = first_names(collection(folder), range(14, 17))
    opened, read = [], []

    class Watched(OpenShard):
        def __init__(self, name, *rest):
            opened.append(name)
            super().__init__(name, *rest)

        def read(self, number):
            read.append(self.names[number])
            return super().read(number)

    monkeypatch.setattr("entroformer_lib.training.shards.OpenShard", Watched)
    stream = StreamedCrops(folder, 64, seed=5, workers=0, places=BATCH)
    assert stream.pictures.count == 17  # by the headers of every shard, without a manifest
    opened.clear()
    list(stream.batches([range(14, 17)]))
    assert read == expected and len(opened) <= 3


def test_held_out_pictures_are_looked_for_where_the_manifest_has_them(tmp_path, monkeypatch):
    for n in range(8):
        (tmp_path / f"{n}.png").write_bytes(flat(n))
    pack(tmp_path, tmp_path / "out", per_shard=2, jobs=1)
    opened, whole = [], OpenShard.__init__
    monkeypatch.setattr(OpenShard, "__init__", lambda self, *rest: (opened.append(rest[0]), whole(self, *rest))[1])
    crops = held_out_crops(tmp_path / "out", frozenset({"3.png"}))
    assert numbers_of(crops) == [3] and len(opened) == 1


# ---- broken shards ----


@pytest.mark.parametrize("manifest", [False, True])
def test_a_broken_shard_is_named_and_passed_over_on_request(manifest, tmp_path):
    """Without a manifest the others are an epoch by themselves; with one they take its place."""
    for n in range(8):
        (tmp_path / f"{n}.png").write_bytes(flat(n))
    out = tmp_path / "out"
    pack(tmp_path, out, per_shard=2, jobs=1)
    lost = {int(name.removesuffix(".png")) for name in OpenShard(str(out / "shard-000001.tar"), ShardCache(out)).names}
    (out / "shard-000001.tar").write_bytes(b"<html>busy</html>" * 100)
    if not manifest:
        (out / MANIFEST).unlink()
    with pytest.raises(DataError, match="The tar .*shard-000001.tar is damaged"):
        list(StreamedCrops(out, 64, workers=0, places=4).batches([range(8)]))
    with pytest.raises(DataError, match="The tar .*shard-000001.tar is damaged"):
        PreloadedCrops(out, 64)
    passing = Reading(pass_over=True)
    with pytest.warns(PassedOver, match="left out a shard: The tar .*shard-000001.tar"):
        (crops,) = StreamedCrops(out, 64, workers=0, places=4, reading=passing).batches([range(8 if manifest else 6)])
    assert set(numbers_of(crops)) == set(range(8)) - lost
    with pytest.warns(PassedOver, match="shard-000001.tar"):
        assert len(PreloadedCrops(out, 64, reading=passing).pictures) == 6


def test_a_manifest_says_what_counts_and_is_held_to_it(tmp_path):
    """Held-out and small pictures are not in the epoch. Another shard than was packed is refused, on request by its
    checksum."""
    for n in range(9):
        (tmp_path / f"{n}.png").write_bytes(flat(n, 64 if n else 32))
    out = tmp_path / "out"
    pack(tmp_path, out, min_side=16, per_shard=4, jobs=1)
    pictures = collection(out / MANIFEST, left_out=frozenset({"3.png"}))
    assert sorted(first_names(pictures, range(7))) == [f"{n}.png" for n in (1, 2, 4, 5, 6, 7, 8)]
    shard, checked = out / "shard-000000.tar", Reading(checked=True)
    assert len(first_names(collection(out, checked), range(9))) == 9
    shard.write_bytes(shard.read_bytes().replace(b"IDAT", b"JDAT"))
    assert len(first_names(collection(out), range(9))) == 9
    with pytest.raises(DataError, match="shard-000000.tar has not the checksum"):
        first_names(collection(out, checked), range(9))
    write_shard(shard, {"1.png": flat(1)})
    with pytest.raises(DataError, match="shard-000000.tar has 1 pictures, and its manifest says 4"):
        first_names(collection(out), range(9))
    shard.unlink()
    with pytest.raises(DataError, match="No picture in the tars"):
        StreamedCrops(out / MANIFEST, 128, workers=0).pictures  # noqa: B018  by the manifest alone
    (out / MANIFEST).write_text("{}")
    with pytest.raises(DataError, match=f"{MANIFEST} is damaged"):
        collection(out / MANIFEST)


def changed(out: Path, **fields) -> Path:
    """The folder, with fields of its manifest's first row changed."""
    rows = json.loads((out / MANIFEST).read_text())
    rows["shards"][0] |= fields
    (out / MANIFEST).write_text(json.dumps(rows))
    return out


def test_what_is_found_is_never_a_command(tmp_path, monkeypatch):
    """Only what the user types may be one: neither a file's name nor a manifest's word."""
    monkeypatch.chdir(tmp_path)
    for n in range(4):
        Path(f"{n}.png").write_bytes(flat(n))
    pack(Path(), Path("out"), per_shard=2, jobs=1)
    Path("pipe:touch ran #.tar").write_bytes(Path("out/shard-000000.tar").read_bytes())
    for source in (".", "pipe*.tar"):
        assert len(PreloadedCrops(source, 64).pictures) > 1
    for file in ("pipe:touch ran", "../shard-000000.tar", "http://127.0.0.1:9/x.tar", "/dev/zero"):
        with pytest.raises(DataError, match=f"{MANIFEST} is damaged"):
            find_sources(str(changed(Path("out"), file=file) / MANIFEST))
    monkeypatch.chdir("out")
    with pytest.raises(DataError, match=f"{MANIFEST} is damaged"):
        find_sources(str(changed(Path(), file="pipe:touch ran") / MANIFEST))
    assert not Path("ran").exists() and not Path("../ran").exists()


@pytest.mark.parametrize("fields", [dict(sizes=[]), dict(names=[3, 4]), dict(file=5), dict(sha256=None), dict(names=7)])
def test_a_manifest_of_nonsense_is_one_sentence(fields, tmp_path):
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(flat(n))
    pack(tmp_path, tmp_path / "out", per_shard=2, jobs=1)
    with pytest.raises(DataError, match=f"{MANIFEST} is damaged"):
        collection(changed(tmp_path / "out", **fields) / MANIFEST)


# ---- stores ----


class Server(http.server.SimpleHTTPRequestHandler):
    """A folder on the web, of which `forbidden` is not shown to anybody."""

    asked: list = []

    def do_GET(self):
        self.asked.append(self.path)
        if "forbidden" in self.path:
            self.send_error(403)
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def web(folder):
    Server.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_shards_from_the_web(web, folder, tmp_path):
    """Fetched once, as long as there is room; the same crops as from here."""
    reading = Reading(ShardCache(tmp_path / "cache"))
    addresses = [f"{web}/s{i}.tar" for i in range(len(SIZES))]
    for workers in (1, 0):
        stream = StreamedCrops(addresses, 64, seed=5, workers=workers, places=BATCH, reading=reading)
        there = torch.cat(list(stream.batches([range(17)])))
        here = torch.cat(list(StreamedCrops(folder, 64, seed=5, workers=0, places=BATCH).batches([range(17)])))
        assert torch.equal(there, here)
    assert sorted(path for path in Server.asked if path.endswith(".tar")) == [f"/s{i}.tar" for i in range(len(SIZES))]


def test_other_shards_at_the_same_address_are_fetched_again(tmp_path):
    """By the checksum in the manifest, whether or not it is compared."""
    reading = Reading(ShardCache(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Server, directory=str(tmp_path))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for number in (3, 7):
            (tmp_path / "photos").mkdir(exist_ok=True)
            (tmp_path / "photos" / "a.png").write_bytes(flat(number))
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            pack(tmp_path / "photos", tmp_path / "out", jobs=1)
            address = f"http://127.0.0.1:{server.server_port}/out/{MANIFEST}"
            assert numbers_of(next(PreloadedCrops(address, 64, reading=reading).batches([range(1)]))) == [number]
        server.shutdown()


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("{web}/forbidden.tar", "may not be read: the store answers 403"),
        ("{web}/gone.tar", "There is nothing at .*gone.tar"),
        ("http://127.0.0.1:9/a.tar", "cannot be fetched"),
        ("nowhere://a/b.tar", "cannot be fetched: Protocol not known"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence_and_leaves_nothing(name, sentence, web, tmp_path):
    cache = ShardCache(tmp_path / "cache")
    with pytest.raises(DataError, match=sentence) as error:
        OpenShard(name.format(web=web), cache)
    assert "\n" not in str(error.value)
    assert [path.suffix for path in cache.folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["gone.json", "forbidden.json"])
def test_a_manifest_that_is_not_there_is_named(name, web):
    with pytest.raises(DataError, match=f"no manifest at .*{name}"):
        find_sources(f"{web}/{name}")


@pytest.fixture(scope="module")
def bucket(folder, tmp_path_factory):
    """A real S3 server with the shards in it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        address = "http://{}:{}".format(*server.get_host_and_port())
        patch.setenv("AWS_ENDPOINT_URL", address)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        store = boto3.client("s3")
        store.create_bucket(Bucket="photos")
        for path in folder.glob("*.tar"):
            store.upload_file(str(path), "photos", f"train/{path.name}")
        yield address
    server.stop()


def test_shards_from_s3(bucket, folder, tmp_path):
    """By a pattern, in this process and in a worker; then from a bucket that wants other credentials."""
    import requests

    expected = torch.cat(list(StreamedCrops(folder, 64, seed=5, workers=0, places=BATCH).batches([range(17)])))
    for workers in (0, 1):
        reading = Reading(ShardCache(tmp_path / f"cache{workers}"))
        stream = StreamedCrops("s3://photos/train/*.tar", 64, seed=5, workers=workers, places=BATCH, reading=reading)
        assert torch.equal(torch.cat(list(stream.batches([range(17)]))), expected)
    with pytest.raises(DataError, match="There is no shard at s3://photos/other"):
        find_sources("s3://photos/other/*.tar")
    with pytest.raises(DataError, match="There is nothing at s3://photos/train/gone.tar"):
        OpenShard("s3://photos/train/gone.tar", ShardCache(tmp_path))
    requests.post(f"{bucket}/moto-api/reset-auth", data=b"0", timeout=10)  # from now on moto checks who asks
    with pytest.raises(DataError, match="s3://photos/train/s0.tar may not be read: the store answers 403") as error:
        OpenShard("s3://photos/train/s0.tar", ShardCache(tmp_path))
    assert "\n" not in str(error.value)


# ---- the cache ----


def read_all(addresses: list[str], cache: ShardCache, digests: list[str]) -> None:
    for turn in range(3):
        for address, digest in zip(addresses[turn:], digests[turn:], strict=True):
            with cache.open(address) as file:
                assert hashlib.sha256(file.read()).hexdigest() == digest


def test_processes_share_a_cache_that_is_too_small(web, folder, tmp_path):
    """What each of them reads is whole; no more stays than there is room for, and no part of what a kill left."""
    sizes = [(folder / f"s{i}.tar").stat().st_size for i in range(len(SIZES))]
    cache = ShardCache(tmp_path / "cache", 1.01 * max(sizes) / 1e9)
    cache.folder.mkdir()
    (cache.folder / "0123-old.tar.part").write_bytes(bytes(max(sizes)))
    addresses = [f"{web}/s{i}.tar" for i in range(len(SIZES))]
    digests = [hashlib.sha256((folder / f"s{i}.tar").read_bytes()).hexdigest() for i in range(len(SIZES))]
    both = [warm.start(read_all, addresses, cache, digests, output=tmp_path / f"said{i}.txt") for i in (0, 1)]
    for i, process in enumerate(both):
        process.join(60)
        assert process.exitcode == 0, (tmp_path / f"said{i}.txt").read_text()
    cache.open(addresses[0]).close()
    kept = [path for path in cache.folder.iterdir() if path.suffix != ".lock"]
    assert any(path.name.endswith("s0.tar") for path in kept)
    assert sum(path.stat().st_size for path in kept) <= cache.gigabytes * 1e9
    assert not list(cache.folder.glob("*.part"))


def test_what_was_used_last_stays(folder, web, tmp_path):
    size = (folder / "s0.tar").stat().st_size
    cache = ShardCache(tmp_path, 2.5 * size / 1e9)
    for name in ("s0.tar", "s2.tar", "s0.tar", "s3.tar"):
        cache.open(f"{web}/{name}").close()
    assert sorted(path.name[17:] for path in tmp_path.glob("*.tar")) == ["s0.tar", "s3.tar"]
