"""The explorer's JavaScript as one module: the files of `js/`, the ones that others import first.

The files are ordinary ES modules that import from each other by name. A widget and an offline page take one module, so
their imports and the word `export` go, and what is left stands in one scope.
"""

import re
from pathlib import Path

FOLDER = Path(__file__).with_name("js")
STYLE = FOLDER / "explorer.css"
SHARED = (
    *("words.js", "drawing.js", "selection.js", "numbers.js", "decoding.js", "tour.js", "keeping.js", "sheet.js"),
    *("zoom.js", "controls.js", "answers.js", "explorer.js"),
)
IMPORT = re.compile(r'^import [^;]*? from "\./[\w.]+";\n', re.M)


def script(*sources: str) -> str:
    """The explorer and some of its sources as one module; by default the widget's.

    sources: files of `js/`, such as `stored.js`.
    """
    names = (*SHARED, *(sources or ("widget.js",)))
    parts = [IMPORT.sub("", (FOLDER / name).read_text("utf-8")) for name in names]
    return "\n".join(re.sub(r"^export (?!default)", "", part, flags=re.M) for part in parts)
