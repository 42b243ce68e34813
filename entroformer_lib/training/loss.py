"""The training goal, eq. 2: rate plus lambda times distortion."""

import math

import torch
from compressai.losses import RateDistortionLoss
from torch import Tensor, nn


def psnr_db(mse: Tensor) -> Tensor:
    """PSNR in dB of a mean squared error of pixels in [0, 1]."""
    return -10 * torch.log10(mse)


class TrainingStep(nn.Module):
    """A model with its loss in one module, so that data parallelism sees a single forward pass.

    L = R + lmbda * 255^2 * MSE  (or  lmbda * (1 - MS-SSIM)), R in bits per pixel: CompressAI's RateDistortionLoss. To
    it comes the auxiliary loss of the factorized prior, which moves nothing but that prior's quantiles.

    With `bf16`, convolutions and linear layers run in bfloat16. (Lightning's own bf16-mixed also rounds the inputs, and
    with them the pixels and the noise, to 8 bits of mantissa.)
    """

    def __init__(self, model: nn.Module, metric: str = "mse", bf16: bool = False):
        super().__init__()
        self.model, self.metric, self.bf16 = model, metric, bf16

    def forward(self, x: Tensor, lmbda: float, noise: dict | None = None, kept: Tensor | None = None) -> dict:
        """x: [B, 3, H, W] in [0, 1]  ->  scalars: `loss` (to minimise), `rd_loss`, `bpp`, `bpp_y`, `bpp_z` and
        `psnr_db`, or `ms_ssim`."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            out = self.model(x, noise=noise, kept=kept)
        terms = RateDistortionLoss(lmbda, self.metric)(out, x)
        aux = self.model.aux_loss()
        pixels = x.size(0) * x.size(2) * x.size(3)
        result = {"loss": terms["loss"] + aux, "rd_loss": terms["loss"].detach(), "bpp": terms["bpp_loss"].detach()}
        for name, likelihoods in out["likelihoods"].items():
            result[f"bpp_{name}"] = likelihoods.detach().log().sum() / (-math.log(2) * pixels)
        if self.metric == "mse":
            result["psnr_db"] = psnr_db(terms["mse_loss"].detach())
        else:
            result["ms_ssim"] = terms["ms_ssim_loss"].detach()
        return result
