"""The whole model: Figure 2 wired up, as a CompressAI CompressionModel.

x --g_a--> y --round--> y_hat --g_s--> x_hat          (the picture's way)
           |              |
          h_a         context model
           |              |
           z --round--> z_hat --h_s--+--> entropy parameters --> means, scales of y

A model with several lambdas also scales y behind g_a and scales y_hat back before g_s, and may tell the entropy model
of it: gain.py.
"""

import dataclasses
import math

import torch
from compressai.models import CompressionModel
from compressai.ops import LowerBound
from compressai.registry import register_model
from torch import Tensor, nn

from entroformer_lib.errors import WeightsError
from entroformer_lib.models.clock import stage
from entroformer_lib.models.config import EntroformerConfig, named_config
from entroformer_lib.models.context import build_context
from entroformer_lib.models.exact import ExactEntropyModel
from entroformer_lib.models.gain import Rate, RateGain, RateKnowledge
from entroformer_lib.models.groupedmixer import GroupedMixer
from entroformer_lib.models.hyperprior import build_hyperprior, per_site
from entroformer_lib.models.priors import FactorizedPrior, GaussianConditional, GaussianPrior, ste_round
from entroformer_lib.models.transforms import build_transforms

LARGEST_LOG_SCALE = 12.0  # a sigma of 160,000: no latent needs it, and exp stays finite whatever a bad step does


class EntropyParameters(nn.Module):
    """Two linear layers from the joined features to the Gaussian of every latent ("Linear" in Table 5).

    hyper, context: [B, D, h, w]  ->  means, scales: [B, M, h, w]

    Where the context feature is None it counts as zero: the first slice of the parallel model.
    """

    def __init__(self, c: EntroformerConfig):
        super().__init__()
        self.sources = (c.hyperprior, c.context != "none")
        self.layers = nn.Sequential(
            nn.Linear(sum(self.sources) * c.dim, 4 * c.dim), nn.LeakyReLU(0.2), nn.Linear(4 * c.dim, 2 * c.M)
        )
        # Below the floor the gradient may still pull a scale up: LowerBound, not clamp.
        self.floor = LowerBound(math.log(c.scale_floor))

    def forward(self, hyper: Tensor | None, context: Tensor | None, rate: Rate | None = None) -> tuple[Tensor, Tensor]:
        means, log_scales = self.raw(hyper, context, rate)
        return means, log_scales.exp()

    def raw(self, hyper: Tensor | None, context: Tensor | None, rate: Rate | None = None) -> tuple[Tensor, Tensor]:
        """The same with the logarithms of the scales. rate: what turns them from units of y into steps."""
        known = next(f for f in (hyper, context) if f is not None)
        joined = [
            torch.zeros_like(known) if feature is None else feature
            for feature, wanted in zip((hyper, context), self.sources, strict=True)
            if wanted
        ]
        log_scales, means = float_or_wider(per_site(self.layers, torch.cat(joined, dim=1))).chunk(2, dim=1)
        return in_steps(means, log_scales, self.floor, rate)


def in_steps(means: Tensor, log_scales: Tensor, floor: LowerBound, rate: Rate | None) -> tuple[Tensor, Tensor]:
    """Means and logarithms of scales in steps of the rounding; scales between the floor and what no latent exceeds."""
    if rate is not None:
        means, log_scales = means * rate.gain, log_scales + rate.log_gain
    return means, floor(log_scales).clamp(max=LARGEST_LOG_SCALE)


class GroupedParameters(nn.Module):
    """What EntropyParameters is to the other models: GroupedMixer has its heads inside, so only the bounds are left."""

    def __init__(self, c: EntroformerConfig):
        super().__init__()
        self.floor = LowerBound(math.log(c.scale_floor))

    def raw(self, means: Tensor, log_scales: Tensor, rate: Rate | None = None) -> tuple[Tensor, Tensor]:
        return in_steps(float_or_wider(means), float_or_wider(log_scales), self.floor, rate)


