"""What a GroupedMixer looks at when it predicts one group at one site of a picture, and what that costs in bits.

    server = GroupServer(load_model("my-groupedmixer"), "photo.png")
    query = server.query(site=100, channel_slice=1)
    server.rows(query)  # the inner mixers over the picture: [layers, heads, n]
    server.groups(query)  # the cross mixers at this place: [layers, heads, G, G]

It offers the explorer what `RowServer` offers it for serial and parallel models; `server_of` makes the one that fits.
"""

import copy
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from entroformer_lib.errors import AttentionError
from entroformer_lib.inspection.capture import attention_points, capture
from entroformer_lib.inspection.row_server import RowServer, check_layer
from entroformer_lib.inspection.wide_latents import wide_latents
from entroformer_lib.models.entropy_model import PerGroup, ToldTheRate
from entroformer_lib.models.groupedmixer import group_grid, windows
from entroformer_lib.models.priors import LIKELIHOOD_FLOOR, gaussian_mass

QUERIES_AT_ONCE = 128


def server_of(model, picture) -> "RowServer | GroupServer":
    """The server that fits a model.

    Raises:
        AttentionError: a model that neither takes.
    """
    grouped = getattr(getattr(model, "config", None), "context", None) == "grouped"
    return (GroupServer if grouped else RowServer)(model, picture)


