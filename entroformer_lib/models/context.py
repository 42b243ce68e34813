"""Context models: what the latents decoded so far say about the next ones.

Serial (sections 3.1 and 3.4): sites in raster order, each sees those before it. Parallel (section 3.4, Figure 4): a
checkerboard, its first half known from the hyperprior alone, its second half sees all of the first. CNN: a masked 5x5
convolution in the place of the serial transformer. None: the hyperprior alone.

All answer two questions:

    forward(y_hat, gaps)  the features of all sites at once, for training and study
    steps(h, w)           the same in the order of coding, as a generator: it yields (site numbers [s], feature
                          [1, D, s, 1], or None without context) and is sent the latents of these sites, [s, M]. The
                          s sites lie in the feature as in a picture s high and 1 wide.

Whoever codes drives the steps:

    steps, latents = model.steps(h, w), None
    while True:  # until StopIteration
        sites, feature = steps.send(latents)
        latents = code(sites, feature)  # [s, M], written or read

`one_by_one` says that the steps go site by site. An encoder, which knows all latents, then calls `forward` instead.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entroformer_lib.models.attention import Stack, UpToItself
from entroformer_lib.models.config import EntroformerConfig
from entroformer_lib.models.position import grid_sites

Features = Generator[tuple[Tensor, Tensor | None], Tensor, None]


class Step(NamedTuple):
    """What an entropy model (entropy_model.py) yields, made from the features above: distributions of some channels at
    some sites.  sites: [s]; means, log_scales: [s, m]"""

    channels: slice
    sites: Tensor
    means: Tensor
    log_scales: Tensor


Steps = Generator[Step, Tensor, None]


@dataclass(frozen=True)
class Gaps:
    """Latents that are hidden from a context model, for training and for studies.

    kept: bool [B or 1, 1, h, w], for the random-mask pretraining (A.5). Latents that are not kept enter as zero. In the
        serial model and the CNN the kept ones get a context feature, and the others none: the hyperprior alone
        predicts them. In the parallel model the mask takes the checkerboard's place: the kept ones are the first slice,
        without context, and the others are the second, with context. Where all are kept it uses no context (Table 3).
    missing: bool [B, 1, h, w], latents that nobody may use, for Figure 3. Their token enters as zero and no other token
        sees it, in any layer; they are still predicted. (To hide one offset from every query would not be enough: other
        tokens have seen the latent and pass it on. And in the serial model the query's own token carries the latent
        before its site.)
    one_way: bool [B], pictures of which a parallel model's sites see only those before them in raster order, for
        Table 3; the coder never does that.
    """

    kept: Tensor | None = None
    missing: Tensor | None = None
    one_way: Tensor | None = None


NO_GAPS = Gaps()


def first_slice(height: int, width: int, device=None) -> Tensor:
    """Sites coded in the first pass of the parallel model, y_hat_1 of Figure 4: those with row + column odd, as
    released.  ->  bool [height, width]"""
    return grid_sites(height, width, device).sum(-1).remainder(2).bool().view(height, width)


class SerialContext(nn.Module):
    """Causal context model: the feature of site i depends on the latents of the sites before i.

    The mask lets token i see itself, because token i *carries* y_hat_i. The outputs are then shifted by one: what
    token i - 1 has computed predicts y_hat_i, and a learned start token predicts the first. So section 3.4's j < i
    holds for what is predicted. Without the shift the model would predict each latent from itself, and report a rate
    that no file can have.

    Offsets (eq. 5) start at token i - 1, as released: at the left neighbour of the site that it predicts, or for the
    first column at the end of the row above.

    y_hat: [B, M, h, w]  ->  context feature: [B, D, h, w]
    """

    one_by_one = True  # steps take a site at a time; `forward` over known latents says the same in one pass

    def __init__(self, c: EntroformerConfig):
        super().__init__()
        self.embed = nn.Linear(c.M, c.dim)
        self.start = nn.Parameter(torch.zeros(1, 1, c.dim))
        nn.init.trunc_normal_(self.start, std=0.02)
        self.stack = Stack(c, c.context_layers, c.top_k, c.radius)

    def forward(self, y_hat: Tensor, gaps: Gaps = NO_GAPS) -> Tensor:
        B, _, h, w = y_hat.shape
        tokens = self.embed(_shown(y_hat, gaps).flatten(2).transpose(1, 2))  # [B, n, D]
        tokens = self.stack(tokens, grid_sites(h, w, y_hat.device), visible=_causal(h * w, gaps.missing))
        feature = torch.cat((self.start.expand(B, -1, -1), tokens[:, :-1]), dim=1)  # shifted by one
        return _at_kept(feature.transpose(1, 2).reshape(B, -1, h, w), gaps)

    def steps(self, height: int, width: int) -> Features:
        """One site at a time; keys and values of earlier sites are remembered."""
        sites = grid_sites(height, width, self.start.device)
        cache, feature = self.stack.cache(len(sites)), self.start  # [1, 1, D]
        for i in range(len(sites)):
            latents = yield torch.tensor([i]), feature.transpose(1, 2)[..., None]
            if i + 1 < len(sites):  # the last token predicts nothing; the cache holds earlier ones alone: no mask
                feature = self.stack(self.embed(latents)[None], sites[: i + 1], cache=cache)  # [1, 1, D]


class ParallelContext(nn.Module):
    """Two-pass bidirectional context model on a checkerboard (Figure 4).

    Only first-slice sites (row + column odd) carry their latent; the second slice enters as zero. Every site sees the
    whole first slice, before and after it, and itself. Features are kept at the second slice and zero at the first,
    which is coded before there is any context.

    y_hat: [B, M, h, w]  ->  context feature: [B, D, h, w]
    """

    one_by_one = False

    def __init__(self, c: EntroformerConfig):
        super().__init__()
        self.embed = nn.Linear(c.M, c.dim)
        self.stack = Stack(c, c.context_layers, c.top_k, c.radius)

    def forward(self, y_hat: Tensor, gaps: Gaps = NO_GAPS) -> Tensor:
        B, _, h, w = y_hat.shape
        kept = first_slice(h, w, y_hat.device).expand(1, 1, h, w) if gaps.kept is None else gaps.kept
        known = kept if gaps.missing is None else kept & ~gaps.missing
        tokens = self.embed((y_hat * known).flatten(2).transpose(1, 2))  # [B, n, D]
        number = torch.arange(h * w, device=y_hat.device)
        context = known.flatten(2)[:, :, None]  # [B or 1, 1, 1, n]
        both_ways = None if gaps.one_way is None else ~gaps.one_way[:, None, None, None]  # [B, 1, 1, 1]

        def visible(i: Tensor) -> Tensor:  # [q] -> [B or 1, 1, q, n]
            seen = context if both_ways is None else context & (both_ways | (number < i[:, None]))
            return seen | (number == i[:, None])

        tokens = self.stack(tokens, grid_sites(h, w, y_hat.device), visible=visible)
        return tokens.transpose(1, 2).reshape(B, -1, h, w) * ~kept

    def steps(self, height: int, width: int) -> Features:
        """Two passes: the first slice without context, then all of the second at once.

        No site of the first slice sees one of the second, so the first slice runs through the blocks alone and leaves
        its keys and values; the second reads them. That saves half of attention's products.
        """
        device = self.embed.weight.device
        first, sites = first_slice(height, width, device).flatten(), grid_sites(height, width, device)
        one, two = first.nonzero()[:, 0], (~first).nonzero()[:, 0]
        cache = self.stack.cache(len(one))
        if len(one):  # a single site has no first slice
            latents = yield one, self.embed.weight.new_zeros(1, self.embed.out_features, len(one), 1)
            self.stack.remember(self.embed(latents)[None], sites[one], cache)
        for part in cache:
            part.closed = True
        unknown = self.embed(self.embed.weight.new_zeros(1, len(two), self.embed.in_features))  # [1, s, D], of zeros
        feature = self.stack(unknown, sites[torch.cat((one, two))], cache=cache if len(one) else None)
        yield two, feature.transpose(1, 2)[..., None]  # [1, D, s, 1]


class CnnContext(nn.Module):
    """The context model of Minnen et al. 2018: a 5x5 convolution that sees the 12 sites before its own.

    It stands for the CNN of Table 1, which the paper does not describe. It computes what CompressAI's `MaskedConv2d`
    does, but holds only the 12 taps in use, as a linear layer: no optimizer sees hidden taps. It stands in the
    transformer's place, so its feature has D channels (Minnen: 2 M).

    y_hat: [B, M, h, w]  ->  context feature: [B, D, h, w]
    """

    one_by_one = True

    def __init__(self, c: EntroformerConfig):
        super().__init__()
        self.taps = nn.Linear(12 * c.M, c.dim)  # channel by channel, each in raster order

    def forward(self, y_hat: Tensor, gaps: Gaps = NO_GAPS) -> Tensor:
        """A missing latent enters as zero, as the border does."""
        B, M, h, w = y_hat.shape
        patches = F.unfold(_shown(y_hat, gaps), 5, padding=2)  # [B, 25 M, n]
        patches = patches.view(B, M, 25, h * w)[:, :, :12].flatten(1, 2)  # [B, 12 M, n]
        feature = self.taps(patches.transpose(1, 2)).transpose(1, 2)  # [B, D, n]
        return _at_kept(feature.reshape(B, -1, h, w), gaps)

    def steps(self, height: int, width: int) -> Features:
        weight = self.taps.weight
        known = weight.new_zeros(weight.size(1) // 12, height + 4, width + 4)  # [M, h + 4, w + 4], with the border
        for i in range(height * width):
            row, column = divmod(i, width)
            patch = known[:, row : row + 5, column : column + 5].flatten(1)[:, :12]  # [M, 12]
            feature = self.taps(patch.reshape(1, 1, -1))  # [1, 1, D]
            latents = yield torch.tensor([i]), feature.transpose(1, 2)[..., None]
            known[:, row + 2, column + 2] = latents[0]


class NoContext(nn.Module):
    """Every site from the hyperprior alone."""

    one_by_one = False

    def forward(self, y_hat: Tensor, gaps: Gaps = NO_GAPS) -> None:
        return None

    def steps(self, height: int, width: int) -> Features:
        yield torch.arange(height * width), None


def _shown(y_hat: Tensor, gaps: Gaps) -> Tensor:
    """Latents as a causal model sees them: hidden ones are zero."""
    if gaps.one_way is not None:
        raise NotImplementedError("This context model is causal already.")
    if gaps.kept is not None:
        y_hat = y_hat * gaps.kept
    return y_hat if gaps.missing is None else y_hat * ~gaps.missing


def _at_kept(feature: Tensor, gaps: Gaps) -> Tensor:
    """Zero where a latent is not kept: there the hyperprior alone predicts (A.5)."""
    return feature if gaps.kept is None else feature * gaps.kept


def _causal(n: int, missing: Tensor | None):
    """Token i sees those up to itself; of the missing ones only itself.  missing: bool [B, 1, h, w] or None"""
    if missing is None:
        return UpToItself(n)
    there, number = ~missing.flatten(2)[:, :, None], torch.arange(n, device=missing.device)  # [B, 1, 1, n], [n]
    return lambda i: ((number < i[:, None]) & there) | (number == i[:, None])
