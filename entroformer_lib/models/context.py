"""Context models: what the latents decoded so far say about the next ones.

Serial (section 3.1): sites in raster order, each sees those before it. Parallel (section 3.4, Figure 4): a
checkerboard, its first half known from the hyperprior alone, its second half sees all of the first.

CNN (the baseline of Table 1): a masked 5x5 convolution in the place of the serial transformer.

All offer `forward`, which computes the features of all sites at once, for training and for study, and `code`, the
steps that encoder and decoder take together. In `code` a callback `exchange(sites, hyper, context)` stands for the
entropy coder: it turns the features of some sites into their latents, either by decoding them or, in the encoder, by
writing down those it knows. Both sides run the same lines, so they cannot come apart.

`forward` also takes `missing`: sites whose latents nobody may use. Their token enters as zero and no other token sees
it, in any layer; they are still predicted. (Hiding an offset from every query instead, layer by layer, does not hide
it: other tokens have seen the latent and pass it on, and in the serial model the query's own token carries the latent
before its site.) `features` computes the same without gradients in half of the work, for studies of missing sites.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entroformer_lib.models.attention import Stack, UpToItself
from entroformer_lib.models.clock import stage, tell
from entroformer_lib.models.config import EntroformerConfig
from entroformer_lib.models.position import grid_sites

PART = 192  # tokens that `features` of the serial model takes at a time

# exchange(site numbers [k], context features [1, D, k, 1] or None where there is no context) -> y_hat: [k, M]
Exchange = Callable[[Tensor, Tensor | None], Tensor]


def first_slice(height: int, width: int, device=None) -> Tensor:
    """Sites coded in the first pass of the parallel model, those with row + column odd: bool [height, width]."""
    return grid_sites(height, width, device).sum(-1).remainder(2).bool().view(height, width)


class SerialContext(nn.Module):
    """Causal context model: the feature of site i depends on the latents of the sites before i.

    The mask lets token i see itself, because token i *carries* y_hat_i. The outputs are then shifted by one: what
    token i - 1 has computed predicts y_hat_i, and a learned start token predicts the first. Without the shift the model
    would predict each latent from itself (somebody "reached" 39 dB at 0.17 bpp that way).

    y_hat: [B, M, h, w]  ->  context feature: [B, D, h, w]
    """

    def __init__(self, c: EntroformerConfig):
        super().__init__()
        self.embed = nn.Linear(c.M, c.dim)
        self.start = nn.Parameter(torch.zeros(1, 1, c.dim))
        nn.init.trunc_normal_(self.start, std=0.02)
        self.stack = Stack(c, c.context_layers, c.top_k, c.radius)

    def forward(self, y_hat: Tensor, kept: Tensor | None = None, missing: Tensor | None = None) -> Tensor:
        """kept: bool [B, 1, h, w], for the random-mask pretraining (A.5). Latents that are not kept enter as zero and
        get no context feature: the hyperprior alone predicts them. missing: bool [B, 1, h, w], see above."""
        B, M, h, w = y_hat.shape
        if kept is not None:
            y_hat = y_hat * kept
        if missing is not None:
            y_hat = y_hat * ~missing
        tokens = self.embed(y_hat.flatten(2).transpose(1, 2))  # [B, n, D]
        number = torch.arange(h * w, device=y_hat.device)
        tokens = self.stack(tokens, grid_sites(h, w, y_hat.device), visible=_causal(number, missing))
        feature = self._shifted(tokens, h, w)
        return feature if kept is None else feature * kept

    def _shifted(self, tokens: Tensor, h: int, w: int) -> Tensor:
        """tokens: [B, n, D] after all blocks  ->  context feature: [B, D, h, w]"""
        feature = torch.cat((self.start.expand(len(tokens), -1, -1), tokens[:, :-1]), dim=1)
        return feature.transpose(1, 2).reshape(len(tokens), -1, h, w)

    @torch.no_grad()
    def features(self, y_hat: Tensor, missing: Tensor | None = None) -> Tensor:
        """`forward` in half of the work: a few rows of tokens at a time, with the keys up to them alone. In integers
        it gives the bits that the steps of `code` give, so an encoder, which knows all latents, need not take them.

        y_hat: [B, M, h, w], missing: bool [B, 1, h, w]  ->  context feature: [B, D, h, w]
        """
        B, M, h, w = y_hat.shape
        if missing is not None:
            y_hat = y_hat * ~missing
        tokens = self.embed(y_hat.flatten(2).transpose(1, 2))
        sites, number = grid_sites(h, w, y_hat.device), torch.arange(h * w, device=y_hat.device)
        cache, done = self.stack.cache(B, h * w), []
        for part in tokens.split(PART, dim=1):
            end = cache.length + part.size(1)
            visible = _causal(number[:end], None if missing is None else missing.flatten(2)[..., :end])
            done.append(self.stack(part, sites[:end], visible=visible, cache=cache))
            tell("sites", end, h * w)
        return self._shifted(torch.cat(done, dim=1), h, w)

    def code(self, height: int, width: int, exchange: Exchange) -> Tensor:
        """One site at a time, keys and values of earlier sites cached.  ->  y_hat: [n, M]"""
        sites = grid_sites(height, width, self.start.device)
        cache = self.stack.cache(batch=1, capacity=len(sites))
        feature = self.start  # [1, 1, D]
        coded = []
        for i in range(len(sites)):
            coded.append(exchange(torch.tensor([i]), feature.transpose(1, 2)[..., None]))  # [1, M]
            if i + 1 < len(sites):  # the last token predicts nothing
                with stage("context"):
                    feature = self.stack(self.embed(coded[-1])[None], sites[: i + 1], cache=cache)
            tell("sites", i + 1, len(sites))
        return torch.cat(coded)


class ParallelContext(nn.Module):
    """Two-pass bidirectional context model on a checkerboard (Figure 4).

    Only first-slice sites (row + column odd) carry their latent; the second slice enters as zero. Every site sees the
    whole first slice, before and after it, and itself. Features are kept at the second slice and zero at the first,
    which is coded before there is any context.

    y_hat: [B, M, h, w]  ->  context feature: [B, D, h, w]
    """

    def __init__(self, c: EntroformerConfig):
        super().__init__()
        self.M = c.M
        self.embed = nn.Linear(c.M, c.dim)
        self.stack = Stack(c, c.context_layers, c.top_k, c.radius)

    def forward(
        self,
        y_hat: Tensor,
        kept: Tensor | None = None,
        missing: Tensor | None = None,
        one_way: Tensor | None = None,
    ) -> Tensor:
        """kept: bool [B, 1, h, w], the sites that serve as context instead of the checkerboard's; for the random-mask
        pretraining (A.5, carried over to the parallel model: the kept half is predicted by the hyperprior alone).
        missing: bool [B, 1, h, w], see above. one_way: bool [B], pictures of which each site sees only those context
        sites that stand before it in raster order, for the comparison of Table 3; the coder never does that."""
        B, M, h, w = y_hat.shape
        if kept is None:
            kept = first_slice(h, w, y_hat.device).expand(1, 1, h, w)
        known = kept if missing is None else kept & ~missing
        tokens = self.embed((y_hat * known).flatten(2).transpose(1, 2))  # [B, n, D]
        number = torch.arange(h * w, device=y_hat.device)
        context = known.flatten(2)[:, :, None]  # [B or 1, 1, 1, n]
        both_ways = None if one_way is None else ~one_way[:, None, None, None]  # [B, 1, 1, 1]

        def visible(i: Tensor) -> Tensor:
            seen = context if both_ways is None else context & (both_ways | (number < i[:, None]))
            return seen | (number == i[:, None])

        tokens = self.stack(tokens, grid_sites(h, w, y_hat.device), visible=visible)
        return tokens.transpose(1, 2).reshape(B, -1, h, w) * ~kept

    @torch.no_grad()
    def features(self, y_hat: Tensor, missing: Tensor) -> Tensor:
        """`forward` in half of the work: first slice, then second, as in `code`. Zero at the first slice.

        y_hat: [B, M, h, w], missing: bool [B, 1, h, w]  ->  context feature: [B, D, h, w]
        """
        B, M, h, w = y_hat.shape
        first, sites = first_slice(h, w, y_hat.device).flatten(), grid_sites(h, w, y_hat.device)
        one, two = first.nonzero()[:, 0], (~first).nonzero()[:, 0]
        known = ~missing.flatten(2)[..., one]  # [B, 1, first slice]
        tokens = self.embed((y_hat.flatten(2)[..., one] * known).transpose(1, 2))
        number, context = torch.arange(len(one), device=y_hat.device), known[:, :, None]
        cache = self.stack.cache(B, len(one))
        if len(one):  # a single site has no first slice
            self.stack.fill(tokens, sites[one], cache, visible=lambda i: context | (number == i[:, None]))
        unknown = self.embed(y_hat.new_zeros(B, len(two), M))
        context = F.pad(context, (0, 1), value=True)  # and each sees itself
        tokens = self.stack(unknown, sites[torch.cat((one, two))], visible=lambda i: context, cache=cache, apart=True)
        feature = tokens.new_zeros(B, tokens.size(-1), h * w)
        feature[..., two] = tokens.transpose(1, 2)
        return feature.view(B, -1, h, w)

    def code(self, height: int, width: int, exchange: Exchange) -> Tensor:
        """Two passes: the first slice without context, then all of the second at once.  ->  y_hat: [n, M]

        No site of the first slice sees one of the second, so the first slice runs through the blocks alone and leaves
        its keys and values; the second reads them. That is half of what `forward` computes.
        """
        first = first_slice(height, width).flatten()
        one, two = first.nonzero()[:, 0], (~first).nonzero()[:, 0]
        like = next(itertools.chain(self.embed.parameters(), self.embed.buffers()))
        dtype = like.dtype if like.is_floating_point() else torch.float32
        sites = grid_sites(height, width, like.device)
        latents = torch.zeros(height * width, self.M, device=like.device, dtype=dtype)
        cache = self.stack.cache(batch=1, capacity=len(one))
        if len(one):  # a single site has no first slice
            latents[one] = exchange(one, None)
            with stage("context"):
                self.stack.fill(self.embed(latents[one])[None], sites[one], cache)
        with stage("context"):
            unknown = self.embed(latents[two])[None]  # zeros, so this is the bias
            feature = self.stack(unknown, sites[torch.cat((one, two))], cache=cache, apart=True)  # [1, n - n / 2, D]
        latents[two] = exchange(two, feature.transpose(1, 2)[..., None])
        return latents


def _causal(number: Tensor, missing: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Token i sees those up to itself; of the missing ones only itself.  number: [n],
    missing: [B, 1, h, w] or [B, 1, n] or None"""
    if missing is None:
        return UpToItself(len(number))
    there = ~missing.flatten(2)[:, :, None]  # [B, 1, 1, n]
    return lambda i: (number < i[:, None]) & there | (number == i[:, None])


