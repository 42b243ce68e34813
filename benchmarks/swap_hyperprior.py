"""Gives an entropy model the hyperprior of another one behind the same transforms, to go on from there.

    python benchmarks/swap_hyperprior.py runs/serial/weights.safetensors --hyperprior blocks-parallel \\
        --latents runs/latents --out runs/begin.safetensors
    entroformer train --init runs/begin.safetensors --transforms blocks-parallel --latents runs/latents ...

The hyperprior that learned longest knows most, whatever context model it learned beside. What the first model's layers
read from their hyperprior's feature they then read from the nearest linear map of the other's feature, found by least
squares; training does the rest.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from tyro.conf import Positional

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import WeightsError
from entroformer_lib.training.latents import LatentCrops, transforms_digest
from entroformer_lib.weights.zoo import load_model, save_weights

PARTS = ("h_a.", "h_s.", "z_prior.", "rate_knowledge.")
TABLES = ("._quantized_cdf", "._cdf_length", "._offset")  # of z's coder, which are made anew
RIDGE = 1e-3  # of the features' variance: keeps the map from leaning on what hardly varies


def readers(model: Entroformer) -> Iterator[tuple[nn.Linear, slice]]:
    """The layers that read the hyperprior's feature, and which of their inputs it is."""
    D = model.config.dim
    if model.config.context == "grouped":
        yield model.context_model.hyper, slice(0, D)
        yield model.context_model.join[0], slice(D, 2 * D)
    else:
        yield model.entropy_parameters.layers[0], slice(0, D)


@torch.no_grad()
def features(model: Entroformer, y: Tensor, level: float) -> Tensor:
    """The hyperprior's feature, with what it is told of the rate.  y: [1, M, h, w] before the gain  ->  [h w, D]"""
    rate = model.rate(level)
    z_hat = model.z_prior.quantize_z(model.hyper_analysis(model.scaled(y, level), rate))
    feature = model.hyper_synthesis(z_hat, rate)
    return (feature if rate is None else feature + rate.vector)[0].flatten(1).T


def linear_map(x: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, float]:
    """x: [n, D], wanted: [n, E]  ->  weight [E, D] and bias [E] with x weight^T + bias near wanted; share explained"""
    x, wanted = x.double(), wanted.double()
    ones = torch.cat((x, x.new_ones(len(x), 1)), dim=1)
    ridge = RIDGE * len(x) * x.var(dim=0).mean() * torch.eye(ones.size(1), dtype=x.dtype)
    ridge[-1, -1] = 0  # the bias may be what it must
    solution = torch.linalg.solve(ones.T @ ones + ridge, ones.T @ wanted)  # [D + 1, E]
    left = (wanted - ones @ solution).square().sum() / (wanted - wanted.mean(dim=0)).square().sum()
    return solution[:-1].T.float(), solution[-1].float(), 1 - float(left)


@torch.no_grad()
def swapped(
    model: Entroformer, other: Entroformer, latents: LatentCrops, crops: int = 200
) -> tuple[Entroformer, float]:
    """The model with the hyperprior of the other; how much of its old feature the map explains.

    Raises:
        WeightsError: models behind other transforms, or whose hyperpriors differ in size.
    """
    sizes = [(m.config.dim, m.config.Z, m.config.hyper, m.config.rate_aware) for m in (model, other)]
    if transforms_digest(model) != transforms_digest(other) or sizes[0] != sizes[1]:
        raise WeightsError("Only hyperpriors of one size, behind the same transforms, can take each other's place.")
    last, pairs = len(model.config.lmbdas) - 1, []
    for i, y in enumerate(latents.batches([range(i, i + 1) for i in range(crops)])):
        level = last * i / (crops - 1) if last > 0 else None
        pairs.append([features(m, y, level) for m in (other, model)])
    weight, bias, explained = linear_map(*(torch.cat(part) for part in zip(*pairs, strict=True)))
    state = model.state_dict()
    taken = {k: v for k, v in other.state_dict().items() if k.startswith(PARTS) and not k.endswith(TABLES)}
    model.load_state_dict(state | taken)
    for layer, inputs in readers(model):
        layer.bias += layer.weight[:, inputs] @ bias
        layer.weight[:, inputs] = layer.weight[:, inputs] @ weight
    model.update(force=True)
    return model, explained


def main(weights: Positional[Path], hyperprior: str, latents: Path, out: Path, crop: int = 256) -> None:
    """Writes weights to go on from.

    Args:
        weights: Of the model that gets another hyperprior.
        hyperprior: The model that gives it.
        latents: Cache of training latents behind the transforms of both.
        out: The file.
        crop: Side of the crops that are looked at, in pixels.
    """
    model, other = load_model(weights, "cpu"), load_model(hyperprior, "cpu")
    model, explained = swapped(model, other, LatentCrops(latents, model, crop))
    save_weights(model, out, model.card)
    print(f"{out}: the map explains {explained:.0%} of the old feature")


if __name__ == "__main__":
    tyro.cli(main)
