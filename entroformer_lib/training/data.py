"""Training pictures: from a folder, a list or WebDataset tars; random downscale and crop.

Sample number g of a run, counted over all steps and processes, is a function of the seed and g alone: which picture,
which crop, which noise. So a resumed run continues exactly, and two processes share the work of one without changing
it.
"""

import functools
import glob
import io
import itertools
import os
import tarfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from entroformer_lib.errors import DataError

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif"}


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
        files = sorted(p for p in path.rglob("*") if p.is_file())
        pictures = [p for p in files if p.suffix.lower() in PICTURES]
        tars = [str(p) for p in files if p.suffix == ".tar"]
        if not pictures and not tars:
            raise DataError(f"There is no picture and no .tar in the folder {name}.")
        return pictures, tars
    if path.suffix == ".txt" and path.is_file():
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        pictures = [path.parent / line for line in lines]
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


UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def pictures_in(source) -> Iterator[np.ndarray]:
    """Every picture of a source as uint8 [H, W, 3], in a fixed order. What cannot be read is named in a warning."""
    files, tars = find_sources(source)
    members = ((str(path), path.read_bytes) for path in files)
    for name, read in itertools.chain(members, ((n, lambda d=d: d) for n, d in _tar_members(tars))):
        try:
            yield _rgb(read())
        except UNREADABLE as error:
            warnings.warn(f"left out {name}: {error}", stacklevel=2)


def _tar_members(tars: list[str]) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every picture in the shards.

    Raises:
        DataError: a shard that is missing, cut short or no tar.
    """
    if not tars:
        return
    import webdataset as wds

    shards = wds.WebDataset(tars, shardshuffle=False, empty_check=False, nodesplitter=None, workersplitter=None)
    try:
        for sample in shards:
            for key, value in sample.items():
                if "." + key.lower().rsplit(".", 1)[-1] in PICTURES:
                    yield f"{sample['__key__']}.{key}", value
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise DataError(f"A tar among the training data is damaged or cannot be read: {error}.") from None


def _rgb(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


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


def picture_number(g: int, count: int, seed: int) -> int:
    """Which of `count` pictures sample g takes: every picture once per epoch, in an order of the epoch's own."""
    epoch, position = divmod(g, count)
    return int(_epoch_order(epoch, count, seed)[position])


@functools.lru_cache(maxsize=2)
def _epoch_order(epoch: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, 1, epoch)).permutation(count)


class PreloadedCrops:
    """All pictures on the device as uint8; crops are cut and scaled there. The fastest way, where they fit.

    Args:
        source: see `find_sources`.
        crop: side of a crop in pixels; the largest one, where `batches` is asked for several.
        seed: with the sample's number it decides everything random.
        downscale: see `crop_of`.

    Raises:
        DataError: no picture is at least `crop` pixels on both sides.
    """

    def __init__(self, source, crop: int, seed: int = 0, device="cpu", downscale: float = 0.5):
        self.crop, self.seed, self.downscale = crop, seed, downscale
        self.pictures: list[Tensor] = []
        small = 0
        for picture in pictures_in(source):
            if min(picture.shape[:2]) < crop:
                small += 1
            else:
                self.pictures.append(torch.from_numpy(picture.transpose(2, 0, 1).copy()).to(device))  # [3, H, W]
        if not self.pictures:
            why = f"all {small} are smaller than the crop of {crop} pixels" if small else "none could be read"
            raise DataError(f"There are no pictures to train on: {why}.")
        if small:
            warnings.warn(f"left out {small} pictures smaller than the crop of {crop} pixels", stacklevel=2)

    def batches(self, ranges: Iterable[range], crop: int | None = None) -> Iterator[Tensor]:
        """For each range of sample numbers its crops: float32 [B, 3, crop, crop] in [0, 1]."""
        for samples in ranges:
            yield torch.stack([self._sample(g, crop or self.crop) for g in samples])

    def _sample(self, g: int, crop: int) -> Tensor:
        picture = self.pictures[picture_number(g, len(self.pictures), self.seed)]
        return crop_of(picture, crop, self.downscale, np.random.default_rng((self.seed, g)))


class StreamedCrops:
    """Pictures read and cropped by worker processes as they are needed, for collections that do not fit in memory.

    Files are read in any order; tar shards from front to back, through a shuffle buffer, by webdataset (from disk, web
    or a pipe). Takes what PreloadedCrops takes; pictures that are too small or damaged are passed over.
    """

    def __init__(self, source, crop: int, seed: int = 0, device="cpu", downscale: float = 0.5, workers: int = 2):
        self.files, self.tars = find_sources(source)
        if self.files and self.tars:
            raise DataError(
                "Streaming takes picture files or tar shards, not both at once; preload them, or choose one."
            )
        self.crop, self.seed, self.downscale, self.device, self.workers = crop, seed, downscale, device, workers

    def batches(self, ranges: Iterable[range], crop: int | None = None) -> Iterator[Tensor]:
        """As PreloadedCrops.batches; the ranges must go up."""
        crop = crop or self.crop
        if self.files:
            dataset = _FileSamples(self.files, crop, self.seed, self.downscale)
            loader = DataLoader(dataset, batch_sampler=map(list, ranges), num_workers=self.workers)
        else:
            dataset = _TarSamples(self.tars, crop, self.seed, self.downscale, ranges)
            loader = DataLoader(dataset, batch_size=None, num_workers=min(1, self.workers))
        for batch in loader:
            yield batch.to(self.device)


