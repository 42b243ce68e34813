"""Sizes of entropy models: Table 6.

python benchmarks/model_sizes.py

Counted from the architecture alone. The paper prints "M"; for its own model that fits 2^20 bytes, in float32.
"""

from collections.abc import Iterable

import pandas as pd
import tyro

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.studies.results import result_path
from entroformer_lib.studies.results import save as save_result

NAMES = tuple(
    f"{size}-{variant}"
    for size in ("base", "study", "tiny")
    for variant in ("serial", "parallel", "hyperprior", "context")
)


def run(names: Iterable[str] = NAMES) -> pd.DataFrame:
    """One row per model: model, parameters (of the entropy model), megabytes (2^20 bytes, in float32), all_parameters
    (with g_a and g_s)."""
    rows = []
    for name in names:
        model = Entroformer(name)
        count = sum(p.numel() for part in model.entropy_model_parts() for p in part.parameters())
        everything = sum(p.numel() for p in model.parameters())
        rows.append({"model": name, "parameters": count, "megabytes": 4 * count / 2**20, "all_parameters": everything})
    return pd.DataFrame(rows)


def save() -> None:
    """Writes data/results/model_sizes.json."""
    save_result(result_path("model_sizes"), {"rows": run().to_dict("records")})


if __name__ == "__main__":
    tyro.cli(save)
