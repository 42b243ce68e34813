"""Static figures of attention: figures 8 to 10 of the paper, and attention against cost.

`attention_data` reads a saved result. The others are functions from panels (`panels.Panel`) and tables to figures.
"""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import FuncNorm, ListedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from entroformer_lib.datasets import sample_picture
from entroformer_lib.inspection.panels import Panel
from entroformer_lib.studies.results import NoResult, needed
from entroformer_lib.views.style import COLOURS, MARKERS, ONE_COLUMN, SEQUENTIAL, TWO_COLUMNS, new_figure, styled

QUERY, ORIGIN = "black", COLOURS[4]
DEARER, CHEAPER = COLOURS[1], COLOURS[0]  # when a position is hidden
SIGNED_ROOT = (lambda v: np.sign(v) * np.sqrt(np.abs(v)), lambda v: np.sign(v) * np.square(v))
ROOT = (lambda v: np.sqrt(np.maximum(v, 0)), np.square)  # the scale of colours, and back


@styled()
def attention_maps(
    picture: Image.Image,
    panels: list[Panel],
    columns: int = 3,
    titles: list[str] | None = None,
    width: float = TWO_COLUMNS,
) -> Figure:
    """Maps of attention over the picture, each on a scale of its own; its largest value stands in the title.

    A legend below says what frames and shades mean.

    Args:
        picture: padded to the latent grid, see `PictureServer.picture`.
        titles: instead of the panels' own.
        width: of the figure, ONE_COLUMN or TWO_COLUMNS.
    """
    rows = -(-len(panels) // columns)
    high, wide = panels[0].values.shape
    inches = width / columns * high / wide + 0.3
    figure, axes = new_figure(width, 1.07 * rows * inches + 0.95, rows, columns, squeeze=False)  # 7% for the scale
    titles = titles or [panel.title for panel in panels]
    for axis, panel, title in zip(axes.flat, panels, titles, strict=False):
        _map(
            axis, picture, panel, f"{title} (up to {_percent(np.abs(panel.values).max())})", 72 * width / columns / wide
        )
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    scale = ScalarMappable(FuncNorm(ROOT, 0, 1), SEQUENTIAL)
    bar = figure.colorbar(
        scale, ax=axes, location="bottom", fraction=0.04, aspect=40, shrink=0.5 if width > ONE_COLUMN else 0.9
    )
    bar.set_ticks([0, 0.1, 0.25, 0.5, 1], labels=["0", "10%", "25%", "50%", "100%"])
    bar.set_label("attention, as a share of its map's largest\n(square-root scale)")
    bar.outline.set_visible(False)
    _legend(figure, panels)
    return figure


def _percent(share: float) -> str:
    """A share in percent; what is less than one gets the first digit that is not 0."""
    return f"{share:.0%}" if share >= 0.01 else f"{100 * share:.1g}%"


def _legend(figure: Figure, panels: list[Panel]) -> None:
    """What frames and shades mean, of those that occur."""
    frame = dict(facecolor="none", linewidth=1.4)
    entries = [(Patch(edgecolor=QUERY, **frame), "the latent that is predicted")]
    if any(panel.origin != panel.query for panel in panels):
        entries.append((Patch(edgecolor=ORIGIN, **frame), "the one before, whose attention it is"))
    if any(panel.selected.any() for panel in panels):
        entries.append((Patch(facecolor="#31446b", edgecolor="0.75", linewidth=1.4), "white frame: among the top k"))
    if not all(panel.decoded.all() for panel in panels):
        entries.append((Patch(facecolor="0.35", linewidth=0), "darker: not decoded yet"))
    handles, words = zip(*entries, strict=True)
    columns = len(words) if len(words) < 4 else 2  # four in a row are wider than the figure
    if figure.get_figwidth() <= ONE_COLUMN:
        columns = 1
    figure.legend(handles, words, loc="outside lower center", ncols=columns, handlelength=1, handleheight=1)


def _map(axis, picture: Image.Image, panel: Panel, title: str, cell: float = 6) -> None:
    """cell: side of a latent in points, for frames that do not hide its neighbours"""
    height, width = panel.values.shape
    frame = min(1.4, cell / 4)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    grey = 0.25 + 0.7 * np.asarray(picture.convert("L")) / 255  # pale, the colours are for the map
    axis.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=extent)
    for colours in (_veil(panel.decoded), _colours(panel)):
        axis.imshow(colours, extent=extent, interpolation="nearest")
    axis.add_collection(_frames(panel.selected, "white", 0.5))
    for (row, column), colour in ((panel.origin, ORIGIN), (panel.query, QUERY)):
        for edge, line in (("white", 1.9 * frame), (colour, frame)):
            axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=edge, linewidth=line))
    axis.set(xlim=extent[:2], ylim=extent[2:], xticks=[], yticks=[])
    axis.set_title(title, fontsize=7)
    axis.spines[:].set_visible(False)


