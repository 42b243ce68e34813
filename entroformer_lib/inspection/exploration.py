"""What the attention explorer shows, without any widget: a selection, and pure methods that say what belongs to it.

The numbers come from a server (`picture_server.PictureServer`), which is handed in; nothing here runs a model or draws
a pixel. What a mode shows is a `Mode`: words with holes and a list of maps. The widget and the static figures show what
`Exploration` makes of it; the exported page holds the same modes and fills them from stored numbers.
"""

import functools
import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
import traitlets

from entroformer_lib.errors import AttentionError

MEAN = -1  # as head: the mean over all heads
DENSE = 0  # as k: dense attention
USUAL_KS = (8, 16, 32, 64)  # figure 10
MODES = ("head", "heads", "ks", "pair", "cost", "groups")
SELECTION = ("layer", "head", "k", "other_k", "row", "column", "slice", "mode")
REMEMBERED = 64  # answers of a server


@dataclass(frozen=True)
class Map:
    """A map of a mode.

    title: with holes, see `Exploration.filled`; kind: see `Panel`; head, k: a number, or the part of the selection that
    says it.
    """

    title: str
    kind: str = "attention"
    head: int | str = "head"
    k: int | str = "k"


@dataclass(frozen=True)
class Mode:
    """What is shown of a selection: its maps, and in words with holes the selection (`what`) and what a model's bits
    are (`bits`)."""

    maps: tuple[Map, ...]
    what: str
    bits: str


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


def modes_of(server, ks: list[int]) -> dict[str, Mode]:
    """What can be shown of a server, by name."""
    return _modes_of_groups(server) if server.family == "groups" else _modes_of_rows(server, ks)


def _modes_of_rows(server, ks: list[int]) -> dict[str, Mode]:
    one = Map("attention, layer {layer}, {head}, {k}")
    cost = Map("cost of its absence, in bits", "cost")
    several, two = (tuple(Map("{k}: {bits} bits", k=k) for k in chosen) for chosen in (ks, ("k", "other_k")))
    bits = "{bits} bits with context, {alone} bits with the hyperprior only."
    both = "{bits} bits with {k}, {other_bits} bits with {other_k}, {alone} bits with the hyperprior only."
    return {
        "head": Mode((one,), "Layer {layer}, {head}, {k}.", bits),
        "heads": Mode(_every_head(server), "Layer {layer}, every head, {k}.", bits),
        "ks": Mode(several, "Layer {layer}, {head}, every k.", bits),
        "pair": Mode(two, "Layer {layer}, {head}, {k} beside {other_k}.", both),
        "cost": Mode((one, cost), "Layer {layer}, {head}, {k}, beside the measured cost.", bits),
    }


def _modes_of_groups(server) -> dict[str, Mode]:
    """The inner mixer over the picture, beside it the cross mixer's groups; or every head of one of the two."""
    inner = Map("inner mixer, layer {layer}, {head}", k=DENSE)
    cross = Map("cross mixer, layer {layer}, {head}", "groups", k=DENSE)
    bits = "{part} bits, with the other slices {bits}."
    modes = {
        "head": Mode((inner,) if server.cross is None else (inner, cross), "Layer {layer}, {head}.", bits),
        "heads": Mode(_every_head(server, k=DENSE), "Layer {layer}, every head.", bits),
    }
    if server.cross is not None:
        every = _every_head(server, kind="groups", k=DENSE)
        modes["groups"] = Mode(every, "Layer {layer}, every head of the cross mixer.", bits)
    return modes


