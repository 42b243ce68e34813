"""Training pictures: what a run sees is a function of the seed and the sample's number alone."""

import io
import shutil
import struct
import tarfile
import warnings
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from entroformer_lib.codec import pictures
from entroformer_lib.errors import DataError
from entroformer_lib.training.chance import (
    ONE_WAY,
    picture_number,
    random_choice,
    random_kept,
    random_levels,
    random_missing,
    uniform_noise,
)
from entroformer_lib.training.data import PreloadedCrops, StreamedCrops, crop_of, find_sources, read_names

RANGES = [range(4 * i, 4 * i + 4) for i in range(4)]


@pytest.fixture
def tar(photo_folder, tmp_path):
    with tarfile.open(tmp_path / "photos-00.tar", "w") as file:
        for i, path in enumerate(sorted(photo_folder.glob("*.png"))):
            file.add(path, f"{i:04}.png")
    return tmp_path / "photos-00.tar"


@pytest.fixture
def listing(photo_folder):
    path = photo_folder / "list.txt"
    path.write_text("\n".join(p.name for p in sorted(photo_folder.glob("*.png"))))
    yield path
    path.unlink()


def test_folder_list_and_tar_give_the_same_crops(photo_folder, listing, tar):
    batches = [
        list(PreloadedCrops(s, 64).batches(RANGES)) for s in (photo_folder, listing, tar, str(tar.parent / "*.tar"))
    ]
    assert batches[0][0].shape == (4, 3, 64, 64) and batches[0][0].min() >= 0 and batches[0][0].max() <= 1
    for other in batches[1:]:
        assert all(map(torch.equal, batches[0], other))


def test_a_list_may_have_comments_and_names_with_a_hash(photo_folder, tmp_path):
    (tmp_path / "no#1.png").write_bytes((photo_folder / "coffee.png").read_bytes())
    (tmp_path / "list.txt").write_text("# ours\n\nno#1.png  # the only one\n")
    assert find_sources(tmp_path / "list.txt") == ([tmp_path / "no#1.png"], [])
    assert read_names(tmp_path / "list.txt") == {"no#1.png"}


def test_streamed_files_equal_preloaded(photo_folder):
    streamed = StreamedCrops(photo_folder, 64, workers=2).batches(RANGES)
    assert all(map(torch.equal, streamed, PreloadedCrops(photo_folder, 64).batches(RANGES)))


@pytest.mark.parametrize("kind", ["files", "tar"])
def test_a_stream_can_start_anywhere(kind, photo_folder, tar):
    source = photo_folder if kind == "files" else tar
    whole = list(StreamedCrops(source, 64, workers=0).batches(RANGES))
    late = list(StreamedCrops(source, 64, workers=1).batches(RANGES[2:]))
    assert all(map(torch.equal, whole[2:], late))


def test_two_processes_share_the_samples_of_one(tar):
    whole = torch.cat(list(StreamedCrops(tar, 64, workers=0).batches(RANGES)))
    halves = [
        torch.cat(list(StreamedCrops(tar, 64, workers=0).batches([r[2 * rank : 2 * rank + 2] for r in RANGES])))
        for rank in (0, 1)
    ]
    for rank in (0, 1):  # [step, rank, sample, 3, 64, 64]
        assert torch.equal(whole.view(4, 2, 2, 3, 64, 64)[:, rank].reshape(8, 3, 64, 64), halves[rank])


def test_every_picture_once_per_epoch():
    numbers = [picture_number(g, 7, seed=3) for g in range(21)]
    assert all(sorted(numbers[7 * e : 7 * e + 7]) == list(range(7)) for e in range(3))
    assert numbers[:7] != numbers[7:14]


def test_crops_differ_and_cover_scales():
    rng = np.random.default_rng(0)
    ramp = torch.arange(256, dtype=torch.uint8).expand(3, 256, 256)
    spans = {round(float((c := crop_of(ramp, 64, rng))[0, 0].max() - c[0, 0].min()) * 255) for _ in range(50)}
    assert min(spans) >= 62 and max(spans) > 110  # from 1:1 to 1:2
    assert crop_of(ramp[:, :64, :64], 64, rng).shape == (3, 64, 64)  # exactly as large as the crop


