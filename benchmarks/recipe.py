"""Which transforms and which recipe learn most in equal time (docs/training.md tells the result).

    python benchmarks/recipe.py times  --data DATA/train --runs runs/recipe
    python benchmarks/recipe.py train  --data DATA/train --runs runs/recipe --rows base "other seed"
    python benchmarks/recipe.py result --runs runs/recipe --out data/results/recipe_equal_time.json

Every row changes one thing about `base`. All have equal time: so many minutes of one core, divided by the time of a
quiet step of the row, which `times` measures once. What else runs on the machine while they train changes nothing. They
are compared on the held-out pictures, by rounded latents and their likelihoods. The runs may be spread over days: the
result keeps the rows and the times of earlier ones.
"""

import dataclasses
import json
import math
import statistics
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from entroformer_lib.entroformer import build_model
from entroformer_lib.fields import parse_fields
from entroformer_lib.files import data_folder, write_bytes
from entroformer_lib.memory import keep_freed_memory
from entroformer_lib.models.context import NO_GAPS
from entroformer_lib.models.transforms import DCT_SCALE
from entroformer_lib.studies.engine import complete, training_task
from entroformer_lib.studies.results import provenance
from entroformer_lib.training.chance import random_levels, uniform_noise
from entroformer_lib.training.config import TrainConfig
from entroformer_lib.training.data import PreloadedCrops, read_names
from entroformer_lib.training.loss import TrainingStep
from entroformer_lib.training.optimizer import build_optimizer, quick_type
from entroformer_lib.weights.zoo import save_weights

OUT = data_folder() / "results" / "recipe_equal_time.json"
LMBDAS = (0.00035, 0.0008, 0.0017, 0.0035, 0.007, 0.014, 0.029, 0.06, 0.12)
# What is quick on this processor: it changes times, not what is learned, and a row has the steps of the saved times
PRECISION = str(quick_type(torch.device("cpu"))).removeprefix("torch.")
BLOCKS = {"transforms": "blocks", "stages": [[8, 192, 4]], "linear_path": "dct", "M": 320, "rate_aware": True}
GDN = {**BLOCKS, "transforms": "gdn", "stages": [], "N": 64}


@dataclasses.dataclass(frozen=True)
class Row:
    """A run: fields of the architecture over BLOCKS, fields of TrainConfig, minutes of one core, what the linear path
    begins as."""

    architecture: dict = dataclasses.field(default_factory=dict)
    training: dict = dataclasses.field(default_factory=dict)
    minutes: float = 30
    basis: Literal["dct", "pca", "haar"] = "dct"


SHORT = 15
ROWS: dict[str, Row] = {
    "base": Row(),
    "other seed": Row(training=dict(seed=1)),
    # The network beside the linear path
    "256 channels, 6 blocks": Row(dict(stages=[[8, 256, 6]])),
    "128 channels, 4 blocks": Row(dict(stages=[[8, 128, 4]])),
    "at 1/8 and 1/16": Row(dict(stages=[[8, 192, 3], [16, 256, 3]])),
    "at 1/4 and 1/8": Row(dict(stages=[[4, 48, 2], [8, 192, 4]])),
    "at 1/4, 1/8 and 1/16": Row(dict(stages=[[4, 64, 2], [8, 160, 4], [16, 256, 3]])),
    "5x5 and GDN, 64 channels": Row(GDN),
    "5x5 and GDN, 96 channels": Row({**GDN, "N": 96}),
    "blocks without linear path": Row(dict(linear_path="none")),
    "5x5 and GDN without linear path": Row({**GDN, "linear_path": "none"}),
    "M = 256": Row(dict(M=256)),
    "M = 384": Row(dict(M=384)),
    "entropy model 128 wide": Row(dict(dim=128, heads=4)),
    # The rest, in half of the time, against a base of that time
    "short base": Row(minutes=SHORT),
    "short, other seed": Row(training=dict(seed=1), minutes=SHORT),
    "begins as PCA": Row(minutes=SHORT, basis="pca"),
    "begins as Haar wavelets": Row(minutes=SHORT, basis="haar"),
    "learning rate 1e-3": Row(training=dict(lr=1e-3), minutes=SHORT),
    "learning rate 4e-3": Row(training=dict(lr=4e-3), minutes=SHORT),
    "Adam, 1e-3": Row(training=dict(optimizer="adam", lr=1e-3), minutes=SHORT),
    "8 crops": Row(training=dict(batch=8), minutes=SHORT),
    "32 crops": Row(training=dict(batch=32), minutes=SHORT),
    "8 crops of 192": Row(training=dict(batch=8, crop=192), minutes=SHORT),
    "last fifth in crops of 256": Row(training=dict(last_crop=256), minutes=SHORT),
    "mean of the weights": Row(training=dict(ema=0.999), minutes=SHORT),
    "one crop in ten drawn or recoloured": Row(training=dict(graphics=0.05, permuted=0.05), minutes=SHORT),
    "entropy model not told the rate": Row(dict(rate_aware=False), minutes=SHORT),
    "h_a sees rounded latents": Row(dict(hyper_input="rounded"), minutes=SHORT),
}


