"""The attention explorer as one HTML file that works offline: the script, the picture, and precomputed rows as bytes.

Top-k attention is sparse, so with the model's own k the page holds the rows of every latent, layer and head. Other k,
dense attention and the measured costs are held for latents on a coarser lattice. An attention p is stored as the byte
round(255 sqrt(p)), so small values keep their digits.

Layout of the data, before gzip and base64; every block starts at a multiple of 8, `meta` says where. For each k
(a section): facts float32 [sites, 2 + 5 groups] (see `RowServer.many`), and either dense uint8 [sites, layers, heads,
n], or counts uint16 [sites, layers, heads] with positions uint16 and bytes uint8 of all counted entries in that order.
Costs: counts uint16 [sites], positions uint16, bits float32.

Of a GroupedMixer: one section, with k = 0 for none, of all queries instead of sites (site by site, in each its channel
slices), stored as counts, positions and bytes; no costs; and `cross` uint8 [places, layers, heads, G, G].
"""

import base64
import gzip
import html
import json
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from string import Template

import numpy as np

from entroformer_lib import __version__
from entroformer_lib.errors import AttentionError
from entroformer_lib.explorer.widget import SCRIPT, meta_of
from entroformer_lib.inspection.exploration import DENSE, Exploration, grouped, k_in_words, own_k

LARGEST_PAGE = 25_000_000  # bytes
LARGEST_OWN = 25_000_000  # bytes before compression that the rows of the model's own k may take
LARGEST_REST = 16_000_000  # the same for the other k
BYTES_PER_ENTRY = 3  # of a sparse row: two for the position, one for the value

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Page:
    """The file, and how much is in it."""

    text: str
    queries: int  # latents held with the model's own k
    queries_compared: int  # latents held with all k and with measured costs
    layers: int
    heads: int
    ks: tuple[int, ...]
    slices: int = 1

    def in_words(self) -> str:
        """One line for whoever made it."""
        ks = ", ".join(k_in_words(k) for k in self.ks)
        slices = f" x {self.slices} channel slices" if self.slices > 1 else ""
        more = f"{self.queries_compared:,} latents also with {ks} and measured costs; " if self.queries_compared else ""
        return (
            f"{self.queries:,} latents{slices} x {self.layers} layers x {self.heads} heads; {more}"
            f"{len(self.text) / 1e6:.1f} MB"
        )


def explorer_page(server, title: str = "", progress: Progress | None = None, **selection) -> Page:
    """Builds the page of one picture and model.

    Args:
        server: a row server or a group server.
        title: what the picture is called.
        progress: called with (what, done, total).
        selection: where the page starts, see `Exploration`.

    Raises:
        AttentionError: the picture is too large.
    """
    view, blob = Exploration(server, **selection), _Blob()
    _check_size(server)
    stored, held, compared, about = (_groups if grouped(server) else _every_k)(server, view, blob, progress)
    meta = {
        **meta_of(view),
        "selection": view.selection(),
        **stored,
        "facts_width": 2 + 5 * len(server.channel_groups),
        "group_channels": [len(group) for group in server.channel_groups],
        "open": True,
    }
    about = (
        f"Model {server.name}, {server.kind} context. The latent grid has {server.height} x {server.width} places, one "
        f"for each block of 16 x 16 pixels. {about}"
    )
    text = PAGE.substitute(
        title=html.escape(f"What the entropy model looks at: {title}" if title else "What the entropy model looks at"),
        about=html.escape(about),
        version=__version__,
        script=SCRIPT.read_text(),
        meta=json.dumps(meta).replace("</", "<\\/"),
        data=base64.b64encode(gzip.compress(blob.bytes(), 9, mtime=0)).decode(),
    )
    if len(text.encode()) > LARGEST_PAGE:
        raise AttentionError(_too_large(server, f"the page would have {len(text) / 1e6:.0f} MB"))
    return Page(text, held, compared, server.layers, server.heads, tuple(view.ks), server.slices)


def _every_k(server, view: Exploration, blob: "_Blob", progress: Progress | None) -> tuple[dict, int, int, str]:
    """Rows with each k, and costs.  ->  what `meta` says of them, latents held, latents held with all k, in words"""
    own = own_k(server)
    every, some = list(range(server.n)), lattice(server, view.ks)
    tell = _teller(progress, sum(len(some if k != own or own == DENSE else every) for k in view.ks) + len(some))
    sections = []
    for k in view.ks:
        held = every if k == own and own != DENSE else some
        sections.append(_section(server, held, k, blob, tell))
    costs = _costs(server, some, own, blob, tell)
    held = len(some if own == DENSE else every)
    *others, last = (k_in_words(k) for k in view.ks if k != own)
    about = (
        f"With the model's own choice, {k_in_words(own)}, this page holds the attention of {held:,} latents in "
        f"{server.layers} layers with {server.heads} heads; "
        f"for {len(some):,} latents also with {', '.join(others)} and {last}, and the measured costs."
    )
    return {"sections": sections, "costs": costs}, held, len(some), about


def _groups(server, view: Exploration, blob: "_Blob", progress: Progress | None) -> tuple[dict, int, int, str]:
    """The same of a GroupedMixer: rows of all queries, and the cross mixers' groups."""
    queries = list(range(server.n * server.slices))
    stored = {"sections": [_section(server, queries, DENSE, blob, _teller(progress, len(queries)))]}
    if server.has_groups:
        stored["cross"] = blob.add(to_bytes(server.all_groups()), "u1")
    about = (
        f"This page holds the attention of {server.n:,} latents, in each {server.slices} channel slices, in "
        f"{server.layers} layers with {server.heads} heads. The entropy model is a GroupedMixer (Li et al. 2024)."
    )
    return stored, server.n, 0, about


