"""The comparison of recipes goes on over several days."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import recipe


def finished(folder: Path, steps: int, rd_loss: float) -> None:
    """What a finished run leaves."""
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").touch()
    (folder / "config.json").write_text(json.dumps({"steps": steps, "precision": "float32"}))
    rows = [{"step": 1}, {"step": steps, "held_out": [{"rd_loss": rd_loss}, {"rd_loss": 2 * rd_loss}]}]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_of_another_day_stay(tmp_path):
    """A second day on a machine of half the speed: the same steps per minute, and the first day's base."""
    out, first, second = tmp_path / "recipe.json", tmp_path / "first", tmp_path / "second"
    finished(first / "base", 3000, rd_loss=1.0)
    finished(first / "M-=-256", 3100, rd_loss=1.1)
    (first / "times.json").write_text(json.dumps({"base": 600.0, "M = 256": 580.0, "8 crops": 250.0}))
    recipe.result(first, out)
    finished(second / "M-=-384", 2900, rd_loss=0.9)
    (second / "times.json").write_text(json.dumps({"base": 1200.0, "M = 384": 1240.0}))
    recipe.result(second, out)
    saved = json.loads(out.read_text())
    assert {row["row"]: row["steps"] for row in saved["rows"]} == {"base": 3000, "M = 256": 3100, "M = 384": 2900}
    assert {row["precision"] for row in saved["rows"]} == {"float32"}
    percent = {row["row"]: row["percent"] for row in saved["rows"]}
    assert percent == {"base": 0, "M = 256": pytest.approx(10), "M = 384": pytest.approx(-10)}
    assert saved["step_ms"] == {"base": 600, "M = 256": 580, "8 crops": 250, "M = 384": 620}
    assert len(saved["earlier"]) == 1
    assert math.isclose(recipe.score(saved["rows"][0]["points"]), math.log(2) / 2)
