"""Comparing rate-distortion curves: published ones, measured ones, and the Bjontegaard delta between two of them.

A BD-rate depends on the anchor, the interpolation and the range of quality both curves cover, so all three travel with
the number.
"""

import functools
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from entroformer_lib.errors import DataError
from entroformer_lib.files import data_folder

METHOD = "pchip"


@dataclass(frozen=True)
class Curve:
    """Rate and quality of one codec at several settings, means over a set of pictures.

    bpp rises; quality is PSNR in dB, or MS-SSIM in dB. `source` says who published the numbers; None: measured here.
    """

    label: str
    bpp: tuple[float, ...]
    quality: tuple[float, ...]
    source: str | None = None

    def above(self, quality: float) -> "Curve":
        """The points of at least this quality: to compare over a range that others cover too."""
        kept = [(r, q) for r, q in zip(self.bpp, self.quality, strict=True) if q >= quality]
        bpp, qualities = zip(*kept, strict=True) if kept else ((), ())
        return replace(self, bpp=bpp, quality=qualities)


@dataclass(frozen=True)
class Bjontegaard:
    """Mean difference in rate at equal quality (`rate_percent`), and in quality at equal rate (`quality_db`).

    low, high: the range of quality, in dB, that both curves cover and the rate difference is taken over.
    """

    test: str
    anchor: str
    rate_percent: float
    quality_db: float
    low: float
    high: float
    method: str = METHOD

    def __str__(self) -> str:
        return (
            f"{self.test} against {self.anchor}: {self.rate_percent:+.2f}% rate, {self.quality_db:+.2f} dB "
            f"({self.method}, {self.low:.2f} to {self.high:.2f} dB)"
        )


def compare(test: Curve, anchor: Curve) -> Bjontegaard:
    """BD-rate and BD-PSNR (or BD-MS-SSIM) of a curve against an anchor, by the bjontegaard package.

    Raises:
        DataError: fewer than four points, a curve that does not rise, or no common range of quality.
    """
    from bjontegaard import bd_psnr, bd_rate

    for curve in (test, anchor):
        _check(curve)
    low, high = max(min(c.quality) for c in (test, anchor)), min(max(c.quality) for c in (test, anchor))
    left, right = max(c.bpp[0] for c in (test, anchor)), min(c.bpp[-1] for c in (test, anchor))
    if low >= high or left >= right:
        raise DataError(
            f"{test.label} ({min(test.quality):.2f} to {max(test.quality):.2f} dB) and {anchor.label} "
            f"({min(anchor.quality):.2f} to {max(anchor.quality):.2f} dB) have no quality and rate in common."
        )
    points = (anchor.bpp, anchor.quality, test.bpp, test.quality)
    options = dict(method=METHOD, require_matching_points=False, min_overlap=0)
    return Bjontegaard(
        test.label, anchor.label, float(bd_rate(*points, **options)), float(bd_psnr(*points, **options)), low, high
    )


def table(tests: Iterable[Curve], anchors: Iterable[Curve]) -> pd.DataFrame:
    """Every test curve against every anchor: test, anchor, rate_percent, quality_db, low, high (dB), method and, where
    no number can be given, reason."""
    rows = []
    for test, anchor in itertools.product(tuple(tests), tuple(anchors)):
        row = {"test": test.label, "anchor": anchor.label + (", published" if anchor.source else "")}
        try:
            found = compare(test, anchor)
        except DataError as error:
            rows.append(row | {"reason": str(error)})
            continue
        numbers = {name: getattr(found, name) for name in ("rate_percent", "quality_db", "low", "high", "method")}
        rows.append(row | numbers | {"reason": ""})
    return pd.DataFrame(
        rows, columns=["test", "anchor", "rate_percent", "quality_db", "low", "high", "method", "reason"]
    )


