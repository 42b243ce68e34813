"""The live page: one HTML file in which a parallel model runs on any photograph, without Python, server or network.

    text = live_page(load_model("blocks-parallel@0.014"), picture)

The page holds the model's graphs, weights in half precision, and onnxruntime-web, all of it gzipped and as base64. Each
part's gzip carries a checksum, which tells damage to the page.
"""

import base64
import gzip
import hashlib
import html
import io
import json
from pathlib import Path
from string import Template

import torch
from PIL import Image

from entroformer_lib import __version__
from entroformer_lib.codec.pictures import open_picture, to_rgb, within
from entroformer_lib.datasets import sample_picture
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import AttentionError, UserError
from entroformer_lib.explorer.live_graphs import live_graphs
from entroformer_lib.explorer.script import STYLE, script
from entroformer_lib.inspection.panels import offered_ks, own_k, telling_layer
from entroformer_lib.inspection.row_server import GROUPS, RowServer
from entroformer_lib.inspection.scene import name_at
from entroformer_lib.onnx_export import facts

HERE = Path(__file__).parent
VENDOR = HERE / "vendor"
RUNTIME = {"runtime": "ort.wasm.bundle.min.mjs.gz", "wasm": "ort-wasm-simd-threaded.wasm.gz"}
# each uses those before it
SOURCES = ("live_numbers.js", "live_pictures.js", "live.js", "live_page.js")
REACH = 24  # steps of z; farther ones cost as much as the farthest here
LARGEST_SIDE = 768  # pixels, as in js/live_pictures.js
SMALLEST_SIDE = 16  # pixels, of the scaled picture
LARGEST_PAGE = 60_000_000  # bytes


def live_page(model: Entroformer, picture=None, reference: Entroformer | None = None) -> str:
    """The page as text.

    Args:
        model: a parallel model with a hyperprior; one of variable rate runs at its `level`.
        picture: what the page begins with, see `open_picture`; by default a sample.
        reference: a trained model without context behind the same transforms, which says what context saves.

    Raises:
        AttentionError: another kind of model, or one that is too large; a picture that is too small.
        DataError: the picture cannot be read.
        ConfigError: a model with a search window.
        UserError: the package onnx is missing, or the runtime's files are not those that belong here.
    """
    sample = picture is None
    first = _first_picture() if sample else to_rgb(open_picture(picture))[0]
    first = within(first, LARGEST_SIDE)  # as the page would scale it
    if min(first.size) < SMALLEST_SIDE:
        size = f"has {first.width} x {first.height} pixels once its longer side has at most {LARGEST_SIDE}"
        raise AttentionError(f"The picture {size}; a live page takes {SMALLEST_SIDE} and more on each side.")
    graphs = live_graphs(model, reference)
    packed = {name: gzip.compress(data, 9, mtime=0) for name, data in graphs.items()} | runtime()
    packed["picture"] = gzip.compress(_png(first), 9, mtime=0)
    text = Template((HERE / "live.html").read_text("utf-8")).substitute(
        name=html.escape(name_at(model, model.level)),
        largest=LARGEST_SIDE,
        version=__version__,
        facts=json.dumps(_facts(model, reference, list(graphs))).replace("</", "<\\/"),
        parts="\n".join(
            f'<script type="text/plain" id="part-{name}">{base64.b64encode(data).decode()}</script>'
            for name, data in packed.items()
        ),
        style=STYLE.read_text("utf-8"),
        script=script(*SOURCES),
    )
    if len(text.encode()) > LARGEST_PAGE:
        raise AttentionError(
            f"The page would have {len(text) / 1e6:.0f} MB and may have {LARGEST_PAGE / 1e6:.0f}: take a smaller model."
        )
    return text


def _first_picture() -> Image.Image:
    """Small, so that the page has something to show soon, and in need of no padding."""
    return sample_picture("coffee").crop((0, 20, 600, 380)).resize((320, 192), Image.Resampling.LANCZOS)


def _facts(model: Entroformer, reference: Entroformer | None, graphs: list[str]) -> dict:
    """What the page's script has to know of the model."""
    c = model.config
    server = RowServer(model, _first_picture())
    return {
        "graphs": graphs,
        "level": model.level,
        "downsampling": c.downsampling,
        "medians": facts(model)["medians"],
        "z_bits": _bits_of_z(model),
        "likelihood_floor": float(model.gaussian.bound.bound),
        "M": c.M,
        "groups": GROUPS,
        "model": {
            "name": name_at(model, model.level),
            "hyperprior": True,
            "layers": c.context_layers,
            "layer": telling_layer(server),
            "heads": c.heads,
            "own_k": own_k(server),
            "ks": offered_ks(server),
            "radius": c.radius,
            "reference": None if reference is None else name_at(reference, reference.level),
        },
    }


def _bits_of_z(model: Entroformer) -> list[list[float]]:
    """What each channel of z costs at -REACH to REACH steps from its median, in bits: [Z, 2 REACH + 1]."""
    with torch.no_grad():
        steps = torch.arange(-REACH, REACH + 1.0)
        medians = torch.tensor(facts(model)["medians"])[None, :, None, None]
        mass = model.z_prior.likelihood(medians + steps.expand(1, len(medians[0]), 1, -1))
    return [[round(bits, 2) for bits in channel] for channel in (-mass.log2())[0, :, 0].tolist()]


def runtime() -> dict[str, bytes]:
    """onnxruntime-web, gzipped: its script and its WebAssembly.

    Raises:
        UserError: a file that is missing or is not the one that belongs here.
    """
    lines = (VENDOR / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split() for line in lines)}
    found = {}
    for part, name in RUNTIME.items():
        path = VENDOR / name
        found[part] = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(found[part]).hexdigest() != sums[name]:
            raise UserError(f"{path} is missing or damaged; get it again with the package.")
    return found


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