def _veil(decoded: np.ndarray) -> np.ndarray:
    """Shade over what is not decoded yet: [h, w, 4]."""
    return np.stack([np.zeros(decoded.shape)] * 3 + [0.22 * ~decoded], axis=-1)


def _colours(panel: Panel) -> np.ndarray:
    """The values as colours, square-root scale, clear where there is nothing: [h, w, 4]."""
    most = np.abs(panel.values).max() or 1
    if panel.kind == "cost":
        colours = _signed(SIGNED_ROOT[0](panel.values / most))
        colours[..., 3] *= panel.selected
        return colours
    strength = np.minimum(np.sqrt(np.abs(panel.values) / most), 1)
    colours = colormaps[SEQUENTIAL](strength)
    # where nothing is chosen each site has a little, and the picture shows through
    seen = 0.9 if panel.selected.any() else 0.9 * np.minimum(0.2 + 2 * strength, 1)
    colours[..., 3] = np.where(panel.values > 0, seen, 0)
    return colours


def _signed(strength: np.ndarray) -> np.ndarray:
    """Colours of what is dearer (towards 1) and cheaper (towards -1): [..., 4]."""
    colours = np.where((strength > 0)[..., None], to_rgba(DEARER), to_rgba(CHEAPER))
    colours[..., 3] = 0.45 + 0.55 * np.minimum(np.abs(strength), 1)
    return colours


def _frames(where: np.ndarray, colour: str, width: float) -> PatchCollection:
    squares = [Rectangle((c - 0.5, r - 0.5), 1, 1) for r, c in zip(*where.nonzero(), strict=True)]
    return PatchCollection(squares, facecolors="none", edgecolors=colour, linewidths=width)


# ---- figures 8, 9 and 10 ----


def attention_data(number: int) -> pd.DataFrame:
    """The saved maps of figure 8, 9 or 10: title, query_row, query_column, row, column, prob."""
    rows = [
        (one["title"], *one["query"], y, x, prob)
        for one in needed("attention_maps")["maps"]
        if one["figure"] == number
        for y, line in enumerate(one["probs"])
        for x, prob in enumerate(line)
    ]
    if not rows:
        raise NoResult(f"attention_maps.json has no maps of figure {number}.")
    return pd.DataFrame(rows, columns=["title", "query_row", "query_column", "row", "column", "prob"])


def saved_maps(data: pd.DataFrame, number: int) -> Figure:
    """`attention_maps` of the saved result, over the picture that it names. What was decoded is not saved.

    data: of `attention_data(number)`
    """
    panels = []
    for title, part in data.groupby("title", sort=False):
        values = part.pivot(index="row", columns="column", values="prob").to_numpy()
        decoded, selected = np.ones(values.shape, dtype=bool), (values > 0) & (title != "dense")
        query = tuple(part[["query_row", "query_column"]].iloc[0])
        panels.append(Panel(title, "attention", values, decoded, selected, query, query))
    height, width = values.shape
    saved = needed("attention_maps")
    name, layer = saved.get("picture"), saved.get("layer", -1)
    picture = Image.new("L", (16 * width, 16 * height), "white") if name is None else sample_picture(name)
    figure = attention_maps(_on_grid(picture, height, width), panels, columns=2, width=ONE_COLUMN)
    which = "last layer" if layer < 0 else f"layer {layer}, counted from 0"
    heads = {8: ", mean over heads", 10: ", mean over heads" if saved.get("trained_k") else ", head 0"}
    whose = "models trained with each k" if number == 10 and saved.get("trained_k") else saved.get("model", "")
    notes = ["pale margins: padding"] if (picture.width, picture.height) != (16 * width, 16 * height) else []
    notes += ["dense: every decoded latent has a little"] if "dense" in set(data["title"]) else []
    told = f"{whose}, {which}{heads.get(number, '')}\n{'; '.join(notes)}"
    figure.suptitle(told, fontsize=6.5)
    figure.set_figheight(figure.get_figheight() + 0.25)  # for the title
    return figure


