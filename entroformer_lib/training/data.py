"""Training pictures: from a folder, a list or WebDataset tars, here or at an address; random downscale and crop.

Which picture sample number g of a run has, counted over all steps and processes, and which crop of it, follow from the
seed and g (chance.py); with shards the picture also depends on the batch size (shards.py).
"""

import functools
import glob
import hashlib
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from entroformer_lib.codec.pictures import pixels_of
from entroformer_lib.datasets import files_under, is_picture
from entroformer_lib.errors import DataError, PassedOver
from entroformer_lib.training.chance import DRAWN, HELD_OUT, generator, picture_number
from entroformer_lib.training.graphics import drawn
from entroformer_lib.training.shard_cache import file_name, is_remote, matches
from entroformer_lib.training.shards import READING, Reading, ShardedPictures, find_shards, open_shard, shard_names


def find_sources(source: str | os.PathLike | list) -> tuple[list[Path], list[str]]:
    """Splits what the user named into picture files and tar shards.

    Args:
        source: a folder (searched for pictures and .tar files, subfolders too), a picture, a .txt list of paths (one a
            line, relative to the list), a .tar, a glob of tars, the manifest.json of packed shards, the address of a
            shard, of a manifest or a glob of shards (s3://, gs://, https://, hf://), pipe:COMMAND, or a list of these.

    Raises:
        DataError: nothing there, or nothing usable in it.
    """
    if isinstance(source, list | tuple):
        found = [find_sources(s) for s in source]
        return [p for pictures, _ in found for p in pictures], [t for _, tars in found for t in tars]
    name = os.fspath(source)
    path = Path(name)
    if is_remote(name):
        remote = not name.startswith("pipe:")
        if remote and name.endswith(".json"):
            return [], shard_names(name)
        tars = matches(name) if remote and "*" in name else [name]
        if not tars:
            raise DataError(f"There is no shard at {name}.")
        return [], tars
    if path.is_dir():
        files = files_under(path)
        pictures = [p for p in files if is_picture(p)]
        tars = [file_name(p) for p in files if p.suffix == ".tar"]
        if not pictures and not tars:
            raise DataError(f"There is no picture and no .tar in the folder {name}.")
        return pictures, tars
    if path.suffix == ".txt" and path.is_file():
        pictures = [path.parent / line for line in _lines(path)]
        missing = [p for p in pictures if not p.is_file()]
        if missing or not pictures:
            what = f"names {missing[0]}, which is not there" if missing else "names no picture"
            raise DataError(f"The list {name} {what}.")
        return pictures, []
    if path.is_file():
        if path.suffix == ".json":
            return [], shard_names(name)
        return ([], [name]) if path.suffix == ".tar" else ([path], [])
    tars = sorted(glob.glob(name))
    if tars:
        return find_sources([file_name(tar) for tar in tars])
    raise DataError(f"There are no training pictures at {name}.")


def listed(source) -> str:
    """SHA-256 over the names and sizes of a source's files: other pictures are noticed without being read."""
    files, tars = find_sources(source)
    names = map(str, [*files, *tars])
    sizes = [(os.path.basename(name), 0 if is_remote(name) else os.path.getsize(name)) for name in names]
    return hashlib.sha256(repr(sizes).encode()).hexdigest()


def pictures_in(source, wanted: Callable[[str], bool], reading: Reading = READING) -> Iterator[tuple[str, np.ndarray]]:
    """Every picture of a source whose file name is wanted: its name, and uint8 [H, W, 3], in a fixed order. What cannot
    be read is named in a warning."""
    files, tars = find_sources(source)
    here = ((str(path), path) for path in files if wanted(path.name))
    for name, picture in itertools.chain(here, _members(tars, wanted, reading)):
        if (pixels := _pixels(name, picture)) is not None:
            yield os.path.basename(name), pixels


