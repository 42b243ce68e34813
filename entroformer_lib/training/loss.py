"""The training goal, eq. 2: rate plus lambda times distortion.

Per pixel: R in bits per pixel, D the mean squared error in units of 0 to 255. That is CompressAI's convention, and the
paper's lambda of 0.02 at about 35 dB fits it.
"""

import math

import torch
from pytorch_msssim import ms_ssim
from torch import Tensor, nn

from entroformer_lib.models.context import NO_GAPS, Gaps

ERROR_WEIGHT = {"mse": 255**2, "ms-ssim": 1}  # what lambda multiplies is this times `errors`


def errors(x_hat: Tensor, x: Tensor, metric: str) -> Tensor:
    """MSE, or 1 - MS-SSIM, of pictures [B, 3, H, W] with values in [0, 1].  ->  [B]"""
    if metric == "mse":
        return (x_hat - x).square().flatten(1).mean(1)
    return 1 - ms_ssim(x_hat, x, data_range=1.0, size_average=False)


def quality(error: Tensor, metric: str) -> dict[str, Tensor]:
    """A mean of `errors` in the usual unit: {"psnr_db"}, or {"ms_ssim"}."""
    return {"psnr_db": -10 * torch.log10(error)} if metric == "mse" else {"ms_ssim": 1 - error}


def rates(likelihoods: dict[str, Tensor], pixels: int) -> dict[str, Tensor]:
    """Bits per pixel of each picture, {"bpp_y": [B], "bpp_z": [B]}."""
    return {f"bpp_{k}": p.log().flatten(1).sum(1) / (-math.log(2) * pixels) for k, p in likelihoods.items()}


def evenly(lmbda: Tensor, lmbdas: tuple[float, ...]) -> Tensor:
    """Weights [B] that let every lambda of a variable rate count alike: R, and so R + lmbda D, grows about as
    sqrt(lmbda), and without them the high rates would be all that a shared network learns for."""
    middle = math.exp(sum(map(math.log, lmbdas)) / len(lmbdas))
    return (middle / lmbda).sqrt()


def tempered(loss: Tensor, drawn: Tensor) -> Tensor:
    """Losses [B] of which a drawn crop counts at most as much as the middle photograph of the batch: the loss of a
    checkerboard is thirty times a photograph's, and a few of them would be all that is learned."""
    if drawn.all() or not drawn.any():
        return loss
    middle = loss.detach()[~drawn].median()
    return torch.where(drawn, loss * (middle / loss.detach()).clamp(max=1), loss)


def unrest(y: Tensor) -> Tensor:
    """About the bits per pixel that channels cost by resting between two integers (ours).

    Most latents of most channels hardly vary. Where they rest at 0 they round to 0 and cost nothing; where they rest at
    0.4, rounding turns next to nothing into zeros and ones, at up to a bit each. The noise that stands for rounding in
    the rate cannot tell these apart, so nothing else keeps a channel from drifting there; and with gains for many rates
    no place but 0 is an integer at all of them. Where the middle of a channel does not round to 0 it may mean
    something, and is left alone.

    y: [B, M, h, w], scaled by the gain  ->  [B]
    """
    rest = y.flatten(2).float().median(dim=2).values  # [B, M]
    return torch.where(rest.abs() < 0.5, rest, 0).square().sum(1) / 16**2  # 2 bits x half the latents x rest^2, a pixel


class TrainingStep(nn.Module):
    """A model with its loss in one module, so that data parallelism sees a single forward pass.

    L = R + lmbda * 255^2 * MSE  (or  lmbda * (1 - MS-SSIM)), R in bits per pixel, each crop with a lmbda of its own
    where the rate is variable (`even`: weighted by 1 / sqrt(lmbda)). What is minimised has two terms more: `unrest` and
    the auxiliary loss of the factorized prior, which moves nothing but that prior's quantiles.

    With `bf16`, convolutions and linear layers run in bfloat16. (Lightning's own bf16-mixed also rounds the inputs, and
    with them the pixels and the noise, to 8 bits of mantissa.)
    """

    def __init__(self, model: nn.Module, metric: str = "mse", bf16: bool = False, even: bool = True):
        super().__init__()
        self.model, self.metric, self.bf16, self.even = model, metric, bf16, even

    def forward(
        self,
        x: Tensor,
        lmbda: float | Tensor,
        noise: dict | None = None,
        gaps: Gaps = NO_GAPS,
        level: Tensor | None = None,
        drawn: Tensor | None = None,
    ) -> dict:
        """x: [B, 3, H, W] in [0, 1], lmbda: one number or [B], level: [B] where the rate is variable; drawn: bool [B],
        crops that are no photographs, see `tempered`.

        ->  scalars: `loss` (to minimise), `rd_loss`, `bpp`, `bpp_y`, `bpp_z` and `error`, the mean of `errors`.
        """
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            out = self.model(x, noise=noise, gaps=gaps, level=level)
        bpp = rates(out["likelihoods"], pixels=x.size(2) * x.size(3))
        error = errors(out["x_hat"], x, self.metric)
        goal = sum(bpp.values()) + lmbda * (ERROR_WEIGHT[self.metric] * error)  # [B]
        terms = self.terms(goal, bpp, lmbda, drawn, unrest(out["y"]))
        return terms | {"error": error.detach().mean()}  # of which parts have a mean, as PSNRs have not

    def terms(
        self, goal: Tensor, bpp: dict[str, Tensor], lmbda: float | Tensor | None, drawn: Tensor | None, more=0.0
    ) -> dict:
        """The scalars that are minimised and logged. goal: [B], R + lambda D of each crop, or R; more: [B],
        what is minimised with it."""
        loss = goal + more
        if self.even and torch.is_tensor(lmbda):
            loss = evenly(lmbda, self.model.config.lmbdas) * loss
        if drawn is not None:
            loss = tempered(loss, drawn)
        logged = {"rd_loss": goal, "bpp": sum(bpp.values()), **bpp}
        means = {name: value.detach().mean() for name, value in logged.items()}
        return {"loss": loss.mean() + self.model.aux_loss(), **means}


