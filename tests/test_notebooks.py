"""Every notebook runs from top to bottom in a kernel of its own, and writes the figures it should."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
import warm
from conftest import VARIANTS, micro_model
from kernels import kernel
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from entroformer_lib.errors import UserError
from entroformer_lib.weights.zoo import save_weights

ROOT = Path(__file__).parents[1]
RUN_ALL = ROOT / "notebooks" / "run_all.py"
# Parameters that make a notebook quick, or that its reader is asked to change; what is not here runs as it is.
PARAMETERS: dict[str, dict] = {
    "00_quickstart": {"picture": "rocket"},
    "01_train": {"steps": 5},
    "02_position_masking": {"side": 5, "crop": 128},
    "05_ablations": {"steps": 2},
}


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path):
    notebook, shown = load_notebook_node(str(path)), []
    notebook = parameterize_notebook(notebook, PARAMETERS.get(path.stem, {}))

    def see(message: dict) -> None:
        shown.extend(message["content"].get("data", ()))

    environment = {**os.environ, "ENTROFORMER_FIGURES": str(tmp_path / "figures")}
    environment.pop("ENTROFORMER_DATA", None)  # a reader may have no more than the sample pictures
    with kernel(tmp_path, environment, ROOT) as client:
        for cell in notebook.cells:
            if cell.cell_type == "code":
                reply = client.execute_interactive(cell.source, timeout=600, output_hook=see)["content"]
                assert reply["status"] == "ok", "\n".join([cell.source, *reply["traceback"]])
    assert list((tmp_path / "figures").glob("*.png"))
    assert "image/png" in shown  # the reader sees a figure


# ---- other models than the notebook's own: the cells alone, without a kernel ----


def run_cells(name: str, *parts: str, **parameters) -> None:
    """Runs of a notebook's code cells the parameters, the imports, and those that have one of the parts in them."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    first, second, *others = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    names: dict = {}
    exec(first, names)
    assert parameters.keys() <= names.keys()
    names |= parameters
    for source in (second, *(source for source in others if any(part in source for part in parts))):
        exec(source, names)


@pytest.fixture
def listed(tmp_path, monkeypatch, photo):
    """Gives a micro model of a variant as one that is listed, and a picture to look at."""
    monkeypatch.setenv("ENTROFORMER_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("ENTROFORMER_FIGURES", str(tmp_path / "figures"))
    photo.save(tmp_path / "photo.png")

    def make(variant: str) -> dict:
        save_weights(micro_model(variant), tmp_path / "mine.safetensors", {})
        return {"picture": str(tmp_path / "photo.png"), "model": "mine"}

    return make


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_quickstart_takes_every_model(variant, listed, capsys):
    run_cells("00_quickstart", "load_model(", "rd.bit_maps", "share", "first_slice", "card", **listed(variant))
    said = capsys.readouterr().out
    assert "y: " in said and ("z: " in said) == (variant != "context")
    assert ("second pass" in said) == (variant == "parallel") != ("Only parallel models" in said)


TAKEN = {  # by which notebook, with the cells that look at the model
    "02_position_masking": (
        ("pm.run(", "pm.run_alone(", "distance_fits"),
        ("serial", "parallel", "context", "cnn", "minnen"),
    ),
    "03_attention_maps": (("RowServer(",), ("serial", "parallel", "context")),
    "07_groupedmixer": (("maps = GroupServer(", "maps.cross"), ("groupedmixer",)),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", TAKEN)
def test_other_models_are_taken_or_refused_in_a_sentence(name, variant, listed):
    parts, taken = TAKEN[name]
    size = {"side": 3, "crop": 96} if name == "02_position_masking" else {}
    if variant in taken:
        run_cells(name, *parts, **listed(variant), **size)
    else:
        with pytest.raises(UserError, match=r"^[A-Z][^\n]*\.$"):
            run_cells(name, *parts, **listed(variant), **size)


@pytest.mark.parametrize("ours", ["blocks-parallel@0.014", "jpeg"])
def test_rate_and_distortion_take_models_of_one_rate_and_of_many(ours, listed):
    run_cells("04_rate_distortion", "saved.kodak_means()", "at_one_rate =", ours=ours)
    with pytest.raises(AssertionError, match="no saved result of nosuch; there are"):
        run_cells("04_rate_distortion", "saved.kodak_means()", ours="nosuch")


def test_a_groupedmixer_at_any_lambda():
    run_cells("07_groupedmixer", "maps = GroupServer(", model="blocks-groupedmixer@0.014")


def execute(path: str, folder: str) -> None:
    """One notebook as `make figures` runs it."""
    spec = importlib.util.spec_from_file_location("run_all", RUN_ALL)
    run_all = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run_all)
    run_all.EXECUTED = Path(folder)
    _, wrong = run_all.execute(Path(path), 1)
    sys.exit(wrong)


def test_notebooks_that_start_at_once_have_kernels_of_their_own(tmp_path):
    """And leave no sockets behind."""
    before, running = set(ROOT.iterdir()), []
    for number in range(3):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"print({number} * 7)")])
        nbformat.write(notebook, tmp_path / f"{number}.ipynb")
        words = (execute, str(tmp_path / f"{number}.ipynb"), str(tmp_path / "done"))
        (tmp_path / "done").mkdir(exist_ok=True)
        running.append(warm.start(*words, output=tmp_path / f"{number}.txt"))
    for number, process in enumerate(running):
        process.join(120)
        assert process.exitcode == 0, (tmp_path / f"{number}.txt").read_text()
        done = nbformat.read(tmp_path / "done" / f"{number}.ipynb", as_version=4)
        assert done.cells[0].outputs[0].text == f"{number * 7}\n"
    assert not [path for path in set(ROOT.iterdir()) - before if path.name.startswith("kernel")]
