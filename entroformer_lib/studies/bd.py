"""Comparing two rate-distortion curves: the Bjontegaard delta.

A BD-rate depends on the anchor, the interpolation and the range of quality that both curves cover, so all three travel
with the number. Over a small range it says little: curves must have LEAST_QUALITY in common, and rates of which the
largest is LEAST_RATES times the smallest.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import pandas as pd

from entroformer_lib.errors import DataError

METHOD = "pchip"
LEAST_QUALITY = 1.0  # dB
LEAST_RATES = 1.1


@dataclass(frozen=True)
class Curve:
    """Rate and quality of one codec at several settings, means over a set of pictures.

    bpp rises; quality is PSNR in dB, or MS-SSIM in dB. `source` says who published the numbers; None: measured here.
    """

    label: str
    bpp: tuple[float, ...]
    quality: tuple[float, ...]
    source: str | None = None


def curve_of(points: pd.DataFrame, codec: str, quality: str = "psnr_db") -> Curve:
    """A codec's points as a curve.

    points: of `results.kodak_means` or `results.published`; quality: psnr_db or ms_ssim_db.
    """
    rows = points[points["codec"] == codec].dropna(subset=quality).sort_values("bpp")
    source = rows["source"].iloc[0] if "source" in rows and len(rows) else None
    return Curve(codec, tuple(rows["bpp"]), tuple(rows[quality]), source)


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
        DataError: fewer than four points, values that are no numbers, a rate of zero, a curve that does not rise, or
            too little in common.
    """
    from bjontegaard import bd_psnr, bd_rate

    for curve in (test, anchor):
        _check(curve)
    low, high = max(min(c.quality) for c in (test, anchor)), min(max(c.quality) for c in (test, anchor))
    left, right = max(c.bpp[0] for c in (test, anchor)), min(c.bpp[-1] for c in (test, anchor))
    ranges = " and ".join(f"{c.label} ({min(c.quality):.2f} to {max(c.quality):.2f} dB)" for c in (test, anchor))
    if low >= high or left >= right:
        raise DataError(f"{ranges} have no quality and rate in common.")
    if high - low < LEAST_QUALITY:
        raise DataError(f"{ranges} have {high - low:.2f} dB in common; a BD-rate takes at least {LEAST_QUALITY:g} dB.")
    if right < LEAST_RATES * left:
        raise DataError(
            f"{ranges} have the rates from {left:.3f} to {right:.3f} in common; the largest must be at least "
            f"{LEAST_RATES:g} times the smallest."
        )
    points = (anchor.bpp, anchor.quality, test.bpp, test.quality)
    options = dict(method=METHOD, require_matching_points=False, min_overlap=0)
    try:
        rate, quality = (float(measure(*points, **options)) for measure in (bd_rate, bd_psnr))
    except ValueError as error:  # points so close that their logarithms are equal
        raise DataError(f"{test.label} and {anchor.label} cannot be compared: {error}") from None
    return Bjontegaard(test.label, anchor.label, rate, quality, low, high)


def table(tests: Iterable[Curve], anchors: Iterable[Curve]) -> pd.DataFrame:
    """Every test curve against every anchor: test, anchor, rate_percent, quality_db, low, high (dB), method and, where
    no number can be given, reason."""
    rows = []
    for test, anchor in itertools.product(tuple(tests), tuple(anchors)):
        try:
            row = asdict(compare(test, anchor)) | {"reason": ""}
        except DataError as error:
            row = {"test": test.label, "reason": str(error)}
        rows.append(row | {"anchor": anchor.label + (", published" if anchor.source else "")})
    columns = ["test", "anchor", "rate_percent", "quality_db", "low", "high", "method", "reason"]
    return pd.DataFrame(rows, columns=columns)


def _check(curve: Curve) -> None:
    if len(curve.bpp) < 4:
        raise DataError(f"{curve.label} has {len(curve.bpp)} points, and a BD-rate takes at least four.")
    for name, values in (("rate", curve.bpp), ("quality", curve.quality)):
        for i, value in enumerate(values):
            if not math.isfinite(value) or (name == "rate" and value <= 0):
                raise DataError(f"The {name} of {curve.label} at its point {i + 1} is {value:g}; no curve goes there.")
        for i, (a, b) in enumerate(itertools.pairwise(values)):
            if not a < b:
                raise DataError(
                    f"The {name} of {curve.label} does not rise from its point {i + 1} ({a:g}) to the next ({b:g})."
                )
