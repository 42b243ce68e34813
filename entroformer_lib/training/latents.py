"""Latents computed once: training entropy models on equal terms, in minutes instead of hours.

An entropy model learns from latents, and g_a costs more time than a small entropy model. So where only entropy models
are compared, one model gives its transforms; they stay frozen, the latents of the training photographs are computed
once and kept on disk, and every variant sees the same latents in the same order:

    python -m entroformer_lib.training.latents --transforms blocks-parallel --data photos --out runs/latents
    entroformer train --transforms blocks-parallel --latents runs/latents --crop 256 --model tiny-serial \\
        --architecture position=none rate_aware=true ...

What comes out is an ordinary model with these g_a and g_s. The difference to the paper: there, transforms and entropy
model adapt to each other; here, the transforms have adapted to the entropy model they were first trained with.
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import DataError, PassedOver, UserError, WeightsError
from entroformer_lib.files import replacing, write_bytes
from entroformer_lib.models.config import TRANSFORM_FIELDS, named_config
from entroformer_lib.models.transforms import WithLinearPath
from entroformer_lib.training.chance import LATENTS, generator
from entroformer_lib.training.config import Count, Seed, Side, Text, check
from entroformer_lib.training.data import crop_of, held_out_crops, listed, picture_number, pictures_in, read_names
from entroformer_lib.weights.pretrained import PREFIX, pretrained_lmbda, pretrained_transforms
from entroformer_lib.weights.zoo import load_model, split_name


def frozen_transforms(name: str) -> Entroformer:
    """The model that gives g_a, g_s and its gains. A rate behind @ (`blocks-parallel@0.014`) is worked into the kernels
    of the last layer of g_a and the first of g_s, which makes transforms of one rate. `zoo:mbt2018-mean:4` means those
    of CompressAI's pretrained model."""
    if name.startswith(PREFIX):
        return pretrained_transforms(name)
    model = load_model(name, device="cpu")
    if not split_name(name)[1]:
        return model
    with torch.no_grad():
        fold_gain(model.g_a, model.g_s, *(g.flatten() for g in model.gain(torch.tensor([model.level]))))
    model.gain = None
    return model


@torch.no_grad()
def fold_gain(g_a: nn.Module, g_s: nn.Module, gain: Tensor, inverse: Tensor) -> None:
    """Works a gain of the latents into the kernels that write them and that read them.  gain, inverse: [M]"""
    for layer in _ends(g_a, -1):
        for parameter in layer.parameters():  # [M, ...]
            parameter.mul_(gain.view(-1, *(1,) * (parameter.dim() - 1)))
    for layer in _ends(g_s, 0):
        axis = 1 if isinstance(layer, nn.Conv2d) else 0  # where M stands
        layer.weight.mul_(inverse.view(*(1,) * axis, -1, *(1,) * (3 - axis)))


def _ends(transform: nn.Module, which: int) -> list[nn.Module]:
    """The first (0) or last (-1) layers with kernels, one of each path."""
    if isinstance(transform, WithLinearPath):
        return [*_ends(transform.network, which), transform.linear]
    return [[layer for layer in transform if getattr(layer, "weight", None) is not None][which]]


def with_transforms(source: Entroformer, name: str, preset: str = "paper", **fields) -> Entroformer:
    """A new model with an untrained entropy model behind the frozen transforms of another one.

    Args:
        source: gives g_a, g_s and gains, and with them their fields of the config and lmbdas.
        name, preset, fields: as `named_config` takes them.
    """
    c = source.config
    shape = {field: getattr(c, field) for field in TRANSFORM_FIELDS}
    fields = {**fields, **shape, "lmbdas": c.lmbdas if source.gain is not None else ()}
    return freeze(Entroformer(named_config(name, preset, **fields)), source)


def freeze(model: Entroformer, source: Entroformer) -> Entroformer:
    """The model, with g_a, g_s and gains of another one, which no training changes.

    Raises:
        WeightsError: its transforms are of another size, or for other rates.
    """
    ours, theirs = (
        [getattr(m.config, field) for field in TRANSFORM_FIELDS] + [m.gain and m.gain.lmbdas] for m in (model, source)
    )
    if ours != theirs:
        raise WeightsError(
            "An entropy model goes on only behind transforms of the size and rates that it was made for."
        )
    for part in ("g_a", "g_s", "gain"):
        if getattr(source, part) is not None:
            getattr(model, part).load_state_dict(getattr(source, part).state_dict())
            getattr(model, part).requires_grad_(False)
    return model