def test_noise_and_masks_belong_to_the_sample():
    shapes = {"y": (2, 4, 4), "z": (3, 1, 1)}
    whole, part = uniform_noise(range(6), shapes, seed=1), uniform_noise(range(4, 6), shapes, seed=1)
    assert torch.equal(whole["y"][4:], part["y"]) and torch.equal(whole["z"][4:], part["z"])
    assert whole["y"].min() >= -0.5 and whole["y"].max() < 0.5 and abs(whole["y"].mean()) < 0.1
    kept = random_kept(range(5), (6, 8), 0.5, seed=0)
    assert kept.shape == (5, 1, 6, 8) and kept.sum((1, 2, 3)).tolist() == [24] * 5
    assert torch.equal(kept[3:], random_kept(range(3, 5), (6, 8), 0.5, seed=0))


def test_unusable_pictures_are_named_and_left_out(photo_folder, tmp_path):
    for path in photo_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "coffee.png").read_bytes()[:900])
    Image.new("RGB", (30, 300)).save(tmp_path / "thin.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        crops = PreloadedCrops(tmp_path, 64)
    assert len(crops.pictures) == 4
    text = " ".join(str(w.message) for w in caught)
    assert "broken.png" in text and "cut.png" in text and "1 pictures smaller" in text
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(list(StreamedCrops(tmp_path, 64, workers=0).batches(RANGES))) == 4
    text = " ".join(str(w.message) for w in caught)
    assert "broken.png is not a picture" in text and "cut.png cannot be read" in text and "pictures smaller" in text


def test_a_stream_passes_over_what_only_looks_whole(photo_folder, tmp_path):
    """Pictures whose header is whole and whose pixels are cut short; and what is held out, in folders too."""
    whole, cut = (photo_folder / "coffee.png").read_bytes(), (photo_folder / "chelsea.png").read_bytes()[:9000]
    (tmp_path / "coffee.png").write_bytes(whole)
    (tmp_path / "cut.png").write_bytes(cut)
    with tarfile.open(tmp_path / "some.tar", "w") as file:
        file.add(tmp_path / "coffee.png", "a.png")
        file.add(tmp_path / "cut.png", "b.png")
        file.add(photo_folder / "astronaut.png", "deep/astronaut.png")
    crops = StreamedCrops(tmp_path / "some.tar", 64, workers=0, left_out=frozenset({"astronaut.png"}))
    with pytest.warns(UserWarning, match="left out b.png: The picture cannot be read"):
        seen = torch.cat([*crops.batches([range(2), range(2, 12)])])
    only = StreamedCrops(tmp_path / "coffee.png", 64, workers=0)
    assert torch.equal(seen, torch.cat([*only.batches([range(12)])]))


def test_sources_that_cannot_be_used(tmp_path, tar):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("gone.png\n")
    for source, sentence in [
        (tmp_path / "empty", "no picture"),
        (tmp_path / "list.txt", "gone.png"),
        (tmp_path / "nothing", "no training pictures"),
    ]:
        with pytest.raises(DataError, match=sentence):
            find_sources(source)
    with pytest.raises(DataError, match="smaller than the crop"):
        PreloadedCrops(tar, 1024)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(tar.read_bytes()[:70_000])
    with pytest.raises(DataError, match="damaged"):
        PreloadedCrops(cut, 64)


# ---- damaged shards and odd pictures: the same from preloading and from a stream ----


def png(pixels: np.ndarray | int = 64, **more) -> bytes:
    """A picture as bytes; of a number, noise with so many pixels on a side."""
    if isinstance(pixels, int):
        pixels = np.random.default_rng(0).integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **more)
    return buffer.getvalue()


