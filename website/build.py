"""Builds the site into site/: `make site`.

Notebooks come with the outputs that `make figures` left in build/notebooks. While writing pages,
`mkdocs serve -f website/mkdocs.yml` shows them at once, with the explorer's pages of the last `make site`.
"""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
from PIL import ImageOps

from entroformer_lib import cli
from entroformer_lib.datasets import sample_picture
from website.links import broken

WEBSITE = Path(__file__).parent
ROOT = WEBSITE.parent
SITE = ROOT / "site"
EXPLORERS = ROOT / "build" / "explorers"
PICTURES = ("coffee", "astronaut", "rocket")
MODELS = ("blocks-parallel", "blocks-serial", "blocks-groupedmixer")
SIDE = 512  # pixels of the longer side: pages of a few MB


def main() -> int:
    """Exit code 1 where the site cannot be built, or a link in it leads nowhere."""
    notebooks = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    if old := [path.name for path in notebooks if not is_executed(path, ROOT / "build" / "notebooks" / path.name)]:
        print(f"build/notebooks does not have {', '.join(old)} as it stands now: run make figures first.")
        return 1
    write_explorers()
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", str(WEBSITE / "mkdocs.yml")]
    if code := subprocess.run(mkdocs, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}).returncode:
        return code
    wrong = list(broken(SITE))
    for sentence in wrong:
        print(sentence)
    pages, size = len(list(SITE.rglob("*.html"))), sum(path.stat().st_size for path in SITE.rglob("*"))
    print(f"{SITE}: {pages} pages, {size / 1e6:.0f} MB, {len(wrong)} broken links; open {SITE / 'index.html'}")
    return int(bool(wrong))


def is_executed(notebook: Path, executed: Path) -> bool:
    """Whether there is an executed copy with the cells that the notebook has now."""
    if not executed.exists():
        return False
    now, then = (nbformat.read(path, as_version=4).cells for path in (notebook, executed))
    return [cell.source for cell in now] == [cell.source for cell in then]


def write_explorers() -> None:
    """The explorer's pages, as `entroformer explore` writes them, and their pictures."""
    EXPLORERS.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        picture = sample_picture(name)
        picture.thumbnail((SIDE, SIDE))
        picture = ImageOps.fit(picture, [side // 64 * 64 for side in picture.size])  # what needs no padding
        picture.save(EXPLORERS / f"{name}.png")
        picture.thumbnail((SIDE // 2, SIDE // 2))
        picture.save(EXPLORERS / f"{name}.webp")
        for model in MODELS:
            page = EXPLORERS / f"{name}-{model}.html"
            cli.explore(EXPLORERS / f"{name}.png", output=page, model=model, force=True)
    cli.explore(output=EXPLORERS / "live.html", live=True, force=True)


if __name__ == "__main__":
    sys.exit(main())