def folder_of(name: str, runs: Path) -> Path:
    """The folder of a row's run."""
    return runs / name.replace(" ", "-").replace(",", "").replace("/", "_")


def config_of(name: str, data: str, runs: Path, steps: int) -> TrainConfig:
    """What a row trains."""
    row = ROWS[name]
    fields = {**BLOCKS, **row.architecture}
    values = dict(
        data=data,
        out=str(folder_of(name, runs)),
        model="tiny-parallel",
        architecture=tuple(f"{field}={json.dumps(value)}" for field, value in fields.items()),
        lmbdas=LMBDAS,
        steps=steps,
        batch=16,
        crop=128,
        optimizer="muon",
        lr=2e-3,
        schedule="linear",
        precision=PRECISION,
        held_out=str(data_folder() / "reference" / "held_out.txt"),
        accelerator="cpu",
        devices=1,
    )
    if row.basis != "dct":
        values |= dict(init=str(runs / f"{row.basis}.safetensors"), architecture=(), lmbdas=())
    return TrainConfig(**{**values, **row.training})


# ---- the time of a step --------------------------------------------------------------------------------------------


def times(data: str, runs: Path, rows: tuple[str, ...] = tuple(ROWS), steps: int = 10) -> None:
    """Measures the CPU time of steps of each row on one thread and keeps milliseconds in RUNS/times.json.

    A machine drifts, so the base is timed before each row, and the row counts in proportion to it.

    Args:
        data: Pictures to train on.
        runs: Folder of the runs.
        rows: Which rows.
        steps: How many steps; their median counts. A row with larger crops last is timed for both sizes.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    path = runs / "times.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    pictures = PreloadedCrops(data, 256)
    for name in ("base", *(name for name in rows if name != "base" and costs_more(name))):
        before, now = (mean_step_ms(config_of(n, data, runs, 1000), pictures, steps) for n in ("base", name))
        known.setdefault("base", before)
        if name != "base":
            known[name] = known["base"] * now / before
        print(f"{known[name]:6.0f} ms  {name}", flush=True)
        write_bytes(path, json.dumps(known, indent=1).encode())


def costs_more(name: str) -> bool:
    """Whether steps of a row cost something else than those of the base; the others get as many steps as the base."""
    row = ROWS[name]
    free = {"lr", "seed", "graphics", "permuted"}
    return bool(row.architecture or set(row.training) - free)


def mean_step_ms(c: TrainConfig, pictures: PreloadedCrops, steps: int) -> float:
    """Milliseconds of a step, over small and large crops."""
    shares = [(0.8, c.crop), (0.2, c.last_crop)] if c.last_crop else [(1.0, c.crop)]
    return sum(share * step_ms(c, pictures, crop, steps) for share, crop in shares)


def step_ms(c: TrainConfig, pictures: PreloadedCrops, crop: int, steps: int) -> float:
    """Milliseconds of one step, with its data."""
    torch.manual_seed(0)
    model = build_model(c.model, lmbdas=LMBDAS, **parse_fields(c.architecture))
    for part in (model.g_a, model.g_s):
        part.to(memory_format=torch.channels_last)
    goal = TrainingStep(model, bf16=PRECISION == "bfloat16").train()
    optimizer = build_optimizer(model, c.optimizer, c.lr)
    shapes = {"y": (model.config.M, crop // 16, crop // 16), "z": (model.config.Z, crop // 64, crop // 64)}
    taken = []
    for i in range(steps + 3):  # the first ones allocate and choose kernels
        start = time.process_time()
        samples = range(i * c.batch, (i + 1) * c.batch)
        x = next(pictures.batches([samples], crop)).contiguous(memory_format=torch.channels_last)
        level = torch.tensor(random_levels(samples, len(LMBDAS), 0))
        goal(x, torch.tensor(LMBDAS)[level], uniform_noise(samples, shapes, 0), NO_GAPS, level)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        taken.append(1e3 * (time.process_time() - start))
    return statistics.median(taken[3:])


# ---- other beginnings of the linear path ---------------------------------------------------------------------------


def write_basis(kind: str, data: str, path: Path) -> None:
    """An untrained model whose linear path is another orthonormal basis of the blocks, of as many vectors."""
    torch.manual_seed(0)
    fields = {name: tuple(map(tuple, v)) if name == "stages" else v for name, v in BLOCKS.items()}
    model = build_model("tiny-parallel", lmbdas=LMBDAS, **fields)
    left_out = read_names(data_folder() / "reference" / "held_out.txt")
    pictures = PreloadedCrops(data, 256, left_out=left_out)
    x = torch.cat(list(pictures.batches([range(i, i + 100) for i in range(0, 600, 100)], 256)))
    blocks = torch.nn.functional.pixel_unshuffle(2 * x - 1, 16).movedim(1, -1).reshape(-1, 768).double()
    if kind == "pca":
        basis = torch.linalg.eigh(blocks.T.cov())[1].flip(1).T
    else:  # those of largest variance
        basis = haar()
        basis = basis[(blocks @ basis.T).var(0).sort(descending=True).indices]
    basis = basis[: model.config.M].view(-1, 3, 16, 16).float()
    with torch.no_grad():
        model.g_a.linear.weight.copy_(DCT_SCALE * basis)
        model.g_s.linear.weight.copy_(basis / DCT_SCALE)
    save_weights(model, path, {"origin": f"untrained, linear path begins as {kind}"})


def haar() -> Tensor:
    """Four stages of 2x2 Haar wavelets on three colour components: orthonormal, [768, 768]."""
    low = torch.eye(16, dtype=torch.float64)
    vectors, steps = [], torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    rows = {}  # along one side, by stage: low pass and high pass
    for stage in range(4):
        pairs = low.view(-1, 2, 16)
        rows[stage] = [torch.einsum("p,npk->nk", s, pairs) for s in steps]
        low = rows[stage][0]
    for stage in range(4):
        low, high = rows[stage]
        for a, b in ((low, high), (high, low), (high, high), *(((low, low),) if stage == 3 else ())):
            vectors.append(torch.einsum("ni,mj->nmij", a, b).reshape(-1, 256))
    plane = torch.cat(vectors)  # [256, 256]
    colours = torch.tensor([[1, 1, 1], [1, 0, -1], [-1, 2, -1]], dtype=torch.float64)
    colours = colours / colours.norm(dim=1, keepdim=True)
    return torch.einsum("kc,np->kncp", colours, plane).reshape(768, 768)


# ---- runs and result -----------------------------------------------------------------------------------------------


def train_rows(data: str, runs: Path, rows: tuple[str, ...], out: Path = OUT) -> None:
    """Trains rows one after the other; needs their times. A finished run is not repeated, a stopped one goes on.

    Args:
        data: Pictures to train on.
        runs: Folder of the runs.
        rows: Which rows, in this order.
        out: An earlier result; new rows get as many steps per minute as its base got.
    """
    times = step_times(runs, saved_result(out))
    for name in rows:
        row = ROWS[name]
        if row.basis != "dct" and not (runs / f"{row.basis}.safetensors").exists():
            write_basis(row.basis, data, runs / f"{row.basis}.safetensors")
        begun = folder_of(name, runs) / "config.json"
        steps = round(6e4 * row.minutes / times.get(name, times["base"]))
        steps = json.loads(begun.read_text())["steps"] if begun.exists() else steps
        complete([training_task(config_of(name, data, runs, steps))], runs)
        print(name, score(last_measured(folder_of(name, runs))), flush=True)


def saved_result(out: Path) -> dict:
    """An earlier result of this comparison; an empty one where there is none."""
    return json.loads(out.read_text()) if out.is_file() else {"rows": [], "step_ms": {}, "earlier": []}


def step_times(runs: Path, saved: dict) -> dict[str, float]:
    """Milliseconds of a step of each row that was timed here or is in an earlier result.

    The machine drifts from day to day, so times of today count in proportion to the base of the earlier result.
    """
    path = runs / "times.json"
    times = json.loads(path.read_text()) if path.exists() else {}
    if "base" in saved["step_ms"] and "base" in times:
        times = {name: ms * saved["step_ms"]["base"] / times["base"] for name, ms in times.items()}
    return times | saved["step_ms"]


def last_measured(out: Path) -> list[dict]:
    """The held-out pictures at every lambda at the end of a run."""
    rows = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [row["held_out"] for row in rows if "held_out" in row][-1]


def score(points: list[dict]) -> float:
    """Mean over the lambdas of ln(R + lambda D)."""
    return float(np.mean([math.log(point["rd_loss"]) for point in points]))


def result(runs: Path, out: Path = OUT) -> None:
    """Writes what the finished rows reach. `percent`: R + lambda D, mean over the lambdas, against the base of as many
    minutes. Rows of an earlier result stay where there is no finished run of them here.

    Args:
        runs: Folder of the runs.
        out: The result's file.
    """
    saved = saved_result(out)
    times, rows = step_times(runs, saved), {row["row"]: row for row in saved["rows"]}
    for name, row in ROWS.items():
        folder = folder_of(name, runs)
        if (folder / "weights.safetensors").exists():
            config, step_ms = json.loads((folder / "config.json").read_text()), times.get(name, times["base"])
            how = dict(steps=config["steps"], precision=config["precision"], points=last_measured(folder))
            rows[name] = dict(row=name, minutes=row.minutes, step_ms=step_ms, **how)
    rows = [rows[name] for name in ROWS if name in rows]
    bases = {row["minutes"]: score(row["points"]) for row in rows if row["row"] in ("base", "short base")}
    for row in rows:
        row["percent"] = 100 * (math.exp(score(row["points"]) - bases[row["minutes"]]) - 1)
        print(f"{row['percent']:+6.2f}%  {row['minutes']:.0f} min  {row['step_ms']:5.0f} ms  {row['row']}")
    settings = {name: dataclasses.asdict(row) for name, row in ROWS.items()}
    earlier = saved["earlier"] + ([saved["provenance"]] if "provenance" in saved else [])
    record = {"step_ms": times, "settings": settings, "earlier": earlier, "provenance": provenance(seed=0)}
    write_bytes(out, json.dumps({"rows": rows, **record}, indent=1).encode())


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"times": times, "train": train_rows, "result": result})
