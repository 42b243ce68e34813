"""What a GroupedMixer looks at when it predicts one group at one site of a picture, and what that costs in bits.

server = GroupServer(load_model("my-groupedmixer"), "photo.png")
query = server.query(site=100, channel_slice=1)
server.rows(query)  # the inner mixers over the picture: [layers, heads, n]
server.groups(query)  # the cross mixers at this place: [layers, heads, G, G]
server.inner(layer=1, slot=5, place=(7, 9))  # where one token looks inside its group: [heads, rows, columns]
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from entroformer_lib.errors import AttentionError
from entroformer_lib.inspection.capture import capture
from entroformer_lib.inspection.picture_server import PictureServer, batches
from entroformer_lib.inspection.row_server import RowServer
from entroformer_lib.models.groupedmixer import group_grid, windows


def server_of(model, picture, reference=None) -> PictureServer:
    """The server that fits a model; see `PictureServer` for the reference.

    Raises:
        AttentionError: a model that neither takes.
    """
    context = getattr(getattr(model, "config", None), "context", None)
    return (GroupServer if context in GroupServer.contexts else RowServer)(model, picture, reference)


class GroupServer(PictureServer):
    """Attention of a GroupedMixer's inner and cross mixers on one picture, from one float64 pass over all groups.

    A site belongs to one spatial phase and to all k_c channel slices, so to k_c groups, which are predicted one after
    the other.

    Which token belongs to which query? Group g is predicted by slot g, whose tokens hold the latents of group g - 1
    (the shift). So the query of a site at place p of its group is token p of slot g, and what an inner mixer looks at
    there are latents of group g - 1: rows are drawn at the sites of *its* phase, and `origin` is its site at place p.
    Slot 0 holds no latents; its rows, over the hyperprior's features, are drawn at the phase it predicts. A window
    ends at the group's border; where the phases do not divide the grid, some of its places lie outside of the picture
    and are left out.

    Memory: of each layer the inner mixers' probabilities, 4 heads window^2 bytes for each of the G tokens of a place,
    and the cross mixers', 4 heads G^2. A Kodak picture takes 13 MB with the tiny model and 90 MB with base, and while
    they are computed three times as much. Inner mixers that take the top k of a whole group keep all its n scores.

    What the absence of a latent costs is not measured here.

    Attributes:
        counts: k_c, k_h, k_w; order: slice and phases of each group, as they are coded; grid: rows and columns of a
            group, a place of which is k_h x k_w latents; cross: of every place, [places, layers, heads, G, G], or None
            without cross mixers: slot i predicts group i and holds group i - 1, slot 0 the start.
    """

    family, contexts, offer = "groups", ("grouped",), "only GroupedMixers have mixers to look at"

    @torch.inference_mode()
    def __init__(self, model, picture, reference=None):
        super().__init__(model, picture, reference)
        c, mixer = self.config, self.model.context_model
        self.counts, self.order = mixer.counts, mixer.order
        self.slices, k_h, k_w = self.counts
        self.channel_groups = [np.arange(c.M)[s] for s in mixer.slices]
        self.radius = c.radius * k_h if k_h == k_w else 0  # of the diamond as it lies on the picture's grid
        self.grid = group_grid(self.height, self.width, self.counts)
        self.row_entries = {"window": c.window**2, "top_k": c.top_k}.get(c.inner)
        known = {tuple(phase): step for step, (_, *phase) in reversed([*enumerate(self.order)])}
        self.when = np.array([known[row % k_h, column % k_w] for row, column in np.ndindex(self.height, self.width)])
        patterns = [f"{kind}.*.probs" for kind, there in (("inner", c.inner != "none"), ("cross", c.cross)) if there]
        with capture(self.model, *patterns) as maps:
            means, scales = self.model.distributions(self.y_hat, self.hyper, rate=self.rate)
        bits = -self.model.gaussian(self.y_hat, means, scales).log2()
        values, means, scales, bits = (v[0].flatten(1).T for v in (self.y_hat, means, scales, bits))  # [n, M]
        alone = torch.full_like(bits, torch.nan) if self._alone is None else self._alone
        self._facts = self._lines(values, means, scales, bits, alone)
        found = {name: probs.float().cpu().numpy() for name, probs in maps.items()}
        self._inner = [found[f"inner.{layer}.probs"] for layer in range(self.layers)] if c.inner != "none" else []
        self.cross = np.stack([found[f"cross.{i}.probs"] for i in range(self.layers)], axis=1) if c.cross else None

    # -- the grid --

    def query(self, site: int, channel_slice: int) -> int:
        """The number of a site and a channel slice.

        Raises:
            AttentionError: one of them does not exist.
        """
        query = site * self.slices + channel_slice
        if not 0 <= channel_slice < self.slices:
            raise AttentionError(f"There is no channel slice {channel_slice}; there are 0 to {self.slices - 1}.")
        self.check(query)
        return query

    def step(self, query: int) -> int:
        """The number of the query's group, in the order of coding."""
        site, channel_slice = divmod(query, self.slices)
        (row, column), (_, k_h, k_w) = divmod(site, self.width), self.counts
        return self.order.index((channel_slice, row % k_h, column % k_w))

    def place(self, query: int) -> int:
        """The place of the query's site in its group, in raster order."""
        row, column = divmod(query // self.slices, self.width)
        return row // self.counts[1] * self.grid[1] + column // self.counts[2]

    def origin(self, query: int) -> int:
        """The site of the latents that the predicting token holds, at the query's place in the group before; its own
        in the first group, and the nearest in the picture where the grid ends before."""
        phase = self._held_phase(self.step(query))
        row, column = divmod(query // self.slices, self.width)
        row, column = row - row % self.counts[1] + phase[0], column - column % self.counts[2] + phase[1]
        return min(row, self.height - 1) * self.width + min(column, self.width - 1)

    def _held_phase(self, slot: int) -> tuple[int, int]:
        """Row and column phase of what the tokens of a slot hold; in slot 0, of what they predict."""
        return self.order[max(slot - 1, 0)][1:]

    # -- answers --

    def inner(self, layer: int, slot: int, place: tuple[int, int]) -> np.ndarray:
        """Where the token of a slot at a place (row, column) looks inside its group.  ->  [heads, rows, columns]

        Raises:
            AttentionError: no such layer, slot or place, or a model without inner mixers.
        """
        if not self._inner:
            raise AttentionError("This model has no inner-group mixers.")
        sizes = (self.layers, len(self.order), *self.grid)
        for name, value, size in zip(("layer", "slot", "row", "column"), (layer, slot, *place), sizes, strict=True):
            if not 0 <= value < size:
                raise AttentionError(f"There is no {name} {value}; there are 0 to {size - 1}.")
        token, probs = place[0] * self.grid[1] + place[1], self._inner[layer]
        if self.config.inner == "top_k":
            return probs[slot, :, token].reshape(-1, *self.grid)
        side = self.config.window
        index, places = windows(*self.grid, side, self.model.context_model.pairs[layer].inner.shift)
        window, query = divmod(int(places[token]), side**2)
        keys, found = index[window].numpy(), np.zeros((self.heads, self.grid[0] * self.grid[1]), np.float32)
        found[:, keys[keys >= 0]] = probs[slot * len(index) + window, :, query][:, keys >= 0]
        return found.reshape(-1, *self.grid)

    def rows(self, query: int, k: int | None = None) -> np.ndarray:
        """The inner mixers' attention of one query over the picture, see above: [layers, heads, n]. k is not used."""
        self.check(query)
        slot, (_, k_h, k_w) = self.step(query), self.counts
        row, column = self._held_phase(slot)
        out = np.zeros((self.layers, self.heads, self.height, self.width))
        phase = out[..., row::k_h, column::k_w]
        for layer in range(self.layers):
            inside = self.inner(layer, slot, divmod(self.place(query), self.grid[1]))
            phase[layer] = inside[:, : phase.shape[-2], : phase.shape[-1]]
        return out.reshape(self.layers, self.heads, self.n)

    def groups(self, query: int) -> np.ndarray:
        """The cross mixers' attention at the query's place: [layers, heads, slot, slot]. The query's own row is that of
        its group.

        Raises:
            AttentionError: a model without cross mixers.
        """
        self.check(query)
        if self.cross is None:
            raise AttentionError("This GroupedMixer has no cross mixers.")
        return self.cross[self.place(query)].astype(float)

    def many(self, queries: Sequence[int], k: int | None = None) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Many queries in batches, see `PictureServer.many`. Without a reference `alone` are not numbers: there is no
        switching off the context of groups, since only the first is ever predicted from the hyperprior."""
        for part in batches(queries):
            yield part, np.stack([self.rows(q) for q in part]), self._facts[np.array(part) // self.slices]

    def _in_names(self, query: int, line: np.ndarray) -> dict:
        """A line of facts with names; of each slice also the group it is coded in."""
        site, channel_slice = divmod(query, self.slices)
        named = super()._in_names(query, line)
        for number, group in enumerate(named["groups"]):
            group["group"] = self.step(site * self.slices + number)
        return {**named, "slice": channel_slice}

    def bits(self) -> np.ndarray:
        """Bits of every latent, summed over its channels: [h, w]."""
        return self._facts[:, 0].reshape(self.height, self.width)

    def overview(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Bits of every query, and `alone`, those of the reference, or None: twice [n * slices]."""
        return self._facts[:, 5::5].ravel(), None if self._alone is None else self._facts[:, 6::5].ravel()

    def bits_of_groups(self) -> np.ndarray:
        """What each group costs: [G]."""
        slices, (_, k_h, k_w) = self._facts[:, 5::5].reshape(self.height, self.width, -1), self.counts
        return np.array([slices[i::k_h, j::k_w, s].sum() for s, i, j in self.order])

    @property
    def latents_of_a_group(self) -> int:
        """How many latents a group has, those in the padding included."""
        return self.grid[0] * self.grid[1] * len(self.channel_groups[0])