def _on_grid(picture: Image.Image, height: int, width: int) -> Image.Image:
    """A picture on a grid of latents, in the place where the codec has it; the padding is white."""
    down, right = 16 * height - picture.height, 16 * width - picture.width  # the smaller half comes on top and left
    sides = ((down // 2, down - down // 2), (right // 2, right - right // 2))
    return Image.fromarray(np.pad(np.asarray(picture.convert("L")), sides, constant_values=255))


# ---- attention and cost ----


@styled()
def attention_and_cost(picture: Image.Image, panels: list[Panel]) -> Figure:
    """One latent: its attention, what hiding each position costs, and the two against each other.

    Args:
        panels: `attention_panel` and `cost_panel` of the latent.
    """
    attention, cost = panels
    height = max(2.0, 2.3 * picture.height / picture.width + 0.4) + 0.5  # the maps are 2.3 inches wide; their scales
    figure, axes = new_figure(TWO_COLUMNS, height, 1, 3, width_ratios=[1.25, 1.25, 1])
    most = np.abs(cost.values).max()
    _map(axes[0], picture, attention, f"attention\n{attention.title}")
    _map(axes[1], picture, cost, f"cost of its absence, up to {most:.1f} bits\norange: it helped, blue: it hurt")
    end = float(f"{0.7 * most:.1g}") if most else 1.0
    share = attention.values.max() or 1
    below = dict(location="bottom", fraction=0.06, aspect=25, shrink=0.8, pad=0.03)
    scale = figure.colorbar(ScalarMappable(FuncNorm(ROOT, 0, share), SEQUENTIAL), ax=axes[0], **below)
    scale.set_ticks([0, share / 4, share], labels=["0", _percent(share / 4), _percent(share)])
    scale.set_label("attention (square-root scale)")
    signs = ListedColormap(_signed(np.linspace(-1, 1, 256)))
    scale = figure.colorbar(ScalarMappable(FuncNorm(SIGNED_ROOT, -(most or 1), most or 1), signs), ax=axes[1], **below)
    scale.set_ticks([-end, 0, end])
    scale.set_label("bits (square-root scale)")
    received, bits = attention.values[cost.selected], cost.values[cost.selected]
    colours = np.where(bits > 0, DEARER, CHEAPER)
    axes[2].scatter(received, bits, s=7, c=colours, alpha=0.6, linewidth=0)
    axes[2].axhline(0, color="black", linewidth=0.6)
    axes[2].set_xscale("function", functions=ROOT)
    axes[2].set_yscale("function", functions=SIGNED_ROOT)
    axes[2].set_yticks([-end, 0, end])
    axes[2].xaxis.set_major_locator(MaxNLocator(3))
    axes[2].xaxis.set_major_formatter(PercentFormatter(1))
    axes[2].set(
        xlabel="attention received\n(both axes: square-root scale)", ylabel="bits its absence costs", xlim=(0, None)
    )
    axes[2].set_ylim(-1.15 * most or -1, 1.15 * most or 1)
    rho = pd.Series(received).corr(pd.Series(bits), method="spearman", min_periods=3)
    axes[2].set_title("no rank correlation" if np.isnan(rho) else f"rank correlation {rho:.2f}", fontsize=7)
    return figure


@styled()
def attention_against_cost(table: pd.DataFrame, own_k: int | None = None) -> Figure:
    """Does attention explain the bits? Rank correlations over k, and per layer and head at one k.

    Points are means over images, bars the spread over images (least to most).

    Args:
        table: of `studies.attention.attention_against_cost`.
        own_k: the model's k, for the second panel; by default the first in the table.
    """
    figure, (left, right) = new_figure(TWO_COLUMNS, 3.1, 1, 2)
    shown = {
        "rho": "attention and cost",
        "rho_magnitude": "attention and size of the change",
        "rho_nearness": "nearness and cost",
        "rho_magnitude_nearness": "nearness and size of the change",
    }
    table = table.assign(k=table["k"].map("{:.0f}".format).replace("nan", "dense"))
    over_all = table[table["layer"] < 0].rename(columns=shown)
    names = [name for name in shown.values() if name in over_all]  # the oldest saved result lacks the last
    _with_spread(left, over_all.melt("k", names, "what", "value"), x="k", y="value", hue="what")
    left.set(xlabel="k", ylabel="Spearman's rank correlation", title="mean over layers and heads")
    below = dict(loc="upper center", bbox_to_anchor=(0.5, -0.2), handletextpad=0.2, fontsize=6.5)
    left.legend(ncols=2, **below)
    k = table["k"].iloc[0] if own_k is None else str(own_k)
    own = table[(table["layer"] >= 0) & (table["k"] == k)]
    _with_spread(right, own.assign(head=own["head"].map("head {}".format)), x="layer", y="rho", hue="head")
    right.set(xlabel="layer", ylabel="", title=f"attention and cost, each head, k = {k}")
    right.legend(ncols=3, **below)
    figure.supxlabel("points: means over the pictures; bars: from the least to the most", fontsize=7)
    for axis in (left, right):
        axis.axhline(0, color="black", linewidth=0.6)
        axis.grid(axis="y", alpha=0.25, linewidth=0.5)
    return figure


def _with_spread(axis, table: pd.DataFrame, hue: str, **columns: str) -> None:
    """Means as points, from the least to the most as bars, a colour and a marker for each value of `hue`."""
    number = range(table[hue].nunique())
    looks = dict(
        palette=[COLOURS[i % len(COLOURS)] for i in number], markers=[MARKERS[i % len(MARKERS)] for i in number]
    )
    bars = dict(errorbar=("pi", 100), err_kws={"linewidth": 0.9})
    sns.pointplot(table, hue=hue, ax=axis, linestyle="none", dodge=0.4, markersize=3.5, **columns, **looks, **bars)