class RateStep(TrainingStep):
    """The entropy model alone on given latents, where the transforms are frozen: the loss is the rate.

    Noise on y is there for g_a's gradient. Where g_a is frozen the rate of `rounded` y can be trained, the one that is
    measured; z comes from h_a, which learns, and keeps its noise.
    """

    def __init__(self, model: nn.Module, bf16: bool = False, even: bool = True, rounded: bool = False):
        super().__init__(model, bf16=bf16, even=even)
        self.rounded = rounded

    def forward(
        self,
        y: Tensor,
        lmbda: float | Tensor | None = None,
        noise: dict | None = None,
        gaps: Gaps = NO_GAPS,
        level: Tensor | None = None,
        drawn: Tensor | None = None,
    ) -> dict:
        """y: [B, M, h, w] of g_a, before the gain  ->  scalars `loss`, `rd_loss` = `bpp`, `bpp_y`, `bpp_z`."""
        with torch.autocast(y.device.type, torch.bfloat16, enabled=self.bf16):
            y = self.model.scaled(y, level)
            if self.rounded:
                noise = {**(noise or {}), "y": torch.floor(y + 0.5) - y}
            likelihoods, _ = self.model.likelihoods(y, noise, gaps, level)
        bpp = rates(likelihoods, pixels=256 * y.size(2) * y.size(3))
        return self.terms(sum(bpp.values()), bpp, lmbda, drawn)


@torch.no_grad()
def rates_and_distortions(model: nn.Module, pictures: Tensor, lmbdas: tuple[float, ...], metric: str) -> list[dict]:
    """What a model in eval mode does with pictures at each lambda, by rounded latents and their likelihoods.

    pictures: [n, 3, H, W] in [0, 1]  ->  for each lambda {"lmbda", "rd_loss": mean of R + lambda D, "bpp", and
    "psnr_db" of the mean error or the mean "ms_ssim"}
    """
    rows = []
    for level, lmbda in enumerate(lmbdas):
        bpp, error = [], []
        for x in pictures.split(8):
            levels = torch.full((len(x),), level, device=x.device) if model.config.lmbdas else None
            out = model(x, level=levels)
            bpp.append(sum(rates(out["likelihoods"], x[0, 0].numel()).values()))
            error.append(errors(out["x_hat"].clamp(0, 1), x, metric))
        rate, mean = (torch.cat(values).cpu().double().mean() for values in (bpp, error))
        numbers = {"rd_loss": rate + lmbda * mean * ERROR_WEIGHT[metric], "bpp": rate, **quality(mean, metric)}
        rows.append({"lmbda": lmbda, **{name: float(value) for name, value in numbers.items()}})
    return rows


@torch.no_grad()
def rates_of_latents(model: nn.Module, latents: Tensor, lmbdas: tuple[float, ...]) -> list[dict]:
    """The same of latents of frozen transforms, whose distortions no training changes.

    latents: [n, M, h, w] of g_a, before the gain  ->  for each lambda {"lmbda", "bpp"}
    """
    rows = []
    for level, lmbda in enumerate(lmbdas):
        bpp = []
        for y in latents.split(8):
            levels = torch.full((len(y),), level, device=y.device) if model.config.lmbdas else None
            likelihoods, _ = model.likelihoods(model.scaled(y, levels), level=levels)
            bpp.append(sum(rates(likelihoods, 256 * y[0, 0].numel()).values()))
        rows.append({"lmbda": lmbda, "bpp": float(torch.cat(bpp).cpu().double().mean())})
    return rows
