"""Rate against the number of groups and against decoding time, from saved results.

Functions that read give None where there is no result yet; `pending` says it in a sentence.
"""

import itertools

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from entroformer_lib.errors import DataError
from entroformer_lib.views import paper_data
from entroformer_lib.views.style import COLOURS, GREYS, TWO_COLUMNS, label_ends, new_figure, styled

NAMES = {
    "hyperprior": "hyperprior alone",
    "hyperprior-cnn": "CNN hyperprior alone",
    "minnen": "CNN context, CNN hyperprior",
    "cnn": "CNN context",
    "parallel": "Entroformer, parallel",
    "serial": "Entroformer, serial",
    "groupedmixer": "GroupedMixer",
    "context-cnn": "CNN context alone",
    "context-serial": "serial context alone",
}
MARKERS = {"hyperprior": "v", "hyperprior-cnn": "<", "minnen": ">", "cnn": "^", "parallel": "s", "serial": "D"}
VARIANT_COLOURS = {"hyperprior": COLOURS[6], "cnn": COLOURS[3], "parallel": COLOURS[0], "serial": COLOURS[2]}
GROUPED, OTHER = COLOURS[1], "0.35"
FAMILIES = {"shipped": "shipped models", "runs": "runs of the ablations"}


def pending(name: str) -> str:
    """What stands in a figure's place until there is a result."""
    return f"There is no data/results/{name}.json yet, so there is no figure here."


# ---- rate against the number of groups ----


def groups_data() -> pd.DataFrame | None:
    """groups, slices, phases, seed, bpp of the grid `groups`, whole pictures."""
    rows = paper_data.ablation("groups")
    return None if rows is None else rows.sort_values(["groups", "seed"], ignore_index=True)


def lines_beside(grid: str = "groups") -> dict[str, float]:
    """Mean rates of the hyperprior alone, the parallel and the serial model, where they were trained on the same terms
    as the runs of a grid; empty where they were not."""
    ours, theirs = (paper_data.result(f"ablation-{name}") for name in (grid, "table3"))
    if ours is None or theirs is None or ours["settings"] != theirs["settings"]:
        return {}
    rows = pd.DataFrame([row for row in theirs["rows"] if row["grid"] == "table3_whole"])
    names = {"hyperprior": "hyperprior", "bidirectional": "parallel", "serial": "serial"}
    means = rows.groupby("trained")["bpp"].mean()
    return {NAMES[variant]: float(means[trained]) for trained, variant in names.items() if trained in means}


@styled
def groups_curve(rows: pd.DataFrame, lines: dict[str, float] | None = None) -> Figure:
    """Rate against the number of groups, a point for each seed, a line through the means; other models are level lines.

    rows: of `groups_data`; lines: of `lines_beside`
    """
    figure, ax = new_figure(TWO_COLUMNS * 0.75, 2.8)
    means = rows.groupby("groups")["bpp"].mean()
    place = {G: i for i, G in enumerate(means.index)}
    ax.plot(rows["groups"].map(place), rows["bpp"], "o", color=COLOURS[0], markersize=4, alpha=0.7)
    ax.plot(range(len(means)), means, color=COLOURS[0])
    kinds = rows.drop_duplicates("groups").set_index("groups")
    names = [f"{G}\n{kinds.loc[G, 'slices']} x {kinds.loc[G, 'phases']}" for G in means.index]
    ax.set_xticks(range(len(means)), names)
    most, values = len(means) - 0.7, [*rows["bpp"], *(lines or {}).values()]
    ends = [(means.iloc[-1], len(means) - 1, "GroupedMixer", COLOURS[0])]
    for colour, dashes, (name, bpp) in zip(GREYS, ("--", ":", "-."), (lines or {}).items(), strict=False):
        ax.axhline(bpp, color=colour, linestyle=dashes, linewidth=1)
        ends.append((bpp, most, name, colour))
    room = max(values) - min(values) or 0.01
    label_ends(ax, ends, most, gap=room / 12)
    ax.set(xlim=(-0.3, most), ylim=(min(values) - 0.08 * room, max(values) + 0.08 * room))
    ax.set(xlabel="number of groups G\nchannel slices x phases", ylabel="bits per pixel, estimated")
    ax.grid(axis="y", alpha=0.25, linewidth=0.5)
    return figure


def mixer_dots(rows: pd.DataFrame) -> pd.DataFrame:
    """`ablation_figures.dots` of the grid `groupedmixer`: rate against the whole model, in percent.

    Raises:
        DataError: the whole model is not among the rows.
    """
    whole = rows["run"].str.startswith("grouped-whole-") if len(rows) else pd.Series(dtype=bool)
    if not whole.any():
        raise DataError("The whole GroupedMixer is not among the saved rows, so nothing can be compared with it.")
    base = rows[whole]["bpp"].mean()
    return pd.DataFrame({"row": rows["difference"], "source": "here", "value": 100 * (rows["bpp"] / base - 1)})


# ---- rate against decoding time ----