class _FileSamples(Dataset):
    def __init__(self, files: list[Path], crop: int, seed: int, downscale: float):
        self.files, self.crop, self.seed, self.downscale = files, crop, seed, downscale

    def __getitem__(self, g: int) -> Tensor:
        first = picture_number(g, len(self.files), self.seed)
        for offset in range(len(self.files)):  # the next one where this one cannot be used
            picture = _read_if_usable(self.files[(first + offset) % len(self.files)].read_bytes, self.crop)
            if picture is not None:
                return crop_of(picture, self.crop, self.downscale, np.random.default_rng((self.seed, g)))
        raise DataError(f"No picture is readable and at least {self.crop} pixels on both sides.")


class _TarSamples(IterableDataset):
    """The samples of all shards again and again; sample g is the g-th usable picture of that stream."""

    def __init__(self, tars: list[str], crop: int, seed: int, downscale: float, ranges: Iterable[range]):
        self.tars, self.crop, self.seed, self.downscale, self.ranges = tars, crop, seed, downscale, list(ranges)

    def __iter__(self) -> Iterator[Tensor]:
        stream, position = self._stream(), 0
        for samples in self.ranges:
            batch = []
            for g in samples:
                while position <= g:  # after a resume, or another process's share: passed over without decoding
                    data, position = next(stream), position + 1
                picture = _read_if_usable(lambda data=data: data, self.crop)
                batch.append(crop_of(picture, self.crop, self.downscale, np.random.default_rng((self.seed, g))))
            yield torch.stack(batch)

    def _stream(self) -> Iterator[bytes]:
        for epoch in itertools.count():
            rng = np.random.default_rng((self.seed, 4, epoch))
            shards = [self.tars[i] for i in rng.permutation(len(self.tars))]
            usable = (data for _, data in _tar_members(shards) if _is_usable(data, self.crop))
            count = 0
            for data in _shuffled(usable, rng):
                count += 1
                yield data
            if not count:
                raise DataError(f"No picture in the tars is readable and at least {self.crop} pixels on both sides.")


def _shuffled(stream: Iterator[bytes], rng: np.random.Generator, size: int = 1000) -> Iterator[bytes]:
    """Keeps `size` items back and hands out a random one of them; the rest at the end."""
    held: list[bytes] = []
    for item in stream:
        if len(held) < size:
            held.append(item)
            continue
        i = rng.integers(size)
        held[i], item = item, held[i]
        yield item
    for i in rng.permutation(len(held)):
        yield held[i]


def _is_usable(data: bytes, crop: int) -> bool:
    """Looks at a picture's header only."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return min(image.size) >= crop
    except (UnidentifiedImageError, OSError):
        return False


def _read_if_usable(read, crop: int) -> Tensor | None:
    try:
        picture = _rgb(read())
    except UNREADABLE:
        return None
    return torch.from_numpy(picture.transpose(2, 0, 1).copy()) if min(picture.shape[:2]) >= crop else None


def uniform_noise(samples: range, shapes: dict[str, tuple], seed: int, device="cpu") -> dict[str, Tensor]:
    """Noise in [-0.5, 0.5) of each sample number.  shapes: {"y": (M, h, w), ...}  ->  {"y": [B, M, h, w], ...}"""
    noise: dict[str, list[Tensor]] = {name: [] for name in shapes}
    for g in samples:
        generator = torch.Generator(device).manual_seed(hash((seed, 2, g)) % 2**63)
        for name, shape in shapes.items():
            noise[name].append(torch.rand(shape, generator=generator, device=device) - 0.5)
    return {name: torch.stack(values) for name, values in noise.items()}


def random_kept(samples: range, size: tuple[int, int], fraction: float, seed: int, device="cpu") -> Tensor:
    """Random masks for the pretraining of A.5, True = kept: bool [B, 1, h, w] with `fraction` of the sites False."""
    h, w = size
    masks = []
    for g in samples:
        order = np.random.default_rng((seed, 3, g)).permutation(h * w)
        masks.append(torch.from_numpy(order >= round(fraction * h * w)).view(1, h, w))
    return torch.stack(masks).to(device)


def random_missing(samples: range, size: tuple[int, int], largest: float, seed: int, device="cpu") -> Tensor:
    """Latents hidden from the others as context, True = hidden: bool [B, 1, h, w]. Each sample has a share of its own,
    uniform in [0, largest], so that the model knows whole context, single gaps and many."""
    masks = []
    for g in samples:
        rng = np.random.default_rng((seed, 6, g))
        masks.append(torch.from_numpy(rng.random((1, *size)) < rng.uniform(0, largest)))
    return torch.stack(masks).to(device)


def random_one_way(samples: range, share: float, seed: int, device="cpu") -> Tensor:
    """Which samples see their context one way: bool [B], `share` of them in the long run."""
    drawn = [np.random.default_rng((seed, 8, g)).random() < share for g in samples]
    return torch.tensor(drawn, device=device)


def random_levels(samples: range, count: int, seed: int) -> list[int]:
    """Which of `count` rates each sample of a variable-rate run has. All come up equally often in every `count`
    samples, so that the mean of a batch's losses jumps less."""
    return [int(np.random.default_rng((seed, 5, g // count)).permutation(count)[g % count]) for g in samples]
