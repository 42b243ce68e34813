"""Ablations on equal terms: which runs there are, that only what a row names differs, and what is measured."""

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from compressai.models import MeanScaleHyperprior
from conftest import MICRO, micro_model
from PIL import Image

from entroformer_lib.codec import codec
from entroformer_lib.codec.quality import psnr_db
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import ConfigError, DataError, StudyError, UserError, WeightsError
from entroformer_lib.models import config as model_config
from entroformer_lib.models.context import first_slice
from entroformer_lib.studies import ablation, latent_rates, results
from entroformer_lib.studies.ablation import runs_of
from entroformer_lib.studies.ablation_grids import GRIDS, Entry, Grid, Terms, grids_of, own_entry
from entroformer_lib.studies.rate_distortion import bit_maps
from entroformer_lib.training.latents import frozen_transforms, transforms_digest, write_latents
from entroformer_lib.training.loop import Run
from entroformer_lib.views import ablation_figures
from entroformer_lib.weights.pretrained import pretrained_lmbda, with_transforms_of
from entroformer_lib.weights.zoo import load_model, save_weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's advice


@pytest.fixture(scope="module")
def cache(source, photo_folder, tmp_path_factory) -> str:
    return str(write_latents(source, str(photo_folder), tmp_path_factory.mktemp("cache"), crop=64, per_picture=2))


@pytest.fixture
def terms(source, cache, photo_folder, monkeypatch) -> Terms:
    monkeypatch.setitem(model_config.SIZES, "tiny", MICRO)
    return Terms(source, cache, str(photo_folder), str(photo_folder), steps=4, crop=64, limit=2, accelerator="cpu")


def micro_entry(name: str, **architecture) -> Entry:
    """A row that is as small in processes which know nothing of MICRO."""
    small = {key: value for key, value in MICRO.items() if key not in ("N", "M")}
    return Entry(name, "context", {**small, **architecture}, columns={"name": name})


# ---- which runs ----


def test_a_run_in_many_grids_is_trained_once():
    runs = {run.name: run for run in runs_of(grids_of(GRIDS), (0,))}
    assert {grid for grid, _ in runs["diamond-seed0"].rows} == {"table1", "figure6", "figure7", "table4", "released"}
    assert {grid for grid, _ in runs["none-seed0"].rows} == {"table1", "figure6", "table4"}
    assert {grid for grid, _ in runs["parallel-seed0"].rows} == {"table3", "released"}
    assert "h-3-seed0" not in runs and "k-16-seed0" not in runs  # both are the diamond
    assert set(runs["diamond-seed0"].answers) == {"weights", "kodak", "curve", "squares", "k_at_test", "sizes"}
    assert len(runs_of(grids_of(GRIDS), (0, 1))) == 2 * len(runs)
    assert grids_of(["table1", "table1"]) == grids_of(["table1"])  # else each row would count twice


def test_folders_become_whole_paths_and_addresses_stay(tmp_path):
    terms = Terms(train_on="s3://bucket/train/manifest.json", kodak="pictures").placed(tmp_path)
    assert terms.train_on == "s3://bucket/train/manifest.json" and terms.latents == str(tmp_path / "latents")
    assert terms.kodak == str(Path("pictures").absolute())


@pytest.mark.parametrize("grid", GRIDS)
def test_runs_do_not_depend_on_which_grids_are_asked_for(grid):
    """Or a sweep of one grid would not know the folders of another's."""
    everything = {run.name: run for run in runs_of(grids_of(GRIDS), (0,))}
    for run in runs_of(grids_of([grid]), (0,)):
        assert run.entry == everything[run.name].entry


def test_in_another_size_other_rows_coincide():
    """k = 32 is `study`'s own; 16 is tiny's."""
    runs = {run.name for run in runs_of(grids_of(["table1", "figure7"]), (0,), "study")}
    assert "k-16-seed0" in runs and "k-32-seed0" not in runs


