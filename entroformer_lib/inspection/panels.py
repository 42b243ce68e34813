"""One latent's attention or costs as maps on the latent grid: what the static figures draw.

The numbers come from a server (`picture_server.PictureServer`). The explorer in the browser has its own maps, made of
the same answers.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

MEAN = -1  # as head: the mean over all heads
DENSE = 0  # as k: dense attention
USUAL_KS = (8, 16, 32, 64)  # figure 10
PREFERS = 1.5  # times an equal share: what the largest attention has where a head prefers some keys


@dataclass(frozen=True)
class Panel:
    """One map over the picture. Arrays are [h, w] on the latent grid.

    values: attention (sums to 1), or for kind "cost" bits that the absence of a position costs; decoded: what the
    decoder knows when it comes to the query; selected: what the top-k left; query and origin: (row, column) of the
    latent that is predicted and of the token that predicts it.
    """

    title: str
    kind: str
    values: np.ndarray
    decoded: np.ndarray
    selected: np.ndarray
    query: tuple[int, int]
    origin: tuple[int, int]


def attention_panel(server, query: int, layer: int, head: int = MEAN, k: int | None = None) -> Panel:
    """Where one head, or the mean over heads, looks for a query.

    k: DENSE, or by default the model's own.
    """
    k = own_k(server) if k is None else k
    values = of_head(server.rows(query, k or None)[layer], head)
    title = f"layer {layer}, {head_in_words(head)}" + (f", {k_in_words(k)}" if server.family == "rows" else "")
    return _on_grid(server, query, "attention", title, values, (values > 0) & (k != DENSE))


def telling_layer(server, queries: int = 8) -> int:
    """The last layer whose heads prefer some keys to others, judged by a few queries; where none does, the last.

    Layers that were added to a trained model may give all their keys the same attention; a map of them shows nothing.
    """
    known = [query for query in range(server.n * server.slices) if server.has_context(query)]
    if not known:
        return server.layers - 1
    strength = np.zeros(server.layers)  # the largest attention against that of equal shares
    for query in known[:: -(-len(known) // queries)]:
        probs = server.rows(query, own_k(server) or None)  # [layers, heads, n]
        strength += (probs.max(-1) * np.count_nonzero(probs, axis=-1)).mean(-1) / queries
    telling = np.flatnonzero(strength > PREFERS)
    return int(telling[-1]) if len(telling) else server.layers - 1


def every_head(server, query: int, layer: int, k: int | None = None) -> list[Panel]:
    """A map of every head of a layer, and of their mean, last."""
    return [attention_panel(server, query, layer, head, k) for head in (*range(server.heads), MEAN)]


def cost_panel(server, query: int, k: int | None = None) -> Panel:
    """What the absence of each attended position costs the query, in bits."""
    positions, bits = server.costs(query, (own_k(server) if k is None else k) or None)
    values, selected = np.zeros(server.n), np.zeros(server.n, dtype=bool)
    values[positions], selected[positions] = bits, True
    return _on_grid(server, query, "cost", "cost of its absence, in bits", values, selected)


def _on_grid(server, query: int, kind: str, title: str, values: np.ndarray, selected: np.ndarray) -> Panel:
    maps = (v.reshape(server.height, server.width) for v in (values, server.decoded(query), selected))
    places = (divmod(site, server.width) for site in (query // server.slices, server.origin(query)))
    return Panel(title, kind, *maps, *places)


def of_head(maps: np.ndarray, head: int) -> np.ndarray:
    """One head's map, or the mean.  maps: [heads, ...]"""
    return maps.mean(0) if head == MEAN else maps[head]


def rank_correlations(rows: np.ndarray, positions: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of attention with the bits that the absence of positions costs, for every layer and
    head, the mean over heads last; not a number where one of both does not vary.

    rows: [layers, heads, n]; positions, bits: [J]  ->  [layers, heads + 1]
    """
    layers, heads, _ = rows.shape
    maps = np.concatenate((rows, rows.mean(1, keepdims=True)), axis=1)[..., positions]
    table = pd.DataFrame([*maps.reshape(layers * (heads + 1), -1), bits]).T
    return table.corr("spearman", min_periods=3).to_numpy()[:-1, -1].reshape(layers, heads + 1)


def own_k(server) -> int:
    """The k that the model was built with, DENSE for none."""
    return DENSE if server.default_k is None else server.default_k


def offered_ks(server) -> list[int]:
    """The k on offer: those of figure 10, the model's own, and dense as 0, the last."""
    own = [own_k(server)] if server.family == "rows" else []  # windows have no k
    return [*sorted({*(USUAL_KS if own else ()), *own} - {DENSE}), DENSE]


def head_in_words(head: int) -> str:
    """`head 2`, or `mean over heads`."""
    return "mean over heads" if head == MEAN else f"head {head}"


def k_in_words(k: int) -> str:
    """`k = 16`, or `dense`."""
    return f"k = {k}" if k else "dense"
