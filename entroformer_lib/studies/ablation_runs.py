"""Runs of the ablations: what all of them share, which rows are the same run, how one is trained and measured.

A run is known by what it is, not by its name: the diamond with h = 3 is a row of table 1, of figure 6 and, as k = 16,
of figure 7, and is trained once.
"""

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import ConfigError
from entroformer_lib.models.config import named_config
from entroformer_lib.studies import latent_rates
from entroformer_lib.studies.ablation_grids import GRIDS, Entry, Grid
from entroformer_lib.studies.engine import Task
from entroformer_lib.training.config import RUNTIME_FIELDS, TrainConfig
from entroformer_lib.training.latents import frozen_transforms, trained_lmbda, with_transforms
from entroformer_lib.training.loop import train
from entroformer_lib.weights.zoo import load_model, save_weights, weights_digest

RECIPE = dict(batch=8, optimizer="muon", lr=2e-3, schedule="linear", precision="bfloat16", log_every=25)
JOINT_CROP, JOINT_BATCH = 128, 8
TEST_K = (4, 8, 16, 32, 64, 128, None)  # k asked of models trained with another one
TABLE4_SIZES = (300, 600, 900, 1200)  # pixels


@dataclass(frozen=True)
class Terms:
    """What all runs of a study share.

    transforms: name of the model that gives g_a and g_s. latents: folder of their cache. train_on: the photographs, for
    runs whose transforms learn along. kodak: folder of the test pictures, `limit` of them.
    """

    transforms: str
    latents: str
    train_on: str
    kodak: str
    size: str = "tiny"
    steps: int = 500
    crop: int = 256
    limit: int | None = None
    accelerator: str = "auto"
    checkpoint_seconds: float = 30.0

    def base(self, root: Path) -> TrainConfig:
        """The recipe, before a variant changes something."""
        ours = ("transforms", "latents", "steps", "crop", "accelerator", "checkpoint_seconds")
        values = {name: getattr(self, name) for name in ours}
        return TrainConfig(data="DATA", out=str(root), devices=1, **RECIPE, **values)

    def config(self, entry: Entry, seed: int, root: Path) -> TrainConfig:
        """The run of a row."""
        config = entry.variant(self.size, seed).config(self.base(root))
        if config.transforms is None:
            joint = {"data": self.train_on, "init": str(Path(config.out) / "start.safetensors"), "architecture": ()}
            joint |= {"crop": min(JOINT_CROP, self.crop), "batch": JOINT_BATCH, "lmbda": trained_lmbda(self.transforms)}
            config = dataclasses.replace(config, **joint)
        return config


@dataclass(frozen=True)
class Run:
    """A run, and the rows that it gives.  rows: (grid, columns)"""

    name: str
    entry: Entry
    seed: int
    answers: tuple[str, ...]
    rows: tuple[tuple[str, dict], ...]


def runs_of(grids: list[Grid], seeds: Iterable[int], size: str = "tiny") -> list[Run]:
    """Each different run once, with the rows of all grids that it belongs to: seed by seed, in the order of the grids.

    A run is its first row among all GRIDS, whichever of them are asked for: its name, and how its fields are written.

    Raises:
        ConfigError: a row that this size cannot have.
    """
    first: dict[str, Entry] = {}
    for grid in (*GRIDS.values(), *grids):
        for entry in grid.entries:
            with nullcontext() if grid in grids else suppress(ConfigError):  # others may not exist in this size
                first.setdefault(_kind(entry, size), entry)
    found: dict[str, Run] = {}
    for seed in seeds:
        for grid in grids:
            for entry in grid.entries:
                known = first[_kind(entry, size)]
                name = known.variant(size, seed).name
                run = found.get(name) or Run(name, known, seed, ("weights",), ())
                answers = tuple(dict.fromkeys((*run.answers, *grid.answers)))
                rows = (*run.rows, (grid.name, entry.columns))
                found[name] = dataclasses.replace(run, answers=answers, rows=rows)
    return list(found.values())


def _kind(entry: Entry, size: str) -> str:
    """Equal for rows that are the same run."""
    config = named_config(f"{size}-{entry.model}", **entry.architecture)
    if config.position != "diamond" and not config.position.startswith("relative"):
        config = config.replaced(radius=3)  # means nothing there
    return config.to_json() + json.dumps(entry.training, sort_keys=True)


@dataclass(frozen=True)
class RunWork:
    """The work of one run, for `sweep`: trains, then measures."""

    terms: Terms
    entry: Entry
    seed: int

    def __call__(self, folder: Path, answer: str) -> object:
        """One answer: "weights" trains, others are named in MEASURES."""
        if answer == "weights":
            return self.train(folder)
        return MEASURES[answer](self, folder, load_model(folder / "weights.safetensors"))

    def train(self, folder: Path) -> dict:
        """Trains, or goes on; keeps the rate on the middle of the Kodak pictures as it falls, in curve.jsonl."""
        config = dataclasses.replace(self.terms.config(self.entry, self.seed, folder.parent), out=str(folder))
        if config.transforms is None:
            self._write_start(folder / "start.safetensors")
            watch = None
        else:
            watch = self._watch(folder / "curve.jsonl")
        model = load_model(train(config, progress=False, watch=watch))
        return {
            "train_seconds": model.card["train_seconds"],
            "steps": config.steps,
            "device": model.card["device"],
            "weights_sha256": weights_digest(model).hex(),
        }

    def _watch(self, path: Path) -> Callable[[dict, Entroformer], None]:
        def keep(row: dict, model: Entroformer) -> None:
            bpp = latent_rates.mean_rate(model, self.squares(model))
            with open(path, "a") as file:
                file.write(json.dumps({"step": row["step"], "bpp": bpp}) + "\n")

        return keep

    def _write_start(self, path: Path) -> None:
        """The frozen transforms with an untrained entropy model: where joint training begins."""
        torch.manual_seed(self.seed)
        source = frozen_transforms(self.terms.transforms)
        model = with_transforms(source, f"{self.terms.size}-{self.entry.model}", **self.entry.architecture)
        if not path.exists():
            save_weights(model, path, {"lmbda": trained_lmbda(self.terms.transforms), "metric": "mse"})

    def kodak(self, model: Entroformer) -> list[latent_rates.Latents]:
        """Latents of the whole test pictures."""
        return _test_latents(self.terms, model.config.downsampling, None, str(_device(model)))

    def squares(self, model: Entroformer) -> list[torch.Tensor]:
        """Latents of their middles in batches: [8, M, 16, 16] where the pictures are large enough."""
        found = _test_latents(self.terms, model.config.downsampling, latent_rates.SQUARE, str(_device(model)))
        return latent_rates.batches(found)


