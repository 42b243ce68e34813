"""What is compared, and on which terms: the paper's ablations, and what the released code does otherwise, as data.

A row of a grid says which model, and what its saved rows say of it. How rows become runs stands in `ablation.py`.
Nothing heavy is imported here: the command line reads its options from `Terms`.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from entroformer_lib.errors import StudyError
from entroformer_lib.fields import parse_fields
from entroformer_lib.models.config import named_config
from entroformer_lib.training.config import TrainConfig

BOTH = "all contexts"
ALL_CONTEXTS = {"no_context": 1 / 3, "one_way": 0.5}  # a third of the crops each: none, one way, both ways
RECIPE = dict(batch=8, rounded=True, optimizer="muon", lr=2e-3, schedule="linear", precision="auto")


@dataclass(frozen=True)
class Terms:
    """What all runs of a study share. The line under a field is its help text on the command line."""

    transforms: str = "blocks-parallel@0.014"
    """The model whose transforms all have, at a lambda; or zoo:NAME:QUALITY for CompressAI's own."""
    latents: str | None = None
    """Folder of the latents' cache; by default latents/ in the folder of the runs."""
    train_on: str | None = None
    """Pictures to train on; by default train/ in the folder that ENTROFORMER_DATA names, or else in pictures/."""
    kodak: str | None = None
    """Folder of the test pictures; by default kodak/ in the same folder."""
    size: str = "tiny"
    """Of the entropy models: tiny, study or base."""
    steps: int = 400
    """Steps of each run."""
    batch: int = RECIPE["batch"]
    """Crops of a step."""
    crop: int = 256
    """Side of a crop in pixels."""
    last_crop: int | None = None
    """Side of a crop over the last third of the steps; by default crop."""
    held_out: str | None = None
    """A list of file names, one a line, that are not trained on."""
    limit: int | None = None
    """Only the first test pictures."""
    accelerator: str = "auto"
    """What trains: cpu, cuda, or auto."""
    checkpoint_seconds: float = 30.0
    """Seconds between checkpoints, from which a killed run goes on."""

    def placed(self, root: Path) -> "Terms":
        """The same with whole paths for all folders, as workers may stand elsewhere.  root: the folder of the runs"""
        data = Path(os.environ.get("ENTROFORMER_DATA") or "pictures")
        usual = {"latents": root / "latents", "train_on": data / "train", "kodak": data / "kodak"}
        places = {name: _whole_path(getattr(self, name) or default) for name, default in usual.items()}
        return dataclasses.replace(self, **places)


def _whole_path(place: Path | str) -> str:
    """A place seen from anywhere: an address or a command stays as it is."""
    return str(place) if "://" in str(place) or str(place).startswith("pipe:") else str(Path(place).absolute())


@dataclass(frozen=True)
class Entry:
    """A row of a grid: which model, and what its saved rows say of it.

    model: variant of `named_config`, without the size. architecture: fields of EntroformerConfig over its own.
    training: fields of TrainConfig over the recipe. columns: of the saved rows.
    """

    name: str
    model: str = "context"
    architecture: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    columns: dict = field(default_factory=dict)

    def config(self, base: TrainConfig, size: str = "tiny", seed: int = 0) -> TrainConfig:
        """The run of this row. base: what all rows of a comparison share, so that only what a row names differs"""
        architecture = tuple(f"{name}={json.dumps(value)}" for name, value in self.architecture.items())
        values = {"model": f"{size}-{self.model}", "architecture": architecture, "seed": seed, **self.training}
        return dataclasses.replace(base, **values)


@dataclass(frozen=True)
class Grid:
    """Rows that are compared.  about: for those who read this file; answers: what is measured of each run, names of
    MEASURES"""

    name: str
    about: str
    entries: tuple[Entry, ...]
    answers: tuple[str, ...] = ("kodak",)


def _position(position: str, **fields) -> Entry:
    return Entry(
        position, "context", {"position": position, **fields}, columns={"context": "serial", "position": position}
    )


def _radius(h: int | None, largest: int = 38) -> Entry:
    """Diamond of radius h; None: every offset inside 20x20 latents, the largest crops, has a vector of its own."""
    columns = {"radius": h, "position": "diamond"}
    return Entry(f"h-{h or 'all'}", "context", {"radius": h or largest}, columns=columns)


def _top_k(k: int | None) -> Entry:
    return Entry(f"k-{k or 'dense'}", "context", {"top_k": k}, columns={"top_k": k})


def _released(name: str, difference: str, model: str = "context", **architecture) -> Entry:
    return Entry(name, model, architecture, columns={"model": model, "difference": difference})


def _grouped(name: str, difference: str, **architecture) -> Entry:
    return Entry(f"grouped-{name}", "groupedmixer", architecture, columns={"difference": difference})


def _groups(k_c: int, k_h: int = 2, k_w: int = 2) -> Entry:
    G = k_c * k_h * k_w
    columns = {"groups": G, "slices": k_c, "phases": k_h * k_w}
    return Entry(f"groups-{G}", "groupedmixer", {"groups": (k_c, k_h, k_w)}, columns=columns)