def _check(curve: Curve) -> None:
    if len(curve.bpp) < 4:
        raise DataError(f"{curve.label} has {len(curve.bpp)} points, and a BD-rate takes at least four.")
    for name, values in (("rate", curve.bpp), ("quality", curve.quality)):
        for i, (a, b) in enumerate(itertools.pairwise(values)):
            if not a < b:
                raise DataError(
                    f"The {name} of {curve.label} does not rise from its point {i + 1} ({a:g}) to the next ({b:g})."
                )


def published_curves(dataset: str = "kodak", metric: str = "psnr", optimised_for: Iterable[str] = ("mse", "codec")):
    """Curves other people published, by label: dict[str, Curve].

    Args:
        dataset: kodak or tecnick.
        metric: psnr (dB) or ms_ssim, given as -10 log10(1 - MS-SSIM) in dB.
        optimised_for: mse, ms-ssim, and codec for classical codecs.
    """
    curves = {}
    for row in _published():
        if row["dataset"] == dataset and row["optimised_for"] in tuple(optimised_for) and metric in row:
            quality = row[metric] if metric == "psnr" else decibels(row[metric])
            points = sorted(zip(row["bpp"], map(float, quality), strict=True))
            curves[row["label"]] = Curve(row["label"], *map(tuple, zip(*points, strict=True)), source=row["source"])
    return curves


def decibels(ms_ssim) -> np.ndarray:
    """MS-SSIM as -10 log10(1 - MS-SSIM), in which its small differences near 1 can be seen."""
    return -10 * np.log10(1 - np.asarray(ms_ssim, dtype=float))


def measured_curve(label: str, points: dict | list, metric: str = "psnr_db") -> Curve:
    """A curve from the means of saved results: rows, or a dict of rows, with `bpp` and the metric."""
    rows = sorted(points.values() if isinstance(points, dict) else points, key=lambda row: row["bpp"])
    quality = [row[metric] for row in rows]
    if metric == "ms_ssim":
        quality = decibels(quality)
    return Curve(label, tuple(row["bpp"] for row in rows), tuple(map(float, quality)))


def saved_points() -> pd.DataFrame:
    """All that was measured on Kodak, from data/results: one row per codec and setting, means over the pictures.

    Columns: codec, optimised_for (mse, ms-ssim or codec), transforms (of an entropy model behind frozen ones: whose),
    setting (lambda or quality), bpp, psnr_db, ms_ssim_db (-10 log10 of one minus the mean MS-SSIM).
    """
    folder, rows = data_folder() / "results", []
    for path in sorted(folder.glob("*-kodak.json")):
        saved = json.loads(path.read_text())
        mean, goal = saved["mean"], saved.get("optimised_for", "mse")
        points = [(None, mean)] if "bpp" in mean else [(float(lmbda), row) for lmbda, row in mean.items()]
        name = path.name.removesuffix("-kodak.json")
        about = {"codec": name, "optimised_for": goal, "transforms": saved.get("transforms")}
        rows += [{**about, "setting": setting, **row} for setting, row in points]
    if (folder / "classical.json").exists():
        classical = json.loads((folder / "classical.json").read_text())["mean"]
        rows += [{"optimised_for": "codec", **row} for row in classical]
    table = pd.DataFrame(rows)
    table["ms_ssim_db"] = decibels(table["ms_ssim"])
    columns = ["codec", "optimised_for", "transforms", "setting", "bpp", "psnr_db", "ms_ssim_db"]
    return table[columns].sort_values(["codec", "bpp"], ignore_index=True)


def curve_of(points: pd.DataFrame, codec: str, quality: str = "psnr_db") -> Curve:
    """A codec's points in a table as a curve."""
    rows = points[points["codec"] == codec].sort_values("bpp")
    return Curve(codec, tuple(rows["bpp"]), tuple(rows[quality]))


@functools.cache
def _published() -> list[dict]:
    return json.loads((data_folder() / "reference" / "rd_curves.json").read_text())
