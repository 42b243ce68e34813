"""What the attention explorer shows, without any widget: a selection, and pure methods that say what belongs to it.

The numbers come from a server (`studies.row_server.RowServer`, of a GroupedMixer `studies.group_server.GroupServer`),
which is handed in; nothing here runs a model or draws a pixel. The widget, the exported page and the static figures all
show what `Exploration` returns.
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
    "pair": "one head, two k side by side",
    "cost": "attention against measured cost",
}
GROUPED_MODES = {
    "head": "one head",
    "heads": "all heads of the inner mixer",
    "groups": "all heads of the cross mixer",
}
SELECTION = ("layer", "head", "k", "other_k", "row", "column", "slice", "mode")
REMEMBERED = 64  # answers of a row server


@dataclass(frozen=True)
class Panel:
    """One map over the picture. Arrays are [h, w] on the latent grid.

    values: attention (sums to 1), or for kind "cost" bits that the absence of a position costs; decoded: what the
    decoder knows when it comes to the query; selected: what the top-k left; query and origin: (row, column) of the
    latent that is predicted and of the token that predicts it.

    Kind "groups" is no map but a table of a GroupedMixer's groups: arrays are [G, G], a row for each slot and what its
    tokens at one place see of each slot (a row sums to 1); query and origin: the row of the chosen group.
    """

    title: str
    kind: str
    values: np.ndarray
    decoded: np.ndarray
    selected: np.ndarray
    query: tuple[int, int]
    origin: tuple[int, int]
    radius: int
    model: int = 0  # whose map it is, where two are side by side


class Exploration(traitlets.HasTraits):
    """The selection, always one that exists: what is set too high or too low is clipped.

    `revision` counts the changes of the selection; `update` changes several things and counts once.

    Args:
        server: of one picture and model.
        other: of the same picture and another model, or None; it is shown beside the first.
        selection: any of layer, head, k, other_k (the second k of the mode `pair`), row, column, slice (of channels,
            in a GroupedMixer), mode.

    Raises:
        AttentionError: the two servers do not have the same grid.
    """

    layer = traitlets.Int(0)
    head = traitlets.Int(MEAN)
    k = traitlets.Int(DENSE)
    other_k = traitlets.Int(DENSE)
    row = traitlets.Int(0)
    column = traitlets.Int(0)
    slice = traitlets.Int(0)
    mode = traitlets.Enum(tuple({**MODES, **GROUPED_MODES}), "head")
    revision = traitlets.Int(0)

    def __init__(self, server, other=None, **selection):
        self.servers = [server] if other is None else [server, other]
        if other is not None and (other.height, other.width) != (server.height, server.width):
            raise AttentionError("Two models side by side need the same grid of latents; these have different ones.")
        self._quiet, self._answers, self._costs = True, {}, {}
        super().__init__()
        self.ks = offered_ks(*self.servers)
        start = dict(
            layer=server.layers - 1,
            k=own_k(server),
            other_k=DENSE if own_k(server) != DENSE or self.ks == [DENSE] else USUAL_KS[0],
            row=server.height // 2,
            column=server.width // 2,
            slice=1,  # the first that sees other slices
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

    @traitlets.validate("k", "other_k")
    def _clip_k(self, proposal):
        return _clip(proposal.value, DENSE, self.servers[0].n)

    @traitlets.validate("row")
    def _clip_row(self, proposal):
        return _clip(proposal.value, 0, self.servers[0].height - 1)

    @traitlets.validate("column")
    def _clip_column(self, proposal):
        return _clip(proposal.value, 0, self.servers[0].width - 1)

    @traitlets.validate("slice")
    def _clip_slice(self, proposal):
        return _clip(proposal.value, 0, max(server.slices for server in self.servers) - 1)

    @traitlets.validate("mode")
    def _offered_mode(self, proposal):
        return proposal.value if proposal.value in self.modes else "head"

    @traitlets.observe(*SELECTION)
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
        """layer, head, k, other_k, row, column, slice, mode."""
        return {name: getattr(self, name) for name in SELECTION}

    @property
    def site(self) -> int:
        """The number of the chosen latent in raster order."""
        return self.row * self.servers[0].width + self.column

    @property
    def modes(self) -> list[str]:
        """What can be shown of all servers."""
        offered = [
            [m for m in GROUPED_MODES if m != "groups" or s.has_groups] if grouped(s) else list(MODES)
            for s in self.servers
        ]
        return [mode for mode in offered[0] if mode in offered[-1]]

    def query(self, server) -> int:
        """What a server is asked: the chosen site, or of a GroupedMixer this site's channel slice."""
        return self.site * server.slices + min(self.slice, server.slices - 1)

    # -- what belongs to it --

    def rows(self, server, k: int) -> np.ndarray:
        """Attention of the chosen latent in all layers and heads: [layers, heads, n]."""
        return self._answer(server, k)[0]

    def facts_of(self, server, k: int) -> dict:
        """Bits and channel groups of the chosen latent, see `RowServer.facts`."""
        return self._answer(server, k)[1]

    def costs(self, server) -> tuple[np.ndarray, np.ndarray]:
        """Positions and what the absence of each costs the chosen latent in bits."""
        return self._remember(self._costs, server.costs, server, self.k)

    def _answer(self, server, k: int) -> tuple[np.ndarray, dict]:
        return self._remember(self._answers, server.row_and_facts, server, k)

    def _remember(self, memory: dict, ask, server, k: int):
        """What a row server says of the chosen latent; the last answers are kept."""
        key = (id(server), self.query(server), k)
        if key not in memory:
            if len(memory) >= REMEMBERED:
                memory.clear()
            memory[key] = ask(self.query(server), k or None)
        return memory[key]

    def panels(self) -> list[Panel]:
        """The maps of the present mode, the second model's after the first's."""
        return [panel for number in range(len(self.servers)) for panel in self._panels_of(number)]

    def _panels_of(self, number: int) -> list[Panel]:
        server = self.servers[number]
        layer, head = min(self.layer, server.layers - 1), min(self.head, server.heads - 1)
        who = f"{server.name}: " if len(self.servers) > 1 else ""
        if grouped(server):
            return self._panels_of_groups(number, layer, head, who)
        if self.mode == "heads":
            maps = [(h, self.k, head_in_words(h)) for h in (*range(server.heads), MEAN)]
        elif self.mode in ("ks", "pair"):
            ks = self.ks if self.mode == "ks" else (self.k, self.other_k)
            bits = [bits_in_words(self.facts_of(server, k)["bits"]) for k in ks]
            maps = [(head, k, f"{k_in_words(k)}: {b} bits") for k, b in zip(ks, bits, strict=True)]
        else:
            maps = [(head, self.k, f"attention, layer {layer}, {head_in_words(head)}, {k_in_words(self.k)}")]
        panels = [self._attention(number, layer, h, k, who + words) for h, k, words in maps]
        return [*panels, self._cost_panel(number, who)] if self.mode == "cost" else panels

    def _panels_of_groups(self, number: int, layer: int, head: int, who: str) -> list[Panel]:
        """The inner mixer over the picture, beside it the cross mixer's groups; or every head of one of the two."""
        server = self.servers[number]
        if self.mode != "head":
            draw = self._groups if self.mode == "groups" else self._attention
            every = (*range(server.heads), MEAN)
            return [draw(number, layer, h, DENSE, who + head_in_words(h)) for h in every]
        words = f"mixer, layer {layer}, {head_in_words(head)}"
        panels = [self._attention(number, layer, head, DENSE, f"{who}inner {words}")]
        return [*panels, self._groups(number, layer, head, DENSE, f"{who}cross {words}")][: 1 + server.has_groups]

    def _groups(self, number: int, layer: int, head: int, k: int, title: str) -> Panel:
        server = self.servers[number]
        maps = server.groups(self.query(server))[layer]
        values = maps.mean(0) if head == MEAN else maps[head]
        seen = np.tri(len(values), dtype=bool)
        row = (server.group(self.query(server)), 0)
        return Panel(title, "groups", values, seen, np.zeros_like(seen), row, row, 0, number)

    def _attention(self, number: int, layer: int, head: int, k: int, title: str) -> Panel:
        server = self.servers[number]
        row = self.rows(server, k)[layer]
        values = row.mean(0) if head == MEAN else row[head]
        selected = (values > 0) if k else np.zeros(server.n, dtype=bool)
        return self._panel(number, title, "attention", values, selected)

    def _cost_panel(self, number: int, who: str) -> Panel:
        server = self.servers[number]
        positions, bits = self.costs(server)
        values, selected = np.zeros(server.n), np.zeros(server.n, dtype=bool)
        values[positions], selected[positions] = bits, True
        return self._panel(number, who + "cost of its absence, in bits", "cost", values, selected)

    def _panel(self, number: int, title: str, kind: str, values: np.ndarray, selected: np.ndarray) -> Panel:
        server = self.servers[number]
        shape = (server.height, server.width)
        decoded = server.decoded(self.query(server))
        maps = (v.reshape(shape) for v in (values, decoded, selected))
        origin = divmod(server.origin(self.query(server)), server.width)
        return Panel(title, kind, *maps, (self.row, self.column), origin, server.radius, number)

    def scatter(self, number: int = 0) -> dict | None:
        """In the mode `cost`, for the first or second model: attention (fraction) and cost (bits) of every hidden
        position, and Spearman's rank correlation, None where it does not exist."""
        server = self.servers[number]
        if self.mode != "cost":
            return None
        positions, bits = self.costs(server)
        row = self.rows(server, self.k)[min(self.layer, server.layers - 1)]
        attention = (row.mean(0) if self.head == MEAN else row[min(self.head, server.heads - 1)])[positions]
        rho = server.rank_correlation(attention, bits)
        return {"attention": attention, "bits": bits, "rho": None if np.isnan(rho) else float(rho)}

    def facts(self) -> list[dict]:
        """The side panel: name, bits, hyper_bits and the channel groups, see `RowServer.facts`. One entry per model,
        in the mode `pair` one per model and k."""
        pair = self.mode == "pair"
        return [
            {"name": f"{s.name}, {k_in_words(k)}" if pair else s.name, "model": number, **self.facts_of(s, k)}
            for number, s in enumerate(self.servers)
            for k in ((self.k, self.other_k) if pair else (self.k,))
        ]

    def caption(self) -> str:
        """The selection in words, with the bits of each model."""
        who = f"Layer {self.layer}, {head_in_words(self.head)}"
        k = "" if self.ks == [DENSE] else f", {k_in_words(self.k)}"
        what = {
            "head": f"{who}{k}.",
            "heads": f"Layer {self.layer}, every head{k}.",
            "groups": f"Layer {self.layer}, every head of the cross mixer.",
            "ks": f"{who}, every k.",
            "pair": f"{who}, {k_in_words(self.k)} beside {k_in_words(self.other_k)}.",
            "cost": f"{who}, {k_in_words(self.k)}, beside the measured cost.",
        }[self.mode]
        where = f"Latent row {self.row}, column {self.column}:"
        models = [(pass_in_words(s, self.query(s)), self._bits_in_words(s)) for s in self.servers]
        if len(models) == 1:
            return f"{where} {models[0][0]} {what} {models[0][1]}"
        each = (f"{s.name}: {seen} {bits}" for s, (seen, bits) in zip(self.servers, models, strict=True))
        return f"{where} {what} {' '.join(each)}"

    def _bits_in_words(self, server) -> str:
        facts = self.facts_of(server, self.k)
        if grouped(server):
            part, whole = (bits_in_words(b) for b in (facts["groups"][facts["slice"]]["bits"], facts["bits"]))
            return f"{part} bits, with the other slices {whole}."
        here, alone = bits_in_words(facts["bits"]), bits_in_words(facts["hyper_bits"])
        if self.mode != "pair":
            return f"{here} bits with context, {alone} bits with the hyperprior only."
        other = bits_in_words(self.facts_of(server, self.other_k)["bits"])
        ks = k_in_words(self.k), k_in_words(self.other_k)
        return f"{here} bits with {ks[0]}, {other} bits with {ks[1]}, {alone} bits with the hyperprior only."


