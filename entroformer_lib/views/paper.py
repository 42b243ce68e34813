"""Every figure and table of the paper for which there are saved results, and one of ours: one command, no model runs.

    python -m entroformer_lib.views.paper

Reads data/results and data/reference, writes figures/: each item as PNG and SVG, the data it draws as CSV, tables also
as Markdown, and README.md, which gives each claim of the paper its verdict. An item whose results do not exist is left
out and said to be. A result that appears later is drawn without new code.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import tyro
from matplotlib.figure import Figure

from entroformer_lib.files import data_folder, write_bytes
from entroformer_lib.studies import verdicts
from entroformer_lib.studies.results import AUTHORS, NoResult
from entroformer_lib.views import ablation_figures as ablations
from entroformer_lib.views import attention_figures as attention
from entroformer_lib.views import context_figures as context
from entroformer_lib.views import paper_tables as tables
from entroformer_lib.views import rate_figures as rates
from entroformer_lib.views import style
from entroformer_lib.views import window_figures as windows

BPG = "BPG 4:4:4"
CODECS = (  # published curves of figure 11
    *(AUTHORS, "VTM 9.1 (VVC)", BPG, "cheng2020-anchor (CompressAI)", "Minnen 2018 context + hyperprior (paper)"),
    "JPEG",
)
WITH_MS_SSIM = (AUTHORS, "cheng2020-anchor (CompressAI)", "mbt2018 (CompressAI)", "VTM 9.1 (VVC)", BPG, "JPEG")


@dataclass(frozen=True)
class Item:
    """One figure or table.

    data: what is drawn, from the saved results; raises NoResult where they do not exist. draw: data to figure.
    table: also written as Markdown. says, here: where the paper gives no number, what it says and what one sees here.
    """

    name: str
    title: str
    data: Callable[[], pd.DataFrame]
    draw: Callable[[pd.DataFrame], Figure]
    table: bool = False
    says: str = ""
    here: str = ""

    @property
    def item(self) -> str:
        """What the paper calls it: "figure 3", "table 1"; or, of what is ours, its name in words."""
        found = re.match(r"(figure|table)(\d+)", self.name)
        return f"{found[1]} {int(found[2])}" if found else self.name.replace("_", " ")


ITEMS = (
    Item("figure03_position_masking", "One position of the context: what its absence costs, and what it saves alone",
         context.masking_by_distance_data, context.two_measures),
    Item("figure03_missing", "Rate increase when one context position is missing, in all models",
         context.masking_data, context.masking_maps),
    Item("figure03_alone", "Rate saved by one context position alone, in all models",
         partial(context.masking_data, "alone"), partial(context.masking_maps, measure="alone")),
    Item("figure03_distance", "Both against three distances", context.masking_by_distance_data,
         context.masking_by_distance),
    Item("figure03_beyond", "Rate when everything beyond a distance is missing", context.beyond_data,
         context.beyond_curve),
    Item("figure05_rate_distortion", "Entropy models, whole: rate and PSNR on Kodak, and against CNNs",
         rates.whole_models_data, partial(rates.rate_distortion, width=style.ONE_COLUMN)),
    Item("figure05_variants", "Rate of entropy models behind the same transforms",
         rates.same_transforms_data, partial(rates.same_transforms, width=style.ONE_COLUMN)),
    Item("figure06_clipping_distance", "Saving against the clipping distance h", ablations.figure6_data,
         ablations.figure6),
    Item("figure07_top_k", "Learning curves for several k", ablations.figure7_data, ablations.figure7),
    Item("figure08_attention_points", "Attention of three points of the picture coffee",
         partial(attention.attention_data, 8), partial(attention.saved_maps, number=8),
         says="Attention differs from point to point, and follows structure, meaning and colour.",
         here="It follows structure: from the rim of the cup it goes around the rim. Most of it stays with the nearest "
         "neighbours."),
    Item("figure09_attention_heads", "Attention of one point, head by head",
         partial(attention.attention_data, 9), partial(attention.saved_maps, number=9),
         says="Heads look at different regions.",
         here="They do: one along the edge and at edges far away, one nearly only at the latent's own place, one at "
         "the neighbours on all sides."),
    Item("figure10_attention_k", "Attention of one point in models that were trained with different k",
         partial(attention.attention_data, 10), partial(attention.saved_maps, number=10),
         says="Top-k attention leaves out the background and concentrates on what informs most.",
         here="All agree on the strongest key. The five strongest together have more than half of the attention with "
         "k = 8, and least with dense attention, which spreads the rest thinly over everything that is decoded."),
    Item("figure11_psnr_kodak", "Our models and other people's codecs: rate and PSNR on Kodak, and against BPG",
         partial(rates.codecs_data, CODECS, BPG), partial(rates.rate_distortion, width=style.ONE_COLUMN)),
    Item("figure12_ms_ssim_kodak", "Rate and MS-SSIM on Kodak, of models trained for it and of others",
         partial(rates.goals_data, WITH_MS_SSIM), rates.by_goal),
    Item("table1_position_encoding", "Position encodings", ablations.table1_data, tables.figure, table=True),
    Item("table2_latency", "Latency of the entropy model", tables.table2_data, tables.figure, table=True),
    Item("table3_bidirectional", "Context of the second slice", ablations.table3_data, tables.figure, table=True),
    Item("table4_image_size", "Position encodings and the size of the picture", ablations.table4_data,
         tables.figure, table=True),
    Item("table6_sizes", "Size of the entropy model", tables.table6_data, tables.figure, table=True),
    Item("search_window", "Not of the paper: what a search window costs in bits and saves in time, on large pictures",
         windows.window_data, windows.cost_and_time),
)  # fmt: skip


def regenerate(out: Path | None = None, notebooks: Path | None = None, page: bool = True) -> dict[str, pd.DataFrame]:
    """Draws everything there are results for.  ->  the data drawn, by name

    Args:
        out: Folder to write to; default: figures/ of the repository.
        notebooks: Folder whose notebooks' figures the README lists too; default: notebooks/ of the repository.
        page: Write the README.
    """
    root = data_folder().parent
    out, notebooks = out or root / "figures", notebooks or root / "notebooks"
    out.mkdir(parents=True, exist_ok=True)
    drawn, missing = {}, {}
    for item in ITEMS:
        for old in out.glob(f"{item.name}.*"):
            old.unlink()
        try:
            data = drawn[item.name] = item.data()
        except NoResult as why:
            missing[item.name] = f"- {item.name}: {item.title.lower()}. {why}"
            continue
        style.write(item.draw(data), out, item.name, ("png", "svg"))
        write_bytes(out / f"{item.name}.csv", data.to_csv(index=False, float_format="%.6g").encode())
        if item.table:
            text = f"# {item.title}\n\n{tables.markdown(tables.in_words(data))}\n"
            write_bytes(out / f"{item.name}.md", text.encode())
    if page:
        write_bytes(out / "README.md", readme(drawn, missing, notebooks).encode())
    return drawn


# What the paper has and is not drawn here: what it shows, and where its subject stands in the code
NOT_DRAWN = {
    "figure 1": "Examples of texture, of similar objects and of one colour: why far context could help. "
    "[Attention maps](../notebooks/03_attention_maps.ipynb) show which of it a model uses.",
    "figure 2": "The architecture: [network.py](../entroformer_lib/models/network.py), bottom up in"
    " [architecture.md](../docs/architecture.md).",
    "figure 4": "The two slices: [context.py](../entroformer_lib/models/context.py), and a drawing of it in"
    " [overview.png](overview.png).",
    "table 5": "The layers: the size `base` in [config.py](../entroformer_lib/models/config.py).",
}


def readme(drawn: dict[str, pd.DataFrame], missing: dict[str, str], notebooks: Path) -> str:
    """figures/README.md: each claim of the paper with its verdict, what has no verdict, and the notebooks' figures."""
    found = verdicts.table()
    shown = {item.item: item.name for item in reversed(ITEMS) if item.name in drawn}
    counts = ", ".join(f"{count} {word}" for word, count in found["verdict"].value_counts().items())
    others = [item for item in ITEMS if item.name in drawn and item.item not in set(found["item"])]
    more = [item for item in ITEMS if item.name in drawn and item not in others and item.name != shown[item.item]]
    parts = [
        "# The paper's figures and tables, and what stands here",
        "Written by `make figures`; nothing here is drawn by hand. Figures and tables of the paper are drawn from\n"
        "data/results alone, as PNG and SVG, with their data as CSV, and tables as Markdown too. The command\n"
        "`python -m entroformer_lib.views.paper` draws them alone, in a minute. The other pictures are those of the\n"
        "notebooks, which `make figures` executes. `blocks-serial` and the like are shipped models; *effort 8* means\n"
        "that the encoder searched for better latents. PNGs of 670 pixels are for a column of 8.5 cm, wider ones for\n"
        "up to 18.3 cm. Published numbers come from data/reference.",
        f"## Verdicts\n\nOf {len(found)} claims: {counts}." if len(found) else "## Verdicts\n\nNo results yet.",
        "A saving is positive where it is in the paper's direction. The verdict follows from an interval of 95%\n"
        "by one rule ([verdicts.py](../entroformer_lib/studies/verdicts.py)): *reproduced* if all of it is above\n"
        "0 and it reaches the paper's number, *smaller* if it stays below that, *reversed* if all of it is below\n"
        "0, otherwise *cannot tell*. Some claims say that something costs little. A limit takes the place of 0\n"
        "there (1.5% for two passes, 0.5% for *no difference*, 1% for the size): *reproduced* if all of the\n"
        "interval is within it, *larger* if all of it is beyond, otherwise *cannot tell*. Where the verdict is\n"
        "*cannot tell*, the upper end of the interval is given; a number of the paper's above it is ruled out.\n"
        "Where real files of two models are compared, the interval is over the pictures and, where models of the\n"
        "same family were trained with several seeds, over the seeds. For a BD-rate, a time and a size the rule\n"
        "uses the number itself. Rates are means over the pictures before they are divided, in the figures\n"
        "too; of several lambdas the mean of the ratios is taken, and figure 5 is read over the rates of the\n"
        "authors' curve. The rates of figures 6 and 7 and of tables 1 and 3 are those of whole pictures at the end\n"
        "of the training. Figure 3 and the learning curves show the middle 256 x 256 pixels, table 4 mosaics of\n"
        "Kodak's pictures.",
        "Everything except tables 2 and 6 has one doubt in common: the entropy models here have a quarter of the\n"
        "paper's width and saw a small part of its steps. They learned behind frozen transforms, except the one\n"
        "of figure 12.\n"
        "In figures 6 and 7 and tables 1, 3 and 4 all rows have one learning rate, which suits convolutions a little\n"
        "better than transformers ([comparing](../docs/comparing.md)).\n"
        "What is in doubt for a reason of its own has it in the last column.",
        _verdicts(found, shown),
        "## No number in the paper",
        _without_number(others),
        "## Not drawn here",
        "\n".join(f"- **{name.capitalize()}.** {text}" for name, text in NOT_DRAWN.items()),
        "## More of the same results",
        _pictures([(item.item, item.name, item.title) for item in more]),
        *(["## Not measured yet", "\n".join(missing.values())] if missing else []),
        "## The notebooks' figures",
        tables.markdown(pd.DataFrame(_of_notebooks(notebooks), columns=["file", "from", "section"])),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _verdicts(found: pd.DataFrame, shown: dict[str, str]) -> str:
    rows = []
    for item, part in found.groupby("item", sort=False):
        for i, row in enumerate(part.itertuples()):
            first = _thumbnail(item, shown[item]) if i == 0 and item in shown else item if i == 0 else ""
            rows.append((first, row.says, row.published, row.ours, f"**{row.verdict}**", row.doubt))
    columns = ["", "the paper says", "its number", "here", "verdict", "to be considered"]
    return tables.markdown(pd.DataFrame(rows, columns=columns)) if rows else ""


def _without_number(items: list[Item]) -> str:
    rows = [(_thumbnail(item.item, item.name), item.title, item.says, item.here) for item in items]
    return tables.markdown(pd.DataFrame(rows, columns=["", "shows", "the paper says", "here"])) if rows else ""


def _pictures(rows: list[tuple[str, str, str]]) -> str:
    cells = [(_thumbnail(item, name), title) for item, name, title in rows]
    return tables.markdown(pd.DataFrame(cells, columns=["", "shows"])) if cells else ""


def _thumbnail(item: str, name: str) -> str:
    return f'<a href="{name}.png"><img src="{name}.png" width="150" alt="{name}"></a><br>{item}'


def _of_notebooks(folder: Path) -> list[tuple[str, str, str]]:
    """File, notebook and section of each figure that a notebook saves."""
    rows = []
    for path in sorted(folder.glob("[0-9]*.ipynb")):
        section = ""
        for cell in json.loads(path.read_text())["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                section = ([section] + re.findall(r"^#+ (?:\d+\. )?(.+)$", text, re.M))[-1]
            for name in re.findall(r'style\.save\(\w+, "(\w+)"', text):
                rows.append((f"[`{name}`]({name}.png)", f"`notebooks/{path.name}`", section))
    return rows


def main(out: Path | None = None) -> None:
    """Draws every figure and table of the paper from saved results.

    Args:
        out: Folder to write to; default: figures/ of the repository.
    """
    drawn = regenerate(out)
    print(f"{len(drawn)} of {len(ITEMS)} figures and tables of the paper have results and were drawn")
    for item in ITEMS:
        if item.name not in drawn:
            print(f"not measured yet: {item.name}")


if __name__ == "__main__":
    tyro.cli(main)
