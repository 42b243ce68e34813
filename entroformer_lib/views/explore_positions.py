"""The interactive map of the masking study: choose model and picture, point at a position."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from entroformer_lib.views.context_figures import NAMES

ALL = "mean rate of all pictures"
TICKS = (-10, -1, -0.1, 0, 0.1, 1, 10)  # percent


def interactive(table: pd.DataFrame) -> go.Figure:
    """A map with a menu for the model and one for the picture. Hover: position, rates, distances, rank.

    There is a trace for each picture: the second menu shows one of them, the first gives all of them a model's data.

    Args:
        table: rows of the study (`studies.position_masking.run`): model, image, dy, dx, bpp_all, bpp_masked, ratio.
    """
    models, images = list(dict.fromkeys(table["model"])), [ALL, *dict.fromkeys(table["image"])]
    traces = {model: [_map(table[table["model"] == model], image) for image in images] for model in models}
    most = float(np.abs(_shade(100 * (table["ratio"] - 1))).max())
    colours = {"colorscale": "RdBu", "reversescale": True, "zmin": -most, "zmax": most}
    bar = {"title": "rate increase, %", "tickvals": [_shade(t) for t in TICKS], "ticktext": [f"{t:g}" for t in TICKS]}
    figure = go.Figure()
    for number, trace in enumerate(traces[models[0]]):
        figure.add_heatmap(**trace, **colours, colorbar=bar, hoverinfo="text", visible=number == 0)
    figure.add_scatter(x=[0], y=[0], mode="markers", marker={"symbol": "x", "color": "black"}, hoverinfo="skip")
    numbers = list(range(len(images)))
    by_model = [
        {
            "label": NAMES.get(m, m),
            "method": "restyle",
            "args": [{key: [t[key] for t in traces[m]] for key in traces[m][0]}, numbers],
        }
        for m in models
    ]
    by_image = [
        {"label": image, "method": "restyle", "args": [{"visible": [n == i for n in numbers]}, numbers]}
        for i, image in enumerate(images)
    ]
    place = {"xanchor": "left", "yanchor": "bottom", "y": 1.03}
    reach = int(table[["dy", "dx"]].abs().max().max()) + 0.5
    figure.update_layout(
        updatemenus=[{"buttons": by_model, "x": 0, **place}, {"buttons": by_image, "x": 0.5, **place}],
        xaxis={"title": "dx, latents", "dtick": 1, "range": [-reach, reach], "constrain": "domain", "showgrid": False},
        yaxis={"title": "dy, latents", "dtick": 1, "range": [reach, -reach], "scaleanchor": "x", "showgrid": False},
        width=620,
        height=560,
        template="plotly_white",
        showlegend=False,
    )
    return figure


def _shade(percent):
    """A logarithm on both sides of zero, so that small changes can be seen beside large ones."""
    return np.sign(percent) * np.log10(1 + np.abs(percent) / 0.1)


def _map(part: pd.DataFrame, image: str) -> dict:
    """One picture's data as plotly takes it, or that of the mean over all."""
    if image == ALL:
        part = part.groupby(["dy", "dx"], as_index=False)[["bpp_all", "bpp_masked"]].mean()
    else:
        part = part[part["image"] == image]
    percent = 100 * (part["bpp_masked"] / part["bpp_all"] - 1)
    rank = percent.rank(ascending=False, method="first").astype(int)
    text = [
        f"position ({row.dy}, {row.dx}): {p:+.3f}%, rank {r} of {len(part)}"
        f"<br>rate {row.bpp_all:.4f} to {row.bpp_masked:.4f} bpp"
        f"<br>distance: L1 {abs(row.dy) + abs(row.dx)}, L2 {(row.dy**2 + row.dx**2) ** 0.5:.2f}, "
        f"L-infinity {max(abs(row.dy), abs(row.dx))}"
        for row, p, r in zip(part.itertuples(), percent, rank, strict=True)
    ]
    return {"x": part["dx"].tolist(), "y": part["dy"].tolist(), "z": _shade(percent).tolist(), "text": text}
