"""Python's answers to what the explorer asks about one picture; `js/explorer.js` lists the questions.

The explorer's JavaScript owns the selection, the modes and the words. What it cannot know, it asks: the widget asks
these answers through the kernel, an offline page was given them when it was written.
"""

import base64
import functools
import io
import math

import numpy as np
import torch

from entroformer_lib.errors import AttentionError
from entroformer_lib.inspection.panels import offered_ks, own_k, rank_correlations, telling_layer

REMEMBERED = 64  # answers
QUESTIONS = ("overview", "rows", "costs", "cross", "calculation", "picture")


class Answers:
    """Answers about one picture and one or two models.

    Args:
        server: of the picture and a model, see `server_of`.
        other: of the same picture and another model, or None.

    Raises:
        AttentionError: the two servers do not have the same grid, or not the same picture.
    """

    def __init__(self, server, other=None):
        self.servers = [server] if other is None else [server, other]
        if other is not None and (other.height, other.width) != (server.height, server.width):
            raise AttentionError("Two models side by side need the same grid of latents; these have different ones.")
        if other is not None and other.picture.tobytes() != server.picture.tobytes():
            raise AttentionError("Two models side by side need the same picture; these have different ones.")
        self._asked = functools.lru_cache(REMEMBERED)(self._ask)

    def meta(self) -> dict:
        """What never changes: grid, picture, and what each model offers."""
        first = self.servers[0]
        rows = all(server.family == "rows" for server in self.servers)
        return {
            "height": first.height,
            "width": first.width,
            "inside": list(first.inside),
            "picture": data_url(first.picture),
            "models": [self._model(server) for server in self.servers],
            "costs": rows,
            "calculation": rows,
            "whatif": False,
        }

    def _model(self, server) -> dict:
        order = None if server.order is None else [list(map(int, group)) for group in server.order]
        return {
            "name": server.name,
            "kind": server.kind,
            "layers": server.layers,
            "layer": telling_layer(server),
            "heads": server.heads,
            "slices": server.slices,
            "own_k": own_k(server),
            "ks": offered_ks(server),
            "radius": server.radius,
            "counts": None if server.counts is None else list(server.counts),
            "order": order,
            "cross": server.cross is not None,
            "channel_groups": [group.tolist() for group in server.channel_groups],
            "hyperprior": server.config.hyperprior,
            "reference": server.reference_name,
            "z_bits": server.z_bits,
            "steps": [server.step(query) for query in range(server.n * server.slices)],
            "origins": [server.origin(query) for query in range(server.n * server.slices)],
        }

    def answer(self, question: str, model: int, *values) -> dict:
        """One answer: a dict of arrays, numbers and words.  model: 0 or 1; values: as in `js/explorer.js`

        Raises:
            AttentionError: something that does not exist.
        """
        if question not in QUESTIONS:
            raise AttentionError(f"There is no question '{question}'; there are {', '.join(QUESTIONS)}.")
        return self._asked(question, model, *values)

    def _ask(self, question: str, model: int, *values) -> dict:
        return getattr(self, f"_{question}")(self.servers[model], *values)

    # -- the questions --

    def _overview(self, server) -> dict:
        """Bits of every query, and `alone`, what they would be without context."""
        names = ("bits", "alone")
        return {name: v if v is None else v.astype("<f4") for name, v in zip(names, server.overview(), strict=True)}

    def _rows(self, server, query: int, k: int, change: None = None) -> dict:
        """Attention of a query in all layers and heads, and what it costs.  change: only a model in the page has one"""
        rows, facts = server.row_and_facts(query, k or None)
        return {"probs": rows.astype("<f4").ravel(), "facts": facts}

    def _costs(self, server, query: int, k: int) -> dict:
        """What the absence of each attended position costs, and how attention ranks that."""
        positions, bits = server.costs(query, k or None)
        rho = rank_correlations(server.rows(query, k or None), positions, bits)
        return {"positions": positions.astype("<u2"), "bits": bits.astype("<f4"), "rho": rho.astype("<f4").ravel()}

    def _cross(self, server, query: int) -> dict:
        """Attention of the cross mixers at the query's place."""
        return {"probs": server.groups(query).astype("<f4").ravel()}

    def _calculation(self, server, query: int, k: int, change: None, layer: int, head: int, channel: int) -> dict:
        """Every number between the scores of one head and the bits of one channel of a latent."""
        points = ("content", "position", "scores", "selected", "probs")
        found = {point: server.rows(query, k or None, point)[layer, head] for point in points}
        selected = np.isfinite(found.pop("selected"))
        means, scales, bits = (v[0, channel] for v in server.predict([query], k or None))
        value = server.y_hat[0, channel].flatten()[query]
        reach = max(4, math.ceil(4 * float(scales)), int((value - means).abs()) + 1)
        first = int(means.round()) - min(reach, 60)
        integers = torch.arange(first, first + 2 * min(reach, 60) + 1).to(value)
        mass = server.model.gaussian(integers, means.expand_as(integers), scales.expand_as(integers))
        return {
            **{point: values.astype("<f4") for point, values in found.items()},
            "selected": selected.astype("u1"),
            **{name: float(v) for name, v in (("value", value), ("mean", means), ("scale", scales), ("bits", bits))},
            "first": first,
            "probabilities": mass.cpu().numpy().astype("<f4"),
        }

    def _picture(self, server, name: str) -> dict:
        """The padded picture as it comes out (`reconstruction`), or with every latent at the mean that is expected
        without context (`guess`); as a data URL, or None."""
        latents = server.y_hat if name == "reconstruction" else server.expected
        return {"url": None if latents is None else data_url(server.reconstruct(latents))}


def packed(answer: dict, buffers: list[bytes]) -> dict:
    """An answer for the way to the browser: arrays go to the end of the buffers, and {"array": number, "dtype": numpy's
    name} stands in their place."""
    plain = {}
    for name, value in answer.items():
        if isinstance(value, np.ndarray):
            plain[name] = {"array": len(buffers), "dtype": value.dtype.str.lstrip("<|")}
            buffers.append(value.tobytes())
        else:
            plain[name] = value
    return plain


def data_url(picture) -> str:
    """A PIL image inside a page."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
