"""Writes saved results as CSV for other people's plots, and data/results/README.md, which lists everything there.

    python benchmarks/tables.py

Columns carry their units in their names. A test checks that nothing would change, and that every result is described.
"""

import json
import re
from pathlib import Path

import pandas as pd

from entroformer_lib.files import write_bytes
from entroformer_lib.studies import verdicts
from entroformer_lib.studies.results import ablation_rows, kodak, kodak_means, published
from entroformer_lib.views import paper
from entroformer_lib.views.paper_tables import markdown

RESULTS = Path(__file__).parents[1] / "data" / "results"
UNITS = {
    "bpp": "bits_per_pixel",
    "encode_s": "encode_seconds",
    "decode_s": "decode_seconds",
    "optimised_for": "trained_for",
    "published_bpp": "published_bits_per_pixel",
    "published_absolute_bpp": "published_absolute_bits_per_pixel",
    "published_relative_bpp": "published_relative_bits_per_pixel",
    "absolute_bpp": "absolute_bits_per_pixel",
    "relative_bpp": "relative_bits_per_pixel",
    "spread": "standard_deviation_over_seeds_bits_per_pixel",
    "size": "side_pixels",
    "ms": "milliseconds",
    "published_ms": "published_milliseconds",
    "published_mb": "published_megabytes",
}
WHAT = {  # by the beginning of a name, the longest that fits
    "ablation": "Rates of entropy models that differ in one thing, behind the same frozen transforms",
    "ablation-joint": "The same of two models that were trained with their transforms",
    "attention": "What attention and the cost of hiding a position have in common",
    "attention_maps": "The maps of figures 8 to 10",
    "classical": "JPEG, WebP, JPEG 2000 and AVIF on Kodak, by Pillow",
    "cluster": "Seconds of one and of two dask workers",
    "context_cache": "GroupedMixer with and without its context cache",
    "cost": "What training costs: counted work, predicted and measured seconds; GPUs are simulated",
    "explorer_latency": "From a click in the explorer to the new picture",
    "family": "Entropy models behind the same transforms: learning rates that were tried, rates over the training",
    "fuzz": "Damaged and hostile files",
    "kills": "Commands that were killed, and disks that filled up",
    "latency": "Seconds to encode and decode, beside CompressAI's models",
    "latency_growth": "Seconds and memory against the size of the picture",
    "many_files": "Memory over many files in one process",
    "matrix": "Files coded under one configuration of software and decoded under another",
    "model_sizes": "Megabytes and parameters of the entropy models",
    "other_pictures": "The shipped model on other photographs than Kodak's, and on graphics",
    "position_masking": "What one position of the context is worth",
    "recipe": "Choices of training at equal steps",
    "recipe_equal_time": "Choices of training at equal time",
    "picture_k": "What k chosen for each picture saves",
    "picture_size": "Rates of entropy models behind the same transforms, in squares of several sizes",
    "repetition": "How often pictures repeat themselves, and what that would save",
    "shipped_times": "Seconds of the shipped models for one Kodak picture",
    "tradeoff": "Rate against decoding time",
    "training_step": "Seconds of a training step",
    "training_attention": "Milliseconds of a training step with attention in tensor operations and in loops",
    "two_passes": "What two passes cost, by the size of the picture",
    "window_bits": "Files of large photographs with several search windows",
    "window_times": "Seconds to encode and decode large pictures with several search windows",
}
OF_A_MODEL = "Every Kodak picture by this model: whole files on disk, decoded again"


PAGE = """# Saved results

Written by `make figures`. Each JSON file has its `provenance`: the whole command, the revision of the code, the date,
the device and the versions of the libraries. Figures, tables and the numbers on pages are made from these files alone.

{saved}

## The same for other programs

Units stand in the names of the columns. PSNR and MS-SSIM are of RGB; `ms_ssim_db` is -10 log10(1 - MS-SSIM); `setting`
is lambda, or the quality of a classical codec. `published` is the paper's. The data of each figure lie beside it, in
[figures](../../figures).

{csv}
"""


def tables() -> dict[str, pd.DataFrame]:
    """File name -> table."""
    means = pd.concat([kodak_means(), published(optimised_for=("mse", "codec", "ms-ssim"))], ignore_index=True)
    points = means.rename(columns=UNITS).assign(source=means["source"].fillna("measured here"))
    pictures = kodak().rename(columns=UNITS)
    first = [
        "codec",
        "variant",
        "transforms",
        "trained_for",
        "setting",
        "image",
        "bits_per_pixel",
        "psnr_db",
        "ms_ssim",
    ]
    claims = verdicts.table()
    claims["sources"] = claims["sources"].map(" ".join)
    return {
        "rd_points.csv": points,
        "rd_pictures.csv": pictures[[*first, *(c for c in ("encode_seconds", "decode_seconds") if c in pictures)]],
        "ablations.csv": whole_rates(),
        "verdicts.csv": claims,
        **{f"{item.name}.csv": item.data().rename(columns=UNITS) for item in paper.ITEMS if item.table},
    }


def whole_rates() -> pd.DataFrame:
    """Every training of the ablation study once: grids, run, seed, bits_per_pixel of whole pictures, steps."""
    rows = [
        {"grid": row["grid"], "run": row["run"], "seed": row["seed"], "bits_per_pixel": row["bpp"],
         "steps": settings["steps"]}
        for settings, row in ablation_rows()
        if "bpp_middle" in row
    ]  # fmt: skip
    keys = ["run", "seed", "bits_per_pixel", "steps"]
    return pd.DataFrame(rows).groupby(keys, sort=False)["grid"].agg(" ".join).reset_index(name="grids")


def index() -> str:
    """data/results/README.md"""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        record = _provenance(json.loads(path.read_text()))
        command = re.sub(r"^__main__.py", "entroformer", record.get("command", ""))
        command = re.sub(r"^benchmarks/", "", command)
        first = " ".join(command.split()[:2])
        rows.append((f"[{path.stem}]({path.name})", what(path.stem), f"`{first}`", record.get("date", "")[:10]))
    saved = markdown(pd.DataFrame(rows, columns=["file", "what was measured", "made by", "date"]))
    csv = markdown(pd.DataFrame([(f"[{name}]({name})", ", ".join(t)) for name, t in tables().items()],
                                columns=["file", "columns"]))  # fmt: skip
    return PAGE.format(saved=saved, csv=csv)


def what(name: str) -> str:
    """What a result is about.

    Raises:
        KeyError: nobody has said it.
    """
    if name.endswith("-kodak"):
        return OF_A_MODEL
    return WHAT[max((start for start in WHAT if re.match(rf"{start}(-|$)", name)), key=len, default=name)]


def _provenance(saved: dict) -> dict:
    """Of a result, or of the first model in it."""
    models = saved.get("models")
    if isinstance(models, dict):
        first = next(iter(models.values()))
        saved = {"provenance": first.get("provenance", {}), **saved}
    return saved.get("provenance", {})


if __name__ == "__main__":
    for name, table in tables().items():
        write_bytes(RESULTS / name, table.to_csv(index=False, float_format="%.6g").encode())
    write_bytes(RESULTS / "README.md", index().encode())