def trained_lmbda(name: str) -> float | None:
    """The lambda that transforms were trained for; None: several."""
    if name.startswith(PREFIX):
        return pretrained_lmbda(name)
    _, lmbda = split_name(name)
    return float(lmbda) if lmbda else load_model(name, device="cpu").card.get("lmbda")


def transforms_digest(model: Entroformer) -> str:
    """SHA-256 over the weights of g_a and g_s. (Gains come after the latents, so they do not count.)"""
    digest = hashlib.sha256()
    for part in (model.g_a, model.g_s):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_latents(
    transforms: Text,
    data: Text,
    out: Path,
    crop: Side = 256,
    per_picture: Count = 8,
    seed: Seed = 0,
    held_out: Text | None = None,
) -> Path:
    """Computes y of random crops of every picture and keeps them in half precision. A finished cache is left as it is.
    Its latents.json says what is in it, with the SHA-256 over the pixels of the pictures.

    Args:
        transforms: The model whose g_a is used; with @ and a lambda, at that rate; or zoo:NAME:QUALITY of CompressAI.
        data: Pictures, as for training.
        out: Folder of the cache: latents.npy, [pictures, per_picture, M, h, w], and latents.json.
        crop: Side of a crop in pixels. Pictures that are smaller are left out.
        per_picture: Crops of each picture.
        seed: Decides which crops.
        held_out: A list of file names, one a line. These pictures are left out, and held_out.npy has y of one crop of
            each, whose rate is logged while an entropy model trains.

    Raises:
        TrainingError: a value out of its range.
        DataError: no picture is large enough, or the folder holds a cache of something else.
    """
    check(locals(), write_latents)
    model = frozen_transforms(transforms)
    wanted = {"transforms_sha256": transforms_digest(model), "crop": crop, "per_picture": per_picture, "seed": seed}
    names = read_names(held_out) if held_out else frozenset()
    wanted["held_out"] = sorted(names)
    note = out / "latents.json"
    if note.exists():
        found, pictures_there = check_note(note, wanted), _listed_if_there(data)
        if None not in (pictures_there, found.get("sources")) and pictures_there != found["sources"]:
            other = f"The latents in {out} are those of {found.get('data')}, and not of {data}"
            raise DataError(f"{other}; choose another folder.")
        return out
    crops = held_out_crops(data, names) if names else None  # refuses before anything is computed

    def pictures() -> Iterator[np.ndarray]:  # again for each use: they need not fit into memory
        found = pictures_in(data, lambda name: name not in names)
        return (p for _, p in found if min(p.shape[:2]) >= crop)

    digest, count = hashlib.sha256(), 0
    for picture in tqdm(pictures(), "reading", unit="picture"):
        count += 1
        digest.update(repr(picture.shape).encode() + picture.tobytes())
    if not count:
        raise DataError(f"No picture at {data} has {crop} pixels on both sides.")
    shape = (count, per_picture, model.config.M, crop // 16, crop // 16)
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False, "shape": shape}
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Not by a memory map: on a full disk the kernel ends a process that writes into one, without a word.
        with replacing(out / "latents.npy") as part, open(part, "wb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", PassedOver)  # told above
            np.lib.format.write_array_header_1_0(file, header)
            for i, picture in zip(range(count), tqdm(pictures(), unit="picture", total=count), strict=True):
                file.write(latents_of(model, picture, crop, [(seed, i, j) for j in range(per_picture)]).tobytes())
        if crops is not None:
            held = torch.cat([model.analysis(x) for x in crops.split(8)]).half().numpy()  # [n, M, h, w]
            with replacing(out / "held_out.npy") as part, open(part, "wb") as file:
                np.save(file, held)
    except OSError as error:
        raise DataError(f"Latents could not be written to {out}: {error.strerror or error}.") from None
    words = {"transforms": transforms, "data": data, "pictures": count, "shape": shape}
    words |= {"pictures_sha256": digest.hexdigest(), "sources": listed(data)}
    write_bytes(note, json.dumps({**wanted, **words}, indent=1).encode())
    return out