def _device(model: Entroformer) -> torch.device:
    return next(model.g_s.parameters()).device


_held: dict[tuple, list[latent_rates.Latents]] = {}  # of this process: the transforms are frozen, so once is enough


def _test_latents(terms: Terms, factor: int, square: int | None, device: str) -> list[latent_rates.Latents]:
    key = (terms.transforms, terms.kodak, terms.limit, factor, square, device)
    if key not in _held:
        source = frozen_transforms(terms.transforms).to(device)
        pictures = latent_rates.pictures_of(terms.kodak, terms.limit)
        if square is not None:
            pictures = [(name, latent_rates.square_in_the_middle(p, square)) for name, p in pictures]
        _held[key] = [latent_rates.latents_of(source, p, name, factor) for name, p in pictures]
    return _held[key]


# ---- what is measured of a run ----


def _kodak(work: RunWork, folder: Path, model: Entroformer) -> dict:
    """Rates of the whole pictures, and the mean over their middles."""
    return {
        "pictures": latent_rates.rates(model, work.kodak(model)),
        "bpp_middle": latent_rates.mean_rate(model, work.squares(model)),
    }


def _curve(work: RunWork, folder: Path, model: Entroformer) -> list[dict]:
    """The learning curve. A run that was killed wrote some steps twice, with the same rate."""
    rows = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    steps = {row["step"]: row for row in rows}
    return [steps[step] for step in sorted(steps)]


def _k_at_test(work: RunWork, folder: Path, model: Entroformer) -> list[dict]:
    """The rate of the middles with every k of TEST_K."""
    rows = []
    for k in TEST_K:
        latent_rates.use_top_k(model, k)
        rows.append({"k_at_test": k, "bpp": latent_rates.mean_rate(model, work.squares(model))})
    return rows


def _second_slice(work: RunWork, folder: Path, model: Entroformer) -> list[dict]:
    return latent_rates.second_slice_rates(model, work.kodak(model))


def _sizes(work: RunWork, folder: Path, model: Entroformer) -> list[dict]:
    """Mosaics of Kodak pictures, cut into squares of each size. The same pixels at 300, 600 and 1200."""
    source = frozen_transforms(work.terms.transforms).to(_device(model))
    mosaics = latent_rates.mosaics(latent_rates.pictures_of(work.terms.kodak, work.terms.limit))
    rows = []
    for size in TABLE4_SIZES:
        squares = [square for _, mosaic in mosaics for square in latent_rates.squares_of(mosaic, size)]
        latents = [latent_rates.latents_of(source, square, "", model.config.downsampling) for square in squares]
        measured = [row["bpp"] for row in latent_rates.rates(model, latents)]
        if measured:
            rows.append({"size": size, "squares": len(squares), "bpp": statistics.mean(measured)})
    return rows


def _rate_distortion(work: RunWork, folder: Path, model: Entroformer) -> dict:
    """Estimated rate, error and R + lambda D of the whole pictures, where transforms learned along."""
    pictures = latent_rates.pictures_of(work.terms.kodak, work.terms.limit)
    lmbda = trained_lmbda(work.terms.transforms)
    rows = [latent_rates.rate_and_error(model, picture, name) for name, picture in pictures]
    mean = {key: statistics.mean(row[key] for row in rows) for key in ("bpp", "mse")}
    return {"pictures": rows, "lmbda": lmbda, **mean, "rd_loss": mean["bpp"] + lmbda * 255**2 * mean["mse"]}


MEASURES: dict[str, Callable[[RunWork, Path, Entroformer], object]] = {
    "kodak": _kodak,
    "curve": _curve,
    "k_at_test": _k_at_test,
    "second_slice": _second_slice,
    "sizes": _sizes,
    "rate_distortion": _rate_distortion,
}


def tasks_of(runs: Iterable[Run], terms: Terms, root: Path, transforms_sha256: str) -> list[Task]:
    """The runs as `sweep` takes them."""
    tasks = []
    for run in runs:
        config = dataclasses.asdict(terms.config(run.entry, run.seed, root))
        identity = {k: v for k, v in config.items() if k not in {*RUNTIME_FIELDS, "init"}}
        identity |= {"transforms_sha256": transforms_sha256, "test_pictures": terms.limit}
        work = RunWork(terms, run.entry, run.seed)
        tasks.append(Task(run.name, work, run.answers, json.loads(json.dumps(identity))))
    return tasks
