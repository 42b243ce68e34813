"""The graphs of the live page: a parallel model in the pieces that questions about single latents need.

What `inspection.row_server` does with torch, cut the same way: the tokens of the first pass run once and leave their
keys and values (`remember`); then any latent is a matter of its own token (`look`). All that may be changed in a
what-if is an input.

    graph            inputs                                     outputs
    analysis         x                                          y, z
    hyper_synthesis  z_hat                                      hyper
    synthesis        y_hat                                      x_hat
    remember         y_hat, *change, keep                       keys, values
    look             y_hat, *change, hyper, keys, values,       means, scales, means_alone, scales_alone,
                     sites, visible                             content, position, scores, probs
    reference        y                                          means, scales

*change: k (int64 [1], 0 is dense), head_on [layers, heads] (0 takes away what a head has gathered), position_on [1].
keep: [c], 0 hides a token of the first pass from all but itself. keys, values: [layers, heads, c, d] of the c latents
of the first pass in raster order. sites: int64 [q]. visible: [q, c], 0 hides a token of the first pass from one query,
but for itself. means, scales: [q, M] with context, and alone with the context switched off. The others: [layers, heads,
q, c + 1]; the last column is the query's own key, which in the first pass is among the others and here hidden.
`reference` is a trained model without context behind the same transforms. Graphs of a model of variable rate take
`level` as in `onnx_export`.
"""

import torch
from torch import Tensor

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import AttentionError
from entroformer_lib.models.context import first_slice
from entroformer_lib.models.position import grid_sites
from entroformer_lib.onnx_export import (
    InGraphs,
    analysis,
    gathered,
    halved,
    hyper_synthesis,
    kth_largest,
    parts_of_scores,
    prepared,
    rate_input,
    scales_of,
    synthesis,
    traced,
)

TOKENS, LINES = {2: "tokens"}, {0: "queries"}
ROWS = {2: "queries", 3: "seen"}
AXES = {
    "keep": {0: "tokens"},
    "keys": TOKENS,
    "values": TOKENS,
    "sites": LINES,
    "visible": {0: "queries", 1: "tokens"},
    **dict.fromkeys(("means", "scales", "means_alone", "scales_alone"), LINES),
    **dict.fromkeys(("content", "position", "scores", "probs"), ROWS),
}
REMEMBERED = ("keys", "values")
LOOKED = ("means", "scales", "means_alone", "scales_alone", "content", "position", "scores", "probs")


