"""The house rules that a machine can check."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "entroformer_lib"
COURSE = ROOT / "notebooks" / "course"  # its lessons may define small classes and training loops
NOTEBOOKS = [p for p in sorted((ROOT / "notebooks").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


def test_environment_agrees_with_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = set(project["dependencies"]) | set(project["optional-dependencies"]["dev"])
    listed = set(re.findall(r"^      - (?!-e)(.+)$", (ROOT / "environment.yml").read_text(), re.M))
    assert listed == ours
    import entroformer_lib

    assert project["version"] == entroformer_lib.__version__


def test_the_lock_holds_every_dependency_in_a_version_that_may_be():
    """And nothing that comes from elsewhere than a package index."""
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    locked = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)]), text


@pytest.mark.parametrize("module", ["entroformer_lib", "entroformer_lib.cli"])
def test_import_is_quick(module):
    """Importing the library, or asking for --help, loads none of the packages that take seconds."""
    code = f"import sys, {module}; print({{'torch', 'compressai', 'numpy', 'PIL', 'lightning'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports, as `part.module`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports by dots"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("entroformer_lib.") for name in names if name.startswith("entroformer_lib.")}


# Each part uses only what stands above it.
ORDER = (
    ("errors", "fields", "files", "memory", "stages", "rangecoder", "datasets", "cluster"),
    ("models",),
    ("tiles",),
    ("exact",),
    ("sparse_attention",),
    ("entroformer",),
    ("weights",),
    ("onnx_export",),
    ("codec",),
    ("training",),
    ("inspection",),
    ("studies",),
    ("views",),
    ("explorer",),
    ("teaching",),
)


def test_every_part_has_its_place_in_the_order():
    parts = {path.stem for path in LIBRARY.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__", "__main__", "cli"} == {name for row in ORDER for name in row}


@pytest.mark.parametrize("level", range(len(ORDER)), ids=lambda i: ORDER[i][0])
def test_imports_point_upwards(level):
    may = {name for parts in ORDER[: level + 1] for name in parts} | {"__init__", "__version__"}
    for part in ORDER[level]:
        paths = [LIBRARY / f"{part}.py"] if (LIBRARY / f"{part}.py").exists() else (LIBRARY / part).rglob("*.py")
        for path in paths:
            for module in imports_of(path):
                assert module.partition(".")[0] in may, f"{path.name} imports {module}"


def test_models_know_nothing_of_ours_but_errors_and_fields():
    for path in (LIBRARY / "models").glob("*.py"):
        assert {m.partition(".")[0] for m in imports_of(path)} <= {"models", "errors", "fields"}, path.name


def test_coder_knows_no_network():
    assert "torch" not in (LIBRARY / "rangecoder.py").read_text()


def test_every_public_thing_has_a_docstring():
    for path in LIBRARY.rglob("*.py"):
        tree = ast.parse(path.read_text())
        if path.name != "__init__.py":
            assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_notebooks_are_thin(path):
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in code) == 1
    for cell in code:
        source = "".join(cell["source"])
        assert cell["outputs"] == [] and cell["execution_count"] is None
        assert len(source.splitlines()) <= 25
        if COURSE not in path.parents:
            assert not re.search(r"^\s*(class |@)", source, re.M) and ".backward(" not in source
    assert notebook["cells"][0]["cell_type"] == "markdown"


def test_figures_come_from_make_figures_alone():
    """Every committed figure is one that a notebook saves by name, one of the paper's, or the README's."""
    from entroformer_lib.views.paper import ITEMS

    saved = set(re.findall(r'style\.save\(\w+, \\"(\w+)\\"', "".join(p.read_text() for p in NOTEBOOKS)))
    saved |= {item.name for item in ITEMS}
    assert {p.stem for p in (ROOT / "figures").iterdir() if p.suffix in (".png", ".svg", ".csv")} <= saved | {
        "overview"
    }


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("figures/*.md"), *ROOT.glob("data/**/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Links to files of the repository, and to headings of pages."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, heading = target.partition("#")
        if "://" in name:
            continue
        path = page.parent / name if name else page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_numbers_on_pages_are_those_of_the_results():
    """`python benchmarks/readme.py` would change nothing."""
    from benchmarks.readme import PAGES, filled

    for page in PAGES:
        assert filled(page.read_text()) == page.read_text(), page.name


def test_saved_results_are_listed_and_written_as_csv():
    """`python benchmarks/tables.py` would change nothing."""
    from benchmarks.tables import RESULTS, index, tables

    assert index() == (RESULTS / "README.md").read_text()
    for name, table in tables().items():
        assert (RESULTS / name).read_text() == table.to_csv(index=False, float_format="%.6g"), f"{name}: make figures"


def test_those_who_cite_find_one_version():
    import entroformer_lib

    cited = dict(re.findall(r"^(version|title|license): \"?(.+?)\"?$", (ROOT / "CITATION.cff").read_text(), re.M))
    deposited = json.loads((ROOT / ".zenodo.json").read_text())
    assert cited == {name: deposited[name] for name in ("version", "title", "license")}
    assert cited["version"] == entroformer_lib.__version__


def test_cards_and_results_belong_to_the_shipped_weights():
    """A card's Kodak numbers are those of the saved result, and the result was measured with these very weights."""
    from entroformer_lib.weights.zoo import load_model, weights_digest

    for path in (ROOT / "data" / "weights").glob("*.safetensors"):
        result = json.loads((ROOT / "data" / "results" / f"{path.stem}-kodak.json").read_text())
        model = load_model(path, "cpu")
        lmbdas = [f"{lmbda:g}" for lmbda in model.card.get("measured_at") or model.config.lmbdas]
        assert result["provenance"]["weights_sha256"] == weights_digest(model).hex()
        assert len(result["images"]) == 24 * max(1, len(lmbdas))
        card = path.with_suffix(".md").read_text()
        for mean, kept in [(result["mean"][v], model.card["kodak"][v]) for v in lmbdas] or [
            (result["mean"], model.card["kodak"])
        ]:
            assert kept["psnr_db"] == mean["psnr_db"] and f"**{mean['psnr_db']:.2f}**" in card


def test_shipped_weights_stay_small():
    assert sum(path.stat().st_size for path in (ROOT / "data" / "weights").rglob("*.safetensors")) < 60e6