def _every_head(server, **more) -> tuple[Map, ...]:
    return tuple(Map("{head}", head=head, **more) for head in (*range(server.heads), MEAN))


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
    mode = traitlets.Enum(MODES, "head")
    revision = traitlets.Int(0)

    def __init__(self, server, other=None, **selection):
        self.servers = [server] if other is None else [server, other]
        if other is not None and (other.height, other.width) != (server.height, server.width):
            raise AttentionError("Two models side by side need the same grid of latents; these have different ones.")
        self._quiet, self._asked = True, functools.lru_cache(REMEMBERED)(_ask)
        super().__init__()
        self.ks = offered_ks(*self.servers)
        self._modes = [modes_of(each, self.ks) for each in self.servers]
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

    @traitlets.validate("layer", "head", "k", "other_k", "row", "column", "slice")
    def _clip(self, proposal):
        """What is too high or too low becomes the nearest that some server has."""
        first, name = self.servers[0], proposal.trait.name
        ends = {"head": (MEAN, "heads"), "layer": (0, "layers"), "row": (0, "height"), "column": (0, "width")}
        if name in ("k", "other_k"):
            return min(max(proposal.value, DENSE), first.n)
        low, counted = ends.get(name, (0, "slices"))
        return min(max(proposal.value, low), max(getattr(server, counted) for server in self.servers) - 1)

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
    def modes(self) -> dict[str, Mode]:
        """What can be shown of all servers; where they differ, in the words for rows of attention."""
        first = min(range(len(self.servers)), key=lambda number: self.servers[number].family == "groups")
        return {name: mode for name, mode in self._modes[first].items() if all(name in m for m in self._modes)}

    def query(self, server) -> int:
        """What a server is asked: the chosen site, or of a GroupedMixer this site's channel slice."""
        return self.site * server.slices + min(self.slice, server.slices - 1)

    # -- what belongs to it --

    def rows(self, server, k: int) -> np.ndarray:
        """Attention of the chosen latent in all layers and heads: [layers, heads, n]."""
        return self._asked(server, "row_and_facts", self.query(server), k)[0]

    def facts_of(self, server, k: int) -> dict:
        """Bits and channel groups of the chosen latent, see `PictureServer.facts`."""
        return self._asked(server, "row_and_facts", self.query(server), k)[1]

    def costs(self, server) -> tuple[np.ndarray, np.ndarray]:
        """Positions and what the absence of each costs the chosen latent in bits."""
        return self._asked(server, "costs", self.query(server), self.k)

    def panels(self) -> list[Panel]:
        """The maps of the present mode, the second model's after the first's."""
        return [self._panel(number, one) for number, modes in enumerate(self._modes) for one in modes[self.mode].maps]

    def _panel(self, number: int, one: Map) -> Panel:
        server, query = self.servers[number], self.query(self.servers[number])
        layer, head, k = min(self.layer, server.layers - 1), self._chosen(one.head), self._chosen(one.k)
        head = min(head, server.heads - 1)
        who = f"{server.name}: " if len(self.servers) > 1 else ""
        title = who + self.filled(one.title, server, layer=layer, head=head, k=k)
        if one.kind == "groups":
            values, row = of_head(server.groups(query)[layer], head), (server.step(query), 0)
            seen = np.tri(len(values), dtype=bool)
            return Panel(title, one.kind, values, seen, np.zeros_like(seen), row, row, 0, number)
        if one.kind == "cost":
            values, selected = np.zeros(server.n), np.zeros(server.n, dtype=bool)
            positions, bits = self.costs(server)
            values[positions], selected[positions] = bits, True
        else:
            values = of_head(self.rows(server, k)[layer], head)
            selected = (values > 0) & (k != DENSE)
        shape, origin = (server.height, server.width), divmod(server.origin(query), server.width)
        maps = (v.reshape(shape) for v in (values, server.decoded(query), selected))
        return Panel(title, one.kind, *maps, (self.row, self.column), origin, server.radius, number)

    def _chosen(self, value: int | str) -> int:
        return getattr(self, value) if isinstance(value, str) else value

    def scatter(self, number: int = 0) -> dict | None:
        """In the mode `cost`, for the first or second model: attention (fraction) and cost (bits) of every hidden
        position, and Spearman's rank correlation, None where it does not exist."""
        server = self.servers[number]
        if self.mode != "cost":
            return None
        layer, head = min(self.layer, server.layers - 1), min(self.head, server.heads - 1)
        (positions, bits), rows = self.costs(server), self.rows(server, self.k)
        rho = rank_correlations(rows, positions, bits)[layer, head]
        attention = of_head(rows[layer], head)[positions]
        return {"attention": attention, "bits": bits, "rho": None if np.isnan(rho) else float(rho)}

    def facts(self) -> list[dict]:
        """The side panel: name, bits, hyper_bits and the channel groups, see `PictureServer.facts`. One entry per
        model, in the mode `pair` one per model and k."""
        pair = self.mode == "pair"
        return [
            {"name": f"{s.name}, {k_in_words(k)}" if pair else s.name, "model": number, **self.facts_of(s, k)}
            for number, s in enumerate(self.servers)
            for k in ((self.k, self.other_k) if pair else (self.k,))
        ]

    def caption(self) -> str:
        """The selection in words, with the bits of each model."""
        chosen = {"layer": self.layer, "head": self.head, "k": self.k}
        where = f"Latent row {self.row}, column {self.column}:"
        what = self.filled(self.modes[self.mode].what, self.servers[0], **chosen)
        seen = [server.in_words(self.query(server)) for server in self.servers]
        bits = [self.filled(m[self.mode].bits, s, **chosen) for s, m in zip(self.servers, self._modes, strict=True)]
        if len(self.servers) == 1:
            return f"{where} {seen[0]} {what} {bits[0]}"
        each = (f"{s.name}: {a} {b}" for s, a, b in zip(self.servers, seen, bits, strict=True))
        return f"{where} {what} {' '.join(each)}"

    def filled(self, words: str, server, layer: int, head: int, k: int) -> str:
        """Fills the holes in the words of a mode: {layer}, {head}, {k} and {other_k}; {bits} with this k, {other_bits}
        with the other, {alone} with the hyperprior only, and {part} of them in the chosen channel slice."""
        facts = self.facts_of
        fill = {
            "layer": lambda: str(layer),
            "head": lambda: head_in_words(head),
            "k": lambda: k_in_words(k),
            "other_k": lambda: k_in_words(self.other_k),
            "bits": lambda: bits_in_words(facts(server, k)["bits"]),
            "other_bits": lambda: bits_in_words(facts(server, self.other_k)["bits"]),
            "alone": lambda: bits_in_words(facts(server, k)["hyper_bits"]),
            "part": lambda: bits_in_words(facts(server, k)["groups"][facts(server, k)["slice"]]["bits"]),
        }
        return re.sub(r"\{(\w+)\}", lambda hole: fill[hole[1]](), words)


