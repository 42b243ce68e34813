"""Reads the points inside any attention layer while a model runs, or changes them."""

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from entroformer_lib.errors import AttentionError
from entroformer_lib.models.attention import TopKAttention
from entroformer_lib.models.groupedmixer import CrossAttention, WindowAttention

Attention = TopKAttention | CrossAttention
POINTS = ("content", "position", "scores", "selected", "probs")
OUTPUTS = "outputs"  # what each head has gathered: a point for `intervene` alone

# keep(tile [B, heads, q, n], query numbers [q]) -> what to keep of it, [B, heads, q, ...]
Keep = Callable[[Tensor, Tensor], Tensor]
# change(tile [B, heads, q, n or d], numbers of its heads [heads], of its queries [q]) -> what takes its place
Change = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention_points(model) -> dict[str, tuple[Attention, str]]:
    """Readable names of all points of a model: {"context.3.probs": (its attention layer, "probs"), ...}.

    Of a GroupedMixer's context: `inner.1.probs`, [B groups windows, heads, query, key] (or [B groups, heads, ...] with
    top-k), and `cross.1.probs`, [B sites, heads, slot, slot]; the cross mixers' points are `scores` and `probs` alone.

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
    chosen = {name for pattern in patterns for name in _matching(points, pattern)}
    maps: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name in points:
            if name in chosen:
                for handle in _Recorder(name, maps, keep).hooks(*points[name]):
                    hooks.callback(handle.remove)
        yield maps


@contextmanager
def intervene(model, changes: Mapping[str, Change]) -> Iterator[None]:
    """Changes points of attention while a model runs; afterwards, also by an exception, it is as before.

    What are two heads worth, in bits?

        def off(tile, heads, queries):
            return tile * (heads > 1)[:, None, None]

        before = model.estimated_bits(y)["y"].sum()
        with intervene(model, {"context.3.outputs": off}):
            after = model.estimated_bits(y)["y"].sum()

    A function is called with a tile [B, heads, q, n], the numbers of its heads [heads] and of its queries [q], and
    gives what takes the tile's place. Without gradients attention runs in tiles of heads and queries, so a function may
    not take what it gets for all of them. Query numbers count the tokens that come into the layer; of a GroupedMixer's
    windows and cross mixers, the tokens of a window, and the slots at one place. Scores are -inf where a key is not
    visible, so they are not to be multiplied by 0.

    The coder is not reached: its integers are computed elsewhere. A row server keeps keys and values of what it has
    been asked; so it is made before the block, and `RowServer.total_bits` forgets them.

    Args:
        changes: names with wildcards, as in `capture`, and the function for each. Beside `capture`'s points there is
            `outputs`, what each head has gathered before the heads are mixed: [B, heads, q, d] for all queries at once.
            Where several names match a point, the functions follow each other.

    Raises:
        AttentionError: a name that matches nothing, with what is possible; a function that gives no tensor of the
            tile's shape, numbers that are none, or scores of which a query has none left.
    """
    points = attention_points(model)
    points |= {f"{name}.{OUTPUTS}": (attention, OUTPUTS) for name, attention, _ in _layers(model)}
    with ExitStack() as hooks:
        for pattern, change in changes.items():
            for name in _matching(points, pattern):
                for handle in _Intervention(name, change).hooks(*points[name]):
                    hooks.callback(handle.remove)
        yield


def _matching(points, pattern: str) -> list[str]:
    names = [name for name in points if fnmatch.fnmatchcase(name, pattern)]
    if not names:
        raise AttentionError(f"There is no point '{pattern}' in this model; there are {_in_words(points)}.")
    return names


def _in_words(points) -> str:
    last: dict[str, int] = {}
    for name in points:
        part, layer, _ = name.split(".")
        last[part] = int(layer)
    parts = ", ".join(f"{part}.0 to {part}.{layer}" if layer else f"{part}.0" for part, layer in last.items())
    ends = (f".{p}" for p in (*POINTS, OUTPUTS) if any(n.endswith(f".{p}") for n in points))
    return f"{parts}, each followed by {', '.join(ends)}"


class _Tiles:
    """Counts the tiles of one layer: attention goes through the queries, then to the next group of heads."""

    def begin(self, module, inputs) -> None:
        whole = isinstance(module, WindowAttention | CrossAttention)  # of which nothing is tiled
        self.queries, self.query, self.head = None if whole else inputs[0].size(1), 0, 0

    def numbers(self, tile: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the heads and the queries of the next tile, [B, heads, q, n]."""
        heads = torch.arange(self.head, self.head + tile.size(1), device=tile.device)
        queries = torch.arange(self.query, self.query + tile.size(2), device=tile.device)
        self.query += len(queries)
        if self.queries in (None, self.query):
            self.head, self.query = self.head + len(heads), 0
        return heads, queries


class _Recorder(_Tiles):
    """Puts the tiles of one point together."""

    def __init__(self, name: str, maps: dict[str, Tensor], keep: Keep | None):
        self.name, self.maps, self.keep = name, maps, keep
        self.groups: list[list[Tensor]] = []

    def hooks(self, attention: Attention, point: str) -> list:
        return [
            attention.register_forward_pre_hook(self.begin),
            getattr(attention, point).register_forward_hook(self.add),
            attention.register_forward_hook(self.finish),
        ]

    def add(self, module, inputs, tile: Tensor) -> None:
        if self.query == 0:
            self.groups.append([])
        _, queries = self.numbers(tile)
        tile = tile.detach()
        self.groups[-1].append(tile if self.keep is None else self.keep(tile, queries))

    def finish(self, module, inputs, output) -> None:
        self.maps[self.name] = torch.cat([torch.cat(group, dim=2) for group in self.groups], dim=1)
        self.groups = []


class _Intervention(_Tiles):
    """Puts what a function gives in the place of each tile of one point."""

    def __init__(self, name: str, change: Change):
        self.name, self.change = name, change

    def hooks(self, attention: Attention, point: str) -> list:
        self.heads = attention.heads
        if point == OUTPUTS:
            return [attention.out.register_forward_pre_hook(self.outputs)]
        inside = getattr(attention, point)
        return [attention.register_forward_pre_hook(self.begin), inside.register_forward_hook(self.replace)]

    def replace(self, module, inputs, tile: Tensor) -> Tensor:
        return self.changed(tile, *self.numbers(tile))

    def outputs(self, module, inputs) -> tuple[Tensor]:
        """inputs: those of the layer that mixes the heads, [..., q, D]"""
        gathered = inputs[0].unflatten(-1, (self.heads, -1)).transpose(-2, -3)  # [..., heads, q, d]
        numbers = (torch.arange(gathered.size(i), device=gathered.device) for i in (-3, -2))
        return (self.changed(gathered, *numbers).transpose(-2, -3).flatten(-2),)

    def changed(self, tile: Tensor, heads: Tensor, queries: Tensor) -> Tensor:
        found = self.change(tile, heads, queries)
        if not isinstance(found, Tensor) or found.shape != tile.shape:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise AttentionError(f"The function for '{self.name}' gave {shape} for a tile of {list(tile.shape)}.")
        nothing = -torch.inf
        whole = self.name.endswith((".probs", f".{OUTPUTS}"))  # no key is hidden here by an infinite number
        wrong = ~found.isfinite() if whole else found.isnan() | (found == torch.inf)
        if wrong.any() or ((found == nothing).all(-1) & (tile > nothing).any(-1)).any():
            raise AttentionError(f"The function for '{self.name}' gave numbers that are none, or left a query no key.")
        return found.to(tile)
