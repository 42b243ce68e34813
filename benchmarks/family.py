"""The family: kinds of entropy models behind the transforms of one model, on equal terms.

    F="python benchmarks/family.py train --transforms W.safetensors --data DATA/train --runs runs/family"
    $F --kinds parallel --widths 96 128 192 --steps 2000
    $F --lrs 2e-3 4e-3 8e-3 --steps 1000
    $F --best-of 1000 --steps 8000
    python benchmarks/family.py result --runs runs/family --out data/results/family.json
    python benchmarks/family.py curves --log runs/kinds/curves.json --weights runs/kinds --latents runs/family/latents \
        --batch 18 --lr 2e-3 --device "NVIDIA H100" --out data/results/learning_curves.json

The first line compares widths, the second gives each kind three learning rates, and the third trains each with the one
that was best on held-out latents, so that no kind is at a disadvantage. All see the same latents in the same order, are
told the rate, and learn from the rates of rounded latents. A finished run is not repeated, a stopped one goes on.

The last line is for kinds that `long_run_gpu.py` trained side by side, on the same crops in the same order.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from tqdm import tqdm

from entroformer_lib.files import data_folder
from entroformer_lib.studies.engine import Outcome, complete, training_task
from entroformer_lib.studies.results import save
from entroformer_lib.training.config import TrainConfig
from entroformer_lib.training.latents import write_latents
from entroformer_lib.training.loss import rates_of_latents
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
HELD_OUT = data_folder() / "reference" / "held_out.txt"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.  width: dim of the entropy model"""

    kind: str
    width: int
    lr: float
    seed: int
    steps: int

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
            architecture=tuple(f"{name}={json.dumps(value)}" for name, value in fields.items()),
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
    kinds: tuple[str, ...] = tuple(KINDS),
    widths: tuple[int, ...] = (96,),
    lrs: tuple[float, ...] = (2e-3,),
    seeds: tuple[int, ...] = (0,),
    steps: int = 8000,
    best_of: int | None = None,
) -> None:
    """Trains one after the other; several calls may share the folder and the work.

    Args:
        transforms: The model behind whose g_a, g_s and gains all stand.
        data: Pictures, as for training; the held-out ones are left out.
        runs: Folder of the runs and of the latents.
        kinds: Keys of KINDS.
        widths: Of the entropy models, multiples of 32.
        lrs: Learning rates.
        seeds: Of order, crops and noise.
        steps: Of each run.
        best_of: In place of lrs: of the runs of so many steps the one that is best on the held-out latents.
    """
    write_latents(transforms, data, runs / "latents", crop=LAST_CROP, held_out=str(HELD_OUT))
    chosen = best_rates(table(runs), best_of) if best_of else {}
    wanted = [
        Run(kind, width, lr, seed, steps)
        for seed in seeds
        for width in widths
        for kind in kinds
        for lr in ([chosen[kind, width]] if best_of else lrs)
    ]

    def tell(outcome: Outcome) -> None:
        print(f"{outcome.name}: {table(runs).set_index('run')['score'][outcome.name]:.4f}", flush=True)

    complete([training_task(run.config(transforms, data, runs), progress=True) for run in wanted], runs, tell)


def table(runs: Path) -> pd.DataFrame:
    """The finished runs: run, kind, width, lr, seed, steps, score (mean over the lambdas of ln of the held-out rate),
    held_out (steps and rates at each lambda over the training), seconds, parameters (of the entropy model)."""
    rows = []
    for weights in sorted(runs.glob("*/weights.safetensors")):
        config = json.loads((weights.parent / "config.json").read_text())
        log = [json.loads(line) for line in (weights.parent / "log.jsonl").read_text().splitlines()]
        measured = {r["step"]: {f"{p['lmbda']:g}": p["bpp"] for p in r["held_out"]} for r in log if "held_out" in r}
        kind, width = weights.parent.name.rsplit("-", 4)[:2]
        rows.append(
            {
                "run": weights.parent.name,
                "kind": kind,
                "width": int(width),
                **{name: config[name] for name in ("lr", "seed", "steps")},
                "score": float(np.mean([math.log(bpp) for bpp in measured[config["steps"]].values()])),
                "held_out": [{"step": step, **rates} for step, rates in sorted(measured.items())],
                "seconds": log[-1]["seconds"],
            }
        )
    return pd.DataFrame(rows)


def best_rates(runs: pd.DataFrame, steps: int) -> dict[tuple[str, int], float]:
    """The learning rate with the smallest score, by kind and width, among runs of so many steps."""
    alike = runs[runs["steps"] == steps]
    best = alike.loc[alike.groupby(["kind", "width"])["score"].idxmin()]
    return {(row.kind, row.width): row.lr for row in best.itertuples()}


def result(runs: Path, out: Path) -> None:
    """Writes the finished runs, with what each reaches against parallel of as many steps and the same width and seed.

    Args:
        runs: Folder of the runs.
        out: The result's file.
    """
    found = table(runs)
    parts = [load_model(runs / name / "weights.safetensors", "cpu").entropy_model_parts() for name in found["run"]]
    found["parameters"] = [sum(p.numel() for part in each for p in part.parameters()) for each in parts]
    terms = {
        "batch": 8,
        "crop": CROP,
        "last_crop": LAST_CROP,
        "latents": json.loads((runs / "latents/latents.json").read_text()),
    }
    terms["latents"].pop("held_out", None)
    save(out, {"settings": terms, "rows": found.to_dict("records")})
    print(found[["run", "score", "parameters"]].to_string(index=False, float_format="%.4f"))


def curves(log: Path, weights: Path, latents: Path, out: Path, batch: int, lr: float, device: str) -> None:
    """Writes what kinds that learned side by side needed for their crops over the training, and for held-out latents.

    Args:
        log: curves.json of `long_run_gpu.py`: rates, each the mean since the entry before.
        weights: Folder with KIND.safetensors, for each kind of the log.
        latents: Of the training and held-out photographs, as `train` writes them, behind the transforms of the weights.
        out: The result's file.
        batch: Crops of a step.
        lr: Learning rate, which rises over the first seconds and falls to zero.
        device: What they were trained on.
    """
    entries = json.loads(log.read_text())
    held_out = torch.from_numpy(np.load(latents / "held_out.npy")).float()
    rows = []
    for kind in tqdm(entries[0]["bpp"], unit="model"):
        model = load_model(weights / f"{kind}.safetensors", "cpu")
        parts = model.entropy_model_parts()
        rows.append(
            {
                "kind": kind,
                "parameters": sum(p.numel() for part in parts for p in part.parameters()),
                "curve": [[entry["step"], entry["bpp"][kind]] for entry in entries],
                "held_out": rates_of_latents(model, held_out, model.config.lmbdas),
            }
        )
    settings = {"steps": model.card.get("steps"), "batch": batch, "lr": lr, "crop": CROP, "device": device}
    save(out, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"train": train, "result": result, "curves": curves})
