"""Many files: where they go, what a bad one costs, what is kept; and the standard streams."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import warm
from conftest import micro_model, small_disk
from PIL import Image
from test_cli import call

from entroformer_lib import cli
from entroformer_lib.codec import codec, many
from entroformer_lib.datasets import sample_picture
from entroformer_lib.errors import DataError
from entroformer_lib.weights.zoo import load_model, save_weights

PLACES = ("cat.png", "cat.jpg", "a/cat.png", "b/c/cat.png", "b/dog.png")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Pictures in folders, one of them bad, files that are none, and a model found by the name `micro`."""
    save_weights(micro_model("parallel"), tmp_path / "weights" / "micro.safetensors", {"lmbda": 0.5})
    for number, name in enumerate(PLACES):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        sample_picture("chelsea").crop((0, 0, 70 + number, 64)).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "a" / "bad.png").write_text("no picture")
    (tmp_path / "photos" / "notes.txt").write_text("not meant")
    monkeypatch.setenv("ENTROFORMER_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def under(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by their places."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


COMPRESS = ("compress", "photos", "-o", "small", "--model", "micro", "--jobs", 1)


def test_a_folder_there_and_back(home):
    """Every file keeps its place, a bad one is told and passed over, and each is what it would be by itself."""
    out, errors = call(*COMPRESS, expect=1)
    assert "small: 5 of 6 pictures done, 0 kept, 1 failed; " in out and " bits per pixel" in out
    assert f"entroformer: {Path('photos/a/bad.png')}: " in errors and "1 of 6 files failed." in errors
    small = under(home / "small")
    assert set(small) == {"cat.png.ef", "cat.jpg.ef", "a/cat.ef", "b/c/cat.ef", "b/dog.ef"}
    model = load_model("micro", "cpu")
    assert small["b/dog.ef"] == codec.encode(model, home / "photos" / "b" / "dog.png")
    out, _ = call("decompress", "small", "-o", "back", "--jobs", 1)
    assert "back: 5 of 5 .ef files done, 0 kept, 0 failed\n" in out
    back = under(home / "back")
    assert set(back) == {place.removesuffix(".ef") + ".png" for place in small}
    assert {Image.open(io.BytesIO(data)).size for data in back.values()} == {(70 + n, 64) for n in range(5)}


def test_what_is_done_is_kept(home):
    (home / "photos" / "a" / "bad.png").unlink()
    call(*COMPRESS)
    first = under(home / "small")
    (home / "small" / "a" / "cat.ef").write_bytes(b"mine")
    (home / "small" / "b" / "dog.ef").unlink()
    assert "4 of 5 outputs exist" in call(*COMPRESS, expect=1)[1]
    assert not (home / "small" / "b" / "dog.ef").exists()
    assert "choose one" in call(*COMPRESS, "--resume", "--force", expect=1)[1]
    out, notes = call(*COMPRESS, "--resume", "--json")
    rows = {row["output"]: row for row in map(json.loads, out.splitlines())}
    assert len(rows) == 5 and sum(row.get("kept", False) for row in rows.values()) == 4
    assert rows[str(Path("small/b/dog.ef"))]["bytes"] == len(first["b/dog.ef"])
    assert "1 of 5 pictures done, 4 kept" in notes
    assert under(home / "small") == {**first, "a/cat.ef": b"mine"}
    call(*COMPRESS, "--force")
    assert under(home / "small") == first
    one = [COMPRESS[0], "photos/b/dog.png", "-o", "small/b/dog.ef"]
    assert json.loads(call(*one, "--resume", "--json")[0])["kept"]
    assert "choose one" in call(*one, "--resume", "--force", expect=1)[1]


def test_several_processes_give_the_same_files(home):
    """And the same rows, in the same order."""
    warm.ensure_server()
    one, _ = call(*COMPRESS, "--json", expect=1)
    first = under(home / "small")
    shutil.rmtree(home / "small")
    several, _ = call(*COMPRESS[:-1], 2, "--json", expect=1)
    assert under(home / "small") == first and several == one


@pytest.mark.parametrize("inputs, outputs", [
    (["photos/*.png"], ["cat.ef"]),
    (["photos/**/c*.png"], ["a/cat.ef", "b/c/cat.ef", "cat.ef"]),
    (["photos/a/cat.png", "photos/b/c/cat.png"], ["a/cat.ef", "b/c/cat.ef"]),
    (["photos/b", "photos/a/cat.png"], ["a/cat.ef", "b/c/cat.ef", "b/dog.ef"]),
    (["photos/b", "photos/b/dog.png", "photos/b/../b/dog.png"], ["c/cat.ef", "dog.ef"]),
    (["photos/b/[d]og.png"], ["dog.ef"]),
    (["photos/b/c"], ["cat.ef"]),
])  # fmt: skip
def test_places(home, inputs, outputs):
    work = many.Compress("micro")
    assert [output.as_posix() for _, output in many.jobs_of(inputs, Path(), work)] == outputs


def test_names_that_only_look_like_patterns(home):
    (home / "photos" / "cat.png").rename(home / "x[1].png")
    (home / "photos" / "Cat.tif").write_bytes(b"")  # of which some file systems would make the output of cat.jpg
    call("compress", "x[1].png", "--model", "micro")
    assert (home / "x[1].ef").is_file()
    names = {output.name for _, output in many.jobs_of(["photos/*"], Path(), many.Compress("micro"))}
    assert {"cat.jpg.ef", "Cat.tif.ef"} <= names
    shutil.copy(home / "x[1].png", home / "photos" / "cat.jpg.png")
    with pytest.raises(DataError, match="rename one"):
        many.jobs_of(["photos"], Path(), many.Compress("micro"))


@pytest.mark.parametrize("words, sentence", [
    (["photos"], "-o FOLDER"),
    (["photos", "-o", "-"], "-o FOLDER"),
    (["photos", "-o", "photos/notes.txt"], "-o FOLDER"),
    (["photos/*.xyz", "-o", "x"], "no picture in photos/*.xyz"),
    (["weights", "-o", "x"], "no picture in weights"),
    (["photos", "-", "-o", "x"], "'-' does not name"),
    (["photos", "-o", "x", "--jobs", "0"], "--jobs must be at least 1"),
    (["photos", "-o", "x", "--model", "nosuch"], "no model 'nosuch'"),
    (["photos", "-o", "x", "--bpp", "-1"], "number above 0"),
    (["-"], "-o FILE"),
])  # fmt: skip
def test_words_that_make_no_sense(home, words, sentence):
    model = [] if "--model" in words else ["--model", "micro"]
    assert sentence in call("compress", *words, *model, expect=1)[1]
    assert not (home / "x").exists()


def test_an_output_that_ends_as_a_folder(home):
    """A pattern that the shell replaced by a single name."""
    call("compress", "photos/b/dog.png", "-o", "new/", "--model", "micro", "--jobs", 1)
    assert set(under(home / "new")) == {"dog.ef"}


def piped(monkeypatch, data: bytes, *words) -> tuple[int, bytes, str]:
    """A command with something on its standard input.  ->  exit code, standard output, standard error"""
    streams = {name: io.TextIOWrapper(io.BytesIO(data if name == "stdin" else b"")) for name in ("stdin", "stdout")}
    errors = io.StringIO()
    with monkeypatch.context() as patch:
        for name, stream in {**streams, "stderr": errors}.items():
            patch.setattr(sys, name, stream)
        patch.setattr(sys, "argv", ["entroformer", *words])
        code = cli.main()
    return code, streams["stdout"].buffer.getvalue(), errors.getvalue()


def test_standard_streams(home, monkeypatch):
    """Nothing but the file is on the standard output."""
    photo = home / "photos" / "b" / "dog.png"
    code, data, said = piped(monkeypatch, photo.read_bytes(), "compress", "-", "-o", "-", "--model", "micro", "--json")
    assert code == 0 and data == codec.encode(load_model("micro", "cpu"), photo)
    assert json.loads(said)["bytes"] == len(data)
    code, picture, said = piped(monkeypatch, data, "decompress", "-", "-o", "-")
    assert code == 0 and Image.open(io.BytesIO(picture)).size == (74, 64) and said == "-: 74 x 64\n"
    code, nothing, said = piped(monkeypatch, b"no picture", "compress", "-", "-o", "-", "--model", "micro")
    assert code == 1 and nothing == b"" and said.startswith("entroformer: The picture is not")
    code, nothing, said = piped(monkeypatch, data[:-3], "decompress", "-", "-o", "x.png")
    assert code == 1 and "damaged" in said and not (home / "x.png").exists()


def test_no_output_takes_an_inputs_place(home):
    """Two `.ef` files under names of pictures, into the folder in which they lie."""
    data = codec.encode(load_model("micro", "cpu"), home / "photos" / "b" / "dog.png")
    for name in ("a.png", "b.png"):
        (home / name).write_bytes(data)
    _, errors = call("decompress", "a.png", "b.png", "-o", ".", "--force", expect=1)
    assert "is one of the inputs; choose another folder" in errors
    assert (home / "a.png").read_bytes() == (home / "b.png").read_bytes() == data


def test_one_file_needs_no_cluster(home):
    words = ("compress", "photos/b/dog.png", "-o", "dog.ef", "--model", "micro", "--scheduler", "tcp://127.0.0.1:1")
    assert "--scheduler is for many files" in call(*words, expect=1)[1]


def test_a_closed_output_is_no_error(home, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["entroformer", "compress", "photos/b/dog.png", "-o", "dog.ef", "--model", "micro"]
    )
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert cli.main() == 0
    assert (home / "dog.ef").is_file()


def test_one_file_as_json_and_resumed(home):
    words = ("compress", "photos/b/dog.png", "-o", "dog.ef", "--model", "micro", "--resume")
    row = json.loads(call(*words, "--json")[0])
    assert row["output"] == "dog.ef" and row["bytes"] == (home / "dog.ef").stat().st_size and row["width"] == 74
    (home / "dog.ef").write_bytes(b"mine")
    assert "kept" in call(*words)[0]
    assert (home / "dog.ef").read_bytes() == b"mine"


def test_a_full_disk_leaves_no_half_file_among_many(home):
    """Or --resume would take it for done."""
    _, errors = small_disk(lambda: call(*COMPRESS, expect=1))
    assert "6 of 6 files failed." in errors and under(home / "small") == {}
