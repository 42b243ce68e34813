"""The command line as a user meets it, with exit codes and sentences."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
import warm
from conftest import micro_model
from PIL import Image

from benchmarks.publish import training_command
from entroformer_lib import cli
from entroformer_lib.training.config import TrainConfig
from entroformer_lib.weights.zoo import load_model, save_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """A picture, its .ef file, and a model found by the name `micro`."""
    from entroformer_lib.codec import codec
    from entroformer_lib.datasets import sample_picture

    folder = tmp_path_factory.mktemp("cli")
    save_weights(micro_model("parallel"), folder / "weights" / "micro.safetensors", {"lmbda": 0.5})
    sample_picture("chelsea").crop((0, 0, 200, 180)).save(folder / "cat.png")
    (folder / "cat.ef").write_bytes(
        codec.encode(load_model(folder / "weights" / "micro.safetensors", "cpu"), folder / "cat.png")
    )
    return folder


@pytest.fixture(autouse=True)
def _environment(folder, monkeypatch):
    monkeypatch.setenv("ENTROFORMER_WEIGHTS", str(folder / "weights"))


def call(*arguments, expect: int = 0) -> tuple[str, str]:
    """Runs a command in this process, which spares seconds of imports.  ->  stdout, stderr"""
    import contextlib
    import io

    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["entroformer", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = cli.main()
            except SystemExit as stop:
                code = stop.code
    finally:
        sys.argv = argv
    assert code == expect, err.getvalue()
    if expect:
        assert "Traceback" not in err.getvalue()
    return out.getvalue(), err.getvalue()


def test_every_command_has_help_with_an_example():
    overview = call("--help")[0]
    ours = ("compress", "decompress", "info", "models", "train", "eval", "data", "explore")
    for command in (*ours, "import-official", "export-onnx"):
        assert command in overview
        text = call(command, "--help")[0]
        assert f"entroformer {command} " in text and "{None}" not in text


def test_studies_are_listed_and_have_help():
    assert "study" in call("--help")[0]
    assert "ablation" in call("study", "--help")[0]
    text = call("study", "ablation", "--help")[0]
    assert "entroformer study ablation --grid" in text and "--dry-run" in text


def study(folder, photos, *arguments, expect: int = 0) -> tuple[str, str]:
    """A study of micro transforms that takes a second."""
    terms = ("--transforms", "micro", "--train-on", photos, "--kodak", photos, "--out", folder / "runs")
    small = ("--steps", 2, "--crop", 64, "--limit", 1, "--results", folder / "results")
    return call("study", "ablation", *terms, *small, *arguments, expect=expect)


def test_dry_run_starts_nothing(photo_folder, tmp_path):
    out, _ = study(tmp_path, photo_folder, "--grid", "table1", "figure6", "--dry-run")
    assert "diamond-seed1" in out and "22 of 22 runs to do" in out
    study(tmp_path, photo_folder, "--grid", "table1", "--save-only")
    assert not (tmp_path / "runs").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's advice
def test_a_row_of_ones_own(photo_folder, tmp_path):
    """Trained, measured and saved; then it is there, and nothing is done again."""
    own = ("--fields", "dim=24", "heads=2", "context_layers=1", "top_k=4", "--seeds", 3)
    out, _ = study(tmp_path, photo_folder, *own)
    assert "done" in out and "ablation-own.json" in out
    row, *curve = json.loads((tmp_path / "results" / "ablation-own.json").read_text())["rows"]
    assert {point["grid"] for point in curve} == {"own_curve"} and curve[-1]["step"] > curve[0]["step"]
    assert row["seed"] == 3 and row["bpp"] > 0 and row["name"] == "dim=24 heads=2 context_layers=1 top_k=4"
    again, _ = study(tmp_path, photo_folder, *own)
    assert "done" not in again
    assert "finished" in study(tmp_path, photo_folder, *own, "--dry-run")[0]
    _, errors = study(tmp_path, photo_folder, *own, "--crop", 128, expect=1)
    assert "other crop" in errors


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("--grid", "table9"), "no grid 'table9'"),
        ((), "Name a grid"),
        (("--fields", "radios=2"), "no field 'radios'"),
        (("--fields", "radius"), "name=value"),
        (("--fields", "radius=2", "--model", "rnn"), "no model 'tiny-rnn'"),
        (("--grid", "table1", "--transforms", "nothing"), "no model 'nothing'"),
        (("--grid", "table1", "--kodak", "/nowhere"), "nowhere"),
        (("--grid", "table1", "--scheduler", "nonsense"), "does not answer; nothing was started"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, tuple) else "",
)
def test_a_study_that_cannot_be(arguments, sentence, photo_folder, tmp_path):
    assert sentence in study(tmp_path, photo_folder, *arguments, expect=1)[1]
    assert list(tmp_path.iterdir()) == []


def test_there_and_back_in_real_processes(folder, tmp_path):
    for words, said in (
        (("compress", folder / "cat.png", "-o", tmp_path / "cat.ef", "--model", "micro"), "bits per pixel"),
        (("decompress", tmp_path / "cat.ef", "-o", tmp_path / "cat.png"), "200 x 180"),
    ):
        code, text = warm.run(*words, output=tmp_path / "said.txt")
        assert code == 0 and said in text, text
    assert Image.open(tmp_path / "cat.png").size == (200, 180)


def test_info_and_models_as_json(folder):
    facts = json.loads(call("info", folder / "cat.ef", "--json")[0])
    assert (facts["width"], facts["height"], facts["model"]) == (200, 180, "micro")
    assert facts["bytes"] == (folder / "cat.ef").stat().st_size
    assert facts["bytes_y"] + facts["bytes_z"] + facts["bytes_container"] == facts["bytes"]
    rows = {row["name"]: row for row in json.loads(call("models", "--json")[0])}
    row = rows["micro"]
    assert row["variant"] == "parallel" and row["lmbda"] == 0.5 and len(row["sha256"]) == 64 and row["bytes"] > 1000
    assert {"architecture", "kodak_bpp", "kodak_psnr_db"} <= set(row)
    assert "micro" in call("models")[0]


def test_models_that_are_none_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTROFORMER_WEIGHTS", str(tmp_path))
    save_weights(micro_model("context"), tmp_path / "alone.safetensors", {})
    rows = {row["name"]: row["variant"] for row in json.loads(call("models", "--json")[0])}
    assert rows["alone"] == "context-serial"
    (tmp_path / "foreign.safetensors").write_text("something else")
    assert "foreign.safetensors" in call("models")[1]


def test_eval_goes_through_real_bytes(folder, photo_folder, tmp_path):
    out, _ = call("eval", "micro", "--data", photo_folder, "--limit", 2, "--json", tmp_path / "r.json")
    assert "mean" in out
    result = json.loads((tmp_path / "r.json").read_text())
    assert [row["image"] for row in result["images"]] == ["astronaut", "chelsea"]
    for row in result["images"]:
        assert row["bpp"] == 8 * row["bytes"] / (row["width"] * row["height"])
        assert row["psnr_db"] > 5 and row["encode_s"] > 0 and row["decode_s"] > 0
    assert result["mean"]["bpp"] == pytest.approx(np.mean([row["bpp"] for row in result["images"]]))
    assert len(result["provenance"]["weights_sha256"]) == 64
    assert json.loads(call("eval", "micro", "--data", photo_folder, "--limit", 1, "--json", "-")[0])["mean"]


def test_train_from_the_command_line(photo_folder, tmp_path):
    out, _ = call(
        "train", "--data", photo_folder, "--out", tmp_path / "run", "--steps", 2, "--batch", 1, "--crop", 64,
        "--accelerator", "cpu", "--devices", 1, "--json",
    )  # fmt: skip
    result = json.loads(out)
    assert Path(result["weights"]).is_file() and result["last"]["step"] == 2
    assert list((tmp_path / "run").glob("events*"))  # TensorBoard's


def test_data_samples(tmp_path):
    assert "4 pictures" in call("data", "samples", "--to", tmp_path / "s")[0]


def test_import_official(tmp_path):
    from released import CASES, released, save

    save(released(CASES["parallel"]), tmp_path / "theirs.pth")
    assert "MB" in call("import-official", tmp_path / "theirs.pth", tmp_path / "ours.safetensors", "--top-k", 6)[0]
    model = load_model(tmp_path / "ours.safetensors", "cpu")
    assert model.config.variant == "parallel" and model.config.top_k == 6 and model.config.z_prior == "gaussian"


# ---- bad input: one plain sentence, exit code 1 or 2, nothing lost ----


@pytest.fixture
def bad(folder, tmp_path):
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "cut.png").write_bytes((folder / "cat.png").read_bytes()[:5000])
    (tmp_path / "empty.ef").write_bytes(b"")
    whole = (folder / "cat.ef").read_bytes()
    (tmp_path / "cut.ef").write_bytes(whole[:-9])
    (tmp_path / "new.ef").write_bytes(whole[:3] + b"\x07" + whole[4:])
    (tmp_path / "dir.ef").mkdir()
    (tmp_path / "there.png").write_bytes(b"precious")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "list.txt").write_bytes(b"\xff.png\n")
    (tmp_path / "foreign").mkdir()
    for name in ("weights.safetensors", "coffee.png", "shard-000000.tar"):
        (tmp_path / "foreign" / name).write_text("somebody else's")
    return tmp_path


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["compress", "{bad}/missing.png"], "no picture"),
        (["compress", "{bad}/text.png"], "not a picture"),
        (["compress", "{bad}/cut.png", "-o", "{bad}/x.ef"], "cannot be read"),
        (["compress", "{bad}/dir.ef", "-o", "{bad}/x.ef"], "folder"),
        (["compress", "{good}/cat.png", "-o", "{bad}/x.ef", "--model", "nosuch"], "no model 'nosuch'"),
        (["compress", "{good}/cat.png", "-o", "{bad}/x.ef", "--model", "{bad}/text.safetensors"], "safetensors"),
        (["compress", "{good}/cat.png", "-o", "{bad}/nowhere/x.ef", "--model", "micro"], "no folder"),
        (["compress", "{good}/cat.png", "-o", "{bad}/dir.ef", "--model", "micro"], "folder"),
        (["decompress", "{bad}/missing.ef"], "no file"),
        (["decompress", "{bad}/empty.ef"], "empty"),
        (["decompress", "{bad}/cut.ef", "-o", "{bad}/y.png"], "cut short or damaged"),
        (["decompress", "{bad}/new.ef"], "version 7"),
        (["decompress", "{bad}/dir.ef"], "folder"),
        (["decompress", "{bad}/text.png", "-o", "{bad}/y.png"], "not an .ef file"),
        (["decompress", "{good}/cat.ef", "-o", "{bad}/there.png"], "--force"),
        (["decompress", "{good}/cat.ef", "-o", "{bad}/cat.xyz"], "picture format"),
        (["info", "{bad}/empty.ef"], "empty"),
        (["eval", "micro", "--data", "{bad}/dir.ef"], "no picture"),
        (["train", "--data", "{bad}/nothing", "--out", "{bad}/run", "--devices", "1"], "no training pictures"),
        (["data", "pack", "{bad}/nothing", "{bad}/d"], "no folder"),
        (["data", "openimages", "{bad}/nothing.csv", "--to", "{bad}/d"], "nothing.csv cannot be read"),
        (["compress", "{good}/cat.png", "-o", "{bad}/x.webp", "--model", "micro"], "taken for a picture"),
        (["compress", "{good}/cat.png", "-o", "{bad}/x.ef", "--model", "micro", "--jobs", "0"], "at least 1"),
        (["eval", "micro", "--data", "{good}", "--json", "{bad}/there.png"], "exists and is not a result"),
        (["explore", "{good}/cat.png", "-o", "-"], "name a file"),
        (["study", "ablation", "--grid", "table1", "--seeds", "--kodak", "{good}"], "Name a seed"),
        (["train", "--data", "{good}", "--out", "{bad}/foreign"], "no config.json beside it"),
        (["train", "--data", "{good}", "--out", "{bad}/run", "--lr", "1e39"], "up to 1000"),
        (["train", "--data", "{bad}/list.txt", "--out", "{bad}/run"], "not text in UTF-8"),
        (["data", "samples", "--to", "{bad}/foreign"], "is another picture"),
        (["data", "pack", "{good}", "{bad}/foreign"], "no manifest says of what"),
        (["data", "openimages", "{bad}/nothing.csv", "--to", "{bad}/d", "--spare", "nan"], "--spare"),
        (["import-official", "{bad}/text.safetensors", "{bad}/w.safetensors"], "not a checkpoint"),
        (["import-official", "{bad}/missing.pth", "{bad}/w.safetensors"], "missing.pth"),
        (["import-official", "{bad}/there.png", "{bad}/text.safetensors"], "--force"),
    ],
)
def test_bad_input(arguments, sentence, folder, bad):
    before = {p: p.read_bytes() for p in bad.rglob("*") if p.is_file()}
    _, errors = call(*[a.format(bad=bad, good=folder) for a in arguments], expect=1)
    lines = [line for line in errors.splitlines() if line.startswith("entroformer: ")]
    assert len(lines) == 1 and sentence in lines[0]
    assert all(p.read_bytes() == content for p, content in before.items())
    assert not list(bad.glob("*.part")) and not (bad / "x.ef").exists()


def test_a_model_that_is_not_here(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ENTROFORMER_WEIGHTS", str(tmp_path))
    _, errors = call("decompress", folder / "cat.ef", "-o", tmp_path / "cat.png", expect=1)
    assert "model that is not here" in errors and "'micro'" in errors


def test_unknown_words_exit_with_2(folder):
    call("compress", expect=2)
    call("squeeze", folder / "cat.png", expect=2)
    call("compress", folder / "cat.png", "--colour", expect=2)


def test_force_replaces(folder, bad):
    call("decompress", folder / "cat.ef", "-o", bad / "there.png", "--force")
    assert Image.open(bad / "there.png").size == (200, 180)


def test_a_full_disk_leaves_no_half_file(folder, tmp_path):
    """The kernel refuses to write beyond 64 bytes, as a full disk would."""
    resource = pytest.importorskip("resource", reason="limits of processes are there on Unix alone")
    (tmp_path / "old.ef").write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, extra in [("new.ef", []), ("old.ef", ["--force"])]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
        try:
            _, errors = call(
                "compress", folder / "cat.png", "-o", tmp_path / name, "--model", "micro", *extra, expect=1
            )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "could not be written" in errors
    assert (tmp_path / "old.ef").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["old.ef"]


def test_losses_are_announced(folder, tmp_path):
    Image.new("RGBA", (70, 70), (1, 2, 3, 90)).save(tmp_path / "clear.png")
    _, notes = call("compress", tmp_path / "clear.png", "--model", "micro")
    assert "transparency is not kept" in notes


def test_the_command_on_a_card_is_its_run():
    """What a model card prints, typed again, is the same run: switches, lists and all."""
    several = dict(even_rates=False, architecture=("position=none",), lmbdas=(0.01, 0.04), init="x")
    frozen = dict(transforms="blocks-parallel", latents="runs/latents", rounded=True)
    for run in (TrainConfig("DATA", "runs/x", **fields) for fields in (several, frozen)):
        words = shlex.split(training_command(dataclasses.asdict(run)))
        assert words[:2] == ["entroformer", "train"]
        assert tyro.cli(TrainConfig, args=words[2:]) == run


def test_formats_that_lose_something_say_so(folder, tmp_path):
    for ending, note in ((".png", ""), (".webp", ""), (".jpg", "JPEG changes the decoded picture a little")):
        _, errors = call("decompress", folder / "cat.ef", "-o", tmp_path / f"cat{ending}")
        assert errors.startswith(note) and bool(errors) == bool(note)
    pictures = [
        np.asarray(Image.open(tmp_path / f"cat{ending}").convert("RGB"), int) for ending in (".png", ".webp", ".jpg")
    ]
    assert (
        np.array_equal(pictures[0], pictures[1]) and 0 < np.abs(pictures[0] - pictures[2]).mean() < 5
    )  # noise, which JPEG likes least


def test_eval_keeps_a_result_of_other_weights(folder, photo_folder, tmp_path):
    """And a picture that is called mean has its row beside the mean."""
    photos, out = tmp_path / "photos", tmp_path / "r.json"
    photos.mkdir()
    Image.new("RGB", (64, 64), "white").save(photos / "mean.png")
    said, _ = call("eval", "micro", "--data", photos, "--json", out, "--jobs", 1)
    assert [line.split()[0] for line in said.splitlines()[1:]] == ["mean", "mean"]
    json.loads(out.read_text(), parse_constant=pytest.fail)  # no Infinity, whatever the picture
    other = tmp_path / "other.safetensors"
    save_weights(micro_model("parallel", seed=1), other, {"lmbda": 0.5})
    before = out.read_bytes()
    _, errors = call("eval", other, "--data", photos, "--json", out, "--jobs", 1, expect=1)
    assert "is the result of other weights (micro)" in errors and out.read_bytes() == before


def test_an_input_is_never_replaced_by_its_output(photo, tmp_path):
    photo.save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").symlink_to("a.png")
    for output in ("a.png", "b.png"):
        words = "compress", tmp_path / "a.png", "-o", tmp_path / output, "--model", "blocks-parallel", "--force"
        assert "is the input itself" in call(*words, expect=1)[1]
        assert "is the input itself" in call("explore", *words[1:], expect=1)[1]
    assert (tmp_path / "a.png").read_bytes() == before
