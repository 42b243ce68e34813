"""Sizes of entropy models: Table 6.

python -m entroformer_lib.studies.model_sizes

Counted from the architecture alone. The paper prints "M"; for its own model that fits 2^20 bytes, in float32.
"""

import json
from collections.abc import Iterable

import pandas as pd
import tyro

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.files import data_folder, write_bytes
from entroformer_lib.studies.results import provenance

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
    result = {"rows": run().to_dict("records"), "provenance": provenance()}
    write_bytes(data_folder() / "results" / "model_sizes.json", json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    tyro.cli(save)
