"""More latents for a trained model: those that tell most of what its pictures still lack at its highest rate.

    python benchmarks/more_latents.py runs/long.safetensors --channels 64 --data DATA --out start.safetensors
        --stages 8 256 12

The new rows of the linear path are the reduced-rank regression of the residual x - x_hat on the block x: no other
linear map to so many numbers, and back, takes more of the squared error away. (Further rows of the DCT would describe
again what the learned ones describe already.) The entropy model begins with one scale for each new channel. With
`--stages` the transforms grow as well, with the same outputs (training/growth.py). benchmarks/long_run_gpu.py goes on
from the file.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn
from tyro.conf import Positional

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import WeightsError
from entroformer_lib.files import data_folder
from entroformer_lib.models.transforms import DCT_SCALE, SIDE
from entroformer_lib.training.data import PreloadedCrops, read_names
from entroformer_lib.training.growth import grown
from entroformer_lib.weights.zoo import load_model

PIXELS = 3 * SIDE**2


def blocks(x: Tensor) -> Tensor:
    """[B, 3, H, W]  ->  [n, 768], float64"""
    return F.pixel_unshuffle(x, SIDE).permute(0, 2, 3, 1).reshape(-1, PIXELS).double()


def moments(model: Entroformer, batches) -> tuple[Tensor, Tensor, float]:
    """Of blocks b in [-1, 1] and what the highest rate leaves of them, r: means of b b^T, of r b^T and of r r."""
    inner, outer, energy, count = torch.zeros(PIXELS, PIXELS).double(), torch.zeros(PIXELS, PIXELS).double(), 0.0, 0
    top = float(len(model.config.lmbdas) - 1)
    for x in batches:
        r, b = blocks(2 * (x - model(x, level=torch.full((len(x),), top))["x_hat"])), blocks(2 * x - 1)
        inner, outer = inner + b.T @ b, outer + r.T @ b
        energy, count = energy + float(r.square().sum()), count + len(b)
    return inner / count, outer / count, energy / count


def regression(inner: Tensor, outer: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced-rank regression.  ->  analysis [rank, 768], orthonormal synthesis [rank, 768], explained energy [rank]"""
    ridge = 1e-7 * inner.diag().mean() * torch.eye(PIXELS).double()
    best = outer @ torch.linalg.inv(inner + ridge)
    energies, directions = torch.linalg.eigh(best @ inner @ best.T)
    synthesis = directions.flip(1)[:, :rank].T
    return synthesis @ best, synthesis, energies.flip(0)[:rank]


@torch.no_grad()
def with_channels(model: Entroformer, analysis: Tensor, synthesis: Tensor, scales: Tensor) -> Entroformer:
    """The model with more latents, in the units of the linear path; `scales` are what the entropy model expects.

    Raises:
        WeightsError: a GroupedMixer, whose slices would have other channels.
    """
    if model.config.context == "grouped":
        raise WeightsError("A GroupedMixer cannot get more latents: each of its slices would have other channels.")
    old, new = model.config.M, model.config.M + len(analysis)
    larger = Entroformer(model.config.replaced(M=new)).train(model.training)
    known, state = model.state_dict(), larger.state_dict()
    for name, tensor in state.items():
        if name == "_extra_state" or "_cdf" in name or name.endswith("_offset"):
            continue
        value = known[name]
        if name.startswith("entropy_parameters.layers.2."):  # logarithms of scales, then means
            for half, start in zip(value.chunk(2), (0, new), strict=True):
                tensor[start : start + old] = half
                tensor[start + old : start + new] = 0
            if name.endswith("bias"):
                tensor[old:new] = scales.log()
        elif name.startswith("gain."):
            tensor[:, :old], tensor[:, old:] = value, value.median(dim=1, keepdim=True).values
        elif value.shape == tensor.shape:
            tensor.copy_(value)
        else:
            tensor.zero_()
            tensor[tuple(slice(0, side) for side in value.shape)] = value
    state["g_a.linear.weight"][old:] = analysis.view(-1, 3, SIDE, SIDE)
    state["g_s.linear.weight"][old:] = synthesis.view(-1, 3, SIDE, SIDE)
    nn.Module.load_state_dict(larger, {k: v for k, v in state.items() if k != "_extra_state"}, strict=False)
    return larger


def main(
    model: Positional[str],
    data: str,
    out: Path,
    channels: int = 64,
    stages: tuple[int, ...] = (),
    crops: int = 560,
) -> None:
    """Writes weights to go on from, in half precision, with their config in the file's metadata.

    Args:
        model: With blocks and a linear path, of variable rate.
        data: Pictures to learn the new rows from; the held-out ones are left out.
        channels: How many latents more.
        stages: Three numbers for each stage of the larger transforms; none keeps them.
        crops: Of 256 pixels, to learn from.
    """
    small = load_model(model, "cpu")
    pictures = PreloadedCrops(data, 256, 5, left_out=read_names(data_folder() / "reference" / "held_out.txt"))
    with torch.no_grad():
        batches = pictures.batches(range(i, i + 8) for i in range(0, crops, 8))
        inner, outer, energy = moments(small, batches)
    analysis, synthesis, explained = regression(inner, outer, channels)
    print(f"{channels} numbers more explain {float(explained.sum()) / energy:.1%} of the squared error")
    rows = DCT_SCALE * analysis
    scales = (rows @ inner * rows).sum(1).sqrt().clamp(min=math.exp(-4))
    if stages:
        groups = tuple(stages[i : i + 3] for i in range(0, len(stages), 3))
        small = grown(small, {"stages": groups})
    larger = with_channels(small, rows.float(), (synthesis / DCT_SCALE).float(), scales.float())
    state = {k: v.contiguous() for k, v in larger.state_dict().items() if v.is_floating_point()}
    state = {k: v.half() if v.dim() >= 2 and v.numel() > 4096 else v for k, v in state.items()}
    save_file(state, out, metadata={"config": larger.config.to_json()})


if __name__ == "__main__":
    tyro.cli(main)
