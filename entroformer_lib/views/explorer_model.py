"""What the attention explorer shows, without any widget: a selection, and pure methods that say what belongs to it.

The numbers come from a row server (`studies.row_server.RowServer`), which is handed in; nothing here runs a model or
draws a pixel. The widget, the exported page and the static figures all show what `Exploration` returns.
"""

from dataclasses import dataclass

import numpy as np
import traitlets

from entroformer_lib.errors import AttentionError

MEAN = -1  # as head: the mean over all heads
DENSE = 0  # as k: dense attention
USUAL_KS = (8, 16, 32, 64)  # figure 10
MODES = {
    "head": "one head",
    "heads": "all heads of the layer (figure 9)",
    "ks": "one head, several k (figure 10)",
    "cost": "attention against measured cost",
}


@dataclass(frozen=True)
class Panel:
    """One map over the picture. Arrays are [h, w] on the latent grid.

    values: attention (sums to 1), or for kind "cost" bits that the absence of a position costs; decoded: what the
    decoder knows when it comes to the query; selected: what the top-k left; query and origin: (row, column) of the
    latent that is predicted and of the token that predicts it.
    """

    title: str
    kind: str
    values: np.ndarray
    decoded: np.ndarray
    selected: np.ndarray
    query: tuple[int, int]
    origin: tuple[int, int]
    radius: int


