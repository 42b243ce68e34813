"""Attention of a few latents of one picture, saved for Figures 8, 9 and 10.

    python -m entroformer_lib.studies.attention_maps

What heads look at on average is in `attention.py`; the explorer shows any latent of any picture.
"""

from collections.abc import Sequence
from pathlib import Path

import tyro

from entroformer_lib.datasets import sample_picture
from entroformer_lib.inspection.panels import DENSE, MEAN, USUAL_KS, attention_panel, k_in_words, own_k
from entroformer_lib.inspection.row_server import RowServer
from entroformer_lib.studies import results
from entroformer_lib.studies.commands import check_place, run
from entroformer_lib.weights.zoo import load_model

PICTURE = "coffee"
POINTS = ((8, 12), (14, 20), (20, 30))  # rows and columns of latents


def maps(
    server: RowServer,
    points: Sequence[tuple[int, int]] = POINTS,
    ks: Sequence[int] = (*USUAL_KS, DENSE),
    trained: Sequence[RowServer] = (),
    layer: int = -1,
) -> list[dict]:
    """Attention probabilities of a layer, by default the last, from the latents `points` of one picture.

    Args:
        ks: asked of one model, whatever it was trained with.
        trained: of models of the same picture, each trained with another k; they take the place of `ks`.

    Returns:
        A row for each map: figure, title, query [row, column], probs [h][w]. Figure 8: each point, mean over the heads;
        9: the middle one, head by head; 10: the same, its first head under each k, or, of models trained with
        different k, whose heads have nothing to do with each other, the mean over the heads.
    """

    def one(figure: int, title: str, of: RowServer, point: tuple[int, int], head: int, k: int | None = None) -> dict:
        panel = attention_panel(of, point[0] * of.width + point[1], layer, head, k)
        return {"figure": figure, "title": title, "query": list(point), "probs": panel.values.round(5).tolist()}

    middle = points[len(points) // 2]
    found = [one(8, f"row {row}, column {column}", server, (row, column), MEAN) for row, column in points]
    found += [one(9, f"head {head}", server, middle, head) for head in range(server.heads)]
    if trained:
        return found + [one(10, k_in_words(own_k(other)), other, middle, MEAN) for other in trained]
    return found + [one(10, k_in_words(k), server, middle, 0, k) for k in ks]


def save(
    model: str = "blocks-parallel",
    picture: str = PICTURE,
    trained: tuple[str, ...] = (),
    layer: int = -1,
    out: Path | None = None,
) -> None:
    """Writes the maps, with where they come from.

    Args:
        model: Name or path.
        picture: A sample picture; the points belong to "coffee".
        trained: For figure 10, names or paths of models that were trained with different k.
        layer: Counted from 0; -1 is the last.
        out: The file; by default data/results/attention_maps.json.
    """
    place = out or results.result_path("attention_maps")
    check_place(place)
    loaded, original = load_model(model, "cpu"), sample_picture(picture)
    server, *others = (RowServer(one, original) for one in (loaded, *(load_model(name, "cpu") for name in trained)))
    for one in (server, *others):
        one.check_layer(layer if layer >= 0 else one.layers + layer)
    found = maps(server, trained=others, layer=layer)
    told = {"model": model, "picture": picture, "layer": layer, "trained_k": bool(trained)}
    results.save(place, {**told, "maps": found}, loaded)


if __name__ == "__main__":
    run(lambda: tyro.cli(save))
