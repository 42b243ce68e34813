"""What mkdocs publishes: the pages of `nav` and, again and again, what published pages link to.

Every file keeps its place in the repository, so links between pages that were written for the repository hold. Beside
the pages of website/pages there are: Markdown of the repository as it is; a notebook as a page, with the outputs that
`make figures` left in build/notebooks; a Python file as a page of code; `api/PART.md`, made of docstrings; what
build.py made; and any other file as it is.
"""

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File
from notebook_pages import WIDGETS, page_of
from pymdownx.slugs import slugify

import entroformer_lib

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "entroformer_lib"
LINK = re.compile(r'(?<=\]\()[^)\s]+(?=\))|(?<=href=")[^"]+(?=")|(?<=src=")[^"]+(?=")')
MADE = {"explorers": ROOT / "build" / "explorers", "entroformer-course.zip": ROOT / "dist" / "entroformer-course.zip"}


def on_config(config):
    """Headings get the anchors that GitHub gives them."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


@event_priority(100)  # before plugins look at the files
def on_files(files, config):
    """Adds all that is published to the files of website/pages."""
    waiting = [*_entries(config.nav), WIDGETS["plotly"]]
    for file in [*files]:
        if file.is_documentation_page():
            waiting += linked(file.src_uri, file.content_string)
    while waiting:
        if files.get_file_from_path(name := waiting.pop()):
            continue
        for file in files_of(name, config):
            files.append(file)
            if file.is_documentation_page():
                waiting += linked(file.src_uri, file.content_string)
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to notebooks, code and folders become links to their pages. Pages of code are not searched."""
    here = page.file.src_uri
    if (ROOT / here).with_suffix(".py").is_file():
        page.meta["search"] = {"exclude": True}
        return markdown

    def relative(link: re.Match) -> str:
        if not is_local(link[0]):
            return link[0]
        name, _, heading = link[0].partition("#")
        target = posixpath.relpath(published(here, name), posixpath.dirname(here) or ".")
        return f"{target}#{heading}" if heading else target

    return LINK.sub(relative, markdown).replace("<!-- names of the package -->", names_of_the_package())


def linked(page: str, text: str) -> list[str]:
    """Names of all that a page links to, as they are published."""
    return [published(page, target.partition("#")[0]) for target in LINK.findall(text) if is_local(target)]


def is_local(target: str) -> bool:
    """Whether a link names a file, and neither an address nor a heading of the same page."""
    return not re.match(r"[a-z]+:|#", target)


def published(page: str, link: str) -> str:
    """Under which name the target of a link is published."""
    name = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    if name == "README.md":  # on the site the front page stands in its place
        return "index.md"
    if (ROOT / name).is_dir():
        return f"{name}/README.md"
    return re.sub(r"\.(ipynb|py)$", ".md", name)


def files_of(name: str, config) -> list[File]:
    """A published file, and what comes with it. There is none for a name that does not exist: mkdocs then says so."""
    source, part = ROOT / name, name.partition("/")[0]
    if part in MADE:
        source = MADE[part].parent / name
    if name == WIDGETS["plotly"]:
        import plotly

        source = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    if source.is_file():
        return [File.generated(config, name, abs_src_path=str(source))]
    if part == "api":
        return [File.generated(config, name, content=api_page(Path(name).stem))]
    if (notebook := source.with_suffix(".ipynb")).is_file():
        folder = posixpath.dirname(name)
        text, outputs = page_of(notebook, posixpath.relpath(".", folder))
        return [
            File.generated(config, name, content=text),
            *(File.generated(config, f"{folder}/{key}", content=data) for key, data in outputs.items()),
        ]
    if (code := source.with_suffix(".py")).is_file():
        text = f"# `{code.relative_to(ROOT).as_posix()}`\n\n````python\n{code.read_text()}````\n"
        return [File.generated(config, name, content=text)]
    return []


def names_of_the_package() -> str:
    """Rows of a table: what `entroformer_lib` exports, with links to their docs."""
    homes = entroformer_lib._HOMES.items()
    return "\n".join(f"| [`{name}`][{home}.{name}] | {first_sentence(home, name)} |" for name, home in homes)


def first_sentence(module: str, name: str) -> str:
    """Of a docstring."""
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    node = next(node for node in tree.body if getattr(node, "name", None) == name)
    return ast.get_docstring(node).split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def api_page(part: str) -> str:
    """Markdown of one part of the library, from which mkdocstrings makes a page: its modules that define something."""
    modules = [LIBRARY / f"{part}.py"] if (LIBRARY / f"{part}.py").exists() else sorted((LIBRARY / part).glob("*.py"))
    text = [f"# {part}", ""]
    for path in modules:
        if any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.parse(path.read_text()).body):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            text += [f"::: {name}", ""]
    return "\n".join(text)


def _entries(nav) -> list[str]:
    """The pages in `nav`."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in _entries(part)]
