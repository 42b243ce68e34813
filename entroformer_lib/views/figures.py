"""Figures from pictures and tables; pure functions, no model runs in here."""

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from entroformer_lib.views.style import SEQUENTIAL, TWO_COLUMNS, new_figure, styled


@styled
def side_by_side(panels: list[tuple[str, Image.Image]], zoom: tuple[int, int, int] | None = None) -> Figure:
    """Pictures beside each other with a title each; below them the same detail of each, if asked for.

    Args:
        panels: (title, picture) pairs of pictures of one size.
        zoom: (left, top, side) of a square detail in pixels.
    """
    width, height = panels[0][1].size
    panel_width = TWO_COLUMNS / len(panels)
    ratios = [height / width, 1] if zoom else [height / width]
    figure, axes = new_figure(
        TWO_COLUMNS, panel_width * sum(ratios) + 0.4, len(ratios), len(panels), squeeze=False, height_ratios=ratios
    )
    for column, (title, picture) in enumerate(panels):
        _picture(axes[0, column], picture, title)
        if zoom:
            left, top, side = zoom
            axes[0, column].add_patch(_frame(left, top, side))
            _picture(axes[1, column], picture.crop((left, top, left + side, top + side)))
    return figure


@styled
def bits_map(picture: Image.Image, bits: np.ndarray) -> Figure:
    """Where the bits went: the picture, the map over its 16x16 blocks, and the picture seen through the map.

    Args:
        bits: bits of each block of y, [h, w], without padding cut off: the map is stretched over the padded picture.
    """
    width, height = picture.size
    figure, axes = new_figure(TWO_COLUMNS, TWO_COLUMNS / 2 * height / width + 0.45, 1, 2)
    _picture(axes[0], picture, "The picture")
    down, right = bits.shape[0] * 16 - height, bits.shape[1] * 16 - width  # padding, the smaller half top and left
    extent = (
        -(right // 2) - 0.5,
        width + right - right // 2 - 0.5,
        height + down - down // 2 - 0.5,
        -(down // 2) - 0.5,
    )
    image = axes[1].imshow(bits, cmap=SEQUENTIAL, extent=extent, vmin=0, interpolation="nearest")
    axes[1].set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
    axes[1].set_title("Bits of each 16 x 16 block")
    axes[1].spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes[1], shrink=0.9)
    bar.set_label("bits (all channels of one site of y)")
    bar.outline.set_visible(False)
    return figure


def _picture(axes, picture: Image.Image, title: str = "") -> None:
    axes.imshow(np.asarray(picture), cmap="gray" if picture.mode == "L" else None, interpolation="nearest")
    axes.set(xticks=[], yticks=[], title=title)
    axes.spines[:].set_visible(False)


def _frame(left: int, top: int, side: int):
    from matplotlib.patches import Rectangle

    return Rectangle((left - 0.5, top - 0.5), side, side, fill=False, edgecolor="white", linewidth=1.2)
