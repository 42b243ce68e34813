"""The paper's ablations on equal terms: table 1, figures 6 and 7, tables 3 and 4, and what the released code does
otherwise.

    entroformer study ablation --grid table1 figure6 --train-on photos --kodak pictures/kodak --out runs/ablation

**Equal terms.** One frozen pair of transforms. The latents of the training photographs are computed once
(`training/latents.py`), and each entropy model is trained on them with the same steps, seeds and order of data. The
paper trains transforms and entropy model jointly, so that each adapts to the other, and PSNR moves a little with every
row; here quality is the same in all rows by construction, and a difference in bits is one of the entropy models. What
that leaves out, the grid `joint` checks: it trains one pair of variants from the same transforms with nothing frozen.

**A run is known by what it is**, not by its name: the diamond with h = 3 is a row of table 1, of figure 6 and, as
k = 16, of figure 7, and is trained once.

`ablation_grids.py` holds the rows as data, `engine.py` does many runs, `latent_rates.py` says what is measured. Here is
the study: how one run is performed, what is checked before it starts, what it would take, and the saved result.
"""

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from entroformer_lib.cluster import connected
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import ConfigError, StudyError
from entroformer_lib.files import write_bytes
from entroformer_lib.models.config import SIZES, named_config
from entroformer_lib.studies import latent_rates, results
from entroformer_lib.studies.ablation_grids import BOTH, GRIDS, RECIPE, Entry, Grid, Terms
from entroformer_lib.studies.commands import at_least
from entroformer_lib.studies.engine import Outcome, Report, Task, check, identity_of, sweep, trained
from entroformer_lib.studies.rate_distortion import Pictures, digest_of, pictures_of, pictures_to_test
from entroformer_lib.studies.results import result_path
from entroformer_lib.training.config import TrainConfig
from entroformer_lib.training.data import read_names
from entroformer_lib.training.folder import logged_steps
from entroformer_lib.training.initial import begin_at_channels
from entroformer_lib.training.latents import (
    LatentCrops,
    check_note,
    frozen_transforms,
    trained_lmbda,
    transforms_digest,
    with_transforms,
    write_latents,
)
from entroformer_lib.weights.zoo import load_model, save_weights

JOINT_CROP, JOINT_BATCH = 128, 8
LAST_SHARE = 1 / 3  # of the steps that have the last crop
POINTS = 50  # of a learning curve
MIDDLE = 256  # pixels: as large as the crops of training
TEST_K = (4, 8, 16, 32, 64, 128, None)  # k asked of models trained with another one
TABLE4_SIZES = (300, 600, 900, 1200)  # pixels
SQUARES, OUT_OF = (8, 12, 16, 20, 24, 32), 512  # sides in latents, and of what they are cut out of in pixels


# ---- what the runs are ----


