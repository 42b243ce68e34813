"""The site: no page is forgotten, and links that lead nowhere are found. `make site` builds it whole."""

import json
import re
from pathlib import Path

import pytest

import entroformer_lib
from website.build import is_executed
from website.links import broken

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "entroformer_lib"
NAMED = set(re.findall(r"[\w/.-]+\.md$", (ROOT / "website" / "mkdocs.yml").read_text(), re.M))
# Parts whose functions are called by other parts alone.
INTERNAL = {
    "__init__",
    "__main__",
    "cli",
    "cluster",
    "exact",
    "explorer",
    "fields",
    "files",
    "memory",
    "rangecoder",
    "stages",
}
INTERNAL |= {"rangecoder", "sparse_attention", "stages", "teaching", "tiles"}


def test_every_page_and_notebook_is_in_the_navigation():
    pages = [*ROOT.glob("docs/*.md"), ROOT / "figures" / "README.md", ROOT / "data" / "results" / "README.md"]
    notebooks = [*ROOT.glob("notebooks/[0-9]*.ipynb"), *ROOT.glob("notebooks/course/student/*.ipynb")]
    wanted = {path.relative_to(ROOT).with_suffix(".md").as_posix() for path in [*pages, *notebooks]}
    wanted |= {path.name for path in ROOT.glob("website/pages/*.md")}
    assert wanted - NAMED == set()
    assert not any("solution" in page for page in NAMED)


def test_every_part_of_the_library_is_in_the_api_or_internal():
    parts = {path.stem for path in LIBRARY.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    in_api = {page.removeprefix("api/")[:-3] for page in NAMED if page.startswith("api/")} - {"index"}
    assert in_api | INTERNAL == parts and in_api & INTERNAL == set()
    assert {home.split(".")[1] for home in entroformer_lib._HOMES.values()} <= in_api


def test_links_that_lead_nowhere_are_found(tmp_path):
    page = '<h1 id="top-k">k</h1><a href="{}">a</a><img src="{}">'
    (tmp_path / "folder").mkdir()
    (tmp_path / "x y.png").touch()
    (tmp_path / "index.html").write_text(page.format("folder/b.html#top-k", "x%20y.png"))
    (tmp_path / "folder" / "b.html").write_text(page.format("..", "data:image/png;base64,"))
    (tmp_path / "404.html").write_text(page.format("/folder/b.html#", "/x%20y.png"))
    assert list(broken(tmp_path)) == []
    (tmp_path / "folder" / "b.html").write_text(page.format("../index.html#gone", "y.png"))
    (tmp_path / "404.html").write_text(page.format("https://example.org", "https://example.org/x.png"))
    assert list(broken(tmp_path)) == [
        "404.html would fetch https://example.org/x.png from the network.",
        "folder/b.html links to ../index.html#gone, but index.html has no such heading.",
        "folder/b.html links to y.png, which does not exist.",
    ]


@pytest.mark.parametrize(("change", "still"), [({}, True), ({"source": "x = 2"}, False)], ids=["same", "edited"])
def test_an_executed_copy_of_an_older_notebook_is_not_taken(tmp_path, change, still):
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None, "source": "x = 1"}
    then, now = tmp_path / "then.ipynb", tmp_path / "now.ipynb"
    assert not is_executed(now, then)
    for path, changed in ((then, {"execution_count": 1}), (now, change)):
        whole = {"cells": [cell | changed], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        path.write_text(json.dumps(whole))
    assert is_executed(now, then) is still
