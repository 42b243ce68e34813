"""What one latent of one picture looks at, what that saves in bits, and what each attended latent is worth to it.

    server = RowServer(load_model("tiny-parallel"), "photo.png")
    server.rows(site=100, k=32)  # [layers, heads, n]
    server.costs(site=100, k=32)  # positions, and what the absence of each costs in bits

The explorer and the studies of `studies.attention` stand on it.
"""

import copy
import functools
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from entroformer_lib.errors import AttentionError
from entroformer_lib.inspection.capture import POINTS, attention_points, capture
from entroformer_lib.inspection.wide_latents import wide_latents
from entroformer_lib.models.context import first_slice
from entroformer_lib.models.position import grid_sites
from entroformer_lib.models.priors import LIKELIHOOD_FLOOR, gaussian_mass

GROUPS = 6  # of channels, in the explorer's side panel
QUERIES_AT_ONCE = 128
TOKENS_AT_ONCE = 192  # of a serial model, when keys and values are computed
DENSE = 2**20  # a k above any number of keys
K_HELD = 8  # values of k for which keys and values are kept


@dataclass(frozen=True)
class Latent:
    """What the model knows about one site of y, and what it costs. Arrays are [M], one entry per channel."""

    values: np.ndarray  # y_hat
    means: np.ndarray  # with all context
    scales: np.ndarray
    bits: np.ndarray
    hyper_means: np.ndarray  # with the hyperprior alone
    hyper_scales: np.ndarray
    hyper_bits: np.ndarray


