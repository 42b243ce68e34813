"""Analysis g_a and synthesis g_s: pixels to latents and back (the first two columns of Table 5).

The paper leaves this part as in Minnen et al. 2018: four 5x5 convolutions of stride 2 with GDN between them, so a
latent stands for a 16x16 block of pixels.
"""

from compressai.layers import GDN
from torch import Tensor, nn


def _down(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=5, stride=2, padding=2)


def _up(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(in_channels, out_channels, kernel_size=5, stride=2, padding=2, output_padding=1)


class Analysis(nn.Sequential):
    """g_a: picture to latents.

    x: [B, 3, H, W] in [0, 1]  ->  y: [B, M, H/16, W/16]
    """

    def __init__(self, N: int, M: int):
        super().__init__(_down(3, N), GDN(N), _down(N, N), GDN(N), _down(N, N), GDN(N), _down(N, M))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x - 1)  # the layers see [-1, 1], as in the released code


class Synthesis(nn.Sequential):
    """g_s: latents to picture, not clamped.

    y_hat: [B, M, H/16, W/16]  ->  x_hat: [B, 3, H, W], about [0, 1]
    """

    def __init__(self, N: int, M: int):
        super().__init__(
            _up(M, N), GDN(N, inverse=True), _up(N, N), GDN(N, inverse=True), _up(N, N), GDN(N, inverse=True), _up(N, 3)
        )

    def forward(self, y_hat: Tensor) -> Tensor:
        return super().forward(y_hat) / 2 + 0.5
