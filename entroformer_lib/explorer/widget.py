"""The attention explorer as a widget: shows frames of an `Exploration` and forwards clicks, sliders and keys to it.

server = RowServer(load_model("tiny-parallel"), "photo.png")
Explorer(Exploration(server))
"""

import base64
import io
from pathlib import Path

import anywidget
import numpy as np
import traitlets

from entroformer_lib.inspection.exploration import Exploration, Panel, grouped, own_k

SCRIPT = Path(__file__).with_name("explorer.js")
DECODED, SELECTED = 1, 2  # bits of a flag


class Explorer(anywidget.AnyWidget):
    """Shows an exploration; `explorer.view` is the exploration, and setting its layer, head, k, row, column, slice or
    mode in a cell moves the widget too."""

    _esm = SCRIPT
    meta = traitlets.Dict().tag(sync=True)
    frame = traitlets.Dict().tag(sync=True)
    maps = traitlets.Bytes().tag(sync=True)

    def __init__(self, view: Exploration, **keywords):
        self.view = view
        frame, maps = frame_of(view)
        super().__init__(meta=meta_of(view), frame=frame, maps=maps, **keywords)
        self.on_msg(self._selected)
        view.observe(self._refresh, "revision")

    def _selected(self, widget, content, buffers) -> None:
        self.view.update(**content)

    def _refresh(self, change) -> None:
        frame, maps = frame_of(self.view)
        with self.hold_sync():  # one message, so that maps and words belong together
            self.maps = maps
            self.frame = frame


def meta_of(view: Exploration) -> dict:
    """What never changes: grid, choices, and the picture as a data URL."""
    server = view.servers[0]
    return {
        "height": server.height,
        "width": server.width,
        "layers": max(s.layers for s in view.servers),
        "heads": max(s.heads for s in view.servers),
        "radius": server.radius,
        "kind": server.kind,
        "name": server.name,
        "slices": max(s.slices for s in view.servers),
        "models": [{"name": s.name, "kind": s.kind, "own_k": own_k(s), **groups_of(s)} for s in view.servers],
        "modes": view.modes,
        "ks": view.ks,
        "own_k": own_k(server),
        "picture": data_url(server.picture),
    }


def groups_of(server) -> dict:
    """Of a GroupedMixer: `counts` [k_c, k_h, k_w] and the `order` of its groups, each [slice, row and column phase]."""
    return {"counts": list(server.counts), "order": [list(g) for g in server.order]} if grouped(server) else {}


def frame_of(view: Exploration) -> tuple[dict, bytes]:
    """What explorer.js draws: words and numbers, and for each panel the bytes of its values and flags."""
    panels = view.panels()
    scatters = [view.scatter(number) for number in range(len(view.servers))]
    frame = {
        "revision": view.revision,
        "selection": view.selection(),
        "caption": view.caption(),
        "panels": [
            {"title": p.title, "kind": p.kind, "low": 0, "high": height_of(p), "query": p.query, "origin": p.origin}
            | {"radius": p.radius, "model": p.model, "shape": p.values.shape}
            for p in panels
        ],
        "facts": view.facts(),
        "scatters": [
            {**scatter, "attention": scatter["attention"].tolist(), "bits": scatter["bits"].tolist()}
            for scatter in scatters
            if scatter
        ],
    }
    return frame, b"".join(bytes_of(panel) for panel in panels)


def height_of(panel: Panel) -> float:
    """The value at the end of the colour scale."""
    return float(np.abs(panel.values).max())


def bytes_of(panel: Panel) -> bytes:
    """n values on a square-root scale (of a cost: 128 is zero), then n flags: 1 decoded, 2 selected. n: entries."""
    values = panel.values / (height_of(panel) or 1)
    if panel.kind == "cost":
        values = 128 + np.round(127 * np.sign(values) * np.sqrt(np.abs(values)))
    else:
        values = np.round(255 * np.sqrt(values))
    flags = DECODED * panel.decoded + SELECTED * panel.selected
    return values.astype(np.uint8).tobytes() + flags.astype(np.uint8).tobytes()


def data_url(picture) -> str:
    """A PIL image inside a page; JPEG, because it only lies under the maps."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "jpeg", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
