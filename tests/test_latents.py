"""Latents computed once, and entropy models trained on them on equal terms."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MICRO, micro_model

from entroformer_lib.codec import codec
from entroformer_lib.errors import ConfigError, DataError, TrainingError, WeightsError
from entroformer_lib.fields import parse_fields
from entroformer_lib.models import config as model_config
from entroformer_lib.models.context import first_slice
from entroformer_lib.training import latents, loop
from entroformer_lib.training.chance import gaps, random_missing
from entroformer_lib.training.config import TrainConfig
from entroformer_lib.training.data import held_out_crops
from entroformer_lib.training.latents import LatentCrops, frozen_transforms, transforms_digest, write_latents
from entroformer_lib.training.loop import train
from entroformer_lib.training.loss import RateStep
from entroformer_lib.weights.zoo import load_model, save_weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's advice


@pytest.fixture(scope="module")
def cache(source, photo_folder, tmp_path_factory) -> Path:
    return write_latents(source, str(photo_folder), tmp_path_factory.mktemp("cache"), crop=128, per_picture=2)


@pytest.fixture
def config(source, cache, tmp_path, monkeypatch) -> TrainConfig:
    monkeypatch.setitem(model_config.SIZES, "tiny", MICRO)
    return TrainConfig(
        data="DATA",
        out=str(tmp_path / "run"),
        model="tiny-serial",
        transforms=source,
        latents=str(cache),
        steps=6,
        batch=2,
        crop=128,
        lr=1e-3,
        optimizer="muon",
        missing=0.4,
        log_every=1,
        accelerator="cpu",
        devices=1,
    )


def losses(config: TrainConfig, name: str = "loss") -> list[float]:
    return [json.loads(line)[name] for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]


def test_cache_holds_y_of_crops_in_half_precision(cache, source):
    table, note = np.load(cache / "latents.npy", mmap_mode="r"), json.loads((cache / "latents.json").read_text())
    assert table.dtype == np.float16 and list(table.shape) == note["shape"]
    assert table.shape[1:] == (2, MICRO["M"], 8, 8)
    assert not np.array_equal(table[0, 0], table[0, 1])  # another crop of the same picture
    before = (cache / "latents.npy").stat().st_mtime_ns
    write_latents(source, "/nowhere", cache, crop=128, per_picture=2)  # finished: not repeated
    assert (cache / "latents.npy").stat().st_mtime_ns == before


def test_held_out_pictures_are_left_out_and_their_rate_is_logged(config, source, photo_folder, tmp_path):
    names = sorted(path.name for path in photo_folder.iterdir())
    listed = tmp_path / "held_out.txt"
    listed.write_text(names[1])
    folder = write_latents(source, str(photo_folder), tmp_path / "kept", 128, per_picture=1, held_out=str(listed))
    (whole,) = held_out_crops(str(photo_folder), frozenset(names[1:2]))
    y = torch.from_numpy(np.load(folder / "held_out.npy"))
    torch.testing.assert_close(y, frozen_transforms(source).analysis(whole[None]).half())
    rest = tmp_path / "rest"
    rest.mkdir()
    for name in (names[0], *names[2:]):
        (rest / name).symlink_to(photo_folder / name)
    alone = write_latents(source, str(rest), tmp_path / "alone", 128, per_picture=1)
    assert (folder / "latents.npy").read_bytes() == (alone / "latents.npy").read_bytes()
    with pytest.raises(DataError, match="other held-out pictures"):
        write_latents(source, str(photo_folder), folder, 128, per_picture=1)
    with pytest.raises(DataError, match="Of 1 held-out pictures 0"):
        write_latents(source, str(rest), tmp_path / "lacking", 128, per_picture=1, held_out=str(listed))
    assert not (tmp_path / "lacking").exists()  # refused before anything is computed

    weights = train(replace(config, latents=str(folder), held_out_every=4), progress=False)
    logged = [json.loads(line).get("held_out") for line in Path(config.out, "log.jsonl").read_text().splitlines()]
    assert [row is not None for row in logged] == [False, False, False, True, False, True]
    bits = load_model(weights, "cpu").estimated_bits(y.float())
    bpp = sum(float(b.sum()) for b in bits.values()) / whole[0].numel()
    assert logged[-1] == [{"lmbda": 0.02, "bpp": pytest.approx(bpp, rel=1e-3)}]  # the lambda of the transforms


def test_a_full_disk_is_told_in_a_sentence(source, photo_folder, tmp_path, monkeypatch):
    """The kernel refuses to write beyond 2,000 bytes. Into a memory map a full disk would be the process's death."""
    resource = pytest.importorskip("resource", reason="limits of processes are there on Unix alone")
    monkeypatch.setattr(np, "memmap", None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(DataError, match="Latents could not be written to .*: File too large"):
            write_latents(source, str(photo_folder), tmp_path, crop=128, per_picture=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_cache_of_other_transforms_or_crops_is_refused(cache, source, tmp_path):
    other = tmp_path / "other.safetensors"
    save_weights(micro_model("parallel", seed=1), other, {})
    with pytest.raises(DataError, match="other transforms"):
        LatentCrops(cache, load_model(other, "cpu"), crop=128)
    with pytest.raises(DataError, match="crops of 128 pixels, too few for 256"):
        LatentCrops(cache, load_model(source, "cpu"), crop=256)
    with pytest.raises(DataError, match="other per_picture"):
        write_latents(source, "/nowhere", cache, crop=128, per_picture=3)
    with pytest.raises(DataError, match="no whole cache"):
        LatentCrops(tmp_path, load_model(source, "cpu"), crop=128)


def test_latents_of_other_pictures_are_refused(source, photo_folder, tmp_path):
    """By names and sizes; a finished cache needs no pictures, and a folder that was moved is the same."""
    folder, out = shutil.copytree(photo_folder, tmp_path / "photos"), tmp_path / "latents"
    write_latents(source, str(folder), out, crop=64, per_picture=1)
    folder = folder.rename(tmp_path / "moved")
    for there in (folder, tmp_path / "photos"):  # moved; gone
        assert write_latents(source, str(there), out, crop=64, per_picture=1) == out
    min(folder.iterdir()).unlink()
    with pytest.raises(DataError, match="are those of .*photos, and not of .*moved; choose another folder"):
        write_latents(source, str(folder), out, crop=64, per_picture=1)


@pytest.mark.parametrize(
    "name, damage",
    [
        ("latents.json", lambda data: data[: len(data) // 2]),
        ("latents.json", lambda data: b"[1]"),
        ("latents.npy", lambda data: data[: len(data) // 2]),
        ("latents.npy", lambda data: b""),
        ("latents.npy", lambda data: b"no table"),
    ],
)
def test_a_damaged_cache_is_refused(name, damage, cache, source, tmp_path):
    for path in cache.iterdir():
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(damage(data) if path.name == name else data)
    with pytest.raises(DataError, match="no whole cache of latents in"):
        LatentCrops(tmp_path, load_model(source, "cpu"), crop=128)


@pytest.mark.parametrize("change", [dict(crop=100), dict(per_picture=0), dict(seed=-1), dict(data="")])
def test_a_cache_of_nonsense_is_refused(change, source, tmp_path):
    (name,) = change
    with pytest.raises(TrainingError, match=f"^{name} must be "):
        write_latents(**{"transforms": source, "data": "/nowhere", "out": tmp_path / "cache", **change})
    assert not (tmp_path / "cache").exists()


def test_order_of_data_is_a_function_of_seed_and_sample(cache, source):
    model = load_model(source, "cpu")
    whole = next(LatentCrops(cache, model, 128).batches([range(4, 8)]))
    parts = torch.cat(list(LatentCrops(cache, model, 128).batches([range(4, 6), range(6, 8)])))
    assert torch.equal(whole, parts) and whole.dtype == torch.float32
    assert not torch.equal(whole, next(LatentCrops(cache, model, 128, seed=1).batches([range(4, 8)])))


def test_smaller_crops_are_parts_of_those_kept(cache, source):
    crops = LatentCrops(cache, load_model(source, "cpu"), 128)
    (whole,), (part,) = (list(crops.batches([range(16)], crop)) for crop in (128, 64))
    places = set()
    for large, small in zip(whole, part, strict=True):
        fits = [(i, j) for i in range(5) for j in range(5) if torch.equal(large[:, i : i + 4, j : j + 4], small)]
        assert fits
        places.update(fits)
    assert len(places) > 8


def test_larger_crops_come_last(config):
    config = replace(config, steps=4, crop=64, last_crop=128, last_share=0.5)
    assert config.crops == [(range(2), 64), (range(2, 4), 128)]
    train(config, progress=False)
    assert len(losses(config)) == 4


def test_result_is_a_whole_model_with_the_same_transforms(config, source, photo):
    config = replace(config, architecture=("position=none",))
    model = load_model(train(config, progress=False), "cpu")
    assert transforms_digest(model) == transforms_digest(load_model(source, "cpu"))
    assert model.config.position == "none" and model.config.context == "serial"
    assert model.card["lmbda"] == 0.02  # of the transforms
    data = codec.encode(model, photo)
    assert np.asarray(codec.decode(data, model)).shape == np.asarray(photo).shape


def test_resume_is_exact(config, tmp_path, monkeypatch):
    train(config, progress=False)
    halves = replace(config, out=str(tmp_path / "halves"), checkpoint_seconds=0.0)
    step = loop.Run.step
    monkeypatch.setattr(loop.Run, "step", lambda self, x, i: step(self, x, i) if i < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(halves, progress=False)
    monkeypatch.undo()
    monkeypatch.setitem(model_config.SIZES, "tiny", MICRO)
    train(halves, progress=False)
    assert losses(halves) == losses(config)


def test_training_lowers_the_rate(config):
    config = replace(config, steps=40, lr=5e-3, missing=0.0)
    train(config, progress=False)
    rates = losses(config, "rd_loss")
    assert np.mean(rates[-5:]) < 0.95 * np.mean(rates[:5])


def test_a_new_model_begins_with_the_channels_of_the_latents(config, cache):
    """Before the first step: the run's weights after a step that moves nothing."""
    model = load_model(train(replace(config, steps=1, lr=1e-30, schedule="constant"), progress=False), "cpu")
    y = torch.cat(list(LatentCrops(cache, model, 128, config.seed).batches([range(64)])))
    log_scales, means = model.entropy_parameters.layers[-1].bias.detach().chunk(2)
    torch.testing.assert_close(means, y.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(log_scales, y.std(dim=(0, 2, 3)).clamp_min(1e-3).log())
    torch.nn.init.zeros_(model.entropy_parameters.layers[-1].bias)
    save_weights(model, Path(config.out).parent / "other.safetensors", {})
    again = replace(config, init=str(Path(config.out).parent / "other.safetensors"), out=config.out + "2")
    model = load_model(train(replace(again, steps=1, lr=1e-30, schedule="constant"), progress=False), "cpu")
    assert model.entropy_parameters.layers[-1].bias.abs().max() < 1e-20  # what has learned something keeps it


def test_variable_rate_transforms(tmp_path, photo_folder, config, monkeypatch):
    """With a rate the gains are worked into the kernels; without one they stay, frozen."""
    path = tmp_path / "rates.safetensors"
    save_weights(micro_model("parallel", lmbdas=(0.01, 0.02, 0.04)), path, {})
    load = load_model(path, "cpu")
    real = latents.load_model

    def by_name(name, device="auto"):  # @ belongs to names, and this is a path
        name, _, lmbda = name.partition("@")
        model = real(name, device)
        if lmbda:
            model.level = model.gain.level_of(float(lmbda))
        return model

    monkeypatch.setattr(latents, "load_model", by_name)
    one_rate = frozen_transforms(f"{path}@0.02")
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        y = load.scaled(load.g_a(x), 1.0)
        assert one_rate.gain is None
        torch.testing.assert_close(one_rate.g_a(x), y)
        torch.testing.assert_close(one_rate.g_s(y), load.g_s(y * load.gains(1.0)[1]), atol=1e-4, rtol=1e-4)
    folder = write_latents(str(path), str(photo_folder), tmp_path / "latents", crop=128, per_picture=1)
    config = replace(config, transforms=str(path), latents=str(folder), steps=2)
    model = load_model(train(config, progress=False), "cpu")
    assert model.config.lmbdas == (0.01, 0.02, 0.04) and torch.equal(model.gain.log_gain, load.gain.log_gain)


def test_rate_of_rounded_latents_is_the_one_that_is_measured():
    """No noise on y: the loss in training mode is what `estimated_bits` promises of the rounded latents."""
    model = micro_model("context")
    y = model.g_a(torch.rand(2, 3, 64, 128)).detach()
    bits = model.eval().estimated_bits(y)["y"].sum() / (2 * 64 * 128)
    model.train()
    rounded = RateStep(model, rounded=True)(y)
    torch.testing.assert_close(rounded["bpp"], bits.float(), rtol=1e-5, atol=0)
    assert not torch.isclose(RateStep(model)(y)["bpp"], rounded["bpp"], rtol=1e-3)
    rounded["loss"].backward()
    assert model.context_model.embed.weight.grad.abs().sum() > 0


def test_training_goes_on_from_weights(config, source, tmp_path):
    """Behind the same frozen transforms, on rounded latents; what the architecture changes begins afresh."""
    first = train(replace(config, missing=0.0), progress=False)
    on = replace(config, init=str(first), out=str(tmp_path / "on"), steps=1, lr=1e-9, rounded=True, missing=0.0)
    again, before = load_model(train(on, progress=False), "cpu"), load_model(first, "cpu")
    assert transforms_digest(again) == transforms_digest(before)
    for name, weight in before.context_model.named_parameters():
        torch.testing.assert_close(again.context_model.get_parameter(name), weight, atol=1e-6, rtol=0, msg=name)
    wider = replace(on, out=str(tmp_path / "wider"), architecture=("context_layers=3",))
    third = load_model(train(wider, progress=False), "cpu")
    assert len(third.context_model.stack.blocks) == 3
    torch.testing.assert_close(third.context_model.embed.weight, before.context_model.embed.weight, atol=1e-6, rtol=0)


def test_without_its_context_a_model_begins_with_what_it_predicts_before_there_is_any(config, source):
    parallel = load_model(source, "cpu")
    alone = loop.initial_model(replace(config, init=source, missing=0, architecture=("context=none",)))
    y = torch.randint(-3, 4, (1, parallel.config.M, 8, 8)).float()
    hyper = parallel.h_s(torch.randn(1, parallel.config.Z, 2, 2))
    before = first_slice(8, 8)  # of the parallel model's sites
    for one, other in zip(alone.distributions(y, hyper), parallel.distributions(y, hyper), strict=True):
        torch.testing.assert_close(one[..., before], other[..., before])
        assert not torch.allclose(one[..., ~before], other[..., ~before])


def test_weights_made_for_other_transforms_are_refused(config, tmp_path):
    path = tmp_path / "rates.safetensors"
    save_weights(micro_model("serial", lmbdas=(0.01, 0.02, 0.04)), path, {})
    with pytest.raises(WeightsError, match="size and rates"):
        train(replace(config, init=str(path)), progress=False)


def test_random_missing_belongs_to_the_sample():
    whole = random_missing(range(0, 6), (16, 16), 0.8, seed=0)
    assert torch.equal(whole[2:4], random_missing(range(2, 4), (16, 16), 0.8, seed=0))
    shares = whole.flatten(1).float().mean(1)
    assert shares.max() < 0.85 and shares.std() > 0.05  # each crop has a share of its own


def test_one_way_needs_a_parallel_model(config):
    with pytest.raises(TrainingError, match="parallel"):
        train(replace(config, one_way=0.5), progress=False)
    model = load_model(train(replace(config, one_way=0.5, model="tiny-parallel"), progress=False), "cpu")
    assert model.config.context == "parallel"


def test_no_context_leaves_all_of_some_crops_to_the_hyperprior(config):
    config = replace(config, model="tiny-parallel", missing=0.0, no_context=0.5, one_way=0.5)
    kept = gaps(config, 0, range(64), (4, 6), "cpu").kept
    alone = kept.flatten(1).all(1)
    assert 16 < alone.sum() < 48
    assert torch.equal(kept[~alone], first_slice(4, 6).expand(int((~alone).sum()), 1, 4, 6))
    model = load_model(train(config, progress=False), "cpu")
    assert model.config.context == "parallel"
    with pytest.raises(TrainingError, match="parallel"):
        train(replace(config, model="tiny-serial"), progress=False)


@pytest.mark.parametrize(
    "change",
    [
        dict(one_way=1.5),
        dict(latents=None),
        dict(transforms=None, missing=0.0),
        dict(transforms=None, latents=None, missing=0.0, rounded=True),
        dict(missing=1.0),
        dict(graphics=0.1),
    ],
    ids=lambda change: next(iter(change)),
)
def test_combinations_that_cannot_be_are_refused(config, change):
    with pytest.raises(TrainingError):
        train(replace(config, **change), progress=False)


def test_missing_needs_latents(photo_folder, tmp_path):
    with pytest.raises(TrainingError, match="missing"):
        train(TrainConfig(data=str(photo_folder), out=str(tmp_path), missing=0.5, accelerator="cpu"), progress=False)


def test_fields_are_typed_as_json_or_words():
    words = ("position=none", "top_k=null", "hyper_top_k=[4, 4, 4]", "hyperprior=false")
    config = model_config.named_config("tiny-serial", **parse_fields(words))
    assert (config.position, config.top_k, config.hyper_top_k, config.hyperprior) == ("none", None, (4, 4, 4), False)
    with pytest.raises(ConfigError):
        parse_fields(("position",))
    with pytest.raises(ConfigError):
        model_config.named_config("tiny-serial", **parse_fields(("positions=none",)))


def test_ways_of_context_do_not_hang_together(config):
    config = replace(config, model="tiny-parallel", missing=0.0, no_context=0.5, one_way=0.5)
    hidden = gaps(config, 0, range(256), (4, 6), "cpu")
    alone = hidden.kept.flatten(1).all(1)
    assert 32 < (alone & hidden.one_way).sum() < 96 and 32 < (~alone & hidden.one_way).sum() < 96


def test_crops_have_the_side_that_their_step_has(config, monkeypatch):
    config, seen, step = replace(config, steps=4, crop=64, last_crop=128, last_share=0.5), [], loop.Run.step
    monkeypatch.setattr(loop.Run, "step", lambda run, x, i: seen.append((i, 16 * x.size(-1))) or step(run, x, i))
    train(config, progress=False)
    assert seen == [(0, 64), (1, 64), (2, 128), (3, 128)]
