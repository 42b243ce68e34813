"""Tables 2 and 6 of the paper, and any table as a picture and as Markdown."""

import re
import textwrap

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from entroformer_lib.studies import verdicts
from entroformer_lib.studies.results import decoding_times, needed, reference
from entroformer_lib.views.style import ONE_COLUMN, TWO_COLUMNS, new_figure, styled

ROWS_OF_TABLE2 = ("bmshj2018-hyperprior", "mbt2018", "base-serial", "base-parallel")  # ours, in the paper's order


def table2_data() -> pd.DataFrame:
    """model, published_ms (V100, entropy model), measured, what (is in it), ms (median over repeats): decoding of a
    picture of 768 x 512 pixels."""
    ours = decoding_times().rename(columns={"model": "measured"})
    ours["ms"] = 1000 * ours.pop("seconds")
    published = pd.DataFrame(reference("paper_tables")["table2_latency_ms"]["rows"])
    published = published.set_axis(["model", "published_ms"], axis=1).assign(measured=ROWS_OF_TABLE2)
    return published.merge(ours, on="measured")


def table6_data() -> pd.DataFrame:
    """model, published_mb, megabytes of the entropy model, parameters."""
    ours = pd.DataFrame(needed("model_sizes")["rows"])[["model", "megabytes", "parameters"]]
    published = pd.DataFrame(reference("paper_tables")["table6_entropy_model_weights_MB"]["rows"])
    published = published.set_axis(["model", "published_mb"], axis=1).replace({"model": {"Entroformer": "base-serial"}})
    data = published.merge(ours, on="model", how="outer")
    order = [*(name for name in published["model"] if name not in set(ours["model"])), *ours["model"]]
    return data.set_index("model").loc[order].reset_index()


# ---- tables in a notebook ----

DIFFERENCE = {  # column of `verdicts.differences`: what stands above it, and how its numbers look
    "seeds": ("seeds", "{:d}"),
    "bpp": ("bits per pixel", "{:.4f}"),
    "saved": ("bits saved, %", "{:+.1f}"),
    "smallest": ("± (smallest that could be told), %", lambda percent: f"{np.ceil(10 * percent) / 10:.1f}"),
    "told": ("told", "{}"),
}


def claims(*items: str) -> Styler:
    """The paper's claims about some figures and tables, ours and the verdict, with no text cut short."""
    found = verdicts.table().query("item in @items")[["says", "published", "ours", "verdict"]]
    names = {"says": "the paper says", "published": "its number", "ours": "here"}
    return _whole(found.rename(columns=names).style)


def differences(grid: str, base: str, names: dict[str, str] | None = None) -> Styler:
    """`verdicts.differences` for a notebook.

    Args:
        names: kinds to show, in words; by default all, by the names of their runs.
    """
    found = verdicts.differences(grid, base)
    if names is not None:
        found = found[found["kind"].isin(names)].assign(kind=found["kind"].map(names))
    found = found.rename(columns={"kind": ""})
    headings = {column: heading for column, (heading, _) in DIFFERENCE.items()}
    forms = dict(DIFFERENCE.values())
    return _whole(found.rename(columns=headings).style.format(forms, na_rep="–"))


def _whole(style: Styler) -> Styler:
    sides = [dict(selector="th, td", props="text-align: left; vertical-align: top")]
    return style.hide(axis="index").set_table_styles(sides)


# ---- tables as pictures and text ----


HEADINGS = {  # column: what stands above it
    "published_bpp": "paper, bits per pixel",
    "published_saving_percent": "paper, saved, %",
    "bpp": "here, bits per pixel",
    "saving_percent": "here, saved, %",
    "published_ms": "paper, NVIDIA V100, milliseconds",
    "measured": "measured here",
    "ms": "here, two CPU cores, milliseconds",
    "size": "side of a square, pixels",
    "published_absolute_bpp": "paper, absolute, bits per pixel",
    "published_relative_bpp": "paper, relative, bits per pixel",
    "absolute_bpp": "here, absolute, bits per pixel",
    "relative_bpp": "here, relative, bits per pixel",
    "published_mb": "paper, M, read as MiB",
    "megabytes": "here, MiB of float32",
    "parameters": "here, parameters",
}


def in_words(data: pd.DataFrame) -> pd.DataFrame:
    """A table as a reader wants it: every cell a text, units in the headings, a dash for what is not known. Behind a
    rate stands the standard deviation over the seeds, where there are several.
    """
    if "position" in data:
        whole = (data["model"] + ", " + data["position"]).str.removesuffix(", -")
        data = data.drop(columns="position").assign(model=whole)
    if "what" in data:
        data = data.drop(columns="what").assign(measured=data["measured"] + ", " + data["what"])
    spread = data.get("spread", pd.Series(dtype=float)).map(" ± {:.4f}".format, na_action="ignore").fillna("")
    data = data.drop(columns="spread", errors="ignore")
    words = data.apply(lambda column: column.map(_form(column.name).format, na_action="ignore")).fillna("–")
    if len(spread):
        words["bpp"] += spread
    return words.rename(columns=HEADINGS)


def _form(column: str) -> str:
    if column in ("model", "position", "context", "measured", "what"):
        return "{}"
    if column in ("seeds", "size", "parameters"):
        return "{:,.0f}"
    return "{:,.1f}" if column.endswith(("percent", "ms", "mb", "megabytes")) else "{:.4f}"


def markdown(data: pd.DataFrame) -> str:
    """A table of texts in Markdown."""
    return data.to_markdown(index=False, disable_numparse=True)


@styled()
def figure(data: pd.DataFrame) -> Figure:
    """A table as a picture, lines above and below as in print. Long texts take several lines."""
    words = in_words(data)
    texts = [re.fullmatch(r"[-–\d,. ±]+", value) is None for value in words.iloc[-1]]
    widest = [(22 if sum(texts) == 1 else 18) if text else 9 for text in texts]
    rows = [
        [textwrap.fill(cell, width, break_long_words=False) for cell, width in zip(row, widest, strict=True)]
        for row in (list(words), *words.to_numpy())
    ]
    lines = [max(cell.count("\n") + 1 for cell in row) for row in rows]
    widths = [max(len(line) for row in rows for line in row[i].split("\n")) + 2.5 for i in range(len(words.columns))]
    width = ONE_COLUMN if sum(widths) < 80 else 0.75 * TWO_COLUMNS
    drawn, ax = new_figure(width, 0.11 * sum(lines) + 0.08 * len(lines))
    ax.set_axis_off()
    table = ax.table(rows, colWidths=[w / sum(widths) for w in widths], bbox=(0, 0, 1, 1))
    table.auto_set_font_size(False)
    table.set_fontsize(6)
    for (row, column), cell in table.get_celld().items():
        cell.visible_edges = "TB" if row == 0 else "B" if row == len(words) else ""
        cell.set_height(0.11 * lines[row] + 0.08)  # as a share of the whole
        cell.get_text().set_ha("left" if texts[column] else "right")
        cell.PAD = 0.06
    return drawn
