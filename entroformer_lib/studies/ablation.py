"""The paper's ablations on equal terms: table 1, figures 6 and 7, tables 3 and 4, and what the released code does
otherwise.

    entroformer study ablation --grid table1 figure6 --train-on photos --kodak pictures/kodak --out runs/ablation

**Equal terms.** One frozen pair of transforms. The latents of the training photographs are computed once
(`training/latents.py`), and each entropy model is trained on them with the same steps, seeds and order of data. The
paper trains transforms and entropy model jointly, so that each adapts to the other, and PSNR moves a little with every
row; here quality is the same in all rows by construction, and a difference in bits is one of the entropy models. What
that leaves out, the grid `joint` checks: it trains one pair of variants from the same transforms with nothing frozen.

`ablation_grids.py` holds the rows as data, `ablation_runs.py` trains and measures one, `sweep.py` does many,
`latent_rates.py` says what is measured: estimated rates of the Kodak pictures' latents. Here is the study as a whole:
what is checked before it starts, what it would take, and the saved result.
"""

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from entroformer_lib.errors import StudyError
from entroformer_lib.files import data_folder, write_bytes
from entroformer_lib.models.config import SIZES
from entroformer_lib.studies.ablation_grids import BOTH, Grid
from entroformer_lib.studies.ablation_runs import RECIPE, Run, Terms, runs_of, tasks_of
from entroformer_lib.studies.engine import Outcome, Task, check, connected, sweep
from entroformer_lib.studies.latent_rates import COLUMNS, ROWS
from entroformer_lib.studies.rate_distortion import pictures_to_test
from entroformer_lib.studies.results import as_json, provenance
from entroformer_lib.training.latents import check_note, frozen_transforms, transforms_digest, write_latents


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
        latents = Path(self.terms.latents)
        if not (latents / "latents.json").exists():
            write_latents(self.terms.transforms, self.terms.train_on, latents, self.terms.crop)
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


def plan_in_words(study: Study) -> str:
    """What would run and how long it would take, a line for each run."""
    rows = study.plan()
    lines = [f"{'run':28} {'state':10} {'estimated':>10}  grids"]
    for row in rows:
        lines.append(f"{row['run']:28} {row['state']:10} {_in_minutes(row['seconds']):>10}  {', '.join(row['grids'])}")
    left = [row["seconds"] for row in rows if row["missing"]]
    known = [seconds for seconds in left if seconds is not None]
    total = f", {_in_minutes(sum(known))} one after the other" if known or not left else ""
    lines.append(f"{len(left)} of {len(rows)} runs to do{total}")
    if len(known) < len(left):
        lines.append(f"{len(left) - len(known)} of them cannot be estimated before a run like them is finished")
    return "\n".join(lines)


def _in_minutes(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds / 60:.1f} min"


