"""Images per second of a training step, from a plain loop to ours, one change at a time.

python benchmarks/training_step.py --data DATA/train --out data/results/training_step.json

Every row runs in a process of its own, because memory settings cannot be taken back. The plain loop reads and decodes
its pictures anew for each step, computes in float32 and lets the C library return every freed tensor to the system.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import tyro

from entroformer_lib.entroformer import build_model
from entroformer_lib.files import write_bytes
from entroformer_lib.memory import keep_freed_memory
from entroformer_lib.studies.results import provenance
from entroformer_lib.training.data import PreloadedCrops, StreamedCrops
from entroformer_lib.training.loss import TrainingStep
from entroformer_lib.training.optimizer import build_optimizer

ROWS = ("plain", "pictures in memory", "bfloat16", "freed memory kept", "channels last", "Muon", "compiled")


def measure(row: str, data: str, model_name: str, batch: int, crop: int, steps: int) -> dict:
    """One row: everything up to and including that change."""
    has = {name: i <= ROWS.index(row) for i, name in enumerate(ROWS)}
    if has["freed memory kept"]:
        keep_freed_memory()
    torch.manual_seed(0)
    model = build_model(model_name)
    layout = torch.channels_last if has["channels last"] else torch.contiguous_format
    for part in (model.g_a, model.g_s):
        part.to(memory_format=layout)
    if has["compiled"]:  # the transforms; takes a C++ compiler and a minute
        model.g_a.compile(), model.g_s.compile()
    step = TrainingStep(model, bf16=has["bfloat16"]).train()
    optimizer = build_optimizer(model, "muon" if has["Muon"] else "adam", 1e-3)
    crops = PreloadedCrops(data, crop) if has["pictures in memory"] else StreamedCrops(data, crop, workers=0)
    batches = crops.batches(range(i * batch, (i + 1) * batch) for i in range(steps + 3))
    shares = dict.fromkeys(("data", "forward and backward", "optimizer"), 0.0)
    for i in range(steps + 3):
        times = [time.perf_counter()]
        x = next(batches).contiguous(memory_format=layout)
        times.append(time.perf_counter())
        step(x, 0.013)["loss"].backward()
        times.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
        if i >= 3:  # the first ones allocate and choose kernels
            for name, a, b in zip(shares, times, times[1:], strict=False):
                shares[name] += b - a
    total = sum(shares.values())
    result = {"row": row, "images_per_s": steps * batch / total, "step_ms": 1e3 * total / steps}
    result |= {f"{name}_ms": 1e3 * seconds / steps for name, seconds in shares.items()}
    if row == "Muon":
        result |= parts(model, x)
    return result


def parts(model, x: torch.Tensor, repeats: int = 5) -> dict:
    """Milliseconds of g_a, g_s and the entropy model alone, forward and backward."""
    y = torch.randn(x.size(0), model.config.M, x.size(2) // 16, x.size(3) // 16, requires_grad=True)
    runs = {
        "g_a": lambda: model.g_a(x).float().sum(),
        "entropy_model": lambda: sum(p.log().sum() for p in model.likelihoods(y)[0].values()),
        "g_s": lambda: model.g_s(y).float().sum(),
    }
    result = {}
    for name, run in runs.items():
        for i in range(repeats + 2):
            if i == 2:
                start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                out = run()
            out.backward()
        result[f"{name}_ms"] = 1e3 * (time.perf_counter() - start) / repeats
    return result


def main(
    data: str,
    out: Path | None = None,
    model: str = "tiny-parallel",
    batch: int = 16,
    crop: int = 128,
    steps: int = 10,
    row: str | None = None,
) -> None:
    """Measures all rows, prints them and writes them with their provenance.

    Args:
        data: Training pictures.
        out: JSON file for the result.
        model: What is trained.
        batch: Crops a step.
        crop: Side of a crop in pixels.
        steps: Steps to time, after three that are not counted.
        row: Measure this one alone, in this process.
    """
    if row is not None:
        print(json.dumps(measure(row, data, model, batch, crop, steps)))
        return
    rows = []
    for name in ROWS:
        done = subprocess.run([sys.executable, *sys.argv, "--row", name], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        ratio = rows[-1]["images_per_s"] / rows[0]["images_per_s"]
        print(f"{name:20} {rows[-1]['images_per_s']:7.1f} images a second, {ratio:.2f} times plain", flush=True)
    settings = {"model": model, "batch": batch, "crop": crop, "steps": steps, "threads": torch.get_num_threads()}
    if out is not None:
        result = {"rows": rows, "settings": settings, "provenance": provenance(seed=0)}
        write_bytes(out, json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    tyro.cli(main)
