"""Every figure and table of the paper for which there are saved results: one command, no model runs.

    python -m entroformer_lib.views.paper

Reads data/results and data/reference (`paper_data` says which), writes figures/: each item as PNG and SVG, the data it
draws as CSV, tables also as Markdown, and README.md, which puts the published number beside ours. An item whose results
do not exist is left out and said to be. A result that appears later is drawn without new code.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import tyro
from matplotlib.figure import Figure

from entroformer_lib.files import data_folder, write_bytes
from entroformer_lib.views import style
from entroformer_lib.views.paper_data import (
    AUTHORS,
    Comparison,
    attention_data,
    beyond_data,
    figure6_comparison,
    figure6_data,
    figure7_data,
    masking_by_distance_data,
    masking_comparison,
    masking_data,
    rate_distortion_comparison,
    rate_distortion_data,
    same_transforms_comparison,
    same_transforms_data,
    table1_comparison,
    table1_data,
    table2_comparison,
    table2_data,
    table3_comparison,
    table3_data,
    table4_comparison,
    table4_data,
    table6_comparison,
    table6_data,
)
from entroformer_lib.views.paper_figures import (
    alone_maps,
    attention_maps,
    beyond_curve,
    cells,
    figure6,
    figure7,
    markdown,
    masking_by_distance,
    masking_maps,
    rate_distortion_figure,
    same_transforms,
    table_figure,
)

# Drawn in figures 5, 11 and 12 beside ours: published curves, darkest first
FEW_CURVES = (AUTHORS, "VTM 9.1 (VVC)", "BPG 4:4:4", "Minnen 2018 context + hyperprior (paper)", "JPEG")
MORE_CURVES = (
    *FEW_CURVES,
    "Minnen 2020 channel-wise (paper)",
    "Ballé 2018 hyperprior (paper)",
    "cheng2020-anchor (CompressAI)",
)


@dataclass(frozen=True)
class Item:
    """One figure or table.

    data: what is drawn, from the saved results; None where they do not exist.
    draw: data to figure. compare: data to published numbers and ours. table: also written as Markdown.
    """

    name: str
    title: str
    needs: str
    data: Callable[[], pd.DataFrame | None]
    draw: Callable[[pd.DataFrame], Figure]
    compare: Callable[[pd.DataFrame], list[Comparison]] = field(default=lambda data: [])
    claim: str = ""
    table: bool = False


MASKING, MAPS = "position_masking.json", "attention_maps.json"
ITEMS = (
    Item("figure03_position_masking", "Rate increase when one context position is missing", MASKING, masking_data,
         masking_maps, claim="the closer, the more; in the shape of a diamond"),
    Item("figure03_alone", "Rate saved by one context position alone", MASKING,
         lambda: masking_data("alone_over_pictures"), alone_maps, claim="not in the paper, or the other reading of it"),
    Item("figure03_distance", "Both against three distances", MASKING, masking_by_distance_data, masking_by_distance,
         masking_comparison, claim="falls with L1 distance"),
    Item("figure03_beyond", "Rate when everything beyond a distance is missing", MASKING, beyond_data, beyond_curve,
         claim="not in the paper"),
    Item("figure05_rate_distortion", "Rate and PSNR on Kodak", "*-kodak.json",
         rate_distortion_data("psnr", FEW_CURVES), rate_distortion_figure("PSNR, dB"), rate_distortion_comparison),
    Item("figure05_variants", "Rate of entropy models behind the same transforms", "*-kodak.json",
         same_transforms_data, same_transforms, same_transforms_comparison),
    Item("figure06_clipping_distance", "Saving against the clipping distance h", "ablation*.json", figure6_data,
         figure6, figure6_comparison),
    Item("figure07_top_k", "Learning curves for several k", "ablation*.json", figure7_data, figure7,
         claim="better up to k = 64, then no difference from dense attention"),
    Item("figure08_attention_points", "Attention of three points of the picture coffee",
         MAPS, attention_data(8), attention_maps),
    Item("figure09_attention_heads", "Attention of one point, head by head",
         MAPS, attention_data(9), attention_maps),
    Item("figure10_attention_k", "Attention of one point with different k, in a model trained with one k",
         MAPS, attention_data(10), attention_maps),
    Item("figure11_psnr_kodak", "Rate and PSNR on Kodak, more codecs", "*-kodak.json",
         rate_distortion_data("psnr", MORE_CURVES), rate_distortion_figure("PSNR, dB"), rate_distortion_comparison),
    Item("figure12_ms_ssim_kodak", "Rate and MS-SSIM on Kodak; published models and tiny-rates-msssim trained for it",
         "*-kodak.json", rate_distortion_data("ms_ssim", MORE_CURVES), rate_distortion_figure("MS-SSIM, dB"),
         rate_distortion_comparison),
    Item("table1_position_encoding", "Position encodings", "ablation*.json", table1_data, table_figure,
         table1_comparison, table=True),
    Item("table2_latency", "Latency of the entropy model", "latency.json", table2_data, table_figure,
         table2_comparison, table=True),
    Item("table3_bidirectional", "Context of the second slice", "ablation*.json", table3_data, table_figure,
         table3_comparison, table=True),
    Item("table4_image_size", "Position encodings and the size of the picture", "ablation*.json", table4_data,
         table_figure, table4_comparison, table=True),
    Item("table6_sizes", "Size of the entropy model", "model_sizes.json", table6_data, table_figure, table6_comparison,
         table=True),
)  # fmt: skip


def regenerate(out: Path | None = None, notebooks: Path | None = None) -> dict[str, pd.DataFrame]:
    """Draws everything there are results for.  ->  the data drawn, by name

    Args:
        out: Folder to write to; default: figures/ of the repository.
        notebooks: Folder whose notebooks' figures the README lists too; default: notebooks/ of the repository.
    """
    root = data_folder().parent
    out, notebooks = out or root / "figures", notebooks or root / "notebooks"
    out.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for item in ITEMS:
        data = item.data()
        for old in out.glob(f"{item.name}.*"):
            old.unlink()
        if data is None:
            continue
        drawn[item.name] = data
        style.write(item.draw(data), out, item.name, ("png", "svg"))
        write_bytes(out / f"{item.name}.csv", data.to_csv(index=False, float_format="%.6g").encode())
        if item.table:
            write_bytes(out / f"{item.name}.md", (f"# {item.title}\n\n" + markdown(*cells(data))).encode())
    write_bytes(out / "README.md", readme(drawn, notebooks).encode())
    return drawn


def readme(drawn: dict[str, pd.DataFrame], notebooks: Path) -> str:
    """figures/README.md: every item with the published value, ours, the deviation; what is missing; the notebooks'."""
    rows = []
    for item in ITEMS:
        if item.name not in drawn:
            continue
        link, numbers = f"[`{item.name}`]({item.name}.png)", item.compare(drawn[item.name])
        if item.claim or not numbers:
            rows.append([link, item.title, "", item.claim or "a picture", "see the figure", ""])
        for c in numbers:
            unit = f" {c.unit}" if c.unit else ""
            published = "no number" if c.published is None else f"{c.published:.4g}{unit}"
            rows.append([link, item.title, c.quantity, published, f"{c.ours:.4g}{unit}", c.deviation])
    missing = [f"- {item.name}: {item.title.lower()} ({item.needs})\n" for item in ITEMS if item.name not in drawn]
    headings = ["file", "shows", "quantity", "published", "ours", "deviation"]
    parts = [
        "# figures\n\nWritten by `make figures`; nothing here is drawn by hand. Each figure and table of the paper is "
        "drawn from\ndata/results alone, as PNG and SVG, with its data as CSV; tables as Markdown too.\n",
        "\n## The paper's figures and tables\n\nOurs are small models, trained for minutes to hours on two CPU cores; "
        "the authors' are three to four times\nas wide and had about 280,000 steps. Published curves and numbers are "
        "marked as such in every figure (sources: data/reference).\n\n",
        markdown(headings, rows),
        "\n## Not measured yet\n\n" + "".join(missing) if missing else "",
        "\n## The notebooks' figures\n\n" + markdown(["file", "from", "section"], _of_notebooks(notebooks)),
    ]
    return "".join(parts)


def _of_notebooks(folder: Path) -> list[list[str]]:
    """File, notebook and section of each figure that a notebook saves."""
    rows = []
    for path in sorted(folder.glob("[0-9]*.ipynb")):
        section = ""
        for cell in json.loads(path.read_text())["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                section = ([section] + re.findall(r"^#+ (?:\d+\. )?(.+)$", text, re.M))[-1]
            for name in re.findall(r'style\.save\(\w+, "(\w+)"', text):
                rows.append([f"[`{name}`]({name}.png)", f"`notebooks/{path.name}`", section])
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
            print(f"not measured yet: {item.name} (it would be drawn from {item.needs})")


if __name__ == "__main__":
    tyro.cli(main)