def prepare(grids: list[Grid], terms: Terms, root: Path, seeds: Iterable[int] = (0, 1)) -> Study:
    """Checks everything that can be wrong, and starts nothing.

    Raises:
        UserError: transforms that do not exist, latents of other transforms, no test pictures, runs of another kind.
    """
    root = root.resolve()  # workers may stand elsewhere
    places = {name: str(Path(getattr(terms, name)).absolute()) for name in ("latents", "train_on", "kodak")}
    terms = dataclasses.replace(terms, **places)
    if terms.size not in SIZES:
        raise StudyError(f"There is no size '{terms.size}'; there are {', '.join(SIZES)}.")
    if not grids:
        raise StudyError("Name a grid, or fields for a row of your own.")
    source = frozen_transforms(terms.transforms)
    if source.gain is not None:
        middle = source.config.lmbdas[len(source.config.lmbdas) // 2]
        raise StudyError(f"{terms.transforms} has several rates; name one, such as {terms.transforms}@{middle:g}.")
    digest = transforms_digest(source)
    if (Path(terms.latents) / "latents.json").exists():
        check_note(Path(terms.latents) / "latents.json", {"transforms_sha256": digest, "crop": terms.crop})
    pictures = len(pictures_to_test(Path(terms.kodak), terms.limit))
    if pictures < ROWS * COLUMNS and any(grid.name == "table4" for grid in grids):
        raise StudyError(f"Table 4 is measured on mosaics of {ROWS * COLUMNS} pictures, and there are {pictures}.")
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
    """The rows of each grid, from the runs that are finished."""
    rows: dict[str, list[dict]] = {grid.name: [] for grid in study.grids}
    for run, task in zip(study.runs, study.tasks, strict=True):
        if not task.missing(study.root):
            answers = {name: task.answer(study.root, name) for name in run.answers}
            for grid, columns in run.rows:
                rows[grid] += [
                    {"grid": grid, "run": run.name, "seed": run.seed, **columns, **row}
                    for row in ROWS_OF.get(grid, _whole_rows)(columns, answers)
                ]
    return rows


def _whole_rows(columns: dict, answers: dict) -> list[dict]:
    """bpp: mean over the whole pictures; bpp_middle: over their middles, as large as the crops of training."""
    pictures = answers["kodak"]["pictures"]
    return [{"bpp": _mean(row["bpp"] for row in pictures), "bpp_middle": _rounded(answers["kodak"]["bpp_middle"])}]


def _figure7_rows(columns: dict, answers: dict) -> list[dict]:
    """The learning curve over the middles; at its end the whole pictures, and the middles with other k."""
    curve = [{"step": row["step"], "bpp": _rounded(row["bpp"])} for row in answers["curve"]]
    end = [{"grid": "figure7_end", **row} for row in _whole_rows(columns, answers)]
    others = [{"grid": "figure7_k_at_test", **row, "bpp": _rounded(row["bpp"])} for row in answers["k_at_test"]]
    return curve + end + others


def _table3_rows(columns: dict, answers: dict) -> list[dict]:
    """Means of the second slice with each context; apart from the others those of the model that knows all of them."""
    rows = []
    for context in dict.fromkeys(row["context"] for row in answers["second_slice"]):
        bpp = _mean(row["bpp"] for row in answers["second_slice"] if row["context"] == context)
        grid = "table3" if columns["trained"] == BOTH else "table3_separate"
        rows.append({"grid": grid, "context": context, "bpp": bpp})
    if columns["trained"] == BOTH:
        pictures = answers["second_slice"]
        rows += [{"grid": "table3_pictures", **row, "bpp": _rounded(row["bpp"])} for row in pictures]
    return rows + [{"grid": "table3_whole", **row} for row in _whole_rows(columns, answers)]


def _table4_rows(columns: dict, answers: dict) -> list[dict]:
    return [{**row, "bpp": _rounded(row["bpp"])} for row in answers["sizes"]]


def _joint_rows(columns: dict, answers: dict) -> list[dict]:
    found = answers["rate_distortion"]
    return [{**{key: _rounded(found[key]) for key in ("bpp", "rd_loss")}, "mse": found["mse"], "lmbda": found["lmbda"]}]


ROWS_OF: dict[str, Callable[[dict, dict], list[dict]]] = {
    "figure7": _figure7_rows,
    "table3": _table3_rows,
    "table4": _table4_rows,
    "joint": _joint_rows,
}


def _mean(values: Iterable[float]) -> float:
    return _rounded(statistics.mean(values))


def _rounded(value: float) -> float:
    return round(value, 6)


def save(study: Study, folder: Path | None = None) -> list[Path]:
    """Writes ablation-GRID.json for each grid of which a run is finished: settings, rows, the rate of each picture,
    what the runs were, provenance.

    Args:
        folder: by default data/results.
    """
    folder, paths, record = folder or data_folder() / "results", [], provenance()
    folder.mkdir(parents=True, exist_ok=True)
    for grid, rows in rows_of(study).items():
        if not rows:
            continue
        names = {row["run"] for row in rows}
        runs = {run.name: (run, task) for run, task in zip(study.runs, study.tasks, strict=True) if run.name in names}
        result = {
            "settings": _settings(study),
            "rows": rows,
            "pictures": {name: _pictures(task, study.root) for name, (_, task) in runs.items()},
            "runs": {name: _record(run, task, study.root) for name, (run, task) in runs.items()},
            "provenance": record,
        }
        paths.append(folder / f"ablation-{grid}.json")
        write_bytes(paths[-1], as_json(result).encode())
    return paths


def _settings(study: Study) -> dict:
    terms = study.terms
    latents = json.loads((Path(terms.latents) / "latents.json").read_text())
    return {
        "transforms": terms.transforms,
        "transforms_sha256": study.transforms_sha256,
        **{key: getattr(terms, key) for key in ("size", "steps", "crop")},
        **RECIPE,
        "latents": {key: latents[key] for key in ("pictures", "per_picture", "seed")},
        "test_pictures": len(pictures_to_test(Path(terms.kodak), terms.limit)),
    }


def _pictures(task: Task, root: Path) -> dict[str, float]:
    """Bits per pixel of each whole picture."""
    answer = "rate_distortion" if "rate_distortion" in task.answers else "kodak"
    return {row["image"]: _rounded(row["bpp"]) for row in task.answer(root, answer)["pictures"]}


def _record(run: Run, task: Task, root: Path) -> dict:
    """What a run was and what it took."""
    what = {"model": run.entry.model, "architecture": run.entry.architecture, "training": run.entry.training}
    return {**what, "seed": run.seed, **task.answer(root, "weights")}