class Exploration(traitlets.HasTraits):
    """The selection, always one that exists: what is set too high or too low is clipped.

    `revision` counts the changes of the selection; `update` changes several things and counts once.

    Args:
        server: of one picture and model.
        other: of the same picture and another model, or None; it is shown beside the first.
        selection: any of layer, head, k, row, column, mode.

    Raises:
        AttentionError: the two servers do not have the same grid.
    """

    layer = traitlets.Int(0)
    head = traitlets.Int(MEAN)
    k = traitlets.Int(DENSE)
    row = traitlets.Int(0)
    column = traitlets.Int(0)
    mode = traitlets.Enum(tuple(MODES), "head")
    revision = traitlets.Int(0)

    def __init__(self, server, other=None, **selection):
        self.servers = [server] if other is None else [server, other]
        if other is not None and (other.height, other.width) != (server.height, server.width):
            raise AttentionError("Two models side by side need the same grid of latents; these have different ones.")
        self._quiet, self._rows, self._costs = True, {}, {}
        super().__init__()
        self.ks = offered_ks(server)
        start = dict(
            layer=server.layers - 1,
            k=DENSE if server.default_k is None else server.default_k,
            row=server.height // 2,
            column=server.width // 2,
        )
        for name, value in {**start, **selection}.items():
            setattr(self, name, value)
        self._quiet = False

    # -- the selection --

    @traitlets.validate("layer")
    def _clip_layer(self, proposal):
        return _clip(proposal.value, 0, max(server.layers for server in self.servers) - 1)

    @traitlets.validate("head")
    def _clip_head(self, proposal):
        return _clip(proposal.value, MEAN, max(server.heads for server in self.servers) - 1)

    @traitlets.validate("k")
    def _clip_k(self, proposal):
        return _clip(proposal.value, DENSE, self.servers[0].n)

    @traitlets.validate("row")
    def _clip_row(self, proposal):
        return _clip(proposal.value, 0, self.servers[0].height - 1)

    @traitlets.validate("column")
    def _clip_column(self, proposal):
        return _clip(proposal.value, 0, self.servers[0].width - 1)

    @traitlets.observe("layer", "head", "k", "row", "column", "mode")
    def _count(self, change):
        if not self._quiet:
            self.revision += 1

    def update(self, **selection) -> None:
        """Changes several parts of the selection and counts one revision, or none if nothing changed."""
        before = self.selection()
        self._quiet = True
        try:
            for name in selection.keys() & before.keys():
                setattr(self, name, selection[name])
        finally:
            self._quiet = False
        if self.selection() != before:
            self.revision += 1

    def selection(self) -> dict:
        """layer, head, k, row, column, mode."""
        return {name: getattr(self, name) for name in ("layer", "head", "k", "row", "column", "mode")}

    @property
    def site(self) -> int:
        """The number of the chosen latent in raster order."""
        return self.row * self.servers[0].width + self.column

    # -- what belongs to it --

    def rows(self, server, k: int) -> np.ndarray:
        """Attention of the chosen latent in all layers and heads: [layers, heads, n]. The last ones are remembered."""
        key = (id(server), self.site, k)
        if key not in self._rows:
            if len(self._rows) > 32:
                self._rows.clear()
            self._rows[key] = server.rows(self.site, k or None)
        return self._rows[key]

    def costs(self, server) -> tuple[np.ndarray, np.ndarray]:
        """Positions and what the absence of each costs the chosen latent in bits."""
        key = (id(server), self.site, self.k)
        if key not in self._costs:
            if len(self._costs) > 32:
                self._costs.clear()
            self._costs[key] = server.costs(self.site, self.k or None)
        return self._costs[key]

    def panels(self) -> list[Panel]:
        """The maps of the present mode, the second model's after the first's."""
        return [panel for server in self.servers for panel in self._panels_of(server)]

    def _panels_of(self, server) -> list[Panel]:
        layer = min(self.layer, server.layers - 1)
        head = min(self.head, server.heads - 1)
        who = f"{server.name}: " if len(self.servers) > 1 else ""
        if self.mode == "heads":
            heads = [*range(server.heads), MEAN]
            return [self._attention(server, layer, h, self.k, who + head_in_words(h)) for h in heads]
        if self.mode == "ks":
            return [self._attention(server, layer, head, k, who + k_in_words(k)) for k in self.ks]
        words = f"layer {layer}, {head_in_words(head)}, {k_in_words(self.k)}"
        attention = self._attention(server, layer, head, self.k, f"{who}attention, {words}")
        return [attention, self._cost_panel(server, who)] if self.mode == "cost" else [attention]

    def _attention(self, server, layer: int, head: int, k: int, title: str) -> Panel:
        row = self.rows(server, k)[layer]
        values = row.mean(0) if head == MEAN else row[head]
        selected = (values > 0) if k else np.zeros(server.n, dtype=bool)
        return self._panel(server, title, "attention", values, selected)

    def _cost_panel(self, server, who: str) -> Panel:
        positions, bits = self.costs(server)
        values, selected = np.zeros(server.n), np.zeros(server.n, dtype=bool)
        values[positions], selected[positions] = bits, True
        return self._panel(server, who + "cost of its absence, in bits", "cost", values, selected)

    def _panel(self, server, title: str, kind: str, values: np.ndarray, selected: np.ndarray) -> Panel:
        shape = (server.height, server.width)
        decoded = server.decoded(self.site)
        maps = (v.reshape(shape) for v in (values, decoded, selected))
        origin = divmod(server.origin(self.site), server.width)
        return Panel(title, kind, *maps, (self.row, self.column), origin, server.radius)

    def scatter(self) -> dict | None:
        """In the mode `cost`: attention (fraction) and cost (bits) of every hidden position, and Spearman's rank
        correlation, None where it does not exist."""
        server = self.servers[0]
        if self.mode != "cost":
            return None
        positions, bits = self.costs(server)
        row = self.rows(server, self.k)[min(self.layer, server.layers - 1)]
        attention = (row.mean(0) if self.head == MEAN else row[min(self.head, server.heads - 1)])[positions]
        rho = server.rank_correlation(attention, bits)
        return {"attention": attention, "bits": bits, "rho": None if np.isnan(rho) else float(rho)}

    def facts(self) -> list[dict]:
        """The side panel, one entry per model: name, bits, hyper_bits and the channel groups, see `RowServer.facts`."""
        return [{"name": s.name, **s.facts(self.site, self.k or None)} for s in self.servers]

    def caption(self) -> str:
        """The selection in words, with the bits of the first model."""
        server = self.servers[0]
        facts = server.facts(self.site, self.k or None)
        where = f"Latent row {self.row}, column {self.column}: {pass_in_words(server, self.site)}"
        what = {
            "head": f"Layer {self.layer}, {head_in_words(self.head)}, {k_in_words(self.k)}.",
            "heads": f"Layer {self.layer}, every head, {k_in_words(self.k)}.",
            "ks": f"Layer {self.layer}, {head_in_words(self.head)}, every k.",
            "cost": f"Layer {self.layer}, {head_in_words(self.head)}, {k_in_words(self.k)}, beside the measured cost.",
        }[self.mode]
        with_context, alone = (f"{np.float32(facts[name]):.1f}" for name in ("bits", "hyper_bits"))
        return f"{where} {what} {with_context} bits with context, {alone} bits with the hyperprior only."


def offered_ks(server) -> list[int]:
    """The k on offer: those of figure 10, the model's own, and dense as 0, the last."""
    own = () if server.default_k is None else (server.default_k,)
    return [*sorted({*USUAL_KS, *own}), DENSE]


def head_in_words(head: int) -> str:
    """`head 2`, or `mean over heads`."""
    return "mean over heads" if head == MEAN else f"head {head}"


def k_in_words(k: int) -> str:
    """`k = 16`, or `dense`."""
    return f"k = {k}" if k else "dense"


def pass_in_words(server, site: int) -> str:
    """When a latent is coded, and what it may look at."""
    if server.kind == "serial":
        return "sees all latents before it." if site else "the first, nothing is decoded yet."
    if server.has_context(site):
        return "second pass, sees the whole first pass."
    return "first pass, coded without context; its row gathers context for others."


def _clip(value: int, low: int, high: int) -> int:
    return min(max(int(value), low), high)
