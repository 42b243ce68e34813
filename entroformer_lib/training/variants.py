"""Variants on equal terms: the same frozen transforms, latents, steps, seed and order of data.

Only what a variant names differs. Studies that compare models train them here.
"""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.training.config import TrainConfig
from entroformer_lib.training.loop import train
from entroformer_lib.weights.zoo import load_model


@dataclass(frozen=True)
class Variant:
    """One row of a comparison.

    name: also the name of its run's folder. architecture: fields of EntroformerConfig over those of the run's model.
    training: fields of TrainConfig.
    """

    name: str
    architecture: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)

    def config(self, base: TrainConfig) -> TrainConfig:
        """The run of this variant. base: what all variants share; its `out` is the folder of their runs."""
        fields = tuple(f"{name}={json.dumps(value)}" for name, value in self.architecture.items())
        values = {"architecture": base.architecture + fields, "out": str(Path(base.out) / self.name)}
        return dataclasses.replace(base, **{**values, **self.training})


def trained(variant: Variant, base: TrainConfig, progress: bool = True) -> Entroformer:
    """The variant's model, by its name. A finished run is not repeated, a broken one goes on."""
    config = variant.config(base)
    path = Path(config.out) / "weights.safetensors"
    if not path.exists():
        train(config, progress=progress)
    model = load_model(path)
    model.name = variant.name
    return model


def train_all(variants: Iterable[Variant], base: TrainConfig, progress: bool = True) -> list[Entroformer]:
    """Every variant's model, trained one after the other."""
    return [trained(variant, base, progress) for variant in variants]
