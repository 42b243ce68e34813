"""Writes the students' and the solution notebooks of the course from source/, runs the solutions, or packs what
students need: `make course`, `make course-run`, `make course-zip`.

A source is a lesson in jupytext's percent format: a Python file that JupyterLab opens as a notebook, too. Its cells
have tags. `exercise` (with three dots) stands only in the student's notebook, `solution` only in the solution. `hint`,
`check` and what has no tag stand in both. One cell has `parameters`.
"""

import hashlib
import re
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import jupytext
import nbformat

from entroformer_lib.files import replacing

COURSE = Path(__file__).parent
ROOT = COURSE.parents[1]
SOURCES = sorted((COURSE / "source").glob("[0-9]*.py"))
LEFT_OUT = {"student": {"solution"}, "solution": {"exercise"}}
METADATA = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


def read(source: Path) -> list[nbformat.NotebookNode]:
    """The cells of a lesson, all of them, each with its tags and no other metadata."""
    cells = jupytext.read(source).cells
    for cell in cells:
        cell.metadata = {"tags": cell.metadata.get("tags", [])}
    return cells


def tags_of(cell: nbformat.NotebookNode) -> set[str]:
    """The tags of a cell."""
    return set(cell.metadata["tags"])


def notebook(source: Path, kind: str) -> str:
    """A notebook as text.  kind: "student" or "solution" """
    cells, seen = [], set()
    for cell in read(source):
        tags = tags_of(cell)
        if tags & LEFT_OUT[kind]:
            continue
        if number := re.search(r'check\("(\d\.\d)"', cell.source) if "check" in tags else None:
            cell.metadata["nbgrader"] = graded(number[1])
        cell.id = hashlib.sha256(cell.source.encode()).hexdigest()[:12]
        assert cell.id not in seen, f"{source.name} has the same cell twice:\n{cell.source}"
        seen.add(cell.id)
        cells.append(cell)
    if kind == "solution":
        cells[0].source = cells[0].source.replace("\n", " (with solutions)\n", 1)
    whole = nbformat.v4.new_notebook(cells=cells, metadata=METADATA)
    nbformat.validate(whole)
    return nbformat.writes(whole) + "\n"


def graded(number: str) -> dict:
    """What nbgrader wants to know of a check: one point if it does not stop."""
    name = f"check-{number.replace('.', '-')}"
    return dict(grade=True, solution=False, task=False, locked=True, points=1, grade_id=name, schema_version=3)


def notebooks() -> dict[Path, str]:
    """All notebooks as they should be: {path: text}."""
    return {COURSE / kind / f"{s.stem}.ipynb": notebook(s, kind) for s in SOURCES for kind in LEFT_OUT}


def run(paths: list[Path]) -> None:
    """Runs notebooks whole; executed copies, with outputs, go to build/course."""
    import papermill

    executed = ROOT / "build" / "course"
    executed.mkdir(parents=True, exist_ok=True)
    for path in paths:
        start = time.perf_counter()
        papermill.execute_notebook(path, executed / path.name, cwd=executed, kernel_name="python3", progress_bar=False)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)


def packed() -> dict[str, bytes]:
    """What students get: {name in the archive: bytes}. The library lies beside the notebooks and needs no install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lessons = {path.name: text for path, text in notebooks().items() if path.parent.name == "student"}
    library = (ROOT / "entroformer_lib").rglob("*")
    files = [path for path in library if path.is_file() and "__pycache__" not in path.parts]
    files += [path for path in (ROOT / "data" / "reference").iterdir() if path.is_file()]
    for name in sorted(set(re.findall(r'load_model\(\\"([\w-]+)', "".join(lessons.values())))):
        files += [ROOT / "data" / "weights" / f"{name}{ending}" for ending in (".safetensors", ".md")]
    files += [path for path in (ROOT / "data" / "weights" / "shared").iterdir() if path.is_file()]
    members = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in sorted([*files, ROOT / "LICENSE"])}
    members |= {name: text.encode() for name, text in lessons.items()}
    members["README.md"] = (COURSE / "students.md").read_bytes()
    members["requirements.txt"] = "\n".join([*project["dependencies"], ""]).encode()
    return {f"entroformer-course/{name}": data for name, data in members.items()}


def pack(path: Path) -> None:
    """Writes the archive for students; the same files give the same bytes."""
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in packed().items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def main(words: list[str]) -> None:
    """`python notebooks/course/make_course.py [zip | run [a part of a lesson's name]]`"""
    if words == ["zip"]:
        return pack(ROOT / "dist" / "entroformer-course.zip")
    if words[:1] == ["run"]:
        solutions = sorted((COURSE / "solution").glob("[0-9]*.ipynb"))
        return run([path for path in solutions if "".join(words[1:]) in path.name])
    for path, text in notebooks().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    print(f"{len(SOURCES)} lessons, for students and with solutions, are in {COURSE}")


if __name__ == "__main__":
    main(sys.argv[1:])
