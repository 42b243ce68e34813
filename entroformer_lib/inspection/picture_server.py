"""One picture and one model, ready for questions about single latents: what all kinds of models have in common.

`row_server` and `group_server` say how one latent's attention is found in the two families of models; `server_of` of
`group_server` makes the one that fits. The explorer and the studies ask through what is declared here.
"""

import abc
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from entroformer_lib.errors import AttentionError
from entroformer_lib.inspection.capture import attention_points
from entroformer_lib.inspection.scene import Scene

QUERIES_AT_ONCE = 128
FACTS = ("value", "mean", "scale", "bits", "alone")  # what is said of each group of channels
KINDS = {
    "none": "predicts from the hyperprior alone",
    "cnn": "has a CNN as its context",
    "serial": "is a serial Entroformer",
    "parallel": "is a parallel Entroformer",
    "grouped": "is a GroupedMixer, which attends in groups",
}


class PictureServer(Scene, abc.ABC):
    """A scene in float64, and answers about one latent at a time.

    The coder's integers agree with float64 to about 15 bits. Where scores are closer than that, as in flat parts and in
    the padding, it may keep other keys than these answers do.

    Sites are numbers in raster order on the latent grid of the *padded* picture: site = row * width + column. A *query*
    is a site and one of its channel slices: query = site * slices + slice. Most models predict all channels of a site
    at once (slices = 1), so that a query is a site.

    What does the context save? That is told by a *reference*: a model that was trained to predict from the hyperprior
    alone, behind the same transforms, so that it codes the same latents; `reference_of` of `weights.zoo` finds one.
    `alone` are its bits. Without a reference `alone` are, in serial and parallel models, the bits of this model with
    its context switched off, which is no fair comparison: where there always was context, it never learned to do
    without. A GroupedMixer has none then.

    Attributes:
        those of `Scene`; kind: the config's `context`; when: [n], the step of the coder at which the first latents of a
            site are known; radius: of the diamond of relative positions, in sites; row_entries: so many of a row can be
            more than zero; counts, order, cross: see `group_server`, else None; reference_name: of the reference, in
            variable rate with the lambda, or None.

    Args:
        model: an Entroformer of one of the `contexts`.
        picture: a PIL image, a path or an array, see `codec.open_picture`.
        reference: an Entroformer without context; it is asked at the model's level. Whether it stands behind the same
            transforms is seen by the latents of this picture, which must be equal.

    Raises:
        AttentionError: another model; a reference with context, or with other latents.
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
    reference_name: str | None = None

    def __init__(self, model, picture, reference=None):
        attention_points(model)  # a sentence for what is no Entroformer
        c = self.config = model.config
        if c.context not in self.contexts:
            raise AttentionError(f"This model {KINDS[c.context]}; {self.offer}.")
        super().__init__(model, picture, torch.float64)
        self.kind, self.layers, self.heads = c.context, c.context_layers, c.heads
        self.reference_name, self._alone, self.expected = None, None, None
        if reference is not None:
            self._ask_reference(reference, picture)

    def _ask_reference(self, reference, picture) -> None:
        """Name of the reference, its bits of every latent, [n, M], and the latents that it expects, [1, M, h, w]."""
        c = reference.config
        if c.context != "none":
            raise AttentionError(f"A reference predicts from the hyperprior alone; this model {KINDS[c.context]}.")
        scene = Scene(reference, picture, torch.float64, self.level if c.lmbdas else None)
        if not torch.equal(scene.y_hat, self.y_hat):
            raise AttentionError(
                f"{scene.name} is no reference for {self.name}: it has other latents of this picture, "
                "so its transforms are others."
            )
        means, scales = scene.model.distributions(scene.y_hat, scene.hyper, rate=scene.rate)
        self.reference_name, self.expected = scene.name, means
        self._alone = -scene.model.gaussian(scene.y_hat, means, scales).log2()[0].flatten(1).T

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

    # -- answers --

    @abc.abstractmethod
    def overview(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Bits of every query, and `alone`, what they would be without context, or None: twice [n * slices]."""

    @abc.abstractmethod
    def many(self, queries: Sequence[int], k: int | None = None) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Many queries in batches: (queries [q], probs [q, layers, heads, n], facts [q, 2 + 5 groups]).

        A line of facts: bits and those of the reference (`alone`, see above), of the whole site, and of each channel
        group the five FACTS. What a model does not have is not a number there.
        """

    def row_and_facts(self, query: int, k: int | None = None) -> tuple[np.ndarray, dict]:
        """The attention of one query in all layers and heads, [layers, heads, n], and its `facts`.

        k: None for dense attention.
        """
        self.check(query, k)
        ((_, rows, lines),) = self.many([query], k)
        return rows[0], self._in_names(query, lines[0])

    def facts(self, query: int, k: int | None = None) -> dict:
        """The side panel: `bits` of the site with all context and `alone`, those of the reference; of each of the
        `groups` of channels how many `channels` it has, root mean squares of values, predicted means and scales,
        and bits. What a model does not have is None."""
        return self.row_and_facts(query, k)[1]

    def _in_names(self, query: int, line: np.ndarray) -> dict:
        """A line of facts of a query, with names."""
        bits, alone, *rest = (None if math.isnan(v) else v for v in line.tolist())
        parts = zip(self.channel_groups, np.reshape(rest, (-1, len(FACTS))).tolist(), strict=True)
        groups = [{"channels": len(group), **dict(zip(FACTS, part, strict=True))} for group, part in parts]
        return {"bits": bits, "alone": alone, "groups": groups}

    def _lines(self, values: Tensor, means: Tensor, scales: Tensor, bits: Tensor, alone: Tensor) -> np.ndarray:
        """Lines of facts of q sites.  All [q, M]  ->  [q, 2 + 5 groups]"""
        columns = [bits.sum(1), alone.sum(1)]
        for group in self.channel_groups:
            columns += [v[:, group].square().mean(1).sqrt() for v in (values, means, scales)]
            columns += [v[:, group].sum(1) for v in (bits, alone)]
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


def batches(items: Sequence[int]) -> Iterator[list[int]]:
    """Stretches of up to QUERIES_AT_ONCE."""
    for start in range(0, len(items), QUERIES_AT_ONCE):
        yield [int(i) for i in items[start : start + QUERIES_AT_ONCE]]
