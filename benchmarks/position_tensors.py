"""A training step of `base` on 384-pixel crops: positions looked up among few vectors, against [n, n, d] tensors.

python benchmarks/position_tensors.py --out data/results/position_tensors.json

The plain way writes equation 4 out: every pair of sites gets its position vector, n^2 of them, and each query is
multiplied with its own n. Every row runs in a process of its own and adds one change. Pictures are scikit-image's.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from entroformer_lib.datasets import sample_picture
from entroformer_lib.entroformer import build_model
from entroformer_lib.files import write_bytes
from entroformer_lib.memory import keep_freed_memory
from entroformer_lib.models.position import RelativePosition
from entroformer_lib.studies.results import provenance
from entroformer_lib.training.loss import TrainingStep
from entroformer_lib.training.optimizer import build_optimizer

ROWS = ("[n, n, d] tensors", "looked up", "bfloat16, freed memory kept")


def plain_position(relative: RelativePosition, q: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """What `RelativePosition.forward` gives, by way of the vector of every pair.

    q: [B, heads, q, d], queries: [q, 2], keys: [n, 2]  ->  [B, heads, q, n]
    """
    vectors = relative.table()[relative.buckets(queries, keys)]  # [q, n, d]
    return torch.einsum("bhqd,qnd->bhqn", q, vectors.to(q.dtype))


def measure(row: str, model_name: str, batch: int, crop: int, steps: int) -> dict:
    """Images per second of one row, after a step that is not counted."""
    if row == ROWS[0]:
        RelativePosition.forward = plain_position
    if row == ROWS[2]:
        keep_freed_memory()
    torch.manual_seed(0)
    model = build_model(model_name)
    step = TrainingStep(model, bf16=row == ROWS[2]).train()
    optimizer = build_optimizer(model, "adam", 1e-4)
    names = ("astronaut", "coffee", "chelsea", "rocket")
    crops = [np.asarray(sample_picture(n).resize((crop, crop))).transpose(2, 0, 1) for n in names]
    x = torch.from_numpy(np.stack([crops[i % len(crops)] for i in range(batch)])).float() / 255
    for i in range(steps + 1):
        if i == 1:
            start = time.perf_counter()
        step(x, 0.013)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    return {"row": row, "images_per_s": steps * batch / seconds, "step_ms": 1e3 * seconds / steps}


def main(
    out: Path | None = None,
    model: str = "base-parallel",
    batch: int = 1,
    crop: int = 384,
    steps: int = 3,
    row: str | None = None,
) -> None:
    """Measures all rows, prints them and writes them with their provenance."""
    if row is not None:
        print(json.dumps(measure(row, model, batch, crop, steps)))
        return
    rows = []
    for name in ROWS:
        done = subprocess.run([sys.executable, *sys.argv, "--row", name], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        ratio = rows[-1]["images_per_s"] / rows[0]["images_per_s"]
        print(f"{name:30} {rows[-1]['images_per_s']:7.3f} images a second, {ratio:.2f} times the first", flush=True)
    settings = {"model": model, "batch": batch, "crop": crop, "steps": steps, "threads": torch.get_num_threads()}
    if out is not None:
        result = {"rows": rows, "settings": settings, "provenance": provenance(seed=0)}
        write_bytes(out, json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    tyro.cli(main)