GRIDS = {
    grid.name: grid
    for grid in (
        Grid(
            "table1",
            "position encodings of a context model without hyperprior, and the convolution, with learning curves",
            (
                Entry("cnn", "cnn", {"hyperprior": False}, columns={"context": "cnn", "position": "none"}),
                *map(_position, ("none", "absolute", "relative_1d", "relative_2d", "diamond")),
            ),
            ("kodak", "curve"),
        ),
        Grid(
            "dense",
            "does a model without positions need all keys? Table 1's row with dense attention",
            (Entry("none-dense", "context", {"position": "none", "top_k": None}, columns={"position": "none"}),),
            ("kodak", "curve"),
        ),
        Grid(
            "figure6",
            "the diamond's radius h, against no position encoding",
            (
                Entry("h-none", "context", {"position": "none"}, columns={"radius": 0, "position": "none"}),
                *map(_radius, (1, 2, 3, 4, 5, None)),
            ),
            ("kodak", "curve", "squares"),
        ),
        Grid(
            "figure7",
            "k of top-k attention, with learning curves, and the k used at test time",
            tuple(map(_top_k, (8, 16, 32, 64, 128, None))),
            ("kodak", "curve", "k_at_test"),
        ),
        Grid(
            "table3",
            "what the second slice is predicted from: one model that has learned all contexts, and one for each",
            (
                Entry("all-contexts", "parallel", training=ALL_CONTEXTS, columns={"trained": BOTH}),
                Entry("parallel", "parallel", columns={"trained": "bidirectional"}),
                Entry("one-way", "parallel", training={"one_way": 1.0}, columns={"trained": "unidirectional"}),
                Entry("hyperprior", "hyperprior", columns={"trained": "hyperprior"}),
                Entry("serial", "serial", columns={"trained": "serial"}),
            ),
            ("kodak", "second_slice", "curve"),
        ),
        Grid(
            "table4",
            "absolute and relative positions in pictures larger than the crops of training",
            tuple(dataclasses.replace(_position(p), columns={"position": p}) for p in ("absolute", "diamond", "none")),
            ("kodak", "sizes"),
        ),
        Grid(
            "released",
            "what the released code does otherwise than the paper, one by one",
            (
                _released("paper", "as in the paper"),
                _released("scale-width", "attention scale 1/sqrt(dim)", attention_scale="width"),
                _released("shared-positions", "one position table for all blocks", share_position=True),
                _released("k-jitter", "k drawn anew at every pass", top_k_jitter=True),
                _released("leaky-relu", "LeakyReLU instead of ReLU", activation="leaky_relu"),
                _released("gelu", "GELU instead of ReLU (in neither)", activation="gelu"),
                _released("paper", "as in the paper", "parallel"),
                _released("gaussian-z", "Gaussian prior of z", "parallel", z_prior="gaussian"),
            ),
            ("kodak", "curve"),
        ),
        Grid(
            "groupedmixer",
            "GroupedMixer without one of its mixers, with another inner mixer, with other orders of its groups",
            (
                _grouped("whole", "as it is: both mixers, windows, channel slice by channel slice"),
                _grouped("no-cross", "without the cross-group mixer", cross=False),
                _grouped("no-inner", "without the inner-group mixer", inner="none"),
                _grouped("window-4", "windows of 4x4 instead of 8x8", window=4),
                _grouped("top-k", "top-k attention over the whole group instead of windows", inner="top_k"),
                _grouped("raster", "order: the phases of a slice row by row", group_order="raster"),
                _grouped("sites", "order: all slices of a phase before the next phase", group_order="sites"),
                _grouped("deeper", "6 pairs of mixers instead of 3", context_layers=6),
            ),
            ("kodak", "curve"),
        ),
        Grid(
            "groups",
            "number of GroupedMixer's groups, G = 2 to 32",
            (_groups(1, 1, 2), *map(_groups, (1, 2, 4, 8))),
            ("kodak", "curve"),
        ),
        Grid(
            "joint",
            "one pair of variants with transforms that learn along",
            tuple(
                Entry(
                    f"joint-{p}",
                    "context",
                    {"position": p},
                    {"transforms": None, "latents": None, "rounded": False},
                    {"position": p},
                )
                for p in ("none", "diamond")
            ),
            ("rate_distortion",),
        ),
    )
}


def grids_of(names: Iterable[str], fields: tuple[str, ...] = (), model: str = "context") -> list[Grid]:
    """Grids by name, and one of a single row of the reader's own where fields are given.

    Args:
        names: keys of GRIDS.
        fields: of the architecture, such as ("radius=2", "top_k=8").
        model: variant of `named_config` for that row.

    Raises:
        StudyError: no such grid. ConfigError: no such field, or a value that it cannot have.
    """
    grids = []
    for name in dict.fromkeys(names):
        if name not in GRIDS:
            raise StudyError(f"There is no grid '{name}'; there are {', '.join(GRIDS)}.")
        grids.append(GRIDS[name])
    if fields:
        own = own_entry(" ".join(fields), model, **parse_fields(fields))
        grids.append(Grid("own", "a row of your own", (own,), ("kodak", "curve")))
    return grids


def own_entry(name: str, model: str = "context", **architecture) -> Entry:
    """A row of the reader's own; a ConfigError where the architecture has no such field or value."""
    named_config(f"tiny-{model}", **architecture)
    folder = "".join(c if c.isalnum() or c in "=.-" else "_" for c in name)
    return Entry(folder, model, architecture, columns={"name": name})
