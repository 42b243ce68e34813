"""The order of decoding as a film: which latents are known after each step, for each order of the groups."""

from collections.abc import Iterable

import numpy as np
import plotly.express as px
import plotly.graph_objects as go

from entroformer_lib.models.groupedmixer import Counts
from entroformer_lib.views.grouped_figures import ORDERS, group_numbers
from entroformer_lib.views.style import COLOURS

STATES = (("not yet", "#E5E5E5"), ("decoded now", COLOURS[5]), ("known", COLOURS[0]))  # darker as more is known


def state_after(numbers: np.ndarray, step: int) -> np.ndarray:
    """0 not yet, 1 now, 2 known, for each latent, while group `step` is decoded.  numbers: of `group_numbers`"""
    return (numbers <= step).astype(int) + (numbers < step)


def decoding(counts: Counts, orders: Iterable[str] = tuple(ORDERS), size: tuple[int, int] = (4, 8)) -> go.Figure:
    """A panel for each order with the slices one below the other; play it, or drag the slider from group to group.

    size: rows and columns of latents that are shown
    """
    orders = list(orders)
    numbers = [group_numbers(counts, order, size) for order in orders]
    G = counts[0] * counts[1] * counts[2]
    states = np.stack([[_sheet(state_after(one, step)) for one in numbers] for step in range(G + 1)])
    scale = [(at, colour) for n, (_, colour) in enumerate(STATES) for at in (n / 3, (n + 1) / 3)]
    figure = px.imshow(
        states, animation_frame=0, facet_col=1, color_continuous_scale=scale, zmin=-0.5, zmax=2.5, aspect="auto",
        template="plotly_white", width=860, height=200 + 22 * (size[0] + 1) * counts[0],
    )  # fmt: skip
    for name, colour in STATES:
        marker = {"symbol": "square", "size": 12, "color": colour, "line": {"color": "#777777", "width": 1}}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=marker)
    for note, order in zip(figure.layout.annotations, orders, strict=True):
        note.text = ORDERS.get(order, order).replace("\n", "<br>")
    hints = [np.vectorize("group {:.0f}".format)(_sheet(one)) for one in numbers]
    for trace, words in zip(figure.data, hints, strict=False):
        trace.update(xgap=1, ygap=1, text=words, hovertemplate="%{text}<extra></extra>", hoverongaps=False)
    for frame in figure.frames:
        for trace, words in zip(frame.data, hints, strict=True):  # a frame's traces take the place of the first ones
            trace.update(xgap=1, ygap=1, text=words, hovertemplate="%{text}<extra></extra>", hoverongaps=False)
    (slider,), names = figure.layout.sliders, [*(str(g) for g in range(G)), "all"]
    slider.currentvalue.prefix = "group "
    for frame, step, name in zip(figure.frames, slider.steps, names, strict=True):
        frame.name = step.label = name
        step.args = ([name], *step.args[1:])
    middles = [(size[0] + 1) * s + (size[0] - 1) / 2 for s in range(counts[0])]
    figure.update_xaxes(showticklabels=False, showgrid=False, zeroline=False, title="columns of latents")
    figure.update_yaxes(showgrid=False, zeroline=False, tickvals=middles, ticktext=[""] * len(middles))
    figure.update_yaxes(ticktext=[f"slice {s}" for s in range(counts[0])], col=1)
    figure.update_layout(
        coloraxis_showscale=False, margin={"t": 80, "l": 60},
        legend={"orientation": "h", "x": 0.5, "xanchor": "center", "y": -0.08, "yanchor": "top"},
    )  # fmt: skip
    return figure


def _sheet(states: np.ndarray) -> np.ndarray:
    """The slices one below the other, an empty line between them.  [k_c, rows, columns]  ->  [lines, columns]"""
    apart = np.pad(states.astype(float), ((0, 0), (0, 1), (0, 0)), constant_values=np.nan)
    return apart.reshape(-1, states.shape[2])[:-1]
