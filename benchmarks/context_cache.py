"""What GroupedMixer's context cache saves: the entropy model's coding steps with and without it.

    python benchmarks/context_cache.py

Without it every group runs all earlier slots again: G (G + 1) / 2 passes instead of G, so (G + 1) / 2 times the work.
Measured on the coder's own steps, from the hyperprior's feature to all latents; weights are random, and latents too.
"""

import contextlib
import time

import pandas as pd
import torch
import tyro

from entroformer_lib.entroformer import build_model
from entroformer_lib.exact.arithmetic import Exact
from entroformer_lib.memory import keep_freed_memory
from entroformer_lib.studies.results import result_path
from entroformer_lib.studies.results import save as save_result

MODELS = ("base-groupedmixer", "base-groupedmixer-fast", "study-groupedmixer", "tiny-groupedmixer")


@torch.inference_mode()
def run(names: tuple[str, ...] = MODELS, width: int = 768, height: int = 512, repeats: int = 3) -> pd.DataFrame:
    """One row per model: model, groups, cached_s and uncached_s (the quickest of the repeats), ratio, equal (every mean
    and scale has the same bits)."""
    return pd.DataFrame([_measured(name, height // 16, width // 16, repeats) for name in names])


def _measured(name: str, h: int, w: int, repeats: int) -> dict:
    torch.manual_seed(0)
    model = build_model(name).eval()
    c, mixer, exact = model.config, model.context_model, Exact()
    G = len(mixer.order)
    latents = torch.randn(h * w, c.M).mul(2).round()
    hyper, found, seconds = torch.randn(1, c.dim, h, w), {}, {}
    for cached in (True, False):
        for _ in range(1 + repeats if cached else repeats):  # the first compiles
            found[cached] = seen = []
            start = time.perf_counter()
            with exact:
                steps = mixer.steps(h, w, hyper, cached)
                channels, sites, *parameters = next(steps)
                with contextlib.suppress(StopIteration):
                    while True:
                        seen.append(torch.stack(parameters))
                        channels, sites, *parameters = steps.send(latents[sites][:, channels])
            seconds[cached] = min(seconds.get(cached, float("inf")), time.perf_counter() - start)
    equal = all(torch.equal(a, b) for a, b in zip(found[True], found[False], strict=True))
    print(f"{name}: {seconds[True]:.2f} s with the cache, {seconds[False]:.2f} s without", flush=True)
    ratio = seconds[False] / seconds[True]
    return {
        "model": name, "groups": G, "cached_s": seconds[True], "uncached_s": seconds[False], "ratio": ratio,
        "equal": equal,
    }  # fmt: skip


def save(models: tuple[str, ...] = MODELS, repeats: int = 3) -> None:
    """Measures and writes data/results/context_cache.json.

    Args:
        models: Names of GroupedMixers.
        repeats: How often each way is timed; the quickest counts.
    """
    keep_freed_memory()
    table = run(models, repeats=repeats)
    save_result(result_path("context_cache"), {"rows": table.to_dict("records")}, threads=torch.get_num_threads())
    print(table.round(2).to_string(index=False))


if __name__ == "__main__":
    tyro.cli(save)