class CnnContext(nn.Module):
    """The context model of Minnen et al. 2018: a 5x5 convolution that sees the 12 sites before its own.

    The baseline of Table 1. It computes what CompressAI's `MaskedConv2d` does, but holds only the 12 taps in use, as a
    linear layer: the coder takes one site at a time, and no optimizer sees hidden taps. It stands in the transformer's
    place, so its feature has D channels (Minnen: 2 M).

    y_hat: [B, M, h, w]  ->  context feature: [B, D, h, w]
    """

    def __init__(self, c: EntroformerConfig):
        super().__init__()
        self.M = c.M
        self.taps = nn.Linear(12 * c.M, c.dim)  # channel by channel, each in raster order

    def forward(self, y_hat: Tensor, kept: Tensor | None = None, missing: Tensor | None = None) -> Tensor:
        """kept, missing: bool [B, 1, h, w], see SerialContext; a missing latent enters as zero, as the border does."""
        if kept is not None:
            y_hat = y_hat * kept
        if missing is not None:
            y_hat = y_hat * ~missing
        kernel = F.pad(self.taps.weight.unflatten(1, (self.M, 12)), (0, 13)).unflatten(2, (5, 5))  # [D, M, 5, 5]
        feature = F.conv2d(y_hat, kernel, self.taps.bias, padding=2)
        return feature if kept is None else feature * kept

    @torch.no_grad()
    def features(self, y_hat: Tensor, missing: Tensor | None = None) -> Tensor:
        """`forward` by the linear layer, a row of sites at a time, as the integer copy can do it too.

        y_hat: [B, M, h, w], missing: bool [B, 1, h, w]  ->  context feature: [B, D, h, w]
        """
        if missing is not None:
            y_hat = y_hat * ~missing
        known = F.pad(y_hat, (2, 2, 2, 0))  # [B, M, h + 2, w + 4]
        rows = []
        for i in range(y_hat.size(2)):
            seen = known[:, :, i : i + 3].unfold(3, 5, 1)  # [B, M, 3, w, 5]
            patches = seen.permute(0, 3, 1, 2, 4).flatten(3)[..., :12]  # [B, w, M, 12]
            rows.append(self.taps(patches.flatten(2)))  # [B, w, D]
        return torch.stack(rows, dim=1).movedim(3, 1)

    def code(self, height: int, width: int, exchange: Exchange) -> Tensor:
        """One site at a time.  ->  y_hat: [n, M]"""
        like = next(itertools.chain(self.taps.parameters(), self.taps.buffers()))
        dtype = like.dtype if like.is_floating_point() else torch.float32
        known = torch.zeros(self.M, height + 4, width + 4, device=like.device, dtype=dtype)  # with the border
        coded = []
        for i in range(height * width):
            row, column = divmod(i, width)
            with stage("context"):
                patch = known[:, row : row + 5, column : column + 5].flatten(1)[:, :12]  # [M, 12]
                feature = self.taps(patch.reshape(1, 1, -1))  # [1, 1, D]
            coded.append(exchange(torch.tensor([i]), feature.transpose(1, 2)[..., None]))  # [1, M]
            known[:, row + 2, column + 2] = coded[-1][0]
            tell("sites", i + 1, height * width)
        return torch.cat(coded)


def build_context(c: EntroformerConfig) -> nn.Module | None:
    """The context model a config asks for, or None."""
    kinds = {"serial": SerialContext, "parallel": ParallelContext, "cnn": CnnContext, "none": lambda c: None}
    return kinds[c.context](c)