def _members(tars: list[str], wanted: Callable[[str], bool], reading: Reading) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every picture in the shards whose file name is wanted."""
    for shard in find_shards(tars, 0, wanted, reading):
        if len(shard.usable) and (opened := open_shard(shard, reading)) is not None:
            for number in map(int, shard.usable):
                yield opened.names[number], opened.read(number)
            opened.close()


def _pixels(name: str, picture: Path | bytes) -> np.ndarray | None:
    """uint8 [H, W, 3]; None, with a warning, where the picture cannot be read."""
    try:
        return pixels_of(picture)
    except DataError as error:
        warnings.warn(f"left out {name}: {error}", PassedOver, stacklevel=2)
        return None


def read_names(path: str | os.PathLike) -> frozenset[str]:
    """File names from a list, one a line; # begins a comment.

    Raises:
        DataError: no such list, or an empty one.
    """
    names = frozenset(_lines(Path(path)))
    if not names:
        raise DataError(f"The list of held-out pictures {path} names none.")
    return names


def _lines(path: Path) -> list[str]:
    """The lines of a list, without comments (# at the beginning or behind a space) and empty lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise DataError(f"The list {path} cannot be read: {reason}.") from None
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


def smallest_crop(metric: str) -> int:
    """Pixels of a side, in multiples of 64, that a measure can be taken of: MS-SSIM halves a picture four times."""
    return 192 if metric == "ms-ssim" else 64


def held_out_crops(source, names: frozenset[str], reading: Reading = READING, least: int = 64) -> Tensor:
    """One crop of each named picture of a source, always the same, scaled as in training: [n, 3, crop, crop], where
    crop is as large as all of them are, in multiples of 64, and at most 256. A picture may be there several times.

    Raises:
        DataError: a name that is not in the source, or a picture smaller than `least` pixels.
    """
    found: dict[str, np.ndarray] = {}
    for name, pixels in pictures_in(source, names.__contains__, reading):
        found.setdefault(name, pixels)
    pictures = [_channels_first(pixels) for pixels in found.values()]
    if len(pictures) != len(names):
        raise DataError(f"Of {len(names)} held-out pictures {len(pictures)} are among the training data.")
    crop = min(256, min(min(p.shape[1:]) for p in pictures) // 64 * 64)
    if crop < least:
        raise DataError(f"A held-out picture is smaller than {least} pixels.")
    return torch.stack([crop_of(p, crop, generator(HELD_OUT, i)) for i, p in enumerate(pictures)])


def _channels_first(picture: np.ndarray) -> Tensor:
    """uint8 [H, W, 3]  ->  uint8 [3, H, W]"""
    return torch.from_numpy(picture.transpose(2, 0, 1).copy())


def crop_of(picture: Tensor, crop: int, rng: np.random.Generator) -> Tensor:
    """A random square of a picture, cut up to twice too large, scaled to `crop`, perhaps mirrored.

    Scaling down takes most of a JPEG's artefacts away.  picture: uint8 [3, H, W]  ->  float32 [3, crop, crop] in [0, 1]
    """
    _, height, width = picture.shape
    smallest = max(0.5, crop / min(height, width))
    side = min(round(crop / rng.uniform(smallest, 1)), height, width)
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    cut = picture[:, top : top + side, left : left + side].float() / 255
    if side != crop:
        cut = F.interpolate(cut[None], (crop, crop), mode="bilinear", antialias=True)[0]
    return cut.flip(-1) if rng.random() < 0.5 else cut


@dataclass(frozen=True)
class Sampling:
    """What sample g of a run makes of a picture, or that it is drawn instead.

    seed: with g it decides everything random. graphics: share of the samples that are drawn by code (graphics.py).
    permuted: share of the photographs whose colour channels change places.
    """

    seed: int = 0
    graphics: float = 0.0
    permuted: float = 0.0

    def crop(self, g: int, side: int, picture: Callable[[], Tensor]) -> Tensor:
        """picture: gives uint8 [3, H, W]  ->  float32 [3, side, side] in [0, 1]"""
        more = generator(self.seed, DRAWN, g)
        if more.random() < self.graphics:  # as `random_choice` says
            return drawn(side, more)
        x = crop_of(picture(), side, generator(self.seed, g))
        return x[more.permutation(3)] if more.random() < self.permuted else x


class PreloadedCrops:
    """All pictures on the device as uint8; crops are cut and scaled there. The fastest way, where they fit.

    Args:
        source: see `find_sources`.
        crop: side of a crop in pixels; the largest one, where `batches` is asked for several.
        seed: with the sample's number it decides everything random.
        left_out: names of pictures that are not to be trained on.
        reading: how shards are read.
        more: fields of Sampling.

    Raises:
        DataError: no picture is at least `crop` pixels on both sides.
    """

    def __init__(self, source, crop: int, seed: int = 0, device="cpu", left_out=frozenset(), reading=READING, **more):
        self.side, self.sampling = crop, Sampling(seed, **more)
        self.pictures: list[Tensor] = []
        small = 0
        found = pictures_in(source, lambda name: name not in left_out, reading)
        for _, picture in tqdm(found, "reading", unit="picture", delay=1, leave=False, disable=None):
            if min(picture.shape[:2]) < crop:
                small += 1
            else:
                self.pictures.append(_channels_first(picture).to(device))
        if not self.pictures:
            why = "none could be read, or all are held out"
            if small:
                why = f"all {small} are smaller than the crop of {crop} pixels"
            raise DataError(f"There are no pictures to train on: {why}.")
        if small:
            warnings.warn(f"left out {small} pictures smaller than the crop of {crop} pixels", PassedOver, stacklevel=2)

    def batches(self, ranges: Iterable[range], crop: int | None = None) -> Iterator[Tensor]:
        """For each range of sample numbers its crops: float32 [B, 3, crop, crop] in [0, 1]."""
        for samples in ranges:
            yield torch.stack([self._sample(g, crop or self.side) for g in samples])

    def _sample(self, g: int, crop: int) -> Tensor:
        number = picture_number(g, len(self.pictures), self.sampling.seed)
        return self.sampling.crop(g, crop, lambda: self.pictures[number])


class StreamedCrops:
    """Pictures read and cropped by worker processes as they are needed, for collections that do not fit in memory.

    Every process of a run reads its own samples alone, and its workers share them batch by batch. Takes what
    PreloadedCrops takes; pictures that are too small or damaged are passed over, with a warning.

    Args:
        workers: processes that read; 0: this one.
        places: samples of a batch over all processes of the run, which share the shards by it (shards.py).
    """

    def __init__(
        self,
        source,
        crop: int,
        seed: int = 0,
        device="cpu",
        left_out=frozenset(),
        reading=READING,
        workers: int = 2,
        places: int = 1,
        **more,
    ):
        files, self.tars = find_sources(source)
        self.files = [path for path in files if path.name not in left_out]
        if files and not (self.files or self.tars):
            raise DataError("There are no pictures to train on: all are held out.")
        if self.files and self.tars:
            raise DataError(
                "Streaming takes picture files or tar shards, not both at once; preload them, or choose one."
            )
        self.side, self.sampling, self.left_out = crop, Sampling(seed, **more), left_out
        self.device, self.reading, self.workers, self.places = device, reading, workers, places

    def batches(self, ranges: Iterable[range], crop: int | None = None) -> Iterator[Tensor]:
        """As PreloadedCrops.batches."""
        dataset = _Samples(self.pictures, self.side, crop or self.side, self.sampling)
        for batch in DataLoader(dataset, batch_size=None, sampler=ranges, num_workers=self.workers):
            if isinstance(batch, DataError):  # sent, not raised, by a worker process: torch would add its traceback
                raise batch
            yield batch.to(self.device)

    @functools.cached_property
    def pictures(self) -> "_Files | ShardedPictures":
        """What samples are taken from; of shards, their number is known only when they were looked at.

        Raises:
            DataError: a shard that cannot be read, or no picture in any.
        """
        if self.files:
            return _Files(self.files, self.sampling.seed)
        shards = find_shards(self.tars, self.side, lambda name: name not in self.left_out, self.reading)
        if not any(len(shard.usable) for shard in shards):
            raise DataError(f"No picture in the tars is readable and at least {self.side} pixels on both sides.")
        return ShardedPictures(shards, self.places, self.sampling.seed, self.reading)


@dataclass(frozen=True)
class _Files:
    """Picture files, of which any can be read at any time."""

    paths: list[Path]
    seed: int

    def candidates(self, g: int) -> Iterator[tuple[str, Path]]:
        """Sample g's picture; then those that may take its place, where it cannot be used."""
        first, count = picture_number(g, len(self.paths), self.seed), len(self.paths)
        for i in range(count):
            path = self.paths[(first + i) % count]
            yield str(path), path


class _Samples(Dataset):
    """For each range of sample numbers its crops.  side: the smallest that a picture may have on any side."""

    def __init__(self, pictures: _Files | ShardedPictures, side: int, crop: int, sampling: Sampling):
        self.pictures, self.side, self.crop, self.sampling = pictures, side, crop, sampling

    def __getitem__(self, samples: range) -> Tensor | DataError:
        try:
            return torch.stack([self.sampling.crop(g, self.crop, lambda g=g: self._picture(g)) for g in samples])
        except DataError as error:
            return error

    def _picture(self, g: int) -> Tensor:
        """The first picture for sample g that can be read and is large enough: uint8 [3, H, W]."""
        for name, picture in self.pictures.candidates(g):
            pixels = _pixels(name, picture)
            if pixels is not None and min(pixels.shape[:2]) >= self.side:
                return _channels_first(pixels)
            if pixels is not None:
                small = f"left out pictures smaller than the crop of {self.side} pixels"
                warnings.warn(small, PassedOver, stacklevel=2)
        raise DataError(f"No picture is readable and at least {self.side} pixels on both sides.")