def _teller(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Counts what is done."""
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress("latents", done, total)

    return tell


def lattice(server, ks: list[int]) -> list[int]:
    """Latents for which all k are held: all of a small grid, else every second, fourth, … in both directions, of the
    second pass in a parallel model."""
    per_site = server.layers * server.heads * (BYTES_PER_ENTRY * sum(min(k, server.n) for k in ks) + server.n)
    stride = 1
    while -(-server.height // stride) * -(-server.width // stride) * per_site > LARGEST_REST:
        stride *= 2
    rows = range(stride // 2, server.height, stride)
    columns = range(stride // 2, server.width, stride)
    return [row * server.width + column for row in rows for column in columns]


def _check_size(server) -> None:
    needed = server.n * _bytes_per_site(server)
    if needed > LARGEST_OWN or server.n > 2**16 - 1:
        raise AttentionError(_too_large(server, f"its rows need {needed / 1e6:.0f} MB"))


def _bytes_per_site(server) -> int:
    entries = server.row_entries if grouped(server) else own_k(server) or 1
    return server.slices * server.layers * server.heads * BYTES_PER_ENTRY * entries


def _too_large(server, why: str) -> str:
    most = min(LARGEST_OWN // _bytes_per_site(server), 2**16 - 1)
    width, height = server.picture.size
    return (
        f"The picture is too large for a page: {width} x {height} pixels are {server.n:,} latents, and {why}; with "
        f"this model up to about {most * 256 / 1e6:.1f} million pixels fit. Make it smaller, or use the notebook."
    )


class _Blob:
    """Arrays one after the other, each at a multiple of 8."""

    def __init__(self):
        self.parts, self.size = [], 0

    def add(self, array: np.ndarray, kind: str) -> int:
        """->  where the array begins, in bytes. kind: numpy's, little-endian."""
        data = np.ascontiguousarray(array).astype(kind).tobytes()
        data += bytes(-len(data) % 8)
        self.parts.append(data)
        self.size += len(data)
        return self.size - len(data)

    def bytes(self) -> bytes:
        return b"".join(self.parts)


def to_bytes(probs: np.ndarray) -> np.ndarray:
    """Attention as bytes; what is attended at all is at least 1, so that it stays told apart from what is not."""
    return np.where(probs > 0, np.maximum(np.round(255 * np.sqrt(probs)), 1), 0).astype(np.uint8)


def _section(server, sites: list[int], k: int, blob: _Blob, tell) -> dict:
    full = k == DENSE and not grouped(server)
    dense, counts, positions, values, facts = [], [], [], [], []
    for part, probs, lines in server.many(sites, k or None):
        codes = to_bytes(probs)
        facts.append(lines)
        if full:
            dense.append(codes)
        else:
            attended = codes > 0
            counts.append(attended.sum(-1))
            positions.append(attended.nonzero()[-1])
            values.append(codes[attended])
        tell(len(part))
    section = {"k": k, "facts": blob.add(np.concatenate(facts), "<f4")}
    if len(sites) < server.n:
        section["sites"] = sites
    if full:
        return {**section, "dense": blob.add(np.concatenate(dense), "u1")}
    parts = (("counts", counts, "<u2"), ("positions", positions, "<u2"), ("bytes", values, "u1"))
    return section | {name: blob.add(np.concatenate(arrays), kind) for name, arrays, kind in parts}


def _costs(server, sites: list[int], k: int, blob: _Blob, tell) -> dict:
    found = []
    for site in sites:
        found.append(server.costs(site, k or None))
        tell(1)
    return {
        "sites": sites,
        "counts": blob.add(np.array([len(positions) for positions, _ in found]), "<u2"),
        "positions": blob.add(np.concatenate([positions for positions, _ in found]), "<u2"),
        "bits": blob.add(np.concatenate([bits for _, bits in found]), "<f4"),
    }


def page_server(text: str, port: int = 0) -> ThreadingHTTPServer:
    """A server of one page on the loopback address; port 0 takes a free one."""
    body = text.encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body) if found else 0))
            self.end_headers()
            if found:
                self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def serve_page(text: str, opened: Callable[[str], object] = webbrowser.open) -> None:
    """Opens a page in the browser and serves it until Ctrl+C."""
    with page_server(text) as server:
        address = f"http://127.0.0.1:{server.server_port}/"
        print(f"{address}  (Ctrl+C stops)", flush=True)
        opened(address)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


# The policy forbids the browser every request: nothing is fetched, whatever the script says.
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
body { margin: 16px; font: 14px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
h1 { font-size: 20px; margin: 0 4px 2px; } p.about { margin: 0 4px 4px; color: #444; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="about">$about</p>
<div id="explorer"></div>
<p class="about">Made with entroformer-suite $version. After Qian et al., Entroformer: A Transformer-based Entropy Model
for Learned Image Compression, ICLR 2022, figures 8 to 10.</p>
<script type="application/json" id="meta">$meta</script>
<script type="text/plain" id="data">$data</script>
<script type="module">
$script
const text = (id) => document.getElementById(id).textContent;
await openPage(document.getElementById("explorer"), JSON.parse(text("meta")), text("data"));
</script>
</body>
</html>
""")