class RowServer:
    """Rows of attention for one picture: any latent, layer, head and k, without ever holding an [n, n] map.

    Sites are numbers in raster order on the latent grid of the *padded* picture: site = row * width + column.

    A model of variable rate is looked at as it is when the server is made: at the level that `codec.encode` would take.

    It runs a float64 copy of the entropy model; the coder's integers agree with it to about 15 bits. For each k, the
    tokens that serve as context go through all blocks once and leave their keys and values (n x 2D per layer); after
    that a latent costs a pass of a single token. Another k starts again from the first layer, as if the model had been
    built with that k.

    Which row belongs to which latent?

    Serial: the token of site i carries y_hat_i, and what it computes predicts site i + 1 (the shift). So the row of
    latent s is the row of token s - 1: it sees sites 0 to s - 1, and the offsets of its relative positions are counted
    from s - 1 (`origin`), which for the first column is the end of the row above. Latent 0 is predicted by a learned
    start token, has no row, and gets zeros.

    Parallel: latents with row + column odd (the first slice) are coded before there is any context. Those of the second
    slice see the whole first slice and themselves; a second-slice token carries no latent, only its place. A
    first-slice latent has a row too, because its token gathers context for the second pass, but its own bits do not
    depend on that row.

    Args:
        model: an Entroformer with a context model.
        picture: a PIL image, a path or an array, see `codec.open_picture`.

    Raises:
        AttentionError: a model without context model.
    """

    slices = 1  # of channels that are predicted one after the other; see `group_server` for more

    @torch.inference_mode()
    def __init__(self, model, picture):
        attention_points(model)  # a sentence for what is no Entroformer
        if model.config.context not in ("serial", "parallel"):
            what = {
                "none": "This model predicts from the hyperprior alone",
                "cnn": "The context of this model is a CNN",
            }
            words = what.get(model.config.context, "This model is a GroupedMixer, which attends in groups")
            raise AttentionError(f"{words}; rows of attention are those of serial and parallel models.")
        scene = wide_latents(model, picture)
        c = self.config = model.config
        self.name, self.picture, self.size = scene.name, scene.picture, scene.size
        self.kind = c.context
        self.layers, self.heads, self.radius, self.default_k = c.context_layers, c.heads, c.radius, c.top_k
        self._context, self._parameters = (
            copy.deepcopy(part).eval().double() for part in (model.context_model, model.entropy_parameters)
        )
        y_hat, self._rate = scene.y_hat, scene.rate
        self.height, self.width = y_hat.shape[-2:]
        self._values = y_hat[0].flatten(1).T  # [n, M], as they are coded
        self._seen = scene.seen[0].flatten(1).T  # [n, M], as the context model sees them
        self._hyper = None if scene.hyper is None else scene.hyper[0].flatten(1).T  # [n, D]
        self._sites = grid_sites(self.height, self.width, y_hat.device)
        self._first = first_slice(self.height, self.width, y_hat.device).flatten()
        self._held: OrderedDict[int, object] = OrderedDict()
        self._hyper_guess = self._guess(torch.arange(self.n, device=y_hat.device), None)

    # -- the grid --

    @property
    def n(self) -> int:
        """Number of latent sites."""
        return self.height * self.width

    def has_context(self, site: int) -> bool:
        """Whether the bits of a latent depend on other latents."""
        return site > 0 if self.kind == "serial" else not bool(self._first[site])

    def predicted(self) -> np.ndarray:
        """The sites whose bits depend on context, in raster order."""
        return np.array([site for site in range(self.n) if self.has_context(site)])

    def origin(self, site: int) -> int:
        """The site whose token predicts `site`: the one before in the serial model, itself in the parallel one."""
        return max(site - 1, 0) if self.kind == "serial" else site

    def visible(self, site: int) -> np.ndarray:
        """What the row of `site` may look at: bool [n]."""
        if self.kind == "serial":
            return np.arange(self.n) < site
        seen = self._first.cpu().numpy().copy()
        seen[site] = True
        return seen

    def decoded(self, site: int) -> np.ndarray:
        """What the decoder already knows when it comes to `site`: bool [n]."""
        if self.kind == "serial":
            return np.arange(self.n) < site
        known = self._first.cpu().numpy().copy()
        return known if self.has_context(site) else np.zeros_like(known)

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
        self._check(site, k)
        if point not in POINTS:
            raise AttentionError(f"There is no point '{point}'; there are {', '.join(POINTS)}.")
        empty = {"probs": 0.0, "scores": -np.inf, "selected": -np.inf}.get(point, np.nan)
        return self._look([site], k, point, empty)[1][0].cpu().numpy()

    def many(self, sites: Sequence[int], k: int | None) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Many latents in batches: (sites [q], probs [q, layers, heads, n], facts [q, 2 + 5 groups]).

        A line of facts: bits, bits with the hyperprior only, and of each channel group what `facts` says of it, in the
        order value, mean, scale, bits, hyper_bits.
        """
        for part in _parts(sites):
            feature, probs = self._look(part, k, "probs", 0.0)
            yield np.array(part), probs.cpu().numpy(), self._facts_of(part, feature)

    def latent(self, site: int, k: int | None) -> Latent:
        """Values, predictions and bits of one latent, with all context and with the hyperprior alone."""
        self._check(site, k)
        predicted = self._predict([site], self._look([site], k)[0])
        hyper = (part[[site]] for part in self._hyper_guess)
        return Latent(*(v[0].cpu().numpy() for v in (self._values[[site]], *predicted, *hyper)))

    def bits(self, k: int | None) -> dict[str, np.ndarray]:
        """Bits of every latent, summed over its channels: {"context": [h, w], "hyper": [h, w]}."""
        hyper = self._hyper_guess[2].sum(1)
        context = hyper.clone()
        for part in _parts(range(self.n) if self.kind == "serial" else self.predicted().tolist()):
            context[part] = self._cost_of(part, self._look(part, k)[0])
        return {
            name: v.view(self.height, self.width).cpu().numpy() for name, v in (("context", context), ("hyper", hyper))
        }

    def costs(self, site: int, k: int | None, positions: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """What the absence of each attended position costs this latent.

        The latent's own token is forbidden to look at the position, in all layers and heads at once; the top-k then
        takes the next best key. Other tokens may still have looked at it, so what reached the latent through them
        stays. The token's own place is left out: what it carries does not come to it by attention.

        Args:
            positions: sites to hide; by default all that some head of some layer attends to.

        Returns:
            positions [J], bits [J]: positive where the absence makes the latent dearer.
        """
        self._check(site, k)
        if not self.has_context(site):
            return np.empty(0, dtype=np.int64), np.empty(0)
        if positions is None:
            attended = self.rows(site, k).max((0, 1)) > 0
            attended[self.origin(site)] = False
            positions = attended.nonzero()[0]
        positions = np.asarray(positions, dtype=np.int64)
        usual = float(self._cost_of([site], self._look([site], k)[0]))
        bits = [np.empty(0)]
        for part in _parts(positions):
            sites = [site] * len(part)
            bits.append(self._cost_of(sites, self._look(sites, k, hide=part)[0]).cpu().numpy() - usual)
        return positions, np.concatenate(bits)

    @torch.inference_mode()
    def total_bits(self, k: int | None, without: tuple[int, int] | None = None) -> float:
        """Bits of all of y; `without`: (layer, head) whose output is set to zero in every token."""
        if without is None:
            return float(self.bits(k)["context"].sum())
        layer, head = without
        self.check_layer(layer, head)
        width = self.config.dim // self.heads

        def silence(module, inputs):
            joined = inputs[0].clone()
            joined[..., head * width : (head + 1) * width] = 0
            return (joined,)

        held, self._held = self._held, OrderedDict()
        hook = self._context.stack.blocks[layer].attention.out.register_forward_pre_hook(silence)
        try:
            return float(self.bits(k)["context"].sum())
        finally:
            hook.remove()
            self._held = held

    @functools.cached_property
    def channel_groups(self) -> list[np.ndarray]:
        """Channels in groups of equal size, from those with the largest values in this picture to the smallest."""
        order = self._values.abs().mean(0).argsort(descending=True, stable=True).cpu().numpy()
        return [np.sort(group) for group in np.array_split(order, min(GROUPS, len(order)))]

    def facts(self, site: int, k: int | None) -> dict:
        """The side panel: bits with all context and with the hyperprior only, and per channel group root mean squares
        of values, predicted means and scales, and bits."""
        return self.row_and_facts(site, k)[1]

    def row_and_facts(self, site: int, k: int | None) -> tuple[np.ndarray, dict]:
        """`rows` (the probabilities, [layers, heads, n]) and `facts` of one latent in a single pass."""
        self._check(site, k)
        feature, probs = self._look([site], k, "probs", 0.0)
        bits, hyper_bits, *rest = self._facts_of([site], feature)[0].tolist()
        names = ("value", "mean", "scale", "bits", "hyper_bits")
        groups = [
            {"channels": len(group), **dict(zip(names, rest[5 * i : 5 * i + 5], strict=True))}
            for i, group in enumerate(self.channel_groups)
        ]
        return probs[0].cpu().numpy(), {"bits": bits, "hyper_bits": hyper_bits, "groups": groups}

    def _facts_of(self, sites: Sequence[int], feature: Tensor) -> np.ndarray:
        means, scales, bits = self._predict(sites, feature)
        hyper_bits = self._hyper_guess[2][list(sites)]
        columns = [bits.sum(1), hyper_bits.sum(1)]
        for group in self.channel_groups:
            for v in (self._values[list(sites)], means, scales):
                columns.append(v[:, group].square().mean(1).sqrt())
            columns += [bits[:, group].sum(1), hyper_bits[:, group].sum(1)]
        return torch.stack(columns, dim=1).cpu().numpy()

    @staticmethod
    def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
        """`spearman`, for views, which know of no study."""
        return spearman(a, b)

    def check_layer(self, layer: int, head: int = 0) -> None:
        """`check_layer` of this server."""
        check_layer(self, layer, head)

    # -- how --

    def _check(self, site: int, k: int | None) -> None:
        if not 0 <= site < self.n:
            raise AttentionError(
                f"There is no latent {site}; the grid has {self.height} x {self.width}, so 0 to {self.n - 1}."
            )
        if k is not None and k < 1:
            raise AttentionError(f"k must be at least 1, or None for dense attention; it is {k}.")

    def _carriers(self) -> Tensor:
        """Sites whose tokens serve as context."""
        return self._first.nonzero()[:, 0] if self.kind == "parallel" else torch.arange(self.n)

    @torch.inference_mode()
    def _memory(self, k: int | None):
        """Keys and values of all context tokens in every layer, with this k."""
        stack = self._context.stack
        stack.top_k = min(k or DENSE, DENSE)  # our own copy: nobody else sees it
        for block in stack.blocks:
            block.attention.top_k = stack.top_k
        if stack.top_k not in self._held:
            carriers = self._carriers()
            tokens, sites = self._context.embed(self._seen[carriers])[None], self._sites[carriers]
            memory = stack.memory(len(carriers))
            if self.kind == "parallel":
                stack.remember(tokens, sites, memory)
            else:  # in stretches, because a token sees only earlier ones: half the scores
                numbers = carriers.to(tokens.device)
                for part in numbers.split(TOKENS_AT_ONCE):
                    seen = numbers[: part[-1] + 1]
                    stack(tokens[:, part], sites[seen], lambda i, seen=seen: seen <= i[:, None], memory)
            for part in memory:
                part.apart = True
            self._held[stack.top_k] = memory
            while len(self._held) > K_HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(stack.top_k)
        return self._held[stack.top_k]

    @torch.inference_mode()
    def _look(
        self, sites: Sequence[int], k: int | None, point: str | None = None, empty: float = 0.0, hide=None
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens that predict some latents, each seeing the context and itself, apart from each other.

        Args:
            point: what to read.
            empty: stands where there is nothing.
            hide: one position per query that it may not see.

        Returns:
            context features [q, D], and the rows of `point` [q, layers, heads, n] or None.
        """
        memory, carriers, stack = self._memory(k), self._carriers(), self._context.stack
        device = carriers.device
        own = torch.tensor([self.origin(site) for site in sites], device=device)
        values = self._seen[own]
        if self.kind == "parallel":
            values = values * self._first[own, None]  # the second slice enters as zero
        # The last column is a query's own key; in the first slice it is among the others.
        mask = torch.ones(len(sites), len(carriers) + 1, dtype=torch.bool, device=device)
        if self.kind == "serial":
            mask[:, :-1] = carriers < own[:, None]
        else:
            mask[:, -1] = ~self._first[own]
        if hide is not None:
            mask[:, :-1] &= carriers != torch.as_tensor(hide, device=device)[:, None]
        points = () if point is None else (f"context.*.{point}",)
        with capture(_Holder(self._context), *points) as maps:
            places = torch.cat((self._sites[carriers], self._sites[own]))
            visible = lambda i: mask[i - len(carriers)]  # noqa: E731
            feature = stack(self._context.embed(values)[None], places, visible, memory)
        feature = feature[0]
        rows = None if point is None else self._on_grid(maps, point, mask, carriers, own, empty)
        if self.kind == "serial":  # the first latent is predicted by the start token and has no row
            start = torch.tensor(sites, device=device) == 0
            feature = torch.where(start[:, None], self._context.start[0], feature)
            rows = None if rows is None else rows.masked_fill(start[:, None, None, None], empty)
        return feature, rows

    def _on_grid(self, maps, point: str, mask: Tensor, carriers: Tensor, own: Tensor, empty: float) -> Tensor:
        """Columns of the maps at their sites: [q, layers, heads, n]."""
        stacked = torch.stack([maps[f"context.{layer}.{point}"][0] for layer in range(self.layers)])
        stacked = stacked.permute(2, 0, 1, 3)  # [q, layers, heads, columns]
        columns = stacked.size(-1)
        grid = stacked.new_full((*stacked.shape[:3], self.n), empty)
        seen = stacked.masked_fill(~mask[:, None, None, :columns], empty)
        grid[..., carriers] = seen[..., : len(carriers)]
        if columns > len(carriers):  # the column of the own key, where it is in use
            here = mask[:, -1].nonzero()[:, 0]
            grid[here, :, :, own[here]] = seen[here, :, :, -1]
        return grid

    @torch.inference_mode()
    def _guess(self, sites: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Means, scales and bits of some sites: three times [q, M].  context: [q, D] or None"""
        hyper = None if self._hyper is None else self._hyper[sites].T[None, :, :, None]
        feature = None if context is None else context.T[None, :, :, None]
        if hyper is None and feature is None:
            feature = self._values.new_zeros(1, self.config.dim, len(sites), 1)
        if self._rate is not None:
            hyper = self._rate.vector.expand(-1, -1, len(sites), -1) if hyper is None else hyper + self._rate.vector
        means, log_scales = self._parameters(hyper, feature)
        if self._rate is not None:
            means, log_scales = means * self._rate.gain, log_scales + self._rate.log_gain
        means, scales = (v[0, :, :, 0].T for v in (means, self._parameters.bounded(log_scales).exp()))
        mass = gaussian_mass(self._values[sites], means, scales).clamp(min=LIKELIHOOD_FLOOR)
        return means, scales, -mass.log2()

    def _predict(self, sites: Sequence[int], feature: Tensor) -> tuple[Tensor, ...]:
        """`_guess` with the context feature, where the coder has one, and without it in the first slice."""
        sites = torch.tensor(list(sites))
        guess = self._guess(sites, feature)
        if self.kind == "serial":
            return guess
        first = self._first[sites][:, None]
        return tuple(torch.where(first, alone[sites], g) for alone, g in zip(self._hyper_guess, guess, strict=True))

    def _cost_of(self, sites: Sequence[int], feature: Tensor) -> Tensor:
        """Bits of some latents, summed over channels: [q]."""
        return self._predict(sites, feature)[2].sum(1)


def check_layer(server, layer: int, head: int = 0) -> None:
    """A sentence for a layer or head that a server does not have.

    Raises:
        AttentionError: with what there is.
    """
    if not 0 <= layer < server.layers:
        raise AttentionError(f"There is no layer {layer}; this model's context has layers 0 to {server.layers - 1}.")
    if not 0 <= head < server.heads:
        raise AttentionError(f"There is no head {head}; this model has heads 0 to {server.heads - 1}.")


def _parts(items: Sequence[int]) -> Iterator[list[int]]:
    """Stretches of up to QUERIES_AT_ONCE."""
    for start in range(0, len(items), QUERIES_AT_ONCE):
        yield [int(i) for i in items[start : start + QUERIES_AT_ONCE]]


@dataclass(frozen=True)
class _Holder:
    """A context model in the place where `capture` looks for one."""

    context_model: torch.nn.Module


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; not a number where one does not vary."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(pd.Series(a).rank(), pd.Series(b).rank())[0, 1])
