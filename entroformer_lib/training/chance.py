"""What is left to chance in sample g of a run: noise, masks, the rate, whether the crop is drawn.

Everything is a function of the run's seed and g alone. So a resumed run continues exactly, and two processes share the
work of one without changing it.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from entroformer_lib.models.config import EntroformerConfig
from entroformer_lib.models.context import NO_GAPS, Gaps, first_slice
from entroformer_lib.training.config import TrainConfig

# What a generator decides, so that no two decisions about a sample hang together
EPOCH, NOISE, KEPT, SHARDS, LEVEL, MISSING, LATENTS, ONE_WAY, DRAWN, HELD_OUT, NO_CONTEXT = range(1, 12)


def generator(seed: int, *key: int) -> np.random.Generator:
    """Random numbers that belong to a seed and a key: the decision, and the number of the sample."""
    return np.random.default_rng((seed, *key))


def picture_number(g: int, count: int, seed: int) -> int:
    """Which of `count` pictures sample g takes: every picture once per epoch, in an order of the epoch's own."""
    epoch, position = divmod(g, count)
    return int(_epoch_order(epoch, count, seed)[position])


@functools.lru_cache(maxsize=2)
def _epoch_order(epoch: int, count: int, seed: int) -> np.ndarray:
    return generator(seed, EPOCH, epoch).permutation(count)


def uniform_noise(samples: range, shapes: dict[str, tuple], seed: int, device="cpu") -> dict[str, Tensor]:
    """Noise in [-0.5, 0.5) of each sample number.  shapes: {"y": (M, h, w), ...}  ->  {"y": [B, M, h, w], ...}"""
    noise: dict[str, list[Tensor]] = {name: [] for name in shapes}
    for g in samples:
        on_device = torch.Generator(device).manual_seed(hash((seed, NOISE, g)) % 2**63)
        for name, shape in shapes.items():
            noise[name].append(torch.rand(shape, generator=on_device, device=device) - 0.5)
    return {name: torch.stack(values) for name, values in noise.items()}


def random_kept(samples: range, size: tuple[int, int], fraction: float, seed: int, device="cpu") -> Tensor:
    """Random masks for the pretraining of A.5, True = kept: bool [B, 1, h, w] with `fraction` of the sites False."""
    count = size[0] * size[1]
    orders = np.stack([generator(seed, KEPT, g).permutation(count) for g in samples])
    return torch.from_numpy(orders >= round(fraction * count)).view(-1, 1, *size).to(device)


def random_missing(samples: range, size: tuple[int, int], largest: float, seed: int, device="cpu") -> Tensor:
    """Latents hidden from the others as context, True = hidden: bool [B, 1, h, w]. Each sample has a share of its own,
    uniform in [0, largest], so that the model knows whole context, single gaps and many."""
    rngs = [generator(seed, MISSING, g) for g in samples]
    masks = [rng.random((1, *size)) < rng.uniform(0, largest) for rng in rngs]
    return torch.from_numpy(np.stack(masks)).to(device)


def random_choice(samples: range, share: float, seed: int, decision: int, device="cpu") -> Tensor:
    """Which samples are chosen for ONE_WAY, NO_CONTEXT or DRAWN: bool [B], `share` of them in the long run."""
    return torch.tensor([generator(seed, decision, g).random() < share for g in samples], device=device)


def random_levels(samples: range, count: int, seed: int) -> list[int]:
    """Which of `count` rates each sample of a variable-rate run has. All come up equally often in every `count`
    samples, so that the mean of a batch's losses jumps less."""
    return [int(generator(seed, LEVEL, g // count).permutation(count)[g % count]) for g in samples]


def conditions(
    c: TrainConfig, model: EntroformerConfig, step: int, samples: range, size: tuple[int, int], device
) -> dict:
    """What a step has beside its crops, as arguments of the training step (loss.py). size: (h, w) of the latents."""
    h, w = size
    shapes = {"y": (model.M, h, w)} | ({"z": (model.Z, h // 4, w // 4)} if model.hyperprior else {})
    level, lmbda = None, c.lmbda_at(step)
    if model.lmbdas:
        level = torch.tensor(random_levels(samples, len(model.lmbdas), c.seed), device=device)
        lmbda = torch.tensor(model.lmbdas, device=device)[level]
    return {
        "lmbda": lmbda,
        "noise": uniform_noise(samples, shapes, c.seed, device),
        "gaps": gaps(c, step, samples, size, device),
        "level": level,
        "drawn": random_choice(samples, c.graphics, c.seed, DRAWN, device) if c.graphics else None,
    }


def gaps(c: TrainConfig, step: int, samples: range, size: tuple[int, int], device) -> Gaps:
    """What is hidden from the context model at a step."""
    kept = None
    if c.pretraining(step):
        kept = random_kept(samples, size, c.pretrain_mask, c.seed, device)
    elif c.no_context:  # what is kept is predicted without context
        alone = random_choice(samples, c.no_context, c.seed, NO_CONTEXT, device)
        kept = first_slice(*size, device) | alone[:, None, None, None]
    missing = random_missing(samples, size, c.missing, c.seed, device) if c.missing else None
    one_way = random_choice(samples, c.one_way, c.seed, ONE_WAY, device) if c.one_way else None
    return NO_GAPS if kept is missing is one_way is None else Gaps(kept, missing, one_way)