@register_model("entroformer")
class Entroformer(CompressionModel):
    """Entroformer: transformer hyperprior and transformer context model around convolutional transforms.

    Args:
        config: an EntroformerConfig, or a name for `named_config` such as "tiny-parallel".
        overrides: config fields by name, only with a name.

    Each part can be called on its own: `g_a(x)`, `h_a(y)`, `h_s(z_hat)`, `context_model(y_hat)`,
    `entropy_parameters(hyper, context)`, `g_s(y_hat)`.

    A variable-rate model (`config.lmbdas`) codes at its `level` unless a call names another one: 0 is the lowest rate,
    `len(config.lmbdas) - 1` the highest, and anything between.
    """

    def __init__(self, config: EntroformerConfig | str = "base-serial", **overrides):
        super().__init__()
        if isinstance(config, str):
            config = named_config(config, **overrides)
        elif overrides:
            raise TypeError("overrides go with a name, not with a whole config")
        c = self.config = config
        self.g_a, self.g_s = build_transforms(c)
        self.gain = RateGain(c.lmbdas, c.M) if c.lmbdas else None
        self.level = (len(c.lmbdas) - 1) / 2  # the middle
        self.rate_knowledge = RateKnowledge(self.gain, c.Z, c.dim) if c.rate_aware else None
        self.h_a, self.h_s = build_hyperprior(c)
        grouped = c.context == "grouped"
        self.context_model = GroupedMixer(c) if grouped else build_context(c)
        self.entropy_parameters = GroupedParameters(c) if grouped else EntropyParameters(c)
        self.gaussian = GaussianConditional()
        self.z_prior = None
        if c.hyperprior:
            self.z_prior = FactorizedPrior(c.Z) if c.z_prior == "factorized" else GaussianPrior(c.Z)
        self._tables_stale = True
        self._exact_made = None

    @property
    def downsampling_factor(self) -> int:
        return self.config.downsampling

    def entropy_model_parts(self) -> list[nn.Module]:
        """Everything but g_a and g_s: what the paper's Table 6 weighs."""
        parts = (self.h_a, self.h_s, self.context_model, self.entropy_parameters, self.z_prior, self.rate_knowledge)
        return [part for part in parts if part is not None]

    # ---- training and analysis ----

    def forward(
        self,
        x: Tensor,
        noise: dict[str, Tensor] | None = None,
        kept: Tensor | None = None,
        level: Tensor | None = None,
    ) -> dict:
        """Reconstruction and likelihoods; while training with noise for the rate and rounding for the picture.

        The rate is trained on y + U(-0.5, 0.5), which has a useful gradient in the likelihood's argument; g_s, h_s and
        the context model get rounded values with a straight-through gradient, because that is what they get when
        decoding (as Minnen & Singh 2020).

        Args:
            x: [B, 3, H, W] in [0, 1]; H and W multiples of `downsampling_factor`.
            noise: {"y": [B, M, H/16, W/16], "z": [B, Z, H/64, W/64]} in [-0.5, 0.5]; drawn here when not given.
            kept: bool [B, 1, H/16, W/16] for the random-mask pretraining, see the context models.
            level: [B] levels of a variable-rate model; by default `self.level` for all.

        Returns:
            {"x_hat": [B, 3, H, W], "likelihoods": {"y": [B, M, H/16, W/16], "z": [B, Z, H/64, W/64]}}; no "z" without
            hyperprior. x_hat is not clamped.
        """
        self._check_size(x)
        gain, inverse = self._gains(level)
        likelihoods, y_hat = self.likelihoods(self.g_a(x) * gain, noise, kept, level=level)
        return {"x_hat": float_or_wider(self.g_s(y_hat * inverse)), "likelihoods": likelihoods}

    def likelihoods(
        self,
        y: Tensor,
        noise: dict[str, Tensor] | None = None,
        kept: Tensor | None = None,
        missing: Tensor | None = None,
        level: Tensor | float | None = None,
        one_way: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The entropy model alone, without g_a and g_s: what `forward` does with the latents.

        y: [B, M, H/16, W/16], scaled by the gain but not yet rounded; missing: bool [B, 1, H/16, W/16], latents that
        nobody may use as context, see the context models; level: that of the gain; one_way: bool [B], see
        ParallelContext  ->  likelihoods as `forward` returns them, and y_hat.
        """
        likelihoods = {}
        hyper, rate = None, self.rate(level)
        if self.h_a is not None:
            z = self.analysed(y, rate)
            with torch.autocast(y.device.type, enabled=False):
                z = float_or_wider(z)
                z_hat = self.z_prior.quantize_z(z)
                likelihoods["z"] = self.z_prior.likelihood(self._noisy(z, z_hat, noise, "z"))
            hyper = self.synthesised(z_hat, rate)
        y_hat = ste_round(float_or_wider(y))
        means, scales = self.distributions(y_hat, hyper, kept, missing, rate, one_way)
        with torch.autocast(y.device.type, enabled=False):
            likelihoods["y"] = self.gaussian(self._noisy(float_or_wider(y), y_hat, noise, "y"), means, scales)
        return likelihoods, y_hat

    def distributions(
        self,
        y_hat: Tensor,
        hyper: Tensor | None,
        kept: Tensor | None = None,
        missing: Tensor | None = None,
        rate: Rate | None = None,
        one_way: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The Gaussian of every latent, given all latents that may be known before it.

        y_hat: [B, M, h, w], hyper: of `synthesised`, [B, D, h, w] or None; kept, missing, one_way: see the context
        models; rate: of `self.rate`  ->  means, scales: [B, M, h, w]
        """
        if rate is not None:
            y_hat = y_hat * rate.inverse
        if isinstance(self.context_model, GroupedMixer):
            if any(mask is not None for mask in (kept, missing, one_way)):
                raise NotImplementedError("Masks are for Entroformer's context models; GroupedMixer has none.")
            means, log_scales = self.entropy_parameters.raw(*self.context_model(y_hat, hyper), rate)
            return means, log_scales.exp()
        context = None
        if self.context_model is not None:
            only_parallel = {} if one_way is None else {"one_way": one_way}
            context = self.context_model(y_hat, kept, missing, **only_parallel)
        if rate is not None and hyper is None:
            context = context + rate.vector
        return self.entropy_parameters(hyper, context, rate)

    def analysed(self, y: Tensor, rate: Rate | None) -> Tensor:
        """z of y, not yet rounded.  y: [B, M, h, w], scaled by the gain  ->  [B, Z, h/4, w/4]"""
        if self.config.hyper_input == "rounded":
            y = ste_round(float_or_wider(y))
        return self.h_a(y) if rate is None else self.h_a(y * rate.inverse) * rate.z_gain

    def synthesised(self, z_hat: Tensor, rate: Rate | None) -> Tensor:
        """The hyperprior feature.  z_hat: [B, Z, h/4, w/4]  ->  [B, D, h, w]"""
        return self.h_s(z_hat) if rate is None else self.h_s(z_hat * rate.z_inverse) + rate.vector

    def rate(self, level: Tensor | float | None = None, exact: bool = False) -> Rate | None:
        """What the entropy model is told of a level, or of a level for each of B latents; None where it is told
        nothing."""
        if self.rate_knowledge is None:
            return None
        return self.rate_knowledge(self.gain, self._levels(level), exact)

    def _levels(self, level: Tensor | float | None) -> Tensor:
        like = self.gain.log_gain
        return torch.as_tensor(self.level if level is None else level, device=like.device).view(-1).to(like)

    def scaled(self, y: Tensor, level: float | None = None) -> Tensor:
        """y of g_a times the gain of a level, as it is rounded and coded; unchanged in a model of one rate."""
        return y * self._gains(level)[0]

    def _gains(self, level: Tensor | float | None) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """Gain and inverse, [B or 1, M, 1, 1]; both 1 in a model of one rate."""
        if self.gain is None:
            return 1.0, 1.0
        return self.gain(self._levels(level))

    def _noisy(self, v: Tensor, v_hat: Tensor, noise: dict[str, Tensor] | None, key: str) -> Tensor:
        if not self.training:
            return v_hat
        return v + (noise[key] if noise and key in noise else torch.rand_like(v) - 0.5)

    def _check_size(self, x: Tensor) -> None:
        factor = self.downsampling_factor
        if x.dim() != 4 or x.size(1) != 3 or x.size(2) % factor or x.size(3) % factor:
            raise ValueError(
                f"x must be [B, 3, H, W] with H and W multiples of {factor}, not {list(x.shape)}; "
                "coding.codec pads pictures of any size"
            )

    @torch.inference_mode()
    def estimated_bits(self, y: Tensor, level: float | None = None) -> dict[str, Tensor]:
        """Where the bits go, by the likelihoods: {"y": [B, H/16, W/16], "z": [B, H/64, W/64]}, summed over channels,
        in float64.  y: [B, M, H/16, W/16], scaled by the gain of `level` where there is one."""
        return {name: -p.double().log2().sum(1) for name, p in self.likelihoods(y, level=level)[0].items()}

    # ---- real bytes ----

    @torch.inference_mode()
    def latents(self, x: Tensor, level: float | None = None) -> tuple[Tensor, Tensor | None]:
        """Quantised latents as they are coded.  x: [B, 3, H, W]  ->  y_hat, z (not yet rounded) or None."""
        self._check_size(x)
        with stage("transforms"):
            y = self.scaled(self.g_a(x), level)
        with stage("hyper"):
            return torch.floor(y + 0.5), None if self.h_a is None else self.analysed(y, self.rate(level))

    @torch.inference_mode()
    def compress(self, x: Tensor) -> dict:
        """x: [B, 3, H, W] in [0, 1]  ->  {"strings": [[y of each picture], [z of each picture]], "shape": z's (h, w)}.

        Without hyperprior there is one list of strings, and "shape" is that of y.
        """
        y_hat, z = self.latents(x)
        return self.compress_latents(y_hat, z)

    @torch.inference_mode()
    def compress_latents(self, y_hat: Tensor, z: Tensor | None, level: float | None = None) -> dict:
        """Second half of `compress`. y_hat: [B, M, h, w] integers, z: [B, Z, h/4, w/4] or None."""
        exact, rate = self._exact(), self.rate(level, exact=True)
        if z is None:
            return {"strings": [[exact.encode(y[None], None, rate) for y in y_hat]], "shape": y_hat.shape[-2:]}
        self.refresh_tables()
        z_strings = self.z_prior.compress(z)
        z_hat = self.z_prior.decompress(z_strings, z.shape[-2:])  # exactly what the decoder will have
        y_strings = [exact.encode(y[None], z1[None], rate) for y, z1 in zip(y_hat, z_hat, strict=True)]
        return {"strings": [y_strings, z_strings], "shape": z.shape[-2:]}

    @torch.inference_mode()
    def decompress(self, strings: list[list[bytes]], shape) -> dict:
        """Inverse of `compress`: {"x_hat": [B, 3, H, W] clamped to [0, 1]}."""
        y_hat, _ = self.decompress_latents(strings, shape)
        return {"x_hat": self.reconstruct(y_hat)}

    @torch.inference_mode()
    def reconstruct(self, y_hat: Tensor, level: float | None = None) -> Tensor:
        """y_hat: [B, M, h, w]  ->  x_hat: [B, 3, H, W] clamped to [0, 1]"""
        with stage("transforms"):
            return self.g_s(y_hat * self._gains(level)[1]).clamp(0, 1)

    @torch.inference_mode()
    def decompress_latents(
        self, strings: list[list[bytes]], shape, level: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """First half of `decompress`: y_hat [B, M, h, w] and z_hat or None."""
        exact, rate = self._exact(), self.rate(level, exact=True)
        like = next(self.g_s.parameters())
        if self.h_a is None:
            y_hat = [exact.decode(s, None, tuple(shape), rate) for s in strings[0]]
            return torch.cat(y_hat).to(like), None
        self.refresh_tables()
        z_hat = self.z_prior.decompress(strings[1], tuple(shape)).to(like)
        size = (4 * shape[0], 4 * shape[1])
        y_hat = [exact.decode(s, z[None], size, rate) for s, z in zip(strings[0], z_hat, strict=True)]
        return torch.cat(y_hat).to(like), z_hat

    def _exact(self) -> ExactEntropyModel:
        """The entropy model as the coder runs it; made anew when a weight has changed."""
        state = fingerprint(self.entropy_model_parts())
        if self._exact_made != state:
            self._exact_model, self._exact_made = ExactEntropyModel(self), state
        return self._exact_model

    # ---- the factorized prior's tables: nobody needs to remember `update()` ---------------------------------------

    def update(self, scale_table=None, force: bool = False, update_quantiles: bool = False) -> bool:
        """CompressAI's call. Here it is optional: `compress` and `decompress` refresh the tables when they are old."""
        updated = super().update(scale_table, force=force, update_quantiles=update_quantiles)
        self._tables_stale = False
        return updated

    def refresh_tables(self) -> None:
        """Builds the tables of p(z) unless those at hand belong to these weights (loaded with them, or just built)."""
        if isinstance(self.z_prior, FactorizedPrior) and (self._tables_stale or not self.z_prior.offset.numel()):
            self.update(force=True)

    def train(self, mode: bool = True):
        """Training makes the tables old."""
        self._tables_stale = getattr(self, "_tables_stale", True) or mode
        return super().train(mode)

    # ---- weights ----

    def get_extra_state(self) -> Tensor:
        """The config travels inside the state dict, as bytes."""
        return torch.tensor(list(self.config.to_json().encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        theirs = EntroformerConfig.from_json(bytes(state.tolist()).decode())
        for name, ours in dataclasses.asdict(self.config).items():
            if getattr(theirs, name) != ours:
                raise WeightsError(
                    f"These weights were made with {name} = {getattr(theirs, name)}, this model has {name} = {ours}."
                )

    def load_state_dict(self, state_dict, strict: bool = True):
        """As CompressAI's; tables of p(z) that come along are kept as they are, so every machine codes z alike."""
        result = super().load_state_dict(dict(state_dict), strict=strict)
        self._tables_stale = self.training
        return result

    @classmethod
    def from_state_dict(cls, state_dict) -> "Entroformer":
        """A model in eval mode of the architecture and weights of a state dict.

        Raises:
            WeightsError: no config inside, or tensors that do not fit it.
        """
        if "_extra_state" not in state_dict:
            raise WeightsError("These weights do not say which architecture they belong to.")
        model = cls(EntroformerConfig.from_json(bytes(state_dict["_extra_state"].tolist()).decode())).eval()
        try:
            model.load_state_dict(state_dict)
        except RuntimeError as error:
            raise WeightsError(f"These weights do not fit their config: {str(error).splitlines()[1].strip()}") from None
        return model


def fingerprint(modules: list[nn.Module]) -> tuple:
    """Something that changes when a weight of the modules does, however it is changed; for use inside one process."""
    weights = (t for module in modules for t in (*module.parameters(), *module.buffers()))
    return tuple((t.data_ptr(), None if t.is_inference() else t._version, float(t.detach().sum())) for t in weights)


def float_or_wider(v: Tensor) -> Tensor:
    """bfloat16 to float32; float32 and float64 unchanged."""
    return v.to(torch.promote_types(v.dtype, torch.float32))


def build_model(name: str, preset: str = "paper", **overrides) -> Entroformer:
    """A freshly initialised model, e.g. `build_model("tiny-parallel", top_k=None)`; see `named_config`."""
    return Entroformer(named_config(name, preset, **overrides))
