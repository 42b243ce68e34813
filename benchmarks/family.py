"""The family: kinds of entropy models behind the transforms of one model, on equal terms.

    F="python benchmarks/family.py --transforms blocks-parallel --data DATA/train --runs runs/family \\
        --out data/results/family.json"
    $F --kinds parallel --widths 96 128 192 --steps 2000
    $F --lrs 2e-3 4e-3 8e-3 --steps 1000
    $F --best-of 1000 --steps 8000

The first line compares widths, the second gives each kind three learning rates, and the third trains each with the one
that was best on held-out latents, so that no kind is at a disadvantage. Where the best is at the end of those tried,
one beyond is to be tried first. With --init each goes on from weights that it had before. All see the same latents in
the same order, are told the rate, and learn from the rates of rounded latents. A finished run is not repeated, a
stopped one goes on. What a run reached stands in the result as soon as it is finished, and counts from there, even
where its folder is gone.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from filelock import FileLock

from entroformer_lib.errors import StudyError
from entroformer_lib.files import data_folder, read_json
from entroformer_lib.studies.engine import Outcome, complete, training_task
from entroformer_lib.studies.results import save
from entroformer_lib.training.config import TrainConfig
from entroformer_lib.training.latents import write_latents
from entroformer_lib.weights.zoo import load_model

# kind -> variant of `named_config`, and fields of its config
KINDS: dict[str, tuple[str, dict]] = {
    "parallel": ("parallel", {}),
    "parallel-9": ("parallel", {"context_layers": 9}),  # decodes in about the time of GroupedMixer with 12 groups
    "serial": ("serial", {}),
    "groupedmixer": ("groupedmixer", {"groups": [3, 2, 2]}),
    "groupedmixer-32": ("groupedmixer", {"groups": [8, 2, 2]}),
    "cnn": ("cnn", {}),
    "minnen": ("minnen", {}),
    "hyperprior": ("hyperprior", {}),
    "hyperprior-cnn": ("hyperprior-cnn", {}),
    "context": ("context", {}),
    "context-cnn": ("context-cnn", {}),
}
CROP, LAST_CROP = 256, 320  # pixels: 16x16 latents, and 20x20 over the last third
COLUMNS = ["run", "kind", "width", "lr", "seed", "steps", "score", "held_out", "seconds", "device", "parameters"]
HELD_OUT = data_folder() / "reference" / "held_out.txt"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.  width: dim of the entropy model"""

    kind: str
    width: int
    lr: float
    seed: int
    steps: int
    init: str | None = None

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.width}-lr{self.lr:.7f}-seed{self.seed}-{self.steps}"

    def config(self, transforms: str, data: str, runs: Path) -> TrainConfig:
        variant, fields = KINDS[self.kind]
        fields = {**fields, "rate_aware": True, "dim": self.width, "heads": self.width // 32, "Z": self.width // 2}
        return TrainConfig(
            data=data,
            out=str(runs / self.name),
            model=f"tiny-{variant}",
            architecture=() if self.init else tuple(f"{name}={json.dumps(value)}" for name, value in fields.items()),
            init=self.init,
            transforms=transforms,
            latents=str(runs / "latents"),
            rounded=True,
            steps=self.steps,
            batch=8,
            crop=CROP,
            last_crop=LAST_CROP,
            last_share=1 / 3,
            optimizer="muon",
            lr=self.lr,
            schedule="linear",
            precision="auto",
            seed=self.seed,
            held_out_every=max(250, self.steps // 20),
            accelerator="cpu",
            devices=1,
        )


def train(
    transforms: str,
    data: str,
    runs: Path,
    out: Path,
    kinds: tuple[str, ...] = tuple(KINDS),
    widths: tuple[int, ...] = (96,),
    lrs: tuple[float, ...] = (2e-3,),
    seeds: tuple[int, ...] = (0,),
    steps: int = 8000,
    best_of: int | None = None,
    init: str | None = None,
) -> None:
    """Trains one after the other; several calls may share the folder and the work.

    Args:
        transforms: The model behind whose g_a, g_s and gains all stand.
        data: Pictures, as for training; the held-out ones are left out.
        runs: Folder of the runs and of the latents.
        out: The result's file. A run that it has is not repeated.
        kinds: Keys of KINDS.
        widths: Of the entropy models, multiples of 32.
        lrs: Learning rates.
        seeds: Of order, crops and noise.
        steps: Of each run.
        best_of: In place of lrs: of the runs of so many steps the one that is best on the held-out latents.
        init: Weights to go on from, a name or a file, in which {kind} stands for the kind: equal-{kind}.
    """
    write_latents(transforms, data, runs / "latents", crop=LAST_CROP, held_out=str(HELD_OUT))
    known = write_result(runs, out)
    chosen = best_rates(known, best_of) if best_of else {}
    wanted = [
        Run(kind, width, lr, seed, steps, init and init.format(kind=kind))
        for seed in seeds
        for width in widths
        for kind in kinds
        for lr in ([chosen[kind, width]] if best_of else lrs)
    ]

    def tell(outcome: Outcome) -> None:
        scores = write_result(runs, out).set_index("run")["score"]
        print(f"{outcome.name}: {scores[outcome.name]:.4f}", flush=True)

    missing = [run for run in wanted if run.name not in set(known["run"])]
    complete([training_task(run.config(transforms, data, runs), progress=True) for run in missing], runs, tell)


def write_result(runs: Path, out: Path) -> pd.DataFrame:
    """Adds the finished runs of a folder to the result.

    Args:
        runs: Folder of the runs.
        out: The result's file.

    Returns:
        A row for each run of the result: run, kind, width, lr, seed, steps, score (mean over the lambdas of ln of the
        held-out rate), held_out (steps and rates at each lambda over the training), seconds, device, parameters (of the
        entropy model).

    Raises:
        StudyError: the result is about other latents.
    """
    settings = {"batch": 8, "crop": CROP, "last_crop": LAST_CROP, "latents": read_json(runs / "latents/latents.json")}
    for name in ("held_out", "data", "sources"):
        settings["latents"].pop(name, None)
    with FileLock(runs / "result.lock"):
        saved = read_json(out) if out.exists() else {"settings": settings, "rows": []}
        if saved["settings"] != settings:
            raise StudyError(f"The runs in {out} learned from other latents than those in {runs / 'latents'}.")
        there = {row["run"] for row in saved["rows"]}
        finished = [path.parent for path in sorted(runs.glob("*/weights.json"))]
        new = [row_of(folder) for folder in finished if folder.name not in there]
        if new:
            saved["rows"] = sorted(saved["rows"] + new, key=lambda row: row["run"])
            save(out, saved)
    return pd.DataFrame(saved["rows"], columns=COLUMNS)


def row_of(folder: Path) -> dict:
    """What a finished run reached."""
    config = read_json(folder / "config.json")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    measured = {r["step"]: {f"{p['lmbda']:g}": p["bpp"] for p in r["held_out"]} for r in log if "held_out" in r}
    parts = load_model(folder / "weights.safetensors", "cpu").entropy_model_parts()
    kind, width = folder.name.rsplit("-", 4)[:2]
    return {
        "run": folder.name,
        "kind": kind,
        "width": int(width),
        **{name: config[name] for name in ("lr", "seed", "steps")},
        "score": float(np.mean([math.log(bpp) for bpp in measured[config["steps"]].values()])),
        "held_out": [{"step": step, **rates} for step, rates in sorted(measured.items())],
        "seconds": log[-1]["seconds"],
        "device": read_json(folder / "weights.json")["answer"]["device"],
        "parameters": sum(p.numel() for part in parts for p in part.parameters()),
    }


def best_rates(runs: pd.DataFrame, steps: int) -> dict[tuple[str, int], float]:
    """The learning rate with the smallest score, by kind and width, among runs of so many steps.

    Raises:
        StudyError: it is the smallest or the largest of those that a kind had.
    """
    found = {}
    for (kind, width), tried in runs[runs["steps"] == steps].groupby(["kind", "width"]):
        best = found[kind, width] = tried.loc[tried["score"].idxmin(), "lr"]
        if best in (tried["lr"].min(), tried["lr"].max()):
            raise StudyError(f"The best learning rate of {kind}, {best:g}, is at the end of those tried; try more.")
    return found


if __name__ == "__main__":
    tyro.cli(train)
