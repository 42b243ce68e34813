"""What coding in two passes costs, part by part: a parallel model beside a serial one behind the same transforms.

    python benchmarks/two_passes.py --kodak KODAK --out data/results/two_passes.json

A parallel model gains on its second half, which sees neighbours on all sides, and pays twice: for its first half, which
sees none, and for the hyperprior z that has to speak in their place. The serial model's latents are counted on the same
two halves. The smaller the picture, the more of a serial model's latents stand at an edge with little before
them, so the price is also measured on squares. Rates are estimated, as in `latent_rates.py`.
"""

import itertools
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from entroformer_lib.codec import codec
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import WeightsError
from entroformer_lib.models.context import first_slice
from entroformer_lib.studies.rate_distortion import pictures_of
from entroformer_lib.studies.results import save
from entroformer_lib.training.latents import transforms_digest
from entroformer_lib.weights.zoo import load_model

LMBDAS = (0.00035, 0.0017, 0.007, 0.029, 0.12)
SQUARES = (128, 256)  # pixels; and the whole picture
SHIPPED = ("equal-serial", "equal-parallel")


@torch.inference_mode()
def parts(model: Entroformer, y: Tensor, level: float, side: int | None = None) -> dict[str, float]:
    """Bits of z, of the half that a parallel model codes first, and of the other half.

    y: [1, M, h, w] of g_a; side: of the squares that y is cut into, in pixels, each coded alone; None leaves it whole
    ->  {"first": bits, "second": bits, "z": bits}
    """
    y = model.scaled(y, level)
    step = max(y.shape) if side is None else side // 16
    found = dict.fromkeys(("first", "second", "z"), 0.0)
    for square in (part for row in y.split(step, dim=2) for part in row.split(step, dim=3)):
        bits = model.estimated_bits(square, level)
        first = first_slice(*bits["y"].shape[-2:])
        found["first"] += float(bits["y"][:, first].sum())
        found["second"] += float(bits["y"][:, ~first].sum())
        found["z"] += float(bits["z"].sum()) if "z" in bits else 0.0
    return found


def compare(
    kodak: str,
    out: str,
    models: tuple[str, str] = SHIPPED,
    others: tuple[str, ...] = (),
    limit: int | None = None,
    lmbdas: tuple[float, ...] = LMBDAS,
) -> None:
    """Measures pairs of models and saves a row for each model, lambda, side and part.

    Args:
        kodak: Folder of pictures.
        out: The JSON file.
        models: A serial and a parallel one behind the same transforms.
        others: More such pairs, on whole pictures only: LABEL=SERIAL=PARALLEL, each a name or a file.
        limit: So many pictures; by default all.
        lmbdas: Rates at which they are compared.
    """
    pairs = [("", *models, (*SQUARES, None)), *((*pair.split("="), (None,)) for pair in others)]
    pictures, rows = pictures_of(kodak, limit), []
    for label, *names, sides in pairs:
        both = [load_model(name, device="cpu") for name in names]
        if transforms_digest(both[0]) != transforms_digest(both[1]):
            raise WeightsError(f"{names[0]} and {names[1]} have other transforms.")
        with torch.inference_mode():
            latents = [both[0].g_a(codec.to_tensor(picture, both[0])) for _, picture in pictures]
        pixels = sum(256 * y[0, 0].numel() for y in latents)
        work = itertools.product(zip(("serial", "parallel"), both, strict=True), lmbdas, sides)
        for (variant, model), lmbda, side in tqdm(list(work), desc=label or "shipped", unit="row"):
            each = [parts(model, y, model.gain.level_of(lmbda), side) for y in latents]
            mean = {part: sum(one[part] for one in each) / pixels for part in each[0]}
            rows.append({"pair": label, "variant": variant, "lmbda": lmbda, "side": side, **mean})
    save(Path(out), {"models": list(models), "pictures": len(pictures), "rows": rows})


if __name__ == "__main__":
    tyro.cli(compare)
