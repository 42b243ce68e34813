"""How long coding takes, and where the time goes: Table 2, split into stages, beside CompressAI's models.

    python -m entroformer_lib.studies.latency --out data/results/latency.json

Weights are random; our models' latents are spread as those of a trained model, so that the coder has something to do.
All rows of a table come from one run on one machine; compare ratios, not seconds.
CompressAI's models have plain random weights: their coder's time hangs on the number of symbols, not on their values.
"""

import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from compressai.zoo import bmshj2018_hyperprior, mbt2018

from entroformer_lib.coding import codec
from entroformer_lib.datasets import sample_picture
from entroformer_lib.files import write_bytes
from entroformer_lib.models.clock import stage_times
from entroformer_lib.models.entroformer import Entroformer, build_model
from entroformer_lib.studies.provenance import provenance

STAGES = ("transforms", "hyper", "context", "parameters", "entropy coding")
OURS = ("base-parallel", "base-serial", "study-parallel", "study-serial")
COMPRESSAI = {"bmshj2018-hyperprior": bmshj2018_hyperprior, "mbt2018": mbt2018}
QUALITY = 8


def lively(model: Entroformer) -> Entroformer:
    """An untrained model with latents of a spread as in a trained one, so that the coder has something to do."""
    with torch.no_grad():
        model.g_a[-1].weight.mul_(40)
    return model.eval()


def measure(model: Entroformer, picture, direction: str) -> dict:
    """Seconds of one encode or decode, from picture to bytes or back, and of each stage."""
    data = codec.encode(model, picture) if direction == "decode" else None
    with stage_times() as stages:
        start = time.perf_counter()
        if data is None:
            codec.encode(model, picture)
        else:
            codec.decode(data, model)
        seconds = time.perf_counter() - start
    row = {"seconds": seconds, **{f"{name.replace(' ', '_')}_s": stages.get(name, 0.0) for name in STAGES}}
    row["other_s"] = seconds - sum(stages.values())
    return row


def measure_compressai(model, picture, direction: str) -> dict:
    """Seconds of CompressAI's compress or decompress with the transforms in it."""
    x = codec.pad(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255, 64)
    with torch.inference_mode():
        coded = model.compress(x) if direction == "decode" else None
        start = time.perf_counter()
        if coded is None:
            model.compress(x)
        else:
            model.decompress(**coded)
        return {"seconds": time.perf_counter() - start}


def run(names: Iterable[str], picture, repeats: int = 3) -> pd.DataFrame:
    """One row per model, direction and repeat: model, direction, width, height, seconds and, for ours, the stages."""
    rows = []
    for name in names:
        torch.manual_seed(0)
        if name in COMPRESSAI:
            model = COMPRESSAI[name](QUALITY, pretrained=False).eval()
            model.update(force=True)
            one = measure_compressai
        else:
            model, one = lively(build_model(name)), measure
        for direction in ("encode", "decode"):
            for repeat in range(repeats):
                row = one(model, picture, direction)
                rows.append({"model": name, "direction": direction, "repeat": repeat, **row})
                rows[-1].update(width=picture.width, height=picture.height)
                print(f"{name:22} {direction} {row['seconds']:8.3f} s", flush=True)
    return pd.DataFrame(rows)


def main(
    out: Path, models: tuple[str, ...] = (*OURS, *COMPRESSAI), repeats: int = 3, width: int = 768, height: int = 512
):
    """Times models on one picture and saves rows with their provenance.

    Args:
        out: The JSON file.
        models: Names for `build_model`, and of CompressAI's bmshj2018-hyperprior and mbt2018 (quality 8).
        repeats: How often each is timed.
        width: Width of the picture in pixels; it is scikit-image's astronaut, enlarged.
        height: Its height.
    """
    picture = sample_picture("astronaut").resize((width, height))
    table = run(models, picture, repeats)
    rows = [{name: v for name, v in row.items() if v == v} for row in table.to_dict("records")]  # NaN is no JSON
    result = {"rows": rows, "provenance": {**provenance(), "threads": torch.get_num_threads()}}
    write_bytes(out, json.dumps(result, indent=1).encode())
    print(table.groupby(["model", "direction"]).seconds.median().unstack().round(3).to_string())


if __name__ == "__main__":
    tyro.cli(main)
