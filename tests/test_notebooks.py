"""Every notebook runs from top to bottom in a kernel of its own, and writes the figures it should."""

import json
from pathlib import Path

import papermill
import pytest

ROOT = Path(__file__).parents[1]
# Parameters that make a notebook quick, or that its reader is asked to change; what is not here runs as it is.
PARAMETERS: dict[str, dict] = {
    "00_quickstart": {"picture": "rocket"},
    "01_train": {"steps": 30},
    "05_ablations": {"steps": 8},
}


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("ENTROFORMER_FIGURES", str(tmp_path / "figures"))
    papermill.execute_notebook(
        path, tmp_path / path.name, PARAMETERS.get(path.stem, {}), cwd=ROOT, kernel_name="python3", progress_bar=False
    )
    assert list((tmp_path / "figures").glob("*.png"))
    cells = json.loads((tmp_path / path.name).read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)  # the reader sees a figure
