"""What it brings to choose k for each picture (the paper's second open question), and what it costs.

    python benchmarks/picture_k.py --kodak KODAK --out data/results/picture_k.json

The encoder tries several k and takes the one with the fewest bits (`entroformer compress --k 16 32 64`). A file has a
byte more where that is not the k of the model's config. Here the bits of y are estimated with every k, at several
lambdas. `saved` compares the choice with the one k that is best for all pictures together, and counts the bytes.
"""

import itertools
from pathlib import Path

import pandas as pd
import torch
import tyro
from tqdm import tqdm

from entroformer_lib.codec import codec
from entroformer_lib.entroformer import searching
from entroformer_lib.studies.rate_distortion import pictures_of
from entroformer_lib.studies.results import save
from entroformer_lib.weights.zoo import load_model

KS = (8, 16, 32, 64, 128, 0)  # 0: all keys
LMBDAS = (0.00035, 0.0017, 0.007, 0.029, 0.12)
MODELS = ("blocks-serial", "blocks-parallel")


def saved(rows: pd.DataFrame, ks: tuple[int, ...] = (16, 32, 64)) -> pd.DataFrame:
    """By how many bits a choice among some k needs less than the best of them for all pictures.

    rows: model, lmbda, image, k, own (the k of the model's config), bits  ->  model, lmbda, fixed (the best single k),
    percent (negative: saved), others (pictures that take another k)
    """
    found = []
    for (model, lmbda), part in rows[rows["k"].isin(ks)].groupby(["model", "lmbda"], sort=False):
        part = part.assign(bits=part["bits"] + 8 * (part["k"] != part["own"]))
        bits = part.pivot_table("bits", "image", "k")
        fixed, chosen = bits.sum().idxmin(), bits.min(axis=1).sum()
        others = int((bits.idxmin(axis=1) != fixed).sum())
        found.append((model, lmbda, int(fixed), 100 * (chosen / bits[fixed].sum() - 1), others))
    return pd.DataFrame(found, columns=["model", "lmbda", "fixed", "percent", "others"])


def measure(
    kodak: str,
    out: str,
    models: tuple[str, ...] = MODELS,
    limit: int | None = None,
    lmbdas: tuple[float, ...] = LMBDAS,
    ks: tuple[int, ...] = KS,
) -> None:
    """Estimates the bits of y and saves a row for each model, lambda, picture and k.

    Args:
        kodak: Folder of pictures.
        out: The JSON file.
        models: Serial and parallel models of variable rate.
        limit: So many pictures; by default all.
        lmbdas: Rates.
        ks: Numbers of keys, 0 for all.
    """
    pictures, rows = pictures_of(kodak, limit), []
    for name in models:
        model = load_model(name, device="cpu")
        with torch.inference_mode():
            latents = {image: model.g_a(codec.to_tensor(picture, model)) for image, picture in pictures}
            for lmbda, (image, y) in tqdm(list(itertools.product(lmbdas, latents.items())), desc=name, unit="picture"):
                level = model.gain.level_of(lmbda)
                for k in ks:
                    with searching(model, None, k):
                        bits = float(model.estimated_bits(model.scaled(y, level), level)["y"].sum())
                    own = model.config.top_k or 0
                    rows.append({"model": name, "lmbda": lmbda, "image": image, "k": k, "own": own, "bits": bits})
    table = saved(pd.DataFrame(rows), tuple(k for k in ks if k in (16, 32, 64)) or ks)
    print(table.to_string(index=False, float_format="%.3f"))
    save(Path(out), {"pictures": len(pictures), "choice": table.to_dict("records"), "rows": rows})


if __name__ == "__main__":
    tyro.cli(measure)
