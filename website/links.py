"""Finds links of a built site that lead nowhere, and for what a page would fetch from elsewhere. It asks no network."""

import os
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Targets(HTMLParser):
    """Of one page: `anchors`, `links` to follow and files that are `loaded` with it."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors, self.links, self.loaded = {"", "top"}, [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Collects what a tag names."""
        found = {name: value or "" for name, value in attributes}
        self.anchors |= {found.get("id", ""), found.get("name", "") if tag == "a" else ""}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") != "canonical" or "src" in found:
            self.loaded.append(found["href"] if tag == "link" else found["src"])


def broken(site: Path) -> Iterator[str]:
    """One sentence for each link that leads nowhere."""
    targets = cache(Targets)
    for page in sorted(site.rglob("*.html")):
        name, found = page.relative_to(site), targets(page)
        for link in dict.fromkeys([*found.links, *found.loaded]):
            url = urlsplit(link)
            if url.scheme or url.netloc:
                if link in found.loaded and url.scheme not in ("data", "blob"):
                    yield f"{name} would fetch {link} from the network."
                continue
            base = site if url.path.startswith("/") else page.parent
            to = Path(os.path.normpath(base / unquote(url.path).lstrip("/"))) if url.path else page
            to = to / "index.html" if to.is_dir() else to
            if not to.is_file() or not to.is_relative_to(site):
                yield f"{name} links to {link}, which does not exist."
            elif to.suffix == ".html" and unquote(url.fragment) not in targets(to).anchors:
                yield f"{name} links to {link}, but {to.name} has no such heading."
