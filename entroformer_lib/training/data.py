"""Training pictures: from a folder, a list or WebDataset tars; random downscale and crop.

Sample number g of a run, counted over all steps and processes, is a function of the seed and g alone (chance.py): which
picture, and which crop of it.
"""

import collections
import glob
import io
import itertools
import os
import re
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from entroformer_lib.codec.pictures import pixels_of
from entroformer_lib.datasets import files_under, is_picture
from entroformer_lib.errors import DataError, PassedOver
from entroformer_lib.training.chance import DRAWN, HELD_OUT, SHARDS, generator, picture_number
from entroformer_lib.training.graphics import drawn

SHUFFLED = 1000  # pictures of a stream that are held back, so that they come in another order


def find_sources(source: str | os.PathLike | list) -> tuple[list[Path], list[str]]:
    """Splits what the user named into picture files and tar shards.

    Args:
        source: a folder (searched for pictures and .tar files, subfolders too), a picture, a .txt list of paths (one a
            line, relative to the list), a .tar, a glob of tars, a web address of a tar shard, or a list of these.

    Raises:
        DataError: nothing there, or nothing usable in it.
    """
    if isinstance(source, list | tuple):
        found = [find_sources(s) for s in source]
        return [p for pictures, _ in found for p in pictures], [t for _, tars in found for t in tars]
    name = os.fspath(source)
    path = Path(name)
    if "://" in name or name.startswith("pipe:"):
        return [], [name]
    if path.is_dir():
        files = files_under(path)
        pictures = [p for p in files if is_picture(p)]
        tars = [str(p) for p in files if p.suffix == ".tar"]
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
        return ([], [name]) if path.suffix == ".tar" else ([path], [])
    tars = sorted(glob.glob(name))
    if tars:
        return find_sources(tars)
    raise DataError(f"There are no training pictures at {name}.")


