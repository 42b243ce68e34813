"""Pictures in folders; and downloads, from a real server on the loopback address."""

import hashlib
import http.server
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import pictures_folder
from PIL import Image

from entroformer_lib import datasets
from entroformer_lib.datasets import SAMPLES, fetch, fetch_file, files_under, is_picture, sample_picture
from entroformer_lib.errors import DataError, UserError
from entroformer_lib.studies.rate_distortion import pictures_of, pictures_to_test

CONTENT = bytes(range(256)) * 400
CHECKSUM = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    asked: list = []
    ends_at: int | None = None

    def do_GET(self):
        start = self.headers.get("Range")
        self.asked.append(start)
        if self.path != "/file.bin":
            self.send_error(404)
            return
        first = int(start.removeprefix("bytes=").rstrip("-")) if start else 0
        if first >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - first))
        self.end_headers()
        self.wfile.write(CONTENT[first : self.ends_at])

    def log_message(self, *args):
        pass


@pytest.fixture
def address():
    Server.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_broken_download_is_continued(address, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    path = fetch_file(f"{address}/file.bin", CHECKSUM, tmp_path)
    assert path.read_bytes() == CONTENT and Server.asked == ["bytes=1000-"]
    fetch_file(f"{address}/file.bin", CHECKSUM, tmp_path)
    assert len(Server.asked) == 1  # what is whole is not fetched again


def test_a_connection_that_ends_early_keeps_what_came(address, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Server, "ends_at", 700)
        with pytest.raises(DataError, match=f"{len(CONTENT) - 700} bytes before the end"):
            fetch_file(f"{address}/file.bin", CHECKSUM, tmp_path)
    assert fetch_file(f"{address}/file.bin", CHECKSUM, tmp_path).read_bytes() == CONTENT
    assert Server.asked == [None, "bytes=700-"]


def test_pictures_that_were_there_before_are_not_counted(tmp_path, monkeypatch):
    picture = tmp_path / "mine" / "holiday.png"
    picture.parent.mkdir()
    picture.write_bytes(b"not fetched")
    monkeypatch.setitem(datasets.DATASETS, "none", lambda: [])
    assert fetch("none", tmp_path) == []


def test_archives_of_other_people_stay_closed(address, tmp_path, monkeypatch):
    monkeypatch.setitem(datasets.DATASETS, "one", lambda: [(f"{address}/file.bin", CHECKSUM)])
    (tmp_path / "holiday.zip").write_bytes(b"no archive")
    assert fetch("one", tmp_path) == [] and (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_download_that_was_complete_but_not_moved(address, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert fetch_file(f"{address}/file.bin", CHECKSUM, tmp_path).read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(address, tmp_path):
    with pytest.raises(DataError, match="checksum"):
        fetch_file(f"{address}/file.bin", "sha256:00", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_reached_names_the_folder(address, tmp_path):
    with pytest.raises(DataError, match=f"404.*{tmp_path.name}"):
        fetch_file(f"{address}/other.bin", CHECKSUM, tmp_path)
    with pytest.raises(DataError, match=f"cannot be reached.*put it into.*{tmp_path.name}"):
        fetch_file("http://127.0.0.1:9/file.bin", CHECKSUM, tmp_path)
    with pytest.raises(DataError, match="imagenet"):
        fetch("imagenet", tmp_path)


def test_another_file_of_that_name_stays(address, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"mine")
    with pytest.raises(DataError, match="file.bin exists and is another file"):
        fetch_file(f"{address}/file.bin", CHECKSUM, tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == b"mine"


def test_a_server_that_talks_nonsense_is_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            connection.recv(1000)
            connection.sendall(b"what?\r\n\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(DataError, match="cannot be reached"):
            fetch_file(f"http://127.0.0.1:{server.getsockname()[1]}/file.bin", CHECKSUM, tmp_path)


def test_kodak_already_there_is_recognised(tmp_path):
    """All 24 checksums are those of the real pictures, so nothing is fetched when the folder is filled by hand."""
    remotes = datasets.DATASETS["kodak"]()
    assert [url.rpartition("/")[2] for url, _ in remotes] == [f"kodim{i:02}.png" for i in range(1, 25)]
    kodak = pictures_folder("kodak")
    if kodak:
        for path in kodak.glob("*.png"):
            (tmp_path / path.name).symlink_to(path)
        assert len(fetch("kodak", tmp_path)) == 24


def test_samples_need_no_network(tmp_path):
    paths = fetch("samples", tmp_path / "new")
    assert [p.stem for p in paths] == list(SAMPLES)
    assert sample_picture("rocket").mode == "RGB"
    with pytest.raises(DataError, match="lena"):
        sample_picture("lena")


# ---- pictures in folders ----


def save_picture(path, seed: int = 0, **options) -> None:
    """A photograph-like picture of 96 x 64 pixels, in the format that the ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 12, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels).resize((96, 64), Image.Resampling.BICUBIC)
    picture.convert("L" if path.suffix == ".pgm" else "RGB").save(path, **options)


def test_every_format_that_pillow_reads_is_a_picture(tmp_path):
    endings = [".jp2", ".avif", ".pgm", ".jfif", ".PNG", ".qoi", ".tga", ".j2k", ".pcx", ".mpo", ".webp"]
    for i, ending in enumerate(endings):
        save_picture(tmp_path / f"p{i:02}{ending}")
    (tmp_path / "notes.txt").write_text("no picture")
    assert [path.suffix for path in pictures_to_test(tmp_path)] == endings
    assert not any(map(is_picture, ("a.pdf", "a.h5", "a.mpg", "a.eps", "a.tar", "png")))


def test_links_are_followed_and_no_folder_is_entered_twice(tmp_path):
    save_picture(tmp_path / "outside" / "far.png")
    save_picture(tmp_path / "photos" / "near.png")
    folder, sub = tmp_path / "photos", tmp_path / "photos" / "sub"
    sub.mkdir()
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "twin").symlink_to(tmp_path / "outside")
    (sub / "loop").symlink_to("..")
    (sub / "up").symlink_to(tmp_path)
    (sub / "single.png").symlink_to(folder / "near.png")
    found = [path.relative_to(folder).as_posix() for path in files_under(folder)]
    assert found == ["link/far.png", "near.png", "sub/single.png"]
    assert [path.name for path in files_under(folder / "link")] == ["far.png"]


def test_what_cannot_be_read_is_named_and_not_counted(tmp_path):
    for i, name in enumerate(("a.png", "c.png", "d.png")):
        save_picture(tmp_path / name, i)
    (tmp_path / "._a.png").write_bytes(b"\0\5\26\7")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    (tmp_path / "c0.png").symlink_to("nowhere.png")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "e.tiff")
    told = []
    assert [path.name for path in pictures_to_test(tmp_path, 2, told.append)] == ["a.png", "c.png"]
    assert [Path(sentence.partition(" is left out: ")[0]).name for sentence in told] == ["._a.png", "b.png"]
    with pytest.warns(UserWarning, match="is left out") as warned:
        assert [name for name, _ in pictures_of(tmp_path)] == ["a", "c", "d"]
    assert [Path(str(w.message).partition(" is left")[0]).name for w in warned if w.category is UserWarning] == [
        "._a.png", "b.png", "c0.png", "e.tiff",
    ]  # fmt: skip


@pytest.mark.parametrize("limit, error", [(None, "no picture in .* that can be read"), (0, "limit"), (-1, "limit")])
def test_folders_without_an_answer(tmp_path, limit, error):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=error):
        pictures_to_test(tmp_path, limit, lambda sentence: None)
    with pytest.raises(DataError, match="no folder"):
        pictures_to_test(tmp_path / "missing")


def test_animated_pictures_are_their_first_frame(tmp_path):
    save_picture(tmp_path / "still.png", 1)
    frames = [Image.open(tmp_path / "still.png"), Image.new("RGB", (96, 64), "red"), Image.new("RGB", (96, 64))]
    for name, options in (("a.png", {}), ("b.webp", {"lossless": True}), ("c.gif", {})):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    with pytest.warns(UserWarning) as told:
        (_, first), (_, second), (_, gif), (_, still) = pictures_of(tmp_path)
    assert sum("only the first frame" in str(warning.message) for warning in told) == 3
    assert np.array_equal(first, still) and np.array_equal(second, still)
    assert np.abs(np.asarray(gif, float) - np.asarray(still)).mean() < 16  # few colours
