"""What an Entroformer does, in one drawing: picture, latents, two passes, bits. All of it from a real picture."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from entroformer_lib.inspection.panels import of_head, telling_layer
from entroformer_lib.views.style import COLOURS, SEQUENTIAL, TWO_COLUMNS, new_figure, styled

FIRST, SECOND = COLOURS[0], COLOURS[1]


@styled()
def overview(server, query: int, head: int = 0) -> Figure:
    """Four panels from left to right.

    Args:
        server: of a picture and a parallel model.
        query: the latent of the second pass whose attention is drawn, in the last layer that prefers something.
        head: of that layer.
    """
    figure, axes = new_figure(TWO_COLUMNS, 1.85, 1, 4)
    height, width = server.height, server.width
    grid = dict(extent=(0, width, height, 0), interpolation="nearest")
    sizes = server.y_hat[0].square().mean(0).sqrt().cpu().numpy()
    bits = server.bits(server.default_k)["context"]
    axes[0].imshow(server.picture, **grid)
    axes[0].set_xticks(range(width + 1)), axes[0].set_yticks(range(height + 1))
    axes[0].grid(color="white", linewidth=0.3)
    size = axes[1].imshow(np.sqrt(sizes), cmap="gray", **grid)
    axes[2].imshow(_faded(server.picture), **grid)
    _passes(axes[2], server, query, of_head(server.rows(query, server.default_k)[telling_layer(server)], head))
    cost = axes[3].imshow(bits, cmap=SEQUENTIAL, vmin=0, **grid)
    titles = (
        "1. A picture in blocks\nof 16 x 16 pixels",
        f"2. Each becomes\n{server.config.M} integers",
        "3. Blue ones first; orange\nones look at blue ones",
        f"4. Each costs bits:\n{(bits.sum() + server.z_bits) / 8000:.1f} kB in all",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set(xlim=(0, width), ylim=(height, 0))
        axis.tick_params(length=0, labelbottom=False, labelleft=False)
        axis.spines[:].set_visible(False)
    for left, right in zip(axes, axes[1:], strict=False):
        ends = dict(xycoords=right.transAxes, textcoords=left.transAxes, annotation_clip=False)
        left.annotate("", (-0.01, 0.5), (1.01, 0.5), arrowprops=dict(arrowstyle="-|>", color="0.3"), **ends)
    ends = ((axes[1], size, ("small", "large")), (axes[3], cost, ("0", f"{bits.max():.0f} bits")))
    for axis, shown, labels in ends:
        scale = figure.colorbar(shown, cax=axis.inset_axes([0.1, -0.14, 0.8, 0.07]), orientation="horizontal")
        scale.set_ticks(shown.get_clim(), labels=labels)
        scale.outline.set_visible(False)
    figure.get_layout_engine().set(wspace=0.08)
    return figure


def _passes(axis, server, query: int, attention: np.ndarray) -> None:
    """The chessboard of two passes, and lines from one latent to those that it attends to; the widest to the most."""
    for site in range(server.n):
        row, column = divmod(site, server.width)
        axis.add_patch(
            Rectangle((column, row), 1, 1, color=SECOND if server.step(site) else FIRST, alpha=0.6, linewidth=0)
        )
    row, column = (np.array(divmod(query, server.width)) + 0.5).tolist()
    for site in np.flatnonzero(attention):
        y, x = np.array(divmod(int(site), server.width)) + 0.5
        if site != query:
            axis.plot([column, x], [row, y], color="black", linewidth=0.4 + 2.5 * attention[site] ** 0.5)
    axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.5))


def _faded(picture) -> np.ndarray:
    return 0.5 + np.asarray(picture.convert("L").convert("RGB")) / 510