class GroupServer:
    """Attention of a GroupedMixer's windows and cross mixers on one picture, from one float64 pass over all groups.

    A site belongs to one spatial phase and to all k_c channel slices, so to k_c groups, which are predicted one after
    the other. A *query* is a site and one of its slices: query = site * slices + slice.

    Which token belongs to which query? Group g is predicted by slot g, whose tokens hold the latents of group g - 1
    (the shift). So the query of a site at place p of its group is token p of slot g, and what an inner mixer looks at
    there are latents of group g - 1: rows are drawn at the sites of *its* phase, and `origin` is its site at place p.
    Slot 0 holds no latents; its rows, over the hyperprior's features, are drawn at the phase it predicts. A window
    ends at the group's border; where the phases do not divide the grid, some of its places lie outside of the picture
    and are left out.

    Memory: of each layer the inner mixers' probabilities, 4 heads window^2 bytes for each of the G tokens of a place,
    and the cross mixers', 4 heads G^2. A Kodak picture takes 13 MB with the tiny model and 90 MB with base, and while
    they are computed three times as much.

    What the absence of a latent costs is not measured here.

    Args:
        model: an Entroformer whose context is a GroupedMixer with windows.
        picture: a PIL image, a path or an array, see `codec.open_picture`.

    Raises:
        AttentionError: another model.
    """

    kind = "grouped"
    default_k = None  # windows have no k

    @torch.inference_mode()
    def __init__(self, model, picture):
        attention_points(model)  # a sentence for what is no Entroformer
        c = self.config = model.config
        if c.context != "grouped":
            raise AttentionError(f"This model's context is {c.context}; groups are those of a GroupedMixer.")
        if c.inner != "window":
            kind = "no inner mixer" if c.inner == "none" else "an inner mixer that takes the top k of a whole group"
            raise AttentionError(f"This GroupedMixer has {kind}; the explorer shows those with windows.")
        scene = wide_latents(model, picture)
        self.name, self.picture, self.size = scene.name, scene.picture, scene.size
        self.layers, self.heads = c.context_layers, c.heads
        mixer, parameters = (copy.deepcopy(p).eval().double() for p in (model.context_model, model.entropy_parameters))
        self.counts, self.order = mixer.counts, mixer.order
        self.slices = self.counts[0]
        # The diamond of relative positions, as it lies on the picture's grid:
        self.radius = c.radius * self.counts[1] if self.counts[1] == self.counts[2] else 0
        self.height, self.width = scene.y_hat.shape[-2:]
        self._grid = group_grid(self.height, self.width, self.counts)
        with capture(SimpleNamespace(context_model=mixer), "*.probs") as maps:
            model_of = PerGroup(mixer, parameters)
            model_of = model_of if scene.rate is None else ToldTheRate(model_of, scene.rate)
            means, log_scales = model_of.predict(scene.y_hat, scene.hyper)
        scales = parameters.bounded(log_scales).exp()
        bits = -gaussian_mass(scene.y_hat, means, scales).clamp(min=LIKELIHOOD_FLOOR).log2()
        slices = (v[0].flatten(1).view(self.slices, -1, self.n) for v in (scene.y_hat, means, scales, bits))
        values, means, scales, bits = slices  # [k_c, m, n]
        sizes = (v.square().mean(1).sqrt() for v in (values, means, scales))
        self._facts = torch.stack([*sizes, bits.sum(1)]).permute(2, 1, 0).cpu().numpy()  # [n, k_c, 4]
        index = [windows(*self._grid, c.window, pair.inner.shift) for pair in mixer.pairs]
        self._keys = [keys[place // keys.size(1)].numpy() for keys, place in index]  # [places, window^2], -1: empty
        self._inner = [
            _of_places(maps[f"inner.{layer}.probs"], index[layer][1], len(self.order)) for layer in range(self.layers)
        ]  # [G, places, heads, window^2]
        self._cross = None
        if c.cross:
            cross = [maps[f"cross.{layer}.probs"].float() for layer in range(self.layers)]
            self._cross = torch.stack(cross, dim=1).cpu().numpy()  # [places, layers, heads, G, G]

    # -- the grid --

    @property
    def n(self) -> int:
        """Number of latent sites."""
        return self.height * self.width

    @property
    def row_entries(self) -> int:
        """Places in a window: so many entries of a row can be more than zero."""
        return self._keys[0].shape[1]

    @property
    def has_groups(self) -> bool:
        """Whether there are cross mixers."""
        return self._cross is not None

    def query(self, site: int, channel_slice: int) -> int:
        """The number of a site and a channel slice.

        Raises:
            AttentionError: one of them does not exist.
        """
        query = site * self.slices + channel_slice
        if not 0 <= channel_slice < self.slices:
            raise AttentionError(f"There is no channel slice {channel_slice}; there are 0 to {self.slices - 1}.")
        self._check(query)
        return query

    def group(self, query: int) -> int:
        """The number of the query's group, in the order of coding."""
        site, channel_slice = divmod(query, self.slices)
        (row, column), (_, k_h, k_w) = divmod(site, self.width), self.counts
        return self.order.index((channel_slice, row % k_h, column % k_w))

    def place(self, query: int) -> int:
        """The place of the query's site in its group, in raster order."""
        row, column = divmod(query // self.slices, self.width)
        return row // self.counts[1] * self._grid[1] + column // self.counts[2]

    def has_context(self, query: int) -> bool:
        """Whether other latents were coded before."""
        return self.group(query) > 0

    def origin(self, query: int) -> int:
        """The site of the latents that the predicting token holds, at the query's place in the group before; its own
        in the first group, and the nearest in the picture where the grid ends before."""
        row, column = self._sites_of(np.array([self.place(query)]), self.group(query))
        return int(min(row[0], self.height - 1) * self.width + min(column[0], self.width - 1))

    def decoded(self, query: int) -> np.ndarray:
        """Sites of which at least one channel slice is known when the query is predicted: bool [n]."""
        _, k_h, k_w = self.counts
        known = np.zeros((self.height, self.width), dtype=bool)
        for _, row, column in self.order[: self.group(query)]:
            known[row::k_h, column::k_w] = True
        return known.ravel()

    def _sites_of(self, places: np.ndarray, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of what the tokens of a slot hold; in slot 0, of what they predict."""
        _, row, column = self.order[max(slot - 1, 0)]
        down, right = np.divmod(places, self._grid[1])
        return down * self.counts[1] + row, right * self.counts[2] + column

    # -- answers --

    def rows(self, query: int, k: int | None = None) -> np.ndarray:
        """The inner mixers' attention of one query over the picture, see above: [layers, heads, n]. k is not used."""
        self._check(query)
        slot, place = self.group(query), self.place(query)
        out = np.zeros((self.layers, self.heads, self.n))
        for layer, (keys, probs) in enumerate(zip(self._keys, self._inner, strict=True)):
            row, column = self._sites_of(keys[place], slot)
            inside = (keys[place] >= 0) & (row < self.height) & (column < self.width)
            out[layer][:, (row * self.width + column)[inside]] = probs[slot, place][:, inside]
        return out

    def groups(self, query: int) -> np.ndarray:
        """The cross mixers' attention at the query's place: [layers, heads, slot, slot]. Slot i predicts group i and
        holds group i - 1, slot 0 the start; the query's own row is that of its group.

        Raises:
            AttentionError: a model without cross mixers.
        """
        self._check(query)
        if not self.has_groups:
            raise AttentionError("This GroupedMixer has no cross mixers.")
        return self._cross[self.place(query)].astype(float)

    def bits(self) -> np.ndarray:
        """Bits of every latent, summed over its channels: [h, w]."""
        return self._facts[..., 3].sum(1).reshape(self.height, self.width)

    def facts(self, query: int, k: int | None = None) -> dict:
        """The side panel: bits of the whole site; of each channel slice the group it is coded in, root mean squares of
        values, predicted means and scales, and bits. hyper_bits are None: only the first group is predicted from the
        hyperprior alone, the others never are."""
        self._check(query)
        site, channel_slice = divmod(query, self.slices)
        names = ("value", "mean", "scale", "bits")
        groups = [
            {"channels": self.config.M // self.slices, **dict(zip(names, line.tolist(), strict=True))}
            | {"hyper_bits": None, "group": self.group(site * self.slices + s)}
            for s, line in enumerate(self._facts[site])
        ]
        total = float(self._facts[site, :, 3].sum())
        return {"bits": total, "hyper_bits": None, "slice": channel_slice, "groups": groups}

    def row_and_facts(self, query: int, k: int | None = None) -> tuple[np.ndarray, dict]:
        """`rows` and `facts` of one query."""
        return self.rows(query), self.facts(query)

    def many(self, queries: Sequence[int], k: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Many queries in batches: (queries [q], rows [q, layers, heads, n], facts [q, 2 + 5 slices]), the facts as
        `RowServer.many` orders them; what is None is not a number there."""
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            part = np.array(queries[start : start + QUERIES_AT_ONCE])
            lines = np.full((len(part), 2 + 5 * self.slices), np.nan)
            facts = self._facts[part // self.slices]  # [q, k_c, 4]
            lines[:, 0] = facts[..., 3].sum(1)
            lines[:, 2:].reshape(len(part), self.slices, 5)[..., :4] = facts
            yield part, np.stack([self.rows(query) for query in part]), lines

    def all_groups(self) -> np.ndarray:
        """`groups` of every place: [places, layers, heads, G, G]."""
        return self._cross

    @property
    def channel_groups(self) -> list[np.ndarray]:
        """The channels of each slice."""
        return np.array_split(np.arange(self.config.M), self.slices)

    def check_layer(self, layer: int, head: int = 0) -> None:
        """`check_layer` of this server."""
        check_layer(self, layer, head)

    def _check(self, query: int) -> None:
        if not 0 <= query < self.n * self.slices:
            raise AttentionError(
                f"There is no latent {query // self.slices}; the grid has {self.height} x {self.width}, so 0 to "
                f"{self.n - 1}."
            )


def _of_places(probs: Tensor, place: Tensor, groups: int) -> np.ndarray:
    """Rows of windows in the order of places.  probs: [G windows, heads, s, s], place: [places]  ->
    [G, places, heads, s]"""
    rows = probs.float().transpose(1, 2).unflatten(0, (groups, -1)).flatten(1, 2)  # [G, windows s, heads, s]
    return rows[:, place.to(rows.device)].cpu().numpy()
