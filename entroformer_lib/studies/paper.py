"""What the paper's figures need of one model, any model: rates on Kodak, position masking, attention maps.

Figures 11 and 12 (5 too, of models behind shared transforms) come from whole files, 3 from `position_masking.py`, 8 to
10 from `attention_maps.py`. Everything goes into one folder: results/ there is read instead of data/results while its
figures are drawn. What was measured before is not measured again.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from entroformer_lib.datasets import sample_picture
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import AttentionError, UserError
from entroformer_lib.inspection.missing_context import RADII, neighbourhood
from entroformer_lib.inspection.row_server import RowServer
from entroformer_lib.studies import attention_maps, position_masking, results
from entroformer_lib.studies.commands import at_least
from entroformer_lib.studies.measuring import Coding, about, finished_rows, means, measure, tasks_of
from entroformer_lib.studies.rate_distortion import digest_of, pictures_of, pictures_to_test
from entroformer_lib.weights.zoo import load_model, weights_digest

SIDE, CROP = 7, 256  # of the neighbourhood in latents, and of what is masked in pixels; as in data/results


@dataclass(frozen=True)
class Paper:
    """The measurements of one model.

    name: of the model, or its file. pictures: folder of the test pictures. out: folder for results. limit: only the
    first pictures. jobs: pictures at a time.
    """

    name: str
    pictures: Path
    out: Path
    limit: int | None = None
    jobs: int | None = None

    def plan(self) -> pd.DataFrame:
        """What would be measured, and about how long it takes on one core: figures, what, runs, seconds, note.

        The seconds come from one picture, which is coded once and whose latents are looked at under nine masks. What
        this model has not, such as attention, has no runs and a note that says why.
        """
        at_least(1, limit=self.limit, jobs=self.jobs)
        model, codings = load_model(self.name, "cpu"), self._codings()
        rows = [("5, 11, 12", "whole files, decoded again", len(codings), len(codings) * _seconds(codings[0]), "")]
        squares = pictures_of(self.pictures, 1, CROP)
        count = len(pictures_to_test(self.pictures, self.limit))
        try:
            neighbourhood(model, SIDE)
            begun = time.perf_counter()
            position_masking.run([model], squares, side=3)
            each = (time.perf_counter() - begun) / 9
            masks = count * (2 * SIDE**2 + len(RADII)) + 4 * SIDE**2
            rows.append(("3", "masked positions", masks, masks * each, ""))
        except UserError as error:
            rows.append(("3", "masked positions", 0, 0.0, str(error)))
        begun = time.perf_counter()
        note = _why_no_maps(model)
        seconds = time.perf_counter() - begun
        rows.append(("8 to 10", "attention maps", 0 if note else 1, 0.0 if note else 5 * seconds, note))
        return pd.DataFrame(rows, columns=["figures", "what", "runs", "seconds", "note"])

    def measure(self, tell=print) -> None:
        """Does it, part by part.  tell: called with a sentence after each"""
        at_least(1, limit=self.limit, jobs=self.jobs)
        model = load_model(self.name, "cpu")
        with results.kept_in(self.out / "results"):
            self._rates(model)
            tell("Rates are measured.")
            try:
                neighbourhood(model, SIDE)
            except UserError as error:
                tell(f"No figure 3: {error}")
            else:
                folder = self.out / "masking"
                position_masking.measure(folder, self.pictures, SIDE, CROP, self.limit, models=(self.name,))
                tell("Masked positions are measured.")
            if note := _why_no_maps(model):
                tell(f"No figures 8 to 10: {note}")
            else:
                attention_maps.save(self.name)
                tell("Attention maps are saved.")

    def _codings(self) -> list[Coding]:
        return tasks_of(self.name, pictures_to_test(self.pictures, self.limit))

    def _rates(self, model: Entroformer) -> None:
        """As the card of a shipped model has them. A result of these weights, pictures and rates stays as it is."""
        out, codings = results.result_path(f"{model.name or Path(self.name).stem}-kodak"), self._codings()
        digest, saved = digest_of(pictures_to_test(self.pictures, self.limit)), results.load(out) or {}
        measured = saved.get("pictures_sha256"), saved.get("provenance", {}).get("weights_sha256")
        rates = {coding.setting for coding in codings}
        if measured == (digest, weights_digest(model).hex()) and rates == {row["lmbda"] for row in saved["images"]}:
            return
        with finished_rows(out) as done:
            with tqdm(total=len(codings), unit="file", disable=None) as bar:
                rows = measure(codings, done, self.jobs, lambda row: bar.update())
            mean = means(rows)
            images = [{"lmbda": row.pop("setting"), **row} for row in rows]
            told = {"pictures_sha256": digest, **about(model.card, model.config.variant)}
            results.save(out, {"images": images, "mean": mean, **told}, model)


def _seconds(coding: Coding) -> float:
    begun = time.perf_counter()
    coding()
    return time.perf_counter() - begun


def _why_no_maps(model: Entroformer) -> str:
    """Why there is no attention to show; empty where there is."""
    try:
        RowServer(model, sample_picture("coffee"))
    except AttentionError as error:
        return str(error)
    return ""