def test_only_what_a_row_names_differs():
    terms = Terms("blocks-parallel@0.014", "latents", "photos", "kodak", held_out="list.txt")
    configs = [
        ablation.config_of(terms, run.entry, run.seed, Path("runs") / run.name)
        for run in runs_of(grids_of(GRIDS), (0,))
    ]
    frozen = [dataclasses.asdict(config) for config in configs if config.transforms]
    joint = [dataclasses.asdict(config) for config in configs if not config.transforms]
    named = {"model", "architecture", "out", "one_way", "no_context"}
    for group, free in ((frozen, named), (joint, {"out", "init"})):
        assert len(group) > 1
        assert len({config["out"] for config in group}) == len(group)
        for name in group[0]:
            if name not in free:
                assert all(config[name] == group[0][name] for config in group), name
    assert {config["lmbda"] for config in joint} == {0.014}
    assert {config["held_out"] for config in joint} == {"list.txt"}  # what the latents leave out too


# ---- the study at micro size ----


def test_study_trains_measures_and_saves(terms, tmp_path):
    """The whole of table 1 with two seeds: results, and nothing twice."""
    study = ablation.prepare(grids_of(["table1"]), terms, tmp_path / "runs", seeds=(0, 1))
    assert {row["state"] for row in study.plan()} == {"not begun"}
    assert all(outcome.error is None for outcome in study.go())
    assert study.go() == []
    (path,) = ablation.save(study, tmp_path / "results")
    result = json.loads(path.read_text())
    rows = [row for row in result["rows"] if row["grid"] == "table1"]
    assert len(rows) == 12 and len(result["runs"]) == 12
    curve = [row for row in result["rows"] if row["grid"] == "table1_curve" and row["run"] == "cnn-seed1"]
    assert [row["step"] for row in curve] == [1, 2, 3, 4]
    assert curve[-1]["bpp"] == next(row["bpp_middle"] for row in rows if row["run"] == "cnn-seed1")
    for row in rows:
        pictures = result["pictures"][row["run"]]
        assert row["bpp"] == pytest.approx(np.mean(list(pictures.values())), abs=1e-5) and len(pictures) == 2
    assert result["settings"]["transforms_sha256"] == transforms_digest(frozen_transforms(terms.transforms))
    assert result["runs"]["absolute-seed1"]["seed"] == 1 and "revision" in result["provenance"]
    assert str(tmp_path) not in path.read_text().replace(terms.transforms, "")
    digests = {run["weights_sha256"] for run in result["runs"].values()}
    assert len(digests) == 12  # no two are the same model


