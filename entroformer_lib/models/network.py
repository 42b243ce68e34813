"""The network: Figure 2 wired up.

x --g_a--> y --round--> y_hat --------g_s--------> x_hat
           |              |
          h_a             +---- context model ----+
           |                                      |
           z --round--> z_hat --------h_s---------+--> entropy parameters --> means, scales of y

GroupedMixer takes the place of the context model and the entropy parameters. A model with several lambdas also scales y
after g_a and scales y_hat back before g_s, and may tell the entropy model of it: gain.py.
"""

import torch
from compressai.models import CompressionModel
from torch import Tensor

from entroformer_lib.models.config import EntroformerConfig
from entroformer_lib.models.context import NO_GAPS, CnnContext, Gaps, NoContext, ParallelContext, SerialContext
from entroformer_lib.models.entropy_model import Bounds, EntropyParameters, PerGroup, PerSite, ToldTheRate
from entroformer_lib.models.gain import Rate, RateGain, RateKnowledge
from entroformer_lib.models.groupedmixer import GroupedMixer
from entroformer_lib.models.hyperprior import build_hyperprior
from entroformer_lib.models.primitives import float_or_wider
from entroformer_lib.models.priors import FactorizedPrior, GaussianConditional, GaussianPrior, ste_round
from entroformer_lib.models.transforms import build_transforms

# context of the config -> context model, entropy parameters, and the entropy model that both make
KINDS = {
    "serial": (SerialContext, EntropyParameters, PerSite),
    "parallel": (ParallelContext, EntropyParameters, PerSite),
    "cnn": (CnnContext, EntropyParameters, PerSite),
    "none": (lambda c: NoContext(), EntropyParameters, PerSite),
    "grouped": (GroupedMixer, Bounds, PerGroup),
}