def of_head(maps: np.ndarray, head: int) -> np.ndarray:
    """One head's map, or the mean.  maps: [heads, ...]"""
    return maps.mean(0) if head == MEAN else maps[head]


def rank_correlations(rows: np.ndarray, positions: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of attention with the bits that the absence of positions costs, for every layer and
    head, the mean over heads last; not a number where one of both does not vary.

    rows: [layers, heads, n]; positions, bits: [J]  ->  [layers, heads + 1]
    """
    layers, heads, _ = rows.shape
    maps = np.concatenate((rows, rows.mean(1, keepdims=True)), axis=1)[..., positions]
    table = pd.DataFrame([*maps.reshape(layers * (heads + 1), -1), bits]).T
    return table.corr("spearman", min_periods=3).to_numpy()[:-1, -1].reshape(layers, heads + 1)


def own_k(server) -> int:
    """The k that the model was built with, DENSE for none."""
    return DENSE if server.default_k is None else server.default_k


def offered_ks(*servers) -> list[int]:
    """The k on offer: those of figure 10, the models' own, and dense as 0, the last."""
    own = [own_k(server) for server in servers if server.family == "rows"]  # windows have no k
    return [*sorted({*(USUAL_KS if own else ()), *own} - {DENSE}), DENSE]


def bits_in_words(bits: float) -> str:
    """One decimal, rounded as the page rounds its stored float32."""
    return f"{np.float32(bits):.1f}"


def head_in_words(head: int) -> str:
    """`head 2`, or `mean over heads`."""
    return "mean over heads" if head == MEAN else f"head {head}"


def k_in_words(k: int) -> str:
    """`k = 16`, or `dense`."""
    return f"k = {k}" if k else "dense"


def _ask(server, question: str, query: int, k: int):
    return getattr(server, question)(query, k or None)
