"""An executed notebook as a page of Markdown, and its pictures."""

import re
from pathlib import Path

import nbformat
import plotly.io
from latex2mathml.converter import convert
from nbconvert import MarkdownExporter

EXECUTED = Path(__file__).parents[1] / "build" / "notebooks"
WIDGETS = {
    "plotly": "vendor/plotly.min.js",
    "sentence": "*In JupyterLab a widget stands here, which asks the model. What needs no Python: "
    "[pages of the explorer]({root}/explorers.md).*",
}


def page_of(path: Path, root: str) -> tuple[str, dict[str, bytes]]:
    """The page, and the files that it shows, which stand beside it: {name: bytes}.

    Args:
        path: of the notebook in the repository. Its executed copy is taken where there is one.
        root: the way from the page to the root of the site.
    """
    executed = EXECUTED / path.name
    notebook = nbformat.read(executed if executed.exists() else path, as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}
    files: dict[str, bytes] = {}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            cell.source = with_formulas(cell.source)
        elif cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
            for output in cell.outputs:
                _without_widgets(output, f"{path.stem}_{number}.html", root, files)
    text, resources = MarkdownExporter().from_notebook_node(notebook, {"unique_key": path.stem})
    return with_alternatives(text), files | resources["outputs"]


def with_alternatives(text: str) -> str:
    """Pictures and frames are named after the heading above them, for those who do not see them."""
    lines, heading = text.split("\n"), "Figure"
    for number, line in enumerate(lines):
        if found := re.match(r"#+ (.*)", line):
            heading = re.sub(r"[\[\]\"<>]", "", found[1])
        for kind in ("png", "jpeg"):
            line = line.replace(f"![{kind}]", f"![Figure of: {heading}]")
        lines[number] = line.replace('<iframe class="figure"', f'<iframe class="figure" title="{heading}"')
    return "\n".join(lines)


def _is_progress(output) -> bool:
    """A progress bar, as text or as a widget."""
    return output.get("name") == "stderr" or "%|" in output.get("data", {}).get("text/plain", "")


def _without_widgets(output, name: str, root: str, files: dict[str, bytes]) -> None:
    """A plotly figure becomes a page in a frame, a widget a sentence."""
    data = output.get("data", {})
    if figure := data.get("application/vnd.plotly.v1+json"):
        height = figure.get("layout", {}).get("height", 450)
        page = plotly.io.to_html(figure, include_plotlyjs=f"{root}/{WIDGETS['plotly']}", validate=False)
        files[name] = page.encode()
        output.data = {"text/html": f'<iframe class="figure" src="{name}" height="{height + 20}"></iframe>'}
    elif "application/vnd.jupyter.widget-view+json" in data:
        output.data = {"text/markdown": WIDGETS["sentence"].format(root=root)}


def with_formulas(text: str) -> str:
    """LaTeX between dollars becomes MathML, which browsers draw without a script."""
    text = re.sub(r"\$\$(.+?)\$\$", lambda found: convert(found[1], display="block"), text, flags=re.S)
    return re.sub(r"\$([^$\n]+)\$", lambda found: convert(found[1]), text)