def front(points: pd.DataFrame, seconds: str = "decode_s") -> pd.DataFrame:
    """The points than which none is both faster and smaller, from the fastest on."""
    kept, least = [], np.inf
    for index, row in points.sort_values([seconds, "percent"]).iterrows():
        if row["percent"] < least:
            kept.append(index)
            least = row["percent"]
    return points.loc[kept]


@styled
def tradeoff(points: pd.DataFrame) -> Figure:
    """Rate against decoding time, a row of panels for each family: of the whole decoding, and of the entropy model's
    own stages. Left and down is better; the dashed line joins what no other model beats in both.

    points: of `studies.tradeoff.points`
    """
    families = list(dict.fromkeys(points["family"]))
    kinds = {"decode_s": "seconds to decode a picture", "entropy_model_s": "of these in context and parameters, s"}
    figure, axes = new_figure(TWO_COLUMNS, 2.9 * len(families), len(families), 2, squeeze=False, sharey="row")
    for row, family in zip(axes, families, strict=True):
        part = points[points["family"] == family]
        for ax, (seconds, label) in zip(row, kinds.items(), strict=True):
            shown = part[part[seconds] > 0]
            best = front(shown, seconds)
            ax.plot(
                best[seconds],
                best["percent"],
                "--",
                color="0.6",
                linewidth=0.8,
                zorder=1,
                label="none is both faster and smaller",
            )
            grouped = shown[shown["variant"] == "groupedmixer"].sort_values("groups")
            if len(grouped) > 1:
                ax.plot(grouped[seconds], grouped["percent"], color=GROUPED, linewidth=1, zorder=2)
            for one in shown.itertuples():
                marker = MARKERS.get(one.variant, "o")
                ax.plot(getattr(one, seconds), one.percent, marker, color=_colour(one), markersize=5)
            ax.axhline(0, color="0.85", linewidth=0.8, zorder=0)
            ax.set(xscale="log", xlabel=label)
            _margins(ax, shown[seconds], shown["percent"])
            low, high = ax.get_xlim()
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.grid(alpha=0.2, linewidth=0.5, which="both")
        row[0].set_ylabel("rate against the parallel model, %")
        row[0].set_title(FAMILIES.get(family, family), loc="left")
        row[1].legend(loc="upper right")
    figure.draw_without_rendering()  # now the axes stand where they will
    for row, family in zip(axes, families, strict=True):
        for ax, seconds in zip(row, kinds, strict=True):
            part = points[(points["family"] == family) & (points[seconds] > 0)]
            first = part[part["variant"] == "groupedmixer"]["groups"].min()
            labels = [
                (getattr(p, seconds), p.percent, _label(p, p.groups == first), _colour(p)) for p in part.itertuples()
            ]
            _label_points(ax, labels)
    return figure


def _colour(point) -> str:
    return GROUPED if point.variant == "groupedmixer" else VARIANT_COLOURS.get(point.variant, OTHER)


def _label(point, first: bool) -> str:
    """Of several GroupedMixers only the first says what it is."""
    if point.variant == "groupedmixer":
        return f"{'GroupedMixer, ' * first}G = {point.groups:.0f}"
    return NAMES.get(point.variant, point.model)


def _margins(ax, seconds: pd.Series, percent: pd.Series) -> None:
    """Room for the labels."""
    low, high = np.log10(seconds.min()), np.log10(seconds.max())
    room = max(high - low, 0.2)
    ax.set_xlim(10 ** (low - 0.2 * room), 10 ** (high + 0.3 * room))
    room = max(percent.max() - percent.min(), 0.5)
    ax.set_ylim(percent.min() - 0.2 * room, percent.max() + 0.25 * room)


def _label_points(ax, points: list[tuple[float, float, str, str]]) -> None:
    """Text beside each point, where it covers no point, no other text and, if it can be, no line.

    points: (x, y, text, colour)
    """
    marks = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in (ax.transData.transform(p[:2]) for p in points)]
    curves, frame, taken = _pixels_of_lines(ax), ax.get_window_extent(), []
    sides = ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 0), (-1, 1), (-1, -1))
    for x, y, text, colour in points:
        tried = []
        for reach, (right, up) in itertools.product((6, 9, 14, 20), sides):
            note = ax.annotate(
                text, (x, y), xytext=(right * reach, up * reach), textcoords="offset points", fontsize=6,
                color=colour, ha=("right", "center", "left")[right + 1], va="center",
            )  # fmt: skip
            box = note.get_window_extent().padded(1)
            faults = sum(box.overlaps(other) for other in (*taken, *marks)) + 0.5 * bool(box.count_contains(curves))
            faults += not (frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)
            tried.append((faults, note, box))
            if not faults:
                break
        best = min(tried, key=lambda one: one[0])
        for one in tried:
            if one is not best:
                one[1].remove()
        taken.append(best[2])


def _pixels_of_lines(ax) -> np.ndarray:
    """Places on the curves of a panel, [n, 2]; level lines do not count."""
    found, steps = [np.empty((0, 2))], np.linspace(0, 1, 50)[:, None]
    for line in ax.lines:
        if line.get_transform() == ax.transData:
            corners = ax.transData.transform(line.get_xydata())
            found += [a + (b - a) * steps for a, b in itertools.pairwise(corners)]
    return np.concatenate(found)
