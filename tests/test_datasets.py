"""Downloads, from a real server on the loopback address."""

import hashlib
import http.server
import threading

import pytest
from conftest import pictures_folder

from entroformer_lib import datasets
from entroformer_lib.datasets import SAMPLES, fetch, fetch_file, sample_picture
from entroformer_lib.errors import DataError

CONTENT = bytes(range(256)) * 400
CHECKSUM = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    asked: list = []

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
        self.wfile.write(CONTENT[first:])

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
