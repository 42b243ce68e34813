"""The delta between curves, checked on published ones and on cases with a known answer."""

import re

import numpy as np
import pandas as pd
import pytest

from entroformer_lib.errors import DataError
from entroformer_lib.studies import bd, results
from entroformer_lib.studies.bd import Curve, compare, curve_of


@pytest.mark.parametrize("test, anchor, percent", [
    ("VTM 9.1 (VVC)", "BPG 4:4:4", -18.02),
    ("Entroformer, serial (authors)", "BPG 4:4:4", -18.04),
    ("Entroformer, serial (authors)", "VTM 9.1 (VVC)", 1.42),
    ("Entroformer, serial (authors)", "JPEG", -64.70),
])  # fmt: skip
def test_published_curves(test, anchor, percent):
    published = results.published()
    assert compare(curve_of(published, test), curve_of(published, anchor)).rate_percent == pytest.approx(
        percent, abs=0.01
    )


def test_known_answers():
    curve = Curve("a", (0.1, 0.2, 0.4, 0.8), (28.0, 30.0, 32.0, 34.0))
    assert compare(curve, curve).rate_percent == pytest.approx(0)
    dearer = Curve("b", tuple(1.1 * v for v in curve.bpp), curve.quality)
    result = compare(dearer, curve)
    assert result.rate_percent == pytest.approx(10) and (result.low, result.high) == (28, 34)
    better = Curve("c", curve.bpp, tuple(v + 1 for v in curve.quality))
    assert compare(better, curve).quality_db == pytest.approx(1)
    assert "c against a" in str(compare(better, curve)) and "pchip, 29.00 to 34.00 dB" in str(compare(better, curve))


@pytest.mark.parametrize("curve, sentence", [
    (Curve("few", (0.1, 0.2, 0.3), (20, 21, 22)), "few has 3 points"),
    (Curve("folded", (0.1, 0.2, 0.3, 0.4), (30, 31, 30.5, 33)), "quality of folded does not rise from its point 2"),
    (Curve("back", (0.1, 0.3, 0.2, 0.4), (30, 31, 32, 33)), "rate of back does not rise"),
    (Curve("far", (0.1, 0.2, 0.3, 0.4), (50, 51, 52, 53)), "no quality and rate in common"),
    (Curve("empty", (0.0, 0.2, 0.3, 0.4), (30, 31, 32, 33)), "rate of empty at its point 1 is 0"),
    (Curve("below", (-0.1, 0.2, 0.3, 0.4), (30, 31, 32, 33)), "rate of below at its point 1 is -0.1"),
    (Curve("gap", (0.1, np.nan, 0.3, 0.4), (30, 31, 32, 33)), "rate of gap at its point 2 is nan"),
    (Curve("lossless", (0.1, 0.2, 0.3, 0.4), (30, 31, 32, np.inf)), "quality of lossless at its point 4 is inf"),
    (Curve("double", (0.1, 0.2, 0.2, 0.4), (30, 31, 32, 33)), "rate of double does not rise from its point 2"),
    (Curve("level", (0.1, 0.2, 0.3, 0.4), (30, 31, 31, 33)), "quality of level does not rise from its point 2"),
    (Curve("close", (0.2, np.nextafter(0.2, 1), 0.3, 0.4), (30, 31, 32, 33)), "close and anchor cannot be compared"),
    (Curve("touching", (0.1, 0.2, 0.3, 0.4), (33.95, 35, 36, 37)), "0.05 dB in common; .* at least 1 dB"),
    (Curve("dear", (0.75, 0.9, 1.0, 1.1), (28, 30, 32, 34)), "rates from 0.750 to 0.800 in common"),
])  # fmt: skip
def test_curves_without_an_answer(curve, sentence):
    """Either way round, and in a table the reason stands in the cell."""
    anchor = Curve("anchor", (0.1, 0.2, 0.4, 0.8), (28.0, 30.0, 32.0, 34.0))
    with pytest.raises(DataError, match=sentence):
        compare(curve, anchor)
    with pytest.raises(DataError):
        compare(anchor, curve)
    table = bd.table([curve, anchor], [anchor])
    assert table["rate_percent"].isna().tolist() == [True, False]
    assert re.search(sentence, table["reason"][0]) and table["reason"][1] == ""


def test_the_smallest_overlap_is_enough():
    anchor = Curve("anchor", (0.1, 0.2, 0.4, 0.8), (28.0, 30.0, 32.0, 34.0))
    found = compare(Curve("touching", (0.3, 0.8, 0.9, 1.0), (33.0, 35.0, 36.0, 37.0)), anchor)
    assert found.high - found.low == bd.LEAST_QUALITY and np.isfinite([found.rate_percent, found.quality_db]).all()


def test_every_published_curve_has_a_source_and_rises():
    published = results.published(optimised_for=("mse", "ms-ssim", "codec"))
    assert published["source"].notna().all() and (published[["psnr_db", "ms_ssim_db"]].notna().any(axis=1)).all()
    for _, curve in published.groupby(["codec", "optimised_for"]):
        assert curve["bpp"].is_monotonic_increasing


def test_a_curve_knows_whether_it_was_published():
    points = pd.DataFrame({"codec": "ours", "bpp": [0.5, 0.3], "psnr_db": [32.0, 30.0], "ms_ssim_db": [20.0, np.nan]})
    assert curve_of(points, "ours") == Curve("ours", (0.3, 0.5), (30.0, 32.0), None)
    assert curve_of(points, "ours", "ms_ssim_db").quality == (20.0,)
    assert curve_of(results.published(), "JPEG").source.startswith("CompressAI")
    assert results.decibels(0.999) == pytest.approx(30)


def test_table_gives_the_reason_instead_of_a_number():
    published = results.published()
    bpg, vtm = (curve_of(published, name) for name in ("BPG 4:4:4", "VTM 9.1 (VVC)"))
    table = bd.table([vtm, Curve("short", (0.1, 0.2), (28.0, 30.0))], [bpg])
    assert table["rate_percent"][0] == pytest.approx(-18.02, abs=0.05) and table["reason"][0] == ""
    assert np.isnan(table["rate_percent"][1]) and "at least four" in table["reason"][1]
    assert list(table["anchor"]) == ["BPG 4:4:4, published"] * 2
