"""Training pictures: from a folder, a list or WebDataset tars; random downscale and crop.

Sample number g of a run, counted over all steps and processes, is a function of the seed and g alone: which picture,
which crop, which noise. So a resumed run continues exactly, and two processes share the work of one without changing
it.
"""

import glob
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

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


def pictures_in(source) -> Iterator[np.ndarray]:
    """Every picture of a source as uint8 [H, W, 3], in a fixed order. What cannot be read is named in a warning."""
    files, tars = find_sources(source)
    for path in files:
        try:
            yield _rgb(path.read_bytes())
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            warnings.warn(f"left out {path}: {error}", stacklevel=2)
    if tars:
        yield from _pictures_in_tars(tars)


def _pictures_in_tars(tars: list[str]) -> Iterator[np.ndarray]:
    import webdataset as wds

    shards = wds.WebDataset(tars, shardshuffle=False, empty_check=False, nodesplitter=None, workersplitter=None)
    try:
        for sample in shards:
            for key, value in sample.items():
                if "." + key.lower().rsplit(".", 1)[-1] not in PICTURES:
                    continue
                try:
                    yield _rgb(value)
                except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
                    warnings.warn(f"left out {sample['__key__']}.{key}: {error}", stacklevel=2)
    except (OSError, EOFError, ValueError) as error:  # tarfile.ReadError is an OSError
        raise DataError(f"A tar among the training data is damaged or cannot be read: {error}.") from None


def _rgb(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


class Crops:
    """All pictures on the device as uint8; crops are cut and scaled there.

    Args:
        source: see `find_sources`.
        crop: side of a crop in pixels.
        seed: with the sample's number it decides everything random.
        downscale: a crop may be cut up to 1 / downscale larger and scaled down; JPEG artefacts shrink with it.

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
                continue
            self.pictures.append(torch.from_numpy(picture.transpose(2, 0, 1).copy()).to(device))  # [3, H, W]
        if not self.pictures:
            why = f"all {small} are smaller than the crop of {crop} pixels" if small else "none could be read"
            raise DataError(f"There are no pictures to train on: {why}.")
        if small:
            warnings.warn(f"left out {small} pictures smaller than the crop of {crop} pixels", stacklevel=2)
        self._order = (-1, None)

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, samples: range) -> Tensor:
        """Crops of the given sample numbers: float32 [B, 3, crop, crop] in [0, 1]."""
        return torch.stack([self._crop(g) for g in samples]).div_(255)

    def _crop(self, g: int) -> Tensor:
        rng = np.random.default_rng((self.seed, g))
        picture = self.pictures[self._which(g)]
        _, height, width = picture.shape
        smallest = max(self.downscale, self.crop / min(height, width))
        side = min(round(self.crop / rng.uniform(smallest, 1)), height, width)  # cut this much, scale to `crop`
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        cut = picture[:, top : top + side, left : left + side].float()
        if side != self.crop:
            cut = F.interpolate(cut[None], (self.crop, self.crop), mode="bilinear", antialias=True)[0]
        return cut.flip(-1) if rng.random() < 0.5 else cut

    def _which(self, g: int) -> int:
        """Every picture once per epoch, in an order of the epoch's own."""
        epoch, position = divmod(g, len(self.pictures))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.pictures)))
        return int(self._order[1][position])


def uniform_noise(samples: range, shapes: dict[str, tuple], seed: int, device="cpu") -> dict[str, Tensor]:
    """Noise in [-0.5, 0.5) for each latent, drawn per sample number. shapes: {"y": (M, h, w), ...}  ->  [B, M, h, w]."""
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
