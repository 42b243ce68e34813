import functools
import json

import pandas as pd
import pytest

from benchmarks import latency
from benchmarks.latency import STAGES, exponents, growth, measure_one, table
from entroformer_lib.codec import codec
from entroformer_lib.datasets import sample_picture
from entroformer_lib.stages import listening, stage_times
from entroformer_lib.views import figures


def test_stages_add_up_and_progress_is_told(any_variant):
    picture = sample_picture("chelsea").crop((0, 0, 192, 128))
    told = []
    with listening(lambda *step: told.append(step)), stage_times() as seconds:
        data = codec.encode(any_variant, picture)
        codec.decode(data, any_variant)
    assert set(seconds) <= set(STAGES) and seconds["transforms"] > 0 and seconds["entropy coding"] > 0
    if any_variant.config.context != "none":
        assert seconds["context"] > 0
        assert told[-1][1] == told[-1][2]
    before = dict(seconds)
    codec.encode(any_variant, picture)  # the clock runs no more
    assert seconds == before


def test_rows_of_one_model():
    rows = pd.DataFrame(measure_one("tiny-parallel", 64, 64, repeats=1))
    assert len(rows) == 2 and (rows.seconds > 0).all() and (rows.peak_mb > 50).all()
    parts = rows[[f"{name.replace(' ', '_')}_s" for name in STAGES] + ["other_s"]].sum(axis=1)
    assert (abs(parts - rows.seconds) < 1e-6).all()


def test_table_and_growth(tmp_path, monkeypatch):
    """A table with its model in a process of its own, as `make bench` does it; growth in this one, which is quicker."""
    out = tmp_path / "latency.json"
    monkeypatch.setattr(latency, "in_own_process", functools.cache(latency.in_own_process))  # the warm-up counts
    table(str(out), models=("bmshj2018-hyperprior",), repeats=1, width=64, height=64)
    result = json.loads(out.read_text())
    assert [(row["model"], row["direction"]) for row in result["rows"]] == [
        ("bmshj2018-hyperprior", "encode"),
        ("bmshj2018-hyperprior", "decode"),
    ]
    monkeypatch.setattr(latency, "in_own_process", latency.measure_one)
    growth(str(out), model="tiny-parallel", sides=(64, 128), large=None)
    result = json.loads(out.read_text())
    assert {row["width"] for row in result["rows"]} == {64, 128} and "seconds" in result["exponents"]
    assert result["provenance"]["threads"] > 0


def test_growth_finds_the_exponents():
    sides = pd.Series([1, 2, 4, 8])
    rows = pd.DataFrame({"width": sides, "height": sides, "seconds": 3 * sides**3.0, "peak_mb": 100 + 2 * sides**2.0})
    rows.loc[0, "peak_mb"] = 100  # the smallest is the base line
    found = exponents(rows)
    assert found["seconds"] == pytest.approx(1.5) and found["memory"] == pytest.approx(1, abs=0.01)


def test_bars_of_latency_are_called_what_they_are():
    seconds = dict(transforms_s=1.0, hyper_s=2.0, context_s=3.0, entropy_coding_s=4.0, other_s=5.0)
    rows = [{"model": "m", "direction": d, "seconds": 15.0, **seconds} for d in ("encode", "decode")]
    found = {bars.get_label(): bars[0].get_width() for bars in figures.latency(pd.DataFrame(rows)).axes[0].containers}
    named = {"transforms: g_a or g_s": 1, "hyperprior": 2, "context model": 3, "entropy coder": 4, "other": 5}
    assert found == {**named, "CompressAI, whole": 0}
