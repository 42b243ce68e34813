"""One picture and one model, ready for questions about single latents: what all kinds of models have in common.

`row_server` and `group_server` say how one latent's attention is found in the two families of models; `server_of` of
`group_server` makes the one that fits. The explorer and the studies ask through what is declared here.
"""

import abc
import copy
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from entroformer_lib.codec import codec
from entroformer_lib.errors import AttentionError
from entroformer_lib.inspection.capture import attention_points

QUERIES_AT_ONCE = 128
FACTS = ("value", "mean", "scale", "bits", "hyper_bits")  # what is said of each group of channels
KINDS = {
    "none": "predicts from the hyperprior alone",
    "cnn": "has a CNN as its context",
    "serial": "is a serial Entroformer",
    "parallel": "is a parallel Entroformer",
    "grouped": "is a GroupedMixer, which attends in groups",
}


class PictureServer(abc.ABC):
    """The latents of one picture, a float64 copy of the entropy model, and answers about one latent at a time.

    Where scores nearly tie, float32 may choose another key than the coder's integers; float64 agrees with them to about
    15 bits. A model of variable rate is looked at as it is when the server is made: at the level that `codec.encode`
    would take, and later changes of the model do not reach the server.

    Sites are numbers in raster order on the latent grid of the *padded* picture: site = row * width + column. A *query*
    is a site and one of its channel slices: query = site * slices + slice. Most models predict all channels of a site
    at once (slices = 1), so that a query is a site.

    Attributes:
        name: the model's, in variable rate with the lambda; picture: padded, as the latents see it; size: (width,
            height) in pixels before padding; kind: the config's `context`; when: [n], the step of the coder at which
            the first latents of a site are known; radius: of the diamond of relative positions, in sites; row_entries:
            so many of a row can be more than zero; counts, order, cross: see `group_server`, else None.

    Args:
        model: an Entroformer of one of the `contexts`.
        picture: a PIL image, a path or an array, see `codec.open_picture`.

    Raises:
        AttentionError: another model.
    """

    family: str  # "rows" or "groups"
    contexts: tuple[str, ...]  # of the config, that this server takes
    offer: str  # ... in words
    slices = 1
    default_k: int | None = None
    when: np.ndarray
    radius: int
    channel_groups: list[np.ndarray]
    row_entries: int | None
    counts = order = cross = None

    @torch.inference_mode()
    def __init__(self, model, picture):
        attention_points(model)  # a sentence for what is no Entroformer
        c = self.config = model.config
        if c.context not in self.contexts:
            raise AttentionError(f"This model {KINDS[c.context]}; {self.offer}.")
        rgb, _ = codec.to_rgb(codec.open_picture(picture))
        x, level = codec.to_tensor(rgb, model.eval()), codec.level_of_file(model)
        y_hat, z = model.latents(x, level)
        self.wide = copy.deepcopy(model, {id(part): None for part in (model.g_a, model.g_s)}).double()  # without these
        self.rate, self.y_hat = self.wide.rate(level), y_hat.double()  # [1, M, h, w]
        z_hat = None if z is None else model.z_prior.quantize_z(z).double()
        self.hyper = None if z is None else self.wide.hyper_synthesis(z_hat, self.rate)  # [1, D, h, w]
        self.wide.h_a = self.wide.h_s = None  # not needed any more, and `capture` is quicker without
        self.name, self.picture, self.size = name_at(model, level), codec.to_picture(x), rgb.size
        self.kind, self.layers, self.heads = c.context, c.context_layers, c.heads
        self.height, self.width = y_hat.shape[-2:]

    # -- the grid --

    @property
    def n(self) -> int:
        """Number of latent sites."""
        return self.height * self.width

    def step(self, query: int) -> int:
        """The step of the coder at which a query is predicted."""
        return int(self.when[query])

    def has_context(self, query: int) -> bool:
        """Whether the bits of a query depend on other latents."""
        return self.step(query) > 0

    def decoded(self, query: int) -> np.ndarray:
        """Sites of which the decoder knows at least some channels when it comes to the query: bool [n]."""
        return self.when < self.step(query)

    @abc.abstractmethod
    def origin(self, query: int) -> int:
        """The site whose latents are held by the token that predicts the query."""

    @abc.abstractmethod
    def in_words(self, query: int) -> str:
        """When the query is coded, and what it may look at."""

    # -- answers --

    @abc.abstractmethod
    def many(self, queries: Sequence[int], k: int | None = None) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Many queries in batches: (queries [q], probs [q, layers, heads, n], facts [q, 2 + 5 groups]).

        A line of facts: bits and bits with the hyperprior alone, of the whole site, and of each channel group the five
        FACTS. What a model does not have is not a number there.
        """

    def row_and_facts(self, query: int, k: int | None = None) -> tuple[np.ndarray, dict]:
        """The attention of one query in all layers and heads, [layers, heads, n], and its `facts`.

        k: None for dense attention.
        """
        self.check(query, k)
        ((_, rows, lines),) = self.many([query], k)
        return rows[0], self._in_names(query, lines[0])

    def facts(self, query: int, k: int | None = None) -> dict:
        """The side panel: `bits` of the site with all context and `hyper_bits` with the hyperprior alone; of each of
        the `groups` of channels how many `channels` it has, root mean squares of values, predicted means and scales,
        and bits. What a model does not have is None."""
        return self.row_and_facts(query, k)[1]

    def _in_names(self, query: int, line: np.ndarray) -> dict:
        """A line of facts of a query, with names."""
        bits, hyper_bits, *rest = (None if math.isnan(v) else v for v in line.tolist())
        parts = zip(self.channel_groups, np.reshape(rest, (-1, len(FACTS))).tolist(), strict=True)
        groups = [{"channels": len(group), **dict(zip(FACTS, part, strict=True))} for group, part in parts]
        return {"bits": bits, "hyper_bits": hyper_bits, "groups": groups}

    def _lines(self, values: Tensor, means: Tensor, scales: Tensor, bits: Tensor, hyper_bits: Tensor) -> np.ndarray:
        """Lines of facts of q sites.  All [q, M]  ->  [q, 2 + 5 groups]"""
        columns = [bits.sum(1), hyper_bits.sum(1)]
        for group in self.channel_groups:
            columns += [v[:, group].square().mean(1).sqrt() for v in (values, means, scales)]
            columns += [v[:, group].sum(1) for v in (bits, hyper_bits)]
        return torch.stack(columns, dim=1).cpu().numpy()

    # -- what does not exist --

    def check(self, query: int, k: int | None = None) -> None:
        """A sentence for a latent or a k that does not exist.

        Raises:
            AttentionError: with what there is.
        """
        if not 0 <= query < self.n * self.slices:
            grid = f"the grid has {self.height} x {self.width}, so 0 to {self.n - 1}"
            raise AttentionError(f"There is no latent {query // self.slices}; {grid}.")
        if k is not None and k < 1:
            raise AttentionError(f"k must be at least 1, or None for dense attention; it is {k}.")

    def check_layer(self, layer: int, head: int = 0) -> None:
        """A sentence for a layer or head that does not exist.

        Raises:
            AttentionError: with what there is.
        """
        if not 0 <= layer < self.layers:
            raise AttentionError(f"There is no layer {layer}; this model's context has layers 0 to {self.layers - 1}.")
        if not 0 <= head < self.heads:
            raise AttentionError(f"There is no head {head}; this model has heads 0 to {self.heads - 1}.")


def name_at(model, level: float | None) -> str:
    """A model's name, and in variable rate the lambda of the level, as `load_model` takes it: `tiny-rates@0.013`."""
    name = model.name or f"untrained {model.config.variant}"
    return name if level is None else f"{name}@{model.gain.lmbda_of(level):.3g}"


def batches(items: Sequence[int]) -> Iterator[list[int]]:
    """Stretches of up to QUERIES_AT_ONCE."""
    for start in range(0, len(items), QUERIES_AT_ONCE):
        yield [int(i) for i in items[start : start + QUERIES_AT_ONCE]]
