"""Entropy models behind the same transforms, and what explains their differences."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from entroformer_lib.files import data_folder
from entroformer_lib.studies import repetition, same_transforms
from entroformer_lib.studies.bd import compare, measured_curve
from entroformer_lib.views import figures, paper_data, paper_figures


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Results of three variants, of which the second needs 10% more and the third as much as the first."""
    (tmp_path / "results").mkdir()
    original = json.loads((data_folder() / "results" / "tiny-rates-kodak.json").read_text())["images"]
    for variant, factor in (("minnen", 1.0), ("cnn", 1.1), ("serial", 1.0)):
        rows = [{**row, "bpp": factor * row["bpp"]} for row in original]
        result = {"images": rows, "transforms": "tiny-rates", "variant": variant, "mean": {}}
        (tmp_path / "results" / f"{variant}-kodak.json").write_text(json.dumps(result))
    (tmp_path / "results" / "other-kodak.json").write_text(json.dumps({"images": original, "mean": {}}))
    for module in (same_transforms, paper_data):
        monkeypatch.setattr(module, "data_folder", lambda: tmp_path)
    return tmp_path


def test_rates_are_divided_at_equal_pictures(saved):
    rates = same_transforms.saved_rates()
    assert list(rates["variant"].unique()) == ["minnen", "cnn", "serial"]  # in the order of WORDS, and no other
    each = same_transforms.against(rates, "minnen").groupby("variant")["percent"]
    assert np.allclose(each.min(), each.max())
    assert each.mean()["cnn"] == pytest.approx(10) and each.mean()["serial"] == pytest.approx(0)
    table = same_transforms.overall(rates, "cnn").set_index("variant")
    assert table.loc["minnen", "percent"] == pytest.approx(100 * (1 / 1.1 - 1)) and table.loc["cnn", "percent"] == 0
    pictures = same_transforms.by_picture(rates, "minnen", "cnn", 0.0035)
    assert len(pictures) == 24 and np.allclose(pictures["saving_percent"], 100 * (1 - 1 / 1.1))


def test_a_saving_that_follows_a_property_is_found(saved):
    path = saved / "results" / "serial-kodak.json"
    result = json.loads(path.read_text())
    for row in result["images"]:
        row["bpp"] *= 1 - 0.001 * int(row["image"][-2:])
    path.write_text(json.dumps(result))
    rates = same_transforms.saved_rates()
    numbers = pd.DataFrame([{"image": f"kodim{i:02d}", "number": i} for i in range(1, 25)])
    table = same_transforms.explained(rates, "serial", "minnen", numbers)
    percent = table[table["saving"] == "saving_percent"]
    assert np.allclose(percent["number"], 1) and len(table) == 2 * rates["lmbda"].nunique()


def test_a_bd_rate_says_the_same(saved):
    rates = same_transforms.saved_rates().groupby(["variant", "lmbda"])[["bpp", "psnr_db"]].mean()
    curves = [measured_curve(v, rates.loc[v].to_dict("records")) for v in ("cnn", "minnen")]
    assert compare(*curves).rate_percent == pytest.approx(10, abs=0.01)


def test_figure_and_comparison(saved):
    data = paper_data.same_transforms_data()
    figure = paper_figures.same_transforms(data)
    drawn = [line.get_ydata() for line in figure.axes[0].lines]
    assert any(np.allclose(y, 10) for y in drawn)
    (found,) = paper_data.same_transforms_comparison(data)
    assert found.published == 5.2 and found.ours == pytest.approx(0)
    (saved / "results" / "minnen-kodak.json").unlink()
    assert paper_data.same_transforms_data() is None


def test_missing_results_give_an_empty_table(tmp_path, monkeypatch):
    monkeypatch.setattr(same_transforms, "data_folder", lambda: tmp_path)
    assert len(same_transforms.saved_rates()) == 0


def test_repetition_equals_a_naive_one():
    torch.manual_seed(0)
    M, h, w = 3, 4, 6
    y = torch.randn(M, h, w)
    v = y - y.mean((1, 2), keepdim=True)
    sums, total = {"near": 0.0, "far": 0.0, "beyond": 0.0}, 0.0
    for r in range(1, h):
        for c in range(w):
            best = {"near": -1.0, "far": -1.0}
            seen = set()
            for r2 in range(h):
                for c2 in range(w):
                    if (r2, c2) >= (r, c):
                        continue
                    kind = "near" if max(abs(r - r2), abs(c - c2)) <= 2 else "far"
                    seen.add(kind)
                    best[kind] = max(best[kind], float(torch.cosine_similarity(v[:, r, c], v[:, r2, c2], dim=0)))
            if len(seen) == 2:
                weight = float(v[:, r, c].square().sum())
                total += weight
                best["beyond"] = max(0.0, best["far"] - best["near"])
                for name in sums:
                    sums[name] += weight * best[name]
    found = repetition.repetition(y)
    assert all(math.isclose(found[name], sums[name] / total, abs_tol=1e-5) for name in sums)


def test_what_repeats_far_away_is_seen():
    torch.manual_seed(0)
    tile = torch.randn(8, 4, 6)
    assert (
        repetition.repetition(tile.repeat(1, 4, 3))["beyond"]
        > 0.2
        > repetition.repetition(torch.zeros(8, 9, 9) + torch.randn(8, 1, 9))["beyond"]
    )


def test_who_gains_draws_every_picture(saved):
    table = same_transforms.by_picture(same_transforms.saved_rates(), "minnen", "cnn", 0.0035)
    figure = figures.who_gains(table, {"bpp": "bits per pixel"})
    assert len(figure.axes[0].collections[0].get_offsets()) == 24
