"""Pictures into shards, and the list of Open Images: the same from any number of processes, whole or not there."""

import csv
import hashlib
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import webdataset
from PIL import Image

from entroformer_lib import cli
from entroformer_lib.codec import many
from entroformer_lib.errors import DataError
from entroformer_lib.training.openimages import COLUMNS, plan_download
from entroformer_lib.training.packing import pack
from entroformer_lib.training.shards import MANIFEST


@pytest.fixture
def photos(tmp_path):
    """Seven pictures under two licences, a broken one, a cut one, a small one."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    (folder / "free").mkdir(parents=True)
    for i in range(7):
        picture = Image.fromarray(rng.integers(0, 256, (64, 70 + i, 3), dtype=np.uint8))
        picture.save(folder / ("free" if i < 3 else "") / f"p{i}.png")
    (folder / "broken.png").write_bytes(b"not a picture")
    (folder / "free" / "cut.png").write_bytes((folder / "p6.png").read_bytes()[:5000])
    Image.new("RGB", (200, 20)).save(folder / "thin.png")
    (folder / "LICENSE").write_text("for research")
    (folder / "free" / "COPYING.txt").write_text("CC0")
    return folder


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_manifest_tells_what_is_in_the_shards(photos, tmp_path):
    told = []
    manifest = pack(photos, tmp_path / "out", per_shard=4, jobs=1, tell=lambda row, shards: told.append(shards))
    assert manifest == json.loads((tmp_path / "out" / MANIFEST).read_text()) and told == [3, 3, 3]
    assert manifest["pictures"] == 7
    assert manifest["licences"] == [{"name": "LICENSE", "pictures": 4}, {"name": "free/COPYING.txt", "pictures": 3}]
    assert manifest["licence_texts"] == {"LICENSE": "for research", "free/COPYING.txt": "CC0"}
    reasons = {left["name"]: left["reason"] for left in manifest["left_out"]}
    assert set(reasons) == {"broken.png", "free/cut.png", "thin.png"} and "20 pixels" in reasons["thin.png"]
    names = []
    for row in manifest["shards"]:
        path = tmp_path / "out" / row["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
        with tarfile.open(path) as tar:
            assert tar.getnames() == row["names"]
            for name, (width, height), licence in zip(row["names"], row["sizes"], row["licences"], strict=True):
                assert tar.extractfile(name).read() == (photos / name).read_bytes()
                assert Image.open(photos / name).size == (width, height)
                assert (licence == 1) == name.startswith("free/")
        names += row["names"]
    assert sorted(names) == sorted({*(f"free/p{i}.png" for i in range(3)), *(f"p{i}.png" for i in range(3, 7))})
    read = webdataset.WebDataset(
        [str(tmp_path / "out" / row["file"]) for row in manifest["shards"]], shardshuffle=False
    )
    assert [sample["__key__"] + ".png" for sample in read] == names  # as everybody else reads such shards


def test_an_interrupted_command_goes_on_and_ends_with_the_same_bytes(photos, tmp_path, monkeypatch):
    """In two processes, and after a stop in the second shard; what was done is not done again."""
    pack(photos, tmp_path / "whole", per_shard=3, jobs=2)
    done, do = [], many._do

    def stop_in_the_second(work, job):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(job[1].name)
        return do(work, job)

    monkeypatch.setattr(many, "_do", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        pack(photos, tmp_path / "cut", per_shard=3, jobs=1)
    assert MANIFEST not in contents(tmp_path / "cut")
    monkeypatch.setattr(many, "_do", lambda work, job: (done.append(job[1].name), do(work, job))[1])
    pack(photos, tmp_path / "cut", per_shard=3, jobs=1)
    pack(photos, tmp_path / "cut", per_shard=3, jobs=1)
    assert done == [f"shard-{i:06}.tar" for i in range(4)]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    with pytest.raises(DataError, match="other pictures or options"):
        pack(photos, tmp_path / "cut", per_shard=4, jobs=1)
    (tmp_path / "cut" / "shard-000001.tar").write_bytes(b"")
    with pytest.raises(DataError, match="shard-000001.tar is missing or damaged"):
        pack(photos, tmp_path / "cut", per_shard=3, jobs=1)


def test_shards_do_not_go_among_the_pictures(photos, tmp_path):
    with pytest.raises(DataError, match="name another one"):
        pack(photos, tmp_path / ".." / tmp_path.name / photos.relative_to(tmp_path))


def test_links_to_nothing_are_left_out(photos, tmp_path):
    (photos / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (photos / "round.png").symlink_to(photos / "round.png")
    left_out = {row["name"]: row["reason"] for row in pack(photos, tmp_path / "out", jobs=1)["left_out"]}
    assert {"gone.png", "round.png"} <= left_out.keys()
    assert str(tmp_path) not in " ".join(left_out.values())
    with pytest.raises(DataError, match="All 12 pictures in .* are broken or too small"):
        pack(photos, tmp_path / "none", min_side=999, jobs=1)


def test_a_table_gives_pictures_order_and_licences(photos, tmp_path):
    table = tmp_path / "table.csv"
    rows = "ImageID,License\np5,by\nthin,by\ngone,by\nbroken,by\np1,\np3,sa\np4,by\n"
    table.write_text(rows, encoding="utf-8-sig")  # as spreadsheets write it
    manifest = pack(photos, tmp_path / "out", 64, table=table, limit=3, jobs=1)
    (row,) = manifest["shards"]
    assert row["names"] == ["p5.png", "free/p1.png", "p3.png"] and manifest["left_out"] == []
    assert [manifest["licences"][i]["name"] for i in row["licences"]] == ["by", "free/COPYING.txt", "sa"]
    table.write_text("License,ImageID\nby\nby,p3\n")  # a row is too short
    assert pack(photos, tmp_path / "two", 64, table=table, jobs=1)["shards"][0]["names"] == ["p3.png"]
    for text, sentence in (("a,b\n1,2\n", "no column name or ImageID"), ("name\nnobody\n", "no picture to pack")):
        table.write_text(text)
        with pytest.raises(DataError, match=sentence):
            pack(photos, tmp_path / "other", table=table)
    assert not (tmp_path / "other").exists()


def test_the_command_names_what_it_leaves_out(photos, tmp_path, monkeypatch, capsys):
    words = ["entroformer", "data", "pack", str(photos), str(tmp_path / "out"), "--jobs", "1"]
    monkeypatch.setattr("sys.argv", words)
    assert cli.main() == 0
    said = capsys.readouterr()
    assert "7 pictures in 1 shards" in said.out and "3 left out" in said.out
    assert "left out broken.png: " in said.err and "left out thin.png: Its shorter side has 20 pixels." in said.err
    for option in ("--limit", "--per-shard", "--jobs"):
        monkeypatch.setattr("sys.argv", [*words[:4], str(tmp_path / "none"), option, "0"])
        assert cli.main() == 1 and f"{option} must be at least 1" in capsys.readouterr().err


# ---- Open Images ----


def index(path, count: int, first: int = 0, subset: str = "train") -> str:
    """An index of the true columns, with the checksum of nothing."""
    with open(path, "w", newline="") as file:
        rows = csv.DictWriter(file, COLUMNS)
        rows.writeheader()
        for i in range(first, first + count):
            row = dict.fromkeys(COLUMNS, "") | {"ImageID": f"{i:016x}", "Subset": subset, "Title": 'a "b", c'}
            address, md5 = f"https://example.org/{i}_o.jpg", "1B2M2Y8AsgTpgAmY7PhCfg=="
            rows.writerow(row | {"OriginalURL": address, "License": "by", "OriginalMD5": md5 if i % 2 else ""})
    return str(path)


def test_the_list_follows_from_the_seed_and_the_ids_alone(tmp_path):
    whole = index(tmp_path / "whole.csv", 40)
    parts = [index(tmp_path / "b.csv", 20, 20), index(tmp_path / "a.csv", 20), index(tmp_path / "c.csv", 9, 90, "test")]
    for out, files, seed in (("one", [whole], 0), ("two", parts, 0), ("other", [whole], 1)):
        assert plan_download(files, tmp_path / out, count=10, spare=0.5, seed=seed) == 15
    one, two, other = (contents(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two and one["list.csv"] != other["list.csv"]
    rows = list(csv.DictReader(one["list.csv"].decode().splitlines()))
    assert tuple(rows[0]) == COLUMNS and len({row["ImageID"] for row in rows}) == 15 and rows[0]["Title"] == 'a "b", c'
    lines = one["download.txt"].decode().splitlines()
    kinds = Counter(line.partition("=")[0] if line[0] == " " else "address" for line in lines)
    odd = sum(int(row["ImageID"], 16) % 2 for row in rows)
    assert kinds == {"address": 15, "  out": 15, "  checksum": odd}
    assert lines[1] == f"  out={rows[0]['ImageID']}.jpg"
    assert "  checksum=md5=d41d8cd98f00b204e9800998ecf8427e" in lines
    assert b"--limit 10" in one["README.txt"]


def test_an_index_that_is_none(tmp_path):
    good = index(tmp_path / "good.csv", 4)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "cut.csv").write_text((tmp_path / "good.csv").read_text()[:-40])
    for files, sentence in (
        ([good], "has 4 pictures of the subset train, and 10 are wanted"),
        ([good, str(tmp_path / "other.csv")], "it has no column Author"),
        ([str(tmp_path / "cut.csv")], "cut short in line 5"),
        ([str(tmp_path / "gone.csv")], "cannot be read: No such file"),
    ):
        with pytest.raises(DataError, match=sentence):
            plan_download(files, tmp_path / "out", count=10)
    with pytest.raises(DataError, match="--count must be at least 1"):
        plan_download([good], tmp_path / "out", count=-5)
    assert not (tmp_path / "out").exists()
