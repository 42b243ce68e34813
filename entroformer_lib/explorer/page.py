"""The attention explorer as one HTML file that works offline: the script, the pictures, and stored answers as bytes.

Top-k attention is sparse, so with the model's own k the page holds the rows of every latent, layer and head. Other k,
dense attention and the measured costs are held for latents on a coarser lattice. An attention p is stored as the byte
round(255 sqrt(p)), so small values keep their digits.

Layout of the data, before gzip and base64; every block starts at a multiple of 8, `meta.stored` says where. Of every
query (site by site, in each its channel slices): steps and origins uint16, bits and alone float32. For each k (a
section) and the queries of its sites: facts float32 [queries, 2 + 5 groups] (see `PictureServer.many`), counts uint16
[queries, layers, heads], positions uint16 and bytes uint8 of all counted entries in that order. Costs: counts uint16
[sites], positions uint16, bits float32, rho float32 [sites, layers, heads + 1] (see `rank_correlations`). Of a
GroupedMixer with cross mixers: place uint16 of every site, and cross uint8 [places, layers, heads, G, G].
"""

import base64
import gzip
import html
import json
import math
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template

import numpy as np

from entroformer_lib import __version__
from entroformer_lib.errors import AttentionError
from entroformer_lib.explorer.answers import Answers
from entroformer_lib.explorer.script import STYLE, script
from entroformer_lib.inspection.panels import k_in_words, offered_ks, own_k, rank_correlations
from entroformer_lib.stages import tell

PAGE = Path(__file__).with_name("page.html")
LARGEST_PAGE = 25_000_000  # bytes
LARGEST_OWN = 25_000_000  # bytes before compression that the rows of the model's own k may take
LARGEST_REST = 16_000_000  # the same for the other k
BYTES_PER_ENTRY = 3  # of a row: two for the position, one for the value


@dataclass(frozen=True)
class Page:
    """The file, and in words what is in it."""

    text: str
    holds: str

    def in_words(self) -> str:
        """One line for whoever made it."""
        return f"{self.holds}; {len(self.text) / 1e6:.1f} MB"


def explorer_page(server, title: str = "", **selection) -> Page:
    """Builds the page of one picture and model; `stages.tell` says how far it is.

    Args:
        server: of the picture, see `server_of`.
        title: what the picture is called.
        selection: where the page starts, see `Explorer`.

    Raises:
        AttentionError: the picture is too large.
    """
    _check_size(server)
    answers, blob, ks = Answers(server), _Blob(), offered_ks(server)
    own, every, some = own_k(server), range(server.n), lattice(server, ks)
    held = {k: every if k == own and server.row_entries else some for k in ks}
    measured = some if server.family == "rows" else []
    more = _teller(sum(map(len, held.values())) * server.slices + len(measured))
    stored = {
        **_queries(server, answers, blob),
        "sections": [_section(server, sites, k, blob, more) for k, sites in held.items()],
        "costs": _costs(server, measured, own, blob, more) if measured else None,
        "cross": None if server.cross is None else _cross(server, blob),
        "pictures": {name: answers.answer("picture", 0, name)["url"] for name in ("reconstruction", "guess")},
    }
    if {"row", "column"}.isdisjoint(selection):
        selection |= _middle(server, some)
    meta = answers.meta() | {
        "costs": "own_k" if measured else False,
        "calculation": False,
        "begin": selection,
        "stored": stored,
    }
    for model in meta["models"]:
        del model["steps"], model["origins"]  # they stand in the blob
    holds = _holds(server, ks, len(held[own]), len(measured))
    text = page_text(
        f"What {server.name} looks at: {title}" if title else f"What {server.name} looks at",
        f"Model {server.name}. The page holds the attention of {holds}.",
        script("stored.js"),
        {"meta": ("application/json", json.dumps(meta)), "data": ("text/plain", _packed(blob.bytes()))},
        'await openPage(document.getElementById("explorer"), JSON.parse(text("meta")), text("data"));',
    )
    if len(text.encode()) > LARGEST_PAGE:
        raise AttentionError(_too_large(server, f"the page would have {len(text) / 1e6:.0f} MB"))
    return Page(text, holds)


def _middle(server, sites: Sequence[int]) -> dict[str, int]:
    """The place nearest to the middle of which every view is held, and where context helps, or at least is known."""
    last = server.slices - 1  # which has context wherever another has
    known = [site for site in sites if server.has_context(site * server.slices + last)]
    bits, alone = (np.zeros(server.n) if v is None else v.reshape(server.n, -1).sum(1) for v in server.overview())
    helped = [site for site in known if alone[site] > bits[site]]
    places = [divmod(site, server.width) for site in helped or known or sites[:1]]
    middle = (server.height / 2, server.width / 2)
    row, column = min(places, key=lambda place: math.dist(place, middle))
    return {"row": row, "column": column}


