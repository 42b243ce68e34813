"""The model that a run begins with: new, from other weights, behind frozen transforms, or a trunk's."""

import torch
from torch import Tensor

from entroformer_lib.entroformer import Entroformer, build_model
from entroformer_lib.errors import TrainingError
from entroformer_lib.fields import parse_fields
from entroformer_lib.models.gain import RateGain
from entroformer_lib.training.config import TrainConfig
from entroformer_lib.training.growth import grown
from entroformer_lib.training.latents import freeze, frozen_transforms, with_transforms
from entroformer_lib.weights.zoo import load_model

# Lambda of 1 - MS-SSIM over that of 255^2 MSE at about the same rate: the ratio of CompressAI's two tables of lambdas,
# which runs from 1,333 (2.4 and 0.0018) to 1,222 (220 and 0.18).
MS_SSIM_OVER_MSE = 1290.0
SMALLEST_SPREAD = 1e-3  # that a channel may begin with


def initial_model(config: TrainConfig, trunk: dict | None = None) -> Entroformer:
    """The model of a run before its first step. trunk: the checkpoint that a branch begins at.

    Raises:
        TrainingError: the run hides latents in a way that this model's context does not know, or has one lambda for a
            model of several.
    """
    model = _model(config, trunk)
    context = model.config.context
    one = config.lmbda != TrainConfig.lmbda or config.pretrain_lmbda is not None
    if one and model.config.lmbdas and not (config.lmbdas or config.transforms):
        raise TrainingError("This model has several lambdas; lmbda and pretrain_lmbda are for a model of one.")
    if context == "grouped" and (config.missing or config.pretrain):
        raise TrainingError("missing and pretrain hide latents of Entroformer's context models; GroupedMixer has none.")
    if (config.one_way or config.no_context) and context != "parallel":
        raise TrainingError("Only a parallel model sees its context one way, both ways or not (one_way, no_context).")
    return model


def _model(config: TrainConfig, trunk: dict | None) -> Entroformer:
    lmbdas, fields = tuple(config.lmbdas), parse_fields(config.architecture)
    if trunk is not None:
        return grown(Entroformer.from_state_dict(trunk["model"]), fields)
    if config.transforms:
        source = frozen_transforms(config.transforms)
        if config.init is None:
            return with_transforms(source, config.model, config.preset, **fields)
        return freeze(changed(load_model(config.init, device="cpu"), fields), source)
    if config.init is None:
        return build_model(config.model, config.preset, **{"lmbdas": lmbdas, **fields})
    model = load_model(config.init, device="cpu")
    if lmbdas:
        fields["lmbdas"] = lmbdas
    other_metric = config.metric == "ms-ssim" and model.card.get("metric", "mse") == "mse"
    if other_metric and model.config.lmbdas and not lmbdas:
        raise TrainingError(f"The lambdas of {config.init} are for MSE; give lmbdas for MS-SSIM.")
    return changed(model, fields, MS_SSIM_OVER_MSE if other_metric else 1.0)


def changed(model: Entroformer, fields: dict, lmbda_scale: float = 1.0) -> Entroformer:
    """A model of another architecture that begins with all that fits: every tensor of the same name and shape.

    What does not fit begins afresh. Gains of other lambdas begin from those interpolated at them. Where a context model
    is given up, the rest begins with what it predicts before any context is known.

    Args:
        model: the one to begin from.
        fields: of its config, to change.
        lmbda_scale: the new lambdas over the model's at the same rate; not 1 where the distortion is another.
    """
    config = model.config.replaced(**fields)
    if config == model.config:
        return model
    new = Entroformer(config)
    if new.gain is not None and model.gain is None:
        new.gain = RateGain(config.lmbdas, config.M, reference=model.card.get("lmbda"))
    state = new.state_dict()
    for name, tensor in model.state_dict().items():
        if name == "entropy_parameters.layers.0.weight" and config.context == "none" and config.hyperprior:
            tensor = tensor[:, : config.dim]  # of the hyperprior's feature; the rest is the context's
        fits = name in state and state[name].shape == tensor.shape
        if fits and name != "_extra_state" and not name.startswith("gain."):
            state[name] = tensor
    new.load_state_dict(state)
    if new.gain is not None and model.gain is not None and config.M == model.config.M:
        begin_gain(new.gain, model.gain, lmbda_scale)
    return new


@torch.no_grad()
def begin_gain(new: RateGain, known: RateGain, lmbda_scale: float = 1.0) -> None:
    """Gives new gains the values of known ones at their lambdas: linear in the logarithms, beyond the ends with the
    slope there. Both have as many channels. lmbda_scale: new lambdas over known ones, as in `changed`."""
    lmbdas = torch.tensor(known.lmbdas).log()
    at = (torch.tensor(new.lmbdas) / lmbda_scale).log()
    i = (torch.searchsorted(lmbdas, at, right=True) - 1).clamp(0, len(lmbdas) - 2)
    part = ((at - lmbdas[i]) / (lmbdas[i + 1] - lmbdas[i]))[:, None]  # below 0 and above 1 beyond the ends
    for mine, theirs in ((new.log_gain, known.log_gain), (new.log_inverse, known.log_inverse)):
        mine.copy_(torch.lerp(theirs[i], theirs[i + 1], part))


@torch.no_grad()
def begin_at_channels(model: Entroformer, y: Tensor) -> None:
    """Lets an untrained entropy model begin with the mean and the spread of each channel (ours).

    Otherwise it begins with a scale of about 1 for all. Of trained transforms most channels are nearly always 0, and
    the first hundreds of steps do little more than to find out which.

    y: [B, M, h, w] of g_a, before the gain
    """
    means, scales = y.mean(dim=(0, 2, 3)), y.std(dim=(0, 2, 3)).clamp_min(SMALLEST_SPREAD)
    if model.gain is not None and model.rate_knowledge is None:  # not told the rate: it sees y after the gain
        gain = model.gain.log_gain.mean(dim=0).exp()
        means, scales = gain * means, gain * scales
    for channels, layer in model.entropy_model().output_layers:
        for part, values in zip(layer.bias.chunk(2), (scales.log()[channels], means[channels]), strict=True):
            part[: len(values)] = values  # GroupedMixer's shorter slices leave their last output unused
