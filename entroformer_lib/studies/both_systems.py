"""Entroformer and GroupedMixer side by side: what each published model takes in bits, in seconds and in weights.

    python -m entroformer_lib.studies.both_systems  # the table of the README, in Markdown

Models behind the same transforms give the same pictures at each lambda, so a rate alone says who is better
(`studies/same_transforms.py`). Everything is read from saved results; no model runs.
"""

import json

import pandas as pd

from entroformer_lib.errors import StudyError
from entroformer_lib.files import data_folder
from entroformer_lib.studies.same_transforms import WORDS, overall, saved_rates
from entroformer_lib.studies.tradeoff import SAME_QUALITY, SHIPPED, points

NONE = "No models behind the same transforms as a parallel one are published yet, so there is no table here."


def side_by_side(reference: str = "parallel") -> pd.DataFrame | None:
    """A row for each published model behind the transforms of tiny-rates, None where the reference is not among them.

    Returns:
        variant, model, percent (rate against the reference, the mean over their lambdas), least and most percent,
        decode_s and entropy_model_s (of tradeoff.json; nan where not measured), parameters (of the entropy model),
        source (file).

    Raises:
        StudyError: a model that was measured at other lambdas, or has another quality at one of them.
    """
    rates = saved_rates()
    if reference not in set(rates["variant"]):
        return None
    _check(rates, reference)
    path = data_folder() / "results" / "tradeoff.json"
    columns = ["decode_s", "entropy_model_s", "parameters"]
    measured = pd.DataFrame(columns=["model", *columns])
    if path.is_file():
        every = points(json.loads(path.read_text()))
        measured = every[every["family"] == SHIPPED][["model", *columns]]
    table = overall(rates, reference).merge(measured, on="model", how="left")
    return table.assign(source="data/results/" + table["model"] + "-kodak.json")


def _check(rates: pd.DataFrame, reference: str) -> None:
    quality = rates.groupby(["model", "variant", "lmbda"])["psnr_db"].mean()
    theirs = quality.xs(reference, level="variant").droplevel("model")
    for (model, _), part in quality.groupby(["model", "variant"]):
        mine = part.droplevel(["model", "variant"])
        if set(mine.index) != set(theirs.index):
            raise StudyError(f"{model} was measured at other lambdas than the {reference} model.")
        if (mine - theirs).abs().max() > SAME_QUALITY:
            raise StudyError(f"{model} has another quality than the {reference} model: other transforms.")


def in_markdown(table: pd.DataFrame) -> str:
    """`side_by_side` as the README shows it."""
    headings = [
        "entropy model", "rate against parallel, equal PSNR", "lowest to highest over the lambdas",
        "seconds to decode", "of these in context and parameters", "parameters, million", "source",
    ]  # fmt: skip
    lines = [headings, ["---"] * len(headings)]
    for row in table.itertuples():
        numbers = (row.decode_s, row.entropy_model_s, row.parameters / 1e6)
        lines.append(
            [WORDS[row.variant], f"{row.percent:+.1f}%", f"{row.least:+.1f}% to {row.most:+.1f}%"]
            + ["–" if pd.isna(number) else f"{number:.2f}" for number in numbers]
            + [f"[{row.model}]({row.source})"]
        )
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main() -> None:
    """Prints the table."""
    table = side_by_side()
    print(NONE if table is None else in_markdown(table))


if __name__ == "__main__":
    main()
