"""The latents of one picture as a model's entropy model sees them, in float64.

Where scores nearly tie, float32 may choose another key than the coder's integers; float64 agrees with them.
"""

import copy
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from entroformer_lib.codec import codec
from entroformer_lib.models.gain import Rate


@dataclass(frozen=True)
class WideLatents:
    """A picture at the rate that `codec.encode` would take.

    name: the model's, in variable rate with the lambda; picture: padded, as the latents see it; size: (width, height)
    in pixels before padding; y_hat: [1, M, h, w], as it is coded; seen: the same as the context model sees it; hyper:
    of `hyper_synthesis`, [1, D, h, w], or None; rate: what the entropy model is told, or None.
    """

    name: str
    picture: Image.Image
    size: tuple[int, int]
    y_hat: Tensor
    seen: Tensor
    hyper: Tensor | None
    rate: Rate | None


@torch.inference_mode()
def wide_latents(model, picture) -> WideLatents:
    """Runs transforms and hyperprior.  picture: a PIL image, a path or an array, see `codec.open_picture`."""
    model.eval()
    rgb, _ = codec.to_rgb(codec.open_picture(picture))
    x, level = codec.to_tensor(rgb, model), codec.level_of_file(model)
    y_hat, z = model.latents(x, level)
    rate, y_hat, hyper = wide_rate(model, level), y_hat.double(), None
    if z is not None:
        h_s, z_hat = copy.deepcopy(model.h_s).double(), model.z_prior.quantize_z(z).double()
        hyper = h_s(z_hat if rate is None else z_hat * rate.z_inverse)
    seen = y_hat if rate is None else y_hat * rate.inverse
    return WideLatents(name_at(model, level), codec.to_picture(x), rgb.size, y_hat, seen, hyper, rate)


def name_at(model, level: float | None) -> str:
    """A model's name, and in variable rate the lambda of the level, as `load_model` takes it: `tiny-rates@0.013`."""
    name = getattr(model, "name", None) or f"untrained {model.config.variant}"
    return name if level is None else f"{name}@{model.gain.lmbda_of(level):.3g}"


def wide_rate(model, level: float | None) -> Rate | None:
    """What the entropy model is told of a level, in float64; None where it is told nothing."""
    if model.rate_knowledge is None:
        return None
    knowledge, gain = (copy.deepcopy(part).double() for part in (model.rate_knowledge, model.gain))
    return knowledge(gain, gain.log_gain.new_tensor([level]))
