"""What GroupedMixer's mixers look at in a picture: maps of attention, put back on the grid.

maps = mixer_maps(load_model("tiny-groupedmixer@0.013"), "photo.png")
maps.cross  # [layers, heads, G, G]: how much a slot looks at each earlier one
maps.inner(layer=1, slot=5, place=(7, 9))  # [heads, rows, columns]: where one token looks inside its group
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from entroformer_lib.codec import codec
from entroformer_lib.errors import AttentionError
from entroformer_lib.inspection.capture import capture
from entroformer_lib.models.config import EntroformerConfig
from entroformer_lib.models.groupedmixer import group_grid, group_order, windows


@dataclass(frozen=True)
class MixerMaps:
    """Attention of all mixers in one picture.

    picture: padded to the latent grid. grid: rows and columns of a group; a place of it is k_h x k_w latents.
    order: slice and phases of each group, as they are coded. cross: [layers, heads, G, G], slot that looks and slot
    looked at, the mean over all places; None without cross-group mixers. bits: what each group costs, [G].
    """

    picture: Image.Image
    config: EntroformerConfig
    grid: tuple[int, int]
    order: list[tuple[int, int, int]]
    cross: np.ndarray | None
    bits: np.ndarray
    _inner: list[Tensor]

    @property
    def latents_of_a_group(self) -> int:
        """How many latents a group has, those in the padding included."""
        return self.grid[0] * self.grid[1] * self.config.M // self.config.groups[0]

    def inner(self, layer: int, slot: int, place: tuple[int, int]) -> np.ndarray:
        """Where the token of a slot at a place (row, column) looks inside its group.  ->  [heads, rows, columns]

        Raises:
            AttentionError: no such layer, slot or place, or a model without inner-group mixers.
        """
        rows, columns = self.grid
        if not self._inner:
            raise AttentionError("This model has no inner-group mixers.")
        sizes = (len(self._inner), len(self.order), rows, columns)
        for name, value, size in zip(("layer", "slot", "row", "column"), (layer, slot, *place), sizes, strict=True):
            if not 0 <= value < size:
                raise AttentionError(f"There is no {name} {value}; there are 0 to {size - 1}.")
        token, probs = place[0] * columns + place[1], self._inner[layer]
        if self.config.inner == "top_k":
            return probs[slot, :, token].view(-1, rows, columns).numpy()
        side = self.config.window
        index, places = windows(rows, columns, side, side // 2 * (layer % 2))
        window, query = divmod(int(places[token]), side**2)
        found = torch.zeros(probs.size(1), rows * columns)
        inside = index[window] >= 0
        found[:, index[window][inside]] = probs[slot * len(index) + window, :, query][:, inside]
        return found.view(-1, rows, columns).numpy()


@torch.no_grad()
def mixer_maps(model, picture) -> MixerMaps:
    """Runs a GroupedMixer over a picture and keeps what its mixers look at.

    Args:
        picture: a PIL image, a path or an array, see `codec.open_picture`.

    Raises:
        AttentionError: the model is no GroupedMixer.
    """
    c = getattr(model, "config", None)
    if getattr(c, "context", None) != "grouped":
        raise AttentionError("This model has no mixers to look at; GroupedMixers have.")
    rgb, _ = codec.to_rgb(codec.open_picture(picture))
    x = codec.to_tensor(rgb, model.eval())
    kinds = [kind for kind, there in (("inner", c.inner != "none"), ("cross", c.cross)) if there]
    with capture(model, *(f"{kind}.*.probs" for kind in kinds)) as maps:
        likelihoods = model(x)["likelihoods"]["y"]
    size = tuple(likelihoods.shape[2:])
    found = {kind: [maps[f"{kind}.{i}.probs"].float().cpu() for i in range(c.context_layers)] for kind in kinds}
    cross = torch.stack([probs.mean(0) for probs in found["cross"]]).numpy() if c.cross else None
    order = group_order(c.groups, c.group_order)
    bits = _bits_of_groups(-likelihoods.double().log2().cpu()[0], c.groups, order)
    return MixerMaps(codec.to_picture(x), c, group_grid(*size, c.groups), order, cross, bits, found.get("inner", []))


def _bits_of_groups(bits: Tensor, counts: tuple[int, int, int], order: list[tuple[int, int, int]]) -> np.ndarray:
    """bits: [M, h, w]  ->  [G]"""
    k_c, k_h, k_w = counts
    slices = bits.unflatten(0, (k_c, -1))
    return np.array([float(slices[s, :, i::k_h, j::k_w].sum()) for s, i, j in order])
