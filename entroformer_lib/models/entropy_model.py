"""Entropy models: they predict the Gaussian of every latent from what is known. All kinds (with any context, with
none, and GroupedMixer) answer the same two questions:

    predict(y_hat, hyper, gaps)  the distributions of all latents at once, for training and study
    steps(h, w, hyper)           the same, step by step, as they are coded: a generator that yields a `Step` and is sent
                                 the latents it asks for, [s, m]; context.py shows how

`output_layers` are pairs: channels, and the last linear layer for these channels. It gives the logarithms of scales
first, then the means. They are not bounded yet: `Bounds` does that.

y_hat: [B, M, h, w]; hyper: the hyperprior feature [B, D, h, w] or None  ->  means, logarithms of scales: [B, M, h, w]
"""

import math

import torch
from compressai.ops import LowerBound
from torch import Tensor, nn

from entroformer_lib.models.config import EntroformerConfig
from entroformer_lib.models.context import NO_GAPS, Gaps, Step, Steps
from entroformer_lib.models.gain import Rate
from entroformer_lib.models.groupedmixer import GroupedMixer
from entroformer_lib.models.hyperprior import per_site
from entroformer_lib.models.primitives import float_or_wider

LARGEST_LOG_SCALE = 12.0  # a sigma of 160,000: no latent needs it, and exp stays finite after a bad training step


class Bounds(nn.Module):
    """Keeps scales between the floor and what no latent exceeds."""

    def __init__(self, c: EntroformerConfig):
        super().__init__()
        # Below the floor the gradient may still pull a scale up: LowerBound, not clamp.
        self.floor = LowerBound(math.log(c.scale_floor))

    def bounded(self, log_scales: Tensor) -> Tensor:
        return self.floor(log_scales).clamp(max=LARGEST_LOG_SCALE)


class EntropyParameters(Bounds):
    """Two linear layers from the concatenated features to the Gaussian of every latent ("Linear" in Table 5).

    The hidden width is 4 D and the slope 0.2, as released. Table 5 prints a width of 768, which is 2 D; Table 6's size
    (142.7M, read as MiB of float32) agrees with 4 D.

    hyper, context: [B, D, h, w] or None  ->  means, logarithms of scales: [B, M, h, w]
    """

    def __init__(self, c: EntroformerConfig):
        super().__init__(c)
        self.hyperprior = c.hyperprior
        features = int(c.hyperprior) + int(c.context != "none")  # of D channels each
        self.layers = nn.Sequential(
            nn.Linear(features * c.dim, 4 * c.dim), nn.LeakyReLU(0.2), nn.Linear(4 * c.dim, 2 * c.M)
        )

    def forward(self, hyper: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor]:
        # Without hyperprior, `hyper` can only be the vector of the level, [B, D, 1, 1] (gain.py). It has no channels of
        # its own in `layers`, so it is added.
        if not self.hyperprior and hyper is not None:
            hyper, context = None, context + hyper
        joined = torch.cat([feature for feature in (hyper, context) if feature is not None], dim=1)
        log_scales, means = float_or_wider(per_site(self.layers, joined)).chunk(2, dim=1)  # as released
        return means, log_scales


class PerSite:
    """Entroformer's entropy models: a context feature for each site, concatenated with the hyperprior's."""

    def __init__(self, context: nn.Module, parameters: EntropyParameters):
        self.context, self.parameters = context, parameters
        self.one_by_one, self.output_layers = context.one_by_one, [(slice(None), parameters.layers[-1])]

    def predict(self, y_hat: Tensor, hyper: Tensor | None, gaps: Gaps = NO_GAPS) -> tuple[Tensor, Tensor]:
        return self.parameters(hyper, self.context(y_hat, gaps))

    def steps(self, h: int, w: int, hyper: Tensor | None) -> Steps:
        everything = slice(None)
        # without hyperprior the vector of the level, [1, D, 1, 1], which is expanded to all sites
        hyper = None if hyper is None else hyper.expand(-1, -1, h, w).flatten(2)[..., None]  # [1, D, n, 1]
        features, latents = self.context.steps(h, w), None
        while True:
            try:
                sites, feature = features.send(latents)
            except StopIteration:
                return
            here = None if hyper is None else hyper[:, :, sites]  # [1, D, s, 1]
            means, log_scales = self.parameters(here, feature)  # [1, M, s, 1]
            latents = yield Step(everything, sites, means[0, :, :, 0].T, log_scales[0, :, :, 0].T)


class PerGroup:
    """GroupedMixer's: it has output layers of its own, one for each channel slice."""

    one_by_one = False

    def __init__(self, mixer: GroupedMixer, _: Bounds):
        self.mixer, self.output_layers = mixer, list(zip(mixer.slices, mixer.head, strict=True))

    def predict(self, y_hat: Tensor, hyper: Tensor, gaps: Gaps = NO_GAPS) -> tuple[Tensor, Tensor]:
        if gaps != NO_GAPS:
            raise NotImplementedError(
                "GroupedMixer has no gaps: a token holds one group and predicts the next, so hiding a latent would "
                "hide the query that stands at its place."
            )
        return self.mixer(y_hat, hyper)

    def steps(self, h: int, w: int, hyper: Tensor) -> Steps:
        return self.mixer.steps(h, w, hyper)


class ToldTheRate:
    """An entropy model that sees latents in the units of y before the gain, whatever the rate (gain.py)."""

    def __init__(self, model: PerSite | PerGroup, rate: Rate):
        self.model, self.rate, self.one_by_one = model, rate, model.one_by_one

    def predict(self, y_hat: Tensor, hyper: Tensor | None, gaps: Gaps = NO_GAPS) -> tuple[Tensor, Tensor]:
        r = self.rate
        means, log_scales = self.model.predict(y_hat * r.inverse, self._told(hyper), gaps)
        return means * r.gain, log_scales + r.log_gain

    def steps(self, h: int, w: int, hyper: Tensor | None) -> Steps:
        gain, inverse, log_gain = (t[0, :, 0, 0] for t in self.rate[:3])  # [M] each
        steps, latents = self.model.steps(h, w, self._told(hyper)), None
        while True:
            try:
                step = steps.send(latents)
            except StopIteration:
                return
            c = step.channels
            latents = yield step._replace(means=step.means * gain[c], log_scales=step.log_scales + log_gain[c])
            latents = latents * inverse[c]

    def _told(self, hyper: Tensor | None) -> Tensor:
        return self.rate.vector if hyper is None else hyper + self.rate.vector
