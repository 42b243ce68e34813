"""CompressAI's contract around the network: forward, compress, decompress, update; weights that know their config."""

import copy
import dataclasses
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import xxhash
from compressai.registry import register_model
from torch import Tensor, nn

from entroformer_lib.errors import ConfigError, DataError, WeightsError
from entroformer_lib.exact import hyper_latents
from entroformer_lib.exact.coder import ExactCoder
from entroformer_lib.exact.quick import QuickTopK
from entroformer_lib.models.attention import TopKAttention
from entroformer_lib.models.config import LARGEST_K, EntroformerConfig, named_config
from entroformer_lib.models.network import Network
from entroformer_lib.models.priors import FactorizedPrior
from entroformer_lib.rangecoder import LARGEST
from entroformer_lib.sparse_attention import SparseAttention
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
        self._tables_of: int | None = None  # fingerprint of p(z) with the tables that belong to it
        self._coder, self._coder_of = None, None

    @property
    def downsampling_factor(self) -> int:
        return self.config.downsampling

    def entropy_model_parts(self) -> list[nn.Module]:
        """Everything but g_a, g_s and the gains: what the paper's Table 6 weighs."""
        parts = (self.h_a, self.h_s, self.context_model, self.entropy_parameters, self.z_prior, self.rate_knowledge)
        return [part for part in parts if part is not None]

    @property
    def search_window(self) -> int | None:
        """How many rows and columns away a token looks, on its own grid; None: everywhere. It may be changed at any
        time; a file says which one it was coded with."""
        return self.config.search_window

    @search_window.setter
    def search_window(self, window: int | None) -> None:
        """Raises ConfigError for a window that cannot be."""
        self.config = self.config.replaced(search_window=window)
        for layer in self.modules():
            if isinstance(layer, TopKAttention):
                layer.window = window

    @property
    def context_k(self) -> int | None:
        """How many keys the context model's attention keeps; None: all. `config.top_k` unless it was changed, which may
        be at any time; a file says which one it was coded with. None too where the context model has no such number."""
        return self.context_model.stack.blocks[0].attention.top_k if self.takes_k else None

    @context_k.setter
    def context_k(self, k: int | None) -> None:
        """Raises ConfigError for a k that cannot be, or a context model that has none."""
        if not self.takes_k:
            raise ConfigError(
                "Only Entroformer's context models, serial and parallel, can keep another number k of keys."
            )
        if k is not None and not 1 <= k <= LARGEST_K:
            raise ConfigError(f"k is a number from 1 to {LARGEST_K:,}, not {k:,}.")
        for block in self.context_model.stack.blocks:
            block.attention.top_k = k

    @property
    def takes_k(self) -> bool:
        return self.config.context in ("serial", "parallel")

    def forward(self, *args, **more) -> dict:
        """As Network.forward; without gradients in tiles, so that memory grows with the number of latents."""
        with nullcontext() if torch.is_grad_enabled() else in_parts():
            return super().forward(*args, **more)

    def likelihoods(self, *args, **more):
        """As Network.likelihoods; without gradients in tiles."""
        with nullcontext() if torch.is_grad_enabled() else in_parts():
            return super().likelihoods(*args, **more)

    @torch.no_grad()
    def analysis(self, x: Tensor) -> Tensor:
        """y of g_a, strip by strip.  x: [B, 3, H, W]  ->  [B, M, H/16, W/16], not scaled and not rounded"""
        with Tiles():
            return self.g_a(x)

    @torch.no_grad()
    def estimated_bits(self, y: Tensor, level: float | None = None) -> dict[str, Tensor]:
        """Where the bits go, by the likelihoods: {"y": [B, H/16, W/16], "z": [B, H/64, W/64]}, summed over channels,
        in float64; no "z" without a hyperprior.

        y: [B, M, H/16, W/16], scaled by the gain of `level` where there is one."""
        with evaluating(self) as model:
            return {name: -p.double().log2().sum(1) for name, p in model.likelihoods(y, level=level)[0].items()}

    # ---- real bytes ----

    @torch.no_grad()
    def latents(self, x: Tensor, level: float | None = None) -> tuple[Tensor, Tensor | None]:
        """What `compress_latents` takes.  x: [B, 3, H, W]  ->  y_hat, rounded; z, which p(z) rounds to its own grid, or
        None"""
        self.check_size(x)
        if not x.isfinite().all():
            raise DataError("The picture has values that are not finite numbers.")
        with stage("transforms"):
            y = self.scaled(self.analysis(x), level)
        with stage("hyper"), Tiles():
            return torch.floor(y + 0.5), None if self.h_a is None else self.hyper_analysis(y, self.rate(level))

    @torch.no_grad()
    def best_k(self, y_hat: Tensor, z: Tensor | None, ks: Iterable[int], level: float | None = None) -> int:
        """That of several k (0: all keys) with which the context model needs the fewest estimated bits for latents.

        y_hat, z: as `latents` gives them. Raises ConfigError for a k that cannot be.
        """
        rate = self.rate(level)
        with in_parts():
            hyper = None if z is None else self.hyper_synthesis(self.z_prior.quantize_z(z), rate)

            def bits(k: int) -> float:
                with searching(self, self.search_window, k):
                    means, scales = self.distributions(y_hat, hyper, rate=rate)
                return -float(self.gaussian(y_hat, means, scales).double().log2().sum())

            return min(ks, key=bits)

    @torch.no_grad()
    def compress(self, x: Tensor) -> dict:
        """x: [B, 3, H, W] in [0, 1]  ->  {"strings": [[y of each picture], [z of each picture]], "shape": z's (h, w)}.

        Without hyperprior there is one list of strings, and "shape" is that of y.
        """
        with coding(self) as model:
            return model.compress_latents(*model.latents(x.float()))

    @torch.no_grad()
    def compress_latents(self, y_hat: Tensor, z: Tensor | None, level: float | None = None) -> dict:
        """Second half of `compress`. y_hat: [B, M, h, w] integers, z: [B, Z, h/4, w/4] or None.

        Raises:
            WeightsError: latents or predictions that cannot be coded: no finite numbers, or far too large.
        """
        for latents in (y_hat,) if z is None else (y_hat, z):  # a coder that meets such a number may never end
            most = float(latents.abs().amax())
            if not most <= LARGEST:  # also where it is no number
                raise WeightsError(
                    f"The model gives a latent of {most:g}, and the coder takes up to {LARGEST}: "
                    "its weights are damaged, or do not fit this picture."
                )
        coder = self._exact()
        rate = coder.rate(self, level)
        if z is None:
            return {"strings": [[coder.encode(y[None], None, rate) for y in y_hat]], "shape": y_hat.shape[-2:]}
        self.refresh_tables()
        z_strings = hyper_latents.encode(self.z_prior, z)
        z_hat = hyper_latents.decode(self.z_prior, z_strings, z.shape[-2:])  # exactly what the decoder will have
        y_strings = [coder.encode(y[None], z1[None], rate) for y, z1 in zip(y_hat, z_hat, strict=True)]
        return {"strings": [y_strings, z_strings], "shape": z.shape[-2:]}

    @torch.no_grad()
    def decompress(self, strings: list[list[bytes]], shape) -> dict:
        """Inverse of `compress`: {"x_hat": [B, 3, H, W] clamped to [0, 1]}."""
        with coding(self) as model:
            return {"x_hat": model.reconstruct(model.decompress_latents(strings, shape)[0])}

    @torch.no_grad()
    def reconstruct(self, y_hat: Tensor, level: float | None = None) -> Tensor:
        """y_hat: [B, M, h, w]  ->  x_hat: [B, 3, H, W] clamped to [0, 1]

        Raises:
            WeightsError: pixels that are no finite numbers.
        """
        with stage("transforms"), Tiles():
            x_hat = self.g_s(y_hat * self.gains(level)[1])
        if not x_hat.isfinite().all():
            raise WeightsError("The model gives pixels that are not finite numbers: its weights are damaged.")
        return x_hat.clamp(0, 1)

    @torch.no_grad()
    def decompress_latents(
        self, strings: list[list[bytes]], shape, level: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """First half of `decompress`: y_hat [B, M, h, w] and z_hat or None.

        Raises:
            BitstreamError: damaged strings. WeightsError: predictions that are no finite numbers.
        """
        coder = self._exact()
        rate = coder.rate(self, level)
        like = next(self.g_s.parameters())
        if self.h_a is None:
            y_hat = [coder.decode(s, None, tuple(shape), rate) for s in strings[0]]
            return torch.cat(y_hat).to(like), None
        self.refresh_tables()
        z_hat = hyper_latents.decode(self.z_prior, strings[1], tuple(shape)).to(like)
        size = (4 * shape[0], 4 * shape[1])
        y_hat = [coder.decode(s, z[None], size, rate) for s, z in zip(strings[0], z_hat, strict=True)]
        return torch.cat(y_hat).to(like), z_hat

    def _exact(self) -> ExactCoder:
        """The entropy model as the coder runs it; made anew when a weight has changed."""
        device = next(self.g_s.parameters()).device
        state = fingerprint(self.entropy_model_parts()), self.search_window, self.context_k, device
        if self._coder_of != state:
            self._coder, self._coder_of = ExactCoder(self), state
        return self._coder

    # ---- the factorized prior's tables: nobody needs to remember `update()` ---------------------------------------

    def update(self, scale_table=None, force: bool = False, update_quantiles: bool = False) -> bool:
        """CompressAI's call. Here it is optional: `compress` and `decompress` refresh the tables when they are old."""
        updated = super().update(scale_table, force=force, update_quantiles=update_quantiles)
        self._tables_of = self._prior_state()
        return updated

    def refresh_tables(self) -> None:
        """Builds the tables of p(z) unless those at hand belong to these weights (loaded with them, or just built).

        Raises:
            WeightsError: a density that is not finite.
        """
        prior = self.z_prior
        if isinstance(prior, FactorizedPrior) and (self._tables_of != self._prior_state() or not prior.offset.numel()):
            if not all(p.isfinite().all() for p in prior.parameters()):
                raise WeightsError("The density of z has weights that are not finite numbers.")
            self.update(force=True)

    def _prior_state(self) -> int:
        return fingerprint([] if self.z_prior is None else [self.z_prior])

    # ---- weights ----

    def get_extra_state(self) -> Tensor:
        """The config travels inside the state dict, as bytes."""
        return torch.tensor(list(self.config.to_json().encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        theirs = config_of(state)
        for name, ours in dataclasses.asdict(self.config).items():
            if name != "search_window" and getattr(theirs, name) != ours:
                raise WeightsError(
                    f"These weights were made with {name} = {getattr(theirs, name)}, this model has {name} = {ours}."
                )

    def load_state_dict(self, state_dict, strict: bool = True):
        """As CompressAI's; tables of p(z) that come along are kept as they are, so every machine codes z alike."""
        result = super().load_state_dict(dict(state_dict), strict=strict)
        if isinstance(self.z_prior, FactorizedPrior):
            hyper_latents.check_tables(self.z_prior)
        self._tables_of = None if self.training else self._prior_state()
        return result

    @classmethod
    def from_state_dict(cls, state_dict, name: str = "", card: dict | None = None) -> "Entroformer":
        """A model in eval mode of the architecture and weights of a state dict; see the class for name and card.

        Raises:
            WeightsError: no config inside, or tensors that do not fit it. ConfigError: a config that this version does
                not know.
        """
        if "_extra_state" not in state_dict:
            raise WeightsError("These weights do not say which architecture they belong to.")
        config = config_of(state_dict["_extra_state"])
        if least_weights(config) > sum(tensor.numel() for tensor in state_dict.values()):
            raise WeightsError("These weights do not fit their config, which describes a larger network.")
        model = cls(config, name=name, card=card).eval()
        if unknown := sorted(state_dict.keys() - model.state_dict().keys()):
            raise WeightsError(f"These weights do not fit their config: it describes no {unknown[0]!r}.")
        try:
            model.load_state_dict(state_dict)
        except RuntimeError as error:
            raise WeightsError(f"These weights do not fit their config: {str(error).splitlines()[1].strip()}") from None
        except KeyError as error:  # CompressAI's, of tables
            raise WeightsError(f"These weights do not fit their config: they lack {error.args[0]}.") from None
        return model


def config_of(state: Tensor) -> EntroformerConfig:
    """The config that weights carry as bytes of JSON; raises WeightsError or ConfigError where it is none."""
    try:
        return EntroformerConfig.from_json(bytes(state.tolist()).decode())
    except (TypeError, ValueError):
        raise WeightsError("These weights say in no text which architecture they belong to.") from None


def least_weights(c: EntroformerConfig) -> int:
    """A number of weights that the network has at least: those of its largest matrices. The rest is a few times as
    many, so weights that have fewer than this need not be given a network."""
    feed_forward = 2 * c.ffn_ratio * c.dim**2
    found = 2 * len(c.lmbdas) * c.M + (2 * 768 * c.M if c.linear_path == "dct" else 0)
    found += sum(10 * count * channels**2 for _, channels, count in c.stages)
    found += 25 * (4 * c.N**2 + 2 * c.N * c.M) if c.transforms == "gdn" else 0
    if c.hyperprior:
        found += 6 * feed_forward if c.hyper == "transformer" else 9 * c.dim * c.M
    if c.context in ("serial", "parallel", "grouped"):
        found += c.context_layers * feed_forward
    return found + (0 if c.context == "grouped" else 8 * c.dim * c.M)


def fingerprint(modules: list[nn.Module]) -> int:
    """A checksum that changes when a weight of the modules does, however it is changed."""
    digest = xxhash.xxh3_64()
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.intdigest()


def in_float32(model: Entroformer) -> Entroformer:
    """The model as it codes: a copy, where it has another precision. What torch.compile made of it is unwrapped."""
    model = getattr(model, "_orig_mod", model)
    return model if all(p.dtype == torch.float32 for p in model.parameters()) else copy.deepcopy(model).float()


@contextmanager
def in_parts() -> Iterator[None]:
    """Inside the block, where no gradient is wanted, attention takes little time, and memory grows with the number of
    latents and pixels."""
    with QuickTopK(), Tiles(), SparseAttention():
        yield


@contextmanager
def evaluating(model: Entroformer) -> Iterator[Entroformer]:
    """A model in eval mode inside the block, and afterwards as it was, part by part."""
    before = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, training in before.items():
            module.training = training


_CODING = threading.RLock()  # the default dtype is the process's


@contextmanager
def coding(model: Entroformer) -> Iterator[Entroformer]:
    """A model as it codes, in float32 and eval mode, whatever stands around: autocast, another default of dtype or
    device, other threads that code, which wait."""
    model = in_float32(model)
    place = next(model.parameters()).device
    elsewhere = torch.get_default_device().type != "cpu"
    with (
        _CODING,
        evaluating(model),
        torch.autocast(place.type, enabled=False),
        torch.device("cpu") if elsewhere else nullcontext(),
    ):
        kind = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield model
        finally:
            torch.set_default_dtype(kind)


@contextmanager
def searching(model: Entroformer, window: int | None, k: int | None) -> Iterator[None]:
    """A model with another search window and another k of its context model inside the block.

    window: None is no window. k: 0 is all keys, None is that of the model's config.
    """
    before = model.search_window, model.context_k
    try:
        model.search_window = window
        if k is not None or model.takes_k:
            model.context_k = model.config.top_k if k is None else k or None
        yield
    finally:
        model.search_window = before[0]
        if model.takes_k:
            model.context_k = before[1]


def build_model(name: str, preset: str = "paper", **overrides) -> Entroformer:
    """A freshly initialised model, e.g. `build_model("tiny-parallel", top_k=None)`; see `named_config`."""
    return Entroformer(named_config(name, preset, **overrides))
