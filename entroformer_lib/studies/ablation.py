"""The paper's ablations on equal terms: table 1, figures 6 and 7, tables 3 and 4, and what the released code does
otherwise.

    entroformer study ablation --grid table1 figure6 --train-on pictures/train --kodak pictures/kodak --out runs/ablation

**Equal terms.** One frozen pair of transforms. The latents of the training photographs are computed once
(`training/latents.py`), and each entropy model is trained on them with the same steps, seeds and order of data. The paper
trains transforms and entropy model jointly, so that each adapts to the other, and PSNR moves a little with every row;
here quality is the same in all rows by construction, and a difference in bits is one of the entropy models. What that
leaves out, the grid `joint` checks: it trains one pair of variants from the same transforms with nothing frozen.

**One run, many grids.** A run is known by what it is, not by its name: the diamond with h = 3 is a row of table 1, of
figure 6 and, as k = 16, of figure 7, and is trained once.

**What is measured** is said in `latent_rates.py`: estimated rates of the Kodak pictures' latents.
"""

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from entroformer_lib.errors import StudyError, WeightsError
from entroformer_lib.files import data_folder, write_bytes
from entroformer_lib.models.config import SIZES, VARIANTS, named_config, parse_fields
from entroformer_lib.models.entroformer import Entroformer
from entroformer_lib.models.zoo import load_model, save_weights, weights_digest
from entroformer_lib.studies import latent_rates
from entroformer_lib.studies.provenance import provenance
from entroformer_lib.studies.sweep import Outcome, Task, check, connected, sweep
from entroformer_lib.training.config import RUNTIME_FIELDS, TrainConfig
from entroformer_lib.training.latents import (
    check_note,
    frozen_transforms,
    trained_lmbda,
    transforms_digest,
    with_transforms,
    write_latents,
)
from entroformer_lib.training.loop import train
from entroformer_lib.training.variants import Variant

RECIPE = dict(batch=8, optimizer="muon", lr=2e-3, schedule="linear", precision="bfloat16", log_every=25)
JOINT_CROP, JOINT_BATCH = 128, 8
TEST_K = (4, 8, 16, 32, 64, 128, None)  # k asked of models trained with another one
TABLE4_SIZES = (300, 600, 900, 1200)  # pixels


# ---- the grids, as data ----


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

    def variant(self, size: str, seed: int) -> Variant:
        """The run of this row."""
        training = {"model": f"{size}-{self.model}", "seed": seed, **self.training}
        return Variant(f"{self.name}-seed{seed}", self.architecture, training)


@dataclass(frozen=True)
class Grid:
    """Rows that are compared.  answers: what is measured of each run, names of MEASURES"""

    name: str
    about: str
    entries: tuple[Entry, ...]
    answers: tuple[str, ...] = ("kodak",)


def _position(position: str, **fields) -> Entry:
    return Entry(position, "context", {"position": position, **fields}, columns={"context": "serial", "position": position})


def _radius(h: int | None, largest: int = 30) -> Entry:
    """Diamond of radius h; None: as large as the crops of training, so that every offset has a vector of its own."""
    columns = {"radius": h, "position": "diamond"}
    return Entry(f"h-{h or 'all'}", "context", {"radius": h or largest}, columns=columns)


def _top_k(k: int | None) -> Entry:
    return Entry(f"k-{k or 'dense'}", "context", {"top_k": k}, columns={"top_k": k})


def _released(name: str, difference: str, model: str = "context", **architecture) -> Entry:
    return Entry(name, model, architecture, columns={"model": model, "difference": difference})