def pictures_in(source, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[np.ndarray]:
    """Every picture of a source whose file name is wanted, as uint8 [H, W, 3], in a fixed order. What cannot be read is
    named in a warning."""
    files, tars = find_sources(source)
    for name, picture in itertools.chain(((str(path), path) for path in files), _tar_members(tars)):
        if wanted(Path(name).name) and (pixels := _pixels(name, picture)) is not None:
            yield pixels


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
    try:
        names = frozenset(_lines(Path(path)))
    except (OSError, UnicodeError) as error:
        raise DataError(f"The list of held-out pictures {path} cannot be read: {error}.") from None
    if not names:
        raise DataError(f"The list of held-out pictures {path} names none.")
    return names


def _lines(path: Path) -> list[str]:
    """The lines of a list, without comments (# at the beginning or behind a space) and empty lines."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def held_out_crops(source, names: frozenset[str], largest: int = 256) -> Tensor:
    """One crop of each named picture of a source, always the same, scaled as in training: [n, 3, crop, crop], where
    crop is as large as all of them are, in multiples of 64, and at most `largest`.

    Raises:
        DataError: a name that is not in the source, or a picture smaller than 64 pixels.
    """
    pictures = [_channels_first(p) for p in pictures_in(source, names.__contains__)]
    if len(pictures) != len(names):
        raise DataError(f"Of {len(names)} held-out pictures {len(pictures)} are among the training data.")
    crop = min(largest, min(min(p.shape[1:]) for p in pictures) // 64 * 64)
    if not crop:
        raise DataError("A held-out picture is smaller than 64 pixels.")
    return torch.stack([crop_of(p, crop, 0.5, generator(HELD_OUT, i)) for i, p in enumerate(pictures)])


def _tar_members(tars: list[str]) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every picture in the shards.

    Raises:
        DataError: a shard that is missing, cut short or no tar.
    """
    if not tars:
        return
    from webdataset import gopen  # from disk, web or a pipe

    for tar in tars:
        try:
            with tarfile.open(fileobj=gopen(tar), mode="r|*", tarinfo=_Header) as members:
                for member in members:
                    if member.isreg() and is_picture(member.name):
                        yield member.name, members.extractfile(member).read()
                    members.members = []  # it would keep them all
        except (OSError, EOFError, tarfile.TarError) as error:
            reason = (error.strerror or "fetching it failed") if isinstance(error, OSError) else error
            raise DataError(f"The tar {tar} is damaged or cannot be read: {reason}.") from None


class _Header(tarfile.TarInfo):
    """A member's header. A damaged one is an error here; tarfile takes it for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            raise tarfile.ReadError(str(error)) from None


def _channels_first(picture: np.ndarray) -> Tensor:
    """uint8 [H, W, 3]  ->  uint8 [3, H, W]"""
    return torch.from_numpy(picture.transpose(2, 0, 1).copy())


def crop_of(picture: Tensor, crop: int, downscale: float, rng: np.random.Generator) -> Tensor:
    """A random square of a picture, cut up to 1 / downscale too large, scaled to `crop`, perhaps mirrored.

    Scaling down takes most of a JPEG's artefacts away.  picture: uint8 [3, H, W]  ->  float32 [3, crop, crop] in [0, 1]
    """
    _, height, width = picture.shape
    smallest = max(downscale, crop / min(height, width))
    side = min(round(crop / rng.uniform(smallest, 1)), height, width)
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    cut = picture[:, top : top + side, left : left + side].float() / 255
    if side != crop:
        cut = F.interpolate(cut[None], (crop, crop), mode="bilinear", antialias=True)[0]
    return cut.flip(-1) if rng.random() < 0.5 else cut


@dataclass(frozen=True)
class Sampling:
    """What sample g of a run makes of a picture, or that it is drawn instead.

    seed: with g it decides everything random. downscale: see `crop_of`. graphics: share of the samples that are drawn
    by code (graphics.py). permuted: share of the photographs whose colour channels change places.
    """

    seed: int = 0
    downscale: float = 0.5
    graphics: float = 0.0
    permuted: float = 0.0

    def crop(self, g: int, side: int, picture: Callable[[], Tensor]) -> Tensor:
        """picture: gives uint8 [3, H, W]  ->  float32 [3, side, side] in [0, 1]"""
        more = generator(self.seed, DRAWN, g)
        if more.random() < self.graphics:  # as `random_choice` says
            return drawn(side, more)
        x = crop_of(picture(), side, self.downscale, generator(self.seed, g))
        return x[more.permutation(3)] if more.random() < self.permuted else x


class PreloadedCrops:
    """All pictures on the device as uint8; crops are cut and scaled there. The fastest way, where they fit.

    Args:
        source: see `find_sources`.
        crop: side of a crop in pixels; the largest one, where `batches` is asked for several.
        seed: with the sample's number it decides everything random.
        left_out: names of pictures that are not to be trained on.
        more: fields of Sampling.

    Raises:
        DataError: no picture is at least `crop` pixels on both sides.
    """

    def __init__(self, source, crop: int, seed: int = 0, device="cpu", left_out=frozenset(), **more):
        self.side, self.sampling = crop, Sampling(seed, **more)
        self.pictures: list[Tensor] = []
        small = 0
        for picture in pictures_in(source, lambda name: name not in left_out):
            if min(picture.shape[:2]) < crop:
                small += 1
            else:
                self.pictures.append(_channels_first(picture).to(device))
        if not self.pictures:
            why = f"all {small} are smaller than the crop of {crop} pixels" if small else "none could be read"
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

    Files are read in any order; tar shards from front to back, through a shuffle buffer, by webdataset (from disk, web
    or a pipe). Takes what PreloadedCrops takes; pictures that are too small or damaged are passed over, with a warning.
    """

    def __init__(self, source, crop: int, seed: int = 0, device="cpu", left_out=frozenset(), workers: int = 2, **more):
        files, self.tars = find_sources(source)
        self.files = [path for path in files if path.name not in left_out]
        if self.files and self.tars:
            raise DataError(
                "Streaming takes picture files or tar shards, not both at once; preload them, or choose one."
            )
        self.side, self.sampling, self.left_out = crop, Sampling(seed, **more), left_out
        self.device, self.workers = device, workers

    def batches(self, ranges: Iterable[range], crop: int | None = None) -> Iterator[Tensor]:
        """As PreloadedCrops.batches; the ranges must go up."""
        crop = crop or self.side
        if self.files:
            dataset = _FileSamples(self.files, crop, self.sampling)
            loader = DataLoader(dataset, batch_size=None, sampler=ranges, num_workers=self.workers)
        else:
            dataset = _TarSamples(self.tars, crop, self.sampling, self.left_out, ranges)
            loader = DataLoader(dataset, batch_size=None, num_workers=min(1, self.workers))
        for batch in loader:
            if isinstance(batch, DataError):  # sent, not raised, by a worker process: torch would add its traceback
                raise batch
            yield batch.to(self.device)


class _FileSamples(Dataset):
    def __init__(self, files: list[Path], side: int, sampling: Sampling):
        self.files, self.side, self.sampling = files, side, sampling

    def __getitem__(self, samples: range) -> Tensor | DataError:
        try:
            return torch.stack([self.sampling.crop(g, self.side, lambda g=g: self._picture(g)) for g in samples])
        except DataError as error:
            return error

    def _picture(self, g: int) -> Tensor:
        first, count = picture_number(g, len(self.files), self.sampling.seed), len(self.files)
        paths = (self.files[(first + i) % count] for i in range(count))
        return _first_usable(((str(path), path) for path in paths), self.side)


class _TarSamples(IterableDataset):
    """The samples of all shards again and again; sample g is the g-th usable picture of that stream."""

    def __init__(self, tars: list[str], side: int, sampling: Sampling, left_out, ranges: Iterable[range]):
        self.tars, self.side, self.sampling, self.left_out, self.ranges = tars, side, sampling, left_out, list(ranges)

    def __iter__(self) -> Iterator[Tensor | DataError]:
        try:
            yield from self._batches()
        except DataError as error:
            yield error

    def _batches(self) -> Iterator[Tensor]:
        stream, position = self._stream(), 0
        ahead: collections.deque[tuple[str, bytes]] = collections.deque()  # of the stream, from `position` on

        def candidates() -> Iterator[tuple[str, bytes]]:
            """The picture of a sample, and those after it where only the header of a picture is whole."""
            for i in range(SHUFFLED):
                if i == len(ahead):
                    ahead.append(next(stream))
                yield ahead[i]

        for samples in self.ranges:
            batch = []
            for g in samples:
                while position < g:  # after a resume, or another process's share: passed over without decoding
                    if ahead:
                        ahead.popleft()
                    else:
                        next(stream)
                    position += 1
                batch.append(self.sampling.crop(g, self.side, lambda: _first_usable(candidates(), self.side)))
            yield torch.stack(batch)

    def _stream(self) -> Iterator[tuple[str, bytes]]:
        for epoch in itertools.count():
            rng = generator(self.sampling.seed, SHARDS, epoch)
            shards = [self.tars[i] for i in rng.permutation(len(self.tars))]
            members = _tar_members(shards)
            usable = (m for m in members if Path(m[0]).name not in self.left_out and _is_usable(*m, self.side))
            count = 0
            for member in _shuffled(usable, rng):
                count += 1
                yield member
            if not count:
                raise DataError(f"No picture in the tars is readable and at least {self.side} pixels on both sides.")


def _shuffled(stream: Iterator, rng: np.random.Generator) -> Iterator:
    """Keeps SHUFFLED items back and hands out a random one of them; the rest at the end."""
    held = []
    for item in stream:
        if len(held) < SHUFFLED:
            held.append(item)
            continue
        i = rng.integers(SHUFFLED)
        held[i], item = item, held[i]
        yield item
    for i in rng.permutation(len(held)):
        yield held[i]


def _is_usable(name: str, data: bytes, side: int) -> bool:
    """Looks at a picture's header only."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _is_large(image.size, side)
    except Exception:  # a damaged header can raise anything; what it is the reader says
        return _pixels(name, data) is not None


def _is_large(size: tuple[int, ...], side: int) -> bool:
    if min(size) < side:
        warnings.warn(f"left out pictures smaller than the crop of {side} pixels", PassedOver, stacklevel=2)
    return min(size) >= side


def _first_usable(pictures: Iterable[tuple[str, Path | bytes]], side: int) -> Tensor:
    """The first picture that can be read and is large enough, of names and pictures: uint8 [3, H, W]."""
    for name, picture in pictures:
        pixels = _pixels(name, picture)
        if pixels is not None and _is_large(pixels.shape[:2], side):
            return _channels_first(pixels)
    raise DataError(f"No picture is readable and at least {side} pixels on both sides.")