def test_saved_runs_are_kept_where_their_folders_are_lost(terms, tmp_path):
    """Only where they are asked for, by all grids that want them, on the same terms."""
    A, B = "diamond-seed0", "h-2-seed0"  # what these rows are called among all grids
    saved, entries = tmp_path / "results", [micro_entry("a"), micro_entry("b", radius=2)]
    one, both = Grid("one", "", tuple(entries[:1])), Grid("both", "", tuple(entries))

    def go(grids: list[Grid], folder: str, keep: bool = True, **other) -> tuple[list[str], list[dict]]:
        study = ablation.prepare(grids, dataclasses.replace(terms, **other), tmp_path / folder, seeds=(0,))
        done = [outcome.name for outcome in study.go(kept_in=saved if keep else None)]
        ablation.save(study, saved, keep)
        return done, json.loads((saved / f"ablation-{grids[0].name}.json").read_text())["rows"]

    done, (before,) = go([one], "first")
    assert done == [A]
    assert go([one], "lost") == ([], [before])
    assert go([both, one], "lost")[0] == [A, B]  # one of the results does not have it
    for path in saved.iterdir():  # as after the first run of two
        result = json.loads(path.read_text())
        for key in ("pictures", "runs"):
            result[key].pop(B, None)
        path.write_text(json.dumps({**result, "rows": [row for row in result["rows"] if row["run"] != B]}))
    done, rows = go([both], "lost again")
    assert done == [B] and [row["run"] for row in rows] == [A, B]
    assert go([both], "other terms", batch=4)[0] == [A, B]
    assert go([both], "anew", keep=False)[0] == [A, B]
    other = tmp_path / "pictures"
    other.mkdir()
    for number, name in enumerate(sorted(path.name for path in Path(terms.kodak).iterdir())):
        pixels = np.random.default_rng(number).integers(0, 256, (96, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save((other / name).with_suffix(".png"))
    assert go([both], "other pictures", kodak=str(other))[0] == [A, B]


def test_runs_with_another_batch_or_other_photographs_are_refused(terms, tmp_path):
    grids = [Grid("one", "", (micro_entry("a"),))]
    ablation.prepare(grids, terms, tmp_path, seeds=(0,)).go()
    with pytest.raises(StudyError, match="another batch"):
        ablation.prepare(grids, dataclasses.replace(terms, batch=4), tmp_path, seeds=(0,))
    with pytest.raises(StudyError, match=f"are those of .*{Path(terms.train_on).name}, and not of .*elsewhere"):
        ablation.prepare(grids, dataclasses.replace(terms, train_on=str(tmp_path / "elsewhere")), tmp_path, seeds=(0,))


def test_estimates_come_from_finished_runs(terms, tmp_path):
    two = Grid("two", "", (Entry("a", "context", {}), Entry("b", "context", {"radius": 2})))
    one = ablation.prepare([dataclasses.replace(two, entries=two.entries[:1])], terms, tmp_path, seeds=(0,))
    both = ablation.prepare([two], terms, tmp_path, seeds=(0,))
    assert [row["seconds"] for row in both.plan()] == [None, None]
    assert "cannot be estimated" in ablation.plan_in_words(both)
    one.go()
    first, second = both.plan()
    assert (first["state"], first["seconds"]) == ("finished", 0) and second["seconds"] > 0
    assert "1 of 2 runs to do" in ablation.plan_in_words(both)


def test_all_that_is_measured(terms, tmp_path, results_folder):
    """Learning curve, other k, second slice and the joint pair give the rows that the figures read."""
    grids = [
        dataclasses.replace(GRIDS["figure7"], entries=GRIDS["figure7"].entries[-1:]),
        dataclasses.replace(GRIDS["table3"], entries=GRIDS["table3"].entries[:1]),
        dataclasses.replace(GRIDS["joint"], entries=GRIDS["joint"].entries[:1]),
    ]
    study = ablation.prepare(grids, terms, tmp_path / "runs", seeds=(0,))
    assert [outcome.error for outcome in study.go()] == [None] * 3
    rows = ablation.rows_of(study)
    assert [row["step"] for row in rows["figure7"] if row["grid"] == "figure7"] == [1, 2, 3, 4]
    at_test = [row for row in rows["figure7"] if row["grid"] == "figure7_k_at_test"]
    assert {row["k_at_test"] for row in at_test} == {4, 8, 16, 32, 64, 128, None}
    own = next(row["bpp"] for row in at_test if row["k_at_test"] is None)
    end = next(row["bpp_middle"] for row in rows["figure7"] if row["grid"] == "figure7_end")
    assert own == pytest.approx(end) == pytest.approx(rows["figure7"][3]["bpp"])  # trained dense, measured dense
    contexts = [row["context"] for row in rows["table3"] if row["grid"] == "table3"]
    assert contexts == list(latent_rates.CONTEXTS)
    (joint,) = rows["joint"]
    assert joint["rd_loss"] == pytest.approx(joint["bpp"] + joint["lmbda"] * 255**2 * joint["mse"], abs=1e-4)
    learned = load_model(tmp_path / "runs" / "joint-none-seed0" / "weights.safetensors", "cpu")
    assert transforms_digest(learned) != study.transforms_sha256  # they learned along
    ablation.save(study, results_folder)
    settings = {grid: results.load(f"ablation-{grid}")["settings"] for grid in rows}
    assert [settings[grid]["rounded"] for grid in rows] == [True, True, False]  # of joint's own runs
    assert ablation_figures.table3_data()["bpp"].notna().all()
    assert (ablation_figures.figure7_data()["top_k"] == float("inf")).all()  # trained dense


def test_a_training_whose_loss_is_no_number_is_named_and_the_others_finish(terms, tmp_path, monkeypatch):
    backward = Run.forward_and_backward

    def with_nan(self, x, step, samples):
        terms = backward(self, x, step, samples)
        return terms | {"loss": terms["loss"] * float("nan")} if "broken" in self.config.out and step == 2 else terms

    monkeypatch.setattr(Run, "forward_and_backward", with_nan)
    broken = Entry("broken", "context", {"top_k": 5})
    study = ablation.prepare(
        [Grid("own", "", (broken, Entry("sound", "context", {"top_k": 7})))], terms, tmp_path, seeds=(0,)
    )
    outcomes = {outcome.name: outcome.error for outcome in study.go(workers=1)}
    assert "step 3" in outcomes["broken-seed0"] and "not a finite number" in outcomes["broken-seed0"]
    assert outcomes["sound-seed0"] is None
    assert [row["run"] for row in ablation.rows_of(study)["own"]] == ["sound-seed0"]


def test_killed_in_the_middle_of_training(source, cache, photo_folder, tmp_path, warm_workers):
    """Two processes train two models, one is killed: the weights are those of a run that nobody disturbed."""
    terms = Terms(source, cache, str(photo_folder), str(photo_folder), steps=50, crop=64, limit=2, accelerator="cpu")
    terms = dataclasses.replace(terms, checkpoint_seconds=0.0)
    entries = tuple(micro_entry(name, position=name) for name in ("none", "diamond"))
    grid = Grid("own", "", entries)
    disturbed = ablation.prepare([grid], terms, tmp_path / "disturbed", seeds=(0,))
    first = tmp_path / "disturbed" / "none-seed0"

    def kill() -> None:
        log, end = first / "log.jsonl", time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") >= 25) and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(int((first / "worker").read_text().split()[1]), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    outcomes = disturbed.go(workers=2)
    killer.join()
    assert sorted((o.name, o.error) for o in outcomes) == sorted((f"{e.name}-seed0", None) for e in entries)
    steps = [json.loads(line)["step"] for line in (first / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 51))
    alone = ablation.prepare([dataclasses.replace(grid, entries=entries[:1])], terms, tmp_path / "alone", seeds=(0,))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers have
    alone.go()
    torch.set_num_threads(threads)
    weights = [study.tasks[0].answer(study.root, "weights")["weights_sha256"] for study in (disturbed, alone)]
    assert weights[0] == weights[1]  # went on exactly where it was


def test_a_row_that_a_full_disk_tore(terms, tmp_path):
    """The learning curve goes on behind its last whole row; and what a killed process was writing goes."""
    terms = dataclasses.replace(terms, steps=2)
    study = ablation.prepare([Grid("own", "", (micro_entry("diamond"),), ("curve",))], terms, tmp_path, seeds=(0,))
    folder = tmp_path / "diamond-seed0"
    folder.mkdir()
    (folder / "curve.jsonl").write_text('{"step": 1, "bpp": 0.5}\n{"step": 2, "bp')
    (folder / ".entroformer-0.part").write_bytes(b"half a checkpoint")
    assert [outcome.error for outcome in study.go()] == [None]
    assert [row["step"] for row in study.tasks[0].answer(study.root, "curve")] == [1, 2]
    assert not list(folder.glob("*.part"))


# ---- what is drawn ----


def made_up(saving: float, **columns) -> list[dict]:
    """Two seeds that save so many percent of one bit per pixel, half a point apart."""
    return [
        {"seed": seed, "bpp": bpp, "bpp_middle": 2 * bpp, **columns}
        for seed, bpp in enumerate((1 - (saving + 0.25) / 100, 1 - (saving - 0.25) / 100))
    ]


def test_dots_of_table1_are_savings_over_the_convolution(results_folder):
    rows = made_up(0, context="cnn", position="none")
    for i, position in enumerate(list(results.POSITION_NAMES)[1:]):
        rows += made_up(i + 1, context="serial", position=position)
    saved = {"rows": [{"grid": "table1", **row} for row in rows]}
    (results_folder / "ablation-table1.json").write_text(json.dumps(saved))
    dots = ablation_figures.table1_dots(results.ablation("table1"), ablation_figures.table1_data())
    means = dots.groupby(["row", "source"], sort=False)["value"].mean().unstack(0)
    assert means.loc["here, whole pictures"].tolist() == pytest.approx([0, 1, 2, 3, 4, 5])
    assert means.loc["here, 256 x 256 pixels"].tolist() == pytest.approx([0, 1, 2, 3, 4, 5])
    assert means.loc["published"].tolist() == [0, 0.8, 0.9, 4.0, 4.9, 5.8]
    lines = [line for line in ablation_figures.dots(dots, "saved, %").axes[0].lines if line.get_marker() in "osd"]
    assert sorted(x for line in lines for x in line.get_xdata()) == pytest.approx(sorted(dots["value"]))


# ---- bad input: a sentence, and nothing started ----


def test_unknown_names_are_refused(terms, tmp_path):
    with pytest.raises(StudyError, match="no grid 'table9'; there are table1"):
        grids_of(["table9"])
    with pytest.raises(ConfigError, match="no field 'radios'"):
        grids_of(["table1"], ("radios=2",))
    with pytest.raises(ConfigError, match="cannot be 'triangle'"):
        own_entry("mine", position="triangle")
    with pytest.raises(StudyError, match="Name a grid"):
        ablation.prepare([], terms, tmp_path / "runs")
    with pytest.raises(StudyError, match="size"):
        ablation.prepare(grids_of(["table1"]), dataclasses.replace(terms, size="giant"), tmp_path / "runs")
    with pytest.raises(StudyError, match="mosaics of 6"):
        ablation.prepare(grids_of(["table4"]), terms, tmp_path / "runs")
    with pytest.raises(UserError, match="picture"):
        ablation.prepare(grids_of(["table1"]), dataclasses.replace(terms, kodak=str(tmp_path)), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_latents_of_other_transforms_are_refused(terms, tmp_path):
    other = tmp_path / "other.safetensors"
    save_weights(micro_model("parallel", seed=1), other, {"lmbda": 0.02})
    with pytest.raises(DataError, match="other transforms"):
        ablation.prepare(grids_of(["table1"]), dataclasses.replace(terms, transforms=str(other)), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_transforms_of_several_rates_need_one_of_them(terms, tmp_path):
    path = tmp_path / "rates.safetensors"
    save_weights(micro_model("parallel", lmbdas=(0.01, 0.02, 0.04)), path, {})
    with pytest.raises(StudyError, match="several rates"):
        ablation.prepare(grids_of(["table1"]), dataclasses.replace(terms, transforms=str(path)), tmp_path / "runs")


def test_runs_of_other_length_are_refused(terms, tmp_path):
    grid = [Grid("one", "", (Entry("a", "cnn", {"hyperprior": False}),))]
    ablation.prepare(grid, terms, tmp_path, seeds=(0,)).go()
    with pytest.raises(StudyError, match="another steps"):
        ablation.prepare(grid, dataclasses.replace(terms, steps=5), tmp_path, seeds=(0,))


# ---- what is measured ----


@pytest.fixture
def pictures(photo) -> list[tuple[str, Image.Image]]:
    return [("photo", photo)]


def test_second_slice_and_the_first_are_the_whole(pictures, photo):
    model = micro_model("parallel")
    rows = {row["context"]: row["bpp"] for row in latent_rates.second_slice_rates(model, pictures)}
    bits, first = bit_maps(model, photo)["y"], first_slice(8, 12).numpy()
    assert rows["hyperprior + bidirectional"] == pytest.approx(bits[~first].sum() / (192 * 128))
    assert len(set(rows.values())) == 3
    serial = latent_rates.second_slice_rates(micro_model("serial"), pictures)
    assert [row["context"] for row in serial] == ["hyperprior + serial"]
    for variant, context in (("context", "serial"), ("groupedmixer", "hyperprior + grouped")):
        found = latent_rates.second_slice_rates(micro_model(variant), pictures)
        assert [row["context"] for row in found] == [context]


def test_hyperprior_only_asks_no_context(pictures):
    """Other weights of the context model change the other two rates, and not that of the hyperprior."""
    model = micro_model("parallel")
    before = [row["bpp"] for row in latent_rates.second_slice_rates(model, pictures)]
    with torch.no_grad():
        model.context_model.embed.weight.mul_(-1)
    after = [row["bpp"] for row in latent_rates.second_slice_rates(model, pictures)]
    assert before[0] == after[0] and before[1] != after[1] and before[2] != after[2]


def test_k_at_test_time_is_that_of_a_model_with_it(pictures):
    model, dense = micro_model("context"), micro_model("context", top_k=None)
    dense.load_state_dict({**model.state_dict(), "_extra_state": dense.get_extra_state()})
    batches = latent_rates.batches_of(model, pictures)
    few = latent_rates.mean_rate(model, batches)
    model.context_k = None
    rates = [latent_rates.mean_rate(m, batches) for m in (model, dense)]
    assert rates[0] == rates[1] != few


def test_latents_are_cut_into_all_squares_that_fit():
    y = torch.arange(2 * 3 * 5 * 8).view(2, 3, 5, 8)
    squares = latent_rates.cut(y, 2)
    naive = [b[:, i : i + 2, j : j + 2] for b in y for i in (0, 2) for j in (0, 2, 4, 6)]
    assert torch.equal(squares, torch.stack(naive))
    assert torch.equal(latent_rates.cut(y[..., :5], 5), y[..., :5]) and len(latent_rates.cut(y, 6)) == 0


def test_mosaics_show_the_same_pixels_at_each_size():
    rng = np.random.default_rng(0)
    shapes = [(512, 768, 3), (768, 512, 3)] * 3
    pictures = [("", Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8))) for shape in shapes]
    (mosaic,) = latent_rates.mosaics(pictures)
    assert mosaic.size == (1200, 1200)
    squares = {size: latent_rates.squares_of(mosaic, size) for size in (300, 600, 900, 1200)}
    assert {size: len(found) for size, found in squares.items()} == {300: 16, 600: 4, 900: 1, 1200: 1}
    sums = [sum(int(np.asarray(s).sum(dtype=np.int64)) for s in squares[size]) for size in (300, 600, 1200)]
    assert sums[0] == sums[1] == sums[2]


def test_rates_are_of_the_pixels_without_padding(photo):
    """192 x 128 pixels, and one row less: as many latents, fewer pixels."""
    model = micro_model("context")
    whole, cut = photo, photo.crop((0, 0, 192, 127))
    assert latent_rates.latents_of(model, whole).shape == latent_rates.latents_of(model, cut).shape
    (row,) = latent_rates.rates(model, [("cut", cut)])
    assert row["bpp"] == row["bpp_y"] == pytest.approx(bit_maps(model, cut)["y"].sum() / (192 * 127))


# ---- transforms of CompressAI ----


@pytest.fixture(scope="module")
def theirs() -> MeanScaleHyperprior:
    """As `zoo:mbt2018-mean` gives it, with random weights: the pretrained ones need a network."""
    torch.manual_seed(0)
    return MeanScaleHyperprior(16, 24).eval()


def test_their_transforms_are_ours_but_for_the_border(theirs, photo):
    ours = with_transforms_of(theirs)
    x = torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        y = theirs.g_a(x)
        inside = (..., slice(2, -2), slice(2, -2))
        torch.testing.assert_close(ours.g_a(x)[inside], y[inside], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.g_s(y), theirs.g_s(y), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours.g_a(x), y)  # black and grey borders


def test_an_entropy_model_trains_behind_their_transforms(theirs, photo_folder, tmp_path, terms):
    path = tmp_path / "theirs.safetensors"
    save_weights(with_transforms_of(theirs), path, {"lmbda": 0.013})
    terms = dataclasses.replace(terms, transforms=str(path), latents=str(tmp_path / "latents"))
    study = ablation.prepare(
        [Grid("own", "", (own_entry("mine", radius=2),), ("kodak",))], terms, tmp_path / "runs", (0,)
    )
    assert [outcome.error for outcome in study.go()] == [None]
    weights = tmp_path / "runs" / study.runs[0].name / "weights.safetensors"
    assert isinstance(load_model(weights, "cpu"), Entroformer)


def test_without_a_network_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # nothing fetched before
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody answers
    with pytest.raises(WeightsError, match="need a network"):
        frozen_transforms("zoo:mbt2018-mean:4")
    for name in ("zoo:mbt2018-mean", "zoo:mbt2018-mean:9", "zoo:cheng2020-attn:3", "zoo:"):
        with pytest.raises(WeightsError, match="no transforms"):
            frozen_transforms(name)
    assert pretrained_lmbda("zoo:mbt2018-mean:4") == 0.013


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_what_was_fetched_runs_no_code(theirs, monkeypatch, tmp_path):
    """The checkpoint in torch's cache, as CompressAI names it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "hub" / "checkpoints" / "mbt2018-mean-4-6dba02a3.pth.tar"
    place.parent.mkdir(parents=True)
    torch.save(theirs.state_dict(), place)
    ours = frozen_transforms("zoo:mbt2018-mean:4")
    assert ours.g_s[0].weight.equal(theirs.g_s[0].weight)
    for damage in ({"weight": Evil()}, [1]):
        torch.save(damage, place)
        with pytest.raises(WeightsError, match="holds no weights"):
            frozen_transforms("zoo:mbt2018-mean:4")
    place.write_bytes(b"no archive")
    with pytest.raises(WeightsError, match="holds no weights"):
        frozen_transforms("zoo:mbt2018-mean:4")
    assert not (tmp_path / "ran").exists()
    asked = {}
    monkeypatch.setattr(
        torch.hub, "load_state_dict_from_url", lambda *_, **how: asked.update(how) or theirs.state_dict()
    )
    frozen_transforms("zoo:mbt2018-mean:4")
    assert asked["check_hash"] and asked["weights_only"]


def test_every_picture_is_in_one_mosaic():
    pictures = [("", Image.new("RGB", (6, 4) if i % 2 else (4, 6), (i, i, i))) for i in range(13)]
    found = [np.asarray(m)[::4, ::6, 0].ravel().tolist() for m in latent_rates.mosaics(pictures, 12)]
    assert found == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_errors_are_of_the_pixels_without_padding(photo):
    model, picture = micro_model(), photo.crop((0, 0, 150, 70))
    found = latent_rates.rate_and_error(model, picture, "a")
    expected = 10 ** (-psnr_db(picture, codec.reconstruction(model, picture)) / 10)
    assert found["mse"] == pytest.approx(expected, rel=1e-3)


def test_ticks_of_figure_6_are_the_radii():
    data = pd.DataFrame(
        {"radius": [0, 3, np.inf], "seed": 0, "bpp": 1.0, "saving_percent": [0, 5, 4], "half_width": np.nan}
    )
    assert [t.get_text() for t in ablation_figures.figure6(data).axes[0].get_xticklabels()] == ["none", "3", "all"]
