import json

import pandas as pd
import pytest

from entroformer_lib.coding import codec
from entroformer_lib.datasets import sample_picture
from entroformer_lib.models.clock import listening, stage_times
from entroformer_lib.studies.latency import STAGES, growth, main, measure_one


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
    table = pd.DataFrame(measure_one("tiny-parallel", 64, 64, repeats=1))
    assert len(table) == 2 and (table.seconds > 0).all() and (table.peak_mb > 50).all()
    parts = table[[f"{name.replace(' ', '_')}_s" for name in STAGES] + ["other_s"]].sum(axis=1)
    assert (abs(parts - table.seconds) < 1e-6).all()


def test_whole_table_with_growth(tmp_path):
    """Every model in a process of its own, as `make bench` does it."""
    out = tmp_path / "latency.json"
    main(
        str(out),
        models=("bmshj2018-hyperprior",),
        repeats=1,
        width=64,
        height=64,
        sides=(64, 128),
        grown="tiny-parallel",
        large=None,
    )
    result = json.loads(out.read_text())
    assert {row["model"] for row in result["rows"]} == {"bmshj2018-hyperprior"}
    assert {row["width"] for row in result["growth"]} == {64, 128} and "seconds" in result["exponents"]


def test_growth_finds_the_exponents():
    sides = pd.Series([1, 2, 4, 8])
    table = pd.DataFrame({"width": sides, "height": sides, "seconds": 3 * sides**3.0, "peak_mb": 100 + 2 * sides**2.0})
    table.loc[0, "peak_mb"] = 100  # the smallest is the base line
    exponents = growth(table)
    assert exponents["seconds"] == pytest.approx(1.5) and exponents["memory"] == pytest.approx(1, abs=0.01)
