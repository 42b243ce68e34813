"""Reads the points inside any attention layer while a model runs, and changes nothing in what it computes."""

import fnmatch
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from entroformer_lib.errors import AttentionError
from entroformer_lib.models.attention import TopKAttention
from entroformer_lib.models.groupedmixer import CrossAttention, WindowAttention

Attention = TopKAttention | WindowAttention | CrossAttention
POINTS = ("content", "position", "scores", "selected", "probs")

# keep(tile [B, heads, q, n], query numbers [q]) -> what to keep of it, [B, heads, q, ...]
Keep = Callable[[Tensor, Tensor], Tensor]


def attention_points(model) -> dict[str, tuple[Attention, str]]:
    """Readable names of all points of a model: {"context.3.probs": (its attention layer, "probs"), ...}.

    Of a GroupedMixer's context: `inner.1.probs`, [B groups windows, heads, query, key] (or [B groups, heads, ...] with
    top-k), and `cross.1.probs`, [B sites, heads, slot, slot]; the windows' and the cross mixers' points are `scores`
    and `probs` alone.

    Raises:
        AttentionError: the model has no attention.
    """
    points = {
        f"{name}.{point}": (attention, point)
        for name, attention, relative in _layers(model)
        for point in POINTS
        if hasattr(attention, point) and (relative or point != "position")
    }
    if not points:
        raise AttentionError("This model has no attention to look at; Entroformers have.")
    return points


def _layers(model) -> Iterator[tuple[str, Attention, bool]]:
    """Every attention layer: its name, and whether it has relative positions."""
    context = getattr(model, "context_model", None)
    parts = {part: getattr(getattr(model, part, None), "blocks", ()) for part in ("h_a", "h_s")}
    for part, owners in {"context": [context], **parts}.items():
        stacks = [owner.stack for owner in owners if hasattr(owner, "stack")]
        blocks = [(block, len(stack.positions) > 0) for stack in stacks for block in stack.blocks]
        for layer, (block, relative) in enumerate(blocks):
            yield f"{part}.{layer}", block.attention, relative
    for layer, pair in enumerate(getattr(context, "pairs", ())):
        for kind in ("inner", "cross"):
            mixer = getattr(pair, kind)
            if mixer is not None:
                yield f"{kind}.{layer}", getattr(mixer, "attention", mixer), True


@contextmanager
def capture(model, *patterns: str, keep: Keep | None = None) -> Iterator[dict[str, Tensor]]:
    """Reads points of attention while a model runs, and changes nothing in what it computes.

        with capture(model, "context.*.probs") as maps:
            model(x)
        maps["context.3.probs"]  # [B, heads, n, n]: query, key

    Without gradients attention runs in tiles of heads and queries; they are put together here. The map of a layer that
    runs several times is that of its last run. The hooks are gone when the block ends, also by an exception.

    Args:
        patterns: names with wildcards, such as `context.3.scores`, `h_a.0.probs`, `*.selected`. The points are
            `content` and `position`, the two parts of the score, `scores`, their sum (-inf where not visible),
            `selected`, what the top-k leaves, and `probs`.
        keep: reduces each tile as it comes, where [n, n] maps would be too large.

    Raises:
        AttentionError: a pattern that matches nothing, with what is possible.
    """
    points = attention_points(model)
    chosen = [name for name in points if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    for pattern in patterns:
        if not fnmatch.filter(points, pattern):
            raise AttentionError(f"There is no point '{pattern}' in this model; there are {_in_words(points)}.")
    maps: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name in chosen:
            for handle in _Recorder(name, maps, keep).hooks(*points[name]):
                hooks.callback(handle.remove)
        yield maps


def _in_words(points) -> str:
    last: dict[str, int] = {}
    for name in points:
        part, layer, _ = name.split(".")
        last[part] = int(layer)
    parts = ", ".join(f"{part}.0 to {part}.{layer}" if layer else f"{part}.0" for part, layer in last.items())
    return f"{parts}, each followed by {', '.join('.' + p for p in POINTS if any(n.endswith(p) for n in points))}"


class _Recorder:
    """Puts the tiles of one point together: attention goes through the queries, then to the next group of heads."""

    def __init__(self, name: str, maps: dict[str, Tensor], keep: Keep | None):
        self.name, self.maps, self.keep = name, maps, keep
        self.groups: list[list[Tensor]] = []
        self.queries, self.next = 0, 0

    def hooks(self, attention: Attention, point: str) -> list:
        return [
            attention.register_forward_pre_hook(self.begin),
            getattr(attention, point).register_forward_hook(self.add),
            attention.register_forward_hook(self.finish),
        ]

    def begin(self, module, inputs) -> None:
        self.groups, self.queries, self.next = [], inputs[0].size(1), 0

    def add(self, module, inputs, tile: Tensor) -> None:
        if self.next == 0:
            self.groups.append([])
        numbers = torch.arange(self.next, self.next + tile.size(2), device=tile.device)
        tile = tile.detach()
        self.groups[-1].append(tile if self.keep is None else self.keep(tile, numbers))
        self.next = (self.next + len(numbers)) % self.queries

    def finish(self, module, inputs, output) -> None:
        self.maps[self.name] = torch.cat([torch.cat(group, dim=2) for group in self.groups], dim=1)
        self.groups = []
