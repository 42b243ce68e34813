"""Every lesson runs; what is unsolved is said; the students' notebooks are those of the sources."""

import json
import os
import re
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from kernels import kernel

from notebooks.course import make_course

QUICK = {
    "1_bits_and_entropy": {"side": 64},
    "2_transforms_and_quantisation": {"side": 64, "steps": 2},
    "3_hyperprior": {"side": 128, "steps": 2},
    "4_context_models": {"side": 128, "steps": 2, "flips": 1},
    "5_attention": {"side": 128, "latents": 2},
    "6_research_project": {"steps": 2, "seeds": 2},
}
SOURCES = pytest.mark.parametrize("source", make_course.SOURCES, ids=lambda path: path.stem)


def test_every_lesson_is_run():
    assert QUICK.keys() == {path.stem for path in make_course.SOURCES}


def test_notebooks_are_those_of_the_sources():
    """`make course` would change nothing."""
    wanted = make_course.notebooks()
    there = {path for kind in make_course.LEFT_OUT for path in (make_course.COURSE / kind).glob("*.ipynb")}
    assert there == wanted.keys()
    for path, text in wanted.items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is old: run `make course`"


@SOURCES
def test_a_lesson_has_all_its_parts(source):
    cells = make_course.read(source)
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for part in ("can**", "## A picture first", "**A common mistake.**", "## To argue about", "## Further reading"):
        assert part in text
    kinds = [kind for cell in cells for kind in make_course.tags_of(cell) if kind != "parameters"]
    assert kinds == ["exercise", "solution", "hint", "check"] * (len(kinds) // 4) and len(kinds) >= 20
    for cell in cells:
        assert ("..." in cell.source) == ("exercise" in make_course.tags_of(cell)) or cell.cell_type == "markdown"


@SOURCES
def test_cells_are_short(source):
    code = [cell.source for cell in make_course.read(source) if cell.cell_type == "code"]
    assert statistics.median(len(text.splitlines()) for text in code) <= 6


@SOURCES
def test_a_student_gets_no_solution(source):
    solutions = [c.source for c in make_course.read(source) if "solution" in make_course.tags_of(c)]
    exercises = [c.source for c in make_course.read(source) if "exercise" in make_course.tags_of(c)]
    student, solution = (
        [c.source for c in make_course.nbformat.reads(make_course.notebook(source, kind), 4).cells]
        for kind in ("student", "solution")
    )
    assert not set(solutions) & set(student) and set(exercises) <= set(student)
    assert not set(exercises) & set(solution) and set(solutions) <= set(solution)


@pytest.mark.parametrize("solved", ["by the solution", "in another form"])
@SOURCES
def test_a_lesson_runs_and_every_unsolved_exercise_says_so(source, solved, tmp_path):
    """From top to bottom: each exercise first as the student finds it, when its check must speak, then solved. What a
    check takes as right must not stop the lesson later."""
    code = [cell for cell in make_course.read(source) if cell.cell_type == "code"]
    shown, environment = [], dict(os.environ)
    environment.pop("ENTROFORMER_DATA", None)

    def see(message: dict) -> None:
        shown.append(message["content"])

    with kernel(tmp_path, environment, tmp_path) as client:

        def run(cell) -> dict:
            quick = QUICK[source.stem] if "parameters" in make_course.tags_of(cell) else {}
            text = "\n".join([cell.source, *(f"{name} = {value}" for name, value in quick.items())])
            return client.execute_interactive(text, timeout=600, output_hook=see)["content"]

        for place, cell in enumerate(code):
            if "check" in make_course.tags_of(cell) and solved == "in another form":
                number, name = re.match(r'check\("(\d\.\d)", (\w+)\)$', cell.source).groups()
                cell.source = f"from test_teaching import RIGHT\n\n{name} = RIGHT['{number}'][1]\n{cell.source}"
            reply = run(cell)
            assert reply["status"] == "ok", "\n".join([cell.source, *reply["traceback"]])
            if "exercise" in make_course.tags_of(cell):
                check = next(c for c in code[place:] if "check" in make_course.tags_of(c))
                reply = run(check)
                number = check.source.partition('check("')[2][:3]
                assert reply["status"] == "error" and reply["ename"] == "Unsolved", check.source
                (sentence,) = reply["traceback"]  # one sentence, no page of a traceback
                assert sentence.startswith(f"Exercise {number} isn't solved yet: write ")
    said = "".join(content.get("text", "") for content in shown)
    assert "Warning" not in said
    assert said.count("is right.") == sum("check" in make_course.tags_of(cell) for cell in code)
    assert any("image/png" in content.get("data", ()) for content in shown)
    assert any("<details>" in content.get("data", {}).get("text/html", "") for content in shown)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The students' archive, opened: its folder."""
    archive = tmp_path_factory.mktemp("zip") / "course.zip"
    make_course.pack(archive)
    assert archive.stat().st_size < 30e6
    with zipfile.ZipFile(archive) as file:
        file.extractall(archive.parent)
    return archive.parent / "entroformer-course"


def test_the_archive_has_no_solutions(packed):
    assert sorted(path.stem for path in packed.glob("*.ipynb")) == sorted(path.stem for path in make_course.SOURCES)
    assert not any("solution" in path.name for path in packed.rglob("*"))
    for path in packed.glob("*.ipynb"):
        tags = {tag for cell in json.loads(path.read_text())["cells"] for tag in cell["metadata"]["tags"]}
        assert "exercise" in tags and "solution" not in tags


def test_the_archive_has_the_library_and_the_weights(packed):
    """A lesson's models load from it, and nothing is asked of the repository."""
    script = (
        "import entroformer_lib, sys; from entroformer_lib.teaching import lesson1, lesson2;"
        "assert 'compressai' not in sys.modules;"  # the one package that Windows must build
        "print(entroformer_lib.__file__); entroformer_lib.load_model('blocks-hyperprior@0.007')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    given = dict(cwd=packed, env=environment, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", script], **given)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parents[1] == packed
