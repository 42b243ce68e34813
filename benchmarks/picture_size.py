"""How the gain of attention grows with the size of the picture: entropy models behind the same transforms, in squares.

    python benchmarks/picture_size.py --kodak KODAK --out data/results/picture_size.json

Each picture's latents are cut into squares of each size, and every square is coded alone, so pixels and latents are the
same at all sizes, and only what a latent may look at differs. Rates are estimated, as in `latent_rates.py`.
"""

import itertools
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from entroformer_lib.codec import codec
from entroformer_lib.errors import WeightsError
from entroformer_lib.studies.rate_distortion import pictures_of
from entroformer_lib.studies.results import save
from entroformer_lib.training.latents import transforms_digest
from entroformer_lib.weights.zoo import load_model

LMBDAS = (0.00035, 0.0017, 0.007, 0.029, 0.12)
SIDES = (64, 128, 256, 512)  # pixels
MODELS = tuple(f"equal-{kind}" for kind in ("serial", "parallel", "cnn", "minnen", "groupedmixer"))


def measure(
    kodak: str,
    out: str,
    models: tuple[str, ...] = MODELS,
    limit: int | None = None,
    lmbdas: tuple[float, ...] = LMBDAS,
    sides: tuple[int, ...] = SIDES,
) -> None:
    """Estimates rates and saves a row for each model, lambda, side and picture.

    Args:
        kodak: Folder of pictures. Of each the largest part is taken that the largest side divides, in the middle.
        out: The JSON file.
        models: Of variable rate, behind the same transforms.
        limit: So many pictures; by default all.
        lmbdas: Rates.
        sides: Of the squares, in pixels: multiples of 64, of which each divides the largest.

    Raises:
        WeightsError: models behind other transforms.
    """
    loaded = {name: load_model(name, device="cpu") for name in models}
    first, *others = loaded.items()
    for name, model in others:
        if transforms_digest(model) != transforms_digest(first[1]):
            raise WeightsError(f"{first[0]} and {name} have other transforms.")
    pictures, rows = pictures_of(kodak, limit), []
    with torch.inference_mode():
        latents = {name: _middle(first[1].g_a(codec.to_tensor(x, first[1])), max(sides)) for name, x in pictures}
        work = list(itertools.product(loaded.items(), lmbdas, sides))
        for (name, model), lmbda, side in tqdm(work, unit="row"):
            level = model.gain.level_of(lmbda)
            for image, y in latents.items():
                y = model.scaled(y, level)
                squares = torch.cat([s for row in y.split(side // 16, 2) for s in row.split(side // 16, 3)])
                bits = sum(
                    float(b.sum()) for part in squares.split(16) for b in model.estimated_bits(part, level).values()
                )
                bpp = bits / (256 * y[0, 0].numel())
                rows.append({"model": name, "lmbda": lmbda, "side": side, "image": image, "bpp": bpp})
    save(Path(out), {"models": list(models), "pictures": len(pictures), "rows": rows})


def _middle(y: torch.Tensor, side: int) -> torch.Tensor:
    """The largest part in the middle whose sides are multiples of `side` pixels.  y: [1, M, h, w]"""
    sizes = [length - length % (side // 16) for length in y.shape[2:]]
    top, left = ((length - size) // 2 for length, size in zip(y.shape[2:], sizes, strict=True))
    return y[..., top : top + sizes[0], left : left + sizes[1]]


if __name__ == "__main__":
    tyro.cli(measure)
