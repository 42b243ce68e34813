"""What one latent of one picture looks at in a serial or parallel model, what that saves in bits, and what each
attended latent is worth to it.

    server = RowServer(load_model("blocks-parallel"), "photo.png")
    server.rows(site=100, k=32)  # [layers, heads, n]
    server.costs(site=100, k=32)  # positions, and what the absence of each costs in bits
"""

import copy
import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from entroformer_lib.errors import AttentionError
from entroformer_lib.inspection.capture import POINTS, capture, intervene
from entroformer_lib.inspection.picture_server import PictureServer, batches
from entroformer_lib.models.attention import KVCache
from entroformer_lib.models.context import Gaps, first_slice
from entroformer_lib.models.entropy_model import PerSite, ToldTheRate
from entroformer_lib.models.position import grid_sites

GROUPS = 6  # of channels, in the explorer's side panel
TOKENS_AT_ONCE = 192  # of a serial model, when keys and values are computed
K_HELD = 8  # values of k for which keys and values are kept
EMPTY = {"probs": 0.0, "scores": -np.inf, "selected": -np.inf}  # where a row sees nothing; else not a number


class RowServer(PictureServer):
    """Rows of attention for one picture: any latent, layer, head and k, without ever holding an [n, n] map.

    For each k, the tokens that serve as context go through all blocks once and leave their keys and values (n x 2D per
    layer); after that a latent costs a pass of a single token. Another k starts again from the first layer, as if the
    model had been built with that k.

    Which row belongs to which latent?

    Serial: the token of site i carries y_hat_i, and what it computes predicts site i + 1 (the shift). So the row of
    latent s is the row of token s - 1: it sees sites 0 to s - 1, and the offsets of its relative positions are counted
    from s - 1 (`origin`), which for the first column is the end of the row above. Latent 0 is predicted by a learned
    start token, has no row, and gets zeros.

    Parallel: latents with row + column odd (the first slice) are coded before there is any context. Those of the second
    slice see the whole first slice and themselves; a second-slice token carries no latent, only its place. A
    first-slice latent has a row too, because its token gathers context for the second pass, but its own bits do not
    depend on that row.
    """

    family, contexts = "rows", ("serial", "parallel")
    offer = "rows of attention are those of serial and parallel models"

    @torch.inference_mode()
    def __init__(self, model, picture, reference=None):
        super().__init__(model, picture, reference)
        for block in self.model.context_model.stack.blocks:  # of the copy
            block.attention.scores.register_forward_hook(_even)
        self.radius, self.default_k = self.config.radius, self.model.context_k
        self.row_entries = self.default_k
        self.causal, device = self.kind == "serial", self.y_hat.device
        self._sites = grid_sites(self.height, self.width, device)
        first = first_slice(self.height, self.width, device).flatten()
        self._carrier = torch.ones_like(first) if self.causal else first  # whose tokens serve as context
        self._carriers = self._carrier.nonzero()[:, 0]
        self.when = np.arange(self.n) if self.causal else (~first).int().cpu().numpy()
        seen = self.y_hat if self.rate is None else self.y_hat * self.rate.inverse
        self._seen = seen[0].flatten(1).T * self._carrier[:, None]  # [n, M], as the tokens carry them
        self._values = self.y_hat[0].flatten(1).T  # [n, M], as they are coded
        order = self._values.abs().mean(0).argsort(descending=True, stable=True).cpu().numpy()
        self.channel_groups = [np.sort(group) for group in np.array_split(order, min(GROUPS, len(order)))]
        self.keys_and_values = functools.lru_cache(K_HELD)(self._keys_and_values)
        if self._alone is None:  # this model with its context switched off
            nothing = self._seen.new_zeros(self.n, self.config.dim)
            means, _, self._alone = self._gaussians(range(self.n), nothing)
            self.expected = means.T.reshape(self.y_hat.shape)

    # -- the grid --

    def predicted(self) -> np.ndarray:
        """The sites whose bits depend on context, in raster order."""
        return self.when.nonzero()[0]

    def origin(self, site: int) -> int:
        """The site whose token predicts `site`: the one before in the serial model, itself in the parallel one."""
        return max(site - self.causal, 0)

    def visible(self, site: int) -> np.ndarray:
        """What the row of `site` may look at: bool [n]."""
        seen = self._carrier.cpu().numpy() & ((np.arange(self.n) < site) | (not self.causal))
        seen[site] |= not self.causal
        if self.model.search_window is not None:
            offsets = (self._sites - self._sites[self.origin(site)]).abs().amax(1).cpu().numpy()
            seen &= offsets <= self.model.search_window
        return seen

    # -- answers --

    def rows(self, site: int, k: int | None, point: str = "probs") -> np.ndarray:
        """One latent's row in every layer and head.

        Args:
            k: None for dense attention.
            point: `probs` (0 where not visible), or `scores`, `selected` (-inf where not), `content`, `position` (the
                two parts of the score; not a number where not visible, and for the token's own place).

        Returns:
            [layers, heads, n]
        """
        self.check(site, k)
        if point not in POINTS:
            raise AttentionError(f"There is no point '{point}'; there are {', '.join(POINTS)}.")
        return self._look([site], k, point)[1][0].cpu().numpy()

    def many(self, queries: Sequence[int], k: int | None = None) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Many latents in batches, see `PictureServer.many`."""
        for part in batches(queries):
            feature, rows, _ = self._look(part, k, "probs")
            lines = self._lines(self._values[part], *self._gaussians(part, feature), self._alone[part])
            yield part, rows.cpu().numpy(), lines

    def predict(
        self, sites: Sequence[int], k: int | None, hide: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Means, scales and bits of some latents with all context: three times [q, M].

        hide: one position for each of them that it may not see.
        """
        return self._gaussians(sites, self._look(sites, k, hide=hide)[0])

    def bits(self, k: int | None) -> dict[str, np.ndarray]:
        """Bits of every latent, summed over its channels: {"context": [h, w], "alone": [h, w]}; see `PictureServer` for
        `alone`."""
        context = torch.cat([self.predict(part, k)[2].sum(1) for part in batches(range(self.n))])
        found = {"context": context, "alone": self._alone.sum(1)}
        return {name: v.view(self.height, self.width).cpu().numpy() for name, v in found.items()}

    def overview(self) -> tuple[np.ndarray, np.ndarray]:
        """Bits of every latent with the model's own k, and `alone`, without context: twice [n]."""
        bits = self.bits(self.default_k)
        return bits["context"].ravel(), bits["alone"].ravel()

    def costs(self, site: int, k: int | None) -> tuple[np.ndarray, np.ndarray]:
        """What the absence of each attended position costs this latent.

        The latent's own token is forbidden to look at the position, in all layers and heads at once; the top-k then
        takes the next best key. Other tokens may still have looked at it, so what reached the latent through them
        stays. The token's own place is left out: what it carries does not come to it by attention.

        Returns:
            positions [J], that some head of some layer attends to; bits [J]: positive where the absence makes the
            latent more expensive.
        """
        self.check(site, k)
        ((_, _, positions, bits),) = self.many_costs([site], k)
        return positions, bits

    def many_costs(
        self, sites: Sequence[int], k: int | None
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """The rows and `costs` of many latents, quicker than one by one: (site, probs [layers, heads, n], positions
        [J], bits [J]).

        A latent's token is the same without a position as with it up to the first layer where some head attends to it;
        so it goes on from there.
        """
        for part in batches(sites):
            feature, rows, inputs = self._look(part, k, "probs")
            usual = self._gaussians(part, feature)[2].sum(1)
            rows, own = rows.cpu().numpy(), np.arange(len(part))
            attended = rows.max(2) > 0  # [q, layers, n]
            attended[own, :, [self.origin(site) for site in part]] = False
            attended &= np.array([self.has_context(site) for site in part])[:, None, None]
            which, positions = attended.any(1).nonzero()
            first, bits = attended[which, :, positions].argmax(1), np.empty(len(which))
            for layer, inside in enumerate(inputs):
                for pairs in batches((first == layer).nonzero()[0]):
                    queries = [part[q] for q in which[pairs]]
                    feature, _, _ = self._look(queries, k, None, positions[pairs], inside[which[pairs]], layer)
                    more = self._gaussians(queries, feature)[2].sum(1) - usual[which[pairs]]
                    bits[pairs] = more.cpu().numpy()
            ends = np.searchsorted(which, own[1:])
            yield from zip(part, rows, np.split(positions, ends), np.split(bits, ends), strict=True)

    @torch.inference_mode()
    def total_bits(self, k: int | None, without: tuple[int, int] | None = None) -> float:
        """Bits of all of y; `without`: (layer, head) whose output is set to zero in every token."""
        if without is None:
            return float(self.bits(k)["context"].sum())
        layer, head = without
        self.check_layer(layer, head)
        self.keys_and_values.cache_clear()
        try:
            with intervene(
                self.model, {f"context.{layer}.outputs": lambda tile, heads, _: tile * (heads != head)[:, None, None]}
            ):
                return self.total_bits(k)
        finally:
            self.keys_and_values.cache_clear()

    # -- how --

    def _stack(self, k: int | None):
        """The blocks, with this k. They are our own copy: nobody else sees the change."""
        self.model.context_k = k or None
        return self.model.context_model.stack

    @torch.inference_mode()
    def _keys_and_values(self, k: int | None):
        """Keys and values of all context tokens in every layer, with this k. `keys_and_values` keeps some of them."""
        stack, carriers = self._stack(k), self._carriers
        tokens, sites = self.model.context_model.embed(self._seen[carriers])[None], self._sites[carriers]
        cache = stack.cache(len(carriers))
        if self.causal:  # in stretches, because a token sees only earlier ones: half the scores
            for part in carriers.split(TOKENS_AT_ONCE):
                seen = carriers[: part[-1] + 1]
                stack(tokens[:, part], sites[seen], lambda i, seen=seen: seen <= i[:, None], cache)
        elif len(carriers):  # a single site has no first slice
            stack.remember(tokens, sites, cache)
        for part in cache:
            part.closed = True
        return cache

    @torch.inference_mode()
    def _look(
        self,
        sites: Sequence[int],
        k: int | None,
        point: str | None = None,
        hide: Sequence[int] | None = None,
        x: Tensor | None = None,
        layer: int = 0,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """The tokens that predict some latents, each seeing the context and itself, apart from each other.

        Args:
            point: what to read.
            hide: one position for each that it may not see.
            x, layer: the tokens as they come into a layer [q, D], to go on from there.

        Returns:
            context features [q, D], the rows of `point` [q, layers, heads, n] or None, and the tokens as they come into
            each layer, [q, D].
        """
        cache, stack = self.keys_and_values(k), self._stack(k)
        carriers, device = self._carriers, self._seen.device
        own = torch.tensor([self.origin(site) for site in sites], device=device)
        if self.causal:  # no key behind the last token is seen
            carriers = carriers[: max(int(own.max()), 1)]
            cache = [_first(part, len(carriers)) for part in cache]
        # The last column is a token's own key, which in a first slice is among the others.
        mask = torch.ones(len(sites), len(carriers) + 1, dtype=torch.bool, device=device)
        if self.causal:
            mask[:, :-1] = carriers < own[:, None]
        else:
            mask[:, -1] = ~self._carrier[own]
        if hide is not None:
            mask[:, :-1] &= carriers != torch.as_tensor(hide, device=device)[:, None]
        with capture(self.model, *(() if point is None else (f"context.*.{point}",))) as maps:
            places = torch.cat((self._sites[carriers], self._sites[own]))
            x = self.model.context_model.embed(self._seen[own]) if x is None else x
            inputs = []
            for one in range(layer, self.layers):
                inputs.append(x)
                x = stack(x[None], places, lambda i: mask[i - len(carriers)], cache, range(one, one + 1))[0]
        without = torch.tensor([not self.has_context(site) for site in sites], device=device)[:, None]
        feature = torch.where(without, self.model.context_model.start[0] if self.causal else 0.0, x)
        if point is None:
            return feature, None, inputs
        if self.causal:  # the first latent is predicted by the start token and has no row
            mask &= ~without
        return feature, self._on_grid(maps, point, mask, carriers, own), inputs

    def _on_grid(self, maps, point: str, mask: Tensor, carriers: Tensor, own: Tensor) -> Tensor:
        """Columns of the maps at their sites: [q, layers, heads, n]."""
        empty = EMPTY.get(point, np.nan)
        stacked = torch.stack([maps[f"context.{layer}.{point}"][0] for layer in range(self.layers)])
        stacked = stacked.permute(2, 0, 1, 3)  # [q, layers, heads, columns]
        columns = stacked.size(-1)
        seen = stacked.masked_fill(~mask[:, None, None, :columns], empty)
        grid = stacked.new_full((*stacked.shape[:3], self.n), empty)
        grid[..., carriers] = seen[..., : len(carriers)]
        if columns > len(carriers):  # the column of the own key, where it is in use
            here = mask[:, -1].nonzero()[:, 0]
            grid[here, :, :, own[here]] = seen[here, :, :, -1]
        return grid

    @torch.inference_mode()
    def _gaussians(self, sites: Sequence[int], feature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means, scales and bits of some latents: three times [q, M].  feature: what the context says, [q, D]"""
        sites = torch.as_tensor(sites)
        predictor = PerSite(_Said(feature.T[None, :, :, None]), self.model.entropy_parameters)
        predictor = predictor if self.rate is None else ToldTheRate(predictor, self.rate)
        hyper = None if self.hyper is None else self.hyper.flatten(2)[:, :, sites, None]  # [1, D, q, 1]
        values = self.y_hat.flatten(2)[:, :, sites, None]  # [1, M, q, 1]
        means, log_scales = predictor.predict(values, hyper)
        scales = self.model.entropy_parameters.bounded(log_scales).exp()
        bits = -self.model.gaussian(values, means, scales).log2()
        return tuple(v[0, :, :, 0].T for v in (means, scales, bits))


def _even(layer, inputs, scores: Tensor) -> Tensor:
    """Scores that differ by rounding alone become equal, so that they stay among the k best together, however many
    latents are asked at once."""
    return torch.round(scores * 2**36) / 2**36


def _first(cache: KVCache, length: int) -> KVCache:
    """The same keys and values, of the first so many tokens."""
    shorter = copy.copy(cache)
    shorter.length = length
    return shorter


class _Said:
    """In the place of a context model: the features that it would give."""

    one_by_one = False

    def __init__(self, feature: Tensor):
        self.feature = feature

    def __call__(self, y_hat: Tensor, gaps: Gaps) -> Tensor:
        return self.feature
