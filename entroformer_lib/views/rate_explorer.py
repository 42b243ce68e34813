"""The clickable rate-distortion plot: point at a measured setting, see the picture it gives.

`RatePoints` knows what is measured and codes a picture at any of these settings; it imports no widget. `widget` draws
it: hover tells the numbers, a click shows original and result side by side, whole and as a crop.
"""

import functools
import html
import io
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
from PIL import Image

from entroformer_lib.errors import in_words
from entroformer_lib.studies.results import QUALITIES
from entroformer_lib.views.style import COLOURS, GREYS


@dataclass(frozen=True)
class Shown:
    """A picture at one point: the result, and what it took."""

    picture: Image.Image
    bytes: int
    text: str


class RatePoints:
    """Measured points, and the picture at each.

    Args:
        table: of `results.kodak_means`: codec, setting, bpp, psnr_db, ms_ssim_db.
        original: the picture to show.
        code: (codec, setting, picture) -> (decoded picture, bytes), such as `studies.measuring.picture_at`; called once
            for each point that is looked at.
    """

    def __init__(self, table: pd.DataFrame, original: Image.Image, code: Callable):
        self.table, self.original = table.reset_index(drop=True), original.convert("RGB")
        self._code = functools.cache(lambda codec, setting: code(codec, setting, self.original))

    @property
    def codecs(self) -> list[str]:
        return list(dict.fromkeys(self.table["codec"]))

    def rows(self, codec: str) -> pd.DataFrame:
        """A codec's points from low rate to high; their index is the number of the point."""
        return self.table[self.table["codec"] == codec].sort_values("bpp")

    def at(self, point: int) -> Shown:
        """The picture of a point (its number in the table)."""
        row = self.table.loc[point]
        decoded, size = self._code(row["codec"], None if pd.isna(row["setting"]) else row["setting"])
        bpp = 8 * size / (self.original.width * self.original.height)
        setting = "" if pd.isna(row["setting"]) else f" at {row['setting']:g}"
        return Shown(decoded, size, f"{row['codec']}{setting}: {size:,} bytes, {bpp:.3f} bits per pixel")

    def beside(self, point: int, centre: tuple[float, float] = (0.5, 0.5), side: int = 128) -> Image.Image:
        """Original and result side by side, and below both a crop, three times as large.

        centre: of the crop, as shares of width and height; side: pixels of the crop.
        """
        result = self.at(point).picture
        width, height = self.original.size
        side = min(side, width, height)
        left, top = (int(min(max(c * n - side / 2, 0), n - side)) for c, n in zip(centre, (width, height), strict=True))
        gap, large = 8, (width, width)
        sheet = Image.new("RGB", (2 * width + gap, height + gap + large[1]), "white")
        for i, picture in enumerate((self.original, result)):
            crop = picture.crop((left, top, left + side, top + side)).resize(large, Image.Resampling.NEAREST)
            sheet.paste(picture, (i * (width + gap), 0))
            sheet.paste(crop, (i * (width + gap), height + gap))
        return sheet


def figure_of(points: RatePoints, published: pd.DataFrame, quality: str = "psnr_db"):
    """The plot as a plotly figure.

    published: curves of `results.published`, drawn as such; quality: psnr_db or ms_ssim_db.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for i, (name, curve) in enumerate(published.dropna(subset=quality).groupby("codec", sort=False)):
        grey = round(255 * float(GREYS[i % len(GREYS)]))
        figure.add_scatter(
            x=curve["bpp"], y=curve[quality], mode="lines", name=f"{name}, published",
            line={"color": f"rgb({grey},{grey},{grey})", "dash": ("dash", "dot", "dashdot")[i % 3], "width": 1},
        )  # fmt: skip
    symbols = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")
    for i, name in enumerate(points.codecs):
        rows = points.rows(name)
        settings = ["" if pd.isna(s) else f"{s:g}" for s in rows["setting"]]
        figure.add_scatter(
            x=rows["bpp"], y=rows[quality], mode="lines+markers", name=f"{name}, measured",
            customdata=list(zip(rows.index, settings, strict=True)),
            marker={"symbol": symbols[i % len(symbols)], "size": 8, "color": COLOURS[i % len(COLOURS)]},
            hovertemplate=f"{name} %{{customdata[1]}}<br>%{{x:.3f}} bits per pixel<br>%{{y:.2f}} dB<extra></extra>",
        )  # fmt: skip
    low = points.table[quality].min()
    most = 1.1 * points.table["bpp"].quantile(0.9)
    figure.update_layout(
        width=820, height=460, template="plotly_white", clickmode="event", hovermode="closest",
        xaxis={"title": "bits per pixel (whole files)", "range": [0, most]},
        yaxis={"title": QUALITIES[quality], "range": [low - 0.5, None]},
    )  # fmt: skip
    return figure


def widget(points: RatePoints, published: pd.DataFrame, quality: str = "psnr_db"):
    """The plot in a notebook; a click on a measured point codes the picture there and shows it beside the original."""
    import ipywidgets
    import plotly.graph_objects as go

    plot = go.FigureWidget(figure_of(points, published, quality))
    text = ipywidgets.HTML("Click a measured point: the picture is coded there and shown beside the original.")
    picture = ipywidgets.Image(format="png", layout={"max_width": "820px", "display": "none"})  # until there is one

    def show(point: int) -> None:
        text.value, buffer = "Coding ...", io.BytesIO()
        try:
            shown = points.at(point)
            points.beside(point).save(buffer, "png")
        except Exception as error:  # whatever keeps a codec or model from coding here; a click shows no traceback
            text.value = html.escape(in_words(error))
            return
        picture.layout.display = None
        picture.value, text.value = buffer.getvalue(), f"Left: original. Right: {shown.text}."

    def clicked(trace, selection, state) -> None:
        if selection.point_inds and trace.customdata is not None:
            show(int(trace.customdata[selection.point_inds[0]][0]))

    for trace in plot.data:
        trace.on_click(clicked)
    box = ipywidgets.VBox([plot, text, picture])
    box.show_point = show  # for a first picture, and for tests
    return box
