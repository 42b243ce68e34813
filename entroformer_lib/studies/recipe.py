"""What helps a short training: equal runs that differ in one choice each (docs/training.md tells the result).

python -m entroformer_lib.studies.recipe --train-on DATA/train/cid22-00.tar --held-out DATA/train/photos-01.tar \\
    --runs runs/recipe

All runs have 96 latents per block (`tiny` has 192 by now), the same pictures, steps, batch and seed unless a row says
otherwise. They are compared on pictures that no run has seen, with rounding instead of noise. A finished run is not
repeated.
"""

import itertools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from entroformer_lib.files import data_folder, write_bytes
from entroformer_lib.models.entroformer import Entroformer
from entroformer_lib.models.zoo import load_model
from entroformer_lib.studies.provenance import provenance
from entroformer_lib.training.config import TrainConfig
from entroformer_lib.training.data import pictures_in
from entroformer_lib.training.loop import train

RATES = (0.001, 0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.05, 0.08)
BASE = dict(
    architecture=("M=96",),
    lmbda=0.013,
    optimizer="muon",
    lr=2e-3,
    schedule="linear",
    precision="bfloat16",
    batch=8,
    crop=128,
)
CHOICES: dict[str, dict] = {
    "base": {},
    "other seed": dict(seed=1),
    "Adam": dict(optimizer="adam", lr=1e-3),
    "Adam, steps of the paper": dict(optimizer="adam", lr=1e-3, schedule="steps"),
    "steps of the paper": dict(schedule="steps"),
    "mean of the weights": dict(ema=0.99),
    "random mask first": dict(pretrain=0.25),
    "high rate first": dict(pretrain=0.4, pretrain_lmbda=0.1, pretrain_mask=0.0),
    "larger crops last": dict(last_crop=192),
    "half the learning rate": dict(lr=1e-3),
    "lmbda 0.0035": dict(lmbda=0.0035),
    "lmbda 0.025": dict(lmbda=0.025),
    "eight rates": dict(lmbdas=RATES),
    "eight rates, not evenly": dict(lmbdas=RATES, even_rates=False),
}
POINTS = (0.0035, 0.013, 0.025)
EXTRA_POINTS = {"eight rates": POINTS, "eight rates, not evenly": POINTS}  # where a run is measured, if not at its own


def compare(
    train_on: str,
    held_out: str,
    runs: Path,
    steps: int = 1000,
    model: str = "tiny-parallel",
    count: int = 48,
    choices: tuple[str, ...] = tuple(CHOICES),
):
    """Trains and measures every choice.

    Args:
        train_on: Pictures to train on.
        held_out: Pictures to compare on, `count` of them, scaled to 256 pixels on the shorter side.
        runs: Folder for the runs.
        steps: Steps of each run.
        model: What is trained.
        count: Pictures to compare on.
        choices: Which of them to run.
    """
    pictures = held_out_pictures(held_out, count)
    rows = []
    for name in choices:
        changes = CHOICES[name]
        out = runs / name.replace(" ", "-").replace(",", "")
        config = TrainConfig(data=train_on, out=str(out), model=model, steps=steps, **{**BASE, **changes})
        if not (out / "weights.safetensors").exists():
            train(config, progress=False)
        trained = load_model(out / "weights.safetensors")
        for lmbda in EXTRA_POINTS.get(name, (config.lmbda,)):
            if config.lmbdas:
                trained.level = trained.gain.level_of(lmbda)
            measured = rate_and_distortion(trained, pictures, lmbda)
            rows.append({"choice": name, "lmbda": lmbda, **measured, "steps": trained.card["training"]["steps"]})
            print(rows[-1], flush=True)
    settings = {"base": BASE, "changes": CHOICES, "steps": steps, "model": model, "held_out": count}
    result = {"rows": rows, "settings": settings, "provenance": provenance(seed=0)}
    write_bytes(data_folder() / "results" / "recipe.json", json.dumps(result, indent=1).encode())


def held_out_pictures(source: str, count: int, side: int = 256) -> Tensor:
    """The first pictures of a source, scaled down to `side` on the shorter side and cut to the middle square.

    ->  [count, 3, side, side] in [0, 1]
    """
    squares = []
    for picture in itertools.islice(pictures_in(source), count):
        x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255  # [1, 3, H, W]
        height, width = (max(side, round(n * side / min(x.shape[2:]))) for n in x.shape[2:])
        x = F.interpolate(x, (height, width), mode="bilinear", antialias=True)
        top, left = (height - side) // 2, (width - side) // 2
        squares.append(x[:, :, top : top + side, left : left + side])
    return torch.cat(squares).clamp(0, 1)


@torch.inference_mode()
def rate_and_distortion(model: Entroformer, pictures: Tensor, lmbda: float) -> dict:
    """Over pictures [n, 3, H, W]: mean rd_loss = bpp + lmbda 255^2 mse, mean estimated bpp, PSNR of the mean error."""
    model.eval()
    bits, errors = [], []
    for x in pictures.split(8):
        out = model(x)
        bits += [sum(-p.log2().flatten(1).sum(1) for p in out["likelihoods"].values())]
        errors += [(out["x_hat"].clamp(0, 1) - x).square().flatten(1).mean(1)]
    bpp = float(torch.cat(bits).mean()) / pictures[0, 0].numel()
    mse = float(torch.cat(errors).mean())
    psnr = float(-10 * torch.log10(torch.tensor(mse)))
    return {"rd_loss": bpp + lmbda * 255**2 * mse, "bpp": bpp, "psnr_db": psnr}


if __name__ == "__main__":
    tyro.cli(compare)