def own_k(server) -> int:
    """The k that the model was built with, DENSE for none."""
    return DENSE if server.default_k is None else server.default_k


def offered_ks(*servers) -> list[int]:
    """The k on offer: those of figure 10, the models' own, and dense as 0, the last."""
    own = [own_k(server) for server in servers if not grouped(server)]  # windows have no k
    return [*sorted({*(USUAL_KS if own else ()), *own} - {DENSE}), DENSE]


def grouped(server) -> bool:
    """Whether it serves a GroupedMixer."""
    return server.kind == "grouped"


def bits_in_words(bits: float) -> str:
    """One decimal, rounded as the page rounds its stored float32."""
    return f"{np.float32(bits):.1f}"


def head_in_words(head: int) -> str:
    """`head 2`, or `mean over heads`."""
    return "mean over heads" if head == MEAN else f"head {head}"


def k_in_words(k: int) -> str:
    """`k = 16`, or `dense`."""
    return f"k = {k}" if k else "dense"


def pass_in_words(server, query: int) -> str:
    """When a latent is coded, and what it may look at."""
    if grouped(server):
        group = server.group(query)
        before = {0: "no latents", 1: "group 0"}.get(group, f"groups 0 to {group - 1}")
        place = f"group {group} (of 0 to {len(server.order) - 1})"
        return f"channel slice {query % server.slices} is {place} and sees {before}."
    if server.kind == "serial":
        return "sees all latents before it." if query else "the first, nothing is decoded yet."
    if server.has_context(query):
        return "second pass, sees the whole first pass."
    return "first pass, coded without context; its row gathers context for others."


def _clip(value: int, low: int, high: int) -> int:
    return min(max(int(value), low), high)
