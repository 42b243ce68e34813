"""What a step of training an entropy model alone takes on a CPU, with attention in tensor operations and in the loops
of `sparse_attention.py`.

python benchmarks/training_attention.py --out data/results/training_attention.json
"""

import time
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import torch
import tyro

from entroformer_lib.entroformer import build_model
from entroformer_lib.memory import keep_freed_memory
from entroformer_lib.sparse_attention import SparseAttention
from entroformer_lib.studies.results import records, save
from entroformer_lib.training.loss import RateStep
from entroformer_lib.training.optimizer import build_optimizer

WAYS = {"tensors_ms": nullcontext, "loops_ms": SparseAttention}


def measure(context: str, side: int, steps: int, batch: int) -> dict:
    """Milliseconds of a whole step on random latents, optimizer included; both ways in turns, the least of each."""
    torch.manual_seed(0)
    model = build_model(f"tiny-{context}")
    optimizer, step = build_optimizer(model, "muon", 1e-3), RateStep(model, rounded=True).train()
    y, least = 2 * torch.randn(batch, model.config.M, side, side), dict.fromkeys(WAYS, float("inf"))
    for i in range(steps + 2):
        for name, mode in WAYS.items():
            begin = time.perf_counter()
            with mode():
                loss = step(y)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if i > 1:  # the first ones compile
                least[name] = min(least[name], 1e3 * (time.perf_counter() - begin))
    return {"context": context, "latents": f"{side}x{side}", **least}


def main(out: Path | None = None, steps: int = 8, batch: int = 8) -> None:
    """Measures parallel and serial models on crops of 256 and 320 pixels, and prints the table.

    Args:
        out: JSON file for the result.
        steps: Steps to time of each, after two that are not counted.
        batch: Crops a step.
    """
    keep_freed_memory()
    rows = pd.DataFrame([measure(c, side, steps, batch) for c in ("parallel", "serial") for side in (16, 20)])
    print(rows.round(0).to_string(index=False))
    if out is not None:
        settings = {"size": "tiny", "batch": batch, "steps": steps, "threads": torch.get_num_threads()}
        save(out, {"rows": records(rows, 1), "settings": settings}, seed=0)


if __name__ == "__main__":
    tyro.cli(main)
