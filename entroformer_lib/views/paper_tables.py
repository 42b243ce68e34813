"""Tables 2 and 6 of the paper, and any table as a picture and as Markdown."""

import pandas as pd
from matplotlib.figure import Figure

from entroformer_lib.studies.results import load, reference
from entroformer_lib.views.style import TWO_COLUMNS, new_figure, styled

ROWS_OF_TABLE2 = ("bmshj2018-hyperprior", "mbt2018", "base-serial", "base-parallel")  # ours, in the paper's order


def table2_data() -> pd.DataFrame | None:
    """model, published_ms (V100, entropy model), measured, what (is in it), ms (median over repeats): decoding of a
    picture of 768 x 512 pixels."""
    saved = load("latency")
    if saved is None:
        return None
    rows = pd.DataFrame(saved["rows"]).query("direction == 'decode' and width == 768 and height == 512")
    rows = rows.reindex(columns=["model", "seconds", "transforms_s"])
    rows["what"] = rows["transforms_s"].isna().map({True: "whole decoding", False: "decoding without transforms"})
    rows["ms"] = 1000 * (rows["seconds"] - rows["transforms_s"].fillna(0))
    medians = rows.groupby(["model", "what"])["ms"].median().reset_index().rename(columns={"model": "measured"})
    published = pd.DataFrame(reference("paper_tables")["table2_latency_ms"]["rows"])
    published = published.set_axis(["model", "published_ms"], axis=1).assign(measured=ROWS_OF_TABLE2)
    return published.merge(medians, on="measured")


def table6_data() -> pd.DataFrame | None:
    """model, published_mb, megabytes of the entropy model, parameters."""
    saved = load("model_sizes")
    if saved is None:
        return None
    published = pd.DataFrame(reference("paper_tables")["table6_entropy_model_weights_MB"]["rows"])
    published = published.set_axis(["model", "published_mb"], axis=1).replace({"model": {"Entroformer": "base-serial"}})
    ours = pd.DataFrame(saved["rows"])[["model", "megabytes", "parameters"]]
    data = published.merge(ours, on="model", how="outer")
    order = [*(name for name in published["model"] if name not in set(ours["model"])), *ours["model"]]
    return data.set_index("model").loc[order].reset_index()


# ---- tables as pictures and text ----


def in_words(data: pd.DataFrame) -> pd.DataFrame:
    """A table as a reader wants it: every cell a text, headings without underscores, a dash for what is not known."""
    words = data.apply(lambda column: column.map(_form(column.name).format, na_action="ignore")).fillna("–")
    return words.rename(columns=lambda name: name.replace("_", " "))


def _form(column: str) -> str:
    if column in ("model", "position", "context", "measured", "what"):
        return "{}"
    if column in ("seeds", "size", "parameters"):
        return "{:,.0f}"
    return "{:,.1f}" if column.endswith(("percent", "ms", "mb", "megabytes")) else "{:,.4f}"


def markdown(data: pd.DataFrame) -> str:
    """A table of texts in Markdown."""
    return data.to_markdown(index=False, disable_numparse=True)


@styled()
def figure(data: pd.DataFrame) -> Figure:
    """A table as a picture, lines above and below as in print."""
    words = in_words(data)
    drawn, ax = new_figure(TWO_COLUMNS, 0.22 * (len(words) + 1) + 0.15)
    ax.set_axis_off()
    widths = [max(map(len, [name, *words[name]])) + 2 for name in words]
    cells = [list(words), *words.to_numpy()]
    table = ax.table(cells, loc="center", colWidths=[w / sum(widths) for w in widths], bbox=(0, 0, 1, 1))
    table.auto_set_font_size(False)
    table.set_fontsize(6.5)
    for (row, column), cell in table.get_celld().items():
        cell.visible_edges = "TB" if row == 0 else "B" if row == len(words) else ""
        cell.get_text().set_ha("left" if isinstance(data.iloc[0, column], str) else "right")
        cell.PAD = 0.03
        cell.set_text_props(weight="bold" if row == 0 else "normal")
    return drawn