def live_graphs(model: Entroformer, reference: Entroformer | None = None) -> dict[str, bytes]:
    """The graphs of a page, weights in half precision where nothing is lost by that.

    Args:
        model: a parallel model with a hyperprior.
        reference: a model without context behind the same transforms.

    Raises:
        AttentionError: another kind of model, or a reference behind other transforms. ConfigError: a search window.
        UserError: the package onnx is missing.
    """
    check(model, reference)
    model = prepared(model)
    c, level = model.config, rate_input(model)
    told = level if model.rate_knowledge is not None else {}
    y_hat, hyper = torch.randn(1, c.M, 8, 12).round(), torch.randn(1, c.dim, 8, 12)
    change = {
        "k": torch.tensor([c.top_k or 0]),
        "head_on": torch.ones(c.context_layers, c.heads),
        "position_on": torch.ones(1),
    }
    remember = {"y_hat": y_hat, **change, "keep": torch.ones(48), **told}
    known = torch.randn(2, c.context_layers, c.heads, 48, c.dim // c.heads)
    look = {
        "y_hat": y_hat, **change, "hyper": hyper, "keys": known[0], "values": known[1],
        "sites": torch.tensor([0, 5, 17]), "visible": torch.ones(3, 48), **told,
    }  # fmt: skip
    graphs = {
        "analysis": traced(model, analysis, {"x": torch.rand(1, 3, 128, 192), **level}, ("y", "z")),
        "hyper_synthesis": traced(model, hyper_synthesis, {"z_hat": torch.randn(1, c.Z, 2, 3), **told}, ("hyper",)),
        "synthesis": traced(model, synthesis, {"y_hat": y_hat, **level}, ("x_hat",)),
        "remember": traced(model, _remember, remember, REMEMBERED, AXES),
        "look": traced(model, _look, look, LOOKED, AXES),
    }
    if reference is not None:
        y = {"y": torch.randn(1, c.M, 8, 12)}
        graphs["reference"] = traced(prepared(reference), _reference, {**y, **level}, ("means", "scales"), AXES)
    return {name: halved(data) for name, data in graphs.items()}


def check(model: Entroformer, reference: Entroformer | None) -> None:
    """A sentence for models that no page can be made of."""
    c = model.config
    if c.context != "parallel" or not c.hyperprior:
        raise AttentionError(
            f"A live page takes a parallel model with a hyperprior, and this one is a model of the kind {c.variant}."
        )
    if reference is None:
        return
    if reference.config.context != "none" or reference.config.lmbdas != c.lmbdas:
        raise AttentionError("The reference must be a model without context, of the same lambdas.")
    ours, theirs = ({k: t for k, t in m.state_dict().items() if k.startswith("g_a.")} for m in (model, reference))
    if ours.keys() != theirs.keys() or any(not torch.equal(ours[k].cpu(), theirs[k].cpu()) for k in ours):
        raise AttentionError("The reference must have the transforms of the model, or their latents differ.")


class _Known:
    """Cache of one attention layer: what it was given, or what the token brings."""

    def __init__(self, k: Tensor | None = None, v: Tensor | None = None):
        self.k, self.v, self.closed = k, v, k is not None

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not self.closed:
            self.k, self.v = k, v
        return self.k, self.v


class _Changed:
    """Attention with the changes of a what-if, as `InGraphs` takes it. What it saw stays in `heard`."""

    def __init__(self, model: Entroformer, k: Tensor, head_on: Tensor, position_on: Tensor, visible: Tensor):
        self.layers = [block.attention for block in model.context_model.stack.blocks]
        self.k, self.head_on, self.position_on = k, head_on, position_on
        self.hidden = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
        self.heard: dict[str, list[Tensor]] = {"content": [], "position": [], "scores": [], "probs": []}

    def __call__(self, q, k, v, layer, sites, visible, relative, top_k, own=None) -> Tensor:
        content, position = parts_of_scores(q, k, layer, sites, relative, own)
        position = (torch.zeros_like(content) if position is None else position) * self.position_on
        scores = content + position + self.hidden
        dense = self.k < 1
        kth = kth_largest(scores, torch.where(dense, torch.ones_like(self.k), self.k)[0])
        least = torch.where(dense, torch.full_like(kth, -torch.inf), kth)
        probs = scores.masked_fill(scores < least, -torch.inf).softmax(dim=-1)
        found = (content, position, scores, probs)
        for name, tensor in zip(self.heard, found, strict=True):
            self.heard[name].append(tensor)
        return gathered(probs, v, own) * self.head_on[self.layers.index(layer)][:, None, None]


def _grid(y_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sites of the grid [n, 2], which of them are of the first pass [n], and their numbers [c]."""
    height, width = y_hat.shape[-2:]
    first = first_slice(height, width).flatten()
    return grid_sites(height, width), first, first.nonzero()[:, 0]


def _remember(model, y_hat, k, head_on, position_on, keep, level=None) -> tuple[Tensor, Tensor]:
    """Keys and values of the first pass."""
    context, (sites, _, carriers) = model.context_model, _grid(y_hat)
    tokens = context.embed(_seen(model, y_hat, level)[carriers])[None]
    number = torch.arange(keep.size(0))
    visible = (keep > 0) | (number == number[:, None])
    cache = [_Known() for _ in context.stack.blocks]
    with InGraphs(_Changed(model, k, head_on, position_on, visible)):
        context.stack(tokens, sites[carriers], cache=cache)
    return torch.cat([part.k for part in cache]), torch.cat([part.v for part in cache])


def _look(model, y_hat, k, head_on, position_on, hyper, keys, values, sites, visible, level=None):
    """Tokens that predict some latents, each apart from the others."""
    context, (grid, first, carriers) = model.context_model, _grid(y_hat)
    carries = first[sites][:, None]  # [q, 1]
    seen = torch.cat(((visible > 0) | (carriers == sites[:, None]), ~carries), dim=1)  # [q, c + 1]
    tokens = context.embed(_seen(model, y_hat, level)[sites] * carries)[None]
    cache = [_Known(keys[i : i + 1], values[i : i + 1]) for i in range(len(context.stack.blocks))]
    changed = _Changed(model, k, head_on, position_on, seen)
    with InGraphs(changed):
        feature = context.stack(tokens, torch.cat((grid[carriers], grid[sites])), cache=cache)[0]
    feature, here = feature * ~carries, hyper.flatten(2)[..., sites]
    said = [_gaussians(model, here, f, level) for f in (feature, torch.zeros_like(feature))]
    return *said[0], *said[1], *(torch.cat(tensors) for tensors in changed.heard.values())


def _reference(model, y, level=None) -> tuple[Tensor, Tensor]:
    """What a model without context predicts; it rounds its z itself."""
    rate = model.rate(level)
    z_hat = model.z_prior.quantize_z(model.hyper_analysis(y, rate))
    return _gaussians(model, model.hyper_synthesis(z_hat, rate).flatten(2), None, level)


def _seen(model: Entroformer, y_hat: Tensor, level: Tensor | None) -> Tensor:
    """Latents as tokens carry them, in the units before the gain where the model is told the rate: [n, M]"""
    rate = model.rate(level)
    return (y_hat if rate is None else y_hat * rate.inverse)[0].flatten(1).T


def _gaussians(model: Entroformer, hyper: Tensor, feature: Tensor | None, level) -> tuple[Tensor, Tensor]:
    """Means and scales of some sites.  hyper: [1, D, q]; feature: what the context says, [q, D], or None in a model
    without context  ->  [q, M] twice"""
    rate = model.rate(level)
    hyper = hyper[..., None] if rate is None else hyper[..., None] + rate.vector
    means, log_scales = model.entropy_parameters(hyper, None if feature is None else feature.T[None, :, :, None])
    if rate is not None:
        means, log_scales = means * rate.gain, log_scales + rate.log_gain
    return means[0, :, :, 0].T, scales_of(model, log_scales)[0, :, :, 0].T
