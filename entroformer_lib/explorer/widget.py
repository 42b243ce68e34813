"""The attention explorer as a widget: shows frames of an `Exploration` and forwards clicks, sliders and keys to it.

server = RowServer(load_model("tiny-parallel"), "photo.png")
Explorer(Exploration(server))
"""

import base64
import dataclasses
import io
from pathlib import Path

import anywidget
import numpy as np
import traitlets

from entroformer_lib.inspection.exploration import Exploration, own_k

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
        self.on_msg(lambda widget, content, buffers: view.update(**content))
        view.observe(self._refresh, "revision")

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
        "slices": max(s.slices for s in view.servers),
        "models": [
            {
                "name": s.name,
                "kind": s.kind,
                "own_k": own_k(s),
                "radius": s.radius,
                "counts": s.counts,
                "order": s.order,
            }
            for s in view.servers
        ],
        "modes": {name: dataclasses.asdict(mode) for name, mode in view.modes.items()},
        "ks": view.ks,
        "picture": data_url(server.picture),
    }


def frame_of(view: Exploration) -> tuple[dict, bytes]:
    """What explorer.js draws: words and numbers, and as bytes the values of all panels, float32, then their flags."""
    panels = view.panels()
    scatters = [view.scatter(number) for number in range(len(view.servers))]
    shown = ("title", "kind", "query", "origin", "radius", "model")
    frame = {
        "revision": view.revision,
        "selection": view.selection(),
        "caption": view.caption(),
        "panels": [{name: getattr(p, name) for name in shown} | {"shape": p.values.shape} for p in panels],
        "facts": view.facts(),
        "scatters": [{name: _plain(v) for name, v in scatter.items()} for scatter in scatters if scatter],
    }
    flags = [DECODED * panel.decoded + SELECTED * panel.selected for panel in panels]
    maps = [panel.values.astype("<f4").tobytes() for panel in panels]
    return frame, b"".join(maps + [flag.astype(np.uint8).tobytes() for flag in flags])


def _plain(value):
    return value.tolist() if isinstance(value, np.ndarray) else value


def data_url(picture) -> str:
    """A PIL image inside a page; JPEG, because it only lies under the maps."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "jpeg", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
