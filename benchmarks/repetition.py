"""How much a picture repeats itself, as its latents see it: to explain which pictures gain from attention.

    python benchmarks/repetition.py --kodak pictures/kodak

A masked 5x5 convolution sees twelve latents before the one it predicts; attention sees all before it. So attention can
only save where something alike lies farther away than those twelve. For every latent vector (each channel centred over
the picture) we look for the most similar one before it, by the cosine of their angle: among the convolution's twelve
(`near`), and among all others (`far`). `beyond` is how much better the best far one is, 0 where it is not. Latents are
weighed by their squared length, because long ones cost the bits.

No entropy model runs.
"""

from pathlib import Path

import pandas as pd
import torch
import tyro
from torch import Tensor

from entroformer_lib.codec import codec
from entroformer_lib.models.position import grid_sites
from entroformer_lib.studies.rate_distortion import pictures_to_test
from entroformer_lib.studies.results import result_path
from entroformer_lib.studies.results import save as save_result
from entroformer_lib.weights.zoo import load_model

NEAR = 2  # rows and columns that a masked 5x5 convolution reaches


def repetition(y_hat: Tensor) -> dict[str, float]:
    """Of one picture's latents.  y_hat: [M, h, w]  ->  near, far, beyond, each in [-1, 1]

    The first row and the first latent behind it have no far latents before them and are left out.
    """
    _, h, w = y_hat.shape
    v = (y_hat - y_hat.mean((1, 2), keepdim=True)).flatten(1).T  # [n, M]
    length = v.norm(dim=1)
    cosine = (v @ v.T) / (length[:, None] * length).clamp(min=1e-9)  # [n, n]
    sites = grid_sites(h, w, y_hat.device)
    offset = (sites[None] - sites[:, None]).abs().amax(-1)  # [n, n], largest of rows and columns
    before = torch.ones_like(cosine).tril(-1).bool()
    near = cosine.masked_fill(~(before & (offset <= NEAR)), -1).amax(1)
    far = cosine.masked_fill(~(before & (offset > NEAR)), -1).amax(1)
    counted = (before & (offset > NEAR)).any(1) & (before & (offset <= NEAR)).any(1) & (sites[:, 0] > 0)
    weight = length.square() * counted
    measures = {"near": near, "far": far, "beyond": (far - near).clamp(min=0)}
    return {name: float((m * weight).sum() / weight.sum()) for name, m in measures.items()}


@torch.inference_mode()
def run(model, paths: list[Path]) -> pd.DataFrame:
    """One row per picture: image, near, far, beyond."""
    rows = []
    for path in paths:
        y_hat, _ = model.latents(codec.to_tensor(codec.open_picture(path), model))
        rows.append({"image": path.stem, **repetition(y_hat[0])})
    return pd.DataFrame(rows)


def save(kodak: Path, transforms: str = "blocks-parallel@0.0035") -> None:
    """Measures and writes data/results/repetition.json.

    Args:
        kodak: Folder of the 24 Kodak pictures.
        transforms: Model whose latents are looked at, with its lambda.
    """
    model = load_model(transforms, "cpu")
    table = run(model, pictures_to_test(kodak))
    result = {"images": table.to_dict("records"), "transforms": transforms}
    save_result(result_path("repetition"), result, model)
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    tyro.cli(save)
