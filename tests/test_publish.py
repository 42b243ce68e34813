"""A finished run becomes a shipped model: its card is written from what was measured, its curve from the log."""

import json
from pathlib import Path

import pytest

from benchmarks.publish import CURVE_POINTS, card_text, means, training_curve
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