def shard(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def claiming(data: bytes, side: int) -> bytes:
    """A PNG whose header claims another size."""
    header = data[12:16] + struct.pack(">II", side, side) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda whole: whole[: len(whole) // 2], "truncated"),
        (lambda whole: b"", "not a picture"),
        (lambda whole: claiming(whole, 65_535), "is too large"),
        (lambda whole: whole[:60] + bytes(200) + whole[260:], "cannot be read"),
    ],
    ids=["half", "empty", "too large", "zeros inside"],
)
def test_damaged_pictures_of_a_shard_are_passed_over(damage, reason, workers, tmp_path):
    """In whichever order they come, the first of a run too."""
    whole = png()
    tar = shard(tmp_path / "some.tar", {"bad.png": damage(whole), "good.png": whole})
    expected = next(StreamedCrops(shard(tmp_path / "good.tar", {"good.png": whole}), 64, workers=0).batches([range(4)]))
    for seed in range(4):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (seen,) = StreamedCrops(tar, 64, seed, workers=workers).batches([range(4)])
        said = [str(w.message) for w in caught]
        assert workers or any("left out bad.png" in s and reason in s for s in said)  # a worker says it itself
        colours = seen.sort(-1).values  # a crop may be mirrored
        assert torch.equal(colours, expected.sort(-1).values)
    with pytest.warns(UserWarning, match=f"left out bad.png: .*{reason}"):
        assert len(PreloadedCrops(tar, 64).pictures) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda tar: tar[:5000],
        lambda tar: b"",
        lambda tar: b"no tar at all" * 1000,
        lambda tar: tar.replace(b"1.png" + bytes(95), b"1.png" + bytes(94) + b"x"),
        lambda tar: tar[: tar.index(b"1.png") + 200],
    ],
    ids=["cut", "empty", "text", "damaged header", "cut in a header"],
)
def test_damaged_shards_end_in_one_sentence(damage, tmp_path):
    tar = tmp_path / "some.tar"
    tar.write_bytes(damage(shard(tar, {f"{i}.png": png() for i in range(3)}).read_bytes()))
    streams = [StreamedCrops(tar, 64, workers=workers) for workers in (0, 1)]
    for begin in (lambda: PreloadedCrops(tar, 64), *(lambda s=s: list(s.batches([range(4)])) for s in streams)):
        with pytest.raises(DataError) as error:
            begin()
        assert str(error.value).startswith(f"The tar {tar} is damaged or cannot be read: ")
        assert "\n" not in str(error.value)


def test_a_shard_may_hold_a_name_twice(tmp_path):
    """tar -r appends a newer file behind the older one."""
    with tarfile.open(shard(tmp_path / "some.tar", {"a.png": png()}), "a") as file:
        file.addfile(file.getmember("a.png"), io.BytesIO(png()))
    assert len(PreloadedCrops(tmp_path / "some.tar", 64).pictures) == 2