GRIDS = {
    grid.name: grid
    for grid in (
        Grid(
            "table1",
            "position encodings of a context model without hyperprior, and the convolution",
            (
                Entry("cnn", "cnn", {"hyperprior": False}, columns={"context": "cnn", "position": "none"}),
                *map(_position, ("none", "absolute", "relative_1d", "relative_2d", "diamond")),
            ),
        ),
        Grid(
            "figure6",
            "the diamond's radius h, against no position encoding",
            (
                Entry("h-none", "context", {"position": "none"}, columns={"radius": 0, "position": "none"}),
                *map(_radius, (1, 2, 3, 4, 5, 6, 7, None)),
            ),
        ),
        Grid(
            "figure7",
            "k of top-k attention, with learning curves, and the k used at test time",
            tuple(map(_top_k, (8, 16, 32, 64, 128, None))),
            ("kodak", "curve", "k_at_test"),
        ),
        Grid(
            "table3",
            "what the second slice is predicted from: one model that has learned with both directions, and one for each",
            (
                Entry("both-directions", "parallel", training={"one_way": 0.5}, columns={"trained": "both directions"}),
                Entry("parallel", "parallel", columns={"trained": "bidirectional"}),
                Entry("one-way", "parallel", training={"one_way": 1.0}, columns={"trained": "unidirectional"}),
                Entry("hyperprior", "hyperprior", columns={"trained": "hyperprior"}),
                Entry("serial", "serial", columns={"trained": "serial"}),
            ),
            ("kodak", "second_slice"),
        ),
        Grid(
            "table4",
            "absolute and relative positions in pictures larger than the crops of training",
            tuple(
                dataclasses.replace(_position(p), columns={"position": p}) for p in ("absolute", "diamond", "none")
            ),
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
        ),
        Grid(
            "joint",
            "one pair of variants with transforms that learn along",
            tuple(
                Entry(f"joint-{p}", "context", {"position": p}, {"transforms": None, "latents": None}, {"position": p})
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
    for name in names:
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


# ---- from rows to runs ----


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

    def base(self, root: Path) -> TrainConfig:
        """The recipe, before a variant changes something."""
        values = {**RECIPE, "steps": self.steps, "crop": self.crop, "accelerator": self.accelerator, "devices": 1}
        return TrainConfig(
            data="DATA", out=str(root), transforms=self.transforms, latents=self.latents, **values, checkpoint_seconds=30
        )

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

    A run's name is that of its first row among all GRIDS, whichever of them are asked for.
    """
    names: dict[str, str] = {}
    for grid in (*GRIDS.values(), *grids):
        for entry in grid.entries:
            names.setdefault(_kind(entry, size), entry.name)
    found: dict[str, Run] = {}
    for seed in seeds:
        for grid in grids:
            for entry in grid.entries:
                name = f"{names[_kind(entry, size)]}-seed{seed}"
                run = found.get(name) or Run(name, dataclasses.replace(entry, name=name), seed, ("weights",), ())
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
        """Latents of their middles, eight in a batch: [8, M, 16, 16] each."""
        found = _test_latents(self.terms, model.config.downsampling, latent_rates.SQUARE, str(_device(model)))
        return list(torch.cat([one.y for one in found]).split(8))


def _device(model: Entroformer) -> torch.device:
    return model.g_s[0].weight.device


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


# ---- the study ----


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


@dataclass(frozen=True)
class Study:
    """Grids on terms in a folder: checked, and ready to run.  transforms_sha256: of g_a and g_s"""

    grids: list[Grid]
    runs: list[Run]
    terms: Terms
    root: Path
    transforms_sha256: str

    @property
    def tasks(self) -> list[Task]:
        return tasks_of(self.runs, self.terms, self.root, self.transforms_sha256)

    def go(
        self,
        scheduler: str | None = None,
        workers: int = 1,
        report: Callable[[Outcome], None] = lambda outcome: None,
    ) -> list[Outcome]:
        """Computes the latents where they are missing, then does every run that is not finished; see `sweep`."""
        if scheduler is not None:
            with connected(scheduler):
                pass  # before minutes go into the latents
        write_latents(self.terms.transforms, self.terms.train_on, Path(self.terms.latents), self.terms.crop)
        return sweep(self.tasks, self.root, scheduler, workers, report)

    def plan(self) -> list[dict]:
        """A row for each run: run, grids, state (finished, begun, not begun), missing (answers), seconds (estimated
        from finished runs, None where there are none)."""
        tasks, rows = self.tasks, []
        for run, task in zip(self.runs, tasks, strict=True):
            missing = task.missing(self.root)
            begun = (self.root / run.name / "task.json").exists()
            rows.append(
                {
                    "run": run.name,
                    "grids": sorted({grid for grid, _ in run.rows}),
                    "state": "finished" if not missing else "begun" if begun else "not begun",
                    "missing": missing,
                    "seconds": _estimate(task, missing, tasks, self.root),
                }
            )
        return rows


def prepare(
    grids: list[Grid], terms: Terms, root: Path, seeds: Iterable[int] = (0, 1), size: str | None = None
) -> Study:
    """Checks everything that can be wrong, and starts nothing.

    Raises:
        UserError: transforms that do not exist, latents of other transforms, no test pictures, runs of another kind.
    """
    if size is not None:
        terms = dataclasses.replace(terms, size=size)
    root = root.resolve()
    if terms.size not in SIZES:
        raise StudyError(f"There is no size '{terms.size}'; there are {', '.join(SIZES)}.")
    if not grids:
        raise StudyError("Name a grid, or fields for a row of your own.")
    digest = transforms_digest(frozen_transforms(terms.transforms))
    if (Path(terms.latents) / "latents.json").exists():
        check_note(Path(terms.latents) / "latents.json", {"transforms_sha256": digest, "crop": terms.crop})
    latent_rates.pictures_to_test(Path(terms.kodak), terms.limit)
    study = Study(grids, runs_of(grids, seeds, terms.size), terms, root, digest)
    check(study.tasks, root)
    return study


def _estimate(task: Task, missing: list[str], tasks: list[Task], root: Path) -> float | None:
    """Seconds that the missing answers will take, by those of finished runs: of the same model where there are some,
    otherwise of any."""
    total = 0.0
    for name in missing:
        model = task.identity["model"]
        done = [t for t in tasks if name in t.answers and name not in t.missing(root)]
        alike = [t for t in done if t.identity["model"] == model] or done
        if not alike:
            return None
        if name == "weights":
            total += statistics.mean(t.answer(root, name)["train_seconds"] for t in alike) * _left(task, root)
        else:
            total += statistics.mean(t.seconds(root, name) for t in alike)
    return total


def _left(task: Task, root: Path) -> float:
    """Share of the steps that a training has before it."""
    curve = root / task.name / "log.jsonl"
    if not curve.exists():
        return 1.0
    rows = curve.read_text().splitlines()
    return 1 - json.loads(rows[-1])["step"] / task.identity["steps"] if rows else 1.0


# ---- the saved result ----


def rows_of(study: Study) -> dict[str, list[dict]]:
    """The rows of each grid from the runs that are finished."""
    rows: dict[str, list[dict]] = {grid.name: [] for grid in study.grids}
    for run, task in zip(study.runs, study.tasks, strict=True):
        if task.missing(study.root):
            continue
        answers = {name: task.answer(study.root, name) for name in run.answers}
        for grid, columns in run.rows:
            common = {"grid": grid, "run": run.name, "seed": run.seed, **columns}
            rows[grid] += [{**common, **row} for row in _rows_of_grid(grid, columns, answers)]
    return rows
