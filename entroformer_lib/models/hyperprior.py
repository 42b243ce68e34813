"""Hyper analysis h_a and hyper synthesis h_s: hyper-latents z, the side information about y.

Each has three transformer blocks (Table 5: N = 3 of section 3.1, and section 4 counts both), on grids of 1/16, 1/32 and
1/64 of the picture. Between the blocks h_a halves the grid with a 3x3 convolution of stride 2, and h_s doubles it with
a 3x3 convolution and a pixel shuffle. As released, these are ordinary convolutions and z has Z channels; Table 5 prints
group convolutions and 384 channels.

The CNNs, for comparison, have three convolutions each, after Minnen et al. (2018). In the place of their transposed 5x5
convolutions stand 3x3 ones with a pixel shuffle, whose receptive field is at least as large.
"""

from torch import Tensor, nn

from entroformer_lib.models.attention import Stack
from entroformer_lib.models.config import EntroformerConfig
from entroformer_lib.models.position import grid_sites


class GridBlock(nn.Module):
    """One transformer block on a feature map: every site is a token, in raster order.

    x: [B, D, h, w]  ->  [B, D, h, w]
    """

    def __init__(self, config: EntroformerConfig, top_k: int | None, radius: int):
        super().__init__()
        self.stack = Stack(config, layers=1, top_k=top_k, radius=radius)

    def forward(self, x: Tensor) -> Tensor:
        B, D, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # [B, h w, D]
        tokens = self.stack(tokens, grid_sites(h, w, x.device))
        return tokens.transpose(1, 2).reshape(B, D, h, w)


def per_site(layer: nn.Module, x: Tensor) -> Tensor:
    """Applies a layer that works on the last axis (Linear, LayerNorm) to the channels of [B, C, h, w]."""
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class HyperAnalysis(nn.Module):
    """h_a.  y: [B, M, H/16, W/16]  ->  z: [B, Z, H/64, W/64]"""

    def __init__(self, c: EntroformerConfig):
        super().__init__()
        self.embed = nn.Linear(c.M, c.dim)
        self.blocks = nn.ModuleList(GridBlock(c, k, h) for k, h in zip(c.hyper_top_k, c.hyper_radius, strict=True))
        self.down = nn.ModuleList(nn.Conv2d(c.dim, c.dim, 3, stride=2, padding=1) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(c.dim), nn.Linear(c.dim, c.Z))

    def forward(self, y: Tensor) -> Tensor:
        x = per_site(self.embed, y)  # [B, D, H/16, W/16]
        x = self.down[0](self.blocks[0](x))  # [B, D, H/32, W/32]
        x = self.down[1](self.blocks[1](x))  # [B, D, H/64, W/64]
        return per_site(self.head, self.blocks[2](x))


class HyperSynthesis(nn.Module):
    """h_s.  z_hat: [B, Z, H/64, W/64]  ->  hyperprior feature: [B, D, H/16, W/16]"""

    def __init__(self, c: EntroformerConfig):
        super().__init__()
        self.embed = nn.Linear(c.Z, c.dim)
        stages = reversed(list(zip(c.hyper_top_k, c.hyper_radius, strict=True)))  # coarse to fine
        self.blocks = nn.ModuleList(GridBlock(c, k, h) for k, h in stages)
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c.dim, 4 * c.dim, 3, padding=1), nn.PixelShuffle(2)) for _ in range(2)
        )

    def forward(self, z_hat: Tensor) -> Tensor:
        x = per_site(self.embed, z_hat)  # [B, D, H/64, W/64]
        x = self.up[0](self.blocks[0](x))  # [B, D, H/32, W/32]
        x = self.up[1](self.blocks[1](x))  # [B, D, H/16, W/16]
        return self.blocks[2](x)


class CnnHyperAnalysis(nn.Sequential):
    """h_a as a CNN.  y: [B, M, H/16, W/16]  ->  z: [B, Z, H/64, W/64]"""

    def __init__(self, c: EntroformerConfig):
        super().__init__(
            nn.Conv2d(c.M, c.dim, 3, padding=1),  # [B, D, H/16, W/16]
            nn.LeakyReLU(),
            nn.Conv2d(c.dim, c.dim, 5, stride=2, padding=2),  # [B, D, H/32, W/32]
            nn.LeakyReLU(),
            nn.Conv2d(c.dim, c.Z, 5, stride=2, padding=2),  # [B, Z, H/64, W/64]
        )


class CnnHyperSynthesis(nn.Sequential):
    """h_s as a CNN.  z_hat: [B, Z, H/64, W/64]  ->  hyperprior feature: [B, D, H/16, W/16]"""

    def __init__(self, c: EntroformerConfig):
        super().__init__(
            nn.Conv2d(c.Z, 4 * c.dim, 3, padding=1),  # [B, 4 D, H/64, W/64]
            nn.PixelShuffle(2),  # [B, D, H/32, W/32]
            nn.LeakyReLU(),
            nn.Conv2d(c.dim, 4 * c.dim, 3, padding=1),  # [B, 4 D, H/32, W/32]
            nn.PixelShuffle(2),  # [B, D, H/16, W/16]
            nn.LeakyReLU(),
            nn.Conv2d(c.dim, c.dim, 3, padding=1),
        )


def build_hyperprior(c: EntroformerConfig) -> tuple[nn.Module | None, nn.Module | None]:
    """h_a and h_s as the config wants them."""
    if not c.hyperprior:
        return None, None
    if c.hyper == "cnn":
        return CnnHyperAnalysis(c), CnnHyperSynthesis(c)
    return HyperAnalysis(c), HyperSynthesis(c)