class Network(CompressionModel):
    """All parts, and what they compute together. `Entroformer` adds real bytes.

    In a model of one rate each part can be called on its own: `g_a(x)`, `h_a(y)`, `h_s(z_hat)`, `g_s(y_hat)`, and
    `context_model(y_hat)`, which in GroupedMixer needs the hyperprior feature too. Where there are several rates, gains
    stand between the parts: `scaled`, `hyper_analysis` and `hyper_synthesis` know them, and `Entroformer.reconstruct`.

    A variable-rate model codes at its `level` unless a call names another one: 0 is the lowest rate,
    `len(config.lmbdas) - 1` the highest, and anything between.
    """

    def __init__(self, c: EntroformerConfig):
        super().__init__()
        self.config = c
        self.g_a, self.g_s = build_transforms(c)
        self.gain = RateGain(c.lmbdas, c.M) if c.lmbdas else None
        self.level = (len(c.lmbdas) - 1) / 2 if c.lmbdas else None
        self.rate_knowledge = RateKnowledge(self.gain, c.Z, c.dim) if c.rate_aware else None
        self.h_a, self.h_s = build_hyperprior(c)
        context, parameters, self.kind = KINDS[c.context]
        self.context_model, self.entropy_parameters = context(c), parameters(c)
        self.gaussian = GaussianConditional()
        self.z_prior = None
        if c.hyperprior:
            self.z_prior = FactorizedPrior(c.Z) if c.z_prior == "factorized" else GaussianPrior(c.Z)

    def forward(
        self,
        x: Tensor,
        noise: dict[str, Tensor] | None = None,
        gaps: Gaps = NO_GAPS,
        level: Tensor | None = None,
    ) -> dict:
        """Reconstruction and likelihoods, of which `training/loss.py` makes R + lambda D (eq. 2).

        The rate is trained on y + U(-0.5, 0.5), which has a useful gradient in the likelihood's argument; g_s, h_s and
        the context model get rounded values with a straight-through gradient, because that is what they get when
        decoding (as Minnen & Singh 2020; section 2 of the paper gives noise to all of them).

        Args:
            x: [B, 3, H, W] in [0, 1]; H and W multiples of `config.downsampling`.
            noise: {"y": [B, M, H/16, W/16], "z": [B, Z, H/64, W/64]} in [-0.5, 0.5]; drawn here when not given.
            gaps: latents that are hidden, see context.py.
            level: [B] levels of a variable-rate model; by default `self.level` for all.

        Returns:
            {"x_hat": [B, 3, H, W], "likelihoods": {"y": [B, M, H/16, W/16], "z": [B, Z, H/64, W/64]}, "y": latents
            before rounding, scaled by the gain}; no likelihoods of z without hyperprior. x_hat is not clamped.
        """
        self.check_size(x)
        gain, inverse = self.gains(level)
        y = self.g_a(x) * gain
        likelihoods, y_hat = self.likelihoods(y, noise, gaps, level)
        return {"x_hat": float_or_wider(self.g_s(y_hat * inverse)), "likelihoods": likelihoods, "y": y}

    def likelihoods(
        self,
        y: Tensor,
        noise: dict[str, Tensor] | None = None,
        gaps: Gaps = NO_GAPS,
        level: Tensor | float | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The entropy model alone, without g_a and g_s: what `forward` does with the latents.

        y: [B, M, H/16, W/16], scaled by the gain but not yet rounded; level: that of the gain  ->  likelihoods as
        `forward` returns them, and y_hat.
        """
        likelihoods, rate, hyper = {}, self.rate(level), None
        if self.h_a is not None:
            z = self.hyper_analysis(y, rate)
            with torch.autocast(y.device.type, enabled=False):
                z = float_or_wider(z)
                z_hat = self.z_prior.quantize_z(z)
                likelihoods["z"] = self.z_prior.likelihood(self._noisy(z, z_hat, noise, "z"))
            hyper = self.hyper_synthesis(z_hat, rate)
        y_hat = ste_round(float_or_wider(y))
        means, scales = self.distributions(y_hat, hyper, gaps, rate)
        with torch.autocast(y.device.type, enabled=False):
            likelihoods["y"] = self.gaussian(self._noisy(float_or_wider(y), y_hat, noise, "y"), means, scales)
        return likelihoods, y_hat

    def entropy_model(self, rate: Rate | None = None) -> PerSite | PerGroup | ToldTheRate:
        """Context model and entropy parameters as one, told the rate where the model is."""
        model = self.kind(self.context_model, self.entropy_parameters)
        return model if rate is None else ToldTheRate(model, rate)

    def distributions(
        self, y_hat: Tensor, hyper: Tensor | None, gaps: Gaps = NO_GAPS, rate: Rate | None = None
    ) -> tuple[Tensor, Tensor]:
        """The Gaussian of every latent, given all latents that may be known before it.

        y_hat: [B, M, h, w], hyper: of `hyper_synthesis`, or None  ->  means, scales: [B, M, h, w]
        """
        means, log_scales = self.entropy_model(rate).predict(y_hat, hyper, gaps)
        return means, self.entropy_parameters.bounded(log_scales).exp()

    def hyper_analysis(self, y: Tensor, rate: Rate | None) -> Tensor:
        """z of y, not yet rounded.  y: [B, M, h, w], scaled by the gain  ->  [B, Z, h/4, w/4]"""
        if self.config.hyper_input == "rounded":
            y = ste_round(float_or_wider(y))
        return self.h_a(y) if rate is None else self.h_a(y * rate.inverse) * rate.z_gain

    def hyper_synthesis(self, z_hat: Tensor, rate: Rate | None) -> Tensor:
        """The hyperprior feature.  z_hat: [B, Z, h/4, w/4]  ->  [B, D, h, w]"""
        return self.h_s(z_hat if rate is None else z_hat * rate.z_inverse)

    def rate(self, level: Tensor | float | None = None) -> Rate | None:
        """What the entropy model is told of a level, or of a level for each of B pictures; None where it is told
        nothing."""
        if self.rate_knowledge is None:
            return None
        return self.rate_knowledge(self.gain, self._levels(level))

    def scaled(self, y: Tensor, level: float | None = None) -> Tensor:
        """y of g_a times the gain of a level, as it is rounded and coded; unchanged in a model of one rate."""
        return y * self.gains(level)[0]

    def gains(self, level: Tensor | float | None) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """Gain and inverse, [B or 1, M, 1, 1]; both 1 in a model of one rate."""
        return (1.0, 1.0) if self.gain is None else self.gain(self._levels(level))

    def _levels(self, level: Tensor | float | None) -> Tensor:
        like = self.gain.log_gain
        return torch.as_tensor(self.level if level is None else level, device=like.device).view(-1).to(like)

    def _noisy(self, v: Tensor, v_hat: Tensor, noise: dict[str, Tensor] | None, key: str) -> Tensor:
        if not self.training:
            return v_hat
        return v + (noise[key] if noise and key in noise else torch.rand_like(v) - 0.5)

    def check_size(self, x: Tensor) -> None:
        factor = self.config.downsampling
        if x.dim() != 4 or x.size(1) != 3 or x.size(2) % factor or x.size(3) % factor:
            raise ValueError(
                f"x must be [B, 3, H, W] with H and W multiples of {factor}, not {list(x.shape)}; "
                "codec.pictures pads pictures of any size"
            )
