"""Entropy models behind the same transforms, and what explains their differences."""

import json
import math

import numpy as np
import pytest
import torch

from benchmarks.repetition import repetition
from entroformer_lib.studies import results, same_transforms
from entroformer_lib.studies.bd import compare, curve_of
from entroformer_lib.studies.measuring import about
from entroformer_lib.views import figures, rate_figures


@pytest.fixture
def saved(results_folder):
    """Results of three variants, of which the second needs 10% more and the third as much as the first."""
    original = json.loads((results_folder.parents[1] / "original.json").read_text())["images"]
    for variant, factor in (("serial", 1.0), ("minnen", 1.0), ("cnn", 1.1)):
        rows = [{**row, "bpp": factor * row["bpp"]} for row in original]
        result = {"images": rows, "transforms": same_transforms.FAMILY, "variant": variant}
        (results_folder / f"{variant}-kodak.json").write_text(json.dumps(result))
    (results_folder / "other-kodak.json").write_text(json.dumps({"images": original}))
    return results_folder


@pytest.fixture(autouse=True)
def _original(tmp_path):
    """A real result, kept before another folder is read."""
    (tmp_path / "original.json").write_text(results.result_path("blocks-parallel-kodak").read_text())


def test_rates_are_divided_at_equal_pictures(saved):
    rates = same_transforms.saved_rates()
    assert list(rates["variant"].unique()) == ["minnen", "cnn", "serial"]  # in the order of LABELS, and no other
    each = same_transforms.against(rates, "minnen").groupby("variant")["percent"]
    assert np.allclose(each.min(), each.max())
    assert each.mean()["cnn"] == pytest.approx(10) and each.mean()["serial"] == pytest.approx(0)
    table = same_transforms.overall(rates, "cnn").set_index("variant")
    assert table.loc["minnen", "percent"] == pytest.approx(100 * (1 / 1.1 - 1)) and table.loc["cnn", "percent"] == 0


def test_a_bd_rate_says_the_same(saved):
    points = results.kodak_means()
    assert compare(curve_of(points, "cnn"), curve_of(points, "minnen")).rate_percent == pytest.approx(10, abs=0.01)


def test_figure(saved):
    data = rate_figures.same_transforms_data()
    figure = rate_figures.same_transforms(data)
    drawn = [np.asarray(line.get_ydata(), float) for line in figure.axes[0].lines]
    assert any(np.allclose(y, 10) for y in drawn)
    ours = lambda: set(rate_figures.codecs_data(("JPEG",), "JPEG").query("source.isna()")["codec"])  # noqa: E731
    assert ours() == {"other"}  # the one outside the family
    (saved / "other-kodak.json").unlink()
    assert ours() == {"serial"}  # there are no others, and CNNs are not drawn beside a transformer
    other = json.loads((saved / "cnn-kodak.json").read_text()) | {"variant": "serial-cnn"}
    (saved / "own-kodak.json").write_text(json.dumps(other))  # a kind without a name in the figures comes last
    assert list(same_transforms.saved_rates()["variant"].unique())[-1] == "serial-cnn"
    assert "serial-cnn" in list(rate_figures.same_transforms_data()["label"])
    rate_figures.same_transforms(rate_figures.same_transforms_data())
    (saved / "minnen-kodak.json").unlink()
    with pytest.raises(results.NoResult):
        rate_figures.same_transforms_data()


def test_a_card_says_whether_a_model_stands_alone():
    card = {"training": {"transforms": "blocks"}, "metric": "mse"}
    assert about(card, "serial")["transforms"] == "blocks"
    assert about({**card, "family": False}, "serial")["transforms"] is None
    assert about({**card, "kind": "groupedmixer-32"}, "groupedmixer")["variant"] == "groupedmixer-32"


def test_missing_results_give_an_empty_table(results_folder):
    assert len(same_transforms.saved_rates()) == 0 and len(results.kodak_means()) == 0


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
    found = repetition(y)
    assert all(math.isclose(found[name], sums[name] / total, abs_tol=1e-5) for name in sums)


def test_what_repeats_far_away_is_seen():
    torch.manual_seed(0)
    tiles, rows = torch.randn(8, 4, 6).repeat(1, 4, 3), torch.zeros(8, 9, 9) + torch.randn(8, 1, 9)
    assert repetition(tiles)["beyond"] > 0.2 > repetition(rows)["beyond"]


def test_every_picture_is_drawn_and_named():
    rows = results.kodak()
    rows = rows[(rows["codec"] == "blocks-parallel") & (rows["setting"] == 0.0035)]
    rows = rows.assign(gain=rows["psnr_db"] - rows["jpeg_optimised_psnr_db"])
    figure = figures.by_picture(rows, "gain", "above JPEG, dB", {"bpp": "bits per pixel", "ms_ssim": "MS-SSIM"})
    for ax, column in zip(figure.axes, ("bpp", "ms_ssim"), strict=True):
        assert np.array_equal(ax.collections[0].get_offsets(), rows[[column, "gain"]])
        assert [text.get_text() for text in ax.texts] == [f"{i:02}" for i in range(1, 25)]
        boxes = [text.get_window_extent() for text in ax.texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
