"""One picture as a model's entropy model sees it: what attention servers and the masking study begin with."""

import copy

import torch
from PIL import Image

from entroformer_lib.codec import codec
from entroformer_lib.codec.pictures import within
from entroformer_lib.entroformer import evaluating, in_float32

SIDE = 768  # pixels; attention takes time and memory with the square of the picture


class Scene:
    """Latents, hyperprior feature and rate of one picture, computed once, and a copy of the entropy model.

    A model of variable rate is looked at as it is when the scene is made: at the level that `codec.encode` would take.
    Later changes of the model do not reach the scene.

    Attributes:
        model: the copy, without g_a, g_s, h_a and h_s; name: the model's, in variable rate with the lambda; level: of
            variable rate, or None; rate: what the copy is told of the level, or None; y_hat: [1, M, h, w]; hyper:
            [1, D, h, w], or None without hyperprior; height, width: of the latent grid; picture: padded, as the latents
            see it; size: (width, height) in pixels before padding; inside: (left, top, width, height) of the picture in
            the padded one, in pixels; z_bits: what the hyper-latents cost, estimated.

    Args:
        model: an Entroformer.
        picture: a PIL image, a path or an array, see `codec.open_picture`.
        dtype: of the copy and of what it computes. The latents themselves are those that the coder has.
        level: of a model of variable rate, where it is not to be the model's own.
    """

    @torch.inference_mode()
    def __init__(self, model, picture, dtype: torch.dtype = torch.float64, level: float | None = None):
        level = codec.level_of_file(model) if level is None else level
        with evaluating(in_float32(model)) as model:
            self._compute(model, codec.to_rgb(codec.open_picture(picture))[0], dtype, level)

    def _compute(self, model, rgb, dtype: torch.dtype, level: float | None) -> None:
        x = codec.to_tensor(rgb, model)
        y_hat, z = model.latents(x, level)
        self.model = copy.deepcopy(model, {id(part): None for part in (model.g_a, model.g_s)}).to(dtype)
        self.rate, self.y_hat = self.model.rate(level), y_hat.to(dtype)
        z_hat = None if z is None else model.z_prior.quantize_z(z).to(dtype)
        self.hyper = None if z is None else self.model.hyper_synthesis(z_hat, self.rate)
        self.model.h_a = self.model.h_s = None  # not needed any more, and `capture` is quicker without
        self.z_bits = 0.0 if z is None else float(-self.model.z_prior.likelihood(z_hat).log2().sum())
        unused = (model.g_a, *model.entropy_model_parts())
        self._synthesis = copy.deepcopy(model, {id(part): None for part in unused})
        self.level, self.name = level, name_at(model, level)
        self.picture, self.size = codec.to_picture(x), rgb.size
        self.height, self.width = y_hat.shape[-2:]
        left, top = ((whole - part) // 2 for whole, part in zip(self.picture.size, self.size, strict=True))
        self.inside = (left, top, *self.size)

    @torch.inference_mode()
    def reconstruct(self, y_hat) -> Image.Image:
        """The padded picture that g_s makes of other latents.  y_hat: [1, M, h, w]"""
        latents = torch.as_tensor(y_hat).to(next(self._synthesis.g_s.parameters()))
        return codec.to_picture(self._synthesis.reconstruct(latents, self.level))


def fitting(picture, side: int = SIDE) -> Image.Image:
    """A picture (RGB) small enough to look at every latent: scaled down where its longer side has more pixels.

    picture: see `codec.open_picture`.
    """
    return within(codec.to_rgb(codec.open_picture(picture))[0], side)


def name_at(model, level: float | None) -> str:
    """A model's name, and in variable rate the lambda of the level, as `load_model` takes it: `NAME@0.013`."""
    name = model.name or f"untrained {model.config.variant}"
    return name if level is None else f"{name}@{model.gain.lmbda_of(level):.3g}"
