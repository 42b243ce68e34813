"""The price of two passes: parts that add up, squares that are coded alone, pairs that may be compared."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import aware_model

from benchmarks import two_passes
from entroformer_lib.datasets import sample_picture
from entroformer_lib.errors import WeightsError
from entroformer_lib.models.context import first_slice
from entroformer_lib.weights.zoo import save_weights


def pair(**parallel):
    serial, other = aware_model("serial"), aware_model("parallel", **parallel)
    if not parallel:
        for part in ("g_a", "g_s", "gain"):
            getattr(other, part).load_state_dict(getattr(serial, part).state_dict())
    return serial, other


@pytest.mark.parametrize("variant", ["serial", "parallel"])
def test_parts_are_the_bits_of_the_model(variant):
    model = aware_model(variant)
    y = torch.randn(1, 24, 8, 12)
    found = two_passes.parts(model, y, 1.0)
    bits = model.estimated_bits(model.scaled(y, 1.0), 1.0)
    assert sum(found.values()) == pytest.approx(sum(float(b.sum()) for b in bits.values()))
    assert found["first"] == pytest.approx(float(bits["y"][0, first_slice(8, 12)].sum()))


def test_a_square_is_coded_as_if_it_stood_alone():
    model = aware_model("parallel")
    y = torch.randn(1, 24, 8, 8)
    squares = [two_passes.parts(model, part, 0.5) for row in y.split(4, 2) for part in row.split(4, 3)]
    together = two_passes.parts(model, y, 0.5, side=64)
    assert together == pytest.approx({name: sum(one[name] for one in squares) for name in together}, rel=1e-5)
    assert together["second"] != pytest.approx(two_passes.parts(model, y, 0.5)["second"], rel=1e-4)


def test_a_row_for_each_model_rate_and_side(tmp_path):
    sample_picture("chelsea").crop((0, 0, 192, 128)).save(tmp_path / "a.png")
    names = [str(tmp_path / f"{name}.safetensors") for name in ("serial", "parallel")]
    for model, name in zip(pair(), names, strict=True):
        save_weights(model, Path(name), {})
    out, lmbdas = tmp_path / "out.json", aware_model("serial").config.lmbdas
    others = (f"again={'='.join(names)}",)
    two_passes.compare(str(tmp_path), str(out), models=tuple(names), others=others, lmbdas=lmbdas)
    rows = pd.DataFrame(json.loads(out.read_text())["rows"])
    parts = ["first", "second", "z"]
    assert (rows[parts] > 0).all().all() and len(rows) == 2 * len(lmbdas) * (3 + 1)
    whole = rows[rows["side"].isna()].set_index(["pair", "variant"])[parts].sort_index()
    for variant in ("serial", "parallel"):
        assert np.array_equal(whole.loc[("again", variant)], whole.loc[("", variant)])
    assert not np.isclose(whole.loc[("", "serial")], whole.loc[("", "parallel")]).any()


def test_models_with_other_transforms_are_not_compared(tmp_path):
    sample_picture("chelsea").crop((0, 0, 64, 64)).save(tmp_path / "a.png")
    names = [str(tmp_path / f"{name}.safetensors") for name in ("serial", "parallel")]
    for model, name in zip(pair(seed=1), names, strict=True):
        save_weights(model, Path(name), {})
    with pytest.raises(WeightsError, match="other transforms"):
        two_passes.compare(str(tmp_path), str(tmp_path / "out.json"), models=tuple(names))
