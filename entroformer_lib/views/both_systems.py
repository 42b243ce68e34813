"""Entroformer and GroupedMixer side by side: what each published model of one family takes in bits and in seconds.

    python -m entroformer_lib.views.both_systems  # the table of the README, in Markdown

Models of a family share their transforms, so quality is the same at each lambda and a rate alone says who is better.
"""

import json

import numpy as np
import pandas as pd

from entroformer_lib.errors import DataError
from entroformer_lib.views import paper_data
from entroformer_lib.views.paper_figures import markdown
from entroformer_lib.views.tradeoff import NAMES, pending, tradeoff_points

FAMILY = tuple(f"tiny-{variant}" for variant in ("hyperprior", "cnn", "parallel", "groupedmixer", "serial"))
SAME_QUALITY = 0.02  # dB


def side_by_side(names: tuple[str, ...] = FAMILY, reference: str = "tiny-parallel") -> pd.DataFrame | None:
    """The published models of one family: name, variant, percent (rate against the reference, the mean over their
    lambdas), least and most percent, decode_s and entropy_model_s (None where not measured), parameters (of the entropy
    model), source (file).  None where the reference is not published.

    Raises:
        DataError: other lambdas than those of the reference, or another quality at one of them: other transforms.
    """
    base = paper_data.result(f"{reference}-kodak")
    if base is None:
        return None
    saved = paper_data.result("tradeoff")
    times = tradeoff_points(saved).query("family == 'shipped'").set_index("model") if saved else pd.DataFrame()
    rows = []
    for name in names:
        result = paper_data.result(f"{name}-kodak")
        if result is None:
            continue
        percent = _percent_at_each_lambda(name, result["mean"], reference, base["mean"])
        found = times.loc[name] if name in times.index else {}
        keys = ("decode_s", "entropy_model_s", "parameters")
        rows.append(
            {
                "model": name, "variant": name.partition("-")[2], "lambdas": len(percent),
                "percent": np.mean(percent), "least": min(percent), "most": max(percent),
                **{key: None if found.get(key) is None else float(found[key]) for key in keys},
                "source": f"data/results/{name}-kodak.json",
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _percent_at_each_lambda(name: str, means: dict, reference: str, theirs: dict) -> list[float]:
    means, theirs = ({"": mean} if "bpp" in mean else mean for mean in (means, theirs))
    if set(means) != set(theirs):
        raise DataError(f"{name} and {reference} were measured at different lambdas, so they cannot be compared.")
    for lmbda, mean in means.items():
        if abs(mean["psnr_db"] - theirs[lmbda]["psnr_db"]) > SAME_QUALITY:
            raise DataError(
                f"{name} has {mean['psnr_db']:.2f} dB where {reference} has {theirs[lmbda]['psnr_db']:.2f} dB "
                f"(lambda {lmbda}): other transforms, so their rates cannot be compared."
            )
    return [100 * (mean["bpp"] / theirs[lmbda]["bpp"] - 1) for lmbda, mean in means.items()]


def side_by_side_markdown(table: pd.DataFrame) -> str:
    """`side_by_side` as the README shows it."""
    headings = [
        "model", "entropy model", "rate against parallel, equal PSNR", "lowest to highest over the lambdas",
        "seconds to decode", "of these in context and parameters", "parameters of the entropy model", "source",
    ]  # fmt: skip
    rows = []
    for row in table.astype(object).where(table.notna(), None).to_dict("records"):
        seconds = ["–" if row[key] is None else f"{row[key]:.2f}" for key in ("decode_s", "entropy_model_s")]
        parameters = "–" if row["parameters"] is None else f"{row['parameters'] / 1e6:.2f} million"
        name, one = row["source"].rpartition("/")[2], row["least"] == row["most"]
        span = "–" if one else f"{row['least']:+.1f}% to {row['most']:+.1f}%"
        rows.append(
            [row["model"], NAMES.get(row["variant"], row["variant"]), f"{row['percent']:+.1f}%", span, *seconds]
            + [parameters, f"[{name}]({row['source']})"]
        )
    return markdown(headings, rows)


def main() -> None:
    """Prints the table."""
    table = side_by_side()
    print(pending("tiny-parallel-kodak") if table is None else side_by_side_markdown(table))
    saved = paper_data.result("tradeoff")
    if saved is not None:
        print(json.dumps({"settings": saved["settings"], "terms": saved["terms"]}, indent=1))


if __name__ == "__main__":
    main()
