"""A finished run becomes a shipped model: its card is written from what was measured, its curve from the log."""

import json
from pathlib import Path

import pytest
from conftest import micro_model

from benchmarks.publish import CURVE_POINTS, card_text, kmac_per_pixel, means, training_curve
from entroformer_lib.weights.zoo import load_model

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "data" / "weights").glob("*.safetensors")), ids=lambda path: path.stem)
def test_every_card_is_written_from_the_saved_result(path):
    saved = json.loads((ROOT / "data" / "results" / f"{path.stem}-kodak.json").read_text())
    assert path.with_suffix(".md").read_text() == card_text(path.stem, load_model(path, "cpu").card, saved["images"])
    points = means(saved["images"]).to_dict("records")
    published = [saved["mean"]] if "bpp" in saved["mean"] else list(saved["mean"].values())
    for point, mean in zip(points, published, strict=True):
        assert {name: point[name] for name in mean} == pytest.approx(mean)


def test_the_curve_is_the_log_in_few_points(tmp_path):
    rows = [
        {"step": step, "seconds": 6.0 * step, "lmbda": None, "rd_loss": 1.0 / step, "bpp": 2.0}
        for step in range(1, 601)
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = training_curve(tmp_path / "log.jsonl")
    assert len(curve) == CURVE_POINTS and [point["step"] for point in curve] == list(range(10, 601, 10))
    expected = sum(row["rd_loss"] for row in rows[:10]) / 10
    assert json.loads(json.dumps(curve))[0] == {
        "step": 10, "minutes": 1.0, "lmbda": None, "rd_loss": round(expected, 4), "bpp": 2.0
    }  # fmt: skip


def test_multiplications_are_those_that_the_layers_need():
    N, M, count = 24, 20, 3
    model = micro_model("parallel", transforms="blocks", stages=((8, N, count),), linear_path="dct", M=M)
    at_eighth, at_sixteenth = 192 * N + count * (5 * N**2 + 9 * N), 4 * N * M + 768 * M  # a site
    expected = (at_eighth / 8**2 + at_sixteenth / 16**2) / 1e3
    counted = kmac_per_pixel(model)
    assert counted["g_a"] == counted["g_s"] == pytest.approx(expected, abs=0.051)
    assert counted["rest"] > 0