def test_odd_pictures_have_the_right_pixels_or_are_left_out(tmp_path):
    """What they must look like is written out here, not asked of the reader."""
    ramp = np.arange(64 * 64).reshape(64, 64)
    grey = np.round(ramp * 16 / 257).astype(np.uint8)
    colours = np.stack([ramp % 251, ramp % 13, ramp // 64], -1).astype(np.uint8)
    hidden, white = np.dstack([colours, np.where(ramp % 64 < 32, 0, 255)]).astype(np.uint8), colours.copy()
    white[:, :32] = 255
    turned, exif = np.rot90(colours, -1), Image.Exif()
    exif[0x0112] = 6
    palette = Image.fromarray((ramp % 64 // 8).astype(np.uint8), "L").convert("P")
    palette.putpalette([10, 20, 30] * 4 + [200, 0, 0] * 252)
    red = np.where(ramp[..., None] % 64 < 32, 255, [200, 0, 0])
    pictures = {
        "wide.png": (Image.fromarray((ramp * 16).astype(np.uint16)), {}, np.dstack([grey] * 3)),
        "wide.tif": (Image.fromarray((ramp * 16).astype(np.uint16)), {}, np.dstack([grey] * 3)),
        "clear.png": (Image.fromarray(hidden), {}, white),
        "clear.webp": (Image.fromarray(hidden), {"lossless": True, "exact": True}, white),
        "palette.png": (palette, {"transparency": bytes([0] * 4 + [255] * 252)}, red),
        "turned.png": (Image.fromarray(colours), {"exif": exif}, turned),
        "turned.webp": (Image.fromarray(colours), {"exif": exif, "lossless": True}, turned),
    }
    for name, (picture, options, expected) in pictures.items():
        picture.save(tmp_path / name, **options)
        tar = shard(tmp_path / "one.tar", {name: (tmp_path / name).read_bytes()})
        kinds = [
            PreloadedCrops(tmp_path / name, 64),
            *(StreamedCrops(s, 64, workers=0) for s in (tmp_path / name, tar)),
        ]
        for crops in kinds:
            (x,) = next(crops.batches([range(1)])) * 255
            seen = x.round().byte().permute(1, 2, 0).numpy()
            assert any(np.array_equal(side, expected) for side in (seen, seen[:, ::-1])), name  # perhaps mirrored
    Image.fromarray(ramp.astype(np.float32) / 4096).save(tmp_path / "float.tif")
    tar = shard(tmp_path / "two.tar", {n: (tmp_path / n).read_bytes() for n in ("float.tif", "clear.png")})
    for crops in (PreloadedCrops, StreamedCrops):
        with pytest.warns(UserWarning, match="left out .*float.tif: The picture has floating-point pixels"):
            for seed in range(4):
                more = {} if crops is PreloadedCrops else {"workers": 0}
                next(crops([tmp_path / "two.tar"], 64, seed, **more).batches([range(2)]))


def test_training_sees_the_pixels_that_the_codec_sees(tmp_path):
    """16 bits, a palette, transparency and the camera's orientation, from a file, a stream and a tar."""
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 2**16, (64, 64), dtype=np.uint16)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    colours = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    colours.quantize(16).save(tmp_path / "palette.png")
    colours.putalpha(90)
    colours.save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(tmp_path / "turned.png", exif=exif)
    with tarfile.open(tmp_path / "all.tar", "w") as file:
        for path in tmp_path.glob("*.png"):
            file.add(path, path.name)
    for path in sorted(tmp_path.glob("*.png")):
        expected = pictures.to_rgb(pictures.open_picture(path))[0]
        (found,) = PreloadedCrops(path, 64).pictures
        assert np.array_equal(found.permute(1, 2, 0), np.asarray(expected)), path.name
        streamed = next(StreamedCrops(path, 64, workers=0).batches([range(4)]))
        assert torch.equal(streamed, next(PreloadedCrops(path, 64).batches([range(4)])))
    (turned,) = PreloadedCrops(tmp_path / "turned.png", 64).pictures
    assert turned.shape == (3, 96, 64)
    assert len(PreloadedCrops(tmp_path / "all.tar", 64).pictures) == 4


def test_held_out_files_are_not_streamed(photo_folder, tmp_path):
    """As they are not preloaded: the same as over a folder without them."""
    kept = shutil.copytree(photo_folder, tmp_path / "kept")
    (kept / "astronaut.png").unlink()
    for crops in (
        lambda source, **more: StreamedCrops(source, 64, workers=0, **more),
        partial(PreloadedCrops, crop=64),
    ):
        without = torch.cat(list(crops(photo_folder, left_out=frozenset({"astronaut.png"})).batches(RANGES)))
        assert torch.equal(without, torch.cat(list(crops(kept).batches(RANGES))))


def test_rates_take_equal_turns():
    for turn in range(4):
        assert sorted(random_levels(range(5 * turn, 5 * turn + 5), 5, seed=1)) == list(range(5))


@pytest.mark.parametrize("draw", [
    lambda seed: uniform_noise(range(4), {"y": (2, 4, 4)}, seed)["y"],
    lambda seed: random_kept(range(4), (6, 8), 0.5, seed),
    lambda seed: random_missing(range(4), (6, 8), 0.5, seed),
    lambda seed: random_choice(range(64), 0.5, seed, ONE_WAY),
    lambda seed: torch.tensor(random_levels(range(50), 5, seed)),
    lambda seed: torch.tensor([picture_number(g, 50, seed) for g in range(50)]),
], ids=["noise", "kept", "missing", "choice", "levels", "order"])  # fmt: skip
def test_another_seed_is_another_chance(draw):
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
