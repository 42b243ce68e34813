"""CompressAI's contract around the network: forward, compress, decompress, update; weights that know their config."""

import dataclasses
from contextlib import nullcontext

import torch
from compressai.registry import register_model
from torch import Tensor, nn

from entroformer_lib.errors import WeightsError
from entroformer_lib.exact.coder import ExactCoder
from entroformer_lib.models.config import EntroformerConfig, named_config
from entroformer_lib.models.network import Network
from entroformer_lib.models.priors import FactorizedPrior
from entroformer_lib.stages import stage
from entroformer_lib.tiles import Tiles


@register_model("entroformer")
class Entroformer(Network):
    """Entroformer: transformer hyperprior and transformer context model around convolutional transforms.

    Args:
        config: an EntroformerConfig, or a name for `named_config` such as "tiny-parallel".
        name: what results and .ef files call the model; empty where it has no name.
        card: how it was trained and what it reaches, see `weights.zoo`.
        overrides: config fields by name, only with a name for `named_config`.
    """

    def __init__(
        self,
        config: EntroformerConfig | str = "base-serial",
        *,
        name: str = "",
        card: dict | None = None,
        **overrides,
    ):
        if isinstance(config, str):
            config = named_config(config, **overrides)
        elif overrides:
            raise TypeError("overrides go with a name, not with a whole config")
        super().__init__(config)
        self.name, self.card = name, card or {}
        self._tables_stale = True
        self._coder, self._coder_of = None, None

    @property
    def downsampling_factor(self) -> int:
        return self.config.downsampling

    def entropy_model_parts(self) -> list[nn.Module]:
        """Everything but g_a and g_s: what the paper's Table 6 weighs."""
        parts = (self.h_a, self.h_s, self.context_model, self.entropy_parameters, self.z_prior, self.rate_knowledge)
        return [part for part in parts if part is not None]

    def forward(self, *args, **more) -> dict:
        """As Network.forward; without gradients in tiles, so that memory grows with the number of latents."""
        with nullcontext() if torch.is_grad_enabled() else Tiles():
            return super().forward(*args, **more)

    def likelihoods(self, *args, **more):
        """As Network.likelihoods; without gradients in tiles."""
        with nullcontext() if torch.is_grad_enabled() else Tiles():
            return super().likelihoods(*args, **more)

    @torch.inference_mode()
    def analysis(self, x: Tensor) -> Tensor:
        """y of g_a, strip by strip.  x: [B, 3, H, W]  ->  [B, M, H/16, W/16], not scaled and not rounded"""
        with Tiles():
            return self.g_a(x)

    @torch.inference_mode()
    def estimated_bits(self, y: Tensor, level: float | None = None) -> dict[str, Tensor]:
        """Where the bits go, by the likelihoods: {"y": [B, H/16, W/16], "z": [B, H/64, W/64]}, summed over channels,
        in float64.  y: [B, M, H/16, W/16], scaled by the gain of `level` where there is one."""
        return {name: -p.double().log2().sum(1) for name, p in self.likelihoods(y, level=level)[0].items()}

    # ---- real bytes ----

    @torch.inference_mode()
    def latents(self, x: Tensor, level: float | None = None) -> tuple[Tensor, Tensor | None]:
        """Quantised latents as they are coded.  x: [B, 3, H, W]  ->  y_hat, z (not yet rounded) or None."""
        self.check_size(x)
        with stage("transforms"):
            y = self.scaled(self.analysis(x), level)
        with stage("hyper"), Tiles():
            return torch.floor(y + 0.5), None if self.h_a is None else self.hyper_analysis(y, self.rate(level))

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
        coder = self._exact()
        rate = coder.rate(self, level)
        if z is None:
            return {"strings": [[coder.encode(y[None], None, rate) for y in y_hat]], "shape": y_hat.shape[-2:]}
        self.refresh_tables()
        z_strings = self.z_prior.compress(z)
        z_hat = self.z_prior.decompress(z_strings, z.shape[-2:])  # exactly what the decoder will have
        y_strings = [coder.encode(y[None], z1[None], rate) for y, z1 in zip(y_hat, z_hat, strict=True)]
        return {"strings": [y_strings, z_strings], "shape": z.shape[-2:]}

    @torch.inference_mode()
    def decompress(self, strings: list[list[bytes]], shape) -> dict:
        """Inverse of `compress`: {"x_hat": [B, 3, H, W] clamped to [0, 1]}."""
        y_hat, _ = self.decompress_latents(strings, shape)
        return {"x_hat": self.reconstruct(y_hat)}

    @torch.inference_mode()
    def reconstruct(self, y_hat: Tensor, level: float | None = None) -> Tensor:
        """y_hat: [B, M, h, w]  ->  x_hat: [B, 3, H, W] clamped to [0, 1]"""
        with stage("transforms"), Tiles():
            return self.g_s(y_hat * self.gains(level)[1]).clamp(0, 1)

    @torch.inference_mode()
    def decompress_latents(
        self, strings: list[list[bytes]], shape, level: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """First half of `decompress`: y_hat [B, M, h, w] and z_hat or None."""
        coder = self._exact()
        rate = coder.rate(self, level)
        like = next(self.g_s.parameters())
        if self.h_a is None:
            y_hat = [coder.decode(s, None, tuple(shape), rate) for s in strings[0]]
            return torch.cat(y_hat).to(like), None
        self.refresh_tables()
        z_hat = self.z_prior.decompress(strings[1], tuple(shape)).to(like)
        size = (4 * shape[0], 4 * shape[1])
        y_hat = [coder.decode(s, z[None], size, rate) for s, z in zip(strings[0], z_hat, strict=True)]
        return torch.cat(y_hat).to(like), z_hat

    def _exact(self) -> ExactCoder:
        """The entropy model as the coder runs it; made anew when a weight has changed."""
        state = fingerprint(self.entropy_model_parts())
        if self._coder_of != state:
            self._coder, self._coder_of = ExactCoder(self), state
        return self._coder

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
    def from_state_dict(cls, state_dict, name: str = "", card: dict | None = None) -> "Entroformer":
        """A model in eval mode of the architecture and weights of a state dict; see the class for name and card.

        Raises:
            WeightsError: no config inside, or tensors that do not fit it.
        """
        if "_extra_state" not in state_dict:
            raise WeightsError("These weights do not say which architecture they belong to.")
        config = EntroformerConfig.from_json(bytes(state_dict["_extra_state"].tolist()).decode())
        model = cls(config, name=name, card=card).eval()
        try:
            model.load_state_dict(state_dict)
        except RuntimeError as error:
            raise WeightsError(f"These weights do not fit their config: {str(error).splitlines()[1].strip()}") from None
        return model


def fingerprint(modules: list[nn.Module]) -> tuple:
    """Something that changes when a weight of the modules does, however it is changed; for use inside one process."""
    weights = (t for module in modules for t in (*module.parameters(), *module.buffers()))
    return tuple((t.data_ptr(), None if t.is_inference() else t._version, float(t.detach().sum())) for t in weights)


def build_model(name: str, preset: str = "paper", **overrides) -> Entroformer:
    """A freshly initialised model, e.g. `build_model("tiny-parallel", top_k=None)`; see `named_config`."""
    return Entroformer(named_config(name, preset, **overrides))
