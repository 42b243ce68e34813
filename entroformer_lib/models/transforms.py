"""Analysis g_a and synthesis g_s: pixels to latents and back (the first two columns of Table 5).

A latent stands for a 16x16 block of pixels. Three parts, each of which can be read alone:

- `Analysis`, `Synthesis`: the paper's, as in Minnen et al. 2018. Four 5x5 convolutions of stride 2 with GDN between.
- `BlockAnalysis`, `BlockSynthesis`: residual blocks of 1x1 and depthwise convolutions on coarse grids, after the intra
  model of DCVC-RT (Jia et al., CVPR 2025). They learn on where convolutions with GDN slow down (docs/training.md).
- `LinearAnalysis`, `LinearSynthesis`: a linear map of each block of pixels that begins as a DCT, added to one of the
  above (`WithLinearPath`). It gives training its start. That a linear, energy-compacting side branch speeds up
  learning is published (AuxT, Li et al. 2025, arXiv 2501.13751: wavelet shortcuts at each stage). One DCT is ours.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from compressai.layers import GDN
from torch import Tensor, nn

from entroformer_lib.models.primitives import replaceable

SIDE = 16  # pixels per side of the block that a latent stands for


# ---- the paper's transforms -----------------------------------------------------------------------------------------


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
    """g_s: latents to picture, not clamped. (Table 5 prints 192 channels for its last layer; a picture has 3.)

    y_hat: [B, M, H/16, W/16]  ->  x_hat: [B, 3, H, W], about [0, 1]
    """

    def __init__(self, N: int, M: int):
        super().__init__(
            _up(M, N), GDN(N, inverse=True), _up(N, N), GDN(N, inverse=True), _up(N, N), GDN(N, inverse=True), _up(N, 3)
        )

    def forward(self, y_hat: Tensor) -> Tensor:
        return _run(list(self), y_hat) / 2 + 0.5


def _run(layers: list[nn.Module], x: Tensor) -> Tensor:
    """The layers one after the other, a convolution and its GDN together."""
    for convolution, norm in itertools.zip_longest(layers[::2], layers[1::2]):
        x = convolved(x, convolution, norm)
    return x


@replaceable
def convolved(x: Tensor, convolution: nn.Module, norm: nn.Module | None) -> Tensor:
    """A convolution and its GDN; `replaceable`, so that it can be done strip by strip.

    x: [B, C, H, W]  ->  [B, C', H / 2, W / 2], or [B, C', 2 H, 2 W] of a transposed convolution
    """
    x = convolution(x)
    return x if norm is None else norm(x)


# ---- blocks on coarse grids -----------------------------------------------------------------------------------------


LIMIT = 3.0  # of the gated branch b


class ConvBlock(nn.Module):
    """Looks at the 3x3 neighbours channel by channel, then mixes the channels of each site by a gated unit.

        x + P(D(leaky(P(x)))),  then  x + P(relu6(a) limited(b))  with  a, b = P(x)

    where P is a 1x1 convolution and D a depthwise 3x3 one. 5 N^2 + 9 N multiplications a site. relu6(a) is
    at most 6 and b is clamped to [-3, 3], which photographs hardly reach. Without these limits every block could
    multiply what it is given: the features of a graphic of saturated colours grew a millionfold in six blocks.

    x: [B, N, h, w]  ->  [B, N, h, w]
    """

    def __init__(self, N: int):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(N, N, 1), nn.Conv2d(N, N, 1)
        self.depthwise = nn.Conv2d(N, N, 3, padding=1, groups=N)
        self.gates, self.mix = nn.Conv2d(N, 2 * N, 1), nn.Conv2d(N, N, 1)

    def forward(self, x: Tensor) -> Tensor:
        return block_of(x, self)


@replaceable
def block_of(x: Tensor, block: ConvBlock) -> Tensor:
    """What a ConvBlock does; `replaceable`, so that it can be done strip by strip."""
    x = x.contiguous(memory_format=torch.channels_last)  # 1x1 convolutions are quicker so
    x = x + block.leave(block.depthwise(F.leaky_relu(block.enter(x), 0.1)))
    a, b = block.gates(x).chunk(2, dim=1)  # [B, N, h, w] each
    return x + block.mix(F.relu6(a) * b.clamp(-LIMIT, LIMIT))


Stages = tuple[tuple[int, int, int], ...]


class BlockAnalysis(nn.Sequential):
    """g_a of blocks.

    Args:
        M: channels of y.
        stages: fine to coarse, for each (pixels per side of a site, channels, blocks), such as ((8, 192, 4),).

    x: [B, 3, H, W] in [0, 1]  ->  y: [B, M, H/16, W/16]
    """

    def __init__(self, M: int, stages: Stages):
        layers, side, channels = [], 1, 3
        for next_side, next_channels, blocks in (*stages, (SIDE, M, 0)):
            step = next_side // side  # step x step sites become channels of one
            # the layers of this stage give [B, next_channels, H / next_side, W / next_side]
            layers += [nn.PixelUnshuffle(step), nn.Conv2d(channels * step**2, next_channels, 1)]
            layers += [ConvBlock(next_channels) for _ in range(blocks)]
            side, channels = next_side, next_channels
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x - 1)


class BlockSynthesis(nn.Sequential):
    """g_s of blocks, the mirror image of BlockAnalysis.

    y_hat: [B, M, H/16, W/16]  ->  x_hat: [B, 3, H, W], not clamped
    """

    def __init__(self, M: int, stages: Stages):
        layers, side, channels = [], SIDE, M
        for next_side, next_channels, blocks in (*reversed(stages), (1, 3, 0)):
            step = side // next_side
            layers += [nn.Conv2d(channels, next_channels * step**2, 1), nn.PixelShuffle(step)]
            layers += [ConvBlock(next_channels) for _ in range(blocks)]
            side, channels = next_side, next_channels
        super().__init__(*layers)

    def forward(self, y_hat: Tensor) -> Tensor:
        return super().forward(y_hat) / 2 + 0.5


# ---- the linear path ------------------------------------------------------------------------------------------------

# With fine steps and the loss in bits per pixel + lambda MSE (mean of three colours, 0 to 255), the best step of an
# orthonormal coefficient is sqrt(18 / (ln 2 lambda)). For lambda = 0.0064 that is 64, or 0.5 where x has the range
# [-1, 1]. Rounding has a step of 1, so a latent is the coefficient times 2.
DCT_SCALE = 2.0
CHROMA_FREQUENCY = 3  # chroma has as little energy as luma has at three times the frequency


def dct_basis(M: int) -> Tensor:
    """The M block patterns of lowest frequency of an orthonormal DCT: [M, 3, 16, 16].

    RGB is turned into luma and two chroma channels first. Frequency is the sum of the vertical and the horizontal one,
    and that of chroma counts `CHROMA_FREQUENCY` times.
    """
    n = torch.arange(SIDE, dtype=torch.float64)
    waves = torch.cos(math.pi / SIDE * n[:, None] * (n + 0.5)) * math.sqrt(2 / SIDE)  # [frequency, place]
    waves[0] /= math.sqrt(2)
    colours = torch.tensor([[1, 1, 1], [1, 0, -1], [-1, 2, -1]], dtype=torch.float64)
    colours = colours / colours.norm(dim=1, keepdim=True)
    patterns = torch.einsum("kc,ui,vj->kuvcij", colours, waves, waves).flatten(0, 2)  # [768, 3, 16, 16]
    frequency = n[:, None] + n  # [16, 16]
    key = torch.stack((frequency, CHROMA_FREQUENCY * frequency, CHROMA_FREQUENCY * frequency)).flatten()
    return patterns[key.sort(stable=True).indices[:M]].float()


class LinearAnalysis(nn.Module):
    """Each 16x16 block of pixels to M numbers; begins as a DCT.  x: [B, 3, H, W] in [0, 1]  ->  [B, M, H/16, W/16]"""

    def __init__(self, M: int):
        super().__init__()
        self.weight = nn.Parameter(DCT_SCALE * dct_basis(M))  # [M, 3, 16, 16]

    def forward(self, x: Tensor) -> Tensor:
        blocks = F.pixel_unshuffle(2 * x - 1, SIDE)  # [B, 768, H/16, W/16]
        return F.conv2d(blocks, self.weight.flatten(1)[..., None, None])


class LinearSynthesis(nn.Module):
    """M numbers to a block of pixels around grey; begins as the inverse DCT.  y_hat: [B, M, h, w]  ->
    [B, 3, 16 h, 16 w], about [-0.5, 0.5]"""

    def __init__(self, M: int):
        super().__init__()
        self.weight = nn.Parameter(dct_basis(M) / DCT_SCALE)  # [M, 3, 16, 16]
        self.bias = nn.Parameter(torch.zeros(3, SIDE, SIDE))

    def forward(self, y_hat: Tensor) -> Tensor:
        kernels = self.weight.flatten(1).transpose(0, 1)[..., None, None]  # [768, M, 1, 1]
        blocks = F.conv2d(y_hat, kernels, self.bias.flatten())  # [B, 768, h, w]
        return F.pixel_shuffle(blocks, SIDE) / 2


class WithLinearPath(nn.Module):
    """A nonlinear network (one of the above) and a linear path beside it: their outputs are added.

    The last layer of the network begins at a tenth of its usual size, so that training begins as a block-transform
    codec with a learned entropy model, and the network learns what the linear path lacks.
    """

    def __init__(self, network: nn.Sequential, linear: nn.Module):
        super().__init__()
        self.network, self.linear = network, linear
        last = [layer for layer in network if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)][-1]
        with torch.no_grad():
            for parameter in last.parameters():
                parameter.mul_(0.1)

    def forward(self, v: Tensor) -> Tensor:
        return self.network(v) + self.linear(v)


def build_transforms(c) -> tuple[nn.Module, nn.Module]:
    """g_a and g_s as an EntroformerConfig wants them."""
    if c.transforms == "gdn":
        g_a, g_s = Analysis(c.N, c.M), Synthesis(c.N, c.M)
    else:
        g_a, g_s = BlockAnalysis(c.M, c.stages), BlockSynthesis(c.M, c.stages)
    if c.linear_path == "dct":
        g_a, g_s = WithLinearPath(g_a, LinearAnalysis(c.M)), WithLinearPath(g_s, LinearSynthesis(c.M))
    return g_a, g_s