def config_of(terms: Terms, entry: Entry, seed: int, out: Path) -> TrainConfig:
    """The training of a row, in the folder `out`."""
    ours = ("transforms", "latents", "steps", "batch", "crop", "accelerator", "checkpoint_seconds")
    values = {name: getattr(terms, name) for name in ours}
    values |= {"last_crop": terms.last_crop, "last_share": LAST_SHARE} if terms.last_crop else {}
    values["log_every"] = max(1, terms.steps // POINTS)
    config = entry.config(TrainConfig("DATA", str(out), devices=1, **RECIPE | values), terms.size, seed)
    if config.transforms is None:
        joint = {"data": terms.train_on, "held_out": terms.held_out, "init": str(out / "start.safetensors")}
        joint |= {"architecture": (), "last_crop": None}
        joint |= {"crop": min(JOINT_CROP, terms.crop), "batch": JOINT_BATCH, "lmbda": trained_lmbda(terms.transforms)}
        config = dataclasses.replace(config, **joint)
    return config


def _largest_crop(terms: Terms) -> int:
    return max(terms.crop, terms.last_crop or 0)


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
                name = f"{known.name}-seed{seed}"
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


# ---- how one is performed: trained, then measured ----


def _whole(terms: Terms) -> Pictures:
    return pictures_of(terms.kodak, terms.limit)


def _middles(terms: Terms, model: Entroformer) -> list[torch.Tensor]:
    """Latents of the squares in the middle of the test pictures, in batches."""
    return latent_rates.batches_of(model, pictures_of(terms.kodak, terms.limit, MIDDLE))


def answer_of(terms: Terms, entry: Entry, seed: int, folder: Path, answer: str) -> object:
    """One answer of a run: "weights" trains, others are named in MEASURES."""
    if answer == "weights":
        return _trained(terms, entry, seed, folder)
    return MEASURES[answer](terms, folder, load_model(folder / "weights.safetensors"))


def _trained(terms: Terms, entry: Entry, seed: int, folder: Path) -> dict:
    """Trains, or goes on; with frozen transforms it keeps the falling rate of the middles in curve.jsonl."""
    config = config_of(terms, entry, seed, folder)
    if config.transforms is not None:
        return trained(config, watch=_watch(terms, folder / "curve.jsonl"))
    if not Path(config.init).exists():  # the frozen transforms with an untrained entropy model
        torch.manual_seed(seed)
        model = with_transforms(frozen_transforms(terms.transforms), config.model, **entry.architecture)
        crops = LatentCrops(Path(terms.latents), model, _largest_crop(terms), seed, torch.device("cpu"))
        begin_at_channels(model, next(crops.batches([range(64)])))
        save_weights(model, Path(config.init), {"lmbda": config.lmbda, "metric": "mse"})
    return trained(config)


def _watch(terms: Terms, path: Path) -> Callable[[dict, Entroformer], None]:
    batches = []  # computed once, by the first model that comes
    if path.exists():  # a full disk may have torn the last row, and the next one must not be written behind it
        rows = path.read_bytes()
        write_bytes(path, rows[: rows.rfind(b"\n") + 1])

    def keep(row: dict, model: Entroformer) -> None:
        if not batches:
            batches.extend(_middles(terms, model))
        with open(path, "a") as file:
            file.write(json.dumps({"step": row["step"], "bpp": latent_rates.mean_rate(model, batches)}) + "\n")

    return keep


def _kodak(terms: Terms, folder: Path, model: Entroformer) -> dict:
    """Rates of the whole pictures, and the mean over their middles."""
    rows = latent_rates.rates(model, _whole(terms))
    return {"pictures": rows, "bpp_middle": latent_rates.mean_rate(model, _middles(terms, model))}


def _curve(terms: Terms, folder: Path, model: Entroformer) -> list[dict]:
    """The learning curve. A run that was killed wrote some steps twice, with the same rate."""
    rows = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    steps = {row["step"]: row for row in rows}
    return [steps[step] for step in sorted(steps)]


def _k_at_test(terms: Terms, folder: Path, model: Entroformer) -> list[dict]:
    """The rate of the middles with every k of TEST_K."""
    batches, rows = _middles(terms, model), []
    for k in TEST_K:
        model.context_k = k
        rows.append({"k_at_test": k, "bpp": latent_rates.mean_rate(model, batches)})
    return rows


def _sizes(terms: Terms, folder: Path, model: Entroformer) -> list[dict]:
    """Mosaics of Kodak pictures, cut into squares of each size. The same pixels at 300, 600 and 1200."""
    mosaics, rows = latent_rates.mosaics(_whole(terms)), []
    for size in TABLE4_SIZES:
        squares = [("", square) for mosaic in mosaics for square in latent_rates.squares_of(mosaic, size)]
        measured = [row["bpp"] for row in latent_rates.rates(model, squares)]
        if measured:
            rows.append({"size": size, "squares": len(squares), "bpp": statistics.mean(measured)})
    return rows


def _squares(terms: Terms, folder: Path, model: Entroformer) -> list[dict]:
    """Latents of the middle of each picture, cut into squares, each coded alone: only what a latent can see differs."""
    batches, rows = latent_rates.batches_of(model, pictures_of(terms.kodak, terms.limit, OUT_OF)), []
    for side in SQUARES:
        squares = [part for y in batches for part in latent_rates.cut(y, side).split(8) if len(part)]
        if squares:
            rows.append({"side": 16 * side, "bpp": latent_rates.mean_rate(model, squares)})
    return rows


def _rate_distortion(terms: Terms, folder: Path, model: Entroformer) -> dict:
    """Estimated rate, error and R + lambda D of the whole pictures, where transforms learned along."""
    lmbda = trained_lmbda(terms.transforms)
    rows = [latent_rates.rate_and_error(model, picture, name) for name, picture in _whole(terms)]
    mean = {key: statistics.mean(row[key] for row in rows) for key in ("bpp", "mse")}
    return {"pictures": rows, "lmbda": lmbda, **mean, "rd_loss": mean["bpp"] + lmbda * 255**2 * mean["mse"]}


MEASURES: dict[str, Callable[[Terms, Path, Entroformer], object]] = {
    "kodak": _kodak,
    "curve": _curve,
    "k_at_test": _k_at_test,
    "second_slice": lambda terms, folder, model: latent_rates.second_slice_rates(model, _whole(terms)),
    "sizes": _sizes,
    "squares": _squares,
    "rate_distortion": _rate_distortion,
}


# ---- the study ----


@dataclass(frozen=True)
class Study:
    """Grids on terms in a folder: checked, and ready to run.

    transforms_sha256: of g_a and g_s. pictures_sha256: `digest_of` the test pictures, whose names are in the answers.
    """

    grids: list[Grid]
    runs: list[Run]
    terms: Terms
    root: Path
    transforms_sha256: str
    pictures_sha256: str

    @property
    def tasks(self) -> list[Task]:
        """The runs as the engine takes them."""
        tasks, more = [], {"transforms_sha256": self.transforms_sha256, "test_pictures": self.pictures_sha256}
        more["batch"] = self.terms.batch  # one that goes on may have another; here all runs have the same
        for run in self.runs:
            identity = identity_of(config_of(self.terms, run.entry, run.seed, self.root / run.name))
            work = functools.partial(answer_of, self.terms, run.entry, run.seed)
            tasks.append(Task(run.name, work, run.answers, identity | more))
        return tasks

    def finished(self) -> list[tuple[Run, dict]]:
        """The runs that are finished, and their answers."""
        return [
            (run, {name: task.answer(self.root, name) for name in run.answers})
            for run, task in zip(self.runs, self.tasks, strict=True)
            if not task.missing(self.root)
        ]

    def go(
        self,
        scheduler: str | None = None,
        workers: int = 1,
        report: Report = lambda outcome: None,
        kept_in: Path | None = None,
    ) -> list[Outcome]:
        """Computes the latents where they are missing, then does every run that is not finished; see `sweep`.

        kept_in: a folder of results. Runs that results on the same terms there have are not done.
        """
        at_least(1, workers=workers)
        if scheduler is not None:
            with connected(scheduler):
                pass  # before minutes go into the latents
        latents = Path(self.terms.latents)
        if not (latents / "latents.json").exists():
            t, largest = self.terms, _largest_crop(self.terms)
            write_latents(t.transforms, t.train_on, latents, largest, held_out=t.held_out)
        saved = {grid: kept["runs"] for grid, kept in self.kept(kept_in).items()}
        done = {run.name for run in self.runs if all(run.name in saved.get(grid, ()) for grid, _ in run.rows)}
        tasks = [task for task in self.tasks if task.name not in done]
        return sweep(tasks, self.root, scheduler, workers, report)

    def kept(self, folder: Path | None) -> dict[str, dict]:
        """The results of these grids in a folder that are on the same terms."""
        if folder is None:
            return {}
        found = {grid.name: results.load(folder / _file_of(grid.name)) for grid in self.grids}
        settings = {grid.name: _settings(self, grid) for grid in self.grids}
        return {name: saved for name, saved in found.items() if saved and saved["settings"] == settings[name]}

    def plan(self) -> list[dict]:
        """A row for each run: run, grids, state (finished, begun, not begun), missing (answers), seconds (estimated
        from finished runs, None where there are none)."""
        tasks, rows = self.tasks, []
        for run, task in zip(self.runs, tasks, strict=True):
            missing = task.missing(self.root)
            state = "begun" if (self.root / run.name / "task.json").exists() else "not begun"
            row = {"run": run.name, "grids": sorted({grid for grid, _ in run.rows}), "missing": missing}
            seconds = _estimate(task, missing, tasks, self.root)
            rows.append({**row, "state": state if missing else "finished", "seconds": seconds})
        return rows


def prepare(grids: list[Grid], terms: Terms, root: Path, seeds: Iterable[int] = (0, 1)) -> Study:
    """Checks everything that can be wrong, and starts nothing.

    Raises:
        UserError: transforms that do not exist, latents of other transforms, no test pictures, a seed below 0, runs of
            another kind.
    """
    root, seeds, asked = root.resolve(), tuple(dict.fromkeys(seeds)), terms.train_on  # each once, whatever was said
    if not seeds:
        raise StudyError("Name a seed.")
    at_least(0, seed=min(seeds))
    terms = terms.placed(root)
    if terms.size not in SIZES:
        raise StudyError(f"There is no size '{terms.size}'; there are {', '.join(SIZES)}.")
    if not grids:
        raise StudyError("Name a grid, or fields for a row of your own.")
    source = frozen_transforms(terms.transforms)
    if source.gain is not None:
        lmbda = source.config.lmbdas[len(source.config.lmbdas) // 2]
        raise StudyError(f"{terms.transforms} has several rates; name one, such as {terms.transforms}@{lmbda:g}.")
    digest = transforms_digest(source)
    note = Path(terms.latents) / "latents.json"
    if note.exists():
        names = read_names(terms.held_out) if terms.held_out else ()
        found = check_note(note, {"transforms_sha256": digest, "crop": _largest_crop(terms), "held_out": sorted(names)})
        if asked and found.get("data", terms.train_on) != terms.train_on:
            raise StudyError(
                f"The latents in {note.parent} are those of {found['data']}, and not of {terms.train_on}; choose "
                "another folder."
            )
    pictures, mosaic = pictures_to_test(terms.kodak, terms.limit), latent_rates.ROWS * latent_rates.COLUMNS
    if len(pictures) < mosaic and any(grid.name == "table4" for grid in grids):
        raise StudyError(f"Table 4 is measured on mosaics of {mosaic} pictures, and there are {len(pictures)}.")
    study = Study(grids, runs_of(grids, seeds, terms.size), terms, root, digest, digest_of(pictures))
    check(study.tasks, root)
    return study


def plan_in_words(study: Study) -> str:
    """What would run and how long it would take, a line for each run."""
    table = pd.DataFrame(study.plan())
    minutes = table["seconds"].astype(float) / 60
    words = {"run": table["run"], "state": table["state"], "minutes": minutes, "grids": table["grids"].str.join(", ")}
    lines = [pd.DataFrame(words).to_string(index=False, float_format="{:.1f}".format, na_rep="unknown")]
    left = minutes[table["missing"].astype(bool)]
    total = f", {left.sum():.1f} minutes one after the other" if left.notna().any() or left.empty else ""
    lines.append(f"{len(left)} of {len(table)} runs to do{total}")
    if left.isna().any():
        lines.append(f"{left.isna().sum()} of them cannot be estimated before a run like them is finished")
    return "\n".join(lines)


def _estimate(task: Task, missing: list[str], tasks: list[Task], root: Path) -> float | None:
    """Seconds that the missing answers will take, by those of finished runs: of the same model where there are some,
    otherwise of any."""
    total = 0.0
    for name in missing:
        done = [t for t in tasks if name in t.answers and name not in t.missing(root)]
        alike = [t for t in done if t.identity["model"] == task.identity["model"]] or done
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
    steps = logged_steps(curve) if curve.exists() else []
    return 1 - max(steps, default=0) / task.identity["steps"]


# ---- which table comes out ----


def rows_of(study: Study) -> dict[str, list[dict]]:
    """The rows of each grid, from the runs that are finished."""
    rows: dict[str, list[dict]] = {grid.name: [] for grid in study.grids}
    with_curves = {grid.name for grid in study.grids if "curve" in grid.answers} - {"figure7"}  # it has its own way
    for run, answers in study.finished():
        for grid, columns in run.rows:
            about = {"grid": grid, "run": run.name, "seed": run.seed, **columns}
            found = ROWS_OF.get(grid, _whole_rows)(columns, answers)
            if grid in with_curves:
                found += [{"grid": f"{grid}_curve", **row} for row in answers["curve"]]
            rows[grid] += [_rounded({**about, **row}) for row in found]
    return rows


def _whole_rows(columns: dict, answers: dict) -> list[dict]:
    """bpp: mean over the whole pictures; bpp_middle: over their middles, as large as the crops of training."""
    bpp = statistics.mean(row["bpp"] for row in answers["kodak"]["pictures"])
    return [{"bpp": bpp, "bpp_middle": answers["kodak"]["bpp_middle"]}]


def _figure6_rows(columns: dict, answers: dict) -> list[dict]:
    return _whole_rows(columns, answers) + [{"grid": "figure6_squares", **row} for row in answers["squares"]]


def _figure7_rows(columns: dict, answers: dict) -> list[dict]:
    """The learning curve over the middles; at its end the whole pictures, and the middles with other k."""
    end = [{"grid": "figure7_end", **row} for row in _whole_rows(columns, answers)]
    others = [{"grid": "figure7_k_at_test", **row} for row in answers["k_at_test"]]
    return answers["curve"] + end + others


def _table3_rows(columns: dict, answers: dict) -> list[dict]:
    """Means of the second slice with each context; apart from the others those of the model that knows all of them."""
    pictures, rows = answers["second_slice"], []
    both = columns["trained"] == BOTH
    for context in dict.fromkeys(row["context"] for row in pictures):
        bpp = statistics.mean(row["bpp"] for row in pictures if row["context"] == context)
        rows.append({"grid": "table3" if both else "table3_separate", "context": context, "bpp": bpp})
    if both:
        rows += [{"grid": "table3_pictures", **row} for row in pictures]
    return rows + [{"grid": "table3_whole", **row} for row in _whole_rows(columns, answers)]


def _joint_rows(columns: dict, answers: dict) -> list[dict]:
    return [{key: answers["rate_distortion"][key] for key in ("bpp", "rd_loss", "mse", "lmbda")}]


ROWS_OF: dict[str, Callable[[dict, dict], list[dict]]] = {
    "figure6": _figure6_rows,
    "figure7": _figure7_rows,
    "table3": _table3_rows,
    "table4": lambda columns, answers: answers["sizes"],
    "joint": _joint_rows,
}
ROUNDED = ("bpp", "bpp_middle", "rd_loss")


def _rounded(row: dict) -> dict:
    return {key: round(value, 6) if key in ROUNDED else value for key, value in row.items()}


def save(study: Study, folder: Path | None = None, keep: bool = False) -> list[Path]:
    """Writes ablation-GRID.json for each grid of which a run is finished: settings, rows, the rate of each picture,
    what the runs were, provenance.

    Args:
        folder: by default data/results.
        keep: runs that are not finished here stay as an earlier result on the same terms has them.
    """
    folder = results.results_folder() if folder is None else folder
    paths, finished = [], study.finished()
    kept = study.kept(folder) if keep else {}
    grids = {grid.name: grid for grid in study.grids}
    for grid, rows in rows_of(study).items():
        if rows:
            runs = [(run, answers) for run, answers in finished if grid in dict(run.rows)]
            result = {
                "settings": _settings(study, grids[grid]),
                "rows": rows,
                "pictures": {run.name: _pictures(answers) for run, answers in runs},
                "runs": {run.name: _record(run, answers) for run, answers in runs},
            }
            if grid in kept:
                result = _joined(kept[grid], result)
            paths.append(folder / _file_of(grid))
            results.save(paths[-1], result)
    return paths


def _file_of(grid: str) -> str:
    return result_path(f"ablation-{grid}").name


def _joined(earlier: dict, result: dict) -> dict:
    """A result with those runs of an earlier one that it lacks."""
    more = {key: earlier[key] | result[key] for key in ("pictures", "runs")}
    rows = [row for row in earlier["rows"] if row["run"] not in result["runs"]]
    return {**result, **more, "rows": rows + result["rows"]}


def _settings(study: Study, grid: Grid) -> dict:
    """The terms that all rows of a grid share."""
    terms, config = study.terms, config_of(study.terms, grid.entries[0], 0, study.root)
    latents = check_note(Path(terms.latents) / "latents.json", {})
    return {
        "transforms": terms.transforms,
        "transforms_sha256": study.transforms_sha256,
        "size": terms.size,
        **{key: getattr(config, key) for key in ("steps", "crop", "last_crop", *RECIPE)},
        "latents": {key: latents.get(key) for key in ("pictures", "pictures_sha256", "per_picture", "seed")},
        "test_pictures": len(pictures_to_test(terms.kodak, terms.limit)),
        "test_pictures_sha256": study.pictures_sha256,
    }


def _pictures(answers: dict) -> dict[str, float]:
    """Bits per pixel of each whole picture."""
    answer = answers.get("rate_distortion") or answers["kodak"]
    return {row["image"]: round(row["bpp"], 6) for row in answer["pictures"]}


def _record(run: Run, answers: dict) -> dict:
    """What a run was and what it took."""
    what = {"model": run.entry.model, "architecture": run.entry.architecture, "training": run.entry.training}
    return {**what, "seed": run.seed, **answers["weights"]}
