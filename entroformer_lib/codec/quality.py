"""How far a decoded picture is from its original."""

import math

import numpy as np
import torch
from PIL import Image


def psnr_db(a: Image.Image, b: Image.Image) -> float:
    """PSNR of two 8-bit pictures in dB, over all pixels and channels; infinite when equal."""
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    mse = np.mean(difference**2)
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def ms_ssim(a: Image.Image, b: Image.Image) -> float | None:
    """MS-SSIM of two 8-bit RGB pictures (Wang 2003, five scales); None below 161 pixels, where it is not defined."""
    from pytorch_msssim import ms_ssim as measure

    if min(a.size) <= 160:
        return None
    x, y = (torch.from_numpy(np.array(p)).permute(2, 0, 1)[None].float() for p in (a, b))
    return float(measure(x, y, data_range=255))
