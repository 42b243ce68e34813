"""Analysis g_a and synthesis g_s: pixels to latents and back (the first two columns of Table 5).

The paper leaves this part as in Minnen et al. 2018: four 5x5 convolutions of stride 2 with GDN between them, so a
latent stands for a 16x16 block of pixels.
"""

import itertools

import torch
from compressai.layers import GDN
from torch import Tensor, nn

STRIP_ELEMENTS = 2**24  # of a layer's input or output at a time when no gradient is wanted: 64 MiB in float32


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
        return _run(list(self), 2 * x - 1)  # the layers see [-1, 1], as in the released code


class Synthesis(nn.Sequential):
    """g_s: latents to picture, not clamped.

    y_hat: [B, M, H/16, W/16]  ->  x_hat: [B, 3, H, W], about [0, 1]
    """

    def __init__(self, N: int, M: int):
        super().__init__(
            _up(M, N), GDN(N, inverse=True), _up(N, N), GDN(N, inverse=True), _up(N, N), GDN(N, inverse=True), _up(N, 3)
        )

    def forward(self, y_hat: Tensor) -> Tensor:
        return _run(list(self), y_hat) / 2 + 0.5


def _run(layers: list[nn.Module], x: Tensor) -> Tensor:
    """The layers one after the other; a convolution and its GDN together, in strips where no gradient is wanted.

    GDN alone holds four copies of its input; at 3840x2160 pixels and 192 channels one copy is 1.6 GB.
    """
    for convolution, norm in itertools.zip_longest(layers[::2], layers[1::2]):
        x = _pair(convolution, norm, x) if torch.is_grad_enabled() else _in_strips(convolution, norm, x)
    return x


def _pair(convolution: nn.Module, norm: nn.Module | None, x: Tensor) -> Tensor:
    x = convolution(x)
    return x if norm is None else norm(x)


def _in_strips(convolution: nn.Module, norm: nn.Module | None, x: Tensor) -> Tensor:
    """Convolution and GDN over strips of rows, each with the neighbouring rows that a 5x5 kernel reaches.

    x: [B, C, H, W]  ->  [B, C', H / 2 or 2 H, ...]
    """
    B, _, H, W = x.shape
    shrinks = isinstance(convolution, nn.Conv2d)
    height, width = ((H + 1) // 2, (W + 1) // 2) if shrinks else (2 * H, 2 * W)
    # A row of the output, or the share of the input that it reads: the last layer of g_s reads far more than it writes.
    widest = max(convolution.out_channels * width, convolution.in_channels * W * H // height)
    rows = max(2, STRIP_ELEMENTS // (B * widest) // 2 * 2)
    if rows >= height:
        return _pair(convolution, norm, x)
    out = x.new_empty(B, convolution.out_channels, height, width)
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        # Output row r reads the input rows 2r-2 ... 2r+2 of a convolution, r/2-1 ... r/2+1 of a transposed one.
        # `first` is even for a convolution, so that the strip keeps the phase of the stride.
        first, last = (2 * start - 2, 2 * stop + 1) if shrinks else (start // 2 - 1, stop // 2 + 1)
        first, last = max(first, 0), min(last, H)
        skip = start - first // 2 if shrinks else start - 2 * first
        strip = _pair(convolution, norm, x[:, :, first:last])
        out[:, :, start:stop] = strip[:, :, skip : skip + stop - start]
    return out