def page_text(title: str, about: str, code: str, parts: dict[str, tuple[str, str]], begin: str) -> str:
    """A page that asks the network for nothing.

    Args:
        about: one line at the end.
        code: one module of JavaScript; begin: what it does first.
        parts: what the code finds by name, with its type.
    """
    stored = [
        f'<script type="{kind}" id="{name}">' + text.replace("</", "<\\/") + "</script>"
        for name, (kind, text) in parts.items()
    ]
    return Template(PAGE.read_text("utf-8")).substitute(
        title=html.escape(title),
        about=html.escape(about),
        version=__version__,
        style=STYLE.read_text("utf-8"),
        script=code,
        parts="\n".join(stored),
        begin=begin,
    )


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()


def _holds(server, ks: list[int], held: int, measured: int) -> str:
    """What a page holds, in words: latents with the model's own k, and those with all k and measured costs."""
    slices = f" x {server.slices} channel slices" if server.slices > 1 else ""
    words = f"{held:,} latents{slices} x {server.layers} layers x {server.heads} heads"
    if not measured:
        return words
    *others, last = (k_in_words(k) for k in ks if k != own_k(server))
    return (
        f"{words} with the model's own choice, {k_in_words(own_k(server))}; of {measured:,} latents also with "
        f"{', '.join(others)} and {last}, and the measured costs"
    )


def _queries(server, answers: Answers, blob: "_Blob") -> dict:
    """What is said of every query, whatever is chosen."""
    queries = range(server.n * server.slices)
    overview = answers.answer("overview", 0)
    return {
        "steps": blob.add(np.array([server.step(query) for query in queries]), "<u2"),
        "origins": blob.add(np.array([server.origin(query) for query in queries]), "<u2"),
        "bits": blob.add(overview["bits"], "<f4"),
        "alone": None if overview["alone"] is None else blob.add(overview["alone"], "<f4"),
    }


def _cross(server, blob: "_Blob") -> dict:
    """Attention of the cross mixers, and whose place each site has."""
    places = np.array([server.place(site * server.slices) for site in range(server.n)])
    codes = to_bytes(server.cross)
    return {"place": blob.add(places, "<u2"), "bytes": blob.add(codes, "u1"), "count": len(codes)}


def _teller(total: int) -> Callable[[int], None]:
    """Counts what is done."""
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        tell("latents", done, total)

    return more


def lattice(server, ks: list[int]) -> list[int]:
    """Latents for which all k are held: all of a small grid, else every second, fourth, … in both directions, of the
    second pass in a parallel model."""
    per_site = server.layers * server.heads * BYTES_PER_ENTRY * sum(min(k or server.n, server.n) for k in ks)
    stride = 1
    while -(-server.height // stride) * -(-server.width // stride) * per_site > LARGEST_REST:
        stride *= 2
    rows, columns = (range(min(stride // 2, n - 1), n, stride) for n in (server.height, server.width))
    return [row * server.width + column for row in rows for column in columns]


def _check_size(server) -> None:
    needed = server.n * _bytes_per_site(server)
    if needed > LARGEST_OWN or server.n > 2**16 - 1:
        raise AttentionError(_too_large(server, f"its rows need {needed / 1e6:.0f} MB"))


def _bytes_per_site(server) -> int:
    return server.slices * server.layers * server.heads * BYTES_PER_ENTRY * (server.row_entries or 1)


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


def _section(server, sites: Sequence[int], k: int, blob: _Blob, more) -> dict:
    counts, positions, values, facts = [], [], [], []
    queries = [site * server.slices + s for site in sites for s in range(server.slices)]
    for part, probs, lines in server.many(queries, k or None):
        codes = to_bytes(probs)
        counts.append((codes > 0).sum(-1))
        positions.append(codes.nonzero()[-1])
        values.append(codes[codes > 0])
        facts.append(lines)
        more(len(part))
    parts = {
        "counts": (counts, "<u2"),
        "positions": (positions, "<u2"),
        "bytes": (values, "u1"),
        "facts": (facts, "<f4"),
    }
    return {"k": k, "sites": list(sites), **_added(blob, parts)}


def _costs(server, sites: Sequence[int], k: int, blob: _Blob, more) -> dict:
    counts, positions, costs, rho = [], [], [], []
    for _, rows, hidden, bits in server.many_costs(sites, k or None):
        counts.append([len(hidden)])
        positions.append(hidden)
        costs.append(bits)
        rho.append(rank_correlations(rows, hidden, bits).ravel())
        more(1)
    parts = {"counts": (counts, "<u2"), "positions": (positions, "<u2"), "bits": (costs, "<f4"), "rho": (rho, "<f4")}
    return {"sites": list(sites), **_added(blob, parts)}


def _added(blob: _Blob, parts: dict[str, tuple[list[np.ndarray], str]]) -> dict[str, int]:
    return {name: blob.add(np.concatenate(arrays), kind) for name, (arrays, kind) in parts.items()}


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