def _listed_if_there(data: str) -> str | None:
    """`listed`; None where the pictures are gone, which a finished cache does not need."""
    try:
        return listed(data)
    except DataError:
        return None


@torch.inference_mode()
def latents_of(model: Entroformer, picture: np.ndarray, crop: int, seeds: list[tuple[int, ...]]) -> np.ndarray:
    """y of one random crop for each seed.  picture: uint8 [H, W, 3]  ->  float16 [len(seeds), M, crop/16, crop/16]"""
    pixels = torch.from_numpy(picture.transpose(2, 0, 1).copy())
    crops = [crop_of(pixels, crop, np.random.default_rng(s)) for s in seeds]
    return model.g_a(torch.stack(crops)).half().numpy()


def check_note(note: Path, wanted: dict) -> dict:
    """The cache's note, if it says what is wanted."""
    try:
        found = {**json.loads(note.read_text())}
    except (OSError, ValueError, TypeError):
        raise DataError(f"There is no whole cache of latents in {note.parent}.") from None
    for name, value in wanted.items():
        if found.get(name, [] if name == "held_out" else None) != value:  # older caches have no such word
            what = {"transforms_sha256": "transforms", "held_out": "held-out pictures"}.get(name, name)
            raise DataError(
                f"The latents in {note.parent} were made with other {what} ({str(found.get(name))[:12]}, "
                f"and not {str(value)[:12]}); choose another folder."
            )
    return found


class LatentCrops:
    """Latents from the cache, in the place of training pictures: sample g takes a picture as elsewhere, and one of its
    crops. The order depends on the seed and g alone, so all variants see the same. `held_out` has the latents of the
    pictures that were left out, [n, M, h, w], or is None.

    Args:
        folder: written by `write_latents`.
        model: its transforms must be those of the cache.
        crop: side in pixels; of larger ones in the cache a random part is taken.

    Raises:
        DataError: no cache there, or one of other transforms or smaller crops.
    """

    def __init__(self, folder: Path, model: Entroformer, crop: int, seed: int = 0, device="cpu"):
        note = check_note(folder / "latents.json", {"transforms_sha256": transforms_digest(model)})
        if not crop <= note.get("crop", 0):
            raise DataError(f"The latents in {folder} are of crops of {note.get('crop')} pixels, too few for {crop}.")
        self.seed, self.device, self.crop = seed, device, crop
        try:
            self.table = np.load(folder / "latents.npy", mmap_mode="r")  # [pictures, per_picture, M, h, w]
            shape = list(self.table.shape)
            held_out = np.load(folder / "held_out.npy") if note.get("held_out") else None
        except (OSError, ValueError, EOFError, AttributeError):  # AttributeError: an archive of several tables
            raise DataError(f"There is no whole cache of latents in {folder}.") from None
        if shape != note.get("shape"):
            raise DataError(f"The latents in {folder} are not those that their latents.json describes.")
        self.held_out = None if held_out is None else torch.from_numpy(held_out).to(device).float()

    def batches(self, ranges: Iterable[range], crop: int | None = None) -> Iterator[Tensor]:
        """For each range of sample numbers its latents: float32 [B, M, h, w].  crop: where it is another one"""
        side = (crop or self.crop) // 16
        for samples in ranges:
            batch = np.stack([self._sample(g, side) for g in samples])
            yield torch.from_numpy(batch).to(self.device).float()

    def _sample(self, g: int, side: int) -> np.ndarray:
        pictures, per_picture, *_, whole = self.table.shape
        rng = generator(self.seed, LATENTS, g)
        y = self.table[picture_number(g, pictures, self.seed), rng.integers(per_picture)]
        top, left = rng.integers(0, whole - side + 1, 2)
        return y[:, top : top + side, left : left + side]


if __name__ == "__main__":
    try:
        tyro.cli(write_latents)
    except UserError as error:
        sys.exit(f"latents: {error}")
