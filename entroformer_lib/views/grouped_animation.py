"""The order of decoding as a film: which latents are known after each step, for each order of the groups."""

from collections.abc import Iterable

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

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
    titles = [ORDERS.get(order, order).replace("\n", "<br>") for order in orders]
    figure = make_subplots(1, len(orders), subplot_titles=titles, horizontal_spacing=0.05)
    scale = [(at, colour) for n, (_, colour) in enumerate(STATES) for at in (n / 3, (n + 1) / 3)]
    for column, one in enumerate(numbers, 1):
        heat = go.Heatmap(
            z=_sheet(state_after(one, 0)), zmin=-0.5, zmax=2.5, colorscale=scale, showscale=False, xgap=1, ygap=1,
            hoverinfo="text", text=_words(one), hoverongaps=False,
        )  # fmt: skip
        figure.add_trace(heat, 1, column)
    for name, colour in STATES:
        marker = {"symbol": "square", "size": 12, "color": colour, "line": {"color": "#777777", "width": 1}}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=marker)
    names = [*(f"{g + 1}" for g in range(G)), "all"]
    figure.frames = [
        go.Frame(
            name=name,
            data=[go.Heatmap(z=_sheet(state_after(one, step))) for one in numbers],
            traces=list(range(len(orders))),
        )
        for step, name in enumerate(names)
    ]
    middles = [(size[0] + 1) * s + (size[0] - 1) / 2 for s in range(counts[0])]
    figure.update_xaxes(showticklabels=False, showgrid=False, zeroline=False, title="columns of latents")
    figure.update_yaxes(
        autorange="reversed", showgrid=False, zeroline=False, tickvals=middles, ticktext=[""] * len(middles)
    )
    figure.update_yaxes(ticktext=[f"slice {s + 1}" for s in range(counts[0])], col=1)
    figure.update_layout(
        width=860, height=200 + 22 * (size[0] + 1) * counts[0], template="plotly_white", margin={"t": 80, "l": 60},
        legend={"orientation": "h", "x": 0.5, "xanchor": "center", "y": -0.08, "yanchor": "top"},
        updatemenus=[_buttons()], sliders=[_slider(names)],
    )  # fmt: skip
    return figure


def _sheet(states: np.ndarray) -> list[list[int | None]]:
    """The slices one below the other, an empty line between them.  [k_c, rows, columns]  ->  lines"""
    lines = []
    for s, part in enumerate(states):
        lines += [[None] * part.shape[1]] * (s > 0) + part.tolist()
    return lines


def _words(numbers: np.ndarray) -> list[list[str | None]]:
    names = np.vectorize(lambda g: f"group {g + 1}")(numbers)
    return _sheet(names)


def _buttons() -> dict:
    play = {"frame": {"duration": 700, "redraw": True}, "transition": {"duration": 0}, "fromcurrent": True}
    stop = {"frame": {"duration": 0, "redraw": True}, "mode": "immediate"}
    buttons = [
        {"label": "Play", "method": "animate", "args": [None, play]},
        {"label": "Pause", "method": "animate", "args": [[None], stop]},
    ]
    return {
        "type": "buttons",
        "direction": "left",
        "buttons": buttons,
        "x": 0,
        "xanchor": "left",
        "y": -0.2,
        "yanchor": "top",
    }


def _slider(names: list[str]) -> dict:
    jump = {"frame": {"duration": 0, "redraw": True}, "mode": "immediate"}
    steps = [{"label": name, "method": "animate", "args": [[name], jump]} for name in names]
    return {"steps": steps, "currentvalue": {"prefix": "group "}, "x": 0.2, "len": 0.8, "y": -0.15, "pad": {"t": 0}}
