"""Comparing rate-distortion curves: published ones, measured ones, and the Bjontegaard delta between two of them.

A BD-rate depends on the anchor, the interpolation and the range of quality both curves cover, so all three travel with
the number.
"""

import functools
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

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


@functools.cache
def _published() -> list[dict]:
    return json.loads((data_folder() / "reference" / "rd_curves.json").read_text())
